"""What people bring, tried as they do, each in a process of its own: the fault is said, and nothing is trained wrongly.

Paths with brackets, `~`, split folders, and in a script of one's own images of another range and labels out of range.
Data that have changed are in test_fingerprint.py.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import fast_python
import pytest
from commands import train
from image_trees import noise

SCRIPT = """
import sys
import numpy as np
from conadv_tf import Attack, ConAdvModel, ResNet, data, make_lars, methods

images, labels = data.load().examples("train", 40)
images = images / 255.0 if sys.argv[1] == "range" else images
labels = labels + 1 if sys.argv[1] == "labels" else labels
method = {"vanilla": methods.vanilla(), "conadv": methods.conadv(Attack(epsilon_pixels=8))}[sys.argv[2]]
model = ConAdvModel(ResNet("digits_resnet", 10, (8, 8, 1), method.branches), method)
model.compile(make_lars(1.0), jit_compile=sys.argv[3:] == ["jit"])
history = model.fit(images, labels, batch_size=20, verbose=0).history
print("trained", np.isfinite(history["loss"]).all())
"""


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    line = [fast_python.path(), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """(home folder, outcome) of an import of Train/, Val/ and TEST/, from and to folders with brackets."""
    home = tmp_path_factory.mktemp("home")
    for number, (split, count) in enumerate((("Train", 10), ("Val", 4), ("TEST", 2))):
        for label, name in enumerate(("cat", "dog")):
            for image in range(count):
                noise(
                    home / "photos [1]" / split / name / f"{image}.jpg", 1000 * number + 100 * label + image, (12, 12)
                )
    return home, call("-m", "conadv_tf.data.import_images", "photos [1]", "~/records [1]", cwd=home, HOME=str(home))


def test_split_folders_serve_for_what_their_names_say(imported):
    home, outcome = imported
    assert outcome.returncode == 0, outcome.stderr
    assert "Train/ serves for training, Val/ for validation; TEST/ is not imported: 4 images\n" in outcome.stdout
    assert f"{home}/records [1]: 20 training, 8 validation images of 2 classes; " in outcome.stdout
    assert (home / "records [1]" / "classes.txt").read_text() == "cat\ndog\n"
    assert not (home / "~").exists()


@pytest.mark.long
def test_the_printed_command_trains_in_folders_with_brackets(imported):
    home, outcome = imported
    python, script, *flags = shlex.split(outcome.stdout.splitlines()[-1])
    assert (python, script) == ("python", "train.py")
    flags += ["--model_dir=~/run [lr=1]", "--gin_param=train.epochs=2", "--gin_param=learning_rate.warmup_epochs=1"]
    first, again = (train(*flags, cwd=home, HOME=str(home)) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    result = json.loads((home / "run [lr=1]" / "result.json").read_text())
    assert (result["steps"], result["classes"]) == (2, ["cat", "dog"])
    assert (again.returncode, again.stderr) == (0, "")
    assert f"{home}/run [lr=1] holds this run, finished" in again.stdout
    assert sorted(path.name for path in home.iterdir()) == ["photos [1]", "records [1]", "run [lr=1]"]


SCRIPTS = {
    "range": "DataError: images hold values from 0 to 1, and the network takes [0, 255]",
    "labels": "DataError: label 10 is none of the 10 classes of the network",
}


@pytest.mark.parametrize(
    ("fault", "settings"),
    [("range", ["conadv"]), ("labels", ["vanilla"]), pytest.param("labels", ["conadv", "jit"], marks=pytest.mark.long)],
)
def test_a_script_ends_where_its_images_or_labels_cannot_be_right(fault, settings, tmp_path):
    outcome = call("-c", SCRIPT, fault, *settings, cwd=tmp_path)
    assert outcome.returncode == 1
    assert "trained" not in outcome.stdout
    assert SCRIPTS[fault] in outcome.stderr.splitlines()[-1]


@pytest.mark.long
def test_the_script_trains_on_what_is_right(tmp_path):
    outcome = call("-c", SCRIPT, "right", "conadv", cwd=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (0, "trained True\n"), outcome.stderr
