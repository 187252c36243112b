"""Model cards: the hub's own reader opens them."""

import pytest
from huggingface_hub import ModelCard

from mig_kit import __version__
from mig_kit.boxes import PROMPT
from mig_kit.common import write_json
from mig_kit.pipeline import model_cards, store
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.runs import Run

NAME = "a|b`<script>.jsonl\n# x"
FORMAT = {"min_pixels": 3136, "max_pixels": 401408, "coordinates": "absolute",
          "prompt": PROMPT}


@pytest.fixture
def write_card(tmp_path, monkeypatch):
    """Call it with a data file and parameters of 05 for a run's model folder, with its card."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))

    def write(data, **changes):
        params = profile_params("05_grpo") | FORMAT | changes
        folder = tmp_path / "mine" / "05_grpo"
        for path in (tmp_path / "mine" / "01_synthesize", folder / "model"):
            path.mkdir(parents=True)
        write_json(tmp_path / "mine" / "01_synthesize" / "run.json",
                   {"params": params | {"data": data}})
        (folder / "model" / "config.json").touch()
        model_cards.write_card("05_grpo", folder, Run("mine"), params)
        return folder / "model"

    return write


@pytest.mark.nightly
def test_the_hub_reads_a_card(write_card):
    model = write_card(NAME, base_model="Qwen/Qwen2.5-VL-7B-Instruct",
                       rewards=["box", "```\n</script>.py:f"])
    card = ModelCard.load(model / "README.md")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and card.data.license is None
    assert "\n# x" not in card.text and "\n```\n<" not in card.text


def test_a_card_is_no_output_of_its_stage_and_names_no_folder_of_the_machine(write_card):
    model = write_card("/home/me/own.jsonl", base_model="/home/me/models/Qwen-7B",
                       rewards=["box", "/home/me/mine.py:near"])
    card = ModelCard.load(model / "README.md")
    assert "/home" not in card.content and "mine.py:near" in card.text
    assert card.data.base_model is None and "Qwen" in card.text
    assert f"mig-kit {__version__};" in card.text
    (model.parent / "README.md").touch()  # as 01's data card
    names = [str(path.relative_to(model.parent)) for path in store._output_files(model.parent)]
    assert names == ["README.md", "model/config.json"]
