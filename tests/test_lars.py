"""LARS and SGD against numbers worked out by hand."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import mirrored

from conadv_tf.errors import ConfigError
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import SplitBatchNormalization
from conadv_tf.training.lars import LARS, make_lars, make_sgd


def apply(optimizer, variable: tf.Variable, gradient) -> np.ndarray:
    optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
    return variable.numpy()


def test_kernels_follow_the_formula():
    # ‖w‖ = 5, ‖g‖ = 1, so λ = 0.001 · 5 / (1 + 0.1 · 5) = 1/300 and lr · λ = 0.1. (tf-models' rule has
    # ‖g + βw‖ = 1.118 in the denominator.)  g + βw = (−0.5, 1.0).
    kernel = tf.Variable([[3.0, 4.0]])
    optimizer = LARS(30.0, momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(apply(optimizer, kernel, [[-0.8, 0.6]]), [[3.05, 3.9]], rtol=1e-6)
    np.testing.assert_allclose(optimizer.get_slot(kernel, "momentum"), [[-0.05, 0.1]], rtol=1e-6)
    # ‖w‖² = 3.05² + 3.9² = 24.5125; λ = 0.001 · 4.951010 / (1 + 0.4951010) = 0.003311488; lr · λ = 0.09934464;
    # g + βw = (1.305, 0.39), v = 0.9 · (−0.05, 0.1) + (0.1296448, 0.0387444) = (0.0846448, 0.1287444).
    np.testing.assert_allclose(apply(optimizer, kernel, [[1.0, 0.0]]), [[2.9653552, 3.7712556]], rtol=1e-6)


def test_a_zero_gradient_is_not_adapted_but_decays():
    kernel = tf.Variable([[3.0, 4.0]])
    # λ = 1: v = 0.5 · (0 + 0.1 · (3, 4)).
    result = apply(LARS(0.5, momentum=0.9, weight_decay=0.1), kernel, [[0.0, 0.0]])
    np.testing.assert_allclose(result, [[2.85, 3.8]], rtol=1e-6)


def test_a_zero_kernel_is_not_adapted():
    result = apply(LARS(0.5, momentum=0.9, weight_decay=0.1), tf.Variable([[0.0, 0.0]]), [[0.6, -0.8]])
    np.testing.assert_allclose(result, [[-0.3, 0.4]], rtol=1e-6)


def test_vectors_are_neither_decayed_nor_adapted():
    bias, optimizer = tf.Variable([3.0, 4.0]), LARS(0.5, momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(apply(optimizer, bias, [-0.8, 0.6]), [3.4, 3.7], rtol=1e-6)
    # v = 0.9 · (−0.4, 0.3) + 0.5 · (1, 0) = (0.14, 0.27).
    np.testing.assert_allclose(apply(optimizer, bias, [1.0, 0.0]), [3.26, 3.43], rtol=1e-6)


def test_tiny_norms_stay_finite():
    kernel = tf.Variable([[1e-12, 0.0]])
    # λ = 0.001 · 1e-12 / (1e-12 + 1e-9): the ε of the denominator rules.
    ratio = LARS(1.0, weight_decay=0.0).trust_ratio(kernel, tf.constant([[1e-12, 0.0]]))
    np.testing.assert_allclose(ratio, 1e-15 / 1.001e-9, rtol=1e-4)


def test_the_learning_rate_of_a_schedule_is_that_of_the_update_count():
    schedule = tf_keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.5, 0.25, 2.0])
    bias, optimizer = tf.Variable([0.0]), LARS(schedule, momentum=0.0)
    assert [apply(optimizer, bias, [1.0])[0] for _ in range(3)] == [-0.5, -0.75, -2.75]


@pytest.fixture(scope="module")
def resnet50() -> ResNet:
    network = ResNet("resnet50", 1000, (32, 32, 3), ("main", "adversarial")).create_variables()
    for variable in network.trainable_variables:
        if len(variable.shape) == 1:
            variable.assign(tf.fill(variable.shape, 2.0))  # a zero γ or bias would hide decay
    return network


def exceptions(network: ResNet) -> set:
    """γ and β of every normalisation and the bias of every dense layer, by the layers they belong to."""
    variables = []
    for layer in network.submodules:
        if isinstance(layer, SplitBatchNormalization):
            variables += [*layer.gammas.values(), *layer.betas.values()]
        elif isinstance(layer, tf_keras.layers.Dense | tf_keras.layers.Conv2D) and layer.use_bias:
            variables.append(layer.bias)
    return {variable.name for variable in variables}


def changes(network: ResNet, optimizer, gradient: float) -> dict[str, float]:
    """The largest change of every variable in one update with a constant gradient; the update is undone."""
    variables = network.trainable_variables
    before = [variable.numpy() for variable in variables]
    optimizer.apply_gradients([(tf.fill(variable.shape, gradient), variable) for variable in variables])
    result = {}
    for variable, value in zip(variables, before, strict=True):
        result[variable.name] = float(np.abs(variable.numpy() - value).max())
        variable.assign(value)
    return result


def test_exactly_gammas_betas_and_biases_of_resnet50_are_neither_decayed_nor_adapted(resnet50):
    expected = exceptions(resnet50)
    assert len(expected) == 2 * 2 * 53 + 1
    assert len(resnet50.trainable_variables) == len(expected) + 53 + 1
    decayed = changes(resnet50, LARS(1.0, momentum=0.0, weight_decay=0.5), 0.0)
    assert {name for name, change in decayed.items() if change == 0.0} == expected
    adapted = changes(resnet50, LARS(0.125, momentum=0.0, weight_decay=0.0), 1.0)
    assert {name for name, change in adapted.items() if change == 0.125} == expected


def test_configuration_round_trip():
    optimizer = LARS(0.3, momentum=0.8, weight_decay=0.02, trust_coefficient=0.004, name="mine")
    rebuilt = LARS.from_config(optimizer.get_config())
    assert rebuilt.get_config() == optimizer.get_config()
    kernels = [tf.Variable([[3.0, 4.0]]) for _ in range(2)]
    for _ in range(2):
        results = [apply(o, k, [[-0.8, 0.6]]) for o, k in zip((optimizer, rebuilt), kernels, strict=True)]
    assert np.array_equal(*results)
    sgd = make_sgd(0.1, weight_decay=0.0)
    assert LARS.from_config(sgd.get_config()).get_config() == sgd.get_config()


def test_sgd_without_decay_equals_keras_sgd():
    random = np.random.default_rng(0)
    start = random.normal(size=(5, 3)).astype(np.float32)
    ours, theirs = tf.Variable(start), tf.Variable(start)
    mine, keras = make_sgd(0.1, 0.9, 0.0), tf_keras.optimizers.legacy.SGD(0.1, momentum=0.9)
    for _ in range(5):
        gradient = random.normal(size=(5, 3))
        np.testing.assert_allclose(apply(mine, ours, gradient), apply(keras, theirs, gradient), atol=1e-6)


def test_sgd_decays_kernels_alone():
    # v = 0.5 · (g + 0.1 w) = 0.5 · (−0.5, 1.0); then 0.9 v + 0.5 · 0.1 · (3.25, 3.5) = (−0.0625, 0.625).
    kernel, optimizer = tf.Variable([[3.0, 4.0]]), make_sgd(0.5, momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(apply(optimizer, kernel, [[-0.8, 0.6]]), [[3.25, 3.5]], rtol=1e-6)
    np.testing.assert_allclose(apply(optimizer, kernel, [[0.0, 0.0]]), [[3.3125, 2.875]], rtol=1e-6)
    bias = tf.Variable([3.0, 4.0])
    np.testing.assert_allclose(apply(make_sgd(0.5, weight_decay=0.1), bias, [-0.8, 0.6]), [3.4, 3.7], rtol=1e-6)


def test_every_replica_treats_its_copy_alike():
    strategy = mirrored(2)
    with strategy.scope():
        variables = [
            tf.Variable([[3.0, 4.0]], name="dense/kernel"),
            tf.Variable([3.0, 4.0], name="norm/gamma"),
        ]
        optimizer = LARS(30.0, momentum=0.9, weight_decay=0.1)
        optimizer._create_all_weights(variables)

    @tf.function
    def update():
        def replica():
            gradients = [tf.constant([[-0.4, 0.3]]), tf.constant([-0.4, 0.3])]  # summed over the two
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(replica)

    update()
    for variable, expected in zip(variables, ([[3.05, 3.9]], [27.0, -14.0]), strict=True):
        assert len(variable.values) == 2
        for copy in variable.values:
            np.testing.assert_allclose(copy, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "setting", "named"),
    [
        (make_lars, {"momentum": 1.0}, "lars.momentum=1.0"),
        (make_lars, {"weight_decay": -0.1}, "lars.weight_decay=-0.1"),
        (make_lars, {"trust_coefficient": 0.0}, "lars.trust_coefficient=0.0"),
        (make_sgd, {"momentum": -0.1}, "sgd.momentum=-0.1"),
        (make_sgd, {"weight_decay": -1.0}, "sgd.weight_decay=-1.0"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(make, setting, named):
    with pytest.raises(ConfigError, match=named):
        make(0.1, **setting)
