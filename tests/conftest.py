"""Shared by the tests: a random Qwen2.5-VL of some 200,000 parameters with the shipped tokenizer and processor."""

import os
import subprocess
import sys

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROCESS_ENVIRONMENT
from mig_kit.engine import models
from mig_kit.world.tasks import TASKS, make_sample

for name, value in PROCESS_ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

  # noqa: E402
  # noqa: E402


@pytest.fixture(scope="session")
def float32():
    """Float32 on the CPU, whatever this CPU does best: the exactness tests need it."""
    return models.Hardware("cpu", torch.float32, False, "sdpa", "float32 for tests")


@pytest.fixture
def first_gradients():
    """Call it with a trainer for a dict that will hold the first update's gradients by name."""
    def record(trainer) -> dict[str, torch.Tensor]:
        found = {}

        class Record(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                found.update(found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer.add_callback(Record())
        return found

    return record


@pytest.fixture(scope="session")
def processor():
    """The shipped base's processor."""
    return models.load_processor(models.TINY_BASE, box_format=BoxFormat())


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory, processor):
    """A folder with a random model of some 200,000 parameters, loadable like any other."""
    folder = tmp_path_factory.mktemp("random") / "model"
    torch.manual_seed(0)
    shape = models.tiny_config(640, hidden=64, layers=2, vision_hidden=64, vision_layers=2)
    model = Qwen2_5_VLForConditionalGeneration._from_config(shape)
    for parameter in model.model.language_model.parameters():  # livelier than the default, so that differences show
        if parameter.ndim > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory):
    """A folder of runs with a whole smoke run, "smoke", 08 and 90 too, through the command line; tests change copies of it.

    Made once, by the first of the processes that the tests run in.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-runs"
    with FileLock(f"{root}.lock"):
        for stages in ((), ("08", "90")):
            command = [sys.executable, "-c", "from mig_kit.cli import main; main()", "run", *stages, "--profile", "smoke"]
            result = subprocess.run([*command, "--run-id", "smoke"], env={**os.environ, "MIG_KIT_RUNS": str(root)},
                                    capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    return root


@pytest.fixture(scope="session")
def relatives(tmp_path_factory, processor):
    """Folders with random models of the two families that write boxes in thousandths, by model_type."""
    root, folders = tmp_path_factory.mktemp("relatives"), {}
    text = models.tiny_config(640, hidden=64, layers=2).text_config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
    tokens = dict(image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True)
    towers = {"qwen2_vl": dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2),
              "qwen3_vl": dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=64,
                               num_position_embeddings=64, deepstack_visual_indexes=[0, 1])}
    for family, tower in towers.items():
        language = {name: text[name] for name in kept} | ({"head_dim": 32} if family == "qwen3_vl" else {})
        torch.manual_seed(0)
        model = models.FAMILIES[family](AutoConfig.for_model(family, text_config=language, vision_config=tower, **tokens))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 4
        folders[family] = root / family
        model.save_pretrained(folders[family])
        processor.tokenizer.save_pretrained(folders[family])
        images = Qwen2VLImageProcessorPil(patch_size={"qwen2_vl": 14, "qwen3_vl": 16}[family])
        images.save_pretrained(folders[family])
        (folders[family] / "chat_template.jinja").write_text(processor.chat_template)
    return folders


@pytest.fixture
def random_model(random_folder, float32):
    """The random model, fresh."""
    return models.load_model(random_folder, float32)


@pytest.fixture(scope="session")
def samples():
    """One sample per task: 2 to 6 images, several sizes, with and without reference boxes."""
    return [make_sample(task, "val", 3) for task in TASKS]
