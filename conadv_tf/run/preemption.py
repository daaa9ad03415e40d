"""Requests to end: the first SIGTERM or SIGINT is noted, and training ends, saved, after its present update.

One of several workers can neither save nor go on without the others. Signals end it as they end any program, and
`errors.lost_worker` puts into words what TensorFlow raises in the others.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from conadv_tf.errors import Preempted

PATIENCE_SECONDS = 10
_NOTHING_LOST = "nothing was lost: the same command goes on"
_NAMES = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}


class Request:
    """A request to this process to end; true in a condition once it has come."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def end_if_made(self, path: str | None) -> None:
        """Ends the run if the request has come and a checkpoint, `path`, keeps the run.

        Raises:
          Preempted: after SIGTERM.
          KeyboardInterrupt: after SIGINT.
        """
        if not self or path is None:
            return
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(f"the run is kept in {path}: the same command goes on")


@contextlib.contextmanager
def noticed(can_save: bool) -> Iterator[Request]:
    """Gives a Request, which the first SIGTERM or SIGINT makes; a second SIGTERM ends the process at once.

    Args:
      can_save: False where the process cannot save alone, such as one of several workers: signals do what they did
        before, but for `end_at_once`, in whose place SIGTERM ends the process as it ends any program. Outside the main
        thread, where Python handles no signals, they do what they did before.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _handlers_put_back() as previous:
        if not can_save:
            if previous[signal.SIGTERM] is end_at_once:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            yield request
            return

        def note(number: int, frame) -> None:
            request.signal = number
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            # Not print: the signal may have come in the middle of one. The reader may have got the signal too.
            with contextlib.suppress(OSError):
                os.write(2, f"{_NAMES[signal.Signals(number)]}: saving after this update\n".encode())

        for number in _NAMES:
            signal.signal(number, note)
        yield request


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, for where TensorFlow waits and Python handles no signal.

    SIGTERM ends the process too, except where TensorFlow has taken it over, which it does while it makes a cluster.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handlers_put_back():
        for number in _NAMES:
            signal.signal(number, signal.SIG_DFL)
        yield


@contextlib.contextmanager
def _handlers_put_back() -> Iterator[dict]:
    """Gives the handlers of both signals, and puts them back afterwards."""
    previous = {number: signal.getsignal(number) for number in _NAMES}
    try:
        yield previous
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_at_once(number: int, frame) -> None:
    """Handles SIGTERM where there is nothing to save. Raises Preempted.

    The signal may come in Python that C code calls, as while TensorFlow is loaded, and C code may drop whatever is
    raised there: a process that still runs PATIENCE_SECONDS later is ended without further ado.
    """
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, _end_without_ado)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
    raise Preempted(_NOTHING_LOST)


def _end_without_ado(number: int, frame) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\npreempted: {_NOTHING_LOST}\n".encode())
    os._exit(Preempted.exit_code)
