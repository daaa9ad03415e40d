"""The notebooks, executed from end to end in a kernel of its own, as a reader on a CPU would."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbclient
import nbformat
import pytest
from helpers import some_of

import conadv_tf

ROOT = Path(__file__).parents[1]
NOTEBOOK, OWN_NETWORK = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("conadv_colab", "your_own_network"))
EPOCHS = 10
# 360 test images, ten classes: guessing gives 10 %, a perceptron about 90 %.
LEAST_TOP1 = 93
LAYOUTS = [("auto", "1 replica"), ("mirrored", "2 replicas")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the notebook runs, with this checkout's conadv_tf and a TensorBoard of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CONADV_EPOCHS", str(EPOCHS))
    # As in an activated virtual environment: %tensorboard starts the program of this name.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return tmp_path


def executed(path: Path, folder: Path) -> tuple[nbformat.NotebookNode, list[str]]:
    """A notebook with its results, and the runs in its TensorBoard, which ends with the kernel."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)  # raises where the cell fails
        return notebook, tensorboard_runs(notebook) if path == NOTEBOOK else []


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in found if output.output_type == kind]


def printed(notebook: nbformat.NotebookNode, stream: str) -> str:
    return "".join(output.text for output in outputs(notebook, "stream") if output.name == stream)


def tensorboard_runs(notebook: nbformat.NotebookNode) -> list[str]:
    """What the server answers that the frame in the notebook leads to."""
    frames = "".join(shown.data.get("text/html", "") for shown in outputs(notebook, "display_data"))
    (port,) = re.findall(r"<iframe.*port = (\d+);", frames, re.DOTALL)
    with urllib.request.urlopen(f"http://localhost:{port}/data/runs", timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("path", [NOTEBOOK, OWN_NETWORK], ids=lambda path: path.stem)
def test_notebook_is_valid_and_stored_without_results(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    for cell in code:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert len(cell.source.splitlines()) <= 30
    results = re.compile(r"\d ?%|\d points")
    assert not [cell.id for cell in notebook.cells if cell.cell_type == "markdown" and results.search(cell.source)]


# The first two cells where conadv_tf is not installed, with a pip that only says what it is asked for.
WITHOUT_PACKAGE = """
import importlib.util, json, sys
from IPython.core.interactiveshell import InteractiveShell
importlib.util.find_spec = lambda name: None
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print("pip", line), magic_name="pip")
for cell in json.load(sys.stdin):
    outcome = shell.run_cell(cell)
print("end", outcome.error_in_exec)
"""


def test_both_install_alike():
    cells = [{c.id: c.source for c in nbformat.read(path, as_version=4).cells} for path in (NOTEBOOK, OWN_NETWORK)]
    assert cells[0]["install"] == cells[1]["install"]


@pytest.mark.parametrize(("folder_of", "source"), [(NOTEBOOK.parent, str(ROOT)), (None, "conadv_tf")])
def test_notebook_finds_its_checkout_or_asks_for_a_release(folder_of, source, tmp_path):
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    outcome = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        cwd=folder_of or tmp_path,
        env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": ""},
        input=json.dumps(code[:2]),
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    installs = [line for line in outcome.stdout.splitlines() if line.startswith("pip ")]
    assert installs[0] == 'pip install --quiet "tensorflow>=2.20,<2.21"'  # without a TPU
    assert "--no-deps" in installs[-1]
    assert installs[-1].endswith(f' "{source}"')
    (end,) = [line for line in outcome.stdout.splitlines() if line.startswith("end ")]
    assert end.startswith(f"end {source} could not be installed: set SOURCE")


@pytest.mark.parametrize("path", [NOTEBOOK, OWN_NETWORK], ids=lambda path: path.stem)
def test_notebook_uses_public_names(path):
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    *_, names = re.findall(r"^from conadv_tf import (\([^)]*\)|.*)", code, re.MULTILINE)
    names = names.strip("()")
    assert set(names.replace(",", " ").split()) <= set(conadv_tf.__all__)
    assert not re.search(r"(from|import) conadv_tf\.", code)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "replicas"), some_of(LAYOUTS, LAYOUTS[0]))
def test_notebook_runs_from_end_to_end(strategy, replicas, folder, monkeypatch):
    monkeypatch.setenv("CONADV_STRATEGY", strategy)
    notebook, runs = executed(NOTEBOOK, folder)
    text = printed(notebook, "stdout")
    assert outputs(notebook, "error") == []
    assert "WARNING" not in text
    assert printed(notebook, "stderr") == ""
    assert "nothing to install" in text
    assert replicas in text
    table = dict(re.findall(r"^(conadv|vanilla) .* ([\d.]+) %  ", text, re.MULTILINE))
    assert table.keys() == {"conadv", "vanilla"}
    assert all(LEAST_TOP1 <= float(top1) <= 100 for top1 in table.values())
    assert len(re.findall(r"^epoch +\d+ ", text, re.MULTILINE)) >= 2
    (panel,) = [shown.data["image/png"] for shown in outputs(notebook, "display_data") if "image/png" in shown.data]
    assert len(panel) > 5_000
    assert {"conadv/train", "conadv/validation"} <= set(runs)


@pytest.mark.long
def test_a_network_of_ones_own_runs_from_end_to_end(folder):
    notebook, _ = executed(OWN_NETWORK, folder)
    text = printed(notebook, "stdout")
    assert outputs(notebook, "error") == []
    assert printed(notebook, "stderr") == ""
    assert "27 layers of batch norm, branches ('main', 'adversarial')" in text
    top1 = [float(value) for value in re.findall(r"^epoch .* test +([\d.]+) %", text, re.MULTILINE)]
    assert len(top1) == EPOCHS
    assert top1[-1] >= LEAST_TOP1
    trained, every, tuned = re.findall(r"([\d,]+) of ([\d,]+) numbers trained on; test ([\d.]+)%", text)[0]
    assert 0 < int(trained.replace(",", "")) < int(every.replace(",", ""))
    assert float(tuned) >= LEAST_TOP1
    guesses = re.findall(r"^a (\d): ([\d.]+)% (\d),", text, re.MULTILINE)
    assert len(guesses) == 6
    assert sum(label == guess for label, _, guess in guesses) >= 5
    (panel,) = [shown.data["image/png"] for shown in outputs(notebook, "display_data") if "image/png" in shown.data]
    assert len(panel) > 5_000
