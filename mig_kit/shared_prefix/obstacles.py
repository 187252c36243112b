"""What the shared-prefix trainer cannot do as stock TRL does, each with its remedy."""

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer

from mig_kit.shared_prefix.prompt_cache import FAMILIES, unwrap_peft

# PEFT's methods that replace layers one by one, so that any order of passes computes the same
LAYERWISE_PEFT = ("ADALORA", "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
                  "LORA", "MISS", "OFT", "ROAD", "SHIRA", "VBLORA", "VERA")
LANGUAGE_LAYERS = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # target_modules without tower


def find_obstacle(trainer: GRPOTrainer) -> str:
    """Why no pass can be shared, with a remedy; "" if all can."""
    model = unwrap_peft(trainer.model)
    family, attention = model.config.model_type, model.config._attn_implementation
    used = [name for name in ("tools", "environment_factories", "rollout_func")
            if getattr(trainer, name)]
    if family not in FAMILIES:
        return f"{family} is none of {', '.join(FAMILIES)}"
    if used:
        return f"{used[0]} adds tokens to completions"
    if "flash" in str(attention):
        return f"{attention} takes no mask of groups; load the model with sdpa"
    if trainer.aux_loss_enabled:
        return ("the load-balancing loss of experts needs whole rows; do without it with "
                "router_aux_loss_coef 0.0")
    if trainer._entropy_bonus_enabled:
        return "entropy_coef and use_adaptive_entropy need gradients of entropies"
    if any(getattr(trainer._tokenizer, name, None)
           for name in ("response_template", "response_schema")):
        return "the tokenizer parses responses with their prompts"
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "DeepSpeed and FSDP split the weights that shared passes read; use DDP"
    if is_peft_model(trainer.model):
        config = trainer.model.active_peft_config
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind not in LAYERWISE_PEFT or getattr(config, "alora_invocation_tokens", None):
            return f"{kind} of PEFT acts on whole rows, or was not tried; use LoRA"
    return ""


def find_trained_tower(model: torch.nn.Module) -> str:
    """How to freeze the vision tower, if it is trained; else ""."""
    trained = [name for name, parameter in unwrap_peft(model).model.visual
               .named_parameters() if parameter.requires_grad]
    if any("lora_" in name for name in trained):
        return f'adapters reach the vision tower; set target_modules to r"{LANGUAGE_LAYERS}"'
    return ("the vision tower is trained; freeze it with "
            "model.model.visual.requires_grad_(False) before the trainer is made"
            if trained else "")


def find_sampling_obstacle(trainer: GRPOTrainer) -> str:
    """A sampling option that the kit's decoder lacks; "" if there is none."""
    args, extra = trainer.args, set(trainer.args.generation_kwargs or {}) - {"min_new_tokens"}
    options = {"top_k": args.top_k, "min_p": args.min_p,
               "repetition_penalty": args.repetition_penalty != 1,
               "cache_implementation": args.cache_implementation,
               "use_transformers_continuous_batching":
                   trainer.use_transformers_continuous_batching}
    return ", ".join([name for name, is_set in options.items() if is_set] + sorted(extra))
