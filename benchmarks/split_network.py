"""Step time of ConAdv on a ResNet of Keras layers, made by `split`, beside the hand-written one of the same weights.

    python benchmarks/split_network.py [--size=32] [--batch=128] [--steps=6] [--rounds=9]

Both take turns in one process; the ratio is the median over the rounds with the quartiles beside it. On a machine that
does other things too, the CPU time of the process says more than the time that passes.
"""

import argparse
import statistics
import time

import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf import ConAdvModel, ResNet, make_lars, methods, split, terminal
from conadv_tf.models.network import Network
from conadv_tf.models.resnet import CIFAR_MEAN, CIFAR_STDDEV

L = tf_keras.layers


def keras_resnet8(size: int) -> tf_keras.Model:
    """cifar_resnet8 of Keras layers, whose names are the places of the hand-written one's variables."""

    def conv(x, name: str, filters: int, kernel_size: int = 3, strides: int = 1, relu: bool = True):
        x = L.Conv2D(filters, kernel_size, strides, "same", use_bias=False, name=f"{name}/conv")(x)
        x = L.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}/norm")(x)
        return L.ReLU()(x) if relu else x

    images = L.Input((size, size, 3))
    x = conv(images, "stem", 16)
    for stage, width in enumerate((16, 32, 64), 1):
        name, strides = f"stage{stage}_block1", 1 if stage == 1 else 2
        shortcut = x if stage == 1 else conv(x, f"{name}/shortcut", width, 1, strides, relu=False)
        x = conv(conv(x, f"{name}/conv1", width, 3, strides), f"{name}/conv2", width, relu=False)
        x = L.ReLU()(L.Add()([x, shortcut]))
    return tf_keras.Model(images, L.Dense(10, name="classifier")(L.GlobalAveragePooling2D()(x)), name="resnet8")


def normalized(images: tf.Tensor) -> tf.Tensor:
    """What the hand-written network does to images in [0, 255]."""
    return (images - 255.0 * tf.constant(CIFAR_MEAN)) / (255.0 * tf.constant(CIFAR_STDDEV))


def networks(size: int) -> tuple[Network, Network]:
    """The hand-written network and the split one, of the same weights."""
    ours = ResNet("cifar_resnet8", 10, (size, size, 3), ("main", "adversarial")).create_variables()
    theirs = split(keras_resnet8(size), preprocess=normalized)
    own = ours.named_variables()
    for path, variable in theirs.named_variables().items():
        variable.assign(own[path])
    return ours, theirs


def milliseconds(model: ConAdvModel, data: tf.data.Dataset, steps: int) -> tuple[float, float]:
    """The time and the CPU time of an update, over `steps` of them."""
    start, start_of_cpu = time.perf_counter(), time.process_time()
    model.fit(data, steps_per_epoch=steps, verbose=0)
    return 1000 * (time.perf_counter() - start) / steps, 1000 * (time.process_time() - start_of_cpu) / steps


def main() -> None:
    terminal.take_any_text()
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("size", 32), ("batch", 128), ("steps", 6), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (options.batch, options.size, options.size, 3)).astype(np.uint8)
    data = tf.data.Dataset.from_tensors((images, random.integers(0, 10, options.batch))).repeat()
    models = [ConAdvModel(network, methods.conadv()) for network in networks(options.size)]
    for model in models:
        model.compile(make_lars(0.1))
        milliseconds(model, data, 2)
    times = [[milliseconds(model, data, options.steps) for model in models] for _ in range(options.rounds)]
    for index, kind in enumerate(("ms", "ms of CPU time")):
        pairs = [(ours[index], theirs[index]) for ours, theirs in times]
        first, ratio, last = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"an update: hand-written {ours:.1f}, split {theirs:.1f} {kind}; {ratio:.3f} ({first:.3f} to {last:.3f})")


if __name__ == "__main__":
    main()
