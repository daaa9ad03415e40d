"""A run knows its data: the same recipe on other data is refused, on the same data elsewhere it goes on."""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import call_command_line, train
from record_data import counting, example_bytes, jpeg, stream, write
from test_preemption import signalled

from conadv_tf import data
from conadv_tf.data import fingerprint
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.errors import ConfigError, DataError, Preempted
from conadv_tf.run import resuming
from conadv_tf.run.folder import RunFolder

SMALL = [
    "--gin_file=digits_conadv.gin",
    "--gin_param=data.source='tfrecords'",
    "--gin_param=tfrecords.image_size=8",
    "--gin_param=tfrecords.num_classes=10",
    "--gin_param=model.name='cifar_resnet8'",
    "--gin_param=train.method='vanilla'",
    "--gin_param=train.global_batch_size=10",
    "--gin_param=train.microbatch_size=10",
    "--gin_param=train.epochs=2",
    "--gin_param=learning_rate.warmup_epochs=1",
    "--gin_param=monitor.images=2",
]
STREAMED = "--gin_param=tfrecords.in_memory=False"


def records(seed: int, relabelled: int = 0, count: int = 40) -> list[bytes]:
    """Images drawn from the seed, of labels 0, 1, ..., 9, 0, ...; of some the label is another one."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
    labels = [(number + (number < relabelled)) % 10 for number in range(count)]
    return [example_bytes(jpeg(image), label) for image, label in zip(images, labels, strict=True)]


def make_data(folder: Path, seed: int = 0, relabelled: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = records(seed, relabelled)
    write(folder / "train-00000-of-00002", made[:20])
    write(folder / "train-00001-of-00002", made[20:])
    write(folder / "validation-00000-of-00001", records(100, count=10))
    return folder


def interrupted(folder: Path, data_dir: Path, *flags: str, update: int = 2) -> Path:
    with signalled(update), pytest.raises(SystemExit) as ended:
        call_command_line(*SMALL, *flags, f"--data_dir={data_dir}", f"--model_dir={folder}")
    assert ended.value.code == Preempted.exit_code
    return folder


def refusal(capfd, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        call_command_line(*SMALL, *flags)
    assert ended.value.code == 2
    *_, last = capfd.readouterr().err.splitlines()
    return last


def test_a_user_trains_one_fold_and_then_another(tmp_path):
    """The default folder has the name of the data; within one --model_dir other data are refused in one line."""
    folds = [make_data(tmp_path / name, seed) for seed, name in enumerate(("fold1", "fold2"))]
    done = train(*SMALL, f"--data_dir={folds[0]}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits_conadv-fold1"
    assert json.loads((run / "data.json").read_text())["place"] == str(folds[0])
    other = train(*SMALL, "--data_dir=fold2", f"--model_dir={run}", cwd=tmp_path)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert f"error: {run} holds a run on the data that {folds[0]} had then, {folds[1]} has others (t" in other.stderr


@pytest.mark.long
def test_an_interrupted_run_goes_on_with_its_own_data_alone(tmp_path, capfd):
    place = make_data(tmp_path / "data")
    run = interrupted(tmp_path / "run", place)
    make_data(place, relabelled=1)  # files of the same sizes
    line = refusal(capfd, f"--data_dir={place}", f"--model_dir={run}")
    assert f"{place} had then, {place} has others (train: " in line
    moved = make_data(tmp_path / "elsewhere" / "moved")
    interrupted(run, moved, update=4)
    assert f"resuming {run} after update 2\n" in capfd.readouterr().out
    assert RunFolder(str(run)).read_data().place == str(moved)


def test_checkpoints_know_their_data_too(tmp_path, capfd):
    place = make_data(tmp_path / "data")
    run = interrupted(tmp_path / "run", place)
    copied = tmp_path / "copied"
    shutil.copytree(run / "checkpoints", copied / "checkpoints")
    line = refusal(capfd, f"--data_dir={make_data(tmp_path / 'other', 1)}", f"--model_dir={copied}")
    assert f"{copied / 'checkpoints'} holds a run on the data that {place} had then" in line


@pytest.mark.long
def test_a_repaired_file_of_a_stream_is_accepted_where_it_is_asked_for(tmp_path, capfd):
    place = make_data(tmp_path / "data")
    run = interrupted(tmp_path / "run", place, STREAMED)
    make_data(place, relabelled=1)
    line = refusal(capfd, STREAMED, f"--data_dir={place}", f"--model_dir={run}")
    assert line.endswith("where damaged files were repaired, train.accept_changed_data=True")
    interrupted(run, place, STREAMED, "--gin_param=train.accept_changed_data=True", update=3)
    interrupted(run, place, STREAMED, update=4)
    assert f"resuming {run} after update 3\n" in capfd.readouterr().out


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = Fingerprint("somewhere", {"train: labels": "a"})
    assert resuming.default_folder("r", None, one) == "runs/r"
    for data_dir in ("folds/one", "/folds/one/", "gs://bucket/folds/one", "gs://one/"):
        assert resuming.default_folder("r", data_dir, one) == "runs/r-one"
    monkeypatch.chdir(make_data(tmp_path / "one"))
    assert resuming.default_folder("r", ".", one) == "runs/r-one"


def test_a_run_that_an_earlier_version_keeps_under_the_recipes_name_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (Fingerprint("somewhere", {"train: labels": each}) for each in "ab")
    plain = RunFolder("runs/r")
    plain.make()
    plain.write_config("data.source = 'tfrecords'\n")
    assert resuming.default_folder("r", "one", one) == "runs/r"
    plain.write_data(one)
    assert resuming.default_folder("r", "one", one) == "runs/r"
    assert resuming.default_folder("r", "two", two) == "runs/r-two"


def fingerprint_of(folder: Path | str, **settings) -> Fingerprint:
    return data.load(data_dir=str(folder), **settings).fingerprint


def test_copies_have_one_fingerprint_and_other_data_another(tmp_path):
    place = make_data(tmp_path / "data")
    remote = "ram://fingerprints/copied"
    tf.io.gfile.makedirs(remote)
    for path in place.iterdir():
        tf.io.gfile.copy(str(path), f"{remote}/{path.name}", overwrite=True)
    for in_memory in (True, False):
        settings = {"source": "tfrecords", "num_classes": 10, "image_size": 8, "in_memory": in_memory}
        known = functools.partial(fingerprint_of, **settings)
        own, copied = known(place), known(remote)
        assert own.difference(copied) is None
        assert (own.place, copied.place) == (str(place), remote)
        others = [make_data(tmp_path / f"seed {in_memory}", 1), make_data(tmp_path / f"label {in_memory}", 0, 1)]
        assert [own.difference(known(other)) for other in others] == [
            "train: train-00000-of-00002",
            "train: labels" if in_memory else "train: train-00000-of-00002",
        ]
        assert own.difference(known(place, test_files="train-*")).startswith("test: ")


def test_all_labels_in_memory_count_and_images_are_sampled():
    whole = counting(2000).fingerprint
    assert whole.difference(counting(2000).fingerprint) is None
    assert whole.difference(counting(1999).fingerprint) == "train: images"
    labels = np.zeros(2000, np.int32)
    labels[1234] = 1
    assert fingerprint.of_labels("train", labels) != fingerprint.of_labels("train", 0 * labels)
    digits, noise = data.load(), data.load("synthetic", image_size=8)
    assert digits.fingerprint.difference(noise.fingerprint)
    assert Fingerprint.from_text(digits.fingerprint.to_text()) == digits.fingerprint


def test_of_each_file_one_block_is_read(tmp_path):
    """A second for a thousand files: 1,152 of them took 0.26 s of CPU."""
    files = {}
    for number in range(100):
        path = tmp_path / f"train-{number}"
        path.touch()
        os.truncate(path, 40 * fingerprint.BLOCK_BYTES)
        files[str(path)] = ""
    before = bytes_read()
    found = fingerprint.Files(str(tmp_path), {"train": files}).fingerprint()
    assert bytes_read() - before < 1.1 * 100 * fingerprint.BLOCK_BYTES
    assert len(found.parts) == 100


def bytes_read() -> int:
    """The bytes that this process has read so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    loaded = stream(make_data(tmp_path), num_classes=10)
    (tmp_path / "train-00001-of-00002").unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00002.*check the file"):
        _ = loaded.fingerprint


def test_analysis_of_a_run_on_other_data_is_refused():
    kept, current = (Fingerprint(place, {"train: labels": place}) for place in ("a", "b"))
    resuming.check_data("run", None, current)
    with pytest.raises(ConfigError, match=r"run holds a run on the data that a had then, b has others .*: the remedy$"):
        resuming.check_data("run", kept, current, "the remedy")
