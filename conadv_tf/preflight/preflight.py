"""The preflight of a run for a TPU, without one: memory, time and cost of its method beside every other.

The figures come from programs compiled by the real TPU compiler; passes.py says which, and how they make up an update.
"""

import dataclasses
import functools
from collections.abc import Callable

from conadv_tf import methods
from conadv_tf.errors import ConfigError
from conadv_tf.preflight import tpu_compiler
from conadv_tf.preflight.compiled import CompiledPrograms, Lowerings
from conadv_tf.preflight.passes import (
    ATTACK,
    BOTH,
    END,
    PROGRAMS,
    VANILLA,
    Passes,
    contributed_bytes,
    share,
    used_bytes,
)
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.table import CostRow, calibration, table
from conadv_tf.preflight.tpu_compiler import Compiler, Cost
from conadv_tf.preflight.tpu_generations import GENERATIONS, GIB, Generation
from conadv_tf.run.build import Run
from conadv_tf.run.folder import RunFolder
from conadv_tf.run.report import versions as run_versions
from conadv_tf.run.tpu_runtime import parse_accelerator_type
from conadv_tf.training.sizes import count_numbers


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The result for one run on one slice.

    Attributes:
      rows: images of a micro-batch; the proposed number where the run's own do not fit.
      microbatches: micro-batches on each replica.
      proposal: a line that says so; empty where the run fits.
      methods: the run's own first.
      unavailable: a line for each method that the run's settings exclude.
      programs: what was compiled.
    """

    rows: int
    microbatches: int
    proposal: str
    methods: list[CostRow]
    unavailable: list[str]
    programs: dict[str, Cost]

    def text(self, generation: Generation) -> str:
        """The table and its remarks, for a person."""
        lines = [self.proposal] if self.proposal else []
        lines += [table(self.methods, generation)] if self.methods else []
        if self.microbatches > 1:
            lines.append(
                f"  An update is {self.microbatches:,} micro-batches of {self.rows} images (phased: twice as many), "
                "compiled as one, and one end of an update."
            )
        return "\n".join([*lines, *self.unavailable])


def report(built: Run, tpu: str | None, model_dir: str | None) -> str:
    """The preflight of a run for a person; `preflight.json` is written to `model_dir` if that is given.

    Args:
      built: the run, planned for the replicas of `tpu`.
      tpu: an accelerator type, such as "v3-512". Without one, or without a compiler, one line says what is missing.
      model_dir: local or gs://, or None.

    Raises:
      ConfigError: for a TPU generation that is not known.
      RunError: if the compiler fails, or a folder cannot be written.
    """
    if parse_accelerator_type(tpu or "") is None:
        return "  not compiled: --tpu=TYPE names the TPU to compile for, such as --tpu=v3-8"
    generation = find_generation(tpu or "")
    try:
        tpu_compiler.versions()
    except ConfigError as error:
        return f"  not compiled: {error}"
    if model_dir:
        RunFolder(model_dir).make()  # before minutes of compiling
    result = run_preflight(built, Compiler(generation))
    if model_dir:
        _write_json(built, tpu, result, model_dir)
    return result.text(generation)


def find_generation(tpu: str) -> Generation:
    """The generation of an accelerator type such as "v3-512" ("v5litepod-16" is v5e).

    Raises:
      ConfigError: if `tpu` is no accelerator type, or of no generation in GENERATIONS.
    """
    parsed = parse_accelerator_type(tpu)
    name = {"v5litepod": "v5e"}.get(parsed[0], parsed[0]) if parsed else None
    if name not in GENERATIONS:
        raise ConfigError(
            f"--tpu={tpu} names no TPU that can be compiled for: use one of {', '.join(GENERATIONS)} with a size, "
            "such as v3-512"
        )
    return GENERATIONS[name]


def run_preflight(built: Run, compiler: Compiler) -> Preflight:
    """Compiles what is needed and works out every method's row, on the slice that the run is planned for."""
    programs = CompiledPrograms(built, compiler)
    compared, excluded = methods.alternatives(built.model.method)
    unavailable = [f"  {line}" for line in excluded]
    rows, proposal = built.plan.rows, ""
    costs = programs.costs(_lowerings(built, rows, compared), rows)
    if not fits(built, rows, costs[compared[0].kind], compiler.generation):
        rows = fitting_rows(built, costs[compared[0].kind], programs, compiler.generation)
        proposal = _proposal(built, rows, compiler.generation)
        costs = programs.costs(_lowerings(built, rows, compared), rows) if rows else costs
    if not rows:
        return Preflight(built.plan.rows, built.plan.microbatches, proposal, [], unavailable, costs)
    passes = Passes(built, rows, compared, costs)
    table_rows = [passes.row(method, compiler.generation) for method in compared]
    return Preflight(rows, share(built) // rows, proposal, table_rows, unavailable, costs)


def _lowerings(built: Run, rows: int, compared: list[methods.Method]) -> Lowerings:
    """The programs that the rows of the table need, the run's own update first."""
    lower, own = Programs(built, rows), compared[0]
    wanted: dict[str, Callable[[], bytes]] = {
        own.kind: functools.partial(lower.update, own),
        VANILLA: functools.partial(lower.update, methods.vanilla()),
        END: lower.end_of_update,
    }
    further = {ATTACK: lower.attack, BOTH: lower.training_pass_with_attack}
    for method in compared[1:]:
        for part in method.passes.keys() & PROGRAMS.keys() - own.passes.keys():
            name, _ = PROGRAMS[part]
            wanted[name] = functools.partial(further[name], method)
    return wanted


def fits(built: Run, rows: int, cost: Cost, generation: Generation) -> bool:
    """Tells whether a replica's HBM holds the run with micro-batches of `rows` images, whose program costs `cost`."""
    return used_bytes(built, rows, built.model.method, cost) <= generation.hbm_bytes


def fitting_rows(built: Run, cost: Cost, programs: CompiledPrograms, generation: Generation) -> int:
    """The largest micro-batch that fits, compiled to make sure; 0 if there is none.

    Args:
      built: the run, which does not fit.
      cost: the cost of the run's update. Temporaries grow with the images, so it tells which sizes are worth compiling.
      programs: the compiler.
      generation: the generation of the TPU.
    """
    method, network = built.model.method, built.model.network
    held = 4 * (count_numbers(network.variables) * (1 + method.tau) + count_numbers(network.trainable_variables))
    for rows in (rows for rows in range(built.plan.rows - 1, 0, -1) if share(built) % rows == 0):
        expected = held + contributed_bytes(built, method) + cost.temp_bytes * rows / built.plan.rows
        if expected <= generation.hbm_bytes:
            update = functools.partial(Programs(built, rows).update, method)
            if fits(built, rows, programs.costs({method.kind: update}, rows)[method.kind], generation):
                return rows
    return 0


def _proposal(built: Run, rows: int, generation: Generation) -> str:
    refused = f"  micro-batches of {built.plan.rows} images do NOT fit into {generation.hbm_bytes / GIB:.2f} GiB: "
    if not rows:
        return refused + "nor does any smaller one; use another network, method or TPU"
    return refused + f"set train.microbatch_size={rows}, which does and is what follows"


def _write_json(built: Run, tpu: str | None, result: Preflight, model_dir: str) -> None:
    by_compiler, by_roofline = calibration()
    content = {
        "recipe": built.recipe,
        "tpu": tpu,
        "num_replicas": built.plan.num_replicas,
        "calibration": {"times_compiler": by_compiler, "times_roofline": by_roofline},
        "versions": {**run_versions(), **tpu_compiler.versions()},
        **dataclasses.asdict(result),
    }
    RunFolder(model_dir).write_preflight(content)
