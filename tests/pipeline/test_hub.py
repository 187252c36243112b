"""The model card and the upload, with a client that only remembers: nothing is sent."""

import json

import httpx
import pytest
from click.testing import CliRunner

from mig_kit.cli import cli
from mig_kit.pipeline import hub
from mig_kit.plots import SUITE_NAMES

GRPO_PARAMS = {"max_steps": 3, "seed": 1, "base_model": "tiny", "coordinates": "absolute"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    gap = {"value": 9.5, "ci95": [7.0, 12.0]}
    suites = {suite: {"score": 50.0} for suite in SUITE_NAMES}
    params_of = {"02_sft": {}, "05_grpo": GRPO_PARAMS, "06_evaluate": {}}
    for stage, params in params_of.items():
        (tmp_path / "a" / stage).mkdir(parents=True)
        (tmp_path / "a" / stage / "run.json").write_text(json.dumps({"params": params}))
    (tmp_path / "a" / "06_evaluate" / "metrics.json").write_text(
        json.dumps(
            {
                "systems": {"sft": suites, "grpo": suites},
                "deltas": {"grpo-sft": {suite: gap for suite in SUITE_NAMES}},
            }
        )
    )
    (tmp_path / "a" / "05_grpo" / "model").mkdir()
    (tmp_path / "a" / "05_grpo" / "model" / "model.safetensors").write_bytes(b"x")
    return tmp_path


def test_card_follows_the_hubs_form(run):
    text = hub.model_card("a")
    assert (
        "\nlicense: apache-2.0\n" in text
        and text.startswith("---\n")
        and text.count("---\n") >= 2
        and "base_model" not in text
    )
    assert text.count("+9.5 (+7.0 to +12.0)") == len(SUITE_NAMES)
    with pytest.raises(FileNotFoundError, match="has no finished 02_sft"):
        hub.model_card("b")


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-VL-3B-Instruct", "/somewhere/models/mine"])
def test_of_another_base_no_licence_is_claimed_and_no_path_told(run, base):
    record = {"params": {**GRPO_PARAMS, "base_model": base}}
    (run / "a" / "05_grpo" / "run.json").write_text(json.dumps(record))
    text = hub.model_card("a")
    assert "license: other" in text and "apache" not in text and "/somewhere" not in text
    assert (f"base_model: {base}\n" in text) == base.startswith("Qwen")
    assert f"from `{base.removeprefix('/somewhere/models/')}`" in text


@pytest.mark.parametrize("start, recipe, rows", [
    ("base", "without a cold start", "base"), ("adapter", "GRPO of the same adapter", "SFT"),
    ("models/mine", "GRPO from another model's folder", "base")])
def test_the_card_says_what_rl_started_from(run, start, recipe, rows):
    path = run / "a" / "06_evaluate" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["systems"]["base"] = {suite: {"score": 20.0} for suite in SUITE_NAMES}
    gap = {"value": 29.5, "ci95": [27.0, 32.0]}
    metrics["deltas"]["grpo-base"] = {suite: gap for suite in SUITE_NAMES}
    path.write_text(json.dumps(metrics))
    record = {"params": {**GRPO_PARAMS, "start_from": start}}
    (run / "a" / "05_grpo" / "run.json").write_text(json.dumps(record))
    text = hub.model_card("a")
    assert recipe in text and f"| suite | {rows} | this model" in text
    assert ("+29.5" in text) == (rows == "base") and "drawn scenes" in text


def test_a_model_of_own_data_does_not_claim_to_have_seen_drawn_scenes_only(run):
    (run / "a" / "01_synthesize").mkdir()
    (run / "a" / "01_synthesize" / "run.json").write_text('{"params": {"data": "own"}}')
    text = hub.model_card("a")
    assert "only ever seen" not in text and "other data than drawn scenes (own)" in text


def test_scores_of_another_model_are_not_sent(run):
    record = {
        "params": {},
        "inputs": {"05_grpo": {"model/model.safetensors": "old", "metrics.json": "a"}},
    }
    for now, refused in (("old", False), ("new", True)):
        (run / "a" / "06_evaluate" / "run.json").write_text(json.dumps(record))
        (run / "a" / "05_grpo" / "run.json").write_text(
            json.dumps({"params": GRPO_PARAMS, "outputs": {"model/model.safetensors": now}})
        )
        if refused:
            with pytest.raises(
                ValueError, match="06_evaluate of run 'a' finished before 05_grpo was run again"
            ):
                hub.model_card("a")
        else:
            assert hub.model_card("a")


def test_push_sends_the_staged_folder_only(run):
    seen = []

    class Remembers:
        def create_repo(self, name, private, exist_ok):
            seen.append((name, private))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            import os

            seen.append((repo_id, sorted(os.listdir(folder_path))))

    folder = hub.prepare_upload("a", run / "out")
    assert hub.upload(folder, "me/model", True, Remembers()) == "https://hub/me/model"
    assert seen == [("me/model", True), ("me/model", ["README.md", "model.safetensors"])]
    with pytest.raises(ValueError, match="exists already"):
        hub.prepare_upload("a", run / "out")

    class Offline(Remembers):
        def create_repo(self, *given, **more):
            raise httpx.ConnectError("no route")

    with pytest.raises(OSError, match="the Hub could not be reached"):
        hub.upload(folder, "me/model", True, Offline())


def test_push_needs_a_token_and_a_dry_run_does_not(run):
    failed = CliRunner().invoke(cli, ["push", "a", "me/model"])
    assert isinstance(failed.exception, ValueError) and "HF_TOKEN" in str(failed.exception)
    written = CliRunner().invoke(cli, ["push", "a", "me/model", "--dry-run", str(run / "dry")])
    assert written.exit_code == 0 and (run / "dry" / "README.md").is_file()


def test_params_are_explained():
    shown = CliRunner().invoke(cli, ["params", "grpo"])
    assert shown.exit_code == 0 and "num_generations: 8  # replies per prompt" in shown.output
