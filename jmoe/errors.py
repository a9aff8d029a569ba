"""Errors that a user can cause: one type per kind, each saying what to do.

A message has up to four parts: what is wrong; where; what was got and what was expected;
what to do about it. Scripts print it behind ``error:`` and exit with status 2, without a
traceback. Mistakes of our own are ``assert`` and ordinary exceptions, never these.
"""


class JmoeError(Exception):
    """Base of all errors that a user can cause.

    Attributes:
      what: one sentence, without a final full stop.
      where: file, directory, setting or argument that it is about.
      got: what was found there.
      expected: what would have been right.
      do: the remedy.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ):
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.do = do
        details = {"in": where, "got": got, "expected": expected, "do": do}
        lines = [
            f"  {label}{'' if label == 'in' else ':'} {value}"
            for label, value in details.items()
            if value is not None
        ]
        super().__init__("\n".join([what, *lines]))


class ConfigError(JmoeError):
    """A model's configuration is unreadable, contradictory or not supported."""


class CheckpointError(JmoeError):
    """A model directory or one of its files is missing, damaged or of the wrong shape."""


class CapacityError(JmoeError):
    """The work does not fit into the memory of this machine."""


class TransferError(JmoeError):
    """Copying an expert to the device failed, or was given up because the engine was closed."""


class ComputeError(JmoeError):
    """Computing an expert on the host failed, or came to a halt."""


class RequestError(JmoeError):
    """A prompt or a generation option is not usable."""
