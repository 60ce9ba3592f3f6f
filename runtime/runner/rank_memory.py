"""All memory that one rank's steps read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..model.attention.backend import AttentionBackend
from ..model.decoder import Decoder
from ..model.kv_pool import KVPool
from ..sampling.grammar_state import GrammarStates
from ..sampling.sampler import Sampler
from .readback import PinnedReadback
from .slot_tables import SlotTables


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Weights, KV cache and the state of every slot. CUDA graphs know these tensors by address."""

    decoder: Decoder
    attention: AttentionBackend
    pool: KVPool
    tables: SlotTables
    sampler: Sampler
    grammars: GrammarStates
    readback: PinnedReadback

    @property
    def device(self) -> torch.device:
        return self.tables.tokens.device
