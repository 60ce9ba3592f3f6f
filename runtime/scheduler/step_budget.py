"""The length of steps: short while clients share them, so that none of them waits long for a step."""

from __future__ import annotations

from math import inf

FIRST_TOKENS = 64  # in the first limited step; up to twice as many in each further one
LEAST_TOKENS = 16
LIGHT_TOKENS = 8  # a step with this many, or two of each client, is light
SLOWDOWN = 2.5  # a step that clients share may take this many times as long as a light one
LONGEST_S = 0.25  # duration of a step of one client, in which another may arrive; longer ones are not faster
MEMORY_S = 5.0  # seconds of steps for which a client that has ended is expected back


class AdaptiveTokenLimit:
    """The highest number of tokens in a step, adjusted so that a step takes about as long as it may."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.restart()

    def restart(self) -> None:
        self.limit = min(self._most, FIRST_TOKENS)

    def note(self, num_tokens: int, target: float, *, is_limited: bool, least: int = LEAST_TOKENS) -> None:
        """Adjust the limit to a step of `num_tokens` that may take `target` times as long as it has taken."""
        if target < 1:
            self.limit = min(self._most, max(least, min(self.limit, int(num_tokens * target))))
        elif is_limited:
            self.limit = min(self._most, max(self.limit, int(num_tokens * min(2.0, target)) + 1))


class StepBudget:
    """The highest number of tokens in a step, from the durations of steps before.

    A step that clients share takes about SLOWDOWN times as long as a light one, in which every client has its next
    token and little more. A step of one client takes at most about LONGEST_S.
    """

    def __init__(self, most: int) -> None:
        self._shared, self._alone = AdaptiveTokenLimit(most), AdaptiveTokenLimit(most)
        self._alone_s = inf  # duration of the steps since several clients had requests
        self._light_s = inf  # duration of light steps, from launch to results: a moving average
        self._num_clients = 1

    def limit(self, num_clients: int) -> int:
        """Return the number for the next step, for the clients that have requests."""
        self._num_clients = num_clients
        if num_clients > 1:
            if not self._expects_others:
                self._shared.restart()
            self._alone_s = 0.0
        return self._shared.limit if self._expects_others else self._alone.limit

    def note(self, num_tokens: int, latency_s: float, duration_s: float, *, is_limited: bool) -> None:
        """Note a step: the time from its launch to its results, and that time without the step before.

        With `is_limited` it left out tokens beyond the limit.
        """
        if num_tokens <= max(LIGHT_TOKENS, 2 * self._num_clients) and not is_limited:
            self._note_light(latency_s)
        self._alone_s += duration_s
        if self._expects_others:
            target, least = SLOWDOWN * self._light_s / latency_s, max(LEAST_TOKENS, 2 * self._num_clients)
            self._shared.note(num_tokens, target, is_limited=is_limited, least=least)
        else:
            self._alone.note(num_tokens, LONGEST_S / duration_s, is_limited=is_limited)

    def _note_light(self, latency_s: float) -> None:
        """Follow shorter steps fast and longer ones slowly: a step that something else delayed is no measure."""
        if self._light_s == inf:
            self._light_s = latency_s
        else:
            self._light_s += (latency_s - self._light_s) / (4 if latency_s < self._light_s else 64)

    @property
    def _expects_others(self) -> bool:
        return self._alone_s < MEMORY_S
