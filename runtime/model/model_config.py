"""The description of a model, read from the config.json of its checkpoint.

Both formats are supported: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype` and
`rope_parameters` of transformers 5. The rules of each model family are its row in families.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from .delta_net_config import DeltaNetConfig
from .end_tokens import EndTokens
from .expert_config import MXFP4_BLOCK, ExpertConfig
from .families import ARCHITECTURES, TEXT_PARTS, Activation, Architecture, Flag, QKNormKind, TensorNames
from .generation_config import generation_fields, not_applied
from .hf_config import HFConfigReader, exists
from .layer_groups import LayerGroups
from .layer_rules import ropes_of_layers, windows_of_layers
from .quantization import Quantization, is_mxfp4
from .rank_shares import HeadShare, share_of_heads
from .rope import RopeConfig

ACTIVATIONS = {"silu": ("hidden_act", "silu"), "gelu": ("hidden_activation", "gelu_pytorch_tanh")}
MAX_LAYERS = 10_000
MAX_POSITIONS = 100_000_000  # the rotary table of a rank has a row for each

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # itemsize in bytes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One whole model, independent of ranks."""

    architecture: str
    names: TensorNames
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    ropes: tuple[RopeConfig | None, ...]  # per layer; None: no rotation
    adjacent_pairs: bool  # q and k of the checkpoint have the two elements of a rotated pair next to each other
    qkv_bias: bool
    output_bias: bool  # the attention's output projection has a bias
    mlp_bias: bool
    qk_norm: QKNormKind
    sinks: bool  # each query head has an attention sink
    embedding_multiplier: float  # factor of the rows of the embedding
    residual_multiplier: float  # factor of the results of attention, MLP and experts
    attention_multiplier: float  # factor of the attention scores
    logits_scaling: float  # divides the logits
    attention_softcap: float | None  # bounds the scores of attention by a tanh
    logits_softcap: float | None  # bounds the logits by a tanh
    activation: Activation
    zero_centred_norms: bool  # the checkpoint has the weights of norms less 1
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # per layer: number of keys that a query sees, its own included; None for all
    experts: ExpertConfig | None
    output_gate: bool  # a gate of the attention's result, whose rows follow those of each head of q
    delta_net: DeltaNetConfig | None
    dtype: str  # the checkpoint's dtype, one of DTYPES
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]  # ascending
    num_draft_layers: int = 0  # layers after the last one that draft several tokens; they are not used
    quantization: Quantization | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)  # sentences for the log about the checkpoint's files

    @classmethod
    def from_folder(cls, folder: str | Path, generation_config: str = "auto") -> ModelConfig:
        """Read config.json and the EOS tokens of all files; raises ValueError naming the wrong field.

        generation_config  where generation_config.json is; see Config
        """
        folder = Path(folder)
        model = cls.from_config_file(folder)
        fields = HFConfigReader(text_fields(HFConfigReader.from_file(folder / "config.json").values))
        generation = generation_fields(folder, generation_config)
        end = EndTokens.from_files(folder, model.vocab_size, (fields, generation))
        notes = (*end.notes, *_ignored_fields(fields, generation, generation_config), *_longrope_notes(model))
        return replace(model, eos_token_ids=end.ids, notes=notes)

    @classmethod
    def from_config_file(cls, folder: Path) -> ModelConfig:
        """Read config.json alone."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder of a Hugging Face checkpoint")
        if not exists(folder / "config.json"):
            raise ValueError(f"{folder} has no config.json, so it is not a model; give the folder of a checkpoint")
        fields = HFConfigReader.from_file(folder / "config.json")
        return cls.from_hf(fields.values)._quantized(Quantization.from_folder(folder, fields))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the contents of config.json."""
        name, architecture = _architecture(HFConfigReader(hf))
        fields = HFConfigReader({**architecture.defaults, **text_fields(hf)})
        _refuse_unsupported(fields, architecture)
        num_layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
        num_heads = fields.integer("num_attention_heads")
        hidden_size = fields.integer("hidden_size")
        head_dim = fields.integer("head_dim", max(hidden_size // num_heads, 1))
        vocab_size = fields.integer("vocab_size")
        end = EndTokens.of({"config.json": fields.integers("eos_token_id")}, vocab_size)
        ropes = ropes_of_layers(fields, architecture, num_layers)
        config = cls(
            architecture=name,
            **_family_fields(fields, architecture, hidden_size, head_dim),
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer(architecture.intermediate_size),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            norm_eps=fields.number("rms_norm_eps", 1e-6, maximum=1.0),
            ropes=ropes,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            windows=windows_of_layers(fields, architecture.windows, num_layers),
            delta_net=DeltaNetConfig.from_hf(fields, num_layers) if architecture.delta_net else None,
            experts=ExpertConfig.from_hf(fields, architecture.experts, num_layers) if architecture.experts else None,
            dtype=_dtype(fields),
            max_position_embeddings=_num_positions(fields, ropes),
            eos_token_ids=end.ids,
            num_draft_layers=fields.integer("num_nextn_predict_layers", 0, minimum=0),
            notes=end.notes,
            quantization=Quantization.from_hf(fields),
        )
        config._check()
        if is_mxfp4(fields):
            config._check_mxfp4()
        return config

    def quantized_by(self, option: str) -> ModelConfig:
        """Return this config with the quantization of `--quantization`; a checkpoint in FP8 keeps its own."""
        if option != "fp8" or self.quantization is not None:
            return self
        return self._quantized(Quantization.made_while_loading())

    def with_expert_parallel(self, enabled: bool) -> ModelConfig:
        """Return this config with whole experts on each rank if enabled; raises ValueError if it has no experts."""
        if not enabled:
            return self
        if self.experts is None or not self.experts.layers:
            raise ValueError(
                f"enable_expert_parallel=True divides a mixture of experts, and this {self.architecture} has none;"
                " leave it out"
            )
        return replace(self, experts=replace(self.experts, parallel=True))

    def _quantized(self, quantization: Quantization | None) -> ModelConfig:
        """Return this config with FP8 weights; raises ValueError if there are no kernels for such experts."""
        if quantization is not None and self.experts is not None and self.experts.clamped is not None:
            raise ValueError(f"FP8 weights of {self.architecture} are not supported; use them in MXFP4 or bfloat16")
        return replace(self, quantization=quantization)

    @property
    def rotations(self) -> set[RopeConfig]:
        """The different rotations of the layers."""
        return {rope for rope in self.ropes if rope is not None}

    @property
    def stream_eps(self) -> float:
        """The eps of norms of the residual stream, which the decoder keeps divided by residual_multiplier.

        Results are then added as they are, and RMSNorm of the stream is the same.
        """
        return self.norm_eps / self.residual_multiplier**2

    @property
    def attention_layers(self) -> list[int]:
        """The layers with keys and values."""
        return [n for n in range(self.num_layers) if self.delta_net is None or n not in self.delta_net.layers]

    @property
    def window(self) -> int | None:
        """The number of keys that a query sees in any layer, its own included; None if a layer sees all."""
        return None if None in self.windows else max(window for window in self.windows if window is not None)

    @property
    def layer_groups(self) -> LayerGroups:
        """The groups of the layers with keys and values that share a page table."""
        return LayerGroups.of_windows([self.windows[layer] for layer in self.attention_layers])

    @property
    def stored_head_dim(self) -> int:
        """The elements that the KV cache has for a head: heads of 96 are padded, because FlashInfer has 128 only."""
        return 128 if self.head_dim == 96 else self.head_dim

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.layers

    def heads_of_rank(self, rank: int, ranks: int) -> HeadShare:
        """Return the query and KV heads of this rank."""
        return share_of_heads(self.num_heads, self.num_kv_heads, rank, ranks)

    def check_tensor_parallel(self, size: int) -> None:
        """Raise ValueError, with the largest size, if the model cannot be split over `size` ranks."""
        problems = [f"{count} {part}" for part, count in self._divided_parts().items() if count < size]
        if problems:
            raise ValueError(
                f"{', '.join(problems)} cannot be split over {size} ranks; "
                f"use tensor_parallel_size={self.max_tensor_parallel_size} or less"
            )

    @property
    def max_tensor_parallel_size(self) -> int:
        """The largest number of ranks over which the model can be split; each has a query head."""
        return min(self._divided_parts().values())

    def _divided_parts(self) -> dict[str, int]:
        """Return the number of each part of which every rank must have one."""
        is_mxfp4 = self.experts is not None and self.experts.mxfp4
        features = f"{'blocks of 32 ' if is_mxfp4 else ''}intermediate features"
        parts = {"attention heads": self.num_heads}
        if sizes := self._intermediate_sizes():
            parts[features] = min(sizes)
        if self.experts is not None and self.experts.parallel:
            parts["experts"] = self.experts.num_experts
        return parts if self.delta_net is None else parts | {"linear key heads": self.delta_net.key_heads}

    def _intermediate_sizes(self) -> set[int]:
        """Return the intermediate features, or blocks of them, of MLPs and experts that the ranks divide.

        An MLP's do not count if every layer has experts.
        """
        sizes: set[int] = set()
        if self.experts and self.experts.layers:
            if not self.experts.parallel:
                sizes.add(self.experts.intermediate_size // (self.experts.block or 1))
            sizes |= {self.experts.shared_size} - {0}
        if not all(map(self.has_experts, range(self.num_layers))):
            sizes.add(self.intermediate_size)
        return sizes

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: {self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim is {self.head_dim}; rotary positions need an even one")
        for rope in self.rotations:
            rope.check_head_dim(self.head_dim)

    def _check_mxfp4(self) -> None:
        """Raise ValueError if the experts cannot be in MXFP4."""
        if self.experts is None or self.experts.clamped is None:
            raise ValueError(f"config.json: quantization_config (mxfp4) is not supported for {self.architecture}")
        sizes = self.hidden_size, self.experts.intermediate_size
        if any(size % MXFP4_BLOCK for size in sizes):
            raise ValueError(
                f"config.json: quantization_config (mxfp4) has blocks of {MXFP4_BLOCK} numbers, which must divide"
                f" hidden_size, {sizes[0]}, and intermediate_size, {sizes[1]}"
            )


def text_fields(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a model's text part: of `text_config` and around it, if it also sees images; else `hf`."""
    text = HFConfigReader(hf).nested("text_config").values
    if not text:
        return hf
    # As in transformers, the outer field says whether the embeddings are tied.
    return {**text, "tie_word_embeddings": True, **{name: value for name, value in hf.items() if name != "text_config"}}


def _architecture(fields: HFConfigReader) -> tuple[str, Architecture]:
    names = fields.texts("architectures")
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
        if name in TEXT_PARTS:
            return name, ARCHITECTURES[_text_part(fields.nested("text_config"), TEXT_PARTS[name])]
    raise ValueError(
        f"config.json: architecture {', '.join(shortened(n)[1:-1] for n in names) or 'not given'} is not supported; "
        f"the supported ones are {', '.join([*ARCHITECTURES, *TEXT_PARTS])}"
    )


def _text_part(text: HFConfigReader, families: Mapping[str, str]) -> str:
    """Return the family of the text part of a model."""
    kind = text.text("model_type", next(iter(families)))
    if kind not in families:
        raise ValueError(
            f"{text.source}: model_type {shortened(kind)} is not supported; the supported ones are "
            f"{', '.join(families)}"
        )
    return families[kind]


def _ignored_fields(fields: HFConfigReader, generation: HFConfigReader, choice: str) -> Iterator[str]:
    """Yield a sentence on each kind of field that would change the output elsewhere and has no effect here."""
    if "auto_map" in fields:
        yield "config.json: auto_map names Python code of the checkpoint, which is never run"
    names = [] if choice == "lockstep" else not_applied(generation)
    if names:
        yield f"{generation.source}: {', '.join(names)} of transformers' generate have no effect here"


def _longrope_notes(model: ModelConfig) -> Iterator[str]:
    """Yield a sentence if max_model_len chooses the factors of the rotation, as it does in vLLM."""
    for rope in model.rotations:
        if rope.type == "longrope" and rope.original_positions < model.max_position_embeddings:
            yield (
                f"config.json: longrope has other factors for more than {rope.original_positions} tokens; they are used"
                f" for all contexts, unless max_model_len is at most {rope.original_positions}"
            )


def _num_positions(fields: HFConfigReader, ropes: Iterable[RopeConfig | None]) -> int:
    """Return the number of positions, which YaRN of any layer may extend."""
    positions = fields.integer("max_position_embeddings", maximum=MAX_POSITIONS)
    for rope in {rope for rope in ropes if rope is not None}:
        if rope.extended_positions > MAX_POSITIONS:
            raise ValueError(
                f"config.json: factor {rope.factor:g} extends {rope.original_positions} positions to "
                f"{rope.extended_positions}; they must be at most {MAX_POSITIONS}"
            )
        positions = max(positions, rope.extended_positions)
    return positions


def _family_fields(
    fields: HFConfigReader, architecture: Architecture, hidden_size: int, head_dim: int
) -> dict[str, Any]:
    """Return what the family says, or leaves to a field of config.json."""
    fixed = "names", "adjacent_pairs", "sinks", "activation", "zero_centred_norms", "output_gate"
    flags = "qkv_bias", "output_bias", "mlp_bias"
    has_qk_norm = _flag(fields, architecture.qk_norm_flag or True)
    return {
        **{name: getattr(architecture, name) for name in fixed},
        **{name: _flag(fields, getattr(architecture, name)) for name in flags},
        **_multipliers(fields, architecture, hidden_size, head_dim),
        "qk_norm": architecture.qk_norm if has_qk_norm else "none",
        "attention_softcap": _softcap(fields, architecture, "attn_logit_softcapping"),
        "logits_softcap": _softcap(fields, architecture, "final_logit_softcapping"),
    }


def _flag(fields: HFConfigReader, flag: Flag) -> bool:
    return fields.flag(flag, False) if isinstance(flag, str) else flag


def _multipliers(
    fields: HFConfigReader, architecture: Architecture, hidden_size: int, head_dim: int
) -> dict[str, float]:
    """Return the factors of embedding, residual and scores, and the divisor of the logits."""
    plain = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    if architecture.multipliers == "fields":
        return {name: fields.number(name, 1.0) for name in (*plain, "attention_multiplier")}
    if architecture.multipliers == "by size":
        scale = fields.number("query_pre_attn_scalar") ** -0.5
        return plain | {"embedding_multiplier": hidden_size**0.5, "attention_multiplier": scale}
    return plain | {"attention_multiplier": head_dim**-0.5}


def _softcap(fields: HFConfigReader, architecture: Architecture, name: str) -> float | None:
    return fields.number(name) if architecture.softcaps and name in fields else None


def _refuse_unsupported(fields: HFConfigReader, architecture: Architecture) -> None:
    for name in architecture.must_be_zero:
        if value := fields.values.get(name):
            raise ValueError(f"config.json: {name} is {shortened(value)}; only models without it are supported")
    fields.text("model_type", "")  # transformers reads it for the tokenizer
    field, expected = ACTIVATIONS[architecture.activation]
    act = fields.text(field, expected)
    if act != expected:
        raise ValueError(f"config.json: {field} {shortened(act)} is not supported; it must be '{expected}'")


def _dtype(fields: HFConfigReader) -> str:
    # The default is bfloat16, in which nearly all models of these families are published.
    name = fields.text("dtype", fields.text("torch_dtype", "bfloat16")).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"config.json: dtype {shortened(name)} is not supported; the supported ones are {', '.join(DTYPES)}"
        )
    return name
