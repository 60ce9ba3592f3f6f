"""The front end: prompts become requests, and the steps' tokens become text, over any Executor."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy

import msgspec
import numpy as np

from .detokenizer import Detokenizer
from .executor import Executor
from .generation import Generation, Output
from .plan import RequestEnd, StepOutput, TokenLogprobs
from .request import NO_ORIGIN, Origin, PromptFields, Request, RequestRefused
from .sampling.grammar import Vocabulary, try_out
from .sampling_params import SamplingParams
from .stats import EngineDistributions
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)
INT64 = 2**64


Prompt = str | Sequence[int] | PromptFields


class Frontend:
    """The live generations and their executor; with a `vocabulary`, `prepare` also checks a request's grammar."""

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        eos_token_ids: Iterable[int],
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.executor, self.tokenizer, self._vocabulary = executor, tokenizer, vocabulary
        self.eos_token_ids = list(eos_token_ids)
        self.num_prefix_queries = 0  # tokens of started requests: prompts, and output before a failure
        self.num_prefix_hits = 0  # those of num_prefix_queries found in the prefix cache
        self.num_free_pages: int | None = None  # as of the scheduler's last step; None before the first
        self.distributions = EngineDistributions()
        self._live: dict[int, Output] = {}  # unfinished outputs by the uid of their request
        self._uids = itertools.count()
        self._numbers = itertools.count()

    def prepare(self, prompt: Prompt, params: SamplingParams, origin: Origin = NO_ORIGIN) -> Generation:
        """Check a prompt and make its requests, without starting them; raises RequestRefused."""
        text_or_ids, cache_salt = _parts(prompt)
        origin = origin if self.executor.limits.is_fair else Origin(priority=origin.priority)
        tokens = self._tokenize(text_or_ids)
        first = self._request(tokens, params, origin, cache_salt)
        requests = [first, *(self._sibling(first, i) for i in range(1, params.n))]
        try:
            self.executor.limits.check(requests[0])
            if params.structured_outputs is not None and self._vocabulary is not None:
                try_out(self._vocabulary, params.structured_outputs)
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        return self._generation(text_or_ids, tokens.tolist(), requests)

    def submit(self, generations: Iterable[Generation], *, paused: bool = False) -> None:
        """Start the requests of prepared generations; `paused` ones are live, and start with `resume`."""
        outputs, now = [output for generation in generations for output in generation.outputs], time.perf_counter()
        for output in outputs:
            output.submitted_at = now
        self._live.update({output.request.uid: output for output in outputs})
        if not paused:
            self.executor.submit([output.request for output in outputs])

    def resubmit(self, executor: Executor, paused: Collection[Generation] = ()) -> None:
        """Continue over a new executor: submit every live request with its generated tokens, but those of `paused`.

        Greedy and seeded outputs then end with the same tokens as without the failure (float32: see SamplingParams).
        Tokens that the old executor had not delivered are generated again, and none is streamed twice.
        """
        self.executor, self.num_free_pages = executor, None
        self.executor.submit([output.resumed() for output in self._live.values() if output.generation not in paused])

    def withdraw(self, uids: Iterable[int]) -> list[Generation]:
        """Take the generations of these requests off the ranks and return them; they stay live, for `resume`."""
        live = [self._live[uid].generation for uid in uids if uid in self._live]
        generations = list({generation.number: generation for generation in live}.values())
        outputs = [output for generation in generations for output in generation.outputs if not output.finished]
        self.executor.cancel([output.request.uid for output in outputs])
        for output in outputs:
            del self._live[output.request.uid]  # a new uid: later results of the old one are ignored
            output.request = msgspec.structs.replace(output.request, uid=next(self._uids))
            self._live[output.request.uid] = output
        return generations

    def resume(self, generation: Generation) -> None:
        """Submit a generation that was paused or withdrawn, with its generated tokens."""
        self.executor.submit([output.resumed() for output in generation.outputs if not output.finished])

    def cancel(self, generations: Iterable[Generation], reason: str | None = None) -> None:
        """End the unfinished outputs of these with reason "abort" and the tokens that they have."""
        outputs = [o for generation in generations for o in generation.outputs if o.request.uid in self._live]
        for output in outputs:
            output.end("abort", reason)
            del self._live[output.request.uid]
        self.executor.cancel([output.request.uid for output in outputs])

    @property
    def live(self) -> list[Output]:
        """The unfinished outputs; any thread may read this."""
        return list(self._live.values())

    @property
    def generations(self) -> list[Generation]:
        """The generations with unfinished outputs."""
        return list({output.generation.number: output.generation for output in self.live}.values())

    def poll(self, timeout_s: float) -> list[Output]:
        """Wait up to timeout_s for the ranks' next results; return the outputs that they changed."""
        changed: dict[int, Output] = {}
        for step in self.executor.poll(timeout_s):
            changed.update(self._update(step))
        return list(changed.values())

    def _update(self, step: StepOutput) -> dict[int, Output]:
        """Apply a step's results; return the changed outputs by uid."""
        changed = {}
        finished = {end.uid: end for end in step.finished}
        self._count_prefix_hits(step.cached_tokens)
        for uid, chunk in step.prompt_logprobs.items():
            if uid in self._live:
                self._live[uid].generation.add_prompt_logprobs(chunk, self.tokenizer.token_bytes)
        if step.free_pages is not None:
            self.num_free_pages = step.free_pages
        self._observe(step)
        for uid, token in zip(step.uids, step.tokens, strict=True):
            output = self._live.get(uid)  # None: ended here before this step's results came
            if output is not None:
                changed[uid] = output
                _append(output, token, step.logprobs.get(uid), finished.get(uid))
                if output.finished:
                    del self._live[uid]
        for uid in finished.keys() & self._live.keys():  # ended without a token: refused by the engine
            changed[uid] = self._live.pop(uid)
            changed[uid].end(finished[uid].reason, finished[uid].error)
        stopped = [uid for uid, output in changed.items() if output.finished and uid not in finished]
        if stopped:  # a stop string ended them, and the ranks do not look for stop strings
            self.executor.cancel(stopped)
        return changed

    def _observe(self, step: StepOutput) -> None:
        """Count a step's tokens, and the times of the outputs whose first token it has; before they get it."""
        if step.num_computed:
            self.distributions.step_tokens.observe(step.num_computed)
        for uid, prefill_s in step.prefill_s.items():
            output = self._live.get(uid)
            if output is not None and output.num_tokens == 0:  # the request was not submitted again
                waited = time.perf_counter() - output.submitted_at
                self.distributions.prefill_s.observe(prefill_s)
                self.distributions.queue_s.observe(max(0.0, waited - prefill_s))

    def _count_prefix_hits(self, cached: dict[int, int]) -> None:
        """Note the requests that began with this step; `cached` has the tokens found in the prefix cache for each."""
        for uid, num_cached in cached.items():
            output = self._live.get(uid)
            if output is None:
                continue
            output.running = True
            generation = output.generation
            self.num_prefix_hits += num_cached
            self.num_prefix_queries += len(generation.prompt_ids) + output.num_tokens
            if output.num_tokens == 0:  # the request was not submitted again
                num_cached = min(num_cached, len(generation.prompt_ids))
                generation.num_cached_tokens = max(generation.num_cached_tokens, num_cached)

    def _generation(self, prompt: str | Sequence[int], prompt_ids: list[int], requests: list[Request]) -> Generation:
        text, params = prompt if isinstance(prompt, str) else None, requests[0].params
        has_logprobs = params.prompt_logprobs is not None
        generation = Generation(next(self._numbers), text, prompt_ids, has_logprobs=has_logprobs)
        skip = params.skip_special_tokens
        detokenizer = Detokenizer(self.tokenizer.token_bytes, prompt_ids, skip_special_tokens=skip)
        for index, request in enumerate(requests):
            generation.outputs.append(Output(request, generation, index, copy(detokenizer)))
        return generation

    def _tokenize(self, prompt: str | Sequence[int]) -> np.ndarray:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt is no text: a lone surrogate at position {error.start}") from error
            return np.array(self.tokenizer.encode(prompt) if prompt else [], np.int32)
        return _token_array(prompt)

    def _request(self, tokens: np.ndarray, params: SamplingParams, origin: Origin, cache_salt: str | None) -> Request:
        """Return the request for the first output."""
        room = max(1, self.executor.limits.max_length - len(tokens))
        max_tokens = room if params.max_tokens is None else params.max_tokens
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        request_params = msgspec.structs.replace(params, n=1, seed=seed, max_tokens=max_tokens)
        stop_ids = [*params.stop_token_ids, *([] if params.ignore_eos else self.eos_token_ids)]
        bad_words = self._bad_words(params)
        return Request(next(self._uids), tokens, len(tokens), request_params, stop_ids, *origin, bad_words, cache_salt)

    def _sibling(self, first: Request, index: int) -> Request:
        """Return the request for another output."""
        assert first.params.seed is not None
        seed = (first.params.seed + index + INT64 // 2) % INT64 - INT64 // 2
        params = first.params.of_further_output(seed)
        return msgspec.structs.replace(first, uid=next(self._uids), params=params)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Return the token sequences of the bad words; those with a token that the model does not have cannot come."""
        if not params.bad_words:
            return []
        sequences = self.tokenizer.encode_words(params.bad_words)
        return [ids for ids in sequences if max(ids) < self.executor.limits.vocab_size]


def _append(output: Output, token: int, logprobs: TokenLogprobs | None, finished: RequestEnd | None) -> None:
    """Add a token to an output; if its text cannot be made, end this output and no other."""
    try:
        output.append(token, logprobs, finished)
    except Exception as error:  # the tokenizers library and custom decoders raise any class
        log.exception("request %d ends: token %d cannot be turned into text", output.request.uid, token)
        output.end("abort", f"token {token} cannot be shown: {type(error).__name__}: {error}")


def _parts(prompt: Prompt) -> tuple[str | Sequence[int], str | None]:
    """Return the text or the token ids of a prompt, and its cache salt; raises RequestRefused for other fields."""
    if not isinstance(prompt, Mapping):
        return prompt, None
    texts = [prompt[name] for name in ("prompt", "prompt_token_ids") if name in prompt]
    if len(texts) != 1 or prompt.keys() - PromptFields.__annotations__.keys():
        fields = ", ".join(map(repr, prompt))
        raise RequestRefused(
            f"a prompt with the fields {fields}; give 'prompt' or 'prompt_token_ids', and 'cache_salt'"
        )
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise RequestRefused(f"cache_salt={salt!r} must be a text that is not empty")
    return texts[0], salt


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
