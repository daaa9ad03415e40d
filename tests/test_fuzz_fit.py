"""Drawn inputs of `fit`: each trains, or ends with one line that names the remedy; none trains on a wrong scale.

CONADV_TORTURE=1 (`make torture`) draws all of them, `make test` a share. Every case is drawn from its number alone.
"""

import functools
import random
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import TORTURE, make_model, mirrored, random_batches

from conadv_tf import methods
from conadv_tf.errors import ConfigError, DataError

CASES = 200 if TORTURE else 20
BATCH = 20  # cases a test
ROWS, SIZE = 20, 8
IMAGES, LABELS = (part[0] for part in random_batches(1, ROWS))

# By name: what becomes of images of whole levels in [0, 255]; whether they stay on that scale.
SCALES = {
    "levels": (lambda images: images, True),
    "float levels": (lambda images: np.float32(0.9) * images, True),
    "dark": (lambda images: images // 32, True),
    "black": (lambda images: 0 * images, True),
    "to 1": (lambda images: images / np.float32(255), False),
    "to half": (lambda images: images / np.float64(510), False),
    "around 0": (lambda images: images / np.float32(127.5) - 1, False),
    "standardised": (lambda images: (images - images.mean()) / images.std(), False),
    "mean taken off": (lambda images: images - np.float32(117.3), False),
    "of 16 bits": (lambda images: images.astype(np.uint16) * 257, False),
    "of 12 bits": (lambda images: images.astype(np.int32) * 16, False),
    "of one bit": (lambda images: images > 127, False),
    "one bit as a number": (lambda images: (images > 127).astype(np.uint8), False),
    "infinite": (lambda images: np.where(images > 200, np.inf, images), False),
}
SHAPES = {
    "right": (lambda images: images, True),
    "channels first": (lambda images: np.moveaxis(images, -1, 1), False),
    "no channels": (lambda images: images[..., 0], False),
    "colour": (lambda images: np.repeat(images, 3, -1), False),
    "large": (lambda images: np.repeat(np.repeat(images, 2, 1), 2, 2), False),
    "flat": (lambda images: images.reshape(len(images), -1), False),
}
DTYPES = (np.uint8, np.int32, np.int64, np.uint16, np.float16, np.float32, np.float64)
LABELLED = {
    "right": (lambda labels: labels, True),
    "int64": (lambda labels: labels.astype(np.int64), True),
    "bytes": (lambda labels: labels.astype(np.uint8), True),
    "floats": (lambda labels: labels.astype(np.float32), True),
    "columns": (lambda labels: labels[:, None], True),
    "from 1": (lambda labels: labels + 1, False),
    "with a gap": (lambda labels: np.where(labels == labels[13], 250, labels), False),
    "unknown as -1": (lambda labels: np.where(labels == labels[0], -1, labels), False),
    "soft": (lambda labels: labels + np.float32(0.3), False),
    "one-hot": (lambda labels: np.eye(10, dtype=np.float32)[labels], False),
    "names": (lambda labels: np.array([f"class {label}" for label in labels]), False),
    "two each": (lambda labels: np.stack([labels, labels], 1), False),
}
FORMS = ("arrays", "tensors", "data set", "data set that drops", "generator", "sequence")


class Case(NamedTuple):
    """A drawn input: how images and labels are made, and how they are handed over."""

    scale: str
    shape: str
    dtype: type | None
    labels: str
    form: str
    batch: int
    replicas: int

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        images = SHAPES[self.shape][0](SCALES[self.scale][0](IMAGES))
        return images if self.dtype is None else images.astype(self.dtype), LABELLED[self.labels][0](LABELS)

    def is_right(self) -> bool:
        """Whether `fit` has to train on it."""
        replicas = self.replicas == 1 or (self.form == "data set that drops" and self.batch % self.replicas == 0)
        kinds = ((SCALES, self.scale), (SHAPES, self.shape), (LABELLED, self.labels))
        return replicas and all(table[name][1] for table, name in kinds)


def mostly(draw: random.Random, table, right: int = 1) -> str:
    """One of the first `right` names, or of all."""
    names = list(table)
    return draw.choice(names[:right] if draw.random() < 0.6 else names)


def drawn(number: int) -> Case:
    draw = random.Random(number)
    scale = mostly(draw, SCALES, 2)
    # A dtype of the user's own choice; it must not make other images of these.
    dtype = draw.choice(DTYPES) if SCALES[scale][1] and draw.random() < 0.5 else None
    replicas = 2 if draw.random() < 0.15 else 1
    return Case(
        scale, mostly(draw, SHAPES), dtype, mostly(draw, LABELLED, 4), draw.choice(FORMS), draw.choice((8, 5)), replicas
    )


class Batches(tf_keras.utils.Sequence):
    def __init__(self, images, labels, rows: int):
        self._images, self._labels, self._rows = images, labels, rows

    def __len__(self) -> int:
        return -(-len(self._images) // self._rows)

    def __getitem__(self, index: int):
        rows = slice(index * self._rows, (index + 1) * self._rows)
        return self._images[rows], self._labels[rows]


def handed_over(case: Case) -> dict:
    """The arguments of `fit`."""
    images, labels = case.arrays()
    if case.form == "arrays":
        return {"x": images, "y": labels, "batch_size": case.batch}
    if case.form == "tensors":
        return {"x": tf.constant(images), "y": tf.constant(labels), "batch_size": case.batch}
    if case.form.startswith("data set"):
        data = tf.data.Dataset.from_tensor_slices((images, labels))
        return {"x": data.batch(case.batch, drop_remainder=case.form == "data set that drops")}
    batches = Batches(images, labels, case.batch)
    return {"x": batches if case.form == "sequence" else (batches[number] for number in range(len(batches)))}


@functools.cache
def model(replicas: int):
    """One model for all cases: they differ in what comes before it."""
    return make_model(methods.vanilla(), "sgd", strategy=None if replicas == 1 else mirrored(replicas))


def outcome(case: Case) -> str:
    """ "trains", or the line it ends with; anything else that is raised is an error of ours."""
    made = model(case.replicas)
    before = [variable.numpy() for variable in made.network.trainable_variables]
    try:
        history = made.fit(**handed_over(case), verbose=0).history
    except (ConfigError, DataError) as error:
        return str(error)
    after = [variable.numpy() for variable in made.network.trainable_variables]
    assert np.isfinite(history["loss"]).all(), case
    assert not any(map(np.array_equal, after[:1], before)), case
    return "trains"


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_inputs_train_or_end_with_one_line_that_names_the_remedy(first):
    counts = Counter()
    for number in range(first, first + BATCH):
        case = drawn(number)
        said = outcome(case)
        assert (said == "trains") == case.is_right(), (number, case, said)
        # The cause, and the remedy behind a colon.
        assert said == "trains" or ("\n" not in said and len(said.partition(": ")[2]) > 15), (number, case, said)
        counts[said.split()[0] if said != "trains" else "trains"] += 1
    assert 0 < counts["trains"] < BATCH  # else the draws are one-sided
    print(f"inputs of fit {first} to {first + BATCH - 1}: {counts['trains']} trained, {BATCH - counts['trains']} not")
