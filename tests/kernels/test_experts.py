"""The experts of a mixture against a loop over tokens and choices in float64; on a GPU also bits, graphs and bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels import expert_ops, ops
from lockstep.kernels.arguments import ClampedSwiGLU, MXFP4Weight

from kernel_cases import dequantized, random_fp8_experts, random_mxfp4, to_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest value: roundings of the activations between the products and of their results.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# T, K, N, D, I; the pairs per expert select the kernel's tiles: up to 16, up to 256, more.
SIZES = [
    (0, 2, 5, 16, 8),
    (1, 1, 1, 8, 8),
    (2, 8, 9, 776, 40),  # 13 stages of 64, the last in part
    (7, 3, 5, 64, 72),
    (16, 2, 7, 136, 200),
    (64, 2, 3, 200, 64),
    (300, 4, 5, 72, 136),
    (300, 1, 1, 456, 24),
    (1000, 2, 3, 96, 80),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def inputs(size: tuple[int, ...], device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return x, expert_ids, scores, gate_up, down for sizes T, K, N, D, I; a token has no expert twice if N allows."""
    t, k, n, d, i = size
    expert_ids = torch.rand(t, max(n, k), device=device).argsort(-1)[:, :k] % n
    x, gate_up, down = (torch.randn(*shape, device=device) for shape in ((t, d), (n, 2 * i, d), (n, d, i)))
    weights = (gate_up / d**0.5).to(dtype), (down / i**0.5).to(dtype)
    return x.to(dtype), expert_ids, torch.rand(t, k, device=device), *weights


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def brute_force(
    x: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Sequence[Tensor] = (),
    activate: Callable[[Tensor, Tensor], Tensor] = silu_and_mul,
) -> Tensor:
    """Compute the experts in float64, one token and one choice at a time."""
    no_biases = [torch.zeros(m.shape[:2], device=m.device) for m in (gate_up, down)]
    first, second = (bias.double().cpu() for bias in biases or no_biases)
    x, scores, gate_up, down = (tensor.double().cpu() for tensor in (x, scores, gate_up, down))
    out = torch.zeros_like(x)
    for token, ids in enumerate(expert_ids.tolist()):
        for choice, expert in enumerate(ids):
            if 0 <= expert < len(down):
                gate, up = (gate_up[expert] @ x[token] + first[expert]).chunk(2)
                out[token] += scores[token, choice] * (down[expert] @ activate(gate, up) + second[expert])
    return out


def close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max().clamp(min=1)) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=scale * TOLERANCE[actual.dtype])


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a `new_empty` whose memory holds NaN, or integers far out of range."""

    def new_empty(*arguments: Any, **options: Any) -> Tensor:
        out = empty(*arguments, **options)
        return out.fill_(torch.nan if out.is_floating_point() else 2**30)

    return new_empty


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_experts_equal_a_loop_over_tokens_and_choices(
    device: str, size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs(size, device, dtype)
    expected = brute_force(*arguments)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    actual = expert_ops.experts(*arguments)
    assert actual.dtype == dtype
    close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "first"), [((1, 2, 5, 136, 40), 40), ((7, 2, 5, 144, 48), 80), ((300, 2, 5, 272, 64), 0)]
)
@pytest.mark.parametrize(("block_rows", "block_columns"), [(8, 128), (1, 512)])
def test_experts_of_fp8_equal_a_loop_over_the_dequantized_weights(
    device: str, size: tuple[int, ...], first: int, block_rows: int, block_columns: int, dtype: torch.dtype
) -> None:
    x, expert_ids, scores, *_ = inputs(size, device, dtype)
    *_, n, d, i = size
    gate_up = to_device(random_fp8_experts(n, 2 * i, d, block_rows, block_columns), device)
    first = first if block_columns == 128 else 0
    down = to_device(random_fp8_experts(n, d, i, block_rows, block_columns, first), device)
    exact = dequantized(gate_up), dequantized(down)
    close(expert_ops.experts(x, expert_ids, scores, gate_up, down), brute_force(x, expert_ids, scores, *exact))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_experts_of_fp8_are_bitwise_those_of_the_dequantized_weights(tokens: int, dtype: torch.dtype) -> None:
    size = tokens, 2, 5, 272, 144
    x, expert_ids, scores, *_ = inputs(size, "cuda", dtype)
    gate_up, down = (to_device(random_fp8_experts(5, *shape, 128, 128), "cuda") for shape in ((288, 272), (272, 144)))
    wide = gate_up.dequantized(dtype), down.dequantized(dtype)
    actual, expected = (
        expert_ops.experts(x, expert_ids, scores, *weights, batch_invariant=True) for weights in ((gate_up, down), wide)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("tokens", "num_experts", "count"), [(0, 8, 2), (1, 32, 4), (300, 128, 8), (5, 500, 22)])
def test_select_experts_equals_softmax_and_topk(
    device: str, tokens: int, num_experts: int, count: int, normalized: bool
) -> None:
    logits = torch.randn(tokens, num_experts, device=device)
    logit_bias = torch.randn(num_experts, device=device)
    expert_ids, scores = expert_ops.select_experts(logits, count, normalized=normalized, logit_bias=logit_bias)
    expected, order = (logits + logit_bias).double().softmax(-1).topk(count, dim=-1)
    assert torch.equal(expert_ids, order)
    if normalized:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 300])
def test_select_experts_with_a_bias_equals_float64(device: str, tokens: int) -> None:
    logits, bias = torch.randn(tokens, 128, device=device), torch.randn(128, device=device)
    options = {"scoring": "sigmoid", "bias": bias, "normalized": True, "scaling": 2.5}
    expert_ids, scores = expert_ops.select_experts(logits, 8, **options)
    wide = logits.double().sigmoid()
    assert torch.equal(expert_ids, (wide + bias).topk(8, dim=-1).indices)
    expected = wide.gather(1, expert_ids)
    torch.testing.assert_close(scores.double(), 2.5 * expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)
    shifted, same_scores = expert_ops.select_experts(logits, 8, **options, first_expert=40)
    assert torch.equal(shifted, expert_ids - 40)
    assert torch.equal(same_scores, scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_sum_over_ranks_with_whole_experts_is_that_of_all(device: str, tokens: int, dtype: torch.dtype) -> None:
    x, expert_ids, scores, gate_up, down = inputs((tokens, 3, 7, 64, 48), device, dtype)
    total = torch.zeros_like(x, dtype=torch.float32)
    for part in (slice(0, 3), slice(3, 5), slice(5, 7)):
        total += expert_ops.experts(x, expert_ids - part.start, scores, gate_up[part], down[part]).float()
    close(total.to(dtype), brute_force(x, expert_ids, scores, gate_up, down))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_select_experts_with_the_expert_of_all_tokens(device: str, tokens: int, dtype: torch.dtype) -> None:
    logits = torch.randn(tokens, 65, device=device).to(dtype)
    options = {"normalized": True, "scaling": 1.5}
    expert_ids, scores = expert_ops.select_experts(logits, 8, has_shared=True, **options)
    expected_ids, expected = expert_ops.select_experts(logits[:, :64], 8, **options)
    assert torch.equal(expert_ids[:, :8], expected_ids)
    assert torch.equal(scores[:, :8], expected)
    assert (expert_ids[:, 8] == 64).all()
    torch.testing.assert_close(scores[:, 8], logits[:, 64].float().sigmoid(), rtol=1e-5, atol=1e-7)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_with_biases_and_clamped_swiglu(device: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(size, device, dtype)
    biases = [torch.randn(m.shape[:2], device=device).to(dtype) for m in arguments[3:]]
    options = {"gate_up_bias": biases[0], "down_bias": biases[1], "swiglu": ClampedSwiGLU(1.702, 1.0)}
    close(expert_ops.experts(*arguments, **options), brute_force(*arguments, biases, clamped_swiglu))  # type: ignore[arg-type]


# T, K, N, D, I as for SIZES
MXFP4_SIZES = [
    (1, 4, 8, 96, 32),
    (2, 4, 6, 480, 224),
    (40, 2, 3, 160, 96),
    (300, 4, 5, 64, 160),
    (1000, 2, 3, 96, 64),
]


@pytest.mark.parametrize("size", MXFP4_SIZES)
def test_experts_of_mxfp4_equal_a_loop_over_the_dequantized_weights(device: str, size: tuple[int, ...]) -> None:
    x, expert_ids, scores, *_ = inputs(size, device)
    _, _, n, d, i = size
    weights = [MXFP4Weight(*(t.to(device) for t in random_mxfp4(n, *shape))) for shape in ((2 * i, d), (d, i))]
    exact = [weight.dequantized(torch.float64) for weight in weights]
    biases = [torch.randn(n, rows, device=device).bfloat16() for rows in (2 * i, d)]
    options = {"gate_up_bias": biases[0], "down_bias": biases[1], "swiglu": ClampedSwiGLU(1.702, 1.0)}
    fast = expert_ops.experts(x, expert_ids, scores, *weights, **options)  # type: ignore[arg-type]
    close(fast, brute_force(x, expert_ids, scores, *exact, biases, clamped_swiglu))
    options["batch_invariant"] = True
    actual = expert_ops.experts(x, expert_ids, scores, *weights, **options)  # type: ignore[arg-type]
    close(actual, brute_force(x, expert_ids, scores, *exact, biases, clamped_swiglu))
    for rows in (slice(0, 1), slice(len(x) // 2, None)):  # other tiles
        part = expert_ops.experts(x[rows], expert_ids[rows], scores[rows], *weights, **options)  # type: ignore[arg-type]
        assert device == "cpu" or torch.equal(part, actual[rows])


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "choices"), [(1, 4), (1, 9), (2, 4), (3, 9), (8, 9), (24, 4)])
@pytest.mark.parametrize("is_mxfp4", [True, False])
def test_few_pairs_with_the_features_of_models(tokens: int, choices: int, is_mxfp4: bool) -> None:
    """The features of gpt-oss-20b and of Qwen3.6-35B-A3B; blocks have tiles of several experts."""
    torch.manual_seed(0)
    n, d, i = (14, 2880, 2880) if is_mxfp4 else (96, 2048, 512)  # so many that few rows meet each expert
    x, expert_ids = torch.randn(tokens, d, device="cuda").bfloat16(), torch.randint(-1, n, (tokens, choices)).cuda()
    expert_ids[tokens // 2 :] = expert_ids[0]  # up to 12 rows of an expert
    shapes = (2 * i, d), (d, i)
    weights: list[Any]
    if is_mxfp4:
        weights = [MXFP4Weight(*(t.cuda() for t in random_mxfp4(n, *shape))) for shape in shapes]
        exact = [weight.dequantized(torch.bfloat16) for weight in weights]
    else:
        weights = exact = [torch.randn(n, *shape, device="cuda").bfloat16() / shape[1] ** 0.5 for shape in shapes]
    scores = torch.rand(tokens, choices, device="cuda")
    close(expert_ops.experts(x, expert_ids, scores, *weights), brute_force(x, expert_ids, scores, *exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 40, 700])
def test_experts_with_all_tokens_on_one(device: str, tokens: int, dtype: torch.dtype) -> None:
    x, expert_ids, *rest = inputs((tokens, 2, 6, 72, 40), device, dtype)
    expert_ids.fill_(4)
    close(expert_ops.experts(x, expert_ids, *rest), brute_force(x, expert_ids, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wild", [-1, 5, 2**32, -(2**63)])
def test_experts_out_of_range_add_nothing(
    device: str, wild: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, expert_ids, *rest = inputs((20, 3, 5, 64, 48), device, dtype)
    expert_ids[::3, 1] = expert_ids[7] = wild
    expected = brute_force(x, expert_ids, *rest)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    actual = expert_ops.experts(x, expert_ids, *rest)
    close(actual, expected)
    assert not actual[7].any()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 2, 90])
def test_experts_add_to_a_tensor(device: str, tokens: int, dtype: torch.dtype, batch_invariant: bool) -> None:
    arguments = inputs((tokens, 2, 6, 72, 40), device, dtype)
    before = torch.randn_like(arguments[0])
    expected = brute_force(*arguments) + before.double().cpu()
    actual = expert_ops.experts(*arguments, add_to=before, batch_invariant=batch_invariant)
    assert actual is before
    close(actual, expected)


@pytest.mark.parametrize(
    ("which", "wrong", "rule"),
    [
        (0, torch.zeros(3, 9), r"x \[3, 9\] .* must be \[T, 8\]"),
        (0, torch.zeros(3, 8).half(), "x .* dtype of the weights"),
        (1, torch.zeros(3, 2), r"expert_ids .* must be \[3, K\] int64"),
        (1, torch.zeros(4, 2, dtype=torch.int64), "expert_ids"),
        (2, torch.zeros(3, 1), r"scores .* must be \[3, 2\] float32"),
        (3, torch.zeros(5, 8, 8).transpose(1, 2), "gate_up .* contiguous"),
        (4, torch.zeros(5, 8, 3), r"down .* must be \[5, 8, 8 / 2\]"),
    ],
)
def test_experts_wrong_argument_is_named_with_the_rule(which: int, wrong: Tensor, rule: str) -> None:
    arguments = list(inputs((3, 2, 5, 8, 4), "cpu", torch.float32))
    arguments[which] = wrong
    with pytest.raises(ValueError, match=rule):
        expert_ops.experts(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(3, 2, 5, 12, 8), (3, 2, 5, 8, 12)])
def test_experts_reject_rows_of_partial_vectors(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="16-byte vectors"):
        expert_ops.experts(*inputs(size, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_a_token_are_bitwise_equal_in_any_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, expert_ids, scores, *weights = inputs((1500, 4, 8, 520, 264), "cuda", dtype)
    expected = expert_ops.experts(x, expert_ids, scores, *weights, batch_invariant=True)
    for rows in (1, 2, 17, 60, 400):  # tiles of 16 and 64 rows; the whole batch takes those of 128
        actual = expert_ops.experts(x[:rows], expert_ids[:rows], scores[:rows], *weights, batch_invariant=True)
        assert torch.equal(actual, expected[:rows])
    order = torch.randperm(1500, device="cuda")
    actual = expert_ops.experts(x[order], expert_ids[order], scores[order], *weights, batch_invariant=True)
    assert torch.equal(actual, expected[order])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 24, 300])
def test_experts_graph_replays_with_other_routing(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, expert_ids, scores, *weights = inputs((tokens, 3, 7, 136, 72), "cuda", dtype)
    expert_ops.experts(x, expert_ids, scores, *weights)  # kernels load outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = expert_ops.experts(x, expert_ids, scores, *weights)
    for routing in (torch.randint_like(expert_ids, 7), torch.full_like(expert_ids, 6), torch.full_like(expert_ids, -1)):
        expert_ids.copy_(routing)
        x.copy_(torch.randn_like(x))
        actual.fill_(torch.nan)
        graph.replay()
        close(actual, brute_force(x, expert_ids, scores, *weights))
        assert torch.equal(actual, expert_ops.experts(x, expert_ids, scores, *weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("tokens", "size", "num_experts", "has_shared"), [(1, 2048, 256, True), (8, 136, 20, False), (9, 136, 20, True)]
)
def test_route_tokens_is_norm_gemm_and_choice(
    device: str, tokens: int, size: int, num_experts: int, has_shared: bool, normed: bool, dtype: torch.dtype
) -> None:
    rows = num_experts + has_shared
    x, norm, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((tokens, size), (size,), (rows,)))
    padded = (torch.randn(rows + 3, size, device=device) / size**0.5).to(dtype)
    weight = padded[:rows]
    expected = ops.rms_norm(x, norm, 1e-6) if normed else x
    logits = expected.float() @ weight.float().T + bias.float()
    options = {"norm": norm if normed else None, "eps": 1e-6, "logit_bias": bias}
    for _ in range(2):  # what one launch leaves behind must not disturb the next
        out, expert_ids, scores = expert_ops.route_tokens(
            x, padded, 4, normalized=True, has_shared=has_shared, num_padding=3, **options
        )
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
    tolerance = 10 * TOLERANCE[dtype] if dtype != torch.float32 else 1e-4
    chosen, best = logits[:, :num_experts].gather(1, expert_ids[:, :4]), logits[:, :num_experts].topk(4).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=tolerance)
    torch.testing.assert_close(scores[:, :4], chosen.softmax(-1), rtol=0, atol=tolerance)
    if has_shared:
        assert (expert_ids[:, 4] == num_experts).all()
        torch.testing.assert_close(scores[:, 4], logits[:, -1].sigmoid(), rtol=0, atol=tolerance)
