"""A run built from the gin configuration: data, plan, network, model, optimizer."""

import dataclasses

import gin
import tensorflow as tf

from conadv_tf import config, methods
from conadv_tf.data import pipeline
from conadv_tf.data.datasets import load
from conadv_tf.errors import ConfigError, keep_whole_number
from conadv_tf.run.divergence import DivergenceSettings
from conadv_tf.run.model_settings import ModelSettings, NetworkMaker
from conadv_tf.run.monitor import MonitorSettings
from conadv_tf.training.learning_rate import warmup_poly_decay
from conadv_tf.training.optimizers import OPTIMIZERS
from conadv_tf.training.plan import Plan, check_batch_norm_groups, check_mixing, make_plan
from conadv_tf.training.refusals import PRECISIONS
from conadv_tf.training.trainer import ConAdvModel

ALL_REDUCE_DTYPES = ("float32", "bfloat16")


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of training.

    Attributes:
      method: "vanilla", "disadv", "conadv", "noise", "sam" or "sam_stale".
      optimizer: "lars", "sgd", "adamw", "lamb" or "rmsprop".
      global_batch_size: clean images per update, over all replicas and micro-batches; a recipe must set it.
      microbatch_size: images one replica holds at a time; BN statistics are over these.
      epochs: passes over the training set.
      seed: seed of the initial weights, the order of the images, augmentation and attack, in [0, 2**20).
      precision: "float32", or "mixed_bfloat16" (float32 variables and losses).
      all_reduce_dtype: dtype of gradients on their way between replicas, "float32" or "bfloat16" (half the traffic).
      jit_compile: XLA off a TPU as well; a TPU always compiles.
      steps_per_execution: updates made without returning to Python; 0: an epoch's on a TPU, one elsewhere.
      evaluate_every_epochs: epochs between two evaluations; the last epoch always has one.
      checkpoint_every_epochs: epochs between two checkpoints; the last epoch always has one.
      checkpoint_every_steps: updates between two checkpoints within an epoch, for long epochs; 0: none. Where
        steps_per_execution updates are one call, the checkpoint comes after the call.
      accept_changed_data: whether a run goes on although the files of its data are no longer what they were, as when
        damaged ones were brought back; False refuses other data.
    """

    global_batch_size: int = 0
    method: str = "conadv"
    optimizer: str = "lars"
    microbatch_size: int = 64
    epochs: int = 90
    seed: int = 0
    precision: str = "float32"
    all_reduce_dtype: str = "float32"
    jit_compile: bool = False
    steps_per_execution: int = 0
    evaluate_every_epochs: int = 1
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int = 0
    accept_changed_data: bool = False

    def __post_init__(self):
        for name, choices in (
            ("optimizer", tuple(OPTIMIZERS)),
            ("precision", PRECISIONS),
            ("all_reduce_dtype", ALL_REDUCE_DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"train.{name}={getattr(self, name)!r} is not known: choose one of {choices}")
        for name, least in (
            ("steps_per_execution", 0),
            ("evaluate_every_epochs", 1),
            ("checkpoint_every_epochs", 1),
            ("checkpoint_every_steps", 0),
        ):
            keep_whole_number(self, "train", name, least)
        if not 0 <= self.seed < 2**20:
            raise ConfigError(f"train.seed={self.seed} is outside [0, 2**20): choose a whole number below 1,048,576")

    def evaluation_is_due(self, epoch: int) -> bool:
        """Tells whether the test images are evaluated after an epoch (from 0)."""
        return self._is_due(epoch, self.evaluate_every_epochs)

    def checkpoint_is_due(self, epoch: int) -> bool:
        """Tells whether an epoch (from 0) ends with a checkpoint."""
        return self._is_due(epoch, self.checkpoint_every_epochs)

    def _is_due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs


@dataclasses.dataclass
class Run:
    """The parts of a run, built and not yet trained.

    Attributes:
      initial_weights: where the weights are that a run begins with; None: those that `model` has.
      make_network: makes the network of the recipe anew, with other classes or branches.
    """

    recipe: str
    settings: TrainSettings
    strategy: tf.distribute.Strategy
    data: pipeline.ImageData
    plan: Plan
    model: ConAdvModel
    monitor: MonitorSettings
    divergence: DivergenceSettings
    initial_weights: str | None
    make_network: NetworkMaker


def plan_for(settings: TrainSettings, method: methods.Method, num_train: int, replicas: int) -> Plan:
    """The plan of a run on so many replicas; ConfigError where its settings do not divide over them."""
    plan = make_plan(
        settings.global_batch_size,
        settings.microbatch_size,
        replicas,
        num_train,
        settings.epochs,
        method.updates_per_batch,
    )
    if method.mixed:
        check_mixing(method.updates_per_batch, replicas, plan.microbatches)
    if method.mixture:
        method.mixture.attacked_rows(plan.rows)  # which refuses a fraction that leaves none
    return plan


def build(recipe: str, strategy: tf.distribute.Strategy, data_dir: str | None, num_replicas: int | None = None) -> Run:
    """Builds what the gin configuration describes.

    Args:
      recipe: name of the recipe.
      strategy: where the variables live.
      data_dir: folder of the data; None for data without files.
      num_replicas: to plan for; None takes the strategy's, any other number is for looking at the plan alone.

    Raises:
      ConfigError: for settings that do not fit together.
      DataError: for missing or damaged data.
    """
    settings = TrainSettings()
    if settings.checkpoint_every_steps and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError(
            f"train.checkpoint_every_steps={settings.checkpoint_every_steps} is for one process, and here are several "
            "workers: leave it at 0, and train.checkpoint_every_epochs at 1"
        )
    # Before the data, which may take minutes to look through.
    method = methods.make_method(settings.method, config.setting("autoaugment.mode") == "concat3")
    loaded = load(data_dir=data_dir)
    replicas = num_replicas or strategy.num_replicas_in_sync
    plan = plan_for(settings, method, loaded.num_train, replicas)
    if method.start_epoch >= plan.epochs:
        raise ConfigError(
            f"adversarial.start_epoch={method.start_epoch} is not within the {plan.epochs} epochs: "
            "start earlier, or use train.method='vanilla'"
        )
    with strategy.scope():
        wanted = ModelSettings()
        make_network = wanted.maker(loaded, plan, settings.seed, settings.precision)
        network = make_network(loaded.num_classes, method.branches)
        network.train_only(wanted.trainable)
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        check_batch_norm_groups(network.replicas_per_group, replicas, settings.jit_compile, on_tpu)
        model = ConAdvModel(network, method, plan.microbatches, settings.seed, settings.all_reduce_dtype)
        schedule = warmup_poly_decay(plan.steps_per_epoch, plan.total_steps)
        model.compile(
            OPTIMIZERS[settings.optimizer](schedule),
            jit_compile=settings.jit_compile,
            steps_per_execution=settings.steps_per_execution or (plan.steps_per_epoch if on_tpu else 1),
        )
    return Run(
        recipe,
        settings,
        strategy,
        loaded,
        plan,
        model,
        MonitorSettings(),
        DivergenceSettings(),
        wanted.initial_weights,
        make_network,
    )
