"""Throughput over batch sizes, the paper's Figure 4, on any TPU generation; needs no TPU, measures none.

    python benchmarks/scaling.py [--generation=v3] [--gin_file=96k_conadv.gin] [--out=.]

Prints Markdown tables beside the paper's numbers, and writes scaling.json and scaling.png; figure4.py in
conadv_tf/experiments says how they are made. `python reproduce.py --figure=4 --scale=imagenet` makes the paper's.
"""

import argparse
import os

from conadv_tf import terminal
from conadv_tf.experiments import figure4, plots, scaling
from conadv_tf.preflight.tpu_generations import GENERATIONS


def main() -> None:
    terminal.take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=sorted(GENERATIONS), default="v3")
    parser.add_argument("--gin_file", type=terminal.path, default="96k_conadv.gin")
    parser.add_argument("--out", type=terminal.path, default=".")
    arguments = parser.parse_args()
    generation = GENERATIONS[arguments.generation]
    found = scaling.points(arguments.gin_file, generation)
    figure4.write(found, generation, arguments.out)
    print(figure4.text(found, generation))
    plots.figure4(found, generation, os.path.join(arguments.out, "scaling.png"))


if __name__ == "__main__":
    main()
