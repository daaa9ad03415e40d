"""Paths are names: no character of theirs is a pattern, and `~` is the home folder."""

import getpass
import json
import os
import shlex
import uuid
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from absl import flags as flags_module
from absl.testing import flagsaver
from commands import call_command_line, train
from helpers import make_model, mirrored, snapshot
from record_data import example_bytes, jpeg, load, make_folder, stream, take, write
from test_import_images import make_folder as make_image_folder

from conadv_tf import ResNet, cli, data, methods, paths
from conadv_tf.data import import_images, record_files
from conadv_tf.errors import ConfigError, DataError, RunError
from conadv_tf.experiments import analyze, reproduce
from conadv_tf.preflight import step_program
from conadv_tf.run import checkpoint, export, initial_weights

SHORT = ["--gin_param=train.epochs=2", "--gin_param=learning_rate.warmup_epochs=1"]
# "run [lr=1]", read as a pattern, is one of "run l", "run r", "run =", "run 1".
NAMES = ("run [lr=1]", "a*b", "a?b", "a{1,2}", "a\\b", "a\\", "a\\[b]", "[!a]", "a[b", "-x", "~", "50% of #1, ü日 $a$")
WHERE = {"local": lambda tmp_path: str(tmp_path), "remote": lambda _: f"ram://{uuid.uuid4().hex}"}

# ram:// says that a checkpoint is a folder: TensorFlow reads none there, only copies of one.
CHECKPOINTS = [("local", name) for name in NAMES] + [("remote", name) for name in NAMES if set(name) & set("*?[\\")]


@pytest.fixture(params=WHERE)
def parent(request, tmp_path) -> str:
    """A folder, local or of another file system; ram:// stands for gs://."""
    return WHERE[request.param](tmp_path)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and a working folder beside it."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def records_in(folder: str, *names: str) -> str:
    tf.io.gfile.makedirs(folder)
    for name in names:
        write(f"{folder}/{name}", [b"payload"])
    return folder


def files_of(folder: str, pattern: str) -> list[str]:
    return record_files.match_files(folder, pattern, "tfrecords.train_files")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_a_folder_of_any_name_are_found(name, parent):
    folder = records_in(f"{parent}/{name}", "train-0", "train-1", "test-0")
    assert files_of(folder, "train-*") == [f"{folder}/train-0", f"{folder}/train-1"]


@pytest.mark.parametrize(("name", "other"), [("run [lr=1]", "run l"), ("a*b", "axxb"), ("a?b", "axb"), ("[!a]", "b")])
def test_the_files_of_a_folder_that_a_name_would_match_are_not_found(name, other, parent):
    folder = records_in(f"{parent}/{name}", "train-0")
    records_in(f"{parent}/{other}", "train-1", "validation-0")
    assert files_of(folder, "train-*") == [f"{folder}/train-0"]
    with pytest.raises(DataError, match="has no file matching 'validation-"):
        files_of(folder, "validation-*")


def test_a_pattern_below_a_folder_stays_a_pattern(tmp_path):
    folder = records_in(f"{tmp_path}/set [1]", "train-0", "train-1", "train-2", ".train-3", "train-[0]", "train-a")
    records_in(f"{folder}/deep [a]", "train-4")
    found = {
        "train-[01]": ["train-0", "train-1"],
        "train-[^0-9[]": ["train-a"],
        "train-\\[0]": ["train-[0]"],
        "*train-3": [".train-3"],
        "train-?": ["train-0", "train-1", "train-2", "train-a"],
        "deep*/train-*": ["deep [a]/train-4"],
    }
    assert {pattern: files_of(folder, pattern) for pattern in found} == {
        pattern: [f"{folder}/{name}" for name in names] for pattern, names in found.items()
    }
    assert files_of(folder, f"{tmp_path}/set ?1]/train-0") == [f"{folder}/train-0"]  # an absolute one


@pytest.mark.parametrize("written", ["set [1]/", "set [1]//", "./set [1]/.", "set [1]/../set [1]", "set [1]//deep/.."])
def test_a_folder_may_be_written_in_any_way(written, tmp_path, monkeypatch):
    records_in(f"{tmp_path}/set [1]/deep", "train-1")
    records_in(f"{tmp_path}/set [1]", "train-0")
    monkeypatch.chdir(tmp_path)
    (found,) = files_of(written, "train-*")
    assert Path(found).resolve() == (tmp_path / "set [1]" / "train-0").resolve()
    assert found.startswith(written)


def test_the_working_folder_itself_may_have_any_name(tmp_path, monkeypatch):
    folder = records_in(f"{tmp_path}/set [1]", "train-0")
    monkeypatch.chdir(folder)
    assert files_of(".", "train-*") == ["./train-0"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_data_of_a_folder_with_brackets_are_those_of_another(in_memory, tmp_path):
    read = load if in_memory else stream
    taken = []
    for name in ("set [1]", "plain"):
        (tmp_path / name).mkdir()
        found = read(make_folder(tmp_path / name, size=8))
        taken.append((*found.examples("test", 5), *take(found.train_batches(7, 1), 2)))
    for here, there in zip(*taken, strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.fixture(scope="module")
def model():
    return make_model(methods.vanilla(), branches=("main", "adversarial"))


def weights(model) -> dict[str, np.ndarray]:
    return {name: value for name, value in snapshot(model).items() if not name.startswith("metrics")}


def changed(model) -> None:
    for variable in model.network.trainable_variables:
        variable.assign_add(tf.ones_like(variable))


@pytest.mark.parametrize(("parent", "name"), CHECKPOINTS, indirect=["parent"])
def test_a_checkpoint_in_a_folder_of_any_name_is_restored(name, model, parent):
    folder = f"{parent}/{name}/checkpoints"
    tf.io.gfile.makedirs(folder)
    path = checkpoint.Checkpoints(model, folder).save(seconds=2.5)
    before = weights(model)
    changed(model)
    checkpoints = checkpoint.Checkpoints(model, folder)
    assert checkpoints.restore() == 0
    assert checkpoints.last == path == f"{folder}/ckpt-0"
    assert checkpoints.epoch_so_far
    assert checkpoints.epoch_so_far.seconds == 2.5
    for variable, value in weights(model).items():
        np.testing.assert_array_equal(value, before[variable])


def test_a_remote_checkpoint_is_restored_on_every_replica():
    folder = f"ram://{uuid.uuid4().hex}/run [lr=1]"
    tf.io.gfile.makedirs(folder)
    model = make_model(methods.vanilla(), branches=("main", "adversarial"), strategy=mirrored(2))
    checkpoint.Checkpoints(model, folder).save()
    before = weights(model)
    changed(model)
    checkpoint.Checkpoints(model, folder).restore()
    for variable in model.network.trainable_variables:
        copies = [copy.numpy() for copy in variable.values]
        np.testing.assert_array_equal(copies[0], copies[1])
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("name", ["run [lr=1]/w", "plain/w [1]", "a*b/c?d\\"])
def test_a_checkpoint_may_have_any_name_itself(name, parent):
    path = f"{parent}/{name}"
    tf.io.gfile.makedirs(os.path.dirname(path))
    tf.train.Checkpoint(kept=tf.Variable(3.0)).write(path)
    read = tf.Variable(0.0)
    with paths.readable(path) as readable:
        tf.train.Checkpoint(kept=read).read(readable).assert_consumed()
    assert read.numpy() == 3.0


def test_an_export_in_a_folder_of_any_name_is_loaded_and_started_from(model, parent):
    """Seen to fail: of a run's export by `model.initial_weights`, and of a remote one by all that load it."""
    folder = f"{parent}/run [lr=1]/export [*]"
    export.export(model.network, folder)
    if paths.is_remote(folder):
        tf.io.gfile.remove(f"{folder}/assets")  # it is empty, and ram:// lists assets.extra as ".extra" in it
    images = np.full((1, 8, 8, 1), 99, np.uint8)
    assert export.load(folder).probabilities(images).shape == (1, 10)
    before = weights(model)
    changed(model)

    def make(classes, branches):
        return ResNet("digits_resnet", classes, (8, 8, 1), branches)

    assert f"starting from {folder}: " in initial_weights.start(model, folder, make)
    kernels = [name for name in before if name.startswith("network") and name.endswith("kernel")]
    for name in kernels:
        np.testing.assert_array_equal(weights(model)[name], before[name])


def test_a_checkpoint_of_a_folder_that_a_name_would_match_is_not_taken(model, tmp_path):
    for name in ("run [lr=1]", "run l"):
        (tmp_path / name).mkdir()
    checkpoint.Checkpoints(model, str(tmp_path / "run l")).save()
    checkpoints = checkpoint.Checkpoints(model, str(tmp_path / "run [lr=1]"))
    checkpoints.restore()
    assert checkpoints.last is None


@pytest.mark.parametrize(
    ("parent", "name"), [("local", "run [lr=1]"), ("local", "plain"), ("remote", "run [lr=1]")], indirect=["parent"]
)
def test_messages_name_the_checkpoint_where_it_is(name, model, parent):
    folder = f"{parent}/{name}"
    tf.io.gfile.makedirs(folder)
    checkpoint.Checkpoints(model, folder).save()
    conadv = make_model(methods.conadv(), branches=("main", "adversarial"))
    with pytest.raises(RunError) as refused:
        checkpoint.Checkpoints(conadv, folder).restore()
    assert str(refused.value).startswith(f"checkpoint {folder}/ckpt-0 does not fit this model")
    tf.io.gfile.remove(f"{folder}/ckpt-0.data-00000-of-00001")
    with pytest.raises(RunError, match="none of its 1 checkpoints is whole") as torn:
        checkpoint.Checkpoints(model, folder).restore()
    assert str(torn.value).count(folder) == 2
    assert "/tmp" not in str(torn.value).replace(folder, "")


def test_no_copy_of_a_checkpoint_is_left(model, parent, tmp_path, monkeypatch):
    place = tmp_path / "temporary [1]"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    folder = f"{parent}/run [lr=1]"
    tf.io.gfile.makedirs(folder)
    checkpoint.Checkpoints(model, folder).save()
    assert checkpoint.Checkpoints(model, folder).restore() == 0
    assert list(place.iterdir()) == []


def test_home_folders(home):
    assert paths.given("~") == str(home)
    assert paths.given("~/runs/a") == f"{home}/runs/a"
    assert paths.given("~/50%?") == f"{home}/50%?"
    assert paths.given(f"~{getpass.getuser()}/a").startswith("/")
    for path in ("", "runs/a", "./~", "a/~", "gs://bucket/~", "/~", "a~"):
        assert paths.given(path) == path
    with pytest.raises(ConfigError, match=r"write \./~no_such_user/a for a folder of that name"):
        paths.given("~no_such_user/a")


def test_a_path_that_is_not_utf8_is_refused_where_tensorflow_would_fail(tmp_path, capfd):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    make_image_folder(Path(path))
    assert import_images.main([path, f"{tmp_path}/dst", "--validation=0.2"]) == 0
    capfd.readouterr()
    assert import_images.main([f"{tmp_path}/dst", path]) == 2
    assert "is not UTF-8, and TensorFlow takes no other names: rename it" in capfd.readouterr().err
    with pytest.raises(SystemExit, match=r"^2$"):
        call_command_line(f"--model_dir={path}")
    (line,) = capfd.readouterr().err.splitlines()
    assert "is not UTF-8" in line


def test_train_py_knows_home_folders(home, capfd):
    with flagsaver.flagsaver():
        flags_module.FLAGS.unparse_flags()
        cli.parse_flags(["train.py", "--data_dir=~/data", "--model_dir", "~/runs/a", "--gin_file=~/my.gin"])
        values = [flags_module.FLAGS[name].value for name in ("data_dir", "model_dir", "gin_file")]
    assert values == [f"{home}/data", f"{home}/runs/a", [f"{home}/my.gin"]]
    with pytest.raises(SystemExit) as ended:
        call_command_line("--model_dir=~no_such_user")
    (line,) = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "--model_dir=~no_such_user" in line
    assert "write ./~no_such_user" in line


def test_tools_know_home_folders(home, capfd):
    assert analyze.main(["~/nothing", "--out=~/analysis"]) == 2
    assert f"RUN={home}/nothing holds no run" in capfd.readouterr().err
    assert step_program.main(["--out=~/program", "--gin_file=~/nothing.gin"]) == 2
    assert f"{home}/nothing.gin is not found" in capfd.readouterr().err
    with pytest.raises(SystemExit, match=r"^0$"):
        reproduce.main(["--table=1", "--jobs=0", "--seeds=1", "--results=~/results", "--runs=~/runs"])
    assert (home / "results" / "digits" / "table1.md").exists()
    make_image_folder(home / "src")
    capfd.readouterr()
    assert import_images.main(["~/src", "~/my photos [1]", "--validation=0.2"]) == 0
    assert f"--data_dir={home}/my photos [1]" in shlex.split(capfd.readouterr().out.splitlines()[-1])
    assert analyze.main(["~/nothing", "--out=~no_such_user/a"]) == 2
    assert "--out: no user no_such_user" in capfd.readouterr().err
    assert list((home.parent / "work").iterdir()) == []


def test_data_are_loaded_from_a_home_folder_in_a_notebook_too(home):
    """Seen to fail: "is no directory"."""
    (home / "set").mkdir()
    make_folder(home / "set", size=8)
    settings = {"num_classes": 1000, "image_size": 8}
    for folder in ("~/set", home / "set"):
        found = data.load("tfrecords", folder, **settings)
        assert (found.fingerprint.place, found.num_train) == (str(home / "set"), 21)


@pytest.mark.long
def test_a_run_in_a_folder_with_brackets_goes_on_and_is_analysed(tmp_path, capfd):
    run = tmp_path / "run [lr=1]"
    flags = (*SHORT, f"--model_dir={run}")
    first = train(*flags)
    assert (first.returncode, first.stderr) == (0, "")
    second = train(*flags)
    assert (second.returncode, second.stderr) == (0, "")
    assert f"{run} holds this run, finished" in second.stdout

    (run / "result.json").unlink()
    for path in (run / "checkpoints").glob("ckpt-26.*"):
        path.unlink()
    (run / "checkpoints" / "checkpoint").unlink()
    call_command_line(*flags)
    assert f"resuming {run} after epoch 1" in capfd.readouterr().out
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    moved = run.rename(tmp_path / "a|b [lr=1]")
    assert analyze.main([str(moved), f"--out={tmp_path}/out [1]", "--images=20", "--surface_points=2"]) == 0
    assert "| a\\|b [lr=1] |" in capfd.readouterr().out
    assert (tmp_path / "out [1]" / "analysis.json").exists()


def test_the_name_of_a_folder_is_no_markup(tmp_path):
    """In the title of a picture, `$` would begin a formula."""
    pytest.importorskip("matplotlib")
    from conadv_tf.experiments import surface_plot

    surface = {"axis": [-1.0, 0.0, 1.0], "loss": [[2.0, 1.5, 2.0], [1.5, 1.0, 1.5], [2.0, 1.5, 2.0]]}
    surface_plot.plot([("run $\\lr$", surface)], f"{tmp_path}/surface.png")


@pytest.mark.long
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_command_line_trains_on_a_folder_with_brackets(in_memory, tmp_path):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    for name, count in (("train-0", 48), ("validation-0", 16)):
        write(
            folder / name, [example_bytes(jpeg(np.full((8, 8, 3), 9 * n % 256, np.uint8)), n % 2) for n in range(count)]
        )
    settings = {
        "data.source": "tfrecords",
        "tfrecords.in_memory": in_memory,
        "tfrecords.image_size": 8,
        "tfrecords.num_train": 48,
        "tfrecords.num_classes": 2,
        "tfrecords.label_offset": 0,
        "train.global_batch_size": 16,
        "train.microbatch_size": 16,
        "model.name": "cifar_resnet8",
    }
    call_command_line(
        *SHORT,
        *(f"--gin_param={name}={value!r}" for name, value in settings.items()),
        f"--data_dir={folder}",
        f"--model_dir={tmp_path}/run [1]",
    )
    assert json.loads((tmp_path / "run [1]" / "result.json").read_text())["steps"] == 6
