"""Which runs a number of a table is made of: choices on validation images, seeds, and what is run once for several."""

import dataclasses
import itertools

import numpy as np
import pytest

from conadv_tf import config
from conadv_tf.experiments import paper, power
from conadv_tf.experiments.study import METHOD_ROWS, SCALES, Cell, Group, Study

SMALL = [name for name in SCALES if name != "imagenet"]


def test_a_gain_that_is_detectable_is_detected_as_often_as_said():
    """Simulated, with the critical values of a printed table of Student's t."""
    random = np.random.default_rng(0)
    for count, critical in ((3, 4.303), (6, 2.571), (24, 2.069)):
        pairs = random.normal(0.3, 2.0, count)
        gain = power.detectable(pairs) / np.std(pairs, ddof=1)
        drawn = random.normal(gain, 1.0, (100_000, count))
        found = np.abs(drawn.mean(1)) / (drawn.std(1, ddof=1) / np.sqrt(count)) > critical
        assert abs(found.mean() - 0.8) < 0.005


class Records:
    """Results by cell; what is not in `validation` has not been run."""

    def __init__(
        self, validation: dict[Cell, float], failed: tuple[Cell, ...] = (), leaks: dict[Cell, float] | None = None
    ):
        self.validation, self.failed, self.leaks = validation, failed, leaks or {}

    def result(self, cell: Cell) -> dict | None:
        top1 = self.validation.get(cell)
        # The test accuracy points the other way: nothing may be chosen by it.
        if top1 is None:
            return None
        leak = {"leak_largest": self.leaks[cell]} if cell in self.leaks else {}
        return {"validation_top1": top1, "test_top1": 100 - top1, "seed": cell.seed, **leak}

    def settled(self, cell: Cell) -> bool:
        return cell in self.validation or cell in self.failed

    def study(self, seeds: int = 3, leaking: bool = False) -> Study:
        return Study(seeds, self.result, self.settled, leaking)


def candidates(method: str, batch: str, epsilon: float | None = None, scale: str = "cifar10") -> list[Cell]:
    return [Cell(scale, batch, method, 0, rate, epsilon) for rate in SCALES[scale].rates]


def epsilon_candidates(scale: str = "cifar10") -> list[Cell]:
    rates = SCALES[scale].rates
    return [Cell(scale, "96k", "paired", 0, rates[len(rates) // 2], epsilon) for epsilon in SCALES[scale].epsilons]


def test_a_plain_method_tries_every_rate_then_runs_the_best_on_all_seeds():
    group, tried = Group("cifar10", "64k", "vanilla"), candidates("vanilla", "64k")
    assert Records({}).study().needed([group]) == tried
    assert Records({tried[0]: 50.0, tried[1]: 60.0}).study().needed([group]) == tried  # the last is not there yet
    known = Records(dict(zip(tried, (50.0, 60.0, 55.0), strict=True)))
    seeds = [dataclasses.replace(tried[1], seed=seed) for seed in range(3)]
    assert known.study().needed([group]) == [*tried, *seeds[1:]]
    assert known.study().final(group) == seeds
    assert [result["seed"] for result in known.study().runs(group)] == [0]


def test_an_adversarial_method_first_chooses_epsilon_once_for_all():
    groups = [Group("cifar10", batch, method) for batch in ("32k", "96k") for method in ("disadv", "conadv")]
    first = epsilon_candidates()
    assert Records({}).study().needed(groups) == first
    best = first[2]
    known = dict.fromkeys(first, 40.0) | {best: 41.0}
    expected = [*first]
    for group in groups:
        expected += candidates(group.method, group.batch, best.epsilon)
    assert Records(known).study().needed(groups) == expected


def test_runs_of_several_tables_are_run_once():
    tried = candidates("vanilla", "64k")
    known = Records(dict.fromkeys(tried, 50.0))
    twice = known.study().needed([Group("cifar10", "64k", "vanilla")] * 2)
    assert len(twice) == len(set(twice)) == 5
    assert known.study().final(Group("cifar10", "64k", "vanilla"))[0] == tried[0]  # the first of equals


def test_a_failed_candidate_is_left_out_and_a_choice_of_none_is_no_choice():
    group, tried = Group("cifar10", "64k", "vanilla"), candidates("vanilla", "64k")
    one_failed = Records({tried[0]: 50.0, tried[1]: 55.0}, (tried[2],))
    assert one_failed.study().final(group)[0] == tried[1]
    all_failed = Records({}, tuple(tried))
    assert all_failed.study().final(group) == []
    assert all_failed.study().needed([group]) == tried


def test_a_run_that_leaks_is_chosen_only_where_all_do():
    group, first = Group("cifar10", "64k", "paired"), epsilon_candidates()
    known = dict(zip(first, (40.0, 41.0, 45.0), strict=True))
    for epsilon in SCALES["cifar10"].epsilons:
        known |= dict(zip(candidates("paired", "64k", epsilon), (50.0, 55.0, 53.0), strict=True))

    def chosen(leaks: dict[Cell, float], leaking: bool = False) -> tuple[float, float]:
        cell = Records(known, leaks=leaks).study(leaking=leaking).final(group)[0]
        return cell.epsilon, cell.rate

    assert chosen({first[2]: 2.0}) == (4.0, 16.0)  # no more than LEAK_POINTS
    some = {first[2]: 2.1, candidates("paired", "64k", 2.0)[1]: 40.0}
    assert chosen(some) == (2.0, 24.0)
    assert chosen(some, leaking=True) == (4.0, 16.0)
    assert chosen(dict.fromkeys(known, 30.0)) == (4.0, 16.0)


def test_another_epsilon_or_delay_keeps_the_rate_that_was_chosen():
    first = epsilon_candidates()
    known = {cell: 40.0 + cell.epsilon for cell in first}
    epsilon = first[-1].epsilon
    tried = candidates("conadv", "32k", epsilon)
    known |= dict(zip(tried, (30.0, 20.0, 10.0), strict=True))
    study = Records(known).study()
    swept = study.final(Group("cifar10", "32k", "conadv", epsilon=12.0))
    assert {(cell.rate, cell.epsilon, cell.tau) for cell in swept} == {(tried[0].rate, 12.0, 1)}
    delayed = study.final(Group("cifar10", "32k", "conadv", tau=4))
    assert {(cell.rate, cell.epsilon, cell.tau) for cell in delayed} == {(tried[0].rate, epsilon, 4)}


def test_a_rate_that_is_given_is_not_chosen():
    study = Records({}).study()
    group = Group("cifar10_sgd", "96k", "vanilla", rate=0.4)
    assert {(cell.rate, cell.tau) for cell in study.final(group)} == {(0.4, 1)}
    assert study.needed([group]) == study.final(group)
    # epsilon is still chosen first
    assert {cell.rate for cell in study.needed([dataclasses.replace(group, method="paired")])} == {0.8}


def test_other_rates_and_epsilons_are_chosen_from_in_the_place_of_the_scales():
    group = Group("cifar10", "256k", "paired")
    tried = [Cell("cifar10", "256k", "paired", 0, rate, 4.0) for rate in (24.0, 32.0)]
    known = Records(dict(zip(tried, (60.0, 59.0), strict=True)))
    scale = dataclasses.replace(SCALES["cifar10"], rates=(24.0, 32.0), epsilons=(4.0,))
    unknown = Study(2, Records({}).result, Records({}).settled, scale=scale)
    assert unknown.needed([group]) == tried  # and no run that chooses the one epsilon there is
    study = Study(2, known.result, known.settled, scale=scale)
    assert study.final(group) == [tried[0], dataclasses.replace(tried[0], seed=1)]


def test_plain_training_chooses_the_rate_of_all_methods_where_that_is_asked_for():
    scale = dataclasses.replace(SCALES["cifar10"], epsilons=(4.0,))
    group = Group("cifar10", "64k", "sam")
    plain, own = candidates("vanilla", "64k"), candidates("sam", "64k")
    known = Records(dict(zip(plain + own, (50.0, 60.0, 55.0, 70.0, 65.0, 60.0), strict=True)))
    first = Study(1, Records({}).result, Records({}).settled, scale=scale, plain_rates=True)
    assert first.needed([group]) == plain
    study = Study(1, known.result, known.settled, scale=scale, plain_rates=True)
    assert study.final(group) == [own[1]]
    assert study.final(dataclasses.replace(group, method="vanilla")) == [plain[1]]
    assert Study(1, known.result, known.settled, scale=scale).final(group) == [own[0]]
    adversarial = study.final(dataclasses.replace(group, method="paired_predicted"))
    assert [(cell.rate, cell.epsilon) for cell in adversarial] == [(plain[1].rate, 4.0)]


@pytest.mark.parametrize("method", ["vanilla", "conadv_aa"])
def test_the_guess_names_as_many_runs_as_there_will_be(method):
    groups = [Group("cifar10", batch, method) for batch in ("32k", "96k")]
    guessed = Records({}).study().needed(groups, guess=True)
    known: dict[Cell, float] = {}
    while True:
        new = [cell for cell in Records(known).study().needed(groups) if cell not in known]
        if not new:
            break
        known |= {cell: float(hash(cell.name) % 97) for cell in new}
    assert len(guessed) == len(known)


def test_the_paper_size_is_run_with_the_papers_recipes():
    group = Group("imagenet", "96k", "conadv")
    cells = Records({}).study().needed([group])
    assert [cell.seed for cell in cells] == [0, 1, 2]
    assert cells[0].gin_files() == ["96k_conadv.gin"]
    assert Cell("imagenet", "8k", "conadv").gin_files() == ["batch/8k.gin", "method/conadv.gin"]


@pytest.mark.parametrize(
    ("method", "batch", "own"), [("conadv", "96k", 8.0), ("conadv", "32k", 3.0), ("conadv_aa", "64k", 7.0)]
)
def test_the_recipes_epsilon_is_run_once_for_tables_1_and_5(method, batch, own):
    study, group = Records({}).study(), Group("imagenet", batch, method)
    assert study.final(dataclasses.replace(group, epsilon=own)) == study.final(group)
    assert study.final(dataclasses.replace(group, epsilon=own + 1)) != study.final(group)


def test_where_epsilon_is_chosen_the_recipes_is_one_like_others():
    first = epsilon_candidates()
    known = {cell: 40.0 + cell.epsilon for cell in first}
    known |= dict.fromkeys(candidates("conadv", "96k", first[-1].epsilon), 50.0)
    config.configure(["method/conadv.gin"], [])
    own = config.setting("attack.epsilon_pixels")
    assert own not in SCALES["cifar10"].epsilons
    assert Records(known).study().final(Group("cifar10", "96k", "conadv", epsilon=own))[0].epsilon == own


def test_names_are_different_folders():
    cells = [
        Cell(scale, batch, method, seed, rate, epsilon, tau)
        for scale, batch, method, seed, rate, epsilon, tau in itertools.product(
            ("cifar10",), ("32k", "96k"), ("conadv", "paired"), (0, 1), (None, 1.0, 10.0), (None, 0.0, 4.0), (1, 2)
        )
    ]
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_is_a_recipe_that_parses(scale):
    spec = SCALES[scale]
    for batch, method in itertools.product(spec.batches, spec.methods):
        cell = Cell(scale, batch, method, 1, *(3.0, 2.0 if METHOD_ROWS[method].is_adversarial else None))
        config.configure(cell.gin_files(), cell.gin_params())
        assert config.setting("train.seed") == 1
        assert config.setting("learning_rate.peak_learning_rate") == 3.0


@pytest.mark.parametrize("scale", SMALL)
def test_scale_models_make_as_many_updates_as_imagenet(scale):
    for batch in SCALES[scale].batches:
        config.configure(Cell(scale, batch, "vanilla").gin_files(), [])
        images, size = config.setting("subset.train_images"), config.setting("train.global_batch_size")
        assert images // size == paper.IMAGENET_TRAIN // (1024 * int(batch.removesuffix("k")))
        assert size % config.setting("train.microbatch_size") == 0


def test_costs_are_the_methods_own():
    """Forward units of plain training are 3, an attack's pass is 2, of the clean pass's forward 1, a further pass 3."""
    costs = {method: row.cost() for method, row in METHOD_ROWS.items()}
    papers = {"vanilla": 3, "aa": 4.5, "disadv": 8, "conadv": 8, "paired": 6, "conadv_aa": 9.5}
    others = {"paired_predicted": 7, "paired_target": 7, "conadv_predicted": 8, "noise": 6, "sam": 6, "sam_stale": 6}
    assert costs == papers | others | {"paired_predicted_aa": 8.5}


def test_a_recipe_is_read_once_however_often_progress_is_shown(monkeypatch):
    read, bindings = [], config.bindings
    monkeypatch.setattr(config, "bindings", lambda *files: read.append(files) or bindings(*files))
    study = Study(1, lambda cell: None, lambda cell: False)
    for _ in range(3):
        assert study.needed([Group("imagenet", "96k", "conadv", epsilon=4.0)])
    assert len(read) <= 1
