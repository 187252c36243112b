"""Stage 02: what to learn from, where that is not just 01's traces.

Another file of traces, such as a model's own correct replies (`traces_file`); only the traces whose
question the base answers correctly so often (`trace_pass_rates`); and the base's own replies to
lessons of notebook 90 among them (`replay_share`), against forgetting. An answer counts as correct
where 01's filter passes it: an edited reward does not make fine-tuning stale.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROJECT_ROOT, file_sha256
from mig_kit.engine.model_folders import find_file
from mig_kit.engine.models import TINY_BASE, Policy, resolve_model
from mig_kit.engine.sampling import sample_replies
from mig_kit.filters import drop_reason
from mig_kit.prompts import cut_reasoning
from mig_kit.sample import Sample, Trace, read_replies, read_samples, write_samples

LESSONS_AT_ONCE = 256  # that the base answers together
ALL_RATES = [0.0, 1.0]


def choose_traces(params: SimpleNamespace, traces: Path) -> Path:
    """The file to learn from: 01's `traces`, or `params.traces_file`.

    FileNotFoundError, or ValueError, for one that is none; ValueError where another parameter of
    this module cannot act. Nothing is drawn.
    """
    low, high = check_rates(params.trace_pass_rates)
    if [low, high] != ALL_RATES and params.trace_replies < 1:
        raise ValueError("trace_pass_rates needs trace_replies of at least 1")
    if not 0 <= params.replay_share < 1:
        raise ValueError(f"replay_share is {params.replay_share}; give a share from 0 to below 1")
    if params.replay_share:
        _check_base_knows_lessons(params.base_model)
        _lessons_file(traces)
    if not params.traces_file:
        return traces
    path = PROJECT_ROOT / params.traces_file
    if not path.is_file():
        raise FileNotFoundError(f"traces_file {path} is not there; give a file such as "
                                "runs/default/04_rejection_sampling/correct.parquet")
    if path.suffix != ".parquet" or "reply" not in pyarrow.parquet.read_schema(path).names:
        raise ValueError(f"traces_file {path} holds no replies; give a cot.parquet of 01 or a "
                         "correct.parquet of 04")
    return path


def check_rates(rates: list) -> tuple[float, float]:
    """The lowest and the highest pass rate; ValueError unless both are in 0..1, in this order."""
    if len(rates) != 2 or not 0 <= rates[0] <= rates[1] <= 1:
        raise ValueError(f"trace_pass_rates is {rates}; give the lowest and the highest pass rate, "
                         "as [0.1, 0.9]")
    return rates[0], rates[1]


def _check_base_knows_lessons(base_model: str) -> None:
    tokenizer = find_file(resolve_model(base_model), "tokenizer.json")
    if tokenizer is None or file_sha256(tokenizer) != file_sha256(TINY_BASE / "tokenizer.json"):
        raise ValueError("replay_share asks what the tiny base was taught (notebook 90), and "
                         f"base_model '{base_model}' was not; set replay_share to 0")


def _lessons_file(traces: Path) -> Path:
    path = traces.with_name("lessons.parquet")
    if not path.is_file():
        raise FileNotFoundError("replay_share needs the lessons' questions; run 01_synthesize with "
                                "lesson_questions, 2000 for a share of 0.25")
    return path


def needs_base(params: SimpleNamespace) -> bool:
    """Whether the base has to answer before it is known what to learn from."""
    return params.replay_share > 0 or params.trace_pass_rates != ALL_RATES


def curate_traces(policy: Policy, traces: Path, cot: Path, folder: Path,
                  params: SimpleNamespace) -> tuple[Path, dict]:
    """A file in `folder` with the traces that are kept and the replay among them; and figures.

    policy: the base. traces: of `choose_traces`; cot: 01's, beside which the lessons lie. Replies
    are stored in `folder` as they come, and resumed from.
    """
    samples, replies = read_samples(traces), read_replies(traces)
    figures = {}
    if params.trace_pass_rates != ALL_RATES:
        rates = base_pass_rates(policy, samples, folder / "pass_rates.jsonl", params)
        low, high = params.trace_pass_rates
        kept = np.flatnonzero((low <= rates) & (rates <= high)).tolist()
        if not kept:
            raise ValueError(f"the base answers no question with a pass rate within {low} to "
                             f"{high}; widen trace_pass_rates")
        figures["pass_rates"] = {"traces": len(samples), "kept": len(kept),
                                 "mean": float(rates.mean())}
        samples, replies = samples.select(kept), replies.select(kept)
    lessons, answers = [], []
    if params.replay_share:
        learned = replies if params.reasoning else map(cut_reasoning, replies)
        n_tokens = count_tokens(policy, learned)
        questions = read_samples(_lessons_file(cot))
        lessons, answers = draw_replay(policy, questions, n_tokens, folder, params)
        n_replayed = count_tokens(policy, answers)
        figures["replay"] = {"rows": len(lessons), "tokens": n_replayed,
                             "share": n_replayed / (n_replayed + n_tokens)}
    path = folder / "traces.parquet"
    write_samples(path, chain(samples, lessons),
                  (Trace(reply, "", "") for reply in chain(replies, answers)))
    return path, figures


def count_tokens(policy: Policy, replies: Iterable[str]) -> int:
    """Tokens that carry loss: of the replies, their ends included."""
    encoded = policy.processor.tokenizer(list(replies), add_special_tokens=False)["input_ids"]
    return sum(len(tokens) + 1 for tokens in encoded)


def base_pass_rates(policy: Policy, samples: Sequence[Sample], path: Path,
                    params: SimpleNamespace) -> np.ndarray:
    """Share of the base's correct replies at temperature 1, of `trace_replies`; (samples,).

    What the reply reasons, and whether it does, does not count: the tiny base only answers.
    """
    drawn = _draw(policy, samples, path, params.trace_replies, params.seed, params)
    return np.array([np.mean([_answers_correctly(reply, sample, policy.box_format)
                              for reply in drawn[sample.id]]) for sample in samples])


def _answers_correctly(reply: str, sample: Sample, box_format: BoxFormat) -> bool:
    return not drop_reason(f"<think></think>{cut_reasoning(reply)}", sample, box_format)


def draw_replay(policy: Policy, questions: Sequence[Sample], n_tokens: int, folder: Path,
                params: SimpleNamespace) -> tuple[list[Sample], list[str]]:
    """Lessons with the base's own replies at temperature 1, `replay_share` of all tokens.

    n_tokens: of the other replies. At temperature 1 the base's replies teach the base nothing on
    average; greedy ones would sharpen it. A reply without an end is left out. ValueError where
    there are too few questions.
    """
    wanted = n_tokens * params.replay_share / (1 - params.replay_share)
    samples, replies = [], []
    n_drawn = 0
    for start in range(0, len(questions), LESSONS_AT_ONCE):
        block = start // LESSONS_AT_ONCE
        asked = list(questions[start:start + LESSONS_AT_ONCE])
        drawn = _draw(policy, asked, folder / f"replay_{block}.jsonl", 1,
                      params.seed * 1009 + block, params)
        for sample in asked:
            (reply,) = drawn[sample.id]
            size = count_tokens(policy, [reply])
            if n_drawn < wanted and size <= params.max_new_tokens:
                samples.append(sample)
                replies.append(reply)
                n_drawn += size
        if n_drawn >= wanted:
            return samples, replies
    share = n_drawn / (n_drawn + n_tokens)
    raise ValueError(f"the {len(questions)} lessons of 01 give a replay_share of {share:.3f}; "
                     "raise lesson_questions in 01, or lower replay_share")


def _draw(policy: Policy, samples: Sequence[Sample], path: Path, count: int, seed: int,
          params: SimpleNamespace) -> dict[str, list[str]]:
    on_gpu = policy.hardware.device == "cuda"
    return sample_replies(
        policy, samples, path, replies=count, temperature=1.0,
        max_new_tokens=params.max_new_tokens, batch_size=4 if on_gpu else 64, seed=seed,
        workers=1 if on_gpu else 2, label=path.stem.replace("_", " "))
