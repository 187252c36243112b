"""Stage 03 on a random model: dequantising before merging keeps what training saw."""

import pytest
import torch
from launched import set_random_adapter
from published import save_model
from safetensors.torch import save_file

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading, merging, sample_prompts
from mig_kit.stages import merge, sft
from mig_kit.training import resuming
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


@pytest.fixture
def policy(tmp_path, random_folder, float32):
    """The random model in 4 bit with an adapter, which is saved in tmp_path/adapter."""
    policy = sft.load_qlora_policy(random_folder, float32, BOX_FORMAT, resuming.lora_config(4), 0)
    set_random_adapter(policy.model)
    policy.model.save_pretrained(tmp_path / "adapter")
    return policy


@pytest.mark.slow
def test_saved_merge_equals_what_training_saw(tmp_path, random_folder, float32, policy,
                                              monkeypatch):
    adapter, folder = tmp_path / "adapter", tmp_path / "merged"
    merging.write_merged_model(random_folder, adapter, folder, float32, policy.processor,
                               four_bit=True)
    merged = merge.merge_in_memory(random_folder, adapter, float32)
    save_model(merged, policy.processor, tmp_path / "in memory", random_folder)
    for file in sorted((tmp_path / "in memory").iterdir()):
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name
    for saved in (folder, tmp_path / "in memory"):
        assert len({file.stat().st_mode for file in saved.iterdir()}) == 1, "as the umask says"
    samples = [make_sample("diff", "val", i) for i in range(3)]
    for name in ("compared", "compared.tmp"):  # as a start that was killed leaves them
        (tmp_path / name).mkdir()
    rows = merge.measure_merge_gaps(random_folder, adapter, folder, samples,
                                    ["<think>Compare.</think>"] * 3, float32, BOX_FORMAT)
    gaps = {row["way"]: row["mean_gap"] for row in rows}
    assert list(gaps) == [merge.READ_BACK, *merge.MERGE_METHODS]
    assert gaps[merge.READ_BACK] < 1e-3
    others = [method for method in merge.MERGE_METHODS if method != merge.DEQUANTISED]
    assert min(gaps[method] for method in others) > 5 * gaps[merge.READ_BACK]
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "in memory"}
    monkeypatch.setattr(merge, "LARGE_MODEL_BYTES", 0)
    assert merge.choose_merge_methods(random_folder) == (merge.ORIGINAL,)


@pytest.mark.slow
def test_the_files_of_a_divided_base_are_merged_as_one(tmp_path, random_folder, float32, policy):
    save_model(loading.load_model(random_folder, float32), policy.processor, tmp_path / "base",
               random_folder, max_shard_size=200_000)
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    for base in (random_folder, tmp_path / "base"):
        merging.write_merged_model(base, tmp_path / "adapter", tmp_path / f"{base.name} merged",
                                   float32, policy.processor, four_bit=True)
    one, many = (loading.load_model(tmp_path / f"{base.name} merged", float32).state_dict()
                 for base in (random_folder, tmp_path / "base"))
    assert all(torch.equal(weight, many[name]) for name, weight in one.items())


def test_adapter_of_another_model_is_refused(tmp_path, random_folder, float32, processor):
    layer = "base_model.model.model.language_model.layers.9.mlp.up_proj"
    save_file({f"{layer}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"},
              tmp_path / "adapter_model.safetensors")
    resuming.lora_config(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not have; give the base that it was trained on"):
        merging.write_merged_model(random_folder, tmp_path, tmp_path / "out", float32, processor,
                                   four_bit=True)


def test_merge_warning():
    rows = [{"way": merge.READ_BACK, "mean_gap": 0.01}, {"way": merge.ORIGINAL, "mean_gap": 0.02}]
    assert merge.merge_warning(rows) == ""
    rows[1]["mean_gap"] = 0.005
    assert "too young" in merge.merge_warning(rows)
    rows[0]["mean_gap"] = 0.06
    assert "0.060 nats" in merge.merge_warning(rows)


@pytest.mark.slow
def test_few_prompts_at_a_time_have_the_same_log_probabilities(random_model, processor, samples,
                                                               monkeypatch):
    replies = ["<think>Compare.</think>", "<think>Compare the two.</think>", "no"] * 2
    arguments = (random_model, processor, samples[:6], replies, BOX_FORMAT)
    few_at_a_time = torch.cat(sample_prompts.reply_logps(*arguments))
    monkeypatch.setattr(sample_prompts, "PROMPTS_AT_ONCE", 100)
    at_once = torch.cat(sample_prompts.reply_logps(*arguments))
    assert torch.allclose(few_at_a_time, at_once, atol=1e-5)

