"""Every value of the paper's Table 6, of MLPerf's reference points and of the release, read out of the built run.

The run is built for the pod that its recipe names, a v3-512 for most, without one. Its network and images are small,
its arithmetic, optimizer, schedule, loss and method are the recipe's. Expectations are the tables' own numbers and
float64 formulas.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from conadv_tf import config
from conadv_tf.run.build import Run, build
from conadv_tf.training import optimizers

GIN = Path(config.recipe_folder())
NUM_TRAIN = 1_281_167
V3_512 = 512
SMALL = [
    "data.source='synthetic'",
    "synthetic.image_size=32",
    "model.name='cifar_resnet8'",
]


class Row(NamedTuple):
    """What a table says about a batch size."""

    batch: int
    steps_per_epoch: int
    peak: float
    warmup_epochs: int
    weight_decay: float = 5e-4
    momentum: float = 0.9
    epochs: int = 90
    power: float = 2.0
    rows: int = 64
    end: float = 1e-4
    cores: int = V3_512

    @property
    def warmup_steps(self) -> int:
        return self.warmup_epochs * self.steps_per_epoch

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of the decay at an update, in float64."""
        decay_steps = self.steps - self.warmup_steps + 1
        return (self.peak - self.end) * (1 - (step - self.warmup_steps) / decay_steps) ** self.power + self.end


TABLE_6 = {32: Row(32_768, 39, 35.0, 40), 64: Row(65_536, 19, 41.0, 41), 96: Row(98_304, 13, 43.0, 41)}
BATCHES = {
    # Below 32k: the release's peak learning rates and warm-up.
    1: Row(1_024, 1251, 10.0, 5, rows=2),
    4: Row(4_096, 312, 10.0, 5, rows=8),
    8: Row(8_192, 156, 10.0, 5, rows=16),
    16: Row(16_384, 78, 25.0, 5, rows=32),
    **TABLE_6,
    # Beyond 96k: 96k's.
    128: Row(131_072, 9, 43.0, 41),
    256: Row(262_144, 4, 43.0, 41),
}
RELEASE = {"96k_conadv_aa_release": Row(98_304, 13, 43.0, 41, 5e-5, 0.92, 100, power=1.6, rows=96)}


class Reference(NamedTuple):
    """A reference convergence point of MLPerf, with the updates of its decay, which follow those of the warm-up."""

    batch: int
    peak: float
    warmup_epochs: int
    momentum: float
    weight_decay: float
    decay_steps: int
    batch_norm_images: int
    epochs_to_target: int


# mlcommons/logging, mlperf_logging/rcp_checker/training_4.0.0/rcps_resnet.json; epochs: the mean of its runs.
REFERENCES = {
    "1.6k": Reference(1_632, 7.4, 2, 0.9, 5e-5, 27_476, 204, 35),
    "3k": Reference(3_264, 10.5, 2, 0.9, 5e-5, 14_523, 204, 35),
    "4k": Reference(4_096, 10.0, 5, 0.9, 2e-4, 13_137, 64, 40),
    "8k": Reference(8_192, 17.0, 5, 0.9, 2e-4, 6_095, 64, 42),
    "13k": Reference(13_056, 12.8, 9, 0.9, 2.5e-5, 4_710, 204, 45),
    "32k": Reference(32_768, 21.2, 16, 0.94, 2.5e-5, 2_267, 128, 56),
    "49k": Reference(49_152, 19.405, 24, 0.951807, 1e-4, 1_846, 256, 68),
    "59k": Reference(58_880, 23.246, 29, 0.951807, 1e-4, 1_785, 230, 80),
    "64k": Reference(65_536, 24.699, 31, 0.951807, 1e-4, 1_133, 128, 85),
    "68k": Reference(67_840, 24.699, 31, 0.951807, 1e-4, 1_133, 424, 86),
}
# Of each: updates an epoch, epochs, and the cores that the recipe names, with their images.
LAYOUTS = {
    "1.6k": (785, 37, 8, 204),
    "3k": (392, 39, 8, 204),
    "4k": (312, 47, 512, 8),
    "8k": (156, 44, 512, 16),
    "13k": (98, 57, 64, 204),
    "32k": (39, 74, 256, 128),
    "49k": (26, 95, 64, 256),
    "59k": (21, 114, 256, 230),
    "64k": (19, 91, 512, 128),
    "68k": (18, 94, 32, 424),
}
TUNED_ATTACKS = {"32k": 3, "49k": 3, "59k": 5, "64k": 5, "68k": 5}


def tuned_row(size: str) -> Row:
    """The run that a reference point asks for."""
    steps_per_epoch, epochs, cores, rows = LAYOUTS[size]
    batch, peak, warmup_epochs, momentum, weight_decay, *_ = REFERENCES[size]
    return Row(batch, steps_per_epoch, peak, warmup_epochs, weight_decay, momentum, epochs, rows=rows, cores=cores)


TUNED = {f"{size}_vanilla_mlperf": tuned_row(size) for size in REFERENCES}
TUNED |= {f"{size}_conadv_mlperf": tuned_row(size) for size in TUNED_ATTACKS}
VARIANTS = ("vanilla", "aa", "disadv", "conadv", "conadv_aa")
PERTURBATIONS = {"disadv": (3, 5, 8), "conadv": (3, 5, 8), "conadv_aa": (5, 7, 8)}
# Tables 1 and 2, top-1 at 32k, 64k and 96k.
RESULTS = {
    "vanilla": (76.6, 75.3, 74.3),
    "aa": (76.9, 75.6, 74.3),
    "disadv": (77.3, 76.2, 75.3),
    "conadv": (77.3, 76.2, 75.3),
    "conadv_aa": (78.3, 77.3, 76.2),
}
ROWS = (
    {f"batch/{size}k": row for size, row in BATCHES.items()}
    | {f"{size}k_{variant}": row for size, row in TABLE_6.items() for variant in VARIANTS}
    | TUNED
    | RELEASE
)
# Network, updates in all and of the warm-up, peak and end of the rate, optimizer: 312 updates an epoch.
_EFFICIENTNET = {"rho": 0.9, "momentum": 0.9, "epsilon": 1e-3, "weight_decay_rate": 1e-5}
_CONVNEXT = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8, "weight_decay_rate": 0.05}
OTHER_NETWORKS = {
    "4k_conadv_efficientnetb0": (
        "EfficientNetB0",
        350 * 312,
        5 * 312,
        0.256,
        0.003,
        optimizers.RMSprop,
        _EFFICIENTNET,
    ),
    "4k_conadv_convnext_tiny": ("ConvNeXtTiny", 300 * 312, 20 * 312, 4e-3, 1e-6, optimizers.AdamW, _CONVNEXT),
}
PAPER = [(size, place, variant) for place, size in enumerate(TABLE_6) for variant in VARIANTS]


@functools.cache
def built(recipe: str) -> Run:
    """The recipe at its full scale for its pod, with a small network on noise."""
    config.configure([f"{recipe}.gin"], SMALL)
    return build(recipe, tf.distribute.OneDeviceStrategy("CPU:0"), None, ROWS[recipe].cores)


def test_every_imagenet_recipe_has_its_row():
    recipes = {path.stem for path in GIN.glob("*k_*.gin")} | {f"batch/{p.stem}" for p in GIN.glob("batch/*k.gin")}
    assert recipes == set(ROWS) | set(OTHER_NETWORKS)


@pytest.mark.parametrize("recipe", OTHER_NETWORKS)
def test_recipes_of_other_networks(recipe):
    network, steps, warmup_steps, peak, end, optimizer, settings = OTHER_NETWORKS[recipe]
    config.configure([f"{recipe}.gin"], [])
    assert config.setting("model.name") == network
    config.configure([f"{recipe}.gin"], SMALL)
    run = build(recipe, tf.distribute.OneDeviceStrategy("CPU:0"), None, 64)
    assert run.plan.total_steps == steps
    made = run.model.optimizer
    assert isinstance(made, optimizer)
    assert {name: made.get_config()[name] for name in settings} == settings
    rates = [float(made.learning_rate(tf.constant(step))) for step in (0, warmup_steps, steps + 1)]
    np.testing.assert_allclose(rates, [0.0, peak, end], rtol=2e-4)


@pytest.mark.parametrize("recipe", ROWS)
def test_arithmetic(recipe):
    row, plan = ROWS[recipe], built(recipe).plan
    assert (plan.global_batch_size, plan.epochs, plan.num_train) == (row.batch, row.epochs, NUM_TRAIN)
    assert (plan.steps_per_epoch, plan.total_steps) == (row.steps_per_epoch, row.steps)
    assert row.steps_per_epoch * row.batch <= NUM_TRAIN < (row.steps_per_epoch + 1) * row.batch
    assert (plan.num_replicas, plan.rows) == (row.cores, row.rows)
    assert row.cores * plan.microbatches * row.rows == row.batch


@pytest.mark.parametrize("recipe", ROWS)
def test_learning_rate(recipe):
    row, schedule = ROWS[recipe], built(recipe).model.optimizer.learning_rate
    middle = (row.warmup_steps + row.steps) // 2
    steps = [0, 1, row.warmup_steps - 1, row.warmup_steps, middle, row.steps, row.steps + 1]
    climb = [row.peak * step / row.warmup_steps for step in steps[:3]]
    expected = [*climb, row.peak, row.rate(middle), row.rate(row.steps), row.end]
    np.testing.assert_allclose([float(schedule(tf.constant(step))) for step in steps], expected, rtol=2e-4)


@pytest.mark.parametrize(("size", "value"), [(32, 8.75905), (64, 10.29411), (96, 10.81758)])
def test_hand_worked_middle_of_the_decay(size, value):
    # (peak − 1e-4) · (1 − (t − w) / (T − w + 1))² + 1e-4, e.g. 96k: T = 1170, w = 533, t = 851: 42.9999 · (320/638)².
    row = TABLE_6[size]
    schedule = built(f"{size}k_conadv").model.optimizer.learning_rate
    middle = (row.warmup_steps + row.steps) // 2
    assert float(schedule(tf.constant(middle))) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("recipe", ROWS)
def test_optimizer(recipe):
    row, optimizer = ROWS[recipe], built(recipe).model.optimizer.get_config()
    assert optimizer["name"] == "LARS"
    assert optimizer["momentum"] == row.momentum
    assert optimizer["weight_decay"] == row.weight_decay
    assert optimizer["trust_coefficient"] == 0.001


@pytest.mark.parametrize("recipe", ROWS)
def test_label_smoothing_is_a_tenth(recipe):
    logits = np.zeros((1, 1000), np.float32)
    logits[0, 7] = 10.0
    # log Σ e^z − 0.9 z_7 − 0.1 · mean z
    expected = math.log(math.exp(10) + 999) - 0.9 * 10 - 0.1 * 10 / 1000
    loss = built(recipe).model.loss.call(tf.constant([7]), tf.constant(logits))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("recipe", ROWS)
def test_network(recipe):
    network = built(recipe).model.network
    assert (network.batch_norm_momentum, network.batch_norm_epsilon) == (0.9, 1e-5)
    # Statistics over 64 images; the release's, over a core's own 96.
    assert network.replicas_per_group == max(1, 64 // ROWS[recipe].rows)
    assert built(recipe).settings.precision == "mixed_bfloat16"
    assert network.num_classes == 1000


@pytest.mark.parametrize(("size", "place", "variant"), PAPER)
def test_method_and_perturbation_of_the_papers_recipes(size, place, variant):
    recipe = built(f"{size}k_{variant}")
    method, network = recipe.model.method, recipe.model.network
    policy = "imagenet" if variant.endswith("aa") else "none"
    assert (recipe.data.augmentation.policy, recipe.data.augmentation.mode) == (policy, "replace")
    if variant in ("vanilla", "aa"):
        assert (method.name, method.attack, network.branches) == ("vanilla", None, ("main",))
        return
    assert method.name == variant.removesuffix("_aa")
    assert (method.tau, method.schedule) == ((0, None) if variant == "disadv" else (1, "shadow"))
    assert network.branches == ("main", "adversarial")
    assert method.attack.epsilon_pixels == PERTURBATIONS[variant][place]
    attack = method.attack
    assert (attack.units, attack.goal, attack.norm, attack.label, attack.steps, attack.batch_norm) == (
        ("pixels", "untargeted", "linf", "hard", 1, "main")
    )
    assert (attack.step_size_pixels, attack.random_start_probability) == (None, 1.0)
    assert method.forward_units == 8


def test_images_and_attack_of_the_release():
    release = built("96k_conadv_aa_release")
    assert (release.data.augmentation.policy, release.data.augmentation.mode) == ("imagenet", "concat3")
    assert release.model.network.branches == ("main", "augmented", "adversarial")
    method = release.model.method
    assert (method.name, method.tau) == ("disadv", 0)
    attack = method.attack
    assert (attack.epsilon_pixels, attack.step_size_pixels, attack.units) == (9, 9, "release_units")
    assert (attack.goal, attack.random_start_probability, attack.batch_norm) == ("random_target", 0.8, "aux")


@pytest.mark.parametrize(("size", "place", "variant"), PAPER)
def test_head_comment_has_the_papers_result(size, place, variant):
    head = (GIN / f"{size}k_{variant}.gin").read_text()
    assert f"test top-1 {RESULTS[variant][place]} %" in head
    assert variant == "vanilla" or f"vanilla {RESULTS['vanilla'][place]} %" in head


@pytest.mark.parametrize("recipe", ROWS)
def test_head_comment_has_the_runs_arithmetic(recipe):
    row = ROWS[recipe]
    head = (GIN / f"{recipe}.gin").read_text().split("\n\n")[0]
    assert f"batch {row.batch:,}" in head
    assert f"{row.epochs} epochs" in head
    updates = re.search(r"([\d,]+) updates an epoch, ([\d,]+) in", head)
    assert not updates or updates.groups() == (f"{row.steps_per_epoch:,}", f"{row.steps:,}")
    assert bool(updates) == recipe.startswith("batch/")
    core = re.search(r"([\d]+) on each core of a v3-(\d+), ([\d,]+) on one device", head)
    assert not core or core.groups() == (
        f"{built(recipe).plan.microbatches}",
        f"{row.cores}",
        f"{row.batch // row.rows:,}",
    )


@pytest.mark.parametrize("recipe", TUNED)
def test_reference_points_of_mlperf(recipe):
    """What ROWS does not hold: the decay after the warm-up, the span of batch norm, the epochs to the target."""
    reference, run = REFERENCES[recipe.split("_")[0]], built(recipe)
    schedule, network = run.model.optimizer.learning_rate.get_config(), run.model.network
    # A run has whole epochs, MLPerf's decay any number of updates.
    assert schedule["decay_steps"] == pytest.approx(reference.decay_steps, rel=0.01)
    assert (schedule["end_learning_rate"], schedule["power"]) == (1e-4, 2.0)
    assert run.plan.rows * network.replicas_per_group == reference.batch_norm_images
    assert run.plan.epochs > reference.epochs_to_target
    head = (GIN / f"{recipe}.gin").read_text().split("\n\n")[0]
    assert f"75.9 % in {reference.epochs_to_target} epochs" in head
    assert "rcp_checker/training_4.0.0/rcps_resnet.json" in head


@pytest.mark.parametrize(("size", "epsilon"), TUNED_ATTACKS.items())
def test_conadv_with_mlperfs_settings_differs_in_its_method_alone(size, epsilon):
    plain, run = built(f"{size}_vanilla_mlperf"), built(f"{size}_conadv_mlperf")
    assert run.settings == dataclasses.replace(plain.settings, method="conadv")
    assert run.model.optimizer.get_config() == plain.model.optimizer.get_config()
    assert (plain.plan, plain.data.augmentation) == (run.plan, run.data.augmentation)
    method = run.model.method
    assert (method.schedule, method.tau, method.attack.epsilon_pixels) == ("shadow", 1, epsilon)
    assert run.model.network.replicas_per_group == plain.model.network.replicas_per_group
