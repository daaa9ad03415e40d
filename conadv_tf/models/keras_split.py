"""Any Keras model of layers as a network with split batch norm.

    model = tf_keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10, classifier_activation=None)
    network = split(model, preprocess=tf_keras.applications.mobilenet_v2.preprocess_input)

The graph is cloned with every BatchNormalization replaced; what a pass asks of batch norm and the seeds of dropout
reach the layers through the context (graph_batchnorm.py, randomness.py), since a graph hands nothing else on.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf.errors import ConfigError
from conadv_tf.models import cloning, randomness, split_checks
from conadv_tf.models.graph_batchnorm import GraphBatchNormalization, NormCall, asking
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import ADVERSARIAL, MAIN, SplitBatchNormalization, Turn, deferred_statistics

# A map of images float32 [rows, H, W, C] in [0, 255] to what a model expects.
Preprocess = Callable[[tf.Tensor], tf.Tensor]


def split(
    model: tf_keras.Model, branches: Sequence[str] = (MAIN, ADVERSARIAL), preprocess: Preprocess | None = None
) -> "SplitNetwork":
    """The network that ConAdvModel trains, made of a functional or Sequential tf_keras model; the model stays as it is.

    Every BatchNormalization, those of nested models too, becomes split BN whose branches all start from its γ, β and
    statistics. The other layers are copied with weights, names and regularizers. Dropout and every layer of Keras that
    draws do so by the seed of the micro-batch, the pass and the layer. Where a layer was called with `training=False`
    it does what it does in an evaluation. What is frozen (`trainable`) stays frozen; see `Network.train_only`.

    Args:
      model: takes images of one size, [rows, H, W, C], and gives logits [rows, classes].
      branches: names of the branches of batch norm, "main" among them; `Method.branches`.
      preprocess: maps images float32 in [0, 255] to what the model expects, as
        `tf_keras.applications.….preprocess_input` do; None for a model that rescales by itself. ε stays in pixels.

    Raises:
      ConfigError: for a model that cannot be cloned, or not trained by a loss of logits.
    """
    split_checks.check_branches(branches)
    split_checks.check_model(model)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync if cloning.is_synchronized(model) else 1
    network = SplitNetwork(cloning.clone(model, branches, replicas), branches, preprocess, replicas)
    measured = _training_pass(network)
    for norm in network.all_norms():
        norm.learns = norm.moving_means[MAIN].ref() in measured
    network.settle()
    if not network.all_norms():
        logging.warning("%r has no batch norm to train: clean and adversarial images share all weights", model.name)
    return network


def _training_pass(network: "SplitNetwork") -> set:
    """References to the moving statistics for which a pass in training measures a batch's, once each.

    Raises:
      ConfigError: for a layer whose training would not repeat, or not be what it is in Keras.
    """
    with deferred_statistics() as statistics:
        program = tf.function(lambda images: network(images, training=True), autograph=False)
        traced = program.get_concrete_function(tf.TensorSpec((2, *network.image_shape)))
    split_checks.check_draws(traced.graph)
    references = [variable.ref() for variable, _ in statistics]
    if len(references) > len(set(references)):
        raise ConfigError(
            f"a BatchNormalization of {network.architecture!r} is called more than once in a pass: give every call a "
            "layer of its own"
        )
    return set(references)


class SplitNetwork(Network):
    """A graph of Keras layers with split batch norm, as a Network; `split` makes it.

    Args:
      graph: a functional or Sequential model whose batch norm is GraphBatchNormalization.
      branches, preprocess: see `split`.
      replicas_per_group: replicas that share the statistics of synchronized batch norm.
    """

    def __init__(
        self,
        graph: tf_keras.Model,
        branches: Sequence[str],
        preprocess: Preprocess | None = None,
        replicas_per_group: int = 1,
        name: str | None = None,
    ):
        # Pixels stay float32: the layers cast for themselves.
        super().__init__(name=name or f"split_{graph.name}", dtype=split_checks.precision(graph), autocast=False)
        self.graph = graph
        self.architecture = graph.name
        self.num_classes = graph.output_shape[-1]
        self.image_shape = tuple(graph.input_shape[1:])
        self.branches = tuple(branches)
        self.replicas_per_group = replicas_per_group
        self.preprocess = preprocess
        if preprocess is not None:
            # The first call is not one of a program: Keras' own keep constants from it.
            split_checks.check_preprocessed(preprocess(tf.zeros((1, *self.image_shape))), self.image_shape)
        randomness.draw_by_pass(list(cloning.all_layers(graph)))
        cloning.normalize_layers_in_two_passes(graph)
        self.built = True

    def call(
        self,
        images: tf.Tensor,
        training: bool = False,
        branch: str | Turn = MAIN,
        mode: str | None = None,
        update_statistics: bool | tf.Tensor | None = None,
        synchronize: bool = True,
        activation_dtype: str | None = None,
    ) -> tf.Tensor:
        """Logits; see Network.call."""
        images = tf.cast(images, tf.float32)
        inputs = images if self.preprocess is None else self.preprocess(images)
        learns = training if update_statistics is None else update_statistics
        in_training = training if mode is None else mode == "batch"
        with asking(NormCall(branch, learns, synchronize)), randomness.one_pass(attacks=not synchronize):
            return tf.cast(self.graph(inputs, training=in_training), tf.float32)

    def parts(self) -> list[tf_keras.layers.Layer]:
        return cloning.weighted_layers(self.graph)

    def all_norms(self) -> list[SplitBatchNormalization]:
        layers = cloning.all_layers(self.graph)
        return [layer for layer in layers if isinstance(layer, GraphBatchNormalization) and layer.learns]

    def create_variables(self) -> "SplitNetwork":
        return self

    def named_variables(self) -> dict[str, tf.Variable]:
        named: dict[str, tf.Variable] = {}
        counts: collections.Counter[str] = collections.Counter()
        for place, variable in cloning.placed_variables(self.graph):
            # Layers of one name lie in different nested models, or inside a layer of one's own.
            number, counts[place] = counts[place], counts[place] + 1
            named[f"{place}#{number}" if number else place] = variable
        return named

    def penalty(self) -> tf.Tensor | None:
        losses = self.graph.losses
        return tf.add_n([tf.cast(loss, tf.float32) for loss in losses]) if losses else None

    def twin(self, **settings: Any) -> "SplitNetwork":
        branches = settings.get("branches", self.branches)
        replicas = settings.get("replicas_per_group", self.replicas_per_group)
        graph = cloning.clone(self.graph, branches, replicas, settings.get("dtype"))
        return SplitNetwork(graph, branches, self.preprocess, replicas, settings.get("name", self.name))

    def get_config(self) -> dict:
        return {
            "graph": tf_keras.saving.serialize_keras_object(self.graph),
            "classes": cloning.modules_of_layers(self.graph),
            "branches": self.branches,
            "preprocess": None if self.preprocess is None else cloning.place_of(self.preprocess),
            "replicas_per_group": self.replicas_per_group,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "SplitNetwork":
        known = {**cloning.known_layers(config["classes"]), **(custom_objects or {})}
        with tf_keras.saving.custom_object_scope(known):
            graph = tf_keras.saving.deserialize_keras_object(config["graph"])
        place = config["preprocess"]
        preprocess = None if place is None else cloning.found(**place)
        return cls(graph, config["branches"], preprocess, config["replicas_per_group"], config["name"])
