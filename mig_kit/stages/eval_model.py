"""`mig-kit eval`: one model on the drawn suites, on own data or on a real benchmark.

Questions, prompts, decoding and scores are those of stage 06, so a run's model gets the run's own
figures. Each reply is judged twice. Drawn suites and own data: "strict" reads the kit's answer
format alone, as stage 06; "free_text" also finds a box or letter in any text. Real benchmarks:
"official" and "strict", as `mig-kit score`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from mig_kit.boxes import BoxFormat
from mig_kit.common import file_sha256, write_atomically, write_json
from mig_kit.data import own_data
from mig_kit.engine import merging, models, systems
from mig_kit.engine.model_folders import ServedName, find_revision
from mig_kit.engine.models import Hardware
from mig_kit.engine.processors import prompt_measure
from mig_kit.pipeline import store
from mig_kit.pipeline.fingerprints import hash_images, iter_own_images
from mig_kit.prompts import (
    LETTERS,
    format_answer,
    format_answers,
    format_question,
    is_well_formed,
    parse_boxes,
)
from mig_kit.sample import Sample, read_samples
from mig_kit.score import protocols, run_benchmark
from mig_kit.score.annotations import Benchmark
from mig_kit.score.choice_parsers import parse_choice_letter
from mig_kit.score.reply_boxes import parse_named_box, parse_named_boxes
from mig_kit.score.result import averaged_groups, number_lists, summarize
from mig_kit.stages import evaluate
from mig_kit.stats import paired_gap_by_list
from mig_kit.world.suites import OWN, SUITES, suite_title

DRAWN_SIZES = {"eval_seed": 53, **{suite.size_param: suite.default
                                   for suite in SUITES.values()}}  # as notebook 06
# what a model is asked with, where neither its run's 06 nor the caller says otherwise
DEFAULTS = {**DRAWN_SIZES, "max_new_tokens": 128, "dtype": "auto"}
BATCH = 512  # questions of a benchmark whose images are open at a time
MODEL = "model"  # what the one system is called
BOX_FIGURES = {"precision": "precision, IoU 0.5", "recall": "recall, IoU 0.5", "f1": "F1, IoU 0.5",
               "rejection": "rejection rate", "wrong_rejection": "wrongly none"}
Questions = dict[str, Sequence[Sample]] | tuple[Benchmark, dict[str, list[tuple[int, int]]]]


@dataclass(frozen=True)
class Task:
    """What is asked. suite: drawn, own or one of RUNNABLE. file: annotations or own data; root: of
    its images.

    limit: so many first questions of every task (of own data: of the file), 0 for all. sizes: as
    DRAWN_SIZES.
    """

    suite: str
    file: Path | None = None
    root: Path | None = None
    limit: int = 0
    sizes: Mapping | None = None

    def describe(self, questions: Questions) -> dict:
        """What tells these questions, and the pictures that they are about, from others."""
        facts = {"suite": self.suite, "limit": self.limit}
        if self.suite == "drawn":
            digests = evaluate.digest_questions(questions)
            return facts | dict(self.sizes or DRAWN_SIZES) | {"images": " ".join(digests.values())}
        facts["file"] = file_sha256(self.file)
        if self.file.suffix == ".parquet":  # which names its images by their SHA-256
            return facts
        images = (iter_own_images(self.file, self.root, self.limit) if self.suite == "own"
                  else run_benchmark.iter_image_paths(questions[0], self.root))
        return facts | {"images": hash_images(images, self.root)}


@dataclass(frozen=True)
class AskedModel:
    """folder: of the model, its hub name, or a ServedName. adapter: a LoRA adapter to merge into it
    first.

    four_bit: whether the adapter was trained on 4-bit weights.
    """

    folder: str | Path
    box_format: BoxFormat
    adapter: Path | None = None
    four_bit: bool = False

    def describe(self) -> dict:
        """What tells this model's replies from others."""
        kinds = ({}, {"find_all": True}, {"options": ("", ""), "letter": "A"})
        files = store.model_fingerprint(str(self.folder))
        if not files and not isinstance(self.folder, ServedName):
            files = {"revision": find_revision(self.folder)}
        return {"model": str(self.folder), **asdict(self.box_format), "files": files,
                "prompt": [format_question(Sample("", "", "", "", (), "", **kind),
                                           self.box_format) for kind in kinds],
                "adapter": (store.model_fingerprint(str(self.adapter.absolute()))
                            if self.adapter else {}), "four_bit": self.four_bit}


def evaluate_model(model: AskedModel, task: Task, hardware: Hardware, out: Path,
                   params: SimpleNamespace) -> dict:
    """Ask, judge and write to `out`: replies, predictions.jsonl, eval.json, which is also returned.

    A call that was interrupted goes on. ValueError where `out` holds another model's or other
    questions' replies; nothing is written before all questions are known to be usable. params:
    max_new_tokens, seed, server, concurrency.
    """
    questions = load_questions(task)
    if not isinstance(model.folder, ServedName):
        measure = prompt_measure(model.folder, model.box_format)
        # a benchmark's prompts are short
        for sample in chain(*questions.values()) if isinstance(questions, dict) else ():
            if problem := measure(sample):
                raise ValueError(f"question {sample.id}: {problem} (--max-pixels)")
    asked = task.describe(questions)
    claim_folder(out, {
        **model.describe(), "questions": asked, "max_new_tokens": params.max_new_tokens,
        "device": "a server" if params.server else hardware.device,
        "dtype": f"{hardware.dtype}, autocast {hardware.autocast}"})
    folder = model.folder
    if model.adapter:
        folder = out / "merged"
        if not folder.is_dir():  # it is there whole or not at all
            processor = models.load_processor(model.folder, model.box_format)
            merging.write_merged_model(model.folder, model.adapter, folder, hardware, processor,
                                       model.four_bit)
    ask = _ask_samples if isinstance(questions, dict) else _ask_benchmark
    judged, lines = ask(folder, questions, task, hardware, model.box_format, out, params)
    predictions = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(out / "predictions.jsonl", lambda file: file.write_text(predictions, "utf-8"))
    result = {"model": str(model.folder), "questions": asked,
              "max_new_tokens": params.max_new_tokens, **judged}
    write_json(out / "eval.json", result)
    return result


def claim_folder(out: Path, settings: dict) -> None:
    """Write what the replies in `out` follow from; ValueError where what is there differs."""
    path = out / "settings.json"
    if not path.is_file():
        for name in ("predictions.jsonl", "eval.json"):
            if (out / name).exists():
                raise ValueError(f"{out / name} is of no mig-kit eval that could go on, and would "
                                 "be overwritten; name another --out")
    now = pd.json_normalize(json.loads(json.dumps(settings)), sep=" ").iloc[0].to_dict()
    before = (pd.json_normalize(json.loads(path.read_text()), sep=" ").iloc[0].to_dict()
              if path.is_file() else now)
    if other := [name for name in (now | before) if now.get(name) != before.get(name)]:
        values = f" ({before.get(other[0])}, now {now.get(other[0])})"
        raise ValueError(f"{out} holds replies of another evaluation: another "
                         f"{', '.join(other[:3])}{values if len(values) < 60 else ''}; name "
                         "another --out, or delete that folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def load_questions(task: Task) -> Questions:
    """Suite -> samples of the drawn suites or of own data; of a real benchmark its items and the
    sizes of their images.

    Own data: the first `limit` lines of a JSONL, or questions of a table of stage 01, as 06 scores
    it. ValueError where there is no question.
    """
    if task.suite in run_benchmark.RUNNABLE:
        benchmark = run_benchmark.read_runnable(task.suite, task.file, task.root, task.limit)
        return benchmark, run_benchmark.image_sizes(benchmark, task.root)
    if task.suite == "drawn":
        sizes = {name: size if name == "eval_seed" else min(size, task.limit or size)
                 for name, size in (task.sizes or DRAWN_SIZES).items()}
        if samples := evaluate.draw_test_samples(sizes):
            return samples
        names = ", ".join(suite.size_param for suite in SUITES.values())
        raise ValueError(f"no drawn suite is left to ask; one of {names} must be over 0")
    if task.file.suffix == ".parquet":
        samples = read_samples(task.file)
        samples = samples.select(range(min(task.limit or len(samples), len(samples))))
    else:
        samples = list(own_data.iter_samples(task.file, task.root, task.limit or None))
    if not samples:
        raise ValueError(f"{task.file} holds no question; give a file with one a line")
    return {samples[0].suite: samples}


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
                 params: SimpleNamespace) -> tuple[dict, list]:
    """(scores and items, lines of predictions)."""
    asked = SimpleNamespace(**vars(params) | {"replies": 0})
    answers = systems.suite_replies({MODEL: model}, samples, dict.fromkeys(samples, []), hardware,
                                    box_format, out / "replies", asked)[MODEL]
    strict = {suite: answers[suite]["greedy"] for suite in samples}
    free = {suite: [read_freely(reply, sample)
                    for reply, sample in zip(strict[suite], samples[suite], strict=True)]
            for suite in samples}
    judged: dict[str, dict] = {"scores": {}, "items": {}, "lists": {
        suite: evaluate.number_image_lists(part).tolist()
        for suite, part in samples.items() if suite == OWN}}
    for protocol, replies in (("strict", strict), ("free_text", free)):
        by_suite = {suite: {"greedy": texts, "drawn": [[]] * len(texts)}
                    for suite, texts in replies.items()}
        judged["scores"][protocol] = evaluate.summarize_systems(
            samples, {MODEL: by_suite}, box_format)[MODEL]
        judged["items"][protocol] = {
            suite: [[sample.id, "" if suite == OWN else sample.task,
                     evaluate.reply_is_correct(reply, sample, box_format)]
                    for sample, reply in zip(samples[suite], texts, strict=True)]
            for suite, texts in replies.items()}
    judged["unread"] = sum(not is_well_formed(reply, sample) for suite, texts in free.items()
                           for sample, reply in zip(samples[suite], texts, strict=True))
    lines = [{"id": sample.id, "response": reply} for suite, texts in strict.items()
             for sample, reply in zip(samples[suite], texts, strict=True)]
    return judged, lines


def _ask_benchmark(model: str | Path, questions: tuple[Benchmark, dict], task: Task,
                   hardware: Hardware, box_format: BoxFormat, out: Path,
                   params: SimpleNamespace) -> tuple[dict, list]:
    """As `_ask_samples`; questions: the benchmark and the sizes of its images."""
    benchmark, sizes = questions
    answers = systems.benchmark_replies(
        model, MODEL, run_benchmark.iter_batches(benchmark, task.root, BATCH),
        hardware, box_format, out / "replies" / f"{MODEL}_real_{task.suite}.jsonl", params)
    judged: dict[str, dict] = {"scores": {}, "items": {}, "lists": {}}
    for protocol in run_benchmark.PROTOCOLS:
        lines = run_benchmark.prediction_lines(benchmark, answers, sizes, box_format,
                                               exact=protocol == "strict")
        scored = protocols.score_predictions(benchmark, lines, "the replies", box_format, protocol,
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
    judged["unread"] = sum(not run_benchmark.names_answer(
        item, answers[run_benchmark.sample_id(benchmark.name, item)][0])
        for item in benchmark.items)
    return judged, lines


def read_result(folder: Path) -> dict:
    """eval.json of a finished evaluation; FileNotFoundError where there is none."""
    path = folder / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no eval.json; finish that mig-kit eval first")
    return json.loads(path.read_text())


def result_tables(results: Mapping[str, dict]) -> list[str]:
    """What a terminal shows of results by name: scores, differences between the first and each
    other one, and a sentence where a tenth of the first's replies could not be read.
    """
    tables = [score_rows(results)]
    if len(results) > 1:
        tables.append([row | {"points": _with_interval(row["points"], row["ci95"]), "ci95": ""}
                       for row in difference_rows(results)])
    texts = []
    for rows in tables:
        table = pd.DataFrame(rows).fillna("-").drop(columns="ci95", errors="ignore")
        first = table.columns[0]
        table[first] = table[first].str.ljust(table[first].str.len().max())
        texts.append(table.to_string(index=False) + "\n")
    first = next(iter(results.values()))
    count = sum(map(len, next(iter(first["items"].values())).values()))
    if first["unread"] > 0.1 * count:
        texts.append(f"{first['unread']} of {count} replies name no box or letter that can be read;"
                     " look at predictions.jsonl, and if they are cut, raise --max-new-tokens "
                     f"({first['max_new_tokens']})\n")
    return texts


def score_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {"percent, greedy": suite or its part, "protocol", model -> its score and interval}."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, result in results.items():
        for protocol, by_suite in result["scores"].items():
            for suite, summary in by_suite.items():
                for part, text in _suite_cells(_name_suite(result, suite), summary).items():
                    row = {"percent, greedy": part, "protocol": protocol}
                    rows.setdefault((part, protocol), row)[name] = text
    return list(rows.values())


def _name_suite(result: dict, suite: str) -> str:
    """What tables call a suite: only a drawn one, or own data, has a title."""
    return suite if result["questions"]["suite"] in run_benchmark.RUNNABLE else suite_title(suite)


def _suite_cells(name: str, summary: dict) -> dict[str, str]:
    """Part of the suite -> its score; that of the whole with its interval."""
    if "score" in summary:
        cells = {name: _with_interval(summary["score"], summary["ci95"])}
        parts = {label: summary["boxes"][key] for key, label in BOX_FIGURES.items()
                 if "boxes" in summary}
    else:
        average = summary["avg"]
        metric = next(key for key in average if key != "ci95")
        cells = {f"{name}, {metric}": _with_interval(average[metric], average["ci95"])}
        parts = {task: values[metric] for task, values in summary["tasks"].items()}
    return cells | {f"  {part}": _with_interval(value, None) for part, value in parts.items()}


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    text = "-" if value is None else f"{value:.1f}"
    return f"{text} ({interval[0]:.1f} to {interval[1]:.1f})" if interval else text


def difference_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {compared, protocol, suite, points, ci95}: the first result less each other, paired by
    question; of own data and real benchmarks the interval is over lists of images.

    ValueError where they did not answer the same questions.
    """
    (name, first), *others = results.items()
    rows = []
    for other_name, other in others:
        if first["questions"] != other["questions"]:
            raise ValueError(f"{name} and {other_name} did not answer the same questions; ask both "
                             "with the same --suite, --limit and files (of drawn ones a run's "
                             "model gets as many as its 06: compare it with RUN/base)")
        for protocol, by_suite in first["items"].items():
            for suite, items in by_suite.items():
                table = pd.DataFrame(items, columns=["id", "group", "value"])
                before = {name: value for name, _, value in other["items"][protocol][suite]}
                table["gap"] = table["value"] - table["id"].map(before)
                table["list"] = first.get("lists", {}).get(suite, np.arange(len(table)))
                gap = paired_gap_by_list([
                    (part["gap"].to_numpy(), part["list"].to_numpy())
                    for _, part in table.groupby("group", sort=False)])
                rows.append({"compared": f"{name} - {other_name}", "protocol": protocol,
                             "suite": _name_suite(first, suite), "points": gap["value"],
                             "ci95": gap["ci95"]})
    return rows
