"""Which parameters of the loss of stage 05 can act together; the others are refused.

With `num_iterations` 1 an update learns once from its replies. The model is then its own old model,
and the ratio of new to old probabilities is exactly 1: no clip can act, and losses that differ only
in what they make of the ratio are the same.
"""

# a loss -> the loss that it is where the ratio is 1
TWINS = {"cispo": "dapo", "vespo": "dapo", "sapo": "grpo",
         "luspo": "dr_grpo times max_completion_length"}
WITHOUT_EPSILON = ("cispo", "sapo", "vespo")  # cispo clips from above alone
WITHOUT_EPSILON_HIGH = ("sapo", "vespo")


def check_loss_params(params: dict, changed: set[str]) -> None:
    """ValueError, a sentence with the remedy, where a parameter of the loss could not act.

    params: all of 05; changed: the names of those that are not at their defaults.
    """
    _check_ranges(params)
    idle = sorted(name for name in changed if name.startswith("vllm_"))
    if idle and not params["server"]:
        raise ValueError(f"{idle[0]} corrects what a server drew, and server is \"\"; name a "
                         f"server, or take {idle[0]} out")
    if params["num_iterations"] == 1:
        _check_single_iteration(params, changed)
    else:
        _check_clips(params, changed)
        _check_sequence_level(params)
    if params["loss_type"] == "bnpo" and params["gradient_accumulation_steps"] == 1:
        raise ValueError("loss_type bnpo is the mean over the tokens of a step, and an update of "
                         "one step makes it dapo; use dapo, or raise gradient_accumulation_steps")


def _check_ranges(params: dict) -> None:
    if params["num_iterations"] < 1:
        raise ValueError(f"num_iterations is {params['num_iterations']}; use 1 or more")
    for name in ("epsilon", "epsilon_high"):
        if params[name] < 0:
            raise ValueError(f"{name} is {params[name]}; use 0 or more")
    if not 0 <= params["top_entropy_quantile"] <= 1:
        raise ValueError(f"top_entropy_quantile is {params['top_entropy_quantile']}; it is a share "
                         "of the tokens: use 0 to 1")


def _check_single_iteration(params: dict, changed: set[str]) -> None:
    """What acts through the ratio alone cannot act where it is 1."""
    reason = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
    loss = params["loss_type"]
    if loss in TWINS:
        raise ValueError(f"{reason}, and loss_type {loss} is then {TWINS[loss]}; use "
                         f"{TWINS[loss].split()[0]}, or set num_iterations to 2 or more")
    if params["importance_sampling_level"] == "sequence":
        raise ValueError(f"{reason}, for a token and for a sequence; set num_iterations to 2 or "
                         "more, or importance_sampling_level to token")
    for name in ("epsilon", "epsilon_high"):
        if name in changed:
            raise ValueError(f"{reason}, so {name} has nothing to clip; set num_iterations to 2 or "
                             f"more, or take {name} out")


def _check_clips(params: dict, changed: set[str]) -> None:
    loss = params["loss_type"]
    for name, losses in (("epsilon", WITHOUT_EPSILON), ("epsilon_high", WITHOUT_EPSILON_HIGH)):
        if loss in losses and name in changed:
            raise ValueError(f"loss_type {loss} does not read {name}; take {name} out, or use "
                             "another loss_type")
    highest = params["epsilon_high"] or params["epsilon"]
    if loss == "cispo" and highest < 1:
        raise ValueError(f"loss_type cispo caps the ratio itself at epsilon_high, so {highest} "
                         "would multiply nearly every gradient by it; set epsilon_high to 1 or "
                         "more (TRL advises 5.0)")


def _check_sequence_level(params: dict) -> None:
    """A ratio per reply against losses that have their own, and against a choice of tokens."""
    loss, level = params["loss_type"], params["importance_sampling_level"]
    if loss == "luspo" and level == "token":
        raise ValueError("loss_type luspo weighs replies by a ratio per reply; set "
                         "importance_sampling_level to sequence")
    if loss == "vespo" and level == "sequence":
        raise ValueError("loss_type vespo has weights of its own per sequence; set "
                         "importance_sampling_level to token")
    if loss == "vespo" and params["server"] and params["vllm_importance_sampling_correction"] and (
            params["vllm_importance_sampling_mode"].startswith("sequence")):
        raise ValueError("loss_type vespo reads the server's ratio per token; set "
                         "vllm_importance_sampling_mode to token_truncate or token_mask")
    if level == "sequence" and loss != "cispo" and params["top_entropy_quantile"] < 1:
        raise ValueError("top_entropy_quantile chooses tokens, and with importance_sampling_level "
                         "sequence a reply has one ratio for all of them; set one of the two back")
