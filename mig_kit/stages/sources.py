"""Stage 01, the questions: drawn scenes, your own JSONL, or MGrounding-630k, as one cold-start, RL
and validation set.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

from mig_kit.common import PROJECT_ROOT, progress_bar, write_atomically
from mig_kit.data import mgrounding, own_data
from mig_kit.image_files import (
    IMAGE_FOLDER,
    IMAGE_MANIFEST,
    BadImage,
    ImageStore,
    LazyImages,
    SkipReport,
)
from mig_kit.sample import Sample, SampleWriter, TableRows, Trace, read_samples
from mig_kit.world import suites
from mig_kit.world.find_all import draw_find_all

SET_NAMES = ("cot", "rl", "val")
# the file of each set while 01 runs; the questions of cot.parquet await their traces
FILE_OF_SET = {"cot": "questions.parquet", "rl": "rl.parquet", "val": "val.parquet"}
TEACHERS = ("rules", "endpoint", "own", "none")
REPORT_FILE = "left_out.txt"
NAMES_FILE = "left_out_names.txt"  # everything that the report counts, where there is any


def load_training_sets(p: SimpleNamespace, folder: Path) -> tuple[dict[str, TableRows], str]:
    """The three sets that the parameters of 01 ask for, and a text on what was left out and why, ""
    for a source that leaves nothing out.

    They are written to FILE_OF_SET in `folder` as they are read, real images to its images/ as
    they are; what an earlier, killed run completed is read from there. The questions of the set
    cot hold the replies that came with them. Relative paths start at the project's folder. A
    damaged image's question is left out and counted. ValueError for an unknown source or teacher,
    a source that the teacher cannot write about, and a set that stays empty. OwnDataError for a
    wrong line, FileNotFoundError for a missing file or image root, before anything is written.
    """
    check_source(p)
    report_file = folder / REPORT_FILE
    files = [report_file, *(folder / file for file in FILE_OF_SET.values())]
    if not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        text = _write_drawn_sets(p, folder) if p.data == "scenes" else _write_real_sets(p, folder)
        write_atomically(report_file, lambda temporary: temporary.write_text(text))
    sets = {name: read_samples(folder / file) for name, file in FILE_OF_SET.items()}
    return sets, report_file.read_text()


def check_source(p: SimpleNamespace) -> None:
    """ValueError or FileNotFoundError, with the fix, for parameters of 01 that name no usable
    source; reads no data.
    """
    if p.teacher not in TEACHERS:
        raise ValueError(f"teacher is '{p.teacher}'; use one of {', '.join(TEACHERS)}")
    if p.data not in ("scenes", "own", "mgrounding"):
        raise ValueError(f"data is '{p.data}'; use scenes, own or mgrounding")
    if p.teacher == "own" and p.data != "own":
        raise ValueError(f"the teacher 'own' is the key 'reply' of data 'own'; with data "
                         f"'{p.data}' use another teacher")
    if p.lesson_questions and p.data != "scenes":
        raise ValueError(f"lesson_questions are drawn, for the tiny base; with data '{p.data}' set "
                         "it to 0")
    if p.cot_find_all_per_task and p.teacher == "none":
        raise ValueError("cot_find_all_per_task is for the cold start, which teacher 'none' leaves "
                         "out; set it to 0, or use rl_find_all_per_task")
    if p.data == "scenes":
        return
    if p.cot_find_all_per_task or p.rl_find_all_per_task:
        raise ValueError(f"cot_find_all_per_task and rl_find_all_per_task are drawn; with data "
                         f"'{p.data}' set them to 0")
    if p.teacher == "rules":
        raise ValueError(f"the rules teacher reads drawn scenes only; with data '{p.data}' set "
                         "teacher to none and start_from to base (RL alone: images, question and "
                         "target are enough), to own (your key 'reply') or to endpoint")
    if not p.data_file:
        raise ValueError(f"data is '{p.data}': name its file in data_file")
    path, root = source_paths(p)
    if not path.is_file() or not root.is_dir():
        raise FileNotFoundError(f"data_file {path} or image_root {root} is not there")
    shares = p.data_shares
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"data_shares is {shares}; give three shares, of cot, rl and val, that "
                         "sum to 1")


def source_paths(p: SimpleNamespace) -> tuple[Path, Path]:
    """The annotation file and the folder of its images."""
    path = PROJECT_ROOT / p.data_file
    return path, PROJECT_ROOT / p.image_root if p.image_root else path.parent


def _write_drawn_sets(p: SimpleNamespace, folder: Path) -> str:
    samples = {
        "cot": chain(
            suites.draw_training_mix("cot", p.cot_per_task, p.free_form_per_task, p.seed),
            draw_find_all("cot", p.cot_find_all_per_task, p.seed)),
        "rl": chain(
            suites.draw_training_mix("rl", p.rl_per_task, p.rl_free_form_per_task, p.seed,
                                     p.rl_boxes_per_task),
            draw_find_all("rl", p.rl_find_all_per_task, p.seed)),
        "val": suites.draw_task_samples("val", p.val_per_task, p.seed)}
    with ExitStack() as stack:
        for name, writer in _open_writers(folder, stack).items():
            if name != "cot" or p.teacher != "none":
                for sample in samples[name]:
                    writer.write(sample, Trace("", "", "") if name == "cot" else None)
    return ""


def _open_writers(folder: Path, stack: ExitStack) -> dict[str, SampleWriter]:
    return {name: stack.enter_context(SampleWriter(folder / file, with_traces=name == "cot"))
            for name, file in FILE_OF_SET.items()}


def _write_real_sets(p: SimpleNamespace, folder: Path) -> str:
    (folder / NAMES_FILE).unlink(missing_ok=True)  # of a killed start
    report = SkipReport(file=folder / NAMES_FILE)
    shares = p.data_shares
    if p.teacher == "none":
        shares = [0.0, shares[0] + shares[1], shares[2]]
    images_of_set: dict[str, set[int]] = {name: set() for name in SET_NAMES}
    with ExitStack() as stack:
        store = None
        writers = None
        for sample, reply in _iter_source(p, report):
            if writers is None:  # the first question is there, so no line was wrong
                store = ImageStore(folder / IMAGE_FOLDER)
                writers = _open_writers(folder, stack)
            try:
                images = LazyImages([store.add(image.content) for image in sample.images.encoded])
            except BadImage as error:
                report.kept -= 1
                report.add(error.reason, f"{sample.id}: {error}")
                continue
            stored = replace(sample, images=images)
            name = choose_set(images.encoded[0].sha256, shares)
            if name == "cot" and p.teacher == "own" and not reply:
                name = "rl"
            images_of_set[name] |= {int(image.sha256[:16], 16) for image in images.encoded}
            writers[name].write(stored, Trace(reply, "own", "") if name == "cot" else None)
        counts = {name: writer.n_written for name, writer in (writers or {}).items()}
        _require_questions(counts, p.teacher, report)
        write_atomically(folder / IMAGE_MANIFEST,
                         lambda temporary: temporary.write_text(store.manifest()))
    n_shared = len(images_of_set["val"] & (images_of_set["cot"] | images_of_set["rl"]))
    names = f"all of them by name: {NAMES_FILE}\n" if report.counts else ""
    return (f"{report.summarize()}\n{names}held out: {counts['val']} questions; {n_shared} of "
            f"their {len(images_of_set['val'])} images are also in training\n")


def _iter_source(p: SimpleNamespace, report: SkipReport) -> Iterator[tuple[Sample, str]]:
    """(sample, its own reply or "") of the data file, with a bar and the time left."""
    path, root = source_paths(p)
    limit = p.data_limit or None
    if p.data == "own":
        n_lines = own_data.require_correct_lines(path, root, limit, p.orientation)
        lines = own_data.iter_replied_samples(path, root, limit, report, p.orientation)
        with progress_bar(None, "store questions", total=n_lines) as bar:
            for number, sample, reply in lines:
                yield sample, reply
                bar.update(number - bar.n)
        return
    with progress_bar(None, "store questions", total=path.stat().st_size, unit="B",
                      unit_scale=True) as bar:
        for sample in mgrounding.iter_samples(path, root, report, limit=limit,
                                              on_bytes=bar.update, orientation=p.orientation):
            yield sample, ""


def _require_questions(counts: dict[str, int], teacher: str, report: SkipReport) -> None:
    """ValueError if a set stays empty; without a teacher there is no cold-start set."""
    needed = SET_NAMES if teacher != "none" else SET_NAMES[1:]
    empty = [name for name in needed if not counts.get(name)]
    if empty:
        raise ValueError(f"no question fell to {' and '.join(empty)}; raise data_limit or change "
                         f"data_shares\n{report.summarize()}")


def choose_set(sha256: str, shares: list[float]) -> str:
    """One of SET_NAMES, by the hash of a question's first image: all questions on it share a set.

    shares: of cot, rl and val. Other images of a question may still be shared between sets;
    compare folders with `mig-kit data duplicates`.
    """
    position = int(sha256[:16], 16) / 2**64
    if position < shares[0]:
        return "cot"
    return "rl" if position < shares[0] + shares[1] else "val"
