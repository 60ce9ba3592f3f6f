"""The front end's side of every live request: what was asked, what has come, and the text of it.

This is the ledger from which requests are admitted again after their ranks have failed: prompt ids, tokens produced,
sampling parameters with the seed. Ranks hold nothing that is not here.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from .executor import Executor
from .outputs import CompletionOutput, Event, Logprob, RequestOutput
from .plan import Finished, FinishReason, PromptLogprobs, StepOutput, TokenLogprobs
from .request import Request, RequestRefused, SamplingParams
from .sampling.grammar import Vocabulary, try_out
from .tokenizer import Detokenizer, Tokenizer

log = logging.getLogger(__name__)
Prompt = str | Sequence[int]
INT64 = 2**64


class Output:
    """One output on its way: its tokens, its text, and how much of the text has been handed out."""

    def __init__(self, request: Request, owner: Generation, index: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.owner = owner
        self.output = CompletionOutput(index)
        self.running = False  # whether the ranks have begun with it, as far as is known here
        params = request.params
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._tokenizer = tokenizer
        self._stops = params.stop_strings
        self._held_back = max((len(s) for s in self._stops), default=1) - 1  # may still become a stop string
        self._text = Detokenizer(tokenizer, owner.prompt_ids, skip_special_tokens=params.skip_special_tokens)
        self._given = 0  # characters of the text that have been handed out
        self._told = 0  # tokens that have been

    def push(self, token: int, logprobs: TokenLogprobs | None, finished: Finished | None) -> bool:
        """Take in one token; True if a stop string in the text has ended the output, which the ranks do not know."""
        out = self.output
        out.token_ids.append(token)
        if logprobs is not None:
            self._push_logprobs(token, logprobs)
        ends_it = finished is not None and finished.stop_id is not None
        searched = len(out.text)
        if not ends_it or self.request.params.include_stop_str_in_output:
            out.text += self._text.push(token)
        if finished is not None:
            out.text += self._text.flush()
        if self._cut_at_stop_string(searched):
            return finished is None
        if finished is not None:
            self.end(
                finished.reason, finished.stop_id if finished.stop_id in self.request.params.stop_token_ids else None
            )
        return False

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    @property
    def finished(self) -> bool:
        return self.output.finish_reason is not None

    def take_text(self) -> str:
        """The text that is certain and has not been taken yet."""
        end = len(self.output.text) if self.finished else max(self._given, len(self.output.text) - self._held_back)
        text, self._given = self.output.text[self._given : end], end
        return text

    def take_event(self, prompt: int = 0) -> Event:
        """Return all tokens and text that have not been taken yet; `prompt` goes into the event."""
        out, start = self.output, self._told
        self._told = len(out.token_ids)
        return Event(
            index=out.index,
            text=self.take_text(),
            token_ids=out.token_ids[start:],
            logprobs=None if out.logprobs is None else out.logprobs[start:],
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
            prompt_token_ids=self.owner.prompt_ids,
            num_cached_tokens=self.owner.num_cached_tokens,
            prompt_logprobs=self.owner.prompt_logprobs,
            prompt=prompt,
        )

    def resumed(self) -> Request:
        """The request as ranks that know nothing of it must be asked: with what it has produced."""
        self.running = False
        request = self.request
        produced = np.array(self.output.token_ids, np.int32)
        return msgspec.structs.replace(request, tokens=np.concatenate((request.tokens, produced)))

    def _cut_at_stop_string(self, searched: int) -> bool:
        """End the output at the first stop string that reaches into the text after `searched`."""
        if len(self.output.token_ids) <= self.request.params.min_tokens:
            return False
        hits = [(at, s) for s in self._stops if (at := self.output.text.find(s, max(0, searched - len(s) + 1))) >= 0]
        if not hits:
            return False
        at, stop = min(hits)
        keep = at + len(stop) if self.request.params.include_stop_str_in_output else at
        self.output.text = self.output.text[:keep]
        self.end("stop", stop)
        return True

    def _push_logprobs(self, token: int, found: TokenLogprobs) -> None:
        out = self.output
        assert out.logprobs is not None
        assert out.cumulative_logprob is not None
        out.logprobs.append(_candidates(self._tokenizer, token, found))
        out.cumulative_logprob += found.token


class Generation:
    """A prompt with its n outputs on their way."""

    def __init__(self, number: int, prompt: str | None, ids: list[int], *, explained: bool = False) -> None:
        self.number = number
        self.prompt = prompt
        self.prompt_ids = ids
        self.sequences: list[Output] = []
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] * len(ids) if explained else None

    @property
    def finished(self) -> bool:
        return all(s.finished for s in self.sequences)

    def result(self) -> RequestOutput:
        outputs = [s.output for s in self.sequences]
        return RequestOutput(
            str(self.number), self.prompt, self.prompt_ids, outputs, self.num_cached_tokens, self.prompt_logprobs
        )

    def explain(self, found: PromptLogprobs, tokenizer: Tokenizer) -> None:
        """Take in a chunk of the prompt's log-probabilities; what is there stays, as after a preemption."""
        assert self.prompt_logprobs is not None
        for position, logprobs in enumerate(found.logprobs, start=found.start):
            if self.prompt_logprobs[position] is None:
                self.prompt_logprobs[position] = _candidates(tokenizer, self.prompt_ids[position], logprobs)


class Frontend:
    """Turns prompts into requests and the steps' tokens into text, over any Executor.

    `vocabulary` is for trying grammars before they start; without it somebody else has done so.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.executor = executor
        self._vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.eos_token_ids = list(eos_token_ids)
        self.num_cached_tokens = 0  # found in the prefix cache by requests that began, of
        self.num_looked_up = 0  # so many: prompts, and after a failure what had been produced
        self.num_free_pages: int | None = None  # by the scheduler's account, once a step has ended
        self._live: dict[int, Output] = {}
        self._uids = itertools.count()
        self._numbers = itertools.count()

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Generation:
        """Check a prompt and its parameters and make its requests, without starting them.

        Raises RequestRefused naming what is wrong, the rule and the way out.
        """
        text, ids = (
            (prompt, self.tokenizer.encode(prompt) if prompt else []) if isinstance(prompt, str) else (None, prompt)
        )
        tokens = _token_array(ids)
        has_logprobs = params.prompt_logprobs is not None
        generation = Generation(next(self._numbers), text, tokens.tolist(), explained=has_logprobs)
        first_seed = params.seed if params.seed is not None else secrets.randbits(63)
        for index in range(params.n):
            if index == 1:  # the first has said all that there is to say of the prompt
                params = msgspec.structs.replace(params, prompt_logprobs=None)
            request = self._request(tokens, params, first_seed + index)
            generation.sequences.append(Output(request, generation, index, self.tokenizer))
        try:
            self.executor.limits.check(generation.sequences[0].request)
            if params.structured_outputs is not None and self._vocabulary is not None:
                try_out(self._vocabulary, params.structured_outputs)
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        return generation

    def submit(self, generations: Iterable[Generation], *, later: bool = False) -> None:
        """Start the requests of prepared generations; with `later` they are live, and to be resumed."""
        sequences = [s for g in generations for s in g.sequences]
        self._live.update({s.request.uid: s for s in sequences})
        if not later:
            self.executor.submit([s.request for s in sequences])

    def resubmit(self, executor: Executor, later: Collection[Generation] = ()) -> None:
        """Go on over a new executor: admit every live request again with what it has produced, but those for `later`.

        Greedy and seeded outputs then end with the tokens that they would have had (float32: see SamplingParams).
        Tokens that the old executor had on their way are produced again, and nothing is handed out twice.
        """
        self.executor, self.num_free_pages = executor, None
        self.executor.submit([stream.resumed() for stream in self._live.values() if stream.owner not in later])

    def withdraw(self, uids: Iterable[int]) -> list[Generation]:
        """Take the generations of these requests off the ranks; they are live still, and to be resumed.

        From now on they have other uids: what the ranks still say of the old ones, their end included, is nobody's.
        """
        found = list({s.owner.number: s.owner for uid in uids if (s := self._live.get(uid)) is not None}.values())
        streams = [s for g in found for s in g.sequences if not s.finished]
        self.executor.cancel([s.request.uid for s in streams])
        for stream in streams:
            del self._live[stream.request.uid]
            stream.request = msgspec.structs.replace(stream.request, uid=next(self._uids))
            self._live[stream.request.uid] = stream
        return found

    def resume(self, generation: Generation) -> None:
        """Admit one again that was left for later or withdrawn, with what it has produced."""
        self.executor.submit([stream.resumed() for stream in generation.sequences if not stream.finished])

    def cancel(self, generations: Iterable[Generation], reason: str | None = None) -> None:
        """End what is unfinished of these; their outputs end with reason "abort" and the tokens they have."""
        sequences = [s for g in generations for s in g.sequences if s.request.uid in self._live]
        for sequence in sequences:
            sequence.end("abort", reason)
            del self._live[sequence.request.uid]
        self.executor.cancel([s.request.uid for s in sequences])

    @property
    def live(self) -> list[Output]:
        """The outputs that have not ended, as of now: any thread may ask."""
        return list(self._live.values())

    @property
    def generations(self) -> list[Generation]:
        """Those that have outputs which have not ended."""
        return list({stream.owner.number: stream.owner for stream in self.live}.values())

    def poll(self, timeout_s: float) -> list[Output]:
        """Take in what the ranks have produced, waiting up to timeout_s for it; the outputs that got something new."""
        changed: dict[int, Output] = {}
        for output in self.executor.poll(timeout_s):
            changed.update(self._take_in(output))
        return list(changed.values())

    def _take_in(self, output: StepOutput) -> dict[int, Output]:
        changed = {}
        finished = {f.uid: f for f in output.finished}
        stopped = []
        self._count_cached(output.cached_tokens)
        for uid, found in output.prompt_logprobs.items():
            if uid in self._live:
                self._live[uid].owner.explain(found, self.tokenizer)
        if output.free_pages is not None:
            self.num_free_pages = output.free_pages
        for uid, token in zip(output.uids, output.tokens, strict=True):
            sequence = self._live.get(uid)  # None: ended here while the step was on its way
            if sequence is not None:
                changed[uid] = sequence
                if self._push(sequence, token, output.logprobs.get(uid), finished.get(uid)):
                    stopped.append(uid)
                if sequence.finished:
                    del self._live[uid]
        for uid in finished.keys() & self._live.keys():  # ended without a token: refused by the engine
            changed[uid] = self._live.pop(uid)
            changed[uid].end(finished[uid].reason, finished[uid].error)
        if stopped:
            self.executor.cancel(stopped)
        return changed

    def _push(self, sequence: Output, token: int, logprobs: TokenLogprobs | None, finished: Finished | None) -> bool:
        """`sequence.push`, where an exception, most likely of the tokenizer's own, ends this output and no other."""
        try:
            return sequence.push(token, logprobs, finished)
        except Exception as error:
            log.exception("request %d ends: token %d cannot be taken in", sequence.request.uid, token)
            sequence.end("abort", f"token {token} cannot be shown: {type(error).__name__}: {error}")
            return finished is None

    def _count_cached(self, cached: dict[int, int]) -> None:
        """Requests have begun, with these many of their tokens found in the prefix cache."""
        for uid, number in cached.items():
            stream = self._live.get(uid)
            if stream is None:
                continue
            stream.running = True
            owner, produced = stream.owner, len(stream.output.token_ids)
            self.num_cached_tokens += number
            self.num_looked_up += len(owner.prompt_ids) + produced
            if produced == 0:  # else it is admitted again
                owner.num_cached_tokens = max(owner.num_cached_tokens, min(number, len(owner.prompt_ids)))

    def _request(self, tokens: np.ndarray, params: SamplingParams, seed: int) -> Request:
        room = max(1, self.executor.limits.max_length - len(tokens))
        max_tokens = room if params.max_tokens is None else params.max_tokens
        signed = (seed + INT64 // 2) % INT64 - INT64 // 2
        own = msgspec.structs.replace(params, n=1, seed=signed, max_tokens=max_tokens)
        stop_ids = [*params.stop_token_ids, *([] if params.ignore_eos else self.eos_token_ids)]
        return Request(next(self._uids), tokens, len(tokens), own, stop_ids)


def _candidates(tokenizer: Tokenizer, token: int, found: TokenLogprobs) -> dict[int, Logprob]:
    """The token itself first, then the likeliest ones."""
    entry = {
        i: Logprob(value, rank, tokenizer.decode([i], skip_special_tokens=False))
        for rank, (i, value) in enumerate(zip(found.top_ids, found.top, strict=True), start=1)
    }
    return {token: Logprob(found.token, found.rank, tokenizer.decode([token], skip_special_tokens=False))} | entry


def _token_array(prompt: Sequence[int]) -> np.ndarray:
    """Return the token ids as int32; raises RequestRefused naming the first item that is not one."""
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, prompt))):
        with suppress(OverflowError):  # an integer beyond 64 bits
            tokens = np.array(prompt, np.int64)
            if ((narrow := tokens.astype(np.int32)) == tokens).all():
                return narrow
    wrong = next(i for i in prompt if not _is_token_id(i))
    raise RequestRefused(f"{wrong!r} in the prompt is not a token id; give a string or a list of integers")


def _is_token_id(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -(2**31) <= int(value) < 2**31
