"""stream.service: batches made by processes of their own, on this machine, are those made here."""

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fast_python
import numpy as np
import pytest
import tensorflow as tf
from record_data import flip_byte, load, make_folder, stream, take

from conadv_tf import data
from conadv_tf.data import service as data_service
from conadv_tf.errors import ConfigError, DataError, data_error

ROOT = Path(__file__).parents[1]
AUGMENTED = {"augmentation": "resized_crop_flip", "autoaugment": "imagenet", "autoaugment_mode": "concat3"}


def free_ports() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.create_server(("localhost", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("localhost", port + 1)).close()
                return port
            except OSError:
                continue


class Process:
    """`conadv-data-service`, serving."""

    def __init__(self, folder: Path, port: int | None = None, python: str = sys.executable):
        self.port = port or free_ports()
        self.log = folder / f"service-{self.port}"
        command = [python, "-m", "conadv_tf.data.service", f"--address=localhost:{self.port}"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while "serving at" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    @property
    def address(self) -> str:
        return f"grpc://localhost:{self.port}"

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    started = [Process(tmp_path_factory.mktemp("services"), python=fast_python.path()) for _ in range(2)]
    yield ",".join(process.address for process in started)
    gc.collect()  # a stream that is left over would say on stderr, in another test, that its service is gone
    assert [process.end(signal.SIGTERM) for process in started] == [0, 0]
    assert all(process.log.read_text().endswith("stopped\n") for process in started)


@pytest.mark.parametrize(("hosts", "host"), [(1, 0), pytest.param(2, 1, marks=pytest.mark.long)])
def test_batches_are_the_same(tmp_path, services, hosts, host):
    flip_byte(make_folder(tmp_path) / "train-00001-of-00003", 2)
    settings = {"augmentation": "resized_crop_flip"}
    here, there = stream(tmp_path, **settings), stream(tmp_path, service=services, **settings)
    for start in (0, 12):
        batches = [loaded.train_batches(3, hosts, start, 5, hosts, host) for loaded in (here, there)]
        for one, other in zip(*(take(some, 15) for some in batches), strict=True):
            np.testing.assert_array_equal(one, other)
    assert there.bad_records.reasons == here.bad_records.reasons
    assert there.bad_records.count == 1


@pytest.mark.long
def test_autoaugment_is_served(tmp_path, services):
    loaded = [stream(make_folder(tmp_path), service=service, **AUGMENTED) for service in (None, services.split(",")[0])]
    for one, other in zip(*(take(some.train_batches(3, 1), 4) for some in loaded), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_label_out_of_range_and_too_many_bad_records_are_said(tmp_path, services):
    path = make_folder(tmp_path) / "train-00001-of-00003"
    with pytest.raises(tf.errors.OpError) as caught:
        take(stream(tmp_path, service=services, num_classes=20).train_batches(7, 1), 3)
    assert "label 20 minus tfrecords.label_offset=0 is 20, not in 0..19" in str(data_error(caught.value))
    flip_byte(path, 2)
    with pytest.raises(tf.errors.OpError) as caught:
        take(stream(tmp_path, service=services, max_bad_records=0).train_batches(7, 1), 3)
    assert f"{path}, record 2: unreadable (corrupted record" in str(data_error(caught.value))


@pytest.mark.long
def test_a_service_that_is_started_anew_ends_the_run_in_one_line(tmp_path):
    process = Process(tmp_path)
    batches = stream(make_folder(tmp_path), service=process.address).train_batches(3, 1)
    iterator = iter(batches)
    next(iterator)
    process.end(signal.SIGKILL)
    again = Process(tmp_path, process.port)
    with pytest.raises(tf.errors.OpError) as caught:
        list(iterator)
    assert "stream.service: one of its processes was started anew" in str(data_error(caught.value))
    again.end(signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="names a thread by its entry in /proc")
def test_a_signal_that_one_of_tensorflows_threads_receives_ends_it_too(tmp_path):
    process = Process(tmp_path).process
    threads = {int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()}
    os.kill(max(threads - {process.pid}), signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.long
def test_a_service_that_ends_ends_the_run_in_one_line(tmp_path):
    process = Process(tmp_path)
    program = f"""
import os, signal
from conadv_tf import data
from conadv_tf.data import service as data_service
loaded = data.load("tfrecords", data_dir={str(make_folder(tmp_path))!r}, num_classes=1000, in_memory=False,
    image_size=8, service={process.address!r})
with data_service.watched(["localhost:{process.port}"], patience_seconds=3):
    iterator = iter(loaded.train_batches(3, 1))
    next(iterator)
    os.kill({process.process.pid}, signal.SIGKILL)
    while True:
        next(iterator)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    process.process.wait(30)
    assert outcome.returncode == 1
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{process.address} does not answer: start it there with conadv-data-service" in errors[0]
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_in_use_is_said_in_one_line(taken, tmp_path, capsys):
    with socket.create_server(("", free_ports())) as held:
        port = held.getsockname()[1] - taken
        assert data_service.main([f"--address=localhost:{port}"]) == 1
    assert re.fullmatch(
        rf"error: cannot serve at localhost:{port} \(.*\): choose another port\n", capsys.readouterr().err
    )


def test_a_port_of_another_data_service_is_not_shared(services):
    address = services.split(",")[0].removeprefix("grpc://")
    outcome = subprocess.run(
        [fast_python.path(), "-m", "conadv_tf.data.service", f"--address={address}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 1
    assert f"error: cannot serve at {address}" in outcome.stderr


def test_an_address_where_nobody_listens_is_said_at_once(tmp_path):
    make_folder(tmp_path)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"grpc://localhost:\d+ does not answer: start it there with"):
        stream(tmp_path, service=f"grpc://localhost:{free_ports()}")
    with pytest.raises(DataError, match=r"grpc://a\.\.b:5050 does not answer"):
        stream(tmp_path, service="grpc://a..b:5050")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("service", ["localhost", "grpc://a:http", "grpc://:80", "http://a:80", "a:1,", "a:65535"])
def test_what_is_no_address(tmp_path, service):
    with pytest.raises(ConfigError, match=r"is no address: write grpc://HOST:PORT"):
        stream(make_folder(tmp_path), service=service)


def test_where_a_service_makes_no_sense(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"service='grpc://a:1' is for streamed files: drop it"):
        load(tmp_path, service="grpc://a:1")
    with pytest.raises(ConfigError, match=r"stream.cache='memory' with stream.service='grpc://a:1'"):
        stream(tmp_path, service="grpc://a:1", cache="memory")
    with pytest.raises(ConfigError, match=r"service='grpc://a:1' is no setting of data.source='synthetic'"):
        data.load("synthetic", image_size=8, service="grpc://a:1")


def test_services_are_divided_over_the_hosts():
    services = [f"s{i}" for i in range(4)]
    assert [data_service.of_host(services, 2, host) for host in range(2)] == [["s0", "s2"], ["s1", "s3"]]
    assert [data_service.of_host(services, 8, host) for host in (0, 3, 4)] == [["s0"], ["s3"], ["s0"]]
    assert list(data_service.of_host([], 3, 1)) == []
    with pytest.raises(ConfigError, match=r"4 addresses for 3 input hosts: give a multiple or a divisor of 3"):
        data_service.of_host(services, 3, 0)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--address=nowhere"], 2)])
def test_flags_of_the_service(arguments, code, capsys):
    with pytest.raises(SystemExit) as caught:
        data_service.main(arguments)
    assert caught.value.code == code
    assert "--address" in capsys.readouterr().err
