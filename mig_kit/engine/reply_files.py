"""Draw replies to many samples with one model, into a file that a killed stage resumes from."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory
from mig_kit.engine.models import Hardware, Policy, load_policy
from mig_kit.engine.parallel import map_in_threads
from mig_kit.engine.sample_prompts import SampleCache, make_cache
from mig_kit.engine.server import Question, ServedModel
from mig_kit.engine.server_process import serve_model
from mig_kit.engine.stored_replies import load_replies
from mig_kit.image_files import LazyImages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.decoding import fuse_decoding_weights, train_mode_for_4bit_layers
from mig_kit.shared_prefix.generation import (
    SamplingOptions,
    draw_uniforms,
    generate_rollouts,
    max_kv_bytes,
)
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

BATCH_SIZE = 64  # prompts of a batch
CPU_WORKERS = 2  # batches under way at a time on a CPU, each on its share of the cores


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
        release_memory()  # of a policy that the caller keeps no longer
        return
    log = folder / f"server_{system}.log"
    with serve_model(params.server, params.concurrency, model, system, box_format, log) as served:
        yield served


def describe_source(params: SimpleNamespace) -> str:
    """What drew a stage's replies, for its record."""
    return f"served: {params.server}" if params.server else "the kit's own loop"


def greedy_replies(policy: Policy, samples: Sequence[Sample],
                   max_new_tokens: int = 128) -> list[str]:
    """One greedy reply to every sample."""
    return [reply for (reply,) in draw_replies(policy, samples, 1, 0.0, max_new_tokens)]


def draw_replies(policy: Policy, samples: Sequence[Sample], count: int, temperature: float,
                 max_new_tokens: int) -> list[list[str]]:
    """`count` replies to every sample, the same ones each time; no random state is used."""
    prompts = make_cache(policy).get(samples)
    uniforms = draw_uniforms(0, len(samples), count, max_new_tokens) if temperature else None
    rollouts = generate_rollouts(
        train_mode_for_4bit_layers(policy.model.eval()), policy.processor, prompts, count,
        SamplingOptions(temperature, max_new_tokens=max_new_tokens), uniforms,
        policy.hardware.autocast)
    return [policy.processor.batch_decode(rollout, skip_special_tokens=True)
            for rollout in rollouts]


def sample_replies(policy: Policy | ServedModel, samples: Sequence[Sample], path: Path, *,
                   replies: int, temperature: float, max_new_tokens: int, seed: int,
                   batch_size: int = BATCH_SIZE, workers: int = 0, label: str = "rollouts",
                   cache: SampleCache | None = None) -> dict[str, list[str]]:
    """`replies` replies to every sample, by sample id, appended to `path` batch by batch.

    Batches that are whole in the file are not drawn again. Each batch has its own seed, and batches
    are cut before anything is skipped, so a resumed run draws what an uninterrupted one would have
    drawn. Questions about the same images share a batch, which reads these images once. cache:
    prompts made ready by an earlier call for the same samples and model. A batch is drawn in as
    many rounds as the free memory asks for, with the same numbers.

    workers: batches under way at a time; 0 for CPU_WORKERS on a CPU and one on a GPU. The replies
    are the same but where products round by the number of cores, as AMX's in bf16 do: there a few
    in a hundred differ.

    Servers are asked about each sample on its own, and every reply is stored as it comes; seed,
    batch_size, cache and workers are the local loop's.
    """
    is_stored = set(load_replies(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, ServedModel):
        sampling = SamplingOptions(temperature, max_new_tokens=max_new_tokens)
        return _served_replies(policy, samples, path, is_stored, replies, sampling, label)
    workers = workers or (CPU_WORKERS if policy.hardware.device == "cpu" else 1)
    cache = cache or make_cache(policy)
    ids = [sample.id for sample in samples]
    batches = list(enumerate(_cut_batches(samples, batch_size)))
    todo = [(number, batch) for number, batch in batches
            if not is_stored.issuperset(ids[index] for index in batch)]
    one_at_a_time = Lock()  # the cache and the tokenizer serve one thread at a time
    sampling = SamplingOptions(temperature, max_new_tokens=max_new_tokens)
    max_bytes = max_kv_bytes(policy.model.device) // workers

    def draw(numbered_batch: tuple[int, list[int]]) -> list[list[list[int]]]:
        number, batch = numbered_batch
        with one_at_a_time:
            prompts = cache.get([samples[index] for index in batch])
        uniforms = draw_uniforms(seed * 1_000_003 + number, len(batch), replies, max_new_tokens)
        return generate_rollouts(policy.model, policy.processor, prompts, replies, sampling,
                                  uniforms, policy.hardware.autocast, fused_weights, max_bytes)

    weights = fuse_decoding_weights(unwrap_peft(policy.model), policy.hardware.autocast)
    with path.open("a") as file, weights as fused_weights, \
            closing(map_in_threads(draw, todo, workers)) as drawn:
        bar = progress_bar(drawn, label, total=len(batches), initial=len(batches) - len(todo))
        for rollouts, (number, batch) in zip(bar, todo):
            for index, completions in zip(batch, rollouts):
                name = ids[index]
                if name not in is_stored:
                    with one_at_a_time:
                        texts = policy.processor.batch_decode(
                            completions, skip_special_tokens=True)
                    file.write(json.dumps({"id": name, "replies": texts}) + "\n")
                    is_stored.add(name)
            file.flush()
            os.fsync(file.fileno())
            if number % 8 == 7:
                release_memory()
    stored = load_replies(path)
    return {name: stored[name] for name in ids}


def _served_replies(served: ServedModel, samples: Sequence[Sample], path: Path,
                    is_stored: set[str], replies: int, sampling: SamplingOptions,
                    label: str) -> dict[str, list[str]]:
    """As `sample_replies`, from servers. is_stored: ids that the file holds already."""
    ids = [sample.id for sample in samples]
    questions = (Question(samples[index], replies) for index, name in enumerate(ids)
                 if name not in is_stored)
    n_stored = sum(name in is_stored for name in ids)
    with path.open("a") as file, closing(served.ask(questions, sampling)) as answers:
        for question, drawn in progress_bar(answers, label, total=len(ids), initial=n_stored):
            line = {"id": question.sample.id, "replies": [reply.text for reply in drawn]}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    stored = load_replies(path)
    return {name: stored[name] for name in ids}


def _cut_batches(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """The indices of samples by number of images, questions about the same images side by side."""
    keys, first_id = [], {}
    for sample in samples:
        key = _image_list_key(sample)
        first_id[key] = min(sample.id, first_id.get(key, sample.id))
        keys.append((len(sample.images), key, sample.id))
    order = sorted(range(len(keys)),
                   key=lambda index: (keys[index][0], first_id[keys[index][1]], keys[index][2]))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def _image_list_key(sample: Sample) -> int | str:
    """Tells a list of images from others without decoding them.

    Stored files by their SHA-256, images in memory by themselves, which the samples keep alive; a
    sample whose images a table holds is alone with them.
    """
    if not isinstance(sample.images, LazyImages):
        return hash(tuple(map(id, sample.images)))
    if all(image.sha256 for image in sample.images.encoded):
        return hash(tuple(image.sha256 for image in sample.images.encoded))
    return sample.id
