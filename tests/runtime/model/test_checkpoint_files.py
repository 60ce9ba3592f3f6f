"""Facts from the files of a checkpoint: EOS tokens, tied heads, sampling defaults, class defaults, code."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lockstep import LLM, SamplingParams
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.memory.parameter_count import parameters_of_rank
from lockstep.runtime.model.checkpoint import check_folder, find_model, read_model
from lockstep.runtime.model.families import ARCHITECTURES, ExpertRules
from lockstep.runtime.model.generation_config import default_sampling_params
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.structured_outputs import StructuredOutputsParams
from lockstep.runtime.tokenizer import Tokenizer

from bad_checkpoints import copy_of_demo, edit, edit_weights
from checkpoints import FAMILIES, TINY, rewrite_config, tiny_checkpoint
from small import SMALL

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo model, to be changed."""
    return copy_of_demo(tmp_path / "model")


def _greedy(folder: Path, **params: Any) -> Any:
    with LLM(str(folder), **SMALL) as llm:
        return llm.generate(["Once"], SamplingParams(temperature=0, **params), use_tqdm=False)[0].outputs[0]


# -- EOS


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (1, 1, "<|eos|>", (1,)),
        (5, [7, 6], "<|eos|>", (1, 5, 6, 7)),
        (None, None, "<|eos|>", (1,)),
        (None, None, {"content": "<|eos|>"}, (1,)),
        ([3, 2], 9, None, (2, 3, 9)),
        ([2, 2048, -1], 10**12, None, (2,)),
        (2048, [], None, ()),
        (4, None, "nowhere", (4,)),
    ],
)
def test_eos_ids_are_the_valid_ones_of_all_files(
    demo: Path, config: Any, generation: Any, tokenizer: Any, expected: tuple[int, ...]
) -> None:
    edit("config.json", demo, eos_token_id=config)
    edit("generation_config.json", demo, eos_token_id=generation)
    edit("tokenizer_config.json", demo, eos_token=tokenizer)
    assert ModelConfig.from_folder(demo).eos_token_ids == expected


def test_eos_of_the_older_file_and_of_the_plain_vocabulary(demo: Path) -> None:
    edit("config.json", demo, eos_token_id=None)
    (demo / "generation_config.json").unlink()
    word, number = next(iter(json.loads((demo / "tokenizer.json").read_text())["model"]["vocab"].items()))
    edit("tokenizer_config.json", demo, eos_token=word)
    assert ModelConfig.from_folder(demo).eos_token_ids == (number,)
    settings = json.loads((demo / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (demo / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ModelConfig.from_folder(demo).eos_token_ids == (AutoTokenizer.from_pretrained(demo).eos_token_id,)


def test_dropped_and_disagreeing_eos_ids_are_logged_once(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    edit("generation_config.json", demo, eos_token_id=[2, 2088], num_beams=4, no_repeat_ngram_size=0)
    edit("config.json", demo, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    find_model(Config(model=str(demo)))
    assert [record.getMessage() for record in caplog.records] == [
        "generation_config.json: the end-of-sequence ids 2088 are dropped; the model has ids 0 to 2047",
        "end of sequence: config.json has 1, generation_config.json has 2, tokenizer_config.json has 1; each of 1, 2"
        " ends an output",
        "config.json: auto_map names Python code of the checkpoint, which is never run",
        "generation_config.json: num_beams of transformers' generate have no effect here",
    ]
    caplog.clear()
    find_model(Config(model=DEMO_MODEL))
    assert not caplog.records  # nothing to say about a checkpoint whose files agree


def test_eos_beyond_the_vocabulary_hurts_no_request(demo: Path) -> None:
    expected = _greedy(demo, min_tokens=8, max_tokens=12)
    edit("generation_config.json", demo, eos_token_id=[1, 2048 + 40, -1])
    assert _greedy(demo, min_tokens=8, max_tokens=12).token_ids == expected.token_ids


def test_tokenizer_with_more_tokens_than_the_model(demo: Path) -> None:
    expected = _greedy(demo, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[a-z]{5}"))
    added = json.loads((demo / "tokenizer.json").read_text())["added_tokens"]
    beyond = [{**added[0], "id": 2048 + i, "content": f"<x{i}>"} for i in range(3)]
    edit("tokenizer.json", demo, added_tokens=[*added, *beyond])
    edit("config.json", demo, eos_token_id=[1, 2049])
    output = _greedy(demo, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[a-z]{5}"))
    assert output.token_ids == expected.token_ids
    with LLM(str(demo), **SMALL) as llm, pytest.raises(ValueError, match=r"token id 2049 in the prompt; .* 0 to 2047"):
        llm.generate(["a <x1> b"], SamplingParams(), use_tqdm=False)


def test_grammars_refuse_a_vocabulary_beyond_the_model(demo: Path) -> None:
    model = json.loads((demo / "tokenizer.json").read_text())["model"]
    edit("tokenizer.json", demo, model={**model, "vocab": {**model["vocab"], "zzzz": 2 * 10**9}})
    assert _greedy(demo, max_tokens=4).text  # other requests run
    with pytest.raises(ValueError, match="has token ids up to 2000000000, but the model has ids 0 to 2047"):
        _greedy(demo, structured_outputs=StructuredOutputsParams(regex="a"))


def test_family_without_tokenizer_files_is_refused(demo: Path) -> None:
    """transformers makes a tokenizer of three special tokens."""
    (demo / "tokenizer.json").unlink()
    edit("tokenizer_config.json", demo, tokenizer_class="LlamaTokenizer")
    with pytest.raises(ValueError, match="has no tokens but added ones"):
        Tokenizer(demo)


def test_text_that_the_tokenizer_cannot_encode_is_refused(demo: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "[UNK]"}
    edit("tokenizer.json", demo, model=model, pre_tokenizer=None, normalizer=None, decoder=None)
    tokenizer = Tokenizer(demo)
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text: WordLevel error"):
        tokenizer.encode("b")


def test_eos_of_the_tokenizer_alone_ends_an_output(demo: Path) -> None:
    edit("config.json", demo, eos_token_id=None)
    (demo / "generation_config.json").unlink()
    tokens = _greedy(demo, max_tokens=16).token_ids
    last = tokens[4]
    edit("tokenizer_config.json", demo, eos_token=AutoTokenizer.from_pretrained(demo).convert_ids_to_tokens(last))
    output = _greedy(demo, max_tokens=16)
    assert (output.finish_reason, output.token_ids) == ("stop", tokens[: tokens.index(last) + 1])


# -- output heads


@pytest.fixture
def other_head(tmp_path: Path) -> Path:
    """A checkpoint whose config ties the embeddings, with another output head in its file."""
    tiny_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=False, eos_token_id=None)
    rewrite_config(tmp_path, tie_word_embeddings=True)
    shutil.copy(Path(DEMO_MODEL) / "tokenizer.json", tmp_path)
    return tmp_path


def test_other_head_of_a_tied_model_is_used_as_in_transformers(
    other_head: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lockstep")
    prompt = [5, 9, 77, 31]
    with torch.inference_mode(), LLM(str(other_head), **SMALL) as llm:
        model = AutoModelForCausalLM.from_pretrained(other_head, dtype=torch.float32).eval()
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        params = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert "but lm_head.weight differs from model.embed_tokens.weight: both are used" in caplog.text


def test_tied_model_with_its_head_only_is_as_in_transformers(other_head: Path) -> None:
    path, prompt = other_head / "model.safetensors", [5, 9, 77, 31]
    tensors = load_file(path)
    del tensors[HEAD]
    save_file(tensors, path, metadata={"format": "pt"})
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(other_head, dtype=torch.float32).eval()
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, path, metadata={"format": "pt"})
    with LLM(str(other_head), **SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids == expected
    rewrite_config(other_head, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=f"1 missing: {EMBEDDING}"):
        read_model(Config(model=str(other_head)), other_head)


def test_equal_head_of_a_tied_model_stays_tied(other_head: Path) -> None:
    config, path = Config(model=str(other_head)), other_head / "model.safetensors"
    assert not read_model(config, other_head).tie_word_embeddings
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path)
    tied = read_model(config, other_head)
    assert tied.tie_word_embeddings
    table = tied.vocab_size * tied.hidden_size
    assert parameters_of_rank(replace(tied, tie_word_embeddings=False), 1) == parameters_of_rank(tied, 1) + table


@pytest.mark.parametrize("row", [0, 130])
def test_one_other_number_unties_whichever_rank_has_it(other_head: Path, row: int) -> None:
    path = other_head / "model.safetensors"
    tensors = load_file(path)
    head = tensors[EMBEDDING].clone()
    head[row, 31] += 1
    save_file({**tensors, HEAD: head}, path)
    assert not read_model(Config(model=str(other_head)), other_head).tie_word_embeddings
    save_file({**tensors, HEAD: head.half()}, path)  # another dtype
    assert not read_model(Config(model=str(other_head)), other_head).tie_word_embeddings


# -- sampling defaults


def test_generation_config_auto_lockstep_or_a_folder(demo: Path, tmp_path: Path) -> None:
    assert default_sampling_params(demo).temperature == 0.7
    assert default_sampling_params(demo, "lockstep") == SamplingParams()
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match=r"other' has no generation_config\.json; give auto, lockstep, or a folder"):
        default_sampling_params(demo, str(other))
    fields = {"temperature": 0.25, "top_k": 7, "max_new_tokens": 33, "top_p": None, "eos_token_id": 9}
    (other / "generation_config.json").write_text(json.dumps(fields))
    expected = SamplingParams(temperature=0.25, top_k=7, max_tokens=33)
    with LLM(str(demo), **SMALL, generation_config=str(other)) as llm:
        assert llm.get_default_sampling_params() == expected
    assert ModelConfig.from_folder(demo, str(other)).eos_token_ids == (1, 9)  # as vLLM: the folder's EOS
    shutil.rmtree(other)
    assert default_sampling_params(tmp_path) == SamplingParams()


def test_value_out_of_range_names_file_field_and_way_out(demo: Path) -> None:
    edit("generation_config.json", demo, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"^generation_config\.json: max_new_tokens=0 .*generation_config=lockstep$"):
        check_folder(Config(), demo)
    edit("generation_config.json", demo, eos_token_id=[1, 5])
    config = Config(model=str(demo), generation_config="lockstep")
    assert check_folder(config, demo).eos_token_ids == (1, 5)  # as vLLM: EOS ids are no sampling defaults


def test_relative_folders_become_absolute_for_ranks(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo.parent)
    config = Config(model="model", generation_config="model").with_absolute_model()
    assert (config.model, config.generation_config) == (str(demo), str(demo))
    assert Config(model="nobody/nothing").with_absolute_model() == Config(model="nobody/nothing")


# -- code in checkpoints


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import PreTrainedTokenizerFast
class Custom(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "Custom"}, {"tokenizer_class": None}])
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["custom.Custom", "custom.Custom"]}, ["custom.Custom", None]])
def test_code_of_a_checkpoint_never_runs_and_nothing_is_asked(
    demo: Path, settings: dict[str, Any], auto_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked at stdin")

    monkeypatch.setattr("builtins.input", ask)
    (demo / "custom.py").write_text(CODE)
    edit("tokenizer_config.json", demo, auto_map=auto_map, **settings)
    edit("config.json", demo, auto_map={"AutoConfig": "custom.Custom"}, model_type="custom")
    with suppress(ValueError):  # transformers refuses some, and loads others without their code
        assert Tokenizer(demo).encode("Once") == Tokenizer(Path(DEMO_MODEL)).encode("Once")
    assert not list(demo.rglob("ran"))


# -- fields of config.json


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype_with_the_name_of_its_module(demo: Path, field: str) -> None:
    expected = _greedy(demo, max_tokens=4).token_ids
    edit("config.json", demo, torch_dtype=None)
    edit("config.json", demo, **{field: "torch.bfloat16"})
    assert read_model(Config(), demo).dtype == "bfloat16"
    assert _greedy(demo, max_tokens=4).token_ids == expected


MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
READ = {  # by field of config.json, the field of ModelConfig that it becomes
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "qkv_bias",
    "attention_out_bias": "output_bias",
    "mlp_bias": "mlp_bias",
    **dict(zip(MULTIPLIERS, MULTIPLIERS, strict=True)),
}
EXPERTS = ("num_experts", "num_per_token", "intermediate_size", "normalized", "least_sum", "scaling")
GROUPS = {"n_group": "num_groups", "topk_group": "groups_per_token"}
IMPLICIT = ("decoder_sparse_step", "mlp_only_layers", "sliding_window", "use_sliding_window", "max_window_layers")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_fields_have_the_values_of_transformers(architecture: str) -> None:
    """Without each field in turn, and without all of them."""
    model_type, family = FAMILIES[architecture]
    whole = {**TINY, **family, "architectures": [architecture]}
    whole |= {} if ARCHITECTURES[architecture].windows == "never" else {"use_sliding_window": True, "sliding_window": 8}
    whole |= {"num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 768}  # go with any default
    rules = ARCHITECTURES[architecture].experts
    whole |= {} if rules is None else {rules.num_experts: 16}
    whole.pop("layer_types", None)
    if model_type.startswith("qwen3_5"):
        whole["num_hidden_layers"] = 8  # without layer_types each fourth layer has attention
    if model_type == "granitemoehybrid":
        whole |= {"num_hidden_layers": 32, "layer_types": ["full_attention"] * 32}
    optional = [name for name in (*READ, *expert_fields(rules), *IMPLICIT) if name in whole or name in IMPLICIT]
    if model_type == "glm4_moe":  # its defaults rotate 21 of 42 elements
        optional.remove("head_dim")
    for absent in (*([name] for name in optional), optional):
        fields = {name: value for name, value in whole.items() if name not in absent}
        _assert_equal(ModelConfig.from_hf(fields), AutoConfig.for_model(model_type, **fields))


def expert_fields(rules: ExpertRules | None) -> dict[str, str]:
    """Return the fields of config.json about experts, with the names that ExpertConfig has for them."""
    fields = {} if rules is None else {getattr(rules, name): name for name in EXPERTS}
    fields |= GROUPS if rules is not None and rules.groups else {}
    return {field: name for field, name in fields.items() if isinstance(field, str)}


def expected_expert_layers(config: Any) -> set[int]:
    layers = set(range(config.num_hidden_layers))
    if hasattr(config, "first_k_dense_replace"):
        return layers - set(range(config.first_k_dense_replace))
    if hasattr(config, "moe_layer_interval"):
        first, last, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
        return {n for n in layers if first <= n <= last and (n + 1) % step == 0}
    step, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", [])
    return {n for n in layers if n not in dense and (n + 1) % step == 0}


def _assert_equal(model: ModelConfig, config: Any) -> None:
    for name, ours in READ.items():
        if name == "intermediate_size" and hasattr(config, "shared_intermediate_size"):
            name = "shared_intermediate_size"
        if hasattr(config, name) and getattr(config, name) is not None:
            assert getattr(model, ours) == getattr(config, name), name
    kinds = getattr(config, "layer_types", ["full_attention"] * model.num_layers)
    for rope, kind in zip(model.ropes, kinds, strict=True):
        if rope is not None:
            assert rope.theta == config.rope_parameters.get(kind, config.rope_parameters)["rope_theta"]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    assert model.windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if (net := model.delta_net) is not None:
        sizes = "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"
        actual = net.key_heads, net.value_heads, net.key_size, net.value_size, net.taps
        assert actual == tuple(getattr(config, f"linear_{name}") for name in sizes)
        assert net.layers == {n for n, kind in enumerate(config.layer_types) if kind == "linear_attention"}
    if model.experts is not None:
        for name, ours in expert_fields(model.experts.rules).items():
            if name == "norm_topk_prob" and model.experts.clamped:
                continue
            assert getattr(model.experts, ours) == getattr(config, name), name
        assert model.experts.layers == expected_expert_layers(config)


def test_qwen3_without_head_dim_has_that_of_transformers(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "Qwen3ForCausalLM", head_dim=128, hidden_size=32)
    rewrite_config(tmp_path, head_dim=...)
    assert read_model(Config(), tmp_path).head_dim == 128


# -- weights


def test_overflow_in_a_narrower_dtype_is_refused(demo: Path) -> None:
    edit_weights(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7:8].fill_(1e6), demo)
    assert _greedy(demo, max_tokens=1).token_ids  # finite in float32
    with pytest.raises(ValueError, match=r"NaN or infinite numbers in .*up_proj.*use a dtype with a wider range"):
        LLM(str(demo), **SMALL, dtype="float16")
