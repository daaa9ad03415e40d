"""Looks at finished runs side by side: how sharp the minimum is, how robust the network.

    conadv-analyze RUN [RUN ...] [--data_dir=DIR] [--out=analysis] [--images=1000] [--epsilons=1,2,4,8]

RUN is the --model_dir of a finished run. Each is rebuilt from its config.gin and newest checkpoint, in float32; every
number is of the main BN branch with moving statistics, over the first --images images of a split, not augmented:

    training images    the mean training loss (label smoothing as trained, no weight decay): its largest Hessian
                       eigenvalue by Lanczos' method; how far it rises along random filter-normalised directions,
                       at several radii; its surface over two such directions
    test images        top-1 clean, under FGSM (one step, no random start) and under PGD-20 (random start, steps of
                       2.5 ε / 20, each projected onto the ε-ball and clipped to 0..255), L∞, true label, ε in pixel
                       levels of 0..255

Prints a Markdown table, one row a run, and writes analysis.json, analysis.csv and, with matplotlib, surface.png to
--out. Directions are drawn from the same seeds for every run, so that runs of one network are seen along the same ones.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from conadv_tf import config, terminal
from conadv_tf.errors import ConfigError, RunError
from conadv_tf.experiments import sharpness
from conadv_tf.methods import attack
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import MAIN, SplitBatchNormalization
from conadv_tf.run import checkpoint, kept_config, resuming
from conadv_tf.run.build import Run, build
from conadv_tf.run.folder import RunFolder
from conadv_tf.run.strategy import make_strategy

IMAGES_AT_ONCE = 250
RADII = (0.1, 0.25, 0.5)  # along the directions: relative changes of each filter
DIRECTIONS = 10  # seeds 0, 1, ...; the surface spans the first two
SURFACE_RADIUS = 1.0
PGD_STEPS = 20

# Settings of every run while it is looked at, whatever it was trained with.
ANALYSIS_PARAMS = (
    "train.precision = 'float32'",
    "train.jit_compile = False",
    "stream.cache = 'none'",
    "stream.service = None",
)
FACTS = (
    "recipe",
    "method",
    "schedule",
    "tau",
    "epsilon",
    "dataset",
    "model",
    "global_batch_size",
    "seed",
    "test_top1",
    "generalization_gap",
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


ATTACKS: dict[str, Callable[[float], attack.Attack]] = {"FGSM": fgsm, "PGD-20": pgd20}


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
    folder, result = _finished(path)
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


def _finished(path: str) -> tuple[RunFolder, dict]:
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
    _, result = _finished(path)
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
            accuracies[f"{_key(name)}_top1"] = 100 * robust_accuracy(logits, classes, batches, make(epsilon))
        attacked.append(accuracies)
    return {"clean_top1": 100 * robust_accuracy(logits, classes, batches), "attacked": attacked}


def _key(attack_name: str) -> str:
    """The attack's name as a key: PGD-20 is pgd20."""
    return attack_name.lower().replace("-", "")


def _surface(loss: sharpness.MeanLoss, directions: list[sharpness.Direction], points: int) -> dict:
    """The loss at θ + a d₀ + b d₁; loss[i][j] at a = axis[j], b = axis[i]."""
    axis = np.linspace(-SURFACE_RADIUS, SURFACE_RADIUS, points)
    places = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    values = loss.along(directions[:2], places).reshape(points, points)
    return {"axis": axis.tolist(), "loss": values.tolist()}


def flat_row(analysis: dict) -> dict[str, Any]:
    """The numbers of one run by the names of the CSV's columns; None where a method has no such setting."""
    row = {name: analysis[name] for name in ("run", *FACTS)}
    row |= {"train_loss": analysis["sharpness"]["loss"], "lambda_max": analysis["sharpness"]["lambda_max"]}
    row["lambda_residual"] = analysis["sharpness"]["residual"]
    for rise in analysis["loss_rise"]:
        row |= {f"loss_rise_{of}_at_{rise['radius']:g}": rise[of] for of in ("mean", "max")}
    row["clean_top1"] = analysis["robustness"]["clean_top1"]
    for accuracies in analysis["robustness"]["attacked"]:
        for name in ATTACKS:
            row[f"{_key(name)}_top1_at_{accuracies['epsilon_pixels']:g}"] = accuracies[f"{_key(name)}_top1"]
    return row


def csv_text(analyses: list[dict]) -> str:
    """The CSV of all runs, a row a run under names; empty where a method has no such setting."""
    rows = [flat_row(analysis) for analysis in analyses]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(analyses: list[dict]) -> str:
    """The table of all runs, and a line that says what its numbers are."""
    cells = [_markdown_cells(analysis) for analysis in analyses]
    lines = [_row(cells[0]), "|---" * len(cells[0]) + "|", *(_row(of_run.values()) for of_run in cells)]
    note = (
        f"Loss, λ_max (± residual) and rise of the loss (mean / max of {DIRECTIONS} filter-normalised directions, at r "
        f"times the norm of each filter): {_counts(analyses, 'train')} training images. Clean, {' / '.join(ATTACKS)}: "
        f"top-1 in percent of {_counts(analyses, 'test')} test images, ε in pixel levels. Test top-1, gap: every image."
    )
    return "\n".join([*lines, "", note])


def _counts(analyses: list[dict], split: str) -> str:
    """The number of images looked at; several numbers where the data sets of the runs differ."""
    return " or ".join(f"{count:,}" for count in sorted({analysis["images"][split] for analysis in analyses}))


def _row(cells: Iterable[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]  # a folder's name may have one
    return f"| {' | '.join(escaped)} |"


def _markdown_cells(analysis: dict) -> dict[str, str]:
    """Cells by the heads of their columns."""
    sharp, robust = analysis["sharpness"], analysis["robustness"]
    cells = {
        "run": short_name(analysis["run"]),
        "recipe": analysis["recipe"],
        "method": method_text(analysis),
        "batch": f"{analysis['global_batch_size']:,}",
        "seed": str(analysis["seed"]),
        "test top-1": f"{analysis['test_top1']:.2f}",
        "gap": f"{analysis['generalization_gap']:.2f}",
        "loss": f"{sharp['loss']:.4f}",
        "λ_max": f"{sharp['lambda_max']:.4g} ± {sharp['residual']:.1g}",
    }
    cells |= {f"rise at r = {e['radius']:g}": f"{e['mean']:.3g} / {e['max']:.3g}" for e in analysis["loss_rise"]}
    cells["clean"] = f"{robust['clean_top1']:.1f}"
    for accuracies in robust["attacked"]:
        both = (f"{accuracies[f'{_key(name)}_top1']:.1f}" for name in ATTACKS)
        cells[f"ε = {accuracies['epsilon_pixels']:g}: {' / '.join(ATTACKS)}"] = " / ".join(both)
    return cells


def short_name(path: str) -> str:
    """The last part of a run's folder."""
    return os.path.basename(path.rstrip("/")) or path


def method_text(analysis: dict) -> str:
    """Method, schedule, delay and ε in a few words, as far as there are."""
    parts = [analysis["method"]]
    parts += [f"{analysis['schedule']}, τ {analysis['tau']}"] if analysis["schedule"] else []
    parts += [f"ε {analysis['epsilon']:g}"] if analysis["epsilon"] is not None else []
    return ", ".join(parts)


def _positive(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
        return int(text)

    return number


def _epsilons(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 255 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers in (0, 255] with commas between them, such as 2,4")
    return values


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(
        prog="conadv-analyze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=terminal.path, metavar="RUN", help="--model_dir of a finished run")
    parser.add_argument("--data_dir", type=terminal.path, help="as of train.py; the same for every run")
    parser.add_argument("--out", type=terminal.path, default="analysis", help="folder to write (analysis)")
    parser.add_argument("--images", type=_positive(1), default=1000, metavar="N", help="of each split, at most (1000)")
    parser.add_argument(
        "--epsilons", type=_epsilons, default=(1.0, 2.0, 4.0, 8.0), metavar="E,E,...", help="pixel levels (1,2,4,8)"
    )
    parser.add_argument(
        "--surface_points", type=_positive(2), default=21, metavar="N", help="of the surface, on each axis (21)"
    )
    return parser.parse_args(arguments)


def _analyse_all(settings: argparse.Namespace) -> None:
    for path in settings.runs:
        _finished(path)  # a misspelt path is told before minutes of work on the others
    analyses = []
    for number, path in enumerate(settings.runs, 1):
        print(f"analysing {path} ({number} of {len(settings.runs)})", file=sys.stderr, flush=True)
        analyses.append(analyse(path, settings))
    tf.io.gfile.makedirs(settings.out)
    content = {"arguments": vars(settings), "runs": analyses}
    for name, text in (("json", json.dumps(content, indent=1) + "\n"), ("csv", csv_text(analyses))):
        with tf.io.gfile.GFile(os.path.join(settings.out, f"analysis.{name}"), "w") as file:
            file.write(text)
    print(markdown(analyses))
    _plot(analyses, os.path.join(settings.out, "surface.png"))


def _plot(analyses: list[dict], path: str) -> None:
    try:
        from conadv_tf.experiments import surface_plot
    except ImportError:
        print("no surface.png without matplotlib: pip install 'conadv_tf[plots]'", file=sys.stderr)
        return
    panels = [(f"{short_name(run['run'])}\n{method_text(run)}", run["surface"]) for run in analyses]
    surface_plot.plot(panels, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for settings, 1 for data or runs, 130 where it was interrupted."""
    return terminal.exit_code(
        lambda: _analyse_all(_arguments(arguments)),
        "nothing was written",
        "check the data, and space and permissions of --out",
    )


if __name__ == "__main__":
    sys.exit(main())
