"""The command line through real processes: to the end, again, killed and resumed, and every way to get it wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import ROOT, SHORT, call_command_line, command, train, weights
from helpers import assert_identical, some_of
from sample_data import FOLDER

from conadv_tf.errors import ConfigError
from conadv_tf.preflight import tpu_compiler
from conadv_tf.run.strategy import replicas_of

RESULT_FIELDS = {
    "classes",
    "recipe",
    "method",
    "schedule",
    "tau",
    "epsilon",
    "dataset",
    "model",
    "seed",
    "global_batch_size",
    "num_replicas",
    "microbatches",
    "epochs",
    "theory",
    "steps",
    "train_top1",
    "test_top1",
    "test_top5",
    "generalization_gap",
    "leak_largest",
    "leak_last",
    "images_per_second",
    "wall_seconds",
    "versions",
}


def refused(code: int, *flags: str) -> None:
    """The command line inside this process, which ends with an error."""
    with pytest.raises(SystemExit) as ended:
        call_command_line(*flags)
    assert ended.value.code == code


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The default recipe, shortened, in an empty folder."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = train(*SHORT, cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    return folder / "runs" / "digits_conadv"


def test_run_leaves_everything_the_contract_names(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == RESULT_FIELDS
    assert (result["steps"], result["epochs"], result["global_batch_size"]) == (78, 6, 110)
    assert result["generalization_gap"] == pytest.approx(result["train_top1"] - result["test_top1"])
    # 360 test images: a share over exactly every image is a multiple of 1/360.
    assert result["test_top1"] * 3.6 == pytest.approx(round(result["test_top1"] * 3.6), abs=1e-3)
    assert "attack.epsilon_pixels = 8" in (finished / "config.gin").read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["step"] == 78
    assert lines[2]["drift"] > 0
    assert list((finished / "tensorboard").glob("events*"))


def test_second_run_prints_the_result_and_trains_nothing(finished, monkeypatch, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.chdir(finished.parents[1])
    call_command_line(*SHORT)
    printed = capfd.readouterr().out
    assert "nothing to train" in printed
    assert f"{json.loads((finished / 'result.json').read_text())['test_top1']:.2f} %" in printed
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert after == {path: stamp for path, stamp in before.items() if path.is_file()}


def test_tensorboard_has_every_promised_tag(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    tags = set(events.Tags()["tensors"])
    assert tags >= {
        "clean/loss",
        "clean/top1",
        "adversarial/loss",
        "adversarial/top1",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "conadv/drift",
        "conadv/leak",
        "conadv/panel",
        "trust_ratio/min",
        "trust_ratio/median",
        "trust_ratio/max",
        "speed/images_per_second",
        "speed/input_wait_share",
        "gamma/main",
        "gamma/adversarial",
        "test/top1",
        "config",
        "custom_scalars__config__",
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    assert [event.step for event in events.Tensors("clean/loss")] == [13, 26, 39, 52, 65, 78]


@pytest.mark.long
def test_exported_network_predicts_without_conadv_tf(finished, tmp_path):
    """A bare TensorFlow process, the package out of reach, gets the run's own test accuracy."""
    script = tmp_path / "predict.py"
    script.write_text(
        "import sys, numpy as np, tensorflow as tf\n"
        "assert not any(name.startswith('conadv_tf') for name in sys.modules)\n"
        "model = tf.saved_model.load(sys.argv[1])\n"
        "assert not any('adversarial' in v.name for v in model.network_variables)\n"
        "data = np.load(sys.argv[2])\n"
        "outputs = model.signatures['serving_default'](images=tf.constant(data['images'], tf.float32))\n"
        "assert abs(outputs['probabilities'].numpy().sum(1) - 1).max() < 1e-5\n"
        "print('top1', 100 * (outputs['logits'].numpy().argmax(1) == data['labels']).mean())\n"
    )
    from conadv_tf import data

    images, labels = data.load().examples("test", 360)
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    outcome = subprocess.run(
        [sys.executable, "-I", str(script), str(finished / "export"), str(tmp_path / "test.npz")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 0, outcome.stderr
    expected = json.loads((finished / "result.json").read_text())["test_top1"]
    assert float(outcome.stdout.split()[1]) == pytest.approx(expected, abs=1e-3)


KILLED = {
    "vanilla": ["train.method='vanilla'"],
    "disadv": ["train.method='disadv'"],
    "conadv": ["conadv.schedule='shadow'"],
    # An epoch is 13 updates: the run goes on where each phase has one turn behind it, and where it has two.
    "lookahead from epoch 1": ["conadv.schedule='lookahead'", "adversarial.start_epoch=1"],
    "paired from epoch 1": ["conadv.schedule='paired'", "adversarial.start_epoch=1"],
    "phased": ["conadv.schedule='phased'", "train.microbatch_size=55"],
    "phased, odd": ["conadv.schedule='phased'", "train.microbatch_size=110"],
}


@pytest.mark.long
@pytest.mark.parametrize("case", some_of(KILLED, "conadv"))
def test_killed_run_resumes_to_the_same_weights_bit_for_bit(case, tmp_path, capfd):
    flags = [*SHORT, *(f"--gin_param={binding}" for binding in KILLED[case])]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call_command_line(*flags, f"--model_dir={whole}")
    process = subprocess.Popen(command(*flags, f"--model_dir={killed}"), cwd=ROOT, stdout=subprocess.DEVNULL)
    newest, update = killed / "checkpoints" / "checkpoint", 39 if "odd" in case else 26
    while not (newest.exists() and f'"ckpt-{update}"' in newest.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    call_command_line(*flags, f"--model_dir={killed}")
    assert f"resuming {killed} after epoch" in capfd.readouterr().out
    assert_identical(weights(killed), weights(whole))
    epochs = [json.loads(line)["epoch"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_mirrored_and_virtual_pod_reach_the_same_result(tmp_path):
    layout = ["--gin_param=train.global_batch_size=108", "--gin_param=train.microbatch_size=27", *SHORT]
    pod = train(
        *layout,
        "--strategy=mirrored",
        "--gin_param=mirrored.logical_cpus=2",
        f"--model_dir={tmp_path / 'pod'}",
    )
    assert pod.returncode == 0, pod.stderr
    call_command_line(*layout, f"--model_dir={tmp_path / 'one'}")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("pod", "one")]
    assert [(r["num_replicas"], r["microbatches"]) for r in results] == [(2, 2), (1, 4)]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("pod", "one")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


MISTAKES = {
    "unknown flag": (["--gin_fil=x"], 2, "gin_fil"),
    "stray argument": (["digits_conadv.gin"], 2, "digits_conadv.gin"),
    "missing recipe": (["--gin_file=96k_conadw.gin"], 2, "did you mean 96k_conadv.gin"),
    "misspelt parameter": (["--gin_param=attack.epsilon_pixel=4"], 2, "did you mean epsilon_pixels"),
    "unknown configurable": (["--gin_param=atack.epsilon_pixels=4"], 2, "did you mean attack"),
    "unused macro": (["--gin_param=EPSILON=4"], 2, "EPSILON"),
    "no value": (["--gin_param=train.epochs="], 2, "train.epochs"),
    "bare word": (["--gin_param=train.method=conadv"], 2, "quotes"),
    "wrong type": (["--gin_param=train.epochs='90'"], 2, "must be int"),
    "what 0.1.0 had": (["--gin_param=attack.label=None"], 2, "must be str; the default is 'auto'"),
    "setting without effect": (["--gin_param=sgd.momentum=0.5"], 2, "sgd.momentum"),
    "unknown method": (["--gin_param=train.method='conadw'"], 2, "vanilla, disadv, conadv"),
    "unknown schedule": (["--gin_param=conadv.schedule='shade'"], 2, "shadow"),
    "negative epsilon": (["--gin_param=attack.epsilon_pixels=-1"], 2, "epsilon_pixels=-1"),
    "negative tau": (["--gin_param=conadv.tau=-1"], 2, "tau=-1"),
    "zero batch": (["--gin_param=train.global_batch_size=0"], 2, "global_batch_size=0"),
    "batch beyond the data": (["--gin_param=train.global_batch_size=2000"], 2, "1437"),
    "indivisible micro-batch": (["--gin_param=train.microbatch_size=64"], 2, "use 55"),
    "indivisible replicas": (
        ["--strategy=mirrored", "--gin_param=mirrored.logical_cpus=4"],
        2,
        "use 108 or 112",
    ),
    "warm-up beyond the run": (["--gin_param=learning_rate.warmup_epochs=90"], 2, "warmup_epochs=90"),
    "smoothing of 1": (["--gin_param=loss.label_smoothing=1.0"], 2, "label_smoothing=1.0"),
    "unknown network": (["--gin_param=model.name='resnet51'"], 2, "resnet50"),
    "network of other channels": (["--gin_param=model.name='resnet50'"], 2, "channels"),
    "unknown strategy": (["--strategy=mirror"], 2, "mirrored"),
    "TPU beside another strategy": (["--strategy=mirrored", "--tpu=local"], 2, "drop one"),
    "multiworker without a cluster": (["--strategy=multiworker"], 2, "TF_CONFIG"),
    "no TPU of this type": (["--tpu=v3-512"], 1, "v3-512"),
    "TPU that does not answer": (["--tpu=grpc://127.0.0.1:{closed}"], 1, "refused"),
    "no data folder": (["--gin_file=cifar10_conadv.gin"], 2, "--data_dir"),
    "empty data folder": (["--gin_file=cifar10_conadv.gin", "--data_dir={empty}"], 1, "train-*"),
    "data folder for digits": (["--data_dir={empty}"], 2, "digits"),
    "unwritable model_dir": (["--model_dir=/proc/run"], 1, "/proc/run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_at_once_with_one_line(mistake, tmp_path, monkeypatch, capfd):
    flags, code, expected = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with socket.socket() as held:  # nobody listens on it, and nobody else can have it
        held.bind(("127.0.0.1", 0))
        places = {"empty": tmp_path / "empty", "closed": held.getsockname()[1]}
        refused(code, *[flag.format(**places) for flag in flags])
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "runs").exists(), "a refused run must leave nothing behind"


@pytest.mark.parametrize("mistake", ["unknown flag", "misspelt parameter", "no TPU of this type", "negative epsilon"])
def test_mistake_is_all_that_a_user_sees(mistake, tmp_path):
    flags, code, expected = MISTAKES[mistake]
    outcome = train(*flags, cwd=tmp_path)
    assert outcome.returncode == code
    (line,) = outcome.stderr.strip().splitlines()
    assert expected in line
    assert "Traceback" not in outcome.stdout


def test_traceback_only_with_v1(tmp_path):
    outcome = train("--gin_param=train.epochs=0", "--v=1", cwd=tmp_path)
    assert outcome.returncode == 2
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.strip().splitlines()[-1].startswith("error: train.epochs=0")


@pytest.mark.parametrize("flag", ["conadv.tau=2", "train.method='disadv'", "attack.epsilon_pixels=4", "train.seed=1"])
def test_model_dir_of_another_experiment_is_refused(flag, finished, capfd):
    before = (finished / "config.gin").read_text()
    refused(2, *SHORT, f"--gin_param={flag}", f"--model_dir={finished}")
    assert "pass another --model_dir" in capfd.readouterr().err
    assert (finished / "config.gin").read_text() == before


def test_checkpoint_of_another_network_is_refused(finished, tmp_path, capfd):
    """Checkpoints that arrived without their config.gin, in a run of another shape."""
    model_dir = tmp_path / "stolen"
    (model_dir / "checkpoints").mkdir(parents=True)
    for path in (finished / "checkpoints").iterdir():
        os.link(path, model_dir / "checkpoints" / path.name)
    for flag in ("train.method='vanilla'", "conadv.tau=2"):
        refused(1, *SHORT, f"--gin_param={flag}", f"--model_dir={model_dir}")
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "does not fit this model" in line


def test_preflight_builds_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call_command_line("--preflight")
    assert "1,170 = 90 epochs × 13" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("tpu", "layout"),
    [
        ("v3-512", ("512 × 192 images", "3 × 64 images")),
        pytest.param("v3-8", ("8 × 12,288 images", "192 × 64 images"), marks=pytest.mark.long),
        pytest.param("v4-1024", ("512 × 192 images", "3 × 64 images"), marks=pytest.mark.long),
        pytest.param("v5litepod-256", ("256 × 384 images", "6 × 64 images"), marks=pytest.mark.long),
    ],
)
def test_preflight_of_96k_needs_neither_tpu_nor_data(tpu, layout, capsys, monkeypatch):
    monkeypatch.setattr(tpu_compiler, "PACKAGES", ("libtpu-of-no-one",))  # test_preflight.py compiles
    call_command_line("--gin_file=96k_conadv.gin", f"--tpu={tpu}", "--preflight", "--gin_param=tfrecords.image_size=32")
    text = capsys.readouterr().out
    *lines, last = text.splitlines()
    assert last.startswith("  not compiled: libtpu-of-no-one is not installed")
    facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines)
    assert facts["global batch"] == "98,304 clean images"
    assert facts["replicas"] == layout[0]
    assert facts["micro-batches"].startswith(layout[1])
    assert facts["batch statistics"] == "over 64 images"
    assert facts["warm-up"] == "533 updates to a peak learning rate of 43"
    assert facts["carried memory"] == "103 MB of old weights on each replica"
    assert "1,170 = 90 epochs × 13" in text
    assert "25,610,152 parameters" in text
    assert "imagenet: 1,281,167 training" in text


@pytest.mark.parametrize("tpu", ["v3-0", "v3-5", "v4-1", "v5p-7", "v6e-0"])
def test_a_tpu_of_half_a_chip_or_none_is_refused(tpu):
    """Seen to fail: v4-1 was a chip, v4-9 four; of v3-5 the preflight said so after minutes of compiling."""
    with pytest.raises(ConfigError, match=f"--tpu={tpu} is no slice: {tpu.split('-')[0]} comes in"):
        replicas_of(tpu, tf.distribute.get_strategy())


IMAGENET_SAMPLE = FOLDER / "imagenet_sample"
STREAMED = [
    "--gin_file=96k_conadv.gin",
    "--gin_param=train.global_batch_size=8",
    "--gin_param=train.microbatch_size=4",
    "--gin_param=train.epochs=2",
    "--gin_param=train.precision='float32'",
    "--gin_param=learning_rate.warmup_epochs=1",
    "--gin_param=model.name='cifar_resnet8'",
    "--gin_param=tfrecords.image_size=32",
]


def damaged_copy(folder: Path) -> Path:
    """The ImageNet photos with 200 bytes inside one JPEG of the first training file overwritten, checksum mended."""
    folder.mkdir()
    for path in IMAGENET_SAMPLE.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = str(folder / "train-00000-of-00002")
    records = [bytes(record) for record in tf.data.TFRecordDataset(path).as_numpy_iterator()]
    example = tf.train.Example.FromString(records[5])
    jpeg = example.features.feature["image/encoded"].bytes_list.value[0]
    example.features.feature["image/encoded"].bytes_list.value[0] = jpeg[:3] + bytes(200) + jpeg[203:]
    records[5] = example.SerializeToString()
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    return folder


@pytest.mark.long
@pytest.mark.skipif(not IMAGENET_SAMPLE.is_dir(), reason="imagenet_sample is not here; set CONADV_TEST_DATA")
def test_streamed_photos_train_and_a_bad_one_is_skipped_or_named(tmp_path):
    data_dir = damaged_copy(tmp_path / "photos")
    skipped = train(*STREAMED, f"--data_dir={data_dir}", f"--model_dir={tmp_path / 'skipped'}")
    assert skipped.returncode == 0, skipped.stderr
    assert "train-00000-of-00002, record 5: corrupt JPEG; skipped" in skipped.stderr
    refused = train(
        *STREAMED,
        "--gin_param=data.max_bad_records=0",
        f"--data_dir={data_dir}",
        f"--model_dir={tmp_path / 'refused'}",
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "train-00000-of-00002, record 5: corrupt JPEG" in last


@pytest.mark.long
@pytest.mark.skipif(not IMAGENET_SAMPLE.is_dir(), reason="imagenet_sample is not here; set CONADV_TEST_DATA")
def test_a_recipe_with_autoaugment_trains_in_a_process_of_its_own(tmp_path):
    """Other tests import tf-models' vision package before a recipe is read; a user's process does so after."""
    flags = ["--gin_file=32k_aa.gin", *STREAMED[1:]]
    outcome = train(*flags, f"--data_dir={IMAGENET_SAMPLE}", f"--model_dir={tmp_path}")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 12
