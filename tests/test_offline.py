"""A run needs no network, and a program beside it sees it ask for none."""

import subprocess
import sys

import pytest
from commands import ROOT, command

# The command line, with every connection and look-up of a host from Python written down.
WATCHED = """
import sys
asked = []
ASKING = "socket.connect", "socket.getaddrinfo"
sys.addaudithook(lambda event, given: asked.append(given) if event in ASKING else None)
from conadv_tf import cli
try:
    cli.main()
finally:
    print("asked for", asked)
"""
FLAGS = ["--gin_param=train.epochs=2", "--gin_param=learning_rate.warmup_epochs=1"]


def cut_off() -> list[str]:
    """What runs a command where no network is but one's own machine; nothing where that may not be done."""
    alone = ["unshare", "--map-root-user", "--net"]
    try:
        return alone if subprocess.run([*alone, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.long
def test_a_run_without_network_ends_and_asks_for_none(tmp_path):
    if not (alone := cut_off()):
        pytest.skip("no network namespace may be made here")
    outcome = subprocess.run(
        [*alone, sys.executable, "-c", WATCHED, *command(*FLAGS, f"--model_dir={tmp_path}")[2:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "result.json").exists()
    assert "asked for []" in outcome.stdout
