"""stream_fp8 against its definition in float64, against quantize_rows, and against itself with other rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels import ops
from lockstep.kernels.arguments import FP8Choice, FP8Rows, FP8Weight

import emulator
from kernel_cases import assert_close, dequantized, finished, random_fp8, to_device

BF16, F16 = torch.bfloat16, torch.float16
EPILOGUES = "STORE", "ADD", "SILU"
launches = functools.partial(emulator.launches, "stream_fp8")
quantization = functools.partial(emulator.launches, "scaled_gemm")

CASES = [  # rows, features, size, epilogue, dtype, Tile
    (50, 104, 2304, "ADD", BF16, (64, 48, 1, 3)),  # three blocks for three units of features
    (33, 104, 1920, "SILU", F16, (64, 64, 2, 1)),  # both halves of a tile begin inside blocks of scales
    (100, 200, 1536, "ADD", BF16, (128, 112, 1, 3)),
    (64, 200, 3968, "STORE", BF16, (64, 32, 1, 2)),  # more steps than stages, the last one not full
    (60, 200, 1024, "SILU", BF16, (64, 96, 3, 1)),
    (128, 152, 640, "ADD", F16, (128, 80, 1, 2)),
    (64, 40, 128, "ADD", BF16, (64, 32, 1, 2)),  # a block without columns
]


def quantized(device: str, x: Tensor) -> FP8Rows:
    return FP8Rows(*quantization(device).quantize_rows(x, None, 0.0, grouped=True), len(x), x.dtype)


def meant(x: FP8Rows) -> Tensor:
    """Return the activations that quantized rows mean, in float64."""
    return (x.numbers.double() * x.scales.double().T.repeat_interleave(128, 1)[:, : x.shape[1]])[: len(x)]


@pytest.mark.parametrize(
    ("rows", "features", "size", "epilogue", "dtype", "tile"),
    [pytest.param(*case, marks=pytest.mark.nightly if n > 2 else []) for n, case in enumerate(CASES)],
)
def test_stream_fp8(
    device: str, rows: int, features: int, size: int, epilogue: Any, dtype: torch.dtype, tile: tuple[int, ...]
) -> None:
    weight_rows = features * (2 if epilogue == "SILU" else 1)
    weight = to_device(random_fp8(weight_rows, size, 128, 128), device)
    x, before = (
        quantized(device, torch.randn(rows, size).to(device, dtype)),
        torch.randn(rows, features).to(device, dtype),
    )
    for bias in (None, torch.randn(weight_rows).to(device, dtype)):
        out = before.clone()
        module = launches(device)
        options = bias, EPILOGUES.index(epilogue), module.FP8Tile(*tile)
        module.launch_stream_fp8(out, x.numbers, x.scales, weight, *options)
        assert_close(out, finished(meant(x) @ dequantized(weight).T, bias, epilogue, before))


def test_quantized_features_have_the_bits_of_two_kernels(device: str) -> None:
    weight = to_device(random_fp8(2 * 384, 640, 128, 128), device)
    x = quantized(device, torch.randn(50, 640).to(device, BF16))
    hidden = torch.empty(50, 384, dtype=BF16, device=device)
    out = quantized(device, hidden)
    module = launches(device)
    options = weight, None, EPILOGUES.index("SILU"), module.FP8Tile(64, 64, 4)
    module.launch_stream_fp8(hidden, x.numbers, x.scales, *options)
    module.launch_stream_fp8(out, x.numbers, x.scales, *options)
    expected = quantized(device, hidden)
    assert torch.equal(out.numbers[:50].float(), expected.numbers[:50].float())
    assert torch.equal(out.scales[:, :50], expected.scales[:, :50])


@pytest.mark.nightly
def test_stream_fp8_row_is_bitwise_equal_for_any_number_of_rows(device: str) -> None:
    weight = to_device(random_fp8(96, 640, 128, 128), device)
    x = torch.randn(64, 640).to(device, BF16)
    module, results = launches(device), []
    for rows in (64, 40, 33):
        results.append(x.new_empty(rows, 96))
        part = quantized(device, x[:rows].contiguous())
        tile = module.FP8Tile(64, 48, 1, 2)
        module.launch_stream_fp8(results[-1], part.numbers, part.scales, weight, None, 0, tile)
    assert all(torch.equal(result, results[0][: len(result)]) for result in results)


@pytest.mark.emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("wait_for_phase(full(ring.stage), ring.phase);", "", 3),
        ("wait_for_phase(empty(ring.stage), ring.phase);", "", 3),
        ("sync_cluster();\n        }", "}", 0),
    ],
)
def test_stream_fp8_needs_its_barriers(right: str, wrong: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.put_fault(monkeypatch, "stream_fp8.cu", right, wrong)
    with pytest.raises(AssertionError, match=r"not close|forever"):
        test_stream_fp8("cpu", *CASES[case])


SHAPES = [  # rows of the weight, columns, gated
    (6144, 4096, False),  # Llama-3.1-8B
    (4096, 4096, False),
    (28672, 4096, True),
    (4096, 14336, False),
    (7168, 5120, False),  # Qwen3-14B
    (34816, 5120, True),
    (5120, 17408, False),
    (3072, 4096, False),  # half of Llama-3.1-8B
    (14336, 4096, True),
    (4096, 7168, False),
    (8192, 28672, False),  # Llama-3.1-70B
]


@pytest.mark.emulator
@pytest.mark.parametrize(("weight_rows", "size", "gated"), SHAPES)
def test_all_blocks_of_the_chosen_tile_run_at_once(weight_rows: int, size: int, gated: bool) -> None:
    module, rows = launches("cpu"), (8, 32, 33, 64, 65, 128, 129)
    tiles = [module.fastest_fp8_tile(count, weight_rows, size, gated, 132) for count in rows]
    tiles.append(module.quantizing_tile(64, weight_rows, 132) if gated else None)
    for tile in filter(None, tiles):
        assert tile.num_blocks(weight_rows) <= (132 if tile.is_alone else 264)
        assert tile.stages >= 3
        assert tile.stages * tile.stage_bytes + tile.extra_bytes <= (227 if tile.is_alone else 113) * 1024
        assert tile.threads <= 640


@pytest.mark.emulator
@pytest.mark.parametrize(("rows", "weight_rows", "size", "gated", "tile"), [
    (32, 6144, 4096, False, None),  # fp8_gemm is faster
    (64, 6144, 4096, False, (64, 48, 1, 2)),
    (64, 28672, 4096, True, None),
    (64, 34816, 5120, True, (64, 96, 3)),
    (100, 6144, 4096, False, None),
    (100, 4096, 14336, False, (128, 112, 1, 3)),
])  # fmt: skip
def test_the_fastest_tile(rows: int, weight_rows: int, size: int, gated: bool, tile: tuple[int, ...] | None) -> None:
    module = launches("cpu")
    assert module.fastest_fp8_tile(rows, weight_rows, size, gated, 132) == (tile and module.FP8Tile(*tile))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [33, 64, 100, 128, 130])
@pytest.mark.parametrize(("weight_rows", "size", "gated"), [shape for shape in SHAPES if shape[1] <= 17408])
def test_layers_of_large_matrices(rows: int, weight_rows: int, size: int, gated: bool) -> None:
    torch.manual_seed(0)
    weight: FP8Weight = to_device(random_fp8(weight_rows, size, 128, 128), "cuda")
    weight = weight._replace(choice=FP8Choice(tiled_rows=256))
    x = torch.randn(rows, size, device="cuda").bfloat16()
    sums = meant(quantized("cuda", x)) @ dequantized(weight).T
    assert_close(ops.linear(x, weight, gated=gated), finished(sums, None, "SILU" if gated else "STORE", x))
    if gated:
        feeds = to_device(random_fp8(256, weight_rows // 2, 128, 128), "cuda")
        hidden = ops.gated_linear(x, weight, feeds)
        expected = quantized("cuda", ops.linear(x, weight, gated=True))
        quantizes = launches("cuda").quantizing_tile(rows, weight_rows, 132) is not None
        assert isinstance(hidden, FP8Rows) or not quantizes
        if isinstance(hidden, FP8Rows):
            assert_close(hidden.dequantized(), meant(expected), 4)
