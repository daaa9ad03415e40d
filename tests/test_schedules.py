"""The schedules of docs/method.md: what they compute, against each other and against the formulas."""

import dataclasses

import numpy as np
import pytest
import reference
import tensorflow as tf
import tf_keras
from helpers import (
    assert_close,
    assert_identical,
    draws,
    fit,
    make_model,
    microbatch_seed,
    mirrored,
    random_batches,
    snapshot,
    some_of,
)
from reference import Recipe, Rows, State
from test_update import state_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods import Mixture
from conadv_tf.methods.attack import Attack
from conadv_tf.models import resnet
from conadv_tf.training import lars, trainer

ROWS, UPDATES, RUN_SEED = 4, 8, 5
# Updates that move the weights by a few per cent.
RATE = 1.0
CONCAT = ("main", "augmented", "adversarial")
CARRYING = ("lookahead", "paired", "phased")


def trained(method: methods.Method, images, labels, updates: int = UPDATES, replicas: int = 1, **settings):
    """Logs of every update, and all weights, statistics and momentum after the last."""
    strategy = mirrored(replicas) if replicas > 1 else None
    model = make_model(method, lars.LARS(RATE), strategy=strategy, seed=RUN_SEED, **settings)
    logs = fit(model, images, labels, updates)
    names = logs[0].keys() - {"input_wait_seconds"}
    return [{name: log[name] for name in names} for log in logs], snapshot(model)


def global_batches(count: int, rows: int, seed: int = 4):
    return random_batches(count, rows, seed=seed)


def assert_equal_runs(one, other, tolerance: float, shadows: bool = True) -> None:
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert_close(ours, theirs, tolerance)
    # The metrics of the last update are in the logs; of the shadows a schedule needs its own.
    parts = ("network", "optimizer", "shadow") if shadows else ("network", "optimizer")
    first, second = ({n: v for n, v in run[1].items() if n.startswith(parts)} for run in (one, other))
    assert_close(first, second, tolerance)


@pytest.mark.parametrize("replicas", some_of([1, 2, 4, 8], 1, long=[2]))
def test_lookahead_equals_shadow(replicas):
    images, labels = global_batches(UPDATES + 1, replicas * ROWS)
    shadow = trained(methods.conadv(), images[:-1], labels[:-1], replicas=replicas, run_eagerly=True)
    lookahead = trained(methods.conadv(schedule="lookahead"), images, labels, replicas=replicas)
    assert_equal_runs(lookahead, shadow, 2e-5)


@pytest.mark.long
def test_lookahead_equals_shadow_where_xla_compiles_both():
    """Its first x̂ too: XLA draws other random starts than TensorFlow's own kernels."""
    images, labels = global_batches(5, ROWS)
    shadow = trained(methods.conadv(), images[:-1], labels[:-1], 4, jit_compile=True)
    lookahead = trained(methods.conadv(schedule="lookahead"), images, labels, 4, jit_compile=True)
    assert_equal_runs(lookahead, shadow, 2e-5)


@pytest.mark.long
def test_lookahead_equals_shadow_with_micro_batches_concat3_and_a_fraction():
    images, labels = global_batches(2 * (UPDATES + 1), ROWS)
    others, _ = global_batches(len(images), ROWS, seed=9)
    both = np.stack([images, others], axis=2)
    mixture = Mixture(weight=1 / 3, fraction=0.5, augmented=True)
    runs = [
        trained(methods.conadv(mixture=mixture, schedule=schedule), both, labels, microbatches=2, branches=CONCAT)
        for schedule in ("lookahead", "shadow")
    ]
    assert_equal_runs(*runs, 2e-5)


def by_turns(images, labels, replicas: int):
    """Batches of `paired` over replicas / 2 as `phased` takes them: two become one, its even places the first's."""
    half = replicas // 2
    images = images.reshape(len(images) // 2, 2, half, ROWS, *images.shape[2:])
    labels = labels.reshape(len(labels) // 2, 2, half, ROWS)
    return (
        np.moveaxis(images, 1, 2).reshape(len(images), replicas * ROWS, *images.shape[4:]),
        np.moveaxis(labels, 1, 2).reshape(len(labels), replicas * ROWS),
    )


@pytest.mark.parametrize(
    ("replicas", "label"),
    some_of([(2, "smoothed"), (2, "auto"), (4, "smoothed"), (8, "auto")], (2, "smoothed"), long=[(2, "auto")]),
)
def test_phased_equals_paired_on_half_the_replicas(replicas, label):
    images, labels = global_batches(UPDATES, replicas // 2 * ROWS)
    paired, phased = (methods.conadv(Attack(label=label), schedule=schedule) for schedule in ("paired", "phased"))
    expected = trained(paired, images, labels, replicas=replicas // 2, run_eagerly=True)
    assert_equal_runs(trained(phased, *by_turns(images, labels, replicas), replicas=replicas), expected, 2e-5)


@pytest.mark.long
def test_phased_equals_paired_with_targets():
    """Of two classes one is wrong, whatever is drawn: each place of the batch draws for itself."""
    images, labels = global_batches(UPDATES, ROWS)
    attack = Attack(goal="random_target")
    paired, phased = (methods.conadv(attack, schedule=schedule) for schedule in ("paired", "phased"))
    expected = trained(paired, images, labels % 2, classes=2)
    turns = by_turns(images, labels % 2, 2)
    assert_equal_runs(trained(phased, *turns, replicas=2, classes=2), expected, 2e-5)


@pytest.mark.long
def test_phased_takes_turns_over_micro_batches_too():
    """One replica with four micro-batches is a pod of four."""
    images, labels = global_batches(UPDATES, 2 * ROWS)
    pod = by_turns(images, labels, 4)
    one = [part.reshape(2 * UPDATES, ROWS, *part.shape[2:]) for part in pod]
    expected = trained(methods.conadv(schedule="phased"), *pod, replicas=4)
    assert_equal_runs(trained(methods.conadv(schedule="phased"), *one, microbatches=4), expected, 2e-5)


# Attacks that `paired` makes from its clean pass, and what the reference calls them; the first shares a gradient.
AIMS = {
    "untargeted": ({"label": "smoothed"}, {"smoothed": True}),
    "hard": ({"label": "hard"}, {}),
    "predicted": ({"label": "predicted"}, {"predicted": True}),
    "random_target": ({"goal": "random_target"}, {"descend": True}),
}


@pytest.mark.parametrize(
    ("aim", "replicas", "weight", "fraction"),
    [
        ("untargeted", 1, 0.5, 1.0),
        ("untargeted", 2, 0.3, 0.5),
        ("predicted", 2, 0.3, 0.5),
        pytest.param("random_target", 2, 0.3, 0.5, marks=pytest.mark.long),
        pytest.param("hard", 1, 0.5, 1.0, marks=pytest.mark.long),
        pytest.param("untargeted", 2, 0.5, 1.0, marks=pytest.mark.long),
        pytest.param("untargeted", 1, 0.3, 0.5, marks=pytest.mark.long),
    ],
)
def test_paired_equals_the_formulas(aim, replicas, weight, fraction):
    """Independent float64: clean B_t at θ_t; x̂ of B_{t−1} by one step from its clean images at θ_{t−1}."""
    settings, form = AIMS[aim]
    updates, recipe = 4, Recipe(**form, weight=weight, fraction=fraction, momentum=0.9)
    images, labels = global_batches(updates, replicas * ROWS, seed=7)
    method = methods.conadv(Attack(**settings), Mixture(weight=weight, fraction=fraction), "paired")
    strategy = mirrored(replicas) if replicas > 1 else None
    model = make_model(method, lars.LARS(2.0), strategy=strategy, seed=RUN_SEED, run_eagerly=replicas > 1)
    model.create_optimizer_variables()
    states = [state_of(model)]
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    logs = []

    def keep(epoch, values):
        states.append(state_of(model))
        logs.append(values)

    keeper = tf_keras.callbacks.LambdaCallback(on_epoch_end=keep)
    model.fit(data, steps_per_epoch=1, epochs=updates, verbose=0, callbacks=[keeper])
    velocity = states[0].velocity
    for step in range(updates):
        before = dataclasses.replace(states[step], velocity=velocity)
        expected, expected_logs = paired_update(
            recipe, before, states[max(step - 1, 0)], images, labels, step, replicas
        )
        assert_close(states[step + 1].weights, expected.weights, 1e-5)
        assert_close(states[step + 1].moving, expected.moving, 1e-5)
        assert_close({name: logs[step][name] for name in expected_logs}, expected_logs, 1e-5)
        velocity = expected.velocity


def paired_update(recipe: Recipe, state: State, stale: State, images, labels, step: int, replicas: int):
    """θ_{t+1} and the logs of update `step`, means over the replicas; see the caller."""
    w, parts = recipe.weight, []
    for replica in range(replicas):
        own = slice(replica * ROWS, (replica + 1) * ROWS)
        loss, gradient, statistics, top1 = reference.training_pass(
            recipe, state.weights, images[step, own], labels[step, own], "main"
        )
        logs = {"loss": (1 - w) * loss, "clean_loss": loss, "clean_top1": top1}
        logs |= {"adversarial_loss": 0.0, "adversarial_top1": 0.0}
        gradient = {name: (1 - w) * value for name, value in gradient.items()}
        if step:
            rows = slice(own.start, own.start + round(recipe.fraction * ROWS))
            whole = images[step - 1, own]
            aims = labels[step - 1, own]
            if recipe.descend:
                seed = microbatch_seed(RUN_SEED, step - 1, replica)
                _, aims = draws(Attack(goal="random_target"), whole.shape, aims, seed)
            clean = Rows(whole, labels[step - 1, own], np.zeros(whole.shape), aims)
            made, margin = reference.attack(recipe, stale, clean)
            assert margin > 5e-6, "choose another seed for the data: a sign is uncertain"
            other_loss, other, other_statistics, other_top1 = reference.training_pass(
                recipe, state.weights, made[: rows.stop - rows.start], labels[step - 1, rows], "adversarial"
            )
            gradient = {name: gradient[name] + w * other[name] for name in gradient}
            logs |= {"adversarial_loss": other_loss, "adversarial_top1": other_top1}
            logs["loss"] += w * other_loss
            statistics |= other_statistics
        parts.append((gradient, statistics, logs))
    gradient, statistics, logs = (
        {name: np.mean([part[kind][name] for part in parts], axis=0) for name in parts[0][kind]} for kind in range(3)
    )
    weights, velocity = reference.lars(recipe, state.weights, gradient, state.velocity, 2.0)
    moving = dict(state.moving)
    for name, value in statistics.items():
        moving[name] = 0.9 * moving[name] + 0.1 * value
    return State(weights, moving, velocity), logs


@pytest.mark.long
def test_lookahead_equals_the_formulas():
    updates, recipe = 3, Recipe(tau=1)
    images, labels = global_batches(updates + 1, 6, seed=3)
    model = make_model(methods.conadv(schedule="lookahead"), lars.LARS(2.0), seed=RUN_SEED)
    model.create_optimizer_variables()
    states, logs = [state_of(model)], []

    def keep(epoch, values):
        states.append(state_of(model))
        logs.append(values)

    keeper = tf_keras.callbacks.LambdaCallback(on_epoch_end=keep)
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    model.fit(data, steps_per_epoch=1, epochs=updates, verbose=0, callbacks=[keeper])
    velocity = states[0].velocity
    for step in range(updates):
        start, _ = draws(Attack(), images[step].shape, labels[step], microbatch_seed(RUN_SEED, step, 0))
        rows = Rows(images[step], labels[step], start, labels[step])
        before = dataclasses.replace(states[step], velocity=velocity)
        expected, expected_logs, margin = reference.update(recipe, before, states[max(step - 1, 0)], [rows], 2.0)
        assert margin > 5e-6, "choose another seed for the data: a sign is uncertain"
        assert_close(states[step + 1].weights, expected.weights, 1e-5)
        assert_close(states[step + 1].moving, expected.moving, 1e-5)
        assert_close({name: logs[step][name] for name in expected_logs}, expected_logs, 1e-5)
        velocity = expected.velocity


@pytest.mark.parametrize("schedule", some_of(CARRYING, "paired"))
def test_without_a_perturbation_it_trains_like_clean_images_through_both_branches(schedule):
    """ε = 0: the adversarial half is a clean batch, this update's or the one before."""
    images, labels = global_batches(6, ROWS)
    attack = Attack(epsilon_pixels=0.0, random_start_probability=0.0)
    seen = trained(methods.conadv(attack, schedule=schedule), images, labels, updates=2, microbatches=2)[0]
    if schedule == "lookahead":
        still = trained(methods.conadv(attack), images, labels, updates=2, microbatches=2)[0]
        for ours, theirs in zip(seen, still, strict=True):
            assert_close(ours, theirs, 1e-6)
        return
    assert seen[0]["adversarial_loss"] == 0
    assert seen[0]["loss"] == pytest.approx(0.5 * seen[0]["clean_loss"])
    assert seen[1]["adversarial_loss"] > 0
    assert seen[1]["loss"] == pytest.approx(0.5 * (seen[1]["clean_loss"] + seen[1]["adversarial_loss"]), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("schedule", some_of(CARRYING, "phased"))
def test_a_carry_goes_on_over_epochs_and_fits(schedule):
    """One fit of three epochs, and three fits of one, are the same updates."""
    images, labels = global_batches(40, ROWS)
    method = methods.conadv(schedule=schedule)
    whole, parts = (make_model(method, lars.LARS(RATE), microbatches=2) for _ in range(2))
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    whole.fit(data, epochs=3, steps_per_epoch=3, verbose=0)
    iterator = iter(data)  # one iterator, as a distributed data set would be
    train = parts.make_train_function()
    for _ in range(9):
        train(iterator)
    assert_identical(
        {n: v for n, v in snapshot(parts).items() if "metrics" not in n},
        {n: v for n, v in snapshot(whole).items() if "metrics" not in n},
    )


@pytest.mark.long
@pytest.mark.parametrize("schedule", some_of(CARRYING, "phased"))
def test_the_whole_update_is_an_xla_program(schedule):
    """What a TPU compiles, carry included, in bfloat16."""
    model = make_model(methods.conadv(schedule=schedule), microbatches=2, network={"dtype": "mixed_bfloat16"})
    model.create_optimizer_variables()
    (images,), (labels,) = random_batches(1, 8)
    model.create_carry(tf.TensorSpec(images.shape, tf.uint8))
    update = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    for _ in range(3):
        update(images, labels)
    assert model.updates_made() == 3
    assert all(np.isfinite(value).all() for value in snapshot(model).values())


def test_whole_pixels_are_carried_as_bytes_and_others_as_they_are():
    spec = tf.TensorSpec((8, 4, 4, 3), tf.uint8)

    def dtype(spec=spec, **attack):
        return methods.conadv(Attack(**attack), schedule="paired").carried(spec)["adversarial"].dtype

    assert dtype(epsilon_pixels=3.0) == tf.uint8
    assert dtype(epsilon_pixels=4.0, step_size_pixels=2.0) == tf.uint8
    assert dtype(epsilon_pixels=4.0, step_size_pixels=5.5) == tf.uint8  # projected to 4
    assert dtype(epsilon_pixels=2.5) == tf.float32
    assert dtype(epsilon_pixels=4.0, step_size_pixels=1.5) == tf.float32
    assert dtype(norm="l2") == tf.float32
    assert dtype(tf.TensorSpec((8, 4, 4, 3), tf.float32)) == tf.float32
    for attack, expected in ((Attack(), tf.float32), (Attack(random_start_probability=0.0), tf.uint8)):
        lookahead = methods.conadv(attack, schedule="lookahead").carried(spec)
        assert (lookahead["images"].dtype, lookahead["adversarial"].dtype) == (tf.uint8, expected)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param({"epsilon_pixels": 3.0, "step_size_pixels": 2.0}, marks=pytest.mark.long),
        pytest.param({"epsilon_pixels": 2.5}, marks=pytest.mark.long),
        pytest.param({"norm": "l2"}, marks=pytest.mark.long),
    ],
)
def test_bytes_and_floats_train_alike(attack):
    """Images fed as float32 are carried as float32: the same run as from bytes."""
    images, labels = global_batches(6, ROWS)
    method = methods.conadv(Attack(**attack), schedule="paired")
    runs = [trained(method, fed, labels, updates=6)[1] for fed in (images, images.astype(np.float32))]
    assert_identical(*runs)


def test_costs_are_those_of_the_specification():
    units = {schedule: methods.conadv(schedule=schedule).forward_units for schedule in methods.schedules_of("conadv")}
    assert units == {"shadow": 8, "lookahead": 8, "paired": 7, "phased": 4}
    for settings, expected in (
        ({"label": "smoothed"}, [6, 3]),
        ({"label": "predicted"}, [7, 4]),
        ({"label": "hard"}, [7, 4]),
        ({"goal": "random_target"}, [7, 4]),
    ):
        within = [methods.conadv(Attack(**settings), schedule=schedule) for schedule in ("paired", "phased")]
        assert [method.forward_units for method in within] == expected, settings


def test_a_label_that_a_recipe_does_not_name_never_leaks_within_the_clean_pass():
    labels = {name: methods.conadv(schedule=name).attack.label for name in methods.schedules_of("conadv")}
    assert labels == {"shadow": "hard", "lookahead": "hard", "paired": "predicted", "phased": "predicted"}
    target = Attack(goal="random_target")
    assert {methods.conadv(target, schedule=name).attack.label for name in labels} == {"hard"}
    assert methods.conadv(Attack(label="smoothed"), schedule="paired").attack.label == "smoothed"


@pytest.mark.parametrize("schedule", ["paired", "phased"])
@pytest.mark.parametrize(
    "attack",
    [
        {"random_start_probability": 1.0},
        {"steps": 2},
        {"batch_norm": "moving"},
        {"compute_dtype": "bfloat16"},
    ],
    ids=lambda attack: next(iter(attack)),
)
def test_attacks_that_need_another_pass_are_refused(schedule, attack):
    (name, value), *_ = attack.items()
    with pytest.raises(ConfigError, match=rf"attack\.{name}={value!r}.*{schedule}.*set it to"):
        methods.conadv(Attack(**attack), schedule=schedule)


@pytest.mark.parametrize("schedule", ["lookahead", "paired", "phased"])
def test_another_delay_than_one_is_refused(schedule):
    with pytest.raises(ConfigError, match=rf"conadv.tau=2.*{schedule}.*tau=1"):
        methods.conadv(schedule=schedule, tau=2)


@pytest.mark.parametrize(
    ("mixture", "named"),
    [({"fraction": 0.5}, "fraction=0.5"), ({"start_epoch": 1}, "start_epoch=1"), ({"augmented": True}, "concat3")],
)
def test_unequal_work_is_refused_by_turns(mixture, named):
    with pytest.raises(ConfigError, match=rf"{named}.*phased"):
        methods.conadv(mixture=Mixture(**mixture), schedule="phased")


def test_turns_need_an_even_number_of_places_and_own_batch_statistics():
    images, labels = random_batches(2, ROWS)
    with pytest.raises(ConfigError, match="1 replicas × 1 micro-batches"):
        fit(make_model(methods.conadv(schedule="phased")), images, labels, 1)
    with pytest.raises(ConfigError, match="replicas_per_group=1, not 2"):
        make_model(methods.conadv(schedule="phased"), strategy=mirrored(2), network={"replicas_per_group": 2})


def test_batches_of_unknown_size_are_refused():
    images, labels = random_batches(4, 1)
    data = tf.data.Dataset.from_tensor_slices((images[:, 0], labels[:, 0])).batch(2)
    with pytest.raises(ConfigError, match="drop_remainder"):
        make_model(methods.conadv(schedule="paired")).fit(data, verbose=0)


@pytest.mark.parametrize("schedule", ["lookahead", "paired"])
def test_batches_of_another_size_or_dtype_begin_a_carry_of_their_own(schedule):
    """As a second `fit` may have. Seen to fail: "Dimension 0 in both shapes must be equal", and floats as bytes."""
    images, labels = random_batches(3, ROWS)
    model, other = (make_model(methods.conadv(schedule=schedule), "sgd") for _ in range(2))
    fit(model, images, labels, 1)
    other.set_weights(model.get_weights())
    other.create_optimizer_variables()
    other.optimizer.iterations.assign(model.optimizer.iterations)
    halves = (images[:, : ROWS // 2] * np.float32(0.9), labels[:, : ROWS // 2])
    first, second = fit(model, *halves, 2, initial=1), fit(other, *halves, 2, initial=1)
    for ours, theirs in zip(first, second, strict=True):
        assert ours["adversarial_loss"] == pytest.approx(theirs["adversarial_loss"], rel=1e-5)
    assert {spec.dtype for name, spec in model.carry.specs.items() if name == "images"} <= {tf.float32}
    unknown = tf.data.Dataset.from_tensor_slices((images[0], labels[0])).batch(4).repeat()
    with pytest.raises(ConfigError, match="drop_remainder"):
        model.fit(unknown, steps_per_epoch=1, verbose=0)


def test_a_carry_of_phased_that_begins_between_two_turns_has_a_batch():
    """As in a second `fit`, or of a loaded model. Seen to fail: half of the replicas trained on black images."""
    images, labels = random_batches(2, ROWS)
    model = make_model(methods.conadv(schedule="phased"), "sgd", strategy=mirrored(2))
    fit(model, images, labels, 1)
    fit(model, images[:, :2], labels[:, :2], 1, initial=1)
    parts = model.distribute_strategy.experimental_local_results(model.carry.variables["images"])
    np.testing.assert_array_equal(np.concatenate([part.numpy()[0] for part in parts]), images[0, :2])


@pytest.mark.parametrize("schedule", ["lookahead", "phased"])
def test_data_that_end_are_refused_where_an_update_is_not_a_batch(schedule):
    images, labels = random_batches(4, 2)
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    with pytest.raises(ConfigError, match=r"pass steps_per_epoch, .* and data.repeat\(\)"):
        make_model(methods.conadv(schedule=schedule)).fit(data, epochs=3, verbose=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"metrics": ["accuracy"]}, "metrics=.*no metrics; logs have"),
        ({"loss": "mse"}, "loss='mse'.*pass a loss object"),
    ],
)
def test_what_compile_would_ignore_or_stumble_over_is_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        make_model(methods.vanilla()).compile(lars.LARS(2.0), **arguments)


@pytest.mark.long
def test_imagenet_schedules_are_lowered_whole_for_a_core():
    """ResNet-50 on 64 images of 224 × 224 in bfloat16, images carried between updates: no call out of XLA."""
    method = methods.conadv(schedule="phased")
    network = resnet.ResNet("resnet50", 1000, (224, 224, 3), method.branches, dtype="mixed_bfloat16")
    model = trainer.ConAdvModel(network, method, microbatches=2)
    model.compile(lars.LARS(1.0))
    model.create_optimizer_variables()
    model.create_carry(tf.TensorSpec((64, 224, 224, 3), tf.uint8))
    update = tf.function(lambda: model.train_step(None), jit_compile=True, autograph=False)
    program = update.experimental_get_compiler_ir()(stage="hlo")
    assert "u8[2,64,224,224,3]" in program
    assert program.count(" convolution(") >= 3 * 53


@pytest.mark.parametrize(
    ("schedule", "microbatches"), [("phased", 1), ("lookahead", 1), ("shadow", 2)], ids=["phased", "lookahead", "two"]
)
def test_one_batch_is_refused_where_an_update_is_not_a_batch(schedule, microbatches):
    """Seen to fail: `phased` read every other batch, the others ended with several lines of TensorFlow's."""
    strategy = mirrored(2) if schedule == "phased" else None
    [images], [labels] = random_batches(1, 4)
    model = make_model(methods.conadv(schedule=schedule), strategy=strategy, microbatches=microbatches)
    said = rf"^train_on_batch: with conadv.schedule='{schedule}' and {microbatches} micro-batches an update is not one "
    with pytest.raises(ConfigError, match=said + r"batch: use fit\(data.repeat\(\), steps_per_epoch=N\)$"):
        model.train_on_batch(images, labels)
    assert model.updates_made() == 0
