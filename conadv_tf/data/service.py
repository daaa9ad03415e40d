"""Decoding and augmentation on other machines, through tf.data's service; the same batches in the same order.

    conadv-data-service --address=HOST:PORT        on each of those machines, until Ctrl-C or SIGTERM
    python train.py … --gin_param="stream.service='grpc://HOST:PORT,grpc://HOST2:PORT'"

Each process is a dispatcher with one worker of its own, on PORT and PORT + 1. A dispatcher with many workers would hand
out their batches as they come, start a worker that comes back from its first batch, and have every worker read every
host's files. Here input host h of H takes the processes h, h + H, ...; the i-th of its W makes the batches i, i + W,
... of the host's stream, and the host takes one from each in turn. Each process reads the whole share of its host, and
decodes its part. A process that ends, and one that is started anew, end the run; the same command resumes it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from conadv_tf import peers, terminal
from conadv_tf.errors import ConfigError, DataError, file_errors

if TYPE_CHECKING:  # imported where it is used: seconds that --help does without
    import tensorflow as tf

_SCHEME = "grpc://"


def _host_and_port(address: str) -> tuple[str, int]:
    """Splits "HOST:PORT".

    Raises:
      ValueError: where it is no address, or leaves no next port for the worker.
    """
    host, port = peers.host_and_port(address)
    if port == 65535:
        raise ValueError(address)
    return host, port


def check(service: str) -> list[str]:
    """Takes the addresses "HOST:PORT" from "grpc://HOST:PORT,grpc://HOST:PORT,..." and connects to each.

    Raises:
      ConfigError: an address of another form.
      DataError: nobody listens there.
    """
    addresses = [address.strip().removeprefix(_SCHEME) for address in service.split(",")]
    for address in addresses:
        try:
            _host_and_port(address)
        except ValueError as error:
            raise ConfigError(
                f"stream.service={service!r}: {address!r} is no address: write grpc://HOST:PORT, commas between several"
            ) from error
    for place, cause in peers.silent(addresses):
        raise DataError(f"stream.service={service!r}: {_not_there(addresses[place])} ({cause})") from cause
    return addresses


def _not_there(address: str) -> str:
    return (
        f"{_SCHEME}{address} does not answer: start it there with conadv-data-service "
        f"--address={address}, or do without stream.service"
    )


def of_host(services: Sequence[str], num_hosts: int, host: int) -> Sequence[str]:
    """The services that work for one of the input hosts.

    Raises:
      ConfigError: they do not divide over the hosts, nor the hosts over them.
    """
    if not services or len(services) % num_hosts == 0:
        return services[host::num_hosts]
    if num_hosts % len(services):
        raise ConfigError(
            f"stream.service has {len(services)} addresses for {num_hosts} input hosts: give a multiple or a divisor "
            f"of {num_hosts}, so that no host waits for the others"
        )
    return [services[host % len(services)]]


def spread(make: Callable[[int, int], tf.data.Dataset], services: Sequence[str]) -> tf.data.Dataset:
    """Makes a stream whose batches come from the services.

    Args:
      make: a function from (parts, part) to the batches part, part + parts, part + 2 parts, ... of an endless stream.
      services: addresses; none: the batches are made here.

    Returns:
      Dataset of all batches, in order.
    """
    import tensorflow as tf

    if not services:
        return make(1, 0)
    parts = [_made_at(address, make(len(services), part)) for part, address in enumerate(services)]
    return tf.data.Dataset.choose_from_datasets(parts, tf.data.Dataset.range(len(parts)).repeat())


def _made_at(address: str, batches: tf.data.Dataset) -> tf.data.Dataset:
    import tensorflow as tf

    everything = tf.data.experimental.service.ShardingPolicy.OFF
    # Photos do not shrink, and unpacking them would cost the host what it is to be spared.
    sent = batches.enumerate().apply(
        tf.data.experimental.service.distribute(everything, _SCHEME + address, compression=None)
    )

    def in_turn(expected: tf.Tensor, numbered: tuple) -> tuple:
        number, batch = numbered
        line = f"DataError: the data service {address} sent another batch than was due: start the same command again"
        with tf.control_dependencies([tf.debugging.Assert(tf.equal(number, expected), [line])]):
            return tf.nest.map_structure(tf.identity, batch)

    return tf.data.Dataset.zip(tf.data.Dataset.range(tf.int64.max), sent).map(in_turn)


def watched(services: Sequence[str], patience_seconds: float = peers.PATIENCE_SECONDS) -> AbstractContextManager[None]:
    """Ends the process with one line when a service has not answered for `patience_seconds`; see `peers.watched`."""
    return peers.watched(
        services,
        lambda place: f"{_not_there(services[place])}; then start the same command again",
        patience_seconds,
        may_come_back=True,
    )


def serve(address: str) -> tuple:
    """Starts a dispatcher at "HOST:PORT" and its worker on the next port; both run while what it returns lives.

    Raises:
      OSError: where one of the ports is taken.
    """
    import tensorflow as tf

    host, port = _host_and_port(address)
    next_port = port + 1
    for number in (port, next_port):
        peers.check_free(number)
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=port))
    own_worker = service.WorkerConfig(f"localhost:{port}", worker_address=f"{host}:{next_port}", port=next_port)
    return service.WorkerServer(own_worker), dispatcher


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT, which end the process; returns an exit code where it cannot serve."""
    terminal.take_any_text()
    parser = argparse.ArgumentParser(prog="conadv-data-service", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--address",
        required=True,
        help="HOST:PORT, HOST as the training hosts reach this machine; PORT + 1 is used too",
    )
    address = parser.parse_args(arguments).address.removeprefix(_SCHEME)
    try:
        _host_and_port(address)
    except ValueError:
        example = f"--address={socket.gethostname()}:5050"
        parser.error(f"--address={address} is no address: write HOST:PORT, such as {example}")
    try:
        servers = serve(address)  # they live as long as this name
    except file_errors(RuntimeError) as error:
        terminal.say(
            f"error: cannot serve at {address} ({str(error).splitlines()[0]}): choose another port", sys.stderr
        )
        return DataError.exit_code
    peers.wait_for_a_signal(f"serving at {_SCHEME}{address} with {len(servers) - 1} worker")
    terminal.say("stopped")
    # Shutting the servers down would wait for clients, which may never let go.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
