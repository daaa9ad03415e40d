"""The folder of a run that an earlier version began goes on under this one.

tests/old_run/ is what commit f408399 left of `python train.py` with the settings below after two of its four epochs:
checkpoint, configuration, layout and metrics.
"""

import json
import shutil
from pathlib import Path

import pytest
import tensorflow as tf
from commands import call_command_line

from conadv_tf.data import augment

OLD_RUN = Path(__file__).parent / "old_run"
SETTINGS = ["--gin_param=train.epochs=4", "--gin_param=learning_rate.warmup_epochs=1"]
LAST_LOSSES = [2.30994, 2.22882]  # of the run that the earlier version trained to its end


def earlier_order(index, size, seed, stream, epoch):
    """The order of the images until version 0.2.0."""
    fixed = tf.broadcast_to(tf.constant([seed, stream], tf.int64), [tf.size(index), 2])
    seeds = tf.concat([fixed, epoch[:, None]], axis=1)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=seeds, max_index=tf.constant(size - 1, tf.int64), rounds=8)


def test_a_run_of_an_earlier_version_goes_on(tmp_path, capfd, monkeypatch):
    """Faults seen caught: a renamed variable, a renamed setting, a renamed entry of layout.json."""
    monkeypatch.setattr(augment, "permute", earlier_order)  # else the last losses would be of other batches
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    call_command_line(*SETTINGS, f"--model_dir={folder}")
    assert f"resuming {folder} after epoch 2\n" in capfd.readouterr().out
    old, lines = ((path / "metrics.jsonl").read_text().splitlines() for path in (OLD_RUN, folder))
    assert lines[:2] == old
    epochs = [json.loads(line) for line in lines]
    assert [(epoch["epoch"], epoch["step"]) for epoch in epochs] == [(1, 13), (2, 26), (3, 39), (4, 52)]
    assert [epoch["loss"] for epoch in epochs[2:]] == pytest.approx(LAST_LOSSES, rel=0.003)
    assert json.loads((folder / "result.json").read_text())["steps"] == 52
    assert json.loads((folder / "data.json").read_text())["place"] == "digits"  # which that version did not keep
    assert json.loads((folder / "layout.json").read_text()) == json.loads((OLD_RUN / "layout.json").read_text())


def test_a_run_of_an_earlier_version_is_known_by_its_settings(tmp_path, capfd):
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        call_command_line(*SETTINGS, "--gin_param=attack.epsilon_pixels=4", f"--model_dir={folder}")
    assert ended.value.code == 2
    assert "attack.epsilon_pixels = 8, this one has 4" in capfd.readouterr().err
