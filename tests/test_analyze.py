"""Sharpness, loss surface and attacks against closed forms; analyses of real runs against their exported networks."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fast_python
import numpy as np
import pytest
import tensorflow as tf
from commands import call_command_line
from helpers import make_model, random_batches

from conadv_tf import data, methods
from conadv_tf.experiments import analysis, analyze, sharpness
from conadv_tf.training import losses

ROOT = Path(__file__).parents[1]
SHORT = ["--gin_param=train.epochs=3", "--gin_param=learning_rate.warmup_epochs=1"]
IMAGES = 100
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def quadratic(seed: int = 0, dimension: int = 12, rows: int = 50):
    """Mean over rows of ½ (x·w)² as a MeanLoss in unequal batches, and its Hessian XᵀX / rows."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, dimension)) * np.linspace(0.3, 2.0, dimension)
    w = tf.Variable(random.normal(size=(dimension, 1)), dtype=tf.float32)
    batches = [(tf.constant(part, tf.float32),) for part in (x[:32], x[32:])]
    return sharpness.MeanLoss(lambda x: 0.5 * (x @ w)[:, 0] ** 2, [w], batches), x.T @ x / rows


def test_hessian_vector_product_of_a_quadratic_is_exact():
    loss, hessian = quadratic()
    vector = np.random.default_rng(1).normal(size=12)
    np.testing.assert_allclose(loss.hessian_vector_product(vector), hessian @ vector, rtol=1e-4, atol=1e-5)


def test_lanczos_finds_the_largest_eigenvalue_and_how_far_it_may_be_off():
    loss, hessian = quadratic()
    found = sharpness.largest_eigenvalue(loss.hessian_vector_product, 12)
    spectrum = np.linalg.eigvalsh(hessian)
    assert found.value == pytest.approx(spectrum[-1], rel=1e-4)
    assert found.residual <= 2e-3 * spectrum[-1]
    few = sharpness.largest_eigenvalue(loss.hessian_vector_product, 12, max_products=2)
    assert few.products == 3  # the last one is for the residual
    assert few.residual > 10 * found.residual
    assert np.min(np.abs(few.value - spectrum)) <= few.residual


def test_largest_eigenvalue_is_signed_and_survives_an_exhausted_space():
    """Two distinct eigenvalues are found in two products; the larger one wins, not the one of larger magnitude."""
    found = sharpness.largest_eigenvalue(lambda v: np.array([-7.0, 2.0, 2.0]) * v, 3)
    assert found.value == pytest.approx(2.0, rel=1e-5)
    assert found.products <= 4
    assert sharpness.largest_eigenvalue(lambda v: 0.0 * v, 3).value == 0.0


def test_hessian_vector_product_of_a_network_is_the_slope_of_its_gradient():
    """Inference-mode batch normalisation included; central difference of first derivatives, in the same float32."""
    network = make_model(methods.vanilla(), trained=True, branches=("main", "adversarial")).network
    images, labels = random_batches(1, 16)
    batch = tf.constant(images[0], tf.float32), tf.constant(labels[0])
    variables = analysis.main_variables(network)
    assert len(variables) == len([v for v in network.trainable_variables if "/adversarial/" not in v.name])
    loss = sharpness.MeanLoss(
        lambda x, y: losses.SmoothedCrossEntropy(0.1)(y, network(x, training=False)), variables, [batch]
    )
    vector = np.random.default_rng(0).normal(size=sum(v.shape.num_elements() for v in variables))
    vector *= 1e-4 / np.linalg.norm(vector)  # further, and ReLUs turn; nearer, and float32 sees no difference

    def gradient(sign: float) -> np.ndarray:
        parts = np.split(sign * vector, np.cumsum([v.shape.num_elements() for v in variables])[:-1])
        for variable, part in zip(variables, parts, strict=True):
            variable.assign_add(part.reshape(variable.shape))
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(losses.SmoothedCrossEntropy(0.1)(batch[1], network(batch[0], training=False)))
        found = np.concatenate([g.numpy().ravel() for g in tape.gradient(value, variables)])
        for variable, part in zip(variables, parts, strict=True):
            variable.assign_sub(part.reshape(variable.shape))
        return found

    expected = (gradient(1.0) - gradient(-1.0)) / 2
    found = loss.hessian_vector_product(vector)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


def test_directions_have_the_norm_of_each_filter_and_leave_vectors_alone():
    random = np.random.default_rng(0)
    kernel = tf.Variable(random.normal(size=(3, 3, 2, 5)), dtype=tf.float32)
    gamma = tf.Variable(np.ones(5), dtype=tf.float32)
    one, other = (sharpness.filter_normalised_direction([kernel, gamma], seed) for seed in (0, 1))
    norms = [np.sqrt((values**2).sum((0, 1, 2))) for values in (kernel.numpy(), one[0], other[0])]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    np.testing.assert_allclose(norms[2], norms[0], rtol=1e-5)
    assert not one[1].any()
    assert abs(np.vdot(one[0], other[0])) < 0.5 * np.vdot(one[0], one[0])
    np.testing.assert_array_equal(one[0], sharpness.filter_normalised_direction([kernel, gamma], 0)[0])


def test_loss_surface_of_a_quadratic():
    loss, hessian = quadratic()
    (variable,) = loss.variables
    start = variable.numpy()
    directions = [sharpness.filter_normalised_direction(loss.variables, seed) for seed in (0, 1)]
    points = np.array([(0.0, 0.0), (0.5, 0.0), (-1.0, 2.0)])
    places = [start + a * directions[0][0] + b * directions[1][0] for a, b in points]
    expected = [0.5 * (w.T @ hessian @ w).item() for w in places]
    np.testing.assert_allclose(loss.along(directions, points), expected, rtol=1e-5)
    np.testing.assert_array_equal(variable.numpy(), start)


# Small, for at a margin of 16 nats the softmax is one-hot in float32, and its gradient no longer the closed form's.
LINEAR = np.array([[1.0, -0.4], [-0.3, 0.8], [0.5, 0.1], [-0.2, -0.9]], np.float32) / 50


@pytest.mark.parametrize("attack", ["FGSM", "PGD-20"])
@pytest.mark.parametrize("epsilon", [2.0, 8.0, 30.0])
def test_attack_on_a_linear_model_has_the_closed_form(attack, epsilon):
    """Of two classes, an image survives where its margin exceeds ε times the L1 norm of the difference of weights."""
    random = np.random.default_rng(3)
    images = random.uniform(60.0, 195.0, (300, 2, 2, 1)).astype(np.float32)  # nothing is clipped
    flat = images.reshape(300, 4)
    labels = (flat @ LINEAR).argmax(1).astype(np.int32)
    difference = LINEAR[:, 1] - LINEAR[:, 0]
    expected = np.mean(np.abs(flat @ difference) > epsilon * np.abs(difference).sum())
    assert 0 < expected < 1
    found = analysis.robust_accuracy(
        lambda x: tf.reshape(x, [-1, 4]) @ LINEAR,
        2,
        [
            (tf.constant(images[:200]), tf.constant(labels[:200])),
            (tf.constant(images[200:]), tf.constant(labels[200:])),
        ],
        analysis.ATTACKS[attack](epsilon),
    )
    assert found == pytest.approx(expected, abs=1e-6)


def command(*arguments: object) -> subprocess.CompletedProcess:
    line = [fast_python.path(), "-m", "conadv_tf.experiments.analyze", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two short runs on digits: vanilla; ConAdv, whose second BN set and shadow copy must not matter."""
    folder = tmp_path_factory.mktemp("runs")
    made = [folder / "vanilla", folder / "conadv"]
    for path in made:
        method = f"--gin_file=method/{path.name}.gin"
        call_command_line("--gin_file=digits_conadv.gin", method, f"--model_dir={path}", *SHORT)
    return made


@pytest.fixture(scope="module")
def analysed(runs, tmp_path_factory) -> tuple[Path, str]:
    """--out and what was printed; the runs are left as they were."""
    out = tmp_path_factory.mktemp("analysis") / "new"
    before = {path: path.stat().st_mtime_ns for folder in runs for path in folder.rglob("*")}
    done = command(*runs, f"--out={out}", f"--images={IMAGES}", "--epsilons=4,16", "--surface_points=3")
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for folder in runs for path in folder.rglob("*")} == before
    return out, done.stdout


def exported(run: Path, split: str):
    """The exported network of a run as a function to logits, and the first images and labels of a split."""
    exported_network = tf.saved_model.load(str(run / "export"))
    images, labels = data.load().examples(split, IMAGES)
    return lambda x: exported_network.predict(x)["logits"], tf.constant(images, tf.float32), labels


@pytest.mark.long
def test_analysis_agrees_with_the_exported_network(runs, analysed):
    found = json.loads((analysed[0] / "analysis.json").read_text())
    assert [each["run"] for each in found["runs"]] == list(map(str, runs))
    for run, of_run in zip(runs, found["runs"], strict=True):
        logits, images, labels = exported(run, "test")
        assert of_run["robustness"]["clean_top1"] == pytest.approx(
            100 * np.mean(np.argmax(logits(images), 1) == labels)
        )
        with tf.GradientTape() as tape:
            tape.watch(images)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits(images))
        attacked = tf.clip_by_value(images + 16.0 * tf.sign(tape.gradient(loss, images)), 0.0, 255.0)
        robust = 100 * np.mean(np.argmax(logits(attacked), 1) == labels)
        fgsm = [each["fgsm_top1"] for each in of_run["robustness"]["attacked"] if each["epsilon_pixels"] == 16]
        assert fgsm == pytest.approx([robust], abs=100 / IMAGES)  # a gradient of 0 but for rounding may turn its sign
        logits, images, labels = exported(run, "train")
        loss = np.mean(losses.SmoothedCrossEntropy(0.1)(labels, logits(images)))
        assert of_run["sharpness"]["loss"] == pytest.approx(loss, rel=1e-4)
        assert of_run["surface"]["loss"][1][1] == pytest.approx(loss, rel=1e-4)  # the middle of 3 × 3
        assert of_run["sharpness"]["lambda_max"] > 0
        assert of_run["sharpness"]["residual"] < 0.05 * of_run["sharpness"]["lambda_max"]


@pytest.mark.long
def test_pgd_is_no_weaker_than_one_step_and_the_loss_rises_along_directions(analysed):
    for of_run in json.loads((analysed[0] / "analysis.json").read_text())["runs"]:
        top1 = of_run["robustness"]["clean_top1"]
        for each in of_run["robustness"]["attacked"]:
            assert each["pgd20_top1"] <= each["fgsm_top1"] + 100 / IMAGES
            assert each["fgsm_top1"] <= top1
        rises = of_run["loss_rise"]
        assert all(each["max"] >= each["mean"] for each in rises)
        assert rises[-1]["max"] > rises[0]["max"]


@pytest.mark.long
def test_one_row_a_run_in_markdown_and_csv_from_the_same_numbers(runs, analysed):
    out, printed = analysed
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    with open(out / "analysis.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(runs)
    assert len({line.count("|") for line in table}) == 1
    for row, line, run, result in zip(rows, table[2:], runs, results, strict=True):
        assert row["run"] == str(run)
        assert row["method"] == result["method"]
        assert float(row["test_top1"]) == result["test_top1"]
        assert float(row["generalization_gap"]) == result["generalization_gap"]
        assert run.name in line
        assert f"{result['test_top1']:.2f}" in line
        assert f"{float(row['pgd20_top1_at_4']):.1f}" in line
    assert rows[0]["epsilon"] == ""


@pytest.mark.long
@needs_matplotlib
def test_plot_is_a_picture(analysed):
    assert (analysed[0] / "surface.png").read_bytes().startswith(b"\x89PNG")


QUICK = ["--images=20", "--epsilons=4", "--surface_points=2"]


@pytest.mark.long
def test_without_matplotlib_one_line_says_how_to_get_it_and_the_rest_is_there(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyze.main([str(runs[0]), f"--out={tmp_path}", *QUICK]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "pip install 'conadv_tf[plots]'" in line]
    assert len(notes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["analysis.csv", "analysis.json"]


def failure(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and the one line of an analysis that fails."""
    code = analyze.main(list(map(str, arguments)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


def test_a_folder_without_a_finished_run_is_named(runs, tmp_path, capsys):
    code, line = failure(capsys, runs[0], tmp_path / "nothing", f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "nothing" in line
    assert not (tmp_path / "nothing").exists()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.gin").write_text((runs[0] / "config.gin").read_text())
    code, line = failure(capsys, unfinished, f"--out={tmp_path / 'out'}")
    assert code == 1
    assert "result.json" in line
    (unfinished / "result.json").write_text((runs[0] / "result.json").read_text())
    assert analyze.main([str(runs[0]), str(unfinished), f"--out={tmp_path / 'out'}", *QUICK]) == 1
    printed = capsys.readouterr().err
    # One line, with no work before it.
    assert re.fullmatch(r"error: RUN=.*/unfinished: its last checkpoint is gone: .*\n", printed)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said_before_minutes_of_work(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert analyze.main([str(runs[0]), f"--out={tmp_path / 'file' / 'out'}", *QUICK]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*/file is not a directory: .*space and permissions of --out\n", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "RUN"),
        (["--epsilons=0"], "--epsilons"),
        (["--epsilons=4,x"], "--epsilons"),
        (["--images=0"], "--images"),
        (["--surface_points=1"], "--surface_points"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments, said, capsys):
    code, line = failure(capsys, *(["RUN"] if arguments else []), *arguments)
    assert code == 2
    assert said in line


def test_data_that_are_files_need_their_folder(runs, tmp_path, capsys):
    """The settings of a run on CIFAR-10; the data are asked for before anything is restored."""
    run = tmp_path / "cifar"
    run.mkdir()
    config = (runs[0] / "config.gin").read_text().replace("data.source = 'digits'", "data.source = 'tfrecords'")
    (run / "config.gin").write_text(config)
    (run / "result.json").write_text((runs[0] / "result.json").read_text())
    shutil.copytree(runs[0] / "checkpoints", run / "checkpoints")
    code, line = failure(capsys, run, f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "--data_dir" in line


def test_other_data_than_those_of_the_run_are_refused(runs, tmp_path, capsys):
    run = shutil.copytree(runs[0], tmp_path / "run")
    kept = json.loads((run / "data.json").read_text())
    kept["parts"]["train: labels"] = "others"
    (run / "data.json").write_text(json.dumps({**kept, "place": "/data/fold1"}))
    code, line = failure(capsys, run, f"--out={tmp_path / 'out'}")
    assert code == 2
    assert "/data/fold1 had then, digits has others (train: labels): pass the --data_dir of that run" in line
