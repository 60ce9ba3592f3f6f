"""The limits of an engine: context, sequences, KV pages, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that are fixed when the engine starts. The front end refuses requests that can never run."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_pages: int
    page_size: int
    vocab_size: int
    enable_prefix_caching: bool = True

    @property
    def max_length(self) -> int:
        """The longest prompt plus output of one request, in tokens."""
        return min(self.max_model_len, self.num_pages * self.page_size)

    def pages_for(self, num_tokens: int) -> int:
        """Return the number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def check(self, request: Request) -> None:
        """Raise ValueError, with the values and the rule, for a request that can never run."""
        if len(request.tokens) == 0:
            raise ValueError("the prompt is empty; give a text or at least one token id")
        if len(request.tokens) >= self.max_length:
            whole_cache = self.max_length == self.num_pages * self.page_size
            raise ValueError(
                f"the prompt has {len(request.tokens)} tokens, but the context is {self.max_length} and needs room for"
                " at least one more; shorten the prompt or raise"
                f" {'num_pages or kv_cache_memory (the KV cache is the limit)' if whole_cache else 'max_model_len'}"
            )
        lowest, highest = int(request.tokens.min()), int(request.tokens.max())
        if lowest < 0 or highest >= self.vocab_size:
            invalid = lowest if lowest < 0 else highest
            raise ValueError(f"token id {invalid} in the prompt; the model has ids 0 to {self.vocab_size - 1}")
        request.params.check_vocabulary(self.vocab_size)
