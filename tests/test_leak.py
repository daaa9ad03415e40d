"""Label leaking: what the monitor reports on a toy where leaking is certain, and where a run says it."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from commands import call_command_line

from conadv_tf import methods
from conadv_tf.methods.attack import Attack
from conadv_tf.models.keras_split import SplitNetwork, split
from conadv_tf.models.resnet import ResNet
from conadv_tf.run import callbacks, leak
from conadv_tf.run.folder import RunFolder
from conadv_tf.training import metrics
from conadv_tf.training.plan import make_plan
from conadv_tf.training.trainer import ConAdvModel

# A linear model on two pixels. The weights of its ten classes lie on a circle, 36 degrees apart and none near an axis,
# so that the signs of a class are (+, +) for three of them, (-, +) for two, (-, -) for three and (+, -) for two.
CLASSES = 10
ANGLES = np.deg2rad(9 + 36 * np.arange(CLASSES))
CIRCLE = tf.constant(np.stack([np.cos(ANGLES), np.sin(ANGLES)]), tf.float32)
IMAGES = 4000


def attacked(images: tf.Tensor) -> tf.Tensor:
    """Logits so small that all classes are equally probable: the gradient of the loss is minus the label's weights."""
    return 1e-5 * tf.reshape(images - 128.0, [-1, 2]) @ CIRCLE


def reader(images: tf.Tensor) -> tf.Tensor:
    """The branch that has learnt the attack: batch norm of its own has turned the sign of every pixel."""
    return -attacked(images)


def leak_of_reading(attack: Attack) -> dict[str, float]:
    """clean_top1 and adversarial_top1 of noise. Each image has every label, so that a clean image tells nothing."""
    noise = np.random.default_rng(0).uniform(127.0, 129.0, (IMAGES, 1, 2, 1)).astype(np.float32)
    images, labels = tf.constant(noise.repeat(CLASSES, 0)), tf.tile(tf.range(CLASSES), [IMAGES])
    adversarial = attack.adversarial_examples(attacked, CLASSES, None, images, labels, tf.constant([0, 1]))
    logits = {"clean": attacked(images), "adversarial": reader(adversarial)}
    shares = {f"{half}_top1": float(tf.reduce_mean(metrics.top(1, labels, of))) for half, of in logits.items()}
    return {"epoch": 1, "step": 1, **shares}


# Of the classes with the same signs one is read: 4 of 10. A random wrong label tells one label that is not the true
# one: at most 1 of 9 is read. What the network itself predicts of noise tells nothing: 1 of 10.
@pytest.mark.parametrize(
    ("settings", "read", "says"),
    [
        ({"label": "hard"}, 4 / 10, True),
        ({"goal": "random_target"}, 1 / 9, False),
        ({"label": "predicted"}, 1 / 10, False),
    ],
    ids=str,
)
def test_only_the_attack_on_the_true_label_leaks(settings, read, says):
    line = leak_of_reading(Attack(8.0, random_start_probability=0.0, **settings))
    assert line["clean_top1"] == pytest.approx(1 / CLASSES, abs=1e-6)
    error = 4 * (read / (IMAGES * CLASSES)) ** 0.5 if "goal" in settings else 1e-6
    assert line["adversarial_top1"] == pytest.approx(read, abs=error)
    found = leak.leak_result([line], warmup_steps=0, start_epoch=0)
    assert found["leak_largest"] == pytest.approx(100 * (line["adversarial_top1"] - line["clean_top1"]), abs=1e-3)
    assert leak.leaks(found) == says


def epochs_of(*leaks_: float, steps: int = 10) -> list[dict]:
    """Lines of metrics.jsonl with these leaks, in points."""
    return [
        {"epoch": number, "step": steps * number, "clean_top1": 0.5, "adversarial_top1": 0.5 + points / 100}
        for number, points in enumerate(leaks_, 1)
    ]


def test_the_result_has_the_largest_leak_after_the_warm_up_and_the_last():
    epochs = epochs_of(9.0, 7.0, 5.0, -1.0)
    of = leak.leak_result
    assert of(epochs, 0, 0) == {"leak_largest": 9.0, "leak_last": -1.0}
    assert of(epochs, 10, 0) == {"leak_largest": 7.0, "leak_last": -1.0}
    assert of(epochs, 11, 0) == {"leak_largest": 5.0, "leak_last": -1.0}  # the second epoch begins within the warm-up
    assert of(epochs, 10, 3) == {"leak_largest": -1.0, "leak_last": -1.0}
    assert of(epochs, 40, 0) == {}
    assert of([{"epoch": 1, "step": 10, "clean_top1": 0.5}], 0, 0) == {}
    assert not leak.leaks({})
    assert not leak.leaks({"leak_largest": 2.0})
    assert leak.leaks({"leak_largest": 2.01})


def test_a_kept_run_is_judged_by_the_warm_up_and_the_first_epoch_of_its_configuration():
    epochs = epochs_of(9.0, 7.0, 5.0, -1.0)
    config = "adversarial.start_epoch = 0\n\nlearning_rate.warmup_epochs = %warmup\n\nwarmup = 1.5\n"
    assert leak.kept_leak_result(epochs, config) == leak.leak_result(epochs, 15, 0)
    later = config.replace("start_epoch = 0", "start_epoch = 3")
    assert leak.kept_leak_result(epochs, later) == leak.leak_result(epochs, 15, 3)
    assert leak.kept_leak_result(epochs, "") == leak.leak_result(epochs, 0, 0)
    assert leak.kept_leak_result([], config) == {}


def noise_batches(rows: int, updates: int) -> tf.data.Dataset:
    """Noise of two pixels in two classes: of a clean image nobody can tell which it is."""
    random = np.random.default_rng(0)
    images = random.integers(127, 130, (rows * updates, 1, 2, 1)).astype(np.uint8)
    data = tf.data.Dataset.from_tensor_slices((images, np.arange(rows * updates, dtype=np.int32) % 2))
    return data.shuffle(rows * updates, seed=1).repeat().batch(rows, drop_remainder=True)


def linear_network(branches: tuple[str, ...]) -> SplitNetwork:
    """Logits (w·n, -w·n) of two normalised pixels n, where only the γ of batch norm learn.

    Each γ of the adversarial branch begins at 1, falls by about half of rate · w an update, since the attack turns
    every pixel against the label, and reads the label from its zero on. The clean γ stay near 1: noise teaches nothing.
    """
    sequential = tf_keras.Sequential(
        [
            tf_keras.layers.Input((1, 2, 1)),
            tf_keras.layers.Flatten(),
            tf_keras.layers.BatchNormalization(center=False),
            tf_keras.layers.Dense(2, use_bias=False, trainable=False),
        ]
    )
    sequential.layers[-1].set_weights([np.array([[0.05, -0.05], [0.05, -0.05]], np.float32)])
    return split(sequential, branches)


def trained_on_noise(attack: Attack, epochs: int = 8) -> list[dict]:
    """The epochs' logs of that network, trained on noise and watched by the run's own callback."""
    method = methods.conadv(attack, methods.Mixture())
    model = ConAdvModel(linear_network(method.branches), method)
    model.compile(tf_keras.optimizers.SGD(4.0))
    watch = callbacks.LeakWatch(make_plan(64, 64, 1, 1024, epochs), 16, [])
    history = model.fit(noise_batches(64, 16), steps_per_epoch=16, epochs=epochs, verbose=0, callbacks=[watch]).history
    return [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "leaking" in record.getMessage()]


def test_a_network_that_learns_to_read_the_attack_is_reported_once(caplog):
    attack = Attack(32.0, label="hard", random_start_probability=0.0)
    logs = trained_on_noise(attack)
    assert logs[-1]["adversarial_top1"] == 1.0
    assert logs[-1]["clean_top1"] == pytest.approx(0.5, abs=0.1)  # 1,024 images, of which a few are known by heart
    assert logs[-1]["leak"] == pytest.approx(logs[-1]["adversarial_top1"] - logs[-1]["clean_top1"], abs=1e-6)
    (line,) = warnings_of(caplog)
    (first, *_) = (number for number, line in enumerate(logs, 1) if number > 1 and line["leak"] > 0.02)
    points = 100 * (logs[first - 1]["adversarial_top1"] - logs[first - 1]["clean_top1"])
    assert f"in epoch {first} the adversarial half's top-1 is {points:.1f} points above the clean half's" in line
    assert line.endswith(
        "attack.label='predicted', or attack.goal='random_target', or attack.random_start_probability=1.0, "
        "or an attack.epsilon_pixels below 32"
    )
    assert "\n" not in line


def test_the_same_network_cannot_read_an_attack_on_its_own_prediction():
    logs = trained_on_noise(Attack(32.0, label="predicted", random_start_probability=0.0))
    assert [line["adversarial_top1"] for line in logs[1:]] == [pytest.approx(0.5, abs=0.1)] * 7


def test_the_warning_names_what_is_not_yet_done_and_the_schedule_can_have():
    def remedies(method: methods.Method) -> str:
        return leak.warning(12.34, 7, method).partition(" try ")[2]

    mixture = methods.Mixture()
    shadow = methods.conadv(Attack(4.0, goal="random_target"), mixture)  # with a random start
    assert remedies(shadow) == (
        "attack.label='predicted' with attack.goal='untargeted', or an attack.epsilon_pixels below 4"
    )
    predicted = methods.conadv(Attack(4.0, label="predicted"), mixture)
    assert remedies(predicted) == (
        "attack.goal='random_target' with attack.label='auto', or an attack.epsilon_pixels below 4"
    )
    paired = methods.conadv(Attack(4.0), mixture, schedule="paired")
    assert "random_start" not in remedies(paired)
    assert remedies(paired) == remedies(predicted)  # what its recipe left to the schedule
    text = leak.warning(12.34, 7, paired)
    assert "in epoch 7 the adversarial half's top-1 is 12.3 points above" in text
    assert "\n" not in text


START = [
    "train.epochs=4",
    "learning_rate.warmup_epochs=1",
    "adversarial.start_epoch=1",
    "train.evaluate_every_epochs=9",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose attack begins in the second of four epochs, and what it logged, where any epoch counts as a leak."""
    folder = tmp_path_factory.mktemp("leak")
    logged: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leak, "LEAK_POINTS", -100.0)
        patch.setattr(callbacks.logging, "warning", lambda text, *of: logged.append(text % of))
        call_command_line(*(f"--gin_param={one}" for one in START), f"--model_dir={folder}")
    return RunFolder(str(folder)), [line for line in logged if "leaking" in line]


def test_metrics_and_result_have_the_leak_of_the_epochs_with_adversarial_images(run):
    folder, _ = run
    epochs = folder.read_metrics()
    assert ["leak" in line for line in epochs] == [False, True, True, True]
    for line in epochs[1:]:
        assert line["leak"] == pytest.approx(line["adversarial_top1"] - line["clean_top1"], abs=2e-6)
    points = [100 * (line["adversarial_top1"] - line["clean_top1"]) for line in epochs[1:]]
    result = folder.read_result()
    assert result["leak_largest"] == pytest.approx(max(points), abs=1e-3)
    assert result["leak_last"] == pytest.approx(points[-1], abs=1e-3)
    kept = leak.kept_leak_result(epochs, folder.read_config())
    assert kept == {name: result[name] for name in ("leak_largest", "leak_last")}


def test_a_run_warns_once_also_over_a_resumption(run, monkeypatch, caplog):
    folder, logged = run
    assert [line.split(" the adversarial")[0] for line in logged] == ["label leaking: in epoch 2"]
    monkeypatch.setattr(leak, "LEAK_POINTS", -100.0)
    epochs = folder.read_metrics()
    model = ConAdvModel(
        ResNet("digits_resnet", 10, (8, 8, 1), ("main", "adversarial")), methods.disadv(Attack(4.0), methods.Mixture())
    )
    for earlier, count in ((epochs[:3], 0), (epochs[:1], 1)):
        watch = callbacks.LeakWatch(make_plan(110, 110, 1, 1437, 4), 13, earlier)
        watch.set_model(model)
        caplog.clear()
        watch.on_epoch_end(3, {name: epochs[3][name] for name in ("clean_top1", "adversarial_top1")})
        assert len(warnings_of(caplog)) == count
