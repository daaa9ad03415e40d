"""Networks of which a part is trained: what is frozen stays, statistics of batch norm too, as in Keras."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import assert_close, assert_identical
from test_keras_split import CLASSES, ROWS, batches, small, trained, values

from conadv_tf import Attack, ConAdvModel, ResNet, make_lars, methods, split
from conadv_tf.errors import ConfigError

METHODS = [methods.conadv(Attack(8)), methods.conadv(Attack(8), schedule="paired")]


def resnet(selection: str, branches=("main", "adversarial")) -> ResNet:
    network = ResNet("digits_resnet", CLASSES, (8, 8, 1), branches, seed=3).create_variables()
    random = np.random.default_rng(4)
    for path, variable in sorted(network.named_variables().items()):
        low, high = (0.5, 1.5) if path.endswith(("gamma", "variance")) else (-0.3, 0.3)
        variable.assign(random.uniform(low, high, variable.shape))
    network.train_only(selection)
    return network


@pytest.mark.parametrize("method", METHODS, ids=["shadow", "paired"])
def test_what_is_frozen_stays_and_the_rest_is_trained(method):
    network = resnet("from stage2")
    before = values(network)
    eager = method.schedule == "paired"
    model = trained(network, method, *batches(2, (8, 8, 1)), make_lars(1.0), run_eagerly=eager)
    after = values(network)
    changed = {path for path in after if np.any(after[path] != before[path])}
    assert changed == {path for path in after if path.startswith(("stage2", "classifier"))}
    assert model.metrics[0].ratios.shape == [sum(path.endswith("kernel") for path in changed)]
    assert len(model.optimizer.variables()) - 1 == len(network.trainable_variables)
    assert not any("moving" in variable.name for variable in network.trainable_variables)


def test_a_classifier_alone_learns_as_on_the_features_of_an_evaluation():
    network = resnet("classifier")
    method = methods.disadv(Attack(8, random_start_probability=0.0))
    images, labels = batches(1, (8, 8, 1))
    kernel, bias = network.trainable_variables
    loss = tf_keras.losses.SparseCategoricalCrossentropy(True)
    model = ConAdvModel(network, method)
    model.compile(tf_keras.optimizers.SGD(0.5), loss)
    attacked = model.adversarial_examples(tf.constant(images[0]), tf.constant(labels[0]))
    expected = []
    with tf.GradientTape() as tape:
        halves = [
            loss(labels[0], network(seen, training=False, branch=branch))
            for branch, seen in (("main", images[0]), ("adversarial", attacked))
        ]
        value = 0.5 * halves[0] + 0.5 * halves[1]
    for variable, gradient in zip((kernel, bias), tape.gradient(value, [kernel, bias]), strict=True):
        expected.append(variable.numpy() - 0.5 * gradient.numpy())
    model.fit(images[0], labels[0], batch_size=ROWS, verbose=0)
    for variable, value in zip((kernel, bias), expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, atol=2e-6)


def frozen_base() -> tf_keras.Model:
    """A model whose layers before its "unfused" batch norm are frozen, in the way of Keras' guide to fine-tuning."""
    model = small()
    for name in ("convolution", "renamed", "nested"):
        model.get_layer(name).trainable = False
    return model


def test_a_model_frozen_in_part_trains_as_keras_trains_it():
    model = frozen_base()
    network = split(model)
    images, labels = batches(1, network.image_shape)
    before = values(network)
    after = values(trained(network, methods.vanilla(), images, labels, run_eagerly=True).network)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(tf_keras.optimizers.SGD(0.01), loss, run_eagerly=True)
    model.fit(images[0], labels[0], ROWS, shuffle=False, verbose=0)
    others = {path: value for path, value in before.items() if "/adversarial/" in path}
    assert_close(after, values(split(model)) | others, 1e-5)
    stays = [path for path in before if path.startswith(("convolution", "renamed", "inner_norm", "depthwise"))]
    assert len(stays) >= 14
    assert_identical({path: after[path] for path in stays}, {path: before[path] for path in stays})


def test_what_was_frozen_is_released_before_another_model_is_made():
    network = split(frozen_base())
    assert [norm.name for norm in network.norms()] == ["unfused", "of_features"]
    network.train_only("all")
    assert len(network.norms()) == 4
    before = values(network)
    data = batches(1, network.image_shape)
    after = values(trained(network, methods.conadv(Attack(8)), *data, run_eagerly=True).network)
    same = {path for path in before if np.all(after[path] == before[path])}
    none = {"inner_norm": "gamma", "unfused": "beta"}  # that these layers have not
    assert same == {f"{norm}/{branch}/{name}" for norm, name in none.items() for branch in network.branches}


def test_a_loaded_model_has_the_same_of_it_frozen(tmp_path):
    for network, shape in ((resnet("from stage2"), (8, 8, 1)), (split(frozen_base()), (8, 8, 3))):
        model = trained(network, methods.conadv(Attack(8)), *batches(1, shape), make_lars(1.0), run_eagerly=True)
        model.save(tmp_path / "m.keras")
        loaded = tf_keras.models.load_model(tmp_path / "m.keras")
        assert len(loaded.network.trainable_variables) == len(network.trainable_variables)
        assert len(loaded.network.norms()) == len(network.norms())
        assert [norm.frozen for norm in loaded.shadows[0].all_norms()] == [norm.frozen for norm in network.all_norms()]
        images, labels = batches(1, shape)
        for made in (model, loaded):
            made.fit(images[0], labels[0], batch_size=ROWS, verbose=0)
        assert_close(values(loaded.network), values(network), 1e-6)


def test_batch_norm_alone_learns():
    """No variable has a trust ratio then."""
    network = split(small(), ("main", "adversarial"), lambda images: images / 255.0)
    for part in network.parts():
        part.trainable = part in network.all_norms()
    before = values(network)
    model = trained(network, METHODS[0], *batches(2, (8, 8, 3)), make_lars(1.0))
    after = values(network)
    learned = {path for path in after if np.any(after[path] != before[path])}
    assert learned
    assert all(path.endswith(("gamma", "beta", "mean", "variance")) for path in learned)
    assert set(model.history.history["trust_ratio_max"]) == {1.0}


def freeze_after(network: ResNet) -> ConAdvModel:
    model = ConAdvModel(network, methods.vanilla())
    network.stem.trainable = False
    return model


def freeze_inside(network: ResNet) -> ConAdvModel:
    network.blocks[0].convs[0].trainable = False
    return ConAdvModel(network, methods.vanilla())


def freeze_network(network: ResNet) -> ConAdvModel:
    network.trainable = False
    for part in network.parts()[1:]:
        part.trainable = True
    return ConAdvModel(network, methods.vanilla())


def freeze_all(network: ResNet) -> ConAdvModel:
    for part in network.parts():
        part.trainable = False
    return ConAdvModel(network, methods.vanilla())


@pytest.mark.parametrize(
    ("freeze", "named"),
    [
        (freeze_after, r"3 variables of the network were frozen or released \(trainable\) after the model was made"),
        (freeze_inside, r"layer 'stage1_block1' is frozen \(trainable=False\) in a part of it: freeze all"),
        (
            freeze_network,
            r"the network is frozen \(network.trainable=False\), and with it all layers: leave it at True",
        ),
        (freeze_all, r"all layers are frozen"),
    ],
)
def test_what_cannot_be_frozen_is_refused(freeze, named):
    def fit_frozen() -> None:
        model = freeze(resnet("all", ("main",)))
        model.compile("sgd")
        model.fit(*(value[0] for value in batches(1, (8, 8, 1))), verbose=0)

    with pytest.raises(ConfigError, match=named):
        fit_frozen()


def test_a_program_made_before_a_part_was_released_does_not_run_on():
    model = ConAdvModel(resnet("classifier", ("main",)), methods.vanilla())
    model.compile("sgd")
    images, labels = (value[0] for value in batches(1, (8, 8, 1)))
    model.train_on_batch(images, labels)
    model.network.train_only("all")
    before = values(model.network)
    for call in (model.train_on_batch, model.fit):
        with pytest.raises(ConfigError, match="released"):
            call(images, labels)
    assert_identical(values(model.network), before)


@pytest.mark.parametrize("selection", ["last", "from", "from stage9", "stage2", "from "])
def test_a_part_that_is_none_is_refused(selection):
    near = r".*such as (stage2_block1|stem, )"
    with pytest.raises(
        ConfigError, match=rf"model.trainable='{selection}' .*: choose 'all', 'classifier', or 'from NAME'{near}"
    ):
        resnet(selection)
