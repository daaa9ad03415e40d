"""Any Keras model of layers, split: the same network with a set of batch norm for each branch."""

import contextlib
import importlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import assert_close, assert_identical, fit, mirrored, some_of
from tf_keras.src.applications.convnext import StochasticDepth

from conadv_tf import Attack, ConAdvModel, make_lars, methods, split
from conadv_tf.errors import ConfigError
from conadv_tf.models import randomness
from conadv_tf.models.network import Network
from conadv_tf.run.export import export

L = tf_keras.layers
ROWS = 16
CLASSES = 10


def small(dropout: float = 0.0, **head) -> tf_keras.Model:
    """A functional model with what split knows: nested, renamed, frozen γ or β, not fused, of rank 2, a regularizer."""
    tf_keras.utils.set_random_seed(3)
    inner = outer = L.Input((8, 8, 8))
    inner = L.DepthwiseConv2D(3, padding="same", use_bias=False, name="depthwise")(inner)
    inner = L.BatchNormalization(scale=False, momentum=0.8, epsilon=1e-2, name="inner_norm")(inner)
    inner = L.Dropout(dropout, noise_shape=(None, 1, 1, 1))(L.Activation("swish")(inner))
    nested = tf_keras.Sequential([tf_keras.Model(outer, inner, name="innermost")], name="nested")
    images = L.Input((8, 8, 3))
    x = L.Rescaling(1 / 127.5, -1)(images)
    x = L.Conv2D(8, 3, padding="same", kernel_regularizer=tf_keras.regularizers.L2(0.02), name="convolution")(x)
    x = tf.nn.relu(L.BatchNormalization(name="renamed")(x))
    x = x + nested(x)
    x = L.BatchNormalization(fused=False, center=False, name="unfused")(x)
    x = L.Dense(16, name="features")(L.SpatialDropout2D(dropout)(x))
    x = L.ReLU()(L.BatchNormalization(name="of_features")(L.GlobalAveragePooling2D()(x)))
    return scrambled(tf_keras.Model(images, L.Dense(CLASSES, name="head", **head)(L.Dropout(dropout)(x)), name="small"))


def scrambled(model: tf_keras.Model) -> tf_keras.Model:
    """Gives γ, β and moving statistics values unlike the initial ones."""
    random = np.random.default_rng(5)
    for variable in model.weights:
        kind = variable.name.split("/")[-1].split(":")[0]
        if kind in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        elif kind in ("beta", "moving_mean"):
            variable.assign(random.uniform(-0.3, 0.3, variable.shape))
    return model


def application(name: str) -> tf_keras.Model:
    side = 75 if name == "InceptionV3" else 32
    tf_keras.utils.set_random_seed(3)
    make = getattr(tf_keras.applications, name)
    model = make(weights=None, input_shape=(side, side, 3), classes=CLASSES, classifier_activation=None)
    for layer in model.layers:
        if isinstance(layer, L.Dropout):
            layer.rate = 0.0  # masks are drawn otherwise than by Keras
    return scrambled(model)


PREPROCESS = {
    "ResNet50": tf_keras.applications.resnet50,
    "ResNet50V2": tf_keras.applications.resnet_v2,
    "EfficientNetB0": None,
    "MobileNetV2": tf_keras.applications.mobilenet_v2,
    "MobileNetV3Small": None,
    "DenseNet121": tf_keras.applications.densenet,
    "InceptionV3": tf_keras.applications.inception_v3,
    "RegNetX002": None,
    "ConvNeXtTiny": None,
}
MODELS = {"small": small, **{name: lambda name=name: application(name) for name in PREPROCESS}}


def batches(count: int, shape, rows: int = ROWS):
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, rows, *shape)).astype(np.float32)
    return images, random.integers(0, CLASSES, (count, rows)).astype(np.int32)


def trained(network: Network, method: methods.Method, images, labels, optimizer=None, **compiled) -> ConAdvModel:
    model = ConAdvModel(network, method)
    loss = tf_keras.losses.SparseCategoricalCrossentropy(True, reduction="none")
    model.compile(optimizer or tf_keras.optimizers.SGD(0.01), loss, **compiled)
    fit(model, images, labels, len(images))
    return model


def values(network: Network) -> dict[str, np.ndarray]:
    return {path: variable.numpy() for path, variable in network.named_variables().items()}


def statistics_of(values: dict[str, np.ndarray], branch: str) -> dict[str, np.ndarray]:
    return {path: value for path, value in values.items() if f"/{branch}/moving" in path}


@pytest.mark.parametrize("name", some_of(tuple(MODELS), "small", long=["MobileNetV2", "ConvNeXtTiny"]))
def test_the_main_branch_is_the_model_and_trains_as_keras_trains_it(name, tmp_path):
    model = MODELS[name]()
    preprocess = PREPROCESS.get(name) and PREPROCESS[name].preprocess_input
    network, other = (split(model, preprocess=preprocess) for _ in range(2))
    images, labels = batches(1, network.image_shape)
    inputs = images[0] if preprocess is None else preprocess(tf.constant(images[0]))
    eager = name != "small"
    logits = model(inputs).numpy()
    np.testing.assert_allclose(network(images[0]), logits, atol=1e-5 * max(1.0, np.abs(logits).max()))
    before = values(network)

    vanilla = values(trained(network, methods.vanilla(), images, labels, run_eagerly=eager).network)
    model.compile(tf_keras.optimizers.SGD(0.01), tf_keras.losses.SparseCategoricalCrossentropy(True), run_eagerly=eager)
    model.fit(inputs, labels[0], ROWS, shuffle=False, verbose=0)
    assert_close(vanilla, values(split(model)) | others_of(before), 1e-5)

    shadow = trained(other, methods.conadv(Attack(8)), images, labels, run_eagerly=eager)
    after = values(shadow.network)
    # Each pass in its own branch: the clean one as without an adversarial one, which has learnt from other images.
    assert_identical(statistics_of(after, "main"), statistics_of(vanilla, "main"))
    others = statistics_of(after, "adversarial")
    assert all(np.any(value != before[path]) for path, value in others.items())
    # But for a layer that random weights have left with nothing but zeros.
    same = [np.all(value == after[path.replace("/adversarial/", "/main/")]) for path, value in others.items()]
    assert np.mean(same or [0]) < 0.2

    export(shadow.network, str(tmp_path / "export"))
    served = tf.saved_model.load(str(tmp_path / "export"))
    logits = shadow.network(images[0]).numpy()
    np.testing.assert_allclose(served.predict(images[0])["logits"], logits, atol=1e-5 * max(1.0, np.abs(logits).max()))


def randomize(network: Network) -> None:
    random = np.random.default_rng(5)
    for path, variable in sorted(network.named_variables().items()):
        low, high = (0.5, 1.5) if path.endswith(("gamma", "variance")) else (-0.3, 0.3)
        if len(variable.shape) == 1:
            variable.assign(random.uniform(low, high, variable.shape))


def others_of(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: value for path, value in values.items() if "/adversarial/" in path}


def test_a_resnet_of_keras_layers_trains_as_the_hand_written_one(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    ours, theirs = importlib.import_module("split_network").networks(8)
    for network in (ours, theirs):
        randomize(network)
    images, labels = batches(3, (8, 8, 3))
    method = methods.conadv(Attack(8, random_start_probability=0.0, label="smoothed"), schedule="paired")
    models = [trained(network, method, images, labels, make_lars(1.0), run_eagerly=True) for network in (ours, theirs)]
    assert_close(values(models[1].network), values(models[0].network), 1e-5)
    assert_close(values(models[1].shadows[0]), values(models[0].shadows[0]), 1e-5)


# Dropout


def masks() -> tf_keras.Model:
    """A model whose logits are the products of the masks of three layers, 0 where one drops."""
    images = L.Input((4, 8, 1))
    x = L.Reshape((32,))(L.Rescaling(0.0, 1.0)(images))
    return tf_keras.Model(images, L.Dropout(0.5)(L.Dropout(0.25)(x)))


def drawn(network: Network, seed: int, **call) -> list[np.ndarray]:
    """The masks of four passes of a micro-batch."""
    with randomness.of_microbatch(tf.constant([seed, 7])):
        passes = [network(tf.zeros((64, 4, 8, 1)), mode="batch", **call) for _ in range(2)]
        passes += [network(tf.zeros((64, 4, 8, 1)), mode="batch", synchronize=False, **call) for _ in range(2)]
    return [(logits.numpy() != 0) for logits in passes]


def test_masks_are_of_the_seed_and_no_two_passes_have_the_same():
    network = split(masks())
    first, again, other = drawn(network, 1), drawn(network, 1), drawn(network, 2)
    np.testing.assert_array_equal(first, again)
    different = [*first, *other]
    for index, mask in enumerate(different):
        assert abs(mask.mean() - 0.75 * 0.5) < 0.05
        for later in different[index + 1 :]:
            # Independent masks agree where both keep or both drop.
            assert abs(np.mean(mask == later) - (0.375**2 + 0.625**2)) < 0.06
    np.testing.assert_array_equal(network(tf.zeros((2, 4, 8, 1))), np.ones((2, 32)))  # an evaluation drops nothing
    compiled = tf.function(lambda: network(tf.zeros((64, 4, 8, 1)), mode="batch"), jit_compile=True, autograph=False)
    np.testing.assert_array_equal(compiled(), network(tf.zeros((64, 4, 8, 1)), mode="batch"))


def test_stochastic_depth_and_noise_are_of_the_seed_too():
    images = L.Input((4, 8, 1))
    x = L.GaussianNoise(0.1)(StochasticDepth(0.5, name="depth")(L.Rescaling(0.0, 1.0)(images)))
    network = split(tf_keras.Model(images, L.Flatten()(x)))
    first, again, other = (network_pass(network, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    kept = first.mean(1) > 1  # a path that is kept counts twice
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_allclose(first.mean(1), np.where(kept, 2.0, 0.0), atol=0.1)


def network_pass(network: Network, seed: int) -> np.ndarray:
    with randomness.of_microbatch(tf.constant([seed, 7])):
        return network(tf.zeros((32, *network.image_shape)), mode="batch").numpy()


# Replicas, micro-batches, precision, XLA, resuming

DATA = batches(8, (8, 8, 3), 4)


def layout(replicas: int = 1, microbatches: int = 1, updates: int = 2, method: dict | None = None, **compiled):
    """A trained split network with dropout, on the same images whatever the layout."""
    strategy = mirrored(replicas) if replicas > 1 else None
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = ConAdvModel(split(small(0.3)), methods.conadv(**(method or {})), microbatches, seed=8)
        model.compile(make_lars(2.0), **compiled)
    images, labels = (part.reshape(8 // replicas, 4 * replicas, *part.shape[2:]) for part in DATA)
    fit(model, images, labels, updates)
    return model


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.long)])
def test_replicas_and_micro_batches_train_it_the_same(eager):
    one = values(layout(microbatches=4, run_eagerly=eager).network)
    assert_close(values(layout(2, 2, run_eagerly=eager).network), one, 3e-6)


def test_synchronized_batch_norm_is_over_the_replicas():
    def after(replicas: int) -> dict[str, np.ndarray]:
        strategy = mirrored(replicas) if replicas > 1 else None
        with strategy.scope() if strategy else contextlib.nullcontext():
            tf_keras.utils.set_random_seed(3)
            norms = [L.BatchNormalization(synchronized=True, name=name) for name in ("images", "features")]
            layers = [L.Input((8, 8, 3)), norms[0], L.Flatten(), L.Dense(8, name="a"), norms[1]]
            network = split(tf_keras.Sequential([*layers, L.ReLU(), L.Dense(CLASSES, name="b")]))
            model = ConAdvModel(network, methods.vanilla())
            model.compile(make_lars(2.0), run_eagerly=replicas == 1)
        fit(model, *batches(1, (8, 8, 3)), 1)
        return values(model.network)

    assert_close(after(2), after(1), 1e-5)


@pytest.mark.long
def test_xla_trains_it_the_same():
    # No signs, which rounding flips.
    method = {"attack": Attack(norm="l2", random_start_probability=0.0)}
    compiled, plain = (values(layout(method=method, jit_compile=jit).network) for jit in (True, False))
    assert_close(compiled, plain, 1e-4)


@pytest.mark.long
def test_a_run_goes_on_to_the_same_bits_with_the_masks_it_had(tmp_path):
    """`lookahead` makes its attack again when it goes on, in a program of its own."""
    method = methods.conadv(schedule="lookahead")
    whole = layout(updates=4, method={"schedule": "lookahead"})
    begun = layout(updates=2, method={"schedule": "lookahead"})
    begun.save_weights(str(tmp_path / "w.weights.h5"))
    model = ConAdvModel(split(small(0.3)), method, seed=8)
    model.compile(make_lars(2.0))
    model.load_weights(str(tmp_path / "w.weights.h5"))
    model.resume_at(2)
    rest = [part[method.batches_before(2) :] for part in DATA]
    fit(model, *rest, 2, initial=2)
    assert_identical(values(model.network), values(whole.network))


def test_a_mixed_policy_stays_and_its_export_is_float32(tmp_path):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = small(0.3)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    network = split(model)
    assert network.dtype_policy.name == "mixed_bfloat16"
    images, labels = batches(2, (8, 8, 3))
    model = trained(network, methods.conadv(), images, labels, run_eagerly=True)
    assert all(np.all(np.isfinite(value)) for value in values(model.network).values())
    export(model.network, str(tmp_path / "export"))
    served = tf.saved_model.load(str(tmp_path / "export"))
    np.testing.assert_allclose(served.predict(images[0])["logits"], network(images[0]), atol=0.1)


def test_it_is_saved_and_loaded_by_keras(tmp_path):
    images, labels = batches(1, (8, 8, 3))
    preprocess = tf_keras.applications.mobilenet_v2.preprocess_input
    model = trained(
        split(small(0.3), preprocess=preprocess), methods.conadv(), images, labels, make_lars(0.1), run_eagerly=True
    )
    model.save(str(tmp_path / "m.keras"))
    loaded = tf_keras.models.load_model(str(tmp_path / "m.keras"))
    assert_identical(values(loaded.network), values(model.network))
    assert_identical(values(loaded.shadows[0]), values(model.shadows[0]))
    for one in (model, loaded):
        fit(one, images, labels, 1, initial=1)
    assert_identical(values(loaded.network), values(model.network))


# What is pinned, what is not split, what is refused


def test_a_base_called_in_inference_mode_stays_so():
    """Keras' way to fine-tune: `base(x, training=False)` keeps its statistics while the head trains."""
    base, images = small(0.3), L.Input((8, 8, 3))
    features = tf_keras.Model(base.inputs, base.get_layer("of_features").output, name="base")
    x = L.BatchNormalization(name="own")(features(images, training=False))
    network = split(tf_keras.Model(images, L.Dense(CLASSES)(x)))
    assert [norm.name for norm in network.norms()] == ["own"]
    before = values(network)
    after = values(trained(network, methods.disadv(), *batches(1, (8, 8, 3))).network)
    still = {path for path in before if "/moving" in path and not path.startswith("own/")}
    assert_identical({path: after[path] for path in still}, {path: before[path] for path in still})
    assert np.any(after["own/adversarial/moving_mean"] != before["own/adversarial/moving_mean"])


def test_a_network_without_batch_norm_trains_with_one_set_and_says_so(caplog):
    model = tf_keras.Sequential(
        [L.Input((8, 8, 3)), L.Conv2D(8, 3), L.LayerNormalization(), L.Flatten(), L.Dense(CLASSES)], name="plain"
    )
    network = split(model)
    assert sum("'plain' has no batch norm" in message for message in caplog.messages) == 1
    before = values(network)
    after = values(trained(network, methods.conadv(), *batches(1, (8, 8, 3))).network)
    assert all(np.any(after[path] != before[path]) for path in before)
    assert len(caplog.messages) == 1


class Subclassed(tf_keras.Model):
    def call(self, images):
        return images


class Holds(L.Layer):
    """A layer that keeps a batch norm to itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = L.BatchNormalization(name="held")

    def call(self, inputs):
        return self.norm(inputs)


class Draws(L.Layer):
    def call(self, inputs, training=None):
        return inputs * tf.random.uniform(tf.shape(inputs)) if training else inputs


class Unnamed(L.Layer):
    """A layer whose config does not have what makes it."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)

    def get_config(self):
        return {"name": self.name}


def with_layer(layer, end=None) -> tf_keras.Model:
    return tf_keras.Sequential([L.Input((8, 8, 3)), layer, L.Flatten(), end or L.Dense(CLASSES)], name="bad")


def called_twice() -> tf_keras.Model:
    images, norm = L.Input((8, 8, 3)), L.BatchNormalization(name="twice")
    return tf_keras.Model(images, L.Flatten()(norm(norm(images))))


def two_outputs() -> tf_keras.Model:
    images = L.Input((8, 8, 3))
    return tf_keras.Model(images, [L.Flatten()(images)] * 2, name="bad")


REFUSED = {
    "subclassed": (lambda: Subclassed(name="bad"), "model 'bad' is a subclassed model"),
    "no model": (lambda: L.Dense(3), "not tf_keras.*Dense"),
    "no shape": (lambda: tf_keras.Sequential([L.Flatten(), L.Dense(3)]), "no input shape yet"),
    "two outputs": (two_outputs, "1 inputs and 2 outputs"),
    "any size": (lambda: tf_keras.Sequential([L.Input((None, 8, 3)), L.GlobalMaxPooling2D()]), "images of one size"),
    "no classes": (lambda: tf_keras.Sequential([L.Input((8, 8, 3)), L.Conv2D(3, 3)]), "gives outputs of shape"),
    "softmax": (lambda: small(activation="softmax"), "layer 'head' of model 'small' gives probabilities .softmax."),
    "a softmax layer": (lambda: with_layer(L.ReLU(), L.Softmax()), "gives probabilities .softmax."),
    "channels first": (lambda: with_layer(L.BatchNormalization(1, name="b")), r"layer 'b' .* has axis=\[1\]"),
    "held": (lambda: with_layer(Holds()), "layer 'held' .* lies inside another layer"),
    "regularized": (lambda: with_layer(L.BatchNormalization(gamma_regularizer="l2")), "has a gamma_regularizer"),
    "activity": (lambda: with_layer(L.Dense(3, activity_regularizer="l2")), "adds a loss of its outputs"),
    "draws": (lambda: with_layer(Draws(name="mine")), "mine/.*draws from TensorFlow's global state"),
    "no config": (lambda: with_layer(Unnamed(3, name="mine")), "layer 'mine' .Unnamed. cannot be made again"),
    "twice": (called_twice, "called more than once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_in_one_line(case):
    make, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected) as error:
        split(make())
    assert "\n" not in str(error.value)


def test_what_training_cannot_do_with_it_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"branches=.'adversarial',."):
        split(small(), ("adversarial",))
    with pytest.raises(ConfigError, match="must keep the shape"):
        split(small(), preprocess=lambda images: images[:, :4])
    with pytest.raises(ConfigError, match="preprocess gives a ndarray: write it with TensorFlow's operations"):
        split(small(), preprocess=lambda images: np.asarray(images) / 255)
    with pytest.raises(ConfigError, match=r"trains the BN branches .'adversarial'."):
        ConAdvModel(split(small(), ("main",)), methods.conadv())
    with pytest.raises(ConfigError, match=r"attack.compute_dtype='bfloat16'"):
        ConAdvModel(split(small()), methods.conadv(Attack(compute_dtype="bfloat16")))
    half = tf_keras.Sequential([L.Input((8, 8, 3)), L.Flatten(), L.Dense(CLASSES, dtype="mixed_float16")])
    with pytest.raises(ConfigError, match="dtype='mixed_float16'"):
        ConAdvModel(split(half), methods.vanilla())
    with pytest.raises(ValueError, match=r"8, 8, 3"):
        trained(split(small()), methods.vanilla(), *batches(1, (9, 9, 3)))


NO_GRADIENT = {
    "a cast": (lambda images: tf.cast(tf.cast(images, tf.uint8), tf.float32), r"\(a cast to whole numbers"),
    "an operation without one": (
        lambda images: tf.image.adjust_contrast(images, 2.0),
        r"\(gradient .* AdjustContrastv2\)",
    ),
}
ATTACKS = {
    "shadow": methods.conadv(),
    "paired": methods.conadv(schedule="paired"),
    # Seen to fail: it trained on clean images in the place of adversarial ones.
    "paired, smoothed": methods.conadv(Attack(label="smoothed"), schedule="paired"),
}


@pytest.mark.parametrize("method", ATTACKS)
@pytest.mark.parametrize("case", NO_GRADIENT)
def test_images_behind_which_no_gradient_lies_are_not_attacked(case, method):
    """Seen to fail: "None values not supported." and "gradient registry has no entry"."""
    preprocess, cause = NO_GRADIENT[case]
    network = split(tf_keras.Sequential([L.Input((8, 8, 3)), L.Flatten(), L.Dense(CLASSES)]), preprocess=preprocess)
    with pytest.raises(
        ConfigError, match=f"^the gradient of the logits by the images is needed, .* {cause}.*: do that .* data.map"
    ):
        trained(network, ATTACKS[method], *batches(1, (8, 8, 3)))


def test_a_network_that_no_gradient_passes_trains_without_an_attack():
    network = split(small(), preprocess=NO_GRADIENT["a cast"][0])
    before = values(network)
    after = values(trained(network, methods.vanilla(), *batches(1, (8, 8, 3)), run_eagerly=True).network)
    assert np.any(after["convolution/kernel"] != before["convolution/kernel"])


@pytest.mark.parametrize("compiled", [False, True])
def test_layer_normalization_far_from_zero_is_that_of_float64(compiled):
    """Seen to fail: under XLA the variance was a difference of moments, which float32 does not hold."""

    def far(images):
        return images / 128.0 + 1000.0

    model = tf_keras.Sequential(
        [L.Input((8, 8, 3)), L.LayerNormalization(axis=[1, 2, 3]), L.Flatten(), L.Dense(CLASSES)]
    )
    network, images = split(model, preprocess=far), np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3))
    logits = tf.function(network, jit_compile=compiled, autograph=False)(tf.constant(images, tf.float32))
    values = np.float64(far(np.float32(images))).reshape(5, -1)
    normal = (values - values.mean(1, keepdims=True)) / np.sqrt(values.var(1, keepdims=True) + 1e-3)
    kernel, bias = model.layers[-1].get_weights()
    np.testing.assert_allclose(logits, normal @ np.float64(kernel) + bias, atol=5e-3)
