"""docs/recipes.md is what its script writes; every command and program of it and of docs/data.md runs."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import all_blocks, commands_of
from PIL import Image
from sample_data import FOLDER as DATA

from conadv_tf import config

ROOT = Path(__file__).parents[1]
SPECIFICATION = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs" / "make_recipes.py")
make_recipes = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(make_recipes)


NAMES = ("docs/data.md", "docs/recipes.md")
COMMANDS = [line for block in all_blocks("sh") if block.document in NAMES for line in commands_of(block)]
PROGRAMS = [block.text for block in all_blocks("python") if block.document in NAMES]


def test_recipes_are_what_the_script_writes():
    assert make_recipes.document() == make_recipes.DOCUMENT.read_text(), "run python docs/make_recipes.py"


def test_every_setting_is_told_with_what_none_means():
    config.register()
    for name in config.configurables():
        docstring = make_recipes.inspect.getdoc(make_recipes.gin.get_configurable(name))
        told = make_recipes.descriptions(docstring)
        for parameter, described in config.parameters(name).items():
            assert f"`{name}.{parameter}`" in make_recipes.DOCUMENT.read_text()
            assert described.default is not None or "None" in told[parameter], f"{name}.{parameter}"


def test_descriptions_of_a_docstring():
    docstring = """What it is.

Args:
  one, two: both on one line
    and the next.
  three: None: nothing.

Returns:
  four: not an argument.
"""
    assert make_recipes.descriptions(docstring) == {
        "one": "both on one line and the next.",
        "two": "both on one line and the next.",
        "three": "None: nothing.",
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the documents' commands have what they name: recipes, CIFAR-10's first files, photos."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("train.py", "gin", "conadv_tf"):
        (folder / name).symlink_to(ROOT / name)
    cifar = folder / "data" / "cifar10"
    cifar.mkdir(parents=True)
    for shard in (DATA / "cifar10").glob("*-00000-of-*"):
        (cifar / shard.name).symlink_to(shard)
    (folder / "imagenet").symlink_to(DATA / "imagenet_sample")
    random = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(10):
            image = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(image).save(folder / "photos" / kind / f"{number}.png")
    rows = [f"{kind}/{number}.png,{kind}\n" for kind in ("cats", "dogs") for number in range(10)]
    (folder / "labels.csv").write_text("".join(rows))
    return folder


def run(arguments: list[str], place: Path) -> str:
    outcome = subprocess.run(arguments, cwd=place, capture_output=True, text=True, timeout=500)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_there_are_commands_and_programs():
    assert len(COMMANDS) == 9
    assert len(PROGRAMS) == 2


def more_flags(command: str, place: Path) -> list[str]:
    """A folder for the run, which several commands would share, and fewer images and updates than the recipe's."""
    if not command.startswith("python train.py"):
        return []
    flags = [f"--model_dir={place / str(COMMANDS.index(command))}"]
    sizes = ["train.global_batch_size=256", "subset.train_images=512"] if "cifar10" in command else []
    epochs = ["train.epochs=2", "learning_rate.warmup_epochs=1"] if "--preflight" not in command else []
    return flags + [f"--gin_param={setting}" for setting in sizes + epochs]


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, place):
    for named, folder in {"data/cifar10": "cifar10", "imagenet-258": "imagenet_sample"}.items():
        if named in command and not (DATA / folder).is_dir():
            pytest.skip(f"{DATA / folder} is not here; set CONADV_TEST_DATA")
    program, *arguments = shlex.split(command)
    found = {"python": sys.executable}.get(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    assert found, f"{program} is not installed"
    out = run([found, *arguments, *more_flags(command, place)], place)
    expected = {"conadv-import-images": r"--gin_file=\w+/data\.gin", "conadv-shrink-records": "60 records"}
    expected = expected.get(program, r"updates +|test top-1")
    assert re.search(expected, out.replace('"', "")), out


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_program_runs(program, tmp_path):
    run([sys.executable, "-c", program], tmp_path)
