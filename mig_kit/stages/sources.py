"""Stage 01, the questions: drawn scenes, your own JSONL, or MGrounding-630k, as one cold-start, RL
and validation set.
"""

import hashlib
from collections.abc import Iterable
from types import SimpleNamespace

from mig_kit.common import PROJECT_ROOT
from mig_kit.data import mgrounding, own_data
from mig_kit.image_files import SkipReport
from mig_kit.sample import Sample
from mig_kit.world import suites

SET_NAMES = ("cot", "rl", "val")


def load_training_sets(p: SimpleNamespace) -> tuple[dict[str, list[Sample]], str]:
    """The three sets that the parameters of 01 ask for, and a text on what was left out and why, ""
    for a source that leaves nothing out.

    Relative paths start at the project's folder. Real images are held in memory, three bytes a
    pixel: data_limit bounds them. ValueError for an unknown source or teacher, for the rule-based
    teacher on images that no scene graph describes, and for a set that stays empty.
    FileNotFoundError for a missing file or image root.
    """
    if p.teacher not in ("rules", "endpoint"):
        raise ValueError(f"teacher is '{p.teacher}'; use rules or endpoint")
    if p.data == "scenes":
        return _draw_sets(p), ""
    if p.data not in ("own", "mgrounding"):
        raise ValueError(f"data is '{p.data}'; use scenes, own or mgrounding")
    if p.teacher == "rules":
        raise ValueError(f"the rules teacher reads drawn scenes only; with data '{p.data}' set "
                         "teacher to endpoint")
    if not p.data_file:
        raise ValueError(f"data is '{p.data}': name its file in data_file")
    path = PROJECT_ROOT / p.data_file
    root = PROJECT_ROOT / p.image_root if p.image_root else path.parent
    if not path.is_file() or not root.is_dir():
        raise FileNotFoundError(f"data_file {path} or image_root {root} is not there")
    report = SkipReport()
    if p.data == "own":
        samples = own_data.iter_samples(path, root, p.data_limit)
    else:
        samples = mgrounding.iter_samples(path, root, report, limit=p.data_limit)
    sets = split_by_image(samples, p.data_shares)
    empty = [name for name in SET_NAMES if not sets[name]]
    if empty:
        raise ValueError(f"no question fell to {' and '.join(empty)}; raise data_limit or change "
                         f"data_shares\n{report.summarize()}")
    return sets, report.summarize() if report.read else ""


def _draw_sets(p: SimpleNamespace) -> dict[str, list[Sample]]:
    return {
        "cot": suites.draw_training_mix("cot", p.cot_per_task, p.free_form_per_task, p.seed),
        "rl": suites.draw_training_mix("rl", p.rl_per_task, p.rl_free_form_per_task, p.seed,
                                       p.rl_boxes_per_task),
        "val": suites.draw_task_samples("val", p.val_per_task, p.seed),
    }


def split_by_image(samples: Iterable[Sample], shares: list[float]) -> dict[str, list[Sample]]:
    """The samples in the three sets, by a hash of the first image: all questions on it fall to the
    same set.

    shares: of cot, rl and val; ValueError if they do not sum to 1. Other images of a question may
    still be shared between sets; compare folders with `mig-kit data duplicates`.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"data_shares is {shares}; give three shares, of cot, rl and val, that "
                         "sum to 1")
    sets: dict[str, list[Sample]] = {name: [] for name in SET_NAMES}
    for sample in samples:
        image = sample.images[0]
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
        position = int.from_bytes(digest[:8], "big") / 2 ** 64
        if position < shares[0]:
            sets["cot"].append(sample)
        elif position < shares[0] + shares[1]:
            sets["rl"].append(sample)
        else:
            sets["val"].append(sample)
    return sets
