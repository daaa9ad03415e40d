"""Folders as people have them: split folders of many names, links, hidden copies, files that are no images.

What is not stored is said: every file is in a record or in a count.
"""

import os
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import some_of
from image_trees import content, fails, make_folder, noise, picture, run, stored
from PIL import Image

from conadv_tf.data import image_records, import_images
from conadv_tf.errors import DataError


def names(folder: Path) -> set[str]:
    """Names of every stored image of both splits."""
    return {*stored(folder, "train"), *stored(folder, "validation")}


def decoded(feature) -> np.ndarray:
    return tf.io.decode_jpeg(content(feature)).numpy()


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("validation", ["val", "valid", "Validation", "VAL"])
def test_split_folders_are_known_by_many_names(tmp_path, capsys, train, validation):
    src, dst = tmp_path / "src", tmp_path / "dst"
    make_folder(src / train, 2)
    make_folder(src / validation, 1)
    out, _ = run(src, dst, capsys=capsys)
    assert (len(stored(dst, "train")), len(stored(dst, "validation"))) == (6, 3)
    assert (dst / "classes.txt").read_text() == "ant\nbee\ncat\n"
    assert f"{train}/ serves for training, {validation}/ for validation" in out


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_a_test_folder_beside_a_validation_folder_is_not_imported(tmp_path, capsys, validation):
    src, dst = tmp_path / "src", tmp_path / "dst"
    make_folder(src / "train", 3)
    make_folder(src / validation, 2)
    make_folder(src / "test", 1)
    noise(src / "test/unlabelled.jpg", 0)
    out, _ = run(src, dst, capsys=capsys)
    assert (len(stored(dst, "train")), len(stored(dst, "validation"))) == (9, 6)
    assert f"train/ serves for training, {validation}/ for validation; test/ is not imported: 4 images" in out


@pytest.mark.parametrize("test", ["test", "Testing"])
def test_a_test_folder_alone_serves_as_validation(tmp_path, capsys, test):
    src, dst = tmp_path / "src", tmp_path / "dst"
    make_folder(src / "train", 2)
    make_folder(src / test, 1)
    out, _ = run(src, dst, capsys=capsys)
    assert len(stored(dst, "validation")) == 3
    assert f"train/ serves for training, {test}/ for validation" in out


def test_other_folders_beside_splits_are_named(tmp_path, capsys):
    src = tmp_path / "src"
    for folder in ("train", "val", "extra"):
        make_folder(src / folder, 1)
    out, _ = run(src, tmp_path / "dst", capsys=capsys)
    assert "extra/ is not imported: 3 images" in out


@pytest.mark.parametrize(
    ("folders", "flags", "code", "words"),
    [
        (["train/ant", "train/bee"], ["--validation=0.5"], 1, "no folder for validation: name '{src}/train' itself"),
        (["Train/ant", "Train/bee", "car"], ["--validation=0.5"], 1, "'{src}/Train' itself with --validation=0.1"),
        (["train", "car", "plane"], ["--validation=0.5"], 1, "where 'train' is a class, rename it"),
        (["test", "ant", "bee"], ["--validation=0.5"], 1, "where 'test' is a class, rename it"),
        (["VALID", "ant", "bee"], ["--validation=0.5"], 1, "has VALID/ but no train/"),
        (["train/ant", "train/bee", "val/ant", "valid/ant"], [], 1, "val/ and valid/"),
        (["train/ant", "train/bee", "Train/ant", "val/ant"], [], 1, "Train/ and train/"),
        (["train/ant", "train/test", "val/ant"], [], 1, "'{src}/train/test' has the name of a split: rename it"),
        (["train/ant", "train/bee", "valid/ant"], ["--validation=0.5"], 2, "leave --validation out"),
        (["train/ant", "train/bee", "val"], [], 1, "its 2 images have no label"),
        (["train/ant", "train/bee", "test"], [], 1, "name '{src}/train' itself with --validation=0.1"),
        (["ant", "bee"], [], 2, "give --validation=0.1"),
    ],
)
def test_a_split_is_never_a_class(tmp_path, capsys, folders, flags, code, words):
    src = tmp_path / "src"
    for label, folder in enumerate(folders):
        for image in range(2):
            noise(src / folder / f"{image}.jpg", 10 * label + image)
    assert words.format(src=src) in fails(capsys, code, src, tmp_path / "dst", *flags)


@pytest.mark.parametrize("folder", ["val", "test"])
def test_the_advice_about_images_without_a_label_is_true(tmp_path, capsys, folder):
    src = tmp_path / "src"
    make_folder(src / "train", 4)
    noise(src / folder / "0.jpg", 0)
    place, flag = re.search(r"name '(.*)' itself with (\S+)", fails(capsys, 1, src, tmp_path / "dst")).groups()
    run(place, tmp_path / "dst", flag.replace("0.1", "0.25"), capsys=capsys)
    assert len(names(tmp_path / "dst")) == 12


def test_classes_with_the_name_of_a_split_are_told_by_both_splits(tmp_path, capsys):
    """CIFAR-100 has a class "train"."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    for seed, folder in enumerate(("train/train", "train/tram", "test/train", "test/tram")):
        noise(src / folder / "0.jpg", seed)
    run(src, dst, capsys=capsys)
    assert (dst / "classes.txt").read_text() == "train\ntram\n"


def test_hidden_copies_are_left_out(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 3), tmp_path / "dst"
    kept = {f"{path.relative_to(src)}" for path in src.rglob("*.jpg")}
    noise(src / "ant/.ipynb_checkpoints/0-checkpoint.jpg", 0)
    noise(src / "bee/deep/.thumbs/further/1.jpg", 0)
    noise(src / "bee/._0.jpg", 0)
    _, err = run(src, dst, "--validation=0.4", capsys=capsys)
    assert names(dst) == kept
    expected = "ant/.ipynb_checkpoints, bee/._0.jpg, bee/deep/.thumbs"
    assert f"left out: 3 hidden files and folders: {expected}\n" in err


def test_suffixes_and_files_without_one(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    kept = {f"{path.relative_to(src)}" for path in src.rglob("*.jpg")}
    for seed, name in enumerate(("a.jfif", "a.JPE", "n01440764_10026", "A.Jpg")):
        noise(src / "ant" / name, 1000 + seed)
    picture(src / "bee/b.tif", (9, 99, 199))
    picture(src / "bee/b.TIFF", (9, 199, 99), compression="tiff_lzw")
    picture(src / "bee/nameless", (199, 99, 9), format="PNG")
    run(src, dst, "--validation=0.4", capsys=capsys)
    further = {"ant/a.jfif", "ant/a.JPE", "ant/n01440764_10026", "ant/A.Jpg", "bee/b.tif", "bee/b.TIFF", "bee/nameless"}
    assert names(dst) == kept | further
    features = stored(dst, "train") | stored(dst, "validation")
    for name in ("ant/a.jfif", "ant/a.JPE", "ant/n01440764_10026"):
        assert content(features[name]) == (src / name).read_bytes()
    np.testing.assert_allclose(decoded(features["bee/b.tif"])[0, 0], (9, 99, 199), atol=3)
    np.testing.assert_allclose(decoded(features["bee/nameless"])[0, 0], (199, 99, 9), atol=3)


def test_files_that_are_no_images_are_counted_and_named(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    for name in ("ant/Thumbs.db", "ant/notes.txt", "bee/README", "bee/empty", "cat/labels.csv"):
        (src / name).write_bytes(b"" if name == "bee/empty" else b"no image")
    os.mkfifo(src / "cat/pipe.jpg")
    (src / "labels.csv").write_text("0,ant")
    noise(src / "stray.jpg", 0)
    out, err = run(src, dst, "--validation=0.5", capsys=capsys)
    assert len(names(dst)) == 6
    assert re.search(r"left out: 6 files that are no images .*: ant/Thumbs.db, ant/notes.txt, bee/README, …\n", err)
    assert "left out: 2 files outside the folders of classes: labels.csv, stray.jpg\n" in err
    assert "0 broken images and 8 other files or folders left out" in out


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "RGB and a transparent colour"])
def test_transparency_shows_white(tmp_path, capsys, kind):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    pixels = np.zeros((16, 32, 4), np.uint8)  # the left half is hidden black, the right half opaque grey
    pixels[:, 16:] = (100, 100, 100, 255)
    image, options = Image.fromarray(pixels), {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind == "palette":
        image = image.convert("RGB").quantize(2)
        options["transparency"] = image.getpixel((0, 0))
    elif kind.startswith("RGB "):
        image, options = image.convert("RGB"), {"transparency": (0, 0, 0)}
    image.save(src / "ant/hidden.png", **options)
    Image.fromarray(np.full((16, 32, 4), 255, np.uint8)).save(src / "ant/opaque.png")
    _, said = run(src, dst, "--validation=0.4", capsys=capsys)
    assert f"1 images with transparent parts have white ones in the records, such as {src}/ant/hidden.png" in said
    found = decoded((stored(dst, "train") | stored(dst, "validation"))["ant/hidden.png"])
    np.testing.assert_allclose(found[:, :14], 255, atol=4)
    np.testing.assert_allclose(found[:, 18:], 100, atol=4)


@pytest.mark.parametrize("parted", [False, True])
def test_one_name_in_two_spellings_is_refused(tmp_path, capsys, parted):
    composed, separate = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    folders = [composed, separate, "tea"]
    if parted:
        folders = [f"train/{composed}", "train/tea", f"val/{separate}", "val/tea"]
    for seed, folder in enumerate(folders):
        for image in range(2):
            noise(tmp_path / "src" / folder / f"{image}.jpg", 10 * seed + image)
    message = fails(capsys, 1, tmp_path / "src", tmp_path / "dst", *([] if parted else ["--validation=0.5"]))
    assert r"'cafe\u0301' and 'caf\xe9' are one name in two spellings" in message


def test_links_are_followed_and_circles_are_not(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    kept = {f"{path.relative_to(src)}" for path in src.rglob("*.jpg")}
    noise(tmp_path / "elsewhere/far.jpg", 77)
    noise(tmp_path / "dogs/dog.jpg", 78)
    noise(tmp_path / "dogs/other.jpg", 79)
    (src / "dog").symlink_to(tmp_path / "dogs")
    (src / "ant/link").symlink_to(tmp_path / "elsewhere")
    (src / "ant/link2").symlink_to(tmp_path / "elsewhere")
    (src / "bee/up").symlink_to(src / "bee")
    (src / "bee/top").symlink_to(src)
    (tmp_path / "dogs/all").symlink_to(src)
    (src / "cat/one").symlink_to(src / "cat/two")
    (src / "cat/two").symlink_to(src / "cat/one")
    out, err = run(src, dst, "--validation=0.4", capsys=capsys)
    assert names(dst) == kept | {"ant/link/far.jpg", "dog/dog.jpg", "dog/other.jpg"}
    assert re.search(r"left out: 4 linked folders .*: ant/link2, bee/top, bee/up, …\n", err)
    assert err.count("cat/one: ") == err.count("cat/two: ") == 1
    assert "2 broken images" in out


def test_duplicates_over_the_splits_are_reported(tmp_path, capsys):
    src = tmp_path / "src"
    make_folder(src / "train", 3)
    for label, name in enumerate(("ant", "bee", "cat")):
        noise(src / "val" / name / "new.jpg", 900 + label)
    for name in ("ant/1.jpg", "bee/2.jpg"):
        (src / "val" / name).write_bytes((src / "train" / name).read_bytes())
    _, err = run(src, tmp_path / "dst", capsys=capsys)
    line = "2 validation images are training images too, byte for byte, such as "
    [(first, second)] = re.findall(rf"{line}(\S+) = (\S+)\n", err)
    assert Path(first).read_bytes() == Path(second).read_bytes()
    assert {Path(first).relative_to(src).parts[0], Path(second).relative_to(src).parts[0]} == {"train", "val"}


def test_a_folder_that_cannot_be_read_ends_the_import(tmp_path, capsys, monkeypatch):
    src, scandir = make_folder(tmp_path / "src", 2), os.scandir

    def closed(place):
        if str(place).endswith("/bee"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"'{src}/bee' cannot be read: Permission denied" in fails(
        capsys, 1, src, tmp_path / "dst", "--validation=0.5"
    )


def grow(folder: Path, draw: random.Random, contents: list[bytes], depth: int = 0) -> None:
    """Fills a folder with images, other files, broken files, links and folders of them."""
    folder.mkdir(parents=True, exist_ok=True)
    stems = ("a", "b", "é", "with space", ".hidden", "c.d", "new\nline", "\udcff", "-x")
    suffixes = (".jpg", ".JPG", ".jfif", ".jpe", ".png", ".tif", ".gif", "", "", ".txt", ".csv", ".db", ".", ".jpg~")
    for _ in range(draw.randrange(5)):
        path = folder / f"{draw.choice(stems)}{draw.choice(suffixes)}"
        if os.path.lexists(path):
            continue
        kind = draw.randrange(10)
        if kind == 0:
            path.symlink_to(draw.choice([folder, folder.parent, folder / "missing", path, folder.parent.parent]))
        elif kind == 1 and depth < 3:
            grow(path, draw, contents, depth + 1)
        else:
            path.write_bytes(draw.choice(contents))


def said(path: str, left_out: set[str]) -> bool:
    """True where the path or a folder above it is in a count."""
    return any(str(place) in left_out for place in (Path(path), *Path(path).parents))


@pytest.mark.parametrize("seeds", some_of([range(100), range(100, 2000)], range(100)))
def test_every_file_is_in_a_record_or_in_a_count(tmp_path, monkeypatch, seeds):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # half of the time of imports so small
    good = noise(tmp_path / "good.jpg", 5, (6, 4)).read_bytes()
    picture(tmp_path / "good.png", (0, 0, 0, 0), (5, 4), "RGBA")
    picture(tmp_path / "good.tif", (1, 2, 3), (5, 4))
    contents = [good, *((tmp_path / f"good.{kind}").read_bytes() for kind in ("png", "tif"))]
    contents += [good[:-40], good[:9], b"", b"no image", b"\x00" * 50]
    refused: list[str] = []
    for seed in seeds:
        draw, src, dst = random.Random(seed), tmp_path / f"src{seed}", tmp_path / f"dst{seed}"
        parted = draw.random() < 0.3
        for top in [src / "Train", src / "valid"] if parted else [src]:
            for name in ("ant", "bee"):
                grow(top / name, draw, contents)
                noise(top / name / "sure1.jpg", draw.randrange(99))
                noise(top / name / "sure2.jpg", draw.randrange(99))
            grow(top, draw, contents, 3)
        validation = None if parted else 0.4
        try:
            _, report = import_images.import_images(str(src), str(dst), validation=validation, max_bad_images=99)
        except DataError as error:
            refused.append(str(error))
        else:
            check_all_is_said(src, dst, report, seed)
    assert [
        line for line in refused if not re.search("has no training image|is a class that .* lacks|no good image", line)
    ] == []
    assert len(refused) < len(seeds) / 2


def check_all_is_said(src: Path, dst: Path, report: image_records.Report, seed: int) -> None:
    names_of = [
        os.path.relpath(path, src)
        for split in ("train", "validation")
        for path in (
            os.path.join(src / ("" if not (src / "Train").is_dir() else folder), name)
            for folder in ["Train" if split == "train" else "valid"]
            for name in raw_names(dst, split)
        )
    ]
    assert len(names_of) == len(set(names_of)) == sum(map(len, report.sizes.values()))
    left = [os.path.relpath(path, src) for path in report.bad]
    left += [path for paths in report.left_out.values() for path in paths]
    assert len(left) == len(set(left)), seed
    assert not set(left) & set(names_of), seed
    files = {os.path.relpath(os.path.join(place, name), src) for place, _, files in os.walk(src) for name in files}
    assert {path for path in files if path not in names_of and not said(path, set(left))} == set(), seed
    assert all(os.path.lexists(src / path) for path in left), seed


def raw_names(folder: Path, split: str) -> list[str]:
    paths = sorted(str(path) for path in folder.glob(f"{split}-*"))
    payloads = tf.data.TFRecordDataset(paths).as_numpy_iterator()
    features = (tf.train.Example.FromString(payload).features.feature for payload in payloads)
    return [os.fsdecode(content(feature, "image/filename")) for feature in features]
