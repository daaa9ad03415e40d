"""The networks: sizes, initial values, and logits equal to tf-models' ResNet-50."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import some_of
from official.vision.modeling import backbones

from conadv_tf.errors import ConfigError
from conadv_tf.models.resnet import ARCHITECTURES, ResNet

IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
MEAN, STDDEV = 255 * np.array([0.485, 0.456, 0.406]), 255 * np.array([0.229, 0.224, 0.225])


def parameters(network: ResNet) -> int:
    return sum(int(np.prod(variable.shape)) for variable in network.trainable_variables)


@pytest.mark.parametrize("name", some_of(IMAGENET_PARAMETERS, "resnet18", "resnet34", "resnet50", otherwise="long"))
def test_imagenet_networks_have_the_published_number_of_parameters(name):
    assert parameters(ResNet(name, 1000, (32, 32, 3)).create_variables()) == IMAGENET_PARAMETERS[name]


def test_a_further_branch_adds_only_its_own_gammas_betas_and_statistics():
    one = ResNet("resnet50", 1000, (32, 32, 3)).create_variables()
    two = ResNet("resnet50", 1000, (32, 32, 3), branches=("main", "adversarial")).create_variables()
    channels = 53_120 // 2  # 53,120 numbers of statistics a set
    assert parameters(two) - parameters(one) == 2 * channels
    assert sum(int(np.prod(v.shape)) for v in one.non_trainable_variables) == 2 * channels
    assert len(one.moving_statistics(["main"])) == 2 * 53
    kernels = [[v.numpy() for v in network.trainable_variables if len(v.shape) > 1] for network in (one, two)]
    assert all(np.array_equal(a, b) for a, b in zip(*kernels, strict=True))


def copy_weights(theirs: tf_keras.Model, dense: tf_keras.layers.Dense, ours: ResNet, random) -> None:
    """Gives both networks tf-models' kernels and the same random γ, β, statistics and classifier."""

    def copy_unit(unit, conv, norm):
        unit.conv.kernel.assign(conv.kernel)
        for variable, value in (
            (norm.gamma, random.uniform(0.5, 1.5, norm.gamma.shape)),
            (norm.beta, random.normal(0, 0.2, norm.gamma.shape)),
            (norm.moving_mean, random.normal(0, 0.3, norm.gamma.shape)),
            (norm.moving_variance, random.uniform(0.5, 2.0, norm.gamma.shape)),
        ):
            variable.assign(value)
        for mine, value in (
            (unit.norm.gammas, norm.gamma),
            (unit.norm.betas, norm.beta),
            (unit.norm.moving_means, norm.moving_mean),
            (unit.norm.moving_variances, norm.moving_variance),
        ):
            mine["main"].assign(value)

    layers = theirs.layers
    stem_conv = next(layer for layer in layers if isinstance(layer, tf_keras.layers.Conv2D))
    stem_norm = next(layer for layer in layers if isinstance(layer, tf_keras.layers.BatchNormalization))
    copy_unit(ours.stem, stem_conv, stem_norm)
    blocks = [layer for layer in layers if type(layer).__name__ == "BottleneckBlock"]
    for mine, block in zip(ours.blocks, blocks, strict=True):
        pairs = [(block._conv1, block._norm1), (block._conv2, block._norm2), (block._conv3, block._norm3)]
        for unit, (conv, norm) in zip(mine.convs, pairs, strict=True):
            copy_unit(unit, conv, norm)
        assert (mine.shortcut is not None) == block._use_projection
        if mine.shortcut is not None:
            copy_unit(mine.shortcut, block._shortcut, block._norm0)
    dense.kernel.assign(random.normal(0, 0.05, dense.kernel.shape))
    dense.bias.assign(random.normal(0, 0.5, dense.bias.shape))
    ours.classifier.kernel.assign(dense.kernel)
    ours.classifier.bias.assign(dense.bias)


def test_resnet50_computes_what_tf_models_resnet50_computes():
    random = np.random.default_rng(0)
    shape = (96, 96, 3)
    backbone = backbones.ResNet(
        50, tf_keras.layers.InputSpec(shape=(None, *shape)), norm_momentum=0.9, norm_epsilon=1e-5
    )
    dense = tf_keras.layers.Dense(1000)
    dense.build((None, 2048))
    network = ResNet("resnet50", 1000, shape).create_variables()
    copy_weights(backbone, dense, network, random)
    images = random.integers(0, 256, (6, *shape)).astype(np.float32)
    normalised = tf.constant((images - MEAN) / STDDEV, tf.float32)
    # Batch statistics of few values magnify rounding.
    for training, tolerance in ((False, 1e-5), (True, 1e-4)):
        features = backbone(normalised, training=training)["5"]
        expected = dense(tf.reduce_mean(features, [1, 2])).numpy()
        actual = network(images, mode="batch" if training else "moving", update_statistics=training).numpy()
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    # The pass in training mode moved the averages of both, equally.
    theirs = sorted((v.shape[0], float(tf.norm(v))) for v in backbone.non_trainable_variables)
    ours = sorted((v.shape[0], float(tf.norm(v))) for v in network.moving_statistics(["main"]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_bottlenecks_stride_in_the_three_by_three_convolution():
    network = ResNet("resnet50", 1000, (32, 32, 3))
    strides = [tuple(unit.conv.strides[0] for unit in block.convs) for block in network.blocks]
    down = [(1, 2, 1) if index in (3, 7, 13) else (1, 1, 1) for index in range(16)]
    assert strides == down


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith("cifar")])
def test_cifar_networks_have_the_depth_in_their_name(name):
    network = ResNet(name, 10, (32, 32, 3))
    weighted = 1 + sum(len(block.convs) for block in network.blocks) + 1
    assert weighted == int(name.removeprefix("cifar_resnet"))
    assert (weighted - 2) % 6 == 0
    assert [block.convs[0].conv.filters for block in network.blocks][:: len(network.blocks) // 3] == [
        16,
        32,
        64,
    ]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_wider_network_has_so_many_times_the_channels(width):
    """Counted by hand: 3 × 3 kernels, two to a block, 1 × 1 shortcuts, γ and β, the classifier."""
    channels = [16 * width, 32 * width, 64 * width]
    expected, before = 9 * 3 * channels[0] + 2 * channels[0], channels[0]
    for own in channels:
        expected += 9 * before * own + 9 * own * own + 4 * own + (before * own + 2 * own if before != own else 0)
        before = own
    expected += 10 * before + 10
    network = ResNet("cifar_resnet8", 10, (8, 8, 3), width=width).create_variables()
    assert sum(int(np.prod(variable.shape)) for variable in network.trainable_variables) == expected
    assert ResNet.from_config(network.get_config()).width == width


def test_initial_values_are_those_of_the_recipe():
    network = ResNet("resnet50", 1000, (32, 32, 3)).create_variables()
    for block in network.blocks:
        gammas = [unit.norm.gammas["main"].numpy() for unit in block.convs]
        assert np.all(gammas[-1] == 0)
        assert all(np.all(gamma == 1) for gamma in gammas[:-1])
        assert block.shortcut is None or np.all(block.shortcut.norm.gammas["main"].numpy() == 1)
    kernel = network.classifier.kernel.numpy()
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.01], atol=1e-4)
    assert not network.classifier.bias.numpy().any()
    convolution = network.blocks[0].convs[1].conv.kernel.numpy()
    np.testing.assert_allclose(convolution.std(), np.sqrt(1 / (9 * 64)), rtol=0.02)
    assert np.all(network.stem.norm.moving_variances["main"].numpy() == 1)


def test_the_seed_alone_decides_the_initial_weights():
    def weights(seed):
        tf.random.normal(())  # what else the process drew does not matter
        return ResNet("digits_resnet", 10, (8, 8, 1), seed=seed).create_variables().get_weights()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    kernels = [(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 1]
    assert all(not np.array_equal(a, b) for a, b in kernels)
    assert len({kernel.ravel()[0] for kernel, _ in kernels}) == len(kernels)


@pytest.mark.parametrize("dtype", [tf.uint8, tf.int32, tf.float32, tf.float64])
def test_any_numeric_images_give_the_same_float32_logits(dtype):
    network = ResNet("digits_resnet", 10, (8, 8, 1)).create_variables()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1))
    logits = network(tf.cast(images, dtype))
    assert logits.dtype == tf.float32
    assert np.array_equal(logits, network(tf.cast(images, tf.float32)))


def test_a_format_of_images_that_keras_was_told_changes_nothing():
    """As ~/.keras/keras.json may say. Seen to fail: channels of [16] beside [1, 16, 8, 1]."""
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1))
    usual = ResNet("digits_resnet", 10, (8, 8, 1), seed=1)(images)
    tf_keras.backend.set_image_data_format("channels_first")
    try:
        told = ResNet("digits_resnet", 10, (8, 8, 1), seed=1)(images)
    finally:
        tf_keras.backend.set_image_data_format("channels_last")
    np.testing.assert_array_equal(told, usual)


def test_bfloat16_networks_keep_float32_variables_and_logits():
    network = ResNet("digits_resnet", 10, (8, 8, 1), dtype="mixed_bfloat16").create_variables()
    plain = ResNet("digits_resnet", 10, (8, 8, 1)).create_variables()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.float32)
    logits = network(images, mode="batch", update_statistics=False)
    assert logits.dtype == tf.float32
    assert {variable.dtype for variable in network.variables} == {tf.float32}
    assert network.blocks[0].convs[0].compute_dtype == "bfloat16"
    reference = plain(images, mode="batch", update_statistics=False)
    assert 0 < np.abs(logits - reference).max() < 0.02


def to_bfloat16(values):
    return tf.cast(tf.cast(values, tf.bfloat16), tf.float32).numpy()


def test_an_evaluation_in_bfloat16_has_logits_and_a_classifier_in_float32():
    random = np.random.default_rng(0)
    network = ResNet("digits_resnet", 1000, (8, 8, 1), dtype="mixed_bfloat16").create_variables()
    network.classifier.kernel.assign(random.normal(0.0, 0.3, network.classifier.kernel.shape))
    network.classifier.bias.assign(random.normal(0.0, 0.3, network.classifier.bias.shape))
    seen = []
    network.classifier.call = lambda features, call=network.classifier.call: seen.append(features) or call(features)
    logits = network(random.integers(0, 256, (3, 8, 8, 1)))
    features, kernel, bias = map(np.float64, (seen[0], network.classifier.kernel, network.classifier.bias))
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(logits, to_bfloat16(logits))


def test_a_kernel_folded_with_moving_statistics_is_rounded_once():
    network = ResNet("digits_resnet", 10, (8, 8, 1), dtype="mixed_bfloat16").create_variables()
    unit, seen = network.blocks[0].convs[1], []
    scale = np.random.default_rng(0).uniform(0.5, 1.5, 16).astype(np.float32)
    unit.norm.gammas["main"].assign(scale * np.sqrt(np.float32(1 + 1e-5)))
    unit.conv.convolution_op = lambda inputs, kernel: seen.append(kernel) or tf.nn.conv2d(inputs, kernel, 1, "SAME")
    network(np.zeros((1, 8, 8, 1)))
    folded = unit.conv.kernel.numpy() * unit.norm.moving_affine("main")[0].numpy()
    assert np.array_equal(tf.cast(seen[0], tf.float32), to_bfloat16(folded))


def test_networks_rebuild_from_their_configuration():
    network = ResNet("digits_resnet", 7, (8, 8, 1), ("main", "adversarial"), 0.8, 1e-3, 2, 5, "mixed_bfloat16")
    rebuilt = ResNet.from_config(network.get_config())
    assert rebuilt.get_config() == network.get_config()
    pairs = zip(rebuilt.create_variables().variables, network.create_variables().variables, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [("resnet51", (32, 32, 3), "resnet51"), ("resnet50", (32, 32, 1), "3 channels")],
)
def test_networks_there_are_not_are_refused(name, shape, named):
    with pytest.raises(ConfigError, match=named):
        ResNet(name, 10, shape)
