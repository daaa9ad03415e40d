"""Weights to start from: every kind of file, branches and classes that it lacks, and what does not fit."""

import functools
import json
import os
import re
import shutil
import zipfile

import h5py
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from commands import call_command_line
from helpers import scramble, some_of
from test_keras_split import scrambled, values

from conadv_tf import ConAdvModel, ResNet, methods
from conadv_tf.errors import ConfigError
from conadv_tf.models import applications
from conadv_tf.models.network import Network
from conadv_tf.run import checkpoint, initial_weights
from conadv_tf.run.export import export

SHAPE = (8, 8, 1)


def resnet(classes: int, branches) -> ResNet:
    return ResNet("digits_resnet", classes, SHAPE, branches, seed=5, name="network")


def model_of(network: Network, method: methods.Method) -> ConAdvModel:
    model = ConAdvModel(network, method)
    model.compile("sgd")
    return model


def saved(model: ConAdvModel, kind: str, folder) -> str:
    """A file of the weights of a model; returns what a recipe would name."""
    path = str(folder / kind)
    if kind in ("run", "ckpt-0"):
        checkpoint.Checkpoints(model, str(folder / "run" / "checkpoints")).save()
        path = str(folder / "run") if kind == "run" else str(folder / "run" / "checkpoints" / "ckpt-0")
    elif kind == "export":
        export(model.network, path)
    elif kind == "n.keras":
        model.network.save(path)
    elif kind.endswith(".keras"):
        model.save(path)
    else:
        model.save_weights(path)
    return path


def as_main(values: dict[str, np.ndarray], branches) -> dict[str, np.ndarray]:
    """The values of a network of one branch in the places of all branches."""
    every = {}
    for path, value in values.items():
        every |= {path.replace("/main/", f"/{branch}/"): value for branch in branches}
    return every


KINDS = ["run", "ckpt-0", "export", "m.keras", "n.keras", "w.weights.h5", "w.h5"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_branch_and_shadow_starts_from_a_plain_run(kind, tmp_path):
    source = resnet(10, ("main",)).create_variables()
    scramble(source)
    path = saved(model_of(source, methods.vanilla()), kind, tmp_path)
    model = model_of(resnet(10, ("main", "adversarial")), methods.conadv(tau=2))
    line = initial_weights.start(model, path, resnet)
    expected = as_main(values(source), ("main", "adversarial"))
    for network in (model.network, *model.shadows):
        found = values(network)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[path], expected[path]) for path in expected)
    assert re.fullmatch(r"starting from \S+: [\d,]+ numbers of digits_resnet", line)


@pytest.mark.parametrize("kind", ["run", "m.keras", "w.weights.h5", "w.h5"])
def test_a_branch_that_is_there_is_taken(kind, tmp_path):
    source = resnet(10, ("main", "adversarial")).create_variables()
    scramble(source)
    path = saved(model_of(source, methods.conadv()), kind, tmp_path)
    model = model_of(resnet(10, ("main", "adversarial")), methods.conadv())
    initial_weights.start(model, path, resnet)
    found, expected = values(model.network), values(source)
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


@pytest.mark.parametrize("selection", ["from stage2", "classifier"])
def test_weights_of_a_network_of_which_a_part_was_trained_come_to_their_places(selection, tmp_path):
    """An .h5 has what was trained before what was not."""
    source = resnet(10, ("main",)).create_variables()
    scramble(source)
    source.train_only(selection)
    path = saved(model_of(source, methods.vanilla()), "w.h5", tmp_path)
    model = model_of(resnet(10, ("main",)), methods.vanilla())
    initial_weights.start(model, path, resnet)
    found, expected = values(model.network), values(source)
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


@pytest.mark.parametrize("kind", ["run", "export", "m.keras"])
def test_a_classifier_of_other_classes_begins_anew(kind, tmp_path):
    source = resnet(10, ("main",)).create_variables()
    scramble(source)
    path = saved(model_of(source, methods.vanilla()), kind, tmp_path)
    model = model_of(resnet(4, ("main", "adversarial")), methods.conadv())
    before = values(model.network)
    line = initial_weights.start(model, path, resnet)
    assert line.endswith("; the classifier begins anew (10 classes there, 4 here)")
    found, expected = values(model.network), as_main(values(source), ("main", "adversarial"))
    for name, value in found.items():
        assert np.array_equal(value, before[name] if name.startswith("classifier") else expected[name]), name


def mobilenet(classes: int, branches) -> Network:
    return applications.application("MobileNet", classes, (32, 32, 3), branches, 5, "float32")


@pytest.fixture(scope="module")
def keras_networks():
    """A network of seven classes and one branch, and `mobilenet` which makes each network once; each takes seconds."""
    make = functools.cache(mobilenet)
    return mobilenet(7, ("main",)), lambda *settings: emptied(make(*settings))


def emptied(network: Network) -> Network:
    """The network with 0 for every weight but the classifier's: what else it has afterwards a file gave it."""
    for path, variable in network.named_variables().items():
        if not path.startswith("conv_preds"):
            variable.assign(tf.zeros_like(variable))
    return network


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """A model of tf_keras.applications and its weights in every kind of file, with and without the classifier."""
    folder = tmp_path_factory.mktemp("keras")
    settings = {"weights": None, "input_shape": (32, 32, 3)}
    model = scrambled(tf_keras.applications.MobileNet(classes=7, classifier_activation=None, **settings))
    bare = tf_keras.applications.MobileNet(include_top=False, **settings)
    for ours, theirs in zip(bare.layers, model.layers, strict=False):
        ours.set_weights(theirs.get_weights())
    for name, kept in (("whole", model), ("notop", bare)):
        for suffix in (".h5", ".weights.h5", ".keras"):
            (kept.save if suffix == ".keras" else kept.save_weights)(folder / f"{name}{suffix}")
    return folder, model


def assert_has_weights(network: Network, theirs: tf_keras.Model, but: str = "none") -> None:
    """Layer by layer: random layers, one behind the other, leave nothing of an image in the logits."""
    found = values(network)
    for variable in theirs.weights:
        layer, _, name = variable.name.split(":")[0].partition("/")
        places = (
            [f"{layer}/{name}"] if f"{layer}/{name}" in found else [f"{layer}/{b}/{name}" for b in network.branches]
        )
        assert layer == but or all(np.array_equal(found[place], variable.numpy()) for place in places), variable.name


FILES = [f"{name}{suffix}" for suffix in (".h5", ".weights.h5", ".keras") for name in ("whole", "other", "notop")]


@pytest.mark.parametrize("file", some_of(FILES, "other.weights.h5", long=FILES))
def test_a_file_of_keras_own_model_starts_a_network_of_its_name(file, keras_files, keras_networks):
    folder, theirs = keras_files
    kind, _, suffix = file.partition(".")
    text = {"whole": "", "other": "7 classes there, 3 here", "notop": "the file has none like it"}[kind]
    model = model_of(mobilenet(3 if text else 7, ("main", "adversarial")), methods.disadv())
    before = model.network.parts()[-1].get_weights()
    line = initial_weights.start(model, str(folder / f"{kind.replace('other', 'whole')}.{suffix}"), keras_networks[1])
    assert text in line
    assert ("anew" in line) == bool(text)
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    inputs = tf_keras.applications.mobilenet.preprocess_input(images.copy())
    assert_has_weights(model.network, theirs, "conv_preds" if text else "none")
    seen = theirs
    if text:  # the features, of which the classifier knows nothing yet
        assert all(map(np.array_equal, model.network.parts()[-1].get_weights(), before))
        seen = tf_keras.Model(theirs.inputs, theirs.layers[-3].input)
        kernel, bias = before
        features = seen(inputs).numpy().reshape(4, -1)
        expected = features @ kernel[0, 0] + bias
    else:
        expected = theirs(inputs).numpy()
    for branch in ("main", "adversarial"):
        found = model.network(images, branch=branch).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_names_in_a_file_may_be_bytes_or_come_in_several_lists(keras_files, keras_networks, tmp_path):
    """The files that Keras publishes have bytes; a list too long for a header is parted."""
    folder, theirs = keras_files
    path = tmp_path / "published.h5"
    shutil.copy(folder / "whole.h5", path)
    with h5py.File(path, "r+") as file:
        for group, name in [(file, "layer_names"), *((file[layer], "weight_names") for layer in file)]:
            names = [text.encode() for text in group.attrs[name]]
            del group.attrs[name]
            for part, cut in enumerate((names[:2], names[2:])):
                if cut:
                    group.attrs[f"{name}{part}"] = np.array(cut)
        file.attrs["layer_names0"] = np.array(file.attrs["layer_names0"])
    network, make = keras_networks
    model = model_of(emptied(network), methods.vanilla())
    assert "anew" not in initial_weights.start(model, str(path), make)
    assert_has_weights(network, theirs)
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    expected = theirs(tf_keras.applications.mobilenet.preprocess_input(images.copy())).numpy()
    np.testing.assert_allclose(model.network(images).numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_a_split_network_without_shadow_copies_is_read_from_an_h5(keras_networks, tmp_path):
    network, make = keras_networks
    for variable in scrambled(network.graph).weights:
        if len(variable.shape) > 1:
            variable.assign(tf.random.stateless_normal(variable.shape, [len(variable.name), variable.shape[-1]]))
    expected = values(network)
    model = model_of(network, methods.vanilla())
    path = saved(model, "w.h5", tmp_path)
    emptied(network)
    initial_weights.start(model, path, make)
    found = values(network)
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


@pytest.mark.torture
def test_efficientnet_for_imagenet_is_what_keras_makes_of_its_weights(tmp_path, monkeypatch):
    """Keras divides the images once more where it has loaded the weights itself, by a layer that others lack."""
    module = __import__("tf_keras.src.applications.efficientnet", fromlist=["efficientnet"])
    model = scrambled(tf_keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3)))
    model.get_layer("normalization").set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]), 0])
    model.save_weights(tmp_path / "b0.h5")
    monkeypatch.setattr(module.data_utils, "get_file", lambda *_, **__: str(tmp_path / "b0.h5"))
    monkeypatch.setattr(module.imagenet_utils, "obtain_input_shape", lambda shape, **_: shape)
    theirs = tf_keras.applications.EfficientNetB0(weights="imagenet", input_shape=(32, 32, 3))

    def make(classes, branches):
        return applications.application("EfficientNetB0", classes, (32, 32, 3), branches, 5, "float32")

    ours = model_of(make(1000, ("main",)), methods.vanilla())
    initial_weights.start(ours, str(tmp_path / "b0.h5"), make)
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    found = tf.nn.softmax(ours.network(images)).numpy()
    np.testing.assert_allclose(found, theirs(images).numpy(), rtol=1e-3)
    assert np.abs(found - model(images).numpy()).max() > 10 * np.abs(found - theirs(images).numpy()).max()


def other_files(folder) -> dict[str, str]:
    wide = ResNet("digits_resnet", 10, SHAPE, ("main",), width=2, name="network").create_variables()
    same = resnet(10, ("main",)).create_variables()
    (folder / "text.h5").write_text("no weights")
    (folder / "empty").mkdir()
    with zipfile.ZipFile(folder / "zip.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Functional"}))
    torn = saved(model_of(same, methods.vanilla()), "ckpt-0", folder / "torn")
    os.truncate(f"{torn}.data-00000-of-00001", 1000)
    return {
        "torn": torn,
        **{kind: saved(model_of(wide, methods.vanilla()), kind, folder) for kind in KINDS},
        **{name: str(folder / name) for name in ("text.h5", "empty", "zip.keras", "none.h5", "none")},
        "gs": "gs://bucket/w.h5",
    }


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
    model = model_of(resnet(10, ("main", "adversarial")), methods.conadv())
    before = values(model.network)
    shapes = r"\b(16|32)\b.*\b(32|64)\b"
    for kind, path in other_files(tmp_path).items():
        with pytest.raises(ConfigError) as caught:
            initial_weights.start(model, path, resnet)
        text = str(caught.value)
        assert text.startswith(f"model.initial_weights={path!r} "), text
        assert "\n" not in text
        if kind in KINDS:
            assert re.search(shapes, text), text
        elif kind in ("empty", "none", "none.h5"):
            assert "holds no weights: name the folder of a run" in text
        elif kind == "gs":
            assert "copy it here first" in text
        after = values(model.network)
        assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_file_of_another_depth_or_kind_says_what_it_is(keras_networks, tmp_path):
    def shallow(classes, branches):
        return ResNet("cifar_resnet8", classes, (32, 32, 3), branches, seed=5, name="network")

    deep = model_of(ResNet("cifar_resnet14", 10, (32, 32, 3), ("main",), name="network"), methods.vanilla())
    deep.save(tmp_path / "deep.keras")
    unlike = tf_keras.Sequential([tf_keras.layers.Input((32, 32, 3)), tf_keras.layers.Conv2D(7, 3, use_bias=False)])
    unlike.save(tmp_path / "unlike.keras")
    unlike.export(tmp_path / "keras_export")
    model = model_of(shallow(10, ("main",)), methods.vanilla())
    other = model_of(keras_networks[0], methods.vanilla())
    for started, name, make, expected in (
        (model, "deep.keras", shallow, r"has shape \(.*\) here, \(.*\) there"),
        (model, "keras_export", shallow, "the SavedModel is none of a run"),
        (other, "unlike.keras", keras_networks[1], r"Layer '?\w+'? expected|[Ss]hape"),
    ):
        with pytest.raises(ConfigError, match=expected) as caught:
            initial_weights.start(started, str(tmp_path / name), make)
        assert "\n" not in str(caught.value)


TINY = [
    "--gin_file=digits_conadv.gin",
    "--gin_param=train.method='vanilla'",
    "--gin_param=train.epochs=1",
    "--gin_param=learning_rate.warmup_epochs=0",
]


def test_a_run_starts_from_another_and_trains_a_part(tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    call_command_line(*TINY, f"--model_dir={first}")
    begins = [
        *TINY,
        f"--gin_param=model.initial_weights={first!r}",
        "--gin_param=model.trainable='classifier'",
        f"--model_dir={second}",
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call_command_line(*[argument.replace("/first'", "/frist'") for argument in begins])
    assert "holds no weights" in capsys.readouterr().err
    call_command_line(*begins)  # in the same folder, which the mistake has not taken
    shown = capsys.readouterr()
    assert f"starting from {first}/checkpoints/ckpt-" in shown.out + shown.err
    assert re.search(r"digits_resnet, [\d,]{5,} parameters, 330 of them trained\n", shown.out + shown.err)
    kept = [tf.saved_model.load(f"{folder}/export").network_variables for folder in (first, second)]
    same = [np.array_equal(one.numpy(), other.numpy()) for one, other in zip(*kept, strict=True)]
    assert [tuple(one.shape) for one, equal in zip(kept[0], same, strict=True) if not equal] == [(32, 10), (10,)]


def test_a_part_of_random_weights_is_not_frozen(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call_command_line(*TINY, "--gin_param=model.trainable='classifier'", f"--model_dir={tmp_path / 'run'}")
    assert "model.trainable='classifier' freezes random weights: give model.initial_weights" in capsys.readouterr().err
