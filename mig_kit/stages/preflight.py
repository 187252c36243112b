"""Stage 00: what this machine has and what the profile will need, before anything is computed."""

import json
import os
import shutil
import time
from statistics import median
from types import SimpleNamespace

import psutil
import torch

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.common import PROJECT_ROOT
from mig_kit.data import own_data
from mig_kit.engine.models import TINY_BASE, Hardware, load_model
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import RECIPE, load_branch, load_record, runs_root
from mig_kit.stages.sources import count_questions, source_paths
from mig_kit.world.free_form import BOX_FORMS, FIND_ALL, FREE_FORM
from mig_kit.world.suites import SUITES
from mig_kit.world.tasks import TASKS, make_sample

# Minutes of each stage of `make run` on two cores of an AMD EPYC (Zen 4, no AMX), and GiB of memory
# that it stayed within.
TINY_COST = {
    "01_synthesize": (0.4, 4.0), "02_sft": (10.6, 4.0), "03_merge": (0.3, 4.0),
    "04_rejection_sampling": (2.1, 4.0), "05_grpo": (7.3, 6.0), "06_evaluate": (2.9, 6.0),
    "07_report": (0.3, 4.0)}
REFERENCE_SECONDS = 0.435  # what `time_reference_step` gave in that run
FIXED_MINUTES = 0.2  # of a stage: its kernel, imports and pictures
TEXT_TOKENS = 120  # of a prompt's text and its reply, with the tiny base's tokenizer
OWN_QUESTIONS = 1000  # of own data whose file is named on the command line
BUSY_PERCENT = 20  # of the cores; where others take more, a timed step says little


def describe_machine() -> dict:
    """Cores, memory and free disk (GiB), and the GPU if there is one."""
    memory = psutil.virtual_memory()
    existing = next(path for path in (runs_root(), *runs_root().parents) if path.exists())
    return {
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}


def time_reference_step(hardware: Hardware, rounds: int = 7) -> float:
    """Seconds of a fixed training step, the median of `rounds`: what else runs now slows it, too.

    The step is the shipped base on 16 rows of 200 tokens, forward and backward.
    """
    model = load_model(TINY_BASE, hardware)
    ids = torch.arange(16 * 200, device=hardware.device).view(16, 200)
    ids = ids % 500 + 100  # no special tokens
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.autocast(hardware.device, torch.bfloat16, enabled=hardware.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def measure_others(seconds: float = 1.0) -> float:
    """Percent of this machine's cores that other programs take, while this one waits."""
    return psutil.cpu_percent(seconds)


def read_plan(plan_file: str, run_id: str, profile: str) -> tuple[list[str], dict[str, dict]]:
    """The stages that will run after this one, and the parameters of all, by stage.

    plan_file: what `mig-kit run` writes of its stages; where there is none they are the run's own,
    with the profile's parameters. Those of a branch's source have what was recorded of them.
    """
    branch = load_branch(run_id).get("stages", ())
    params = {stage: (load_record(stage, run_id) or {}).get("params", {}) for stage in branch}
    if plan_file:
        plan = json.loads((PROJECT_ROOT / plan_file).read_text())
    else:
        plan = {stage: profile_params(stage, profile) for stage in RECIPE if stage not in branch}
    return [stage for stage in plan if stage in TINY_COST], params | plan


def relative_work(profile: str, params: dict[str, dict]) -> dict[str, float]:
    """Stage -> its work with these parameters, by stage, in shares of what the tiny profile has."""
    now, tiny = (_count_work({
        stage: SimpleNamespace(**profile_params(stage, name) | changes.get(stage, {}))
        for stage in TINY_COST}) for name, changes in ((profile, params), ("tiny", {})))
    return {stage: now[stage] / tiny[stage] for stage in tiny}


def _count_work(params: dict[str, SimpleNamespace]) -> dict[str, float]:
    """Stage -> samples that it makes, or tokens of the prompts and replies that it works through.

    Each reply counts as one prompt of mean length.
    """
    synthesize, sft, sampling, grpo, evaluate = (params[stage] for stage in (
        "01_synthesize", "02_sft", "04_rejection_sampling", "05_grpo", "06_evaluate"))
    has_teacher, tokens = synthesize.teacher != "none", _prompt_tokens(synthesize)
    if synthesize.data == "scenes":
        traces = (len(TASKS) * synthesize.cot_per_task
                  + len(FREE_FORM) * synthesize.free_form_per_task
                  + len(FIND_ALL) * synthesize.train_find_all_per_task)
        candidates = (len(TASKS) * synthesize.rl_per_task
                      + len(BOX_FORMS) * synthesize.rl_boxes_per_task
                      + (len(FREE_FORM) - len(BOX_FORMS)) * synthesize.rl_free_form_per_task
                      + len(FIND_ALL) * synthesize.train_find_all_per_task)
        held_out = 0
    else:
        questions = count_questions(synthesize) if synthesize.data else OWN_QUESTIONS
        traces, candidates, held_out = (
            round(questions * share) for share in synthesize.data_shares)
        candidates += traces * (not has_teacher)
    traces *= has_teacher
    replies = sum(len(suite.tasks) * _count_replies(evaluate, vars(evaluate)[suite.size_param])
                  for suite in SUITES.values()) + _count_replies(evaluate, held_out)
    updated = grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps
    return {
        "01_synthesize": traces or candidates,
        "02_sft": tokens * min(traces, sft.max_samples or traces) * sft.num_train_epochs,
        "04_rejection_sampling": tokens * candidates * sampling.replies,
        "05_grpo": tokens * grpo.max_steps * max(updated, grpo.num_generations),
        "06_evaluate": tokens * replies * (2 + has_teacher)}  # base, SFT and GRPO model


def _count_replies(evaluate: SimpleNamespace, samples: int) -> int:
    """Replies of a system in 06 to so many samples of a task, greedy and drawn."""
    return samples + evaluate.replies * min(samples, evaluate.sampled_per_task or samples)


def _prompt_tokens(synthesize: SimpleNamespace) -> float:
    """Tokens of a prompt, the mean of a few; scenes where the data are not there to be read."""
    samples = [make_sample(task, "val", 0) for task in TASKS]
    if synthesize.data not in ("", "scenes") and source_paths(synthesize)[0].is_file():
        samples = list(own_data.iter_samples(*source_paths(synthesize), limit=20)) or samples
    box_format = BoxFormat(synthesize.min_pixels, synthesize.max_pixels)
    pixels = [width * height for sample in samples
              for width, height in (seen_size(size, box_format) for size in sample.sizes)]
    return TEXT_TOKENS + sum(pixels) / 28**2 / len(samples)


def predict_minutes(seconds: float, stages: list[str], work: dict[str, float]) -> list[dict]:
    """Rows {stage, minutes, memory_gib}: the measured cost, scaled to this machine and this work.

    seconds: of `time_reference_step`. stages: those that will run. work: in shares of the tiny
    profile's, 1 where there is none; of each stage's time FIXED_MINUTES do not depend on it.
    """
    scale = seconds / REFERENCE_SECONDS
    rows = []
    for stage in stages:
        minutes, gib = TINY_COST[stage]
        minutes = FIXED_MINUTES + work.get(stage, 1.0) * (minutes - FIXED_MINUTES)
        rows.append({"stage": stage, "minutes": round(scale * minutes, 1), "memory_gib": gib})
    return rows


def require_resources(machine: dict, memory_gib: float, disk_gib: float,
                      needs_gpu: bool = False) -> None:
    """RuntimeError, MemoryError or OSError with one sentence when the machine lacks what the
    profile needs.

    machine: of `describe_machine`.
    """
    if needs_gpu and machine["gpu"] == "none":
        raise RuntimeError(
            f"this profile needs a GPU, and PyTorch {torch.__version__} sees none; check the "
            "driver with nvidia-smi, or set device to cpu")
    if machine["available_gib"] < memory_gib:
        raise MemoryError(
            f"this profile needs {memory_gib:g} GiB of memory and {machine['available_gib']:g} GiB "
            "are free; close other programs or use the smoke profile")
    if machine["disk_free_gib"] < disk_gib:
        raise OSError(
            f"this profile writes up to {disk_gib:g} GiB and {machine['disk_free_gib']:g} GiB are "
            "free; free some disk or set MIG_KIT_RUNS to a larger one")


def summary(profile: str, minutes: float, memory: list[dict], others: float = 0.0) -> str:
    """What the run will take, in a few words.

    minutes: of its stages on this machine. memory: rows of `gpu_needs.predict`, [] where the
    profile needs no GPU. others: of `measure_others`.
    """
    if memory:
        most = max(memory, key=lambda row: row["GiB"])
        return f"profile {profile}: predicted {most['GiB']:g} GiB of a GPU ({most['stage']})"
    busy = (f"; this machine is too busy to be timed: other programs take {others:.0f} % of its "
            "cores" if others > BUSY_PERCENT else "")
    return f"about {minutes:.0f} minutes in all{busy}"
