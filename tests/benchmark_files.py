"""Small annotation files of the real benchmarks that the kit runs, with their images."""

import json

from PIL import Image

from mig_kit.prompts import correct_answer

SIZES = {"a.png": (400, 200), "b.png": (150, 333), "c.png": (90, 90)}
CUP = {"task": "group_grounding", "images": ["c.png", "b.png", "a.png"],
       "answer": [0.5, 0.5, 1.0, 1.0], "additional_info": "It is in the third image.",
       "question": "Find <|object_ref_start|>a cup<|object_ref_end|>."}
MARKED = {"task": "multi_view", "images": ["a.png", "b.png", "c.png"],
          "answer": [0.1, 0.2, 0.5, 0.6],
          "question": "The object marked (<|box_start|>(250,500),(500,1000)<|box_end|>). "
                      "Locate this object in the 2th image. "}
DIFFERENCE = {"task": "diff", "images": ["a.png", "b.png"], "answer": [0.0, 0.0, 0.5, 0.5],
              "question": "Give me their difference."}
RECORDS = {
    "mig_bench": [MARKED, DIFFERENCE, CUP],
    "lisa": [{"image_path": "b.png", "instruction": "What can be eaten?",
              "boxes": [[15, 30, 75, 200]]}],
    "ref_l4": [{"id": 7, "caption": "a cup", "bbox": [40, 20, 200, 100], "file_name": "a.png"}],
    "mmiu": [{"task": "order", "question": "Which is first?", "context": "Two frames.",
              "options": "A: one B: the other", "input_image_path": ["a.png", "c.png"],
              "output": "B"}],
    "blink": [{"idx": "val_Counting_1", "task": "Counting", "question": "How many?",
               "choices": ["1", "3"], "answer": "(A)", "images": ["c.png"]}],
    "revos": [{"video_id": "video", "frames": [0, 2, 4], "question": "Who runs?",
               "bbox_list": [[0, 0, 9, 9], [0, 0, 9, 9], [14, 8, 70, 40]]}]}


def write_benchmarks(folder):
    (folder / "video").mkdir()
    videos = {f"video/{place:03}.jpg": (100 + 10 * place, 80) for place in range(5)}
    for name, size in (SIZES | videos).items():
        Image.new("RGB", size).save(folder / name)
    for name, records in RECORDS.items():
        (folder / f"{name}.json").write_text(json.dumps(records))


def correct_reply(sample, box_format):
    """A well-formed reply that answers the sample correctly."""
    return f"<think>Search.</think><answer>{correct_answer(sample, box_format)}</answer>"
