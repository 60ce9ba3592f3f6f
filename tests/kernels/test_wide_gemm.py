"""wide_gemm against its definition in float64 and, bit for bit, against itself with other rows and tiles."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels import ops

import emulator
from kernel_cases import assert_close, finished

launches = functools.partial(emulator.launches, "wide_gemm")
BF16, F16 = torch.bfloat16, torch.float16


CASES = [  # rows, features, size, epilogue, dtype, rows of the weight and of x in a tile
    (9, 36, 1032, "SILU", BF16, 64, 16),  # more steps than stages, the last one not full
    (70, 136, 328, "ADD", F16, 128, 64),  # two tiles of x
    (13, 40, 1224, "ADD", BF16, 64, 16),
    (60, 72, 712, "STORE", F16, 64, 64),
    (16, 200, 1032, "STORE", F16, 128, 16),
    (30, 72, 8, "ADD", BF16, 64, 32),
    (32, 260, 456, "SILU", BF16, 128, 32),
    (64, 40, 640, "SILU", F16, 64, 64),
    (128, 100, 392, "ADD", BF16, 64, 128),
    (100, 136, 264, "SILU", F16, 128, 128),
    (300, 72, 200, "SILU", BF16, 128, 256),
    (257, 264, 328, "ADD", F16, 128, 256),
]


@pytest.mark.parametrize(
    ("rows", "features", "size", "epilogue", "dtype", "tile_weight_rows", "tile_rows"),
    [pytest.param(*case, marks=pytest.mark.nightly if n > 1 else []) for n, case in enumerate(CASES)],
)
def test_wide_gemm(
    device: str,
    rows: int,
    features: int,
    size: int,
    epilogue: Any,
    dtype: torch.dtype,
    tile_weight_rows: int,
    tile_rows: int,
) -> None:
    module, weight_rows = launches(device), features * (2 if epilogue == "SILU" else 1)
    x, weight = torch.randn(rows, size).to(device, dtype), torch.randn(weight_rows, size).to(device, dtype)
    bias, before = torch.randn(weight_rows).to(device, dtype), torch.randn(rows, features).to(device, dtype)
    for shift in (None, bias):
        out = before.clone()
        module.launch_wide_gemm(out, x, weight, shift, epilogue, module.WideTile(tile_weight_rows, tile_rows))
        assert_close(out, finished(x.double() @ weight.double().T, shift, epilogue, before))


def test_wide_gemm_row_is_bitwise_equal_in_any_batch_and_tile(device: str) -> None:
    x, weight = torch.randn(200, 264).to(device, BF16), torch.randn(144, 264).to(device, BF16)
    module, together = launches(device), x.new_empty(200, 72)
    module.launch_wide_gemm(together, x, weight, None, "SILU", module.WideTile(128, 256))
    for rows in (slice(None), slice(0, 1), slice(199, 200), slice(5, 14), slice(70, 134), slice(1, 129)):
        assert torch.equal(module.wide_linear(x[rows], weight, None, True, None, None), together[rows])
    assert module.wide_linear(x[:0], weight, None, True, None, None).shape == (0, 72)
    out = x.new_empty(9, 144)
    assert module.wide_linear(x[:9], weight, None, False, None, out) is out  # as the buffer of an all-reduce
    assert torch.equal(out, module.wide_linear(x[:9], weight, None, False, None, None))


@pytest.mark.emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("wait_for_phase(full(step), step / STAGES);", "", 0),
        ("wait_for_phase(empty(step), step / STAGES - 1);", "", 0),
        ("sync_threads(Shape::CONSUMERS);  // all have left", "// all have left", 9),
        ("sync_threads(Shape::CONSUMERS);  // all sums", "// all sums", 0),
    ],
)
def test_wide_gemm_needs_its_barriers(right: str, wrong: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.put_fault(monkeypatch, "wide_gemm.cu", right, wrong)
    with pytest.raises(AssertionError, match=r"not close|forever"):
        test_wide_gemm("cpu", *CASES[case])


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("rows", "weight_rows", "tile_weight_rows", "tile_rows"),
    [
        (1, 28672, 128, 16),
        (1, 4096, 64, 16),
        (17, 6144, 64, 32),
        (64, 28672, 128, 64),
        (65, 4096, 64, 128),
        (128, 28672, 128, 128),
        (129, 28672, 128, 256),
        (500, 4096, 64, 128),
        (500, 6144, 128, 256),
        (500, 28672, 128, 256),
        (1000, 4096, 128, 256),
    ],
)
def test_largest_tile_that_fills_most_of_a_gpu(
    rows: int, weight_rows: int, tile_weight_rows: int, tile_rows: int
) -> None:
    module = launches("cpu")
    tile = module.choose_tile(rows, weight_rows, 132)
    assert tile == module.WideTile(tile_weight_rows, tile_rows)
    assert tile.stages >= 3
    assert tile.stages * tile.stage_bytes <= (227 if tile_rows > 128 else 113) * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("weight_rows", "size"), [(1536, 4096), (4096, 14336), (28672, 4096)])
def test_linear_has_equal_bits_for_one_row_and_for_thousands(weight_rows: int, size: int, gated: bool) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, size, device="cuda").bfloat16() for n in (3000, weight_rows))
    before = torch.randn(3000, weight_rows, device="cuda").bfloat16()

    def layer(rows: slice) -> Tensor:
        add_to = None if gated else before[rows].clone()
        return ops.linear(x[rows], weight, gated=gated, add_to=add_to, batch_invariant=True)

    together, sums = layer(slice(None)), x.double() @ weight.double().T
    assert_close(together, finished(sums, None, "SILU" if gated else "ADD", before))
    for count in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 700, 2048):
        rows = slice(3000 - 7 - count, 3000 - 7)
        assert torch.equal(layer(rows), together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_wide_gemms_follow_each_other_in_a_graph(rows: int) -> None:
    """Each starts early, before its input is complete."""
    torch.manual_seed(0)
    weights = [torch.randn(2048, 2048, device="cuda").bfloat16() / 45 for _ in range(6)]
    start = torch.randn(rows, 2048, device="cuda").bfloat16()

    def several() -> Tensor:
        x = start
        for weight in weights:
            x = ops.linear(x, weight, batch_invariant=True)
        return x

    expected = several()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = several()
    for _ in range(20):
        graph.replay()
        assert torch.equal(actual, expected)
