"""Layers: n shards sum to the plain formula, attention over pages equals attention, RoPE equals transformers'."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lockstep.comm.base import CommError, Communicator
from lockstep.kernels.arguments import KVCache, QKNorm
from lockstep.runtime.model.attention import backend as backend_module
from lockstep.runtime.model.attention.backend import BatchInvariantAttention, Heads, TorchAttention
from lockstep.runtime.model.batch import Batch, HostBatch
from lockstep.runtime.model.embedding import Embedding, LMHead, vocabulary_shard
from lockstep.runtime.model.expert_config import ExpertConfig
from lockstep.runtime.model.families import ExpertRules
from lockstep.runtime.model.hf_config import HFConfigReader
from lockstep.runtime.model.kv_pool import AttentionShape
from lockstep.runtime.model.linear import MLP, ColumnLinear, Projection, RowLinear, shard_of
from lockstep.runtime.model.moe import MoE
from lockstep.runtime.model.norm import NormInput, Residual, RMSNorm
from lockstep.runtime.model.rope import RopeConfig
from lockstep.runtime.model.weights import Weights, load_weights

from checkpoints import tiny_model
from flashinfer_stand_in import flashinfer_stand_in
from ranks import run_ranks

CPU = torch.device("cpu")
D, FF, T = 24, 16, 7
SIZES = pytest.mark.parametrize("size", [1, 2, 4])


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return NaNs with a row more at each end than `like`, and the rows between."""
    whole = torch.full((len(like) + 2, like.shape[1]), torch.nan, dtype=like.dtype, device=like.device)
    return whole, whole[1:-1]


def _loaded(build: Callable[[Weights], Any], folder: Path) -> Any:
    """The layer that `build` makes, with its weights from `folder`."""
    weights = Weights(torch.float32, CPU)
    layer = build(weights)
    load_weights(weights, folder)
    return layer


def _added(layer: MLP | MoE, x: Tensor) -> Tensor:
    """Return the layer's contribution to the residual stream on this rank."""
    residual = Residual(torch.zeros_like(x))
    layer(NormInput(x), residual)
    return residual.total if residual.partial is None else residual.partial


@SIZES
def test_mlp_shards_sum_to_the_layer(size: int, tmp_path: Path) -> None:
    saved = {f"mlp.{part}_proj.weight": _random(FF, D) + n for n, part in enumerate(("gate", "up"))}
    saved |= {f"mlp.{part}_proj.bias": _random(FF) + n for n, part in enumerate(("gate", "up"))}
    saved |= {"mlp.down_proj.weight": _random(D, FF), "mlp.down_proj.bias": _random(D)}
    save_file(saved, tmp_path / "model.safetensors")
    x = _random(T, D)
    gate, up = (
        F.linear(x, saved[f"mlp.{part}_proj.weight"], saved[f"mlp.{part}_proj.bias"]) for part in ("gate", "up")
    )
    expected = F.linear(F.silu(gate) * up, saved["mlp.down_proj.weight"], saved["mlp.down_proj.bias"])

    names = ("mlp.gate_proj", "mlp.up_proj")

    def run(comm: Communicator) -> Tensor:
        mlp = _loaded(
            lambda weights: MLP(weights, comm, names, "mlp.down_proj", D, FF, bias=True, norm_follows=False),
            tmp_path,
        )
        assert mlp.gate_up.weight.shape == (2 * FF // size, D)
        return _added(mlp, x)

    torch.testing.assert_close(sum(run_ranks(size, run)), expected, atol=1e-3, rtol=1e-5)


@SIZES
def test_moe_shards_sum_to_the_layer(size: int, tmp_path: Path) -> None:
    experts = ExpertConfig(
        rules=ExpertRules(),
        num_experts=5,
        num_per_token=2,
        intermediate_size=FF,
        normalized=True,
        layers=frozenset([0]),
    )
    saved = {"layer.mlp.gate.weight": _random(5, D)}
    for n in range(5):
        saved |= {f"layer.mlp.experts.{n}.{part}_proj.weight": _random(FF, D) * (n + 1) for part in ("gate", "up")}
        saved |= {f"layer.mlp.experts.{n}.down_proj.weight": _random(D, FF) - n}
    save_file(saved, tmp_path / "model.safetensors")
    x = _random(T, D)

    def one_token(token: Tensor) -> Tensor:
        probabilities = torch.softmax(saved["layer.mlp.gate.weight"] @ token, dim=0)
        chosen = probabilities.argsort(descending=True)[:2].tolist()
        out = torch.zeros(D)
        for n in chosen:
            gate, up, down = (saved[f"layer.mlp.experts.{n}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            out += probabilities[n] / probabilities[chosen].sum() * (down @ (F.silu(gate @ token) * (up @ token)))
        return out

    def run(comm: Communicator) -> Tensor:
        return _added(_loaded(lambda weights: MoE(weights, comm, "layer", D, experts, bias=False), tmp_path), x)

    expected = torch.stack([one_token(token) for token in x])
    torch.testing.assert_close(sum(run_ranks(size, run)), expected, atol=1e-2, rtol=1e-4)


@SIZES
@pytest.mark.parametrize("vocab", [131, 128, 5])  # 5 over 4 ranks: one rank has padding only
def test_vocabulary_shards_equal_the_whole_vocabulary(size: int, vocab: int, tmp_path: Path) -> None:
    saved = {"embed": _random(vocab, D)}
    save_file(saved, tmp_path / "model.safetensors")
    tokens = torch.cat((torch.arange(vocab), torch.tensor([vocab - 1, 0]))).int()
    hidden = _random(3, D)

    def run(comm: Communicator) -> tuple[Tensor, Tensor]:
        rows = _loaded(lambda weights: vocabulary_shard(weights, comm, "embed", vocab, D), tmp_path)
        assert len(rows) == -(-vocab // size)
        return Embedding(comm, rows)(tokens), LMHead(comm, rows, vocab)(NormInput(hidden)).gather()

    for embedded, logits in run_ranks(size, run):
        assert torch.equal(embedded, saved["embed"][tokens.long()])
        torch.testing.assert_close(logits, hidden @ saved["embed"].T)


@SIZES
def test_norm_reduces_partial_sums(size: int, tmp_path: Path) -> None:
    save_file({"norm.weight": _random(D)}, tmp_path / "model.safetensors")
    first, second = _random(size, T, D), _random(size, T, D) * 2 + 1

    def formula(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * _random(D)

    def run(comm: Communicator) -> list[Tensor]:
        norm = _loaded(lambda weights: RMSNorm(weights, comm, "norm", D, 1e-5), tmp_path)
        residual = Residual(comm.all_reduce(first[comm.rank].clone()))
        total, x = residual.total, norm(residual).tensor()
        residual.partial = second[comm.rank].clone()
        y = norm(residual).tensor()
        assert residual.total is total  # updated in place
        assert residual.partial is None
        return [x, y, total]

    for x, y, total in run_ranks(size, run):
        torch.testing.assert_close(x, formula(first.sum(0)))
        torch.testing.assert_close(total, first.sum(0) + second.sum(0))
        torch.testing.assert_close(y, formula(total))


@SIZES
def test_column_then_row_equals_two_linears(size: int, tmp_path: Path) -> None:
    saved = {"a.weight": _random(FF, D), "a.bias": _random(FF), "b.weight": _random(D, FF), "b.bias": _random(D)}
    save_file(saved, tmp_path / "model.safetensors")
    x = _random(T, D)

    def run(comm: Communicator) -> Tensor:
        def build(weights: Weights) -> tuple[ColumnLinear, RowLinear]:
            column = ColumnLinear(weights, [Projection("a", FF, shard_of(FF, comm))], D, bias=True)
            return column, RowLinear(weights, comm, "b", D, FF, shard_of(FF, comm), bias=True, norm_follows=False)

        column, row = _loaded(build, tmp_path)
        residual = Residual(before.clone())
        row(column(NormInput(x)), residual)
        return residual.total + comm.all_reduce(residual.partial) if comm.size > 1 else residual.total

    before = _random(T, D)
    expected = before + F.linear(F.linear(x, saved["a.weight"], saved["a.bias"]), saved["b.weight"], saved["b.bias"])
    for actual in run_ranks(size, run):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_torch_attention_matches_definition(window: int | None, kv_heads: int) -> None:
    heads, size, page_size, scale = 4, 8, 4, 0.3
    counts, lengths = [1, 6, 1, 1, 3], [1, 6, 17, 8, 11]  # decode and prefill rows, with and without a past
    tables = torch.full((5, 6), 10**6, dtype=torch.int32)
    pages = torch.randperm(20, generator=torch.Generator().manual_seed(3)).split([1, 2, 5, 2, 3, 7])
    for row, row_pages in zip(tables, pages, strict=False):
        row[: len(row_pages)] = row_pages
    k_cache, v_cache = _random(20, page_size, kv_heads, size), _random(20, page_size, kv_heads, size) ** 2
    # Slots of -1 store nothing and positions of 0 rotate by nothing: the cache already holds all keys.
    qkv, none = _random(sum(counts), (heads + 2 * kv_heads) * size), torch.full((sum(counts),), -1)
    q = qkv[:, : heads * size].unflatten(1, (heads, size))
    table = torch.tensor([[1.0] * (size // 2) + [0.0] * (size // 2)])
    unrotated = Heads(QKNorm(None, None, 0.0), table, window=window)
    starts = np.cumsum([0, *counts], dtype=np.int32)
    host = HostBatch(
        slots=none.numpy(), positions=none.numpy(), kv_slots=none.numpy()[None], page_table=tables.numpy()[None],
        query_starts=starts, kv_lengths=np.array(lengths, dtype=np.int32), num_decoding=0,
    )  # fmt: skip
    batch = Batch(
        token_ids=none,
        positions=torch.zeros_like(none),
        kv_slots=none[None],
        page_table_rows=none,
        device_page_table=tables[None],
        host=host,
    )
    attention = TorchAttention(scale)
    attention.plan(batch)
    actual = attention.run(qkv, unrotated, KVCache(k_cache, v_cache)).unflatten(1, (heads, size))
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        for n in range(count):
            position = length - count + n
            seen = range(0 if window is None else max(0, position - window + 1), position + 1)
            where = [(int(tables[row, j // page_size]), j % page_size) for j in seen]
            for head in range(heads):
                kv_head = head * kv_heads // heads
                keys, values = (torch.stack([cache[p, o, kv_head] for p, o in where]) for cache in (k_cache, v_cache))
                query = q[starts[row] + n, head]
                expected = torch.softmax(keys @ query * scale, dim=0) @ values
                torch.testing.assert_close(actual[starts[row] + n, head], expected, atol=1e-5, rtol=1e-5)


def _batch(
    counts: list[int], lengths: list[int], pages: Tensor, page_size: int, num_decoding: int, device: torch.device = CPU
) -> Batch:
    """Rows of so many tokens, the last of so long prefixes, with their pages."""
    positions = np.concatenate([np.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]).astype(np.int32)
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    kv_slots = pages.numpy()[rows, positions // page_size] * page_size + positions % page_size
    host = HostBatch(
        slots=rows,
        positions=positions,
        kv_slots=kv_slots[None],
        page_table=pages.numpy()[None],
        query_starts=np.cumsum([0, *counts], dtype=np.int32),
        kv_lengths=np.array(lengths, dtype=np.int32),
        num_decoding=num_decoding,
    )
    return Batch(
        token_ids=torch.zeros(0),
        positions=torch.from_numpy(positions).to(device),
        kv_slots=torch.from_numpy(kv_slots).to(device)[None],
        page_table_rows=torch.from_numpy(rows).to(device),
        device_page_table=pages.to(device)[None],
        host=host,
    )


PREFILLS = [  # head size, heads, window, softcap, sinks
    (64, 8, None, None, False), (64, 16, None, None, True), (64, 16, 33, None, True), (128, 24, None, None, False),
    (128, 8, 33, None, True), (96, 8, 33, None, True), (256, 16, 33, 2.0, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("device", "num_decoding"), [("cpu", 4), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (0, 1, 4, 7))]
)
@pytest.mark.parametrize(("size", "heads", "window", "softcap", "has_sinks"), PREFILLS)
def test_flashinfer_attention_matches_torch(
    size: int, heads: int, window: int | None, softcap: float | None, has_sinks: bool, num_decoding: int, device: str
) -> None:
    """Decode rows first; of the others one reads what row 0 stores in this step, decoding or not."""
    place, kv_heads, page_size, scale = torch.device(device), 2, 16, size**-0.5
    counts, lengths = [1, 1, 1, 1, 70, 4, 1], [16, 300, 1, 65, 170, 20, 33]
    if num_decoding == len(counts):
        counts = [1] * num_decoding
    pages = torch.randperm(7 * 20, dtype=torch.int32).view(7, 20)
    if num_decoding < 5:
        pages[5, 0] = pages[0, 0]
    qkv = _random(sum(counts), (heads + 2 * kv_heads) * size).bfloat16()
    norms = [_random(size).bfloat16() + n for n in range(2)]
    stored = 128 if size == 96 else size
    table, caches = _random(300, size), [_random(140, page_size, kv_heads, stored).bfloat16() + n for n in range(2)]
    for cache in caches:
        cache[..., size:] = 0
    expected_caches = [cache[..., :size].clone() for cache in caches]
    definition = TorchAttention(scale, softcap)
    definition.plan(_batch(counts, lengths, pages, page_size, num_decoding))
    sinks = (3 * _random(heads)).bfloat16() if has_sinks else None
    expected = definition.run(qkv, Heads(QKNorm(*norms, 1e-6), table, sinks, window), KVCache(*expected_caches))
    shape = AttentionShape(
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        page_size=page_size,
        dtype=torch.bfloat16,
        padded_head_dim=stored,
    )
    with flashinfer_stand_in() if device == "cpu" else nullcontext():
        from lockstep.runtime.model.attention.flashinfer_backend import FlashInferAttention

        attention = FlashInferAttention(shape, scale, {(window, 0)}, place, softcap)
    attention.plan(_batch(counts, lengths, pages, page_size, num_decoding, place))
    caches = [cache.to(place)[..., :size] for cache in caches]
    there = Heads(
        QKNorm(*(norm.to(place) for norm in norms), 1e-6),
        table.to(place),
        None if sinks is None else sinks.to(place),
        window,
    )
    whole, out = _guarded(expected.to(place))
    actual = attention.run(qkv.to(place), there, KVCache(*caches), out)
    assert actual.data_ptr() == out.data_ptr()
    assert whole[[0, -1]].isnan().all(), "only the result is written"
    for one, other in zip((actual, *caches), (expected, *expected_caches), strict=True):
        # With sinks both round the weights or the result once more.
        torch.testing.assert_close(one.cpu(), other, atol=8e-2 if has_sinks else 4e-2, rtol=2e-2)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sinks", [None, torch.tensor([2.0, -1.0, 0.0, 30.0])])
def test_batch_invariant_attention_matches_torch(
    sinks: Tensor | None, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts whole and from the middle beside decode rows, one of which reads what another row stores in this step."""
    monkeypatch.setattr(backend_module, "MAX_ROWS", 4)
    heads, kv_heads, size, page_size, scale = 4, 2, 8, 4, 0.3
    counts, lengths = [6, 1, 5, 1], [6, 17, 11, 7]
    pages = torch.randperm(40, dtype=torch.int32).view(4, 10)
    pages[3, 0] = pages[0, 0]  # a prefix that row 0 computes
    batch = _batch(counts, lengths, pages, page_size, num_decoding=0)
    qkv = _random(sum(counts), (heads + 2 * kv_heads) * size)
    table = Heads(QKNorm(None, None, 0.0), _random(20, size), sinks, window)
    actual = []
    shape = AttentionShape(
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, page_size=page_size, dtype=torch.float32
    )
    backends = TorchAttention(scale, softcap), BatchInvariantAttention(shape, scale, {window}, 20, softcap)
    for attention in backends:
        caches = [_random(40, page_size, kv_heads, size), _random(40, page_size, kv_heads, size) ** 2]
        attention.plan(batch)
        whole, out = _guarded(qkv[:, : heads * size])
        attention.run(qkv, table, KVCache(*caches), out)
        assert whole[[0, -1]].isnan().all(), "only the result is written"
        actual.append((out, *caches))
        again = [_random(40, page_size, kv_heads, size), _random(40, page_size, kv_heads, size) ** 2]
        assert torch.equal(attention.run(qkv, table, KVCache(*again)), out)
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


FACTORS = {name: [bound ** (n / 31) for n in range(32)] for name, bound in (("short_factor", 3), ("long_factor", 60))}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, bounds not rounded": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False,
    },
    "yarn, other bounds": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0,
    },
    "yarn, bound beyond the last pair": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_slow": 0.001,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256,
        "mscale": 0.7, "mscale_all_dim": 1.3,
    },
    "yarn, attention factor": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "attention_factor": 1.7,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 512, **FACTORS},
    "longrope, part of a head": {
        "rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 8.0, "partial_rotary_factor": 0.5,
        **{name: factors[:16] for name, factors in FACTORS.items()},
    },
    "longrope, attention factor": {
        "rope_type": "longrope", "original_max_position_embeddings": 512, "attention_factor": 1.2, **FACTORS,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_table_matches_transformers(name: str) -> None:
    parameters = {**ROPES[name], "rope_theta": 50000.0}
    shape = {"head_dim": 64, "max_position_embeddings": 2048}
    model = tiny_model("LlamaForCausalLM", rope_parameters=dict(parameters), num_hidden_layers=1, **shape)
    rope = RopeConfig.from_hf(HFConfigReader({"rope_parameters": parameters, **shape}), partial=True)
    pairs = rope.rotary_dim(64) // 2
    for positions in (2048, 512):  # of longrope, 512 have the short factors
        cos, sin = model.model.rotary_emb(torch.empty(0), torch.arange(positions)[None])  # [1, P, R], each half twice
        expected = torch.cat((cos[0, :, :pairs], sin[0, :, :pairs]), dim=-1)
        # Frequencies may differ in the last bit of float32: 2048 positions * 2^-23, times an attention factor below 2.
        torch.testing.assert_close(rope.table(64, positions), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("fail", [0, 2])
def test_run_ranks_raises_the_first_error(fail: int) -> None:
    def run(comm: Communicator) -> None:
        if comm.rank == fail:
            raise KeyError("mine")
        comm.barrier()

    with pytest.raises(KeyError, match="mine"):
        run_ranks(3, run)


def test_run_ranks_refuses_different_collectives() -> None:
    with pytest.raises(CommError, match="disagree"):
        run_ranks(2, lambda comm: comm.all_reduce(torch.zeros(comm.rank + 1)))


def test_one_rank_runs_until_it_waits_for_the_others() -> None:
    running: list[int] = []

    def run(comm: Communicator) -> None:
        for _ in range(3):
            running.append(comm.rank)
            time.sleep(0.001)  # another thread could run
            assert running == [comm.rank]
            running.clear()
            comm.barrier()

    run_ranks(3, run)
