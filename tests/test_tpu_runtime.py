"""The TPU of a machine, told from folders of devices and processes and from packages that are made up."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tensorflow as tf
from commands import ROOT
from packaging.specifiers import SpecifierSet

import conadv_tf
from conadv_tf.errors import RunError
from conadv_tf.run import tpu_runtime
from conadv_tf.run.strategy import make_strategy

FITTING = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.21"}
PJRT = ("PJRT_DEVICE", "NEXT_PLUGGABLE_DEVICE_USE_C_API", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH")
OF_TENSORFLOW = (*PJRT, "TPU_LIBRARY_PATH")
OF_THE_MACHINE = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "ACCELERATOR_TYPE")
# What marks a process that has imported TensorFlow.
IMPORTED = "tensorflow"


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Machine:
    """A machine with a v5e that VFIO hands on, before TensorFlow is imported; `packages` are the installed ones."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self.root, self.patch, self.packages = root, patch, dict(FITTING)
        for name in (*OF_TENSORFLOW, *OF_THE_MACHINE):
            patch.setenv(name, "")  # so that what is set here ends with the test
            patch.delenv(name)
        touch(root / "site" / "libtpu" / "__init__.py")
        self.library = str(touch(root / "site" / "libtpu" / "libtpu.so"))
        patch.syspath_prepend(root / "site")
        patch.delitem(sys.modules, "libtpu", raising=False)
        patch.delitem(sys.modules, IMPORTED, raising=False)
        patch.setattr(tpu_runtime, "SYSTEM", root)
        patch.setattr(metadata, "version", self.version)
        self.devices("dev/vfio/0", "dev/vfio/vfio")
        self.chip("0x0063")

    def devices(self, *names: str) -> None:
        for old in [*self.root.glob("dev/*/*"), *self.root.glob("dev/*")]:
            old.rmdir() if old.is_dir() else old.unlink()
        for name in names:
            touch(self.root / name)

    def chip(self, device: str, vendor: str = "0x1ae0", slot: str = "0000:00:05.0") -> None:
        touch(self.root / "sys/bus/pci/devices" / slot / "vendor", f"{vendor}\n")
        touch(self.root / "sys/bus/pci/devices" / slot / "device", f"{device}\n")

    def version(self, package: str) -> str:
        if package not in self.packages:
            raise metadata.PackageNotFoundError(package)
        return self.packages[package]

    def has_imported_tensorflow(self) -> None:
        self.patch.setitem(sys.modules, IMPORTED, object())

    def set(self) -> dict[str, str]:
        return {name: os.environ[name] for name in OF_TENSORFLOW if os.environ.get(name)}


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("names", "chip", "expected"),
    [
        (["dev/accel0", "dev/accel1", "dev/accel13"], "0x0027", ["/dev/accel0", "/dev/accel1", "/dev/accel13"]),
        (["dev/vfio/3", "dev/vfio/vfio"], "0x006f", ["/dev/vfio/3"]),
        (["dev/vfio/3"], None, ["/dev/vfio/3"]),  # a sandbox that shows no bus
        (["dev/vfio/3"], "0x0042", []),  # Google's network card
        (["dev/vfio/vfio", "dev/accel/accel0"], "0x0063", []),
        ([], "0x0063", []),
    ],
)
def test_devices_are_found_by_pattern(machine, names, chip, expected):
    machine.devices(*names)
    if chip is None:
        shutil.rmtree(machine.root / "sys")
    else:
        machine.chip(chip)
    assert tpu_runtime.devices() == expected


@pytest.mark.parametrize(
    ("chip", "attached", "generation", "pjrt"),
    [
        ("0x0027", "", "v3", False),
        ("0x005e", "", "v4", False),
        ("0x0062", "", "v5p", True),
        ("0x0063", "", "v5e", True),
        ("0x006f", "", "v6e", True),
        ("0x0042", "v5litepod-1", "v5litepod", True),
        ("0x0042", "v3-8", "v3", False),
        ("0x0042", "", "", False),
    ],
)
def test_a_generation_gets_what_its_driver_needs(machine, chip, attached, generation, pjrt):
    machine.devices("dev/accel0")
    machine.chip(chip)
    machine.patch.setenv("TPU_ACCELERATOR_TYPE", attached)
    assert tpu_runtime.generation() == generation
    assert conadv_tf.prepare_tpu()
    library = {"TPU_LIBRARY_PATH": machine.library}
    through_pjrt = dict(zip(PJRT, ("TPU", "true", machine.library), strict=True))
    assert machine.set() == library | (through_pjrt if pjrt else {})


def test_what_is_set_already_stays(machine):
    machine.patch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/lib/libtpu.so")
    assert tpu_runtime.prepare_tpu()
    assert machine.set()["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] == "/lib/libtpu.so"
    machine.has_imported_tensorflow()
    assert tpu_runtime.prepare_tpu("v5litepod-1")  # nothing is missing


@pytest.mark.parametrize(("tpu", "name"), [("pod", ""), ("grpc://10.0.0.2:8470", ""), ("v5litepod-16", "pod")])
def test_a_tpu_that_is_reached_through_workers_is_left_to_them(machine, tpu, name):
    machine.patch.setenv("TPU_NAME", name)
    assert not tpu_runtime.prepare_tpu(tpu)
    assert machine.set() == {}


def test_without_a_tpu_nothing_is_looked_at(machine):
    machine.devices()
    machine.packages.clear()
    assert not tpu_runtime.prepare_tpu()
    assert (machine.set(), tpu_runtime.why_unseen()) == ({}, "")


UNFIT = [
    ({"tensorflow": "2.20.0", "libtpu": "0.0.21"}, ["tensorflow-tpu", "here is tensorflow 2.20.0", "uninstall --yes"]),
    ({"libtpu": "0.0.21"}, ["here is none", "python -m pip install 'tensorflow-tpu>=2.20,<2.21' 'libtpu>=0.0.14,"]),
    (FITTING | {"libtpu": "0.0.45"}, ["libtpu 0.0.45", "python -m pip install 'libtpu>=0.0.14,<0.0.22'"]),
    (FITTING | {"libtpu": "0.0.22.dev1"}, ["libtpu 0.0.22.dev1", "does not fit tensorflow-tpu 2.20"]),
    ({"tensorflow-tpu": "2.20.0"}, ["libtpu is missing", "python -m pip install 'libtpu>=0.0.14,<0.0.22'"]),
]


@pytest.mark.parametrize(("packages", "phrases"), UNFIT)
def test_packages_that_cannot_drive_it_are_said_before_tensorflow_is_imported(machine, packages, phrases):
    machine.packages = packages
    with pytest.raises(RunError) as caught:
        tpu_runtime.prepare_tpu()
    line = str(caught.value)
    assert "\n" not in line
    assert all(phrase in line for phrase in phrases), line
    assert machine.set() == {}
    assert tpu_runtime.why_unseen() == line


def test_a_tpu_without_tensorflow_is_said(machine):
    machine.chip("0x0076")
    with pytest.raises(RunError, match="TPU7x, for which there is no TensorFlow"):
        tpu_runtime.prepare_tpu()


def test_tensorflow_imported_before_the_variables_is_said(machine):
    machine.has_imported_tensorflow()
    with pytest.raises(RunError, match=r"imported before PJRT's variables were set.*a v5e needs.*restart the session"):
        tpu_runtime.prepare_tpu()
    assert "imported before" in tpu_runtime.why_unseen()
    machine.patch.setenv("NEXT_PLUGGABLE_DEVICE_USE_C_API", "true")
    machine.patch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "/nowhere/libtpu.so")
    assert "/nowhere/libtpu.so is not there: unset it" in tpu_runtime.why_unseen()
    machine.patch.setenv("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", machine.library)
    assert "set by hand were set before tensorflow was imported" in tpu_runtime.why_unseen()


def test_the_process_that_has_the_tpu_is_named(machine):
    assert tpu_runtime.prepare_tpu()
    for process, name in ((os.getpid(), "/dev/vfio/0"), (71, "/dev/null"), (72, "/dev/vfio/0")):
        link = machine.root / f"proc/{process}/fd/5"
        link.parent.mkdir(parents=True)
        link.symlink_to(name)
    line = tpu_runtime.why_unseen()
    assert line == "process 72 has the TPU open at /dev/vfio/0: wait until it ends, or end it with kill 72"
    (machine.root / "proc/72/fd/5").unlink()
    assert "TensorFlow sees none (no chips): look with sudo lsof -w /dev/vfio/0" in tpu_runtime.why_unseen("no chips")


def test_a_second_tensorflow_is_said(machine):
    assert tpu_runtime.prepare_tpu()
    machine.packages["tensorflow"] = "2.20.0"
    assert tpu_runtime.prepare_tpu()  # what was installed last has the files; it may be the right one
    line = tpu_runtime.why_unseen()
    assert "tensorflow is installed beside tensorflow-tpu" in line
    assert "--force-reinstall --no-deps 'tensorflow-tpu>=2.20,<2.21'" in line


@pytest.mark.parametrize(("chip", "initialised"), [("0x0063", 0), pytest.param("0x0027", 2, marks=pytest.mark.long)])
def test_a_strategy_says_why_tensorflow_sees_none(machine, chip, initialised):
    """TensorFlow itself, which has no TPU here. To initialise none through PJRT ends the process."""
    calls, initialise = [], tf.tpu.experimental.initialize_tpu_system
    machine.patch.setattr(tf.tpu.experimental, "initialize_tpu_system", lambda r: (calls.append(r), initialise(r)))
    machine.chip(chip)
    machine.patch.setitem(sys.modules, IMPORTED, tf)
    machine.packages = {"tensorflow": "2.20.0", "libtpu": "0.0.51"}
    for tpu in ("local", "v5litepod-1"):
        with pytest.raises(RunError) as caught:
            make_strategy(tpu=tpu)
        assert str(caught.value).startswith(f"--tpu={tpu}: TensorFlow for TPUs is the package tensorflow-tpu")
        assert "\n" not in str(caught.value)
    assert len(calls) == initialised


def test_what_fails_on_a_tpu_that_tensorflow_sees_is_said_as_it_is(machine):
    machine.patch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    with pytest.raises(RunError, match=r"--tpu=local cannot be reached \(TPUs not found in the cluster"):
        make_strategy(tpu="local")


# The command line on that machine, with a TensorFlow that only says what it finds in the environment.
ON_THE_MACHINE = """
import sys
from importlib import metadata
from pathlib import Path
from conadv_tf import cli
from conadv_tf.run import tpu_runtime
tpu_runtime.SYSTEM = Path(sys.argv[1])
metadata.version = {"tensorflow-tpu": "2.20.0", "libtpu": "0.0.21"}.__getitem__
cli.run_command_line(["train.py", *sys.argv[2:]])
"""
TENSORFLOW = f"""
import json, os
print(json.dumps({{name: os.environ.get(name) for name in {OF_TENSORFLOW}}}))
os._exit(0)
"""


@pytest.mark.parametrize(("flags", "is_set"), [(["--tpu=local"], True), (["--strategy=tpu"], True), ([], False)])
def test_the_command_line_sets_them_before_it_imports_tensorflow(machine, flags, is_set):
    touch(machine.root / "site" / "tensorflow" / "__init__.py", TENSORFLOW)
    path = os.pathsep.join([str(machine.root / "site"), str(ROOT)])
    command = [sys.executable, "-c", ON_THE_MACHINE, str(machine.root), *flags]
    outcome = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
    )
    expected = dict(zip(OF_TENSORFLOW, ("TPU", "true", machine.library, machine.library), strict=True))
    assert json.loads(outcome.stdout) == (expected if is_set else dict.fromkeys(OF_TENSORFLOW)), outcome.stderr


def test_a_shell_gets_lines_that_set_them(machine, capsys):
    assert tpu_runtime.main(["v6e-8"]) == 0
    lines = capsys.readouterr().out
    shell = subprocess.run(
        ["bash", "-euc", f'{lines}\nprintf "%s " "$PJRT_DEVICE" "$TF_PLUGGABLE_DEVICE_LIBRARY_PATH"'],
        capture_output=True,
        text=True,
    )
    assert shell.stdout == f"TPU {machine.library} "
    assert tpu_runtime.main(["v3-32"]) == 0
    assert capsys.readouterr().out == f"export TPU_LIBRARY_PATH={shlex.quote(machine.library)}\n"
    assert tpu_runtime.main(["pod"]) == 2
    Path(machine.library).unlink()
    assert tpu_runtime.main(["v3-32"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the TPU's library is not installed: run python")


def test_pins_are_the_same_everywhere():
    notebook = (ROOT / "notebooks" / "conadv_colab.ipynb").read_text().replace('\\"', '"')
    hosts = (ROOT / "tpu_scripts" / "host" / "requirements.txt").read_text()
    for requirement in (tpu_runtime.TENSORFLOW, tpu_runtime.LIBTPU):
        assert requirement in notebook
        package, bounds = re.fullmatch(r"([a-z-]+)(.*)", requirement).groups()
        (pinned,) = re.findall(rf"^{package}==(.*)$", hosts, re.MULTILINE)
        assert pinned in SpecifierSet(bounds)
    for pattern in tpu_runtime.DEVICES:
        assert f'"/{pattern}"' in notebook


def test_a_process_that_ends_while_one_looks_hides_no_other(machine, monkeypatch):
    """As the kernel has it: the folder is gone, or there and cannot be listed."""
    assert tpu_runtime.prepare_tpu()
    link = machine.root / "proc/9/fd/5"
    link.parent.mkdir(parents=True)
    link.symlink_to("/dev/vfio/0")
    ended = {machine.root / "proc/70/fd": FileNotFoundError, machine.root / "proc/71/fd": ProcessLookupError}
    for folder in ended:
        folder.mkdir(parents=True)
    for listing in ("scandir", "listdir"):
        plain = getattr(os, listing)

        def listed(place=".", plain=plain):
            if isinstance(place, (str, os.PathLike)) and Path(place) in ended:
                raise ended[Path(place)](str(place))
            return plain(place)

        monkeypatch.setattr(os, listing, listed)
    assert tpu_runtime.why_unseen().startswith("process 9 has the TPU open at /dev/vfio/0")
    link.unlink()
    assert "look with sudo lsof -w /dev/vfio/0" in tpu_runtime.why_unseen()
