"""Every gin file of the repository parses, and builds its model and data."""

import os
from pathlib import Path

import gin
import pytest
import tensorflow as tf

from conadv_tf import configure, run
from conadv_tf.errors import ConfigError

GIN = Path(configure.recipe_folder())
RECIPES = sorted(str(path.relative_to(GIN)) for path in GIN.rglob("*.gin"))
DATA = Path(os.environ.get("CONADV_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
# The smallest size at which a recipe's network and data can be built here; the recipe's method is kept.
SMALLEST = {
    "imagenet": [
        "train.global_batch_size=8",
        "train.microbatch_size=4",
        "data.image_size=32",
        "model.name='resnet18'",
    ],
    "cifar10": ["train.global_batch_size=8", "train.microbatch_size=4"],
    "digits": ["train.global_batch_size=8", "train.microbatch_size=4"],
}


def build(recipe: str) -> run.Run:
    """The recipe as written, then at its smallest."""
    configure.configure([recipe], [])
    text = gin.config_str()
    source = next((name for name in ("imagenet", "cifar10") if f"data.name = '{name}'" in text), "digits")
    configure.configure([recipe], [*SMALLEST[source], "train.epochs=2", "learning_rate.warmup_epochs=1"])
    folder = {"imagenet": DATA / "imagenet_sample", "cifar10": DATA / "cifar10"}.get(source)
    if folder is not None and not folder.is_dir():
        pytest.skip(f"{folder} is not here; set CONADV_TEST_DATA")
    return run.build(recipe, tf.distribute.OneDeviceStrategy("CPU:0"), str(folder) if folder else None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_its_model_and_data(recipe):
    built = build(recipe)
    images, labels = next(iter(built.data.train_batches(built.plan.rows, 1)))
    assert images.shape == (built.plan.rows, *built.data.image_shape)
    assert labels.numpy().max() < built.data.num_classes
    assert built.model.network(images).shape == (built.plan.rows, built.data.num_classes)
    assert recipe in run.describe(built)


def test_no_python_file_shadows_gin():
    assert not list(GIN.rglob("*.py"))


def test_recipe_with_a_head_comment_says_how_to_run_it():
    for recipe in (name for name in RECIPES if os.sep not in name and "conadv" in name):
        assert (GIN / recipe).read_text().startswith("# "), recipe
        assert "python train.py" in (GIN / recipe).read_text(), recipe


def test_later_files_and_parameters_win():
    configure.configure(["batch/8k.gin", "method/conadv.gin"], ["attack.epsilon_pixels=4"])
    assert gin.query_parameter("train.global_batch_size") == 8192
    assert gin.query_parameter("train.method") == "conadv"
    assert gin.query_parameter("attack.epsilon_pixels") == 4


def test_a_macro_is_fine_where_it_is_used(tmp_path):
    (tmp_path / "macro.gin").write_text("EPS = 4\nattack.epsilon_pixels = %EPS\ntrain.global_batch_size = 8\n")
    configure.configure([str(tmp_path / "macro.gin")], [])
    with pytest.raises(ConfigError, match="UNUSED"):
        configure.configure([str(tmp_path / "macro.gin")], ["UNUSED=1"])


def test_difference_ignores_how_a_run_is_executed():
    old = "train.epochs = 3\ntrain.jit_compile = False\n"
    assert configure.difference(old, "train.epochs = 3\ntrain.jit_compile = True\n") is None
    assert configure.difference(old, "train.epochs = 4\n") == ("train.epochs", "3", "4")
    assert configure.difference(old, "train.epochs = 3\nlars.momentum = 0.9\n") == (
        "lars.momentum",
        "unset",
        "0.9",
    )
