"""The CUDA kernels behind `ops.py`: compiled by NVRTC through CuPy on first use, launched on torch's current stream.

With peers.py the only module that imports CuPy. Arguments have been checked by `ops.py`; here shapes become grids.
Sources include common.cuh; they are joined into one text before compilation, because CuPy's cache does not look into
included files.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np
import torch
import torch.nn.functional as F
from cuda.bindings import driver
from torch import Tensor

from . import reference
from .jit import SOURCES, CompileError

C_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int32: "int",
    torch.int64: "long long",
    torch.float8_e4m3fn: "fp8",
}
C_TYPES = {
    Tensor: ctypes.c_void_p,
    np.int64: ctypes.c_int64,
    np.int32: ctypes.c_int32,
    np.float32: ctypes.c_float,
}
THREADS = 256  # at most, for all kernels: their __launch_bounds__
VECTOR_BYTES = 16
DEFAULT_SHARED_BYTES = 48 * 1024  # a block gets more only when its kernel asks
RACE_BLOCKS = 1024  # enough to fill any GPU
FEW, HELD = 128, 32  # as in sample.cu
PRODUCT_ROWS = 8  # of x, at most, for the product that streams the weight
STAGED_BYTES = 100 * 1024  # of x in shared memory, at most: two blocks share 227 KiB
LOG2_E = 1.4426950408889634
NUCLEUS_THREADS = 1024  # of the one block that has a row
GROUP_THREADS = 1024  # of the one block that groups pairs by expert
Product = Callable[[Tensor, Tensor, Tensor], None]  # of experts: writes out from x and weights, with SiLU if gated
# The tiles of a grouped product by their rows: warps down and across, 16 x 16 tiles down and across a warp, stages.
EXPERT_TILES = {16: (1, 4, 1, 1, 6), 64: (1, 4, 4, 2, 3), 128: (2, 4, 4, 2, 3)}


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    rows, size = weight.shape
    out = weight.new_empty(len(ids), size)
    if out.numel():
        v = _vector(size, weight, out)
        kernel = _kernel("index.cu", f"gather_rows<Vec<{_c(weight)}, {v}>, {_c(ids)}>")
        chunks = size // v
        threads = _threads(chunks)
        parts = min(-(-chunks // threads), 4 if len(ids) < 256 else 1)
        kernel((len(ids), parts), threads, out, weight, ids, np.int64(first_row), np.int64(rows), np.int32(chunks))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), residual, weight, eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    if batch_invariant:
        return _add_in_one_order(x, weight, bias, norm, eps, gated, add_to, out)
    streams = _can_stream(x, weight)
    if norm is not None and not (streams and _can_take_in(x, norm)):
        x, norm = rms_norm(x, norm, eps), None
    if streams:
        return _stream_weight(x, weight, bias, norm, eps, gated, add_to, out)
    if add_to is not None:
        add_to.addmm_(x, weight.t())
        return add_to if bias is None else add_to.add_(bias)
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    product = F.linear(x, weight, bias)
    return silu_and_mul(product) if gated else product


def _add_in_one_order(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The product as of one expert, whose tiles all add alike; what cannot be within it comes after it."""
    x = x.contiguous() if norm is None else rms_norm(x, norm, eps)
    if gated and bias is not None:
        return silu_and_mul(_add_in_one_order(x, weight, bias, None, eps, False, None, None))
    if out is None:
        out = x.new_empty(len(x), len(weight) // 2 if gated else len(weight))
    if out.numel():
        _dense_product(out, x, weight[None])
    if bias is not None:
        out += bias
    return out if add_to is None else add_to.add_(out)


def _can_stream(x: Tensor, weight: Tensor) -> bool:
    whole = x.shape[1] % 8 == 0 and x.is_contiguous() and weight.is_contiguous()
    aligned = x.data_ptr() % VECTOR_BYTES == 0 and weight.data_ptr() % VECTOR_BYTES == 0
    return 0 < len(x) <= PRODUCT_ROWS and x.dtype in (torch.bfloat16, torch.float16) and whole and aligned


def _can_take_in(x: Tensor, norm: Tensor) -> bool:
    """Whether the product can apply the norm. In float16 a row times the norm's weight may be too large, unscaled."""
    return x.dtype == torch.bfloat16 and _fits(x) and norm.data_ptr() % VECTOR_BYTES == 0


def _fits(x: Tensor) -> bool:
    """Whether x has room in the shared memory of a block that is not alone."""
    return _staged_bytes(x) <= STAGED_BYTES


def _staged_bytes(x: Tensor) -> int:
    """What x takes in shared memory; see `stride` in product.cu."""
    return len(x) * (-(-x.shape[1] // 64) * 64 + 32) * x.element_size()


def _stream_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    rows, size = x.shape
    features = len(weight) // 2 if gated else len(weight)
    if out is None:
        out = x.new_empty(rows, features) if add_to is None else add_to
    finish = 2 if gated else 0 if add_to is None else 1
    tiles, multiprocessors = -(-features // (8 if gated else 16)), _multiprocessors(x.device.index)
    # Few tiles: all warps of a multiprocessor share one. Short rows leave a warp few chunks to have on their way; so do
    # registers where x needs some, too.
    staged = _fits(x)
    warps = 16 if tiles <= multiprocessors or not staged else 8
    depth = 2 if not staged else max(2, min(4, -(-size // (64 * warps))))
    shared_bytes = _staged_bytes(x) if staged else 0
    name = f"product<{_c(x)}, {warps}, {depth}, {str(staged).lower()}, {finish}>"
    kernel = _kernel("product.cu", name, shared_bytes=shared_bytes, early=True)
    optional = (np.int64(0) if t is None else t for t in (norm, bias))
    sizes = np.float32(eps), np.int32(rows), np.int32(features), np.int32(size)
    kernel((min(tiles, multiprocessors * (16 // warps)), 1), 32 * warps, out, x, weight, *optional, *sizes)
    return out


def rotate_and_store_(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    tokens, (pages, page_size, kv_heads, head_dim) = len(qkv), k_cache.shape
    heads = qkv.shape[1] // head_dim
    q = qkv.new_empty(tokens, heads - 2 * kv_heads, head_dim)
    if tokens == 0:
        return q
    pairs = next((n for n in (1, 2, 4, 8) if 64 * n >= head_dim), None)
    if pairs is None:
        raise ValueError(f"heads of {head_dim} elements are too long to rotate; at most 512")
    moved = [qkv, q, k_cache, v_cache]
    strides = [head_dim // 2, k_cache.stride(0), k_cache.stride(1)]
    v = next(
        v
        for v in (4, 2, 1)  # neighbours that a lane takes; as decode.cu does, so that bits are the same
        if pairs % v == 0
        and all(s % v == 0 for s in strides)
        and all(t.data_ptr() % (v * t.element_size()) == 0 for t in moved)
    )
    kernel = _kernel("attention.cu", f"rotate_and_store<{_c(qkv)}, {_c(k_cache)}, {pairs}, {v}>", early=True)
    norms = (np.int64(0) if norm is None else norm for norm in (q_norm, k_norm))
    tables = positions.int(), cos_sin, np.int32(len(cos_sin))
    caches = k_cache, v_cache, np.int64(k_cache.stride(0)), np.int64(k_cache.stride(1))
    where = slots.int(), np.int32(page_size), np.int32(pages * page_size)
    shape = np.int32(heads), np.int32(kv_heads), np.int32(head_dim)
    kernel((tokens, 1), 128, q, qkv, *norms, np.float32(eps), *tables, *caches, *where, *shape)
    return q


def split_keys(positions: Tensor, kv_heads: int, window: int | None, part: int | None = None) -> Tensor:
    rows, cut = len(positions), _cut(len(positions), kv_heads, positions.device.index, part)
    # What split_keys in decode.cu describes, and a counter for each row and key head.
    splits = positions.new_zeros(2 + rows + 1 + cut.most + rows * kv_heads)
    if rows:
        sizes = rows, window or 0, cut.unit, cut.least, cut.most
        _kernel("decode.cu", "split_keys")((1, 1), 1024, splits, positions, *map(np.int32, sizes))
    return splits


@dataclass(frozen=True)
class Cut:
    """How the keys of a step are cut into parts, a block for each part and key head."""

    warps: int  # of a block
    unit: int  # keys that are not divided
    most: int  # parts
    least: int  # units of a part, unless that is all of one row


def _cut(rows: int, kv_heads: int, device: int, part: int | None) -> Cut:
    if part is not None:
        return Cut(4, part, reference.PARTS * rows, 1)
    multiprocessors = _multiprocessors(device)
    if rows * kv_heads > multiprocessors:
        return Cut(4, 64, 3 * multiprocessors // kv_heads, 4)  # a unit is what a block takes at once
    most = multiprocessors // kv_heads  # few blocks of more warps: there is less to hide a block's latency
    rest = most % rows
    return Cut(8, 128, most - (rest if 16 * rest <= most else 0), 4)  # rows of one length are best cut at their ends


def decode_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    pages: Tensor,
    owners: Tensor,
    splits: Tensor,
    scale: float,
    window: int | None,
    part: int | None = None,
) -> Tensor:
    rows, (num_pages, page_size, kv_heads, head_dim) = len(qkv), k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    out = qkv.new_empty(rows, heads * head_dim)
    if rows == 0:
        return out
    cut = _cut(rows, kv_heads, qkv.device.index, part)
    partial = torch.empty(2 * cut.most * heads * (head_dim + 2), dtype=torch.float32, device=qkv.device)
    counters = splits[2 + rows + 1 + cut.most :]
    # With fixed parts keys may come from the kernel before: a prefill stores all of its own, then attends to them.
    kernel = _kernel("decode.cu", f"decode_attention<{_c(qkv)}, {head_dim}, {cut.warps}>", early=part is None)
    norms = (np.int64(0) if norm is None else norm for norm in (q_norm, k_norm))
    tables = positions, cos_sin, np.int32(len(cos_sin))
    strides = np.int64(k_cache.stride(0)), np.int64(k_cache.stride(1))
    where = slots, np.int32(num_pages * page_size), pages, np.int64(pages.stride(0)), owners, np.int32(page_size)
    work = splits, np.int32(rows), np.int32(window or 0), np.int32(cut.unit), partial, counters
    shape = np.float32(scale * LOG2_E), np.int32(heads), np.int32(kv_heads)
    kernel(
        (cut.most * kv_heads, 1),
        32 * cut.warps,
        out,
        qkv,
        *norms,
        np.float32(eps),
        *tables,
        k_cache,
        v_cache,
        *strides,
        *where,
        *work,
        *shape,
    )
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], size)
    if out.numel():
        v = _vector(size, x, out)
        rows, threads = out.numel() // size, _threads(size // v)
        parts = min(-(-size // (v * threads)), 32 if rows < 256 else 4)
        kernel = _kernel("elementwise.cu", f"silu_and_mul<{_c(x)}, {v}>", early=True)
        kernel((rows, parts), threads, out, x, np.int32(size))
    return out


def store_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    tokens, width = len(k), k.shape[1] * k.shape[2]
    if tokens == 0:
        return
    pages, page_size = k_cache.shape[:2]
    strides = [k.stride(0), v.stride(0), k_cache.stride(0), k_cache.stride(1)]
    vector = _vector(width, k, v, k_cache, v_cache, strides=strides)
    kernel = _kernel("store.cu", f"store_kv<{_c(k)}, {_c(k_cache)}, {vector}>")
    k_stride, v_stride, page_stride, slot_stride = map(np.int64, strides)
    shape = np.int32(page_size), np.int32(pages * page_size), np.int32(width)
    grid, threads = (tokens, 2), _threads(width // vector)
    kernel(grid, threads, k, v, k_stride, v_stride, k_cache, v_cache, page_stride, slot_stride, slots.int(), *shape)


def experts(x: Tensor, chosen: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (tokens, size), pairs, num_experts = x.shape, chosen.numel(), len(gate_up)
    if pairs == 0:
        return torch.zeros_like(x)
    x, chosen, scores = x.contiguous(), chosen.contiguous(), scores.contiguous()
    multiply = _plain_product(chosen) if x.dtype == torch.float32 else _grouped_product(chosen, num_experts)
    hidden = x.new_empty(pairs, down.shape[2])
    multiply(hidden, x, gate_up)
    mixed = x.new_empty(pairs, size)  # rows of pairs that have no expert stay unwritten and unread, as in hidden
    multiply(mixed, hidden, down)
    out = x.new_empty(tokens, size)
    v = _vector(size, mixed, out)
    threads = _threads(size // v)
    kernel = _kernel("experts.cu", f"sum_choices<{_c(x)}, {v}>")
    shape = np.int32(chosen.shape[1]), np.int32(num_experts), np.int32(size)
    kernel((tokens, -(-size // (v * threads))), threads, out, mixed, scores, chosen, *shape)
    return out


def _grouped_product(chosen: Tensor, num_experts: int) -> Product:
    """Products on tensor cores; groups the pairs by expert at once."""
    pairs = chosen.numel()
    rows = _tile_rows(-(-pairs // num_experts))
    in_use = min(num_experts, pairs)
    num_tiles = in_use + (pairs - in_use) // rows  # no routing needs more
    tiles = chosen.new_empty(num_tiles, 4, dtype=torch.int32)
    order = chosen.new_empty(pairs, dtype=torch.int32)
    group = _kernel("experts.cu", f"group_pairs<{rows}>", shared_bytes=8 * (num_experts + 3))
    shape = np.int32(pairs), np.int32(num_experts), np.int32(num_tiles)
    group((1, 1), GROUP_THREADS, tiles, order, chosen, *shape)

    def multiply(out: Tensor, x: Tensor, weights: Tensor) -> None:
        _multiply_tiles(out, x, weights, rows, num_tiles, tiles, order)

    return multiply


def _dense_product(out: Tensor, x: Tensor, weights: Tensor) -> None:
    """As grouped products, of one expert that all rows have."""
    rows = _tile_rows(len(x))
    _multiply_tiles(out, x, weights, rows, -(-len(x) // rows), None, None)


def _tile_rows(rows: int) -> int:
    """Of a tile, for so many rows an expert. Few: bandwidth counts; many: arithmetic, which larger tiles feed better.

    Bounds not measured.
    """
    return 16 if rows <= 16 else 64 if rows <= 256 else 128


def _multiply_tiles(
    out: Tensor, x: Tensor, weights: Tensor, rows: int, num_tiles: int, tiles: Tensor | None, order: Tensor | None
) -> None:
    gated, columns = _is_gated(out, weights), out.shape[1]
    warps_down, warps_across, m, n, stages = EXPERT_TILES[rows]
    weight_rows = 16 * n * warps_across
    name = f"{_c(x)}, {warps_down}, {warps_across}, {m}, {n}, {stages}, {str(gated).lower()}"
    shared_bytes = stages * (rows + weight_rows) * 128
    kernel = _kernel("experts.cu", f"grouped_product<{name}>", shared_bytes=shared_bytes)
    parts = -(-columns // (weight_rows // 2 if gated else weight_rows))
    groups = (np.int64(0) if t is None else t for t in (tiles, order))
    sizes = len(out) // len(x), len(out), x.shape[1], columns
    kernel((num_tiles * parts, 1), 32 * warps_down * warps_across, out, x, weights, *groups, *map(np.int32, sizes))


def _plain_product(chosen: Tensor) -> Product:
    """Products in float32, a pair at a time."""

    def multiply(out: Tensor, x: Tensor, weights: Tensor) -> None:
        kernel = _kernel("experts.cu", f"plain_product<{str(_is_gated(out, weights)).lower()}>")
        sizes = len(out), len(out) // len(x), len(weights), x.shape[1], out.shape[1]
        kernel((-(-out.numel() // 8), 1), THREADS, out, x, weights, chosen, *map(np.int32, sizes))

    return multiply


def _is_gated(out: Tensor, weights: Tensor) -> bool:
    """Whether the weights are two for each column of the output: gate and up."""
    return weights.shape[1] == 2 * out.shape[1]


def gumbel_argmax(
    logits: Tensor, temperature: Tensor, keys: Tensor, *, first_token: int = 0, tokens: Tensor | None = None
) -> Tensor:
    rows, vocab = logits.shape
    best = keys.new_full((rows,), torch.iinfo(torch.int64).min)
    if rows and vocab:
        v = _vector(vocab, logits, strides=[logits.stride(0)])
        parts = max(1, min(RACE_BLOCKS // rows, vocab // (v * THREADS)))
        kernel = _kernel("sample.cu", f"race<{_c(logits)}, {v}, {str(tokens is not None).lower()}>")
        names = tokens if tokens is not None else best  # not read
        where = logits, np.int64(logits.stride(0)), names, np.int32(first_token)
        kernel((rows, parts), THREADS, best, *where, temperature, keys, np.int32(vocab))
    return best


def merge_candidates(contenders: Tensor) -> Tensor:
    ranks, rows = contenders.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=contenders.device)
    if rows:
        kernel = _kernel("sample.cu", "merge_candidates")
        kernel((-(-rows // THREADS), 1), THREADS, tokens, contenders.contiguous(), np.int32(ranks), np.int32(rows))
    return tokens


def topk_candidates(logits: Tensor, count: int, *, first_token: int = 0) -> Tensor:
    rows, columns = logits.shape
    parts = max(1, -(-columns // (FEW * HELD)))
    # The greatest of every part come first: in the next round each thread has some of these.
    found = torch.empty(rows, count, parts, dtype=torch.int64, device=logits.device)
    if rows:
        v = _vector(columns, logits, strides=[logits.stride(0)])
        shared_bytes = max(FEW, count * HELD) * found.element_size()
        kernel = _kernel("sample.cu", f"best<{_c(logits)}, {v}>", shared_bytes=shared_bytes)
        where = logits, np.int64(logits.stride(0)), np.int32(first_token), np.int32(columns)
        kernel((rows, parts), FEW, found, *where, np.int32(count))
    return found[:, :, 0] if parts == 1 else topk_candidates(found.flatten(1), count)


def sample_topk(
    contenders: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> Tensor:
    rows, count = contenders.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=contenders.device)
    if rows:
        given = contenders.contiguous(), temperature, top_k, top_p, min_p, keys
        _kernel("sample.cu", "sample_topk")((rows, 1), _threads(count), tokens, *given, np.int32(count))
    return tokens


def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    if rows and vocab:
        v = _vector(vocab, logits, strides=[logits.stride(0)])
        kernel = _kernel("sample.cu", f"nucleus<{_c(logits)}, {v}>")
        where = logits, np.int64(logits.stride(0))
        kernel((rows, 1), NUCLEUS_THREADS, tokens, *where, temperature, top_p, min_p, keys, np.int32(vocab))
    return tokens


def mask_top_k_top_p(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return reference.mask_top_k_top_p(ordered, top_k, top_p, min_p)


def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    rows, token_ids = len(slots), torch.empty_like(slots)
    if rows:
        tables = tokens, np.int64(tokens.stride(0)), pages, np.int64(pages.stride(0))
        where = slots, positions, kv_slots, np.int32(page_size), np.int32(rows)
        _kernel("slots.cu", "begin_decode")((-(-rows // THREADS), 1), THREADS, token_ids, *tables, *where)
    return token_ids


def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, chosen: Tensor) -> None:
    if rows := len(slots):
        table = tokens, np.int64(tokens.stride(0))
        kernel = _kernel("slots.cu", "append_tokens")
        kernel((-(-rows // THREADS), 1), THREADS, *table, slots, positions, chosen, np.int32(rows))


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[-1]
    v = _vector(size, x, weight, out, *([] if residual is None else [residual]))
    threads = _threads(size // v)
    needed = -(-size // (v * threads))
    registers = next((n for n in (1, 2, 4, 8, 16) if n >= needed), None)
    if registers is None:
        raise ValueError(f"rows of {size} elements are too long for the norm; at most {16 * v * threads}")
    kernel = _kernel("elementwise.cu", f"rms_norm<{_c(x)}, {v}, {registers}>", early=True)
    base = np.int64(0) if residual is None else residual
    kernel((x.numel() // size, 1), threads, out, x, base, weight, np.int32(size), np.float32(eps))
    return out


def _c(tensor: Tensor) -> str:
    return C_NAMES[tensor.dtype]


def _threads(items: int) -> int:
    """Threads of a block with this many items to do: whole warps, at most THREADS."""
    return min(THREADS, -(-items // 32) * 32)


def _vector(size: int, *tensors: Tensor, strides: list[int] | None = None) -> int:
    """Elements that all of these can move at once: as many as 16 bytes hold, or one where that does not divide."""
    v = VECTOR_BYTES // max(t.element_size() for t in tensors)
    aligned = all(t.data_ptr() % (v * t.element_size()) == 0 for t in tensors)
    return v if aligned and size % v == 0 and all(s % v == 0 for s in strides or []) else 1


@functools.cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Stream:
    """A raw stream as CuPy's launch wants it."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


@functools.cache
def _kernel(source: str, name: str, *, shared_bytes: int = 0, early: bool = False) -> Callable[..., None]:
    """One instance of a kernel template; call it with grid, threads and arguments (tensors or NumPy scalars).

    early: launched while the kernel before it still runs; it calls wait_for_previous (common.cuh) before it reads what
    that one writes.
    """
    try:
        function = _module(source, name).get_function(name)
        static_bytes = function.shared_size_bytes
    except cupy.cuda.compiler.CompileException as error:
        raise CompileError(f"NVRTC failed on {source}, {name}:\n{error}") from error

    if (
        static_bytes + shared_bytes > DEFAULT_SHARED_BYTES
    ):  # all that there is: instances with other sizes share the function
        most = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        function.max_dynamic_shared_size_bytes = most - static_bytes

    def launch(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        stream = _Stream(torch.cuda.current_stream().cuda_stream)
        passed = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        function(grid, (threads,), passed, shared_mem=shared_bytes, stream=stream)

    def launch_early(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = [_early_attribute()], 1
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a.item() for a in arguments)
        types = tuple(C_TYPES[type(a)] for a in arguments)
        (status,) = driver.cuLaunchKernelEx(config, function.kernel.ptr, (values, types), 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cannot launch {name} on {grid} x {threads} threads: {status.name}")

    return launch_early if early else launch


@functools.cache
def _early_attribute() -> Any:
    """Programmatic dependent launch, which CuPy's launch cannot ask for."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _module(source: str, name: str) -> Any:
    templates = (name,) if "<" in name else None
    return cupy.RawModule(code=source_text(source), options=("-std=c++17",), name_expressions=templates)


def source_text(name: str) -> str:
    """A source with the headers of this folder in place of their includes."""
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda m: source_text(m[1]), (SOURCES / name).read_text())
