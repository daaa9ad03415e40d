"""What conadv-analyze computes of a finished run: sharpness, loss surface, accuracy under attack; see analyze.py."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

from conadv_tf import config
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.experiments import sharpness
from conadv_tf.experiments.analysis_text import ATTACK_NAMES, DIRECTIONS, FACTS, attack_key
from conadv_tf.methods import attack
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import MAIN, SplitBatchNormalization
from conadv_tf.run import checkpoint, kept_config, resuming
from conadv_tf.run.build import Run, build
from conadv_tf.run.folder import RunFolder
from conadv_tf.run.strategy import make_strategy

IMAGES_AT_ONCE = 250
RADII = (0.1, 0.25, 0.5)  # along the directions: relative changes of each filter
SURFACE_RADIUS = 1.0
PGD_STEPS = 20

# Settings of every run while it is looked at, whatever it was trained with.
ANALYSIS_PARAMS = (
    "train.precision = 'float32'",
    "train.jit_compile = False",
    "stream.cache = 'none'",
    "stream.service = None",
)

Batches = list[tuple[tf.Tensor, tf.Tensor]]


def fgsm(epsilon_pixels: float) -> attack.Attack:
    """The attack of one step of ε from the image itself; `epsilon_pixels` in (0, 255]."""
    return attack.Attack(epsilon_pixels, label="hard", random_start_probability=0.0, batch_norm="moving")


def pgd20(epsilon_pixels: float) -> attack.Attack:
    """The attack of 20 steps of 2.5 ε / 20 from a random start; `epsilon_pixels` in (0, 255]."""
    return dataclasses.replace(
        fgsm(epsilon_pixels),
        steps=PGD_STEPS,
        step_size_pixels=2.5 * epsilon_pixels / PGD_STEPS,
        random_start_probability=1.0,
    )


ATTACKS: dict[str, Callable[[float], attack.Attack]] = dict(zip(ATTACK_NAMES, (fgsm, pgd20), strict=True))


def robust_accuracy(
    logits: attack.LogitsFunction, num_classes: int, batches: Batches, attacked: attack.Attack | None = None
) -> float:
    """The share of images, in [0, 1], that are classified rightly, after `attacked` where there is one.

    The share is an upper bound: beyond a margin of 16 nats or so the softmax is one-hot in float32, and the attack has
    no gradient to follow. Networks trained with label smoothing stay far below that margin.

    Args:
      logits: the network; see attack.py.
      num_classes: width of the logits.
      batches: (images float32 [n, H, W, C] in [0, 255], labels int32 [n]).
      attacked: an attack on hard labels.
    """
    right, count = 0, 0
    for number, (images, labels) in enumerate(batches):
        if attacked:
            seed = tf.constant([0, number])
            images = attacked.adversarial_examples(logits, num_classes, None, images, labels, seed)
        right += int(np.sum(np.argmax(logits(images), 1) == labels.numpy()))
        count += len(labels)
    return right / count


def main_variables(network: ResNet) -> list[tf.Variable]:
    """The trainable variables that the main branch uses."""
    norms = [layer for layer in network.submodules if isinstance(layer, SplitBatchNormalization)]
    others = {
        part[branch].ref()
        for norm in norms
        for branch in norm.branches
        if branch != MAIN
        for part in (norm.gammas, norm.betas)
    }
    return [variable for variable in network.trainable_variables if variable.ref() not in others]


def restore(path: str, data_dir: str | None) -> Run:
    """The run in the folder `path`, with its last weights.

    Raises:
      ConfigError: if there is no run, or its data need a --data_dir, or are others than it was trained on.
      DataError: for missing or damaged data.
      RunError: if the run has not finished, or its last checkpoint is gone.
    """
    folder, result = finished(path)
    kept = kept_config.kept_settings(folder.read_config() or "")
    config.configure([], [*(f"{name} = {value}" for name, value in kept.items()), *ANALYSIS_PARAMS])
    strategy = make_strategy("one_device")
    built = build(result["recipe"], strategy, data_dir, result["num_replicas"])
    checkpoints = checkpoint.Checkpoints(built.model, folder.file("checkpoints"))
    updates = checkpoints.restore()
    data = folder.read_data() or checkpoints.data
    resuming.check_data(path, data, built.data.fingerprint, "pass the --data_dir of that run")
    if updates != result["steps"]:
        raise RunError(
            f"RUN={path}: the newest whole checkpoint has {updates:,} of {result['steps']:,} updates: bring back its "
            "folder checkpoints/, or train it again"
        )
    return built


def finished(path: str) -> tuple[RunFolder, dict]:
    """The folder of a finished run, and its result."""
    folder = RunFolder(path, writes=False)
    if folder.read_config() is None:
        raise ConfigError(f"RUN={path} holds no run (there is no config.gin): name the --model_dir of a finished one")
    result = folder.read_result()
    if result is None:
        raise RunError(f"RUN={path} has not finished (there is no result.json): train it to its end first")
    if result["steps"] not in checkpoint.numbers(folder.file("checkpoints")):
        raise RunError(
            f"RUN={path}: its last checkpoint is gone: bring back its folder checkpoints/, or train it again"
        )
    return folder, result


def analyse(path: str, settings: argparse.Namespace) -> dict:
    """The analysis of one run; see the module. Raises what `restore` raises."""
    _, result = finished(path)
    built = restore(path, settings.data_dir)
    network = built.model.network
    logits = tf.function(lambda images: network(images, training=False), autograph=False, reduce_retracing=True)
    train, test = (_batches(built, split, settings.images) for split in ("train", "test"))
    loss = sharpness.MeanLoss(
        lambda images, labels: built.model.loss(labels, network(images, training=False)), main_variables(network), train
    )
    directions = [sharpness.filter_normalised_direction(loss.variables, seed) for seed in range(DIRECTIONS)]
    return {
        "run": path,
        **{name: result[name] for name in FACTS},
        "images": {"train": _count(train), "test": _count(test)},
        "sharpness": _sharpness(loss),
        "loss_rise": _loss_rise(loss, directions),
        "robustness": _robustness(logits, built.data.num_classes, test, settings.epsilons),
        "surface": _surface(loss, directions, settings.surface_points),
    }


def _batches(built: Run, split: str, count: int) -> Batches:
    images, labels = built.data.examples(split, count)
    starts = range(0, len(labels), IMAGES_AT_ONCE)
    parts = [slice(start, start + IMAGES_AT_ONCE) for start in starts]
    return [(tf.constant(images[part], tf.float32), tf.constant(labels[part])) for part in parts]


def _count(batches: Batches) -> int:
    return sum(len(labels) for _, labels in batches)


def _sharpness(loss: sharpness.MeanLoss) -> dict:
    found = sharpness.largest_eigenvalue(loss.hessian_vector_product, loss.dimension)
    return {
        "loss": loss.value(),
        "lambda_max": found.value,
        "residual": found.residual,
        "hessian_vector_products": found.products,
    }


def _loss_rise(loss: sharpness.MeanLoss, directions: list[sharpness.Direction]) -> list[dict]:
    """The mean and the maximum over the directions of L(θ + r d) − L(θ), for each radius r."""
    here = loss.value()
    rises = np.stack([loss.along([direction], np.array(RADII)[:, None]) - here for direction in directions])
    return [
        {"radius": radius, "mean": float(rise.mean()), "max": float(rise.max())}
        for radius, rise in zip(RADII, rises.T, strict=True)
    ]


def _robustness(logits: attack.LogitsFunction, classes: int, batches: Batches, epsilons: Iterable[float]) -> dict:
    """The top-1 in percent, clean and under each attack at each ε."""
    attacked = []
    for epsilon in epsilons:
        accuracies = {"epsilon_pixels": epsilon}
        for name, make in ATTACKS.items():
            accuracies[f"{attack_key(name)}_top1"] = 100 * robust_accuracy(logits, classes, batches, make(epsilon))
        attacked.append(accuracies)
    return {"clean_top1": 100 * robust_accuracy(logits, classes, batches), "attacked": attacked}


def _surface(loss: sharpness.MeanLoss, directions: list[sharpness.Direction], points: int) -> dict:
    """The loss at θ + a d₀ + b d₁; loss[i][j] at a = axis[j], b = axis[i]."""
    axis = np.linspace(-SURFACE_RADIUS, SURFACE_RADIUS, points)
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    values = loss.along(directions[:2], places).reshape(points, points)
    return {"axis": axis.tolist(), "loss": values.tolist()}
