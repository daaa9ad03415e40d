"""Every command, program and link of the documents, checked as written; some are run in a copy of the checkout."""

import argparse
import ast
import configparser
import csv
import functools
import importlib.util
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags as flags_module
from absl.testing import flagsaver
from commands import call_command_line
from documents import DOCUMENTS, ROOT, Block, all_blocks, anchors, blocks_of, commands, commands_of, text_of
from PIL import Image
from sample_data import FOLDER as DATA

import conadv_tf
from conadv_tf import cli, config, methods

WORDS_OF_THE_README = 900
SH = [pytest.param(command, id=f"{block} {command}") for block in all_blocks("sh") for command in commands_of(block)]
TRAIN = ("python train.py", "conadv-train")
TPU_COMMANDS = commands("docs/tpu.md")
PREFLIGHT = [command for command in TPU_COMMANDS if "--preflight" in command and "--tpu=all" not in command]
ON_A_TPU = [
    command
    for command in TPU_COMMANDS
    if command.startswith(TRAIN) and not re.search("--preflight|--strategy=rehearsal", command)
]
VANILLA = 'python train.py --gin_file=digits_conadv.gin --gin_file=method/vanilla.gin --gin_param="train.seed=1"'
# Text blocks: how they begin, and the test that holds them.
KNOWN_TEXTS = {
    "digits_conadv: conadv (shadow, tau 1)": "test_make_demo_reaches_what_the_readme_promises",
    "  recipe            96k_conadv": "test_preflight_prints_what_is_shown",
}


class _ParsedError(Exception):
    """Ends a program that has parsed its arguments."""


def check_train(arguments: list[str]) -> None:
    """The flags exist, the recipes exist, and the settings mean something."""
    if arguments == ["--help"]:  # a flag that absl adds when it runs a program
        return
    with flagsaver.flagsaver():
        flags_module.FLAGS.unparse_flags()
        cli.parse_flags(["train.py", *arguments])
        config.configure(cli.FLAGS.gin_file or [config.DEFAULT_RECIPE], cli.FLAGS.gin_param)


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE)
    assert set(arguments) <= set(targets)


def check_tpu_script(name: str, arguments: list[str]) -> None:
    """test_tpu_scripts.py runs docs/tpu.md's, with a gcloud that is not real."""
    shown = subprocess.run(["bash", str(ROOT / name), "--help"], capture_output=True, text=True, check=True).stdout
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    assert all(flag.split("=")[0] in shown for flag in own), shown
    if "--" in arguments:
        check_train(arguments[arguments.index("--") + 1 :])


def check_program(name: str, arguments: list[str], monkeypatch) -> None:
    """A tool or script accepts the arguments; it ends before it does anything with them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, given=None, namespace=None):
        parse(parser, given, namespace)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    start = functools.partial(runpy.run_path, str(ROOT / name), run_name="__main__")
    if not name.endswith(".py"):
        module, function = console_scripts()[name].split(":")
        start = getattr(importlib.import_module(module), function)
    with pytest.raises(_ParsedError):
        start()


def console_scripts() -> dict[str, str]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["options.entry_points"]["console_scripts"].strip().splitlines()
    return dict(line.replace(" ", "").split("=") for line in lines)


@pytest.mark.parametrize("command", SH)
def test_command_is_one_that_exists(command, monkeypatch):
    name, *arguments = shlex.split(command)
    if command.startswith(TRAIN):
        check_train(arguments[1:] if name == "python" else arguments)
    elif name == "make":
        check_make(arguments)
    elif name.startswith("tpu_scripts/"):
        check_tpu_script(name, arguments)
    elif name == "python" and arguments[0].endswith(".py"):
        check_program(arguments[0], arguments[1:], monkeypatch)
    elif name in console_scripts():
        check_program(name, arguments, monkeypatch)
    else:
        pytest.fail(f"no test knows {command!r}: mark its block with <!-- not run: why -->, or check it here")


def test_every_block_is_known_or_says_why_not():
    blocks = [block for document in DOCUMENTS for block in blocks_of(document) if not block.marked]
    unknown = [block for block in blocks if block.language not in ("sh", "python", "text")]
    unknown += [block for block in all_blocks("text") if not block.text.startswith(tuple(KNOWN_TEXTS))]
    assert not unknown, f"mark with <!-- not run: why -->, or test: {', '.join(map(str, unknown))}"
    assert all(test in globals() for test in KNOWN_TEXTS.values())


@pytest.mark.long
@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_block_runs(block, tmp_path):
    (tmp_path / "block.py").write_text(block.text)
    outcome = subprocess.run(
        [sys.executable, str(tmp_path / "block.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    validated = re.findall(r"val_top1: ([\d.]+)", outcome.stdout)
    assert not validated or float(validated[-1]) > 0.9


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_block_uses_public_names(block):
    allowed_below = {"docs/architecture.md": ("conadv_tf.methods",)}.get(block.document, ())
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("conadv_tf"):
            if node.module == "conadv_tf":
                assert {alias.name for alias in node.names} <= set(conadv_tf.__all__)
            else:
                assert node.module.startswith(allowed_below or "nothing"), node.module
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("conadv_tf.") for alias in node.names)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    text = text_of(document)
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), target


def test_the_readme_is_read_in_two_minutes():
    assert len(text_of("README.md").split()) <= WORDS_OF_THE_README


def test_the_readme_names_every_flag():
    own = {flag.name for flag in flags_module.FLAGS.get_key_flags_for_module(cli)}
    assert own == set(re.findall(r"`--(\w+)`", text_of("README.md")))


def test_the_numbers_of_the_readme_are_those_of_the_results():
    kept = {}
    for scale in ("digits", "cifar10"):
        with open(ROOT / "results" / scale / "table1.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["column"] == "96k"]
        kept[scale] = {
            row["row"]: f"{float(row['mean']):.2f} ± {float(row['standard_deviation']):.2f} ({row['runs']})"
            for row in rows
        }
    names = {
        "plain": "ResNet",
        "DisAdv": "+ DisAdv",
        "ConAdv, shadow": "+ ConAdv",
        "ConAdv, paired, true label": "+ ConAdv, paired",
        "plain + AutoAugment": "+ AA",
    }
    for label, row in names.items():
        shown = re.search(rf"^\| {re.escape(label)} \| (.*) \| (.*) \| .* \|$", text_of("README.md"), re.MULTILINE)
        assert shown.groups() == (kept["digits"].get(row, "–"), kept["cifar10"].get(row, "–")), label


def test_every_console_script_is_documented():
    text = "".join(map(text_of, DOCUMENTS))
    assert not [name for name in console_scripts() if name not in text]


def test_the_documents_name_this_version():
    assert re.search(r"^## (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)[1] == conadv_tf.__version__
    assert re.search(r"^version: (.*)$", text_of("CITATION.cff"), re.MULTILINE)[1] == conadv_tf.__version__


# What the documents promise, run in a copy of the checkout.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What git tracks, with the virtual environment of this process and two shards of CIFAR-10 at data/cifar10."""
    folder = tmp_path_factory.mktemp("checkout") / "conadv_tf"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)  # keeps the times that make looks at
    if (ROOT / ".venv").is_dir():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    cifar = folder / "data" / "cifar10"
    cifar.mkdir(parents=True)
    for shard in (DATA / "cifar10").glob("*-00000-of-*"):
        (cifar / shard.name).symlink_to(shard)
    return folder


def run(command: str, checkout: Path) -> subprocess.CompletedProcess:
    name, *arguments = shlex.split(command)
    if name in console_scripts():  # of the checkout, which nothing has installed
        module, function = console_scripts()[name].split(":")
        start = f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; {function}()"
        arguments = [sys.executable, "-c", start, *arguments]
    else:
        arguments = [sys.executable if name == "python" else name, *arguments]
    return subprocess.run(arguments, cwd=checkout, capture_output=True, text=True, timeout=500)


def need_make() -> None:
    """Skips where make would install the copy of the checkout into the environment of these tests."""
    installed = ROOT / ".venv" / "installed-dev"
    needed = [ROOT / name for name in ("setup.cfg", "pyproject.toml", "requirements.lock", "requirements-dev.lock")]
    if not installed.exists() or any(installed.stat().st_mtime < file.stat().st_mtime for file in needed):
        pytest.skip("tests were not started by make: .venv/installed-dev is not there, or older than the locks")


def shown_text(start: str) -> Block:
    [block] = [block for block in all_blocks("text") if block.text.startswith(start)]
    return block


@pytest.mark.parametrize("name", ["gain_by_batch", "timeline", pytest.param("attack_panel", marks=pytest.mark.long)])
def test_a_picture_is_drawn_and_the_readme_says_what_it_shows(name, tmp_path):
    picture = tmp_path / f"{name}.png"
    line = [sys.executable, str(ROOT / "docs" / "pictures" / f"{name}.py"), f"--out={picture}"]
    outcome = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=550)  # beside two other tests
    assert outcome.returncode == 0, outcome.stderr
    assert Image.open(picture).size == Image.open(ROOT / "docs" / "pictures" / f"{name}.png").size
    if name == "attack_panel":
        sure = re.search(r"clean ([\d.]+), adversarial ([\d.]+)", outcome.stdout).groups()
        said = re.search(r"upright\s+with (\d+) %, the adversarial one with (\d+) %", text_of("README.md")).groups()
        # Another processor sums in another order, over 600 updates.
        assert [100 * float(number) for number in sure] == pytest.approx([float(number) for number in said], abs=15)


@pytest.mark.long
def test_make_demo_reaches_what_the_readme_promises(checkout):
    need_make()
    outcome = run("make demo", checkout)
    assert outcome.returncode == 0, outcome.stderr
    top1 = float(re.search(r"test top-1 ([\d.]+) %   top-5", outcome.stdout).group(1))
    assert top1 >= 96
    # Another processor sums in another order: a few of the 360 test images may fall differently.
    promised = float(re.search(r"test top-1 ([\d.]+) %   top-5", shown_text("digits_conadv").text).group(1))
    assert top1 == pytest.approx(promised, abs=1.5)


@pytest.mark.long
def test_training_on_cifar10_runs_to_its_end(checkout):
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"{DATA / 'cifar10'} is not here; set CONADV_TEST_DATA")
    [command] = [command for command in commands("README.md") if "data/cifar10" in command]
    outcome = run(command, checkout)
    assert outcome.returncode == 0, outcome.stderr
    assert re.search(r"test top-1 [\d.]+ %   top-5", outcome.stdout)


# To compile takes minutes (test_preflight.py does it with a small network): without the compiler, the rest is the same.
WITHOUT_COMPILER = """
import runpy, sys
from conadv_tf.preflight import tpu_compiler
tpu_compiler.PACKAGES = ("libtpu-of-no-one",)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_preflight_prints_what_is_shown(checkout):
    [command] = PREFLIGHT
    assert command in commands("README.md")
    arguments = shlex.split(command)[1:]
    outcome = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, *arguments], cwd=checkout, capture_output=True, text=True, timeout=500
    )
    assert outcome.returncode == 0, outcome.stderr
    *plan, last = outcome.stdout.splitlines()
    assert "not installed" in last
    shown = shown_text("  recipe").text.splitlines()
    assert shown[: len(plan)] == plan
    table = shown[len(plan) :]
    assert table[0].split()[0] == "method"
    assert all(any(schedule in row for row in table[1:]) for schedule in methods.schedules_of("conadv"))


@pytest.mark.long
@pytest.mark.parametrize("command", ON_A_TPU)
def test_tpu_command_says_that_no_tpu_is_here(command, checkout):
    outcome = run(command, checkout)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: --tpu=")
    assert "no TPU is attached" in outcome.stderr


@pytest.mark.long
def test_import_of_photos_prints_the_command_that_trains(checkout):
    random = np.random.default_rng(0)
    for number in range(20):
        path = checkout / "photos" / ("cats", "dogs")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    outcome = run("conadv-import-images photos records --validation=0.1", checkout)
    assert outcome.returncode == 0, outcome.stderr
    assert "python train.py" in outcome.stdout
    assert {path.name.split("-")[0] for path in (checkout / "records").glob("*-of-*")} == {"train", "validation"}


@pytest.mark.parametrize(
    ("path", "line", "text"), re.findall(r"`([\w/]+\.py):(\d+)` \(`([^`]+)`\)", text_of("docs/tpu.md"))
)
def test_places_in_libraries_say_what_is_quoted(path, line, text):
    """Of the versions that requirements-dev.lock installs."""
    package, _, rest = path.partition("/")
    folder = Path(importlib.util.find_spec(package).origin).parent
    assert text in (folder / rest).read_text().splitlines()[int(line) - 1]


def test_reproduction_prints_what_is_kept(checkout):
    [command] = [command for command in commands("README.md") if "reproduce.py" in command]
    outcome = run(command, checkout)
    assert outcome.returncode == 0, outcome.stderr
    assert (checkout / "results" / "cifar10" / "curves.png").exists()
    assert re.search(r"\| ResNet \|.*\d\d\.\d\d ± ", outcome.stdout)


@pytest.mark.long
def test_analysis_compares_runs(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    short = ["--gin_param=train.epochs=3", "--gin_param=learning_rate.warmup_epochs=1"]
    for name, command in (("digits_conadv", "python train.py"), ("vanilla", f"{VANILLA} --model_dir=runs/vanilla")):
        # make demo, above, trains the first one, perhaps in another process with a copy of its own.
        if not (checkout / "runs" / name / "result.json").exists():
            call_command_line(*shlex.split(command)[2:], *short)
    [command] = [command for command in commands("docs/results.md") if command.startswith("conadv-analyze")]
    outcome = run(command, checkout)
    assert outcome.returncode == 0, outcome.stderr
    table = [line for line in outcome.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert (checkout / "analysis" / "surface.png").exists()


@pytest.mark.long
def test_make_check_passes(checkout):
    need_make()
    outcome = run("make check", checkout)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
