"""Replies of several systems to the same samples, one model in memory at a time (stage 06)."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.models.loading import Hardware, Policy, load_policy
from mig_kit.models.sample_prompts import SampleCache, make_cache, reply_logps
from mig_kit.sample import Sample
from mig_kit.serving import stored_replies
from mig_kit.serving.reply_files import open_policy, sample_replies
from mig_kit.serving.server import ServedModel

KL_SAMPLES = 10  # of a suite


def suite_replies(models: dict[str, str | Path], samples: dict[str, list[Sample]],
                  drawn_samples: dict[str, list[Sample]], hardware: Hardware,
                  box_format: BoxFormat, folder: Path, params: SimpleNamespace) -> dict:
    """Greedy replies to all samples, and `params.replies` at temperature 1 to some of them.

    models: system -> model folder. samples, drawn_samples: by suite. folder: stores the replies.
    Returns system -> suite -> {"greedy": [reply], "drawn": [[reply]]}, in the order of `samples`; a
    sample without drawn replies has [].
    """
    cache: SampleCache | None = None
    replies: dict[str, dict] = {}
    for system, model in models.items():
        if cache:
            cache.release()  # so that two models need not be in memory at a time
        release_memory()
        with open_policy(model, system, hardware, box_format, folder.parent, params) as policy:
            if cache:  # no stage trains the vision tower: all systems see the same
                cache.serve(policy.model)
            elif isinstance(policy, Policy):
                cache = make_cache(policy)
            replies[system] = _system_replies(policy, system, cache, samples, drawn_samples,
                                              folder, params)
            policy = None  # frees the system before the next
    return replies


def reply_file(folder: Path, system: str, suite: str, kind: str) -> Path:
    """Where a system's replies to a suite are stored; kind: greedy, or drawn at temperature 1."""
    return folder / f"{system}_{suite}_{kind}.jsonl"


def count_endings(replies: dict, folder: Path) -> dict:
    """System -> `stored_replies.count_endings`; replies, folder: of `suite_replies`."""
    return {system: stored_replies.count_endings(
        *(reply_file(folder, system, suite, kind) for suite in by_suite
          for kind in ("greedy", "drawn"))) for system, by_suite in replies.items()}


def _system_replies(policy: Policy | ServedModel, system: str, cache: SampleCache | None,
                    samples: dict[str, list[Sample]], drawn_samples: dict[str, list[Sample]],
                    folder: Path, params: SimpleNamespace) -> dict:
    """One system's part of `suite_replies`; cache: of a policy."""
    answers = {}
    for suite, suite_samples in samples.items():
        def ask(kind: str, questions: list[Sample], count: int, temperature: float,
                suite=suite) -> dict[str, list[str]]:
            return sample_replies(
                policy, questions, reply_file(folder, system, suite, kind), replies=count,
                temperature=temperature, max_new_tokens=params.max_new_tokens, seed=params.seed,
                label=f"{system} {suite} {kind}", cache=cache)

        greedy = ask("greedy", suite_samples, 1, 0.0)
        drawn = ask("drawn", drawn_samples[suite], params.replies, 1.0) if params.replies else {}
        answers[suite] = {"greedy": [greedy[sample.id][0] for sample in suite_samples],
                          "drawn": [drawn.get(sample.id, []) for sample in suite_samples]}
    return answers


def kl_from_base(models: dict[str, str | Path], samples: dict[str, list[Sample]], replies: dict,
                 hardware: Hardware, box_format: BoxFormat) -> dict:
    """KL(system || base) in nats: system -> suite -> figures; one model in memory at a time.

    The mean of log p_system - log p_base over the first reply at temperature 1 to KL_SAMPLES
    samples of a suite: {"per_token", "per_reply", "standard_error" (of per_reply), "replies"}.
    """
    questions: dict[str, dict[str, list[tuple[Sample, str]]]] = {
        system: {suite: _spread_replies(samples[suite], answers["drawn"])
                 for suite, answers in by_suite.items()}
        for system, by_suite in replies.items() if system != "base"}
    own: dict[str, dict[str, list[np.ndarray]]] = {}
    for system, by_suite in questions.items():
        policy = None  # frees the system before the next
        policy = load_policy(models[system], hardware, box_format)
        own[system] = {suite: _reply_logps(policy, rows) for suite, rows in by_suite.items()}
    policy = None
    policy = load_policy(models["base"], hardware, box_format)
    return {system: {suite: _summarize_kl(own[system][suite], _reply_logps(policy, rows))
                     for suite, rows in by_suite.items()}
            for system, by_suite in questions.items()}


def _spread_replies(samples: list[Sample], drawn: Sequence[list[str]]) -> list[tuple[Sample, str]]:
    rows = [row for row, replies in enumerate(drawn) if replies]
    return [(samples[row], drawn[row][0])
            for row in rows[::max(1, len(rows) // KL_SAMPLES)][:KL_SAMPLES]]


def _reply_logps(policy: Policy, rows: list[tuple[Sample, str]]) -> list[np.ndarray]:
    samples, replies = map(list, zip(*rows))
    logps = reply_logps(policy.model, policy.processor, samples, replies, policy.box_format)
    return [values.double().numpy() for values in logps]


def _summarize_kl(own: list[np.ndarray], base: list[np.ndarray]) -> dict:
    sums = np.array([(a - b).sum() for a, b in zip(own, base, strict=True)])
    error = sums.std(ddof=1) / len(sums) ** 0.5 if len(sums) > 1 else None
    return {"per_token": float(sums.sum() / sum(map(len, own))), "per_reply": float(sums.mean()),
            "standard_error": error, "replies": len(sums)}
