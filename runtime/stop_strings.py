"""Stop strings: where an output ends, and which part of its text may still be the beginning of one."""

from __future__ import annotations

from .sampling_params import SamplingParams


class StopChecker:
    """Finds stop strings in a text that grows."""

    def __init__(self, params: SamplingParams) -> None:
        self._strings, self._keeps_string = params.stop_strings, params.include_stop_str_in_output
        # The text's last characters, which may be the beginning of a stop string.
        self.num_uncertain = max((len(string) for string in self._strings), default=1) - 1

    def find(self, text: str, searched: int) -> tuple[int, str] | None:
        """Return the length to cut `text` to and the first stop string that ends after `searched` characters."""
        if not self._strings:  # the usual case
            return None
        starts = [(text.find(string, max(0, searched - len(string) + 1)), string) for string in self._strings]
        matches = [(start, string) for start, string in starts if start >= 0]
        if not matches:
            return None
        start, string = min(matches)
        return start + len(string) if self._keeps_string else start, string
