"""The ops against torch's own functions, transformers' modules and plain loops: on a CPU, on a GPU, in the emulator."""

from __future__ import annotations

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lockstep.kernels import native, ops, reference
from lockstep.kernels.arguments import FP8Rows, KVCache, Pages, QKNorm, Rope, num_groups
from lockstep.runtime.model.kv_pool import AttentionShape, KVPool

import emulator
from kernel_cases import (
    SamplingInputs,
    assert_close,
    batch_invariant_linears,
    dequantized,
    random_fp8,
    to_device,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
also_emulated = pytest.mark.parametrize("device", [*DEVICES, "emulated"], indirect=True)  # CUDA kernels on a CPU
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the device of the tensors; for "emulated" it is the CPU, and the ops run our kernels in the emulator."""
    torch.manual_seed(0)
    if request.param != "emulated":
        return str(request.param)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(ops, "reference", emulator.emulated())
    return "cpu"


@also_emulated
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [0, 1, 77])
def test_gather_rows_of_all_shards_sum_to_the_lookup(device: str, rows: int, ids_dtype: torch.dtype) -> None:
    table = torch.randn(131, 24, device=device).bfloat16()
    ids = torch.randint(0, 131, (rows,), device=device, dtype=ids_dtype)
    shards = [
        ops.gather_rows(part, ids, first_row=first) for first, part in zip((0, 44, 88), table.split(44), strict=True)
    ]
    assert torch.equal(sum(shards), F.embedding(ids, table))
    foreign = (ids < 44) | (ids >= 88)
    assert not shards[1][foreign].any()


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (0, 8), (3, 4, 16)])
def test_rms_norm(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*shape, device=device).to(dtype), torch.rand(shape[-1], device=device).to(dtype) + 0.5
    expected = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_equals_transformers() -> None:
    norm = LlamaRMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(7, 64)
    torch.testing.assert_close(ops.rms_norm(x, norm.weight.detach(), 1e-6), norm(x), rtol=1e-6, atol=1e-6)


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(device: str, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(9, 48, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(48, device=device).to(dtype) + 0.5
    total = x.double() + residual.double()
    kept = residual.clone()
    assert_close(ops.add_rms_norm(x, kept, weight, 1e-5), F.rms_norm(total, (48,), weight.double(), 1e-5))
    assert torch.equal(kept, total.to(dtype))


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["layer-first", "page-first"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store_equals_transformers(
    device: str, normed: bool, head_dim: int, layout: str, dtype: torch.dtype
) -> None:
    heads, kv_heads, tokens = 6, 2, 5
    positions = torch.tensor([0, 3, 9, 200, 1], device=device)
    slots = torch.tensor([17, 2, -1, 30, 4], device=device, dtype=torch.int32)
    angles = positions[:, None] * (10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim))
    cos_sin = torch.zeros(256, head_dim, device=device)
    cos_sin[positions] = torch.cat((angles.cos(), angles.sin()), dim=-1)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    norm = QKNorm(*(torch.rand(head_dim, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)), 1e-6)
    shape = AttentionShape(
        num_layers=2, num_heads=heads, page_size=4, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    pool = KVPool(shape, 9, torch.device(device), layout)  # type: ignore[arg-type]
    rotated = ops.rotate_and_store_(qkv, norm, Rope(positions.int(), cos_sin), pool.layer(1), slots)

    q, k, _ = qkv.double().unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if norm.q is not None and norm.k is not None:
        q = F.rms_norm(q, (head_dim,), norm.q.double(), 1e-6)
        k = F.rms_norm(k, (head_dim,), norm.k.double(), 1e-6)
    cos, sin = (
        torch.cat((angles, angles), -1).cos()[None].double(),
        torch.cat((angles, angles), -1).sin()[None].double(),
    )
    q, k = (
        x[0].transpose(0, 1) for x in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    )
    assert_close(rotated, q)
    stored_k, stored_v = (x.reshape(-1, kv_heads, head_dim) for x in pool.layer(1))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert_close(stored_k[slot], k[token])
            assert torch.equal(stored_v[slot], qkv[token].view(-1, head_dim)[-kv_heads:])
    untouched = [n for n in range(36) if n not in slots.tolist()]
    assert not stored_k[untouched].any()
    assert not stored_v[untouched].any()
    assert not pool.layer(0).k.any()
    assert not pool.layer(0).v.any()


def store(k: torch.Tensor, v: torch.Tensor, cache: KVCache, slots: torch.Tensor) -> None:
    """Store k and v by rotate_and_store_ without a norm, rotated by an angle of zero."""
    unrotated = torch.cat((torch.ones(1, k.shape[2] // 2), torch.zeros(1, k.shape[2] // 2)), dim=1).to(k.device)
    qkv = torch.cat((torch.zeros_like(k), k, v), dim=1).flatten(1)
    rope = Rope(torch.zeros(len(k), dtype=torch.int32, device=k.device), unrotated)
    ops.rotate_and_store_(qkv, QKNorm(None, None, 0.0), rope, cache, slots)


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_sum_squares(device: str, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 700, device=device).to(dtype)
    expected = torch.stack([part.double().square().sum(1) for part in (x[:, :600], x[:, 600:650])], dim=1)
    torch.testing.assert_close(ops.sum_squares(x, (600, 50)).double(), expected, rtol=1e-5, atol=1e-5)


@also_emulated
@pytest.mark.parametrize("size", [17, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_by_sigmoid(device: str, dtype: torch.dtype, size: int) -> None:
    x, gate = torch.randn(6, size, device=device).to(dtype), torch.randn(6, 3 * size, device=device).to(dtype)[:, size:]
    expected = x.double() * gate[:, :size].double().sigmoid()
    assert ops.multiply_by_sigmoid_(x, gate[:, :size]) is x
    assert_close(x, expected)


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 34, device=device).to(dtype)
    assert_close(ops.silu_and_mul(x), F.silu(x[:, :17].double()) * x[:, 17:].double())
    assert_close(ops.gelu_and_mul(x), F.gelu(x[:, :17].double(), approximate="tanh") * x[:, 17:].double())


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 96, 128])
@pytest.mark.parametrize("rotary", [0, 2, 8, 12, 14])
def test_rotate_and_store_rotates_a_part_of_a_head(device: str, rotary: int, head_dim: int, dtype: torch.dtype) -> None:
    """A rotation of the first elements equals that of a head of their number; 0 stands for an empty table."""
    positions, slots = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([0, 3, 9], [2, 0, 5]))
    qkv, cos_sin = torch.randn(3, 4 * head_dim, device=device).to(dtype), torch.randn(10, rotary, device=device)
    part = qkv.unflatten(1, (4, head_dim))[..., :rotary].flatten(1)
    cache, part_cache = (
        KVCache(*(torch.zeros(2, 3, 1, size, device=device, dtype=dtype) for _ in range(2)))
        for size in (head_dim, rotary)
    )
    norm = QKNorm(None, None, 0.0)
    table = cos_sin if rotary else torch.zeros(0, head_dim, device=device)
    q = ops.rotate_and_store_(qkv, norm, Rope(positions, table), cache, slots)
    expected, expected_k = qkv.unflatten(1, (4, head_dim))[:, :2].clone(), qkv[:, 2 * head_dim :].unflatten(1, (2, -1))
    if rotary:
        expected[..., :rotary] = ops.rotate_and_store_(part, norm, Rope(positions, cos_sin), part_cache, slots)
    assert torch.equal(q, expected)
    for name, x, rotated in (("k", expected_k[:, 0], part_cache.k), ("v", expected_k[:, 1], part_cache.v)):
        stored = getattr(cache, name).view(6, head_dim)[slots.long()]
        x = x.clone()
        x[:, :rotary] = rotated.view(6, rotary)[slots.long()]
        assert torch.equal(stored, x), name


@also_emulated
@pytest.mark.parametrize("layout", ["layer-first", "page-first"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rows", [0, 1, 29])
def test_rotate_and_store_writes_exactly_the_given_slots(device: str, layout: str, page_size: int, rows: int) -> None:
    shape = AttentionShape(
        num_layers=3, num_heads=2, page_size=page_size, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16
    )
    pool = KVPool(shape, 40, torch.device(device), layout)  # type: ignore[arg-type]
    k, v = (torch.randn(rows, 2, 8, device=device).bfloat16() for _ in range(2))
    slots = torch.randperm(40 * page_size, device=device)[:rows].int()
    slots[::5] = -1
    expected = {which: torch.zeros(40 * page_size, 2, 8, dtype=torch.bfloat16) for which in "kv"}
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected["k"][slot], expected["v"][slot] = k[row].cpu(), v[row].cpu()
    store(k, v, pool.layer(1), slots)
    assert torch.equal(pool.layer(1).k.reshape(-1, 2, 8).cpu(), expected["k"])
    assert torch.equal(pool.layer(1).v.reshape(-1, 2, 8).cpu(), expected["v"])
    for untouched in (pool.layer(0).k, pool.layer(0).v, pool.layer(2).k, pool.layer(2).v):
        assert not untouched.any()


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 10])
def test_rotate_and_store_converts_to_fp8(device: str, width: int, dtype: torch.dtype) -> None:
    k, v = (torch.randn(9, 2, width, device=device).mul(200).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.zeros(3, 4, 2, width, device=device, dtype=torch.float8_e4m3fn) for _ in range(2))
    slots = torch.tensor([3, -1, 11, 0, 5, 4, 9, 7, 1], device=device).int()
    store(k, v, KVCache(k_cache, v_cache), slots)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        stored = cache.view(12, 2, width).float()
        kept = slots >= 0
        # 3 bits of mantissa: half a step of rounding is a 16th of the value; below 2^-6 the steps are 2^-9
        expected = rows[kept].float().clamp(-448, 448)
        assert ((stored[slots[kept].long()] - expected).abs() <= (expected.abs() / 16).clamp(min=2**-10)).all()
        assert not stored[[2, 6, 8, 10]].any()


def gumbel_argmax_in_float64(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the tokens [S] by the definition, token by token, in float64 where possible."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    samples = []
    for row, t, key in zip(logits.float().tolist(), temperature.tolist(), keys.tolist(), strict=True):
        noise = [((mix((key + 0x9E3779B97F4A7C15 * v) & mask) >> 12) + 0.5) * 2.0**-52 for v in range(len(row))]
        scores = row if t == 0 else [x / t - math.log(-math.log(u)) for x, u in zip(row, noise, strict=True)]
        samples.append(scores.index(max(scores)))
    return torch.tensor(samples, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 151_936), (5, 131), (300, 1024)])
def test_gumbel_argmax_is_its_definition(device: str, rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    temperature = torch.rand(rows, device=device)
    temperature[::3] = 0
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    sampled = ops.merge_candidates(ops.gumbel_argmax(logits, temperature, keys)[None])
    definition = reference.gumbel_argmax(logits.cpu(), temperature.cpu(), keys.cpu())
    assert torch.equal(sampled.cpu(), reference.merge_candidates(definition[None]))
    assert torch.equal(sampled[::3].long(), logits[::3].argmax(-1))
    few = slice(0, 7)
    assert torch.equal(sampled[few].cpu(), gumbel_argmax_in_float64(logits[few], temperature[few], keys[few]))


@also_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 50, 4096])
def test_gumbel_argmax_in_parts_or_with_token_ids_is_that_of_the_whole(
    device: str, vocab: int, dtype: torch.dtype
) -> None:
    """Parts of the vocabulary, one of them empty, and all of it in another order give the same tokens."""
    logits = (torch.randn(6, vocab, device=device) * 3).to(dtype)
    inputs = torch.tensor([0, 0.3, 1, 2, 0, 1.5], device=device), torch.arange(6, device=device) - 3
    whole = ops.gumbel_argmax(logits, *inputs)
    cuts = [0, vocab // 3, vocab // 3, vocab]
    parts = [ops.gumbel_argmax(logits[:, a:b], *inputs, first_token=a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(ops.merge_candidates(torch.stack(parts)), ops.merge_candidates(whole[None]))
    order = torch.stack([torch.randperm(vocab) for _ in range(6)]).to(device)
    named = ops.gumbel_argmax(logits.gather(1, order), *inputs, tokens=order.int())
    assert torch.equal(named, whole)


@also_emulated
def test_gumbel_argmax_of_equal_logits_takes_the_lower_id_and_never_an_excluded_one(device: str) -> None:
    logits = torch.full((4, 100), -torch.inf, device=device)
    logits[:, [60, 30]] = 1.0
    keys = torch.arange(4, device=device)
    sample = lambda logits, temperature: ops.merge_candidates(ops.gumbel_argmax(logits, temperature, keys)[None])  # noqa: E731
    assert (sample(logits, torch.zeros(4, device=device)) == 30).all()
    assert set(sample(logits, torch.ones(4, device=device)).tolist()) <= {30, 60}
    logits[:, 30], logits[:, 60] = -0.0, 0.0
    assert (sample(logits, torch.zeros(4, device=device)) == 30).all(), "zeros are equal"


def unpacked(candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and tokens: the upper half has a float's bits, inverted below the sign if it is negative."""
    upper, lower = candidates >> 32, candidates & 0xFFFFFFFF
    return torch.where(upper < 0, upper ^ 0x7FFFFFFF, upper).int().view(torch.float32), 0xFFFFFFFF - lower


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (5, 0), (5, 5), (5, 64), (5, 3000), (3, 4097), (2, 151_936)])
@pytest.mark.parametrize("count", [1, 40, 64, 128])
def test_topk_candidates_is_a_stable_sort(device: str, rows: int, vocab: int, count: int, dtype: torch.dtype) -> None:
    """Also if the greatest are adjacent, so that one thread has them all, and if all are equal."""
    logits = ((torch.randn(rows, vocab, device=device) * 8).round() / 4).to(dtype)
    logits[1:2], logits[2:3] = torch.linspace(-9, 9, vocab, device=device), 1.0
    logits[3:4] = torch.linspace(9, -9, vocab, device=device)
    logits[4:5, : vocab // 2] = -torch.inf
    candidates = ops.topk_candidates(logits, count, first_token=11)
    scores, tokens = unpacked(candidates)
    n = min(vocab, count)
    expected, order = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores[:, :n], expected[:, :n])
    assert torch.equal(tokens[:, :n].long(), order[:, :n] + 11)
    assert (candidates[:, n:] == torch.iinfo(torch.int64).min).all()
    if count == 64:  # the top of the parts' candidates is that of the whole
        cut = vocab // 3
        parts = [
            ops.topk_candidates(logits[:, :cut], count, first_token=11),
            ops.topk_candidates(logits[:, cut:], count, first_token=11 + cut),
        ]
        assert torch.equal(ops.topk_candidates(torch.cat(parts, 1), count), candidates)


@pytest.mark.parametrize(("rows", "count"), [(0, 64), (1, 1), (300, 64), (60, 33), (60, 128)])
def test_sample_topk_is_gumbel_argmax_of_the_kept_candidates(device: str, rows: int, count: int) -> None:
    torch.manual_seed(rows)
    logits, inputs = (torch.randn(rows, 1000, device=device) * 2).bfloat16(), SamplingInputs.random(rows, device)
    sampled = ops.sample_topk(ops.topk_candidates(logits, count), *vars(inputs).values())
    greatest = logits.cpu().float().sort(descending=True, stable=True)
    for row, token in enumerate(sampled.tolist()):
        candidates = torch.full((1000,), -torch.inf)
        candidates[greatest.indices[row, :count]] = greatest.values[row, :count]
        expected = inputs.token(row, candidates, with_k=True)
        assert expected is None or token == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "spread"), [(0, 9, 1), (3, 1, 1), (200, 1003, 2), (200, 4096, 0.1), (7, 151_936, 3)]
)
def test_sample_top_p_is_gumbel_argmax_of_the_kept_tokens(
    device: str, rows: int, vocab: int, spread: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab, device=device) * spread).to(dtype)
    logits[1:2], logits[2:3, ::2] = 0.5, -torch.inf
    inputs = SamplingInputs.random(rows, device)
    inputs.top_p[::7] = 1e-6
    sampled = ops.sample_top_p(logits, inputs.temperature, inputs.top_p, inputs.min_p, inputs.keys).tolist()
    expected = [inputs.token(row, logits[row].cpu(), with_k=False) for row in range(rows)]
    assert sampled == [s if e is None else e for s, e in zip(sampled, expected, strict=True)]
    assert sum(token is not None for token in expected) >= rows // 2


LINEAR_SHAPES = [
    (0, 16, 64),
    (1, 48, 64),
    (3, 40, 72),
    (8, 24, 1024),
    (1, 1032, 4096),
    (8, 328, 14336),
    (5, 64, 2048),
    (9, 40, 64),
    (33, 48, 128),
    (64, 40, 72),
    (65, 40, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "size"), LINEAR_SHAPES)
def test_linear_with_norm_bias_gate_and_residual(
    device: str, rows: int, features: int, size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.randn(2 * features, size, device=device) / size**0.5).to(dtype)
    bias, norm = (torch.rand(n, device=device).to(dtype) for n in (2 * features, size))
    before = torch.randn(rows, features, device=device).to(dtype)
    normed = F.rms_norm(x.double(), (size,), norm.double(), 1e-5)

    plain = x.double() @ weight[:features].double().T
    assert_close(ops.linear(x, weight[:features]), plain)
    assert_close(ops.linear(x, weight[:features], bias[:features]), plain + bias[:features].double())
    total = before.clone()
    assert ops.linear(x, weight[:features], add_to=total) is total
    assert_close(total, before.double() + plain)
    assert_close(
        ops.linear(x, weight[:features], bias[:features], add_to=before.clone()),
        before.double() + plain + bias[:features].double(),
    )
    assert_close(ops.linear(x, weight[:features], norm=norm, eps=1e-5), normed @ weight[:features].double().T)
    gate, up = (normed @ weight.double().T + bias.double()).chunk(2, dim=-1)
    assert_close(ops.linear(x, weight, bias, norm=norm, eps=1e-5, gated=True), F.silu(gate) * up)


FP8_BLOCKS = [  # features, size, rows and columns of a block, place of column 0 in its block
    (67, 136, 1, 256, 0),  # one scale a row; rows of no whole vectors on a GPU
    (256, 1024, 128, 128, 0),
    (520, 2064, 8, 128, 80),
    (256, 512, 256, 512, 0),  # one scale
    pytest.param(2048, 4096, 2048, 4096, 0, marks=pytest.mark.nightly),  # one scale, many tiles
    (96, 14336, 32, 128, 64),
    (40, 96, 8, 32, 0),  # smaller blocks than the kernels support
]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 100])
@pytest.mark.parametrize(("features", "size", "block_rows", "block_columns", "first"), FP8_BLOCKS)
def test_linear_of_fp8_equals_float64_of_the_dequantized_weight(
    device: str,
    rows: int,
    features: int,
    size: int,
    block_rows: int,
    block_columns: int,
    first: int,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(rows, size).to(device, dtype)
    bias, norm = (torch.rand(n).to(device, dtype) for n in (2 * features, size))
    before = torch.randn(rows, features).to(device, dtype)
    both = to_device(random_fp8(2 * features, size, block_rows, block_columns, first), device)
    half = to_device(random_fp8(features, size, block_rows, block_columns, first), device)
    normed = F.rms_norm(x.double(), (size,), norm.double(), 1e-5)
    plain = x.double() @ dequantized(half).T
    factor = 10 if dtype == torch.float32 else 1  # sums of up to 14,336 products
    if device == "cuda" and rows > 8 and dtype != torch.float32:
        factor = 4 if dtype == torch.bfloat16 else 40  # activations are FP8, too; test_scaled_gemm.py is exact about it
    assert_close(ops.linear(x, half, bias[:features]), plain + bias[:features].double(), factor)
    assert_close(ops.linear(x, half, add_to=before.clone()), before.double() + plain, factor)
    assert_close(ops.linear(x, half, out=torch.empty_like(before)), plain, factor)
    gate, up = (normed @ dequantized(both).T + bias.double()).chunk(2, dim=-1)
    assert_close(ops.linear(x, both, bias, norm=norm, eps=1e-5, gated=True), F.silu(gate) * up, factor)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [3072, 5120, 8192, 12800])
def test_linear_row_is_bitwise_equal_in_any_small_batch(size: int, gated: bool) -> None:
    x, weight = (torch.randn(n, size, device="cuda").bfloat16() for n in (8, 2048))
    for norm in (None, torch.rand(size, device="cuda").bfloat16()):
        together = ops.linear(x, weight, norm=norm, eps=1e-5, gated=gated)
        for n in range(1, 8):
            part = ops.linear(x[8 - n :].contiguous(), weight, norm=norm, eps=1e-5, gated=gated)
            assert torch.equal(part, together[8 - n :])


@pytest.mark.gpu
def test_linear_of_fp8_row_is_bitwise_equal_in_any_small_batch() -> None:
    torch.manual_seed(0)
    x, before = (torch.randn(8, n, device="cuda").bfloat16() for n in (4096, 4200))
    weight = to_device(random_fp8(4200, 4096, 128, 128), "cuda")
    together = ops.linear(x, weight, add_to=before.clone())
    assert_close(together, before.double() + x.double() @ dequantized(weight).T)
    for rows in (slice(0, 1), slice(2, 3), slice(5, 8)):
        assert torch.equal(ops.linear(x[rows].contiguous(), weight, add_to=before[rows].clone()), together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("block_columns", [128, 1024])
def test_linear_of_fp8_batch_invariant_row_is_bitwise_equal_in_any_batch(block_columns: int) -> None:
    torch.manual_seed(0)
    weight = to_device(random_fp8(512, 1024, 128, block_columns), "cuda")
    x, norm = torch.randn(300, 1024, device="cuda").bfloat16(), torch.rand(1024, device="cuda").bfloat16()
    together = ops.linear(x, weight, norm=norm, eps=1e-5, gated=True, batch_invariant=True)
    gate, up = (F.rms_norm(x.double(), (1024,), norm.double(), 1e-5) @ dequantized(weight).T).chunk(2, dim=-1)
    assert_close(together, F.silu(gate) * up, factor=4)  # activations may be FP8, too
    for rows in (slice(0, 1), slice(5, 21), slice(6, 70)):
        part = ops.linear(x[rows], weight, norm=norm, eps=1e-5, gated=True, batch_invariant=True)
        assert torch.equal(part, together[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("features", "size"), [(131, 256), (2048, 1032), (72, 8)])
def test_linear_batch_invariant_row_is_bitwise_equal_in_any_batch(features: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(700, size, device="cuda").to(dtype)
    weight = (torch.randn(2 * features, size, device="cuda") / size**0.5).to(dtype)
    bias, norm = (torch.rand(n, device="cuda").to(dtype) for n in (2 * features, size))
    before = torch.randn(700, features, device="cuda").to(dtype)
    normed = F.rms_norm(x.double(), (size,), norm.double(), 1e-5)

    def linears(rows: slice) -> list[torch.Tensor]:
        return batch_invariant_linears(ops.linear, x[rows], weight, bias, norm, before[rows])

    together = linears(slice(None))
    plain, both = x.double() @ weight[:features].double().T, normed @ weight.double().T
    gate, up = (both + bias.double()).chunk(2, dim=-1)
    assert_close(together[0], plain + bias[:features].double())
    assert_close(together[1], plain + before.double())
    assert_close(together[2], F.silu(both[:, :features]) * both[:, features:])
    assert_close(together[3], F.silu(gate) * up)
    for rows in (slice(0, 1), slice(5, 21), slice(6, 70), slice(100, 357), slice(699, 700), slice(0, 0)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(linears(rows), together, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize(("rows", "window", "softcap"), [(1, None, None), (3, 100, 2.0), (40, 100, None)])
def test_decode_attention_reads_fp8_as_the_numbers_it_stands_for(
    rows: int, window: int | None, softcap: float | None, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, kv_heads, pages = 8, 2, 40
    positions = torch.randint(0, 16 * pages - 1, (rows,), device="cuda", dtype=torch.int32)
    table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
    kv_slots = table[torch.arange(rows, device="cuda"), positions.long() // 16] * 16 + positions % 16
    fp8 = KVCache(*(torch.randn(rows * pages, 16, kv_heads, size, device="cuda").to(torch.float8_e4m3fn) for _ in "kv"))
    exact = KVCache(*(part.double() for part in fp8))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size, device="cuda").to(dtype)
    rope = Rope(positions, torch.randn(16 * pages, size, device="cuda"))
    views = Pages(table, torch.arange(rows, device="cuda", dtype=torch.int32))
    partition = ops.partition_keys(positions, views.table_rows, kv_heads, window)
    norm, sinks = QKNorm(None, None, 1e-6), torch.randn(heads, device="cuda").to(dtype)
    stored = KVCache(*(part.clone() for part in fp8))
    ops.rotate_and_store_(qkv, norm, rope, stored, kv_slots)
    step = norm, rope, fp8, kv_slots, views, partition, 0.1, softcap, sinks
    out = ops.decode_attention(qkv, *step)
    expected = reference.decode_attention(qkv.double(), *step[:2], exact, *step[3:-1], sinks.double())
    assert_close(out, expected, 2)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(fp8, stored, strict=True))
    quantized = ops.decode_attention(qkv, *step, feeds=to_device(random_fp8(256, heads * size, 128, 128), "cuda"))
    assert isinstance(quantized, FP8Rows) == (size == 128 and rows > 8)
    if isinstance(quantized, FP8Rows):
        assert_close(quantized.dequantized(), out.double(), 10)


DECODED = [  # heads, KV heads, head size, softcap, whether there are sinks
    (8, 8, 64, None, True), (10, 2, 64, 2.0, True), (8, 2, 128, None, False), (16, 2, 128, 2.0, False),
    (8, 2, 96, None, True), (24, 2, 96, 2.0, False), (16, 2, 256, None, False), (6, 2, 256, 2.0, True),
]  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "softcap", "has_sinks"), DECODED)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_decode_attention(
    device: str,
    page_size: int,
    heads: int,
    kv_heads: int,
    size: int,
    softcap: float | None,
    has_sinks: bool,
    window: int | None,
) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    positions = torch.tensor([0, 1, 17, 64, 999, 300, 3000][: 5 if device == "cpu" else 7], dtype=torch.int32)
    rows, num_pages = len(positions), 3000 // page_size + 1
    table = torch.randperm(rows * num_pages).int().view(rows, num_pages)
    table_rows = torch.randperm(rows).int()
    slots = table[table_rows.long(), positions.long() // page_size] * page_size + positions % page_size
    slots[1] = -1  # padding of a graph stores nothing
    k_cache, v_cache = (torch.randn(rows * num_pages, page_size, kv_heads, size).to(dtype) for _ in range(2))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size + 16).to(dtype)  # gates follow some families' heads
    q_norm, k_norm = (torch.rand(size).to(dtype) + 0.5 for _ in range(2))
    cos_sin = torch.randn(3001, size)
    inputs = [
        t.to(device) for t in (qkv, q_norm, k_norm, positions, cos_sin, k_cache, v_cache, slots, table, table_rows)
    ]
    qkv, q_norm, k_norm, positions, cos_sin, k_cache, v_cache, slots, table, table_rows = inputs
    qkv = qkv[:, :-16]
    norm, rope, cache = QKNorm(q_norm, k_norm, 1e-6), Rope(positions, cos_sin), KVCache(k_cache, v_cache)
    expected_cache = KVCache(k_cache.clone(), v_cache.clone())
    pages = Pages(table, table_rows)
    partition = ops.partition_keys(positions, table_rows, num_groups(heads, kv_heads), window)
    sinks = (3 * torch.randn(heads, device=device)).to(dtype) if has_sinks else None
    for _ in range(2):  # what one layer leaves behind must not disturb the next
        out = ops.decode_attention(qkv, norm, rope, cache, slots, pages, partition, 0.1, softcap, sinks)
        out = out.unflatten(1, (heads, size))
    q = ops.rotate_and_store_(qkv, norm, rope, expected_cache, slots)
    assert torch.equal(cache.k, expected_cache.k)
    assert torch.equal(cache.v, expected_cache.v)
    new_slots = torch.arange(rows, device=device, dtype=torch.int32)
    new = KVCache(*torch.zeros(2, rows, 1, kv_heads, size, device=device, dtype=dtype))  # of the new tokens
    ops.rotate_and_store_(qkv, norm, rope, new, new_slots)
    for row, position in enumerate(positions.tolist()):
        if row == 1:
            continue
        visible = range(0 if window is None else max(0, position - window + 1), position)
        page = table[table_rows[row].long()].tolist()
        places = [(page[j // page_size], j % page_size) for j in visible]
        keys = torch.stack([*(k_cache[p, o] for p, o in places), new.k[row, 0]]).double()
        values = torch.stack([*(v_cache[p, o] for p, o in places), new.v[row, 0]]).double()
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))  # [K, H, E]
        scores = torch.einsum("he,khe->hk", q[row].double(), keys) * 0.1
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        logits = scores if sinks is None else torch.cat((scores, sinks.double()[:, None]), dim=-1)
        weights = torch.softmax(logits, dim=-1)[:, : len(keys)]
        assert_close(out[row], torch.einsum("hk,khe->he", weights, values), 10 if device == "cpu" else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (5, 1), (16, 2)])
@pytest.mark.parametrize("rows", [20, 67, 256])
def test_decode_attention_of_many_rows(rows: int, heads: int, kv_heads: int, window: int | None) -> None:
    """Parts begin and end anywhere in a row, and a row has several; the definition is a loop over the rows."""
    positions = torch.randint(0, 900, (rows,), dtype=torch.int32, device="cuda")
    positions[::5] = 0
    positions[3] = 9000
    table = torch.randperm(rows * 563, device="cuda").int().view(rows, 563)
    table_rows = torch.randperm(rows, device="cuda").int()
    slots = table[table_rows.long(), positions.long() // 16] * 16 + positions % 16
    cache = KVCache(*torch.randn(2, rows * 563, 16, kv_heads, 64, device="cuda").bfloat16())
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * 64, device="cuda").bfloat16()
    rope = Rope(positions, torch.randn(9001, 64, device="cuda"))
    partition = ops.partition_keys(positions, table_rows, kv_heads, window)
    inputs = qkv, QKNorm(None, None, 0.0), rope, cache, slots, Pages(table, table_rows), partition, 0.1
    outputs = [ops.decode_attention(*inputs) for _ in range(3)]
    assert all(torch.equal(outputs[0], again) for again in outputs)
    assert_close(outputs[0], reference.decode_attention(*inputs).double(), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (5, 1)])
def test_decode_attention_with_kv_chunk_is_bitwise_equal_in_any_batch(
    heads: int, kv_heads: int, window: int | None
) -> None:
    rows, size, kv_chunk = 40, 128, 192
    positions = torch.randint(0, kv_chunk * 8, (rows,), dtype=torch.int32, device="cuda")
    positions[:5] = torch.tensor([0, kv_chunk * 8, kv_chunk, kv_chunk - 1, 1])
    table = torch.randperm(rows * 100, device="cuda").int().view(rows, 100)
    table_rows = torch.randperm(rows, device="cuda").int()
    slots = table[table_rows.long(), positions.long() // 16] * 16 + positions % 16
    cache = KVCache(*torch.randn(2, rows * 100, 16, kv_heads, size, device="cuda").bfloat16())
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size, device="cuda").bfloat16()
    cos_sin = torch.randn(kv_chunk * 8 + 1, size, device="cuda")

    def attention(rows: slice, kv_chunk: int | None) -> torch.Tensor:
        partition = ops.partition_keys(positions[rows], table_rows[rows], kv_heads, window, kv_chunk)
        norm, rope, pages = QKNorm(None, None, 0.0), Rope(positions[rows], cos_sin), Pages(table, table_rows[rows])
        return ops.decode_attention(qkv[rows], norm, rope, cache, slots[rows], pages, partition, 0.1)

    together = attention(slice(None), kv_chunk)
    assert_close(together, attention(slice(None), None).double(), 2)
    for some in (slice(0, 1), slice(1, 2), slice(3, 20), slice(39, 40)):
        for _ in range(2):  # what one layer leaves behind must not disturb the next
            assert torch.equal(attention(some, kv_chunk), together[some])


@pytest.mark.parametrize("device", [DEVICES[1], "emulated"], indirect=True)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 256, 1500])
@pytest.mark.parametrize("longest", [300, 5000])
def test_partition_keys_cuts_rows_unless_whole_rows_make_parts_of_about_one_length(
    device: str, rows: int, longest: int, window: int | None
) -> None:
    emulated = device == "cpu"
    kv_heads = 1 if emulated else 8
    properties = None if emulated else torch.cuda.get_device_properties(0)
    multiprocessors = properties.multi_processor_count if properties else emulator.MULTIPROCESSORS
    positions = torch.randint(0, longest, (rows,), device=device, dtype=torch.int32)
    positions[::7] = 0
    table_rows = torch.randperm(rows, device=device).int()
    table = ops.partition_keys(positions, table_rows, kv_heads, window).table
    few = rows * kv_heads <= multiprocessors
    blocks = multiprocessors if few else 4 * multiprocessors
    several = 8 if rows * kv_heads <= 2 * multiprocessors else 4
    chunk_keys, least, slack = (128, 2 if rows == 1 else 4, 4 if rows > 1 else 0) if few else (64, 4, several)
    visible = [min(p, window - 1) if window else p for p in positions.tolist()]
    chunks = [max(1, -(-keys // chunk_keys)) for keys in visible]
    starts = [0, *itertools.accumulate(chunks)]
    most = max(1, blocks // kv_heads)
    if few and 16 * (most % rows) <= most:
        most -= most % rows
    parts, (num_parts, num_chunks, *rest) = table[: 12 * most].view(most, 12).tolist(), table[12 * most :].tolist()
    assert rest[: rows + 1] == starts
    assert num_chunks == starts[-1]
    even = min(most, num_chunks, max(rows, num_chunks // least))
    whole = starts[:: -(-rows // even)] + [num_chunks] * (rows % -(-rows // even) > 0)
    enough = not few and (len(whole) - 1) * kv_heads >= 2 * multiprocessors
    compared = len(whole) - 1 if enough else even
    if max(stop - start for start, stop in itertools.pairwise(whole)) < num_chunks / compared + slack:
        cuts = whole
    else:
        length, longer = divmod(num_chunks, even)
        cuts = [part * length + min(part, longer) for part in range(even + 1)]
    assert num_parts == len(cuts) - 1
    row_of = [row for row in range(rows) for _ in range(chunks[row])]
    for (first, stop), (
        row,
        begin,
        end,
        position,
        chunk,
        first_chunk,
        end_chunk,
        row_chunks,
        table_row,
        last,
        *_,
    ) in zip(itertools.pairwise(cuts), parts, strict=False):
        assert (row, chunk, last) == (row_of[first], first, stop)
        assert (position, table_row, row_chunks) == (int(positions[row]), int(table_rows[row]), chunks[row])
        assert (first_chunk, end_chunk) == (first - starts[row], min(chunks[row], stop - starts[row]))
        hidden = position - visible[row]
        assert begin == min(position, hidden + first_chunk * chunk_keys)
        assert end == min(position, hidden + end_chunk * chunk_keys)
    assert all(part[0] == -1 for part in parts[num_parts:])


@also_emulated
def test_begin_decode_and_append_tokens(device: str) -> None:
    tokens = torch.randint(0, 99, (5, 40), device=device).int()
    pages, expected_pages = torch.zeros(5, 10, device=device).int(), torch.zeros(5, 10).int()
    slots, positions, kv_slots = (torch.tensor(x, device=device).int() for x in ([3, 0, 4], [38, 0, 7], [30, 9, -1]))
    token_ids = ops.begin_decode_(tokens, pages, slots, positions, kv_slots, 4)
    assert token_ids.tolist() == [int(tokens[3, 38]), int(tokens[0, 0]), int(tokens[4, 7])]
    expected_pages[3, 9], expected_pages[0, 0] = 7, 2
    assert torch.equal(pages.cpu(), expected_pages)
    expected = tokens.clone()
    expected[3, 39], expected[0, 1], expected[4, 8] = 1, 2, 3
    ops.append_tokens_(tokens, slots, positions, torch.tensor([1, 2, 3], device=device).int())
    assert torch.equal(tokens, expected)


def test_wrong_argument_is_named_with_the_rule() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \[7\] torch.float32 must be \[8\]"):
        ops.rms_norm(x, torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"ids .* int32 or int64"):
        ops.gather_rows(x, torch.zeros(3))
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(x, torch.zeros(3, 8), torch.zeros(8), 1e-5)
    cache = KVCache(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8))
    with pytest.raises(ValueError, match="kv_slots"):
        store(x.view(2, 1, 8), x.view(2, 1, 8), cache, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"v_cache .* must have the shape of k_cache"):
        store(x.view(2, 1, 8), x.view(2, 1, 8), KVCache(cache.k, cache.v[1:]), torch.zeros(2, dtype=torch.int32))


tokens = st.lists(st.integers(0, 3), max_size=80).map(lambda ids: np.array(ids, np.int32))


@given(tokens, tokens)
def test_common_prefix_length_in_cpp_and_numpy(a: np.ndarray, b: np.ndarray) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert reference.common_prefix_length(a, b) == expected
    assert ops.common_prefix_length(a, b) == expected


def test_common_prefix_length_runs_in_cpp_here() -> None:
    assert native.prefix_compare() is not None


def test_common_prefix_length_at_every_place_of_a_long_array() -> None:
    a = np.arange(100, dtype=np.int32)
    for i in range(100):
        b = a.copy()
        b[i] = -1
        assert ops.common_prefix_length(a, b) == i
    assert ops.common_prefix_length(a, a.copy()) == 100
    assert ops.common_prefix_length(a, a[:37]) == 37


def test_common_prefix_length_without_a_compiler_uses_numpy_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.prefix_compare.cache_clear()
    try:
        assert ops.common_prefix_length(np.array([1, 2], np.int32), np.array([1, 3], np.int32)) == 1
        assert "NumPy" in caplog.text
    finally:
        native.prefix_compare.cache_clear()
