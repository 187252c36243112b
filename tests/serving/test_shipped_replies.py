"""Replies that are shipped with the tiny base: found by what decides them, and the base's own."""

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import model_folder
from mig_kit.evaluation.evaluate import draw_test_samples
from mig_kit.models import loading
from mig_kit.pipeline.params import default_params
from mig_kit.serving import reply_files, shipped_replies
from mig_kit.serving.stored_replies import load_replies, reply_row
from mig_kit.shared_prefix.generation import SamplingOptions
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def key_of(samples, box_format=BOX_FORMAT, dtype=torch.float32, replies=1, temperature=0.0, seed=0):
    return shipped_replies.reply_key(samples, box_format, dtype, replies,
                                     SamplingOptions(temperature), seed)


def test_the_key_changes_with_whatever_decides_a_reply(monkeypatch):
    samples = [make_sample("refer_grounding", "val", number) for number in range(2)]
    asked_otherwise = [replace(samples[0], question="Find it."), samples[1]]
    with_other_images = [replace(samples[0], images=samples[1].images), samples[1]]
    keys = [key_of(samples), key_of(asked_otherwise), key_of(with_other_images),
            key_of(samples[::-1]), key_of(samples, BoxFormat(max_pixels=3136)),
            key_of(samples, dtype=torch.bfloat16), key_of(samples, replies=8),
            key_of(samples, temperature=1.0), key_of(samples, temperature=1.0, seed=1)]
    assert key_of(samples, seed=1) == keys[0], "greedy replies have no seed"
    monkeypatch.setattr(shipped_replies, "model_fingerprint", lambda _: {"model.safetensors": "x"})
    keys.append(key_of(samples))
    assert len(set(keys)) == len(keys)


def test_shipped_replies_are_taken_as_they_were_drawn(tmp_path, monkeypatch, capsys):
    """Said on the terminal; what a key does not name is not taken."""
    monkeypatch.setattr(shipped_replies, "FILE", tmp_path / "replies.jsonl.gz")
    samples = {"refer": [make_sample("refer_grounding", "val", number) for number in range(2)]}
    params = SimpleNamespace(max_new_tokens=8, replies=0, seed=0, server="")
    hardware = loading.choose_hardware("float32", "cpu")
    keys = reply_files.list_reply_keys(samples, {}, hardware.dtype, BOX_FORMAT, params)
    drawn = tmp_path / "drawn.jsonl"
    rows = [reply_row(sample.id, [f"reply {number}"], ["length"])
            for number, sample in enumerate(samples["refer"])]
    drawn.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shipped_replies.ship_replies({key: drawn for key in keys.values()})
    asked = ({"base": model_folder(shipped_replies.BASE)}, samples, {}, hardware, BOX_FORMAT)
    replies = reply_files.suite_replies(*asked, tmp_path / "replies", params)
    assert replies["base"]["refer"]["greedy"] == ["reply 0", "reply 1"]
    assert "2 of the base's replies are those shipped with it\n" in capsys.readouterr().out
    params.max_new_tokens = 2
    replies = reply_files.suite_replies(*asked, tmp_path / "others", params)
    assert "reply 0" not in replies["base"]["refer"]["greedy"]
    assert "shipped" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shipped_replies.FILE.is_file(), reason="make executed has shipped none yet")
def test_the_base_still_gives_the_shipped_replies(tmp_path):
    """Forty of them, drawn again."""
    params = SimpleNamespace(**default_params("06_evaluate"))
    hardware = loading.choose_hardware("float32", "cpu")
    samples = {"mig_bench": draw_test_samples(vars(params))["mig_bench"]}
    (key,) = reply_files.list_reply_keys(samples, {}, hardware.dtype, BOX_FORMAT, params).values()
    path = tmp_path / "shipped.jsonl"
    assert shipped_replies.fetch_replies(key, path) == len(samples["mig_bench"])
    assert gzip.decompress(shipped_replies.FILE.read_bytes()).count(b"\n") == 8
    shipped, asked = load_replies(path), samples["mig_bench"][::25]
    policy = loading.load_policy(loading.resolve_model("tiny"), hardware, BOX_FORMAT)
    replies = reply_files.greedy_replies(policy, asked, params.max_new_tokens)
    assert len(asked) == 40
    assert replies == [shipped[sample.id][0] for sample in asked]
