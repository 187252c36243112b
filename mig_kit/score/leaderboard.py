"""Published numbers to set beside one's own: percent, Acc@0.5 unless a row says otherwise."""

from dataclasses import dataclass

from mig_kit.score.annotations import MIG_BENCH_TASKS, PAPER_COUNTS

MEANT_SHARE = 0.1  # of replies with boxes in other coordinates, above which all may be meant so

PAPER = "arXiv 2507.00748, its final 7B model"
MG_THINKER = "MG-Thinker's table"
MIGICIAN = "arXiv 2501.05767"
UNIVG_R1 = "arXiv 2505.14231"


@dataclass(frozen=True)
class PublishedRow:
    """One system's published percentages."""

    system: str
    source: str
    tasks: dict[str, float]  # may be empty
    avg: float
    doubt: str = ""  # why it stands below the table and not in a column


def _published_row(system: str, source: str, *values: float, doubt: str = "") -> PublishedRow:
    """values: percent of MIG_BENCH_TASKS in their order, then the average."""
    tasks = dict(zip(MIG_BENCH_TASKS, values[:-1], strict=True))
    return PublishedRow(system, source, tasks, values[-1], doubt)


FITS_REVISED = ("inferred to be of this version: all but one of its values are shares of the "
                "revised tasks' items, and some only of those")
SUBSET = "a subset of the questions, not said which; how letters were read is not stated"
ONE_SPLIT = "of one split, not said which, and perhaps cIoU"
UNVERIFIED = "on which version of the file is not known"
PUBLISHED = {
    ("mig_bench", "original"): (
        _published_row(
            "Migician 7B", f"{MIGICIAN}; its script scales this model's y1 by 1.05 and y2 by 1.10",
            65.15, 46.81, 84.19, 70.73, 60.07, 74.31, 76.77, 66.53, 59.41, 34.19, 63.82),
        PublishedRow("Qwen2-VL-72B", f"{MIGICIAN}, repeated in {MG_THINKER}", {}, 38.88),
        PublishedRow("MIRG-RL", "arXiv 2509.21788", {}, 64.82,
                     "inferred to be of this version"),
    ),
    ("mig_bench", "revised"): (
        _published_row(
            "Qwen2-VL-72B", UNIVG_R1,
            51.13, 43.61, 73.74, 24.54, 32.63, 19.86, 37.37, 67.83, 50.51, 17.94, 41.91),
        _published_row(
            "Migician 7B", f"{UNIVG_R1}, repeated in {MG_THINKER}",
            70.64, 45.74, 72.76, 67.82, 60.07, 72.57, 75.76, 84.12, 52.58, 33.33, 63.54),
        _published_row(
            "UniVG-R1 7B", UNIVG_R1,
            71.97, 58.51, 93.13, 76.36, 66.32, 81.71, 82.83, 88.04, 62.89, 44.44, 72.64),
        _published_row(
            "MG-Thinker 7B", MG_THINKER,
            78.98, 62.77, 93.01, 82.55, 66.67, 88.78, 86.87, 88.25, 72.16, 47.01, 76.71),
        _published_row(
            "Qwen2.5-VL-7B", MG_THINKER,
            29.92, 22.45, 16.36, 6.94, 3.66, 15.05, 35.67, 63.51, 4.03, 3.42, 20.10,
            doubt=f"{UNVERIFIED}: six of its ten values are no share of the revised tasks' items"),
        PublishedRow("Qwen3-VL-8B", MG_THINKER, {}, 32.90, FITS_REVISED),
        PublishedRow("Qwen3.5-9B", MG_THINKER, {}, 41.17, FITS_REVISED),
    ),
    **{(benchmark, version): (
        PublishedRow("Qwen2.5-VL-7B", MG_THINKER, {}, qwen),
        PublishedRow("Migician 7B", UNIVG_R1, {}, migician),
        PublishedRow("UniVG-R1 7B", UNIVG_R1, {}, univg),
        PublishedRow("MG-Thinker 7B", MG_THINKER, {}, mg_thinker),
        PublishedRow("paper", PAPER, {}, paper, doubt))
        for benchmark, version, qwen, migician, univg, mg_thinker, paper, doubt in (
            ("lisa", "val", 54.06, 36.00, 64.00, 64.29, 59.44, ONE_SPLIT),
            ("lisa", "test", 50.75, 32.09, 59.69, 60.10, 59.44, ONE_SPLIT),
            ("revos", "", 26.81, 39.70, 60.03, 61.32, 49.16, "the metric is not stated"))},
    ("mc_bench", ""): (PublishedRow("paper", PAPER, {}, 58.49, "the metric is not stated"),),
    ("odinw", ""): (
        PublishedRow("paper", PAPER, {}, 54.15, "a mean over data sets, and no data set's AP"),),
    ("blink", "val"): (
        PublishedRow("paper", PAPER, {}, 61.18, SUBSET),),
    ("mmiu", ""): (
        PublishedRow("paper", PAPER, {}, 49.93, SUBSET),),
}


def score_markdown(result: dict) -> str:
    """A result of `mig-kit score` as a Markdown table beside published numbers, with notes."""
    rows = ()
    if result["complete"] is not False and result["protocol"] == "official":
        rows = PUBLISHED.get((result["benchmark"], result["version"]), ())
    published = [row for row in rows if not row.doubt]
    headline, *others = [name for name in result["avg"] if name != "ci95"]
    has_interval = "ci95" in result["avg"]
    head = ["task", "n", headline, *["95 %"] * has_interval, *others,
            *(row.system for row in published)]
    lines = [head, ["---"] * len(head)]
    average = {"n": result["n"], **result["avg"]}
    for name, values in [*result["tasks"].items(), ("avg", average)]:
        interval = " to ".join(f"{bound:.1f}" for bound in values.get("ci95", ()))
        known = [row.avg if name == "avg" else row.tasks.get(name) for row in published]
        lines.append([name, str(values["n"]), _number(values.get(headline)),
                      *[interval] * has_interval,
                      *(_number(values.get(metric)) for metric in others), *map(_number, known)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, "", *table_notes(result, rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # never -0.00


def table_notes(result: dict, published: tuple[PublishedRow, ...]) -> list[str]:
    """Sentences on what the table's numbers mean, and where the published ones come from."""
    benchmark, protocol, problems = result["benchmark"], result["protocol"], result["problems"]
    judges_letters = benchmark in ("blink", "mmiu") and protocol == "official"
    answered = result["n"] - problems.get("missing", 0)

    def is_usual(words: str) -> bool:
        return sum(count for reason, count in problems.items()
                   if words in reason) > MEANT_SHARE * answered

    rule = f"{protocol} (letters by the kit's own rule)" if judges_letters else protocol
    notes = [f"{benchmark}, version {result['version'] or 'as given'}, protocol {rule}, "
             f"{result['n']} items."]
    if problems.get("missing"):
        notes.append("Replies are missing: do not set these numbers beside published ones.")
    elif result["complete"] is False:
        notes.append("The annotations do not hold every item of the benchmark: do not set these "
                     "numbers beside published ones.")
    if result["complete"] is None and benchmark != "own":
        known = (f"its paper counts {PAPER_COUNTS[benchmark]:,}" if benchmark in PAPER_COUNTS
                 else "no number is published")
        notes.append(f"Whether these are all items of {benchmark} is not known ({known}): set "
                     "these numbers beside published ones only if they are.")
    if protocol != "official" and benchmark != "own":
        notes.append("Published figures follow the authors' own rules, so none stands beside this "
                     "protocol.")
    if result["lists"] < result["n"]:
        notes.append(f"The questions are about {result['lists']} lists of images; intervals are "
                     "over the lists, for questions about the same images stand or fall together.")
    if "ci95" in result["avg"]:
        notes.append("Intervals are Jeffreys', exact where all or none is correct; of differences "
                     "Student's t.")
    notes += result["remarks"]
    if judges_letters:
        notes.append("Letters are read from the text alone; the authors ask another model where "
                     "the text is not an option itself"
                     + (', and count an empty choice as correct and leave out "GPT error".'
                        if benchmark == "mmiu" else "."))
    notes += [f"{row.system}: {row.source}." for row in published if not row.doubt]
    notes += [f"Not in the table: {row.system} {row.avg:.2f} ({row.source}), {row.doubt}."
              for row in published if row.doubt]
    notes += [f"Replies, {reason}: {count}."
              for reason, count in sorted(problems.items(), key=lambda problem: -problem[1])]
    if is_usual("outside the image"):
        notes.append("Say what boxes outside the image are measured in: --coordinates absolute for "
                     "pixels of the resized image (Qwen2.5-VL), with the --min-pixels and "
                     "--max-pixels that its processor had, or pixels for those of the original; "
                     "both with --images.")
    if is_usual("within 0 to 1") and not any("normalized_1" in note for note in notes):
        notes.append("For boxes in 0 to 1 say --coordinates normalized_1.")
    return notes + (_comparison_notes(result) if "compare" in result else [])


def _comparison_notes(result: dict) -> list[str]:
    other = result["compare"]
    notes = [f"Replies of {other['predictions']}, {reason}: {count}."
             for reason, count in sorted(other["problems"].items())]
    systems = f"{result['predictions']} minus {other['predictions']}"
    for metric, gap in other["difference"].items():
        interval = "no interval"
        if gap["ci95"]:
            interval = " to ".join(map(_signed, gap["ci95"]))
        notes.append(f"{metric}, {systems}: {_signed(gap['value'])} points ({interval}), paired.")
    return notes
