"""A double of a vLLM server over the kit's own loop, with adapters that are loaded at run time."""

import base64
import io
import threading

import torch
from local_server import IS_JSON, LocalServer
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from PIL import Image

from mig_kit.models.sample_prompts import make_cache
from mig_kit.prompts import GROUNDING_INSTRUCTION
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, draw_uniforms, generate_rollouts
from mig_kit.shared_prefix.logprobs import completion_logps


class RolloutServer(LocalServer):
    """change(body, answer): what a test does to an answer; None: drop the connection. fault:
    "ignores adapters" and answers without, or "keeps weights" of the first update's adapter.

    loaded, unloaded: adapters' names, in order; adapters: those that it holds, each loaded once;
    bodies: of all requests for replies.
    """

    def __init__(self, policy, name="sft", change=lambda body, answer: answer, fault=""):
        self.policy, self.name, self.change, self.lock = policy, name, change, threading.Lock()
        self.fault = fault
        self.loaded, self.unloaded, self.adapters, self.bodies = [], [], set(), []
        super().__init__(self.respond)

    def respond(self, path, headers, body):
        if body is None:
            return 200, {"data": [{"id": name} for name in (self.name, *self.adapters)]}, IS_JSON
        with self.lock:
            answer = getattr(self, path.rsplit("/", 1)[1].replace("completions", "complete"))(body)
        return answer and (400 if "error" in answer else 200, answer, IS_JSON)

    def load_lora_adapter(self, body):
        if body["lora_name"] in self.adapters:
            return {"error": {"message": f"'{body['lora_name']}' has already been loaded"}}
        self.loaded.append(body["lora_name"])
        self.adapters.add(body["lora_name"])
        if not isinstance(self.policy.model, PeftModel):
            self.policy.model = PeftModel.from_pretrained(self.policy.model, body["lora_path"])
        updates = [name for name in self.loaded if name.startswith("step-")]
        if self.fault != "keeps weights" or len(updates) < 2:
            set_peft_model_state_dict(self.policy.model, load_peft_weights(body["lora_path"]))
        return "ok"

    def unload_lora_adapter(self, body):
        if body["lora_name"] not in self.adapters:
            return {"error": {"message": f"'{body['lora_name']}' cannot be found"}}
        self.unloaded.append(body["lora_name"])
        self.adapters.remove(body["lora_name"])
        return "ok"

    def read_sample(self, body):
        content = body["messages"][0]["content"]
        images = tuple(Image.open(io.BytesIO(base64.b64decode(
            part["image_url"]["url"].partition(",")[2])))
            for part in content if part["type"] == "image_url")
        question = content[-1]["text"].removesuffix(f" {GROUNDING_INSTRUCTION}")
        return Sample("asked", "", "", "", images, question)

    def complete(self, body):
        self.bodies.append(body)
        model = self.policy.model
        if isinstance(model, PeftModel) and (body["model"] == self.name
                                             or self.fault == "ignores adapters"):
            with model.disable_adapter():
                return self.draw(body)
        return self.draw(body)

    @torch.no_grad()
    def draw(self, body):
        model, processor = self.policy.model, self.policy.processor
        prompt = make_cache(self.policy).get([self.read_sample(body)])[0]
        sampling = SamplingOptions(body["temperature"], body["top_p"], body["max_tokens"])
        count = body.get("n", 1)
        uniforms = draw_uniforms(int(prompt.ids.sum()), 1, count, body["max_tokens"])
        group = generate_rollouts(model, processor, [prompt], count, sampling, uniforms)[0]
        base = model.base_model.model if isinstance(model, PeftModel) else model
        choices = []
        for ids in group:
            row, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
            logps, _ = completion_logps(base, [prompt], torch.tensor([0]), row, mask,
                                        body["temperature"] or 1.0)
            choices.append({
                "message": {"content": processor.tokenizer.decode(ids, skip_special_tokens=True)},
                "token_ids": ids, "finish_reason": "stop",
                "logprobs": {"content": [{"logprob": value} for value in logps[0].tolist()]}})
        return self.change(body, {"model": body["model"], "choices": choices,
                                  "prompt_token_ids": prompt.ids.tolist()})
