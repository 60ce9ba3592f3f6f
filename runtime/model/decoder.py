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
from ...kernels.arguments import KVCache
from .attention.attention_layer import Attention
from .attention.backend import AttentionBackend
from .batch import Batch
from .embedding import Embedding, Head, vocabulary_shard
from .kv_pool import KVPool, KVShape
from .linear import MLP
from .logits import Logits
from .model_config import ModelConfig
from .moe import MoE
from .norm import Residual, RMSNorm
from .weights import Weight, Weights

HEAD = "lm_head.weight"


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

    def __call__(
        self, residual: Residual, batch: Batch, cos_sin: Tensor, cache: KVCache, backend: AttentionBackend
    ) -> None:
        """Add the layer to `residual`; store keys and values of the batch in `cache`."""
        self.attention(self.attention_norm(residual), residual, batch, cos_sin, cache, backend)
        self.mlp(self.mlp_norm(residual), residual)


class Decoder:
    """One rank's shard of a model, for positions below `max_positions`; the weights are zero until they are loaded.

    If batch_invariant, GEMMs give a token bitwise identical results in any batch.
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
        self._weights = weights = Weights(dtype, device, batch_invariant=batch_invariant)
        vocab, hidden = config.vocab_size, config.hidden_size
        tied = config.tie_word_embeddings
        rows = vocabulary_shard(
            weights, comm, "model.embed_tokens.weight", vocab, hidden, ignored=(HEAD,) if tied else ()
        )
        self.embedding = Embedding(comm, rows)
        self.layers = [DecoderLayer(weights, comm, config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(weights, comm, "model.norm", hidden, config.norm_eps)
        head = rows if tied else vocabulary_shard(weights, comm, HEAD, vocab, hidden)
        self.head = Head(comm, head, vocab, batch_invariant=batch_invariant)
        self.cos_sin = config.rope.table(config.head_dim, max_positions).to(device)

    def weights(self) -> list[Weight]:
        """Return every weight of this rank with its source, for `load_weights` or `fill_dummy`."""
        return self._weights

    def kv_shape(self, page_size: int, dtype: torch.dtype) -> KVShape:
        """Return the shape of this rank's KV cache."""
        config = self.config
        return KVShape(
            num_layers=config.num_layers,
            page_size=page_size,
            num_kv_heads=len(config.kv_heads_of_rank(self.comm.rank, self.comm.size)),
            head_dim=config.head_dim,
            dtype=dtype,
        )

    def forward(self, batch: Batch, pool: KVPool, attention: AttentionBackend) -> Residual:
        """Return the residual stream [T, D] after the last layer; store keys and values of the T tokens in `pool`.

        `attention` has been planned for this batch.
        """
        residual = self.embedding(batch.token_ids)
        for n, layer in enumerate(self.layers):
            layer(residual, batch, self.cos_sin, pool.layer(n), attention)
        return residual

    def logits(self, residual: Residual, rows: Tensor | None = None) -> Logits:
        """Return the logits of `rows` [S] of the residual stream, or of all its rows."""
        hidden = self.norm(residual)
        if rows is not None:
            hidden = replace(hidden, x=hidden.x[rows])
        return self.head(hidden)
