"""The forms of convolution and normalisation that a TPU computes faster, against the plain ones."""

import numpy as np
import pytest
import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.models import expansion, moved, resnet, xla
from conadv_tf.models.conv_batchnorm import ConvBatchNorm, PooledConvBatchNorm
from conadv_tf.models.split_batchnorm import Turn, deferred_statistics
from conadv_tf.models.stem_convolution import StemConvolution


def random(seed: int, *shape: int, low: float = -1.0, high: float = 1.0) -> tf.Tensor:
    return tf.constant(np.random.default_rng(seed).uniform(low, high, shape), tf.float32)


def outputs_and_gradients(function, *inputs: tf.Tensor) -> list[np.ndarray]:
    """What `function` gives, and the gradients of a weighted sum of its first output."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tf.nest.flatten(function(*inputs))
        loss = tf.reduce_sum(outputs[0] * random(9, *outputs[0].shape))
    return [value.numpy() for value in [*outputs, *tape.gradient(loss, list(inputs))]]


def assert_equal_to(expected: list[np.ndarray], actual: list[np.ndarray], tolerance: float = 1e-5) -> None:
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance * np.abs(one).max())


@pytest.mark.parametrize("size", [(32, 32), (8, 40), (12, 4), (4, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_stem_convolution_and_its_gradients_equal_the_plain_ones(size, channels):
    layer = StemConvolution(5, 7, 2, padding="same", use_bias=False)
    images = random(1, 2, *size, channels)
    layer(images)

    def stem(images, kernel):
        return layer.convolution_op(images, kernel)

    def plain(images, kernel):
        return tf.nn.conv2d(images, kernel, 2, "SAME")

    kernel = random(2, 7, 7, channels, 5)
    assert_equal_to(outputs_and_gradients(plain, images, kernel), outputs_and_gradients(stem, images, kernel))


STEM_SETTINGS = {"branches": ("main", "adversarial"), "momentum": 0.9, "epsilon": 1e-5}
BATCH = {"branch": "main", "mode": "batch", "update_statistics": True, "synchronize": True}


def pooled_stem(dtype=tf.float32, **settings) -> PooledConvBatchNorm:
    """A stem of 6 channels with γ of either sign, and 0, and moving statistics far from those of a batch."""
    unit = PooledConvBatchNorm(6, 7, 2, 0, STEM_SETTINGS | settings, convolution=StemConvolution)
    unit(tf.zeros((1, 16, 16, 3), dtype), BATCH | {"mode": "moving"})
    unit.norm.gammas["main"].assign([1.0, -1.5, 0.0, 0.3, -0.2, 2.0])
    unit.norm.betas["main"].assign([0.1, 0.2, 0.3, -0.4, 0.5, -0.6])
    unit.norm.moving_means["main"].assign(random(5, 6))
    unit.norm.moving_variances["main"].assign(random(6, 6, low=0.5))
    return unit


def plain_stem(unit: PooledConvBatchNorm, images: tf.Tensor, mode: str) -> list[np.ndarray]:
    """Convolution, batch norm, ReLU and pooling in float64, one after the other: outputs, gradients, mean, variance."""
    norm, dtype = unit.norm, images.dtype
    kernel = tf.cast(tf.cast(unit.conv.kernel, dtype), tf.float64)
    # Where γ is 0 the outputs have no derivative by it; this is the one from above.
    gamma = tf.where(norm.gammas["main"] == 0, tf.constant(1e-12, tf.float64), tf.cast(norm.gammas["main"], tf.float64))
    beta, images = tf.cast(norm.betas["main"], tf.float64), tf.cast(images, tf.float64)
    with tf.GradientTape() as tape:
        inputs = [images, kernel, gamma, beta]
        tape.watch(inputs)
        values = tf.nn.conv2d(images, kernel, 2, "SAME")
        values += tf.stop_gradient(tf.cast(tf.cast(values, dtype), tf.float64) - values)  # equal values are so in both
        mean, variance = tf.nn.moments(values, [0, 1, 2])
        if mode == "moving":
            used = [tf.cast(norm.moving_means["main"], tf.float64), tf.cast(norm.moving_variances["main"], tf.float64)]
        else:
            used = [mean, variance]
        normalized = (values - used[0]) / tf.sqrt(used[1] + 1e-5) * gamma + beta
        outputs = tf.nn.max_pool2d(tf.nn.relu(normalized), 3, 2, "SAME")
        loss = tf.reduce_sum(outputs * tf.cast(random(9, *outputs.shape), tf.float64))
    count = float(np.prod(values.shape[:3]))
    learnt = [mean, variance * count / (count - 1)] if mode == "batch" else []
    return [value.numpy() for value in [outputs, *tape.gradient(loss, inputs), *learnt]]


def own_stem(unit: PooledConvBatchNorm, images: tf.Tensor, mode: str, compiled: bool) -> list[np.ndarray]:
    """What `plain_stem` gives, as the layer computes it."""
    norm = unit.norm
    variables = [unit.conv.kernel, norm.gammas["main"], norm.betas["main"]]

    def step(images):
        with deferred_statistics() as statistics, tf.GradientTape() as tape:
            tape.watch(images)
            outputs = unit(images, BATCH | {"mode": mode})
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) * random(9, *outputs.shape))
        learnt = [value for _, value in statistics]
        return [outputs, *tape.gradient(loss, [images, *variables]), *learnt]

    with xla.compiling(compiled):
        values = tf.function(step, jit_compile=compiled, autograph=False)(images)
    return [tf.cast(value, tf.float32).numpy() for value in values]


# Elsewhere in bfloat16 what is pooled is rounded otherwise: other values become equal.
@pytest.mark.parametrize(
    ("mode", "dtype", "compiled", "tolerance"),
    [
        ("batch", tf.float32, True, 1e-5),
        ("batch", tf.float32, False, 1e-5),
        ("batch", tf.bfloat16, True, 1e-2),
        ("moving", tf.float32, True, 1e-5),
    ],
)
def test_a_pooled_stem_and_its_gradients_equal_convolution_batch_norm_relu_and_pooling(
    mode, dtype, compiled, tolerance
):
    unit, images = pooled_stem(dtype), tf.cast(random(1, 4, 16, 24, 3, low=-1.5), dtype)
    expected, actual = plain_stem(unit, images, mode), own_stem(unit, images, mode, compiled)
    if mode == "moving" or not compiled:  # of equal values the first is taken: another derivative by a γ of 0
        for values in (expected, actual):
            values[3][2] = 0.0
    assert_equal_to(expected, actual, tolerance)


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_pooling_ahead_of_a_folded_batch_norm_changes_no_bit(dtype):
    unit, images = pooled_stem(dtype), tf.cast(random(1, 4, 16, 24, 3), dtype)
    plain = ConvBatchNorm(6, 7, 2, 0, STEM_SETTINGS)
    plain(images, BATCH | {"mode": "moving"})
    plain.set_weights(unit.get_weights())
    expected = tf.nn.max_pool2d(plain(images, BATCH | {"mode": "moving"}), 3, 2, "SAME")
    np.testing.assert_array_equal(
        *(tf.cast(v, tf.float32) for v in (unit(images, BATCH | {"mode": "moving"}), expected))
    )


def test_a_pooled_stem_of_replicas_that_share_statistics_equals_the_plain_one():
    unit, images = pooled_stem(replicas_per_group=2), random(1, 4, 16, 24, 3)
    *expected, variance = plain_stem(unit, images, "batch")
    *actual, learnt = own_stem(unit, images, "batch", True)  # alone it is its own group
    assert_equal_to(expected, actual)
    count = 4 * 8 * 12  # places of one replica, of which two make a group
    np.testing.assert_allclose(learnt, variance * (count - 1) / count * 2 * count / (2 * count - 1), rtol=1e-5)


def test_a_pooled_stem_trains_on_images_of_little_contrast():
    unit, images = pooled_stem(), random(1, 4, 16, 16, 3, low=250.0, high=255.0)
    for branch in ("main", "adversarial"):
        unit.norm.moving_means[branch].assign(tf.zeros(6))
    assert_equal_to(plain_stem(unit, images, "batch"), own_stem(unit, images, "batch", True), 1e-4)


def test_a_branch_there_is_not_is_refused_where_a_layer_normalises_by_itself():
    unit = pooled_stem()
    with xla.compiling(True), pytest.raises(ConfigError, match="branch='other'"):
        unit(tf.zeros((1, 16, 16, 3)), BATCH | {"branch": "other"})


def stem_network_pass(compiled: bool, clean: bool | None) -> list[np.ndarray]:
    """Loss, gradients and statistics of a network with an ImageNet stem, moved, of a branch or of a turn."""
    network = resnet.ResNet("tiny_stem", 10, (32, 32, 3), ("main", "adversarial"), seed=1).create_variables()
    for index, branch in enumerate(network.branches):  # of either sign, and not the same in both
        network.stem.norm.gammas[branch].assign(random(20 + index, 8))
    values = [
        variable + 0.1 * random(index, *variable.shape) for index, variable in enumerate(network.trainable_variables)
    ]

    def step(images, turn):
        with deferred_statistics() as statistics, tf.GradientTape() as tape:
            tape.watch([images, *values])
            branch = "adversarial" if clean is None else Turn(turn)
            with moved.moved(network.trainable_variables, values):
                logits = network(images, branch=branch, mode="batch", update_statistics=True)
            loss = tf.reduce_mean(logits * random(9, *logits.shape))
        gradients = tape.gradient(loss, [images, *values], unconnected_gradients="zero")
        return [loss, *gradients, *(value for _, value in statistics)]

    with xla.compiling(compiled):
        function = tf.function(step, jit_compile=compiled, autograph=False)
        results = function(random(1, 6, 32, 32, 3, low=0.0, high=255.0), tf.constant(bool(clean)))
    return [value.numpy() for value in results]


@pytest.mark.parametrize("clean", [None, True, False])
def test_a_moved_network_with_a_pooled_stem_computes_what_it_does_without(monkeypatch, clean):
    tiny = resnet.Architecture((1,), (8,), False, True, resnet.CIFAR_MEAN, resnet.CIFAR_STDDEV)
    monkeypatch.setitem(resnet.ARCHITECTURES, "tiny_stem", tiny)
    plain, pooled = (stem_network_pass(compiled, clean) for compiled in (False, True))
    assert sum(np.abs(value).max() > 0 for value in plain) > 10
    for one, other in zip(plain, pooled, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * np.abs(one).max() + 1e-7)


def plain_expansion(inputs, kernel, gamma, beta):
    wide = tf.nn.conv2d(inputs, kernel, 1, "SAME")
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=wide, scale=gamma, offset=beta, mean=[], variance=[], epsilon=1e-5, is_training=True
    )
    return outputs, mean, variance


def expanded(inputs, kernel, gamma, beta):
    return expansion.expand_and_normalize(inputs, kernel, gamma, beta, 1e-5)


# Inputs with a mean, as after a ReLU, and without; far from zero their spread is a small difference of large moments.
@pytest.mark.parametrize(("low", "tolerance"), [(-1.0, 1e-5), (0.0, 1e-5), (0.8, 1e-3)])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_expansion_and_its_gradients_equal_convolution_and_batch_norm(low, tolerance, jit_compile):
    inputs = random(1, 4, 7, 5, 6, low=low), random(2, 1, 1, 6, 20), random(3, 20, low=0.5), random(4, 20)
    fused = tf.function(expanded, jit_compile=jit_compile, autograph=False)
    assert_equal_to(outputs_and_gradients(plain_expansion, *inputs), outputs_and_gradients(fused, *inputs), tolerance)


def test_expansion_of_a_constant_is_finite():
    inputs = tf.ones((2, 3, 3, 4)), random(2, 1, 1, 4, 8), tf.ones(8), tf.zeros(8)
    assert all(np.isfinite(value).all() for value in outputs_and_gradients(expanded, *inputs))


def test_expansion_of_one_value_has_a_variance_of_nothing():
    outputs, mean, variance, *gradients = outputs_and_gradients(
        expanded, random(1, 1, 1, 1, 4), random(2, 1, 1, 4, 8), tf.ones(8), random(3, 8)
    )
    np.testing.assert_allclose(outputs[0, 0, 0], random(3, 8), atol=1e-3)
    assert np.abs(variance).max() < 1e-6
    assert all(np.isfinite(value).all() for value in [mean, *gradients])


# Narrow channels with a mean, or mostly shared, which the columns of the kernel cancel.
@pytest.mark.parametrize(("mean", "shared"), [(0, 0.1), (1, 0.1), (10, 1), (100, 1), (1000, 1), (0, 100)])
def test_the_error_of_an_expansion_of_bfloat16_is_bounded(mean, shared):
    draw = np.random.default_rng(0)
    narrow = mean + shared * draw.normal(size=(8, 16, 16, 1)) + 0.1 * draw.normal(size=(8, 16, 16, 6))
    kernel = draw.uniform(-1.0, 1.0, (1, 1, 6, 20))
    narrow, kernel = (tf.cast(value, tf.bfloat16) for value in (narrow, kernel - kernel.mean(2, keepdims=True)))
    fused = tf.function(expanded, jit_compile=True, autograph=False)
    _, means, variances = fused(narrow, kernel, tf.ones(20), tf.zeros(20))
    a, w = tf.cast(narrow, tf.float64).numpy().reshape(-1, 6), tf.cast(kernel[0, 0], tf.float64).numpy()
    bound = 5e-7 * np.square(np.abs(a) @ np.abs(w)).mean(0)
    assert np.all(np.abs(variances - (a @ w).var(0, ddof=1)) <= bound)
    np.testing.assert_allclose(means, (a @ w).mean(0), rtol=0, atol=1e-5 * (1 + mean))


def test_what_float32_channels_have_in_common_does_not_hide_their_difference():
    draw = np.random.default_rng(0)
    a = 100.0 * draw.normal(size=(8, 16, 16, 1)) + 0.1 * draw.normal(size=(8, 16, 16, 6))
    kernel = np.array([1, -1, 2, -2, 1, -1])[:, None] * np.arange(1, 21)  # each column has a sum of 0
    settings = {"branches": ("main",), "momentum": 0.9, "epsilon": 1e-5}
    unit = ConvBatchNorm(20, 1, 1, 0, settings, relu=False)
    call = {"branch": "main", "mode": "batch", "update_statistics": True, "synchronize": True}
    unit(np.float32(a), call)
    unit.conv.kernel.assign(kernel[None, None])

    def step(a):
        with deferred_statistics() as statistics:
            outputs = unit(a, call)
        return outputs, statistics[1][1]

    with xla.compiling(True):
        outputs, variance = tf.function(step, jit_compile=True, autograph=False)(tf.constant(a, tf.float32))
    wide = np.float64(np.float32(a)).reshape(-1, 6) @ kernel
    np.testing.assert_allclose(variance, wide.var(0, ddof=1), rtol=1e-3)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(outputs, expected.reshape(outputs.shape), atol=3e-3)


def test_a_product_keeps_what_bfloat16_would_round():
    one, other = random(1, 8, 8), tf.cast(tf.cast(random(2, 8, 8), tf.bfloat16), tf.float32)
    upper = tf.cast(tf.cast(one, tf.bfloat16), tf.float32)
    exact = np.float64(one.numpy()) @ np.float64(other.numpy())
    np.testing.assert_allclose(expansion.in_full_precision(one, other), exact, atol=1e-6)
    assert np.abs(np.float64(upper.numpy()) @ np.float64(other.numpy()) - exact).max() > 1e-4


def training_pass(compiled: bool) -> list[np.ndarray]:
    """Loss, gradients and statistics of a network of two bottleneck blocks, as XLA compiles it."""
    network = resnet.ResNet("tiny_bottleneck", 10, (16, 16, 3), seed=1).create_variables()
    for variable in network.trainable_variables:
        if "gamma" in variable.name:
            variable.assign(tf.ones_like(variable))  # the last of a block starts at 0 and would hide it

    def step(images):
        with deferred_statistics() as statistics, tf.GradientTape() as tape:
            loss = tf.reduce_mean(network(images, mode="batch", update_statistics=True)[:, 0])
        gradients = tape.gradient(loss, network.trainable_variables)
        return [loss, *gradients, *(value for _, value in statistics)]

    with xla.compiling(compiled):
        values = tf.function(step, jit_compile=True, autograph=False)(random(1, 8, 16, 16, 3, low=0.0, high=255.0))
    return [value.numpy() for value in values]


def test_a_network_compiled_with_expansions_computes_what_it_does_without(monkeypatch):
    tiny = resnet.Architecture((1, 1), (8, 16), True, False, resnet.CIFAR_MEAN, resnet.CIFAR_STDDEV)
    monkeypatch.setitem(resnet.ARCHITECTURES, "tiny_bottleneck", tiny)
    monkeypatch.setattr(expansion, "DTYPES", (tf.float32,))  # bfloat16 would round the two to their own
    plain, fused = (training_pass(compiled) for compiled in (False, True))
    assert any(not np.array_equal(one, other) for one, other in zip(plain, fused, strict=True))
    assert_equal_to(plain, fused, 2e-4)


def test_images_of_little_contrast_train_under_xla_from_the_first_update():
    """The mean is more than a hundred standard deviations, and no moving mean knows; the borders' zeros help."""
    images = tf.cast(random(1, 8, 8, 8, 1, low=250.0, high=255.0), tf.uint8)
    network = resnet.ResNet("digits_resnet", 10, (8, 8, 1), seed=1).create_variables()

    def step(images):
        with deferred_statistics() as statistics, tf.GradientTape() as tape:
            loss = tf.reduce_sum(network(images, mode="batch", update_statistics=True) * random(2, 8, 10))
        gradients = tape.gradient(loss, network.trainable_variables)
        return [loss, *gradients, *(value for _, value in statistics)]

    plain = [value.numpy() for value in tf.function(step, autograph=False)(images)]
    with xla.compiling(True):
        fused = [value.numpy() for value in tf.function(step, jit_compile=True, autograph=False)(images)]
    assert_equal_to(plain, fused, 1e-4)


def test_after_orders_what_xla_compiles_and_nothing_else():
    def function(x, y):
        [first], [second] = xla.barrier([x * 2.0], [y])
        return first, second + 1.0

    arguments = tf.constant(1.0), tf.constant(2.0)
    assert [value.numpy() for value in tf.function(function)(*arguments)] == [2.0, 3.0]
    with xla.compiling(True):
        compiled = tf.function(function, jit_compile=True)
        assert [value.numpy() for value in compiled(*arguments)] == [2.0, 3.0]
        assert "opt-barrier" in compiled.experimental_get_compiler_ir(*arguments)(stage="hlo")


def test_random_numbers_drawn_for_a_tpu_are_uniform_and_follow_the_seed():
    with xla.compiling_for_tpu():
        draw = tf.function(lambda seed: xla.random_uniform((64, 64), seed, -1.0, 1.0), jit_compile=True)
        one, again, other = (draw(tf.constant(seed)).numpy() for seed in ([1, 2], [1, 2], [1, 3]))
    np.testing.assert_array_equal(one, again)
    assert np.mean(one == other) < 0.01
    assert -1.0 <= one.min() < -0.99 < 0.99 < one.max() < 1.0
    # Mean and variance of 4,096 uniform numbers, within four standard errors.
    assert abs(one.mean()) < 4 * np.sqrt(1 / 3 / one.size)
    assert abs(one.var() - 1 / 3) < 4 * np.sqrt(4 / 45 / one.size)
