"""The paper's experiments as runs of ordinary recipes: which runs a number of a table is made of.

A scale is a model of ImageNet's runs with as many updates on less data (docs/results.md). A `Group` is one number: a
method at a batch size, the mean over seeds. Where a scale offers several learning rates or ε, the accuracy of the first
seed on validation images chooses one. No run trains on those images, every method chooses from the same rates, and test
images choose nothing. A run that leaks labels (run/leak.py) is chosen only where all do.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from conadv_tf import config
from conadv_tf.experiments import paper
from conadv_tf.run import leak

Results = Callable[["Cell"], dict | None]


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """A method as tables show it: one row of most of them.

    Attributes:
      label: what tables call the method.
      recipe: the method's file in gin/method.
      params: gin parameters over that file's.
    """

    label: str
    recipe: str
    params: tuple[str, ...] = ()

    @property
    def is_adversarial(self) -> bool:
        return self.recipe not in ("vanilla", "aa", "sam")

    @property
    def is_augmented(self) -> bool:
        return self.recipe.endswith("aa")

    def cost(self) -> float:
        """The cost of an update, for the time that is left: forward units, and AUTOAUGMENT_UNITS where augmented."""
        return _forward_units(self.recipe, self.params) + (AUTOAUGMENT_UNITS if self.is_augmented else 0.0)


# AutoAugment's share of an update. Its operations run on the CPU beside the network, and a run of a scale model has one
# core for both: there an update of plain training takes up to half as long
# again. An estimate, for the time that is left.
AUTOAUGMENT_UNITS = 1.5
_PAIRED = "conadv.schedule='paired'"
# The training gradient's own, in 6 forward units: what the paired schedule had when its runs were made.
TRUE_LABEL = "attack.label='smoothed'"
_PREDICTED = "attack.label='predicted'"
METHOD_ROWS = {
    "vanilla": MethodRow("ResNet", "vanilla"),
    "aa": MethodRow("+ AA", "aa"),
    "disadv": MethodRow("+ DisAdv", "disadv"),
    "conadv": MethodRow("+ ConAdv", "conadv"),
    "paired": MethodRow("+ ConAdv, paired", "conadv", (_PAIRED, TRUE_LABEL)),
    "paired_predicted": MethodRow("+ ConAdv, paired, predicted label", "conadv", (_PAIRED, _PREDICTED)),
    "paired_target": MethodRow("+ ConAdv, paired, random target", "conadv", (_PAIRED, "attack.goal='random_target'")),
    "paired_predicted_aa": MethodRow("+ ConAdv, paired, predicted label + AA", "conadv_aa", (_PAIRED, _PREDICTED)),
    "conadv_predicted": MethodRow("+ ConAdv, predicted label", "conadv", (_PREDICTED,)),
    "noise": MethodRow("+ noise", "noise"),
    "sam": MethodRow("+ SAM", "sam"),
    "sam_stale": MethodRow("+ SAM, stale ascent", "sam", ("train.method='sam_stale'",)),
    "conadv_aa": MethodRow("+ ConAdv + AA", "conadv_aa"),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """A model of the paper's runs.

    Attributes:
      name: the scale's folder in gin/scale; "imagenet" is the paper's own size and has the recipes of gin/.
      batches: the paper's batch sizes that the scale has.
      methods: the methods that the scale has, keys of METHOD_ROWS.
      rates: peak learning rates to choose from for every method and batch; empty: the recipe's.
      epsilons: ε to choose from once, by `paired` at 96k and `epsilon_rate`; empty: the recipe's.
      epsilon_rate: peak learning rate, one of `rates`.
      table5: epsilons of Table 5.
      control: peak learning rate and ε of all that is held against each other in `Tables.controls`; None: the recipe's.
      policy: AutoAugment's policy.
      cores: CPU cores of a run; None: all there are. One makes a run's numbers independent of how many run at once.
    """

    name: str
    batches: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHOD_ROWS)
    rates: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    epsilon_rate: float | None = None
    table5: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0, 12.0)
    control: tuple[float, float] | None = None
    policy: str = "cifar10"
    cores: int | None = 1

    def gin_files(self, batch: str, row: MethodRow) -> list[str]:
        if self.name != "imagenet":
            return [f"scale/{self.name}/{batch}.gin", f"method/{row.recipe}.gin"]
        whole = f"{batch}_{row.recipe}.gin"
        if os.path.isfile(os.path.join(config.recipe_folder(), whole)):
            return [whole]
        return [f"batch/{batch}.gin", f"method/{row.recipe}.gin"]


_LARGE = ("16k", "32k", "64k", "96k", "128k", "256k")
_CIFAR10: dict[str, Any] = {
    "rates": (10.0, 16.0, 24.0),
    "epsilons": (1.0, 2.0, 4.0),
    "epsilon_rate": 16.0,
    "control": (16.0, 4.0),  # the rate that is best for plain training on validation images
}
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "digits",
            _LARGE[1:],
            ("vanilla", "disadv", "conadv", "paired"),  # grey: no AutoAugment
            rates=(5.0, 10.0, 20.0),
            epsilons=(4.0, 8.0, 16.0),
            epsilon_rate=10.0,
        ),
        Scale("cifar10", _LARGE, **_CIFAR10 | {"control": (24.0, 4.0)}),
        Scale("cifar10_crop_flip", _LARGE, **_CIFAR10),
        Scale("cifar10_crop_flip_wide", ("96k",), **_CIFAR10),
        # The largest rate was added when plain training, on validation images, was best at the largest of those before.
        Scale(
            "cifar10_sgd",
            _LARGE[1:],
            rates=(0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
            epsilons=(2.0, 4.0),
            epsilon_rate=0.8,
        ),
        Scale("imagenet", paper.BATCHES, table5=tuple(map(float, paper.EPSILONS)), policy="imagenet", cores=None),
    )
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run: a recipe with its settings. The name of a cell is the folder that keeps the run."""

    scale: str
    batch: str
    method: str
    seed: int = 0
    rate: float | None = None
    epsilon: float | None = None
    tau: int = 1

    @property
    def name(self) -> str:
        settings = {"lr": self.rate, "e": self.epsilon, "tau": None if self.tau == 1 else self.tau, "s": self.seed}
        text = "_".join(f"{key}{value:g}" for key, value in settings.items() if value is not None)
        return f"{self.batch}/{self.method}_{text}"

    def gin_files(self) -> list[str]:
        return SCALES[self.scale].gin_files(self.batch, METHOD_ROWS[self.method])

    def gin_params(self) -> list[str]:
        row, scale = METHOD_ROWS[self.method], SCALES[self.scale]
        params = [*row.params, f"train.seed={self.seed}"]
        if row.is_augmented:
            params.append(f"autoaugment.policy='{scale.policy}'")
        if self.rate is not None:
            params.append(f"learning_rate.peak_learning_rate={self.rate}")
        if self.epsilon is not None:
            params.append(f"attack.epsilon_pixels={self.epsilon}")
        if self.tau != 1:
            params.append(f"conadv.tau={self.tau}")
        return params

    @property
    def cost(self) -> float:
        """The cost of a run beside others of its scale, whose runs all see as many images; see `MethodRow.cost`."""
        return METHOD_ROWS[self.method].cost()


@dataclasses.dataclass(frozen=True)
class Group:
    """A number of a table: the mean over seeds of a method at a batch size.

    Attributes:
      epsilon: None: the one chosen, or the recipe's.
      rate: peak learning rate; None: the one chosen, or the recipe's.
      tau: delay of the attacked weights, 1 unless delay is what the table is about.
    """

    scale: str
    batch: str
    method: str
    epsilon: float | None = None
    rate: float | None = None
    tau: int = 1


class Study:
    """The runs that groups are made of, as far as the results there are tell.

    Args:
      seeds: runs of a group.
      result: (cell) → result.json of the run, None where it has not finished.
      settled: (cell) → whether the run is over: finished, or failed.
      leaking: whether a run that leaks is chosen like others.
      scale: a scale with other learning rates and ε to choose from; None: each group's own.
      plain_rates: whether every method has the learning rate that is best for plain training at its batch, not its own.
    """

    def __init__(
        self,
        seeds: int,
        result: Results,
        settled: Callable[[Cell], bool],
        leaking: bool = False,
        scale: Scale | None = None,
        plain_rates: bool = False,
    ):
        self._seeds, self._result, self._settled, self._leaking = seeds, result, settled, leaking
        self._scale, self.plain_rates = scale, plain_rates

    def runs(self, group: Group) -> list[dict]:
        """The results that there are of the group's seeds; none before the group's settings are chosen."""
        return [result for result in map(self._result, self.final(group)) if result]

    def final(self, group: Group) -> list[Cell]:
        """The runs whose mean the group is; none before the group's settings are chosen."""
        _, chosen = self._chosen(group, guess=False)
        return self._with_seeds(chosen) if chosen else []

    def needed(self, groups: Iterable[Group], guess: bool = False) -> list[Cell]:
        """The runs of the groups that can be named now, without repetition.

        `guess` adds the runs that follow from choices yet to be made, as if the choices fell on the middle. The number
        of runs is then right, for an estimate of the time.
        """
        cells: dict[Cell, None] = {}
        for group in groups:
            candidates, chosen = self._chosen(group, guess)
            cells.update(dict.fromkeys(candidates + (self._with_seeds(chosen) if chosen else [])))
        return list(cells)

    def _with_seeds(self, cell: Cell) -> list[Cell]:
        return [dataclasses.replace(cell, seed=seed) for seed in range(self._seeds)]

    def _chosen(self, group: Group, guess: bool) -> tuple[list[Cell], Cell | None]:
        """Runs that choose the group's settings, and its first seed's run once they are chosen."""
        scale, row = self._scale or SCALES[group.scale], METHOD_ROWS[group.method]
        if group.rate is not None and (group.epsilon is not None or not row.is_adversarial):
            return [], Cell(scale.name, group.batch, group.method, 0, group.rate, group.epsilon, group.tau)
        choosing: list[Cell] = []
        own_epsilon = None  # the ε at which the learning rate is chosen
        if row.is_adversarial and scale.epsilons:
            first = Cell(scale.name, "96k", "paired", 0, scale.epsilon_rate)
            candidates = [dataclasses.replace(first, epsilon=epsilon) for epsilon in scale.epsilons]
            choosing = candidates if len(candidates) > 1 else []  # of one there is no choice
            best = self._best(candidates, guess) if choosing else candidates[0]
            if not best:
                return choosing, None
            own_epsilon = best.epsilon
        cell = Cell(scale.name, group.batch, group.method, 0, group.rate, own_epsilon)
        if scale.rates and group.rate is None:
            tried = Cell(scale.name, group.batch, "vanilla") if self.plain_rates else cell
            candidates = [dataclasses.replace(tried, rate=rate) for rate in scale.rates]
            choosing = choosing + candidates
            best = self._best(candidates, guess)
            if not best:
                return choosing, None
            cell = dataclasses.replace(cell, rate=best.rate)
        # The recipe's own ε stays unnamed, so that what Table 1 has run is not run again for Table 5.
        usual = own_epsilon if scale.epsilons else _recipe_epsilon(*cell.gin_files())
        epsilon = own_epsilon if group.epsilon in (None, usual) else group.epsilon
        return choosing, dataclasses.replace(cell, epsilon=epsilon, tau=group.tau)

    def _best(self, candidates: Sequence[Cell], guess: bool) -> Cell | None:
        """The run that does best on the validation images, the first of equals; None before all are settled.

        One that leaks is best only where all do, unless leaking runs count like others.
        """
        if not all(map(self._settled, candidates)):
            return candidates[len(candidates) // 2] if guess else None
        finished = [(cell, result) for cell in candidates if (result := self._result(cell))]

        def merit(pair: tuple[Cell, dict]) -> tuple[bool, float]:
            return self._leaking or not leak.leaks(pair[1]), pair[1]["validation_top1"]

        return max(finished, key=merit)[0] if finished else None


@functools.cache  # asked for every run each time that progress is shown
def _forward_units(recipe: str, params: tuple[str, ...]) -> float:
    """The cost of an update of a method in forward passes over the batch, as the method itself counts them."""
    from conadv_tf import methods  # takes TensorFlow with it, which a printed table does without

    config.configure([f"method/{recipe}.gin"], params)
    return methods.make_method(config.setting("train.method")).forward_units


@functools.cache  # asked for every group each time that progress is shown
def _recipe_epsilon(*gin_files: str) -> float | None:
    """ε of a recipe; None where it has no attack."""
    return config.bindings(gin_files).get("attack.epsilon_pixels")
