"""Table 3 for TPUs, made without one: the time of 90 epochs at 64 images a core, estimated by the preflight."""

import json
import os
import subprocess
import sys

from conadv_tf.errors import RunError
from conadv_tf.experiments import jobs
from conadv_tf.experiments.labels import TABLE3_ESTIMATES
from conadv_tf.experiments.study import METHOD_ROWS, SCALES, TRUE_LABEL

GENERATION = "v3"  # the paper's
IMAGES_PER_CORE = 64
BATCHES = ("16k", "32k", "64k")


def seconds(folder: str, batch: str) -> dict[str, float]:
    """Estimated seconds of the whole recipe by the keys of TABLE3_ESTIMATES; empty before `estimate` has been made."""
    path = os.path.join(_folder(folder, batch), "preflight.json")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        found = json.load(file)["methods"]
    return {
        name: 3600 * method["hours"] for name in TABLE3_ESTIMATES for method in found if method["name"].startswith(name)
    }


def estimate(folder: str, batch: str) -> None:
    """Makes the preflight of ConAdv at a batch size; minutes the first time, seconds once its programs are compiled.

    Raises:
      RunError: if the preflight fails, such as without the TPU compiler.
    """
    cores = 1024 * int(batch.removesuffix("k")) // IMAGES_PER_CORE
    files = [f"--gin_file={file}" for file in SCALES["imagenet"].gin_files(batch, METHOD_ROWS["conadv"])]
    params = [f"--gin_param={TRUE_LABEL}"]
    where = [f"--tpu={GENERATION}-{cores}", "--preflight", f"--model_dir={_folder(folder, batch)}"]
    command = [sys.executable, "-m", "conadv_tf", *files, *params, *where]
    process: subprocess.Popen | None = None
    try:
        with jobs.signals_held_back():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        process.wait()
    except BaseException:
        if process:
            process.terminate()  # it ends its compilers
            process.wait()
        raise
    if process.returncode or not seconds(folder, batch):
        raise RunError(
            f"no estimate of batch {batch} on {GENERATION}-{cores}: its preflight ended with exit code "
            f"{process.returncode}, see above"
        )


def _folder(folder: str, batch: str) -> str:
    return os.path.join(folder, "preflight", batch)
