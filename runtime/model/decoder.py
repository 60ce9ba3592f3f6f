"""The decoder of all supported model families, which differ by a row of ARCHITECTURES.

residual = embedding of the tokens
each layer:  residual += attention(norm(residual))
             residual += MLP or experts (norm(residual))
logits = head(final norm(residual))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels.arguments import KVCache, QKNorm
from .attention.backend import AttentionBackend, Heads
from .batch import Batch
from .checkpoint import EMBEDDING, HEAD
from .embedding import Embedding, Head, Logits, vocabulary_shard
from .kv_pool import AttentionShape, KVPool
from .linear import MLP, ColumnLinear, MoE, Projection, RowLinear, shard_of
from .model_config import ModelConfig
from .norm import NormInput, Residual, RMSNorm, norm_weight
from .weights import Weights


class Attention:
    """QKV, optional norm of query and key heads, rotary positions, attention, output projection."""

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int, name: str) -> None:
        self.window = config.windows[layer]
        q_features = config.num_heads * config.head_dim
        kv_features = config.num_kv_heads * config.head_dim
        kv_heads = config.kv_heads_of_rank(comm.rank, comm.size)
        kv_rows = slice(kv_heads.start * config.head_dim, kv_heads.stop * config.head_dim)
        projections = [
            Projection(f"{name}.q_proj", q_features, shard_of(q_features, comm)),
            Projection(f"{name}.k_proj", kv_features, kv_rows),
            Projection(f"{name}.v_proj", kv_features, kv_rows),
        ]
        self.qkv = ColumnLinear(weights, projections, config.hidden_size, bias=config.qkv_bias)
        hidden, bias = config.hidden_size, config.output_bias
        self.output = RowLinear(weights, comm, f"{name}.o_proj", hidden, q_features, bias=bias)
        q_norm, k_norm = (
            norm_weight(weights, f"{name}.{x}_norm.weight", config.head_dim) if config.qk_norm else None for x in "qk"
        )
        self.norm = QKNorm(q_norm, k_norm, config.norm_eps)

    def __call__(
        self, normed: NormInput, residual: Residual, cos_sin: Tensor, cache: KVCache, backend: AttentionBackend
    ) -> None:
        """Add attention of `normed` [T, D] to `residual`; store its keys and values in `cache`."""
        heads = Heads(self.norm, cos_sin)
        self.output(backend.run(self.qkv(normed), heads, cache, self.window), residual)


class DecoderLayer:
    """Attention and an MLP or experts, each after its norm."""

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int) -> None:
        name = f"model.layers.{layer}"
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(weights, comm, f"{name}.input_layernorm", hidden, eps)
        self.attention = Attention(weights, comm, config, layer, f"{name}.self_attn")
        self.mlp_norm = RMSNorm(weights, comm, f"{name}.post_attention_layernorm", hidden, eps)
        self.mlp: MLP | MoE
        if config.experts is not None and config.has_experts(layer):
            self.mlp = MoE(weights, comm, f"{name}.mlp", hidden, config.experts)
        else:
            self.mlp = MLP(weights, comm, f"{name}.mlp", hidden, config.intermediate_size, bias=config.mlp_bias)

    def __call__(self, residual: Residual, cos_sin: Tensor, cache: KVCache, backend: AttentionBackend) -> None:
        """Add the layer to `residual`; store keys and values of the batch that `backend` has planned in `cache`."""
        self.attention(self.attention_norm(residual), residual, cos_sin, cache, backend)
        self.mlp(self.mlp_norm(residual), residual)


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
        self.weights = weights = Weights(dtype, device, batch_invariant=batch_invariant)
        vocab, hidden, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        ignored = (HEAD,) if tied else ()
        rows = vocabulary_shard(weights, comm, EMBEDDING, vocab, hidden, ignored=ignored)
        self.embedding = Embedding(comm, rows)
        self.layers = [DecoderLayer(weights, comm, config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(weights, comm, "model.norm", hidden, config.norm_eps)
        head = rows if tied else vocabulary_shard(weights, comm, HEAD, vocab, hidden)
        self.head = Head(comm, head, vocab, batch_invariant=batch_invariant)
        self.cos_sin = config.rope.table(config.head_dim, max_positions).to(device)

    def attention_shape(self, page_size: int, dtype: torch.dtype) -> AttentionShape:
        """Return the shape of this rank's attention and KV cache."""
        config, comm = self.config, self.comm
        return AttentionShape(
            num_layers=config.num_layers,
            num_heads=config.num_heads // comm.size,
            num_kv_heads=len(config.kv_heads_of_rank(comm.rank, comm.size)),
            head_dim=config.head_dim,
            page_size=page_size,
            dtype=dtype,
        )

    def forward(self, batch: Batch, pool: KVPool, attention: AttentionBackend) -> Residual:
        """Return the residual stream [T, D] after the last layer; store keys and values. `attention` is planned."""
        residual = self.embedding(batch.token_ids)
        for n, layer in enumerate(self.layers):
            layer(residual, self.cos_sin, pool.layer(n), attention)
        return residual

    def logits(self, residual: Residual, rows: Tensor | None = None) -> Logits:
        """Return the logits of `rows` [S] of the residual stream, or of all its rows."""
        hidden = self.norm(residual)
        if rows is not None:
            hidden = replace(hidden, x=hidden.x[rows])
        return self.head(hidden)
