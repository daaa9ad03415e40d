"""Images whose classes a list says: Tiny-ImageNet, ImageNet's flat val/, a CSV. Each test writes down who is what."""

import random
from pathlib import Path

import numpy as np
import pytest
from image_trees import content, fails, make_folder, noise, number, run, stored
from scipy import io

from conadv_tf.data import image_labels
from conadv_tf.errors import DataError

SYNSETS = ("n01", "n02", "n03")
TRUTH = {"1": "n02", "2": "n03", "3": "n01", "4": "n02"}  # of ImageNet's validation images, by their numbers
KIT_ORDER = ("n03", "n01", "n02")  # the development kit's numbers are not the order of the synsets


def classes_of(dst: Path, split: str, src: Path) -> dict[str, str]:
    """Class of each stored image by its path below src; label, name of the class and bytes must agree."""
    names = (dst / "classes.txt").read_text().splitlines()
    sources = {path.read_bytes(): str(path.relative_to(src)) for path in src.rglob("*") if path.is_file()}
    found = {}
    for feature in stored(dst, split).values():
        label = number(feature, "image/class/label")
        assert content(feature, "image/class/text").decode() == names[label]
        found[sources[content(feature)]] = names[label]
    return found


def imported(src: Path, *flags: str, capsys) -> tuple[dict[str, str], dict[str, str], str, str]:
    """(classes of training images, of validation images, stdout, stderr) of an import."""
    dst = src.parent / "dst"
    out, err = run(src, dst, *flags, capsys=capsys)
    return classes_of(dst, "train", src), classes_of(dst, "validation", src), out, err


def make_training(folder: Path, between: str = "") -> dict[str, str]:
    """Two images of each synset, and what they are by their paths below the folder above."""
    expected = {}
    for label, name in enumerate(SYNSETS):
        for image in range(2):
            path = noise(folder / name / between / f"{name}_{image}.JPEG", 10 * label + image)
            expected[str(path.relative_to(folder.parent))] = name
    return expected


def make_tiny(src: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Tiny-ImageNet as it is unpacked, and the class of each training and validation image."""
    train = make_training(src / "train", "images")
    for name in SYNSETS:
        (src / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t9\t9\n")
    names = {f"val_{image}.JPEG": SYNSETS[(image + 1) % 3] for image in range(4)}
    for image, name in enumerate(names):
        noise(src / "val/images" / name, 100 + image)
    lines = [f"{name}\t{label}\t0\t32\t44\t62\n" for name, label in names.items()]
    (src / "val/val_annotations.txt").write_text("".join(lines))
    noise(src / "test/images/test_0.JPEG", 200)
    (src / "wnids.txt").write_text("n03\nn01\nn02\n")
    return train, {f"val/images/{name}": label for name, label in names.items()}


def test_tiny_imagenet(tmp_path, capsys):
    expected = make_tiny(tmp_path / "src")
    train, validation, out, err = imported(tmp_path / "src", capsys=capsys)
    assert (train, validation) == expected
    assert "val/ for validation with the classes of val/val_annotations.txt; test/ is not imported: 1 images" in out
    assert "left out: 1 files outside the folders of classes: wnids.txt\n" in err
    assert "left out: 3 files that are no images" in err


def test_what_list_and_folder_do_not_share_is_counted_and_named(tmp_path, capsys):
    train, validation = make_tiny(tmp_path / "src")
    (tmp_path / "src/val/images/val_0.JPEG").rename(tmp_path / "src/val/images/other.JPEG")
    broken = tmp_path / "src/val/images/val_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:-200])
    found_train, found_validation, _, err = imported(tmp_path / "src", capsys=capsys)
    assert found_train == train
    assert found_validation == {name: validation[name] for name in ("val/images/val_2.JPEG", "val/images/val_3.JPEG")}
    assert "left out: 1 images that the list of labels does not name: val/images/other.JPEG\n" in err
    assert "left out: 1 names in the list of labels that no image has: val/val_0.JPEG\n" in err
    assert f"left out: {broken}: corrupt JPEG\n" in err


def make_kit(folder: Path, order: tuple[str, ...] = KIT_ORDER) -> None:
    """meta.mat as MATLAB's struct array, one synset a row, and inner nodes of the tree after the classes."""
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    table = np.zeros((len(order) + 1, 1), fields)
    for row, name in enumerate((*order, "n99")):
        table[row, 0] = (row + 1, name, "kit fox, Vulpes macrotis", 2 * (name == "n99"))
    folder.mkdir(parents=True, exist_ok=True)
    io.savemat(folder / "meta.mat", {"synsets": table})


def write_list(src: Path, kind: str, place: str = "") -> None:
    """One of the lists that people have for ImageNet's validation images."""
    folder = src / place
    if kind == "kit":
        folder = src / (place or "ILSVRC2012_devkit_t12/data")
        make_kit(folder)
        lines = [str(1 + KIT_ORDER.index(name)) for name in TRUTH.values()]
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")
    elif kind == "kaggle":
        lines = [f"ILSVRC2012_val_{int(image):08d},{name} 1 2 3 4 " for image, name in reversed(TRUTH.items())]
        (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    else:
        (folder / kind).write_text("\n".join(TRUTH.values()) + "\n")


def make_imagenet(src: Path) -> tuple[dict[str, str], dict[str, str]]:
    names = {image: f"val/ILSVRC2012_val_{int(image):08d}.JPEG" for image in TRUTH}
    for image, name in names.items():
        noise(src / name, 100 + int(image))
    return make_training(src / "train"), {names[image]: label for image, label in TRUTH.items()}


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("imagenet_2012_validation_synset_labels.txt", ""),
        ("synset_labels.txt", "val"),
        ("kaggle", ""),
        ("kit", ""),
        ("kit", "val"),
    ],
)
def test_imagenets_flat_validation_folder(tmp_path, capsys, kind, place):
    expected = make_imagenet(tmp_path / "src")
    write_list(tmp_path / "src", kind, place)
    train, validation, out, _ = imported(tmp_path / "src", capsys=capsys)
    assert (train, validation) == expected
    assert "val/ for validation with the classes of " in out


def test_a_part_of_imagenets_validation_images_keeps_its_numbers(tmp_path, capsys):
    _, expected = make_imagenet(tmp_path / "src")
    write_list(tmp_path / "src", "synset_labels.txt")
    (tmp_path / "src/val/ILSVRC2012_val_00000001.JPEG").unlink()
    noise(tmp_path / "src/val/ILSVRC2012_val_00000005.JPEG", 500)
    _, validation, _, err = imported(tmp_path / "src", capsys=capsys)
    assert validation == {name: label for name, label in expected.items() if "00001" not in name}
    assert "1 images that the list of labels does not name: val/ILSVRC2012_val_00000005.JPEG\n" in err
    assert "1 names in the list of labels that no image has: val/ILSVRC2012_val_00000001\n" in err


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({}, "its 4 images have no label"),
        (
            {"ILSVRC2012_validation_ground_truth.txt": "1\n2\n3\n1"},
            "not the order of the synsets: put the kit's meta.mat",
        ),
        ({"synset_labels.txt": "n02\nn09\nn01\nn02"}, "n09 is a class that {src}/train lacks"),
        ({"synset_labels.txt": "2\n3\n1\n2"}, "{src}/synset_labels.txt: 1 is a class that {src}/train lacks"),
        ({"val/val_annotations.txt": "val_0.JPEG n01 0 0 9 9"}, "line 1: 'val_0.JPEG n01 0 0 9 9' is not a file and"),
        ({"val/val_annotations.txt": "val_0.JPEG\tn01\t0"}, "no image for validation"),
        ({"LOC_val_solution.csv": "ImageId,PredictionString\nA,\n"}, "line 2: 'A,' is not ImageId,PredictionString"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1\n9", "KIT": "."}, "line 2: '9' is no number of a class in"),
        ({"ILSVRC2012_validation_ground_truth.txt": "1", "meta.mat": "x"}, "meta.mat' is not the table of ImageNet's"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_list_that_says_no_classes_ends_the_import(tmp_path, capsys, lists, words):
    src = tmp_path / "src"
    make_imagenet(src)
    for name, text in lists.items():
        if name == "KIT":
            make_kit(src)
        else:
            (src / name).write_text(text)
    assert words.format(src=src) in fails(capsys, 1, src, tmp_path / "dst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_folders_of_classes_may_lie_in_images(tmp_path, capsys):
    src = tmp_path / "src"
    expected = make_training(src / "images")
    train, validation, *_ = imported(src, "--validation=0.5", capsys=capsys)
    assert train | validation == expected
    assert len(train) == len(validation) == 3


def test_folders_of_classes_of_each_split_may_lie_in_images(tmp_path, capsys):
    src = tmp_path / "src"
    for split in ("train/Images", "val/images"):
        make_folder(src / split, 1)
    noise(src / "val/images/ant/new.jpg", 900)
    (src / "train/readme.txt").write_text("beside")
    run(src, tmp_path / "dst", capsys=capsys)
    assert set(stored(tmp_path / "dst", "train")) == {f"{name}/0.jpg" for name in ("ant", "bee", "cat")}
    assert "ant/new.jpg" in stored(tmp_path / "dst", "validation")
    assert (tmp_path / "dst/classes.txt").read_text() == "ant\nbee\ncat\n"


def test_a_class_may_be_called_images(tmp_path, capsys):
    src = tmp_path / "src"
    for seed, folder in enumerate(("train/images/a", "train/video", "val/images/b")):
        noise(src / folder / "0.jpg", seed)
    train, validation, *_ = imported(src, capsys=capsys)
    assert train == {"train/images/a/0.jpg": "images", "train/video/0.jpg": "video"}
    assert validation == {"val/images/b/0.jpg": "images"}


# Of images a/0.jpg to a/5.jpg.
LABELS = {"a/0.jpg": "ox", "a/1.jpg": "yak", "a/2.jpg": "ox", "a/3.jpg": "yak", "a/4.jpg": "ox", "a/5.jpg": "yak"}
SPLITS = {"a/0.jpg": "train", "a/1.jpg": "Training", "a/2.jpg": "val", "a/3.jpg": "VALID", "a/4.jpg": "test"}


def rows(pattern: str, paths=LABELS) -> str:
    return "".join(pattern.format(p=p, l=LABELS[p], s=SPLITS.get(p, "train")) + "\n" for p in paths)


def make_listed(tmp_path: Path, text: str) -> Path:
    for seed, name in enumerate(LABELS):
        noise(tmp_path / "src" / name, seed)
    (tmp_path / "labels.csv").write_bytes(text.encode())
    return tmp_path / "src"


@pytest.mark.parametrize(
    "text",
    [
        rows("{p},{l}"),
        "path,label\n" + rows("{p},{l}"),
        "\ufeffCategory;Nr;File\r\n" + rows('"{l}";7;{p}\r'),
        "id\tlabel\n" + rows("{p}\t{l}\n").replace(".jpg", ""),
        rows("./{p} , {l}") + "\n\n" + rows("a/../{p},{l}"),
    ],
    ids=["two columns", "header", "semicolons and columns in another order", "tabs and no suffixes", "twice"],
)
def test_a_csv_says_the_classes(tmp_path, capsys, text):
    src = make_listed(tmp_path, text)
    train, validation, out, err = imported(src, f"--labels={tmp_path}/labels.csv", "--validation=0.34", capsys=capsys)
    assert train | validation == LABELS
    assert (len(train), len(validation)) == (4, 2)
    assert f"{tmp_path}/labels.csv says the classes\n" in out
    assert "left out" not in err


def test_a_csv_says_the_splits(tmp_path, capsys):
    src = make_listed(tmp_path, "path,label,split\n" + rows("{p},{l},{s}"))
    (tmp_path / "labels.csv").rename(src / "labels.csv")
    train, validation, out, err = imported(src, f"--labels={src}/labels.csv", capsys=capsys)
    assert train == {"a/0.jpg": "ox", "a/1.jpg": "yak", "a/5.jpg": "yak"}
    assert validation == {"a/2.jpg": "ox", "a/3.jpg": "yak"}
    assert "says the classes and the splits; test is not imported: 1 images" in out
    assert "left out" not in err  # the list itself is none of the files that are no images


def test_without_a_split_of_validation_that_of_test_serves(tmp_path, capsys):
    text = rows("{p},{l},{s}").replace("val", "test").replace("VALID", "testing")
    _, validation, *_ = imported(make_listed(tmp_path, text), f"--labels={tmp_path}/labels.csv", capsys=capsys)
    assert set(validation) == {"a/2.jpg", "a/3.jpg", "a/4.jpg"}


def test_numbers_as_classes_are_in_the_order_of_numbers(tmp_path, capsys):
    text = "".join(f"a/{image},{label}\n" for image, label in enumerate((10, 9, 10, 9, 10, 9)))
    imported(make_listed(tmp_path, text), f"--labels={tmp_path}/labels.csv", "--validation=0.4", capsys=capsys)
    assert (tmp_path / "dst/classes.txt").read_text() == "9\n10\n"


def test_what_csv_and_folder_do_not_share_is_counted_and_named(tmp_path, capsys):
    text = rows("{p},{l}", list(LABELS)[:5]) + "a/5.jpg,\nb/9.jpg,ox\n/elsewhere/0.jpg,yak\n"
    src = make_listed(tmp_path, text)
    (src / "a/0.jpg").write_bytes(b"no image")
    (src / "notes.txt").write_text("a file")
    train, validation, _, err = imported(src, f"--labels={tmp_path}/labels.csv", "--validation=0.4", capsys=capsys)
    assert train | validation == {name: LABELS[name] for name in ("a/1.jpg", "a/2.jpg", "a/3.jpg", "a/4.jpg")}
    assert f"left out: {src}/a/0.jpg: cannot identify image file\n" in err
    assert "left out: 1 images that the list of labels does not name: a/5.jpg\n" in err
    assert "left out: 2 names in the list of labels that no image has: ../../" in err
    assert "b/9.jpg\n" in err
    assert "left out: 1 files that are no images" in err


@pytest.mark.parametrize(
    ("text", "flags", "code", "words"),
    [
        (rows("{p},{l}"), [], 2, "has no column of splits: give --validation=0.1"),
        (rows("{p},{l},{s}"), ["--validation=0.2"], 2, "has a column of splits: drop one of them"),
        (rows("{p},{l}"), ["--validation=2"], 2, "--validation=2.0 must lie between 0 and 1"),
        ("", ["--validation=0.2"], 1, "labels.csv' is empty"),
        (rows("{p}"), ["--validation=0.2"], 1, "line 1: 'a/0.jpg' is not a path and a label"),
        (rows("{p},{l}") + "a/4.jpg\n", ["--validation=0.2"], 1, "line 7: 'a/4.jpg' is not a path and a label"),
        (rows("{p},{l}") + "a/4.jpg,yak\n", ["--validation=0.2"], 1, "line 7: 'a/4.jpg' is of 'ox' too"),
        (rows("{p},{l},{s}") + "a/4.jpg,ox,later\n", [], 1, "line 7: 'later' is no split (train, training, val"),
        ("path,label\n", ["--validation=0.2"], 1, "0 classes"),
        ("Bild,Tier\nb/0.jpg,ox\n", ["--validation=0.2"], 1, "0 classes: it needs rows"),
        (rows("{p},ox"), ["--validation=0.2"], 1, "1 classes: it needs rows"),
        (rows("{p},{l},val"), [], 1, "class 'ox' has no training image"),
        ("b/0.jpg,ox,train\n", [], 1, "0 classes: it needs rows"),
        (rows("{p},{l},train"), [], 1, "no image for validation"),
        ("\0" + rows("{p},{l}"), ["--validation=0.2"], 1, "labels.csv' is no text in UTF-8"),
    ],
)
def test_a_csv_that_says_no_classes_ends_the_import(tmp_path, capsys, text, flags, code, words):
    src = make_listed(tmp_path, text)
    assert words in fails(capsys, code, src, tmp_path / "dst", f"--labels={tmp_path}/labels.csv", *flags)
    assert not list(tmp_path.glob("dst*"))


def test_a_csv_that_is_not_there_ends_the_import(tmp_path, capsys):
    message = fails(
        capsys, 1, make_folder(tmp_path / "src", 2), tmp_path / "dst", "--labels=no.csv", "--validation=0.5"
    )
    assert "'no.csv' cannot be read: No such file or directory" in message


def test_one_name_of_two_images_ends_the_import(tmp_path, capsys):
    src = make_listed(tmp_path, rows("{p},{l}").replace(".jpg", ""))
    noise(src / "a/3.jpeg", 99)
    message = fails(capsys, 1, src, tmp_path / "dst", f"--labels={tmp_path}/labels.csv", "--validation=0.4")
    assert f"'a/3' is '{src}/a/3.jpeg' and '{src}/a/3.jpg': remove or rename one of them" in message


@pytest.mark.parametrize("name", ["labels.csv", "val_annotations.txt", "LOC_val_solution.csv", "synset_labels.txt"])
def test_any_bytes_are_a_list_or_refused_in_one_line(tmp_path, name):
    refused = []
    for seed in range(300):
        draw = random.Random(seed)
        text = bytearray(
            draw.choice([b"path,label\na/0,ox\n", b"a/0.jpg\tox\t0\n", b'"a,0";"ox";val\n', b"A,n01 1 2\n"])
        )
        for _ in range(draw.randrange(6)):
            place = draw.randrange(len(text) + 1)
            text[place:place] = draw.choice(
                [b",", b";", b"\t", b'"', b"\n", b"\r", b"\0", b"\xff", b"/", b"..", b"\xc3\xa9"]
            )
        (tmp_path / name).write_bytes(text)
        try:
            if name == "labels.csv":
                image_labels.read_csv(str(tmp_path / name), str(tmp_path))
            else:
                image_labels.beside(str(tmp_path), str(tmp_path))
        except DataError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 300
    assert not [line for line in refused if "\n" in line]
