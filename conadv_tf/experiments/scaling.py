"""The points of Figure 4, made by compiling the passes of the methods; see figure4.py."""

import sys
from collections.abc import Callable

import tensorflow as tf

from conadv_tf import config, methods, terminal
from conadv_tf.errors import RunError
from conadv_tf.experiments.figure4 import PANELS, Point
from conadv_tf.methods.attack import Attack
from conadv_tf.preflight.passes import contributed_bytes
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.table import Work, estimated_seconds
from conadv_tf.preflight.tpu_compiler import Compiler
from conadv_tf.preflight.tpu_generations import Generation, allreduce_seconds
from conadv_tf.run.build import Run, build

LARGEST_SLICE = 2048  # cores of a v3 pod, chips of most others


def compared() -> list[methods.Method]:
    """The methods of the figure: schedules at their cheapest, where a clean pass yields both gradients."""
    schedules = [methods.conadv(Attack(label="smoothed"), schedule=name) for name in ("paired", "phased")]
    return [methods.vanilla(), methods.disadv(), methods.conadv(), *schedules]


def built_run(recipe: str, images: int) -> Run:
    """A recipe with `images` images on one replica, on synthetic data of the recipe's image size."""
    settings = [f"train.global_batch_size = {images}", f"train.microbatch_size = {images}"]
    config.configure_without_files([recipe], settings)
    return build("scaling", tf.distribute.OneDeviceStrategy("CPU:0"), None, 1)


def compile_passes(built: Run, images: int, compiler: Compiler, end: Work | None) -> dict[str, Work]:
    """The passes of methods by kind, and "end": what an update does once, whatever the number of `images`."""
    programs = Programs(built, images)

    def cost(name: str, lower: Callable[[], bytes]) -> Work:
        terminal.say(f"  {name}, {images} images", sys.stderr)
        compiled = compiler.compile(lower())
        if compiled.over_bytes:
            raise RunError(f"{name} of {images} images exceeds the HBM of {compiler.generation.name}: use another one")
        return Work.of(compiled)

    whole = cost("vanilla", lambda: programs.update(methods.vanilla()))
    shadow, paired = methods.conadv(Attack()), methods.conadv(Attack(label="smoothed"), schedule="paired")
    both = next(iter(paired.passes))
    passes = {
        "attack": cost("attack", lambda: programs.attack(shadow)),
        both: cost("clean pass with attack", lambda: programs.training_pass_with_attack(paired)),
        "end": end or cost("end of an update", programs.end_of_update),
    }
    return {**passes, "train": whole - passes["end"]}


def point(
    panel: str,
    method: methods.Method,
    batch: int,
    passes: dict[str, Work],
    contributed: int,
    generation: Generation,
) -> Point | None:
    """The point of a method at a batch size in a panel; None where there is no slice of that size."""
    images, _ = PANELS[panel]
    replicas = batch // images * method.updates_per_batch
    if replicas > LARGEST_SLICE or replicas % generation.replicas_per_chip:
        return None
    work = sum((passes[name] * count for name, count in method.passes.items()), passes["end"])
    moving = allreduce_seconds(generation, replicas, contributed)
    return Point(panel, method.kind, batch, replicas, 1000 * estimated_seconds(work, generation), 1000 * moving)


def points(recipe: str, generation: Generation) -> list[Point]:
    """The whole figure for the network of a recipe; compiles what has not been compiled before.

    Raises:
      ConfigError: without the TPU compiler.
      RunError: if it fails, or a pass exceeds the HBM.
    """
    compiler, found, end = Compiler(generation), [], None
    for panel, (images, batches) in PANELS.items():
        built = built_run(recipe, images)
        passes = compile_passes(built, images, compiler, end)
        end = passes["end"]
        for method in compared():
            contributed = contributed_bytes(built, method)
            made = [point(panel, method, batch, passes, contributed, generation) for batch in batches]
            found += [one for one in made if one]
    return found
