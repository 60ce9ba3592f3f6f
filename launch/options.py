"""Command-line options that several commands share: those made from the fields of Config, and logging."""

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
    """Replace the command's parameter `config` by MODEL and an option for every other field of Config."""
    return with_fields("config", Config)(command)


def with_fields(parameter: str, of: type[Any], only: Sequence[str] = ()) -> Callable[[Command], Command]:
    """Replace the command's `parameter`, a dictionary, by an option for every field of the dataclass `of`, or some."""
    chosen = [f for f in dataclasses.fields(of) if not only or f.name in only]

    def decorate(command: Command) -> Command:
        def wrapped(**given: Any) -> None:
            names = {f.name for f in chosen}
            options = {name: given.pop(name) for name in list(given) if name in names}
            command(**{parameter: options}, **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [*_parameters(of, chosen), *(p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != parameter)]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
        return wrapped

    return decorate


def _parameters(of: type[Any], chosen: Sequence[dataclasses.Field[Any]]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(of)
    for f in chosen:
        note = f.metadata["help"][:1].upper() + f.metadata["help"][1:] + "."
        flag = "--" + f.name.replace("_", "-")
        if f.name == "model":
            info = typer.Argument(metavar="[MODEL]", help=note, show_default=False)
        elif hints[f.name] is bool:
            info = typer.Option(f"{flag}/--no-{flag[2:]}", help=note)
        else:
            info = typer.Option(flag, *f.metadata["flags"], help=note, envvar=f.metadata.get("envvar"))
        yield inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=Annotated[hints[f.name], info]
        )


def start_logging(level: str) -> None:
    """Log to stderr; raises ValueError for a level that there is not."""
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if level not in levels:
        raise ValueError(f"log_level={level!r} is not one of {', '.join(levels)}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("lockstep").setLevel(levels[level])
