"""Every table of docs/results.md is what the command above it prints from the files in results/."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from conadv_tf.experiments import reproduce

ROOT = Path(__file__).parents[1]
# A command in backquotes on a line of its own, and the table that follows it.
SHOWN = re.findall(
    r"^`python reproduce\.py ([^`]*)`\n\n((?:\|.*\n)+)", (ROOT / "docs" / "results.md").read_text(), re.MULTILINE
)


def test_there_are_tables():
    assert len(SHOWN) >= 4


def printed_by(arguments: list[str], capsys, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)  # tables and plots are written anew, not over the ones that are kept
    (tmp_path / "results").mkdir()
    for scale in (ROOT / "results").iterdir():
        (tmp_path / "results" / scale.name).mkdir()
        for folder in filter(Path.is_dir, scale.iterdir()):
            made = tmp_path / "results" / scale.name / folder.name
            if any(folder.glob("*.md")):  # tables, of a command with a --results of its own
                made.mkdir()
            else:
                made.symlink_to(folder)
    with pytest.raises(SystemExit) as ended:
        reproduce.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("command", "table"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_command_prints_the_table_from_what_is_kept(command, table, capsys, tmp_path, monkeypatch):
    arguments = shlex.split(command)
    assert "--jobs=0" in arguments
    assert table in printed_by(arguments, capsys, tmp_path, monkeypatch)


def gain_of(scale: str, plain: str, ours: str, seeds: int) -> str:
    """Mean and standard error of the differences in test top-1 of runs at 96k, seed by seed."""
    runs = ROOT / "results" / scale / "runs" / "96k"
    top1 = [
        [json.loads((runs / f"{name}_s{seed}" / "result.json").read_text())["test_top1"] for seed in range(seeds)]
        for name in (plain, ours)
    ]
    gains = [ours - plain for plain, ours in zip(*top1, strict=True)]
    return f"{statistics.mean(gains):.2f} ± {statistics.stdev(gains) / seeds**0.5:.2f}"


def test_a_gain_is_the_mean_difference_of_runs_of_one_seed(capsys, tmp_path, monkeypatch):
    expected = gain_of("cifar10", "vanilla_lr24", "paired_lr24_e4", 3)  # the rates that are best on validation images
    arguments = shlex.split("--figure=gain --scale=cifar10 --batches=96k --rows=paired --seeds=3 --leaking --jobs=0")
    assert f"| + ConAdv, paired | {expected} †3 |" in printed_by(arguments, capsys, tmp_path, monkeypatch)


def test_a_gain_by_rate_is_of_runs_of_that_rate(capsys, tmp_path, monkeypatch):
    expected = gain_of("cifar10_sgd", "vanilla_lr0.4", "paired_lr0.4_e2", 2)
    arguments = shlex.split("--figure=rates --scale=cifar10_sgd --batches=96k --rows=vanilla,paired --seeds=2 --jobs=0")
    lines = printed_by(arguments, capsys, tmp_path, monkeypatch).splitlines()
    [line] = [line for line in lines if line.startswith("| + ConAdv, paired, gain |")]
    assert line.split(" | ")[2] == f"{expected} †1"  # one of them leaks


def leaking_seeds(scale: str, batch: str, name: str, warmup_epochs: int) -> int:
    """Kept runs whose adversarial half is more than 2 points ahead in an epoch after the warm-up."""
    count = 0
    for path in (ROOT / "results" / scale / "runs" / batch).glob(f"{name}_s*/metrics.jsonl"):
        epochs = [json.loads(line) for line in path.read_text().splitlines()][warmup_epochs:]
        count += any(100 * (line["adversarial_top1"] - line["clean_top1"]) > 2 for line in epochs)
    return count


@pytest.mark.parametrize(
    ("scale", "flags", "row", "name", "warmup_epochs"),
    [
        ("cifar10", "--leaking --seeds=8", "+ ConAdv, paired", "paired_lr24_e4", 20),
        ("cifar10", "--leaking --seeds=8", "+ DisAdv", "disadv_lr16_e4", 20),
        ("cifar10_sgd", "--seeds=3", "+ ConAdv, paired", "paired_lr6.4_e2", 5),
    ],
)
def test_the_mark_counts_the_runs_that_leak(scale, flags, row, name, warmup_epochs, capsys, tmp_path, monkeypatch):
    arguments = shlex.split(f"--table=1 --scale={scale} --batches=96k {flags} --jobs=0")
    lines = printed_by(arguments, capsys, tmp_path, monkeypatch).splitlines()
    [line] = [line for line in lines if line.startswith(f"| {row} |")]
    leaking = leaking_seeds(scale, "96k", name, warmup_epochs)
    marks = re.findall(r"†(\d+)", line)
    assert marks == ([str(leaking)] if leaking else [])


def test_without_the_flag_no_run_that_leaks_is_chosen(capsys, tmp_path, monkeypatch):
    arguments = shlex.split("--table=1 --scale=digits --batches=64k --rows=paired --seeds=1 --jobs=0")
    tops = {
        rate: json.loads((ROOT / f"results/digits/runs/64k/paired_lr{rate}_e4_s0/result.json").read_text())
        for rate in (5, 10, 20)
    }
    by_validation = sorted(tops, key=lambda rate: tops[rate]["validation_top1"])
    assert [rate for rate in tops if leaking_seeds("digits", "64k", f"paired_lr{rate}_e4", 20)] == [by_validation[-1]]
    printed = printed_by(arguments, capsys, tmp_path, monkeypatch)
    assert f"| + ConAdv, paired | {tops[by_validation[-2]]['test_top1']:.2f} |" in printed


def test_kept_tables_are_those_of_the_runs():
    """As files, Markdown and CSV, for whoever reads results/ alone."""
    for command, table in SHOWN:
        name, scale = (
            re.search(r"--(?:table|figure)=(\w+)", command).group(1),
            re.search(r"--scale=(\w+)", command).group(1),
        )
        stem = {"2": "figure2"}.get(name, name) if "--figure" in command else f"table{name}"
        results = re.search(r"--results=(\S+)|$", command).group(1) or "results"
        kept = (ROOT / results / scale / f"{stem}.md").read_text()
        assert table in kept, command
