"""Replies of one or several models to many samples, in files that a killed stage resumes from."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import (
    append_json_lines,
    model_folder,
    progress_bar,
    release_memory,
    write_json,
)
from mig_kit.image_files import LazyImages
from mig_kit.models.loading import Hardware, Policy, load_policy
from mig_kit.models.sample_prompts import SampleCache, make_cache
from mig_kit.sample import Sample
from mig_kit.serving import shipped_replies
from mig_kit.serving.server import Question, ServedModel, serve_model
from mig_kit.serving.stored_replies import count_endings, load_replies, reply_file, reply_row
from mig_kit.shared_prefix.decoding import fuse_decoding_weights, train_mode_for_4bit_layers
from mig_kit.shared_prefix.generation import (
    SamplingOptions,
    draw_uniforms,
    end_token_ids,
    generate_rollouts,
    max_kv_bytes,
)
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

SHIPPED_COUNTS = "shipped.json"  # reply file -> replies in it that were shipped with the base
BATCH_SIZE = 64  # prompts of a batch
CPU_WORKERS = 2  # batches under way at a time on a CPU, each on its share of the cores


@contextmanager
def open_policy(model: str | Path, system: str, hardware: Hardware, box_format: BoxFormat,
                params: SimpleNamespace) -> Iterator[Policy | ServedModel]:
    """Opens what draws a model's replies: a policy, or servers if `params.server` names any.

    model: a folder or hub name. system: the model's name in the run.
    """
    if params.server:
        yield serve_model(params.server, params.concurrency, model, system, box_format)
    else:
        yield load_policy(model, hardware, box_format)
        release_memory()  # the caller has dropped the policy


def describe_source(params: SimpleNamespace) -> str:
    """What draws a stage's replies, as its record says it."""
    return f"served: {params.server}" if params.server else "the kit's own loop"


def describe_shipped(folder: Path) -> str:
    """"3,400 of the base's replies are those shipped with it", or ""; folder: the replies'."""
    path = folder / SHIPPED_COUNTS
    count = sum(json.loads(path.read_text()).values()) if path.is_file() else 0
    return f"{count:,} of the base's replies are those shipped with it" * bool(count)


def greedy_replies(policy: Policy, samples: Sequence[Sample],
                   max_new_tokens: int = 128) -> list[str]:
    """One greedy reply to every sample."""
    rollouts = generate_rollouts(
        train_mode_for_4bit_layers(policy.model.eval()), policy.processor,
        make_cache(policy).get(samples), 1, SamplingOptions(0.0, max_new_tokens=max_new_tokens))
    return policy.processor.batch_decode([ids for (ids,) in rollouts], skip_special_tokens=True)


def sample_replies(policy: Policy | ServedModel, samples: Sequence[Sample], path: Path, *,
                   replies: int, temperature: float, max_new_tokens: int, seed: int,
                   label: str = "rollouts",
                   cache: SampleCache | None = None) -> dict[str, list[str]]:
    """Draws `replies` replies to every sample, and appends them to `path` as they come.

    Args:
        path: a reply file; samples whose replies it already holds are not asked again.
        seed: of the random numbers of the kit's own loop; servers have none.
        cache: prompts of the same model that are already prepared.
    Returns: sample id -> its replies.
    """
    ids, stored = [sample.id for sample in samples], load_replies(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sampling = SamplingOptions(temperature, max_new_tokens=max_new_tokens)
    if isinstance(policy, ServedModel):
        drawn = _ask_servers(policy, samples, {*stored}, replies, sampling)
    else:
        drawn = _draw_batches(policy, samples, ids, {*stored}, replies, sampling, seed,
                              cache or make_cache(policy))
    n_stored = sum(name in stored for name in ids)
    with path.open("a") as file, closing(drawn), \
            progress_bar(None, label, total=len(ids), initial=n_stored) as bar:
        for rows in drawn:
            append_json_lines(file, rows)
            stored |= {row["id"]: row["replies"] for row in rows}
            bar.update(len(rows))
    return {name: stored[name] for name in ids}


def _ask_servers(served: ServedModel, samples: Sequence[Sample], is_stored: Set[str], replies: int,
                 sampling: SamplingOptions) -> Iterator[list[dict]]:
    """Rows of the file, one at a time as servers answer."""
    questions = (Question(sample, replies) for sample in samples if sample.id not in is_stored)
    for question, drawn in served.ask(questions, sampling):
        yield [reply_row(question.sample.id, [reply.text for reply in drawn],
                         [reply.finish_reason for reply in drawn])]


def _draw_batches(policy: Policy, samples: Sequence[Sample], ids: list[str], is_stored: Set[str],
                  replies: int, sampling: SamplingOptions, seed: int,
                  cache: SampleCache) -> Iterator[list[dict]]:
    """Rows of the file, batch by batch, each batch with its own seed; ids: of the samples."""
    # Batches are cut before anything is skipped, so a resumed run draws what it would have drawn.
    todo = [(number, batch) for number, batch in enumerate(_cut_batches(samples))
            if not is_stored >= {ids[index] for index in batch}]
    one_at_a_time = Lock()  # the cache and the tokenizer serve one thread at a time
    workers = CPU_WORKERS if policy.hardware.device == "cpu" else 1
    max_bytes = max_kv_bytes(policy.model.device) // workers

    def draw(numbered_batch: tuple[int, list[int]]) -> list[dict]:
        number, batch = numbered_batch
        with one_at_a_time:
            prompts = cache.get([samples[index] for index in batch])
        uniforms = draw_uniforms(seed * 1_000_003 + number, len(batch), replies,
                                 sampling.max_new_tokens)
        rollouts = generate_rollouts(policy.model, policy.processor, prompts, replies, sampling,
                                     uniforms, fused_weights=fused_weights,
                                     max_bytes=max_bytes)
        if number % 8 == 7:
            release_memory()
        with one_at_a_time:
            return [reply_row(
                ids[index], policy.processor.batch_decode(completions, skip_special_tokens=True),
                ["stop" if {*completion[-1:]} & end_tokens else "length"
                 for completion in completions])
                for index, completions in zip(batch, rollouts) if ids[index] not in is_stored]

    end_tokens = {*end_token_ids(policy.model.generation_config, policy.processor)}
    fused_weights = fuse_decoding_weights(unwrap_peft(policy.model))
    with closing(map_in_threads(draw, todo, workers)) as drawn:
        yield from drawn


def map_in_threads(function: Callable, parts: Iterable, threads: int) -> Iterator:
    """Yields function(part) for every part in order, computing `threads` of them at a time.

    On a GPU, and for one thread, all calls stay in this thread.
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
    """Batches of sample indices, by number of images; questions about the same images adjoin.

    There are as many batches for each of CPU_WORKERS, of about one size.
    """
    keys, first_id = [], {}
    for sample in samples:
        key = _image_list_key(sample)
        first_id[key] = min(sample.id, first_id.get(key, sample.id))
        keys.append((len(sample.images), key, sample.id))
    order = sorted(range(len(keys)),
                   key=lambda index: (keys[index][0], first_id[keys[index][1]], keys[index][2]))
    # the same on every device, because a batch's number is part of its seed
    most = -(-len(order) // (CPU_WORKERS * BATCH_SIZE)) * CPU_WORKERS
    count = min(most, len(order))
    edges = [len(order) * number // count for number in range(count + 1)] if order else []
    return [order[start:end] for start, end in pairwise(edges)]


def _image_list_key(sample: Sample) -> int | str:
    """A key that samples with the same images share: by their paths or identities in memory."""
    if not isinstance(sample.images, LazyImages):
        return hash(tuple(map(id, sample.images)))
    contents = [image.content for image in sample.images.encoded]
    # images inside a table have no path, so such a sample counts as sharing them with none
    return sample.id if bytes in map(type, contents) else hash(tuple(contents))


def suite_replies(models: dict[str, str | Path], samples: dict[str, list[Sample]],
                  drawn_samples: dict[str, list[Sample]], hardware: Hardware,
                  box_format: BoxFormat, folder: Path, params: SimpleNamespace) -> dict:
    """Replies of several systems to the same samples, one model in memory at a time (stage 06).

    Args:
        models: system -> model folder.
        samples: by suite; each gets one greedy reply.
        drawn_samples: by suite, those that also get `params.replies` replies at temperature 1.
        folder: where the replies are stored.
    Returns: system -> suite -> {"greedy": [reply], "drawn": [[reply]]}, in the order of `samples`;
    a sample without drawn replies has [].
    """
    cache: SampleCache | None = None
    replies: dict[str, dict] = {}
    for system, model in models.items():
        if not params.server and Path(model) == model_folder(shipped_replies.BASE):
            keys = list_reply_keys(samples, drawn_samples, hardware.dtype, box_format, params)
            _take_shipped({reply_file(folder, system, *of): key for of, key in keys.items()})
        if cache:
            cache.release()  # so that two models need not be in memory at a time
        release_memory()
        with open_policy(model, system, hardware, box_format, params) as policy:
            if cache:  # no stage trains the vision tower: all systems see the same
                cache.serve(policy.model)
            elif isinstance(policy, Policy):
                cache = make_cache(policy)
            replies[system] = {suite: {"drawn": [[]] * len(part)}
                               for suite, part in samples.items()}
            for suite, kind, part, count, temperature in _list_asked(samples, drawn_samples,
                                                                     params):
                drawn = sample_replies(
                    policy, part, reply_file(folder, system, suite, kind), replies=count,
                    temperature=temperature, max_new_tokens=params.max_new_tokens,
                    seed=params.seed, label=f"{system} {suite} {kind}", cache=cache)
                rows = [drawn.get(sample.id, []) for sample in samples[suite]]
                replies[system][suite][kind] = (
                    rows if kind == "drawn" else [reply for reply, in rows])
            policy = None  # frees the system before the next
    return replies


def _list_asked(samples: dict[str, list[Sample]], drawn_samples: dict[str, list[Sample]],
                params: SimpleNamespace) -> list[tuple[str, str, list[Sample], int, float]]:
    """(suite, kind of reply, samples, replies to each, temperature); as of `suite_replies`."""
    asked = []
    for suite, part in samples.items():
        asked.append((suite, "greedy", part, 1, 0.0))
        if params.replies and suite in drawn_samples:
            asked.append((suite, "drawn", drawn_samples[suite], params.replies, 1.0))
    return asked


def list_reply_keys(samples: dict[str, list[Sample]], drawn_samples: dict[str, list[Sample]],
                    dtype: torch.dtype, box_format: BoxFormat,
                    params: SimpleNamespace) -> dict[tuple[str, str], str]:
    """(suite, kind of reply) -> `shipped_replies.reply_key`; arguments as of `suite_replies`."""
    return {(suite, kind): shipped_replies.reply_key(
        part, box_format, dtype, count,
        SamplingOptions(temperature, max_new_tokens=params.max_new_tokens), params.seed)
        for suite, kind, part, count, temperature in _list_asked(samples, drawn_samples, params)}


def _take_shipped(keys: dict[Path, str]) -> None:
    """Put the shipped base's replies where they would be drawn, and print how many they are."""
    counts = {path.name: shipped_replies.fetch_replies(key, path) for path, key in keys.items()
              if not path.is_file()}
    if any(counts.values()):
        folder = next(iter(keys)).parent
        write_json(folder / SHIPPED_COUNTS, counts)
        print(describe_shipped(folder))


def count_endings_by_system(replies: dict, folder: Path) -> dict:
    """System -> figures of `count_endings`; replies, folder: of `suite_replies`."""
    return {system: count_endings(
        *(reply_file(folder, system, suite, kind) for suite in by_suite
          for kind in ("greedy", "drawn"))) for system, by_suite in replies.items()}
