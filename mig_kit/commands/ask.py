"""`mig-kit eval` and `mig-kit ground`: ask any model, a run's or another's."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click

from mig_kit.boxes import BoxFormat
from mig_kit.commands.options import FILE, FOLDER, NEW_FOLDER
from mig_kit.common import SHIPPED, UserError
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.drawing.pictures import draw_replies, draw_sample
from mig_kit.image_files import open_rgb
from mig_kit.pipeline.params import validate_params
from mig_kit.pipeline.plan import parse_overrides
from mig_kit.pipeline.run_facts import EVALUATE, MODELS, RunModel, find_run_model
from mig_kit.pipeline.run_folders import list_runs
from mig_kit.pipeline.runs import Run
from mig_kit.prompts import format_question, read_reply
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample
from mig_kit.world.tasks import TASKS, make_sample

ROOM_TO_REASON = 1024  # new tokens of a model of no run: those of the full profiles


def find_model(model: str, changes: dict, server: str = "") -> RunModel:
    """The model that --model names; a ServedName if only the server knows it.

    changes: of its box format; None keeps the model's own value.
    """
    from mig_kit.models import loading
    from mig_kit.models.model_folders import (
        FAMILIES,
        ServedName,
        check_model_folder,
        read_model_type,
    )
    from mig_kit.models.processors import read_box_format

    changes = {name: value for name, value in changes.items() if value is not None}
    is_run = not server or model.partition("/")[0] in list_runs()
    found_model = find_run_model(model) if is_run else None
    is_folder = Path(model).is_dir() and model not in SHIPPED  # from where the command is given
    folder = loading.resolve_model(
        str(found_model.folder if found_model else Path(model).absolute() if is_folder else model))
    # a server that runs already has the model, and the hub may be out of reach
    is_served = server and not found_model and (
        read_model_type(folder, ask_hub=False) not in FAMILIES)
    if is_served and "coordinates" not in changes:
        raise UserError(f"only the server knows the model {model}; say with --coordinates how it "
                        "writes boxes")
    if not found_model and not is_served:
        check_model_folder(folder)
    own = (found_model.box_format if found_model else BoxFormat() if is_served else
           read_box_format(folder))
    box_format = replace(own, **changes)
    further = ("; its prompts are not compared with the kit's" if is_served else
               f" (its own: {own.description})" if box_format != own else "")
    click.echo(f"{model} is asked with {box_format.description}{further}", err=True)
    if not found_model:
        asked = {} if model in SHIPPED else {"max_new_tokens": ROOM_TO_REASON}
        return RunModel(ServedName(folder) if is_served else folder, box_format, asked)
    for note in Run(found_model.run_id).notes(found_model.stage):
        click.echo(f"warning: {note}", err=True)
    return replace(found_model, folder=folder, box_format=box_format)


def model_options(command):
    """The options that name a model and how it sees images."""
    options = [
        click.option("--model", required=True,
                     help="A run (its GRPO model; RUN/sft, RUN/base: the others), tiny/grpo, "
                          "tiny/sft or tiny (shipped), or a folder or hub name of a Qwen2-VL, "
                          "Qwen2.5-VL, Qwen3-VL or Qwen3.5; with -p server also another model's "
                          "name there."),
        click.option("--coordinates", type=click.Choice(["absolute", "normalized_1000"]),
                     help="How the model writes boxes: absolute (Qwen2.5-VL) or normalized_1000 "
                          "(the other families); the model's own if left out."),
        click.option("--min-pixels", type=click.IntRange(3136),
                     help="Smaller images are enlarged to so many pixels; the model's own if left "
                          "out."),
        click.option("--max-pixels", type=click.IntRange(3136),
                     help="Larger images are shrunk to so many; the model's own if left out.")]
    for option in reversed(options):
        command = option(command)
    return command


def check_suite(context: click.Context, option: click.Parameter, suite: str) -> str:
    """The suite; click.BadParameter, with all names, for one that is not asked."""
    from mig_kit.score.benchmarks import RUNNABLE  # a second, which --help need not wait for

    return click.Choice(["drawn", "own", *RUNNABLE]).convert(suite, option, context)


@click.command("eval")
@model_options
@click.option("--adapter", type=FOLDER, help="A LoRA adapter of that model, merged into it first.")
@click.option("--four-bit", is_flag=True, help="The adapter was trained on 4-bit weights (QLoRA).")
@click.option("--suite", default="drawn", metavar="NAME", callback=check_suite,
              help="What is asked: drawn, own, or a benchmark, such as mig_bench.")
@click.option("--file", "file", type=FILE,
              help="Own data (a JSONL, or a run's 01_synthesize/val.parquet: its held-out part), "
                   "or the benchmark's annotation file.")
@click.option("--images", type=FOLDER,
              help="The folder that FILE's image names are relative to; else FILE's own.")
@click.option("--limit", default=0, type=click.IntRange(0),
              help="Only the first so many questions of every task; of own data, of the file.")
@click.option("--out", required=True, type=NEW_FOLDER,
              help="Folder for replies, predictions and scores; goes on where it stopped.")
@click.option("--compare", multiple=True, type=FOLDER,
              help="The --out of another model: one table, and the paired difference; repeat.")
@click.option("-p", "overrides", nargs=2, multiple=True, metavar="NAME VALUE",
              help="Set a parameter of stage 06, such as server (which draws the replies) or "
                   "max_new_tokens (if left out: the 06's of a run's model, 128 of a shipped one, "
                   "1024 of others).")
def eval_command(model: str, adapter: Path | None, four_bit: bool, suite: str, file: Path | None,
                 images: Path | None, limit: int, out: Path, compare: tuple[Path, ...],
                 overrides: tuple[tuple[str, str], ...], **changes) -> None:
    """Ask MODEL all questions of a suite and score its replies by two protocols."""
    if (suite == "drawn") != (file is None):
        raise UserError("--suite drawn has no --file; every other suite needs one: its questions")
    from mig_kit.evaluation import eval_model
    from mig_kit.models import loading  # seconds, which wrong words need not wait for
    from mig_kit.models.adapters import check_adapter_base
    from mig_kit.models.model_folders import ServedName

    others = {str(folder): eval_model.read_result(folder) for folder in compare}
    chosen = parse_overrides(overrides, [EVALUATE])
    if "replies" in chosen:
        raise UserError("eval asks every question once, greedily; leave -p replies out")
    run_model = find_model(model, changes, chosen.get("server", ""))
    if adapter and isinstance(run_model.folder, ServedName):
        raise UserError("--adapter is merged into a model that the kit loads; have the server "
                         "load it, and give --model the adapter's name there")
    if adapter:
        check_adapter_base(adapter, run_model.folder, four_bit)
    params = SimpleNamespace(**validate_params(
        {**run_model.evaluation, **chosen, "replies": 0}, EVALUATE))
    hardware = loading.choose_hardware(params.dtype, params.device)
    task = eval_model.Task(suite, file, images or (file.parent if file else None), limit)
    eval_model.evaluate_model(run_model, task, hardware, out, params, adapter, four_bit)
    for text in eval_model.result_tables({str(out): eval_model.read_result(out), **others}):
        click.echo(text)


def ask_models(folders: dict[str, str | Path], sample: Sample, box_format: BoxFormat,
               max_new_tokens: int) -> dict[str, str]:
    """Name -> greedy reply to the sample; folders: name -> model's folder or hub name."""
    from transformers.utils import logging

    from mig_kit.models import loading
    from mig_kit.serving import reply_files

    logging.disable_progress_bar()  # of loading
    hardware, replies = loading.choose_hardware(), {}
    for name, folder in folders.items():
        policy = loading.load_policy(folder, hardware, box_format)
        replies[name] = reply_files.greedy_replies(policy, [sample], max_new_tokens)[0]
    return replies


@click.command()
@model_options
@click.option("--image", "images", multiple=True, type=click.Path(),
              help="An image; repeat in order.")
@click.option("--example", type=click.IntRange(0), metavar="NUMBER",
              help="Not your question on your images, but a drawn one of the test split; if MODEL "
                   "is a shipped one, all of these answer.")
@click.option("--out", default="grounded.png", help="Where the picture with the box goes.")
@click.option("--max-new-tokens", default=256)
@click.argument("question", default="")
def ground(model: str, images: tuple[str, ...], example: int | None, out: str, max_new_tokens: int,
           question: str, **changes) -> None:
    """Ask MODEL where in the images the answer to QUESTION is; print it and draw the box."""
    if {bool(images), bool(question)} != {example is None}:
        raise UserError("give a question and each of its pictures with --image, or --example 3")
    if example is None:
        _ground_images(model, images, out, max_new_tokens, question, changes)
    else:
        _ground_example(model, example, out, max_new_tokens, changes)


def _ground_images(model: str, images: tuple[str, ...], out: str, max_new_tokens: int,
                   question: str, changes: dict) -> None:
    opened = [open_rgb(Path(path)) for path in images]  # before seconds of imports
    from mig_kit.score.own import read_freely

    sample = Sample("ground", "", "", "", tuple(opened), question)
    run_model = find_model(model, changes)
    box_format = run_model.box_format
    reply = ask_models({model: run_model.folder}, sample, box_format, max_new_tokens)[model]
    answer = read_reply(read_freely(reply, (), len(images)), sample, box_format)
    click.echo(f"reasoning: {answer.thinking or '-'}")
    if not answer.box:
        click.echo(f"no box; the model said: {reply}")
        return
    number, numbers = answer.image, ", ".join(f"{value:.0f}" for value in answer.box)
    click.echo(f"image: {number} ({images[number - 1]})\nbox: {numbers} (xyxy, pixels of that "
               "image, {}x{})".format(*opened[number - 1].size))
    draw_sample(sample, answer.text, box_format, 320).save(Path(out))
    click.echo(f"image: {out}")


def _ground_example(model: str, number: int, out: str, max_new_tokens: int, changes: dict) -> None:
    index, task = divmod(number, len(TASKS))
    sample = make_sample(list(TASKS)[task], "test", index)
    run_model = find_model(model, changes)
    folders, box_format = {model: run_model.folder}, run_model.box_format
    if model in SHIPPED:
        from mig_kit.models.loading import resolve_model  # seconds

        folders = {SYSTEM_LABELS[system]: resolve_model(name)
                   for system, name in zip(MODELS, SHIPPED)}
    replies = ask_models(folders, sample, box_format, max_new_tokens)
    click.echo(f"{format_question(sample, box_format, False)} ({len(sample.images)} images)")
    for name, reply in replies.items():
        answer = read_reply(reply, sample, box_format)
        click.echo(f"{name}, {'correct' if is_correct(answer, sample) else 'wrong'}: {reply}")
    draw_replies(sample, replies, box_format).save(Path(out))
    click.echo(f"picture: {out}")
