"""stream_gemm against its definition in float64 and, bit for bit, against itself with other rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import emulator
from kernel_cases import assert_close, finished

launches = functools.partial(emulator.launches, "stream_gemm")
BF16, F16 = torch.bfloat16, torch.float16


CASES = [  # rows, features, size, epilogue, dtype, Tile
    (13, 120, 1320, "SILU", F16, (16, 112, 2, 1, 1)),  # more steps than stages, the last one not full
    (16, 104, 3000, "ADD", BF16, (16, 48, 1, 2, 2)),
    (64, 64, 1000, "SILU", BF16, (64, 48, 1, 1, 4)),  # three units of features for four blocks
    (9, 96, 400, "STORE", BF16, (16, 32, 1, 2, 1)),  # wgmma reads beyond the stages
    (30, 128, 2448, "SILU", BF16, (32, 80, 1, 2, 4)),
    (50, 200, 728, "ADD", BF16, (64, 96, 2, 1, 1)),
    (64, 72, 1000, "STORE", F16, (64, 64, 1, 1, 2)),
    (10, 40, 64, "SILU", BF16, (16, 64, 1, 1, 2)),  # a block without columns
    (32, 136, 520, "STORE", BF16, (32, 128, 2, 1, 1)),
    (33, 88, 264, "ADD", F16, (64, 112, 1, 2, 2)),
]


@pytest.mark.parametrize(
    ("rows", "features", "size", "epilogue", "dtype", "tile"),
    [pytest.param(*case, marks=pytest.mark.nightly if n > 3 else []) for n, case in enumerate(CASES)],
)
def test_stream_gemm(
    device: str,
    rows: int,
    features: int,
    size: int,
    epilogue: Any,
    dtype: torch.dtype,
    tile: tuple[int, int, int, int, int],
) -> None:
    module, weight_rows = launches(device), features * (2 if epilogue == "SILU" else 1)
    x, weight = torch.randn(rows, size).to(device, dtype), torch.randn(weight_rows, size).to(device, dtype)
    bias, before = torch.randn(weight_rows).to(device, dtype), torch.randn(rows, features).to(device, dtype)
    for shift in (None, bias):
        out = before.clone()
        module.launch_stream_gemm(out, x, weight, shift, epilogue, module.Tile(*tile))
        assert_close(out, finished(x.double() @ weight.double().T, shift, epilogue, before))


def test_stream_gemm_row_is_bitwise_equal_for_any_number_of_rows(device: str) -> None:
    module = launches(device)
    x, weight = torch.randn(64, 456).to(device, BF16), torch.randn(96, 456).to(device, BF16)
    results = []
    for rows, instance in ((64, 64), (20, 32), (9, 16)):
        results.append(x.new_empty(rows, 48))
        module.launch_stream_gemm(results[-1], x[:rows], weight, None, "SILU", module.Tile(instance, 48, 1, 2, 2))
    assert all(torch.equal(result, results[0][: len(result)]) for result in results)


@pytest.mark.emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("wait_for_phase(full(step), step / STAGES);", "", 0),
        ("wait_for_phase(empty(step), step / STAGES - 1);", "", 0),
        ("sharing > 1 ? sync_cluster() : sync_threads(CONSUMERS);", "", 2),
        ("sharing > 1 ? sync_cluster() : sync_threads(CONSUMERS);", "", 3),
    ],
)
def test_stream_gemm_needs_its_barriers(right: str, wrong: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.put_fault(monkeypatch, "stream_gemm.cu", right, wrong)
    with pytest.raises(AssertionError, match=r"not close|forever"):
        test_stream_gemm("cpu", *CASES[case])


@pytest.mark.emulator
def test_all_blocks_of_the_chosen_tile_run_at_once() -> None:
    module = launches("cpu")
    for rows in (9, 30, 64):
        for weight_rows, size in ((1536, 4096), (4096, 1024), (6144, 4096), (28672, 4096), (4096, 14336)):
            tile = module.fastest_tile(rows, weight_rows, size, 132)
            assert tile.rows >= rows
            assert tile.num_blocks(weight_rows) <= (120 if tile.sharing > 2 else 132)
            assert tile.stages >= 3
            assert tile.stages * tile.stage_bytes + tile.extra_bytes <= 227 * 1024
    assert module.fastest_tile(64, 128256, 4096, 132) is None  # more tiles than multiprocessors


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("weight_rows", "size", "gated", "faster"),
    [
        (28672, 4096, True, True),  # gate and up of Llama-3.1-8B
        (4096, 14336, False, True),  # its down projection: long rows
        (4096, 4096, False, False),  # its output projection, 32 MiB
        (4096, 3584, False, True),  # a quarter of its down projection, 28 MiB
        (8192, 7168, False, False),  # a quarter of the down projection of Llama-3.1-70B
    ],
)
def test_weights_that_stream_gemm_takes(weight_rows: int, size: int, gated: bool, faster: bool) -> None:
    assert launches("cpu").is_faster(weight_rows, size, gated) == faster


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("weight_rows", "size"), [(1536, 4096), (4096, 14336), (28672, 4096)])
def test_linear_of_tens_of_rows(weight_rows: int, size: int, gated: bool) -> None:
    from lockstep.kernels import ops

    torch.manual_seed(0)
    weight = torch.randn(weight_rows, size, device="cuda").bfloat16() / size**0.5
    for rows in (9, 16, 17, 32, 50, 64):
        x = torch.randn(rows, size, device="cuda").bfloat16()
        result = ops.linear(x, weight, gated=gated)
        sums = x.double() @ weight.double().T
        assert_close(result, finished(sums, None, "SILU" if gated else "STORE", sums))
        assert torch.equal(ops.linear(x, weight, gated=gated), result)
