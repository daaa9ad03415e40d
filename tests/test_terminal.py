"""What a run shows: one bar on a screen, lines at sensible intervals elsewhere."""

import io
import re
import sys

import pytest
from commands import call_command_line

from conadv_tf import terminal
from conadv_tf.run import callbacks

QUICK = ["--gin_param=train.evaluate_every_epochs=100", "--gin_param=train.checkpoint_every_epochs=100"]
FEW = ["--gin_param=subset.train_images=220"]  # two updates an epoch
THIRTY = ["--gin_param=train.epochs=30", "--gin_param=learning_rate.warmup_epochs=1", *QUICK, *FEW]


class Screen(io.StringIO):
    """A terminal of 80 columns, as tqdm sees it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "epochs"),
    [(60.0, [1, *range(3, 31, 3)]), pytest.param(0.0, list(range(1, 31)), marks=pytest.mark.long)],
)
def test_without_a_screen_a_quick_run_prints_ten_lines_and_a_slow_one_each_epoch(
    seconds, epochs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(callbacks, "LINE_SECONDS", seconds)
    call_command_line(*THIRTY, f"--model_dir={tmp_path}")
    printed = capsys.readouterr().out
    assert [int(epoch) for epoch in re.findall(r"^epoch (\d+)/30 ", printed, re.MULTILINE)] == epochs
    assert "\r" not in printed


@pytest.mark.long
def test_on_a_narrow_screen_the_bar_shows_loss_and_top1(tmp_path, monkeypatch, capsys):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(callbacks, "REFRESH_SECONDS", 0.0)
    call_command_line(*THIRTY, f"--model_dir={tmp_path}")
    frames = [frame for frame in screen.getvalue().split("\r") if "loss" in frame]
    assert frames
    assert all(re.search(r"loss \d\.\d{3}, top-1 +[\d.]+ %", frame[:80]) for frame in frames)
    assert "epoch 1/" not in capsys.readouterr().out


def test_progress_without_a_screen_is_lines_at_intervals(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with terminal.Progress(2000, "image") as progress:
        for _ in range(2000):
            progress.update()
    assert capsys.readouterr().err.splitlines() == [f"{done:,} of 2,000 images" for done in range(1, 2001)]
    monkeypatch.setattr(terminal, "LINE_SECONDS", 3600.0)
    with terminal.Progress(2000, "image") as progress:
        for _ in range(2000):
            progress.update()
    assert capsys.readouterr().err == ""


def test_progress_on_a_screen_is_a_bar(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with terminal.Progress(20, "image") as progress:
        for _ in range(20):
            progress.update()
            progress.say("a line")
    assert len(re.findall(r"(\n|\r)a line\n", screen.getvalue())) == 20  # the bar is taken away before it
    assert "20/20" in screen.getvalue()
    assert "of 20 images" not in screen.getvalue()
