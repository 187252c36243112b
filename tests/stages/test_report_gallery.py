"""The gallery: nothing that a model wrote runs in the page; what became of a reply."""

import json
from dataclasses import replace

from bs4 import BeautifulSoup

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import correct_answer, format_answer
from mig_kit.rewards import REWARDS
from mig_kit.stages import report, report_gallery
from mig_kit.stages.report_gallery import classify_outcome, gallery_html, pick_gallery
from mig_kit.training.reward_loading import score_functions
from mig_kit.world.suites import iter_free_form, make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SCORES = score_functions(REWARDS, BOX_FORMAT)


def test_nothing_that_a_model_or_a_data_set_wrote_can_run():
    hostile = ("<script>alert(1)</script><img src=x onerror=alert(2)></style></title>"
               "<a href='javascript:alert(3)'>")
    sample = replace(make_sample("diff", "val", 0), question=hostile, id=f"{hostile}/../x.png",
                     task=hostile, options=(hostile, "b"))
    reply = f"<think>{hostile}</think><answer>{hostile}</answer>"
    cards = gallery_html([(hostile, sample)], {hostile: {sample.id: reply}}, BOX_FORMAT, SCORES)
    page = report.render_page(f"mine {hostile}", [(hostile, cards)], hostile)
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(["script", "a"]) and soup.title.text == f"mine {hostile}"
    names = {name for tag in soup.find_all() for name in tag.attrs}
    assert not [name for name in names if name.startswith("on") or name == "href"]


def test_a_card_shows_the_rewards_that_training_counts():
    sample = make_sample("diff", "val", 0)
    reply = f"<answer>{correct_answer(sample, BOX_FORMAT)}</answer>"
    for thought, counted in (("In image 2.", "format 1"), ("In image 9.", "format 0")):
        card = report_gallery.sample_card(sample, {"GRPO": f"<think>{thought}</think>{reply}"},
                                  BOX_FORMAT, SCORES)
        assert f"{counted}, image 1" in card


def reply_for(sample, number=None, shift=0):
    image, box = sample.targets[0]
    x1, y1, x2, y2 = to_model_box(box, sample.sizes[image - 1], box_format=BoxFormat())
    answer = format_answer(number or image, (x1 + shift, y1, x2 + shift, y2))
    return f"<think></think><answer>{answer}</answer>"


def test_choose_covers_the_outcomes():

    samples = [make_sample("diff", "val", i) for i in range(4)]
    right = {
        s.id: reply_for(s)
        for s in samples
    }
    before = {s.id: right[s.id] if i in (1, 2) else "" for i, s in enumerate(samples)}
    after = {s.id: right[s.id] if i in (0, 1) else "" for i, s in enumerate(samples)}
    chosen = dict(
        (kind, s.id) for kind, s in pick_gallery(samples, before, after, BOX_FORMAT)
    )
    assert chosen == {
        "wrong, then correct": samples[0].id,
        "correct both times": samples[1].id,
        "correct, then wrong": samples[2].id,
        "wrong both times": samples[3].id,
    }


def test_outcomes_by_hand():
    sample, choice = make_sample("diff", "val", 0), next(iter_free_form("val", 1))
    replies = {
        "correct": reply_for(sample),
        "wrong image": reply_for(sample, 1),
        "loose box": reply_for(sample, shift=12),
        "wrong object": reply_for(sample, shift=40),
        "no answer": "?",
    }
    for kind, reply in replies.items():
        assert classify_outcome(reply, sample, BOX_FORMAT) == kind
    wrong = "B" if choice.letter == "A" else "A"
    assert (
        classify_outcome(f"<think></think><answer>{wrong}</answer>", choice, BOX_FORMAT)
        == "wrong option"
    )
    counts = report_gallery.count_outcomes(
        [sample], {"a": {sample.id: replies["correct"]}, "b": {sample.id: "?"}}, BOX_FORMAT
    )
    assert counts == {"a": {"correct": 1, "no answer": 0}, "b": {"correct": 0, "no answer": 1}}


def test_a_box_on_another_object_is_no_loose_box():
    """A box around a neighbour that touches the target by a third, and one that misses all."""
    sample = make_sample("diff", "val", 0)
    image, (x1, y1, x2, y2) = sample.targets[0]
    width = x2 - x1
    neighbour = (x1 + 0.5 * width, y1, x2 + 0.5 * width, y2)
    boxes = [[] for _ in sample.images]
    boxes[image - 1] = [(x1, y1, x2, y2), neighbour]
    half = reply_for(sample, shift=0.4 * width)
    assert classify_outcome(half, sample, BOX_FORMAT) == "loose box", "IoU 0.43"
    assert classify_outcome(half, sample, BOX_FORMAT, {sample.id: boxes}) == "wrong object"
    boxes[image - 1] = boxes[image - 1][:1]
    assert classify_outcome(half, sample, BOX_FORMAT, {sample.id: boxes}) == "loose box"
    far = reply_for(sample, shift=3 * width)
    assert classify_outcome(far, sample, BOX_FORMAT, {sample.id: boxes}) == "wrong object"


def test_the_gallery_shows_every_task_of_a_suite():
    samples = [make_sample(task, "val", i) for task in ("diff", "region", "common_object")
               for i in range(4)]
    wrong = {sample.id: "" for sample in samples}
    half = {sample.id: reply_for(sample) if sample.task == "diff" else ""
            for sample in samples}
    gallery = pick_gallery(samples, wrong, half, BOX_FORMAT, 2)
    assert {sample.task for _, sample in gallery} == {"diff", "region", "common_object"}
    assert [kind for kind, _ in gallery].count("wrong both times") == 2


def test_the_gallery_is_filtered_without_a_script():
    samples = [make_sample("diff", "val", 0), make_sample("region", "val", 0)]
    replies = {"sft": {s.id: "?" for s in samples}}
    text = gallery_html(
        [("kept", samples[0]), ("<b>lost</b>", samples[1])], replies, BOX_FORMAT, SCORES
    )
    assert (
        text.count('class="card task-') == 2
        and "body:has(#pick-task-1:checked) .card:not(.task-1)" in text
    )
    assert "pick-suite" not in text and "pick-outcome" not in text, "one of a kind is no filter"
    assert text.count('alt="2 images with the target') == 2
    assert "<script" not in text and "<b>lost" not in text


def test_replies_are_read_by_system_and_sample(tmp_path):
    samples = make_suite("mmiu", "test", 1)
    for system in ("base", "grpo", "other"):
        lines = [json.dumps({"id": sample.id, "replies": [f"{system} {sample.task}"]})
                 for sample in samples]
        (tmp_path / f"{system}_mmiu_greedy.jsonl").write_text("\n".join(lines))
    replies = report_gallery.load_greedy_replies(tmp_path, "mmiu", samples, ("grpo", "base"))
    assert list(replies) == ["base", "grpo"]
    assert replies["base"][samples[0].id] == f"base {samples[0].task}"
    assert report_gallery.load_greedy_replies(tmp_path, "mmiu", [], ("base",)) == {}
