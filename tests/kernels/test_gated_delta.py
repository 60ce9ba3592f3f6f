"""The ops of layers with a recurrent state against transformers' Qwen3.5: on a CPU, on a GPU, in the emulator."""

from __future__ import annotations

import shutil
from typing import NamedTuple

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
NUM_STATES = 42
SLOTS = [4, 0, 2]
EMULATED = pytest.param("emulated", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"))


KERNELS = [EMULATED, pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["cpu", *KERNELS])
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


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize(("sizes", "dtype"), [((64, 32), torch.float16), ((128, 128), torch.bfloat16)])
def test_chunks_of_tokens_equal_transformers(device: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows that end within a chunk or at its end, and states saved within a chunk."""
    if device == "cuda":
        from lockstep.kernels.cuda import gated_delta as launches
    else:
        launches = emulator.emulated()
    key_size, value_size = sizes
    counts, total = [70, 1, 32], 103
    q, k = (torch.randn(total, 1, key_size).to(dtype) for _ in range(2))
    v, gates = torch.randn(total, 2, value_size).to(dtype), torch.randn(total, 4).to(dtype)
    k[20:70] += 3  # similar keys, which matter most for the inverse
    gates[:70, 2:] -= 4  # and slow decay
    decay, states = torch.rand(2, 2).to(dtype), torch.randn(6, 2, key_size, value_size)
    saves = torch.tensor([[[40, 1], [64, 3]], [[1, 5], [0, 0]], [[0, 0], [0, 0]]]).int()
    qkv = torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)
    actual = states.clone().to(device)
    out = launches.chunked_delta_(
        qkv.to(device), gates.to(device), decay.to(device), actual, rows_of(counts, device, saves)
    )
    b, a = gates.float().chunk(2, dim=1)
    g = -decay[0].float().exp() * F.softplus(a + decay[1].float())
    ends = [(slot, piece, slot) for slot, piece in zip(SLOTS, pieces(counts), strict=True)]
    ends += [(4, slice(0, 40), 1), (4, slice(0, 64), 3), (0, slice(70, 71), 5)]
    for slot, piece, saved in ends:
        whole = [x[None, piece].float() for x in (q.expand(-1, 2, -1), k.expand(-1, 2, -1), v, g, b.sigmoid())]
        expected, last = torch_recurrent_gated_delta_rule(
            *whole, initial_state=states[slot : slot + 1], output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(out[piece].cpu().float(), expected[0].flatten(1), rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(actual[saved].cpu(), last[0], rtol=1e-4, atol=1e-4)


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


@pytest.fixture
def with_clusters(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the emulated delta_net_ take delta_step, which needs clusters."""
    if device == "cpu" and ops.reference is emulator.emulated():
        monkeypatch.setitem(emulator.emulated().delta_net_.__globals__, "_step_takes", lambda *_: True)


class LayerCase(NamedTuple):
    """Random inputs of delta_net_: x, z, gates, the layer, and two copies of the states."""

    inputs: tuple[Tensor, Tensor, Tensor]
    layer: DeltaLayer
    states: list[tuple[Tensor, Tensor]]


def layer_case(device: str, dtype: torch.dtype, key_heads: int, sizes: tuple[int, int], tokens: int) -> LayerCase:
    key_size, value_size = sizes
    keys, values = 2 * key_heads * key_size, VALUE_HEADS * value_size
    mixed = torch.randn(tokens, keys + 2 * values + 2 * VALUE_HEADS).to(dtype).to(device)
    shapes = (keys + values, TAPS), (2, VALUE_HEADS), (value_size,)
    taps, decay, norm = (torch.rand(*shape).to(dtype).to(device) for shape in shapes)
    inputs = torch.randn(NUM_STATES, TAPS - 1, keys + values).to(dtype).to(device)
    sums = torch.randn(NUM_STATES, VALUE_HEADS, key_size, value_size).to(device)
    states = [(inputs, sums), (inputs.clone(), sums.clone())]
    parts = mixed.split([keys + values, values, 2 * VALUE_HEADS], dim=1)
    return LayerCase(parts, DeltaLayer(taps, decay, norm, 1e-6), states)


def three_ops(case: LayerCase, states: tuple[Tensor, Tensor], rows: StateRows) -> Tensor:
    (x, z, gates), layer, (inputs, sums) = case.inputs, case.layer, states
    qkv = state_ops.causal_conv_(x, layer.taps, inputs, rows)
    return state_ops.gated_rms_norm(state_ops.gated_delta_(qkv, gates, layer.decay, sums, rows), z, layer.norm, 1e-6)


@pytest.mark.usefixtures("with_clusters")
@pytest.mark.parametrize("rows", [1, 3, 10])  # one row has a head in several blocks
@pytest.mark.parametrize(("key_heads", "sizes"), [(2, (64, 32)), (4, (32, 16)), (1, (32, 128))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_of_a_step_is_bitwise_the_three(
    device: str, dtype: torch.dtype, key_heads: int, sizes: tuple[int, int], rows: int
) -> None:
    case = layer_case(device, dtype, key_heads, sizes, rows)
    saves = torch.zeros(rows, 2, 2).int()
    saves[0, 0], saves[-1, 1] = torch.tensor([1, 13]), torch.tensor([1, 14])
    tensors = torch.randperm(12)[:rows].int(), torch.arange(rows + 1).int(), saves
    tokens = StateRows(*(tensor.to(device) for tensor in tensors))
    actual = state_ops.delta_net_(*case.inputs, case.layer, *case.states[0], tokens)
    assert torch.equal(actual, three_ops(case, case.states[1], tokens))
    for one, other in zip(*case.states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("with_clusters")
@pytest.mark.parametrize("num_decoding", [1, 2, 35])  # few rows, and more than the tokens of a chunk
@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_decode_beside_prompts_are_bitwise_the_three(
    device: str, dtype: torch.dtype, batch_invariant: bool, num_decoding: int
) -> None:
    """Prompts are bitwise the three ops as well, unless chunks compute them: those round in another order."""
    counts = [1] * num_decoding + [40, 7]
    case = layer_case(device, dtype, 2, (32, 16), sum(counts))
    saves = torch.zeros(len(counts), 2, 2).int()
    saves[0, 0], saves[num_decoding] = torch.tensor([1, 39]), torch.tensor([[35, 40], [16, 41]])
    tensors = torch.randperm(39)[: len(counts)].int(), torch.tensor([0, *counts]).cumsum(0).int(), saves
    rows = StateRows(*(tensor.to(device) for tensor in tensors), num_decoding=num_decoding)
    actual = state_ops.delta_net_(*case.inputs, case.layer, *case.states[0], rows, batch_invariant=batch_invariant)
    expected = three_ops(case, case.states[1], rows)
    chunked = dtype != torch.float32 and not batch_invariant
    tolerance: dict[str, float] = {"rtol": 0.02, "atol": 0.02} if chunked else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert torch.equal(actual[:num_decoding], expected[:num_decoding])
    assert torch.equal(case.states[0][0], case.states[1][0])
    torch.testing.assert_close(case.states[0][1], case.states[1][1], **tolerance)


def test_wrong_arguments_are_named() -> None:
    rows = rows_of([3], "cpu")
    with pytest.raises(ValueError, match=r"^gates \[3, 5\] .* must be \[3, 8\]"):
        state_ops.gated_delta_(
            torch.zeros(3, 320), torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(6, 4, 64, 16), rows
        )
    with pytest.raises(ValueError, match=r"^states \[6, 2, 8\] .* must be \[N, 3, 8\]"):
        state_ops.causal_conv_(torch.zeros(3, 8), torch.zeros(8, 4), torch.zeros(6, 2, 8), rows)
