"""`lockstep generate`: complete prompts from options, files or a pipe."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from ...comm.message_text import counted
from ...runtime.config import Config, option
from ...runtime.model.checkpoint import check_local_model
from ...runtime.outputs import CompletionOutput, Event, Logprob, RequestOutput
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ..cluster.ray_starter import start_ray_ahead
from ..signals import signals_wait

if TYPE_CHECKING:
    from ..llm import LLM

log = logging.getLogger(__name__)
DEFAULT_MAX_TOKENS = 128
SAMPLING_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "logprobs", "ignore_eos")


def _switch(flag: str, help: str) -> Any:
    return dataclasses.field(default=False, metadata={"help": help, "switch": flag})


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `lockstep generate` beside those of Config."""

    prompt: list[str] | None = option(None, "a prompt; repeat for several")
    prompt_file: list[Path] | None = option(None, "a file that is one prompt; repeat for several")
    chat: bool = _switch("--chat", "each prompt is a user's message, put into the chat template")
    max_tokens: int | None = option(None, f"longest output; {DEFAULT_MAX_TOKENS} if not given")
    temperature: float | None = option(None, "0 is greedy; the model's recommendation if not given")
    top_p: float | None = option(None, "keep the likeliest tokens of this total probability")
    top_k: int | None = option(None, "keep this many of the likeliest tokens; 0 keeps all")
    seed: int | None = option(None, "same seed, same tokens; random if not given")
    stop: list[str] | None = option(None, "end the output at this text; repeat for several")
    json_schema: str | None = option(None, "the output keeps to this JSON schema: a file, or the schema itself")
    regex: str | None = option(None, "the whole output matches this regular expression")
    choice: list[str] | None = option(None, "the output is one of these; repeat for several")
    n: int = option(1, "outputs for each prompt", "-n")
    logprobs: int | None = option(None, "with --json: log-probabilities of this many candidates")
    ignore_eos: bool = _switch("--ignore-eos", "do not end the output at an EOS token")
    as_json: bool = _switch("--json", "print one JSON object for each output")


def generate(config: dict[str, Any], options: GenerateOptions) -> None:
    """Print the outputs of all prompts during generation.

    Raises ValueError for wrong values before the model is loaded. Prompts that are too long, and grammars that cannot
    be compiled, are refused after it, since they need the tokenizer.
    """
    if options.logprobs is not None and not options.as_json:
        raise ValueError("--logprobs is printed with --json only; add --json")
    prompts = _read_prompts(options.prompt or [], options.prompt_file or [])
    sampling = _sampling_fields(options)
    SamplingParams(**sampling)
    stdout = sys.stdout
    with open_llm(config) as llm:
        settings = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling}
        params = msgspec.structs.replace(llm.get_default_sampling_params(), **settings)
        encode_chat = llm.tokenizer.encode_chat
        inputs = [encode_chat([{"role": "user", "content": p}]) for p in prompts] if options.chat else prompts
        started = time.perf_counter()
        results = _stream(llm, inputs, params, OutputPrinter(stdout, prompts, params.n, options.as_json))
        _log_results(results, time.perf_counter() - started, llm.config.tensor_parallel_size)


@contextmanager
def open_llm(config: dict[str, Any]) -> Iterator[LLM]:
    """Yield the model of `config`; within the block, print to stderr what Ray and libraries print to stdout."""
    engine_config = Config.from_options(config)
    check_local_model(engine_config)
    with redirect_stdout(sys.stderr), _load(engine_config, config) as llm:  # Ray reports deaths of processes on stdout
        yield llm


def _load(engine_config: Config, options: dict[str, Any]) -> LLM:
    with start_ray_ahead(engine_config):
        with signals_wait():  # torch takes seconds, which --help and a wrong flag need not wait for
            from ..llm import LLM

        return LLM(**options)


def _read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    prompts = list(texts)
    for path in files:
        try:
            prompts.append(path.read_text("utf-8").rstrip("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt file {path}: {error}") from error
    if not prompts and sys.stdin is not None and not sys.stdin.isatty():
        try:
            prompts = [sys.stdin.read().rstrip("\n")]
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt from stdin: {error}") from error
    if not prompts:
        raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe one in")
    if "" in prompts:
        raise ValueError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or pipe a text in")
    return prompts


def _sampling_fields(options: GenerateOptions) -> dict[str, Any]:
    """Return the arguments for SamplingParams that the command line sets."""
    fields = {name: getattr(options, name) for name in SAMPLING_FIELDS}
    fields |= {"stop": options.stop or None, "structured_outputs": _structured_outputs(options)}
    return {name: value for name, value in fields.items() if value is not None}


def _structured_outputs(options: GenerateOptions) -> StructuredOutputsParams | None:
    schema, choice = options.json_schema, options.choice or None
    if schema is not None and not schema.lstrip().startswith("{"):  # then it names a file
        try:
            schema = Path(schema).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"JSON schema {schema}: {error}") from error
    if schema is None and options.regex is None and choice is None:
        return None
    return StructuredOutputsParams(json=schema, regex=options.regex, choice=choice)


def _stream(
    llm: LLM, inputs: Sequence[str] | Sequence[list[int]], params: SamplingParams, printer: OutputPrinter
) -> list[RequestOutput]:
    """Print the outputs during generation; returns the results in the order of the prompts."""
    results: list[RequestOutput] = []
    for event in llm.stream(inputs, params):
        if isinstance(event, Event):
            printer.add_text(event)
        else:
            results.append(event)
            printer.add_result(event)
    return sorted(results, key=lambda result: int(result.request_id))


def _log_results(results: list[RequestOutput], seconds: float, tensor_parallel_size: int) -> None:
    outputs = [(result, output) for result in results for output in result.outputs]
    for result, output in outputs:
        if output.finish_reason == "error":
            log.error("prompt %s, output %d: %s", result.request_id, output.index, output.stop_reason)
    tokens = sum(len(output.token_ids) for _, output in outputs)
    log.info(
        "generated %s in %s in %.2f s, %.1f tokens/s, tensor_parallel_size=%d",
        counted(tokens, "token"), counted(len(outputs), "output"), seconds, tokens / seconds, tensor_parallel_size,
    )  # fmt: skip


class OutputPrinter:
    """Prints outputs in order: the first unfinished one as it grows, each later one after it."""

    def __init__(self, out: TextIO, prompts: list[str], n: int, as_json: bool) -> None:
        self._out, self._prompts, self._n, self._as_json = out, prompts, n, as_json
        self._pending: dict[tuple[int, int], list[Event]] = {(p, i): [] for p in range(len(prompts)) for i in range(n)}
        self._current: tuple[int, int] | None = None  # (prompt, output) under the last heading

    def add_text(self, event: Event) -> None:
        """Print new text, or keep it until the outputs before it have ended."""
        if self._as_json:
            return
        self._pending[event.prompt, event.index].append(event)
        while self._pending:
            first = next(iter(self._pending))
            self._print_heading(*first)
            events, self._pending[first] = self._pending[first], []
            self._out.write("".join(e.text for e in events))
            self._out.flush()
            if not (events and events[-1].finished):
                return
            self._out.write("\n")
            del self._pending[first]

    def add_result(self, result: RequestOutput) -> None:
        """Print the finished outputs of a prompt as JSON lines, with --json."""
        for output in result.outputs if self._as_json else []:
            prompt = self._prompts[int(result.request_id)]
            line = json.dumps(_as_object(prompt, result, output), ensure_ascii=False)
            print(line, file=self._out, flush=True)

    def _print_heading(self, prompt: int, index: int) -> None:
        if (prompt, index) == self._current or len(self._prompts) * self._n == 1:
            return
        self._current = (prompt, index)
        number = f" ({index + 1} of {self._n})" if self._n > 1 else ""
        print(f"--- {self._prompts[prompt]}{number}", file=self._out, flush=True)


def _as_object(prompt: str, result: RequestOutput, output: CompletionOutput) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "prompt": prompt, "index": output.index, "text": output.text, "token_ids": output.token_ids,
        "finish_reason": output.finish_reason, "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
    }  # fmt: skip
    if output.stop_reason is not None:
        fields["stop_reason"] = output.stop_reason
    if output.logprobs is not None:
        positions = zip(output.token_ids, output.logprobs, strict=True)
        fields["logprobs"] = [_position_as_object(token, candidates) for token, candidates in positions]
    return fields


def _position_as_object(token: int, candidates: dict[int, Logprob]) -> dict[str, Any]:
    top = [{"token_id": i, "logprob": c.logprob, "token": c.decoded_token} for i, c in candidates.items()]
    return {"token_id": token, "logprob": candidates[token].logprob, "top": top}
