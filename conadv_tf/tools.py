"""What the tools beside train.py share: how they read their arguments, and how they end."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import tensorflow as tf

from conadv_tf import records, terminal
from conadv_tf.errors import ConfigError, DataError, RunError, one_line


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it. Raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the arguments)")


def exit_code(work: Callable[[], int | None], interrupted: str, remedy: str) -> int:
    """Does the work of a tool and says on one line of stderr what went wrong.

    Args:
      work: returns an exit code; None is 0.
      interrupted: what Ctrl-C leaves.
      remedy: for files that cannot be read or written.

    Returns:
      0, 2 for arguments and settings, 1 for data and files, 130 after Ctrl-C, or what `work` returns.
    """
    try:
        return work() or 0
    except (ConfigError, DataError, RunError) as error:
        failure: ConfigError | DataError | RunError = error
    except (OSError, tf.errors.OpError) as error:
        failure = records.data_error(error) or RunError(f"{one_line(error)}: {remedy}")
    except KeyboardInterrupt:
        terminal.say(f"\ninterrupted: {interrupted}", sys.stderr)
        return 130
    # gin appends lines of its own about the call the error came from.
    terminal.say(f"error: {str(failure).splitlines()[0]}", sys.stderr)
    return failure.exit_code
