"""The files of a run that people and programs read: config.gin, metrics.jsonl, result.json."""

import contextlib
import json
import os
import statistics

import numpy as np
import tensorflow as tf
import tf_keras

from conadv_tf.errors import RunError
from conadv_tf.version import __version__


class RunFolder:
    """`model_dir`: local or gs://. Every text file is replaced whole, never half written.

    Args:
      path: of the folder, which is made.
      writes: False for a worker beside the chief: it reads, and its writes are dropped.

    Raises:
      RunError: if the folder cannot be made or written.
    """

    def __init__(self, path: str, writes: bool = True):
        self.path, self.writes = path, writes
        if not writes:
            return
        with contextlib.suppress(tf.errors.OpError, OSError):
            tf.io.gfile.makedirs(path)  # what goes wrong here, writing says
        self._write(".writable", "")
        tf.io.gfile.remove(self.file(".writable"))

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read_config(self) -> str | None:
        """The operative configuration of the run in the folder; None if there is none yet."""
        return self._read("config.gin")

    def write_config(self, text: str) -> None:
        self._write("config.gin", text)

    def read_result(self) -> dict | None:
        """The result of a finished run; None if it has not finished."""
        text = self._read("result.json")
        return json.loads(text) if text else None

    def write_result(self, result: dict) -> None:
        self._write("result.json", json.dumps(result, indent=2) + "\n")

    def read_metrics(self) -> list[dict]:
        """One dict an epoch; see `Recorder`."""
        return [json.loads(line) for line in (self._read("metrics.jsonl") or "").splitlines()]

    def write_metrics(self, epochs: list[dict]) -> None:
        self._write("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def _read(self, name: str) -> str | None:
        if not tf.io.gfile.exists(self.file(name)):
            return None
        with tf.io.gfile.GFile(self.file(name)) as file:
            return file.read()

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        partial = self.file(name + ".partial")
        try:
            with tf.io.gfile.GFile(partial, "w") as file:
                file.write(text)
            tf.io.gfile.rename(partial, self.file(name), overwrite=True)
        except (tf.errors.OpError, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise RunError(
                f"--model_dir={self.path} cannot be written ({cause}): choose a folder you may write"
            ) from error


def evaluation_result(splits: dict[str, dict[str, float]]) -> dict[str, float]:
    """Accuracies in percent over exactly every image of each split, and the gap of train and test in points."""
    top1 = {f"{split}_top1": _percent(means["top1"]) for split, means in splits.items()}
    gap = round(top1["train_top1"] - top1["test_top1"], 4)
    return {**top1, "test_top5": _percent(splits["test"]["top5"]), "generalization_gap": gap}


def speed_result(epochs: list[dict]) -> dict[str, float]:
    """Median clean training images/s of the epochs, and the seconds of training in all of them."""
    rates = [epoch["images_per_second"] for epoch in epochs if epoch["images_per_second"]]
    return {
        "images_per_second": round(statistics.median(rates), 2) if rates else 0.0,
        "wall_seconds": round(sum(epoch["seconds"] for epoch in epochs), 2),
    }


def theory_result(epochs: list[dict]) -> dict[str, float]:
    """Each value of monitor.py by its name without "theory_": its mean over the epochs that it was measured in.

    Of mean_squared_gradient_norm, which is an average over the run already, the last.
    """
    names = sorted({name for epoch in epochs for name in epoch if name.startswith("theory_")})
    measured = {name: [epoch[name] for epoch in epochs if name in epoch] for name in names}
    means = {name.removeprefix("theory_"): statistics.mean(values) for name, values in measured.items()}
    if "mean_squared_gradient_norm" in means:
        means["mean_squared_gradient_norm"] = measured["theory_mean_squared_gradient_norm"][-1]
    return {name: float(f"{value:.6g}") for name, value in means.items()}


def versions() -> dict[str, str]:
    """Of what the weights depend on."""
    return {
        "conadv_tf": __version__,
        "tensorflow": tf.__version__,
        "tf_keras": tf_keras.__version__,
        "numpy": np.__version__,
    }


def result_text(result: dict) -> str:
    """The result for a person."""
    setting = f"{result['method']}"
    if result["schedule"]:
        setting += f" ({result['schedule']}, tau {result['tau']})"
    if result["epsilon"] is not None:
        setting += f", epsilon {result['epsilon']:g}"
    return (
        f"{result['recipe']}: {setting}; batch {result['global_batch_size']:,}, {result['epochs']} epochs, "
        f"{result['steps']:,} updates\n"
        f"  test top-1 {result['test_top1']:.2f} %   top-5 {result['test_top5']:.2f} %   "
        f"train top-1 {result['train_top1']:.2f} %   gap {result['generalization_gap']:.2f} points\n"
        f"  {result['images_per_second']:,.0f} images/s, {result['wall_seconds']:,.0f} s"
    )


def _percent(share: float) -> float:
    return round(100.0 * float(share), 4)
