"""The text of our kernels, and what launches them, against the definitions: on a CPU, without a GPU (emulator.py).

Threads go on in random order between barriers, so a barrier that is missing shows. How the GPU's instructions round,
what its caches hold and how fast it is does not: such comparisons run there in test_kernels.py and test_experts.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import Bounds, close, invariant_products

from lockstep.kernels import reference

import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def both(op: str, *given: Any, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """What the emulated kernel and the definition return, and what each has made of the tensors given."""
    found = []
    for module in (emulator.emulated(), reference):
        own = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        result = getattr(module, op)(*own, **kept)
        tensors = [t for t in (result, *own, *kept.values()) if isinstance(t, torch.Tensor)]
        found.append(tuple(t.bfloat16() if t.dtype == FP8 else t for t in tensors))
    return found


def check(op: str, *given: Any, factor: float = 1, **options: Any) -> None:
    for found, wanted in zip(*both(op, *given, **options), strict=True):
        if found.is_floating_point():
            close(found, wanted.double(), factor)
        else:
            assert torch.equal(found, wanted)


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize(
    ("rows", "features", "size", "dtype"),
    [(1, 16, 64, F16), (3, 40, 72, BF16), (8, 24, 1024, BF16), (5, 72, 2056, F16), (8, 24, 7168, BF16)],
)
def test_linear(rows: int, features: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, size, dtype=dtype), (random(2 * features, size) / size**0.5).to(dtype)
    bias, norm, before = (
        random(2 * features, dtype=dtype),
        random(size, dtype=dtype),
        random(rows, features, dtype=dtype),
    )
    check("linear", x, weight[:features], bias[:features], add_to=before)
    check("linear", x, weight, bias, norm=norm, eps=1e-5, gated=True, factor=4)


DECODED = [(1, 2, 1, 64), (5, 8, 2, 64), (5, 6, 1, 128), (12, 3, 3, 64)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("rows", "heads", "kv_heads", "size"), DECODED)
def test_decode_attention(rows: int, heads: int, kv_heads: int, size: int, window: int | None) -> None:
    positions = torch.tensor([700, 0, 1, 17, 64, 300, 199, 5, 5, 31, 32, 33], dtype=torch.int32)[:rows]
    pages = torch.randperm(rows * 145, dtype=torch.int32).view(rows, 145)
    owners = torch.randperm(rows, dtype=torch.int32)
    slots = pages[owners.long(), positions.long() // 5] * 5 + positions % 5
    slots[2:3] = -1
    qkv, q_norm, k_norm = random(rows, (heads + 2 * kv_heads) * size), random(size) + 2, random(size) + 2
    k_cache, v_cache = random(rows * 145, 5, kv_heads, size), random(rows * 145, 5, kv_heads, size)
    module = emulator.emulated()
    splits = module.split_keys(positions, kv_heads, window)
    rotation = q_norm, k_norm, 1e-6, positions, torch.randn(701, size)
    where = k_cache, v_cache, slots, pages, owners, splits, 0.1, window
    # The counters in `splits` are as they were, for the next layer; the definition leaves them alone.
    check("decode_attention", qkv, *rotation, *where, factor=4)


@pytest.mark.parametrize(("dtype", "cached"), [(BF16, BF16), (F16, FP8), (F32, F32)])
@pytest.mark.parametrize("size", [16, 128])
def test_rotate_and_store(size: int, dtype: torch.dtype, cached: torch.dtype) -> None:
    slots = torch.tensor([7, -1, 2], dtype=torch.int32)
    caches = [torch.zeros(3, 4, 2, size).to(cached) for _ in range(2)]
    positions, table = torch.tensor([3, 0, 99], dtype=torch.int32), torch.randn(100, size)
    norms = random(size, dtype=dtype), random(size, dtype=dtype)
    check(
        "rotate_and_store_", random(3, 7 * size, dtype=dtype), *norms, 1e-6, positions, table, *caches, slots, factor=4
    )


@pytest.mark.parametrize(("shape", "dtype"), [((5, 64), BF16), ((2, 3000), F16), ((3, 77), F32)])
def test_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = (random(*s, dtype=dtype) for s in (shape, shape, shape[1:]))
    check("rms_norm", x, weight, 1e-5)
    check("add_rms_norm", x, residual, weight, 1e-5)
    check("silu_and_mul", random(shape[0], 2 * shape[1], dtype=dtype))
    check("gather_rows", random(9, shape[1], dtype=dtype), torch.tensor([3, 11, 4, 12]), first_row=3)


@pytest.mark.parametrize("cached", [BF16, FP8])
def test_tables(cached: torch.dtype) -> None:
    slots = torch.tensor([7, -1, 2, 0], dtype=torch.int32)
    caches = [torch.zeros(3, 4, 2, 24).to(cached) for _ in range(2)]
    check("store_kv_", random(4, 2, 24) * 200, random(4, 2, 24), *caches, slots)
    tokens, pages = torch.arange(60, dtype=torch.int32).view(6, 10), torch.zeros(6, 3, dtype=torch.int32)
    owners, positions = torch.tensor([5, 0, 2, 3], dtype=torch.int32), torch.tensor([8, 0, 4, 3], dtype=torch.int32)
    check("begin_decode_", tokens, pages, owners, positions, slots, 4)
    check("append_tokens_", tokens, owners, positions, slots)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("pairs", [4, 60])
def test_experts(pairs: int, dtype: torch.dtype) -> None:
    x, chosen = random(pairs // 2, 72, dtype=dtype), torch.randint(-1, 4, (pairs // 2, 2))
    weights = (random(3, 80, 72) / 8).to(dtype), (random(3, 72, 40) / 8).to(dtype)
    check("experts", x, chosen, torch.rand(pairs // 2, 2), *weights, factor=4)


@pytest.mark.parametrize(("rows", "vocab", "dtype"), [(1, 5, BF16), (6, 1000, F32), (3, 4100, F16), (2, 9000, BF16)])
def test_draws(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, bounds = (torch.randn(rows, vocab) * 3).to(dtype), Bounds.random(rows, "cpu")
    temperature = torch.where(torch.arange(rows) % 3 == 2, 0.0, bounds.temperature)
    (found, *_), (wanted, *_) = both("gumbel_argmax", logits, temperature, bounds.keys, first_token=7)
    assert torch.equal(emulator.emulated().merge_candidates(found[None]), reference.merge_candidates(wanted[None]))
    for count in (1, 64, 128):
        check("topk_candidates", logits, count, first_token=7)
    few = reference.topk_candidates(logits, min(64, vocab))
    check("sample_topk", few, *vars(bounds).values())
    check("sample_top_p", logits, bounds.temperature, bounds.top_p, bounds.min_p, bounds.keys)


# A source, a mistake in it, and who must find it: a barrier too few, a wait too few, and one that waits too little.
FAULTS: dict[str, tuple[str, str, Callable[[], None]]] = {
    "product.cu": ("__syncthreads();\n        for (int i", "for (int i", lambda: test_linear(8, 24, 1024, BF16)),
    "decode.cu": (
        'asm volatile("cp.async.wait_all;" ::: "memory");',
        "",
        lambda: test_decode_attention(*DECODED[1], None),
    ),
    "experts.cu": ("wait_copies<STAGES - 2>();", "wait_copies<STAGES - 1>();", lambda: test_experts(60, BF16)),
}


@pytest.mark.parametrize("source", FAULTS)
def test_a_fault_shows(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, case = FAULTS[source]
    text = emulator.emulated().source_text(source)
    assert text.count(right) == 1
    monkeypatch.setattr(emulator.emulated(), "source_text", lambda name: text.replace(right, wrong))
    with pytest.raises(AssertionError, match="not close"):
        case()


@pytest.mark.parametrize(("features", "size", "dtype"), [(67, 136, BF16), (72, 8, F16)])
def test_an_invariant_row_of_linear_has_the_same_bits_in_any_batch(
    features: int, size: int, dtype: torch.dtype
) -> None:
    x, weight = random(300, size, dtype=dtype), (random(2 * features, size) / size**0.5).to(dtype)
    bias, norm, before = (
        random(2 * features, dtype=dtype),
        random(size, dtype=dtype),
        random(300, features, dtype=dtype),
    )

    def found(rows: slice) -> list[torch.Tensor]:
        return invariant_products(emulator.emulated().linear, x[rows], weight, bias, norm, before[rows])

    together = found(slice(None))
    for rows in (slice(0, 1), slice(5, 21), slice(6, 70), slice(299, 300), slice(0, 0)):
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(found(rows), together, strict=True))
    wanted = reference.linear(x, weight, bias, norm=norm, eps=1e-5, gated=True)
    close(together[3], wanted.double(), 4)


@pytest.mark.parametrize("window", [None, 150])
def test_with_parts_of_one_size_a_row_has_the_same_bits_in_any_batch(window: int | None) -> None:
    rows, heads, kv_heads, size, part = 7, 4, 2, 64, 48
    positions = torch.tensor([0, part * 8, part, part - 1, 1, 200, 333], dtype=torch.int32)
    pages = torch.randperm(rows * 26, dtype=torch.int32).view(rows, 26)
    owners = torch.randperm(rows, dtype=torch.int32)
    slots = pages[owners.long(), positions.long() // 16] * 16 + positions % 16
    k_cache, v_cache = random(rows * 26, 16, kv_heads, size), random(rows * 26, 16, kv_heads, size)
    qkv, cos_sin, module = random(rows, (heads + 2 * kv_heads) * size), torch.randn(500, size), emulator.emulated()

    def found(rows: slice, module: Any, part: int | None) -> torch.Tensor:
        splits = module.split_keys(positions[rows], kv_heads, window, part)
        inputs = qkv[rows], None, None, 0.0, positions[rows], cos_sin, k_cache, v_cache, slots[rows]
        return module.decode_attention(*inputs, pages, owners[rows], splits, 0.1, window, part)

    together = found(slice(None), module, part)
    close(together, found(slice(None), reference, None).double(), 4)
    for some in (slice(0, 1), slice(1, 2), slice(3, 6), slice(6, 7)):
        assert torch.equal(found(some, module, part), together[some])
