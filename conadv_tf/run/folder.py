"""The folder of a run: config.gin, metrics.jsonl, result.json and what else people and programs read."""

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from typing import Any

from conadv_tf import paths
from conadv_tf.data.fingerprint import Fingerprint
from conadv_tf.errors import RunError, file_errors, one_line

# TensorFlow is imported where it is used: a tool that only reads local folders does without.


EXPORT, SAVED_MODEL = "export", "saved_model.pb"


class RunFolder:
    """`model_dir`: local or gs://. Every text file is replaced whole, never half written.

    Reading raises RunError for a file that is damaged or out of reach.

    Args:
      path: path of the folder.
      writes: False for a worker beside the chief: it reads, and its writes are dropped.
    """

    def __init__(self, path: str, writes: bool = True):
        self.path, self.writes = path, writes

    def make(self) -> None:
        """Makes the folder, where there is none, and tries to write to it. Another process may do so meanwhile.

        Raises:
          RunError: if the folder cannot be made or written.
        """
        if not self.writes:
            return
        import tensorflow as tf

        with contextlib.suppress(*file_errors()):
            tf.io.gfile.makedirs(self.path)  # writing tells what goes wrong here
        name = f".writable-{uuid.uuid4().hex}"  # its own: another start, which finds the folder in use, tries too
        try:
            self._write(name, "yes\n")  # not empty: a full disk has room for an empty file
        finally:
            for left in (name, name + paths.PARTIAL):
                with contextlib.suppress(*file_errors()):
                    tf.io.gfile.remove(self.file(left))

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read_config(self) -> str | None:
        """The operative configuration of the run in the folder; None if there is none yet."""
        return self._read("config.gin")

    def write_config(self, text: str) -> None:
        self._write("config.gin", text)

    def read_result(self) -> dict | None:
        """The result of a finished run; None if the run has not finished."""
        return self._parsed("result.json", json.loads)

    def write_result(self, result: dict) -> None:
        self._write("result.json", json.dumps(result, indent=2) + "\n")

    def read_divergences(self) -> list[dict]:
        """The updates that were not finite and that the run went back from, in their order; see `train`."""
        return self._parsed("divergences.json", json.loads) or []

    def write_divergences(self, divergences: list[dict]) -> None:
        self._write("divergences.json", json.dumps(divergences, indent=2) + "\n")

    def read_layout(self) -> dict | None:
        """The way the run was spread over replicas when it was last started; see `resuming.spread_of`."""
        return self._parsed("layout.json", json.loads)

    def write_layout(self, layout: dict) -> None:
        self._write("layout.json", json.dumps(layout) + "\n")

    def read_data(self) -> Fingerprint | None:
        """The fingerprint of the data that the run was last started on; None in a folder of an earlier version."""
        return self._parsed("data.json", Fingerprint.from_text)

    def write_data(self, data: Fingerprint) -> None:
        self._write("data.json", data.to_text())

    def write_preflight(self, content: dict) -> None:
        self._write("preflight.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_metrics(self) -> list[dict]:
        """The metrics, a dict an epoch; see `callbacks.Recorder`."""
        return self._parsed("metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()]) or []

    def write_metrics(self, epochs: list[dict]) -> None:
        self._write("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def _parsed(self, name: str, parse: Callable[[str], Any]) -> Any:
        """The content of a file; None where there is no file, or an empty one."""
        text = self._read(name)
        try:
            return parse(text) if text else None
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _read(self, name: str) -> str | None:
        try:
            return paths.read_text(self.file(name))
        except UnicodeDecodeError as error:
            raise self._damaged(name, error) from error
        except file_errors() as error:
            raise RunError(
                f"{self.file(name)} cannot be read ({one_line(error)}): mend that, and start the same command again"
            ) from error

    def _damaged(self, name: str, error: Exception) -> RunError:
        return RunError(f"{self.file(name)} is damaged ({one_line(error)}): bring it back, or pass another --model_dir")

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        try:
            paths.write_whole(self.file(name), text)
        except file_errors() as error:
            raise RunError(
                f"--model_dir={self.path} cannot be written ({one_line(error)}): make room, or choose a folder you may "
                "write"
            ) from error


def export_in(path: str) -> str | None:
    """The folder of the SavedModel that a path names: its own, or that of the run there; None where there is none."""
    for folder in (path, os.path.join(path, EXPORT)):
        if paths.exists(os.path.join(folder, SAVED_MODEL)):
            return folder
    return None


def recorded(value: float) -> float:
    """The value that metrics.jsonl keeps: six significant digits."""
    return float(f"{float(value):.6g}")
