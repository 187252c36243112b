"""What the kit writes, opened as a stranger opens it: by transformers alone, without the kit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from published import format_of
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.models import loading, merging
from mig_kit.prompts import chat_messages
from mig_kit.training import resuming
from mig_kit.world.tasks import make_sample
from tiny_base.training import save_base

STOCK = dict.fromkeys(("qwen3_vl", "qwen3_5"), "Qwen3VLProcessor") | {
    "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor"}
UNTOUCHED = ("generation_config.json", "special_tokens_map.json", "tokenizer.json",
             "tokenizer_config.json", "chat_template.json")


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def assert_names_the_stock_classes(folder: Path, family: str) -> None:
    settings = read(folder, "preprocessor_config.json")
    assert settings["processor_class"] == STOCK[family]
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"
    assert read(folder, "tokenizer_config.json").get("processor_class") in (None, STOCK[family])
    assert not (folder / "processor_config.json").exists()
    text = "".join(path.read_text() for path in folder.glob("*.json"))
    assert "StillImage" not in text and "Pil" not in text


@pytest.mark.parametrize("family", STOCK)
def test_a_merged_model_is_the_same_model_to_stock_transformers(published, family, float32,
                                                                tmp_path):
    """It names its family's classes, and keeps its base's files and layout of tensors."""
    base, adapter, folder = published[family], tmp_path / "adapter", tmp_path / "merged"
    policy = loading.load_policy(base, float32, format_of(family))
    adapted = get_peft_model(policy.model, resuming.lora_config(4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(adapter)
    merging.write_merged_model(base, adapter, folder, float32, policy.processor, four_bit=False)
    assert_names_the_stock_classes(folder, family)
    names = UNTOUCHED + (("video_preprocessor_config.json",) if family == "qwen3_vl" else ())
    for name in names:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert not (folder / "chat_template.jinja").exists()
    sizes, base_sizes = (
        {name: tensor.shape for name, tensor in load_file(path / "model.safetensors").items()}
        for path in (folder, base))
    assert sizes == base_sizes
    sample = make_sample("diff", "val", 0)
    processor = loading.load_processor(folder, format_of(family))
    messages = chat_messages(sample, format_of(family))
    text = processor.apply_chat_template(messages, tokenize=False)
    batch = processor(text=[text], images=[list(sample.images)], return_tensors="pt")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    pixels = images(list(sample.images), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, batch["pixel_values"])
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = stock(**batch).logits, adapted(**batch).logits
        plain = adapted.unload()(**batch).logits
    assert (logits - expected).abs().max() < 1e-5 and not torch.allclose(plain, expected)


@pytest.mark.parametrize(("base", "run"), [
    ("runs/default/03_merge/merged", "default"), ("runs/default/03_merge/merged", "branch"),
    ("mig_kit/tiny_base", "default")])
def test_an_adapter_finds_its_base_when_both_have_moved(random_folder, float32, tmp_path,
                                                        monkeypatch, base, run):
    """The base lies in the same run, in the run that this one starts from, or in the project."""
    base = shutil.copytree(random_folder, tmp_path / "project" / base)
    model = get_peft_model(loading.load_model(base, float32), resuming.lora_config(4))
    folder = tmp_path / "project" / "runs" / run / "05_grpo"
    folder.mkdir(parents=True)
    resuming.save_adapter(SimpleNamespace(model=model, is_world_process_zero=lambda: True), folder)
    assert len({file.stat().st_mode for file in (folder / "adapter").iterdir()}) == 1
    (tmp_path / "project").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere" / "runs" / run / "05_grpo" / "adapter")
    base = PeftConfig.from_pretrained(".").base_model_name_or_path
    stock = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert PeftModel.from_pretrained(stock, ".").peft_config["default"].r == 4


def test_the_shipped_base_and_the_builders_name_the_stock_classes(random_folder, processor,
                                                                 float32, tmp_path):
    assert_names_the_stock_classes(loading.TINY_BASE, "qwen2_5_vl")
    assert_names_the_stock_classes(random_folder, "qwen2_5_vl")
    base = loading.load_model(loading.TINY_BASE, float32)
    save_base(base, processor.tokenizer, tmp_path)
    assert_names_the_stock_classes(tmp_path, "qwen2_5_vl")
    name = "preprocessor_config.json"
    assert (tmp_path / name).read_bytes() == (loading.TINY_BASE / name).read_bytes()
