"""reproduce.py: tables from runs, what is not run twice, kills, failures; on digits with few epochs."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fast_python
import pytest
from test_fingerprint import SMALL, make_data

from conadv_tf.experiments import jobs, paper, tables
from conadv_tf.experiments.reproduce import main
from conadv_tf.experiments.study import Cell, Group

ROOT = Path(__file__).parents[1]
SHORT = [
    "--gin_param=train.epochs=2",
    "--gin_param=learning_rate.warmup_epochs=1",
    "--gin_param=train.evaluate_every_epochs=1",
]
ARGUMENTS = ["reproduce.py", "--scale=digits", "--batches=256k", "--rows=vanilla", "--jobs=2", *SHORT]


def reproduce(results: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [fast_python.path(), *ARGUMENTS, *arguments, f"--results={results}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, **options)


def result_files(results: Path) -> list[Path]:
    return sorted(results.glob("digits/runs/256k/*/result.json"))


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def first_column(text: str) -> list[str]:
    """The labels of a table's lines, without its head."""
    return [row[0] for row in table_rows(text)[2:]]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory) -> tuple[Path, str]:
    """(results, what was printed) of Table 1 with one method, two seeds."""
    results = tmp_path_factory.mktemp("results")
    outcome = reproduce(results, "--table=1", "--figure=curves", "--seeds=2")
    assert outcome.returncode == 0, outcome.stderr
    return results, outcome.stdout


def test_the_table_is_of_the_runs_with_the_rate_that_is_best_on_validation_images(reproduced):
    results, printed = reproduced
    runs = {path.parent.name: json.loads(path.read_text()) for path in result_files(results)}
    assert len(runs) == 4  # three rates, and a second seed of the best
    tried = {name: run for name, run in runs.items() if name.endswith("_s0")}
    best = max(
        sorted(tried, key=lambda name: float(name.split("_lr")[1].split("_")[0])),
        key=lambda name: tried[name]["validation_top1"],
    )
    values = [runs[best]["test_top1"], runs[best.replace("_s0", "_s1")]["test_top1"]]
    expected = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert ["ResNet", expected] in table_rows(printed)


def test_the_table_is_kept_as_markdown_csv_and_plot(reproduced):
    results, printed = reproduced
    assert (results / "digits" / "table1.md").read_text().strip() in printed
    with open(results / "digits" / "table1.csv") as file:
        (line,) = csv.DictReader(file)
    assert (line["row"], line["column"], line["runs"]) == ("ResNet", "256k", "2")
    assert f"{float(line['mean']):.2f}" in printed
    for name in ("table1", "curves"):
        assert (results / "digits" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def printed_by(capsys, results: Path, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a call that has nothing to train."""
    return called(capsys, *ARGUMENTS[1:], *arguments, f"--results={results}")


def called(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code, *capsys.readouterr()


def test_what_has_finished_is_not_run_again(reproduced, capsys):
    results, printed = reproduced
    before = {path: path.stat().st_mtime_ns for path in result_files(results)}
    code, again, _ = printed_by(capsys, results, "--table=1", "--seeds=2")
    assert code == 0
    assert table_rows(again) == table_rows(printed)[:3]
    assert {path: path.stat().st_mtime_ns for path in result_files(results)} == before


def test_without_jobs_it_prints_what_is_there(reproduced, capsys):
    results, _ = reproduced
    code, printed, _ = printed_by(capsys, results, "--table=1", "--seeds=3", "--jobs=0")
    assert code == 0
    assert re.search(r"\| ResNet \| [\d.]+ ± [\d.]+ \(2\) \|", printed)
    _, empty, _ = printed_by(capsys, results, "--table=2", "--batches=128k", "--jobs=0")
    assert ["ResNet", "–"] in table_rows(empty)


def test_one_seed_has_no_standard_error(tmp_path, capsys):
    _, printed, _ = printed_by(capsys, tmp_path, "--figure=gain", "--rows=conadv", "--seeds=1", "--jobs=0")
    assert "Measured at the scale digits, one seed; paper:" in printed


def test_runs_of_another_recipe_are_refused(reproduced, capsys):
    results, _ = reproduced
    code, _, error = printed_by(capsys, results, "--table=1", "--gin_param=lars.momentum=0.5")
    assert code == 2
    assert re.search(r"was run with lars.momentum = 0.9, its recipe now says 0.5: pass another --results", error)


@pytest.mark.long
def test_runs_on_other_data_are_refused(tmp_path, capsys):
    """Seen to fail: the tables of the first fold, as if they were the second's."""
    folds = [make_data(tmp_path / name, seed) for seed, name in enumerate(("fold1", "fold2"))]
    own = ("data.source", "tfrecords.", "model.name", "train.global_", "train.microbatch_")
    params = [param for param in SMALL if param.startswith(tuple(f"--gin_param={name}" for name in own))]
    params += ["--gin_param=subset.train_images=30", "--gin_param=subset.validation_images=10"]
    given = ["--table=1", "--seeds=1", *params, f"--results={tmp_path}/results"]

    def code(fold: Path) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*ARGUMENTS[1:], *given, f"--data_dir={fold}"])
        return ended.value.code

    assert code(folds[0]) == 0
    capsys.readouterr()
    assert code(folds[1]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"holds a run on the data that {folds[0]} had then, {folds[1]} has others (t" in line
    assert line.endswith("here another --results, and --runs where it is given")
    assert code(folds[0].rename(tmp_path / "moved")) == 0


def keep(reproduced: tuple[Path, str], results: Path, rate: int) -> None:
    """Puts the finished run of a rate into another folder of results."""
    run = Path("digits", "runs", "256k", f"vanilla_lr{rate}_s0")
    shutil.copytree(reproduced[0] / run, results / run)


def processes_of(path: Path) -> list[int]:
    """Those that a folder is named to."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(path) in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.long
def test_killed_and_started_again_it_makes_the_same_table(reproduced, tmp_path):
    _, printed = reproduced
    keep(reproduced, tmp_path, 5)
    command = [fast_python.path(), *ARGUMENTS, "--table=1", "--seeds=2", f"--results={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (runs := processes_of(tmp_path / "digits" / "runs" / "256k" / "vanilla_lr10_s0")):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(runs[0], signal.SIGKILL)  # a run alone: that is no failure of it
    while len(list(tmp_path.glob("digits/runs/256k/*/metrics.jsonl"))) < 2:  # in the midst of two others
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    assert b"256k/vanilla_lr10_s0: interrupted, goes on" in process.communicate()[0]
    # The runs it had started go on, and are waited for.
    again = reproduce(tmp_path, "--table=1", "--seeds=2")
    assert again.returncode == 0, again.stderr
    assert table_rows(again.stdout) == table_rows(printed)[:3]


# Takes its stdin for the terminal that it is controlled by, and becomes another program. Not pty.fork: TensorFlow's
# threads do not survive in a fork, which may wait for one of them for ever.
IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("end", ["Ctrl-C", "closed terminal"])
def test_ended_from_its_terminal_its_runs_are_saved(end, tmp_path):
    command = [sys.executable, *ARGUMENTS[: -len(SHORT)], "--jobs=1", "--table=1", "--seeds=1", f"--results={tmp_path}"]
    command += ["--gin_param=train.epochs=100000", "--gin_param=train.checkpoint_every_epochs=50000"]
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *command],
        cwd=ROOT,
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    log = tmp_path / "digits" / "runs" / "256k" / "vanilla_lr5_s0" / "log.txt"
    metrics = log.with_name("metrics.jsonl")
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    if end == "Ctrl-C":
        os.write(terminal, b"\x03")
        shown = read_terminal(terminal)
        assert shown.rstrip().endswith("interrupted: the same command goes on where it stopped")
    os.close(terminal)
    process.wait(60)
    assert "preempted: the run is kept in" in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()


@pytest.mark.long
def test_two_at_once_make_one_run_of_each(reproduced, tmp_path):
    for rate in (10, 20):
        keep(reproduced, tmp_path, rate)
    command = [fast_python.path(), *ARGUMENTS, "--table=1", "--seeds=1", f"--results={tmp_path}"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert table_rows(printed[0]) == table_rows(printed[1])


def read_terminal(terminal: int) -> str:
    """All that is written to it until the process at its other end has gone."""
    shown = b""
    with contextlib.suppress(OSError):
        while block := os.read(terminal, 4096):
            shown += block
    return shown.decode()


ESTIMATE = """
import sys
from conadv_tf.experiments import jobs, tpu_times
with jobs.ended_by_signals():
    tpu_times.estimate(sys.argv[1], "16k")
"""


def test_the_estimate_of_table_3_leaves_no_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ESTIMATE, tmp_path], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(processes_of(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60)
    assert not processes_of(tmp_path)


AT_ITS_START = """
import os, signal, subprocess, time
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
subprocess.Popen = Popen
"""


def test_a_signal_while_it_is_started_leaves_no_process_either(tmp_path):
    command = [sys.executable, "-c", AT_ITS_START + ESTIMATE, tmp_path]
    process = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    assert process.returncode
    assert not processes_of(tmp_path)


@pytest.mark.long
def test_without_data_and_where_no_estimate_can_be_made_table_3_is_printed_all_the_same(tmp_path, capsys):
    taken = tmp_path / "imagenet" / "preflight" / "16k"
    taken.parent.mkdir(parents=True)
    taken.touch()
    code, printed, error = printed_by(capsys, tmp_path, "--table=3", "--scale=imagenet", "--batches=16k")
    assert code == 1
    assert "nothing is trained: data_dir=None does not fit" in printed
    assert ["ResNet", "–"] in table_rows(printed)
    assert "failed: no estimate of batch 16k on v3-256: its preflight ended with exit code 1" in error


def test_seeds_that_were_evaluated_at_other_epochs_are_drawn_where_both_were(reproduced, tmp_path, capsys):
    shutil.copytree(reproduced[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "digits" / "curves.png").unlink()
    (path, *_) = tmp_path.glob("digits/runs/256k/*_s1/metrics.jsonl")
    first, *others = map(json.loads, path.read_text().splitlines())
    lines = [{name: value for name, value in first.items() if name != "test_top1"}, *others]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, _ = printed_by(capsys, tmp_path, "--figure=curves", "--seeds=2", "--jobs=0")
    assert code == 0
    assert (tmp_path / "digits" / "curves.png").exists()


@pytest.mark.long
def test_a_failed_run_is_shown_with_its_log_and_the_others_go_on(reproduced, tmp_path, capsys):
    keep(reproduced, tmp_path, 20)
    blocked = tmp_path / "digits" / "runs" / "256k" / "vanilla_lr5_s0"
    (blocked / "result.json.partial").mkdir(parents=True)  # its result cannot be written
    outcome = reproduce(tmp_path, "--table=1", "--seeds=1")
    assert outcome.returncode == 1
    assert "cannot be written" in (blocked / "log.txt").read_text()
    assert len(result_files(tmp_path)) == 2
    assert "256k/vanilla_lr5_s0: failed" in outcome.stdout
    assert re.search(r"\| ResNet \| [\d.]+ \|", outcome.stdout)  # chosen from the others
    _, printed, error = printed_by(capsys, tmp_path, "--table=1", "--seeds=1", "--jobs=0")
    assert table_rows(printed) == table_rows(outcome.stdout)
    for said in (outcome.stderr, error):
        assert re.search(r"failed: 256k/vanilla_lr5_s0, exit code 1: .*cannot be written.* \(.*log\.txt\)", said)


def test_figure_2_shows_the_rows_asked_for_and_table_1_the_papers_among_them(tmp_path, capsys):
    """Figure 2 in small is of attacks that cannot leak, with AutoAugment too, and of SAM."""
    asked = "--rows=vanilla,aa,paired_predicted_aa,sam"
    given = ("--scale=cifar10_crop_flip", "--batches=16k,256k", asked, "--jobs=0")
    _, figure, _ = printed_by(capsys, tmp_path, "--figure=2", *given)
    ours = ["+ ConAdv, paired, predicted label + AA", "+ SAM"]
    assert first_column(figure) == ["ResNet", "paper", "+ AA", "paper", *ours]
    _, table, _ = printed_by(capsys, tmp_path, "--table=1", *given)
    assert first_column(table) == ["ResNet", "paper", "+ AA", "paper"]


def test_controls_at_plain_trainings_rates_have_a_column_of_them_and_a_plot(tmp_path, capsys):
    """Seen to fail: the caption named the scale's one rate and plain training's; the plot ended with a traceback."""
    kept = f"--runs={ROOT / 'results' / 'cifar10_crop_flip' / 'controls'}"
    given = ("--figure=controls", "--scale=cifar10_crop_flip", "--batches=16k", "--rows=vanilla,paired_predicted")
    choice = ("--rates=10,16", "--epsilons=4", "--plain_rates", "--jobs=0")
    code, printed, error = called(capsys, *given, *choice, "--seeds=2", kept, f"--results={tmp_path}")
    assert code == 0, error
    assert "all at the peak learning rates that are best for ResNet, 10 at 16k" in printed
    assert "peak learning rate 16" not in printed
    assert [row[:2] for row in table_rows(printed) if "---" not in row] == [
        ["method", "rate"],
        ["ResNet", "10"],
        ["+ ConAdv, paired, predicted label", "10"],
    ]
    assert (tmp_path / "cifar10_crop_flip" / "controls.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=7"], "7"),
        ([], "nothing to reproduce"),
        (["--table=1", "--batches=33k"], "33k"),
        (["--table=1", "--rows=resnet"], "resnet"),
        (["--table=1", "--seeds=0"], "--seeds=0"),
        (["--table=1", "--rates=10,fast"], "argument --rates: invalid numbers above 0 value: '10,fast'"),
        (["--table=1", "--epsilons=4,-1"], "argument --epsilons: invalid numbers above 0 value: '4,-1'"),
        (["--table=1", "--gin_param=train.epoch=3"], "did you mean epochs?"),
        (["--table=1", "--scale=mnist"], "mnist"),
        (["--table=1", "--table=5"], "table5 has nothing to show of --rows=vanilla --scale=digits"),
        (["--figure=rates", "--scale=imagenet"], "rates has nothing to show"),
        (["--table=1", "--gin_param=train.seed=7"], "--gin_param=train.seed=7 would replace train.seed=0"),
        (["--table=1", "--gin_param=schedule.learning_rate.peak_learning_rate = 12"], "would replace learning_rate"),
        (["--table=1", "--scale=cifar10"], "tfrecords need --data_dir"),
        (["--table=1", "--scale=digits", "--data_dir=photos"], "data_dir='photos' does not fit"),
        (["--table=1", "--scale=cifar10", "--data_dir=nowhere"], "--data_dir=nowhere is not there"),
    ],
)
def test_impossible_arguments_end_with_exit_code_2(arguments, message, tmp_path, capsys):
    code, _, error = printed_by(capsys, tmp_path, *arguments)
    assert code == 2
    assert message in error.splitlines()[-1]
    assert not os.listdir(tmp_path)


@contextlib.contextmanager
def nobody_reads() -> Iterator[None]:
    """Makes stdout a pipe whose reader has gone, as after `| head` or when `tee` was killed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe, contextlib.redirect_stdout(pipe):
        yield


def test_where_nobody_reads_the_tables_are_written_all_the_same(tmp_path):
    """Seen to fail: no table was kept, and the disk of --results was said to be full."""
    with nobody_reads(), pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS[1:], "--table=1", "--table=4", "--jobs=0", f"--results={tmp_path}"])
    assert ended.value.code == 0
    assert {path.name for path in tmp_path.glob("digits/*.md")} == {"table1.md", "table4.md"}


class Instant(jobs.Folders):
    """Runs that end at once, without a result."""

    def arguments(self, cell: Cell) -> list[str]:
        return ["--help"]


def test_where_nobody_reads_a_study_goes_on(tmp_path):
    """Seen to fail: the first line about a run ended the study, and with it the others that ran."""
    cells = [Cell("digits", "256k", "vanilla", seed) for seed in (0, 1)]
    runner = jobs.Runner(Instant(str(tmp_path), str(tmp_path)), 1, [], lambda: 0.0)
    with nobody_reads():
        runner.run(lambda: [cell for cell in cells if cell not in runner.failed])
    assert list(runner.failed) == cells


def number(*values: float, failed: bool = False, leaking: int = 0) -> tables.Number:
    return tables.Number(Group("digits", "96k", "vanilla"), values, 2, failed, leaking=leaking)


def test_numbers_are_mean_and_sample_deviation():
    assert number(1.0, 2.0, 6.0).text(3) == "3.00 ± 2.65"
    assert number(1.0, 2.0).text(3) == "1.50 ± 0.71 (2)"
    assert number(1.0).text(1) == "1.00"
    assert number(1.0).text(3) == "1.00 (1)"
    assert number().text(3) == "–"
    assert number(failed=True).text(3) == "failed"
    assert number(1.0, 2.0, leaking=1).text(3) == "1.50 ± 0.71 (2) †1"
    assert number(1.0, leaking=1).text(1) == "1.00 †1"


def test_a_table_says_which_numbers_have_runs_that_leak():
    def table(leaking: int) -> tables.Table:
        line = tables.Line("+ ConAdv", {"96k": number(1.0, 2.0, leaking=leaking)}, {"96k": 75.3})
        return tables.Table("table1", "Table 1.", "batch", ("96k",), (line,), 2)

    assert table(2).markdown().endswith(f"| + ConAdv | 1.50 ± 0.71 †2 |\n| paper | 75.3 |\n\n{tables.LEAKING_LEGEND}\n")
    assert tables.LEAKING not in table(0).markdown()
    rows = {row["column"]: row for row in csv.DictReader(table(2).csv().splitlines())}
    assert (rows["96k"]["runs"], rows["96k"]["leaking"]) == ("2", "2")


def test_paper_tables_agree_with_each_other():
    for row, gaps in paper.GAP.items():
        for batch, gap in gaps.items():
            assert paper.TRAIN_TOP1[row][batch] - paper.TOP1[row][batch] == pytest.approx(gap, abs=0.05)
    for batch in ("32k", "64k", "96k"):
        for row in ("conadv", "conadv_aa"):
            assert max(paper.BY_EPSILON[row, batch].values()) == pytest.approx(paper.TOP1[row][batch], abs=0.55)
