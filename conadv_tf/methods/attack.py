"""The attack: a one-step or PGD perturbation of a batch of images, in pixel units (paper Eq. 3; docs/method.md)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import gin
import tensorflow as tf

from conadv_tf.errors import ConfigError, keep_whole_number, one_line
from conadv_tf.models import xla
from conadv_tf.models.resnet import IMAGENET_MEAN, IMAGENET_STDDEV

NORMS = ("linf", "l2")
GOALS = ("untargeted", "random_target")
LABELS = ("auto", "hard", "smoothed", "predicted")
UNITS = ("pixels", "release_units")
BATCH_NORMS = ("main", "aux", "moving")
COMPUTE_DTYPES = (None, "bfloat16")

_NOT_DIFFERENTIABLE = "the gradient of the logits by the images is needed, and preprocess or a layer has none"
_REMEDY = ": do that to the images before they are given, with data.map, or leave it out"

# Logits float32 [rows, classes] of images float32 [rows, H, W, C] in [0, 255].
LogitsFunction = Callable[[tf.Tensor], tf.Tensor]


@gin.configurable("attack")
@dataclasses.dataclass(frozen=True)
class Attack:
    """The way adversarial examples are made; the defaults are the paper's.

        x̂ = Π_ε( x + δ_0 + α · sign ∇_x L(θ; x + δ_0, y) ), clipped to [0, 255]

    Attributes:
      epsilon_pixels: ε ≥ 0, bound of the perturbation in pixel levels of the 0..255 scale ("P" in Table 5).
      step_size_pixels: α > 0 of each step; None means ε. 1.25 ε is fast FGSM.
      steps: gradient steps, ≥ 1; 1 is the paper's. Each ends projected to the ε-ball and clipped to [0, 255].
      norm: "linf" (sign of the gradient, |δ| ≤ ε) or "l2" (gradient by its per-image RMS, RMS(δ) ≤ ε).
      goal: "untargeted" ascends the loss of the label that `label` names; "random_target" descends the loss of a
        uniformly random wrong label.
      label: the cross-entropy that the goal is about: "hard"; "smoothed", the training loss; "predicted", "hard" of the
        class that the attacked network itself predicts where the attack begins, so that x̂ cannot tell the true one
        (docs/method.md, label leaking). "auto": "predicted" for the untargeted attack of "paired" and "phased", which
        would leak the true label, else "hard".
      random_start_probability: the probability, drawn per batch, that δ_0 ~ U(−ε, ε) rather than 0, in [0, 1]; None: 0
        for the schedules "paired" and "phased", else 1.
      batch_norm: what the attack looks through, never updating it: "main" or "aux" (that branch with
        batch statistics), or "moving" (main with moving statistics, about 25 % cheaper).
      units: "pixels", or "release_units": ε and α times 2/255 on images normalised by ImageNet's mean and
        deviation and clipped to [−1, 1] there, as in the TF1 release (P is about 0.45 P pixel levels).
      compute_dtype: the dtype of the attacked network's activations: "bfloat16"; None: the dtype of training. Where
        training is in float32 a bfloat16 attack saves time, and changes a few signs in a hundred, fewer than a delay of
        one update.
    """

    epsilon_pixels: float = 3.0
    step_size_pixels: float | None = None
    steps: int = 1
    norm: str = "linf"
    goal: str = "untargeted"
    label: str = "auto"
    random_start_probability: float | None = None
    batch_norm: str = "main"
    units: str = "pixels"
    compute_dtype: str | None = None

    def __post_init__(self):
        for name, choices in (
            ("norm", NORMS),
            ("goal", GOALS),
            ("label", LABELS),
            ("units", UNITS),
            ("batch_norm", BATCH_NORMS),
            ("compute_dtype", COMPUTE_DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"attack.{name}={getattr(self, name)!r} is not known: choose one of {choices}")
        if self.label == "predicted" and self.goal != "untargeted":
            raise ConfigError(
                f"attack.label='predicted' with attack.goal={self.goal!r}, which has labels of its own: set "
                "attack.label='auto', or attack.goal='untargeted'"
            )
        if not 0 <= self.epsilon_pixels <= 255:
            raise ConfigError(f"attack.epsilon_pixels={self.epsilon_pixels} is outside [0, 255] pixel levels")
        if self.step_size_pixels is not None and not self.step_size_pixels > 0:
            raise ConfigError(f"attack.step_size_pixels={self.step_size_pixels} must be above 0; None means epsilon")
        keep_whole_number(self, "attack", "steps", 1)
        if not 0 <= (self.random_start_probability or 0) <= 1:
            raise ConfigError(
                f"attack.random_start_probability={self.random_start_probability} is no probability: use [0, 1]"
            )

    def check(self, num_classes: int, channels: int) -> None:
        """Raises ConfigError unless the attack can be on images of so many channels, of so many classes."""
        self._check_channels(channels)
        if self.goal == "random_target" and num_classes < 2:
            raise ConfigError(
                f"attack.goal='random_target' needs another class than the true one, and there is {num_classes}: use "
                "attack.goal='untargeted'"
            )

    def adversarial_examples(
        self,
        logits: LogitsFunction,
        num_classes: int,
        loss,
        images: tf.Tensor,
        labels: tf.Tensor,
        seed: tf.Tensor,
    ) -> tf.Tensor:
        """x̂ for a batch; pure, local to the replica, every shape static where those of the inputs are.

        Args:
          logits: the network at the weights to attack.
          num_classes: width of the logits.
          loss: the training loss, (labels, logits) → float32 [rows]; used where `label` is "smoothed".
          images: float32 [rows, H, W, C] in [0, 255].
          labels: int32 [rows].
          seed: int32 [2]; the same seed gives the same random start and targets.

        Returns:
          float32 [rows, H, W, C], in [0, 255] and within ε of `images` (see `units` for the exception).
        """
        self.check(num_classes, images.shape[-1])
        start_seed, coin_seed, _ = _split(seed)
        epsilon, _, _ = self._bounds(images.shape[-1])
        probability = 1.0 if self.random_start_probability is None else self.random_start_probability
        coin = xla.random_uniform((), coin_seed, 0.0, 1.0)
        start = xla.random_uniform(tf.shape(images), start_seed, -1.0, 1.0)
        delta = start * tf.cast(coin < probability, tf.float32)
        adversarial = images + epsilon * delta
        aim = self.aim(labels, num_classes, seed)
        for _ in range(self.steps):
            gradient, aim = self.gradient(logits, loss, adversarial, aim)
            adversarial = self._moved(images, delta, gradient)
            delta = tf.math.divide_no_nan(adversarial - images, epsilon)
        return tf.stop_gradient(adversarial)

    def aim(self, labels: tf.Tensor, num_classes: int, seed: tf.Tensor) -> tf.Tensor | None:
        """The labels that the attack is about, int32 [rows]: the true ones, or targets; None: those predicted.

        Args: see `adversarial_examples`.
        """
        if self.label == "predicted":
            return None
        return labels if self.goal == "untargeted" else random_wrong_labels(labels, num_classes, _split(seed)[2])

    def objective(self, loss, logits: tf.Tensor, aim: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """What the attack ascends: a float32 scalar, the sum over the rows, and the labels that it is about.

        Args:
          loss: see `adversarial_examples`.
          logits: float32 [rows, classes].
          aim: see `aim`.
        """
        if aim is None:
            aim = tf.argmax(logits, 1, output_type=tf.int32)
        if self.label == "smoothed":
            losses = loss(aim, logits)
        else:
            # Of a label out of range this op makes NaN or an error, by device; the training loss tells of it.
            known = tf.clip_by_value(aim, 0, logits.shape[-1] - 1)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(known, logits)
        return tf.reduce_sum(losses if self.goal == "untargeted" else -losses), aim

    def one_step(self, images: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """x̂ of one step from δ_0 = 0 along `gradient`, ∇_x of the loss to ascend, both float32 [rows, H, W, C].

        The result is that of `adversarial_examples`; the scale of the gradient, 1e-30 to 1e38, does not matter.
        """
        return tf.stop_gradient(self._moved(images, tf.zeros_like(images), gradient))

    @property
    def forward_units(self) -> float:
        """The cost of making x̂, in forward passes over the images (docs/method.md)."""
        return self.steps * (1.5 if self.batch_norm == "moving" else 2.0)

    @property
    def is_training_gradient(self) -> bool:
        """Whether what the attack ascends is the training loss itself, so that one backward pass serves both."""
        return self.goal == "untargeted" and self.label == "smoothed"

    def keeps_whole_pixels(self) -> bool:
        """Tells whether the attack takes images of whole pixel levels to images of whole pixel levels."""
        step = self.epsilon_pixels * min(1.0, self._relative_step())
        whole = float(step).is_integer() and self.steps == 1 and self.random_start_probability == 0
        return whole and self.norm == "linf" and self.units == "pixels"

    def _bounds(self, channels: int):
        """ε and the range of the result in pixel levels: scalars, or float32 [channels]."""
        self._check_channels(channels)
        if self.units == "pixels":
            return self.epsilon_pixels, 0.0, 255.0
        mean, stddev = 255.0 * tf.constant(IMAGENET_MEAN), 255.0 * tf.constant(IMAGENET_STDDEV)
        return self.epsilon_pixels * 2.0 / 255.0 * stddev, mean - stddev, mean + stddev

    def _check_channels(self, channels: int) -> None:
        if self.units == "release_units" and channels != len(IMAGENET_MEAN):
            raise ConfigError(
                f"attack.units='release_units' normalises ImageNet's three channels, the images have {channels}: "
                "use attack.units='pixels'"
            )

    def _relative_step(self) -> float:
        """α / ε."""
        if self.step_size_pixels is None or self.epsilon_pixels == 0:
            return 1.0
        return self.step_size_pixels / self.epsilon_pixels

    def gradient(
        self, logits: LogitsFunction, loss, images: tf.Tensor, aim: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The gradient with respect to the images of what the attack ascends, float32 [rows, H, W, C], and its labels.

        Args:
          logits, loss: see `adversarial_examples`.
          images: float32 [rows, H, W, C] in [0, 255], the point at which the gradient is taken.
          aim: see `aim`.
        """
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(images)
            value, aim = self.objective(loss, logits(images), aim)
        return connected(differentiated(tape, value, images)), aim

    def _moved(self, images, delta, gradient):
        """x̂ after a step from `delta`, which is in units of ε: its ball is the unit ball, whatever ε's units are."""
        epsilon, lower, upper = self._bounds(images.shape[-1])
        return tf.clip_by_value(images + epsilon * self._stepped(delta, gradient), lower, upper)

    def _stepped(self, delta, gradient):
        """δ after a step along the gradient's sign, or its RMS-normalised value, projected onto the unit ball."""
        if self.norm == "linf":
            return tf.clip_by_value(delta + self._relative_step() * tf.sign(gradient), -1.0, 1.0)
        # Squares of very small or large gradients would leave float32; by the largest magnitude they lie in [0, 1].
        gradient = tf.math.divide_no_nan(gradient, tf.reduce_max(tf.abs(gradient), [1, 2, 3], keepdims=True))
        delta += self._relative_step() * tf.math.divide_no_nan(gradient, _rms(gradient))
        return delta / tf.maximum(1.0, _rms(delta))


def differentiated(tape: tf.GradientTape, value: tf.Tensor, sources: Any) -> Any:
    """The gradients of a scalar, None for sources that it does not depend on.

    Raises:
      ConfigError: for a network with an operation that TensorFlow cannot differentiate.
    """
    try:
        return tape.gradient(value, sources)
    except LookupError as error:
        raise ConfigError(f"{_NOT_DIFFERENTIABLE} ({one_line(error)}){_REMEDY}") from error


def connected(by_image: tf.Tensor | None) -> tf.Tensor:
    """∇_x as it is.

    Raises:
      ConfigError: if there is none, as behind a cast to whole numbers, and the attack would not know where to go.
    """
    if by_image is None:
        raise ConfigError(f"{_NOT_DIFFERENTIABLE} (a cast to whole numbers, a rounding, tf.stop_gradient){_REMEDY}")
    return by_image


def _split(seed: tf.Tensor) -> list[tf.Tensor]:
    """Seeds of the random start, of the coin that decides on it, and of the targets."""
    return xla.split_seed(seed, 3)


def random_wrong_labels(labels: tf.Tensor, num_classes: int, seed: tf.Tensor) -> tf.Tensor:
    """Draws labels uniformly from the other classes; int32 [rows] like `labels`."""
    shift = tf.random.stateless_uniform(tf.shape(labels), seed, minval=1, maxval=num_classes, dtype=tf.int32)
    return tf.math.floormod(labels + shift, num_classes)


def _rms(values: tf.Tensor) -> tf.Tensor:
    """Root mean square of each image, [rows, 1, 1, 1]."""
    return tf.sqrt(tf.reduce_mean(tf.square(values), axis=[1, 2, 3], keepdims=True))
