"""Rollouts that servers draw for stage 05, and the correction that they need.

Once per update the adapter is saved and loaded by the servers under a new name. They compute in
other numbers than the learner, so every reply brings the log-probabilities with which it was drawn,
and TRL weights the loss by their ratio to the learner's own.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mig_kit.boxes import BoxFormat
from mig_kit.common import apply_umask, file_sha256
from mig_kit.engine.server import Question, ServedModel, serve_model
from mig_kit.openai_client import RequestFailed
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions
from mig_kit.shared_prefix.prompt_cache import Prompt

SERVED_ADAPTERS = "served"  # folder of the adapters that servers load, beside the checkpoints
SAMPLING_CURVES = {
    "sampling/importance_sampling_ratio/mean": "ratio", "sampling/staleness": "staleness",
    "sampling/adapter_version": "adapter"}


class ServedRollouts:
    """Draws a trainer's completions from servers, and keeps their adapter up to date.

    folder: the stage's. model: the folder that servers hold and the adapter belongs to. version:
    the update, from 1, for which the servers' adapter was saved.
    """

    def __init__(self, model: str | Path, box_format: BoxFormat, folder: Path,
                 params: SimpleNamespace):
        self.model, self.box_format, self.folder, self.params = model, box_format, folder, params
        self.served: ServedModel | None = None
        self.version, self.adapter = 0, ""
        self.context = ExitStack()

    def draw(self, trainer, samples: list[Sample], prompts: list[Prompt], group: int,
             sampling: SamplingOptions) -> tuple[list[list[int]], list[list[float]]]:
        """`group` completions to each prompt, in sequence, with the adapter as it is: token ids,
        and the log-probability with which each token was drawn.

        One without an end token is cut. RuntimeError for a stale adapter or other prompt ids.
        """
        if self.served is None:
            self._open(trainer.accelerator)
        if self.version != trainer.state.global_step + 1:
            self._sync(trainer)
        questions = [Question(sample, group, prompt.ids.tolist())
                     for sample, prompt in zip(samples, prompts)]
        answers = {id(question): replies for question, replies
                   in self.served.ask(questions, sampling, with_logps=True)}
        replies = [reply for question in questions for reply in answers[id(question)]]
        log = trainer._metrics["train"]
        log["sampling/staleness"].append(float(trainer.state.global_step + 1 - self.version))
        log["sampling/adapter_version"].append(float(self.version))
        return [reply.ids for reply in replies], [reply.logps for reply in replies]

    def close(self) -> None:
        """End a server that this has started."""
        self.context.close()
        self.served = None

    def _open(self, accelerator: Accelerator) -> None:
        """Reach the servers; a command is started once, by the first process of all."""
        server = self.params.server
        if accelerator.is_main_process:
            self._enter(server)
            server = " ".join(server.url for server in self.served.servers)
        server = broadcast_object_list([server])[0]
        if not accelerator.is_main_process:
            self._enter(server)

    def _enter(self, server: str) -> None:
        self.served = self.context.enter_context(serve_model(
            server, self.params.concurrency, self.model, "sft", self.box_format,
            self.folder / "server_grpo.log"))

    def _sync(self, trainer) -> None:
        """Have all servers draw with the adapter of this update: step-<update>-<its hash>.

        A server keeps what it has read of a prompt under the adapter's name. So one that goes on
        after a kill must not give new weights an old name.
        """
        version, before, name = trainer.state.global_step + 1, self.adapter, ""
        if trainer.accelerator.is_main_process:
            folder = self.folder / "checkpoints" / SERVED_ADAPTERS
            saved = folder / f"step-{version}"
            model = trainer.accelerator.unwrap_model(trainer.model)
            model.save_pretrained(saved, safe_serialization=True)
            apply_umask(saved)  # a server may be another user's
            name = f"{saved.name}-{file_sha256(saved / 'adapter_model.safetensors')[:8]}"
            self._load(name, saved.resolve(), before)
            for old in folder.iterdir():
                if old.name not in (saved.name, before.rpartition("-")[0]):
                    shutil.rmtree(old)  # not read any more
        self.adapter = broadcast_object_list([name])[0]
        self.served.name, self.version = self.adapter, version

    def _load(self, name: str, path: Path, before: str) -> None:
        """Load an adapter at every server, and unload the one before.

        A server that outlived a killed stage may hold it already: the name has the weights' hash.
        One that was started again does not hold the one before.
        """
        for server in (server for server in self.served.servers if server.is_alive):
            try:
                listed = server.connection.list_models()
                if name not in listed:
                    server.connection.post("/load_lora_adapter",
                                           {"lora_name": name, "lora_path": str(path)})
                if before in listed:
                    server.connection.post("/unload_lora_adapter", {"lora_name": before})
            except RequestFailed as failure:
                if failure.status:
                    raise RuntimeError(self._refusal(server.url, name, failure)) from None
                server.is_alive = False
                print(f"the server {server.url} is left out: it does not load {name}",
                      flush=True)

    def _refusal(self, url: str, name: str, failure: RequestFailed) -> str:
        return (f"the server {url} does not take the adapter {name} ({failure}); vLLM needs "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, --enable-lora, "
                f"--max-lora-rank {self.params.lora_r} or more and this machine's disk")
