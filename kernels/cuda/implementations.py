"""All CUDA implementations in one namespace, where ops.py looks them up by the name of the op."""

from .elementwise import add_rms_norm, rms_norm, silu_and_mul
from .experts import experts
from .gemm import linear
from .paged_attention import decode_attention, partition_keys, rotate_and_store_, store_kv_
from .table_lookup import append_tokens_, begin_decode_, gather_rows
from .token_sampling import (
    gumbel_argmax,
    mask_top_k_top_p,
    merge_candidates,
    sample_top_p,
    sample_topk,
    topk_candidates,
)

__all__ = [
    "add_rms_norm",
    "append_tokens_",
    "begin_decode_",
    "decode_attention",
    "experts",
    "gather_rows",
    "gumbel_argmax",
    "linear",
    "mask_top_k_top_p",
    "merge_candidates",
    "partition_keys",
    "rms_norm",
    "rotate_and_store_",
    "sample_top_p",
    "sample_topk",
    "silu_and_mul",
    "store_kv_",
    "topk_candidates",
]
