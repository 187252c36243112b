"""Kinds of files, and options that several commands have."""

import os
from pathlib import Path

import click

from mig_kit.boxes import BoxFormat
from mig_kit.pipeline.params import profile_params


class NewPath(click.Path):
    """A path to write to, in a folder that can be written in; of a new folder its nearest one."""

    def convert(self, value, param: click.Parameter | None, context: click.Context | None) -> Path:
        """The path; click.BadParameter before any work is done for it."""
        path = Path(super().convert(value, param, context))
        folder = next(folder for folder in path.absolute().parents
                      if not self.dir_okay or folder.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            self.fail(f"{path} cannot be written: {folder} is no folder that can be written in",
                      param, context)
        return path


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = NewPath(dir_okay=False, path_type=Path)
NEW_FOLDER = NewPath(file_okay=False, path_type=Path)

root_option = click.option("--root", type=FOLDER, help="Image root; else the folder of the file.")


def profile_box_format(profile: str) -> BoxFormat:
    """How the models of a profile see images and write boxes."""
    return BoxFormat.of(profile_params("01_synthesize", profile))
