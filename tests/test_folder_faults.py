"""Folders, clocks, files and workers that fail: a run goes on, or ends with one line, what was saved is whole."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fast_python
import numpy as np
import pytest
import tensorflow as tf
from commands import ROOT, call_command_line, weights
from helpers import assert_identical, make_model
from record_data import make_folder, stream, take

from conadv_tf import methods, terminal
from conadv_tf.errors import RunError, data_error, lost_worker, out_of_memory
from conadv_tf.run import callbacks, lock
from conadv_tf.run.folder import RunFolder
from conadv_tf.training import plan

SHORT = [
    "--gin_param=train.method='vanilla'",
    "--gin_param=train.epochs=3",  # of 13 updates each
    "--gin_param=learning_rate.warmup_epochs=1",
]


def at_update(monkeypatch, update: int, happen: Callable[[], None]) -> None:
    """`happen` is called once, when a run has made so many updates."""
    original = callbacks.Throughput.on_train_batch_end

    def then_happen(self, batch, logs=None):
        original(self, batch, logs)
        if self.model.updates_made() == update:
            happen()

    monkeypatch.setattr(callbacks.Throughput, "on_train_batch_end", then_happen)


def the_error(capfd, *flags: str) -> str:
    """The last line of a run that ends with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        call_command_line(*flags)
    assert ended.value.code == 1
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    lines = errors.strip().splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    return lines[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    call_command_line(*SHORT, f"--model_dir={folder}")
    return folder


@contextlib.contextmanager
def immutable(folder: Path) -> Iterator[None]:
    """Nothing can be made or removed in a folder, by root neither."""
    as_root = os.geteuid() == 0
    if as_root and subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("root cannot be kept from writing here: chattr +i does not work")
    if not as_root:
        folder.chmod(0o555)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True) if as_root else folder.chmod(0o755)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here, which takes root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all but `leave` bytes of a disk."""
    path = disk / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - leave)
    return path


def test_a_folder_that_vanishes_during_a_run(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    at_update(monkeypatch, 20, lambda: shutil.rmtree(folder))
    line = the_error(capfd, *SHORT, f"--model_dir={folder}")
    assert f"--model_dir={folder} cannot be written" in line
    assert "No such file" in line
    assert not folder.exists()


@pytest.mark.long
def test_a_folder_that_becomes_read_only_keeps_what_it_has(whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    with contextlib.ExitStack() as stack, monkeypatch.context() as patched:

        def lose_the_right_to_write():
            stack.enter_context(immutable(folder / "checkpoints"))
            stack.enter_context(immutable(folder))

        at_update(patched, 20, lose_the_right_to_write)
        line = the_error(capfd, *SHORT, f"--model_dir={folder}")
    assert f"--model_dir={folder} cannot be written" in line
    assert "Operation not permitted" in line or "Permission denied" in line
    goes_on_after_epoch_1(folder, whole, capfd)


def goes_on_after_epoch_1(folder: Path, whole: Path, capfd) -> None:
    """And ends as one that nothing happened to."""
    call_command_line(*SHORT, f"--model_dir={folder}")
    assert f"resuming {folder} after epoch 1" in capfd.readouterr().out
    assert_identical(weights(folder), weights(whole))
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("leave", "what"),
    [(0, "--model_dir={} cannot be written"), pytest.param(16384, "cannot write a checkp", marks=pytest.mark.long)],
)
def test_a_disk_that_fills_up_keeps_what_it_has(leave, what, whole, small_disk, monkeypatch, capfd):
    folder = small_disk / "run"
    with monkeypatch.context() as patched:
        at_update(patched, 20, lambda: fill(small_disk, leave))
        line = the_error(capfd, *SHORT, f"--model_dir={folder}")
    assert what.format(folder) in line
    assert str(folder) in line
    assert "No space left" in line or "; 0.0 MB free there" in line
    if leave:  # so that it was the checkpoint that could not be written
        (small_disk / "filler").unlink()
        goes_on_after_epoch_1(folder, whole, capfd)


def test_a_disk_that_is_full_from_the_start(small_disk, capfd):
    (small_disk / "run").mkdir()
    fill(small_disk)
    line = the_error(capfd, *SHORT, f"--model_dir={small_disk / 'run'}")
    assert f"--model_dir={small_disk / 'run'} cannot be written" in line
    assert "No space left" in line


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_file_where_a_folder_should_be_is_said_before_training(place, tmp_path, capfd):
    folder = tmp_path / "run"
    if place:
        folder.mkdir()
    (folder / place).write_text("a file")
    line = the_error(capfd, *SHORT, f"--model_dir={folder}")
    assert str(folder / place) in line
    assert (folder / place).read_text() == "a file"
    assert "epoch 1/" not in capfd.readouterr().out


def test_a_place_of_the_exported_network_that_is_taken(whole, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_update(patched, 20, lambda: (folder / "export").write_text("a file"))
        line = the_error(capfd, *SHORT, f"--model_dir={folder}")
    assert f"the trained network cannot be written to {folder / 'export'}" in line
    (folder / "export").unlink()
    call_command_line(*SHORT, f"--model_dir={folder}")
    assert (folder / "export" / "saved_model.pb").is_file()
    assert_identical(weights(folder), weights(whole))


def test_a_folder_where_the_lock_should_be(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(RunError, match=rf"{tmp_path}/.lock cannot be opened.*remove it") as raised,
        lock.held(str(tmp_path)),
    ):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", b'{"recipe": "digits'),
        ("result.json", b"\xff\xfe\x00"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo'),
        ("divergences.json", b"{}]"),
        ("data.json", b'{"place": "fold'),
        ("data.json", b'{"place": "fold", "parts": 3}'),
        ("data.json", b"[]"),
    ],
)
def test_a_file_of_the_run_that_is_spoilt_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    folder = RunFolder(str(tmp_path))
    read = {
        "result.json": folder.read_result,
        "metrics.jsonl": folder.read_metrics,
        "data.json": folder.read_data,
    }.get(name, folder.read_divergences)
    with pytest.raises(RunError, match=rf"{tmp_path}/{name} is damaged \(.*\): bring it back, or") as raised:
        read()
    assert "\n" not in str(raised.value)


def test_a_file_of_the_run_that_cannot_be_read_is_not_called_damaged(tmp_path):
    """It may be whole: nobody should look for a copy, or begin another run."""
    (tmp_path / "config.gin").mkdir()
    with pytest.raises(RunError, match=rf"{tmp_path}/config.gin cannot be read \(.*\): mend that, and start") as raised:
        RunFolder(str(tmp_path)).read_config()
    assert "\n" not in str(raised.value)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "TensorBoard" in record.getMessage()]


def test_training_goes_on_without_tensorboard(whole, tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    call_command_line(*SHORT, f"--model_dir={tmp_path}")
    (line,) = warnings_of(caplog)
    assert f"{tmp_path}/tensorboard cannot be written" in line
    assert "training goes on" in line
    assert_identical(weights(tmp_path), weights(whole))
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 39


def test_training_goes_on_when_tensorboard_loses_its_folder(tmp_path, monkeypatch, caplog):
    def lose_it():
        shutil.rmtree(tmp_path / "tensorboard")
        (tmp_path / "tensorboard").write_text("a file")

    at_update(monkeypatch, 20, lose_it)
    call_command_line(*SHORT, f"--model_dir={tmp_path}")
    (line,) = warnings_of(caplog)
    assert f"{tmp_path}/tensorboard cannot be written" in line
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 39


# Before libc's: a wall clock that stands `hours` off.
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
long hours = 0;
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += 3600 * hours;
    return code;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int code = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return code;
}
time_t time(time_t *to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
"""
# The command line; its clock jumps back by six hours after 4 updates, and forward again after 20.
JUMPING = """
import ctypes, os, sys, time
sys.path.insert(0, "tests")
import pytest, test_folder_faults
from conadv_tf import cli
hours = ctypes.c_long.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "hours")
def jump(to):
    before = time.time()
    hours.value = to
    print("jumped by", round((time.time() - before) / 3600))
with pytest.MonkeyPatch.context() as patched:
    test_folder_faults.at_update(patched, 4, lambda: jump(-6))
    test_folder_faults.at_update(patched, 20, lambda: jump(0))
    cli.main()
"""


@pytest.mark.long
def test_a_clock_that_jumps_changes_no_duration(whole, tmp_path):
    (tmp_path / "clock.c").write_text(CLOCK)
    build = ["cc", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c", "-ldl"]
    if shutil.which("cc") is None or subprocess.run(build, capture_output=True).returncode:
        pytest.skip("there is no C compiler to make the clock with")
    outcome = subprocess.run(
        [fast_python.path(), "-c", JUMPING, *SHORT, f"--model_dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "clock.so")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "jumped by -6\n" in outcome.stdout
    assert "jumped by 6\n" in outcome.stdout
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        epoch = json.loads(line)
        assert 0 < epoch["seconds"] < 200
        assert 0 <= epoch["input_wait_share"] <= 1
        assert 10 < epoch["images_per_second"] < 1e6
    assert json.loads((tmp_path / "result.json").read_text())["wall_seconds"] < 200
    assert_identical(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("jump", [-21600.0, 21600.0])
def test_a_wait_for_data_that_saw_the_clock_jump_is_left_out(jump):
    """TensorFlow's own clock, which measures waits, is the wall clock."""
    throughput = callbacks.Throughput(plan.make_plan(110, 110, 1, 1437, 3, 1))
    throughput.set_model(make_model(methods.vanilla(), branches=("main",)))
    throughput.on_epoch_begin(0)
    for batch, waited in enumerate((0.0, 0.01, jump, 0.01)):
        time.sleep(0.02)
        throughput.on_train_batch_end(batch, {"input_wait_seconds": tf.constant(waited, tf.float64)})
    images_per_second, share = throughput.current()
    assert share == pytest.approx(0.02 * images_per_second / 330, rel=1e-6)


def test_a_shard_that_disappears_during_an_epoch_is_named(tmp_path):
    make_folder(tmp_path, (40, 30, 50))
    loaded = stream(tmp_path, max_bad_records=1000)
    batches = loaded.train_batches(5, 1).as_numpy_iterator()
    next(batches)
    (tmp_path / "train-00001-of-00003").unlink()
    with pytest.raises(tf.errors.OpError) as caught:
        list(itertools.islice(batches, 60))
    assert str(data_error(caught.value)) == (
        f"{tmp_path}/train-00001-of-00003: no good record among 30: fetch the file again"
    )


def test_a_shard_that_comes_back_costs_no_image(tmp_path, monkeypatch):
    """It is away when its turn comes, and back when its records are read again, one by one."""
    shard, away = make_folder(tmp_path, (4, 3, 5)) / "train-00001-of-00003", tmp_path / "away"
    undisturbed = take(stream(tmp_path).train_batches(6, 1), 6)
    read_one = tf.raw_ops.TFRecordDatasetV2

    def bring_back() -> np.int64:
        if away.exists():
            away.rename(shard)
        return np.int64(0)

    def bring_back_and_read_one(byte_offsets, **arguments):
        return read_one(byte_offsets=byte_offsets + tf.numpy_function(bring_back, [], tf.int64), **arguments)

    monkeypatch.setattr(tf.raw_ops, "TFRecordDatasetV2", bring_back_and_read_one)
    loaded = stream(tmp_path)
    shard.rename(away)
    disturbed = take(loaded.train_batches(6, 1), 6)
    assert shard.exists()
    for one, other in zip(disturbed, undisturbed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert loaded.bad_records.count == 0


# What TensorFlow says to the worker that is left when the other one dies.
ABORTED = [
    (
        "{{function_node __wrapped__CollectiveReduceV2_device_/job:worker/replica:0/task:0/device:CPU:0}} Collective "
        "ops is aborted by: Error reported from /job:worker/task:1: The following tasks are unhealthy (stopped sending "
        "heartbeats):\n/job:worker/replica:0/task:1\nThe tasks have crashed.",
        "worker 1",
    ),
    (
        "{{function_node __wrapped__CollectiveReduceV2_device_/job:worker/replica:0/task:1/device:CPU:0}} Collective "
        "ops is aborted by: recvmsg:Connection reset by peer\nAdditional GRPC error information from remote target "
        "/job:worker/replica:0/task:0 while calling /tensorflow.WorkerService/CompleteInstance:\n",
        "worker 0",
    ),
]


@pytest.mark.parametrize(("text", "name"), ABORTED)
def test_the_loss_of_another_worker_is_one_line(text, name):
    message = f"{name} is gone or cannot be reached.*same command on every worker"
    said = str(lost_worker(tf.errors.UnavailableError(None, None, text)))
    assert re.search(message, said)
    assert "\n" not in said


def test_other_errors_of_a_worker_are_its_own():
    damaged = "Collective ops is aborted by: /job:worker/task:0: assertion failed: [DataError: train-0: fetch it again]"
    assert lost_worker(tf.errors.UnavailableError(None, None, damaged)) is None


@tf.function
def _of_no_device(rows):
    return tf.reduce_sum(tf.zeros((rows, 1 << 20)))


@tf.function(jit_compile=True)
def _of_no_compiled_device(value=1.0):
    return tf.linalg.matmul(tf.zeros((1 << 22, 1 << 20)) + value, tf.zeros((1 << 20, 8)) + value)


def _of_no_object():
    raise MemoryError


@pytest.mark.parametrize(
    ("asks", "cause"),
    [
        pytest.param(_of_no_compiled_device, "Out of memory while trying to allocate 17592", marks=pytest.mark.long),
        (lambda: np.ones(1 << 45), "Unable to allocate 256. TiB"),
        (_of_no_object, "the host has no more"),
    ],
    ids=["compiled", "NumPy", "Python"],
)
def test_memory_that_is_not_there_is_one_line(asks, cause):
    with pytest.raises((tf.errors.ResourceExhaustedError, MemoryError)) as caught:
        asks()
    said = str(out_of_memory(caught.value))
    assert said.startswith(f"out of memory ({cause}")
    assert "train.microbatch_size" in said
    assert "\n" not in said


def test_a_tool_says_memory_where_tensorflow_lacks_it(capsys):
    def work():
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[64,112,112,64]")

    assert terminal.exit_code(work, "nothing is lost", "check space and permissions") == RunError.exit_code
    assert capsys.readouterr().err == "error: out of memory; nothing is lost: free some, and start it again\n"


def test_a_full_disk_is_not_memory():
    assert out_of_memory(tf.errors.ResourceExhaustedError(None, None, "No space left on device")) is None
    assert out_of_memory(ValueError("out of memory")) is None


def test_a_run_without_memory_ends_in_one_line(tmp_path, capfd, monkeypatch):
    at_update(monkeypatch, 2, lambda: _of_no_device(tf.constant(1 << 24)))
    assert the_error(capfd, *SHORT, f"--model_dir={tmp_path}").startswith("error: out of memory (OOM when")


@pytest.mark.long
def test_a_network_without_memory_ends_in_one_line(tmp_path, capfd):
    said = the_error(capfd, "--gin_param=model.width=1000000000", f"--model_dir={tmp_path / 'run'}")
    assert said.startswith("error: out of memory (OOM when")
    assert not (tmp_path / "run").exists()
