"""Templates that open, close or leave out <think>: replies are read with what the prompt opened."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from command_line import run_mig_kit
from published import save_model
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mig_kit.boxes import BoxFormat
from mig_kit.evaluation import eval_model
from mig_kit.models import loading
from mig_kit.models.processors import load_processor, render_prompt
from mig_kit.models.sample_prompts import reply_logps
from mig_kit.pipeline.run_facts import RunModel
from mig_kit.prompts import format_answer, parse_reply, read_reply
from mig_kit.sample import Sample
from mig_kit.serving import reply_files
from mig_kit.stages import grpo, rejection_sampling, sft
from mig_kit.training import reward_loading
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
REPLY = '<think>Compare. Both.</think><answer>{"image": 1, "box": [1,2,30,40]}</answer>'
HEAD = ("{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% set text %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|>"
        "<|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "{% endset %}{% set parts = text.split('</think>') %}")
ANSWER = "{{ parts[-1].lstrip('\n') }}"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
REWRITTEN = ("{% if message.role == 'assistant' and loop.last %}<think>\n"
             "{{ parts[0].split('<think>')[-1].strip('\n') if parts[1:] else '' }}\n"
             "</think>\n\n" + ANSWER + "{% else %}{{ text }}{% endif %}")
# name -> (how a message is written, what the prompt ends with, what it has opened)
TEMPLATES = {
    "rewrites": (REWRITTEN, "<think>\n", "<think>\n"),
    "copies": ("{{ text }}", "<think>\n", "<think>\n"),
    "drops": ("{% if message.role == 'assistant' %}" + ANSWER + "{% else %}{{ text }}{% endif %}",
              "<think>", "<think>"),
    "closes": (REWRITTEN, "<think>\n\n</think>\n\n", ""),
    "opens nothing": ("{{ text }}", "", "")}


@pytest.fixture(scope="module")
def folders(make_once, random_folder):
    """Call it with a name of TEMPLATES for a folder of the random model with that template."""
    def make(name):
        def fill(folder):
            shutil.copytree(random_folder, folder, dirs_exist_ok=True)
            message, end, _ = TEMPLATES[name]
            (folder / "chat_template.jinja").write_text(HEAD + message + TAIL + end + "{% endif %}")

        return make_once(f"template-{name.split()[0]}", fill)

    return make


@pytest.fixture(scope="module")
def questions():
    """One for a box, and one for a letter."""
    image = make_sample("diff", "val", 3).images[0].resize((56, 56))
    return [Sample("a", "own", "own", "", (image,), "Where is the star?",
                   targets=((1, (3.0, 5.0, 30.0, 40.0)),)),
            Sample("b", "own", "own", "", (image,), "What is it?", options=("a cat", "a dog"),
                   letter="B")]


@pytest.fixture(scope="module")
def traces():
    box = format_answer(1, (3, 5, 30, 40))
    return [f"<think>{thought}</think><answer>{answer}</answer>"
            for thought, answer in (("It is on top.", box), ("It barks.", "B"))]


@pytest.fixture(scope="module")
def taught(make_once, folders, questions, traces, float32):
    """A folder of a thinking model that has learnt the traces by heart, with SFT's own labels."""
    def fill(folder):
        shutil.copytree(folders("rewrites"), folder, dirs_exist_ok=True)
        policy = loading.load_policy(folder, float32, BOX_FORMAT)
        rows = [sft.sft_row(*row, BOX_FORMAT) for row in zip(questions, traces)]
        batch = DataCollatorForVisionLanguageModeling(
            policy.processor, completion_only_loss=True)(rows)
        optimizer = torch.optim.AdamW(policy.model.model.language_model.parameters(), lr=2e-3)
        with torch.enable_grad():
            for _ in range(120):
                loss = policy.model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert loss < 0.05
        save_model(policy.model, policy.processor, folder, folders("rewrites"))

    return make_once("taught", fill)


@pytest.mark.parametrize("name", TEMPLATES)
def test_sft_goes_on_where_the_prompt_ends(name, folders):
    processor = load_processor(folders(name), BOX_FORMAT)
    assert processor.opened_tag == TEMPLATES[name][2]
    sample = make_sample("diff", "val", 3)
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    for reply in (REPLY, REPLY.partition("</think>")[2]):
        batch = collate([sft.sft_row(sample, reply, BOX_FORMAT)])
        has_loss = batch["labels"][0] != -100
        prompt_ids = processor(text=[render_prompt(processor, sample, BOX_FORMAT)],
                               images=list(sample.images))["input_ids"][0]
        assert batch["input_ids"][0][~has_loss].tolist() == prompt_ids
        learnt, = processor.batch_decode(batch["labels"][0][has_loss][None])
        written, _, rest = learnt.partition("<|im_end|>")
        read, trace = parse_reply(written), parse_reply(reply)
        assert (read.thinking, read.box, rest) == (trace.thinking, trace.box, "\n")
        assert read.well_formed == (bool(processor.opened_tag) or trace.well_formed)
        assert written.count("<think>") == (1 if processor.opened_tag else reply.count("<think>"))


def test_log_probabilities_are_of_what_was_generated(folders, float32, questions):
    """What the prompt has opened is the prompt's, whatever a template does with a reply."""
    policy = loading.load_policy(folders("rewrites"), float32, BOX_FORMAT)
    reply, = reply_files.greedy_replies(policy, questions[:1], 12)
    prompt = render_prompt(policy.processor, questions[0], BOX_FORMAT)
    ids = policy.processor(text=[prompt], images=list(questions[0].images), return_tensors="pt")
    written = policy.model.generate(**ids, max_new_tokens=12, do_sample=False)
    written = written[0, ids["input_ids"].shape[1]:]
    tokenizer = policy.processor.tokenizer
    assert reply == "<think>\n" + tokenizer.decode(written)
    logps, = reply_logps(policy.model, policy.processor, questions[:1], [reply], BOX_FORMAT)
    assert len(logps) == len(tokenizer(tokenizer.decode(written))["input_ids"]) + 1


def test_evaluation_and_rejection_sampling_read_replies_whole(taught, questions, float32, tmp_path):
    policy = loading.load_policy(taught, float32, BOX_FORMAT)
    replies = reply_files.sample_replies(
        policy, questions, tmp_path / "replies.jsonl", replies=3, temperature=0.1,
        max_new_tokens=64, seed=0)
    answers = {sample.id: [read_reply(reply, sample, BOX_FORMAT) for reply in replies[sample.id]]
               for sample in questions}
    assert rejection_sampling.pass_rates(questions, answers).tolist() == [1, 1]
    questions[0].images[0].save(tmp_path / "a.png")
    (tmp_path / "own.jsonl").write_text(json.dumps({
        "id": "a", "images": ["a.png"], "question": questions[0].question, "image": 1,
        "box": [3, 5, 30, 40], "coordinates": "pixels"}) + "\n")
    result = eval_model.evaluate_model(
        RunModel(taught, BOX_FORMAT, {}),
        eval_model.Task("own", tmp_path / "own.jsonl", tmp_path), float32, tmp_path / "out",
        SimpleNamespace(max_new_tokens=64, seed=0, replies=0, server="", concurrency=1))
    summary = result["scores"]["strict"]["own"]
    assert summary["score"] == 100
    assert [task["format"] for task in summary["tasks"].values()] == [100]
    grounded = run_mig_kit("ground", "--model", str(taught), "--image", str(tmp_path / "a.png"),
                           "--out", str(tmp_path / "g.png"), questions[0].question)
    assert "reasoning: It is on top.\n" in grounded.stdout, grounded.stderr


@pytest.mark.slow
def test_rewards_read_replies_whole(taught, questions, float32, stage_params, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def starts(completions, **columns):\n"
                   "    return [c[0]['content'].startswith('<think>') for c in completions]\n")
    params = stage_params(
        "05_grpo", rewards=["format", "box", f"{own}:starts"], num_generations=4,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, max_steps=1,
        max_completion_length=64, temperature=0.1, lora_r=4)
    reward_loading.copy_own_files(params.rewards, tmp_path)
    policy = loading.load_policy(taught, float32, BOX_FORMAT)
    trainer = grpo.grpo_trainer(policy, questions, tmp_path, params)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/format/mean"] == logged["rewards/starts/mean"] == 1
