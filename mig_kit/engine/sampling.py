"""Draw replies to many samples with one model, into a file that a killed stage resumes from."""

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory, write_atomically
from mig_kit.engine.decoding import fuse_decoding_weights
from mig_kit.engine.generation import Sampling, draw_uniforms, generate_rollouts
from mig_kit.engine.models import Hardware, Policy, load_policy, unwrap_peft
from mig_kit.engine.parallel import map_in_threads
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.engine.server import Question, ServedModel, serve_model
from mig_kit.sample import Sample


@contextmanager
def open_policy(model: str | Path, system: str, hardware: Hardware, box_format: BoxFormat,
                folder: Path, params: SimpleNamespace) -> Iterator[Policy | ServedModel]:
    """What draws a model's replies: a policy, or with `params.server` servers that hold the model.

    model: a folder or hub name; system: what it is called in the run. A server that this starts
    writes to folder/server_<system>.log and ends with the context. With servers no weights are
    loaded here.
    """
    if not params.server:
        yield load_policy(model, hardware, box_format)
        return
    log = folder / f"server_{system}.log"
    with serve_model(params.server, params.concurrency, model, system, box_format, log) as served:
        yield served


def describe_source(params: SimpleNamespace) -> str:
    """What drew a stage's replies, for its record."""
    return f"served: {params.server}" if params.server else "the kit's own loop"


def make_cache(policy: Policy, **limits) -> PromptCache:
    """A cache of prompts for the policy; limits: see PromptCache."""
    return PromptCache(policy.model, policy.processor, policy.box_format,
                       autocast=policy.hardware.autocast, **limits)


def greedy_replies(policy: Policy, samples: list[Sample], max_new_tokens: int = 128) -> list[str]:
    """One greedy reply to every sample."""
    prompts = make_cache(policy).get(samples)
    rollouts = generate_rollouts(
        policy.model.eval(), policy.processor, prompts, 1,
        Sampling(0.0, max_new_tokens=max_new_tokens), autocast=policy.hardware.autocast)
    completions = [rollout[0] for rollout in rollouts]
    return policy.processor.tokenizer.batch_decode(completions, skip_special_tokens=True)


def sample_replies(policy: Policy | ServedModel, samples: list[Sample], path: Path, *, replies: int,
                   temperature: float, max_new_tokens: int, batch_size: int, seed: int,
                   label: str = "rollouts", cache: PromptCache | None = None,
                   workers: int = 1) -> dict[str, list[str]]:
    """`replies` replies to every sample, by sample id, appended to `path` batch by batch.

    Batches that are whole in the file are not drawn again. Each batch has its own seed, and batches
    are cut before anything is skipped, so a resumed run draws what an uninterrupted one would have
    drawn. Questions about the same images share a batch, which reads these images once. cache:
    prompts made ready by an earlier call for the same samples and model. workers: batches under way
    at a time, on a CPU; the replies are the same. Raises ValueError for fewer than one reply.

    Servers are asked about each sample on its own, and every reply is stored as it comes; seed,
    batch_size, cache and workers are the local loop's.
    """
    if replies < 1:
        raise ValueError(f"replies is {replies}; a prompt needs at least one reply "
                         "(only 06_evaluate can do without)")
    stored = load_replies(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, ServedModel):
        sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
        return _served_replies(policy, samples, path, stored, replies, sampling, label)
    cache = cache or make_cache(policy, limit=batch_size)
    batches = list(enumerate(_cut_batches(samples, batch_size)))
    todo = [(number, batch) for number, batch in batches
            if not all(sample.id in stored for sample in batch)]
    one_at_a_time = Lock()  # the cache and the tokenizer serve one thread at a time
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens)

    def draw(numbered_batch: tuple[int, list[Sample]]) -> list[list[list[int]]]:
        number, batch = numbered_batch
        with one_at_a_time:
            prompts = cache.get(batch)
        uniforms = draw_uniforms(seed * 1_000_003 + number, len(batch), replies, max_new_tokens)
        return generate_rollouts(policy.model, policy.processor, prompts, replies, sampling,
                                 uniforms, policy.hardware.autocast, fused_weights)

    weights = fuse_decoding_weights(unwrap_peft(policy.model), policy.hardware.autocast)
    with path.open("a") as file, weights as fused_weights, \
            closing(map_in_threads(draw, todo, workers)) as drawn:
        bar = progress_bar(drawn, label, total=len(batches), initial=len(batches) - len(todo))
        for rollouts, (number, batch) in zip(bar, todo):
            for sample, completions in zip(batch, rollouts):
                if sample.id not in stored:
                    with one_at_a_time:
                        stored[sample.id] = policy.processor.tokenizer.batch_decode(
                            completions, skip_special_tokens=True)
                    line = {"id": sample.id, "replies": stored[sample.id]}
                    file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if number % 8 == 7:
                release_memory()
    return {sample.id: stored[sample.id] for sample in samples}


def _served_replies(served: ServedModel, samples: list[Sample], path: Path,
                    stored: dict[str, list[str]], replies: int, sampling: Sampling,
                    label: str) -> dict[str, list[str]]:
    """As `sample_replies`, from servers. stored: what the file holds already."""
    questions = [Question(sample, replies) for sample in samples if sample.id not in stored]
    with path.open("a") as file, closing(served.ask(questions, sampling)) as answers:
        bar = progress_bar(answers, label, total=len(samples),
                           initial=len(samples) - len(questions))
        for question, drawn in bar:
            stored[question.sample.id] = [reply.text for reply in drawn]
            line = {"id": question.sample.id, "replies": stored[question.sample.id]}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    return {sample.id: stored[sample.id] for sample in samples}


def _cut_batches(samples: list[Sample], batch_size: int) -> list[list[Sample]]:
    """The samples by number of images, questions about the same images side by side."""
    first_id: dict[tuple[int, ...], str] = {}
    for sample in samples:
        key = _image_list_key(sample)
        first_id[key] = min(sample.id, first_id.get(key, sample.id))
    ordered = sorted(samples, key=lambda s: (len(s.images), first_id[_image_list_key(s)], s.id))
    return [ordered[i:i + batch_size] for i in range(0, len(ordered), batch_size)]


def _image_list_key(sample: Sample) -> tuple[int, ...]:
    """Tells a list of images from others without reading them; the samples keep them alive."""
    return tuple(map(id, sample.images))


def load_replies(path: Path) -> dict[str, list[str]]:
    """Replies by sample id from a file of `sample_replies`; a line cut by a kill is dropped."""
    if not path.is_file():
        return {}
    rows, text = [], path.read_text()
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    complete_lines = "".join(json.dumps(row) + "\n" for row in rows)
    if complete_lines != text:
        write_atomically(path, lambda temporary: temporary.write_text(complete_lines))
    return {row["id"]: row["replies"] for row in rows}
