"""Memory goes back to the system: CUDA's and glibc's, between the steps of a stage."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from mig_kit import common
from mig_kit.boxes import BoxFormat
from mig_kit.engine import sampling, systems


def test_cudas_cache_is_emptied_where_there_is_one(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    for is_initialized, expected in ((False, []), (True, ["empty"])):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda flag=is_initialized: flag)
        common.release_memory()
        assert calls == expected


def test_memory_is_released_between_the_systems_of_an_evaluation(monkeypatch, tmp_path):
    calls = []

    @contextmanager
    def open_policy(model, *_):
        calls.append(f"open {model}")
        yield None
        calls.append(f"close {model}")

    monkeypatch.setattr(systems, "open_policy", open_policy)
    monkeypatch.setattr(systems, "release_memory", lambda: calls.append("release"))
    monkeypatch.setattr(systems, "_system_replies", lambda *_: {})
    systems.suite_replies({"base": "a", "sft": "b"}, {}, {}, None, BoxFormat(), tmp_path,
                          SimpleNamespace())
    assert calls == ["release", "open a", "close a", "release", "open b", "close b"]


def test_a_policys_memory_is_released_when_it_is_closed(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(sampling, "load_policy", lambda *_: "a policy")
    monkeypatch.setattr(sampling, "release_memory", lambda: calls.append("release"))
    params = SimpleNamespace(server="")
    with sampling.open_policy("m", "sft", None, BoxFormat(), tmp_path, params) as policy:
        assert policy == "a policy" and not calls
    assert calls == ["release"]
