"""Which letter is read from a reply, by a table of forms and as BLINK's authors read it."""

import json

import pytest
from mig_bench_records import (
    BLINK_FILES,
    DATA,
    PUBLISHED_ACCURACY,
    needs_data,
    score_predictions,
)

from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.choice_parsers import read_choice, read_item
from mig_kit.score.official import parse_blink_letter
from mig_kit.score.records import read_records
from mig_kit.score.result import summarize

OPTIONS = ("red cup", "grey dog", "small bird", "tall tree")
OTHERS = "Option B shows a car on the left. Option C has a dog; (D) looks alike at first. "
CLEAR = [  # {} is the letter
    "{}", "({})", "{}.", "**{}**", "{}. red cup", "({}) red cup", "<s> {}", "\uff08{}\uff09",
    "Answer: {}", "The answer is {}.", "The correct option is ({}).", '{{"answer": "{}"}}',
    "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "Option {}", "{} is the correct answer.",
    '```json\n{{"explanation": "B is dark.", "answer": "{}"}}\n```',
    "OTHERS\n\nAnswer: {}", "OTHERS**Answer:** {}", "OTHERS**Final Answer: ({})**",
    "OTHERSTherefore, the correct answer is option {}: red cup.", "OTHERS\n\n{}",
    "OTHERSThe best match is {}.", "<think>OTHERS</think>{}", "<seed:think>OTHERS</seed:think>{}",
    "<|channel|>analysis<|message|>OTHERS<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "<answer>B</answer> No: <answer>The answer is {}</answer>", "{}<|im_end|>\n<|im_start|>user\nB",
    "Final answer - {}", "### {}", "[THINK]OTHERS[/THINK]{}",
    "\u25c1think\u25b7OTHERS\u25c1/think\u25b7{}",
    "analysisOTHERSassistantfinal{}", "OTHERS<|begin_of_box|>{}<|end_of_box|>",
    "{}\n\nQuestion: Which?\nAnswer: B", "The answer is {}.\n\nWhy not the rest? Too dark.",
    "**Answer:** {} (not B)", "OTHERS\n\n**Answer** {}", "First choice: {}. Second choice: B.",
    "- [ ] B\n- [x] {}\n- [ ] E", '{{"answer": "{}", "why": "B does not match."}}',
    '{{"answer": "{}", "why": "The other options are wrong."}}',
    '{{"answer": "{}", "confidence": 0.7}}', "<answer>{}</answer> I hope this helps.",
    "The answer is {}. Why not B? It is too dark."]


@pytest.mark.parametrize("form", CLEAR)
@pytest.mark.parametrize("letter", "ACD")
def test_explicit_answers_are_read(form, letter):
    text = form.replace("OTHERS", OTHERS).format(letter)
    assert read_choice(text, "ABCD", OPTIONS)[0] == letter


@pytest.mark.parametrize("text", [
    "", "Option E", "The answer is unclear.", "The answer is A or B.", "Answer: A, D",
    "Option B has three dots, but the pattern needs four.\nOption A has them.", "Not B.",
    "There is insufficient information to choose between (A), (B), (C) and (D) .",
    "The answer is B. Wait, A is correct.", "The answer is C. Hmm, actually B matches better.",
    "The answer is B. A fits better.", "Option C is incorrect. B fits.", "(C) is wrong, so B.",
    "Option C is incorrect.",
    "Maybe the answer is A. I am not sure.", "[THINK]The answer is A",
    "**B**\n\nScratch that. **A**",
    "If it were mirrored, the answer is B.", "The answer is not B.", "My second choice: B",
    "(A) red cup\n(B) grey dog\n(C) small bird\n(D) tall tree", "I pick A over B and C.",
    "<think>The answer is A", "<think>The answer is A. But wait, let me check",
    '{"answer": "unknown", "options": ["A", "B"]}', "B and C are close, but A fits best.",
    '{"answer": "B", "corrected_answer": "A"}', '{"answer": "B", "confidence": 0.0}',
    '{"answer": "B", "note": "It is A."}', '{"answer": "B", "is_correct": false}',
    '{"answer": "B", "final_answer": {"letter": "A"}}', '{"answer": "B", "verdict": "wrong"}',
    "<answer>B</answer>?", "<answer>B</answer> I retract this.", '{"answer": "B"}\nWait, the one',
    "<answer>B</answer>\n\nCorrection: A", "<answer>B</answer> That is wrong.",
    "The format would be <answer>B</answer>.", "(A)? Wait, but the second image has",
    "The answer is A? Wait, the rim", "\\boxed{B}. Wait, no.", "The answer is A. Hmm, let me look.",
    "The answer is A. Not A.", "- [x] A\n- [x] B", "- [x] Z",
    "My first choice was B. The second fits.",
    "The answer is A. But the first option is: B, and it is correct.",
    "The answer is A. Rather, another choice is: B"])
@pytest.mark.parametrize("is_blink", [False, True])
def test_what_is_not_said_explicitly_is_not_read(text, is_blink):
    assert read_choice(text, "ABCD", OPTIONS, is_blink) == ("", "")


@pytest.mark.parametrize("text", ["b", "(b)", " b.", "<answer>b</answer>", '{"answer": "b"}'])
def test_a_small_letter_alone_is_read_unless_it_is_an_options_words(text):
    assert read_choice(text, "AB")[0] == "B"
    assert read_choice(text, "AB", ("b", "a"))[0] in "A"


@pytest.mark.parametrize("task, text, letter", [
    ("Relative_Depth", "A is closer to the camera. Point B is further back.", "A"),
    ("Relative_Depth", "Point A is farther from the camera than point B.", ""),
    ("Relative_Depth", "Point A is closer to the horizon. Therefore B.", ""),
    ("Relative_Depth", "A is closer to the camera. No, point B is closer.", ""),
    ("Spatial_Relation", "No.", "B"), ("Spatial_Relation", "Yes and no.", ""),
    ("Relative_Depth", "Point A is closer to the camera. Hmm, point B is nearer.", ""),
    ("Relative_Depth", "Point A is closer to the camera. I take that back: point B is.", ""),
    ("Relative_Reflectance", "Point A is darker. However, point B seems darker still.", ""),
    ("Object_Localization", "Box B more accurately localizes and encloses the cat. Box A, on the "
     "other hand, is too small.", "B"),
    ("Object_Localization", "Box A is too large. Therefore, Box B more accurately encloses it.",
     "B"),
    ("Object_Localization", "Box B more accurately localizes the cat. Box A fits better.", ""),
    ("Object_Localization", "Box B more accurately localizes it. Looking again, Box A does.", ""),
    ("Object_Localization", "Box A more accurately localizes it? No. Box B is the one.", ""),
    ("Relative_Depth", "Point A is closer to the camera. Point B is in front of it.", ""),
    ("Multi-view_Reasoning", "The camera is moving left. On a closer look, it moves right.", ""),
    ("Object_Localization", "Neither Box A nor Box B. Box A more accurately is not.", ""),
    ("Multi-view_Reasoning", "The camera is moving right when shooting.", "B"),
    ("Multi-view_Reasoning", "The camera is moving to the right (clockwise).", "B"),
    ("Multi-view_Reasoning", "The camera is moving right. Actually it is moving left.", ""),
    ("Multi-view_Reasoning", "\u53f3\u3002", "B"), ("Spatial_Relation", "\u662f", "A"),
    ("Spatial_Relation", "Yes. Wait, no.", ""), ("Spatial_Relation", "It lies beside it. No.", "B"),
    ("Multi-view_Reasoning", "The object moved left, so the camera moves right.", ""),
    ("Jigsaw", "The second image.", "A"), ("Jigsaw", "Not the second image.", "")])
def test_an_options_own_words(task, text, letter):
    records = [{"idx": f"val_{task}_{n}", "task": task, "answer": f"({answer})"}
               for n, answer in enumerate("AB")]
    assert read_item(read_benchmark("blink", records).items[0], text, True)[0] == letter


def test_an_items_own_choices_go_before_those_of_its_task():
    record = {"idx": "val_1", "task": "Spatial_Relation", "answer": "(A)"}
    with pytest.raises(ValueError, match="have idx 'val_1' twice"):
        read_benchmark("blink", [record, record])
    turned = read_benchmark("blink", [{**record, "choices": ["no", "yes"]}]).items[0]
    assert read_item(turned, "no", True)[0] == "A"


@pytest.mark.parametrize("text,letter", [
    ("Left is (A) and right is (B) .\n\n(B)", "B"), ("(A) and\nthen (B)", ""), ("(C)", "C"),
    ("C", "")])
def test_blinks_own_rule_decides_nothing_that_its_authors_leave_to_another_model(text, letter):
    assert parse_blink_letter(text, "ABCD") == letter


@needs_data
@pytest.mark.parametrize("name", ["turn7/letters", "turn6/letters", "turn5/new_letters",
                                  "reports/letters"])
def test_letters_in_new_wordings_are_right_or_unread(name):
    for line in (DATA / "cases" / f"{name}.jsonl").read_text().splitlines():
        case = json.loads(line)
        letter, _ = read_choice(case["response"], case["options"], tuple(case["choices"]), True)
        assert letter in ("", case["right"]), case["response"]


@needs_data
@pytest.mark.parametrize("path", BLINK_FILES, ids=lambda path: path.stem)
def test_letters_agree_with_blinks_authors_and_theirs_give_the_published_scores(path):
    records, name = read_records(path), path.stem.removeprefix("val_")
    benchmark = read_benchmark("blink", records)
    lines = [{"id": record["idx"], "response": record["prediction"]} for record in records]
    accuracy = summarize(score_predictions(benchmark, lines))["avg"]["accuracy"]
    assert accuracy == pytest.approx(PUBLISHED_ACCURACY[name], abs=0.3)
    letters = [read_item(item, record["full_prediction"], True)[0]
               for item, record in zip(benchmark.items, records)]
    differ = sum(letter not in ("", record["prediction"].strip("()")[0])
                 for letter, record in zip(letters, records))
    assert differ <= 0.01 * len(records) and letters.count("") <= 0.19 * len(records)


@pytest.mark.parametrize("protocol", ["official", "strict"])
def test_replies_that_do_not_close_their_reasoning_as_most_do_are_cut(protocol):
    """The prompt has opened it, so nothing else tells them from answers."""
    records = [{"idx": f"val_T_{n}", "task": "T", "answer": "(A)"} for n in range(6)]
    closed = ["Hm.</think><answer>A</answer>"] * 3
    replies = [*closed, "The answer is A", "The answer is A.", ""]
    lines = [{"index": n, "response": reply} for n, reply in enumerate(replies)]
    scored = score_predictions(read_benchmark("blink", records), lines, protocol)
    assert scored.values.tolist() == [1, 1, 1, 0, 0, 0]
    assert scored.problems == {"unread": 2, "empty": 1}
    assert scored.remarks == (
        "2 replies do not close their reasoning, as 3 of 5 do: cut, so unread.",)
    lines[0]["response"] = "<answer>A</answer>"  # no more than half close theirs
    assert not score_predictions(read_benchmark("blink", records), lines, protocol).remarks


@needs_data
def test_blinks_two_versions_are_told_by_their_answers():
    """Relative_Reflectance was corrected in September 2025; ids and number stayed."""
    records = read_records(BLINK_FILES[0])
    assert read_benchmark("blink", records).version == "val, answers until September 2025"
    later = [record | {"answer": "(A)"} if record["task"] == "Relative_Reflectance" else record
             for record in records]
    benchmark = read_benchmark("blink", later)
    assert (benchmark.version, benchmark.complete) == ("val, answers since September 2025", True)
    assert read_benchmark("blink", records[:50]).version == "subset"
