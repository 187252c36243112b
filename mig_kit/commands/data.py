"""`mig-kit data`: check, look at, import and export training data; nothing here loads a model."""

from pathlib import Path

import click

from mig_kit.commands.options import FILE, NEW_FILE, NEW_FOLDER, profile_box_format, root_option
from mig_kit.common import UserError
from mig_kit.pipeline.params import profile_params


@click.group()
def data() -> None:
    """Check, look at, import and export training data; nothing here loads a model."""


@data.command("check")
@click.argument("file", type=FILE)
@root_option
@click.option("--profile", help="Also find prompts that are too long for this profile's base "
                                "model, whose tokenizer is loaded: tiny, or a folder of params/.")
@click.option("--out", type=NEW_FILE, help="Write the correct lines here.")
@click.option("--sheet", type=NEW_FILE, show_default="beside FILE",
              help="The page with the boxes of twelve questions on their images.")
def check_data(file: Path, root: Path | None, profile: str | None, out: Path | None,
          sheet: Path | None) -> None:
    """Say line by line what is wrong with FILE, your own data, and its images, which are decoded;
    and draw twelve of its questions.

    FILE has a JSON object a line, holds a list of them, or is a table. The guide,
    notebooks/guide/own_data.md, says what is in one.
    """
    from mig_kit.data import inspection, own_data, records

    root, sheet = root or file.parent, sheet or file.with_name(f"{file.stem}.sheet.html")
    if sheet.suffix != ".html" or not sheet.absolute().parent.is_dir():
        raise UserError(f"--sheet {sheet} must end in .html, in a folder that exists")
    lines = own_data.iter_checked_lines(file, root, decodes=True)
    if profile:
        from mig_kit.models import loading, processors

        model = loading.resolve_model(profile_params("01_synthesize", profile)["base_model"])
        lines = own_data.check_lengths(lines, processors.prompt_measure(
            model, profile_box_format(profile)))
    findings = inspection.sort_lines(lines, records.entry_word(file), out, file, root, click.echo)
    own_data.require_lines(file, findings.n_lines)
    inspection.write_sheet(findings.drawn, sheet)
    click.echo(f"look at {len(findings.drawn)} questions with their boxes: {sheet}")
    if findings.wrong:
        raise click.exceptions.Exit(1)


@data.command("import")
@click.argument("form", metavar="mgrounding", type=click.Choice(["mgrounding"]))
@click.argument("file", type=FILE)
@root_option
@click.option("--out", required=True, type=NEW_FILE, help="Where the JSONL of own data goes.")
def import_command(form: str, file: Path, out: Path, root: Path | None) -> None:
    """Write FILE, the JSON of MGrounding-630k, as own data, and say what is left out, and why."""
    from mig_kit.data import importers, inspection, own_data

    root = root or file.parent
    lines = own_data.check_records(importers.iter_mgrounding(file), root)
    findings = inspection.sort_lines(lines, "record", out, file, root, click.echo)
    if findings.n_lines == findings.wrong.total():
        raise click.exceptions.Exit(1)


@data.command("export")
@click.argument("engine", type=click.Choice(["verl", "swift"]))
@click.argument("run_id", metavar="RUN")
@click.option("--out", required=True, type=NEW_FOLDER, help="The new folder.")
@click.option("--gpus", default=8, type=click.IntRange(1), help="GPUs of a node, in config.yaml.")
def export_command(engine: str, run_id: str, out: Path, gpus: int) -> None:
    """Write the prompts that stage 04 of RUN kept for another engine: its data, reward.py, and
    config.yaml with the values of RUN's 05 (if that has not run, its profile's) and the command.
    """
    from mig_kit.data import exports
    from mig_kit.models import loading
    from mig_kit.pipeline import run_folders
    from mig_kit.pipeline.reward_names import list_own_files
    from mig_kit.pipeline.runs import Run
    from mig_kit.sample import read_samples
    from mig_kit.training.reward_loading import load_rewards, takes_batch

    run_folders.require_runs(run_id)
    run = Run(run_id)
    run.require("04_rejection_sampling", "mig-kit data export")
    has_trained, folder = bool(run.record("05_grpo")), run.stage_folder("05_grpo")
    params = run.params("05_grpo") or profile_params("05_grpo", run.profile or "tiny")
    params |= run.run_params("mig-kit data export")
    rewards = load_rewards(params["rewards"], folder if has_trained else None)
    if of_batch := [name for name in rewards if takes_batch(rewards[name])]:
        raise UserError(f"the reward '{of_batch[0]}' judges whole batches, which other engines do "
                         "not give; write it as a function of answer and sample")
    for note in run.notes("04_rejection_sampling"):
        click.echo(f"warning: {note}", err=True)
    start, kept = params["start_from"], run.stage_folder("04_rejection_sampling")
    model = (run.stage_folder("03_merge") / "merged" if start == "merged" else
             loading.resolve_model(params["base_model"] if start == "base" else start))
    samples = read_samples(kept / "kept.parquet")
    files = (folder / "rewards").glob("*") if has_trained else list_own_files(params["rewards"])
    recipe = exports.Recipe(run_id, samples, params, model, params["trl"], tuple(files))
    differences = exports.write_export(engine, recipe, out, gpus)
    click.echo(f"{len(samples)} prompts, their rewards and the recipe for {engine}: {out}")
    for sentence in differences:
        click.echo(f"remark: with {engine}, {sentence}")
