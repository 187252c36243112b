"""Run stages as notebooks, through papermill; a stage that has finished is skipped."""

import json
import logging
import re
import sys
import time

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from mig_kit.common import NOTEBOOKS, UserError
from mig_kit.pipeline import run_folders, store
from mig_kit.pipeline.plan import PlannedRun
from mig_kit.pipeline.runs import PROFILE_FILE, Run, start_branch

QUIET_SECONDS = 15  # after which a bar's quarter is printed
# a full disk, a mount to read only, a quota, in the words of Python and of Rust
NO_SPACE = re.compile(r"(?:\[Errno|os error) (?:28|30|122)\b")


class ThisPython(AsyncKernelManager):
    """Starts ipykernel with this Python, not with a kernel spec of another environment's."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """The only one."""
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
                                "{connection_file}"], display_name="Python 3", language="python",
                          env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})


class StageLines(logging.Handler):
    """Prints warnings of a stage's notebook, steps of its trainings, the first end of a bar, and
    the quarters of one that takes minutes.
    """

    def __init__(self):
        super().__init__()
        self.shown = {"Loading weights"}  # names of bars that are not printed again
        self.next_quarter: dict[str, int] = {}  # of a bar, percent
        self.printed = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """Print what of a message is to be shown."""
        for line in record.getMessage().split("\n"):
            line = line.rsplit("\r", 1)[-1].strip()  # a bar is printed over itself
            label, percent = line.partition(":")[0], re.search(r"(\d+)%\|", line)
            is_bar = percent and label not in self.shown
            if line.startswith(("warning: ", "step ")) or is_bar and self._is_due(
                    label, int(percent[1])):
                print(f"  {line}", flush=True)
                self.printed = time.monotonic()

    def _is_due(self, label: str, percent: int) -> bool:
        """Whether a bar has ended, or has passed a quarter with nothing printed for a while."""
        is_quarter = (percent >= self.next_quarter.get(label, 25)
                      and time.monotonic() - self.printed > QUIET_SECONDS)
        if percent == 100:
            self.shown.add(label)
        elif is_quarter:
            self.next_quarter[label] = percent - percent % 25 + 25
        return percent == 100 or is_quarter


def check_plan(plan: PlannedRun) -> None:
    """UserError if a stage has finished with other parameters, or lacks all that it reads."""
    run = Run(plan.run_id)
    for stage in [stage for stage, values in plan.params.items()
                  if not store.is_done(run, stage, values)]:
        inputs = plan.origin.inputs(stage)
        if not set(inputs) & set(plan.params):
            for name in inputs:
                plan.origin.require(name, stage)


def require_parameters_cell(stage: str) -> None:
    """UserError unless one cell of a stage's notebook is tagged as that of its parameters."""
    path = NOTEBOOKS / f"{stage}.ipynb"
    cells = json.loads(path.read_text())["cells"]
    if sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) != 1:
        raise UserError(f"{path} must have one cell with the tag 'parameters', behind which the "
                        "command's values go; without it the notebook would run with its own ones, "
                        "so give that tag to the cell of its parameters")


def run_plan(plan: PlannedRun, force: bool = False) -> None:
    """Run the stages of a plan in order; force: run all of them from the start.

    Raises UserError, before a kernel starts, as `check_plan`, and if a stage refuses its input; a
    stage that fails otherwise prints its traceback and ends the process.
    """
    for stage in plan.params:
        require_parameters_cell(stage)
    if not force:
        check_plan(plan)
    if plan.source:
        start_branch(plan.source, plan.run_id, *plan.params)
    for stage, values in plan.params.items():
        run = Run(plan.run_id)
        if not force and store.is_done(run, stage, values):
            state = "; ".join(run.describe_marks(stage)) or "up to date"
            print(f"{stage}: {state}", flush=True)
            continue
        _prepare(run, stage, plan, force)
        print(f"{stage}: running", flush=True)
        start = time.monotonic()
        _execute_notebook(stage, plan.run_id, values)
        minutes = (time.monotonic() - start) / 60
        summary = Run(plan.run_id).require(stage, stage)["summary"]
        print(f"{stage}: done in {minutes:.1f} min{'; ' * bool(summary)}{summary}", flush=True)


def _prepare(run: Run, stage: str, plan: PlannedRun, force: bool) -> None:
    """Raise if an input is missing or the run is locked; force: drop what was begun."""
    facts = run.stage_facts(stage, plan.params[stage])
    run_folders.lock_run(run.folder)
    if not run.profile:
        (run.folder / PROFILE_FILE).write_text(f"{plan.profile}\n")
    if force:
        store.begin_again(run.unfinished_folder(stage), facts)
    run_folders.unlock_run(run.folder)


def _execute_notebook(stage: str, run_id: str, params: dict) -> None:
    """Run a stage's notebook in a kernel of this Python; it goes into the finished folder last."""
    import papermill  # seconds, which wrong words need not wait for
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.basicConfig(level=logging.INFO, handlers=[StageLines()], force=True)
    folder = run_folders.runs_root() / run_id / stage
    output = folder.with_name(f"{stage}.running.ipynb")
    try:
        papermill.execute_notebook(NOTEBOOKS / f"{stage}.ipynb", output, params,
                                   progress_bar=False, log_output=True, cwd=str(NOTEBOOKS),
                                   kernel_manager_class=ThisPython,
                                   extra_arguments=["--log-level=CRITICAL"])
    except (PapermillExecutionError, DeadKernelError) as error:
        kept = output.replace(folder.with_name(f"{stage}.failed.ipynb"))
        print(f"{stage}: failed; the notebook is {kept}", flush=True)
        if isinstance(error, PapermillExecutionError) and error.ename == KeyboardInterrupt.__name__:
            raise KeyboardInterrupt from None  # Ctrl-C reaches the kernel, too
        if isinstance(error, DeadKernelError):
            raise UserError(f"the kernel of {stage} died, often because memory ran out; give the "
                            "same command, which goes on where it stopped") from None
        if error.ename == UserError.__name__ or NO_SPACE.search(error.evalue):
            raise UserError(f"{stage}: {error.evalue}") from None
        sys.exit(str(error).rstrip())  # a traceback, with the user's own line last
    output.replace(folder / f"{stage}.ipynb")
