"""Keras' saving: `model.save("m.keras")` and back, with all that training goes on from except a carry."""

import contextlib
import os
import weakref
from typing import Any

import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf import paths
from conadv_tf.errors import ConfigError
from conadv_tf.models.network import Network


class SavableModel(tf_keras.Model):
    """A model that is saved with its optimizer's variables, those of Keras' legacy optimizers such as LARS too."""

    network: Network

    def create_optimizer_variables(self) -> None:
        """Creates the optimizer's variables."""
        raise NotImplementedError

    def save(self, filepath, *args, **kwargs) -> None:
        """Saves to a file of Keras' own format, "….keras".

        Raises:
          ConfigError: for a SavedModel or HDF5, which could not be read back as a model that trains.
        """
        check_saves(filepath, kwargs.get("save_format"))
        super().save(filepath, *args, **kwargs)

    def export(self, filepath) -> None:
        """Writes a SavedModel for serving, of the main branch: images [rows, H, W, C] in [0, 255] → logits."""
        self(tf.zeros((1, *self.network.image_shape)))  # Keras has to have seen a call
        super().export(filepath)

    def load_weights(self, filepath, *args, **kwargs):
        """Loads what `save_weights` has written, whatever the name."""
        given = os.fspath(filepath)
        if given.endswith((".h5", ".hdf5", ".keras")):
            return super().load_weights(given, *args, **kwargs)
        # Of TensorFlow's own format, what has no variable yet is read when it has one: the name stays good until then.
        names = contextlib.ExitStack()
        weakref.finalize(self, names.close)
        return super().load_weights(names.enter_context(paths.readable(given)), *args, **kwargs)

    def compile_from_config(self, config: dict) -> None:
        self.compile(**tf_keras.saving.deserialize_keras_object(config))
        self.create_optimizer_variables()

    def save_own_variables(self, store: Any) -> None:
        # Keras itself comes by the variables of its newer optimizers alone.
        for index, variable in enumerate(self._legacy_variables()):
            store[str(index)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        variables, values = self._legacy_variables(), [store[str(index)] for index in range(len(store.keys()))]
        if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
            if variables and values:
                logging.warning("the saved variables of the optimizer are not this one's: it starts anew")
            return
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _legacy_variables(self) -> list[tf.Variable]:
        if not isinstance(self.optimizer, tf_keras.optimizers.legacy.Optimizer):
            return []
        self.create_optimizer_variables()
        return self.optimizer.variables()


def check_saves(path: Any, save_format: str | None = None) -> None:
    """Raises ConfigError unless `save` can write there what can be read back."""
    if save_format not in (None, "keras") or not str(path).endswith(".keras"):
        raise ConfigError(
            f"save({str(path)!r}) would write what does not load as a model that trains: choose a name that ends in "
            ".keras, or save_weights; model.export writes a SavedModel for serving"
        )
