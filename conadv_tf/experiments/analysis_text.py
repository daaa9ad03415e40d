"""The numbers of analysed runs as a row of a CSV file and a table in Markdown; see analyze.py."""

import csv
import io
import os
from collections.abc import Iterable
from typing import Any

ATTACK_NAMES = ("FGSM", "PGD-20")
DIRECTIONS = 10  # seeds 0, 1, ...; the surface spans the first two
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


def attack_key(attack_name: str) -> str:
    """The attack's name as a key: PGD-20 is pgd20."""
    return attack_name.lower().replace("-", "")


def flat_row(analysis: dict) -> dict[str, Any]:
    """The numbers of one run by the names of the CSV's columns; None where a method has no such setting."""
    row = {name: analysis[name] for name in ("run", *FACTS)}
    row |= {"train_loss": analysis["sharpness"]["loss"], "lambda_max": analysis["sharpness"]["lambda_max"]}
    row["lambda_residual"] = analysis["sharpness"]["residual"]
    for rise in analysis["loss_rise"]:
        row |= {f"loss_rise_{of}_at_{rise['radius']:g}": rise[of] for of in ("mean", "max")}
    row["clean_top1"] = analysis["robustness"]["clean_top1"]
    for accuracies in analysis["robustness"]["attacked"]:
        for name in ATTACK_NAMES:
            row[f"{attack_key(name)}_top1_at_{accuracies['epsilon_pixels']:g}"] = accuracies[f"{attack_key(name)}_top1"]
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
        f"times the norm of each filter): {_counts(analyses, 'train')} training images. Clean, "
        f"{' / '.join(ATTACK_NAMES)}: top-1 in percent of {_counts(analyses, 'test')} test images, ε in pixel levels. "
        "Test top-1, gap: every image."
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
        both = (f"{accuracies[f'{attack_key(name)}_top1']:.1f}" for name in ATTACK_NAMES)
        cells[f"ε = {accuracies['epsilon_pixels']:g}: {' / '.join(ATTACK_NAMES)}"] = " / ".join(both)
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
