"""What 05b's pieces are worth: its cells, one of them changed, for several seeds, from tiny/sft.

`python .ci/pieces.py` writes notebooks/guide/pieces.json. A prompt is read once per group, as in
the kit, where 05b reads it for every reply; 05b's last section compares the two.
"""

import json
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import papermill
from evidence_pages import describe

from mig_kit.common import NOTEBOOKS, write_json
from mig_kit.pipeline.execute import ThisPython
from mig_kit.pipeline.processes import prepare_process
from mig_kit.pipeline.run_facts import describe_machine

NOTEBOOK = NOTEBOOKS / "05b_grpo_by_hand.ipynb"
OUT = NOTEBOOKS / "guide" / "pieces.json"
SEEDS, MORE_SEEDS = 3, {"all pieces": 6, "format alone": 6, "no mean": 6}  # three left these open
LAST = "after = ask(held_out)"
RETURN = "            + 1.0 * box_reward(answer, sample))"
FAST = {"learning_rate": 0.001, "passes": 4, "steps": 16}
CLIP = ("clipped = ratio.clamp(1 - epsilon, 1 + epsilon)", "clipped = ratio")
# name -> (parameters, (text of a cell, what stands there instead) of each change)
WAYS = {
    "all pieces": ({}, ()),
    "format alone": ({}, (("            + 0.3 * image_reward(answer, sample)\n" + RETURN, ")"),)),
    "long list": ({}, ((RETURN, RETURN[:-1] + """
            + 0.2 * sum(map(answer.text.partition("</think>")[0].count, ",.")))"""),)),
    "no mean": ({}, ((RETURN, RETURN[:-1] + " + 1)"),
                     ("(groups - groups.mean(1, keepdim=True))", "groups"))),
    "no clip": ({}, (CLIP,)),
    "fast": (FAST, ()),
    "fast, no clip": (FAST, (CLIP,)),
}
# a prompt is read once per group; the last cell prints the bits. These too are texts of cells
OWN = (("skip_special_tokens=True)", '''skip_special_tokens=True)

from mig_kit.models.sample_prompts import SampleCache
from mig_kit.shared_prefix.generation import SamplingOptions, generate_rollouts
from mig_kit.shared_prefix.logprobs import completion_logps
cache = SampleCache(model, processor, box_format)

def encode(rows):
    return rows

def draw(rows, is_greedy=False):
    group = 1 if is_greedy else group_size
    drawn = generate_rollouts(model, processor, cache.get(rows[::group]), group, SamplingOptions(
        temperature=0.0 if is_greedy else 1.0, max_new_tokens=max_new_tokens))
    ids = [reply for of_prompt in drawn for reply in of_prompt]
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(list(map(len, ids)))[:, None]
    return tokens, mask, processor.batch_decode(ids, skip_special_tokens=True)'''),
       ("logps = log_probs(inputs, tokens, mask)\nprint", '''def log_probs(rows, tokens, mask):
    index = torch.arange(len(rows)) // group_size
    return completion_logps(model, cache.get(rows[::group_size]), index, tokens, mask)[0]

logps = log_probs(inputs, tokens, mask)
print'''),
       (LAST, LAST + '''
import json
bits = {"before": is_right, "after": list(map(is_correct, read(after, held_out), held_out))}
print(json.dumps({when: "".join(str(int(bit)) for bit in row) for when, row in bits.items()}))'''))


def run_way(name: str, seed: int) -> dict[str, str]:
    """Before and after the training: 0 or 1 for each of 05b's held-out questions."""
    params, changes = WAYS[name]
    notebook, left = nbformat.read(NOTEBOOK, 4), dict(OWN + changes)
    last = next(place for place, cell in enumerate(notebook.cells) if LAST in cell.source)
    del notebook.cells[last + 1:]
    for cell in notebook.cells:
        for old in [old for old in left if old in cell.source and cell.cell_type == "code"]:
            cell.source = cell.source.replace(old, left.pop(old))
    assert not left, f"05b has no cell with {list(left)}"
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "changed.ipynb", Path(folder) / "out.ipynb"
        nbformat.write(notebook, path)
        papermill.execute_notebook(path, out, {"seed": seed, "run_id": "none", **params},
                                   kernel_manager_class=ThisPython, progress_bar=False)
        *_, last = nbformat.read(out, 4).cells
    printed = "".join(output.get("text", "") for output in last.outputs)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def by_task(rows: list[dict], when: str) -> np.ndarray:
    """(seeds, tasks, questions) 0 or 1; the two tasks of 05b take turns."""
    bits = np.array([[*map(int, row[when])] for row in rows], float)
    return bits.reshape(len(rows), -1, 2).transpose(0, 2, 1)


def main() -> None:
    """Run what OUT lacks, and print each way's score and its points over all pieces."""
    prepare_process()
    facts = describe_machine()  # before OUT changes
    correct = json.loads(OUT.read_text())["correct"] if OUT.is_file() else {}
    for name in WAYS:
        for seed in range(len(correct.get(name, [])), MORE_SEEDS.get(name, SEEDS)):
            correct.setdefault(name, []).append(run_way(name, seed))
            write_json(OUT, {**facts, "correct": correct})
    for name, rows in correct.items():
        others = correct["fast" if "fast" in name else "all pieces"]
        gaps = by_task(rows, "after") - by_task(others[:len(rows)], "after")
        scores = 100 * by_task(rows, "after").mean((1, 2))
        print(f"{name}: {', '.join(f'{score:.0f}' for score in scores)} % correct; over all pieces "
              f"{describe(gaps)}; over the start "
              f"{describe(by_task(rows, 'after') - by_task(rows, 'before'))}")


if __name__ == "__main__":
    main()
