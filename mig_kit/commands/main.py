"""The entry point `mig-kit` and the commands about runs."""

import shlex
import shutil
import sys
import traceback
from pathlib import Path

import click

from mig_kit import __version__
from mig_kit.commands.ask import eval_command, ground
from mig_kit.commands.data import data
from mig_kit.commands.options import NEW_FILE
from mig_kit.commands.reward import reward
from mig_kit.commands.score import score_command
from mig_kit.common import NOTEBOOKS, UserError
from mig_kit.pipeline import run_folders, runs, store
from mig_kit.pipeline.plan import plan_run
from mig_kit.pipeline.processes import prepare_process
from mig_kit.pipeline.reward_names import OWN_MODULE


def main() -> None:
    """Entry point: what the user has to change ends with one sentence, a bug with its traceback."""
    prepare_process()
    try:
        if code := cli(standalone_mode=False):
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit("interrupted; this goes on where it stopped: "
                 + shlex.join(["mig-kit", *sys.argv[1:]]))
    except ModuleNotFoundError as error:
        modules = [frame.f_globals.get("__name__", "")
                   for frame, _ in traceback.walk_tb(error.__traceback__)]
        is_users = any(name.startswith(OWN_MODULE) for name in modules)
        if is_users or (error.name or "").split(".")[0] == "mig_kit":
            raise
        extra = "eval" if sys.argv[1:2] in (["score"], ["data"], ["eval"], ["ground"]) else (
            "notebooks")
        sys.exit(f"mig-kit: {error.name} is not installed; what this needs comes with: "
                 f"pip install 'mig-kit[{extra}]'")
    except UserError as error:
        sys.exit(f"mig-kit: {error}")
    except OSError as error:  # a full disk, a mount to read only, a file without rights
        place = "" if error.filename else f"; runs are in {run_folders.runs_root()}"
        sys.exit(f"mig-kit: {error}{place}")


@click.group(context_settings={"show_default": True})
@click.version_option(__version__, prog_name="mig-kit")
def cli() -> None:
    """mig-kit: multi-image visual grounding by reinforcement learning."""


def stage_name(text: str) -> str:
    """A stage from its number or name ("5", "05", "grpo", "05_grpo")."""
    for stage in run_folders.STAGES:
        if text in (stage, stage[3:]) or text.zfill(2) == stage[:2]:
            if not (NOTEBOOKS / f"{stage}.ipynb").is_file():
                raise click.UsageError(f"{stage} comes with a clone of the repository alone")
            return stage
    raise click.UsageError(f"no stage '{text}'; the stages are {', '.join(run_folders.STAGES)}")


@cli.command()
@click.argument("stages", nargs=-1)
@click.option("--profile", default="", show_default="the run's, of a new run tiny",
              help="tiny, or a folder of params/.")
@click.option("--run-id", default="", show_default=False,
              help="Folder under runs/; default with the profile tiny, else the profile's name.")
@click.option("--from", "source", default="", show_default=False, metavar="RUN",
              help="Take the stages before STAGES from this run, by reference.")
@click.option("-p", "overrides", nargs=2, multiple=True, metavar="NAME VALUE",
              help="Set a parameter in every stage that has it.")
@click.option("--force", is_flag=True, help="Replace what has finished or was stopped.")
def run(stages: tuple[str, ...], profile: str, run_id: str, source: str, overrides,
        force: bool) -> bool:
    """Run STAGES (all by default) as notebooks; a stage that has finished is skipped, and refused
    with other parameters.
    """
    from mig_kit.pipeline.execute import run_plan  # a second, as papermill

    run_id = run_id or (store.DEFAULT_RUN if profile in ("", "tiny") else profile)
    names = [stage_name(text) for text in stages]
    plan = plan_run(names, profile, run_id, source, overrides, force)
    run_plan(plan, force)
    if "07_report" in plan.params:
        from mig_kit.evaluation.report import write_page  # a second, as nbconvert

        if page := write_page(runs.Run(run_id).stage_folder("07_report"), run_id):
            click.echo(f"report: {page}")
    if "06_evaluate" not in plan.params:
        return False
    from mig_kit.evaluation.evaluated_runs import check_margins  # a second, as scipy

    line, is_outside = check_margins(run_id)
    if line:
        click.echo(line)
    return is_outside  # the exit status


@cli.command()
@click.argument("run_id", required=False)
def status(run_id: str | None) -> None:
    """All runs, a line each; or the stages of RUN_ID, why they are stale, and the greedy scores
    (percent).
    """
    from mig_kit.pipeline.status import run_line, run_lines

    if run_id:
        run_folders.require_runs(run_id)
    lines = run_lines(run_id) if run_id else map(run_line, sorted(run_folders.list_runs()))
    click.echo("\n".join(lines) or (
        f"no run in {run_folders.runs_root()} yet; mig-kit run makes one, all stages in some 15 "
        "minutes, and mig-kit run --profile smoke tries them in a few"))


@cli.command()
@click.argument("run_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(run_id: str, yes: bool) -> None:
    """Delete the run RUN_ID with all its stages, unless branches start from it."""
    run_folders.require_runs(run_folders.validate_run_id(run_id))
    if branches := [name for name in sorted(run_folders.list_runs())
                    if runs.Run(name).branch.get("from") == run_id]:
        raise UserError(f"run '{run_id}' stays: {', '.join(branches)} start from it; remove these "
                        f"first, as mig-kit rm {branches[0]}")
    folder = run_folders.runs_root() / run_id
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    run_folders.lock_run(folder)  # refused before a question is asked
    try:
        is_sure = yes or click.confirm(f"delete {folder}, {size:.0f} MB?")
    except click.Abort:
        raise UserError("nothing removed, for there was no answer; --yes does not ask") from None
    if not is_sure:
        run_folders.unlock_run(folder)
        return click.echo("nothing removed")
    shutil.rmtree(folder)
    run_folders.unlock_run(folder)
    click.echo(f"removed: run '{run_id}'")


@cli.command("params")
@click.argument("stage")
@click.option("--profile", default="tiny", help="tiny, or a folder of params/.")
def params_command(stage: str, profile: str) -> None:
    """All parameters of STAGE, their values in a profile and what they mean."""
    from mig_kit.pipeline.params import params_text

    click.echo(params_text(stage_name(stage), profile))


@cli.command()
@click.argument("run_ids", nargs=-1)
@click.option("--group", "groups", multiple=True, metavar="NAME=RUN,RUN",
              help="Runs that count as one, such as the seeds of a variant; repeat.")
@click.option("--reference", default="", show_default=False,
              help="The group that the others are compared with.")
@click.option("--system", default="grpo", type=click.Choice(["grpo", "sft", "base"]),
              help="Whose scores are compared.")
@click.option("--format", "form", default="md", type=click.Choice(["md", "csv"]))
@click.option("--figure", type=NEW_FILE, help="Draw the scores here: a .png, .pdf or .svg.")
@click.option("--differences", is_flag=True,
              help="With --figure, draw the differences to the reference, not the scores.")
def table(run_ids: tuple[str, ...], groups: tuple[str, ...], reference: str, system: str,
          form: str, figure: Path | None, differences: bool) -> None:
    """Runs, or groups of runs, side by side: scores, differences and their intervals.

    A run that is named without a group is a group of its own; a file of a recorded run takes the
    place of a run.
    """
    from mig_kit.evaluation import compare

    if figure and figure.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--figure {figure} is no picture; end its name in .png, .pdf or .svg")
    by_group = compare.parse_groups([*groups, *run_ids])
    result = compare.compare_groups(by_group, reference, system)
    click.echo(compare.render_table(result, form))
    if form == "csv":  # Markdown has the notes below the tables
        click.echo("\n".join(result["notes"]), nl=bool(result["notes"]), err=True)
    if figure:
        from mig_kit.drawing import plots  # seconds, which a table need not wait for

        plots.set_style()
        drawn = compare.figure_rows(result, differences)
        plots.plot_groups(drawn, system, result["reference"] * differences).savefig(
            figure, bbox_inches="tight")
        click.echo(f"figure: {figure}", err=True)


for command in (score_command, eval_command, ground, data, reward):
    cli.add_command(command)
