"""Run folders: what counts as finished, what is kept, and who may write."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mig_kit.boxes import BoxFormat
from mig_kit.cli import cli
from mig_kit.common import PROJECT_ROOT, write_json
from mig_kit.pipeline import execute, params, store


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def begin(**values) -> store.Stage:
    """Stage 00 of run "a" under way."""
    stage, _ = store.begin_stage("00_preflight", {"run_id": "a", **values})
    return stage


def leave_record(root, stage, run_id="a", outputs=None, **values):
    """What a finished stage leaves for those after it."""
    write_json(make_folder(root, stage, run_id) / "run.json",
               {"params": params.validate_params(values, stage), "key": "k",
                "outputs": outputs or {"x": "1"}})


def make_folder(root, stage, run_id="a"):
    folder = root / run_id / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_stage_gives_its_parameters_and_those_of_the_run(root, capsys):
    leave_record(root, "01_synthesize", coordinates="normalized_1000", max_pixels=50000)
    stage, p = store.begin_stage("02_sft", {"run_id": "a", "lora_r": 4})
    assert isinstance(p, SimpleNamespace) and vars(p) == stage.params
    assert (p.lora_r, p.base_model, p.coordinates) == (4, "tiny", "normalized_1000")
    assert stage.box_format == BoxFormat(3136, 50000, "normalized_1000")
    assert stage.input_path("01_synthesize", "cot.parquet") == (
        root / "a" / "01_synthesize" / "cot.parquet")
    printed = capsys.readouterr().out
    assert printed.startswith("02_sft of run 'a': ") and "lora_r=4" in printed
    assert "coordinates=normalized_1000" in printed and "versions: python 3." in printed


def test_what_the_injected_cell_assigns_is_checked(root):
    cells = ["", "# parameters\nseed: int = 0", "# Parameters\nsede = 3\n"]
    with pytest.raises(KeyError, match="did you mean 'seed'"):
        store.begin_stage("01_synthesize", {"In": cells, "sede": 3, "seed": 0, "other": 1})


def test_finished_skipped_and_redone(root):
    stage = begin(memory_gib=1.0)
    assert not store.is_up_to_date("00_preflight", "a", stage.params)
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, summary="one", hardware="test")
    assert store.is_up_to_date("00_preflight", "a", stage.params)
    assert not store.is_up_to_date("00_preflight", "a", {**stage.params, "memory_gib": 2.0})
    record = store.load_record("00_preflight", "a")
    assert (record["hardware"], record["summary"]) == ("test", "one")
    assert "out.txt" in record["outputs"] and record["versions"]["torch"]


def test_a_killed_stage_looks_unfinished_and_keeps_what_can_be_resumed(root):
    (begin().folder / "replies.jsonl").write_text("half")
    assert store.load_record("00_preflight", "a") is None
    assert (begin().folder / "replies.jsonl").is_file()
    assert not (begin(disk_gib=0.5).folder / "replies.jsonl").exists()


def test_what_was_finished_is_kept_until_another_has_finished(root):
    """Another parameter that fails, or a change of mind, costs nothing."""
    stage, before = begin(memory_gib=1.0), root / "a" / "00_preflight.before"
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    other = begin(memory_gib=2.0)
    assert not (other.folder / "out.txt").exists() and (before / "out.txt").read_text() == "x"
    store.unlock_run(root / "a")
    assert not store.restore_outputs("00_preflight", "a", other.params)
    assert store.restore_outputs("00_preflight", "a", stage.params)
    assert store.is_up_to_date("00_preflight", "a", stage.params)
    assert (stage.folder / "out.txt").read_text() == "x" and not before.exists()
    begin(memory_gib=2.0).finish({"n": 2}, hardware="test")
    assert not before.exists() and not store.restore_outputs("00_preflight", "a", stage.params)


def test_what_force_began_anew_goes_on_and_is_not_given_up_for_the_old_result(root):
    stage = begin()
    (stage.folder / "out.txt").write_text("old")
    stage.finish({"n": 1})
    assert execute._prepare_folder("00_preflight", "a", stage.params, force=True)
    (begin().folder / "half.txt").write_text("new")
    store.unlock_run(root / "a")  # killed
    assert execute._prepare_folder("00_preflight", "a", stage.params, force=False)
    assert (begin().folder / "half.txt").is_file() and not (stage.folder / "out.txt").exists()


def test_minutes_are_those_of_all_attempts(root):
    """One of 100 seconds was interrupted; a repetition that finds all done does not count."""
    folder = begin().folder
    os.utime(folder / "started.json", (1000, 1000))
    (folder / "half.txt").write_text("x")
    os.utime(folder / "half.txt", (1100, 1100))
    begin().finish({"n": 1})
    assert 100 <= store.load_record("00_preflight", "a")["seconds"] < 110
    begin().finish({"n": 1})
    assert 100 <= store.load_record("00_preflight", "a")["seconds"] < 110
    begin(memory_gib=2.0).finish({"n": 1})
    assert store.load_record("00_preflight", "a")["seconds"] < 10


def test_a_comparison_is_stale_where_one_of_its_runs_is_another(root):
    values = params.profile_params("09_compare") | {"groups": ["x=a, b", f"y={root / 'c.json'}"]}
    keys = [store.stage_key("09_compare", "default", values)]
    for change in (lambda: leave_record(root, "06_evaluate", "a"),
                   lambda: leave_record(root, "06_evaluate", "b", {"x": "2"}),
                   lambda: (root / "c.json").write_text("{}")):
        change()
        keys.append(store.stage_key("09_compare", "default", values))
    assert len(set(keys)) == 4


def test_with_the_sft_adapter_05_builds_on_02(root):
    for stage in store.RECIPE[1:5]:
        leave_record(root, stage)
    merged = params.profile_params("05_grpo")
    adapter = merged | {"start_from": "adapter"}
    before = [store.stage_key("05_grpo", "a", values) for values in (merged, adapter)]
    leave_record(root, "02_sft", outputs={"x": "2"})
    after = [store.stage_key("05_grpo", "a", values) for values in (merged, adapter)]
    assert before[0] == after[0] and before[1] != after[1]


def test_outputs_that_are_gone_are_made_again(root):
    stage = begin()
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    (stage.folder / "out.txt").unlink()
    assert not store.is_up_to_date("00_preflight", "a", stage.params)


def test_another_parameter_of_the_run_is_another_stage(root):
    keys = set()
    values = params.profile_params("02_sft")
    for changes in ({}, {"max_pixels": 50000}, {"coordinates": "normalized_1000"}):
        leave_record(root, "01_synthesize", **changes)
        keys.add(store.stage_key("02_sft", "a", values))
    assert len(keys) == 3


def test_how_a_stage_runs_is_recorded_and_makes_nothing_stale(root):
    leave_record(root, "01_synthesize")
    values = params.profile_params("02_sft")
    launched = {**values, "launcher": "torchrun --nproc-per-node 2", "report_to": "trackio"}
    key = store.stage_key("02_sft", "a", values)
    assert store.stage_key("02_sft", "a", launched) == key
    assert store.stage_key("02_sft", "a", {**values, "lora_r": 1}) != key
    stage, _ = store.begin_stage("02_sft", {"run_id": "a", "launcher": launched["launcher"]})
    (stage.folder / "job.json").write_text("{}")
    stage.finish({})
    record = store.load_record("02_sft", "a")
    assert record["params"]["launcher"] == launched["launcher"]
    assert "job.json" not in record["outputs"] and "metrics.json" in record["outputs"]
    names = {name for stage in store.STAGES for name in params.stage_parameters(stage)}
    assert set(params.EXECUTION_PARAMS) <= names


def test_another_model_or_control_run_is_another_stage(root):
    model = root / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"one")
    for run_id in ("a", "b"):
        leave_record(root, "01_synthesize", run_id, base_model=str(model))
        leave_record(root, "03_merge", run_id)
    leave_record(root, "05_grpo")
    values = params.validate_params({"control_run": "b"}, "06_evaluate")
    keys = [store.stage_key("06_evaluate", "a", values)]
    (model / "model.safetensors").write_bytes(b"two")
    keys.append(store.stage_key("06_evaluate", "a", values))
    leave_record(root, "03_merge", "b", {"x": "2"})
    keys.append(store.stage_key("06_evaluate", "a", values))
    assert len(set(keys)) == 3
    (root / "b" / "03_merge" / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="06_evaluate needs 03_merge of run 'b'"):
        store.stage_key("06_evaluate", "a", values)


@pytest.mark.parametrize(("name", "value"), [
    ("base_model", "Qwen/Qwen2.5-VL-3B-Instruct"), ("coordinates", "normalized_1000"),
    ("max_pixels", 50000)])
def test_a_control_run_of_another_model_or_box_format_is_refused(root, name, value):
    for run_id, changes in (("a", {}), ("b", {name: value})):
        leave_record(root, "01_synthesize", run_id, **changes)
        leave_record(root, "03_merge", run_id)
    leave_record(root, "05_grpo")
    values = params.validate_params({"control_run": "b"}, "06_evaluate")
    with pytest.raises(ValueError, match=f"control_run 'b' has another {name} .* than run 'a'"):
        store.stage_key("06_evaluate", "a", values)


def test_a_model_folder_is_told_from_others_by_its_files():
    assert store.model_fingerprint("Qwen/Qwen2.5-VL-7B-Instruct") == {}
    assert "model.safetensors" in store.model_fingerprint("tiny")


def test_a_stage_whose_input_was_run_again_is_stale(root):
    for stage, record in (
            ("03_merge", {"outputs": {"m": "1", "metrics.json": "a"}}),
            ("04_rejection_sampling", {"outputs": {"k": "1"}}),
            ("05_grpo", {"inputs": {"03_merge": {"m": "1", "metrics.json": "b"},
                                    "04_rejection_sampling": {"k": "0"}}})):
        write_json(make_folder(root, stage) / "run.json", record)
    assert store.find_stale_input("05_grpo", "a") == "04_rejection_sampling"
    assert store.find_stale_input("04_rejection_sampling", "a") == ""


def test_a_slow_git_counts_as_none(monkeypatch):
    def time_out(*arguments, **options):
        raise subprocess.TimeoutExpired("git", 20)

    monkeypatch.setattr(subprocess, "run", time_out)
    assert store.git_revision() == ""


def test_a_relative_folder_of_runs_is_the_projects(monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", "elsewhere")
    assert store.runs_root() == PROJECT_ROOT / "elsewhere"


def test_a_missing_stage_names_the_command(root):
    with pytest.raises(FileNotFoundError, match="mig-kit run 01 --run-id a, with the .* every -p"):
        store.begin_stage("02_sft", {"run_id": "a"})
    leave_record(root, "01_synthesize")
    with pytest.raises(FileNotFoundError, match="mig-kit run 02 --run-id a"):
        store.begin_stage("03_merge", {"run_id": "a"})
    with pytest.raises(ValueError, match="run_id"):
        store.begin_stage("00_preflight", {"run_id": "../a"})


def test_a_broken_record_names_the_remedy(root):
    (make_folder(root, "05_grpo") / "run.json").write_text('{"seconds": 9')
    with pytest.raises(ValueError, match="run.json is broken; delete it"):
        store.load_record("05_grpo", "a")


BEGIN_IN_ANOTHER_PROCESS = """
import sys, time
from mig_kit.pipeline import store
stage, _ = store.begin_stage("00_preflight", {"run_id": "a"})
print("begun", flush=True)
if sys.argv[1] == "finish":
    stage.finish({})
else:
    time.sleep(60)
"""


def test_two_writers_of_one_run(root):
    """A second process is refused while the first is in a stage, and let in when it has finished or
    was killed.
    """
    command = [sys.executable, "-c", BEGIN_IN_ANOTHER_PROCESS]
    environment = {**os.environ, "MIG_KIT_RUNS": str(root)}
    first = subprocess.Popen([*command, "stay"], env=environment, stdout=subprocess.PIPE, text=True)
    assert "begun\n" in iter(first.stdout.readline, "")
    with pytest.raises(RuntimeError, match=f"'a' is being written by process {first.pid}; wait"):
        store.lock_run(root / "a", 0.2)
    store.begin_stage("00_preflight", {"run_id": "b"})  # another run is free
    refusal = CliRunner().invoke(cli, ["run", "00", "--run-id", "a"]).exception
    assert isinstance(refusal, RuntimeError) and "another --run-id" in str(refusal)
    first.kill()
    first.wait()
    second = subprocess.run([*command, "finish"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    store.lock_run(root / "a", 0.0)
    store.unlock_run(root / "a")


def test_a_clock_that_jumps_back_gives_no_negative_time(root, monkeypatch):
    stage = begin()
    monkeypatch.setattr(store.time, "time", lambda: 0.0)
    stage.finish({"n": 1})
    assert 0 <= store.load_record("00_preflight", "a")["seconds"] < 60
    assert store.is_up_to_date("00_preflight", "a", stage.params)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder of runs on a tmpfs of one MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    monkeypatch.setenv("MIG_KIT_RUNS", str(folder))
    yield folder
    store.unlock_run(folder / "a")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file_and_no_finished_stage(small_disk):
    stage = begin()
    write_json(small_disk / "old.json", {"kept": True})
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 40_000))
    with pytest.raises(OSError, match="No space left"):
        write_json(small_disk / "old.json", {"data": "y" * 100_000})
    assert json.loads((small_disk / "old.json").read_text()) == {"kept": True}
    with pytest.raises(OSError, match="No space left"):
        stage.finish({"data": "y" * 100_000})
    assert store.load_record("00_preflight", "a") is None
    (small_disk / "filler").unlink()
    begin().finish({"n": 1})
    assert store.load_record("00_preflight", "a")
