"""The preflight of a recipe on every slice that one can rent: one table, what costs least first.

A program is compiled for each generation and size of a micro-batch. What else tells slices from each other, the number
of micro-batches and the all-reduce, is worked out (passes.py, tpu_generations.py).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from conadv_tf import config
from conadv_tf.errors import ConfigError
from conadv_tf.preflight import preflight, tpu_compiler
from conadv_tf.preflight.compiled import Asked, CompiledPrograms, costs_of
from conadv_tf.preflight.passes import END, Passes, share
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.table import CostRow, aligned, calibration_text, figure
from conadv_tf.preflight.tpu_compiler import Compiler, Cost
from conadv_tf.preflight.tpu_generations import GIB, OFFERED, Generation
from conadv_tf.run.build import Run, plan_for
from conadv_tf.run.folder import RunFolder
from conadv_tf.run.report import versions as run_versions
from conadv_tf.run.strategy import replicas_of

HEAD = ["TPU", "chips", "fits", "micro-batches", "HBM", "ms/update", "by compiler"]
HEAD += ["hours", "chip-hours", "images/s", "images/s a chip"]


@dataclasses.dataclass(frozen=True)
class SliceCost:
    """A recipe on one slice.

    Attributes:
      tpu: the accelerator type.
      chips: TPU chips.
      rows, microbatches: images of a micro-batch, the proposed number where the recipe's do not fit; micro-batches of a
        replica.
      fits: whether the recipe's own micro-batch fits.
      cost: the cost of the recipe's method; None where no micro-batch fits.
    """

    tpu: str
    chips: int
    rows: int
    microbatches: int
    fits: bool
    cost: CostRow | None

    @property
    def images_per_second_a_chip(self) -> float:
        return self.cost.images_per_second / self.chips if self.cost else 0.0

    @property
    def chip_hours(self) -> float:
        return self.cost.hours * self.chips if self.cost else 0.0


def least_replicas() -> int:
    """Replicas to build a recipe for that is to be looked at on any number: a pair of groups of its batch norm."""
    return 2 * max(1, config.setting("model.replicas_per_group") or 1)


def report(built: Run, model_dir: str | None, generations: Iterable[str] = OFFERED) -> str:
    """The table for a person; `preflight.json` is written to `model_dir` if that is given.

    Args:
      built: the run, planned for `least_replicas`.
      model_dir: local or gs://, or None.
      generations: what to compile for, by the names of OFFERED.

    Raises:
      RunError: if the compiler fails, or a folder cannot be written.
    """
    try:
        versions = tpu_compiler.versions()
    except ConfigError as error:
        return f"  not compiled: {error}"
    folder = RunFolder(model_dir) if model_dir else None
    if folder:
        folder.make()  # before minutes of compiling
    found, left_out = compare(built, generations)
    if folder:
        slices = [{**dataclasses.asdict(slice_), "chip_hours": slice_.chip_hours} for slice_ in found]
        content = {"recipe": built.recipe, "tpu": "all", "versions": {**run_versions(), **versions}, "slices": slices}
        folder.write_preflight(content)
    return _text(found, left_out)


def compare(built: Run, generations: Iterable[str] = OFFERED) -> tuple[list[SliceCost], list[str]]:
    """The costs of a recipe on every slice of some generations, best first; the slices that it does not divide over."""
    method = built.model.method
    update = functools.cache(lambda rows: Programs(built, rows).update(method))
    end = functools.cache(lambda: Programs(built, built.plan.rows).end_of_update())
    # Made first: each holds what the run was set to by now, which tells what has been compiled before.
    costs = {name: _Costs(built, _generation(name), update, end) for name in generations}
    planned, left_out = [], []
    for name in costs:
        for tpu in (f"{name}-{size}" for size in OFFERED[name]):
            try:
                plan = plan_for(built.settings, method, built.data.num_train, replicas_of(tpu, built.strategy))
            except ConfigError:  # numbers that do not divide
                left_out.append(tpu)
                continue
            planned.append((dataclasses.replace(built, plan=plan), tpu, costs[name]))
    _compile(dict.fromkeys((of_generation, on_slice.plan.rows) for on_slice, _, of_generation in planned))
    found = [_slice_cost(*of_slice) for of_slice in planned]
    return sorted(found, key=lambda slice_: -slice_.images_per_second_a_chip), left_out


class _Costs:
    """The costs of a run's update and of the end of one on a generation.

    Args:
      built: the run.
      generation: to compile for.
      update: lowers an update from one micro-batch of so many images.
      end: lowers the end of an update.
    """

    def __init__(self, built: Run, generation: Generation, update: Callable[[int], bytes], end: Callable[[], bytes]):
        self.generation, self.programs = generation, CompiledPrograms(built, Compiler(generation))
        self._kind, self._update, self._end = built.model.method.kind, update, end
        self.found: dict[int, dict[str, Cost]] = {}  # by the images of a micro-batch

    def asked(self, rows: int) -> Asked:
        """What is to be compiled for micro-batches of `rows` images."""
        return self.programs, {self._kind: functools.partial(self._update, rows), END: self._end}, rows

    def of(self, rows: int) -> dict[str, Cost]:
        """The costs by the names of the programs; of the update alone where it exceeds HBM."""
        if rows not in self.found:
            _compile([(self, rows)])
        return self.found[rows]


def _compile(asked: Iterable[tuple[_Costs, int]]) -> None:
    """Compiles updates of micro-batches of so many images, all beside each other."""
    asked = list(asked)
    for (costs, rows), found in zip(asked, costs_of([costs.asked(rows) for costs, rows in asked]), strict=True):
        costs.found[rows] = found


def _generation(name: str) -> Generation:
    return preflight.find_generation(f"{name}-{OFFERED[name][0]}")


def _slice_cost(on_slice: Run, tpu: str, costs: _Costs) -> SliceCost:
    method, rows, generation = on_slice.model.method, on_slice.plan.rows, costs.generation
    chips = on_slice.plan.num_replicas // generation.replicas_per_chip
    update = costs.of(rows)[method.kind]
    fits = preflight.fits(on_slice, rows, update, generation)
    if not fits:
        rows = preflight.fitting_rows(on_slice, update, costs.programs, generation)
        if not rows:
            return SliceCost(tpu, chips, on_slice.plan.rows, on_slice.plan.microbatches, False, None)
    # By the one measure that there is for all of them: the two disagree by more than most slices differ.
    row = Passes(on_slice, rows, [method], costs.of(rows)).row(method, generation, roofline=True)
    return SliceCost(tpu, chips, rows, share(on_slice) // rows, fits, row)


def _text(found: Sequence[SliceCost], left_out: Sequence[str]) -> str:
    lines = [list(HEAD), *(_cells(slice_) for slice_ in found)]
    legend = [
        "Best first: most images a second for each chip, which is fewest chip-hours; a chip-hour costs more of some",
        "generations than of others. fits: the recipe's micro-batch; where it does not, the largest that does follows.",
        *calibration_text(roofline=True),
        "by compiler: the same from the compiler's lower bound, as --tpu=TYPE has it; –: that is rounded too coarsely.",
    ]
    if left_out:
        legend.append(f"left out, because the recipe's numbers do not divide over them: {', '.join(left_out)}")
    return "\n".join([aligned(lines), *(f"  {line}" for line in legend)])


def _cells(slice_: SliceCost) -> list[str]:
    cost = slice_.cost
    layout = f"{slice_.microbatches:,} × {slice_.rows}"
    if cost is None:
        return [slice_.tpu, f"{slice_.chips:,}", "no", layout, *["–"] * 7]
    return [
        slice_.tpu,
        f"{slice_.chips:,}",
        "yes" if slice_.fits else "no",
        layout,
        f"{cost.used_bytes / GIB:.2f} of {cost.available_bytes / GIB:.2f} GiB",
        figure(1000 * cost.update_seconds),
        "–" if cost.seconds_by_compiler is None else figure(1000 * cost.seconds_by_compiler),
        figure(cost.hours),
        figure(slice_.chip_hours),
        f"{cost.images_per_second:,.0f}",
        figure(slice_.images_per_second_a_chip),
    ]
