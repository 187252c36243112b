"""Which prompts are kept, and which of them is shown; the training itself: stages/test_grpo.py."""

from mig_kit.boxes import BoxFormat
from mig_kit.serving import stored_replies
from mig_kit.training import recipe_trainer
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def test_prompts_are_spread_over_the_table():
    assert recipe_trainer.pick_prompts(100) == [0, 25, 50, 75]
    assert recipe_trainer.pick_prompts(3) == [0, 1, 2]


def test_the_first_prompt_with_a_box_is_shown(tmp_path, monkeypatch):
    samples = [next(iter_free_form("val", 1)), make_sample("diff", "val", 0),
               make_sample("diff", "val", 1)]
    assert stored_replies.draw_first_rollouts(tmp_path, BOX_FORMAT, samples) is None
    rows = [{"step": step, "prompt": prompt, "reply": "", "reward": 0.0, "correct": False,
             "boxes": []} for step in (0, 2) for prompt in (0, 1, 2)]
    stored_replies.write_rollouts(tmp_path, rows)
    assert stored_replies.load_rollouts(tmp_path) == rows
    drawn = []
    monkeypatch.setattr(stored_replies.pictures, "draw_rollouts",
                        lambda *given: drawn.append(given))
    for kept in (samples, samples[:1] * 3):
        stored_replies.draw_first_rollouts(tmp_path, BOX_FORMAT, kept)
    (first, rows_of_first, _), (choice, _, _) = drawn
    assert first is samples[1] and {row["prompt"] for row in rows_of_first} == {1}
    assert choice is samples[0], "where none asks for a box, the first"
