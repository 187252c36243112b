"""The teacher and the filter, by hand."""

import random

import pytest

from mig_kit import filters
from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import format_answer, parse_reply
from mig_kit.sample import read_samples, read_table, write_samples
from mig_kit.stages import synthesize
from mig_kit.world import teacher
from mig_kit.world.tasks import TASKS, make_sample


def good(sample):
    number, box = sample.targets[0]
    return format_answer(number, to_model_box(box, sample.sizes[number - 1], box_format=BoxFormat())), number, to_model_box(box, sample.sizes[number - 1], box_format=BoxFormat())


@pytest.mark.parametrize("task", TASKS)
def test_each_verdict(task):
    sample = make_sample(task, "cot", 1)
    answer, number, box = good(sample)
    written = answer[answer.index("["):-1]
    wrong = format_answer(number % len(sample.images) + 1, box)
    far = format_answer(number, [v + 60 for v in box])
    assert filters.drop_reason(f"<think>so</think><answer>{answer}</answer>", sample, box_format=BoxFormat()) == ""
    assert filters.drop_reason(f"<think>so</think>{answer}", sample, box_format=BoxFormat()) == "format"
    assert filters.drop_reason(f"<think>so</think><answer>{wrong}</answer>", sample, box_format=BoxFormat()) == "image"
    assert filters.drop_reason(f"<think>so</think><answer>{far}</answer>", sample, box_format=BoxFormat()) == "box"
    assert filters.drop_reason(f"<think>at {written}</think><answer>{answer}</answer>", sample, box_format=BoxFormat()) == "leak"


def test_the_teacher_errs_at_its_rate_and_the_filter_finds_it():
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(40)]
    traces = synthesize.write_traces(samples, 0, (1, 1, 1), 0.25, 0.7, box_format=BoxFormat())
    assert 0.18 < sum(bool(t.error) for t in traces) / len(traces) < 0.32
    verdicts = [filters.drop_reason(t.text, s, box_format=BoxFormat()) for t, s in zip(traces, samples)]
    for trace, verdict in zip(traces, verdicts):
        if trace.error in ("wrong image", "leaked answer", "broken format"):
            assert verdict, trace
    clean = [v for t, v in zip(traces, verdicts) if not t.error]
    assert clean.count("") / len(clean) > 0.97
    counts = synthesize.count_drops(verdicts, traces)
    assert counts["kept"] + sum(counts["dropped"].values()) == len(samples)


def test_traces_never_hold_the_final_box_and_follow_the_task():
    methods = {"diff": "Compare.", "common_object": "List.", "multi_view": "Track.", "region": "Search.",
               "group_grounding": "Find.", "reasoning": "Associate."}
    for task in TASKS:
        sample = make_sample(task, "cot", 2)
        for detail in teacher.DETAILS:
            text = teacher.write_reasoning(sample, detail)
            assert not filters.contains_target_box(text, sample, (3136, 401408)) and text.startswith(methods.get(task, text[:1]))


def test_a_clean_trace_parses():
    sample = make_sample("reasoning", "cot", 0)
    assert parse_reply(teacher.write_trace(sample, random.Random(0), error_rate=0.0, box_format=BoxFormat()).text).well_formed


def test_round_trip_through_parquet(tmp_path):
    samples = [make_sample(task, "cot", 3) for task in TASKS]
    traces = synthesize.write_traces(samples, 0, (1, 1, 1), 0.0, 0.7, box_format=BoxFormat())
    write_samples(tmp_path / "cot.parquet", samples, traces)
    back = read_samples(tmp_path / "cot.parquet")
    for a, b in zip(samples, back):
        assert (a.id, a.question, a.notes, a.sizes) == (b.id, b.question, b.notes, b.sizes)
        assert [n for n, _ in a.targets] == [n for n, _ in b.targets] and list(a.targets[0][1]) == list(b.targets[0][1])
        assert all(x.tobytes() == y.convert("RGB").tobytes() for x, y in zip(a.images, b.images))
    assert list(read_table(tmp_path / "cot.parquet")["reply"]) == [t.text for t in traces]


def test_a_truncated_parquet_is_one_sentence(tmp_path):
    path = tmp_path / "cot.parquet"
    write_samples(path, [make_sample("diff", "cot", 0)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="run its stage again"):
        read_table(path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_table(tmp_path / "none.parquet")


def test_multiple_choice_verdicts():
    from mig_kit.world.suites import FREE_FORM, make_free_form

    for sample in (s for s in make_free_form("cot", 3) if s.options):
        wrong = "B" if sample.letter == "A" else "A"
        assert filters.drop_reason(f"<think>{sample.finding}</think><answer>{sample.letter}</answer>", sample, box_format=BoxFormat()) == ""
        assert filters.drop_reason(f"<think>so</think><answer>{wrong}</answer>", sample, box_format=BoxFormat()) == "choice"
        assert filters.drop_reason(f"<think>{sample.letter}. so</think><answer>{sample.letter}</answer>", sample, box_format=BoxFormat()) == "leak"
        assert filters.drop_reason('<think>so</think><answer>{"image": 1, "box": [1,2,3,4]}</answer>', sample, box_format=BoxFormat()) == "format"
        found = sample.finding.split(": image ")[0].split(": ")[-1].rstrip(".")
        if sample.task == "tallying":
            found = " ".join(sample.notes)
            assert found.count(",") + 1 == int(sample.options["ABC".index(sample.letter)])
        assert sample.task in FREE_FORM and found in " ".join(sample.notes)
    traces = synthesize.write_traces(make_free_form("cot", 40), 0, (1, 1, 1), 0.3, 0.7, box_format=BoxFormat())
    pairs = [(t, filters.drop_reason(t.text, s, box_format=BoxFormat())) for t, s in zip(traces, make_free_form("cot", 40)) if s.options]
    assert len(pairs) == 40 * (len(FREE_FORM) - 2) and all((not verdict) == (not t.error) for t, verdict in pairs)


def test_what_is_told_is_the_only_one():
    from mig_kit.world.suites import make_free_form

    for sample in (s for s in make_free_form("cot", 40) if s.task == "telling"):
        (number, _), = sample.targets
        names = sample.notes[0].split(": ")[1].rstrip(".").split(", ")
        words = sample.question.split(" in image ")[0].rstrip("?.").split()
        word = words[-2] if words[-1] == "thing" else words[-1]
        assert [name for name in names if word in name] == [sample.finding.split(":")[0]]
        assert (f"in image {number}" in sample.question) == (len(sample.images) > 1)
