"""FP8 activations and their GEMM against definitions in float64, in the emulator and on a GPU."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels import ops
from lockstep.kernels.arguments import FP8Rows, FP8Weight

import emulator
from kernel_cases import assert_close, dequantized, finished, random_fp8, to_device

launches = functools.partial(emulator.launches, "scaled_gemm")
EPS = 1e-5


def activations(x: Tensor, norm: Tensor | None) -> Tensor:
    """Return what is quantized, in float64."""
    return x.double() if norm is None else F.rms_norm(x.double(), x.shape[1:], norm.double(), EPS)


def meant(numbers: Tensor, scales: Tensor, rows: int, first: int = 0) -> Tensor:
    """Return the activations that FP8 numbers and their scales mean, in float64."""
    groups = (first + torch.arange(numbers.shape[1], device=numbers.device)) // 128
    factors = scales[groups, :rows].T if scales.dim() == 2 else scales[:rows, None]
    return numbers[:rows].double() * factors.double()


@pytest.mark.parametrize("first", [0, 48])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "size", "dtype"), [(1, 128, torch.float16), (5, 4240, torch.bfloat16)])
def test_quantize_rows(
    device: str, rows: int, size: int, dtype: torch.dtype, normed: bool, grouped: bool, first: int
) -> None:
    x, norm = (torch.randn(rows, size) * 3).to(device, dtype), torch.rand(size).to(device, dtype) if normed else None
    x[0, : 128 - first] = 0  # a group, or a row, of zeros
    numbers, scales = launches(device).quantize_rows(x, norm, EPS, grouped=grouped, first=first)
    assert scales.shape == (((first + size + 127) // 128, -(-rows // 4) * 4) if grouped else (-(-rows // 4) * 4,))
    expected, actual = activations(x, norm), meant(numbers, scales, rows, first)
    ends = [0, *range(128 - first, size, 128), size] if grouped else [0, size]
    for begin, end in itertools.pairwise(ends):
        group = expected[:, begin:end].abs()
        peaks = group.amax(-1, keepdim=True)
        # Half a step of FP8: a sixteenth of a number, or 2^-10 of the scale; and the rounding of x before.
        allowed = group / 15 + peaks / 448 / 1000 + 1e-9
        assert ((actual - expected)[:, begin:end].abs() <= allowed).all()
        assert torch.equal(numbers[:rows, begin:end].double().abs().amax(-1) == 448, (peaks > 0)[:, 0])


@pytest.mark.parametrize("epilogue", ["STORE", "ADD", "SILU"])
@pytest.mark.parametrize("biased", [False, True])
def test_finish_of_products(device: str, epilogue: str, biased: bool) -> None:
    rows, features = 3, 4096 + 16
    products = torch.randn(rows, 2 * features if epilogue == "SILU" else features).to(device, torch.bfloat16)
    bias = torch.randn(products.shape[1]).to(device, torch.bfloat16) if biased else None
    before = torch.randn(rows, features).to(device, torch.bfloat16)
    expected = finished(products.double(), bias, epilogue, before)
    launches(device).finish_products(before, products, bias, epilogue)
    assert_close(before, expected)


@pytest.mark.parametrize("biased", [False, True])
def test_quantize_hidden_has_the_bits_of_two_kernels(device: str, biased: bool) -> None:
    module, products = launches(device), torch.randn(9, 2 * 2176).to(device, torch.bfloat16)
    bias = torch.randn(2 * 2176).to(device, torch.bfloat16) if biased else None
    hidden = products.new_empty(9, 2176)
    module.finish_products(hidden, products, bias, "SILU")
    numbers, scales = module.quantize_rows(hidden, None, 0.0, grouped=True)
    assert_same_rows(module.quantize_hidden(products, bias), numbers, scales)


def assert_same_rows(actual: FP8Rows, numbers: Tensor, scales: Tensor) -> None:
    rows = len(actual)
    assert torch.equal(actual.numbers[:rows].float(), numbers[:rows].float())
    assert torch.equal(actual.scales[:, :rows], scales[:, :rows])


def tiled(
    device: str, x: Tensor, weight: FP8Weight, bias: Tensor | None, epilogue: str, before: Tensor, invariant: bool
) -> tuple[Tensor, Tensor]:
    """Return the result of fp8_gemm for rows of x, and its definition in float64."""
    module, out = launches(device), before.clone()
    numbers, scales = module.quantize_rows(x, None, 0.0, grouped=True, first=weight.first)
    module.launch_fp8_gemm(out, numbers, scales, weight, bias, epilogue, invariant)
    sums = meant(numbers, scales, len(x), weight.first) @ dequantized(weight).T
    return out, finished(sums, bias, epilogue, before)


TILED = [  # rows, features, size, rows and columns of a block, place of column 0 in its block, epilogue, dtype
    (9, 24, 1552, 128, 128, 0, "ADD", torch.bfloat16),  # a cluster of three
    (16, 72, 1200, 16, 128, 48, "SILU", torch.float16),
    (33, 136, 768, 128, 128, 0, "SILU", torch.bfloat16),
    (130, 144, 208, 1, 256, 0, "STORE", torch.bfloat16),
    (20, 16, 2048, 1 << 30, 2048, 0, "STORE", torch.float16),
    (3, 24, 16, 8, 128, 112, "ADD", torch.bfloat16),
    (100, 152, 592, 128, 128, 64, "SILU", torch.bfloat16),
]


@pytest.mark.parametrize(
    ("rows", "features", "size", "block_rows", "block_columns", "first", "epilogue", "dtype"),
    [pytest.param(*case, marks=pytest.mark.nightly if n % 2 else []) for n, case in enumerate(TILED)],
)
def test_tiled_gemm(
    device: str,
    rows: int,
    features: int,
    size: int,
    block_rows: int,
    block_columns: int,
    first: int,
    epilogue: str,
    dtype: torch.dtype,
) -> None:
    weight_rows = features * (2 if epilogue == "SILU" else 1)
    weight = to_device(random_fp8(weight_rows, size, block_rows, block_columns, first), device)
    x, before = torch.randn(rows, size).to(device, dtype), torch.randn(rows, features).to(device, dtype)
    for bias in (None, torch.randn(weight_rows).to(device, dtype)):
        assert_close(*tiled(device, x, weight, bias, epilogue, before, False))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 40, 64, 200])
@pytest.mark.parametrize(
    ("features", "size", "epilogue"),
    [(4096, 4096, "ADD"), (6144, 4096, "STORE"), (9216, 2048, "SILU"), (17408, 2048, "SILU")],
)
def test_tiled_gemm_of_large_matrices(rows: int, features: int, size: int, epilogue: str) -> None:
    weight_rows = features * (2 if epilogue == "SILU" else 1)
    weight = to_device(random_fp8(weight_rows, size, 128, 128), "cuda")
    x, before = (torch.randn(rows, n, device="cuda").bfloat16() for n in (size, features))
    bias = torch.randn(weight_rows, device="cuda").bfloat16()
    for invariant in (False, True):
        assert_close(*tiled("cuda", x, weight, bias, epilogue, before, invariant))


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("tiles", "size", "parts"),
    [
        (1, 128, 1),
        (1, 1536, 3),
        (32, 14336, 4),
        (48, 4096, 4),
        (56, 5120, 3),
        (112, 4096, 1),
        (264, 5120, 1),
        (272, 5120, 2),
        (272, 896, 1),
        (300, 5120, 1),
    ],
)
def test_blocks_of_a_cluster_have_work_and_run_at_once(tiles: int, size: int, parts: int) -> None:
    assert launches("cpu")._num_parts(tiles, size, 132) == parts


@pytest.mark.emulator
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("wait_for_phase(memory.full(ring.stage), ring.phase);", "", 2),
        ("wait_for_phase(memory.empty(ring.stage), ring.phase);", "", 2),
        ("parts == 1 ? sync_threads(CONSUMERS) : sync_cluster();", "sync_threads(CONSUMERS);", 4),
        ("sync_threads(CONSUMERS);  // all have left", "// all have left", 2),
    ],
)
def test_tiled_gemm_needs_its_barriers(right: str, wrong: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator.put_fault(monkeypatch, "fp8_gemm.cu", right, wrong)
    with pytest.raises(AssertionError, match=r"not close|forever"):
        test_tiled_gemm("cpu", *TILED[case])


@pytest.mark.nightly
def test_tiled_gemm_row_is_bitwise_equal_in_any_batch(device: str) -> None:
    weight = to_device(random_fp8(160, 1040, 128, 128, 16), device)
    x, before = torch.randn(135, 1040).to(device, torch.bfloat16), torch.zeros(135, 160).to(device, torch.bfloat16)
    together, _ = tiled(device, x, weight, None, "STORE", before, True)
    for rows in (slice(0, 1), slice(4, 20), slice(4, 36), slice(10, 74), slice(128, 135)):
        part, _ = tiled(device, x[rows].contiguous(), weight, None, "STORE", before[rows], True)
        assert torch.equal(part, together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 64, 130, 256, 700])
@pytest.mark.parametrize(("block_rows", "block_columns"), [(128, 128), (1, 4096), (1 << 20, 4096)])
def test_linear_of_fp8_activations_is_exact_about_them(rows: int, block_rows: int, block_columns: int) -> None:
    from lockstep.kernels.cuda import scaled_gemm

    size, features = 4096, 1536
    x = torch.randn(rows, size, device="cuda").bfloat16()
    norm, bias = torch.rand(size, device="cuda").bfloat16(), torch.randn(2 * features, device="cuda").bfloat16()
    before = torch.randn(rows, features, device="cuda").bfloat16()
    both = to_device(random_fp8(2 * features, size, block_rows, block_columns), "cuda")
    half = to_device(random_fp8(features, size, block_rows, block_columns), "cuda")
    assert scaled_gemm.takes(x, half)
    for invariant in (False, True):
        option: dict[str, Any] = {"batch_invariant": invariant}
        grouped = block_columns == 128 or invariant or rows <= half.choice.tiled_rows
        plain = meant(*scaled_gemm.quantize_rows(x, None, 0.0, grouped=grouped), rows)
        normed = meant(*scaled_gemm.quantize_rows(x, norm, EPS, grouped=grouped), rows)
        sums = plain @ dequantized(half).T
        assert_close(ops.linear(x, half, **option), sums)
        out = ops.linear(x, half, bias[:features], out=torch.empty_like(before), **option)
        assert_close(out, sums + bias[:features].double())
        assert_close(ops.linear(x, half, add_to=before.clone(), **option), sums + before.double())
        gate, up = (normed @ dequantized(both).T + bias.double()).chunk(2, dim=-1)
        actual = ops.linear(x, both, bias, norm=norm, eps=EPS, gated=True, **option)
        assert_close(actual, F.silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 40, 64, 130, 300])
@pytest.mark.parametrize("invariant", [False, True])
def test_layers_take_the_rows_that_the_layer_before_has_quantized(rows: int, invariant: bool) -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(rows, 1024, device="cuda").bfloat16(), torch.rand(1024, device="cuda").bfloat16()
    gate_up, down = (to_device(random_fp8(*shape, 128, 128), "cuda") for shape in ((28672, 1024), (1024, 14336)))
    option: dict[str, Any] = {"batch_invariant": invariant}
    hidden = ops.gated_linear(x, gate_up, down, norm=norm, eps=EPS, **option)
    plain = ops.linear(x, gate_up, norm=norm, eps=EPS, gated=True, **option)
    if isinstance(hidden, FP8Rows):
        assert hidden.shape == plain.shape
        assert_close(hidden.dequantized(), plain.double(), 4)
        sums = meant(hidden.numbers, hidden.scales, rows) @ dequantized(down).T
        assert_close(ops.linear(hidden, down, **option), sums)
        assert_close(ops.linear(hidden, down, add_to=x.clone(), **option), sums + x.double())
    else:
        assert torch.equal(hidden, plain)
    assert isinstance(hidden, FP8Rows) == (not invariant and rows > 32)


def test_gated_linear_on_a_cpu_is_linear() -> None:
    x, gate_up, down = torch.randn(3, 256), random_fp8(512, 256, 128, 128), random_fp8(64, 256, 128, 128)
    assert torch.equal(ops.gated_linear(x, gate_up, down), ops.linear(x, gate_up, gated=True))
    with pytest.raises(ValueError, match=r"^feeds \[64, 256\] .* must have 128 columns"):
        ops.gated_linear(x, random_fp8(256, 256, 128, 128), down)


def test_linear_on_a_cpu_takes_quantized_rows_of_weights_with_blocks() -> None:
    numbers, scales = torch.randn(4, 256).to(torch.float8_e4m3fn), torch.rand(2, 4)
    rows, weight = FP8Rows(numbers, scales, 3, torch.bfloat16), random_fp8(64, 256, 128, 128)
    x = meant(numbers, scales, 3)
    assert rows.shape == (3, 256)
    assert torch.equal(rows.dequantized(), x.bfloat16())
    assert_close(ops.linear(rows, weight), x @ dequantized(weight).T, 2)
    with pytest.raises(ValueError, match="is quantized"):
        ops.linear(rows, random_fp8(64, 256, 1, 256))
    with pytest.raises(ValueError, match="is quantized"):
        ops.linear(rows, weight, norm=torch.ones(256))
