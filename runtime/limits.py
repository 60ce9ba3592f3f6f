"""The limits of an engine that every request must keep, and the pages of the KV cache that a context needs."""

from __future__ import annotations

from dataclasses import dataclass

from ..comm.message_text import counted
from .request import Request


def pages_of_window(window: int, page_size: int, num_tokens: int) -> int:
    """Return the pages of the keys that a step of `num_tokens` tokens stores, and of those that its first one sees."""
    return -(-(window - 1 + num_tokens) // page_size) + 1


def pages_at_once(num_pages: int, most_of_window: int | None, num_window_groups: int) -> int:
    """Return the pages that a context of `num_pages` pages needs in one step at most.

    most_of_window     the most pages that a step needs of a layer with a window; None if no layer counts as such
    num_window_groups  groups of layers with a window, beside one that sees all keys; 0 if all layers are in one group
    """
    if most_of_window is None:
        return num_pages
    least = min(num_pages, most_of_window)
    return num_pages + num_window_groups * least if num_window_groups else least


def longest_context(num_pages: int, most_of_window: int | None, num_window_groups: int) -> int:
    """Return the pages of the longest context for which so many pages suffice, if all of it had to be in the cache."""
    if most_of_window is None or num_window_groups == 0:
        return num_pages
    short = min(most_of_window, num_pages // (1 + num_window_groups))
    return max(short, num_pages - num_window_groups * most_of_window)


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
    is_fair: bool = True  # between clients
    has_priorities: bool = False  # requests may have a priority
    has_states: bool = False  # some layers have a recurrent state: a prefix is cached where its state is saved
    saved_states: int = 0  # recurrent states for cached prefixes
    window: int | None = None  # keys that a query sees in any layer, its own included; None: all
    num_window_groups: int = 0  # groups of layers with a window and a page table, beside one that sees all keys
    group_window: int = 0  # keys that a query sees in layers of such a group, its own included

    @property
    def max_length(self) -> int:
        """The longest prompt plus output of one request, in tokens."""
        return self.max_model_len if self._cache_suffices else self._longest_in_cache

    @property
    def _cache_suffices(self) -> bool:
        return self.pages_at_once(self.max_model_len) <= self.num_pages

    @property
    def _longest_in_cache(self) -> int:
        return longest_context(self.num_pages, self.most_of_window, self.num_window_groups) * self.page_size

    @property
    def num_tables(self) -> int:
        """The page tables of a slot: one for each group of layers."""
        return 1 + self.num_window_groups

    @property
    def most_of_window(self) -> int | None:
        """The most pages that a step of one request needs of a layer with a window."""
        window = self.group_window if self.num_window_groups else self.window
        return None if window is None else pages_of_window(window, self.page_size, self.max_num_batched_tokens)

    def pages_for(self, num_tokens: int) -> int:
        """Return the number of pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def pages_at_once(self, num_tokens: int) -> int:
        """Return the pages that a request of `num_tokens` tokens needs in one step at most."""
        return pages_at_once(self.pages_for(num_tokens), self.most_of_window, self.num_window_groups)

    def check(self, request: Request) -> None:
        """Raise ValueError, with the values and the rule, for a request that can never run."""
        if len(request.tokens) == 0:
            raise ValueError("the prompt is empty; give a text or at least one token id")
        if len(request.tokens) >= self.max_length:
            whole_cache = self.max_length == self._longest_in_cache
            raise ValueError(
                f"the prompt has {counted(len(request.tokens), 'token')}, but the context is {self.max_length} and"
                " needs room for at least one more; shorten the prompt or raise"
                f" {'num_pages or kv_cache_memory (the KV cache is the limit)' if whole_cache else 'max_model_len'}"
            )
        lowest, highest = int(request.tokens.min()), int(request.tokens.max())
        if lowest < 0 or highest >= self.vocab_size:
            invalid = lowest if lowest < 0 else highest
            raise ValueError(f"token id {invalid} in the prompt; the model has ids 0 to {self.vocab_size - 1}")
        params = request.params
        params.check_vocabulary(self.vocab_size)
        if request.priority and not self.has_priorities:
            raise ValueError(f"priority={request.priority} has no effect here; start with --scheduling-policy priority")
        if params.min_tokens > 0 and params.allowed_token_ids and set(params.allowed_token_ids) <= {*request.stop_ids}:
            raise ValueError(
                f"min_tokens={params.min_tokens} needs a token that does not end the output, but all of"
                " allowed_token_ids do; allow another one"
            )
