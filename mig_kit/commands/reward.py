"""`mig-kit reward check`: what a reward pays for, before anyone trains with it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from mig_kit.boxes import BoxFormat
from mig_kit.commands.options import FILE, profile_box_format, root_option
from mig_kit.common import UserError


@click.group()
def reward() -> None:
    """Try rewards before they train; nothing here loads a model."""


@reward.command("check")
@click.argument("rewards", metavar="FILE.py:FUNCTION ...", nargs=-1)
@click.option("--data", "file", type=FILE,
              help="Own data, whose questions the replies are constructed for; with --run those "
                   "that its 04 kept.")
@click.option("--run", "run_id", default="", show_default=False, metavar="RUN",
              help="Show what 05 of RUN shows: with its weights and, unless others are named, its "
                   "rewards.")
@root_option
@click.option("--profile", default="tiny",
              help="Whose coordinates, pixel limits and weights count: tiny, or a folder of "
                   "params/.")
def check_reward(rewards: tuple[str, ...], file: Path | None, run_id: str, root: Path | None,
          profile: str) -> None:
    """Print what REWARDS pay for twelve constructed replies to real questions: right, empty, in
    another frame, ... A name of the kit's is a reward, too.
    """
    from mig_kit.data.own_data import iter_samples
    from mig_kit.pipeline import run_folders
    from mig_kit.pipeline.params import profile_params
    from mig_kit.pipeline.reward_names import check_rewards
    from mig_kit.pipeline.runs import Run
    from mig_kit.sample import read_samples
    from mig_kit.training import reward_check, reward_loading

    if not run_id and not (rewards and file):
        raise UserError("name rewards and --data FILE, or --run RUN, which has both")
    if run_id:
        run_folders.require_runs(run_id)
        run = Run(run_id)
        box_format = BoxFormat.of(run.run_params("mig-kit reward check"))
        params = run.params("05_grpo") or profile_params("05_grpo", run.profile or "tiny")
    else:
        box_format, params = profile_box_format(profile), profile_params("05_grpo", profile)
    # a file is named from where the command is given
    references = [f"{Path.cwd() / text}" if ":" in text else text for text in rewards]
    references = references or params["rewards"]
    if file:
        samples = list(iter_samples(file, root or file.parent, reward_check.MOST_READ))
    else:
        run.require("04_rejection_sampling", "mig-kit reward check")
        folder = run.stage_folder("04_rejection_sampling")
        samples = read_samples(folder / "kept.parquet")
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if run_id and run.record("05_grpo") and not rewards:
            folder = run.stage_folder("05_grpo")
        else:  # copied, as 05 copies them
            check_rewards(references, {}, {})
            reward_loading.copy_own_files(references, folder)
        table = reward_check.tabulate_payments(
            reward_loading.load_rewards(references, folder), samples, box_format,
            params["reward_weights"], params["hallucinated_image_penalty"],
            params["num_generations"])
    click.echo(f"{len(samples)} questions; boxes in {box_format.coordinates.description}")
    click.echo(table.round(2).to_string(na_rep="-"))
