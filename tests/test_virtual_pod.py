"""The virtual pod: the split of a global batch into replicas and micro-batches changes nothing."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, fit, make_model, mirrored, named_variables, random_batches, snapshot, some_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.training import lars

UPDATES, PARTS, ROWS, RATE = 3, 8, 4, 6.0
# A large ε and PGD would magnify rounding; a random start of every micro-batch must be its own.
METHODS = {
    "vanilla": methods.vanilla,
    "disadv": methods.disadv,
    "conadv_tau2": functools.partial(methods.conadv, Attack(), tau=2),
    "paired_predicted": functools.partial(methods.conadv, Attack(label="predicted"), schedule="paired"),
    "paired_target": functools.partial(methods.conadv, Attack(goal="random_target"), schedule="paired"),
    "noise": methods.noise,
    "sam_stale": functools.partial(methods.sam, stale=True),
}


def trained(name: str, replicas: int, microbatches: int):
    """Logs of every update, and all weights and statistics after the last."""
    strategy = mirrored(replicas) if replicas > 1 else None
    model = make_model(METHODS[name](), lars.LARS(RATE), strategy=strategy, microbatches=microbatches)
    images, labels = random_batches(UPDATES * PARTS, ROWS, seed=4)
    images = images.reshape(UPDATES * microbatches, replicas * ROWS, *images.shape[2:])
    logs = fit(model, images, labels.reshape(UPDATES * microbatches, -1), UPDATES)
    return logs, {name: v.numpy() for name, v in named_variables(model.network).items()}, model


LAYOUTS = [(name, *layout) for name in METHODS for layout in ((2, 4), (4, 2), (8, 1))]


@pytest.mark.parametrize(
    ("name", "replicas", "microbatches"),
    some_of(LAYOUTS, ("disadv", 2, 4), long=[("disadv", 4, 2), ("conadv_tau2", 4, 2), ("paired_predicted", 4, 2)]),
)
def test_replicas_equal_eight_microbatches_of_one(name, replicas, microbatches):
    expected_logs, expected, _ = trained(name, 1, 8)
    logs, weights, model = trained(name, replicas, microbatches)
    # One tolerance for all but a sign that rounding could flip; the seed of the data has none.
    assert_close(weights, expected, 3e-6)
    for ours, theirs in zip(logs, expected_logs, strict=True):
        names = theirs.keys() - {"input_wait_seconds"}
        assert_close({n: ours[n] for n in names}, {n: theirs[n] for n in names}, 3e-6)
    for variable in model.network.variables:
        copies = [copy.numpy() for copy in variable.values]
        assert all(np.array_equal(copy, copies[0]) for copy in copies), variable.name


def test_each_micro_batch_counts_the_same_and_draws_its_own_start():
    """The same rows in every micro-batch: without random starts the update is that of one; with, it is not."""
    images, labels = random_batches(1, ROWS, seed=5)
    weights = []
    for attack in (Attack(random_start_probability=0.0), Attack()):
        for microbatches in (1, 4):
            model = make_model(methods.disadv(attack), lars.LARS(RATE), microbatches=microbatches, run_eagerly=True)
            fit(model, images, labels, 1)
            weights.append({name: v.numpy() for name, v in named_variables(model.network).items()})
    still_one, still_four, started_one, started_four = weights
    assert_close(still_four, still_one, 1e-6)
    name = "block1/conv1/kernel"
    assert np.abs(started_four[name] - started_one[name]).max() > 1e-5


@pytest.mark.long
def test_a_large_batch_is_not_its_micro_batches_because_batch_norm_sees_fewer_rows():
    images, labels = random_batches(4, ROWS, seed=6)
    split = make_model(methods.vanilla(), microbatches=4)
    fit(split, images, labels, 1)
    whole = make_model(methods.vanilla())
    fit(whole, images.reshape(1, 4 * ROWS, 8, 8, 1), labels.reshape(1, -1), 1)
    split, whole = (m.network.stem.norm.moving_variances["main"].numpy() for m in (split, whole))
    assert np.abs(split - whole).max() > 1e-6
    np.testing.assert_allclose(split, whole, rtol=0.1)


@pytest.mark.long
def test_several_updates_in_one_call_equal_one_by_one():
    images, labels = random_batches(8, ROWS, seed=7)
    models = [make_model(methods.conadv(), microbatches=2, steps_per_execution=n) for n in (1, 4)]
    for model in models:
        data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
        model.fit(data, steps_per_epoch=4, verbose=0)
    one_by_one, together = (snapshot(model) for model in models)
    assert_close(together, one_by_one, 1e-6)
    assert models[1].optimizer.iterations == 4


@pytest.mark.long
def test_leftover_micro_batches_do_not_leak_into_the_next_epoch():
    """Five micro-batches of two an update: the fifth is no update, and no part of a later one."""
    images, labels = random_batches(5, ROWS, seed=8)
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    odd, even = (make_model(methods.vanilla(), microbatches=2) for _ in range(2))
    odd.fit(data, steps_per_epoch=3, verbose=0)  # the third update finds one micro-batch
    even.fit(data.take(4), steps_per_epoch=2, verbose=0)
    for model in (odd, even):
        model.fit(data.take(4), steps_per_epoch=2, verbose=0)
    assert odd.optimizer.iterations == even.optimizer.iterations == 4
    odd, even = snapshot(odd), snapshot(even)
    assert_close({n: odd[n] for n in odd if n[:3] == "net"}, {n: even[n] for n in even if n[:3] == "net"}, 1e-6)


def test_no_micro_batches_are_refused():
    with pytest.raises(ConfigError, match="microbatches=0"):
        make_model(methods.vanilla(), microbatches=0)


def test_a_network_without_the_adversarial_branch_is_refused():
    with pytest.raises(ConfigError, match="adversarial"):
        make_model(methods.disadv(), branches=("main",))


@pytest.mark.long
def test_gradients_sent_in_bfloat16_are_rounded_to_it_and_statistics_are_not():
    images, labels = random_batches(2, 2 * ROWS, seed=9)
    runs = []
    for dtype in ("float32", "bfloat16"):
        model = make_model(methods.vanilla(), lars.LARS(RATE), strategy=mirrored(2), all_reduce_dtype=dtype)
        runs.append((fit(model, images, labels, 1)[0], snapshot(model)))
    (exact_logs, exact), (logs, rounded) = runs
    kernels = [name for name in exact if name.startswith("network/") and name.endswith("kernel")]
    assert kernels
    for name in kernels:
        assert not np.array_equal(rounded[name], exact[name])
        assert np.abs(rounded[name] - exact[name]).max() < 2**-7 * np.abs(exact[name]).max()
    same = [name for name in exact if "moving" in name]
    assert_close({name: rounded[name] for name in same}, {name: exact[name] for name in same}, 1e-6)
    assert logs["loss"] == pytest.approx(exact_logs["loss"], rel=1e-6)
