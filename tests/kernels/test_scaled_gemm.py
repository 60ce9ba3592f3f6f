"""FP8 activations against their definition in float64, in the emulator and on a GPU; the GEMM of both on a GPU."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels import ops

import emulator
from kernel_cases import assert_close, dequantized, random_fp8, to_device

DEVICES = [pytest.param("cpu", marks=pytest.mark.emulator), pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    if request.param == "cpu" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    return str(request.param)


def launches(device: str) -> Any:
    if device == "cpu":
        return emulator.emulated()
    from lockstep.kernels.cuda import scaled_gemm

    return SimpleNamespace(quantize_rows=scaled_gemm.quantize_rows, _finish=scaled_gemm._finish)


def activations(x: Tensor, source: str, norm: Tensor) -> Tensor:
    """Return what is quantized, in float64."""
    if source == "NORM":
        return F.rms_norm(x.double(), x.shape[1:], norm.double(), EPS)
    gate, up = x.double().chunk(2, dim=-1)
    return F.silu(gate) * up if source == "SILU" else x.double()


def meant(numbers: Tensor, scales: Tensor, rows: int) -> Tensor:
    """Return the activations that FP8 numbers and their scales mean, in float64."""
    scales = scales[:rows].double()
    width = numbers.shape[1] // (scales.shape[1] if scales.dim() == 2 else 1)
    return numbers[:rows].double() * scales.reshape(rows, -1).repeat_interleave(width, 1)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("source", ["PLAIN", "NORM", "SILU"])
@pytest.mark.parametrize(("rows", "size", "dtype"), [(1, 128, torch.float16), (5, 4224, torch.bfloat16)])
def test_quantize_rows(device: str, rows: int, size: int, dtype: torch.dtype, source: Any, grouped: bool) -> None:
    x = (torch.randn(rows, size * (2 if source == "SILU" else 1)) * 3).to(device, dtype)
    x[0, :128] = 0  # a group, or a row, of zeros
    norm = torch.rand(size).to(device, dtype)
    numbers, scales = launches(device).quantize_rows(
        x, source, norm if source == "NORM" else None, EPS, grouped=grouped
    )
    expected, actual = activations(x, source, norm), meant(numbers, scales, rows)
    width = 128 if grouped else size
    peaks = expected.unflatten(1, (-1, width)).abs().amax(-1, keepdim=True)
    # Half a step of FP8: a sixteenth of a number, or 2^-10 of the scale; and the rounding of the activations before.
    allowed = (expected.unflatten(1, (-1, width)).abs() / 15 + peaks / 448 / 1000).flatten(1) + 1e-9
    assert ((actual - expected).abs() <= allowed).all()
    assert torch.equal(numbers[:rows].double().unflatten(1, (-1, width)).abs().amax(-1) == 448, (peaks > 0)[..., 0])


@pytest.mark.parametrize(
    ("gated", "adds", "scaled"), [(False, False, True), (False, True, True), (True, False, True), (True, False, False)]
)
def test_finish_of_products(device: str, gated: bool, adds: bool, scaled: bool) -> None:
    rows, features = 3, 4096 + 16
    products = torch.randn(rows, 2 * features if gated else features).to(device, torch.bfloat16)
    weight = to_device(random_fp8(products.shape[1], 128, 16, 128), device)._replace()
    scales, bias = torch.rand(rows).to(device) + 0.5, torch.randn(products.shape[1]).to(device, torch.bfloat16)
    before = torch.randn(rows, features).to(device, torch.bfloat16)
    expected = products.double()
    if scaled:
        expected = expected * scales.double()[:, None] * weight.scales.double()[:, 0].repeat_interleave(16)
    expected += bias.double()
    if gated:
        expected = F.silu(expected[:, :features]) * expected[:, features:]
    if adds:
        expected += before.double()
    arguments = (scales, weight) if scaled else (None, None)
    actual = launches(device)._finish(products, *arguments, bias, gated, before.clone() if adds else None, None)
    assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [9, 64, 130, 700])
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
    grouped = block_columns == 128
    plain = meant(*scaled_gemm.quantize_rows(x, "PLAIN", None, 0.0, grouped=grouped), rows)
    normed = meant(*scaled_gemm.quantize_rows(x, "NORM", norm, EPS, grouped=grouped), rows)
    sums = plain @ dequantized(half).T
    assert_close(ops.linear(x, half), sums)
    assert_close(ops.linear(x, half, bias[:features], out=torch.empty_like(before)), sums + bias[:features].double())
    assert_close(ops.linear(x, half, add_to=before.clone()), sums + before.double())
    gate, up = (normed @ dequantized(both).T + bias.double()).chunk(2, dim=-1)
    assert_close(ops.linear(x, both, bias, norm=norm, eps=EPS, gated=True), F.silu(gate) * up)
