"""Throughput over batch sizes, the paper's Figure 4, from compiled cost and all-reduce; needs no TPU, measures none.

(a) as many cores as the batch has times 64 images, the least for batch statistics; (b) as many as it has times 4, at
batches too small for more. `phased` has twice as many cores in both, which is what it is for: half of them train on
clean images while the others train on adversarial ones, none waits for an attack.

A pass is compiled at both sizes by the TPU compiler, minutes each, and kept in the preflight's cache; an update is put
together from passes, and its time estimated as the preflight does it (calibrated on one measured run of plain
ResNet-50), with the all-reduce of its gradients over the slice.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable

import tensorflow as tf

from conadv_tf import config, methods
from conadv_tf.errors import RunError
from conadv_tf.methods.attack import Attack
from conadv_tf.preflight.passes import contributed_bytes
from conadv_tf.preflight.programs import Programs
from conadv_tf.preflight.table import Work, estimated_seconds
from conadv_tf.preflight.tpu_compiler import Compiler
from conadv_tf.preflight.tpu_generations import GENERATIONS, Generation, allreduce_seconds
from conadv_tf.run.build import Run, build

K = 1024
# (name, rows of a core, batches)
PANELS = {
    "a": (64, (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 96 * K)),
    "b": (4, (512, K, 2 * K)),
}
# Images/ms in the text of the paper's section 4.2, by panel, batch and method. ConAdv in (a): "about 1.5x" of DisAdv.
PAPER = {
    "a": {4 * K: {"disadv": 10.3, "conadv": 1.5 * 10.3}, 32 * K: {"disadv": 81.7, "conadv": 1.5 * 81.7}},
    "b": {2 * K: {"vanilla": 75.7, "disadv": 36.1, "conadv": 71.3}},
}
LABELS = {
    "vanilla": "vanilla",
    "disadv": "DisAdv",
    "shadow": "ConAdv, shadow",
    "paired": "ConAdv, paired",
    "phased": "ConAdv, phased (twice the cores)",
}
LARGEST_SLICE = 2048  # cores of a v3 pod, chips of most others


@dataclasses.dataclass(frozen=True)
class Point:
    """One method at one batch size: images/ms of clean images, and how an update's milliseconds come about."""

    panel: str
    method: str
    batch: int
    replicas: int
    computing_ms: float
    allreduce_ms: float

    @property
    def images_per_ms(self) -> float:
        return self.batch / (self.computing_ms + self.allreduce_ms)


def compared() -> list[methods.Method]:
    """The methods of the figure."""
    schedules = [methods.conadv(schedule=name) for name in ("shadow", "paired", "phased")]
    return [methods.vanilla(), methods.disadv(), *schedules]


def built_run(recipe: str, rows: int) -> Run:
    """A recipe with `rows` images on one replica, on synthetic data of its size."""
    settings = [f"train.global_batch_size = {rows}", f"train.microbatch_size = {rows}"]
    config.configure_without_files([recipe], settings)
    return build("scaling", tf.distribute.OneDeviceStrategy("CPU:0"), None, 1)


def compile_passes(built: Run, rows: int, compiler: Compiler, end: Work | None) -> dict[str, Work]:
    """The passes of methods by kind, and "end": what an update does once, which does not depend on `rows`."""
    programs = Programs(built, rows)

    def cost(name: str, lower: Callable[[], bytes]) -> Work:
        print(f"  {name}, {rows} images", file=sys.stderr, flush=True)
        compiled = compiler.compile(lower())
        if compiled.over_bytes:
            raise RunError(f"{name} of {rows} images exceeds the HBM of {compiler.generation.name}: use another one")
        return Work.of(compiled)

    whole = cost("vanilla", lambda: programs.update(methods.vanilla()))
    passes = {
        "attack": cost("attack", lambda: programs.attack(Attack())),
        "train and attack": cost("clean pass with attack", lambda: programs.training_pass_with_attack(Attack())),
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
    """None where there is no slice of the size."""
    rows, _ = PANELS[panel]
    replicas = batch // rows * method.updates_per_batch
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
    for panel, (rows, batches) in PANELS.items():
        built = built_run(recipe, rows)
        passes = compile_passes(built, rows, compiler, end)
        end = passes["end"]
        for method in compared():
            contributed = contributed_bytes(built, method)
            made = [point(panel, method, batch, passes, contributed, generation) for batch in batches]
            found += [each for each in made if each]
    return found


def markdown(panel: str, found: list[Point], generation: Generation) -> str:
    """One row a batch size; ours, then the paper's."""
    rows, batches = PANELS[panel]
    own = {(each.method, each.batch): each for each in found if each.panel == panel}
    lines = [
        f"({panel}) images/ms; {generation.unit}s = batch / {rows}, for phased twice as many; paper: as far as it says",
        "",
        f"| batch | {generation.unit}s | {' | '.join(LABELS.values())} | paper: vanilla | DisAdv | ConAdv |",
        "|---" * (len(LABELS) + 5) + "|",
    ]
    for batch in batches:
        cells = [f"{own[name, batch].images_per_ms:.1f}" if (name, batch) in own else "–" for name in LABELS]
        said = PAPER[panel].get(batch, {})
        cells += [_said(panel, name, said[name]) if name in said else "–" for name in ("vanilla", "disadv", "conadv")]
        lines.append(f"| {batch:,} | {batch // rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(panel: str, name: str, value: float) -> str:
    return f"≈ {value:.0f}" if (panel, name) == ("a", "conadv") else f"{value:.1f}"


def ratios(found: list[Point]) -> str:
    """What the paper concludes, at the batch sizes it names."""
    own = {(each.panel, each.method, each.batch): each.images_per_ms for each in found}
    lines = ["| | over | batch | ours: shadow | paired | phased | paper: ConAdv |", "|---|---|---|---|---|---|---|"]
    for panel, base, batch, paper in (
        ("a", "disadv", 4 * K, 1.5),
        ("a", "disadv", 32 * K, 1.5),
        ("b", "disadv", 2 * K, 71.3 / 36.1),
        ("b", "vanilla", 2 * K, 71.3 / 75.7),
    ):
        values = [own[panel, name, batch] / own[panel, base, batch] for name in ("shadow", "paired", "phased")]
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| ({panel}) | {LABELS[base]} | {batch:,} | {cells} | {paper:.2f} |")
    return "\n".join(lines)


def write(found: list[Point], generation: Generation, folder: str) -> None:
    """Keeps the points in the folder's scaling.json."""
    os.makedirs(folder, exist_ok=True)
    content = [{**dataclasses.asdict(each), "images_per_ms": each.images_per_ms} for each in found]
    with open(os.path.join(folder, "scaling.json"), "w") as file:
        json.dump({"generation": generation.name, "points": content}, file, indent=1)


def read(folder: str) -> tuple[list[Point], Generation]:
    """What `write` kept in a folder."""
    with open(os.path.join(folder, "scaling.json")) as file:
        content = json.load(file)
    names = [field.name for field in dataclasses.fields(Point)]
    found = [Point(**{name: each[name] for name in names}) for each in content["points"]]
    return found, GENERATIONS[content["generation"]]


def text(found: list[Point], generation: Generation) -> str:
    """The tables of both panels, and what the paper concludes."""
    caption = f"Figure 4. Estimated for TPU {generation.name} from compiled programs; paper: measured on TPU v3."
    return "\n\n".join([caption, *(markdown(panel, found, generation) for panel in PANELS), ratios(found)])
