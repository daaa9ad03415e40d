"""Every command and program of the README and CONTRIBUTING, as written, in a copy of the checkout."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import call_command_line
from PIL import Image
from sample_data import FOLDER as DATA

from conadv_tf import methods

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line]


# Those of tpu_scripts/ are run, with a gcloud that is not real, by test_tpu_scripts.py.
COMMANDS = [command for command in commands("README.md") if not command.startswith("tpu_scripts/")]
PREFLIGHT = [command for command in COMMANDS if "--preflight" in command]
ON_A_TPU = [command for command in COMMANDS if "--tpu=" in command and command not in PREFLIGHT]
TRAINING = [command for command in COMMANDS if command.startswith("python train.py") and "--tpu=" not in command]


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
    arguments = shlex.split(command)
    if arguments[0] == "python":
        arguments[0] = sys.executable
    return subprocess.run(arguments, cwd=checkout, capture_output=True, text=True, timeout=500)


def need_make() -> None:
    installed = ROOT / ".venv" / "installed-dev"
    # Else make would install the copy of the checkout into the environment of these tests.
    if not installed.exists() or installed.stat().st_mtime < (ROOT / "setup.cfg").stat().st_mtime:
        pytest.skip("tests were not started by make: .venv/installed-dev is not there, or older than setup.cfg")


def test_documents_hold_the_commands_the_tests_know():
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert (len(TRAINING), len(PREFLIGHT), len(ON_A_TPU)) == (4, 1, 2)
    assert len(COMMANDS) == 12
    assert "conadv-import-images photos records --validation=0.1" in COMMANDS
    assert "@@" not in (ROOT / "README.md").read_text()
    assert commands("CONTRIBUTING.md") == ["make test", "make check"]


def test_make_demo_reaches_what_the_readme_promises(checkout):
    need_make()
    outcome = run("make demo", checkout)
    assert outcome.returncode == 0, outcome.stderr
    top1 = float(re.search(r"test top-1 ([\d.]+) %   top-5", outcome.stdout).group(1))
    assert top1 >= 96
    # Another processor sums in another order: a few of the 360 test images may fall differently.
    promised = float(re.search(r"test top-1 ([\d.]+) %   top-5", (ROOT / "README.md").read_text()).group(1))
    assert top1 == pytest.approx(promised, abs=1.5)


@pytest.mark.parametrize("command", TRAINING[1:])
def test_training_command_runs_to_its_end(command, checkout):
    if "data/cifar10" in command and not (DATA / "cifar10").is_dir():
        pytest.skip(f"{DATA / 'cifar10'} is not here; set CONADV_TEST_DATA")
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


@pytest.mark.parametrize("command", PREFLIGHT)
def test_preflight_prints_what_the_readme_shows(command, checkout):
    arguments = shlex.split(command)[1:]
    outcome = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, *arguments], cwd=checkout, capture_output=True, text=True, timeout=500
    )
    assert outcome.returncode == 0, outcome.stderr
    *plan, last = outcome.stdout.splitlines()
    assert "not installed" in last
    (shown,) = (block.splitlines() for block in blocks("README.md", "text") if "micro-batches" in block)
    assert shown[: len(plan)] == plan
    table = shown[len(plan) :]
    assert table[0].split()[0] == "method"
    assert all(any(schedule in row for row in table[1:]) for schedule in methods.schedules_of("conadv"))


@pytest.mark.parametrize("command", ON_A_TPU)
def test_tpu_command_says_that_no_tpu_is_here(command, checkout):
    outcome = run(command, checkout)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: --tpu=")
    assert "no TPU is attached" in outcome.stderr


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


def test_reproduction_prints_what_is_kept(checkout):
    outcome = run("python reproduce.py --table=1 --figure=curves --scale=cifar10 --jobs=0", checkout)
    assert outcome.returncode == 0, outcome.stderr
    assert (checkout / "results" / "cifar10" / "curves.png").exists()
    assert re.search(r"\| ResNet \|.*\d\d\.\d\d ± ", outcome.stdout)


def test_analysis_compares_runs(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    short = ["--gin_param=train.epochs=3", "--gin_param=learning_rate.warmup_epochs=1"]
    for name, command in (("digits_conadv", "python train.py"), ("vanilla", TRAINING[2])):
        # Other tests here run the whole command, perhaps in another process with a copy of its own.
        if not (checkout / "runs" / name / "result.json").exists():
            call_command_line(*shlex.split(command)[2:], *short)
    outcome = run("conadv-analyze runs/digits_conadv runs/vanilla", checkout)
    assert outcome.returncode == 0, outcome.stderr
    table = [line for line in outcome.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert (checkout / "analysis" / "surface.png").exists()


def test_make_check_passes(checkout):
    need_make()
    outcome = run("make check", checkout)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_notebook_example_trains(checkout, tmp_path):
    (example,) = blocks("README.md", "python")
    (tmp_path / "example.py").write_text(example)
    outcome = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    assert float(re.findall(r"val_top1: ([\d.]+)", outcome.stdout)[-1]) > 0.9
    assert list((tmp_path / "logs").rglob("events*"))


def test_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
