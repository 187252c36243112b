"""Own data as a benchmark: replies of any system, judged as `mig-kit eval --suite own` judges."""

import json
import re
from pathlib import Path

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.common import UserError
from mig_kit.data.line_checks import parse_line
from mig_kit.data.records import READ_FORMS, Problem, iter_entries
from mig_kit.prompts import LETTERS, parse_reply
from mig_kit.score.annotations import Benchmark, BenchmarkItem
from mig_kit.score.choice_parsers import read_choice
from mig_kit.score.records import require_file
from mig_kit.score.reply_boxes import UNREAD, box_problem, parse_named_boxes
from mig_kit.score.result import Verdict


def read_own_file(path: str | Path) -> list[dict]:
    """The entries of a file as `mig-kit data check` reads it; UserError for what is none."""
    records = []
    for place, record in iter_entries(require_file(path)):
        if isinstance(record, Problem):
            raise UserError(f"{path}, {place}: {record}")
        records.append(record)
    if not records:
        raise UserError(f"{path} is empty; {READ_FORMS}")
    return records


def read_own(records: list[dict]) -> Benchmark:
    """The lines of an own-data file; UserError for the first wrong one."""
    items = []
    for index, record in enumerate(records):
        line, problems = parse_line(record)
        if problems:
            raise UserError(f"annotations line {index + 1}: {problems[0]} (mig-kit data check "
                            "FILE lists every line)")
        pairs = tuple((image, box) for _, image, box in line.places()
                      )[:None if line.reference is None else -1]
        options = tuple(line.options or ())
        first_image, first_box = pairs[0] if pairs else (None, None)
        items.append(BenchmarkItem(
            index, line.id or f"line-{index + 1}", line.task, line.question, tuple(line.images),
            first_box, Coordinates(line.coordinates or "pixels"), first_image, False,
            letter=line.letter or "", options=LETTERS[:len(options)], choices=options,
            targets=pairs))
    return Benchmark(tuple(items))


def read_freely(reply: str, options: tuple[str, ...], n_images: int) -> str:
    """The reply in the kit's answer format if it states a box or a letter, else unchanged.

    It is read as `strict` reads an <answer>, with or without one. A box without an image is in the
    question's only image.
    """
    if parse_reply(reply).well_formed:
        return reply
    if options:
        answer = read_choice(reply, LETTERS[:len(options)], options)[0]
    else:
        only_image = 1 if n_images == 1 else None
        named = {(image or only_image, box) for image, box in parse_named_boxes(reply)}
        image, box = named.pop() if len(named) == 1 else (None, None)
        answer = json.dumps({"image": image, "box": box}) if image else ""
    text = re.sub("</?(?:think|answer)>", " ", reply).strip()
    return f"<think>{text}</think><answer>{answer}</answer>" if answer else reply


def judge_own(item: BenchmarkItem, reply: str, protocol: str, coordinates: Coordinates,
              box_format: BoxFormat, sizes: dict[str, tuple[int, int]]) -> Verdict:
    """1 or 0 for a reply; sizes: of the images, if coordinates are converted.

    protocol: strict reads the kit's answer format alone, free_text a reply that states its box or
        letter in another.
    """
    answer = parse_reply(read_freely(reply, item.choices, len(item.images))
                         if protocol == "free_text" else reply)
    rule, problem = ("a statement", "") if answer.states(item.options) else ("", UNREAD)
    if item.letter:
        return Verdict(float(answer.letter == item.letter), problem,
                       {"letter": item.letter, "read": answer.letter, "rule": rule})
    read = {"image": answer.image, "box": answer.box, "rule": rule}
    targets = [box for image, box in item.targets if image == answer.image]
    if problem := problem or ("" if targets else "wrong image") or box_problem(
            answer.box, coordinates):
        return Verdict(0.0, problem, read)
    size = sizes.get(item.images[answer.image - 1], (1, 1))
    frames = [coordinate_size(size, measure, box_format)
              for measure in (item.coordinates, coordinates)]
    overlap = max(iou(answer.box, rescale_box(box, *frames)) for box in targets)
    return Verdict(float(overlap >= 0.5), "", read)
