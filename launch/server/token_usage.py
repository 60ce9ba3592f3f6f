"""The token counts of a request, as the APIs report them."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...runtime.outputs import Event
from .protocol import reply_models as api


@dataclass
class TokenUsage:
    """The token counts of a request, so far."""

    num_prompt: int
    num_completion: int = 0
    num_reasoning: int = 0
    num_cached: dict[int, int] = field(default_factory=dict)  # index of the prompt -> its cached tokens

    def update(self, prompt: int, event: Event) -> None:
        """Add the tokens of an event of the prompt with this number."""
        self.num_completion += len(event.token_ids)
        self.num_cached[prompt] = event.num_cached_tokens

    def json(self) -> bytes:
        """Return the JSON of `usage`, which every chunk of a stream may have."""
        return (
            b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d},'
            b'"completion_tokens_details":{"reasoning_tokens":%d}}'
        ) % (
            self.num_prompt, self.num_completion, self.num_prompt + self.num_completion,
            sum(self.num_cached.values()), self.num_reasoning,
        )  # fmt: skip

    def usage(self) -> api.Usage:
        """Return the counts as OpenAI's object."""
        return api.Usage(
            prompt_tokens=self.num_prompt, completion_tokens=self.num_completion,
            total_tokens=self.num_prompt + self.num_completion,
            prompt_tokens_details=api.PromptDetails(cached_tokens=sum(self.num_cached.values())),
            completion_tokens_details=api.CompletionDetails(reasoning_tokens=self.num_reasoning),
        )  # fmt: skip
