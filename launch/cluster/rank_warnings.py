"""The warnings of ranks in the log of the driver, which does not see what their processes write."""

from __future__ import annotations

import logging
from collections.abc import Sequence

log = logging.getLogger(__name__)
PACKAGE = __name__.partition(".")[0]


class WarningCollector(logging.Handler):
    """Collect the warnings of lockstep's modules in this process; always call `close`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []
        logging.getLogger(PACKAGE).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def take(self) -> list[str]:
        """Return the messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def close(self) -> None:
        """Collect no more; later warnings go to the process's standard error."""
        logging.getLogger(PACKAGE).removeHandler(self)
        super().close()


def log_rank_warnings(warnings: Sequence[Sequence[str]]) -> None:
    """Log the warnings of all ranks, given in rank order: equal ones once, with the ranks that have them."""
    for message in dict.fromkeys(message for of_rank in warnings for message in of_rank):
        ranks = [str(rank) for rank, of_rank in enumerate(warnings) if message in of_rank]
        log.warning("%s %s: %s", "rank" if len(ranks) == 1 else "ranks", ", ".join(ranks), message)
