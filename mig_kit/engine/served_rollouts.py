"""Rollouts that servers draw for stage 05, and the correction that they need.

Once per update the adapter is saved and loaded by the servers under a new name. They compute in
other numbers than the learner, so every reply brings the log-probabilities with which it was drawn,
and the loss is weighted by the ratio to the learner's own: TRL's importance-sampling correction,
with its names and defaults. The learner's come from the pass that learns, so that there is no pass
more.
"""

import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import openai
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mig_kit.boxes import BoxFormat
from mig_kit.common import apply_umask, file_sha256
from mig_kit.engine.generation import Sampling
from mig_kit.engine.prompt_cache import Prompt
from mig_kit.engine.server import (
    Question,
    ServedModel,
    asyncio_run,
    list_models,
    serve_model,
)
from mig_kit.openai_client import authorization_header, first_line, open_client, redact
from mig_kit.sample import Sample

LOAD_TIMEOUT = 600.0  # seconds to load an adapter
SERVED_ADAPTERS = "served"  # folder of the adapters that servers load, beside the checkpoints
SAMPLING_CURVES = {
    "sampling/importance_sampling_ratio/mean": "ratio", "sampling/staleness": "staleness",
    "sampling/adapter_version": "adapter"}


def importance_ratio(logps: torch.Tensor, sampling_logps: torch.Tensor, mask: torch.Tensor,
                     mode: str = "sequence_mask", clip_max: float | None = 3.0,
                     clip_min: float | None = None) -> torch.Tensor:
    """pi_learner / pi_server, as TRL computes it: (rows, 1) in sequence modes, else (rows, tokens).

    logps, sampling_logps, mask: (rows, tokens). *_truncate clips ratios to [clip_min, clip_max],
    *_mask sets those outside to 0. A token without a number of the server's counts as ratio 1.
    """
    difference = torch.nan_to_num((logps - sampling_logps) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(clip_min, clip_max)
    lowest = -math.inf if clip_min is None else clip_min
    highest = math.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < lowest) | (ratio > highest), 0.0)


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
        self.logps: list[list[float]] = []  # of the last draw
        self.context = ExitStack()

    def draw(self, trainer, samples: list[Sample], prompts: list[Prompt], group: int,
             sampling: Sampling) -> list[list[int]]:
        """Token ids of `group` completions to each prompt, in sequence, with the adapter as it is.

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
        self.logps = [reply.logps for reply in replies]
        return [reply.ids for reply in replies]

    def padded_logps(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """The servers' log-probabilities of the last draw, 0 at padding: as completion_ids."""
        padded = torch.zeros(completion_ids.shape, device=completion_ids.device)
        for row, logps in enumerate(self.logps):
            padded[row, :len(logps)] = torch.tensor(logps, device=padded.device)
        return padded

    def correct(self, trainer, inputs: dict, logps: torch.Tensor) -> None:
        """Put the ratio into a step's inputs, where TRL's loss reads it, and log it.

        logps: (rows, tokens) of the learner, without a graph. An update that learns again from the
        same replies has the ratio that the first one had. TRL logs once per update; this does once
        per step, and its figures are means over the steps.
        """
        args, mask = trainer.args, inputs["completion_mask"]
        sampled = inputs["sampling_per_token_logps"]
        logps = inputs.get("old_per_token_logps", logps)
        ratio = importance_ratio(
            logps, sampled, mask, args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_max, args.vllm_importance_sampling_clip_min)
        if args.vllm_importance_sampling_correction:  # vespo reads the ratio without asking
            inputs["importance_sampling_ratio"] = ratio
        gather, log = trainer.accelerator.gather, trainer._metrics["train"]
        is_token = mask.bool()
        difference = (logps - sampled).abs()[is_token].nan_to_num()
        shown = ratio.flatten() if ratio.shape[1] == 1 else ratio[is_token]
        difference, shown = (values if len(values) else values.new_zeros(1)  # all masked
                             for values in (difference, shown))
        for name, values in (("sampling_logp_difference", difference),
                             ("importance_sampling_ratio", shown)):
            log[f"sampling/{name}/mean"].append(gather(values.mean()).mean().item())
            log[f"sampling/{name}/max"].append(gather(values.max()).max().item())
        log["sampling/importance_sampling_ratio/min"].append(gather(shown.min()).min().item())
        log["sampling/staleness"].append(float(trainer.state.global_step + 1 - self.version))
        log["sampling/adapter_version"].append(float(self.version))

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
            asyncio_run(self._load(name, saved.resolve(), before))
            for old in folder.iterdir():
                if old.name not in (saved.name, before.rpartition("-")[0]):
                    shutil.rmtree(old)  # not read any more
        self.adapter = broadcast_object_list([name])[0]
        self.served.name, self.version = self.adapter, version

    async def _load(self, name: str, path: Path, before: str) -> None:
        """Load an adapter at every server, and unload the one before.

        A server that outlived a killed stage may hold it already: the name has the weights' hash.
        One that was started again does not hold the one before.
        """
        for server in (server for server in self.served.servers if server.is_alive):
            async with open_client(server.url, self.served.key, LOAD_TIMEOUT) as client:
                async def post(action: str, client=client, **body: str) -> None:
                    await client.with_options(max_retries=0).post(
                        f"/{action}_lora_adapter", cast_to=str, body=body,
                        options={"headers": authorization_header(self.served.key)})

                try:
                    listed = await list_models(client, self.served.key)
                    if name not in listed:
                        await post("load", lora_name=name, lora_path=str(path))
                    if before in listed:
                        await post("unload", lora_name=before)
                except openai.APIStatusError as error:
                    raise RuntimeError(self._refusal(server.url, name, error)) from None
                except openai.APIConnectionError:
                    server.is_alive = False
                    print(f"the server {server.url} is left out: it does not load {name}",
                          flush=True)

    def _refusal(self, url: str, name: str, error: openai.APIStatusError) -> str:
        message = redact(first_line(error.response.text), self.served.key)
        return (f"the server {url} does not take the adapter {name} (HTTP {error.status_code}: "
                f"{message}); vLLM needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, "
                f"--enable-lora, --max-lora-rank {self.params.lora_r} or more and this machine's "
                "disk")
