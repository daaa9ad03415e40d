"""The training loss: cross-entropy with label smoothing (paper, Table 6)."""

import gin
import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError


@gin.configurable("loss")
class SmoothedCrossEntropy(tf_keras.losses.Loss):
    """Cross-entropy of softmax(logits) against (1 − s) · one-hot + s / classes.

    Args:
      label_smoothing: s in [0, 1); 0.1 is Table 6 of the paper.
    """

    def __init__(self, label_smoothing: float = 0.1, name: str = "smoothed_cross_entropy"):
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing={label_smoothing} is outside [0, 1): the paper's is 0.1")
        super().__init__(tf_keras.losses.Reduction.NONE, name)
        self.label_smoothing = label_smoothing

    def call(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """float32 [rows] for labels int [rows] and logits float32 [rows, classes]."""
        classes = logits.shape[-1]
        targets = tf.one_hot(labels, classes) * (1.0 - self.label_smoothing) + self.label_smoothing / classes
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    def get_config(self) -> dict:
        return {"label_smoothing": self.label_smoothing, "name": self.name}
