"""The ops of layers with a recurrent state against transformers' Qwen3.5: on a CPU, on a GPU, in the emulator."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated, torch_recurrent_gated_delta_rule

from lockstep.kernels import ops, state_ops
from lockstep.kernels.arguments import DeltaLayer, StateRows

import emulator

KEY_HEADS, VALUE_HEADS, TAPS = 2, 4, 4
SIZES = [(64, 32), (32, 16)]  # of key and value heads
COUNTS = [21, 1, 5]  # tokens of each row
SLOTS = [4, 0, 2]
EMULATED = pytest.param("emulated", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))


@pytest.fixture(params=["cpu", EMULATED, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    if request.param != "emulated":
        return str(request.param)
    monkeypatch.setattr(ops, "reference", emulator.emulated())
    return "cpu"


@pytest.fixture
def bitwise(device: str) -> bool:
    return device == "cuda" or ops.reference is emulator.emulated()


def rows_of(counts: list[int], device: str, saves: Tensor | None = None) -> StateRows:
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    slots = torch.tensor(SLOTS[: len(counts)]).int()
    return StateRows(slots.to(device), starts.to(device), None if saves is None else saves.to(device))


def pieces(counts: list[int]) -> list[slice]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_conv_continues_its_state(device: str, dtype: torch.dtype) -> None:
    channels, total = 140, sum(COUNTS)
    x, weight = torch.randn(total, 2 * channels).to(dtype)[:, :channels], torch.randn(channels, TAPS).to(dtype)
    states = torch.randn(6, TAPS - 1, channels).to(dtype)
    saves = torch.tensor([[[8, 1], [21, 3]], [[0, 0], [0, 0]], [[2, 5], [0, 0]]]).int()
    actual_states = states.clone().to(device)
    out = state_ops.causal_conv_(x.to(device), weight.to(device), actual_states, rows_of(COUNTS, device, saves))
    expected = states.clone()
    for slot, piece, pairs in zip(SLOTS, pieces(COUNTS), saves.tolist(), strict=True):
        inputs = torch.cat((states[slot], x[piece])).float()
        conv = F.conv1d(inputs.T[None], weight.float().unsqueeze(1), groups=channels)[0].T
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out[piece].cpu().float(), F.silu(conv), rtol=tolerance, atol=tolerance)
        expected[slot] = inputs[-TAPS + 1 :].to(dtype)
        for count, saved in pairs:
            if count:
                expected[saved] = inputs[count : count + TAPS - 1].to(dtype)
    assert torch.equal(actual_states.cpu(), expected)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_delta_equals_transformers(device: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    key_size, value_size = sizes
    total = sum(COUNTS)
    q, k = (torch.randn(total, KEY_HEADS, key_size).to(dtype) for _ in range(2))
    v = torch.randn(total, VALUE_HEADS, value_size).to(dtype)
    gates, decay = torch.randn(total, 2 * VALUE_HEADS).to(dtype), torch.rand(2, VALUE_HEADS).to(dtype)
    states = torch.randn(6, VALUE_HEADS, key_size, value_size)
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    actual_states = states.clone().to(device)
    inputs = qkv.to(device), gates.to(device), decay.to(device)
    out = state_ops.gated_delta_(*inputs, actual_states, rows_of(COUNTS, device))
    b, a = gates.float().chunk(2, dim=1)
    g = -decay[0].float().exp() * F.softplus(a + decay[1].float())
    for slot, piece in zip(SLOTS, pieces(COUNTS), strict=True):
        q_of_value, k_of_value = (x.repeat_interleave(VALUE_HEADS // KEY_HEADS, dim=1) for x in (q, k))
        whole = [x[None, piece].float() for x in (q_of_value, k_of_value, v, g, b.sigmoid())]
        expected, last = torch_recurrent_gated_delta_rule(
            *whole, initial_state=states[slot : slot + 1], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out[piece].cpu().float(), expected[0].flatten(1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(actual_states[slot].cpu(), last[0], rtol=1e-4, atol=2e-5)


def assert_same(actual: Tensor, expected: Tensor, *, bitwise: bool) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if bitwise else 1e-5)


def test_gated_delta_is_the_same_in_chunks_and_saves_its_state(device: str, bitwise: bool) -> None:
    """Alone or beside other rows, in one run or in chunks, and in a saved state; bit for bit, but for plain torch."""
    key_size, value_size = 32, 16
    width, total = 2 * KEY_HEADS * key_size + VALUE_HEADS * value_size, sum(COUNTS)
    qkv, gates = torch.randn(total, width, device=device), torch.randn(total, 2 * VALUE_HEADS, device=device)
    decay = torch.rand(2, VALUE_HEADS, device=device)
    states = torch.randn(6, VALUE_HEADS, key_size, value_size, device=device)
    saves = torch.tensor([[[8, 1], [21, 3]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]).int()
    together = states.clone()
    out = state_ops.gated_delta_(qkv, gates, decay, together, rows_of(COUNTS, device, saves))
    chunked = states.clone()
    for first, stop in ((0, 8), (8, 9), (9, 21)):
        part = state_ops.gated_delta_(
            qkv[first:stop], gates[first:stop], decay, chunked, rows_of([stop - first], device)
        )
        assert_same(part, out[first:stop], bitwise=bitwise)
        if stop == 8:
            assert_same(together[1], chunked[SLOTS[0]], bitwise=bitwise)
    assert_same(together[SLOTS[0]], chunked[SLOTS[0]], bitwise=bitwise)
    assert_same(together[3], chunked[SLOTS[0]], bitwise=bitwise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_rms_norm_equals_transformers(device: str, dtype: torch.dtype) -> None:
    norm = Qwen3_5RMSNormGated(48)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, gate = torch.randn(5, 144).to(dtype), torch.randn(5, 200).to(dtype)[:, :144]
    weight = norm.weight.detach().to(dtype)
    actual = state_ops.gated_rms_norm(x.to(device), gate.to(device), weight.to(device), 1e-6)
    norm.weight.data = weight.float()
    expected = norm(x.float().view(-1, 48), gate.float().reshape(-1, 48)).view(5, 144)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.cpu().float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("key_heads", "sizes"), [(2, (64, 32)), (4, (32, 16)), (1, (32, 128))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_of_a_step_is_bitwise_the_three(
    device: str, bitwise: bool, dtype: torch.dtype, key_heads: int, sizes: tuple[int, int]
) -> None:
    key_size, value_size = sizes
    keys, values, rows = 2 * key_heads * key_size, VALUE_HEADS * value_size, 3
    channels = keys + values
    mixed = torch.randn(rows, channels + values + 2 * VALUE_HEADS).to(dtype).to(device)
    x, z, gates = mixed.split([channels, values, 2 * VALUE_HEADS], dim=1)
    taps, decay, norm = (torch.rand(*shape).to(dtype).to(device) for shape in ((channels, 4), (2, 4), (value_size,)))
    layer = DeltaLayer(taps, decay, norm, 1e-6)
    inputs = torch.randn(6, TAPS - 1, channels).to(dtype).to(device)
    sums = torch.randn(6, VALUE_HEADS, key_size, value_size).to(device)
    saves = torch.tensor([[[1, 3], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [1, 1]]]).int()
    tokens = rows_of([1] * rows, device, saves)
    step = emulator.emulated().delta_step if bitwise and device == "cpu" else state_ops.delta_net_
    after = inputs.clone(), sums.clone()
    actual = step(x, z, gates, layer, *after, tokens)
    qkv = state_ops.causal_conv_(x, taps, inputs, tokens)
    expected = state_ops.gated_rms_norm(state_ops.gated_delta_(qkv, gates, decay, sums, tokens), z, norm, 1e-6)
    for one, other in ((actual, expected), (after[0], inputs), (after[1], sums)):
        assert torch.equal(one, other)


def test_wrong_arguments_are_named() -> None:
    rows = rows_of([3], "cpu")
    with pytest.raises(ValueError, match=r"^gates \[3, 5\] .* must be \[3, 8\]"):
        state_ops.gated_delta_(
            torch.zeros(3, 320), torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(6, 4, 64, 16), rows
        )
    with pytest.raises(ValueError, match=r"^states \[6, 2, 8\] .* must be \[N, 3, 8\]"):
        state_ops.causal_conv_(torch.zeros(3, 8), torch.zeros(8, 4), torch.zeros(6, 2, 8), rows)
