"""`lockstep chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from ...runtime.config import Config
from ...runtime.outputs import Event
from ...runtime.request import SamplingParams
from ..signals import Terminated, signals_wait

if TYPE_CHECKING:
    from ..llm import LLM

Message = dict[str, Any]
Answer = Callable[[list[Message], dict[str, Any]], Iterator[str]]  # (conversation, settings) -> text as it comes
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "seed": int}
HELP = f"/clear forgets the conversation, /set NAME VALUE sets one of {', '.join(SETTINGS)}, /exit ends"


def chat(config: dict[str, Any], url: str | None) -> None:
    """Talk until the input ends; with `url` to the server there, otherwise to the model that `config` describes."""
    if url is not None:
        talk(remote(url, _only_model(config)), sys.stdout)
    else:
        with signals_wait():  # torch: seconds that a wrong option need not wait for
            import transformers.models.auto.tokenization_auto  # noqa: F401 - which LLM would import

            from ..llm import LLM

        stdout = sys.stdout
        with redirect_stdout(sys.stderr), LLM(**config) as llm:  # Ray reports the death of a process on stdout
            talk(local(llm), stdout)


def talk(answer: Answer, out: TextIO) -> None:
    """Read lines, show the answers. Ctrl-C stops an answer, which stays in the conversation as far as it came."""
    print(HELP, file=out)
    messages: list[Message] = []
    settings: dict[str, Any] = {}
    while (line := _read_line()) is not None and line != "/exit":
        if line.startswith("/"):
            print(_command(line.split(), messages, settings), file=out)
        elif line:
            messages.append({"role": "user", "content": line})
            said = _show(answer(messages, settings), out)
            if said:
                messages.append({"role": "assistant", "content": said})
            else:
                messages.pop()  # an unanswered question would be followed by another one, which templates refuse


def remote(url: str, model: str | None) -> Answer:
    """Answers of a server; of its first model if none is named."""
    import httpx

    from ..client import Events, connection, describe, first_model, refusal

    options = connection(url)

    def answer(messages: list[Message], settings: dict[str, Any]) -> Iterator[str]:
        events = Events()
        try:
            with httpx.Client(**options) as client:
                name = model or first_model(client.get("/v1/models"))
                body = {"model": name, "messages": messages, "stream": True, **settings}
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        raise refusal(response.status_code, response.read())
                    for piece in response.iter_bytes():
                        yield from (choice.new_text for chunk in events.push(piece) for choice in chunk.choices)
        except httpx.HTTPError as error:
            raise ValueError(f"{url}: {describe(error)}") from error

    return answer


def local(llm: LLM) -> Answer:
    """Answers of a model in this process."""

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
    """Whether Ctrl-C came: an engine must not be cut in the middle of a step."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _show(answer: Iterator[str], out: TextIO) -> str:
    """Print an answer as it comes; returns what came of it. What is refused is shown, and the conversation goes on."""
    said, note = "", ""
    try:
        for text in answer:
            said += text
            print(text, end="", file=out, flush=True)
    except Terminated:
        raise
    except KeyboardInterrupt:
        note = " [stopped]"
    except ValueError as error:
        note = f"error: {error}"
    print(note, file=out)
    return said


def _command(words: list[str], messages: list[Message], settings: dict[str, Any]) -> str:
    """Carry out a line that begins with a slash; returns what to say of it."""
    match words:
        case ["/clear"]:
            messages.clear()
            return "a new conversation"
        case ["/set", name, value] if name in SETTINGS:
            try:
                SamplingParams(**{name: SETTINGS[name](value)})
            except ValueError as error:
                return f"error: {error}"
            settings[name] = SETTINGS[name](value)
            return f"{name} is {value}"
    return HELP


def _only_model(config: dict[str, Any]) -> str | None:
    """The model, if one was named; raises ValueError for options that only a model in this process could have."""
    default = Config()
    given = [name for name, value in config.items() if name != "model" and value != getattr(default, name)]
    if given:
        raise ValueError(f"--url: the server has its own --{given[0].replace('_', '-')}; drop that option")
    return None if config["model"] == default.model else str(config["model"])


def _read_line() -> str | None:
    """A line of input without its spaces; None at its end or at Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
