"""What the shared-prefix trainer cannot do as stock TRL does, and a check of the rest: shared
passes against TRL's own method, and the decoder against shared passes.
"""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
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
# token, and gradients, of a completion and of an update, in which they cancel. In bfloat16 a logit
# of 16 to 32 is rounded to a multiple of 1/8: random models of the 3B's and the 7B's shape differ
# by 0.02 to 0.06 in the mean.
LIMITS_FLOAT32, LIMITS_16_BITS = (1e-4, 1e-3, 1e-3, 1e-3), (0.15, 1.0, 0.2, 0.5)
ROW = "row"  # in a batch, places of its completions' prompts among those of the update
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


def has_dropout(trainer: GRPOTrainer) -> bool:
    """Does the language model or an adapter have dropout?"""
    configs = [unwrap_peft(trainer.model).config.get_text_config(),
               *getattr(trainer.model, "peft_config", {}).values()]
    return any("dropout" in name and value for config in configs
               for name, value in vars(config).items())


def can_learn_from_draw(trainer: GRPOTrainer) -> bool:
    """Is a prompt the same to the learner as to the decoder: one update of each draw, no dropout?
    """
    args = trainer.args
    return not (has_dropout(trainer) or args.fp16
                or has_linear_attention(unwrap_peft(trainer.model))
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


def run_self_check(trainer, when: str, is_whole: bool, is_due: bool) -> str:
    """Compare an update with stock TRL's; print how far it is if a check is due or fails, and
    return what is too much, or "".

    Its gradients are compared whole, or it is compared by a completion of each group; if no check
    is due, only of the groups whose number of images or length is new.
    """
    start = time.perf_counter()
    rows = _choose_rows(trainer, is_due)
    if not rows and not is_due:
        return ""
    has_16_bits = trainer.args.bf16 or trainer.args.fp16 or any(  # an adapter on 4 bits, too
        parameter.is_floating_point() and parameter.dtype.itemsize == 2
        for parameter in trainer.model.parameters())
    checks = _compare(trainer, rows, is_whole, is_due, has_16_bits)
    failure = next((f"{what} at {when} are {gap:.2g} from stock TRL's {where}, more than {limit}; "
                    "training goes on with stock passes" for what, where, gap, limit in checks
                    if not gap <= limit), "")  # NaN, too
    if trainer.args.should_log and (is_due or failure):
        print(f"self-check at {when}: by how much passes differ from stock TRL's: " + ", ".join(
            f"{what} {where} {gap:.1e} (of {limit} allowed)" for what, where, gap, limit in checks)
            + f"; {time.perf_counter() - start:.1f} s", flush=True)
    return failure


def _choose_rows(trainer, is_due: bool) -> list[int]:
    """A random completion of each group, unless a check is due only of those of a new shape."""
    groups: dict[int, list[int]] = {}
    for row, part in trainer.read.items():
        if len(part.ids):
            groups.setdefault(part.number, []).append(row)
    random, rows = Random(trainer.state.global_step), []
    for number, group in groups.items():
        longest = max(len(trainer.read[row].ids) for row in group)
        shape = len(trainer.sources[number].sizes), longest.bit_length()
        if is_due or shape not in trainer.checked_shapes:
            rows.append(random.choice(group))
        trainer.checked_shapes.add(shape)
    return sorted(rows)


def _compare(trainer, rows: list[int], is_whole: bool, is_due: bool, has_16_bits: bool) -> list:
    """(what is compared, where, by how much it differs, by how much it may) of each."""
    mean, largest, of_one, of_all = LIMITS_16_BITS if has_16_bits else LIMITS_FLOAT32
    read, checks, of_decoder = [trainer.read[row] for row in rows], [], []
    if is_whole and not has_dropout(trainer):
        parameters = [value for value in trainer.model.parameters() if value.requires_grad]
        own = [parameter.grad for parameter in parameters]
        of_learner = trainer.learn_as_stock()
        gap = _difference_of_norm(own, [parameter.grad for parameter in parameters])
        checks.append(("gradients", "of the whole update", gap, of_all))
        for parameter, gradient in zip(parameters, own):
            parameter.grad = gradient
    else:
        completions = {row: trainer.read[row].ids for row in rows}
        with evaluation_mode(trainer.model), torch.no_grad():
            own = [part.logps for part in read] if not has_dropout(trainer) else _score(
                trainer, [part.number for part in read], [part.ids for part in read])
            of_learner = [values - stock for values, (_, stock)
                          in zip(own, trainer.score_as_stock(completions))]
    if trainer.drawn_tokens and not has_dropout(trainer):
        of_decoder.append(torch.tensor(trainer.drawn_tokens)[:, 0])
        if is_due and trainer.draws_from_policy():
            excess = torch.cat([-part.logps - part.entropies for part in trainer.read.values()])
            # what rounding adds, five standard errors, and tokens too rare to have been drawn
            limit = mean**2 + (5 * excess.norm().item() + 70) / len(excess)
            checks.append(("-log p of the tokens drawn", "beside the entropy",
                           abs(excess.mean().item()), round(limit, 3)))
    if is_due and rows:
        gap, of_drawn, gradients = _compare_one(trainer, rows[-1])
        of_learner.append(gap)
        of_decoder += of_drawn
        checks.append(("gradients", "of a parameter of each kind", gradients, of_one))
    for what, gaps in (("the decoder's log-probabilities", of_decoder),
                       ("log-probabilities", of_learner)):
        if gaps:
            gap = torch.cat([part.detach().float().cpu() for part in gaps]).abs()
            # of many tokens in 16 bits one may be rounded far away
            where, worst = (("at 99 % of the tokens", gap.sort()[0][int(0.99 * (len(gap) - 1))])
                            if has_16_bits else ("at the worst token", gap.max()))
            checks[:0] = [(what, "in the mean", gap.mean().item(), mean),
                          (what, where, worst.item(), largest)]
    return checks


def _compare_one(trainer, row: int) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """By how much log-probabilities, the decoder's and gradients of one prompt's completions differ
    without dropout and with an adapter that is not zero.
    """
    model, (number, ids, *_) = trainer.model, trainer.read[row]
    language = unwrap_peft(model).model.language_model
    is_reentrant = (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    with _checking_mode(model), torch.enable_grad():
        drawn = [] if trainer.draws_elsewhere() else _draw(trainer, number)
        # to checkpoint as in training, unless that gives no single gradients
        for module in (language, *language.layers):
            module.training = not is_reentrant
        # with another one before it, which it must not see
        rows = [ids.flip(0), ids, *(ids.new_tensor(completion.ids) for completion in drawn)]
        _, own, *others = _score(trainer, [number] * len(rows), rows)
        (_, stock), = trainer.score_as_stock({row: ids})
        return (own - stock, [values - values.new_tensor(completion.logps)
                              for values, completion in zip(others, drawn)],
                max(_gradient_gaps(model, own, stock)))


def _score(trainer, numbers: list[int], completions: list[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities (tokens,) of each completion by shared passes."""
    lengths = list(map(len, completions))
    ids, mask = (pad_rows(rows, pad_to_multiple(max(lengths))) for rows in (
        completions, list(map(torch.ones_like, completions))))
    logps, _ = trainer._logps(trainer.model, ids.new_tensor(numbers), ids, mask)
    return [row[:length] for row, length in zip(logps, lengths)]


@contextmanager
def reading_images_once(model: torch.nn.Module) -> Iterator[None]:
    """Let passes over the same pixels compute their features at the first one alone."""
    inner, last = unwrap_peft(model).model, []
    read = inner.get_image_features

    def recall(pixel_values: torch.Tensor, *args, **kwargs):
        if not last or last[0].data_ptr() != pixel_values.data_ptr():
            with torch.no_grad():
                last[:] = pixel_values, read(pixel_values, *args, **kwargs)
        return last[1]

    with patch.object(inner, "get_image_features", recall):
        yield


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


def _difference_of_norm(own: list, stock: list) -> float:
    """By how much gradients differ in all, of stock's norm; None: a parameter has none."""
    squares = torch.zeros(2, dtype=torch.float64)  # of the difference, and of stock's
    for pair in zip(own, stock):
        left, right = (torch.zeros(()) if part is None else part.float() for part in pair)
        squares += torch.tensor([(left - right).norm() ** 2, right.norm() ** 2])
    difference, norm = squares.sqrt().tolist()
    return difference / (norm or 1)
