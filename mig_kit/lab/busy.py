"""What a busy machine costs: stages of a finished run, made again in small, alone and beside
processes that keep a core busy, as a browser does.

A thread that waits actively would take the core from the one that it waits for; see
`mig_kit.PROCESS_ENVIRONMENT`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mig_kit.pipeline import store
from mig_kit.pipeline.run_folders import list_sources, read_record

# a stage -> its parameters, for about a minute of it on two cores
LOADS = {
    "02_sft": {"max_samples": 416, "num_train_epochs": 1.0},
    "04_rejection_sampling": {"replies": 2},
    "05_grpo": {"max_steps": 6, "save_steps": 6},
    "06_evaluate": {"mig_per_task": 8, "ood_per_task": 4, "blink_per_task": 4, "mmiu_per_task": 4}}
BENCH = ("bench", "--images", "3", "--side", "168", "--group", "4", "--tokens", "16", "--prompts",
         "2", "--repeats", "2")
SPIN = "import os; os.nice(19)\nwhile True: pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run so many processes of the lowest priority that never wait."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measure(run_id: str, counts: tuple[int, ...] = (0, 1, 2)) -> list[dict]:
    """Rows {stage, "alone", "beside 1", ...}: seconds of each of LOADS, and of `mig-kit bench`.

    The stages are made as branches of the finished run, in a folder of their own that is deleted.
    FileNotFoundError where the run has not finished one of them; RuntimeError where one fails.
    """
    for stage in LOADS:
        store.require_record(stage, run_id, "bench --busy")
    rows = {name: {"stage": name} for name in (*LOADS, "bench")}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for name in list_sources(run_id):
            (root / name).symlink_to((store.runs_root() / name).resolve())
        for count in counts:
            label = f"beside {count}" if count else "alone"
            for stage, changes in LOADS.items():
                words = [word for name, value in changes.items()
                         for word in ("-p", name, str(value))]
                branch = f"{stage}-{count}"
                with busy_processes(count):
                    _run(root, "run", stage, "--from", run_id, "--run-id", branch, *words)
                record = read_record(root / branch / stage / "run.json")
                rows[stage][label] = record["seconds"]
                shutil.rmtree(root / branch)
            start = time.monotonic()
            with busy_processes(count):
                _run(root, *BENCH)
            rows["bench"][label] = round(time.monotonic() - start, 1)
            print(label, {name: row[label] for name, row in rows.items()}, flush=True)
    return list(rows.values())


def _run(root: Path, *words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from mig_kit.cli import main; main()", *words], text=True,
        env={**os.environ, "MIG_KIT_RUNS": str(root)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    if result.returncode:
        raise RuntimeError(f"mig-kit {' '.join(words)} failed: {result.stdout.strip()[-500:]}")


def table_text(rows: list[dict]) -> str:
    """The rows of `measure` as lines: seconds alone, and how many times as long beside others."""
    lines = []
    for row in rows:
        alone = row["alone"]
        beside = ", ".join(f"{seconds / alone:.2f} times {label}" for label, seconds in row.items()
                           if label.startswith("beside"))
        lines.append(f"{row['stage']:<24}{alone:6.1f} s alone, {beside}")
    return "\n".join(lines)
