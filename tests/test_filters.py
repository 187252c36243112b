"""The filter of a model teacher's traces, by hand."""

import pytest

from mig_kit import filters
from mig_kit.boxes import BoxFormat, rescale_box
from mig_kit.prompts import correct_answer
from mig_kit.sample import Trace
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SAMPLE = make_sample("diff", "cot", 1)


@pytest.mark.parametrize("thinking,expected", [
    ("The answer is in image 2. It is the only star.", True),
    ("The target is located in the second image.", True),
    ("Therefore it is the star.", True),
    ("The box is at (10,20).", True),
    ("The final answer is the star.", True),
    ("Image 1 shows a star, image 2 a ring. The target is in image 2.", False),
    ("Compare the images. The answer is in image 2.", False),
    ("To find the target, look at image 1 first.", False),
    ("", False)])
def test_conclusions_up_front(thinking, expected):
    assert filters.concludes_up_front(thinking) == expected


def test_given_answers_in_any_coordinates_are_revealed():
    sample = make_sample("diff", "cot", 4)
    target = sample.targets[0]
    size = sample.sizes[target.image - 1]
    x1, y1, x2, y2 = (round(value) for value in target.box)
    in_thousandths = rescale_box(target.box, size, (1000, 1000))
    in_fractions = rescale_box(target.box, size, (1, 1))
    for text in (f"({x1},{y1}),({x2},{y2})", f"x1={x1}, y1={y1}, x2={x2}, y2={y2}",
                 f"[{x1}.0, {y1}.0, {x2}.0, {y2}.0]",
                 "<box>{:.0f} {:.0f} {:.0f} {:.0f}</box>".format(*in_thousandths),
                 "{:.3f}, {:.3f}, {:.3f}, {:.3f}".format(*in_fractions),
                 "as in the ground truth", "the provided answer", "The verified answer fits"):
        assert filters.reveals_answer(f"I see it at {text} there.", sample, BOX_FORMAT), text
    for text in ("image 1, 2, 3 and 4 things", "[900, 900, 950, 950]", "a star at the top",
                 "the answer must be round"):
        assert not filters.reveals_answer(text, sample, BOX_FORMAT), text


def test_each_drop_reason_of_a_model_teachers_trace():
    answer = f"<answer>{correct_answer(SAMPLE, BOX_FORMAT)}</answer>"

    def drop_reason(thinking="Both show a ring.", end=answer, error=""):
        trace = Trace(f"<think>{thinking}</think>{end}", "endpoint", error)
        return filters.drop_reason_of_model_teacher(trace, SAMPLE, BOX_FORMAT)

    assert drop_reason() == ""
    assert drop_reason(error="x") == "no reply"
    assert drop_reason("The answer is in image 2.") == "up front"
    assert drop_reason("As the ground truth says.") == "reveals"
    assert drop_reason(end="") == "format", "and the others that the rules' traces have, too"
    choice = next(iter_free_form("cot", 1))
    reply = f"<think>It shows one.</think><answer>{choice.letter}</answer>"
    trace = Trace(reply, "endpoint", "")
    assert filters.drop_reason_of_model_teacher(trace, choice, BOX_FORMAT) == ""
