"""Letters of multiple-choice questions, read from any model's free text.

Options count by letter ("(B)", "Point B") and by their words ("yes", "the third image"). All
functions take any string; none raises.
"""

import re
import unicodedata
from collections.abc import Callable
from string import ascii_uppercase

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.image_names import ORDINALS
from mig_kit.score.official import last_answer_block

NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# What the letters of BLINK's tasks stand for where it is the same in every question.
_LATTER_TWO = ("the second image", "the third image")
BLINK_CHOICES = {
    "Art_Style": _LATTER_TWO, "Jigsaw": _LATTER_TWO, "Visual_Similarity": _LATTER_TWO,
    "Multi-view_Reasoning": ("left", "right"), "Spatial_Relation": ("yes", "no"),
    "Relative_Depth": ("A is closer", "B is closer"),
    "Relative_Reflectance": ("A is darker", "B is darker", "About the same"),
    "Forensic_Detection": ("the first image", "the second image", "the third image",
                           "the fourth image")}

_LONE_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LABEL = (r"(?:[Pp]oints?|[Bb]ox(?:es)?|[Oo]ptions?|[Pp]ictures?|[Ii]mages?|[Cc]hoices?"
          r"|[Cc]ircles?|[Ll]etter|[Aa]nswers?(?: is|:)?)")
_VERB = (r"(?:is|has|was|does|seems|appears|looks|more|and|or|in|on|to|corresponds|matches|because"
         r"|since|as|for|shows|would|must|with|the|an?|it)")
# "A" is an article where it begins a sentence and a word follows, but no verb
_NAMED_OPTION = re.compile(
    r"\(([A-Z])\)"
    rf"|\b{_LABEL}\s+\"?([A-Z])\b"
    rf"|(?<![\w'$\\.])A(?=\s+(?:{_VERB}\b|[-([])|\s*[),:;.!?\"|/=\u2192\u2013\u2014\u3002]"
    r"|-\s|\s*\n|\s*$)"
    r"|(?<=[a-z,)\u3040-\u9fff] )A(?![\w'-])"
    r"|(?<![\w'$\\.])([B-H])(?![\w'$]|\.\w)")
_ARTICLE = re.compile(rf"^(?:the|an?)\s+(?!{_VERB}\b)", re.IGNORECASE)
# a letter alone in marks of emphasis, quotes, brackets or LaTeX
_MARKED = re.compile(r"[*_`\"'$\[{(<]{1,8}\s?([A-Ha-h])\s?[.:!]?\s?[*_`\"'$\]})>]{1,8}(?!\w)")
_SMALL_LETTER = re.compile(
    r"(\b(?:answer|option|choice)(?: is| would be|:)?\s+)([a-h])(?=[\s.,!]*$)", re.I | re.M)
_EMPHASIS = re.compile(r"[*`]+(?=\S)|(?<=\S)[*`]+|</?(?:b|i|strong)>")
_CONCLUSION = re.compile(
    r"\u7b54\u6848|\b(?:therefore|thus|hence|in conclusion"
    r"|based on (?:these|this|the (?:analysis|criteria))|answer(?: is|:)"
    r"|(?:correct|best|final|right|appropriate) (?:corresponding )?(?:answer|choice|option|point)"
    r"|(?:I|we)(?:'d| would| will| can| might)? "
    r"(?:choose|select|pick|go with|say|conclude|lean|suggest))\b", re.IGNORECASE)
_PREFERS = re.compile(
    r"\b(?:closer|nearer|more accurate(?:ly)?|darker|higher|best|better|stands out"
    r"|most (?:likely|similar|appropriate)|more (?:likely|similar|consistent)"
    r"|correspond(?:s|ing)?|match(?:es)?|shares)\b", re.IGNORECASE)
_NEGATES = re.compile(r"\b(?:not|less|none|neither|cannot|nor)\b|n't\b", re.IGNORECASE)
_REFUSES_ALL = re.compile(
    r"\b(?:none of (?:the|these|those|them)\b(?! other| rest| remaining)"
    r"|(?:there is|there's) no (?:correct|suitable|valid|matching|appropriate)"
    r"|no (?:correct|suitable|valid) (?:answer|choice|option)|neither (?:of|option|image)"
    r"|(?:cannot|can't|unable to|not possible to) (?:\w+ly )?(?:determine|assist|help|choose|select"
    r"|identify|provide))\b", re.IGNORECASE)
_DENIED_OPTION = re.compile(rf"\b(?:not|isn't) (?:be )?(?:{_LABEL} )?\(?[A-H]\b\)?")
_MOST_CUES = 20  # last conclusions that are looked at
_LONGEST = 400  # letters of a sentence before its cue
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_PLAIN = str.maketrans("\u3010\u3011\u2018\u2019\u201c\u201d\u300c\u300d", "[]''\"\"[]")
_COUNTS = {str(number): word for number, word in enumerate(NUMBER_WORDS, 1)}
_COUNTS |= {word: number for number, word in _COUNTS.items()}
_FOREIGN = {"\u5de6": "left", "\u53f3": "right", "\u306f\u3044": "yes", "\u662f": "yes",
            "\u3044\u3044\u3048": "no", "\u5426": "no"}  # Chinese and Japanese


def find_option_letters(text: str, valid: str = "ABCDEFGH") -> list[str]:
    """Every naming of an option in order: "(B)", "Point B", "B" by itself.

    An article "A" names no option. valid: the letters that count.
    """
    letters = []
    for match in _NAMED_OPTION.finditer(text):
        letter = next(filter(None, match.groups()), "A")  # the alternative for A has no group
        if letter in valid:
            letters.append(letter)
    return letters


def parse_blink_letter(text: str, valid: str) -> str:
    """The only "(B)" that stands by itself among white space, or the only one of the last
    paragraph; "" where that decides nothing.

    Source: zeyofu/BLINK_Benchmark, eval/test_benchmark.py, analyze_answer, which then asks another
    model.
    """
    for part in (text, text.split("\n\n")[-1]):
        words = part.split()
        letters = [letter for letter in valid if f"({letter})" in words]
        if len(letters) == 1:
            return letters[0]
    return ""


def mark_options(text: str, choices: tuple[str, ...]) -> str:
    """The text with every option that its words name as its letter, "(B)"; longest words first.

    "image 3" and "third one" name "the third image" where no option has these words; "four" names
    "4". "yes" and "no" count only where a sentence begins with them, or after "is" or "be".
    """
    options = [(letter, _ARTICLE.sub("", words.strip().strip(".")).lower())
               for letter, words in zip(ascii_uppercase, choices)]
    for pattern_of in (_own_words, _other_words):
        by_pattern = {pattern_of(words): f"({letter})" for letter, words in options}
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


def parse_choice_letter(text: str, valid: str = "ABCDEFGH", choices: tuple[str, ...] = ()) -> str:
    """The option a free text settles on, one letter of `valid`, or "" where it names none, several
    without choosing, or refuses them all.

    Of an <answer> block only the last one is read, else what follows the last </think>. choices:
    what the letters stand for; where letters settle nothing, options named by their words count.
    The rules are ours, for where BLINK's and MMIU's authors ask another model.
    """
    block = last_answer_block(text)
    text = text.rpartition("</think>")[2] if block is None else block
    text = re.sub(r"</?s>|[\xa0\u200b]", " ", text).strip()
    text = mark_letters(_FOREIGN.get(text, text))
    if lone := _LONE_LETTER.fullmatch(text):
        letter = lone.group(1).upper()
        return letter if letter in valid else ""
    for choice, letter in zip(choices, valid):
        if text.strip(" .\"'").lower() == choice.strip(" .\"'").lower():
            return letter
    for choice in choices[:1]:  # "A the car" where that is option A
        text = re.sub(rf"\bA(?= {re.escape(choice)})", "(A)", text)
    for choice in choices:  # "A man runs" where that is an option
        if choice[:2] in ("a ", "A ") and not _NAMED_OPTION.match(choice):
            text = re.sub(rf"\bA(?={re.escape(choice[1:])})", "a", text)
    text = _DENIED_OPTION.sub("not it", text)
    marked = mark_options(text, choices)
    if _refuses_all(marked, valid):
        return ""
    letter = _settled_letter(text, valid)
    return letter or _settled_letter(marked, valid)


def mark_letters(text: str) -> str:
    """The text with every letter that stands alone in marks of emphasis, quotes, brackets or LaTeX
    as "(A)", full-width signs as plain ones, and no other emphasis.
    """
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    text = _MARKED.sub(lambda match: f"({match[1].upper()})", text)
    text = _SMALL_LETTER.sub(lambda match: f"{match[1]}({match[2].upper()})", text)
    text = re.sub(r"(?<=[\u3040-\u9fff])(?=[A-H](?![A-Za-z]))", " ", text)
    text = re.sub(r"(?<![A-Za-z])([A-H])(?=[\u3040-\u9fff])", r"\1 ", text)
    return _EMPHASIS.sub("", text)


def _refuses_all(text: str, valid: str) -> bool:
    """Whether the text, with options marked, refuses them and chooses none of them after that."""
    refusals = list(_REFUSES_ALL.finditer(text))
    if not refusals:
        return False
    same_sentence, *others = _SENTENCE_END.split(text[refusals[-1].end():])
    chosen = [part for part in others if _PREFERS.search(part) or _CONCLUSION.search(part)]
    if _CONCLUSION.search(same_sentence):
        chosen.append(same_sentence)
    return not any(_names_one_or_two(part, valid) for part in chosen)


def _settled_letter(text: str, valid: str) -> str:
    """In order: the only option named; the sentence of the last conclusion ("therefore", "the
    answer is"); the first sentence that prefers one ("A is closer to the camera than B"); the only
    option of the first or last sentence.
    """
    letters = find_option_letters(text, valid)
    if not letters:
        return ""
    if len(set(letters)) == 1:
        return letters[0]
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip(" \n*-.")]
    if sentence := _find_conclusion(text, valid):
        return _preferred_letter(sentence, valid)
    for sentence in sentences:
        is_preference = _PREFERS.search(sentence) and not _NEGATES.search(sentence)
        if is_preference and _names_one_or_two(sentence, valid):
            return _preferred_letter(sentence, valid)
    return _only_letter(sentences[0], valid) or _only_letter(sentences[-1], valid)


def _only_letter(sentence: str, valid: str) -> str:
    """The only option that a sentence names and does not deny; else ""."""
    letters = find_option_letters(sentence, valid)
    return letters[0] if len(set(letters)) == 1 and not _NEGATES.search(sentence) else ""


def _find_conclusion(text: str, valid: str) -> str:
    """The sentence of the last conclusion that names one or two options; else ""."""
    for cue in list(_CONCLUSION.finditer(text))[:-1 - _MOST_CUES:-1]:
        before = _SENTENCE_END.split(text[max(0, cue.start() - _LONGEST):cue.start()])[-1]
        rest = text[cue.start():]
        if all(re.search(rf"^\({letter}\)", rest, re.MULTILINE) for letter in valid):
            continue  # it gives the options again, and chooses none
        for sentence in _SENTENCE_END.split(before + rest):
            if _names_one_or_two(sentence, valid):
                return sentence
    return ""


def _names_one_or_two(sentence: str, valid: str) -> bool:
    return 1 <= len(set(find_option_letters(sentence, valid))) <= 2


def _preferred_letter(sentence: str, valid: str) -> str:
    """The option a sentence prefers: the first in brackets, else the first."""
    letters = [letter for letter in re.findall(r"\(([A-H])\)", sentence) if letter in valid]
    return (letters or find_option_letters(sentence, valid))[0]


def official_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem) by the letter that the free text settles on."""
    letter = read_letter(item, response)
    return float(letter == item.letter), "" if letter else "no option chosen"


def read_letter(item: BenchmarkItem, response: str) -> str:
    """The option that a reply's free text settles on, or "".

    BLINK's items, which have an id, are read by their authors' own rule first.
    """
    letter = parse_blink_letter(response, item.options) if item.id else ""
    task_choices = BLINK_CHOICES.get(item.task.replace(" ", "_"), ()) if item.id else ()
    return letter or parse_choice_letter(response, item.options, item.choices or task_choices)


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
