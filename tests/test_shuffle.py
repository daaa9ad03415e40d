"""`adversarial.shuffle`: x̂ move between the micro-batches of a replica, with their labels, and nothing else changes."""

import numpy as np
import pytest
import reference
import tensorflow as tf
from helpers import assert_close, assert_identical, fit, make_model, mirrored, random_batches, snapshot
from reference import Recipe, Rows, State
from test_update import state_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods import Attack, Mixture
from conadv_tf.training import lars
from conadv_tf.training.replica_state import CarryVariables

ROWS, COUNT, RATE, UPDATES = 4, 3, 2.0, 5
SHUFFLED = Mixture(shuffle=True)


def test_paired_equals_the_formulas():
    """Row r of micro-batch m trains on what micro-batch m + r (mod 3) crafted an update before, or m − r, by turns."""
    recipe = Recipe(smoothed=True)
    images, labels = random_batches(UPDATES * COUNT, ROWS, seed=7)
    method = methods.conadv(Attack(label="smoothed"), SHUFFLED, "paired")
    model = make_model(method, lars.LARS(RATE), microbatches=COUNT)
    model.create_optimizer_variables()
    states, iterator = [state_of(model)], iter(tf.data.Dataset.from_tensor_slices((images, labels)))
    train = model.make_train_function()
    made: list[np.ndarray] = []
    for step in range(UPDATES):
        train(iterator)
        state, parts = states[-1], []
        for m in range(COUNT):
            batch = step * COUNT + m
            _, gradient, statistics, _ = reference.training_pass(
                recipe, state.weights, images[batch], labels[batch], "main"
            )
            gradient = {name: 0.5 * value for name, value in gradient.items()}
            if step:
                sign = 1 if step % 2 else -1
                sources = [(m + sign * row) % COUNT for row in range(ROWS)]
                mixed = np.stack([made[source][row] for row, source in enumerate(sources)])
                aims = np.stack(
                    [labels[(step - 1) * COUNT + source][row] for row, source in enumerate(sources)],
                )
                _, other, more, _ = reference.training_pass(recipe, state.weights, mixed, aims, "adversarial")
                gradient = {name: value + 0.5 * other[name] for name, value in gradient.items()}
                statistics |= more
            parts.append((gradient, statistics))
        crafted = []
        for m in range(COUNT):
            batch = images[step * COUNT + m], labels[step * COUNT + m]
            x, margin = reference.attack(recipe, state, Rows(*batch, np.zeros(batch[0].shape), batch[1]))
            assert margin > 5e-6, "choose another seed for the data: a sign is uncertain"
            crafted.append(x)
        made = crafted
        gradient, statistics = (
            {name: np.mean([part[kind][name] for part in parts], axis=0) for name in parts[0][kind]}
            for kind in range(2)
        )
        weights, velocity = reference.lars(recipe, state.weights, gradient, state.velocity, RATE)
        moving = {name: 0.9 * old + 0.1 * statistics.get(name, old) for name, old in state.moving.items()}
        states.append(State(weights, moving, velocity))
        actual = state_of(model)
        assert_close(actual.weights, weights, 1e-5)
        assert_close(actual.moving, moving, 1e-5)


@pytest.mark.parametrize(("count", "stride"), [(2, 1), (3, 1), (5, 1), (4, 2), (6, 2)])
def test_every_row_comes_back_once_and_from_another_micro_batch(count, stride):
    """With stride 2 micro-batches of one parity write while the others read, as in `phased` on one replica."""
    rows, places = 6, range(count)
    spec = {"adversarial": tf.TensorSpec((rows,), tf.int32), "images": tf.TensorSpec((rows,), tf.int32)}
    carry = CarryVariables(spec, count, ("adversarial",), stride)
    for update in range(4):
        turn = [m for m in places if stride == 1 or (update + m) % 2 == 0]
        for m in turn:
            ids = tf.constant([[100 * m + r] for r in range(rows)])[:, 0]
            carry.write(tf.constant(m), tf.constant(update), {"adversarial": ids, "images": ids})
        read = {m: carry.read(tf.constant(m), tf.constant(update + 1)) for m in turn}
        seen = np.concatenate([value["adversarial"].numpy() for value in read.values()])
        assert sorted(seen) == sorted(100 * m + r for m in turn for r in range(rows))
        for m, value in read.items():
            assert (value["images"].numpy() // 100 == m).all()
            assert len(set(value["adversarial"].numpy() // 100)) == min(rows, len(turn))


def trained(method, images, labels, **settings):
    model = make_model(method, lars.LARS(RATE), **settings)
    logs = fit(model, images, labels, 4)
    names = logs[0].keys() - {"input_wait_seconds"}
    return [{name: log[name] for name in names} for log in logs], snapshot(model)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["lookahead", "phased"])
def test_other_schedules_train_on_every_adversarial_example_once(schedule):
    """The same clean losses, and adversarial ones that are a little off: as many x̂, in other batches."""
    images, labels = random_batches(24, ROWS)
    attack = Attack(random_start_probability=0.0)
    plain, mixed = (
        trained(methods.conadv(attack, Mixture(shuffle=shuffle), schedule), images, labels, microbatches=4)[0]
        for shuffle in (False, True)
    )
    assert plain[0]["clean_loss"] == mixed[0]["clean_loss"]
    seen = [(a["adversarial_loss"], b["adversarial_loss"]) for a, b in zip(plain, mixed, strict=True)]
    assert any(one != other for one, other in seen)  # statistics of other batches
    np.testing.assert_allclose(*np.transpose(seen), rtol=0.2)


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["lookahead", "paired", "phased"])
def test_resuming_is_exact(schedule):
    images, labels = random_batches(40, ROWS)
    method = methods.conadv(mixture=SHUFFLED, schedule=schedule)
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    whole = make_model(method, lars.LARS(RATE), microbatches=4)
    whole.fit(data, steps_per_epoch=5, verbose=0)
    for stop in (2, 3):
        parts, later = (make_model(method, lars.LARS(RATE), microbatches=4) for _ in range(2))
        parts.fit(data, steps_per_epoch=stop, verbose=0)
        later.create_optimizer_variables()
        later.set_weights(parts.get_weights())
        for new, old in zip(later.optimizer.variables(), parts.optimizer.variables(), strict=True):
            new.assign(old)
        later.resume_at(stop)
        later.fit(data.skip(method.batches_before(stop) * 4), steps_per_epoch=5 - stop, verbose=0)
        pair = [{n: v for n, v in snapshot(m).items() if "metrics" not in n} for m in (whole, later)]
        assert_identical(*pair)


@pytest.mark.long
def test_under_xla_it_is_the_same():
    images, labels = random_batches(12, ROWS)
    method = methods.conadv(mixture=SHUFFLED, schedule="paired")
    plain, compiled = (trained(method, images, labels, microbatches=3, jit_compile=jit)[1] for jit in (False, True))
    assert_close(*({n: v for n, v in run.items() if n.startswith("network")} for run in (compiled, plain)), 1e-4)


@pytest.mark.long
def test_replicas_mix_their_own():
    """Two replicas of three micro-batches: what each carries is what a run of its own would carry."""
    images, labels = random_batches(12, 2 * ROWS)
    method = methods.conadv(mixture=SHUFFLED, schedule="paired")
    logs, _ = trained(method, images, labels, microbatches=3, strategy=mirrored(2))
    assert np.isfinite(logs[-1]["adversarial_loss"])
    assert logs[-1]["adversarial_loss"] > 0


def test_what_has_nothing_to_mix_is_refused():
    images, labels = random_batches(4, ROWS)
    with pytest.raises(ConfigError, match=r"adversarial.shuffle=True with conadv.schedule='shadow'.*'lookahead'"):
        methods.conadv(mixture=SHUFFLED)
    with pytest.raises(ConfigError, match=r"at least 2 micro-batches of a replica, which has 1"):
        fit(make_model(methods.conadv(mixture=SHUFFLED, schedule="paired")), images, labels, 1)
    with pytest.raises(ConfigError, match=r"at least 4 micro-batches of a replica, which has 2"):
        fit(make_model(methods.conadv(mixture=SHUFFLED, schedule="phased"), microbatches=2), images, labels, 1)
