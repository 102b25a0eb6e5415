"""Writing to standard output: in any encoding, without control characters on a terminal, and after its reader is gone.

A command that only prints ends when its output is no longer read, as usual in a pipe. A training run continues, because
its results are in its folder.
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
    """Escapes characters that the encoding of standard output lacks, so that no run fails when it prints text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def give_up_stdout() -> None:
    """Redirects standard output to the null device, so that flushing its buffer cannot fail, not even at exit."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a replaced stdout without a file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def visible(text: str, file: IO[str] | None = None) -> str:
    """`text` with control characters escaped if `file` (default: standard output) is a terminal, else unchanged.

    A model may generate the escape sequences that recolour, retitle or overwrite a terminal.
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
    """A console on standard output for runs that must survive the loss of it: `| head`, a closed terminal."""
    lasting: Any = _Lasting(sys.stdout)
    return Console(file=lasting, quiet=quiet)


class _Lasting:
    """A stream that drops all writes after the first one that fails, and reports this once on standard error."""

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
        with contextlib.suppress(OSError):  # standard error may be the same terminal
            print(f"fastgpt2: standard output is gone ({error.strerror}): this goes on without it", file=sys.stderr)
