"""A folder of images, one subfolder a class: its classes, its images, its splits."""

import dataclasses
import os
import random
from collections.abc import Sequence

from conadv_tf.errors import ConfigError, DataError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_VALIDATION_FOLDERS = ("val", "validation", "test")
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """One image to import: its path, its name below the split's folder, and its label."""

    path: str
    filename: str
    label: int


def _subfolders(folder: str) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: str, classes: Sequence[str]) -> list[Source]:
    """Lists the images of every class below `folder`, sorted by name."""
    found = []
    for label, name in enumerate(classes):
        walk = os.walk(os.path.join(folder, name))
        files = (os.path.join(place, file) for place, _, files in walk for file in files if not file.startswith("."))
        paths = sorted(path for path in files if path.lower().endswith(_SUFFIXES))
        found += [Source(path, os.path.relpath(path, folder), label) for path in paths]
    return found


def _split(images: Sequence[Source], fraction: float) -> dict[str, list[Source]]:
    """Takes about `fraction` of every class, at random but always the same, for validation."""
    splits: dict[str, list[Source]] = {"train": [], "validation": []}
    for label in sorted({image.label for image in images}):
        of_class = [image for image in images if image.label == label]
        random.Random(f"{_SEED} {label}").shuffle(of_class)
        taken = min(round(fraction * len(of_class)), len(of_class) - 1)
        splits["validation"] += of_class[:taken]
        splits["train"] += of_class[taken:]
    return splits


def find(src: str, validation: float | None) -> tuple[list[str], dict[str, list[Source]]]:
    """Finds the classes and the images of both splits, in the order in which they will be stored.

    Args:
      src: folder with a subfolder for each class, or with train/ and val/ (validation/, test/) that have them.
      validation: the share of each class to set aside, in (0, 1), where src has no val/.

    Returns:
      (names of the classes by label, images of "train" and "validation").

    Raises:
      ConfigError: `validation` is missing, out of range, or given where src has val/.
      DataError: src is no folder, or a class or split is empty or unknown.
    """
    if not os.path.isdir(src):
        raise DataError(f"SRC={src!r} is no folder: name the one that has a subfolder of images for each class")
    found = _subfolders(src)
    folder = next((name for name in _VALIDATION_FOLDERS if "train" in found and name in found), None)
    if (validation is None) != (folder is not None):
        cause = f"has train/ and {folder}/" if folder else "has no train/ and val/"
        raise ConfigError(
            f"--validation={validation}, and {src!r} {cause}: give --validation, such as 0.1, exactly where there is "
            "no val/"
        )
    if validation is not None and not 0 < validation < 1:
        raise ConfigError(f"--validation={validation} must lie between 0 and 1: it is the share of images set aside")
    train = os.path.join(src, "train") if folder else src
    classes = _subfolders(train)
    if validation is not None:
        splits = _split(_images(train, classes), validation)
    else:
        splits = _given_splits(train, os.path.join(src, str(folder)), classes)
    _check_complete(src, classes, splits)
    for images in splits.values():
        random.Random(_SEED).shuffle(images)
    return classes, splits


def _given_splits(train: str, validation: str, classes: Sequence[str]) -> dict[str, list[Source]]:
    unknown = sorted(set(_subfolders(validation)) - set(classes))
    if unknown:
        raise DataError(f"{validation}/{unknown[0]} is a class that {train} lacks: remove it, or add it there")
    return {"train": _images(train, classes), "validation": _images(validation, classes)}


def _check_complete(src: str, classes: Sequence[str], splits: dict[str, list[Source]]) -> None:
    counts = [0] * len(classes)
    for image in splits["train"]:
        counts[image.label] += 1
    kinds = ", ".join(_SUFFIXES)
    if len(classes) < 2 or 0 in counts:
        cause = (
            f"class {classes[counts.index(0)]!r} has no training image" if 0 in counts else f"{len(classes)} classes"
        )
        raise DataError(f"SRC={src!r}: {cause}: it needs a subfolder for each class, with images ({kinds})")
    if not splits["validation"]:
        raise DataError(f"SRC={src!r}: no image for validation: add some ({kinds}), or raise --validation")
