"""Own data as a benchmark: replies of any system, judged as `mig-kit eval --suite own` judges."""

import json
import re

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.data.line_checks import parse_line
from mig_kit.image_files import EncodedImage, LazyImages
from mig_kit.prompts import LETTERS, parse_reply
from mig_kit.rewards import is_correct, names_image
from mig_kit.sample import Sample
from mig_kit.score.annotations import Benchmark, BenchmarkItem
from mig_kit.score.choice_parsers import read_choice
from mig_kit.score.reply_boxes import UNREAD, parse_named_boxes
from mig_kit.score.result import Verdict

# An image of a thousand pixels a side is in 0 to 1000 what it is in pixels, so that nothing is
# converted: boxes count as they are written.
AS_WRITTEN = BoxFormat(coordinates=Coordinates.NORMALIZED_1000)
UNIT_IMAGE = EncodedImage(b"", (1000, 1000))


def read_own(records: list[dict]) -> Benchmark:
    """The lines of an own-data file, which must be correct ones."""
    lines = [parse_line(record)[0] for record in records]
    items = []
    for index, line in enumerate(lines):
        pairs = tuple((image, box) for _, image, box in line.places()
                      )[:None if line.reference is None else -1]
        options = tuple(line.options or ())
        first_image, first_box = pairs[0] if pairs else (None, None)
        items.append(BenchmarkItem(
            index, line.id or f"line-{index + 1}", line.task, line.question, tuple(line.images),
            first_box, Coordinates(line.coordinates or "pixels"), first_image, False,
            letter=line.letter or "", options=LETTERS[:len(options)], choices=options,
            targets=pairs))
    return Benchmark("own", "", tuple(items), None)


def read_freely(reply: str, sample: Sample) -> str:
    """The reply in the kit's answer format if it states a box or a letter, else unchanged.

    It is read as `strict` reads an <answer>, with or without one. A box without an image is in the
    question's only image.
    """
    if parse_reply(reply).well_formed:
        return reply
    if sample.options:
        letters = LETTERS[:len(sample.options)]
        answer = read_choice(reply, letters, tuple(sample.options))[0]
    else:
        only_image = 1 if len(sample.images) == 1 else None
        named = dict.fromkeys((image or only_image, box)
                              for image, box in parse_named_boxes(reply))
        image, box = next(iter(named)) if len(named) == 1 else (None, None)
        answer = json.dumps({"image": image, "box": box}) if image else ""
    text = re.sub("</?(?:think|answer)>", " ", reply).strip()
    return f"<think>{text}</think><answer>{answer}</answer>" if answer else reply


def judge_own(item: BenchmarkItem, reply: str, protocol: str, coordinates: Coordinates,
              box_format: BoxFormat, sizes: dict[str, tuple[int, int]]) -> Verdict:
    """1 or 0 for a reply; sizes: of the images, if coordinates are converted.

    protocol: strict reads the kit's answer format alone, free_text a reply that states its box or
        letter in another.
    """
    def convert(image: int, box: Box) -> Box:
        size = sizes.get(item.images[image - 1], (1, 1))
        return rescale_box(box, *(coordinate_size(size, measure, box_format)
                                  for measure in (item.coordinates, coordinates)))

    sample = Sample(item.id, "own", item.task, "test",
                    LazyImages((UNIT_IMAGE,) * len(item.images)), item.question,
                    tuple((image, convert(image, box)) for image, box in item.targets),
                    options=item.choices, letter=item.letter)
    text = read_freely(reply, sample) if protocol == "free_text" else reply
    answer = parse_reply(text)
    is_read = answer.letter if item.letter else answer.box is not None
    problem = "" if is_read else UNREAD
    if is_read and not item.letter and not names_image(text, sample):
        problem = "wrong image"
    rule = "a statement" if is_read else ""
    read = {"letter": item.letter, "read": answer.letter, "rule": rule} if item.letter else {
        "image": answer.image, "box": answer.box, "rule": rule}
    return Verdict(float(is_correct(text, sample, AS_WRITTEN)), problem, read)
