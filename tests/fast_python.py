"""A `python` that starts with TensorFlow loaded: seconds that every process of a test would spend on the same imports.

`path()` is a program that takes the arguments of python. It asks a server, which has imported the package and has not
begun to run TensorFlow, to fork, and stands for the forked process: it passes signals on, and ends as that one ends.
Killed, it takes the forked process with it. What the server cannot stand for, another PYTHONPATH or a tool that must do
without TensorFlow, is started the usual way.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Imported once, by the server.
MODULES = ("cli", "run.train", "preflight.preflight", "experiments.analysis", "experiments.reproduce")
_PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
# Read when Python or TensorFlow is loaded: with other values a process needs a start of its own.
_EARLY = ("PYTHON", "LANG", "LC_", "LD_", "XLA_", "TF_CPP", "TF_DETERMINISTIC", "TF_ENABLE", "TF_USE", "TF_XLA")

# The program itself; it has to start fast, and knows nothing of this module.
_PROGRAM = """#!{python} -IS
import array, json, os, signal, socket, sys

REAL, SERVER, EARLY, BEFORE, PASSED_ON = {python!r}, {server!r}, {early!r}, {before!r}, {passed_on!r}
arguments = sys.argv[1:]
early = {{name: value for name, value in os.environ.items() if name.startswith(EARLY)}}
program = arguments[0] if arguments else ""
is_ours = program == "-m" and arguments[1].startswith("conadv_tf") and "tpu_compiler" not in arguments[1]
if early != BEFORE or not (is_ours or program == "-c" or program.endswith(".py")):
    os.execv(REAL, [REAL, *arguments])
signals = [getattr(signal, name) for name in PASSED_ON]
ignored = [int(number) for number in signals if signal.getsignal(number) == signal.SIG_IGN]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect(SERVER)
started = {{"program": sys.argv[0], "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}}
text = json.dumps({{**started, "ignored": ignored}}).encode()
standard = array.array("i", [0, 1, 2])
server.sendmsg([len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, standard)])
server.sendall(text)
answers = server.makefile("r")
process = int(answers.readline())
for number in signals:
    if number not in ignored:
        signal.signal(number, lambda number, _: os.kill(process, number))
for number in (0, 1, 2):  # a pipe is closed when the forked process has closed it
    os.close(number)
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
code = int(answers.readline())
if code < 0:
    if -code in signals:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def path() -> str:
    """The program; the server behind it lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="python")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = os.path.join(folder, "server")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(server)
        listening.listen(64)
        # OpenBLAS would start its threads when it is loaded.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path()), "OPENBLAS_NUM_THREADS": "1"}
        lifeline, _held = os.pipe()  # the second end stays open: the server ends with this process
        subprocess.Popen(
            [sys.executable, __file__, str(listening.fileno()), str(lifeline)],
            pass_fds=[listening.fileno(), lifeline],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
        )
        os.close(lifeline)
    before = {name: value for name, value in os.environ.items() if name.startswith(_EARLY)}
    names = {"python": sys.executable, "server": server, "early": _EARLY, "before": before, "passed_on": _PASSED_ON}
    program = os.path.join(folder, "python")
    Path(program).write_text(_PROGRAM.format(**names))
    os.chmod(program, 0o700)
    return program


def _search_path() -> list[str]:
    given = os.environ.get("PYTHONPATH", "")
    return [str(ROOT), *(part for part in given.split(os.pathsep) if part)]


class _Server:
    """Forks a process for each request; `run` returns the request in each of those."""

    def __init__(self, listening: socket.socket, lifeline: int):
        self._listening, self._lifeline = listening, lifeline
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, socket.socket] = {}

    def run(self) -> dict:
        woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for file in (self._listening, self._lifeline, woken):
            self._selector.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._lifeline:
                    self._end()
                elif key.fileobj == woken:
                    os.read(woken, 4096)
                elif key.fileobj is self._listening:
                    request = self._forked(self._listening.accept()[0])
                    if request is not None:
                        return request
                else:
                    self._forget(key.data)
            self._collect()

    def _forked(self, connection: socket.socket) -> dict | None:
        """The request in the forked process, None in this one."""
        head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as reading:
            request = json.loads(reading.read(int.from_bytes(head, "big")))
        process = os.fork()
        if process:
            for number in descriptors:
                os.close(number)
            self._processes[process] = connection
            self._selector.register(connection, selectors.EVENT_READ, process)
            connection.sendall(f"{process}\n".encode())
            return None
        signal.set_wakeup_fd(-1)
        self._selector.close()
        os.close(self._lifeline)
        for other in (self._listening, connection, *self._processes.values()):
            other.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return request

    def _collect(self) -> None:
        while self._processes:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            connection = self._processes.pop(process)
            with contextlib.suppress(KeyError):  # of a program that was killed
                self._selector.unregister(connection)
            with contextlib.suppress(OSError), connection:
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def _forget(self, process: int) -> None:
        """Kills the process whose program is gone."""
        if process in self._processes:
            os.kill(process, signal.SIGKILL)
            self._selector.unregister(self._processes[process])

    def _end(self) -> None:
        for process in self._processes:
            os.kill(process, signal.SIGKILL)
        os._exit(0)


def _become(request: dict) -> None:
    """Makes this process what the request's arguments would start."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for name in _PASSED_ON:
        number = getattr(signal, name)
        usual = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["program"]
    for number, name in ((1, "stdout"), (2, "stderr")):
        errors = "backslashreplace" if number == 2 else "strict"
        line_buffering = number == 2 or os.isatty(number)
        stream = open(number, "w", closefd=False, encoding=sys.stdout.encoding, errors=errors, buffering=1)  # noqa: SIM115
        stream.reconfigure(line_buffering=line_buffering, write_through=bool(os.environ.get("PYTHONUNBUFFERED")))
        setattr(sys, name, stream)


def _execute(arguments: list[str]) -> None:
    program, *rest = arguments
    if program == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    elif program == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")


def _load() -> None:
    for module in MODULES:
        importlib.import_module(f"conadv_tf.{module}")
    from conadv_tf import config

    config.register()
    threads = [Path(f"/proc/self/task/{number}/comm").read_text() for number in os.listdir("/proc/self/task")]
    # jemalloc is made to be forked.
    assert len([name for name in threads if "jemalloc" not in name]) == 1, f"threads cannot be forked: {threads}"
    gc.collect()
    gc.freeze()  # a forked process would walk through what the server loaded, and so copy it


if __name__ == "__main__":
    _load()
    _request = _Server(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
    _become(_request)
    _execute(_request["arguments"])
