"""Make the records that results.md and README print: `make evidence`, then `make evidence-pages`.

The list is notebooks/guide/evidence/evidence.yaml. A record is a run as `evaluated_runs.record_run`
keeps it, with a key "evidence" beside: the arm, its commands, a digest of what the code computes,
and what it cost. `run` makes what is missing, one after the other, and goes on after a kill.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from mig_kit import __version__
from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, write_json
from mig_kit.evaluation.eval_model import read_result
from mig_kit.evaluation.evaluated_runs import (
    SAMPLE_PARAMS,
    EvaluatedRun,
    correct_bits,
    record_run,
)
from mig_kit.pipeline import store
from mig_kit.pipeline.params import default_params
from mig_kit.pipeline.run_facts import describe_machine, processor_seconds
from mig_kit.pipeline.runs import Run
from mig_kit.world.suites import OUT_OF_DOMAIN, SUITES

FOLDER = NOTEBOOKS / "guide" / "evidence"
LIST = FOLDER / "evidence.yaml"
STAGES = ("01", "02", "03", "04", "05", "06")
COMPUTED = (".safetensors", ".parquet", ".jsonl")  # outputs that hold no time and no path
CURVES = ("reward", "box", "entropy", "length", "logp_difference", "evidence")
# the questions out of domain: of an eval_seed that nothing was chosen on, 3,200 in four parts
FAR = {"eval_seed": 211, "suites": dict.fromkeys(SUITES, 0) | {OUT_OF_DOMAIN: 800}}
LAST = 10  # updates whose mean a record keeps


class Item(NamedTuple):
    """One record to make."""

    arm: str
    seed: int
    commands: list[str]

    @property
    def run_id(self) -> str:
        """The run that the commands make."""
        return next(read_option(line, "--run-id") for line in self.commands if "--run-id" in line)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.arm}-{self.seed}.json"


def read_list() -> dict[str, dict]:
    """Arm -> {"title", "expected", "seeds", "commands"}."""
    return yaml.safe_load(LIST.read_text())


def list_items() -> list[Item]:
    """Every record of the list, in its order."""
    return [Item(arm, seed, [fill_command(command, seed) for command in entry["commands"]])
            for arm, entry in read_list().items() for seed in entry["seeds"]]


def fill_command(command: str, seed: int) -> str:
    """A command of the list for a seed."""
    return command.format(seed=seed, source=f"seed{seed}" if seed else "default")


def read_option(command: str, option: str) -> str:
    """The word behind an option of a command."""
    words = shlex.split(command)
    return words[words.index(option) + 1]


def list_sources(item: Item) -> list[Item]:
    """The items whose runs an item's commands name."""
    words = {word for command in item.commands for word in re.split(r"[\s/]", command)}
    return [other for other in list_items() if other.run_id in words - {item.run_id}
            and not other.commands[-1].startswith("mig-kit eval")]


def list_source_commands(item: Item) -> list[str]:
    """The commands that make the runs an item starts from, as far as they are not there.

    In a fresh clone their records are there, and the runs are not.
    """
    return [command for source in list_sources(item)
            if not Run(source.run_id).record("06_evaluate") for command in source.commands]


def run_command(command: str, **environment: str) -> None:
    """Run a line of the list with this Python; CalledProcessError where it fails."""
    first, *words = shlex.split(command)
    script = [str(Path(sys.executable).with_name(first))] * (first != "python")
    subprocess.run([sys.executable, *script, *words], check=True, cwd=PROJECT_ROOT,
                   env=os.environ | environment)


def digest_smoke_run() -> str:
    """SHA-256 of what stages 01 to 06 of the smoke profile write on this machine.

    Two states of the code with the same digest compute the same.
    """
    outputs = {}
    with tempfile.TemporaryDirectory() as folder:
        run_command(f"mig-kit run {' '.join(STAGES)} --profile smoke --run-id smoke",
                    MIG_KIT_RUNS=folder)
        for path in sorted(Path(folder).glob("smoke/*/run.json")):
            record = json.loads(path.read_text())
            outputs |= {f"{record['stage']}/{name}": digest
                        for name, digest in record["outputs"].items() if name.endswith(COMPUTED)}
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def require_same_code(items: list[Item], smoke: str, machine: str) -> None:
    """SystemExit if a record of this machine was made by code that computes something else."""
    for item in items:
        if item.path.is_file():
            record = json.loads(item.path.read_text())
            is_other = record["machine"] == machine and record["evidence"]["smoke"] != smoke
            if record["version"] != __version__ or is_other:
                sys.exit(f"{item.path.relative_to(PROJECT_ROOT)} was made by other code (version "
                         f"{record['version']}, commit {record['git'][:7]}); delete it, and make "
                         "evidence makes it again")


def make_record(item: Item, smoke: str) -> None:
    """Run an item's commands, as far as they have not been run, and write its record."""
    for command in list_source_commands(item):
        run_command(command)
    *_, last = item.commands
    is_eval = last.startswith("mig-kit eval")
    run_id = item.run_id
    is_whole = not Run(run_id).folder.exists()
    before = processor_seconds()
    for command in item.commands:
        run_command(command)
    # of a run that was begun before, only a part was seen
    spent = round(processor_seconds() - before) if is_whole else None
    path = (record_evaluation(run_id, item.seed, PROJECT_ROOT / read_option(last, "--out"))
            if is_eval else record_run(run_id, FOLDER))
    record = json.loads(path.read_text())
    path.unlink()
    curves = [] if is_eval else store.read_metrics(
        Run(run_id).stage_folder("05_grpo"))["curves"][-LAST:]
    record["evidence"] = {
        "arm": item.arm, "commands": item.commands, "smoke": smoke, "processor_seconds": spent,
        "curves": {name: round(float(np.mean([row[name] for row in curves])), 7)
                   for name in CURVES if curves and name in curves[0]}}
    record["out_of_domain"] = FAR | ask_out_of_domain(item)
    write_json(item.path, record)


def ask_out_of_domain(item: Item) -> dict[str, dict]:
    """{"correct": system -> 0 or 1 for each question of FAR, "scores": percent} of the models that
    the item's own stages made; the base, which has no seed, is asked once.
    """
    run_id, correct, scores = item.run_id, {}, {}
    models = {"base": "tiny"} if (item.arm, item.seed) == ("recipe", 0) else {}
    for system, stage in (("sft", "03_merge"), ("grpo", "05_grpo")):
        if (Run(run_id).folder / stage).is_dir():
            models[system] = f"{run_id}/sft" if system == "sft" else run_id
    for system, model in models.items():
        out = PROJECT_ROOT / "evals" / "out_of_domain" / f"{run_id}-{system}"
        settings = " ".join(f"-p {name} {shlex.quote(json.dumps(value))}"
                            for name, value in FAR.items())
        run_command(f"mig-kit eval --model {model} --suite drawn {settings} --out {out}")
        result = read_result(out)
        correct[system] = correct_bits(result["items"], "protocol")["strict"][OUT_OF_DOMAIN]
        scores[system] = result["scores"]["strict"][OUT_OF_DOMAIN]["score"]
    return {"correct": correct, "scores": scores}


def record_evaluation(run_id: str, seed: int, out: Path) -> Path:
    """Write FOLDER/RUN_ID.json of an SFT model that `mig-kit eval` has asked."""
    result, run = read_result(out), Run(run_id)
    correct = correct_bits(result["items"], "protocol")["strict"]
    trained = run.record("02_sft")
    # as `mig-kit eval` did
    asked = default_params("01_synthesize") | default_params("06_evaluate")
    stages = [run.record(stage) for stage in ("02_sft", "03_merge")]
    seconds = sum(stage["seconds"] for stage in stages)
    spent = [stage["processor_seconds"] for stage in stages]
    path = FOLDER / f"{run_id}.json"
    write_json(path, asdict(EvaluatedRun(
        run_id, seed, seed, {"sft": correct}, float("nan"), seconds / 60, trained["git"],
        trained["machine"], trained["versions"]["mig-kit"],
        {name: asked[name] for name in SAMPLE_PARAMS}, questions=result["questions"],
        scores={"sft": {suite: summary["score"]
                        for suite, summary in result["scores"]["strict"].items()}},
        processor_seconds=None if None in spent else sum(spent))))
    return path


def run() -> None:
    """Make what is missing."""
    items = list_items()
    missing = [item for item in items if not item.path.is_file()]
    smoke = digest_smoke_run() if missing else ""
    if missing:
        require_same_code(items, smoke, describe_machine()["machine"])
    clock = time.monotonic()
    for done, item in enumerate(missing):
        minutes = (time.monotonic() - clock) / 60
        left = f", {minutes / done * (len(missing) - done):.0f} minutes left" if done else ""
        print(f"evidence {len(items) - len(missing) + done + 1} of {len(items)}: {item.arm}, seed "
              f"{item.seed}{left}", flush=True)
        make_record(item, smoke)
    print("nothing is missing")


if __name__ == "__main__":
    run()
