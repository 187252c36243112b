"""Names of runs: a misspelt one gets the nearest name from every command, a bad one is refused."""

import pytest
from command_line import error_of

from mig_kit.common import UserError
from mig_kit.models import loading
from mig_kit.pipeline import run_facts, run_folders
from mig_kit.world.tasks import make_sample


@pytest.fixture
def root(root, monkeypatch):
    """A folder of runs with an empty run "default"; no model is looked for on the hub."""
    monkeypatch.setattr(loading, "resolve_model", lambda name: pytest.fail(f"asks for {name}"))
    (root / "default").mkdir()
    return root


NEAREST = "no run 'defualt' in {}; did you mean 'default'?"


@pytest.mark.parametrize(("words", "sentence"), [
    *((words, NEAREST) for words in (
        ("status", "defualt"), ("table", "defualt"), ("table", "--group", "a=default,defualt"),
        ("run", "05", "--from", "defualt", "--run-id", "b"))),
    (("run", "05", "--run-id", "defualt"),
     "05_grpo needs 01_synthesize of run 'defualt', and there is no such run in {}; did you mean "
     "'default'? (to make it: mig-kit run 0"),
    (("status", "x"), "no run 'x' in {}; mig-kit status lists the runs")])
def test_a_misspelt_run_gets_the_nearest_name(root, words, sentence):
    assert error_of(*words).startswith(sentence.format(root))
    assert [path.name for path in root.rglob("*")] == ["default"]


@pytest.mark.parametrize(("text", "hint"), [
    ("defualt", "did you mean 'default'?"), ("tinny", "did you mean 'tiny'?"),
    ("deflt/sft", "did you mean 'default'?"), ("xyz", "a model of the hub is USER/NAME")])
def test_a_model_of_no_run_is_refused_without_asking_the_hub(root, text, hint):
    image = root / "default" / "a.png"
    make_sample("refer_grounding", "val", 0).images[0].save(image)
    ground = ("ground", "--image", str(image), "Where?")
    for words in (ground, ("eval", "--out", str(root / "out"))):
        sentence = error_of(*words, "--model", text)
        assert sentence == f"there is no run and no folder '{text}'; {hint}"
    assert not (root / "out").exists()


def test_hub_names_and_folders_are_no_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root / "default")
    (root / "default" / "defualt").mkdir()
    for text in ("Qwen/Qwen2.5-VL-3B-Instruct", "tiny", "defualt", "./a/b", str(tmp_path)):
        assert run_facts.find_run_model(text) is None


@pytest.mark.parametrize(("run_id", "is_good"), [
    *((name, True) for name in ("a", "a-b_c", "v1.2", "größe", "-a")),
    *((name, False) for name in ("", "my run", "a/b", "..", ".a", "a.", "a\\b", "a\n", "a;b"))])
def test_names_of_runs(run_id, is_good):
    if is_good:
        assert run_folders.validate_run_id(run_id) == run_id
        return
    with pytest.raises(UserError, match="use letters, digits, '-', '_' and, inside, '.'"):
        run_folders.validate_run_id(run_id)
