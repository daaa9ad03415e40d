"""The folder of an import until all is there, DST.partial: its lock, and the journal by which an import goes on."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from conadv_tf.errors import ConfigError

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

_LOCK, _JOURNAL = ".lock", ".journal"  # hidden: no pattern of records matches them


class Partial:
    """A folder that this process alone writes.

    The journal's first line says what is imported, each further one which file is whole, and what became of its images.

    Attributes:
      folder: its path.
      whole: what became of the images of each file that is whole, by the name of the file.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.whole: dict[str, list[Any]] = {}
        self._journal = os.path.join(folder, _JOURNAL)
        self._began, self._end = self._read()

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """Reads the journal: (its first line, the end of its last whole line). Takes whole files into `whole`."""
        began, end = None, 0
        if not os.path.exists(self._journal):
            return began, end
        with open(self._journal, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if began is None:
                        began = {name: entry[name] for name in ("arguments", "images")}
                    elif self._size(entry["file"]) == entry["bytes"]:
                        self.whole[entry["file"]] = entry["results"]
                except (ValueError, KeyError, TypeError):  # what a machine that stopped has made of it
                    break
                end += len(line)
        return began, end

    @property
    def has_begun(self) -> bool:
        """Tells whether the journal says what is imported."""
        return self._began is not None

    def _size(self, name: str) -> int:
        path = os.path.join(self.folder, name)
        return os.path.getsize(path) if os.path.isfile(path) else -1

    def begin(self, arguments: Mapping[str, Any], images: str) -> None:
        """Begins the journal, or goes on with it.

        Args:
          arguments: what the files depend on beside the images: strings, numbers and None by the words of the command.
          images: a hash of the images.

        Raises:
          ConfigError: if the folder is of another import.
        """
        began = {"arguments": dict(arguments), "images": images}
        if self._began is None:
            self._end = 0
            self._append(began)
            return
        for name, value in arguments.items():
            before = self._began["arguments"].get(name)
            if before != value:
                raise ConfigError(
                    f"{self.folder!r} is of an import with {name}={before}, not {value}: repeat that one, to go "
                    "on, or delete the folder"
                )
        if self._began["images"] != images:
            raise ConfigError(
                f"{self.folder!r} is of an import of other images or labels, which have changed since: delete the "
                "folder, and all of them are imported"
            )

    def add(self, name: str, results: list[Any]) -> None:
        """Notes that a file is whole, and what became of its images."""
        with open(os.path.join(self.folder, name), "rb") as file:
            os.fsync(file.fileno())  # else a loss of power could leave the note without the file
        self._append({"file": name, "bytes": self._size(name), "results": results})
        self.whole[name] = results

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self._journal, "r+b" if os.path.exists(self._journal) else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(json.dumps(entry).encode() + b"\n")
            self._end = file.tell()

    def move(self, dst: str) -> None:
        """Gives the folder its final name."""
        os.replace(self.folder, dst)
        for name in (_JOURNAL, _LOCK):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(dst, name))


def check_places(src: str, dst: str, because: str = "") -> None:
    """Raises ConfigError unless DST may be made: it is new or empty, and outside SRC. Both are real paths."""
    if os.path.lexists(dst) and (not os.path.isdir(dst) or os.listdir(dst)):
        raise ConfigError(f"DST={dst!r} is not an empty folder: name another one, or empty it")
    if os.path.commonpath([src, dst]) == src:
        raise ConfigError(f"DST={dst!r} lies in SRC={src!r}{because}: name a folder outside it")


@contextlib.contextmanager
def opened(dst: str) -> Iterator[Partial]:
    """Holds DST.partial, new or of an import that was stopped. Where no file of it is whole at the end, it is removed.

    Raises:
      ConfigError: if another process holds it, or it is of no import.
    """
    folder = f"{dst}.partial"
    os.makedirs(folder, exist_ok=True)
    _check_is_of_an_import(folder, _JOURNAL in os.listdir(folder))
    with open(os.path.join(folder, _LOCK), "a+b") as lock:
        _take(lock, folder)
        partial = Partial(folder)
        _check_is_of_an_import(folder, partial.has_begun)
        try:
            yield partial
        finally:
            if not partial.whole:
                shutil.rmtree(folder, ignore_errors=True)


def _check_is_of_an_import(folder: str, has_begun: bool) -> None:
    """Raises ConfigError for files of which no journal says what they are: they would be taken for this import's."""
    strangers = sorted(set(os.listdir(folder)) - {_LOCK, _JOURNAL})
    if strangers and not has_begun:
        raise ConfigError(f"{folder!r} has {strangers[0]!r} and is of no import that can go on: delete or move it")


def _take(lock: BinaryIO, folder: str) -> None:
    """Takes the lock, which the kernel frees when this process ends, however it ends."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().decode(errors="replace") or "another process"
        raise ConfigError(f"{folder!r} is being written by {holder}: wait for it, or name another DST") from error
    except OSError:  # a file system without locks
        return
    if not os.path.exists(lock.name) or not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
        raise ConfigError(f"{folder!r} has just been finished or left by another process: look at DST, or start again")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    lock.flush()
