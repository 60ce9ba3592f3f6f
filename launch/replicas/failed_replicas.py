"""The replicas whose ranks have failed, until Ray Serve has removed them.

The router must avoid them: they have no load and would be chosen first. The set is not in router.py, because Serve
pickles that module by value and the router would read a copy.
"""

from __future__ import annotations

from collections.abc import Collection

_failed: set[str] = set()


def avoid(replica: str) -> None:
    """Send no more requests to this replica."""
    _failed.add(replica)


def is_avoided(replica: str) -> bool:
    """Return whether the replica has failed."""
    return replica in _failed


def forget_others(replicas: Collection[str]) -> None:
    """Forget the replicas that are not among these."""
    _failed.intersection_update(replicas)
