"""Slices of several hosts without a TPU: conadv-tpu-worker as real processes, and a run over their CPUs."""

import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fast_python
import pytest
import tensorflow as tf
from commands import ROOT, command, free_ports, train, weights
from record_data import flip_byte, make_folder, numbered, payloads, write
from test_bad_data import replace_record

from conadv_tf.errors import ConfigError, RunError
from conadv_tf.run import hosts, tpu_runtime, tpu_worker
from conadv_tf.run.strategy import make_strategy

OF_A_SLICE = ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_HOSTNAME_OVERRIDE")


class Worker:
    """`conadv-tpu-worker --cpu_devices=2` in a folder of its own, serving."""

    def __init__(self, folder: Path, port: int):
        self.port, self.log = port, folder.parent / f"{folder.name}.log"
        line = [sys.executable, "-m", "conadv_tf.run.tpu_worker", "--cpu_devices=2", f"--port={port}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_it_serves(self) -> "Worker":
        while "serving 2 CPUs, for a rehearsal, at grpc://localhost:" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        return self

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


class Slice:
    """Two hosts, each a worker in a folder of its own; the process that drives them works in the first one's."""

    def __init__(self, folder: Path):
        self.folders = [folder / "first", folder / "second"]
        for own in self.folders:
            (own / "records").mkdir(parents=True)
        self.ports = free_ports(2)
        self.workers = [Worker(*place) for place in zip(self.folders, self.ports, strict=True)]
        for worker in self.workers:
            worker.wait_until_it_serves()

    @property
    def flags(self) -> list[str]:
        addresses = ",".join(f"grpc://localhost:{port}" for port in self.ports)
        return ["--strategy=rehearsal", f"--tpu={addresses}"]

    def restart(self, number: int) -> None:
        self.workers[number] = Worker(self.folders[number], self.ports[number]).wait_until_it_serves()

    def end(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture
def pod(tmp_path):
    started = Slice(tmp_path)
    yield started
    started.end()


def share_records(first: Path, second: Path) -> None:
    """Gives each host its share, every second file; one record of the second host's is bad.

    The first host has all names, for the process that drives looks up the places of all records; in its copies of the
    second host's share every record is damaged.
    """
    make_folder(first, (24, 24, 24, 24), size=8)
    write(first / "validation-00000-of-00002", numbered(4, size=8))
    (first / "validation-00000-of-00001").rename(first / "validation-00001-of-00002")
    replace_record(first / "train-00001-of-00004", 2, b"no picture", 26)
    for name in ("train-00001-of-00004", "train-00003-of-00004", "validation-00001-of-00002"):
        shutil.copy(first / name, second / name)
        for record in range(len(payloads(first / name))):
            flip_byte(first / name, record, 30)


STREAMED = {
    "data.source": "tfrecords",
    "data.max_bad_records": 1,
    "tfrecords.in_memory": False,
    "tfrecords.image_size": 8,
    "tfrecords.num_classes": 100,
    "model.name": "cifar_resnet8",
    "train.method": "vanilla",
    "train.global_batch_size": 16,
    "train.microbatch_size": 4,
    "train.epochs": 6,
    "train.evaluate_every_epochs": 6,
    "learning_rate.warmup_epochs": 1,
}


def run_line(pod: Slice) -> list[str]:
    """The command line of a run over the slice; every path is in the folder of the process that looks."""
    bindings = [f"--gin_param={name}={value!r}" for name, value in STREAMED.items()]
    places = ["--data_dir=/proc/self/cwd/records", "--model_dir=/proc/self/cwd/run"]
    return command(*pod.flags, *places, *bindings, python=fast_python.path())


def start(pod: Slice) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(run_line(pod), cwd=pod.folders[0], **pipes)


@pytest.mark.long
def test_a_run_over_two_hosts_is_lost_with_one_of_them_and_goes_on(pod):
    """Each host reads its own share, where nothing of ours runs in Python; the first one writes the checkpoints.

    Fault seen caught: a run whose worker was killed waited for ever, or ended with a traceback that named none.
    """
    share_records(*(folder / "records" for folder in pod.folders))
    run = start(pod)
    while not list(pod.folders[0].glob("run/checkpoints/ckpt-*.index")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    pod.workers[1].process.kill()
    began = time.monotonic()
    _, errors = run.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert run.returncode == 1, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]  # TensorFlow logs more
    assert line.startswith(f"error: worker 1 of 2, at localhost:{pod.ports[1]}, is gone: look at its log, start it")
    alone = subprocess.run(run_line(pod), cwd=pod.folders[0], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 1
    assert f"error: worker 1 of 2, at localhost:{pod.ports[1]}, does not answer" in alone.stderr
    pod.restart(1)
    output, errors = start(pod).communicate(timeout=200)
    assert "resuming /proc/self/cwd/run after epoch" in output, errors
    assert "1 bad record" in output
    assert "train-00001-of-00004" in output
    metrics = [json.loads(line) for line in (pod.folders[0] / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == list(range(1, 7))
    assert weights(pod.folders[0] / "run")
    assert [path.name for path in pod.folders[1].iterdir()] == ["records"]


@pytest.mark.long
def test_a_run_over_two_hosts_equals_one_over_as_many_replicas_of_one_process(pod):
    """Metrics of every epoch: inputs, gradients, statistics and stale weights are those of one process."""
    layout = ["train.epochs=2", "learning_rate.warmup_epochs=1", "train.global_batch_size=108"]
    flags = [f"--gin_param={binding}" for binding in (*layout, "train.microbatch_size=27")]
    mirrored = ["--strategy=mirrored", "--gin_param=mirrored.logical_cpus=4"]
    runs = {
        "two": train(*flags, *pod.flags, f"--model_dir={pod.folders[0] / 'two'}"),
        "one": train(*flags, *mirrored, f"--model_dir={pod.folders[0] / 'one'}"),
    }
    metrics = {}
    for name, run in runs.items():
        assert run.returncode == 0, run.stderr
        lines = (pod.folders[0] / name / "metrics.jsonl").read_text().splitlines()
        metrics[name] = [json.loads(line) for line in lines]
    for two, one in zip(*metrics.values(), strict=True):
        for name in ("loss", "adversarial_loss", "gradient_norm", "drift", "test_loss", "test_top1"):
            assert two[name] == pytest.approx(one[name], rel=2e-4), name
    assert [worker.end(signal.SIGTERM) for worker in pod.workers] == [0, 0]
    assert all(worker.log.read_text().endswith("stopped\n") for worker in pod.workers)


ATTRIBUTES = {
    "agent-worker-number": "2",
    "worker-network-endpoints": ",".join(f"unknown:unknown:10.0.0.{number}" for number in (7, 8, 9, 10)),
}


class Metadata(http.server.BaseHTTPRequestHandler):
    """The server that a machine of Google Cloud asks about itself; the third of four hosts asks."""

    def do_GET(self):
        asked = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        known = self.headers["Metadata-Flavor"] == "Google" and asked in ATTRIBUTES
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(ATTRIBUTES[asked].encode() if known else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    for name in (*OF_A_SLICE, "TPU_TASK_PORT"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
        yield monkeypatch
        server.shutdown()


def test_a_host_finds_its_place_in_the_slice(metadata):
    addresses = "10.0.0.7,10.0.0.8,10.0.0.9,10.0.0.10"
    assert tpu_worker.place_in_slice() == dict(zip(OF_A_SLICE, ("2", addresses, "10.0.0.9"), strict=True))
    metadata.setenv("TPU_WORKER_ID", "0")
    metadata.setenv("TPU_WORKER_HOSTNAMES", "pod-0.svc,pod-1.svc")
    assert tpu_worker.place_in_slice() == dict(zip(OF_A_SLICE, ("0", "pod-0.svc,pod-1.svc", "pod-0.svc"), strict=True))
    metadata.setenv("TPU_WORKER_ID", "4")
    with pytest.raises(RunError, match=r"worker '4' is none of the slice's hosts pod-0\.svc,pod-1\.svc: correct"):
        tpu_worker.place_in_slice()


def test_a_machine_that_knows_no_slice_is_said(metadata):
    metadata.delitem(ATTRIBUTES, "agent-worker-number")
    with pytest.raises(RunError, match=r"does not say agent-worker-number of this machine .* rehearse with --cpu_dev"):
        tpu_worker.place_in_slice()


def test_a_host_of_a_v6e_serves_with_what_the_library_needs(metadata, tmp_path):
    """Everything short of the chip: the variables, set before TensorFlow is asked for devices, and the port."""
    library = tmp_path / "libtpu.so"
    needed = {"PJRT_DEVICE": "TPU", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": str(library)}
    for name in needed:
        metadata.delenv(name, raising=False)
    metadata.setattr(tpu_runtime, "variables", lambda generation: needed if generation == "v6e" else {})
    served = {}

    def serve(port, cpu_devices):
        served.update({name: os.environ.get(name) for name in (*needed, *OF_A_SLICE)}, port=port, cpus=cpu_devices)
        raise OSError("that is enough")

    metadata.setattr(tpu_worker, "serve", serve)
    metadata.setattr(os, "environ", dict(os.environ))
    assert tpu_worker.main(["--type=v6e-16"]) == 1
    place = {"TPU_WORKER_ID": "2", "TPU_HOSTNAME_OVERRIDE": "10.0.0.9"}
    assert served.items() >= (needed | place | {"port": 8470, "cpus": 0}).items()
    for name in (*OF_A_SLICE, *needed):  # empty, as Kubernetes and shells write what they do not know: as if unset
        os.environ[name] = ""
    assert tpu_worker.main(["--type=v6e-16"]) == 1
    assert served.items() >= (needed | place).items()
    os.environ |= {name: "mine" for name in (*OF_A_SLICE[2:], *needed)}
    assert tpu_worker.main(["--type=v6e-16"]) == 1
    assert {served[name] for name in (*OF_A_SLICE[2:], *needed)} == {"mine"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--type=v3-32"], 2, "TensorFlow's own, start_grpc_tpu_worker, is for v2 to v4"),
        (["--type=pod"], 2, "--type=pod is no type of a slice"),
        (["--cpu_devices=0"], 2, "--cpu_devices=0 must be a whole number of at least 1"),
        (["--cpu_devices=2", "--type=v6e-16"], 2, "not allowed with argument"),
        ([], 2, "one of the arguments --type --cpu_devices is required"),
    ],
)
def test_a_worker_that_cannot_serve_says_why_on_one_line(arguments, code, said, capsys):
    assert tpu_worker.main(arguments) == code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert said in errors


def test_a_port_in_use_is_not_shared(capsys):
    with socket.create_server(("", 0)) as held:
        assert tpu_worker.main(["--cpu_devices=2", f"--port={held.getsockname()[1]}"]) == 1
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["rehearsal", "tpu"])
def test_the_worker_that_is_missing_is_named(strategy):
    """Fault seen caught: only the first host was looked for; TensorFlow waits for the others without an end."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        missing = free_ports(1)[0]
        tpu = f"grpc://127.0.0.1:{there.getsockname()[1]},grpc://127.0.0.1:{missing}"
        with pytest.raises(RunError) as caught:
            make_strategy(strategy, tpu)
    place = f"worker 1 of 2, at 127.0.0.1:{missing}, does not answer"
    assert place in str(caught.value)
    assert "start it there" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tpu", [None, "local", "v3-32", "pod"])
def test_a_rehearsal_without_workers_says_how_to_start_some(tpu):
    with pytest.raises(ConfigError, match=r"needs the addresses of workers.*start conadv-tpu-worker --cpu_devices=N"):
        make_strategy("rehearsal", tpu)


def test_workers_of_different_sizes_are_refused(monkeypatch):
    names = [f"/job:worker/replica:0/task:{task}/device:CPU:{cpu}" for task, cpu in ((0, 0), (0, 1), (1, 0))]
    devices = [tf.config.LogicalDevice(name, "CPU") for name in names]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: devices)
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu="grpc://a,grpc://b")
    with pytest.raises(ConfigError, match="the workers have 2, 1 CPUs: start each with the same"):
        hosts.RehearsalStrategy(resolver)


def test_an_error_that_is_not_a_workers_passes():
    with pytest.raises(ZeroDivisionError), hosts.watched(tf.distribute.OneDeviceStrategy("CPU:0")):
        _ = 1 / 0


class Driven:
    """What `hosts.watched` asks of a strategy, over workers at some ports."""

    def __init__(self, *ports: int):
        addresses = ",".join(f"grpc://127.0.0.1:{port}" for port in ports)
        self.cluster_resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=addresses)


UNAVAILABLE = tf.errors.UnavailableError(None, None, "Socket closed")


def test_what_a_lost_worker_causes_names_the_worker(monkeypatch):
    """Faults seen caught: "cannot write a checkpoint: make room"; a traceback, as the worker's port closed last."""
    monkeypatch.setattr(hosts, "CLOSING_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as there:
        port, gone = there.getsockname()[1], free_ports(1)[0]
        for error in (UNAVAILABLE, RunError("cannot write a checkpoint to runs: make room"), ValueError("no shape")):
            named = rf"^worker 1 of 2, at 127\.0\.0\.1:{gone}, is gone"
            with pytest.raises(RunError, match=named) as caught, hosts.watched(Driven(port, gone)):
                raise error
            assert caught.value.__cause__ is error
        said = r"^the connection to a worker was lost, and all 1 answer \(Socket closed"
        with pytest.raises(RunError, match=said), hosts.watched(Driven(port)):
            raise UNAVAILABLE
        with pytest.raises(ValueError, match="no shape"), hosts.watched(Driven(port)):
            raise ValueError("no shape")


WATCHING = """
import sys, time
from conadv_tf import peers
with peers.watched(sys.argv[1:], lambda place: f"{place} is gone", patience_seconds=0.3):
    print("watching", flush=True)
    time.sleep(60)
"""


def test_a_process_that_waits_ends_with_the_worker_it_waits_for():
    with socket.create_server(("127.0.0.1", 0)) as stays, socket.create_server(("127.0.0.1", 0)) as goes:
        addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in (stays, goes)]
        line = [sys.executable, "-c", WATCHING, *addresses]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
        assert process.stdout.readline() == "watching\n"
        goes.close()
        assert process.communicate(timeout=20)[1] == "error: 1 is gone\n"
    assert process.returncode == 1


def test_a_port_in_the_environment_that_is_none_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("TPU_TASK_PORT", "eight")
    assert tpu_worker.main(["--cpu_devices=1"]) == 2
    assert capsys.readouterr().err == (
        "error: argument --port: invalid int value: 'eight' (--help lists the arguments)\n"
    )
