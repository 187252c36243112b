"""`mig-kit eval`: one model on the drawn suites, on own data or on a real benchmark.

Questions, prompts, decoding and scores are those of stage 06, so a run's model gets the run's own
figures. Each reply is judged twice. Drawn suites and own data: "strict" reads the kit's answer
format alone, as stage 06; "free_text" also finds a box or letter in any text. Real benchmarks:
"official" and "strict", as `mig-kit score`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.common import file_sha256, write_atomically, write_json
from mig_kit.data import own_data
from mig_kit.engine import systems
from mig_kit.engine.models import Hardware
from mig_kit.pipeline import store
from mig_kit.prompts import LETTERS, format_answer, is_well_formed
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample
from mig_kit.scoring import run_benchmark, score
from mig_kit.scoring.convert_boxes import parse_named_box
from mig_kit.scoring.parsers import parse_choice_letter
from mig_kit.scoring.result import averaged_groups, summarize
from mig_kit.stages import evaluate
from mig_kit.stages.report import gallery_html, render_page
from mig_kit.stats import paired_gap
from mig_kit.world import suites

SUITES = ("drawn", "own", *run_benchmark.RUNNABLE)
DRAWN_SIZES = {"mig_per_task": 100, "ood_per_task": 100, "blink_per_task": 60, "mmiu_per_task": 80,
               "find_all_per_task": 0, "eval_seed": 14}  # stage 06's of the tiny profile
SHOWN = {"correct": 6, "wrong": 12}  # cards of the gallery
MODEL = "model"  # what the one system is called


@dataclass(frozen=True)
class Task:
    """What is asked. suite: one of SUITES. file: annotations or own data; root: of its images.

    limit: so many first questions of every task (of own data: of the file), 0 for all. sizes: as
    DRAWN_SIZES. orientation: one of ORIENTATIONS.
    """

    suite: str
    file: Path | None = None
    root: Path | None = None
    limit: int = 0
    sizes: Mapping = field(default_factory=lambda: DRAWN_SIZES)
    orientation: str = "upright"

    def describe(self) -> dict:
        """What tells these questions from others."""
        facts = {"suite": self.suite, "limit": self.limit}
        if self.suite == "drawn":
            return facts | dict(self.sizes)
        return facts | {"file": file_sha256(self.file), "orientation": self.orientation}


def evaluate_model(model: str | Path, task: Task, hardware: Hardware, box_format: BoxFormat,
                   out: Path, params: SimpleNamespace) -> dict:
    """Ask, judge and write to `out`: replies, predictions.jsonl, gallery.html, eval.json, which is
    also returned.

    A call that was interrupted goes on. ValueError where `out` holds another model's or other
    questions' replies. params: max_new_tokens, batch_size, workers, seed, server, concurrency.
    """
    claim_folder(out, {
        "model": str(model), "files": store.model_fingerprint(str(model)),
        "questions": task.describe(), "coordinates": str(box_format.coordinates),
        "min_pixels": box_format.min_pixels, "max_pixels": box_format.max_pixels,
        "max_new_tokens": params.max_new_tokens, "dtype": hardware.reason})
    ask = _ask_benchmark if task.suite in run_benchmark.RUNNABLE else _ask_samples
    judged, lines, gallery, replies = ask(model, task, hardware, box_format, out, params)
    _write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    cards = gallery_html(gallery, {MODEL: replies}, box_format, {})
    _write_text(out / "gallery.html", render_page(f"{model} on {task.suite}", [("Replies", cards)]))
    result = {"model": str(model), "questions": task.describe(), **judged}
    write_json(out / "eval.json", result)
    return result


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def claim_folder(out: Path, settings: dict) -> None:
    """Write what the replies in `out` follow from, or compare it with what is there."""
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        other = json.loads(path.read_text())
        if differing := [name for name in settings if settings[name] != other.get(name)]:
            raise ValueError(f"{out} holds replies made with another {differing[0]}; name another "
                             "--out, or delete that folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def load_questions(task: Task) -> dict[str, Sequence[Sample]]:
    """Suite -> samples of the drawn suites or of own data."""
    if task.suite == "own":
        own_data.require_correct_lines(task.file, task.root, task.limit or None, task.orientation)
        return {"own": list(own_data.iter_samples(task.file, task.root, task.limit or None,
                                                  task.orientation))}
    sizes = {name: min(size, task.limit) if task.limit and name.endswith("per_task") else size
             for name, size in task.sizes.items()}
    samples = evaluate.draw_test_samples(sizes)
    if not samples:
        raise ValueError("no drawn suite is left to ask; one of "
                         f"{', '.join(suites.SIZE_PARAMS.values())} must be over 0")
    return samples


def read_freely(reply: str, sample: Sample) -> str:
    """The reply in the kit's answer format where its text names a box or a letter; else as it is.

    A box in a reply that names no image is in the only image there is, else in none.
    """
    if is_well_formed(reply, sample) or sample.find_all:
        return reply
    if sample.options:
        answer = parse_choice_letter(reply, LETTERS[:len(sample.options)])
    else:
        image, box = parse_named_box(reply)
        image = image or (1 if len(sample.images) == 1 else None)
        answer = format_answer(image, box) if box is not None and image is not None else ""
    return f"<think>-</think><answer>{answer}</answer>" if answer else reply


def _ask_samples(model: str | Path, task: Task, hardware: Hardware, box_format: BoxFormat,
                 out: Path, params: SimpleNamespace) -> tuple[dict, list, list, dict]:
    samples = load_questions(task)
    none = {suite: [] for suite in samples}
    drawn = systems.suite_replies({MODEL: model}, samples, none, hardware, box_format,
                                  out / "replies", SimpleNamespace(**vars(params) | {"replies": 0}))
    strict = {suite: answers["greedy"] for suite, answers in drawn[MODEL].items()}
    free = {suite: [read_freely(reply, sample)
                    for reply, sample in zip(strict[suite], samples[suite], strict=True)]
            for suite in samples}
    judged: dict[str, dict] = {"scores": {}, "items": {}}
    for protocol, replies in (("strict", strict), ("free_text", free)):
        by_suite = {suite: {"greedy": texts, "drawn": [[]] * len(texts)}
                    for suite, texts in replies.items()}
        judged["scores"][protocol] = evaluate.summarize_systems(
            samples, {MODEL: by_suite}, box_format)[MODEL]
        judged["items"][protocol] = {
            suite: [[sample.id, "" if suite == "own" else sample.task,
                     evaluate.reply_is_correct(reply, sample, box_format)]
                    for sample, reply in zip(samples[suite], texts, strict=True)]
            for suite, texts in replies.items()}
    everything = [(sample, reply) for suite, texts in strict.items()
                  for sample, reply in zip(samples[suite], texts, strict=True)]
    lines = [{"id": sample.id, "response": reply} for sample, reply in everything]
    picked = _pick([(sample.id, sample.task, is_correct(reply, sample, box_format))
                    for sample, reply in everything])
    gallery = [(picked[sample.id], sample) for sample, _ in everything if sample.id in picked]
    return judged, lines, gallery, {sample.id: reply for sample, reply in everything}


def _ask_benchmark(model: str | Path, task: Task, hardware: Hardware, box_format: BoxFormat,
                   out: Path, params: SimpleNamespace) -> tuple[dict, list, list, dict]:
    benchmark = run_benchmark.read_runnable(task.suite, task.file, task.root, task.limit)
    sizes = run_benchmark.image_sizes(benchmark, task.root, task.orientation)
    asked = SimpleNamespace(**vars(params) | {"benchmark": task.suite})
    answers = systems.benchmark_replies(
        {MODEL: model}, lambda: run_benchmark.iter_batches(benchmark, task.root,
                                                           8 * params.batch_size),
        hardware, box_format, out / "replies", asked)[MODEL]
    judged: dict[str, dict] = {"scores": {}, "items": {}}
    for protocol in run_benchmark.PROTOCOLS:
        lines = run_benchmark.prediction_lines(benchmark, answers, sizes, box_format,
                                               exact=protocol == "strict")
        scored = score.score_predictions(benchmark, lines, "the replies", box_format, protocol,
                                         images=str(task.root))
        headline = next(iter(scored.metrics.values()))
        judged["scores"][protocol] = {task.suite: summarize(scored)}
        group = {place: str(number) for number, places in enumerate(averaged_groups(scored))
                 for place in places}
        judged["items"][protocol] = {task.suite: [
            [str(index), group[place], float(headline[place])]
            for place, index in enumerate(scored.indices)]}
    lines = run_benchmark.prediction_lines(benchmark, answers, sizes, box_format)
    correct = {name: value for name, _, value in judged["items"]["official"][task.suite]}
    picked = _pick([(str(item.index), item.task, correct[str(item.index)] >= 0.5)
                    for item in benchmark.items])
    gallery = [(picked[str(item.index)], run_benchmark.to_sample(item, benchmark.name, task.root))
               for item in benchmark.items if str(item.index) in picked]
    return judged, lines, gallery, {name: replies[0] for name, replies in answers.items()}


def _pick(outcomes: list[tuple[str, str, bool]]) -> dict[str, str]:
    """Id -> "correct" or "wrong" of the questions that the gallery shows, evenly over the tasks.

    outcomes: (id, task, is it correct).
    """
    picked = {}
    for kind, count in SHOWN.items():
        by_task: dict[str, list[str]] = {}
        for name, task, is_right in outcomes:
            if is_right == (kind == "correct"):
                by_task.setdefault(task, []).append(name)
        rounds = max(map(len, by_task.values()), default=0)
        names = [of_task[number] for number in range(rounds) for of_task in by_task.values()
                 if number < len(of_task)]
        picked |= dict.fromkeys(names[:count], kind)
    return picked


def score_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {model, protocol, suite or task -> percent, "95 %"} of results by name."""
    rows = []
    for name, result in results.items():
        for protocol, by_suite in result["scores"].items():
            row = {"model": name, "protocol": protocol}
            for suite, summary in by_suite.items():
                row |= _suite_cells(suite, summary)
            rows.append(row)
    return rows


def _suite_cells(suite: str, summary: dict) -> dict:
    if "score" in summary:
        return {suite: summary["score"], f"{suite}, 95 %": summary["ci95"]}
    average = summary["avg"]
    metric = next(name for name in average if name != "ci95")
    tasks = {task: round(values[metric], 2) for task, values in summary["tasks"].items()}
    return {**tasks, "avg": round(average[metric], 2),
            "avg, 95 %": [round(bound, 2) for bound in average["ci95"]]}


def difference_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {compared, protocol, suite, points, "95 %"}: the first result less each other, paired by
    question.

    ValueError where they did not answer the same questions.
    """
    (name, first), *others = results.items()
    rows = []
    for other_name, other in others:
        if first["questions"] != other["questions"]:
            raise ValueError(f"{name} and {other_name} did not answer the same questions; ask both "
                             "with the same --suite, --limit and files")
        for protocol, by_suite in first["items"].items():
            for suite, items in by_suite.items():
                gap = paired_gap(_differences(items, other["items"][protocol][suite]))
                rows.append({"compared": f"{name} - {other_name}", "protocol": protocol,
                             "suite": suite, "points": gap["value"], "95 %": gap["ci95"]})
    return rows


def _differences(items: list[list], others: list[list]) -> list[np.ndarray]:
    before = {name: value for name, _, value in others}
    groups: dict[str, list[float]] = {}
    for name, group, value in items:
        groups.setdefault(group, []).append(value - before[name])
    return [np.array(values) for values in groups.values()]


def read_result(folder: Path) -> dict:
    """eval.json of a finished evaluation; FileNotFoundError with one sentence where there is none.
    """
    path = folder / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no eval.json; finish that mig-kit eval first")
    return json.loads(path.read_text())
