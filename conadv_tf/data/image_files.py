"""The image files below a folder, and what else lies there: it is left out, and listed by the reason."""

import os

from PIL import Image, UnidentifiedImageError

from conadv_tf.errors import DataError

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
NO_IMAGE = f"files that are no images ({' '.join(SUFFIXES)}, or such content without a suffix)"
HIDDEN = "hidden files and folders"
OUTSIDE = "files outside the folders of classes"
READ_ALREADY = "linked folders that lead to one read already"
UNLISTED = "images that the list of labels does not name"
MISSING = "names in the list of labels that no image has"

LeftOut = dict[str, list[str]]
"""Paths that are not taken, by the reason: one of those above."""

_NAMED = 3  # of the files left out for one reason


def shown(path: str) -> str:
    """A path on one line, whatever its name."""
    return path if path.isprintable() else ascii(path)


def left_out_lines(left_out: LeftOut) -> list[str]:
    """A line for each reason, with the first paths."""
    lines = []
    for reason, paths in left_out.items():
        some = ", ".join([shown(path) for path in paths[:_NAMED]] + ["…"] * (len(paths) > _NAMED))
        lines.append(f"left out: {len(paths):,} {reason}: {some}")
    return lines


def entries(folder: str, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Lists the subfolders and the other files of a folder, links to such too.

    Args:
      folder: the folder.
      left_out: takes the hidden ones, and what is neither folder nor file, such as a pipe.

    Returns:
      (paths of the subfolders, paths of the files), sorted.

    Raises:
      DataError: the folder cannot be read.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder!r} cannot be read: {error.strerror}: open its permissions, or move it away"
        ) from error
    folders, files = [], []
    for entry in found:
        link = entry.is_symlink()
        if entry.name.startswith("."):
            left_out[HIDDEN].append(entry.path)
        elif os.path.isdir(entry.path) if link else entry.is_dir():
            folders.append(entry.path)
        elif os.path.exists(entry.path) and not os.path.isfile(entry.path) if link else not entry.is_file():
            left_out[NO_IMAGE].append(entry.path)
        else:
            files.append(entry.path)
    return folders, files


def _is_image(path: str) -> bool:
    """Tells images by their suffix, and by their bytes where they have none."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in ("", "."):
        return suffix in SUFFIXES
    try:
        with Image.open(path):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # an image, perhaps: the import will name its fault
        return True


def _leads_back(place: str, top: str) -> bool:
    """True for a linked folder that contains the link itself, or `top`."""
    real = os.path.realpath(place)
    inner = (os.path.realpath(os.path.dirname(place)), os.path.realpath(top))
    return os.path.islink(place) and any(os.path.commonpath([real, path]) == real for path in inner)


def image_files(folder: str, left_out: LeftOut) -> list[str]:
    """Lists the images anywhere below a folder. Links are followed, but no folder is read twice.

    Args:
      folder: the folder of a class, or another one.
      left_out: takes everything else.

    Returns:
      paths, sorted.
    """
    found: list[str] = []
    read: set[str] = set()
    waiting, links = [folder], list[str]()
    while waiting or links:
        place = waiting.pop() if waiting else links.pop(0)  # links last: a folder is known by its own name
        real = os.path.realpath(place)
        if real in read or _leads_back(place, os.path.dirname(folder)):
            left_out[READ_ALREADY].append(place)
            continue
        read.add(real)
        folders, files = entries(place, left_out)
        for path in folders:
            (links if os.path.islink(path) else waiting).append(path)
        for path in files:
            if _is_image(path):
                found.append(path)
            else:
                left_out[NO_IMAGE].append(path)
    return sorted(found)
