"""TensorBoard: scalars, histograms, the panel of the attack, and the pages of tensorboard_pages.py."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf.errors import one_line
from conadv_tf.models.split_batchnorm import SplitBatchNormalization
from conadv_tf.run import tensorboard_pages
from conadv_tf.run.folder import RunFolder
from conadv_tf.training.plan import Plan

# White pixels between the pictures of a panel.
GAP = 4


class TensorBoard(tf_keras.callbacks.Callback):
    """Scalars, histograms of γ of each branch, and a panel clean | perturbation | adversarial, by update; pages.

    Training goes on without TensorBoard, after one warning, where its events cannot be written.

    Args:
      folder: folder of the run; events go to its `tensorboard`.
      plan: plan of the run.
      examples: (images, labels) for the panel, a few; None or a method without attack: no panel.
      hyperparameters: the run's, see `tensorboard_pages.write`.
    """

    GROUPS = {  # noqa: RUF012
        "loss": "train/loss",
        "clean_loss": "clean/loss",
        "clean_top1": "clean/top1",
        "augmented_loss": "augmented/loss",
        "augmented_top1": "augmented/top1",
        "adversarial_loss": "adversarial/loss",
        "adversarial_top1": "adversarial/top1",
        "leak": "conadv/leak",
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

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        examples: tuple[np.ndarray, np.ndarray] | None,
        hyperparameters: Mapping[str, str | float],
    ):
        super().__init__()
        self._plan, self._examples = plan, examples
        self._directory = folder.file("tensorboard")
        self._writer: tf.summary.SummaryWriter | None = None
        with self._given_up_where_it_fails():
            self._writer = tf.summary.create_file_writer(self._directory)
            with self._writer.as_default():
                tensorboard_pages.write(hyperparameters, folder.read_config() or "")
            self._writer.flush()

    def on_epoch_end(self, epoch: int, logs=None) -> None:
        if self._writer is None:
            return
        step = (epoch + 1) * self._plan.steps_per_epoch
        # Panels are large beside scalars: about ten a run tell the story.
        draw = (epoch + 1) % max(1, self._plan.epochs // 10) == 0
        panel = self._panel() if draw else None
        with self._given_up_where_it_fails(), self._writer.as_default(step=step):
            for name, tag in self.GROUPS.items():
                if name in logs:
                    tf.summary.scalar(tag, logs[name])
            self._write_gammas()
            if panel:
                self._write_panel(*panel)
            self._writer.flush()
            if not tf.io.gfile.isdir(self._directory):  # TensorFlow's writer does not mind a missing folder
                raise FileNotFoundError("it is gone")

    def on_train_end(self, logs=None) -> None:
        if self._writer is not None:
            with self._given_up_where_it_fails(), self._writer.as_default():
                tensorboard_pages.write_end()
                self._writer.flush()

    @contextlib.contextmanager
    def _given_up_where_it_fails(self) -> Iterator[None]:
        whole = False
        with _warned_of(self._directory):
            yield
            whole = True
        if not whole:
            self._writer = None

    def _write_gammas(self) -> None:
        layers = [m for m in self.model.network.submodules if isinstance(m, SplitBatchNormalization)]
        for branch in self.model.network.branches:
            values = [layer.gammas[branch].numpy() for layer in layers]
            if values:  # a network may have no batch norm
                tf.summary.histogram(f"gamma/{branch}", np.concatenate(values))

    def _panel(self) -> tuple[float, np.ndarray] | None:
        if self._examples is None or self.model.method.attack is None:
            return None
        images, labels = self._examples
        return attack_panel(images, self.model.adversarial_examples(images, labels).numpy())

    def _write_panel(self, factor: float, panel: np.ndarray) -> None:
        tf.summary.image(
            "conadv/panel",
            panel[None],
            description=f"clean | perturbation × {factor:.0f} around grey | adversarial, one image a row",
        )


def write_test_results(folder: RunFolder, update: int, results: Mapping[str, float]) -> None:
    """Shows test results of an epoch that ended at `update` in an earlier process, by the names of `evaluate`."""
    directory = folder.file("tensorboard")
    with _warned_of(directory), tf.summary.create_file_writer(directory).as_default(step=update):
        for name, value in results.items():
            tf.summary.scalar(TensorBoard.GROUPS[f"val_{name}"], value)


@contextlib.contextmanager
def _warned_of(directory: str) -> Iterator[None]:
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        why = one_line(error)
        logging.warning("%s cannot be written (%s): training goes on without TensorBoard", directory, why)


def attack_panel(images: np.ndarray, adversarial: np.ndarray, height: int = 64) -> tuple[float, np.ndarray]:
    """A picture of an attack, one image a row: clean | perturbation, magnified around grey | adversarial.

    Args:
      images, adversarial: [n, H, W, C] in [0, 255].
      height: pixels an image is enlarged to at least.

    Returns:
      the factor of magnification, and the panel, uint8 [n · H', 3 · W', C], a white gap after each picture.
    """
    clean = images.astype(np.float32)
    delta = adversarial - clean
    factor = 127.0 / max(float(np.abs(delta).max()), 1.0)
    scale = max(1, -(-height // images.shape[1]))
    columns = []
    for picture in (clean, 127.5 + factor * delta, adversarial):
        enlarged = picture.repeat(scale, axis=1).repeat(scale, axis=2)
        columns.append(np.pad(enlarged, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255))
    panel = np.concatenate(list(np.concatenate(columns, axis=2)), axis=0)
    return factor, np.clip(np.round(panel), 0, 255).astype(np.uint8)
