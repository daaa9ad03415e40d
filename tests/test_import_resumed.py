"""Imports that are stopped: the same command goes on from the files that are whole, to the same bytes and report."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from image_trees import fails, make_folder, noise, run

from conadv_tf import terminal
from conadv_tf.data import image_partial, image_recipe, image_records, import_images

IMAGES, TRAIN_FILES = 12, 3  # of the tree below, broken ones and duplicates included
FLAGS = ("--shards=3", "--max_bad_images=2")


def make_tree(src: Path) -> Path:
    """Three classes in two splits, with two broken images and two validation images that are training images too."""
    make_folder(src / "train", 3)
    make_folder(src / "val", 1)  # the first of the training images
    (src / "train/ant/1.jpg").write_bytes(b"no image")
    (src / "val/cat/0.jpg").write_bytes(b"")
    return src


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def import_tree(folder: Path) -> image_records.Report:
    return import_images.import_images(str(folder / "src"), str(folder / "dst"), shards=3, max_bad_images=2)[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes], dict]:
    """(folder with the tree src/, the files of its import, the report)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make_tree(folder / "src")
    report = import_tree(folder)
    files = contents(folder / "dst")
    assert sorted(files) == ["classes.txt", "data.gin", *(f"train-0000{n}-of-00003" for n in range(3)), VALIDATION]
    assert (len(report.bad), len(report.duplicates)) == (2, 2)
    shutil.rmtree(folder / "dst")
    return folder, files, dataclasses.asdict(report)


VALIDATION = "validation-00000-of-00001"


@pytest.fixture(name="place")
def _place(undisturbed):
    """The folder with the tree, which has no import yet."""
    yield undisturbed[0]
    for path in undisturbed[0].glob("dst*"):
        shutil.rmtree(path)


def stop(monkeypatch, after: int) -> None:
    """Lets the next imports be interrupted when so many images have been written."""
    done = []

    def counted(progress):
        done.append(progress)
        if len(done) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.Progress, "update", counted)


def noted(patch) -> list[str]:
    """The paths of the images that will be read from now on."""
    read, paths = image_records.read, list[str]()

    def reading(path, *more):
        paths.append(path)
        return read(path, *more)

    patch.setattr(image_records, "read", reading)
    return paths


def stopped(folder: Path, monkeypatch, after: int) -> Path:
    """DST.partial of an import that was stopped."""
    with monkeypatch.context() as patch:
        stop(patch, after)
        with pytest.raises(KeyboardInterrupt):
            import_tree(folder)
    return folder / "dst.partial"


def test_an_import_goes_on_wherever_it_was_stopped(place, undisturbed, monkeypatch, capsys):
    for after in range(1, IMAGES + 1):
        partial = stopped(place, monkeypatch, after)
        whole = min((after - 1) // 3, TRAIN_FILES)
        assert partial.exists() == (whole > 0), after
        with monkeypatch.context() as patch:
            read = noted(patch)
            report = import_tree(place)
        assert len(read) == IMAGES - 3 * whole
        assert (f"dst.partial goes on: {whole} of 4 files are whole" in capsys.readouterr().err) == (whole > 0)
        assert (contents(place / "dst"), dataclasses.asdict(report)) == undisturbed[1:], after
        assert not partial.exists()
        shutil.rmtree(place / "dst")


def test_an_import_goes_on_from_whatever_is_left_of_its_journal(place, undisturbed, monkeypatch):
    """A kill, or a loss of power, may cut off a file anywhere."""
    kept = stopped(place, monkeypatch, 8).rename(place / "dst.kept")
    journal = (kept / ".journal").read_bytes()
    ends = [number + 1 for number, byte in enumerate(journal) if byte == ord("\n")]
    assert len(ends) == 3
    cuts = [*ends, ends[1] - 1, ends[1] + 9]
    for left in (*(journal[:cut] for cut in cuts), journal + b"\0" * 40, journal[: ends[0]] + b'{"file": 3}\n'):
        shutil.copytree(kept, place / "dst.partial")
        (place / "dst.partial/.journal").write_bytes(left)
        import_tree(place)
        assert contents(place / "dst") == undisturbed[1], left
        shutil.rmtree(place / "dst")
    shutil.copytree(kept, place / "dst.partial")
    os.truncate(place / "dst.partial/train-00000-of-00003", 100)
    import_tree(place)
    assert contents(place / "dst") == undisturbed[1]


def test_an_import_stopped_at_its_last_line_goes_on(place, undisturbed, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(image_recipe, "text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_tree(place)
    report = import_tree(place)
    assert "dst.partial goes on: 4 of 4 files are whole" in capsys.readouterr().err
    assert (contents(place / "dst"), dataclasses.asdict(report)) == undisturbed[1:]


def test_an_import_interrupted_twice_goes_on(place, undisturbed, monkeypatch):
    for after in (4, 4):  # the first of them ends with one whole file, the second with two
        partial = stopped(place, monkeypatch, after)
    assert len((partial / ".journal").read_text().splitlines()) == 3
    report = import_tree(place)
    assert (contents(place / "dst"), dataclasses.asdict(report)) == undisturbed[1:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shards=2", "--max_bad_images=2"], "is of an import with --shards=3, not 2: repeat that one"),
        ([*FLAGS, "--image_size=8"], "is of an import with --image_size=None, not 8: repeat that one"),
    ],
)
def test_other_arguments_do_not_go_on(place, monkeypatch, capsys, flags, words):
    partial = stopped(place, monkeypatch, 8)
    before = contents(partial)
    message = fails(capsys, 2, place / "src", place / "dst", *flags)
    assert words in message
    assert "delete the folder" in message
    assert contents(partial) == before


def test_workers_and_the_number_of_broken_images_may_change(place, undisturbed, monkeypatch, capsys):
    stopped(place, monkeypatch, 8)
    run(place / "src", place / "dst", "--shards=3", "--max_bad_images=7", "--workers=1", capsys=capsys)
    assert contents(place / "dst") == undisturbed[1]


@pytest.mark.parametrize("change", ["another image", "a repaired image", "a touched image", "one image less"])
def test_other_images_do_not_go_on(tmp_path, monkeypatch, capsys, change):
    src = make_tree(tmp_path / "src")
    partial = stopped(tmp_path, monkeypatch, 8)
    if change == "another image":
        noise(src / "train/ant/new.jpg", 99)
    elif change == "a repaired image":
        noise(src / "train/ant/1.jpg", 99)
    elif change == "a touched image":
        os.utime(src / "val/ant/0.jpg", ns=(1, 1))
    else:
        (src / "train/bee/2.jpg").unlink()
    message = fails(capsys, 2, src, tmp_path / "dst", *FLAGS)
    assert f"'{partial}' is of an import of other images or labels, which have changed since: delete the fol" in message
    shutil.rmtree(partial)
    run(src, tmp_path / "dst", *FLAGS, capsys=capsys)


def test_images_of_another_folder_or_version_do_not_go_on(place, monkeypatch, capsys):
    partial = stopped(place, monkeypatch, 8)
    shutil.copytree(place / "src", place / "dst.src")
    assert f"SRC={place}/src, not {place}/dst.src" in fails(capsys, 2, place / "dst.src", place / "dst", *FLAGS)
    first, *rest = (partial / ".journal").read_text().splitlines()
    began = json.loads(first)
    began["arguments"]["version"] = "conadv_tf 0.1.0"
    (partial / ".journal").write_text("\n".join([json.dumps(began), *rest, ""]))
    assert "version=conadv_tf 0.1.0, not conadv_tf " in fails(capsys, 2, place / "src", place / "dst", *FLAGS)


def test_too_many_broken_images_leave_what_is_whole(place, undisturbed, capsys):
    message = fails(capsys, 1, place / "src", place / "dst", "--shards=3", "--max_bad_images=1")
    assert "raise --max_bad_images" in message
    run(place / "src", place / "dst", *FLAGS, capsys=capsys)
    assert contents(place / "dst") == undisturbed[1]


def test_two_imports_at_once_into_one_folder_are_refused(place, undisturbed, capsys):
    with image_partial.opened(str(place / "dst")) as partial:
        before = contents(Path(partial.folder))
        message = fails(capsys, 2, place / "src", place / "dst", *FLAGS)
        assert f"'{partial.folder}' is being written by process {os.getpid()} on " in message
        assert contents(Path(partial.folder)) == before
    run(place / "src", place / "dst", *FLAGS, capsys=capsys)
    assert contents(place / "dst") == undisturbed[1]


@pytest.mark.parametrize("journal", [None, b"", b'{"argu', b"\0" * 90 + b"\n", b"7\n", b'{"file": "a"}\n'])
def test_a_folder_that_is_of_no_import_is_left_alone(place, capsys, journal):
    partial = place / "dst.partial"
    partial.mkdir()
    (partial / "train-00000-of-00007").write_text("of another program, or of conadv_tf 0.1")
    if journal is not None:
        (partial / ".journal").write_bytes(journal)
    before = contents(partial)
    message = fails(capsys, 2, place / "src", place / "dst", *FLAGS)
    assert "has 'train-00000-of-00007' and is of no import that can go on: delete or move it" in message
    assert contents(partial) | {".lock": b""} == before | {".lock": b""}


@pytest.mark.parametrize("journal", [None, b"", b'{"argu'])
def test_an_import_that_was_killed_as_it_began_begins_anew(place, undisturbed, capsys, journal):
    (place / "dst.partial").mkdir()
    if journal is not None:
        (place / "dst.partial/.journal").write_bytes(journal)
    run(place / "src", place / "dst", *FLAGS, capsys=capsys)
    assert contents(place / "dst") == undisturbed[1]


@pytest.mark.long
def test_a_killed_import_goes_on(tmp_path, capsys):
    """As a user would: a process killed in the middle, another one refused beside it, and the same command again."""
    src = make_folder(tmp_path / "src", 400)
    command = [sys.executable, "-m", "conadv_tf.data.import_images", f"{src}", f"{tmp_path}/dst"]
    flags = ("--validation=0.1", "--shards=100", "--workers=1")
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, end = tmp_path / "dst.partial/.journal", time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3) and time.monotonic() < end:
        time.sleep(0.001)
    assert "is being written by process" in fails(capsys, 2, src, tmp_path / "dst", *flags)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, err = run(src, tmp_path / "dst", *flags, capsys=capsys)
    assert "dst.partial goes on: " in err
    (tmp_path / "dst").rename(tmp_path / "resumed")
    run(src, tmp_path / "dst", *flags, capsys=capsys)
    assert contents(tmp_path / "dst") == contents(tmp_path / "resumed")
