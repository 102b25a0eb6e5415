"""Files that are either the old ones or the new ones, never half of both; folders that one process has for itself."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = ".fastgpt2.lock"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside `path`, flushes to disk and renames; makes the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        with open(temporary, "r+b") as file:
            with _naming(path):  # a disk that is full
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        replace(temporary, path)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, which is gone afterwards unless it was renamed.

    Nobody can foresee its name, and it is never one that was there: what another user's link leads to stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _naming(path):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """`os.replace`, whose errors name `path` alone: nobody asked for a file of the other name."""
    with _naming(path):
        os.replace(temporary, path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """`folder`, made where it is missing, is this process's alone until the `with` or the process ends.

    Raises BlockingIOError where another has it. Where the system or the disk knows no locks, nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            raise BlockingIOError(
                f"{folder} is in use by {holder}: wait until that ends, or give another folder"
            ) from None
        except (OSError, ImportError):  # a disk without locks, Windows
            yield
            return
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)
