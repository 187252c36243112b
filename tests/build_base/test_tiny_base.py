"""Notebook 90: its lessons, its tokens and its position rule."""

import random

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.build_base import lesson_batches, lessons, tiny_base, vision, vocabulary
from mig_kit.engine import attention, models
from mig_kit.prompts import parse_reply
from mig_kit.world import scenes
from mig_kit.world.scenes import UNSEEN_PAIRS
from mig_kit.world.tasks import list_image_note


def test_no_box_is_given_twice_in_a_dialogue():
    rng = random.Random(0)
    for _ in range(200):
        scenes = [lessons.clip_to_image(s) for s in lessons.album(rng, 3)]
        turns = lessons.visual_turns(rng, scenes, 6)
        boxes = [q if " [" in q and "x1" not in q else a
                 for q, ((a, _, _), *_) in turns if '"box"' in a or (" [" in q and "x1" not in q)]
        assert len(turns) <= 8 and len(boxes) <= sum(len(s.objects) for s in scenes)


def test_lessons_hold_no_unseen_pair():
    rng = random.Random(0)
    text = " ".join(q + " ".join(piece[0] for piece in pieces) for _ in range(300) for q, pieces in lessons.text_turns(rng, 3))
    assert not any(f"{colour} {shape}" in text for colour, shape in UNSEEN_PAIRS)


def test_puzzles_are_right():
    rng = random.Random(0)
    for _ in range(300):
        item = lessons.puzzle(rng, lessons.LOOSE_KINDS)
        lists = [part.split(": ")[-1].split(", ") for part in item.notes.rstrip(".").split(". ")]
        if item.finding.startswith("new"):
            assert item.right in lists[1] and item.right not in lists[0]
        if item.right.startswith("image"):
            name, _, number = item.finding.rstrip(".").partition(": image ")
            assert [name in names for names in lists] == [k == int(number) for k in range(1, len(lists) + 1)]
        if item.finding.startswith("in all"):
            assert set.intersection(*map(set, lists)) == {item.right}


def test_a_lesson_has_the_tokens_of_its_text(processor):
    """Pieces are tokenised one by one, a trace as a whole: a space on the wrong side of a cut teaches tokens no trace has."""
    rng, writer = random.Random(0), vocabulary.Writer(processor.tokenizer)
    turns = [turn for _ in range(100) for turn in lessons.text_turns(rng, 2, lessons.HARD_KINDS, ["Find it."], 0.5)]
    for _ in range(20):
        scenes = [lessons.clip_to_image(s) for s in lessons.album(rng, 3)]
        turns += lessons.visual_turns(rng, scenes, 6, 0.6) + lessons.locate_turns(rng, scenes)
    for _, pieces in turns:
        assert sum((writer.ids(text) for text, _, _ in pieces), []) == writer.ids("".join(text for text, _, _ in pieces))


def test_a_film_shows_the_same_things_in_every_picture():
    pictures = [{t.name for t in scene.objects} for scene in lessons.album(random.Random(0), 6, alike=1.0)]
    assert all(names == pictures[0] for names in pictures) and 2 <= len(pictures[0]) <= 4


def test_visual_answers_are_right():
    scene = scenes.arrange_objects(random.Random(3), scenes.random_appearances(random.Random(3), 3), (90, 80))
    turn = lessons._find(random.Random(0), [scene], 1, scene.objects[0])
    answer = turn[1][0][0]
    assert turn[1][0][2] == (1, np.ravel_multi_index(scenes.object_cell(scene, scene.objects[0])[::-1], (3, 3)))
    box = parse_reply(answer if "<answer>" in answer else f"<think></think><answer>{answer}</answer>").box
    expected = np.array(scene.objects[0].box) * np.array([84 / 90, 84 / 80] * 2)
    assert np.abs(np.array(box) - expected).max() <= 0.5


def test_positions_are_transformers(random_model, processor):
    writer, rng = vocabulary.Writer(processor.tokenizer), random.Random(0)
    bank = lesson_batches.album_bank(random_model.model.visual, rng, 2, autocast=False)
    batch = lesson_batches.visual_batch(bank, writer, rng, 4, 3)
    rows, grids, features = batch.ids, batch.grids, torch.cat(batch.features)
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, 4, longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), 1
    assert int((ids == 5).sum()) == len(features)
    sizes = torch.tensor([[1, 2 * h, 2 * w] for row in grids for h, w in row])
    expected, _ = random_model.model.get_rope_index(ids, (ids == 5).int(), image_grid_thw=sizes, attention_mask=mask)
    found = lesson_batches.position_ids(rows, grids)
    for i, row in enumerate(rows):
        assert torch.equal(expected[:, i, :len(row)], found[:, i, :len(row)])


def test_short_and_long_dialogues_apart_teach_the_same(random_model, processor):
    writer, rng = vocabulary.Writer(processor.tokenizer), random.Random(0)
    bank = lesson_batches.album_bank(random_model.model.visual, rng, 3, autocast=False)
    batch = lesson_batches.visual_batch(bank, writer, rng, 2, 5, located=1.0)
    assert len(batch.parts()) == 1
    for (scene, features, grid), *_ in bank:
        batch.add(writer.dialogue(lessons.visual_turns(rng, [scene], 1), [len(features)]), [grid])
        batch.features.append(features)
    parts = batch.parts()
    assert [len(part.ids) for part in parts] == [3, 2]
    assert sum(part.weight() for part in parts) == pytest.approx(batch.weight())

    def learned(whole):
        random_model.zero_grad()
        if whole:
            loss, figures = tiny_base.language_loss(random_model, batch, None)
            loss.backward()
        else:
            figures = tiny_base.gradients(random_model, batch, None, False)
        return torch.cat([p.grad.flatten() for p in random_model.model.language_model.parameters()]), float(figures[0])

    (one, loss), (apart, also) = learned(True), learned(False)
    assert (one - apart).norm() < 1e-5 * one.norm() and loss == pytest.approx(also, rel=0.3), "nats, weighed slightly otherwise"


def test_codes_are_orthonormal():
    table, sizes = vision.codes()
    assert table.shape == (sum(sizes), models.TINY_HIDDEN)
    assert torch.allclose(table @ table.T, torch.eye(len(table)), atol=1e-5)


def test_detection_targets_by_hand():
    from mig_kit.world.scenes import Object, Scene

    scene = Scene(84, 84, (Object("red", "star", "plain", (30.0, 2.0, 50.0, 26.0)),), mark=(30.0, 2.0, 50.0, 26.0))
    classes, boxes = vision.detection_targets(scene)
    assert classes[1].tolist() == [1, 3, 0, 0, 1] and classes[0].sum() == 0
    assert np.allclose(boxes[1, 4:] * 28, (30, 2, 50, 26), atol=1e-4)


def test_dialogues_weigh_only_what_is_said(processor):
    writer = vocabulary.Writer(processor.tokenizer)
    ids, weights, looks, homes, asks = writer.dialogue(
        [("What is at [1,2,3,4] in image 1?", [("red star", 1.0, (1, 4))])], [9])
    taught = processor.tokenizer.decode([i for i, w in zip(ids, weights) if w > 0])
    assert taught == "red star<|im_end|>" and ids.count(5) == 9
    assert [processor.tokenizer.decode([ids[home]]) for home in homes if home >= 0] == ["1"] * 9
    assert {ids.index(5) + 4} == {place for place in looks if place >= 0}
    asked = {place for place in asks if place >= 0}
    assert len(asked) == 1 and processor.tokenizer.decode(ids[min(asked) - 2:min(asked) + 2]) == " image 1?"
    assert models.TINY_BASE.is_dir()


def test_an_answer_asks_for_the_number_it_wrote_itself(processor):
    writer = vocabulary.Writer(processor.tokenizer)
    ids, _, _, _, asks = writer.dialogue(
        [("Where is the red star in image 2?", [('{"image": 2, "box": [1,2,3,4]}', 1.0, (2, 0))])], [4, 4])
    places = [place for place in dict.fromkeys(asks) if place >= 0]
    assert [processor.tokenizer.decode(ids[place - 2:place]) for place in places] == [" image ", '\n{"image": ']


def test_a_course_teaches_saves_and_resumes(processor, tmp_path):
    from dataclasses import replace

    random_model = Qwen2_5_VLForConditionalGeneration._from_config(
        models.tiny_config(640, hidden=256, layers=3, vision_hidden=64, vision_layers=2), attn_implementation=attention.NAME)
    random_model.model.visual.requires_grad_(False)
    course = replace(tiny_base.TELLING_APART, warmup=1)
    given = dict(albums=2, visual_rows=3, text_rows=3, autocast=False)
    before = {n: p.clone() for n, p in random_model.named_parameters()}
    curve = tiny_base.train_language(random_model, processor.tokenizer, tmp_path, course, steps=2, **given)
    changed = {n.split(".")[1] for n, p in random_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"language_model"} and curve[-1]["step"] == 2
    again = tiny_base.train_language(random_model, processor.tokenizer, tmp_path, course, steps=2, **given)
    assert again == curve


class Killed(Exception):
    pass


def killed_after(monkeypatch, module, saves):
    """Let `module` write so many checkpoints and die with the last; afterwards it writes all."""
    write, left = vision.save_checkpoint, [saves]

    def dying(path, **state):
        write(path, **state)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(module, "save_checkpoint", dying)
    monkeypatch.setattr(module, "CHECKPOINT", 2)


@pytest.mark.parametrize("saves", [1, 2, 3])  # within the first phase, between the two, within the second
def test_a_killed_vision_training_ends_on_the_same_weights(tmp_path, monkeypatch, saves):
    given = dict(locate_steps=4, spell_steps=4, batch=2, autocast=False)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    killed_after(monkeypatch, vision, saves)
    with pytest.raises(Killed):
        vision.train_vision(killed, **given)
    assert vision.train_vision(killed, **given) == vision.train_vision(whole, **given)
    assert (killed / "vision.safetensors").read_bytes() == (whole / "vision.safetensors").read_bytes()


def test_a_killed_course_ends_on_the_same_weights(processor, tmp_path, monkeypatch):
    from dataclasses import replace

    def train(folder):
        torch.manual_seed(0)
        folder.mkdir(exist_ok=True)
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            models.tiny_config(640, hidden=256, layers=3, vision_hidden=64, vision_layers=2), attn_implementation=attention.NAME)
        curve = tiny_base.train_language(model, processor.tokenizer, folder, replace(tiny_base.TELLING_APART, warmup=1), steps=4,
                                         albums=2, visual_rows=3, text_rows=3, autocast=False)
        return curve, model.state_dict()

    killed_after(monkeypatch, tiny_base, 1)
    with pytest.raises(Killed):
        train(tmp_path / "killed")
    (curve, weights), (wanted_curve, wanted) = train(tmp_path / "killed"), train(tmp_path / "whole")
    assert curve[-1]["step"] == wanted_curve[-1]["step"] == 4
    assert all(torch.equal(value, wanted[name]) for name, value in weights.items())


def test_a_letter_looks_at_its_option(processor):
    writer = vocabulary.Writer(processor.tokenizer)
    rng, seen = random.Random(0), 0
    for question, pieces in lessons.text_turns(rng, 60, lessons.HARD_KINDS, lettered=1.0):
        option = next((where for _, _, where in pieces if where and where[1] == "."), None)
        if option is None:
            continue
        ids, weights, looks, homes, _ = writer.dialogue([(question, pieces)])
        letter = max(i for i, weight in enumerate(weights) if weight == 2.0)
        assert processor.tokenizer.decode([ids[letter]]) == option[0]
        assert processor.tokenizer.decode(ids[homes[looks[letter]]:looks[letter] + 1]) == f" {option}"
        assert option in question and option.split(". ")[1] in "".join(text for text, _, _ in pieces)
        seen += 1
    assert seen > 30


def test_a_survey_lists_every_picture_once():
    scenes = [lessons.clip_to_image(scene) for scene in lessons.album(random.Random(3), 4)]
    question, pieces = lessons.survey_turn(scenes)
    assert "".join(text for text, _, _ in pieces) == " ".join(list_image_note(i, scene) for i, scene in enumerate(scenes, 1))
    assert pieces[-1][1] > 0 and question == "List every image."
