"""conadv-shrink-records: the same records with smaller images; what training makes of them, and what is refused."""

import errno
import gzip
import io
import os
import uuid

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_photos import PHOTOS, needs_photos

from conadv_tf.data import image_encoding, shrink_records

SIDE = 40


def jpeg(height: int, width: int, mode: str = "RGB", form: str = "JPEG", **saved) -> bytes:
    """A smooth image, so that resizing it leaves it alike."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    pixels = np.stack([255 * y, 255 * x, 128 + 0 * y], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **saved)
    return file.getvalue()


def example(image: bytes, name: str = "image/encoded", **features) -> bytes:
    def feature(value):
        kind = {int: tf.train.Int64List, float: tf.train.FloatList, bytes: tf.train.BytesList}[type(value)]
        field = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[type(value)]
        return tf.train.Feature(**{field: kind(value=[value])})

    found = {name: feature(image), **{key.replace("__", "/"): feature(value) for key, value in features.items()}}
    return tf.train.Example(features=tf.train.Features(feature=found)).SerializeToString(deterministic=True)


def write(folder, name: str, records: list[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / name)) as file:
        for record in records:
            file.write(record)


def read(path) -> list[tf.train.Example]:
    return [tf.train.Example.FromString(record) for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]


def image_of(found: tf.train.Example, name: str = "image/encoded") -> bytes:
    return found.features.feature[name].bytes_list.value[0]


def shrink(src, dst, *flags: str) -> int:
    return shrink_records.main([str(src), str(dst), f"--max_side={SIDE}", *flags])


def test_a_large_image_shrinks_and_all_else_of_its_record_stays(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    sides = dict(image__height=90, image__width=60, image__format=b"PNG", image__object__bbox__xmin=0.25)
    small = example(jpeg(SIDE, 200), image__height=SIDE, image__width=200, image__class__label=2)
    large = jpeg(90, 60, exif=_turned())  # training sees it as it is stored, whatever its EXIF says
    write(src, "train-00000-of-00001", [example(large, image__class__label=7, **sides), small, example(b"no image")])
    (src / "classes.txt").write_text("cat\n")
    (src / "conadv_index_train-00000-of-00001.npz").write_bytes(b"of SRC")
    assert shrink(src, dst) == 0
    assert sorted(os.listdir(dst)) == ["classes.txt", "train-00000-of-00001"]
    first, second, third = read(dst / "train-00000-of-00001")
    assert second.SerializeToString(deterministic=True) == small  # byte for byte
    assert image_of(third) == b"no image"
    features = first.features.feature
    assert [features[f"image/{side}"].int64_list.value[0] for side in ("height", "width")] == [60, SIDE]
    assert features["image/format"].bytes_list.value[0] == b"JPEG"
    assert features["image/class/label"].int64_list.value[0] == 7
    assert features["image/object/bbox/xmin"].float_list.value[0] == 0.25
    pixels = tf.io.decode_jpeg(image_of(first), channels=3).numpy().astype(float)
    exact = tf.image.resize(tf.io.decode_jpeg(large, channels=3), (60, SIDE), "area").numpy()
    assert pixels.shape == (60, SIDE, 3)
    assert np.abs(pixels - exact).max() < 6
    said = capsys.readouterr().out
    assert "3 records, 1 of them with an image shrunk to a shorter side of 40 pixels, 1 with a broken one" in said


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_the_quality_decides_how_large_and_how_exact_an_image_is(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    write(tmp_path / "src", "train-00000-of-00001", [example(file.getvalue())])
    exact = np.asarray(Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)
    sizes, errors = [], []
    for flags in ([], ["--quality=95"], ["--quality=90"], ["--quality=10"]):
        dst = tmp_path / "".join(["dst", *flags])
        assert shrink(tmp_path / "src", dst, *flags) == 0
        [found] = read(dst / "train-00000-of-00001")
        sizes.append(len(image_of(found)))
        errors.append(np.abs(tf.io.decode_jpeg(image_of(found)).numpy() - exact).mean())
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]
    assert errors[0] == errors[1] < errors[2] < errors[3]


def test_records_of_tensorflow_datasets_and_gzip_are_read(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    write(src, "name-train.tfrecord-00000-of-00001", [example(jpeg(80, 80), "image", label=3)])
    (src / "dataset_info.json").write_text("{}")
    write(tmp_path / "plain", "train-00000-of-00001.gz", [example(jpeg(80, 80))])
    packed = gzip.compress((tmp_path / "plain" / "train-00000-of-00001.gz").read_bytes())
    (src / "train-00000-of-00001.gz").write_bytes(packed)
    assert shrink(src, dst) == 0
    [found] = read(dst / "name-train.tfrecord-00000-of-00001")
    assert Image.open(io.BytesIO(image_of(found, "image"))).size == (SIDE, SIDE)
    assert found.features.feature["label"].int64_list.value[0] == 3
    [found] = read(dst / "train-00000-of-00001.gz")  # JPEGs do not become smaller: written plain, read by its bytes
    assert Image.open(io.BytesIO(image_of(found))).size == (SIDE, SIDE)
    assert (dst / "dataset_info.json").read_text() == "{}"
    assert "--data_dir below which it is NAME/VERSION" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "form"), [("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")])
def test_an_image_that_a_jpeg_of_three_colours_cannot_hold_stays(tmp_path, mode, form):
    record = example(jpeg(80, 80, mode, form))
    write(tmp_path / "src", "train-00000-of-00001", [record])
    assert shrink(tmp_path / "src", tmp_path / "dst") == 0
    assert [found.SerializeToString(deterministic=True) for found in read(tmp_path / "dst/train-00000-of-00001")] == [
        record
    ]


def test_what_was_stopped_goes_on_and_gives_the_same_bytes(tmp_path, capsys, monkeypatch):
    src = tmp_path / "src"
    for shard in range(3):
        write(src, f"train-{shard:05d}-of-00003", [example(jpeg(50 + shard, 90 + row)) for row in range(5)])
    assert shrink(src, tmp_path / "whole", "--workers=1") == 0
    made, shrunk = [], image_encoding.shrunk

    def stopping(content, **settings):
        made.append(content)
        if len(made) > 12:
            raise KeyboardInterrupt
        return shrunk(content, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(image_encoding, "shrunk", stopping)
        assert shrink(src, tmp_path / "dst") == 130
    assert not (tmp_path / "dst").exists()
    assert shrink_records.main([str(src), str(tmp_path / "dst"), "--max_side=30"]) == 2
    assert "--max_side=40, not 30" in capsys.readouterr().err
    again = (src / "train-00001-of-00003").read_bytes()
    (src / "train-00001-of-00003").write_bytes(again)  # fetched anew: the others are not made a second time
    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            image_encoding, "shrunk", lambda *args, **settings: made.append(args) or shrunk(*args, **settings)
        )
        assert shrink(src, tmp_path / "dst", "--workers=3") == 0
    assert len(made) == 10
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "dst")) == names
    assert [(tmp_path / "dst" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]


def test_what_cannot_be_shrunk_is_said_in_one_line(tmp_path, capsys):
    def said(src, dst=tmp_path / "dst", *flags) -> str:
        code = shrink(src, dst, *flags)
        line = capsys.readouterr().err.strip()
        assert "\n" not in line
        return f"{code}: {line}"

    src = tmp_path / "src"
    write(src, "train-00000-of-00001", [example(b"", "picture", size=3)])
    assert "no image in image/encoded or image, but picture, size" in said(src)
    assert "2: " in said(src, src / "dst")
    assert "lies in SRC" in said(src, src / "dst")
    assert "--max_side=0 must be a whole number of at least 1" in said(src, tmp_path / "dst", "--max_side=0")
    assert "--quality=0 must be a whole number of at least 1" in said(src, tmp_path / "dst", "--quality=0")
    assert "--quality=101 is too large: JPEG has 1 to 100" in said(src, tmp_path / "dst", "--quality=101")
    assert "is no folder" in said(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "has no file of records" in said(tmp_path / "empty")
    assert "is remote" in said(src, "gs://bucket/dst")
    write(tmp_path / "damaged", "train-00000-of-00001", [example(jpeg(90, 90)), example(jpeg(90, 90))])
    path = tmp_path / "damaged/train-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    assert "fetch the file again" in said(tmp_path / "damaged")
    path.write_bytes(content[:-30])
    assert said(tmp_path / "damaged").startswith("1: ")
    assert not (tmp_path / "dst").exists()


def test_a_remote_folder_is_read_and_nothing_is_written_to_it(tmp_path, capsys):
    src = f"ram://{uuid.uuid4().hex}/src"
    names = [f"train-{shard:05d}-of-00002" for shard in range(2)]
    tf.io.gfile.makedirs(src)
    for name in names:
        write(tmp_path / "src", name, [example(jpeg(90, 90)), example(jpeg(30, 30))])
        tf.io.gfile.copy(str(tmp_path / "src" / name), f"{src}/{name}")
    assert shrink(src, tmp_path / "dst") == 0
    assert shrink(tmp_path / "src", tmp_path / "local") == 0
    assert sorted(tf.io.gfile.listdir(src)) == sorted(os.listdir(tmp_path / "dst")) == names
    assert [(tmp_path / "dst" / name).read_bytes() for name in names] == [
        (tmp_path / "local" / name).read_bytes() for name in names
    ]
    with tf.io.gfile.GFile(f"{src}/{names[0]}", "wb") as file:
        file.write((tmp_path / "src" / names[0]).read_bytes()[:-30])
    capsys.readouterr()
    assert shrink(src, tmp_path / "damaged") == 1
    assert f"{src}/{names[0]}" in capsys.readouterr().err


def test_the_command_that_is_printed_can_be_pasted(tmp_path, capsys):
    write(tmp_path / "src", "train-00000-of-00001", [example(jpeg(80, 80))])
    assert shrink(tmp_path / "src", tmp_path / "my photos") == 0
    assert f"--data_dir='{tmp_path}/my photos'" in capsys.readouterr().out


@needs_photos
def test_photos_train_as_before_on_the_same_labels(tmp_path):
    assert shrink_records.main([str(PHOTOS), str(tmp_path / "dst"), "--max_side=258"]) == 0
    for name in os.listdir(PHOTOS):
        before, after = read(PHOTOS / name), read(tmp_path / "dst" / name)
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            keys = ("image/class/label", "image/filename")
            assert [old.features.feature[key] for key in keys] == [new.features.feature[key] for key in keys]
            shape = tf.io.decode_jpeg(image_of(new), channels=3).shape
            size = Image.open(io.BytesIO(image_of(old))).size
            assert min(shape[:2]) == min(258, *size)
            assert shape[1] / shape[0] == pytest.approx(size[0] / size[1], rel=0.01)


def test_what_the_system_refuses_is_no_broken_image(tmp_path, capsys, monkeypatch):
    """The record would stay large for ever: the journal keeps a file that is whole."""
    src, dst = tmp_path / "src", tmp_path / "dst"
    write(src, "train-00000-of-00001", [example(jpeg(90, 90)), example(jpeg(90, 90)[:400])])

    def fail_with(error):
        def fail(*_, **__):
            raise error

        return fail

    refusals = (
        (os, "memfd_create", OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (Image.Image, "resize", MemoryError(), "out of memory"),
    )
    for owner, name, error, words in refusals:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail_with(error))
            assert shrink(src, dst) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
        assert "the same command goes on" in line
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", fail_with(TypeError("a mistake of this program")))
        with pytest.raises(TypeError, match="a mistake"):
            shrink(src, dst)
    capsys.readouterr()
    assert shrink(src, dst) == 0
    assert (
        "2 records, 1 of them with an image shrunk to a shorter side of 40 pixels, 1 with a" in capsys.readouterr().out
    )


def test_few_records_are_read_ahead_of_those_written(tmp_path, monkeypatch):
    """A file of records may be larger than the memory."""
    write(tmp_path / "src", "train-00000-of-00001", [example(jpeg(50, 50 + row)) for row in range(40)])
    read, written, ahead = [], [], []

    class Counted(tf.data.TFRecordDataset):
        def as_numpy_iterator(self):
            for payload in super().as_numpy_iterator():
                read.append(payload)
                ahead.append(len(read) - len(written))
                yield payload

    class Counting(tf.io.TFRecordWriter):
        def write(self, record):
            written.append(record)
            super().write(record)

    monkeypatch.setattr(tf.data, "TFRecordDataset", Counted)
    monkeypatch.setattr(tf.io, "TFRecordWriter", Counting)
    assert shrink(tmp_path / "src", tmp_path / "dst", "--workers=2") == 0
    assert len(written) == 40
    assert 2 <= max(ahead[:40]) <= 8  # threads have work, and no more than that


def test_a_record_that_is_no_example_is_said_in_one_line(tmp_path, capsys):
    write(tmp_path / "src", "train-00000-of-00001", [b"no example"])
    assert shrink(tmp_path / "src", tmp_path / "dst") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/src/train-00000-of-00001: a record is no tf.train.Example" in line
