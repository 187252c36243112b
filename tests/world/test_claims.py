"""Claims by hand, in each style and with each way of being wrong, and the teacher's own."""

from dataclasses import replace
from random import Random

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROJECT_ROOT
from mig_kit.prompts import parse_reply
from mig_kit.sample import Sample
from mig_kit.training import reward_loading
from mig_kit.world import claims
from mig_kit.world.claims import read_claims
from mig_kit.world.scenes import Object, Scene
from mig_kit.world.suites import SUITES, iter_training_mix, make_suite
from mig_kit.world.tasks import SampleSpec, list_image_notes, render_sample
from mig_kit.world.teacher import write_reasoning, write_trace


def make_scene(*names):
    """Objects from left to right, the second the largest."""
    return Scene(112, 84, tuple(
        Object(*name.split()[-2:], "striped" if "striped" in name else "plain",
               (36.0 * place, 4.0, 36.0 * place + (26 if place == 1 else 18), 24.0))
        for place, name in enumerate(names)))


SCENES = [make_scene("red star", "blue ring"), make_scene("red star", "striped green cross")]
SPEC = SampleSpec(SCENES, "Which thing in image 2 is not in image 1?",
                  [(2, "striped green cross")], "new: striped green cross.",
                  list_image_notes(SCENES), reference="blue ring")
SAMPLE = render_sample(SPEC, "mig_bench", "diff", "test", 0)
COUNTING = replace(SAMPLE, finding="striped: 1.", options=("2", "1"), letter="B")
WITHOUT_ANSWER = render_sample(SampleSpec(SCENES, "Which image is one, two?", options=(
    "1 2", "2 1"), letter="A"), "mmiu", "order", "test", 0)
PART = replace(SAMPLE, finding="", options=("image 1", "image 2"), letter="B")
FROM_FILE = Sample("a", "mig_bench", "multi_view", "rl", SAMPLE.images, "", finding="the same: x.",
                   reference=(0, 0, 9, 9), notes=("image 1: the box holds blue ring.",
                                                  "image 2: red star, striped green cross."))


def count_claims(reply, sample):
    return claims.count_claims(parse_reply(reply), sample)


def judge(sentence, sample=SAMPLE):
    claim, = read_claims(f"<think>Compare. {sentence}</think><answer>A</answer>", sample)
    return claim.kind, claim.is_true


@pytest.mark.parametrize("sentence, kind, is_true", [
    ("image 1: red star, blue ring.", "list", True),
    ("image 1: blue ring.", "list", True),  # an object that is left out lowers coverage
    ("image 2: red star, blue ring.", "list", False),  # another image's
    ("image 3: red star.", "list", False),
    ("image 0: red star.", "list", False),
    ("image 1: red star, blue ring, red cross.", "list", False),
    ("image 1: red star, red star.", "list", False),
    ("image 2: green cross.", "list", False),
    ("image 1: the box holds blue ring.", "detail", True),
    ("image 1: the box holds red star.", "detail", False),
    ("image 2: the box holds red star.", "detail", False),
    ("image 1: the leftmost is red star.", "detail", True),
    ("image 1: the largest is red star.", "detail", False),
    ("image 1: the top is red star.", "detail", None),  # both are as high
    ("image 1: the top is red cross.", "detail", False),
    ("red star: image 1, image 2.", "place", True),
    ("blue ring: image 1, image 2.", "place", False),
    ("blue ring: image 4.", "place", False),
    ("blue ring: image 0.", "place", False),
    ("red cross: image 0.", "place", True),
    ("new: striped green cross.", "conclusion", True),
    ("new: blue ring.", "conclusion", False),
    ("things: 2.", "conclusion", None),  # no number is asked for
    ("image 1: red striped star.", "", None),
    ("image 1: red star and blue ring.", "", None),
    ("image one: red star.", "", None),
    ("Where 1: red star.", "", None),
    ("[1,2,30,40]", "", None)])
def test_a_claim_is_true_false_or_not_judged(sentence, kind, is_true):
    assert judge(sentence) == (kind, is_true)


@pytest.mark.parametrize("sample, sentence, is_true", [
    (COUNTING, "striped: 1.", True), (COUNTING, "striped: 2.", False),
    (COUNTING, "things: 2.", None), (SAMPLE, "in all: striped green cross.", None),
    (COUNTING, "new: red star.", None), (PART, "the part: striped green cross.", True),
    (PART, "the part: blue ring.", False), (PART, "things: 2.", None),
    (WITHOUT_ANSWER, "new: red star.", None),
    (WITHOUT_ANSWER, "image 1: the box holds red star.", False),  # the question names no box
    (FROM_FILE, "image 1: the box holds blue ring.", True),
    (FROM_FILE, "image 1: the box holds red star.", False),
    (FROM_FILE, "image 1: red star.", None),  # the notes do not list it
    (FROM_FILE, "image 2: blue ring.", False),
    (FROM_FILE, "blue ring: image 1, image 2.", False),
    (FROM_FILE, "red star: image 1, image 2.", None), (FROM_FILE, "red cross: image 0.", None),
    (FROM_FILE, "image 1: the leftmost is red star.", None)])
def test_what_a_question_and_notes_leave_open_is_not_judged(sample, sentence, is_true):
    assert judge(sentence, sample)[1] is is_true


def test_the_claims_of_a_reply_are_counted_and_stand_where_they_say():
    reply = ("<think>Compare. image 1: red star. image 2: red star, red ring. "
             "hm. new: blue ring.</think><answer>...</answer>")
    false = [reply[claim.start:claim.end] for claim in read_claims(reply, SAMPLE)
             if claim.is_true is False]
    assert false == ["image 2: red star, red ring.", "new: blue ring."]
    assert count_claims(reply, SAMPLE) == (1, 3, 1, 2, 4), "2 of 4 objects are listed"
    for style, expected in (("evidence", (3, 3, 0, 4, 4)), ("finding", (1, 1, 0, 0, 0)),
                            ("method", (0,) * 5)):
        reply = f"<think>{write_reasoning(SAMPLE, style)}</think>"
        assert count_claims(reply, SAMPLE) == expected
    assert count_claims("<think>image 1: red star.", SAMPLE) == (0,) * 5, "cut"


def test_all_that_the_teacher_says_is_true_of_scenes_and_of_notes():
    drawn = [sample for sample in [*iter_training_mix("val", 3, 3, 1),
                                   *make_suite("ood_grounding", "test", 10)]
             if sample.targets or sample.options]
    for sample in drawn:
        reply = write_trace(sample, Random(sample.id), BoxFormat(), (1, 0, 0), 0).text
        for known in (sample, replace(sample, spec=None)):
            counts = count_claims(reply, known)
            assert counts.true == counts.judged and not counts.unjudged, (sample.id, reply)
            assert counts.listed == counts.to_list and bool(counts.true) == bool(known.notes)


def test_every_suite_can_be_judged():
    for suite in SUITES:
        for sample in make_suite(suite, "test", 2):
            reply = f"<think>image 1: {sample.spec.scenes[0].names()[0]}.</think>"
            assert count_claims(reply, sample)[:3] == (1, 1, 0)


def test_the_guides_reward_pays_true_claims_about_every_image(tmp_path):
    file = PROJECT_ROOT / "notebooks" / "guide" / "true_claims.py"
    reward_loading.copy_own_files([f"{file}:true_claims"], tmp_path)
    reward = reward_loading.load_rewards([f"{file}:true_claims"], tmp_path)["true_claims"]
    sample = replace(SAMPLE, spec=None)
    for thought, value in ((" ".join([*sample.notes, sample.finding]), 1.0),
                           (f"{sample.notes[0]} image 2: blue ring.", 0.5),
                           (sample.notes[0], 0.0), (sample.finding, 0.0)):
        assert reward(parse_reply(f"<think>{thought}</think>"), sample) == value
    assert reward(parse_reply(""), replace(sample, notes=())) is None
