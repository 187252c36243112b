"""Stage 03 on a random model: dequantising before merging keeps what training saw, the other
methods do not.
"""

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.engine import logprobs, models, training
from mig_kit.stages import merge, sft
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


@pytest.mark.slow
def test_saved_merge_equals_what_training_saw(tmp_path, random_folder, float32):
    lora = training.lora_config(4, 8)
    policy = sft.load_qlora_policy(random_folder, float32, BOX_FORMAT, lora, 0)
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    adapter, folder = tmp_path / "adapter", tmp_path / "merged"
    policy.model.save_pretrained(adapter)
    merged = merge.merge_adapter(random_folder, adapter, float32)
    models.save_model(merged, policy.processor, folder, random_folder)
    samples = [make_sample("diff", "val", i) for i in range(3)]
    rows = merge.compare_merge_methods(random_folder, adapter, folder, samples,
                                       ["<think>Compare.</think>"] * 3, float32, BOX_FORMAT)
    gaps = {row["way"]: row["mean_gap"] for row in rows}
    assert list(gaps) == [merge.READ_BACK, *merge.MERGE_METHODS]
    assert gaps[merge.READ_BACK] < 1e-3
    others = [method for method in merge.MERGE_METHODS if method != merge.DEQUANTISED]
    assert min(gaps[method] for method in others) > 5 * gaps[merge.READ_BACK]


@pytest.mark.slow
def test_few_prompts_at_a_time_have_the_same_log_probabilities(random_model, processor, samples,
                                                               monkeypatch):
    replies = ["<think>Compare.</think>", "<think>Compare the two.</think>", "no"] * 2
    arguments = (random_model, processor, samples[:6], replies, BOX_FORMAT)
    few_at_a_time = logprobs.reply_logps(*arguments)
    monkeypatch.setattr(logprobs, "PROMPTS_AT_ONCE", 100)
    assert torch.allclose(few_at_a_time, logprobs.reply_logps(*arguments), atol=1e-5)


@pytest.mark.slow
def test_what_is_saved_does_not_depend_on_the_last_call(tmp_path, random_model):
    """A tokenizer that has padded a batch writes that into its file: a stage that was resumed would
    leave another one.
    """
    fresh, used = (models.load_processor(models.TINY_BASE, BOX_FORMAT) for _ in range(2))
    used.tokenizer(["a", "a longer line"], padding=True, truncation=True, max_length=8)
    models.save_model(random_model, fresh, tmp_path / "fresh", models.TINY_BASE)
    models.save_model(random_model, used, tmp_path / "used", models.TINY_BASE)
    for name in sorted(path.name for path in (tmp_path / "fresh").iterdir()):
        fresh_file, used_file = (tmp_path / folder / name for folder in ("fresh", "used"))
        assert fresh_file.read_bytes() == used_file.read_bytes(), name


def test_unknown_method(float32):
    with pytest.raises(ValueError, match="no merge method 'somehow'; use one of"):
        merge.merge_adapter(models.TINY_BASE, models.TINY_BASE, float32, "somehow")
