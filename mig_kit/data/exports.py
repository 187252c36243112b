"""`mig-kit data export`: prompts, rewards and the recipe's values for verl and ms-swift.

Images are written at the size the model sees, so that no engine resizes them again and boxes stay
in the kit's coordinates. The kit's rewards come along in a reward.py of the engine's form.
"""

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import yaml
from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import PACKAGE, UserError, progress_bar, write_json_lines
from mig_kit.image_files import EncodedImage, LazyImages, encode_image
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample, Target

IMAGE = "<image>"
TEMPLATES = PACKAGE / "data" / "export_templates"
# settings that ms-swift has under TRL's names, too
SHARED = ("adam_beta2", "beta", "epsilon", "epsilon_high", "gradient_accumulation_steps",
          "gradient_checkpointing", "importance_sampling_level", "learning_rate", "logging_steps",
          "loss_type", "lr_scheduler_type", "max_completion_length", "max_steps",
          "num_generations", "num_iterations", "output_dir", "per_device_train_batch_size",
          "reward_weights", "save_steps", "scale_rewards", "seed", "temperature",
          "top_entropy_quantile", "warmup_steps", "weight_decay")
# TRL's loss_type -> verl's word for the mean that it is
VERL_MEANS = {"dapo": "token-mean", "grpo": "seq-mean-token-mean",
              "dr_grpo": "seq-mean-token-sum-norm"}
COMMANDS = {
    "verl": "python3 -m verl.trainer.main_ppo --config-dir {out} --config-name config",
    "swift": "NPROC_PER_NODE={gpus} swift rlhf {out}/config.yaml"}


@dataclass(frozen=True)
class Recipe:
    """What is handed over: the prompts, and with what RL starts.

    Args:
        name: of the run. params: of stage 05 and the run. model: folder or hub name.
        further: settings of TRL that the run sets besides.
        reward_files: files of the rewards that are not the kit's.
    """

    name: str
    samples: Sequence[Sample]
    params: dict
    model: str
    further: dict
    reward_files: tuple[Path, ...] = ()


def question_to_json(sample: Sample) -> str:
    """All that a reward may read of a sample: everything but pixels."""
    return json.dumps(vars(sample) | {"images": sample.sizes, "spec": None})


def question_from_json(text: str) -> Sample:
    """The sample of `question_to_json`, whose images have their sizes and no pixels."""
    facts = json.loads(text)
    images = LazyImages(tuple(EncodedImage(b"", tuple(size)) for size in facts["images"]))
    return Sample(**facts | {
        "images": images, "targets": [Target(image, tuple(box)) for image, box in facts["targets"]],
        "reference": tuple(facts["reference"]) if facts["reference"] else None,
        "options": tuple(facts["options"]), "notes": tuple(facts["notes"])})


def write_export(engine: str, recipe: Recipe, out: Path, gpus: int) -> list[str]:
    """Write the folder `out` for an engine of COMMANDS, whole or not at all.

    Args:
        gpus: of a node.
    Returns: sentences on what the engine computes otherwise than stage 05.
    Raises: UserError if `out` exists, or if the engine cannot do what the parameters say.
    """
    from mig_kit.models import processors  # imports torch

    if out.exists():
        raise UserError(f"{out} exists; name a new folder")
    out, p = out.absolute(), recipe.params
    box_format = BoxFormat.of(p)
    processor = processors.load_processor(recipe.model, box_format)
    images = processor.image_processor
    factor = images.patch_size * images.merge_size
    _check_limits(box_format, factor)

    def encode(image: Image.Image) -> bytes:
        return encode_image(processors.resize_as_seen(image, box_format, factor, images.resample),
                            compress_level=1)

    texts, lengths = [], []
    for sample in progress_bar(recipe.samples, "measure prompts", delay=5):
        texts.append("".join(part.get("text", IMAGE)
                             for part in chat_messages(sample, box_format)[0]["content"]))
        lengths.append(processors.count_prompt_tokens(processor, sample, box_format))
    values = _recipe_values(recipe, gpus) | {
        "data": f"{out}/train.{'parquet' if engine == 'verl' else 'jsonl'}",
        "reward": f"{out}/reward.py", "output_dir": f"{out}/checkpoints",
        "prompt_length": -(-max(lengths) // 64) * 64,
        "tokens_per_gpu": 4 * (max(lengths) + p["max_completion_length"]),
        "images": max(text.count(IMAGE) for text in texts),
        "patch_size": images.patch_size, "opened": processor.opened_tag,
        "box_coordinates": str(box_format.coordinates)}
    differences = _differences(engine, recipe)
    notes = [COMMANDS[engine].format(out=shlex.quote(str(out)), gpus=gpus),
             f"needs mig-kit, and this folder under this path on every node of {gpus} GPUs",
             f"boxes count in {box_format.coordinates.description}: images must not be resized",
             *differences]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parent:
        folder = Path(parent) / out.name
        folder.mkdir()
        _write_rows(engine, zip(texts, progress_bar(recipe.samples, "write prompts", delay=5)),
                    encode, folder, out)
        _write_texts(engine, recipe, values, notes, folder)
        folder.replace(out)
    return differences


def _write_texts(engine: str, recipe: Recipe, values: dict, notes: list[str], folder: Path) -> None:
    """Write config.yaml, which begins with the notes, reward.py and what else the engine needs."""
    def fill(template: str, values: dict) -> str:
        return Template((TEMPLATES / template).read_text()).substitute(values)

    shared = {} if engine == "verl" else {name: values[name] for name in SHARED}
    texts = {"config.yaml": "".join(f"# {note}\n" for note in notes)
             + (yaml.safe_dump(shared) if shared else "")
             + fill(f"{engine}.yaml.in", {key: json.dumps(value) for key, value in values.items()}),
             "reward.py": fill("reward.py.in", {key: repr(value) for key, value in values.items()})
             + fill(f"{engine}.py.in", {})}
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    for path in recipe.reward_files:
        (folder / "rewards").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "rewards" / path.name)


def _recipe_values(recipe: Recipe, gpus: int) -> dict:
    """The recipe's values by TRL's names, and what other engines have in their place."""
    from mig_kit.models.loading import LORA_SCALE, LORA_TARGETS
    from mig_kit.models.model_folders import read_model_type

    p = recipe.params
    n_replies = p["per_device_train_batch_size"] * p["gradient_accumulation_steps"]
    n_prompts, n_own = n_replies // p["num_generations"], n_replies // gpus
    if len(recipe.samples) < n_prompts:
        raise UserError(f"an update takes {n_prompts} prompts, and {recipe.name} has "
                         f"{len(recipe.samples)}; give more, or lower gradient_accumulation_steps")
    if n_replies % gpus:
        raise UserError(f"{gpus} GPUs cannot share the {n_replies} replies of an update evenly; "
                         "name another number with --gpus")
    rows = max(rows for rows in range(1, p["per_device_train_batch_size"] + 1) if not n_own % rows)
    names = [text.rpartition(":")[2] for text in p["rewards"]]
    weights = {name: p["reward_weights"].get(name, 1.0) for name in names}
    return p | {
        "name": recipe.name, "model": str(recipe.model), "gpus": gpus,
        "model_type": read_model_type(recipe.model),
        "prompts": n_prompts, "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": n_own // rows, "weight_decay": 0.0, "logging_steps": 1,
        "adam_beta2": recipe.further.get("adam_beta2", 0.999),
        "batches": -(-p["max_steps"] // p["num_iterations"]),
        "epsilon_high": p["epsilon_high"] or p["epsilon"],
        "has_kl": p["beta"] > 0,
        "divides_by_std": p["scale_rewards"] != "none",
        "schedule": "cosine" if p["lr_scheduler_type"] == "cosine" else "constant",
        "verl_mean": VERL_MEANS.get(p["loss_type"]),
        "lora_alpha": LORA_SCALE * p["lora_r"], "lora_pattern": LORA_TARGETS[p["lora_targets"]],
        "weights": weights, "reward_weights": list(weights.values()),
        "reward_funcs": [f"mig_{name}" for name in names]}


def _differences(engine: str, recipe: Recipe) -> list[str]:
    """What the engine computes otherwise than stage 05; UserError for a loss that it lacks."""
    p = recipe.params
    left_out = [f"{name} {value}" for name, value in recipe.further.items()
                if (engine, name) != ("swift", "adam_beta2")]
    remarks = [f"it does not get what the run sets besides: {', '.join(left_out)}"] * bool(left_out)
    if p["advantage"]:
        remarks.append(f"advantages are {engine}'s, not those of {p['advantage']}")
    if engine != "verl":
        return remarks
    if p["loss_type"] not in VERL_MEANS or p["importance_sampling_level"] != "token":
        raise UserError(f"verl takes the loss_type {', '.join(VERL_MEANS)} with ratios per "
                         f"token, not {p['loss_type']} per {p['importance_sampling_level']}; "
                         "export for swift, or set another loss in --profile")
    facts = {
        "advantages are divided by the group's standard deviation, not by the batch's":
            p["scale_rewards"] == "batch",
        "after its warm-up the learning rate stays, and does not fall to 0":
            p["lr_scheduler_type"] == "linear",
        "replies without an end count in the loss": p["mask_truncated_completions"],
        "all tokens count in the loss": p["top_entropy_quantile"] < 1}
    return [sentence for sentence, is_so in facts.items() if is_so] + remarks


def _check_limits(box_format: BoxFormat, factor: int) -> None:
    """UserError if engines would resize images that have the size the model sees."""
    low, high = 4 * factor**2, 2**14 * factor**2  # of qwen_vl_utils, which verl and ms-swift use
    is_within = low <= box_format.min_pixels and box_format.max_pixels <= high
    if box_format.coordinates == Coordinates.ABSOLUTE and not is_within:
        raise UserError(f"other engines resize images outside of {low} to {high} pixels, which "
                         "would move every box; keep min_pixels and max_pixels within")


def _write_rows(engine: str, questions: Iterator[tuple[str, Sample]], encode: Callable,
                folder: Path, out: Path) -> None:
    """Write images/, and train.parquet or train.jsonl, which name them."""
    (folder / "images").mkdir()
    rows = []
    for number, (text, sample) in enumerate(questions):
        names = [f"images/{number}_{place + 1}.png" for place in range(len(sample.images))]
        for name, image in zip(names, sample.images):
            (folder / name).write_bytes(encode(image))
        question, messages = question_to_json(sample), [{"role": "user", "content": text}]
        # engines take a relative path from where they are started
        paths = [f"{out}/{name}" for name in names]
        rows.append({"messages": messages, "images": paths, "question": question}
                    if engine == "swift" else {
            "data_source": "mig-kit", "prompt": messages,
            "images": [{"image": path} for path in paths],
            "reward_model": {"style": "rule", "ground_truth": question},
            "extra_info": {"index": number, "id": sample.id}})
    if engine == "swift":
        return write_json_lines(folder / "train.jsonl", rows)
    from pyarrow import Table, parquet  # of an extra

    parquet.write_table(Table.from_pylist(rows), folder / "train.parquet")
