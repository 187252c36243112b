"""Run folders: a finished stage never changes, a stopped one goes on, and who may write."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command_line import describe_files, error_of, output_of
from IPython.core.interactiveshell import InteractiveShell

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_json
from mig_kit.pipeline import execute, run_folders, stage_keys, store
from mig_kit.pipeline.params import validate_params
from mig_kit.pipeline.run_facts import describe_machine
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run


def begin(**values) -> store.Stage:
    stage, _ = store.begin_stage("00_preflight", {"run_id": "a", **values})
    return stage


def load_record(stage: str = "00_preflight"):
    return Run("a").record(stage)


def test_a_stage_gives_its_parameters_and_prints_those_that_differ(root, leave, capsys):
    leave("01_synthesize", coordinates="normalized_1000", max_pixels=50000)
    stage, p = store.begin_stage("02_sft", {"run_id": "a", "lora_r": 4})
    assert isinstance(p, SimpleNamespace) and vars(p) == stage.params
    assert (p.lora_r, p.base_model, p.coordinates) == (4, "tiny", "normalized_1000")
    assert stage.box_format == BoxFormat(3136, 50000, "normalized_1000")
    assert stage.input_path("01_synthesize", "cot.parquet") == (
        root / "a" / "01_synthesize" / "cot.parquet")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["02_sft of run 'a'", "  lora_r: 4", '  run_id: "a"']
    assert '  coordinates: "normalized_1000"' in lines and "versions: python 3." in lines[-1]
    assert not any("learning_rate" in line for line in lines)


def test_a_finished_stage_stays_as_it_is(root, capsys):
    stage = begin(memory_gib=1.0)
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, summary="one", hardware="test")
    record = load_record()
    assert (record["hardware"], record["summary"]) == ("test", "one")
    assert "out.txt" in record["outputs"] and record["versions"]["torch"]
    files = describe_files(root / "a")
    sentence = ("00_preflight of run 'a' has finished, and stays as it is (memory_gib: 2.0, "
                "finished with 1.0); for other results use another run (mig-kit run 00 --run-id "
                'mine; in a notebook run_id = "mine"), or mig-kit run 00 --run-id a --force, which '
                "replaces it")
    with pytest.raises(UserError) as error:
        begin(memory_gib=2.0)
    assert str(error.value) == sentence
    assert error_of("run", "00", "--run-id", "a", "-p", "memory_gib", "2") == sentence
    assert describe_files(root / "a") == files


def test_a_setup_cell_that_is_refused_shows_the_sentence_alone(root, capsys):
    begin(memory_gib=1.0).finish({})
    capsys.readouterr()
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from mig_kit.pipeline import store\nmemory_gib, run_id = 2.0, 'a'\n"
                       "stage, p = store.begin_stage('00_preflight', globals())")
    finally:
        InteractiveShell.clear_instance()
    printed = "".join(capsys.readouterr())
    assert printed.startswith("mig-kit: 00_preflight of run 'a' has finished")
    assert len(printed.splitlines()) == 1 and 'run_id = "mine"' in printed


def test_cells_of_a_finished_stage_show_what_is_there_and_write_nothing(root, capsys):
    stage = begin()
    (stage.folder / "model.safetensors").write_text("x")
    (stage.folder / "table.txt").write_text("x")
    stage.finish({"seconds": 1}, summary="one")
    with pytest.raises(UserError, match="has finished; run the setup cell again"):
        stage.folder.mkdir()  # a cell that is run again
    files = describe_files(stage.final_folder)
    again = begin()
    assert "it has finished (one): the cells show what is there" in capsys.readouterr().out
    assert (again.folder / "model.safetensors").read_text() == "x", "what takes long is there"
    (again.folder / "table.txt").write_text("half of it")
    again = begin()  # the kernel was restarted
    (again.folder / "table.txt").write_text("rounded otherwise, as on another machine")
    again.finish({"seconds": 2})
    assert capsys.readouterr().out.endswith("00_preflight of run 'a' is as it was\n")
    assert describe_files(root / "a" / "00_preflight") == files
    assert not list((root / "a").glob("*.shown"))


def test_a_stopped_stage_goes_on_with_the_same_values_alone_and_its_minutes_count(root):
    folder = begin(memory_gib=1.0).folder
    (folder / "half.txt").write_text("an hour's work")
    for name, second in (("started.json", 1000), ("half.txt", 1100)):
        os.utime(folder / name, (second, second))
    assert "stopped after" not in output_of("status", "a"), "this process has it"
    run_folders.unlock_run(root / "a")  # killed
    with pytest.raises(UserError, match=r"was stopped, and stays .*2.0, started with 1.0"):
        begin(memory_gib=2.0)
    begun = begin(memory_gib=1.0)
    assert (begun.folder / "half.txt").is_file()
    begun.finish({"n": 2})
    assert "half.txt" in load_record()["outputs"] and 100 <= load_record()["seconds"] < 110


def test_a_stopped_stage_goes_on_with_changed_code_and_is_edited(root, monkeypatch, capsys):
    facts = stage_keys.describe_code
    (begin().folder / "half.txt").write_text("x")
    monkeypatch.setattr(stage_keys, "describe_code", lambda stage: {**facts(stage), "cells": "2"})
    begin()
    begin().finish({})  # as it was when it was stopped again
    words = "edited: a cell of its notebook has changed since it was begun"
    assert capsys.readouterr().out.count(f"warning: it will be recorded as {words}") == 2
    assert Run("a").describe_marks("00_preflight") == [
        "edited (00_preflight: a cell of its notebook has changed since it was begun)"]


def test_force_replaces_at_the_end_and_goes_on_after_a_kill(root):
    stage = begin()
    (stage.folder / "out.txt").write_text("old")
    stage.finish({"n": 1})
    forced = SimpleNamespace(params={stage.name: stage.params}, profile="tiny")
    execute._prepare(Run("a"), stage.name, forced, force=True)
    begun = begin()
    finished = stage.final_folder
    assert not (begun.folder / "out.txt").exists() and (finished / "out.txt").is_file()
    (begun.folder / "half.txt").write_text("new")
    run_folders.unlock_run(root / "a")  # killed
    begun = begin()
    assert (begun.folder / "half.txt").is_file()
    begun.finish({"n": 2})
    assert (finished / "half.txt").is_file() and not (finished / "out.txt").exists()


def test_a_kill_before_the_last_rename_loses_nothing(root):
    stage = begin()
    work = stage.folder
    (work / "out.txt").write_text("x")
    started = (work / "started.json").read_text()
    stage.finish({"n": 1})
    stage.final_folder.rename(work)  # as a kill before it left the folder
    (work / "started.json").write_text(started)
    assert load_record() is None
    begin().finish({"n": 1})
    assert [*load_record()["outputs"]] == ["metrics.json", "out.txt"]
    assert begin().is_shown, "nothing is damaged"


def test_a_new_run_of_a_notebook_becomes_a_branch(root, leave, capsys):
    for stage in RECIPE[1:5]:
        leave(stage, "default")
    stage, _ = store.begin_stage("05_grpo", {"run_id": "lab2", "beta": 0.01})
    words = "run 'lab2' is new: 01_synthesize to 04_rejection_sampling are those of run 'default'"
    assert words in capsys.readouterr().out
    assert stage.input_path("03_merge") == root / "default" / "03_merge"
    sentence = "run 'lab3' needs 05_grpo of run 'default', which has not finished; run: mig-kit ru"
    with pytest.raises(UserError, match=sentence):
        store.begin_stage("06_evaluate", {"run_id": "lab3"})
    assert not (root / "lab3").exists()


def test_a_flipped_byte_in_what_a_stage_reads_is_one_sentence(root, leave):
    """With a new time, and with its old one."""
    leave("01_synthesize")
    stage, _ = store.begin_stage("02_sft", {"run_id": "a"})
    (stage.folder / "adapter.safetensors").write_bytes(b"weights")
    stage.finish({})
    path = stage.final_folder / "adapter.safetensors"
    time = path.stat().st_mtime_ns
    path.write_bytes(b"weightz")
    sentence = (f"{path} is not what 02_sft of run 'a' wrote: damaged or changed since; make it "
                "again: mig-kit run 02 --run-id a --force, with every -p")
    with pytest.raises(UserError, match=re.escape(sentence)):
        Run("a").require_intact_inputs("03_merge")
    assert store.is_done(Run("a"), "02_sft", stage.params)
    assert Run("a").notes("02_sft") == [
        f"02_sft of run 'a' is stale (02_sft: {path} is gone or damaged)"]
    os.utime(path, ns=(time, time))
    with pytest.raises(UserError, match=re.escape(sentence)):
        store.begin_stage("03_merge", {"run_id": "a"})


def key_of(stage, **values):
    return json.dumps(Run("a").stage_facts(stage, validate_params(values, stage)))


def test_what_makes_another_key_of_a_stage(root, leave):
    for stage in RECIPE[1:5]:
        leave(stage)
    before = key_of("05_grpo")
    leave("02_sft", product="2")
    leave("03_merge")  # the same product, other metrics
    assert key_of("05_grpo") == before, "it does not build on 02"
    (root / "model").mkdir()
    keys = set()
    for of_run in ({}, {"max_pixels": 50000}, {"coordinates": "normalized_1000"},
                   {"base_model": str(root / "model")}):
        leave("01_synthesize", **of_run)
        keys.add(key_of("02_sft"))
    leave("05_grpo")
    for weights in "12":
        (root / "model" / "model.safetensors").write_text(weights)
        keys.add(key_of("06_evaluate"))
    own_reward = root / "my_rewards.py"
    for value in (1.0, 0.5):
        own_reward.write_text(f"def center(answer, sample):\n    return {value}\n")
        keys.add(key_of("05_grpo", rewards=["format", f"{own_reward}:center"]))
    own_reward.write_text("from rules import center\nFILES = ['table.json']\n")
    for rules, table in (("a", "1"), ("b", "1"), ("b", "2")):
        (root / "rules.py").write_text(f"center = '{rules}'\n")
        (root / "table.json").write_text(table)
        keys.add(key_of("05_grpo", rewards=["format", f"{own_reward}:center"]))
    assert len(keys) == 11


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


def test_two_writers_of_one_run(root, monkeypatch):
    """The second is let in when the first has finished or was killed."""
    monkeypatch.setattr(run_folders.lock_run, "__defaults__", (0.2,))
    command = [sys.executable, "-c", BEGIN_IN_ANOTHER_PROCESS]
    environment = {**os.environ, "MIG_KIT_RUNS": str(root)}
    first = subprocess.Popen([*command, "stay"], env=environment, stdout=subprocess.PIPE, text=True)
    assert "begun\n" in iter(first.stdout.readline, "")
    with pytest.raises(UserError, match="'a' is being written by another process; wait"):
        run_folders.lock_run(root / "a")
    assert "running" in output_of("status", "a").splitlines()[1]
    store.begin_stage("00_preflight", {"run_id": "b"})  # another run is free
    begun = describe_files(root / "a" / "00_preflight.unfinished")
    for words in (["run", "00", "--run-id", "a"], ["run", "00", "--run-id", "a", "--force"]):
        assert "another --run-id" in error_of(*words)
    assert describe_files(root / "a" / "00_preflight.unfinished") == begun
    first.kill()
    first.wait()
    assert "stopped" in output_of("status", "a").splitlines()[1]
    second = subprocess.run([*command, "finish"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    run_folders.lock_run(root / "a", patience=0.0)
    run_folders.unlock_run(root / "a")


def test_a_clock_that_jumps_back_gives_no_negative_time(root, monkeypatch):
    stage = begin()
    monkeypatch.setattr(store.time, "time", lambda: 0.0)
    stage.finish({"n": 1})
    assert 0 <= load_record()["seconds"] < 60


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
    run_folders.unlock_run(folder / "a")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.nightly
def test_a_full_disk_leaves_the_old_file_and_no_finished_stage(small_disk):
    stage = begin()
    write_json(small_disk / "old.json", {"kept": True})
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 150_000))
    with pytest.raises(OSError, match="No space left"):
        write_json(small_disk / "old.json", {"data": "y" * 200_000})
    assert json.loads((small_disk / "old.json").read_text()) == {"kept": True}
    with pytest.raises(OSError, match="No space left"):
        stage.finish({"data": "y" * 200_000})
    assert load_record() is None
    (small_disk / "filler").unlink()
    begin().finish({"n": 1})
    assert load_record()


def test_processors_of_one_name_with_other_instructions_are_other_machines(monkeypatch):
    machines = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        machines.add(describe_machine()["machine"])
    assert len(machines) == 2
