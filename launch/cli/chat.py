"""`lockstep chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from ...runtime.config import Config
from ...runtime.outputs import Event
from ...runtime.request import SamplingParams
from ..signals import Terminated
from .generate import open_llm

if TYPE_CHECKING:
    from ..llm import LLM

Message = dict[str, Any]
Answer = Callable[[list[Message], dict[str, Any]], Iterator[str]]  # (conversation, settings) -> pieces of text
ANSWER_S = 10.0  # a server has this time to list its models
NUMBERS = {int: "an integer", float: "a number"}
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "seed": int}
HELP = f"/clear forgets the conversation, /set NAME VALUE sets one of {', '.join(SETTINGS)}, /exit ends"


def chat(config: dict[str, Any], url: str | None) -> None:
    """Hold a conversation until the input ends, with the server at `url` or else with the model of `config`."""
    if url is not None:
        talk(remote(url, _named_model(config)), sys.stdout)
    else:
        stdout = sys.stdout
        with open_llm(config) as llm:
            talk(local(llm), stdout)


def talk(answer: Answer, out: TextIO) -> None:
    """Read lines and print the answers. Ctrl-C stops an answer; its text so far stays in the conversation."""
    print(HELP, file=out)
    messages: list[Message] = []
    settings: dict[str, Any] = {}
    while (line := _read_line()) is not None and line != "/exit":
        if line.startswith("/"):
            print(_run_command(line.split(), messages, settings), file=out)
        elif line:
            messages.append({"role": "user", "content": line})
            text = _print_answer(answer(messages, settings), out)
            if text:
                messages.append({"role": "assistant", "content": text})
            else:
                messages.pop()  # chat templates refuse two messages of the user in a row


def remote(url: str, model: str | None) -> Answer:
    """Return a function that sends to the server at `url`, to its first model unless `model` names one.

    Raises ValueError if the server does not answer.
    """
    import httpx

    from ..client import Events, connection, describe, first_model, refusal

    options = connection(url)
    try:
        with httpx.Client(**options | {"timeout": ANSWER_S}) as client:
            models = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ValueError(f"no server answers at {url}: {describe(error)}") from error
    name = model or first_model(models)

    def answer(messages: list[Message], settings: dict[str, Any]) -> Iterator[str]:
        events = Events()
        try:
            with httpx.Client(**options) as client:
                body = {"model": name, "messages": messages, "stream": True, **settings}
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        raise refusal(response.status_code, response.read())
                    for data in response.iter_bytes():
                        yield from (choice.new_text for chunk in events.push(data) for choice in chunk.choices)
        except httpx.HTTPError as error:
            raise ValueError(f"{url}: {describe(error)}") from error

    return answer


def local(llm: LLM) -> Answer:
    """Return a function that generates with a model in this process."""

    def answer(messages: list[Message], settings: dict[str, Any]) -> Iterator[str]:
        params = msgspec.structs.replace(llm.get_default_sampling_params(), **{"max_tokens": None, **settings})
        prompt = llm.tokenizer.encode_chat(messages)
        events = llm.stream([prompt], params)
        assert isinstance(events, Generator), "closing it cancels the request"
        with _held_interrupts() as interrupted, closing(events):
            for event in events:
                if interrupted():
                    raise KeyboardInterrupt
                if isinstance(event, Event):
                    yield event.text

    return answer


@contextmanager
def _held_interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, which must not interrupt a step, and yield a function that returns True after it."""
    signals: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    try:
        yield lambda: bool(signals)
    finally:
        signal.signal(signal.SIGINT, handler)


def _print_answer(answer: Iterator[str], out: TextIO) -> str:
    """Print an answer piece by piece; returns its text. A refusal is printed instead of raised."""
    text, note = "", ""
    try:
        for piece in answer:
            text += piece
            print(piece, end="", file=out, flush=True)
    except Terminated:
        raise
    except KeyboardInterrupt:
        note = " [stopped]"
    except ValueError as error:
        note = f"error: {error}"
    print(note, file=out)
    return text


def _run_command(words: list[str], messages: list[Message], settings: dict[str, Any]) -> str:
    """Run a line that begins with a slash; returns the reply to the user."""
    match words:
        case ["/clear"]:
            messages.clear()
            return "a new conversation"
        case ["/set", name, value] if name in SETTINGS:
            try:
                settings[name] = _parse_setting(name, value)
            except ValueError as error:
                return f"error: {error}"
            return f"{name} is {value}"
    return HELP


def _parse_setting(name: str, text: str) -> Any:
    """Return the number in `text`; raises ValueError if it is none, or not one that the setting may have."""
    kind = SETTINGS[name]
    try:
        value: Any = kind(text)
    except ValueError:
        raise ValueError(f"{name}={text:.32} is not {NUMBERS[kind]}") from None
    SamplingParams(**{name: value})
    return value


def _named_model(config: dict[str, Any]) -> str | None:
    """Return the model if one is named; raises ValueError for options that apply to a model in this process only."""
    default = Config()
    changed = [name for name, value in config.items() if name != "model" and value != getattr(default, name)]
    if changed:
        raise ValueError(f"--url: the server has its own --{changed[0].replace('_', '-')}; drop that option")
    return None if config["model"] == default.model else str(config["model"])


def _read_line() -> str | None:
    """Return a line of input without surrounding spaces; None at the end of the input or at Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
