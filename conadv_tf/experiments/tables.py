"""The paper's tables from results: measured means over seeds beside the paper's numbers, as Markdown and CSV."""

import csv
import dataclasses
import io
import itertools
import math
import operator
import statistics
from collections.abc import Callable, Sequence

from conadv_tf.experiments import labels, paper, power, tpu_times
from conadv_tf.experiments.study import METHOD_ROWS, Group, Scale, Study
from conadv_tf.run import leak

Value = Callable[[dict], float]

MISSING = "–"
LEAKING = "†"
LEAKING_LEGEND = (
    f"{LEAKING}n: n of the runs leak labels: in an epoch after the warm-up the adversarial half's training top-1 is "
    f"more than {leak.LEAK_POINTS:g} points above the clean half's (docs/method.md)."
)
TAUS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Number:
    """An entry of a table: a measurement of each seed, and how they are shown.

    Attributes:
      group: the group whose runs were measured; None for an estimate.
      values: a measurement a seed; none where nothing was measured.
      digits: digits after the point.
      failed: whether runs of the group failed.
      of_mean: whether ± is the standard error of the mean, not the standard deviation of the values.
      leaking: the number of the runs measured that leak labels (run/leak.py).
    """

    group: Group | None
    values: tuple[float, ...]
    digits: int = 2
    failed: bool = False
    of_mean: bool = False
    leaking: int = 0

    @property
    def spread(self) -> float:
        """The number behind ±: the sample standard deviation, or the standard error; 0 for a single run."""
        if len(self.values) < 2:
            return 0.0
        return statistics.stdev(self.values) / (math.sqrt(len(self.values)) if self.of_mean else 1)

    def text(self, seeds: int) -> str:
        """Mean ± spread, in brackets the number of runs where some of `seeds` are missing, and of those that leak."""
        if not self.values:
            return "failed" if self.failed else MISSING
        spread = f" ± {self.spread:.{self.digits}f}" if len(self.values) > 1 else ""
        missing = f" ({len(self.values)})" if len(self.values) < seeds and self.group else ""
        mark = f" {LEAKING}{self.leaking}" if self.leaking else ""
        return f"{statistics.mean(self.values):.{self.digits}f}{spread}{missing}{mark}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table: measured numbers and the paper's, by column."""

    label: str
    measured: dict[str, Number]
    paper: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
      name: name of the table's files.
      caption: what the numbers are.
      corner: what the columns are.
      columns: heads of the columns.
      lines: the lines.
      seeds: runs of an entry.
      compared: groups that the numbers are relative to.
    """

    name: str
    caption: str
    corner: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    seeds: int
    compared: tuple[Group, ...] = ()

    @property
    def groups(self) -> list[Group]:
        """The groups whose runs the table is made of."""
        return [*self.compared, *(number.group for number in self.numbers if number.group)]

    @property
    def numbers(self) -> list[Number]:
        """All measured entries."""
        return [number for line in self.lines for number in line.measured.values()]

    def markdown(self) -> str:
        """The table as Markdown: each line as measured, and below it what the paper reports, where it does."""
        markdown_rows = [[self.corner, *self.columns], ["---"] * (1 + len(self.columns))]
        for line in self.lines:
            markdown_rows.append([line.label, *(line.measured[column].text(self.seeds) for column in self.columns)])
            if line.paper:
                reported = [f"{line.paper[column]:g}" if column in line.paper else MISSING for column in self.columns]
                markdown_rows.append(["paper", *reported])
        legend = f"\n{LEAKING_LEGEND}\n" if any(number.leaking for number in self.numbers) else ""
        return f"{self.caption}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in markdown_rows) + f"\n{legend}"

    def csv(self) -> str:
        """The table as CSV, a line an entry: row, column, runs, mean, deviation, the paper's number, runs that leak."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "column", "runs", "mean", "standard_deviation", "paper", "leaking"])
        for line in self.lines:
            for column in self.columns:
                number = line.measured[column]
                values = number.values
                mean = round(statistics.mean(values), 6) if values else ""
                spread = round(statistics.stdev(values), 6) if len(values) > 1 else ""
                reported = line.paper.get(column, "")
                writer.writerow([line.label, column, len(values), mean, spread, reported, number.leaking])
        return text.getvalue()


class Tables:
    """Makes tables of a scale from the results there are; a table's `groups` tell which runs it needs.

    Args:
      scale: the scale.
      batches: the paper's batch sizes to show, as far as the scale has them.
      methods: the methods to show, as far as the scale has them; None: all that a table has of itself.
      study: knows the results.
      seeds: runs of an entry.
      folder: folder of the scale's results.
      failed: (group) → whether runs of the group failed.
    """

    def __init__(
        self,
        scale: Scale,
        batches: Sequence[str],
        methods: Sequence[str] | None,
        study: Study,
        seeds: int,
        folder: str,
        failed: Callable[[Group], bool],
    ):
        self._of_scale, self._scale = scale, scale.name
        self._study, self._seeds, self._folder, self._failed = study, seeds, folder, failed
        self.batches = tuple(batch for batch in scale.batches if batch in batches)
        self._asked = methods
        self._methods = tuple(method for method in scale.methods if methods is None or method in methods)

    def shown(self, *methods: str) -> tuple[str, ...]:
        """The methods of these that are to be shown."""
        return tuple(method for method in methods if method in self._methods)

    def chosen(self, *methods: str) -> tuple[str, ...]:
        """The methods asked for; these where none are."""
        return self.shown(*methods) if self._asked is None else self._methods

    def compared(self, *methods: str) -> tuple[str, ...]:
        """As `chosen`, of what is to be shown beside plain training."""
        return tuple(method for method in self.chosen(*methods) if method != "vanilla")

    def number(self, group: Group, value: Value, digits: int = 2) -> Number:
        """The number that the runs of a group make, each read by `value`."""
        runs = self._study.runs(group)
        values = tuple(map(value, runs))
        return Number(group, values, digits, self._failed(group), leaking=sum(map(leak.leaks, runs)))

    def by_batch(
        self, name: str, caption: str, methods: Sequence[str], value: Value, reported: dict, digits: int = 2
    ) -> Table:
        """A table of methods by batch sizes."""
        lines = tuple(
            Line(
                METHOD_ROWS[method].label,
                {batch: self.number(Group(self._scale, batch, method), value, digits) for batch in self.batches},
                {batch: reported[method][batch] for batch in self.batches if batch in reported.get(method, {})},
            )
            for method in methods
        )
        return Table(name, f"{caption} {self.about()}", "batch", self.batches, lines, self._seeds)

    def gains(self, methods: Sequence[str]) -> Table:
        """The gain of methods over vanilla, seed by seed: a seed's runs share first weights and order of images."""
        plain = {batch: Group(self._scale, batch, "vanilla") for batch in self.batches}
        lines = []
        for method in methods:
            measured = {batch: self._gain(Group(self._scale, batch, method), plain[batch]) for batch in self.batches}
            top1, plain_top1 = paper.TOP1.get(method, {}), paper.TOP1["vanilla"]
            reported = {batch: round(top1[batch] - plain_top1[batch], 2) for batch in self.batches if batch in top1}
            lines.append(Line(METHOD_ROWS[method].label, measured, reported))
        caption = (
            f"Gain over {METHOD_ROWS['vanilla'].label} of the same seed, points of test top-1. "
            f"{self.about('standard error')}"
        )
        return Table("gain", caption, "batch", self.batches, tuple(lines), self._seeds, tuple(plain.values()))

    def _gain(self, group: Group, plain: Group) -> Number:
        ours, theirs = ({run["seed"]: run for run in self._study.runs(one)} for one in (group, plain))
        seeds = sorted(ours.keys() & theirs.keys())
        gains = tuple(ours[seed]["test_top1"] - theirs[seed]["test_top1"] for seed in seeds)
        leaking = sum(leak.leaks(ours[seed]) for seed in seeds)
        failed = self._failed(group) or self._failed(plain)
        return Number(group, gains, failed=failed, of_mean=True, leaking=leaking)

    def about(self, spread: str = "standard deviation") -> str:
        """The end of every caption."""
        seeds = f"mean ± {spread} of {self._seeds} seeds" if self._seeds > 1 else "one seed"
        return f"Measured at the scale {self._scale}, {seeds}{self._plain_rates()}; paper: ResNet-50 on ImageNet."

    def _plain_rates(self) -> str:
        """Of a caption: the learning rates that plain training has chosen for all; empty where each has its own."""
        if not self._study.plain_rates:
            return ""
        label = METHOD_ROWS["vanilla"].label
        chosen = {batch: self._study.final(Group(self._scale, batch, "vanilla"))[:1] for batch in self.batches}
        rates = [f"{cell.rate:g} at {batch}" for batch, cells in chosen.items() for cell in cells if cell.rate]
        return f", all at the peak learning rates that are best for {label}, {', '.join(rates) or 'not yet chosen'}"

    def gaps(self, methods: Sequence[str]) -> Table:
        """Table 4: training and test accuracy and their difference."""
        parts = (
            ("training", "train_top1", paper.TRAIN_TOP1),
            ("test", "test_top1", paper.TOP1),
            ("gap", "generalization_gap", paper.GAP),
        )
        lines = []
        for method in methods:
            for part, key, reported in parts:
                table = self.by_batch("", "", [method], operator.itemgetter(key), reported)
                lines.append(dataclasses.replace(table.lines[0], label=f"{METHOD_ROWS[method].label}, {part}"))
        caption = "Table 4. Top-1, %, on all clean training images and all test images, and the gap in points."
        return Table("table4", f"{caption} {self.about()}", "batch", self.batches, tuple(lines), self._seeds)

    def times(self) -> Table:
        """Table 3: seconds of training; at the paper's own size also those estimated for its TPUs."""
        methods = self.shown("vanilla", "disadv", "conadv", "paired")
        caption = "Table 3. Seconds of training, on the machine the runs were made on."
        table = self.by_batch("table3", caption, methods, operator.itemgetter("wall_seconds"), paper.SECONDS, digits=0)
        if self._scale != "imagenet":
            return table
        estimated = {batch: tpu_times.seconds(self._folder, batch) for batch in self.batches}
        lines = []
        for name, label in labels.TABLE3_ESTIMATES.items():
            known = {batch: (values[name],) if name in values else () for batch, values in estimated.items()}
            numbers = {batch: Number(None, values, 0) for batch, values in known.items()}
            lines.append(Line(f"{label}, estimate", numbers, {}))
        about = (
            f" Estimate: of the updates on TPU {tpu_times.GENERATION}, {tpu_times.IMAGES_PER_CORE} images a core, "
            "by --preflight; nothing was measured for it."
        )
        return dataclasses.replace(table, caption=table.caption + about, lines=(*table.lines, *lines))

    def by_epsilon(self) -> Table:
        """Table 5: accuracy by perturbation."""
        scale, lines = self._of_scale, []
        for method, batch in itertools.product(self.shown("conadv", "conadv_aa"), self.batches):
            groups = {f"{epsilon:g}": Group(scale.name, batch, method, epsilon) for epsilon in scale.table5}
            measured = {column: self.number(group, _test_top1) for column, group in groups.items()}
            reported = {f"{epsilon:g}": top1 for epsilon, top1 in paper.BY_EPSILON.get((method, batch), {}).items()}
            reported = {column: reported[column] for column in groups if column in reported}
            lines.append(Line(f"{METHOD_ROWS[method].label}, {batch}", measured, reported))
        caption = f"Table 5. Test top-1, %, by epsilon in pixel levels. {self.about()}"
        columns = tuple(f"{epsilon:g}" for epsilon in scale.table5)
        return Table("table5", caption, "epsilon", columns, tuple(lines), self._seeds)

    def controls(self, methods: Sequence[str]) -> Table:
        """Methods beside plain training, at the largest batch size shown.

        All have the scale's one learning rate and ε, where it has those, else each the ones that are chosen for it.
        """
        batch, lines = self.batches[-1], []
        rate, epsilon = self._of_scale.control or (None, None)
        at = batch
        if rate:
            at += f", peak learning rate {rate:g} and epsilon {epsilon:g}"
        elif not self._study.plain_rates:  # which `about` has
            at += ", each at the peak learning rate that is best for it on validation images"
        plain = Group(self._scale, batch, "vanilla", rate=rate)
        for method in ("vanilla", *methods):
            adversarial = METHOD_ROWS[method].is_adversarial
            group = dataclasses.replace(plain, method=method, epsilon=epsilon if adversarial else None)
            gain = Number(None, ()) if method == "vanilla" else self._gain(group, plain)
            measured = {} if rate else {"rate": self._rate(group)}
            measured |= {
                "training": self.number(group, operator.itemgetter("train_top1")),
                "validation": self.number(group, operator.itemgetter("validation_top1")),
                "test": self.number(group, _test_top1),
                "gain": gain,
                "detectable": Number(None, (power.detectable(gain.values),) if len(gain.values) > 1 else ()),
            }
            lines.append(Line(METHOD_ROWS[method].label, measured, {}))
        shows = f"{power.POWER:g} (t-test at {power.SIGNIFICANCE:g})"
        caption = (
            f"What is attacked, and what is done in the place of an attack, at {at}. Top-1, %; gain in test top-1 over "
            f"{METHOD_ROWS['vanilla'].label} of the same seed in points, ± standard error; detectable: the gain that "
            f"so many seeds would show with probability {shows}. {self.about()}"
        )
        return Table("controls", caption, "method", tuple(measured), tuple(lines), self._seeds, (plain,))

    def _rate(self, group: Group) -> Number:
        """The peak learning rate that was chosen for a group; none where its recipe has the only one."""
        rates = tuple(cell.rate for cell in self._study.final(group)[:1] if cell.rate)
        return Number(None, rates, digits=0 if all(rate.is_integer() for rate in rates) else 2)

    def by_rate(self) -> Table:
        """Accuracy by the peak learning rates that the scale chooses from, at the largest batch size shown."""
        batch, lines = self.batches[-1], []
        columns = {f"{rate:g}": rate for rate in self._of_scale.rates}
        plain = {column: Group(self._scale, batch, "vanilla", rate=rate) for column, rate in columns.items()}
        for method in self._methods:
            label = METHOD_ROWS[method].label
            groups = {column: dataclasses.replace(group, method=method) for column, group in plain.items()}
            for part, key in (("training", "train_top1"), ("test", "test_top1"), ("gap", "generalization_gap")):
                value = operator.itemgetter(key)
                measured = {column: self.number(group, value) for column, group in groups.items()}
                lines.append(Line(f"{label}, {part}", measured, {}))
            if method != "vanilla":
                gains = {column: self._gain(groups[column], plain[column]) for column in columns}
                lines.append(Line(f"{label}, gain", gains, {}))
        caption = (
            f"Learning rates at {batch}. Top-1, %, by peak learning rate; gap of training and test in points; gain in "
            f"test top-1 over {METHOD_ROWS['vanilla'].label} of the same seed and rate in points, ± standard error. "
            f"{self.about()}"
        )
        compared = tuple(plain.values())
        return Table("rates", caption, "peak learning rate", tuple(columns), tuple(lines), self._seeds, compared)

    def staleness(self) -> Table:
        """Accuracy, and the share of the attack that is left, by the delay of the attacked weights."""
        lines = []
        for batch in self.batches if self.shown("conadv") else ():
            groups = {f"{tau}": Group(self._scale, batch, "conadv", tau=tau) for tau in TAUS}
            for part, value in (("test top-1, %", _test_top1), ("equal signs, %", _equal_signs)):
                measured = {column: self.number(group, value) for column, group in groups.items()}
                lines.append(Line(f"{batch}, {part}", measured, {}))
        caption = (
            "Delay. ConAdv by the delay tau of the weights it attacks; equal signs: of the input gradients at the "
            f"attacked and at the current weights, mean over the run. {self.about()}"
        )
        return Table("staleness", caption, "tau", tuple(map(str, TAUS)), tuple(lines), self._seeds)


def _test_top1(result: dict) -> float:
    return result["test_top1"]


def _equal_signs(result: dict) -> float:
    return 100 * result["theory"]["equal_signs"]
