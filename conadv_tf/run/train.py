"""A run from recipe to result: data → plan → model → fit → result.json and an exported network."""

import contextlib
from collections.abc import Sequence

import tensorflow as tf
import tf_keras
from absl import logging

from conadv_tf import config, terminal
from conadv_tf.data import service as data_service
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.run import (
    callbacks,
    checkpoint,
    divergence,
    hosts,
    initial_weights,
    leak,
    lock,
    monitor,
    preemption,
    report,
    resuming,
)
from conadv_tf.run.build import Run
from conadv_tf.run.export import export
from conadv_tf.run.folder import EXPORT, RunFolder, recorded
from conadv_tf.run.strategy import is_chief
from conadv_tf.run.tensorboard import TensorBoard, write_test_results
from conadv_tf.training.learning_rate import peak_of, warmup_poly_decay

PANEL_IMAGES = 6


def train(run: Run, model_dir: str) -> dict:
    """Trains a run to its end in `model_dir`, resuming what is there; returns the result.

    Raises:
      ConfigError: if the folder holds another run, or one on other data.
      RunError: if the folder cannot be used or is in use, or an update is not finite (divergence.py).
      Preempted, KeyboardInterrupt: after SIGTERM, SIGINT; the run is kept up to the update in which the signal came.
      DataError: if the data turn out damaged beyond the limit.
    """
    folder = RunFolder(model_dir, writes=is_chief(run.strategy))
    spread = resuming.spread_of(run.plan, run.model.network)
    data = run.data.fingerprint
    resuming.check(folder, spread, None if run.settings.accept_changed_data else data)
    finished = folder.read_result()
    if finished:
        terminal.say(f"{folder.path} holds this run, finished; nothing to train")
        return finished
    folder.make()
    with lock.held(model_dir) if folder.writes else contextlib.nullcontext(), hosts.watched(run.strategy):
        return _train_in(run, folder, spread, data)


def _train_in(run: Run, folder: RunFolder, spread: resuming.Spread, data: Fingerprint) -> dict:
    checkpoints = checkpoint.Checkpoints(run.model, folder.file("checkpoints"), data)
    update = checkpoints.restore()
    if not run.settings.accept_changed_data:
        resuming.check_data(folder.file("checkpoints"), checkpoints.data, data)
    if not update and run.initial_weights:
        # Before anything says whose the folder is: a mistake in the path would keep the folder.
        terminal.say(initial_weights.start(run.model, run.initial_weights, run.make_network))
    folder.write_data(data)  # first: a folder without it passes for one of an earlier version
    folder.write_config(config.operative_config())
    if update:
        terminal.say(
            resuming.announcement(folder, update, run.plan.steps_per_epoch, spread, bool(run.model.method.mixed))
        )
    elif run.divergence.retries and folder.writes:
        checkpoints.save()  # a run that diverges in its first epoch goes back to it
    folder.write_layout(spread)
    _fit_to_the_end(run, folder, checkpoints, update)
    result = _result(run, folder)
    if folder.writes:
        names = run.data.class_names
        result |= {"classes": list(names)} if names else {}
        export(run.model.network, folder.file(EXPORT), names, run.data.view)
    folder.write_result(result)
    if run.data.bad_records.count:
        terminal.say(run.data.bad_records.report())
    return result


def _fit_to_the_end(run: Run, folder: RunFolder, checkpoints: checkpoint.Checkpoints, update: int) -> None:
    """Trains from `update` to the end of the run.

    A run that diverges goes back to its last checkpoint and on with a lower peak learning rate, divergence.retries
    times at most. The folder keeps the divergences: they count when the run is started again.

    Raises:
      Diverged: where the retries are used up.
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
                return request.end_if_made(checkpoints.last)  # it may have come after the last update
            except divergence.Diverged as error:
                if len(divergences) >= run.divergence.retries:
                    raise error.after(len(divergences)) from None
                diverged = error
            update = checkpoints.restore()
            divergences.append(_gone_back(run, diverged, update))
            folder.write_divergences(divergences)


def _gone_back(run: Run, diverged: divergence.Diverged, update: int) -> dict:
    """Lowers the peak of a run that has gone back to `update`; returns the entry for divergences.json."""
    _, last_peak = peak_of(run.model.optimizer.learning_rate)
    peak = float(f"{run.divergence.peak_factor * last_peak:.6g}")
    logging.warning("%s: going back to update %d with a peak learning rate of %.4g", diverged.text, update, peak)
    _lower_peak(run, peak)
    return {**diverged.facts, "went_back_to": update, "peak_learning_rate": peak}


def _lower_peak(run: Run, peak: float) -> None:
    """Gives a run a lower peak learning rate, and an end of the decay that is no higher."""
    optimizer, plan = run.model.optimizer, run.plan
    end = min(optimizer.learning_rate.end_learning_rate, peak)
    optimizer.learning_rate = warmup_poly_decay(plan.steps_per_epoch, plan.total_steps, peak, end_learning_rate=end)
    run.model.restart()


def _warmup_steps(run: Run) -> int:
    return peak_of(run.model.optimizer.learning_rate)[0]


def _is_alone(run: Run) -> bool:
    """Tells whether this process trains alone: one of several workers cannot end, or save sums over replicas, alone."""
    return not isinstance(run.strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _fit(
    run: Run, folder: RunFolder, checkpoints: checkpoint.Checkpoints, update: int, request: preemption.Request
) -> None:
    """Trains to the end of the run, or saves it and ends where the process is asked to; the weights are at `update`."""
    with data_service.watched(run.data.services):
        if _is_alone(run):
            _evaluate_last(run, folder, update, request)
        request.end_if_made(checkpoints.last)
        called = _callbacks(run, folder, checkpoints, update, request)
        try:
            run.model.fit(
                train_batches(run, update),
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
    folder: RunFolder,
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
            callbacks.LeakWatch(plan, _warmup_steps(run), folder.read_metrics()[:epoch]),
            TensorBoard(folder, plan, panel, report.hyperparameters(run)),
        ]
    return [
        *([callbacks.GoOn(within, so_far)] if so_far else []),
        throughput,
        divergence.StopIfDiverged(within_epochs=_is_alone(run)),
        callbacks.Evaluation(lambda: _test_results(run, request), settings.evaluation_is_due),
        _theory_monitor(run, folder, epoch),
        *watchers,
        callbacks.Recorder(
            plan,
            folder,
            checkpoints,
            throughput,
            due=settings.checkpoint_is_due,
            every_steps=settings.checkpoint_every_steps,
            update=update,
            request=request,
        ),
    ]


def _test_results(run: Run, request: preemption.Request) -> dict[str, float]:
    """Evaluates the test images; empty if the process is asked to end meanwhile."""
    try:
        return evaluate(run, "test", [callbacks.EndEarly(request)])
    except callbacks.EndEarly.Cut:
        return {}


def _evaluate_last(run: Run, folder: RunFolder, update: int, request: preemption.Request) -> None:
    """Adds missing test results to the line of the epoch that ends at `update`: its process was asked to end before."""
    epochs = folder.read_metrics()[: update // run.plan.steps_per_epoch]
    due = epochs and run.settings.evaluation_is_due(len(epochs) - 1) and "test_top1" not in epochs[-1]
    if due and update % run.plan.steps_per_epoch == 0:
        results = _test_results(run, request)
        epochs[-1] |= {f"test_{name}": recorded(value) for name, value in results.items()}
        folder.write_metrics(epochs)
        write_test_results(folder, update, results)


def _theory_monitor(run: Run, folder: RunFolder, first_epoch: int) -> monitor.TheoryMonitor:
    # Streamed data are read for the monitor's images: not for a method without stale weights.
    examples = run.data.examples("train", run.monitor.images) if run.model.method.attacks_stale_weights else None
    return monitor.TheoryMonitor(run.monitor, run.plan.epochs, examples, folder.read_metrics()[:first_epoch])


def train_batches(run: Run, update: int):
    """The distributed batches that training needs from `update` on; prepares the model's carry for them."""
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
    images, replicas = run.plan.rows, run.plan.num_replicas
    hosts: list[int] = []

    def batches(context: tf.distribute.InputContext) -> tf.data.Dataset:
        hosts.append(context.num_input_pipelines)
        return run.data.evaluation_batches(split, images, replicas, hosts[0], context.input_pipeline_id)

    distributed = run.strategy.distribute_datasets_from_function(batches)
    steps = run.data.evaluation_steps(split, images, replicas, hosts[0])
    return run.model.evaluate(distributed, steps=steps, verbose=0, return_dict=True, callbacks=list(watchers))


def _result(run: Run, folder: RunFolder) -> dict:
    epochs, divergences = folder.read_metrics(), folder.read_divergences()
    return {
        **report.facts(run),
        **report.evaluation_result({split: evaluate(run, split) for split in run.data.sizes}),
        **report.speed_result(epochs),
        **leak.leak_result(epochs, _warmup_steps(run), run.model.method.start_epoch),
        "theory": report.theory_result(epochs),
        **({"divergences": divergences} if divergences else {}),
        "versions": report.versions(),
    }
