"""data.gin, the recipe that the importer writes beside its records, and the network and batch that it suggests."""

import re
import shlex

import gin
import pytest
from image_trees import make_folder, picture, run

from conadv_tf import config
from conadv_tf.data import image_recipe
from conadv_tf.training.plan import make_plan

CAMERA, CIFAR, TINY = (500, 375), (32, 32), (64, 64)


def suggested(train: list[tuple[int, int]], validation: list[tuple[int, int]]) -> dict[str, object]:
    """What a recipe says of images of these sizes, without the part of the name before the dot."""
    settings = image_recipe.settings_of("photos", 10, {"train": train, "validation": validation})
    return {name.partition(".")[2]: value for name, value in settings.items()}


@pytest.mark.parametrize(
    ("train", "validation", "network", "batch", "size", "in_memory"),
    [
        pytest.param(270 * [CAMERA], 30 * [CAMERA], "resnet18", 16, 224, False, id="a student's photos"),
        pytest.param(9_000 * [CAMERA], 900 * [CAMERA], "resnet18", 256, 224, False, id="a collection"),
        pytest.param(60_000 * [CAMERA], 999 * [CAMERA], "resnet18", None, 224, False, id="batch/1k.gin's batch"),
        pytest.param(1_281_167 * [CAMERA], 50_000 * [CAMERA], "resnet50", None, 224, False, id="ImageNet"),
        pytest.param(2_000 * [(180, 150)], 200 * [CAMERA], "resnet18", 64, 150, False, id="thumbnails"),
        pytest.param(50_000 * [CIFAR], 10_000 * [CIFAR], "cifar_resnet20", 1024, 32, True, id="CIFAR-10"),
        pytest.param(2_000 * [CIFAR], 500 * [CIFAR], "cifar_resnet8", 64, 32, True, id="a part of CIFAR-10"),
        pytest.param(2_000 * [CIFAR], [(32, 31)], "cifar_resnet8", 64, 32, False, id="one of another size"),
        pytest.param(100_000 * [TINY], 10_000 * [TINY], "cifar_resnet56", 1024, 64, False, id="Tiny-ImageNet"),
        pytest.param(100 * [(256, 256)], [(256, 256)], "resnet18", 16, 224, False, id="squares to be cropped"),
        pytest.param(5 * [(20, 12)], [(20, 12)], "cifar_resnet8", 5, 12, False, id="five"),
    ],
)
def test_network_and_batch_fit_the_images(train, validation, network, batch, size, in_memory):
    found = suggested(train, validation)
    assert (found["name"], found["num_classes"], found["num_train"]) == (network, 10, len(train))
    assert (found.get("global_batch_size"), found["image_size"], found["in_memory"]) == (batch, size, in_memory)
    assert found["augmentation"] == ("crop_flip" if in_memory else "resized_crop_flip")
    base, sizes = "batch/small.gin" if batch else "batch/1k.gin", {"train": train, "validation": validation}
    assert f"--gin_file={base} " in image_recipe.command("DIR", sizes)
    batch = batch or 1024
    words = f"{network} at {size} pixels, batch {batch:,}, {len(train) // batch:,} updates an epoch"
    assert image_recipe.suggestion(sizes) == words


@pytest.mark.parametrize(("size", "words"), [((4000, 3000), "sides of 3,000 pixels"), ((900, 511), ""), (CIFAR, "")])
def test_large_photos_are_advised_to_be_shrunk(size, words):
    line = image_recipe.advice({"train": 3 * [size], "validation": [size]})
    assert words in line
    assert bool(words) == ("--image_size=256" in line) == bool(line)


def test_every_number_of_images_has_a_plan_with_updates_enough():
    for count in [*range(1, 400), *range(400, 60_000, 997)]:
        found = suggested(count * [CIFAR], [CIFAR])
        plan = make_plan(found["global_batch_size"], found["microbatch_size"], 1, count, 90)
        assert plan.rows <= 64
        assert plan.steps_per_epoch >= min(24, count // 16)


@pytest.mark.parametrize("name", ["photos", "it's [my] photos"])
def test_the_recipe_says_what_eight_parameters_said(tmp_path, capsys, monkeypatch, name):
    dst = tmp_path / "records" / name
    dst.parent.mkdir()
    out, _ = run(make_folder(tmp_path / "new\nline", 10), dst, "--validation=0.2", capsys=capsys)
    assert f"{dst}/data.gin suggests cifar_resnet8 at 12 pixels, batch 16, 1 updates an epoch. Train on it:\n" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    assert command[-2:] == [f"--gin_file={dst}/data.gin", f"--data_dir={dst}"]
    files = [re.sub("^--gin_file=", "", word) for word in command[2:-1]]
    parameters = {
        "data.source": "tfrecords",
        "tfrecords.name": name,
        "tfrecords.num_train": 24,
        "tfrecords.num_classes": 3,
        "tfrecords.label_offset": 0,
        "tfrecords.image_size": 12,
        "tfrecords.in_memory": False,
        "tfrecords.augmentation": "resized_crop_flip",
    }
    suggestion = {"model.name": "cifar_resnet8", "train.global_batch_size": 16, "train.microbatch_size": 16}
    config.configure(files[:-1], [f"{name}={value!r}" for name, value in (parameters | suggestion).items()])
    expected = gin.config_str(max_line_length=config.ONE_LINE)
    monkeypatch.chdir(tmp_path)
    for path in (files[-1], f"records/{name}/data.gin", f"./records/../records/{name}/data.gin"):
        config.configure([*files[:-1], path], [])
        assert gin.config_str(max_line_length=config.ONE_LINE) == expected
    assert config.bindings([f"records/{name}/data.gin"]) == parameters | suggestion


def test_the_head_of_the_recipe_says_what_it_was_made_from(tmp_path, capsys):
    src = make_folder(tmp_path / "src", 10)
    picture(src / "ant/broken.jpg", (0, 0, 0)).write_bytes(b"no image")
    (src / "notes.txt").write_text("a file")
    run(src, tmp_path / "dst", "--validation=0.2", capsys=capsys)
    head = (tmp_path / "dst/data.gin").read_text().split("\n\n")[0]
    assert "# 24 training and 6 validation images of 3 classes.\n" in head
    assert f"# Imported from {src}; 1 broken images and 1 other files or folders left out.\n" in head
    assert "--gin_file=DIR/data.gin --data_dir=DIR\n" in head
