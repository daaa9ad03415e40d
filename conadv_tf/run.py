"""A run from recipe to result: data → plan → model → fit → result.json and an exported network."""

import contextlib
import dataclasses

import gin
import numpy as np
import tensorflow as tf

from conadv_tf import (
    callbacks,
    checkpoint,
    configure,
    data_service,
    distribute,
    lock,
    methods,
    monitor,
    pipeline,
    report,
)
from conadv_tf import data as data_module
from conadv_tf.errors import ConfigError
from conadv_tf.lars import OPTIMIZERS
from conadv_tf.plan import Plan, check_batch_norm_groups, make_plan
from conadv_tf.resnet import ResNet
from conadv_tf.schedule import warmup_poly_decay
from conadv_tf.shadows import leaf_variables
from conadv_tf.trainer import ConAdvModel

PRECISIONS = ("float32", "mixed_bfloat16")
ALL_REDUCE_DTYPES = ("float32", "bfloat16")
PANEL_IMAGES = 6


@gin.configurable("train")
@dataclasses.dataclass(frozen=True)
class Settings:
    """What a recipe says about training.

    Attributes:
      method: "vanilla", "disadv" or "conadv".
      optimizer: "lars" or "sgd".
      global_batch_size: clean images per update, over all replicas and micro-batches; a recipe must set it.
      microbatch_size: images one replica holds at a time; BN statistics are over these (SPEC section 5).
      epochs: passes over the training set.
      seed: of the initial weights, the order of the images, augmentation and attack.
      precision: "float32", or "mixed_bfloat16" (float32 variables and losses).
      all_reduce_dtype: of gradients on their way between replicas, "float32" or "bfloat16" (half the traffic).
      jit_compile: XLA off a TPU as well; a TPU always compiles.
      steps_per_execution: updates made without returning to Python; 0: an epoch's on a TPU, one elsewhere.
      evaluate_every_epochs, checkpoint_every_epochs: the last epoch always is.
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
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.seed < 2**20:
            raise ConfigError(f"train.seed={self.seed} is outside [0, 2**20)")


@dataclasses.dataclass
class Run:
    """Everything a run is made of, built and not yet trained."""

    recipe: str
    settings: Settings
    strategy: tf.distribute.Strategy
    data: pipeline.ImageData
    plan: Plan
    model: ConAdvModel
    monitor: monitor.Settings


@gin.configurable("model", denylist=["data", "method", "plan", "seed", "dtype"])
def make_network(
    data: pipeline.ImageData,
    method: methods.Method,
    plan: Plan,
    seed: int,
    dtype: str,
    name: str = "digits_resnet",
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
    replicas_per_group: int = 1,
) -> ResNet:
    """The network of a recipe: `name` from resnet.ARCHITECTURES, with the branches the method trains.

    `replicas_per_group` replicas share batch statistics; 0: as few as have 64 images together (SPEC section 3).
    """
    if not 0 <= batch_norm_momentum < 1 or not batch_norm_epsilon > 0:
        raise ConfigError(
            f"model.batch_norm_momentum={batch_norm_momentum} must lie in [0, 1) and "
            f"model.batch_norm_epsilon={batch_norm_epsilon} above 0: the paper's are 0.9 and 1e-5"
        )
    return ResNet(
        name,
        data.num_classes,
        data.image_shape,
        method.branches,
        batch_norm_momentum,
        batch_norm_epsilon,
        replicas_per_group or plan.replicas_for_batch_norm(),
        seed,
        dtype,
        name="network",
    )


def build(recipe: str, strategy: tf.distribute.Strategy, data_dir: str | None, num_replicas: int | None = None) -> Run:
    """Builds what the gin configuration describes.

    Args:
      recipe: its name.
      strategy: where the variables live.
      data_dir: of the data; None for data without files.
      num_replicas: to plan for; None takes the strategy's, any other number is for looking at the plan alone.

    Raises:
      ConfigError: for settings that do not fit together.
      DataError: for missing or damaged data.
    """
    settings = Settings()
    # Before the data, which may take minutes to look through.
    method = methods.make_method(settings.method, configure.setting("data.autoaugment_mode") == "concat3")
    data = data_module.load(data_dir=data_dir)
    replicas = num_replicas or strategy.num_replicas_in_sync
    plan = make_plan(
        settings.global_batch_size,
        settings.microbatch_size,
        replicas,
        data.num_train,
        settings.epochs,
        method.updates_per_batch,
    )
    if method.start_epoch >= plan.epochs:
        raise ConfigError(
            f"adversarial.start_epoch={method.start_epoch} is not within the {plan.epochs} epochs: "
            "start earlier, or use train.method='vanilla'"
        )
    with strategy.scope():
        network = make_network(data, method, plan, settings.seed, settings.precision)
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        check_batch_norm_groups(network.replicas_per_group, replicas, settings.jit_compile, on_tpu)
        model = ConAdvModel(network, method, plan.microbatches, settings.seed, settings.all_reduce_dtype)
        schedule = warmup_poly_decay(plan.steps_per_epoch, plan.total_steps)
        model.compile(
            OPTIMIZERS[settings.optimizer](schedule),
            jit_compile=settings.jit_compile,
            steps_per_execution=settings.steps_per_execution or (plan.steps_per_epoch if on_tpu else 1),
        )
    return Run(recipe, settings, strategy, data, plan, model, monitor.Settings())


def describe(run: Run) -> str:
    """The arithmetic of the run, one fact a line, for the person who starts it."""
    plan, method, network = run.plan, run.model.method, run.model.network
    schedule = run.model.optimizer.learning_rate
    warmup = schedule.get_config().get("warmup_steps", 0)
    facts = [
        ("recipe", run.recipe),
        ("data", f"{run.data.name}: {run.data.num_train:,} training, {run.data.num_test:,} test images"),
        ("network", f"{network.architecture}, {_count(network.trainable_variables):,} parameters"),
        ("method", _method_text(method)),
        ("global batch", f"{plan.global_batch_size:,} clean images"),
        ("replicas", f"{plan.num_replicas:,} × {plan.microbatches * plan.rows:,} images{_turns_text(plan)}"),
        ("micro-batches", f"{plan.microbatches:,} × {plan.rows} images on each replica, accumulated into an update"),
        ("batch statistics", f"over {plan.rows * network.replicas_per_group} images"),
        ("updates", f"{plan.total_steps:,} = {plan.epochs} epochs × {plan.steps_per_epoch}"),
        ("warm-up", f"{warmup:,} updates to a peak learning rate of {float(schedule(warmup)):.4g}"),
        ("cost", f"{method.forward_units:g} forward passes over the images of a replica an update (vanilla: 3)"),
        ("carried memory", _carried_text(run)),
    ]
    encoded, decoded = run.data.cache_bytes
    if encoded:
        cached = f"{encoded / 1e9:.3g} GB of records and {decoded / 1e9:.3g} GB of test images, over all hosts"
        facts.append(("cache", cached))
    note = plan.remainder_note()
    facts += [("remainder", note)] if note else []
    return "\n".join(f"  {name:<18}{text}" for name, text in facts)


def train(run: Run, model_dir: str) -> dict:
    """Trains a run to its end in `model_dir`, resuming what is there; returns the result.

    Raises:
      ConfigError: if the folder holds another run.
      RunError: if the folder cannot be used or is in use, or the loss stops being finite.
      DataError: if the data turn out damaged beyond the limit.
    """
    folder = report.RunFolder(model_dir, writes=distribute.is_chief(run.strategy))
    with lock.held(model_dir) if folder.writes else contextlib.nullcontext():
        return _train_in(run, folder)


def _train_in(run: Run, folder: report.RunFolder) -> dict:
    _check_same_run(folder)
    finished = folder.read_result()
    if finished:
        print(f"{folder.path} holds this run, finished; nothing to train")
        return finished
    checkpoints = checkpoint.Checkpoints(run.model, folder.file("checkpoints"))
    first_epoch = checkpoints.restore() // run.plan.steps_per_epoch
    folder.write_config(configure.operative_config())
    if first_epoch:
        print(f"resuming {folder.path} after epoch {first_epoch}")
    _fit(run, folder, checkpoints, first_epoch)
    result = _result(run, folder)
    if folder.writes:
        checkpoint.export(run.model.network, folder.file("export"))
    folder.write_result(result)
    if run.data.bad_records.count:
        print(run.data.bad_records.report())
    return result


def _fit(run: Run, folder: report.RunFolder, checkpoints: checkpoint.Checkpoints, first_epoch: int) -> None:
    plan, settings = run.plan, run.settings
    throughput = callbacks.Throughput(plan)
    watchers = [
        callbacks.ProgressBar(plan, run.recipe, throughput, first_epoch),
        callbacks.TensorBoard(folder, plan, run.data.examples("train", PANEL_IMAGES)),
    ]
    training = [
        throughput,
        callbacks.StopIfNotFinite(),
        callbacks.Evaluation(lambda: evaluate(run, "test"), settings.evaluate_every_epochs, plan.epochs),
        _theory_monitor(run, folder, first_epoch),
        *(watchers if folder.writes else []),
        callbacks.Recorder(plan, folder, checkpoints, settings.checkpoint_every_epochs, first_epoch),
    ]
    with data_service.watched(run.data.services):
        run.model.fit(
            _train_batches(run, first_epoch),
            epochs=plan.epochs,
            initial_epoch=first_epoch,
            steps_per_epoch=plan.steps_per_epoch,
            verbose=0,
            callbacks=training,
        )


def _theory_monitor(run: Run, folder: report.RunFolder, first_epoch: int) -> monitor.TheoryMonitor:
    # Data that are streamed are read for it: not for a method that has no stale weights.
    examples = run.data.examples("train", run.monitor.images) if run.model.method.tau else None
    return monitor.TheoryMonitor(run.monitor, run.plan.epochs, examples, folder.read_metrics()[:first_epoch])


def _train_batches(run: Run, first_epoch: int):
    plan, method = run.plan, run.model.method
    update, begin = first_epoch * plan.steps_per_epoch, method.start_epoch * plan.steps_per_epoch
    if update > begin:
        run.model.resume_at(update - begin)
    batches = min(update, begin) + method.batches_before(max(update - begin, 0)) * method.updates_per_batch
    start = batches * plan.global_batch_size

    def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        return run.data.train_batches(
            plan.rows,
            plan.num_replicas,
            start_position=start,
            seed=run.settings.seed,
            num_hosts=context.num_input_pipelines,
            host=context.input_pipeline_id,
        )

    return run.strategy.distribute_datasets_from_function(dataset)


def evaluate(run: Run, split: str) -> dict[str, float]:
    """loss, top1 and top5 (shares in [0, 1]) over exactly every image of a split, not augmented."""
    rows, replicas = run.plan.rows, run.plan.num_replicas
    hosts: list[int] = []

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        hosts.append(context.num_input_pipelines)
        return run.data.evaluation_batches(split, rows, replicas, hosts[0], context.input_pipeline_id)

    distributed = run.strategy.distribute_datasets_from_function(batches)
    steps = run.data.evaluation_steps(split, rows, replicas, hosts[0])
    return run.model.evaluate(distributed, steps=steps, verbose=0, return_dict=True)


def facts(run: Run) -> dict:
    """What result.json says of a run that is known before it is trained."""
    plan, method = run.plan, run.model.method
    return {
        "recipe": run.recipe,
        "method": method.name,
        "schedule": method.schedule,
        "tau": method.tau,
        "epsilon": method.attack.epsilon_pixels if method.attack else None,
        "dataset": run.data.name,
        "model": run.model.network.architecture,
        "seed": run.settings.seed,
        "global_batch_size": plan.global_batch_size,
        "num_replicas": plan.num_replicas,
        "microbatches": plan.microbatches,
        "epochs": plan.epochs,
        "steps": plan.total_steps,
    }


def _result(run: Run, folder: report.RunFolder) -> dict:
    return {
        **facts(run),
        **report.evaluation_result({split: evaluate(run, split) for split in run.data.sizes}),
        **report.speed_result(folder.read_metrics()),
        "theory": report.theory_result(folder.read_metrics()),
        "versions": report.versions(),
    }


def _check_same_run(folder: report.RunFolder) -> None:
    saved = folder.read_config()
    changed = saved and configure.difference(saved, configure.operative_config())
    if changed:
        name, old, new = changed
        raise ConfigError(
            f"--model_dir={folder.path} holds a run with {name} = {old}, this one has {new}: pass another --model_dir, "
            "or the old value"
        )


def _method_text(method: methods.Method) -> str:
    if method.attack is None:
        return method.name
    schedule = f", schedule {method.schedule}, tau {method.tau}" if method.schedule else ""
    return f"{method.name}{schedule}, epsilon {method.attack.epsilon_pixels:g} {method.attack.units}"


def _turns_text(plan: Plan) -> str:
    return f", which last for {plan.updates_per_batch} updates" if plan.updates_per_batch > 1 else ""


def _carried_text(run: Run) -> str:
    """What one update leaves to the next on each replica, beside weights and optimizer."""
    model, plan = run.model, run.plan
    text = f"{sum(4e-6 * _count(leaf_variables(shadow)) for shadow in model.shadows):.3g} MB of old weights"
    if model.method.carried:
        specs = model.method.carried(tf.TensorSpec((plan.rows, *run.data.train_shape), tf.uint8)).values()
        carried = plan.microbatches * sum(spec.dtype.size * int(np.prod(spec.shape)) for spec in specs)
        text += f" and {1e-6 * carried:.3g} MB of images"
    return f"{text} on each replica"


def _count(variables: list[tf.Variable]) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)
