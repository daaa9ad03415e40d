"""Updates that are not finite: not applied, named, and gone back from with a lower peak where the recipe says so."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import tensorflow as tf
from commands import call_command_line, weights
from helpers import assert_identical, fit, make_model, mirrored, named_variables, random_batches, snapshot
from test_preemption import checkpoints, lines, signalled, trained

from conadv_tf import methods
from conadv_tf.errors import ConfigError, Preempted
from conadv_tf.run import callbacks, divergence
from conadv_tf.training import lars, losses

LABELS = {"loss": 8, "gradient": 9}  # of an example of which that alone is not finite


def labelled_loss(labels, logits):
    """A loss that the labels above break."""
    distance = tf.cast(labels != LABELS["gradient"], tf.float32) + 0.0 * logits[:, 0]
    offset = tf.where(labels == LABELS["loss"], np.inf, 0.0)
    return losses.SmoothedCrossEntropy().call(labels, logits) + tf.sqrt(distance) + offset


def broken_batches(cause: str):
    """Two batches and one that breaks an update."""
    images, labels = random_batches(3, 8, seed=5)
    images, labels = images.astype(np.float32), labels % 8
    if cause == "images":
        images[2, 0] = np.inf
    else:
        labels[2, 0] = LABELS[cause]
    return images, labels


def run(model, images, labels) -> dict[str, float]:
    """One update from batches that `fit` would refuse; its logs."""
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    model.reset_metrics()
    logs = model.make_train_function()(iter(model.distribute_strategy.experimental_distribute_dataset(data)))
    return {name: float(value) for name, value in logs.items()}


def state(model) -> dict[str, np.ndarray]:
    return {name: value for name, value in snapshot(model).items() if not name.startswith("metrics/")}


CASES = {
    "lars, shadow of two": ("images", {"method": methods.conadv(tau=2)}),
    "sgd, gradient alone": (
        "gradient",
        {"method": methods.disadv(), "optimizer": lars.make_sgd(0.1), "run_eagerly": True},
    ),
    "micro-batches, loss alone": ("loss", {"method": methods.vanilla(), "microbatches": 2, "run_eagerly": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_that_is_not_finite_changes_nothing(case):
    cause, settings = CASES[case]
    model = make_model(loss=labelled_loss, **settings)
    images, labels = broken_batches(cause)
    fit(model, images[:2], labels[:2], 2)
    before = state(model)
    rest = slice(3 - model.microbatches, 3)
    log = run(model, images[rest], labels[rest])
    if cause in LABELS:
        assert np.isfinite([log["loss"], log["gradient_norm"]]).tolist() == [cause != "loss", cause != "gradient"]
    assert_identical(state(model), before)
    [log] = fit(model, images[:2], labels[:2], 1, initial=3)
    assert np.isfinite(list(log.values())).all()
    after = state(model)
    assert model.updates_made() == 3
    assert not any(np.array_equal(after[name], before[name]) for name in before if name.endswith("/main/moving_mean"))


@pytest.mark.long
def test_nor_on_any_replica_where_it_is_not_finite_on_one():
    model = make_model(methods.conadv(), strategy=mirrored(2), loss=labelled_loss)
    images, labels = broken_batches("images")  # the first replica's
    fit(model, images[:2], labels[:2], 2)
    before = copies(model)
    run(model, images[2:], labels[2:])
    assert model.updates_made() == 2
    assert_identical(copies(model), before)


def copies(model) -> dict[str, np.ndarray]:
    """Each replica's own of what an update changes."""
    held = [*model.network.variables, *model.shadows[0].variables, *model.optimizer.variables()]
    local = model.distribute_strategy.experimental_local_results
    return {f"{v.name} {replica}": copy.numpy() for v in held for replica, copy in enumerate(local(v))}


def test_nor_do_the_updates_after_it_in_the_same_call():
    images, labels = broken_batches("gradient")
    order = [0, 1, 2, 2, 0]
    images, labels = images[order], labels[order]
    labels[3, 0] = LABELS["loss"]
    broken, whole = (make_model(methods.vanilla(), loss=labelled_loss, steps_per_execution=n) for n in (5, 2))
    for model, updates in ((broken, 5), (whole, 2)):
        data = tf.data.Dataset.from_tensor_slices((images, labels))
        history = model.fit(data, steps_per_epoch=updates, verbose=0).history
        assert np.isfinite(history["gradient_norm"][0]) == (model is whole)
        assert np.isfinite(history["loss"][0])  # which only the second that was not finite would have changed
    assert broken.updates_made() == 2
    assert_identical(state(broken), state(whole))


def test_nor_does_one_whose_batch_variance_alone_is_not_finite():
    """As where weights have grown for long: normalised away, an infinite variance is no infinite loss."""
    model = make_model(methods.vanilla(), optimizer=lars.make_sgd(0.1), run_eagerly=True)
    images, labels = random_batches(1, 8, seed=5)
    kernel = named_variables(model.network)["block1/conv1/kernel"]
    kernel.assign(1e21 * kernel)
    model.create_optimizer_variables()
    before = state(model)
    with pytest.raises(divergence.Diverged, match=r"^a batch variance is not finite at update 1 "):
        fit_stopping(model, images, labels)
    assert_identical(state(model), before)


def fit_stopping(model, images, labels, updates: int = 1) -> None:
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    model.fit(data, steps_per_epoch=updates, verbose=0, callbacks=[divergence.StopIfDiverged()])


def test_the_error_names_the_half_the_update_its_learning_rate_and_the_largest_trust_ratio():
    model = make_model(methods.disadv(), run_eagerly=True)
    images, labels = random_batches(2, 8, seed=5)
    variables = named_variables(model.network)
    # Of a kernel before batch norm the gradient falls as it grows.
    variables["block1/conv1/kernel"].assign(1e3 * variables["block1/conv1/kernel"])
    [log] = fit(model, images, labels, 1)
    variables["block2/conv2/adversarial/beta"].assign([np.inf] * 32)
    with pytest.raises(divergence.Diverged) as error:
        fit_stopping(model, images, labels, 2)
    assert str(error.value) == (
        "the adversarial loss is not finite at update 2 (epoch 1), learning rate 2, largest trust ratio of the update "
        f"before {log['trust_ratio_max']:.3g} of stage1_block1/conv1/conv/kernel: lower "
        "learning_rate.peak_learning_rate or lengthen learning_rate.warmup_epochs, in a new --model_dir, or go on from "
        "the last checkpoint with divergence.retries=1"
    )


def test_the_error_names_no_trust_ratio_where_there_has_been_none():
    model = make_model(methods.vanilla())
    named_variables(model.network)["classifier/bias"].assign([np.nan] * 10)
    with pytest.raises(divergence.Diverged, match=r"^the clean loss is .* learning rate 2: lower "):
        fit_stopping(model, *random_batches(1, 8, seed=5))


@pytest.mark.parametrize("setting", ["retries=-1", "peak_factor=1.0", "peak_factor=0.0"])
def test_settings_out_of_range_are_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match=f"^divergence.{setting} "):
        trained(tmp_path, f"divergence.{setting}")


# Whole runs: 3 epochs of 13 updates, the peak of 10 after the first.


@contextlib.contextmanager
def poisoned(update: int, times: int = 1):
    """Within it a weight becomes infinite, so often, once a run has made so many updates."""
    original = callbacks.Throughput.on_train_batch_end
    left = [times]

    def then_poison(self, batch, logs=None):
        original(self, batch, logs)
        # What is not applied is not counted: the same number comes again, in the places after it.
        if self.model.updates_made() == update and (batch + 1) % 13 == update % 13 and left[0]:
            left[0] -= 1
            kernel = named_variables(self.model.network)["stem/kernel"]
            kernel.assign(np.inf * tf.ones_like(kernel))

    callbacks.Throughput.on_train_batch_end = then_poison
    try:
        yield
    finally:
        callbacks.Throughput.on_train_batch_end = original


VANILLA = "train.method='vanilla'"


@pytest.mark.long
def test_a_run_goes_back_and_on_with_a_lower_peak_that_it_keeps_when_started_again(tmp_path):
    settings = ["divergence.retries=1", "conadv.schedule='paired'", "monitor.every_epochs=3"]
    with poisoned(20):
        result = trained(tmp_path / "whole", *settings)
    [record] = result["divergences"]
    assert (record["update"], record["went_back_to"], record["peak_learning_rate"]) == (21, 13, 5.0)
    assert record["not_finite"].split()[-1] in ("is", "are")
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
    rates = [line["learning_rate"] for line in lines(tmp_path / "whole")]
    assert rates == pytest.approx([10 * 6 / 13, *decay(5.0)], rel=1e-4)  # the first epoch was not made again

    with poisoned(20), signalled(30), pytest.raises(Preempted):
        trained(tmp_path / "killed", *settings)
    again = trained(tmp_path / "killed", *settings)
    assert again["divergences"] == [record]
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert_identical(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def decay(peak: float) -> list[float]:
    """Mean learning rates of the second and the third epoch."""
    rates = [1e-4 + (peak - 1e-4) * (1 - step / 27) ** 2 for step in range(26)]
    return [float(np.mean(rates[:13])), float(np.mean(rates[13:]))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_that_diverges_once_too_often_says_so_and_keeps_its_checkpoint(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with poisoned(20, times=2), pytest.raises(divergence.Diverged) as error:
        trained(tmp_path, VANILLA, "divergence.retries=1")
    assert "divergence.retries=1 is used up: lower" in str(error.value)
    assert str(error.value).endswith("divergence.retries=2")
    assert checkpoints(tmp_path) == {0, 13}
    assert len(lines(tmp_path)) == 1
    # What is said next begins on a line of its own.
    bars = terminal.getvalue()
    assert bars.count("\n") == 2
    assert bars.endswith("\n")
    assert "digits  33 % |" in bars


@pytest.mark.long
def test_a_peak_below_the_end_of_the_decay_takes_the_end_down_with_it(tmp_path):
    with poisoned(20):
        trained(tmp_path, VANILLA, "divergence.retries=1", "learning_rate.end_learning_rate=9.0")
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[1:] == [5.0, 5.0]


@pytest.mark.torture
def test_a_real_run_with_an_absurd_peak_starts_anew_with_a_lower_one(tmp_path):
    """From its first weights and with the recipe's own peak, 10, it is the recipe's run."""
    absurd = ["learning_rate.peak_learning_rate=1e7", "divergence.peak_factor=1e-6", "divergence.retries=1"]
    result = trained(tmp_path / "absurd", VANILLA, *absurd)
    [record] = result["divergences"]
    assert (record["went_back_to"], record["peak_learning_rate"]) == (0, 10.0)
    trained(tmp_path / "plain", VANILLA)
    assert lines(tmp_path / "absurd") == lines(tmp_path / "plain")
    assert_identical(weights(tmp_path / "absurd"), weights(tmp_path / "plain"))


def test_the_command_line_ends_with_one_line_and_the_last_checkpoint(tmp_path, capfd):
    settings = ["train.epochs=3", "learning_rate.warmup_epochs=1", "learning_rate.peak_learning_rate=8e3"]
    with pytest.raises(SystemExit) as ended:
        call_command_line(*(f"--gin_param={setting}" for setting in settings), f"--model_dir={tmp_path}")
    assert ended.value.code == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert " not finite at update " in line
    assert checkpoints(tmp_path) == {13}
    assert all(np.isfinite(value).all() for value in weights(tmp_path).values())
    assert not (tmp_path / "result.json").exists()
