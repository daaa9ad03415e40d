"""Exported step programs: JAX alone trains and evaluates as the Keras model does."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_close, fit, make_model, named_variables, random_batches, snapshot, some_of

from conadv_tf import methods
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.methods.attack import Attack
from conadv_tf.preflight import step_export, step_program
from conadv_tf.training import lars
from conadv_tf.training.learning_rate import warmup_poly_decay

XLA_STEP = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "xla_step.py")
# Few updates: a gradient that is 0 but for rounding turns a sign sooner or later.
ROWS, UPDATES = 8, 4
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs jax: pip install jax")


def model_of(method: methods.Method, microbatches: int):
    # From the first update on at a rate that moves the weights by half a per cent.
    rate = warmup_poly_decay(UPDATES, 2 * UPDATES, peak_learning_rate=1.0, warmup_epochs=0)
    # Compiled by XLA too, which draws other random starts from a seed than TensorFlow's own kernels.
    return make_model(method, lars.LARS(rate), microbatches=microbatches, seed=5, jit_compile=True)


def export(model, folder: str) -> None:
    facts = {"recipe": "test", "epochs": 1, "steps_per_epoch": UPDATES, "augmentation": "none", "seed": 0}
    facts["num_classes"] = 10
    step_export.export(model, tf.TensorSpec((ROWS, 8, 8, 1), tf.uint8), folder, facts)


def run_jax(folder: str, *flags: str) -> dict:
    """xla_step.py where neither TensorFlow nor this package can be imported; its JSON."""
    for name in ("tensorflow", "conadv_tf"):
        with open(os.path.join(folder, f"{name}.py"), "w") as file:
            file.write("raise ImportError('not installed here')")
    command = [sys.executable, XLA_STEP, f"--program={folder}", f"--out={folder}", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": folder}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles faster
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(os.path.join(folder, "xla_run.json" if "--in_order" in flags else "xla_step.json")) as file:
        return json.load(file) | {"printed": done.stdout}


def examples(count: int, seed: int = 4):
    """Images uint8 [count, ROWS, 8, 8, 1] and labels."""
    return random_batches(count, ROWS, seed=seed)


def save(path: str, train, test) -> None:
    splits = {"train": train, "test": test}
    arrays = {}
    for name, (images, labels) in splits.items():
        arrays |= {f"{name}_images": images.reshape(-1, 8, 8, 1), f"{name}_labels": labels.reshape(-1)}
    np.savez(path, **arrays)


CASES = {
    "vanilla": (methods.vanilla, 1),
    "shadow": (methods.conadv, 1),
    # Without a random start: Keras makes the first carry in TensorFlow's own kernels.
    "lookahead": (lambda: methods.conadv(Attack(random_start_probability=0.0), schedule="lookahead"), 1),
    "paired": (lambda: methods.conadv(schedule="paired"), 1),
    "phased": (lambda: methods.conadv(schedule="phased"), 2),
}


@pytest.mark.long
@needs_jax
@pytest.mark.parametrize("name", some_of(CASES, "phased"))
def test_jax_trains_as_keras_does(name, tmp_path):
    """Weights, BN statistics, momentum and shadow copies after several updates, mean loss, and exact top-1."""
    make, microbatches = CASES[name]
    method, folder = make(), str(tmp_path)
    model = model_of(method, microbatches)
    initial = snapshot(model)
    count = microbatches * (UPDATES // method.updates_per_batch + method.batches_ahead)
    train, (images, labels) = examples(count), examples(3, seed=6)
    test = images.reshape(-1, 8, 8, 1)[:19], labels.reshape(-1)[:19]  # the last batch is not full
    export(model, folder)
    save(f"{folder}/data.npz", train, test)
    result = run_jax(folder, f"--data={folder}/data.npz", "--in_order")

    logs = fit(model, *train, UPDATES)
    loaded = model_of(method, microbatches)
    step_export.load_weights(loaded.network, f"{folder}/weights.npz")
    now = {name: variable.numpy() for name, variable in named_variables(model.network).items()}
    assert_close({n: v.numpy() for n, v in named_variables(loaded.network).items()}, now, 2e-5)
    kernels = [n for n in now if n.endswith("kernel")]
    moved = {n: np.linalg.norm(now[n] - initial[f"network/{n}"]) / np.linalg.norm(now[n]) for n in kernels}
    assert min(moved.values()) > 0.003
    with np.load(f"{folder}/weights.npz") as saved:
        others = {n: v.numpy() for n, v in step_export.named_variables(model).items() if n[:5] in ("optim", "shado")}
        assert_close({n: saved[n] for n in others}, others, 2e-5)
    mean = {n: np.mean([log[n] for log in logs]) for n in method.metric_names}
    assert_close({n: result["epochs"][0][n] for n in mean}, mean, 2e-5)
    data = tf.data.Dataset.from_tensor_slices(test).batch(ROWS)
    assert result["test_top1"] == pytest.approx(100 * model.evaluate(data, verbose=0, return_dict=True)["top1"])


@pytest.mark.long
@needs_jax
def test_a_recipe_is_exported_timed_and_its_data_saved(tmp_path):
    folder = str(tmp_path / "program")
    settings = ["train.global_batch_size=32", "train.microbatch_size=16", "train.epochs=2"]
    settings += ["learning_rate.warmup_epochs=1", "digits.augmentation='crop_flip'"]
    flags = [f"--out={folder}", "--save_data", *(f"--gin_param={setting}" for setting in settings)]
    assert step_program.main(flags) == 0
    with open(f"{folder}/program.json") as file:
        about = json.load(file)
    assert (about["microbatches"], about["rows"], about["steps_per_epoch"]) == (2, 16, 1437 // 32)
    with np.load(f"{folder}/data.npz") as data:
        assert {name: len(data[name]) for name in data} == {
            "train_images": 1437,
            "train_labels": 1437,
            "test_images": 360,
            "test_labels": 360,
        }
    result = run_jax(folder, "--repeats=2", "--steps=2")
    assert result["finite"]
    assert len(result["milliseconds"]) == 2
    assert result["images_per_second"] == pytest.approx(1000 * 32 / result["median_milliseconds"])
    assert "| digits_conadv | cpu | 32 |" in result["printed"]


@needs_jax
def test_a_folder_without_a_program_is_one_line(tmp_path):
    command = [sys.executable, XLA_STEP, f"--program={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_program_that_changes_during_the_run_is_refused(tmp_path):
    late = methods.conadv(mixture=methods.Mixture(start_epoch=1))
    with pytest.raises(ConfigError, match=r"start_epoch=1.*start_epoch=0"):
        export(model_of(late, 1), str(tmp_path))


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert step_program.main([f"--out={tmp_path}", "--gin_param=train.epoch=1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_of_another_network_are_refused_whole(tmp_path):
    model = model_of(methods.vanilla(), 1)
    before = snapshot(model)
    file = str(tmp_path / "weights.npz")
    np.savez(file, **{"network/stem/conv/kernel": np.ones((3, 3, 1, 16), np.float32)})
    with pytest.raises(RunError, match=r"network/.* of shape None"):
        step_export.load_weights(model.network, file)
    assert_close(snapshot(model), before, 0)
