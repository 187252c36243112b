"""The teacher's endpoint against a server that misbehaves: how often it is called is counted, to the call."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mig_kit import filters
from mig_kit.boxes import BoxFormat, rescale_box, to_model_box
from mig_kit.data import endpoint
from mig_kit.prompts import format_answer
from mig_kit.sample import Trace
from mig_kit.world.suites import make_free_form
from mig_kit.world.tasks import TASKS, make_sample

VIEW = BoxFormat()
SAMPLE = make_sample("diff", "cot", 1)


def completion(reply="<think>so</think><answer>x</answer>", **usage):
    return {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, **usage}}


class Server:
    """An OpenAI-compatible server. plan(nth request with these words, body) says what to do: see Handler.do_POST."""

    def __init__(self, plan):
        self.plan, self.lock = plan, threading.Lock()
        self.times, self.counts, self.headers, self.bodies = [], {}, [], []
        self.now = self.most = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                words = body["messages"][0]["content"][-1]["text"]
                with outer.lock:
                    nth = outer.counts[words] = outer.counts.get(words, 0) + 1
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.times.append(time.monotonic())
                    outer.headers.append(dict(self.headers))
                    outer.bodies.append(body)
                try:
                    self.answer(*outer.plan(nth, body))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer.lock:
                        outer.now -= 1

            def answer(self, status, data, headers=(), cut=0, wait=0.0):
                time.sleep(wait)
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) - cut])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def total(self):
        return len(self.times)


@pytest.fixture
def serve():
    servers = []

    def start(plan):
        servers.append(Server(plan))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def some(n=3):
    tasks = list(TASKS)
    return [make_sample(tasks[i % len(tasks)], "cot", i) for i in range(n)]


def settings_of(server, **keys):
    return endpoint.Endpoint(**{"url": server.url, "model": "m", "first_wait": 0.01, "longest_wait": 0.05, "timeout": 20.0, **keys})


def ask(server, path, samples, **keys):
    return asyncio.run(endpoint.request_traces(samples, settings_of(server, **keys), path))


def test_replies_come_in_order_and_nothing_is_asked_twice(serve, tmp_path):
    server = serve(lambda nth, body: (200, completion(body["messages"][0]["content"][-1]["text"])))
    path, samples = tmp_path / "calls.jsonl", some(6)
    for _ in range(2):
        traces, direct = ask(server, path, iter([*samples, samples[0]]))
        assert [t.text for t in traces] == [endpoint.teacher_prompt(s, "trace", VIEW) for s in [*samples, samples[0]]]
        assert direct == [endpoint.teacher_prompt(s, "direct", VIEW) for s in [*samples, samples[0]]]
        assert server.total == 12  # once each, the sample that is there twice and the second run included
    assert endpoint.summarize_usage(path, price_in=2.0, price_out=30.0) == {
        "calls": 12, "failed": 0, "attempts": 12, "prompt_tokens": 1200, "completion_tokens": 120, "without_counts": 0,
        "cost": 0.006}
    ask(server, path, samples, model="other")
    assert server.total == 24  # another model's replies are other replies


@pytest.mark.parametrize("first", [
    (500, {"error": "x"}), (503, b""), (429, {"error": "slow"}, [("Retry-After", "0")]), (408, b""),
    (200, json.dumps(completion()).encode()[:40]), (200, completion(), (), 30), (200, completion(), (), 0, 5.0), (200, b""),
    (200, []), (200, {"choices": {}}), (200, {"choices": []}), (200, {"choices": [{"message": {"content": None}}]}),
    (200, {"choices": [{"message": {"content": 5}}]}), (200, {"choices": [{"message": "x"}]}), (200, {"choices": [None]}),
    (200, b"[" * 100_000), (200, b"\xff"), (200, b"x" * ((8 << 20) + 1)),
    (200, {"choices": [{"message": {"content": "x"}, "finish_reason": 1}]}),
    (502, b"<html>", [("Content-Encoding", "gzip")]),
], ids=[str(i) for i in range(20)])
def test_what_passes_is_tried_once_more(serve, tmp_path, first):
    server = serve(lambda nth, body: first if nth == 1 else (200, completion()))
    path = tmp_path / "calls.jsonl"
    traces, direct = ask(server, path, some(1), timeout=2.0 if first[-1] == 5.0 else 60.0)
    assert server.total == 4 and not traces[0].error and direct[0]
    assert [json.loads(line)["attempts"] for line in path.read_text().splitlines()] == [2, 2]


def test_a_cut_connection_is_tried_once_more(serve, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    port, seen = listener.getsockname()[1], []

    def drop():
        for _ in range(3):
            connection, _ = listener.accept()
            seen.append(1)
            connection.close()

    threading.Thread(target=drop, daemon=True).start()
    keys = {"url": f"http://127.0.0.1:{port}/v1", "model": "m", "first_wait": 0.01, "attempts": 3, "concurrency": 1}
    call = endpoint.make_call(some(1)[0], "trace", endpoint.Endpoint(**keys), VIEW)
    assert asyncio.run(endpoint.ask_all(endpoint.Endpoint(**keys), [call], tmp_path / "calls.jsonl")) == {} and len(seen) == 3
    listener.close()


def test_no_token_counts_are_no_tokens(serve, tmp_path):
    plans = iter([{"prompt_tokens": None}, {"prompt_tokens": "7"}, {"prompt_tokens": -7}, {"prompt_tokens": True}])
    server = serve(lambda nth, body: (200, completion(**next(plans))))
    ask(server, tmp_path / "c", some(2), concurrency=1)
    found = endpoint.summarize_usage(tmp_path / "c", 1.0, 1.0)
    assert server.total == 4 and found["without_counts"] == 4 and found["prompt_tokens"] == 0 and found["completion_tokens"] == 40


def test_retry_after_holds_all_workers(serve, tmp_path):
    server = serve(lambda nth, body: (429, b"", [("Retry-After", "1")]) if server.total == 1 else (200, completion()))
    ask(server, tmp_path / "c", some(3), concurrency=1)
    assert server.total == 7 and server.times[1] - server.times[0] >= 1.0
    assert server.times[-1] - server.times[1] < 5.0


@pytest.mark.parametrize("value,low,high", [
    ("0", 0, 0), (" 12 ", 12, 12), ("1.5", 1.5, 1.5), (600, 400, 600), (-600, 0, 0)])
def test_retry_after_in_seconds_or_as_a_date(value, low, high):
    value = formatdate(time.time() + value, usegmt=True) if isinstance(value, int) else value
    assert low <= endpoint.retry_after(value) <= high
    assert endpoint.retry_after("\x1f0") is None and endpoint.retry_after("soon") is None


def test_a_wait_of_hours_stops_the_run(serve, tmp_path):
    server = serve(lambda nth, body: (429, b"", [("Retry-After", "7200")]))
    with pytest.raises(RuntimeError, match="asks to wait 7200 s"):
        ask(server, tmp_path / "c", some(3), concurrency=1)
    assert server.total == 1


def test_giving_up_is_counted_and_asked_again_next_time(serve, tmp_path):
    broken = [True]
    server = serve(lambda nth, body: (500, b"") if broken[0] else (200, completion()))
    traces, direct = ask(server, tmp_path / "c", some(2), attempts=3)
    assert server.total == 12 and direct == ["", ""] and all(t.error for t in traces)
    assert filters.drop_reason_of_model_teacher(traces[0], direct[0], some(1)[0]) == "no reply" and endpoint.summarize_usage(tmp_path / "c")["calls"] == 0
    broken[0] = False
    traces, _ = ask(server, tmp_path / "c", some(2), attempts=3)
    assert server.total == 16 and not any(t.error for t in traces)


def test_a_refused_request_is_not_repeated(serve, tmp_path):
    server = serve(lambda nth, body: (400, {"error": "too many images"}) if "check" in str(body) else (200, completion()))
    for _ in range(2):
        traces, direct = ask(server, tmp_path / "c", some(2))
        assert server.total == 4 and all("too many images" in t.error for t in traces) and all(direct)
    assert endpoint.summarize_usage(tmp_path / "c")["failed"] == 2


def test_refusals_by_a_server_that_refuses_everything_are_not_kept(serve, tmp_path):
    wrong = [True]
    server = serve(lambda nth, body: (400, {"error": "unknown field"}) if wrong[0] else (200, completion()))
    with pytest.raises(RuntimeError, match="10 calls in a row failed.*unknown field"):
        ask(server, tmp_path / "c", some(30), concurrency=1)
    assert server.total == 10 and endpoint.summarize_usage(tmp_path / "c")["calls"] == 0
    wrong[0] = False
    assert not any(t.error for t in ask(server, tmp_path / "c", some(6))[0]) and server.total == 22


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 307])
def test_a_refused_key_stops_the_run_and_is_never_written(serve, tmp_path, status, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, "sk-very-secret")
    server = serve(lambda nth, body: (status, {"error": "wrong key sk-very-secret"}))
    with pytest.raises(RuntimeError, match=endpoint.KEY) as error:
        ask(server, tmp_path / "c", some(3), concurrency=1)
    assert server.total == 1 and "secret" not in str(error.value) and server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert b"secret" not in (tmp_path / "c").read_bytes()


def test_the_key_is_taken_out_of_replies(serve, tmp_path, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, "sk-very-secret")
    server = serve(lambda nth, body: (200, completion("you sent sk-very-secret")) if nth else None)
    traces, _ = ask(server, tmp_path / "c", some(1))
    assert traces[0].text == "you sent ***" and b"secret" not in (tmp_path / "c").read_bytes()
    monkeypatch.setenv(endpoint.KEY, "sk-\nX: y")
    with pytest.raises(ValueError, match="no key has"):
        ask(server, tmp_path / "c", some(1))
    monkeypatch.delenv(endpoint.KEY)
    ask(server, tmp_path / "d", some(1))
    assert "Authorization" not in server.headers[-1]


def test_ten_failures_in_a_row_stop_the_run(serve, tmp_path):
    server = serve(lambda nth, body: (500, b"down"))
    with pytest.raises(RuntimeError, match="10 calls in a row failed, the last with: HTTP 500: 'down'"):
        ask(server, tmp_path / "c", some(30), attempts=2, concurrency=1)
    assert server.total == 20


def test_concurrency_and_lazy_reading(serve, tmp_path):
    drawn = []

    def stream():
        for sample in some(12):
            drawn.append(sample.id)
            yield sample

    ahead = []
    server = serve(lambda nth, body: (ahead.append(2 * len(drawn) - server.total), time.sleep(0.03), (200, completion()))[2])
    ask(server, tmp_path / "c", stream(), concurrency=3)
    assert server.most == 3 and server.total == 24 and max(ahead) <= 2 * 3 + 2


def test_rate_limit(serve, tmp_path):
    server = serve(lambda nth, body: (200, completion()))
    ask(server, tmp_path / "c", some(3), requests_per_minute=600, concurrency=4)
    assert server.total == 6 and server.times[-1] - server.times[0] >= 0.45


CHILD = """
import asyncio, sys
from mig_kit import endpoint
from mig_kit.tasks import make
samples = [make("diff", "cot", i) for i in range(10)]
asyncio.run(endpoint.traces(samples, endpoint.Endpoint(sys.argv[1], "m", concurrency=3), __import__("pathlib").Path(sys.argv[2])))
"""


def test_killed_and_resumed_no_finished_call_is_repeated(serve, tmp_path):
    server = serve(lambda nth, body: (200, completion(), (), 0, 0.15))
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
    samples = [make_sample("diff", "cot", i) for i in range(10)]
    traces, direct = ask(server, path, samples, concurrency=3)
    assert server.total == before + 20 - done and all(direct) and not any(t.error for t in traces)
    assert path.read_bytes().count(b"\n") == 20 == endpoint.summarize_usage(path)["calls"]


def test_a_broken_log_and_a_log_in_use(serve, tmp_path):
    server = serve(lambda nth, body: (200, completion(), (), 0, 0.3))
    path = tmp_path / "c"
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1 is broken"):
        ask(server, path, some(1))
    path.unlink()
    thread = threading.Thread(target=ask, args=(server, path, some(1)))
    thread.start()
    while not server.total:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="in use by another run"):
        ask(server, path, some(1))
    thread.join()
    assert server.total == 2


@pytest.mark.parametrize("keys", [{"url": ""}, {"url": "localhost:8000"}, {"url": "ftp://a/v1"}, {"url": "http://name:key@a/v1"},
                                  {"url": "http://a/v1?key=x"}, {"model": ""}, {"url": "http://a:b/v1"}, {"concurrency": 0}])
def test_settings_that_cannot_be(keys):
    with pytest.raises(ValueError, match="endpoint_url|at least 1"):
        endpoint.Endpoint(**{"url": "http://a/v1", "model": "m", **keys})


def test_what_is_sent(serve, tmp_path):
    server = serve(lambda nth, body: (200, completion()))
    sample = make_sample("refer_grounding", "cot", 1)
    ask(server, tmp_path / "c", [sample], max_tokens=77, token_field="max_completion_tokens", concurrency=1)
    trace, direct = server.bodies
    assert trace["model"] == "m" and trace["max_completion_tokens"] == 77 and "max_tokens" not in trace
    number, box = sample.targets[0]
    answer = format_answer(number, to_model_box(box, sample.sizes[number - 1], box_format=BoxFormat()))
    said = [[part.get("text", "") for part in body["messages"][0]["content"]] for body in (trace, direct)]
    assert answer in said[0][-1] and answer not in "".join(said[1]) and "Do not write coordinates" in said[0][-1]
    assert "<think>" not in said[1][-1] and said[0][0].startswith("Image 1 (")
    pictures = [p for p in trace["messages"][0]["content"] if p["type"] == "image_url"]
    assert len(pictures) == len(sample.images)
    assert all(p["image_url"]["url"].startswith("data:image/jpeg;base64,") for p in pictures)
    assert len({re.sub("Question.*", "", endpoint.teacher_prompt(make_sample(t, "cot", 0), "trace", VIEW), flags=re.S) for t in TASKS}) == 4
    choice = make_free_form("cot", 1)[0]
    assert f"answer is {choice.letter}." in endpoint.teacher_prompt(choice, "trace", VIEW)
    assert endpoint.teacher_prompt(choice, "direct", VIEW).endswith(endpoint.DIRECT_CHOICE)
    with pytest.raises(ValueError, match="has no target"):
        ask(server, tmp_path / "c", [endpoint.Sample("x", "", "", "", sample.images, "q")])


@pytest.mark.parametrize("thinking,expected", [
    ("The answer is in image 2. It is the only star.", True), ("The target is located in the second image.", True),
    ("Therefore it is the star.", True), ("The box is at (10,20).", True), ("The final answer is the star.", True),
    ("Image 1 shows a star, image 2 a ring. The target is in image 2.", False),
    ("Compare the images. The answer is in image 2.", False),
    ("To find the target, look at image 1 first.", False), ("", False)])
def test_conclusions_up_front(thinking, expected):
    assert filters.concludes_up_front(thinking) == expected


def test_given_answers_in_any_frame_are_revealed():
    sample = make_sample("diff", "cot", 4)
    number, box = sample.targets[0]
    size = sample.sizes[number - 1]
    x1, y1, x2, y2 = (round(v) for v in box)
    for text in (f"({x1},{y1}),({x2},{y2})", f"x1={x1}, y1={y1}, x2={x2}, y2={y2}", f"[{x1}.0, {y1}.0, {x2}.0, {y2}.0]",
                 "<box>{:.0f} {:.0f} {:.0f} {:.0f}</box>".format(*rescale_box(box, size, (1000, 1000))),
                 "{:.3f}, {:.3f}, {:.3f}, {:.3f}".format(*rescale_box(box, size, (1, 1))), "as in the ground truth",
                 "the provided answer", "The verified answer fits"):
        assert filters.reveals_answer(f"I see it at {text} there.", sample, box_format=BoxFormat()), text
    for text in ("image 1, 2, 3 and 4 things", "[900, 900, 950, 950]", "a star at the top", "the answer must be round"):
        assert not filters.reveals_answer(text, sample, box_format=BoxFormat()), text


@pytest.mark.parametrize("direct,reasoned,expected", [(0.5, 0.6, True), (0.5, 0.59, False), (0.95, 1.0, False), (0.49, 0.5, True),
                                                      (0.0, 0.2, True), (0.0, 0.19, False), (0.3, 0.5, True), (0.6, 0.4, False)])
def test_gain(direct, reasoned, expected):
    assert filters.reasoning_helps(direct, reasoned) == expected


def test_each_verdict_of_a_real_teachers_trace():
    sample = make_sample("diff", "cot", 1)
    number, box = sample.targets[0]
    seen = to_model_box(box, sample.sizes[number - 1], box_format=BoxFormat())
    answer = f"<answer>{format_answer(number, seen)}</answer>"

    def judged(thinking="Both show a ring.", direct="<answer>no</answer>", end=answer, error=""):
        return filters.drop_reason_of_model_teacher(Trace(f"<think>{thinking}</think>{end}", "endpoint", error), direct, sample)

    assert judged() == "" and judged(end="") == "format" and judged(error="x") == "no reply" and judged(direct="") == "no reply"
    assert judged(direct=answer) == "no gain" and judged("The answer is in image 2.") == "up front"
    assert judged("As the ground truth says.") == "reveals"
    assert judged(end=answer.replace(f": {number},", f": {3 - number},")) == "image"
    choice = make_free_form("cot", 1)[0]
    trace = Trace(f"<think>It shows one.</think><answer>{choice.letter}</answer>", "endpoint", "")
    assert filters.drop_reason_of_model_teacher(trace, "", choice) == ""


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(
                          st.sampled_from(["choices", "message", "content", "usage", "finish_reason", "prompt_tokens"]), v,
                          max_size=4), max_leaves=12)


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode())
       | values.map(lambda v: json.dumps({"choices": [{"message": {"content": v}}], "usage": v}).encode()), st.text(max_size=40))
def test_any_answer_is_a_completion_or_none(data, text):
    entry = endpoint.parse_completion(data)
    assert entry is None or isinstance(entry["reply"], str) and all(
        entry[k] is None or entry[k] >= 0 for k in ("prompt_tokens", "completion_tokens"))
    wait = endpoint.retry_after(text)
    assert wait is None or wait >= 0
    filters.concludes_up_front(text)
    filters.reveals_answer(text, SAMPLE, box_format=BoxFormat())


# `transformers serve` as it is installed, but for the processor: transformers' own needs torchvision, the kit's does not.
REAL_SERVER = """
import sys
from transformers.cli.serving.model_manager import ModelManager
from mig_kit import models
ModelManager._load_processor = lambda self, name, gguf_file=None: models.load_processor(name.split("@")[0])
from transformers.cli.transformers import main
sys.argv = ["transformers", "serve", sys.argv[1], "--port", sys.argv[2], "--host", "127.0.0.1", "--device", "cpu"]
main()
"""


@pytest.mark.slow
def test_a_real_server_with_the_tiny_base(tmp_path):
    """`transformers serve` answers with the shipped base; its replies, token counts and a second run without a call."""
    from mig_kit.engine import models

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path / "server.log").open("w+")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", REAL_SERVER, str(models.TINY_BASE), str(port)], stdout=log, stderr=log,
                             env=environment)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and child.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            log.seek(0)
            pytest.skip(f"transformers serve does not start here: {log.read()[-600:]}")
        samples, path = some(3), tmp_path / "calls.jsonl"
        where = endpoint.Endpoint(f"http://127.0.0.1:{port}/v1", str(models.TINY_BASE), max_tokens=60, concurrency=2)
        traces, direct = asyncio.run(endpoint.request_traces(samples, where, path))
        assert not any(t.error for t in traces) and any(t.text for t in traces) and any(direct)
        taken = endpoint.summarize_usage(path)
        assert taken["calls"] == taken["attempts"] == 6 and taken["without_counts"] == 0
        assert taken["prompt_tokens"] > 6 * 50 and 0 < taken["completion_tokens"] <= 6 * 60
        for trace, other, sample in zip(traces, direct, samples):
            assert filters.drop_reason_of_model_teacher(trace, other, sample) in {"", *endpoint_reasons()}
    finally:
        child.terminate()
        child.wait(20)
    assert asyncio.run(endpoint.request_traces(samples, where, path))[0] == traces  # the server is gone: all of it is in the log


def endpoint_reasons():
    from mig_kit import filters

    return {*filters.DROP_REASONS, "no reply", "up front", "reveals", "no gain"}
