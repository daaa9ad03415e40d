"""Rules of resuming: what a run must share with the run in its folder, and in what it may differ."""

import os
from typing import Any

from conadv_tf import config, paths
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.errors import ConfigError
from conadv_tf.models.network import Network
from conadv_tf.run import kept_config
from conadv_tf.run.folder import RunFolder
from conadv_tf.training.plan import Plan

# How a run is spread over replicas, by the names in layout.json.
Spread = dict[str, Any]

_BRING_BACK = (
    "bring those back, pass another --model_dir, or, where damaged files were repaired, train.accept_changed_data=True"
)


def spread_of(plan: Plan, network: Network) -> Spread:
    """The spread of a run over replicas and micro-batches, and the numbers of images that it depends on.

    Another number of replicas or micro-batches computes the same run, up to rounding, except where `Method.mixed`: the
    micro-batches that exchange x̂ are those of one replica. Another batch_norm_images or
    num_train is another run. `rows`, the images of one micro-batch on one replica, follow from batch_norm_images,
    except where groups of replicas share batch statistics: there other `rows` change the attack, whose own statistics
    are over the images of one replica, and the random draws.
    """
    images = plan.rows * network.replicas_per_group
    return {
        "num_replicas": plan.num_replicas,
        "microbatches": plan.microbatches,
        "batch_norm_images": images,
        "rows": plan.rows,
        "num_train": plan.num_train,
    }


def check_data(path: str, kept: Fingerprint | None, current: Fingerprint, remedy: str = _BRING_BACK) -> None:
    """Checks that data are those that a run was trained on.

    Args:
      path: the folder of the run.
      kept: the fingerprint that the folder or a checkpoint keeps; None: of an earlier version, which kept none.
      current: the fingerprint of the data.
      remedy: the end of the error's line.

    Raises:
      ConfigError: if they are others.
    """
    part = kept.difference(current) if kept else None
    if kept and part:
        raise ConfigError(
            f"{path} holds a run on the data that {kept.place} had then, {current.place} has others ({part}): {remedy}"
        )


def check(folder: RunFolder, current: Spread, data: Fingerprint | None = None) -> None:
    """Checks that the folder holds this run or none.

    Args:
      folder: the folder.
      current: the spread of this run.
      data: the fingerprint of the data of this run; None: they may be others.

    Raises:
      ConfigError: if the folder holds a run of other settings, on other data, or with batch statistics over another
        number of images.
    """
    saved, before = folder.read_config(), folder.read_layout()
    # A micro-batch may have another size: batch_norm_images, below, says whether that is another run.
    free = ("train.microbatch_size",) if before else ()
    changed = saved and kept_config.difference(saved, config.operative_config(), free)
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
    if data:
        check_data(folder.path, folder.read_data(), data)
    if before and before.get("num_train", current["num_train"]) != current["num_train"]:
        raise ConfigError(
            f"--model_dir={folder.path} holds a run on {before['num_train']:,} training images, here are "
            f"{current['num_train']:,}: bring back the files of that data set, or pass another --model_dir"
        )


def default_folder(recipe: str, data_dir: str | None, data: Fingerprint) -> str:
    """The folder of a run for which none is named: after the recipe and, where --data_dir is given, its last part.

    A run that an earlier version keeps in the folder of the recipe alone goes on there, unless its data are others.
    """
    plain = os.path.join("runs", recipe)
    if data_dir is None:
        return plain
    named = f"{plain}-{os.path.basename(paths.absolute(data_dir).rstrip('/'))}"
    earlier = RunFolder(plain)
    if RunFolder(named).read_config() is not None or earlier.read_config() is None:
        return named
    kept = earlier.read_data()
    return named if kept and kept.difference(data) else plain


def announcement(folder: RunFolder, update: int, steps_per_epoch: int, current: Spread, mixed: bool) -> str:
    """The line that says after which update a run goes on, and what changes with the number of replicas.

    Args:
      folder: the folder of the run.
      update: the update.
      steps_per_epoch: updates of an epoch.
      current: the spread of this run.
      mixed: whether the micro-batches of a replica exchange x̂.
    """
    epochs, more = divmod(update, steps_per_epoch)
    text = f"resuming {folder.path} after " + (f"update {update:,}" if more else f"epoch {epochs}")
    before = folder.read_layout() or current
    now, then = (f"{spread['num_replicas']} replicas × {spread['microbatches']}" for spread in (current, before))
    if now == then:
        return text
    text = f"{text}, on {now} micro-batches, before {then}: the same run up to rounding"
    rows, microbatches = before.get("rows", current["rows"]), before["microbatches"]
    excepted = []
    if current["rows"] != rows:
        excepted.append(f"attacks, which see {current['rows']} images at a time, before {rows}")
    if mixed:
        mixes = f"which mixes {current['microbatches']} micro-batches of a replica, before {microbatches}"
        excepted.append(f"adversarial.shuffle, {mixes}")
    return f"{text}, but for {', and for '.join(excepted)}" if excepted else text
