"""Several workers, each a process on this machine."""

import json
import re
import signal
import time

import fast_python
import numpy as np
import pytest
from commands import train, weights, workers, workers_of
from helpers import make_model, some_of

from conadv_tf import methods
from conadv_tf.run.checkpoint import Checkpoints


@pytest.mark.parametrize("rows", some_of([54, 27], long=[27]))
def test_two_workers_equal_two_replicas_of_one_process(rows, tmp_path):
    """With one and with two micro-batches a worker; the first worker alone keeps the files."""
    layout = ["--gin_param=train.global_batch_size=108", f"--gin_param=train.microbatch_size={rows}"]
    layout += ["--gin_param=train.epochs=3", "--gin_param=learning_rate.warmup_epochs=1"]
    processes = workers(*layout, f"--model_dir={tmp_path / 'two'}", python=fast_python.path())
    one = train(*layout, "--strategy=mirrored", f"--model_dir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    for two, single in zip(*metrics, strict=True):
        for name in ("loss", "adversarial_loss", "gradient_norm", "drift", "test_loss", "test_top1"):
            assert two[name] == pytest.approx(single[name], rel=2e-4), name
    pair, single_process = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in single_process:
        np.testing.assert_allclose(pair[name], single_process[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_worker_that_waits_for_another_says_so_and_can_be_ended(tmp_path):
    alone, other = workers(f"--model_dir={tmp_path}")
    other.kill()
    other.wait()
    try:
        assert re.fullmatch(r"waiting for 127.0.0.1:\d+: start the same command there\n", alone.stdout.readline())
        time.sleep(3)  # by then it waits within TensorFlow
        alone.send_signal(signal.SIGINT)
        assert alone.wait(timeout=10) == -signal.SIGINT
    finally:
        alone.kill()


# A worker that restores what it sees: the second one has a folder of its own, as where the disk is not shared.
RESTORES = """
import sys
sys.path.insert(0, "tests")
from helpers import make_model
from conadv_tf import methods
from conadv_tf.errors import RunError
from conadv_tf.run.checkpoint import Checkpoints
from conadv_tf.run.strategy import is_chief, make_strategy

strategy = make_strategy("multiworker")
model = make_model(methods.vanilla(), strategy=strategy, branches=("main",))
chief = is_chief(strategy)
folders = [sys.argv[1], sys.argv[1] + ("" if chief else "-own")]
print(Checkpoints(model, folders[0]).restore(), flush=True)
try:
    Checkpoints(model, folders[1]).restore()
except RunError as error:
    print(error, flush=True)
"""


DIFFERENT = (
    "the workers have checkpoints after 0 and 2 updates to go on from: let all of them see the same --model_dir, and "
    "start the same command on every worker"
)


def test_workers_that_restore_different_checkpoints_end(tmp_path):
    """They would train on different weights, or wait for each other."""
    Checkpoints(make_model(methods.vanilla(), branches=("main",)), str(tmp_path / "run")).save()
    for file in (tmp_path / "run").glob("ckpt-0.*"):
        file.rename(file.with_name(file.name.replace("ckpt-0", "ckpt-2")))
    (tmp_path / "run" / "checkpoint").unlink()
    processes = workers_of([fast_python.path(), "-c", RESTORES, str(tmp_path / "run")])
    for process in processes:
        output, errors = process.communicate(timeout=120)
        _, *lines = output.splitlines()
        assert lines == ["0", DIFFERENT], errors  # the first weights, by whatever name
        assert "eagerly" not in errors
