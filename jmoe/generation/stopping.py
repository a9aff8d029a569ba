"""Stop strings: where a sequence's text ends although the model would go on.

Works on text, not on tokens: a stop string may begin and end anywhere within pieces, and
span any number of them.
"""

from collections.abc import Sequence

from jmoe.errors import RequestError


class StopStrings:
    """Watches one sequence's text for the first stop string.

    Invariant: the text held back is the longest end of the text so far that is a proper
    prefix of some stop string. So nothing is emitted that may have to be taken back, and
    nothing waits that need not.

    The first stop string is the one complete first: generation can end right there, whatever
    a longer one that began earlier might have become ("abcd" does not keep "bc" waiting). Of
    several complete at the same character the longest counts, because it began first. How
    the text is cut into pieces changes nothing.

    Attributes:
      matched: the stop string found, or None.
    """

    def __init__(self, stops: Sequence[str]):
        """Starts at the beginning of a text.

        Args:
          stops: any number of stop strings; none means that nothing ever stops.

        Raises:
          RequestError: a stop string is empty or not text, or `stops` is itself one text.
        """
        # A single text would otherwise be taken for its characters.
        usable = not isinstance(stops, str) and all(
            isinstance(stop, str) and stop for stop in stops
        )
        if not usable:
            raise RequestError(
                "stop strings must be a list of texts that are not empty", got=repr(stops)
            )
        self._stops = tuple(stops)
        self._max_held = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece of text; not to be called after a match.

        Returns:
          The text that no stop string can claim any more, and whether the sequence stops
          here. The stop string itself, and what follows it, are never returned.
        """
        assert self.matched is None, self.matched
        text = self._held + piece
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start], True
        self._held = self._prefix_at_end(text)
        return text[: len(text) - len(self._held)], False

    def finish(self) -> str:
        """Returns what is held back when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _prefix_at_end(self, text: str) -> str:
        for start in range(max(0, len(text) - self._max_held), len(text)):
            end = text[start:]
            if any(stop.startswith(end) for stop in self._stops):
                return end
        return ""
