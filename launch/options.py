"""Command-line options that several commands share: those made from the fields of Config, and logging."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer

from ..runtime.config import Config

LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error; logs go to stderr.")]


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's parameter `config` by MODEL and an option for every other field of Config."""

    def wrapped(**given: Any) -> None:
        names = {f.name for f in dataclasses.fields(Config)}
        options = {name: given.pop(name) for name in list(given) if name in names}
        command(config=options, **given)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
    parameters = [*_config_parameters(), *own]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def _config_parameters() -> Iterator[inspect.Parameter]:
    hints = get_type_hints(Config)
    for f in dataclasses.fields(Config):
        note = f.metadata["help"][:1].upper() + f.metadata["help"][1:] + "."
        flag = "--" + f.name.replace("_", "-")
        if f.name == "model":
            info = typer.Argument(metavar="[MODEL]", help=note, show_default=False)
        elif hints[f.name] is bool:
            info = typer.Option(f"{flag}/--no-{flag[2:]}", help=note)
        else:
            info = typer.Option(flag, *f.metadata["flags"], help=note)
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
