"""Stage 07: the page, its gallery, and what became of a reply."""

import json
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from PIL import Image

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.drawing import plots
from mig_kit.evaluation import report
from mig_kit.prompts import correct_answer, format_answer, parse_reply, read_reply
from mig_kit.rewards import REWARDS
from mig_kit.training.reward_loading import score_functions
from mig_kit.world.scenes import Object, Scene
from mig_kit.world.suites import iter_free_form, make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SCORES = score_functions(REWARDS, BOX_FORMAT)


@pytest.fixture
def export(monkeypatch):
    """Call it with (text, parts to show below it) for the page of a notebook with these cells."""
    def make(*cells):
        notebook = []
        for text, *parts in cells:
            shown = []
            monkeypatch.setattr(report, "display", shown.append)
            report.show(*parts)
            outputs = [new_output("display_data", data, metadata=metadata)
                       for data, metadata in map(DisplayFormatter().format, shown)]
            notebook += [new_markdown_cell(text), new_code_cell(outputs=outputs)]
        return report.export_page("t", notebook)

    return make


def test_a_page_has_what_is_shown_below_its_texts_with_alternative_texts(export):
    figure = plots.plot_curves([{"step": 1, "loss": 2.0}], ["loss"], "Fine-tuning", 1)
    text = export(("## Why",), ("## Training\n\nLook.", figure, [{"a": "<i>", "b": 1.0}], None),
                  ("## Gone", [{"system": "base", "mig_bench": None}], None),
                  ("## Rollouts", Image.new("RGB", (4, 4))))
    assert text.index("Training</h2>") < text.index("Look.") < text.index('alt="Fine-tuning"')
    assert "&lt;i&gt;" in text and "<i>" not in text and "Gone" not in text and "Why" not in text
    assert f'alt="{report.ROLLOUTS}"' in text and text.count("<img") == 2


@pytest.mark.parametrize(("rows", "has", "lacks"), [
    ([{"a": "x", "b": 14.54, "c": None}], "<td>14.5</td>", "<th>c</th>"),
    ([{"a": "x", "b": "y"}, {"a": "together"}], "<td>together</td>", "nan")])
def test_cells_of_a_table(rows, has, lacks):
    html = report.table_html(rows)
    assert has in html and lacks not in html


def test_nothing_that_a_model_or_a_data_set_wrote_can_run(export):
    hostile = ("x\n\n[x](javascript:alert(0)) <script>alert(1)</script>"
               "<img src=x onerror=alert(2)></style></title><a href='javascript:alert(3)'>")
    sample = replace(make_sample("diff", "val", 0), question=hostile, id=f"{hostile}/../x.png",
                     task=hostile, options=(hostile, "b"))
    reply = f"<think>{hostile}</think><answer>{hostile}</answer>"
    scores = {hostile: next(iter(SCORES.values()))}
    cards = report.draw_gallery([("kept", sample, {"sft": reply})], BOX_FORMAT, scores)
    head = report.headline("t", hostile, hostile, hostile)
    soup = BeautifulSoup(export(("## All", head, [{hostile: hostile, "b": 1}], cards)),
                         "html.parser")
    assert not soup.find_all(["script", "a"]) and soup.find("strong").text == hostile
    assert all(hostile in tag.text for tag in soup.find_all("small"))
    names = {name for tag in soup.find_all() for name in tag.attrs}
    assert not [name for name in names if name.startswith("on") or name == "href"]


def test_the_gallery_says_which_rewards_training_counts():
    sample = make_sample("diff", "val", 0)
    reply = f"<answer>{correct_answer(sample, BOX_FORMAT)}</answer>"
    for thought, counted in (("In image 2.", "format 1"), ("In image 9.", "format 0")):
        replies = {"grpo": f"<think>{thought}</think>{reply}"}
        html = report.draw_gallery([("kept", sample, replies)], BOX_FORMAT, SCORES).data
        assert f"GRPO, {counted}, image 1" in html and html.count("<img") == 1


def reply_for(sample, number=None, shift=0):
    image, box = sample.targets[0]
    x1, y1, x2, y2 = to_model_box(box, sample.sizes[image - 1], BOX_FORMAT)
    answer = format_answer(number or image, (x1 + shift, y1, x2 + shift, y2))
    return f"<think></think><answer>{answer}</answer>"


@pytest.mark.parametrize(("outcome", "more"), [
    ("correct", {}), ("wrong image", {"number": 1}), ("loose box", {"shift": 12}),
    ("wrong object", {"shift": 40}), ("no answer", None)])
def test_outcomes_by_hand(outcome, more):
    sample = replace(make_sample("diff", "val", 0), spec=None)
    reply = "?" if more is None else reply_for(sample, **more)
    assert report.classify_outcome(read_reply(reply, sample, BOX_FORMAT), sample) == outcome
    replies = {"a": {sample.id: reply_for(sample)}, "b": {sample.id: reply}}
    assert report.count_outcomes([sample], replies, BOX_FORMAT) == {
        "a": dict.fromkeys(report.OUTCOMES, 0) | {"correct": 1},
        "b": dict.fromkeys(report.OUTCOMES, 0) | {outcome: 1}}


def test_a_wrong_letter_is_a_wrong_option():
    choice = next(iter_free_form("val", 1))
    reply = f"<think></think><answer>{'B' if choice.letter == 'A' else 'A'}</answer>"
    assert report.classify_outcome(parse_reply(reply), choice) == "wrong option"


def test_a_box_on_another_object_is_no_loose_box():
    """A box around a neighbour that touches the target by a third, and one that misses all."""
    sample = make_sample("diff", "val", 0)
    image, (x1, y1, x2, y2) = sample.targets[0]
    width = x2 - x1
    neighbour = (x1 + 0.5 * width, y1, x2 + 0.5 * width, y2)

    def classify(shift, *objects):
        scenes = [Scene(84, 84, objects if number == image else ()) for number in (1, 2)]
        spec = replace(sample.spec, scenes=scenes) if objects else None
        answer = read_reply(reply_for(sample, shift=shift * width), sample, BOX_FORMAT)
        return report.classify_outcome(answer, replace(sample, spec=spec))

    target = Object("red", "star", "plain", (x1, y1, x2, y2))
    neighbour = replace(target, box=neighbour)
    assert classify(0.4) == "loose box", "IoU 0.43"
    assert classify(0.4, target, neighbour) == "wrong object"
    assert classify(0.4, target) == "loose box"
    assert classify(3, target) == "wrong object"


def test_the_gallery_covers_the_outcomes():
    samples = [make_sample("diff", "val", i) for i in range(4)]
    replies = {system: {sample.id: reply_for(sample) if i in correct else ""
                        for i, sample in enumerate(samples)}
               for system, correct in (("base", ()), ("sft", (1, 2)), ("grpo", (0, 1)))}
    gallery = report.pick_gallery(samples, replies, BOX_FORMAT)
    assert [(kind, sample.id) for kind, sample, _ in gallery] == list(zip(
        ("wrong, then correct", "correct both times", "correct, then wrong", "wrong both times"),
        (sample.id for sample in samples)))
    assert gallery[0][2] == {"base": "", "sft": "", "grpo": reply_for(samples[0])}


def test_the_gallery_shows_every_task_of_a_suite():
    samples = [make_sample(task, "val", i) for task in ("diff", "region", "common_object")
               for i in range(4)]
    wrong = {sample.id: "" for sample in samples}
    half = {sample.id: reply_for(sample) if sample.task == "diff" else "" for sample in samples}
    gallery = report.pick_gallery(samples, {"base": wrong, "grpo": half}, BOX_FORMAT, 2)
    assert {sample.task for _, sample, _ in gallery} == {"diff", "region", "common_object"}
    assert [kind for kind, *_ in gallery].count("wrong both times") == 2


def test_replies_are_read_by_system_and_sample(tmp_path):
    samples = make_suite("mmiu", "test", 1)
    for system in ("base", "grpo", "other"):
        lines = [json.dumps({"id": sample.id, "replies": [f"{system} {sample.task}"]}) + "\n"
                 for sample in samples]
        (tmp_path / f"{system}_mmiu_greedy.jsonl").write_text("".join(lines))
    replies = report.load_greedy_replies(tmp_path, "mmiu", samples, ("grpo", "base"))
    assert list(replies) == ["base", "grpo"]
    assert replies["base"][samples[0].id] == f"base {samples[0].task}"
    assert report.load_greedy_replies(tmp_path, "mmiu", [], ("base",)) == {}
