"""The settings of a recipe's network."""

import dataclasses
from collections.abc import Callable, Sequence

import gin

from conadv_tf import paths
from conadv_tf.data import pipeline
from conadv_tf.errors import ConfigError
from conadv_tf.models import applications
from conadv_tf.models.network import Network
from conadv_tf.models.resnet import ResNet
from conadv_tf.training.plan import Plan

# (number of classes, branches) → the network.
NetworkMaker = Callable[[int, Sequence[str]], Network]


@gin.configurable("model")
@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The network of a recipe, and the weights that it starts from.

    Attributes:
      name: the architecture, "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"; "cifar_resnet" with 8,
        14, 20, 32, 44, 56 or 110 behind it; "digits_resnet". Or a classifier of tf_keras.applications, such as
        "EfficientNetB0", with batch norm of its own settings, to which the next ones do not apply.
      batch_norm_momentum: the momentum of the moving averages, in [0, 1).
      batch_norm_epsilon: what is added to a variance, > 0.
      replicas_per_group: the number of replicas that share batch statistics; 0: as few as have 64 images together.
      width: the factor of the channels of every stage, a whole number of at least 1.
      initial_weights: the path of the weights that a run starts from, local or gs://: the folder of a run, a
        checkpoint, an export, or a weights file of Keras (docs/running.md). None: random ones.
      trainable: the part of the network that is trained: "all"; "classifier", the last layer; or "from NAME", all from
        the first layer on whose name begins with NAME, such as "from stage3". The rest stays as it starts.
    """

    name: str = "digits_resnet"
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    replicas_per_group: int = 1
    width: int = 1
    initial_weights: str | None = None
    trainable: str = "all"

    def __post_init__(self):
        if not 0 <= self.batch_norm_momentum < 1 or not self.batch_norm_epsilon > 0:
            raise ConfigError(
                f"model.batch_norm_momentum={self.batch_norm_momentum} must lie in [0, 1) and "
                f"model.batch_norm_epsilon={self.batch_norm_epsilon} above 0: the paper's are 0.9 and 1e-5"
            )
        if self.trainable != "all" and not self.initial_weights:
            raise ConfigError(
                f"model.trainable={self.trainable!r} freezes random weights: give model.initial_weights, the path of "
                "trained ones, or leave it at 'all'"
            )
        if self.initial_weights:
            object.__setattr__(self, "initial_weights", paths.given(self.initial_weights))
        if self.name in applications.names():
            self._check_application()

    def _check_application(self) -> None:
        for setting in ("batch_norm_momentum", "batch_norm_epsilon", "replicas_per_group", "width"):
            value, own = getattr(self, setting), getattr(ModelSettings, setting)
            if value != own:
                raise ConfigError(
                    f"model.{setting}={value} is for this package's networks, {self.name} has its own: leave it at "
                    f"{own}"
                )

    def maker(self, data: pipeline.ImageData, plan: Plan, seed: int, dtype: str) -> NetworkMaker:
        """What makes the network.

        Args:
          data: the data set, for the shape of an image.
          plan: the plan, for the replicas that have 64 images together.
          seed: the seed of the initial weights.
          dtype: the dtype policy of the layers.
        """

        def make(num_classes: int, branches: Sequence[str]) -> Network:
            if self.name in applications.names():
                return applications.application(self.name, num_classes, data.image_shape, branches, seed, dtype)
            return ResNet(
                self.name,
                num_classes,
                data.image_shape,
                branches,
                self.batch_norm_momentum,
                self.batch_norm_epsilon,
                self.replicas_per_group or plan.replicas_for_batch_norm(),
                seed,
                dtype,
                self.width,
                name="network",
            )

        return make
