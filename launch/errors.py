"""What ends a run through no fault of the request; apart from Ray, so that the command line can name them at once."""


class PlacementError(RuntimeError):
    """There is no place for the ranks: no cluster at the address, or too few resources in it."""


class RankFailed(RuntimeError):
    """A rank died, raised or hung; the message says which, where and why."""
