"""What the benchmark measures with."""

import time

import torch

from mig_kit.lab import workload
from mig_kit.lab.workload import Workload


def test_questions_have_images_of_one_size_and_are_the_same_each_time():
    first, second = workload.make_questions(Workload(images=3, side=112, prompts=2))
    assert [image.size for image in second.images] == [(112, 112)] * 3 and first.id != second.id
    assert workload.make_questions(Workload(images=3, side=112))[0].question == first.question


def test_turns_are_timed(float32, capsys):
    calls = lambda: time.sleep(0.03), lambda: time.sleep(0.01)
    times = workload.compare_times(*calls, 3, float32, "train")
    assert capsys.readouterr().out.startswith("train          stock    0.")
    assert 1.5 < times["ratio"] < 4 and times["stock_spread"][0] >= 0.03
    assert times["kit_spread"][1] >= times["kit_s"]


def test_peak_memory_sees_what_is_freed_again(float32):
    def call():
        ones = torch.ones(64, 2**18)  # 64 MiB
        time.sleep(0.05)
        return float(ones.sum())

    assert 55 < workload.peak_memory(call, float32) < 120
