"""The FP8 quantization of a checkpoint, read from config.json. No torch.

Every supported format stores a matrix as float8_e4m3fn and its scales beside it, and means `data * scale`:

    quant_method          scales                                        name of the scale
    fp8                   blocks, or one for the tensor                 weight_scale_inv for blocks, else weight_scale
    compressed-tensors    one for the tensor, one a row, or blocks      weight_scale
    modelopt              one for the tensor, one a row, or blocks      weight_scale
    fbgemm_fp8            one a row                                     weight_scale

Scales of activations are ignored: activations are scaled by their own values.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .hf_config import HFConfigReader

Granularity = Literal["tensor", "row", "block"]
BLOCK = 128  # rows and columns of a block
MODELOPT_ALGORITHMS: dict[str, Granularity] = {
    "FP8": "tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "row",
    "FP8_PB_WO": "block",
}
STRATEGIES: dict[str, Granularity] = {"tensor": "tensor", "channel": "row", "block": "block"}
INPUT_STRATEGIES = ("tensor", "token", "group")
SUPPORTED = "FP8 in the formats fp8, compressed-tensors, modelopt and fbgemm_fp8"


@dataclass(frozen=True, kw_only=True)
class ScaleGrid:
    """The scales of one rank's matrix, as in kernels.arguments.FP8Weight; `rows` and `columns` are powers of two."""

    rows: int
    columns: int
    first: int  # the place of column 0 in its block

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the number of scales down and across for a matrix of this size."""
        return -(-rows // self.rows), -(-(self.first + columns) // self.columns)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The modules whose weights are FP8, and the scales of these weights."""

    method: str
    granularity: Granularity
    scale_name: str = "weight_scale"
    targets: tuple[str, ...] = ("Linear",)  # module names, patterns with "re:", or Linear for all
    ignored: tuple[str, ...] = ()  # module names, patterns with "re:", or wildcards
    includes_head: bool = False  # the output head is FP8 unless it is ignored
    online: bool = False  # the checkpoint is not quantized; its weights are while they are loaded

    @classmethod
    def from_folder(cls, folder: Path, fields: HFConfigReader) -> Quantization | None:
        """Read config.json, or the hf_quant_config.json of older ModelOpt; raises ValueError for other formats."""
        path = folder / "hf_quant_config.json"
        if "quantization_config" in fields or not path.is_file():
            return cls.from_hf(fields)
        section = HFConfigReader.from_file(path).nested("quantization")
        ignored = tuple(section.texts("exclude_modules"))
        return cls._modelopt(section, ignored)

    @classmethod
    def from_hf(cls, fields: HFConfigReader) -> Quantization | None:
        """Read `quantization_config` of config.json; None if there is none."""
        if "quantization_config" not in fields:
            return None
        section = fields.nested("quantization_config")
        method = section.text("quant_method", "unknown")
        ignored = tuple(
            section.texts("modules_to_not_convert") + section.texts("ignored_layers") + section.texts("ignore")
        )
        if method == "fp8":
            return cls._fp8(section, ignored)
        if method == "compressed-tensors":
            return cls._compressed_tensors(section, ignored)
        if method in ("modelopt", "modelopt_fp8"):
            return cls._modelopt(section, ignored + tuple(section.texts("exclude_modules")))
        if is_mxfp4(fields):  # ExpertConfig reads the rest
            return None
        if method == "fbgemm_fp8":
            return cls(method=method, granularity="row", ignored=ignored)
        raise _unsupported(method)

    @classmethod
    def made_while_loading(cls) -> Quantization:
        """Return the quantization of `--quantization fp8`: one scale a row, made of a checkpoint in 16 or 32 bits."""
        return cls(method="fp8", granularity="row", online=True)

    @classmethod
    def _fp8(cls, section: HFConfigReader, ignored: tuple[str, ...]) -> Quantization:
        kind = section.text("fmt", "e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise _unsupported(f"fp8, fmt {kind!r}")
        if "weight_block_size" not in section:
            return cls(method="fp8", granularity="tensor", ignored=ignored)
        _check_block(section.integers("weight_block_size"))
        return cls(method="fp8", granularity="block", scale_name="weight_scale_inv", ignored=ignored)

    @classmethod
    def _compressed_tensors(cls, section: HFConfigReader, ignored: tuple[str, ...]) -> Quantization:
        method, groups = "compressed-tensors", section.nested("config_groups")
        layout = section.text("format", "unknown")
        if layout not in ("float-quantized", "naive-quantized"):
            raise _unsupported(f"{method}, format {layout!r}")
        if len(groups.values) != 1:
            raise _unsupported(f"{method}, {len(groups.values)} config_groups")
        if section.nested("sparsity_config").text("format", "dense") != "dense":
            raise _unsupported(f"{method}, sparse")
        group = groups.nested(next(iter(groups.values)))
        weights, inputs = group.nested("weights"), group.nested("input_activations")
        strategy = _strategy(weights, "weights", tuple(STRATEGIES))
        if inputs.values:
            _strategy(inputs, "input_activations", INPUT_STRATEGIES)
        if strategy == "block":
            _check_block(_block_structure(weights))
        return cls(
            method=method,
            granularity=STRATEGIES[strategy],
            targets=tuple(group.texts("targets")),
            ignored=ignored,
            includes_head=True,
        )

    @classmethod
    def _modelopt(cls, section: HFConfigReader, ignored: tuple[str, ...]) -> Quantization:
        algorithm = section.text("quant_algo", "unknown")
        if algorithm not in MODELOPT_ALGORITHMS:
            raise _unsupported(f"modelopt, quant_algo {algorithm!r}")
        return cls(method="modelopt", granularity=MODELOPT_ALGORITHMS[algorithm], ignored=ignored, includes_head=True)

    def covers(self, module: str) -> bool:
        """Return whether the weight of a linear layer, such as `model.layers.0.mlp.up_proj`, is FP8."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return False
        return "Linear" in self.targets or any(_matches(pattern, module) for pattern in self.targets)

    def covers_all(self, modules: Sequence[str]) -> bool:
        """Return whether all of the modules, which share one matrix, are FP8; raises ValueError if only some are."""
        covered = [module for module in modules if self.covers(module)]
        if covered and len(covered) < len(modules):
            others = sorted(set(modules) - set(covered))
            raise ValueError(
                f"quantization_config ({self.method}) has {covered[0]} in FP8 and {others[0]} not; projections that are"
                " computed together must have one format"
            )
        return bool(covered)

    def bounds_of_pairs(self, head_dim: int) -> list[int]:
        """Return the bounds that heads add whose rows are reordered: blocks across two heads fall into single rows."""
        return [1] if self.granularity == "block" and BLOCK % head_dim else []

    def grid(self, bounds: Sequence[int], columns: int, first_column: int) -> ScaleGrid:
        """Return the scales of a rank's matrix of `columns` columns that begin at `first_column` of the checkpoint's.

        bounds  rows of the rank's matrix at which a block begins; the blocks of BLOCK rows divide these numbers
        """
        if self.granularity == "block":
            return ScaleGrid(rows=math.gcd(BLOCK, *bounds), columns=BLOCK, first=first_column % BLOCK)
        width = 1 << (max(columns, BLOCK) - 1).bit_length()
        return ScaleGrid(rows=1 if self.granularity == "row" else math.gcd(1 << 30, *bounds), columns=width, first=0)


def is_mxfp4(fields: HFConfigReader) -> bool:
    """Return whether the experts of a checkpoint are in MXFP4."""
    return fields.nested("quantization_config").text("quant_method", "unknown") == "mxfp4"


def _strategy(fields: HFConfigReader, part: str, supported: tuple[str, ...]) -> str:
    kind, bits = fields.text("type", "int"), fields.integer("num_bits", 8)
    strategy = fields.text("strategy", "tensor")
    if (kind, bits) != ("float", 8) or strategy not in supported:
        raise _unsupported(f"compressed-tensors, {part} of {bits}-bit {kind}, strategy {strategy!r}")
    return strategy


def _block_structure(weights: HFConfigReader) -> list[int]:
    value = weights.values.get("block_structure")
    return (
        [int(n) for n in re.findall(r"\d+", value)] if isinstance(value, str) else weights.integers("block_structure")
    )


def _check_block(block: list[int]) -> None:
    if block != [BLOCK, BLOCK]:
        raise _unsupported(f"fp8, blocks of {' x '.join(map(str, block)) or 'unknown size'}")


def _unsupported(what: str) -> ValueError:
    return ValueError(
        f"config.json: quantization_config ({what}) is not supported; use the checkpoint in bfloat16 or float16, or in"
        f" {SUPPORTED}"
    )


def _matches(pattern: str, module: str) -> bool:
    """Return whether a name of a list means the module: itself, a module around it, or the end of its name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return fnmatch.fnmatchcase(module, pattern)
    return f".{pattern}." in f".{module}."
