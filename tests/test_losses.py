"""Cross-entropy with label smoothing."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError
from conadv_tf.training.losses import SmoothedCrossEntropy


def test_hand_worked_numbers():
    # Two classes, logits (0, ln 3): p = (1/4, 3/4). Smoothed label 1: 0.05 and 0.95.
    logits = tf.constant([[0.0, np.log(3.0)]], tf.float32)
    expected = 0.05 * np.log(4) + 0.95 * np.log(4 / 3)
    np.testing.assert_allclose(SmoothedCrossEntropy(0.1).call(tf.constant([1]), logits), [expected], rtol=1e-6)
    np.testing.assert_allclose(SmoothedCrossEntropy(0.0).call(tf.constant([1]), logits), [np.log(4 / 3)], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_equals_keras_categorical_cross_entropy(smoothing):
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(6, 10)).astype(np.float32), random.integers(0, 10, 6)
    expected = tf_keras.losses.categorical_crossentropy(
        np.eye(10, dtype=np.float32)[labels], logits, from_logits=True, label_smoothing=smoothing
    )
    actual = SmoothedCrossEntropy(smoothing).call(tf.constant(labels, tf.int32), tf.constant(logits))
    assert actual.dtype == tf.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_configuration_round_trip():
    loss = SmoothedCrossEntropy(0.2, name="mine")
    assert SmoothedCrossEntropy.from_config(loss.get_config()).get_config() == loss.get_config()


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_impossible_smoothing_is_refused_by_value(smoothing):
    with pytest.raises(ConfigError, match=f"loss.label_smoothing={smoothing}"):
        SmoothedCrossEntropy(smoothing)
