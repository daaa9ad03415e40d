"""The compiled update: how often it is traced, start_epoch, XLA and bfloat16."""

import dataclasses
import re

import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    assert_close,
    assert_identical,
    fit,
    make_model,
    mirrored,
    named_variables,
    random_batches,
    snapshot,
    some_of,
)

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.models import resnet
from conadv_tf.training import lars, trainer

STILL = Attack(random_start_probability=0.0)


@pytest.fixture
def traces(monkeypatch) -> dict[str, int]:
    """How often the gradients of a method were traced, by method name, for methods made by `counted`."""
    counts = {"vanilla": 0, "conadv": 0}

    def counting(name, gradients):
        def traced(*arguments):
            counts[name] += 1
            return gradients(*arguments)

        return traced

    for name, kind in (("vanilla", "vanilla"), ("conadv", "shadow")):
        record = methods.SCHEDULES[kind]
        make = lambda *given, name=name, record=record: counting(name, record.gradients(*given))  # noqa: E731
        monkeypatch.setitem(methods.SCHEDULES, kind, dataclasses.replace(record, gradients=make))
    return counts


def batches(updates: int):
    return random_batches(updates, 6, seed=3)


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.long)])
def test_fifty_updates_are_traced_once(traces, microbatches):
    model = make_model(methods.conadv(tau=2), microbatches=microbatches)
    images, labels = batches(4)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
    model.fit(data, steps_per_epoch=10, epochs=5, verbose=0)
    assert traces == {"vanilla": 0, "conadv": 1}
    assert model.optimizer.iterations == 50


@pytest.mark.long
def test_updates_on_replicas_are_traced_once_for_each(traces):
    model = make_model(methods.conadv(), strategy=mirrored(2))
    images, labels = batches(2)
    fit(model, images, labels, 4)
    fit(model, images, labels, 4, initial=4)
    assert traces["conadv"] == 2


@pytest.mark.long
def test_a_start_epoch_makes_two_programs_and_runs_vanilla_before(traces):
    model = make_model(methods.conadv(mixture=methods.Mixture(start_epoch=2)))
    images, labels = batches(4)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
    model.fit(data, steps_per_epoch=5, epochs=2, verbose=0)
    assert traces == {"vanilla": 1, "conadv": 0}
    model.fit(data, steps_per_epoch=5, epochs=6, initial_epoch=2, verbose=0)
    model.fit(data, steps_per_epoch=5, epochs=1, verbose=0)  # back to the start
    assert traces == {"vanilla": 1, "conadv": 1}


@pytest.mark.long
def test_several_updates_in_one_call_are_traced_once(traces):
    model = make_model(methods.conadv(), steps_per_execution=5)
    images, labels = batches(4)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
    model.fit(data, steps_per_epoch=25, epochs=2, verbose=0)
    assert traces["conadv"] == 1
    assert model.optimizer.iterations == 50


def test_before_its_start_epoch_an_update_is_the_vanilla_update_bit_for_bit():
    images, labels = batches(4)
    late = methods.conadv(mixture=methods.Mixture(start_epoch=3))
    model, vanilla = make_model(late), make_model(methods.vanilla())
    bare = make_model(methods.vanilla(), branches=("main",), trained=False, run_eagerly=True)
    bare_late = make_model(late, trained=False, run_eagerly=True)
    for other in (model, bare, bare_late):
        logs = fit(other, images, labels, 3)
        assert logs[-1]["loss"] == logs[-1]["clean_loss"]
    fit(vanilla, images, labels, 2)
    after_two = network_of(vanilla)
    fit(vanilla, images[2:], labels[2:], 1, initial=2)
    assert_identical(network_of(model), network_of(vanilla))
    alone = network_of(bare)
    assert_identical({name: value for name, value in network_of(bare_late).items() if name in alone}, alone)
    # From then on it is adversarial, with a ring of weights that the vanilla updates kept up to date.
    before = network_of(model)
    assert_identical(  # θ_2 is two updates of the vanilla run
        {n: v.numpy() for n, v in named_variables(model.shadows[0]).items()},
        after_two,
    )
    [log] = fit(model, images, labels, 1, initial=3)
    assert log["loss"] != log["clean_loss"]
    name = "stem/adversarial/gamma"
    assert not np.array_equal(network_of(model)[name], before[name])


def network_of(model) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in named_variables(model.network).items()}


def losses(updates: int = 10, **settings) -> np.ndarray:
    network = {"dtype": settings.pop("dtype", "float32")}
    model = make_model(methods.conadv(STILL), lars.LARS(4.0), network=network, **settings)
    images, labels = random_batches(2, 16, seed=3)
    logs = fit(model, images, labels, updates)
    return np.array([log["loss"] for log in logs])


@pytest.fixture(scope="module")
def float32_losses() -> np.ndarray:
    curve = losses()
    assert curve[-2:].mean() < 0.9 * curve[:2].mean()
    return curve


@pytest.mark.long
def test_xla_gives_the_same_loss_curve(float32_losses):
    np.testing.assert_allclose(losses(jit_compile=True), float32_losses, rtol=2e-3)


@pytest.mark.long
def test_bfloat16_gives_nearly_the_same_loss_curve(float32_losses):
    curve = losses(dtype="mixed_bfloat16")
    assert np.isfinite(curve).all()
    assert not np.array_equal(curve, float32_losses)
    np.testing.assert_allclose(curve, float32_losses, rtol=0.05)


@pytest.mark.long
def test_xla_with_bfloat16_micro_batches_and_delay_trains():
    curve = losses(updates=4, dtype="mixed_bfloat16", jit_compile=True, microbatches=2)
    assert np.isfinite(curve).all()


@pytest.mark.long
def test_a_run_is_reproduced_bit_for_bit_and_another_seed_is_another_run():
    images, labels = batches(3)
    runs = []
    for seed in (1, 1, 2):
        model = make_model(methods.conadv(), seed=seed)
        fit(model, images, labels, 3)
        runs.append(snapshot(model))
    assert_identical(runs[0], runs[1])
    assert any(not np.array_equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.long
def test_random_starts_differ_between_updates_and_between_micro_batches():
    images, labels = random_batches(1, 6)
    seen = []

    def spy(network, stale, loss, batch, carry):
        tf.py_function(lambda seed: seen.append(tuple(seed.numpy())), [batch.seed], [])
        return methods.vanilla().gradients(network, stale, loss, batch, carry)

    record = dataclasses.replace(methods.SCHEDULES["vanilla"], gradients=lambda: spy)
    method = dataclasses.replace(methods.vanilla(), record=record)
    model = make_model(method, microbatches=3)
    fit(model, images, labels, 4)
    assert len(seen) == len(set(seen)) == 12


def test_logs_describe_the_update():
    model = make_model(methods.conadv(), lars.LARS(2.0, weight_decay=0.0), run_eagerly=True)
    images, labels = batches(1)
    before = network_of(model)
    [log] = fit(model, images, labels, 1)
    assert log["learning_rate"] == 2.0
    assert log["drift"] == 0.0
    assert log["input_wait_seconds"] >= 0
    # v = lr λ g at the first update, so ‖g‖ and λ follow from the momentum slots.
    gradients = {}
    for name, variable in named_variables(model.network).items():
        if "/moving_" not in name:
            velocity = np.float64(model.optimizer.get_slot(variable, "momentum").numpy())
            weight_norm = np.linalg.norm(before[name])
            # ‖v‖ = lr · η ‖w‖ for adapted variables: λ = lr·η‖w‖ / (lr ‖g‖).
            gradients[name] = (velocity, weight_norm)
    for name, (velocity, weight_norm) in gradients.items():
        if name.endswith("kernel"):
            np.testing.assert_allclose(np.linalg.norm(velocity), 2.0 * 0.001 * weight_norm, rtol=1e-4)
    low, middle, high = (log[f"trust_ratio_{which}"] for which in ("min", "median", "max"))
    assert 0 < low < middle < high
    weighted = 0.5 * (log["clean_loss"] + log["adversarial_loss"])
    np.testing.assert_allclose(log["loss"], weighted, rtol=1e-6)


def test_trust_ratios_and_gradient_norm_are_those_of_the_update():
    images, labels = batches(1)
    sgd = make_model(methods.disadv(), lars.make_sgd(1.0, momentum=0.0, weight_decay=0.0), run_eagerly=True)
    before = network_of(sgd)
    [plain] = fit(sgd, images, labels, 1)
    trained = {name for name in before if "/moving_" not in name}
    gradient = {name: np.float64(before[name]) - network_of(sgd)[name] for name in trained}
    total = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(plain["gradient_norm"], total, rtol=1e-4)
    ratios = sorted(
        0.001 * np.linalg.norm(before[n]) / (np.linalg.norm(gradient[n]) + 5e-4 * np.linalg.norm(before[n]))
        for n in trained
        if n.endswith("kernel")
    )
    [log] = fit(make_model(methods.disadv(), lars.LARS(1.0), run_eagerly=True), images, labels, 1)
    logged = [log[f"trust_ratio_{which}"] for which in ("min", "median", "max")]
    np.testing.assert_allclose(logged, [ratios[0], np.median(ratios), ratios[-1]], rtol=1e-3)


@pytest.mark.long
def test_a_late_half_logs_zeros_until_it_begins():
    model = make_model(methods.conadv(mixture=methods.Mixture(start_epoch=1)))
    images, labels = batches(2)
    first, second = fit(model, images, labels, 2)
    assert first.keys() == second.keys()
    assert first["adversarial_loss"] == 0.0
    assert second["adversarial_loss"] > 0.0


def test_costs_are_those_of_the_specification():
    assert methods.vanilla().forward_units == 3
    assert methods.disadv().forward_units == 8
    assert methods.conadv().forward_units == 8
    assert methods.conadv(Attack(steps=3)).forward_units == 12
    assert methods.disadv(mixture=methods.Mixture(fraction=0.5)).forward_units == 5.5
    assert_close({"moving": methods.conadv(Attack(batch_norm="moving")).forward_units}, {"moving": 7.5}, 0)


@pytest.mark.parametrize("name", some_of(methods.method_names(), "conadv"))
def test_whole_update_and_evaluation_are_xla_programs(name):
    """What a TPU compiles: gradients, statistics, shadow copies, LARS and metrics, in bfloat16."""
    method = methods.conadv(tau=2) if name == "conadv" else methods.make_method(name)
    model = make_model(method, network={"dtype": "mixed_bfloat16"})
    model.create_optimizer_variables()
    (images,), (labels,) = random_batches(1, 8)
    update = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    update(images, labels)
    assert model.updates_made() == 1
    evaluate = tf.function(lambda x, y, w: model.test_step((x, y, w)), jit_compile=True, autograph=False)
    evaluate(images, labels, tf.constant([1.0] * 5 + [0.0] * 3))
    assert 0 <= float(model.metrics[2].result()) <= 1


@pytest.mark.long
@pytest.mark.parametrize("name", some_of(methods.method_names(), "vanilla", "conadv"))
def test_imagenet_update_is_lowered_whole_for_a_core(name):
    """ResNet-50 on 64 images of 224 × 224 in bfloat16, an update with everything that changes: no call out of XLA."""
    method = methods.make_method(name)
    network = resnet.ResNet("resnet50", 1000, (224, 224, 3), method.branches, dtype="mixed_bfloat16")
    model = trainer.ConAdvModel(network, method)
    model.compile(lars.LARS(1.0))
    model.create_optimizer_variables()
    update = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=True, autograph=False)
    batch = tf.TensorSpec([64, 224, 224, 3], tf.uint8), tf.TensorSpec([64], tf.int32)
    program = update.experimental_get_compiler_ir(*batch)(stage="hlo")
    assert not re.findall(r"= \S+ (custom-call|send|recv|infeed|outfeed)\(", program)
    # 53 convolutions forward, and for each the gradients of its kernel and of its input.
    assert program.count(" convolution(") >= 3 * 53 * (1 if name == "vanilla" else 2)
    assert program.count("bf16[64,112,112,64]") > 1


def test_before_its_start_epoch_the_clean_one_of_two_images_is_trained_on():
    images, labels = batches(2)
    two = np.stack([images, 255 - images], 2)
    late = methods.conadv(mixture=methods.Mixture(start_epoch=2, augmented=True))
    model, bare = (make_model(m, branches=late.branches, run_eagerly=True) for m in (late, methods.vanilla()))
    fit(model, two, labels, 2)
    fit(bare, images, labels, 2)
    assert_identical(network_of(model), network_of(bare))
    [logs] = fit(model, two, labels, 1, initial=2)
    assert logs["augmented_loss"] > 0
    with pytest.raises(ConfigError, match="'conadv' was made for a clean and an augmented image"):
        fit(make_model(late, branches=late.branches), images, labels, 1)
