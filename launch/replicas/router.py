"""Ray Serve's choice of a replica for a request: the longest cached prefix, unless that replica is much busier."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .affinity import Affinity

SPREAD = 8  # requests that a replica may have more than the least busy one and still be chosen for its cache


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Runs in the front end, which sends all requests; the first argument of a call is a runtime Request."""

    def initialize_state(self, page_size: int, num_pages: int) -> None:
        self._affinity = Affinity(page_size, num_pages)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._affinity.keep({replica.replica_id.unique_id for replica in replicas})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, best first: one that is full is passed over, and the request waits only if all are."""
        if pending_request is None:
            return [candidate_replicas]
        busy = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in candidate_replicas}
        least = min(busy.values(), default=0)
        tokens = pending_request.args[0].tokens

        def rank(replica: RunningReplica) -> tuple[int, int, float]:
            load = busy[replica.replica_id]
            matched = self._affinity.matched(tokens, replica.replica_id.unique_id) if load <= least + SPREAD else 0
            return (-matched, load, random.random())

        return [[replica] for replica in sorted(candidate_replicas, key=rank)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._affinity.sent(pending_request.args[0].tokens, replica_id.unique_id)
