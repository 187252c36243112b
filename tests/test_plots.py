"""Figures of a training: what is drawn where, read back from the picture."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from PIL import ImageColor

from mig_kit import palette, pictures, plots
from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import format_answer
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def make_row(sample, step, correct, box=None):
    return {"step": step, "reply": "<think>Compare.</think>" * 40, "reward": 1.0,
            "correct": correct, "image": sample.targets[0].image, "box": box}


def has_colour(picture, colour):
    return bool((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1).any())


def test_rollouts_show_every_box_in_the_colour_of_its_reply():
    sample = make_sample("diff", "val", 0)
    box = list(sample.targets[0].box)
    correct, wrong, none = (
        plots.draw_rollouts(sample, [make_row(sample, 0, *row)], BOX_FORMAT)
        for row in ((True, box), (False, box), (False, None)))
    assert has_colour(correct, plots.CORRECT) and not has_colour(correct, plots.PREDICTED)
    assert has_colour(wrong, plots.PREDICTED) and not has_colour(none, plots.PREDICTED)
    assert has_colour(none, plots.TARGET)


def test_of_many_updates_the_first_and_the_last_are_shown():
    sample = make_sample("diff", "val", 0)
    few, many = (plots.draw_rollouts(sample, [make_row(sample, step, True) for step in range(n)],
                                     BOX_FORMAT, steps=3) for n in (3, 9))
    assert few.size == many.size
    assert pictures._spread_indices(9, 3) == [0, 4, 8] and pictures._spread_indices(2, 3) == [0, 1]


def test_shares_are_stacked_and_named():
    rows = [{"step": step, "a": 1 - step / 10, "b": step / 10} for step in range(11)]
    figure = plots.plot_shares([*rows, {"step": 11, "a": None, "b": None}], ["a", "b"], "t", 1)
    axis = figure.axes[0]
    texts = {text.get_text() for text in axis.get_legend().get_texts()}
    assert texts == {"a 100 to 0 %", "b 0 to 100 %"}
    assert axis.get_xlim() == (0, 10) and axis.get_ylim() == (0, 100)
    plt.close(figure)


def test_every_name_has_one_colour_in_every_figure():
    few = palette.piece_colours(["kept", "dropped: format"])
    many = palette.piece_colours(["dropped: a", "dropped: b", "kept", "no answer"])
    assert few["kept"] == many["kept"] == palette.CORRECT
    assert len(set(many.values())) == 4, "no two pieces of a figure look alike"
    names = [f"reason {number}" for number in range(20)]
    assert palette.piece_colours(names).keys() == set(names)


def test_text_is_readable_on_its_background():
    assert palette.text_colour("#F0E442") == palette.INK
    assert palette.text_colour("#0072B2") == palette.text_colour("#4D4D4D") == "#FFFFFF"


def test_images_are_framed_and_fit_on_a_page():
    sample = make_sample("object_tracking", "val", 0)
    assert len(sample.images) >= 4
    picture = plots.draw_systems(sample, {"base": "", "sft": "?"}, BOX_FORMAT, 400)
    assert picture.width <= pictures.MAX_WIDTH
    frame = ImageColor.getrgb(palette.FRAME)
    row = np.asarray(picture)[pictures.HEAD - 1]
    assert (row == frame).all(-1).sum() > 0.8 * picture.width, "a line above every image"


def test_every_system_has_its_box_letter_and_colour():
    sample = make_sample("diff", "val", 0)
    image, box = sample.targets[0]
    answer = format_answer(image, to_model_box(box, sample.sizes[image - 1], BOX_FORMAT))
    reply = f"<think></think><answer>{answer}</answer>"
    replies = dict.fromkeys(("base", "sft", "grpo"), reply)
    picture = plots.draw_systems(sample, replies, BOX_FORMAT)
    assert all(has_colour(picture, palette.SYSTEM_COLOURS[system]) for system in replies)
    alone = plots.draw_systems(sample, {"sft": replies["sft"]}, BOX_FORMAT)
    assert not has_colour(alone, palette.SYSTEM_COLOURS["grpo"])


def test_scores_are_where_their_numbers_are():
    rows = [{"suite": suite, "system": system, "score": score, "ci95": [score - 5, score + 5],
             "n": 40} for suite, score in (("a", 20.0), ("b", 60.0)) for system in ("sft", "grpo")]
    figure = plots.plot_scores(rows, "suite", "Scores")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a, n = 40", "b, n = 40"]
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
    assert lines["SFT"] == lines["GRPO"] == [20.0, 60.0]
    plt.close(figure)


def test_a_dollar_in_the_name_of_a_task_is_no_formula():
    """Two of them would enclose one, and matplotlib would raise on what it cannot read."""
    plots.set_style()
    rows = [{"task": "cost in $_$ or \\$", "system": "base", "acc@0.5": 10.0,
             "ci95": [5.0, 15.0], "n": 4}]
    figure = plots.plot_scores(rows, "task", "a $\\x$ b", "acc@0.5")
    figure.canvas.draw()
    plt.close(figure)


def test_stacked_pieces_add_up_and_name_their_sum():
    figure = plots.plot_stacked({"sft": {"correct": 30, "no answer": 10, "x": 0}}, "t")
    axis = figure.axes[0]
    assert axis.get_yticklabels()[0].get_text() == "SFT, n = 40"
    assert [patch.get_width() for patch in axis.patches] == [30, 10]
    assert to_hex(axis.patches[0].get_facecolor()) == palette.CORRECT.lower()
    plt.close(figure)
