"""The command line of train.py: flags → gin → one run."""

import logging as python_logging
import os
import signal
import sys
import traceback

from absl import app, flags, logging

from conadv_tf import config, paths, terminal
from conadv_tf.errors import ConfigError, DataError, Preempted, RunError, data_error, lost_worker, out_of_memory
from conadv_tf.run import preemption, tpu_runtime

# What needs TensorFlow is imported where it is used: seconds that --help and a misspelt file do without.


class _Path(flags.ArgumentParser):
    """The parser of flags that are paths."""

    def parse(self, argument: str) -> str:
        return paths.given(argument)


FLAGS = flags.FLAGS
flags.DEFINE_multi(
    _Path(),
    flags.ArgumentSerializer(),
    "gin_file",
    [],
    "A recipe, as given or below gin/; repeatable, later over earlier.",
)
flags.DEFINE_multi_string("gin_param", [], 'A binding such as "attack.epsilon_pixels=4"; repeatable, over all files.')
flags.DEFINE_string("tpu", None, "local, a TPU's name, grpc:// addresses, or an accelerator type such as v3-512.")
flags.DEFINE_string("strategy", "auto", "auto, tpu, mirrored, multiworker, one_device or rehearsal.")
flags.DEFINE(_Path(), "data_dir", None, "Where the data are; local or gs://.")
flags.DEFINE(_Path(), "model_dir", None, "Where the run is kept; local or gs://. Default: runs/<recipe>[-<data>].")
flags.DEFINE_bool(
    "preflight", False, "Build the run, print its arithmetic and its cost on --tpu=TYPE, or on --tpu=all, and stop."
)

EVERY_TPU = "all"
HELP = {"--help", "-help", "-h", "-?", "--helpshort"}


def main() -> None:
    """Entry point of `python train.py` and `conadv-train`."""
    signal.signal(signal.SIGTERM, preemption.end_at_once)
    app.run(_run, flags_parser=parse_flags)


def run_command_line(arguments: list[str]) -> None:
    """Does what `main` does, in a process that lives on: SIGTERM keeps its meaning, and absl is not set up.

    Args:
      arguments: the program's name, then the flags.

    Raises:
      SystemExit: for whatever `main` ends with another exit code than 0.
    """
    _run(parse_flags(arguments))


def parse_flags(arguments: list[str]) -> list[str]:
    """Sets FLAGS from the program's name and its flags; ends with exit code 2 where they are wrong, 0 after --help."""
    if HELP & set(arguments[1:]):
        # absl's own --help shows the flags of the main module, which has none, and ends with an error's exit code.
        terminal.say(f"usage: {os.path.basename(arguments[0])} [--FLAG=VALUE ...]\n{FLAGS.module_help(__name__)}")
        sys.exit(0)
    try:
        rest = FLAGS(arguments)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: settings are flags, --name=value")
    except flags.Error as error:
        _fail(ConfigError(f"{' '.join(str(error).split())} (python train.py --help lists the flags)"))
    return rest


def _run(_: list[str]) -> None:
    terminal.take_any_text()
    _quiet()
    try:
        _train()
    except (ConfigError, DataError, RunError) as error:
        _fail(error)
    except Preempted as stop:
        terminal.say(f"\npreempted: {stop}", sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        terminal.say("\ninterrupted: the same command goes on from what was saved", sys.stderr)
        sys.exit(130)
    except Exception as error:
        # TensorFlow wraps what its threads raise; a lost worker and a device without memory are errors of its own.
        translated = data_error(error) or lost_worker(error) or out_of_memory(error)
        if translated is None:
            raise
        _fail(translated)


def _quiet() -> None:
    """Leaves a run's own lines alone on the screen: TensorFlow and absl report saving and tracing as news."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("tensorflow").setLevel("WARNING")


def _train() -> None:
    """Trains the recipe of the flags, or prints its preflight."""
    tpu_runtime.check_has_tensorflow(FLAGS.tpu or "")
    if FLAGS.tpu == EVERY_TPU and not FLAGS.preflight:
        raise ConfigError(f"--tpu={EVERY_TPU} is for --preflight, which compares them: name one TPU to train on")
    if FLAGS.tpu or FLAGS.strategy == "tpu":
        tpu_runtime.prepare_tpu(FLAGS.tpu or "local")  # to read a recipe loads TensorFlow
    gin_files = FLAGS.gin_file or [config.DEFAULT_RECIPE]
    recipe = config.recipe_name(gin_files)
    config.configure(gin_files, FLAGS.gin_param)
    if FLAGS.preflight:
        _preflight(recipe, gin_files)
        return
    from conadv_tf.run import report, resuming
    from conadv_tf.run.build import build
    from conadv_tf.run.strategy import devices_text, make_strategy
    from conadv_tf.run.train import train

    strategy = make_strategy(FLAGS.strategy, FLAGS.tpu)
    built = build(recipe, strategy, FLAGS.data_dir)
    _check_effect()
    terminal.say(report.arithmetic(built, devices=devices_text(strategy)))
    model_dir = FLAGS.model_dir or resuming.default_folder(recipe, FLAGS.data_dir, built.data.fingerprint)
    terminal.say(report.result_text(train(built, model_dir)))


def _preflight(recipe: str, gin_files: list[str]) -> None:
    """Prints the arithmetic of the run, without its data where none are here, and what it costs on --tpu=TYPE."""
    import tensorflow as tf

    from conadv_tf.preflight import preflight, slices
    from conadv_tf.run import report
    from conadv_tf.run.build import build
    from conadv_tf.run.strategy import make_strategy, replicas_of

    if FLAGS.data_dir is None:
        config.configure_without_files(gin_files, FLAGS.gin_param)
    typed = FLAGS.tpu == EVERY_TPU or tpu_runtime.parse_accelerator_type(FLAGS.tpu or "")
    strategy = tf.distribute.OneDeviceStrategy("CPU:0") if typed else make_strategy(FLAGS.strategy, FLAGS.tpu)
    if FLAGS.tpu == EVERY_TPU:
        built = build(recipe, strategy, FLAGS.data_dir, slices.least_replicas())
        _check_effect()
        terminal.say(report.arithmetic(built, of_replicas=False))
        terminal.say(slices.report(built, FLAGS.model_dir))
        return
    built = build(recipe, strategy, FLAGS.data_dir, replicas_of(FLAGS.tpu, strategy))
    _check_effect()
    terminal.say(report.arithmetic(built))
    terminal.say(preflight.report(built, FLAGS.tpu, FLAGS.model_dir))


def _check_effect() -> None:
    """Names the settings that this run does not use: a recipe may have some.

    Raises:
      ConfigError: for a --gin_param among them, which is a mistake.
    """
    idle = config.bindings_without_effect()
    for binding in FLAGS.gin_param:
        name = config.bound_name(binding)
        if name in idle:
            raise ConfigError(
                f"--gin_param={binding!r} sets {name}, which this run does not use: drop it, or {_use_of(name)}"
            )
    # Another source than the chosen one may keep its settings: a later recipe has replaced it as a whole.
    unexpected = [name for name in idle if name.split(".")[0] not in config.sources()]
    if unexpected:
        terminal.say(f"  not used by this run: {', '.join(unexpected)}")


def _use_of(name: str) -> str:
    """Says how a run comes to use a setting."""
    configurable = name.split(".")[0]
    if configurable in config.sources():
        return f"set data.source={configurable!r}"
    return "stream files, with in_memory=False" if configurable == "stream" else "choose what uses it"


def _fail(error: ConfigError | DataError | RunError) -> None:
    """Ends with the error's exit code and one line; --v=1 adds the traceback before the line."""
    if FLAGS.is_parsed() and logging.get_verbosity() >= 1:
        traceback.print_exception(error)
    # gin appends lines of its own about the call the error came from.
    terminal.say(f"error: {str(error).splitlines()[0]}", sys.stderr)
    sys.exit(error.exit_code)
