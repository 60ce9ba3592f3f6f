"""The start that the doctor checks: its configuration, and this machine's part in it.

Importing torch takes longer than all checks together, so only checks of GPUs import it.
"""

from __future__ import annotations

import math
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...runtime.config import Config
from ...runtime.model.checkpoint import checkpoint_folder, fit_weights
from ...runtime.model.model_config import ModelConfig
from ..signals import signals_wait
from .p2p import P2PCheck

LOOPBACK = "127.0.0.1"
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")  # torch counts GPUs through one of these


@dataclass(frozen=True)
class PlannedStart:
    """A configuration to be started, as seen from one machine."""

    config: Config
    ip: str  # the address at which the other ranks would reach this machine
    alone: bool = False  # all ranks run on this machine, and belong to no Ray cluster that runs already
    p2p: P2PCheck | None = None

    @property
    def starts_ray(self) -> bool:
        """Whether the start also starts a Ray cluster on this machine."""
        return self.alone and self.config.tensor_parallel_size > 1

    @property
    def gpus(self) -> int:
        """The number of this machine's GPUs that the ranks may use."""
        return 0 if self.config.device == "cpu" else min(visible_gpus(), gpus_needed(self.config))

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint, which is not fetched."""
        return checkpoint_folder(self.config.model, self.config.revision, fetch=False)

    @cached_property
    def model(self) -> ModelConfig:
        """The model's configuration, read from the folder; check_checkpoint reports weights that do not fit it."""
        model = ModelConfig.from_config_file(self.folder).quantized_by(self.config.quantization)
        model = model.with_expert_parallel(self.config.enable_expert_parallel)
        with suppress(ValueError):
            return model if self.config.load_format == "dummy" else fit_weights(model, self.folder)
        return model


def visible_gpus() -> int:
    """Return the number of GPUs that torch sees."""
    if not has_driver():
        return 0
    with signals_wait():
        import torch  # takes seconds

    return torch.cuda.device_count()


def has_driver() -> bool:
    """Return True if one of DRIVER_LIBRARIES can be loaded; without them, torch sees no GPU."""
    for library in DRIVER_LIBRARIES:
        with suppress(OSError):
            CDLL(library)
            return True
    return False


def gpus_needed(config: Config) -> int:
    """Return the number of GPUs that the ranks take if they run on GPUs."""
    return math.ceil(config.tensor_parallel_size / max(1, int(1 / config.gpus_per_rank + 1e-6)))
