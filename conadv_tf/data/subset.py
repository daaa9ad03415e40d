"""A part of a data set in memory, for scale models of large runs: fewer images, fewer pixels, a validation split."""

import dataclasses

import gin
import numpy as np

from conadv_tf.errors import ConfigError, keep_whole_number

Splits = dict[str, tuple[np.ndarray, np.ndarray]]
_SEED = 0  # draws the images; not the run's seed, so that all seeds of a study train on the same images


@gin.configurable("subset")
@dataclasses.dataclass(frozen=True)
class Subset:
    """The part of a data set in memory that a run takes.

    Attributes:
      train_images: the number of training images to take, drawn once and for all; None: all but the validation images.
      validation_images: the number of other training images to set aside as the split "validation", on which settings
        are chosen without a look at the test images. The choice of images does not depend on `train_images`.
      downscale: the divisor of height and width; a pixel is the mean of the block it replaces, rounded.
    """

    train_images: int | None = None
    validation_images: int = 0
    downscale: int = 1

    def __post_init__(self):
        if self.train_images is not None:
            keep_whole_number(self, "subset", "train_images", 1, "; None means all")
        keep_whole_number(self, "subset", "validation_images", 0)
        keep_whole_number(self, "subset", "downscale", 1)

    @property
    def is_whole(self) -> bool:
        """Tells whether the subset is the whole data set as it is."""
        # Not by comparing with Subset(), which gin configures too.
        return (self.train_images, self.validation_images, self.downscale) == (None, 0, 1)

    def num_train(self, available: int) -> int:
        """The number of training images taken of those available.

        Raises:
          ConfigError: if there are too few.
        """
        wanted = self.train_images or available - self.validation_images
        if wanted < 1 or wanted + self.validation_images > available:
            raise ConfigError(
                f"subset.train_images={self.train_images} and subset.validation_images={self.validation_images} are "
                f"more than the {available} training images there are: take fewer"
            )
        return wanted

    def of(self, splits: Splits) -> Splits:
        """Takes the subset of "train" and "test", images uint8 [n, H, W, C] and labels int32 [n].

        Raises:
          ConfigError: if there are too few images, or their sides do not divide by `downscale`.
        """
        if self.is_whole:
            return splits
        images, labels = splits["train"]
        order = np.random.default_rng(_SEED).permutation(len(labels))
        train, validation = np.split(order, [self.num_train(len(labels))])
        validation = validation[len(validation) - self.validation_images :]
        taken = {"train": (images[train], labels[train]), "test": splits["test"]}
        if self.validation_images:
            taken["validation"] = (images[validation], labels[validation])
        return {split: (self.downscaled(images), labels) for split, (images, labels) in taken.items()}

    def downscaled(self, images: np.ndarray) -> np.ndarray:
        """Makes images uint8 [n, H, W, C] of fewer pixels."""
        count, height, width, channels = images.shape
        side = self.downscale
        if height % side or width % side:
            raise ConfigError(f"subset.downscale={side} does not divide the images' {height}x{width} pixels: choose 2")
        if side == 1:
            return images
        blocks = images.reshape(count, height // side, side, width // side, side, channels)
        return np.round(blocks.mean((2, 4), np.float32)).astype(np.uint8)
