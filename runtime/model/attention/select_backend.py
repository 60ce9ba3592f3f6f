"""The choice of the attention backend that a rank uses."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import torch

from ....comm.timing import IMPORT_THREAD
from ....kernels.graph_capture import paused_collection
from ...config import Config
from ...startup_timer import StartupTimer
from ..kv_pool import AttentionShape
from ..model_config import ModelConfig
from .backend import AttentionBackend, BatchInvariantAttention, TorchAttention, unsupported_reason

log = logging.getLogger(__name__)


def select_backend(
    config: Config, model: ModelConfig, shape: AttentionShape, timer: StartupTimer, *, announce: bool
) -> AttentionBackend:
    """Return the fastest backend for `shape` that `config`, which is resolved, allows.

    Raises ValueError if the backend that `config` asks for cannot serve the shape. `announce` logs a slow choice.
    """
    scale, softcap = model.attention_multiplier, model.attention_softcap
    if config.attention_backend == "torch" or config.device != "cuda":
        return TorchAttention(scale, softcap)
    reason = unsupported_reason(shape)
    if reason is not None:
        if config.deterministic:
            raise ValueError(f"deterministic=True cannot be used: {reason}; leave it out")
        if config.attention_backend == "flashinfer":
            raise ValueError(f"attention_backend='flashinfer' cannot be used: {reason}; use auto or torch")
        if announce:
            log.warning("using slow PyTorch attention: %s", reason)
        return TorchAttention(scale, softcap)
    groups = model.layer_groups.groups
    windows = dict.fromkeys(
        (model.windows[layer], group) for layer, group in zip(model.attention_layers, groups, strict=True)
    )
    if config.deterministic:
        assert config.max_model_len is not None
        return BatchInvariantAttention(shape, scale, {window for window, _ in windows}, config.max_model_len, softcap)
    with timer("imports"):
        from . import flashinfer_backend  # costs 2 s and needs a GPU

    return flashinfer_backend.FlashInferAttention(shape, scale, windows, torch.device(config.device), softcap)


def import_ahead(config: Config) -> None:
    """Import what a rank on a GPU needs later, in a thread, if `config`, which is resolved, names a GPU.

    It takes seconds, in which the rank can connect to the others and load its weights. `select_backend` waits for the
    import of FlashInfer.
    """
    if config.device == "cuda":
        uses_flashinfer = config.attention_backend != "torch" and not config.deterministic
        threading.Thread(target=_import_modules, args=(uses_flashinfer,), name=IMPORT_THREAD).start()


def _import_modules(uses_flashinfer: bool) -> None:
    with paused_collection(), suppress(Exception):  # the importing module raises it again
        from ....kernels.cuda import kernel_launch  # noqa: F401 - CuPy, which connecting needs first

        if uses_flashinfer:
            from . import flashinfer_backend  # noqa: F401
