"""Throughput over batch sizes, the paper's Figure 4, from compiled cost and all-reduce; needs no TPU, measures none.

Panel (a) has 64 images a core, the least for batch statistics. Panel (b) has 4, for batches too small for more. In both
`phased` has twice as many cores, which is what it is for: half of them train on clean images while the others train on
adversarial ones, and none waits for an attack.

A pass is compiled at both sizes by the TPU compiler, minutes each, and kept in the preflight's cache; an update is put
together from passes, and its time estimated as the preflight does it (calibrated on one measured run of plain
ResNet-50), with the all-reduce of its gradients over the slice.
"""

import dataclasses
import json
import os

from conadv_tf import paths
from conadv_tf.experiments import labels, paper
from conadv_tf.preflight.tpu_generations import GENERATIONS, Generation

K = 1024
# By the panel's name: images a core, batches.
PANELS = {
    "a": (64, (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 96 * K)),
    "b": (4, (512, K, 2 * K)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at a batch size: images/ms of clean images, and the parts of an update's milliseconds."""

    panel: str
    method: str
    batch: int
    replicas: int
    computing_ms: float
    allreduce_ms: float

    @property
    def images_per_ms(self) -> float:
        return self.batch / (self.computing_ms + self.allreduce_ms)


def markdown(panel: str, found: list[Point], generation: Generation) -> str:
    """The table of a panel: a row a batch size, the estimates, then the paper's numbers."""
    images, batches = PANELS[panel]
    own = {(point.method, point.batch): point for point in found if point.panel == panel}
    lines = [
        f"({panel}) images/ms; {generation.unit}s = batch / {images}, for phased twice as many; "
        "paper: as far as it says",
        "",
        f"| batch | {generation.unit}s | {' | '.join(labels.FIGURE4.values())} | paper: vanilla | DisAdv | ConAdv |",
        "|---" * (len(labels.FIGURE4) + 5) + "|",
    ]
    for batch in batches:
        cells = [f"{own[name, batch].images_per_ms:.1f}" if (name, batch) in own else "–" for name in labels.FIGURE4]
        reported = paper.FIGURE4[panel].get(batch, {})
        cells += [_reported_text(panel, name, reported.get(name)) for name in ("vanilla", "disadv", "conadv")]
        lines.append(f"| {batch:,} | {batch // images:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _reported_text(panel: str, name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"≈ {value:.0f}" if (panel, name) == ("a", "conadv") else f"{value:.1f}"


def ratios(found: list[Point]) -> str:
    """The paper's conclusions beside ours: throughput of ConAdv over another method, at the paper's batch sizes."""
    own = {(point.panel, point.method, point.batch): point.images_per_ms for point in found}
    lines = ["| | over | batch | ours: shadow | paired | phased | paper: ConAdv |", "|---|---|---|---|---|---|---|"]
    for panel, base, batch in (
        ("a", "disadv", 4 * K),
        ("a", "disadv", 32 * K),
        ("b", "disadv", 2 * K),
        ("b", "vanilla", 2 * K),
    ):
        reported = paper.FIGURE4[panel][batch]["conadv"] / paper.FIGURE4[panel][batch][base]
        values = [own[panel, name, batch] / own[panel, base, batch] for name in ("shadow", "paired", "phased")]
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| ({panel}) | {labels.FIGURE4[base]} | {batch:,} | {cells} | {reported:.2f} |")
    return "\n".join(lines)


def write(found: list[Point], generation: Generation, folder: str) -> None:
    """Keeps the points in the folder's scaling.json, whole or not at all: it is not made again."""
    os.makedirs(folder, exist_ok=True)
    content = [{**dataclasses.asdict(point), "images_per_ms": point.images_per_ms} for point in found]
    text = json.dumps({"generation": generation.name, "points": content}, indent=1)
    paths.write_whole(os.path.join(folder, "scaling.json"), text)


def read(folder: str) -> tuple[list[Point], Generation]:
    """The points that `write` kept in a folder, and the generation they are for."""
    with open(os.path.join(folder, "scaling.json"), encoding="utf-8") as file:
        content = json.load(file)
    names = [field.name for field in dataclasses.fields(Point)]
    found = [Point(**{name: kept[name] for name in names}) for kept in content["points"]]
    return found, GENERATIONS[content["generation"]]


def text(found: list[Point], generation: Generation) -> str:
    """The tables of both panels, and the paper's conclusions."""
    caption = f"Figure 4. Estimated for TPU {generation.name} from compiled programs; paper: measured on TPU v3."
    return "\n\n".join([caption, *(markdown(panel, found, generation) for panel in PANELS), ratios(found)])
