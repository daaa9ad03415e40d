"""TFRecord files, plain or GZIP, local or gs://: listed, and indexed (where each record begins).

The number of records is known before training, and a record keeps its number when an earlier one is damaged. Finding
the records of a local file takes its headers alone; a remote one has to be read whole, so the index of the remote files
of a split is kept beside them and read the next time.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import io
import os
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import tensorflow as tf
from absl import logging

from conadv_tf.data.fingerprint import checksum
from conadv_tf.errors import DataError, whole_number
from conadv_tf.paths import is_remote, matching, opened, write_whole

INDEX = "conadv_index_"  # what the names of kept indices begin with
_GZIP_MAGIC = b"\x1f\x8b\x08"
_HEADER_BYTES, _FRAME_BYTES = 12, 16  # length and its checksum; these and the checksum of the payload


class BadRecords:
    """Records that could not be used, counted once each, over both splits.

    Args:
      limit: the number of records that may be skipped.
    """

    def __init__(self, limit: int):
        self.limit = whole_number("data.max_bad_records", limit, 0, ": 0 stops at the first bad record")
        self._reasons: dict[tuple[str, int], str] = {}
        self._sources: list[Callable[[], list[tuple[str, int, str]]]] = []
        self._lock = threading.Lock()

    @property
    def reasons(self) -> dict[tuple[str, int], str]:
        """The fault of each bad record so far, by (path, record)."""
        for source in self._sources:
            self._reasons.update({(path, record): reason for path, record, reason in source()})
        return self._reasons

    @property
    def count(self) -> int:
        """The number of bad records so far."""
        return len(self.reasons)

    def add_source(self, source: Callable[[], list[tuple[str, int, str]]]) -> None:
        """Adds a function that lists (path, record, reason) of bad records counted elsewhere, beyond the limit here."""
        self._sources.append(source)

    def per_file(self) -> dict[str, int]:
        """The number of bad records of each file that has any."""
        paths = [path for path, _ in self.reasons]
        return {path: paths.count(path) for path in dict.fromkeys(paths)}

    def add(self, path: str, record: int, reason: str) -> None:
        """Counts a bad record, warns at the first of each file, raises DataError beyond the limit."""
        with self._lock:
            if (path, record) in self._reasons:
                return
            first_of_file = all(known != path for known, _ in self._reasons)
            self._reasons[path, record] = reason
        if len(self._reasons) > self.limit:
            raise DataError(
                f"{path}, record {record}: {reason}; with it {len(self._reasons)} bad records, more than "
                f"data.max_bad_records={self.limit}: repair the file or raise data.max_bad_records"
            )
        if first_of_file:
            logging.warning(
                "%s, record %d: %s; skipped (further ones of this file are only counted)",
                path,
                record,
                reason,
            )

    def report(self) -> str:
        """Describes on one line how many there are, and in which files."""
        files = ", ".join(f"{number} in {path}" for path, number in self.per_file().items())
        return f"{self.count} bad records skipped (at most {self.limit}): {files or 'none'}"


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """One TFRecord file and where its records lie.

    Attributes:
      path: local or gs://.
      compression: "" or "GZIP", by the file's first bytes.
      bounds: int64 [records + 1], positions in the uncompressed bytes; record i is bounds[i]..bounds[i + 1].
      size: the size of the file, bytes.
      damaged: whether bytes remain that are no whole record.
    """

    path: str
    compression: str
    bounds: np.ndarray
    size: int = 0
    damaged: bool = False

    @property
    def num_records(self) -> int:
        """The number of whole records."""
        return len(self.bounds) - 1

    @property
    def outline(self) -> str:
        """A checksum of where the records lie."""
        return checksum(self.bounds.tobytes())

    @property
    def payload_bytes(self) -> int:
        """The bytes of all records, without what the file format adds."""
        return int(self.bounds[-1]) - _FRAME_BYTES * self.num_records

    def read(self, record: int) -> bytes:
        """Reads the payload of one record, independent of all others.

        Raises:
          tf.errors.OpError: where the record is damaged.
        """
        begin, end = int(self.bounds[record]), int(self.bounds[record + 1])
        with opened(self.path) if not self.compression else io.BytesIO(_inflate(self.path)[0]) as stream:
            stream.seek(begin)
            framed = stream.read(end - begin)
        # A file of this one record, so that TensorFlow checks its checksum.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "record")
            with open(path, "wb") as file:
                file.write(framed)
            return tf.data.TFRecordDataset(path).get_single_element().numpy()


def match_files(data_dir: str, patterns: str | Sequence[str], setting: str) -> list[str]:
    """Lists the files of the first pattern that matches any, sorted.

    Args:
      data_dir: local directory or gs:// prefix, of any name.
      patterns: glob patterns below it, tried in turn.
      setting: the gin name of `patterns`, for the message.

    Raises:
      DataError: the directory is missing, or nothing matches.
    """
    if not tf.io.gfile.isdir(data_dir):
        raise DataError(f"data_dir={data_dir!r} is no directory: point --data_dir at the TFRecord files")
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if paths := matching(data_dir, pattern):
            return paths
    raise DataError(
        f"data_dir={data_dir!r} has no file matching {' or '.join(map(repr, patterns))}: "
        f"correct --data_dir or set {setting}"
    )


@functools.lru_cache(maxsize=1)
def _inflate(path: str) -> tuple[bytes, str | None]:
    """Uncompresses a file: (bytes as far as they are whole, the damage that ended them or None).

    Raises:
      OSError, tf.errors.OpError: if the file cannot be read, which is no damage.
    """
    inflated, damage = io.BytesIO(), None
    try:
        with opened(path) as stored, gzip.GzipFile(fileobj=stored) as stream:
            shutil.copyfileobj(stream, inflated)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        damage = f"damaged GZIP ({error})"
    return inflated.getvalue(), damage


def _walk(stream: BinaryIO, size: int) -> tuple[list[int], bool]:
    """Finds the bounds of the whole records, and whether bytes remain that are no whole record."""
    bounds = [0]
    while header := stream.read(_HEADER_BYTES):
        end = bounds[-1] + _FRAME_BYTES + int.from_bytes(header[:8], "little")
        if len(header) < _HEADER_BYTES or end > size:
            return bounds, True
        bounds.append(end)
        stream.seek(end)
    return bounds, False


def _index_file(path: str, bad_records: BadRecords) -> RecordFile:
    with opened(path) as stream:
        compression = "GZIP" if stream.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC else ""
        size = length = tf.io.gfile.stat(path).length
        damage = None
        if compression:
            content, damage = _inflate(path)
            stream, length = io.BytesIO(content), len(content)
        stream.seek(0)
        bounds, torn = _walk(stream, length)
    if length == 0 and not damage:
        raise DataError(f"{path}: the file is empty: fetch it again, or take it out of the directory")
    if torn or damage:
        fault = damage or "truncated, or no TFRecord"
        bad_records.add(path, len(bounds) - 1, f"{fault}; what follows is lost")
    return RecordFile(path, compression, np.asarray(bounds, np.int64), size, bool(torn or damage))


def index_files(paths: Sequence[str], bad_records: BadRecords) -> list[RecordFile]:
    """Finds the records of every file of a folder: by the headers of plain local files, by reading others whole.

    Raises:
      DataError: a file that is empty or cannot be opened, no record at all, or more bad records than allowed.
    """
    try:
        known = _read_index(paths) if is_remote(paths[0]) else {}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            files = list(pool.map(lambda path: known.get(path) or _index_file(path, bad_records), paths))
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot read the data: {reason}: check the file and its permissions") from error
    if not any(file.num_records for file in files):
        raise DataError(f"{paths[0]} and the files like it hold no whole record: fetch them again")
    if is_remote(paths[0]) and len(known) < len(paths):
        _write_index(files)
    return files


def index_path(paths: Sequence[str]) -> str:
    """The path at which the index of these files is kept."""
    folder, first = os.path.split(paths[0])
    return os.path.join(folder, f"{INDEX}{first}.npz")


def _read_index(paths: Sequence[str]) -> dict[str, RecordFile]:
    """Reads the index of the files that still have the size they were indexed at; damaged files are never in it."""
    folder, path = os.path.dirname(paths[0]), index_path(paths)
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            index = np.load(io.BytesIO(file.read()), allow_pickle=False)
        bounds_of_files = np.split(index["bounds"], np.cumsum(index["counts"]))
        files = zip(index["names"], index["compressions"], index["sizes"], bounds_of_files, strict=False)
        known = {os.path.join(folder, str(name)): (str(kind), bounds, int(size)) for name, kind, size, bounds in files}
    except tf.errors.NotFoundError:
        logging.warning("looking for the records of %d files in %s, which reads them whole", len(paths), folder)
        return {}
    except (EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile, tf.errors.OpError) as error:
        logging.warning("%s cannot be used (%s): reading the files whole", path, str(error).splitlines()[0])
        return {}
    here = {path: known[path] for path in paths if path in known}
    return {
        path: RecordFile(path, kind, bounds, size)
        for path, (kind, bounds, size) in here.items()
        if tf.io.gfile.stat(path).length == size
    }


def _write_index(files: Sequence[RecordFile]) -> None:
    path, stream = index_path([file.path for file in files]), io.BytesIO()
    kept = [file for file in files if not file.damaged]
    np.savez_compressed(
        stream,
        names=np.array([os.path.basename(file.path) for file in kept]),
        compressions=np.array([file.compression for file in kept]),
        sizes=np.array([file.size for file in kept], np.int64),
        counts=np.array([len(file.bounds) for file in kept], np.int64),
        bounds=np.concatenate([np.zeros(0, np.int64), *(file.bounds for file in kept)]),
    )
    try:
        write_whole(path, stream.getvalue())
    except tf.errors.NotFoundError:
        pass  # another host, which starts with the same files, has just given its own the name
    except (OSError, tf.errors.OpError):
        logging.warning("%s cannot be written: every run will read the files whole before it starts", path)
