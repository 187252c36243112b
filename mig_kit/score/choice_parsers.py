"""Letters of multiple-choice questions, read from any model's free text.

The last explicit conclusion ("Answer: B", "I choose B", a last line "B") goes before all that the
text discusses. Options count by letter ("(B)", "Point B") and by their words ("yes", "the third
image"). All functions take any string; none raises.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from string import ascii_uppercase

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.image_names import NUMBER_WORDS, ORDINALS
from mig_kit.score.official import last_answer_block

# What the letters of BLINK's tasks stand for where it is the same in every question.
_LATTER_TWO = ("the second image", "the third image")
BLINK_CHOICES = {
    "Art_Style": _LATTER_TWO, "Jigsaw": _LATTER_TWO, "Visual_Similarity": _LATTER_TWO,
    "Multi-view_Reasoning": ("left", "right"), "Spatial_Relation": ("yes", "no"),
    "Relative_Depth": ("A is closer", "B is closer"),
    "Relative_Reflectance": ("A is darker", "B is darker", "About the same"),
    "Forensic_Detection": ("the first image", "the second image", "the third image",
                           "the fourth image")}
CONCLUSION, ONLY_ONE, WORDS, FIRST = WAYS = (  # how a letter is read
    "by a conclusion", "as the only option named", "by an option's words",
    "by the first or last mention")

# In the working text an option is ‹B› where its letter names it and «B» where its words do.
_OPTION = "[\u2039\xab]([A-Z])[\u203a\xbb]"
_PLAIN = str.maketrans("\u3010\u3011\u2018\u2019\u201c\u201d\u300c\u300d\u2039\u203a\xab\xbb",
                       "[]''\"\"[]    ")
_FOREIGN = {"\u5de6": "left", "\u53f3": "right", "\u306f\u3044": "yes", "\u662f": "yes",
            "\u3044\u3044\u3048": "no", "\u5426": "no"}  # Chinese and Japanese
_ALONE = r"(?=[^\w\n]{0,9}[A-Z][^\w\n]{0,9}$)"
# Tokens of chat templates, other ways to write "Answer:", letters alone in marks, and emphasis.
_REWRITES = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), new) for pattern, new in (
    (r"<\|?(?:im_start|start_header_id|start_of_turn)\|?>\s?(?:assistant|model)?", "\n"),
    (r"\bn/a\b", "none"),
    (r"\((?-i:[A-Z])(?:\s?[-,/|\u2013]\s?(?-i:[A-Z])){1,9}\)(?=\W{0,3}[:=])", ""),
    (r"\b(?:confidence|certainty|grade|difficulty|(?:second|third|alternative) (?:choice|option"
     r"|guess))\W{1,3}(?:is )?\W?[a-z\d.%]+", ""),
    (r"\\boxed|<(?:\|begin_of_box\||answer)>", "\nAnswer: "),
    (r"(?:\u7b54\u6848|\u7b54\u3048|\u6b63\u89e3)(?:\u662f|\u4e3a|\u306f)?", "\nAnswer: "),
    (r"\u6211?\u9009(?:\u62e9)?", "I choose "),
    (r"</?\|?[a-z][a-z_]{1,30}\|?>|(?-i:</?[bis]>)|\[/?INST\]|[\xa0\u200b]", " "),
    (r"\\[a-z]{2,12}(?=\s?\{)|\\(?=[()\[\]])", ""),
    (rf"^\s{{0,3}}#{{1,6}}{_ALONE}|(?:[=-]>|[\u21d2\u2192]){_ALONE}", "\nAnswer: "),
    (r"[*_`\"'$\[{(<]{1,8}\s?([A-Z])\s?[.:!]?\s?[*_`\"'$\]})>]{1,8}(?!\w)",
     lambda match: f"({match[1].upper()})"),
    (r"(\b(?:answer|option|choice)\W{1,3}(?:(?:is|would be)\W{1,3})?)([a-z])(?=[.,;!)]|\s*$)",
     lambda match: f"{match[1]}({match[2].upper()})"),
    (r"(?<=[\u3040-\u9fff])(?=[A-Z]\b)|(?<=\b[A-Z])(?=[\u3040-\u9fff])", " "),
    (r"[*`]+(?=\S)|(?<=\S)[*`]+", ""),
    (r"\bright(?= (?:answer|option|choice|one)\b)|(?<=\bis )right(?=[.,!]|\s*$)", "correct"),
    (r"^[^\w\n]{0,3}(?-i:[a-z])(?=\W*\Z)", lambda match: match[0].upper()))]
_LABEL = (r"(?:[Pp]oints?|[Bb]ox(?:es)?|[Oo]ptions?|[Pp]ictures?|[Ii]mages?|[Cc]hoices?"
          r"|[Cc]ircles?|[Ll]etter)")
_VERB = (r"(?:is|has|was|does|seems|appears|looks|more|and|or|in|on|to|corresponds|matches|because"
         r"|since|as|for|shows|would|must|with|the|an?|it)")
# "A" is an article where it begins a sentence and a word follows, but no verb
_NAMED_OPTION = re.compile(
    r"\(([A-Z])\)"
    rf"|\b(?:{_LABEL}|[Aa]nswers?(?: is|:)?)\s+\"?([A-Z])\b(?!(?<=A)\s\xab)"
    rf"|(?<![\w'$\\.\xab])(A)(?=\s+(?:{_VERB}\b|[-([])|\s*[),:;.!?\"|/=\u2192\u2013\u2014\u3002]"
    r"|-\s|\s*\n|\s*$)"
    r"|(?<=[a-z,)\u3040-\u9fff] )(A)(?![\w'-])"
    r"|(?<![\w'$\\.\xab])(I)(?=\s+(?:is\b|\()|\s*[).:,;\n]|\s*$)"
    r"|(?<![\w'$\\.\xab])([B-HJ-Z])(?![\w'$]|\.\w)")
_ARTICLE = re.compile(rf"^(?:the|an?)\s+(?!{_VERB}\b)", re.IGNORECASE)

# An explicit conclusion is a cue with an option in its place: after "the answer is", before "is
# correct", right after "therefore"; or a line that is an option, or ends in ": B" or "is B".
_SIGN = "[^\\w\u2039\xab]"
_REST = "[^\u2039\xab.!?\n]"  # of a sentence, without options
_TURNED = (r"\b(?:not?|cannot|none|neither|less|unlikely|between|among|both|because|since|while"
           r"|but|if|unlike|like|than)\b|n't")
_GAP = rf"(?:(?!{_TURNED})(?:{_REST}|\.(?=\w))){{0,80}}?"
_TO_LINK = rf"(?:(?!{_TURNED}|\b(?:and|that|which)\b|[:=]){_REST}){{0,80}}?"
_LINK = (r"(?:\b(?:is|(?:would|must|should|will|could|might|has to|can only) be|seems|remains)\b"
         r"|'s\b|[:=]|\s[\u2013\u2014-]\s)")
_OTHER = rf"\s*(?:the )?(?:{_LABEL}\s)?{_OPTION}"
_ALSO = r"(?:\s*(?:[/&|]|,? ?\b(?:and|or|nor)\b)|,)"
_GOOD = r"(?:correct|final|best|most (?:appropriate|suitable|likely|accurate|plausible))"
_CUE = re.compile(
    r"(?P<noun>(?<![a-z])(?<!to )(?:answer|choice|prediction|conclusion|selection|verdict|decision"
    rf"|response|solution|(?:option|letter)(?={_SIGN}{{0,2}}[:=])|{_GOOD})"
    r"(?![a-z]| (?:choice|option)s))"
    r"|(?P<verb>\b(?:I|we)(?:'d|'ll|'m)?(?: (?:would|will|can|might|am|must|should|thus|therefore"
    r"|have)){0,3} (?:choose|chosen|select|pick|go(?:ing)? (?:with|for)|say|conclude|suggest"
    r"|lean(?:ing)?(?: to(?:wards?)?)?|opt for|vote for|settle (?:on|for)|answer|guess)\b"
    r"|\b(?:preference for|I prefer|go(?:ing)? with)\b)"
    r"|(?P<turn>\b(?:therefore|thus|hence|consequently|in conclusion|based on)\b)"
    r"|(?P<it>\b(?:so|actually|overall|left|leav(?:es|ing)"
    r"|it(?:'s| is| (?:must|has to|can only|would) be))(?![a-z]))", re.IGNORECASE)
_FILLED = (rf"{_SIGN}{{1,3}}(?:(?:it|us|with|this|that|the|must|has|to|is|be|option|image|choice"
           rf"|point|box|letter|most|likely){_SIGN}{{1,3}}){{0,6}}{_OPTION}"
           rf"(?={_SIGN}*$|\s*[.!;)\n\u2013\u2014-]|,? (?:because|since|as|for)\b)")
_AFTER_CUE = {kind: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for kind, pattern in {
    "noun": rf"(?:{_TO_LINK}{_LINK}{_SIGN}{{0,8}}{_GAP}|[\s:*#_-]{{0,6}}\n{_SIGN}{{0,6}})"
            rf"{_OPTION}", "verb": rf"(?:{_GAP}|:{_SIGN}{{0,8}}){_OPTION}",
    "turn": _FILLED, "it": _FILLED}.items()}
_BEFORE_CUE = re.compile(
    rf"{_OPTION}(?:(?!{_TURNED}){_REST}){{0,60}}?(?:\b(?:is|be|as|remains|seems|making it|makes it)"
    r"|'s)(?: to be)?(?: (?:the|my|our|an?|indeed|clearly|thus|therefore|most|likely|probably|only"
    r"|single|final))* $", re.IGNORECASE)
_BOTH = re.compile(rf"{_OPTION}{_ALSO} ?(?:the )?(?:{_LABEL} )?$")
_SUPPOSED = re.compile(r"\b(?:if|whether|suppose|assum\w+|imagine)(?: \w+){0,2}? ?$", re.IGNORECASE)
_REFUSED = re.compile(
    rf"{_TO_LINK}(?:{_LINK}|\bcan(?:not|'t)){_SIGN}{{0,8}}(?:\w+ )?(?:none|neither|nothing"
    r"|impossible|(?:be )?determined|un(?:clear|known)|[A-Z](?=\W{0,3}$))\b", re.I | re.M)
_OR_ANOTHER = re.compile(
    rf"(?:(?:(?!{_TURNED})[^\u2039\xab.,;:!?\n]){{0,40}}?\bor\b|{_ALSO}){_OTHER}"
    rf"(?={_SIGN}*$|\s*[.,!/&)\n\xab]|\s*(?:and|or)\b)", re.MULTILINE)
_DENIED = re.compile(
    r"(?i:\b(?:not|neither|nor|cannot|rather than|instead of|unlike|except|than|among|between)\b"
    rf"|n't)(?:\s(?:be|the|just|only|both|either|{_LABEL}))*\s?{_OPTION}"
    rf"(?:(?:,{_OTHER}){{0,9}}{_ALSO}{_OTHER})?(?P<but>,? but\b)?")
_NEXT_LINE = re.compile(rf".*\w.*\n{_SIGN}*{_OPTION}")
_SAME = re.compile("(\u2039.\u203a)[^\\w\n\u2039\xab]{0,3}(?:(?:the|an?) )?\xab.\xbb"
                   "|\xab.\xbb[^\\w\n\u2039\xab]{0,3}(\u2039.\u203a)")
_LINE = re.compile(
    rf"(?:{_SIGN}{{0,9}}|[^\u2039\xab]{{0,200}}?(?P<link>{_LINK}){_SIGN}{{0,8}})(?:{_LABEL}\s)?"
    rf"{_OPTION}(?P<end>{_SIGN}*$|(?(link)(?!)|[\s.),\u2013\u2014-]{{1,4}})"
    r"(?!.*\b(?:is|are|was|has|have|does|shows?|looks?|appears?|seems?)\b)"
    r"(?:[^\u2039\xab\n]|[\u2039\xab]\2.){1,80}$)")
_NEGATES = re.compile(r"\b(?:not|less|none|neither|cannot|nor)\b|n't\b", re.IGNORECASE)
_REFUSES_ALL = re.compile(
    r"\b(?:none of (?:the|these|those|them)\b(?! other| rest| remaining)"
    r"|(?:there is|there's) no (?:correct|suitable|valid|matching|appropriate)"
    r"|no (?:correct|suitable|valid) (?:answer|choice|option)|neither (?:of|option|image)"
    r"|(?:cannot|can't|unable to|not possible to) (?:\w+ly )?(?:determine|assist|help|choose|select"
    r"|identify|provide))\b", re.IGNORECASE)
_CONCLUDES = re.compile(_CUE.pattern.partition("|(?P<it>")[0], re.IGNORECASE)
_MOST_CUES = 200  # of conclusions that are looked at, from the last
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_COUNTS = {str(number): word for number, word in enumerate(NUMBER_WORDS, 1)}
_COUNTS |= {word: number for number, word in _COUNTS.items()}


def parse_blink_letter(text: str, valid: str) -> str:
    """The only "(B)" among white space, of the text or of its last paragraph; "" if undecided.

    Source: zeyofu/BLINK_Benchmark, eval/test_benchmark.py, analyze_answer; it then asks a model.
    """
    for part in (text, text.split("\n\n")[-1]):
        words = part.split()
        letters = [letter for letter in valid if f"({letter})" in words]
        if len(letters) == 1:
            return letters[0]
    return ""


def mark_options(text: str, choices: tuple[str, ...]) -> str:
    """The text with every option that its words name as "\xabB\xbb", longest words first.

    "image 3" and "third one" name "the third image" if no option has these words, "four" names "4".
    "yes" and "no" count only where a sentence begins with them, or after "is" or "be".
    """
    options = [(letter, _ARTICLE.sub("", words.strip().strip(".")).lower())
               for letter, words in zip(ascii_uppercase, choices)]
    for pattern_of in (_own_words, _other_words):
        by_pattern = {pattern_of(words): f"\xab{letter}\xbb" for letter, words in options}
        for pattern in sorted(filter(None, by_pattern), key=len, reverse=True):
            text = re.sub(pattern, by_pattern[pattern], text, flags=re.IGNORECASE)
    return text


def _own_words(words: str) -> str:
    """A regular expression for an option's own words; "" for one that only its letter names."""
    if words in ("yes", "no"):
        return (r"(?:(?<=\bis )|(?<=\bbe )|(?<=: )|(?<![^.!?\s]\s)(?<![^.!?\s]))"
                rf"[\"']?{words}\b(?! [a-z])")
    if not words or len(words) == 1 and words.isalpha():
        return ""
    end = r"(?!\w|\.\d)" if words in _COUNTS else r"(?!\w)"
    return r"(?<![\w.])" + r"\s+".join(map(re.escape, words.split())) + end


def _other_words(words: str) -> str:
    """A regular expression for other words that say the same; "" where there are none."""
    if words in _COUNTS:
        return rf"(?<![\w.]){_COUNTS[words]}(?!\w|\.\d)"
    place = re.fullmatch(rf"({'|'.join(ORDINALS)}) (?:image|picture|photo)"
                         r"|(?:image|picture|photo) (\d)", words)
    if not place:
        return ""
    number = ORDINALS.index(place[1]) + 1 if place[1] else int(place[2])
    return (rf"\b(?:the )?(?:{ORDINALS[number - 1]}|{number}(?:st|nd|rd|th)) "
            rf"(?:image|picture|photo|one)\b|\b(?:image|picture|photo) ?#?{number}\b")


def read_choice(text: str, valid: str = "ABCDEFGH", choices: tuple[str, ...] = (),
                is_blink: bool = False) -> tuple[str, str]:
    """The option that a free text settles on, by rules of ours.

    BLINK's and MMIU's authors ask another model instead.

    Args:
        text: only its last <answer> block is read or, without one, what follows </think>.
        valid: the options' letters.
        choices: what the letters stand for.
        is_blink: without an explicit conclusion, BLINK's own rule is tried before the kit's.
    Returns: (letter, one of WAYS), or ("", "") if the text names no option, several without
        choosing, or refuses them all.
    """
    block = last_answer_block(text)
    final = text.rpartition("</think>")[2] if block is None else block
    plain = _FOREIGN.get(final.strip(), unicodedata.normalize("NFKC", final).translate(_PLAIN))
    for pattern, new in _REWRITES:
        plain = pattern.sub(new, plain)
    plain = _SAME.sub(r"\1\2", _mark_letters(mark_options(plain, choices), valid))
    marked = _DENIED.sub(lambda match: "" if match["but"] else "not it", plain)
    if (conclusion := _find_conclusion(marked)) is not None:
        return conclusion, conclusion and CONCLUSION
    if is_blink and (letter := parse_blink_letter(final, valid)):
        return letter, ONLY_ONE
    return ("", "") if _REFUSES_ALL.search(marked) else _read_loosely(marked)


def parse_choice_letter(text: str, valid: str = "ABCDEFGH", choices: tuple[str, ...] = ()) -> str:
    """The letter of read_choice."""
    return read_choice(text, valid, choices)[0]


def _mark_letters(text: str, valid: str) -> str:
    """The text with every option that its letter names as "\u2039B\u203a"."""
    def mark(match: re.Match) -> str:
        before, letter, _ = match[0].rpartition(match[match.lastindex])
        return match[0] if letter not in valid else f"{before.strip('(')}\u2039{letter}\u203a"

    return _NAMED_OPTION.sub(mark, text)


def _find_conclusion(text: str) -> str | None:
    """The letter of the last explicit conclusion, "" if it refuses or leaves several; else None."""
    lines = [line for line in text.split("\n") if re.search(r"\w", line)] or [""]
    sentence = _LINE.match(_SENTENCE_END.split(lines[-1].strip())[-1])
    if letter := (_lone_letter(lines[::-1], -1)
                  or sentence and not re.search(r"\w", sentence["end"]) and sentence[2]):
        return letter
    for cue in list(_CUE.finditer(text))[:-1 - _MOST_CUES:-1]:
        if (letter := _conclude(text, cue)) is not None:
            return letter
    return _lone_letter(lines, 1) or None


def _lone_letter(lines: list[str], step: int) -> str:
    """The option that the first line is, unless it ends a list of options, in steps of `step`."""
    run = list(takewhile(bool, map(_LINE.match, lines)))
    letters = [match[2] for match in run]
    if not letters[1:] or ord(letters[1]) != ord(letters[0]) + step or letters[0] in letters[1:]:
        return "".join(letters[:1])
    has_words, is_list = (re.search(r"\w", match["end"]) for match in run[:2])
    return letters[0] if is_list and not has_words else ""


def _conclude(text: str, cue: re.Match) -> str | None:
    """What _find_conclusion says of one cue."""
    before, rest = text[max(0, cue.start() - 200):cue.start()], text[cue.end():cue.end() + 400]
    if cue["noun"] and (match := _BEFORE_CUE.search(before)):
        prefix = before[:match.start()]
        return None if _SUPPOSED.search(prefix) or _BOTH.search(prefix) else match[1]
    match = _AFTER_CUE[cue.lastgroup].match(rest)
    if not match:
        return "" if cue["noun"] and _REFUSED.match(rest) else None
    following = _NEXT_LINE.match(rest, match.end())
    is_list = "\n" in match[0] and following and ord(following[1]) == ord(match[1]) + 1
    if is_list or _SUPPOSED.search(before):
        return None
    other = _OR_ANOTHER.match(rest, match.end())
    if not other or other[1] == match[1]:
        return match[1]
    return "" if cue["noun"] else None


def _read_loosely(text: str) -> tuple[str, str]:
    """By the only option, by the last sentence that concludes, or by the first or last sentence."""
    def options(part: str) -> list[str]:
        return list(dict.fromkeys(re.findall(_OPTION, part)))

    letters = options(text)
    if len(letters) <= 1:
        return "".join(letters), letters and (ONLY_ONE if "\u2039" in text else WORDS) or ""
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip(" \n*-.")]
    concluding = [part for part in sentences
                  if _CONCLUDES.search(part) and 1 <= len(options(part)) <= 2]
    if concluding:
        return options(concluding[-1])[0], CONCLUSION
    ends = [part for part in (sentences[0], sentences[-1])
            if len(options(part)) == 1 and not _NEGATES.search(part)]
    return (options(ends[0])[0], FIRST) if ends else ("", "")


def count_ways(items: list[BenchmarkItem], lines: list[dict | None]) -> str:
    """A sentence: how many letters of the lines' replies are read in which of WAYS."""
    counts = Counter(read_item(item, line["response"])[1]
                     for item, line in zip(items, lines, strict=True) if line)
    return f"Letters read {', '.join(f'{way}: {counts[way]:,}' for way in WAYS)}."


def read_item(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """`read_choice` of a reply to an item; items with an id are BLINK's."""
    choices = BLINK_CHOICES.get(item.task.replace(" ", "_"), ()) if item.id else ()
    return read_choice(response, item.options, item.choices or choices, bool(item.id))


def official_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem) by the letter that the free text settles on."""
    letter, _ = read_item(item, response)
    return float(letter == item.letter), "" if letter else "no option chosen"


def strict_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem): the last <answer> must hold the letter and nothing else."""
    block = last_answer_block(response)
    if block is None:
        return 0.0, "no <answer> block"
    letter = block.strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options
    return float(letter == item.letter), "" if is_option else "no single letter in <answer>"


CHOICE_JUDGES: dict[str, Callable[[BenchmarkItem, str], tuple[float, str]]] = {
    "official": official_choice, "strict": strict_choice}
