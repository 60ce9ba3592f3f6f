"""The command `lockstep`: its subcommands and its exit status.

Options that configure the runtime are made from the fields of Config.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext, redirect_stdout
from typing import Annotated, Any

import typer

from ...comm.message_text import counted
from ...runtime.config import Config
from ...runtime.model.checkpoint import check_local_model
from ...runtime.startup_timer import count_from_process_start
from ...runtime.version import __version__
from ..bench.commands import app as bench
from ..cluster.ray_starter import start_ray_ahead
from ..doctor.finding import Finding
from ..doctor.preflight import Preflight
from ..errors import EngineFailed, PlacementError, RankFailed
from ..options import LogLevel, start_logging, with_config, with_fields
from ..server.batch_file import BatchFiles
from ..server.server_config import BatchOptions, ServerConfig, read_template
from ..server.server_socket import bind
from ..signals import Terminated, end_at_once, end_on_sigterm, signals_wait, status_of
from ..standard_streams import protect_standard_streams
from .chat import chat
from .generate import GenerateOptions, generate

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command; an error that a user can act on is one line on stderr, without a traceback.

    Exit status: 2 for a wrong option or value, 1 for missing resources or failed ranks, 128 + number for a signal.
    """
    count_from_process_start()
    protect_standard_streams()
    end_on_sigterm()
    # Processes that libraries start, such as multiprocessing's, import nothing from the current folder (Python 3.11).
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        check_encoding(sys.argv[1:])
        check_model_is_no_option(sys.argv[1:])
        app()
    except (ValueError, PlacementError, RankFailed, EngineFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt as interruption:  # outside a command, where typer does not catch it
        atexit.register(end_at_once)
        sys.exit(128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT))
    except SystemExit as end:
        atexit.register(end_at_once)  # runs first at exit: the ranks have stopped, and signals need not be handled
        sys.exit(status_of(end))


def check_encoding(arguments: Sequence[str]) -> None:
    """Raise ValueError for an argument that is not UTF-8: neither a tokenizer nor Ray takes it."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"the argument {os.fsencode(argument)!r} is not UTF-8; encode it as UTF-8")


def check_model_is_no_option(arguments: Sequence[str]) -> None:
    """Raise ValueError for `--model`, which other servers have; only a benchmark of a running server has it here."""
    is_option = any(argument.split("=")[0] == "--model" for argument in arguments)
    if is_option and arguments[:2] not in (["bench", "serve"], ["bench", "comm"]):
        raise ValueError("--model is no option: the model is the first argument; lockstep serve org/name")


@app.callback(invoke_without_command=True)
def lockstep(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Tensor-parallel inference for large language models."""
    if version:
        print(f"lockstep {__version__}")
        raise typer.Exit


@app.command("generate")
@with_config
@with_fields("options", GenerateOptions)
def generate_command(config: dict[str, Any], options: dict[str, Any], *, log_level: LogLevel = "info") -> None:
    """Complete prompts; text streams to stdout as it comes."""
    start_logging(log_level)
    generate(config, GenerateOptions(**options))


@app.command("serve")
@with_config
@with_fields("server_options", ServerConfig)
def serve_command(config: dict[str, Any], server_options: dict[str, Any], *, log_level: LogLevel = "info") -> None:
    """Serve a model over HTTP with the APIs of OpenAI and Anthropic."""
    start_logging(log_level)
    options, runtime_config = ServerConfig(**server_options), Config.from_options(config)
    check_local_model(runtime_config)
    chat_template = read_template(options.chat_template)
    with redirect_stdout(sys.stderr), bind(options) as listener:  # nobody may read stdout, where libraries print
        checks = closing(Preflight(runtime_config)) if options.preflight else nullcontext()
        with checks as preflight, start_ray_ahead(runtime_config, options.replicas):
            with signals_wait():
                from ..server.serve import serve  # imports the web framework and torch, which takes seconds

            serve(runtime_config, options, listener, chat_template, preflight)


@app.command("run-batch")
@with_config
@with_fields("batch_options", BatchOptions)
def run_batch_command(config: dict[str, Any], batch_options: dict[str, Any], *, log_level: LogLevel = "info") -> None:
    """Answer a file of requests in OpenAI's batch format.

    The same command continues after a kill. Status 1 if one of the answers is an error.
    """
    start_logging(log_level)
    options, runtime_config = BatchOptions(**batch_options), Config.from_options(config)
    check_local_model(runtime_config)
    chat_template = read_template(options.chat_template)
    with closing(BatchFiles(options)) as batch:
        if batch.left:
            with redirect_stdout(sys.stderr), start_ray_ahead(runtime_config):
                with signals_wait():
                    from ..server.run_batch import run_batch

                run_batch(runtime_config, options, batch, chat_template)
        answers = batch.answers
        counts = counted(len(answers.answered), "answer"), counted(answers.num_errors, "error")
        print(f"{counts[0]} in {options.output_file}, {counts[1]}", file=sys.stderr)
        if answers.num_errors:
            raise typer.Exit(1)


@app.command("chat")
@with_config
def chat_command(
    config: dict[str, Any],
    *,
    url: Annotated[str | None, typer.Option(help="A server to talk to; the model runs here if not given.")] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Chat in the terminal with a model, or with a server.

    Ctrl-C stops an answer, /exit ends.
    """
    start_logging(log_level)
    chat(config, url)


@app.command("doctor")
@with_config
def doctor_command(
    config: dict[str, Any],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Check everything that a start needs, here or on a cluster.

    Each problem has a fix. Status 1 if a check fails.
    """
    start_logging(log_level)
    from ..doctor.diagnosis import diagnose

    stdout, findings = sys.stdout, list[Finding]()
    with redirect_stdout(sys.stderr):
        for finding in diagnose(Config.from_options(config), reads_contents=True):
            if not as_json:
                print(finding.after(findings), file=stdout, flush=True)
            findings.append(finding)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
