"""The model card and the upload, with a client that only remembers: nothing is sent."""

import json

import httpx
import pytest
from click.testing import CliRunner

from mig_kit.cli import cli
from mig_kit.common import write_json
from mig_kit.pipeline import hub
from mig_kit.world.suites import SUITES

GRPO_PARAMS = {"max_steps": 3, "seed": 1, "base_model": "tiny", "coordinates": "absolute"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = tmp_path / "a/05_grpo/model/model.safetensors"
    for stage in ("01_synthesize", "05_grpo/model", "06_evaluate"):
        (tmp_path / "a" / stage).mkdir(parents=True)
    model.write_bytes(b"x")
    for stage, params in {"05_grpo": GRPO_PARAMS, "06_evaluate": {}}.items():
        write_json(tmp_path / "a" / stage / "run.json", {"params": params})
    suites = {suite: {"score": 50.0} for suite in SUITES}
    gap = {"value": 9.5, "ci95": [7.0, 12.0]}
    write_json(tmp_path / "a/06_evaluate/metrics.json", {
        "systems": {"sft": suites, "grpo": suites},
        "deltas": {"grpo-sft": {suite: gap for suite in SUITES}}})
    return tmp_path


def test_card_follows_the_hubs_form(run):
    text = hub.model_card("a")
    assert text.startswith("---\n") and text.count("---\n") >= 2
    assert "\nlicense: apache-2.0\n" in text and "base_model" not in text
    assert text.count("+9.5 (+7.0 to +12.0)") == len(SUITES)
    with pytest.raises(FileNotFoundError, match="the model card needs 05_grpo of run 'b'"):
        hub.model_card("b")


@pytest.mark.parametrize("base", ["Qwen/Qwen2.5-VL-3B-Instruct", "/somewhere/models/mine"])
def test_of_another_base_no_licence_is_claimed_and_no_path_told(run, base):
    write_json(run / "a/05_grpo/run.json", {"params": {**GRPO_PARAMS, "base_model": base}})
    text = hub.model_card("a")
    assert "license: other" in text and "apache" not in text and "/somewhere" not in text
    assert (f"base_model: {base}\n" in text) == base.startswith("Qwen")
    assert f"from `{base.removeprefix('/somewhere/models/')}`" in text


@pytest.mark.parametrize(("start", "words", "rows"), [
    ("base", "GRPO of the base, without a cold start, 3", "base"),
    ("adapter", "GRPO of the SFT adapter", "SFT"), ("models/mine", "another model's", "base")])
def test_the_card_says_what_rl_started_from(run, start, words, rows):
    path = run / "a" / "06_evaluate" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["systems"]["base"] = {suite: {"score": 20.0} for suite in SUITES}
    gap = {"value": 29.5, "ci95": [27.0, 32.0]}
    metrics["deltas"]["grpo-base"] = {suite: gap for suite in SUITES}
    path.write_text(json.dumps(metrics))
    write_json(run / "a/05_grpo/run.json", {"params": {**GRPO_PARAMS, "start_from": start}})
    text = hub.model_card("a")
    assert words in text and f"| suite | {rows} | this model" in text
    assert ("+29.5" in text) == (rows == "base") and "synthetic scenes" in text


def test_a_model_of_own_data_does_not_claim_to_have_seen_synthetic_scenes_only(run):
    write_json(run / "a/01_synthesize/run.json", {"params": {"data": "own"}})
    assert "trained on other data than synthetic scenes (own)" in hub.model_card("a")


def test_scores_of_another_model_are_not_sent(run):
    write_json(run / "a/06_evaluate/run.json", {
        "params": {}, "inputs": {"05_grpo": {"model/x": "old", "metrics.json": "a"}}})
    write_json(run / "a/05_grpo/run.json", {"params": GRPO_PARAMS, "outputs": {"model/x": "old"}})
    assert hub.model_card("a")
    write_json(run / "a/05_grpo/run.json", {"params": GRPO_PARAMS, "outputs": {"model/x": "new"}})
    with pytest.raises(ValueError, match="06_evaluate of run 'a' finished before 05_grpo was run"):
        hub.model_card("a")


def test_push_sends_the_prepared_folder_only_and_needs_a_token(run, monkeypatch):
    sent = []

    class Client:
        def __init__(self, token):
            sent.append(token)

        def create_repo(self, name, private, exist_ok):
            if name == "offline":
                raise httpx.ConnectError("no route")
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(hub, "HfApi", Client)
    failed = CliRunner().invoke(cli, ["push", "a", "me/model"])
    assert isinstance(failed.exception, ValueError) and "HF_TOKEN" in str(failed.exception)
    monkeypatch.setenv("HF_TOKEN", "a secret")
    assert "https://hub/me/model" in CliRunner().invoke(cli, ["push", "a", "me/model"]).output
    assert sent == ["a secret", ("me/model", ["README.md", "model.safetensors"])]
    with pytest.raises(OSError, match="the Hub could not be reached"):
        hub.upload(run / "a", "offline", True)


def test_a_dry_run_needs_no_token_and_overwrites_nothing(run):
    words = ["push", "a", "me/model", "--dry-run", str(run / "dry")]
    assert CliRunner().invoke(cli, words).exit_code == 0 and (run / "dry" / "README.md").is_file()
    assert "exists already" in str(CliRunner().invoke(cli, words).exception)
