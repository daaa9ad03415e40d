"""The paper's tables and figures by one command each: runs what is missing, then prints and draws.

    python reproduce.py --table=1 --scale=digits
    python reproduce.py --table=1 --table=2 --figure=2 --scale=cifar10 --data_dir=DIR --jobs=2
    python reproduce.py --table=1 --scale=imagenet --batches=96k --data_dir=gs://bucket/imagenet --tpu=local

Every run is a recipe of gin/ in a process of its own, kept below --results; a run that has finished is never run again,
one that was interrupted goes on. --jobs=0 runs nothing and prints what is there. A table is written as Markdown, CSV
and, with matplotlib, a plot. Learning rates and epsilon of the scale models are chosen on validation images, among runs
that do not leak labels, see study.py.
"""

import argparse
import dataclasses
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from conadv_tf import paths, terminal
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.experiments import figure4, jobs, paper, plots, tpu_times
from conadv_tf.experiments.study import METHOD_ROWS, SCALES, Cell, Group, Scale, Study
from conadv_tf.experiments.tables import Table, Tables
from conadv_tf.preflight.tpu_generations import GENERATIONS

Curves = Callable[[Group], list[list[dict]]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or figure: how it is made, and how it is drawn.

    Attributes:
      table: makes the table from the results there are; the table's groups tell which runs it needs.
      plot: draws (table, path, training curves of a group: an entry a seed, a dict an epoch).
    """

    table: Callable[[Tables], Table]
    plot: Callable[[Table, str, Curves], None]


def _accuracy(name: str, caption: str, reported: dict, *methods: str) -> Experiment:
    # A table of the paper has the paper's rows, or fewer; a figure those that are asked for.
    select = Tables.shown if name.startswith("table") else Tables.chosen

    def table(tables: Tables) -> Table:
        value = operator.itemgetter("test_top1")
        return tables.by_batch(name, f"{caption}. Test top-1, %.", select(tables, *methods), value, reported)

    return Experiment(table, lambda table, path, _: plots.by_batch(table, path, "test top-1, %"))


# The paper's methods and `paired`; attacks that cannot leak, and what ConAdv is held against, all without AutoAugment.
_PAPERS = ("vanilla", "aa", "disadv", "conadv", "paired", "conadv_aa")
_OTHERS = tuple(name for name in METHOD_ROWS if name not in _PAPERS and not METHOD_ROWS[name].is_augmented)

EXPERIMENTS = {
    "table1": _accuracy("table1", "Table 1", paper.TOP1, "vanilla", "aa", "disadv", "conadv", "paired"),
    "table2": _accuracy("table2", "Table 2", paper.TOP1, "vanilla", "aa", "conadv_aa"),
    "table3": Experiment(Tables.times, lambda table, path, _: plots.by_batch(table, path, "seconds of training")),
    "table4": Experiment(
        lambda tables: tables.gaps(tables.shown("vanilla", "conadv", "conadv_aa")),
        lambda table, path, _: plots.gaps(table, path),
    ),
    "table5": Experiment(Tables.by_epsilon, lambda table, path, _: plots.by_column(table, path, "test top-1, %")),
    "staleness": Experiment(Tables.staleness, lambda table, path, _: plots.by_column(table, path, "%")),
    "rates": Experiment(Tables.by_rate, lambda table, path, _: plots.gaps(table, path, table.corner)),
    "figure2": _accuracy("figure2", "Figure 2", paper.FIGURE2, "vanilla", "aa"),
    "gain": Experiment(
        lambda tables: tables.gains(tables.compared("aa", "disadv", "conadv", "paired", "conadv_aa")),
        lambda table, path, _: plots.by_batch(table, path, "points over ResNet"),
    ),
    "controls": Experiment(
        lambda tables: tables.controls(tables.compared(*_OTHERS)),
        lambda table, path, _: plots.by_line(table, path, "gain", "points of test top-1 over ResNet"),
    ),
    "curves": dataclasses.replace(
        _accuracy("curves", "Training curves, at their end", {}, *_PAPERS), plot=plots.training_curves
    ),
}


TABLES = [name for name in EXPERIMENTS if name.startswith("table")]
FIGURES = [*(name for name in EXPERIMENTS if name not in TABLES), "figure4"]


def _figure_name(given: str) -> str:
    return f"figure{given}" if given.isdigit() else given


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--table", **several, type="table{}".format, choices=TABLES, metavar="N", help="1 to 5")
    names = "2, 4, gain, controls, rates, staleness or curves"
    parser.add_argument("--figure", **several, type=_figure_name, choices=FIGURES, metavar="NAME", help=names)
    parser.add_argument("--scale", default="digits", choices=list(SCALES))
    parser.add_argument("--batches", help="of the paper, such as 32k,96k; default: all that the scale has")
    parser.add_argument("--rows", help=f"methods, of {','.join(METHOD_ROWS)}; default: all of the table")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each number")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; 0: run nothing, print what is there")
    for flag in ("rates", "epsilons"):
        parser.add_argument(f"--{flag}", type=_numbers, help="what to choose from, such as 10,16; default: the scale's")
    leaking = "choose rate and epsilon among runs that leak labels too (docs/method.md), not only where all do"
    parser.add_argument("--leaking", action="store_true", help=leaking)
    plain = "every method at the learning rate that is best for plain training at its batch, not at its own best"
    parser.add_argument("--plain_rates", action="store_true", help=plain)
    parser.add_argument("--results", type=terminal.path, default="results", help="where tables, plots and logs go")
    parser.add_argument(
        "--runs", type=terminal.path, help="where the runs are kept, local or gs://; default: RESULTS/SCALE/runs"
    )
    parser.add_argument("--gin_param", **several, help="a setting of every run; repeatable")
    parser.add_argument("--data_dir", type=terminal.path, help="as in train.py")
    for flag in ("tpu", "strategy"):
        parser.add_argument(f"--{flag}", help="as in train.py")
    parsed = parser.parse_args(given)
    if parsed.seeds < 1 or parsed.jobs < 0:
        parser.error(f"--seeds={parsed.seeds} must be at least 1 and --jobs={parsed.jobs} at least 0")
    if not parsed.table and not parsed.figure:
        parser.error("nothing to reproduce: pass --table=1 or --figure=2")
    return parsed


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers above 0 of a text such as "10,16"."""
    numbers = tuple(float(number) for number in text.split(","))
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError
    return numbers


_numbers.__name__ = "numbers above 0"  # argparse puts it into its line about an invalid value


def _scale(arguments: argparse.Namespace) -> Scale:
    """The scale of a call, with the learning rates and ε that it gives to choose from in the place of the scale's."""
    scale = SCALES[arguments.scale]
    if not (arguments.rates or arguments.epsilons or arguments.plain_rates):
        return scale
    # The one rate and ε at which the scale holds methods against each other give way to those that are chosen.
    rates, epsilons = arguments.rates or scale.rates, arguments.epsilons or scale.epsilons
    return dataclasses.replace(scale, rates=rates, epsilons=epsilons, control=None)


def _chosen(given: str | None, known: Sequence[str], flag: str) -> tuple[str, ...]:
    chosen = tuple(given.split(",")) if given else tuple(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ConfigError(f"{flag}={given}: {unknown[0]!r} is not of this scale: choose from {', '.join(known)}")
    return chosen


class Reproduction:
    """The work of one call of the command line.

    Args:
      arguments: the call's arguments.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._arguments, self._scale = arguments, arguments.scale
        scale = _scale(arguments)
        self._folder = os.path.join(arguments.results, self._scale)
        local = os.path.join(self._folder, "runs")
        self._folders = jobs.Folders(local, arguments.runs or local, arguments.gin_param)
        self._failed: dict[Cell, str] = {}
        self._not_compiled: list[str] = []
        self._study = Study(
            arguments.seeds, self._folders.result, self._is_settled, arguments.leaking, scale, arguments.plain_rates
        )
        batches = _chosen(arguments.batches, scale.batches, "--batches")
        methods = _chosen(arguments.rows, scale.methods, "--rows") if arguments.rows else None
        self._tables = Tables(
            scale, batches, methods, self._study, arguments.seeds, self._folder, failed=self._has_failed
        )
        asked = arguments.table + arguments.figure
        self._experiments = [EXPERIMENTS[name] for name in asked if name in EXPERIMENTS]
        self._has_figure4 = "figure4" in asked  # made of compiled programs, not of runs
        if self._has_figure4 and self._scale != "imagenet":
            raise ConfigError(f"--figure=4 is about TPUs, --scale={self._scale} is not: pass --scale=imagenet")
        self._has_estimates = self._scale == "imagenet" and EXPERIMENTS["table3"] in self._experiments
        for table in self._made():
            if not table.lines or not table.columns:
                shown = f"--rows={','.join(methods or scale.methods)} --scale={self._scale}"
                raise ConfigError(f"{table.name} has nothing to show of {shown}: drop it, or choose others")

    def run(self) -> None:
        """Runs and compiles what is missing, unless --jobs=0."""
        if not self._arguments.jobs:
            return
        # Settings and data that do not fit are found here, once, rather than at the end of every run.
        sources = {self._folders.setting(cell, "data.source") for cell in self._unsettled(guess=False)}
        self._compile()
        from conadv_tf import data  # takes TensorFlow with it, which a printed table does without

        try:
            for source in sources:
                data.check_source(source, self._arguments.data_dir)
            self._check_place_of_data()
        except ConfigError as error:
            if not (self._has_estimates or self._has_figure4):
                raise
            terminal.say(f"nothing is trained: {error}")
            return
        flags = {flag: getattr(self._arguments, flag) for flag in ("data_dir", "tpu", "strategy")}
        given = [f"--{flag}={value}" for flag, value in flags.items() if value]
        runner = jobs.Runner(self._folders, self._arguments.jobs, given, self._cost_left)
        self._failed = runner.failed
        if self._arguments.data_dir:
            runner.check_data(self._study.needed(self._groups()))
        runner.run(lambda: self._unsettled(guess=False))

    def _check_place_of_data(self) -> None:
        place = self._arguments.data_dir
        if place and not paths.exists(place):
            raise ConfigError(f"--data_dir={place} is not there: correct it, as every run would fail")

    def _compile(self) -> None:
        """Makes the estimates from compiled programs, which take no data; a failure is kept for the end."""
        try:
            if self._has_estimates:
                self._estimate_times()
            if self._has_figure4 and not os.path.isfile(self._scaling):
                generation = GENERATIONS[tpu_times.GENERATION]
                from conadv_tf.experiments import scaling

                figure4.write(scaling.points("96k_conadv.gin", generation), generation, self._folder)
        except (ConfigError, RunError) as error:
            self._not_compiled.append(str(error))

    @property
    def _scaling(self) -> str:
        return os.path.join(self._folder, "scaling.json")

    def _estimate_times(self) -> None:
        for batch in self._tables.batches:
            if batch in tpu_times.BATCHES and not tpu_times.seconds(self._folder, batch):
                tpu_times.estimate(self._folder, batch)

    def show(self) -> None:
        """Prints every table, then draws their plots; writes both."""
        os.makedirs(self._folder, exist_ok=True)
        made = self._made()
        for table in made:
            terminal.say(table.markdown())
            for suffix, text in (("md", table.markdown()), ("csv", table.csv())):
                with open(self._file(table, suffix), "w", encoding="utf-8") as file:
                    file.write(text)
        for experiment, table in zip(self._experiments, made, strict=True):
            _draw(experiment.plot, table, self._file(table, "png"), self._curves)
        if self._has_figure4:
            self._show_figure4()

    def failures(self) -> list[str]:
        """A line for every run and estimate that failed, in this call or, where not tried again, in an earlier one."""
        cells = self._study.needed(self._groups())
        failed = {cell: self._folders.failure(cell) for cell in cells if not self._folders.result(cell)}
        return self._not_compiled + [f"{cell.name}, {reason}" for cell, reason in failed.items() if reason]

    def _show_figure4(self) -> None:
        if not os.path.isfile(self._scaling):
            terminal.say("Figure 4 has not been made: run this without --jobs=0, minutes of compiling")
            return
        found, generation = figure4.read(self._folder)
        terminal.say(figure4.text(found, generation))
        _draw(plots.figure4, found, generation, os.path.join(self._folder, "scaling.png"))

    def _curves(self, group: Group) -> list[list[dict]]:
        return [self._folders.metrics(cell) for cell in self._study.final(group) if self._folders.result(cell)]

    def _file(self, table: Table, suffix: str) -> str:
        return os.path.join(self._folder, f"{table.name}.{suffix}")

    def _made(self) -> list[Table]:
        return [experiment.table(self._tables) for experiment in self._experiments]

    def _groups(self) -> list[Group]:
        return list(dict.fromkeys(group for table in self._made() for group in table.groups))

    def _unsettled(self, guess: bool) -> list[Cell]:
        return [cell for cell in self._study.needed(self._groups(), guess) if not self._is_settled(cell)]

    def _cost_left(self) -> float:
        return sum(cell.cost for cell in self._unsettled(guess=True))

    def _is_settled(self, cell: Cell) -> bool:
        """Tells whether a run is over. A run that failed in an earlier call is not, unless this call runs nothing."""
        failed = cell in self._failed or (not self._arguments.jobs and self._folders.failure(cell) is not None)
        return failed or self._folders.result(cell) is not None

    def _has_failed(self, group: Group) -> bool:
        return any(self._folders.failure(cell) for cell in self._study.needed([group]))


def _draw(plot: Callable[..., None], *arguments: Any) -> None:
    """Draws a plot, or prints what drawing it takes."""
    try:
        plot(*arguments)
    except ConfigError as error:
        terminal.say(str(error))


def main(given: Sequence[str] | None = None) -> None:
    """Entry point of `python reproduce.py` and `conadv-reproduce`."""
    remedy = "check space and permissions of --results and --runs"
    goes_on = "the same command goes on where it stopped"
    sys.exit(terminal.exit_code(lambda: _reproduce(_arguments(given)), goes_on, f"{remedy}; {goes_on}"))


def _reproduce(arguments: argparse.Namespace) -> int:
    reproduction = Reproduction(arguments)
    with jobs.ended_by_signals():
        reproduction.run()
    reproduction.show()
    failures = reproduction.failures()
    for failure in failures:
        terminal.say(f"failed: {failure}", sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    main()
