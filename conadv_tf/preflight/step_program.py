"""Exports a recipe's training step as programs that run where TensorFlow is not installed.

    conadv-step-program --out=DIR --save_data [--gin_file=...] [--gin_param=...] [--data_dir=...]

writes to DIR, for one replica, with the recipe's micro-batches accumulated into each update:

    update.mlir, evaluate.mlir   StableHLO, the update and the evaluation of a batch through the main BN
    begin.mlir                   for `lookahead` alone: makes its first carry
    initial.npz                  every variable by name
    program.json                 what each program takes and returns, and the recipe's arithmetic
    data.npz                     with --save_data: all images and labels

benchmarks/xla_step.py runs them with JAX. They are lowered from the very functions that train; variables, which those
read and assign, become inputs and outputs, as XLA has them.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from conadv_tf import config, terminal


def _export_recipe(arguments: argparse.Namespace) -> None:
    # TensorFlow takes seconds to load, which --help and a misspelt argument do without.
    import tensorflow as tf

    from conadv_tf.preflight import step_export
    from conadv_tf.run import report
    from conadv_tf.run.build import build

    config.configure(arguments.gin_file, arguments.gin_param)
    recipe = config.recipe_name(arguments.gin_file)
    built = build(recipe, tf.distribute.get_strategy(), arguments.data_dir)
    images = tf.TensorSpec((built.plan.rows, *built.data.train_shape), tf.uint8)
    step_export.export(built.model, images, arguments.out, step_export.facts(built))
    if arguments.save_data:
        step_export.save_data(built, os.path.join(arguments.out, "data.npz"))
    terminal.say(report.arithmetic(built))
    terminal.say(f"{arguments.out}: {', '.join(sorted(os.listdir(arguments.out)))}")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=terminal.path, required=True, help="folder to write")
    parser.add_argument("--gin_file", type=terminal.path, action="append", help="as in train.py")
    parser.add_argument("--gin_param", action="append", default=[], help="as in train.py")
    parser.add_argument("--data_dir", type=terminal.path, help="as in train.py")
    parser.add_argument("--save_data", action="store_true", help="write data.npz too")
    parsed = parser.parse_args(arguments)
    parsed.gin_file = parsed.gin_file or [config.DEFAULT_RECIPE]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `conadv-step-program`; returns the exit code."""
    return terminal.exit_code(
        lambda: _export_recipe(_arguments(arguments)), "--out is not whole", "check space and permissions of --out"
    )


if __name__ == "__main__":
    sys.exit(main())
