"""Lines for a person, who may have gone, and the command lines of tools.

Output that cannot be shown costs no run and changes no exit code.
"""

import argparse
import codecs
import contextlib
import io
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

import tqdm

from conadv_tf import paths
from conadv_tf.errors import ConfigError, DataError, RunError, data_error, file_errors, lacks_memory, one_line

# What has no likeness in ASCII of its own; Greek letters are written out.
_IN_ASCII = {
    **{
        "×": "x",
        "·": "*",
        "±": "+-",
        "→": "->",
        "←": "<-",
        "−": "-",
        "–": "-",
        "—": "-",
        "†": "*",
        "≥": ">=",
        "≤": "<=",
    },
    **{"≈": "~", "‖": "|", "∞": "inf", "∇": "grad", "⌊": "[", "⌋": "]", "‘": "'", "’": "'", "“": '"', "”": '"'},
}
# The error handlers of Python's own streams that raise, or write codes in the place of characters.
_UNREADABLE = ("strict", "surrogateescape", "backslashreplace")

# Seconds between two lines of progress where there is no screen.
LINE_SECONDS = 10.0


def take_any_text() -> None:
    """Lets stdout and stderr take every text: what their encoding lacks is written in ASCII, "x" for "×"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _UNREADABLE:
            stream.reconfigure(errors=_in_ascii.__name__)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The error handler of a codec that writes what cannot be encoded by characters that can."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_likeness, error.object[error.start : error.end])), error.end


codecs.register_error(_in_ascii.__name__, _in_ascii)


def _likeness(character: str) -> str:
    """A character in ASCII; nothing for an accent that stands alone, "?" where there is no likeness."""
    plain = _IN_ASCII.get(character) or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    name = unicodedata.name(character, "")
    if not plain and name.startswith("GREEK"):
        plain = name.split()[-1].lower()
    return plain if plain or unicodedata.combining(character) else "?"


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, to stdout unless told otherwise."""
    take_any_text()
    with may_be_gone():
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def may_be_gone() -> Iterator[None]:
    """Lets output within it fail silently: a pipe whose reader has ended, a closed terminal, a full disk."""
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                # What is left in the buffer would fail again when Python ends, and change its exit code.
                with open(os.devnull, "w", encoding="utf-8") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())


class Progress:
    """The progress of a tool: a bar on a screen, a line on stderr every LINE_SECONDS elsewhere.

    Args:
      total: the number of things to do.
      unit: the name of one of them.
    """

    def __init__(self, total: int, unit: str):
        self._bar = tqdm.tqdm(total=total, unit=unit, disable=None)
        self._total, self._unit, self._done, self._line_due = total, unit, 0, time.monotonic() + LINE_SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        with may_be_gone():
            self._bar.close()

    def say(self, text: str, stream: TextIO | None = None) -> None:
        """Prints a line at once, above the bar where there is one."""
        with may_be_gone(), tqdm.tqdm.external_write_mode(file=stream):
            say(text, stream)

    def update(self) -> None:
        """Counts one thing done."""
        self._done += 1
        with may_be_gone():
            self._bar.update()
        if self._bar.disable and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_SECONDS
            say(f"{self._done:,} of {self._total:,} {self._unit}s", sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it. Raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the arguments)")


def path(text: str, any_bytes: bool = False) -> str:
    """The type of a Parser's argument that is a path; see `paths.given`."""
    try:
        return paths.given(text, any_bytes)
    except ConfigError as error:  # of a ValueError, argparse would not show the text
        raise argparse.ArgumentTypeError(str(error)) from error


def exit_code(work: Callable[[], int | None], interrupted: str, remedy: str) -> int:
    """Does the work of a tool and says on one line of stderr what went wrong.

    Args:
      work: the work; returns an exit code, None for 0.
      interrupted: what Ctrl-C leaves behind, for the line about it.
      remedy: the remedy for files that cannot be read or written.

    Returns:
      0, 2 for arguments and settings, 1 for data and files, 130 after Ctrl-C, or what `work` returns.
    """
    take_any_text()
    try:
        return work() or 0
    except (ConfigError, DataError, RunError) as error:
        failure: ConfigError | DataError | RunError = error
    except file_errors(MemoryError) as error:
        if lacks_memory(error):
            failure = RunError(f"out of memory; {interrupted}: free some, and start it again")
        else:
            failure = data_error(error) or RunError(f"{one_line(error)}: {remedy}")
    except KeyboardInterrupt:
        say(f"\ninterrupted: {interrupted}", sys.stderr)
        return 130
    # gin appends lines of its own about the call the error came from.
    say(f"error: {str(failure).splitlines()[0]}", sys.stderr)
    return failure.exit_code
