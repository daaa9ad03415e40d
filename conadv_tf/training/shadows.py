"""Shadow copies: the network at earlier weights, in non-trainable variables (SPEC section 2)."""

import tensorflow as tf
import tf_keras

from conadv_tf.models.resnet import ResNet


def shadow_copy(network: ResNet) -> ResNet:
    """A network of the same weights in variables of its own, none of them trainable."""

    def non_trainable(next_creator, **kwargs):
        return next_creator(**{**kwargs, "trainable": False})

    copy = ResNet.from_config({**network.get_config(), "name": f"shadow_{network.name}"})
    with tf.variable_creator_scope(non_trainable):
        copy.create_variables()
    copy.trainable = False
    for shadow, weights in zip(leaf_variables(copy), leaf_variables(network), strict=True):
        shadow.assign(weights)
    return copy


def leaf_variables(network: ResNet) -> list[tf.Variable]:
    """All variables, in an order that does not depend on which of them are trainable."""
    leaves = [m for m in network.submodules if isinstance(m, tf_keras.layers.Layer) and not any(m.submodules)]
    return [variable for leaf in leaves for variable in leaf.weights]
