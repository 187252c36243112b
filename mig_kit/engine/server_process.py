"""Servers that a stage starts for one model, and ends.

A server's command is a parameter, with `{model}` and `{port}` in it, such as
`vllm serve {model} --host 127.0.0.1 --port {port}`.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from mig_kit.openai_client import is_on_this_machine

START_TIMEOUT = 1800  # seconds until a server answers; a large model is read from a slow disk
LOG_TAIL = 8  # last lines of the server's output that an error quotes
# what torchrun tells its processes; a server among them would take itself for one of those
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE",
                      "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS",
                      "ACCELERATE_")


class ServerProcess:
    """A server that `command` runs for one model, on a free port of this machine.

    url: up to and with /v1. Its output goes to the file `log`. When this process ends, in whatever
    way, the server and all that it has started end, too (`guard`). The start only begins it; see
    `wait_until_ready`.
    """

    def __init__(self, command: str, model: str | Path, log: Path):
        port = _free_port()
        words = [word.replace("{model}", str(model)).replace("{port}", str(port))
                 for word in shlex.split(command)]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(LAUNCHER_VARIABLES)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mig_kit.engine.guard", *words], stdin=subprocess.PIPE,
                stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True)  # else a signal to the stage's group would end the guard

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Return when the server answers; RuntimeError with its last lines if it ends before, or
        does not answer in time.
        """
        deadline = time.monotonic() + timeout
        while not is_ready(self.url):
            if failure := self.failure():
                raise RuntimeError(failure)
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not answer within {timeout:.0f} s; "
                                   f"{self._last_lines()}")
            time.sleep(0.5)

    def failure(self) -> str:
        """One sentence if the server has ended, else ""."""
        status = self.process.poll()
        if status is None:
            return ""
        return f"the server's command ended with status {status}; {self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_TAIL:]
        return f"the last lines of {self.log}:\n" + "\n".join(line[:300] for line in lines)

    def close(self) -> None:
        """End the server and all that it has started."""
        self.process.stdin.close()
        self.process.wait()


def is_ready(url: str) -> bool:
    """Whether the server at `url` answers /health, or /v1/models where it has no /health."""
    proxies = {} if is_on_this_machine(url) else None  # None: those that the environment names
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    for address in (f"{url.removesuffix('/v1')}/health", f"{url}/models"):
        try:
            with opener.open(address, timeout=10) as response:
                return response.status == 200
        except urllib.error.HTTPError as error:
            if error.code not in (404, 405):
                return error.code in (401, 403)  # it answers, and wants a key
        except OSError:
            return False
    return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
