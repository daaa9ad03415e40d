"""What a run that is resumed shares with the one in its folder, and in what it may differ."""

from typing import Any

from conadv_tf import config
from conadv_tf.errors import ConfigError
from conadv_tf.models.resnet import ResNet
from conadv_tf.run.folder import RunFolder
from conadv_tf.training.plan import Plan

Layout = dict[str, Any]


def layout(plan: Plan, network: ResNet) -> Layout:
    """How a run is spread over what computes it, and of how many images.

    batch_norm_images and num_train change what is trained. With batch statistics over groups of replicas, other `rows`
    change attacks, whose own are over a replica's images, and random draws; else they go with batch_norm_images.
    """
    images = plan.rows * network.replicas_per_group
    return {
        "num_replicas": plan.num_replicas,
        "microbatches": plan.microbatches,
        "batch_norm_images": images,
        "rows": plan.rows,
        "num_train": plan.num_train,
    }


def check(folder: RunFolder, current: Layout) -> None:
    """Raises ConfigError if the folder holds a run of other settings or data, or other images in batch statistics."""
    saved, before = folder.read_config(), folder.read_layout()
    # What it changes of the run, the layout tells.
    told = ("train.microbatch_size",) if before else ()
    changed = saved and config.difference(saved, config.operative_config(), told)
    if changed:
        name, old, new = changed
        raise ConfigError(
            f"--model_dir={folder.path} holds a run with {name} = {old}, this one has {new}: pass another --model_dir, "
            "or the old value"
        )
    if before and current["batch_norm_images"] != before["batch_norm_images"]:
        images = before["batch_norm_images"]
        raise ConfigError(
            f"--model_dir={folder.path} holds a run with batch statistics over {images} images, here they are over "
            f"{current['batch_norm_images']}: pass train.microbatch_size={images} with as few replicas as that takes, "
            "or another --model_dir"
        )
    if before and before.get("num_train", current["num_train"]) != current["num_train"]:
        raise ConfigError(
            f"--model_dir={folder.path} holds a run on {before['num_train']:,} training images, here are "
            f"{current['num_train']:,}: bring back the files of that data set, or pass another --model_dir"
        )


def announcement(folder: RunFolder, update: int, steps_per_epoch: int, current: Layout) -> str:
    """Where a run goes on, after `update`, and on what, where that is another number of replicas or micro-batches."""
    epochs, more = divmod(update, steps_per_epoch)
    text = f"resuming {folder.path} after " + (f"update {update:,}" if more else f"epoch {epochs}")
    before = folder.read_layout() or current
    now, then = (f"{each['num_replicas']} replicas × {each['microbatches']}" for each in (current, before))
    if now == then:
        return text
    text = f"{text}, on {now} micro-batches, before {then}: the same run up to rounding"
    rows = before.get("rows", current["rows"])
    if current["rows"] == rows:
        return text
    return f"{text}, but for attacks, which see {current['rows']} images at a time, before {rows}"
