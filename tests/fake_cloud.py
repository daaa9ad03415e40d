"""A gcloud on PATH that records its calls and answers as the test says; no cloud is reached."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ("--name=pod", "--zone=europe-west4-a")
TRAIN = ("--tpu=v3-512", "--gin_file=96k_conadv.gin", "--data_dir=gs://bucket/imagenet", "--model_dir=gs://bucket/run")

# What gcloud 578.0.0 of August 2026 takes in its general release, of what the scripts might need: its own definitions,
# in lib/surface/compute and lib/googlecloudsdk/command_lib/compute of its files.
EVERYWHERE = {"zone", "project", "format", "quiet"}
REQUEST = {"accelerator-type", "boot-disk", "data-disk", "internal-ips", "labels", "metadata", "network", "reserved"}
REQUEST |= {"scopes", "service-account", "spot", "subnetwork", "tags"}
UNTIL = {"valid-until-duration", "valid-until-time"}
FLAGS_OF_GCLOUD = {
    "config get-value": set(),
    "storage ls": set(),
    "compute tpus queued-resources create": REQUEST | UNTIL | {"node-id", "runtime-version"},
    "compute tpus queued-resources delete": {"force"},
    "compute tpus queued-resources describe": set(),
    "compute tpus tpu-vm create": REQUEST | {"version", "preemptible"},
    "compute tpus tpu-vm delete": set(),
    "compute tpus tpu-vm describe": set(),
    "compute tpus tpu-vm scp": {"worker"},
    "compute tpus tpu-vm ssh": {"worker", "command"},
    "compute instances create": {"boot-disk-size", "image-family", "image-project", "labels", "machine-type"}
    | {"no-address", "scopes", "service-account"},
    "compute instances delete": set(),
    "compute instances list": {"filter", "zones"},
    "compute scp": set(),
    "compute ssh": {"command"},
}

KINDS = {"tpu_vm": "tpu-vm", "queued_resources": "queued-resources"}
# The state of a resource is the first line of the file of its kind; as long as more follow, every look takes one.
GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE_CLOUD" || exit 9
{ printf '%s\0' "$@"; printf '\x1e\0'; } >> calls
command=""
for argument in "$@"; do [[ $argument != --command=* ]] || command=${argument#--command=}; done
case "$*" in
  "config get-value project") cat project ;;
  "storage ls "*)
    if [[ -e storage_error ]]; then cat storage_error >&2; exit 1; fi
    [[ $3 != */ ]] || cat objects ;;
  "compute instances list "*)
    if [[ -e describe_error ]]; then cat describe_error >&2; exit 1; fi
    if [[ -e instances ]]; then cat instances; fi ;;
  *" describe "*acceleratorType*) cat type ;;
  *" describe "*)
    if [[ -e describe_error ]]; then cat describe_error >&2; exit 1; fi
    if [[ ! -e $3 ]]; then echo "ERROR: (gcloud.compute.tpus.$3.describe) NOT_FOUND: Resource 'pod'" >&2; exit 1; fi
    echo "WARNING: gcloud has updates" >&2
    head -n 1 "$3"
    if (($(wc -l < "$3") > 1)); then sed -i 1d "$3"; fi ;;
  *"tpu-vm create "*) cat after_create > tpu-vm ;;
  *"queued-resources create "*) echo ACTIVE > queued-resources; cat after_create > tpu-vm ;;
  *" delete "*) rm -f tpu-vm queued-resources ;;
  "compute scp "*)
    if [[ -s refused ]]; then sed -i 1d refused; echo "ssh: connect to host 10.0.0.2 port 22: refused" >&2; exit 255; fi
    [[ ! -d home ]] || cp "$3" home/ ;;
  *" scp "*) [[ ! -d home ]] || cp "$5" home/ ;;
  *" ssh "*)
    if [[ -e ssh_answer ]]; then cat ssh_answer; fi
    if [[ -d home ]]; then cd home && HOME=$PWD exec bash -c "$command"; fi ;;
esac
"""


class Cloud:
    """A copy of the scripts, with a fake gcloud before everything else on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder / "cloud", folder / "my checkout"
        (folder / "bin").mkdir(parents=True)
        self.folder.mkdir()
        self.set(
            project="lab", type="v3-512", objects="gs://bucket/imagenet/train-00000-of-01024", after_create="READY"
        )
        self.program("gcloud", GCLOUD)
        shutil.copytree(ROOT / "tpu_scripts", self.checkout / "tpu_scripts")
        for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg", "train.py"):
            shutil.copy(ROOT / name, self.checkout / name)
        package = ("__init__", "errors", "paths", "terminal", "run/__init__", "run/tpu_runtime")
        for name in (*(f"conadv_tf/{module}.py" for module in package), "gin/96k_conadv.gin"):
            (self.checkout / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name)

    def program(self, name: str, text: str) -> None:
        path = self.folder.parent / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def set(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / KINDS.get(name, name)).write_text(text + "\n")

    def run(self, script: str, *flags: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess:
        return self.shell([str(self.checkout / "tpu_scripts" / f"{script}.sh"), *flags], stdin, **env)

    def shell(self, command: list[str], stdin: str = "", **env: str) -> subprocess.CompletedProcess:
        path = f"{self.folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "FAKE_CLOUD": str(self.folder), **env}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=env, timeout=60, cwd=self.folder
        )

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        if not path.exists():
            return []
        calls = [record.split("\0") for record in path.read_text().split("\0\x1e\0")[:-1]]
        for call in calls:
            assert_known(call)
        return calls

    def changes(self) -> list[list[str]]:
        """The calls that are no mere look."""
        return [call for call in self.calls() if not {"describe", "get-value", "list", "ls"} & set(call[:4])]

    def verbs(self) -> list[str]:
        return [f"{call[2]} {call[3]}" for call in self.changes()]


def assert_known(call: list[str]) -> None:
    """The real gcloud has this command and its flags; what follows -- is ssh's."""
    own = call[: call.index("--")] if "--" in call else call
    (flags,) = [flags for command, flags in FLAGS_OF_GCLOUD.items() if own[: len(command.split())] == command.split()]
    used = {word.removeprefix("--").split("=")[0] for word in own if word.startswith("--")}
    assert used <= flags | EVERYWHERE, call


def assert_refused(outcome: subprocess.CompletedProcess, code: int, *phrases: str) -> None:
    assert (outcome.returncode, outcome.stdout) == (code, ""), outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    for phrase in phrases:
        assert phrase in outcome.stderr
