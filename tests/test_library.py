"""Use as a library: compile, fit, evaluate and predict with NumPy arrays and ordinary Keras callbacks."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import assert_close, make_model, mirrored, named_variables, random_batches, snapshot

from conadv_tf import methods, warmup_poly_decay
from conadv_tf.errors import ConfigError
from conadv_tf.methods.attack import Attack
from conadv_tf.training import lars, metrics


def arrays(rows: int):
    images, labels = random_batches(1, rows)
    return images[0], labels[0]


@pytest.fixture(scope="module")
def model():
    """A model that has made a few updates; tests that change it make their own."""
    made = make_model(methods.conadv(), lars.LARS(2.0))
    images, labels = arrays(20)
    made.fit(images, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return made


def test_the_last_partial_batch_of_an_array_is_trained_on():
    images, labels = arrays(20)
    whole = make_model(methods.conadv(), lars.LARS(2.0))
    whole.fit(images, labels, batch_size=8, shuffle=False, verbose=0)
    assert whole.optimizer.iterations == 3
    parts = make_model(methods.conadv(), lars.LARS(2.0), run_eagerly=True)
    for first in (0, 8, 16):
        parts.train_on_batch(images[first : first + 8], labels[first : first + 8])
    ours, theirs = ({n: v for n, v in snapshot(m).items() if not n.startswith("metrics")} for m in (whole, parts))
    assert_close(ours, theirs, 1e-6)


def test_keras_callbacks_see_the_logs(tmp_path):
    images, labels = arrays(16)
    seen = {}
    callbacks = [
        tf_keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        tf_keras.callbacks.ModelCheckpoint(str(tmp_path / "weights"), save_weights_only=True, monitor="val_loss"),
        tf_keras.callbacks.EarlyStopping("val_loss", patience=5),
        tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update({epoch: logs})),
        tf_keras.callbacks.TerminateOnNaN(),
    ]
    made = make_model(methods.conadv(), run_eagerly=True)
    history = made.fit(
        images,
        labels,
        batch_size=8,
        epochs=2,
        validation_data=(images, labels),
        callbacks=callbacks,
        verbose=0,
    )
    expected = {"loss", "clean_loss", "clean_top1", "adversarial_loss", "adversarial_top1", "learning_rate"}
    assert expected | {"val_loss", "val_top1", "val_top5"} <= seen[1].keys()
    assert history.history["val_loss"][1] == seen[1]["val_loss"]
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert "adversarial_loss" in header
    assert len(rows) == 2
    other = make_model(methods.conadv(), seed=9, trained=False)
    other.load_weights(str(tmp_path / "weights")).expect_partial()
    expected_weights = {n: v.numpy() for n, v in named_variables(made.network).items()}
    assert_close({n: v.numpy() for n, v in named_variables(other.network).items()}, expected_weights, 0)


def test_logged_training_values_are_means_over_the_epoch():
    images, labels = arrays(16)
    seen = []
    made = make_model(methods.disadv(), run_eagerly=True)
    for first in (0, 8):
        seen.append(made.train_on_batch(images[first : first + 8], labels[first : first + 8], return_dict=True))
    history = make_model(methods.disadv()).fit(images, labels, batch_size=8, shuffle=False, verbose=0).history
    for name in ("loss", "clean_top1", "adversarial_loss", "gradient_norm"):
        np.testing.assert_allclose(history[name][0], np.mean([log[name] for log in seen]), rtol=1e-5)


def expected_evaluation(model, images, labels, weights):
    """Loss, top-1 and top-5 of the main branch with moving statistics, in NumPy."""
    logits = np.float64(model.network(images, branch="main", mode="moving", update_statistics=False))
    log_softmax = logits - logits.max(1, keepdims=True)
    log_softmax -= np.log(np.exp(log_softmax).sum(1, keepdims=True))
    loss = -np.sum((0.9 * np.eye(10)[labels] + 0.01) * log_softmax, 1)
    ranks = np.argsort(-logits, 1)
    top1, top5 = ranks[:, 0] == labels, (ranks[:, :5] == labels[:, None]).any(1)
    return {n: np.sum(v * weights) / np.sum(weights) for n, v in {"loss": loss, "top1": top1, "top5": top5}.items()}


@pytest.mark.parametrize("weights", [np.ones(37), np.arange(37) % 2, np.linspace(0, 2, 37)])
def test_evaluation_is_exact_with_weights_and_a_partial_batch(model, weights):
    images, labels = arrays(37)
    actual = model.evaluate(images, labels, batch_size=8, sample_weight=weights, verbose=0, return_dict=True)
    assert_close(actual, expected_evaluation(model, images, labels, weights), 1e-6)


def test_evaluation_without_weights_counts_every_image_once_and_changes_nothing(model):
    images, labels = arrays(37)

    def trained():
        return {name: value for name, value in snapshot(model).items() if not name.startswith("metrics")}

    before = trained()
    actual = model.evaluate(images, labels, batch_size=8, verbose=0, return_dict=True)
    assert_close(actual, expected_evaluation(model, images, labels, np.ones(37)), 1e-6)
    assert_close(trained(), before, 0)


def test_equal_logits_count_as_chance():
    logits = tf.constant([[0.0] * 1000, [1.0] * 3 + [0.0] * 997, [1.0] * 3 + [0.0] * 997, [np.nan] + [0.0] * 999])
    labels = tf.constant([999, 999, 2, 5])
    np.testing.assert_allclose(metrics.top(1, labels, logits), [1 / 1000, 0, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics.top(5, labels, logits), [5 / 1000, 2 / 997, 1, 0], rtol=1e-6)


def test_a_network_that_knows_nothing_is_evaluated_as_chance():
    images, labels = arrays(40)
    made = make_model(methods.conadv(), trained=False)
    made.network.classifier.kernel.assign(tf.zeros_like(made.network.classifier.kernel))
    actual = made.evaluate(images, labels, batch_size=8, verbose=0, return_dict=True)
    assert_close(actual, {"loss": np.log(10), "top1": 0.1, "top5": 0.5}, 1e-6)


def test_evaluation_on_replicas_equals_evaluation_on_one(model):
    images, labels = arrays(32)
    weights = (np.arange(32) < 29).astype(np.float32)  # as a padded last batch has them
    spread = make_model(methods.conadv(), strategy=mirrored(2))
    for name, variable in named_variables(spread.network).items():
        variable.assign(named_variables(model.network)[name].numpy())
    data = tf.data.Dataset.from_tensor_slices((images, labels, weights)).batch(8)
    actual = spread.evaluate(data, verbose=0, return_dict=True)
    assert_close(actual, expected_evaluation(model, images, labels, weights), 1e-6)


def test_a_replica_without_an_image_of_the_last_batch_counts_nothing(model):
    """As of a last batch of one image on two GPUs. Seen to fail: an error about the depth of a convolution."""
    images, labels = arrays(9)
    spread = make_model(methods.conadv(), strategy=mirrored(2))
    for name, variable in named_variables(spread.network).items():
        variable.assign(named_variables(model.network)[name].numpy())
    actual = spread.evaluate(images, labels, batch_size=8, verbose=0, return_dict=True)
    assert_close(actual, expected_evaluation(model, images, labels, np.ones(9)), 1e-6)
    logits = model.predict(images, verbose=0)
    np.testing.assert_allclose(spread.predict(images, batch_size=8, verbose=0), logits, atol=1e-5)
    np.testing.assert_allclose(spread.predict(images[:1], verbose=0), logits[:1], atol=1e-5)


def test_prediction_uses_the_main_branch_and_moving_statistics(model):
    images, _ = arrays(11)
    expected = model.network(images, branch="main", mode="moving", update_statistics=False)
    np.testing.assert_allclose(model.predict(images, batch_size=4, verbose=0), expected, atol=1e-5)
    aux = model.network(images, branch="adversarial", mode="moving", update_statistics=False)
    assert np.abs(aux - expected).max() > 0.01


@pytest.mark.parametrize("optimizer", ["sgd", tf_keras.optimizers.legacy.SGD(0.01), tf_keras.optimizers.Adam(0.001)])
def test_any_keras_optimizer_trains(optimizer):
    images, labels = arrays(16)
    made = make_model(methods.vanilla(), optimizer)
    history = made.fit(images, labels, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["trust_ratio_max"][0] == 1.0


def test_labels_may_be_columns_and_images_float():
    images, labels = arrays(8)
    weights = []
    for given in ((images, labels), (images.astype(np.float32), labels[:, None].astype(np.int64))):
        made = make_model(methods.disadv(Attack()), run_eagerly=True)
        made.fit(*given, batch_size=8, shuffle=False, verbose=0)
        weights.append({name: v.numpy() for name, v in named_variables(made.network).items()})
    assert_close(*weights, 0)


@pytest.mark.parametrize("weights", [{"sample_weight": np.arange(8.0)}, {"class_weight": {0: 2.0}}])
def test_training_weights_are_refused_rather_than_ignored(weights):
    images, labels = arrays(8)
    made = make_model(methods.vanilla())
    [name] = weights
    with pytest.raises(ConfigError, match=f"{name}.*every image counts the same"):
        made.fit(images, labels, verbose=0, **weights)


def test_keras_callbacks_stop_lower_and_restore(tmp_path):
    """On validation data split off an array; no loss improves by 100, so that the first epoch is the best one."""
    images, labels = arrays(32)
    made, weights = make_model(methods.conadv(), lars.LARS(2.0)), []
    never = {"monitor": "val_loss", "min_delta": 100.0}
    callbacks = [
        tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: weights.append(made.get_weights())),
        tf_keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=1, **never),
        tf_keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True, **never),
        tf_keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"), "val_loss", save_best_only=True),
        tf_keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
    ]
    history = made.fit(
        images, labels, batch_size=8, epochs=9, validation_split=0.25, callbacks=callbacks, verbose=0
    ).history
    np.testing.assert_allclose(history["learning_rate"], [2.0, 2.0, 0.2])
    assert made.optimizer.iterations == 3 * 3
    assert not all(map(np.array_equal, weights[0], weights[2]))
    for restored, first in zip(made.get_weights(), weights[0], strict=True):
        np.testing.assert_array_equal(restored, first)
    [best] = [epoch for epoch, loss in enumerate(history["val_loss"], 1) if loss == min(history["val_loss"])]
    loaded = tf_keras.models.load_model(str(tmp_path / f"{best}.keras"))
    evaluated = loaded.evaluate(images[24:], labels[24:], verbose=0, return_dict=True)
    assert evaluated["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 3


def test_a_fit_that_was_killed_goes_on_from_its_backup(tmp_path):
    images, labels = arrays(16)

    def killed(epoch, logs):
        raise KeyboardInterrupt

    def fitted(*callbacks):
        made = make_model(methods.conadv(), lars.LARS(2.0), run_eagerly=True)
        made.fit(images, labels, batch_size=8, epochs=2, shuffle=False, callbacks=list(callbacks), verbose=0)
        return made.get_weights()

    def backup():
        return tf_keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        fitted(backup(), tf_keras.callbacks.LambdaCallback(on_epoch_end=killed))
    assert all(map(np.array_equal, fitted(backup()), fitted()))


SCHEDULED = {
    "lars": lambda: lars.LARS(warmup_poly_decay(2, 20, 3.0, 1)),
    "adam": lambda: tf_keras.optimizers.Adam(tf_keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.9)),
}


@pytest.mark.parametrize("optimizer", SCHEDULED)
@pytest.mark.parametrize("callback", ["ReduceLROnPlateau", "LearningRateScheduler"])
def test_a_callback_that_sets_the_rate_is_refused_beside_a_schedule(callback, optimizer):
    """Seen to fail: LARS ended with a TypeError, Adam trained on as if there were no callback."""
    setter = getattr(tf_keras.callbacks, callback)(*([lambda epoch, rate: rate] if callback[0] == "L" else ["loss"]))
    made = make_model(methods.vanilla(), SCHEDULED[optimizer]())
    for given in ([setter], tf_keras.callbacks.CallbackList([setter], model=made)):
        with pytest.raises(ConfigError, match=f"^callbacks: {callback} sets the learning rate, .* pass a number"):
            made.fit(*arrays(8), callbacks=given, verbose=0)
    assert made.updates_made() == 0


def test_a_fraction_needs_batches_of_a_known_size():
    images, labels = arrays(20)
    made = make_model(methods.conadv(mixture=methods.Mixture(fraction=0.5)))
    with pytest.raises(ConfigError, match="drop_remainder"):
        made.fit(images, labels, batch_size=8, verbose=0)


def test_a_fraction_that_leaves_no_row_is_refused():
    images, labels = random_batches(2, 4)
    made = make_model(methods.conadv(mixture=methods.Mixture(fraction=0.1)))
    with pytest.raises(ConfigError, match="leaves none"):
        made.fit(tf.data.Dataset.from_tensor_slices((images, labels)), verbose=0)
