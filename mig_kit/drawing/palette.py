"""One colour and one label for every name, in all figures, pictures and pages.

The colours are Okabe and Ito's, which colour-blind readers tell apart; in grey, neighbours differ
in lightness, marker, dashes or number.
"""

from collections.abc import Iterable

CORRECT, PREDICTED = "#0072B2", "#D55E00"  # a reply's box: where it is correct, and where not
TARGET, REFERENCE = "#009E73", "#CC00CC"
INK, MUTED, FRAME = "#222222", "#666666", "#8A8A8A"
SYSTEM_COLOURS = {"base": "#8C8C8C", "sft": "#E69F00", "start": "#009E73", "grpo": "#0072B2"}
SYSTEM_LABELS = {"base": "base", "sft": "SFT", "start": "start of RL", "grpo": "GRPO"}
SYSTEM_MARKERS = {"base": "o", "sft": "s", "start": "P", "grpo": "D"}
SIDE_COLOURS = {"stock TRL": "#999999", "shared prompts": "#0072B2"}
# what became of a trace, a prompt or a reply: the good end is blue everywhere
PIECE_COLOURS = {
    "kept": CORRECT, "correct": CORRECT,
    "loose box": "#56B4E9", "wrong object": PREDICTED, "wrong image": "#F0E442",
    "wrong option": "#B5679A", "no answer": "#4D4D4D",
    "box where none is": "#009E73",
    "below min_pass_rate": PREDICTED, "above max_pass_rate": "#F0E442",
    "method": "#F0E442", "finding": "#E69F00", "evidence": CORRECT}
OTHER_COLOURS = ("#E69F00", "#56B4E9", PREDICTED, "#F0E442", "#B5679A", "#009E73", "#4D4D4D",
                 "#BBBBBB", "#8B6B4E", "#A6D96A")


def piece_colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour: PIECE_COLOURS has it, or it is the next of OTHER_COLOURS."""
    names = list(dict.fromkeys(names))
    used = {PIECE_COLOURS[name] for name in names if name in PIECE_COLOURS}
    free = [colour for colour in OTHER_COLOURS if colour not in used] or list(OTHER_COLOURS)
    unknown = [name for name in names if name not in PIECE_COLOURS]
    return {name: PIECE_COLOURS.get(name) or free[unknown.index(name) % len(free)]
            for name in names}


def text_colour(background: str) -> str:
    """Ink or white, whichever is easier to read on a background "#rrggbb"."""
    red, green, blue = (int(background[start:start + 2], 16) for start in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#FFFFFF"
