"""Draw replies to many samples with one model, batch by batch, into a file that a killed stage resumes from."""

import json
import os
from contextlib import closing
from pathlib import Path
from threading import Lock

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory
from mig_kit.engine.decoding import fuse_decoding_weights
from mig_kit.engine.generation import Sampling, draw_uniforms, generate_rollouts
from mig_kit.engine.models import Hardware, unwrap_peft
from mig_kit.engine.parallel import map_in_threads
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.sample import Sample


def greedy_replies(model, processor, samples: list[Sample], hw: Hardware, box_format: BoxFormat,
                   max_new_tokens: int = 128) -> list[str]:
    """One greedy reply per sample, decoded."""
    prompts = PromptCache(model, processor, box_format, autocast=hw.autocast).get(samples)
    groups = generate_rollouts(model.eval(), processor, prompts, 1, Sampling(0.0, max_new_tokens=max_new_tokens), autocast=hw.autocast)
    return processor.tokenizer.batch_decode([group[0] for group in groups], skip_special_tokens=True)


def load_replies(path: Path) -> dict[str, list[str]]:
    """Replies by sample id from a rollout file; a last line cut by a kill is dropped from the file."""
    if not path.is_file():
        return {}
    lines, whole = path.read_text().split("\n"), []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except ValueError:
            continue
    text = "".join(json.dumps(row) + "\n" for row in whole)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)
    return {row["id"]: row["replies"] for row in whole}


def _image_list_key(sample: Sample) -> tuple[int, ...]:
    """What tells a list of images from others without reading them."""
    return tuple(map(id, sample.images))


def sample_replies(model, processor, samples: list[Sample], path: Path, *, replies: int, temperature: float,
                   max_new_tokens: int, batch_size: int, seed: int, box_format: BoxFormat, autocast: bool,
                   label: str = "rollouts", cache: PromptCache | None = None, workers: int = 1) -> dict[str, list[str]]:
    """`replies` replies to every sample, appended to `path` batch by batch; what is there already is not drawn again.

    Each batch has its own seed, and batches are cut before anything is skipped, so a resumed run draws what an
    uninterrupted one would have drawn. Questions about the same image objects are asked together, for `rollouts` reads these
    once. cache: prompts made ready by an earlier call for the same samples and model. workers: batches under way at a time, on a
    CPU; the replies are the same. Raises ValueError for fewer than one reply.
    """
    if replies < 1:
        raise ValueError(f"replies is {replies}; a prompt needs at least one reply (only 06_evaluate can do without)")
    have = load_replies(path)
    cache = cache or PromptCache(model, processor, box_format, limit=batch_size, autocast=autocast)
    first: dict[tuple[int, ...], str] = {}
    for s in samples:
        first[_image_list_key(s)] = min(s.id, first.get(_image_list_key(s), s.id))
    order = sorted(samples, key=lambda s: (len(s.images), first[_image_list_key(s)], s.id))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [(number, batch) for number, batch in enumerate(batches) if not all(s.id in have for s in batch)]
    alone = Lock()  # the cache and the tokenizer are for one thread at a time

    def drawn(numbered: tuple[int, list[Sample]]) -> list[list[list[int]]]:
        number, batch = numbered
        with alone:
            prompts = cache.get(batch)
        draws = draw_uniforms(seed * 1_000_003 + number, len(batch), replies, max_new_tokens)
        return generate_rollouts(model, processor, prompts, replies, sampling, draws, autocast, joined)

    with path.open("a") as file, fuse_decoding_weights(unwrap_peft(model), autocast) as joined, \
            closing(map_in_threads(drawn, todo, workers)) as found:
        for groups, (number, batch) in zip(progress_bar(found, label, total=len(batches), initial=len(batches) - len(todo)), todo):
            for sample, group in zip(batch, groups):
                if sample.id not in have:
                    with alone:
                        have[sample.id] = processor.tokenizer.batch_decode(group, skip_special_tokens=True)
                    file.write(json.dumps({"id": sample.id, "replies": have[sample.id]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if number % 8 == 7:
                release_memory()
    return {s.id: have[s.id] for s in samples}
