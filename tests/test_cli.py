"""The command line's sentences."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from mig_kit import cli as cli_module
from mig_kit.cli import cli
from mig_kit.common import PROCESS_ENVIRONMENT, PROJECT_ROOT
from mig_kit.pipeline import store
from mig_kit.world.tasks import make_sample


def call(*words, **environment):
    return subprocess.run([sys.executable, "-c", "from mig_kit.cli import main; main()", *words], capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_help():
    result = CliRunner().invoke(cli, ["run", "--help"])
    assert result.exit_code == 0 and "--profile" in result.output
    assert CliRunner().invoke(cli, ["--version"]).output.startswith("mig-kit, version ")


def test_bench_starts_anew_on_the_heap_that_stages_have():
    code = "import os; print(os.environ.get('MALLOC_TOP_PAD_'), flush=True); from mig_kit.cli import main; main()"
    bare = {name: value for name, value in os.environ.items() if name not in PROCESS_ENVIRONMENT}
    result = subprocess.run([sys.executable, "-c", code, "bench", "--repeats", "0"], capture_output=True, text=True, env=bare)
    assert result.stdout.split() == ["None", PROCESS_ENVIRONMENT["MALLOC_TOP_PAD_"]] and result.returncode == 2


@pytest.mark.parametrize("words,sentence", [
    (("run", "05", "-p", "num_generation", "4"), "did you mean 'num_generations'"),
    (("run", "05", "-p", "num_generations", "many"), "must be a int"),
    (("run", "-p", "learning_rat", "1"), "did you mean 'learning_rate'"),
    (("run", "01", "-p", "detail_mix", "[4.0,1.0"), "-p detail_mix '[4.0,1.0' is no value"),
    (("run", "01", "-p", "run_id", "b"), "use --run-id"),
    (("run", "01", "--run-id", "a/b"), "run_id is 'a/b'; use letters"),
    (("run", "01", "-p", "teacher", "endpoint", "-p", "endpoint_url", "http://a:b@c/v1", "-p", "endpoint_model", "m"),
     "endpoint_url must be like"),
    (("run", "99"), "no stage '99'"),
    (("run", "05", "--run-id", "none-such"), "needs 03_merge"),
    (("run", "--profile", "huge"), "the profiles are"),
    (("status", "none-such"), "no run 'none-such'"),
])
def test_bad_input_is_one_sentence(words, sentence, tmp_path):
    result = call(*words, MIG_KIT_RUNS=str(tmp_path))
    assert result.returncode != 0 and sentence in result.stderr and "Traceback" not in result.stderr
    assert not any(tmp_path.rglob("*.ipynb")), "nothing is written before all is checked"


def test_all_stages_are_checked_before_the_first_runs(tmp_path):
    result = call("run", "00", "06", "-p", "eval_seed", "x", MIG_KIT_RUNS=str(tmp_path))
    assert "'eval_seed' is 'x', a str; it must be a int" in result.stderr and not list(tmp_path.iterdir())


def test_a_copied_profile_is_the_one_that_is_looked_at(tmp_path, monkeypatch):
    shutil.copytree(PROJECT_ROOT / "params", tmp_path / "params")
    shutil.copytree(PROJECT_ROOT / "params" / "qwen2_5_vl_7b", tmp_path / "params" / "mine")
    monkeypatch.setattr(store, "PROJECT_ROOT", tmp_path)
    assert cli_module.chosen_params("00_preflight", "mine", "a", {})["profile"] == "mine"
    assert "profile" not in cli_module.chosen_params("05_grpo", "mine", "a", {"learning_rate": "1e-5"})
    assert cli_module.chosen_params("05_grpo", "mine", "a", {"learning_rate": "1e-5"})["learning_rate"] == 1e-5


def test_status_shows_stages_and_scores(tmp_path):
    for stage in ("05_grpo", "06_evaluate"):
        (tmp_path / "one" / stage).mkdir(parents=True)
        (tmp_path / "one" / stage / "run.json").write_text('{"seconds": 90.0}')
    scores = {name: {"mig_bench": {"score": value}} for name, value in (("base", 1.0), ("sft", 40.0), ("grpo", 55.5))}
    (tmp_path / "one" / "06_evaluate" / "metrics.json").write_text(json.dumps({"systems": scores}))
    (tmp_path / "one" / "07_report").mkdir()
    (tmp_path / "one" / "07_report" / "run.json").write_text('{"seconds": 6.0, "inputs": {"04_rejection_sampling": {"a": "b"}}}')
    output = call("status", MIG_KIT_RUNS=str(tmp_path)).stdout
    assert "05_grpo                 done in 1.5 min" in output and "02_sft                  -" in output
    assert "mig_bench               base 1.0, sft 40.0, grpo 55.5" in output
    assert "07_report               done in 0.1 min, before 04_rejection_sampling was run anew" in output
    (tmp_path / "one" / "05_grpo" / "run.json").write_text('{"seconds": 9')
    broken = call("status", MIG_KIT_RUNS=str(tmp_path))
    assert broken.returncode and f"{tmp_path / 'one/05_grpo/run.json'} is broken; delete it" in broken.stderr


def test_an_unreadable_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    result = call("ground", "--model", str(tmp_path), "--image", str(tmp_path / "a.png"), "Where?")
    assert "no readable image" in result.stderr and "Traceback" not in result.stderr


def test_a_model_that_is_nowhere_is_one_sentence(tmp_path):
    make_sample("refer_grounding", "val", 0).images[0].save(tmp_path / "a.png")
    result = call("ground", "--model", "tinny", "--image", str(tmp_path / "a.png"), "Where?", HF_HUB_OFFLINE="1")
    assert "there is no folder tinny" in result.stderr and "Traceback" not in result.stderr and result.returncode


@pytest.mark.slow
def test_ground_answers(tmp_path):
    sample = make_sample("refer_grounding", "val", 0)
    paths = []
    for number, image in enumerate(sample.images):
        image.save(tmp_path / f"{number}.png")
        paths += ["--image", str(tmp_path / f"{number}.png")]
    result = call("ground", "--model", "tiny", *paths, "--out", str(tmp_path / "out.png"), "Find the red star in image 2.")
    assert result.returncode == 0, result.stderr
    assert "reasoning:" in result.stdout and ("picture:" in result.stdout or "the model said" in result.stdout)
