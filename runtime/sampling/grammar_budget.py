"""A time budget for the masks of grammars: a grammar that slows the other requests of the batch is ended.

Only rank 0 computes masks and reads clocks. Its decision reaches the front end as the end of the request.
"""

from __future__ import annotations

import time
from collections.abc import Collection

MIN_EARNED_S = 0.010  # masks of a step may take this long, or as long as the rest of the step if that is longer
MAX_EARNED_S = 0.050
MAX_DEBT_S = 0.050  # masks may exceed that by this much in total before a grammar is ended
CHEAP_S = 0.00075  # a grammar with faster masks is never ended: 128 requests with a JSON schema are an ordinary load
BAN_S = 60.0  # new requests with an ended grammar are refused for this long
SHARE = 1 / 8  # weight of the newest mask in the average


class GrammarCost:
    """The time that the masks of one grammar take, over all its requests."""

    def __init__(self) -> None:
        self.mask_s = 0.0  # moving average of a mask and of the token after it, in seconds
        self._banned_until = 0.0

    @property
    def is_banned(self) -> bool:
        return time.monotonic() < self._banned_until

    def ban(self) -> None:
        """End the requests with this grammar, and refuse new ones for BAN_S."""
        self._banned_until = time.monotonic() + BAN_S

    @property
    def verdict(self) -> str:
        """The reason for a ban."""
        return f"its masks take {1e3 * self.mask_s:.1f} ms each, too long for the other requests; give a simpler one"


class MaskBudget:
    """The time that all masks have taken beyond what their steps allow."""

    def __init__(self) -> None:
        self.debt_s = 0.0
        self._owed_s = 0.0  # time of masks for which the others have not had as much yet
        self._rest_s = 0.0  # time of the last step without its masks
        self._step_s = 0.0  # time of the masks of the last step
        self._step_began = 0.0

    def begin_step(self) -> None:
        """Credit the masks with the time that the step takes without them."""
        now = time.perf_counter()
        rest_s = now - self._step_began - self._step_s
        self.debt_s = max(0.0, self.debt_s - min(max(rest_s, MIN_EARNED_S), MAX_EARNED_S))
        self._rest_s, self._owed_s = rest_s, max(0.0, self._owed_s - rest_s)
        self._step_began, self._step_s = now, 0.0

    def num_masks(self, mask_s: float) -> int:
        """Return how many masks of this duration the next step may wait for: over many steps half of the time."""
        return 0 if self._owed_s > 0 else max(1, int(self._rest_s / mask_s))

    def add_mask(self, cost: GrammarCost, seconds: float) -> None:
        """Charge a mask of the grammar with this cost, in seconds of CPU time."""
        cost.mask_s += SHARE * (seconds - cost.mask_s)
        self._charge(seconds)

    def add_tokens(self, cost: GrammarCost, seconds: float) -> None:
        """Charge the time in which a matcher consumed tokens."""
        cost.mask_s += SHARE * seconds
        self._charge(seconds)

    def forgive(self) -> None:
        """Forget the debt: the last step had no request that was kept waiting."""
        self.debt_s = 0.0

    def enforce(self, costs: Collection[GrammarCost]) -> None:
        """Ban the slowest of these grammars if the budget is exceeded, unless its masks are cheap."""
        if self.debt_s <= MAX_DEBT_S:
            return
        slowest = max((cost for cost in costs if not cost.is_banned), key=lambda cost: cost.mask_s, default=None)
        if slowest is not None and slowest.mask_s > CHEAP_S:
            slowest.ban()
            self.debt_s /= 2  # the others get time to show that they are cheap

    def _charge(self, seconds: float) -> None:
        self._step_s += seconds
        self.debt_s += seconds
        self._owed_s += seconds
