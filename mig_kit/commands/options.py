"""Kinds of files, and options that several commands have."""

from pathlib import Path

import click

from mig_kit.boxes import BoxFormat
from mig_kit.pipeline.params import profile_params

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)

root_option = click.option("--root", type=FOLDER, help="Image root; else the folder of the file.")


def profile_box_format(profile: str) -> BoxFormat:
    """How the models of a profile see images and write boxes."""
    params = profile_params("01_synthesize", profile)
    return BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
