"""Shadow copies: the network at earlier weights, in non-trainable variables (docs/method.md)."""

import tensorflow as tf

from conadv_tf.models.resnet import ResNet


def shadow_copy(network: ResNet, number: int = 0) -> ResNet:
    """A network of the same weights in variables of its own, none of them trainable; `number` makes its name unique."""

    def non_trainable(next_creator, **kwargs):
        return next_creator(**{**kwargs, "trainable": False})

    copy = type(network).from_config({**network.get_config(), "name": f"shadow{number or ''}_{network.name}"})
    with tf.variable_creator_scope(non_trainable):
        copy.create_variables()
    copy.trainable = False
    for shadow, weights in zip(copy.leaf_variables(), network.leaf_variables(), strict=True):
        shadow.assign(weights)
    return copy
