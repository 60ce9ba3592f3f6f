"""The state of a prompt's outputs while they are generated: tokens, text, log-probabilities, stop strings.

It is the ledger from which requests are submitted again after their ranks have failed: prompt ids, generated tokens,
sampling parameters with the seed. The ranks hold nothing that is not here.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np

from .detokenizer import Detokenizer, TokenBytes
from .outputs import CompletionOutput, Event, Logprob, PositionLogprobs, RequestOutput
from .plan import FinishReason, PromptLogprobs, RequestEnd, TokenLogprobs
from .request import Request
from .stop_strings import StopChecker


class Output:
    """One output of a generation: its request, its tokens and text so far, and how much of them was streamed."""

    def __init__(self, request: Request, generation: Generation, index: int, detokenizer: Detokenizer) -> None:
        self.request, self.generation, params = request, generation, request.params
        self.completion = CompletionOutput(index)
        self.running = False  # the ranks have admitted the request
        self.submitted_at = 0.0  # time.perf_counter, when its request was first submitted
        if params.has_logprobs:
            self.completion.logprobs, self.completion.cumulative_logprob = [], 0.0
            self.completion.text_offsets = []
        self._detokenizer = detokenizer
        self._stops = StopChecker(params)
        self._num_streamed_chars = self._num_streamed_tokens = 0

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        return len(self.completion.token_ids)

    def append(self, token: int, logprobs: TokenLogprobs | None = None, finished: RequestEnd | None = None) -> None:
        """Add a token; `finished` comes with the last one. A stop string in the text ends the output before that."""
        completion, params = self.completion, self.request.params
        completion.token_ids.append(token)
        searched = len(completion.text)
        is_stop_token = finished is not None and finished.stop_id is not None
        is_shown = not is_stop_token or params.include_stop_str_in_output
        if logprobs is not None:
            self._add_logprobs(token, logprobs, is_shown)
        if is_shown:
            completion.text += self._detokenizer.push(token)
        if finished is not None:
            completion.text += self._detokenizer.flush()
        match = self._stops.find(completion.text, searched) if self.num_tokens > params.min_tokens else None
        if match is not None:
            length, string = match
            completion.text = completion.text[:length]
            self.end("stop", string)
        elif finished is not None:
            self.end(finished.reason, finished.stop_id if finished.stop_id in params.stop_token_ids else None)

    def _add_logprobs(self, token: int, logprobs: TokenLogprobs, is_shown: bool) -> None:
        """Add the log-probabilities of a token before its text; the text of a stop token is not shown."""
        completion, detokenizer = self.completion, self._detokenizer
        assert completion.logprobs is not None
        assert completion.text_offsets is not None
        assert completion.cumulative_logprob is not None
        hidden = detokenizer.skipped_ids if is_shown else detokenizer.skipped_ids | {token}
        entries = candidates(detokenizer.token_bytes, token, logprobs, hidden)
        piece, num_before = detokenizer.peek(token) if is_shown else (b"", 0)
        if piece != entries[token].token_bytes:  # the first token of a text, which may lose its space
            text = piece.decode(errors=detokenizer.token_bytes.errors)
            entries[token] = msgspec.structs.replace(entries[token], decoded_token=text, token_bytes=piece)
        completion.logprobs.append(entries)
        completion.text_offsets.append(len(completion.text) + num_before)
        completion.cumulative_logprob += logprobs.token

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.completion.finish_reason, self.completion.stop_reason = reason, stop_reason

    def take_event(self, prompt: int = 0) -> Event:
        """Return the tokens and the certain text that no event has had yet; `prompt` goes into the event."""
        completion, generation = self.completion, self.generation
        first_token, self._num_streamed_tokens = self._num_streamed_tokens, self.num_tokens
        length, start = len(completion.text), self._num_streamed_chars
        end = length if self.finished else max(start, length - self._stops.num_uncertain)
        self._num_streamed_chars = end
        return Event(
            index=completion.index,
            text=completion.text[start:end],
            token_ids=completion.token_ids[first_token:],
            logprobs=None if completion.logprobs is None else completion.logprobs[first_token:],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            prompt_token_ids=generation.prompt_ids,
            num_cached_tokens=generation.num_cached_tokens,
            prompt_logprobs=generation.prompt_logprobs,
            prompt=prompt,
            text_offsets=None if completion.text_offsets is None else completion.text_offsets[first_token:],
        )

    def resumed(self) -> Request:
        """Return the request for ranks that do not know it: the prompt and the generated tokens."""
        self.running = False
        generated = np.array(self.completion.token_ids, np.int32)
        return msgspec.structs.replace(self.request, tokens=np.concatenate((self.request.tokens, generated)))


class Generation:
    """A prompt with its n outputs."""

    def __init__(self, number: int, prompt: str | None, prompt_ids: list[int], *, has_logprobs: bool = False) -> None:
        self.number, self.prompt, self.prompt_ids = number, prompt, prompt_ids
        self.outputs: list[Output] = []
        self.num_cached_tokens = 0
        self.prompt_logprobs: PositionLogprobs | None = [None] * len(prompt_ids) if has_logprobs else None

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    def result(self) -> RequestOutput:
        completions = [output.completion for output in self.outputs]
        return RequestOutput(
            str(self.number), self.prompt, self.prompt_ids, completions, self.num_cached_tokens, self.prompt_logprobs
        )

    def add_prompt_logprobs(self, chunk: PromptLogprobs, token_bytes: TokenBytes) -> None:
        """Add the log-probabilities of a chunk of the prompt; positions that have some keep them."""
        assert self.prompt_logprobs is not None
        for position, logprobs in enumerate(chunk.logprobs, start=chunk.start):
            if self.prompt_logprobs[position] is None:
                self.prompt_logprobs[position] = candidates(token_bytes, self.prompt_ids[position], logprobs)


def candidates(
    token_bytes: TokenBytes, token: int, logprobs: TokenLogprobs, hidden: Collection[int] = ()
) -> dict[int, Logprob]:
    """Return the token itself first, then the others of `logprobs`; `hidden` tokens add no bytes to a text."""
    ranks = logprobs.top_ranks or range(1, len(logprobs.top_ids) + 1)
    others = {
        candidate: Logprob(
            value, rank, token_bytes.text(candidate), b"" if candidate in hidden else token_bytes[candidate]
        )
        for candidate, value, rank in zip(logprobs.top_ids, logprobs.top, ranks, strict=True)
    }
    piece = b"" if token in hidden else token_bytes[token]
    return {token: Logprob(logprobs.token, logprobs.rank, token_bytes.text(token), piece)} | others
