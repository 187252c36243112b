"""The prompts that 04 kept, with two traces of the rules each, as own data: SFT on what RL sees.

    python notebooks/guide/kept_prompts.py RUN FOLDER
    mig-kit run 01 02 03 --run-id equal_data -p data FOLDER/kept.jsonl -p teacher own \
        -p base_model runs/RUN/03_merge/merged -p data_shares "[0.996, 0.002, 0.002]"
"""

import sys
from pathlib import Path

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_json_lines
from mig_kit.pipeline.runs import Run
from mig_kit.sample import read_samples
from mig_kit.stages.synthesize import RuleBasedTraces

TRACES = 2  # of a question, as in 01

run, folder = Run(sys.argv[1]), Path(sys.argv[2])
params = run.with_run_params("04_rejection_sampling", run.params("04_rejection_sampling"))
box_format = BoxFormat.of(params)
kept = read_samples(run.stage_folder("04_rejection_sampling") / "kept.parquet")
samples = kept.select([row for row in range(len(kept)) for _ in range(TRACES)])
(folder / "images").mkdir(parents=True, exist_ok=True)
lines = []
for number, (sample, trace) in enumerate(zip(
        samples, RuleBasedTraces(samples, params["seed"], box_format))):
    names = [f"{number // TRACES}-{place}.png" for place in range(len(sample.images))]
    for name, image in zip(names, sample.images.encoded):
        (folder / "images" / name).write_bytes(image.read_bytes())
    answer = {"options": sample.options, "letter": sample.letter} if sample.options else {
        "image": sample.targets[0].image, "box": sample.targets[0].box, "coordinates": "pixels"}
    reference = {"reference": sample.reference, "coordinates": "pixels"} if sample.reference else {}
    lines.append({"images": [f"images/{name}" for name in names], "question": sample.question,
                  "id": f"{sample.id}-{number % TRACES}", "task": sample.task,
                  "reply": trace.text, **answer, **reference})
write_json_lines(folder / "kept.jsonl", lines)
print(f"{len(kept)} prompts, {len(lines)} traces: {folder / 'kept.jsonl'}")
