"""Prompts and the parser: it never raises, and never gives a box outside the rules."""

import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import chat_messages, format_question, parse_reply, reply_box_in_original
from mig_kit.world.tasks import make_sample

GOOD = '<think>Compare.</think><answer>{"image": 2, "box": [10,20,30,40]}</answer>'
pieces = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", '{"image": ', "2", ', "box": [', "1,2,3,4", "]}", "[",
                          "NaN", "1e999", "-1", "A", "{}", "null", "[[1,2,3,4]]", '"', " ", "\n"])


def test_a_good_reply():
    reply = parse_reply(GOOD)
    assert (reply.thinking, reply.image, reply.box, reply.well_formed) == ("Compare.", 2, (10, 20, 30, 40), True)


def test_no_answer_in_these():
    two = '{"image": 1, "box": [1,2,3,4]}'
    for text in (f"<think></think><answer>[{two}, {two}]</answer>", f"<answer>{two}</answer><answer>{two}</answer>",
                 "<think></think><answer>{\"image\": 1, \"box\": [[1,2,3,4],[1,2,3,4]]}</answer>", two, "",
                 '<think></think><answer>{"image": true, "box": [1,2,3,4]}</answer>',
                 '<think></think><answer>{"image": 1, "box": [1,2,3,NaN]}</answer>'):
        assert parse_reply(text).box is None or parse_reply(text).image is None, text
        assert not parse_reply(text).well_formed, text


def test_format_needs_the_whole_reply():
    assert not parse_reply(GOOD + " and more").well_formed
    assert not parse_reply(GOOD.replace("<think>Compare.</think>", "")).well_formed
    assert parse_reply("<think>x</think><answer>B</answer>").letter == "B"


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 2000)), deadline=None)
@given(st.one_of(st.text(), st.lists(pieces, max_size=14).map("".join)))
def test_parser_never_raises_and_keeps_the_rules(text):
    reply = parse_reply(text)
    if reply.box is not None:
        assert type(reply.image) is int and len(reply.box) == 4 and all(abs(v) < 1e6 for v in reply.box)
        assert text.count("<answer>") == 1 or "</answer>" not in text.split("<answer>")[1]
    if reply.well_formed:
        assert reply.box is not None or reply.letter


def test_reference_box_is_put_in_the_models_frame():
    sample = next(s for s in (make_sample("correspondence", "val", i) for i in range(200)) if s.sizes[0] == (90, 80))
    x1, y1, x2, y2 = sample.reference
    written = json.loads("[" + format_question(sample, box_format=BoxFormat()).split("[")[1].split("]")[0] + "]")
    assert written == [round(v) for v in (x1 * 84 / 90, y1 * 84 / 80, x2 * 84 / 90, y2 * 84 / 80)]


def test_messages_announce_every_image_in_order():
    content = chat_messages(make_sample("object_tracking", "val", 0), box_format=BoxFormat())[0]["content"]
    assert [part["type"] for part in content[:4]] == ["text", "image", "text", "image"]
    assert [part["text"] for part in content if part["type"] == "text"][:6] == [f"Image {k}: " for k in range(1, 7)]
    assert all(set(part) <= {"type", "text"} for part in content)


def test_box_in_original_uses_the_named_images_frame():
    sample = next(s for s in (make_sample("refer_grounding", "val", i) for i in range(200)) if s.sizes[1] == (76, 104))
    box = reply_box_in_original(sample, parse_reply('<think></think><answer>{"image": 2, "box": [0,0,84,112]}</answer>'), box_format=BoxFormat())
    assert [round(v, 6) for v in box] == [0, 0, 76, 104]
    assert reply_box_in_original(sample, parse_reply('<think></think><answer>{"image": 7, "box": [0,0,84,112]}</answer>'), box_format=BoxFormat()) is None
