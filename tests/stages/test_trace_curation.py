"""What 02 learns from: another file of traces, those the base half knows, replay of its lessons."""

from types import SimpleNamespace

import numpy as np
import pytest

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import (
    GROUNDING_INSTRUCTION,
    chat_messages,
    format_answer,
    format_question,
)
from mig_kit.rewards import is_correct
from mig_kit.sample import Trace, read_replies, read_samples, write_samples
from mig_kit.stages import sft, sources, trace_curation
from mig_kit.world import lessons
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
REPLY = "<think>Compare.</think><answer>{}</answer>"


@pytest.fixture
def params(stage_params):
    """Call it with changes for the parameters of 02 and of the run."""
    def make(**changes) -> SimpleNamespace:
        changes = {"max_new_tokens": 8, "trace_replies": 2} | changes
        return SimpleNamespace(**vars(stage_params("02_sft", **changes)), base_model="tiny")

    return make


@pytest.fixture
def cot(tmp_path):
    """A file of ten traces."""
    samples = [make_sample(task, "cot", 0) for task in TASKS]
    write_samples(tmp_path / "cot.parquet", samples, [Trace(REPLY, "", "")] * len(samples))
    return tmp_path / "cot.parquet"


def test_the_recipe_learns_from_what_01_wrote(cot, params):
    assert trace_curation.choose_traces(params(), cot) == cot
    assert not trace_curation.needs_base(params())
    assert trace_curation.needs_base(params(replay_share=0.1))
    assert trace_curation.needs_base(params(trace_pass_rates=[0.1, 1.0]))


@pytest.mark.parametrize(("changes", "problem"), [
    ({"trace_pass_rates": [0.9, 0.1]}, "give the lowest and the highest pass rate"),
    ({"trace_pass_rates": [0.5]}, "give the lowest and the highest pass rate"),
    ({"trace_pass_rates": [0.1, 0.9], "trace_replies": 0}, "needs trace_replies of at least 1"),
    ({"replay_share": 1.0}, "give a share from 0 to below 1"),
    ({"traces_file": "nowhere.parquet"}, "traces_file .*nowhere.parquet is not there"),
    ({"traces_file": "README.md"}, "holds no replies; give a cot.parquet")])
def test_what_cannot_be_learned_from_is_one_sentence(changes, problem, cot, params):
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        trace_curation.choose_traces(params(**changes), cot)


def test_questions_without_replies_are_refused(tmp_path, cot, params):
    write_samples(tmp_path / "kept.parquet", list(read_samples(cot)))
    changes = {"traces_file": str(tmp_path / "kept.parquet")}
    with pytest.raises(ValueError, match="holds no replies"):
        trace_curation.choose_traces(params(**changes), cot)
    changes = {"traces_file": str(cot)}
    assert trace_curation.choose_traces(params(**changes), tmp_path / "another") == cot


@pytest.fixture
def lesson_file(cot):
    """Twenty lessons' questions beside the traces, as 01 writes them."""
    path = cot.with_name("lessons.parquet")
    write_samples(path, lessons.draw_lesson_questions(20, 0))
    return path


def test_an_answer_is_correct_whatever_is_said_before_it():
    sample = make_sample("diff", "cot", 0)
    image, box = sample.targets[0]
    model_box = to_model_box(box, sample.sizes[image - 1], BOX_FORMAT)
    answer = f"<answer>{format_answer(image, model_box)}</answer>"
    for reply, is_good in ((answer, True), (REPLY.format(format_answer(image, model_box)), True),
                           (answer.replace(f": {image}", f": {3 - image}"), False), ("", False)):
        assert trace_curation._answers_correctly(reply, sample, BOX_FORMAT) == is_good
        assert is_correct(reply, sample, BOX_FORMAT) == is_good


def test_replay_needs_lessons(cot, params):
    with pytest.raises(FileNotFoundError, match="run 01_synthesize with lesson_questions"):
        trace_curation.choose_traces(params(replay_share=0.1), cot)


@pytest.mark.parametrize("data", ["own", "mgrounding"])
def test_lessons_are_drawn_for_drawn_scenes_only(data, stage_params):
    changed = stage_params("01_synthesize", data=data, teacher="none", lesson_questions=9)
    with pytest.raises(ValueError, match="lesson_questions are drawn, for the tiny base"):
        sources.check_source(changed)


def test_only_the_tiny_base_knows_the_lessons(tmp_path, cot, lesson_file, params):
    asked = params(replay_share=0.1)
    assert trace_curation.choose_traces(asked, cot) == cot
    asked.base_model = str(tmp_path)
    with pytest.raises(ValueError, match="replay_share asks what the tiny base was taught"):
        trace_curation.choose_traces(asked, cot)


def test_a_lesson_is_asked_as_it_was_taught():
    questions = [lessons.draw_lesson_question(index, 0) for index in range(60)]
    assert len({sample.id for sample in questions}) == 60
    assert {len(sample.images) for sample in questions} == set(range(1, 7))
    again = lessons.draw_lesson_question(7, 0)
    assert again.question == questions[7].question
    assert again.images[0].tobytes() == questions[7].images[0].tobytes()
    assert lessons.draw_lesson_question(7, 1).images[0].tobytes() != again.images[0].tobytes()
    for sample in questions:
        assert format_question(sample, BOX_FORMAT) == sample.question
        assert chat_messages(sample, BOX_FORMAT)[0]["content"][-1]["text"] == sample.question
        assert not sample.targets and " it in " not in sample.question
    taught = [sample.question for sample in questions]
    assert "List every image." in taught
    assert any(question.startswith("Where is each thing") for question in taught)
    assert any(GROUNDING_INSTRUCTION not in question for question in taught)


def test_traces_between_two_pass_rates_are_kept(tmp_path, random_policy, cot, params, monkeypatch):
    rates = np.array([0, 0.25, 0.5, 0.75, 1, 0, 0, 0, 0, 1])
    monkeypatch.setattr(trace_curation, "base_pass_rates", lambda *_: rates)
    path, figures = trace_curation.curate_traces(
        random_policy, cot, cot, tmp_path, params(trace_pass_rates=[0.25, 0.75]))
    assert figures == {"pass_rates": {"traces": 10, "kept": 3, "mean": rates.mean()}}
    expected = [sample.id for sample in read_samples(cot)][1:4]
    assert [sample.id for sample in read_samples(path)] == expected
    assert list(read_replies(path)) == [REPLY] * 3
    monkeypatch.setattr(trace_curation, "base_pass_rates", lambda *_: np.zeros(10))
    with pytest.raises(ValueError, match="answers no question with a pass rate within 0.25 to"):
        trace_curation.curate_traces(random_policy, cot, cot, tmp_path,
                                     params(trace_pass_rates=[0.25, 0.75]))


def test_pass_rates_are_shares_of_correct_replies(tmp_path, random_policy, cot, params,
                                                  monkeypatch):
    samples = read_samples(cot)
    drawn = {sample.id: ["right", "wrong"] for sample in samples}
    drawn[samples[0].id] = ["right", "right"]
    monkeypatch.setattr(trace_curation, "sample_replies", lambda *_, **__: drawn)
    monkeypatch.setattr(trace_curation, "_answers_correctly", lambda reply, *_: reply == "right")
    rates = trace_curation.base_pass_rates(random_policy, samples, tmp_path / "x.jsonl", params())
    assert rates.tolist() == [1.0] + [0.5] * 9


@pytest.mark.slow
def test_replay_is_its_share_of_the_tokens(tmp_path, random_policy, cot, lesson_file, params,
                                           monkeypatch):
    monkeypatch.setattr(trace_curation, "LESSONS_AT_ONCE", 8)
    write_samples(lesson_file, lessons.draw_lesson_questions(100, 0))
    encode = random_policy.processor.tokenizer
    n_tokens = sum(len(encode(REPLY, add_special_tokens=False)["input_ids"]) + 1
                   for _ in range(10))
    drawn = {}

    def draw(policy, samples, path, **options):
        drawn.update({sample.id: ["red star" if number else "too long " * 9]
                      for number, sample in enumerate(samples)})
        return drawn

    monkeypatch.setattr(trace_curation, "sample_replies", draw)
    path, figures = trace_curation.curate_traces(random_policy, cot, cot, tmp_path,
                                                 params(replay_share=0.5))
    samples, replies = list(read_samples(path)), list(read_replies(path))
    assert replies[:10] == [REPLY] * 10 and set(replies[10:]) == {"red star"}
    assert {sample.suite for sample in samples[10:]} == {"lessons"}
    assert len({sample.id for sample in samples}) == len(samples)
    size = trace_curation.count_tokens(random_policy, ["red star"])
    rows = -(-n_tokens // size)
    assert figures["replay"] == {"rows": rows, "tokens": rows * size,
                                 "share": pytest.approx(0.5, abs=0.02)}
    write_samples(lesson_file, lessons.draw_lesson_questions(3, 0))
    with pytest.raises(ValueError, match="the 3 lessons of 01 give a replay_share of 0.0"):
        trace_curation.curate_traces(random_policy, cot, cot, tmp_path, params(replay_share=0.5))
    rows = sft.sft_rows(samples, replies, BOX_FORMAT)
    assert rows[len(rows) - 1]["completion"][0]["content"][0]["text"] == "red star"


@pytest.mark.slow
def test_replay_is_resumed_and_the_same(tmp_path, random_policy, cot, lesson_file, params,
                                        monkeypatch):
    monkeypatch.setattr(trace_curation, "LESSONS_AT_ONCE", 4)
    changed = params(replay_share=0.3, max_new_tokens=200)
    monkeypatch.setattr(trace_curation, "count_tokens", lambda policy, replies: 4 * len(
        list(replies)))
    first, _ = trace_curation.curate_traces(random_policy, cot, cot, tmp_path, changed)
    content = first.read_bytes()
    (tmp_path / "replay_1.jsonl").unlink()
    again, _ = trace_curation.curate_traces(random_policy, cot, cot, tmp_path, changed)
    assert again.read_bytes() == content
