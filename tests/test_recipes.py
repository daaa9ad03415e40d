"""Every gin file of the repository parses, and every recipe trains; tests/test_tables.py reads their values."""

import os
import re
import shlex
from pathlib import Path

import gin
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers import some_of
from sample_data import FOLDER as DATA

from conadv_tf import config
from conadv_tf.errors import ConfigError
from conadv_tf.run import kept_config, report
from conadv_tf.run.build import Run
from conadv_tf.run.build import build as build_run

GIN = Path(config.recipe_folder())
FILES = sorted(str(path.relative_to(GIN)) for path in GIN.rglob("*.gin"))
RECIPES = [name for name in FILES if os.sep not in name]
FOLDERS = {"imagenet": DATA / "imagenet_sample", "cifar10": DATA / "cifar10"}
# Two micro-batches of a size that this machine trains at once; the recipe's method, attack and optimizer are kept.
SMALL = ["train.global_batch_size=8", "train.microbatch_size=4", "train.epochs=2", "learning_rate.warmup_epochs=1"]
SMALL_IMAGENET = ["tfrecords.image_size=32", "model.name='cifar_resnet8'"]
# Of each training stream, shared by the recipes that read it: building AutoAugment takes seconds.
first_batches: dict[str, tf.data.Dataset] = {}


def settings(prefixes: tuple[str, ...]) -> dict[str, str]:
    """The bindings of the parsed configuration that begin so."""
    bound = config.parse_settings(gin.config_str(max_line_length=config.ONE_LINE))
    return {name: value for name, value in bound.items() if name.startswith(prefixes)}


def build(recipe: str) -> Run:
    """The recipe at its smallest, on its real images."""
    config.configure([recipe], [])
    name = config.setting("tfrecords.name") if config.setting("data.source") == "tfrecords" else "digits"
    folder = FOLDERS.get(name)
    if folder is not None and not folder.is_dir():
        pytest.skip(f"{folder} is not here; set CONADV_TEST_DATA")
    config.configure([recipe], SMALL + (SMALL_IMAGENET if name == "imagenet" else []))
    return build_run(recipe, tf.distribute.OneDeviceStrategy("CPU:0"), str(folder) if folder else None)


def batches_for_two_updates(built: Run) -> tf.data.Dataset:
    key = str(sorted(settings(("data.", "tfrecords.", "digits.", "autoaugment.", "subset.")).items()))
    if key not in first_batches:
        stream = built.data.train_batches(built.plan.rows, 1)
        stacked = tf.nest.map_structure(lambda *parts: tf.stack(parts), *stream.take(2 * built.plan.microbatches))
        first_batches[key] = tf.data.Dataset.from_tensor_slices(stacked)
    return first_batches[key]


@pytest.mark.parametrize("recipe", some_of(RECIPES, "digits_conadv.gin", otherwise="long"))
def test_recipe_trains_two_steps(recipe):
    built = build(recipe)
    model, branches = built.model, built.model.method.branches
    before = [v.numpy() for v in (*model.network.trainable_variables, *model.network.moving_statistics(branches))]
    batches = batches_for_two_updates(built)
    model.run_eagerly = True  # the compiled step is tested for each method; compiling it for each recipe takes minutes
    history = model.fit(batches, steps_per_epoch=2, epochs=1, verbose=0).history
    assert model.updates_made() == 2
    assert all(np.isfinite(history[name][0]) for name in model.method.metric_names)
    # The classifier starts near 0, so that every class is as likely as the next.
    assert history["clean_loss"][0] == pytest.approx(np.log(built.data.num_classes), rel=0.05)
    losses = [history[name][0] for name in model.method.metric_names if name.endswith("_loss")]
    assert history["loss"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    after = [v.numpy() for v in (*model.network.trainable_variables, *model.network.moving_statistics(branches))]
    changed = [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)]
    assert np.mean(changed) > 0.5  # behind a block's last γ, which starts at 0, nothing has moved yet
    assert all(changed[-2 * len(branches) :])
    assert recipe in report.arithmetic(built)


@pytest.mark.long
def test_autoaugment_changes_what_it_is_to_change():
    """The release's pairs are vanilla's images beside those of the recipe with AutoAugment."""
    recipes = ("96k_vanilla.gin", "96k_aa.gin", "96k_conadv_aa.gin", "96k_conadv_aa_release.gin")
    clean, augmented, attacked, pairs = (next(iter(batches_for_two_updates(build(name))))[0] for name in recipes)
    assert np.mean(clean != augmented) > 0.2
    np.testing.assert_array_equal(attacked, augmented)
    np.testing.assert_array_equal(pairs, tf.stack([clean, augmented], axis=1))


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        pytest.param("96k_vanilla.gin", 25_557_032, marks=pytest.mark.long),
        ("96k_conadv.gin", 25_610_152),
        pytest.param("96k_conadv_aa_release.gin", 25_663_272, marks=pytest.mark.long),
    ],
)
def test_full_size_network_of_each_number_of_branches(recipe, parameters):
    """53,120 γ and β each branch."""
    config.configure([recipe, "data/synthetic.gin"], [])
    built = build_run(recipe, tf.distribute.OneDeviceStrategy("CPU:0"), None, num_replicas=512)
    assert sum(int(np.prod(v.shape)) for v in built.model.network.trainable_variables) == parameters
    assert built.model.network.image_shape == (224, 224, 3)


@pytest.mark.parametrize("file", FILES)
def test_file_parses(file):
    config.configure([file], [])


PARTS = {"data": ("data.source", "model.name"), "method": ("train.method", "autoaugment.policy", "autoaugment.mode")}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_replaces_the_whole_of_another(kind):
    """What all files of data/ decide, each says; and what one says of its source, all files of that source say."""
    sets: dict[str, set[frozenset[str]]] = {}
    for file in (name for name in FILES if name.startswith(kind + os.sep)):
        config.configure([file], [])
        assert settings(PARTS[kind]).keys() == set(PARTS[kind])
        source = config.setting("data.source") or ""
        own = {name for name in settings(("",)) if name.split(".")[0] not in ("conadv", "attack", "sam")}
        assert {name.split(".")[0] for name in own - set(PARTS[kind])} <= {source}, file
        sets.setdefault(source, set()).add(frozenset(own))
    assert [len(names) for names in sets.values()] == [1] * (4 if kind == "data" else 1), sets


def test_files_of_the_command_line_compose():
    config.configure(
        ["batch/8k.gin", "method/conadv.gin", "data/digits.gin"],
        ["train.global_batch_size=110", "train.microbatch_size=110", "attack.epsilon_pixels=4"],
    )
    built = build_run("composed", tf.distribute.OneDeviceStrategy("CPU:0"), None)
    images, labels = next(iter(built.data.train_batches(built.plan.rows, 1)))
    assert (built.data.name, built.data.num_train, built.data.num_classes) == ("digits", 1437, 10)
    assert built.model.network(images).shape == (110, 10)
    assert set(labels.numpy()) == set(range(10))
    assert (built.model.method.name, built.model.method.attack.epsilon_pixels) == ("conadv", 4)


class ConadvPhotos(tfds.core.GeneratorBasedBuilder):
    """Eight training and four validation JPEGs of one size with ImageNet's number of classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "validation": self._generate_examples(4)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": np.full((32, 32, 3), 25 * number, np.uint8), "label": 100 * number}


@pytest.mark.parametrize("file", ["data/tfds.gin", "data/imagenet_tfds.gin"])
def test_files_for_tfds_read_a_set_that_tfds_prepared(file, tmp_path):
    tfds.disable_progress_bar()
    ConadvPhotos(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    parameters = [*SMALL, "tfds.dataset='conadv_photos'", "tfds.image_size=32"]
    config.configure(["batch/8k.gin", "method/vanilla.gin", file], [*parameters, "model.name='cifar_resnet8'"])
    built = build_run(file, tf.distribute.OneDeviceStrategy("CPU:0"), str(tmp_path))
    assert (built.data.num_train, built.data.num_test, built.data.num_classes) == (8, 4, 1000)
    images, labels = next(iter(built.data.train_batches(8, 1)))
    np.testing.assert_array_equal(np.sort(labels), 100 * np.arange(8))  # not shifted by ImageNet's label_offset
    # Crops of the one-coloured pictures may hold black padding, their brightest pixel not.
    np.testing.assert_allclose(np.max(images, axis=(1, 2, 3)), np.asarray(labels) / 4, atol=3)
    assert built.model.network(images).shape == (8, 1000)


def test_no_python_file_shadows_gin():
    assert not list(GIN.rglob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_head_comment_says_how_to_run_it(recipe):
    head = (GIN / recipe).read_text().split("\n\n")[0]
    (command,) = re.findall(r"^#   python train\.py(.*)$", head.replace("\\\n#", ""), re.MULTILINE)
    arguments = command.split("  (")[0].split()
    files = [argument.removeprefix("--gin_file=") for argument in arguments if argument.startswith("--gin_file=")]
    assert files == [recipe] or (recipe == "digits_conadv.gin" and not files)
    assert re.search(r"^# Source ", head, re.MULTILINE)
    assert re.search(r"^# Hardware ", head, re.MULTILINE)


def test_commands_in_comments_parse():
    for file in FILES:
        for command in re.findall(r"python train\.py (.*--gin_file.*)", (GIN / file).read_text()):
            arguments = [part.split("=", 1) for part in shlex.split(command.removesuffix("\\")) if "=" in part]
            config.configure(
                [value for name, value in arguments if name == "--gin_file"],
                [value for name, value in arguments if name == "--gin_param"],
            )


def test_later_files_and_parameters_win():
    config.configure(["batch/8k.gin", "method/conadv.gin"], ["attack.epsilon_pixels=4"])
    assert gin.query_parameter("train.global_batch_size") == 8192
    assert gin.query_parameter("train.method") == "conadv"
    assert gin.query_parameter("attack.epsilon_pixels") == 4


def test_a_macro_is_fine_where_it_is_used(tmp_path):
    (tmp_path / "macro.gin").write_text("EPS = 4\nattack.epsilon_pixels = %EPS\ntrain.global_batch_size = 8\n")
    config.configure([str(tmp_path / "macro.gin")], [])
    with pytest.raises(ConfigError, match="UNUSED"):
        config.configure([str(tmp_path / "macro.gin")], ["UNUSED=1"])


def test_difference_ignores_how_a_run_is_executed():
    old = "train.epochs = 3\ntrain.steps_per_execution = 0\n"
    assert kept_config.difference(old, "train.epochs = 3\ntrain.steps_per_execution = 5\n") is None
    assert kept_config.difference(old, "train.epochs = 4\n") == ("train.epochs", "3", "4")
    assert kept_config.difference(old, "train.epochs = 3\nlars.momentum = 0.9\n") == (
        "lars.momentum",
        "unset",
        "0.9",
    )
