"""Boxes in pixels, as Qwen2.5-VL answers, under both protocols."""

import json
import re

import pytest
from mig_bench_records import prediction_lines, run_score, write_lines
from PIL import Image

from mig_kit.boxes import smart_resize
from mig_kit.score.convert_boxes import rewrite_boxes

SIZES = {"a.png": (400, 200), "b.png": (1200, 900), "c.png": (90, 90)}
TARGET = (0.1, 0.2, 0.5, 0.6)  # in the second image
RECORD = {"task": "common_object", "images": list(SIZES), "answer": list(TARGET),
          "question": "Locate it in the 2th image. "}
FORMS = ['[{{"bbox_2d": [{}, {}, {}, {}], "label": "the cup"}}]',
         "<think>Look.</think><answer>In image 2: ({},{}),({},{})</answer>"]


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / name)
    records = {"mig_bench": RECORD,
               "lisa": {"image_path": "b.png", "instruction": "cup",
                        "boxes": [[120, 180, 600, 540]]},
               "ref_l4": {"id": "x", "caption": "cup", "bbox": [120, 180, 480, 360],
                          "file_name": "b.png", "width": 1200, "height": 900}}
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
    return tmp_path


def headline(folder, benchmark, reply, *words):
    """(mean IoU, everything that the command says)."""
    out = folder / "out.json"
    result = run_score(folder, benchmark, "--images", folder, "--json", out, *words,
                       annotations=f"{benchmark}.json", replies=[reply])
    assert result.exit_code == 0, result.exception
    return json.loads(out.read_text())["avg"]["mean_iou"], result.output


def write_box(form, size):
    return form.format(*[round(v * side) for v, side in zip(TARGET, size * 2)])


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("benchmark", ["mig_bench", "lisa", "ref_l4"])
@pytest.mark.parametrize("coordinates", ["absolute", "pixels"])
def test_a_box_in_pixels_gets_what_it_deserves(folder, protocol, form, benchmark, coordinates):
    size = smart_resize(*SIZES["b.png"]) if coordinates == "absolute" else SIZES["b.png"]
    reply = write_box(form, size)
    if benchmark != "mig_bench":
        reply = reply.replace("image 2", "image 1")
    value, table = headline(folder, benchmark, reply, "--protocol", protocol, "--coordinates",
                            coordinates)
    assert value > 98
    assert ("converted before the authors' rule" in table) == (protocol == "official")


def test_the_table_says_which_limits_resized_the_images(folder):
    """Pixels of a processor with other limits are boxes elsewhere."""
    reply = write_box(FORMS[1], smart_resize(*SIZES["b.png"], max_pixels=120736))
    words = ("--coordinates", "absolute")
    value, table = headline(folder, "mig_bench", reply, *words)
    assert value < 20 and "resized to 3,136 to 401,408 pixels" in table
    value, table = headline(folder, "mig_bench", reply, *words, "--max-pixels", "120736")
    assert value > 98 and "resized to 3,136 to 120,736 pixels" in table


def test_two_models_may_answer_in_different_coordinates(folder):
    """The same box in 0 to 1000 and in 0 to 1."""
    write_lines(folder / "units.jsonl", prediction_lines([FORMS[1].format(*TARGET)]))
    words = ("--protocol", "strict", "--compare", str(folder / "units.jsonl"))
    for more, gap in ((), "+100.00"), (("--compare-coordinates", "normalized_1"), "+0.00"):
        _, table = headline(folder, "mig_bench", write_box(FORMS[1], (1000, 1000)), *words, *more)
        assert f" = {gap} points" in re.search("mean_iou, replies.jsonl minus .*", table)[0]


def test_every_box_is_rewritten_and_the_authors_rule_picks():
    text = "First [100,50,200,100], <box>0 0 400 200</box> and ( -3 , 0 ) , (7.5,1.25); [1, 2, 3]."

    def halve(*values):
        return tuple(float(value) / 2 for value in values)

    assert rewrite_boxes(text, halve) == (
        "First [50.0,25.0,100.0,50.0], <box>0.0 0.0 200.0 100.0</box> and ( -1.5 , 0.0 ) , "
        "(3.75,0.625); [1, 2, 3].")
    assert rewrite_boxes("[[4,2],[8,6]]", halve, in_place=False) == "(2.0,1.0),(4.0,3.0)"
    huge = f"[1,2,3,{'9' * 400}]"
    assert rewrite_boxes(huge, halve) == huge


def test_sizes_come_from_the_image_that_the_reply_names(folder):
    """The same numbers mean another box in an image of another size."""
    reply = write_box(FORMS[1].replace("image 2", "image 1"), smart_resize(*SIZES["a.png"]))
    words = ("--coordinates", "absolute")
    value, _ = headline(folder, "mig_bench", reply, *words)
    assert value > 98, "the authors' rule does not look at the image"
    assert headline(folder, "mig_bench", reply, *words, "--protocol", "strict")[0] == 0
