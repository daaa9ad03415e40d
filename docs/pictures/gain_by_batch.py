"""Draws docs/pictures/gain_by_batch.png: the gain over plain training by batch, here and in the paper.

    python docs/pictures/gain_by_batch.py

Reads results/digits/gain.csv, which `python reproduce.py --figure=gain --scale=digits --seeds=24 --jobs=0` writes.
"""

import argparse
import csv
import math
import os
from typing import NamedTuple

import matplotlib
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = os.path.dirname(os.path.abspath(__file__))
PICTURE = os.path.join(FOLDER, "gain_by_batch.png")
GAINS = os.path.join(FOLDER, "..", "..", "results", "digits", "gain.csv")
# A shape and dashes as well as a colour.
STYLES = {
    "+ DisAdv": ("#b5402a", "s", "-"),
    "+ ConAdv": ("#c78a1b", "^", "--"),
    "+ ConAdv, paired": ("#2b6ca3", "D", "-."),
}
PAPER = "+ ConAdv"


class Gain(NamedTuple):
    """Points of test top-1 over plain training: mean over seeds, and the paper's number, if any.

    `error` is half the width of the mean's 95 % confidence interval (Student's t).
    """

    mean: float
    error: float
    paper: float | None


def read_gains(path: str) -> dict[str, dict[str, Gain]]:
    """By method and batch, as the file has them."""
    gains: dict[str, dict[str, Gain]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            runs = int(row["runs"])
            error = stats.t.ppf(0.975, runs - 1) * float(row["standard_deviation"]) / math.sqrt(runs)
            paper = float(row["paper"]) if row["paper"] else None
            gains.setdefault(row["row"], {})[row["column"]] = Gain(float(row["mean"]), error, paper)
    return gains


def draw(gains: dict[str, dict[str, Gain]], path: str) -> None:
    """Gains by batch with their 95 % confidence intervals, and the paper's beside them."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.9), layout="constrained")
    batches = list(gains[PAPER])
    axis.axhline(0, color="#444444", linewidth=1.2)
    for number, (method, (color, marker, dashes)) in enumerate(STYLES.items()):
        places = [index + 0.12 * (number - 1) for index in range(len(batches))]
        own = [gains[method][batch] for batch in batches]
        bars = [gain.error for gain in own]
        style = {"color": color, "marker": marker, "linestyle": dashes, "capsize": 4, "markersize": 7}
        axis.errorbar(places, [gain.mean for gain in own], yerr=bars, label=f"{method}, digits", **style)
    paper = [(index, gains[PAPER][batch].paper) for index, batch in enumerate(batches)]
    known = [(index, value) for index, value in paper if value is not None]
    style = {"color": "#777777", "linestyle": ":", "linewidth": 2, "marker": "o", "markerfacecolor": "white"}
    axis.plot(*zip(*known, strict=True), label=f"{PAPER}, paper (ImageNet)", markersize=8, **style)
    axis.set_xticks(range(len(batches)), batches)
    axis.set_xlabel("batch on ImageNet, or its scale model on digits", fontsize=12)
    axis.set_ylabel("points over plain training", fontsize=12)
    axis.tick_params(labelsize=12)
    axis.grid(linewidth=0.4, alpha=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=PICTURE, help="the picture")
    draw(read_gains(GAINS), parser.parse_args().out)


if __name__ == "__main__":
    main()
