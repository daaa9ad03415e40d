"""SIGTERM and SIGINT in the middle of an epoch: saved, ended, and gone on with to the same weights bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fast_python
import pytest
import tensorflow as tf
from commands import ROOT, call_command_line, command, weights
from helpers import assert_identical, some_of

from conadv_tf import config
from conadv_tf.errors import ConfigError, Preempted
from conadv_tf.run import callbacks, checkpoint, preemption
from conadv_tf.run.build import build
from conadv_tf.run.strategy import make_strategy
from conadv_tf.run.train import train

SHORT = ["train.epochs=3", "learning_rate.warmup_epochs=1"]  # of 13 updates each
ITS_OWN = ("seconds", "images_per_second", "input_wait_share")


def trained(folder: Path, *bindings: str, strategy=None) -> dict:
    """A run of the default recipe, in this process; on one device unless a strategy is given."""
    config.configure([config.DEFAULT_RECIPE], [*SHORT, *bindings])
    return train(build("digits", strategy or make_strategy("one_device"), None), str(folder))


def lines(folder: Path) -> list[dict]:
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in epoch.items() if name not in ITS_OWN} for epoch in epochs]


def shown(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard has under a tag, by update."""
    files = map(str, sorted((folder / "tensorboard").glob("events*")))
    events = [event for file in files for event in tf.compat.v1.train.summary_iterator(file)]
    found = [(event.step, value) for event in events for value in event.summary.value if value.tag == tag]
    return {step: round(float(tf.make_ndarray(value.tensor)), 6) for step, value in found}


def checkpoints(folder: Path) -> set[int]:
    return {int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("ckpt-*.index")}


@contextlib.contextmanager
def signalled(update: int, number: int = signal.SIGTERM):
    """Within it this process gets a signal once it has made so many updates."""
    original = callbacks.Throughput.on_train_batch_end

    def then_signal(self, batch, logs=None):
        original(self, batch, logs)
        if self.model.updates_made() == update:
            os.kill(os.getpid(), number)

    callbacks.Throughput.on_train_batch_end = then_signal
    try:
        yield
    finally:
        callbacks.Throughput.on_train_batch_end = original


CASES = {
    "vanilla, micro-batches": (["train.method='vanilla'", "train.microbatch_size=55"], [20]),
    "shadow, again and again": (["conadv.tau=2"], [5, 20, 26, 38]),
    "lookahead from epoch 1": (["conadv.schedule='lookahead'", "adversarial.start_epoch=1"], [7, 13, 20]),
    "paired from epoch 1": (["conadv.schedule='paired'", "adversarial.start_epoch=1"], [14]),
    "five updates a call": (
        ["train.epochs=2", "train.steps_per_execution=5", "train.checkpoint_every_steps=6"],
        [18],
    ),
    "phased, odd and even": (["conadv.schedule='phased'", "train.microbatch_size=55"], [5, 20]),
}


@pytest.mark.parametrize(
    "case", some_of(CASES, "five updates a call", long=["paired from epoch 1", "phased, odd and even"])
)
def test_a_run_preempted_within_an_epoch_ends_with_the_same_weights_and_metrics(case, tmp_path):
    bindings, updates = CASES[case]
    result = trained(tmp_path / "whole", *bindings)
    folder = tmp_path / "preempted"
    for update in updates:
        with signalled(update), pytest.raises(Preempted, match=f"ckpt-{update}: the same command goes on"):
            trained(folder, *bindings)
        assert max(checkpoints(folder)) == update
        assert len(lines(folder)) == update // 13 if (folder / "metrics.jsonl").exists() else update < 13
    again = trained(folder, *bindings)
    assert again["test_top1"] == result["test_top1"]
    # Seen to fail with every sixth: a run that goes on after update 18 saved the next call too.
    assert checkpoints(folder) == set(sorted({*updates, *range(13, result["steps"] + 1, 13)})[-3:])
    assert_identical(weights(folder), weights(tmp_path / "whole"))
    assert lines(folder) == lines(tmp_path / "whole")


@pytest.mark.long
def test_an_epoch_whose_evaluation_was_cut_short_is_evaluated_when_the_run_goes_on(tmp_path, monkeypatch):
    trained(tmp_path / "whole")
    began = callbacks.EndEarly.on_test_batch_begin
    seen = []

    def then_signal(self, batch, logs=None):
        began(self, batch, logs)
        seen.append(batch)
        if len(seen) == 6:  # the second batch of the second epoch's four
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.EndEarly, "on_test_batch_begin", then_signal)
    with pytest.raises(Preempted, match="ckpt-26"):
        trained(tmp_path / "cut")
    monkeypatch.undo()
    assert ["test_top1" in line for line in lines(tmp_path / "cut")] == [True, False]
    assert len(seen) == 6
    trained(tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    # Seen to fail: the one that was cut short was missing.
    assert shown(tmp_path / "cut", "test/top1") == shown(tmp_path / "whole", "test/top1")


@pytest.mark.long
def test_a_signal_after_the_last_update_ends_the_run_too(tmp_path, monkeypatch):
    trained(tmp_path / "whole")
    began = callbacks.EndEarly.on_test_batch_begin

    def then_signal(self, batch, logs=None):
        began(self, batch, logs)
        if self.model.updates_made() == 39:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(callbacks.EndEarly, "on_test_batch_begin", then_signal)
    for _ in range(2):  # in the evaluation after the last epoch, and in the one that makes up for it
        with pytest.raises(Preempted, match="ckpt-39: the same command goes on"):
            trained(tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    monkeypatch.undo()
    trained(tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.long
def test_checkpoints_every_so_many_updates_change_nothing(tmp_path):
    trained(tmp_path / "whole")
    trained(tmp_path / "often", "train.checkpoint_every_steps=8")
    assert checkpoints(tmp_path / "often") == {32, 39, 26}
    assert_identical(weights(tmp_path / "often"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "often") == lines(tmp_path / "whole")


def test_the_time_of_saving_within_an_epoch_is_none_of_training(tmp_path, monkeypatch):
    """Seen to fail: with every fourth update saved, 3,000 seconds of training and half an image a second."""
    late, save, kept = [0.0], checkpoint.Checkpoints.save, []

    def slow(self, seconds=None) -> str:
        kept.append(seconds)
        late[0] += 1000.0
        return save(self, seconds)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", slow)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    result = trained(tmp_path, "train.epochs=1", "learning_rate.warmup_epochs=0", "train.checkpoint_every_steps=4")
    assert len(kept) == 4
    assert all(0.0 < seconds < 500.0 for seconds in kept[:3])
    assert result["wall_seconds"] < 500.0
    assert result["images_per_second"] > 10.0


def test_a_negative_number_of_updates_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint_every_steps=-1"):
        trained(tmp_path, "train.checkpoint_every_steps=-1")


@pytest.mark.long
def test_ctrl_c_saves_too(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with signalled(20, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    assert max(checkpoints(tmp_path)) == 20
    assert signal.getsignal(signal.SIGINT) is before


# The command line, which gets a signal once it has made 20 updates.
PREEMPTED = """
import signal, sys
sys.path.insert(0, "tests")
import test_preemption
from conadv_tf import cli
with test_preemption.signalled(20):
    cli.main()
"""


def test_the_command_line_ends_with_a_code_of_its_own_and_one_line_and_goes_on(tmp_path, capfd):
    flags = [*(f"--gin_param={binding}" for binding in SHORT), f"--model_dir={tmp_path}"]
    outcome = subprocess.run(
        [fast_python.path(), "-c", PREEMPTED, *command(*flags)[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 75, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == (
        f"preempted: the run is kept in {tmp_path}/checkpoints/ckpt-20: the same command goes on"
    )
    assert "Traceback" not in outcome.stderr
    call_command_line(*flags)
    assert f"resuming {tmp_path} after update 20" in capfd.readouterr().out


@pytest.mark.long
def test_a_reader_of_its_output_that_ends_with_it_loses_nothing(tmp_path):
    """As `train.py 2>&1 | tee log` when Ctrl-C reaches both."""
    reader, writer = os.pipe()
    flags = [*(f"--gin_param={binding}" for binding in SHORT), f"--model_dir={tmp_path}"]
    process = subprocess.Popen(
        [fast_python.path(), "-c", PREEMPTED, *command(*flags)[2:]], cwd=ROOT, stdout=writer, stderr=writer
    )
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    assert process.wait(300) == Preempted.exit_code
    assert max(checkpoints(tmp_path)) == 20


@pytest.mark.long
def test_a_signal_while_a_checkpoint_is_read_ends_the_run_and_is_no_damage(tmp_path, monkeypatch):
    with signalled(20), pytest.raises(Preempted):
        trained(tmp_path)
    monkeypatch.setattr(tf.train, "load_checkpoint", lambda path: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, preemption.end_at_once)
    try:
        with pytest.raises(Preempted):
            trained(tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
    assert 20 in checkpoints(tmp_path)


WAITING = """
import time
from conadv_tf.run import preemption
with preemption.noticed(can_save=True) as request:
    print("ready", flush=True)
    while not request:
        time.sleep(0.01)
    print("told", flush=True)
    time.sleep(600)
"""


def test_a_second_sigterm_ends_at_once():
    process = subprocess.Popen([fast_python.path(), "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM


# A weak reference calls Python from C code, which drops what that raises. The patience is that of a test.
DROPPED = """
import os, signal, time, weakref
from conadv_tf.run import preemption
preemption.PATIENCE_SECONDS = 1
signal.signal(signal.SIGTERM, preemption.end_at_once)
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
del thing
print("goes on", flush=True)
time.sleep(600)
"""


def test_sigterm_that_c_code_drops_ends_the_process_all_the_same():
    """Seen to fail: a preflight that was told to end while it loaded TensorFlow went on, and its compilers with it."""
    outcome = subprocess.run([sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (outcome.returncode, outcome.stdout) == (Preempted.exit_code, "goes on\n")
    assert outcome.stderr.endswith("\npreempted: nothing was lost: the same command goes on\n")


# One of several workers gets a signal: with the command line's handler, then with the reader's own.
ONE_OF_SEVERAL = """
import os, signal, sys
from conadv_tf.run import preemption
own = lambda number, frame: print("heard", flush=True)
for before in (own, preemption.end_at_once):
    signal.signal(signal.SIGTERM, before)
    with preemption.noticed(can_save=False):
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.noticed(can_save=False):
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_sigterm_ends_one_of_several_workers_as_it_ends_any_program():
    """It cannot save: neither the line that nothing was lost nor the exit code of a saved run would be true."""
    outcome = subprocess.run([sys.executable, "-c", ONE_OF_SEVERAL], cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (-signal.SIGTERM, "heard\n", "")
