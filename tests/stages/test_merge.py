"""Stage 03 on a random model: the right way to merge is right, the others are not."""

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.engine import logprobs, models, training
from mig_kit.stages import merge, sft
from mig_kit.world.tasks import make_sample

VIEW = BoxFormat()


@pytest.mark.slow
def test_saved_merge_equals_what_training_saw(tmp_path, random_folder, float32, processor):
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    models.save_model(merge.merge_adapter(random_folder, tmp_path / "adapter", float32), processor, tmp_path / "merged", random_folder)
    samples = [make_sample("diff", "val", i) for i in range(3)]
    rows = merge.compare_merge_methods(random_folder, tmp_path / "adapter", tmp_path / "merged", samples, ["<think>Compare.</think>"] * 3,
                         float32, VIEW)
    gaps = {row["way"]: row["mean_gap"] for row in rows}
    assert gaps["saved and read back"] < 1e-3
    assert min(gaps[way] for way in merge.MERGE_METHODS[1:]) > 5 * gaps["saved and read back"]


@pytest.mark.slow
def test_few_prompts_at_a_time_have_the_same_log_probabilities(random_model, processor, samples, monkeypatch):
    replies = ["<think>Compare.</think>", "<think>Compare the two.</think>", "no"] * 2
    few = logprobs.reply_logps(random_model, processor, samples[:6], replies, VIEW)
    monkeypatch.setattr(logprobs, "PROMPTS_AT_ONCE", 100)
    assert torch.allclose(few, logprobs.reply_logps(random_model, processor, samples[:6], replies, VIEW), atol=1e-5)


@pytest.mark.slow
def test_what_is_saved_does_not_depend_on_the_last_call(tmp_path, random_model):
    """A tokenizer that has padded a batch writes that into its file: a stage that was resumed would leave another one."""
    used = models.load_processor(models.TINY_BASE, box_format=BoxFormat())
    used.tokenizer(["a", "a longer line"], padding=True, truncation=True, max_length=8)
    models.save_model(random_model, models.load_processor(models.TINY_BASE, box_format=BoxFormat()), tmp_path / "fresh", models.TINY_BASE)
    models.save_model(random_model, used, tmp_path / "used", models.TINY_BASE)
    for file in sorted(p.name for p in (tmp_path / "fresh").iterdir()):
        assert (tmp_path / "fresh" / file).read_bytes() == (tmp_path / "used" / file).read_bytes(), file


def test_unknown_way():
    with pytest.raises(ValueError, match="use one of"):
        merge.merge_adapter(models.TINY_BASE, models.TINY_BASE, models.choose_hardware("float32"), "somehow")
