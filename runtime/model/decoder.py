"""The decoder of all supported model families, which differ by a row of ARCHITECTURES in families.py.

residual = embedding of the tokens
each layer:  residual += attention(norm(residual))
             residual += MLP or experts (norm(residual))     some families norm these results, too, or only them
logits = head(final norm(residual))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from ...kernels.arguments import KVCache, QKNorm
from .attention.backend import AttentionBackend, Heads
from .batch import Batch
from .delta_net import GatedDeltaNet
from .embedding import Embedding, LMHead, Logits, head_shard, vocabulary_shard
from .gpt_oss_moe import GptOssMoE
from .kv_pool import AttentionShape, KVPool
from .linear import MLP, ColumnLinear, Projection, RowLinear, projections
from .model_config import ModelConfig
from .moe import MoE
from .norm import LayerNorms, NormInput, Residual, RMSNorm, WideQKNorm, norm_weight
from .rank_shares import share
from .rope import RopeConfig
from .state_pool import LayerStates, StatePool, StateShape
from .tensor_files import EMBEDDING, HEAD
from .weights import Piece, Weights


class Attention:
    """QKV, optional norm of query and key heads, rotary positions, attention, output projection."""

    def __init__(
        self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int, name: str, cos_sin: Tensor
    ) -> None:
        q_features = config.num_heads * config.head_dim
        kv_features = config.num_kv_heads * config.head_dim
        heads = config.heads_of_rank(comm.rank, comm.size)
        q_rows, kv_rows = (slice(x.start * config.head_dim, x.stop * config.head_dim) for x in heads[:2])
        self.q_size = q_rows.stop - q_rows.start
        parts = projections(
            [f"{name}.{tensor}" for tensor in config.names.qkv],
            (q_features, kv_features, kv_features),
            (q_rows, kv_rows, kv_rows),
        )
        gates: list[Projection] = []
        if config.output_gate:
            parts[:1], gates = _heads_and_gates(parts[0], heads.queries, config.head_dim)
        self.num_gates = sum(gate.num_rows for gate in gates)
        if config.adjacent_pairs:
            parts[:2] = [replace(part, pairs=config.head_dim) for part in parts[:2]]
        self.qkv = ColumnLinear(weights, [*parts, *gates], config.hidden_size, bias=config.qkv_bias)
        q_norm = k_norm = None
        self.wide_norm: WideQKNorm | None = None
        if config.qk_norm == "each head":
            q_norm, k_norm = (norm_weight(weights, f"{name}.self_attn.{x}_norm.weight", config.head_dim) for x in "qk")
        elif config.qk_norm == "all heads":
            features, rows = (q_features, kv_features), (q_rows, kv_rows)
            self.wide_norm = WideQKNorm(
                weights, comm, f"{name}.self_attn", features, rows, config.norm_eps, heads.holders
            )
        hidden, bias = config.hidden_size, config.output_bias
        output = f"{name}.{config.names.output}"
        self.output = RowLinear(weights, comm, output, hidden, q_features, q_rows, bias=bias)
        self.heads = Heads(
            QKNorm(q_norm, k_norm, config.norm_eps),
            cos_sin,
            _sinks(weights, config, name, heads.queries) if config.sinks else None,
            window=config.windows[layer],
            group=config.layer_groups.groups[config.attention_layers.index(layer)],
            feeds=None if gates else self.output.weight,
        )

    def __call__(
        self,
        normed: NormInput,
        residual: Residual,
        query_scale: Tensor | None,
        cache: KVCache,
        backend: AttentionBackend,
    ) -> None:
        """Add attention of `normed` [T, D] to `residual`; store its keys and values in `cache`.

        query_scale  [T, 1] float32: factors of the queries; None if all are 1
        """
        qkv, gate = self.qkv(normed), None
        if self.num_gates:
            qkv, gate = qkv.split([qkv.shape[1] - self.num_gates, self.num_gates], dim=1)
        if query_scale is not None:
            qkv[:, : self.q_size] *= query_scale
        if self.wide_norm is not None:
            self.wide_norm(qkv)
        out = backend.run(qkv, self.heads, cache)
        if gate is not None:
            assert isinstance(out, Tensor)
            ops.multiply_by_sigmoid_(out, gate)
        self.output(out, residual)


def _sinks(weights: Weights, config: ModelConfig, name: str, queries: range) -> Tensor:
    """Add the sinks of the rank's query heads to `weights`."""
    piece = Piece(f"{name}.self_attn.sinks", (config.num_heads,), (slice(queries.start, queries.stop),))
    return weights.add((len(queries),), [piece])


def _heads_and_gates(q: Projection, heads: range, head_dim: int) -> tuple[list[Projection], list[Projection]]:
    """Return the rows of query heads, and those of the gate that follows each of them in a projection."""
    both = [
        replace(q, features=2 * q.features, rows=slice(start, start + head_dim))
        for start in range(2 * heads.start * head_dim, 2 * heads.stop * head_dim, head_dim)
    ]
    return both[::2], both[1::2]


class DecoderLayer:
    """Attention and an MLP or experts, with norms before each, after each, or both."""

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int, cos_sin: Tensor) -> None:
        name, names, hidden = f"model.layers.{layer}", config.names, config.hidden_size
        around_attention = names.norm_before_attention, names.norm_after_attention
        around_mlp = names.norm_before_mlp, names.norm_after_mlp
        self.attention_norms = LayerNorms(weights, comm, name, around_attention, hidden, config.stream_eps)
        self.attention: Attention | GatedDeltaNet
        if config.delta_net is not None and layer in config.delta_net.layers:
            self.attention = GatedDeltaNet(weights, comm, config, name)
        else:
            self.attention = Attention(weights, comm, config, layer, name, cos_sin)
        self.mlp_norms = LayerNorms(weights, comm, name, around_mlp, hidden, config.stream_eps)
        self.mlp: MLP | MoE | GptOssMoE
        if config.experts is not None and config.has_experts(layer):
            if config.experts.clamped is None:
                self.mlp = MoE(weights, comm, name, hidden, config.experts, bias=config.mlp_bias)
            else:
                self.mlp = GptOssMoE(weights, comm, f"{name}.mlp", hidden, config.experts)
        else:
            gate_up, down = [f"{name}.{tensor}" for tensor in names.gate_up], f"{name}.{names.down}"
            self.mlp = MLP(
                weights,
                comm,
                gate_up,
                down,
                hidden,
                config.intermediate_size,
                bias=config.mlp_bias,
                activation=config.activation,
                norm_follows=layer + 1 < config.num_layers,  # a step without logits has no norm after the last layer
            )

    def __call__(
        self, residual: Residual, query_scale: Tensor | None, cache: KVCache | LayerStates, backend: AttentionBackend
    ) -> None:
        """Add the layer to `residual`; store keys and values of the batch that `backend` has planned in `cache`."""
        normed = self.attention_norms.before(residual)
        if isinstance(self.attention, GatedDeltaNet):
            assert isinstance(cache, LayerStates)
            self.attention(normed, residual, cache)
        else:
            assert isinstance(cache, KVCache)
            self.attention(normed, residual, query_scale, cache, backend)
        self.attention_norms.after(residual)
        self.mlp(self.mlp_norms.before(residual), residual)
        self.mlp_norms.after(residual)


def rotary_tables(config: ModelConfig, max_positions: int, device: torch.device) -> dict[RopeConfig | None, Tensor]:
    """Return the table of each rotation that layers have, [max_positions, R]; it is empty for None."""
    tables: dict[RopeConfig | None, Tensor] = {None: torch.zeros(0, config.head_dim, device=device)}
    for rope in config.rotations:
        tables[rope] = rope.table(config.head_dim, max_positions).to(device)
    return tables


def query_scales(config: ModelConfig, max_positions: int, device: torch.device) -> Tensor | None:
    """Return the factor of all layers' queries at each position, [max_positions]; None if all are 1."""
    scale = None if config.ropes[0] is None else config.ropes[0].query_scale(max_positions)
    return None if scale is None else scale.to(device)


class Decoder:
    """One rank's shard of a model, for positions below `max_positions`; `weights` are zero until they are loaded.

    With batch_invariant, which --deterministic sets, GEMMs give a token bitwise identical results in any batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_positions: int,
        batch_invariant: bool = False,
    ) -> None:
        config.check_tensor_parallel(comm.size)
        self.config = config
        self.comm = comm
        self.weights = weights = Weights(
            dtype,
            device,
            batch_invariant=batch_invariant,
            quantization=config.quantization,
            zero_centred_norms=config.zero_centred_norms,
            unused=tuple(f"model.layers.{config.num_layers + n}." for n in range(config.num_draft_layers)),
        )
        vocab, hidden, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        ignored = (HEAD,) if tied else ()
        rows = vocabulary_shard(weights, comm, EMBEDDING, vocab, hidden, ignored=ignored)
        self.embedding = Embedding(comm, rows, config.embedding_multiplier / config.residual_multiplier)
        self.query_scale = query_scales(config, max_positions, device)
        tables = rotary_tables(config, max_positions, device)
        self.layers = [
            DecoderLayer(weights, comm, config, layer, tables[rope]) for layer, rope in enumerate(config.ropes)
        ]
        self.places = config.layer_groups.places  # of the layers with keys and values in the pages of their group
        self.norm = RMSNorm(weights, comm, "model.norm", hidden, config.stream_eps)
        head = rows if tied else head_shard(weights, comm, HEAD, vocab, hidden)
        scaling, softcap = config.logits_scaling, config.logits_softcap
        self.head = LMHead(comm, head, vocab, scaling=scaling, softcap=softcap, batch_invariant=batch_invariant)

    def attention_shape(
        self, page_size: int, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
    ) -> AttentionShape:
        """Return the shape of this rank's attention and KV cache."""
        config = self.config
        heads = config.heads_of_rank(self.comm.rank, self.comm.size)
        return AttentionShape(
            num_layers=config.layer_groups.layers_per_page,
            num_heads=len(heads.queries),
            num_kv_heads=len(heads.kv),
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            padded_head_dim=config.stored_head_dim,
        )

    def state_shape(self, dtype: torch.dtype) -> StateShape | None:
        """Return the shape of this rank's recurrent states; None if no layer has one."""
        net = self.config.delta_net
        if net is None:
            return None
        keys = len(share(net.key_heads, self.comm.rank, self.comm.size))
        heads = keys * net.value_heads // net.key_heads
        return StateShape(
            num_layers=len(net.layers),
            taps=net.taps,
            channels=2 * keys * net.key_size + heads * net.value_size,
            heads=heads,
            key_size=net.key_size,
            value_size=net.value_size,
            dtype=dtype,
        )

    def forward(
        self, batch: Batch, pool: KVPool, attention: AttentionBackend, states: StatePool | None = None
    ) -> Residual:
        """Return the residual stream [T, D] after the last layer. `attention` is planned.

        Stores keys and values in `pool`, and updates `states`, which a model with recurrent layers needs.
        """
        residual = Residual(self.embedding(batch.token_ids), separate=self.config.names.has_norms_after)
        query_scale = None if self.query_scale is None else self.query_scale[batch.positions].unsqueeze(1)
        caches = map(pool.layer, self.places)
        recurrent = iter([] if states is None else states.layers(batch.state_rows))
        for layer in self.layers:
            is_recurrent = isinstance(layer.attention, GatedDeltaNet)
            layer(residual, query_scale, next(recurrent) if is_recurrent else next(caches), attention)
        return residual

    def logits(self, residual: Residual, rows: Tensor | None = None) -> Logits:
        """Return the logits of `rows` [S] of the residual stream, or of all its rows."""
        hidden = self.norm(residual)
        if rows is not None:
            hidden = replace(hidden, x=hidden.x[rows])
        return self.head(hidden)
