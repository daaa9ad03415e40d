"""The trained network to take away: a SavedModel of the main branch."""

import tensorflow as tf

from conadv_tf.errors import RunError, one_line
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.run.checkpoint import free_space


def export(network: Network, directory: str) -> None:
    """Writes a SavedModel of the main branch alone, which loads without conadv_tf.

    Its default signature maps "images", float32 [images, H, W, C] in [0, 255], to "logits" and
    "probabilities", float32 [images, classes].

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
    try:
        tf.saved_model.save(module, directory, signatures={"serving_default": predict})
    except (tf.errors.OpError, OSError) as error:
        raise RunError(
            f"the trained network cannot be written to {directory} ({one_line(error)}{free_space(directory)}): "
            "make room, then start the same command again"
        ) from error
