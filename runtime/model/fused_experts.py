"""Checkpoints that store the matrices of all experts of a layer in one tensor, read as one matrix for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"  # [N, 2 I, D] and [N, D, I]


@dataclass(frozen=True)
class ExpertSlice:
    """The rows from `first` on of one expert, with the methods of a slice of safetensors."""

    tensor: Any  # the tensor of all experts
    expert: int
    first: int
    rows: int

    def get_shape(self) -> list[int]:
        return [self.rows, self.tensor.get_shape()[2]]

    def get_dtype(self) -> str:
        return str(self.tensor.get_dtype())

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Any:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self.rows)
        place = (self.expert, slice(self.first + start, self.first + stop, step), *columns)
        return self.tensor[place]


def matrices_of_experts(tensors: Mapping[str, Any]) -> Iterator[tuple[str, str, ExpertSlice]]:
    """Yield the name of each expert's matrix, the name of the tensor that has it, and the matrix.

    gpt-oss is left out: its tensors have the same names and other axes, and biases beside them.
    """
    for name, tensor in tensors.items():
        shape = tensor.get_shape() if name.endswith((GATE_UP, DOWN)) else []
        if len(shape) != 3 or f"{name}_bias" in tensors:
            continue
        parts = ("gate_proj", "up_proj") if name.endswith(GATE_UP) else ("down_proj",)
        rows, prefix = shape[1] // len(parts), name.rpartition(".")[0]
        for expert in range(shape[0]):
            for n, part in enumerate(parts):
                yield f"{prefix}.{expert}.{part}.weight", name, ExpertSlice(tensor, expert, n * rows, rows)
