"""Processes on other machines: their addresses, whether somebody answers there, and being one of them."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from conadv_tf import terminal
from conadv_tf.errors import RunError

CONNECT_SECONDS = 10
PATIENCE_SECONDS = 60  # who does not answer for so long has gone
_SCHEME = "grpc://"


def host_and_port(address: str) -> tuple[str, int]:
    """Splits "HOST:PORT"; "grpc://" before it is left out.

    Raises:
      ValueError: where it is no address.
    """
    host, _, port = address.removeprefix(_SCHEME).rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(address)
    return host, int(port)


def connect(address: str) -> None:
    """Connects to "HOST:PORT" and hangs up; raises OSError or UnicodeError where nobody listens."""
    socket.create_connection(host_and_port(address), CONNECT_SECONDS).close()


def silent(addresses: Sequence[str]) -> Iterator[tuple[int, Exception]]:
    """Connects to one address after the other and gives the place of each where nobody listens, with the error."""
    for place, address in enumerate(addresses):
        try:
            connect(address)
        except (OSError, UnicodeError) as error:  # UnicodeError: HOST cannot be the name of a host
            yield place, error


def check_free(port: int) -> None:
    """Raises OSError where somebody listens on a port of this machine; TensorFlow would share it."""
    socket.create_server(("", port)).close()


@contextlib.contextmanager
def watched(
    addresses: Sequence[str],
    line: Callable[[int], str],
    patience_seconds: float = PATIENCE_SECONDS,
    may_come_back: bool = False,
) -> Iterator[None]:
    """Ends the process with one line and exit code 1 when one of the addresses has not answered for a while.

    TensorFlow would wait for it for ever, in a call that nothing in Python can interrupt. What was trained since the
    last checkpoint is lost.

    Args:
      addresses: "HOST:PORT" each.
      line: what to say of the address in a place.
      patience_seconds: how long a machine may be silent.
      may_come_back: whether a machine that answers, and says that nobody listens there, has the same time.
    """
    left = threading.Event()

    def watch() -> None:
        heard = [time.monotonic()] * len(addresses)
        while not left.wait(min(5.0, patience_seconds / 3)):
            for place, address in enumerate(addresses):
                gone = False
                try:
                    connect(address)
                    heard[place] = time.monotonic()
                except OSError as error:
                    gone = isinstance(error, ConnectionRefusedError) and not may_come_back
                if (gone or time.monotonic() - heard[place] > patience_seconds) and not left.is_set():
                    terminal.say(f"error: {line(place)}", sys.stderr)
                    os._exit(RunError.exit_code)

    if addresses:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


def wait_for_a_signal(announcement: str) -> None:
    """Prints the announcement once signals are heard, and returns after SIGTERM or SIGINT."""
    stopped: list[int] = []
    _hear(stopped)
    terminal.say(announcement)
    # Looks again and again: a signal may reach one of TensorFlow's threads, which wakes nothing that waits here. Python
    # handles the signal in this thread when this thread runs. A TensorFlow server takes SIGTERM over when somebody
    # makes a cluster of it, and would not end.
    while not stopped:
        time.sleep(0.5)
        _hear(stopped)


def _hear(stopped: list[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped.append(number))
