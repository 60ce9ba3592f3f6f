"""Perplexity of a model over a text with FP8 weights, activations and KV cache, and the KL divergence from float32.

    python scripts/bench/fp8_quality.py --model launch/demo --text text.txt

Documents of the text are separated by two empty lines. Needs a GPU of compute capability 9.0 for FP8 activations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lockstep.comm.base import SingleRank
from lockstep.kernels.cuda import scaled_gemm
from lockstep.runtime.model.attention.backend import TorchAttention
from lockstep.runtime.model.batch import Batch, HostBatch
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.kv_pool import KVPool
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.weights import load_weights

DEVICE = torch.device("cuda")
FP8 = torch.float8_e4m3fn
VARIANTS = {  # dtype, --quantization, FP8 activations, dtype of the KV cache
    "float32": (torch.float32, "auto", False, torch.float32),
    "bfloat16": (torch.bfloat16, "auto", False, torch.bfloat16),
    "FP8 weights": (torch.bfloat16, "fp8", False, torch.bfloat16),
    "FP8 weights and activations": (torch.bfloat16, "fp8", True, torch.bfloat16),
    "FP8 KV cache": (torch.bfloat16, "auto", False, FP8),
    "FP8 weights, activations and KV cache": (torch.bfloat16, "fp8", True, FP8),
}


def batch_of(tokens: Tensor) -> Batch:
    length = len(tokens)
    positions = torch.arange(length, dtype=torch.int32, device=DEVICE)
    host = HostBatch(
        slots=np.zeros(length, np.int32),
        positions=np.arange(length, dtype=np.int32),
        kv_slots=np.arange(length, dtype=np.int32)[None],
        page_table=np.zeros((1, 1, 1), np.int32),
        query_starts=np.array([0, length], np.int32),
        kv_lengths=np.array([length], np.int32),
        num_decoding=0,
    )
    zeros = torch.zeros_like(positions)
    return Batch(
        token_ids=tokens.int(),
        positions=positions,
        kv_slots=positions[None],
        page_table_rows=zeros,
        device_page_table=zeros[None, None],
        host=host,
    )


@torch.inference_mode()
def log_probabilities(model: Path, documents: list[Tensor], variant: str) -> list[Tensor]:
    """Return the log-probabilities [T, vocabulary] of every document, float32."""
    dtype, option, fp8_activations, kv_dtype = VARIANTS[variant]
    config = ModelConfig.from_folder(model).quantized_by(option)
    longest = max(map(len, documents))
    decoder = Decoder(config, SingleRank(), dtype=dtype, device=DEVICE, max_positions=longest)
    load_weights(decoder.weights, model)
    pool = KVPool(decoder.attention_shape(longest, dtype, kv_dtype), 1, DEVICE, "layer-first")
    attention = TorchAttention(config.attention_multiplier)
    takes = scaled_gemm.takes if fp8_activations else lambda x, weight: False
    results = []
    with mock.patch.object(scaled_gemm, "takes", takes):
        for tokens in documents:
            batch = batch_of(tokens)
            attention.plan(batch)
            logits = decoder.logits(decoder.forward(batch, pool, attention)).gather()
            results.append(logits.float().log_softmax(-1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = options.text.read_text().split("\n\n\n")
    documents = [torch.tensor(tokenizer(text)["input_ids"], device=DEVICE) for text in texts if text.strip()]
    exact = log_probabilities(options.model, documents, "float32")
    for variant in VARIANTS:
        results = log_probabilities(options.model, documents, variant)
        costs = torch.cat([-r[:-1].gather(1, d[1:, None])[:, 0] for r, d in zip(results, documents, strict=True)])
        divergences = torch.cat([(e.exp() * (e - r)).sum(-1) for e, r in zip(exact, results, strict=True)])
        perplexity, divergence = costs.mean().exp().item(), divergences.mean().item()
        print(f"{variant:<40} perplexity {perplexity:.4f}   KL {divergence:.6f}   of {len(costs)} tokens")


if __name__ == "__main__":
    main()
