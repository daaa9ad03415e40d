"""What a move of modules breaks without an error: programs kept for another network, the TPU compiler's process, the
wheel, and names of modules that stand in strings. Each test names the fault that it was seen to catch.
"""

import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tensorflow as tf

import conadv_tf
from conadv_tf import config
from conadv_tf.errors import RunError
from conadv_tf.preflight import compiled, tpu_compiler
from conadv_tf.preflight.tpu_generations import GENERATIONS
from conadv_tf.run.build import Run, build

ROOT = Path(__file__).parents[1]
WINGS = ("data", "experiments", "methods", "models", "preflight", "run", "training")
V3 = GENERATIONS["v3"]
NO_COMPILER = "needs jax and libtpu: pip install 'conadv_tf[preflight]'"


@pytest.fixture(scope="module")
def digits() -> Run:
    config.configure([config.DEFAULT_RECIPE], [])
    return build("digits_conadv", tf.distribute.OneDeviceStrategy("CPU:0"), None)


@pytest.mark.parametrize("wing", WINGS)
def test_compiled_programs_are_those_of_every_wing(digits, wing, tmp_path, monkeypatch):
    """Fault seen caught: the fingerprint hashed preflight/ alone, and a changed network kept its old costs."""
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    copy = shutil.copytree(ROOT / "conadv_tf", tmp_path / "conadv_tf", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(conadv_tf, "__file__", str(copy / "__init__.py"))
    config.configure([config.DEFAULT_RECIPE], [])
    before = compiled.fingerprint(digits, V3)
    assert compiled.fingerprint(digits, V3) == before
    module = next(path for path in sorted((copy / wing).glob("*.py")) if path.name != "__init__.py")
    module.write_text(module.read_text() + "\nCHANGED = True\n")
    assert compiled.fingerprint(digits, V3) != before


# sitecustomize.py, which Python imports when it starts. It tells at the end what the process was given and has loaded.
REPORTER = """
import atexit, importlib.util, json, sys

def report():
    if "conadv_tf" in sys.modules:
        content = {
            "package": sys.modules["conadv_tf"].__file__,
            "path": sys.path,
            "wings": [name for name in %r if importlib.util.find_spec(name)],
            "tensorflow": [name for name in ("tensorflow", "tf_keras", "keras") if name in sys.modules],
            "jax": "jax" in sys.modules,
        }
        with open(%r, "w") as file:
            json.dump(content, file)

atexit.register(report)
"""


def test_the_tpu_compilers_process_has_the_package_and_no_tensorflow(tmp_path, monkeypatch):
    """Faults seen caught: conadv_tf/ itself on the process' PYTHONPATH, where data/, run/ and models/ were top-level
    modules; an import of TensorFlow in errors.py, beside whose XLA the compiler's does not run.
    """
    pytest.importorskip("libtpu", reason=NO_COMPILER)
    # Beside the names of wings nothing here is called so: what is found are the wings.
    assert [wing for wing in WINGS if importlib.util.find_spec(wing)] == []
    report = tmp_path / "report.json"
    (tmp_path / "sitecustomize.py").write_text(REPORTER % (WINGS, str(report)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    compiler = tpu_compiler.Compiler(V3, str(tmp_path / "cache"))
    with pytest.raises(RunError, match="the TPU compiler for v3 ended with"):
        compiler.compile(b"no program")
    process = json.loads(report.read_text())
    assert process["package"] == str(ROOT / "conadv_tf" / "__init__.py")
    assert str(ROOT) in process["path"]
    assert str(ROOT / "conadv_tf") not in process["path"]
    assert process["wings"] == []
    assert process["jax"]
    assert process["tensorflow"] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The files of a wheel that is built from a copy of the tree, as pip builds it elsewhere."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("conadv_tf", "gin"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, copy]
    subprocess.run(command, check=True, timeout=300)
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_a_wheel_holds_every_module_and_recipe(wheel):
    """Fault seen caught: a wing that setup.cfg does not list, which an editable install does not miss."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "conadv_tf").rglob("*.py")}
    recipes = {f"conadv_tf/{path.relative_to(ROOT)}" for path in (ROOT / "gin").rglob("*.gin")}
    assert {f"conadv_tf/{wing}/__init__.py" for wing in WINGS} <= modules
    assert (modules | recipes) - set(wheel) == set()
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"conadv_tf"}


def entry_points() -> dict[str, str]:
    """The console scripts of setup.cfg: "module:function" by name."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options.entry_points"]["console_scripts"].strip().splitlines()
    return {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in lines)}


def texts() -> list[Path]:
    """Every file of the repository that people and machines read commands from."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    suffixes = {".py", ".md", ".sh", ".cfg", ".toml", ".yml", ".yaml", ".ipynb", ""}
    paths = [ROOT / name for name in listed.splitlines() if not name.startswith("results/")]
    return [path for path in paths if path.suffix in suffixes and path.is_file()]


def test_modules_named_in_strings_are_there():
    """Fault seen caught: the name that data/service.py had before it moved, in a "-m"."""
    named = {
        (module, str(path.relative_to(ROOT)))
        for path in texts()
        for module in re.findall(r"""-m["',]*\s+["']?(conadv_tf(?:\.\w+)*)""", path.read_text(errors="replace"))
    }
    assert {module for module, _ in named} > {"conadv_tf"}
    named |= {(target.partition(":")[0], name) for name, target in entry_points().items()}
    assert [(module, where) for module, where in sorted(named) if not is_module(module)] == []


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def helps() -> dict[str, subprocess.Popen]:
    """`--help` of every console script, all started at once: each takes the seconds of an import of TensorFlow."""
    started = {}
    for name, target in entry_points().items():
        module, _, function = target.partition(":")
        script = f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started[name] = subprocess.Popen([sys.executable, "-c", script, "--help"], env=environment, **pipes)
    return started


@pytest.mark.parametrize("name", entry_points())
def test_console_scripts_answer(helps, name):
    """Faults seen caught: a moved module, a function of another name."""
    printed, errors = helps[name].communicate(timeout=120)
    assert helps[name].returncode == 0, errors
    assert printed.startswith(f"usage: {name} ")
    of_data = ("conadv-data-service", "conadv-import-images", "conadv-shrink-records")
    without_data = (*of_data, "conadv-predict", "conadv-tpu-worker")
    assert "--data_dir" in printed or name in without_data
    assert "Traceback" not in errors


def test_scripts_for_tpus_call_what_is_there():
    """Fault seen caught: a console script that was renamed in setup.cfg and not in tpu_scripts/."""
    shell = [path for path in texts() if path.suffix == ".sh"]
    called = {name for path in shell for name in re.findall(r"\bconadv-[a-z-]+", path.read_text())}
    assert called <= entry_points().keys() | {"conadv-train"}
