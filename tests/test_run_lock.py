"""One process at a time on a model_dir, and a lock that no crash leaves behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from conadv_tf.errors import RunError
from conadv_tf.run import lock
from conadv_tf.run.folder import RunFolder

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from conadv_tf.run import lock
from conadv_tf.run.folder import RunFolder
with lock.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_holder_is_refused_and_told_who_is_first(tmp_path, holder):
    assert lock.is_held(str(tmp_path))
    message = rf"in use by process {holder.pid} on .*another --model_dir"
    with pytest.raises(RunError, match=message), lock.held(str(tmp_path)):
        pass


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_is_free_when_its_holder_is_gone(tmp_path, holder, end):
    holder.send_signal(end)
    holder.wait()
    assert not lock.is_held(str(tmp_path))
    with lock.held(str(tmp_path)):
        assert lock.is_held(str(tmp_path))
    assert not lock.is_held(str(tmp_path))


def test_what_is_not_a_folder_of_a_run_is_not_held(tmp_path):
    assert not lock.is_held(str(tmp_path))
    assert not lock.is_held(str(tmp_path / "nothing"))
    with lock.held("gs://bucket/run"):  # remote folders have no lock
        pass


def test_a_second_run_on_one_model_dir_is_refused(tmp_path, holder):
    command = [sys.executable, "train.py", "--gin_param=train.epochs=2", "--gin_param=learning_rate.warmup_epochs=1"]
    outcome = subprocess.run([*command, f"--model_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(f"error: --model_dir={tmp_path} is in use by process {holder.pid}")
    assert len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "config.gin").exists()


def test_two_starts_at_once_on_one_folder_try_it_without_each_other(tmp_path, monkeypatch):
    """The second start tries the folder, and has done so, between the first one's writing and renaming of its file."""
    rename, second = tf.io.gfile.rename, RunFolder(str(tmp_path))

    def meanwhile(*arguments, **settings):
        monkeypatch.setattr(tf.io.gfile, "rename", rename)
        second.make()
        rename(*arguments, **settings)

    monkeypatch.setattr(tf.io.gfile, "rename", meanwhile)
    RunFolder(str(tmp_path)).make()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.io.gfile, "rename", full)
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(str(tmp_path)).make()
    assert not list(tmp_path.iterdir())
