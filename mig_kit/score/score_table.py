"""The table of `mig-kit score` beside published numbers, which `published.yaml` holds."""

from functools import cache, partial
from pathlib import Path

import yaml

from mig_kit.score.annotations import MIG_BENCH_TASKS
from mig_kit.score.benchmarks import BENCHMARKS
from mig_kit.stats import interval_text, number_text

_signed = partial(number_text, sign="+", digits=2)


@cache
def read_published() -> dict[str, list[dict]]:
    """The rows of `published.yaml` by benchmark and version; "tasks" are task -> percent."""
    rows = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
    return {name: [row | {"tasks": dict(zip(MIG_BENCH_TASKS, row.get("tasks", ())))}
                   for row in systems] for name, systems in rows.items()}


def score_markdown(result: dict) -> str:
    """A result of `mig-kit score` as a Markdown table beside published numbers, with notes."""
    rows = []
    if result["complete"] is not False and result["protocol"] == "official":
        name = f"{result['benchmark']} {result['version']}".strip()
        rows = read_published().get(name, [])
    published = [row for row in rows if "doubt" not in row]
    headline, *others = [name for name in result["avg"] if name != "ci95"]
    has_interval = "ci95" in result["avg"]
    blind = result.get("blind") or {}
    has_unread = bool(result.get("unread"))
    head = ["task", "n", *["unread"] * has_unread, headline, *["95 %"] * has_interval,
            *["points over blind"] * bool(blind), *others, *(row["system"] for row in published)]
    lines = [head, ["---"] * len(head)]
    average = {"n": result["n"], "unread": result.get("unread"), **result["avg"]}
    for name, values in [*result["tasks"].items(), ("avg", average)]:
        interval = " to ".join(f"{bound:.1f}" for bound in values.get("ci95", ()))
        known = [row["avg"] if name == "avg" else row["tasks"].get(name) for row in published]
        lines.append([name, str(values["n"]), *[str(values["unread"])] * has_unread,
                      _number(values.get(headline)),
                      *[interval] * has_interval,
                      *([interval_text(**blind["over"][name], sign="+")] if blind else ()),
                      *(_number(values.get(metric)) for metric in others), *map(_number, known)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, "", *table_notes(result, rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table_notes(result: dict, published: list[dict]) -> list[str]:
    """Sentences on what the table's numbers mean, and where the published ones come from."""
    benchmark, protocol, problems = result["benchmark"], result["protocol"], result["problems"]
    rules = BENCHMARKS[benchmark]
    judges_letters = rules.read_letter and protocol == "official"
    answered = result["n"] - problems.get("missing", 0)
    rule = f"{protocol} (letters by the kit's own rule)" if judges_letters else protocol
    notes = [f"{benchmark}, version {result['version'] or 'as given'}, protocol {rule}, "
             f"{result['n']} items."]
    if problems.get("missing"):
        notes.append("Replies are missing: do not set these numbers beside published ones.")
    elif not result["complete"] and rules.frame != "kit":
        known = f" (its paper counts {rules.n_items:,})" if rules.n_items else ""
        notes.append(f"These are not known to be all items of {benchmark}{known}: set them beside "
                     "published numbers only if they are.")
    if protocol != "official" and rules.frame != "kit":
        notes.append("Published figures follow the authors' own rules, so none stands beside this "
                     "protocol.")
    if "ci95" in result["avg"]:
        notes.append(f"Intervals are a bootstrap over the {result['lists']:,} lists of images, "
                     "and exact where few replies differ.")
    if result.get("unread"):
        headline, asks = next(iter(result["avg"])), judges_letters and "judge" not in result
        notes.append(f"{result['unread']:,} of {answered:,} replies unread "
                     f"({100 * result['unread'] / max(answered, 1):.1f} %): "
                     f"{result['avg'][headline]:.1f}, at most {result['at_most']:.1f}"
                     f"{' with a judge (--judge URL --judge-model NAME)' if asks else ''}.")
    if rows := (result.get("blind") or {}).get("rows"):
        figures = ", ".join(f"{name} {row['avg']:.1f}" for name, row in rows.items())
        notes.append(f"Answers that no image is needed for score: {figures}. Points over blind are "
                     "over the best of them in each task; its constants are fitted on the other "
                     "image lists, so it is a prior of the benchmark, not a model.")
    notes += result["remarks"]
    if judges_letters:
        notes.append(rules.note)
    notes += ["{system}: {source}.".format(**row) for row in published if "doubt" not in row]
    notes += ["Not in the table: {system} {avg:.2f} ({source}), {doubt}.".format(**row)
              for row in published if "doubt" in row]
    notes += [f"Replies, {reason}: {count}."
              for reason, count in sorted(problems.items(), key=lambda problem: -problem[1])]
    return notes + (_comparison_notes(result) if "compare" in result else [])


def _comparison_notes(result: dict) -> list[str]:
    other = result["compare"]
    notes = [f"Replies of {other['predictions']}, {reason}: {count}."
             for reason, count in sorted(other["problems"].items())]
    names = f"{result['predictions']} minus {other['predictions']}"
    for metric, gap in other["difference"].items():
        interval = " to ".join(map(_signed, gap["ci95"])) if gap["ci95"] else "no interval"
        notes.append(f"{metric}, {names}: {result['avg'][metric]:.2f} - {other['avg'][metric]:.2f} "
                     f"= {_signed(gap['value'])} points ({interval}), paired.")
    if result.get("unread") or other.get("unread"):
        headline = next(iter(other["difference"]))
        (low, high), (other_low, other_high) = (
            (part["avg"][headline], part.get("at_most", part["avg"][headline]))
            for part in (result, other))
        notes.append(f"{headline}, {names}: between {_signed(low - other_high)} and "
                     f"{_signed(high - other_low)} points, whatever the unread replies say "
                     f"({result['unread']:,} and {other['unread']:,}).")
    return notes
