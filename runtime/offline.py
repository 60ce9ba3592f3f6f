"""The offline API: generate for lists of prompts over any Executor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from .chat_template import Message
from .executor import EngineClosed, Executor
from .frontend import Frontend, Prompt
from .generation import Generation, Output
from .model.generation_config import default_sampling_params
from .model.model_config import ModelConfig
from .outputs import Event, RequestOutput
from .request import Origin, RequestRefused
from .sampling.grammar import Vocabulary
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

POLL_S = 1.0
Prompts = Prompt | Sequence[Prompt]
ManyParams = SamplingParams | Sequence[SamplingParams]
LLMType = TypeVar("LLMType", bound="OfflineLLM")


class OfflineLLM:
    """Generates for lists of prompts; use it as a context manager, or call `close`.

    All methods but `close` raise EngineClosed after `close`.
    """

    def __init__(
        self,
        executor: Executor,
        model: ModelConfig,
        folder: Path,
        tokenizer: Tokenizer | None = None,
        generation_config: str = "auto",
    ) -> None:
        self.executor = executor
        self._closed = False
        self.tokenizer = tokenizer or Tokenizer(folder)
        self._defaults = default_sampling_params(folder, generation_config)
        vocabulary = Vocabulary(folder, model.vocab_size, model.eos_token_ids)
        self._frontend = Frontend(executor, self.tokenizer, model.eos_token_ids, vocabulary)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: ManyParams | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt and return the results in the order of the prompts.

        prompts          a text, a list of token ids, a PromptFields, or a list of these
        sampling_params  for all prompts, or one for each; by default the checkpoint's recommendation
        priority         a number for each prompt, of which the lowest goes first; needs scheduling_policy priority
        Raises RequestRefused (a ValueError) naming the first prompt that cannot run, before any is started.
        """
        generations = self._prepare(_as_list(prompts), sampling_params, priority)
        with tqdm(total=len(generations), desc="generate", unit="prompt", disable=not use_tqdm) as bar:
            for changed in self._run(generations):
                done = sum(g.finished for g in generations)
                bar.update(done - bar.n)
                bar.set_postfix(tokens=sum(output.num_tokens for output in changed), refresh=False)
        return [g.result() for g in generations]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: ManyParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of conversations: [{"role": "user", "content": "..."}, ...]."""
        self._check_open()
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.encode_chat(c) for c in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompts: Prompts, sampling_params: ManyParams | None = None) -> Iterator[Event | RequestOutput]:
        """Yield new tokens and text as Events, and each prompt's RequestOutput once all its outputs have ended.

        Arguments and errors are those of `generate`; leaving the iterator early cancels what is unfinished.
        """
        return self._events(self._prepare(_as_list(prompts), sampling_params))

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the recommendation in the checkpoint's generation_config.json."""
        self._check_open()
        return self._defaults

    def close(self) -> None:
        """End the ranks; they have ended when this returns. Safe to call twice."""
        self._closed = True
        self.executor.close()

    def __enter__(self: LLMType) -> LLMType:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("this LLM is closed: close() has ended its ranks; make a new LLM")

    def _events(self, generations: list[Generation]) -> Iterator[Event | RequestOutput]:
        numbers = {g.number: i for i, g in enumerate(generations)}
        reported: set[int] = set()
        for changed in self._run(generations):
            yield from [output.take_event(numbers[output.generation.number]) for output in changed]
            for number in {output.generation.number for output in changed} - reported:
                generation = generations[numbers[number]]
                if generation.finished:
                    reported.add(number)
                    yield generation.result()

    def _prepare(
        self, prompts: Sequence[Prompt], params: ManyParams | None, priority: Sequence[int] | None = None
    ) -> list[Generation]:
        self._check_open()
        if params is None or isinstance(params, SamplingParams):
            params = [params or self._defaults] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling params for {len(prompts)} prompts; give one, or one for each")
        origins = [Origin(priority=number) for number in priority or [0] * len(prompts)]
        if len(origins) != len(prompts):
            raise ValueError(f"{len(origins)} priorities for {len(prompts)} prompts; give one for each")
        generations = []
        for i, (prompt, prompt_params, origin) in enumerate(zip(prompts, params, origins, strict=True)):
            try:
                generations.append(self._frontend.prepare(prompt, prompt_params, origin))
            except RequestRefused as error:
                raise RequestRefused(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from error
        return generations

    def _run(self, generations: list[Generation]) -> Iterator[list[Output]]:
        """Start these and yield the changed outputs until all have ended; cancel them if the caller leaves early."""
        self._check_open()
        self._frontend.submit(generations)
        try:
            while not all(g.finished for g in generations):
                self._check_open()
                yield self._frontend.poll(POLL_S)
        finally:
            if not all(g.finished for g in generations):
                self._frontend.cancel(generations)


def _as_list(prompts: Prompts) -> Sequence[Prompt]:
    """Return a list of prompts, of one if `prompts` is a text or a list of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
