"""The recipe of imported images, data.gin beside their records, and the command that trains on them."""

import os
import shlex
from collections.abc import Mapping, Sequence

from conadv_tf.data.image_files import shown

FILE = "data.gin"

Sizes = Sequence[tuple[int, int]]
"""(width, height) in pixels of images."""

_LARGEST_IMAGE_SIZE = 224  # the size that ImageNet networks take
_ENOUGH = 256  # pixels of the shorter side, of which evaluation takes the central 224
_LARGE = 128  # pixels: from here on networks begin with ImageNet's stem, which divides height and width by four
_LARGEST_MEMORY = 2**30  # bytes of decoded images; more are streamed
_UPDATES = 24  # in an epoch, where the images are as many
_BATCHES, _MICROBATCH = (1024, 512, 256, 128, 64, 32, 16), 64
# (fewest training images, network); the deepest that so many images are known to train from random weights.
_SMALL_NETWORKS = ((100_000, "cifar_resnet56"), (10_000, "cifar_resnet20"), (0, "cifar_resnet8"))
_LARGE_NETWORKS = ((100_000, "resnet50"), (0, "resnet18"))
_MANY_IMAGES, _FEW_IMAGES = "batch/1k.gin", "batch/small.gin"


def settings_of(name: str, num_classes: int, sizes: Mapping[str, Sizes]) -> dict[str, object]:
    """The settings that follow from images, by their names in recipes.

    Args:
      name: the name of the data set.
      num_classes: the number of classes.
      sizes: those of all images of "train" and "validation".

    Returns:
      source, numbers, augmentation and network; the batch too, unless it is that of batch/1k.gin.
    """
    num_train, image_size = len(sizes["train"]), _image_size(sizes)
    in_memory = _fit_into_memory(sizes)
    settings: dict[str, object] = {
        "data.source": "tfrecords",
        "tfrecords.name": name,
        "tfrecords.num_train": num_train,
        "tfrecords.num_classes": num_classes,
        "tfrecords.label_offset": 0,
        "tfrecords.image_size": image_size,
        "tfrecords.in_memory": in_memory,
        "tfrecords.augmentation": "crop_flip" if in_memory else "resized_crop_flip",
        "model.name": _network(image_size, num_train),
    }
    if _base(sizes) == _FEW_IMAGES:
        batch = _batch(num_train)
        settings |= {"train.global_batch_size": batch, "train.microbatch_size": min(batch, _MICROBATCH)}
    return settings


def _shorter_side(sizes: Mapping[str, Sizes]) -> int:
    """The median of the shorter sides of training images, pixels."""
    shorter = sorted(map(min, sizes["train"]))
    return (shorter[(len(shorter) - 1) // 2] + shorter[len(shorter) // 2]) // 2


def _image_size(sizes: Mapping[str, Sizes]) -> int:
    """The height and width that training crops images to, or has them in."""
    return min(_LARGEST_IMAGE_SIZE, _shorter_side(sizes))


def _fit_into_memory(sizes: Mapping[str, Sizes]) -> bool:
    """Tells whether images may be held decoded: few small squares of one size. Others are cropped from files."""
    different = {size for images in sizes.values() for size in images}
    width, height = different.pop()
    count = sum(map(len, sizes.values()))
    return not different and width == height < _LARGE and count * width * height * 3 <= _LARGEST_MEMORY


def _network(image_size: int, num_train: int) -> str:
    networks = _LARGE_NETWORKS if image_size >= _LARGE else _SMALL_NETWORKS
    return next(name for fewest, name in networks if num_train >= fewest)


def _batch(num_train: int) -> int:
    """The largest batch with some tens of updates in an epoch; of few images the smallest, or all of them."""
    fitting = [batch for batch in _BATCHES if batch * _UPDATES <= num_train]
    return max([*fitting, min(_BATCHES[-1], num_train)])


def _base(sizes: Mapping[str, Sizes]) -> str:
    """The recipe that the settings go over: photos enough for a batch of 1,024 are a task for more than a CPU."""
    many = len(sizes["train"]) >= _BATCHES[0] * _UPDATES and _image_size(sizes) >= _LARGE
    return _MANY_IMAGES if many else _FEW_IMAGES


def suggestion(sizes: Mapping[str, Sizes]) -> str:
    """The network and the batch for images, in words."""
    num_train, image_size = len(sizes["train"]), _image_size(sizes)
    batch = _batch(num_train)  # of many photos that of batch/1k.gin
    network = _network(image_size, num_train)
    return f"{network} at {image_size} pixels, batch {batch:,}, {num_train // batch:,} updates an epoch"


def advice(sizes: Mapping[str, Sizes]) -> str:
    """A line on images so large that decoding them, which every epoch does, takes longer than it need; "" on others."""
    side = _shorter_side(sizes)
    if side < 2 * _ENOUGH:
        return ""
    return f"shorter sides of {side:,} pixels slow training down: --image_size={_ENOUGH} leaves what it looks at"


def command(folder: str, sizes: Mapping[str, Sizes]) -> str:
    """The command that trains on the images of a folder."""
    files = (_base(sizes), "method/conadv.gin", os.path.join(folder, FILE))
    words = [*("python", "train.py"), *(f"--gin_file={file}" for file in files), f"--data_dir={folder}"]
    return shlex.join(words)


def text(name: str, src: str, classes: Sequence[str], sizes: Mapping[str, Sizes], left_out: str) -> str:
    """The content of data.gin.

    Args:
      name: the name of the data set.
      src: the path that the images came from.
      classes: the names of the classes.
      sizes: those of all images of "train" and "validation".
      left_out: what was left out, in words.
    """
    train, validation = (len(sizes[split]) for split in ("train", "validation"))
    lines = [
        f"# {train:,} training and {validation:,} validation images of {len(classes):,} classes.",
        f"# Imported from {shown(src)}; {left_out} left out.",
        "#",
        f"#   {command('DIR', sizes)}",
        "#",
        "# Network and batch are suggested by the number and the size of the images: choose others freely.",
        "",
        *(f"{setting} = {value!r}" for setting, value in settings_of(name, len(classes), sizes).items()),
    ]
    return "".join(f"{line}\n" for line in lines)
