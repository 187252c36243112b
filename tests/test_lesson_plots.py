"""Pictures that explain: what they say, read back."""

import pytest
from matplotlib.colors import to_hex

from mig_kit import lesson_plots
from mig_kit.pipeline import store


@pytest.mark.parametrize("stage", store.STAGES)
def test_the_present_stage_alone_is_filled(stage):
    axes = lesson_plots.draw_pipeline(stage).axes[0]
    filled = [to_hex(patch.get_facecolor()) == lesson_plots.PRESENT.lower()
              for patch in axes.patches]
    labels = [text.get_text() for text in axes.texts if text.get_text()[:2].isdigit()]
    assert sum(filled) == 1 and labels[filled.index(True)].startswith(stage[:2])
    assert [label[:2] for label in labels if label[:2] < "08"] == [f"0{n}" for n in range(8)]


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(KeyError, match="no stage '10'"):
        lesson_plots.draw_pipeline("10")
