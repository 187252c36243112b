"""Models: hardware, weights and LoRA's targets, loaded and checked.

One place decides device, dtype and attention, and says why. Qwen2.5-VL, Qwen2-VL, Qwen3-VL and
Qwen3.5 load here. Only safetensors are read, and no code of a model folder is ever run.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, BitsAndBytesConfig

from mig_kit.boxes import BoxFormat
from mig_kit.common import SHIPPED, UserError, model_folder
from mig_kit.models.adapters import ADAPTED_PROJECTIONS
from mig_kit.models.hardware import FULL_PRECISION_MODULES, Hardware
from mig_kit.models.model_folders import (
    FAMILIES,
    VisionLanguageModel,
    check_weights,
    load_config,
)
from mig_kit.models.processors import StillImageProcessor, load_processor
from mig_kit.models.shipped import merge_shipped
from mig_kit.shared_prefix.decoding import train_mode_for_4bit_layers

TINY_BASE = model_folder("tiny")
PACKED_NAME = "mig_kit_flash"  # with "flash" in it, for transformers to hand over packed windows

# LoRA goes on projections of the language model and nowhere else. A list of names such as
# "gate_proj" would also land in the vision tower, whose MLP uses the same names, hence regular
# expressions over full module paths.
LORA_TARGETS = {name: rf".*language_model\..*\.({'|'.join(projections)})"
                for name, projections in ADAPTED_PROJECTIONS.items()}
LORA_SCALE = 2  # lora_alpha / lora_r, the factor of an adapter's product


def choose_hardware(dtype: str = "auto", device: str = "auto") -> Hardware:
    """Decide device, dtype and attention once; `reason` is one sentence for the log.

    dtype: "auto" (bfloat16 on a GPU that has it, else float32), "float32" or "bfloat16". device:
    "auto" (a GPU if there is one), "cuda" (UserError if PyTorch sees none) or "cpu".
    """
    # MKL chooses the code of its vector functions at the first call. If two threads make it at
    # once, one of them now and then gets a cosine that is correct to four digits only: 22 of 1,030
    # fresh processes saw other image features.
    torch.cos(torch.ones(8))  # on one thread
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"PyTorch {torch.__version__} sees no GPU, and device is 'cuda'; check the driver with "
            "nvidia-smi, or set device to cpu")
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if dtype == "float32":
            return Hardware("cuda", torch.float32, "sdpa", "a GPU, float32 by parameter")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Hardware("cuda", torch.bfloat16, "sdpa", f"{name}: weights in bfloat16")
        reason = f"{name} has no bfloat16: float32 throughout, twice the memory and slower"
        return Hardware("cuda", torch.float32, "sdpa", reason)
    if dtype == "bfloat16":
        return Hardware("cpu", torch.bfloat16, "sdpa", "CPU, bfloat16 by parameter")
    # bfloat16 products are little faster for a model of some million parameters, even where a CPU
    # has instructions for them, and the decoder would round otherwise than the learner
    reason = f"CPU, {torch.get_num_threads()} threads: float32 throughout"
    return Hardware("cpu", torch.float32, "sdpa", reason)


def resolve_model(model: str) -> str | Path:
    """The folder of a model of SHIPPED, a folder (relative to the project), or else a hub name."""
    folder = merge_shipped(model) if model in SHIPPED else model_folder(model)
    return folder if folder.is_dir() else model


def pack_windows(tower: torch.nn.Module, hardware: Hardware) -> None:
    """Let a vision tower attend to all of its windows in one call, on a GPU in bfloat16."""
    # sdpa makes a call per window. Set after loading: while it loads, transformers asks the hub for
    # a kernel of any name with "flash" in it.
    if hardware.device == "cuda" and hardware.dtype == torch.bfloat16:
        tower.config._attn_implementation = PACKED_NAME


def attend_packed(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                  value: torch.Tensor, attention_mask: None, cu_seq_lens_q: torch.Tensor,
                  max_length_q: int, scaling: float | None = None,
                  **kwargs) -> tuple[torch.Tensor, None]:
    """Attention within each of a vision tower's windows or images; needs a GPU and 16 bits.

    query, key, value (1, heads, tokens, width) -> (mixed values (1, tokens, heads, width), None).
    cu_seq_lens_q: (windows + 1,), where each begins and the last ends.
    """
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = cu_seq_lens_q.to(torch.int32)
    mixed = varlen_attn(*packed, bounds, bounds, max_length_q, max_length_q, scale=scaling)
    return mixed[None], None


AttentionInterface.register(PACKED_NAME, attend_packed)


def run_tower_without_graph(model: VisionLanguageModel) -> None:
    """Let the frozen vision tower run without autograd from here on."""
    # gradient checkpointing makes patches require a gradient, and backward would enter the tower
    tower = model.model.visual
    tower.forward = torch.no_grad()(tower.forward)


class PatchProduct(torch.nn.Module):
    """The vision tower's first layer as a matrix product, faster than its equal convolution."""

    def __init__(self, convolution: torch.nn.Conv3d):
        super().__init__()
        # names and shapes stay, and so do checkpoints; the kernel covers a whole patch
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, channels, frames, height, width) -> (patches, width of the tower)."""
        weight = self.weight.flatten(1)
        return torch.nn.functional.linear(patches.flatten(1), weight, self.bias)


def load_model(model: str | Path, hardware: Hardware,
               four_bit: bool = False) -> VisionLanguageModel:
    """A model of FAMILIES from a folder or hub name, in eval mode, on hardware.device.

    four_bit: NF4 with double quantisation, but for the vision tower and the head.
    """
    check_weights(model)
    config, quantization = load_config(model), None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=hardware.dtype,
            llm_int8_skip_modules=FULL_PRECISION_MODULES)
    weights = FAMILIES[config.model_type].from_pretrained(
        model,
        config=config,
        dtype=hardware.dtype,
        attn_implementation=hardware.attention,
        quantization_config=quantization,
        device_map=hardware.device,
        use_safetensors=True)
    pack_windows(weights.model.visual, hardware)
    patch_embed = weights.model.visual.patch_embed
    patch_embed.proj = PatchProduct(patch_embed.proj)
    weights.eval()
    return train_mode_for_4bit_layers(weights) if four_bit else weights


@dataclass
class Policy:
    """A model with all that it needs to read prompts and write replies."""

    model: torch.nn.Module  # a VisionLanguageModel, or PEFT's around one
    processor: StillImageProcessor  # its folder's, with the pixel limits of box_format
    hardware: Hardware
    box_format: BoxFormat  # how it sees images and writes boxes


def load_policy(folder: str | Path, hardware: Hardware, box_format: BoxFormat,
                four_bit: bool = False) -> Policy:
    """Model and processor of a folder or hub name; raises as `load_model` and `load_processor`."""
    processor = load_processor(folder, box_format)  # first, because it refuses within seconds
    return Policy(load_model(folder, hardware, four_bit), processor, hardware, box_format)


def load_four_bit_policy(base: str | Path, hardware: Hardware, box_format: BoxFormat) -> Policy:
    """The frozen 4-bit base, ready to carry an adapter."""
    policy = load_policy(base, hardware, box_format, four_bit=True)
    policy.model.requires_grad_(False)
    run_tower_without_graph(policy.model)
    return policy


def check_adapters(model: torch.nn.Module) -> list[str]:
    """Full names of the modules that carry a LoRA adapter; UserError if they are wrong ones."""
    names = sorted(name for name, module in model.named_modules()
                   if "lora_A" in dict(module.named_children()))
    outside = [name for name in names if "language_model" not in name]
    if outside or not names:
        raise UserError(f"LoRA landed outside the language model ({[*outside, 'nowhere'][0]}); "
                        "use LORA_TARGETS of mig_kit.models.loading")
    return names
