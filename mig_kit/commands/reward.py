"""`mig-kit reward check`: what a reward pays for, before anyone trains with it."""

from pathlib import Path

import click

from mig_kit.commands.options import FILE, profile_box_format, root_option
from mig_kit.common import UserError


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
@click.option("--as", "engine", type=click.Choice(["trl", "verl", "swift"]),
              help="The form of a function for another engine; the kit's and TRL's are recognised.")
def check(rewards: tuple[str, ...], file: Path, root: Path | None, profile: str,
          engine: str | None) -> None:
    """Print what REWARDS, summed, pay for replies to real questions: right, empty, in another
    frame, ...; exit code 1 if they pay for the wrong thing. A name of the kit's is a reward, too.
    """
    from mig_kit.data.own_data import iter_samples
    from mig_kit.pipeline.params import profile_params
    from mig_kit.rewards import REWARDS
    from mig_kit.training import reward_check, reward_loading

    box_format, params = profile_box_format(profile), profile_params("05_grpo", profile)
    # a file is named from where the command is given
    references = [f"{Path.cwd() / text}" if ":" in text else text for text in rewards]
    loaded = reward_loading.load_rewards(references, None)
    if engine:
        loaded = {name: function if name in REWARDS else
                  reward_loading.as_batch_reward(function, engine)
                  for name, function in loaded.items()}
    samples = list(iter_samples(file, root or file.parent, reward_check.MOST_TRIED))
    click.echo(f"{len(samples)} questions; boxes in {box_format.coordinates.description}")
    failures = []
    payments = reward_check.measure_payments(loaded, samples, box_format, params["reward_weights"])
    if not payments:
        raise UserError(f"{', '.join(loaded)}: no value for any of these questions; name rewards "
                        "that are about them")
    for payment in payments:
        faults, warnings = payment.judge()
        click.echo(f"{payment.name}\n{payment.table()}")
        for sentence in warnings:
            click.echo(f"warning: {payment.name}: {sentence}")
        failures += [f"{payment.name}: {sentence}" for sentence in faults]
    if failures:
        raise UserError("; ".join(failures))
