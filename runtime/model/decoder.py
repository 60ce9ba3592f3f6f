"""The one decoder, of which all supported families are rows in a table.

partial = embedding of the tokens                                   summed over the ranks by the first norm
each layer:  x, residual = norm(partial, residual);  partial = attention(x)
             x, residual = norm(partial, residual);  partial = MLP or experts (x)
hidden = final norm(partial, residual);  logits = head(hidden)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...comm.base import Communicator
from ..batch import Batch
from ..cache.pool import KVPool, KVShape
from .attention import Attention, AttentionBackend
from .config import ModelConfig
from .embedding import Embedding, Head, vocabulary_shard
from .linear import MLP
from .moe import MoE
from .norm import RMSNorm
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
        partial: Tensor,
        residual: Tensor | None,
        batch: Batch,
        cos_sin: Tensor,
        cache: tuple[Tensor, Tensor],
        backend: AttentionBackend,
    ) -> tuple[Tensor, Tensor]:
        """The partial sum of this layer's MLP, and the residual without it; both [T, D]."""
        x, residual = self.attention_norm(partial, residual)
        x, residual = self.mlp_norm(self.attention(x, batch, cos_sin, cache, backend), residual)
        return self.mlp(x), residual


class Decoder:
    """One rank's share of a model, for positions below `max_positions`; the weights are zero until they are filled."""

    def __init__(
        self, config: ModelConfig, comm: Communicator, *, dtype: torch.dtype, device: torch.device, max_positions: int
    ) -> None:
        config.check_tensor_parallel(comm.size)
        self.config = config
        self.comm = comm
        self._weights = weights = Weights(dtype, device)
        vocab, hidden = config.vocab_size, config.hidden_size
        tied = config.tie_word_embeddings
        rows = vocabulary_shard(
            weights, comm, "model.embed_tokens.weight", vocab, hidden, ignored=(HEAD,) if tied else ()
        )
        self.embedding = Embedding(comm, rows)
        self.layers = [DecoderLayer(weights, comm, config, layer) for layer in range(config.num_layers)]
        self.norm = RMSNorm(weights, comm, "model.norm", hidden, config.norm_eps)
        self.head = Head(comm, rows if tied else vocabulary_shard(weights, comm, HEAD, vocab, hidden), vocab)
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

    def forward(self, batch: Batch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """The hidden states [T, D] of the batch after the final norm; `attention` has been planned for this batch.

        Keys and values of the T tokens are written into `pool`.
        """
        partial, residual = self.embedding(batch.token_ids), None
        for n, layer in enumerate(self.layers):
            partial, residual = layer(partial, residual, batch, self.cos_sin, (pool.k(n), pool.v(n)), attention)
        hidden, _ = self.norm(partial, residual)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, D] -> [S, vocab_size] float32, the same on every rank."""
        return self.head(hidden)
