"""How far a system is from the base, on its own replies."""

import pytest
import torch
from published import save_model

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading, sample_prompts
from mig_kit.serving import reply_files
from mig_kit.stages import tables
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def test_replies_are_spread_over_the_samples_that_have_drawn_ones(monkeypatch):
    samples, drawn = list("abcdef"), [["1", "x"], ["2"], [], ["4"], ["5"], []]
    assert reply_files._spread_replies(samples, drawn) == [
        ("a", "1"), ("b", "2"), ("d", "4"), ("e", "5")]
    monkeypatch.setattr(reply_files, "KL_SAMPLES", 2)
    assert reply_files._spread_replies(samples, drawn) == [("a", "1"), ("d", "4")]


def test_all_suites_and_systems_share_one_cache(tmp_path, random_folder, float32, stage_params,
                                               monkeypatch):
    caches = []
    monkeypatch.setattr(reply_files, "sample_replies",
                        lambda *arguments, cache, **more: caches.append(cache) or {})
    params = stage_params("06_evaluate", replies=0)
    suites = {"mig_bench": [], "own": []}
    folders = {"base": random_folder, "sft": random_folder}
    reply_files.suite_replies(folders, suites, suites, float32, BOX_FORMAT, tmp_path / "replies",
                              params)
    assert len(caches) == 4 and len(set(map(id, caches))) == 1


def test_kl_by_hand():
    logps = [torch.tensor([-1.0, -2.0]).numpy(), torch.tensor([-1.0]).numpy()]
    base = [torch.tensor([-2.0, -2.5]).numpy(), torch.tensor([-1.5]).numpy()]
    figures = reply_files._summarize_kl(logps, base)
    assert figures == {"per_token": pytest.approx(2 / 3), "per_reply": pytest.approx(1.0),
                       "standard_error": pytest.approx(0.5), "replies": 2}


@pytest.mark.slow
def test_a_system_that_has_moved_is_away_from_the_base(tmp_path, random_folder, random_policy,
                                                       float32, monkeypatch):
    monkeypatch.setattr(reply_files, "KL_SAMPLES", 4)
    torch.manual_seed(0)
    for parameter in random_policy.model.model.language_model.layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.std()
    save_model(random_policy.model, random_policy.processor, tmp_path / "sft", random_folder)
    samples = {"mig_bench": [make_sample("diff", "test", i) for i in range(6)]}
    options = {"replies": 1, "temperature": 1.0, "max_new_tokens": 8, "seed": 0}
    drawn = reply_files.sample_replies(random_policy, samples["mig_bench"],
                                       tmp_path / "drawn.jsonl",
                                    **options)
    texts = [drawn[sample.id] for sample in samples["mig_bench"]]
    replies = {name: {"mig_bench": {"greedy": [""] * 6, "drawn": texts}}
               for name in ("base", "sft", "grpo")}
    folders = {"base": random_folder, "sft": tmp_path / "sft", "grpo": random_folder}
    kl = reply_files.kl_from_base(folders, samples, replies, float32, BOX_FORMAT)
    assert kl["grpo"]["mig_bench"]["per_token"] == 0 and "base" not in kl
    rows = reply_files._spread_replies(samples["mig_bench"], replies["sft"]["mig_bench"]["drawn"])
    own, base = (torch.cat(sample_prompts.reply_logps(
        loading.load_model(folder, float32), random_policy.processor,
        [sample for sample, _ in rows], [text for _, text in rows], BOX_FORMAT))
                 for folder in (tmp_path / "sft", random_folder))
    figures = kl["sft"]["mig_bench"]
    assert figures["per_token"] == pytest.approx((own - base).mean().item(), abs=1e-5)
    assert figures["per_token"] > 0 and figures["replies"] == 4
    assert tables.kl_rows(kl)[0] == {"system": "SFT",
                                     "MIG-Bench-like (drawn)": round(figures["per_token"], 3)}
