import pytest

from conadv_tf.errors import ConfigError
from conadv_tf.training.plan import check_batch_norm_groups, make_plan


def test_96k_on_v3_512_and_on_one_device():
    """The paper's 96k: 1,170 updates of 13 an epoch; 3 micro-batches of 64 on each of 512 cores, 1,536 on one."""
    pod = make_plan(98_304, 64, 512, 1_281_167, 90)
    assert (pod.steps_per_epoch, pod.total_steps) == (13, 1170)
    assert (pod.rows, pod.microbatches) == (64, 3)
    one = make_plan(98_304, 64, 1, 1_281_167, 90)
    assert (one.rows, one.microbatches) == (64, 1536)


def test_share_smaller_than_a_micro_batch_is_one_micro_batch():
    assert (make_plan(512, 64, 16, 50_000, 1).rows, make_plan(512, 64, 16, 50_000, 1).microbatches) == (32, 1)


@pytest.mark.parametrize(("batch", "steps"), [(1280, 3510), (2560, 1710), (3840, 1170), (5120, 810), (10240, 360)])
def test_cifar_scale_model_has_the_update_counts_of_imagenet(batch, steps):
    imagenet = {1280: 32_768, 2560: 65_536, 3840: 98_304, 5120: 131_072, 10240: 262_144}[batch]
    assert make_plan(batch, batch, 1, 50_000, 90).total_steps == steps
    assert make_plan(imagenet, 64, 1, 1_281_167, 90).total_steps == steps


def test_remainder_is_said_where_there_is_one():
    assert make_plan(100, 100, 1, 1000, 3).remainder_note() == ""
    note = make_plan(110, 110, 1, 1437, 90).remainder_note()
    assert note.startswith("7 of 1,437 images")
    assert "89.6 full passes" in note


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ((100, 64, 3, 1000, 1), "use 99 or 102"),
        ((100, 64, 1, 1000, 1), "use 50"),
        ((2000, 64, 1, 1000, 1), "1000 training images"),
        ((0, 64, 1, 1000, 1), "at least 1"),
        ((100, 0, 1, 1000, 1), "microbatch_size=0"),
        ((100, 50, 1, 1000, 0), "epochs=0"),
    ],
)
def test_impossible_plans_name_the_remedy(arguments, remedy):
    with pytest.raises(ConfigError, match=remedy):
        make_plan(*arguments)


def test_batch_norm_groups():
    check_batch_norm_groups(4, 8, jit_compile=False, on_tpu=False)
    check_batch_norm_groups(4, 8, jit_compile=True, on_tpu=True)
    with pytest.raises(ConfigError, match="does not divide"):
        check_batch_norm_groups(3, 8, jit_compile=False, on_tpu=False)
    with pytest.raises(ConfigError, match="jit_compile=False"):
        check_batch_norm_groups(2, 8, jit_compile=True, on_tpu=False)


@pytest.mark.parametrize(
    ("batch", "microbatch", "replicas", "expected"),
    [
        (98_304, 64, 512, 1),  # 64 images are there already
        (32_768, 64, 1024, 2),  # 32 on a replica
        (4096, 64, 1024, 16),  # 4 on a replica
        (96, 96, 24, 24),  # 4 on a replica: all of them have 96, half of them 48
        (32, 64, 8, 8),  # all together have 32
    ],
)
def test_batch_norm_groups_have_64_images_where_there_are_as_many(batch, microbatch, replicas, expected):
    plan = make_plan(batch, microbatch, replicas, num_train=1_281_167, epochs=1)
    assert plan.replicas_for_batch_norm() == expected
