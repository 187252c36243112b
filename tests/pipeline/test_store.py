"""Run folders: what counts as finished, what is kept, and who may write."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import filelock
import pytest
from command_line import describe_files, error_of, output_of, run_mig_kit

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_json
from mig_kit.pipeline import attempts, execute, params, stage_keys, store
from mig_kit.pipeline.joint_rules import validate_params
from mig_kit.pipeline.run_folders import RECIPE


def begin(**values) -> store.Stage:
    stage, _ = store.begin_stage("00_preflight", {"run_id": "a", **values})
    return stage


def is_current(stage: store.Stage) -> bool:
    return store.is_up_to_date(stage.name, "a", stage.params)


def load_record(stage: str = "00_preflight"):
    return store.load_record(stage, "a")


def test_a_stage_gives_its_parameters_and_those_of_the_run(root, leave, capsys):
    leave("01_synthesize", coordinates="normalized_1000", max_pixels=50000)
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


def let_it_have_cost(folder, seconds):
    os.utime(folder / "started.json", (1000, 1000))
    os.utime(folder / "half.txt", (1000 + seconds, 1000 + seconds))


def test_a_stopped_attempt_with_another_key_stays_and_the_sentence_says_how_to_go_on(root, capsys):
    first = begin(memory_gib=1.0).folder
    (first / "half.txt").write_text("an hour's work")
    let_it_have_cost(first, 3600)
    store.unlock_run(root / "a")
    other = begin(memory_gib=2.0)
    line, = (line for line in capsys.readouterr().out.splitlines() if "stays in" in line)
    assert line == (f"warning: an attempt that was stopped after 60 min stays in {first}: "
                           "what differs is the parameter memory_gib (1.0 -> 2.0); to go on "
                           "with it change that back, or delete it if it is of no use")
    assert (first / "half.txt").is_file() and other.folder != first
    begin(memory_gib=3.0)
    assert not other.folder.exists(), "it cost seconds alone"


@pytest.mark.parametrize(("kind", "values", "words"), [
    ("cell", ["x = 1", "plot(smooth=9)"], "the cell 'plot(smooth=9)'"),
    ("cell", ["x = 1"], "a cell that is gone"),
    ("definition", {"mig_kit.a.f": "2"}, "the definition f of mig_kit.a"),
    ("definition", {}, "the definition f of mig_kit.a"),
    ("definition", {"mig_kit.b.f": "1"}, "the code"),  # only moved; the rest is not known
    ("parameter", {"seed": 2}, "the parameter seed (1 -> 2)"),
    ("input", {"03_merge": "2"}, "the input 03_merge")])
def test_what_differs_has_a_name(kind, values, words):
    old = {"cell": ["x = 1", "plot(smooth=10)"], "definition": {"mig_kit.a.f": "1"},
           "input": {"03_merge": "1"}, "parameter": {"seed": 1}, "file": {}, "code": "1"}
    assert attempts.describe_differences(old, old) == ""
    now = {**old, kind: values, "code": "2" if kind in ("cell", "definition") else "1"}
    assert attempts.describe_differences(old, now) == words


def test_status_and_run_mean_the_same_by_stale_and_say_why(root, monkeypatch):
    begin(memory_gib=1.0).finish({})
    values = store.recorded_params("00_preflight", load_record())
    code = stage_keys.describe_code("00_preflight", ())
    name = "mig_kit.stages.preflight.describe_machine"
    assert name in code["definition"]
    words = ("status", "a", "--why")
    assert "stale" not in output_of(*words)
    changed = {**code, "code": "2", "definition": {**code["definition"], name: "2"}}
    monkeypatch.setattr(stage_keys, "describe_code", lambda *_: changed)
    assert output_of(*words).splitlines()[1:3] == [
        "  00_preflight            stale, made in 0.0 min", "    it is stale: the definition "
        "describe_machine of mig_kit.stages.preflight has changed"]
    assert not store.is_up_to_date("00_preflight", "a", values)
    begin(memory_gib=1.0).finish({})
    assert "stale" not in output_of(*words)
    assert store.describe_staleness("00_preflight", "a", {**values, "memory_gib": 2.0}) == (
        "the parameter memory_gib (1.0 -> 2.0) has changed")


def test_what_was_finished_is_valid_until_another_has_finished_and_kept_after_that(root, capsys):
    """Another parameter that fails, or a change of mind, costs nothing."""
    stage, before = begin(memory_gib=1.0), root / "a" / "00_preflight.before"
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, summary="one", hardware="test")
    record = load_record()
    assert (record["hardware"], record["summary"]) == ("test", "one")
    assert "out.txt" in record["outputs"] and record["versions"]["torch"]
    files = describe_files(stage.final_folder)
    other = begin(memory_gib=2.0)
    assert is_current(stage) and not is_current(other)
    assert "Finishing this replaces 00_preflight of run 'a' (one; started 20" in (
        capsys.readouterr().out)
    assert not (other.folder / "out.txt").exists()
    assert describe_files(root / "a" / "00_preflight") == files
    other.finish({"n": 2})
    assert is_current(other)
    assert (before / "out.txt").read_text() == "x"
    again = begin(memory_gib=1.0)
    assert (again.folder / "out.txt").read_text() == "x", "its cells find all of it done"
    again.finish({"n": 1})
    assert is_current(stage)
    assert store.read_metrics(before) == {"n": 2}


def test_cells_run_again_change_nothing_that_has_finished(root, capsys):
    stage = begin()
    (stage.folder / "model.safetensors").write_text("x")
    (stage.folder / "table.txt").write_text("x")
    stage.finish({"seconds": 1}, summary="one")
    with pytest.raises(RuntimeError, match="has finished; run the setup cell again"):
        stage.folder.mkdir()  # a cell that is run again
    files = describe_files(stage.final_folder)
    again = begin()
    assert "it has finished (one; started " in capsys.readouterr().out
    assert (again.folder / "model.safetensors").read_text() == "x", "what takes long is there"
    (again.folder / "table.txt").write_text("half of it")
    assert describe_files(root / "a" / "00_preflight") == files
    assert is_current(stage)
    again = begin()  # the kernel was restarted
    (again.folder / "table.txt").write_text("x")
    again.finish({"seconds": 2})
    assert capsys.readouterr().out.endswith("00_preflight of run 'a' is as it was\n")
    again = begin()
    (again.folder / "table.txt").write_text("rounded otherwise, as on another machine")
    again.finish({"seconds": 2})
    assert describe_files(root / "a" / "00_preflight") == files
    assert not attempts.list_attempts("00_preflight", "a")


def test_what_force_began_goes_on_after_a_kill_instead_of_the_old_result(root):
    stage = begin()
    (stage.folder / "out.txt").write_text("old")
    stage.finish({"n": 1})
    execute._prepare("00_preflight", "a", stage.params, force=True)
    begun = begin()
    finished = stage.final_folder
    assert not (begun.folder / "out.txt").exists() and (finished / "out.txt").is_file()
    (begun.folder / "half.txt").write_text("new")
    store.unlock_run(root / "a")  # killed
    begun = begin()
    assert (begun.folder / "half.txt").is_file()
    begun.finish({"n": 2})
    assert (finished / "half.txt").is_file() and not (finished / "out.txt").exists()


def test_a_kill_between_the_two_renames_loses_nothing(root):
    begin(memory_gib=1.0).finish({"n": 1})
    stage = begin(memory_gib=2.0)
    attempt = stage.folder
    stage.finish({"n": 2})
    stage.final_folder.rename(attempt)
    assert load_record()["params"]["memory_gib"] == 2.0
    assert is_current(stage)


def test_a_kill_while_what_has_finished_is_copied_loses_nothing(root):
    stage = begin()
    (stage.folder / "model.safetensors").write_text("x")
    stage.finish({})
    again = begin()
    (again.folder / "started.json").unlink()
    store.unlock_run(root / "a")
    assert (begin().folder / "model.safetensors").read_text() == "x"


def test_minutes_are_those_of_all_attempts(root):
    """One of 100 seconds was interrupted; a repetition that finds all done does not count."""
    folder = begin().folder
    (folder / "half.txt").write_text("x")
    let_it_have_cost(folder, 100)
    begin().finish({"n": 1})
    assert 100 <= load_record()["seconds"] < 110
    begin().finish({"n": 1})
    assert 100 <= load_record()["seconds"] < 110
    begin(memory_gib=2.0).finish({"n": 1})
    assert load_record()["seconds"] < 10


def test_a_new_run_of_a_notebook_becomes_a_branch(root, leave, capsys):
    for stage in RECIPE[1:5]:
        leave(stage, "default")
    stage, _ = store.begin_stage("05_grpo", {"run_id": "lab2", "beta": 0.01})
    words = "run 'lab2' is new: 01_synthesize to 04_rejection_sampling are those of run 'default'"
    assert words in capsys.readouterr().out
    assert stage.input_path("03_merge") == root / "default" / "03_merge"
    sentence = "run 'default' has no finished 05_grpo to start from; run: mig-kit run 05 --run-id"
    with pytest.raises(FileNotFoundError, match=sentence):
        store.begin_stage("06_evaluate", {"run_id": "lab3"})
    assert not (root / "lab3").exists()


def test_a_flipped_byte_in_what_a_stage_reads_is_one_sentence(root, leave):
    """With a new time, with its old time when a stage starts, and in status --verify."""
    leave("01_synthesize")
    stage, _ = store.begin_stage("02_sft", {"run_id": "a"})
    (stage.folder / "adapter.safetensors").write_bytes(b"weights")
    stage.finish({})
    assert is_current(stage)
    verify = ("status", "a", "--verify")
    assert "every file is what its stage wrote" in output_of(*verify)
    path = stage.final_folder / "adapter.safetensors"
    time = path.stat().st_mtime_ns
    path.write_bytes(b"weightz")
    sentence = (f"{path} is not what 02_sft of run 'a' wrote: damaged or changed since; make it "
                "again: mig-kit run 02 --run-id a --force, with the --profile and every -p")
    values = params.profile_params("03_merge")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        store.require_intact_inputs("03_merge", "a", values)
    assert not is_current(stage)
    os.utime(path, ns=(time, time))
    store.require_intact_inputs("03_merge", "a", values)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        store.begin_stage("03_merge", {"run_id": "a"})
    result = run_mig_kit(*verify)
    assert result.returncode == 1
    assert f"{path} is not what 02_sft wrote; make it again: mig-kit run 02" in result.stdout


def test_verify_hashes_stored_images_too(root):
    stage = begin()
    image = stage.folder / "images" / f"{hashlib.sha256(b'pixels').hexdigest()}.png"
    image.parent.mkdir()
    image.write_bytes(b"pixels")
    (stage.folder / "images.txt").write_text(f"{image.name}\n")
    stage.finish({})
    folder, record = stage.final_folder, load_record()
    assert attempts.find_damaged(folder, record, hashes_images=True) is None
    (folder / "images" / image.name).write_bytes(b"pixelz")
    assert attempts.find_damaged(folder, record, is_thorough=True) is None
    assert attempts.find_damaged(folder, record, hashes_images=True).name == image.name


def test_a_notebook_of_another_copy_of_the_kit_is_refused(root, tmp_path, monkeypatch):
    (tmp_path / "clone" / "mig_kit" / "pipeline").mkdir(parents=True)
    (tmp_path / "clone" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "clone" / "notebooks")
    with pytest.raises(RuntimeError, match="this notebook is of the kit in .*clone, and its kernel "
                                           ".* imports the one in .*choose the kernel"):
        begin()
    assert not (root / "a").exists()


def test_status_says_what_is_under_way(root):
    stage = begin()
    lines = output_of("status", "a").splitlines()
    assert f"  00_preflight            running (process {os.getpid()})" in lines
    (root / "a" / "05_grpo.new-12345678").mkdir()
    lines = output_of("status", "a").splitlines()
    assert "  05_grpo                 not finished" in lines, "another stage is written"
    stage.finish({})
    begin(memory_gib=2.0)
    assert f"done in 0.0 min, open in process {os.getpid()}" in output_of("status", "a")
    store.unlock_run(root / "a")
    assert output_of("status", "a").splitlines()[1].endswith("0.0 min")


def test_a_disk_without_locks_is_one_line(root, monkeypatch, capsys):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", refuse)
    begin().finish({})
    assert "has no file locks (No locks available): see to it yourself" in capsys.readouterr().out
    assert load_record()


def key_of(stage, **values):
    return store.stage_facts(stage, "a", validate_params(values, stage))["key"]


def count_keys(changes, stage, **values):
    keys = set()
    for change in changes:
        change()
        keys.add(key_of(stage, **values))
    return len(keys)


def test_a_comparison_is_stale_where_one_of_its_runs_is_another(root, leave):
    groups = ["x=a, b", f"y={root / 'c.json'}"]
    changes = (lambda: None, lambda: leave("06_evaluate"), lambda: leave("06_evaluate", "b"),
               lambda: (root / "c.json").write_text("{}"))
    assert count_keys(changes, "09_compare", groups=groups) == 4


def test_parameters_of_the_run_and_what_05_starts_from_make_another_key(root, leave):
    for stage in RECIPE[1:5]:
        leave(stage)
    before = {name: key_of("05_grpo", start_from=name) for name in ("merged", "adapter")}
    leave("02_sft", product="2")
    leave("03_merge")  # the same product, other metrics
    changed = [name for name, key in before.items() if key_of("05_grpo", start_from=name) != key]
    assert changed == ["adapter"], "it alone builds on 02"
    changes = [lambda of_run=of_run: leave("01_synthesize", **of_run) for of_run in (
        {}, {"max_pixels": 50000}, {"coordinates": "normalized_1000"})]
    assert count_keys(changes, "02_sft") == 3


def test_how_a_stage_runs_is_recorded_and_makes_nothing_stale(root, leave):
    leave("01_synthesize")
    launcher, key = "torchrun --nproc-per-node 2", key_of("02_sft")
    assert key_of("02_sft", launcher=launcher, device="cpu") == key
    assert key_of("02_sft", lora_r=1) != key
    stage, _ = store.begin_stage("02_sft", {"run_id": "a", "launcher": launcher})
    (stage.folder / "job.json").write_text("{}")
    stage.finish({})
    record = load_record("02_sft")
    assert record["params"]["launcher"] == launcher
    assert "job.json" not in record["outputs"] and "metrics.json" in record["outputs"]
    names = {name for stage in store.STAGES for name in params.stage_parameters(stage)}
    assert set(params.EXECUTION_PARAMS) <= names


def test_another_model_or_control_run_is_another_stage(root, leave):
    model = root / "model"
    model.mkdir()
    for run_id in ("a", "b"):
        leave("01_synthesize", run_id, base_model=str(model))
        leave("03_merge", run_id)
    leave("05_grpo")
    changes = (lambda: None, lambda: (model / "model.safetensors").write_text("1"),
               lambda: (model / "model.safetensors").write_text("2"),
               lambda: leave("03_merge", "b", "2"))
    assert count_keys(changes, "06_evaluate", control_run="b") == 4
    (root / "b" / "03_merge" / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="06_evaluate needs 03_merge of run 'b'"):
        key_of("06_evaluate", control_run="b")


@pytest.mark.parametrize(("name", "value"), [
    ("base_model", "Qwen/Qwen2.5-VL-3B-Instruct"), ("coordinates", "normalized_1000"),
    ("max_pixels", 50000)])
def test_a_control_run_of_another_model_or_box_format_is_refused(root, leave, name, value):
    for run_id, changes in (("a", {}), ("b", {name: value})):
        leave("01_synthesize", run_id, **changes)
        leave("03_merge", run_id)
    leave("05_grpo")
    with pytest.raises(ValueError, match=f"control_run 'b' has another {name} .* than run 'a'"):
        key_of("06_evaluate", control_run="b")


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
    """The second is let in when the first has finished or was killed."""
    command = [sys.executable, "-c", BEGIN_IN_ANOTHER_PROCESS]
    environment = {**os.environ, "MIG_KIT_RUNS": str(root)}
    first = subprocess.Popen([*command, "stay"], env=environment, stdout=subprocess.PIPE, text=True)
    assert "begun\n" in iter(first.stdout.readline, "")
    with pytest.raises(RuntimeError, match=f"'a' is being written by process {first.pid} in 00_"):
        store.lock_run(root / "a", patience=0.2)
    store.begin_stage("00_preflight", {"run_id": "b"})  # another run is free
    begun = attempts.list_attempts("00_preflight", "a")
    for words in (["run", "00", "--run-id", "a"], ["run", "00", "--run-id", "a", "--force"]):
        assert "another --run-id" in error_of(*words)
    assert attempts.list_attempts("00_preflight", "a") == begun, "--force took nothing away"
    first.kill()
    first.wait()
    second = subprocess.run([*command, "finish"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    store.lock_run(root / "a", patience=0.0)
    store.unlock_run(root / "a")


def test_a_clock_that_jumps_back_gives_no_negative_time(root, monkeypatch):
    stage = begin()
    monkeypatch.setattr(store.time, "time", lambda: 0.0)
    stage.finish({"n": 1})
    assert 0 <= load_record()["seconds"] < 60
    assert is_current(stage)


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
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 90_000))
    with pytest.raises(OSError, match="No space left"):
        write_json(small_disk / "old.json", {"data": "y" * 100_000})
    assert json.loads((small_disk / "old.json").read_text()) == {"kept": True}
    with pytest.raises(OSError, match="No space left"):
        stage.finish({"data": "y" * 100_000})
    assert load_record() is None
    (small_disk / "filler").unlink()
    begin().finish({"n": 1})
    assert load_record()


def test_a_further_setting_of_trl_is_no_reason_to_run_again(root, leave):
    leave("01_synthesize")
    stage, _ = store.begin_stage("02_sft", {
        "run_id": "a", "In": ["# Parameters\nweight_decay = 0.1"], "weight_decay": 0.1})
    stage.finish({})
    values = store.recorded_params("02_sft", load_record("02_sft"))
    assert values["weight_decay"] == 0.1 and store.is_up_to_date("02_sft", "a", values)
