"""An oracle of MIG-Bench's rules, written without regular expressions and in exact fractions, and
replies of many forms to compare it on.
"""

import random
from fractions import Fraction

# d: digits, f: digits.digits, _: maybe white space, blank: some white space. "<box>" has no d or f
# in it, so that forms need no escaping.
FORMS = ("(d,_d),_(d,_d)", "[f,_f,_f,_f]", "(f,f),(f,f)", "(f,_f,_f,_f)", "[d,_d,_d,_d]",
         "<box>d d d d</box>")
TEMPLATES = [
    "({},{}),({},{})", "({}, {}), ({}, {})", "({},{}), ({},{})",
    "<|box_start|>({},{}),({},{})<|box_end|>", "[{}, {}, {}, {}]", "[{},{},{},{}]",
    "({}, {}, {}, {})", "<box>{} {} {} {}</box>", "<box>{},{},{},{}</box>", "[[{}, {}, {}, {}]]",
    "({} ,{}),({},{})", "x1={} y1={} x2={} y2={}", '{{"image": 2, "box": [{}, {},\n{}, {}]}}',
    "<box>{}  {}\t{} {}</box>"]
WRAPS = ["{}", "It is here: {}.", "<think>not {other}</think><answer>{}</answer>",
         "<think>no box</think>\n<answer>{}</answer>", "{} or {other}", "Image-2 {}", "{}{}", "-{}",
         "I see nothing.", ""]


def skip_while(test, text, at):
    while at < len(text) and test(text[at]):
        at += 1
    return at


def match_sign(sign, text, at):
    """The end of one sign of a form at a place, or None."""
    if sign == "d":
        end = skip_while(str.isdecimal, text, at)
        return end if end > at else None
    if sign == "f":
        point = match_sign("d", text, at)
        if point is None or text[point:point + 1] != ".":
            return None
        return match_sign("d", text, point + 1)
    if sign in "_ ":
        end = skip_while(str.isspace, text, at)
        return end if sign == "_" or end > at else None
    return at + 1 if text[at:at + 1] == sign else None


def match_at(form, text, at):
    """(numbers, end) of a form at a place, or None."""
    numbers = []
    for sign in form:
        end = match_sign(sign, text, at)
        if end is None:
            return None
        if sign in "df":
            numbers.append(Fraction(text[at:end]))
        at = end
    return numbers, at


def oracle_boxes(text):
    """All boxes of the first form that occurs in the text."""
    for form in FORMS:
        boxes, at = [], 0
        while at < len(text):
            match = match_at(form, text, at)
            if match:
                boxes.append(match[0])
            at = match[1] if match else at + 1
        if boxes:
            return boxes
    return []


def oracle_iou(answer, text):
    """IoU of the answer in 0..1 with what the official script reads from the text."""
    boxes = oracle_boxes(text)
    if not boxes:
        return Fraction(0)
    box = [v / 1000 if v > 1 or (v == 1 and len(boxes) == 1) else v for v in boxes[0]]
    answer = [Fraction(v) for v in answer]
    width, height = (min(answer[i + 2], box[i + 2]) - max(answer[i], box[i]) for i in (0, 1))
    if min(width, height) < 0:
        return Fraction(0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (answer, box)]
    return width * height / (sum(areas) - width * height)


def _varied_numbers(draw, answer):
    """Four numbers near the answer, as text: all units, inversions, literal ones and zeros."""
    box = [v + draw.gauss(0, draw.choice((0, 0.02, 0.1))) for v in answer]
    kind = draw.randrange(7)
    if kind == 0:
        box = [box[2], box[1], box[0], box[3]]
    if kind == 1:
        box[draw.randrange(4)] = draw.choice((0, 1, 0.001, 1.5, 2, 0.9999))
    if kind == 2:
        return [str(round(abs(v) * draw.choice((640, 1333)))) for v in box]
    if kind in (3, 4):
        return [f"{abs(v):.{draw.randint(1, 4)}f}" for v in box]
    return [str(round(abs(v) * 1000)) for v in box]


def varied_responses(count, seed=0):
    """(answer in 0..1, response) pairs in all forms, with several boxes and near misses."""
    draw = random.Random(seed)
    for _ in range(count):
        x1, y1 = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
        x2, y2 = x1 + draw.uniform(0.05, 0.4), y1 + draw.uniform(0.05, 0.4)
        answer = [round(v, 3) for v in (x1, y1, x2, y2)]
        box, other = (draw.choice(TEMPLATES).format(*_varied_numbers(draw, answer))
                      for _ in range(2))
        yield answer, draw.choice(WRAPS).replace("{other}", other).replace("{}", box)
