"""The image numbers that questions and answers name in words, such as "in the third image"."""

import re

from mig_kit.data.records import Problem
from mig_kit.score.image_names import find_names

UNCLEAR = "image of a box unclear"
# what may stand between two boxes of one image
SAME_IMAGE = re.compile(
    r"(?:[\s,;.&]|\band\b|<\|object_ref_start\|>.{0,200}?<\|object_ref_end\|>)*",
    re.IGNORECASE | re.DOTALL)
# what makes a mention of an image say nothing about where the box is
COMPARES = re.compile(
    r"compared|unlike|differ(?:s|ent|ently)? from|\bthan\b|instead|\bnot\b|n't\b|without|except",
    re.IGNORECASE)
# before a mention: of the image that something is described by, and of the one that it is in
DESCRIBES = re.compile(
    r"\b(?:of|from|(?:as|like)\s+in"
    r"|(?<!is )(?<!are )(?<!be )(?<!was )(?:shown|seen|marked|outlined|highlighted|given|depicted"
    r"|circled|boxed|described|taken|cropped)\s+(?:in|on))\s+(?:the\s+)?$", re.IGNORECASE)
AREA = re.compile(
    r"\b(?:left|right|top|bottom|cent(?:er|re)|middle|corner|side|part|half|edge|area"
    r"|foreground|background)\s+of\s+(?:the\s+)?$", re.IGNORECASE)
PLACE = re.compile(r"\b(?:in|on|within|inside)\s+(?:the\s+)?$", re.IGNORECASE)
OTHER_IMAGE = re.compile(
    r"\b(?:other|another|remaining|both|each|every|all)(?:\s+\w+)?\s+"
    r"(?:image|picture|photo|frame)s?\b", re.IGNORECASE)
# words that point back at what was said before; the second kind may mean a word before them
POINTS_BACK = re.compile(
    r"\b(?:it|they|them|he|him|she|this|these|those|another|else|previous|earlier|former|latter"
    r"|(?<!each )others?(?! than)|remaining|(?<!number )ones?(?! of|-))\b"
    r"|[它她另]|(?<![吉其])他|那(?!么)|这(?!张|幅|些|组|两)", re.IGNORECASE)
MAY_POINT_BACK = re.compile(r"\b(?:that|its|his|her|their|same)\b", re.IGNORECASE)
# "this sentence describes", "in these images": nothing that was said before
POINTS_AHEAD = re.compile(
    r"\bthis (?:sentence|phrase|expression|description|text|caption|statement|query|video)\b"
    r"|\b(?:these|this (?:set|group|series|sequence|pair) of) (?:\w+ )?"
    r"(?:image|picture|photo|frame)s\b", re.IGNORECASE)
ONE_IMAGE = re.compile(r"\bthis (?:image|picture|photo|frame)\b", re.IGNORECASE)
# words that name nothing to be found
WITHOUT_CONTENT = re.compile(
    r"(?:\W|_|[0-9])+|\b(?:an?|the|and|or|but|so|then|now|also|too|again|please|ok|okay|yes|no|not"
    r"|here|there|where|what|which|who|whose|how|why|when|about|exactly|precisely|is|are|was|were|be"
    r"|am|do|does|did|has|have|can|could|will|would|should|may|must|to|of|in|on|at|for|from|by|with"
    r"|as|into|out|i|you|we|me|us|my|your|our|s|sure|just|only|more|thing|things|find|locate|detect"
    r"|ground|box|boxes|bbox|bounding|point|mark|draw|show|give|tell|see|look|provide|return|output"
    r"|identify|highlight|answer|question|try|repeat|next|write|coordinates?|location|position"
    r"|region|area|place|format|images?|pictures?|photos?|frames?|objects?|items?|targets?|first"
    r"|second|third|fourth|fifth|last|left|right|top|bottom|middle|cent(?:er|re)|side)\b",
    re.IGNORECASE)


def answered_numbers(text: str) -> set[int]:
    """The images that an answer says a box is in, not those that its object is "from" or "of"."""
    return {number for name in find_names(text)
            if _is_no_description(text[:name.start]) for number in name.numbers}


def asked_numbers(text: str) -> set[int]:
    """The images that a question asks about; none if it compares or mentions others, too."""
    if COMPARES.search(text) or OTHER_IMAGE.search(text):
        return set()
    numbers: set[int] = set()
    for name in find_names(text):
        before, after = text[:name.start], text[name.end:]
        is_heading = not before.strip() and after.lstrip().startswith((":", ","))
        is_place = PLACE.search(before) or AREA.search(before)
        if is_heading or (is_place and _is_no_description(before)):
            numbers |= name.numbers
    return numbers


def is_follow_up(question: str, image_count: int) -> bool:
    """Whether a question needs the one before it ("Where is it?") or names nothing to be found."""
    text = POINTS_AHEAD.sub(" ", re.sub(r"\b(photo|picture) (frames?)\b", r"\1\2", question))
    text = ONE_IMAGE.sub(" ", text) if image_count == 1 else text
    if find_names(text):  # it is said which images the others are
        text = OTHER_IMAGE.sub(" ", text)
    before = MAY_POINT_BACK.split(text, maxsplit=1)[0]
    has_box = re.search(r"\{ref\}|\d\W{1,3}\d+\W{1,3}\d+\W{1,3}\d", text)
    return bool(POINTS_BACK.search(text)) or not (has_box or WITHOUT_CONTENT.sub("", before))


def _is_no_description(before: str) -> bool:
    return not DESCRIBES.search(before) or bool(AREA.search(before))


def numbers_of_boxes(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """The image number of each box (its span in the text); [] if the answer names no image.

    Raises Problem if the numbers are unclear.
    """
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), len(text)]
    gaps = [text[start:end] for start, end in zip(starts, ends)]
    numbers_in_gaps = [sorted(answered_numbers(gap)) for gap in gaps]
    if not any(numbers_in_gaps):
        return []
    if any(numbers and COMPARES.search(gap) for gap, numbers in zip(gaps, numbers_in_gaps)):
        raise Problem(UNCLEAR)
    before, *after = numbers_in_gaps
    if not before and all(len(numbers) == 1 for numbers in after):
        return [numbers[0] for numbers in after]
    if len(before) != 1:
        raise Problem(UNCLEAR)
    result = list(before)
    for gap, numbers in zip(gaps[1:-1], after[:-1]):
        if len(numbers) == 1:
            result.append(numbers[0])
        elif not numbers and SAME_IMAGE.fullmatch(gap):
            result.append(result[-1])
        else:
            raise Problem(UNCLEAR)
    return result
