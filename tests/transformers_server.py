"""`transformers serve` with a model folder and a port, in an environment without torchvision.

Stock AutoProcessor makes a video processor, too, which needs torchvision; the kit's processor is
put in its place. Server, chat template, generation and decoding are transformers' own.
"""

import sys

from transformers import AutoProcessor
from transformers.cli.serve import Serve

from mig_kit.boxes import BoxFormat
from mig_kit.models.processors import load_processor

AutoProcessor.from_pretrained = lambda model, *_, **__: load_processor(model, BoxFormat())

if __name__ == "__main__":
    Serve(sys.argv[1], port=int(sys.argv[2]), host="127.0.0.1", device="cpu", dtype="float32")
