"""The benchmarks' own arithmetic, and a small run of each that is quick enough."""

import importlib
import json
import os
import resource
import sys

import numpy as np
import pytest
import tensorflow as tf

from conadv_tf import methods
from conadv_tf.experiments import figure4, reproduce, scaling
from conadv_tf.preflight.table import Work, calibration
from conadv_tf.preflight.tpu_compiler import Cost
from conadv_tf.preflight.tpu_generations import GENERATIONS, allreduce_seconds

V3 = GENERATIONS["v3"]
PASSES = {
    "train": Work(optimal_seconds=0.050),
    "attack": Work(optimal_seconds=0.030),
    "train and attack": Work(optimal_seconds=0.055),
    "end": Work(optimal_seconds=0.004),
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(os.path.dirname(__file__), "..", "benchmarks"))
    return importlib.import_module


def test_step_time_ratios_goals_and_what_is_missed(benchmark):
    step_time = benchmark("step_time")
    times = {
        step_time.PLAIN: [10.0, 20.0, 30.0],
        step_time.VANILLA: [20.0, 20.0, 20.0],
        step_time.PAIRED: [40.0, 42.0, 44.0],
        step_time.MOVING_BFLOAT16: [40.0, 40.0, 50.0],
    }
    rows = step_time.table(times, 100)
    assert rows[step_time.PAIRED]["milliseconds"] == 42
    assert rows[step_time.PAIRED]["images_per_second"] == pytest.approx(100_000 / 42)
    assert rows[step_time.PAIRED]["ratio_to_plain_fit"] == pytest.approx(2.1)
    assert rows[step_time.PAIRED]["ratio_to_vanilla"] == pytest.approx([2.0, 2.1, 2.2])
    assert step_time.missed(rows) == [f"{step_time.PAIRED} / vanilla is 2.100, goal 2.05"]
    assert "| conadv, paired | 42.0 | 2,381 | 2.100 | 2.100 (2.000 to 2.200) |" in step_time.text(rows)


@pytest.mark.long
def test_step_time_measures_and_checks(benchmark, monkeypatch, tmp_path, capsys):
    step_time = benchmark("step_time")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step_time, "GOALS", {"conadv, phased": 0.01})
    command = ["step_time.py", "--network=digits_resnet", "--batch=4", "--steps=2", "--rounds=2"]
    monkeypatch.setattr(sys, "argv", [*command, "--only=conadv, phased", "--check"])
    with pytest.raises(SystemExit, match=r"missed: conadv, phased / vanilla is \d"):
        step_time.main()
    with open("step_time.json") as file:
        rows = json.load(file)["rows"]
    assert list(rows) == [step_time.PLAIN, step_time.VANILLA, "conadv, phased"]
    assert "| conadv, phased |" in capsys.readouterr().out


def test_tpu_cost_names_what_is_missed(benchmark):
    tpu_cost = benchmark("tpu_cost")

    def update(ms: float, cycles: float, temporary: int, carried: int = 0):
        return tpu_cost.Update(Cost(optimal_seconds=ms / 1000, cycles=cycles, temp_bytes=temporary), carried)

    updates = {
        tpu_cost.VANILLA: update(50.0, 70e6, 2_000_000_000),
        "shadow": update(140.0, 190e6, 2_200_000_000),
        "lookahead": update(130.0, 190e6, 2_350_000_000, 60_000_000),
        "paired": update(100.0, 140e6, 13_000_000_000),
    }
    temporary = "paired / vanilla, temporary memory: 6.500, goal ≤ 1.15"
    assert tpu_cost.missed(updates, 64, V3) == [
        "vanilla / tf-models ResNet-50, optimal: unknown, goal ≤ 0.89",
        "vanilla / tf-models ResNet-50, cycles: unknown, goal ≤ 0.9",
        "shadow / vanilla, optimal: 2.800, goal ≤ 2.75",
        temporary,
    ]
    assert tpu_cost.missed(updates, 192, V3) == ["paired, HBM spare at 192 images: 22 %, goal ≥ 30 %"]
    assert "| lookahead | 130.0 ms | 190.0 |" in tpu_cost.markdown(updates, V3)


def test_step_time_knows_every_schedule(benchmark):
    names = benchmark("step_time").keras_models("digits_resnet")
    assert {f"conadv, {schedule}" for schedule in methods.schedules_of("conadv")} < names.keys()


def test_art_trains_the_same_network(benchmark):
    """The peer's own loop, around the product's network."""
    pytest.importorskip("art", reason="needs adversarial-robustness-toolbox")
    step_time = benchmark("step_time")
    assert step_time.peer("digits_resnet", 4)(2) > 0


def test_scaling_adds_up_passes_and_the_all_reduce():
    by_compiler, _ = calibration()
    made = {}
    for method in scaling.compared():
        made[method.schedule or method.name] = scaling.point("a", method, 4096, PASSES, 100_000_000, V3)
    seconds = {"vanilla": 0.054, "disadv": 0.134, "shadow": 0.134, "paired": 0.109, "phased": 0.059}
    cores = {"vanilla": 64, "disadv": 64, "shadow": 64, "paired": 64, "phased": 128}
    for name, point in made.items():
        moving = allreduce_seconds(V3, cores[name], 100_000_000)
        assert point.replicas == cores[name]
        assert point.images_per_ms == pytest.approx(4.096 / (by_compiler * seconds[name] + moving))


def test_scaling_leaves_out_slices_there_are_not():
    phased = methods.conadv(schedule="phased")
    assert scaling.point("a", phased, 98_304, PASSES, 1, V3) is None
    assert scaling.point("a", methods.vanilla(), 98_304, PASSES, 1, V3).replicas == 1536


def test_scaling_prints_beside_the_paper_and_plots(tmp_path, capsys):
    found = [
        scaling.point(panel, method, batch, PASSES, 100_000_000, V3)
        for panel, (_, batches) in figure4.PANELS.items()
        for method in scaling.compared()
        for batch in batches
    ]
    found = [point for point in found if point]
    row = next(line for line in figure4.markdown("a", found, V3).splitlines() if line.startswith("| 32,768 | 512 |"))
    assert row.endswith("| – | 81.7 | ≈ 123 |")
    cells = figure4.ratios(found).splitlines()[-1].split(" | ")
    own = {(p.panel, p.method, p.batch): p.images_per_ms for p in found}
    assert float(cells[5]) == pytest.approx(own["b", "phased", 2048] / own["b", "vanilla", 2048], abs=0.006)
    figure4.write(found, V3, str(tmp_path / "imagenet"))
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--figure=4", "--scale=imagenet", "--jobs=0", f"--results={tmp_path}"])
    assert end.value.code == 0
    assert row in capsys.readouterr().out
    pixels = importlib.import_module("matplotlib.pyplot").imread(tmp_path / "imagenet" / "scaling.png")
    assert pixels.shape[1] >= 1800
    assert np.mean(pixels[..., :3] < 0.5) > 0.01


def test_a_full_disk_leaves_no_half_of_figure_4(tmp_path):
    """Seen to fail: half of the file, which every later call ended at with a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(tf.errors.OpError, match="File too large"):
            figure4.write([figure4.Point("a", "vanilla", 512, 8, 1.0, 1.0)], V3, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "scaling.json").exists()


def test_figure_4_that_was_not_made_says_how(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--figure=4", "--scale=imagenet", "--jobs=0", f"--results={tmp_path}"])
    assert end.value.code == 0
    assert "without --jobs=0" in capsys.readouterr().out


def test_figure_4_of_a_scale_model_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        reproduce.main(["--figure=4", "--scale=digits", "--jobs=0"])
    assert end.value.code == 2
    assert "pass --scale=imagenet" in capsys.readouterr().err
