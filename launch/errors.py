"""Errors of the ranks and the engine, in a module without Ray: the command line needs them at once."""


class PlacementError(RuntimeError):
    """The ranks cannot be placed: there is no cluster at the address, or it has too few resources."""


class RankFailed(RuntimeError):
    """A rank died, raised or hung; the message names the rank, its host and the cause.

    `stderr_tail` has the last lines of the rank's stderr, if they can be read from here.
    """

    def __init__(self, reason: str, stderr_tail: str = "") -> None:
        super().__init__(reason)
        self.stderr_tail = stderr_tail


class ReplicaFailed(RankFailed):
    """A replica's ranks have failed; `replica` is its name in Ray Serve."""

    def __init__(self, reason: str, replica: str = "") -> None:  # unpickled with the reason alone
        super().__init__(reason)
        self.replica = replica


class RayLost(RankFailed):
    """Ray has ended, and with it the ranks, whatever they were doing; the message names the process and the cause."""


class EngineFailed(RuntimeError):
    """The engine takes no requests: its ranks have failed for good, or it is closed. The message says why."""


class RequestCrashedEngine(EngineFailed):
    """This request crashed the engine repeatedly and is quarantined; other requests continue."""


class RequestsLost(RuntimeError):
    """A replica failed; the requests with these uids must be submitted to others."""

    def __init__(self, uids: list[int], reason: str) -> None:
        super().__init__(reason)
        self.uids = uids


class TokenizerBusy(RuntimeError):
    """A text cannot be tokenized now, because of other requests' texts or a process that did not start."""
