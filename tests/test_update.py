"""Updates of every method against the independent float64 computation of tests/reference.py."""

import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import assert_close, draws, fit, make_model, microbatch_seed, named_variables, random_batches, some_of
from reference import Recipe, Rows, State

from conadv_tf import methods
from conadv_tf.methods import passes
from conadv_tf.methods.attack import Attack
from conadv_tf.training import lars, losses

RATE, RUN_SEED = 2.0, 5
# A pixel whose input gradient is this close to 0 (relative to the largest of its batch) could get another
# sign in float32 than in float64. No pixel of these tests is: nothing is left out of any comparison.
SAFE_MARGIN = 5e-6


def case(recipe=None, attack=None, mixture=None, updates=2, **settings):
    """`settings` are of the data and the optimizer; without an attack the method is vanilla."""
    return recipe or Recipe(), attack, mixture or {}, updates, settings


STILL = {"random_start_probability": 0.0}
CASES = {
    "vanilla": case(Recipe(adversarial=False)),
    "disadv": case(attack=STILL),
    "disadv_random_start": case(attack={}),
    "conadv_still": case(Recipe(tau=1), STILL, updates=3),
    "conadv_random_start": case(Recipe(tau=1), {}, updates=3),
    "conadv_tau2": case(Recipe(tau=2), {}, updates=4, seed=3),
    "coin": case(Recipe(tau=1), {"random_start_probability": 0.5}, updates=5),
    "release_units": case(
        Recipe(network="cifar_resnet8", epsilon=9.0, release_units=True),
        {"epsilon_pixels": 9.0, "units": "release_units"},
        rows=4,
    ),
    "cifar": case(Recipe(tau=1, network="cifar_resnet8", epsilon=8.0), {"epsilon_pixels": 8.0}, rows=4, seed=2),
    "l2": case(Recipe(norm="l2", epsilon=6.0), {"norm": "l2", "epsilon_pixels": 6.0}),
    "l2_pgd": case(
        Recipe(norm="l2", epsilon=6.0, steps=3, step_size=4.0),
        {"norm": "l2", "epsilon_pixels": 6.0, "steps": 3, "step_size_pixels": 4.0},
    ),
    "random_target": case(Recipe(tau=1, descend=True), {"goal": "random_target"}),
    "smoothed": case(Recipe(smoothed=True, smoothing=0.3), {"label": "smoothed"}, smoothing=0.3),
    "predicted": case(Recipe(tau=1, predicted=True), {"label": "predicted"}),
    "predicted_pgd": case(
        Recipe(predicted=True, steps=3, step_size=1.25), {"label": "predicted", "steps": 3, "step_size_pixels": 1.25}
    ),
    "pgd": case(Recipe(steps=3, step_size=1.25), {"steps": 3, "step_size_pixels": 1.25}),
    "fast_fgsm": case(Recipe(epsilon=8.0, step_size=10.0), {"epsilon_pixels": 8.0, "step_size_pixels": 10.0}),
    "moving": case(Recipe(tau=1, batch_norm="moving"), {"batch_norm": "moving"}, updates=3),
    "aux": case(Recipe(tau=1, batch_norm="aux"), {"batch_norm": "aux"}),
    "weight": case(Recipe(weight=0.3), {}, {"weight": 0.3}, seed=3),
    "fraction": case(Recipe(tau=1, fraction=0.5), {}, {"fraction": 0.5}),
    "concat3": case(Recipe(tau=1, weight=1 / 3), {}, {"weight": 1 / 3}, updates=3, augmented=True),
    "concat3_microbatches": case(Recipe(fraction=0.5), {}, {"fraction": 0.5}, augmented=True, microbatches=2),
    "sgd": case(Recipe(eta=None, decay=0.01, momentum=0.5), {}, rate=0.05, sgd=True),
    "microbatches": case(Recipe(tau=1), {}, microbatches=3),
}

# These run as they are trained, traced into one program; the others differ in the attack alone and run
# operation by operation, which takes a third of the time.
TRACED = (
    "vanilla",
    "disadv_random_start",
    "conadv_random_start",
    "pgd",
    "fraction",
    "microbatches",
    "concat3",
)


def method_of(recipe: Recipe, attack: dict | None, mixture: dict, augmented: bool) -> methods.Method:
    if attack is None:
        return methods.vanilla()
    made, mixed = Attack(**attack), methods.Mixture(**mixture, augmented=augmented)
    if recipe.tau:
        return methods.conadv(made, mixed, tau=recipe.tau)
    return methods.disadv(made, mixed)


def reference_names(variables: dict, moving: bool) -> dict:
    """float64 copies of the weights, or of the moving statistics, under the reference's names."""
    chosen = {name: v for name, v in variables.items() if ("/moving_" in name) == moving}
    return {name.replace("moving_", ""): np.float64(v.numpy()) for name, v in chosen.items()}


def state_of(model) -> State:
    """What the product holds now."""
    variables = named_variables(model.network)
    velocity = {
        name: np.float64(model.optimizer.get_slot(variable, "momentum").numpy())
        for name, variable in variables.items()
        if "/moving_" not in name
    }
    return State(reference_names(variables, False), reference_names(variables, True), velocity)


def build(name: str):
    """The product's model of a case, its data, and how the reference sees each update's micro-batches."""
    recipe, attack, mixture, updates, settings = CASES[name]
    make = lars.make_sgd if settings.get("sgd") else lars.make_lars
    optimizer = make(settings.get("rate", RATE), momentum=recipe.momentum, weight_decay=recipe.decay)
    count = settings.get("microbatches", 1)
    augmented = settings.get("augmented", False)
    model = make_model(
        method_of(recipe, attack, mixture, augmented),
        optimizer,
        recipe.network,
        microbatches=count,
        seed=RUN_SEED,
        branches=("main", "augmented", "adversarial") if augmented else ("main", "adversarial"),
        loss=losses.SmoothedCrossEntropy(settings.get("smoothing", 0.1)),
        run_eagerly=name not in TRACED,
    )
    model.create_optimizer_variables()
    images, labels = random_batches(updates * count, settings.get("rows", 6), recipe.network, settings.get("seed", 1))
    others, _ = random_batches(updates * count, settings.get("rows", 6), recipe.network, seed=99)
    fed = np.stack([images, others], axis=2) if augmented else images

    def rows(update: int, place: int) -> Rows:
        batch = images[update * count + place], labels[update * count + place]
        attacked = batch[0][: round(recipe.fraction * len(batch[0]))]
        start, targets = np.zeros(attacked.shape), batch[1]
        if attack is not None:
            seed = microbatch_seed(RUN_SEED, update, place)
            start, targets = draws(model.method.attack, attacked.shape, batch[1][: len(attacked)], seed)
        return Rows(*batch, start, targets, others[update * count + place] if augmented else None)

    return model, fed, labels, [[rows(u, place) for place in range(count)] for u in range(updates)]


# Of each kind one; what an attack is in further variants is a matter of the operations in x̂, below.
QUICK = (
    "vanilla",
    "disadv",
    "conadv_random_start",
    "conadv_tau2",
    "l2",
    "random_target",
    "smoothed",
    "predicted",
    "moving",
    "aux",
    "weight",
    "microbatches",
    "concat3_microbatches",
    "sgd",
)


@pytest.mark.parametrize("name", some_of(CASES, *QUICK, otherwise="long"))
def test_updates_equal_the_reference(name):
    model, images, labels, rows = build(name)
    recipe, rate = CASES[name][0], CASES[name][-1].get("rate", RATE)
    states = [state_of(model)]
    for step, micro_batches in enumerate(rows):
        now = slice(step * len(micro_batches), (step + 1) * len(micro_batches))
        [logs] = fit(model, images[now], labels[now], 1, initial=step)
        stale = states[max(0, step - recipe.tau)]
        expected, expected_logs, margin = reference.update(recipe, states[-1], stale, micro_batches, rate)
        if recipe.norm == "linf":
            assert margin > SAFE_MARGIN, "choose another seed for the data: a sign is uncertain"
        actual = state_of(model)
        assert_close(actual.weights, expected.weights, 1e-5)
        assert_close(actual.moving, expected.moving, 1e-5)
        assert_close({key: logs[key] for key in expected_logs}, expected_logs, 1e-5)
        # An update is small beside the weights: compare it on its own scale, too.
        for key, velocity in expected.velocity.items():
            scale = np.abs(velocity).max()
            np.testing.assert_allclose(actual.velocity[key], velocity, rtol=0, atol=1e-4 * scale, err_msg=key)
        states.append(expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "vanilla"])
def test_adversarial_examples_equal_the_reference(name):
    recipe = CASES[name][0]
    model, _, labels, rows = build(name)
    state = state_of(model)
    attacked = rows[0][0].start.shape[0]
    first = rows[0][0]
    batch = methods.Batch(
        tf.constant(first.images[:attacked], tf.float32),
        tf.constant(labels[0][:attacked]),
        microbatch_seed(RUN_SEED, 0, 0),
    )
    actual = passes.attack_images(model.method.attack, model.network, model.loss.call, batch).numpy()
    only = Rows(first.images[:attacked], first.labels[:attacked], first.start, first.attack_labels[:attacked])
    expected, margin = reference.attack(recipe, state, only)
    assert recipe.norm == "l2" or margin > SAFE_MARGIN
    # All pixels: 1e-4 is a few roundings of float32 at 255; any wrong sign would show as 2 α.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 if recipe.norm == "linf" else 1e-3)


@pytest.mark.long
def test_no_perturbation_trains_like_a_clean_batch_through_both_batch_norms():
    attack = Attack(epsilon_pixels=0.0, random_start_probability=0.0)
    model = make_model(methods.conadv(attack, tau=1), lars.LARS(RATE))
    model.create_optimizer_variables()
    images, labels = random_batches(2, 6)
    state = state_of(model)
    for step in range(2):
        [logs] = fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
        passes = [
            reference.training_pass(Recipe(), state.weights, images[step], labels[step], branch)
            for branch in ("main", "adversarial")
        ]
        gradient = {name: (passes[0][1][name] + passes[1][1][name]) / 2 for name in state.weights}
        weights, velocity = reference.lars(Recipe(), state.weights, gradient, state.velocity, RATE)
        moving = {n: 0.9 * state.moving[n] + 0.1 * s for n, s in (passes[0][2] | passes[1][2]).items()}
        state = State(weights, moving, velocity)
        actual = state_of(model)
        assert_close(actual.weights, weights, 1e-5)
        assert_close(actual.moving, moving, 1e-5)
        assert_close(actual.velocity, velocity, 1e-6)
        np.testing.assert_allclose(logs["adversarial_loss"], passes[1][0], rtol=1e-5)
