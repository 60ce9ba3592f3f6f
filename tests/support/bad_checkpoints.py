"""Generated checkpoints that cannot be used: the demo model with one damage each, and the file that it concerns."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lockstep.runtime.config import DEMO_MODEL

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX
)  # fmt: skip
NORM, EMBEDDING, UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"


def copy_of_demo(folder: Path) -> Path:
    """Copy the demo model, with the two files that it lacks, into `folder`."""
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    names = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    return folder


def edit(name: str, folder: Path, **changes: Any) -> None:
    """Set fields of a JSON file."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object], folder: Path) -> None:
    """Change the tensors of the checkpoint in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    edit(INDEX, folder, weight_map=dict.fromkeys(tensors, WEIGHTS))


def _replace(make: Callable[[Path], object], path: Path) -> None:
    path.unlink()
    make(path)


def _rewrite(change: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(change(path.read_bytes()))


SPECIAL_FILES: dict[str, Callable[[Path], object]] = {
    "FIFO": partial(_replace, os.mkfifo),
    "folder": partial(_replace, Path.mkdir),
    "link to itself": partial(_replace, lambda path: path.symlink_to(path)),
    "broken link": partial(_replace, lambda path: path.symlink_to("nowhere")),
    "device": partial(_replace, lambda path: path.symlink_to("/dev/zero")),
    "empty": partial(_rewrite, lambda _: b""),
    "truncated": partial(_rewrite, lambda content: content[: len(content) // 2]),
    "NUL bytes": partial(_rewrite, lambda content: b"\0" * len(content)),
    "HTML": partial(_rewrite, lambda _: b"<!doctype html><title>404</title>"),
}
BAD_JSON: dict[str, Callable[[bytes], bytes]] = {
    "BOM": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "not UTF-8": lambda content: content[:-2] + b', "x": "\xff"}',
    "nested 100,000 deep": lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "list": lambda content: b"[" + content + b"]",
    "number": lambda content: b"7",
    "two objects": lambda content: content + content,
}
INTEGERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "head_dim",
)  # fmt: skip
BAD_INTEGERS: dict[str, Any] = {
    "0": 0, "-1": -1, "1.5": 1.5, "text": "64", "true": True, "list": [64], "10^12": 10**12, "5,000 digits": 10**4000,
}  # fmt: skip
BAD_NUMBERS: dict[str, Any] = {"0": 0, "-1": -1.0, "text": "1e-5", "NaN": float("nan"), "infinity": float("inf")}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG: dict[str, dict[str, Any]] = {
    **{f"{name} {kind}": {name: value} for name in INTEGERS for kind, value in BAD_INTEGERS.items()},
    **{f"rms_norm_eps {kind}": {"rms_norm_eps": value} for kind, value in {**BAD_NUMBERS, "2": 2.0}.items()},
    **{f"rope_theta {kind}": {"rope_theta": value} for kind, value in {**BAD_NUMBERS, "1e300": 1e300}.items()},
    **{
        f"linear factor {kind}": {"rope_scaling": {"type": "linear", "factor": value}}
        for kind, value in BAD_NUMBERS.items()
    },
    "10^7 layers": {"num_hidden_layers": 10**7},
    "one layer more": {"num_hidden_layers": 6},
    "another vocabulary": {"vocab_size": 2049},
    "more query heads than weights": {"num_attention_heads": 8},
    "odd head_dim": {"head_dim": 63},
    "kv heads that do not divide": {"num_key_value_heads": 3},
    "unknown architecture": {"architectures": ["GPT2LMHeadModel"]},
    "architecture of two lines": {"architectures": ["Llama\nForCausalLM"]},
    "architectures text": {"architectures": "LlamaForCausalLM"},
    "no architecture": {"architectures": []},
    "dtype": {"torch_dtype": "int8"},
    "dtype number": {"torch_dtype": 16},
    "activation": {"hidden_act": "gelu\n"},
    "tie text": {"tie_word_embeddings": "yes"},
    "bias number": {"attention_bias": 0},
    "eos text": {"eos_token_id": "</s>"},
    "eos float": {"eos_token_id": 2.0},
    "eos true": {"eos_token_id": [True]},
    "quantized": {"quantization_config": {"quant_method": "gptq"}},
    "quantized list": {"quantization_config": [1]},
    "rope list": {"rope_scaling": [1]},
    "rope type": {"rope_scaling": {"rope_type": "longrope\n", "factor": 2.0}},
    "rope per layer type": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "llama3 factors": {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
    "llama3 without factor": {"rope_scaling": {"rope_type": "llama3"}},
    "yarn theta": {"rope_scaling": YARN, "rope_theta": 1.0},
    "yarn positions": {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
    "yarn extended": {"rope_scaling": {**YARN, "factor": 1e9}},
    "model_type list": {"model_type": ["llama"]},
}
GENERATION: dict[str, dict[str, Any]] = {
    "temperature 3": {"temperature": 3.0},
    "temperature text": {"temperature": "hot"},
    "temperature NaN": {"temperature": float("nan")},
    "top_k 50.0": {"top_k": 50.0},
    "top_k true": {"top_k": True},
    "top_k 10^25": {"top_k": 10**25},
    "temperature 10^400": {"temperature": 10**400},
    "top_p 0": {"top_p": 0},
    "top_p list": {"top_p": [0.9]},
    "min_p 2": {"min_p": 2},
    "repetition_penalty 0": {"repetition_penalty": 0.0},
    "repetition_penalty infinity": {"repetition_penalty": float("inf")},
    "max_new_tokens 0": {"max_new_tokens": 0},
    "max_new_tokens 10^30": {"max_new_tokens": 10**30},
    "max_new_tokens text": {"max_new_tokens": "20"},
    "eos text": {"eos_token_id": "<|eos|>"},
    "eos object": {"eos_token_id": {"id": 1}},
}
TOKENIZER_CONFIG: dict[str, dict[str, Any]] = {
    "added_tokens_decoder list": {"added_tokens_decoder": []},
    "added_tokens_decoder key": {"added_tokens_decoder": {"a": {"content": "x"}}},
    "added_tokens_decoder text": {"added_tokens_decoder": {"5": "x"}},
    "added_tokens_decoder no content": {"added_tokens_decoder": {"5": {}}},
    "eos_token list": {"eos_token": ["<|eos|>"]},
    "eos_token number": {"eos_token": 1},
    "eos_token object": {"eos_token": {"special": True}},
    "bos_token list": {"bos_token": []},
    "tokenizer_class list": {"tokenizer_class": ["Fast"]},
    "auto_map number": {"auto_map": 7},
    "chat_template number": {"chat_template": 7},
    "extra_special_tokens number": {"extra_special_tokens": 7},
    "padding_side": {"padding_side": "up"},
}
TOKENIZER: dict[str, dict[str, Any]] = {
    "newer model": {"model": {"type": "Quantum", "vocab": {}}},
    "newer decoder": {"decoder": {"type": "Quantum"}},
    "newer normalizer": {"normalizer": {"type": "Quantum"}},
    "newer pre-tokenizer": {"pre_tokenizer": {"type": "Quantum"}},
    "version": {"version": "9.0"},
    "no model": {"model": None},
    "no tokens": {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
    "post-processor that panics": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "model list": {"model": []},
    "added token id text": {"added_tokens": [{"id": "0", "content": "<|bos|>"}]},
    "added tokens object": {"added_tokens": {}},
    "bad regex": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    },
}
INDEX_EDITS: dict[str, dict[str, Any]] = {
    "weight_map list": {"weight_map": []},
    "weight_map empty": {"weight_map": {}},
    "weight_map number": {"weight_map": {NORM: 7}},
    "missing shard": {"weight_map": {NORM: "model-00002-of-00002.safetensors"}},
    "outside": {"weight_map": {NORM: "../model.safetensors"}},
    "name of two lines": {"weight_map": {NORM: "a\nb.safetensors"}},
    "NUL": {"weight_map": {NORM: "a\0b.safetensors"}},
    "lone surrogate": {"weight_map": {NORM: "\ud800.safetensors"}},
    "name of 5,000 characters": {"weight_map": {NORM: "a" * 5000}},
    "name without characters": {"weight_map": {NORM: ""}},
}


def _fill(name: str, value: float, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name].fill_(value)


def _one(name: str, value: float, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name].view(-1)[-1] = value


def _cast(name: str, dtype: torch.dtype, tensors: dict[str, torch.Tensor]) -> None:
    tensors[name] = tensors[name].to(dtype)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "all NaN": lambda tensors: [tensor.fill_(float("nan")) for tensor in tensors.values()],
    "norm NaN": partial(_fill, NORM, float("nan")),
    "one NaN": partial(_one, UP, float("nan")),
    "one infinity": partial(_one, UP, float("inf")),
    "one -infinity": partial(_one, EMBEDDING, float("-inf")),
    "int16": partial(_cast, UP, torch.int16),
    "all int8": lambda tensors: [_cast(name, torch.int8, tensors) for name in tensors],
    "bool": partial(_cast, EMBEDDING, torch.bool),
    "float8": partial(_cast, UP, torch.float8_e4m3fn),
    "missing": lambda tensors: tensors.pop(UP),
    "no embedding": lambda tensors: tensors.pop(EMBEDDING),
    "unexpected": lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}),
    "transposed": lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}),
    "one dimension more": lambda tensors: tensors.update({NORM: tensors[NORM][None]}),
    "nothing": lambda tensors: tensors.clear(),
}


def _header(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    """Rewrite the header of the safetensors file, and leave its data as it is."""
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "offsets beyond the end": lambda header: header[NORM].update(data_offsets=[0, 10**12]),
    "negative offsets": lambda header: header[NORM].update(data_offsets=[-8, 0]),
    "overlap": lambda header: header[NORM].update(data_offsets=header[UP]["data_offsets"]),
    "unknown dtype": lambda header: header[NORM].update(dtype="Q4"),
    "shape of 10^18": lambda header: header[NORM].update(shape=[10**18]),
    "shape text": lambda header: header[NORM].update(shape="128"),
}


def _duplicate(folder: Path) -> None:
    """Save a tensor in two files, of which no index chooses."""
    (folder / INDEX).unlink()
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    save_file({NORM: torch.ones(128)}, folder / "b.safetensors")


def cases() -> Iterator[tuple[str, Damage, str]]:
    """Yield the name of each case, the damage, and a file name that the error must have."""
    for name in (*JSON_FILES, WEIGHTS):
        for kind, make in SPECIAL_FILES.items():
            yield f"{name}: {kind}", lambda folder, name=name, make=make: make(folder / name), name
    for name in JSON_FILES:
        for kind, change in BAD_JSON.items():
            yield f"{name}: {kind}", lambda folder, name=name, change=change: _rewrite(change, folder / name), name
    edits = {"config.json": CONFIG, "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER_CONFIG}
    for name, changes in {**edits, "tokenizer.json": TOKENIZER, INDEX: INDEX_EDITS}.items():
        for kind, fields in changes.items():
            yield f"{name}: {kind}", partial(edit, name, **fields), name
    for kind, change_tensors in TENSORS.items():
        yield f"{WEIGHTS}: {kind}", partial(edit_weights, change_tensors), ""
    for kind, change_header in HEADERS.items():
        yield f"{WEIGHTS}: {kind}", partial(_header, change_header), WEIGHTS
    yield "two files have a tensor", _duplicate, "b.safetensors"
    yield "no config.json", lambda folder: (folder / "config.json").unlink(), "config.json"
    yield "no tokenizer.json", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"


CASES = {name: (damage, file) for name, damage, file in cases()}
