"""Paths are names of files and folders, never patterns.

TensorFlow's file functions take names, with two exceptions: tf.io.gfile.glob, and whatever reads a checkpoint, which
looks for the checkpoint's index as for a pattern. `matching`, and `readable` and `readable_folder`, stand in their
place. A pattern with brackets or a backslash does not find the name that it is; one with a star or a question mark
finds other names too.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from conadv_tf.errors import ConfigError, RunError, one_line

# On Windows the backslash parts folders, and TensorFlow's patterns know no brackets.
_SPECIAL = re.compile(r"[*?[\\]" if os.sep == "/" else r"[*?]")

PARTIAL = ".partial"  # the end of the name of what is not whole yet


def given(path: str, any_bytes: bool = False) -> str:
    """The path that a person has written: `~` and `~user` at its beginning are home folders.

    Args:
      path: local or gs://.
      any_bytes: whether the path may be other than UTF-8, as TensorFlow's file functions take it.

    Raises:
      ConfigError: if there is no such user, or the path is not UTF-8.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        user = path[1:].split(os.sep)[0]
        raise ConfigError(f"no user {user} has a home folder here: write ./{path} for a folder of that name")
    if not any_bytes and expanded != expanded.encode(errors="replace").decode():
        raise ConfigError(f"{expanded!r} is not UTF-8, and TensorFlow takes no other names: rename it")
    return expanded


def is_remote(path: str) -> bool:
    """Tells whether a path is of another file system of TensorFlow's, such as gs://."""
    return "://" in path


def opened(path: str) -> BinaryIO:
    """A file, local or gs://, opened to read its bytes. A local one takes no TensorFlow.

    Raises:
      OSError, tf.errors.OpError: if the file cannot be opened; of a remote one, reading it raises.
    """
    if not is_remote(path):
        return open(path, "rb")  # not by GFile, which reads 512 KB at every seek
    import tensorflow as tf

    return tf.io.gfile.GFile(path, "rb")


def read_text(path: str) -> str | None:
    """The text of a file, local or gs://, without Windows' mark before UTF-8; None where there is no file.

    A local one takes no TensorFlow.

    Raises:
      OSError, tf.errors.OpError: if the file cannot be read.
      UnicodeDecodeError: if it is not UTF-8.
    """
    if not exists(path):
        return None
    with opened(path) as file:
        return file.read().decode("utf-8-sig")


def write_whole(path: str, content: str | bytes) -> None:
    """Writes a file, local or gs://, whole or not at all: who reads it finds what was there before, or all of this.

    What is stopped on the way leaves PATH.partial. Two processes must not write one path at once.

    Raises:
      OSError, tf.errors.OpError: if the file cannot be written.
    """
    import tensorflow as tf

    partial = path + PARTIAL
    with tf.io.gfile.GFile(partial, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
    tf.io.gfile.rename(partial, path, overwrite=True)


def exists(path: str) -> bool:
    """Tells whether a file or folder is there, local or gs://. A local one takes no TensorFlow."""
    if not is_remote(path):
        return os.path.exists(path)
    import tensorflow as tf

    return tf.io.gfile.exists(path)


def matching(folder: str, pattern: str) -> list[str]:
    """Lists the files below a folder that match a glob pattern, sorted; the folder's name is as given.

    Args:
      folder: local or gs://.
      pattern: pattern below the folder; an absolute one is taken as it is.
    """
    import tensorflow as tf

    if os.path.isabs(pattern):
        return sorted(tf.io.gfile.glob(pattern))
    # tf.io.gfile.glob finds nothing below "a//" or "a/.".
    plain = folder if is_remote(folder) else os.path.realpath(folder)
    found = tf.io.gfile.glob(os.path.join(_SPECIAL.sub(r"\\\g<0>", plain), pattern))
    return sorted(os.path.join(folder, path[len(os.path.join(plain, "")) :]) for path in found)


def absolute(path: str) -> str:
    """The path from the root, which means the same in every working directory; a remote one as it is."""
    return path if is_remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def readable(checkpoint: str) -> Iterator[str]:
    """Gives a name by which TensorFlow reads a checkpoint; it is good within the context.

    It is the checkpoint's own, unless that has a special character. TensorFlow then needs another name: escaped, it is
    found, but not opened.

    Args:
      checkpoint: the path without .index, local or gs://. A remote one with a special character is copied to this host.

    Raises:
      RunError: if a checkpoint cannot be given another name.
    """
    with _renamed(checkpoint, lambda plain: _give_checkpoint(checkpoint, plain)) as plain:
        yield plain


@contextlib.contextmanager
def readable_folder(folder: str) -> Iterator[str]:
    """Gives a name by which TensorFlow reads a folder with a checkpoint in it, such as a SavedModel; see `readable`.

    Raises:
      RunError: if the folder cannot be given another name.
    """
    with _renamed(folder, lambda plain: _give_folder(folder, plain)) as plain:
        yield plain


@contextlib.contextmanager
def _renamed(path: str, give: Callable[[str], None]) -> Iterator[str]:
    """Gives a path; of one with special characters a temporary one, to which `give` brings what is there."""
    if not _SPECIAL.search(path):
        yield path
        return
    import tensorflow as tf

    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(tempfile.TemporaryDirectory(dir=_temporary_folder()))
            plain = os.path.join(place, "plain")
            give(plain)
        except (OSError, tf.errors.OpError) as error:
            raise RunError(
                f"{path}, whose name TensorFlow reads as a pattern, cannot be given another one below TMPDIR "
                f"({one_line(error)}): make room there, or take * ? [ and \\ out of its folder's name"
            ) from error
        yield plain


def _temporary_folder() -> str:
    folder = tempfile.gettempdir()
    return os.path.join(os.sep, "tmp") if _SPECIAL.search(folder) else folder


def _give_checkpoint(checkpoint: str, plain: str) -> None:
    import tensorflow as tf

    folder, name = os.path.split(checkpoint)
    for file in tf.io.gfile.listdir(folder or ".") if tf.io.gfile.isdir(folder or ".") else ():
        if file.startswith(f"{name}."):
            _give(os.path.join(folder, file), plain + file[len(name) :])


def _give_folder(folder: str, plain: str) -> None:
    import tensorflow as tf

    if not is_remote(folder):
        _give(folder, plain)
        return
    for found, _, files in tf.io.gfile.walk(folder):
        place = os.path.join(plain, found[len(folder) :].strip("/"))
        os.makedirs(place)
        for file in files:
            _give(os.path.join(found, file), os.path.join(place, file))


def _give(path: str, plain: str) -> None:
    """Links a file or folder to another path; a remote file is copied."""
    import tensorflow as tf

    if is_remote(path):
        tf.io.gfile.copy(path, plain)
    else:
        os.symlink(os.path.realpath(path), plain)
