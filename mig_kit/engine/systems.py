"""Replies of several systems to the same samples, one model in memory at a time (stage 06)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.engine.models import Hardware, Policy
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.engine.sampling import make_cache, open_policy, sample_replies
from mig_kit.engine.server import ServedModel
from mig_kit.sample import Sample


def suite_replies(models: dict[str, str | Path], samples: dict[str, list[Sample]],
                  drawn_samples: dict[str, list[Sample]], hardware: Hardware,
                  box_format: BoxFormat, folder: Path, params: SimpleNamespace) -> dict:
    """Greedy replies to all samples, and `params.replies` at temperature 1 to some of them.

    models: system -> model folder. samples, drawn_samples: by suite. folder: where replies are
    stored, and resumed from. Gives system -> suite -> {"greedy": [reply], "drawn": [[reply]]}, in
    the order of `samples`; a sample without drawn replies has []. With `params.server` each system
    is served in its turn.
    """
    caches: dict[str, PromptCache] = {}
    replies: dict[str, dict] = {}
    for system, model in models.items():
        for cache in caches.values():
            cache.release()  # so that two models need not be in memory at a time
        release_memory()
        with open_policy(model, system, hardware, box_format, folder.parent, params) as policy:
            replies[system] = _system_replies(policy, system, caches, samples, drawn_samples,
                                              folder, params)
            policy = None  # frees the system before the next
    return replies


def _system_replies(policy: Policy | ServedModel, system: str, caches: dict[str, PromptCache],
                    samples: dict[str, list[Sample]], drawn_samples: dict[str, list[Sample]],
                    folder: Path, params: SimpleNamespace) -> dict:
    """One system's part of `suite_replies`; caches: by suite, filled here."""
    for cache in caches.values():  # no stage trains the vision tower: all systems see the same
        cache.serve(policy.model)
    answers = {}
    for suite, suite_samples in samples.items():
        cache = None
        if isinstance(policy, Policy):
            cache = caches[suite] if suite in caches else make_cache(policy)
            caches[suite] = cache

        def ask(kind: str, questions: list[Sample], count: int, temperature: float,
                cache=cache, name=f"{system}_{suite}") -> dict[str, list[str]]:
            return sample_replies(
                policy, questions, folder / f"{name}_{kind}.jsonl", replies=count,
                temperature=temperature, max_new_tokens=params.max_new_tokens,
                batch_size=params.batch_size, seed=params.seed, workers=params.workers,
                label=f"{name.replace('_', ' ', 1)} {kind}", cache=cache)

        greedy = ask("greedy", suite_samples, 1, 0.0)
        drawn = ask("drawn", drawn_samples[suite], params.replies, 1.0) if params.replies else {}
        answers[suite] = {"greedy": [greedy[sample.id][0] for sample in suite_samples],
                          "drawn": [drawn.get(sample.id, []) for sample in suite_samples]}
    return answers


def benchmark_replies(models: dict[str, str | Path],
                      batches: Callable[[], Iterable[list[Sample]]], hardware: Hardware,
                      box_format: BoxFormat, folder: Path, params: SimpleNamespace) -> dict:
    """Greedy replies to a real benchmark: system -> sample id -> [reply].

    batches: opens the images anew for every system, a few samples at a time.
    """
    replies: dict[str, dict[str, list[str]]] = {}
    for system, model in models.items():
        replies[system] = {}
        with open_policy(model, system, hardware, box_format, folder.parent, params) as policy:
            for batch in batches():
                replies[system] |= sample_replies(
                    policy, batch, folder / f"{system}_real_{params.benchmark}.jsonl", replies=1,
                    temperature=0.0, max_new_tokens=params.max_new_tokens,
                    batch_size=params.batch_size, seed=params.seed, workers=params.workers)
            policy = None  # frees the system before the next
    return replies
