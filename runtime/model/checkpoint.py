"""The checkpoint of a model: its folder on this host, downloaded if needed, and its safetensors files. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...comm.message_text import first_line
from ..config import Config
from .generation_config import default_sampling_params
from .model_config import ModelConfig
from .tensor_files import EMBEDDING, FP8_DTYPES, HEAD, STORED_DTYPES, TensorFiles, check_finite, check_shapes
from .tokenizer_files import check_tokenizer_files

log = logging.getLogger(__name__)
FILE_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


class NotFetched(ValueError):
    """A hub model that is not on this host yet; a start would fetch it."""


def checkpoint_folder(model: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Return the folder `model`, or the local copy of the hub model of that id, downloaded if `fetch` is set.

    Raises ValueError, in one line, if there is neither; NotFetched if a download would help.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    from huggingface_hub import constants, snapshot_download  # costs 0.5 s: only for models from the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=FILE_PATTERNS, local_files_only=not fetch)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            kind = ValueError if constants.HF_HUB_OFFLINE else NotFetched
            raise kind(f"{model} is no folder here and not downloaded yet; hf download {model}") from None
        # The hub's errors are chains of 70 lines, whose first line says it all.
        raise ValueError(
            f"{model} is no folder here and could not be fetched from the hub: {first_line(error)}"
        ) from None


def local_folder(model: str) -> Path | None:
    """Return the folder of a checkpoint here, None for a hub id; raises ValueError for what is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"model folder {model} does not exist; give a folder with config.json, or a hub id like org/name"
        )
    return None


def find_model(config: Config) -> tuple[Path, ModelConfig]:
    """Return the checkpoint's folder and its ModelConfig; raises ValueError if no rank could load it.

    Logs what a user should know about the files.
    """
    folder = checkpoint_folder(config.model, config.revision)
    model = check_folder(config, folder)
    model.check_tensor_parallel(config.tensor_parallel_size)
    for note in model.notes:
        log.info("%s", note)
    if model.experts is not None and model.experts.mxfp4:
        log.info("weights: MXFP4 (experts)")
    if model.experts is not None and model.experts.parallel:
        log.info("experts: %s", model.experts.note(config.tensor_parallel_size))
    if model.quantization is not None:
        log.info("weights: FP8 (%s), a scale for each %s", model.quantization.method, model.quantization.granularity)
    return folder, model


def check_local_model(config: Config) -> None:
    """Raise ValueError if the model is neither a hub id nor a folder here whose files can be used.

    Takes tens of milliseconds: a command calls it before it imports torch and transformers, which take seconds.
    """
    folder = local_folder(config.model)
    if folder is not None:
        check_folder(config, folder).check_tensor_parallel(config.tensor_parallel_size)


def check_folder(config: Config, folder: Path) -> ModelConfig:
    """Return the ModelConfig of a checkpoint; raises ValueError naming the first file that cannot be used."""
    model = read_model(config, folder)
    check_tokenizer_files(folder)
    default_sampling_params(folder, config.generation_config)
    return model


def read_model(config: Config, folder: Path) -> ModelConfig:
    """Return the ModelConfig of a checkpoint; raises ValueError for a file that cannot be read or does not fit."""
    model = ModelConfig.from_folder(folder, config.generation_config).quantized_by(config.quantization)
    model = model.with_expert_parallel(config.enable_expert_parallel)
    return model if config.load_format == "dummy" else fit_weights(model, folder)


def fit_weights(model: ModelConfig, folder: Path) -> ModelConfig:
    """Check the headers of the weights; return `model`, with untied embeddings if its head differs from them.

    Every process decides this from the same bytes, so that all ranks and the memory plan agree.
    """
    with ExitStack() as stack:
        tensors = TensorFiles(folder, "np", stack)
        if model.tie_word_embeddings:
            tensors.use_tied_head()
        dimensions = _dimensions(model)
        check_shapes(dimensions, tensors, dtypes=_stored_dtypes(model))
        # Only vectors, which are small: the ranks check every number when they load.
        check_finite([name for name, shape in dimensions.items() if len(shape) == 1], tensors)
        if model.tie_word_embeddings and HEAD in tensors and not tensors.equal(HEAD, EMBEDDING):
            note = f"config.json ties the word embeddings, but {HEAD} differs from {EMBEDDING}: both are used"
            return replace(model, tie_word_embeddings=False, notes=(*model.notes, note))
    return model


def _stored_dtypes(model: ModelConfig) -> tuple[str, ...]:
    """Return the dtypes that the files may have, as safetensors names them."""
    if model.experts is not None and model.experts.mxfp4:
        return (*STORED_DTYPES, "U8")
    return STORED_DTYPES if model.quantization is None else FP8_DTYPES


def _dimensions(model: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of tensors that have each dimension of config.json.

    They are compared before any memory is allocated: a config.json with absurd numbers could ask for all of it.
    """
    hidden, names = model.hidden_size, model.names
    q, kv = (heads * model.head_dim for heads in (model.num_heads, model.num_kv_heads))
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    first = f"model.layers.{model.attention_layers[0]}"
    shapes |= _projection_shapes(first, names.qkv, (q * (1 + model.output_gate), kv, kv), hidden)
    if model.delta_net is not None and (net := model.delta_net).layers:
        features = 2 * net.key_heads * net.key_size, net.value_heads * net.value_size
        delta = f"model.layers.{min(net.layers)}.linear_attn"
        shapes[f"{delta}.in_proj_qkv.weight"] = (sum(features), hidden)
        shapes[f"{delta}.conv1d.weight"] = (sum(features), 1, net.taps)
        shapes[f"{delta}.in_proj_a.weight"] = (net.value_heads, hidden)
    dense = [n for n in range(model.num_layers) if not model.has_experts(n)]
    if dense:
        features = (model.intermediate_size,) * 2
        shapes |= _projection_shapes(f"model.layers.{dense[0]}", names.gate_up, features, hidden)
    if model.experts is not None and len(dense) < model.num_layers:
        rules = model.experts.rules
        mlp = f"model.layers.{min(model.experts.layers)}.{rules.block}"
        n, width = model.experts.num_experts, model.experts.intermediate_size
        if model.experts.clamped is None:
            first = f"{mlp}.experts.0.{rules.projections[0]}.weight"
            shapes |= {f"{mlp}.gate.weight": (n, hidden), first: (width, hidden)}
        else:
            shapes |= {f"{mlp}.router.weight": (n, hidden), f"{mlp}.experts.gate_up_proj_bias": (n, 2 * width)}
    if model.sinks:
        shapes["model.layers.0.self_attn.sinks"] = (model.num_heads,)
    return shapes | {f"model.layers.{n}.{names.norms[0]}.weight": (hidden,) for n in range(model.num_layers)}


def _projection_shapes(
    layer: str, names: Sequence[str], features: Sequence[int], hidden: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors with these features, or of one that has the features of all."""
    sizes = [sum(features)] if len(names) == 1 else features
    return {f"{layer}.{name}.weight": (size, hidden) for name, size in zip(names, sizes, strict=True)}
