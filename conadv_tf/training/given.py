"""Checks of what `fit`, `evaluate` and `predict` are given, made on the host before it enters the strategy.

    arrays                    shapes, every label, the range of all images
    data sets of batches      shapes, the labels of every batch, the range of the first batches
    generators, Sequences     the same
    distributed data sets     shapes; the range of the first batch, unless they are bytes

A step sees none of this: it has no host operation, and takes a label out of range for a loss that is not finite.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf.data.records import fail_unless
from conadv_tf.errors import DataError, data_error, out_of_memory
from conadv_tf.training.other_keras import is_of_other_keras

FIRST = 3  # batches whose range is looked at
LOOKED_AT = 1 << 30  # bytes of an array; of a larger one every so many-th image is looked at
# Images of [0, 255] of which none has a brighter pixel: no few batches can tell, but so many images can.
DARK, MANY = 16, 32
ROUNDING = 0.5  # levels that resizing may go beyond [0, 255]

_RANGE = (
    "images hold values from {} to {}, and the network takes [0, 255] and normalises them itself: leave out rescaling "
    "and normalisation (images of 16 bits: divide by 257; single values beyond the ends: clip)"
)
_FINITE = "images hold values that are not finite: look for what makes them, or leave those images out"
_LABEL = (
    "label {} is none of the {} classes of the network, which count from 0: renumber the labels, or build the network "
    "with more classes"
)
_FORMS = "arrays, a tf.data.Dataset of batches, a generator or a tf_keras.utils.Sequence of them"


@dataclasses.dataclass(frozen=True)
class Checks:
    """The checks of data for one network.

    Attributes:
      image_shape: (H, W, C) of an image.
      num_classes: labels are 0..num_classes-1; None where none are asked for, as in `predict`.
      every_batch: whether data sets have MANY images of every batch looked at, not all of the first batches: where the
        host that reads may be another one, as with TPUs, which a countdown on this one does not reach.

    Raises:
      DataError: from every method, for data that the network cannot train or be evaluated on.
    """

    image_shape: tuple[int, ...]
    num_classes: int | None
    every_batch: bool = False

    def checked(self, x: Any, y: Any = None, weights: Any = None) -> Any:
        """x, or in its place the same data whose batches are looked at as they come; for the arguments of Keras."""
        if isinstance(x, tf.data.Dataset):
            return self._data_set(x)
        if isinstance(x, tf.distribute.DistributedDataset):
            return self._distributed(x)
        if isinstance(x, tf_keras.utils.Sequence):
            return _Watched(x, self._watching())
        if is_of_other_keras(x):  # such as what ImageDataGenerator makes, a generator without end
            raise DataError(f"images are a {_kind(x)}: it is of keras, and the model of tf_keras: give {_FORMS}")
        if hasattr(x, "__next__"):
            return map(self._watching(), x)
        if isinstance(x, tf_keras.utils.experimental.DatasetCreator):
            return x
        self.arrays(x, y, weights, darkest=DARK)
        return x

    def arrays(self, images: Any, labels: Any = None, weights: Any = None, darkest: int = 1) -> None:
        """Looks at arrays: images [rows, (2,) H, W, C], labels [rows] or [rows, 1] of whole numbers, weights [rows].

        Images of which no pixel is above `darkest` are taken for images of another scale; where they are few, 1 is.
        """
        if not _is_array(images):
            raise DataError(f"images are a {_kind(images)}: give {_FORMS}; np.asarray makes an array of a list")
        rows = tuple(images.shape)[:1]
        self._check_images(tuple(images.shape), images.dtype)
        if rows == (0,):
            raise DataError("there are no images: give at least one")
        self._check_range(images, darkest if rows[0] >= MANY else 1)
        if self.num_classes is None:
            return
        if labels is None:
            raise DataError(f"images come without labels: give {_FORMS}, of images and labels")
        if not _is_array(labels):
            raise DataError(f"labels are a {_kind(labels)}: make an array of them with np.asarray")
        self._check_labels(tuple(labels.shape), labels.dtype)
        if tuple(labels.shape)[:1] != rows:
            raise DataError(f"there are {rows[0]} images and {labels.shape[0]} labels: give one label an image")
        self._check_values(np.asarray(labels).reshape(-1), weights)

    def specs(self, element: Any) -> None:
        """Looks at the specs of a data set's element, (images, labels) or (images, labels, weights)."""
        images, labels, _ = _parts(element, labelled=self.num_classes is not None)
        image_spec = _spec(images, "images")
        if image_spec.shape.rank is None:
            raise DataError(
                f"the shape of the images is not known: map tf.ensure_shape(images, {[None, *self.image_shape]}) over "
                "the data set"
            )
        self._check_images(tuple(image_spec.shape), image_spec.dtype)
        if self.num_classes is not None:
            label_spec = _spec(labels, "labels")
            self._check_labels(None if label_spec.shape.rank is None else tuple(label_spec.shape), label_spec.dtype)

    def _check_images(self, shape: tuple, dtype: Any) -> None:
        kind = tf.as_dtype(dtype)
        if not (kind.is_floating or kind.is_integer):
            raise DataError(f"images are of dtype {_name(dtype)}: give numbers in [0, 255], uint8 for instance")
        whole = (None, *self.image_shape)
        fits = tf.TensorShape(whole).is_compatible_with(shape)
        pairs = tf.TensorShape((None, 2, *self.image_shape)).is_compatible_with(shape)
        if not (fits or pairs):
            raise DataError(
                f"images are of shape {_shape(shape)}, the network takes {_shape(whole)}: {self._remedy(shape)}"
            )

    def _remedy(self, shape: tuple) -> str:
        """The remedy for images of a wrong shape."""
        height, width, channels = self.image_shape
        if shape[1:] == (channels, height, width):
            return "put the channels last, with np.moveaxis(images, 1, -1)"
        if shape == self.image_shape:
            return "batch the data, with data.batch(rows); one image alone is images[None]"
        if shape[1:] == (height, width):
            return "add the axis of the channels, with images[..., None]"
        if len(shape) == 2:
            return f"give the images their shape, with images.reshape({_shape((-1, *self.image_shape))})"
        if len(shape) == 4 and shape[1:3] == (height, width):
            return f"give images of {channels} channels, or choose another network"
        return "resize the images, or build the network with their image_shape"

    def _check_labels(self, shape: tuple | None, dtype: Any) -> None:
        kind = tf.as_dtype(dtype)
        if not (kind.is_floating or kind.is_integer or kind.is_bool):
            raise DataError(f"labels are of dtype {_name(dtype)}: number the classes from 0")
        if shape is None or len(shape) == 1 or (len(shape) == 2 and shape[1] in (1, None)):
            return
        if len(shape) == 2 and shape[1] == self.num_classes:
            raise DataError(
                f"labels are of shape {_shape(shape)}, one-hot: give sparse labels, the numbers of the classes, with "
                "np.argmax(labels, -1), label_mode='int' or class_mode='sparse'"
            )
        raise DataError(f"labels are of shape {_shape(shape)}: give one whole number an image, [rows]")

    def _check_range(self, images: Any, darkest: int) -> None:
        size = int(np.prod(images.shape, dtype=np.int64)) * tf.as_dtype(images.dtype).size
        seen = np.asarray(images[:: 1 + size // LOOKED_AT])
        low, high = float(seen.min()), float(seen.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(_FINITE)
        if not _in_range(low, high, darkest):
            raise DataError(_RANGE.format(f"{low:.6g}", f"{high:.6g}"))

    def _check_values(self, labels: np.ndarray, weights: Any) -> None:
        wrong = ~((labels >= 0) & (labels < self.num_classes) & (labels == np.floor(labels)))
        if weights is not None:
            wrong &= np.asarray(weights).reshape(-1) != 0  # rows that count nothing, such as padding
        if wrong.any():
            raise DataError(_LABEL.format(f"{labels[np.argmax(wrong)]:g}", self.num_classes))

    def _data_set(self, data: tf.data.Dataset) -> tf.data.Dataset:
        """The data set with assertions in it; neither its elements, their number nor its options change."""
        self.specs(data.element_spec)
        first = None if self.every_batch else _Countdown(FIRST)

        def look(*element):
            images, labels, weights = _parts(element, labelled=self.num_classes is not None)
            if first is None:
                self._assert_range(images[:MANY])
            else:
                tf.cond(first.counts(), lambda: self._assert_range(images), tf.no_op)
            if self.num_classes is not None:
                self._assert_labels(images, labels, weights)
            # Shapes that the data set leaves open are known from here on.
            images = tf.ensure_shape(images, [None, *images.shape[1:-3], *self.image_shape])
            return (images, *element[1:]) if isinstance(data.element_spec, tuple) else images

        watched = data.map(look)
        watched.conadv_first = first  # whoever has the data set has what it counts with
        return watched

    def _assert_range(self, images: tf.Tensor) -> tf.Operation:
        values = tf.cast(images, tf.float32)
        low, high = tf.reduce_min(values), tf.reduce_max(values)
        with tf.control_dependencies([fail_unless(tf.reduce_all(tf.math.is_finite(values)), _FINITE)]):
            return fail_unless(_in_range(low, high, 1), _RANGE, _text(low), _text(high))

    def _assert_labels(self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None) -> None:
        rows = tf.shape(images)[0]
        fail_unless(
            tf.equal(tf.size(labels), rows),
            "there are {} labels for {} images of a batch: give one whole number an image",
            tf.size(labels),
            rows,
        )
        values = tf.reshape(tf.cast(labels, tf.float64), [-1])
        wrong = ~((values >= 0) & (values < float(self.num_classes or 0)) & tf.equal(values, tf.floor(values)))
        if weights is not None:
            wrong &= tf.not_equal(tf.reshape(tf.cast(weights, tf.float32), [-1]), 0.0)

        def fail() -> tf.Operation:
            return fail_unless(False, _LABEL, _text(values[tf.argmax(wrong)]), tf.constant(self.num_classes))

        tf.cond(tf.reduce_any(wrong), fail, tf.no_op)

    def _distributed(self, data: tf.distribute.DistributedDataset) -> tf.distribute.DistributedDataset:
        """The data set as it is: its batches are on their devices already."""
        spec = data.element_spec
        element = tuple(map(_of_one_replica, spec)) if isinstance(spec, tuple) else _of_one_replica(spec)
        self.specs(element)
        if _parts(element, labelled=False)[0].dtype != tf.uint8:
            batch = next(iter(data))
            images = _of_one_replica(batch[0] if isinstance(batch, tuple) else batch)
            dataclasses.replace(self, num_classes=None).arrays(images)
        return data

    def _watching(self) -> Callable[[Any], Any]:
        """A function that looks at a batch of a generator or Sequence and returns it."""
        seen = 0

        def look(batch: Any) -> Any:
            nonlocal seen
            seen += 1
            images, labels, weights = _parts(batch, labelled=self.num_classes is not None)
            if seen <= FIRST:
                self.arrays(images, labels, weights)
            elif labels is not None and hasattr(labels, "shape") and self.num_classes is not None:
                self._check_values(np.asarray(labels).reshape(-1), weights)
            return batch

        return look


class _Watched(tf_keras.utils.Sequence):
    """A Sequence with a look at each of its batches."""

    def __init__(self, batches: tf_keras.utils.Sequence, look: Callable[[Any], Any]):
        self._batches, self._look = batches, look

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Any:
        return self._look(self._batches[index])

    def on_epoch_end(self) -> None:
        self._batches.on_epoch_end()


class _Countdown:
    """A number that a data set counts down, whichever of its iterators runs; 0 is the end.

    A queue, not a variable, which a strategy's scope would spread over the replicas.
    """

    def __init__(self, number: int):
        with tf.init_scope(), tf.device("CPU:0"):
            self._left = tf.queue.FIFOQueue(number, [tf.bool], [()])
            self._left.enqueue_many([tf.ones(number, tf.bool)])

    def counts(self) -> tf.Tensor:
        """Bool scalar: whether the number is above 0; counts one down."""
        return tf.cond(self._left.size() > 0, self._left.dequeue, lambda: tf.constant(False))


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Raises the DataError that an error carries, out of an assertion or a generator, or a RunError without memory."""
    try:
        yield
    except (tf.errors.OpError, MemoryError) as error:
        found = data_error(error) or out_of_memory(error)
        if found is None:
            raise
        raise found from None


def _in_range(low, high, darkest: int):
    """Whether images from `low` to `high` can be on the scale of [0, 255]; all black they can. Numbers or scalars."""
    black = (low == 0) & (high == 0)
    return (low >= -ROUNDING) & (high <= 255 + ROUNDING) & ((high > darkest) | black)


def _parts(element: Any, labelled: bool) -> tuple[Any, Any, Any]:
    """(images, labels, weights) of an element or its specs."""
    if isinstance(element, dict) or (labelled and not (isinstance(element, (tuple, list)) and len(element) in (2, 3))):
        raise DataError(
            f"an element of the data is a {_kind(element)}: give (images, labels), which as_supervised=True makes of a "
            "data set of TFDS"
        )
    parts = tuple(element) if isinstance(element, (tuple, list)) else (element,)
    return (*parts, None, None)[:3]


def _spec(part: Any, name: str) -> tf.TensorSpec:
    if not isinstance(part, tf.TensorSpec):
        raise DataError(f"{name} are a {_kind(part)}: give one dense tensor, images of one size")
    return part


def _of_one_replica(part: Any) -> Any:
    """The first replica's value, or spec, of a distributed one."""
    return tf.nest.flatten(part, expand_composites=True)[0]


def _text(value: tf.Tensor) -> tf.Tensor:
    return tf.strings.as_string(value, shortest=True)


def _is_array(value: Any) -> bool:
    """Tells whether a value has what an array has, numbers or text of a dtype that TensorFlow knows."""
    try:
        tf.as_dtype(value.dtype)
    except (AttributeError, TypeError):  # a list, a table, an array of another framework
        return False
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


def _kind(value: Any) -> str:
    return type(value).__name__


def _name(dtype: Any) -> str:
    return getattr(dtype, "name", str(dtype))


def _shape(shape: tuple) -> str:
    return f"({', '.join('rows' if side is None else str(side) for side in shape)})"
