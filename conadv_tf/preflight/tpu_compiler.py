"""Compiles an XLA program with the real TPU compiler, on a machine without a TPU, and says what it costs.

    python -m conadv_tf.preflight.tpu_compiler PROGRAM GENERATION

prints the Cost of PROGRAM, a serialized HloModule of one replica, on GENERATION, such as v3, as one line of JSON. It
needs `jax` and `libtpu`, and is a process of its own: they and TensorFlow each bring a copy of XLA, and libtpu ends
its process where something is amiss.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import conadv_tf
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.preflight.hlo_text import text_cost, without_copies
from conadv_tf.preflight.tpu_generations import GENERATIONS, GIB, Generation

PACKAGES = ("jax", "jaxlib", "libtpu")
INSTALL = "pip install 'conadv_tf[preflight]'"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Otherwise libtpu asks Google Cloud's metadata server which TPU this machine has, and waits.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A lock file keeps processes from sharing a TPU; there is none here to share.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One execution of a program on one replica.

    Attributes:
      flop: floating-point operations.
      bytes_accessed: by the compiler's count, which does not tell on-chip memory from HBM.
      hbm_bytes: moved to and from HBM.
      optimal_seconds: the compiler's lower bound; corrected for the instructions that its cost model counts as −1 s.
      optimal_error: by how much float32 rounding in the compiler's sum may have moved `optimal_seconds`, at most.
      cycles: sum of the cycles the compiler estimates for each instruction.
      argument_bytes, output_bytes, aliased_bytes, temp_bytes, code_bytes: HBM. Aliased are outputs that take the place
        of arguments, such as updated variables.
      over_bytes: 0, or by how much the program exceeds HBM; then nothing but `temp_bytes` is known.
      compile_seconds: time of the compiler, on the machine that ran it.
    """

    flop: float = 0.0
    bytes_accessed: float = 0.0
    hbm_bytes: float = 0.0
    optimal_seconds: float = 0.0
    optimal_error: float = 0.0
    cycles: float = 0.0
    argument_bytes: int = 0
    output_bytes: int = 0
    aliased_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    over_bytes: int = 0
    compile_seconds: float = 0.0

    @property
    def resident_bytes(self) -> int:
        """Bytes of HBM beside the temporaries: arguments and outputs, aliased ones once, and the program itself."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.code_bytes


class Compiler:
    """The compiler for one generation, with a folder of what it has compiled before.

    Args:
      generation: to compile for.
      folder: the folder of the cache; None is `cache_folder()`.
    """

    def __init__(self, generation: Generation, folder: str | None = None):
        self.generation = generation
        self.folder = folder or cache_folder()

    def key(self, program: bytes) -> str:
        """The name that a cost is kept under: a hash of program, generation, compiler and this reader's source."""
        parts = [program, repr((self.generation, versions())).encode()]
        for reader in ("tpu_compiler.py", "hlo_text.py"):
            with open(os.path.join(os.path.dirname(__file__), reader), "rb") as file:
                parts.append(file.read())
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]

    def cached(self, key: str) -> Cost | None:
        """The cost kept under `key`; None if there is none, or the file is damaged."""
        try:
            with open(self._file(key), encoding="utf-8") as file:
                return Cost(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None

    def compile(self, program: bytes, progress: Callable[[float], None] = lambda seconds: None) -> Cost:
        """The cost of a program, from the cache where it has been compiled before.

        Args:
          program: a serialized HloModule.
          progress: called about once a second with the seconds since the compiler began.

        Raises:
          ConfigError: if jax or libtpu are not installed.
          RunError: if the compiler fails, or the cache cannot be written.
        """
        key = self.key(program)
        cost = self.cached(key)
        if cost is None:
            cost = _compile_apart(program, self.generation, progress)
            write_file(self._file(key), json.dumps(dataclasses.asdict(cost)))
        return cost

    def _file(self, key: str) -> str:
        return os.path.join(self.folder, f"{key}.json")


def cache_folder() -> str:
    """The folder ~/.cache/conadv_tf/preflight, or one below XDG_CACHE_HOME; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "conadv_tf", "preflight")


def write_file(path: str, text: str) -> None:
    """Replaces a file of the cache whole, so that another process never reads half of one."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=os.path.dirname(path), delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        folder = os.path.dirname(path)
        raise RunError(
            f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder you may write"
        ) from error


def versions() -> dict[str, str]:
    """The versions of the compiler and of what drives it.

    Raises:
      ConfigError: if one is not installed.
    """
    try:
        return {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed, and compiles for TPUs: {INSTALL}") from error


def _compile_apart(program: bytes, generation: Generation, progress: Callable[[float], None]) -> Cost:
    """Runs this module in a process of its own."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(conadv_tf.__file__)))
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="conadv_preflight_") as folder:
        file = os.path.join(folder, "program.pb")
        with open(file, "wb") as writer:
            writer.write(program)
        command = [sys.executable, "-m", __name__, file, generation.name]
        start = time.monotonic()
        with (
            open(os.path.join(folder, "errors"), "w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            ) as process,
        ):
            output = _wait(process, lambda: progress(time.monotonic() - start))
            errors.seek(0)
            if process.returncode:
                raise RunError(_failure(process.returncode, errors.read(), generation))
    return Cost(**json.loads(output.splitlines()[-1]))


def _wait(process: subprocess.Popen, tick: Callable[[], None]) -> str:
    """Waits for a process and gives its output; an interruption ends the process too."""
    try:
        while True:
            tick()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=1.0)[0]
    except BaseException:
        process.kill()
        raise


def _failure(code: int, errors: str, generation: Generation) -> str:
    if code == -signal.SIGKILL:
        return (
            f"the TPU compiler for {generation.name} was killed, by the system where memory runs out: end what else "
            "needs memory, and start the same command again, which keeps what has been compiled"
        )
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"Error|error:|Check failed|^F\d{4}", line)] or lines
    cause = telling[-1][:300] if telling else "it said nothing"
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return (
        f"the TPU compiler for {generation.name} ended with {ended} ({cause}): versions that work are those of "
        f"{INSTALL}; otherwise report this line"
    )


def main(arguments: list[str]) -> None:
    """Prints the cost of a program; see the module."""
    if len(arguments) != 2 or arguments[1] not in GENERATIONS:
        print(f"usage: python -m conadv_tf.preflight.tpu_compiler PROGRAM {{{','.join(GENERATIONS)}}}", file=sys.stderr)
        sys.exit(2)
    _end_with_parent()
    with open(arguments[0], "rb") as file:
        print(json.dumps(dataclasses.asdict(_compile_here(file.read(), GENERATIONS[arguments[1]]))))


def _end_with_parent() -> None:
    """Lets the system end this process when the one that waits for it is killed: it holds gigabytes, for minutes."""
    if sys.platform == "linux":  # where there is a libtpu
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _compile_here(program: bytes, generation: Generation) -> Cost:
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name=generation.topology, platform="tpu", chip_config_name=generation.chip_config
    )
    device = topology.devices[0]
    start = time.monotonic()
    try:
        executable = _executable(program, device)
    except JaxRuntimeError as error:
        return _too_large(str(error))
    seconds = time.monotonic() - start
    return _read_cost(executable, seconds)


def _executable(program: bytes, device):
    """Compiles for one device of a topology. JAX has no public way in for a program it did not make."""
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax, xla_client
    from jax._src.lib.mlir import ir

    text = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
    text = without_copies(text)
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    build = options.executable_build_options
    build.num_replicas = build.num_partitions = 1
    build.device_assignment = xla_client.DeviceAssignment.create(np.array([[0]], np.int32))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
    return device.client.compile(module, xla_client.DeviceList((device,)), options)


def _too_large(message: str) -> Cost:
    """A program that exceeds HBM, from the compiler's refusal; any other refusal is raised again."""
    size = r"\(?([\d.]+)([KMGT])\)?"
    sizes = re.search(rf"HLO temporaries {size} exceeds available HBM {size}", message)
    if not sizes:
        raise RuntimeError(message)
    units = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed, available = (float(sizes.group(i)) * units[sizes.group(i + 1)] for i in (1, 3))
    return Cost(temp_bytes=int(needed), over_bytes=max(1, int(needed - available)))


def _read_cost(executable, seconds: float) -> Cost:
    analysis = executable.cost_analysis()
    analysis = analysis if isinstance(analysis, dict) else analysis[0]
    memory = executable.get_compiled_memory_stats()
    text = text_cost(executable.hlo_modules()[0].to_string())
    counted = analysis["optimal_seconds"]
    # The sum is kept in float32: each addition rounds by at most half of the last place of the largest value.
    last_place = 2.0 ** (math.frexp(max(abs(counted), abs(counted + text.custom_calls)))[1] - 24)
    return Cost(
        flop=analysis["flops"] + text.custom_calls,
        bytes_accessed=analysis["bytes accessed"] + text.custom_calls,
        hbm_bytes=text.hbm_bytes,
        optimal_seconds=counted + text.custom_calls,
        optimal_error=text.timed * last_place / 2,
        cycles=text.cycles,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        compile_seconds=round(seconds, 2),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
