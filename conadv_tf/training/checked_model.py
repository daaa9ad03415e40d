"""Keras' entry points, with a look at what they are given."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from conadv_tf.training import refusals
from conadv_tf.training.given import Checks, in_one_line


class CheckedModel(tf_keras.Model):
    """A model whose `fit`, `evaluate`, `predict` and `…_on_batch` refuse, in one line, what it cannot make sense of.

    Attributes:
      made_in: the strategy in whose scope the model was made.

    Raises:
      DataError: for data, see given.py.
      ConfigError: for arguments, see refusals.py.
      RunError: from `fit`, `evaluate` and `predict`, where a device or the host has no memory left.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Keras' own `distribute_strategy` is that of the call, where the model was made in no scope.
        self.made_in = tf.distribute.get_strategy()

    def data_checks(self, labelled: bool = True) -> Checks:
        """The checks of data, with or without labels."""
        raise NotImplementedError

    def _checks(self, labelled: bool = True) -> Checks:
        refusals.check_called(self.made_in)
        return self.data_checks(labelled)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks: Sequence | None = None,
        validation_split=0.0,
        validation_data=None,
        **kwargs,
    ):
        refusals.check_callbacks(callbacks)
        checks = self._checks()
        if isinstance(validation_data, (tuple, list)):
            checks.checked(*validation_data)
        elif validation_data is not None:
            validation_data = checks.checked(validation_data)
        x = checks.checked(x, y)
        with in_one_line():
            return super().fit(
                x,
                y,
                batch_size,
                epochs,
                verbose,
                callbacks,
                validation_split,
                validation_data,
                **kwargs,
            )

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, *args, **kwargs):
        refusals.check_callbacks(kwargs.get("callbacks"))
        if not kwargs.get("_use_cached_eval_dataset"):  # else fit calls, which has looked at its validation data
            x = self._checks().checked(x, y, sample_weight)
        with in_one_line():
            return super().evaluate(x, y, batch_size, verbose, sample_weight, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        x = self._checks(labelled=False).checked(x)
        with in_one_line():
            return super().predict(x, *args, **kwargs)

    def train_on_batch(self, x, y=None, *args, **kwargs):
        self._checks().arrays(x, y)
        return super().train_on_batch(x, y, *args, **kwargs)

    def test_on_batch(self, x, y=None, sample_weight=None, *args, **kwargs):
        self._checks().arrays(x, y, sample_weight)
        return super().test_on_batch(x, y, sample_weight, *args, **kwargs)

    def predict_on_batch(self, x) -> Any:
        self._checks(labelled=False).arrays(x)
        return super().predict_on_batch(x)
