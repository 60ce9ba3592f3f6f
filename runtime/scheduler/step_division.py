"""The division of a step's tokens among clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from operator import itemgetter

import numpy as np

from ..limits import Limits
from .slots import NO_SLOTS, PromptChunk, Slots
from .step_budget import StepBudget
from .waiting_queue import WaitingQueue

ANONYMOUS = 0  # the client of requests without an origin: their steps have no limit


def max_min_shares(demands: Mapping[int, int], total: int) -> dict[int, int]:
    """Divide `total` so that no client can get more without one that has less or equal getting less.

    Every client gets at least 1 if it demands any, also where this exceeds the total.
    """
    shares = {}
    for i, (client, demand) in enumerate(sorted(demands.items(), key=itemgetter(1))):
        shares[client] = min(demand, max(1, total // (len(demands) - i)))
        total -= shares[client]
    return shares


def largest_holder(held: Mapping[int, int]) -> tuple[int, int]:
    """Return the number that the client with most holds, and this client; (0, 0) if there is none."""
    return max(((number, client) for client, number in held.items()), default=(0, 0))


class StepTokens:
    """The tokens that a step can still compute: in all, and for each client if there are `shares`."""

    def __init__(self, total: int, shares: dict[int, int] | None = None) -> None:
        self.left = total
        self._shares = shares

    @property
    def is_limited(self) -> bool:
        """True if the shares of clients are less than the tokens that could be computed."""
        return self._shares is not None

    def left_for(self, client: int) -> int:
        return self.left if self._shares is None else max(0, min(self.left, self._shares.get(client, 0)))

    def take(self, client: int, num_wanted: int) -> int:
        """Return how many of a client's tokens the step computes, and subtract them."""
        num_tokens = min(num_wanted, self.left_for(client))
        self.left -= num_tokens
        if self._shares is not None:
            self._shares[client] = self._shares.get(client, 0) - num_tokens
        return num_tokens


class StepDivision:
    """Divides steps among the clients with running or waiting requests, while these want more than the `budget`."""

    def __init__(self, limits: Limits, slots: Slots, waiting: WaitingQueue) -> None:
        self.budget = StepBudget(limits.max_num_batched_tokens)
        self.left_out = NO_SLOTS  # slots for which the others of a step should not wait, [n] int32
        self._most, self._slots, self._waiting = limits.max_num_batched_tokens, slots, waiting

    @property
    def is_shared(self) -> bool:
        """True if several clients have requests."""
        running, waiting = self._slots.num_by_client.keys(), self._waiting.clients.keys()
        return len(running) > 1 or len(waiting) > 1 or (bool(running and waiting) and running != waiting)

    def divide(
        self, decoding: np.ndarray, prompts: list[PromptChunk], step: int, *, can_admit: bool
    ) -> tuple[np.ndarray, StepTokens]:
        """Return the slots that decode in a step, and the tokens left for prompts.

        decoding   [D] int32: the slots that could decode
        prompts    the prompts in progress, with all their missing tokens
        can_admit  whether the step may admit waiting requests
        """
        if len(self.left_out):
            decoding = self._without_left_out(decoding)
        running, waiting = self._slots.num_by_client, self._waiting.clients
        if ANONYMOUS in running or ANONYMOUS in waiting:
            return decoding, StepTokens(self._most - len(decoding))
        of_prompts = Counter[int]()
        for chunk in prompts:
            of_prompts[int(self._slots.client[chunk.slot])] += chunk.num_tokens
        for client, queue in waiting.items() if can_admit else ():
            of_prompts[client] += queue.num_tokens
        limit = self.budget.limit(len(running.keys() | waiting.keys()))
        if len(decoding) + of_prompts.total() <= limit:
            return decoding, StepTokens(self._most - len(decoding))
        return self._share(decoding, of_prompts, limit, step)

    def _without_left_out(self, decoding: np.ndarray) -> np.ndarray:
        """Return the slots that the step waits for; if there is none, the one that has waited longest."""
        others = decoding[~np.isin(decoding, self.left_out)]
        if len(others) or not len(decoding):
            return others
        oldest = int(np.argmin(self._slots.last_step[decoding]))
        return decoding[oldest : oldest + 1]

    def _share(
        self, decoding: np.ndarray, of_prompts: Counter[int], limit: int, step: int
    ) -> tuple[np.ndarray, StepTokens]:
        clients = self._slots.client[decoding]
        rows = Counter(clients.tolist())
        shares = max_min_shares(rows + of_prompts, limit)
        tokens = StepTokens(self._most, shares)
        decodes = np.ones(len(decoding), bool)
        for client, num_rows in rows.items():
            # At least every second step leaves a token for prompts.
            reserved = min(of_prompts[client], max(shares[client] // 4, step % 2))
            num_left_out = num_rows - tokens.take(client, min(num_rows, shares[client] - reserved))
            if num_left_out:  # leave out those that were computed last
                of_client = np.flatnonzero(clients == client)
                by_age = np.argsort(self._slots.last_step[decoding[of_client]], kind="stable")
                decodes[of_client[by_age[num_rows - num_left_out :]]] = False
        return decoding[decodes], tokens
