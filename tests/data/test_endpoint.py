"""The teacher's endpoint against a server that misbehaves: every request is counted."""

import json
import signal
import subprocess
import sys
import time

import pytest
from local_server import running_server
from teacher_server import TeacherServer, completion, question_text

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.common import UserError
from mig_kit.data import endpoint
from mig_kit.data.endpoint import teacher_prompt
from mig_kit.prompts import format_answer
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def make_samples(count=3):
    tasks = list(TASKS)
    return [make_sample(tasks[i % len(tasks)], "cot", i) for i in range(count)]


def request_traces(server, path, samples, **changes):
    fields = {"url": server.url, "model": "m", **changes}
    return endpoint.request_traces(samples, endpoint.Endpoint(**fields), path, BOX_FORMAT)


def test_replies_come_in_order_and_nothing_is_asked_twice(tmp_path):
    server = TeacherServer(lambda nth, body: (200, completion(question_text(body))))
    path, samples = tmp_path / "calls.jsonl", make_samples(6)
    samples_with_a_repeat = [*samples, samples[0]]
    for _ in range(2):
        traces = request_traces(server, path, iter(samples_with_a_repeat))
        assert [trace.text for trace in traces] == [
            teacher_prompt(sample, BOX_FORMAT) for sample in samples_with_a_repeat]
        assert server.total == 6  # once each, the repeat and the second run included
    assert endpoint.summarize_usage(path) == {
        "calls": 6, "prompt_tokens": 600, "completion_tokens": 60,
        "without_counts": 0}
    request_traces(server, path, samples, model="other")
    assert server.total == 12  # another model's replies are other replies


@pytest.mark.parametrize("body", [
    json.dumps(completion()).encode()[:40], b"", {"choices": []}, b"[" * 100_000, b"\xff",
    {"choices": [{"message": {"content": None}}]}, {"error": {"message": "upstream"}},
    {"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}])
def test_an_answer_that_is_no_completion_is_asked_for_again_next_time(tmp_path, body):
    server = TeacherServer(lambda nth, _: (200, body if server.total == 1 else completion()))
    first, second = request_traces(server, tmp_path / "c", make_samples(2), concurrency=1)
    assert server.total == 2 and first.error and not second.error
    first, _ = request_traces(server, tmp_path / "c", make_samples(2))
    assert server.total == 3 and not first.error


ANSWER = "<answer>x</answer>"


@pytest.mark.parametrize(("message", "reason", "text", "error"), [
    ({"content": f"<think>a</think>{ANSWER}"}, "length", f"<think>a</think>{ANSWER}", ""),
    ({"content": None, "reasoning": "so"}, "length", "<think>so",
     "no whole reply (finish_reason length)"),
    ({}, "content_filter: X", "", "no whole reply (finish_reason content_filter: X)"),
    ({"content": None, "refusal": "No."}, "stop", "", "no whole reply (finish_reason refusal)"),
    ({"content": " "}, "stop", "", "no whole reply (finish_reason stop)")])
def test_a_reply_has_its_reasoning_or_says_why_it_has_no_text(tmp_path, message, reason,
                                                              text, error):
    server = TeacherServer(lambda nth, _: (200, {"choices": [{"message": message,
                                                      "finish_reason": reason}]}))
    for _ in range(2):
        (trace,) = request_traces(server, tmp_path / "c", make_samples(1))
        assert trace.text.strip() == text and trace.error.startswith(error)
        assert bool(trace.error) == bool(error)
    assert server.total == 1, "a call that was paid for was made again"


@pytest.mark.parametrize(("answer", "changes", "sentence", "total"), [
    ((200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}),
     {"max_tokens": 9}, "finish_reason length.*raise max_tokens of notebook 01's", 10),
    ((500, b"down"), {}, "10 calls in a row failed, the last with: HTTP 500: down", 60)])
def test_ten_failures_in_a_row_stop_the_run(tmp_path, answer, changes, sentence, total):
    server = TeacherServer(lambda nth, body: answer)
    with pytest.raises(UserError, match=sentence):
        request_traces(server, tmp_path / "c", make_samples(30), concurrency=1, **changes)
    assert total <= server.total <= total + 6, "one more call may have begun"


def test_a_refused_request_is_named_and_no_other_is_repeated(tmp_path):
    refusal = (400, {"error": "too many images"})
    first = teacher_prompt(make_samples(1)[0], BOX_FORMAT)
    server = TeacherServer(lambda nth, body: refusal if question_text(body) == first else (
        200, completion(prompt_tokens=None)))
    for total in (3, 4):
        traces = request_traces(server, tmp_path / "c", make_samples(3))
        assert server.total == total and "too many images" in traces[0].error
        assert not traces[1].error and not traces[2].error
    usage = endpoint.summarize_usage(tmp_path / "c")
    assert usage["calls"] == usage["without_counts"] == 2
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (0, 20)


@pytest.mark.parametrize("status", [401, 404, 307])
def test_a_refused_key_stops_the_run_and_is_never_written(tmp_path, status, monkeypatch):
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-very-secret")
    server = TeacherServer(lambda nth, body: (status, {"error": "wrong key sk-very-secret"},
                                      [("Location", "/v2/chat/completions")]))
    with pytest.raises(UserError, match=f"HTTP {status}.*{endpoint.KEY_VARIABLE}") as error:
        request_traces(server, tmp_path / "c", make_samples(30), concurrency=1)
    assert 10 <= server.total <= 11 and "secret" not in str(error.value)
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert b"secret" not in (tmp_path / "c").read_bytes()


def test_the_key_comes_from_its_own_variable_alone_and_is_taken_out_of_replies(
        tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-someone-else")
    monkeypatch.delenv(endpoint.KEY_VARIABLE, raising=False)
    server = TeacherServer(lambda nth, body: (200, completion("you sent sk-very-secret")))
    request_traces(server, tmp_path / "a", make_samples(1))
    assert server.headers[-1]["authorization"] == "Bearer none"
    monkeypatch.setenv(endpoint.KEY_VARIABLE, "sk-very-secret")
    traces = request_traces(server, tmp_path / "b", make_samples(1))
    assert traces[0].text == "you sent ***"
    assert b"secret" not in (tmp_path / "b").read_bytes()


CHILD = """
import pathlib, sys
from mig_kit.boxes import BoxFormat
from mig_kit.data import endpoint
from mig_kit.world.tasks import make_sample
samples = [make_sample("diff", "cot", i) for i in range(20)]
teacher = endpoint.Endpoint(sys.argv[1], "m", concurrency=3)
endpoint.request_traces(samples, teacher, pathlib.Path(sys.argv[2]), BoxFormat())
"""


def test_killed_and_resumed_no_finished_call_is_repeated(tmp_path):
    server = TeacherServer(lambda nth, body: (200, completion(), (), 0, 0.15))
    path = tmp_path / "calls.jsonl"
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(path)])
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 5):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.5)
    done, before = path.read_bytes().count(b"\n"), server.total
    assert 5 <= done < 20 and before - done <= 3  # at most the calls under way
    with path.open("ab") as file:
        file.write(b'{"key": "cut')  # as if the kill had met a write
    samples = [make_sample("diff", "cot", i) for i in range(20)]
    traces = request_traces(server, path, samples, concurrency=3)
    assert server.total == before + 20 - done
    assert not any(trace.error for trace in traces)
    assert path.read_bytes().count(b"\n") == 20 == endpoint.summarize_usage(path)["calls"]


def test_a_broken_log_is_named(tmp_path):
    server = TeacherServer(lambda nth, body: (200, completion()))
    (tmp_path / "c").write_text("{]\n")
    with pytest.raises(UserError, match="line 1 is broken"):
        request_traces(server, tmp_path / "c", make_samples(1))
    assert server.total == 0


def test_what_is_sent(tmp_path):
    server = TeacherServer(lambda nth, body: (200, completion()))
    sample = make_sample("refer_grounding", "cot", 1)
    request_traces(server, tmp_path / "c", [sample], max_tokens=77, concurrency=1)
    (trace,) = server.bodies
    assert trace["model"] == "m" and trace["max_tokens"] == 77
    assert trace["temperature"] == 0
    target = sample.targets[0]
    box = to_model_box(target.box, sample.sizes[target.image - 1], BOX_FORMAT)
    answer = format_answer(target.image, box)
    texts = [part.get("text", "") for part in trace["messages"][0]["content"]]
    assert answer in texts[-1] and "Do not write coordinates" in texts[-1]
    assert texts[0].startswith("Image 1 (")
    images = [part["image_url"]["url"] for part in trace["messages"][0]["content"]
              if part["type"] == "image_url"]
    assert len(images) == len(sample.images)
    assert all(url.startswith("data:image/jpeg;base64,") for url in images)
    choice = next(iter_free_form("cot", 1))
    assert f"answer is {choice.letter}." in teacher_prompt(choice, BOX_FORMAT)


# stock AutoProcessor makes a video processor, too, which needs torchvision
SERVE = """
import sys
from transformers import AutoProcessor
from transformers.cli.serve import Serve
from mig_kit.boxes import BoxFormat
from mig_kit.models.processors import load_processor
AutoProcessor.from_pretrained = lambda model, *_, **__: load_processor(model, BoxFormat())
Serve(sys.argv[1], port=int(sys.argv[2]), host="127.0.0.1", device="cpu", dtype="float32")
"""


@pytest.mark.nightly
def test_a_real_server_with_the_tiny_base(tmp_path):
    """`transformers serve` answers with the shipped base; a second run makes no call."""
    from mig_kit.models import loading

    samples, path = make_samples(3), tmp_path / "calls.jsonl"
    with running_server(sys.executable, "-c", SERVE, loading.TINY_BASE) as url:
        teacher = endpoint.Endpoint(url, str(loading.TINY_BASE), max_tokens=60,
                                    concurrency=2)
        traces = endpoint.request_traces(samples, teacher, path, BOX_FORMAT)
        assert {trace.error for trace in traces} <= {"", "no whole reply (finish_reason length)"}
        assert any(trace.text for trace in traces)
    usage = endpoint.summarize_usage(path)
    assert usage["calls"] == 3 and usage["without_counts"] == 0
    assert usage["prompt_tokens"] > 3 * 50 and 0 < usage["completion_tokens"] <= 3 * 60
    again = endpoint.request_traces(samples, teacher, path, BOX_FORMAT)  # from the log alone
    assert again == traces
