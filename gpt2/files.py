"""Atomic writing of files, and locks that give one process exclusive use of a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK = ".fastgpt2.lock"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes to a temporary file beside `path`, flushes it to disk and renames it. Creates missing folders.

    Raises OSError naming `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        with open(temporary, "r+b") as file:
            with _naming(path):  # the disk may be full
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        replace(temporary, path)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Creates an empty temporary file in the folder of `path` and deletes it at the end unless it was renamed.

    The name is random and the file must be new, so that a link placed there by another user is never followed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with _naming(path):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary: Path, path: Path) -> None:
    """`os.replace`, but errors name `path` only, because the caller does not know the temporary name."""
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
    """Locks `folder` for this process until the `with` or the process ends, and creates the folder if it is missing.

    Raises BlockingIOError if another process holds the lock. On systems and disks without locks nothing is locked.
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
