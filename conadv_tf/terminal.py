"""Lines for a person, who may have gone: what cannot be shown costs no run and changes no exit code."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, to stdout unless told otherwise."""
    with may_be_gone():
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def may_be_gone() -> Iterator[None]:
    """Within it output fails silently: into a pipe whose reader has ended, a closed terminal, a full disk."""
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # What is left in the buffer would fail again when Python ends, which then has a code of its own.
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
