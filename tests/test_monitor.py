"""The theory monitor against float64, on replicas, under XLA, and through the command line; it changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import tensorflow as tf
import tf_keras
from commands import call_command_line
from helpers import assert_close, assert_identical, make_model, mirrored, random_batches, snapshot, some_of
from test_update import SAFE_MARGIN, state_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.run import monitor
from conadv_tf.training import lars

UPDATES, ROWS, RATE, EPSILON = 5, 6, 6.0, 8.0
MEASURED = {
    "theory_drift",
    "theory_lipschitz_x_theta",
    "theory_equal_signs",
    "theory_fresh_loss",
    "theory_stale_loss",
    "theory_perturbation_distance",
}
AVERAGE = "theory_mean_squared_gradient_norm"


class States(tf_keras.callbacks.Callback):
    """What the model holds before every epoch and after the last."""

    def on_train_begin(self, logs=None):
        self.model.create_optimizer_variables()
        self.held = [state_of(self.model)]

    def on_epoch_end(self, epoch, logs=None):
        self.held.append(state_of(self.model))


def train(model, *callbacks, every: int = UPDATES, seed: int = 2):
    """Trains with a monitor, one update an epoch; the logs of each epoch and the images that were watched."""
    images, labels = random_batches(UPDATES, ROWS, seed=seed)
    (watched,), (watched_labels,) = random_batches(1, ROWS, seed=seed + 50)
    settings = monitor.MonitorSettings(every_epochs=every, images=ROWS)
    seen: list[dict] = []
    keep = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
    model.fit(
        tf.data.Dataset.from_tensor_slices((images, labels)).repeat(),
        steps_per_epoch=1,
        epochs=UPDATES,
        verbose=0,
        callbacks=[monitor.TheoryMonitor(settings, UPDATES, (watched, watched_labels)), keep, *callbacks],
    )
    return seen, watched, watched_labels


def input_gradient(recipe: reference.Recipe, state: reference.State, images, labels) -> np.ndarray:
    """∇_x of what the attack changes, float64."""
    x = tf.constant(images, tf.float64)
    branch = "adversarial" if recipe.batch_norm == "aux" else "main"
    with tf.GradientTape() as tape:
        tape.watch(x)
        moving = state.moving if recipe.batch_norm == "moving" else None
        logits, _ = reference.forward(recipe.network, state.weights, x, branch, moving)
        smoothing = recipe.smoothing if recipe.smoothed else 0.0
        loss = tf.reduce_sum(reference.cross_entropy(logits, labels, smoothing))
    return tape.gradient(loss, x).numpy()


def expected_values(recipe, now: reference.State, then: reference.State, images, labels) -> dict[str, float]:
    drift = np.sqrt(sum(np.sum((now.weights[name] - then.weights[name]) ** 2) for name in now.weights))
    targets = labels
    if recipe.descend:
        seed = tf.random.split(tf.constant(monitor.TARGET_SEED), 3)[2] & 0x7FFFFFFF
        targets = (labels + tf.random.stateless_uniform((ROWS,), seed, 1, 10, tf.int32).numpy()) % 10
    gradients = [input_gradient(recipe, state, images, targets) for state in (now, then)]
    assert min(np.abs(g).min() / np.abs(g).max() for g in gradients) > SAFE_MARGIN, "choose another seed"
    rows = reference.Rows(images, labels, np.zeros(images.shape), targets)
    attacked = [reference.attack(recipe, state, rows)[0] for state in (now, then)]
    losses = [reference.training_pass(recipe, now.weights, x, labels, "adversarial")[0] for x in attacked]

    def lengths(difference):
        return np.sqrt(np.sum(difference**2, axis=(1, 2, 3)))

    return {
        "theory_drift": drift,
        "theory_lipschitz_x_theta": lengths(gradients[0] - gradients[1]).mean() / drift,
        "theory_equal_signs": np.mean(np.sign(gradients[0]) == np.sign(gradients[1])),
        "theory_fresh_loss": losses[0],
        "theory_stale_loss": losses[1],
        "theory_perturbation_distance": lengths(attacked[0] - attacked[1]).mean(),
    }


CASES = {
    "tau 1": (1, {}, {}),
    "tau 3": (3, {}, {}),
    "moving, smoothed, targeted": (
        1,
        {"batch_norm": "moving", "label": "smoothed", "goal": "random_target"},
        {"batch_norm": "moving", "smoothed": True, "descend": True},
    ),
    "aux, l2": (1, {"batch_norm": "aux", "norm": "l2"}, {"batch_norm": "aux", "norm": "l2"}),
}


@pytest.mark.parametrize("case", some_of(CASES, "tau 1", "aux, l2", otherwise="long"))
def test_values_equal_an_independent_computation(case):
    tau, attack, recipe = CASES[case]
    # A random start and a second step in training leave the monitor's one step from the clean image as it is.
    steps = {} if attack else {"steps": 2, "step_size_pixels": EPSILON}
    method = methods.conadv(Attack(epsilon_pixels=EPSILON, **attack, **steps), tau=tau)
    model = make_model(method, lars.LARS(RATE), run_eagerly=True)
    states = States()
    seen, images, labels = train(model, states)
    now, then, wrong = (states.held[UPDATES - age] for age in (0, tau, tau + 1))
    recipe = reference.Recipe(epsilon=EPSILON, **recipe)
    expected = expected_values(recipe, now, then, images, labels)
    actual = {name: seen[-1][name] for name in MEASURED}
    np.testing.assert_allclose(*([values[name] for name in sorted(MEASURED)] for values in (actual, expected)), 1e-5)
    # What it compares is far enough from the neighbours that a delay off by one would show.
    other = expected_values(recipe, now, wrong, images, labels)
    assert abs(other["theory_drift"] / expected["theory_drift"] - 1) > 0.05
    assert 0 < expected["theory_equal_signs"] < 1
    assert expected["theory_perturbation_distance"] > 0
    assert abs(expected["theory_fresh_loss"] / expected["theory_stale_loss"] - 1) > 1e-4


def test_equal_weights_have_no_drift_and_equal_signs():
    model = make_model(methods.conadv(Attack(), tau=2))
    (images,), (labels,) = random_batches(1, ROWS)
    values = model.inspection(monitor.staleness_of(model.method.attack))(images, labels)
    values = {name: float(value) for name, value in values.items()}
    assert values.keys() == MEASURED
    assert values["theory_drift"] == values["theory_lipschitz_x_theta"] == values["theory_perturbation_distance"] == 0
    assert values["theory_equal_signs"] == 1
    assert values["theory_fresh_loss"] == values["theory_stale_loss"] > 0


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(methods.conadv(tau=2), id="conadv"),
        pytest.param(methods.vanilla(), id="vanilla", marks=pytest.mark.long),
    ],
)
def test_it_changes_no_bit_of_the_run(method):
    watched, alone = (make_model(method, lars.LARS(RATE), run_eagerly=True) for _ in range(2))
    seen, *_ = train(watched, every=1)
    images, labels = random_batches(UPDATES, ROWS, seed=2)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
    logs = alone.fit(data, steps_per_epoch=1, epochs=UPDATES, verbose=0).history
    assert_identical(snapshot(watched), snapshot(alone))
    for name in logs.keys() - {"input_wait_seconds"}:
        assert [epoch[name] for epoch in seen] == logs[name]


def test_replicas_give_the_values_of_one_and_stay_alike():
    (images,), (labels,) = random_batches(1, ROWS, seed=52)
    values = []
    for strategy in (None, mirrored(2)):
        settings = {"network": {"replicas_per_group": 2 if strategy else 1}}
        model = make_model(methods.conadv(Attack(epsilon_pixels=EPSILON)), strategy=strategy, **settings)
        model.shadows[0].classifier.kernel.assign(-0.5 * model.shadows[0].classifier.kernel)
        before = snapshot(model)
        values.append(model.inspection(monitor.staleness_of(model.method.attack))(images, labels))
        assert_identical(snapshot(model), before)
    one, two = ({name: float(value) for name, value in of.items()} for of in values)
    assert one["theory_equal_signs"] < 1
    assert_close(two, one, 1e-5)


@pytest.mark.long
def test_it_is_an_xla_program_with_the_same_values():
    model = make_model(methods.conadv(Attack(epsilon_pixels=EPSILON, goal="random_target")))
    model.shadows[0].classifier.kernel.assign(-0.5 * model.shadows[0].classifier.kernel)
    (images,), (labels,) = random_batches(1, ROWS, seed=52)
    measure, loss = monitor.staleness_of(model.method.attack), model.loss.call
    compiled = tf.function(
        lambda x, y: measure(model.network, model.shadows[0], loss, x, y), jit_compile=True, autograph=False
    )
    expected = model.inspection(measure)(images, labels)
    assert_close(*({n: float(v) for n, v in of.items()} for of in (compiled(images, labels), expected)), 1e-4)


@pytest.mark.parametrize(
    ("every", "epochs", "due"),
    [(2, 5, [2, 4, 5]), (9, 3, [3]), (0, 4, [1, 2, 3, 4]), (0, 25, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25])],
)
def test_it_measures_in_the_epochs_due_and_averages_over_all(every, epochs, due):
    watcher = monitor.TheoryMonitor(monitor.MonitorSettings(every_epochs=every), epochs, None)
    found = {}
    for epoch in range(epochs):
        logs = {"squared_gradient_norm": float(epoch)}
        watcher.on_epoch_end(epoch, logs)
        found |= {epoch + 1: logs[AVERAGE]} if AVERAGE in logs else {}
    assert found == {epoch: (epoch - 1) / 2 for epoch in due}


def test_an_average_that_goes_on_from_its_records_is_the_same_to_the_last_bit():
    settings, values, averages = monitor.MonitorSettings(every_epochs=1), [1 / 3, 2 / 7, 1 / 7], []
    for earlier in ([], [{"squared_gradient_norm": 0.333333}, {"squared_gradient_norm": 0.285714}]):
        watcher = monitor.TheoryMonitor(settings, 3, None, earlier)
        for epoch in range(len(earlier), 3):
            logs = {"squared_gradient_norm": values[epoch]}
            watcher.on_epoch_end(epoch, logs)
        averages.append(logs[AVERAGE])
    assert averages[0] == averages[1]


def test_an_average_with_unknown_epochs_is_left_out():
    for earlier in ([], [{"loss": 1.0}]):
        logs = {"squared_gradient_norm": 1.0}
        monitor.TheoryMonitor(monitor.MonitorSettings(every_epochs=1), 2, None, earlier).on_epoch_end(1, logs)
        assert AVERAGE not in logs


def test_the_squared_norm_of_an_epoch_is_the_mean_of_its_updates():
    images, labels = random_batches(3, ROWS)
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    apart = (
        make_model(methods.vanilla(), run_eagerly=True)
        .fit(data.repeat(), steps_per_epoch=1, epochs=3, verbose=0)
        .history
    )
    whole = make_model(methods.vanilla()).fit(data, verbose=0).history
    squares = np.square(apart["gradient_norm"])
    assert np.std(squares) > 0.01 * np.mean(squares)
    np.testing.assert_allclose(apart["squared_gradient_norm"], squares, rtol=1e-5)
    np.testing.assert_allclose(whole["squared_gradient_norm"], [np.mean(squares)], rtol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("every_epochs", -1), ("images", 0)])
def test_impossible_settings_are_refused_by_value(name, value):
    with pytest.raises(ConfigError, match=rf"monitor\.{name}={value}"):
        monitor.MonitorSettings(**{name: value})


FLAGS = ["train.epochs=5", "learning_rate.warmup_epochs=1", "conadv.tau=2", "monitor.images=32"]


def run(model_dir: Path, every_epochs: int) -> list[dict]:
    """metrics.jsonl of digits_conadv, shortened, through the command line."""
    bindings = [f"--gin_param={binding}" for binding in (*FLAGS, f"monitor.every_epochs={every_epochs}")]
    call_command_line(*bindings, f"--model_dir={model_dir}")
    return [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_run_records_the_theory_and_a_resumed_one_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = run(tmp_path / "whole", 2)
    found = {line["epoch"]: {name for name in line if name.startswith("theory_")} for line in whole}
    assert found == {1: set(), 2: MEASURED | {AVERAGE}, 3: set(), 4: MEASURED | {AVERAGE}, 5: MEASURED | {AVERAGE}}
    for line in (whole[1], whole[4]):
        squares = [earlier["squared_gradient_norm"] for earlier in whole[: line["epoch"]]]
        assert line[AVERAGE] == pytest.approx(np.mean(squares), rel=1e-5)
        assert 0 < line["theory_equal_signs"] < 1
        assert line["theory_lipschitz_x_theta"] > 0
    events = EventAccumulator(str(tmp_path / "whole" / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    for name in MEASURED | {AVERAGE}:
        assert [event.step for event in events.Tensors(name.replace("theory_", "theory/"))] == [26, 52, 65]

    # As after a kill in epoch 4: the newest checkpoint is that of epoch 3, and metrics.jsonl is a line ahead.
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "result.json").unlink()
    state = tmp_path / "again" / "checkpoints" / "checkpoint"
    state.write_text('model_checkpoint_path: "ckpt-39"\nall_model_checkpoint_paths: "ckpt-39"\n')
    again = run(tmp_path / "again", 1)
    assert {name for name in again[3] if name.startswith("theory_")} == MEASURED | {AVERAGE}
    for line, expected in zip(again[3:], whole[3:], strict=True):
        for name in (*MEASURED, AVERAGE, "loss"):
            assert line[name] == expected[name], name
