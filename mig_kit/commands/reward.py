"""`mig-kit reward check`: what a reward pays for, before anyone trains with it."""

from pathlib import Path

import click

from mig_kit.commands.options import FILE, profile_box_format, root_option


@click.group()
def reward() -> None:
    """Try rewards before they train; nothing here loads a model."""


@reward.command()
@click.argument("rewards", metavar="FILE.py:FUNCTION ...", nargs=-1, required=True)
@click.option("--data", "file", required=True, type=FILE,
              help="Own data, whose questions the replies are constructed for.")
@root_option
@click.option("--profile", default="tiny",
              help="Whose coordinates, pixel limits and weights count: tiny, or a folder of "
                   "params/.")
def check(rewards: tuple[str, ...], file: Path, root: Path | None, profile: str) -> None:
    """Print what REWARDS pay for eight constructed replies to real questions: right, empty, in
    another frame, ... A name of the kit's is a reward, too.
    """
    from mig_kit.data.own_data import iter_samples
    from mig_kit.pipeline.params import profile_params
    from mig_kit.pipeline.reward_names import check_rewards
    from mig_kit.training import reward_check, reward_loading

    box_format, params = profile_box_format(profile), profile_params("05_grpo", profile)
    # a file is named from where the command is given
    references = [f"{Path.cwd() / text}" if ":" in text else text for text in rewards]
    check_rewards(references, {}, {})
    loaded = reward_loading.load_rewards(references, None)
    samples = list(iter_samples(file, root or file.parent, reward_check.MOST_READ))
    table = reward_check.tabulate_payments(loaded, samples, box_format, params["reward_weights"])
    click.echo(f"{len(samples)} questions; boxes in {box_format.coordinates.description}")
    click.echo(table.round(2).to_string(na_rep="-"))
