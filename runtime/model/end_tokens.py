"""The end-of-sequence tokens of a checkpoint: all that config.json, generation_config.json and its tokenizer name.

Fine-tunes often change one of the three only, and would run past their end if it did not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .hf_config import HFConfigReader
from .tokenizer_files import SETTINGS, eos_token_id


@dataclass(frozen=True)
class EndTokens:
    """The valid EOS ids, in ascending order, and a sentence for the log on each fact that a user should know."""

    ids: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_files(cls, folder: Path, vocab_size: int, configs: Sequence[HFConfigReader]) -> EndTokens:
        """Read the `eos_token_id` of `configs` and the EOS token of the tokenizer in `folder`."""
        by_file = {fields.source: fields.integers("eos_token_id") for fields in configs if "eos_token_id" in fields}
        token = eos_token_id(folder)
        if token is not None:
            by_file[SETTINGS] = [token]
        return cls.of(by_file, vocab_size)

    @classmethod
    def of(cls, by_file: dict[str, list[int]], vocab_size: int) -> EndTokens:
        """Return the union of the ids of each file, without those that the model cannot sample."""
        notes, valid = [], {}
        for source, ids in by_file.items():
            valid[source] = sorted({i for i in ids if 0 <= i < vocab_size})
            dropped = sorted(set(ids) - set(valid[source]))
            if dropped:
                notes.append(
                    f"{source}: the end-of-sequence ids {_text(dropped)} are dropped; the model has ids 0 to"
                    f" {vocab_size - 1}"
                )
        union = sorted({i for ids in valid.values() for i in ids})
        if any(ids != union for ids in valid.values()):
            files = ", ".join(f"{source} has {_text(ids) or 'none'}" for source, ids in valid.items())
            notes.append(f"end of sequence: {files}; each of {_text(union)} ends an output")
        return cls(tuple(union), tuple(notes))


def _text(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
