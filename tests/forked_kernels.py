"""Kernels that do not import the large libraries once more.

A kernel takes nine seconds of a core to import PyTorch, transformers and TRL. Here one process has
imported them, and a kernel is a fork of it, which imports the kit itself anew.
`python forked_kernels.py SOCKET CONNECTION_FILE` is the command of such a kernel.
"""

import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serve_kernels():
    """While it lasts, the command that it gives starts a kernel of this Python."""
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        address = str(Path(folder) / "socket")
        server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE)
        assert server.stdout.readline() == b"ready\n"
        try:
            yield [sys.executable, "-I", __file__, address, "{connection_file}"]
        finally:
            server.terminate()
            server.wait()


def fork_kernels(address: str) -> None:
    """Fork a kernel for everyone who asks, until the tests end."""
    del sys.path[0]  # the tests
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # as a kernel sets it
    for name in ("mig_kit.stages", "mig_kit.lab"):
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)
    from ipykernel import kernelapp

    for name in [name for name in sys.modules if name.partition(".")[0] == "mig_kit"]:
        del sys.modules[name]
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    server.settimeout(1)
    signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))
    print("ready", flush=True)
    tests = os.getppid()
    while os.getppid() == tests:
        try:
            caller, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork():
            caller.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        caller.settimeout(None)
        connection_file, folder, environment = json.loads(caller.makefile().readline())
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = ["-f", connection_file, "--log-level=ERROR"]
        return kernelapp.launch_new_instance()


def ask_for_kernel(address: str, connection_file: str) -> None:
    """Be the process of a kernel: end when it does, not at the interrupt before its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([connection_file, os.getcwd(), dict(os.environ)])
        server.sendall(request.encode() + b"\n")
        server.recv(1)  # nothing comes before the kernel's end


if __name__ == "__main__":
    if sys.argv[2:]:
        ask_for_kernel(*sys.argv[1:3])
    else:
        fork_kernels(sys.argv[1])
