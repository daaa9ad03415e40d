"""Residual networks with split batch normalisation: ImageNet, CIFAR and a tiny one for digits.

ResNet-50 is v1.5 (the stride sits in the 3×3 convolution) as in MLPerf and tf-models, with 25,557,032
parameters and one branch of batch norm (docs/method.md). Networks take images in [0, 255] and normalise them inside,
so that an attack can work in pixel levels.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError, whole_number
from conadv_tf.models import moved, stem_convolution
from conadv_tf.models.conv_batchnorm import ConvBatchNorm, PooledConvBatchNorm
from conadv_tf.models.network import Network
from conadv_tf.models.split_batchnorm import MAIN, SplitBatchNormalization, Turn

# Channel means and standard deviations on the 0..1 scale.
IMAGENET_MEAN, IMAGENET_STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STDDEV = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
GREY_MEAN, GREY_STDDEV = (0.3,), (0.38,)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The features that distinguish one network of the family from another.

    Attributes:
      blocks: residual blocks in each stage.
      widths: channels of each stage (a bottleneck block ends in four times as many).
      bottleneck: 1×1, 3×3, 1×1 blocks instead of two 3×3.
      large_stem: 7×7 stride 2 and max-pooling (224×224 images) instead of 3×3 stride 1.
      mean, stddev: the channels' mean and standard deviation on the 0..1 scale.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool
    large_stem: bool
    mean: tuple[float, ...]
    stddev: tuple[float, ...]

    def widened(self, factor: int) -> "Architecture":
        """The architecture with `factor` times as many channels. Raises ConfigError unless that is a whole number."""
        factor = whole_number("model.width", factor, 1, ": 1 is the published network")
        return dataclasses.replace(self, widths=tuple(factor * width for width in self.widths))


def _imagenet(blocks: tuple[int, ...], bottleneck: bool) -> Architecture:
    return Architecture(blocks, (64, 128, 256, 512), bottleneck, True, IMAGENET_MEAN, IMAGENET_STDDEV)


def _cifar(depth: int) -> Architecture:
    return Architecture((((depth - 2) // 6),) * 3, (16, 32, 64), False, False, CIFAR_MEAN, CIFAR_STDDEV)


ARCHITECTURES = {
    "resnet18": _imagenet((2, 2, 2, 2), False),
    "resnet34": _imagenet((3, 4, 6, 3), False),
    "resnet50": _imagenet((3, 4, 6, 3), True),
    "resnet101": _imagenet((3, 4, 23, 3), True),
    "resnet152": _imagenet((3, 8, 36, 3), True),
    **{f"cifar_resnet{depth}": _cifar(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "digits_resnet": Architecture((1, 1), (16, 32), False, False, GREY_MEAN, GREY_STDDEV),
}


class ResidualBlock(tf_keras.layers.Layer):
    """Two 3×3 convolutions or a bottleneck of three; the last γ starts at 0, so the block starts as identity."""

    def __init__(
        self,
        filters: int,
        strides: int,
        bottleneck: bool,
        project: bool,
        seeds: Iterator[int],
        norm: dict,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)

        def conv(name: str, width: int, kernel_size: int, strides: int = 1, last: bool = False) -> ConvBatchNorm:
            settings = {**norm, "gamma_initializer": "zeros"} if last else norm
            relu = not last and name != "shortcut"
            return ConvBatchNorm(
                width, kernel_size, strides, next(seeds), settings, relu, dtype=kwargs.get("dtype"), name=name
            )

        outputs = 4 * filters if bottleneck else filters
        self.shortcut = conv("shortcut", outputs, 1, strides) if project else None
        if bottleneck:
            self.convs = [
                conv("conv1", filters, 1),
                conv("conv2", filters, 3, strides),
                conv("conv3", outputs, 1, last=True),
            ]
        else:
            self.convs = [conv("conv1", filters, 3, strides), conv("conv2", outputs, 3, last=True)]

    @property
    def all_convs(self) -> list[ConvBatchNorm]:
        """The convolutions of the block, and that of the shortcut where there is one."""
        return self.convs + ([] if self.shortcut is None else [self.shortcut])

    def call(self, inputs: tf.Tensor, norm_call: dict) -> tf.Tensor:
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs, norm_call)
        outputs = inputs
        for conv in self.convs:
            outputs = conv(outputs, norm_call)
        return tf.nn.relu(outputs + shortcut)


class Classifier(tf_keras.layers.Dense):
    """A dense layer in the dtype of its inputs, [rows, features] → [rows, classes]."""

    def __init__(self, classes: int, seed: int, **kwargs):
        initializer = tf_keras.initializers.RandomNormal(stddev=0.01, seed=seed)
        super().__init__(classes, kernel_initializer=initializer, autocast=False, **kwargs)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        outputs = tf.matmul(inputs, tf.cast(moved.read(self.kernel), inputs.dtype))
        return tf.nn.bias_add(outputs, tf.cast(moved.read(self.bias), inputs.dtype))


class ResNet(Network):
    """A residual network of ARCHITECTURES.

    Args:
      architecture: a name from ARCHITECTURES.
      num_classes: width of the logits.
      image_shape: (H, W, C).
      branches: names of the BN branches.
      batch_norm_momentum, batch_norm_epsilon: momentum and epsilon of every BN layer.
      replicas_per_group: see SplitBatchNormalization.
      seed: seed of the initial weights.
      width: factor of the channels of every stage, a whole number of at least 1.
      frozen: names of `parts` that are not trained.
      dtype: Keras dtype policy; "mixed_bfloat16" computes in bfloat16 with float32 variables and logits.
    """

    activation_dtypes = (None, "float32", "bfloat16")
    can_move = True

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        image_shape: Sequence[int],
        branches: Sequence[str] = (MAIN,),
        batch_norm_momentum: float = 0.9,
        batch_norm_epsilon: float = 1e-5,
        replicas_per_group: int = 1,
        seed: int = 0,
        dtype: str = "float32",
        width: int = 1,
        frozen: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(dtype=dtype, **kwargs)
        self.architecture = architecture
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        self.branches = tuple(branches)
        self.batch_norm_momentum = batch_norm_momentum
        self.batch_norm_epsilon = batch_norm_epsilon
        self.replicas_per_group = replicas_per_group
        self.seed = seed
        self.width = width
        self._precision = dtype
        self._spec = find_architecture(architecture, self.image_shape).widened(width)
        norm = {
            "branches": self.branches,
            "momentum": batch_norm_momentum,
            "epsilon": batch_norm_epsilon,
            "replicas_per_group": replicas_per_group,
        }
        # A seed for each layer: the initial weights depend on `seed` alone, not on what else the process drew.
        seeds = itertools.count(1000 * seed)
        kernel_size, strides = (7, 2) if self._spec.large_stem else (3, 1)
        blocks = self._spec.large_stem and all(side % stem_convolution.BLOCK == 0 for side in self.image_shape[:2])
        unit = PooledConvBatchNorm if self._spec.large_stem else ConvBatchNorm
        self.stem = unit(
            self._spec.widths[0],
            kernel_size,
            strides,
            next(seeds),
            norm,
            convolution=stem_convolution.StemConvolution if blocks else tf_keras.layers.Conv2D,
            dtype=dtype,
            name="stem",
        )
        self.blocks = list(self._residual_blocks(seeds, norm, dtype))
        self.classifier = Classifier(num_classes, next(seeds), dtype=self.variable_dtype, name="classifier")
        for part in self.parts():
            part.trainable = part.name not in frozen
        self.settle()

    def _residual_blocks(self, seeds: Iterator[int], norm: dict, dtype: str) -> Iterator[ResidualBlock]:
        spec = self._spec
        expansion = 4 if spec.bottleneck else 1
        channels = spec.widths[0]
        for stage, (width, count) in enumerate(zip(spec.widths, spec.blocks, strict=True)):
            for index in range(count):
                strides = 2 if stage > 0 and index == 0 else 1
                project = strides > 1 or channels != width * expansion
                name = f"stage{stage + 1}_block{index + 1}"
                yield ResidualBlock(width, strides, spec.bottleneck, project, seeds, norm, dtype=dtype, name=name)
                channels = width * expansion

    def call(
        self,
        images: tf.Tensor,
        training: bool = False,
        branch: str | Turn = MAIN,
        mode: str | None = None,
        update_statistics: bool | tf.Tensor | None = None,
        synchronize: bool = True,
        activation_dtype: str | None = None,
    ) -> tf.Tensor:
        """Logits; see Network.call.

        An evaluation, which is a call with neither `training` nor `mode`, makes float32 logits of the features with
        float32 kernels: bfloat16 would make ties.
        """
        norm_call = {
            "branch": branch,
            "mode": mode or ("batch" if training else "moving"),
            "update_statistics": training if update_statistics is None else update_statistics,
            "synchronize": synchronize,
        }
        features = self.stem(self._normalized(images, activation_dtype or self.compute_dtype), norm_call)
        for block in self.blocks:
            features = block(features, norm_call)
        return self._logits(features, evaluates=not training and mode is None)

    def _logits(self, features: tf.Tensor, evaluates: bool) -> tf.Tensor:
        if evaluates:
            features = tf.cast(features, tf.float32)
        pooled = tf.reduce_mean(features, [1, 2])
        return tf.cast(self.classifier(tf.cast(pooled, tf.float32 if evaluates else self.compute_dtype)), tf.float32)

    def _normalized(self, images: tf.Tensor, dtype: str) -> tf.Tensor:
        mean = tf.constant(self._spec.mean) * 255.0
        stddev = tf.constant(self._spec.stddev) * 255.0
        return tf.cast((tf.cast(images, tf.float32) - mean) / stddev, dtype)

    def parts(self) -> list[tf_keras.layers.Layer]:
        return [self.stem, *self.blocks, self.classifier]

    def all_norms(self) -> list[SplitBatchNormalization]:
        # Not by way of `submodules`, which goes through all there is in the network and takes a tenth of a second.
        convs = [self.stem, *(conv for block in self.blocks for conv in block.all_convs)]
        return [conv.norm for conv in convs]

    def get_config(self) -> dict:
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "image_shape": self.image_shape,
            "branches": self.branches,
            "batch_norm_momentum": self.batch_norm_momentum,
            "batch_norm_epsilon": self.batch_norm_epsilon,
            "replicas_per_group": self.replicas_per_group,
            "seed": self.seed,
            "width": self.width,
            "frozen": [part.name for part in self.parts() if not part.trainable],
            "dtype": self._precision,
            "name": self.name,
        }


def find_architecture(name: str, image_shape: tuple[int, ...]) -> Architecture:
    """The architecture called `name`.

    Raises:
      ConfigError: if there is none, or images of `image_shape` (H, W, C) have the wrong channels for it.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"model.name={name!r} is not a network here: choose one of {', '.join(ARCHITECTURES)}, "
            "or a classifier of tf_keras.applications, such as EfficientNetB0"
        )
    spec = ARCHITECTURES[name]
    if image_shape[-1] != len(spec.mean):
        raise ConfigError(
            f"model.name={name!r} takes images with {len(spec.mean)} channels, the data has {image_shape[-1]}: "
            "choose another network or data set"
        )
    return spec
