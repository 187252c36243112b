"""`mig-kit` as README and guide call it, with the smoke profile's parameters put in.

python page_shell.py WORDS
"""

import sys

import yaml
from command_line import notebooks_in_this_process

from mig_kit.commands.main import main
from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline.run_folders import runs_root

OF_A_PROFILE = ("teacher", "data_shares", "start_from")  # what a whole run takes from another's


def shorten(command: list[str]) -> list[str]:
    """The words of a command on a page, for a model of the smoke run and few questions."""
    words = list(command)
    if words[0] == "eval":
        # a smoke run's 06 asks other questions than the recipe's, which "tiny" is asked
        return ["default/base" if word == "tiny" else word for word in words] + ["--limit", "2"]
    if words[0] != "run":
        return words
    settings = {}
    if "--profile" in words:
        place = words.index("--profile") + 1
        for path in sorted((PROJECT_ROOT / "params" / words[place]).glob("*.yaml")):
            settings |= yaml.safe_load(path.read_text()) or {}
        words[place] = "smoke"
    elif "--from" not in words and not (runs_root() / read_run_id(words)).exists():
        words += ["--profile", "smoke"]
    if "num_train_epochs" in words:
        words += ["-p", "max_samples", "8"]
    if len(words) > 1 and words[1].startswith("-"):  # all stages
        for name in OF_A_PROFILE:
            if name in settings:
                words += ["-p", name, str(settings[name])]
    return words


def read_run_id(words: list[str]) -> str:
    return words[words.index("--run-id") + 1] if "--run-id" in words else "default"


if __name__ == "__main__":
    sys.argv[1:] = shorten(sys.argv[1:])
    with notebooks_in_this_process():
        main()
