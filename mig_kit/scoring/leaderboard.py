"""Published numbers to set beside one's own, each with its version, protocol and source.

Percent, Acc@0.5 unless a row says otherwise.
"""

from dataclasses import dataclass

from mig_kit.scoring.annotations import count_and_list

TASKS = ("diff", "view_diff", "common_object", "object_tracking", "multi_view", "region",
         "refer_grounding", "group_grounding", "reasoning", "correspondence")
PAPER = "arXiv 2507.00748, its final 7B model; version and protocol not stated"
MG_THINKER = "MG-Thinker's table"


@dataclass(frozen=True)
class PublishedRow:
    """One system's published numbers.

    tasks: task -> percent, may be empty. avg: percent, or None.
    """

    system: str
    source: str
    tasks: dict[str, float]
    avg: float | None


def _published_row(system: str, source: str, *values: float) -> PublishedRow:
    """values: percent of TASKS in their order, then the average."""
    return PublishedRow(system, source, dict(zip(TASKS, values[:-1], strict=True)), values[-1])


MIG_BENCH = {
    "original": (
        _published_row(
            "Migician 7B",
            "arXiv 2501.05767; its script scales this model's y1 by 1.05 and y2 by 1.10",
            65.15, 46.81, 84.19, 70.73, 60.07, 74.31, 76.77, 66.53, 59.41, 34.19, 63.82),
        PublishedRow("MIRG-RL", "highest found on this version", {}, 64.82),
    ),
    "revised": (
        _published_row(
            "Qwen2.5-VL-7B", MG_THINKER,
            29.92, 22.45, 16.36, 6.94, 3.66, 15.05, 35.67, 63.51, 4.03, 3.42, 20.10),
        _published_row(
            "Qwen2-VL-72B", MG_THINKER,
            51.13, 43.61, 73.74, 24.54, 32.63, 19.86, 37.37, 67.83, 50.51, 17.94, 41.91),
        _published_row(
            "Migician 7B", MG_THINKER,
            70.64, 45.74, 72.76, 67.82, 60.07, 72.57, 75.76, 84.12, 52.58, 33.33, 63.54),
        _published_row(
            "UniVG-R1 7B", "arXiv 2505.14231",
            71.97, 58.51, 93.13, 76.36, 66.32, 81.71, 82.83, 88.04, 62.89, 44.44, 72.64),
        _published_row(
            "MG-Thinker 7B", MG_THINKER,
            78.98, 62.77, 93.01, 82.55, 66.67, 88.78, 86.87, 88.25, 72.16, 47.01, 76.71),
    ),
}
PAPER_AVERAGES = {"lisa": 59.44, "revos": 49.16, "mc_bench": 58.49, "odinw": 54.15, "blink": 61.18,
                  "mmiu": 49.93}


def published_rows(benchmark: str, version: str) -> tuple[PublishedRow, ...]:
    """The rows known for a benchmark and version; empty where none is."""
    if benchmark == "mig_bench":
        return MIG_BENCH[version]
    if benchmark in PAPER_AVERAGES:
        return (PublishedRow("paper", PAPER, {}, PAPER_AVERAGES[benchmark]),)
    return ()


def score_markdown(result: dict) -> str:
    """A result of `mig-kit score` as a Markdown table, and the notes below it.

    Published numbers stand in the last columns.
    """
    published = published_rows(result["benchmark"], result["version"])
    headline, *others = _shown_metrics(result)
    has_interval = "ci95" in result["avg"]
    interval_head = ["95 %"] if has_interval else []
    systems = [row.system for row in published]
    lines = [["task", "n", headline, *interval_head, *others, *systems]]
    lines.append(["---"] * len(lines[0]))
    average = {"n": result["n"], **result["avg"]}
    for name, values in [*result["tasks"].items(), ("avg", average)]:
        interval = [" to ".join(f"{bound:.1f}" for bound in values.get("ci95", ()))]
        known = [row.avg if name == "avg" else row.tasks.get(name) for row in published]
        lines.append([name, str(values["n"]), _number(values.get(headline)),
                      *(interval if has_interval else []),
                      *(_number(values.get(metric)) for metric in others),
                      *(_number(value) for value in known)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, "", *table_notes(result, published)])


def _shown_metrics(result: dict) -> list[str]:
    """The metrics of the average that any task has, the headline first; all of them if none has."""
    metrics = [name for name in result["avg"] if name != "ci95"]
    shown = [name for name in metrics if any(name in task for task in result["tasks"].values())]
    return shown or metrics


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table_notes(result: dict, published: tuple[PublishedRow, ...]) -> list[str]:
    """Sentences on what the table's numbers mean, and where the published ones come from."""
    benchmark, protocol = result["benchmark"], result["protocol"]
    version = result["version"] or "as given"
    notes = [f"{benchmark}, version {version}, protocol {protocol}, {result['n']} items."]
    if not result["complete"]:
        notes.append("The annotations do not hold every item of the benchmark: do not set these "
                     "numbers beside published ones.")
    if published and protocol != "official":
        notes.append("Published columns follow the authors' own rules, not this protocol.")
    if benchmark in ("blink", "mmiu") and protocol == "official":
        notes.append("Letters are read from the text alone; the authors ask another model where "
                     "the text is not an option itself.")
    notes += [f"{row.system}: {row.source}." for row in published]
    counts = sorted(result["problems"].items(), key=lambda problem: -problem[1])
    notes += [f"Replies, {reason}: {count}." for reason, count in counts]
    for kind, names in result["notes"].items():
        notes.append(f"Annotations, {kind}: {count_and_list(names)}.")
    if "compare" in result:
        notes += _comparison_notes(result)
    return notes


def _comparison_notes(result: dict) -> list[str]:
    notes = []
    systems = f"{result['predictions']} minus {result['compare']['predictions']}"
    for metric, gap in result["compare"]["difference"].items():
        interval = " (no interval)"
        if gap["ci95"]:
            low, high = gap["ci95"]
            interval = f" ({low:+.2f} to {high:+.2f})"
        notes.append(f"{metric}, {systems}: {gap['value']:+.2f} points{interval}, paired.")
    return notes
