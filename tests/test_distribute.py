"""Choosing a strategy, and means over groups of replicas."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import gin
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from commands import ROOT
from helpers import fit, make_model, mirrored, random_batches

from conadv_tf import ConAdvModel, ResNet, methods
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.models import split_batchnorm
from conadv_tf.run.strategy import devices_text, make_strategy
from conadv_tf.run.tpu_runtime import parse_accelerator_type
from conadv_tf.training import collectives

ONE = tf.distribute.OneDeviceStrategy("CPU:0")


def test_one_device_without_accelerators(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    assert isinstance(make_strategy(), tf.distribute.OneDeviceStrategy)


def test_what_a_run_trains_on_is_said(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert devices_text(tf.distribute.OneDeviceStrategy("CPU:0")) == "1 × CPU, as TensorFlow finds no GPU"
    assert devices_text(mirrored(2)) == "2 × CPU, as TensorFlow finds no GPU"
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:0"])
    assert devices_text(tf.distribute.OneDeviceStrategy("CPU:0")) == "1 × CPU"  # where it was asked for
    assert devices_text(tf.distribute.OneDeviceStrategy("GPU:0")) == "1 × GPU"


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"strategy": "horovod"}, ConfigError, "--strategy=horovod"),
        ({"strategy": "mirrored", "tpu": "v3-8"}, ConfigError, "--tpu=v3-8"),
        ({"strategy": "multiworker"}, ConfigError, "TF_CONFIG"),
        ({"tpu": "v3-512"}, RunError, r"tpu_scripts/create.sh --name=NAME --type=v3-512"),
        ({"strategy": "tpu"}, RunError, "--tpu=local"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(arguments, error, named, monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "TPU_ACCELERATOR_TYPE", "ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(error, match=named) as caught:
        make_strategy(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "{bad",
        "{}",
        "[]",
        '{"cluster": {"worker": "here:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["here:1", "there:1"]}, "task": {"type": "worker", "index": 2}}',
        '{"cluster": {"worker": ["here:1", "there:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": {"worker": ["here:1", "there:1"]}, "task": 1}',
        # Seen to fail: a wait without an end and without a word; an abort.
        '{"cluster": {"chief": ["here:1"], "ps": ["there:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": {"chief": ["here:1"], "evaluator": ["there:1"]}, "task": {"type": "evaluator", "index": 0}}',
    ],
)
def test_a_cluster_that_is_none_is_refused_before_anybody_waits(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ConfigError, match=r"^TF_CONFIG=") as caught:
        make_strategy()
    assert "\n" not in str(caught.value)


def test_waiting_for_a_tpu_that_does_not_answer_can_be_ended():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        program = (
            f"from conadv_tf import make_strategy; make_strategy(tpu='grpc://127.0.0.1:{silent.getsockname()[1]}')"
        )
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            for _ in range(2):  # who looks whether somebody listens, and TensorFlow
                silent.settimeout(60)
                silent.accept()
            time.sleep(3)  # by then it waits within TensorFlow
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
        finally:
            process.kill()


def test_a_slice_of_another_type_is_refused(monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v3-32")
    with pytest.raises(RunError, match="v3-32"):
        make_strategy(tpu="v3-512")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("v3-512", ("v3", 512)), ("v5litepod-16", ("v5litepod", 16)), ("v5p-8", ("v5p", 8)), ("my-tpu", None)],
)
def test_accelerator_types_are_told_from_names(name, expected):
    assert parse_accelerator_type(name) == expected
    assert parse_accelerator_type("grpc://10.0.0.2:8470") is None


def test_one_replica_is_its_own_group():
    value = tf.constant([1.0, 2.0])
    assert np.array_equal(split_batchnorm.group_mean(value, 1), value)


@pytest.mark.parametrize(("group", "expected"), [(1, [0, 1, 2, 3]), (2, [0.5, 0.5, 2.5, 2.5]), (4, [1.5] * 4)])
def test_group_means_are_over_neighbouring_replicas(group, expected):
    strategy = mirrored(4)

    def replica():
        place = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
        return split_batchnorm.group_mean(tf.stack([place, 10.0 * place]), group)

    results = strategy.experimental_local_results(tf.function(lambda: strategy.run(replica))())
    np.testing.assert_allclose(np.stack(results), np.outer(expected, [1.0, 10.0]), rtol=1e-6)


def trained_loss(strategy: tf.distribute.Strategy) -> float:
    images, labels = random_batches(1, 12)
    return fit(make_model(methods.vanilla(), strategy=strategy), images, labels, 1)[0]["loss"]


@pytest.mark.long
def test_a_notebook_trains_on_one_group_of_devices_after_another():
    collectives.keep_apart()  # from what other tests made
    losses = [trained_loss(tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(n)])) for n in (2, 3)]
    strategies = []
    for logical_cpus in (2, 4):
        gin.bind_parameter("mirrored.logical_cpus", logical_cpus)
        strategies.append(make_strategy("mirrored"))
    losses += map(trained_loss, strategies)
    assert [strategy.num_replicas_in_sync for strategy in strategies] == [2, 4]
    assert np.isfinite(losses).all()


SCOPES = {"none": contextlib.nullcontext, "two": lambda: mirrored(2).scope(), "one": lambda: ONE.scope()}


def made(network: str, model: str, optimizer: str, call: str = "none") -> None:
    """Trains what is made in these scopes."""
    images, labels = random_batches(1, 8)
    with SCOPES[network]():
        layers = ResNet("digits_resnet", 10, (8, 8, 1)).create_variables()
    with SCOPES[model]():
        trained = ConAdvModel(layers, methods.vanilla())
    with SCOPES[optimizer]():
        trained.compile(tf_keras.optimizers.SGD(0.1))
    with SCOPES[call]():
        trained.fit(images[0], labels[0], batch_size=8, verbose=0)


@pytest.mark.parametrize(
    ("scopes", "message"),
    [
        (
            ("none", "two", "two"),
            "the network was made in another scope than the model, which was made in that of a Mir",
        ),
        (
            ("none", "one", "one"),
            "the network was made in another scope than the model, which was made in that of a One",
        ),
        (("two", "none", "none"), "the network was made in another scope than the model, which was made in no scope"),
        (
            ("two", "two", "none"),
            "the optimizer was made in another scope than the model, which was made in that of a M",
        ),
        (("none", "none", "two"), "the optimizer was made in another scope than the model, which was made in no scope"),
        (
            ("none", "none", "none", "two"),
            "the model was made in no scope, and is called in that of a MirroredStrategy",
        ),
    ],
)
def test_parts_of_several_scopes_are_refused(scopes, message):
    """Seen to fail: 51 lines with the values of a kernel, or an AssertionError without a word."""
    with pytest.raises(
        ConfigError, match=f"^{message}.*: make network, model and optimizer in one `with strategy.scope"
    ):
        made(*scopes)


def test_a_batch_that_does_not_divide_over_replicas_says_what_would():
    """Seen to fail: the remedy was drop_remainder=True alone, which these data have."""
    images, labels = random_batches(3, 5)
    with pytest.raises(ConfigError, match=r"^2 replicas need .*drop_remainder=True\), with rows a multiple of 2$"):
        fit(make_model(methods.vanilla(), strategy=mirrored(2)), images, labels, 1)


@pytest.mark.parametrize("scopes", [("two", "two", "two", "two"), ("one", "one", "none"), ("one", "none", "none")])
def test_parts_of_one_scope_or_one_device_train(scopes):
    made(*scopes)


def test_methods_are_known_by_name():
    names = ["vanilla", "disadv", "conadv", "noise", "sam", "sam_stale"]
    assert [methods.make_method(name).name for name in methods.method_names()] == names
    assert methods.make_method("conadv").tau == 1
    assert methods.make_method("conadv").schedule == "shadow"
    with pytest.raises(ConfigError, match=r"train\.method='sharpness'"):
        methods.make_method("sharpness")
