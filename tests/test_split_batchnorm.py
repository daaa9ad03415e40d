"""SplitBatchNormalization: a branch is one Keras BatchNormalization; groups of replicas are one replica."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import BRANCHES, assert_close, fit, make_model, mirrored, named_variables, random_batches

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.models import xla
from conadv_tf.models.split_batchnorm import SplitBatchNormalization, deferred_statistics
from conadv_tf.training import lars

SHAPE = (4, 3, 3, 5)


def inputs(seed: int = 0, rows: int = 4) -> tf.Tensor:
    random = np.random.default_rng(seed)
    return tf.constant(random.normal(1.0, 2.0, (rows, *SHAPE[1:])), tf.float32)


def variables(layer: SplitBatchNormalization, branch: str = "main") -> list[tf.Variable]:
    """In Keras' order."""
    return [
        layer.gammas[branch],
        layer.betas[branch],
        layer.moving_means[branch],
        layer.moving_variances[branch],
    ]


def built(**settings) -> SplitBatchNormalization:
    """A layer whose variables are far from their initial values."""
    layer = SplitBatchNormalization(BRANCHES, **settings)
    layer.build(SHAPE)
    for index, branch in enumerate(layer.branches):
        random = np.random.default_rng(index)
        for variable in variables(layer, branch):
            variable.assign(random.uniform(0.5, 1.5, 5))
    return layer


def values(layer, branch="main") -> list[np.ndarray]:
    return [variable.numpy() for variable in variables(layer, branch)]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_equals_keras_fused_batch_normalization(branch):
    layer = built(momentum=0.8, epsilon=1e-3)
    keras = tf_keras.layers.BatchNormalization(momentum=0.8, epsilon=1e-3, fused=True)
    keras.build(SHAPE)
    keras.set_weights(values(layer, branch))
    for step in range(3):
        x = inputs(step)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            expected = keras(x, training=True)
            actual = layer(x, branch=branch, mode="batch", update_statistics=True)
            losses = [tf.reduce_sum(y * tf.sin(x)) for y in (expected, actual)]
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        gradients = [
            tape.gradient(losses[0], [x, keras.gamma, keras.beta]),
            tape.gradient(losses[1], [x, *variables(layer, branch)[:2]]),
        ]
        for ours, theirs in zip(*reversed(gradients), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(values(layer, branch), keras.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_allclose(
            layer(inputs(9), branch=branch, mode="moving"), keras(inputs(9), training=False), atol=1e-6
        )


def test_the_moving_variance_is_bessel_corrected():
    layer, x = built(momentum=0.9), inputs()
    before = values(layer)
    layer(x, update_statistics=True)
    flat = x.numpy().reshape(-1, 5)
    np.testing.assert_allclose(values(layer)[2], 0.9 * before[2] + 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(values(layer)[3], 0.9 * before[3] + 0.1 * flat.var(0, ddof=1), rtol=1e-5)


def test_branches_are_independent():
    layer = built()
    before = values(layer, "main"), values(layer, "adversarial")
    layer(inputs(), branch="adversarial", update_statistics=True)
    assert all(np.array_equal(a, b) for a, b in zip(values(layer, "main"), before[0], strict=True))
    assert not np.array_equal(values(layer, "adversarial")[2], before[1][2])
    for mode in ("batch", "moving"):
        assert np.abs(layer(inputs(), branch="main", mode=mode) - layer(inputs(), "adversarial", mode)).max() > 0.1
    assert len({variable.ref() for branch in BRANCHES for variable in variables(layer, branch)}) == 8


@pytest.mark.parametrize("mode", ["batch", "moving"])
def test_without_update_statistics_a_call_leaves_no_trace(mode):
    layer = built()
    before = values(layer)
    with deferred_statistics() as statistics:
        layer(inputs(), mode=mode, update_statistics=False)
    layer(inputs(), mode=mode, update_statistics=False)
    assert statistics == []
    assert all(np.array_equal(a, b) for a, b in zip(values(layer), before, strict=True))


def test_deferred_statistics_are_collected_and_not_assigned():
    layer, x = built(), inputs()
    before = values(layer)
    with deferred_statistics() as statistics:
        layer(x, update_statistics=True)
    assert all(np.array_equal(a, b) for a, b in zip(values(layer), before, strict=True))
    (mean_of, mean), (variance_of, variance) = statistics
    assert mean_of is layer.moving_means["main"]
    assert variance_of is layer.moving_variances["main"]
    flat = x.numpy().reshape(-1, 5)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, flat.var(0, ddof=1), rtol=1e-5)
    layer(x, update_statistics=True)  # outside the context: at once
    assert not np.array_equal(values(layer)[2], before[2])


def test_bfloat16_inputs_have_bfloat16_outputs_and_float32_statistics():
    layer = SplitBatchNormalization(dtype="mixed_bfloat16")
    outputs = layer(inputs(), update_statistics=True)
    assert outputs.dtype == tf.bfloat16
    assert {variable.dtype for variable in layer.variables} == {tf.float32}
    plain = SplitBatchNormalization()
    np.testing.assert_allclose(tf.cast(outputs, tf.float32), plain(inputs(), update_statistics=True), atol=0.05)
    np.testing.assert_allclose(values(layer)[3], values(plain)[3], rtol=0.01)


def test_plain_keras_fit_assigns_at_once():
    class Net(tf_keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = SplitBatchNormalization(momentum=0.5)

        def call(self, x, training=False):
            mode = "batch" if training else "moving"
            return tf.reduce_mean(self.norm(x, mode=mode, update_statistics=training), [1, 2, 3])

    model, x = Net(), inputs(rows=8)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros(8), batch_size=4, shuffle=False, verbose=0)
    first, second = (part.numpy().reshape(-1, 5) for part in (x[:4], x[4:]))
    np.testing.assert_allclose(values(model.norm)[2], 0.25 * first.mean(0) + 0.5 * second.mean(0), rtol=1e-4)
    np.testing.assert_allclose(
        values(model.norm)[3], 0.25 + 0.25 * first.var(0, ddof=1) + 0.5 * second.var(0, ddof=1), rtol=1e-4
    )


def run_replicas(strategy, layer, per_replica: list[tf.Tensor], **call):
    """Outputs, input gradients and γ gradients of every replica, for a loss that weighs all values apart."""
    place = strategy.experimental_distribute_values_from_function
    x = place(lambda context: per_replica[context.replica_id_in_sync_group])

    def replica(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **call)
            loss = tf.reduce_sum(tf.square(y) * tf.sin(3.0 * x))
        gradients = tape.gradient(loss, [x, layer.gammas["main"]])
        return y, *gradients

    results = tf.function(lambda x: strategy.run(replica, args=(x,)))(x)
    return [[part.numpy() for part in strategy.experimental_local_results(result)] for result in results]


@pytest.mark.parametrize("group", [2, 4])
def test_a_group_of_replicas_equals_one_replica_on_its_rows(group):
    strategy = mirrored(4)
    parts = [inputs(seed) * (1.0 + seed) for seed in range(4)]
    with strategy.scope():
        layer = built(replicas_per_group=group)
    outputs, input_gradients, gamma_gradients = run_replicas(strategy, layer, parts, update_statistics=True)
    single, statistics = built(), []
    before = values(single)
    for first in range(0, 4, group):
        x = tf.concat(parts[first : first + group], 0)
        with tf.GradientTape() as tape, deferred_statistics() as seen:
            tape.watch(x)
            y = single(x, update_statistics=True)
            loss = tf.reduce_sum(tf.square(y) * tf.sin(3.0 * x))
        by_input, by_gamma = tape.gradient(loss, [x, single.gammas["main"]])
        here = slice(first, first + group)
        np.testing.assert_allclose(np.concatenate(outputs[here]), y, atol=2e-5)
        np.testing.assert_allclose(np.concatenate(input_gradients[here]), by_input, atol=2e-4)
        np.testing.assert_allclose(np.sum(gamma_gradients[here], 0), by_gamma, rtol=1e-4, atol=1e-3)
        statistics.append([value.numpy() for _, value in seen])
    for index in (0, 1):
        expected = 0.9 * before[2 + index] + 0.1 * np.mean([s[index] for s in statistics], 0)
        for copy in variables(layer)[2 + index].values:
            np.testing.assert_allclose(copy, expected, rtol=1e-5)


@pytest.mark.parametrize("spread", [pytest.param(0.0, marks=pytest.mark.long), 0.1])
def test_groups_keep_the_variance_of_values_far_from_zero(spread):
    strategy = mirrored(4)
    with strategy.scope():
        layer = built(replicas_per_group=4)
    x = 100.0 + spread * inputs(seed=1)
    outputs, *_ = run_replicas(strategy, layer, [x] * 4)
    np.testing.assert_allclose(outputs[2], built()(x), atol=2e-3)


def test_an_attack_keeps_to_its_own_replica():
    strategy = mirrored(4)
    with strategy.scope():
        layer = built(replicas_per_group=4)
    parts = [inputs(seed) * (1.0 + seed) for seed in range(4)]
    outputs, *_ = run_replicas(strategy, layer, parts, synchronize=False)
    single = built()
    for output, part in zip(outputs, parts, strict=True):
        np.testing.assert_allclose(output, single(part), atol=1e-5)


def test_local_statistics_are_averaged_over_replicas_and_evaluation_is_alike_on_all():
    strategy = mirrored(4)
    with strategy.scope():
        layer = built()
    parts = [inputs(seed) * (1.0 + seed) for seed in range(4)]
    before = values(layer)
    run_replicas(strategy, layer, parts, update_statistics=True)
    flat = [part.numpy().reshape(-1, 5) for part in parts]
    np.testing.assert_allclose(
        values(layer)[2], 0.9 * before[2] + 0.1 * np.mean([x.mean(0) for x in flat], 0), rtol=1e-5
    )
    np.testing.assert_allclose(
        values(layer)[3], 0.9 * before[3] + 0.1 * np.mean([x.var(0, ddof=1) for x in flat], 0), rtol=1e-5
    )
    outputs, *_ = run_replicas(strategy, layer, [parts[0]] * 4, mode="moving")
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


def test_training_with_groups_equals_training_on_their_rows():
    images, labels = random_batches(2, 12)
    grouped = make_model(
        methods.vanilla(),
        lars.LARS(3.0),
        strategy=mirrored(2),
        network={"replicas_per_group": 2},
        branches=("main",),
    )
    single = make_model(methods.vanilla(), lars.LARS(3.0), branches=("main",), run_eagerly=True)
    weights = []
    for model in (grouped, single):
        fit(model, images, labels, 2)
        weights.append({name: v.numpy() for name, v in named_variables(model.network).items()})
    assert_close(*weights, 2e-5)


@pytest.mark.parametrize(("call", "named"), [({"branch": "third"}, "'third'"), ({"mode": "frozen"}, "'frozen'")])
def test_unknown_branches_and_modes_are_refused_by_value(call, named):
    with pytest.raises(ConfigError, match=named):
        built()(inputs(), **call)


def test_configuration_round_trip():
    layer = SplitBatchNormalization(("a", "b"), 0.7, 1e-4, "zeros", 2, name="mine")
    rebuilt = SplitBatchNormalization.from_config(layer.get_config())
    assert rebuilt.get_config() == layer.get_config()


def in_float64(x, gamma, beta, weights) -> list[np.ndarray]:
    """Outputs, mean and variance of batch normalisation, and the gradients of Σ weights · outputs by x, γ and β."""
    x, gamma, beta, weights = map(np.float64, (x, gamma, beta, weights))
    axes, deviation = (0, 1, 2), np.sqrt(x.var((0, 1, 2)) + 1e-5)
    normal = (x - x.mean(axes)) / deviation
    by_beta, by_gamma = weights.sum(axes), (weights * normal).sum(axes)
    by_x = gamma / deviation * (weights - weights.mean(axes) - normal * (weights * normal).mean(axes))
    return [normal * gamma + beta, x.mean(axes), x.reshape(-1, x.shape[-1]).var(0, ddof=1), by_x, by_gamma, by_beta]


def of_layer(layer, x, weights, compiled: bool = True) -> list[np.ndarray]:
    """The same of a layer, under XLA or not; mean and variance are what its moving averages are to learn."""

    def step(x):
        with tf.GradientTape() as tape, deferred_statistics() as statistics:
            tape.watch(x)
            outputs = layer(x, update_statistics=True)
            loss = tf.reduce_sum(outputs * weights)
        gradients = tape.gradient(loss, [x, *variables(layer)[:2]])
        return [outputs, *(value for _, value in statistics), *gradients]

    with xla.compiling(compiled):
        return [value.numpy() for value in tf.function(step, jit_compile=compiled, autograph=False)(x)]


# The mean in standard deviations, and how many of them the moving mean is off.
@pytest.mark.parametrize(("mean", "off"), [(0, 0), (10, 1), (100, 1), (1000, 1), (1000, 10), (1000, 30)])
def test_far_from_zero_statistics_under_xla_are_those_of_float64(mean, off):
    draw = np.random.default_rng(0)
    x = tf.constant(draw.normal(mean, 1.0, (16, 32, 32, 5)), tf.float32)
    weights = tf.constant(draw.normal(size=x.shape), tf.float32)
    layer = built()
    layer.moving_means["main"].assign([mean - off] * 5)
    actual = of_layer(layer, x, weights)
    expected = in_float64(x, *values(layer)[:2], weights)
    bound = 1e-5 * (1 + off**2)
    np.testing.assert_allclose(actual[2], expected[2], rtol=bound)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=1e-5)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * np.abs(other).max())


def test_bfloat16_is_normalised_in_float32_under_xla():
    layer, x = built(dtype="mixed_bfloat16"), tf.cast(100.0 + inputs(rows=64), tf.bfloat16)
    layer.moving_means["main"].assign([100.0] * 5)
    outputs, mean, variance, *_ = of_layer(layer, x, tf.ones_like(x))
    expected = in_float64(tf.cast(x, tf.float32), *values(layer)[:2], np.ones(x.shape))
    assert outputs.dtype == tf.bfloat16.as_numpy_dtype
    np.testing.assert_allclose(np.float32(outputs), expected[0], rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-6)
    np.testing.assert_allclose(variance, expected[2], rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_value_a_channel_trains_to_a_variance_of_nothing(compiled):
    layer, x = built(), inputs(rows=1)[:, :1, :1]
    outputs, mean, variance, *gradients = of_layer(layer, x, tf.ones_like(x), compiled)
    np.testing.assert_allclose(outputs[0, 0, 0], values(layer)[1], atol=1e-5)
    np.testing.assert_allclose(mean, x[0, 0, 0], rtol=1e-6)
    assert np.array_equal(variance, np.zeros(5))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
