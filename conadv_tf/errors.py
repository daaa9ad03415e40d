"""Errors a user can cause, each one line: the value, the cause, the remedy.

The command line prints them without a traceback (`cli.py`) and ends with `exit_code`.
"""


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

    As KeyboardInterrupt no Exception: a signal comes anywhere, and is no fault of what it came in.
    """

    exit_code = 75


def one_line(error: Exception) -> str:
    """The cause that an error tells, for a line of our own."""
    return " ".join(str(error).split())[:200]
