"""The lock of a run's folder: one process at a time, until that process ends, however it ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import TextIO

from conadv_tf import paths
from conadv_tf.errors import RunError

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

_FILE = ".lock"


@contextlib.contextmanager
def held(folder: str) -> Iterator[None]:
    """Holds the lock of a local folder that exists. A remote folder (gs://) is not locked.

    The kernel keeps the lock for the open file: it is free as soon as the process is gone, killed or not.

    Raises:
      RunError: if another process holds the lock, or the lock's file cannot be opened.
    """
    if fcntl is None or paths.is_remote(folder):
        yield
        return
    with _opened(os.path.join(folder, _FILE)) as file:
        if not _taken(file):
            file.seek(0)
            raise RunError(
                f"--model_dir={folder} is in use by {file.read().strip() or 'another process'}: wait for it, stop it, "
                "or pass another --model_dir"
            )
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def _opened(path: str) -> TextIO:
    try:
        # Append: a process that finds it locked must not wipe out who holds it.
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{path} cannot be opened ({error.strerror}): remove it, or choose a folder you may write"
        ) from error


def is_held(folder: str) -> bool:
    """Tells whether a process holds the lock of a local folder."""
    path = os.path.join(folder, _FILE)
    if fcntl is None or not os.path.isfile(path):
        return False
    with open(path, "a+", encoding="utf-8") as file:
        return not _taken(file)


def _taken(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
