"""What docs/architecture.md says of the package, read from its source: wings import downwards, names are public or stay
at home, functions and files are short, and every setting of a recipe belongs to one module.
"""

import ast
import functools
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import conadv_tf
from conadv_tf import config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "conadv_tf"
# From top to bottom: a module imports from its own floor and from those below.
FLOORS = (
    ("cli", "__main__"),
    ("experiments",),
    ("preflight",),
    ("run",),
    ("training",),
    ("methods",),
    ("models",),
    ("data",),
    ("config", "errors", "paths", "peers", "terminal", "__init__"),
)
LONGEST_FUNCTION, LONGEST_FILE, MEDIAN_FUNCTION = 60, 400, 12


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    """Such as "conadv_tf.run.build"; a package's __init__.py has the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sources("conadv_tf")}


def top(module: str) -> str:
    """The wing of a module, or the name of one that is in none."""
    return module.removeprefix("conadv_tf").strip(".").split(".")[0] or "__init__"


def floor(module: str) -> int:
    (found,) = [number for number, names in enumerate(FLOORS) if top(module) in names]
    return found


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module of the package, name in this file) for every import, in functions too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "conadv_tf":
                    yield alias.name, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import: name the module in full"
            if (node.module or "").split(".")[0] == "conadv_tf":
                for alias in node.names:
                    below = f"{node.module}.{alias.name}"
                    yield (below if below in MODULES else str(node.module)), alias.asname or alias.name


def test_every_module_stands_on_a_floor():
    assert {top(module) for module in MODULES} == {name for names in FLOORS for name in names}


def test_wings_import_from_those_below():
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other, _ in imported(path)
        if floor(other) < floor(module)
    ]
    assert upward == []


def test_no_module_imports_in_a_circle():
    graph = {module: {other for other, _ in imported(path)} - {module} for module, path in MODULES.items()}
    finished: set[str] = set()

    def visit(module: str, before: tuple[str, ...]) -> None:
        assert module not in before, " → ".join((*before[before.index(module) :], module))
        if module not in finished:
            for other in sorted(graph[module]):
                visit(other, (*before, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


# What a process is driven by, and progress that overwrites its line.
PRINTING = ("conadv_tf.terminal", "conadv_tf.preflight.tpu_compiler", "conadv_tf.preflight.compiled")


def test_lines_for_a_person_who_may_have_gone_are_terminals():
    """Seen to fail in six tools: a pipe whose reader had ended, or a full disk behind stdout, ended their work."""
    printed = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and module not in PRINTING
    ]
    assert printed == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(path: Path) -> Iterator[str]:
    """Private names of modules of the package: imported, read as an attribute, or named to be replaced in a test."""
    modules = {name for module, name in imported(path) if module.rpartition(".")[2] == name}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("conadv_tf"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and is_private(node.attr):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and "setattr" in ast.unparse(node.func) and len(node.args) > 1:
            target, name = node.args[0], getattr(node.args[1], "value", None)
            if isinstance(target, ast.Name) and target.id in modules and is_private(str(name)):
                yield f"{target.id}.{name}"


def test_private_names_stay_in_their_module():
    files = [*sources("conadv_tf", "tests", "benchmarks"), ROOT / "train.py", ROOT / "reproduce.py"]
    assert [f"{path.relative_to(ROOT)}: {use}" for path in files for use in private_uses(path)] == []


def lengths() -> dict[str, int]:
    """Lines of every function of the package, docstrings included."""
    return {
        f"{module}.{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for module, path in MODULES.items()
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def test_functions_are_short():
    assert {name: length for name, length in lengths().items() if length > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths().values()) <= MEDIAN_FUNCTION


def test_files_are_short():
    counts = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in counts.items() if count > LONGEST_FILE} == {}


def configurables() -> list[tuple[str, str]]:
    """(gin's name, module) of everything that recipes may set."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            for decorator in getattr(node, "decorator_list", []):
                call = decorator if isinstance(decorator, ast.Call) else None
                if ast.unparse(call.func if call else decorator) in ("gin.configurable", "gin.register"):
                    named = bool(call and call.args)
                    found.append((ast.literal_eval(call.args[0]) if call and named else node.name, module))
    return found


def test_recipes_reach_every_configurable():
    modules = {module.removeprefix("conadv_tf.") for _, module in configurables()}
    assert modules == set(config.CONFIGURED_MODULES)


def test_gin_names_are_unique():
    names = [name for name, _ in configurables()]
    assert sorted(names) == sorted(set(names))


def test_importing_the_package_loads_no_tensorflow():
    """What a command line needs before it says what is wrong, and the TPU compiler's process has no room for."""
    light = (
        "conadv_tf",
        "conadv_tf.errors",
        "conadv_tf.config",
        "conadv_tf.paths",
        "conadv_tf.terminal",
        "conadv_tf.preflight",
        "conadv_tf.run.tpu_runtime",
    )
    script = f"import sys, {', '.join(light)}; print({{'tensorflow', 'tf_keras', 'keras'}} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "set()"


@pytest.mark.parametrize("name", conadv_tf.__all__)
def test_public_names_are_there(name):
    assert getattr(conadv_tf, name) is not None
    assert name in dir(conadv_tf)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = conadv_tf.no_such_name


def test_configured_modules_are_there():
    for module in config.CONFIGURED_MODULES:
        assert importlib.import_module(f"conadv_tf.{module}")


def test_types_are_checked_everywhere():
    files = re.search(r"^\[tool\.mypy\].*?^files = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert files
    assert ast.literal_eval(files.group(1)) == ["conadv_tf", "train.py", "reproduce.py"]


TABLE = ["--table=1", "--figure=gain", "--jobs=0", "--runs=results/digits/runs"]


@pytest.mark.parametrize(
    ("tool", "arguments", "code"),
    [
        ("cli", ["--help"], 0),
        ("cli", ["--gin_file=nothing.gin"], 2),
        ("cli", ["--nothing=1"], 2),
        ("cli", ["train.epochs=3"], 2),
        ("data.import_images", ["--help"], 0),
        ("data.import_images", ["no_such_folder", "no_such_place"], 1),
        ("data.shrink_records", ["--help"], 0),
        ("data.shrink_records", ["src", "gs://bucket/dst"], 2),
        ("data.service", ["--help"], 0),
        ("experiments.analyze", ["--help"], 0),
        ("experiments.analyze", ["run", "--images=none"], 2),
        ("experiments.reproduce", ["--help"], 0),
        ("experiments.reproduce", TABLE, 0),
        ("run.predict", ["--help"], 0),
        ("run.predict", ["no_such_run", "photo.jpg"], 2),
        ("run.predict", ["tests/old_run", "photo.jpg"], 1),
        ("run.tpu_worker", ["--help"], 0),
        ("run.tpu_worker", ["--type=v3-32"], 2),
        ("preflight.step_program", ["--help"], 0),
        ("preflight.step_program", ["--images=1"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_can_be_said_without_tensorflow_loads_none(tool, arguments, code, tmp_path):
    """Fault seen caught: `from conadv_tf.run import report` at the top of cli.py."""
    program = (
        f"import sys; from conadv_tf import cli; from conadv_tf.{tool} import main\n"
        "try: end = cli.run_command_line(['train.py', *sys.argv[1:]]) if main is cli.main else main(sys.argv[1:])\n"
        "except SystemExit as error: end = error.code\n"
        "print(end, 'tensorflow' in sys.modules)"
    )
    arguments = [*arguments, *([f"--results={tmp_path}"] if arguments == TABLE else [])]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"{code} False"], done.stderr
    assert arguments[0] != TABLE[0] or "| ResNet |" in done.stdout
