"""How long the full profiles' stages will take on one GPU: predicted from arithmetic and memory traffic (stage 00).

Predicted, not yet checked against a GPU. Every prompt is taken to hold `images` images of the largest size and every reply to be
as long as `max_new_tokens` allows, so it is nearer to a bound than to an expectation; SHARE and LAYER are guesses, in one place.
"""



from mig_kit.engine.generation import count_prompts_at_once
from mig_kit.speed.gpu_memory import NF4_BYTES, TEXT, TRACE, Shape, groups_per_update
from mig_kit.world.suites import BOX_FORMS, FREE_FORM, SIZE_PARAMS, suite_tasks
from mig_kit.world.tasks import TASKS

# one card of each size: name, dense bfloat16 TFLOP/s, memory traffic in GB/s, as their makers give them
CARDS = {24: ("RTX 4090", 165, 1008), 40: ("A100", 312, 1555), 80: ("A100", 312, 2039), 141: ("H200", 989, 4800)}


SHARE = 0.35  # of both that is reached; a guess


LAYER = 0.001  # seconds that one layer of one decoding step takes at least, for its kernels are started one by one; a guess


def count_work(params: dict[str, dict]) -> dict[str, int]:
    """Samples of fine-tuning, candidates of rejection sampling, groups of reinforcement, questions of evaluation.

    An evaluation asks three systems each of its questions; on a benchmark whose limit is 0 the number
    of its questions is not known here, and the drawn suites are counted.
    """
    p, sft, grpo, evaluate = (params[name] for name in ("01_synthesize", "02_sft", "05_grpo", "06_evaluate"))
    if p["data"] == "scenes":
        cot = len(TASKS) * p["cot_per_task"] + len(FREE_FORM) * p["free_form_per_task"]
        rl = (len(TASKS) * p["rl_per_task"] + len(BOX_FORMS) * p["rl_boxes_per_task"]
              + (len(FREE_FORM) - len(BOX_FORMS)) * p["rl_free_form_per_task"])
    else:
        cot, rl = (round(p["data_limit"] * share) for share in p["data_shares"][:2])
    asked = evaluate["benchmark_limit"] or sum(len(suite_tasks(suite)) * evaluate[key] for suite, key in SIZE_PARAMS.items())
    return {"02_sft": round(min(cot, sft["max_samples"] or cot) * sft["epochs"]), "04_rejection_sampling": rl,
            "05_grpo": grpo["max_steps"] * groups_per_update(grpo),
            "06_evaluate": 3 * asked}


def language_flops(shape: Shape, new: int, before: int = 0) -> float:
    """FLOPs of one forward pass over `new` tokens that come after `before` others: projections, attention, no head."""
    seen = new * before + new * new / 2
    return 2 * shape.linear * new + 4 * shape.layers * shape.head * shape.heads * seen


def predict_seconds(shape: Shape, params: dict[str, dict], gpu: int, images: int = 6) -> dict[str, float]:
    """Seconds of one sample, candidate, group or question of each stage of `counts` on a GPU of `gpu` GB."""
    _, rate, traffic = CARDS[gpu]
    flops, per_byte = SHARE * rate * 1e12, 1 / (SHARE * traffic * 1e9)
    sft, sampling, grpo, evaluate = (params[n] for n in ("02_sft", "04_rejection_sampling", "05_grpo", "06_evaluate"))
    looked = images * grpo["max_pixels"] // shape.side**2
    prompt = TEXT + looked
    read = 2 * shape.vision * 4 * looked + language_flops(shape, prompt)  # four patches to a token; features are computed once
    head = 2 * shape.hidden * shape.vocabulary

    def drawing(replies: int, tokens: int, at_once: int) -> float:
        """One prompt read, and all its replies' tokens: each step reads the weights once for all prompts drawn at once."""
        work = read + replies * (language_flops(shape, tokens, prompt) + tokens * head)
        cache = shape.token_bytes * (prompt + tokens / 2)
        step = max(2 * (shape.total - shape.vision) * per_byte, shape.layers * LAYER) / at_once + replies * cache * per_byte
        return work / flops + tokens * step

    # a frozen model's backward pass is one forward pass' work; one more each for checkpoints, the reference, and held replies
    passes = 2 + grpo["checkpoint_layers"] + (grpo["beta"] > 0) + (grpo["held"] > 0)
    group, tokens = grpo["num_generations"], grpo["max_new_tokens"]
    at_once = count_prompts_at_once(groups_per_update(grpo), prompt, group, tokens, shape.token_bytes)
    trained = 3 * (language_flops(shape, prompt + TRACE) + (prompt + TRACE) * head)
    replies = passes * (language_flops(shape, prompt) + group * (language_flops(shape, tokens, prompt) + tokens * head))
    return {
        "02_sft": (2 * shape.vision * 4 * looked + trained) / flops + shape.linear * NF4_BYTES * 3 * per_byte,
        "04_rejection_sampling": drawing(sampling["replies"], sampling["max_new_tokens"], sampling["batch_size"]),
        "05_grpo": drawing(group, tokens, at_once) + replies / flops,
        "06_evaluate": drawing(1 + evaluate["replies"], evaluate["max_new_tokens"], evaluate["batch_size"])}


def hours_table(shape: Shape, params: dict[str, dict], images: int = 6) -> list[dict]:
    """Rows {stage, how many, hours on each of CARDS}."""
    found = {gpu: predict_seconds(shape, params, gpu, images) for gpu in CARDS}
    return [{"stage": stage, "how many": n, **{f"{gpu} GB, {CARDS[gpu][0]}: hours": round(n * found[gpu][stage] / 3600, 1)
                                               for gpu in CARDS}} for stage, n in count_work(params).items()]
