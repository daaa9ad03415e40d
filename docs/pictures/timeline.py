"""Draws docs/pictures/timeline.png: which pass of which batch runs when, and what it waits for, by schedule.

    python docs/pictures/timeline.py

Widths are forward units: an attack is a forward pass and the gradient by the images, 2; a training pass has the
gradient by the weights beside it, 3.
"""

import argparse
import os
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches, pyplot

PICTURE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "timeline.png")
# Width, colour, hatching and letter of each kind of pass.
KINDS = {
    "attack": (2, "#f3c98b", "////"),
    "clean": (3, "#cfe0f0", None),
    "adv.": (3, "#d9c7e6", "...."),
}
WORDS = {"attack": "attack, makes x̂", "clean": "clean training pass", "adv.": "adversarial training pass, on x̂"}
END = 16.6  # forward units of the axis
HEIGHT = 0.62  # of a box, in lanes


class Pass(NamedTuple):
    """A pass over batch `batch`; `weights` says which weights an attack looks at."""

    kind: str
    batch: int
    weights: str = ""


class Arrow(NamedTuple):
    """What a pass waits for: from a place in time of a lane to another, with a word on it."""

    start: tuple[float, int]
    end: tuple[float, int]
    word: str
    word_at: tuple[float, float]
    bend: float = 0.0


class Panel(NamedTuple):
    """A schedule: its lanes of passes, the units of an update, and the arrows."""

    title: str
    lanes: list[list[Pass]]
    units: int
    arrows: list[Arrow]
    names: list[str]


def panels() -> list[Panel]:
    """The schedules, from the first update of a steady run."""

    def sequential(weights: dict[int, str]) -> list[Pass]:
        return [p for t in (1, 2) for p in (Pass("attack", t, weights[t]), Pass("clean", t), Pass("adv.", t))]

    return [
        Panel(
            "DisAdv: 8 units an update. The attack waits for the weights of the update before it.",
            [sequential({1: "θ₁", 2: "θ₂"})],
            8,
            [Arrow((8, 0), (9, 0), "θ₂", (9.35, -0.58), -0.9)],
            ["every replica"],
        ),
        Panel(
            "shadow: 8 units an update. The attack takes weights one update old and waits for nothing of this one.",
            [sequential({1: "θ₀", 2: "θ₁"})],
            8,
            [Arrow((0, 0), (9, 0), "θ₁, kept as a shadow copy", (4.5, -0.6), -0.085)],
            ["every replica"],
        ),
        Panel(
            "paired: 7 units an update, 6 with the true label, as drawn. The clean pass yields the next update's x̂.",
            [[Pass("clean", 1), Pass("adv.", 0), Pass("clean", 2), Pass("adv.", 1)]],
            6,
            [Arrow((1.5, 0), (10.5, 0), "x̂ of batch 1", (6, -0.62), -0.085)],
            ["every replica"],
        ),
        Panel(
            "phased: 4 units a replica, 3 with the true label, as drawn. It is paired on two groups in turns.",
            [
                [Pass("clean", 1), Pass("adv.", 1), Pass("clean", 3), Pass("adv.", 3), Pass("clean", 5)],
                [Pass("adv.", 0), Pass("clean", 2), Pass("adv.", 2), Pass("clean", 4), Pass("adv.", 4)],
            ],
            3,
            [
                Arrow((1.5, 0), (4.5, 0), "x̂ of batch 1", (3, -0.67), -0.35),
                Arrow((4.5, 1), (7.5, 1), "x̂ of batch 2", (6, 1.66), 0.35),
            ],
            ["even replicas", "odd replicas"],
        ),
    ]


def _draw_panel(axis, panel: Panel) -> None:
    for lane, passes in enumerate(panel.lanes):
        left = 0
        for each in passes:
            width, color, hatch = KINDS[each.kind]
            box = patches.Rectangle((left, lane - HEIGHT / 2), width, HEIGHT, facecolor=color, edgecolor="#222222")
            box.set(hatch=hatch, linewidth=1.1)
            axis.add_patch(box)
            text = f"{each.kind} {each.batch}" + (f"\nat {each.weights}" if each.weights else "")
            background = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
            axis.text(left + width / 2, lane, text, ha="center", va="center", fontsize=11, bbox=background)
            left += width
        axis.text(-0.2, lane, panel.names[lane].replace(" ", "\n"), ha="right", va="center", fontsize=11)
    bottom, top = len(panel.lanes) - 1 + HEIGHT / 2, -HEIGHT / 2
    for update in range(1, int(END // panel.units) + 1):
        if update * panel.units <= sum(KINDS[p.kind][0] for p in panel.lanes[0]):
            axis.plot([update * panel.units] * 2, [top - 0.12, bottom + 0.12], color="black", linewidth=3)
    for arrow in panel.arrows:
        edge = HEIGHT / 2 if arrow.word_at[1] > arrow.start[1] else -HEIGHT / 2
        start, end = ((x, lane + edge) for x, lane in (arrow.start, arrow.end))
        style = f"arc3,rad={arrow.bend}"
        axis.add_patch(
            patches.FancyArrowPatch(
                start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=15, linewidth=1.6, color="#8c1c13"
            )
        )
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.text(*arrow.word_at, arrow.word, ha="center", va="center", fontsize=11, color="#8c1c13", bbox=background)
    axis.set_title(panel.title, loc="left", fontsize=12, pad=4)
    axis.set_xlim(-2.1, END)
    axis.set_ylim(bottom + (0.75 if len(panel.lanes) > 1 else 0.2), top - 0.62)
    axis.axis("off")


def draw(path: str) -> None:
    """A panel a schedule, from above, time to the right."""
    shown = panels()
    heights = [1.0, 1.0, 1.0, 2.1]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(9.8, 6.9), height_ratios=heights, layout="constrained")
    for axis, panel in zip(axes, shown, strict=True):
        _draw_panel(axis, panel)
    handles = [
        patches.Patch(facecolor=color, edgecolor="#222222", hatch=hatch, label=f"{WORDS[kind]} ({width})")
        for kind, (width, color, hatch) in KINDS.items()
    ]
    handles.append(matplotlib.lines.Line2D([], [], color="black", linewidth=3, label="update"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=11,
        columnspacing=1.0,
        handletextpad=0.5,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=PICTURE, help="the picture")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
