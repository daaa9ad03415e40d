"""Folders of real image files, imported and read back by the pipeline that trains on them."""

import concurrent.futures
import errno
import io
import itertools
import os
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import train
from image_trees import COLOURS, content, fails, make_folder, noise, number, picture, run, stored
from PIL import Image, PngImagePlugin

from conadv_tf import data, terminal
from conadv_tf.data import image_encoding


def test_good_jpegs_are_copied_and_split(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src"), tmp_path / "dst"
    run(src, dst, "--validation=0.2", "--shards=4", capsys=capsys)
    train, validation = stored(dst, "train"), stored(dst, "validation")
    assert (len(list(dst.glob("train-*"))), len(list(dst.glob("validation-*")))) == (4, 1)
    assert (dst / "classes.txt").read_text() == "ant\nbee\ncat\n"
    assert len(train) == 24
    assert len(validation) == 6
    assert set(train) | set(validation) == {f"{name}/{n}.jpg" for name in COLOURS for n in range(10)}
    for name, feature in (train | validation).items():
        assert content(feature) == (src / name).read_bytes()
        assert content(feature, "image/class/text").decode() == name.split("/")[0]
        assert number(feature, "image/class/label") == list(COLOURS).index(name.split("/")[0])
        assert (number(feature, "image/height"), number(feature, "image/width")) == (12, 20)
        assert (content(feature, "image/format"), content(feature, "image/colorspace")) == (b"JPEG", b"RGB")
    labels = [number(feature, "image/class/label") for feature in train.values()]
    assert labels != sorted(labels)
    counts = np.bincount([number(feature, "image/class/label") for feature in validation.values()])
    np.testing.assert_array_equal(counts, [2, 2, 2])


def test_an_import_is_repeated_byte_for_byte(tmp_path, capsys):
    src = make_folder(tmp_path / "src", 4)
    for name, workers in (("one", 1), ("two", 7)):
        run(src, tmp_path / name / "dst", "--validation=0.5", "--shards=2", f"--workers={workers}", capsys=capsys)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "dst").iterdir()} for name in ("one", "two")]
    assert len(files[0]) == 6
    assert files[0] == files[1]
    paths = sorted(str(path) for path in (tmp_path / "one/dst").glob("*-of-*"))
    for payload in tf.data.TFRecordDataset(paths).as_numpy_iterator():  # else each process has an order of its own
        assert payload == tf.train.Example.FromString(payload).SerializeToString(deterministic=True)


@pytest.mark.parametrize("parted", [True, False])
def test_files_hold_a_mixture_of_all_classes(tmp_path, capsys, parted):
    """Not one class after the other, of which a stream would make batches of few classes."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    for folder in (src / "train", src / "val") if parted else (src,):
        make_folder(folder, 10)
    run(src, dst, "--shards=2", *([] if parted else ["--validation=0.4"]), capsys=capsys)
    for path in dst.glob("*-of-*"):
        payloads = tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
        labels = [
            number(tf.train.Example.FromString(payload).features.feature, "image/class/label") for payload in payloads
        ]
        changes = sum(one != other for one, other in itertools.pairwise(labels))
        assert changes >= len(labels) / 3, labels  # 2 in a sorted file, 2/3 of all pairs by chance


def test_every_format_becomes_a_jpeg_that_training_reads(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = src / split / name
            picture(folder / "rgb.jpg", colour, quality=95)
            picture(folder / "cmyk.jpeg", colour, mode="CMYK", quality=95)
            picture(folder / "true.PNG", colour)
            picture(folder / "alpha.png", colour, mode="RGBA")
            picture(folder / "palette.gif", colour, mode="P")
            picture(folder / "web.webp", colour, lossless=True)
            picture(folder / "plain.bmp", colour)
            (folder / "notes.txt").write_text("no image")
        picture(src / split / "ant" / "grey.jpg", (90, 90, 90), mode="L", quality=95)
    run(src, dst, capsys=capsys)
    loaded = data.load(
        "tfrecords", data_dir=str(dst), num_classes=3, image_size=8, in_memory=False, augmentation="resized_crop_flip"
    )
    assert (loaded.num_train, loaded.num_test) == (22, 22)
    colours = np.array(list(COLOURS.values()))
    images, labels = loaded.examples("test", 99)
    batches = next(loaded.train_batches(22, 1).as_numpy_iterator())
    for some_images, some_labels in ((images, labels), batches):
        means = some_images.mean(axis=(1, 2))
        coloured = np.ptp(means, axis=1) > 30
        assert coloured.sum() == 21
        np.testing.assert_allclose(means[coloured], colours[some_labels[coloured]], atol=8)
        np.testing.assert_allclose(means[~coloured], 90, atol=2)
    assert loaded.bad_records.count == 0
    features = stored(dst, "train")
    assert content(features["ant/grey.jpg"]) == (src / "train/ant/grey.jpg").read_bytes()
    assert content(features["ant/grey.jpg"], "image/colorspace") == b"Grayscale"
    assert content(features["ant/cmyk.jpeg"], "image/colorspace") == b"RGB"
    assert all(content(feature)[:3] == b"\xff\xd8\xff" for feature in features.values())


def test_rotated_photos_are_stored_upright(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # the right half is white; orientation 6 turns it to the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(src / "ant/turned.jpg", exif=exif, quality=95)
    run(src, dst, "--validation=0.4", capsys=capsys)
    feature = (stored(dst, "train") | stored(dst, "validation"))["ant/turned.jpg"]
    image = tf.io.decode_jpeg(content(feature)).numpy()
    assert image.shape == (32, 16, 3) == (number(feature, "image/height"), number(feature, "image/width"), 3)
    assert image[:15].mean() < 10
    assert image[17:].mean() > 245
    with Image.open(io.BytesIO(content(feature))) as stored_image:
        assert stored_image.getexif().get(0x0112, 1) == 1


def test_large_images_are_shrunk_and_small_ones_copied(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src", 2), tmp_path / "dst"
    noise(src / "ant/large.jpg", 7, (60, 90))
    run(src, dst, "--validation=0.4", "--image_size=24", capsys=capsys)
    features = stored(dst, "train") | stored(dst, "validation")
    with Image.open(io.BytesIO(content(features["ant/large.jpg"]))) as image:
        assert image.size == (24, 36)
    assert content(features["ant/0.jpg"]) == (src / "ant/0.jpg").read_bytes()


def test_broken_images_are_named_and_left_out(tmp_path, capsys):
    src = make_folder(tmp_path / "src", 4)
    (src / "ant/0.jpg").write_bytes((src / "ant/0.jpg").read_bytes()[:-200])
    (src / "bee/1.png").write_bytes(b"no image at all")
    out, err = run(src, tmp_path / "dst", "--validation=0.25", capsys=capsys)
    assert f"left out: {src}/ant/0.jpg: corrupt JPEG" in err
    assert f"left out: {src}/bee/1.png: cannot identify image file\n" in err
    assert "2 broken images" in out
    assert len(stored(tmp_path / "dst", "train")) + len(stored(tmp_path / "dst", "validation")) == 11
    message = fails(capsys, 1, src, tmp_path / "other", "--validation=0.25", "--max_bad_images=1")
    assert "--max_bad_images=1" in message
    assert not list(tmp_path.glob("other*"))


def test_ctrl_c_begins_no_further_image(tmp_path, capsys, monkeypatch):
    """Threads are held at the 6th image until the executor has been told to end, so that no clock decides."""
    src = make_folder(tmp_path / "src", 20)
    prepare, shutdown = image_encoding.prepare, concurrent.futures.ThreadPoolExecutor.shutdown
    begun, ending = [], threading.Event()

    def held(*arguments):
        begun.append(arguments)
        assert len(begun) < 6 or ending.wait(60)
        return prepare(*arguments)

    def interrupted(progress):
        raise KeyboardInterrupt

    def shut_down(pool, **how):
        shutdown(pool, **how | {"wait": False})
        ending.set()
        shutdown(pool, **how)

    monkeypatch.setattr(image_encoding, "prepare", held)
    monkeypatch.setattr(terminal.Progress, "update", interrupted)
    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", shut_down)
    _, err = run(src, tmp_path / "dst", "--validation=0.4", "--workers=3", code=130, capsys=capsys)
    assert "nothing was imported" in err
    assert len(begun) <= 5 + 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["src"], 2, "DST"),
        (["src", "dst", "--colour=red"], 2, "--colour=red"),
        (["src", "dst"], 2, "--validation"),
        (["src", "dst", "--validation=1.5"], 2, "--validation=1.5"),
        (["parted", "dst", "--validation=0.1"], 2, "--validation=0.1"),
        (["src", "dst", "--validation=0.4", "--shards=0"], 2, "--shards=0"),
        (["src", "dst", "--validation=0.4", "--workers=0"], 2, "--workers=0"),
        (["src", "dst", "--validation=0.4", "--shards=99"], 2, "--shards=99"),
        (["src", "full", "--validation=0.4"], 2, "not an empty folder"),
        (["src", "src/dst", "--validation=0.4"], 2, "lies in SRC"),
        (["src", "killed", "--validation=0.4"], 2, "killed.partial"),
        (["missing", "dst", "--validation=0.4"], 1, "missing"),
        (["hollow", "dst", "--validation=0.4"], 1, "'void'"),
        (["src", "dst", "--validation=0.001"], 1, "--validation"),
        (["strange", "dst"], 1, "strange/val/dog"),
    ],
)
def test_impossible_imports(tmp_path, capsys, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("src"), 3)
    for split in ("train", "val"):
        make_folder(Path("parted") / split, 1)
        make_folder(Path("strange") / split, 1)
    make_folder(Path("hollow"), 2)
    for folder in ("hollow/void", "full/data", "killed.partial/train-0", "strange/val/dog"):
        Path(folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert words in fails(capsys, code, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_the_printed_command_trains_on_it(tmp_path, capsys):
    src, dst = make_folder(tmp_path / "src"), tmp_path / "my photos"
    out, _ = run(src, dst, "--validation=0.2", capsys=capsys)
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    small = ["--gin_param=train.epochs=6", f"--model_dir={tmp_path}/run"]
    result = train(*command[2:], *small)  # a process of its own: TensorFlow counts tracings of all models of a process
    assert result.returncode == 0, result.stderr
    assert "my photos: 24 training, 6 test images" in result.stdout
    assert "retracing" not in result.stderr  # TensorFlow's, where functions are made anew again and again


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


def test_what_the_system_refuses_is_no_broken_image(tmp_path, capsys, monkeypatch):
    """Good images would be left out, and the records not be those of SRC."""
    src = make_folder(tmp_path / "src", 2)
    picture(src / "ant/2.png", COLOURS["ant"])
    call = (src, tmp_path / "dst", "--validation=0.4")
    refusals = (
        (os, "memfd_create", OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (Image.Image, "save", OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (Image.Image, "load", MemoryError(), "out of memory"),
    )
    for owner, name, error, words in refusals:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail_with(error))
            message = fails(capsys, 1, *call)
        assert words in message
        assert "the same command goes on" in message
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail_with(TypeError("a mistake of this program")))
        with pytest.raises(TypeError, match="a mistake"):
            run(*call, capsys=capsys)
    capsys.readouterr()
    run(*call, capsys=capsys)
    assert len(stored(tmp_path / "dst", "train")) + len(stored(tmp_path / "dst", "validation")) == 7


def test_an_image_that_cannot_become_a_jpeg_or_be_opened_is_left_out(tmp_path, capsys, monkeypatch):
    src = make_folder(tmp_path / "src", 4)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", 70_000 * "a")
    picture(src / "ant/talks.png", COLOURS["ant"], pnginfo=comment)  # it can, without this
    picture(src / "ant/wide.png", COLOURS["ant"], size=(66000, 1))
    picture(src / "bee/large.png", COLOURS["bee"], size=(600, 600))
    (src / "cat/gone.jpg").symlink_to(tmp_path / "nothing")
    (src / "cat/torn.png").write_bytes(picture(tmp_path / "cat.png", COLOURS["cat"]).read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    out, err = run(src, tmp_path / "dst", "--validation=0.25", capsys=capsys)
    for name, words in {
        "ant/wide.png": "writing image file",
        "bee/large.png": "decompression bomb",
        "cat/gone.jpg": "No such file",
        "cat/torn.png": "",
    }.items():
        assert f"left out: {src}/{name}: " in err
        assert words in err
    assert "4 broken images" in out
