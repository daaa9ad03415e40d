"""AutoAugment of single images, drawn statelessly; the policies and the operations are tf-models'.

A sub-policy is two operations, each with a probability and a magnitude; rotations, shears and translations have a
random direction. tf-models draws from global random state, so that no image can be rebuilt, and its graph holds 25
conditionals in a row. Here every distinct (operation, magnitude, direction) is one function, and an image runs two.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gin
import numpy as np
import tensorflow as tf

POLICIES = {"imagenet": "reduced_imagenet", "cifar10": "reduced_cifar10"}  # tf-models' names
# The largest translation as a share of the image's side: 10 of CIFAR's 32 pixels in the policy's own code
# (tensorflow/models, research/autoaugment). tf-models' default of 250 pixels leaves nothing of a small image.
# ImageNet's policy translates nothing.
TRANSLATION = 10 / 32
REPLACE = [128] * 3  # what moves in from outside the image

# The operations with a random direction, and their largest magnitudes: degrees, shear, shares of the side.
_DIRECTED = {
    "Rotate": 30.0,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": TRANSLATION,
    "TranslateY": TRANSLATION,
}
_LARGEST_MAGNITUDE = 10.0
_DRAWS = 5  # for each image: its sub-policy, and for each of two operations whether and in which direction

Operation = Callable[[tf.Tensor], tf.Tensor]


class Tables(NamedTuple):
    """A policy as arrays.

    Attributes:
      operations: distinct operations, uint8 [H, W, 3] → uint8 [H, W, 3]; the first does nothing.
      choice: int32 [sub-policies, 2, 2], the operation for (sub-policy, place, direction).
      probability: float32 [sub-policies, 2], the probability of each operation.
    """

    operations: tuple[Operation, ...]
    choice: np.ndarray
    probability: np.ndarray


@functools.cache
def tables(policy: str) -> Tables:
    """Builds the tables of one of POLICIES."""
    # tf-models registers with gin, which is locked by now.
    with gin.unlock_config(), _without_their_code("official.vision", "official.vision.configs", "official.vision.ops"):
        tfm = importlib.import_module("official.vision.ops.augment")

    keys: list[tuple[str, float, int]] = []
    sub_policies = tfm.AutoAugment(POLICIES[policy]).policies
    choice = np.zeros((len(sub_policies), 2, 2), np.int32)
    for (sub, place, direction), _ in np.ndenumerate(choice):
        name, _, magnitude = sub_policies[sub][place]
        key = name, magnitude, direction if name in _DIRECTED else 0
        if key not in keys:
            keys.append(key)
        choice[sub, place, direction] = 1 + keys.index(key)
    probability = np.array([[operation[1] for operation in sub] for sub in sub_policies], np.float32)
    # Cutout and translations in pixels, which neither policy takes from here.
    to_arguments = tfm.level_to_arg(0, 0)
    operations = (_operation(tfm.NAME_TO_FUNC[key[0]], to_arguments[key[0]], *key) for key in keys)
    return Tables((tf.identity, *operations), choice, probability)


@contextlib.contextmanager
def _without_their_code(*packages: str) -> Iterator[None]:
    """Lets modules of packages be imported without the packages' own code.

    That of official.vision loads detection, segmentation and video: five times the seconds, another backend of
    Matplotlib, and OpenCV and pycocotools, which requirements.lock leaves out. A later import of the packages has
    them whole.
    """
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        root, *folders = name.split(".")
        stand_in = types.ModuleType(name)
        stand_in.__path__ = [str(Path(path, *folders)) for path in importlib.import_module(root).__path__]
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _operation(function: Callable, to_arguments: Callable, name: str, magnitude: float, direction: int) -> Operation:
    if name in _DIRECTED:
        amount = (-1.0) ** direction * magnitude / _LARGEST_MAGNITUDE * _DIRECTED[name]
        axis = {"TranslateX": 1, "TranslateY": 0}.get(name)
        return lambda image: function(image, amount * (1 if axis is None else image.shape[axis]), REPLACE)
    arguments = to_arguments(magnitude)
    return lambda image: function(image, *arguments)


def distort(image: tf.Tensor, policy: str, seed: tf.Tensor) -> tf.Tensor:
    """Applies a random sub-policy to an image.

    Args:
      image: uint8 [H, W, 3], 0..255; its shape must be static. Only within a tf.function or tf.data.
      policy: one of POLICIES.
      seed: int64 [2]; the same seed does the same.

    Returns:
      uint8 [H, W, 3].
    """
    _, choice, probability = tables(policy)
    draws = tf.random.stateless_uniform([_DRAWS], seed)
    sub_policy = tf.cast(draws[0] * len(choice), tf.int32)
    directions = tf.cast(draws[3:] < 0.5, tf.int32)
    chosen = tf.gather(tf.gather(tf.constant(choice), sub_policy), directions, batch_dims=1)
    chosen = tf.where(draws[1:3] < tf.gather(tf.constant(probability), sub_policy), chosen, 0)
    functions = _functions(policy, tuple(image.shape))
    for place in range(2):
        image = _call(functions, chosen[place], image)
    return image


@functools.cache
def _functions(policy: str, shape: tuple[int, int, int]) -> list:
    """The operations as concrete functions of one image."""
    with tf.init_scope():
        image = tf.TensorSpec(shape, tf.uint8)
        return [tf.function(f, autograph=False).get_concrete_function(image) for f in tables(policy).operations]


def _call(functions: list, index: tf.Tensor, image: tf.Tensor) -> tf.Tensor:
    # tf.switch_case would be lowered to a graph of all branches, whose idle ones cost a tenth of the time.
    for function in functions:
        function.add_to_graph(tf.compat.v1.get_default_graph())
    outcome = {"Tout": [tf.uint8], "output_shapes": [image.shape]}
    return tf.raw_ops.StatelessCase(branch_index=index, input=[image], branches=functions, **outcome)[0]
