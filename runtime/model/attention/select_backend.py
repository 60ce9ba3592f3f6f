"""The choice of the attention backend that a rank uses."""

from __future__ import annotations

import logging

import torch

from ...config import Config
from ...startup_timer import StartupTimer
from ..model_config import ModelConfig
from .backend import DTYPES, HEAD_DIMS, MAX_GROUP, AttentionBackend, AttentionShape
from .batch_invariant import BatchInvariantAttention
from .torch_attention import TorchAttention

log = logging.getLogger(__name__)


def select_backend(
    config: Config,
    model: ModelConfig,
    shape: AttentionShape,
    device: torch.device,
    timer: StartupTimer,
    *,
    announce: bool,
) -> AttentionBackend:
    """Return the fastest backend for `shape` that `config`, which is resolved, allows on `device`.

    Raises ValueError if the backend that `config` asks for cannot serve the shape. `announce` logs a slow choice.
    """
    scale = model.head_dim**-0.5
    if config.attention_backend == "torch" or device.type != "cuda":
        return TorchAttention(scale)
    reason = unsupported_reason(shape)
    if reason is not None:
        if config.deterministic:
            raise ValueError(f"deterministic=True cannot be honoured: {reason}; leave it out")
        if config.attention_backend == "flashinfer":
            raise ValueError(f"attention_backend='flashinfer' cannot be used: {reason}; use auto or torch")
        if announce:
            log.warning("attention through plain torch, slowly: %s", reason)
        return TorchAttention(scale)
    windows = {model.window(layer) for layer in range(model.num_layers)}
    if config.deterministic:
        assert config.max_model_len is not None
        return BatchInvariantAttention(shape, scale, windows, config.max_model_len)
    with timer("imports"):
        from . import flashinfer_backend  # costs 5 s and needs a GPU

    return flashinfer_backend.FlashInferAttention(shape, scale, windows, device)


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Return the reason why the GPU backends cannot serve this shape, or None."""
    if shape.dtype not in DTYPES:
        return f"there are no kernels for {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim not in HEAD_DIMS:
        return f"there are no kernels for head_dim {shape.head_dim}"
    if shape.num_heads > MAX_GROUP * shape.num_kv_heads:
        return f"{shape.num_heads} query heads on {shape.num_kv_heads} key heads are more than {MAX_GROUP} on each"
    return None
