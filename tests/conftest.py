"""Fixtures that several files share, and the rule that a missing GPU skips with a reason."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks and tests are many, cores are few
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test fetches anything

import torch

import lockstep  # noqa: F401 - takes the checkout off sys.path before transformers looks for a package `kernels`

from checkpoints import tiny_checkpoint

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        needed = 2 if "multigpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), this machine has {gpus}"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of vocabulary 131 and 256 positions, without a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_checkpoint(folder, "LlamaForCausalLM", max_position_embeddings=256)
    return folder


@pytest.fixture(autouse=True)
def _log_level_stays() -> Iterator[None]:
    """Commands set the level of our logger; the next test must not inherit it."""
    logger = logging.getLogger("lockstep")
    level = logger.level
    yield
    logger.setLevel(level)
