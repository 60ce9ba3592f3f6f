"""Our kernels' source text and its launches against the definitions, on a CPU, without a GPU (emulator.py).

Threads run in random order between barriers, so a missing barrier shows. How the GPU's instructions round, what its
caches hold and how fast it is does not show: such comparisons run on a GPU in test_kernels.py and test_experts.py.
The simple kernels run in the emulator there, too; here are those that need small sizes.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.kernels import reference
from lockstep.kernels.arguments import ClampedSwiGLU, FP8Rows, KVCache, Pages, QKNorm, Rope, num_groups

import emulator
from kernel_cases import (
    SamplingInputs,
    assert_close,
    batch_invariant_linears,
    random_fp8,
    random_fp8_experts,
    random_mxfp4,
)

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]
SWIGLU = ClampedSwiGLU(1.702, 1.0)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cloned(argument: Any) -> Any:
    """Return a copy of a tensor with its strides, or of the tensors of a named tuple."""
    if isinstance(argument, Tensor):
        return torch.empty_strided(argument.size(), argument.stride(), dtype=argument.dtype).copy_(argument)
    return type(argument)(*map(cloned, argument)) if isinstance(argument, tuple) else argument


def tensors(*arguments: Any) -> list[Tensor]:
    """Return the tensors among arguments and their named tuples."""
    nested = [tensors(*a) if isinstance(a, tuple) else [a] for a in arguments]
    return [a for group in nested for a in group if isinstance(a, Tensor)]


def results(op: str, *arguments: Any, **options: Any) -> list[list[Tensor]]:
    """Return what the emulated kernel and the definition return, and what each has made of its arguments."""
    outcomes = []
    for module in (emulator.emulated(), reference):
        copies = [cloned(a) for a in arguments]
        option_copies = {name: cloned(value) for name, value in options.items()}
        result = getattr(module, op)(*copies, **option_copies)
        outcomes.append(tensors(result, *copies, *option_copies.values()))
    return outcomes


def check(op: str, *arguments: Any, factor: float = 1, **options: Any) -> None:
    for actual, expected in zip(*results(op, *arguments, **options), strict=True):
        if actual.is_floating_point():
            assert_close(actual, expected.double(), factor)
        else:
            assert torch.equal(actual, expected)


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("rows", "features", "size", "dtype"),
    [
        (1, 16, 64, F16),
        (3, 40, 72, BF16),
        (8, 24, 1024, BF16),
        (8, 24, 2048, BF16),
        (5, 72, 2056, F16),
        (2, 56, 5120, BF16),  # five chunks ahead
        (8, 24, 9600, BF16),  # not staged
    ],
)
def test_linear(rows: int, features: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, size, dtype=dtype), (random(2 * features, size) / size**0.5).to(dtype)
    bias, norm = random(2 * features, dtype=dtype), random(size, dtype=dtype)
    before = random(rows, features, dtype=dtype)
    check("linear", x, weight[:features], bias[:features], add_to=before)
    check("linear", x, weight, bias, norm=norm, eps=1e-5, gated=True, factor=4)


@pytest.mark.parametrize("size", [1032, 2048, 5128, 8192, 9600])
def test_linear_row_is_bitwise_equal_in_any_small_batch(size: int) -> None:
    """Also if fewer rows fit into shared memory than the batch has, and with a norm where it is not fused."""
    x, weight, norm = random(8, size), random(48, size), random(size)
    linear = emulator.emulated().linear
    for options in ({}, {"norm": norm, "eps": 1e-5, "gated": True}):
        together = linear(x, weight, **options)
        for rows in (slice(0, 1), slice(2, 4), slice(3, 8)):
            assert torch.equal(linear(x[rows].contiguous(), weight, **options), together[rows])


FP8_LINEARS = [  # rows, features, size, dtype, rows and columns of a block, place of column 0 in its block
    (1, 16, 64, F16, 1, 64, 0),
    (3, 40, 208, BF16, 8, 128, 0),
    (8, 24, 1040, BF16, 16, 128, 48),
    (5, 72, 2064, F16, 32, 128, 112),
    (2, 24, 1024, BF16, 128, 1024, 0),
    (8, 24, 7168, BF16, 4, 128, 64),  # not staged
    (5, 72, 5056, BF16, 4, 128, 64),  # 20 warps
]


@pytest.mark.parametrize(("rows", "features", "size", "dtype", "block_rows", "block_columns", "first"), FP8_LINEARS)
def test_linear_of_fp8(
    rows: int, features: int, size: int, dtype: torch.dtype, block_rows: int, block_columns: int, first: int
) -> None:
    x, norm, bias = (random(*shape, dtype=dtype) for shape in ((rows, size), (size,), (2 * features,)))
    both = random_fp8(2 * features, size, block_rows, block_columns, first)
    half = random_fp8(features, size, block_rows, block_columns, first)
    check("linear", x, half, bias[:features], add_to=random(rows, features, dtype=dtype))
    check("linear", x, both, bias, norm=norm, eps=1e-5, gated=True, factor=4)


@pytest.mark.parametrize(("kib", "most"), [(99, 99 << 10), (227, 100 << 10)])
def test_fp8_shapes_of_skinny_gemm_stage_what_fits(kib: int, most: int) -> None:
    gemm = emulator.emulated().linear.__globals__
    warps = {4096: 16, 5120: 20, 8192: 16, 8704: 20, 14336: 20, 17408: 20, 25600: 20, 28672: 16}
    for rows, columns in itertools.product(range(1, 10), warps):
        shape = gemm["_fp8_shape"](rows, columns, 0, kib << 10)
        used = rows * (columns + 8) * 2, warps[columns] * gemm["SUM_BYTES"]
        fits = used[0] <= most and sum(used) <= kib << 10
        assert shape == ((warps[columns], 2, used[0]) if fits else (8, 2, 0))


DECODED = [(1, 2, 1, 64), (5, 8, 2, 64), (5, 6, 1, 128), (12, 3, 3, 64), (2, 4, 1, 96), (4, 2, 1, 256)]


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), DECODED)
def test_decode_attention(
    rows: int, heads: int, kv_heads: int, size: int, window: int | None, cache_dtype: torch.dtype
) -> None:
    check_decode_attention(rows, heads, kv_heads, size, window, torch.randn(701, size), cache_dtype)


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn])
def test_decode_attention_of_blocks_with_the_end_of_a_long_row_and_the_next_row(cache_dtype: torch.dtype) -> None:
    check_decode_attention(2, 2, 1, 64, None, torch.randn(1501, 64), cache_dtype, lengths=(1500, 300))


WIDE = [(3, 6, 1, 96), (5, 3, 1, 256), (2, 8, 1, 256), (5, 24, 2, 64), (2, 11, 1, 96)]  # up to 12 heads of a KV head


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), WIDE)
def test_decode_attention_of_wide_heads_and_groups(
    rows: int, heads: int, kv_heads: int, size: int, softcap: float | None
) -> None:
    check_decode_attention(rows, heads, kv_heads, size, 50, torch.randn(701, size), softcap=softcap)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), [(5, 16, 2, 64), (12, 3, 3, 64), (3, 12, 1, 64)])
def test_decode_attention_with_sinks(rows: int, heads: int, kv_heads: int, size: int, window: int | None) -> None:
    sinks = random(heads) * 4
    sinks[:2] = torch.tensor([300.0, -300.0])  # all of the softmax, and nothing of it
    check_decode_attention(rows, heads, kv_heads, size, window, torch.randn(701, size), sinks=sinks)


def test_decode_attention_reads_a_part_of_padded_heads() -> None:
    check_decode_attention(3, 4, 2, 96, None, torch.randn(701, 96), padding=32)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("table", [(701, 12), (701, 32), (701, 48), (0, 64)], ids=str)
def test_decode_attention_rotates_a_part_of_a_head(size: int, table: tuple[int, int]) -> None:
    check_decode_attention(5, 4, 2, size, None, torch.randn(table))


def test_decode_attention_of_queries_beyond_float16_with_an_fp8_cache() -> None:
    cache = KVCache(*(random(9, 16, 1, 64).to(torch.float8_e4m3fn) for _ in "kv"))
    qkv, positions = random(1, 4 * 64), torch.tensor([143], dtype=torch.int32)
    table_rows = torch.zeros(1, dtype=torch.int32)
    qkv[0, :2], qkv[0, 64] = torch.tensor([1e30, 1.0]), -1e30  # one element decides for each head
    partition = emulator.emulated().partition_keys(positions, table_rows, 1, None)
    norm, rope, pages = QKNorm(None, None, 0.0), Rope(positions, torch.randn(0, 64)), torch.arange(9).int()
    views = Pages(pages[None], table_rows)
    check("decode_attention", qkv, norm, rope, cache, positions.clone(), views, partition, 0.1, factor=4)


def check_decode_attention(
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    *options: Any,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> None:
    inputs = decode_inputs(rows, heads, kv_heads, size, *options, **others)
    # The kernel leaves the counters of the partition at zero for the next layer; the definition does not touch them.
    out = None if sinks is None else random(rows, heads * size)
    check("decode_attention", *inputs, softcap, sinks, out, factor=4)


def decode_inputs(
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    cos_sin: Tensor,
    cache_dtype: torch.dtype = BF16,
    padding: int = 0,
    lengths: tuple[int, ...] = (700, 0, 1, 17, 64, 300, 199, 5, 5, 31, 32, 33),
) -> tuple[Any, ...]:
    """Return the arguments of decode_attention up to `scale`."""
    positions = torch.tensor(lengths[:rows], dtype=torch.int32)
    pages = max(lengths) // 5 + 5
    table = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    table_rows = torch.randperm(rows, dtype=torch.int32)
    slots = table[table_rows.long(), positions.long() // 5] * 5 + positions % 5
    slots[2:3] = -1
    qkv, norm = random(rows, (heads + 2 * kv_heads) * size), QKNorm(random(size) + 2, random(size) + 2, 1e-6)
    padded = [random(rows * pages, 5, kv_heads, size + padding).to(cache_dtype) for _ in range(2)]
    cache = KVCache(*(part[..., :size] for part in padded))
    partition = emulator.emulated().partition_keys(positions, table_rows, num_groups(heads, kv_heads), window)
    return qkv, norm, Rope(positions, cos_sin), cache, slots, Pages(table, table_rows), partition, 0.1


@pytest.mark.parametrize(("rows", "heads", "kv_heads", "window", "cache_dtype", "rules"), [
    (2, 6, 1, None, BF16, "plain"),
    (5, 4, 2, None, BF16, "plain"),
    (12, 3, 3, None, BF16, "plain"),
    (2, 24, 2, 70, torch.float8_e4m3fn, "sinks"),  # several blocks for the query heads of a KV head
    (12, 16, 1, 70, BF16, "sinks and softcap"),
])  # fmt: skip
def test_decode_attention_quantizes_like_quantize_rows(
    rows: int, heads: int, kv_heads: int, window: int | None, cache_dtype: torch.dtype, rules: str
) -> None:
    kernels = emulator.emulated()
    inputs = decode_inputs(rows, heads, kv_heads, 128, window, torch.randn(701, 128), cache_dtype)
    more = 20.0 if "softcap" in rules else None, random(heads) if "sinks" in rules else None
    numbers, scales = kernels.quantize_rows(kernels.decode_attention(*inputs, *more), None, 0.0, grouped=True)
    out = FP8Rows(torch.empty_like(numbers), torch.empty_like(scales), rows, BF16)
    kernels.launch_decode_attention(out, *inputs, *more)
    assert torch.equal(out.scales[:, :rows], scales[:, :rows])
    assert torch.equal(out.numbers[:rows].float(), numbers[:rows].float())


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("pairs", [4, 60])
def test_experts(pairs: int, dtype: torch.dtype) -> None:
    x, expert_ids = random(pairs // 2, 72, dtype=dtype), torch.randint(-1, 4, (pairs // 2, 2))
    weights = (random(3, 80, 72) / 8).to(dtype), (random(3, 72, 40) / 8).to(dtype)
    check("experts", x, expert_ids, torch.rand(pairs // 2, 2), *weights, factor=4)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("tokens", "num_experts", "count", "dtype"), [
    (1, 32, 4, BF16), (9, 5, 5, F32), (20, 128, 8, BF16), (3, 300, 40, F32),
])  # fmt: skip
def test_select_experts(tokens: int, num_experts: int, count: int, dtype: torch.dtype, normalized: bool) -> None:
    logits = torch.stack([torch.randperm(num_experts) for _ in range(tokens)]).to(dtype) / 8 - 3  # no two are equal
    check("select_experts", logits, count, normalized=normalized)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("each_token", [True, False])
def test_select_experts_with_a_bias(scoring: str, normalized: bool, each_token: bool) -> None:
    logits, bias = torch.randn(9, 70), torch.randn((9, 70) if each_token else 70)
    bias[..., 5:20] = -torch.inf
    options = {"normalized": normalized, "least_sum": 0.5, "scaling": 1.7}
    check("select_experts", logits, 6, scoring=scoring, bias=bias, **options)
    check("select_experts", logits, 6, scoring=scoring, first_expert=33, **options)
    check("select_experts", logits, 6, scoring=scoring, has_shared=True, logit_bias=torch.randn(70), **options)


@pytest.mark.parametrize(
    ("tokens", "size", "experts"), [(1, 136, 40), (8, 1096, 20), (3, 72, 33), (12, 136, 40), (2, 72, 256)]
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_route_tokens(tokens: int, size: int, experts: int, dtype: torch.dtype) -> None:
    x, weight, norm = (
        random(tokens, size, dtype=dtype),
        random(experts + 8, size, dtype=dtype),
        random(size, dtype=dtype),
    )
    bias, logit_bias = torch.rand(experts), random(experts + 1, dtype=dtype)
    check(
        "route_tokens",
        x,
        weight,
        4,
        norm=norm,
        eps=1e-6,
        normalized=True,
        has_shared=True,
        num_padding=7,
        logit_bias=logit_bias if tokens <= 8 else None,  # larger batches add it after rounding
        factor=4,
    )
    check("route_tokens", x, weight[:experts], 3, normalized=False, scoring="sigmoid", bias=bias, factor=4)
    check("route_tokens", x, weight[:experts], 8, normalized=False, first_expert=5, factor=4)
    check("route_tokens", x, weight[:experts], 8, normalized=True, least_sum=0.5, scoring="sigmoid", factor=4)


@pytest.mark.parametrize("experts", [20, 64, 250, 511])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalized", [True, False])
def test_route_tokens_takes_the_lesser_of_equal_ones(experts: int, scoring: str, normalized: bool) -> None:
    """Logits are small integers, so many are equal, and exact in any order of their sums."""
    x, weight = (torch.randint(-1, 2, (rows, 64)).to(BF16) for rows in (2, experts))
    rules: dict[str, Any] = {"normalized": normalized, "scoring": scoring, "least_sum": 0.5, "scaling": 1.7}
    _, expert_ids, scores = emulator.emulated().route_tokens(x, weight, 10, **rules)
    logits = x.float() @ weight.float().T
    assert torch.equal(expert_ids, logits.sort(descending=True, stable=True).indices[:, :10])
    expected = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    chosen = expected.gather(1, expert_ids)
    torch.testing.assert_close(
        scores, 1.7 * (chosen / chosen.sum(1, keepdim=True).clamp(min=0.5) if normalized else chosen)
    )


def test_select_experts_takes_the_lesser_of_equal_ones() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, 2.0, 0.0, -0.0], [3.0] * 6])
    expert_ids, scores = emulator.emulated().select_experts(logits, 5, normalized=False)
    assert expert_ids.tolist() == [[2, 3, 0, 4, 5], [0, 1, 2, 3, 4]]
    torch.testing.assert_close(scores, logits.gather(1, expert_ids).sub(logits.logsumexp(1, keepdim=True)).exp())


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_experts_with_biases_and_clamped_swiglu(dtype: torch.dtype) -> None:
    x, expert_ids = random(30, 72, dtype=dtype), torch.randint(-1, 4, (30, 2))
    weights = (random(3, 80, 72) / 4).to(dtype), (random(3, 72, 40) / 8).to(dtype)
    biases = {"gate_up_bias": random(3, 80, dtype=dtype), "down_bias": random(3, 72, dtype=dtype)}
    check("experts", x, expert_ids, torch.rand(30, 2), *weights, **biases, swiglu=ClampedSwiGLU(1.7, 1.5), factor=4)


# Pairs, hidden and intermediate features, rows and columns of a block, place of column 0 in its block, dtype.
FP8_EXPERTS = [
    (2, 80, 48, 128, 128, 0, BF16),
    pytest.param(60, 144, 80, 16, 128, 112, F16, marks=pytest.mark.nightly),
    pytest.param(400, 64, 32, 1, 64, 0, BF16, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("pairs", "size", "features", "block_rows", "block_columns", "first", "dtype"), FP8_EXPERTS)
def test_experts_of_fp8_are_bitwise_those_of_the_dequantized_weights(
    pairs: int, size: int, features: int, block_rows: int, block_columns: int, first: int, dtype: torch.dtype
) -> None:
    x, expert_ids = random(pairs // 2, size, dtype=dtype), torch.randint(-1, 4, (pairs // 2, 2))
    gate_up = random_fp8_experts(3, 2 * features, size, block_rows, 2 * block_columns)
    down = random_fp8_experts(3, size, features, block_rows, block_columns, first)
    scores = torch.rand(pairs // 2, 2)
    check("experts", x, expert_ids, scores, gate_up, down, factor=4)
    wide = gate_up.dequantized(dtype), down.dequantized(dtype)
    actual, expected = (
        emulator.emulated().experts(x, expert_ids, scores, *w, batch_invariant=True) for w in ((gate_up, down), wide)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("rows", "first"), [(9, 48), pytest.param(70, 0, marks=pytest.mark.nightly)])
def test_linear_of_fp8_without_wgmma(rows: int, first: int) -> None:
    x, norm, bias = random(rows, 144), random(144), random(80)
    weight, before = random_fp8(80, 144, 16, 128, first), random(rows, 80)
    check("linear", x, weight, bias, add_to=before, factor=2)
    check("linear", x, weight, bias, norm=norm, eps=1e-5, gated=True, factor=4)


@pytest.mark.parametrize(
    ("pairs", "size", "features", "batch_invariant"),
    [(2, 96, 32, False), (12, 1056, 64, False), (46, 160, 96, False), (24, 64, 96, True), (400, 32, 32, True),
     (1600, 64, 32, False)],
)  # fmt: skip
def test_experts_of_mxfp4(pairs: int, size: int, features: int, batch_invariant: bool) -> None:
    x, expert_ids = random(pairs // 2, size), torch.randint(-1, 4, (pairs // 2, 2))
    weights = random_mxfp4(3, 2 * features, size), random_mxfp4(3, size, features)
    biases = {"gate_up_bias": random(3, 2 * features), "down_bias": random(3, size)}
    arguments = x, expert_ids, torch.rand(pairs // 2, 2), *weights
    check("experts", *arguments, factor=4, batch_invariant=batch_invariant)
    check("experts", *arguments, **biases, swiglu=SWIGLU, factor=4, batch_invariant=batch_invariant)


@pytest.mark.parametrize(
    ("pairs", "size", "features", "most_bytes"), [(10, 328, 200, 2**16), (90, 72, 40, 2**16), (10, 328, 200, 0)]
)
def test_experts_of_many(
    pairs: int, size: int, features: int, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many experts that few rows meet each of them; also with rows that do not fit into shared memory."""
    monkeypatch.setitem(emulator.emulated().experts.__globals__, "MAX_TILE_BYTES", most_bytes)
    x, expert_ids = random(pairs // 2, size), torch.randint(-1, 100, (pairs // 2, 2))
    weights = (random(99, 2 * features, size) / 16, random(99, size, features) / 16)
    check("experts", x, expert_ids, torch.rand(pairs // 2, 2), *weights, factor=4)


@pytest.mark.parametrize(
    ("pairs", "experts", "limit"),
    [
        (12, 3, "MAX_STAGED_BYTES"),
        (110, 40, "MAX_STAGED_BYTES"),
        (12, 3, "MAX_TILE_BYTES"),
        (110, 40, "MAX_TILE_BYTES"),
    ],
)
def test_few_rows_of_mxfp4_in_shared_memory(
    pairs: int, experts: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of fewer rows than an expert has, because more do not fit; tiles of group_pairs that fit or do not."""
    monkeypatch.setitem(emulator.emulated().experts.__globals__, limit, 2 * (3 * 256 + 64))
    x, expert_ids = random(pairs // 2, 288), torch.randint(-1, experts + 1, (pairs // 2, 2))
    weights = random_mxfp4(experts, 64, 288), random_mxfp4(experts, 288, 32)
    check("experts", x, expert_ids, torch.rand(pairs // 2, 2), *weights, factor=4)


@pytest.mark.parametrize(
    ("tokens", "choices", "size", "features", "dtype"),
    [
        (1, 4, 32, 1568, None),
        (2, 9, 16, 456, BF16),
        pytest.param(4, 3, 64, 160, None, marks=pytest.mark.nightly),
        pytest.param(3, 6, 24, 72, F16, marks=pytest.mark.nightly),
    ],
)
def test_experts_with_their_sum_in_one_kernel(
    tokens: int, choices: int, size: int, features: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise what skinny_experts and weighted_sum make of it, if as many warps share a row; None is MXFP4."""
    gemm, names, experts = emulator.emulated().experts.__globals__, [], tokens * choices
    launch, monkey = gemm["kernel"], monkeypatch.setitem
    monkey(gemm, "kernel", lambda file, name, **options: names.append(name) or launch(file, name, **options))
    monkey(gemm, "_skinny_split", lambda *_: 4 if choices <= 4 else 2)
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape: like.new_full(shape, torch.nan))
    x, expert_ids = random(tokens, size, dtype=dtype or BF16), torch.rand(tokens, experts + 2).argsort(-1) - 1
    expert_ids[-1, :2] = torch.tensor([-1, experts])  # no expert for two choices of a warp
    shapes = (experts, 2 * features, size), (experts, size, features)
    weights = [random_mxfp4(*shape) if dtype is None else random(*shape, dtype=x.dtype) / 16 for shape in shapes]
    options: dict[str, Any] = {"add_to": random(tokens, size, dtype=x.dtype), "swiglu": SWIGLU}
    options["gate_up_bias"], options["down_bias"] = (random(experts, n, dtype=x.dtype) for n in (2 * features, size))
    if tokens == 4:
        scales = weights[1].scales[:, ::3]
        scales += torch.randint(8, 12, scales.shape, dtype=torch.uint8)  # some are large
        x, options = x / 100, {}
    arguments = x, expert_ids[:, :choices].contiguous(), torch.rand(tokens, choices), *weights
    outcomes = []
    for most_tokens, last in (4, "sum_experts"), (0, "weighted_sum"):
        monkey(gemm, "MAX_SUMMED_TOKENS", most_tokens)
        outcomes.append(gemm["experts"](*arguments, **{name: cloned(value) for name, value in options.items()}))
        assert names[-1].startswith(last)
    assert torch.equal(*outcomes)
    assert_close(outcomes[0], reference.experts(*arguments, **options).double(), 4)


@pytest.mark.parametrize("pairs", [2, 110])
@pytest.mark.parametrize("is_mxfp4", [True, False])
def test_rows_of_wide_experts_fit_into_shared_memory(
    pairs: int, is_mxfp4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches request no more than a block of compute capability 8.0 has: 163 KiB."""
    requests = []

    def record(source: str, name: str, *, shared_bytes: int = 0, **_: bool) -> Callable[..., None]:
        requests.append((name, shared_bytes))
        return lambda *_: None

    experts = emulator.emulated().experts
    monkeypatch.setitem(experts.__globals__, "kernel", record)
    for size, in_shared_memory in (4096, True), (16384, pairs == 2):
        requests.clear()
        gate_up, down = torch.empty(128, 2 * 32, size, dtype=BF16), torch.empty(128, size, 32, dtype=BF16)
        weights = [random_mxfp4(128, *w.shape[1:]) if is_mxfp4 else w for w in (gate_up, down)]
        x, expert_ids = torch.empty(pairs // 2, size, dtype=BF16), torch.zeros(pairs // 2, 2, dtype=torch.int64)
        experts(x, expert_ids, torch.rand(pairs // 2, 2), *weights)
        first = next(shared_bytes for name, shared_bytes in requests if name.startswith("skinny_experts"))
        assert (first > 0) == in_shared_memory
        assert max(shared_bytes for _, shared_bytes in requests) <= 160 * 1024


def test_experts_of_mxfp4_with_large_scales() -> None:
    x, expert_ids = random(9, 64), torch.randint(-1, 4, (9, 2))
    weights = random_mxfp4(3, 64, 64), random_mxfp4(3, 64, 32)
    for weight in weights:
        weight.scales[:, ::3] += torch.randint(8, 12, weight.scales[:, ::3].shape, dtype=torch.uint8)
    scales = weights[0].scales
    assert scales.max() > 128
    for batch_invariant in (False, True):
        check("experts", x / 100, expert_ids, torch.rand(9, 2), *weights, factor=4, batch_invariant=batch_invariant)


@pytest.mark.parametrize(
    ("pairs", "size", "features", "rows"),
    [
        (20, 672, 32, 32),
        pytest.param(150, 288, 96, 64, marks=pytest.mark.nightly),
        pytest.param(330, 160, 64, 128, marks=pytest.mark.nightly),
    ],
)
def test_wide_experts_of_mxfp4(
    pairs: int, size: int, features: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of so many rows; some of the scales are large."""
    gemm, monkey = emulator.emulated().experts.__globals__, monkeypatch.setitem
    group = gemm["_group_pairs"]
    monkey(gemm, "compute_capability", lambda device: (9, 0))
    monkey(gemm, "MIN_WIDE_ROWS", 0)
    monkey(gemm, "_group_pairs", lambda expert_ids, experts, _: group(expert_ids, experts, rows))
    x, expert_ids = random(pairs // 2, size), torch.randint(-1, 4, (pairs // 2, 2))
    weights = random_mxfp4(3, 2 * features, size), random_mxfp4(3, size, features)
    arguments = x, expert_ids, torch.rand(pairs // 2, 2), *weights
    biases = {"gate_up_bias": random(3, 2 * features), "down_bias": random(3, size)}
    check("experts", *arguments, **biases, swiglu=SWIGLU, factor=4)
    weights[0].scales[:, ::3] += torch.randint(8, 12, weights[0].scales[:, ::3].shape, dtype=torch.uint8)
    check("experts", x / 100, *arguments[1:], factor=4)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), [(1, 5, BF16), (6, 1000, F32), (3, 4100, F16), (2, 9000, BF16)])
def test_sampling(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, inputs = (torch.randn(rows, vocab) * 3).to(dtype), SamplingInputs.random(rows, "cpu")
    temperature = torch.where(torch.arange(rows) % 3 == 2, 0.0, inputs.temperature)
    (actual, *_), (expected, *_) = results("gumbel_argmax", logits, temperature, inputs.keys, first_token=7)
    tokens = emulator.emulated().merge_candidates(actual[None])
    assert torch.equal(tokens, reference.merge_candidates(expected[None]))
    for count in (1, 64, 128):
        check("topk_candidates", logits, count, first_token=7)
    candidates = reference.topk_candidates(logits, min(64, vocab))
    check("sample_topk", candidates, *vars(inputs).values())
    check("sample_top_p", logits, inputs.temperature, inputs.top_p, inputs.min_p, inputs.keys)


# A source, a mistake in it, and the test that must fail: a missing barrier, a missing wait, a wait for too little.
FAULTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "skinny_gemm.cu": (
        "__syncthreads();\n        if constexpr (EPILOGUE == PUSH)",
        "if constexpr (EPILOGUE == PUSH)",
        lambda: test_linear(8, 24, 1024, BF16),
    ),
    "decode_attention.cu": (
        "block.copies().wait(stage);",
        "",
        lambda: test_decode_attention(*DECODED[1], None, BF16),
    ),
    "skinny_experts.cu": (
        "wait_all_copies();\n        __syncthreads();",
        "wait_all_copies();",
        lambda: test_experts_of_mxfp4(46, 160, 96, batch_invariant=False),
    ),
    "experts.cu": ("wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();", lambda: test_experts(60, BF16)),
    "wide_experts.cu": (
        "wait_multiply();\n            if (large)",
        "if (large)",
        lambda: test_wide_experts_of_mxfp4(20, 672, 32, 32, pytest.MonkeyPatch()),
    ),
}


@pytest.mark.parametrize("source", FAULTS)
def test_emulator_detects_a_fault(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, case = FAULTS[source]
    emulator.put_fault(monkeypatch, source, right, wrong)
    with pytest.raises(AssertionError, match="not close"):
        case()


@pytest.mark.parametrize(
    ("features", "size", "dtype", "capability"),
    [(67, 136, BF16, (9, 0)), (72, 8, F16, (8, 0)), (72, 136, BF16, (9, 0))],
)
def test_linear_batch_invariant_row_is_bitwise_equal_in_any_batch(
    features: int, size: int, dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = emulator.emulated()
    launched: list[int] = []
    launch = module.launch_wide_gemm
    of_wide_gemm = module.wide_linear.__globals__
    monkeypatch.setitem(of_wide_gemm, "compute_capability", lambda device: capability)
    monkeypatch.setitem(of_wide_gemm, "launch_wide_gemm", lambda *of: (launched.append(len(of[0])), launch(*of)))
    x, weight = random(300, size, dtype=dtype), (random(2 * features, size) / size**0.5).to(dtype)
    bias, norm = random(2 * features, dtype=dtype), random(size, dtype=dtype)
    before = random(300, features, dtype=dtype)

    def linears(rows: slice) -> list[Tensor]:
        return batch_invariant_linears(module.linear, x[rows], weight, bias, norm, before[rows])

    together = linears(slice(None))
    for rows in (slice(0, 1), slice(5, 21), slice(6, 70), slice(299, 300), slice(0, 0)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(linears(rows), together, strict=True))
    expected = reference.linear(x, weight, bias, norm=norm, eps=1e-5, gated=True)
    assert_close(together[3], expected.double(), 4)
    assert (300 in launched) == (capability == (9, 0) and features % 8 == 0)  # for any number of rows, or none
    assert len(launched) in (0, 4 * 5)


@pytest.mark.parametrize("cache_dtype", [BF16, torch.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 150])
def test_decode_attention_with_kv_chunk_is_bitwise_equal_in_any_batch(
    window: int | None, cache_dtype: torch.dtype
) -> None:
    rows, heads, kv_heads, size, kv_chunk = 7, 4, 2, 64, 48
    positions = torch.tensor([0, kv_chunk * 8, kv_chunk, kv_chunk - 1, 1, 200, 333], dtype=torch.int32)
    table = torch.randperm(rows * 26, dtype=torch.int32).view(rows, 26)
    table_rows = torch.randperm(rows, dtype=torch.int32)
    slots = table[table_rows.long(), positions.long() // 16] * 16 + positions % 16
    cache = KVCache(*(random(rows * 26, 16, kv_heads, size).to(cache_dtype) for _ in range(2)))
    qkv, cos_sin = random(rows, (heads + 2 * kv_heads) * size), torch.randn(500, size)

    def attention(rows: slice, module: Any, kv_chunk: int | None) -> Tensor:
        partition = module.partition_keys(positions[rows], table_rows[rows], kv_heads, window, kv_chunk)
        norm, rope, pages = QKNorm(None, None, 0.0), Rope(positions[rows], cos_sin), Pages(table, table_rows[rows])
        result: Tensor = module.decode_attention(qkv[rows], norm, rope, cache, slots[rows], pages, partition, 0.1)
        return result

    together = attention(slice(None), emulator.emulated(), kv_chunk)
    assert_close(together, attention(slice(None), reference, None).double(), 4)
    for some in (slice(0, 1), slice(1, 2), slice(3, 6), slice(6, 7)):
        assert torch.equal(attention(some, emulator.emulated(), kv_chunk), together[some])
