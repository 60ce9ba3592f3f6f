"""Preemption for fairness: clients that wait get slots and pages of clients with more than twice as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..limits import Limits
from ..request import Request
from .slots import Slots
from .step_division import largest_holder
from .waiting_queue import WaitingQueue


def preempt_for_waiting_clients(
    limits: Limits, slots: Slots, waiting: WaitingQueue, preempt: Callable[[int], None], fits: Callable[[Request], bool]
) -> set[int]:
    """Preempt running requests for waiting clients that have much less than others.

    preempt  moves the request of a slot back to the queue
    fits     returns whether there are pages for a request
    Returns the clients of the preempted requests. They must not be admitted before the others have been.
    """
    clients = set[int]()
    for client in _clients_to_give_slots(slots, waiting):
        preempt(slots.newest_of(client))
        clients.add(client)
    head = waiting.blocked
    while head is not None and not fits(head):
        giver = _client_to_give_pages(slots, head.client, limits.pages_at_once(len(head.tokens)))
        if giver is None:
            break
        preempt(slots.newest_of(giver))
        clients.add(giver)
    return clients


def _clients_to_give_slots(slots: Slots, waiting: WaitingQueue) -> Iterator[int]:
    """Yield the clients of which to preempt a request, before the next one is taken: one for each waiting client."""
    most, largest = largest_holder(slots.num_by_client)
    for client in list(waiting.clients)[len(slots.free) :]:
        if most > 2 * (slots.num_by_client.get(client, 0) + 1):
            yield largest
            most, largest = largest_holder(slots.num_by_client)


def _client_to_give_pages(slots: Slots, client: int, num_wanted: int) -> int | None:
    """Return the client of which to preempt a request, so that `client` gets more pages; it keeps its oldest one."""
    held = slots.pages_by_client()
    most, largest = largest_holder(held)
    return largest if most > 2 * (held.get(client, 0) + num_wanted) else None
