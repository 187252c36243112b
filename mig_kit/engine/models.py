"""Models and processors: loading, checking and saving.

One place decides device, dtype and attention, and says why. Every Qwen2.5-VL folder or hub name
loads here, the shipped tiny base like the 7B, and so do Qwen2-VL and (dense) Qwen3-VL, which write
boxes in 0 to 1000. Only safetensors are read, and no code that a model folder carries is ever run.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
from peft import PeftModel
from PIL import Image
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
from transformers.utils import cached_file

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, seen_size
from mig_kit.common import PACKAGE
from mig_kit.engine import attention

TINY_BASE = PACKAGE / "tiny_base"
TINY_HIDDEN, TINY_VISION_HIDDEN = 256, 128

# LoRA goes on every projection of the language model and nowhere else. A list of names such as
# "gate_proj" would also land in the vision tower, whose MLP uses the same names, hence a regular
# expression over full module paths.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# model_type of config.json -> class of the model, and class that its processor has elsewhere
FAMILIES = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
STOCK_PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
VisionLanguageModel = (
    Qwen2_5_VLForConditionalGeneration
    | Qwen2VLForConditionalGeneration
    | Qwen3VLForConditionalGeneration
)

# Never 4-bit. The tower needs its full path: plain "visual" is ignored and the tower quantised.
FULL_PRECISION_MODULES = ["model.visual", "lm_head"]

# Files of a model folder that training does not change; a saved model keeps its base's.
UNCHANGED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
)


@dataclass(frozen=True)
class Hardware:
    """Where and in which numbers to compute; autocast: bf16 products over float32 weights."""

    device: str
    dtype: torch.dtype
    autocast: bool
    attention: str
    reason: str


def settle_vector_math() -> None:
    """Let MKL choose the code of its vector functions now, on one thread.

    Where two threads make the first call at once, one of them now and then gets a cosine that is
    correct to four digits only, in that call: on a busy machine 22 of 1,030 fresh processes saw
    other image features than the rest, none of 1,820 after this.
    """
    torch.cos(torch.ones(8))


def fast_bf16_instructions() -> str:
    """The instructions of this CPU that multiply bf16 numbers faster than float32, or "".

    They are looked up and not timed: a measured ratio would choose another dtype now and then on a
    busy machine, and with it other numbers for the same seed. avx512_bf16 counts where the CPU is
    not Intel's: a Xeon that lacks or hides AMX multiplies bf16 at 0.6 of its float32 rate.
    """
    capabilities = torch.cpu.get_capabilities()
    is_intel = "Intel" in capabilities.get("cpu_name", "")
    fast = ("amx_bf16",) if is_intel else ("amx_bf16", "avx512_bf16")
    return next((name for name in fast if capabilities.get(name)), "")


def choose_hardware(dtype: str = "auto") -> Hardware:
    """Decide device, dtype and attention once; `reason` is one sentence for the log.

    dtype: "auto", "float32" or "bfloat16"; ValueError for another. On a CPU "auto" asks for
    `fast_bf16_instructions`: with them bf16 products run two to five times faster than float32,
    without them slower.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is '{dtype}'; use auto, float32 or bfloat16")
    settle_vector_math()
    if torch.cuda.is_available():
        if dtype == "float32":
            return Hardware("cuda", torch.float32, False, "sdpa", "a GPU, float32 by parameter")
        reason = f"{torch.cuda.get_device_name()}: weights in bfloat16"
        return Hardware("cuda", torch.bfloat16, False, "sdpa", reason)
    if dtype == "auto":
        instructions = fast_bf16_instructions()
        autocast = bool(instructions)
        cause = (f"CPU, {torch.get_num_threads()} threads, "
                 f"{instructions or 'no fast instructions'} for bf16 products")
    else:
        autocast = dtype == "bfloat16"
        cause = f"CPU, {dtype} by parameter"
    effect = "float32 weights, bf16 products (autocast)" if autocast else "float32 throughout"
    return Hardware("cpu", torch.float32, autocast, attention.NAME, f"{cause}: {effect}")


class StillImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, which needs torchvision.

    For still images its relatives' processors do the same. Token expansion, chat template and image
    processing are transformers' own code. `padding_side` is left: the trainers accept a batch that
    is padded on the right and misplace the image tokens' positions. stock_class: the processor
    class of the model's family. Every file that this one writes names that class, because nothing
    outside the kit can load a class of the kit.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None,
                 stock_class: str = "Qwen2_5_VLProcessor", **kwargs):
        tokenizer.padding_side = "left"
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.stock_class = stock_class
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls):
        """The two parts this processor is made of."""
        return ["image_processor", "tokenizer"]

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Write tokenizer, chat template and image settings; the trainers call it at checkpoints.

        Raises ValueError for push_to_hub.
        """
        if push_to_hub:
            raise ValueError("the trainers send nothing to the Hub; use: mig-kit push")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template)
        self.save_image_settings(folder)

    def save_image_settings(self, folder: Path) -> None:
        """Write preprocessor_config.json, and name the stock class wherever the folder names one.

        The pixel limits are written twice: older releases of transformers read min_pixels and
        max_pixels, newer ones `size`. There is no processor_config.json, which would win over it.
        """
        settings = self.image_processor.to_dict() | {"processor_class": self.stock_class}
        settings["min_pixels"] = settings["size"]["shortest_edge"]
        settings["max_pixels"] = settings["size"]["longest_edge"]
        write_json(folder / "preprocessor_config.json", settings)
        (folder / "processor_config.json").unlink(missing_ok=True)
        tokenizer_settings = json.loads((folder / "tokenizer_config.json").read_text())
        if tokenizer_settings.get("processor_class", self.stock_class) != self.stock_class:
            tokenizer_settings["processor_class"] = self.stock_class
            write_json(folder / "tokenizer_config.json", tokenizer_settings)


def write_json(path: Path, values: dict) -> None:
    """Write a settings file in the form that transformers writes."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def load_processor(model: str | Path, box_format: BoxFormat) -> StillImageProcessor:
    """The processor of a model folder or hub name; the one place where its pixel limits are set.

    Two places with two limits would resize twice and shift every box. Raises FileNotFoundError with
    a remedy when the folder has no processor files, and ValueError where the model does not see
    images or write boxes as `box_format` says.
    """
    check_model_folder(model)
    family = load_config(model).model_type
    if family != "qwen2_5_vl" and box_format.coordinates != Coordinates.NORMALIZED_1000:
        raise ValueError(f"{model} is a {family}, which writes boxes in 0 to 1000; "
                         "set the parameter coordinates to normalized_1000")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    # By these names, for a `size` would lose against the limits in a published folder's file.
    images = Qwen2VLImageProcessorPil.from_pretrained(
        model, min_pixels=box_format.min_pixels, max_pixels=box_format.max_pixels)
    processor = StillImageProcessor(
        images, tokenizer, chat_template=load_chat_template(model) or tokenizer.chat_template,
        stock_class=STOCK_PROCESSORS[family])
    check_probe_images(processor, box_format, model)
    return processor


def find_file(model: str | Path, name: str) -> Path | None:
    """A file of a model folder, or of a hub name (downloaded into its cache); None if it has none.
    """
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)
    return Path(path) if path else None


def load_chat_template(model: str | Path) -> str | None:
    """The chat template that lies beside the tokenizer of a folder or hub name, or None."""
    if path := find_file(model, "chat_template.jinja"):
        return path.read_text()
    if path := find_file(model, "chat_template.json"):
        return json.loads(path.read_text())["chat_template"]
    return None


def check_probe_images(processor: StillImageProcessor, box_format: BoxFormat,
                       model: str | Path) -> None:
    """Raise ValueError unless images below, between and above the pixel limits come out at the size
    that boxes are computed for.
    """
    low, high = box_format.min_pixels, box_format.max_pixels
    areas = (low / 2, math.sqrt(low * high), 2 * high)
    sizes = [(math.ceil(math.sqrt(area * 4 / 3)), math.ceil(math.sqrt(area * 3 / 4)))
             for area in areas]
    images = [Image.new("RGB", size) for size in sizes]
    try:
        grids = processor.image_processor(images, return_tensors="pt")["image_grid_thw"]
        check_image_grids(processor, grids, sizes, box_format)
    except ValueError as error:
        raise ValueError(f"{model}: {error}; mend do_resize, patch_size and merge_size in its "
                         "preprocessor_config.json") from error


def check_image_grids(processor: StillImageProcessor, grid_thw: torch.Tensor | None,
                      sizes: list[tuple[int, int]], box_format: BoxFormat) -> None:
    """Raise ValueError unless every image of a batch is seen at the size that its boxes are
    computed for.

    grid_thw: (images, 3) int, patches of the batch's images; sizes: (width, height) of their
    originals, in order.
    """
    grids = [] if grid_thw is None else grid_thw.tolist()
    if len(grids) != len(sizes):
        raise ValueError(f"the batch holds {len(sizes)} images but {len(grids)} image grids; "
                         "images were lost on the way")
    patch = processor.image_processor.patch_size
    factor = patch * processor.image_processor.merge_size
    for number, ((_, rows, columns), size) in enumerate(zip(grids, sizes, strict=True), 1):
        seen = columns * patch, rows * patch
        computed = seen_size(size, box_format, factor)
        if box_format.coordinates == Coordinates.ABSOLUTE:
            computed = coordinate_size(size, Coordinates.ABSOLUTE, box_format)
        if seen != computed:
            raise ValueError(
                f"image {number} of {size[0]}x{size[1]} px reaches the model at "
                f"{seen[0]}x{seen[1]} px, but boxes are computed for "
                f"{computed[0]}x{computed[1]} px (min_pixels {box_format.min_pixels}, max_pixels "
                f"{box_format.max_pixels})")


def resolve_model(model: str) -> str | Path:
    """"tiny" stands for the base that mig_kit ships; a folder or a hub name stands for itself."""
    return TINY_BASE if model == "tiny" else model


def check_model_folder(model: str | Path) -> None:
    """Raise FileNotFoundError with one sentence when a local folder lacks what loading needs; hub
    names pass.
    """
    path = Path(model)
    if not path.exists():
        could_be_hub_name = os.sep not in str(model) or str(model).count("/") == 1
        if str(model).startswith(".") or not could_be_hub_name:
            raise FileNotFoundError(f"no model folder at {model}; run the stage that makes it, or "
                                    "give a hub name")
        return
    names = {entry.name for entry in path.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        raise FileNotFoundError(f"{model} holds an adapter, not a model; merge it into its base "
                                "first (stage 03)")
    if not any(name.endswith(".safetensors") for name in names):
        raise FileNotFoundError(f"{model} holds no *.safetensors; only safetensors weights are "
                                "loaded, so convert them")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if name not in names:
            raise FileNotFoundError(f"{model} has no {name}; copy it from the model that this one "
                                    "was made from")


def load_config(model: str | Path):
    """The configuration of a folder or hub name.

    ValueError unless its model_type is one of FAMILIES and its weights are full; FileNotFoundError
    where there is no such folder and the hub gives none.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        cause = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {model}, and the hub gave no model of this name ({cause}); "
            "give a folder, or a hub name such as Qwen/Qwen2.5-VL-7B-Instruct") from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"{model} is a {config.model_type}; the kit loads {', '.join(FAMILIES)}")
    if "quantization_config" in config.to_dict():
        raise ValueError(f"{model} holds quantised weights, which are neither what training saw "
                         "nor what a merge gives; give the full weights (stage 03 writes them)")
    return config


class PatchProduct(torch.nn.Module):
    """The vision tower's first layer as a matrix product over the weights of its convolution.

    The kernel covers a whole patch, so that both compute the same, and a convolution is slower. The
    parameters keep the convolution's names and shapes: checkpoints stay the same.
    """

    def __init__(self, convolution: torch.nn.Conv3d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches: (patches, channels, frames, height, width) of the kernel's size -> (patches,
        width of the tower).
        """
        weight = self.weight.flatten(1)
        return torch.nn.functional.linear(patches.flatten(1), weight, self.bias)


def load_model(model: str | Path, hardware: Hardware,
               four_bit: bool = False) -> VisionLanguageModel:
    """A model of one of FAMILIES from a folder or hub name, in eval mode, on hardware.device.

    four_bit: NF4 with double quantisation; the vision tower and the head stay in hardware.dtype.
    """
    check_model_folder(model)
    config, quantization = load_config(model), None
    if four_bit:
        bf16_products = hardware.device == "cuda" or hardware.autocast
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16_products else torch.float32,
            llm_int8_skip_modules=FULL_PRECISION_MODULES)
    weights = FAMILIES[config.model_type].from_pretrained(
        model,
        config=config,
        dtype=hardware.dtype,
        attn_implementation=hardware.attention,
        quantization_config=quantization,
        device_map=hardware.device,
        use_safetensors=True)
    patch_embed = weights.model.visual.patch_embed
    patch_embed.proj = PatchProduct(patch_embed.proj)
    return protect_4bit_weights(weights.eval())


@dataclass
class Policy:
    """A model with all that it needs to read prompts and write replies.

    processor: its folder's, with the pixel limits of box_format. hardware: where the model lies and
    in which numbers it computes. box_format: how it sees images and writes boxes.
    """

    model: VisionLanguageModel | PeftModel
    processor: StillImageProcessor
    hardware: Hardware
    box_format: BoxFormat


def load_policy(folder: str | Path, hardware: Hardware, box_format: BoxFormat,
                four_bit: bool = False) -> Policy:
    """The model and the processor of a folder or hub name; raises what load_model and
    load_processor raise.
    """
    model = load_model(folder, hardware, four_bit)
    return Policy(model, load_processor(folder, box_format), hardware, box_format)


def protect_4bit_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Put the 4-bit layers alone in train mode, where they compute the same and leave their weights
    alone.

    In eval mode, on CPUs with avx512_bf16, a 4-bit layer repacks its weights in place at its first
    use; merging it or training it afterwards gives garbage. Call it after whatever puts the whole
    model in eval mode.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()
    return model


def list_adapted_modules(model: torch.nn.Module) -> list[str]:
    """Full names of the modules that carry a LoRA adapter."""
    return sorted(name for name, module in model.named_modules()
                  if "lora_A" in dict(module.named_children()))


def check_adapters(model: torch.nn.Module) -> list[str]:
    """The adapted modules; raises ValueError if one lies outside the language model or a projection
    was missed.
    """
    names = list_adapted_modules(model)
    outside = [name for name in names if "language_model" not in name]
    layers = sum(name.endswith(".self_attn") and "language_model" in name
                 for name, _ in model.named_modules())
    if outside:
        raise ValueError(f"LoRA landed outside the language model ({outside[0]}); "
                         "use models.LORA_TARGETS")
    if len(names) != 7 * layers:
        raise ValueError(f"LoRA is on {len(names)} projections, expected {7 * layers}; "
                         "use models.LORA_TARGETS")
    return names


def check_tokens(processor: StillImageProcessor, batch: dict) -> None:
    """Raise ValueError unless the batch's image tokens equal its image features and its rows are
    padded on the left.

    TRL drops all images of a batch whose counts disagree and goes on training blind; this check
    comes first.
    """
    if processor.tokenizer.padding_side != "left":
        raise ValueError("the tokenizer pads on the right; "
                         "set processor.tokenizer.padding_side = 'left'")
    tokens = int((batch["input_ids"] == processor.image_token_id).sum())
    grid = batch.get("image_grid_thw")
    patches = 0 if grid is None else int(grid.prod(-1).sum())
    features = patches // processor.image_processor.merge_size**2
    if tokens != features:
        raise ValueError(
            f"the prompt holds {tokens} image tokens but the images give {features} features; "
            "the images of a sample and its placeholders disagree, or tokens were cut")


def save_model(model, processor: StillImageProcessor, folder: Path, base: str | Path) -> None:
    """Write a model folder that opens like its base: weights, config, image settings, and the files
    of `base` that training does not change.

    base: the folder or hub name that the model was made from. The image settings hold the pixel
    limits that the model was trained with.
    """
    model = unwrap_peft(model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, safe_serialization=True)
    for name in UNCHANGED_FILES:
        if path := find_file(base, name):
            shutil.copyfile(path, Path(folder) / name)
    processor.save_image_settings(Path(folder))


def unwrap_peft(model):
    """The vision-language model itself, without a PEFT wrapper."""
    return model.base_model.model if "base_model" in dict(model.named_children()) else model


def tiny_config(vocab_size: int, hidden: int = TINY_HIDDEN, layers: int = 5,
                vision_hidden: int = TINY_VISION_HIDDEN,
                vision_layers: int = 4) -> Qwen2_5_VLConfig:
    """The tiny Qwen2.5-VL. Widths are multiples of 64, the block size of NF4; heads are 32 wide."""
    heads = hidden // 32
    text_config = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 11 // 256) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0,
                         "mrope_section": [4, 6, 6]},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0)
    vision_config = dict(
        depth=vision_layers,
        hidden_size=vision_hidden,
        intermediate_size=vision_hidden * 2,
        num_heads=vision_hidden // 32,
        out_hidden_size=hidden,
        fullatt_block_indexes=list(range(vision_layers)))
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True)
