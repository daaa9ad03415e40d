"""tpu_scripts/host/ through the scripts that call it: gcloud's ssh is bash in a folder, the home of a host."""

import configparser
import socket
import sys
import time
from pathlib import Path

import pytest
from fake_cloud import PLACE, ROOT, TRAIN, Cloud, assert_refused
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

NASTY = (
    "a b",
    "it's",
    '"quoted"',
    "$(touch injected)",
    "`touch injected`",
    "x;touch injected",
    "*",
    "a\nb",
    "ε=4",
    "\\",
)

LIBRARY = ".venv/lib/python3.10/site-packages/libtpu/libtpu.so"
# It prints the variables of a TPU as the package does, for a libtpu that is none.
HOST_PYTHON = rf"""#!/usr/bin/env bash
# Makes .venv of programs that record how they are called.
if [[ $1$2 == -mvenv ]]; then
  mkdir -p .venv/bin .venv/lib/python3.10/site-packages/libtpu
  touch .venv/lib/python3.10/site-packages/libtpu/{{libtpu.so,__init__.py}}
  cp "$0" .venv/bin/python
  for name in start_grpc_tpu_worker conadv-tpu-worker; do cp "$FAKE_CLOUD/worker" ".venv/bin/$name"; done
  exit
fi
if [[ $1$2 == -mconadv_tf.run.tpu_runtime ]]; then
  PYTHONPATH="$PWD/.venv/lib/python3.10/site-packages" exec {sys.executable} "$@"
fi
environment=("${{TPU_NAME-}}" "${{TPU_LOAD_LIBRARY-}}" "${{TF_PLUGGABLE_DEVICE_LIBRARY_PATH-}}")
{{ printf '%s\0' "${{environment[@]}}" "$@"; printf '\x1e\0'; }} >> python_calls
case "$*" in
  *--editable*) cp .venv/bin/python .venv/bin/conadv-train ;;
  *"epochs=none"*) echo "error: train.epochs=none" >&2; exit 2 ;;
  "-u train.py"*) for ((i = 0; i < 200; i++)); do [[ ! -e stop ]] || exit 0; sleep 0.1; done ;;
esac
"""
WORKER = f"""#!{sys.executable} -S
import os, socket, sys, time
open("worker_programs", "a").write(" ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
names = "TPU_LIBRARY_PATH", "PJRT_DEVICE", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH"
open("worker_starts", "a").write(" ".join(os.environ.get(name, "-") for name in names) + "\\n")
server = socket.create_server(("localhost", int(os.environ["TPU_TASK_PORT"])))
for _ in range(200):
    time.sleep(0.1)
    if os.path.exists("stop"):
        break
"""


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture
def host(cloud, monkeypatch):
    """The checkout's folder on a host that create.sh has made."""
    with socket.create_server(("localhost", 0)) as free:
        monkeypatch.setenv("TPU_TASK_PORT", str(free.getsockname()[1]))
    (cloud.folder / "home").mkdir()
    (cloud.folder / "worker").write_text(WORKER)
    (cloud.folder / "worker").chmod(0o755)
    cloud.program("python3", HOST_PYTHON)
    cloud.set(tpu_vm="READY")
    folder = cloud.folder / "home" / "conadv_tf"
    yield folder
    if folder.exists():
        (folder / "stop").touch()


def python_calls(host: Path) -> list[list[str]]:
    return [record.split("\0") for record in (host / "python_calls").read_text().split("\0\x1e\0")[:-1]]


def training_calls(host: Path) -> list[list[str]]:
    """The calls of train.py, once the detached one is among them."""
    for _ in range(100):
        found = [call for call in python_calls(host) if "train.py" in call]
        if any("-u" in call for call in found):
            return found
        time.sleep(0.1)
    raise AssertionError((host / "train.log").read_text())


def test_setup_installs_the_checkout_on_the_host(cloud, host):
    for _ in range(2):
        outcome = cloud.run("setup", *PLACE)
        assert outcome.returncode == 0, outcome.stderr
        assert not (host / "gin" / "stale.gin").exists()
        (host / "gin" / "stale.gin").touch()
    for name in ("train.py", "setup.cfg", "conadv_tf/__init__.py", "gin/96k_conadv.gin", "tpu_scripts/run.sh"):
        assert (host / name).read_bytes() == (cloud.checkout / name).read_bytes()
    installs = [call[3:] for call in python_calls(host) if "-r" in call or "--editable" in call][:3]
    pip = ["-m", "pip", "install", "--quiet"]
    assert installs == [
        [*pip, "-r", "tpu_scripts/host/requirements.txt"],
        [*pip, "--no-deps", "-r", "tpu_scripts/host/requirements_no_deps.txt"],
        [*pip, "--no-deps", "--editable", "."],
    ]
    assert python_calls(host)[4][1] == "0", "the check of the installation must not claim the TPU"


def test_run_drives_a_slice_from_one_process_with_its_flags_intact(cloud, host):
    cloud.run("setup", *PLACE)
    flags = [*TRAIN, *(f"--gin_param={value}" for value in NASTY)]
    outcome = cloud.run("run", *PLACE, "--", *flags)
    assert outcome.returncode == 0, outcome.stderr
    # Nothing of the TPU's library for the process that drives; TPU_NAME leads it to the workers.
    assert training_calls(host) == [
        ["pod", "0", "", "train.py", *flags, "--preflight"],
        ["pod", "0", "", "-u", "train.py", *flags],
    ]
    assert not list(cloud.folder.rglob("injected"))
    (variables,) = (host / "worker_starts").read_text().splitlines()
    assert variables == f"{host / LIBRARY} - -"
    workers, first = cloud.changes()[-2:]
    assert "--worker=all" in workers
    assert "--worker=0" in first
    again = cloud.run("run", *PLACE, "--", *flags)
    assert again.returncode == 1
    assert "error: training runs on pod already" in again.stderr
    assert len((host / "worker_starts").read_text().splitlines()) == 1
    running = host / "gin" / "of_the_run.gin"
    running.touch()
    replaced = cloud.run("setup", *PLACE)
    assert replaced.returncode == 1
    assert "error: training runs on this host, and the code under it would change: wait for it" in replaced.stderr
    assert running.exists()  # seen to fail: it was removed
    resumed = cloud.run("resume", *PLACE, "--type=v3-512", "--", *TRAIN)
    assert resumed.stdout.startswith("training runs on pod: nothing to do"), resumed.stderr


@pytest.mark.parametrize(
    ("slice_type", "program"),
    [("v5litepod-16", "start_grpc_tpu_worker"), ("v6e-16", "conadv-tpu-worker --type=v6e-16")],
)
def test_the_workers_of_a_new_slice_drive_it_through_pjrt_and_its_driver_does_not(cloud, host, slice_type, program):
    """Faults seen caught: the process that drives the workers of a v5e loaded the TPU's library as well; v6e has none
    of TensorFlow's."""
    cloud.set(type=slice_type)
    cloud.run("setup", *PLACE)
    outcome = cloud.run("run", *PLACE, "--", f"--tpu={slice_type}", "--model_dir=gs://bucket/run")
    assert outcome.returncode == 0, outcome.stderr
    assert (host / "worker_starts").read_text() == f"{host / LIBRARY} TPU {host / LIBRARY}\n"
    assert (host / "worker_programs").read_text() == f"{program}\n"
    assert [call[:3] for call in training_calls(host)] == [["pod", "0", ""]] * 2


def test_run_on_one_host_needs_no_worker(cloud, host):
    """Nor any variable: train.py sets them (test_tpu_runtime.py)."""
    cloud.set(type="v5litepod-8")
    cloud.run("setup", *PLACE)
    outcome = cloud.run("run", *PLACE, "--", "--tpu=v5litepod-8", "--model_dir=gs://bucket/run")
    assert outcome.returncode == 0, outcome.stderr
    assert [call[:3] for call in training_calls(host)] == [["local", "", ""]] * 2
    assert not (host / "worker_starts").exists()


def test_a_host_without_libtpu_is_said(cloud, host):
    cloud.run("setup", *PLACE)
    (host / LIBRARY).unlink()
    outcome = cloud.shell(["bash", str(host / "tpu_scripts/host/worker.sh"), "v5litepod-16", "1"])
    assert_refused(outcome, 1, "the TPU's library is not installed", "pip install")


def test_run_refuses_settings_that_train_refuses_and_hosts_without_setup(cloud, host):
    cloud.set(type="v3-8")
    flags = (*PLACE, "--", "--tpu=v3-8", "--model_dir=gs://bucket/run", "--gin_param=train.epochs=none")
    outcome = cloud.run("run", *flags)
    assert_refused(outcome, 1, "not set up", "tpu_scripts/setup.sh")
    cloud.run("setup", *PLACE)
    assert_refused(cloud.run("run", *flags), 2, "train.epochs=none")
    assert [call[-1] for call in python_calls(host) if "train.py" in call] == ["--preflight"]


def test_worker_that_does_not_listen_is_said(cloud, host):
    cloud.run("setup", *PLACE)
    (host / ".venv/bin/start_grpc_tpu_worker").write_text("#!/bin/sh\necho no metadata server\n")
    outcome = cloud.shell(["bash", str(host / "tpu_scripts/host/worker.sh"), "v3-32", "1"])
    assert_refused(outcome, 1, "no TPU worker listens", "no metadata server")


def test_requirements_of_the_hosts_are_those_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    hosts = {}
    for name in ("requirements.txt", "requirements_no_deps.txt"):
        text = (ROOT / "tpu_scripts" / "host" / name).read_text()
        hosts |= {r.name.replace("_", "-"): r for r in map(Requirement, _uncommented(text))}
    hosts["tensorflow"] = hosts["tensorflow-tpu"]
    for wanted in map(Requirement, lines):
        installed = hosts[wanted.name.replace("_", "-")].specifier
        (first, *_) = installed
        pinned = first.operator == "==" and wanted.specifier.contains(first.version)
        assert pinned or installed == SpecifierSet(str(wanted.specifier)), wanted.name


def _uncommented(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]
