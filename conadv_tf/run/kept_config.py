"""Comparisons of a kept config.gin, of this version or an earlier one, with the configuration of today."""

from collections.abc import Mapping, Sequence
from typing import Any

from conadv_tf import config

# Settings that may change when a run is resumed: how it is executed and reported, not what it computes.
EXECUTION_SETTINGS = (
    "data.max_bad_records",
    "divergence.peak_factor",
    "divergence.retries",
    "mirrored.logical_cpus",
    "monitor.every_epochs",
    "monitor.images",
    "stream.cache",
    "stream.service",
    "train.accept_changed_data",
    "train.checkpoint_every_epochs",
    "train.checkpoint_every_steps",
    "train.evaluate_every_epochs",
    "train.steps_per_execution",
)

# Settings that earlier versions lacked, and what was in effect where they had others of the same prefix.
LATER_SETTINGS = {
    "adversarial.shuffle": "False",
    "model.initial_weights": "None",
    "model.trainable": "'all'",
    "model.width": "1",
    "tfrecords.image_feature": "'image/encoded'",
    "tfrecords.label_feature": "'image/class/label'",
}


def kept_settings(text: str) -> dict[str, str]:
    """The bindings of a kept config.gin, name to value as written, under the names that settings have now.

    Settings that earlier versions wrote for every source, and that the source of this run does not have, are left out.
    Settings that they lacked have the values that were in effect.
    """
    config.register()
    found = _spelled(config.parse_settings(text))
    source = _source(found)
    if source not in config.sources():
        return found
    streams = config.sources()[source].reads_files and found.get("data.in_memory") == "False"
    present = {"autoaugment", source, *(["stream"] if streams else [])}
    kept = {}
    for name, value in found.items():
        new = config.MOVED.get(name, name).format(source=source)
        configurable, _, parameter = new.rpartition(".")
        if name not in config.MOVED or (configurable in present and parameter in config.parameters(configurable)):
            kept[new] = value
    prefixes = {source, *(name.partition(".")[0] for name in kept)}
    return {name: value for name, value in LATER_SETTINGS.items() if name.partition(".")[0] in prefixes} | kept


def value(text: str, name: str) -> str | None:
    """The value of a setting in a kept config.gin as written, of a macro what it stands for; None without one."""
    return _value(config.parse_settings(text), name)


def _value(found: Mapping[str, str], name: str) -> str | None:
    written = found.get(name)
    return None if written is None else found.get(written.removeprefix("%"), written)


def _spelled(found: dict[str, str]) -> dict[str, str]:
    """Settings with a name for what attack.label=None meant before it was called "auto" and chose otherwise."""
    if found.get("attack.label") != "None":
        return found
    trains = _value(found, "conadv.schedule") in ("'paired'", "'phased'") and found.get("train.method") == "'conadv'"
    by_loss = trains and found.get("attack.goal") == "'untargeted'"
    return {**found, "attack.label": "'smoothed'" if by_loss else "'auto'"}


def _source(found: Mapping[str, str]) -> str:
    """What data.source says."""
    return (_value(found, "data.source") or "").strip("'\"")


def difference(saved: str, current: str, but: Sequence[str] = ()) -> tuple[str, str, str] | None:
    """Finds the first setting in which two operative configurations differ.

    Args:
      saved: a configuration as it was kept, by this version or an earlier one.
      current: the other configuration.
      but: settings that may differ, beside EXECUTION_SETTINGS.

    Returns:
      (name, saved value, current value), "unset" for a missing one; None if both compute the same.
    """
    old, new = kept_settings(saved), kept_settings(current)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name not in (*EXECUTION_SETTINGS, *but):
            return name, old.get(name, "unset"), new.get(name, "unset")
    return None


def contradiction(saved: str, wanted: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Finds the first setting of a recipe that a saved run had otherwise; defaults are not compared.

    Takes no TensorFlow.

    Args:
      saved: a configuration as it was kept, by this version or an earlier one.
      wanted: the bindings of the recipe, see `config.bindings`.

    Returns:
      (name, saved value, the recipe's value), or None; settings without effect on the run are not compared.
    """
    found = _spelled(config.parse_settings(saved))
    old = {config.MOVED.get(name, name).format(source=_source(found)): value for name, value in found.items()}
    for name in sorted(old.keys() & wanted.keys()):
        new = config.as_written(wanted[name])
        if old[name] != new and name not in EXECUTION_SETTINGS:
            return name, old[name], new
    return None
