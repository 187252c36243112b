"""`mig-kit eval`: one model on synthetic suites, own data or a real benchmark, as stage 06 asks.

Each reply is judged twice. "strict" reads the kit's answer format alone. Beside it, own data and
synthetic suites have "free_text", a box or letter in any text; benchmarks have "official".
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, digest_json, write_json, write_json_lines
from mig_kit.data import own_data
from mig_kit.evaluation import evaluate
from mig_kit.evaluation.items import (
    QUESTION,
    make_items,
    paired_gap,
    read_items,
    summarize_all,
    write_items,
)
from mig_kit.image_files import image_digests
from mig_kit.models import merging
from mig_kit.models.loading import Hardware
from mig_kit.models.model_folders import ServedName, find_file
from mig_kit.models.processors import load_processor, prompt_measure
from mig_kit.openai_client import read_request_fields
from mig_kit.pipeline.run_facts import RunModel
from mig_kit.pipeline.runs import Run
from mig_kit.pipeline.stage_keys import model_fingerprint
from mig_kit.prompts import format_question
from mig_kit.sample import Sample, read_samples
from mig_kit.score import protocols, run_benchmark
from mig_kit.score.annotations import Benchmark
from mig_kit.score.benchmarks import BENCHMARKS, RUNNABLE
from mig_kit.score.own import read_freely
from mig_kit.score.result import NOT_READ, number_lists, summarize
from mig_kit.serving import reply_files
from mig_kit.serving.stored_replies import count_endings, describe_endings, reply_file
from mig_kit.stats import interval_text
from mig_kit.world.suites import OWN, suite_title

OWN_FILE = "own data (a file)"  # in tables, of questions that may be trained ones
MODEL = "model"  # what the one system is called
UNREAD = ("empty", "no box found", *NOT_READ)  # problems of replies


@dataclass(frozen=True)
class Task:
    """What is asked."""

    suite: str  # synthetic, own or one of RUNNABLE
    file: Path | None = None  # annotations or own data
    root: Path | None = None  # of its images
    limit: int = 0  # first questions of every task (of own data: of the file), 0 for all


def evaluate_model(model: RunModel, task: Task, hardware: Hardware, out: Path,
                   params: SimpleNamespace, adapter: Path | None = None,
                   four_bit: bool = False) -> dict:
    """Ask, judge, and write replies, predictions.jsonl, items.csv and eval.json to `out`.

    An interrupted call goes on. Nothing is written before all questions are known to be usable.

    Args:
        params: as of 06, with 0 replies at temperature 1.
        adapter: a LoRA adapter to merge into the model; four_bit: trained on 4-bit weights.
    Returns: what eval.json holds.
    Raises: UserError if `out` holds replies of another model or to other questions.
    """
    folder, box_format = model.folder, model.box_format
    samples, benchmark = load_questions(task, params)
    if not isinstance(folder, ServedName):
        measure = prompt_measure(folder, box_format)
        for sample in chain(*samples.values()):
            if problem := measure(sample):
                raise UserError(f"question {sample.id}: {problem} (--max-pixels)")
    described = adapter and {"path": str(adapter.resolve()), "four_bit": four_bit,
                             "files": model_fingerprint(str(adapter.resolve()))}
    questions = evaluate.digest_questions(samples)
    prompts = [format_question(sample, box_format) for sample in chain(*samples.values())]
    claim_folder(out, {
        "model": str(folder), "model files": _digest_model(folder), "adapter": described,
        **asdict(box_format), "device": "a server" if params.server else hardware.device,
        **({"server": params.server} if params.server else {}),
        **({"request fields": fields} if (fields := read_request_fields()) else {}),
        "dtype": str(hardware.dtype),
        "max_new_tokens": params.max_new_tokens, "questions": digest_json(questions),
        "prompts": digest_json(prompts)})
    if adapter:
        folder = out / "merged"
        if not folder.is_dir():  # it is there whole or not at all
            processor = load_processor(model.folder, box_format)
            merging.write_merged_model(model.folder, adapter, folder, hardware, processor, four_bit)
    replies = reply_files.suite_replies({MODEL: folder}, samples, {}, hardware, box_format,
                                        out / "replies", params)[MODEL]
    files = [reply_file(out / "replies", MODEL, suite) for suite in samples]
    endings = count_endings(*files)
    if sum(endings["empty"].values()) == endings["replies"]:
        raise UserError(f"all {describe_endings(endings)}: that is no score; look at the model's "
                        "chat template, or at how its server parts reasoning from answers, and "
                        f"delete {out} before another try")
    greedy = [reply for suite in samples for reply in replies[suite]["greedy"]]
    keys = ([{"index": item.index} for item in benchmark.items] if benchmark else
            [{"id": sample.id} for sample in chain(*samples.values())])
    lines = [key | {"response": reply} for key, reply in zip(keys, greedy, strict=True)]
    scores, table = (
        judge_benchmark(benchmark, samples[task.suite], lines, task.root, box_format) if benchmark
        else judge_suites(samples, replies, box_format))
    write_json_lines(out / "predictions.jsonl", lines)
    is_read = table.groupby(QUESTION, sort=False)["read"].max()  # by any protocol
    result = {"model": str(model.folder), "adapter": described, "questions": questions,
              **_compare_with_run(task, samples, model.run_id),
              "endings": endings,
              "max_new_tokens": params.max_new_tokens, "scores": scores, "asked": len(is_read),
              "unread": int((is_read == 0).sum())}
    write_items(table, out)
    write_json(out / "eval.json", result)
    return result


def _compare_with_run(task: Task, samples: dict[str, Sequence[Sample]], run_id: str) -> dict:
    """Of own data: are these held out, and how many did 01 of the model's run give to training?"""
    if task.suite != OWN:
        return {}
    files = [Run(run_id).stage_folder("01_synthesize") / f"{name}.parquet"
             for name in ("cot", "rl") if run_id]
    trained = {_question_key(sample) for file in files if file.is_file()
               for sample in read_samples(file)}
    count = sum(_question_key(sample) in trained for sample in samples[OWN])
    is_held_out = task.file.name == "val.parquet" and task.file.parent.name == "01_synthesize"
    return {"held_out": is_held_out and not count, "trained": count}


def _question_key(sample: Sample) -> tuple:
    return sample.question, sample.options, image_digests(sample.images)


def title_suite(suite: str, result: dict) -> str:
    """What tables call a suite: own data that are not known to be held out are called so."""
    if suite == OWN and not result.get("held_out"):
        return OWN_FILE
    is_benchmark = "free_text" not in result["scores"]
    return suite if is_benchmark else suite_title(suite)


def _digest_model(folder: str | Path) -> str:
    """Tells a model's files from others: those of a folder, or the commit of a hub name."""
    config = None if isinstance(folder, ServedName) else find_file(folder, "config.json")
    return digest_json(model_fingerprint(str(folder)) or (config.parent.name if config else ""))


def claim_folder(out: Path, settings: dict) -> None:
    """Write what the replies in `out` follow from; UserError where what is there differs."""
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else settings
    for name in ("predictions.jsonl", "eval.json"):
        if (out / name).exists() and not path.is_file():
            raise UserError(f"{out / name} is of no mig-kit eval that could go on, and would be "
                            "overwritten; name another --out")
    if other := [name for name, value in settings.items() if before.get(name) != value]:
        values = f" ({before.get(other[0])}, now {settings[other[0]]})"
        moved = f", or, if the same model has moved there, correct {path}" * (other == ["server"])
        raise UserError(f"{out} holds replies of another evaluation: another "
                         f"{', '.join(other[:3])}{values if len(values) < 100 else ''}; name "
                         f"another --out, or delete that folder{moved}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def load_questions(task: Task, params: SimpleNamespace) -> tuple[
        dict[str, Sequence[Sample]], Benchmark | None]:
    """The samples by suite, and the benchmark if it is a real one; UserError if there are none.

    params: as of 06, whose eval_seed and suites say what is drawn.
    """
    if task.suite in RUNNABLE:
        benchmark, part = run_benchmark.read_runnable(task.suite, task.file, task.root, task.limit)
        return {task.suite: part}, benchmark
    if task.suite == "drawn":
        sizes = {name: min(size, task.limit or size) for name, size in params.suites.items()}
        if samples := evaluate.draw_test_samples({"eval_seed": params.eval_seed, "suites": sizes}):
            return samples, None
        raise UserError("no drawn suite is left to ask; one of suites must be over 0")
    if task.file.suffix == ".parquet":
        part = read_samples(task.file)[:task.limit or None]
    else:
        part = list(own_data.iter_samples(task.file, task.root, task.limit or None))
    if not part:
        raise UserError(f"{task.file} holds no question; give a file with one a line")
    return {part[0].suite: part}, None


def judge_suites(samples: dict[str, Sequence[Sample]], replies: dict[str, dict],
                 box_format: BoxFormat) -> tuple[dict, pd.DataFrame]:
    """(protocol -> suite -> summary, `items` by protocol) of synthetic suites or own data.

    replies: suite -> its part of `suite_replies`.
    """
    free = {suite: replies[suite] | {
        "greedy": [read_freely(reply, sample.options, len(sample.images))
                   for reply, sample in zip(replies[suite]["greedy"], part)]}
        for suite, part in samples.items()}
    table = make_items(samples, {"strict": replies, "free_text": free}, box_format, "protocol")
    return summarize_all(table, "protocol"), table


def judge_benchmark(benchmark: Benchmark, samples: list[Sample], lines: list[dict], root: Path,
                    box_format: BoxFormat) -> tuple[dict, pd.DataFrame]:
    """As `judge_suites`, of a real benchmark by its protocols, whose headline is called correct.

    lines: the predictions. root: of its images.
    """
    name, tables = benchmark.name, []
    scored = {protocol: protocols.score_predictions(
        benchmark, lines, "the replies", box_format, protocol, box_format.coordinates, str(root))
        for protocol in BENCHMARKS[name].protocols}
    for protocol, result in scored.items():
        tables.append(pd.DataFrame({
            "protocol": protocol, "suite": name, "task": result.tasks,
            "part": [task * result.is_macro for task in result.tasks],
            "list": number_lists(result), "id": [sample.id for sample in samples],
            "kind": "greedy", "draw": 0, "correct": next(iter(result.metrics.values())),
            "read": [float(verdict.problem not in UNREAD) for _, verdict in result.judged]}))
    return ({protocol: {name: summarize(result)} for protocol, result in scored.items()},
            pd.concat(tables))


def read_result(folder: Path) -> dict:
    """eval.json of a finished evaluation, and its "items"; UserError where there is none."""
    path = folder / "eval.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no eval.json; finish that mig-kit eval first")
    return json.loads(path.read_text()) | {"items": read_items(folder)}


def result_tables(results: Mapping[str, dict]) -> list[str]:
    """What a terminal shows of results by name: scores, endings, and gaps to the first result."""
    endings = {name: describe_endings(result["endings"]) for name, result in results.items()}
    ends = [{"percent, greedy": "replies cut or empty"} | endings] * bool(
        {*endings.values()} - {"-"})
    texts = []
    for rows in filter(None, (protocol_rows(results) + ends, compare_results(results))):
        table = pd.DataFrame(rows).fillna("-")
        first = table.columns[0]
        table[first] = table[first].str.ljust(table[first].str.len().max())
        texts.append(table.to_string(index=False) + "\n")
    first = next(iter(results.values()))
    if first["unread"] > 0.1 * first["asked"]:
        texts.append(f"{first['unread']} of {first['asked']} replies name no box or letter that can"
                     " be read; look at predictions.jsonl, and if they are cut, raise "
                     f"max_new_tokens ({first['max_new_tokens']})\n")
    room = {name: result["max_new_tokens"] for name, result in results.items()}
    if len({*room.values()}) > 1:
        values = ", ".join(f"{name} {tokens}" for name, tokens in room.items())
        texts.append(f"max_new_tokens differ ({values}): what is compared had not the same room; "
                     "ask again with -p max_new_tokens, and another --out\n")
    for name, result in results.items():
        if result.get("trained"):
            texts.append(f"{result['trained']} of the questions were given to training by 01 of "
                         f"the run of {name}: this is no score on held-out questions\n")
    return texts


def protocol_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {"percent, greedy": suite or its part, "protocol", model -> its score and interval}."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, result in results.items():
        for protocol, by_suite in result["scores"].items():
            for suite, summary in by_suite.items():
                for part, text in _suite_cells(title_suite(suite, result), summary).items():
                    row = {"percent, greedy": part, "protocol": protocol}
                    rows.setdefault((part, protocol), row)[name] = text
    return list(rows.values())


def _suite_cells(title: str, summary: dict) -> dict[str, str]:
    """The suite and its tasks, if it is a benchmark -> score, the suite's with its interval."""
    if "score" in summary:
        return {title: interval_text(summary["score"], summary["ci95"])}
    average = summary["avg"]
    metric = next(key for key in average if key != "ci95")
    return {f"{title}, {metric}": interval_text(average[metric], average["ci95"]),
            **{f"  {task}": f"{values[metric]:.1f}" for task, values in summary["tasks"].items()}}


def compare_results(results: Mapping[str, dict]) -> list[dict]:
    """Rows {compared, protocol, suite, points}: the first result less each other, by question.

    Raises UserError if they did not answer the same questions.
    """
    (name, first), *others = results.items()
    rows = []
    for other_name, other in others:
        if first["questions"] != other["questions"]:
            raise UserError(f"{name} and {other_name} did not answer the same questions; ask both "
                             "with the same --suite, --limit and files (of drawn ones a run's "
                             "model gets as many as its 06: compare it with RUN/base)")
        both = pd.concat([result["items"].assign(model=place)
                          for place, result in (("first", first), ("other", other))])
        rows += [{"compared": f"{name} - {other_name}", "protocol": protocol,
                  "suite": title_suite(suite, first),
                  "points": interval_text(**paired_gap(part, "first", "other"))}
                 for (protocol, suite), part in both.groupby(["protocol", "suite"], sort=False)]
    return rows
