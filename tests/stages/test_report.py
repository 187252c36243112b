"""Stage 07: the page, its gallery, and what became of a reply."""

import json
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.drawing import plots
from mig_kit.prompts import correct_answer, format_answer
from mig_kit.rewards import REWARDS
from mig_kit.stages import report
from mig_kit.training.reward_loading import score_functions
from mig_kit.world.scenes import Object, Scene
from mig_kit.world.suites import SUITES, iter_free_form, make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SCORES = score_functions(REWARDS, BOX_FORMAT)


def test_the_page_says_what_to_look_at():
    gap = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": 11.0}
    suite = {"score": 50.0, "ci95": [40.0, 60.0], "sampled": 45.0, "n": 20}
    metrics = {"systems": {system: dict.fromkeys(SUITES, suite)
                           for system in ("base", "sft", "grpo")},
               "deltas": {delta: dict.fromkeys(SUITES, gap) for delta in ("grpo-sft", "grpo-base")}}
    rows = {"ood": [{"suite": "LISA-like (drawn)", "base": "<i>"}], "stages": [], "changed": []}

    def render(facts="", **figures):
        sections = report.report_sections(metrics, figures, report.Markup("cards"), rows)
        return report.render_page("t", sections, facts)

    text = render(loss=None)
    assert text.count("<figcaption>") == 3, "claims, ood_rows and sampled"
    assert "&lt;i&gt;" in text and "<i>" not in text and "pass@k" not in text
    text = render("seed 3, <b>", loss=plots.plot_curves([{"step": 1, "loss": 2.0}], ["loss"],
                                                        "Fine-tuning", 1))
    assert "<p class=facts>seed 3, &lt;b&gt;</p>" in text and 'alt="Fine-tuning"' in text
    assert "<figcaption>A loss that still falls steeply" in text


@pytest.mark.parametrize(("rows", "has", "lacks"), [
    ([{"a": "<b>.py", "b": 14.5}], "&lt;b&gt;.py", "<b>"),
    ([{"a": "x", "b": 14.5, "c": None}], "<td>14.50</td>", "<th>c</th>"),
    ([{"a": "x", "b": [1.0, 2.04]}], "<td>1.0 to 2.0</td>", "["),
    ([{"a": "x", "b": "y"}, {"a": "together"}], "<td>together</td>", "nan")])
def test_cells_of_a_table(rows, has, lacks):
    html = report.html_table(rows)
    assert has in html and lacks not in html


def test_a_table_without_values_has_no_heading():
    empty = report.html_table([{"system": "base", "mig_bench": None}])
    assert "drawn" not in report.render_page("t", [("drawn", empty)])


def test_nothing_that_a_model_or_a_data_set_wrote_can_run():
    hostile = ("<script>alert(1)</script><img src=x onerror=alert(2)></style></title>"
               "<a href='javascript:alert(3)'>")
    sample = replace(make_sample("diff", "val", 0), question=hostile, id=f"{hostile}/../x.png",
                     task=hostile, options=(hostile, "b"))
    reply = f"<think>{hostile}</think><answer>{hostile}</answer>"
    cards = report.gallery_html([(hostile, sample)], {hostile: {sample.id: reply}}, BOX_FORMAT,
                                SCORES)
    page = report.render_page(f"mine {hostile}", [(hostile, cards)], hostile)
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(["script", "a"]) and soup.title.text == f"mine {hostile}"
    names = {name for tag in soup.find_all() for name in tag.attrs}
    assert not [name for name in names if name.startswith("on") or name == "href"]


def test_a_card_shows_the_rewards_that_training_counts():
    sample = make_sample("diff", "val", 0)
    reply = f"<answer>{correct_answer(sample, BOX_FORMAT)}</answer>"
    for thought, counted in (("In image 2.", "format 1"), ("In image 9.", "format 0")):
        card = report.sample_card(sample, {"GRPO": f"<think>{thought}</think>{reply}"},
                                  BOX_FORMAT, SCORES)
        assert f"{counted}, image 1" in card


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
    assert report.classify_outcome(reply, sample, BOX_FORMAT) == outcome
    replies = {"a": {sample.id: reply_for(sample)}, "b": {sample.id: reply}}
    assert report.count_outcomes([sample], replies, BOX_FORMAT) == {
        "a": {"correct": 1} | {outcome: int(outcome == "correct")},
        "b": {"correct": 0} | {outcome: 1}}


def test_a_wrong_letter_is_a_wrong_option():
    choice = next(iter_free_form("val", 1))
    reply = f"<think></think><answer>{'B' if choice.letter == 'A' else 'A'}</answer>"
    assert report.classify_outcome(reply, choice, BOX_FORMAT) == "wrong option"


def test_a_box_on_another_object_is_no_loose_box():
    """A box around a neighbour that touches the target by a third, and one that misses all."""
    sample = make_sample("diff", "val", 0)
    image, (x1, y1, x2, y2) = sample.targets[0]
    width = x2 - x1
    neighbour = (x1 + 0.5 * width, y1, x2 + 0.5 * width, y2)

    def classify(shift, *objects):
        scenes = [Scene(84, 84, objects if number == image else ()) for number in (1, 2)]
        spec = replace(sample.spec, scenes=scenes) if objects else None
        return report.classify_outcome(reply_for(sample, shift=shift * width),
                                       replace(sample, spec=spec), BOX_FORMAT)

    target = Object("red", "star", "plain", (x1, y1, x2, y2))
    neighbour = replace(target, box=neighbour)
    assert classify(0.4) == "loose box", "IoU 0.43"
    assert classify(0.4, target, neighbour) == "wrong object"
    assert classify(0.4, target) == "loose box"
    assert classify(3, target) == "wrong object"


def test_the_gallery_covers_the_outcomes():
    samples = [make_sample("diff", "val", i) for i in range(4)]
    before, after = ({sample.id: reply_for(sample) if i in correct else ""
                      for i, sample in enumerate(samples)} for correct in ((1, 2), (0, 1)))
    gallery = report.pick_gallery(samples, before, after, BOX_FORMAT)
    assert [(kind, sample.id) for kind, sample in gallery] == list(zip(
        ("wrong, then correct", "correct both times", "correct, then wrong", "wrong both times"),
        (sample.id for sample in samples)))


def test_the_gallery_shows_every_task_of_a_suite():
    samples = [make_sample(task, "val", i) for task in ("diff", "region", "common_object")
               for i in range(4)]
    wrong = {sample.id: "" for sample in samples}
    half = {sample.id: reply_for(sample) if sample.task == "diff" else "" for sample in samples}
    gallery = report.pick_gallery(samples, wrong, half, BOX_FORMAT, 2)
    assert {sample.task for _, sample in gallery} == {"diff", "region", "common_object"}
    assert [kind for kind, _ in gallery].count("wrong both times") == 2


def test_the_gallery_has_a_card_a_question_and_no_script():
    samples = [make_sample("diff", "val", 0), make_sample("region", "val", 0)]
    text = report.gallery_html([("kept", samples[0]), ("<b>lost</b>", samples[1])],
                               {"sft": {s.id: "?" for s in samples}}, BOX_FORMAT, SCORES)
    assert text.count("<div class=card>") == 2 == text.count('alt="2 images with the target')
    assert "<script" not in text and "<b>lost" not in text


def test_replies_are_read_by_system_and_sample(tmp_path):
    samples = make_suite("mmiu", "test", 1)
    for system in ("base", "grpo", "other"):
        lines = [json.dumps({"id": sample.id, "replies": [f"{system} {sample.task}"]})
                 for sample in samples]
        (tmp_path / f"{system}_mmiu_greedy.jsonl").write_text("\n".join(lines))
    replies = report.load_greedy_replies(tmp_path, "mmiu", samples, ("grpo", "base"))
    assert list(replies) == ["base", "grpo"]
    assert replies["base"][samples[0].id] == f"base {samples[0].task}"
    assert report.load_greedy_replies(tmp_path, "mmiu", [], ("base",)) == {}
