"""A folder of images becomes TFRecords in the ImageNet schema. Subfolders or a list say which image is of which class.

The console script of this module:

    conadv-import-images SRC DST --validation=0.1
    conadv-import-images SRC DST --image_size=256 --shards=64      (SRC has train/ and val/)
    conadv-import-images SRC DST --labels=labels.csv

Labels count from 0 in the order of the classes' names, which classes.txt lists. JPEGs in RGB or grey are copied byte
for byte; images in other formats, rotated images and images to be shrunk are stored as JPEGs of quality 95, with
white where they are transparent. Whatever is not imported is named or counted.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from conadv_tf import terminal
from conadv_tf.data import image_encoding, image_partial, image_recipe
from conadv_tf.data.image_files import left_out_lines, shown
from conadv_tf.data.image_folder import find
from conadv_tf.errors import ConfigError, whole_number

if TYPE_CHECKING:  # takes TensorFlow with it, which --help and a misspelt folder do without
    from conadv_tf.data.image_records import Report


def import_images(
    src: str,
    dst: str,
    image_size: int | None = None,
    shards: int | None = None,
    validation: float | None = None,
    max_bad_images: int = 10,
    labels: str | None = None,
    workers: int | None = None,
) -> tuple[list[str], Report]:
    """Writes TFRecords of the images of a folder: the same files every time. DST appears when all of them are whole.

    What has been stopped goes on when it is called again: files that are whole stay in DST.partial.

    Args:
      src: the folder of images, see `find`.
      dst: the folder to make: train-00000-of-..., validation-00000-of-..., classes.txt, data.gin.
      image_size: images whose shorter side is longer than this many pixels are shrunk to it; None leaves all sizes.
      shards: the number of training files; None makes one for each 1,000 images.
      validation: the share of images to set aside, see `find`.
      max_bad_images: the number of broken images to leave out before the import ends.
      labels: a CSV of path and label of the images, see `find`.
      workers: the number of threads that read images; None: as many as keep all cores at work.

    Returns:
      (names of the classes by label, what was imported).

    Raises:
      ConfigError: a number out of range, DST not empty or inside SRC, or DST.partial of another import.
      DataError: see `find`; more broken images than allowed.
    """
    numbers = {"image_size": (image_size, 1), "shards": (shards, 1), "workers": (workers, 1)}
    for name, (value, least) in (numbers | {"max_bad_images": (max_bad_images, 0)}).items():
        if value is not None:
            whole_number(f"--{name}", value, least)
    src, dst = os.path.realpath(src), os.path.realpath(dst)
    image_partial.check_places(src, dst, because=", whose subfolders are classes")
    arguments = {"SRC": src, "--image_size": image_size, "--shards": shards, "--validation": validation}
    arguments |= {"--labels": labels and os.path.realpath(labels), "version": image_encoding.version()}
    with image_partial.opened(dst) as partial:
        found = find(src, validation, labels)
        num_train = len(found.splits["train"])
        if shards and shards > num_train:
            raise ConfigError(f"--shards={shards} is more than the {num_train} training images: use fewer")
        from conadv_tf.data import image_records

        files = image_records.shards_of(found.splits, shards)
        partial.begin(arguments, image_records.fingerprint(files, found.classes))
        if partial.whole:
            terminal.say(
                f"{partial.folder} goes on: {len(partial.whole):,} of {len(files):,} files are whole", sys.stderr
            )
        report = image_records.Report(layout=found.layout, left_out=found.left_out)
        writer = image_records.Writer(partial.folder, found.classes, image_size, max_bad_images, report)
        writer.write(files, workers, dict(partial.whole), partial.add)
        _describe(partial.folder, src, dst, found.classes, report)
        partial.move(dst)
    return found.classes, report


def _describe(folder: str, src: str, dst: str, classes: Sequence[str], report: Report) -> None:
    """Writes what tells of the records: the names of the classes, and the recipe of the data."""
    with open(os.path.join(folder, "classes.txt"), "wb") as file:
        file.writelines(os.fsencode(name) + b"\n" for name in classes)
    recipe = image_recipe.text(os.path.basename(dst), src, classes, report.sizes, _left_out(report))
    with open(os.path.join(folder, image_recipe.FILE), "w", encoding="utf-8") as file:
        file.write(recipe)


def _print_report(dst: str, classes: Sequence[str], report: Report) -> None:
    for path, fault in report.bad.items():
        terminal.say(f"left out: {shown(path)}: {fault}", sys.stderr)
    for line in left_out_lines(report.left_out):
        terminal.say(line, sys.stderr)
    if report.whitened:
        terminal.say(
            f"{len(report.whitened):,} images with transparent parts have white ones in the records, such as "
            f"{shown(report.whitened[0])}",
            sys.stderr,
        )
    if report.duplicates:
        validation_path, train_path = map(shown, report.duplicates[0])
        terminal.say(
            f"{len(report.duplicates):,} validation images are training images too, byte for byte, such as "
            f"{validation_path} = {train_path}",
            sys.stderr,
        )
    for line in filter(None, (report.layout, image_recipe.advice(report.sizes))):
        terminal.say(shown(line))
    train, validation = (len(report.sizes[split]) for split in ("train", "validation"))
    terminal.say(
        f"{dst}: {train:,} training, {validation:,} validation images of {len(classes):,} classes; "
        f"{_left_out(report)} left out"
    )
    terminal.say(
        f"{os.path.join(dst, image_recipe.FILE)} suggests {image_recipe.suggestion(report.sizes)}. Train on it:"
    )
    terminal.say(image_recipe.command(dst, report.sizes))


def _left_out(report: Report) -> str:
    """Counts what is not imported, in words."""
    others = sum(map(len, report.left_out.values()))
    return f"{len(report.bad):,} broken images" + (f" and {others:,} other files or folders" if others else "")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(prog="conadv-import-images", description="A folder of images becomes TFRecords.")
    any_path = functools.partial(terminal.path, any_bytes=True)  # TensorFlow opens no file of SRC
    images = "a subfolder of images for each class, train/ and val/ with them, or images that --labels names"
    parser.add_argument("src", type=any_path, metavar="SRC", help=images)
    parser.add_argument("dst", type=terminal.path, metavar="DST", help="folder to make; it appears when it is whole")
    parser.add_argument("--image_size", type=int, metavar="N", help="shrink shorter sides beyond N pixels to N")
    parser.add_argument(
        "--shards", type=int, metavar="N", help="number of training files; default: one for each 1,000 images"
    )
    parser.add_argument(
        "--validation", type=float, metavar="SHARE", help="share of each class to set aside where SRC has no val/: 0.1"
    )
    parser.add_argument("--labels", type=any_path, metavar="CSV", help="rows of path, label and perhaps split")
    parser.add_argument("--max_bad_images", type=int, default=10, metavar="N", help="broken images to leave out (10)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that read images; default: for all cores")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for arguments, 1 for data, 130 where it was interrupted."""
    return terminal.exit_code(
        lambda: _import(_arguments(arguments)),
        "nothing was imported; the same command goes on after the last file that is whole",
        "check space and permissions of DST; nothing was imported, and the same command goes on",
    )


def _import(parsed: argparse.Namespace) -> None:
    classes, report = import_images(**vars(parsed))
    _print_report(parsed.dst, classes, report)


if __name__ == "__main__":
    sys.exit(main())
