"""The one decoder, of which all supported families are rows in a table.

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
from .attention.attention import Attention, AttentionBackend
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
    """Attention and MLP, each after its norm."""

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
        self,
        residual: Residual,
        batch: Batch,
        cos_sin: Tensor,
        cache: tuple[Tensor, Tensor],
        backend: AttentionBackend,
    ) -> None:
        """Adds to `residual`; keys and values of the batch go into `cache`, this layer's (K, V)."""
        self.attention(self.attention_norm(residual), residual, batch, cos_sin, cache, backend)
        self.mlp(self.mlp_norm(residual), residual)


class Decoder:
    """One rank's share of a model, for positions below `max_positions`; the weights are zero until they are filled.

    If batch_invariant, products give a token the same bits in any batch.
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
        """Every weight of this rank with what fills it, for `load_weights` or `fill_dummy`."""
        return self._weights

    def kv_shape(self, page_size: int, dtype: torch.dtype) -> KVShape:
        """This rank's share of the KV cache."""
        config = self.config
        return KVShape(
            num_layers=config.num_layers,
            page_size=page_size,
            num_kv_heads=len(config.kv_heads_of_rank(self.comm.rank, self.comm.size)),
            head_dim=config.head_dim,
            dtype=dtype,
        )

    def forward(self, batch: Batch, pool: KVPool, attention: AttentionBackend) -> Residual:
        """The residual stream [T, D] of the batch after the last layer; `attention` has been planned for this batch.

        Keys and values of the T tokens are written into `pool`.
        """
        residual = self.embedding(batch.token_ids)
        for n, layer in enumerate(self.layers):
            layer(residual, batch, self.cos_sin, (pool.k(n), pool.v(n)), attention)
        return residual

    def logits(self, residual: Residual, rows: Tensor | None = None) -> Logits:
        """The logits of `rows` [S] of the stream; of all if not given."""
        hidden = self.norm(residual)
        if rows is not None:
            hidden = replace(hidden, x=hidden.x[rows])
        return self.head(hidden)
