"""The attention layer: QKV projection, a backend's attention over the pages, output projection."""

from __future__ import annotations

from torch import Tensor

from ....comm.base import Communicator
from ....kernels.arguments import KVCache, QKNorm
from ..batch import Batch
from ..linear import ColumnLinear, Projection, RowLinear, shard_of
from ..model_config import ModelConfig
from ..norm import Normed, Residual, norm_weight
from ..weights import Weights
from .backend import AttentionBackend, Heads


class Attention:
    """QKV, optional norm of query and key heads, rotary positions, attention, output projection."""

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int, name: str) -> None:
        self.layer = layer
        self.window = config.window(layer)
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
        self.output = RowLinear(
            weights, comm, f"{name}.o_proj", config.hidden_size, q_features, bias=config.output_bias
        )
        q_norm, k_norm = (
            norm_weight(weights, f"{name}.{x}_norm.weight", config.head_dim) if config.qk_norm else None for x in "qk"
        )
        self.norm = QKNorm(q_norm, k_norm, config.norm_eps)

    def __call__(
        self,
        normed: Normed,
        residual: Residual,
        batch: Batch,
        cos_sin: Tensor,
        cache: KVCache,
        backend: AttentionBackend,
    ) -> None:
        """Add attention of `normed` [T, D] to `residual`; store its keys and values in `cache`."""
        heads = Heads(self.norm, cos_sin)
        self.output(backend.run(self.qkv(normed), heads, cache, self.window), residual)
