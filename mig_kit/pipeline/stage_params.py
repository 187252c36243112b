"""The parameters of every stage, each in one line: type, tiny default, help and limits.

The command line, the profiles in params/ and the notebooks' setup cells read them here, and `make
cells` writes the notebooks' `parameters` cells from them. A rule between parameters is a validator;
a rule that needs other stages of the run stands in `plan.check_run`.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from mig_kit.boxes import MODEL_COORDINATES, PROMPT, BoxFormat
from mig_kit.common import PROJECT_ROOT, UserError, model_folder
from mig_kit.openai_client import ADDRESS, KEY_VARIABLE, parse_server
from mig_kit.pipeline.processes import parse_launcher
from mig_kit.pipeline.reward_names import check_rewards
from mig_kit.pipeline.run_folders import validate_run_id
from mig_kit.world.suites import SUITES

# set once, in stage 01; every later stage of the run takes them from there
RUN_PARAMS = ("base_model", "min_pixels", "max_pixels", "coordinates", "prompt")
RUN_PARAMS_STAGE = "01_synthesize"
# how a stage runs, not what it makes: recorded, but no reason to run it again
EXECUTION_PARAMS = ("run_id", "device", "launcher", "server", "concurrency", "report_to")
START_WORDS = ("merged", "base")
IMAGE_TOKEN = 784  # pixels

Count, Positive = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]
Amount, Rate = Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as numpy takes it
Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16"]
Targets = Literal["all", "attention", "gate_up"]
Schedule = Literal["linear", "cosine", "constant_with_warmup"]
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Penalty, Scale = Literal["none", "format", "all"], Literal["batch", "group", "none"]
Teacher, Level = Literal["rules", "endpoint", "own", "none"], Literal["token", "sequence"]
Loss = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def param(default, words: str, **limits):
    """A field of a stage's parameters; words: its help, limits: pydantic's, such as ge=1."""
    return Field(default, description=words, **limits)


def require(condition: object, sentence: str) -> None:
    """UserError with the sentence, which names the fix, unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def _check_model(name: str, info) -> str:
    require(model_folder(name).is_dir() and name or re.fullmatch(r"[\w.-]+/[\w.-]+", name),
            f"{info.field_name} is '{name}'; it must be tiny, a folder that exists, or USER/NAME "
            "of the hub; correct it")
    return name


def _check_server(server: str) -> str:
    if server:
        parse_server(server)  # else UserError
    return server


def _read_prompt(prompt: str) -> str:
    """The text, or that of a file."""
    path = PROJECT_ROOT / prompt
    text = path.read_text("utf-8").strip() if path.is_file() else prompt
    require(text.count("{question}") == 1,
            f"prompt is '{prompt}'; it must be a text that holds {{question}} once, or a file of "
            "one; {instruction} stands for the kit's words on the form of an answer")
    return text


RunId = Annotated[str, AfterValidator(validate_run_id)]
Prompt = Annotated[str, AfterValidator(_read_prompt)]
Model = Annotated[str, AfterValidator(_check_model)]
Server = Annotated[str, AfterValidator(_check_server)]
Suite = Literal[tuple(SUITES)]
DTYPE = param("auto", "auto, float32 or bfloat16")
DEVICE = param("auto", "auto (a GPU where there is one), cuda or cpu")
MAX_NEW_TOKENS = param(128, "longest reply, tokens")


class StageParams(BaseModel):
    """What all stages have in common: no other names, no infinite numbers, no later changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    run_id: RunId = param("default", "name of the run folder under runs/")


class Seeded(StageParams):
    """Stages that draw random numbers."""

    seed: Seed = param(0, "seed of everything random in this stage")


class OnHardware(StageParams):
    """Stages that load a model."""

    dtype: Dtype = DTYPE
    device: Device = DEVICE


class Served(StageParams):
    """Stages whose replies servers may draw."""

    server: Server = param("", 'addresses of servers, as http://localhost:8000/v1; "": drawn here')
    concurrency: Positive = param(16, "requests under way at the servers")


class Training(Seeded, OnHardware):
    """Stages that train an adapter."""

    lora_targets: Targets = param("attention", "adapted projections: all, attention or gate_up")
    report_to: Tracker = param(
        "none", "send the curves to a tracker too: none, tensorboard, trackio or wandb")
    launcher: str = param("torchrun --standalone --nproc-per-node 2",
                          'starts the training; "": in here')
    trl: dict = param({}, "further settings of TRL's SFTConfig (02) or GRPOConfig (05)")

    @model_validator(mode="after")
    def _shares_steps_evenly(self):
        """The launcher's processes divide the steps of an update."""
        if self.launcher.strip():
            launch = parse_launcher(self.launcher)
            require(self.gradient_accumulation_steps % (launch.local * launch.nodes or 1) == 0,
                    "the launcher's processes must share the steps of an update evenly; set "
                    "gradient_accumulation_steps to a multiple of their number, or launcher to "
                    '""')
        return self


class Preflight(StageParams):
    """00_preflight."""

    profile: str = param("tiny", "whose needs are looked at: tiny, or a folder of params/")
    memory_gib: Amount = param(8.0, "free memory the profile needs, GiB")
    disk_gib: Amount = param(1.0, "free disk the profile needs, GiB")
    device: Device = DEVICE


class Synthesize(Seeded):
    """01_synthesize."""

    cot_per_task: Count = param(360, "samples per task for which the teacher writes a trace")
    free_form_per_task: Count = param(160, "general questions per kind, for the cold start")
    traces_per_question: Positive = param(2, "traces that the rules write for a question")
    rl_per_task: Count = param(200, "candidate prompts per task for reinforcement learning")
    rl_free_form_per_task: Count = param(
        80, "candidates per kind of question that a letter answers")
    rl_boxes_per_task: Count = param(300, "candidates per kind of question that a box answers")
    val_per_task: Positive = param(10, "validation samples per task")
    data: str = param("scenes", "what is asked about: scenes (drawn), or a file of your questions")
    image_root: str = param("", "folder of their images; empty for the folder of the file")
    data_shares: list[Share] = param([0.75, 0.2, 0.05],
        "shares of cold start, RL and validation, divided by image", min_length=3, max_length=3)
    teacher: Teacher = param(
        "rules", "rules (reads scenes), endpoint (a model), own (key reply) or none (no 02)")
    endpoint_url: str = param("", "as http://localhost:8000/v1; the key: $MIG_KIT_API_KEY")
    endpoint_model: str = param("", "name of the model at the endpoint")
    concurrency: Positive = param(4, "calls under way at once")
    base_model: Model = param("tiny", "the model to train: tiny (shipped), a folder or a hub name")
    min_pixels: Positive = param(3136, "smallest area of an image as models see it, pixels")
    max_pixels: int = param(
        401408, "largest area of an image as models see it, pixels", ge=IMAGE_TOKEN)
    coordinates: Literal[tuple(kind.value for kind in MODEL_COORDINATES)] = param(
        "absolute", "of boxes, in all stages: absolute (Qwen2.5-VL) or normalized_1000 (others)")
    prompt: Prompt = param(
        PROMPT, "of all stages: a text with {question} in it, or a file that holds it")

    @model_validator(mode="after")
    def _can_be_made(self):
        BoxFormat.of(vars(self))  # else UserError
        require(abs(sum(self.data_shares) - 1) < 1e-6,
                "data_shares, of cold start, RL and validation, must sum to 1; write three that "
                "do, as [0.75, 0.2, 0.05]")
        is_own = self.data != "scenes"
        require(not is_own or (PROJECT_ROOT / self.data).is_file(),
                f"data is '{self.data}'; it must be scenes or a file that exists: name the file of "
                "your questions, as -p data mine.jsonl")
        require(not (is_own and self.image_root) or (PROJECT_ROOT / self.image_root).is_dir(),
                f"image_root is '{self.image_root}'; name a folder that exists, or leave it empty "
                "for the folder of data")
        require(not is_own or self.data_shares[2], "some questions must be held out; raise the "
                "last of data_shares")
        require(is_own or self.teacher != "own",
                "teacher own is the key 'reply' of your own data; name its file in data")
        require(not is_own or self.teacher != "rules",
                f"data is '{self.data}', and the rules teacher reads synthetic scenes only; set "
                "teacher to none and start_from to base (RL alone: images, question and target are "
                "enough), to own (your key 'reply') or to endpoint")
        require(self.teacher != "endpoint" or (
            ADDRESS.fullmatch(self.endpoint_url) and self.endpoint_model),
            "teacher endpoint needs endpoint_url like http://localhost:8000/v1, with no name, key "
            "or query in it, and endpoint_model; correct them, and put a key into the environment "
            f"variable {KEY_VARIABLE}")
        return self


class Sft(Training):
    """02_sft."""

    num_train_epochs: Rate = param(2.0, "passes over the cold-start set")
    learning_rate: Rate = param(0.001, "peak learning rate")
    lora_r: Positive = param(83, "rank; of equal size: 83 on attention, 32 on all, 78 on gate_up")
    lora_dropout: float = param(0.0, "dropout on the adapter input", ge=0, lt=1)
    reasoning: bool = param(True, "learn the whole reply; false: its <answer> alone")
    max_samples: Count = param(0, "use only so many traces; 0 for all")
    per_device_train_batch_size: Positive = param(
        8, "questions per device and step, each with all of its traces")
    gradient_accumulation_steps: Positive = param(2, "steps per update")
    lr_scheduler_type: Schedule = param("cosine", "linear (to 0), cosine, constant_with_warmup")
    warmup_steps: Count = param(10, "linear warm-up, updates")
    save_steps: Positive = param(100, "a checkpoint every so many updates")


class Merge(OnHardware):
    """03_merge."""


class RejectionSampling(Seeded, OnHardware, Served):
    """04_rejection_sampling."""

    replies: Positive = param(4, "replies drawn per candidate")
    min_pass_rate: Share = param(0.2, "drop prompts with a lower one")
    max_pass_rate: Share = param(0.8, "drop prompts with a higher one")
    per_task: Positive = param(400, "keep at most so many prompts per task")
    max_new_tokens: Positive = MAX_NEW_TOKENS

    @model_validator(mode="after")
    def _keeps_something(self):
        require(self.min_pass_rate <= self.max_pass_rate,
                "min_pass_rate is above max_pass_rate; swap them")
        return self


class Grpo(Training, Served):
    """05_grpo."""

    learning_rate: Rate = param(0.0006, "peak learning rate")
    max_steps: Positive = param(100, "updates")
    num_generations: int = param(8, "replies per prompt, G", ge=2)
    temperature: Rate = param(1.0, "sampling temperature")
    max_completion_length: Positive = param(128, "longest reply")
    rewards: list[str] = param(
        ["format", "image", "box", "choice"], 'of rewards.py, or "file.py:function"')
    reward_weights: dict[str, float] = param(
        {"format": 0.2, "image": 0.3, "box": 1.0, "choice": 1.3}, "others: 1")
    hallucinated_image_penalty: Penalty = param(
        "format", "what citing an image that is not there costs: none, format or all")
    scale_rewards: Scale = param(
        "batch", "whose standard deviation of rewards divides advantages: batch, group or none")
    advantage: str = param("", 'gives the advantages: "" (TRL), or "file.py:function"')
    beta: Amount = param(0.0, "weight of the KL term; 0 needs no reference")
    loss_type: Loss = param("dapo", "mean over all tokens (dapo), replies (grpo), and more")
    start_from: str = param("merged", "merged (03), base or a folder")
    lr_scheduler_type: Schedule = param("linear", "linear (to 0), cosine, constant_with_warmup")
    warmup_steps: Count = param(5, "linear warm-up, updates")
    save_steps: Positive = param(25, "a checkpoint every so many updates, in whole num_iterations")
    gradient_checkpointing: bool = param(
        False, "keep only the layers' inputs: less memory, one more pass")
    lora_r: Positive = param(16, "rank of the new adapter")
    per_device_train_batch_size: Positive = param(32, "replies per device and step")
    gradient_accumulation_steps: Positive = param(4, "steps per update, of all processes together")
    micro_replies: Count = param(0, "replies whose graphs are held at once; 0: all")
    share_prefix: bool = param(True, "read every prompt once per group; false is stock TRL")
    num_iterations: Positive = param(1, "updates that learn from the same replies")
    epsilon: Amount = param(0.2, "clips ratios to 1 - epsilon, with num_iterations over 1")
    epsilon_high: Amount = param(0.0, "clips them to 1 + epsilon_high; 0 for the same as epsilon")
    importance_sampling_level: Level = param(
        "token", "ratio of new to old: per token, or per reply (sequence)")
    mask_truncated_completions: bool = param(False, "leave replies without an end out of the loss")
    top_entropy_quantile: Share = param(1.0, "share of tokens, of highest entropy, in the loss")

    @model_validator(mode="after")
    def _trains_as_it_says(self):
        check_rewards(self.rewards, self.reward_weights,
                      type(self).model_fields["reward_weights"].default, self.advantage)
        rows = self.per_device_train_batch_size
        rows *= 1 if self.share_prefix else self.gradient_accumulation_steps
        require(rows % self.num_generations == 0,
                "per_device_train_batch_size must be a multiple of num_generations (without "
                "share_prefix, times gradient_accumulation_steps), so that groups stay whole; "
                "change one of them")
        require(self.share_prefix or not self.server,
                "a server needs share_prefix, because TRL's own trainer has none; set share_prefix "
                "to true")
        require(self.start_from in START_WORDS or (
            self.start_from and model_folder(self.start_from).is_dir()),
            f"start_from is '{self.start_from}'; it must be merged, base or a folder that "
            "exists; correct it")
        cap = self.epsilon_high or self.epsilon
        require(self.loss_type != "cispo" or cap >= 1,
                "loss_type cispo caps the ratio itself at epsilon_high, and below 1 would multiply "
                "nearly every gradient by it; set epsilon_high to 1 or more (TRL advises 5.0)")
        return self


class Evaluate(Seeded, OnHardware, Served):
    """06_evaluate."""

    suites: dict[Suite, Count] = param(
        {name: suite.default for name, suite in SUITES.items()},
        "test questions per task of each drawn suite; 0 leaves it out")
    eval_seed: Seed = param(53, "seed of the drawn test samples, the same for all runs")
    replies: Count = param(8, "replies at temperature 1 per sample; 0 for none")
    sampled_per_task: Count = param(10, "first samples of a task that get them; 0: all")
    max_new_tokens: Positive = MAX_NEW_TOKENS


class Report(StageParams):
    """07_report."""

    gallery_per_kind: Positive = param(6, "samples of each outcome of a suite in the gallery")


class SpeedBenchmark(StageParams):
    """08_benchmark."""

    images: int = param(6, "images of a prompt", ge=1, le=8)
    side: int = param(392, "side of an image, pixels", ge=56, le=1960)
    group: int = param(8, "replies to a prompt, G", ge=2)
    tokens: int = param(64, "tokens of a reply", ge=2)
    model: Model = param("tiny", "tiny (the shipped base), a folder or a hub name")


class TinyBase(Seeded):
    """90_tiny_base."""

    vision_steps: list[int] = param([2800, 1400],
        "of the tower learning to locate, and to spell in codes", min_length=2, max_length=2)
    course_steps: list[int] = param([800, 300, 300, 350],
        "of the language model's four courses, see below", min_length=4, max_length=4)
    albums: Positive = param(3000, "albums of six pictures whose features are kept")
    rows: list[int] = param([20, 10],
        "dialogues per step: about pictures, and of text puzzles", min_length=2, max_length=2)
    examined_per_task: Positive = param(50, "validation samples per task for its examination")
    dtype: Dtype = DTYPE


MODELS = {
    "00_preflight": Preflight, "01_synthesize": Synthesize, "02_sft": Sft, "03_merge": Merge,
    "04_rejection_sampling": RejectionSampling, "05_grpo": Grpo, "06_evaluate": Evaluate,
    "07_report": Report, "08_benchmark": SpeedBenchmark, "90_tiny_base": TinyBase}


def stage_fields(stage: str) -> dict[str, FieldInfo]:
    """A stage's parameters by name; those that it shares with others come last."""
    model = MODELS[stage]
    names = sorted(model.model_fields, key=lambda name: name not in model.__annotations__)
    return {name: model.model_fields[name] for name in names}
