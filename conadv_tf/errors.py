"""Errors that a user can cause. Each is one line: the value, the cause, the remedy.

The command line prints them without a traceback (`cli.py`) and ends with `exit_code`.
"""

import operator
import re
import sys
from typing import Any


class ConfigError(ValueError):
    """An impossible or misspelt setting, found before anything is trained. Exit code 2."""

    exit_code = 2


class DataError(ValueError):
    """Input data that is missing, damaged beyond the limit or labelled wrongly. Exit code 1."""

    exit_code = 1


class RunError(RuntimeError):
    """A run that cannot start, continue or be saved. Exit code 1."""

    exit_code = 1


class Preempted(BaseException):
    """A run that SIGTERM ended, whole: the same command goes on. Exit code 75, EX_TEMPFAIL: try again later.

    Like KeyboardInterrupt it is no Exception: a signal comes anywhere, and is no fault of the code it comes in.
    """

    exit_code = 75


def whole_number(name: str, value: Any, least: int, hint: str = "") -> int:
    """A value that must be a whole number, as Python's own int: NumPy's are whole numbers too, True and False are not.

    Args:
      name: the setting that has the value.
      value: what a caller gave.
      least: the smallest number allowed.
      hint: the end of the error's line, such as ": 1 is the published network".

    Raises:
      ConfigError: if it is anything else, or less.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}{hint}")
    return number


def keep_whole_number(settings: Any, section: str, name: str, least: int, hint: str = "") -> None:
    """Gives a frozen dataclass the whole number that its field `name` must hold, as Python's own int.

    Args:
      settings: the dataclass.
      section: what its settings are called before the point, such as "train".
      name, least, hint: see `whole_number`.

    Raises:
      ConfigError: see `whole_number`.
    """
    object.__setattr__(settings, name, whole_number(f"{section}.{name}", getattr(settings, name), least, hint))


def one_line(error: Exception) -> str:
    """The text of an error on one line, for an error line of this package."""
    return " ".join(str(error).split())[:200]


def file_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors of reading and writing files, and others; TensorFlow's among them only where it has been loaded."""
    tensorflow = sys.modules.get("tensorflow")
    return (OSError, *others, tensorflow.errors.OpError) if tensorflow else (OSError, *others)


def data_error(error: BaseException) -> DataError | None:
    """The one-line DataError that an exception from the pipeline is or carries; None if there is none.

    TensorFlow wraps what its threads raise, and gin adds a line to what `data.load` raises.
    """
    text = f"DataError: {error}" if isinstance(error, DataError) else str(error)
    if "Unknown iteration client id" in text:
        return DataError("stream.service: one of its processes was started anew: start the same command again")
    # An assertion of TensorFlow's puts brackets around its line.
    found = re.search(r"\[DataError: ([^\n]+)\]|DataError: ([^\n]+)", text)
    return DataError(found.group(1) or found.group(2)) if found else None


def lost_worker(error: Exception) -> RunError | None:
    """The one-line error for an error of TensorFlow's about another worker; None if it is about something else.

    TensorFlow notices a lost worker by the broken connection, or some seconds later by the missing heartbeats.
    """
    found = re.search(
        r"Collective ops is aborted by: (.*(?:/task:|heartbeat|Connection|Socket|UNAVAILABLE).*)", str(error), re.DOTALL
    )
    if found is None or "DataError: " in found.group(1):  # the cause is this worker's own data
        return None
    cause = " ".join(found.group(1).split())
    tasks = re.findall(r"/job:(\w+)(?:/replica:\d+)?/task:(\d+)", cause)
    who = "{} {}".format(*tasks[-1]) if tasks else "another worker"
    return RunError(
        f"{who} is gone or cannot be reached ({cause[:200]}): see its log, then start the same command on every "
        "worker, which goes on from the last checkpoint"
    )


def lacks_memory(error: BaseException) -> str | None:
    """What lacks memory, of a device or the host, by an error's own words; None if it is about something else.

    TensorFlow's ResourceExhaustedError is also about full disks and quotas, which are not meant here.
    """
    if isinstance(error, MemoryError):
        return one_line(error) or "the host has no more"
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None or not isinstance(error, tensorflow.errors.OpError):
        return None
    found = re.search(r"(?i)(?:OOM when|(?:ran )?out of memory|failed to allocate).*", str(error))
    return found.group()[:200] if found else None


def out_of_memory(error: BaseException) -> RunError | None:
    """The one-line error for memory that training does not have; None if the error is about something else."""
    cause = lacks_memory(error)
    if cause is None:
        return None
    return RunError(
        f"out of memory ({cause}): smaller micro-batches need less, train.microbatch_size with another --model_dir or "
        "in Python smaller batches and ConAdvModel(microbatches=N), and batch norm then spans fewer images; or end "
        "whatever else uses the device"
    )
