"""Model cards: the hub's own reader opens them, scores with intervals stand in model-index."""

import pytest
from huggingface_hub import ModelCard

from mig_kit.common import write_json
from mig_kit.pipeline import model_cards, store
from mig_kit.pipeline.params import profile_params

DRAWN = {"mig_bench": {"n": 20, "score": 10.0, "ci95": [2.5, 26.1]}}
NAME = "a|b`<script>.jsonl\n# x"
FORMAT = {"min_pixels": 3136, "max_pixels": 401408, "coordinates": "absolute"}


def write_data_record(root, params):
    (root / "mine" / "01_synthesize").mkdir(parents=True)
    write_json(root / "mine" / "01_synthesize" / "run.json", {"params": params})


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The model folder of a run on data with a hostile name, with its card."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    params = profile_params("05_grpo", "qwen2_5_vl_7b") | {
        **FORMAT, "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "rewards": ["box", "```\n</script>.py:f"]}
    write_data_record(tmp_path, params | {"data": NAME})
    folder = tmp_path / "mine" / "05_grpo"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").touch()
    model_cards.write_card("05_grpo", folder, "mine", params)
    return folder / "model"


def test_the_hub_reads_a_card_and_its_scores(model, tmp_path):
    card = ModelCard.load(model / "README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.license is None
    assert "<script>" not in card.text and "\n# x" not in card.text and "\n```\n<" not in card.text
    model_cards.add_scores(model, {"strict": DRAWN})
    real = {"tasks": {}, "n": 4295, "avg": {"acc@0.5": 61.237, "ci95": [60.0, 62.5]}}
    for _ in range(2):  # the second replaces the first
        model_cards.add_scores(model, {"official": {"mig_bench": real},
                                       "strict": {"mig_bench": real}})
    for folder in ("a", "b", "a"):  # other questions, in two files of one name
        file = tmp_path / folder / "val.parquet"
        file.parent.mkdir(exist_ok=True)
        file.write_text(folder)
        model_cards.add_scores(model, {"strict": DRAWN}, file)
    text = (model / "README.md").read_text()
    results = ModelCard.load(model / "README.md").data.eval_results
    ours, theirs = {"ci95": [2.5, 26.1], "n": 20}, {"ci95": [60.0, 62.5], "n": 4295}
    assert sorted((result.dataset_name, result.dataset_config or "", result.metric_name,
                   result.metric_value) for result in results) == [
        ("MIG-Bench-like (drawn)", "", "accuracy, strict", 10.0),
        *[("MIG-Bench-like (drawn)", "val.parquet", "accuracy, strict", 10.0)] * 2,
        ("mig_bench", "", "acc@0.5, official", 61.24), ("mig_bench", "", "acc@0.5, strict", 61.24)]
    assert all(result.metric_args == (ours if result.metric_value == 10 else theirs)
               for result in results)
    assert "model-index" in text and card.text.strip() in text


def test_a_card_is_no_output_of_its_stage(model):
    (model.parent / "README.md").touch()  # as 01's data card
    names = [str(path.relative_to(model.parent)) for path in store._output_files(model.parent)]
    assert names == ["README.md", "model/config.json"]


def test_a_folder_without_a_card_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no README.md"):
        model_cards.require_card(tmp_path)


def test_a_card_names_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    params = profile_params("05_grpo") | FORMAT | {
        "base_model": "/home/me/models/Qwen-7B", "rewards": ["box", "/home/me/mine.py:near"]}
    write_data_record(tmp_path, params | {"data": "/home/me/own.jsonl"})
    (tmp_path / "model").mkdir()
    model_cards.write_card("05_grpo", tmp_path, "mine", params)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "/home" not in card.content and "mine.py:near" in card.text
    assert card.data.base_model is None and "Qwen" in card.text
