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
import json
import os
import sys
from collections.abc import Callable, Sequence

from conadv_tf import terminal
from conadv_tf.experiments.analysis_text import csv_text, markdown, method_text, short_name


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
    parser.add_argument("--data_dir", type=terminal.path, help="as in train.py; the same for every run")
    parser.add_argument("--out", type=terminal.path, default="analysis", help="folder to write (analysis)")
    parser.add_argument(
        "--images", type=_positive(1), default=1000, metavar="N", help="images of each split, at most (1000)"
    )
    parser.add_argument(
        "--epsilons", type=_epsilons, default=(1.0, 2.0, 4.0, 8.0), metavar="E,E,...", help="pixel levels (1,2,4,8)"
    )
    parser.add_argument(
        "--surface_points", type=_positive(2), default=21, metavar="N", help="of the surface, on each axis (21)"
    )
    return parser.parse_args(arguments)


def _analyse_all(settings: argparse.Namespace) -> None:
    # TensorFlow takes seconds to load, which --help and a misspelt argument do without.
    import tensorflow as tf

    from conadv_tf.experiments import analysis

    for path in settings.runs:
        analysis.finished(path)  # a misspelt path is told before minutes of work on the others
    tf.io.gfile.makedirs(settings.out)
    analyses = []
    for number, path in enumerate(settings.runs, 1):
        terminal.say(f"analysing {path} ({number} of {len(settings.runs)})", sys.stderr)
        analyses.append(analysis.analyse(path, settings))
    content = {"arguments": vars(settings), "runs": analyses}
    for name, text in (("json", json.dumps(content, indent=1) + "\n"), ("csv", csv_text(analyses))):
        with tf.io.gfile.GFile(os.path.join(settings.out, f"analysis.{name}"), "w") as file:
            file.write(text)
    terminal.say(markdown(analyses))
    _plot(analyses, os.path.join(settings.out, "surface.png"))


def _plot(analyses: list[dict], path: str) -> None:
    try:
        from conadv_tf.experiments import surface_plot
    except ImportError:
        terminal.say("no surface.png without matplotlib: pip install 'conadv_tf[plots]'", sys.stderr)
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
