"""`--preflight --tpu=all`: every slice that one can rent, from few programs of the real TPU compiler."""

import json
import os
import re
import sys
import threading

import pytest
import tensorflow as tf
from commands import ROOT, call_command_line

from conadv_tf import config
from conadv_tf.preflight import compiled, preflight, slices, tpu_compiler
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.tpu_generations import GENERATIONS, OFFERED
from conadv_tf.run.build import Run
from conadv_tf.run.build import build as build_run

pytestmark = pytest.mark.usefixtures("compile_cache")
SETTINGS = ["train.global_batch_size = 128", "train.microbatch_size = 2"]
ONE = ["v5litepod"]  # of its eight slices the largest has more chips than the batch has images


def build() -> Run:
    config.configure(["digits_conadv.gin"], SETTINGS)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    return build_run("digits_conadv", strategy, None, slices.least_replicas())


@pytest.fixture
def lowered(monkeypatch) -> list[int]:
    """The sizes of micro-batches whose update is lowered."""
    sizes: list[int] = []
    lower = Programs.update
    monkeypatch.setattr(Programs, "update", lambda self, method: (sizes.append(self._rows), lower(self, method))[1])
    return sizes


@pytest.mark.long
def test_a_program_serves_all_slices_of_a_generation_that_have_its_micro_batch(tmp_path, lowered, monkeypatch):
    text = slices.report(build(), str(tmp_path / "run"), ONE)
    assert lowered == [2, 1]
    saved = json.loads((tmp_path / "run" / "preflight.json").read_text())["slices"]
    by_chips = {slice_["chips"]: slice_ for slice_ in saved}
    assert by_chips.keys() == {1, 4, 8, 16, 32, 64, 128}
    assert {chips: (s["microbatches"], s["rows"]) for chips, s in by_chips.items() if chips in (1, 32, 128)} == {
        1: (64, 2),
        32: (2, 2),
        128: (1, 1),
    }
    assert all(slice_["fits"] for slice_ in saved)
    # An update of M micro-batches is M shares and one end, beside the all-reduce of its slice.
    seconds = {s["microbatches"]: s["cost"]["update_seconds"] - s["cost"]["allreduce_seconds"] for s in saved}
    assert (seconds[64] - seconds[16]) / 48 == pytest.approx((seconds[16] - seconds[8]) / 8)
    assert by_chips[1]["cost"]["allreduce_seconds"] == 0
    best = [slice_["cost"]["images_per_second"] / slice_["chips"] for slice_ in saved]
    assert best == sorted(best, reverse=True)
    factors = set()
    for slice_ in saved:
        assert slice_["chip_hours"] == pytest.approx(slice_["cost"]["hours"] * slice_["chips"])
        (line,) = re.findall(rf"^  {slice_['tpu']} .*$", text, re.MULTILINE)
        # Every row by the same measure: a table of two would order by measure.
        computing = slice_["cost"]["update_seconds"] - slice_["cost"]["allreduce_seconds"]
        factors.add(round(computing / slice_["cost"]["roofline_seconds"], 9))
        assert f" {slice_['microbatches']} × {slice_['rows']} " in line
    assert [round(factor, 2) for factor in factors] == [1.62]  # of the roofline, as the legend says
    assert "ms/update: 1.62 × roofline + all-reduce" in text
    assert "do not divide over them: v5litepod-256" in text
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lowered.clear()
    assert slices.report(build(), None, ONE) == text
    assert lowered == []


@pytest.mark.long
def test_generations_are_compiled_beside_each_other(tmp_path, monkeypatch):
    """Of the first five, one more than a generation has, none begins before all are asked for."""
    all_asked, compile_one = threading.Barrier(5, timeout=120), tpu_compiler.Compiler.compile
    begun: list[str] = []

    def begin(self, program, progress):
        begun.append(self.generation.name)
        if len(begun) <= 5:
            all_asked.wait()
        return compile_one(self, program, progress)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "compilers_at_once", lambda: 5)
    monkeypatch.setattr(tpu_compiler.Compiler, "compile", begin)
    found, _ = slices.compare(build(), ["v3", "v6e"])
    assert set(begun[:5]) == {"v3", "v6e"}
    assert {slice_.tpu.split("-")[0] for slice_ in found} == {"v3", "v6e"}


@pytest.mark.parametrize(("cores", "gigabytes", "expected"), [(2, 24, 2), (16, 32, 4), (64, 512, 64), (8, 4, 1)])
def test_as_many_compilers_as_cores_and_memory_allow(cores, gigabytes, expected, monkeypatch):
    pages = {"SC_PHYS_PAGES": gigabytes << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert compiled.compilers_at_once() == expected


@pytest.mark.long
def test_a_micro_batch_that_does_not_fit_gives_way_to_one_that_does(monkeypatch):
    monkeypatch.setattr(preflight, "fits", lambda built, rows, cost, generation: rows < 2)
    found, _ = slices.compare(build(), ONE)
    by_chips = {slice_.chips: slice_ for slice_ in found}
    assert (by_chips[4].fits, by_chips[4].rows, by_chips[4].microbatches) == (False, 1, 32)
    assert by_chips[128].fits
    monkeypatch.setattr(preflight, "fits", lambda *_: False)
    found, _ = slices.compare(build(), ONE)
    assert {(slice_.fits, slice_.cost, slice_.chip_hours) for slice_ in found} == {(False, None, 0.0)}


def test_every_slice_that_the_scripts_make_is_offered():
    """Of v4 and v5p they make any multiple of 8; all are of a generation that can be compiled for."""
    script = (ROOT / "tpu_scripts" / "common.sh").read_text()
    sizes = dict(re.findall(r'^    (\w+)\) sizes="(.*?)"', script, re.MULTILINE))
    assert sizes.keys() == OFFERED.keys()
    for name, text in sizes.items():
        if text != "multiples of 8":
            assert tuple(map(int, text.split())) == OFFERED[name]
    assert all(size % 8 == 0 for name in ("v4", "v5p") for size in OFFERED[name])
    assert {preflight.find_generation(f"{name}-8").name for name in OFFERED} == GENERATIONS.keys()


def test_the_command_line_compares_all_and_trains_on_one(monkeypatch, capsys):
    monkeypatch.setattr(tpu_compiler, "PACKAGES", ("libtpu-of-no-one",))
    call_command_line("--gin_file=96k_conadv.gin", "--tpu=all", "--preflight", "--gin_param=tfrecords.image_size=32")
    output = capsys.readouterr().out
    assert "global batch      98,304 clean images" in output
    assert "replicas " not in output
    assert "not compiled: libtpu-of-no-one is not installed" in output
    with pytest.raises(SystemExit) as ended:
        call_command_line("--tpu=all")
    assert ended.value.code == 2
    assert "error: --tpu=all is for --preflight" in capsys.readouterr().err


@pytest.mark.parametrize("tpu", ["v7x-8", "tpu7x-16", "tpu7x", "v7-64"])
def test_tpus_without_tensorflow_are_said(tpu, capsys):
    for flags in (["--preflight"], []):
        with pytest.raises(SystemExit) as ended:
            call_command_line(f"--tpu={tpu}", *flags)
        assert ended.value.code == 2
        line = f"error: --tpu={tpu}: there is no TensorFlow for TPU7x: use a v6e or an earlier one\n"
        assert capsys.readouterr().err == line
