"""Runs many training runs, several at once, each in a process of its own; a finished run is never run again.

Killed at any moment and started again, the same calls end with the same results. A run goes on from its checkpoint, to
the same bits. A run that an earlier call has left running in a local folder is waited for.
"""

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tqdm

from conadv_tf import config, terminal
from conadv_tf.errors import ConfigError, Preempted
from conadv_tf.experiments.study import SCALES, Cell
from conadv_tf.run import kept_config, leak, lock
from conadv_tf.run.folder import RunFolder

_POLL_SECONDS = 0.5
_LOG, _FAILED = "log.txt", "failed.txt"
_MOST_INTERRUPTIONS = 3  # interruptions of a run from outside, before it counts as failed


class Folders:
    """The folders that keep the runs of a study.

    Args:
      local: folder of logs and marks of failure; one folder for each cell.
      runs: folder that the `model_dir` of every cell is below; local too unless it is gs://.
      gin_params: settings of every run, over its recipe's.
    """

    def __init__(self, local: str, runs: str, gin_params: Sequence[str] = ()):
        self.local, self.runs, self._gin_params = local, runs, list(gin_params)
        self._results: dict[Cell, dict] = {}

    def model_dir(self, cell: Cell) -> str:
        return os.path.join(self.runs, cell.name)

    def arguments(self, cell: Cell) -> list[str]:
        """The arguments of train.py for a cell."""
        files = [f"--gin_file={file}" for file in cell.gin_files()]
        params = [f"--gin_param={param}" for param in self._params(cell)]
        return [*files, *params, f"--model_dir={self.model_dir(cell)}"]

    def setting(self, cell: Cell, name: str) -> Any:
        """The value of a setting such as "train.epochs" in a cell's run.

        Raises:
          ConfigError: if the cell's recipe is wrong with the settings of every run.
        """
        config.configure(cell.gin_files(), self._params(cell))
        return config.setting(name)

    def log(self, cell: Cell) -> str:
        return os.path.join(self.local, cell.name, _LOG)

    def result(self, cell: Cell) -> dict | None:
        """The result.json of a finished cell, with the leak of one that an earlier version made; None before.

        Raises:
          ConfigError: if another recipe made the result than the cell's is now.
        """
        if cell not in self._results:
            folder = RunFolder(self.model_dir(cell), writes=False)
            result, saved = folder.read_result(), folder.read_config()
            if not result:
                return None
            self._check_recipe(cell, saved or "")
            self._results[cell] = {**leak.kept_leak_result(self.metrics(cell), saved or ""), **result}
        return self._results[cell]

    def knows_its_data(self, cell: Cell) -> bool:
        """Tells whether a cell has finished and keeps a fingerprint of its data, as runs of 0.1.0 did not."""
        return bool(self.result(cell) and RunFolder(self.model_dir(cell), writes=False).read_data())

    def metrics(self, cell: Cell) -> list[dict]:
        """The metrics of a cell, one dict an epoch; see callbacks.Recorder."""
        return RunFolder(self.model_dir(cell), writes=False).read_metrics()

    def failure(self, cell: Cell) -> str | None:
        """The last line of the log of a cell that failed, and the log's path; None for other cells."""
        path = os.path.join(self.local, cell.name, _FAILED)
        if not os.path.isfile(path):
            return None
        with open(path, encoding="utf-8") as file:
            return f"{file.read().strip()} ({self.log(cell)})"

    def _params(self, cell: Cell) -> list[str]:
        own = cell.gin_params()
        varied = {config.bound_name(param): param for param in own}
        for param in self._gin_params:
            if config.bound_name(param) in varied:
                own_one = varied[config.bound_name(param)]
                raise ConfigError(f"--gin_param={param} would replace {own_one}, by which runs are compared: drop it")
        return own + self._gin_params

    def _check_recipe(self, cell: Cell, saved: str) -> None:
        changed = kept_config.contradiction(saved, config.bindings(cell.gin_files(), self._params(cell)))
        if changed:
            name, old, new = changed
            raise ConfigError(
                f"{self.model_dir(cell)} was run with {name} = {old}, its recipe now says {new}: pass another "
                "--results, or put the recipe back"
            )


class _Running(NamedTuple):
    process: subprocess.Popen
    began: float
    epochs: int  # epochs of the whole run
    before: int  # epochs that earlier calls have recorded


class Runner:
    """Runs cells, `jobs` at once.

    Args:
      folders: where the cells are kept.
      jobs: processes at once.
      flags: flags of train.py for every run, such as --data_dir.
      total: gives the cost of all runs known to come, for the time that is left.
    """

    def __init__(self, folders: Folders, jobs: int, flags: Sequence[str], total: Callable[[], float]):
        self._folders, self._jobs, self._flags, self._total = folders, jobs, list(flags), total
        self._running: dict[Cell, _Running] = {}
        self._interrupted: collections.Counter[Cell] = collections.Counter()
        self._done, self._began = 0.0, time.monotonic()  # cost of what this call has run to its end, and since when
        self.failed: dict[Cell, str] = {}

    def check_data(self, cells: Iterable[Cell]) -> None:
        """Starts one of the finished runs again, which ends at once, to see that it was trained on this call's data.

        Raises:
          ConfigError: if it was not, or does not start.
        """
        cell = next(filter(self._folders.knows_its_data, cells), None)
        if cell is None:
            return
        with open(os.devnull, "wb") as nothing:
            done = subprocess.run(self._command(cell), stdin=nothing, stdout=nothing, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
            raise ConfigError(f"{said}; here another --results, and --runs where it is given")

    def run(self, more: Callable[[], list[Cell]]) -> None:
        """Runs the cells that `more` names. It is asked again whenever a run has ended: results name further cells."""
        self._bar = tqdm.tqdm(total=0.0, unit="", bar_format=_BAR, mininterval=1.0, dynamic_ncols=True, disable=None)
        try:
            waiting = more()
            while waiting or self._running:
                self._start(waiting)
                time.sleep(_POLL_SECONDS)
                self._show()
                if self._collect() or not self._running:
                    waiting = more()
        finally:
            self._stop()
            with terminal.may_be_gone():
                self._bar.close()

    def _start(self, waiting: list[Cell]) -> None:
        for cell in waiting:
            # A run that an earlier call has left is waited for: its result is as good, and a second one is refused.
            if cell in self._running or lock.is_held(self._folders.model_dir(cell)):
                continue
            if len(self._running) == self._jobs:
                break
            epochs = self._folders.setting(cell, "train.epochs")
            with signals_held_back():
                self._running[cell] = _Running(self._launched(cell), time.monotonic(), epochs, self._epochs(cell))

    def _launched(self, cell: Cell) -> subprocess.Popen:
        os.makedirs(os.path.dirname(self._folders.log(cell)), exist_ok=True)
        _remove(os.path.join(self._folders.local, cell.name, _FAILED))
        with open(self._folders.log(cell), "a", encoding="utf-8") as log:
            return subprocess.Popen(
                self._command(cell),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(SCALES[cell.scale].cores),
                # A terminal's Ctrl-C is for this process, which passes it on: a second one would end a run unsaved.
                start_new_session=True,
            )

    def _command(self, cell: Cell) -> list[str]:
        return [sys.executable, "-m", "conadv_tf", *self._folders.arguments(cell), *self._flags]

    def _collect(self) -> bool:
        """Records the runs that have ended; returns whether any has."""
        ended = [(cell, running) for cell, running in self._running.items() if running.process.poll() is not None]
        for cell, running in ended:
            del self._running[cell]
            if running.process.returncode and lock.is_held(self._folders.model_dir(cell)):
                continue  # another process was there first, and is waited for
            self._done += self._cost_in_this_call(cell, running)
            result = self._folders.result(cell)  # perhaps another process made it
            if result:
                minutes = (time.monotonic() - running.began) / 60
                self._say(f"{cell.name}: test top-1 {result['test_top1']:.2f} % in {minutes:.1f} min{self._left()}")
            elif not self._goes_on(cell, running.process.returncode):
                self._fail(cell, running.process.returncode)
        return bool(ended)

    def _goes_on(self, cell: Cell, code: int) -> bool:
        """Tells whether a run was only ended from outside, and so starts again: choices wait for its result."""
        if code >= 0 and code != Preempted.exit_code:
            return False
        self._interrupted[cell] += 1
        if self._interrupted[cell] > _MOST_INTERRUPTIONS:
            return False
        self._say(f"{cell.name}: interrupted, goes on")
        return True

    def _left(self) -> str:
        """The time that is left at the pace so far, as the end of a line."""
        left, done = self._to_come(), self._done_in_this_call()
        seconds = left * (time.monotonic() - self._began) / done if done else 0
        return f", about {seconds / 60:.0f} min left" if seconds else ""

    def _fail(self, cell: Cell, code: int) -> None:
        with open(self._folders.log(cell), encoding="utf-8", errors="replace") as log:
            lines = [line.strip() for line in log if line.strip()]
        self.failed[cell] = f"exit code {code}: {lines[-1] if lines else 'no output'}"
        with open(os.path.join(self._folders.local, cell.name, _FAILED), "w", encoding="utf-8") as file:
            file.write(self.failed[cell] + "\n")
        self._say(f"{cell.name}: failed, {self.failed[cell]} ({self._folders.log(cell)})")

    def _say(self, line: str) -> None:
        with terminal.may_be_gone():
            self._bar.write(line)
            sys.stdout.flush()

    def _show(self) -> None:
        if self._bar.disable:  # nobody watches
            return
        self._bar.n = self._done_in_this_call()
        self._bar.total = max(self._bar.n + self._to_come(), 1e-9)
        self._bar.set_description(", ".join(cell.name for cell in self._running)[:60], refresh=False)
        with terminal.may_be_gone():
            self._bar.refresh()

    def _to_come(self) -> float:
        """The cost of what has not been run."""
        runs = [(cell, running) for cell, running in self._running.items() if not self._folders.result(cell)]
        return self._total() - sum(cell.cost * self._epochs(cell) / running.epochs for cell, running in runs)

    def _done_in_this_call(self) -> float:
        return self._done + sum(self._cost_in_this_call(cell, running) for cell, running in self._running.items())

    def _cost_in_this_call(self, cell: Cell, running: _Running) -> float:
        return cell.cost * (self._epochs(cell) - running.before) / running.epochs

    def _epochs(self, cell: Cell) -> int:
        """The number of epochs that a cell has recorded."""
        return len(self._folders.metrics(cell))

    def _stop(self) -> None:
        """Ends the runs that still run, saved; the next call goes on with them."""
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            running.process.wait()


_BAR = "{percentage:3.0f} % |{bar}| {desc} [{elapsed}<{remaining}]"


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and a closed terminal end the block as Ctrl-C does, and with it the processes it waits for."""
    # A closed terminal sends SIGHUP; under nohup it is ignored.
    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in ending}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Holds signals back to the end of the block: one that comes while a process is started would lose the process."""
    came: list[int] = []
    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if callable(signal.getsignal(number))]
    previous = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for late in came:
        signal.raise_signal(late)


def _interrupt(signal_number: int, frame) -> None:
    raise KeyboardInterrupt


def _environment(cores: int | None) -> dict[str, str]:
    # Several runs share a GPU only if none takes all of its memory.
    environment = {**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    if cores:
        names = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
        environment.update(dict.fromkeys(names, str(cores)))
    return environment


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
