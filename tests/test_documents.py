"""README and guide: commands, blocks, figures and links."""

import doctest
import json
import re
import shlex
import shutil
import subprocess
import tomllib
import warnings
from functools import partial
from pathlib import Path

import click
import pytest
import yaml
from benchmark_files import write_benchmarks
from command_line import run_mig_kit
from safetensors import safe_open
from trl import GRPOConfig

from mig_kit import __version__, prompts, stats
from mig_kit.commands.main import cli, stage_name
from mig_kit.common import NOTEBOOKS, PACKAGE, PROJECT_ROOT, model_folder
from mig_kit.pipeline.plan import parse_overrides
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.shared_prefix import logprobs
from mig_kit.stages import sft
from mig_kit.training import reward_loading

GUIDE = PROJECT_ROOT / "notebooks" / "guide"
PAGES = [PROJECT_ROOT / "README.md", PROJECT_ROOT / "notebooks" / "README.md",
         PROJECT_ROOT / ".github" / "CONTRIBUTING.md", *sorted(GUIDE.glob("*.md"))]
TEXTS = {page.relative_to(PROJECT_ROOT).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
# a synopsis, words left out, or what a shell function puts together
NO_COMMAND = re.compile(r"BENCHMARK|\.\.\. |\$[(a-z]")
WITHIN_TEXT = re.compile(r"`(mig-kit [^`|]* -[^`|]*)`")  # commands with an option
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
PAPER = "Improving the Reasoning of Multi-Image Grounding in MLLMs via Reinforcement Learning"


def read_blocks(text: str, language: str = "") -> list[str]:
    return [block for _, found_language, block in BLOCK.findall(text) if found_language == language]


def read_commands(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined."""
    lines = "".join(read_blocks(text)).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if not NO_COMMAND.search(line)]


COMMANDS = [(page, command) for page, text in TEXTS.items()
            for command in [*read_commands(text), *WITHIN_TEXT.findall(text)]
            if command.startswith("mig-kit ")]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_of_the_command_line(page, command, monkeypatch):
    monkeypatch.setattr(click.Path, "convert", lambda self, value, *_: value)  # no file is there
    group, words, context = cli, shlex.split(command, comments=True)[1:], click.Context(cli)
    while isinstance(group, click.Group):
        name, group, words = group.resolve_command(context, words)
        context = click.Context(group, parent=context, info_name=name)
    group.parse_args(context, words)
    if group.name == "run":
        stages = [stage_name(word) for word in context.params["stages"]] or list(RECIPE)
        parse_overrides(context.params["overrides"], stages)


def test_commands_were_found():
    assert len(COMMANDS) > 30 and len(read_commands(README)) > 9


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


LINKING = [*PAGES, PROJECT_ROOT / "tests" / "README.md", *NOTEBOOKS.glob("*.ipynb"),
           *NOTEBOOKS.glob("executed/*.ipynb")]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text()):
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path}#{anchor}"


@pytest.mark.parametrize("module", [prompts, stats, logprobs, sft, reward_loading])
def test_examples_in_docstrings_hold(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_what_the_pieces_of_05b_are_worth_is_recorded():
    page = json.loads((NOTEBOOKS / "05b_grpo_by_hand.ipynb").read_text())
    text = "".join("".join(cell["source"]) for cell in page["cells"]).replace("\n", " ")
    for runs in json.loads((GUIDE / "pieces.json").read_text())["correct"].values():
        shares = [row["after"].count("1") / len(row["after"]) for row in runs]
        assert ", ".join(f"{100 * share:.0f}" for share in shares) + " %" in text


def test_readme_and_guide_are_short():
    written = re.sub("<!-- executed.*?<!-- end -->", "", README, flags=re.DOTALL)
    assert len(written.split()) <= 850 and len(written.splitlines()) <= 115
    pages = [re.sub("<!-- evidence.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
             for page in GUIDE.glob("*.md")]  # without tables that evidence fills
    words = [word for page in pages for word in page.split()]
    assert sum(bool(re.search(r"\w", word)) for word in words) <= 9_000  # rules of tables aside


def test_the_readmes_figures_of_speed_and_size():
    least, most = re.search(r"\[([\d.]+)\]\S+ \(long replies\) to \[([\d.]+)\]", README).groups()
    assert f"**{most}**" in TEXTS["notebooks/guide/speed.md"]
    assert f"| {least}, " in TEXTS["notebooks/guide/trainer.md"]
    (whole, parts), = re.findall(r"`make run`.*? took (\d+) minutes .*?: (.*?);",
                                 TEXTS["notebooks/guide/speed.md"])
    facts = json.loads((NOTEBOOKS / "executed" / "run.json").read_text())
    seconds = {stage: facts[stage]["seconds"] for stage in RECIPE}
    assert parts == ", ".join(f"{stage[:2]} {seconds[stage] / 60:.1f}" for stage in (
        "02_sft", "04_rejection_sampling", "05_grpo", "06_evaluate"))
    assert 0 <= int(whole) - sum(seconds.values()) / 60 <= 1.5  # kernels start, too
    assert f"some {whole} minutes" in " ".join(README.split())
    with safe_open(PACKAGE / "tiny_base" / "model.safetensors", "pt") as weights:
        count = sum(weights.get_tensor(name).numel() for name in weights.keys())
    assert f"{count / 1e6:.0f} million" == "5 million" and "five million" in README


def test_the_readmes_released_replies_are_those_of_their_page():
    page = TEXTS["notebooks/guide/what_is_a_point.md"]
    rows = re.findall(r"\| (\S+ 7B|\S+7B)[^|]*\| (\d+\.\d+) \| (\S+?),?(?: boxes scaled)? \| "
                      r"(\+\S+ \(.*?\)) \|", README)
    assert len(rows) == 3
    for model, score, published, refit in rows:
        assert re.search(rf"\| {model}[^|]*\| {score} \|[^\n]*{re.escape(refit)}", page)
        assert published in page


def test_the_guides_script_puts_released_replies_in_order(tmp_path, monkeypatch):
    (script,) = read_blocks(TEXTS["notebooks/guide/what_is_a_point.md"], "python")
    monkeypatch.chdir(tmp_path)
    files = {"MIG-Bench/revised_MIG_bench.json": [{"task": name} for name in ("diff", "region",
                                                                              "diff")],
             "results/migician/1.json": [{"task": "diff", "answer": "A"},
                                         {"task": "diff", "answer": "C"}, {"iou": 1}],
             "results/migician/2.json": [{"task": "region", "answer": "B"}, {"iou": 1}]}
    for name, content in files.items():
        path = tmp_path / "eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    exec(compile(script, "what_is_a_point.md", "exec"), {})
    lines = map(json.loads, Path("replies.jsonl").read_text().splitlines())
    assert [*lines] == [{"index": 0, "response": "A"}, {"index": 1, "response": "B"},
                        {"index": 2, "response": "C"}]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_benchmarks(tmp_path)
    (line,) = read_blocks(README, "json")
    Path("own").mkdir()
    Path("own/mine.jsonl").write_text(line)
    Path("images").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(name, "images")
    shutil.copy("mig_bench.json", "MIG_data.json")
    prediction = json.loads(re.search(r'`({"index".*?})`', README)[1])
    Path("mine.jsonl").write_text("".join(
        json.dumps(prediction | {"index": index}) + "\n" for index in range(3)))
    return tmp_path


def run_readme(start: str, *words: str) -> subprocess.CompletedProcess:
    (command,) = (line for line in read_commands(README) if line.startswith(start))
    return run_mig_kit(*shlex.split(command, comments=True)[1:], *words)


def test_the_readmes_predictions_are_scored(files):
    for protocol in ("official", "strict"):
        result = run_readme("mig-kit score", "--protocol", protocol)
        assert "| avg | 3 |" in result.stdout and protocol in result.stdout, result.stderr


def test_the_readmes_own_data_is_correct(files):
    shutil.copy("own/mine.jsonl", "mine.jsonl")
    result = run_readme("mig-kit data check")
    assert "1 line" in result.stdout and not result.returncode, result.stdout + result.stderr


@pytest.mark.slow
def test_the_readme_asks_a_model(files):
    result = run_readme("mig-kit eval", "--limit", "1")
    assert "MIG-Bench-like (drawn)" in result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not model_folder("tiny/grpo").is_dir(),
                    reason="no adapters ship yet; make executed writes them and README's block")
def test_the_readmes_example_is_answered_as_the_page_shows(files):
    (shown,) = read_blocks(README, "text")
    assert run_readme("mig-kit ground").stdout == shown


def test_the_readmes_targets_are_made():
    targets = [line.split()[1] for line in read_commands(README) if line.startswith("make ")]
    rules = re.findall(r"^(\w+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets == ["setup", "run", "test", "lab"] and {*targets, "docs", "lint"} <= set(rules)


@pytest.mark.slow
def test_the_readmes_script_runs_as_it_stands(files, monkeypatch):
    (script,) = read_blocks(README, "python")
    Path("Qwen").mkdir()
    Path("Qwen/Qwen2.5-VL-7B-Instruct").symlink_to(PACKAGE / "tiny_base")
    (line,) = read_blocks(README, "jsonl")
    Path("questions.jsonl").write_text(line + line.replace("b.png", "c.png"))
    monkeypatch.setattr("trl.GRPOConfig", partial(
        GRPOConfig, use_cpu=True, max_steps=1, max_completion_length=4, save_steps=1,
        report_to="none"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "prompts are not shared")
        exec(compile(script, "README.md", "exec"), {})
    assert Path("out/checkpoint-1/adapter_model.safetensors").is_file()
    saved = json.loads(Path("out/checkpoint-1/processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"


def test_one_version_one_paper_and_one_address():
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((PROJECT_ROOT / "CITATION.cff").read_text())
    assert project["version"] == __version__ == citation["version"]
    (paper,) = citation["references"]
    assert paper["title"] == PAPER and project["urls"]["Paper"] in README
    authors = {author["name"] for author in project["authors"]}
    assert authors == {author["name"] for author in citation["authors"]}
    address = project["urls"]["Repository"]
    assert citation["repository-code"] == address
    assert f'REPOSITORY = "{address}"' in TEXTS["notebooks/README.md"]
    assert f"git clone {address} " in README
