"""Loading models and processors: one place that decides device, dtype and attention, and says why.

Every Qwen2.5-VL folder or hub name loads here, the shipped tiny base like the 7B, and so do Qwen2-VL and (dense) Qwen3-VL,
which write boxes in thousandths. Only safetensors are read, and no code that a model folder carries is ever run.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from mig_kit.boxes import BoxFormat
from mig_kit.common import PACKAGE
from mig_kit.engine import attention

TINY_HIDDEN, TINY_VISION_HIDDEN = 256, 128


TINY_BASE = PACKAGE / "tiny_base"


# LoRA goes on every projection of the language model and nowhere else. A list of names such as "gate_proj" would also
# land in the vision tower, whose MLP uses the same names, hence a regular expression over full module paths.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


# by the model_type of config.json
FAMILIES = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration,
            "qwen3_vl": Qwen3VLForConditionalGeneration}


VisionLanguageModel = Qwen2_5_VLForConditionalGeneration | Qwen2VLForConditionalGeneration | Qwen3VLForConditionalGeneration


FULL_PRECISION_MODULES = ["model.visual", "lm_head"]  # never 4-bit; the full path, for plain "visual" is ignored and the tower quantised


@dataclass(frozen=True)
class Hardware:
    """Where and in which numbers to compute. autocast: bf16 matrix products over float32 weights."""

    device: str
    dtype: torch.dtype
    autocast: bool
    attention: str
    reason: str


def settle_vector_math() -> None:
    """Let MKL choose the code of its vector functions now, on one thread.

    Where two threads make the first call at once, one of them now and then gets a cosine that is right to four digits only,
    in that call: on a busy machine 22 of 1,030 fresh processes saw other image features than the rest, none of 1,820 after this.
    """
    torch.cos(torch.ones(8))


def fast_bf16_instructions() -> str:
    """The instructions of this CPU that multiply bf16 numbers faster than float32, or "": what it is, not how fast it was just now.

    A measured ratio would choose another dtype now and then on a busy machine, and with it other numbers for the same seed.
    avx512_bf16 counts where it is not Intel's: a Xeon that lacks or hides AMX multiplies bf16 at 0.6 of its float32 rate.
    """
    has = torch.cpu.get_capabilities()
    fast = ("amx_bf16",) if "Intel" in has.get("cpu_name", "") else ("amx_bf16", "avx512_bf16")
    return next((name for name in fast if has.get(name)), "")


def choose_hardware(dtype: str = "auto") -> Hardware:
    """Decide device, dtype and attention once; `reason` is one sentence for the log.

    dtype: "auto", "float32" or "bfloat16". On a CPU "auto" asks for fast instructions for bf16 products (`bf16_instructions`):
    with them these run two to five times faster than float32, without slower.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is '{dtype}'; use auto, float32 or bfloat16")
    settle_vector_math()
    if torch.cuda.is_available():
        if dtype == "float32":
            return Hardware("cuda", torch.float32, False, "sdpa", "a GPU, float32 by parameter")
        return Hardware("cuda", torch.bfloat16, False, "sdpa", f"{torch.cuda.get_device_name()}: weights in bfloat16")
    if dtype == "auto":
        found = fast_bf16_instructions()
        chosen, why = bool(found), f"CPU, {torch.get_num_threads()} threads, {found or 'no fast instructions'} for bf16 products"
    else:
        chosen, why = dtype == "bfloat16", f"CPU, {dtype} by parameter"
    how = "float32 weights, bf16 products (autocast)" if chosen else "float32 throughout"
    return Hardware("cpu", torch.float32, chosen, attention.NAME, f"{why}: {how}")


class StillImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, which needs torchvision; for still images its relatives' is the same.

    Token expansion, chat template and image processing are transformers' own code. `padding_side` is left: a
    right-padded batch is accepted by the trainers and misplaces the image tokens' positions.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        tokenizer.padding_side = "left"
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls):
        """The two parts this processor is made of."""
        return ["image_processor", "tokenizer"]


def load_processor(model: str | Path, box_format: BoxFormat) -> StillImageProcessor:
    """The processor of a model folder or hub name; the one place where the pixel limits of the kit are set.

    Two places with two limits would resize twice and shift every box. Raises FileNotFoundError with a remedy when the folder
    has no processor files, and ValueError for a family of models that writes its boxes in another frame than `view` says.
    """
    check_model_folder(model)
    family = load_config(model).model_type
    if family != "qwen2_5_vl" and box_format.coordinates != "normalized_1000":
        raise ValueError(f"{model} is a {family}, which writes boxes in 0 to 1000; set the parameter coordinates to normalized_1000")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    images = Qwen2VLImageProcessorPil.from_pretrained(
        model, size={"shortest_edge": box_format.min_pixels, "longest_edge": box_format.max_pixels})
    template = None
    for name in ("chat_template.jinja", "chat_template.json"):
        path = Path(model) / name
        if path.is_file():
            template = path.read_text() if name.endswith("jinja") else json.loads(path.read_text())["chat_template"]
            break
    return StillImageProcessor(images, tokenizer, chat_template=template or tokenizer.chat_template)


def resolve_model(model: str) -> str | Path:
    """"tiny" stands for the base that mig_kit ships; a folder or a hub name stands for itself."""
    return TINY_BASE if model == "tiny" else model


def check_model_folder(model: str | Path) -> None:
    """Raise FileNotFoundError with one sentence when a local folder lacks what loading needs; hub names pass."""
    path = Path(model)
    if not path.exists():
        if os.sep in str(model) and str(model).count("/") != 1 or str(model).startswith("."):
            raise FileNotFoundError(f"no model folder at {model}; run the stage that makes it, or give a hub name")
        return
    names = {p.name for p in path.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        raise FileNotFoundError(f"{model} holds an adapter, not a model; merge it into its base first (stage 03)")
    if not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(f"{model} holds no *.safetensors; only safetensors weights are loaded, so convert them")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if name not in names:
            raise FileNotFoundError(f"{model} has no {name}; copy the processor's files beside the weights "
                                    "(save_pretrained of the processor writes them)")


def load_config(model: str | Path):
    """The configuration of a folder or hub name.

    ValueError unless its model_type is one of FAMILIES, FileNotFoundError where there is no such folder and the hub gives none.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        why = str(error).splitlines()[0]
        raise FileNotFoundError(f"there is no folder {model}, and the hub gave no model of this name ({why}); "
                                "give a folder, or a hub name such as Qwen/Qwen2.5-VL-7B-Instruct") from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"{model} is a {config.model_type}; the kit loads {', '.join(FAMILIES)}")
    if "quantization_config" in config.to_dict():
        raise ValueError(f"{model} holds quantised weights, which are neither what training saw nor what a merge gives; "
                         "give the full weights (stage 03 writes them)")
    return config


class PatchProduct(torch.nn.Conv3d):
    """The vision tower's first layer as the product it is: its kernel covers a whole patch, and a convolution is slower."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches: (patches, channels, frames, height, width) of the kernel's size -> (patches, width of the tower)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def load_model(model: str | Path, hw: Hardware, four_bit: bool = False) -> VisionLanguageModel:
    """A model of one of FAMILIES from a folder or hub name, in eval mode, on hw.device.

    four_bit: NF4 with double quantisation; the vision tower and the head stay in hw.dtype.
    """
    check_model_folder(model)
    config, quantization = load_config(model), None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if hw.device == "cuda" or hw.autocast else torch.float32,
            llm_int8_skip_modules=FULL_PRECISION_MODULES)
    loaded = FAMILIES[config.model_type].from_pretrained(
        model, config=config, dtype=hw.dtype, attn_implementation=hw.attention, quantization_config=quantization,
        device_map=hw.device, use_safetensors=True)
    loaded.model.visual.patch_embed.proj.__class__ = PatchProduct
    return protect_4bit_weights(loaded.eval())


def protect_4bit_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Puts only the 4-bit layers in train mode, where they compute the same and leave their weights alone.

    In eval mode, on CPUs with avx512_bf16, a 4-bit layer repacks its weights in place at its first use; merging it or
    training it afterwards gives garbage. Call it after whatever puts the whole model in eval mode.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()
    return model


def list_adapted_modules(model: torch.nn.Module) -> list[str]:
    """Full names of the modules that carry a LoRA adapter."""
    return sorted(name for name, module in model.named_modules() if "lora_A" in dict(module.named_children()))


def check_adapters(model: torch.nn.Module) -> list[str]:
    """The adapted modules; raises ValueError if one lies outside the language model or a projection was missed."""
    names = list_adapted_modules(model)
    outside = [name for name in names if "language_model" not in name]
    layers = sum(1 for name, _ in model.named_modules() if name.endswith(".self_attn") and "language_model" in name)
    if outside:
        raise ValueError(f"LoRA landed outside the language model ({outside[0]}); use models.LORA_TARGETS")
    if len(names) != 7 * layers:
        raise ValueError(f"LoRA is on {len(names)} projections, expected {7 * layers}; use models.LORA_TARGETS")
    return names


def check_tokens(processor: StillImageProcessor, batch: dict) -> None:
    """Raise ValueError unless the batch's image tokens equal its image features, row padding on the left.

    TRL drops all images of a batch whose counts disagree and goes on training blind; this check comes first.
    """
    if processor.tokenizer.padding_side != "left":
        raise ValueError("the tokenizer pads on the right; set processor.tokenizer.padding_side = 'left'")
    tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    grid = batch.get("image_grid_thw")
    features = 0 if grid is None else int(grid.prod(-1).sum()) // processor.image_processor.merge_size**2
    if tokens != features:
        raise ValueError(f"the prompt holds {tokens} image tokens but the images give {features} features; "
                         "the images of a sample and its placeholders disagree, or tokens were cut")


def save_model(model, processor, folder: Path) -> None:
    """Safetensors and processor files; a merged model loads like any other Qwen2.5-VL folder."""
    model = unwrap_peft(model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, safe_serialization=True)
    processor.tokenizer.backend_tokenizer.no_padding()  # the last call's padding is state, and would be written with it
    processor.tokenizer.backend_tokenizer.no_truncation()
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def unwrap_peft(model):
    """The vision-language model itself, without a PEFT wrapper."""
    return model.base_model.model if "base_model" in dict(model.named_children()) else model


def tiny_config(vocab_size: int, hidden: int = TINY_HIDDEN, layers: int = 5, vision_hidden: int = TINY_VISION_HIDDEN,
           vision_layers: int = 4) -> Qwen2_5_VLConfig:
    """The tiny Qwen2.5-VL. Widths are multiples of 64, the block size of NF4; heads are 32 wide."""
    heads = hidden // 32
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size, hidden_size=hidden, intermediate_size=-(-hidden * 11 // 256) * 64, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]},
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=0),
        vision_config=dict(
            depth=vision_layers, hidden_size=vision_hidden, intermediate_size=vision_hidden * 2,
            num_heads=vision_hidden // 32, out_hidden_size=hidden, fullatt_block_indexes=list(range(vision_layers))),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True)
