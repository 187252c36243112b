"""The teacher and the filter, by hand."""

import random

import pytest

from mig_kit import synthesize, teacher
from mig_kit.frames import to_model
from mig_kit.prompts import answer_text, parse
from mig_kit.tasks import TASKS, make


def good(sample):
    number, box = sample.targets[0]
    return answer_text(number, to_model(box, sample.sizes[number - 1])), number, to_model(box, sample.sizes[number - 1])


@pytest.mark.parametrize("task", TASKS)
def test_each_verdict(task):
    sample = make(task, "cot", 1)
    answer, number, box = good(sample)
    written = answer[answer.index("["):-1]
    wrong = answer_text(number % len(sample.images) + 1, box)
    far = answer_text(number, [v + 60 for v in box])
    assert synthesize.verdict(f"<think>so</think><answer>{answer}</answer>", sample) == ""
    assert synthesize.verdict(f"<think>so</think>{answer}", sample) == "format"
    assert synthesize.verdict(f"<think>so</think><answer>{wrong}</answer>", sample) == "image"
    assert synthesize.verdict(f"<think>so</think><answer>{far}</answer>", sample) == "box"
    assert synthesize.verdict(f"<think>at {written}</think><answer>{answer}</answer>", sample) == "leak"


def test_the_teacher_errs_at_its_rate_and_the_filter_finds_it():
    samples = [make(task, "cot", i) for task in TASKS for i in range(40)]
    traces = synthesize.traces(samples, 0, (1, 1, 1), 0.25, 0.7)
    assert 0.18 < sum(bool(t.error) for t in traces) / len(traces) < 0.32
    verdicts = [synthesize.verdict(t.text, s) for t, s in zip(traces, samples)]
    for trace, verdict in zip(traces, verdicts):
        if trace.error in ("wrong image", "leaked answer", "broken format"):
            assert verdict, trace
    clean = [v for t, v in zip(traces, verdicts) if not t.error]
    assert clean.count("") / len(clean) > 0.97
    counts = synthesize.counts(verdicts, traces)
    assert counts["kept"] + sum(counts["dropped"].values()) == len(samples)


def test_traces_never_hold_the_final_box_and_follow_the_task():
    methods = {"diff": "Compare.", "common_object": "List.", "multi_view": "Track.", "region": "Search.",
               "group_grounding": "Find.", "reasoning": "Associate."}
    for task in TASKS:
        sample = make(task, "cot", 2)
        for detail in teacher.DETAILS:
            text = teacher.thinking(sample, detail)
            assert not synthesize.leaks(text, sample, (3136, 401408)) and text.startswith(methods.get(task, text[:1]))


def test_a_clean_trace_parses():
    sample = make("reasoning", "cot", 0)
    assert parse(teacher.write(sample, random.Random(0), error_rate=0.0).text).well_formed


def test_round_trip_through_parquet(tmp_path):
    samples = [make(task, "cot", 3) for task in TASKS]
    traces = synthesize.traces(samples, 0, (1, 1, 1), 0.0, 0.7)
    synthesize.write_samples(tmp_path / "cot.parquet", samples, traces)
    back = synthesize.read_samples(tmp_path / "cot.parquet")
    for a, b in zip(samples, back):
        assert (a.id, a.question, a.notes, a.sizes) == (b.id, b.question, b.notes, b.sizes)
        assert [n for n, _ in a.targets] == [n for n, _ in b.targets] and list(a.targets[0][1]) == list(b.targets[0][1])
        assert all(x.tobytes() == y.convert("RGB").tobytes() for x, y in zip(a.images, b.images))
    assert list(synthesize.read_rows(tmp_path / "cot.parquet")["reply"]) == [t.text for t in traces]


def test_a_truncated_parquet_is_one_sentence(tmp_path):
    path = tmp_path / "cot.parquet"
    synthesize.write_samples(path, [make("diff", "cot", 0)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="run its stage again"):
        synthesize.read_rows(path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        synthesize.read_rows(tmp_path / "none.parquet")


def test_multiple_choice_verdicts():
    from mig_kit.suites import FREE_FORM, make_free_form

    for sample in (s for s in make_free_form("cot", 3) if s.options):
        wrong = "B" if sample.letter == "A" else "A"
        assert synthesize.verdict(f"<think>{sample.finding}</think><answer>{sample.letter}</answer>", sample) == ""
        assert synthesize.verdict(f"<think>so</think><answer>{wrong}</answer>", sample) == "choice"
        assert synthesize.verdict(f"<think>{sample.letter}. so</think><answer>{sample.letter}</answer>", sample) == "leak"
        assert synthesize.verdict('<think>so</think><answer>{"image": 1, "box": [1,2,3,4]}</answer>', sample) == "format"
        found = sample.finding.split(": image ")[0].split(": ")[-1].rstrip(".")
        if sample.task == "tallying":
            found = " ".join(sample.notes)
            assert found.count(",") + 1 == int(sample.options["ABC".index(sample.letter)])
        assert sample.task in FREE_FORM and found in " ".join(sample.notes)
    traces = synthesize.traces(make_free_form("cot", 40), 0, (1, 1, 1), 0.3, 0.7)
    pairs = [(t, synthesize.verdict(t.text, s)) for t, s in zip(traces, make_free_form("cot", 40)) if s.options]
    assert len(pairs) == 40 * (len(FREE_FORM) - 2) and all((not verdict) == (not t.error) for t, verdict in pairs)


def test_what_is_told_is_the_only_one():
    from mig_kit.suites import make_free_form

    for sample in (s for s in make_free_form("cot", 40) if s.task == "telling"):
        (number, _), = sample.targets
        names = sample.notes[0].split(": ")[1].rstrip(".").split(", ")
        words = sample.question.split(" in image ")[0].rstrip("?.").split()
        word = words[-2] if words[-1] == "thing" else words[-1]
        assert [name for name in names if word in name] == [sample.finding.split(":")[0]]
        assert (f"in image {number}" in sample.question) == (len(sample.images) > 1)
