"""A further method is one function and one entry: one that adds noise of up to ε in the place of an attack."""

import json

import pytest
import tensorflow as tf
from commands import SHORT, call_command_line

from conadv_tf import methods
from conadv_tf.errors import ConfigError


def jitter(attack, mixture):
    """Training on the clean batch and on its images with noise of up to ε, through the adversarial branch."""

    def gradients(network, stale, loss, batch, carry):
        delta = attack.epsilon_pixels * tf.random.stateless_uniform(tf.shape(batch.images), batch.seed, -1.0, 1.0)
        noisy = tf.clip_by_value(batch.images + delta, 0.0, 255.0)
        mixed, metrics, _ = methods.train_on(network, loss, methods.parts_of(mixture, batch, noisy))
        return methods.Update(mixed, metrics, {})

    return gradients


@pytest.fixture
def registered():
    methods.register(methods.Schedule("jitter", jitter, passes=lambda attack, mixture: {"train": 1 + mixture.fraction}))
    yield
    del methods.SCHEDULES["jitter"]


def test_a_method_from_outside_trains_by_the_command_line(registered, tmp_path, capsys):
    call_command_line(*SHORT, "--gin_param=train.method='jitter'", f"--model_dir={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["schedule"], result["tau"], result["epsilon"]) == ("jitter", None, 0, 8.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["adversarial_loss"] < lines[0]["adversarial_loss"]
    assert "6 forward passes" in capsys.readouterr().out


@pytest.mark.long
def test_it_has_a_row_in_the_preflight(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = ["train.global_batch_size=8", "train.microbatch_size=8"]
    params = [f"--gin_param={binding}" for binding in (*batch, "train.method='jitter'")]
    call_command_line("--preflight", "--tpu=v3-2", *params, f"--model_dir={tmp_path / 'run'}")
    rows = {row["name"]: row for row in json.loads((tmp_path / "run" / "preflight.json").read_text())["methods"]}
    assert next(iter(rows)) == "jitter"
    assert rows["jitter"]["compiled"]
    # Two passes and no attack: dearer than plain training, cheaper than an attack in sequence.
    assert rows["vanilla"]["flop"] < rows["jitter"]["flop"] < rows["disadv"]["flop"]
    assert "jitter" in capsys.readouterr().out


def test_a_schedule_of_a_method_without_a_choice_is_refused():
    with pytest.raises(ConfigError, match="method='disadv': use 'conadv', or None"):
        methods.register(methods.Schedule("louder", jitter, lambda attack, mixture: {"train": 2}, method="disadv"))
    assert "louder" not in methods.SCHEDULES


def test_a_name_is_given_once():
    with pytest.raises(ConfigError, match="'paired' is registered already: choose another name"):
        methods.register(methods.Schedule("paired", jitter, passes=lambda attack, mixture: {"train": 2}))
