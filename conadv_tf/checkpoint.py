"""What a run leaves on disk: checkpoints to resume from, and the network to take away."""

import tensorflow as tf

from conadv_tf.errors import RunError
from conadv_tf.resnet import ResNet
from conadv_tf.shadows import leaf_variables
from conadv_tf.split_batchnorm import MAIN
from conadv_tf.trainer import ConAdvModel

KEEP = 3


class Checkpoints:
    """Checkpoints of the network, its shadow copies and the optimizer in `directory`; the newest KEEP stay."""

    def __init__(self, model: ConAdvModel, directory: str):
        model.create_optimizer_variables()
        self._model = model
        self._directory = directory
        self._checkpoint = tf.train.Checkpoint(
            network=model.network, shadows=list(model.shadows), optimizer=model.optimizer
        )
        # Created here, by every worker: within fit its creation would be a broadcast that only the chief joins.
        self._counter = self._checkpoint.save_counter
        self._manager = tf.train.CheckpointManager(self._checkpoint, directory, max_to_keep=KEEP)

    def restore(self) -> int:
        """Restores the newest checkpoint, if there is one; returns the number of updates made so far.

        Raises:
          RunError: for a checkpoint of another model or method, or one that cannot be read.
        """
        path = self._manager.latest_checkpoint
        if path:
            try:
                self._restore_whole(path)
            except (ValueError, AssertionError, tf.errors.OpError) as error:
                cause = " ".join(str(error).split())[:300]
                raise RunError(
                    f"checkpoint {path} does not fit this model, method or optimizer ({cause}): use the recipe that "
                    "wrote it, or another --model_dir"
                ) from error
        return self._model.updates_made()

    def _restore_whole(self, path: str) -> None:
        status = self._checkpoint.restore(path)
        try:
            status.assert_existing_objects_matched()
            status.assert_consumed()
        finally:
            status.expect_partial()  # the error says it; a warning a variable would bury it

    def save(self) -> str:
        """Saves under the number of updates made; returns the path.

        Raises:
          RunError: if it cannot be written.
        """
        try:
            return self._manager.save(checkpoint_number=self._model.updates_made())
        except (tf.errors.OpError, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise RunError(
                f"cannot write a checkpoint to {self._directory} ({cause}): free or change --model_dir"
            ) from error


def export(network: ResNet, directory: str) -> None:
    """Writes a SavedModel of the main branch alone, which loads without conadv_tf.

    Its default signature maps "images", float32 [rows, H, W, C] in [0, 255], to "logits" and
    "probabilities", float32 [rows, classes].
    """
    config = {**network.get_config(), "branches": (MAIN,), "replicas_per_group": 1, "dtype": "float32"}
    exported = ResNet.from_config(config).create_variables()
    values = {_path(variable): variable for variable in leaf_variables(network)}
    for variable in leaf_variables(exported):
        variable.assign(values[_path(variable)].numpy())
    module = tf.Module()
    module.network_variables = leaf_variables(exported)

    @tf.function(input_signature=[tf.TensorSpec((None, *network.image_shape), tf.float32, "images")], autograph=False)
    def predict(images: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = exported(images, training=False)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    module.predict = predict
    tf.saved_model.save(module, directory, signatures={"serving_default": predict})


def _path(variable: tf.Variable) -> str:
    """The variable's place in its network, without the network's own name."""
    return variable.name.split("/", 1)[1]
