"""Lists that say of which class an image is, where folders do not: a CSV, and those of Tiny-ImageNet and ImageNet."""

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from conadv_tf.errors import DataError

_ROLES = {  # names of splits, in any case
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# What the columns of a CSV may be called, in any case.
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "image_id", "id")
_LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name")
_SPLIT_COLUMNS = ("split", "set", "subset")
_SYNSETS_FILES = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt")
_TRUTH_FILE, _KIT_FILE = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_DEVELOPMENT_KIT = "ILSVRC2012_devkit"  # how its folder's name begins

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a CSV: the class, and the role of the split, "" where there is no such column."""

    label: str
    split: str


def role(name: str) -> str | None:
    """The split that a name in any case stands for, "train", "validation" or "test"; None for other names."""
    return next((role for role, names in _ROLES.items() if name.lower() in names), None)


def match(paths: Sequence[str], folder: str, listed: Mapping[str, T], source: str) -> tuple[dict[str, T], list[str]]:
    """Looks images up in a list.

    Args:
      paths: image files.
      folder: the folder that the names in the list start from; "" where they are names of files without a folder.
      listed: what the list says, by the name of an image with or without its suffix.
      source: the path of the list, for errors.

    Returns:
      (what the list says of the images that it names, the names in the list that no image has).

    Raises:
      DataError: if one name is that of two images.
    """
    found, holders = dict[str, T](), dict[str, str]()
    for path in paths:
        name = os.path.relpath(path, folder) if folder else os.path.basename(path)
        name = name if name in listed else os.path.splitext(name)[0]
        if name in listed:
            if name in holders:
                raise DataError(f"{source!r}: {name!r} is {holders[name]!r} and {path!r}: remove or rename one of them")
            found[path], holders[name] = listed[name], path
    return found, [name for name in listed if name not in holders]


def read_csv(path: str, src: str) -> dict[str, Row]:
    """Reads a CSV of images: path, label and perhaps split, parted by commas, semicolons or tabs.

    Args:
      path: the file. A first row with known names of columns is a header; without one the order is as above.
      src: the folder that relative paths start from.

    Returns:
      rows by the path of the image, relative to src; without those that have no label.

    Raises:
      DataError: a file that is no CSV of images, an unknown split, or an image of two classes.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path!r} is empty: write a row for each image, its path and its label")
    columns = _columns(first[1])
    found: dict[str, Row] = {}
    for number, cells in rows if columns else [first, *rows]:
        name, row = _row(cells, columns or range(len(first[1])), f"{path!r}, line {number}")
        name = os.path.relpath(os.path.join(src, name), src)
        if row.label and found.setdefault(name, row) != row:
            raise DataError(f"{path!r}, line {number}: {name!r} is of {found[name].label!r} too: keep one of the rows")
    return found


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not empty, with their line numbers."""
    lines = _lines(path)
    delimiter = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter)
    try:
        for cells in reader:
            if any(cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise DataError(f"{path!r}, line {reader.line_num}: {error}: mend or remove the row") from error


def _columns(header: Sequence[str]) -> list[int] | None:
    """The places of path, label and, where there is one, split, by the names in a header; None where it is none."""
    names = [name.lower() for name in header]
    kinds = (_PATH_COLUMNS, _LABEL_COLUMNS, _SPLIT_COLUMNS)
    places = [next((names.index(name) for name in kind if name in names), None) for kind in kinds]
    return [place for place in places if place is not None] if None not in places[:2] else None


def _row(cells: Sequence[str], columns: Sequence[int], place: str) -> tuple[str, Row]:
    if len(columns) < 2 or max(columns) >= len(cells) or not cells[columns[0]]:
        raise DataError(f"{place}: {','.join(cells)!r} is not a path and a label: mend or remove the row")
    name, label, *rest = (cells[column] for column in columns)
    split = role(rest[0]) if rest else ""
    if split is None:
        known = ", ".join(name for names in _ROLES.values() for name in names)
        raise DataError(f"{place}: {rest[0]!r} is no split ({known}): mend it, or give the columns a header")
    return name, Row(label, split)


def beside(folder: str, src: str) -> tuple[str, dict[str, str]] | None:
    """Finds the list of a folder of images without class folders.

    Args:
      folder: the folder.
      src: the folder above it, which may have the list, or ImageNet's development kit.

    Returns:
      (path of the list, class by the name of the image, with or without its suffix); None where there is no list.

    Raises:
      DataError: a list that cannot be read, or numbers whose meaning is not there.
    """
    kits = [name for name in sorted(os.listdir(src)) if name.startswith(_DEVELOPMENT_KIT)]
    places = [folder, src, *(os.path.join(src, kit, "data") for kit in kits)]
    for name, read in _READERS.items():
        for place in places:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                return path, read(path, places)
    return None


def _annotations(path: str, _: Sequence[str]) -> dict[str, str]:
    """Tiny-ImageNet's list: in each line file, synset and box, parted by tabs."""
    rows = [(number, line.split("\t")) for number, line in enumerate(_lines(path), 1) if line]
    for number, cells in rows:
        if len(cells) < 2:
            raise DataError(
                f"{path!r}, line {number}: {cells[0]!r} is not a file and a class, parted by a tab: mend it"
            )
    return {cells[0]: cells[1] for _, cells in rows}


def _solution(path: str, _: Sequence[str]) -> dict[str, str]:
    """Kaggle's list of ImageNet: in each line the name of an image, and synset and box, perhaps of several objects."""
    rows = [(number, cells) for number, cells in _rows(path) if cells[0] != "ImageId"]
    for number, cells in rows:
        if len(cells) != 2 or not cells[1]:
            raise DataError(f"{path!r}, line {number}: {','.join(cells)!r} is not ImageId,PredictionString: mend it")
    return {cells[0]: cells[1].split()[0] for _, cells in rows}


def _synsets(path: str, _: Sequence[str]) -> dict[str, str]:
    """The list of TensorFlow's scripts: in line n the synset of ImageNet's validation image n."""
    return {_imagenet_name(number): line.strip() for number, line in enumerate(_lines(path), 1)}


def _ground_truth(path: str, places: Sequence[str]) -> dict[str, str]:
    """The list of ImageNet's development kit: in line n the class of validation image n, in the kit's own numbers."""
    kit = next(filter(os.path.isfile, (os.path.join(place, _KIT_FILE) for place in places)), None)
    if kit is None:
        raise DataError(
            f"{path!r} has the development kit's own numbers, which are not the order of the synsets: put the kit's "
            f"{_KIT_FILE} beside it, or {_SYNSETS_FILES[0]} in its place"
        )
    synsets, found = _kit_synsets(kit), dict[str, str]()
    for number, line in enumerate(_lines(path), 1):
        if line.strip() not in synsets:
            raise DataError(f"{path!r}, line {number}: {line!r} is no number of a class in {kit!r}: fetch both again")
        found[_imagenet_name(number)] = synsets[line.strip()]
    return found


def _kit_synsets(path: str) -> dict[str, str]:
    """The synsets of ImageNet's development kit by its numbers, from 1."""
    from scipy import io  # a part of a second, and nothing else needs it

    try:
        table = io.loadmat(path, squeeze_me=True)["synsets"]
        return {str(number): str(synset) for number, synset in zip(table["ILSVRC2012_ID"], table["WNID"], strict=True)}
    except Exception as error:  # scipy raises what it stumbles over
        raise DataError(f"{path!r} is not the table of ImageNet's development kit ({error}): fetch it again") from error


def _imagenet_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def _lines(path: str) -> list[str]:
    """The lines of a text, without empty ones at its end. Bytes that are not UTF-8 stay, as in names of files."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read().rstrip()
    except OSError as error:
        raise DataError(f"{path!r} cannot be read: {error.strerror}: name a file that can") from error
    if "\0" in text:
        raise DataError(f"{path!r} is no text in UTF-8: save it as such")
    return text.split("\n") if text else []


_READERS: dict[str, Callable[[str, Sequence[str]], dict[str, str]]] = {
    "val_annotations.txt": _annotations,
    "LOC_val_solution.csv": _solution,
    **dict.fromkeys(_SYNSETS_FILES, _synsets),
    _TRUTH_FILE: _ground_truth,
}
