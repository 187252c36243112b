"""Which letter is read from free text, by hand and as BLINK's authors read it."""

import itertools

import numpy as np
import pytest
from mig_bench_records import BLINK_FILES, needs_data, score_predictions

from mig_kit.score import annotations, choice_parsers
from mig_kit.score.choice_parsers import parse_blink_letter, parse_choice_letter, read_item
from mig_kit.score.records import read_records
from mig_kit.score.result import summarize


@pytest.mark.parametrize("text,letter", [
    ("B", "B"),
    ("Option A is red. Option B is not.\nAnswer (A-D): C", "C"), ("Answer: C\nConfidence: A", "C"),
    ("Answer: C (second choice: A)", "C"), ("Answer: N/A", ""), ("Answer: A|B", ""),
    (" (B) the third image", "B"),
    ("<s> A </s>", "A"),
    ("b.", "B"),
    ("The correct answer is (C) because A is red.", "C"),
    ("A is closer. Point A is closer to the camera than point B.</s>", "A"),
    ("Box B more accurately encloses it. Box A does not.", "B"),
    ("(A) is wrong.\n(B) is a dog.\nTherefore, the answer is:\n(B) a dog", "B"),
    ("(C) About the same\n\nPoints A and B look alike.", "C"),
    ("<think>(A) or (B)?</think><answer>B</answer>", "B"),
    ("<think>Either A or C.</think>\n\nB", "B"),
    ("The answer might be (A). But option (D), which is round, is the correct choice.", "D"),
    ("Option (D), the rim, is the correct choice. The answer is not (A).", "D"),
    ("A is closer to the lens, and thus in focus. B is behind.", "A"),
    ("I cannot determine it exactly. Still, I would say (B), not (A).", "B"),
    ("None of the other points match; (B) is it, not A.", "B"),
    ("Neither (A) nor (B) matches.", ""),
    ("None of these fit: (A) is red.", ""),
    ("It is not possible to determine which of (A) or (B) is closer. B is dark.", ""),
    ("There is no correct answer among (A), (B) and (C). The answer is none.", ""),
    ("Please choose the correct answer:\n(A) red\n(B) blue\n(C) green\n(D) none\nYour turn!", ""),
    ("It is not (A).", ""),
    ("A cat is on the mat.", ""), ("**A large cat** sits.", ""), ("The answer is a dog.", ""),
    ("Description: A large cat sits.", ""),
    ("**A large cat** sits. So it is option B.", "B"),
    ("Description: A large cat sits. So it is option B.", "B"),
    ("A cat is on the mat. So it is option B.", "B"),
    ("The answer is a dog. So it is option B.", "B"),
    ("", ""),
    ("(H)", "")])
def test_letters(text, letter):
    assert parse_choice_letter(text, "ABCD") == letter


FORMS = [
    "The correct answer is **{}**.", "The answer is {}.", "**{}**", "**Answer: {}**",
    "Option **{}**", "__{}__", "`{}`", '"{}"',
    "\u201c{}\u201d", "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "$\\mathbf{{{}}}$", "({})",
    "[{}]", "\u3010{}\u3011", "\uff08{}\uff09", "{}. the car", "{}) the car", "{}: the car",
    "{} - the car", "{} \u2013 the car", "{}\u2014the car", "{} the car", "It must be {}!",
    "Option {}", "Choice: {}", "The answer is {} because it fits.", "Answer - {}",
    '{{"answer": "{}"}}', "<b>{}</b>", "Looking at a car and a dog, {} fits.",
    "\u7b54\u6848\u662f{}\u3002",
    "\u9009 {}", "### Answer\n{}", "{}\n\nBecause a car fits."]


@pytest.mark.parametrize("form", FORMS)
def test_every_letter_is_read_in_every_form(form):
    for place, letter in enumerate("ABCDEFGH"):
        assert parse_choice_letter(form.format(letter)) == letter
        assert parse_choice_letter(form.format(chr(0xff21 + place))) == letter, "full-width"
        if form in ("({})", "**{}**", "\\boxed{{{}}}", "The answer is {}."):
            assert parse_choice_letter(form.format(letter.lower())) == letter


CONCLUSIONS = [
    "Answer: {}", "**Answer:** {}", "**Answer**: ({})", "Answer - {}", "Final answer: {}.",
    "So, the answer: {}", "The correct answer is {}, because A, C and E do not match.",
    "answer is option {}", "The correct option is {} (not E)", "I choose {}", "My choice: {}",
    "I would go with {}", "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "<answer>{}</answer>",
    "#### {}", "Answer:\n{}", "\u7b54\u6848\uff1a{}", "{}", "({})", "{}.", "**{}**", "{})", "[{}]",
    '{{"answer": "{}"}}', '```json\n{{"answer": "{}", "why": "E is red."}}\n```', "Therefore, {}.",
    "Hence ({})", "=> {}", "{} is correct", "{} is the right answer", "it must be {}", "Final: {}",
    "Option {} is the best match", "Thus the best choice would be ({}) the third car",
    "<|im_start|>assistant\n{}<|im_end|>", "Answer: {}. E is wrong because C and A are closer.",
    "Answer: {}\n\nExplanation: Option E is closer. Option A is better.", "Antwort: {}",
    "Answer: E. Wait, its shape differs. Answer: {}", "The answer is not E but {}."]
DISCUSSIONS = [
    "Option {} shows a red car, closer to it.", "({}) matches the style.\n", "{}. red car\n",
    "**{}**: it could be the answer.\n\n", "If the answer is {}, the car is better."]


@pytest.mark.parametrize("form", CONCLUSIONS)
def test_the_last_conclusion_goes_before_what_is_discussed(form):
    for options, discussion in itertools.product(itertools.permutations("ABDE", 3), DISCUSSIONS):
        reasoning = " ".join(map(discussion.format, options))
        for letter in "ABDH":
            text = f"{reasoning}\n\n{form.format(letter)}"
            assert choice_parsers.read_choice(text) == (letter, choice_parsers.CONCLUSION), text


LATTER_TWO = ("the second image", "the third image")


@pytest.mark.parametrize("text,letter", [
    ("The second image shows a dog.\n\nAnswer: the third image", "B"),
    ("Both (A) and (B) follow it, but the most appropriate answer is (B).", "B"),
    ("Therefore, neither the second nor the third image shares its style.", ""),
    ("(A) is red. The answer is (A) the second image or (B) the third image, depending.", ""),
    ("(A) is red.\n\nAnswer: none of them", ""), ("(A) is red.\n\nAnswer: E", ""),
    ("(B) is most similar to the first. (A), in contrast, differs.", "B"),
    ("(B) fits best.\n(A) shows another scene.", "B"),
    ("The third image fits best. The second image, in contrast, differs.", "B"),
    ("The second image fits.\n\nThe third image shows a dog.", "A"),
    ("I compared (A) and (B).\n\n(B) the third image", "B"),
    ("It is the third image.", "B"), ("The 2nd one.", "A"),
    ("Image 3 shares its style, unlike image 2.", "B"),
    ("Not possible to determine, neither the second nor the third image is shown.", "")])
def test_one_of_two_images_in_words_or_letters(text, letter):
    """A conclusion may refuse both, and an option that is rejected last is not chosen."""
    assert parse_choice_letter(text, "AB", LATTER_TWO) == letter


@pytest.mark.parametrize("text,choices,letter", [
    ("yes", ("yes", "no"), "A"),
    ("Looking at both, the correct option is yes.", ("yes", "no"), "A"),
    ("The right choice would be **no**.", ("yes", "no"), "B"),
    ("The correct option is image 2.", ("the second image", "image 2"), "B"),
    ("The correct option is image 2.", ("the second image", "image 3"), "A"),
    ("The 3rd image.", ("image 2", "image 3"), "B"),
    ("There are 2.", ("two", "three"), "A"),
    ("Answer: A man runs.", ("a dog runs", "A man runs"), "B"),
    ("It cannot be told which is closer.", ("A is closer", "B is closer"), ""),
    ("No, the car is in front of the bus.", ("yes", "no"), "B"),
    ("The answer is yes.", ("yes", "no"), "A"),
    ("There is no cat and no dog.", ("yes", "no"), ""),
    ("The camera is moving right. Objects shift to the left.", ("left", "right"), "B"),
    ("\u5de6", ("left", "right"), "A"),
    ("There are four cups.", ("3", "4", "14"), "B"),
    ("I count 14 cups.", ("3", "4", "14"), "C"),
    ("I count 140 cups.", ("3", "4", "14"), ""),
    ("They are about the same.", ("A is darker", "B is darker", "About the same"), "C"),
    ("A red kite flies.", ("a kite", "a red kite"), "B"),
    ("(B), a kite", ("a kite", "a red kite"), "B")])
def test_options_named_by_their_words(text, choices, letter):
    assert parse_choice_letter(text, "ABCD"[:len(choices)], choices) == letter


@pytest.mark.parametrize("text,letter", [
    ("Left is (A) and right is (B) .\n\n(B)", "B"), ("(A) and\nthen (B)", ""), ("(C)", "C"),
    ("C", "")])
def test_blinks_own_rule_decides_nothing_that_its_authors_leave_to_another_model(text, letter):
    assert parse_blink_letter(text, "ABCD") == letter


def test_an_items_own_choices_go_before_those_of_its_task():
    record = {"idx": "val_1", "task": "Spatial_Relation", "answer": "(A)"}
    others = [{**record, "idx": "val_2", "answer": "(B)"}]
    item = annotations.read_blink([record, *others]).items[0]
    with pytest.raises(ValueError, match="have idx 'val_1' twice"):
        annotations.read_blink([record, record])
    assert choice_parsers.BLINK_CHOICES["Spatial_Relation"] == ("yes", "no")
    assert read_item(item, "no")[0] == "B"
    turned = annotations.read_blink([{**record, "choices": ["no", "yes"]}]).items[0]
    assert read_item(turned, "no")[0] == "A"


# Shares of letters that agree with the authors', at least. MiniGPT-4-v2's replies break off or
# restate the question, and there the authors' model guesses.
AGREEMENT = {"MiniGPT-4-v2": 0.94}
PUBLISHED_ACCURACY = {"GPT4V": 51.14, "MiniGPT-4-v2": 34.23, "llava_v1.5_7b": 37.13,
                      "cogvlm-chat": 41.54, "flamingov2": 39.18}


@needs_data
@pytest.mark.parametrize("path", BLINK_FILES, ids=lambda path: path.stem)
def test_letters_agree_with_blinks_authors_and_theirs_give_the_published_scores(path):
    records, name = read_records(path), path.stem.removeprefix("val_")
    benchmark, agrees, gains = annotations.read_blink(records), [], {}
    lines = [{"id": record["idx"], "response": record["prediction"]} for record in records]
    accuracy = summarize(score_predictions(benchmark, lines))["avg"]["accuracy"]
    assert accuracy == pytest.approx(PUBLISHED_ACCURACY[name], abs=0.3)
    for item, record in zip(benchmark.items, records):
        authors_letter = record["prediction"][1]
        letter = read_item(item, record["full_prediction"])[0]
        agrees.append(letter == (authors_letter if authors_letter in item.options else ""))
        gain = (letter == item.letter) - (record["prediction"] == record["answer"])
        gains.setdefault(item.task, []).append(gain)
    assert np.mean(agrees) >= AGREEMENT.get(name, 0.98)
    assert abs(100 * np.mean([np.mean(values) for values in gains.values()])) <= 0.5
