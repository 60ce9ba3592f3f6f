"""Log-probabilities as the APIs write them: candidates of completions and chats, and the texts of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.outputs import Event, Logprob, PositionLogprobs
from .protocol import reply_models as api

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Candidates = dict[int, Logprob]  # by token id


@dataclass(frozen=True)
class LogprobWriter:
    """Writes the log-probabilities of a reply.

    num_top     candidates at each position of a chat; None without log-probabilities
    with_ids    tokens are written as `token_id:N` (`return_tokens_as_token_ids`)
    """

    num_top: int | None
    with_ids: bool = False

    def chat(self, event: Event) -> list[api.TokenCandidates]:
        """Return the new tokens of a chat with their candidates."""
        content = []
        for token, candidates in new_tokens(event):
            top = sorted(candidates.items(), key=lambda item: item[1].rank)[: self.num_top]
            sampled = self._candidate(token, candidates[token]).model_dump()
            others = [self._candidate(*entry) for entry in top]
            content.append(api.TokenCandidates(**sampled, top_logprobs=others))
        return content

    def add_token(
        self, logprobs: api.CompletionLogprobs, token: int, text: str, candidates: Candidates | None, offset: int
    ) -> None:
        """Add a token to those of a completion; only the first one of a prompt has no candidates."""
        name = f"token_id:{token}" if self.with_ids else text
        logprobs.tokens.append(name)
        logprobs.token_logprobs.append(_finite(candidates[token].logprob) if candidates else None)
        logprobs.top_logprobs.append(self._top_logprobs(name, token, candidates) if candidates else None)
        logprobs.text_offset.append(offset)

    def _top_logprobs(self, name: str, token: int, candidates: Candidates) -> dict[str, float]:
        """Return the log-probabilities by text, the sampled token first; a token with a text that is taken has its id.

        The sampled token has the same text here as in `tokens`: evaluations look it up, to see if it is the likeliest.
        """
        top = {name: _finite(candidates[token].logprob)}
        for other, logprob in sorted(candidates.items(), key=lambda item: item[1].rank):
            if other != token:
                text = token_text(logprob.decoded_token, logprob.token_bytes)
                is_taken = self.with_ids or text in top
                top[f"token_id:{other}" if is_taken else text] = _finite(logprob.logprob)
        return top

    def _candidate(self, token: int, logprob: Logprob) -> api.Candidate:
        text = token_text(logprob.decoded_token, logprob.token_bytes, prefix="")
        name = f"token_id:{token}" if self.with_ids else text
        return api.Candidate(token=name, logprob=_finite(logprob.logprob), bytes=list(logprob.token_bytes))


def prompt_logprobs(positions: PositionLogprobs, num_top: int) -> api.PromptLogprobs:
    """Return the log-probabilities of a prompt: at each position its token, and the `num_top` likeliest ones."""
    return [
        None
        if candidates is None
        else {
            token: api.PromptLogprob(logprob=_finite(c.logprob), rank=c.rank, decoded_token=c.decoded_token)
            for token, c in likeliest(candidates, num_top).items()
        }
        for candidates in positions
    ]


def likeliest(candidates: Candidates, num_top: int) -> Candidates:
    """Return the token itself, which comes first, and the `num_top` likeliest ones."""
    pairs = enumerate(candidates.items())
    return {token: c for number, (token, c) in pairs if number == 0 or c.rank <= num_top}


def num_candidates(event: Event) -> int:
    """Return how many candidates an event has, those of its prompt included."""
    if event.logprobs is None and event.prompt_logprobs is None:
        return 0
    positions = [*(event.prompt_logprobs or ())[-1:], *(event.logprobs or ())[:1]]
    num_positions = len(event.prompt_logprobs or ()) + len(event.logprobs or ())
    return num_positions * max((len(candidates or ()) for candidates in positions), default=0)


def new_tokens(event: Event) -> list[tuple[int, Candidates]]:
    """Return the new tokens with their candidates; none without log-probabilities."""
    return list(zip(event.token_ids, event.logprobs, strict=True)) if event.logprobs else []


def token_text(text: str, piece: bytes, prefix: str = "bytes:") -> str:
    """Return the text of a token, as OpenAI writes it for a part of a character: `bytes:\\xe2\\x82`."""
    if REPLACEMENT not in text or _is_utf8(piece):
        return text
    return prefix + piece.decode(errors="backslashreplace")


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
