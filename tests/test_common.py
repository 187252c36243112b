"""Memory goes back to the system: CUDA's and glibc's, between the steps of a stage."""

from types import SimpleNamespace

import torch

from mig_kit import common
from mig_kit.boxes import BoxFormat
from mig_kit.serving import reply_files


def test_cudas_cache_is_emptied_where_there_is_one(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    for is_initialized, expected in ((False, []), (True, ["empty"])):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda flag=is_initialized: flag)
        common.release_memory()
        assert calls == expected


def test_a_policys_memory_is_released_when_it_is_closed(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(reply_files, "load_policy", lambda *_: "a policy")
    monkeypatch.setattr(reply_files, "release_memory", lambda: calls.append("release"))
    params = SimpleNamespace(server="")
    with reply_files.open_policy("m", "sft", None, BoxFormat(), params) as policy:
        assert policy == "a policy" and not calls
    assert calls == ["release"]
