"""Servers that draw replies: a double over the kit's own loop, and transformers' own server."""

import base64
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from local_server import IS_JSON, LocalServer
from PIL import Image
from rollout_server import RolloutServer

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.serving import reply_files, stored_replies
from mig_kit.serving.server import ServedModel, check_prompt_ids
from mig_kit.serving.server_process import _load_generation_config, serve_model
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
LISTS_NOTHING = """
import http.server as h, sys
class Handler(h.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/health' else 500)
        self.end_headers()
h.HTTPServer(('127.0.0.1', int(sys.argv[2])), Handler).serve_forever()
"""
DRAW = {"replies": 1, "temperature": 0.0, "max_new_tokens": 8, "seed": 0}


@pytest.fixture
def questions():
    return [make_sample(task, "val", 5) for task in list(TASKS)[:4]]


@pytest.fixture
def start_server(random_folder, float32):
    """Call it for a double of a server that holds the random model."""
    servers = []

    def start(**options):
        policy = loading.load_policy(random_folder, float32, BOX_FORMAT)
        servers.append(RolloutServer(policy, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def draw(random_folder, float32, tmp_path, questions):
    """Call it with a server, "" for the local loop, for the replies that it draws."""
    def draw_replies(server, questions=questions, folder=tmp_path, model=random_folder, **changes):
        params = SimpleNamespace(server=server, concurrency=3)
        with reply_files.open_policy(model, "sft", float32, BOX_FORMAT, folder, params) as policy:
            return reply_files.sample_replies(policy, questions, folder / "replies.jsonl",
                                              **(DRAW | changes))

    return draw_replies


def test_no_proxy_stands_before_this_machines_own_servers(start_server, draw, questions,
                                                          monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert len(draw(start_server().url, questions[:1])) == 1


def test_images_arrive_as_the_model_sees_them(processor):
    sample = make_sample("diff", "val", 0)
    served = ServedModel("m", [], 1, processor, BoxFormat(max_pixels=28 * 28 * 6), [2])
    parts = [part for part in served.messages(sample)[0]["content"] if "image_url" in part]
    for part, image in zip(parts, sample.images, strict=True):
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        seen = Image.open(io.BytesIO(data))
        assert seen.size != image.size and seen.size[0] * seen.size[1] <= 28 * 28 * 6
        assert seen.size[0] % 28 == seen.size[1] % 28 == 0


def test_served_replies_equal_the_local_loops(start_server, draw, questions, tmp_path):
    server = start_server()
    served = draw(server.url)
    assert served == draw("", folder=tmp_path / "local")
    assert stored_replies.load_replies(tmp_path / "replies.jsonl") == served
    expected = {"temperature": 0.0, "max_tokens": 8, "n": 1, "return_token_ids": True}
    assert expected.items() <= server.bodies[0].items()
    draw(server.url)
    assert len(server.bodies) == len(questions), "what is stored was drawn again"


def test_a_server_that_dies_is_left_out_and_loses_nothing(start_server, draw, questions, tmp_path,
                                                          capsys):
    dying = start_server()

    def die(body, answer):
        dying.http.shutdown()
        dying.http.socket.close()

    def die_later(body, answer):
        return answer if len(dying.bodies) < 2 else die(body, answer)

    dying.change = die_later
    with pytest.raises(RuntimeError, match="no server is left; what is finished is kept"):
        draw(dying.url)
    kept = stored_replies.load_replies(tmp_path / "replies.jsonl")
    assert len(kept) == 1
    dying, healthy = start_server(), start_server()
    dying.change = die
    replies = draw(f"{dying.url} {healthy.url}")
    assert kept.items() <= replies.items() and len(replies) == len(questions)
    assert f"{dying.url} is left out" in capsys.readouterr().out
    assert len(healthy.bodies) == len(questions) - 1


def test_several_servers_share_the_work(start_server, draw):
    questions = [make_sample("diff", "val", i) for i in range(8)]
    servers = [start_server(), start_server()]
    urls = " ".join(server.url for server in servers)
    assert len(draw(urls, questions)) == 8
    counts = [len(server.bodies) for server in servers]
    assert sum(counts) == 8 and min(counts) >= 2


def test_a_server_that_is_dead_when_a_model_is_opened_is_left_out(
        start_server, draw, questions, tmp_path, random_folder, capsys):
    """As in 06 after a server has died under the system before."""
    dead, healthy = start_server(), start_server()
    dead.stop()
    draw(f"{dead.url},{healthy.url}")
    assert len(healthy.bodies) == len(questions)
    output = capsys.readouterr().out
    sentence = f"the server {dead.url} does not list its models: the connection failed"
    assert output.count(sentence) == 1 and "left out" in output
    with pytest.raises(RuntimeError, match="; start it first, or take it out of server"):
        draw(dead.url)
    servers_own = f"{sys.executable} -c \"{LISTS_NOTHING}\" {{model}} {{port}}"
    with serve_model(servers_own, 1, random_folder, "sft", BOX_FORMAT, tmp_path / "log") as served:
        assert served.name == str(random_folder) and len(served.servers) == 1


def test_a_server_without_n_is_asked_once_per_reply(start_server, draw, questions):
    server = start_server(change=lambda body, answer: {
        **answer, "choices": answer["choices"][:1]})
    replies = draw(server.url, questions[:2], replies=3)
    assert {len(drawn) for drawn in replies.values()} == {3} and len(server.bodies) == 6


def test_other_prompt_ids_and_models_are_refused(start_server, draw):
    server = start_server(change=lambda body, answer: {
        **answer, "prompt_token_ids": answer["prompt_token_ids"][1:]})
    with pytest.raises(RuntimeError, match="other prompt ids.*--mm-processor-kwargs"):
        draw(server.url)
    with pytest.raises(RuntimeError, match="its chat template or tokenizer differs"):
        check_prompt_ids({"prompt_token_ids": [1, 2]}, [1, 3], "a", "http://a/v1")
    check_prompt_ids({"usage": {"prompt_tokens": 2}}, [1, 3], "a", "http://a/v1")
    with pytest.raises(RuntimeError, match="no server serves the model .* but only other"):
        draw(start_server(name="other").url)


@pytest.mark.parametrize(("status", "lists_models", "sentence"), [
    (401, True, "answered HTTP 401: no; set the environment variable MIG_KIT_API_KEY"),
    (404, True, "answered HTTP 404: no; it does not serve 'sft'"),
    (401, False, "does not list its models: HTTP 401: no; set the environment variable MIG_KIT_"),
    (404, False, "does not list its models: HTTP 404: no; end its address in /v1")])
def test_a_refusal_says_what_helps(draw, questions, status, lists_models, sentence):
    def respond(path, headers, body):
        if body is None and lists_models:
            return 200, {"data": [{"id": "sft"}]}, IS_JSON
        return status, {"error": {"message": "no"}}, IS_JSON

    server = LocalServer(respond)
    with pytest.raises(RuntimeError) as error:
        draw(server.url, questions[:1])
    server.stop()
    assert str(error.value).startswith(f"the server {server.url} {sentence}")


def test_a_command_that_ends_is_quoted(random_folder, tmp_path):
    command = f"{sys.executable} -c \"print('no such flag'); exit(3)\" {{model}} {{port}}"
    with pytest.raises(RuntimeError, match="status 3; .*server.log:\nno such flag"):
        with serve_model(command, 1, random_folder, "sft", BOX_FORMAT, tmp_path / "server.log"):
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_its_stage_however_that_ends(tmp_path, number):
    mark = f"served-{os.getpid()}"
    serve = tmp_path / "serve.sh"
    serve.write_text("trap '' TERM\n"  # a server that hangs in its shutdown
                     f"python3 -c 'import time; time.sleep(300)' {mark} & sleep 300\n")
    script = (f"import time; from pathlib import Path; "
              f"from mig_kit.serving.server_process import ServerProcess; "
              f"ServerProcess('bash {serve} {{model}} {{port}}', 'm', Path('{tmp_path}/log')); "
              "print('started', flush=True); time.sleep(300)")
    stage = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                             start_new_session=True)
    stage.stdout.readline()
    deadline = time.monotonic() + 60
    while not (running := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running
    os.killpg(stage.pid, number)
    stage.wait()
    while processes_with(mark) and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert not processes_with(mark)


def processes_with(mark):
    """Living processes that have `mark` among their arguments."""
    return [process for process in psutil.process_iter(["cmdline", "status"])
            if mark in (process.info["cmdline"] or ())
            and process.info["status"] != psutil.STATUS_ZOMBIE]


@pytest.mark.nightly
def test_transformers_own_server(draw, tmp_path):
    server = Path(__file__).parents[1] / "transformers_server.py"
    command = f"{sys.executable} {server} {{model}} {{port}}"
    options = {"model": loading.TINY_BASE, "max_new_tokens": 32}
    served, local = draw(command, **options), draw("", folder=tmp_path / "local", **options)
    assert sum(served[name] == local[name] for name in local) >= len(local) - 1


def test_a_model_without_a_generation_config_ends_as_its_config_says(random_folder, tmp_path):
    bare = shutil.copytree(random_folder, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    with_file, without = map(_load_generation_config, (random_folder, bare))
    assert without.eos_token_id == with_file.eos_token_id
