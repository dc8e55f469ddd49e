"""Standard output and error for a program that outlives its terminal: closed, full, or a pipe that nobody reads."""

import contextlib
import os
import sys
from typing import Any


class Output:
    """A text stream that drops what cannot be written, from the first failure on.

    Attributes:
        error: the first failure; None so far.
    """

    def __init__(self, stream: Any):
        self._stream, self.error = stream, None

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action):
        try:
            action()
        except (OSError, ValueError) as error:
            self.error = self.error or error
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())  # Python's buffer is flushed again at exit

    def __getattr__(self, name):
        return getattr(self._stream, name)


def survive_closed_streams() -> None:
    """Let standard output and error drop what cannot be written, and escape what their encoding cannot express."""
    for number, name in [(0, "stdin"), (1, "stdout"), (2, "stderr")]:
        try:
            os.fstat(number)
        except OSError:  # the next opened file would get this number, and receive what C++ libraries print
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if number:
            stream = getattr(sys, name) or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            with contextlib.suppress(AttributeError, OSError):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Output(stream))
