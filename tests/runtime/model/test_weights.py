"""The loader: each rank reads only its slices, and errors name the mismatched tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.comm.base import Communicator, SingleRank
from lockstep.runtime.config import Config
from lockstep.runtime.model import tensor_files as files_module
from lockstep.runtime.model.checkpoint import read_model
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.families import ARCHITECTURES
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.moe import MoE
from lockstep.runtime.model.weights import Piece, Weights, fill_dummy, load_weights

from checkpoints import FAMILIES, rewrite_config, tiny_checkpoint
from ranks import ThreadGroup

CPU = torch.device("cpu")


def _decoder(folder: Path, comm: Communicator | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(ModelConfig.from_folder(folder), comm or SingleRank(), dtype=dtype, device=CPU, max_positions=16)


def _tensors(decoder: Decoder) -> list[Tensor]:
    return [weight.tensor for weight in decoder.weights]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint in one file; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_checkpoint(folder, "LlamaForCausalLM")
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors of the checkpoint; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / "model.safetensors")


class Counting:
    """`safe_open` that counts the elements read of each tensor."""

    def __init__(self, read: dict[str, int]) -> None:
        self.read = read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        read, file = self.read, _safe_open(*args, **kwargs)

        class Slice:
            def __init__(self, name: str) -> None:
                self.name = name
                self.slice = file.get_slice(name)

            def get_shape(self) -> list[int]:
                return self.slice.get_shape()

            def get_dtype(self) -> str:
                return self.slice.get_dtype()

            def __getitem__(self, index: Any) -> Tensor:
                part = self.slice[index]
                read[self.name] = read.get(self.name, 0) + part.numel()
                return part

        class File:
            def __enter__(self) -> Any:
                file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                file.__exit__(*error)

            def keys(self) -> list[str]:
                return file.keys()

            def get_slice(self, name: str) -> Slice:
                return Slice(name)  # and no get_tensor: the loader has no way to read a whole one unnoticed

        return File()


_safe_open = files_module.safe_open


@pytest.mark.parametrize("architecture", FAMILIES)
def test_load_reads_only_the_slices_of_the_rank(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, architecture)
    size, group = 4, ThreadGroup(4)
    total: dict[str, int] = {}
    for rank in range(size):
        read: dict[str, int] = {}
        monkeypatch.setattr(files_module, "safe_open", Counting(read))
        decoder = _decoder(tmp_path, group.rank(rank))
        load_weights(decoder.weights, tmp_path)
        padding = 2 * 32 if rank == size - 1 else 0  # 131 rows in 4 shards of 33, of embedding and head
        routers = [layer.mlp.router for layer in decoder.layers if isinstance(layer.mlp, MoE)]
        padding += sum(router.num_padding * router.weight.shape[1] for router in routers)
        assert sum(read.values()) == sum(x.numel() for x in _tensors(decoder)) - padding
        total = {name: total.get(name, 0) + count for name, count in read.items()}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        replicated = "norm", "gate.weight", "e_score_correction_bias", "router", "down_proj_bias", "o_proj.bias"
        copies = 2 if "k_proj" in name or "v_proj" in name else 4 if any(part in name for part in replicated) else 1
        copies = 1.5 if "qkv_proj" in name else copies
        is_wide = ARCHITECTURES[architecture].qk_norm == "all heads"
        if is_wide and ("q_norm" in name or "k_norm" in name):  # divided like the heads
            copies = 1 if "q_norm" in name else 2
        assert total[name] == copies * tensor.numel(), name  # 2 kv heads over 4 ranks: each is on two


def test_load_with_and_without_index(checkpoint: Path, tmp_path: Path) -> None:
    whole = _decoder(checkpoint)
    load_weights(whole.weights, checkpoint)
    tiny_checkpoint(tmp_path / "once", "LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with_index = _decoder(tmp_path)
    load_weights(with_index.weights, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    without = _decoder(tmp_path)
    load_weights(without.weights, tmp_path)
    for expected, a, b in zip(_tensors(whole), _tensors(with_index), _tensors(without), strict=True):
        assert torch.equal(expected, a)
        assert torch.equal(expected, b)


def test_load_names_a_missing_file_of_the_index(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "once", "LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.name} named in model.safetensors.index.json"):
        load_weights(_decoder(tmp_path).weights, tmp_path)


def test_load_casts_values(checkpoint: Path) -> None:
    exact, rounded = _decoder(checkpoint), _decoder(checkpoint, dtype=torch.bfloat16)
    load_weights(exact.weights, checkpoint)
    load_weights(rounded.weights, checkpoint)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(_tensors(exact), _tensors(rounded), strict=True))


def test_load_names_every_mismatched_tensor(copy: Path) -> None:
    _change(
        copy,
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.2.mlp.up_proj.weight": torch.zeros(3),
            "model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 31),
        },
    )
    with pytest.raises(ValueError, match="does not fit its config") as error:
        load_weights(_decoder(copy).weights, copy)
    message = str(error.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in message
    assert "1 unexpected: model.layers.2.mlp.up_proj.weight;" in message
    assert "1 misshapen: model.layers.0.self_attn.q_proj.weight [64, 31] instead of [64, 32];" in message
    assert "\n" not in message


def test_load_shortens_long_lists(copy: Path) -> None:
    _change(copy, {f"extra.{n}": torch.zeros(1) for n in range(20)})
    with pytest.raises(ValueError, match=r"20 unexpected: (extra\.\d+, ){7}extra\.\d+ and 12 more"):
        load_weights(_decoder(copy).weights, copy)


def test_load_ignores_redundant_tensors(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    decoder = _decoder(tmp_path)
    assert decoder.head.weight is decoder.embedding.weight
    _change(
        tmp_path,
        {"lm_head.weight": torch.zeros(131, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
    )
    load_weights(decoder.weights, tmp_path)
    assert torch.equal(decoder.head.weight, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb_local.original_inv_freq": torch.ones(8),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(64, 16),
    "model.layers.1.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
    "model.layers.1.self_attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
    "model.layers.1.attn.masked_bias": torch.tensor(-1e4),
    "model.position_ids": torch.arange(64)[None],
    "lm_head.bias": torch.zeros(131),
    "model.layers.0.self_attn.o_proj.bias": torch.zeros(32, dtype=torch.float16),
}


def test_load_ignores_buffers_and_biases_of_zeros(copy: Path) -> None:
    expected = load_file(copy / "model.safetensors")
    _change(copy, BUFFERS)
    read_model(Config(model=str(copy)), copy)
    decoder = _decoder(copy)
    load_weights(decoder.weights, copy)
    assert torch.equal(decoder.head.weight[:131], expected["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lm_head.bias", torch.ones(131), "1 unexpected: lm_head.bias"),
        ("model.layers.0.self_attn.bias", torch.zeros(64) + 0.5, "1 unexpected: model.layers.0.self_attn.bias"),
        ("model.layers.0.mlp.up_proj.qweight", torch.ones(4, 4, dtype=torch.int32), "1 unexpected"),
    ],
)
def test_load_refuses_what_may_change_the_answer(copy: Path, name: str, tensor: Tensor, message: str) -> None:
    _change(copy, {name: tensor})
    with pytest.raises(ValueError, match=message):
        load_weights(_decoder(copy).weights, copy)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_load_names_a_damaged_file(copy: Path, damage: str) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"<html>" * 1000, "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is corrupt or incomplete .*; fetch the file again"
    ) as error:
        load_weights(_decoder(copy).weights, copy)
    assert "\n" not in str(error.value)


def test_layers_that_draft_tokens_are_not_read(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "Glm4MoeForCausalLM")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.2\.eh_proj\.weight"):
        load_weights(_decoder(tmp_path).weights, tmp_path)
    rewrite_config(tmp_path, num_nextn_predict_layers=1)
    load_weights(_decoder(tmp_path).weights, tmp_path)


def test_load_without_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors \(no weights at all\)"):
        load_weights(_decoder(copy).weights, copy)
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save the checkpoint as safetensors"):
        load_weights(_decoder(copy).weights, copy)


def test_dummy_weights(checkpoint: Path) -> None:
    ranks = [_decoder(checkpoint, ThreadGroup(4).rank(rank)) for rank in range(4)]
    for decoder in ranks:
        fill_dummy(decoder.weights)
    layers = [decoder.layers[0].attention for decoder in ranks]
    size = ranks[0].config.head_dim  # one query head on each rank
    q = [layer.qkv.weight[:size] for layer in layers]
    kv = [layer.qkv.weight[size:] for layer in layers]
    assert math.isclose(float(q[0].std()), 0.02, rel_tol=0.2)
    assert not torch.equal(q[0], q[1])
    assert torch.equal(kv[0], kv[1])  # the same kv head
    assert not torch.equal(kv[1], kv[2])
    assert not torch.equal(q[0], ranks[0].layers[1].attention.qkv.weight[:size])
    assert bool((ranks[0].norm.weight == 1).all())
    assert bool((ranks[3].embedding.weight[32:] == 0).all())  # padding: 131 rows in 4 shards of 33


def test_pieces_fill_their_part_of_the_weight(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.arange(4.0)}, tmp_path / "x.safetensors")
    weights = Weights(torch.float32, CPU)
    pieces = [
        Piece("a", (3, 4), (slice(1, 3), slice(0, 2)), (0, slice(0, 2))),
        Piece("b", (4,), (slice(2, 4),), (1, 0)),
    ]
    tensor = weights.add((2, 3, 2), pieces)
    load_weights(weights, tmp_path)
    assert tensor.tolist() == [[[4.0, 5.0], [8.0, 9.0], [0.0, 0.0]], [[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]]]
