"""Callbacks that show and keep a run while it trains: speed, evaluation, progress bar, metrics.jsonl, checkpoints."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf
import tf_keras
import tqdm
from absl import logging

from conadv_tf import terminal
from conadv_tf.run import divergence, leak
from conadv_tf.run.checkpoint import Checkpoints, EpochSoFar
from conadv_tf.run.folder import RunFolder, recorded
from conadv_tf.run.preemption import Request
from conadv_tf.training.plan import Plan

# Seconds between two refreshes of the progress bar, each of which waits for the device.
REFRESH_SECONDS = 0.5
# Seconds after a line until the next, where there is no screen: the log of a long run shows every epoch.
LINE_SECONDS = 60.0
# Loss and top-1 come first: a narrow screen cuts the end.
BAR = "{desc} {percentage:3.0f} % |{bar:10}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"


class Throughput(tf_keras.callbacks.Callback):
    """Adds `seconds`, `images_per_second` and `input_wait_share` to the logs of an epoch; goes before the others.

    The first call of a program compiles it and counts for `seconds` alone. Evaluation and saving do not count.

    Args:
      plan: plan of the run.
      earlier_seconds: seconds that an earlier process has trained in the first epoch of this one.
    """

    _supports_tf_logs = True  # keeps Keras from waiting for the device after every call

    def __init__(self, plan: Plan, earlier_seconds: float = 0.0):
        super().__init__()
        self._plan, self._earlier = plan, earlier_seconds
        self._compiled = False

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        if epoch == self.model.method.start_epoch:
            self._compiled = False  # the adversarial half begins with a program of its own
        self._begin = self._measured_from = self._end = time.perf_counter()
        self._waited, self._first_step, self._last_step = 0.0, 0, 0

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        self._end, self._last_step = time.perf_counter(), batch + 1
        if self._compiled:
            # TensorFlow's clock is the wall clock: a wait that saw it jump, back or beyond the epoch, is left out.
            waited = logs["input_wait_seconds"]
            possible = (waited >= 0.0) & (waited <= self._end - self._measured_from)
            self._waited += tf.where(possible, waited, tf.zeros_like(waited))
        else:
            self._compiled, self._measured_from, self._first_step = True, self._end, batch + 1

    def current(self) -> tuple[float, float]:
        """The clean images per second, and the share of the time spent waiting for input, in this epoch so far."""
        seconds = self._end - self._measured_from
        images = (self._last_step - self._first_step) * self._plan.global_batch_size
        return (images / seconds, float(self._waited) / seconds) if images and seconds else (0.0, 0.0)

    def seconds(self) -> float:
        """The seconds of training in this epoch so far."""
        return self._earlier + self._end - self._begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what is done within it, between two calls of an epoch."""
        began = time.perf_counter()
        yield
        passed = time.perf_counter() - began
        self._begin, self._measured_from, self._end = (
            moment + passed for moment in (self._begin, self._measured_from, self._end)
        )

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        logs.pop("input_wait_seconds", None)
        logs["images_per_second"], logs["input_wait_share"] = self.current()
        logs["seconds"] = self.seconds()
        self._earlier = 0.0


class GoOn(tf_keras.callbacks.Callback):
    """Lets fit begin within its first epoch.

    fit's `initial_epoch` counts whole epochs, and Keras 2 offers nothing public for a part of one. Its own callback for
    preempted runs, BackupAndRestore, sets the model's `_training_state`, which fit asks where to begin. This callback
    does the same for the run's own checkpoints, and takes itself out again as soon as fit has asked.

    Args:
      updates: updates of the epoch that have been made.
      so_far: metrics of those updates.
    """

    def __init__(self, updates: int, so_far: EpochSoFar):
        super().__init__()
        self._updates, self._so_far = updates, so_far

    def on_train_begin(self, logs=None) -> None:
        self.model._training_state = self

    def maybe_load_initial_counters_from_ckpt(self, steps_per_epoch: int, initial_epoch: int, mode) -> tuple[int, int]:
        """The epoch and the update within it that fit begins with; Keras asks its `_training_state` for them."""
        return initial_epoch, self._updates

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        if self.model._training_state is self:
            self.model._training_state = None
            for variable, value in zip(self.model.metrics[0].variables, self._so_far.means, strict=True):
                variable.assign(value)  # fit has just set them to 0


class Evaluation(tf_keras.callbacks.Callback):
    """Adds the test results to the logs of the epochs they are `due`, as val_loss, val_top1, val_top5.

    Not fit's `validation_data`, which would keep one iterator of a distributed data set for all epochs.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], due: Callable[[int], bool]):
        super().__init__()
        self._evaluate, self._due = evaluate, due

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if self._due(epoch):
            logs.update({f"val_{name}": value for name, value in self._evaluate().items()})


class LeakWatch(tf_keras.callbacks.Callback):
    """Adds `leak`, see leak.py, to the logs of epochs with adversarial images; warns once where a run leaks.

    Args:
      warmup_steps: updates of the learning rate's warm-up, whose epochs are not warned of.
      earlier: the lines of metrics.jsonl before the first epoch of this fit: where they leak, a warning has been given.
    """

    def __init__(self, plan: Plan, warmup_steps: int, earlier: Sequence[dict]):
        super().__init__()
        self._plan, self._warmup_steps, self._earlier = plan, warmup_steps, earlier
        self._has_warned: bool | None = None

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if "adversarial_top1" not in logs or epoch < self.model.method.start_epoch:
            return
        logs["leak"] = leak.leak_of(logs)
        if self._has_warned is None:
            self._has_warned = self._leaks(self._earlier)
        line = {"epoch": epoch + 1, "step": (epoch + 1) * self._plan.steps_per_epoch, **logs}
        if not self._has_warned and self._leaks([line]):
            self._has_warned = True
            logging.warning("%s", leak.warning(100.0 * float(logs["leak"]), epoch + 1, self.model.method))

    def _leaks(self, epochs: Sequence[dict]) -> bool:
        return leak.leaks(leak.leak_result(epochs, self._warmup_steps, self.model.method.start_epoch))


class EndEarly(tf_keras.callbacks.Callback):
    """Cuts an evaluation short once the process has been asked to end. Raises Cut from within evaluate."""

    class Cut(Exception):  # noqa: N818
        """The end of an evaluation that was cut short; no error."""

    def __init__(self, request: Request):
        super().__init__()
        self._request = request

    def on_test_batch_begin(self, batch: int, logs=None) -> None:
        if self._request:
            raise self.Cut


class ProgressBar(tf_keras.callbacks.Callback):
    """Shows a bar on a screen; elsewhere lines, about ten a run, and one every LINE_SECONDS of a long run."""

    _supports_tf_logs = True

    def __init__(self, plan: Plan, recipe: str, throughput: Throughput, first_update: int):
        super().__init__()
        self._plan, self._throughput, self._epochs_before = plan, throughput, first_update / plan.steps_per_epoch
        self._began = time.perf_counter()
        self._bar = tqdm.tqdm(
            total=plan.total_steps,
            initial=first_update,
            desc=recipe,
            bar_format=BAR,
            mininterval=REFRESH_SECONDS,
            dynamic_ncols=True,
            disable=None,
        )
        self._refreshed, self._test = 0.0, ""
        self._line_due = 0.0

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        now = time.perf_counter()
        if self._bar.disable or now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        rate, waited = self._throughput.current()
        self._bar.set_postfix_str(
            f"loss {float(logs['loss']):.3f}, top-1 {100 * float(logs['clean_top1']):.1f} %{self._test}, "
            f"{rate:,.0f} images/s, input wait {waited:.0%}",
            refresh=False,
        )
        self._move_to(self._epoch * self._plan.steps_per_epoch + batch + 1)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if "val_top1" in logs:
            self._test = f", test top-1 {100 * logs['val_top1']:.2f} %"
        if self._bar.disable:
            self._say_if_due(epoch, logs)
        else:
            self._move_to((epoch + 1) * self._plan.steps_per_epoch)

    def _say_if_due(self, epoch: int, logs: dict) -> None:
        """Prints the epoch's line after each tenth of the run, after the last epoch, and LINE_SECONDS after a line."""
        tenth = (epoch + 1) % max(1, self._plan.epochs // 10) == 0 or epoch + 1 == self._plan.epochs
        if tenth or time.perf_counter() >= self._line_due:
            self._line_due = time.perf_counter() + LINE_SECONDS
            terminal.say(self._line(epoch, logs))

    def _move_to(self, update: int) -> None:
        with terminal.may_be_gone():
            self._bar.update(update - self._bar.n)

    def close(self) -> None:
        """Ends the line of the bar, which Keras does not ask for when fit raises."""
        with terminal.may_be_gone():
            self._bar.close()

    def _line(self, epoch: int, logs: dict) -> str:
        seconds_per_epoch = (time.perf_counter() - self._began) / (epoch + 1 - self._epochs_before)
        remaining = (self._plan.epochs - epoch - 1) * seconds_per_epoch
        return (
            f"epoch {epoch + 1}/{self._plan.epochs}  loss {logs['loss']:.4f}  "
            f"train top-1 {100 * logs['clean_top1']:.2f} %{self._test}  {logs['images_per_second']:,.0f} images/s  "
            f"input wait {logs['input_wait_share']:.0%}  ETA {tqdm.tqdm.format_interval(remaining)}"
        )


class Recorder(tf_keras.callbacks.Callback):
    """Keeps metrics.jsonl and checkpoints; ends a run that is asked to end.

    metrics.jsonl has a line an epoch: epoch (from 1), step (updates made), and the epoch's logs, with the test results
    as test_loss, test_top1, test_top5 (shares in [0, 1]). The line is written before the checkpoint. A run that resumes
    drops the lines after its checkpoint, so that none is missing or there twice. The line of an epoch that was
    interrupted covers all updates of the epoch; its `seconds` are the sum over the processes, its images_per_second
    and input_wait_share the values of the last process.

    Args:
      plan, folder, checkpoints, throughput: the run's.
      due: (epoch, from 0) → whether the epoch ends with a checkpoint.
      every_steps: updates between two checkpoints within an epoch; 0: none.
      update: updates made before this fit.
      request: asks the run to end, which it does after the present call, saved.
    """

    _supports_tf_logs = True

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        checkpoints: Checkpoints,
        throughput: Throughput,
        due: Callable[[int], bool],
        every_steps: int,
        update: int,
        request: Request,
    ):
        super().__init__()
        self._plan, self._folder, self._checkpoints, self._throughput = plan, folder, checkpoints, throughput
        self._due, self._every_steps, self._saved, self._request = due, every_steps, update, request
        self._epochs = folder.read_metrics()[: update // plan.steps_per_epoch]

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self._before = epoch * self._plan.steps_per_epoch
        self._saved = max(self._saved, self._before)

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        made = self._before + batch + 1
        due = self._every_steps and made // self._every_steps > self._saved // self._every_steps
        if batch + 1 == self._plan.steps_per_epoch or not (due or self._request):
            return  # on_epoch_end takes care of the last update
        divergence.check(self.model, logs, made // self._plan.steps_per_epoch)
        self._saved = made
        if self._folder.writes:
            with self._throughput.paused():
                saved = self._checkpoints.save(self._throughput.seconds())
            self._request.end_if_made(saved)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        values = {name.replace("val_", "test_"): recorded(value) for name, value in logs.items()}
        self._epochs.append({"epoch": epoch + 1, "step": (epoch + 1) * self._plan.steps_per_epoch, **values})
        self._folder.write_metrics(self._epochs)
        if self._folder.writes and (self._due(epoch) or self._request):
            self._request.end_if_made(self._checkpoints.save())
