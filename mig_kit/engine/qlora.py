"""A 4-bit base under an adapter that is trained: a new one (stage 02) or a saved one (05)."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.engine.models import (
    Hardware,
    Policy,
    check_adapters,
    load_policy,
    run_tower_without_graph,
)
from mig_kit.shared_prefix.decoding import train_mode_for_4bit_layers


def load_four_bit_policy(base: str | Path, hardware: Hardware, box_format: BoxFormat) -> Policy:
    """The frozen 4-bit base, ready to carry an adapter.

    On a CPU that multiplies in bfloat16, what passes between the language model's layers is
    bfloat16, too: in float32, a quarter of a step goes into conversions. The vision tower, which
    locates, keeps float32. With hardware.dtype bfloat16 it is bfloat16, too.
    """
    policy = load_policy(base, hardware, box_format, four_bit=True)
    # whether layers are checkpointed, the trainer's gradient_checkpointing says
    model = prepare_model_for_kbit_training(policy.model, use_gradient_checkpointing=False)
    run_tower_without_graph(model)
    if hardware.autocast or hardware.dtype == torch.bfloat16:
        for name, parameter in model.named_parameters():
            keeps_float32 = hardware.autocast and "visual" in name
            if parameter.dtype == torch.float32 and not keeps_float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    policy.model = model
    release_memory()  # of the copies in float32, gigabytes in a real model
    return policy


def load_adapter_policy(base: str | Path, adapter: Path, hardware: Hardware,
                        box_format: BoxFormat) -> Policy:
    """The 4-bit base under a saved adapter that goes on being trained, without dropout.

    Raises ValueError as `check_adapters`.
    """
    policy = load_four_bit_policy(base, hardware, box_format)
    config = LoraConfig.from_pretrained(adapter)
    config.lora_dropout, config.inference_mode = 0.0, False
    policy.model = train_mode_for_4bit_layers(
        PeftModel.from_pretrained(policy.model, adapter, is_trainable=True, config=config))
    check_adapters(policy.model)
    return policy
