"""The requests that wait for a slot, in fair order: start-time fair queueing over clients, and over the calls of each.

Virtual time is counted in tokens. A request starts where the one before it of its client ended, or now if that is
later, and lasts for the tokens that it brings. The request that starts first is admitted first. A client with much
waiting work therefore does not delay one with little. Requests of one client without calls keep their order of arrival.

Start-time fair queueing is by Goyal, Vin and Cheng (SIGCOMM 1996). Tokens as the measure of fairness between clients
of a language model are from VTC (Sheng et al., 2024, 2401.00588).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Set
from itertools import chain
from typing import NamedTuple

from ..request import Request

NO_CLIENTS: frozenset[int] = frozenset()


class VirtualTime:
    """The virtual time, in tokens, and the time until which each flow has been served."""

    def __init__(self) -> None:
        self.now = 0
        self._ends: dict[int, int] = {}
        self._most = 1024  # with this many flows, those that ended in the past are forgotten

    def start(self, flow: int) -> int:
        """Return the time at which the next item of a flow starts."""
        return max(self.now, self._ends.get(flow, 0))

    def serve(self, flow: int, until: int) -> None:
        """Note that a flow has been served until a time."""
        if len(self._ends) >= self._most:
            self._ends = {flow: end for flow, end in self._ends.items() if end > self.now}
            self._most = 2 * len(self._ends) + 1024
        self._ends[flow] = until


class WaitingEntry(NamedTuple):
    """A waiting request of one client; the smallest entry is the client's next one. `uid` makes entries distinct."""

    priority: int  # the lowest goes first; 0 if the queue has none
    is_new: bool  # false for a preempted request, which goes first
    start: int  # virtual time within its client; 0 if preempted
    uid: int
    request: Request


class ClientQueue:
    """The waiting requests of one client; `start` is the virtual time at which the next of them starts."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.num_tokens = 0
        self._entries: list[WaitingEntry] = []  # a heap; its first entry has not been removed
        self._removed: set[int] = set()  # uids of entries that are still in the heap
        self._time = VirtualTime()  # its flows are the calls

    def add(self, request: Request, priority: int, *, is_new: bool) -> None:
        start = self._time.start(request.call) if is_new else 0
        if is_new:
            self._time.serve(request.call, start + len(request.tokens))
        self.num_tokens += len(request.tokens)
        heapq.heappush(self._entries, WaitingEntry(priority, is_new, start, request.uid, request))

    @property
    def first(self) -> WaitingEntry:
        return self._entries[0]

    def __len__(self) -> int:
        return len(self._entries) - len(self._removed)

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests in the order of admission."""
        return (entry.request for entry in sorted(self._entries) if entry.uid not in self._removed)

    def pop(self) -> Request:
        entry = heapq.heappop(self._entries)
        self._drop_removed()
        self._time.now = max(self._time.now, entry.start)
        self.num_tokens -= len(entry.request.tokens)
        if entry.is_new:
            self.start += len(entry.request.tokens)
        return entry.request

    def remove(self, request: Request) -> None:
        self.num_tokens -= len(request.tokens)
        self._removed.add(request.uid)
        if 2 * len(self._removed) > len(self._entries):  # not each time: clients cancel a thousand requests at once
            self._entries = [entry for entry in self._entries if entry.uid not in self._removed]
            heapq.heapify(self._entries)
            self._removed.clear()
        self._drop_removed()

    def _drop_removed(self) -> None:
        while self._entries and self._entries[0].uid in self._removed:
            self._removed.remove(heapq.heappop(self._entries).uid)


class WaitingQueue:
    """Requests in fair order; `by_priority`, those with the lowest priority go before all others."""

    def __init__(self, *, by_priority: bool = False) -> None:
        self._by_priority = by_priority
        self._clients: dict[int, ClientQueue] = {}  # the clients with waiting requests
        self._requests: dict[int, Request] = {}  # by uid
        self._time = VirtualTime()  # its flows are the clients
        self._next: int | None = None  # client of the head, if known
        self.blocked: Request | None = None  # the head, if it does not fit and no other may go before it
        self._passed_over: set[int] = set()  # clients whose requests do not fit, and others may go before them

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests of one client after the other, each in the order of admission."""
        return chain.from_iterable(self._clients.values())

    @property
    def clients(self) -> Mapping[int, ClientQueue]:
        """The queues of the clients with waiting requests."""
        return self._clients

    def head(self, skip: Set[int] = NO_CLIENTS) -> Request | None:
        """Return the next request to admit, of all clients but those in `skip`; None if it would not fit."""
        if self.blocked is not None:
            return None
        skip = skip | self._passed_over if self._passed_over else skip
        if self._next is None or self._next in skip:
            queues = [entry for entry in self._clients.items() if entry[0] not in skip]
            if not queues:
                return None
            _, _, _, self._next = min((q.first.priority, q.start, q.first.uid, client) for client, q in queues)
        client, self._next = self._next, None if skip else self._next
        return self._clients[client].first.request

    def block(self, request: Request) -> None:
        """Keep all waiting behind the head, which does not fit, until `unblock` or until one that may pass it comes."""
        self.blocked = request

    def pass_over(self, client: int) -> None:
        """Let others go before a client whose next request does not fit, until `unblock` or its next request."""
        self._passed_over.add(client)

    def unblock(self) -> None:
        """Note that requests may fit again."""
        self.blocked = None
        self._passed_over.clear()

    def add(self, request: Request, *, is_new: bool = True) -> None:
        """Add a request; a preempted one (not `is_new`) goes before the new ones of its client."""
        queue = self._clients.get(request.client)
        if queue is None:
            queue = self._clients[request.client] = ClientQueue(self._time.start(request.client))
        queue.add(request, self._priority(request), is_new=is_new)
        self._requests[request.uid] = request
        self._next = None
        self._passed_over.discard(request.client)
        if self.blocked is not None and self._may_pass(request, self.blocked):
            self.blocked = None

    def pop(self, client: int) -> Request:
        """Remove and return the next request of a client with waiting requests."""
        queue = self._clients[client]
        self._time.now = max(self._time.now, queue.start)
        request = queue.pop()
        del self._requests[request.uid]
        self._after_removal(client)
        return request

    def remove(self, uid: int) -> Request | None:
        """Remove a request; return None if it does not wait."""
        request = self._requests.pop(uid, None)
        if request is not None:
            if request is self.blocked:
                self.blocked = None
            self._clients[request.client].remove(request)
            self._after_removal(request.client)
        return request

    def _may_pass(self, request: Request, blocked: Request) -> bool:
        return request.client != blocked.client or self._priority(request) < self._priority(blocked)

    def _priority(self, request: Request) -> int:
        return request.priority if self._by_priority else 0

    def _after_removal(self, client: int) -> None:
        """Forget the queue of a client that waits for nothing, but note how far the client has been served."""
        self._next = None
        if not self._clients[client]:
            self._time.serve(client, self._clients.pop(client).start)
        if not self._clients:  # nobody is kept waiting: the past has no influence
            self._time = VirtualTime()
