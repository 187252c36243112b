"""Servers of a model: a stage starts one by a command, or uses those whose addresses it is given.

A command holds `{model}` and `{port}`: `vllm serve {model} --host 127.0.0.1 --port {port}`.
"""

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from transformers import GenerationConfig

from mig_kit.boxes import BoxFormat
from mig_kit.models.model_folders import ServedName, load_config
from mig_kit.models.processors import load_processor
from mig_kit.openai_client import Connection, RequestFailed, parse_server, read_api_key
from mig_kit.pipeline.processes import describe_exit
from mig_kit.serving.server import REMEDIES, ServedModel, Server
from mig_kit.shared_prefix.generation import end_token_ids

START_TIMEOUT = 1800  # seconds until a server answers; a large model is read from a slow disk
TIMEOUT = 900.0  # seconds without a sign of a server
LISTED_MODELS = 12  # of a server, in a sentence
START = "start it first, or take it out of server"
LOG_TAIL = 8  # last lines of the server's output that an error quotes
# torchrun's: a server that is started by one of its processes must not take itself for one
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE",
                      "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS",
                      "ACCELERATE_")


class ServerProcess:
    """A server that `command` starts for a model on a free port; it ends with this process.

    log: file of its output. `url` is its address with /v1; see `wait_until_ready`.
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
                [sys.executable, "-m", "mig_kit.training.guard", *words], stdin=subprocess.PIPE,
                stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True)  # else a signal to the stage's group would end the guard

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Return when the server answers; RuntimeError if it ends before, or takes too long."""
        deadline = time.monotonic() + timeout
        with closing(Connection(self.url, read_api_key(), TIMEOUT)) as connection:
            while not connection.is_ready():
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
        return f"the server's command {describe_exit(status)}; {self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_TAIL:]
        return f"the last lines of {self.log}:\n" + "\n".join(line[:300] for line in lines)

    def close(self) -> None:
        """End the server and all that it has started."""
        self.process.stdin.close()
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _load_generation_config(model: str | Path) -> GenerationConfig:
    """The model's generation_config.json, or else what its config.json says."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(load_config(model))


@contextmanager
def serve_model(server: str, concurrency: int, model: str | Path, system: str,
                box_format: BoxFormat, log: Path) -> Iterator[ServedModel]:
    """Opens a model on servers; a server that is started here ends with the context.

    Args:
        server: addresses or a command, see `parse_server`.
        model: a folder, a hub name or a ServedName.
        system: another name by which a server may serve the model.
        log: file of the output of a server that is started.
    Raises: ValueError for a `server` that is neither; RuntimeError if no server has the model.
    """
    key, urls = read_api_key(), parse_server(server)
    processor, end_tokens = None, []
    if not isinstance(model, ServedName):
        processor = load_processor(model, box_format)
        end_tokens = end_token_ids(_load_generation_config(model), processor)
    with ExitStack() as stack:
        failure, is_own = str, not urls
        if is_own:
            process = stack.enter_context(closing(ServerProcess(server, model, log)))
            process.wait_until_ready()
            urls, failure = [process.url], process.failure
        servers = [Server(url, stack.enter_context(closing(Connection(url, key, TIMEOUT))),
                          form=0 if processor else 1) for url in urls]
        names = (str(model), str(Path(model).resolve()), system)
        name = _find_served_name(servers, names, is_own)
        chosen = [server for server in servers if name in server.models]
        yield ServedModel(name, chosen, concurrency, processor, box_format, end_tokens, failure)


def _find_served_name(servers: list[Server], names: tuple[str, ...], is_own: bool) -> str:
    """The one of `names` under which a server lists the model; RuntimeError if none does."""
    failures = []
    for server in servers:
        try:
            server.models = server.connection.list_models()
        except RequestFailed as failure:
            failures.append(f"the server {server.url} does not list its models: {failure}; "
                            f"{REMEDIES.get(failure.status, START)}")
    served = {model for server in servers for model in server.models}
    name = next((name for name in names if name in served), None)
    if is_own:  # it holds the model under any name, and may list nothing
        servers[0].models = (name or (served.pop() if len(served) == 1 else names[0]),)
        return servers[0].models[0]
    if len(failures) == len(servers):
        raise RuntimeError(failures[0])
    for failure in failures:
        print(f"{failure}; it is left out", flush=True)
    if name is None:
        listed = ", ".join(sorted(served)[:LISTED_MODELS]) or "models that it does not list"
        others = f" and {len(served) - LISTED_MODELS} more" if len(served) > LISTED_MODELS else ""
        raise RuntimeError(
            f"no server serves the model {names[0]}, but only {listed}{others}; use one of these "
            f"names, start a server with this folder, or with --served-model-name {names[-1]} "
            "where it has another path, or give a command with {model} and {port}")
    return name
