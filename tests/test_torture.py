"""Long trials, by CONADV_TORTURE=1 alone (`make torture`): killed and killed again, one worker lost, a long run.

Everything that is drawn is drawn from its number, but for where a run stands at the moment it is killed.
"""

import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, command, train, weights, workers
from helpers import assert_identical
from test_checkpoint_faults import MORTAL
from test_preemption import lines

pytestmark = [
    pytest.mark.torture,
    pytest.mark.timeout(3600),
]
# Two at once share the machine; more threads in each would only wait.
ENVIRONMENT = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}
SHORT = ["train.epochs=3", "learning_rate.warmup_epochs=1"]  # of 13 updates each
KILLED_RUNS = 5  # of each configuration
CONFIGURATIONS = {
    "vanilla, micro-batches": ["train.method='vanilla'", "train.microbatch_size=55"],
    "disadv": ["train.method='disadv'"],
    "disadv from epoch 1": ["train.method='disadv'", "adversarial.start_epoch=1"],
    "shadow": [],
    "shadow, tau 2, random start": ["conadv.tau=2", "attack.random_start_probability=0.5"],
    "shadow, tau 2, micro-batches, from epoch 1": [
        "conadv.tau=2",
        "train.microbatch_size=55",
        "adversarial.start_epoch=1",
    ],
    "lookahead, random start": ["conadv.schedule='lookahead'", "attack.random_start_probability=0.5"],
    "lookahead from epoch 1": ["conadv.schedule='lookahead'", "adversarial.start_epoch=1"],
    "paired": ["conadv.schedule='paired'", "attack.label='smoothed'"],
    "paired from epoch 1": ["conadv.schedule='paired'", "adversarial.start_epoch=1"],
    "paired, random target": ["conadv.schedule='paired'", "attack.goal='random_target'"],
    "paired, predicted, exchanged": [
        "conadv.schedule='paired'",
        "attack.label='predicted'",
        "adversarial.shuffle=True",
        "train.microbatch_size=55",
    ],
    "noise": ["train.method='noise'"],
    "sam": ["train.method='sam'"],
    "sam_stale": ["train.method='sam_stale'"],
    "phased": ["conadv.schedule='phased'", "attack.label='smoothed'", "train.microbatch_size=55"],
    "phased, predicted": ["conadv.schedule='phased'", "attack.label='predicted'", "train.microbatch_size=55"],
    "phased, odd": ["conadv.schedule='phased'"],
}


def flags_of(*bindings: str) -> list[str]:
    return [f"--gin_param={binding}" for binding in bindings]


def start(program: list[str], *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*program, *flags], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def seconds_of(process: subprocess.Popen) -> float:
    began = time.monotonic()
    assert process.wait(timeout=600) == 0
    return time.monotonic() - began


def killed_after(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the run was still under way when it was killed."""
    try:
        assert process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    return False


def times_killed(run: list[str], folder: Path, draw: random.Random, length: float) -> int:
    """How often it was: up to three times, once at least. `length` is the seconds it takes when it is left alone."""
    kills = sum(killed_after(start(run), draw.uniform(0, length)) for _ in range(draw.randint(1, 3)))
    while not kills:  # it came to its end first each time
        shutil.rmtree(folder)
        length /= 2
        kills = killed_after(start(run), draw.uniform(0, length))
    return kills


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_runs_killed_at_random_moments_end_with_the_same_weights(name, tmp_path):
    flags = flags_of(*SHORT, *CONFIGURATIONS[name])
    whole = tmp_path / "whole"
    length = seconds_of(start(command(*flags), f"--model_dir={whole}"))
    good = kills = 0
    for number in range(KILLED_RUNS):
        draw = random.Random(f"{name} {number}")
        folder = tmp_path / f"killed{number}"
        own = [*flags, *flags_of(f"train.checkpoint_every_steps={draw.choice((0, 4))}"), f"--model_dir={folder}"]
        kills += times_killed(command(*own), folder, draw, length)
        outcome = train(*own)
        assert outcome.returncode == 0, outcome.stderr
        assert_identical(weights(folder), weights(whole))
        assert lines(folder) == lines(whole)
        good += 1
    print(f"{name}: {good} of {KILLED_RUNS} runs, killed {kills} times, ended with the weights of one never stopped")


WRITES = 10


def test_runs_killed_inside_the_write_of_a_checkpoint_go_on_from_a_whole_one(tmp_path):
    flags = flags_of("train.epochs=4", "learning_rate.warmup_epochs=1", "train.method='vanilla'")
    seconds_of(start(command(*flags), f"--model_dir={tmp_path / 'whole'}"))
    size = (tmp_path / "whole" / "checkpoints" / "ckpt-52.data-00000-of-00001").stat().st_size
    good = 0
    for number in range(WRITES):
        draw = random.Random(number)
        folder, update = tmp_path / f"killed{number}", draw.choice((13, 26))
        killed_writing(flags, folder, update, limit=int(draw.uniform(0.05, 0.95) * size))
        outcome = train(*flags, f"--model_dir={folder}")
        assert outcome.returncode == 0, outcome.stderr
        assert f"resuming {folder} after epoch" in outcome.stdout
        assert_identical(weights(folder), weights(tmp_path / "whole"))
        good += 1
    print(f"{good} of {WRITES} runs killed inside the write of a checkpoint went on from a whole one")


def killed_writing(flags: list[str], folder: Path, update: int, limit: int) -> None:
    """A run that dies when, after ckpt-`update`, a file of it grows beyond so many bytes."""
    folder.mkdir()
    (folder / "tensorboard").write_text("no folder: so that checkpoints are the only files that grow so large")
    process = start([sys.executable, "-c", MORTAL], *flags, f"--model_dir={folder}")
    while not (folder / "checkpoints" / f"ckpt-{update}.index").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert process.wait(timeout=120) == -signal.SIGXFSZ
    assert list((folder / "checkpoints").glob("ckpt-*_temp")), "killed, but not in a write"


WORKER_SECONDS = 60


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_ends_when_the_other_is_killed_and_both_go_on(lost, tmp_path):
    layout = flags_of("train.global_batch_size=108", "train.microbatch_size=54", "train.epochs=40")
    pair = workers(*layout, f"--model_dir={tmp_path}")
    while not (tmp_path / "checkpoints" / "ckpt-39.index").exists():
        assert [process.poll() for process in pair] == [None, None]
        time.sleep(0.05)
    time.sleep(random.Random(lost).uniform(0, 1))
    pair[lost].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, errors = pair[1 - lost].communicate(timeout=WORKER_SECONDS)
    seconds = time.monotonic() - began
    pair[lost].communicate()
    assert pair[1 - lost].returncode == 1, errors
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"error: worker {lost} is gone or cannot be reached")
    for number, process in enumerate(workers(*layout, f"--model_dir={tmp_path}")):
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
        assert number or f"resuming {tmp_path} after epoch" in output
    assert [line["epoch"] for line in lines(tmp_path)] == list(range(1, 41))
    print(f"worker {lost} killed: the other ended after {seconds:.0f} s with one line; both went on to the end")


# A run through the library; its last line says how often its steps were traced.
SOAK = """
import collections, json, sys
from conadv_tf import config
from conadv_tf.run import callbacks
from conadv_tf.run.build import build
from conadv_tf.run.strategy import make_strategy
from conadv_tf.run.train import train
from conadv_tf.training import trainer
traced = collections.Counter()
def counted(name):
    step = getattr(trainer.ConAdvModel, name)
    def count(self, *arguments):
        traced[name] += 1
        return step(self, *arguments)
    setattr(trainer.ConAdvModel, name, count)
counted("train_step"), counted("test_step")
callbacks.LINE_SECONDS = 0.0  # a line an epoch
config.configure([config.DEFAULT_RECIPE], sys.argv[2:])
built = build("soak", make_strategy("one_device"), None)
print(json.dumps({"steps": train(built, sys.argv[1])["steps"], **traced}))
"""
SOAK_BINDINGS = [
    "train.global_batch_size=22",
    "train.microbatch_size=22",
    "train.epochs=308",  # of 65 updates each
    "learning_rate.peak_learning_rate=1.0",
]


def test_a_long_run_takes_no_more_memory_and_no_more_files(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SOAK, str(tmp_path), *SOAK_BINDINGS],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    output: list[str] = []
    memory: list[tuple[int, int]] = []
    files: dict[int, int] = {}
    with process.stdout as stream:
        for line in stream:
            output.append(line)
            if line.startswith("epoch "):
                epoch = int(line.split()[1].split("/")[0])
                memory.append((epoch, resident(process.pid)))
                files[epoch] = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert process.wait() == 0
    facts = json.loads(output[-1])
    early, late = (
        statistics.median(size for epoch, size in memory if begin <= epoch < begin + 30) for begin in (60, 278)
    )
    growth = late / early - 1
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and "export" not in path.parts]
    print(
        f"{facts['steps']:,} updates: {facts['train_step']} trace of the update and {facts['test_step']} of the test, "
        f"memory {early / 1024:.0f} MB after epoch 60, {late / 1024:.0f} MB at the end ({growth:+.2%}), "
        f"{files[10]} files after epoch 10, {files[308]} after the last"
    )
    assert facts["steps"] >= 20_000
    assert facts["train_step"] == 1
    assert facts["test_step"] == 1
    assert growth < 0.02
    assert max(files.values()) <= files[10] + 4  # those of the moment, of a write under way
    assert len(kept) <= 14


def resident(process: int) -> int:
    """Kilobytes of memory that a process holds."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
