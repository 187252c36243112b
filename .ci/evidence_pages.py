"""Write the tables of README and results.md, and margins.json, from the records of evidence.py.

`make evidence-pages`. A table lies between <!-- evidence NAME --> and <!-- end -->. Intervals are
95 %, over seeds (Student's t) and questions: half of its width is the root of both halves' squares.

Out of domain counts the 3,200 questions of `evidence.FAR`, of the records that have them.
"""

import hashlib
import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).parent))
from evidence import list_items, list_sources, read_list

from mig_kit import __version__, stats
from mig_kit.common import NOTEBOOKS, PROJECT_ROOT
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.evaluation.evaluated_runs import MARGINS
from mig_kit.evaluation.tables import CLAIMS
from mig_kit.world.suites import OUT_OF_DOMAIN, SUITES, make_suite, suite_title, task_title

PAGES = (PROJECT_ROOT / "README.md", NOTEBOOKS / "guide" / "results.md")
NAMES = list(dict.fromkeys(suite for suite, *_ in CLAIMS))
MAIN = NAMES[0]
COMMANDS = "notebooks/guide/evidence/evidence.yaml"  # from README
NOT_YET = "Not run yet with this version."
HOLM = """Points of each arm's GRPO model less the recipe's, paired by seed. By chance alone one of
twenty such intervals would leave out 0; a star marks what is left after Holm's correction for
all cells.

"""


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


def answers(record: dict, suite: str) -> dict[str, str]:
    """System -> 0 or 1 for each question of a suite; {} if it was not asked."""
    if suite == OUT_OF_DOMAIN:
        return record.get("out_of_domain", {}).get("correct", {})
    return {system: by_suite[suite] for system, by_suite in record["correct"].items()}


def by_task(record: dict, system: str, suite: str) -> np.ndarray:
    """(tasks, questions) 0 or 1; every task of a suite has as many questions."""
    bits = np.array([*map(int, answers(record, suite)[system])], dtype=float)
    return bits.reshape(len(SUITES[suite].tasks), -1)


def scores(records: list[dict], system: str, suite: str) -> np.ndarray:
    """(records that have them,) percent."""
    return np.array([100 * by_task(record, system, suite).mean() for record in records
                     if system in answers(record, suite)])


def gaps_between(pairs: list[tuple[dict, dict]], after: str, before: str,
                 suite: str) -> np.ndarray:
    """(pairs that have both, tasks, questions) differences of correctness, -1 to 1."""
    gaps = [by_task(one, after, suite) - by_task(other, before, suite) for one, other in pairs
            if after in answers(one, suite) and before in answers(other, suite)]
    return np.array(gaps) if gaps else np.zeros((0, 1, 1))


def interval(gaps: np.ndarray) -> tuple[float, float]:
    """Of the mean of gaps (several seeds, tasks, questions), points, over seeds and questions."""
    by_question = gaps.mean(0)
    questions = np.arange(by_question.size).reshape(by_question.shape)
    halves = [np.diff(stats.mean_interval(100 * gaps.mean((1, 2))) or [0, 0]) / 2,
              50 * np.diff(stats.gap_interval_by_list([*zip(by_question, questions)]))]
    half = float(np.hypot(*halves)[0])
    return 100 * gaps.mean() - half, 100 * gaps.mean() + half


def describe(gaps: np.ndarray, with_worst: bool = True) -> str:
    """Mean with its interval, bold where that leaves out 0, and the worst; of two seeds, which tell
    little of their spread, both; "-" without any.
    """
    if not len(gaps):
        return "-"
    by_seed = 100 * gaps.mean((1, 2))
    mean = f"{by_seed.mean():+.1f}"
    if len(by_seed) < 3:
        return mean + f" ({by_seed[0]:+.1f} and {by_seed[-1]:+.1f})" * (len(by_seed) == 2)
    low, high = interval(gaps)
    mean = f"**{mean}**" if low > 0 or high < 0 else mean
    worst = f", worst {by_seed.min():+.1f}" * with_worst
    return f"{mean} ({low:+.1f} to {high:+.1f}){worst}"


def render(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


@cache
def chances(suite: str) -> list[float]:
    """What guessing a letter scores in each task of a suite, percent; [] if it asks for boxes."""
    samples = make_suite(suite, "test", 1, 0)
    return [100 / len(sample.options) for sample in samples if sample.options]


def short_title(suite: str) -> str:
    """The suite's name without "(drawn)"."""
    return suite_title(suite).removesuffix(" (drawn)")


def count_seeds(records: list) -> str:
    """"1 seed", "8 seeds"."""
    return f"{len(records)} seed{'s' * (len(records) != 1)}"


def pair_with_recipe(records: dict[str, list[dict]], arm: str,
                     reference: str = "recipe") -> list[tuple[dict, dict]]:
    """(the record of the recipe, or of another reference, the arm's of the same seed)."""
    by_seed = {record["seed"]: record for record in records.get(reference, [])}
    return [(by_seed[record["seed"]], record) for record in records.get(arm, [])
            if record["seed"] in by_seed]


def pairs_without_rl(records: dict[str, list[dict]]) -> dict[str, tuple[list[tuple], str]]:
    """Models without RL -> ((the recipe's record, theirs) of each seed, their name there), as far
    as there are records; the base, which has no seed, is in seed 0's.
    """
    recipe = records["recipe"]
    first = next(record for record in recipe if not record["seed"])
    pairs = {"base": ([(record, first) for record in recipe], "base"),
             "SFT": ([*zip(recipe, recipe)], "sft"),
             "the control": (pair_with_recipe(records, "equal_data"), "sft")}
    return {name: pair for name, pair in pairs.items() if pair[0]}


def headline(records: dict[str, list[dict]]) -> str:
    """Scores and RL's margins over the recipe's seeds, each beside its control: SFT of the same
    prompts and processor time.
    """
    recipe = records["recipe"]
    first = next(record for record in recipe if not record["seed"])
    control = pair_with_recipe(records, "equal_data")
    rows = [["a guessed letter", *(f"{np.mean(chances(suite)):.1f}" if chances(suite) else "-"
                                   for suite in NAMES)],
            ["base", *(_mean([first], "base", suite) for suite in NAMES)],
            [f"[SFT]({COMMANDS})", *(_mean(recipe, "sft", suite) for suite in NAMES)]]
    if control:
        rows.append([f"[SFT on RL's prompts]({COMMANDS}) (control)",
                     *(_mean([arm for _, arm in control], "sft", suite) for suite in NAMES)])
    rows.append([f"[GRPO]({COMMANDS})", *(_mean(recipe, "grpo", suite) for suite in NAMES)])
    rows += [[f"GRPO over {name}", *(
        describe(gaps_between(pairs, "grpo", before, suite), (name, suite) == ("SFT", MAIN))
        for suite in NAMES)] for name, (pairs, before) in pairs_without_rl(records).items()]
    rows.append(["paper (7B, benchmarks)", *(
        f"{points:+.2f} over {SYSTEM_LABELS[pair.split('-')[1]]}"
        for _, _, pair, points in CLAIMS)])
    counts = [len(scores(recipe, "grpo", suite)) for suite in (MAIN, OUT_OF_DOMAIN)]
    title = f"% correct, drawn scenes, {count_seeds(recipe)}"
    if counts[0] != counts[1]:
        title += f" (out of domain {counts[1]})"
    if control:
        title += f", control {len(control)}"
    shown = {suite: interval(gaps_between(control, "grpo", "sft", suite))[0] > 0
             for suite in NAMES if len(control) > 2}
    yes, no = (", ".join(short_title(suite) for suite in shown if shown[suite] == is_shown)
               for is_shown in (True, False))
    verdict = f"\n\n**Beside the control** a gain is shown: {yes or '-'}; not shown: {no or '-'}."
    return render([title, *map(short_title, NAMES)], rows) + verdict * bool(shown)


def _mean(records: list[dict], system: str, suite: str) -> str:
    values = scores(records, system, suite)
    return f"{values.mean():.1f}" if len(values) else "-"


def seeds(records: dict[str, list[dict]]) -> str:
    """A row for each seed of the recipe, and their mean and standard deviation."""
    recipe = records["recipe"]
    first = next(record for record in recipe if not record["seed"])
    figures = {"base": [scores([first], "base", MAIN)] * len(recipe)}
    figures |= {SYSTEM_LABELS[system]: [scores([record], system, MAIN) for record in recipe]
                for system in ("sft", "grpo")}
    for suite, before in zip(NAMES, ("sft", "sft", "base", "base")):
        figures[f"GRPO - {SYSTEM_LABELS[before]}, {short_title(suite)}"] = [
            100 * gaps_between([(record, first if before == "base" else record)], "grpo", before,
                               suite).mean(axis=(1, 2)) for record in recipe]
    spent = [record["processor_seconds"] for record in recipe]
    rows = [[str(record["seed"]), *(_number(values[row], name) for name, values in figures.items()),
             f"{spent[row]:.0f}"] for row, record in enumerate(recipe)]
    columns = {name: np.concatenate(values) for name, values in figures.items()}
    rows.append(["mean", *(_number(values[:1] * 0 + values.mean(), name)
                           for name, values in columns.items()), f"{np.mean(spent):.0f}"])
    if len(recipe) > 1:
        rows.append(["sd", *(f"{values.std(ddof=1):.1f}" if len(values) > 1 else "-"
                             for values in columns.values()), ""])
    return render(["seed", *figures, "processor seconds, 02 to 05"], rows)


def _number(values: np.ndarray, name: str) -> str:
    """The only value, with its sign if it is a difference; "-" without one."""
    return f"{values[0]:{'+' * (' - ' in name)}.1f}" if len(values) else "-"


def claim(records: dict[str, list[dict]]) -> str:
    """What RL adds to SFT, and to its control, in a sentence for each place."""
    own = [(record, record) for record in records["recipe"]]
    control = pair_with_recipe(records, "equal_data")
    sentences = []
    for words, suite in (("In domain", MAIN), ("Out of domain", OUT_OF_DOMAIN)):
        of_sft, of_control = (gaps_between(pairs, "grpo", "sft", suite) for pairs in (own, control))
        text = f"{words} RL adds {describe(of_sft)} points to SFT ({count_seeds(of_sft)})"
        if len(of_control):
            text += (f", and {describe(of_control)} to SFT that goes on with RL's own prompts "
                     f"({count_seeds(of_control)})")
        if len(of_control) > 2:
            verdict = "is shown" if interval(of_control)[0] > 0 else "is not shown"
            text += f": a gain beside this control {verdict}"
        sentences.append(f"{text}.")
    return "\n".join(sentences)


def tasks(records: dict[str, list[dict]]) -> str:
    """Every suite by task: means over the recipe's seeds, and the range of RL's margins."""
    recipe, texts = records["recipe"], []
    for suite in NAMES:
        asked = [record for record in recipe if "grpo" in answers(record, suite)]
        means = {system: np.array([100 * by_task(record, system, suite).mean(1)
                                   for record in asked if system in answers(record, suite)])
                 for system in ("base", "sft", "grpo")}
        guessed = [["a guessed letter", *(f"{value:.0f}" for value in chances(suite))]]
        rows = guessed * bool(chances(suite)) + [
            [SYSTEM_LABELS[system], *(f"{value:.0f}" for value in values.mean(0))]
            for system, values in means.items() if len(values)]
        gap = means["grpo"] - means["sft"]
        rows.append(["GRPO - SFT, worst to best seed",
                     *(f"{column.min():+.0f} to {column.max():+.0f}" for column in gap.T)])
        texts.append(f"### {short_title(suite)}\n\n"
                     + render([count_seeds(asked), *SUITES[suite].tasks], rows))
    return "\n\n".join(texts)


def parts(records: dict[str, list[dict]]) -> str:
    """RL's margins behind the means: out of domain by task, BLINK-like without its task that is
    near to a trained one.
    """
    pairs = pairs_without_rl(records)
    far = gaps_between(pairs["SFT"][0], "grpo", "sft", OUT_OF_DOMAIN)
    texts = [f"{task_title(task)} {describe(far[:, [place]])}"
             for place, task in enumerate(SUITES[OUT_OF_DOMAIN].tasks) if len(far)]
    near = [*SUITES["blink"].tasks].index("visual_correspondence")
    blink = [f"over {name} " + describe(np.delete(
        gaps_between(of_name, "grpo", before, "blink"), near, axis=1))
        for name, (of_name, before) in pairs.items()]
    return (f"GRPO over SFT out of domain, {count_seeds(far)}: {'; '.join(texts)}. "
            f"BLINK-like without visual correspondence, GRPO {', '.join(blink)}.")


def controls(records: dict[str, list[dict]]) -> str:
    """RL beside SFT without RL: of RL's prompts and seconds, and of more passes, seed by seed."""
    entries, rows, texts = read_list(), [], []
    for arm in ("equal_data", "sft_longer"):
        pairs, title = pair_with_recipe(records, arm), entries[arm]["title"]
        if pairs:
            rows.append([f"GRPO over {title}", str(len(pairs)), *(
                describe(gaps_between(pairs, "grpo", "sft", suite)) for suite in NAMES)])
            own = -gaps_between(pairs, "sft", "sft", MAIN).mean((0, 2))  # beyond the recipe's SFT
            fallen = [task for task, gap in zip(SUITES[MAIN].tasks, own) if gap < 0]
            seconds = ", ".join(f"{control['processor_seconds']:.0f}" for _, control in pairs)
            texts.append(
                f"{title[0].upper()}{title[1:]}. Expected: {entries[arm]['expected']}. In domain "
                f"it is {100 * own.mean():+.1f} points beyond the recipe's SFT, and below it in "
                f"{', '.join(fallen) or 'no task'}. Processor seconds of its training, by seed: "
                f"{seconds}.")
        else:
            texts.append(f"Not run with this version: {title}. Expected: "
                         f"{entries[arm]['expected']}.")
    if not rows:
        return NOT_YET
    return "\n\n".join([render(["points", "seeds", *map(short_title, NAMES)], rows), *texts])


def draws(records: dict[str, list[dict]]) -> str:
    """Final scores in domain of several draws of RL from one SFT model, and which collapsed.

    A draw has collapsed if a task ends below SFT by more than its interval.
    """
    drawn = [record for record in records["recipe"] if not record["seed"]]
    drawn += records.get("draws", [])
    if len(drawn) < 2 or drawn[0]["seed"]:
        return NOT_YET
    final, fallen = scores(drawn, "grpo", MAIN), []
    for record in drawn:
        gaps = by_task(record, "grpo", MAIN) - by_task(record, "sft", MAIN)
        for task, rows in zip(SUITES[MAIN].tasks, gaps):
            _, high = stats.gap_interval_by_list([(rows, np.arange(len(rows)))])
            fallen += [f"{task} (seed {record['seed']})"] * (high < 0)
    return (f"{len(drawn)} draws of RL from the SFT model of seed 0, first the run on show, end at "
            f"{', '.join(f'{value:.1f}' for value in final)} in domain: sd "
            f"{final.std(ddof=1):.1f}, without the first {final[1:].std(ddof=1):.1f}. "
            "Tasks below SFT by more than their interval: "
            f"{', '.join(fallen) or 'none'}.")


def arms(records: dict[str, list[dict]]) -> str:
    """Each arm's GRPO model less the recipe's, seed by seed; Holm's test over all cells."""
    entries, rows, values = read_list(), [], []
    others = [arm for arm, entry in entries.items() if arm not in ("recipe", "draws")
              and not entry["commands"][-1].startswith("mig-kit eval")]
    for arm in others:
        pairs = pair_with_recipe(records, arm)
        if pairs:
            cells = [-gaps_between(pairs, "grpo", "grpo", suite) for suite in NAMES]
            rows.append([entries[arm]["title"], entries[arm]["expected"], str(len(pairs)),
                         *map(describe, cells)])
            values += [(ttest_1samp(cell.mean((1, 2)), 0).pvalue, len(rows) - 1, place)
                       for place, cell in enumerate(cells, 3) if len(cell) > 2]
    left = [entries[arm]["title"] for arm in others if not records.get(arm)]
    left = f"Predicted and not run with this version: {'; '.join(left)}." * bool(left)
    if not rows:
        return left
    for rank, (value, row, place) in enumerate(sorted(values)):
        if value * (len(values) - rank) > 0.05:
            break
        rows[row][place] += " *"
    table = render(["instead of the recipe", "expected", "seeds", *map(short_title, NAMES)], rows)
    return HOLM + "\n\n".join(filter(None, [table, own_gains(records), left]))


def own_gains(records: dict[str, list[dict]]) -> str:
    """A sentence: what RL adds to the SFT models of arms that have others than the recipe's."""
    entries, texts = read_list(), []
    for arm in records:
        pairs = [(record, record) for recipe, record in pair_with_recipe(records, arm)
                 if "grpo" in record["correct"]
                 and answers(record, MAIN)["sft"] != answers(recipe, MAIN)["sft"]]
        if arm != "draws" and pairs:
            gains = [describe(gaps_between(pairs, "grpo", "sft", suite), False)
                     for suite in (MAIN, OUT_OF_DOMAIN)]
            texts.append(f"{entries[arm]['title']}: {gains[0]} in domain, {gains[1]} out of it "
                         f"({count_seeds(pairs)})")
    return f"RL over the arm's own SFT model: {'; '.join(texts)}." * bool(texts)


def contest(records: dict[str, list[dict]]) -> str:
    """The first line of the contest: the recipe's."""
    first = [record for record in records["recipe"] if record["seed"] in (0, 1, 2)]
    spent = [record["processor_seconds"] for record in first]
    return render(["who", "worst GRPO score of seeds 0, 1, 2", "processor seconds, 02 to 05",
                   "version"],
                  [["the recipe", f"{scores(first, 'grpo', MAIN).min():.1f}",
                    f"{min(spent):.0f} to {max(spent):.0f}", __version__]])


def provenance(records: dict[str, list[dict]]) -> str:
    """What the records are of, and the digest that tells whether one was deleted or edited."""
    everyone = [record for group in records.values() for record in group]
    digest = hashlib.sha256(b"".join(
        item.path.read_bytes() for item in list_items() if item.path.is_file())).hexdigest()
    commits = sorted({record["git"][:7] for record in everyone})
    changed = sum(record["git"].endswith("+") for record in everyone)
    made_by = {item.run_id: json.loads(item.path.read_text())["git"][:7]
               for item in list_items() if item.path.is_file()}
    of_others = sum(any(made_by.get(source.run_id, commit) != commit
                        for source in list_sources(item))
                    for item in list_items() if (commit := made_by.get(item.run_id)))
    machines = sorted({record["machine"] for record in everyone})
    codes = sorted({record["evidence"]["smoke"][:12] for record in everyone})
    return (f"{len(everyone)} of {len(list_items())} records, version {__version__}, commits "
            f"{', '.join(commits)} ({changed} with changed files beside), digest of the smoke run "
            f"{', '.join(codes)}; {of_others} started from a run of another of "
            f"these commits; {'; '.join(machines)}. All records: SHA-256 {digest[:12]}.")


TABLES = {table.__name__: table for table in (
    headline, seeds, claim, draws, tasks, parts, controls, arms, contest, provenance)}


def fill(text: str, records: dict[str, list[dict]]) -> str:
    """A page with its tables made again."""
    return re.sub(r"(<!-- evidence (\w+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{TABLES[match[2]](records)}\n{match[3]}", text,
                  flags=re.DOTALL)


def find_margins(records: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Suite -> RL's points over SFT by 06, of each seed of the recipe; `check_margins` reads them.
    """
    return {suite: [round(record["scores"]["grpo"][suite] - record["scores"]["sft"][suite], 1)
                    for record in records["recipe"]] for suite in NAMES[:2]}


def main() -> None:
    """Write all pages."""
    records = load_records()
    for page in PAGES:
        page.write_text(fill(page.read_text(), records))
    (PROJECT_ROOT / MARGINS).write_text(json.dumps(find_margins(records), indent=1) + "\n")


if __name__ == "__main__":
    main()
