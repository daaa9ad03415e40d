"""Being told to end: the first SIGTERM or SIGINT is noted, and training ends, saved, after its present update.

One of several workers cannot end alone, nor go on alone: there, what TensorFlow raises when another is gone is said.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from conadv_tf.errors import Preempted

_NAMES = {signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}


class Request:
    """Whether this process has been told to end; true in a condition once it has."""

    def __init__(self):
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def end_if_told(self, path: str | None) -> None:
        """Ends the run if it has been told to, and is kept in a checkpoint, `path`.

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
    """A Request that the first SIGTERM or SIGINT fills in; a second SIGTERM ends the process at once.

    Args:
      can_save: False where the process cannot end alone, such as one of several workers: signals do what they did
        before. They do so too outside the main thread, where Python handles none.
    """
    request = Request()
    if not can_save or threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _handlers_put_back() as previous:

        def note(number: int, frame) -> None:
            request.signal = number
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            # Not print, which the signal may have come in the middle of. Who reads it may have got the signal too.
            with contextlib.suppress(OSError):
                os.write(2, f"{_NAMES[signal.Signals(number)]}: saving after this update\n".encode())

        for number in _NAMES:
            signal.signal(number, note)
        yield request


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it Ctrl-C ends the process, where TensorFlow waits and Python handles no signal.

    SIGTERM does so too, but for where TensorFlow has taken it over, as it does while it makes a cluster.
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
    """The handlers of both signals, which are those again afterwards."""
    previous = {number: signal.getsignal(number) for number in _NAMES}
    try:
        yield previous
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_at_once(number: int, frame) -> None:
    """A handler of SIGTERM for where there is nothing to save. Raises Preempted."""
    raise Preempted("nothing was lost: the same command goes on")
