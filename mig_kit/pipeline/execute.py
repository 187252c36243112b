"""Run stages as notebooks, through papermill: what is up to date is skipped."""

import logging
import sys

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline import attempts, store
from mig_kit.pipeline.failures import describe_exit, failure_sentence
from mig_kit.pipeline.joint_rules import check_run
from mig_kit.pipeline.plan import PlannedRun
from mig_kit.pipeline.run_folders import start_branch
from mig_kit.pipeline.stage_lines import StageLines


class ThisPython(AsyncKernelManager):
    """Starts ipykernel with the Python that runs this process, whatever kernel specs lie on
    Jupyter's path: a spec called python3 may be of another environment, with another copy of the
    kit. Figures are drawn as notebooks show them, whatever backend the environment names.

    exit_status: of the last kernel that ended by itself, None while none has.
    """

    exit_status: int | None = None

    @property
    def kernel_spec(self) -> KernelSpec:
        """The only one."""
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f",
                                "{connection_file}"], display_name="Python 3", language="python",
                          env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})

    async def _async_is_alive(self) -> bool:
        if self.has_kernel and (status := await self.provisioner.poll()) is not None:
            ThisPython.exit_status = status
        return await super()._async_is_alive()

    is_alive = _async_is_alive


def run_plans(plans: list[PlannedRun], force: bool = False) -> None:
    """Run one plan after the other; with several, say after each how long the others will take."""
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


def run_stages(params: dict[str, dict], run_id: str, force: bool = False) -> None:
    """Run the stages of `params` in order, each with its parameters.

    A stage that is up to date is skipped unless `force` is set, with which it starts from nothing.
    RuntimeError with the notebook's error where a stage fails: what had finished before is as it
    was, and what the attempt left is kept for resuming.
    """
    remaining, lines = dict(params), StageLines()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[lines], force=True)
    for stage, values in params.items():
        if not force and store.is_up_to_date(stage, run_id, values):
            lines.set(stage, "up to date")
        else:
            _prepare(stage, run_id, values, force)
            lines.set(stage, "running")
            _execute_notebook(stage, run_id, values, lines)
            lines.set(stage, "done", store.require_record(stage, run_id, stage)["summary"])
        del remaining[stage]
        check_run(remaining, run_id)


def _prepare(stage: str, run_id: str, params: dict, force: bool) -> None:
    """Raise, before a kernel starts, where an earlier stage is missing or another process writes
    the run; with `force` the next attempt starts from nothing.
    """
    facts = store.stage_facts(stage, run_id, params)
    run = store.runs_root() / run_id
    store.lock_run(run)
    if force:
        attempts.begin_anew(stage, run_id, facts)
    store.unlock_run(run)


def _execute_notebook(stage: str, run_id: str, params: dict, lines: StageLines) -> None:
    """Run a stage's notebook in a kernel of this Python, whatever kernels Jupyter knows.

    It is written beside the stage's folder, and into it once that has finished.
    """
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
                                   extra_arguments=["--log-level=ERROR"])
    except (PapermillExecutionError, DeadKernelError) as error:
        lines.set(stage, "failed")
        kept = output.replace(folder.with_name(f"{stage}.failed.ipynb"))
        reason = (f"its kernel {describe_exit(ThisPython.exit_status)}"
                  if isinstance(error, DeadKernelError) else failure_sentence(error, kept))
        raise RuntimeError(f"{stage} failed: {reason} (the notebook is {kept})") from None
    output.replace(folder / f"{stage}.ipynb")
