"""The command `lockstep`. Options that configure the runtime are generated from the fields of Config."""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import sys
import time
from contextlib import closing, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ...runtime.config import Config
from ...runtime.outputs import CompletionOutput, Event, RequestOutput
from ...runtime.request import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ...runtime.version import __version__
from ..bench.commands import app as bench
from ..doctor.preflight import Preflight
from ..errors import PlacementError, RankFailed
from ..options import LogLevel, start_logging, with_config, with_fields
from ..server.server_config import ServerConfig
from ..signals import end_at_once, end_on_sigterm, signals_wait, status_of
from .chat import chat

if TYPE_CHECKING:
    from ..llm import LLM

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bench, name="bench")
DEFAULT_MAX_TOKENS = 128


def main() -> None:
    """The console script: errors that a user can act on are one line, without a traceback."""
    end_on_sigterm()
    try:
        app()
    except ValueError as error:
        _fail(error, code=2)
    except (PlacementError, RankFailed) as error:
        _fail(error, code=1)
    except SystemExit as end:
        atexit.register(end_at_once)  # all is undone, and what others have registered comes after it
        sys.exit(status_of(end))


def _fail(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def lockstep(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Tensor-parallel inference for large language models."""
    if version:
        print(f"lockstep {__version__}")
        raise typer.Exit


@app.command()
@with_config
def generate(
    config: dict[str, Any],
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat for several.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A file that is one prompt; repeat for several.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, put into the chat template.")
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(help=f"Longest output; {DEFAULT_MAX_TOKENS} if not given.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; the model's recommendation if not given.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this total probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens; random if not given.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the output at this text; repeat for several.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="The output keeps to this JSON schema: a file, or the schema itself.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The whole output matches this regular expression.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="The output is one of these; repeat for several.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Outputs for each prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities of this many candidates.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to max-tokens whatever is sampled.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each output.")] = False,
    log_level: LogLevel = "info",
) -> None:
    """Complete prompts; text streams to stdout as it comes."""
    start_logging(log_level)
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs is printed with --json only; add --json")
    prompts = _read_prompts(prompt or [], prompt_file or [])
    chosen: dict[str, Any] = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop or None,
        "n": n, "logprobs": logprobs, "ignore_eos": ignore_eos, "max_tokens": max_tokens,
        "structured_outputs": _structured(json_schema, regex, choice or None),
    }  # fmt: skip
    SamplingParams(**{k: v for k, v in chosen.items() if v is not None})  # refuse what is wrong before loading a model
    with signals_wait():  # torch and transformers: seconds that --help and a wrong flag need not wait for
        import transformers.models.auto.tokenization_auto  # noqa: F401 - which LLM would import

        from ..llm import LLM

    stdout = sys.stdout
    with redirect_stdout(sys.stderr), LLM(**config) as llm:  # Ray reports the death of a process on stdout
        params = _with_defaults(llm.get_default_sampling_params(), chosen)
        inputs = [llm.tokenizer.encode_chat([{"role": "user", "content": p}]) for p in prompts] if chat else prompts
        started = time.perf_counter()
        results = _show(llm, inputs, params, _Printer(stdout, prompts, params.n, as_json))
        seconds = time.perf_counter() - started
        for result in results:
            for output in result.outputs:
                if output.finish_reason == "error":
                    log.error("prompt %s, output %d: %s", result.request_id, output.index, output.stop_reason)
        tokens = sum(len(o.token_ids) for r in results for o in r.outputs)
        outputs = sum(len(r.outputs) for r in results)
        log.info(
            "generated %d tokens in %d outputs in %.2f s, %.1f tokens/s, tensor_parallel_size=%d",
            tokens, outputs, seconds, tokens / seconds, llm.config.tensor_parallel_size,
        )  # fmt: skip


@app.command()
@with_config
@with_fields("server", ServerConfig)
def serve(config: dict[str, Any], server: dict[str, Any], *, log_level: LogLevel = "info") -> None:
    """Serve the model over HTTP, as OpenAI does."""
    start_logging(log_level)
    options, asked = ServerConfig(**server), Config.from_options(config)
    with closing(Preflight(asked)) if options.preflight else nullcontext() as preflight:
        with signals_wait():
            from ..server.run import serve as run  # the web framework and torch: seconds

        run(asked, options, preflight)


@app.command("chat")
@with_config
def chat_command(
    config: dict[str, Any],
    *,
    url: Annotated[str | None, typer.Option(help="A server to talk to; the model runs here if not given.")] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Talk to a model, or to a server that serves one: Ctrl-C stops an answer, /exit ends."""
    start_logging(log_level)
    chat(config, url)


@app.command()
@with_config
def doctor(
    config: dict[str, Any],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Say what would keep the ranks from starting here or on the cluster, and the way out; status 1 if anything."""
    start_logging(log_level)
    from ..doctor.diagnosis import diagnose

    asked, stdout, findings = Config.from_options(config), sys.stdout, []
    with redirect_stdout(sys.stderr):
        for finding in diagnose(asked):
            findings.append(finding)
            if not as_json:
                print(finding, file=stdout, flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def _with_defaults(recommended: SamplingParams, chosen: dict[str, Any]) -> SamplingParams:
    """The model's recommendation, overridden by what was given on the command line."""
    given = {k: v for k, v in chosen.items() if v is not None}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return SamplingParams(**{"max_tokens": DEFAULT_MAX_TOKENS, **{k: getattr(recommended, k) for k in names}, **given})


def _structured(json_schema: str | None, regex: str | None, choice: list[str] | None) -> StructuredOutputsParams | None:
    """What the output must look like; a schema that does not begin with a brace is the name of a file."""
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        try:
            json_schema = Path(json_schema).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"JSON schema {json_schema}: {error}") from error
    if json_schema is None and regex is None and choice is None:
        return None
    return StructuredOutputsParams(json=json_schema, regex=regex, choice=choice)


def _read_prompts(texts: list[str], files: list[Path]) -> list[str]:
    prompts = list(texts)
    for path in files:
        try:
            prompts.append(path.read_text().rstrip("\n"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt file {path}: {error}") from error
    if not prompts and sys.stdin is not None and not sys.stdin.isatty():
        prompts = [sys.stdin.read().rstrip("\n")]
    if not prompts:
        raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE, or pipe one in")
    if "" in prompts:
        raise ValueError("the prompt is empty; give a text")
    return prompts


def _show(llm: LLM, inputs: list[Any], params: SamplingParams, printer: _Printer) -> list[RequestOutput]:
    results: dict[int, RequestOutput] = {}
    for event in llm.stream(inputs, params):
        if isinstance(event, Event):
            printer.text(event)
        else:
            number = int(event.request_id)
            results[number] = event
            printer.objects(number, event)
    return [results[i] for i in sorted(results)]


class _Printer:
    """Prints the outputs in order: the first unfinished one as it grows, the others when their turn comes."""

    def __init__(self, out: TextIO, prompts: list[str], n: int, as_json: bool) -> None:
        self._out, self._prompts, self._n, self._as_json = out, prompts, n, as_json
        self._pending: dict[tuple[int, int], list[Event]] = {(p, i): [] for p in range(len(prompts)) for i in range(n)}
        self._headed: tuple[int, int] | None = None

    def text(self, event: Event) -> None:
        if self._as_json:
            return
        self._pending[event.prompt, event.index].append(event)
        while self._pending:
            turn = next(iter(self._pending))
            self._head(turn)
            ready, self._pending[turn] = self._pending[turn], []
            self._out.write("".join(e.text for e in ready))
            self._out.flush()
            if not (ready and ready[-1].finished):
                return
            self._out.write("\n")
            del self._pending[turn]

    def objects(self, number: int, result: RequestOutput) -> None:
        for output in result.outputs if self._as_json else []:
            line = json.dumps(_as_object(self._prompts[number], result, output), ensure_ascii=False)
            print(line, file=self._out, flush=True)

    def _head(self, turn: tuple[int, int]) -> None:
        if turn == self._headed or len(self._prompts) * self._n == 1:
            return
        self._headed = turn
        which = f" ({turn[1] + 1} of {self._n})" if self._n > 1 else ""
        print(f"--- {self._prompts[turn[0]]}{which}", file=self._out, flush=True)


def _as_object(prompt: str, result: RequestOutput, output: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": prompt,
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
    }
    if output.stop_reason is not None:
        found["stop_reason"] = output.stop_reason
    if output.logprobs is not None:
        found["logprobs"] = [
            {
                "token_id": token,
                "logprob": position[token].logprob,
                "top": [{"token_id": i, "logprob": c.logprob, "token": c.decoded_token} for i, c in position.items()],
            }
            for token, position in zip(output.token_ids, output.logprobs, strict=True)
        ]
    return found
