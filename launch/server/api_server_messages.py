"""Messages between the process of the engine and the API server processes, encoded as msgpack.

    API server --Command--> engine's process
    API server <--Notice--- engine's process

`call` is a number that the API server chooses: a CommandReply or a StreamFailed has that of its command.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...runtime.outputs import Event, Logprob, PositionLogprobs
from ...runtime.plan import FinishReason
from ...runtime.request import Origin, RequestRefused
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ..engine.grammar_check import GrammarsWaiting
from ..errors import EngineFailed, RequestCrashedEngine
from .api_errors import ApiError
from .engine_client import EngineStatus
from .request_metrics import RequestMetrics

FailureKind = Literal["refused", "grammars_waiting", "crashed_engine", "engine_failed"]
CLASSES: dict[FailureKind, type[Exception]] = {
    "grammars_waiting": GrammarsWaiting, "refused": RequestRefused, "crashed_engine": RequestCrashedEngine,
    "engine_failed": EngineFailed,
}  # fmt: skip


class EncodedError(msgspec.Struct, frozen=True):
    """An exception of one of CLASSES, or an ApiError, which has a status; any other one has no kind."""

    message: str
    kind: FailureKind | None = None
    status: int | None = None
    param: str | None = None
    code: str | None = None

    @classmethod
    def of(cls, error: Exception) -> EncodedError:
        """Return the message for an exception."""
        if isinstance(error, ApiError):
            return cls(str(error), status=error.status, param=error.param, code=error.code)
        kind = next((name for name, error_class in CLASSES.items() if isinstance(error, error_class)), None)
        return cls(str(error), kind)

    def exception(self) -> Exception:
        """Return an exception of the same class; RuntimeError for one without a kind."""
        if self.status is not None:
            return ApiError(self.status, self.message, param=self.param, code=self.code)
        return RuntimeError(self.message) if self.kind is None else CLASSES[self.kind](self.message)


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Admit a request with so many outputs, until Release; the CommandReply has the failure if it is refused."""

    call: int
    num_outputs: int
    client: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """End what Admit has begun."""

    call: int


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Generate the outputs of a prompt: their events come in StreamEvents, a failure in StreamFailed."""

    call: int
    prompt_ids: list[int]
    cache_salt: str | None
    params: SamplingParams
    origin: Origin


class CancelStream(msgspec.Struct, frozen=True, tag=True):
    """End a Generate whose outputs have not ended."""

    call: int


class CheckGrammar(msgspec.Struct, frozen=True, tag=True):
    """Compile a constraint; the CommandReply has the failure if it cannot be used."""

    call: int
    params: StructuredOutputsParams


class ReadStatus(msgspec.Struct, frozen=True, tag=True):
    """CommandReply with an EngineStatus."""

    call: int


class ReadMetrics(msgspec.Struct, frozen=True, tag=True):
    """CommandReply with the metrics of the requests of all API servers."""

    call: int


class OwnMetrics(msgspec.Struct, frozen=True, tag=True):
    """The metrics of the sender's requests: once a second, which shows that it is alive, and after SendMetrics."""

    metrics: RequestMetrics


class ConnectionsClosed(msgspec.Struct, frozen=True, tag=True):
    """So many of the connections that were passed to the sender have ended."""

    number: int


class StreamEvent(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """An Event without what all events of its prompt share."""

    call: int
    index: int
    text: str
    token_ids: list[int]
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None

    @classmethod
    def of(cls, call: int, event: Event) -> StreamEvent:
        """Return the message for an event."""
        return cls(
            call, event.index, event.text, event.token_ids, event.num_cached_tokens, event.finish_reason,
            event.stop_reason, event.logprobs, event.text_offsets,
        )  # fmt: skip

    def event(self, prompt_ids: list[int], prompt_logprobs: PositionLogprobs | None) -> Event:
        """Return the event of a prompt with these ids and log-probabilities."""
        return Event(
            self.index, self.text, self.token_ids, self.logprobs, self.finish_reason, self.stop_reason, prompt_ids,
            self.num_cached_tokens, prompt_logprobs, 0, self.text_offsets,
        )  # fmt: skip


class StreamEvents(msgspec.Struct, frozen=True, tag=True):
    """The new events of all streams of the receiver."""

    events: list[StreamEvent]


class PromptLogprobsPart(msgspec.Struct, frozen=True, tag=True):
    """The log-probabilities of the next positions of a prompt; all parts come before the first event."""

    call: int
    logprobs: PositionLogprobs


class StreamFailed(msgspec.Struct, frozen=True, tag=True):
    """The end of a Generate that cannot go on."""

    call: int
    failure: EncodedError


class CommandReply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a command: what it returns, or its failure."""

    call: int
    status: EngineStatus | None = None
    metrics: RequestMetrics | None = None
    failure: EncodedError | None = None


class SendMetrics(msgspec.Struct, frozen=True, tag=True):
    """Send OwnMetrics now."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Complete the answers that have all their events, and end."""


Command = (
    Admit | Release | Generate | CancelStream | CheckGrammar | ReadStatus | ReadMetrics | OwnMetrics | ConnectionsClosed
)
Notice = StreamEvents | PromptLogprobsPart | StreamFailed | CommandReply | SendMetrics | Shutdown
encode = msgspec.msgpack.Encoder().encode
decode_command: Any = msgspec.msgpack.Decoder(Command).decode
decode_notice: Any = msgspec.msgpack.Decoder(Notice).decode
