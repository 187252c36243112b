"""Completions that stock TRL's trainer and the kit's are given, so that their updates compare."""

import torch

from mig_kit.shared_prefix.generation import Completion

END = 2
LENGTHS = (5, 3, 6, 2, 6, 4, 1, 5)
HAS_END = [True, True, False, True, True, False, True, True]


def draw_completions(count):
    """Token ids of `count` completions, some without an end; always the same."""
    generator = torch.Generator().manual_seed(0)
    completions = []
    for number in range(count):
        length = LENGTHS[number % 8]
        ids = torch.randint(7, 600, (length,), generator=generator).tolist()
        completions.append([*ids[:-1], END] if HAS_END[number % 8] else ids)
    return completions


def force_completions(stock, own):
    """Let both trainers draw what `draw_completions` has."""
    stock._generate_single_turn = lambda prompt_ids, *_: (draw_completions(len(prompt_ids)), None)
    own._draw_completions = lambda numbers, group: [
        Completion(ids, [0.0] * len(ids)) for ids in draw_completions(len(numbers))]
