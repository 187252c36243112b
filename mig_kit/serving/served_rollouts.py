"""Rollouts that servers draw for stage 05.

Servers round differently from the learner, so they send log-probabilities with their replies, and
TRL weights the loss by the ratio. A server may also ignore an adapter without an error: before
every update a canary, an adapter with large weights, must change its answer.
"""

import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, apply_umask, file_sha256
from mig_kit.openai_client import RequestFailed, request_json
from mig_kit.sample import Sample
from mig_kit.serving.server import (
    Question,
    ServedModel,
    ServedReply,
    Server,
    list_models,
    serve_model,
)
from mig_kit.shared_prefix.generation import SamplingOptions
from mig_kit.shared_prefix.prompt_cache import Prompt

SERVED_ADAPTERS = "served"  # folder of the adapters that servers load, beside the checkpoints
DIFFERENCE = "sampling/sampling_logp_difference/mean"  # TRL's name
SAMPLING_CURVES = {"sampling/importance_sampling_ratio/mean": "ratio"}
# Nats a token, a ratio of learner to server of 0.86 to 1.16. vLLM in bfloat16 and a learner in
# float32 differed by 0.006 to 0.017. The ratio of whole replies cannot be bounded: it grows with
# their length.
MAX_DIFFERENCE = 0.15
CANARY_STD = 0.5  # of B; an adapted layer's change then exceeds its output
LEAST_CHANGE = 0.05  # nats by which the canary must move the first token


class ServedRollouts:
    """Draws a trainer's completions from servers, and keeps their adapter up to date."""

    def __init__(self, model: str | Path, box_format: BoxFormat, folder: Path,
                 params: SimpleNamespace):
        self.model, self.box_format, self.folder, self.params = model, box_format, folder, params
        self.served: ServedModel | None = None
        self.version, self.adapter = 0, ""  # the update, from 1, whose adapter servers loaded last
        self.probe: Question | None = None  # what the canary is asked

    def draw(self, trainer, samples: list[Sample], prompts: list[Prompt], group: int,
             sampling: SamplingOptions) -> tuple[list[list[int]], list[list[float]]]:
        """Draws `group` completions to each prompt, in sequence.

        Returns: (token ids of each, their log-probabilities); a cut one has no end token.
        Raises: UserError for other prompt ids; RequestFailed with a server's words.
        """
        if self.served is None:
            self.served = serve_model(self.params.server, self.params.concurrency, self.model,
                                      "base" if self.params.start_from == "base" else "sft",
                                      self.box_format)
            self.model_name = self.served.name
        if self.version != trainer.state.global_step + 1:
            self._try_canary(trainer, Question(samples[0], 1, prompts[0].ids.tolist()))
            self._sync(trainer)
        questions = [Question(sample, group, prompt.ids.tolist())
                     for sample, prompt in zip(samples, prompts)]
        answers = {id(question): replies for question, replies
                   in self.served.ask(questions, sampling, with_logps=True)}
        replies = [reply for question in questions for reply in answers[id(question)]]
        return [reply.ids for reply in replies], [reply.logps for reply in replies]

    def _sync(self, trainer) -> None:
        """Have all servers draw with this update's adapter, named step-<update>-<its hash>."""
        version, name = trainer.state.global_step + 1, ""
        if trainer.accelerator.is_main_process:
            folder = self.folder / "checkpoints" / SERVED_ADAPTERS
            saved = folder / f"step-{version}"
            model = trainer.accelerator.unwrap_model(trainer.model)
            model.save_pretrained(saved, safe_serialization=True)
            apply_umask(saved)  # a server may be another user's
            name = self._load(saved)
            for old in folder.iterdir():
                if old.name not in (saved.name, self.adapter.rpartition("-")[0]):
                    shutil.rmtree(old)  # not read any more
        self.adapter = broadcast_object_list([name])[0]
        self.served.name, self.version = self.adapter, version

    def _try_canary(self, trainer, question: Question) -> None:
        """UserError if an adapter with large weights does not change a server's answer."""
        if not trainer.accelerator.is_main_process:
            return
        folder = self.folder / "checkpoints" / SERVED_ADAPTERS / "canary"
        if self.probe is None:
            self._save_canary(trainer, folder)
            self.probe = question
        self.adapter = self._load(folder)
        for server in self.served.servers:
            without, with_canary = (self._first_token(server, name)
                                    for name in (self.model_name, self.adapter))
            change = abs(with_canary.logps[0] - without.logps[0])
            if with_canary.ids == without.ids and change < LEAST_CHANGE:
                remedy = ("it has lost them since the last update; start it again, then the stage, "
                          "which goes on from its last checkpoint" if self.version else
                          "its engine has no adapters for this model, so take another version of "
                          "it, or leave server empty")
                raise UserError(
                    f"the server {server.url} takes adapters and ignores them: one with large "
                    f"weights moved the log-probability of a token by {change:.1g}; {remedy}")

    def _save_canary(self, trainer, folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(0)
        weights = {name: CANARY_STD * torch.randn(value.shape, generator=generator).to(value.dtype)
                   if "lora_B" in name else value for name, value in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
        apply_umask(folder)

    def _first_token(self, server: Server, name: str) -> ServedReply:
        """The likeliest first token of model `name` at `server`."""
        served = replace(self.served, name=name, servers=[server], concurrency=1)
        sampling = SamplingOptions(temperature=0.0, max_new_tokens=1)
        return next(served.ask([self.probe], sampling, with_logps=True))[1][0]

    def _load(self, folder: Path) -> str:
        """Load a folder's adapter at every server, unload the one before, and return its name."""
        # servers cache prompts under the name, so after a kill new weights must not get an old one
        name = f"{folder.name}-{file_sha256(folder / 'adapter_model.safetensors')[:8]}"
        for server in self.served.servers:
            listed = list_models(server.client)
            try:
                if name not in listed:  # a server may have outlived a killed stage
                    request_json(server.client, "/load_lora_adapter",
                                 {"lora_name": name, "lora_path": str(folder.resolve())})
                if self.adapter in listed:  # unless the server was started again
                    request_json(server.client, "/unload_lora_adapter",
                                 {"lora_name": self.adapter})
            except RequestFailed as failure:
                raise UserError(
                    f"the server {server.url} does not take the adapter {name} ({failure}); vLLM "
                    "needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, --enable-lora, "
                    f"--max-lora-rank {self.params.lora_r} or more and this machine's "
                    "disk") from None
        return name


class StopIfServerDiffers(TrainerCallback):
    """Ends a training whose log-probabilities are far from the servers' three times in a row."""

    def __init__(self):
        self.differences: deque[float] = deque(maxlen=3)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raise UserError with one sentence, or do nothing."""
        # not logged by updates that learn again from the same replies
        if not logs or DIFFERENCE not in logs:
            return
        self.differences.append(logs[DIFFERENCE])
        is_full = len(self.differences) == self.differences.maxlen
        if not is_full or min(self.differences) <= MAX_DIFFERENCE:
            return
        listed = ", ".join(f"{difference:.2g}" for difference in self.differences)
        raise UserError(
            f"the learner's and the server's log-probabilities of a token were {listed} nats apart "
            f"in the last updates, more than {MAX_DIFFERENCE:g}: the server draws with other "
            "weights, or tells other log-probabilities (vLLM needs --logprobs-mode "
            "processed_logprobs); start it again, then the stage, which goes on from its last "
            "checkpoint")
