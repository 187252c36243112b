"""Loading, adapters, and the checks that make blind training impossible."""

import json
import os
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mig_kit.boxes import BoxFormat, Coordinates, seen_size
from mig_kit.common import UserError
from mig_kit.models import loading, sample_prompts
from mig_kit.training import resuming
from mig_kit.world.tasks import make_sample

NORMALIZED = BoxFormat(coordinates=Coordinates.NORMALIZED_1000)


def test_a_quantisation_of_null_is_none(random_folder, float32, tmp_path):
    folder = Path(shutil.copytree(random_folder, tmp_path / "model"))
    update("config.json", quantization_config=None)(folder)
    assert loading.load_model(folder, float32).dtype == torch.float32


@pytest.mark.parametrize(("lora_targets", "names"), [
    ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}), ("gate_up", {"gate_proj", "up_proj"})])
def test_lora_lands_on_what_is_asked_for(lora_targets, names, random_model):
    model = get_peft_model(random_model, resuming.lora_config(4, lora_targets=lora_targets))
    adapted = loading.check_adapters(model)
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert len(adapted) == 2 * len(names)
    elsewhere = LoraConfig(r=4, target_modules=["q_proj", "gate_proj"])
    with pytest.raises(UserError, match="outside the language model"):
        loading.check_adapters(get_peft_model(model.unload(), elsewhere))


def write(name, content):
    """A change of a folder: a file's bytes, or a function of its text; None removes it."""
    def change(folder):
        if content is None:
            (folder / name).unlink()
        elif callable(content):
            (folder / name).write_text(content((folder / name).read_text()))
        else:
            (folder / name).write_bytes(content)

    return change


def update(name, **values):
    """A change of a folder: values in a file of JSON."""
    return write(name, lambda text: json.dumps(json.loads(text) | values))


def set_weights(make):
    """A change of a folder: its tensors become what a function makes of them, by name."""
    def change(folder):
        file = folder / "model.safetensors"
        save_file(make(load_file(file)), file, metadata={"format": "pt"})

    return change


def with_value(word, value):
    """Puts a value into the first tensor with this word in its name."""
    def make(tensors):
        next(tensor for name, tensor in tensors.items() if word in name).view(-1)[0] = value
        return tensors

    return set_weights(make)


def copy_weights(name):
    return lambda folder: shutil.copyfile(folder / "model.safetensors", folder / name)


def without(*words):
    return set_weights(lambda tensors: {name: tensor for name, tensor in tensors.items()
                                        if not any(word in name for word in words)})


SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"
ADAPTER, TEMPLATE = "adapter_model.safetensors", "chat_template.jinja"
# change of a folder -> what is said before its weights are read
OF_FILES = [
    (write("preprocessor_config.json", None), "preprocessor_config.json"),
    (update("config.json", model_type="llama"), "is a llama; .* -p server URL"),
    (write("config.json", b"{"), "config.json of .*config.json' is not a valid JSON file"),
    (update("config.json", quantization_config={"quant_method": "bitsandbytes"}),
     "holds quantised weights"),
    (write("tokenizer.json", b"{"), "tokenizer or image settings of .*model: "),
    (write("tokenizer.json", None), "is not complete, tokenizer.json is missing; hf download or"),
    (copy_weights(ADAPTER), "holds an adapter .adapter_model.safetensors."),
    (write("adapter_config.json", b"{}"), "holds an adapter .adapter_config.json."),
    (write(TEMPLATE, None), "the chat template of .*model: Cannot use"),
    *((write(TEMPLATE, text), sentence) for text, sentence in (
        (b"{% for", "the chat template of .*model: .*end of template"),
        (b"{{ messages[0].role }}", "leaves images or their numbers out, changes the order"),
        (b"{{ messages.__class__.__mro__ }}",  # which its sandbox blocks
         "the chat template of .*: access to attribute '__class__' of"),
        (lambda text: text.replace("part['text']", "part['text'].replace('Image 1:', '')"),
         "leaves images or their numbers out, changes the order"),
        (lambda text: text.replace("in message['content']", "in message['content'] | reverse"),
         "leaves images or their numbers out, changes the order"),
        (lambda text: text.replace("add_generation_prompt", "false"),
         "ignores add_generation_prompt; copy chat_template.jinja"),
        (lambda text: text.replace("<|im_end|>", "<|vision_end|>"),
         "ends a reply with <.vision_end.>, and its generation_config.json and tokenizer end on"))),
    *((update("preprocessor_config.json", **setting),
       f"{[*setting][0]} in preprocessor_config.json of .* vision tower reads images with")
      for setting in ({"do_resize": False}, {"patch_size": 16}, {"merge_size": 1},
                      {"do_rescale": False}, {"image_mean": [0.5] * 3}, {"image_std": None})),
    (update("config.json", image_token_id=6),
     "image_token_id in config.json of .* is 6, and its tokenizer has 5; set it to that"),
    (update("tokenizer_config.json", additional_special_tokens=["<answer>"]),
     "turns the reply .* take think and answer out of its special tokens")]
# and when they are
OF_WEIGHTS = [
    (with_value("layers.1.post_attention_layernorm", float("nan")),
     "not finite: .*layers.1.post_attention_layernorm.weight holds NaN"),
    (with_value("layers.1.mlp.down_proj", 1e30), "numbers beyond 1e.06"),
    (without("visual"), "lack .* tensors, the first is model.visual"),
    (without("model.norm.", "language_model.norm."),
     "lack 1 tensors, the first is model.language_model.norm.weight; copy or save"),
    (set_weights(lambda tensors: {name.replace("q_proj.weight", "q_proj.base_layer.weight"): tensor
                                  for name, tensor in tensors.items()}),
     "self_attn.q_proj.weight; they hold .*q_proj.base_layer.weight instead"),
    (set_weights(lambda tensors: tensors | {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items()
        if ".layers.1." in name}),
     "hold 12 tensors for which its config.json has no place, the first is .*layers.2"),
    (set_weights(lambda tensors: {name: (9 * tensor).to(torch.int8) if "up_proj" in name else tensor
                                  for name, tensor in tensors.items()}), "floating point .* Char"),
    (set_weights(lambda tensors: {name: 0 * tensor if "down_proj" in name else tensor
                                  for name, tensor in tensors.items()}), "nothing but zeros"),
    (write("config.json", lambda text: text.replace('"tie_word_embeddings": true',
                                                    '"tie_word_embeddings": false')),
     "lack 1 tensors, the first is lm_head.weight"),
    (write("model.safetensors", None), f"has neither model.safetensors nor {INDEX}; copy one"),
    (lambda folder: write(INDEX, json.dumps({"weight_map": {"a": SHARD}}).encode())(
        (folder / "model.safetensors").unlink() or folder),
     f"the weights of .*model: .* does not appear to have a file named {SHARD}"),
    (lambda folder: os.truncate(folder / "model.safetensors", 999), "the weights of .*model: ")]


@pytest.mark.parametrize(("change", "sentence", "is_early"), [
    *((*row, True) for row in OF_FILES), *((*row, False) for row in OF_WEIGHTS)])
def test_a_damaged_model_folder_is_one_sentence(change, sentence, is_early, random_folder, float32,
                                                tmp_path, monkeypatch):
    folder = shutil.copytree(random_folder, tmp_path / "model")
    change(folder)
    if is_early:
        monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(UserError, match=sentence):
        loading.load_policy(folder, float32, BoxFormat())


def test_a_relative_folder_starts_at_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert loading.resolve_model("tiny") == loading.TINY_BASE
    assert loading.resolve_model("mig_kit/tiny_base") == loading.TINY_BASE
    assert loading.resolve_model(str(tmp_path)) == tmp_path
    assert loading.resolve_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_hardware_says_why_and_is_what_was_asked_for(random_folder, monkeypatch):
    hardware = loading.choose_hardware("float32")
    assert hardware.dtype == torch.float32 and "float32" in hardware.reason
    hardware = loading.choose_hardware("bfloat16", "cpu")
    assert hardware.dtype == torch.bfloat16
    weights = loading.load_model(random_folder, hardware).state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU"):
        loading.choose_hardware("auto", "cuda")


def test_no_graph_in_the_frozen_tower(random_model, processor, samples):
    """What gradient checkpointing does to the patches would start one."""
    tower = random_model.model.visual
    tower.patch_embed.register_forward_hook(lambda *arguments: arguments[-1].requires_grad_(True))
    loading.run_tower_without_graph(random_model)
    batch = processor.image_processor(list(samples[0].images), return_tensors="pt")
    features = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    assert not features.pooler_output.requires_grad and torch.is_grad_enabled()


def test_vector_math_is_settled_before_two_threads_can_meet_in_it(monkeypatch):
    calls = []
    monkeypatch.setattr(loading.torch, "cos", lambda x: calls.append(x.numel()) or x)
    loading.choose_hardware()
    assert calls == [8]  # eight numbers are computed by one thread


# projections: 4 of attention, 3 of linear attention, 3 of an MLP
@pytest.mark.parametrize(("family", "projections"), [
    ("qwen2_vl", 14), ("qwen3_vl", 14), ("qwen3_5", 19)])
def test_relatives_load_in_normalized_coordinates_only(family, projections, relatives, float32):
    folder = relatives[family]
    with pytest.raises(UserError, match="set the parameter coordinates to normalized_1000"):
        loading.load_processor(folder, box_format=BoxFormat())
    processor = loading.load_processor(folder, NORMALIZED)
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    assert side == (28 if family == "qwen2_vl" else 32)
    model = loading.load_model(folder, float32, four_bit=True)
    adapted = loading.check_adapters(get_peft_model(model, resuming.lora_config(4)))
    assert len(adapted) == projections
    tower, head = model.model.visual, model.lm_head
    full = [*tower.modules(), *head.modules()]
    assert not any(isinstance(part, bitsandbytes.nn.Linear4bit) for part in full)
    assert type(tower).__module__.endswith(family)


@pytest.mark.parametrize("base_model", ["tiny", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_every_image_takes_a_token_for_each_square_of_28_pixels(base_model):
    sample = make_sample("diff", "val", 0)
    tokens, sizes = sample_prompts.read_prompt(base_model, sample, BoxFormat())
    assert sizes == [seen_size(size, BoxFormat()) for size in sample.sizes]
    n_squares = sum(width * height // 28**2 for width, height in sizes)
    assert tokens.count("<|image_pad|>") == n_squares > 2
    assert sample.question in "".join(tokens)
