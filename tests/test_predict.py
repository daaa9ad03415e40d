"""conadv-predict: the images and crops of evaluation, names of classes, faults among good images."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import call_command_line
from image_trees import COLOURS, make_folder, noise, picture, stored
from PIL import Image
from record_data import jpeg, write

from conadv_tf import data
from conadv_tf.data import augment, import_images
from conadv_tf.run import export, predict

SETTINGS = {
    "data.source": "tfrecords",
    "tfrecords.in_memory": False,
    "tfrecords.image_size": 16,
    "tfrecords.num_classes": 3,
    "train.method": "vanilla",
    "train.global_batch_size": 4,
    "train.microbatch_size": 4,
    "train.epochs": 2,
    "learning_rate.warmup_epochs": 1,
    "model.name": "cifar_resnet8",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """photos/ of noise, records/ imported from them, run/ trained on those."""
    folder = tmp_path_factory.mktemp("place")
    make_folder(folder / "photos" / "train", 4)
    for label, name in enumerate(COLOURS):
        for number, size in enumerate([(20, 12), (37, 50), (64, 41), (18, 18), (23, 90)]):
            noise(folder / "photos" / "val" / name / f"{number}.jpg", 1000 + 10 * label + number, size)
    picture(folder / "photos" / "val" / "ant" / "grey.jpg", (90, 90, 90), (50, 40), mode="L", quality=95)
    assert import_images.main([str(folder / "photos"), str(folder / "records")]) == 0
    params = [f"--gin_param={name}={value!r}" for name, value in SETTINGS.items()]
    call_command_line(*params, f"--data_dir={folder / 'records'}", f"--model_dir={folder / 'run'}")
    return folder


def called(capsys, *arguments, code: int = 0) -> tuple[list[str], list[str]]:
    """The lines of stdout and stderr."""
    capsys.readouterr()
    assert predict.main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_predicted_is_what_was_evaluated(place, tmp_path, capsys):
    """Faults seen caught: the whole image in the place of its central part, an antialiased resize."""
    out, err = called(capsys, place / "run", place / "photos" / "val", f"--csv={tmp_path}/all.csv")
    assert (out, err) == ([f"{tmp_path}/all.csv: 16 images"], [])
    rows = table(tmp_path / "all.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]
    first = [row for row in rows if row["rank"] == "1"]
    assert [row["image"] for row in first] == sorted(str(path) for path in (place / "photos/val").rglob("*.jpg"))
    correct = [Path(row["image"]).parent.name == row["class"] for row in first]
    result = json.loads((place / "run" / "result.json").read_text())
    assert 100 * np.mean(correct) == pytest.approx(result["test_top1"], abs=1e-3)
    assert result["classes"] == [*COLOURS]

    settings = {name.removeprefix("tfrecords."): value for name, value in SETTINGS.items() if "tfrecords." in name}
    images, _ = data.load("tfrecords", str(place / "records"), **settings).examples("test", 99)
    served = tf.saved_model.load(str(place / "run" / "export")).signatures["serving_default"]
    expected = served(images=tf.constant(images, tf.float32))["probabilities"].numpy()
    for name, probabilities in zip(stored(place / "records", "validation"), expected, strict=True):
        own = [row for row in rows if row["image"] == str(place / "photos" / "val" / name)]
        order = np.argsort(-probabilities)
        assert [int(row["label"]) for row in own] == list(order)
        assert [row["class"] for row in own] == [list(COLOURS)[label] for label in order]
        np.testing.assert_allclose([float(row["probability"]) for row in own], probabilities[order], atol=1e-5)


def formats(folder: Path) -> Path:
    """One picture in the formats that the importer takes, one of them turned by 90°."""
    pixels = np.kron(np.random.default_rng(3).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    upright = Image.fromarray(pixels)
    folder.mkdir()
    upright.save(folder / "1.png")
    upright.save(folder / "2.bmp")
    upright.save(folder / "3.tiff")
    upright.save(folder / "4.webp", lossless=True)
    upright.convert("RGBA").save(folder / "5.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    upright.rotate(90).save(folder / "6.png", exif=exif)
    return folder


def test_the_export_alone_takes_every_format_and_names_what_it_cannot_read(place, tmp_path, capsys):
    alone = shutil.copytree(place / "run" / "export", tmp_path / "alone [1]")
    images = formats(tmp_path / "formats")
    good, none = called(capsys, alone, images, "--top=2")
    assert (len(good), none) == (6, [])
    assert [line.split("   ")[0] for line in good] == sorted(str(path) for path in images.iterdir())
    assert len({line.split("   ", 1)[1] for line in good}) == 1
    first, second = (share.split(" % ") for share in good[0].split("   ")[1:])
    assert float(first[0]) >= float(second[0])
    assert {first[1], second[1]} < {*COLOURS}

    (images / "2a.jpg").write_bytes((place / "photos/val/ant/1.jpg").read_bytes()[:-200])
    (images / "2b.png").write_bytes(b"no image at all")
    (images / "notes.txt").write_text("no image either")
    out, err = called(capsys, alone, images, "--top=2", code=1)
    assert out == good
    assert err[0].startswith("left out: 1 files that are no images")
    assert err[1:] == [
        f"cannot be read: {images}/2a.jpg: corrupt JPEG",
        f"cannot be read: {images}/2b.png: cannot identify image file",
        "error: 2 of 8 images cannot be read, see above: repair them or leave them out",
    ]


def test_an_export_of_an_earlier_version_has_numbers_for_names(place, tmp_path, capsys):
    run = shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("assets.extra", "checkpoints"))
    image = place / "photos" / "val" / "bee" / "2.jpg"
    [named], _ = called(capsys, place / "run", image)
    assert called(capsys, f"file://{place}/run", image) == ([named], [])  # as gs:// is read
    [line], err = called(capsys, run, image)
    assert err == []
    for label, name in enumerate(COLOURS):
        named = named.replace(f"% {name}", f"% {label}")
    assert line == named
    (run / "config.gin").unlink()
    again, [note] = called(capsys, run / "export", image)
    assert again == [line]
    assert note.endswith("says not how to see an image: the central 7/8 of its shorter side")


@pytest.mark.parametrize(
    ("run", "images", "code", "words"),
    [
        ("nothing", ["1.png"], 2, "holds neither a run nor an export"),
        ("begun", ["1.png"], 1, "has not finished (there is no export/)"),
        ("done", ["2.png"], 1, "2.png' is no file or folder"),
        ("done", ["hollow"], 1, "no image lies below"),
        ("done", ["1.png", "--top=0"], 2, "--top: '0' must be a whole number"),
        ("done", ["gs://bucket/1.png"], 2, "is not on this machine"),
        ("done", ["1.png", "--csv=nowhere/a.csv"], 1, "nowhere/a.csv"),
        # Seen to fail: at the end, when every image had been classified.
        ("done", ["1.png", "--csv=hollow"], 2, "--csv=hollow is a folder"),
        ("done", ["1.png", "--csv=a.csv"], 1, "done/export is no export of a run"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, images, code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("begun", "done/export", "hollow"):
        Path(folder).mkdir(parents=True)
    Path("begun/config.gin").touch()
    Path("done/export/saved_model.pb").write_bytes(b"damaged")
    picture(Path("1.png"), (1, 2, 3))
    out, err = called(capsys, run, *images, code=code)
    assert out == []
    [line] = err
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.glob("*.csv*"))


def png(image: np.ndarray) -> tf.Tensor:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return tf.constant(stream.getvalue())


def test_an_image_of_the_size_of_images_in_memory_is_seen_as_it_is():
    digits = data.load()
    images, _ = digits.examples("test", 20)
    assert digits.view == augment.WHOLE_VIEW
    for image in images:
        for written in (image[..., 0], np.repeat(image, 3, -1)):
            np.testing.assert_array_equal(augment.seen(png(written), digits.view, digits.image_shape), image)
    every_level = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(augment.seen(png(every_level), digits.view, (16, 16, 1))[..., 0], every_level)
    wide = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    np.testing.assert_array_equal(augment.seen(png(wide), digits.view, (8, 12, 3)), wide)
    tall = np.pad(wide, ((6, 6), (0, 0), (0, 0)))
    np.testing.assert_array_equal(augment.seen(png(tall), digits.view, (8, 12, 3)), wide)


def labelled(label: int, text: bytes | None = None) -> bytes:
    image = jpeg(np.full((8, 8, 3), 20 * label, np.uint8))
    feature = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    if text:
        feature["image/class/text"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text]))
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


@pytest.mark.parametrize(
    ("texts", "listed", "names"),
    [
        ([b"ant", b"bee", b"cat"], None, ("ant", "bee", "cat")),
        ([b"ant", b"b\xc3\xa9e, small", None], None, ("ant", "bée, small", "2")),
        ([None, None, None], None, None),
        ([b"ant", b"bee", b"cat"], b"one\r\ntwo 2\r\nthree\r\n", ("one", "two 2", "three")),
        ([None, None, None], "\ufeffé\n\N{LINE SEPARATOR}b\nc".encode(), ("é", "b", "c")),
        ([None, None, None], b"\xff\n\nlast\n", ("\N{REPLACEMENT CHARACTER}", "", "last")),
        ([b"ant", b"bee", b"cat"], b"one\ntwo\n", None),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_names_of_classes_are_beside_the_records_or_in_them(texts, listed, names, in_memory, tmp_path):
    for name in ("train-0", "validation-0"):
        write(tmp_path / name, [labelled(label + 1, text) for label, text in enumerate(texts)])
    if listed:
        (tmp_path / "classes.txt").write_bytes(listed)
    found = data.load("tfrecords", str(tmp_path), num_classes=3, label_offset=1, in_memory=in_memory, image_size=8)
    assert found.class_names == names


def test_digits_are_named_and_noise_is_not():
    assert data.load().class_names == (*"0123456789",)
    assert data.load("synthetic", image_size=8, num_train=20).class_names is None


@pytest.mark.long
def test_digits_written_to_files_are_predicted_as_they_were_evaluated(tmp_path, capsys):
    run = tmp_path / "run"
    short = ["--gin_param=train.method='vanilla'", "--gin_param=train.epochs=3"]
    call_command_line(*short, "--gin_param=learning_rate.warmup_epochs=1", f"--model_dir={run}")
    images, labels = data.load().examples("test", 360)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "digits" / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    called(capsys, run, tmp_path / "digits", "--top=1", f"--csv={tmp_path}/digits.csv")
    correct = [Path(row["image"]).parent.name == row["class"] for row in table(tmp_path / "digits.csv")]
    assert len(correct) == 360
    result = json.loads((run / "result.json").read_text())
    assert 100 * np.mean(correct) == pytest.approx(result["test_top1"], abs=1e-3)
    assert export.load(str(run / "export")).names == result["classes"] == [*"0123456789"]
