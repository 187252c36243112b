"""Prompts and the parser: it never raises, and never gives a box outside the rules."""

import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from mig_kit import prompts
from mig_kit.boxes import BoxFormat
from mig_kit.pipeline.params import validate_params
from mig_kit.prompts import chat_messages, format_question, parse_reply, read_reply
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
GOOD = '<think>Compare.</think><answer>{"image": 2, "box": [10,20,30,40]}</answer>'
pieces = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", '{"image": ', "2", ', "box": [', "1,2,3,4",
    "]}", "[", "NaN", "1e999", "-1", "A", "{}", "null", "[[1,2,3,4]]", '"', " ", "\n"])


def first_sample(task, has_size):
    samples = (make_sample(task, "val", i) for i in range(200))
    return next(sample for sample in samples if has_size(sample.sizes))


def test_a_prompt_of_one_s_own_is_of_the_run_and_stays_when_its_file_goes(tmp_path):
    file = tmp_path / "brief.txt"
    file.write_text("Look twice. {question}\n{instruction}\n")
    params = validate_params({"prompt": str(file)}, "01_synthesize")
    file.unlink()
    assert validate_params(params, "01_synthesize") == params
    sample = make_sample("diff", "val", 0)
    asked = chat_messages(sample, BoxFormat.of(params))[0]["content"][-1]["text"]
    assert asked == f"Look twice. {sample.question}\n{prompts.GROUNDING_INSTRUCTION}"
    assert format_question(sample, BoxFormat.of(params), with_instruction=False) == sample.question


def test_reasoning_is_cut_off():
    answer = '<answer>{"image": 2, "box": [10,20,30,40]}</answer>'
    assert prompts.cut_reasoning(GOOD) == answer == prompts.cut_reasoning(answer)
    assert prompts.cut_reasoning("no answer") == "no answer"


def test_a_reply_is_its_two_blocks_and_nothing_else():
    reply = parse_reply(GOOD)
    assert (reply.thinking, reply.image, reply.box) == ("Compare.", 2, (10, 20, 30, 40))
    assert reply.well_formed and not parse_reply(GOOD + " and more").well_formed
    assert not parse_reply(GOOD.replace("<think>Compare.</think>", "")).well_formed
    assert parse_reply("<think>x</think><answer>B</answer>").letter == "B"


def test_no_answer_in_these():
    answer = '{"image": 1, "box": [1,2,3,4]}'
    for text in (answer, "", f"<answer>{answer}</answer><answer>{answer}</answer>",
                 *(f"<think></think><answer>{inside}</answer>" for inside in (
                     f"[{answer}, {answer}]", '{"image": 1, "box": [[1,2,3,4],[1,2,3,4]]}',
                     '{"image": true, "box": [1,2,3,4]}', '{"image": 1, "box": [1,2,3,NaN]}'))):
        reply = parse_reply(text)
        assert reply.box is None or reply.image is None, text
        assert not reply.well_formed, text


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 300)), deadline=None)
@given(st.one_of(st.text(), st.lists(pieces, max_size=14).map("".join)))
def test_parser_never_raises_and_keeps_the_rules(text):
    reply = parse_reply(text)
    if reply.box is not None:
        assert type(reply.image) is int and len(reply.box) == 4
        assert all(abs(value) < 1e6 for value in reply.box)
        assert text.count("<answer>") == 1 or "</answer>" not in text.split("<answer>")[1]
    if reply.well_formed:
        assert reply.box is not None or reply.letter


def test_the_reference_box_is_put_in_the_models_coordinates():
    sample = first_sample("correspondence", lambda sizes: sizes[0] == (90, 80))
    x1, y1, x2, y2 = sample.reference
    question = format_question(sample, BOX_FORMAT)
    written = json.loads("[" + question.split("[")[1].split("]")[0] + "]")
    scaled = (x1 * 84 / 90, y1 * 84 / 80, x2 * 84 / 90, y2 * 84 / 80)
    assert written == [round(value) for value in scaled]


def test_messages_announce_every_image_in_order():
    (message,) = chat_messages(make_sample("object_tracking", "val", 0), BOX_FORMAT)
    content = message["content"]
    assert [part["type"] for part in content[:4]] == ["text", "image", "text", "image"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    assert texts[:6] == [f"Image {number}: " for number in range(1, 7)]
    assert all(set(part) <= {"type", "text"} for part in content)


def test_the_replys_box_is_read_in_the_image_that_it_names():
    sample = first_sample("refer_grounding", lambda sizes: sizes[1] == (76, 104))
    answer = '<think></think><answer>{"image": 2, "box": [0,0,84,112]}</answer>'
    read = read_reply(answer, sample, BOX_FORMAT)
    assert read.image == 2 and [round(value, 6) for value in read.box] == [0, 0, 76, 104]
    elsewhere = read_reply(answer.replace('"image": 2', '"image": 7'), sample, BOX_FORMAT)
    assert (elsewhere.image, elsewhere.box, elsewhere.has_box) == (7, None, True)
