"""What the shared-prefix trainer cannot do as stock TRL does, and a check of the rest: shared
passes against TRL's own method, and the decoder against shared passes.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer

from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import (
    Completion,
    SamplingOptions,
    draw_completions,
    draw_uniforms,
    read_sampling_options,
)
from mig_kit.shared_prefix.prefixes import has_linear_attention, pad_rows, pad_to_multiple
from mig_kit.shared_prefix.prompt_cache import FAMILIES, tower_digest, unwrap_peft

# PEFT's methods that replace layers one by one, so that any order of passes computes the same
LAYERWISE_PEFT = ("ADALORA", "BOFT", "C3A", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
                  "LORA", "MISS", "OFT", "ROAD", "SHIRA", "VBLORA", "VERA")
LANGUAGE_LAYERS = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # target_modules without tower
# hooks that change no number: gradient checkpointing's, and those that keep outputs
HARMLESS_HOOKS = ("make_inputs_require_grads", "output_capturing_hook")
# By how much values may differ from stock TRL's: log-probabilities in the mean and of the worst
# token, and gradients. In bfloat16 a logit of 16 to 32 is rounded to a multiple of 1/8: random
# models of the 3B's and the 7B's shape differ by 0.02 to 0.06 in the mean.
LIMITS_FLOAT32, LIMITS_16_BITS = (1e-4, 1e-3, 1e-3), (0.15, 1.0, 0.2)
CHECKED_TOKENS = 16  # of each completion that the self-check draws
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
    model, config = unwrap_peft(trainer.model), trainer.generation_config
    _, lacking = read_sampling_options(model.generation_config.to_dict(), config.to_dict())
    if (config.suppress_tokens or []) not in ([], [model.config.image_token_id]):
        lacking.append("suppress_tokens")
    as_trl = {"do_sample": True, "eos_token_id": trainer.eos_token_ids}
    lacking += [name for name, value in as_trl.items() if getattr(config, name) != value]
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        lacking.append("sliding windows of attention")
    if trainer.use_transformers_continuous_batching:
        lacking.append("use_transformers_continuous_batching")
    return ", ".join(sorted(lacking))


def can_learn_from_draw(trainer: GRPOTrainer) -> bool:
    """Is a prompt the same to the learner as to the decoder: one update of each draw, no dropout?
    """
    args, model = trainer.args, unwrap_peft(trainer.model)
    configs = [model.config.get_text_config(), *getattr(trainer.model, "peft_config", {}).values()]
    has_dropout = any("dropout" in name and value for config in configs
                      for name, value in vars(config).items())
    return not (has_dropout or args.fp16 or has_linear_attention(model)
                or trainer.num_iterations > 1
                or args.steps_per_generation > args.gradient_accumulation_steps)


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


def run_self_check(trainer, when: str, *rows) -> str:
    """Print what `compare_with_stock` finds for rows; a sentence on what is too much, or ""."""
    start = time.perf_counter()
    checks = compare_with_stock(trainer, *rows)
    if trainer.args.should_log:
        print(f"self-check at {when}: by how much passes differ from stock TRL's: " + ", ".join(
            f"{what} {where} {gap:.1e} (of {limit} allowed)" for what, where, gap, limit in checks)
            + f"; {time.perf_counter() - start:.1f} s", flush=True)
    return next((f"{what} at {when} are {gap:.2g} from stock TRL's {where}, more than {limit}; "
                 "training goes on with stock passes" for what, where, gap, limit in checks
                 if not gap <= limit), "")  # NaN, too


def compare_with_stock(trainer, prompts: list, numbers: list[int], completions: list[list[int]],
                       drawn_logps: list[list[float]] | None) -> list[tuple]:
    """Compare shared passes with TRL's own method, and the decoder with shared passes.

    Shared passes read all rows. TRL's read all completions to the last prompt, and the last one to
    each of the others. Gradients are of the last prompt's longest completion.

    Args:
        prompts: of every row, as TRL has them. numbers: of the prompts, in `trainer.sources`.
        completions: token ids.
        drawn_logps: the decoder's log-probabilities of these tokens; None if others drew.
    Returns: (what is compared, where, by how much it differs, by how much it may) of each.
    """
    model, number = trainer.model, numbers[-1]
    last_rows = {number: row for row, number in enumerate(numbers)}
    inputs = {number: trainer._tokenize_as_stock([prompts[row]], [number])
              for number, row in last_rows.items()}
    own_ids = [prompt.ids.tolist() for prompt in trainer._prompts_of(list(inputs))]
    if own_ids != [list(ids) for (ids,), *_ in inputs.values()]:
        return [("tokens of a prompt", "", float("inf"), 0)]
    language = unwrap_peft(model).model.language_model
    is_reentrant = (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    group = [row for row, other in enumerate(numbers) if other == number]
    longest = max((completions[row] for row in group), key=len)
    with _reading_images_once(model):
        with evaluation_mode(model), torch.no_grad():
            own = _score(trainer, numbers, completions)
            of_learner = [own[row] - trainer.score_as_stock(inputs[numbers[row]], completions[row])
                          for row in sorted({*group, *last_rows.values()})]
        of_decoder = [] if drawn_logps is None else [
            logps - logps.new_tensor(drawn) for logps, drawn in zip(own, drawn_logps)]
        with _checking_mode(model), torch.enable_grad():
            drawn = [] if trainer.draws_elsewhere() else _draw(trainer, number)
            # to checkpoint as in training, unless that gives no single gradients
            for module in (language, *language.layers):
                module.training = not is_reentrant
            # the longest one with another one before it, which it must not see
            rows = [completions[-1], longest, *(completion.ids for completion in drawn)]
            _, own_logps, *of_drawn = _score(trainer, [number] * len(rows), rows)
            stock_logps = trainer.score_as_stock(inputs[number], longest)
            gradients = max(_gradient_gaps(model, own_logps, stock_logps))
    of_learner.append(own_logps - stock_logps)
    of_decoder += [logps - logps.new_tensor(completion.logps)
                   for logps, completion in zip(of_drawn, drawn)]
    in_16_bits = trainer.args.bf16 or trainer.args.fp16 or any(  # an adapter on 4 bits, too
        parameter.is_floating_point() and parameter.dtype.itemsize == 2
        for parameter in model.parameters())
    mean, largest, of_gradients = LIMITS_16_BITS if in_16_bits else LIMITS_FLOAT32
    checks = []
    for what, gaps in (("log-probabilities", of_learner),
                       ("the decoder's log-probabilities", of_decoder)):
        if gaps:
            gap = torch.cat(gaps).detach().abs()
            # of many tokens in 16 bits one may be rounded far away
            worst = ("at 99 % of the tokens", gap.quantile(0.99)) if in_16_bits else (
                "at the worst token", gap.max())
            checks += [(what, "in the mean", gap.mean().item(), mean),
                       (what, worst[0], worst[1].item(), largest)]
    return [*checks, ("gradients", "of a parameter of each kind", gradients, of_gradients)]


@contextmanager
def _reading_images_once(model: torch.nn.Module) -> Iterator[None]:
    """Let passes over the same pixels compute their features at the first one alone."""
    inner, features = unwrap_peft(model).model, {}
    read = inner.get_image_features

    def recall(pixel_values: torch.Tensor, *args, **kwargs):
        place = pixel_values.data_ptr()
        if place not in features:
            features[place] = read(pixel_values, *args, **kwargs)
        return features[place]

    with patch.object(inner, "get_image_features", recall):
        yield


def _score(trainer, numbers: list[int], completions: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities (tokens,) of each completion by shared passes."""
    device, lengths = trainer.accelerator.device, list(map(len, completions))
    ids, mask = (pad_rows(rows, pad_to_multiple(max(lengths))).to(device) for rows in (
        list(map(torch.tensor, completions)),
        [torch.ones(length, dtype=torch.long) for length in lengths]))
    logps, _ = trainer._logps(trainer.model, torch.tensor(numbers, device=device), ids, mask)
    return [row[:length] for row, length in zip(logps, lengths)]


def _draw(trainer, number: int) -> list[Completion]:
    """Two completions of CHECKED_TOKENS tokens to a prompt, always the same, by the decoder."""
    sampling = SamplingOptions(trainer.temperature, max_new_tokens=CHECKED_TOKENS,
                               min_new_tokens=CHECKED_TOKENS + 1)
    return draw_completions(
        trainer.accelerator.unwrap_model(trainer.model), trainer.processor,
        trainer._prompts_of([number]), 2, sampling, draw_uniforms(0, 1, 2, CHECKED_TOKENS),
        trainer.autocasts)[0]


def _gradient_gaps(model: torch.nn.Module, own_logps: torch.Tensor,
                   stock_logps: torch.Tensor) -> list[float]:
    """For a parameter of each kind, by how much its gradient differs from stock's, of its norm."""
    first: dict[str, torch.nn.Parameter] = {}  # of each kind
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first.setdefault(re.sub(r"\d+", "", name), parameter)
    weights = torch.linspace(-1, 1, len(own_logps), device=own_logps.device)
    own, stock = (torch.autograd.grad((logps * weights).sum(), list(first.values()),
                                      allow_unused=True, materialize_grads=True)
                  for logps in (own_logps, stock_logps))
    norms = [gradient.norm().item() for gradient in stock]
    # a bias of keys has no gradient but for rounding
    return [(left - right).norm().item() / (norm + 1e-3 * max(norms) or 1)
            for left, right, norm in zip(own, stock, norms)]
