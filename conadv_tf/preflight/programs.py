"""The programs that a preflight compiles: a method's whole update, and the passes it is made of, lowered to XLA.

All are of one replica and one micro-batch, and lowered from the very functions that train.
"""

from collections.abc import Callable

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from conadv_tf import methods
from conadv_tf.methods import passes
from conadv_tf.models import xla
from conadv_tf.models.split_batchnorm import MAIN, deferred_statistics
from conadv_tf.run.build import Run
from conadv_tf.training.trainer import ConAdvModel


class Programs:
    """Lowers the programs of a run for micro-batches of `rows` images; each method returns a serialized HloModule."""

    def __init__(self, built: Run, rows: int):
        self._built = built
        self._rows = rows
        self._models: dict[tuple, ConAdvModel] = {}

    def update(self, method: methods.Method) -> bytes:
        """One update from one micro-batch: `train_step`, optimizer and metrics included."""
        model = self._model(method)
        images, labels = self._data(method)
        model.create_carry(images)
        return lower(lambda x, y: model.train_step((x, y)), images, labels)

    def end_of_update(self) -> bytes:
        """The end of an update of `vanilla`, once its micro-batches are summed: moving averages, optimizer, metrics."""
        method = methods.vanilla()
        update = self._model(method).update_by(method)
        sums = [tf.TensorSpec(shape) for shape in update.contribution_shapes]
        return lower(lambda *values: update.apply(list(values)), *sums)

    def attack(self, method: methods.Method) -> bytes:
        """The pass that makes a method's x̂ from a micro-batch, through the main branch."""
        model = self._model(methods.vanilla())

        def attacked(images, labels):
            batch = methods.Batch(tf.cast(images, tf.float32), labels, tf.constant([0, 1]))
            return passes.attack_images(method.attack, model.network, model.example_losses, batch)

        return lower(attacked, *self._data(methods.vanilla()))

    def training_pass_with_attack(self, method: methods.Method) -> bytes:
        """The clean pass of `paired`: the gradients by the weights, and x̂ from that by the images."""
        model = self._model(methods.vanilla())
        network, loss, attack = model.network, model.example_losses, method.attack

        def both(images, labels):
            batch = methods.Batch(tf.cast(images, tf.float32), labels, tf.constant([0, 1]))
            ascended = passes.ascended_by(attack, network.num_classes, loss, batch)
            with deferred_statistics() as statistics:
                gradients, by_image, value, top1 = passes.training_pass(
                    network, MAIN, loss, *batch[:2], ascended=ascended
                )
            images = batch.images
            return gradients, [new for _, new in statistics], value, top1, attack.one_step(images, by_image)

        return lower(both, *self._data(methods.vanilla()))

    def _model(self, method: methods.Method) -> ConAdvModel:
        """A model of a method, like the run's but for one micro-batch, outside of any strategy."""
        key = (method.kind, method.tau)
        if key not in self._models:
            like = self._built.model
            # Alone, the replica has no neighbours to share batch statistics with.
            # Taking turns needs two places; the program is that of either.
            model = ConAdvModel(
                like.network.twin(branches=method.branches, replicas_per_group=1),
                method,
                method.updates_per_batch,
                all_reduce_dtype=like.all_reduce_dtype.name,
            )
            optimizer = {**like.optimizer.get_config(), "learning_rate": like.optimizer.learning_rate}
            model.compile(type(like.optimizer).from_config(optimizer), like.loss)
            model.create_optimizer_variables()
            self._models = {key: model}  # one at a time: each holds the weights several times
        return self._models[key]

    def _data(self, method: methods.Method) -> tuple[tf.TensorSpec, tf.TensorSpec]:
        """A micro-batch as the pipeline hands it out; for `vanilla` without an augmented image beside the clean one."""
        shape = self._built.data.image_shape if method.name == "vanilla" else self._built.data.train_shape
        return tf.TensorSpec((self._rows, *shape), tf.uint8), tf.TensorSpec((self._rows,), tf.int32)


def lower(function: Callable, *specs: tf.TensorSpec) -> bytes:
    """The XLA program of a TensorFlow function of tensors, as a serialized HloModule; the same for the same program.

    TensorFlow numbers functions and notes lines of source; both are left out.
    """
    compiled = tf.function(function, jit_compile=True, autograph=False)
    with xla.compiling_for_tpu():
        serialized = compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
    module = hlo_pb2.HloModuleProto.FromString(serialized)
    module.name = module.entry_computation_name = "program"
    for computation in module.computations:
        entry = computation.id == module.entry_computation_id
        computation.name = "program" if entry else f"computation.{computation.id}"
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
    module.ClearField("id")
    module.ClearField("stack_frame_index")
    return module.SerializeToString(deterministic=True)
