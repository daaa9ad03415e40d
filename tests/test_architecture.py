"""docs/architecture.md's rule of imports: a wing imports from those below it, never from those above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "conadv_tf"
# From above.
WINGS = ("cli", "experiments", "preflight", "run", "training", "methods", "models", "data")
BASE = ("config", "errors", "terminal")
FILES = sorted(PACKAGE.rglob("*.py"))


def wing_of(name: str) -> str:
    return name.split(".")[0]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file names in its imports, wherever they stand, without "conadv_tf."."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
    return {name.removeprefix("conadv_tf.") for name in names if name.startswith("conadv_tf.")}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down(path):
    own = wing_of(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    if own in ("__main__", "__init__"):
        return
    used = {wing_of(name) for name in imported(path)} - {own}
    known = {*WINGS, *BASE}
    assert used & known <= (set(WINGS[WINGS.index(own) + 1 :]) | set(BASE) if own in WINGS else set(BASE)), path


def test_every_folder_is_a_wing():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(WINGS) - {"cli"}


def test_the_public_names_are_imported_when_they_are_used():
    """The process that drives the TPU compiler would otherwise load TensorFlow's XLA beside the compiler's."""
    code = (
        "import sys, conadv_tf, conadv_tf.errors, conadv_tf.preflight\n"
        "assert 'tensorflow' not in sys.modules\n"
        "[getattr(conadv_tf, name) for name in conadv_tf.__all__]\n"
        "assert 'tensorflow' in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert outcome.returncode == 0, outcome.stderr
