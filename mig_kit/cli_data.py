"""`mig-kit data`: check, look at, import and compare training data; nothing here loads a model."""

from pathlib import Path

import click

from mig_kit.image_files import ORIENTATIONS

orientation_option = click.option(
    "--orientation", default="upright", show_default=True, type=click.Choice(ORIENTATIONS),
    help="Photos with an EXIF orientation: turned upright, or refused.")


@click.group()
def data() -> None:
    """Check, look at and compare training data; nothing here loads a model."""


@data.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--show", default=100, show_default=True, type=click.IntRange(0),
              help="How many wrong lines to print.")
@orientation_option
def check(file: Path, root: Path | None, show: int, orientation: str) -> None:
    """Say line by line what is wrong with FILE, a JSONL of your own data, and its images, which are
    decoded.

    Its format is in mig_kit/data/own_data.py.
    """
    from mig_kit.data import own_data

    total = wrong = 0
    for number, problems in own_data.check_file(file, root or file.parent, orientation):
        total += 1
        wrong += bool(problems)
        if problems and wrong <= show:
            click.echo(f"line {number}: {'; '.join(problems)}")
    more = f" (the first {show} shown)" if wrong > show else ""
    click.echo(f"{total} lines, {total - wrong} correct, {wrong} wrong{more}")
    if not total:
        raise ValueError(f"{file} has no line; write one JSON object a line, a question each")
    if wrong:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--out", default="preview.html", show_default=True,
              type=click.Path(dir_okay=False, path_type=Path), help="A .png or an .html.")
@click.option("--count", default=12, show_default=True, type=click.IntRange(1, 200),
              help="How many questions, from the top.")
@orientation_option
def preview(file: Path, root: Path | None, out: Path, count: int, orientation: str) -> None:
    """Draw the boxes of FILE's first questions on their images."""
    from mig_kit.data import own_data
    from mig_kit.data.preview import write_preview

    samples = own_data.iter_samples(file, root or file.parent, count, orientation)
    click.echo(f"{write_preview(samples, out)} questions drawn: {out}")


@data.command("import")
@click.argument("form", metavar="FORMAT", type=click.Choice(["swift", "llava", "coco", "refcoco"]))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="Where the JSONL of own data goes.")
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Image root; else FILE's folder.")
@click.option("--coordinates", type=click.Choice(["pixels", "normalized_1000", "normalized_1"]),
              help="Of boxes in texts (llava, or swift without objects), which do not say it.")
@click.option("--padded", is_flag=True,
              help="Boxes are of the image padded to a square, as in LLaVA-1.5's files.")
@click.option("--several", type=click.Choice(["any", "all"]),
              help="Of several boxes in an answer any is correct, or all must be found; without "
                   "it, such answers are left out.")
@click.option("--question", default="", help='coco, refcoco: what is asked, as "Find the {name}.".')
@click.option("--instances", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="refcoco: the instances.json of the refs.")
@click.option("--show", default=100, show_default=True, type=click.IntRange(0),
              help="How many problems to print.")
@orientation_option
def import_command(form: str, file: Path, out: Path, root: Path | None, coordinates: str | None,
                   padded: bool, several: str | None, show: int, **rules) -> None:
    """Write FILE, a data set of another project, as own data: swift (ms-swift), llava (LLaVA,
    ShareGPT, Qwen-VL, VLM-R1), coco or refcoco; and say what is left out, and why.
    """
    from mig_kit.data import importers
    from mig_kit.data.conversations import TextRules

    text = TextRules(coordinates or "", padded, several or "")
    problems = 0

    def print_problem(sentence: str) -> None:
        nonlocal problems
        problems += 1
        if problems <= show:
            click.echo(sentence.encode("utf-8", "backslashreplace").decode())

    report = importers.import_file(
        form, file, out, importers.ImportRules(root or file.parent, text, **rules), print_problem)
    more = f" (the first {show} shown)" if problems > show else ""
    written = f"{report.kept} written to {out}" if report.kept else "nothing written"
    if not report.kept and out.exists():
        written += f", {out} is as it was"
    click.echo(f"{report.read} questions read, {written}, {problems} left out{more}")
    if not report.kept:
        raise click.exceptions.Exit(1)


@data.command("mgrounding")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--root", required=True, help="Where the archives were unpacked.",
              type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--unstated", nargs=2, multiple=True, type=(str, int), metavar="SUBSET IMAGE",
              help="Image number to take in a subset whose answers name none.")
@click.option("--limit", type=click.IntRange(1), help="Stop after so many questions.")
@orientation_option
def mgrounding_command(file: Path, root: Path, unstated, limit: int | None,
                       orientation: str) -> None:
    """Read FILE, MGrounding-630k's annotations, and say what is kept and what is left out, and why.
    """
    from mig_kit.data import mgrounding

    report = mgrounding.check_annotations(file, root, dict(unstated), limit, orientation)
    click.echo(report.summarize())
    if not report.kept:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("train", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("held_out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bits", default=4, show_default=True, type=click.IntRange(0, 32),
              help="Of 64 hash bits, how many may differ.")
@click.option("--limit", type=click.IntRange(1), help="Look at so many images of each folder.")
@orientation_option
def duplicates(train: Path, held_out: Path, bits: int, limit: int | None,
               orientation: str) -> None:
    """List images below TRAIN that are nearly images below HELD_OUT (perceptual hash); exit code 1
    if there are any.
    """
    from mig_kit.image_files import (
        SkipReport,
        find_near_duplicates,
        iter_images,
        perceptual_hashes,
    )

    report = SkipReport()
    train_hashes, held_out_hashes = (
        perceptual_hashes(iter_images(folder, report, limit, orientation))
        for folder in (train, held_out))
    left_out = [f"left out, {reason}: {report.counts[reason]} ({', '.join(names)})"
                for reason, names in report.names.items()]
    for folder, (names, _) in ((train, train_hashes), (held_out, held_out_hashes)):
        if not names:
            click.echo("\n".join(left_out), nl=bool(left_out))
            raise ValueError(f"there is no image that can be read below {folder}; name the folder "
                             "of the images")
    pairs = 0
    for name, other, distance in find_near_duplicates(train_hashes, held_out_hashes, bits):
        pairs += 1
        click.echo(f"{train / name}\t{held_out / other}\t{distance} bits")
    click.echo(f"{len(train_hashes[0])} against {len(held_out_hashes[0])} images: "
               f"{pairs} pairs within {bits} bits")
    click.echo("\n".join(left_out), nl=bool(left_out))
    if pairs:
        raise click.exceptions.Exit(1)
