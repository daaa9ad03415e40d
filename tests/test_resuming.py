"""A run that goes on with another number of replicas and micro-batches: the same run, and it says so."""

import json

import pytest
from commands import weights
from helpers import assert_close, mirrored, some_of
from test_preemption import lines, signalled, trained

from conadv_tf.errors import ConfigError, Preempted
from conadv_tf.models.resnet import ResNet
from conadv_tf.run import resuming
from conadv_tf.run.folder import RunFolder

# A share of 108 images is 27 in each micro-batch of every layout; a random start and a large ε would magnify rounding.
LAYOUT = ["train.epochs=2", "train.global_batch_size=108", "train.microbatch_size=27", "attack.epsilon_pixels=1"]
CASES = {
    "vanilla": ["train.method='vanilla'"],
    "disadv from epoch 1": ["train.method='disadv'", "adversarial.start_epoch=1"],
    "shadow, tau 2, random start": ["conadv.tau=2", "attack.random_start_probability=0.5"],
    "lookahead": ["conadv.schedule='lookahead'"],
    "paired": ["conadv.schedule='paired'", "attack.label='smoothed'"],
    "phased": ["conadv.schedule='phased'", "attack.label='smoothed'"],
    "phased, predicted": ["conadv.schedule='phased'", "attack.label='predicted'"],
    "phased, random target": ["conadv.schedule='phased'", "attack.goal='random_target'"],
    "noise": ["train.method='noise'"],
    "sam_stale": ["train.method='sam_stale'"],
}


@pytest.mark.long
@pytest.mark.parametrize("case", some_of(CASES, "phased"))
def test_a_run_goes_on_with_another_number_of_replicas_and_micro_batches(case, tmp_path, capfd):
    trained(tmp_path / "whole", *LAYOUT, *CASES[case])
    folder = tmp_path / "moved"
    with signalled(20), pytest.raises(Preempted):
        trained(folder, *LAYOUT, *CASES[case])
    result = trained(folder, *LAYOUT, *CASES[case], strategy=mirrored(2))
    places = 8 if "phased" in case else 4  # two updates are of one batch
    assert [result[name] for name in ("num_replicas", "microbatches")] == [2, places // 2]
    moved = f"2 replicas × {places // 2} micro-batches, before 1 replicas × {places}: the same run up to rounding"
    assert f"resuming {folder} after update 20, on {moved}" in capfd.readouterr().out
    assert_close(weights(folder), weights(tmp_path / "whole"), 1e-3)
    losses, expected = ([line["loss"] for line in lines(each)] for each in (folder, tmp_path / "whole"))
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_a_run_goes_on_with_a_microbatch_size_that_changes_nothing(tmp_path, capfd):
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT, "train.microbatch_size=108")
    with signalled(4), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT, "train.microbatch_size=500")
    assert f"resuming {tmp_path} after update 2\n" in capfd.readouterr().out


def test_a_run_does_not_go_on_with_batch_statistics_over_other_images(tmp_path):
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT)
    for rows in (54, 108):
        with pytest.raises(ConfigError, match=rf"over 27 images, here they are over {rows}: .*microbatch_size=27"):
            trained(tmp_path, *LAYOUT, f"train.microbatch_size={rows}")


@pytest.mark.long
def test_nor_without_knowing_what_they_were_over(tmp_path):
    """As in a folder of a version that kept no layout."""
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT)
    (tmp_path / "layout.json").unlink()
    with pytest.raises(ConfigError, match=r"train\.microbatch_size = 27, this one has 54"):
        trained(tmp_path, *LAYOUT, "train.microbatch_size=54")


@pytest.mark.long
def test_where_replicas_shared_batch_statistics_it_says_that_attacks_see_other_images(tmp_path, capfd):
    shared = ["train.global_batch_size=108", "train.microbatch_size=27", "model.replicas_per_group=0"]
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *shared, strategy=mirrored(2))
    with signalled(4), pytest.raises(Preempted):
        trained(tmp_path, *shared, "train.microbatch_size=54")
    said = "the same run up to rounding, but for attacks, which see 54 images at a time, before 27\n"
    assert said in capfd.readouterr().out


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    """As when a shard has gone, of which the settings say nothing; here the folder tells of another number."""
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT)
    layout = json.loads((tmp_path / "layout.json").read_text())
    (tmp_path / "layout.json").write_text(json.dumps({**layout, "num_train": 2000}))
    with pytest.raises(
        ConfigError, match=r"holds a run on 2,000 training images, here are 1,437: bring back the files"
    ):
        trained(tmp_path, *LAYOUT)


@pytest.mark.long
def test_a_run_goes_on_with_more_bad_records_allowed(tmp_path, capfd):
    """The remedy that a run which met too many of them names."""
    with signalled(2), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT)
    with signalled(4), pytest.raises(Preempted):
        trained(tmp_path, *LAYOUT, "data.max_bad_records=20")
    assert f"resuming {tmp_path} after update 2\n" in capfd.readouterr().out


REFUSED = {
    "sam": (["train.method='sam'"], "'digits_resnet' reads its weights itself, sam needs one that can be moved"),
    "units": (["attack.units='release_units'"], "ImageNet's three channels, the images have 1: use"),
    "fraction": (["adversarial.fraction=0.004"], "adversarial.fraction=0.004 of 110 images per micro-batch leaves"),
    "noise": (["train.method='noise'", "attack.step_size_pixels=2"], "attack.step_size_pixels=2 with train.method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_folder_to_the_corrected_command(case, tmp_path, monkeypatch):
    """Seen to fail: the first three were refused within the first update, the folder then held their configuration."""
    bindings, said = REFUSED[case]
    monkeypatch.setattr(ResNet, "can_move", case != "sam")
    with pytest.raises(ConfigError, match=said) as refused:
        trained(tmp_path, *bindings)
    assert len(str(refused.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mixed", "rows", "excepted"),
    [
        (False, 27, ""),
        (True, 27, ", but for adversarial.shuffle, which mixes 2 micro-batches of a replica, before 4"),
        (False, 54, ", but for attacks, which see 54 images at a time, before 27"),
        (
            True,
            54,
            ", but for attacks, which see 54 images at a time, before 27, and for adversarial.shuffle, "
            "which mixes 2 micro-batches of a replica, before 4",
        ),
    ],
)
def test_on_another_layout_it_says_what_becomes_another_run(mixed, rows, excepted, tmp_path):
    folder = RunFolder(str(tmp_path))
    layout = {"batch_norm_images": 27, "num_train": 1437}
    before = {"num_replicas": 1, "microbatches": 4, "rows": 27, **layout}
    folder.write_layout(before)
    same = resuming.announcement(folder, 26, 13, before, mixed)
    assert same == f"resuming {tmp_path} after epoch 2"
    now = {"num_replicas": 2, "microbatches": 2, "rows": rows, **layout}
    said = "on 2 replicas × 2 micro-batches, before 1 replicas × 4: the same run up to rounding"
    assert resuming.announcement(folder, 26, 13, now, mixed) == f"{same}, {said}{excepted}"
