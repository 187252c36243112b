"""What the shared-prefix trainer cannot do as stock TRL does, each with its remedy, and a check of
the rest: shared passes and decoder against the model's own forward pass, as stock TRL runs it.
"""

import torch
from accelerate.utils import is_peft_model
from torch.nn.functional import pad
from trl import GRPOTrainer

from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import (
    SamplingOptions,
    end_token_ids,
    forbidden_token_ids,
    generate_rollouts,
)
from mig_kit.shared_prefix.prefixes import pad_rows
from mig_kit.shared_prefix.prompt_cache import FAMILIES, unwrap_peft

# PEFT's methods that replace layers one by one, so that any order of passes computes the same
LAYERWISE_PEFT = ("ADALORA", "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
                  "LORA", "MISS", "OFT", "ROAD", "SHIRA", "VBLORA", "VERA")
LANGUAGE_LAYERS = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # target_modules without tower
# By how much log-probabilities may differ from stock TRL's. In bfloat16 a logit of 16 to 32 is
# rounded to a multiple of 1/8: random models of the 3B's and the 7B's shape differ by 0.02 to 0.06
# in the mean. A lost image or a wrong mask moves single tokens by whole units.
MAX_DIFFERENCE_FLOAT32, MEAN_DIFFERENCE_16_BITS = 1e-4, 0.15
CHECKED_TOKENS = 32  # of each completion that the self-check draws


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


@torch.no_grad()
def compare_with_stock(trainer, numbers: list[int]) -> tuple[torch.Tensor, float]:
    """((2,) gaps between greedy completions to two prompts and the model's own forward pass, in
    log-probability and in logits below the token that the model would choose; their limit).

    In 16 bits a gap is the mean over all tokens, else the largest.
    """
    model, device = trainer.model, trainer.accelerator.device
    length = min(trainer.max_completion_length, CHECKED_TOKENS)
    sampling = SamplingOptions(0.0, max_new_tokens=length, min_new_tokens=length + 1)
    ids, _, inputs = trainer._stock_inputs(numbers)
    types = inputs.pop("mm_token_type_ids")
    longest = max(map(len, ids))
    prompt_ids, types, mask = (
        pad_rows([torch.tensor(row) for row in rows], longest, on_left=True).to(device)
        for rows in (ids, types, [[1] * len(row) for row in ids]))
    with evaluation_mode(model):  # without dropout
        rollouts = generate_rollouts(
            trainer.accelerator.unwrap_model(model), trainer.processor,
            trainer._prompts_of(numbers), 2, sampling, autocast=trainer.autocasts)
        drawn = torch.tensor([completions[-1] for completions in rollouts], device=device)
        # in each group a completion with another one before it, which it must not see
        rows = torch.stack([drawn.flip(1), drawn], 1).flatten(0, 1)
        own = trainer._logps(model, torch.tensor(numbers).repeat_interleave(2).to(device), rows,
                             torch.ones_like(rows))[0][1::2]
        with trainer.accelerator.autocast():
            logits = model(
                input_ids=torch.cat([prompt_ids, drawn], 1),
                attention_mask=pad(mask, (0, length), value=1),
                mm_token_type_ids=pad(types, (0, length)), use_cache=False,
                logits_to_keep=length + 1, **inputs).logits[:, :-1].float()
    tokens = drawn[..., None]
    stock = (logits / trainer.temperature).log_softmax(-1).gather(2, tokens)[..., 0]
    logits[..., forbidden_token_ids(trainer.processor) + end_token_ids(
        unwrap_peft(model).generation_config, trainer.processor)] = -torch.inf
    below = logits.amax(-1) - logits.gather(2, tokens)[..., 0]
    gaps = torch.stack([(own - stock).abs(), below]).flatten(1)
    in_16_bits = trainer.args.bf16 or trainer.args.fp16 or any(  # an adapter on 4 bits, too
        parameter.is_floating_point() and parameter.dtype.itemsize == 2
        for parameter in model.parameters())
    return ((gaps.mean(1), MEAN_DIFFERENCE_16_BITS) if in_16_bits
            else (gaps.amax(1), MAX_DIFFERENCE_FLOAT32))
