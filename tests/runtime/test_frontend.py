"""The front end over a scripted executor (no model), and the offline API over the demo model in this process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep import LLM, SamplingParams
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.executor import EngineClosed
from lockstep.runtime.frontend import Frontend
from lockstep.runtime.generation import Generation
from lockstep.runtime.limits import Limits
from lockstep.runtime.outputs import Event, RequestOutput
from lockstep.runtime.plan import RequestEnd, StepOutput
from lockstep.runtime.request import Request, RequestRefused
from lockstep.runtime.tokenizer import Tokenizer

PROMPT = "And the LORD said unto Moses"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_pages=400, max_num_seqs=16) as llm:
        yield llm


# -- stop strings, cancellation, refusals


class Scripted:
    """An executor that answers every request with the same tokens, `burst` of them a poll."""

    def __init__(self, tokens: Sequence[int], burst: int = 1) -> None:
        self.limits = Limits(
            max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64, num_pages=64, page_size=4, vocab_size=2048
        )
        self.tokens, self.burst = list(tokens), burst
        self.live: dict[int, int] = {}
        self.cancelled: list[int] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self.live.update({r.uid: 0 for r in requests})

    def cancel(self, uids: Sequence[int]) -> None:
        self.cancelled += uids

    def poll(self, timeout_s: float) -> list[StepOutput]:
        outputs = []
        for _ in range(self.burst):
            uids = list(self.live)
            tokens = [self.tokens[self.live[u]] for u in uids]
            finished = []
            for uid in uids:
                self.live[uid] += 1
                if self.live[uid] == len(self.tokens):
                    finished.append(RequestEnd(uid, "length"))
                    del self.live[uid]
            outputs.append(StepOutput(uids=uids, tokens=tokens, finished=finished))
        return outputs

    def close(self) -> None:
        pass


def run(frontend: Frontend, generation: Generation) -> tuple[str, list[str]]:
    """The final text, and the pieces that were streamed."""
    frontend.submit([generation])
    pieces = []
    while not generation.finished:
        pieces += [output.take_event().text for output in frontend.poll(0)]
    return generation.outputs[0].completion.text, pieces


@pytest.mark.parametrize("burst", [1, 3])
@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        ("Moses", "And the LORD said unto "),
        ("D s", "And the LOR"),
        (["zzz", "unto", "said"], "And the LORD "),
        ("And", ""),
        ("not in it", "And the LORD said unto Moses, saying"),
        ([" unto Moses, s", "unto"], "And the LORD said "),  # the one that is complete first
    ],
)
def test_stop_strings(tokenizer: Tokenizer, stop: Any, wanted: str, burst: int) -> None:
    ids = tokenizer._tokenizer.encode("And the LORD said unto Moses, saying", add_special_tokens=False)
    executor = Scripted(ids, burst)
    frontend = Frontend(executor, tokenizer, [1])
    generation = frontend.prepare([5], SamplingParams(stop=stop, max_tokens=100))
    text, pieces = run(frontend, generation)
    assert text == wanted
    assert "".join(pieces) == wanted, "what was streamed must never have to be taken back"
    output = generation.outputs[0].completion
    if "not in it" in stop:
        assert (output.finish_reason, output.stop_reason) == ("length", None)
    else:
        assert output.finish_reason == "stop"
        assert output.stop_reason in stop
        assert executor.cancelled == [0] or len(output.token_ids) == len(ids)


def test_include_stop_str_in_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer._tokenizer.encode("And the LORD said", add_special_tokens=False)
    frontend = Frontend(Scripted(ids), tokenizer, [1])
    params = SamplingParams(stop="LORD", include_stop_str_in_output=True, max_tokens=50)
    assert run(frontend, frontend.prepare([5], params))[0] == "And the LORD"


@pytest.mark.parametrize("burst", [1, 4])
def test_stop_strings_are_looked_for_after_min_tokens(tokenizer: Tokenizer, burst: int) -> None:
    """Against a search by hand: a stop string counts if it ends in a token after the first `min_tokens`."""
    ids = tokenizer._tokenizer.encode("unto Moses unto Aaron unto me unto", add_special_tokens=False)
    lengths = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    text = tokenizer.decode(ids)
    for min_tokens in range(len(ids)):
        searched = lengths[min_tokens - 1] if min_tokens else 0
        expected = next(i for i in range(len(text)) if text.startswith("unto", i) and i + 4 > searched)
        for includes in (False, True):
            frontend = Frontend(Scripted(ids, burst), tokenizer, [1])
            params = SamplingParams(
                stop="unto", min_tokens=min_tokens, max_tokens=99, include_stop_str_in_output=includes
            )
            actual, pieces = run(frontend, frontend.prepare([5], params))
            assert actual == "".join(pieces) == text[: expected + 4 * includes]


def test_stop_string_of_a_character_in_several_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer._tokenizer.encode("So€me \N{SLIGHTLY SMILING FACE}€ text", add_special_tokens=False)
    for stop, expected in (
        ("€", "So"),
        ("\N{SLIGHTLY SMILING FACE}", "So€me "),
        (" \N{SLIGHTLY SMILING FACE}€", "So€me"),
    ):
        frontend = Frontend(Scripted(ids), tokenizer, [1])
        text, pieces = run(frontend, frontend.prepare([5], SamplingParams(stop=stop, max_tokens=99)))
        assert text == "".join(pieces) == expected
    frontend = Frontend(Scripted(ids), tokenizer, [1])
    text, _ = run(frontend, frontend.prepare([5], SamplingParams(stop="\N{REPLACEMENT CHARACTER}", max_tokens=99)))
    assert text == "So€me \N{SLIGHTLY SMILING FACE}€ text", "a part of a character is no text yet"


@pytest.mark.parametrize("num_before", range(1, 7))
def test_output_that_fails_within_a_character_continues_there(tokenizer: Tokenizer, num_before: int) -> None:
    ids = tokenizer._tokenizer.encode("a\N{SLIGHTLY SMILING FACE}€ text", add_special_tokens=False)
    frontend = Frontend(Scripted(ids), tokenizer, [1])
    generation = frontend.prepare([5], SamplingParams(max_tokens=99))
    frontend.submit([generation])
    pieces = [output.take_event().text for _ in range(num_before) for output in frontend.poll(0)]
    again = Scripted(ids[num_before:])  # new ranks have the prompt and the tokens so far, and generate the rest
    frontend.resubmit(again)
    while not generation.finished:
        pieces += [output.take_event().text for output in frontend.poll(0)]
    assert "".join(pieces) == generation.outputs[0].completion.text == "a\N{SLIGHTLY SMILING FACE}€ text"


def test_output_that_ends_within_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer._tokenizer.encode("a\N{SLIGHTLY SMILING FACE}", add_special_tokens=False)[:-1]
    frontend = Frontend(Scripted(ids), tokenizer, [1])
    text, pieces = run(frontend, frontend.prepare([5], SamplingParams(max_tokens=99)))
    assert text == "".join(pieces) == tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER}"


def test_cancelled_output_keeps_its_tokens(tokenizer: Tokenizer) -> None:
    frontend = Frontend(Scripted(range(100, 200)), tokenizer, [1])
    generation = frontend.prepare([5], SamplingParams(max_tokens=100))
    frontend.submit([generation])
    frontend.poll(0)
    frontend.cancel([generation])
    output = generation.result().outputs[0]
    assert (output.finish_reason, output.token_ids) == ("abort", [100])
    assert frontend.poll(0) == [], "tokens that were on their way are dropped"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([2048], "token id 2048 in the prompt; the model has ids 0 to 2047"),
        ([-1], "token id -1"),
        ([1.5], "1.5 in the prompt is not a token id"),
        (["a"], "'a' in the prompt is not a token id"),
        ([2**40], "is not a token id"),
        ([5] * 256, "the prompt has 256 tokens, but the context is 256"),
    ],
)
def test_invalid_prompts_are_refused(tokenizer: Tokenizer, prompt: Any, message: str) -> None:
    frontend = Frontend(Scripted([5]), tokenizer, [1])
    with pytest.raises(RequestRefused, match=message):
        frontend.prepare(prompt, SamplingParams())


def test_token_ids_in_params_are_checked(tokenizer: Tokenizer) -> None:
    frontend = Frontend(Scripted([5]), tokenizer, [1])
    with pytest.raises(RequestRefused, match="stop_token_ids=9999 is not a token id"):
        frontend.prepare([5], SamplingParams(stop_token_ids=[9999]))
    with pytest.raises(RequestRefused, match="logit_bias=2048 is not a token id"):
        frontend.prepare([5], SamplingParams(logit_bias={2048: 1.0}))


# -- the offline API


def test_results_have_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [PROMPT, [0, 10, 11], "In the beginning"]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (12, 3, 7)]
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in results] == [12, 3, 7]
    assert [r.prompt for r in results] == [PROMPT, None, "In the beginning"]
    assert results[1].prompt_token_ids == [0, 10, 11]
    for result, own in zip(results, params, strict=True):
        alone = llm.generate(result.prompt_token_ids, own, use_tqdm=False)
        assert alone[0].outputs[0].token_ids == result.outputs[0].token_ids
        assert result.outputs[0].finish_reason == "length"
        assert result.finished


def test_n_outputs_equal_n_requests(llm: LLM) -> None:
    three = llm.generate(PROMPT, SamplingParams(n=3, seed=40, max_tokens=10), use_tqdm=False)[0]
    single = [llm.generate(PROMPT, SamplingParams(seed=40 + i, max_tokens=10), use_tqdm=False)[0] for i in range(3)]
    assert [o.token_ids for o in three.outputs] == [s.outputs[0].token_ids for s in single]
    assert len({tuple(o.token_ids) for o in three.outputs}) == 3
    assert [o.index for o in three.outputs] == [0, 1, 2]


def test_min_tokens_exclude_eos_and_stop_ids(llm: LLM) -> None:
    free = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0].outputs[0].token_ids
    params = SamplingParams(
        temperature=0, max_tokens=8, min_tokens=5, stop_token_ids=sorted(set(free)), logit_bias={1: 100.0}
    )
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    assert not {1, *free} & set(output.token_ids[:5]), "the EOS token is the likeliest all along"
    assert (output.token_ids[5:], output.finish_reason) == ([1], "stop")


def test_outputs_without_seed_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5)
    texts = {llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text for _ in range(3)}
    assert len(texts) == 3


def test_demo_model_writes_words_with_logprobs(llm: LLM) -> None:
    result = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=2), use_tqdm=False)[0].outputs[
        0
    ]
    assert result.text.startswith(", ")
    assert all(word.strip(",.:;").isalpha() for word in result.text.split()[1:-1])
    assert result.logprobs is not None
    assert result.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for p, t in zip(result.logprobs, result.token_ids, strict=True))
    )
    for position, token in zip(result.logprobs, result.token_ids, strict=True):
        assert next(iter(position)) == token
        assert position[token].rank == 1
        assert len(position) == 2


def test_stream_text_equals_generate(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=30)
    wanted = llm.generate([PROMPT, "Blessed"], params, use_tqdm=False)
    texts = {(p, i): "" for p in range(2) for i in range(2)}
    results: dict[str, RequestOutput] = {}
    for event in llm.stream([PROMPT, "Blessed"], params):
        if isinstance(event, Event):
            texts[event.prompt, event.index] += event.text
        else:
            results[event.request_id] = event
    assert texts == {(p, o.index): o.text for p, r in enumerate(wanted) for o in r.outputs}
    assert len(results) == 2


def test_stream_left_early_frees_its_requests(llm: LLM) -> None:
    for _ in range(3):
        stream = llm.stream([PROMPT] * 10, SamplingParams(max_tokens=500, ignore_eos=True))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)) == 1
    engine = llm.executor._engine  # type: ignore[attr-defined]
    assert not engine.has_work
    assert engine.scheduler.pages.num_available == 400


def test_chat_applies_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Who was Moses?"}]
    params = SamplingParams(temperature=0, max_tokens=5)
    answer = llm.chat(conversation, params, use_tqdm=False)[0]
    assert answer.prompt_token_ids == llm.tokenizer._tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    both = llm.chat([conversation, conversation], params, use_tqdm=False)
    assert [b.outputs[0].token_ids for b in both] == [answer.outputs[0].token_ids] * 2


def test_invalid_prompt_among_others_starts_none(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    before = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(RequestRefused, match="prompt 1: the prompt is empty"):
        llm.generate([PROMPT, ""], params, use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling params for 1 prompts"):
        llm.generate([PROMPT], [params, params], use_tqdm=False)
    assert not llm.executor._engine.has_work  # type: ignore[attr-defined]
    assert llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids == before
    assert llm.generate([], params, use_tqdm=False) == []


def test_eos_ends_the_output_without_text(llm: LLM) -> None:
    eos = 1
    found = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=9, logit_bias={eos: 100}), use_tqdm=False)[0]
    assert found.outputs[0].token_ids == [eos]
    assert (found.outputs[0].text, found.outputs[0].finish_reason, found.outputs[0].stop_reason) == ("", "stop", None)


def test_max_tokens_none_generates_to_the_end_of_the_context() -> None:
    with LLM(device="cpu", max_model_len=64, num_pages=8) as llm:
        found = llm.generate([5] * 40, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0]
        assert len(found.outputs[0].token_ids) == 24


def test_default_sampling_params_are_the_checkpoints(llm: LLM) -> None:
    assert llm.get_default_sampling_params().temperature < 1


# -- close


def test_every_method_after_close_raises_the_same_error() -> None:
    llm = LLM(device="cpu", num_pages=16)
    executor = llm.executor
    before, underway = llm.stream(PROMPT), llm.stream(PROMPT, SamplingParams(max_tokens=50, ignore_eos=True))
    next(underway)
    memory = weakref.ref(executor._engine.runner.memory)  # type: ignore[attr-defined]
    llm.close()
    llm.close()
    gc.collect()
    assert memory() is None
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: llm.generate(PROMPT),
        "generate nothing": lambda: llm.generate([]),
        "chat": lambda: llm.chat([{"role": "user", "content": PROMPT}]),
        "stream": lambda: llm.stream(PROMPT),
        "a stream from before": lambda: next(before),
        "a stream underway": lambda: list(underway),
        "defaults": llm.get_default_sampling_params,
        "with": llm.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(EngineClosed, match=r"^this LLM is closed: .*; make a new LLM$"):
            pytest.fail(f"{name} has returned {call()}")
    with pytest.raises(EngineClosed, match="ended by close"):
        executor.poll(0)
    executor.cancel([0])
    assert executor.stats.steps > 0
    assert executor.take_profile() is None


def test_public_methods_are_those_that_close_ends() -> None:
    methods = {name for name in dir(LLM) if not name.startswith("_")}
    assert methods == {"generate", "chat", "stream", "get_default_sampling_params", "close"}


# -- Config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0 must be an integer >= 1"),
        ({"tensor_parallel_size": 5}, "cannot be split over 5 ranks; use tensor_parallel_size=4 or less"),
        ({"page_size": 0}, "page_size=0"),
        ({"kv_layout": "sideways"}, "kv_layout='sideways' is not one of layer-first, page-first"),
        ({"device": "tpu"}, "device='tpu' is not one of auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype='int8' is not one of auto, float32, float16, bfloat16"),
        ({"load_format": "pickle"}, "load_format='pickle'"),
        ({"max_num_batched_tokens": 8}, r"max_num_batched_tokens=8 must be at least max_num_seqs \(256\)"),
        ({"max_model_len": 10**6}, "max_model_len=1000000 is beyond the 2048 positions"),
        ({"max_model_len": 2048, "num_pages": 2}, "max_model_len=2048 needs more than the 32 tokens"),
        ({"attention_backend": "flashinfer", "device": "cpu"}, "attention_backend='flashinfer' needs a GPU"),
        ({"deterministic": True, "device": "cpu"}, "for bfloat16 and float16 on GPUs, not float32 on cpu"),
        ({"deterministic": True, "device": "cuda", "dtype": "float32"}, "not float32 on cuda"),
        ({"deterministic": True, "all_reduce": "nccl"}, "all_reduce='nccl' sums in NCCL's order"),
        ({"deterministic": True, "attention_backend": "torch"}, "attention_backend='torch' cannot be combined with"),
        ({"gpus_per_rank": 2.0}, r"gpus_per_rank=2.0 must be in \(0, 1\]"),
        ({"num_pages": 4, "kv_cache_memory": 1.0}, "both size the KV cache"),
        ({"kv_cache_memory": 1e-9}, "raise kv_cache_memory"),
        ({"tensor_paralel_size": 2}, "unknown option tensor_paralel_size; the options are model, tensor_parallel_size"),
        ({"model": "/no/such/folder"}, "model folder /no/such/folder does not exist"),
    ],
)
def test_invalid_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        LLM(**options)
    assert "\n" not in str(caught.value)


def test_context_is_limited_to_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(device="cpu", num_pages=4) as llm:
        assert llm.executor.limits.max_length == 64
    assert "context limited to 64 tokens" in caplog.text


def test_package_exports_its_public_names() -> None:
    assert set(lockstep.__all__) == {"LLM", "Config", "SamplingParams", "StructuredOutputsParams"}
    assert lockstep.Config is Config
    with pytest.raises(AttributeError, match="exports LLM"):
        lockstep.nothing  # noqa: B018
