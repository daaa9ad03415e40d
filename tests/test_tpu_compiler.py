import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorflow as tf

from conadv_tf.errors import ConfigError, RunError
from conadv_tf.preflight import hlo_text, tpu_compiler, tpu_generations
from conadv_tf.preflight.tpu_compiler import Compiler
from conadv_tf.preflight.tpu_generations import GENERATIONS, GIB

ROWS, INNER, COLUMNS = 512, 256, 1024

# 7 rounds of a loop, each with a 4-byte counter (its tile pads it to 512 bytes) and 10 + 1 cycles; a conditional whose
# dearer branch has 50 cycles; a copy of 8x128 floats on to the chip; an array whose rows are padded from 3 to 8.
PROGRAM = """HloModule test

%body (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %next = f32[8,128]{1,0:T(8,128)} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"10"}
}

%condition (q: f32[8,128]) -> pred[] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %go = pred[]{:T(512)} custom-call(%q), custom_call_target="Go", backend_config={"estimated_cycles":"1"}
}

%cheap (r: f32[3,128]) -> f32[3,128] {
  %r = f32[3,128]{1,0:T(8,128)} parameter(0)
  ROOT %once = f32[3,128]{1,0:T(8,128)} negate(%r), backend_config={"estimated_cycles":"5"}
}

%dear (s: f32[3,128]) -> f32[3,128] {
  %s = f32[3,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[3,128]{1,0:T(8,128)} exponential(%s), backend_config={"estimated_cycles":"50"}
}

ENTRY %main (a: f32[8,128], b: f32[3,128], c: pred[]) -> f32[3,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[3,128]{1,0:T(8,128)} parameter(1)
  %c = pred[]{:T(512)} parameter(2)
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %l = f32[8,128]{1,0:T(8,128)} while(%a), condition=%condition,body=%body,backend_config={"known_trip_count":{"n":"7"}}
  ROOT %either = f32[3,128]{1,0:T(8,128)} conditional(%c, %b, %b), branch_computations={%cheap, %dear}
}
"""


def test_reads_cycles_and_traffic_of_loops_branches_and_on_chip_copies():
    tile = 8 * 128 * 4
    cost = hlo_text.text_cost(PROGRAM)
    assert cost.cycles == 7 * 11 + 50
    # Each round reads and writes a tile, the branch too (its 3 rows are padded to 8); the copy reads one.
    assert cost.hbm_bytes == 7 * 2 * tile + 2 * tile + tile
    assert cost.custom_calls == 1
    assert cost.timed == 4


def product(counter: tf.Tensor, left: tf.Tensor, right: tf.Tensor):
    """A 64-bit counter is what the compiler's cost model does not know; every optimizer has one."""
    return counter + 1, tf.matmul(left, right)


@pytest.fixture(scope="module")
def program() -> bytes:
    specs = [tf.TensorSpec((), tf.int64), tf.TensorSpec((ROWS, INNER)), tf.TensorSpec((INNER, COLUMNS))]
    function = tf.function(product, jit_compile=True, autograph=False)
    return function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")


@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation_compiles_and_counts(name, program, tmp_path):
    cost = Compiler(GENERATIONS[name], str(tmp_path)).compile(program)
    assert cost.flop == pytest.approx(2 * ROWS * INNER * COLUMNS, rel=0.01)
    arguments = 4 * (ROWS * INNER + INNER * COLUMNS)
    assert arguments < cost.argument_bytes < arguments + 10_000
    assert cost.output_bytes >= 4 * ROWS * COLUMNS
    assert cost.cycles > 1000
    assert cost.over_bytes == 0
    # The compiler itself says about −3 s: three instructions handle the 64-bit counter.
    assert 0 <= cost.optimal_seconds < 1e-3
    assert 0 < cost.optimal_error < 1e-4


def test_an_unchanged_program_is_not_compiled_again(program, tmp_path, monkeypatch):
    compiler = Compiler(GENERATIONS["v3"], str(tmp_path))
    seconds: list[float] = []
    first = compiler.compile(program, seconds.append)
    assert seconds == sorted(seconds)
    assert seconds
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert compiler.compile(program) == first
    with pytest.raises(RunError, match=r"^the TPU compiler for v4 ended with exit code 1 .*conadv_tf\[preflight\]"):
        Compiler(GENERATIONS["v4"], str(tmp_path)).compile(program)
    (tmp_path / f"{compiler.key(program)}.json").write_text("{")
    with pytest.raises(RunError, match="v3"):
        compiler.compile(program)


def test_a_compiler_that_the_system_kills_is_no_fault_of_its_version(program, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -KILL $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(RunError, match=r"^the TPU compiler for v3 was killed, by the system where memory runs out: "):
        Compiler(GENERATIONS["v3"], str(tmp_path)).compile(program)


def child_of(parent: int, loaded: str) -> int | None:
    """A child of a process, once it has loaded a library."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if (
                int(stat.read_text().rpartition(")")[2].split()[1]) == parent
                and loaded in (stat.parent / "maps").read_text()
            ):
                return int(stat.parent.name)
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="libtpu is for Linux")
def test_the_compiler_ends_with_the_process_that_was_killed_while_it_waited(tmp_path):
    """Seen to fail: `kill` of a preflight left compilers, of up to 7 GB, at work for minutes."""
    code = (
        "from conadv_tf.preflight.tpu_compiler import Compiler, GENERATIONS\n"
        f"Compiler(GENERATIONS['v3'], {str(tmp_path)!r}).compile(b'no program')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = None
    try:
        while child is None:
            assert parent.poll() is None
            time.sleep(0.1)
            child = child_of(parent.pid, "jaxlib")
        os.kill(child, signal.SIGSTOP)  # it would end soon, with an error, by itself
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}/maps").exists() and Path(f"/proc/{child}/maps").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.kill()
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_a_damaged_program_is_one_clear_line(tmp_path):
    with pytest.raises(RunError, match="the TPU compiler for v3 ended with") as raised:
        Compiler(GENERATIONS["v3"], str(tmp_path)).compile(b"no program")
    assert "\n" not in str(raised.value)


def test_a_program_beyond_hbm_says_by_how_much(tmp_path):
    def large(left, right):
        return tf.reduce_sum(tf.sort(tf.matmul(left, right)), 0)

    specs = [tf.TensorSpec((100_000, 128)), tf.TensorSpec((128, 100_000))]
    function = tf.function(large, jit_compile=True, autograph=False)
    cost = Compiler(GENERATIONS["v3"], str(tmp_path)).compile(
        function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
    )
    assert cost.temp_bytes >= 4 * 100_000**2
    assert cost.over_bytes == pytest.approx(cost.temp_bytes - GENERATIONS["v3"].hbm_bytes, abs=0.02 * GIB)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(tpu_compiler, "PACKAGES", ("jax", "libtpu-of-no-one"))
    with pytest.raises(ConfigError, match=r"libtpu-of-no-one is not installed.*pip install 'conadv_tf\[preflight\]'"):
        tpu_compiler.versions()


@pytest.mark.parametrize(
    ("name", "replicas", "shape"),
    [
        ("v2", 8, (2, 2)),
        ("v3", 32, (4, 4)),
        ("v3", 512, (16, 16)),
        ("v3", 1024, (16, 32)),
        ("v4", 4, (1, 2, 2)),
        ("v4", 128, (4, 4, 8)),
        ("v5p", 6144, (16, 16, 24)),
        ("v5e", 8, (2, 4)),
        ("v6e", 256, (16, 16)),
        ("v6e", 1, (1, 1)),
    ],
)
def test_slices_have_google_clouds_shapes(name, replicas, shape):
    assert tpu_generations.slice_shape(GENERATIONS[name], replicas) == shape


def test_half_a_chip_is_no_slice():
    with pytest.raises(ConfigError, match="7 replicas are no slice of v3"):
        tpu_generations.slice_shape(GENERATIONS["v3"], 7)


def test_allreduce_time_by_hand():
    # A torus of 16 x 16 chips that send 1 GB/s: 2 · 255/256 s a GB. A mesh half as fast; 8 cores are 4 chips, 2 x 2.
    ring = dataclasses.replace(GENERATIONS["v3"], ici_bandwidth=1e9, wraps_at=16)
    hops = 2 * (8 + 8) * tpu_generations.HOP_SECONDS
    assert tpu_generations.allreduce_seconds(ring, 512, 10**9) == pytest.approx(2 * 255 / 256 + hops)
    mesh = dataclasses.replace(ring, wraps_at=32)
    hops = 2 * (15 + 15) * tpu_generations.HOP_SECONDS
    assert tpu_generations.allreduce_seconds(mesh, 512, 10**9) == pytest.approx(4 * 255 / 256 + hops)
    assert tpu_generations.allreduce_seconds(mesh, 8, 10**9) == pytest.approx(4 * 3 / 4, rel=1e-4)
    assert tpu_generations.allreduce_seconds(ring, 2, 10**9) == 0.0
