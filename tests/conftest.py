"""Shared by the tests: a random Qwen2.5-VL of some 200,000 parameters with the shipped tokenizer and processor."""

import os

from mig_kit import runs

for name, value in runs.ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2_5_VLForConditionalGeneration  # noqa: E402

from mig_kit import models, vision  # noqa: E402
from mig_kit.tasks import TASKS, make  # noqa: E402

PIXELS = (3136, 401408)


@pytest.fixture(scope="session")
def float32():
    """Float32 on the CPU, whatever this CPU does best: the exactness tests need it."""
    return models.Hardware("cpu", torch.float32, False, "sdpa", "float32 for tests")


@pytest.fixture(scope="session")
def processor():
    """The shipped base's processor."""
    return models.load_processor(models.TINY_BASE)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory, processor):
    """A folder with a random model of some 200,000 parameters, loadable like any other."""
    folder = tmp_path_factory.mktemp("random") / "model"
    torch.manual_seed(0)
    shape = vision.config(640, hidden=64, layers=2, vision_hidden=64, vision_layers=2)
    model = Qwen2_5_VLForConditionalGeneration._from_config(shape)
    for parameter in model.model.language_model.parameters():  # livelier than the default, so that differences show
        if parameter.ndim > 1:
            parameter.data *= 4
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def random_model(random_folder, float32):
    """The random model, fresh."""
    return models.load_model(random_folder, float32)


@pytest.fixture(scope="session")
def samples():
    """One sample per task: 2 to 6 images, several sizes, with and without reference boxes."""
    return [make(task, "val", 3) for task in TASKS]
