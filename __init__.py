"""lockstep: tensor-parallel inference for large language models; every rank executes the same plan."""

import sys
from os.path import dirname, realpath
from typing import TYPE_CHECKING, Any

from .runtime.version import __version__ as __version__

# Started from the checkout, Python and every Ray worker put this folder on sys.path, where the bare names `comm` and
# `kernels` would hide the packages of those names that Jupyter and transformers use.
sys.path[:] = [p for p in sys.path if realpath(p or ".") != dirname(realpath(__file__))]

if TYPE_CHECKING:
    from .launch.llm import LLM
    from .runtime.config import Config
    from .runtime.sampling_params import SamplingParams
    from .runtime.structured_outputs import StructuredOutputsParams

__all__ = ["LLM", "Config", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LLM": "launch.llm",
    "Config": "runtime.config",
    "SamplingParams": "runtime.sampling_params",
    "StructuredOutputsParams": "runtime.structured_outputs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import lockstep` alone loads neither torch nor Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}; it exports {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
