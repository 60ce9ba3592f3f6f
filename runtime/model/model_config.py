"""The description of a model, read from the config.json of its checkpoint.

Both formats are supported: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype` and
`rope_parameters` of transformers 5. To add a model, add its row to ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

from .end_tokens import EndTokens
from .generation_config import generation_fields, not_applied
from .hf_config import HFConfigReader, exists
from .rope import RopeConfig

Windows = Literal["never", "always", "flagged", "flagged, upper layers"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The differences of a model family from the plain decoder."""

    qkv_bias: bool = False  # q, k and v have a bias, regardless of config.json
    bias_flags: bool = False  # attention_bias (q, k, v, o) and mlp_bias of config.json apply
    qk_norm: bool = False  # RMSNorm of each query and key head
    experts: bool = False  # a mixture of experts in place of some MLPs
    windows: Windows = "never"  # sliding_window of config.json applies; "flagged": if use_sliding_window is set
    defaults: Mapping[str, int]  # fields that config.json may leave out, as in transformers' class of the family


LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
MISTRAL = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(bias_flags=True, defaults=LLAMA),
    "MistralForCausalLM": Architecture(windows="always", defaults=MISTRAL),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, windows="flagged, upper layers", defaults=QWEN2),
    "Qwen3ForCausalLM": Architecture(
        bias_flags=True, qk_norm=True, windows="flagged, upper layers", defaults=QWEN2 | {"head_dim": 128}
    ),
    "Qwen3MoeForCausalLM": Architecture(
        bias_flags=True, qk_norm=True, experts=True, windows="flagged", defaults=QWEN3_MOE
    ),
}
MAX_LAYERS = 10_000
MAX_POSITIONS = 100_000_000  # the rotary table of a rank has a row for each

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # itemsize in bytes


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts of the layers in `layers`."""

    num_experts: int
    num_per_token: int
    intermediate_size: int  # features of one expert
    normalized: bool  # the scores of a token's experts are scaled to sum up to 1
    layers: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One whole model, independent of ranks."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool  # the attention's output projection has a bias
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: number of keys that a query sees, its own included; None for all
    experts: Experts | None
    dtype: str  # the checkpoint's dtype, one of DTYPES
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]  # ascending
    notes: tuple[str, ...] = field(default=(), compare=False)  # sentences for the log about the checkpoint's files

    @classmethod
    def from_folder(cls, folder: str | Path, generation_config: str = "auto") -> ModelConfig:
        """Read config.json and the EOS tokens of all files; raises ValueError naming the wrong field.

        generation_config  where generation_config.json is; see Config
        """
        folder = Path(folder)
        model, fields = cls.from_config_file(folder), HFConfigReader.from_file(folder / "config.json")
        generation = generation_fields(folder, generation_config)
        end = EndTokens.from_files(folder, model.vocab_size, (fields, generation))
        notes = (*end.notes, *_ignored_fields(fields, generation, generation_config))
        return replace(model, eos_token_ids=end.ids, notes=notes)

    @classmethod
    def from_config_file(cls, folder: Path) -> ModelConfig:
        """Read config.json alone."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
        if not exists(folder / "config.json"):
            raise ValueError(f"{folder} has no config.json, so it is not a model; give the folder of a checkpoint")
        return cls.from_hf(HFConfigReader.from_file(folder / "config.json").values)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the contents of config.json."""
        name, architecture = _architecture(HFConfigReader(hf))
        fields = HFConfigReader({**architecture.defaults, **hf})
        _refuse_unsupported(fields)
        num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
        num_heads = fields.integer("num_attention_heads")
        hidden_size = fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", max(hidden_size // num_heads, 1))
        attention_bias = architecture.bias_flags and fields.flag("attention_bias", False)
        vocab_size = fields.integer("vocab_size")
        end = EndTokens.of({"config.json": fields.integers("eos_token_id")}, vocab_size)
        rope = RopeConfig.from_hf(fields)
        config = cls(
            architecture=name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps", 1e-6, maximum=1.0),
            rope=rope,
            qkv_bias=architecture.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=architecture.bias_flags and fields.flag("mlp_bias", False),
            qk_norm=architecture.qk_norm,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            windows=_windows(fields, architecture.windows, num_layers),
            experts=_experts(fields, num_layers) if architecture.experts else None,
            dtype=_dtype(fields),
            max_position_embeddings=_num_positions(fields, rope),
            eos_token_ids=end.ids,
            notes=end.notes,
        )
        config._check()
        return config

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers

    def kv_heads_of_rank(self, rank: int, size: int) -> range:
        """Return the KV heads of this rank's query heads; with more ranks than KV heads, ranks share one."""
        count = max(self.num_kv_heads // size, 1)
        first = rank * self.num_kv_heads // size
        return range(first, first + count)

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ValueError, with the possible sizes, if the model cannot be split over `size` ranks."""
        problems = self._unsplittable(size)
        if problems:
            raise ValueError(
                f"{', '.join(problems)} cannot be split over {size} ranks; "
                f"use tensor_parallel_size={', '.join(map(str, self.tensor_parallel_sizes()))}"
            )

    def tensor_parallel_sizes(self) -> list[int]:
        """Return the numbers of ranks, up to 64, over which the model can be split."""
        return [n for n in range(1, min(self.num_heads, 64) + 1) if not self._unsplittable(n)]

    def _unsplittable(self, size: int) -> list[str]:
        """Return the parts that `size` ranks cannot share evenly. Key heads may be replicated evenly instead."""
        problems = []
        if self.num_heads % size:
            problems.append(f"{self.num_heads} attention heads")
        if self.num_kv_heads % size and size % self.num_kv_heads:
            problems.append(f"{self.num_kv_heads} kv heads")
        # The MLP's size does not count if every layer has experts.
        sizes = {self.experts.intermediate_size} if self.experts and self.experts.layers else set()
        if not all(map(self.has_experts, range(self.num_layers))):
            sizes.add(self.intermediate_size)
        return problems + [f"{features} intermediate features" for features in sorted(sizes) if features % size]

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: {self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim is {self.head_dim}; rotary positions need an even one")


def _architecture(fields: HFConfigReader) -> tuple[str, Architecture]:
    names = fields.texts("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    raise ValueError(
        f"config.json: architecture {', '.join(shortened(n)[1:-1] for n in names) or 'not given'} is not supported; "
        f"the supported ones are {', '.join(ARCHITECTURES)}"
    )


def _ignored_fields(fields: HFConfigReader, generation: HFConfigReader, choice: str) -> Iterator[str]:
    """Yield a sentence on each kind of field that would change the output elsewhere and has no effect here."""
    if "auto_map" in fields:
        yield "config.json: auto_map names Python code of the checkpoint, which is never run"
    names = [] if choice == "lockstep" else not_applied(generation)
    if names:
        yield f"{generation.source}: {', '.join(names)} of transformers' generate have no effect here"


def _num_positions(fields: HFConfigReader, rope: RopeConfig) -> int:
    positions = max(fields.integer("max_position_embeddings", maximum=MAX_POSITIONS), rope.extended_positions)
    if positions > MAX_POSITIONS:
        raise ValueError(
            f"config.json: factor {rope.factor:g} extends {rope.original_positions} positions to {positions}; "
            f"they must be at most {MAX_POSITIONS}"
        )
    return positions


def _refuse_unsupported(fields: HFConfigReader) -> None:
    if "quantization_config" in fields:
        method = shortened(fields.nested("quantization_config").text("quant_method", "unknown"))[1:-1]
        raise ValueError(
            f"config.json: quantization_config ({method}) is not supported; use the checkpoint in bfloat16 or float16"
        )
    fields.text("model_type", "")  # transformers reads it for the tokenizer
    act = fields.text("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"config.json: hidden_act {shortened(act)} is not supported; it must be 'silu'")


def _dtype(fields: HFConfigReader) -> str:
    # The default is bfloat16, in which nearly all models of these families are published.
    name = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"config.json: dtype {shortened(name)} is not supported; the supported ones are {', '.join(DTYPES)}"
        )
    return name


def _windows(fields: HFConfigReader, rule: Windows, num_layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer. An absent field means transformers' default of 4096, null means none."""
    enabled = rule == "always" or (rule != "never" and fields.flag("use_sliding_window", False))
    if not enabled or fields.values.get("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = fields.integer("sliding_window", 4096)
    if rule != "flagged, upper layers":
        return (window,) * num_layers
    if "layer_types" in fields:
        sliding = [kind == "sliding_attention" for kind in fields.texts("layer_types")]
    else:
        first = fields.integer("max_window_layers", 28, minimum=0)
        sliding = [layer >= first for layer in range(num_layers)]
    if len(sliding) != num_layers:
        raise ValueError(
            f"config.json: layer_types has {len(sliding)} entries; it must have one for each of the {num_layers} layers"
        )
    return tuple(window if is_sliding else None for is_sliding in sliding)


def _experts(fields: HFConfigReader, num_layers: int) -> Experts:
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    experts = Experts(
        num_experts=fields.integer("num_local_experts" if "num_local_experts" in fields else "num_experts"),
        num_per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        normalized=fields.flag("norm_topk_prob", False),
        layers=frozenset(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0),
    )
    if experts.num_per_token > experts.num_experts:
        raise ValueError(
            f"config.json: num_experts_per_tok is {experts.num_per_token}; "
            f"it must be at most num_experts, {experts.num_experts}"
        )
    return experts
