"""The TPU worker of one host, through which a process on the first host drives a slice of several.

    conadv-tpu-worker --type=v6e-16                     on every host of the slice, until SIGTERM or Ctrl-C
    conadv-tpu-worker --cpu_devices=4 --port=9001       on any machine, to rehearse a slice without a TPU

It is for v6e. TensorFlow 2.20's own worker (tensorflow/python/tools/grpc_tpu_worker.py, lines 69 to 94) looks the
bounds of a slice up by its type: it has those of v2 and v3, leaves those of v4 and v5 to the TPU's library, and ends
with a KeyError for any other. This one leaves them to the library too. It tells the library which host of the slice
this is, and serves TensorFlow on a port. Data, recipe and Python of a run stay with the process that drives it.
"""

import argparse
import os
import urllib.request
from collections.abc import Sequence
from typing import Any

from conadv_tf import peers, terminal
from conadv_tf.errors import ConfigError, RunError, one_line
from conadv_tf.run import tpu_runtime

PORT = 8470  # where TPUClusterResolver looks for a worker
_METADATA_SECONDS = 10


def place_in_slice() -> dict[str, str]:
    """The variables that tell the TPU's library which host of which slice this is.

    They are taken from the environment, where Kubernetes puts them, or else from the metadata of the machine.

    Raises:
      RunError: where neither says it.
    """
    number = os.environ.get("TPU_WORKER_ID") or _metadata("agent-worker-number").strip()
    # Each endpoint is "unknown:unknown:10.0.0.2", or has the number of the host in the place of the first word.
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES") or ",".join(
        endpoint.split(":")[-1] for endpoint in _metadata("worker-network-endpoints").strip().split(",")
    )
    names = hosts.split(",")
    if not number.isdigit() or int(number) >= len(names):
        raise RunError(
            f"worker {number!r} is none of the slice's hosts {hosts}: correct TPU_WORKER_ID and TPU_WORKER_HOSTNAMES"
        )
    return {
        "TPU_WORKER_ID": number,
        "TPU_WORKER_HOSTNAMES": hosts,
        "TPU_HOSTNAME_OVERRIDE": names[int(number)],
    }


def _metadata(name: str) -> str:
    """An attribute of this machine, from the server that every machine of Google Cloud can ask."""
    server = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except OSError as error:
        raise RunError(
            f"{server} does not say {name} of this machine ({one_line(error)}): start on a host of a TPU slice, set "
            "TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, or rehearse with --cpu_devices=N"
        ) from error


def serve(port: int, cpu_devices: int = 0) -> Any:
    """Starts a TensorFlow server with the devices of this machine; it runs while what is returned lives.

    Args:
      port: where it listens.
      cpu_devices: the CPU devices that it shows; 0: what TensorFlow finds, one CPU and the chips.

    Raises:
      OSError: where the port is taken.
    """
    # The variables of the TPU must be set by now.
    import tensorflow as tf

    peers.check_free(port)
    config = tf.compat.v1.ConfigProto(device_count={"CPU": cpu_devices} if cpu_devices else {})
    cluster = tf.train.ClusterSpec({"tpu_worker": [f"localhost:{port}"]})
    return tf.distribute.Server(cluster, job_name="tpu_worker", task_index=0, config=config)


def _set_up_for(accelerator: str) -> None:
    """Sets what TensorFlow and the TPU's library need on a host of a slice; what is set already stays."""
    parsed = tpu_runtime.parse_accelerator_type(accelerator)
    if parsed is None or not tpu_runtime.needs_pjrt(parsed[0]):
        raise ConfigError(
            f"--type={accelerator} is no type of a slice for this worker: write one such as v6e-16; "
            "TensorFlow's own, start_grpc_tpu_worker, is for v2 to v4"
        )
    os.environ.update(tpu_runtime.unset(tpu_runtime.variables(parsed[0]) | place_in_slice()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT, which end the process; returns an exit code where it cannot serve."""

    def work() -> None:
        parsed = _arguments(arguments)
        if parsed.type:
            _set_up_for(parsed.type)
        server = serve(parsed.port, parsed.cpu_devices or 0)  # it lives as long as this name
        what = parsed.type or f"{parsed.cpu_devices} CPU{'s' if parsed.cpu_devices > 1 else ''}, for a rehearsal,"
        peers.wait_for_a_signal(f"serving {what} at {server.target}")
        terminal.say("stopped")
        os._exit(0)  # a server waits for clients, which may never let go

    return terminal.exit_code(work, "nothing is served", "choose another --port, or end what listens there")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Parser(
        prog="conadv-tpu-worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--type", default="", help="accelerator type of the slice that this is a host of")
    what.add_argument("--cpu_devices", type=int, help="serve so many CPU devices, and no TPU")
    parser.add_argument("--port", type=int, default=os.environ.get("TPU_TASK_PORT") or PORT, help="to listen on")
    parsed = parser.parse_args(arguments)
    if parsed.cpu_devices is not None and parsed.cpu_devices < 1:
        raise ConfigError(f"--cpu_devices={parsed.cpu_devices} must be a whole number of at least 1")
    return parsed


if __name__ == "__main__":
    raise SystemExit(main())
