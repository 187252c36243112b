"""Write the tables of README and results.md, and margins.json, from the records of evidence.py.

`make evidence-pages`. A table lies between <!-- evidence NAME --> and <!-- end -->. Intervals are
95 %, Student's t over seeds, unless a table says otherwise.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from evidence import list_items, read_list, read_option

from mig_kit import __version__, stats
from mig_kit.common import NOTEBOOKS, PROJECT_ROOT
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.stages.evaluated_runs import MARGINS
from mig_kit.stages.tables import CLAIMS
from mig_kit.world.suites import SUITES, suite_title

PAGES = (PROJECT_ROOT / "README.md", NOTEBOOKS / "guide" / "results.md")
NAMES = list(dict.fromkeys(suite for suite, *_ in CLAIMS))
MAIN = NAMES[0]
GAPS = (("grpo", "sft"), ("grpo", "base"))


def load_records() -> dict[str, list[dict]]:
    """Arm -> its records by seed; SystemExit for one of another version."""
    records: dict[str, list[dict]] = {}
    for item in list_items():
        if item.path.is_file():
            record = json.loads(item.path.read_text())
            if record["version"] != __version__:
                sys.exit(f"{item.path.name} is of version {record['version']}, not {__version__}; "
                         "delete it, and make evidence makes it again")
            records.setdefault(item.arm, []).append(record)
    return records


def by_task(record: dict, system: str, suite: str) -> np.ndarray:
    """(tasks, questions) 0 or 1; every task of a suite has as many questions."""
    bits = np.array([*map(int, record["correct"][system][suite])], dtype=float)
    return bits.reshape(len(SUITES[suite].tasks), -1)


def scores(records: list[dict], system: str, suite: str) -> np.ndarray:
    """(records,) percent."""
    return np.array([100 * by_task(record, system, suite).mean() for record in records])


def describe(values: np.ndarray) -> str:
    """Mean with its interval, bold where that leaves out 0, and the worst; of two seeds, which tell
    little of their spread, both.
    """
    low, high = stats.mean_interval(values)
    mean = f"{values.mean():+.1f}"
    if np.isnan(low):
        return mean
    if len(values) == 2:
        return f"{mean} ({values[0]:+.1f} and {values[1]:+.1f})"
    mean = f"**{mean}**" if low > 0 or high < 0 else mean
    return f"{mean} ({low:+.1f} to {high:+.1f}), worst {values.min():+.1f}"


def render(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def short_title(suite: str) -> str:
    """The suite's name without "(drawn)"."""
    return suite_title(suite).removesuffix(" (drawn)")


def count_seeds(records: list) -> str:
    """"1 seed", "8 seeds"."""
    return f"{len(records)} seed{'s' * (len(records) != 1)}"


def headline(records: dict[str, list[dict]]) -> str:
    """Scores of the three models and RL's margins, over the recipe's seeds."""
    recipe = records["recipe"]
    rows = [[SYSTEM_LABELS[system], *(f"{scores(recipe, system, suite).mean():.1f}"
                                      for suite in NAMES)] for system in ("base", "sft", "grpo")]
    rows += [[f"GRPO over {SYSTEM_LABELS[before]}",
              *(describe(scores(recipe, after, suite) - scores(recipe, before, suite))
                for suite in NAMES)] for after, before in GAPS]
    title = f"% correct, drawn scenes, {count_seeds(recipe)}"
    return render([title, *map(short_title, NAMES)], rows)


def seeds(records: dict[str, list[dict]]) -> str:
    """A row for each seed of the recipe, and their mean and standard deviation."""
    recipe = records["recipe"]
    columns = [scores(recipe, system, MAIN) for system in ("base", "sft", "grpo")]
    columns += [scores(recipe, "grpo", suite) - scores(recipe, before, suite)
                for before, suite in [("sft", name) for name in NAMES[:2]]
                + [("base", name) for name in NAMES[2:]]]
    signs = [""] * 3 + ["+"] * (len(columns) - 3)
    spent = np.array([record["processor_seconds"] for record in recipe], dtype=float)
    rows = [[str(record["seed"]), *(f"{column[row]:{sign}.1f}" for column, sign
                                    in zip(columns, signs)), f"{spent[row]:.0f}"]
            for row, record in enumerate(recipe)]
    rows.append(["mean", *(f"{column.mean():{sign}.1f}" for column, sign in zip(columns, signs)),
                 f"{spent.mean():.0f}"])
    if len(recipe) > 1:
        rows.append(["sd", *(f"{column.std(ddof=1):.1f}" for column in columns), ""])
    head = ["seed", "base", "SFT", "GRPO", f"GRPO - SFT, {short_title(NAMES[0])}",
            *(f"GRPO - {SYSTEM_LABELS[before]}, {short_title(suite)}"
              for before, suite in zip(("sft", "base", "base"), NAMES[1:])),
            "processor seconds, 02 to 05"]
    return render(head, rows)


def claim(records: dict[str, list[dict]]) -> str:
    """RL's margin in domain over seeds and questions: both variances in one interval."""
    gaps = np.array([by_task(record, "grpo", MAIN) - by_task(record, "sft", MAIN)
                     for record in records["recipe"]])
    over_seeds = stats.mean_interval(100 * gaps.mean((1, 2)))
    by_question = gaps.mean(0)  # (tasks, questions)
    lists = np.arange(by_question.size).reshape(by_question.shape)
    over_questions = 100 * np.array(stats.gap_interval_by_list([*zip(by_question, lists)]))
    half = np.hypot(np.diff(over_seeds)[0] / 2, np.diff(over_questions)[0] / 2)
    mean = 100 * gaps.mean()
    if len(gaps) < 3:
        by_seed = " and ".join(f"{gap:+.1f}" for gap in 100 * gaps.mean((1, 2)))
        return f"In domain RL adds {by_seed} points to SFT ({count_seeds(gaps)})."
    return (f"In domain RL adds {mean:+.1f} points to SFT ({mean - half:+.1f} to {mean + half:+.1f}"
            f" over seeds and questions; {len(gaps)} seeds, worst "
            f"{100 * gaps.mean((1, 2)).min():+.1f}).")


def tasks(records: dict[str, list[dict]]) -> str:
    """Every suite by task: means over the recipe's seeds, and the range of RL's margins."""
    recipe, texts = records["recipe"], []
    for suite in NAMES:
        means = {system: np.array([100 * by_task(record, system, suite).mean(1)
                                   for record in recipe]) for system in ("base", "sft", "grpo")}
        rows = [[SYSTEM_LABELS[system], *(f"{value:.0f}" for value in values.mean(0))]
                for system, values in means.items()]
        gap = means["grpo"] - means["sft"]
        rows.append(["GRPO - SFT, worst to best seed",
                     *(f"{column.min():+.0f} to {column.max():+.0f}" for column in gap.T)])
        texts.append(f"### {short_title(suite)}\n\n"
                     + render(["", *SUITES[suite].tasks], rows))
    return "\n\n".join(texts)


def longer(records: dict[str, list[dict]]) -> str:
    """RL beside an SFT of equal time, seed by seed."""
    recipe = {record["seed"]: record for record in records["recipe"]}
    pairs = [(recipe[record["seed"]], record) for record in records.get("sft_longer", [])
             if record["seed"] in recipe]
    if not pairs:
        return "Not run yet with this version."
    rows = [[f"GRPO over SFT of equal processor time, {count_seeds(pairs)}", *(
        describe(np.array([100 * (by_task(a, "grpo", suite) - by_task(b, "sft", suite)).mean()
                           for a, b in pairs])) for suite in NAMES)]]
    longer_seconds, seconds = (", ".join(f"{pair[side]['processor_seconds']:.0f}"
                                         for pair in pairs) for side in (1, 0))
    return (render(["points", *map(short_title, NAMES)], rows)
            + f"\n\nProcessor seconds, pair by pair: SFT {longer_seconds}; the recipe's 02 to 05 "
            f"{seconds}.")


def draws(records: dict[str, list[dict]]) -> str:
    """Final scores in domain of several draws of RL from one SFT model, and which collapsed.

    A draw has collapsed if a task ends below SFT by more than its interval.
    """
    drawn = [record for record in records["recipe"] if not record["seed"]]
    drawn += records.get("draws", [])
    if len(drawn) < 2 or drawn[0]["seed"]:
        return "Not run yet with this version."
    final, fallen = scores(drawn, "grpo", MAIN), []
    for record in drawn:
        gaps = by_task(record, "grpo", MAIN) - by_task(record, "sft", MAIN)
        for task, rows in zip(SUITES[MAIN].tasks, gaps):
            _, high = stats.gap_interval_by_list([(rows, np.arange(len(rows)))])
            fallen += [f"{task} (seed {record['seed']})"] * (high < 0)
    return (f"{len(drawn)} draws of RL from the SFT model of seed 0 end at "
            f"{', '.join(f'{value:.1f}' for value in final)} in domain: sd "
            f"{final.std(ddof=1):.1f}. Tasks below SFT by more than their interval: "
            f"{', '.join(fallen) or 'none'}.")


def arms(records: dict[str, list[dict]]) -> str:
    """Each arm's GRPO model less the recipe's, seed by seed."""
    recipe = {record["seed"]: record for record in records["recipe"]}
    entries, rows = read_list(), []
    for arm, of_arm in records.items():
        pairs = [(record, recipe[record["seed"]]) for record in of_arm if record["seed"] in recipe]
        if arm not in ("recipe", "draws", "sft_longer") and pairs:
            rows.append([entries[arm]["title"], str(len(pairs)), *(
                describe(scores([a for a, _ in pairs], "grpo", suite)
                         - scores([b for _, b in pairs], "grpo", suite)) for suite in NAMES)])
    if not rows:
        return "Not run yet with this version."
    return render(["instead of the recipe", "seeds", *map(short_title, NAMES)], rows)


def contest(records: dict[str, list[dict]]) -> str:
    """The first line of the contest: the recipe's."""
    first = [record for record in records["recipe"] if record["seed"] in (0, 1, 2)]
    gaps = scores(first, "grpo", MAIN) - scores(first, "sft", MAIN)
    spent = min(record["processor_seconds"] for record in first)
    return render(["who", "worst of three seeds", "processor seconds, 02 to 05", "version"],
                  [["the recipe", f"{gaps.min():+.1f} ({len(first)} of 3 seeds)",
                    f"{spent:.0f}", __version__]])


def provenance(records: dict[str, list[dict]]) -> str:
    """What the records are of, and the digest that tells whether one was deleted or edited."""
    everyone = [record for group in records.values() for record in group]
    digest = hashlib.sha256(b"".join(
        item.path.read_bytes() for item in list_items() if item.path.is_file())).hexdigest()
    commits = sorted({record["git"][:7] for record in everyone})
    changed = sum(record["git"].endswith("+") for record in everyone)
    made_by = {read_option(record["evidence"]["commands"][0], "--run-id"): record["git"][:7]
               for record in records["recipe"]}
    of_others = sum("--from" in (command := record["evidence"]["commands"][0])
                    and made_by.get(read_option(command, "--from")) not in (
                        None, record["git"][:7]) for record in everyone)
    machines = sorted({record["machine"] for record in everyone})
    codes = sorted({record["evidence"]["smoke"][:12] for record in everyone})
    return (f"{len(everyone)} of {len(list_items())} records, version {__version__}, commits "
            f"{', '.join(commits)} ({changed} with changed files beside), digest of the smoke run "
            f"{', '.join(codes)}; {of_others} started from a run of another of "
            f"these commits; {'; '.join(machines)}. All records: SHA-256 {digest[:12]}.")


TABLES = {table.__name__: table for table in (
    headline, seeds, claim, draws, tasks, longer, arms, contest, provenance)}


def fill(text: str, records: dict[str, list[dict]]) -> str:
    """A page with its tables made again."""
    return re.sub(r"(<!-- evidence (\w+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{TABLES[match[2]](records)}\n{match[3]}", text,
                  flags=re.DOTALL)


def find_margins(records: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Suite -> RL's points over SFT, of each seed of the recipe; `check_margins` reads them."""
    return {suite: [round(float(value), 1) for value in scores(records["recipe"], "grpo", suite)
                    - scores(records["recipe"], "sft", suite)] for suite in NAMES[:2]}


def main() -> None:
    """Write all pages."""
    records = load_records()
    for page in PAGES:
        page.write_text(fill(page.read_text(), records))
    (PROJECT_ROOT / MARGINS).write_text(json.dumps(find_margins(records), indent=1) + "\n")


if __name__ == "__main__":
    main()
