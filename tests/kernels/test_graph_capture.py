"""Garbage collection is paused during captures, and as it was afterwards."""

from __future__ import annotations

import gc
import weakref

import pytest

from lockstep.kernels.graph_capture import paused_collection


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_kept_until_the_block_ends() -> None:
    gc.collect()
    with paused_collection():
        alive = weakref.ref(Cycle())
        _ = [Cycle() for _ in range(100_000)]
        assert alive() is not None
    assert gc.isenabled()
    _ = [Cycle() for _ in range(100_000)]
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("was_enabled", [True, False])
def test_collection_is_as_before_after_an_error(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError), paused_collection():
            raise RuntimeError("the capture failed")
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_overlapping_blocks_end_with_the_last() -> None:
    first, second = paused_collection(), paused_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
