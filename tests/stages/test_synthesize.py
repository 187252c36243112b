"""The teacher and the filter, by hand."""

import pytest

from mig_kit import filters
from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import format_answer, format_box
from mig_kit.sample import read_replies, read_samples, write_samples
from mig_kit.stages import synthesize
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()


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
    samples += iter_free_form("cot", 40)
    traces = synthesize.RuleBasedTraces(samples, 0, BOX_FORMAT, error_rate=0.25)
    assert 0.18 < sum(bool(trace.error) for trace in traces) / len(traces) < 0.32
    reasons = [filters.drop_reason(trace.text, sample, BOX_FORMAT)
               for trace, sample in zip(traces, samples)]
    for sample, trace, reason in zip(samples, traces, reasons):
        if trace.error in ("wrong image", "leaked answer", "broken format"):
            assert reason, trace
        assert not sample.options or bool(reason) == bool(trace.error), trace
    of_flawless = [reason for trace, reason in zip(traces, reasons) if not trace.error]
    assert of_flawless.count("") / len(of_flawless) > 0.97
    outcomes = [(reason, trace.detail, trace.error) for reason, trace in zip(reasons, traces)]
    counts = synthesize.count_drops(outcomes)
    assert counts["kept"] + sum(counts["dropped"].values()) == len(samples) == counts["total"]


def test_round_trip_through_parquet(tmp_path):
    samples = [make_sample(task, "cot", 3) for task in TASKS]
    traces = synthesize.RuleBasedTraces(samples, 0, BOX_FORMAT, error_rate=0.0)
    write_samples(tmp_path / "cot.parquet", samples, traces)
    for sample, read in zip(samples, read_samples(tmp_path / "cot.parquet"), strict=True):
        for name in ("id", "question", "notes", "sizes", "targets"):
            assert getattr(sample, name) == getattr(read, name)
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
    with pytest.raises(ValueError, match="is missing"):
        read_samples(tmp_path / "none.parquet")


def test_drop_reasons_of_multiple_choice():
    for sample in (sample for sample in iter_free_form("cot", 3) if sample.options):
        wrong = "B" if sample.letter == "A" else "A"
        assert drop_reason(sample.finding, sample.letter, sample) == ""
        assert drop_reason("so", wrong, sample) == "choice"
        assert drop_reason(f"{sample.letter}. so", sample.letter, sample) == "leak"
        assert drop_reason("so", '{"image": 1, "box": [1,2,3,4]}', sample) == "format"


def test_the_data_card_states_source_coordinates_and_drops():
    counts = {"total": 5, "kept": 3, "dropped": {"format": 2, "box": 0}}
    card = synthesize.data_card(7, counts, {"cot": 3}, "normalized_1000")
    assert "Drawn scenes (seed 7)" in card and "license: apache-2.0" in card
    assert "0 to 1000 of the image's width and height" in card
    assert "- `cot.parquet`: 3 samples" in card and "kept 3; dropped: format 2, box 0." in card
    teacher = "some-model, asked over an endpoint"
    card = synthesize.data_card(7, counts, {"cot": 3}, "absolute", "a/my.jsonl", teacher)
    assert "license: other" in card and f"traces of {teacher};" in card
