"""The compiled programs of a preflight: kept between calls, several compiled at a time, progress shown."""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import conadv_tf
from conadv_tf import config, terminal
from conadv_tf.preflight import tpu_compiler
from conadv_tf.preflight.tpu_compiler import Compiler, Cost
from conadv_tf.preflight.tpu_generations import Generation
from conadv_tf.run.build import Run
from conadv_tf.run.report import versions as run_versions

# Name of a program → what lowers it to a serialized HloModule.
Lowerings = Mapping[str, Callable[[], bytes]]
# A run on a generation, what to lower, and the images of a micro-batch.
Asked = tuple["CompiledPrograms", Lowerings, int]


# An update of ResNet-50 takes a compiler up to 7 GB.
_COMPILER_BYTES = 8 << 30


class CompiledPrograms:
    """The costs of a run's programs; lowered and compiled once for each state of the run and of this package."""

    def __init__(self, built: Run, compiler: Compiler):
        self.compiler = compiler
        self._index_file = os.path.join(compiler.folder, f"run-{fingerprint(built, compiler.generation)}.json")

    def costs(self, lowerings: Lowerings, rows: int) -> dict[str, Cost]:
        """The costs by the names of `lowerings`; see `costs_of`."""
        return costs_of([(self, lowerings, rows)])[0]

    def read_index(self) -> dict[str, str]:
        """The keys of the compiler's cache, by the labels of programs."""
        try:
            with open(self._index_file, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def add_to_index(self, keys: Mapping[str, str]) -> None:
        """Keeps further keys, where there are any."""
        if keys:
            tpu_compiler.write_file(self._index_file, json.dumps({**self.read_index(), **keys}))


def costs_of(asked: Sequence[Asked]) -> list[dict[str, Cost]]:
    """The costs of programs by their names, compiled beside each other while the next one is lowered.

    Args:
      asked: what to compile.

    Returns:
      One dict for each of `asked`; where its first program exceeds HBM, of that alone.
    """
    with _Pool.opened() as pool:
        waited = [_begun(pool, *of_one) for of_one in asked]
        pool.wait()
    return [finish() for finish in waited]


def _begun(pool: "_Pool", programs: CompiledPrograms, lowerings: Lowerings, rows: int) -> Callable[[], dict[str, Cost]]:
    """Lowers what has not been compiled before and hands it to a pool; what returns the costs when that is done."""
    index, compiler = programs.read_index(), programs.compiler
    labels = {name: f"{name}, {rows} images" for name in lowerings}
    found = {name: compiler.cached(index.get(label, "")) for name, label in labels.items()}
    costs = {name: cost for name, cost in found.items() if cost}
    first, *_ = lowerings
    pending: dict[str, concurrent.futures.Future[Cost | None]] = {}
    keys: dict[str, str] = {}
    for name in [name for name in lowerings if name not in costs]:
        _say(f"lowering {labels[name]}")
        program = lowerings[name]()
        keys[labels[name]] = compiler.key(program)
        pending[name] = pool.compile(compiler, program, labels[name], (index | keys)[labels[first]])

    def finish() -> dict[str, Cost]:
        programs.add_to_index(keys)
        compiled = {name: future.result() for name, future in pending.items()}
        every = costs | {name: cost for name, cost in compiled.items() if cost}
        return {first: every[first]} if every[first].over_bytes else every

    return finish


def compilers_at_once() -> int:
    """The number of compilers that this machine runs beside each other: one a core, as far as its memory goes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // _COMPILER_BYTES))


class _Pool:
    """Threads that each drive a compiler."""

    def __init__(self, threads: concurrent.futures.Executor):
        self._threads = threads
        self._pending: list[concurrent.futures.Future[Cost | None]] = []
        self._seconds: dict[str, float] = {}  # of the compilations under way, by their labels
        self._given_up = False

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> "Iterator[_Pool]":
        """A pool of which an error or a signal, in one of its threads or here, ends all at once."""
        with concurrent.futures.ThreadPoolExecutor(compilers_at_once()) as threads:
            pool = cls(threads)
            try:
                yield pool
            except BaseException:
                pool._given_up = True
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def compile(
        self, compiler: Compiler, program: bytes, label: str, first: str
    ) -> "concurrent.futures.Future[Cost | None]":
        """Has a program compiled; gives None where the one kept under `first`, handed over before it, exceeds HBM."""
        self._pending.append(self._threads.submit(self._compile, compiler, program, label, first))
        return self._pending[-1]

    def wait(self) -> None:
        """Waits until all are done; raises the error of the first that fails, at once."""
        waiting = set(self._pending)
        while waiting:
            # Looks again and again: a signal that another thread receives wakes nothing that waits here.
            done, waiting = concurrent.futures.wait(waiting, 1.0, concurrent.futures.FIRST_COMPLETED)
            for future in done:
                future.result()
        if self._pending:
            _say("")

    def _compile(self, compiler: Compiler, program: bytes, label: str, first: str) -> Cost | None:
        if getattr(compiler.cached(first), "over_bytes", 0):
            return None
        label = f"{label} for {compiler.generation.name}"
        try:
            cost = compiler.compile(program, functools.partial(self._progress, label))
        finally:
            self._seconds.pop(label, None)
        _say(f"compiling {label}: done")
        return cost

    def _progress(self, label: str, seconds: float) -> None:
        if self._given_up:
            raise concurrent.futures.CancelledError
        self._seconds[label] = seconds
        under_way = "; ".join(f"{program}: {passed:.0f} s" for program, passed in list(self._seconds.items()))
        _say(f"compiling {under_way}", passing=True)


def fingerprint(built: Run, generation: Generation) -> str:
    """A hash of everything that programs depend on: the same hash, the same programs."""
    parts: list[object] = [config.operative_config(), built.plan, built.settings, built.data.train_shape, generation]
    parts += [sorted(built.model.network.get_config().items(), key=str), built.model.method.attack]
    parts += [built.model.method.kind, built.model.method.tau, run_versions(), tpu_compiler.versions()]
    text = repr(parts)
    for path in sorted(pathlib.Path(conadv_tf.__file__).parent.rglob("*.py")):
        text += path.read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _say(text: str, passing: bool = False) -> None:
    """Prints progress on stderr. The next line overwrites a passing one, which only a terminal shows."""
    with terminal.may_be_gone():
        if sys.stderr.isatty():
            print(f"\r\x1b[K  {text}", end="", file=sys.stderr, flush=True)
        elif text and not passing:
            print(f"  {text}", file=sys.stderr, flush=True)
