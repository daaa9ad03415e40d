"""The TPU of this machine: whether one is attached, what TensorFlow needs before it is imported, why it sees none.

`train.py --tpu=local`, notebooks (`conadv_tf.prepare_tpu`) and tpu_scripts/host/ take all this from here. Nothing here
loads TensorFlow. For a shell,

    python -m conadv_tf.run.tpu_runtime v5litepod-16

prints the variables as lines that set them.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from conadv_tf import terminal
from conadv_tf.errors import ConfigError, RunError

SYSTEM = Path("/")  # where the folders of devices, processes and the PCI bus are
DEVICES = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")  # by Google's driver; by the kernel's own, on later images
# PCI: Google's number, and its chips', as JAX knows them (jax/_src/hardware_utils.py); v2 has v3's.
VENDOR = "0x1ae0"
CHIPS = {"0x0027": "v3", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
ACCELERATOR_TYPE = re.compile(r"^(v\d+[a-z]*|v5litepod)-(\d+)$")
# TensorFlow 2.20 drives v2 to v4 by its own runtime and these through PJRT.
THROUGH_PJRT = ("v5e", "v5litepod", "v5p", "v6e")

WITHOUT_TENSORFLOW = re.compile(r"^(v7[a-z]*|tpu7x)(-[\dx]+)?$")  # as an accelerator type

TENSORFLOW = "tensorflow-tpu>=2.20,<2.21"
WITHOUT_TPU = ("tensorflow", "tensorflow-cpu")  # the same files, built without a TPU
# tensorflow-tpu 2.20 asks for 0.0.14 or later; 0.0.45 has lost what it calls, and ends the process that imports it.
LIBTPU = "libtpu>=0.0.14,<0.0.22"
_LIBTPU_FROM, _LIBTPU_BELOW = (0, 0, 14), (0, 0, 22)


def parse_accelerator_type(tpu: str) -> tuple[str, int] | None:
    """("v3", 512) for "v3-512"; None for a name, an address or "local"."""
    match = ACCELERATOR_TYPE.match(tpu)
    return (match.group(1), int(match.group(2))) if match else None


def check_has_tensorflow(tpu: str) -> None:
    """Raises ConfigError for the accelerator type of a generation that no TensorFlow drives."""
    if WITHOUT_TENSORFLOW.match(tpu):
        raise ConfigError(f"--tpu={tpu}: there is no TensorFlow for TPU7x: use a v6e or an earlier one")


def address_of(tpu: str) -> str:
    """The address that --tpu means: "local", the name of a TPU, or one that begins with grpc://.

    An accelerator type means the attached TPU. A slice of several hosts is reached by its name, which TPU VMs and
    managed jobs put into the environment.
    """
    return (os.environ.get("TPU_NAME") or "local") if parse_accelerator_type(tpu) else tpu


def devices() -> list[str]:
    """The device files of the attached TPU; none where there is no TPU."""
    found = [path for pattern in DEVICES for path in SYSTEM.glob(pattern)]
    # Other devices are handed on through VFIO too; a sandbox may show no bus.
    if not _chips() and any((SYSTEM / "sys/bus/pci/devices").glob("*")):
        found = [path for path in found if path.parent.name != "vfio"]
    return [f"/{path.relative_to(SYSTEM)}" for path in sorted(found)]


def generation() -> str:
    """The generation of the attached TPU, "v5e"; "" where nothing says it."""
    attached = os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("ACCELERATOR_TYPE") or ""
    parsed = parse_accelerator_type(attached)
    return parsed[0] if parsed else next(iter(_chips()), "")


def _chips() -> list[str]:
    """The generation of each TPU chip on the PCI bus."""
    chips = []
    for vendor in sorted(SYSTEM.glob("sys/bus/pci/devices/*/vendor")):
        try:
            if vendor.read_text(encoding="utf-8").strip() == VENDOR:
                chips.append(CHIPS.get((vendor.parent / "device").read_text(encoding="utf-8").strip(), ""))
        except OSError:  # a device may go while one looks
            continue
    return [chip for chip in chips if chip]


def needs_pjrt(of: str) -> bool:
    """Tells whether TensorFlow drives a generation through PJRT; where it is not known, what VFIO hands on."""
    return of in THROUGH_PJRT or (not of and any(name.startswith("/dev/vfio/") for name in devices()))


def variables(of: str) -> dict[str, str]:
    """The environment that TensorFlow needs for a generation when it is imported.

    Raises:
      RunError: if libtpu is not installed.
    """
    spec = importlib.util.find_spec("libtpu")
    library = Path(spec.origin).with_name("libtpu.so") if spec and spec.origin else None
    if library is None or not library.exists():
        raise RunError(f"the TPU's library is not installed: run {_install(LIBTPU)}")
    found = {"TPU_LIBRARY_PATH": str(library)}
    if needs_pjrt(of):
        found["PJRT_DEVICE"] = "TPU"
        found["NEXT_PLUGGABLE_DEVICE_USE_C_API"] = "true"
        found["TF_PLUGGABLE_DEVICE_LIBRARY_PATH"] = str(library)
    return found


def unset(wanted: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that the environment lacks. An empty one counts as unset."""
    return {name: value for name, value in wanted.items() if not os.environ.get(name)}


def prepare_tpu(tpu: str = "local") -> bool:
    """Sets what TensorFlow needs for the attached TPU. Call it before TensorFlow is imported.

    Args:
      tpu: as for `make_strategy`; what it reaches by a name or an address needs nothing here.

    Returns:
      Whether a TPU is attached to this machine and meant.

    Raises:
      RunError: if the installed packages cannot drive it, or TensorFlow is loaded already and was not prepared.
    """
    if address_of(tpu) != "local" or not devices():
        return False
    misfit = _misfit()
    if misfit:
        raise RunError(misfit)
    missing = unset(variables(generation()))
    if "tensorflow" in sys.modules and needs_pjrt(generation()) and missing:
        raise RunError(_too_late())
    os.environ.update(missing)
    return True


def why_unseen(said: str = "") -> str:
    """Why TensorFlow sees no TPU although one is attached, and what mends it; "" where none is attached.

    Args:
      said: what TensorFlow said, for a cause that is not known.
    """
    if not devices():
        return ""
    return _misfit() or _overwritten() or _unprepared() or _held() or _unknown(said)


def _misfit() -> str:
    """What is wrong with the installed packages, and the command that mends it; "" where nothing is."""
    if generation() == "tpu7x":
        return "the TPU attached here is a TPU7x, for which there is no TensorFlow: create a v6e or an earlier one"
    if not _version("tensorflow-tpu"):
        others = " and ".join(f"{name} {_version(name)}" for name in WITHOUT_TPU if _version(name))
        return (
            f"TensorFlow for TPUs is the package tensorflow-tpu, and here is {others or 'none'}: run "
            f"{_uninstall(*WITHOUT_TPU)} && {_install(TENSORFLOW, LIBTPU)}"
        )
    library = _version("libtpu")
    numbers = tuple(int(part) for part in re.findall(r"\d+", library)[:3])
    if not _LIBTPU_FROM <= numbers < _LIBTPU_BELOW:
        return f"libtpu {library or 'is missing and'} does not fit tensorflow-tpu 2.20: run {_install(LIBTPU)}"
    return ""


def _overwritten() -> str:
    """The packages have the same files, and what was installed last has them."""
    others = [name for name in WITHOUT_TPU if _version(name)]
    if not others:
        return ""
    return (
        f"{' and '.join(others)} is installed beside tensorflow-tpu and may have overwritten it: run "
        f"{_uninstall(*others)} && {_install('--force-reinstall', '--no-deps', TENSORFLOW)}"
    )


def _unprepared() -> str:
    if not needs_pjrt(generation()):
        return ""
    library = os.environ.get("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "")
    if not library or not os.environ.get("NEXT_PLUGGABLE_DEVICE_USE_C_API"):
        return _too_late()
    if not Path(library).exists():
        return f"TF_PLUGGABLE_DEVICE_LIBRARY_PATH={library} is not there: unset it and start again"
    return ""


def _too_late() -> str:
    return (
        f"TensorFlow was imported before PJRT's variables were set, which a {generation() or 'TPU'} needs: start a new "
        "process (in a notebook, restart the session) and call conadv_tf.prepare_tpu() before tensorflow is imported"
    )


def _held() -> str:
    """Another process that has the TPU open, as far as this user may see."""
    names = set(devices())
    for folder in SYSTEM.glob("proc/[0-9]*"):
        process = folder.name
        for name in names.intersection(_open_files(folder) if process != str(os.getpid()) else ()):
            return f"process {process} has the TPU open at {name}: wait until it ends, or end it with kill {process}"
    return ""


def _open_files(process: Path) -> Iterator[str]:
    """The files that a process has open, by its folder in /proc; none of one that has ended, or is another user's."""
    with contextlib.suppress(OSError):
        for number in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(process / "fd" / number)


def _unknown(said: str) -> str:
    names = " ".join(devices())
    words = f" ({said})" if said else ""
    by_hand = "that variables set by hand were set before tensorflow was imported, " if needs_pjrt(generation()) else ""
    return (
        f"a TPU is attached at {names} and TensorFlow sees none{words}: look with sudo lsof -w {names} that no other "
        f"user's process has it open, {by_hand}and start again with TF_CPP_MIN_LOG_LEVEL=0 for what libtpu says"
    )


def _version(package: str) -> str:
    """The version of an installed package; "" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _install(*what: str) -> str:
    return f"python -m pip install {shlex.join(what)}"


def _uninstall(*what: str) -> str:
    return f"python -m pip uninstall --yes {shlex.join(what)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints lines of a shell that set the variables for an accelerator type; returns an exit code."""

    def work() -> None:
        parser = terminal.Parser(description="Prints what a shell sets before TensorFlow drives a TPU.")
        parser.add_argument("type", help="accelerator type, such as v5litepod-16")
        accelerator = parser.parse_args(arguments).type
        parsed = parse_accelerator_type(accelerator)
        if parsed is None:
            raise ConfigError(f"{accelerator} is no accelerator type: write one such as v5litepod-16")
        for name, value in variables(parsed[0]).items():
            terminal.say(f"export {name}={shlex.quote(value)}")

    return terminal.exit_code(work, "nothing was set", "look at the file")


if __name__ == "__main__":
    sys.exit(main())
