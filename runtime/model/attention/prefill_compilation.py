"""The compilation of FlashInfer's kernels for a model, while its weights load."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from contextlib import suppress

import torch

from ...config import Config
from ..kv_pool import AttentionShape
from ..model_config import ModelConfig
from .backend import unsupported_reason

log = logging.getLogger(__name__)
UNNAMED_S, REPEATED_S = 2.0, 30.0  # a wait is logged after, and then every so many seconds


class PrefillCompilation:
    """The compilation of FlashInfer's kernels in a thread, so that weights load meanwhile.

    An error is left to the first step, which compiles again.
    """

    def __init__(self, shape: AttentionShape, windows: Collection[int | None], softcap: float | None) -> None:
        self._shape, self._windows, self._softcap = shape, windows, softcap
        self._thread = threading.Thread(target=self._run, name="lockstep-compilation", daemon=True)
        self._thread.start()

    def wait(self, *, announce: bool) -> None:
        """Wait for the end; `announce` logs a wait, and every half minute that it lasts."""
        self._thread.join(UNNAMED_S)
        started = time.monotonic()
        while self._thread.is_alive():
            if announce:
                log.info(
                    "waiting for nvcc to compile FlashInfer's attention for heads of %d elements, %.0f s so far; "
                    "later starts load it",
                    self._shape.stored_head_dim,
                    time.monotonic() - started,
                )
            self._thread.join(REPEATED_S)

    def _run(self) -> None:
        with suppress(Exception):
            from . import flashinfer_backend

            flashinfer_backend.compile_prefill(self._shape, self._windows, self._softcap, torch.device("cuda"))


def compile_ahead(config: Config, model: ModelConfig) -> PrefillCompilation | None:
    """Import FlashInfer and compile its kernels in a thread; None if `config`, which is resolved, does not use them."""
    shape = AttentionShape(
        num_layers=1,
        num_heads=1,  # kernels do not depend on numbers of heads
        num_kv_heads=1,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=config.torch_dtype,
        kv_dtype=config.kv_torch_dtype,
        padded_head_dim=model.stored_head_dim,
    )
    uses_flashinfer = config.device == "cuda" and config.attention_backend != "torch" and not config.deterministic
    if not uses_flashinfer or unsupported_reason(shape) is not None:
        return None
    return PrefillCompilation(shape, {model.windows[n] for n in model.attention_layers}, model.attention_softcap)
