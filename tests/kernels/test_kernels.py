"""The ops against torch's own functions, transformers' modules and plain loops; the same tests run on a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lockstep.kernels import jit, ops, reference
from lockstep.runtime.model.kv_pool import KVPool, KVShape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest value: one rounding of the result, and for the norms of the sum before it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return str(request.param)


def close(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1) -> None:
    scale = float(expected.abs().max().clamp(min=1)) * factor if expected.numel() else 1.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=scale * TOLERANCE[actual.dtype])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (0, 8), (3, 4, 16)])
def test_rms_norm(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(*shape, device=device).to(dtype), torch.rand(shape[-1], device=device).to(dtype) + 0.5
    expected = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    close(ops.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_is_that_of_transformers() -> None:
    norm = LlamaRMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(7, 64)
    torch.testing.assert_close(ops.rms_norm(x, norm.weight.detach(), 1e-6), norm(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(device: str, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(9, 48, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(48, device=device).to(dtype) + 0.5
    total = x.double() + residual.double()
    kept = residual.clone()
    close(ops.add_rms_norm(x, kept, weight, 1e-5), F.rms_norm(total, (48,), weight.double(), 1e-5))
    assert torch.equal(kept, total.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["layer-first", "page-first"])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store_is_that_of_transformers(
    device: str, normed: bool, head_dim: int, layout: str, dtype: torch.dtype
) -> None:
    heads, kv_heads, tokens = 6, 2, 5
    positions = torch.tensor([0, 3, 9, 200, 1], device=device)
    slots = torch.tensor([17, 2, -1, 30, 4], device=device, dtype=torch.int32)
    angles = positions[:, None] * (10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim))
    cos_sin = torch.zeros(256, head_dim, device=device)
    cos_sin[positions] = torch.cat((angles.cos(), angles.sin()), dim=-1)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    norms = [torch.rand(head_dim, device=device).to(dtype) + 0.5 if normed else None for _ in range(2)]
    shape = KVShape(num_layers=2, page_size=4, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    pool = KVPool(shape, 9, torch.device(device), layout)  # type: ignore[arg-type]
    found = ops.rotate_and_store_(qkv, *norms, 1e-6, positions.int(), cos_sin, pool.k(1), pool.v(1), slots)

    q, k, _ = qkv.double().unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if norms[0] is not None and norms[1] is not None:
        q = F.rms_norm(q, (head_dim,), norms[0].double(), 1e-6)
        k = F.rms_norm(k, (head_dim,), norms[1].double(), 1e-6)
    cos, sin = (
        torch.cat((angles, angles), -1).cos()[None].double(),
        torch.cat((angles, angles), -1).sin()[None].double(),
    )
    q, k = (
        x[0].transpose(0, 1) for x in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    )
    close(found, q)
    stored_k, stored_v = (x.reshape(-1, kv_heads, head_dim) for x in (pool.k(1), pool.v(1)))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            close(stored_k[slot], k[token])
            assert torch.equal(stored_v[slot], qkv[token].view(-1, head_dim)[-kv_heads:])
    untouched = [n for n in range(36) if n not in slots.tolist()]
    assert not stored_k[untouched].any()
    assert not stored_v[untouched].any()
    assert not pool.k(0).any()
    assert not pool.v(0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 34, device=device).to(dtype)
    close(ops.silu_and_mul(x), F.silu(x[:, :17].double()) * x[:, 17:].double())


@pytest.mark.parametrize("layout", ["layer-first", "page-first"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rows", [0, 1, 29])
def test_store_kv_moves_exactly_these_rows(device: str, layout: str, page_size: int, rows: int) -> None:
    shape = KVShape(num_layers=3, page_size=page_size, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    pool = KVPool(shape, 40, torch.device(device), layout)  # type: ignore[arg-type]
    k, v = (torch.randn(rows, 2, 8, device=device).bfloat16() for _ in range(2))
    slots = torch.randperm(40 * page_size, device=device)[:rows].int()
    slots[::5] = -1
    wanted = {which: torch.zeros(40 * page_size, 2, 8, dtype=torch.bfloat16) for which in "kv"}
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted["k"][slot], wanted["v"][slot] = k[row].cpu(), v[row].cpu()
    ops.store_kv_(k, v, pool.k(1), pool.v(1), slots)
    assert torch.equal(pool.k(1).reshape(-1, 2, 8).cpu(), wanted["k"])
    assert torch.equal(pool.v(1).reshape(-1, 2, 8).cpu(), wanted["v"])
    for untouched in (pool.k(0), pool.v(0), pool.k(2), pool.v(2)):
        assert not untouched.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 5])
def test_store_kv_converts_to_fp8(device: str, width: int, dtype: torch.dtype) -> None:
    k, v = (torch.randn(9, 2, width, device=device).mul(200).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.zeros(3, 4, 2, width, device=device, dtype=torch.float8_e4m3fn) for _ in range(2))
    slots = torch.tensor([3, -1, 11, 0, 5, 4, 9, 7, 1], device=device).int()
    ops.store_kv_(k, v, k_cache, v_cache, slots)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        stored = cache.view(12, 2, width).float()
        kept = slots >= 0
        # 3 bits of mantissa: half a step of rounding is a 16th of the value; below 2^-6 the steps are 2^-9
        wanted = rows[kept].float().clamp(-448, 448)
        assert ((stored[slots[kept].long()] - wanted).abs() <= (wanted.abs() / 16).clamp(min=2**-10)).all()
        assert not stored[[2, 6, 8, 10]].any()


def argmax_of_the_race(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The definition, token by token, in float64 where it can be: the tokens [S]."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    found = []
    for row, t, key in zip(logits.float().tolist(), temperature.tolist(), keys.tolist(), strict=True):
        noise = [((mix((key + 0x9E3779B97F4A7C15 * v) & mask) >> 12) + 0.5) * 2.0**-52 for v in range(len(row))]
        scores = row if t == 0 else [x / t - math.log(-math.log(u)) for x, u in zip(row, noise, strict=True)]
        found.append(scores.index(max(scores)))
    return torch.tensor(found, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 151_936), (5, 131), (300, 1024)])
def test_race_is_its_definition(device: str, rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocab, device=device) * 3).to(dtype)
    temperature = torch.rand(rows, device=device)
    temperature[::3] = 0
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    found = ops.merge_candidates(ops.gumbel_argmax(logits, temperature, keys)[None])
    definition = reference.gumbel_argmax(logits.cpu(), temperature.cpu(), keys.cpu())
    assert torch.equal(found.cpu(), reference.merge_candidates(definition[None]))
    assert torch.equal(found[::3].long(), logits[::3].argmax(-1))
    few = slice(0, 7)
    assert torch.equal(found[few].cpu(), argmax_of_the_race(logits[few], temperature[few], keys[few]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 50, 4096])
def test_a_race_may_be_run_in_parts_or_among_named_tokens(device: str, vocab: int, dtype: torch.dtype) -> None:
    """Parts of the vocabulary, one of them empty, and all of it in another order: the same tokens win."""
    logits = (torch.randn(6, vocab, device=device) * 3).to(dtype)
    inputs = torch.tensor([0, 0.3, 1, 2, 0, 1.5], device=device), torch.arange(6, device=device) - 3
    whole = ops.gumbel_argmax(logits, *inputs)
    cuts = [0, vocab // 3, vocab // 3, vocab]
    parts = [ops.gumbel_argmax(logits[:, a:b], *inputs, first_token=a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(ops.merge_candidates(torch.stack(parts)), ops.merge_candidates(whole[None]))
    order = torch.stack([torch.randperm(vocab) for _ in range(6)]).to(device)
    named = ops.gumbel_argmax(logits.gather(1, order), *inputs, tokens=order.int())
    assert torch.equal(named, whole)


def test_race_takes_the_lower_id_of_equals_and_never_an_excluded_one(device: str) -> None:
    logits = torch.full((4, 100), -torch.inf, device=device)
    logits[:, [60, 30]] = 1.0
    keys = torch.arange(4, device=device)
    draw = lambda logits, temperature: ops.merge_candidates(ops.gumbel_argmax(logits, temperature, keys)[None])  # noqa: E731
    assert (draw(logits, torch.zeros(4, device=device)) == 30).all()
    assert set(draw(logits, torch.ones(4, device=device)).tolist()) <= {30, 60}
    logits[:, 30], logits[:, 60] = -0.0, 0.0
    assert (draw(logits, torch.zeros(4, device=device)) == 30).all(), "zeros are equal"


def unpacked(contenders: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and tokens: the bits of a float in the upper half, those below the sign turned round where it is set."""
    upper, lower = contenders >> 32, contenders & 0xFFFFFFFF
    return torch.where(upper < 0, upper ^ 0x7FFFFFFF, upper).int().view(torch.float32), 0xFFFFFFFF - lower


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (5, 0), (5, 5), (5, 64), (5, 3000), (3, 4097), (2, 151_936)])
@pytest.mark.parametrize("count", [1, 40, 64, 128])
def test_best_is_a_stable_sort(device: str, rows: int, vocab: int, count: int, dtype: torch.dtype) -> None:
    """Also where the greatest lie together, so that one thread sees them all, and where all are equal."""
    logits = ((torch.randn(rows, vocab, device=device) * 8).round() / 4).to(dtype)
    logits[1:2], logits[2:3] = torch.linspace(-9, 9, vocab, device=device), 1.0
    logits[3:4] = torch.linspace(9, -9, vocab, device=device)
    logits[4:5, : vocab // 2] = -torch.inf
    found = ops.topk_candidates(logits, count, first_token=11)
    scores, tokens = unpacked(found)
    there = min(vocab, count)
    wanted, order = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores[:, :there], wanted[:, :there])
    assert torch.equal(tokens[:, :there].long(), order[:, :there] + 11)
    assert (found[:, there:] == torch.iinfo(torch.int64).min).all()
    if count == 64:  # of parts, it is that of the whole
        cut = vocab // 3
        parts = [
            ops.topk_candidates(logits[:, :cut], count, first_token=11),
            ops.topk_candidates(logits[:, cut:], count, first_token=11 + cut),
        ]
        assert torch.equal(ops.topk_candidates(torch.cat(parts, 1), count), found)


@dataclass
class Bounds:
    """Random bounds of so many rows, some of which have none."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def random(cls, rows: int, device: str) -> Bounds:
        top_p, min_p = torch.rand(rows, device=device), torch.rand(rows, device=device) / 5
        top_p[::3], min_p[::2] = 1.0, 0.0
        keys = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
        return cls(
            torch.rand(rows, device=device) + 0.3, torch.randint(0, 40, (rows,), device=device), top_p, min_p, keys
        )

    def token(self, row: int, logits: torch.Tensor, *, with_k: bool) -> int | None:
        """The definition, in float64: who wins the race among those of a row that are left; None if too close."""
        top_k = int(self.top_k[row]) if with_k else 0
        top_p, min_p = self.top_p[row].item(), self.min_p[row].item()
        scores, tokens = (logits.float() / self.temperature[row].cpu()).sort(descending=True, stable=True)
        likelihood = scores.double().softmax(0)
        left = likelihood >= min_p * likelihood[0]
        left[top_k or len(left) :] = False
        of_left = likelihood * left / (likelihood * left).sum()
        before = of_left.cumsum(0) - of_left
        if top_p < 1 and ((before - top_p).abs() < 1e-5).any():
            return None
        if ((likelihood - min_p * likelihood[0]).abs() < 1e-7).any() and min_p > 0:
            return None
        left &= (before < top_p) | (top_p == 1)
        left[0] = True
        kept = torch.where(left, scores, -torch.inf)[None]
        race = reference.gumbel_argmax(kept, torch.ones(1), self.keys[row : row + 1].cpu(), tokens=tokens[None].int())
        return int(reference.merge_candidates(race[None]))


@pytest.mark.parametrize(("rows", "count"), [(0, 64), (1, 1), (300, 64), (60, 33), (60, 128)])
def test_draw_is_a_race_among_what_is_left(device: str, rows: int, count: int) -> None:
    torch.manual_seed(rows)
    logits, bounds = (torch.randn(rows, 1000, device=device) * 2).bfloat16(), Bounds.random(rows, device)
    found = ops.sample_topk(ops.topk_candidates(logits, count), *vars(bounds).values())
    best = logits.cpu().float().sort(descending=True, stable=True)
    for row, token in enumerate(found.tolist()):
        those = torch.full((1000,), -torch.inf)
        those[best.indices[row, :count]] = best.values[row, :count]
        wanted = bounds.token(row, those, with_k=True)
        assert wanted is None or token == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "spread"), [(0, 9, 1), (3, 1, 1), (200, 1003, 2), (200, 4096, 0.1), (7, 151_936, 3)]
)
def test_nucleus_is_a_race_among_what_is_left(
    device: str, rows: int, vocab: int, spread: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab, device=device) * spread).to(dtype)
    logits[1:2], logits[2:3, ::2] = 0.5, -torch.inf
    bounds = Bounds.random(rows, device)
    bounds.top_p[::7] = 1e-6
    found = ops.sample_top_p(logits, bounds.temperature, bounds.top_p, bounds.min_p, bounds.keys).tolist()
    told = [bounds.token(row, logits[row].cpu(), with_k=False) for row in range(rows)]
    assert found == [token if wanted is None else wanted for token, wanted in zip(found, told, strict=True)]
    assert sum(wanted is not None for wanted in told) >= rows // 2


SHAPES = [
    (0, 16, 64),
    (1, 48, 64),
    (3, 40, 72),
    (8, 24, 1024),
    (1, 1032, 4096),
    (8, 328, 14336),
    (5, 64, 2048),
    (65, 40, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "size"), SHAPES)
def test_linear_with_all_that_goes_with_it(
    device: str, rows: int, features: int, size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = (torch.randn(2 * features, size, device=device) / size**0.5).to(dtype)
    bias, norm = (torch.rand(n, device=device).to(dtype) for n in (2 * features, size))
    before = torch.randn(rows, features, device=device).to(dtype)
    normed = F.rms_norm(x.double(), (size,), norm.double(), 1e-5)

    plain = x.double() @ weight[:features].double().T
    close(ops.linear(x, weight[:features]), plain)
    close(ops.linear(x, weight[:features], bias[:features]), plain + bias[:features].double())
    total = before.clone()
    assert ops.linear(x, weight[:features], add_to=total) is total
    close(total, before.double() + plain)
    close(
        ops.linear(x, weight[:features], bias[:features], add_to=before.clone()),
        before.double() + plain + bias[:features].double(),
    )
    close(ops.linear(x, weight[:features], norm=norm, eps=1e-5), normed @ weight[:features].double().T)
    gate, up = (normed @ weight.double().T + bias.double()).chunk(2, dim=-1)
    close(ops.linear(x, weight, bias, norm=norm, eps=1e-5, gated=True), F.silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_a_row_of_linear_has_the_same_bits_in_any_small_batch(gated: bool) -> None:
    x, weight = (torch.randn(n, 3072, device="cuda").bfloat16() for n in (8, 2048))
    norm = torch.rand(3072, device="cuda").bfloat16()
    together = ops.linear(x, weight, norm=norm, eps=1e-5, gated=gated)
    for rows in (slice(0, 1), slice(2, 3), slice(5, 8)):
        assert torch.equal(ops.linear(x[rows].contiguous(), weight, norm=norm, eps=1e-5, gated=gated), together[rows])


def invariant_products(
    linear: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm: torch.Tensor,
    before: torch.Tensor,
) -> list[torch.Tensor]:
    """Of x [T, D]: two with half of the weight [2 F, D], one of them added to `before` [T, F], and two gated."""
    features, normed = before.shape[1], {"norm": norm, "eps": 1e-5, "batch_invariant": True}
    return [
        linear(x, weight[:features], bias[:features], batch_invariant=True),
        linear(x, weight[:features], add_to=before.clone(), batch_invariant=True),
        linear(x, weight, gated=True, **normed),
        linear(x, weight, bias, gated=True, **normed),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("features", "size"), [(131, 256), (2048, 1032), (72, 8)])
def test_an_invariant_row_of_linear_has_the_same_bits_in_any_batch(
    features: int, size: int, dtype: torch.dtype
) -> None:
    x = torch.randn(700, size, device="cuda").to(dtype)
    weight = (torch.randn(2 * features, size, device="cuda") / size**0.5).to(dtype)
    bias, norm = (torch.rand(n, device="cuda").to(dtype) for n in (2 * features, size))
    before = torch.randn(700, features, device="cuda").to(dtype)
    normed = F.rms_norm(x.double(), (size,), norm.double(), 1e-5)

    def found(rows: slice) -> list[torch.Tensor]:
        return invariant_products(ops.linear, x[rows], weight, bias, norm, before[rows])

    together = found(slice(None))
    plain, both = x.double() @ weight[:features].double().T, normed @ weight.double().T
    gate, up = (both + bias.double()).chunk(2, dim=-1)
    close(together[0], plain + bias[:features].double())
    close(together[1], plain + before.double())
    close(together[2], F.silu(both[:, :features]) * both[:, features:])
    close(together[3], F.silu(gate) * up)
    for rows in (slice(0, 1), slice(5, 21), slice(6, 70), slice(100, 357), slice(699, 700), slice(0, 0)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(found(rows), together, strict=True))


@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (16, 2), (10, 2)])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("size", [64, 128])
def test_decode_attention(
    device: str, size: int, page_size: int, heads: int, kv_heads: int, window: int | None
) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    positions = torch.tensor([0, 1, 17, 64, 999, 300, 3000][: 5 if device == "cpu" else 7], dtype=torch.int32)
    rows, num_pages = len(positions), 3000 // page_size + 1
    pages = torch.randperm(rows * num_pages).int().view(rows, num_pages)
    owners = torch.randperm(rows).int()
    slots = pages[owners.long(), positions.long() // page_size] * page_size + positions % page_size
    slots[1] = -1  # padding of a graph stores nothing
    k_cache, v_cache = (torch.randn(rows * num_pages, page_size, kv_heads, size).to(dtype) for _ in range(2))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size).to(dtype)
    q_norm, k_norm = (torch.rand(size).to(dtype) + 0.5 for _ in range(2))
    cos_sin = torch.randn(3001, size)
    inputs = [t.to(device) for t in (qkv, q_norm, k_norm, positions, cos_sin, k_cache, v_cache, slots, pages, owners)]
    qkv, q_norm, k_norm, positions, cos_sin, k_cache, v_cache, slots, pages, owners = inputs
    k_wanted, v_wanted = k_cache.clone(), v_cache.clone()
    rotation = q_norm, k_norm, 1e-6, positions, cos_sin
    splits = ops.split_keys(positions, kv_heads, window)
    for _ in range(2):  # what one layer leaves behind must not disturb the next
        where = k_cache, v_cache, slots, pages, owners, splits
        found = ops.decode_attention(qkv, *rotation, *where, 0.1, window).unflatten(1, (heads, size))
    q = ops.rotate_and_store_(qkv, *rotation, k_wanted, v_wanted, slots)
    assert torch.equal(k_cache, k_wanted)
    assert torch.equal(v_cache, v_wanted)
    own = [qkv.unflatten(1, (-1, size))[:, -kv_heads:], None]
    everywhere = torch.arange(rows, device=device, dtype=torch.int32)
    scratch = torch.zeros(rows, 1, kv_heads, size, device=device, dtype=dtype)
    ops.rotate_and_store_(qkv, *rotation, scratch, torch.zeros_like(scratch), everywhere)  # keys of the new tokens
    for row, position in enumerate(positions.tolist()):
        if row == 1:
            continue
        seen = range(0 if window is None else max(0, position - window + 1), position)
        page = pages[owners[row].long()].tolist()
        where = [(page[j // page_size], j % page_size) for j in seen]
        keys = torch.stack([*(k_cache[p, o] for p, o in where), scratch[row, 0]]).double()
        values = torch.stack([*(v_cache[p, o] for p, o in where), own[0][row]]).double()
        keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (keys, values))  # [K, H, E]
        weights = torch.softmax(torch.einsum("he,khe->hk", q[row].double(), keys) * 0.1, dim=-1)
        close(found[row], torch.einsum("hk,khe->he", weights, values), 10 if device == "cpu" else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (5, 1), (16, 2)])
@pytest.mark.parametrize("rows", [20, 67, 256])
def test_decode_attention_of_many_rows(rows: int, heads: int, kv_heads: int, window: int | None) -> None:
    """Parts begin and end anywhere in a row, and a row has several; on a GPU its definition is a loop over the rows."""
    positions = torch.randint(0, 900, (rows,), dtype=torch.int32, device="cuda")
    positions[::5] = 0
    positions[3] = 9000
    pages = torch.randperm(rows * 563, device="cuda").int().view(rows, 563)
    owners = torch.randperm(rows, device="cuda").int()
    slots = pages[owners.long(), positions.long() // 16] * 16 + positions % 16
    k_cache, v_cache = torch.randn(2, rows * 563, 16, kv_heads, 64, device="cuda").bfloat16()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * 64, device="cuda").bfloat16()
    inputs = qkv, None, None, 0.0, positions, torch.randn(9001, 64, device="cuda"), k_cache, v_cache
    splits = ops.split_keys(positions, kv_heads, window)
    found = [ops.decode_attention(*inputs, slots, pages, owners, splits, 0.1, window) for _ in range(3)]
    assert all(torch.equal(found[0], again) for again in found)
    close(found[0], reference.decode_attention(*inputs, slots, pages, owners, splits, 0.1, window).double(), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (32, 8), (5, 1)])
def test_with_parts_of_one_size_a_row_has_the_same_bits_in_any_batch(
    heads: int, kv_heads: int, window: int | None
) -> None:
    rows, size, part = 40, 128, 192
    positions = torch.randint(0, part * 8, (rows,), dtype=torch.int32, device="cuda")
    positions[:5] = torch.tensor([0, part * 8, part, part - 1, 1])
    pages = torch.randperm(rows * 100, device="cuda").int().view(rows, 100)
    owners = torch.randperm(rows, device="cuda").int()
    slots = pages[owners.long(), positions.long() // 16] * 16 + positions % 16
    k_cache, v_cache = torch.randn(2, rows * 100, 16, kv_heads, size, device="cuda").bfloat16()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size, device="cuda").bfloat16()
    cos_sin = torch.randn(part * 8 + 1, size, device="cuda")

    def found(rows: slice, part: int | None) -> torch.Tensor:
        splits = ops.split_keys(positions[rows], kv_heads, window, part)
        inputs = qkv[rows], None, None, 0.0, positions[rows], cos_sin, k_cache, v_cache, slots[rows]
        return ops.decode_attention(*inputs, pages, owners[rows], splits, 0.1, window, part)

    together = found(slice(None), part)
    close(together, found(slice(None), None).double(), 2)
    for some in (slice(0, 1), slice(1, 2), slice(3, 20), slice(39, 40)):
        for _ in range(2):  # what one layer leaves behind must not disturb the next
            assert torch.equal(found(some, part), together[some])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", [1, 2, 33, 256, 1500])
def test_split_keys_finds_where_each_part_begins(rows: int, window: int | None) -> None:
    positions = torch.randint(0, 5000, (rows,), device="cuda", dtype=torch.int32)
    positions[::7] = 0
    parts, total, *rest = ops.split_keys(positions, 8, window).tolist()
    starts, first_rows = rest[: rows + 1], rest[rows + 1 :][:parts]
    seen = [min(p, window - 1) if window else p for p in positions.tolist()]
    unit = 128 if rows * 8 <= torch.cuda.get_device_properties(0).multi_processor_count else 64
    units = [max(1, -(-keys // unit)) for keys in seen]
    assert starts == [0, *itertools.accumulate(units)]
    assert total == starts[-1]
    row_of = [row for row in range(rows) for _ in range(units[row])]
    assert first_rows == [row_of[part * total // parts] for part in range(parts)]
    assert 1 <= parts <= total


def test_the_two_ends_of_a_decode_step(device: str) -> None:
    tokens = torch.randint(0, 99, (5, 40), device=device).int()
    pages, kept = torch.zeros(5, 10, device=device).int(), torch.zeros(5, 10).int()
    slots, positions, kv_slots = (torch.tensor(x, device=device).int() for x in ([3, 0, 4], [38, 0, 7], [30, 9, -1]))
    found = ops.begin_decode_(tokens, pages, slots, positions, kv_slots, 4)
    assert found.tolist() == [int(tokens[3, 38]), int(tokens[0, 0]), int(tokens[4, 7])]
    kept[3, 9], kept[0, 0] = 7, 2
    assert torch.equal(pages.cpu(), kept)
    wanted = tokens.clone()
    wanted[3, 39], wanted[0, 1], wanted[4, 8] = 1, 2, 3
    ops.append_tokens_(tokens, slots, positions, torch.tensor([1, 2, 3], device=device).int())
    assert torch.equal(tokens, wanted)


def test_a_wrong_argument_is_named_with_the_rule() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight \[7\] torch.float32 must be \[8\]"):
        ops.rms_norm(x, torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"ids .* int32 or int64"):
        ops.gather_rows(x, torch.zeros(3))
    with pytest.raises(ValueError, match="residual"):
        ops.add_rms_norm(x, torch.zeros(3, 8), torch.zeros(8), 1e-5)
    cache = torch.zeros(4, 2, 1, 8)
    with pytest.raises(ValueError, match="slots"):
        ops.store_kv_(x.view(2, 1, 8), x.view(2, 1, 8), cache, cache.clone(), torch.zeros(3, dtype=torch.int32))


tokens = st.lists(st.integers(0, 3), max_size=80).map(lambda ids: np.array(ids, np.int32))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(tokens, tokens)
def test_common_prefix_length_in_cpp_and_numpy(a: np.ndarray, b: np.ndarray) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert reference.common_prefix_length(a, b) == expected
    assert ops.common_prefix_length(a, b) == expected


def test_radix_cpp_is_what_runs_here() -> None:
    assert jit.radix_compare() is not None


def test_common_prefix_at_every_place_of_a_long_array() -> None:
    a = np.arange(100, dtype=np.int32)
    for i in range(100):
        b = a.copy()
        b[i] = -1
        assert ops.common_prefix_length(a, b) == i
    assert ops.common_prefix_length(a, a.copy()) == 100
    assert ops.common_prefix_length(a, a[:37]) == 37


def test_without_a_compiler_numpy_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jit.radix_compare.cache_clear()
    try:
        assert ops.common_prefix_length(np.array([1, 2], np.int32), np.array([1, 3], np.int32)) == 1
        assert "NumPy" in caplog.text
    finally:
        jit.radix_compare.cache_clear()
