"""What the shared-prefix trainer cannot do as stock TRL does, each with its remedy, and a check of
the rest: shared passes and decoder against the model's own passes, as stock TRL runs them.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch.nn.functional import pad
from trl import GRPOTrainer

from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import (
    SamplingOptions,
    draw_completions,
    end_token_ids,
    forbidden_token_ids,
)
from mig_kit.shared_prefix.prefixes import pad_rows
from mig_kit.shared_prefix.prompt_cache import FAMILIES, tower_digest, unwrap_peft

# PEFT's methods that replace layers one by one, so that any order of passes computes the same
LAYERWISE_PEFT = ("ADALORA", "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
                  "LORA", "MISS", "OFT", "ROAD", "SHIRA", "VBLORA", "VERA")
LANGUAGE_LAYERS = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # target_modules without tower
# hooks that change no number: gradient checkpointing's, and those that keep outputs
HARMLESS_HOOKS = ("make_inputs_require_grads", "output_capturing_hook")
# options of generation that the kit's decoder has, or that mean nothing to it
KNOWN_SAMPLING = {"max_new_tokens", "min_new_tokens", "temperature", "top_p", "do_sample",
                  "pad_token_id", "bos_token_id", "eos_token_id", "disable_compile", "use_cache",
                  "max_length", "transformers_version", "_from_model_config", "suppress_tokens"}
# By how much values may differ from stock TRL's: log-probabilities in the mean and of the worst
# token, and gradients. In bfloat16 a logit of 16 to 32 is rounded to a multiple of 1/8: random
# models of the 3B's and the 7B's shape differ by 0.02 to 0.06 in the mean.
LIMITS_FLOAT32, LIMITS_16_BITS = (1e-4, 1e-4, 1e-3), (0.15, 1.0, 0.2)
CHECKED_TOKENS = 32  # of each completion that the self-check draws
ADAPTER_STD = 0.5  # times sqrt(rank), of an adapter's zeros while it is checked


def find_early_obstacle(model, args) -> str:
    """`find_obstacle` for what is known before the model is loaded, if `model` is its name."""
    options = (args.model_init_kwargs if args else None) or {}
    attention = (options.get("attn_implementation", "") if isinstance(model, str)
                 else model.config._attn_implementation)
    if "flash" in str(attention):
        return f"{attention} cannot attend in groups; load the model with sdpa"
    split = [name for name in ("deepspeed", "fsdp") if args and getattr(args, name, None)
             or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"]
    if split:
        return "DeepSpeed and FSDP split the weights that shared passes read; use DDP"
    return ("noise on embeddings (neftune_noise_alpha) differs from row to row"
            if args and args.neftune_noise_alpha else "")


def find_obstacle(trainer: GRPOTrainer) -> str:
    """Why no pass can be shared, with a remedy; "" if all can."""
    model = unwrap_peft(trainer.model)
    family = model.config.model_type
    used = [name for name in ("tools", "environment_factories", "rollout_func")
            if getattr(trainer, name)]
    if family not in FAMILIES:
        return f"{family} is none of {', '.join(FAMILIES)}"
    if used:
        return f"{used[0]} adds tokens to completions"
    if trainer.processor.image_token_id is None:
        return "the tokenizer lacks the tokens of images; take the model's own"
    if trainer.aux_loss_enabled:
        return ("the load-balancing loss of experts needs whole rows; do without it with "
                "router_aux_loss_coef 0.0")
    if trainer._entropy_bonus_enabled:
        return "entropy_coef and use_adaptive_entropy need gradients of entropies"
    if any(getattr(trainer._tokenizer, name, None)
           for name in ("response_template", "response_schema")):
        return "the tokenizer parses responses with their prompts"
    template = str(trainer.chat_template or trainer.processing_class.chat_template)
    unread = [name for name in trainer.chat_template_kwargs if name not in template]
    if unread:
        return f"chat_template_kwargs has {unread[0]}, which the chat template does not read"
    if trainer.ref_model is not None and tower_digest(
            trainer.accelerator.unwrap_model(trainer.ref_model)) != tower_digest(model):
        return "the reference has another vision tower; start from the model that is its reference"
    if is_peft_model(trainer.model):
        config = trainer.model.active_peft_config
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind not in LAYERWISE_PEFT or getattr(config, "alora_invocation_tokens", None):
            return f"{kind} of PEFT acts on whole rows, or was not tried; use LoRA"
        if getattr(config, "bias", "none") == "all":
            return 'bias="all" trains the vision tower; set it to "lora_only"'
    return find_late_obstacle(trainer.model)


def find_late_obstacle(model: torch.nn.Module) -> str:
    """`find_obstacle` for what may change during training: hooks, and whether the tower is trained.
    """
    model = unwrap_peft(model)
    trained = [name for name, parameter in model.model.visual.named_parameters()
               if parameter.requires_grad]
    if any("lora_" in name for name in trained):
        return f'adapters reach the vision tower; set target_modules to r"{LANGUAGE_LAYERS}"'
    if trained:
        return ("the vision tower is trained; freeze it with "
                "model.model.visual.requires_grad_(False) before the trainer is made")
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(),
                 *module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if any(getattr(hook, "__name__", "") not in HARMLESS_HOOKS for hook in hooks):
            return f"a hook on {name or 'the model'} acts on whole rows; remove it"
    return ""


def find_sampling_obstacle(trainer: GRPOTrainer) -> str:
    """A sampling option that the kit's decoder lacks; "" if there is none, or if vLLM draws."""
    if trainer.use_vllm:
        return ""
    model = unwrap_peft(trainer.model)
    config = trainer.generation_config
    options = {name: value for own in (model.generation_config, config)
               for name, value in own.to_dict().items() if value is not None}
    neutral = config._get_default_generation_params() | {"top_k": 0, "repetition_penalty": 1.0}
    lacking = [name for name, value in options.items() if name not in KNOWN_SAMPLING
               and value is not False and value != neutral.get(name)]
    if (config.suppress_tokens or []) not in ([], [model.config.image_token_id]):
        lacking.append("suppress_tokens")
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        lacking.append("sliding windows of attention")
    if trainer.use_transformers_continuous_batching:
        lacking.append("use_transformers_continuous_batching")
    return ", ".join(sorted(lacking))


@contextmanager
def _checking_mode(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; what an adapter has of zeros is random."""
    generator = torch.Generator().manual_seed(0)
    blank = [parameter for parameter in model.parameters()
             if parameter.requires_grad and not parameter.any()]
    with evaluation_mode(model):
        for parameter in blank:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(values * ADAPTER_STD / parameter.shape[-1] ** 0.5)
        try:
            yield
        finally:
            for parameter in blank:
                parameter.data.zero_()


def compare_with_stock(trainer, numbers: list[int],
                       tokenize: Callable[[list[int]], tuple]) -> list[tuple]:
    """Compare passes and decoder with the model's own passes, for two prompts.

    Args:
        tokenize: makes of prompts' numbers what TRL does: ids, images, further inputs.
    Returns: (what is compared, where, by how much it differs, by how much it may) of each.
    """
    model, device = trainer.model, trainer.accelerator.device
    # the gradients of two equal completions of one token would cancel
    length = max(2, min(trainer.max_completion_length, CHECKED_TOKENS))
    own_ids = [prompt.ids.tolist() for prompt in trainer._prompts_of(numbers)]
    inputs = tokenize(numbers)
    if own_ids != [list(row) for row in inputs[0]]:
        return [("tokens of a prompt", "", float("inf"), 0)]
    is_reentrant = (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    is_checkpointed = model.training and not is_reentrant  # which gives no single gradients
    with _checking_mode(model):
        drawn, drawn_logps = (values.to(device) for values in _draw(trainer, numbers, length))
        # in each group a completion with another one before it, which it must not see
        rows = torch.stack([drawn.flip(1), drawn], 1).flatten(0, 1)
        rows_of = torch.tensor(numbers, device=device).repeat_interleave(2)
        with torch.no_grad():
            own, of_learner = (
                trainer._logps(model, rows_of, rows, torch.ones_like(rows), temperature)[0][1::2]
                for temperature in (trainer.temperature, 1.0))
            stock, below = _stock_logps(trainer, inputs, drawn)
        gaps = {"log-probabilities": (own - stock).abs()}
        if not trainer.draws_elsewhere():
            gaps |= {"the decoder's choices": below,
                     "the decoder's log-probabilities": (drawn_logps - of_learner).abs()}
        language = unwrap_peft(model).model.language_model
        for module in (language, *language.layers):  # which look at it to checkpoint, and no more
            module.training = is_checkpointed
        gradients = max(_gradient_gaps(trainer, numbers[-1], rows[-2:], tokenize))
    in_16_bits = trainer.args.bf16 or trainer.args.fp16 or any(  # an adapter on 4 bits, too
        parameter.is_floating_point() and parameter.dtype.itemsize == 2
        for parameter in model.parameters())
    mean, largest, of_gradients = LIMITS_16_BITS if in_16_bits else LIMITS_FLOAT32
    checks = []
    for what, gap in gaps.items():
        checks += [(what, "in the mean", gap.mean().item(), mean),
                   (what, "at the worst token", gap.max().item(), largest)]
    return [*checks, ("gradients", "of a parameter of each kind", gradients, of_gradients)]


def _draw(trainer, numbers: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts, length) ids and log-probabilities at temperature 1: the decoder's second greedy
    completions, or any ids and zeros if others draw.
    """
    if trainer.draws_elsewhere():
        ids = torch.randint(20, 100, (len(numbers), length),
                            generator=torch.Generator().manual_seed(0))
        return ids, torch.zeros(ids.shape)
    sampling = SamplingOptions(0.0, max_new_tokens=length, min_new_tokens=length + 1)
    rollouts = draw_completions(trainer.accelerator.unwrap_model(trainer.model), trainer.processor,
                                trainer._prompts_of(numbers), 2, sampling,
                                autocast=trainer.autocasts)
    second = [completions[-1] for completions in rollouts]
    return (torch.tensor([completion.ids for completion in second]),
            torch.tensor([completion.logps for completion in second]))


def _stock_logps(trainer, inputs: tuple, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `drawn` (rows, tokens) behind prompts: log-probabilities, and by how much logits are below
    those of the tokens that the model would choose.
    """
    ids, _, fields = inputs
    device, longest, length = drawn.device, max(map(len, ids)), drawn.shape[1]

    def pad_left(rows):
        return pad_rows([torch.as_tensor(row) for row in rows], longest, on_left=True).to(device)

    fields = {name: pad(pad_left(value), (0, length)) if name == "mm_token_type_ids" else
              torch.as_tensor(np.array(value), device=device) for name, value in fields.items()}
    mask = pad(pad_left([[1] * len(row) for row in ids]), (0, length), value=1)
    with trainer.accelerator.autocast():
        logits = trainer.model(
            input_ids=torch.cat([pad_left(ids), drawn], 1), attention_mask=mask, use_cache=False,
            logits_to_keep=length + 1, **fields).logits[:, :-1].float()
    tokens = drawn[..., None]
    logps = (logits / trainer.temperature).log_softmax(-1).gather(2, tokens)[..., 0]
    logits = logits.detach().clone()
    logits[..., forbidden_token_ids(trainer.processor) + end_token_ids(
        unwrap_peft(trainer.model).generation_config, trainer.processor)] = -torch.inf
    return logps, logits.amax(-1) - logits.gather(2, tokens)[..., 0]


def _gradient_gaps(trainer, number: int, rows: torch.Tensor, tokenize: Callable) -> list[float]:
    """For a parameter of each kind, by how much its gradient differs from stock's, of its norm."""
    first: dict[str, torch.nn.Parameter] = {}  # of each kind
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            first.setdefault(re.sub(r"\d+", "", name), parameter)
    weights = torch.linspace(-1, 1, rows.numel(), device=rows.device).view(rows.shape)
    numbers = torch.full((len(rows),), number, device=rows.device)
    with torch.enable_grad():
        both = (trainer._logps(trainer.model, numbers, rows, torch.ones_like(rows))[0],
                _stock_logps(trainer, tokenize([number] * len(rows)), rows)[0])
        own, stock = (torch.autograd.grad((logps * weights).sum(), list(first.values()),
                                          allow_unused=True, materialize_grads=True)
                      for logps in both)
    norms = [gradient.norm().item() for gradient in stock]
    # a bias of keys has no gradient but for rounding
    return [(left - right).norm().item() / (norm + 1e-3 * max(norms) or 1)
            for left, right, norm in zip(own, stock, norms)]
