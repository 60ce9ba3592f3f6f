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
    (13, 120, 1344, "SILU", F16, (16, 112, 2, 1)),  # more steps than stages, the last one not full
    (16, 104, 3008, "ADD", BF16, (16, 48, 1, 2)),
    (64, 64, 1024, "SILU", BF16, (64, 48, 1, 4)),  # three units of features for four blocks
    (9, 96, 384, "STORE", BF16, (16, 32, 1, 1)),
    (30, 128, 2496, "SILU", BF16, (32, 80, 1, 4)),
    (50, 200, 704, "ADD", BF16, (64, 96, 2, 1)),
    (64, 72, 1024, "STORE", F16, (64, 64, 1, 2)),
    (10, 40, 64, "SILU", BF16, (16, 64, 1, 2)),  # a block without columns
    (32, 136, 512, "STORE", BF16, (32, 128, 2, 1)),
    (33, 88, 320, "ADD", F16, (64, 112, 1, 2)),
    (40, 200, 448, "SILU", BF16, (64, 128, 3, 1)),  # results in all three groups
]


@pytest.mark.parametrize(
    ("rows", "features", "size", "epilogue", "dtype", "tile"),
    [pytest.param(*case, marks=pytest.mark.nightly if n > 4 else []) for n, case in enumerate(CASES)],
)
def test_stream_gemm(
    device: str,
    rows: int,
    features: int,
    size: int,
    epilogue: Any,
    dtype: torch.dtype,
    tile: tuple[int, ...],
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
    x, weight = torch.randn(64, 448).to(device, BF16), torch.randn(96, 448).to(device, BF16)
    results = []
    for rows, instance in ((64, 64), (20, 32), (9, 16)):
        results.append(x.new_empty(rows, 48))
        module.launch_stream_gemm(results[-1], x[:rows], weight, None, "SILU", module.Tile(instance, 48, 1, 2))
    assert all(torch.equal(result, results[0][: len(result)]) for result in results)


@pytest.mark.emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("wait_for_phase(has_weight(stage), phase);", "", 0),
        ("wait_for_phase(has_x(stage), phase);", "", 0),
        ("arrive(empty(last));", "arrive(empty(stage));", 0),
        ("wait_for_blocks(stages.has_sums(), 0);", "", 2),
        ("        sync_threads(Sums::THREADS);\n    }\n    results.write();", "    }\n    results.write();", 3),
        ("            if (step >= STAGES) wait_for_phase(empty(stage), step / STAGES - 1);\n", "", 0),
        (
            "                wait_for_phase(empty(stage), step / STAGES - 1);\n            else",
            "                ;\n            else",
            0,
        ),
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
        for weight_rows, size in (
            (1536, 4096),
            (4096, 1024),
            (6144, 4096),
            (28672, 4096),
            (34816, 5120),
            (4096, 14336),
        ):
            tile = module.fastest_tile(rows, weight_rows, size, 132)
            assert tile.rows >= rows
            assert tile.num_blocks(weight_rows) <= (120 if tile.sharing > 2 else 132)
            assert tile.stages >= 3
            assert tile.shared_bytes <= 227 * 1024
    assert module.fastest_tile(64, 128256, 4096, 132) is None  # more tiles than multiprocessors


def test_tensors_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each differs in one thing from those that are taken."""
    module, capability = launches("cpu").stream_gemm, [9, 0]
    monkeypatch.setattr(module, "compute_capability", lambda device: tuple(capability))
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    x, weight, bias = torch.zeros(9, 128, dtype=BF16), torch.zeros(64, 128, dtype=BF16), torch.zeros(64, dtype=BF16)
    assert module.takes(x, weight, True, bias)
    wide = torch.zeros(9, 256, dtype=BF16)
    refused = [
        (torch.zeros(65, 128, dtype=BF16), weight, False, bias),
        (x[:, :72].contiguous(), weight[:, :72].contiguous(), False, bias),  # no whole parts
        (x, weight[:8], True, bias[:8]),  # four features
        (wide[:, :128], weight, False, bias),  # rows that are apart
        (x, weight, False, torch.zeros(65, dtype=BF16)[1:]),  # misaligned
        (x, weight, False, bias.float()),
        (x.float(), weight.float(), False, bias.float()),
        (x, torch.zeros(1, dtype=BF16).expand(128256, 128).contiguous(), False),  # more tiles than multiprocessors
    ]
    assert not any(module.takes(*case) for case in refused)
    for capability[:] in ([8, 0], [10, 0]):
        assert not module.takes(x, weight, True, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("weight_rows", "size"), [(1536, 4096), (4096, 14336), (28672, 4096), (34816, 5120)])
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
