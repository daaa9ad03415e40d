"""The compiled programs of a preflight: kept between calls, several compiled at a time, progress shown."""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import conadv_tf
from conadv_tf import config
from conadv_tf.preflight import tpu_compiler
from conadv_tf.preflight.tpu_compiler import Compiler, Cost
from conadv_tf.preflight.tpu_generations import Generation
from conadv_tf.run.build import Run
from conadv_tf.run.report import versions as run_versions

# Name of a program → what lowers it to a serialized HloModule.
Lowerings = Mapping[str, Callable[[], bytes]]


class CompiledPrograms:
    """The costs of a run's programs; lowered and compiled once for each state of the run and of this package."""

    def __init__(self, built: Run, compiler: Compiler):
        self._built, self._compiler = built, compiler
        self._seconds: dict[str, float] = {}  # of the compilations under way, by their labels
        self._given_up = False
        self._index_file = os.path.join(compiler.folder, f"run-{fingerprint(built, compiler.generation)}.json")

    def costs(self, lowerings: Lowerings, rows: int) -> dict[str, Cost]:
        """The costs by the names of `lowerings`, compiled beside each other while the next program is lowered.

        Where the first program exceeds HBM, its cost alone is returned.
        """
        index = self._read_index()
        labels = {name: f"{name}, {rows} images" for name in lowerings}
        found = {name: self._compiler.cached(index.get(label, "")) for name, label in labels.items()}
        costs = {name: cost for name, cost in found.items() if cost}
        first, *_ = lowerings
        pending: dict[str, concurrent.futures.Future[Cost | None]] = {}
        with self._compiling() as pool:
            for name in [name for name in lowerings if name not in costs]:
                _say(f"lowering {labels[name]}")
                program = lowerings[name]()
                index[labels[name]] = self._compiler.key(program)
                pending[name] = pool.submit(self._compile, program, labels[name], index[labels[first]])
            _wait(pending.values())
        compiled = {name: future.result() for name, future in pending.items()}
        if pending:
            _say("")
            tpu_compiler.write_file(self._index_file, json.dumps(index))
        costs |= {name: cost for name, cost in compiled.items() if cost}
        return {first: costs[first]} if costs[first].over_bytes else costs

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[concurrent.futures.Executor]:
        """Gives threads that each drive a compiler. An error or a signal in one of them, or here, ends all at once."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                yield pool
            except BaseException:
                self._given_up = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _compile(self, program: bytes, label: str, first: str) -> Cost | None:
        """Compiles a program; gives None where the program kept under `first`, compiled before it, exceeds HBM."""
        if getattr(self._compiler.cached(first), "over_bytes", 0):
            return None
        try:
            cost = self._compiler.compile(program, functools.partial(self._progress, label))
        finally:
            self._seconds.pop(label, None)
        _say(f"compiling {label} for {self._compiler.generation.name}: done")
        return cost

    def _progress(self, label: str, seconds: float) -> None:
        if self._given_up:
            raise concurrent.futures.CancelledError
        self._seconds[label] = seconds
        under_way = "; ".join(f"{program}: {passed:.0f} s" for program, passed in list(self._seconds.items()))
        _say(f"compiling for {self._compiler.generation.name}: {under_way}", passing=True)

    def _read_index(self) -> dict[str, str]:
        try:
            with open(self._index_file, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}


def _wait(pending: Iterable[concurrent.futures.Future]) -> None:
    """Waits until all are done; raises the error of the first that fails, at once."""
    waiting = set(pending)
    while waiting:
        # Looks again and again: a signal that another thread receives wakes nothing that waits here.
        done, waiting = concurrent.futures.wait(waiting, 1.0, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            future.result()


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
    if sys.stderr.isatty():
        print(f"\r\x1b[K  {text}", end="", file=sys.stderr, flush=True)
    elif text and not passing:
        print(f"  {text}", file=sys.stderr, flush=True)
