"""The classifiers of tf_keras.applications, by their names in a recipe."""

import json
import random
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from commands import call_command_line
from helpers import some_of
from record_data import make_folder

from conadv_tf import config
from conadv_tf.errors import ConfigError
from conadv_tf.models import applications
from conadv_tf.run import build

TINY = [
    "train.global_batch_size=8",
    "train.microbatch_size=8",
    "train.epochs=1",
    "learning_rate.warmup_epochs=0",
    "model.name='RegNetX002'",
    "synthetic.image_size=32",
    "synthetic.num_classes=10",
    "synthetic.num_train=16",
    "data.source='synthetic'",
]


def test_each_has_its_preprocessing_and_no_helper_is_one():
    assert {"EfficientNetB0", "ConvNeXtTiny", "ResNet50", "MobileNetV3Small", "RegNetX002"} <= set(applications.names())
    for name in applications.names():
        module = sys.modules[getattr(tf_keras.applications, name).__module__]
        assert callable(module.preprocess_input), name


def test_the_seed_alone_decides_the_initial_weights():
    made = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        network = applications.application("MobileNet", 10, (32, 32, 3), ("main", "adversarial"), 7, "float32")
        made.append([variable.numpy() for variable in network.leaf_variables()])
        assert random.random() == random.Random(state).random()
    assert all(np.array_equal(one, other) for one, other in zip(*made, strict=True))
    assert network(tf.zeros((2, 32, 32, 3))).shape == (2, 10)
    assert network.architecture == "MobileNet"


def test_in_bfloat16_logits_are_float32_from_float32_kernels():
    """Seen to fail: logits of 8 bits, which made ties. What follows them is float32 too."""
    random = np.random.default_rng(0)
    network = applications.application("MobileNet", 50, (32, 32, 3), ("main",), 0, "mixed_bfloat16")
    logits = network.graph.get_layer("conv_preds")
    logits.set_weights([random.normal(size=weight.shape) for weight in logits.get_weights()])
    features, images = [], random.integers(0, 256, (3, 32, 32, 3))
    logits.call = lambda inputs, call=logits.call: features.append(inputs) or call(inputs)
    found = network(images)
    kernel, bias = map(np.float64, logits.get_weights())
    np.testing.assert_allclose(found, np.float64(features[0])[:, 0, 0] @ kernel[0, 0] + bias, rtol=1e-5, atol=1e-5)
    assert network.dtype_policy.name == "mixed_bfloat16"
    assert {layer.dtype_policy.name for layer in network.parts()[:-1]} == {"mixed_bfloat16"}
    assert network.twin(dtype="float32")(images).shape == (3, 50)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model.name='InceptionV3'"], r"'InceptionV3' does not take images of 32 × 32 × 3 \(Input size"),
        (["model.width=2"], r"model.width=2 is for this package's networks, RegNetX002 has its own"),
        (["model.batch_norm_momentum=0.95"], r"leave it at 0.9"),
        (["model.name='EfficientNetB9'"], r"'EfficientNetB9' is not a network here: .* such as EfficientNetB0"),
    ],
)
def test_what_does_not_fit_is_refused(settings, named):
    config.configure(["method/conadv.gin"], [*TINY, *settings])
    with pytest.raises(ConfigError, match=named):
        build.build("tiny", tf.distribute.get_strategy(), None)


@pytest.mark.parametrize("precision", some_of(["float32", "mixed_bfloat16"], long=["mixed_bfloat16"]))
def test_a_recipe_trains_one(precision, tmp_path):
    images = make_folder(tmp_path, (8, 8), 32)
    settings = [
        *(setting for setting in TINY if not setting.startswith(("synthetic", "data"))),
        "data.source='tfrecords'",
        "tfrecords.num_classes=16",
        "tfrecords.num_train=16",
        "tfrecords.image_size=32",
        "train.optimizer='adamw'",
        "learning_rate.peak_learning_rate=0.001",
        f"train.precision='{precision}'",
    ]
    params, folder = [f"--gin_param={setting}" for setting in settings], tmp_path / "run"
    call_command_line("--gin_file=method/conadv.gin", *params, f"--data_dir={images}", f"--model_dir={folder}")
    result = json.loads((folder / "result.json").read_text())
    assert result["model"] == "RegNetX002"
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], np.isfinite(line["adversarial_loss"])) == (2, True)
    served = tf.saved_model.load(str(folder / "export")).signatures["serving_default"]
    assert served(images=tf.zeros((1, 32, 32, 3)))["logits"].shape == (1, 16)
