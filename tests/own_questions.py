"""Questions of one's own, made by a script: a user's JSONL with PNG, JPEG and turned photos, in all
coordinates, some multiple choice.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

from mig_kit.boxes import BoxFormat, rescale_box
from mig_kit.sample import Sample
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import TASKS, make_sample
from mig_kit.world.teacher import write_trace

SEED = 424242
SPLIT = "rl"  # neither the suites' nor the lessons'
ORIENTATION = 0x0112
# EXIF orientation -> what stores an upright picture so that this orientation turns it back
STORED_AS = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
             3: Image.Transpose.ROTATE_180}


def draw_questions(count: int, seed: int = SEED) -> list[Sample]:
    """Of every seven questions, six for a box, the ten tasks in turn, and one for a letter."""
    names = list(TASKS)
    n_choices = count // 7
    choices = [sample for sample in iter_free_form(SPLIT, n_choices, seed) if sample.options]
    boxes = [make_sample(names[i % len(names)], SPLIT, i // len(names), seed)
             for i in range(count - n_choices)]
    questions = boxes + choices[:n_choices]
    random.Random(seed).shuffle(questions)
    return questions


def save_image(image: Image.Image, path: Path, orientation: int) -> None:
    """Save a picture as PNG or JPEG; with an orientation of STORED_AS turned, as cameras do."""
    exif = Image.Exif()
    if orientation in STORED_AS:
        image = image.transpose(STORED_AS[orientation])
        exif[ORIENTATION] = orientation
    more = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    image.save(path, exif=exif, **more)


def to_line(sample: Sample, number: int, folder: Path, with_reply: bool) -> dict:
    names = []
    for k, image in enumerate(sample.images, 1):
        turned = {0: 6, 1: 8, 2: 3}.get(number % 9, 1) if k == 1 else 1
        names.append(f"{number:04d}_{k}.{'jpg' if number % 3 == 0 or turned != 1 else 'png'}")
        save_image(image, folder / names[-1], turned)
    line = {"id": f"q{number}", "images": names, "question": sample.question, "task": sample.task}
    coordinates = ("pixels", "normalized_1000", "normalized_1")[number % 3]
    limits = {"normalized_1000": (1000, 1000), "normalized_1": (1, 1)}

    def write_box(box, image):
        size = sample.sizes[image - 1]
        return list(rescale_box(box, size, limits.get(coordinates, size)))

    if sample.options:
        line |= {"options": list(sample.options), "letter": sample.letter}
    else:
        image, box = sample.targets[0]
        line |= {"image": image, "box": write_box(box, image), "coordinates": coordinates}
    if sample.reference:
        line |= {"reference": write_box(sample.reference, 1), "coordinates": coordinates}
    if with_reply:
        rng = random.Random(f"reply/{number}")
        line["reply"] = write_trace(sample, rng, BoxFormat(), (1, 1, 1), 0.0, 0.7).text
    return line


def write_questions(folder: Path, count: int = 300, replies: float = 0.0) -> Path:
    """replies: the share of lines with a reply."""
    samples = draw_questions(count)
    folder.mkdir(parents=True, exist_ok=True)
    with_reply = random.Random("replies")
    lines = [to_line(sample, number, folder, with_reply.random() < replies)
             for number, sample in enumerate(samples, 1)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


if __name__ == "__main__":
    print(write_questions(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
