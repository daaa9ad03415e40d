"""The hosts of a slice as the process sees them that drives them: each a worker at an address of its own.

On a slice of several hosts one process, on the first host, drives TensorFlow's workers, of which each host has one
(tpu_worker.py). A rehearsal drives workers that have CPUs in the place of chips.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator

import tensorflow as tf

from conadv_tf import peers
from conadv_tf.errors import ConfigError, RunError, one_line

CLOSING_SECONDS = 3  # a process that ends closes its connections first, then its port
_START = "conadv-tpu-worker --cpu_devices=N --port=PORT"


class RehearsalStrategy(tf.distribute.MirroredStrategy):
    """A replica on each CPU of workers that have no TPU; the first host's come first.

    It gives each host its own input, as TPUStrategy does. All gradients meet on one device: it shows that a run
    works, not how fast.

    Args:
      resolver: the workers, which this process is connected to.

    Raises:
      ConfigError: if the workers have not the same number of CPUs.
    """

    def __init__(self, resolver: tf.distribute.cluster_resolver.TPUClusterResolver):
        self._resolver = resolver
        of_host = _cpus(resolver.get_job_name())
        if len({len(cpus) for cpus in of_host}) != 1:
            counts = ", ".join(str(len(cpus)) for cpus in of_host)
            raise ConfigError(f"the workers have {counts} CPUs: start each with the same --cpu_devices=N")
        super().__init__(of_host[0], tf.distribute.ReductionToOneDevice())
        if len(of_host) > 1:
            # MirroredStrategy itself refuses devices of several hosts outside of graphs; what it is made of does not.
            self.extended._initialize_multi_worker([name for cpus in of_host for name in cpus])

    @property
    def cluster_resolver(self) -> tf.distribute.cluster_resolver.TPUClusterResolver:
        return self._resolver


def _cpus(job: str) -> list[list[str]]:
    """The names of the CPUs of each task of a job, in order."""
    named = [(tf.DeviceSpec.from_string(cpu.name), cpu.name) for cpu in tf.config.list_logical_devices("CPU")]
    own = sorted((spec.task, spec.device_index, name) for spec, name in named if spec.job == job)
    return [[name for *_, name in cpus] for _, cpus in itertools.groupby(own, key=lambda cpu: cpu[0])]


def rehearsal(tpu: str | None) -> tf.distribute.Strategy:
    """The strategy for --strategy=rehearsal.

    Args:
      tpu: the addresses of the workers, "grpc://HOST:PORT,grpc://HOST:PORT".

    Raises:
      ConfigError: where --tpu has no addresses.
      RunError: where a worker does not answer.
    """
    if not tpu or not tpu.startswith("grpc://"):
        raise ConfigError(
            f"--strategy=rehearsal needs the addresses of workers, not --tpu={tpu}: start {_START} on each machine, "
            "and pass --tpu=grpc://HOST:PORT,grpc://HOST:PORT"
        )
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
    check_there(resolver, f"start it there with {_START}")
    tf.config.experimental_connect_to_cluster(resolver)
    return RehearsalStrategy(resolver)


def check_there(resolver: tf.distribute.cluster_resolver.TPUClusterResolver, remedy: str) -> None:
    """Connects to every worker of a resolver: TensorFlow itself would wait for a missing one for ever.

    Raises:
      RunError: naming the first worker that does not answer, and the remedy.
    """
    addresses = _addresses(resolver)
    for place, error in peers.silent(addresses):
        raise RunError(f"{_worker(place, addresses)} does not answer ({one_line(error)}): {remedy}") from error


@contextlib.contextmanager
def watched(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Ends what runs within, on one line, when a worker of the strategy's slice is lost.

    Where TensorFlow notices, what it raises becomes a RunError. Where it waits, in a call that nothing in Python can
    interrupt, the process ends: within seconds of the worker's end, a minute after its machine has fallen silent.
    Several workers that each run this program are another matter (errors.lost_worker).

    Raises:
      RunError: naming the worker.
    """
    resolver = strategy.cluster_resolver
    addresses = _addresses(resolver) if isinstance(resolver, tf.distribute.cluster_resolver.TPUClusterResolver) else []
    with peers.watched(addresses, lambda place: _gone(place, addresses)):
        try:
            yield
        except Exception as error:  # TensorFlow's, of many kinds, or what was made of it: "cannot write a checkpoint"
            lost = _lost(addresses, error)
            if lost is None:
                raise
            raise RunError(lost) from error


def _lost(addresses: list[str], error: Exception) -> str | None:
    """What to say of a worker that is lost; None where all are there, and the error is about something else."""
    broken = isinstance(error, tf.errors.UnavailableError) and bool(addresses)
    until = time.monotonic() + (CLOSING_SECONDS if broken else 0)
    while True:
        for place, _ in peers.silent(addresses):
            return _gone(place, addresses)
        if time.monotonic() >= until:
            break
        time.sleep(0.1)
    if broken:
        return (
            f"the connection to a worker was lost, and all {len(addresses)} answer ({one_line(error)}): start the "
            "same command again, which goes on from the last checkpoint"
        )
    return None


def _addresses(resolver: tf.distribute.cluster_resolver.TPUClusterResolver) -> list[str]:
    """HOST:PORT of every worker; none where the TPU is this machine's own."""
    jobs = resolver.cluster_spec().as_dict()
    return list(jobs.get(resolver.get_job_name(), []))


def _worker(place: int, addresses: list[str]) -> str:
    return f"worker {place} of {len(addresses)}, at {addresses[place]},"


def _gone(place: int, addresses: list[str]) -> str:
    return (
        f"{_worker(place, addresses)} is gone: look at its log, start it again (tpu_scripts/resume.sh does, or "
        "conadv-tpu-worker), then the same command, which goes on from the last checkpoint"
    )
