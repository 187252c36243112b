"""Completions that stock TRL's trainer and the kit's are given, so that their updates compare."""

import torch

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


def force_completions(*trainers):
    """Let trainers draw what `draw_completions` has."""
    for trainer in trainers:
        trainer._generate_single_turn = lambda prompt_ids, *_: (
            draw_completions(len(prompt_ids)), None)
