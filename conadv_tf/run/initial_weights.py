"""Weights to start from: those of a run, a checkpoint, an export or a weights file of Keras.

What is read becomes a network with the branches and classes that it was saved with. A branch of batch norm that it
lacks begins as its main branch. A classifier of other classes, or of none, begins anew.
"""

import itertools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence

import h5py
import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf import paths
from conadv_tf.errors import ConfigError, file_errors, one_line
from conadv_tf.models import applications, keras_split
from conadv_tf.models.network import Network
from conadv_tf.models.resnet import ResNet
from conadv_tf.models.split_batchnorm import MAIN
from conadv_tf.run import checkpoint
from conadv_tf.run.export import load_saved_model
from conadv_tf.run.folder import export_in
from conadv_tf.run.model_settings import NetworkMaker
from conadv_tf.training import sizes
from conadv_tf.training.trainer import ConAdvModel

_OWN = {kind.__name__ for kind in (ConAdvModel, ResNet, keras_split.SplitNetwork)}
_OF_KERAS = (".keras", ".h5")
# In the keys of a checkpoint, where .S stands for a slash of a name.
_BRANCH = re.compile(r"^network/.*/(\w+)\.Smoving_mean/")
_LAST_BIAS = re.compile(r"^network/(?:classifier|graph/layer_with_weights-(\d+))/bias/")


def start(model: ConAdvModel, path: str, make: NetworkMaker) -> str:
    """Gives the network of a model and its shadow copies the weights at a path; returns a line that says so.

    Args:
      model: the model.
      path: a run's folder, a checkpoint by its name without .index, or an export, local or gs://; or a local ….keras
        or ….h5.
      make: makes the network of the model anew, with other classes or branches, and the same random weights.

    Raises:
      ConfigError: where no weights are there, or those of another network.
    """
    network = model.network
    place = _place(path)
    try:
        found, classes = _read(network, place, make)
        source = found.twin(branches=network.branches)
        _assign(source, [network, *model.shadows])
    except file_errors(ValueError, LookupError, TypeError, AttributeError, AssertionError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"model.initial_weights={path!r} does not fit {network.architecture} ({one_line(error)}): give weights of "
            "that network, or choose the network that they are of by model.name"
        ) from error
    count = sizes.count_numbers(network.leaf_variables())
    text = f"starting from {place}: {count:,} numbers of {network.architecture}"
    if classes == network.num_classes:
        return text
    there = f"{classes} classes there, {network.num_classes} here" if classes else "the file has none like it"
    return f"{text}; the classifier begins anew ({there})"


def _place(path: str) -> str:
    """The file, checkpoint or folder that is read where a run's folder is named, or one of them."""
    if path.endswith(_OF_KERAS):
        if paths.is_remote(path):
            raise ConfigError(f"model.initial_weights={path!r} is not on this machine: copy it here first")
        if paths.exists(path):
            return path
    if paths.exists(f"{path}.index"):
        return path
    checkpoints = os.path.join(path, "checkpoints")
    for newest in checkpoint.numbers(checkpoints)[:1]:
        return checkpoint.path_of(checkpoints, newest)
    export = export_in(path)
    if export:
        return export
    raise ConfigError(
        f"model.initial_weights={path!r} holds no weights: name the folder of a run, a checkpoint (….ckpt-N without "
        ".index), an export/, or a .keras or .h5 file"
    )


def _read(network: Network, place: str, make: NetworkMaker) -> tuple[Network, int | None]:
    """The network at a place, and its number of classes; None where its classifier is not there."""
    if place.endswith(_OF_KERAS):
        return _of_keras(network, place, make)
    read = _of_checkpoint if paths.exists(f"{place}.index") else _of_export
    found = read(network, place, make)
    return found, found.num_classes


def _of_checkpoint(network: Network, place: str, make: NetworkMaker) -> Network:
    with paths.readable(place) as name:
        shapes = _shapes(name)
        branches = dict.fromkeys(match.group(1) for match in map(_BRANCH.match, shapes) if match)
        biases = [(int(match.group(1) or 0), key) for key in shapes if (match := _LAST_BIAS.match(key))]
        classes = shapes[max(biases)[1]][-1] if biases else network.num_classes
        found = make(classes, tuple(branches) or (MAIN,)).create_variables()
        _check_shapes(found, shapes)
        status = tf.train.Checkpoint(network=found).read(name)
        status.assert_existing_objects_matched()
        status.expect_partial()
    return found


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the network's variables in a checkpoint, by their keys; not those of an optimizer's slots."""
    held = tf.train.list_variables(name)
    return {key: tuple(shape) for key, shape in held if key.startswith("network/") and ".OPTIMIZER_SLOT" not in key}


def _check_shapes(found: Network, there: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError for a checkpoint of another network: TensorFlow's error comes with a page of warnings."""
    if sorted(there.values()) == sorted(tuple(variable.shape) for variable in found.leaf_variables()):
        return
    with tempfile.TemporaryDirectory() as folder:
        own = tf.train.Checkpoint(network=found).write(os.path.join(folder, "own"))
        here = _shapes(own)
    key = next(key for key in sorted(here | there) if here.get(key) != there.get(key))
    name = key.partition("/.ATTRIBUTES/")[0]
    raise ValueError(f"{name} has shape {here.get(key, 'none')} here, {there.get(key, 'none')} there")


def _of_export(network: Network, place: str, make: NetworkMaker) -> Network:
    loaded = load_saved_model(place)
    if not hasattr(loaded, "network_variables"):
        raise ValueError("the SavedModel is none of a run: save a .keras in its place")
    classes = loaded.signatures["serving_default"].structured_outputs["logits"].shape[-1]
    found = make(int(classes), (MAIN,)).create_variables()
    _set(found.leaf_variables(), [variable.numpy() for variable in loaded.network_variables])
    return found


def _of_keras(network: Network, place: str, make: NetworkMaker) -> tuple[Network, int | None]:
    if _holds_model(place):
        found = _of_model(network, place, make)
        return found, found.num_classes
    if network.architecture not in applications.names():
        raise ValueError("the file is of a Keras model, not of a ConAdvModel")
    assert isinstance(network, keras_split.SplitNetwork)
    classes = applications.held_classes(network, place)
    found = make(classes or network.num_classes, (MAIN,))
    assert isinstance(found, keras_split.SplitNetwork)
    applications.load_weights(found, place, classes)
    return found, classes


def _holds_model(place: str) -> bool:
    """Tells whether a file of Keras holds a ConAdvModel or, as a .keras, a Network."""
    if place.endswith(".keras"):
        with zipfile.ZipFile(place) as archive:
            return json.loads(archive.read("config.json"))["class_name"] in _OWN
    with h5py.File(place) as file:
        return len(_networks(file)) == 1 or "network" in file


def _networks(file: h5py.File) -> list[str]:
    """The layers of the model in an .h5 but for shadow copies: of a ConAdvModel one, its network."""
    return [name for name in applications.listed(file, "layer_names") if not name.startswith("shadow")]


def _of_model(network: Network, place: str, make: NetworkMaker) -> Network:
    """The network of a ConAdvModel, or that is saved itself; of weights alone with `network`'s branches or the main."""
    if place.endswith(".keras"):
        loaded = tf_keras.models.load_model(place, compile=False)
        return loaded if isinstance(loaded, Network) else loaded.network
    with h5py.File(place) as file:
        networks = _networks(file)
        group = file[networks[0]] if networks else file["network"]
        names = applications.listed(group, "weight_names")
        values = [group[name][()] for name in names] if networks else _arrays(group)
    for branches in dict.fromkeys([tuple(network.branches), (MAIN,)]):
        found = make(network.num_classes, branches).create_variables()
        if len(found.leaf_variables()) != len(values):
            continue
        if names:
            _set(_in_order(found, names), values)
        else:
            holder = tf_keras.Model()
            holder.network, holder.built = found, True
            holder.load_weights(place)
        return found
    raise ValueError(f"{len(found.leaf_variables())} variables here, {len(values)} there")


def _in_order(network: Network, names: Sequence[str]) -> list[tf.Variable]:
    """The variables of a network in the order of an .h5, in which what was not trained comes last."""
    variables = [*network.trainable_weights, *network.non_trainable_weights]
    by_name = dict(zip(_below([variable.name for variable in variables]), variables, strict=True))
    wanted = _below(names)
    # Keras counts layers without a name of their own in each process: there the order has to tell.
    return [by_name[name] for name in wanted] if by_name.keys() == set(wanted) else variables


def _below(names: Sequence[str]) -> list[str]:
    """Names without the first part where all have the same, that of the network."""
    alone = len({name.partition("/")[0] for name in names}) == 1
    return [name.partition("/")[2] if alone else name for name in names]


def _arrays(group: h5py.Group) -> list[h5py.Dataset]:
    found: list[h5py.Dataset] = []
    group.visititems(lambda _, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
    return found


def _set(variables: Sequence[tf.Variable], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=False):
        if tuple(variable.shape) != value.shape:
            raise ValueError(f"{variable.name} has shape {tuple(variable.shape)} here, {value.shape} there")
    if len(variables) != len(values):
        raise ValueError(f"{len(variables)} variables here, {len(values)} there")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _assign(source: Network, networks: Sequence[Network]) -> None:
    """Gives networks the weights of a source, but for a classifier of other classes."""
    values = [variable.numpy() for variable in source.leaf_variables()]
    for network in networks:
        ours, theirs = network.leaf_variables(), values
        if source.num_classes != network.num_classes and len(ours) == len(theirs):  # else `_set` says what differs
            last = {variable.ref() for variable in network.parts()[-1].weights}
            kept = [variable.ref() not in last for variable in ours]
            ours, theirs = (list(itertools.compress(each, kept)) for each in (ours, theirs))
        _set(ours, theirs)
