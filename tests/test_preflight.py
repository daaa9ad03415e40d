"""The preflight of tiny runs, with the real TPU compiler."""

import dataclasses
import json
import re
import sys

import pytest
import tensorflow as tf

from conadv_tf import config, methods
from conadv_tf.errors import ConfigError
from conadv_tf.preflight import preflight, table, tpu_compiler
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.tpu_compiler import Compiler
from conadv_tf.preflight.tpu_generations import GENERATIONS
from conadv_tf.run.build import Run
from conadv_tf.run.build import build as build_run

pytestmark = pytest.mark.usefixtures("compile_cache")
SETTINGS = ["train.global_batch_size = 128", "train.microbatch_size = 8", "model.replicas_per_group = 1"]
KINDS = set(methods.SCHEDULES)


def build(replicas: int, *settings: str) -> Run:
    config.configure(["digits_conadv.gin"], [*SETTINGS, *settings])
    return build_run("digits_conadv", tf.distribute.OneDeviceStrategy("CPU:0"), None, replicas)


def compiler(name: str = "v3") -> Compiler:
    return Compiler(GENERATIONS[name])


def row_of(result: preflight.Preflight, kind: str) -> table.CostRow:
    (row,) = [row for row in result.methods if kind in row.name.replace(",", "").split()]
    return row


def test_every_method_has_its_row_and_the_numbers_agree(tmp_path):
    # 8 cores, 2 micro-batches of 8 images each.
    built = build(8)
    text = preflight.report(built, "v3-8", str(tmp_path / "new" / "run"))
    saved = json.loads((tmp_path / "new" / "run" / "preflight.json").read_text())
    assert (saved["tpu"], saved["num_replicas"], saved["rows"], saved["microbatches"]) == ("v3-8", 8, 8, 2)
    rows = {re.split("[, ]+", row["name"])[-1 if "τ" not in row["name"] else 1]: row for row in saved["methods"]}
    assert rows.keys() == KINDS
    assert [row["name"] for row in saved["methods"]][:2] == ["conadv, shadow, τ 1", "vanilla"]
    for word in ("TFLOP", "GB moved", "HBM", "compiler", "roofline", "all-reduce", "images/s", "core-hours", "MLPerf"):
        assert word in text
    for name, row in rows.items():
        assert row["name"] in text
        assert row["compiled"] == (name in ("shadow", "vanilla"))
        assert row["images_per_second"] == pytest.approx(128 / row["update_seconds"])
        epochs_images = built.plan.total_steps * 128
        assert row["hours"] == pytest.approx(epochs_images / row["images_per_second"] / 3600)
        assert row["replica_hours"] == pytest.approx(8 * row["hours"])
        assert 0 < row["used_bytes"] < row["available_bytes"]
        assert row["roofline_seconds"] + row["allreduce_seconds"] < row["update_seconds"]
    # docs/method.md: 8 forward passes against 3, or 7; `phased` has 4 over twice the images of a replica.
    for name, units in {"shadow": 8, "disadv": 8, "lookahead": 8, "paired": 7, "phased": 8}.items():
        assert rows[name]["flop"] / rows["vanilla"]["flop"] == pytest.approx(units / 3, rel=0.06)
    assert rows["vanilla"]["used_bytes"] < rows["paired"]["used_bytes"] < 5 * rows["vanilla"]["used_bytes"]


def test_a_second_preflight_compiles_nothing_and_says_the_same(monkeypatch):
    first = preflight.report(build(8), "v3-8", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(Programs, "update", lambda *_: pytest.fail("it lowered a program"))
    assert preflight.report(build(8), "v3-8", None) == first


@pytest.mark.long
def test_an_interruption_ends_the_compilations_under_way(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lower = Programs.update

    def interrupted(self, method):
        if method.name == "vanilla":
            raise KeyboardInterrupt  # the run's own update is being compiled, which takes longer than this
        return lower(self, method)

    monkeypatch.setattr(Programs, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preflight.report(build(8), "v3-8", None)
    assert not list(tmp_path.rglob("*.json")), "it was waited for"


@pytest.mark.long
def test_passes_add_up_to_what_is_compiled_whole():
    built = build(8)
    result = preflight.run_preflight(built, compiler())
    derived = row_of(result, "disadv")
    assert not derived.compiled
    whole, end = compiler().compile(Programs(built, 8).update(methods.disadv())), result.programs["end of an update"]
    for measure, tolerance in (("flop", 0.02), ("hbm_bytes", 0.1), ("cycles", 0.2)):
        # Two micro-batches and one end, beside which their sums are little.
        expected = 2 * getattr(whole, measure) - getattr(end, measure)
        assert getattr(derived, measure) == pytest.approx(expected, rel=tolerance)


@pytest.mark.long
def test_a_batch_that_does_not_fit_gets_the_largest_micro_batch_that_does():
    # Divisors of a replica's share: 1, 2, 4, 8 and those times a prime, which are all too large.
    built = build(16)
    rows = 8 * 5_000_011
    built.plan = dataclasses.replace(built.plan, rows=rows, microbatches=1, global_batch_size=16 * rows)
    result = preflight.run_preflight(built, compiler())
    assert (result.rows, result.microbatches) == (8, 5_000_011)
    text = result.text(GENERATIONS["v3"])
    assert "micro-batches of 40000088 images do NOT fit into 15.48 GiB: set train.microbatch_size=8" in text
    assert all(row.fits for row in result.methods)
    assert row_of(result, "vanilla").images_per_second > 0


@pytest.mark.long
def test_vanilla_and_methods_that_the_settings_exclude():
    built = build(16, "train.method = 'vanilla'", "attack.steps = 2")
    result = preflight.run_preflight(built, compiler("v5e"))
    # An attack of two steps is no by-product of the clean pass.
    assert {preflight_row.name for preflight_row in result.methods} == {
        "vanilla",
        "disadv",
        "conadv, shadow, τ 1",
        "conadv, lookahead",
        "sam",
        "sam_stale",
    }
    refused = [f"  no row for {name}" for name in ("paired", "phased", "noise")]
    assert [line.split(":")[0] for line in result.unavailable] == refused
    assert result.methods[0].name == "vanilla"
    # Twice two units of the attack and two training passes of three, to one.
    assert row_of(result, "disadv").flop / result.methods[0].flop == pytest.approx(10 / 3, rel=0.06)
    text = result.text(GENERATIONS["v5e"])
    assert "chip-hours" in text
    assert "from the roofline" in text


def test_without_a_compiler_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "PACKAGES", ("libtpu-of-no-one",))
    text = preflight.report(build(8), "v3-8", None)
    assert text == (
        "  not compiled: libtpu-of-no-one is not installed, and compiles for TPUs: pip install 'conadv_tf[preflight]'"
    )


def test_without_a_type_nothing_is_compiled():
    assert "--tpu=TYPE" in preflight.report(build(8), None, None)
    assert "--tpu=TYPE" in preflight.report(build(8), "local", None)


def test_an_unknown_generation_is_refused():
    with pytest.raises(ConfigError, match=r"--tpu=v9-8 names no TPU .* v2, v3, v4, v5e, v5p, v6e"):
        preflight.report(build(8), "v9-8", None)
    assert preflight.find_generation("v5litepod-16") is GENERATIONS["v5e"]


def test_the_estimate_is_calibrated_on_mlperfs_measurement():
    # What the compiler says of vanilla ResNet-50 at 128 images on v3, by either measure, gives the measured 125.7 ms.
    layout = table.Workload(32, 4096, 4096)
    work = table.Work(3.08e12, 34.54e9, 0.09737, 0.0004, 1.34e8)
    for error in (0.0004, 1.0):
        row = table.make_row(
            "vanilla",
            True,
            dataclasses.replace(work, optimal_error=error),
            5e9,
            table.RESNET50_BYTES,
            GENERATIONS["v3"],
            layout,
        )
        assert row.update_seconds == pytest.approx(0.1257, rel=0.01)
        assert (row.compiler_seconds is None) == (error == 1.0)


def test_the_point_that_is_left_out_is_estimated_as_any_other_and_its_error_printed():
    # The compiler on tf-models' ResNet-50, 16 images on v4; its sum is rounded too coarsely, so the roofline serves.
    work = table.Work(0.38432e12, 2.86046e9, 0.01335, 0.02397, 9.66e6)
    layout = table.Workload(2048, 32_768, 32_768)
    row = table.make_row("", True, work, 1e9, table.RESNET50_BYTES, GENERATIONS["v4"], layout)
    assert row.compiler_seconds is None
    assert table.left_out_seconds() == pytest.approx(row.update_seconds, rel=1e-3)
    error = row.update_seconds / table.LEFT_OUT.seconds - 1
    assert f"6.78 ms measured, {100 * error:+.0f} %" in table.calibration_text()[-1]
