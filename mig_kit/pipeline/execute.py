"""Run stages as notebooks, through papermill: what is up to date is skipped."""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.launcher import launch_kernel
from jupyter_client.manager import AsyncKernelManager

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline import attempts, store
from mig_kit.pipeline.joint_rules import check_run
from mig_kit.pipeline.params import (
    CONFIGS,
    EXECUTION_PARAMS,
    GROUP,
    NAMES_OF_RUNS,
    describe_edits,
    list_profiles,
    profile_params,
)
from mig_kit.pipeline.plan import PlannedRun
from mig_kit.pipeline.processes import describe_disk, describe_exit
from mig_kit.pipeline.run_folders import load_branch, start_branch

STEP = re.compile(r"^step (\d+)/(\d+): ")
BAR = re.compile(r"^(?!Loading weights: )(.+?): +100%\|")
# lines that are always printed; a progress bar may stand before them
NEWS = re.compile(r"(?:the server https?://\S+ .*is left out|warning: ).*")


# The kernel of the next stage is started while a stage runs: it imports what takes seconds, then
# waits for its arguments. It imports no module of the kit, so a stage runs the code as it then is.
WAITING_KERNEL = """import json, sys
import mig_kit, datasets, matplotlib.pyplot, pandas, peft, scipy.stats, seaborn, torch, trl
from ipykernel.kernelapp import launch_new_instance
if line := sys.stdin.readline():
    launch_new_instance(argv=json.loads(line))"""
TIMED = ("00_preflight", "08_benchmark")  # they measure time, so nothing starts beside them
BACKEND = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


class ThisPython(AsyncKernelManager):
    """Starts ipykernel with this Python, not with a kernel spec of another environment's.

    starts_next: whether the next kernel is started beside the stage's.
    waiting: the kernel of the next stage, or None.
    exit_status: of the last kernel that ended by itself, or None.
    """

    starts_next = False
    waiting: subprocess.Popen | None = None
    exit_status: int | None = None

    @property
    def kernel_spec(self) -> KernelSpec:
        """The only one."""
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
                                "{connection_file}"], display_name="Python 3", language="python",
                          env=BACKEND)

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw) -> None:
        process, ThisPython.waiting = ThisPython.waiting, None
        if process and process.poll() is None:
            arguments = kernel_cmd[kernel_cmd.index("-f"):]
            process.stdin.write(json.dumps(arguments).encode() + b"\n")
            process.stdin.close()
            self.provisioner.process = process
            self.provisioner.pid = self.provisioner.pgid = process.pid  # a session of its own
            self._reconcile_connection_info(self.provisioner.connection_info)
        else:
            await super()._async_launch_kernel(kernel_cmd, **kw)
        if ThisPython.starts_next:
            ThisPython.waiting = launch_kernel(
                [sys.executable, "-c", WAITING_KERNEL], stdin=subprocess.PIPE,
                cwd=str(NOTEBOOKS), env=os.environ | BACKEND)

    @classmethod
    def stop_waiting(cls) -> None:
        """End the kernel of a next stage that does not run."""
        process, cls.waiting = cls.waiting, None
        if process:
            process.kill()
            process.communicate()

    async def _async_is_alive(self) -> bool:
        if self.has_kernel and (status := await self.provisioner.poll()) is not None:
            ThisPython.exit_status = status
        return await super()._async_is_alive()

    is_alive = _async_is_alive


class StageLines(logging.Handler):
    """A log handler that prints a stage's start, some progress of its notebook, and its result."""

    def __init__(self):
        super().__init__()
        self.started = 0.0
        self.shown: set[tuple[str, int]] = set()  # fifths of the work that a line has told of

    def set(self, name: str, state: str, summary: str = "") -> None:
        """A stage is now "running", "up to date", "done" or "failed"; summary: its result."""
        if state == "running":
            self.started = time.monotonic()
            self.shown.clear()
        minutes = (time.monotonic() - self.started) / 60
        took = f" in {minutes:.1f} min" if state == "done" else ""
        result = f"; {summary}" if summary else ""
        print(f"{name}: {state}{took}{result}", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Print the lines of a notebook's output that tell of progress or match NEWS."""
        for line in record.getMessage().split("\n"):
            line = line.rsplit("\r", 1)[-1].strip()  # a bar is printed over itself
            if news := NEWS.search(line):
                print(f"  {news.group()}", flush=True)
            elif self._is_due(line):
                print(f"  {line}", flush=True)

    def _is_due(self, line: str) -> bool:
        """Whether a line of progress is the first in its fifth of the work."""
        if match := STEP.match(line):
            label, share = "step", int(match[1]) / int(match[2])
        elif match := BAR.match(line):  # a bar per batch of replies is many bars: their ends do
            label, share = match[1], 1.0
        else:
            return False
        fifth = (label, int(5 * share))
        is_new = fifth not in self.shown
        self.shown.add(fifth)
        return is_new and share > 0


def run_plans(plans: list[PlannedRun], force: bool = False) -> None:
    """Run one plan after the other; with several, say after each how long the others will take."""
    for line in [line for plan in plans for line in describe_replaced(plan, force)]:
        print(line, flush=True)
    os.environ[attempts.COMMAND] = f"{time.time():.3f}"
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            print(f"run '{plan.run_id}', {number} of {len(plans)}", flush=True)
        if plan.source:
            start_branch(plan.source, plan.run_id, *plan.params)
        run_stages(plan.params, plan.run_id, force)
        if number < len(plans):
            seconds = sum(store.load_record(stage, finished.run_id)["seconds"]
                          for finished in plans[:number] for stage in finished.params)
            left = (len(plans) - number) * seconds / number / 60
            print(f"{len(plans) - number} of {len(plans)} runs to go, about {left:.0f} min left",
                  flush=True)


def describe_replaced(plan: PlannedRun, force: bool) -> list[str]:
    """Lines on the finished stages that a plan replaces, and on values edited in notebooks.

    Raises ValueError without `force` if a stage would read a stale one, or if finished stages have
    the parameters of another profile.
    """
    run_id, params = plan.run_id, plan.params
    stale = store.find_stale(run_id, params)
    finished = {stage for stage in params if store.load_record(stage, run_id)}
    due = [stage for stage in params if force or stage in stale or stage not in finished]
    if not force:
        _refuse_stale_inputs(plan, due)
    lines = [f"{stage}: edited in notebooks/{stage}.ipynb: {edits}" for stage in due
             if (edits := describe_edits(stage, params[stage]))]
    replaced = [stage for stage in due if stage in finished]
    if not replaced:
        return lines
    if not force and (other := _find_other_profile(plan, replaced)):
        raise ValueError(f"--profile {plan.profile} would replace {', '.join(replaced)} of run "
                         f"'{run_id}', which are of profile {other}; leave --run-id out or name "
                         "another for a run beside it, or add --force to replace them")
    causes = {stage: stale.get(stage, (stage, "--force")) for stage in replaced}
    names = [f"{stage} ({why})" for stage, (cause, why) in causes.items() if cause == stage]
    others = [stage[:2] for stage in replaced if names and causes[stage][0] != stage]
    left = [stage[:2] for stage, (cause, _) in stale.items()
            if cause in replaced and stage not in params]
    also = f", and {', '.join(others)}, which build on it" if others else ""
    also += f"; {', '.join(left)} become stale" if left else ""
    return [*lines, f"this replaces finished stages of run '{run_id}': "
            f"{', '.join(names or replaced)}{also}. What is there is kept, and mig-kit restore "
            f"{run_id} puts it back; for a run beside it: {_branch_command(plan, replaced[0])}"]


def _refuse_stale_inputs(plan: PlannedRun, due: list[str]) -> None:
    """ValueError if a stage would read a stale one that does not run before it."""
    planned = plan.params
    origin = plan.run_id if load_branch(plan.run_id) or not plan.source else plan.source
    stale = {name: cause for name, cause in store.find_stale(origin, planned).items()
             if name not in planned}
    for stage in due:
        inputs = [name for name in store.input_stages(stage, origin, planned[stage])
                  if name not in planned]
        if store.STAGES[stage] and "01_synthesize" not in planned:
            for name in ("01_synthesize", *inputs):
                store.require_record(name, origin, stage)
        for name in inputs:
            _refuse_stale(stage, name, origin, stale)
        if control := planned[stage].get("control_run"):
            causes = store.find_stale(control).items()
            _refuse_stale(stage, "03_merge", control,
                          {name: cause for name, cause in causes if name <= "03_merge"})


def _refuse_stale(stage: str, name: str, run_id: str, stale: dict[str, tuple[str, str]]) -> None:
    """ValueError if `name`, which `stage` would read, is among the stale stages of a run."""
    if name not in stale:
        return
    owner, (cause, why) = store.find_owner(name, run_id), stale[name]
    through = f"through {cause}: " if cause != name else ""
    numbers = " ".join(other[:2] for other in stale if "00_preflight" < other < stage
                       and store.find_owner(other, run_id) == owner)
    raise ValueError(f"{stage} would build on a stale {name} of run '{owner}': {through}{why}; run "
                     f"again what is stale (mig-kit run {numbers} --run-id {owner}, with the "
                     "--profile and every -p of that run), or add --force: what comes of it is "
                     "then marked in run.json, status and tables")


def _find_other_profile(plan: PlannedRun, stages: list[str]) -> str:
    """The profile, other than the plan's, that finished stages fit best; "" for the plan's."""
    left_out = {*EXECUTION_PARAMS, *NAMES_OF_RUNS}
    distances = dict.fromkeys(list_profiles(), 0)
    for stage in stages:
        recorded = store.load_record(stage, plan.run_id)["params"]
        for profile in distances:
            values = profile_params(stage, profile) | {"profile": profile}
            distances[profile] += sum(values[name] != recorded[name]
                                      for name in recorded.keys() & values.keys() - left_out)
    nearest = min(distances, key=distances.get)
    return nearest if distances[nearest] < distances[plan.profile] else ""


def _branch_command(plan: PlannedRun, first: str) -> str:
    """The command that makes what a plan makes, from the stage `first` on, as a branch."""
    is_branch = "02" <= first < "08"
    stages = [stage for stage in plan.params if stage >= first or not is_branch]
    is_whole = plan.params.keys() >= set(store.RECIPE) and not is_branch
    numbers = [] if is_whole else [stage[:2] for stage in stages]
    options = ["-p " + shlex.join(pair) for pair in plan.overrides if any(
        pair[0] in plan.params[stage] or (pair[0] == GROUP and stage in CONFIGS)
        for stage in stages)]
    profile = [] if plan.profile == "tiny" else ["--profile", plan.profile]
    source = ["--from", plan.run_id] if is_branch else []
    return " ".join(["mig-kit run", *numbers, *source, "--run-id NAME", *profile, *options])


def run_stages(params: dict[str, dict], run_id: str, force: bool = False) -> None:
    """Run the stages of `params` in order; force: run all of them from the start.

    Raises RuntimeError if a stage fails; its attempt is kept for resuming.
    """
    remaining, lines = dict(params), StageLines()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[lines], force=True)
    try:
        for stage, values in params.items():
            if not force and store.is_up_to_date(stage, run_id, values):
                lines.set(stage, "up to date")
            else:
                _prepare(stage, run_id, values, force)
                lines.set(stage, "running")
                ThisPython.starts_next = len(remaining) > 1 and stage not in TIMED
                _execute_notebook(stage, run_id, values, lines)
                lines.set(stage, "done", store.require_record(stage, run_id, stage)["summary"])
            del remaining[stage]
            check_run(remaining, run_id)
    finally:
        ThisPython.stop_waiting()


def _prepare(stage: str, run_id: str, params: dict, force: bool) -> None:
    """Raise if an earlier stage is missing or another process writes the run."""
    facts = store.stage_facts(stage, run_id, params)
    run = store.runs_root() / run_id
    store.lock_run(run)
    if force:
        attempts.begin_again(stage, run_id, facts)
    store.unlock_run(run)


def _execute_notebook(stage: str, run_id: str, params: dict, lines: StageLines) -> None:
    """Run a stage's notebook in a kernel of this Python; it goes into the finished folder last."""
    import papermill  # seconds, which wrong words need not wait for
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    folder = store.runs_root() / run_id / stage
    output = folder.with_name(f"{stage}.running.ipynb")
    # papermill formats paths with the parameters
    paths = [str(path).replace("{", "{{").replace("}", "}}")
             for path in (NOTEBOOKS / f"{stage}.ipynb", output)]
    try:
        papermill.execute_notebook(*paths, params, progress_bar=False, log_output=True,
                                   cwd=str(NOTEBOOKS), kernel_manager_class=ThisPython,
                                   start_timeout=600,  # a waiting kernel may still import
                                   extra_arguments=["--log-level=CRITICAL"])
    except (PapermillExecutionError, DeadKernelError) as error:
        lines.set(stage, "failed")
        kept = output.replace(folder.with_name(f"{stage}.failed.ipynb"))
        reason = (f"its kernel {describe_exit(ThisPython.exit_status)}"
                  if isinstance(error, DeadKernelError) else failure_sentence(error, kept))
        raise RuntimeError(f"{stage} failed: {reason} (the notebook is {kept})") from None
    output.replace(folder / f"{stage}.ipynb")


def failure_sentence(error: Exception, notebook: Path) -> str:
    """What went wrong in a cell, as "ValueError: message"; error: PapermillExecutionError."""
    sentence = f"{error.ename}: {error.evalue}"
    if not error.evalue.strip():
        plain = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
        lines = re.findall(r"^-+> *\d+ +(.+)$", plain, re.M)  # the line that failed, of each frame
        sentence = (f"{error.ename} at: {lines[-1]}" if lines else
                    f"cell {error.exec_count} ended without a word; look at it")
    return describe_disk(sentence, notebook.parent) or sentence
