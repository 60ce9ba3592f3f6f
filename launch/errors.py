"""What ends a run through no fault of the request; apart from Ray, so that the command line can name them at once."""


class PlacementError(RuntimeError):
    """There is no place for the ranks: no cluster at the address, or too few resources in it."""


class RankFailed(RuntimeError):
    """A rank died, raised or hung; the message says which, where and why.

    `last_words` are the last lines that the rank has written to its stderr, where they can be read from here.
    """

    def __init__(self, reason: str, last_words: str = "") -> None:
        super().__init__(reason)
        self.last_words = last_words


class EngineFailed(RuntimeError):
    """The ranks have failed and will not be started again, or the service has ended; the message says why."""


class RequestCrashedEngine(EngineFailed):
    """This request has ended its ranks again and again, and is not tried any more; others go on."""


class RequestsLost(RuntimeError):
    """Some of several replicas failed; these requests, by their uids, are to go on elsewhere."""

    def __init__(self, uids: list[int], reason: str) -> None:
        super().__init__(reason)
        self.uids = uids
