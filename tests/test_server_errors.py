"""What a notebook shows when a server fails, in every stage that asks one: dead, 401 and 404."""

from itertools import product
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.ultratb import AutoFormattedTB
from local_server import IS_JSON, LocalServer

from mig_kit.boxes import BoxFormat
from mig_kit.data import endpoint
from mig_kit.engine import reply_files, systems
from mig_kit.engine.models import load_policy
from mig_kit.stages import grpo
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SMALL = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
         "max_steps": 1, "max_completion_length": 4, "lora_r": 4}


def faulty_server(status: int, lists_models: bool = True) -> LocalServer:
    """Lists the model "sft" and answers requests for replies, or every request, with a status."""
    def respond(path, headers, body):
        if lists_models if body is None else path.endswith("_lora_adapter"):
            return 200, {"data": [{"id": "sft"}]}, IS_JSON
        return status, {"error": {"message": "no"}}, IS_JSON

    return LocalServer(respond)


@pytest.fixture
def serve():
    """Call it for a faulty server."""
    servers = []

    def start(*options):
        servers.append(faulty_server(*options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def show_in_notebook(error: Exception) -> str:
    """What IPython sends to the notebook of an error; "" where it only prints it."""
    shown = []
    shell = SimpleNamespace(
        _get_exc_info=lambda error: error, call_pdb=False, InteractiveTB=AutoFormattedTB(),
        _showtraceback=lambda kind, value, lines: shown.append(f"{kind.__name__}: {value}"))
    InteractiveShell.showtraceback(shell, (type(error), error, error.__traceback__))
    return "".join(shown)


@pytest.fixture
def ask(random_folder, float32, stage_params, tmp_path):
    """Call it with a stage and a server's address for what the stage's notebook shows."""
    questions = [make_sample("diff", "val", i) for i in range(2)]

    def ask_teacher(url):
        teacher = endpoint.Endpoint(url, "m", attempts=1)
        many = [make_sample("diff", "cot", i) for i in range(8)]
        endpoint.request_traces(many, teacher, tmp_path / "calls", BOX_FORMAT)

    def draw_replies(url):
        params = stage_params("04_rejection_sampling", server=url)
        with reply_files.open_policy(random_folder, "sft", float32, BOX_FORMAT, tmp_path,
                                  params) as policy:
            reply_files.sample_replies(policy, questions, tmp_path / "replies.jsonl", replies=2,
                                    temperature=1.0, max_new_tokens=4, seed=0)

    def train(url):
        policy = load_policy(random_folder, float32, BOX_FORMAT)
        params = stage_params("05_grpo", server=url, **SMALL)
        grpo.grpo_trainer(policy, questions, tmp_path, params).train()

    def evaluate(url):
        params = stage_params("06_evaluate", server=url, replies=0)
        systems.suite_replies({"sft": random_folder}, {"a": questions}, {"a": []}, float32,
                              BOX_FORMAT, tmp_path / "replies", params)

    calls = {"01": ask_teacher, "04": draw_replies, "05": train, "06": evaluate}

    def show(stage, url):
        with pytest.raises(RuntimeError) as caught:
            calls[stage](url)
        return show_in_notebook(caught.value)

    return show


SENTENCES = {
    (401,): "answered HTTP 401: no; set the environment variable MIG_KIT_API_KEY",
    (404,): "answered HTTP 404: no; it does not serve ",
    (401, False): "does not list its models: HTTP 401: no; set the environment variable MIG_KIT_",
    (404, False): "does not list its models: HTTP 404: no; end its address in /v1",
    (): "models: the connection failed (ConnectError); start it first, or take it out of server"}


@pytest.mark.parametrize(("stage", "fault"), [
    *product(("04", "06"), SENTENCES), ("05", (401,)), ("05", ())])
def test_a_notebook_shows_what_a_server_did(ask, serve, stage, fault):
    url = serve(*fault).url if fault else "http://127.0.0.1:9/v1"
    shown = ask(stage, url)
    assert shown.startswith(f"RuntimeError: the server {url} ") and SENTENCES[fault] in shown


@pytest.mark.parametrize(("fault", "sentence"), [
    ((401,), "the endpoint answered HTTP 401: "), ((404,), "the endpoint answered HTTP 404: "),
    ((), "10 calls in a row failed, the last with: the connection failed (ConnectError); ")])
def test_a_notebook_shows_what_the_teachers_endpoint_did(ask, serve, fault, sentence):
    shown = ask("01", serve(*fault).url if fault else "http://127.0.0.1:9/v1")
    assert shown.startswith(f"RuntimeError: {sentence}"), shown
    assert not fault or "check endpoint_url, endpoint_model and the environment var" in shown
