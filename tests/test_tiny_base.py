"""Notebook 90: its lessons, its tokens and its position rule."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.prompts import parse_reply
from mig_kit.shared_prefix import attention
from mig_kit.world.scenes import PLAIN, UNSEEN_PAIRS, Object, Scene, object_cell
from mig_kit.world.tasks import list_image_note
from tiny_base import curriculum, lesson_batches, lessons, puzzles, training, vision, vocabulary
from tiny_base.config import TINY_HIDDEN, tiny_config


def draw_album(rng, images):
    return [lessons.clip_to_image(scene) for scene in lessons.album(rng, images)]


def join(pieces):
    return "".join(words for words, _, _ in pieces)


@pytest.fixture
def writer(processor):
    return vocabulary.Writer(processor.tokenizer)


def test_no_box_is_given_twice_in_a_dialogue():
    rng = random.Random(0)
    for _ in range(200):
        scenes = draw_album(rng, 3)
        turns = lessons.visual_turns(rng, scenes, 6)
        boxes = 0
        for question, pieces in turns:
            shows_box = " [" in question and "x1" not in question
            boxes += shows_box or '"box"' in pieces[0][0]
        assert len(turns) <= 8 and boxes <= sum(len(scene.objects) for scene in scenes)


def test_lessons_hold_no_unseen_pair():
    rng = random.Random(0)
    turns = [turn for _ in range(300) for turn in lessons.text_turns(rng, 3)]
    text = " ".join(question + " ".join(words for words, _, _ in pieces)
                    for question, pieces in turns)
    assert not any(f"{colour} {shape}" in text for colour, shape in UNSEEN_PAIRS)


def test_puzzles_are_right():
    rng = random.Random(0)
    for _ in range(300):
        puzzle = puzzles.make_puzzle(rng, puzzles.LOOSE_KINDS)
        lists = [part.split(": ")[-1].split(", ") for part in puzzle.notes.rstrip(".").split(". ")]
        if puzzle.kind == "new":
            assert puzzle.finding == f"new: {puzzle.correct}."
            assert puzzle.correct in lists[1] and puzzle.correct not in lists[0]
        if puzzle.kind == "has":
            name, _, number = puzzle.finding.rstrip(".").partition(": image ")
            holders = [name in names for names in lists]
            assert holders == [k == int(number) for k in range(1, len(lists) + 1)]
            assert puzzle.correct == f"image {number}"
        if puzzle.kind == "all":
            assert puzzle.finding == f"in all: {puzzle.correct}."
            assert set.intersection(*map(set, lists)) == {puzzle.correct}


def test_a_lesson_has_the_tokens_of_its_text(writer):
    """A space on the wrong side of a cut would teach tokens that no trace has."""
    rng = random.Random(0)
    turns = [turn for _ in range(100)
             for turn in lessons.text_turns(rng, 2, puzzles.HARD_KINDS, ["Find it."], 0.5)]
    for _ in range(20):
        scenes = draw_album(rng, 3)
        turns += lessons.visual_turns(rng, scenes, 6, 0.6) + lessons.locate_turns(rng, scenes)
    for _, pieces in turns:
        tokens = [token for words, _, _ in pieces for token in writer.encode(words)]
        assert tokens == writer.encode(join(pieces))


def test_a_film_shows_the_same_things_in_every_picture():
    names = [{obj.name for obj in scene.objects}
             for scene in lessons.album(random.Random(0), 6, alike=1.0)]
    assert all(others == names[0] for others in names) and 2 <= len(names[0]) <= 4


def test_visual_answers_are_right():
    appearances = PLAIN.pick_appearances(random.Random(3), 3)
    scene = PLAIN.arrange_scene(random.Random(3), appearances, (90, 80))
    obj = scene.objects[0]
    _, ((answer, _, place),) = lessons._find_turn(random.Random(0), [scene], 1, obj)
    column, row = object_cell(scene, obj)
    assert place == (1, 3 * row + column)
    reply = answer if "<answer>" in answer else f"<think></think><answer>{answer}</answer>"
    expected = np.array(obj.box) * np.array([84 / 90, 84 / 80] * 2)
    assert np.abs(np.array(parse_reply(reply).box) - expected).max() <= 0.5


def test_short_and_long_dialogues_apart_teach_the_same(random_model, writer):
    rng = random.Random(0)
    albums = lesson_batches.encode_albums(random_model.model.visual, rng, 3)
    batch = lesson_batches.visual_batch(albums, writer, rng, 2, 5, located=1.0)
    assert len(lesson_batches.split_by_length(batch)) == 1
    for image, *_ in albums:
        turns = lessons.visual_turns(rng, [image.scene], 1)
        row = writer.write_dialogue(turns, [len(image.features)])
        batch.append(lesson_batches.Dialogue(row, [image]))
    parts = lesson_batches.split_by_length(batch)
    assert [len(part) for part in parts] == [3, 2]
    weights = [lesson_batches.total_weight(part) for part in parts]
    assert sum(weights) == pytest.approx(lesson_batches.total_weight(batch))

    def learn(is_split):
        random_model.zero_grad()
        if is_split:
            figures = training.add_gradients(random_model, batch, None)
        else:
            loss, figures = training.language_loss(random_model, batch, None)
            loss.backward()
        language = random_model.model.language_model
        return torch.cat([p.grad.flatten() for p in language.parameters()]), float(figures[0])

    (together, loss), (apart, split_loss) = learn(is_split=False), learn(is_split=True)
    assert (together - apart).norm() < 1e-5 * together.norm()
    assert loss == pytest.approx(split_loss, rel=0.3), "nats, weighed slightly otherwise"


def test_codes_are_orthonormal():
    table, sizes = vision.codes()
    assert table.shape == (sum(sizes), TINY_HIDDEN)
    assert torch.allclose(table @ table.T, torch.eye(len(table)), atol=1e-5)


def test_detection_targets_by_hand():
    box = (30.0, 2.0, 50.0, 26.0)
    scene = Scene(84, 84, (Object("red", "star", "plain", box),), mark=box)
    classes, boxes = vision.detection_targets(scene)
    assert classes[1].tolist() == [1, 3, 0, 0, 1] and classes[0].sum() == 0
    assert np.allclose(boxes[1, 4:] * 28, box, atol=1e-4)


def test_dialogues_weigh_only_what_is_said(writer):
    question = "What is at [1,2,3,4] in image 1?"
    row = writer.write_dialogue([(question, [("red star", 1.0, (1, 4))])], [9])
    decode = writer.tokenizer.decode
    taught = decode([token for token, weight in zip(row.ids, row.weights) if weight > 0])
    assert taught == "red star<|im_end|>" and row.ids.count(5) == 9
    numbers = [decode([row.ids[index]]) for index in row.image_number_token if index >= 0]
    assert numbers == ["1"] * 9
    assert {row.ids.index(5) + 4} == {index for index in row.object_token if index >= 0}
    mention, = {index for index in row.question_token if index >= 0}
    assert decode(row.ids[mention - 2:mention + 2]) == " image 1?"


def test_an_answer_asks_for_the_number_it_wrote_itself(writer):
    pieces = [('{"image": 2, "box": [1,2,3,4]}', 1.0, (2, 0))]
    row = writer.write_dialogue([("Where is the red star in image 2?", pieces)], [4, 4])
    mentions = [index for index in dict.fromkeys(row.question_token) if index >= 0]
    before = [writer.tokenizer.decode(row.ids[index - 2:index]) for index in mentions]
    assert before == [" image ", '\n{"image": ']


def small_model():
    config = tiny_config(640, hidden=256, layers=3, vision_hidden=64, vision_layers=2)
    return Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation=attention.NAME)


SHORT_COURSE = replace(curriculum.TELLING_APART, warmup_steps=1)
SMALL = dict(albums=2, rows=(3, 3))


def test_a_course_teaches_and_a_run_goes_on_behind_it(processor, tmp_path):
    model = small_model()
    model.model.visual.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    curve = training.train_language(model, processor.tokenizer, tmp_path, SHORT_COURSE, steps=2,
                                     **SMALL)
    changed = {name.split(".")[1] for name, parameter in model.named_parameters()
               if not torch.equal(parameter, before[name])}
    assert changed == {"language_model"} and curve[-1]["step"] == 2
    fresh = small_model()
    again = training.train_language(fresh, processor.tokenizer, tmp_path, SHORT_COURSE, steps=2,
                                     **SMALL)
    weights = fresh.state_dict()
    assert again == curve
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_letter_looks_at_its_option(writer):
    rng, seen = random.Random(0), 0
    decode = writer.tokenizer.decode
    for question, pieces in lessons.text_turns(rng, 60, puzzles.HARD_KINDS, lettered=1.0):
        option = next((subject for _, _, subject in pieces
                       if isinstance(subject, lessons.Option)), None)
        if option is None:
            continue
        row = writer.write_dialogue([(question, pieces)])
        letter = max(index for index, weight in enumerate(row.weights) if weight == 2.0)
        assert decode([row.ids[letter]]) == option[0]
        last = row.object_token[letter]
        assert decode(row.ids[row.image_number_token[last]:last + 1]) == f" {option}"
        assert option in question and option.split(". ")[1] in join(pieces)
        seen += 1
    assert seen > 30


def test_a_survey_lists_every_picture_once():
    scenes = draw_album(random.Random(3), 4)
    question, pieces = lessons.survey_turn(scenes)
    notes = [list_image_note(number, scene) for number, scene in enumerate(scenes, 1)]
    assert join(pieces) == " ".join(notes)
    assert pieces[-1][1] > 0 and question == "List every image."
