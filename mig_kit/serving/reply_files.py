"""Draw replies to many samples with one model, into a file that a killed stage resumes from."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory
from mig_kit.image_files import LazyImages
from mig_kit.models.loading import Hardware, Policy, load_policy
from mig_kit.models.sample_prompts import SampleCache, make_cache
from mig_kit.sample import Sample
from mig_kit.serving.server import Question, ServedModel
from mig_kit.serving.server_process import serve_model
from mig_kit.serving.stored_replies import format_row, load_replies
from mig_kit.shared_prefix.decoding import fuse_decoding_weights, train_mode_for_4bit_layers
from mig_kit.shared_prefix.generation import (
    SamplingOptions,
    draw_uniforms,
    end_token_ids,
    generate_rollouts,
    max_kv_bytes,
)
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

BATCH_SIZE = 64  # prompts of a batch
Drawn = tuple[list[str], list[str]]  # replies to a sample, and why each of them ended
CPU_WORKERS = 2  # batches under way at a time on a CPU, each on its share of the cores


@contextmanager
def open_policy(model: str | Path, system: str, hardware: Hardware, box_format: BoxFormat,
                folder: Path, params: SimpleNamespace) -> Iterator[Policy | ServedModel]:
    """What draws a model's replies: a policy, or with `params.server` servers that hold the model.

    model: a folder or hub name. system: the model's name in the run. A server that this starts logs
    to folder/server_<system>.log and ends with the context.
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
                   label: str = "rollouts",
                   cache: SampleCache | None = None) -> dict[str, list[str]]:
    """`replies` replies to every sample, by sample id, appended to `path` as they are drawn.

    What is whole in the file is not drawn again. cache: prepared prompts of the same model. seed
    and cache do not apply to servers.
    """
    ids, is_stored = [sample.id for sample in samples], load_replies(path).keys()
    path.parent.mkdir(parents=True, exist_ok=True)
    sampling = SamplingOptions(temperature, max_new_tokens=max_new_tokens)
    if isinstance(policy, ServedModel):
        drawn = _ask_servers(policy, samples, ids, is_stored, replies, sampling)
    else:
        drawn = _draw_batches(policy, samples, ids, is_stored, replies, sampling, seed,
                              cache or make_cache(policy))
    n_stored = sum(name in is_stored for name in ids)
    with path.open("a") as file, closing(drawn), \
            progress_bar(None, label, total=len(ids), initial=n_stored) as bar:
        for part in drawn:
            for name, (texts, reasons) in part.items():
                file.write(format_row(name, texts, reasons))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(part))
    stored = load_replies(path)
    return {name: stored[name] for name in ids}


def _ask_servers(served: ServedModel, samples: Sequence[Sample], ids: list[str],
                 is_stored: Set[str], replies: int,
                 sampling: SamplingOptions) -> Iterator[dict[str, Drawn]]:
    """Replies by id, those to a sample as they come; ids: of the samples."""
    questions = (Question(samples[index], replies) for index, name in enumerate(ids)
                 if name not in is_stored)
    for question, drawn in served.ask(questions, sampling):
        yield {question.sample.id: ([reply.text for reply in drawn],
                                    [reply.finish_reason for reply in drawn])}


def _draw_batches(policy: Policy, samples: Sequence[Sample], ids: list[str], is_stored: Set[str],
                  replies: int, sampling: SamplingOptions, seed: int,
                  cache: SampleCache) -> Iterator[dict[str, Drawn]]:
    """Replies by id, batch by batch, each with its own seed; ids: of the samples."""
    # Batches are cut before anything is skipped, so a resumed run draws what it would have drawn.
    # Where products round by the number of cores (AMX in bf16), a few replies in a hundred differ.
    todo = [(number, batch) for number, batch in enumerate(_cut_batches(samples))
            if not is_stored >= {ids[index] for index in batch}]
    one_at_a_time = Lock()  # the cache and the tokenizer serve one thread at a time
    workers = CPU_WORKERS if policy.hardware.device == "cpu" else 1
    max_bytes = max_kv_bytes(policy.model.device) // workers

    def draw(numbered_batch: tuple[int, list[int]]) -> dict[str, Drawn]:
        number, batch = numbered_batch
        with one_at_a_time:
            prompts = cache.get([samples[index] for index in batch])
        uniforms = draw_uniforms(seed * 1_000_003 + number, len(batch), replies,
                                 sampling.max_new_tokens)
        rollouts = generate_rollouts(policy.model, policy.processor, prompts, replies, sampling,
                                     uniforms, policy.hardware.autocast, fused_weights, max_bytes)
        if number % 8 == 7:
            release_memory()
        with one_at_a_time:
            return {ids[index]: (
                policy.processor.batch_decode(completions, skip_special_tokens=True),
                ["stop" if {*completion[-1:]} & end_tokens else "length"
                 for completion in completions])
                for index, completions in zip(batch, rollouts) if ids[index] not in is_stored}

    end_tokens = {*end_token_ids(policy.model.generation_config, policy.processor)}
    weights = fuse_decoding_weights(unwrap_peft(policy.model), policy.hardware.autocast)
    with weights as fused_weights, closing(map_in_threads(draw, todo, workers)) as drawn:
        yield from drawn


def map_in_threads(function: Callable, parts: Iterable, threads: int) -> Iterator:
    """function(part) for every part, in order, `threads` at a time; 1 stays in this thread.

    No call may change what another one reads.
    """
    if threads == 1 or torch.cuda.is_available():
        yield from map(function, parts)
        return
    # a step of a small model is hundreds of operations too short for all cores to share
    cores = torch.get_num_threads()
    share = max(1, cores // threads)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(function, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # part of what a thread sets is set for all


def _cut_batches(samples: Sequence[Sample]) -> list[list[int]]:
    """The indices of samples by number of images, questions about the same images side by side."""
    keys, first_id = [], {}
    for sample in samples:
        key = _image_list_key(sample)
        first_id[key] = min(sample.id, first_id.get(key, sample.id))
        keys.append((len(sample.images), key, sample.id))
    order = sorted(range(len(keys)),
                   key=lambda index: (keys[index][0], first_id[keys[index][1]], keys[index][2]))
    return [order[i:i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def _image_list_key(sample: Sample) -> int | str:
    """A key of the sample's images: their paths, or their identities in memory; decodes nothing."""
    if not isinstance(sample.images, LazyImages):
        return hash(tuple(map(id, sample.images)))
    contents = [image.content for image in sample.images.encoded]
    # a sample whose images a table holds is alone with them
    return sample.id if bytes in map(type, contents) else hash(tuple(contents))
