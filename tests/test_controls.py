"""The methods that ConAdv is held against, each against an independent float64 computation or a closed form."""

import types

import numpy as np
import pytest
import reference
import tensorflow as tf
import tf_keras
from helpers import (
    assert_close,
    fit,
    make_model,
    microbatch_seed,
    mirrored,
    random_batches,
    snapshot,
    some_of,
)
from reference import Recipe, State
from test_preemption import lines, trained
from test_update import state_of

from conadv_tf import ConAdvModel, methods, split
from conadv_tf.errors import ConfigError
from conadv_tf.methods import Ascent, Attack, Mixture
from conadv_tf.models import moved
from conadv_tf.training import lars

ROWS, RATE, RUN_SEED, RHO = 6, 2.0, 5, 0.4


def learned(moving: dict, statistics: dict) -> dict:
    return {name: 0.9 * old + 0.1 * statistics.get(name, old) for name, old in moving.items()}


def sam_update(recipe: Recipe, state: State, older: State, images, labels, replicas: int, stale: bool):
    """θ_{t+1} from θ_t and the weights that the ascent is from, and the logs: means over the replicas."""
    parts = []
    for own in np.split(np.arange(len(images)), replicas):
        data = images[own], labels[own]
        _, up, statistics, _ = reference.training_pass(recipe, older.weights, *data, "main")
        length = np.sqrt(sum(np.sum(g * g) for g in up.values()))
        ahead = {name: w + RHO * up[name] / length for name, w in state.weights.items()}
        loss, gradient, later, top1 = reference.training_pass(recipe, ahead, *data, "main")
        parts.append((gradient, later if stale else statistics, {"loss": loss, "clean_top1": top1}))
    gradient, statistics, logs = (
        {name: np.mean([part[kind][name] for part in parts], axis=0) for name in parts[0][kind]} for kind in range(3)
    )
    weights, velocity = reference.lars(recipe, state.weights, gradient, state.velocity, RATE)
    return State(weights, learned(state.moving, statistics), velocity), logs


@pytest.mark.parametrize(("stale", "replicas"), [(False, 1), (True, 2)])
def test_sam_equals_the_formulas(stale, replicas):
    images, labels = random_batches(3, ROWS * replicas)
    strategy = mirrored(replicas) if replicas > 1 else None
    settings = {"strategy": strategy, "branches": ("main",), "run_eagerly": replicas > 1}
    model = make_model(methods.sam(Ascent(RHO), stale), lars.LARS(RATE), **settings)
    model.create_optimizer_variables()
    states = [state_of(model)]
    for step in range(3):
        [logs] = fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
        older = states[max(0, step - stale)]
        expected, expected_logs = sam_update(Recipe(), states[-1], older, images[step], labels[step], replicas, stale)
        actual = state_of(model)
        assert_close(actual.weights, expected.weights, 1e-5)
        assert_close(actual.moving, expected.moving, 1e-5)
        assert_close({name: logs[name] for name in expected_logs}, expected_logs, 1e-5)
        states.append(expected)


class Quadratic(types.SimpleNamespace):
    """A "network" whose loss is ½ wᵀ A w whatever the images are."""

    def __call__(self, images, **how):
        weights = tf.convert_to_tensor(moved.read(self.weights))
        return 0.5 * tf.reshape(tf.tensordot(weights, tf.linalg.matvec(self.matrix, weights), 1), (1, 1))


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_sam_on_a_quadratic(rho):
    """g = A w, so the gradient is A (w + ρ A w / |A w|)."""
    matrix = np.float32([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 4.0]])
    start = np.float32([1.0, -2.0, 0.5])
    weights = tf.Variable(start)
    network = Quadratic(weights=weights, can_move=True, matrix=matrix, trainable_variables=[weights])
    batch = methods.Batch(tf.zeros((1, 1, 1, 1)), tf.zeros(1, tf.int32), tf.constant([0, 0]))
    gradients = methods.sam(Ascent(rho)).gradients
    update = gradients(network, network, lambda labels, logits: logits[:, 0], batch, {})
    direction = matrix @ start
    ahead = start + rho * direction / np.linalg.norm(direction)
    np.testing.assert_allclose(update.gradients[0], matrix @ ahead, rtol=1e-6)
    np.testing.assert_allclose(update.metrics["loss"], 0.5 * ahead @ matrix @ ahead, rtol=1e-6)
    assert np.array_equal(weights, start)


def test_at_a_minimum_sam_stays():
    weights = tf.Variable(np.zeros(3, np.float32))
    network = Quadratic(
        weights=weights, can_move=True, matrix=np.eye(3, dtype=np.float32), trainable_variables=[weights]
    )
    batch = methods.Batch(tf.zeros((1, 1, 1, 1)), tf.zeros(1, tf.int32), tf.constant([0, 0]))
    update = methods.sam(Ascent(0.5)).gradients(network, network, lambda labels, logits: logits[:, 0], batch, {})
    assert np.array_equal(update.gradients[0], np.zeros(3))


def test_a_network_that_reads_its_variables_itself_is_refused():
    inputs = tf_keras.Input((8, 8, 1))
    keras = tf_keras.Model(inputs, tf_keras.layers.Dense(10)(tf_keras.layers.Flatten()(inputs)))
    with pytest.raises(ConfigError, match=r"reads its weights itself, sam needs one that can be moved"):
        ConAdvModel(split(keras, ("main",)), methods.sam())


def test_sam_without_a_step_is_plain_training():
    images, labels = random_batches(3, ROWS)
    runs = []
    for method in (methods.sam(Ascent(0.0)), methods.vanilla()):
        model = make_model(method, lars.LARS(RATE), branches=("main",))
        logs = [{k: v for k, v in log.items() if k != "input_wait_seconds"} for log in fit(model, images, labels, 3)]
        runs.append(({name: value for name, value in snapshot(model).items() if name.startswith("network")}, logs))
    assert_close(runs[0][0], runs[1][0], 1e-6)
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize(
    "method",
    [methods.sam(Ascent(RHO), stale=True), pytest.param(methods.noise(), marks=pytest.mark.long)],
    ids=lambda m: m.name,
)
def test_two_replicas_are_two_micro_batches(method):
    images, labels = random_batches(4, 2 * ROWS)
    branches = ("main", "adversarial")
    pod = make_model(method, lars.LARS(RATE), strategy=mirrored(2), seed=RUN_SEED, branches=branches)
    settings = {"microbatches": 2, "seed": RUN_SEED, "branches": branches, "run_eagerly": True}
    one = make_model(method, lars.LARS(RATE), **settings)
    fit(pod, images, labels, 4)
    fit(one, images.reshape(8, ROWS, *images.shape[2:]), labels.reshape(8, ROWS), 4)
    first, second = ({n: v for n, v in snapshot(m).items() if n.startswith(("network", "shadow"))} for m in (pod, one))
    assert_close(first, second, 2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_equals_the_formulas(norm):
    recipe, epsilon = Recipe(weight=0.3, fraction=0.5), 16.0
    images, labels = random_batches(2, ROWS)
    method = methods.noise(Attack(epsilon, norm=norm), Mixture(weight=0.3, fraction=0.5))
    model = make_model(method, lars.LARS(RATE), seed=RUN_SEED, run_eagerly=norm == "l2")
    model.create_optimizer_variables()
    states = [state_of(model)]
    for step in range(2):
        [logs] = fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
        first = images[step, : ROWS // 2].astype(np.float64)
        seed = microbatch_seed(RUN_SEED, step, 0)
        drawn = np.float64(tf.random.stateless_uniform(first.shape, seed, -1.0, 1.0))
        delta = np.sign(drawn) if norm == "linf" else drawn / reference.rms(drawn)
        noisy = np.clip(first + epsilon * delta, 0, 255)
        state = states[-1]
        clean = reference.training_pass(recipe, state.weights, images[step], labels[step], "main")
        other = reference.training_pass(recipe, state.weights, noisy, labels[step, : ROWS // 2], "adversarial")
        gradient = {name: 0.7 * clean[1][name] + 0.3 * other[1][name] for name in state.weights}
        weights, velocity = reference.lars(recipe, state.weights, gradient, state.velocity, RATE)
        states.append(State(weights, learned(state.moving, clean[2] | other[2]), velocity))
        actual = state_of(model)
        assert_close(actual.weights, weights, 1e-5)
        assert_close(actual.moving, states[-1].moving, 1e-5)
        assert_close({"a": logs["adversarial_loss"]}, {"a": other[0]}, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("method", [methods.sam(), methods.sam(stale=True), methods.noise()], ids=lambda m: m.name)
def test_the_whole_update_is_an_xla_program(method):
    model = make_model(method, microbatches=2, network={"dtype": "mixed_bfloat16"}, branches=method.branches)
    model.create_optimizer_variables()
    (images,), (labels,) = random_batches(1, 8)
    update = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    update(images, labels)
    assert model.updates_made() == 1
    assert all(np.isfinite(value).all() for value in snapshot(model).values())


def test_costs_and_what_is_refused():
    units = [method.forward_units for method in (methods.noise(), methods.sam(), methods.sam(stale=True))]
    assert units == [6, 6, 6]
    assert [methods.sam(stale=stale).tau for stale in (False, True)] == [0, 1]
    with pytest.raises(ConfigError, match=r"attack.steps=2 with train.method='noise'.*set it to 1"):
        methods.noise(Attack(steps=2))
    with pytest.raises(ConfigError, match=r"attack.step_size_pixels=1.0 with train.method='noise'.*set it to None"):
        methods.noise(Attack(step_size_pixels=1.0))
    with pytest.raises(ConfigError, match=r"sam.rho=-1 must be at least 0"):
        Ascent(-1)
    with pytest.raises(ConfigError, match=r"autoaugment.mode='concat3' with train.method='sam'"):
        methods.make_method("sam", augmented=True)


def test_methods_survive_their_configuration():
    for method in (methods.sam(Ascent(0.1), stale=True), methods.noise(Attack(2.0)), methods.vanilla()):
        assert methods.Method.from_config(method.get_config()) == method


@pytest.mark.parametrize("method", some_of(("noise", "sam", "sam_stale"), "sam_stale", otherwise="long"))
def test_a_run_trains_it_to_its_end(method, tmp_path):
    """With all that watches a run, some of which is about attacks and old weights."""
    result = trained(tmp_path, f"train.method='{method}'", "train.epochs=2")
    assert (result["method"], result["epochs"]) == (method, 2)
    for line in lines(tmp_path):
        assert line["theory_mean_squared_gradient_norm"] > 0
        assert "theory_drift" not in line  # no weights are attacked that are old


def test_the_examples_of_noise_are_what_it_trains_on():
    """Seen to fail: they were those of a gradient attack, which never came into such a run."""
    images = np.full((4, 8, 8, 1), 100, np.uint8)
    model = make_model(methods.noise(Attack(epsilon_pixels=3.0)))
    noisy = model.adversarial_examples(images, np.zeros(4, np.int32)).numpy()
    signs = np.sign(tf.random.stateless_uniform(images.shape, [0, 1], -1.0, 1.0).numpy())
    np.testing.assert_array_equal(noisy, images + 3.0 * signs)
