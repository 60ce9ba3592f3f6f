"""The logits of one prompt that a Decoder computes at once, on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lockstep.comm.base import Communicator
from lockstep.kernels.arguments import StateRows
from lockstep.runtime.model.attention.backend import TorchAttention
from lockstep.runtime.model.batch import Batch, HostBatch
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.kv_pool import KVPool
from lockstep.runtime.model.kv_scales import apply_kv_scales
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.state_pool import StatePool
from lockstep.runtime.model.weights import load_weights

CPU = torch.device("cpu")


def prompt_logits(
    comm: Communicator,
    folder: Path,
    prompt: Tensor,
    option: str = "auto",
    kv_dtype: torch.dtype = torch.float32,
    *,
    expert_parallel: bool = False,
) -> Tensor:
    """Return the logits [T, vocabulary] of a prompt [T]; `option` is that of --quantization."""
    config, length = ModelConfig.from_folder(folder).quantized_by(option), len(prompt)
    config = config.with_expert_parallel(expert_parallel)
    decoder = Decoder(config, comm, dtype=torch.float32, device=CPU, max_positions=length)
    load_weights(decoder.weights, folder)
    if kv_dtype == torch.float8_e4m3fn:
        apply_kv_scales(decoder, folder)
    positions = torch.arange(length, dtype=torch.int32)
    groups = torch.arange(1 + config.layer_groups.num_window_groups, dtype=torch.int32)
    kv_slots = positions + length * groups.unsqueeze(1)  # each group of layers has one page
    host = HostBatch(
        slots=np.zeros(length, np.int32),
        positions=positions.numpy(),
        kv_slots=kv_slots.numpy(),
        page_table=groups.view(-1, 1, 1).numpy(),
        query_starts=np.array([0, length], np.int32),
        kv_lengths=np.array([length], np.int32),
        num_decoding=0,
    )
    batch = Batch(
        token_ids=prompt.int(),
        positions=positions,
        kv_slots=kv_slots,
        page_table_rows=torch.zeros(length, dtype=torch.int32),
        device_page_table=groups.view(-1, 1, 1),
        host=host,
        state_rows=StateRows(torch.zeros(1, dtype=torch.int32), torch.from_numpy(host.query_starts)),
    )
    pool = KVPool(decoder.attention_shape(length, torch.float32, kv_dtype), len(groups), CPU, "layer-first")
    shape = decoder.state_shape(torch.float32)
    states = None if shape is None else StatePool(shape, 1, CPU)
    attention = TorchAttention(config.attention_multiplier, config.attention_softcap)
    attention.plan(batch)
    return decoder.logits(decoder.forward(batch, pool, attention, states)).gather()
