"""x̂ of update t is made from θ_{t−τ}, no younger and no older; delay 0 is disadv."""

import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import (
    assert_close,
    assert_identical,
    draws,
    fit,
    make_model,
    microbatch_seed,
    named_variables,
    random_batches,
    snapshot,
    some_of,
)
from test_update import SAFE_MARGIN, state_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.models import resnet
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.run.export import export
from conadv_tf.training import lars, trainer

UPDATES, RATE = 5, 6.0
SEED = 4  # of the data: no pixel's gradient is near 0 (asserted)


def recorded_run(tau: int, attack: Attack, **compiled):
    """A run's model, its data, and the states before every update and after the last."""
    model = make_model(methods.conadv(attack, tau=tau), lars.LARS(RATE), **compiled)
    model.create_optimizer_variables()
    images, labels = random_batches(UPDATES, 6, seed=SEED)
    states = [state_of(model)]
    for step in range(UPDATES):
        fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
        states.append(state_of(model))
    return model, images, labels, states


def rows_at(attack: Attack, images, labels, step: int) -> reference.Rows:
    shape = images[step].shape
    return reference.Rows(images[step], labels[step], *draws(attack, shape, labels[step], microbatch_seed(0, step, 0)))


@pytest.mark.parametrize("tau", some_of([1, 2, 3], 2, otherwise="long"))
def test_updates_use_the_weights_of_tau_updates_ago_and_no_others(tau):
    attack = Attack(epsilon_pixels=8.0)
    _, images, labels, states = recorded_run(tau, attack)
    recipe = reference.Recipe(epsilon=8.0, tau=tau)
    for step in range(UPDATES):
        rows = rows_at(attack, images, labels, step)

        def velocity_error(source, step=step, rows=rows):
            expected, _, margin = reference.update(recipe, states[step], states[source], [rows], RATE)
            assert margin > SAFE_MARGIN, "choose another seed for the data: a sign is uncertain"
            actual = states[step + 1].velocity
            return max(
                np.abs(actual[name] - value).max() / np.abs(value).max() for name, value in expected.velocity.items()
            )

        right = max(0, step - tau)
        assert velocity_error(right) < 1e-4
        for wrong in {max(0, right - 1), right + 1, step} - {right}:
            if wrong <= step:
                assert velocity_error(wrong) > 1e-3, f"update {step} cannot tell θ_{right} from θ_{wrong}"


@pytest.mark.parametrize("tau", some_of([1, 2, 3], 2, otherwise="long"))
def test_adversarial_examples_are_those_of_the_stale_weights(tau):
    still = Attack(epsilon_pixels=8.0, random_start_probability=0.0)
    model, images, labels, states = recorded_run(tau, still, run_eagerly=True)
    actual = model.adversarial_examples(images[0], labels[0]).numpy()
    rows = rows_at(still, images, labels, 0)
    expected = {
        source: reference.attack(reference.Recipe(epsilon=8.0), states[source], rows)[0]
        for source in range(UPDATES - tau, UPDATES + 1)
    }
    # The next update is number UPDATES (counting from 0).
    np.testing.assert_allclose(actual, expected[UPDATES - tau], rtol=0, atol=1e-4)
    assert np.abs(actual - expected[UPDATES]).max() > 1


@pytest.mark.long
def test_the_shadow_ring_holds_the_last_tau_networks():
    tau = 3
    model, *_, states = recorded_run(tau, Attack())
    for age, shadow in zip((3, 2, 1), model.shadows, strict=True):
        held = {name: v.numpy() for name, v in named_variables(shadow).items()}
        then = states[UPDATES - age]
        expected = {**then.weights, **{n.replace("/mean", "/moving_mean"): v for n, v in then.moving.items()}}
        expected = {n.replace("/variance", "/moving_variance"): v for n, v in expected.items()}
        assert_identical({n: np.float64(v) for n, v in held.items()}, expected)
    assert not any(variable.trainable for shadow in model.shadows for variable in shadow.variables)


@pytest.mark.long
def test_drift_is_the_relative_distance_to_the_stale_weights():
    model = make_model(methods.conadv(tau=2), lars.LARS(RATE))
    images, labels = random_batches(4, 6)
    recorded, logs = [], []
    for step in range(4):
        recorded.append(np.concatenate([v.numpy().ravel() for v in model.network.trainable_variables]))
        logs += fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
    for step in range(4):
        now, then = recorded[step], recorded[max(0, step - 2)]
        expected = np.linalg.norm(now - then) / np.linalg.norm(now)
        np.testing.assert_allclose(logs[step]["drift"], expected, rtol=1e-5)


def test_shadow_with_delay_zero_is_disadv_bit_for_bit():
    images, labels = random_batches(4, 6)
    models = [make_model(method, run_eagerly=True) for method in (methods.conadv(tau=0), methods.disadv())]
    logs = [fit(model, images, labels, 4) for model in models]
    assert_identical(snapshot(models[0]), snapshot(models[1]))
    for ours, theirs in zip(*logs, strict=True):
        ours, theirs = ({n: v for n, v in log.items() if n != "input_wait_seconds"} for log in (ours, theirs))
        assert_identical(ours, theirs)


@pytest.mark.long
def test_the_first_update_of_any_delay_equals_that_of_disadv():
    images, labels = random_batches(1, 6)
    weights = []
    for method in (methods.disadv(), methods.conadv(tau=1), methods.conadv(tau=3)):
        model = make_model(method)
        fit(model, images, labels, 1)
        weights.append({name: v.numpy() for name, v in named_variables(model.network).items()})
    assert_close(weights[1], weights[0], 1e-6)
    assert_close(weights[2], weights[0], 1e-6)


def test_shadow_copies_share_no_variable_with_the_network():
    model = make_model(methods.conadv(tau=2))
    networks = [model.network, *model.shadows]
    references = [variable.ref() for network in networks for variable in network.variables]
    assert len(references) == len(set(references)) == 3 * len(model.network.variables)
    trained = {variable.ref() for variable in model.trainable_variables}
    assert trained == {variable.ref() for variable in model.network.trainable_variables}
    logits = [network(tf.ones((2, 8, 8, 1)), branch=MAIN).numpy() for network in networks]
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"tau": -1}, "tau=-1"), ({"tau": 1.5}, "tau=1.5"), ({"schedule": "warp"}, "'warp'")],
)
def test_impossible_delays_and_schedules_are_refused_by_value(arguments, named):
    with pytest.raises(ConfigError, match=named):
        methods.conadv(**arguments)


class Louder(resnet.ResNet):
    """A network of another kind: its logits are twice those of a ResNet."""

    def call(self, *arguments, **keywords):
        return 2.0 * super().call(*arguments, **keywords)


@pytest.mark.long
def test_a_network_of_another_kind_has_shadows_and_an_export_of_its_kind(tmp_path):
    method = methods.conadv()
    network = Louder("digits_resnet", 10, (8, 8, 1), method.branches)
    model = trainer.ConAdvModel(network, method)
    model.compile(lars.LARS(2.0))
    images, labels = random_batches(1, 6)
    fit(model, images, labels, 1)
    assert type(model.shadows[0]) is Louder
    export(network, str(tmp_path))
    exported = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    logits = exported(tf.constant(images[0], tf.float32))["logits"]
    np.testing.assert_allclose(logits, network(images[0]), rtol=1e-5, atol=1e-5)
