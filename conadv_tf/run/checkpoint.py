"""Checkpoints to resume a run from: written, found, verified, restored, swept."""

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from conadv_tf import paths
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.errors import RunError, lost_worker, one_line
from conadv_tf.training.trainer import ConAdvModel

KEEP = 3
_READ_BYTES = 1 << 24  # at a time
# What TensorFlow raises where a whole checkpoint holds other variables.
_MISFIT = (ValueError, AssertionError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)
_PREFIX = "ckpt-"
_FILE = re.compile(r"(ckpt-(\d+))\.(?:index|data-\d{5}-of-\d{5})")
_LISTED = re.compile(rb'"(?:[^"]*/)?ckpt-(\d+)"')


class EpochSoFar(NamedTuple):
    """The part of an epoch before a checkpoint within it, for the epoch's line in metrics.jsonl.

    means: values of the variables of the model's training metric, in their order; seconds: seconds of training.
    """

    means: list[np.ndarray]
    seconds: float


class _Data(tf.train.experimental.PythonState):
    """The fingerprint of the data in a checkpoint, as text: `written` is saved, `read` was restored."""

    written = read = ""

    def serialize(self) -> str:
        return self.written

    def deserialize(self, string_value: bytes) -> None:
        self.read = tf.compat.as_text(string_value)


class Checkpoints:
    """Checkpoints of the network, its shadow copies and the optimizer in `directory`; the newest KEEP stay.

    A checkpoint is named after the number of updates made, `ckpt-N`. The folder's files say which there are, not the
    list that TensorFlow keeps beside them: a crash can leave the list behind. A checkpoint within an epoch also holds
    an EpochSoFar, which is `epoch_so_far` once it is restored; after any other checkpoint that is None.

    Args:
      model: the model.
      directory: the folder of the checkpoints.
      data: the fingerprint of the data that the model is trained on, which every checkpoint holds.
    """

    def __init__(self, model: ConAdvModel, directory: str, data: Fingerprint | None = None):
        model.create_optimizer_variables()
        self._model = model
        self._directory = directory
        self.epoch_so_far: EpochSoFar | None = None
        self.last: str | None = None  # saved or restored
        self._passed_over: set[int] = set()  # as not whole
        self._parts = {"network": model.network, "shadows": list(model.shadows), "optimizer": model.optimizer}
        self._means, self._seconds = model.metrics[0], tf.Variable(0.0, trainable=False, dtype=tf.float64)
        self._data, self._data.written = _Data(), data.to_text() if data else ""
        epoch = tf.train.Checkpoint(means=self._means, seconds=self._seconds)
        self._further = {"data": self._data, "epoch": epoch}

    def restore(self) -> int:
        """Restores the newest whole checkpoint, if there is one; returns the number of updates made so far.

        A checkpoint that is not whole is passed over, with a warning that names it. One that is out of reach is not:
        updates would be lost.

        Raises:
          RunError: for a checkpoint of another model or method, or one out of reach, where none of those there is
            whole, or where the workers of a MultiWorkerMirroredStrategy find different ones.
        """
        newest = self._newest_whole()
        self._check_same_on_all_workers(newest or 0)
        if newest is not None:
            path = path_of(self._directory, newest)
            self._restore_fitting(path)
            self.last = path
        return self._model.updates_made()

    def _newest_whole(self) -> int | None:
        """The number of the newest checkpoint that is whole; None where there is no checkpoint."""
        bad: list[tuple[str, str]] = []
        for number in numbers(self._directory):
            path = path_of(self._directory, number)
            cause = _damage(path)
            if cause is None:
                for torn, why in bad:
                    logging.warning("checkpoint %s is not whole (%s): going on from %s", torn, why, path)
                return number
            bad.append((path, cause))
            self._passed_over.add(number)
        if bad:
            raise RunError(
                f"{self._directory}: none of its {len(bad)} checkpoints is whole (the newest: {bad[0][1]}): bring "
                "back their files, or remove the folder to train from the start"
            )
        return None

    def _check_same_on_all_workers(self, number: int) -> None:
        """Raises RunError where several workers have different numbers, as without a disk that they share."""
        strategy = self._model.distribute_strategy
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return

        def gather():
            return tf.distribute.get_replica_context().all_gather(tf.constant([number], tf.int64), axis=0)

        gathered = tf.function(lambda: strategy.run(gather))()
        of_all = sorted(set(strategy.experimental_local_results(gathered)[0].numpy().tolist()))
        if len(of_all) > 1:
            raise RunError(
                f"the workers have checkpoints after {' and '.join(f'{found:,}' for found in of_all)} updates to go on "
                "from: let all of them see the same --model_dir, and start the same command on every worker"
            )

    @property
    def data(self) -> Fingerprint | None:
        """The fingerprint in the restored checkpoint; None before one is restored, and in those of earlier versions."""
        return Fingerprint.from_text(self._data.read) if self._data.read else None

    def _restore_fitting(self, path: str) -> None:
        with paths.readable(path) as name, _within_reach(f"checkpoint {path}", path, name):
            held = {variable.partition("/")[0] for variable, _ in tf.train.list_variables(name)}
            self._data.read = ""
            try:
                status = self._holding(held).read(name, self._reading(path, name))
                try:
                    status.assert_existing_objects_matched()
                    status.assert_consumed()
                finally:
                    status.expect_partial()  # the error tells enough; a warning for each variable would bury it
            except _MISFIT as error:
                raise RunError(
                    f"checkpoint {path} does not fit this model, method or optimizer ({_cause(error, path, name)}): "
                    "use the recipe that wrote it, or another --model_dir"
                ) from error
        means = [variable.numpy() for variable in self._means.variables]
        self.epoch_so_far = EpochSoFar(means, float(self._seconds.numpy())) if "epoch" in held else None

    def _holding(self, names: Collection[str]) -> tf.train.Checkpoint:
        """A checkpoint of the parts that all have, and those of the further ones that are named."""
        found = tf.train.Checkpoint(
            **self._parts, **{name: part for name, part in self._further.items() if name in names}
        )
        if "save_counter" in names:  # of an earlier version: what a checkpoint holds must exist here
            self._counter = found.save_counter
        return found

    def _reading(self, path: str, name: str) -> tf.train.CheckpointOptions:
        # A copy of a remote checkpoint is on this host alone, which need not be the one that a TPU is attached to.
        copied = name != path and paths.is_remote(path)
        several = isinstance(self._model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy)
        return tf.train.CheckpointOptions("/job:localhost" if copied and not several else None)

    def save(self, seconds: float | None = None) -> str:
        """Saves under the number of updates made; returns the path.

        Args:
          seconds: seconds of training in the epoch so far, for a checkpoint within it; None after its last update.

        Raises:
          RunError: if the checkpoint cannot be written.
        """
        number = self._model.updates_made()
        path = path_of(self._directory, number)
        try:
            self._seconds.assign(seconds or 0.0)
            self._holding(["data"] if seconds is None else ["data", "epoch"]).write(path)
            self._sweep(number)
        except (tf.errors.OpError, OSError) as error:
            raise RunError(
                f"cannot write a checkpoint to {self._directory} ({one_line(error)}{free_space(self._directory)}): "
                "make room, or change --model_dir"
            ) from error
        self.last = path
        return path

    def _sweep(self, newest: int) -> None:
        """Lists `newest` and the checkpoints before it for TensorFlow's readers, and removes what is not kept.

        Of those after it only what was passed over is removed: another may be whole, and of a process beside this one.
        """
        kept = sorted(number for number in numbers(self._directory) if number <= newest)[-KEEP:]
        names = [f"{_PREFIX}{number}" for number in kept]
        lines = [f'model_checkpoint_path: "{names[-1]}"', *(f'all_model_checkpoint_paths: "{name}"' for name in names)]
        paths.write_whole(os.path.join(self._directory, "checkpoint"), "\n".join(lines) + "\n")
        for entry in tf.io.gfile.listdir(self._directory):
            name = entry.rstrip("/")
            whole = _FILE.fullmatch(name)
            number = int(whole.group(2)) if whole else None  # None: half of a checkpoint
            later = number is not None and number > newest and number not in self._passed_over
            if name.startswith(_PREFIX) and number not in kept and not later:
                path = os.path.join(self._directory, name)
                (tf.io.gfile.rmtree if tf.io.gfile.isdir(path) else tf.io.gfile.remove)(path)


def path_of(directory: str, number: int) -> str:
    """The path of the checkpoint after `number` updates, without .index."""
    return os.path.join(directory, f"{_PREFIX}{number}")


def numbers(directory: str) -> list[int]:
    """The update counts of the checkpoints that are in the folder or listed there, the newest first.

    Raises:
      RunError: if the folder is a file, or out of reach.
    """
    with _within_reach(directory):
        if not tf.io.gfile.exists(directory):
            return []
        if not tf.io.gfile.isdir(directory):
            raise RunError(f"{directory} is a file where checkpoints should go: move it, or change --model_dir")
        found = [match.group(2) for match in map(_FILE.fullmatch, tf.io.gfile.listdir(directory)) if match]
        listed = os.path.join(directory, "checkpoint")
        if tf.io.gfile.exists(listed):
            with tf.io.gfile.GFile(listed, "rb") as file:
                found += [number.decode() for number in _LISTED.findall(file.read())]
    return sorted({int(number) for number in found}, reverse=True)


def free_space(directory: str) -> str:
    """The space left on the disk of a local directory, for an error line: TensorFlow's writer does not say it."""
    try:
        return f"; {shutil.disk_usage(directory).free / 1e6:,.1f} MB free there"
    except OSError:  # the directory is gone, or remote
        return ""


def _damage(path: str) -> str | None:
    """The reason why a checkpoint is not whole, on one line; None for a whole one, of whatever model.

    TensorFlow's reader gives damage and what is out of reach errors of the same kinds. Of a damaged checkpoint the
    bytes can be read.

    Raises:
      RunError: if the checkpoint is out of reach: a network that fails, too many open files, a bad disk.
    """
    with paths.readable(path) as name:
        if _fault(name) is None:
            return None
        with _within_reach(f"checkpoint {path}", path, name):
            _read_bytes(name)
        fault = _fault(name)  # what was out of reach may not be so any more
        return _cause(fault, path, name) if fault else None


def _fault(name: str) -> Exception | None:
    """What TensorFlow raises when it reads a checkpoint to its end; None for a whole one."""
    try:
        reader = tf.train.load_checkpoint(name)
        for variable in reader.get_variable_to_shape_map():
            reader.get_tensor(variable)  # reading verifies the checksum
    except MemoryError:
        raise
    except Exception as error:  # TensorFlow's reader raises errors of many kinds, IndexError among them
        return error
    return None


def _read_bytes(name: str) -> None:
    """Reads the files of a checkpoint, those that are there. Raises what tf.io.gfile raises of the others."""
    folder, prefix = os.path.split(f"{name}.")
    for entry in tf.io.gfile.listdir(folder):
        if entry.startswith(prefix):
            with contextlib.suppress(tf.errors.NotFoundError), tf.io.gfile.GFile(f"{folder}/{entry}", "rb") as file:
                while file.read(_READ_BYTES):
                    pass


@contextlib.contextmanager
def _within_reach(what: str, path: str = "", name: str = "") -> Iterator[None]:
    """Ends the run where files cannot be read: going on from older ones would lose what was saved.

    Args:
      what: what is read.
      path, name: a checkpoint, and the name by which it is read.

    Raises:
      RunError: in the place of an error of the file system.
    """
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        raise lost_worker(error) or RunError(
            f"{what} cannot be read ({_cause(error, path, name)}): mend that, and start the same command again, which "
            "goes on from there"
        ) from error


def _cause(error: Exception, path: str, name: str) -> str:
    """The text of an error about the checkpoint `path`, which was read by another name."""
    return one_line(RunError(str(error).replace(name, path) if name else str(error)))
