"""`mig-kit data`: check, look at, import and compare training data; nothing here loads a model."""

import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import click

from mig_kit.boxes import MODEL_COORDINATES, BoxFormat
from mig_kit.pipeline.params import profile_params

SHOWN = 100  # problems that a command prints


@click.group()
def data() -> None:
    """Check, look at and compare training data; nothing here loads a model."""


def file_arguments(command):
    """FILE, and the root of its images."""
    for option in (
            click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
                         help="Image root; else FILE's folder."),
            click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))):
        command = option(command)
    return command


@data.command()
@file_arguments
@click.option("--profile", help="Also find prompts that are too long for this profile's base "
                                "model, whose tokenizer is loaded: tiny, or a folder of params/.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the correct lines here.")
def check(file: Path, root: Path | None, profile: str | None, out: Path | None) -> None:
    """Say line by line what is wrong with FILE, your own data, and its images, which are decoded.

    FILE has a JSON object a line, or holds a list of them. The guide, notebooks/guide/own_data.md,
    says what is in one.
    """
    from mig_kit.data import own_data, records
    from mig_kit.data.remarks import Remarks

    if out and out.exists() and out.samefile(file):
        raise ValueError(f"--out {out} is FILE itself; name another file")
    total, wrong, word, remarks = 0, 0, records.entry_word(file), Remarks()
    measure, formats = _prompt_measure(profile), _box_formats(profile)
    lines, is_held = [], root is None  # held: as long as no image was found, --root may be missing
    checked = zip(own_data.check_file(file, root or file.parent, measure, formats, remarks),
                  records.iter_entries(file))
    temporary = out and out.with_name(f"{out.name}.tmp")
    with temporary.open("w") if out else nullcontext() as correct:
        for (number, problems), (_, record, _) in checked:
            total += 1
            wrong += bool(problems)
            is_held &= any("image root" in problem for problem in problems)
            if problems and wrong <= SHOWN:
                lines.append(f"{word} {number}: {'; '.join(problems)}")
            if not is_held:
                click.echo("\n".join(lines), nl=bool(lines))
                lines = []
            if correct and not problems:
                correct.write(json.dumps(record) + "\n")
    is_written = bool(out) and wrong < total  # an older file is not replaced by none
    if out:
        temporary.replace(out) if is_written else temporary.unlink()
    if lines:
        click.echo(f"no image was found below {file.absolute().parent}; name the folder of the "
                   f"images with --root ({lines[0]})")
    more = f" (the first {SHOWN} shown)" if wrong > SHOWN else ""
    place = f"; the correct ones are in {out} (image root: {root or file.parent})"
    click.echo(f"{total} {word}s, {total - wrong} correct, {wrong} wrong{more}{place * is_written}")
    for sentence in remarks.sentences():
        click.echo(f"remark: {sentence}")
    if not total:
        raise ValueError(f"{file} has no {word}; write one JSON object a line, a question each")
    if wrong:
        raise click.exceptions.Exit(1)


def _prompt_measure(profile: str | None):
    """Says whether a sample's prompt is too long for the profile's model; None without one."""
    if not profile:
        return None
    from mig_kit.models import loading, processors

    model = profile_params("01_synthesize", profile)["base_model"]
    return processors.prompt_measure(loading.resolve_model(model), *_box_formats(profile))


def _box_formats(profile: str | None) -> list[BoxFormat]:
    """How a profile's model writes boxes; without a profile, all ways."""
    if not profile:
        return [BoxFormat(coordinates=coordinates) for coordinates in MODEL_COORDINATES]
    params = profile_params("01_synthesize", profile)
    return [BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])]


@data.command()
@file_arguments
@click.option("--out", default="preview.html", show_default=True,
              type=click.Path(dir_okay=False, path_type=Path), help="The page.")
@click.option("--count", default=12, show_default=True, type=click.IntRange(1, 200),
              help="How many questions, from the top.")
def preview(file: Path, root: Path | None, out: Path, count: int) -> None:
    """Draw the boxes of FILE's first questions on their images, of those lines that are correct.

    The guide, notebooks/guide/own_data.md, says what is in a line.
    """
    from mig_kit.data import own_data, records
    from mig_kit.data.preview import write_preview

    lines = own_data.iter_checked_lines(file, root or file.parent, decodes=True)
    wrong = 0

    def iter_correct():
        nonlocal wrong
        for line in lines:
            wrong += bool(line.problems)
            if line.problems and wrong <= 10:
                click.echo(f"{records.entry_word(file)} {line.number}: {line.problems[0]}")
            elif not line.problems:
                yield line.sample

    n_drawn = write_preview(islice(iter_correct(), count), out)
    click.echo(f"{n_drawn} questions drawn, {wrong} wrong left out: {out}")
    if wrong:
        raise click.exceptions.Exit(1)


@data.command("import")
@click.argument("form", metavar="FORMAT", type=click.Choice(
    ["own", "swift", "llava", "verl", "coco", "refcoco", "mgrounding"]))
@file_arguments
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Where the JSONL of own data goes.")
@click.option("--coordinates", type=click.Choice(["pixels", "normalized_1000", "normalized_1"]),
              help="Of boxes in texts (llava, verl, swift without objects), which do not say it.")
@click.option("--padded", is_flag=True,
              help="Boxes are of the image padded to a square, as in LLaVA-1.5's files.")
@click.option("--several", type=click.Choice(["any", "all"]),
              help="Of several boxes in an answer any is correct, or all must be found; without "
                   "it, such answers are left out.")
@click.option("--split", default="train", show_default=True,
              help="What is taken of a file whose records name their splits.")
@click.option("--instances", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="refcoco: the instances.json of the refs.")
def import_command(form: str, file: Path, out: Path, root: Path | None, coordinates: str | None,
                   padded: bool, several: str | None, split: str, instances: Path | None) -> None:
    """Write FILE, a data set of another project, as own data, and say what is left out, and why.

    swift: ms-swift. llava: LLaVA, ShareGPT, Qwen-VL, VLM-R1, OpenAI. verl: EasyR1, verl. coco.
    refcoco. mgrounding: MGrounding-630k. own: own data whose images are in the file (bytes), or
    whose questions hold tags such as <image>, which are taken out. FILE is JSON or parquet (whose
    root, where images in it are written, is OUT's folder if none is given).
    """
    from mig_kit.data import importers, records

    root = root or (out if records.entry_word(file) == "row" else file).parent
    problems = 0

    def print_problem(sentence: str) -> None:
        nonlocal problems
        if "which --split" in sentence:  # the summary counts those
            return
        problems += 1
        if problems <= SHOWN:
            click.echo(sentence.encode("utf-8", "backslashreplace").decode())

    report = importers.import_file(form, file, out, records.ImportRules(
        root, coordinates or "", padded, several or "", instances, split), print_problem)
    more = f" (the first {SHOWN} shown)" if problems > SHOWN else ""
    written = f"{report.kept} written to {out}" if report.kept else "nothing written"
    if report.kept and root.resolve() != out.parent.resolve():
        written += f" (image root: {root})"
    n_left_out = report.counts.total()
    click.echo(f"{report.read} questions read, {written}, {n_left_out} left out{more}")
    if min(len(report.counts), problems) < n_left_out:
        click.echo(report.summarize())
    for sentence in report.remarks:
        click.echo(f"remark: {sentence}")
    if not report.kept:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("train", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, file_okay=False, path_type=Path))
def duplicates(train: Path, held_out: Path) -> None:
    """List images below TRAIN that are nearly images below HELD_OUT (perceptual hash); exit code 1
    if there are any.
    """
    from mig_kit.data.duplicates import find_near_duplicates, hash_images
    from mig_kit.data.records import SkipReport

    report = SkipReport()
    hashes = [hash_images(folder, report) for folder in (train, held_out)]
    for reason, names in report.names.items():
        click.echo(f"left out, {reason}: {report.counts[reason]} ({', '.join(names)})")
    for folder, (names, _) in zip((train, held_out), hashes):
        if not names:
            raise ValueError(f"there is no image that can be read below {folder}; name the folder "
                             "of the images")
    pairs = 0
    for name, other, distance in find_near_duplicates(*hashes):
        pairs += 1
        click.echo(f"{train / name}\t{held_out / other}\t{distance} bits")
    click.echo(f"{len(hashes[0][0])} against {len(hashes[1][0])} images: {pairs} pairs")
    if pairs:
        raise click.exceptions.Exit(1)
