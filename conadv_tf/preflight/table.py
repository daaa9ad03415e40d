"""The rows of the preflight's table from compiled cost: time, images a second, hours."""

import dataclasses

from conadv_tf.preflight.tpu_compiler import Cost
from conadv_tf.preflight.tpu_generations import GENERATIONS, GIB, Generation, allreduce_seconds


@dataclasses.dataclass(frozen=True)
class Measured:
    """One update of a plain ResNet-50 in bfloat16 under LARS that MLPerf measured, and what the compiler says of it.

    Attributes:
      source: who measured.
      generation, replicas, rows: where, and images of a replica.
      seconds: measured; all-reduce and input are in it.
      compiler_seconds, roofline_seconds: libtpu 0.0.51 of tf-models' ResNet-50 at that size, None where its sum is
        rounded too coarsely, and the roofline of its work (benchmarks/tpu_cost.py has --generation and --rows). That is
        what MLPerf ran; `vanilla` here does without some of its traffic (expansion.py).
    """

    source: str
    generation: str
    replicas: int
    rows: int
    seconds: float
    compiler_seconds: float | None
    roofline_seconds: float

    @property
    def allreduce_seconds(self) -> float:
        return allreduce_seconds(GENERATIONS[self.generation], self.replicas, RESNET50_BYTES)


# training_results_v0.7, tpu-v3-32-TF2.0, result_0: 157.3 s for 4 epochs of 4,096 images an update.
MEASURED = Measured("MLPerf v0.7, TF2, v3-32", "v3", 32, 128, 0.1257, 0.09737, 0.07675)
# training_results_v1.0, tpu-v4-4096-TF, result_0: 1.058 s, the median of 13 blocks, for 156 updates of 32,768 images
# and an evaluation. It is left out: of so few images, latency and distributed BN are a large part.
LEFT_OUT = Measured("MLPerf v1.0, TF, v4-4096", "v4", 2048, 16, 0.00678, None, 0.002384)
RESNET50_BYTES = 4 * (25_557_032 + 53_120)
# Of the compiler's estimate; above it the roofline serves.
TOLERATED_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a program, or of a part of one, on one replica; see Cost. Parts add up."""

    flop: float = 0.0
    hbm_bytes: float = 0.0
    optimal_seconds: float = 0.0
    optimal_error: float = 0.0
    cycles: float = 0.0

    @classmethod
    def of(cls, cost: Cost) -> "Work":
        return cls(cost.flop, cost.hbm_bytes, cost.optimal_seconds, cost.optimal_error, cost.cycles)

    def __add__(self, other: "Work") -> "Work":
        return self._with(other, 1.0)

    def __sub__(self, other: "Work") -> "Work":
        return self._with(other, -1.0)

    def __mul__(self, times: float) -> "Work":
        return Work()._with(self, times)

    def _with(self, other: "Work", times: float) -> "Work":
        # Errors add up whichever way their values go.
        return Work(
            self.flop + times * other.flop,
            self.hbm_bytes + times * other.hbm_bytes,
            self.optimal_seconds + times * other.optimal_seconds,
            self.optimal_error + abs(times) * other.optimal_error,
            self.cycles + times * other.cycles,
        )

    def roofline_seconds(self, generation: Generation) -> float:
        """The least time at the peaks of a replica."""
        return max(self.flop / generation.peak_flops, self.hbm_bytes / generation.hbm_bandwidth)

    def compiler_seconds(self) -> float | None:
        """The compiler's lower bound; None where rounding may have moved it by more than TOLERATED_ERROR."""
        usable = self.optimal_error <= TOLERATED_ERROR * self.optimal_seconds
        return self.optimal_seconds if usable and self.optimal_seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class Workload:
    """The size of a run: replicas, clean images of a global batch, images that the whole run sees."""

    replicas: int
    global_batch_size: int
    images: int


@dataclasses.dataclass(frozen=True)
class CostRow:
    """One method of the table. Per replica and update where nothing else is said; a replica is a core or a chip.

    Attributes:
      name: the method's name.
      compiled: whether its update was compiled whole; otherwise its passes were, and add up.
      flop, hbm_bytes, cycles: see Cost.
      used_bytes, available_bytes: HBM.
      compiler_seconds: lower bound; None where it cannot be used.
      roofline_seconds: least time for FLOP and traffic at the peaks.
      allreduce_seconds: time to sum gradients and BN statistics.
      update_seconds: calibrated estimate of an update, its all-reduce included.
      images_per_second: clean images of the whole slice.
      hours, replica_hours: time of the whole recipe, without evaluation and start-up.
    """

    name: str
    compiled: bool
    flop: float
    hbm_bytes: float
    cycles: float
    used_bytes: float
    available_bytes: float
    compiler_seconds: float | None
    roofline_seconds: float
    allreduce_seconds: float
    update_seconds: float
    images_per_second: float
    hours: float
    replica_hours: float

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.available_bytes

    @property
    def seconds_by_compiler(self) -> float | None:
        """The time of an update from the compiler's estimate, calibrated; None where that cannot be used."""
        by_compiler, _ = calibration()
        return None if self.compiler_seconds is None else by_compiler * self.compiler_seconds + self.allreduce_seconds


def calibration() -> tuple[float, float]:
    """The measured time of an update without its all-reduce, over the compiler's estimate and over the roofline."""
    computing = MEASURED.seconds - MEASURED.allreduce_seconds
    assert MEASURED.compiler_seconds
    return computing / MEASURED.compiler_seconds, computing / MEASURED.roofline_seconds


def left_out_seconds() -> float:
    """The time of an update at LEFT_OUT as this module estimates it, all-reduce included."""
    by_compiler, by_roofline = calibration()
    compiled = LEFT_OUT.compiler_seconds
    computing = by_roofline * LEFT_OUT.roofline_seconds if compiled is None else by_compiler * compiled
    return computing + LEFT_OUT.allreduce_seconds


def estimated_seconds(work: Work, generation: Generation, roofline: bool = False) -> float:
    """Calibrated time of some work on one replica: from the compiler's estimate, or else, or always, the roofline."""
    by_compiler, by_roofline = calibration()
    seconds = None if roofline else work.compiler_seconds()
    return by_roofline * work.roofline_seconds(generation) if seconds is None else by_compiler * seconds


def make_row(
    name: str,
    compiled: bool,
    work: Work,
    used_bytes: float,
    reduced_bytes: int,
    generation: Generation,
    workload: Workload,
    roofline: bool = False,
) -> CostRow:
    """The row of a method.

    Args:
      name: the method's name.
      compiled: see CostRow.
      work: the work of one update on one replica.
      used_bytes: HBM of a replica.
      reduced_bytes: what each replica adds to the all-reduce.
      generation: the slice's generation.
      workload: the size of the run.
      roofline: whether the time is the roofline's even where the compiler's estimate is usable.
    """
    moving = allreduce_seconds(generation, workload.replicas, reduced_bytes)
    update = estimated_seconds(work, generation, roofline) + moving
    images_per_second = workload.global_batch_size / update
    hours = workload.images / images_per_second / 3600
    return CostRow(
        name,
        compiled,
        work.flop,
        work.hbm_bytes,
        work.cycles,
        used_bytes,
        generation.hbm_bytes,
        work.compiler_seconds(),
        work.roofline_seconds(generation),
        moving,
        update,
        images_per_second,
        hours,
        hours * workload.replicas,
    )


def table(rows: list[CostRow], generation: Generation) -> str:
    """The rows for a person, with what they mean below."""
    unit = generation.unit
    head = ["method", "TFLOP", "GB moved", "HBM", "compiler", "roofline", "all-reduce"]
    head += ["ms/update", "images/s", "hours", f"{unit}-hours"]
    lines = [head, *([_name(row), *_numbers(row)] for row in rows)]
    return "\n".join([aligned(lines), *_legend(rows, generation)])


def aligned(lines: list[list[str]]) -> str:
    """A table of cells, the head first; the first column is aligned to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for name, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join(["", name.ljust(widths[0]), *right]))
    return "\n".join(text)


def _name(row: CostRow) -> str:
    return row.name if row.compiled else f"≈ {row.name}"


def _numbers(row: CostRow) -> list[str]:
    spare = 100 * (1 - row.used_bytes / row.available_bytes)
    memory = f"{row.used_bytes / GIB:.2f} GiB, " + (f"{spare:.0f} % spare" if row.fits else "does NOT fit")
    milliseconds = [row.compiler_seconds, row.roofline_seconds, row.allreduce_seconds, row.update_seconds]
    return [
        figure(row.flop / 1e12),
        figure(row.hbm_bytes / 1e9),
        memory,
        *("–" if seconds is None else figure(1000 * seconds) for seconds in milliseconds),
        f"{row.images_per_second:,.0f}",
        figure(row.hours),
        figure(row.replica_hours),
    ]


def figure(value: float) -> str:
    """A number for people: three digits that count, and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def calibration_text(roofline: bool = False) -> list[str]:
    """Three lines on what the times of an update come from: `estimated_seconds` has the argument."""
    by_compiler, by_roofline = calibration()
    of_roofline = f"{by_roofline:.2f} × roofline"
    times = of_roofline if roofline else f"{by_compiler:.2f} × compiler (or {of_roofline})"
    estimate = left_out_seconds()
    error = 100 * (estimate / LEFT_OUT.seconds - 1)
    return [
        f"ms/update: {times} + all-reduce. {'This factor makes' if roofline else 'These factors make'} a plain "
        f"ResNet-50 take the {1000 * MEASURED.seconds:g} ms that MLPerf v0.7 measured",
        f"(TF2, v3-{MEASURED.replicas}, {MEASURED.rows} images a core); nothing was measured for this table. Input, "
        "collectives of distributed BN, evaluation and start-up are not in it.",
        f"A point left out of it, {LEFT_OUT.source}, {LEFT_OUT.rows} images a chip: {1000 * estimate:.3g} ms by "
        f"{'it' if roofline else 'these factors'}, {1000 * LEFT_OUT.seconds:.3g} ms measured, {error:+.0f} %.",
    ]


def _legend(rows: list[CostRow], generation: Generation) -> list[str]:
    unit = generation.unit
    legend = [
        f"TFLOP, GB, HBM and ms are of one {unit} and one update; of its HBM a program can use "
        f"{generation.hbm_bytes / GIB:.2f} GiB.",
        f"compiler: the TPU compiler's own lower bound; roofline: FLOP at {generation.peak_flops / 1e12:g} TFLOP/s or "
        f"traffic at {generation.hbm_bandwidth / 1e9:g} GB/s, the longer.",
        *calibration_text(),
    ]
    if not all(row.compiled for row in rows):
        legend.append("≈: put together from passes compiled one by one; the other rows were compiled whole.")
    if any(row.compiler_seconds is None for row in rows):
        legend.append("–: the compiler's sum is rounded too coarsely for this program; its row is from the roofline.")
    return [f"  {line}" for line in legend]
