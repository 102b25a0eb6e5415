"""What goes to standard output: in any encoding, harmless to a terminal, and to a reader that may go away.

A command that only prints ends where nobody reads it any more, as others do in a pipe. A run goes on: what it makes is
in its folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
from typing import IO, Any, TextIO

from rich.console import Console

KEPT = "\n\t\r"


def use_any_encoding() -> None:
    """Characters that the encoding of standard output lacks are escaped: a finished run does not fail for its text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def give_up_stdout() -> None:
    """Standard output leads nowhere: what is still in a buffer fails no more, not even when Python ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a stand-in that has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def visible(text: str, file: IO[str] | None = None) -> str:
    """`text` as `file`, by default standard output, may have it: for a terminal, control characters are escaped.

    A text may have learned the sequences that recolour, retitle or rewrite a terminal. A file gets it as it is.
    """
    if not (file or sys.stdout).isatty():
        return text
    return "".join(c if c in KEPT or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)


class _EndingConsole(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process with status 1: the command ends as others do in a pipe."""
        raise BrokenPipeError


def plain_console() -> Console:
    """Standard output for a command that only prints. Raises BrokenPipeError where nobody reads it any more."""
    return _EndingConsole()


def run_console(quiet: bool = False) -> Console:
    """Standard output for what must not end because nobody reads it: `| head`, a terminal that was closed."""
    lasting: Any = _Lasting(sys.stdout)
    return Console(file=lasting, quiet=quiet)


class _Lasting:
    """A stream whose writes are lost, and said to be once, from the first that fails."""

    def __init__(self, stream: TextIO):
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._gone = True
        give_up_stdout()
        with contextlib.suppress(OSError):  # of the same terminal, perhaps
            print(f"fastgpt2: standard output is gone ({error.strerror}): this goes on without it", file=sys.stderr)
