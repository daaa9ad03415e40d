"""Torn and missing checkpoints: the newest whole one is used, what is bad is named, nothing is skipped in silence."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fast_python
import numpy as np
import pytest
import tensorflow as tf
from commands import ROOT, SHORT, call_command_line, command, weights
from helpers import assert_identical, fit, make_model, random_batches, snapshot, some_of

from conadv_tf import methods
from conadv_tf.errors import RunError
from conadv_tf.run import checkpoint

UPDATES = (1, 2, 3)


def model_of(method=methods.vanilla):
    return make_model(method(), branches=("main", "adversarial"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """A folder with checkpoints after 1, 2 and 3 updates, and what the model held at each."""
    model, folder = model_of(), tmp_path_factory.mktemp("written")
    checkpoints = checkpoint.Checkpoints(model, str(folder))
    images, labels = random_batches(3, 6)
    held = {}
    for update in UPDATES:
        fit(model, images[update - 1 :], labels[update - 1 :], 1, initial=update - 1)
        checkpoints.save()
        held[update] = kept(model)
    return folder, held


@pytest.fixture
def saved(written, tmp_path) -> tuple[Path, dict[int, dict]]:
    """A copy of it, to be damaged."""
    return shutil.copytree(written[0], tmp_path / "saved"), written[1]


def kept(model) -> dict[str, np.ndarray]:
    """What a checkpoint holds of it."""
    return {name: value for name, value in snapshot(model).items() if not name.startswith("metrics")}


def file(folder: Path, update: int, kind: str) -> Path:
    return folder / f"ckpt-{update}.{'index' if kind == 'index' else 'data-00000-of-00001'}"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize("kind", ["index", "data"])
def test_the_newest_whole_checkpoint_is_used_and_the_bad_one_named(saved, kind, damage, caplog):
    folder, held = saved
    damage(file(folder, 3, kind))
    model = model_of()
    assert checkpoint.Checkpoints(model, str(folder)).restore() == 2
    assert_identical(kept(model), held[2])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ckpt-3 is not whole" in line
    assert "ckpt-2" in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [None, b"", b'model_checkpoint_path: "ckp', b"\xff\x00\xfe{{{"])
def test_without_a_readable_list_the_newest_checkpoint_is_found(saved, content, caplog):
    folder, held = saved
    (folder / "checkpoint").unlink()
    if content is not None:
        (folder / "checkpoint").write_bytes(content)
    model = model_of()
    assert checkpoint.Checkpoints(model, str(folder)).restore() == 3
    assert_identical(kept(model), held[3])
    assert not caplog.records


def test_a_checkpoint_written_but_not_yet_listed_counts(saved):
    folder, _ = saved
    listed = (folder / "checkpoint").read_text()
    (folder / "checkpoint").write_text(listed.replace('"ckpt-3"', '"ckpt-2"', 1))
    assert checkpoint.Checkpoints(model_of(), str(folder)).restore() == 3


def test_two_bad_ones_are_both_named(saved, caplog):
    folder, held = saved
    cut(file(folder, 3, "data"))
    flip(file(folder, 2, "index"))
    model = model_of()
    assert checkpoint.Checkpoints(model, str(folder)).restore() == 1
    assert_identical(kept(model), held[1])
    assert [number for number in (3, 2) if f"ckpt-{number} is not whole" in caplog.text] == [3, 2]


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_where_none_is_whole_the_folder_and_the_remedy_are_named(saved, damage):
    folder, _ = saved
    for update in UPDATES:
        damage(file(folder, update, "data"))
    model = model_of()
    before = kept(model)
    checkpoints = checkpoint.Checkpoints(model, str(folder))
    with pytest.raises(RunError, match=f"{folder}.*none of its 3 checkpoints is whole.*remove the folder") as raised:
        checkpoints.restore()
    assert "\n" not in str(raised.value)
    assert_identical({name: value for name, value in kept(model).items() if name in before}, before)


def test_a_list_of_checkpoints_that_are_gone_is_no_empty_folder(saved):
    folder, _ = saved
    for path in folder.glob("ckpt-*"):
        path.unlink()
    with pytest.raises(RunError, match="none of its 3 checkpoints is whole"):
        checkpoint.Checkpoints(model_of(), str(folder)).restore()


def test_a_checkpoint_of_another_recipe_is_refused_not_skipped(saved):
    folder, _ = saved
    with pytest.raises(RunError, match="ckpt-3 does not fit"):
        checkpoint.Checkpoints(model_of(methods.conadv), str(folder)).restore()
    cut(file(folder, 3, "data"))
    with pytest.raises(RunError, match="ckpt-2 does not fit"):
        checkpoint.Checkpoints(model_of(methods.conadv), str(folder)).restore()


def test_saving_again_leaves_the_newest_whole_ones_and_nothing_else(saved):
    folder, _ = saved
    cut(file(folder, 3, "data"))
    file(folder, 2, "index").with_suffix(".index.tempstate123").write_bytes(b"half")
    (folder / "ckpt-3_temp").mkdir()
    model = model_of()
    checkpoints = checkpoint.Checkpoints(model, str(folder))
    checkpoints.restore()
    for update in (3, 4):
        model.optimizer.iterations.assign(update)
        model.network.classifier.bias.assign_add(np.ones(10))
        checkpoints.save()
    names = {path.name for path in folder.iterdir()}
    assert names == {"checkpoint", *(file(folder, n, kind).name for n in (2, 3, 4) for kind in ("index", "data"))}
    other = model_of()
    assert checkpoint.Checkpoints(other, str(folder)).restore() == 4
    assert_identical(kept(other), kept(model))


# Python ignores SIGXFSZ, the signal of a file that grows beyond its limit; here it kills, in the middle of a write.
MORTAL = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); from conadv_tf import cli; cli.main()"


@pytest.mark.parametrize("share", some_of([0.1, 0.9]))
def test_a_run_killed_inside_a_checkpoint_write_resumes_to_the_same_weights(share, tmp_path, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call_command_line(*SHORT, f"--model_dir={whole}")
    process = subprocess.Popen(
        [fast_python.path(), "-c", MORTAL, *command(*SHORT, f"--model_dir={killed}")[2:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = killed / "checkpoints" / "ckpt-13.data-00000-of-00001"
    while not (killed / "checkpoints" / "ckpt-13.index").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    limit = int(share * first.stat().st_size)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert process.wait() < 0, "the run was not killed"
    assert not (killed / "result.json").exists()
    call_command_line(*SHORT, f"--model_dir={killed}")
    assert f"resuming {killed} after epoch" in capfd.readouterr().out
    assert_identical(weights(killed), weights(whole))
    epochs = [json.loads(line)["epoch"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4, 5, 6]


@contextlib.contextmanager
def no_file_opened() -> Iterator[None]:
    """Within it this process has all the open files that it may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(lowest_free)


def test_a_checkpoint_out_of_reach_ends_the_run_and_is_no_damage(saved, monkeypatch, caplog):
    """From an older one the run would go on with lost updates, and remove the newer one."""
    folder, held = saved
    model = model_of()
    checkpoints = checkpoint.Checkpoints(model, str(folder))
    load, read = tf.train.load_checkpoint, tf.train.Checkpoint.read

    def starving(call):
        def starve(*arguments):
            files.enter_context(no_file_opened())
            return call(*arguments)

        return starve

    def restored_out_of_reach():
        with pytest.raises(RunError, match=r"cannot be read \(.*Too many open files.*start the same command") as raised:
            checkpoints.restore()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    with no_file_opened():
        assert str(folder) in restored_out_of_reach()
    for owner, name, call in ((tf.train, "load_checkpoint", load), (tf.train.Checkpoint, "read", read)):
        with monkeypatch.context() as patch, contextlib.ExitStack() as files:
            patch.setattr(owner, name, starving(call))
            assert f"checkpoint {folder}/ckpt-3 cannot be read" in restored_out_of_reach()
    with monkeypatch.context() as patch, contextlib.ExitStack() as files:
        patch.setattr(tf.train, "load_checkpoint", lambda name: exhaust())
        with pytest.raises(MemoryError):
            checkpoints.restore()
    with monkeypatch.context() as patch:
        calls = []

        def starved_at_first(name):
            calls.append(name)
            with no_file_opened() if len(calls) == 1 else contextlib.nullcontext():
                return load(name)

        patch.setattr(tf.train, "load_checkpoint", starved_at_first)
        assert checkpoints.restore() == 3  # what was out of reach for a moment is read once more
        assert len(calls) == 2
    assert_identical(kept(model), held[3])
    assert not caplog.records


def exhaust():
    raise MemoryError


def test_saving_leaves_a_newer_checkpoint_that_another_process_wrote(tmp_path):
    checkpoints = checkpoint.Checkpoints(model_of(), str(tmp_path))
    checkpoints.save()
    newer = {kind: file(tmp_path, 0, kind).read_bytes() for kind in ("index", "data")}
    for kind, content in newer.items():
        file(tmp_path, 7, kind).write_bytes(content)
    checkpoints.save()
    assert {kind: file(tmp_path, 7, kind).read_bytes() for kind in newer} == newer
    assert (tmp_path / "checkpoint").read_text().splitlines()[0] == 'model_checkpoint_path: "ckpt-0"'
