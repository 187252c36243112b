"""What another engine makes of an export, run by that engine's own Python:
python engine_reads.py ENGINE EXPORT REPLIES RESULT; writes {"rows", "scores"}.
"""

import asyncio
import json
import sys
from pathlib import Path

import torch
import yaml

# PyPI's torchvision is a CUDA build: beside a CPU's PyTorch it lacks two operators, unused here
LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def describe(inputs):
    """Token ids and the grid of patches, in lists."""
    return {"ids": torch.as_tensor(inputs["input_ids"]).flatten().tolist(),
            "grid": inputs["image_grid_thw"].tolist()}


def read_verl(export, replies):
    """verl's data set and processor, and its manager of rewards over its loading of reward.py."""
    import numpy as np
    from hydra import compose, initialize_config_dir, initialize_config_module
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager
    from verl.utils import hf_processor, hf_tokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    with initialize_config_dir(config_dir=str(export), version_base=None):
        config = compose("config")
    with initialize_config_module("verl.trainer.config", version_base=None):
        known = compose("ppo_trainer")
    own = yaml.safe_load((export / "config.yaml").read_text())
    unknown = list(unknown_keys({key: own[key] for key in own.keys() - {"hydra", "defaults"}},
                                known))
    assert unknown == ["name", "limit_images"], unknown  # of rollout: "???", and left out there
    model = config.actor_rollout_ref.model.path
    tokenizer, processor = hf_tokenizer(model), hf_processor(model)
    data = RLHFDataset([config.data.train_files], tokenizer, config.data, processor)
    manager, rows = load_reward_manager(config, tokenizer), [data[i] for i in range(len(data))]

    async def encode(row):
        images, _ = await RLHFDataset.process_vision_info(
            row["raw_prompt"], image_patch_size=data.image_patch_size, config=config.data)
        text = processor.apply_chat_template(row["raw_prompt"], add_generation_prompt=True,
                                             tokenize=False)
        return describe(processor(text=[text], images=images, return_tensors="pt"))

    async def judge(number, reply):
        manager.loop = asyncio.get_running_loop()
        ids = torch.tensor([tokenizer(reply, add_special_tokens=False)["input_ids"]])
        texts = {name: np.array([rows[number][name]], dtype=object)
                 for name in ("data_source", "reward_model", "extra_info")}
        batch = DataProto.from_dict({"responses": ids, "attention_mask": torch.ones_like(ids)},
                                    texts)
        return (await manager.run_single(batch))["reward_score"]

    return [asyncio.run(encode(row)) for row in rows], [
        asyncio.run(judge(*reply)) for reply in replies]


def unknown_keys(values, known):
    """The keys of a nested mapping that another lacks."""
    for key, value in values.items():
        if key not in known:
            yield key
        elif isinstance(value, dict):
            yield from unknown_keys(value, known[key])


def read_swift(export, replies):
    """ms-swift's arguments, data set and template, and its own sum of the rewards."""
    from swift.pipelines.train.rlhf import SwiftRLHF
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import compute_rewards_per_func

    config = yaml.safe_load((export / "config.yaml").read_text()) | {"torch_dtype": "float32"}
    words = [word for name, value in config.items() if "vllm" not in name for word in (
        f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))]
    pipeline = SwiftRLHF(words)
    args, template = pipeline.args, pipeline.template
    # ms-swift names Qwen's token by its number, which the tiny base's vocabulary does not have
    template.image_token_id = pipeline.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    order = [json.loads(line)["question"] for line in (export / "train.jsonl").open()]
    rows = sorted(pipeline._get_dataset()[0], key=lambda row: order.index(row["question"]))
    prompts = [{"messages": row["messages"][:1], "images": row["images"]} for row in rows]
    samples = [GRPOSample.from_row(rows[number] | {"messages": [
        *rows[number]["messages"][:1], {"role": "assistant", "content": reply}]})
        for number, reply in replies]
    rewards = [orms[name](args=args) for name in args.reward_funcs]
    values = compute_rewards_per_func(samples, rewards, [None] * len(rewards), torch.device("cpu"))
    return [describe(template.encode(prompt)) for prompt in prompts], (
        values * torch.tensor(args.reward_weights)).nansum(1).tolist()


if __name__ == "__main__":
    engine, export, replies, result = sys.argv[1], *map(Path, sys.argv[2:])
    read = {"verl": read_verl, "swift": read_swift}[engine]
    rows, scores = read(export, json.loads(replies.read_text()))
    result.write_text(json.dumps({"rows": rows, "scores": scores}))
