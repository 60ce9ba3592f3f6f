"""Run CUDA kernels once, at sizes that no block or vector divides, under compute-sanitizer.

It has GEMMs of up to 8 rows, batch-invariant ones, fp8_gemm, experts in 16 bits, attention, sampling, norms and tables.
It does not have stream_gemm, stream_fp8, attention that writes FP8, routers, experts in FP8 and MXFP4, the gated delta
rule and collectives.

    compute-sanitizer --tool memcheck --report-api-errors no python scripts/sanitize.py
    compute-sanitizer --tool racecheck python scripts/sanitize.py

API errors are not reported, because cuda-bindings asks the driver for functions that it need not have.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lockstep.kernels import expert_ops, ops
from lockstep.kernels.arguments import FP8Choice, FP8Weight, KVCache, Pages, QKNorm, Rope, num_groups


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def linear_layers() -> None:
    for rows, features, size in ((1, 48, 64), (3, 40, 72), (8, 24, 1024), (2, 1032, 4096)):
        x, weight, norm = random(rows, size), random(2 * features, size), random(size)
        ops.linear(x, weight, norm=norm, eps=1e-6)
        ops.linear(x, weight, norm=norm, eps=1e-6, gated=True)
        ops.linear(x, weight[:features], add_to=random(rows, features))
    ops.linear(random(8, 14336), random(328, 14336), add_to=random(8, 328))  # x does not fit into shared memory
    for rows in (1, 30, 64, 100, 300):  # tiles of wide_gemm
        for features, size in ((48, 128), (136, 656), (10000, 200)):
            x, weight, bias = random(rows, size), random(2 * features, size), random(2 * features)
            ops.linear(x, weight, bias, gated=True, batch_invariant=True)
            ops.linear(x, weight[:features], add_to=random(rows, features), batch_invariant=True)
    for tokens in (1, 7, 64):
        expert_ids, scores = torch.randint(-1, 7, (tokens, 2), device="cuda"), torch.rand(tokens, 2, device="cuda")
        expert_ops.experts(random(tokens, 64), expert_ids, scores, random(6, 80, 64), random(6, 64, 40))


def fp8_layers() -> None:
    for rows in (3, 8, 13, 30, 64, 100):  # all tiles of fp8_gemm
        for features, size in ((48, 128), (136, 656), (1040, 2048), (48, 5120), (48, 17424)):
            x, norm, choice = random(rows, size), random(size), FP8Choice(tiled_rows=1 << 30)
            numbers = random(2 * features, size).to(torch.float8_e4m3fn)
            scales = torch.rand(-(-features // 64), -(-size // 128), device="cuda")
            both = FP8Weight(numbers, scales, 128, 128, choice=choice)
            half = FP8Weight(numbers[:features], scales[: -(-features // 128)], 128, 128, choice=choice)
            ops.linear(x, both, norm=norm, eps=1e-6)
            ops.linear(x, both, norm=norm, eps=1e-6, gated=True)
            ops.linear(x, half, add_to=random(rows, features))


def attention() -> None:
    rows, kv_heads = 70, 2
    positions, table_rows = integers([0, 1, 17, 300, 1999] * 14), torch.randperm(rows, device="cuda").int()
    shapes = (
        (64, 8, 5, None, None), (128, 8, 16, None, None), (128, 24, 16, 50, None), (96, 8, 16, 50, 2.0),
        (256, 8, 16, None, None), (256, 8, 16, 50, 2.0),
    )  # fmt: skip
    cache_dtypes = torch.bfloat16, torch.float8_e4m3fn
    for (size, heads, page_size, window, softcap), cache_dtype in itertools.product(shapes, cache_dtypes):
        table = torch.randperm(rows * 400, device="cuda").int().view(rows, 400)
        cache = KVCache(*(random(rows * 400, page_size, kv_heads, size).to(cache_dtype) for _ in range(2)))
        norm, cos_sin = QKNorm(random(size), random(size), 1e-6), torch.randn(2000, size, device="cuda")
        kv_slots = table[table_rows.long(), positions.long() // page_size] * page_size + positions % page_size
        for first in (0, 65, 67, 69):  # few rows and many take different blocks
            part = slice(first, rows)
            qkv, rope = random(rows - first, (heads + 2 * kv_heads) * size), Rope(positions[part], cos_sin)
            partition = ops.partition_keys(positions[part], table_rows[part], num_groups(heads, kv_heads), window)
            pages = Pages(table, table_rows[part])
            ops.decode_attention(qkv, norm, rope, cache, kv_slots[part], pages, partition, 0.1, softcap)
            ops.rotate_and_store_(qkv, norm, rope, cache, kv_slots[part])


def rows_tokens_and_tables() -> None:
    x, weight = random(5, 40), random(40)
    ops.rms_norm(x, weight, 1e-6)
    ops.add_rms_norm(x, random(5, 40), weight, 1e-6)
    ops.silu_and_mul(x)
    ops.gather_rows(x, integers([0, 4, 9, -1]))
    temperature, keys = torch.tensor([0.0, 1.0, 0.5], device="cuda"), torch.arange(3, device="cuda")
    candidates = ops.gumbel_argmax(torch.randn(3, 1001, device="cuda"), temperature, keys, first_token=7)
    ops.merge_candidates(torch.stack([candidates, ops.gumbel_argmax(random(3, 4000), temperature, keys)]))
    names = torch.arange(192, dtype=torch.int32, device="cuda").view(3, 64)
    ops.gumbel_argmax(torch.randn(3, 64, device="cuda"), temperature, keys, tokens=names)
    warm, top_k, top_p = torch.full_like(temperature, 0.7), keys * 9, torch.full_like(temperature, 0.8)
    min_p = torch.full_like(temperature, 0.01)
    for logits in (random(3, 9001), random(3, 9008), torch.randn(3, 50, device="cuda")):
        for count in (1, 64, 128):
            ops.sample_topk(ops.topk_candidates(logits, count), warm, top_k, top_p, min_p, keys)
        ops.sample_top_p(logits, warm, top_p, min_p, keys)
    table = torch.zeros(4, 9, dtype=torch.int32, device="cuda")
    ops.begin_decode_(table, table.clone(), integers([1, 3]), integers([8, 0]), integers([30, -1]), 4)
    ops.append_tokens_(table, integers([1, 3]), integers([7, 0]), integers([5, 6]))


if __name__ == "__main__":
    linear_layers()
    fp8_layers()
    attention()
    rows_tokens_and_tables()
    torch.cuda.synchronize()
    print("all kernels of this script ran")
