"""The benchmarks, a row each: how its file is read, and how replies to it are judged.

A new one is a reader in annotations.py and a row here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from mig_kit.common import UserError
from mig_kit.score import annotations, coco
from mig_kit.score.annotations import Benchmark
from mig_kit.score.choice_parsers import read_item
from mig_kit.score.own import read_own, read_own_file
from mig_kit.score.records import read_records

ASKS = "The authors ask another model which option a text means"


@dataclass(frozen=True)
class Rules:
    """How a benchmark is read and judged.

    Args:
        read: its reader; None for one whose predictions are COCO results.
        read_file: the records that `read` takes, of its file.
        score_results: of COCO results.
        protocols: the first is the default.
        is_macro: the headline is the mean over tasks; else every item counts the same.
        frame: the boxes that the authors' rule reads: "thousandths" in any brackets, "pairs" of
            thousandths, "pixels" apart from the reply; "kit" where the rule is the kit's, "" where
            the answer is no box.
        read_letter: the letter of a reply, and the rule that reads it, under `official`.
        versions: number of items -> its version; a file with another number is a part of one.
        n_items: how many its paper counts, where releases differ.
        note: on what the authors do beyond their rule.
    """

    read: Callable[[list[dict]], Benchmark] | None = None
    read_file: Callable[[str], list[dict]] = read_records
    score_results: Callable | None = None
    protocols: tuple[str, ...] = ("official", "strict")
    is_macro: bool = False
    frame: str = ""
    read_letter: Callable | None = None
    versions: dict[int, str] = field(default_factory=dict)
    n_items: int | None = None
    note: str = ""


BENCHMARKS = {
    "mig_bench": Rules(annotations.read_mig_bench, is_macro=True, frame="thousandths",
                       versions={4295: "original", 4276: "revised"}),
    "lisa": Rules(annotations.read_lisa, frame="pairs", versions={200: "val", 779: "test"}),
    "revos": Rules(annotations.read_revos, frame="pairs"),
    "ref_l4": Rules(annotations.read_ref_l4, frame="pixels",
                    versions={7231: "val", 38110: "test", 45341: "all"}),
    "blink": Rules(annotations.read_blink, is_macro=True, versions={1901: "val"},
                   read_letter=partial(read_item, is_blink=True), note=f"{ASKS}."),
    "mmiu": Rules(annotations.read_mmiu, is_macro=True, read_letter=read_item, n_items=11698, note=(
        f'{ASKS}, and count an empty choice as correct and leave out "GPT error".')),
    "mc_bench": Rules(score_results=coco.score_mc_bench, protocols=("official",), n_items=2000),
    "odinw": Rules(score_results=coco.score_odinw, protocols=("official",)),
    "own": Rules(read_own, read_own_file, protocols=("free_text", "strict"), frame="kit")}
# asked by `mig-kit eval`: not what wants every box of an image, with a score
RUNNABLE = tuple(name for name, rules in BENCHMARKS.items() if rules.read and rules.frame != "kit")


def find_rules(name: str) -> Rules:
    """The row of a benchmark; UserError if there is none of this name."""
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark '{name}'; the benchmarks are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_benchmark(name: str, records: list[dict]) -> Benchmark:
    """A benchmark's annotation file, read, with its version and whether it is complete."""
    rules = find_rules(name)
    benchmark = replace(rules.read(records), name=name)
    if not rules.versions:
        return replace(benchmark, complete=len(records) == rules.n_items or None)
    release, version = rules.versions.get(len(benchmark.items), "subset"), benchmark.version
    if version not in rules.versions.values():
        version = ", ".join(filter(None, (release, version)))
    is_complete = release != "subset" and version.startswith(release)
    return replace(benchmark, version=version, complete=is_complete)
