"""The command line: run stages, look at runs, check data, ground one question."""

import json
import os
import sys
from pathlib import Path

import click

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROCESS_ENVIRONMENT, write_json
from mig_kit.image_files import ORIENTATIONS
from mig_kit.pipeline import store
from mig_kit.pipeline.params import params_text
from mig_kit.pipeline.run_models import RunModel, find_run_model


def main() -> None:
    """Entry point: bad input ends with one sentence, not with a traceback."""
    late = [name for name in PROCESS_ENVIRONMENT if name not in os.environ]
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # bench measures in this process, whose heap heeds them only from its start
    if late and sys.argv[1:2] == ["bench"]:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    try:
        if code := cli(standalone_mode=False):
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit("interrupted; the same command goes on where this one stopped")
    except OSError as error:
        sys.exit(f"mig-kit: {error}")
    except (ValueError, TypeError, KeyError, MemoryError, RuntimeError) as error:
        sys.exit(f"mig-kit: {error.args[0] if error.args else error}")


@click.group()
@click.version_option(package_name="mig-kit", prog_name="mig-kit")
def cli() -> None:
    """mig-kit: multi-image visual grounding by reinforcement learning."""


def stage_name(text: str) -> str:
    """A stage from its number or name ("5", "05", "grpo", "05_grpo")."""
    for stage in store.STAGES:
        if text in (stage, stage[3:]) or text.zfill(2) == stage[:2]:
            return stage
    raise click.UsageError(f"no stage '{text}'; the stages are {', '.join(store.STAGES)}")


@cli.command()
@click.argument("stages", nargs=-1)
@click.option("--profile", default="tiny", show_default=True, help="tiny, or a folder of params/.")
@click.option("--run-id", default="default", show_default=True, help="Folder under runs/.")
@click.option("--from", "source", default="", metavar="RUN",
              help="Take the stages before STAGES from this run, by reference.")
@click.option("--seeds", default="", metavar="0,1,2",
              help="Run once per seed; {seed} in --run-id, --from and -p stands for its number.")
@click.option("-p", "overrides", nargs=2, multiple=True, metavar="NAME VALUE",
              help="Set a parameter in every stage that has it.")
@click.option("--force", is_flag=True, help="Run even what is up to date.")
def run(stages: tuple[str, ...], profile: str, run_id: str, source: str, seeds: str, overrides,
        force: bool) -> None:
    """Run STAGES (all by default) as notebooks; what is up to date is skipped."""
    from types import SimpleNamespace

    from mig_kit.data.endpoint import Endpoint
    from mig_kit.pipeline import branches, execute
    from mig_kit.stages.sources import check_source

    numbers = branches.parse_seeds(seeds) if seeds else []
    plans = execute.plan_runs([stage_name(text) for text in stages], profile, run_id, source,
                              numbers, overrides)
    for plan in plans:
        synthesize = plan.params.get("01_synthesize", {})
        if synthesize:
            check_source(SimpleNamespace(**synthesize))
        if synthesize.get("teacher") == "endpoint":  # an address with a key: not into a notebook
            Endpoint(synthesize["endpoint_url"], synthesize["endpoint_model"])
    execute.run_plans(plans, force)
    for plan in plans:
        if "07_report" in plan.params:
            report = store.runs_root() / plan.run_id / "07_report" / "report.html"
            click.echo(f"report: {report}")


@cli.command()
@click.argument("run_id", required=False)
def status(run_id: str | None) -> None:
    """What has finished in a run, or in all runs, with the greedy scores (percent); a branch stands
    below the run that it starts from.
    """
    from mig_kit.pipeline.status import run_lines, run_tree

    root = store.runs_root()
    if run_id and not (root / run_id).is_dir():
        raise FileNotFoundError(f"no run '{run_id}' in {root}")
    for name, depth in [(run_id, 0)] if run_id else run_tree():
        for line in run_lines(name):
            click.echo("  " * depth + line)


@cli.command("params")
@click.argument("stage")
@click.option("--profile", default="tiny", show_default=True, help="tiny, or a folder of params/.")
def params_command(stage: str, profile: str) -> None:
    """All parameters of STAGE, their values in a profile and what they mean."""
    click.echo(params_text(stage_name(stage), profile))


@cli.command()
@click.argument("run_id")
@click.argument("repository")
@click.option("--private/--public", default=True, show_default=True)
@click.option("--dry-run", type=click.Path(path_type=Path),
              help="Only write what would be sent to this new folder.")
def push(run_id: str, repository: str, private: bool, dry_run: Path | None) -> None:
    """Send the GRPO model of RUN_ID to REPOSITORY (user/name) on the Hub; needs HF_TOKEN."""
    import tempfile

    from mig_kit.pipeline import hub

    if dry_run:
        click.echo(f"written, not sent: {hub.prepare_upload(run_id, dry_run)}")
        return
    client = hub.hub_client()
    with tempfile.TemporaryDirectory() as folder:
        model = hub.prepare_upload(run_id, Path(folder) / "model")
        click.echo(hub.upload(model, repository, private, client))


@cli.command()
@click.argument("run_a")
@click.argument("run_b")
def diff(run_a: str, run_b: str) -> None:
    """What differs between two runs: parameters, inputs, versions, machine and metrics."""
    from mig_kit.pipeline import differences

    rows = differences.list_differences(run_a, run_b)
    for row in rows:
        place = f"{row['stage']:<24}{row['what']:<11}{row['name']:<44}"
        click.echo(f"{place}{row['a']!s:<20} {row['b']!s}")
    click.echo(f"{len(rows)} differences" if rows else "no difference")


@cli.command("report")
@click.argument("run_a")
@click.argument("run_b")
@click.option("--out", default="compared.html", show_default=True,
              type=click.Path(dir_okay=False, path_type=Path))
def report_command(run_a: str, run_b: str, out: Path) -> None:
    """Two runs on one page: scores, training, and what differs."""
    from mig_kit.pipeline import differences
    from mig_kit.stages import report

    metrics: dict[str, dict] = {run_a: {}, run_b: {}}
    for run_id, by_stage in metrics.items():
        for stage in ("05_grpo", "06_evaluate"):
            if store.load_record(stage, run_id) is None:
                raise FileNotFoundError(f"run '{run_id}' has no finished {stage}; "
                                        f"run: mig-kit run --run-id {run_id}")
            by_stage[stage] = store.read_metrics(store.stage_folder(stage, run_id))
    out.write_text(report.two_run_page(metrics, differences.list_differences(run_a, run_b)))
    click.echo(f"report: {out}")


@cli.command()
@click.argument("run_ids", nargs=-1)
@click.option("--group", "groups", multiple=True, metavar="NAME=RUN,RUN",
              help="Runs that count as one, such as the seeds of a variant; repeat.")
@click.option("--reference", default="", help="The group that the others are compared with.")
@click.option("--format", "form", default="md", show_default=True,
              type=click.Choice(["md", "csv", "latex"]))
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path),
              help="Draw the comparison here: a .png, .pdf or .svg.")
def table(run_ids: tuple[str, ...], groups: tuple[str, ...], reference: str, form: str,
          figure: Path | None) -> None:
    """Runs, or groups of runs, side by side: scores, differences and their intervals.

    A run that is named without a group is a group of its own.
    """
    from mig_kit import plots
    from mig_kit.stages import compare

    if figure and figure.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--figure {figure} is no picture; end its name in .png, .pdf or .svg")
    result = compare.compare_groups(compare.parse_groups([*groups, *run_ids]), reference)
    click.echo(compare.render_table(result, form))
    if figure:
        plots.set_style()
        plots.plot_groups(compare.figure_rows(result)).savefig(figure, bbox_inches="tight")
        click.echo(f"figure: {figure}", err=True)


@cli.command()
@click.option("--model", default="tiny", show_default=True, help="tiny, or a Qwen2.5-VL folder.")
@click.option("--images", default=6, show_default=True, type=click.IntRange(1, 8),
              help="Images of a prompt.")
@click.option("--side", default=392, show_default=True, type=click.IntRange(56, 1960),
              help="Side of an image, pixels.")
@click.option("--group", default=8, show_default=True, type=click.IntRange(2),
              help="Replies to a prompt.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2),
              help="Tokens of a reply.")
@click.option("--prompts", default=4, show_default=True, type=click.IntRange(1),
              help="Prompts of a step; fewer need less memory.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1),
              help="Turns of either side.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32 or bfloat16.")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the figures here.")
def bench(model: str, repeats: int, dtype: str, out: Path | None, **load: int) -> None:
    """Stock TRL and the kit side by side in one run: rollout, training, whole step, rejection
    sampling, evaluation.
    """
    import tempfile

    from mig_kit.engine import models
    from mig_kit.speed import benchmark, utilisation
    from mig_kit.speed.workload import Workload

    if out and not out.absolute().parent.is_dir():
        raise ValueError(f"{out} cannot be written; name a file in a folder that exists")
    hardware, workload = models.choose_hardware(dtype), Workload(**load)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = benchmark.run_headline(models.resolve_model(_absolute(model)), hardware, workload,
                                        folder / "headline", repeats)
        if hardware.device == "cpu":
            wide = utilisation.save_random_model(folder / "wide", hidden=2048, layers=2)
            result["utilisation"] = utilisation.measure_utilisation(
                wide, hardware, workload, folder / "utilisation", repeats)
    click.echo(benchmark.headline_text(result, workload))
    if out:
        write_json(out, result)


COORDINATES_BY_FRAME = {"thousand": "normalized_1000", "unit": "normalized_1", "pixels": "pixels",
                        "resized": "absolute"}


def refuse_frame(context: click.Context, option: click.Parameter, word: str | None) -> None:
    """Name the option and the word that took the place of --frame."""
    if word is None:
        return
    words = [COORDINATES_BY_FRAME[word]] if word in COORDINATES_BY_FRAME else (
        COORDINATES_BY_FRAME.values())
    raise ValueError(f"--frame {word} is now --coordinates {' | '.join(words)}")


@cli.command("score")
@click.argument("benchmark", metavar="BENCHMARK")
@click.option("--annotations", required=True, type=click.Path(),
              help="The benchmark's own annotation file.")
@click.option("--predictions", required=True, type=click.Path(),
              help='JSONL of {"index": 0, "response": "text"}, COCO results, or the samples of '
                   "lmms-eval, a table of VLMEvalKit or BLINK's outputs; a file or a folder.")
@click.option("--compare", type=click.Path(),
              help="A second model's predictions: adds the paired difference.")
@click.option("--protocol", default="official", show_default=True,
              help="official, strict, or substring (multiple choice).")
@click.option("--coordinates", default="normalized_1000", show_default=True,
              help="Boxes are normalized_1000 (0 to 1000), normalized_1 (0 to 1), pixels (of the "
                   "original image) or absolute (pixels of the resized image, as Qwen2.5-VL "
                   "answers); official converts them for the authors' rule.")
@click.option("--frame", hidden=True, expose_value=False, callback=refuse_frame)
@click.option("--images", type=click.Path(),
              help="The folder of the images, where their sizes are needed.")
@click.option("--min-pixels", default=3136, show_default=True, type=click.IntRange(1),
              help="The processor's, for --coordinates absolute.")
@click.option("--max-pixels", default=401408, show_default=True, type=click.IntRange(1),
              help="The same, its upper limit.")
@click.option("--allow-missing", is_flag=True, help="Count items without a prediction wrong.")
@click.option("--json", "out", type=click.Path(), help="Write the result here.")
@click.option("--items", type=click.Path(), help="Write every item's value here, as JSONL.")
def score_command(benchmark: str, annotations: str, predictions: str, compare: str | None,
                  out: str | None, items: str | None, min_pixels: int, max_pixels: int,
                  **rules) -> None:
    """Score predictions on BENCHMARK: mig_bench, lisa, revos, ref_l4, mc_bench, odinw, blink or
    mmiu.
    """
    from mig_kit.scoring import leaderboard, score
    from mig_kit.scoring.result import item_lines, paired_difference, summarize

    if items and benchmark.lower() == "odinw":
        raise ValueError("OdinW's AP is no mean over items, so there are none to write; "
                         "leave --items out")
    for path in (out, items):
        if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ValueError(f"{path} cannot be written; name a file in a folder that exists")
    name, box_format = benchmark.lower().replace("-", "_"), BoxFormat(min_pixels, max_pixels)
    header, scored = score.score_files(name, annotations, predictions, box_format, **rules)
    result = {**header, "predictions": Path(predictions).name, **summarize(scored)}
    if compare:
        _, other = score.score_files(name, annotations, compare, box_format, **rules)
        summary = summarize(other)
        result["compare"] = {
            "predictions": Path(compare).name,
            **{part: summary[part] for part in ("tasks", "avg", "problems")},
            "difference": paired_difference(scored, other)}
    click.echo(leaderboard.score_markdown(result))
    if items:
        lines = [json.dumps(line) + "\n" for line in item_lines(scored)]
        Path(items).write_text("".join(lines))
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")


orientation_option = click.option(
    "--orientation", default="upright", show_default=True, type=click.Choice(ORIENTATIONS),
    help="Photos with an EXIF orientation: turned upright, or refused.")


def _absolute(model: str) -> str:
    """A folder that is named from where the command is given; anything else as it is."""
    path = Path(model)
    return str(path.absolute()) if path.is_dir() and model != "tiny" else model


def _find_model(model: str, coordinates: str | None, min_pixels: int, max_pixels: int
                ) -> RunModel:
    """What --model names. A run's model brings its box format along."""
    from mig_kit.engine import models
    from mig_kit.engine.model_folders import load_config

    if found := find_run_model(model):
        return found
    folder = models.resolve_model(_absolute(model))
    if coordinates is None:
        is_absolute = load_config(folder).model_type == "qwen2_5_vl"
        coordinates = "absolute" if is_absolute else "normalized_1000"
    return RunModel(folder, BoxFormat(min_pixels, max_pixels, coordinates), {})


def model_options(command):
    """The options that name a model and how it sees images."""
    options = [
        click.option("--model", required=True,
                     help="A run (its GRPO model; RUN/sft, RUN/base: the others), tiny, or a "
                          "folder or hub name of a Qwen2.5-VL, Qwen2-VL or Qwen3-VL."),
        click.option("--coordinates",
                     help="How the model writes boxes: absolute (Qwen2.5-VL) or normalized_1000 "
                          "(Qwen2-VL, Qwen3-VL); by its family, or its run's, if left out."),
        click.option("--min-pixels", default=3136, show_default=True, type=click.IntRange(3136),
                     help="Smaller images are enlarged to so many pixels; a run brings its own."),
        click.option("--max-pixels", default=401408, show_default=True, type=click.IntRange(3136),
                     help="Larger images are shrunk to so many; a run brings its own.")]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("eval")
@model_options
@click.option("--adapter", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A LoRA adapter, merged into the model first.")
@click.option("--four-bit", is_flag=True, help="The adapter was trained on 4-bit weights (QLoRA).")
@click.option("--suite", default="drawn", show_default=True,
              help="drawn, own, or mig_bench, lisa, revos, ref_l4, blink, mmiu.")
@click.option("--file", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Own data, or the benchmark's annotation file.")
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The folder that FILE's image names are relative to; else FILE's own.")
@click.option("--limit", default=0, type=click.IntRange(0),
              help="Only the first so many questions of every task (own: of the file).")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for replies, predictions, scores and gallery; goes on where it stopped.")
@click.option("--compare", multiple=True,
              type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The --out of another model: one table, and the paired difference.")
@click.option("--server", default="", help="Draws the replies: addresses, or a command with "
                                           "{model} and {port}.")
@click.option("--concurrency", default=16, show_default=True, type=click.IntRange(1))
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1))
@click.option("--dtype", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@orientation_option
def eval_command(model: str, adapter: Path | None, four_bit: bool, suite: str, file: Path | None,
                 images: Path | None, limit: int, out: Path, compare: tuple[Path, ...],
                 orientation: str, coordinates: str | None, min_pixels: int, max_pixels: int,
                 dtype: str, device: str, **params) -> None:
    """Ask MODEL all questions of a suite and score its replies by two protocols."""
    from types import SimpleNamespace

    import pandas as pd

    from mig_kit.engine import merging, models
    from mig_kit.stages import eval_model

    if suite not in eval_model.SUITES:
        raise ValueError(f"no suite '{suite}'; use one of {', '.join(eval_model.SUITES)}")
    if (suite == "drawn") == (file is not None):
        raise ValueError(f"--suite {suite} {'has' if suite == 'drawn' else 'needs a --file:'} "
                         f"{'no --file; leave it out' if suite == 'drawn' else 'its questions'}")
    if four_bit and adapter is None:
        raise ValueError("--four-bit says how the --adapter was trained; give one, or leave it out")
    others = {str(folder): eval_model.read_result(folder) for folder in compare}
    found = _find_model(model, coordinates, min_pixels, max_pixels)
    folder, box_format = found.folder, found.box_format
    hardware = models.choose_hardware(dtype, device)
    sizes = eval_model.DRAWN_SIZES | {name: size for name, size in found.evaluation.items()
                                      if name in eval_model.DRAWN_SIZES}
    task = eval_model.Task(suite, file, images or (file.parent if file else None), limit, sizes,
                           orientation)
    if adapter is not None:
        merged = out / "merged"
        if not merged.is_dir():
            out.mkdir(parents=True, exist_ok=True)
            merging.write_merged_model(folder, adapter, merged, hardware,
                                       models.load_processor(folder, box_format), four_bit)
        folder = merged
    result = eval_model.evaluate_model(folder, task, hardware, box_format, out,
                                       SimpleNamespace(**params, seed=0))
    results = {str(out): result, **others}
    rows = eval_model.score_rows(results)
    click.echo(pd.DataFrame(rows).to_string(index=False))
    if others:
        click.echo(pd.DataFrame(eval_model.difference_rows(results)).to_string(index=False))
    click.echo(f"gallery: {out / 'gallery.html'}")


@cli.command()
@model_options
@click.option("--image", "images", multiple=True, required=True, type=click.Path(),
              help="An image; repeat in order.")
@click.option("--out", default="grounded.png", show_default=True,
              help="Where the image with the box goes.")
@click.option("--max-new-tokens", default=256, show_default=True)
@orientation_option
@click.option("--frame", hidden=True)
@click.argument("question")
def ground(model: str, images: tuple[str, ...], out: str, max_new_tokens: int,
           coordinates: str | None, min_pixels: int, max_pixels: int, orientation: str,
           frame: str | None, question: str) -> None:
    """Ask MODEL where in the images the answer to QUESTION is; print it and draw the box."""
    from mig_kit import plots
    from mig_kit.engine import models, sampling
    from mig_kit.image_files import BadImage, open_rgb
    from mig_kit.prompts import parse_reply, reply_box_in_original
    from mig_kit.sample import Sample

    if frame:
        raise ValueError("--frame is now --coordinates: absolute, or normalized_1000")
    opened = []
    for path in images:
        try:
            opened.append(open_rgb(Path(path), orientation))
        except BadImage as error:
            raise ValueError(f"--image {path}: {error}") from error
    found = _find_model(model, coordinates, min_pixels, max_pixels)
    box_format = found.box_format
    policy = models.load_policy(found.folder, models.choose_hardware(), box_format)
    sample = Sample("ground", "", "", "", tuple(opened), question)
    reply = sampling.greedy_replies(policy, [sample], max_new_tokens)[0]
    answer = parse_reply(reply)
    box = reply_box_in_original(sample, answer, box_format)
    click.echo(f"reasoning: {answer.thinking or '-'}")
    if box is None:
        click.echo(f"no box; the model said: {reply}")
        return
    click.echo(f"image: {answer.image} ({images[answer.image - 1]})")
    numbers = ", ".join(f"{value:.0f}" for value in box)
    click.echo(f"box: {numbers} (xyxy, pixels of that image)")
    plots.draw_sample(sample, reply, box_format, 320).save(Path(out))
    click.echo(f"image: {out}")


@cli.group()
def data() -> None:
    """Check, look at and compare training data; nothing here loads a model."""


@data.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--show", default=100, show_default=True, help="How many wrong lines to print.")
@orientation_option
def check(file: Path, root: Path | None, show: int, orientation: str) -> None:
    """Say line by line what is wrong with FILE, a JSONL of your own data, and its images, which are
    decoded.

    Its format is in mig_kit/data/own_data.py.
    """
    from mig_kit.data import own_data

    total = wrong = 0
    for number, problems in own_data.check_file(file, root or file.parent, orientation):
        total += 1
        wrong += bool(problems)
        if problems and wrong <= show:
            click.echo(f"line {number}: {'; '.join(problems)}")
    more = f" (the first {show} shown)" if wrong > show else ""
    click.echo(f"{total} lines, {total - wrong} correct, {wrong} wrong{more}")
    if wrong or not total:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--out", default="preview.html", show_default=True,
              type=click.Path(dir_okay=False, path_type=Path), help="A .png or an .html.")
@click.option("--count", default=12, show_default=True, type=click.IntRange(1, 200),
              help="How many questions, from the top.")
@orientation_option
def preview(file: Path, root: Path | None, out: Path, count: int, orientation: str) -> None:
    """Draw the boxes of FILE's first questions on their images."""
    from mig_kit.data import own_data
    from mig_kit.data.preview import write_preview

    samples = own_data.iter_samples(file, root or file.parent, count, orientation)
    click.echo(f"{write_preview(samples, out)} questions drawn: {out}")


@data.command("import")
@click.argument("form", metavar="FORMAT", type=click.Choice(["swift", "llava", "coco", "refcoco"]))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Where the JSONL of own data goes.")
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--coordinates", type=click.Choice(["pixels", "normalized_1000", "normalized_1"]),
              help="Of boxes in texts (llava, or swift without objects), which do not say it.")
@click.option("--padded", is_flag=True,
              help="Boxes are of the image padded to a square, as in LLaVA-1.5's files.")
@click.option("--several", type=click.Choice(["any", "all"]),
              help="Of several boxes in an answer any is correct, or all must be found; without "
                   "it, such answers are left out.")
@click.option("--question", default="", help='coco, refcoco: what is asked, as "Find the {name}.".')
@click.option("--instances", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="refcoco: the instances.json of the refs.")
@click.option("--show", default=100, show_default=True, help="How many problems to print.")
@orientation_option
def import_command(form: str, file: Path, out: Path, root: Path | None, coordinates: str | None,
                   padded: bool, several: str | None, show: int, **rules) -> None:
    """Write FILE, a data set of another project, as own data: swift (ms-swift), llava (LLaVA,
    ShareGPT, Qwen-VL, VLM-R1), coco or refcoco; and say what is left out, and why.
    """
    from mig_kit.data import importers
    from mig_kit.data.conversations import TextRules

    text = TextRules(coordinates or "", padded, several or "")
    problems = 0

    def print_problem(sentence: str) -> None:
        nonlocal problems
        problems += 1
        if problems <= show:
            click.echo(sentence.encode("utf-8", "backslashreplace").decode())

    report = importers.import_file(
        form, file, out, importers.ImportRules(root or file.parent, text, **rules), print_problem)
    more = f" (the first {show} shown)" if problems > show else ""
    click.echo(f"{report.read} questions read, {report.kept} written to {out}, {problems} left "
               f"out{more}")
    if not report.kept:
        raise click.exceptions.Exit(1)


@data.command("mgrounding")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", required=True, help="Where the archives were unpacked.",
              type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--unstated", nargs=2, multiple=True, type=(str, int), metavar="SUBSET IMAGE",
              help="Image number to take in a subset whose answers name none.")
@click.option("--limit", type=int, help="Stop after so many questions.")
@orientation_option
def mgrounding_command(file: Path, root: Path, unstated, limit: int | None,
                       orientation: str) -> None:
    """Read FILE, MGrounding-630k's annotations, and say what is kept and what is left out, and why.
    """
    from mig_kit.data import mgrounding

    report = mgrounding.check_annotations(file, root, dict(unstated), limit, orientation)
    click.echo(report.summarize())
    if not report.kept:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("train", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bits", default=4, show_default=True, type=click.IntRange(0, 32),
              help="Of 64 hash bits, how many may differ.")
@click.option("--limit", type=int, help="Look at so many images of each folder.")
def duplicates(train: Path, held_out: Path, bits: int, limit: int | None) -> None:
    """List images below TRAIN that are nearly images below HELD_OUT (perceptual hash); exit code 1
    if there are any.
    """
    from mig_kit.image_files import (
        SkipReport,
        find_near_duplicates,
        iter_images,
        perceptual_hashes,
    )

    report = SkipReport()
    train_hashes, held_out_hashes = (perceptual_hashes(iter_images(folder, report, limit))
                                     for folder in (train, held_out))
    pairs = 0
    for name, other, distance in find_near_duplicates(train_hashes, held_out_hashes, bits):
        pairs += 1
        click.echo(f"{train / name}\t{held_out / other}\t{distance} bits")
    click.echo(f"{len(train_hashes[0])} against {len(held_out_hashes[0])} images: "
               f"{pairs} pairs within {bits} bits")
    for reason, names in report.names.items():
        click.echo(f"left out, {reason}: {report.counts[reason]} ({', '.join(names)})")
    if pairs:
        raise click.exceptions.Exit(1)
