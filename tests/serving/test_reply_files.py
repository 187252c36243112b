"""Replies side by side, rollouts that are kept and shown, and how far a system is from the base."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_json_lines
from mig_kit.serving import reply_files, stored_replies
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def test_threads_share_the_cores_and_keep_the_order():
    cores, barrier = torch.get_num_threads(), threading.Barrier(2, timeout=30)

    def count_cores(part):
        return part, torch.get_num_threads()

    def count_cores_in_pairs(part):
        barrier.wait()  # two are under way at a time, or it breaks
        return count_cores(part)

    try:
        torch.set_num_threads(4)
        in_pairs = list(reply_files.map_in_threads(count_cores_in_pairs, range(6), 2))
        assert in_pairs == [(part, 2) for part in range(6)]
        assert torch.get_num_threads() == 4
        assert list(reply_files.map_in_threads(count_cores, range(2), 1)) == [(0, 4), (1, 4)]
    finally:
        torch.set_num_threads(cores)


@pytest.mark.parametrize(("count", "sizes"), [
    (0, []), (1, [1]), (40, [20, 20]), (128, [64, 64]), (130, [32, 33, 32, 33])])
def test_batches_are_as_many_for_each_worker(count, sizes):
    sample = make_sample("diff", "val", 0)
    samples = [replace(sample, id=f"{number:03}") for number in range(count)]
    batches = reply_files._cut_batches(samples)
    assert [len(batch) for batch in batches] == sizes
    assert sum(batches, []) == [*range(count)]


def test_an_error_in_a_thread_is_raised_and_ends_the_rest():
    cores, done = torch.get_num_threads(), []

    def fail_at_1(part):
        if part == 1:
            raise KeyError("part 1")
        time.sleep(0.05)
        done.append(part)

    with pytest.raises(KeyError, match="part 1"):
        list(reply_files.map_in_threads(fail_at_1, range(40), 2))
    assert len(done) < 39 and torch.get_num_threads() == cores


def test_the_first_prompt_with_a_box_is_shown(tmp_path, monkeypatch):
    samples = [next(iter_free_form("val", 1)), make_sample("diff", "val", 0),
               make_sample("diff", "val", 1)]
    assert stored_replies.draw_first_rollouts(tmp_path, BOX_FORMAT, samples) is None
    rows = [{"step": step, "prompt": prompt, "reply": "", "reward": 0.0, "correct": False,
             "boxes": []} for step in (0, 2) for prompt in (0, 1, 2)]
    write_json_lines(tmp_path / stored_replies.ROLLOUTS, rows)
    assert stored_replies.load_rollouts(tmp_path) == rows
    drawn = []
    monkeypatch.setattr(stored_replies.pictures, "draw_rollouts",
                        lambda *given: drawn.append(given))
    for kept in (samples, samples[:1] * 3):
        stored_replies.draw_first_rollouts(tmp_path, BOX_FORMAT, kept)
    (first, rows_of_first, _), (choice, _, _) = drawn
    assert first is samples[1] and {row["prompt"] for row in rows_of_first} == {1}
    assert choice is samples[0], "where none asks for a box, the first"
