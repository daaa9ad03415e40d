"""A run from recipe to result: data → plan → model → fit → result.json and an exported network."""

import contextlib
import dataclasses
from collections.abc import Sequence

import gin
import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf import (
    callbacks,
    checkpoint,
    configure,
    data_service,
    distribute,
    divergence,
    lock,
    methods,
    monitor,
    pipeline,
    preemption,
    report,
    resuming,
    terminal,
)
from conadv_tf import data as data_module
from conadv_tf.errors import ConfigError
from conadv_tf.lars import OPTIMIZERS
from conadv_tf.plan import Plan, check_batch_norm_groups, make_plan
from conadv_tf.resnet import ResNet
from conadv_tf.schedule import peak_of, warmup_poly_decay
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
      checkpoint_every_steps: updates between checkpoints within an epoch, for long ones; 0: none. Where
        steps_per_execution updates are one call, after the call.
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
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.seed < 2**20:
            raise ConfigError(f"train.seed={self.seed} is outside [0, 2**20)")

    def evaluation_is_due(self, epoch: int) -> bool:
        """Whether the test images are evaluated after an epoch (from 0)."""
        return self._is_due(epoch, self.evaluate_every_epochs)

    def checkpoint_is_due(self, epoch: int) -> bool:
        """Whether an epoch (from 0) ends with a checkpoint."""
        return self._is_due(epoch, self.checkpoint_every_epochs)

    def _is_due(self, epoch: int, every: int) -> bool:
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs


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
    divergence: divergence.Settings


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
    if settings.checkpoint_every_steps and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ConfigError(
            f"train.checkpoint_every_steps={settings.checkpoint_every_steps} is for one process, and here are several "
            "workers: leave it at 0, and train.checkpoint_every_epochs at 1"
        )
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
    return Run(recipe, settings, strategy, data, plan, model, monitor.Settings(), divergence.Settings())


def train(run: Run, model_dir: str) -> dict:
    """Trains a run to its end in `model_dir`, resuming what is there; returns the result.

    Raises:
      ConfigError: if the folder holds another run.
      RunError: if the folder cannot be used or is in use, or an update is not finite (divergence.py).
      Preempted, KeyboardInterrupt: after SIGTERM, SIGINT; the run is kept up to the update they came in.
      DataError: if the data turn out damaged beyond the limit.
    """
    folder = report.RunFolder(model_dir, writes=distribute.is_chief(run.strategy))
    layout = resuming.layout(run.plan, run.model.network)
    resuming.check(folder, layout)
    finished = folder.read_result()
    if finished:
        terminal.say(f"{folder.path} holds this run, finished; nothing to train")
        return finished
    folder.make()
    with lock.held(model_dir) if folder.writes else contextlib.nullcontext():
        return _train_in(run, folder, layout)


def _train_in(run: Run, folder: report.RunFolder, layout: resuming.Layout) -> dict:
    checkpoints = checkpoint.Checkpoints(run.model, folder.file("checkpoints"))
    update = checkpoints.restore()
    folder.write_config(configure.operative_config())
    if update:
        terminal.say(resuming.announcement(folder, update, run.plan.steps_per_epoch, layout))
    elif run.divergence.retries and folder.writes:
        checkpoints.save()  # what to go back to from the first epoch
    folder.write_layout(layout)
    _fit_to_the_end(run, folder, checkpoints, update)
    result = _result(run, folder)
    if folder.writes:
        checkpoint.export(run.model.network, folder.file("export"))
    folder.write_result(result)
    if run.data.bad_records.count:
        terminal.say(run.data.bad_records.report())
    return result


def _fit_to_the_end(run: Run, folder: report.RunFolder, checkpoints: checkpoint.Checkpoints, update: int) -> None:
    """`_fit`, and where it diverges again from the last checkpoint with a lower peak, as often as divergence.retries.

    What it has gone back from is kept in the folder, and counts when the run is started again.
    """
    divergences = folder.read_divergences()
    if divergences:
        peak = divergences[-1]["peak_learning_rate"]
        terminal.say(f"going on with a peak learning rate of {peak:.4g}, as the run has diverged before")
        _lower_peak(run, peak)
    # Held across retries: a request that comes while the run diverges is still there when it has gone back.
    with preemption.noticed(can_save=_is_alone(run)) as request:
        while True:
            try:
                _fit(run, folder, checkpoints, update, request)
                return request.end_if_told(checkpoints.last)  # it may have come after the last update
            except divergence.Diverged as error:
                if len(divergences) >= run.divergence.retries:
                    raise error.after(len(divergences)) from None
                diverged = error
            update = checkpoints.restore()
            divergences.append(_gone_back(run, diverged, update))
            folder.write_divergences(divergences)


def _gone_back(run: Run, diverged: divergence.Diverged, update: int) -> dict:
    """Lowers the peak of a run whose weights are those at `update` again; returns what is to be kept of that."""
    _, last_peak = peak_of(run.model.optimizer.learning_rate)
    peak = float(f"{run.divergence.peak_factor * last_peak:.6g}")
    logging.warning("%s: going back to update %d with a peak learning rate of %.4g", diverged.text, update, peak)
    _lower_peak(run, peak)
    return {**diverged.facts, "went_back_to": update, "peak_learning_rate": peak}


def _lower_peak(run: Run, peak: float) -> None:
    run.model.optimizer.learning_rate = warmup_poly_decay(run.plan.steps_per_epoch, run.plan.total_steps, peak)
    run.model.restart()


def _is_alone(run: Run) -> bool:
    """One of several workers cannot end, or save sums over replicas, without the others."""
    return not isinstance(run.strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _fit(
    run: Run, folder: report.RunFolder, checkpoints: checkpoint.Checkpoints, update: int, request: preemption.Request
) -> None:
    """Trains from `update` on, saved also when the process is told to end; the weights are those at `update`."""
    with data_service.watched(run.data.services):
        if _is_alone(run):
            _evaluate_last(run, folder, update, request)
        request.end_if_told(checkpoints.last)
        called = _callbacks(run, folder, checkpoints, update, request)
        try:
            run.model.fit(
                _train_batches(run, update),
                epochs=run.plan.epochs,
                initial_epoch=update // run.plan.steps_per_epoch,
                steps_per_epoch=run.plan.steps_per_epoch,
                verbose=0,
                callbacks=called,
            )
        finally:
            for bar in called:
                if isinstance(bar, callbacks.ProgressBar):
                    bar.close()


def _callbacks(
    run: Run,
    folder: report.RunFolder,
    checkpoints: checkpoint.Checkpoints,
    update: int,
    request: preemption.Request,
) -> list:
    plan, settings = run.plan, run.settings
    epoch, within = divmod(update, plan.steps_per_epoch)
    so_far = checkpoints.epoch_so_far
    throughput = callbacks.Throughput(plan, so_far.seconds if so_far else 0.0)
    watchers: list = []
    if folder.writes:
        panel = run.data.examples("train", PANEL_IMAGES)
        watchers = [
            callbacks.ProgressBar(plan, run.recipe, throughput, update),
            callbacks.TensorBoard(folder, plan, panel),
        ]
    saves = settings.checkpoint_is_due, settings.checkpoint_every_steps
    return [
        *([callbacks.GoOn(within, so_far)] if so_far else []),
        throughput,
        divergence.StopIfDiverged(within_epochs=_is_alone(run)),
        callbacks.Evaluation(lambda: _test_results(run, request), settings.evaluation_is_due),
        _theory_monitor(run, folder, epoch),
        *watchers,
        callbacks.Recorder(plan, folder, checkpoints, throughput, *saves, epoch, request),
    ]


def _test_results(run: Run, request: preemption.Request) -> dict[str, float]:
    """`evaluate` on the test images; nothing if the process is told to end meanwhile."""
    try:
        return evaluate(run, "test", [callbacks.EndEarly(request)])
    except callbacks.EndEarly.Cut:
        return {}


def _evaluate_last(run: Run, folder: report.RunFolder, update: int, request: preemption.Request) -> None:
    """Adds the test results to the line of the epoch that ends at `update`, if its process had no time for them."""
    epochs = folder.read_metrics()[: update // run.plan.steps_per_epoch]
    due = epochs and run.settings.evaluation_is_due(len(epochs) - 1) and "test_top1" not in epochs[-1]
    if due and update % run.plan.steps_per_epoch == 0:
        results = _test_results(run, request)
        epochs[-1] |= {f"test_{name}": callbacks.recorded(value) for name, value in results.items()}
        folder.write_metrics(epochs)


def _theory_monitor(run: Run, folder: report.RunFolder, first_epoch: int) -> monitor.TheoryMonitor:
    # Data that are streamed are read for it: not for a method that has no stale weights.
    examples = run.data.examples("train", run.monitor.images) if run.model.method.tau else None
    return monitor.TheoryMonitor(run.monitor, run.plan.epochs, examples, folder.read_metrics()[:first_epoch])


def _train_batches(run: Run, update: int):
    """The data from the first image on that training from `update` on needs."""
    plan, method = run.plan, run.model.method
    begin = method.start_epoch * plan.steps_per_epoch
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


def evaluate(run: Run, split: str, watchers: Sequence[tf_keras.callbacks.Callback] = ()) -> dict[str, float]:
    """loss, top1 and top5 (shares in [0, 1]) over exactly every image of a split, not augmented."""
    rows, replicas = run.plan.rows, run.plan.num_replicas
    hosts: list[int] = []

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        hosts.append(context.num_input_pipelines)
        return run.data.evaluation_batches(split, rows, replicas, hosts[0], context.input_pipeline_id)

    distributed = run.strategy.distribute_datasets_from_function(batches)
    steps = run.data.evaluation_steps(split, rows, replicas, hosts[0])
    return run.model.evaluate(distributed, steps=steps, verbose=0, return_dict=True, callbacks=list(watchers))


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
    epochs, divergences = folder.read_metrics(), folder.read_divergences()
    return {
        **facts(run),
        **report.evaluation_result({split: evaluate(run, split) for split in run.data.sizes}),
        **report.speed_result(epochs),
        "theory": report.theory_result(epochs),
        **({"divergences": divergences} if divergences else {}),
        "versions": report.versions(),
    }
