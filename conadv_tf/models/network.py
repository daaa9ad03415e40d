"""What training asks of a network: images in [0, 255] to logits, branches of batch norm, variables in a fixed order.

`ResNet` and what `split` makes of a Keras model are Networks. Attack, schedules, update, shadow copies, checkpoints,
metrics, export and preflight know nothing else of them.
"""

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import tensorflow as tf
import tf_keras

from conadv_tf.errors import ConfigError
from conadv_tf.models.split_batchnorm import MAIN, SplitBatchNormalization, Turn

Self = TypeVar("Self", bound="Network")


class Network(tf_keras.Model):
    """Maps images [rows, H, W, C] in [0, 255], any numeric dtype, to float32 logits [rows, num_classes].

    A subclass has the attributes below, `call` with these arguments, `parts`, `all_norms`, and a `get_config` of which
    `from_config` makes the same network with fresh weights, the same of it frozen. The rest follows from them.

    Attributes:
      architecture: the name that reports give the network.
      num_classes: width of the logits.
      image_shape: (H, W, C).
      branches: names of the branches of batch norm, "main" among them.
      replicas_per_group: replicas that share batch statistics; 1 keeps them local.
      can_move: whether all layers read what they train by `moved.read`, as sharpness-aware minimisation needs it.
      activation_dtypes: what `call` takes for `activation_dtype`.
    """

    architecture: str
    num_classes: int
    image_shape: tuple[int, ...]
    branches: tuple[str, ...]
    replicas_per_group: int = 1
    can_move: bool = False
    activation_dtypes: tuple[str | None, ...] = (None,)

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
        """Logits. `training` alone means what it means in Keras; `mode` and `update_statistics` override it.

        See SplitBatchNormalization.call for `branch`, `mode`, `update_statistics` and `synchronize`; where the mode is
        "batch", all layers do what they do in training. `activation_dtype`: what features are computed in; None is
        that of the policy.
        """
        raise NotImplementedError

    def parts(self) -> list[tf_keras.layers.Layer]:
        """The layers that have weights, from the images to the logits; each is trained whole, or not at all."""
        raise NotImplementedError

    def all_norms(self) -> list[SplitBatchNormalization]:
        """The layers of batch norm that learn statistics of batches unless they are frozen, in a fixed order."""
        raise NotImplementedError

    def norms(self) -> list[SplitBatchNormalization]:
        """Those of `all_norms` that are not frozen."""
        return [norm for norm in self.all_norms() if not norm.frozen]

    def train_only(self, selection: str) -> None:
        """Freezes the parts before a selection of them, and trains the others.

        A frozen part has no gradient, no decay and no trust ratio, and its batch norm normalises with the moving
        statistics, which stay.

        Args:
          selection: "all"; "classifier", the last of `parts`; or "from NAME", all from the first on whose name begins
            with NAME.

        Raises:
          ConfigError: for another selection.
        """
        parts = self.parts()
        first = _first_trained(selection, [part.name for part in parts])
        for index, part in enumerate(parts):
            part.trainable = index >= first
        self.settle()

    def trained(self) -> frozenset:
        """References to the variables that are trained."""
        return frozenset(variable.ref() for variable in self.trainable_variables)

    def settle(self) -> None:
        """Makes batch norm follow what is trained, after `trainable` of layers was set."""
        for norm in self.all_norms():
            norm.frozen = not norm.trainable

    def create_variables(self: Self) -> Self:
        """Creates the variables of every branch and returns self."""
        self(tf.zeros((1, *self.image_shape)), training=False)
        return self

    def named_variables(self) -> dict[str, tf.Variable]:
        """All variables by their place in the network, such as "stem/conv/kernel".

        The order does not depend on which of them are trainable; a branch's have its name in theirs.
        """
        leaves = [m for m in self.submodules if isinstance(m, tf_keras.layers.Layer) and not any(m.submodules)]
        own = {layer.name for layer in self.layers}
        return {_path_below(variable, own): variable for leaf in leaves for variable in leaf.weights}

    def leaf_variables(self) -> list[tf.Variable]:
        """All variables, in the order of `named_variables`."""
        return list(self.named_variables().values())

    def moving_statistics(self, branches: Sequence[str]) -> list[tf.Variable]:
        """The moving means and variances of `branches`, float32 [channels] each."""
        return [
            variable
            for norm in self.norms()
            for branch in branches
            for variable in (norm.moving_means[branch], norm.moving_variances[branch])
        ]

    def moving_momenta(self, branches: Sequence[str]) -> list[float]:
        """The momentum of each of `moving_statistics`."""
        return [norm.momentum for norm in self.norms() for _ in range(2 * len(branches))]

    def penalty(self) -> tf.Tensor | None:
        """What the network's own regularizers add to the loss of an update, float32 scalar; None: nothing."""
        return None

    def twin(self: Self, **settings: Any) -> Self:
        """A network of the same weights in variables of its own.

        Args:
          settings: what differs: `name`, `branches`, `replicas_per_group` or `dtype` of its config. A branch that this
            network lacks begins as "main".
        """
        twin = type(self).from_config({**self.get_config(), **settings}).create_variables()
        values = self.named_variables()
        for path, variable in twin.named_variables().items():
            variable.assign(values[path if path in values else _main_path(path, twin.branches)].numpy())
        return twin


def _first_trained(selection: str, names: Sequence[str]) -> int:
    if selection in ("all", "classifier"):
        return 0 if selection == "all" else len(names) - 1
    keyword, _, start = selection.partition(" ")
    found = [index for index, name in enumerate(names) if name.startswith(start)]
    if keyword != "from" or not start or not found:
        near = difflib.get_close_matches(start or selection, names, cutoff=0.4) or [names[0], names[len(names) // 2]]
        raise ConfigError(
            f"model.trainable={selection!r} (in Python train_only): choose 'all', 'classifier', or 'from NAME' of one "
            f"of the {len(names)} layers with weights, such as {', '.join(near)}"
        )
    return found[0]


def _main_path(path: str, branches: Sequence[str]) -> str:
    """The path of the variable of the main branch that stands in the place of another branch's."""
    *place, branch, name = path.split("/")
    return "/".join([*place, MAIN, name]) if branch in branches else path


def _path_below(variable: tf.Variable, layers: set[str]) -> str:
    """The name of a variable from that of one of the network's `layers` on: Keras' loading puts no network's before."""
    parts = variable.name.split(":")[0].split("/")
    return "/".join(parts[next(index for index, part in enumerate(parts) if part in layers) :])
