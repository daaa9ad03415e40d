"""The command line, in this process and in others, and what it leaves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fast_python
import numpy as np
import tensorflow as tf
from absl import flags as flags_module
from absl.testing import flagsaver

from conadv_tf import cli

ROOT = Path(__file__).parents[1]
SHORT = ["--gin_param=train.epochs=6", "--gin_param=learning_rate.warmup_epochs=1"]


def command(*flags: str, python: str = sys.executable) -> list[str]:
    """The command line of train.py. Where the process is killed or named, it has to be python's own."""
    return [python, str(ROOT / "train.py"), *flags]


def train(*flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    line = command(*flags, python=fast_python.path())
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def call_command_line(*flags: str) -> None:
    """The command line inside this process: as a subprocess each mistake would cost an import of TensorFlow."""
    with flagsaver.flagsaver():
        flags_module.FLAGS.unparse_flags()
        cli.run_command_line(["train.py", *flags])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for number in sockets:
        number.bind(("127.0.0.1", 0))
    ports = [number.getsockname()[1] for number in sockets]
    for number in sockets:
        number.close()
    return ports


def workers(*flags: str, python: str = sys.executable) -> list[subprocess.Popen]:
    """Two workers that train, each a process on this machine; see `command`."""
    return workers_of(command(*flags, "--strategy=multiworker", python=python))


def workers_of(line: list[str]) -> list[subprocess.Popen]:
    """Two workers on this machine, which both run a command line."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    environments = [
        {**os.environ, "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})}
        for index in range(2)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen(line, cwd=ROOT, env=env, text=True, **pipes) for env in environments]


def weights(model_dir: Path) -> dict[str, np.ndarray]:
    """Every number of the newest checkpoint, but for how often one was saved."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(model_dir / "checkpoints")))
    names = [name for name in reader.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    return {name: reader.get_tensor(name) for name in names if not name.startswith("save_counter")}
