"""Own data of any size, made up, and what reading it takes: memory, decoded images, seconds.

    python tests/big_data.py FOLDER 20000 6000
"""

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageFile

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.pipeline.params import profile_params
from mig_kit.prompts import format_answer, read_reply

SIZE = (1152, 864)
BOX = (100, 200, 500, 700)


def make_data(folder: Path, n_questions: int, n_images: int, size: tuple[int, int] = SIZE,
              max_pixels: int | None = None) -> Path:
    """Write the images and the JSONL, two images a question; max_pixels: as the reading run has."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(n_images):
        coarse = Image.frombytes("RGB", (96, 72), rng.randbytes(96 * 72 * 3))
        coarse.resize(size, Image.Resampling.BILINEAR).save(folder / f"{number}.jpg", quality=85)
    params = profile_params("01_synthesize")
    box_format = BoxFormat(params["min_pixels"], max_pixels or params["max_pixels"],
                           params["coordinates"])
    answer = format_answer(2, to_model_box(BOX, size, box_format))
    reply = f"<think>Search. The second one has it.</think><answer>{answer}</answer>"
    with (folder / "own.jsonl").open("w") as file:
        for number in range(n_questions):
            first = number % n_images
            names = [f"{first}.jpg", f"{(first + 1 + number // n_images) % n_images}.jpg"]
            line = {"images": names, "question": f"Where is thing {number}?", "image": 2,
                    "box": BOX, "coordinates": "pixels", "reply": reply}
            file.write(json.dumps(line) + "\n")
    return folder / "own.jsonl"


def count_decodes() -> list[int]:
    count, load_prepare = [0], ImageFile.ImageFile.load_prepare

    def load_and_count(image):
        count[0] += 1
        return load_prepare(image)

    ImageFile.ImageFile.load_prepare = load_and_count
    return count


def read_all(own_file: Path, out: Path) -> None:
    """What 01 with the teacher "own", 04 and 02 do with images; prints figures as JSON."""
    from types import SimpleNamespace

    import numpy as np

    from mig_kit.filters import drop_reason
    from mig_kit.sample import read_replies, read_samples, write_samples
    from mig_kit.stages import rejection_sampling, sanity_checks, sft, sources, synthesize

    count, start = count_decodes(), time.monotonic()
    changes = {"data": str(own_file), "teacher": "own", "data_shares": [0.4, 0.4, 0.2]}
    p = SimpleNamespace(**{**profile_params("01_synthesize"), **changes})
    box_format = BoxFormat(p.min_pixels, p.max_pixels, p.coordinates)
    sets, _ = sources.load_training_sets(p, out)
    traces = synthesize.read_own_traces(sets["cot"].path)
    reasons = (drop_reason(trace.text, sample, box_format)
               for sample, trace in zip(sets["cot"], traces))
    counts = synthesize.keep_good_traces(out / "cot.parquet", sets["cot"], traces, reasons)
    seconds, decodes = time.monotonic() - start, {"01": count[0]}
    candidates = read_samples(out / "rl.parquet")
    answers = {sample.id: [read_reply(reply, sample, box_format) for reply in ("no", "yes")]
               for sample in candidates}
    rejection_sampling.pass_rates(candidates, answers)
    kept, _ = rejection_sampling.select_by_pass_rate(
        candidates, np.full(len(candidates), 0.5), lowest=0.1, highest=0.9, per_task=10**9, seed=0)
    (out / "04").mkdir(exist_ok=True)
    write_samples(out / "04" / "kept.parquet", candidates.select(kept))
    decodes["04"] = count[0] - decodes["01"]
    samples, texts = read_samples(out / "cot.parquet"), read_replies(out / "cot.parquet")
    sanity_checks.check_box_coordinates(samples, texts, box_format)
    sft.sft_table(samples, texts, box_format)
    decodes["02, lengths"] = count[0] - decodes["01"] - decodes["04"]
    rows = [sft.sft_row(samples[row], texts[row], box_format) for row in range(4)]
    assert all(image.size == SIZE or image.size for row in rows for image in row["images"])
    print(json.dumps({
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "decodes": decodes,
        "kept": counts["kept"], "sizes": {name: len(rows) for name, rows in sets.items()},
        "rl_kept": len(read_samples(out / "04" / "kept.parquet")),
        "samples_per_second": sum(map(len, sets.values())) / seconds}))


def measure(*own_files: Path) -> list[dict]:
    """The figures of one file after the other, read by one process."""
    command = [sys.executable, __file__, "--read", *own_files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    if sys.argv[1] == "--read":
        for own_file in map(Path, sys.argv[2:]):
            read_all(own_file, own_file.with_name("out"))
    else:
        own_file = make_data(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        print(json.dumps(measure(own_file), indent=1))
