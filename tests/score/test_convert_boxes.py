"""Boxes in pixels, as Qwen2.5-VL answers, under both protocols."""

import json

import pytest
from mig_bench_records import prediction_lines, run_score, write_lines
from PIL import Image

from mig_kit.boxes import BoxFormat, smart_resize
from mig_kit.score.convert_boxes import convert_exactly, rewrite_boxes

SIZES = {"a.png": (400, 200), "b.png": (1200, 900), "c.png": (90, 90)}
TARGET = (0.1, 0.2, 0.5, 0.6)  # in the second image
RECORD = {"task": "common_object", "images": list(SIZES), "answer": list(TARGET),
          "question": "Locate it in the 2th image. "}
FORMS = ['```json\n[\n\t{{"bbox_2d": [{}, {}, {}, {}], "label": "cup"}}\n]\n```',
         '[{{"bbox_2d": [{}, {}, {}, {}], "label": "the cup"}}]',
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


@pytest.mark.parametrize("protocol", ["official", "strict"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("benchmark", ["mig_bench", "lisa", "ref_l4"])
@pytest.mark.parametrize("coordinates", ["absolute", "pixels"])
def test_a_box_in_pixels_gets_what_it_deserves(folder, protocol, form, benchmark, coordinates):
    width, height = smart_resize(*SIZES["b.png"]) if coordinates == "absolute" else SIZES["b.png"]
    box = [round(v * side) for v, side in zip(TARGET, (width, height) * 2)]
    reply = form.format(*box)
    if benchmark != "mig_bench":
        reply = reply.replace("image 2", "image 1")
    value, table = headline(folder, benchmark, reply, "--protocol", protocol, "--coordinates",
                            coordinates)
    assert value > 98
    assert ("converted before the authors' rule" in table) == (protocol == "official")


def test_pixels_without_the_option_score_little_and_the_table_names_it(folder):
    width, height = SIZES["b.png"]
    reply = FORMS[0].format(*[round(v * side) for v, side in zip(TARGET, (width, height) * 2)])
    value, _ = headline(folder, "mig_bench", reply)
    assert value < 80
    _, table = headline(folder, "mig_bench", FORMS[0].format(0, 0, 1150, 800))
    assert "--coordinates absolute" in table and "scored all the same" in table


def test_the_table_says_which_limits_resized_the_images(folder):
    """Pixels of a processor with other limits are boxes elsewhere."""
    size = smart_resize(*SIZES["b.png"], max_pixels=120736)
    reply = FORMS[2].format(*[round(v * side) for v, side in zip(TARGET, size * 2)])
    words = ("--coordinates", "absolute")
    value, table = headline(folder, "mig_bench", reply, *words)
    assert value < 20 and "resized to 3,136 to 401,408 pixels" in table
    value, table = headline(folder, "mig_bench", reply, *words, "--max-pixels", "120736")
    assert value > 98 and "resized to 3,136 to 120,736 pixels" in table


def test_two_models_may_answer_in_different_coordinates(folder):
    """The same box in 0 to 1000 and in 0 to 1."""
    write_lines(folder / "units.jsonl", prediction_lines([FORMS[2].format(*TARGET)]))
    reply = FORMS[2].format(*[round(1000 * value) for value in TARGET])
    words = ("--protocol", "strict", "--compare", str(folder / "units.jsonl"))
    _, table = headline(folder, "mig_bench", reply, *words)
    assert "mean_iou, replies.jsonl minus units.jsonl: +100.00 points" in table
    _, table = headline(folder, "mig_bench", reply, *words, "--compare-coordinates", "normalized_1")
    assert "mean_iou, replies.jsonl minus units.jsonl: +0.00 points" in table


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


@pytest.mark.parametrize("answer,target,expected", [
    ("image 2: [-1, 0, 309, 154]", 2, "image 2: (0.0000,0.0000),(1000.0000,500.0000)"),
    # what reaches further is left for the scorer to refuse
    ("image 2: [-2, 0, 308, 154]", 2, "image 2: (-6.4935,0.0000),(1000.0000,500.0000)"),
    ("In image 1 and image 2: [0, 0, 154, 308]", 2, "In image 1 and image 2: [0, 0, 154, 308]")])
def test_strict_boxes_in_pixels_are_cut_by_a_pixel_and_converted(answer, target, expected):
    reply = convert_exactly(f"<answer>{answer}</answer>", [(308, 308)] * 2, target, BoxFormat())
    assert reply == f"<answer>{expected}</answer>"


def test_sizes_come_from_the_image_that_the_reply_names(folder):
    """The same numbers mean another box in an image of another size."""
    width, height = smart_resize(*SIZES["a.png"], BoxFormat().min_pixels, BoxFormat().max_pixels)
    box = [round(v * side) for v, side in zip(TARGET, (width, height) * 2)]
    reply = f"<answer>In image 1: ({box[0]},{box[1]}),({box[2]},{box[3]})</answer>"
    value, _ = headline(folder, "mig_bench", reply, "--coordinates", "absolute")
    assert value > 98, "the authors' rule does not look at the image"
    strict, _ = headline(folder, "mig_bench", reply, "--coordinates", "absolute", "--protocol",
                         "strict")
    assert strict == 0
