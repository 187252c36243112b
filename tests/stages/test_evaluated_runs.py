"""The last line of `make run`: do RL's margins lie within those of several seeds?"""

import json

import pytest

from mig_kit.commands.main import main
from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import execute
from mig_kit.stages import evaluated_runs

MARGINS = json.loads((PROJECT_ROOT / evaluated_runs.MARGINS).read_text())


def margins_of(gaps, monkeypatch, changed=None):
    """`check_margins` of a run with a gap (value, low, high) for each suite of MARGINS."""
    deltas = {suite: {"value": value, "ci95": bounds}
              for suite, (value, *bounds) in zip(MARGINS, gaps)}
    monkeypatch.setattr(evaluated_runs.run_folders, "load_record", lambda *_: {"params": {}})
    monkeypatch.setattr(evaluated_runs, "changed_params", lambda *_: changed or {})
    monkeypatch.setattr(evaluated_runs.store, "read_metrics",
                        lambda _: {"deltas": {"grpo-sft": deltas}})
    return evaluated_runs.check_margins("default")


def test_margins_stand_beside_the_range_of_the_seeds(monkeypatch):
    lowest, highest = (pick(MARGINS["mig_bench"]) for pick in (min, max))
    line, is_outside = margins_of([(15.0, -11.0, 39.0), (2.0, -1.0, 5.0)], monkeypatch)
    assert not is_outside and "OUTSIDE" not in line
    first, second = line.splitlines()
    assert first == ("RL over SFT, MIG-Bench-like (drawn): +15.0 points (-11.0 to +39.0); seeds of "
                     f"results.md: {lowest:+.1f} to {highest:+.1f}")
    assert second.startswith("RL over SFT, out of domain (drawn): +2.0 points (-1.0 to +5.0); ")


@pytest.mark.parametrize(("low", "high", "is_outside"), [
    (-9.0, -2.0, True), (-9.0, 99.0, False), (90.0, 95.0, True)])
def test_a_margin_lies_outside_with_its_whole_interval(low, high, is_outside, monkeypatch):
    line, outside = margins_of([((low + high) / 2, low, high), (2.0, -1.0, 5.0)], monkeypatch)
    assert outside is is_outside is line.splitlines()[0].endswith("OUTSIDE")


def test_another_recipe_is_not_compared(monkeypatch):
    assert margins_of([], monkeypatch, {"05_grpo": {"beta": 1}}) == ("", False)


@pytest.mark.parametrize("is_outside", [True, False])
def test_the_exit_status_says_whether_a_margin_lies_outside(is_outside, monkeypatch, tmp_path,
                                                            capsys):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.setattr(execute, "run_plan", lambda *_: None)
    monkeypatch.setattr(evaluated_runs, "check_margins", lambda _: ("the margins", is_outside))
    monkeypatch.setattr("sys.argv", ["mig-kit", "run"])
    if is_outside:
        with pytest.raises(SystemExit, match="True"):
            main()
    else:
        main()
    assert capsys.readouterr().out == "the margins\n"
