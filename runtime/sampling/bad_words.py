"""Bad words: token sequences that an output must not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANY = -1  # stands before a sequence that is shorter than the longest one, and equals every token


@dataclass(frozen=True)
class BadWords:
    """The bad words of one request: n token sequences of up to K tokens, on the device."""

    prefixes: Tensor  # [n, K - 1] int32: all tokens but the last, after as many ANY as are missing
    last: Tensor  # [n] int64
    num_prompt_tokens: int

    @classmethod
    def of(cls, words: Sequence[Sequence[int]], num_prompt_tokens: int, device: torch.device) -> BadWords:
        """Return the bad words of token sequences, none of which is empty."""
        longest = max(map(len, words)) - 1
        prefixes = [[ANY] * (longest + 1 - len(word)) + list(word[:-1]) for word in words]
        last = torch.tensor([word[-1] for word in words], device=device)
        return cls(torch.tensor(prefixes, dtype=torch.int32, device=device), last, num_prompt_tokens)

    def exclude_(self, logits: Tensor, position: int, tokens: Tensor) -> None:
        """Set the logits of tokens that would complete a word at `position` to -inf, unless that leaves no token.

        logits  [V] float32, in place
        tokens  [L] int32: the tokens of the request before `position`; those of the prompt complete no word
        """
        start = max(self.num_prompt_tokens, position - self.prefixes.shape[1])
        window = torch.full_like(self.prefixes[0], ANY - 1)  # before the output: equals no token of a word
        if position > start:
            window[start - position :] = tokens[start:position]
        is_complete = ((self.prefixes == ANY) | (self.prefixes == window)).all(1)
        limits = torch.full_like(self.last, torch.inf, dtype=logits.dtype).masked_fill(is_complete, -torch.inf)
        rest = logits.scatter_reduce(0, self.last, limits, "amin")
        logits.copy_(torch.where((rest > -torch.inf).any(), rest, logits))
