"""Exports for other engines: the files, the rewards, and (nightly) the engines that read them."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from data_files import CHOICE, GOOD, call, changed, write_lines
from huggingface_hub import ModelCard
from PIL import Image

from mig_kit.boxes import BoxFormat
from mig_kit.common import PACKAGE, PROJECT_ROOT, UserError
from mig_kit.data import exports, own_data
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.prompts import correct_answer, read_reply
from mig_kit.training.reward_loading import load_rewards, score_functions

SIZES = ((40, 30), (300, 200), (1600, 900))  # enlarged, nearly kept, shrunk
FILES = {"verl": ["images", "train.parquet"], "swift": ["images", "train.jsonl"]}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """24 questions of own data about images of three sizes."""
    folder = tmp_path_factory.mktemp("questions")
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 80).save(folder / f"{number}.png")
    names = [f"{number}.png" for number in range(len(SIZES))]
    rows = [changed(images=names, question=f"Find cup {n}.", image=n % 3 + 1, id=str(n), box=[
        side * eighths // 8 for eighths in (n % 4 + 1, n % 3 + 5) for side in SIZES[n % 3]])
        for n in range(20)]
    rows += [changed(CHOICE, images=names[n % 3:], id=f"choice {n}") for n in range(4)]
    return list(own_data.iter_samples(write_lines(folder, *rows), folder))


@pytest.fixture(scope="module")
def judged(questions):
    """(number of a question, reply, the kit's weighted sum) of 504 replies."""
    p, box_format, rng = profile_params("05_grpo"), BoxFormat(), random.Random(0)
    scores = score_functions(load_rewards(p["rewards"], Path()), box_format)
    rows = []
    for number, sample in enumerate(questions):
        right = correct_answer(sample, box_format)
        for _ in range(21):
            text = "".join(str(rng.randrange(10)) if letter.isdigit() and rng.random() < 0.2
                           else letter for letter in right)
            thought = rng.choice(["Search.", "It is in image 9.", "ä 图", "</think>"])
            reply = f"<think>{thought}</think><answer>{text}</answer>"
            answer = read_reply(reply, sample, box_format)
            values = {name: score(answer, sample) for name, score in scores.items()}
            rows.append((number, reply, sum(p["reward_weights"][name] * value
                                            for name, value in values.items()
                                            if value is not None)))
    assert len({value for *_, value in rows}) > 20
    return rows


def export(engine, samples, out, further=None):
    """Export questions with the values of the profile tiny, for one GPU."""
    params = profile_params("05_grpo") | profile_params("01_synthesize")
    recipe = exports.Recipe("mine", samples, params, str(PACKAGE / "tiny_base"), further or {})
    return exports.write_export(engine, recipe, out, 1)


@pytest.mark.parametrize("engine", FILES)
def test_rewards_are_the_kits(engine, questions, judged, tmp_path, monkeypatch):
    export(engine, questions, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(["config.yaml", "reward.py", *FILES[engine]])
    swift = types.ModuleType("swift.rewards")
    swift.ORM, swift.orms = type("ORM", (), {"__init__": lambda self, args=None: None}), {}
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", swift)
    spec = importlib.util.spec_from_file_location("reward", tmp_path / "out" / "reward.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    ten = judged[::50][:10]
    facts = [exports.question_to_json(questions[number]) for number, *_ in ten]
    assert [exports.question_to_json(exports.question_from_json(text)) for text in facts] == facts
    replies = [reply for _, reply, _ in ten]
    scores = {
        "verl": lambda: [module.compute_score("mig-kit", reply, text)["score"]
                         for reply, text in zip(replies, facts)],
        "swift": lambda: sum_columns(module, [swift.orms[f"mig_{name}"]()(replies, question=facts)
                                              for name in module.WEIGHTS])}[engine]()
    assert scores == [value for *_, value in ten]


def test_settings_that_a_run_has_besides_are_handed_over_or_named(questions, tmp_path):
    folder = tmp_path / "out.tmp"
    folder.mkdir()
    (folder / "mine").touch()  # no export deletes what it has not made
    differences = export("swift", questions, tmp_path / "out",
                         {"adam_beta2": 0.9, "max_grad_norm": 0.2})
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["adam_beta2"] == 0.9 and (folder / "mine").is_file()
    assert "max_grad_norm 0.2" in differences[-1] and differences[-1] in (
        tmp_path / "out" / "config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.tmp"]


def sum_columns(module, columns):
    """Weighted sums, as the engines make them of a column per reward."""
    return [module.weighted_sum(dict(zip(module.WEIGHTS, row))) for row in zip(*columns)]


def test_a_run_is_handed_over_with_its_own_values(smoke_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(smoke_runs))
    code, said = call("export", "swift", "smoke", "--out", tmp_path / "out", "--gpus", 1)
    metrics = json.loads((smoke_runs / "smoke/04_rejection_sampling/metrics.json").read_text())
    assert code == 0 and f"{metrics['kept']} prompts" in said
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["num_generations"], config["learning_rate"], config["max_steps"]) == (4, 5e-4, 2)
    assert config["model"] == str(smoke_runs / "smoke/03_merge/merged")
    for stage in RECIPE[1:5]:  # before 05 has run, its profile's values count
        shutil.copytree(smoke_runs / "smoke" / stage, tmp_path / "runs/early" / stage)
    shutil.copy(smoke_runs / "smoke/profile.txt", tmp_path / "runs/early")
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    assert call("export", "swift", "early", "--out", tmp_path / "early", "--gpus", 1)[0] == 0
    early = yaml.safe_load((tmp_path / "early" / "config.yaml").read_text())
    assert (early["max_steps"], early["num_generations"]) == (2, 4)
    for stage, name in (("03_merge", "merged"), ("05_grpo", "model")):
        card = ModelCard.load(smoke_runs / "smoke" / stage / name / "README.md")
        assert card.data.library_name == "transformers"


def test_what_cannot_be_exported_is_one_sentence(root, tmp_path):
    samples = list(own_data.iter_samples(write_lines(root, GOOD, name="few.jsonl"), root))
    for out, sentence in ((".", "exists; name a new folder"),
                          ("out", "an update takes 16 prompts")):
        with pytest.raises(UserError, match=sentence):
            export("verl", samples, tmp_path / out)
    code, said = call("export", "verl", "a run", "--out", tmp_path / "out")
    assert code == 1 and "no run 'a run'" in said and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("engine, package", [("verl", "verl==0.9.1"), ("swift", "ms-swift==4.6.0")])
def test_engines_read_prompts_frames_and_rewards(engine, package, questions, judged, tmp_path):
    from mig_kit.models.processors import load_processor, render_prompt

    venv = Path(os.environ.get("MIG_KIT_ENGINES", tmp_path)) / engine
    if not venv.is_dir():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        install = [venv / "bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "torch==2.13.0+cpu", "torchvision", package, "qwen-vl-utils"],
                       check=True)
        subprocess.run([*install, PROJECT_ROOT], check=True)
    out, result = tmp_path / "out", tmp_path / "result.json"
    export(engine, questions, out)
    (tmp_path / "replies.json").write_text(json.dumps([row[:2] for row in judged]))
    words = [venv / "bin/python", Path(__file__).with_name("engine_reads.py"), engine, out,
             tmp_path / "replies.json", result]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read = json.loads(result.read_text())
    assert read["scores"] == pytest.approx([value for *_, value in judged], abs=1e-6)
    box_format = BoxFormat()
    processor = load_processor(PACKAGE / "tiny_base", box_format)
    for row, sample in zip(read["rows"], questions, strict=True):
        inputs = processor(text=[render_prompt(processor, sample, box_format)],
                           images=list(sample.images), return_tensors="pt")
        assert row == {"ids": inputs["input_ids"][0].tolist(),
                       "grid": inputs["image_grid_thw"].tolist()}
