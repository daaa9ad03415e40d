"""AdamW, LAMB and RMSProp: their formulas in float64, updates that are not finite, and whole runs."""

import json

import numpy as np
import pytest
import reference
import tensorflow as tf
import tf_keras
from commands import weights
from helpers import assert_close, assert_identical, fit, make_model, mirrored, named_variables, random_batches, snapshot
from reference import Recipe
from test_preemption import signalled, trained
from test_update import reference_names

from conadv_tf import methods
from conadv_tf.errors import ConfigError, Preempted
from conadv_tf.training import optimizers
from conadv_tf.training.learning_rate import WarmupPolyDecay

RATE, DECAY, ROWS = 0.01, 0.1, 6


def adam_step(kind: str, w, g, m, v, step: int, epsilon: float):
    """(w, m, v) after update `step`, from 1; `w` is a kernel where it has several axes."""
    if kind == "rmsprop":
        g = g + DECAY * w * (w.ndim > 1)
        v = 0.9 * v + 0.1 * g * g
        m = 0.9 * m + RATE * g / np.sqrt(v + epsilon)
        return w - m, m, v
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    decayed = w.ndim > 1
    if kind == "adamw":
        direction = np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (np.sqrt(v) + epsilon)
        return w * (1 - RATE * DECAY * decayed) - RATE * direction, m, v
    direction = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + epsilon)
    if decayed:
        direction = direction + DECAY * w
        direction = direction * np.linalg.norm(w.ravel()) / np.linalg.norm(direction.ravel())
    return w - RATE * direction, m, v


def weights_of(model) -> dict:
    return reference_names(named_variables(model.network), moving=False)


@pytest.mark.parametrize(
    ("kind", "replicas"), [("adamw", 1), ("lamb", 2), pytest.param("rmsprop", 2, marks=pytest.mark.long)]
)
def test_updates_equal_the_formulas(kind, replicas):
    images, labels = random_batches(3, ROWS * replicas)
    strategy = mirrored(replicas) if replicas > 1 else None
    # An epsilon that is not lost among squares of gradients near 0, which would decide by their rounding.
    with strategy.scope() if strategy else tf.name_scope(""):
        optimizer = optimizers.OPTIMIZERS[kind](RATE, epsilon=1e-3, weight_decay=DECAY)
    model = make_model(methods.vanilla(), optimizer, strategy=strategy, branches=("main",), run_eagerly=replicas > 1)
    state = weights_of(model)
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in state.items()}
    for step in range(3):
        fit(model, images[step : step + 1], labels[step : step + 1], 1, initial=step)
        parts = [
            reference.training_pass(Recipe(), state, images[step, own], labels[step, own], "main")[1]
            for own in np.split(np.arange(ROWS * replicas), replicas)
        ]
        for name, w in state.items():
            gradient = np.mean([part[name] for part in parts], axis=0)
            state[name], *moments[name] = adam_step(kind, w, gradient, *moments[name], step + 1, 1e-3)
        assert_close(weights_of(model), state, 1e-5)


@pytest.mark.parametrize(
    ("make", "replicas"),
    [
        pytest.param(optimizers.make_lamb, 1, id="lamb"),
        pytest.param(tf_keras.optimizers.Adam, 2, id="keras' Adam", marks=pytest.mark.long),
    ],
)
def test_an_update_that_is_not_finite_changes_nothing(make, replicas):
    """Neither weights nor slots nor the count of updates."""
    images, labels = random_batches(4, 2 * replicas)
    strategy = mirrored(replicas) if replicas > 1 else None
    with strategy.scope() if strategy else tf.name_scope(""):
        optimizer = make(0.01)
    bad = labels.copy()
    bad[2, 0] = 99  # a loss of NaN
    model = make_model(methods.conadv(), optimizer, strategy=strategy, run_eagerly=True)
    data = tf.data.Dataset.from_tensor_slices((images, bad)).batch(1).map(lambda x, y: (x[0], y[0]))
    iterator = iter(model.distribute_strategy.experimental_distribute_dataset(data))
    train = model.make_train_function()
    for _ in range(2):
        train(iterator)
    before = {n: v for n, v in snapshot(model).items() if "metrics" not in n}
    assert model.updates_made() == 2
    train(iterator)
    assert_identical({n: v for n, v in snapshot(model).items() if "metrics" not in n}, before)
    assert model.updates_made() == 2


@pytest.mark.parametrize("kind", ["adamw", "lamb", "rmsprop"])
def test_they_rebuild_from_their_configuration(kind):
    schedule = WarmupPolyDecay(2, 0.1, 8, 0.0, 2.0)
    other = {"rho": 0.8} if kind == "rmsprop" else {"beta_2": 0.95}
    optimizer = optimizers.OPTIMIZERS[kind](schedule, weight_decay=0.3, **other)
    again = type(optimizer).from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert isinstance(again.learning_rate, WarmupPolyDecay)
    kernel, gamma = tf.Variable([[1.0]], name="conv/kernel"), tf.Variable([1.0], name="norm/gamma")
    again.learning_rate = 0.1
    again.apply_gradients([(tf.zeros((1, 1)), kernel), (tf.zeros(1), gamma)])
    assert kernel.numpy() < 1.0
    assert gamma.numpy() == 1.0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_run_goes_on_to_the_same_bits(kind, tmp_path):
    settings = [f"train.optimizer='{kind}'", "learning_rate.peak_learning_rate=0.01", "train.epochs=2"]
    result = trained(tmp_path / "whole", *settings)
    with signalled(9), pytest.raises(Preempted):
        trained(tmp_path / "parts", *settings)
    trained(tmp_path / "parts", *settings)
    assert_identical(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["test_top1"] == result["test_top1"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"beta_1": 1.0}, r"adamw.beta_1=1.0 is outside"), ({"epsilon": 0.0}, r"adamw.epsilon=0.0 must be above 0")],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        optimizers.make_adamw(0.1, **settings)
