"""Shadow copies: the network at earlier weights, in non-trainable variables (docs/method.md)."""

import tensorflow as tf

from conadv_tf.models.network import Network


def shadow_copy(network: Network, number: int = 0) -> Network:
    """A network of the same weights in variables of its own, none of them trainable; `number` makes its name unique."""

    def non_trainable(next_creator, **kwargs):
        return next_creator(**{**kwargs, "trainable": False})

    with tf.variable_creator_scope(non_trainable):
        copy = network.twin(name=f"shadow{number or ''}_{network.name}")
    copy.trainable = False
    return copy
