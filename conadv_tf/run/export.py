"""The trained network to take away: a SavedModel of the main branch, written and loaded."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from conadv_tf import paths
from conadv_tf.data import augment, class_names
from conadv_tf.errors import RunError, file_errors, one_line
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.run.checkpoint import free_space

# TensorFlow Serving's name for files that go with a SavedModel and that the graph does not read.
EXTRA = "assets.extra"
_VIEW = "view.json"


def export(
    network: Network,
    directory: str,
    names: Sequence[str] | None = None,
    view: augment.View = augment.WHOLE_VIEW,
) -> None:
    """Writes a SavedModel of the main branch alone, which loads without conadv_tf.

    Its default signature maps "images", float32 [images, H, W, C] in [0, 255], to "logits" and
    "probabilities", float32 [images, classes]. Below assets.extra/ lie classes.txt, a name a line, and view.json.

    Args:
      network: the network.
      directory: the folder to write, local or gs://.
      names: the names of the classes by label; None: they have none.
      view: the way in which evaluation sees an image file.

    Raises:
      RunError: if it cannot be written.
    """
    exported = network.twin(branches=(MAIN,), replicas_per_group=1, dtype="float32")
    module = tf.Module()
    module.network_variables = exported.leaf_variables()

    @tf.function(input_signature=[tf.TensorSpec((None, *network.image_shape), tf.float32, "images")], autograph=False)
    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = exported(images, training=False)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    module.predict = predict
    extra = {_VIEW: json.dumps(dataclasses.asdict(view)) + "\n"}
    extra |= {class_names.FILE: class_names.text_of(names)} if names else {}
    try:
        tf.io.gfile.makedirs(os.path.join(directory, EXTRA))
        for name, text in extra.items():
            with tf.io.gfile.GFile(os.path.join(directory, EXTRA, name), "w") as file:
                file.write(text)
        tf.saved_model.save(module, directory, signatures={"serving_default": predict})
    except (tf.errors.OpError, OSError) as error:
        raise RunError(
            f"the trained network cannot be written to {directory} ({one_line(error)}{free_space(directory)}): "
            "make room, then start the same command again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An exported network, loaded.

    Attributes:
      probabilities: from images uint8 [n, H, W, C] to float32 [n, classes].
      image_shape: (H, W, C).
      names: the names of the classes by label, their numbers where the export keeps no names.
      view: the way in which evaluation sees an image file; None in an export of an earlier version.
    """

    probabilities: Callable[[np.ndarray], np.ndarray]
    image_shape: tuple[int, int, int]
    names: list[str]
    view: augment.View | None


def load_saved_model(directory: str) -> Any:
    """Loads a SavedModel from a folder of any name, local or gs://; raises what tf.saved_model.load does."""
    with paths.readable_folder(directory) as name:
        return tf.saved_model.load(name)


def load(directory: str) -> Classifier:
    """Loads what `export` has written.

    Args:
      directory: the folder, local or gs://.

    Raises:
      RunError: if it is damaged, or another SavedModel.
    """
    damaged = "bring it back, or train the run again"
    try:
        loaded = load_saved_model(directory)
        signature = loaded.signatures["serving_default"]
        shape = tuple(signature.structured_input_signature[1]["images"].shape[1:])
        classes = int(signature.structured_outputs["probabilities"].shape[-1])
        view = paths.read_text(os.path.join(directory, EXTRA, _VIEW))
        kept = augment.View(**json.loads(view)) if view else None
    except file_errors(ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{directory} is no export of a run ({one_line(error)}): {damaged}") from error
    names = class_names.beside(os.path.join(directory, EXTRA)) or [str(label) for label in range(classes)]
    if len(names) != classes:
        raise RunError(f"{directory}: {len(names)} names in {class_names.FILE} for {classes} classes: {damaged}")

    def probabilities(images: np.ndarray) -> np.ndarray:
        # By `loaded`: a signature alone does not keep the variables alive.
        served = loaded.signatures["serving_default"](images=tf.constant(images, tf.float32))
        return served["probabilities"].numpy()

    return Classifier(probabilities, shape, names, kept)
