"""Crops and flips of training images, drawn statelessly; docs/data.md describes them.

Every draw is a function of (seed, epoch, index within the epoch), so an image position gets the same crop
whatever the number of replicas, hosts or micro-batches, and a resumed run repeats it. Two kinds: whole
batches of small decoded images (`batch`), and one encoded image at a time (`decoded`).
"""

import dataclasses
from collections.abc import Callable

import gin
import tensorflow as tf

from conadv_tf.data import autoaugment
from conadv_tf.data.pictures import decode_image
from conadv_tf.errors import ConfigError

# Streams of randomness under one seed: the order of the images must not be tied to their crops.
ORDER, AUGMENTATION, AUTOAUGMENT = 0, 1, 2

# The padding, in pixels, of each augmentation of images in memory: none, and CIFAR's 4.
_PADDING = {"flip": 0, "crop_flip": 4}
IN_MEMORY, STREAMED = ("none", *_PADDING), ("none", "flip", "resized_crop_flip")

AREA_RANGE = (0.08, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)
CENTRAL_FRACTION = 224 / 256  # evaluation crop over the shorter side, whatever the image size
_DRAWS = 2**31

# Four rounds, TensorFlow's default, leave the permutations of neighbouring epochs correlated (1.7 times as
# many equal crops as chance); eight do not.
_ROUNDS = 8
_WORDS = 3  # of a seed of RandomIndexShuffle

MODES = ("replace", "concat3")


@dataclasses.dataclass(frozen=True)
class View:
    """The way in which evaluation, and prediction after it, sees an image file.

    Attributes:
      central_fraction: the sides of the central part, over those of the largest part of its shape.
      antialias: whether pixels are averaged where the part is shrunk.
    """

    central_fraction: float
    antialias: bool


STREAMED_VIEW = View(CENTRAL_FRACTION, antialias=False)
# Images in memory have the network's size, and no evaluation resizes them: this shows such an image as it is.
WHOLE_VIEW = View(1.0, antialias=True)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images.

    Attributes:
      crop: crop and flip, one of IN_MEMORY or STREAMED.
      policy: AutoAugment's policy, after crop and flip: "none", or one of autoaugment.POLICIES.
      mode: "replace" puts AutoAugment's image in the clean one's place; "concat3" hands out both, for a network with
        three BN branches.
    """

    crop: str = "none"
    policy: str = "none"
    mode: str = "replace"

    def __post_init__(self):
        policies = ("none", *autoaugment.POLICIES)
        for setting, value, choices in (("policy", self.policy, policies), ("mode", self.mode, MODES)):
            if value not in choices:
                raise ConfigError(f"autoaugment.{setting}={value!r} is not known: choose one of {', '.join(choices)}")
        if self.policy == "none" and self.mode != "replace":
            raise ConfigError(f"autoaugment.mode={self.mode!r} without a policy: set autoaugment.policy")

    @property
    def concatenates(self) -> bool:
        """Tells whether the clean image and AutoAugment's are both handed out."""
        return self.mode == "concat3"

    def check(self, source: str, streamed: bool) -> None:
        """Raises ConfigError where images in memory, or streamed ones, do not offer this crop."""
        if self.crop not in (STREAMED if streamed else IN_MEMORY):
            raise ConfigError(
                f"{source}.augmentation={self.crop!r} is not offered here: images in memory take "
                f"{', '.join(IN_MEMORY)}; streamed files (in_memory=False) take {', '.join(STREAMED)}"
            )

    def after_crop(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Applies AutoAugment to an image uint8 [H, W, 3] by a seed int64 [2]; [2, H, W, 3] if it concatenates."""
        if self.policy == "none":
            return image
        distorted = autoaugment.distort(image, self.policy, seed)
        return tf.stack([image, distorted]) if self.concatenates else distorted


@gin.configurable("autoaugment", denylist=["crop"])
def augmentation(crop: str, policy: str = "none", mode: str = "replace") -> Augmentation:
    """The augmentation of training images: the source's crop and flip, then AutoAugment.

    Args:
      crop: crop and flip, see `Augmentation`.
      policy: AutoAugment's policy, applied after crop and flip: "none", "imagenet" or "cifar10".
      mode: "replace" puts AutoAugment's image in the clean one's place; "concat3" hands out both, and adversarial
        methods train on clean, augmented and adversarial images through three BN branches, as the TF1 release does.

    Raises:
      ConfigError: an unknown policy or mode, or a mode without a policy.
    """
    return Augmentation(crop, policy, mode)


def permute(index: tf.Tensor, size: int, seed: int, stream: int, epoch: tf.Tensor) -> tf.Tensor:
    """Looks up `index` in the permutation of 0..size-1 that belongs to (seed, stream, epoch).

    Args:
      index: int64 [n], in 0..size-1.
      size: the length of the permutation.
      seed: any int64, or int64 [n].
      stream: ORDER, AUGMENTATION or AUTOAUGMENT.
      epoch: int64 [n], the epoch of each index.

    Returns:
      int64 [n], in 0..size-1, each in O(1): nothing is shuffled in memory.
    """
    key = _hashed(_hashed(tf.convert_to_tensor(seed, tf.int64), tf.constant(stream, tf.int64)), epoch)
    # Of each word of a seed the shuffle reads half as many bits as an index has, 8 for up to 65,536: three words alone
    # would make two of a few thousand permutations equal.
    for first in range(0, 2 * _WORDS, _WORDS):
        words = [_hashed(key, tf.constant(first + word, tf.int64)) % 2**31 for word in range(_WORDS)]
        index = tf.raw_ops.RandomIndexShuffle(
            index=index, seed=tf.stack(words, 1), max_index=tf.constant(size - 1, tf.int64), rounds=_ROUNDS
        )
    return index


def _hashed(key: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """A hash of two int64 tensors, int64: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = tf.bitcast(key, tf.uint64) + tf.bitcast(number + 1, tf.uint64) * tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = _folded(bits, shift) * tf.constant(factor, tf.uint64)
    return tf.bitcast(_folded(bits, 31), tf.int64)


def _folded(bits: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.uint64)))


def batch(images: tf.Tensor, augmentation: Augmentation, index: tf.Tensor, seed: int, epoch: tf.Tensor) -> tf.Tensor:
    """Augments a batch of images from memory.

    Args:
      images: uint8 [n, H, W, C], 0..255.
      augmentation: with a crop of IN_MEMORY.
      index: int64 [n], the image positions within their epoch.
      seed: the seed of the run.
      epoch: int64 [n], the epoch of each position.

    Returns:
      uint8 [n, H, W, C], or [n, 2, H, W, C] if it concatenates.
    """
    if augmentation.crop != "none":
        draw = permute(index, _DRAWS, seed, AUGMENTATION, epoch)
        images = _crop_flip(images, draw, _PADDING[augmentation.crop])
    if augmentation.policy == "none":
        return images
    seeds = tf.stack([permute(index, _DRAWS, seed, AUTOAUGMENT, epoch), epoch], axis=1)
    return tf.map_fn(lambda one: augmentation.after_crop(*one), (images, seeds), fn_output_signature=tf.uint8)


def _crop_flip(images: tf.Tensor, draw: tf.Tensor, padding: int) -> tf.Tensor:
    """Pads with black, crops back to size and mirrors, as the int64 [n] draws say."""
    _, height, width, _ = images.shape
    offsets = 2 * padding + 1
    top, left, mirrored = draw % offsets, draw // offsets % offsets, draw // offsets**2 % 2
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    column = tf.range(width, dtype=tf.int64)[None]
    across = left[:, None] + tf.where(mirrored[:, None] == 1, width - 1 - column, column)
    down = top[:, None] + tf.range(height, dtype=tf.int64)[None]
    return tf.gather(tf.gather(padded, down, axis=1, batch_dims=1), across, axis=2, batch_dims=1)


def epoch_seed(seed: int, host: int, epoch: tf.Tensor) -> tf.Tensor:
    """The key of one host's epoch, int64 scalar; [key, index within the epoch] is the seed of one image position."""
    fold = tf.random.experimental.stateless_fold_in
    # A fold hashes what was there and appends the new number, so the second one hashes the epoch.
    return fold(fold(tf.constant([seed, host], tf.int64), epoch), tf.constant(0, tf.int64))[0]


def _resize(image: tf.Tensor, size: tuple[int, int], antialias: bool) -> tf.Tensor:
    resized = tf.image.resize(image, size, method="bicubic", antialias=antialias)
    return tf.saturate_cast(tf.round(tf.ensure_shape(resized, [*size, 3])), tf.uint8)


def _cropped(
    encoded: tf.Tensor, window: Callable[[tf.Tensor], tf.Tensor], size: tuple[int, int], antialias: bool = False
) -> tf.Tensor:
    """Decodes a window of an image, once, and resizes it.

    Args:
      encoded: string scalar, an image.
      window: a function from the image's shape, int32 [3], to int32 [4]: top, left, height, width.
      size: height and width of the result.
      antialias: whether pixels are averaged where the window is shrunk.
    """

    def of_jpeg() -> tf.Tensor:  # decodes the window alone
        shape = tf.io.extract_jpeg_shape(encoded)
        return tf.image.decode_and_crop_jpeg(encoded, window(shape), channels=3)

    def of_others() -> tf.Tensor:
        image = decode_image(encoded)
        top, left, height, width = tf.unstack(window(tf.shape(image)))
        return image[top : top + height, left : left + width]

    # By the bytes: a decoder of another format would complain on the screen.
    return _resize(tf.cond(tf.io.is_jpeg(encoded), of_jpeg, of_others), size, antialias)


def _random_window(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    # The "object" is the whole image: a positive min_object_covered would raise the smallest area.
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=ASPECT_RANGE,
        area_range=AREA_RANGE,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], axis=0)


def _central_window(shape: tf.Tensor, fraction: float, size: tuple[int, int]) -> tf.Tensor:
    height, width = size
    sides = tf.cast(shape[:2], tf.float32)
    largest = tf.minimum(sides, sides[::-1] * [height / width, width / height])
    part = tf.maximum(tf.cast(tf.round(fraction * largest), tf.int32), 1)
    return tf.concat([(shape[:2] - part + 1) // 2, part], axis=0)


def seen(encoded: tf.Tensor, view: View, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """Decodes the central part of an image and resizes it, as a view says.

    Args:
      encoded: string scalar, of a format that `decode_image` takes.
      view: the part.
      image_shape: (H, W, C) of the result; C is 3, grey pictures then have three equal channels, or 1, which is grey.

    Returns:
      uint8 [H, W, C]; an InvalidArgumentError at run time where the image is damaged.
    """
    height, width, channels = image_shape
    size = (height, width)
    image = _cropped(encoded, lambda shape: _central_window(shape, view.central_fraction, size), size, view.antialias)
    return image if channels == 3 else tf.image.rgb_to_grayscale(image)


def central_crop(encoded: tf.Tensor, image_size: int) -> tf.Tensor:
    """Decodes the central square of an image, CENTRAL_FRACTION of the shorter side, and resizes it.

    Args:
      encoded: string scalar, of a format that `decode_image` takes; grey pictures become three equal channels.
      image_size: height and width of the result.

    Returns:
      uint8 [image_size, image_size, 3]; an InvalidArgumentError at run time where the image is damaged.
    """
    return seen(encoded, STREAMED_VIEW, (image_size, image_size, 3))


def decoded(encoded: tf.Tensor, augmentation: Augmentation, image_size: int, seed: tf.Tensor) -> tf.Tensor:
    """Decodes, augments and resizes a training image.

    Args:
      encoded: string scalar, of a format that `decode_image` takes.
      augmentation: with a crop of STREAMED; "none" and "flip" crop the centre, "resized_crop_flip" a random part.
      image_size: height and width of the result.
      seed: int64 [2], see `epoch_seed`.

    Returns:
      uint8 [image_size, image_size, 3], or [2, image_size, image_size, 3] if it concatenates; an
      InvalidArgumentError at run time where the image is damaged.
    """
    # The seeds are kept apart by hand: splitting a seed costs a tenth of a decode.
    crop_seed, flip_seed, distortion_seed = (seed * [1, 4] + [0, place] for place in range(3))
    if augmentation.crop == "resized_crop_flip":
        image = _cropped(encoded, lambda shape: _random_window(shape, crop_seed), (image_size, image_size))
    else:
        image = central_crop(encoded, image_size)
    if augmentation.crop != "none":
        image = tf.image.stateless_random_flip_left_right(image, flip_seed)
    return augmentation.after_crop(image, distortion_seed)
