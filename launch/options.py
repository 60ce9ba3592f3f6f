"""Command-line options made from dataclass fields, and the log level, for all commands."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, get_type_hints

import typer

from ..runtime.config import Config

Command = Callable[..., None]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error; logs go to stderr.")]


def with_config(command: Command) -> Command:
    """Replace the command's parameter `config` by the argument MODEL and an option for every other field of Config."""
    return with_fields("config", Config)(command)


def with_fields(parameter: str, options_type: type[Any], only: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Return a decorator that makes the command's `parameter`, a dictionary, from one option for each field.

    options_type  the dataclass with the fields; their metadata are those of `runtime.config.option`
    only          the names of the fields to use; all fields if empty
    """
    fields = [f for f in dataclasses.fields(options_type) if not only or f.name in only]

    def decorate(command: Command) -> Command:
        def wrapped(**arguments: Any) -> None:
            options = {f.name: arguments.pop(f.name) for f in fields if f.name in arguments}
            command(**{parameter: options}, **arguments)

        others = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != parameter]
        parameters = [*_parameters(options_type, fields), *(p.replace(kind=p.KEYWORD_ONLY) for p in others)]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
        return wrapped

    return decorate


def _parameters(options_type: type[Any], fields: Sequence[dataclasses.Field[Any]]) -> Iterator[inspect.Parameter]:
    """Yield typer's parameter for each field; metadata may hold `switch`, the only flag of a boolean option."""
    hints = get_type_hints(options_type)
    for f in fields:
        help_text = f.metadata["help"][:1].upper() + f.metadata["help"][1:] + "."
        flag = "--" + f.name.replace("_", "-")
        if f.name == "model":
            info = typer.Argument(metavar="MODEL", help=help_text, show_default=False)
        elif "switch" in f.metadata:
            info = typer.Option(f.metadata["switch"], help=help_text)
        elif hints[f.name] is bool:
            info = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text)
        else:
            info = typer.Option(flag, *f.metadata["flags"], help=help_text, envvar=f.metadata.get("envvar"))
        yield inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=Annotated[hints[f.name], info]
        )


def start_logging(level: str) -> None:
    """Log to stderr from `level` on; raises ValueError for an unknown level."""
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if level not in levels:
        raise ValueError(f"log_level={level!r} is not one of {', '.join(levels)}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("lockstep").setLevel(levels[level])
