"""Strategies of tf.distribute, made from --tpu and --strategy."""

import json
import os

import gin
import tensorflow as tf

from conadv_tf import terminal
from conadv_tf.errors import ConfigError, RunError, one_line, whole_number
from conadv_tf.run import hosts, preemption, tpu_runtime
from conadv_tf.run.tpu_runtime import parse_accelerator_type
from conadv_tf.training import collectives

STRATEGIES = ("auto", "tpu", "mirrored", "multiworker", "one_device", "rehearsal")


def make_strategy(strategy: str = "auto", tpu: str | None = None) -> tf.distribute.Strategy:
    """The strategy for --strategy and --tpu.

    Args:
      strategy: one of STRATEGIES; "auto" takes a TPU if --tpu is given, several workers if TF_CONFIG names
        them, all GPUs if there are several, otherwise one device; "rehearsal" the CPUs of a slice's workers.
      tpu: "local", the name of a TPU, grpc:// addresses with commas between them, or an accelerator type such as
        "v3-512".

    Raises:
      ConfigError: unknown strategy, or --tpu beside a strategy that is not for TPUs.
      RunError: no TPU where one is asked for, or one of another type.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"--strategy={strategy} is not known: choose one of {', '.join(STRATEGIES)}")
    if strategy == "rehearsal":
        with preemption.ending_at_once():
            return hosts.rehearsal(tpu)
    if tpu and strategy not in ("auto", "tpu"):
        raise ConfigError(
            f"--strategy={strategy} does not use a TPU, yet --tpu={tpu} asks for one: drop one of the two"
        )
    if tpu or strategy == "tpu":
        return _tpu_strategy(tpu or "local")
    gpus = tf.config.list_physical_devices("GPU")
    if strategy == "multiworker" or (strategy == "auto" and os.environ.get("TF_CONFIG")):
        return _multiworker_strategy()
    if strategy == "mirrored" or (strategy == "auto" and len(gpus) > 1):
        return _mirrored_strategy([f"GPU:{i}" for i in range(len(gpus))])
    return tf.distribute.OneDeviceStrategy("GPU:0" if gpus else "CPU:0")


def _multiworker_strategy() -> tf.distribute.Strategy:
    config = os.environ.get("TF_CONFIG")
    if not config:
        raise ConfigError(
            "--strategy=multiworker needs the environment variable TF_CONFIG with the cluster and this task: "
            "set it on every worker"
        )
    try:
        others = _other_workers(json.loads(config))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"TF_CONFIG={config[:100]} names no cluster and a task in it ({one_line(error)}): unset it, or set it on "
            'every worker to such as {"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, '
            '"task": {"type": "worker", "index": 0}}'
        ) from error
    if others:
        terminal.say(f"waiting for {', '.join(others)}: start the same command there")
    try:
        with preemption.ending_at_once():
            return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        raise RunError(
            f"the workers of TF_CONFIG did not come together ({one_line(error)}): start the same command on every one, "
            "and let them reach each other's ports"
        ) from error


def _other_workers(config: dict) -> list[str]:
    """Addresses of the workers beside this one; an error of Python's own where `config` is no TF_CONFIG."""
    task, jobs = config["task"], tf.train.ClusterSpec(config["cluster"])
    own = jobs.task_address(task["type"], task["index"])
    idle = set(jobs.jobs) - {"chief", "worker"}
    if idle:  # TensorFlow would wait for them without an end, and abort in their own processes
        raise ValueError(f"there is nothing to do for a {', '.join(sorted(idle))}, only for chief and worker")
    addresses = [address for job in jobs.jobs for address in jobs.job_tasks(job)]
    return [address for address in addresses if address != own]


def devices_text(strategy: tf.distribute.Strategy) -> str:
    """What a strategy runs on, such as "8 × GPU"; of CPUs also whether TensorFlow has found a GPU."""
    kind = tf.DeviceSpec.from_string(strategy.extended.worker_devices[0]).device_type
    unseen = ", as TensorFlow finds no GPU" if kind == "CPU" and not tf.config.list_physical_devices("GPU") else ""
    return f"{strategy.num_replicas_in_sync:,} × {kind}{unseen}"


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Tells whether this process keeps the run's files: the only one, or the first of several workers."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    resolver = strategy.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or (resolver.task_id == 0 and not has_chief)


@gin.configurable("mirrored", denylist=["gpus"])
def _mirrored_strategy(gpus: list[str], logical_cpus: int = 2) -> tf.distribute.Strategy:
    """All GPUs, or without any `logical_cpus` equal parts of the CPU (to try replicas out).

    Args:
      gpus: the GPUs there are.
      logical_cpus: the number of parts that the CPU is split into where there is no GPU.
    """
    collectives.keep_apart()
    if gpus:
        return tf.distribute.MirroredStrategy(gpus)
    logical_cpus = whole_number("mirrored.logical_cpus", logical_cpus, 1)
    split_cpu(logical_cpus)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(logical_cpus)])


def split_cpu(parts: int) -> None:
    """Splits the CPU into `parts` logical devices, which is possible until TensorFlow's first operation.

    Raises:
      RunError: if TensorFlow already runs with fewer.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * parts)
    except RuntimeError as error:
        present = len(tf.config.list_logical_devices("CPU"))
        if present < parts:
            raise RunError(
                f"{parts} logical CPUs are asked for, TensorFlow already runs with {present}: start a new process"
            ) from error


def replicas_of(tpu: str | None, strategy: tf.distribute.Strategy) -> int:
    """Replicas that --tpu=TYPE would give; those of `strategy` where --tpu names no type.

    A replica is a core on v2 and v3, whose types count cores; a chip on the later ones, of which v4 and v5p count
    two cores a chip and v5e and v6e the chips.

    Raises:
      ConfigError: if the type has no chip, or half a one.
    """
    accelerator = parse_accelerator_type(tpu or "")
    if accelerator is None:
        return strategy.num_replicas_in_sync
    generation, count = accelerator
    counts_cores = generation in ("v2", "v3", "v4", "v5p")
    if not count or (counts_cores and count % 2):
        unit = "cores, two a chip" if counts_cores else "chips"
        raise ConfigError(f"--tpu={tpu} is no slice: {generation} comes in {unit}: write one such as {generation}-8")
    return count // 2 if generation in ("v4", "v5p") else count


def _tpu_strategy(tpu: str) -> tf.distribute.Strategy:
    accelerator_type = tpu if parse_accelerator_type(tpu) else None
    address = tpu_runtime.address_of(tpu)
    attached = os.environ.get("TPU_ACCELERATOR_TYPE") or os.environ.get("ACCELERATOR_TYPE")
    if accelerator_type and attached and attached != accelerator_type:
        raise RunError(f"--tpu={tpu}: the TPU attached here is a {attached}: pass --tpu={attached}, or create a {tpu}")
    try:
        if address == "local":
            _check_attached()
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=address)
        if address != "local":
            hosts.check_there(resolver, "start it there, as tpu_scripts/run.sh does on every host")
        with preemption.ending_at_once():  # a host that does not answer is waited for without an end
            if address != "local":
                tf.config.experimental_connect_to_cluster(resolver)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            strategy = tf.distribute.TPUStrategy(resolver)
    except RunError as error:
        raise RunError(f"--tpu={tpu}: {error}") from error
    except Exception as error:  # the resolver raises whatever its transport does
        unseen = address == "local" and not tf.config.list_physical_devices("TPU")
        cause = tpu_runtime.why_unseen(one_line(error)) if unseen else ""
        raise RunError(f"--tpu={tpu}: {cause}" if cause else _no_tpu_message(tpu, error)) from error
    if strategy.num_replicas_in_sync != replicas_of(tpu, strategy):
        raise RunError(
            f"--tpu={tpu} has {replicas_of(tpu, strategy)} replicas, the attached TPU {strategy.num_replicas_in_sync}: "
            "name the type of the attached one, or set TPU_NAME to the slice you mean"
        )
    return strategy


def _check_attached() -> None:
    """Raises ValueError where TensorFlow can have no TPU of this machine."""
    if tf.config.list_physical_devices("TPU"):
        return
    if not os.environ.get("TPU_NAME") and not tpu_runtime.devices():
        raise ValueError("no TPU is attached to this machine")
    # Through PJRT TensorFlow lists what the library has, and to initialise none ends the process (libtpu 0.0.21.1).
    if tpu_runtime.needs_pjrt(tpu_runtime.generation()):
        raise ValueError("TensorFlow lists no TPU")


def _no_tpu_message(tpu: str, error: Exception) -> str:
    kind = tpu if parse_accelerator_type(tpu) else "TYPE"
    return (
        f"--tpu={tpu} cannot be reached ({one_line(error)}): start on a TPU VM, or make one with "
        f"tpu_scripts/create.sh --name=NAME --type={kind} --zone=ZONE; without a TPU leave --tpu out"
    )
