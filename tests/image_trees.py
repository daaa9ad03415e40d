"""Folders of image files for the tests of the importer, its command line, and what it stored."""

from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from conadv_tf.data import import_images

COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def picture(path: Path, colour, size=(20, 12), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def noise(path: Path, seed: int, size=(20, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)
    return path


def make_folder(folder: Path, count: int = 10) -> Path:
    """Noise of `count` JPEGs in each of three classes."""
    for label, name in enumerate(COLOURS):
        for number in range(count):
            noise(folder / name / f"{number}.jpg", 100 * label + number)
    return folder


def stored(folder: Path, split: str) -> dict[str, tf.train.Features]:
    """Features of every record of a split by file name; the files must be numbered without a gap."""
    paths = sorted(folder.glob(f"{split}-*"))
    assert [path.name for path in paths] == [f"{split}-{n:05d}-of-{len(paths):05d}" for n in range(len(paths))]
    found = {}
    for payload in tf.data.TFRecordDataset([str(path) for path in paths]).as_numpy_iterator():
        feature = tf.train.Example.FromString(payload).features.feature
        found[feature["image/filename"].bytes_list.value[0].decode()] = feature
    return found


def number(feature, name: str) -> int:
    return feature[name].int64_list.value[0]


def content(feature, name: str = "image/encoded") -> bytes:
    return feature[name].bytes_list.value[0]


def run(*arguments, code: int = 0, capsys=None) -> tuple[str, str]:
    assert import_images.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return out, err


def fails(capsys, code: int, *arguments) -> str:
    out, err = run(*arguments, code=code, capsys=capsys)
    assert not out
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert err.count("error: ") == 1
    return last
