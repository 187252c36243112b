"""Stage 01, the questions: synthetic scenes or own data, as cold-start, RL and validation set."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from mig_kit.common import PROJECT_ROOT, UserError, progress_bar, write_atomically
from mig_kit.data import own_data
from mig_kit.image_files import IMAGE_FOLDER, IMAGE_MANIFEST, BadImage, ImageStore, LazyImages
from mig_kit.sample import SampleWriter, TableRows, Trace, read_samples
from mig_kit.world import suites

# the file of each set while 01 runs; the questions of cot.parquet await their traces
FILE_OF_SET = {"cot": "questions.parquet", "rl": "rl.parquet", "val": "val.parquet"}
SET_NAMES = tuple(FILE_OF_SET)
REPORT_FILE = "left_out.txt"
NAMES_FILE = "left_out_names.txt"  # questions that are left out, where there are any
MORE_HELD_OUT = ("hold out more of a small set (the last of data_shares, as 0.3), or give more "
                 "questions")


def load_training_sets(p: SimpleNamespace, folder: Path) -> tuple[dict[str, TableRows], str]:
    """The three sets that the parameters of 01 ask for, and a text on what was left out, or "".

    They are written to FILE_OF_SET in `folder`, real images as they are to its images/; what a
    killed run completed is read from there. A question with a damaged image is left out and
    counted. UserError for a wrong line or a set that stays empty.
    """
    report_file, files = folder / REPORT_FILE, [folder / file for file in FILE_OF_SET.values()]
    if not all(file.is_file() for file in (report_file, *files)):
        folder.mkdir(parents=True, exist_ok=True)
        text = _write_drawn_sets(p, folder) if p.data == "scenes" else _write_real_sets(p, folder)
        write_atomically(report_file, lambda temporary: temporary.write_text(text))
    return dict(zip(SET_NAMES, map(read_samples, files))), report_file.read_text()


def _write_drawn_sets(p: SimpleNamespace, folder: Path) -> str:
    samples = {
        "cot": suites.iter_training_mix("cot", p.cot_per_task, p.free_form_per_task, p.seed),
        "rl": suites.iter_training_mix("rl", p.rl_per_task, p.rl_free_form_per_task, p.seed,
                                       p.rl_boxes_per_task, suites.CANDIDATE_WORLDS),
        "val": suites.iter_training_mix("val", p.val_per_task, 0, p.seed)}
    if p.teacher == "none":
        samples["cot"] = ()
    for name, part in samples.items():
        trace = Trace("", "", "") if name == "cot" else None
        with SampleWriter(folder / FILE_OF_SET[name], with_traces=bool(trace)) as writer:
            for sample in part:
                writer.write(sample, trace)
    return ""


def _write_real_sets(p: SimpleNamespace, folder: Path) -> str:
    (folder / NAMES_FILE).unlink(missing_ok=True)  # of a killed start
    left_out: list[str] = []
    shares = p.data_shares
    if p.teacher == "none":
        shares = [0.0, shares[0] + shares[1], shares[2]]
    images_of_set: dict[str, set[int]] = {name: set() for name in SET_NAMES}
    path = PROJECT_ROOT / p.data
    root = PROJECT_ROOT / p.image_root if p.image_root else path.parent
    n_lines = own_data.require_correct_lines(path, root)
    with ExitStack() as stack:
        store = ImageStore(folder / IMAGE_FOLDER)
        writers = {name: stack.enter_context(SampleWriter(folder / file, name == "cot"))
                   for name, file in FILE_OF_SET.items()}
        bar = stack.enter_context(progress_bar(None, "store questions", total=n_lines))
        for line in own_data.iter_checked_lines(path, root):
            bar.update()
            if line.problems:
                left_out.append(f"{line.place}: {line.problems[0]}\n")
                continue
            sample = line.sample
            try:
                images = LazyImages(tuple(store.add(image.content)
                                          for image in sample.images.encoded))
            except BadImage as error:
                if error.reason != "unreadable image":
                    raise
                left_out.append(f"{line.place}: {error}\n")
                continue
            stored = replace(sample, images=images)
            name = choose_set(images.encoded[0].sha256, shares)
            if name == "cot" and p.teacher == "own" and not line.reply:
                name = "rl"
            images_of_set[name] |= {int(image.sha256[:16], 16) for image in images.encoded}
            writers[name].write(stored, Trace(line.reply, "own", "") if name == "cot" else None)
        counts = {name: writer.n_written for name, writer in writers.items()}
        summary = (f"{n_lines} questions, {len(left_out)} of them left out: their images cannot be "
                   f"decoded{f' ({NAMES_FILE})' if left_out else ''}")
        needed = SET_NAMES if p.teacher != "none" else SET_NAMES[1:]
        if empty := [name for name in needed if not counts[name]]:
            raise UserError(f"no question fell to {' and '.join(empty)}, with data_shares "
                            f"{p.data_shares}; {MORE_HELD_OUT}\n{summary}")
        if left_out:
            (folder / NAMES_FILE).write_text("".join(left_out))
        write_atomically(folder / IMAGE_MANIFEST,
                         lambda temporary: temporary.write_text(store.manifest()))
    n_shared = len(images_of_set["val"] & (images_of_set["cot"] | images_of_set["rl"]))
    return (f"{summary}\n{counts['cot'] + counts['rl']} questions to train, "
            f"{describe_held_out(counts['val'], p)}\n{n_shared} of the "
            f"{len(images_of_set['val'])} held-out images are also in training\n")


def describe_held_out(n_questions: int, p: SimpleNamespace) -> str:
    """How many questions nothing trains on, and what a few of them mean for own data."""
    text = f"{n_questions} held out"
    if p.data == "scenes" or n_questions >= 96:
        return text
    # half the widest 95 % interval of a share of n is 98 / sqrt(n) points
    points = min(50, round(98 / max(1, n_questions)**0.5))
    return f"{text}, which tell a score to about {points} points either way: {MORE_HELD_OUT}"


def choose_set(sha256: str, shares: list[float]) -> str:
    """One of SET_NAMES by the hash of a question's first image; shares: of cot, rl and val."""
    position = int(sha256[:16], 16) / 2**64
    if position < shares[0]:
        return "cot"
    return "rl" if position < shares[0] + shares[1] else "val"
