"""`lockstep chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.config import Config
from ...runtime.outputs import Event
from ...runtime.sampling_params import SamplingParams
from ..signals import Terminated
from .generate import open_llm

if TYPE_CHECKING:
    from ..llm import LLM

Message = dict[str, Any]
Answer = Callable[[list[Message], dict[str, Any]], Iterator[AnswerPart]]  # (messages, fields of the request) -> parts
ANSWER_S = 10.0  # a server has this time to list its models
NUMBERS = {int: "an integer", float: "a number"}
SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "seed": int}
PROMPT_END_TOKENS = 64  # the end of a prompt shows whether the answer begins with reasoning
HELP = f"""\
/set NAME VALUE  sets one of {", ".join(SETTINGS)}
/system TEXT     sets the system message, or removes it without a text
/think on|off    sets enable_thinking of the chat template
/thinking        shows the reasoning of the last answer
/again           answers the last question anew
/clear           forgets the conversation
/help            shows this
//TEXT           sends a message that begins with a slash
/exit            ends"""


def chat(config: dict[str, Any], url: str | None) -> None:
    """Hold a conversation until the input ends, with the server at `url` or else with the model of `config`."""
    if url is not None:
        talk(remote(url, _named_model(config)), sys.stdout)
    else:
        stdout = sys.stdout
        with open_llm(config) as llm:
            talk(local(llm), stdout)


@dataclass
class Conversation:
    """The questions and answers so far, in turn, and the settings of the next answer."""

    messages: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    reasoning: str = ""  # the reasoning of the last answer

    def ask(self, messages: list[Message], answer: Answer, out: TextIO) -> None:
        """Print an answer to `messages`, and make both the conversation; it stays as it was if there is no answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        text, reasoning, failed = _print_answer(answer([*system, *messages], self.settings), out)
        if failed and len(messages) < len(self.messages):
            return  # the answer that should have been replaced is whole
        if text or reasoning:
            self.reasoning = reasoning
        if text:
            self.messages = [*messages, {"role": "assistant", "content": text}]


def talk(answer: Answer, out: TextIO) -> None:
    """Read lines and print the answers. Ctrl-C stops an answer; its text so far stays in the conversation."""
    print(HELP, file=out)
    conversation = Conversation()
    while (line := _read_line()) is not None and line != "/exit":
        if line == "/again" and conversation.messages:
            conversation.ask(conversation.messages[:-1], answer, out)
        elif line.startswith("/") and not line.startswith("//"):
            print(_run_command(line, conversation), file=out)
        elif line:
            question = {"role": "user", "content": line.removeprefix("/")}
            conversation.ask([*conversation.messages, question], answer, out)


def remote(url: str, model: str | None) -> Answer:
    """Return a function that sends to the server at `url`, to its first model unless `model` names one.

    Raises ValueError if the server does not answer.
    """
    import httpx

    from ..http_client import EventParser, connection, describe, first_model, refusal

    options = connection(url)
    try:
        with httpx.Client(**options | {"timeout": ANSWER_S}) as client:
            models = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ValueError(f"no server answers at {url}: {describe(error)}") from error
    name = model or first_model(models)

    def answer(messages: list[Message], settings: dict[str, Any]) -> Iterator[AnswerPart]:
        events, body = EventParser(), {"model": name, "messages": messages, "stream": True, **settings}
        try:
            with (
                httpx.Client(**options) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read())
                has_choices = False
                chunks = (chunk for data in response.iter_bytes() for chunk in events.push(data))
                for choice in (choice for chunk in chunks for choice in chunk.choices):
                    has_choices = True
                    yield AnswerPart("reasoning", choice.new_reasoning)
                    yield AnswerPart("content", choice.new_text)
                if not has_choices:
                    kind = response.headers.get("content-type", "no content type")
                    raise ValueError(
                        f"{url} answered without a completion ({kind}); is it an OpenAI-compatible server?"
                    )
        except httpx.HTTPError as error:
            raise ValueError(f"{url}: {describe(error)}") from error

    return answer


def local(llm: LLM) -> Answer:
    """Return a function that generates with a model in this process."""

    from ...runtime.chat.chat_formats import find_format

    tokenizer = llm.tokenizer
    chat_format = find_format(
        "auto", "auto", tokenizer.chat_template, tokenizer.response_template, tokenizer.special_tokens
    )
    defaults = {"max_tokens": None, "skip_special_tokens": not chat_format.needs_special_tokens(())}

    def answer(messages: list[Message], settings: dict[str, Any]) -> Iterator[AnswerPart]:
        fields = dict(settings)
        variables = fields.pop("chat_template_kwargs", None)
        params = msgspec.structs.replace(llm.get_default_sampling_params(), **{**defaults, **fields})
        prompt = tokenizer.encode_chat(messages, variables)
        parser = chat_format.parser((), tokenizer.decode(prompt[-PROMPT_END_TOKENS:], skip_special_tokens=False))
        events = llm.stream([prompt], params)
        assert isinstance(events, Generator), "closing it cancels the request"
        with _held_interrupts() as interrupted, closing(events):
            for event in events:
                if interrupted():
                    raise KeyboardInterrupt
                if isinstance(event, Event):
                    yield from parser.push(event.text) if parser else [AnswerPart("content", event.text)]
                    if parser and event.finished:
                        yield from parser.finish(is_cut=event.is_cut)

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


def _print_answer(answer: Iterator[AnswerPart], out: TextIO) -> tuple[str, str, bool]:
    """Print an answer piece by piece, its reasoning folded; returns its text, its reasoning, and whether it failed.

    A refusal is printed instead of raised.
    """
    text, reasoning, note, failed, thinks_since = "", "", "", False, 0.0
    try:
        for kind, piece in answer:
            if kind == "reasoning":
                if piece and not reasoning:
                    thinks_since = time.perf_counter()
                    print("[thinking ...", end="", file=out, flush=True)
                reasoning += piece
                continue
            if piece and thinks_since:
                print(f" {time.perf_counter() - thinks_since:.1f} s]", file=out)
                thinks_since = 0.0
            text += piece
            print(piece, end="", file=out, flush=True)
    except Terminated:
        raise
    except KeyboardInterrupt:
        note = " [stopped]"
    except ValueError as error:
        note, failed = f"\nerror: {error}" if text else f"error: {error}", True
    print(f"]{note}" if thinks_since else note, file=out)
    return text, reasoning, failed


def _run_command(line: str, conversation: Conversation) -> str:
    """Run a line that begins with a slash; returns the reply to the user."""
    command, _, text = line.partition(" ")
    match line.split():
        case ["/clear"]:
            conversation.messages.clear()
            return "a new conversation"
        case ["/again"]:
            return "there is no answer yet"
        case ["/thinking"]:
            return conversation.reasoning or "the last answer has no reasoning"
        case ["/think", "on" | "off" as switch]:
            conversation.settings["chat_template_kwargs"] = {"enable_thinking": switch == "on"}
            return f"enable_thinking is {switch}"
        case ["/set", name, value] if name in SETTINGS:
            try:
                conversation.settings[name] = _parse_setting(name, value)
            except ValueError as error:
                return f"error: {error}"
            return f"{name} is {value}"
        case ["/set", *_]:
            return f"error: write /set NAME VALUE with one of {', '.join(SETTINGS)}"
    if command == "/system":
        conversation.system = text.strip()
        return "the system message is set" if conversation.system else "no system message"
    return HELP if command == "/help" else f"error: there is no {line:.32}; /help lists the commands"


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
