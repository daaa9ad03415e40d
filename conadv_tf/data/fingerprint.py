"""The fingerprint of a data set: what tells it from another one, wherever it lies.

A file is known by its name below its folder, its size, where its records lie, and its first block, which has the labels
of the records in it; arrays in memory by all labels and some images. Files are thus read at one place each.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os

import numpy as np

from conadv_tf import paths
from conadv_tf.errors import DataError, file_errors

BLOCK_BYTES = 1 << 18  # two photos of ImageNet, so that one whole record is in it
_IMAGES = 256  # of a split in memory


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The identity of a data set.

    Attributes:
      place: the folder of the files, local ones absolute, or the name of data without files; it tells nothing apart.
      parts: a checksum for each part, by its name: a file or array of a split.
    """

    place: str
    parts: dict[str, str]

    def difference(self, other: "Fingerprint") -> str | None:
        """The name of the first part that the other one lacks, has alone or has otherwise; None if they are equal."""
        names = sorted(self.parts.keys() | other.parts.keys())
        return next((name for name in names if self.parts.get(name) != other.parts.get(name)), None)

    def to_text(self) -> str:
        """The text that `from_text` reads."""
        return json.dumps(dataclasses.asdict(self), indent=0) + "\n"

    @classmethod
    def from_text(cls, text: str) -> "Fingerprint":
        """Reads the text that `to_text` makes.

        Raises:
          ValueError: if the text is no fingerprint.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("parts"), dict):
            raise ValueError("no checksums of parts")
        return cls(str(found.get("place")), found["parts"])


@dataclasses.dataclass(frozen=True)
class Files:
    """The files that a data set is read from.

    Attributes:
      folder: local or gs://.
      splits: by split, paths in the order of reading; for each what is known of the file beside its bytes.
    """

    folder: str
    splits: dict[str, dict[str, str]]

    def fingerprint(self) -> Fingerprint:
        """Reads a block of each file.

        Raises:
          DataError: if a file cannot be read.
        """
        known = {
            (f"{split}: {self._name(path)}", path): more
            for split, files in self.splits.items()
            for path, more in files.items()
        }
        try:
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                sums = list(pool.map(lambda key: _of_file(key[1], known[key]), known))
        except file_errors() as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"cannot read the data: {reason}: check the file and its permissions") from error
        return Fingerprint(paths.absolute(self.folder), dict(zip((name for name, _ in known), sums, strict=True)))

    def _name(self, path: str) -> str:
        folder = os.path.join(self.folder, "")
        return path.removeprefix(folder) if path.startswith(folder) else os.path.basename(path)


def _of_file(path: str, known: str) -> str:
    with paths.opened(path) as file:
        block = file.read(BLOCK_BYTES)
        file.seek(0, os.SEEK_END)
        size = file.tell()
    return checksum(block, f"{size} {known}".encode())


def of_images(split: str, images: np.ndarray) -> dict[str, str]:
    """The checksum of every so many of the images uint8 [n, H, W, C] of a split."""
    some = images[:: max(1, len(images) // _IMAGES)]
    return {f"{split}: images": checksum(str(images.shape).encode(), some.tobytes())}


def of_labels(split: str, labels: np.ndarray) -> dict[str, str]:
    """The checksum of all labels int32 [n] of a split."""
    return {f"{split}: labels": checksum(labels.tobytes())}


def checksum(*contents: bytes) -> str:
    """A checksum over contents one after the other, 16 hexadecimal digits."""
    hashed = hashlib.sha256()  # the fastest where processors have instructions for it
    for content in contents:
        hashed.update(content)
    return hashed.hexdigest()[:16]
