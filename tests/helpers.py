"""What several test modules need: small models of the product, data, and ways to look inside."""

import contextlib
import functools
import os

import numpy as np
import pytest
import tensorflow as tf

from conadv_tf import methods
from conadv_tf.methods import attack
from conadv_tf.models import resnet
from conadv_tf.training import collectives, lars, trainer

TORTURE = bool(os.environ.get("CONADV_TORTURE"))
BRANCHES = ("main", "adversarial")
SHAPES = {"digits_resnet": (8, 8, 1), "cifar_resnet8": (8, 8, 3)}


@functools.cache
def mirrored(replicas: int) -> tf.distribute.Strategy:
    """A MirroredStrategy on logical CPUs."""
    collectives.keep_apart()
    return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(replicas)])


def make_model(
    method: methods.Method,
    optimizer=None,
    architecture: str = "digits_resnet",
    strategy: tf.distribute.Strategy | None = None,
    microbatches: int = 1,
    seed: int = 0,
    branches=BRANCHES,
    trained: bool = True,
    network: dict | None = None,
    all_reduce_dtype: str = "float32",
    classes: int = 10,
    **compiled,
) -> trainer.ConAdvModel:
    """A compiled model; `trained` gives γ, β and moving statistics values unlike the initial ones."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        settings = {"seed": 3, "branches": branches, **(network or {})}
        net = resnet.ResNet(architecture, classes, SHAPES[architecture], **settings).create_variables()
        if trained:
            scramble(net)
        model = trainer.ConAdvModel(net, method, microbatches, seed, all_reduce_dtype)
        model.compile(lars.LARS(2.0) if optimizer is None else optimizer, **compiled)
        return model


def scramble(network: resnet.ResNet, seed: int = 11) -> None:
    """Gives everything but the kernels, which start random, values that are neither 0 nor 1."""
    random = np.random.default_rng(seed)
    ranges = {
        "gamma": (0.5, 1.5),
        "beta": (-0.3, 0.3),
        "moving_mean": (-0.5, 0.5),
        "moving_variance": (0.5, 2.0),
    }
    for name, variable in sorted(named_variables(network).items()):
        kind = name.rsplit("/", 1)[1]
        if kind in ranges:
            variable.assign(random.uniform(*ranges[kind], variable.shape))
        elif name == "classifier/kernel":
            variable.assign(random.normal(0.0, 0.3, variable.shape))


def named_variables(network: resnet.ResNet) -> dict[str, tf.Variable]:
    """The variables by the names tests/reference.py gives them (there: mean, variance)."""
    convs = {"stem": network.stem}
    for number, block in enumerate(network.blocks, 1):
        convs |= {f"block{number}/conv{i}": conv for i, conv in enumerate(block.convs, 1)}
        if block.shortcut is not None:
            convs[f"block{number}/shortcut"] = block.shortcut
    named = {"classifier/kernel": network.classifier.kernel, "classifier/bias": network.classifier.bias}
    for name, layer in convs.items():
        named[f"{name}/kernel"] = layer.conv.kernel
        norm = layer.norm
        for branch in network.branches:
            named[f"{name}/{branch}/gamma"] = norm.gammas[branch]
            named[f"{name}/{branch}/beta"] = norm.betas[branch]
            named[f"{name}/{branch}/moving_mean"] = norm.moving_means[branch]
            named[f"{name}/{branch}/moving_variance"] = norm.moving_variances[branch]
    return named


def some_of(cases, *kept, long=(), otherwise: str = "torture") -> list:
    """For pytest.mark.parametrize: `kept` in every run of the tests, the cases of `long` by `make test-all`.

    `otherwise` is the mark of the other cases, "torture" or "long".
    """
    assert {*kept, *long} <= set(cases)
    marks = dict.fromkeys(cases, getattr(pytest.mark, otherwise)) | dict.fromkeys(long, pytest.mark.long)
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks[case])
        for case in cases
    ]


def random_batches(count: int, rows: int, architecture: str = "digits_resnet", seed: int = 0):
    """uint8 images [count, rows, H, W, C] that use the whole range, both ends included often; int32 labels."""
    random = np.random.default_rng(seed)
    images = random.integers(-40, 296, (count, rows, *SHAPES[architecture])).clip(0, 255).astype(np.uint8)
    return images, random.integers(0, 10, (count, rows)).astype(np.int32)


def fit(model: trainer.ConAdvModel, images, labels, updates: int, initial: int = 0) -> list[dict]:
    """Trains on global (micro-)batches [count, rows, ...], one update an epoch; the logs of each update."""
    data = tf.data.Dataset.from_tensor_slices((images, labels)).repeat()
    history = model.fit(data, steps_per_epoch=1, initial_epoch=initial, epochs=initial + updates, verbose=0).history
    return [{name: values[step] for name, values in history.items()} for step in range(updates)]


def snapshot(model: trainer.ConAdvModel) -> dict[str, np.ndarray]:
    """Every variable that the model, its metrics and its optimizer hold."""
    optimizer = model.optimizer.variables
    optimizer = optimizer() if callable(optimizer) else optimizer
    held = {
        "network": named_variables(model.network).items(),
        "optimizer": enumerate(optimizer),
        "metrics": enumerate(variable for metric in model.metrics for variable in metric.variables),
    }
    held |= {f"shadow{i}": named_variables(shadow).items() for i, shadow in enumerate(model.shadows)}
    return {f"{part}/{name}": v.numpy() for part, variables in held.items() for name, v in variables}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """|a − b| ≤ tolerance · max(1, |b|) for every number of both, which have the same names."""
    assert actual.keys() == expected.keys()
    errors = {
        name: np.max(np.abs(actual[name] - expected[name]) / np.maximum(1.0, np.abs(expected[name])))
        for name in expected
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.3g}"


def assert_identical(actual: dict, expected: dict) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not np.array_equal(actual[name], expected[name])]
    assert not different


def microbatch_seed(run_seed: int, update: int, place: int) -> tf.Tensor:
    """The seed of a micro-batch: the run's seed, the update, its place in the global batch."""
    of_update = tf.random.fold_in([run_seed, 0], update) & 0x7FFFFFFF
    return tf.random.fold_in(of_update, place) & 0x7FFFFFFF


def draws(specification: attack.Attack, shape, labels, seed):
    """The random start in units of ε and the labels the attack aims at, drawn as the product documents."""
    start, coin, target = tf.unstack(tf.random.split(seed, 3) & 0x7FFFFFFF)
    delta = tf.random.stateless_uniform(shape, start, -1.0, 1.0).numpy()
    given = specification.random_start_probability
    if not tf.random.stateless_uniform((), coin) < (1.0 if given is None else given):
        delta = np.zeros_like(delta)
    if specification.goal == "random_target":
        labels = (labels + tf.random.stateless_uniform(labels.shape, target, 1, 10, tf.int32).numpy()) % 10
    return delta, labels
