"""What the TPU compiler says of one update of every method and schedule, beside tf-models' ResNet-50; needs no TPU.

    python benchmarks/tpu_cost.py [--rows=64] [--generation=v3] [--only="vanilla;paired"] [--check]

Every update is compiled whole, minutes each; what was compiled before comes from the preflight's cache. Prints a
Markdown table and writes tpu_cost.json. Both measures are the compiler's: `optimal` is its lower bound of the time,
`Mcycles` the sum of its estimates for each instruction. `phased` is per update. The ratio of temporary memory is apart
from what a schedule carries to the next update.

`--check` fails, and names each figure that is missed: the ratios at 64 images a core, the spare memory at 192.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

import tensorflow as tf
import tf_keras
from official.modeling.optimization import lars as tfm_lars
from official.vision.modeling import classification_model
from official.vision.modeling.backbones import resnet as tfm_resnet

from conadv_tf import config, methods, terminal
from conadv_tf.methods.attack import Attack
from conadv_tf.models.resnet import IMAGENET_MEAN, IMAGENET_STDDEV
from conadv_tf.preflight.passes import carried_bytes
from conadv_tf.preflight.programs import Programs, lower
from conadv_tf.preflight.table import Work
from conadv_tf.preflight.tpu_compiler import Compiler, Cost
from conadv_tf.preflight.tpu_generations import GENERATIONS, Generation
from conadv_tf.run.build import Run, build

TF_MODELS, VANILLA = "tf-models ResNet-50", "vanilla"
MOVING = "shadow with an attack on moving statistics"
PREDICTED = "paired, predicted label"
# The schedules at their cheapest: the training gradient's own label, which leaks (docs/method.md).
LABELS = {"paired": "smoothed", "phased": "smoothed"}
# Highest ratios of (optimal, cycles) to vanilla's; of vanilla to tf-models'. TPU v3, 64 images a core.
GOALS = {
    VANILLA: (0.89, 0.90),
    "shadow": (2.75, 2.8),
    "lookahead": (2.75, 2.8),
    "paired": (2.0, 2.03),
    PREDICTED: (2.4, 2.4),
    "phased": (1.04, 1.06),
}
GOAL_ROWS, GOAL_TEMP = 64, 1.15
SPARE_ROWS, GOAL_SPARE = 192, 0.30


def built_run(recipe: str, rows: int) -> Run:
    """A recipe with `rows` images on one replica; on synthetic ones of their size where its data are files."""
    settings = [f"train.global_batch_size = {rows}", f"train.microbatch_size = {rows}"]
    config.configure_without_files([recipe], settings)
    return build("tpu_cost", tf.distribute.OneDeviceStrategy("CPU:0"), None, 1)


def tf_models_update(rows: int) -> bytes:
    """One update of tf-models' ResNet-50 in bfloat16 under its own LARS, on the same uint8 images."""
    policy = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        images = tf_keras.layers.InputSpec(shape=[None, 224, 224, 3])
        backbone = tfm_resnet.ResNet(50, input_specs=images, norm_momentum=0.9, norm_epsilon=1e-5)
        model = classification_model.ClassificationModel(backbone, 1000, input_specs=images)
    finally:
        tf_keras.mixed_precision.set_global_policy(policy)
    optimizer = tfm_lars.LARS(0.1, 0.9, 5e-4, exclude_from_weight_decay=["gamma", "beta", "bias"])
    optimizer._create_all_weights(model.trainable_variables)

    def update(images, labels):
        scaled = tf.cast(images, tf.float32) / 255.0
        inputs = tf.cast((scaled - tf.constant(IMAGENET_MEAN)) / tf.constant(IMAGENET_STDDEV), tf.bfloat16)
        with tf.GradientTape() as tape:
            logits = tf.cast(model(inputs, training=True), tf.float32)
            targets = tf.one_hot(labels, 1000) * 0.9 + 0.1 / 1000
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
        gradients = tape.gradient(loss, model.trainable_variables)
        pairs = zip(gradients, model.trainable_variables, strict=True)
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        return loss

    return lower(update, tf.TensorSpec((rows, 224, 224, 3), tf.uint8), tf.TensorSpec((rows,), tf.int32))


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update: its cost, and the bytes that it hands to the next one."""

    cost: Cost
    carried_bytes: int = 0


def compile_all(recipe: str, rows: int, generation: Generation, only: list[str]) -> dict[str, Update]:
    """One update by name of the method; tf-models' where the recipe trains ResNet-50."""
    built = built_run(recipe, rows)
    programs, compiler = Programs(built, rows), Compiler(generation)
    compared = {VANILLA: methods.vanilla(), "disadv": methods.disadv()}
    for schedule in methods.schedules_of("conadv"):
        compared[schedule] = methods.conadv(Attack(label=LABELS.get(schedule, "auto")), schedule=schedule, tau=1)
    predicted = Attack(label="predicted")
    compared[PREDICTED] = methods.conadv(predicted, schedule="paired")
    compared["phased, predicted label"] = methods.conadv(predicted, schedule="phased")
    compared |= {"noise": methods.noise(), "sam": methods.sam(), "sam_stale": methods.sam(stale=True)}
    compared[MOVING] = methods.conadv(Attack(batch_norm="moving"), tau=1)

    def compiled(name: str, lowered: Callable[[], bytes]) -> Cost:
        print(f"  compiling {name}", file=sys.stderr, flush=True)
        return compiler.compile(lowered())

    updates = {}
    if built.model.network.architecture == "resnet50" and (not only or TF_MODELS in only):
        updates[TF_MODELS] = Update(compiled(TF_MODELS, lambda: tf_models_update(rows)))
    for name, method in compared.items():
        if not only or name in only:
            cost = compiled(name, lambda method=method: programs.update(method))
            updates[name] = Update(cost, carried_bytes(built, rows, method))
    return updates


def base_of(name: str) -> str:
    return TF_MODELS if name == VANILLA else VANILLA


def ratios(name: str, updates: dict[str, Update]) -> tuple[float | None, float | None, float | None]:
    """(optimal, cycles, temporary memory) over those of `base_of(name)`; None where one of them is not known."""
    if name == TF_MODELS or base_of(name) not in updates:
        return None, None, None
    own, base = updates[name].cost, updates[base_of(name)].cost
    if own.over_bytes or base.over_bytes:
        return None, None, None
    seconds, base_seconds = Work.of(own).compiler_seconds(), Work.of(base).compiler_seconds()
    optimal = seconds / base_seconds if seconds and base_seconds else None
    temporary = own.temp_bytes - updates[name].carried_bytes
    return optimal, own.cycles / base.cycles, temporary / base.temp_bytes


def spare(cost: Cost, generation: Generation) -> float:
    """Share of HBM that is left; negative where the program does not fit."""
    if cost.over_bytes:
        return -cost.over_bytes / generation.hbm_bytes
    return 1 - (cost.resident_bytes + cost.temp_bytes) / generation.hbm_bytes


def markdown(updates: dict[str, Update], generation: Generation) -> str:
    lines = ["| | optimal | Mcycles | TFLOP | temp | HBM spare | × optimal | × cycles | × temp |", "|---" * 9 + "|"]
    for name, update in updates.items():
        cost = update.cost
        seconds = Work.of(cost).compiler_seconds()
        optimal = f"{1000 * seconds:.1f} ms" if seconds else "–"
        relative = [f"{ratio:.3f}" if ratio else "–" for ratio in ratios(name, updates)]
        absolute = [optimal, f"{cost.cycles / 1e6:.1f}", f"{cost.flop / 1e12:.3f}", f"{cost.temp_bytes / 1e9:.2f} GB"]
        cells = [name, *absolute, f"{100 * spare(cost, generation):.0f} %", *relative]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"× is to {VANILLA}; of {VANILLA} to {TF_MODELS}."])


def missed(updates: dict[str, Update], rows: int, generation: Generation) -> list[str]:
    """A line for each figure that is missed, or cannot be judged."""
    found = []
    for name in [name for name in GOALS if name in updates]:
        optimal, cycles, temp = ratios(name, updates)
        figures = [("optimal", optimal, GOALS[name][0]), ("cycles", cycles, GOALS[name][1])]
        figures += [("temporary memory", temp, GOAL_TEMP)] if name != VANILLA else []
        if rows == GOAL_ROWS and generation.name == "v3":
            found += [
                f"{name} / {base_of(name)}, {what}: {'unknown' if value is None else f'{value:.3f}'}, goal ≤ {goal}"
                for what, value, goal in figures
                if value is None or value > goal
            ]
        left = spare(updates[name].cost, generation)
        if rows == SPARE_ROWS and generation.name == "v3" and left < GOAL_SPARE:
            found.append(f"{name}, HBM spare at {rows} images: {100 * left:.0f} %, goal ≥ {100 * GOAL_SPARE:.0f} %")
    return found


def main() -> None:
    terminal.take_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=GOAL_ROWS)
    parser.add_argument("--generation", choices=sorted(GENERATIONS), default="v3")
    parser.add_argument("--gin_file", type=terminal.path, default="96k_conadv.gin")
    parser.add_argument("--only", default="", help="names of rows, with semicolons between")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    generation = GENERATIONS[arguments.generation]
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    updates = compile_all(arguments.gin_file, arguments.rows, generation, only)
    print(markdown(updates, generation))
    rows = {name: {**dataclasses.asdict(each), "ratios": ratios(name, updates)} for name, each in updates.items()}
    misses = missed(updates, arguments.rows, generation)
    with open("tpu_cost.json", "w", encoding="utf-8") as file:
        json.dump({"arguments": vars(arguments), "rows": rows, "missed": misses}, file, indent=2)
    if arguments.check and misses:
        sys.exit("\n".join(["missed:", *misses]))


if __name__ == "__main__":
    main()
