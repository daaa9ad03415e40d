"""Classifies image files with the network of a finished run.

    conadv-predict RUN IMAGE_OR_FOLDER [IMAGE_OR_FOLDER ...] [--top=5] [--csv=FILE]

RUN is the --model_dir of a finished run, or its export/ alone, wherever it was copied; local or gs://. A folder stands
for the images anywhere below it, in the order of their paths. Every image that conadv-import-images takes is taken, and
seen as the run's evaluation sees it: upright, in RGB on white, its central part, resized.

Prints a line an image: the likeliest classes with their probabilities. With --csv they go to a file instead, a line for
each image and class: image,rank,label,class,probability. An image that cannot be read is named on stderr and the others
go on; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from conadv_tf import paths, terminal
from conadv_tf.data.image_files import SUFFIXES, LeftOut, image_files, left_out_lines, shown
from conadv_tf.errors import ConfigError, DataError, RunError
from conadv_tf.run.folder import EXPORT, SAVED_MODEL, export_in

if TYPE_CHECKING:  # takes TensorFlow with it, which --help and a misspelt path do without
    from conadv_tf.data import augment
    from conadv_tf.run.export import Classifier

_CONFIG = "config.gin"
_IMAGES_AT_A_TIME = 32
_COLUMNS = ("image", "rank", "label", "class", "probability")

# The likeliest classes of an image: (label, name, probability), the likeliest first.
Likeliest = list[tuple[int, str, float]]


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _local(text: str) -> str:
    path = terminal.path(text, any_bytes=True)
    if paths.is_remote(path):
        raise argparse.ArgumentTypeError(f"{path!r} is not on this machine: copy it here first")
    return path


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(
        prog="conadv-predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=terminal.path, metavar="RUN", help="--model_dir of a finished run, or its export/")
    parser.add_argument("images", nargs="+", type=_local, metavar="IMAGE_OR_FOLDER", help="local ones")
    parser.add_argument("--top", type=_at_least_one, default=5, metavar="N", help="classes of each image (5)")
    parser.add_argument(
        "--csv", type=_local, metavar="FILE", help="file to write in the place of lines; it appears when it is whole"
    )
    return parser.parse_args(arguments)


def _export_of(run: str) -> str:
    """The folder of the SavedModel of RUN."""
    found = export_in(run)
    if found:
        return found
    if paths.exists(os.path.join(run, _CONFIG)):
        raise RunError(
            f"RUN={run} has not finished (there is no {EXPORT}/): start the command that began it again, which trains "
            "it to its end"
        )
    raise ConfigError(
        f"RUN={run} holds neither a run nor an export (there is no {SAVED_MODEL}): name the --model_dir of a finished "
        "run, or its export/"
    )


def _image_files(given: Sequence[str], left_out: LeftOut) -> list[str]:
    """The image files that are given, and those below folders that are given; `left_out` takes what else lies there."""
    found = []
    for path in given:
        if os.path.isdir(path):
            found += image_files(path.rstrip(os.sep) or os.sep, left_out)
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise DataError(f"{path!r} is no file or folder: correct the path")
    if not found:
        raise DataError(f"no image lies below {', '.join(map(repr, given))}: name folders with {' '.join(SUFFIXES)}")
    return found


def _view(export: str, classifier: Classifier) -> augment.View:
    """The view that the export keeps; of an earlier version's, which keeps none, the one that its run had."""
    from conadv_tf.data import augment
    from conadv_tf.run import kept_config
    from conadv_tf.run.folder import RunFolder

    if classifier.view:
        return classifier.view
    config = RunFolder(os.path.dirname(paths.absolute(export).rstrip("/")), writes=False).read_config()
    if config is None:
        streamed = classifier.image_shape[-1] == 3  # grey images never are
        seen = "the central 7/8 of its shorter side" if streamed else "whole"
        terminal.say(f"{export} is of an earlier version and says not how to see an image: {seen}", sys.stderr)
    else:
        streamed = any(
            name.endswith(".in_memory") and value == "False"
            for name, value in kept_config.kept_settings(config).items()
        )
    return augment.STREAMED_VIEW if streamed else augment.WHOLE_VIEW


def _reader(view: augment.View, image_shape: tuple[int, int, int]) -> Callable[[str], np.ndarray | DataError]:
    """Makes a function from a path to the image uint8 [H, W, C] as evaluation sees it, or to its fault."""
    import tensorflow as tf

    from conadv_tf.data import augment, image_records

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def seen(encoded: tf.Tensor) -> tf.Tensor:
        return augment.seen(encoded, view, image_shape)

    decode = seen.get_concrete_function()  # traced before the threads ask for it

    def read(path: str) -> np.ndarray | DataError:
        try:
            encoded = image_records.read(path, form="PNG")
            return decode(tf.constant(encoded.image)).numpy()
        except DataError as error:
            return error
        except tf.errors.InvalidArgumentError:
            return DataError("corrupt image")

    return read


def _classified(classifier: Classifier, view: augment.View, files: Sequence[str]) -> Iterator[np.ndarray | DataError]:
    """Yields, for each file in order, the probabilities float32 [classes], or what is wrong with the file."""
    read = _reader(view, classifier.image_shape)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for begin in range(0, len(files), _IMAGES_AT_A_TIME):
            images = list(pool.map(read, files[begin : begin + _IMAGES_AT_A_TIME]))
            good = [image for image in images if not isinstance(image, DataError)]
            rows = iter(classifier.probabilities(np.stack(good)) if good else ())
            for image in images:
                yield image if isinstance(image, DataError) else next(rows)


def _likeliest(probabilities: np.ndarray, names: Sequence[str], top: int) -> Likeliest:
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(int(label), names[label], float(probabilities[label])) for label in order]


def _line(path: str, likeliest: Likeliest) -> str:
    return "   ".join([shown(path), *(f"{100 * probability:.1f} % {name}" for _, name, probability in likeliest)])


@contextlib.contextmanager
def _table(path: str) -> Iterator[Callable[[str, Likeliest], None]]:
    """Gives a function that writes the rows of an image; the file appears at the end."""
    if os.path.isdir(path):
        raise ConfigError(f"--csv={path} is a folder: name a file in it")
    partial = f"{path}.partial"
    try:
        # The name of a file may be any bytes.
        with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            yield lambda image, likeliest: writer.writerows(
                (image, rank, label, name, f"{probability:.6g}")
                for rank, (label, name, probability) in enumerate(likeliest, 1)
            )
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def _predict(settings: argparse.Namespace) -> None:
    export = _export_of(settings.run)
    left_out: LeftOut = collections.defaultdict(list)
    files = _image_files(settings.images, left_out)
    for line in left_out_lines(left_out):
        terminal.say(line, sys.stderr)
    with contextlib.ExitStack() as stack:
        # Opened before the work: it may not be writable.
        write = stack.enter_context(_table(settings.csv)) if settings.csv else None
        from conadv_tf.run.export import load

        classifier = load(export)
        view = _view(export, classifier)
        progress = stack.enter_context(terminal.Progress(len(files), "image"))
        faults = 0
        for path, found in zip(files, _classified(classifier, view, files), strict=True):
            progress.update()
            if isinstance(found, DataError):
                faults += 1
                progress.say(f"cannot be read: {shown(path)}: {found}", sys.stderr)
                continue
            likeliest = _likeliest(found, classifier.names, settings.top)
            if write:
                write(path, likeliest)
            else:
                progress.say(_line(path, likeliest))
    if settings.csv:
        terminal.say(f"{settings.csv}: {len(files) - faults:,} images")
    if faults:
        raise DataError(f"{faults:,} of {len(files):,} images cannot be read, see above: repair them or leave them out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for arguments, 1 for images or the run, 130 where it was interrupted."""
    return terminal.exit_code(
        lambda: _predict(_arguments(arguments)),
        "--csv was not written",
        "check the images, and space and permissions of --csv",
    )


if __name__ == "__main__":
    sys.exit(main())
