"""The teacher and the filter, by hand."""

import random

import pytest

from mig_kit import filters
from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import LETTERS, format_answer, format_box, parse_reply
from mig_kit.sample import read_replies, read_samples, write_samples
from mig_kit.stages import synthesize
from mig_kit.world import teacher
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.specs import names_in_note
from mig_kit.world.suites import make_free_form
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SAME_MIX = (1, 1, 1)


def drop_reason(thinking, answer, sample):
    reply = f"<think>{thinking}</think><answer>{answer}</answer>"
    return filters.drop_reason(reply, sample, BOX_FORMAT)


@pytest.mark.parametrize("task", TASKS)
def test_each_drop_reason(task):
    sample = make_sample(task, "cot", 1)
    number, original_box = sample.targets[0]
    box = to_model_box(original_box, sample.sizes[number - 1], BOX_FORMAT)
    answer = format_answer(number, box)
    wrong_image = format_answer(number % len(sample.images) + 1, box)
    far_box = format_answer(number, [value + 60 for value in box])
    assert drop_reason("so", answer, sample) == ""
    reply = f"<think>so</think>{answer}"
    assert filters.drop_reason(reply, sample, BOX_FORMAT) == "format"
    assert drop_reason("so", wrong_image, sample) == "image"
    assert drop_reason("so", far_box, sample) == "box"
    assert drop_reason(f"at {format_box(box)}", answer, sample) == "leak"


def test_the_teacher_errs_at_its_rate_and_the_filter_notices():
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(40)]
    traces = synthesize.write_traces(samples, 0, SAME_MIX, 0.25, 0.7, BOX_FORMAT)
    assert 0.18 < sum(bool(trace.error) for trace in traces) / len(traces) < 0.32
    reasons = [filters.drop_reason(trace.text, sample, BOX_FORMAT)
               for trace, sample in zip(traces, samples)]
    for trace, reason in zip(traces, reasons):
        if trace.error in ("wrong image", "leaked answer", "broken format"):
            assert reason, trace
    of_flawless = [reason for trace, reason in zip(traces, reasons) if not trace.error]
    assert of_flawless.count("") / len(of_flawless) > 0.97
    counts = synthesize.count_drops(reasons, traces)
    assert counts["kept"] + sum(counts["dropped"].values()) == len(samples) == counts["total"]


def test_traces_never_hold_the_final_box_and_follow_the_task():
    methods = {"diff": "Compare.", "common_object": "List.", "multi_view": "Track.",
               "region": "Search.", "group_grounding": "Find.", "reasoning": "Associate."}
    for task in TASKS:
        sample = make_sample(task, "cot", 2)
        for detail in teacher.DETAILS:
            text = teacher.write_reasoning(sample, detail)
            assert not filters.contains_target_box(text, sample, BOX_FORMAT)
            assert text.startswith(methods.get(task, text[:1]))


def test_a_flawless_trace_parses():
    sample = make_sample("reasoning", "cot", 0)
    trace = teacher.write_trace(sample, random.Random(0), BOX_FORMAT, error_rate=0.0)
    assert parse_reply(trace.text).well_formed


def test_round_trip_through_parquet(tmp_path):
    samples = [make_sample(task, "cot", 3) for task in TASKS]
    traces = synthesize.write_traces(samples, 0, SAME_MIX, 0.0, 0.7, BOX_FORMAT)
    write_samples(tmp_path / "cot.parquet", samples, traces)
    for sample, read in zip(samples, read_samples(tmp_path / "cot.parquet"), strict=True):
        for name in ("id", "question", "notes", "sizes"):
            assert getattr(sample, name) == getattr(read, name)
        assert [target.image for target in sample.targets] == [t.image for t in read.targets]
        assert list(sample.targets[0].box) == list(read.targets[0].box)
        assert all(image.tobytes() == read_image.convert("RGB").tobytes()
                   for image, read_image in zip(sample.images, read.images))
    replies = read_replies(tmp_path / "cot.parquet")
    assert list(replies) == [trace.text for trace in traces]


def test_a_truncated_parquet_is_one_sentence(tmp_path):
    path = tmp_path / "cot.parquet"
    write_samples(path, [make_sample("diff", "cot", 0)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="run its stage again"):
        read_samples(path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        read_samples(tmp_path / "none.parquet")


def test_drop_reasons_of_multiple_choice():
    for sample in (sample for sample in make_free_form("cot", 3) if sample.options):
        wrong = "B" if sample.letter == "A" else "A"
        assert drop_reason(sample.finding, sample.letter, sample) == ""
        assert drop_reason("so", wrong, sample) == "choice"
        assert drop_reason(f"{sample.letter}. so", sample.letter, sample) == "leak"
        assert drop_reason("so", '{"image": 1, "box": [1,2,3,4]}', sample) == "format"


def test_the_notes_hold_the_finding_of_a_multiple_choice_sample():
    for sample in (sample for sample in make_free_form("cot", 3) if sample.options):
        notes = " ".join(sample.notes)
        assert sample.task in FREE_FORM
        if sample.task == "tallying":
            assert notes.count(",") + 1 == int(sample.options[LETTERS.index(sample.letter)])
        else:
            assert sample.finding.split(": image ")[0].split(": ")[-1].rstrip(".") in notes


def test_a_multiple_choice_trace_is_dropped_if_the_teacher_erred():
    samples = make_free_form("cot", 40)
    traces = synthesize.write_traces(samples, 0, SAME_MIX, 0.3, 0.7, BOX_FORMAT)
    pairs = [(trace.error, filters.drop_reason(trace.text, sample, BOX_FORMAT))
             for trace, sample in zip(traces, samples) if sample.options]
    assert len(pairs) == 40 * (len(FREE_FORM) - len(BOX_FORMS))
    assert all(bool(reason) == bool(error) for error, reason in pairs)


def test_only_one_object_fits_a_description():
    for sample in (sample for sample in make_free_form("cot", 40) if sample.task == "telling"):
        (target,) = sample.targets
        names = names_in_note(sample.notes[0])
        words = sample.question.split(" in image ")[0].rstrip("?.").split()
        word = words[-2] if words[-1] == "thing" else words[-1]
        fitting = [name for name in names if word in name]
        assert fitting == [sample.finding.split(":")[0]]
        assert (f"in image {target.image}" in sample.question) == (len(sample.images) > 1)


def test_the_data_card_states_source_coordinates_and_drops():
    counts = {"total": 5, "kept": 3, "dropped": {"format": 2, "box": 0}}
    card = synthesize.data_card(7, counts, {"cot": 3}, "normalized_1000")
    assert "Drawn scenes (seed 7)" in card and "license: apache-2.0" in card
    assert "0 to 1000 of the image's width and height" in card
    assert "- `cot.parquet`: 3 samples" in card and "kept 3; dropped: format 2, box 0." in card
    teacher = "some-model, asked over an endpoint"
    card = synthesize.data_card(7, counts, {"cot": 3}, "absolute", "own", teacher)
    assert "license: other" in card and f"traces of {teacher};" in card
