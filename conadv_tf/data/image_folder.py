"""A folder of images, one subfolder a class: its classes, its images, its splits."""

import collections
import dataclasses
import os
import random
import unicodedata
from collections.abc import Sequence

from conadv_tf.data.image_files import OUTSIDE, SUFFIXES, LeftOut, entries, image_files
from conadv_tf.errors import ConfigError, DataError

_ROLES = {  # names of folders, in any case
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """One image to import: its path, its name below the split's folder, and its label."""

    path: str
    filename: str
    label: int


@dataclasses.dataclass(frozen=True)
class Found:
    """What is to be imported of a folder.

    Attributes:
      classes: their names by label.
      splits: images of "train" and "validation", in the order in which they will be stored.
      layout: a line on what the folders serve for; empty where SRC has a subfolder for each class.
      left_out: paths below SRC that are not imported, by the reason.
    """

    classes: list[str]
    splits: dict[str, list[Source]]
    layout: str
    left_out: LeftOut


def _role(name: str) -> str | None:
    return next((role for role, names in _ROLES.items() if name.lower() in names), None)


def _split_folders(src: str, names: Sequence[str]) -> dict[str, str]:
    """The folders of src that are splits, by role: none, or "train" and at least one of "validation" and "test"."""
    found: dict[str, str] = {}
    for name in names:
        role = _role(name)
        if role in found:
            raise DataError(f"SRC={src!r} has {found[role]}/ and {name}/ for one split: rename or remove one of them")
        if role:
            found[role] = name
    if found and "train" not in found:
        name = next(iter(found.values()))
        raise DataError(f"SRC={src!r} has {name}/ but no train/: add it, or where {name!r} is a class, rename it")
    if len(found) == 1:
        name = found["train"]
        raise DataError(
            f"SRC={src!r} has {name}/ but no folder for validation: name {os.path.join(src, name)!r} itself with "
            f"--validation=0.1, or where {name!r} is a class, rename it"
        )
    return found


def _classes(folder: str, left_out: LeftOut) -> list[str]:
    """Names of the subfolders; files beside them are left out."""
    folders, files = entries(folder, left_out)
    left_out[OUTSIDE] += files
    return [os.path.basename(path) for path in folders]


def _images(folder: str, classes: Sequence[str], left_out: LeftOut) -> list[Source]:
    """Lists the images of every class below `folder`, sorted by name."""
    found = []
    for label, name in enumerate(classes):
        place = os.path.join(folder, name)
        paths = image_files(place, left_out) if os.path.isdir(place) else []
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


def find(src: str, validation: float | None) -> Found:
    """Finds the classes and the images of both splits.

    Args:
      src: folder with a subfolder for each class, or with train/ and val/ that have them. train/ may be called
        training/, val/ valid/ or validation/, in any case; test/ or testing/ serves where there is no val/.
      validation: the share of each class to set aside, in (0, 1), where src has no train/ and val/.

    Returns:
      what was found.

    Raises:
      ConfigError: `validation` is missing, out of range, or given where src has val/.
      DataError: src is no folder, a split lacks its counterpart, or a class or split is empty, unknown or ambiguous.
    """
    if not os.path.isdir(src):
        raise DataError(f"SRC={src!r} is no folder: name the one that has a subfolder of images for each class")
    left_out: LeftOut = collections.defaultdict(list)
    names = _classes(src, left_out)
    folders = _split_folders(src, names)
    _check_share(src, validation, folders)
    if validation is not None:
        _check_spelling(names)
        classes, layout = names, ""
        splits = _split(_images(src, classes, left_out), validation)
        _check_complete(src, classes, splits, "raise --validation")
    else:
        train, other = (os.path.join(src, name) for name in (folders["train"], _evaluated(folders)))
        classes, splits = _given_splits(train, other, left_out)
        _check_complete(train, classes, splits, f"name {train!r} itself with --validation=0.1")
        layout = _layout(src, folders, names)
    for images in splits.values():
        random.Random(_SEED).shuffle(images)
    relative = {reason: sorted(os.path.relpath(path, src) for path in paths) for reason, paths in left_out.items()}
    return Found(classes, splits, layout, {reason: paths for reason, paths in relative.items() if paths})


def _evaluated(folders: dict[str, str]) -> str:
    """The split folder that serves for validation."""
    return folders["validation"] if "validation" in folders else folders["test"]


def _layout(src: str, folders: dict[str, str], names: Sequence[str]) -> str:
    used = (folders["train"], _evaluated(folders))
    parts = [f"{used[0]}/ serves for training, {used[1]}/ for validation"]
    for name in names:
        if name not in used:
            count = len(image_files(os.path.join(src, name), collections.defaultdict(list)))
            parts.append(f"{name}/ is not imported: {count:,} images")
    return "; ".join(parts)


def _given_splits(train: str, other: str, left_out: LeftOut) -> tuple[list[str], dict[str, list[Source]]]:
    """Finds (classes, images of both splits) where each split has a folder."""
    classes, evaluated = _classes(train, left_out), _classes(other, left_out)
    if not evaluated:
        count = len(image_files(other, collections.defaultdict(list)))
        raise DataError(
            f"{other!r} has no subfolder of a class, so its {count:,} images have no label: sort them into such, or "
            f"name {train!r} itself with --validation=0.1"
        )
    _check_spelling(sorted({*classes, *evaluated}))
    unknown = sorted(set(evaluated) - set(classes))
    if unknown:
        raise DataError(f"{other}/{unknown[0]} is a class that {train} lacks: remove it, or add it there")
    doubtful = [name for name in classes if _role(name) and name not in evaluated]
    if doubtful:
        raise DataError(f"{os.path.join(train, doubtful[0])!r} has the name of a split: rename it where it is a class")
    splits = {"train": _images(train, classes, left_out), "validation": _images(other, classes, left_out)}
    return classes, splits


def _check_share(src: str, validation: float | None, folders: dict[str, str]) -> None:
    if folders and validation is not None:
        raise ConfigError(
            f"--validation={validation}, but {src!r} has {folders['train']}/ and {_evaluated(folders)}/: leave "
            "--validation out, or where these are classes, rename them"
        )
    if not folders and validation is None:
        raise ConfigError(f"{src!r} has no train/ and val/: give --validation=0.1, the share of images to set aside")
    if validation is not None and not 0 < validation < 1:
        raise ConfigError(f"--validation={validation} must lie between 0 and 1: it is the share of images set aside")


def _check_spelling(names: Sequence[str]) -> None:
    spelt: dict[str, str] = {}
    for name in names:
        other = spelt.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"{other!a} and {name!a} are one name in two spellings of Unicode: use one for both folders"
            )


def _check_complete(folder: str, classes: Sequence[str], splits: dict[str, list[Source]], remedy: str) -> None:
    counts = [0] * len(classes)
    for image in splits["train"]:
        counts[image.label] += 1
    kinds = ", ".join(SUFFIXES)
    if len(classes) < 2 or 0 in counts:
        cause = (
            f"class {classes[counts.index(0)]!r} has no training image" if 0 in counts else f"{len(classes)} classes"
        )
        raise DataError(f"{folder!r}: {cause}: it needs a subfolder for each class, with images ({kinds})")
    if not splits["validation"]:
        raise DataError(f"{folder!r}: no image for validation: add some ({kinds}), or {remedy}")
