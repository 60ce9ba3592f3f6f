"""The devices of tests that call a module of kernels/cuda directly; see `emulator.launches`."""

from __future__ import annotations

import shutil

import pytest
import torch

DEVICES = [pytest.param("cpu", marks=pytest.mark.emulator), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return "cpu" for the emulator, or "cuda"; tests of ops have fixtures of this name that override it."""
    torch.manual_seed(0)
    if request.param == "cpu" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    return str(request.param)
