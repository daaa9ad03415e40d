"""Mutated recipes and flags: each means what it says, or ends with one line; none runs something else.

CONADV_TORTURE=1 (`make torture`) draws all of them, `make test` a share. Every case is drawn from its number alone.
"""

import random
import string
from pathlib import Path

import pytest
import tensorflow as tf
from helpers import TORTURE

from conadv_tf import config
from conadv_tf.errors import ConfigError, DataError
from conadv_tf.run.build import build

GIN = Path(config.recipe_folder())
CASES = 320 if TORTURE else 40
BATCH = 20  # cases a test
RECIPES = ("digits_conadv.gin", "scale/digits/96k.gin", "method/conadv.gin", "method/disadv.gin", "data/digits.gin")
VALUES = (
    "-1", "0", "0.5", "1e9", "1e400", "-1e400", "float('inf')", "'text'", "''", "None", "True", "[]", "[1, 2]", "{}",
    "{'a': 1}", "(1,)", "10**30", "1" * 40, "-0.0", "1e-300", "@conadv", "@gin.macro()", "%NOTHING", "b'1'", "1j", "3",
    "'vanilla'", "'paired'", "'lookahead'", "'phased'", "2.5", "b''", "nan", "'\\x00'", "'π'",
)  # fmt: skip
LINES = (
    "import os",
    "from os import path",
    "import conadv_tf.run as run",
    'include "nothing.gin"',
    'include "/dev/zero"',
    'include "digits_conadv.gin"',
    "train.epochs =",
    "= 3",
    "train.epochs 3",
    "train.epochs = 3 = 4",
    "epochs = 3",
    "a/train.epochs = 3",
    "train.epochs = @os.system('true')",
    "train.epochs = __import__('os')",
    "train.epochs = [" + "[" * 200,
    "train.seed.epochs = 3",
    ".epochs = 3",
    "train. = 3",
    "gin.macro.value = 3",
    "gin.constant.name = 'x'",
    "data.data_dir = '/tmp'",
    "conadv.attack = None",
    "train:\n  epochs = 2",
    "train:\nepochs = 2",
    "\x00",
    "\ufeff",
    "π.ε = 3",
    "'''",
    "\\",
    "#" + "x" * 1000,
    "train.epochs = 2\ntrain.epochs = 3",
)


def bindings() -> list[tuple[str, str]]:
    """(name, value) of every binding of RECIPES' own lines."""
    lines = [line.split("#")[0] for recipe in RECIPES for line in (GIN / recipe).read_text().splitlines()]
    return [tuple(part.strip() for part in line.split("=", 1)) for line in lines if "=" in line]


def misspelt(draw: random.Random, text: str) -> str:
    place = draw.randrange(len(text))
    letter = draw.choice(string.ascii_lowercase + "._/@% 0\n\"'")
    return draw.choice(
        (text[:place] + text[place + 1 :], text[:place] + letter + text[place:], text.upper(), text[::-1])
    )


def mutated(draw: random.Random) -> str:
    """Text for a gin file over the default recipe, or a flag."""
    name, value = draw.choice(bindings())
    kind = draw.randrange(6)
    if kind <= 2:
        return f"{name} = {draw.choice(VALUES)}"
    if kind == 3:
        return f"{misspelt(draw, name)} = {value}"
    if kind == 4:
        return misspelt(draw, f"{name} = {value}")
    return draw.choice(LINES)


def outcome(text: str, as_flag: bool, folder: Path) -> str:
    """ "runs", or the line it ends with; anything else that is raised is an error of ours."""
    path = folder / "mutated.gin"
    path.write_text(f'include "digits_conadv.gin"\n{text}\n')
    try:
        if as_flag:
            config.configure([config.DEFAULT_RECIPE], [text])
        else:
            config.configure([str(path)], [])
        build("mutated", tf.distribute.OneDeviceStrategy("CPU:0"), None)
    except (ConfigError, DataError) as error:
        # What cli.py prints: gin appends lines of its own about the call the error came from.
        return str(error).splitlines()[0]
    return "runs"


def is_heard(text: str) -> bool:
    """Whether a binding that ran is in the configuration of the run, or named as unused."""
    known = set(config.parse_settings(config.operative_config())) | set(config.bindings_without_effect())
    names = [line.split("=", 1)[0].strip() for line in text.splitlines() if "=" in line.split("#")[0]]
    return all(name in known for name in names if "." in name)


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_mutated_recipes_and_flags_run_or_end_with_one_line(first, tmp_path):
    ran = 0
    for number in range(first, first + BATCH):
        draw = random.Random(number)
        text, as_flag = mutated(draw), draw.random() < 0.3
        said = outcome(text, as_flag, tmp_path)
        ran += said == "runs"
        assert said.strip(), (number, text)
        assert "Traceback" not in said, (number, text)
        if said == "runs":
            assert is_heard(text), (number, text)
    assert ran < BATCH  # else the mutations did nothing
    print(f"recipes and flags {first} to {first + BATCH - 1}: {ran} ran, {BATCH - ran} ended with one line")


@pytest.mark.parametrize("text", LINES[:6] + LINES[11:15])
def test_a_recipe_holds_values_and_runs_no_code(text, tmp_path):
    if text == 'include "digits_conadv.gin"':
        assert outcome(text, False, tmp_path) == "runs"
        return
    assert outcome(text, False, tmp_path) != "runs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os", "import os: recipes hold values and import nothing"),
        ("a/train.epochs = 3", "a/train: scopes mean nothing here: write train"),
        ("train.method = @conadv", r"recipes hold values and call nothing"),
        ("learning_rate.peak_learning_rate = 1e400", r"inf is not a finite number"),
        ("EPS = 'a'\nattack.epsilon_pixels = %EPS", r"attack.epsilon_pixels='a' must be float"),
        ('include "mutated.gin"', "includes itself"),
        ("gin.macro.value = 3", "gin.macro is gin's own, not a setting"),
        ("train.epochs = nan", "mutated.gin: a value is no number.*write name.parameter = value"),
        ("train.epochs = %NOTHING", "the macro %NOTHING is not defined: write NOTHING = value"),
    ],
)
def test_the_line_says_what_is_wrong(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mutated.gin").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.configure(["mutated.gin"], [])
