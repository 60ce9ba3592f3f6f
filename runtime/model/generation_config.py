"""generation_config.json: the sampling parameters that a checkpoint recommends. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..sampling_params import SamplingParams
from .hf_config import HFConfigReader, exists

FILE = "generation_config.json"
SAME_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
RECOMMENDED = dict(zip(SAME_NAMES, SAME_NAMES, strict=True)) | {"max_new_tokens": "max_tokens"}  # field -> parameter
# Fields that would change the output and that this runtime does not have, with their neutral values in transformers.
NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}


def generation_fields(folder: Path, choice: str) -> HFConfigReader:
    """Return the fields of generation_config.json, none if there is no file.

    `choice` is Config.generation_config: a folder is read instead of `folder`, and must have the file.
    """
    if choice not in ("auto", "lockstep"):
        folder = Path(choice).expanduser()
        if not exists(folder / FILE):
            raise ValueError(
                f"generation_config={choice!r} has no {FILE}; give auto, lockstep, or a folder with this file"
            )
    path = folder / FILE
    return HFConfigReader.from_file(path) if exists(path) else HFConfigReader({}, FILE)


def default_sampling_params(folder: Path, choice: str = "auto") -> SamplingParams:
    """Return the recommendation in generation_config.json; the defaults without one, or if `choice` is lockstep.

    Raises ValueError naming the file, the field, its value and the rule, if a value is none that a request may have.
    """
    if choice == "lockstep":
        return SamplingParams()
    fields = generation_fields(folder, choice)
    recommended = {name: fields.values[name] for name in RECOMMENDED if name in fields}
    for name, value in recommended.items():  # one by one, to name the field
        try:
            SamplingParams(**{RECOMMENDED[name]: value})
        except ValueError as error:
            rule = str(error).replace(f"{RECOMMENDED[name]}=", f"{name}=", 1)
            raise ValueError(
                f"{fields.source}: {rule}; correct it there, or leave the file out with generation_config=lockstep"
            ) from error
    return SamplingParams(**{RECOMMENDED[name]: value for name, value in recommended.items()})


def not_applied(fields: HFConfigReader) -> list[str]:
    """Return the names of the fields that would change the output in transformers and do not here."""
    return [name for name, neutral in NOT_APPLIED.items() if name in fields and fields.values[name] not in neutral]
