"""A folder of images: its classes, its images, its splits. Subfolders or a list say which image is of which class."""

import collections
import dataclasses
import os
import random
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TypeVar

from conadv_tf.data import image_labels
from conadv_tf.data.image_files import (
    MISSING,
    NO_IMAGE,
    OUTSIDE,
    SUFFIXES,
    UNLISTED,
    LeftOut,
    entries,
    image_files,
)
from conadv_tf.data.image_labels import role
from conadv_tf.errors import ConfigError, DataError

T = TypeVar("T")

_SEED = 0
_KINDS = ", ".join(SUFFIXES)
_FOLDER_OF_IMAGES = "images"  # a folder with this name, in any case, may lie between a split and its classes


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


def _split_folders(src: str, names: Sequence[str]) -> dict[str, str]:
    """The folders of src that are splits, by role: none, or "train" and at least one of "validation" and "test"."""
    found: dict[str, str] = {}
    for name in names:
        split = role(name)
        if split in found:
            raise DataError(f"SRC={src!r} has {found[split]}/ and {name}/ for one split: rename or remove one of them")
        if split:
            found[split] = name
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


def _class_folder(folder: str, known: Sequence[str] = ()) -> str | None:
    """The folder whose subfolders are classes: `folder`, or images/ where that is alone in it and no class of `known`.

    Returns:
      its path; None where it has no subfolder.
    """
    folders, _ = entries(folder, collections.defaultdict(list))
    name = os.path.basename(folders[0]) if len(folders) == 1 else ""
    if name.lower() != _FOLDER_OF_IMAGES or name in known:
        return folder if folders else None
    return folders[0] if entries(folders[0], collections.defaultdict(list))[0] else None


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
    classes: dict[int, list[Source]] = collections.defaultdict(list)
    for image in images:
        classes[image.label].append(image)
    for label, of_class in sorted(classes.items()):
        random.Random(f"{_SEED} {label}").shuffle(of_class)
        taken = min(round(fraction * len(of_class)), len(of_class) - 1)
        splits["validation"] += of_class[:taken]
        splits["train"] += of_class[taken:]
    return splits


def find(src: str, validation: float | None, labels: str | None = None) -> Found:
    """Finds the classes and the images of both splits.

    Args:
      src: folder with a subfolder for each class, or with train/ and val/ that have them. train/ may be called
        training/, val/ valid/ or validation/, in any case; test/ or testing/ serves where there is no val/. The
        subfolders may lie in images/. Where val/ has none, a list says its classes, see `image_labels.beside`.
      validation: the share of each class to set aside, in (0, 1), where src has no train/ and val/.
      labels: a CSV that says the classes of all images, see `image_labels.read_csv`; folders then say nothing.

    Returns:
      what was found.

    Raises:
      ConfigError: `validation` is missing, out of range, or given where src or the CSV has the splits.
      DataError: src is no folder, a split lacks its counterpart, a class or split is empty, unknown or ambiguous, or
        a list is none.
    """
    if not os.path.isdir(src):
        raise DataError(f"SRC={src!r} is no folder: name the one that has a subfolder of images for each class")
    left_out: LeftOut = collections.defaultdict(list)
    classes, splits, layout = (
        _by_csv(src, labels, validation, left_out) if labels else _by_folders(src, validation, left_out)
    )
    for images in splits.values():
        random.Random(_SEED).shuffle(images)
    relative = {reason: sorted(os.path.relpath(path, src) for path in paths) for reason, paths in left_out.items()}
    return Found(classes, splits, layout, {reason: paths for reason, paths in relative.items() if paths})


_Parts = tuple[list[str], dict[str, list[Source]], str]
"""Classes, images of each split, and the line on the layout."""


def _by_folders(src: str, validation: float | None, left_out: LeftOut) -> _Parts:
    """Finds everything where folders say the classes."""
    top = _class_folder(src) or src
    if top != src:
        _classes(src, left_out)  # for what lies beside images/
    names = _classes(top, left_out)
    folders = _split_folders(top, names)
    _check_share(top, validation, folders)
    if validation is not None:
        _check_spelling(names)
        splits = _split(_images(top, names, left_out), validation)
        _check_complete(top, names, splits, "raise --validation")
        return names, splits, ""
    train, other = (os.path.join(top, name) for name in (folders["train"], _evaluated(folders)))
    classes, splits, source = _given_splits(train, other, left_out)
    _check_complete(train, classes, splits, f"name {train!r} itself with --validation=0.1")
    return classes, splits, _layout(top, folders, names, source)


def _by_csv(src: str, labels: str, validation: float | None, left_out: LeftOut) -> _Parts:
    """Finds everything where a CSV says the classes, and perhaps the splits."""
    listed = image_labels.read_csv(labels, src)
    given = {row.split for row in listed.values()} - {""}
    _check_share_of_csv(labels, validation, given)
    rows = _matched(src, src, listed, labels, left_out)
    roles = {"": "", "train": "train", "validation" if "validation" in given else "test": "validation"}
    used = {path: row for path, row in rows.items() if row.split in roles}
    classes = sorted({row.label for row in used.values()})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    _check_spelling(classes)
    numbers = {name: label for label, name in enumerate(classes)}
    images = {path: Source(path, os.path.relpath(path, src), numbers[row.label]) for path, row in used.items()}
    if given:
        splits = {
            split: [images[path] for path, row in used.items() if roles[row.split] == split]
            for split in ("train", "validation")
        }
    else:
        splits = _split(list(images.values()), validation or 0)
    _check_complete(labels, classes, splits, "raise --validation", "rows of at least two classes with images in SRC")
    layout = f"{labels} says the classes{' and the splits' if given else ''}"
    unused = len(rows) - len(used)
    return classes, splits, layout + (f"; test is not imported: {unused:,} images" if unused else "")


def _matched(src: str, folder: str, listed: Mapping[str, T], labels: str, left_out: LeftOut) -> dict[str, T]:
    """What a list says of the images of SRC, by their paths; images and names that have no counterpart are left out.

    Args:
      src: the folder of the images.
      folder: the folder that the names start from; "" where they are names of files without a folder.
      listed: what the list says, by names.
      labels: the path of the list, which is no file to leave out.
      left_out: takes what does not match.
    """
    paths, itself = image_files(src, left_out), os.path.realpath(labels)
    left_out[NO_IMAGE] = [path for path in left_out[NO_IMAGE] if os.path.realpath(path) != itself]
    found, missing = image_labels.match(paths, folder, listed, labels)
    left_out[UNLISTED] += [path for path in paths if path not in found]
    left_out[MISSING] += [os.path.join(src, name) for name in missing]
    return found


def _evaluated(folders: dict[str, str]) -> str:
    """The split folder that serves for validation."""
    return folders["validation"] if "validation" in folders else folders["test"]


def _layout(src: str, folders: dict[str, str], names: Sequence[str], labels: str) -> str:
    used = (folders["train"], _evaluated(folders))
    by = f" with the classes of {os.path.relpath(labels, src)}" if labels else ""
    parts = [f"{used[0]}/ serves for training, {used[1]}/ for validation{by}"]
    for name in names:
        if name not in used:
            count = len(image_files(os.path.join(src, name), collections.defaultdict(list)))
            parts.append(f"{name}/ is not imported: {count:,} images")
    return "; ".join(parts)


def _given_splits(train: str, other: str, left_out: LeftOut) -> tuple[list[str], dict[str, list[Source]], str]:
    """Finds (classes, images of both splits, path of a list of classes or "") where each split has a folder."""
    top, labels = _class_folder(train) or train, ""
    classes = _below(train, top, left_out)
    inner = _class_folder(other, classes)
    if inner:
        evaluated = _below(other, inner, left_out)
    else:
        labels, listed = _listed(train, other, left_out)
        evaluated = sorted(set(listed.values()))
    _check_spelling(sorted({*classes, *evaluated}))
    unknown = sorted(set(evaluated) - set(classes))
    if unknown:
        place = f"{labels}: " if labels else os.path.join(str(inner), "")
        raise DataError(f"{place}{unknown[0]} is a class that {top} lacks: remove it, or add it there")
    doubtful = [name for name in classes if role(name) and name not in evaluated]
    if doubtful:
        raise DataError(f"{os.path.join(top, doubtful[0])!r} has the name of a split: rename it where it is a class")
    if inner:
        validation = _images(inner, classes, left_out)
    else:
        numbers = {name: label for label, name in enumerate(classes)}
        validation = [Source(path, os.path.relpath(path, other), numbers[name]) for path, name in listed.items()]
    return classes, {"train": _images(top, classes, left_out), "validation": validation}, labels


def _below(folder: str, top: str, left_out: LeftOut) -> list[str]:
    """The classes in `top`, which is `folder` or images/ in it; files beside folders are left out."""
    if top != folder:
        _classes(folder, left_out)
    return _classes(top, left_out)


def _listed(train: str, other: str, left_out: LeftOut) -> tuple[str, dict[str, str]]:
    """Finds (path of the list, class by the path of the image) of a folder without class folders."""
    found = image_labels.beside(other, os.path.dirname(other))
    if not found:
        count = len(image_files(other, collections.defaultdict(list)))
        raise DataError(
            f"{other!r} has no subfolder of a class, so its {count:,} images have no label: sort them into such, "
            f"put a list beside them (docs/data.md), or name {train!r} itself with --validation=0.1"
        )
    labels, listed = found
    return labels, _matched(other, "", listed, labels, left_out)


def _check_share(src: str, validation: float | None, folders: dict[str, str]) -> None:
    if folders and validation is not None:
        raise ConfigError(
            f"--validation={validation}, but {src!r} has {folders['train']}/ and {_evaluated(folders)}/: leave "
            "--validation out, or where these are classes, rename them"
        )
    if not folders and validation is None:
        raise ConfigError(f"{src!r} has no train/ and val/: give --validation=0.1, the share of images to set aside")
    _check_range(validation)


def _check_share_of_csv(labels: str, validation: float | None, given: set[str]) -> None:
    if given and validation is not None:
        raise ConfigError(f"--validation={validation}, but {labels!r} has a column of splits: drop one of them")
    if not given and validation is None:
        raise ConfigError(
            f"{labels!r} has no column of splits: give --validation=0.1, the share of images to set aside"
        )
    _check_range(validation)


def _check_range(validation: float | None) -> None:
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


def _check_complete(
    place: str,
    classes: Sequence[str],
    splits: dict[str, list[Source]],
    remedy: str,
    needed: str = f"a subfolder for each class, with images ({_KINDS})",
) -> None:
    counts = [0] * len(classes)
    for image in splits["train"]:
        counts[image.label] += 1
    if len(classes) < 2 or 0 in counts:
        cause = (
            f"class {classes[counts.index(0)]!r} has no training image" if 0 in counts else f"{len(classes)} classes"
        )
        raise DataError(f"{place!r}: {cause}: it needs {needed}")
    if not splits["validation"]:
        raise DataError(f"{place!r}: no image for validation: add some ({_KINDS}), or {remedy}")
