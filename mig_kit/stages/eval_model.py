"""`mig-kit eval`: one model on the drawn suites, on own data or on a real benchmark.

Questions, prompts, decoding and scores are those of stage 06, so a run's model gets the run's own
figures. Each reply is judged twice. Drawn suites and own data: "strict" reads the kit's answer
format alone, as stage 06; "free_text" also finds a box or letter in any text. Real benchmarks:
"official" and "strict", as `mig-kit score`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import file_sha256, write_atomically, write_json
from mig_kit.data import own_data
from mig_kit.engine import merging, models, systems
from mig_kit.engine.model_folders import find_revision
from mig_kit.engine.models import Hardware
from mig_kit.engine.processors import prompt_measure
from mig_kit.pipeline import store
from mig_kit.pipeline.fingerprints import hash_images
from mig_kit.plots import HELD_OUT_NAMES
from mig_kit.prompts import (
    LETTERS,
    format_answer,
    format_answers,
    format_question,
    is_well_formed,
    parse_boxes,
)
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample, read_samples
from mig_kit.scoring import run_benchmark, score
from mig_kit.scoring.annotations import Benchmark
from mig_kit.scoring.box_lists import parse_named_boxes
from mig_kit.scoring.choice_parsers import parse_choice_letter
from mig_kit.scoring.convert_boxes import parse_named_box
from mig_kit.scoring.result import averaged_groups, number_lists, summarize
from mig_kit.stages import evaluate
from mig_kit.stages.report import gallery_html, render_page
from mig_kit.world import suites

DRAWN_SIZES = {"mig_per_task": 100, "ood_per_task": 100, "blink_per_task": 60, "mmiu_per_task": 80,
               "find_all_per_task": 0, "eval_seed": 14}  # stage 06's of the tiny profile
# what a model is asked with, where neither its run's 06 nor the caller says otherwise
DEFAULTS = {**DRAWN_SIZES, "max_new_tokens": 128, "batch_size": 64, "dtype": "auto"}
SHOWN = {"correct": 6, "wrong": 12}  # cards of the gallery
MODEL = "model"  # what the one system is called
HOLDS_OTHER = {  # by what differs: what the replies in a folder are
    "questions": "to other questions", "model": "of another model", "files": "of another model",
    "adapter": "of another adapter",
    "images": "about other images (files that have changed, of another folder, or drawn by another "
              "version of the kit)"}
Questions = dict[str, Sequence[Sample]] | tuple[Benchmark, dict[str, list[tuple[int, int]]]]


@dataclass(frozen=True)
class Task:
    """What is asked. suite: drawn, own or one of RUNNABLE. file: annotations or own data; root: of
    its images.

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

    def digest_images(self, questions: Questions) -> str:
        """What tells the pictures of these questions from others under the same names."""
        if self.suite == "drawn":
            return " ".join(evaluate.digest_questions(questions).values())
        is_table = self.file.suffix == ".parquet"  # whose file names its images by their SHA-256
        return "" if is_table else hash_images(self.suite, self.file, self.root, self.limit)


@dataclass(frozen=True)
class AskedModel:
    """folder: of the model, or its hub name. adapter: a LoRA adapter to merge into it first.

    four_bit: whether the adapter was trained on 4-bit weights.
    """

    folder: str | Path
    box_format: BoxFormat
    adapter: Path | None = None
    four_bit: bool = False

    def describe(self) -> dict:
        """What tells this model's replies from others."""
        files = store.model_fingerprint(str(self.folder))
        kinds = ({}, {"find_all": True}, {"options": ("", ""), "letter": "A"})
        facts = {"model": str(self.folder),
                 "files": files or {"revision": find_revision(self.folder)},
                 "coordinates": str(self.box_format.coordinates),
                 "min_pixels": self.box_format.min_pixels,
                 "max_pixels": self.box_format.max_pixels,
                 "prompt": [format_question(Sample("", "", "", "", (), "", **kind),
                                            self.box_format) for kind in kinds]}
        if self.adapter is None:
            return facts
        return facts | {"adapter": store.model_fingerprint(str(self.adapter.absolute())),
                        "four_bit": self.four_bit}


def evaluate_model(model: AskedModel, task: Task, hardware: Hardware, out: Path,
                   params: SimpleNamespace) -> dict:
    """Ask, judge and write to `out`: replies, predictions.jsonl, gallery.html, eval.json, which is
    also returned.

    A call that was interrupted goes on. ValueError where `out` holds another model's or other
    questions' replies; nothing is written before all questions are known to be usable. params:
    max_new_tokens, batch_size, workers, seed, server, concurrency.
    """
    questions = load_questions(task)
    if isinstance(questions, dict):  # a benchmark's prompts are short
        measure = prompt_measure(model.folder, model.box_format)
        for sample in chain.from_iterable(questions.values()):
            if problem := measure(sample):
                raise ValueError(f"question {sample.id}: {problem} (--max-pixels)")
    claim_folder(out, {
        **model.describe(), "questions": task.describe(),
        "images": (images := task.digest_images(questions)),
        "max_new_tokens": params.max_new_tokens,
        "device": "a server" if params.server else hardware.device,
        "dtype": f"{hardware.dtype}, autocast {hardware.autocast}"})
    folder = model.folder if model.adapter is None else _merge_adapter(model, hardware, out)
    is_benchmark = task.suite in run_benchmark.RUNNABLE
    ask = _ask_benchmark if is_benchmark else _ask_samples
    judged, lines, gallery, replies = ask(folder, questions, task, hardware, model.box_format, out,
                                          params)
    _write_text(out / "predictions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    cards = gallery_html(gallery, {MODEL: replies}, model.box_format, {})
    page = render_page(f"{model.folder}: {task.suite}", [("Replies, read as free text", cards)])
    _write_text(out / "gallery.html", page)
    result = {"model": str(model.folder), "questions": task.describe() | {"images": images},
              "max_new_tokens": params.max_new_tokens, **judged}
    write_json(out / "eval.json", result)
    return result


def _merge_adapter(model: AskedModel, hardware: Hardware, out: Path) -> Path:
    """The folder of the model with its adapter, which `out` keeps."""
    merged = out / "merged"
    if not merged.is_dir():  # it is there whole or not at all
        processor = models.load_processor(model.folder, model.box_format)
        merging.write_merged_model(model.folder, model.adapter, merged, hardware, processor,
                                   model.four_bit)
    return merged


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def claim_folder(out: Path, settings: dict) -> None:
    """Write what the replies in `out` follow from, or compare it with what is there."""
    path = out / "settings.json"
    if not path.is_file():
        for name in ("predictions.jsonl", "eval.json", "gallery.html"):
            if (out / name).exists():
                raise ValueError(f"{out / name} is of no mig-kit eval that could go on, and would "
                                 "be overwritten; name another --out")
    settings = json.loads(json.dumps(settings))
    other = json.loads(path.read_text()) if path.is_file() else settings
    for name in (*settings, *other):
        before, now = other.get(name), settings.get(name)
        if before != now:
            what = HOLDS_OTHER.get(name, f"made with another {name}")
            raise ValueError(f"{out} holds replies {what}{_name_difference(before, now)}; name "
                             "another --out, or delete that folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _name_difference(before: object, now: object) -> str:
    """What differs, in brackets: names of files, or two short values; "" where that says nothing.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in before | now if before.get(name) != now.get(name))
        return f" (another {', '.join(names[:3])})"
    is_short = all(isinstance(value, int | str) and len(str(value)) < 60 for value in (before, now))
    return f" ({before}, now {now})" if is_short else ""


def load_questions(task: Task) -> Questions:
    """Suite -> samples of the drawn suites or of own data; of a real benchmark its items and the
    sizes of their images.
    """
    if task.suite in run_benchmark.RUNNABLE:
        benchmark = run_benchmark.read_runnable(task.suite, task.file, task.root, task.limit)
        return benchmark, run_benchmark.image_sizes(benchmark, task.root, task.orientation)
    if task.suite == "own":
        samples = _load_own_data(task)
        if not samples:
            raise ValueError(f"{task.file} holds no question; give a file with one a line")
        return {samples[0].suite: samples}
    sizes = {name: min(size, task.limit) if task.limit and name.endswith("per_task") else size
             for name, size in task.sizes.items()}
    samples = evaluate.draw_test_samples(sizes)
    if not samples:
        raise ValueError("no drawn suite is left to ask; one of "
                         f"{', '.join(suites.SIZE_PARAMS.values())} must be over 0")
    return samples


def _load_own_data(task: Task) -> Sequence[Sample]:
    """A table of stage 01 as 06 scores it, `limit` questions evenly spaced; or the first lines of a
    JSONL.
    """
    if task.file.suffix == ".parquet":
        return evaluate.spread_samples(read_samples(task.file), task.limit)
    limit = task.limit or None
    return list(own_data.iter_samples(task.file, task.root, limit, task.orientation))


def read_freely(reply: str, sample: Sample) -> str:
    """The reply in the kit's answer format where its text names a box or a letter, its text being
    the reasoning; else as it is.

    A box in a reply that names no image is in the only image there is, else in none. Where all
    boxes are asked for, one whose image stays open leaves the reply as it is; "none" is read in the
    kit's format alone.
    """
    if is_well_formed(reply, sample) or sample.find_all and parse_boxes(reply) is not None:
        return reply
    only_image = 1 if len(sample.images) == 1 else None
    if sample.find_all:
        named = [(image or only_image, box) for image, box in parse_named_boxes(reply)]
        is_located = named and all(image is not None for image, _ in named)
        answer = format_answers(dict.fromkeys(named)) if is_located else ""
    elif sample.options:
        letters = LETTERS[:len(sample.options)]
        answer = parse_choice_letter(reply, letters, tuple(sample.options))
    else:
        image, box = parse_named_box(reply)
        image = image or only_image
        answer = format_answer(image, box) if box is not None and image is not None else ""
    text = re.sub("</?(?:think|answer)>", " ", reply).strip()
    return f"<think>{text}</think><answer>{answer}</answer>" if answer else reply


def _ask_samples(model: str | Path, samples: dict[str, Sequence[Sample]], task: Task,
                 hardware: Hardware, box_format: BoxFormat, out: Path,
                 params: SimpleNamespace) -> tuple[dict, list, list, dict]:
    """(scores and items, lines of predictions, gallery, replies by sample id)."""
    none = {suite: [] for suite in samples}
    drawn = systems.suite_replies({MODEL: model}, samples, none, hardware, box_format,
                                  out / "replies", SimpleNamespace(**vars(params) | {"replies": 0}))
    strict = {suite: answers["greedy"] for suite, answers in drawn[MODEL].items()}
    free = {suite: [read_freely(reply, sample)
                    for reply, sample in zip(strict[suite], samples[suite], strict=True)]
            for suite in samples}
    judged: dict[str, dict] = {"scores": {}, "items": {}, "lists": {
        suite: evaluate.number_image_lists(questions).tolist()
        for suite, questions in samples.items() if suite in HELD_OUT_NAMES}}
    for protocol, replies in (("strict", strict), ("free_text", free)):
        by_suite = {suite: {"greedy": texts, "drawn": [[]] * len(texts)}
                    for suite, texts in replies.items()}
        judged["scores"][protocol] = evaluate.summarize_systems(
            samples, {MODEL: by_suite}, box_format)[MODEL]
        judged["items"][protocol] = {
            suite: [[sample.id, "" if suite in HELD_OUT_NAMES else sample.task,
                     evaluate.reply_is_correct(reply, sample, box_format)]
                    for sample, reply in zip(samples[suite], texts, strict=True)]
            for suite, texts in replies.items()}
    read = [(sample, reply) for suite, texts in free.items()
            for sample, reply in zip(samples[suite], texts, strict=True)]
    judged["unread"] = sum(not is_well_formed(reply, sample) for sample, reply in read)
    lines = [{"id": sample.id, "response": reply} for suite, texts in strict.items()
             for sample, reply in zip(samples[suite], texts, strict=True)]
    picked = _pick([(sample.id, sample.task, is_correct(reply, sample, box_format))
                    for sample, reply in read])
    gallery = [(picked[sample.id], sample) for sample, _ in read if sample.id in picked]
    return judged, lines, gallery, {sample.id: reply for sample, reply in read}


def _ask_benchmark(model: str | Path, questions: tuple[Benchmark, dict], task: Task,
                   hardware: Hardware, box_format: BoxFormat, out: Path,
                   params: SimpleNamespace) -> tuple[dict, list, list, dict]:
    """As `_ask_samples`; questions: the benchmark and the sizes of its images."""
    benchmark, sizes = questions
    asked = SimpleNamespace(**vars(params) | {"benchmark": task.suite})
    answers = systems.benchmark_replies(
        {MODEL: model}, lambda: run_benchmark.iter_batches(benchmark, task.root,
                                                           8 * params.batch_size),
        hardware, box_format, out / "replies", asked)[MODEL]
    judged: dict[str, dict] = {"scores": {}, "items": {}, "lists": {}}
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
        judged["lists"] = {task.suite: number_lists(scored).tolist()}
    lines = run_benchmark.prediction_lines(benchmark, answers, sizes, box_format)
    correct = {name: value for name, _, value in judged["items"]["official"][task.suite]}
    picked = _pick([(str(item.index), item.task, correct[str(item.index)] >= 0.5)
                    for item in benchmark.items])
    gallery = [(picked[str(item.index)], run_benchmark.to_sample(item, benchmark.name, task.root))
               for item in benchmark.items if str(item.index) in picked]
    judged["unread"] = sum(not run_benchmark.names_answer(
        item, answers[run_benchmark.sample_id(benchmark.name, item)][0])
        for item in benchmark.items)
    return judged, lines, gallery, {sample.id: read_freely(answers[sample.id][0], sample)
                                    for _, sample in gallery}


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
