"""What a run shows and keeps while it trains: progress bar, metrics.jsonl, TensorBoard, checkpoints."""

import math
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras
import tqdm

from conadv_tf.checkpoint import Checkpoints
from conadv_tf.errors import RunError
from conadv_tf.plan import Plan
from conadv_tf.report import RunFolder
from conadv_tf.split_batchnorm import SplitBatchNormalization

# Seconds between two refreshes of the progress bar, each of which waits for the device.
REFRESH_SECONDS = 0.5
# White pixels between the pictures of a panel.
GAP = 4


class Throughput(tf_keras.callbacks.Callback):
    """Adds `seconds`, `images_per_second` and `input_wait_share` to the logs of an epoch; goes before the others.

    The first call of a program compiles it and counts for `seconds` alone. Evaluation and saving do not count.
    """

    _supports_tf_logs = True  # keeps Keras from waiting for the device after every call

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan
        self._compiled = False

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        if epoch == self.model.method.start_epoch:
            self._compiled = False  # the adversarial half begins with a program of its own
        self._begin = self._measured_from = self._end = time.perf_counter()
        self._waited, self._first_step, self._last_step = 0.0, 0, 0

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        self._end, self._last_step = time.perf_counter(), batch + 1
        if self._compiled:
            self._waited += logs["input_wait_seconds"]
        else:
            self._compiled, self._measured_from, self._first_step = True, self._end, batch + 1

    def current(self) -> tuple[float, float]:
        """(clean images per second, share of the time spent waiting for input) of this epoch so far."""
        seconds = self._end - self._measured_from
        images = (self._last_step - self._first_step) * self._plan.global_batch_size
        return (images / seconds, float(self._waited) / seconds) if images and seconds else (0.0, 0.0)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        logs.pop("input_wait_seconds", None)
        logs["images_per_second"], logs["input_wait_share"] = self.current()
        logs["seconds"] = self._end - self._begin


class StopIfNotFinite(tf_keras.callbacks.Callback):
    """Ends a run whose loss is not finite before its epoch is evaluated, recorded or saved.

    Raises:
      RunError: from within fit; the last checkpoint stays the last good one.
    """

    _supports_tf_logs = True

    def __init__(self):
        super().__init__()
        self._checked = time.perf_counter()

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        if time.perf_counter() - self._checked > REFRESH_SECONDS:
            self._checked = time.perf_counter()
            self._check(logs)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        self._check(logs)

    def _check(self, logs: dict) -> None:
        # A mean over the epoch so far, so what was not finite once still shows.
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} in epoch {self._epoch + 1}, learning rate {float(logs['learning_rate']):.3g}: "
                "lower learning_rate.peak_learning_rate or lengthen learning_rate.warmup_epochs, in a new --model_dir"
            )


class Evaluation(tf_keras.callbacks.Callback):
    """Adds the test results to the logs of every n-th epoch and the last, as val_loss, val_top1, val_top5.

    Not fit's `validation_data`, which would keep one iterator of a distributed data set for all epochs.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float]], every_epochs: int, epochs: int):
        super().__init__()
        self._evaluate, self._every, self._epochs = evaluate, every_epochs, epochs

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if (epoch + 1) % self._every == 0 or epoch + 1 == self._epochs:
            logs.update({f"val_{name}": value for name, value in self._evaluate().items()})


class ProgressBar(tf_keras.callbacks.Callback):
    """One bar for the run with ETA, images/s and input-wait share; one line an epoch where there is no terminal."""

    _supports_tf_logs = True

    def __init__(self, plan: Plan, recipe: str, throughput: Throughput, first_epoch: int):
        super().__init__()
        self._plan, self._throughput, self._first_epoch = plan, throughput, first_epoch
        self._began = time.perf_counter()
        self._bar = tqdm.tqdm(
            total=plan.total_steps,
            initial=first_epoch * plan.steps_per_epoch,
            desc=recipe,
            unit="update",
            mininterval=REFRESH_SECONDS,
            dynamic_ncols=True,
            disable=None,
        )
        self._refreshed, self._test = 0.0, ""

    def on_epoch_begin(self, epoch: int, logs=None) -> None:
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        now = time.perf_counter()
        if self._bar.disable or now - self._refreshed < REFRESH_SECONDS:
            return
        self._refreshed = now
        rate, waited = self._throughput.current()
        self._bar.set_postfix_str(
            f"{rate:,.0f} images/s, input wait {waited:.0%}, loss {float(logs['loss']):.3f}, "
            f"top-1 {100 * float(logs['clean_top1']):.1f} %{self._test}",
            refresh=False,
        )
        self._bar.update(self._epoch * self._plan.steps_per_epoch + batch + 1 - self._bar.n)

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if "val_top1" in logs:
            self._test = f", test top-1 {100 * logs['val_top1']:.2f} %"
        if self._bar.disable:
            print(self._line(epoch, logs), flush=True)
        else:
            self._bar.update((epoch + 1) * self._plan.steps_per_epoch - self._bar.n)

    def on_train_end(self, logs=None) -> None:
        self._bar.close()

    def _line(self, epoch: int, logs: dict) -> str:
        seconds_per_epoch = (time.perf_counter() - self._began) / (epoch + 1 - self._first_epoch)
        remaining = (self._plan.epochs - epoch - 1) * seconds_per_epoch
        return (
            f"epoch {epoch + 1}/{self._plan.epochs}  loss {logs['loss']:.4f}  "
            f"train top-1 {100 * logs['clean_top1']:.2f} %{self._test}  {logs['images_per_second']:,.0f} images/s  "
            f"input wait {logs['input_wait_share']:.0%}  ETA {tqdm.tqdm.format_interval(remaining)}"
        )


class Recorder(tf_keras.callbacks.Callback):
    """Keeps metrics.jsonl and checkpoints.

    A line an epoch: epoch (from 1), step (updates made), and the epoch's logs, test results as test_loss,
    test_top1, test_top5 (shares in [0, 1]). The line is written before the checkpoint; lines after the
    checkpoint that a run resumes from are dropped, so none is missing or twice.
    """

    def __init__(self, plan: Plan, folder: RunFolder, checkpoints: Checkpoints, every_epochs: int, first_epoch: int):
        super().__init__()
        self._plan, self._folder, self._checkpoints, self._every = plan, folder, checkpoints, every_epochs
        self._epochs = folder.read_metrics()[:first_epoch]

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        values = {name.replace("val_", "test_"): recorded(value) for name, value in logs.items()}
        self._epochs.append({"epoch": epoch + 1, "step": (epoch + 1) * self._plan.steps_per_epoch, **values})
        self._folder.write_metrics(self._epochs)
        if self._folder.writes and ((epoch + 1) % self._every == 0 or epoch + 1 == self._plan.epochs):
            self._checkpoints.save()


def recorded(value: float) -> float:
    """A value as metrics.jsonl keeps it: six significant digits."""
    return float(f"{float(value):.6g}")


class TensorBoard(tf_keras.callbacks.Callback):
    """Scalars, histograms of γ of each BN set and a panel clean | perturbation | adversarial, by update.

    Args:
      folder: of the run; events go to its `tensorboard`.
      plan: of the run.
      examples: (images, labels) for the panel, a few; None or a method without attack: no panel.
    """

    GROUPS = {  # noqa: RUF012
        "loss": "train/loss",
        "clean_loss": "clean/loss",
        "clean_top1": "clean/top1",
        "augmented_loss": "augmented/loss",
        "augmented_top1": "augmented/top1",
        "adversarial_loss": "adversarial/loss",
        "adversarial_top1": "adversarial/top1",
        "learning_rate": "optimizer/learning_rate",
        "gradient_norm": "optimizer/gradient_norm",
        "squared_gradient_norm": "optimizer/squared_gradient_norm",
        "trust_ratio_min": "trust_ratio/min",
        "trust_ratio_median": "trust_ratio/median",
        "trust_ratio_max": "trust_ratio/max",
        "drift": "conadv/drift",
        "theory_drift": "theory/drift",
        "theory_lipschitz_x_theta": "theory/lipschitz_x_theta",
        "theory_equal_signs": "theory/equal_signs",
        "theory_fresh_loss": "theory/fresh_loss",
        "theory_stale_loss": "theory/stale_loss",
        "theory_perturbation_distance": "theory/perturbation_distance",
        "theory_mean_squared_gradient_norm": "theory/mean_squared_gradient_norm",
        "images_per_second": "speed/images_per_second",
        "input_wait_share": "speed/input_wait_share",
        "val_loss": "test/loss",
        "val_top1": "test/top1",
        "val_top5": "test/top5",
    }

    def __init__(self, folder: RunFolder, plan: Plan, examples: tuple[np.ndarray, np.ndarray] | None):
        super().__init__()
        self._plan, self._examples = plan, examples
        self._writer = tf.summary.create_file_writer(folder.file("tensorboard"))

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        step = (epoch + 1) * self._plan.steps_per_epoch
        # Panels are large beside scalars: about ten of them tell the story.
        draw = (epoch + 1) % max(1, self._plan.epochs // 10) == 0
        with self._writer.as_default(step=step):
            for name, tag in self.GROUPS.items():
                if name in logs:
                    tf.summary.scalar(tag, logs[name])
            self._write_gammas()
            if draw and self._examples is not None and self.model.method.attack is not None:
                self._write_panel(*self._examples)
        self._writer.flush()

    def _write_gammas(self) -> None:
        layers = [m for m in self.model.network.submodules if isinstance(m, SplitBatchNormalization)]
        for branch in self.model.network.branches:
            values = np.concatenate([layer.gammas[branch].numpy() for layer in layers])
            tf.summary.histogram(f"gamma/{branch}", values)

    def _write_panel(self, images: np.ndarray, labels: np.ndarray) -> None:
        adversarial = self.model.adversarial_examples(images, labels).numpy()
        factor, panel = attack_panel(images, adversarial)
        tf.summary.image(
            "conadv/panel",
            panel[None],
            description=f"clean | perturbation × {factor:.0f} around grey | adversarial, one image a row",
        )


def attack_panel(images: np.ndarray, adversarial: np.ndarray, height: int = 64) -> tuple[float, np.ndarray]:
    """A picture of an attack, one image a row: clean | perturbation, magnified around grey | adversarial.

    Args:
      images, adversarial: [rows, H, W, C] in [0, 255].
      height: pixels an image is enlarged to at least.

    Returns:
      the factor of magnification, and the panel, uint8 [rows · H', 3 · W', C], a white gap after each picture.
    """
    clean = images.astype(np.float32)
    delta = adversarial - clean
    factor = 127.0 / max(float(np.abs(delta).max()), 1.0)
    scale = max(1, -(-height // images.shape[1]))
    rows = []
    for picture in (clean, 127.5 + factor * delta, adversarial):
        enlarged = picture.repeat(scale, axis=1).repeat(scale, axis=2)
        rows.append(np.pad(enlarged, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255))
    panel = np.concatenate(list(np.concatenate(rows, axis=2)), axis=0)
    return factor, np.clip(np.round(panel), 0, 255).astype(np.uint8)
