"""TFRecords of large photos become TFRecords of smaller ones, which training decodes faster.

    conadv-shrink-records SRC DST [--max_side=258] [--quality=95]

SRC is a folder of records as Google's Cloud TPU script, TensorFlow Datasets or conadv-import-images writes it. DST gets
files of the same names with the same records in the same order. An image whose shorter side is longer than --max_side
is stored as a JPEG of that size; everything else of a record stays. Other files of SRC, such as
classes.txt, are copied.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from conadv_tf import paths, terminal
from conadv_tf.data import image_encoding, image_partial, in_turn
from conadv_tf.errors import ConfigError, DataError, one_line, whole_number

RECORDS = "*-of-*"  # the files of records, by the names that all three writers give them
IMAGE_FEATURES = ("image/encoded", "image")  # Cloud TPU script and conadv-import-images; TensorFlow Datasets
MAX_SIDE = 258  # 1.15 × 224
_Shrunk = Callable[[bytes], tuple[bytes, tuple[int, int]] | None]  # image_encoding.shrunk of an image
_AHEAD = 4  # records of each thread that are read and not yet written
_COPY = ".copy"  # hidden: no pattern of records matches it


class Outcome(NamedTuple):
    """What became of records: the number of all, of shrunk images, of broken ones; the bytes before and after."""

    records: int = 0
    shrunk: int = 0
    broken: int = 0
    before: int = 0
    after: int = 0


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    return Outcome(*map(sum, zip(*outcomes, strict=True)))


def shrink_records(
    src: str,
    dst: str,
    max_side: int = MAX_SIDE,
    quality: int = image_encoding.QUALITY,
    workers: int | None = None,
) -> Outcome:
    """Writes the records of a folder with smaller images. DST appears when all of them are whole.

    What has been stopped goes on when it is called again: files that are whole stay in DST.partial. A file is whole
    once it has been read back as it was written. A broken image stays as it is, for training to count.

    Args:
      src: the folder, local or gs://.
      dst: the local folder to make.
      max_side: the longest shorter side that stays, pixels.
      quality: of the JPEGs that are made, in 1..100; see Pillow's documentation of JPEG.
      workers: the number of threads that decode; None: one for each core.

    Raises:
      ConfigError: a number out of range, DST not empty or remote, or DST.partial of other records.
      DataError: no record, one that is damaged or without image.
    """
    for name, value in {"max_side": max_side, "quality": quality, "workers": workers}.items():
        if value is not None:
            whole_number(f"--{name}", value, 1)
    if quality > 100:
        raise ConfigError(f"--quality={quality} is too large: JPEG has 1 to 100")
    src, dst = _places(src, dst)
    import tensorflow as tf

    from conadv_tf.data import record_files

    if not tf.io.gfile.isdir(src):
        raise DataError(f"SRC={src!r} is no folder: name that of the TFRecord files")
    found = map(os.path.basename, paths.matching(src, RECORDS))
    files = {name: _state(os.path.join(src, name)) for name in found if not name.startswith(record_files.INDEX)}
    if not files:
        raise DataError(f"SRC={src!r} has no file of records, {RECORDS}: name the folder that holds them")
    with image_partial.opened(dst) as partial:
        arguments = {"SRC": src, "--max_side": max_side, "--quality": quality, "version": image_encoding.version()}
        shrunk = functools.partial(image_encoding.shrunk, max_side=max_side, quality=quality)
        partial.begin(arguments, repr(list(files)))
        threads = workers or os.cpu_count() or 1
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            terminal.Progress(len(files), "file") as progress,
        ):
            for name, state in files.items():
                if partial.whole.get(name, [])[-len(state) :] != state:  # else it has been made of this very file
                    file = os.path.join(src, name)
                    with _local(file, partial.folder) as local:
                        made = _shrink_file(
                            local, file, os.path.join(partial.folder, name), shrunk, pool, _AHEAD * threads
                        )
                    partial.add(name, [*made, *state])
                progress.update()
        _copy_others(src, partial.folder, files)
        partial.move(dst)
        return _sum(Outcome(*partial.whole[name][: -len(state)]) for name, state in files.items())


def _places(src: str, dst: str) -> tuple[str, str]:
    """SRC and DST from the root. Raises ConfigError unless DST may be made."""
    if paths.is_remote(dst):
        raise ConfigError(f"DST={dst!r} is remote: name a local folder, and copy it when it is whole")
    src, dst = paths.absolute(src), os.path.realpath(dst)
    # Of a remote SRC, the path that its name would be here, in which no DST lies.
    image_partial.check_places(os.path.realpath(src), dst)
    return src, dst


def _state(path: str) -> list[int]:
    """What changes when the file changes. Of a local one TensorFlow tells whole seconds."""
    if not paths.is_remote(path):
        state = os.stat(path)
        return [state.st_size, state.st_mtime_ns]
    import tensorflow as tf

    found = tf.io.gfile.stat(path)
    return [found.length, found.mtime_nsec]


@contextlib.contextmanager
def _local(path: str, folder: str) -> Iterator[str]:
    """Gives a local file of the same bytes; of a remote one a copy in `folder`, which is good within the context."""
    if not paths.is_remote(path):
        yield path
        return
    import tensorflow as tf

    copy = os.path.join(folder, _COPY)
    try:
        tf.io.gfile.copy(path, copy, overwrite=True)
        yield copy
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(copy)


def _shrink_file(
    src: str, name: str, dst: str, shrunk: _Shrunk, pool: concurrent.futures.Executor, ahead: int
) -> Outcome:
    """Makes the file `dst` of the file `src`, which is called `name` in errors; memory has `ahead` records at most."""
    import tensorflow as tf

    outcomes, digest = [], hashlib.sha256()
    work = functools.partial(_shrunk_record, name, shrunk)
    with tf.io.TFRecordWriter(dst) as file:
        for record, outcome in in_turn.results(work, _payloads(src, name), pool, ahead):
            file.write(record)
            digest.update(record)
            outcomes.append(outcome)
    read = hashlib.sha256()
    for record in _payloads(dst, dst):
        read.update(record)
    if read.digest() != digest.digest():
        raise DataError(f"{dst} is not what was written: check the disk; the same command goes on")
    return _sum(outcomes)


def _payloads(path: str, name: str) -> Iterator[bytes]:
    """The records of a local file, plain or GZIP, which is called `name` in errors."""
    import tensorflow as tf

    from conadv_tf.data import record_files

    [file] = record_files.index_files([path], record_files.BadRecords(1))
    try:
        if file.damaged:
            raise DataError(f"{name} ends within a record: fetch the file again, or take it out of SRC")
        yield from tf.data.TFRecordDataset(path, file.compression).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise DataError(f"{name}: {one_line(error)}: fetch the file again, or take it out of SRC") from error


def _shrunk_record(path: str, shrunk: _Shrunk, payload: bytes) -> tuple[bytes, Outcome]:
    import tensorflow as tf
    from google.protobuf import message

    try:
        example = tf.train.Example.FromString(payload)
    except message.DecodeError as error:
        raise DataError(f"{path}: a record is no tf.train.Example: only records of images can be shrunk") from error
    features = example.features.feature
    name = next((name for name in IMAGE_FEATURES if name in features), None)
    if name is None or len(features[name].bytes_list.value) != 1:
        raise DataError(
            f"{path}: a record has no image in {' or '.join(IMAGE_FEATURES)}, but {', '.join(sorted(features))}: "
            "only records with one of these can be shrunk"
        )
    try:
        smaller = shrunk(features[name].bytes_list.value[0])
    except DataError:  # a broken image
        return payload, Outcome(1, 0, 1, len(payload), len(payload))
    if smaller is None:
        return payload, Outcome(1, 0, 0, len(payload), len(payload))
    image, (width, height) = smaller
    features[name].bytes_list.value[0] = image
    for side, pixels in (("image/width", width), ("image/height", height)):
        if side in features:
            features[side].int64_list.value[:] = [pixels]
    if "image/format" in features:
        features["image/format"].bytes_list.value[:] = [b"JPEG"]
    record = example.SerializeToString(deterministic=True)
    return record, Outcome(1, 1, 0, len(payload), len(record))


def _copy_others(src: str, folder: str, files: Collection[str]) -> None:
    import tensorflow as tf

    from conadv_tf.data import record_files

    for name in tf.io.gfile.listdir(src):
        path = os.path.join(src, name)
        if name not in files and not name.startswith((record_files.INDEX, ".")) and not tf.io.gfile.isdir(path):
            tf.io.gfile.copy(path, os.path.join(folder, name), overwrite=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(prog="conadv-shrink-records", description="TFRecords with images of at most a size.")
    parser.add_argument("src", type=terminal.path, metavar="SRC", help="folder of TFRecords, local or gs://")
    parser.add_argument("dst", type=terminal.path, metavar="DST", help="folder to make; it appears when it is whole")
    size = f"shrink shorter sides beyond N pixels to N ({MAX_SIDE}, which is 1.15 × 224)"
    parser.add_argument("--max_side", type=int, default=MAX_SIDE, metavar="N", help=size)
    quality = f"of the JPEGs that are made, 1 to 100 ({image_encoding.QUALITY}); 90 is read faster"
    parser.add_argument("--quality", type=int, default=image_encoding.QUALITY, metavar="N", help=quality)
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode; default: one for each core")
    return parser.parse_args(arguments)


def _shrink(parsed: argparse.Namespace) -> None:
    made = shrink_records(**vars(parsed))
    terminal.say(
        f"{parsed.dst}: {made.records:,} records, {made.shrunk:,} of them with an image shrunk to a shorter side of "
        f"{parsed.max_side} pixels, {made.broken:,} with a broken one; {made.before / 1e6:,.1f} MB became "
        f"{made.after / 1e6:,.1f} MB. Train on it with {_train_on(parsed.dst)}"
    )


def _train_on(dst: str) -> str:
    """The flag of train.py, for a shell; TensorFlow Datasets looks for a folder of a version below the data set's."""
    if os.path.exists(os.path.join(dst, "dataset_info.json")):
        return "the --data_dir below which it is NAME/VERSION, as TensorFlow Datasets had it"
    return f"--data_dir={shlex.quote(dst)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for arguments, 1 for data, 130 where it was interrupted."""
    return terminal.exit_code(
        lambda: _shrink(_arguments(arguments)),
        "the same command goes on after the last file that is whole",
        "check space and permissions of DST; the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
