"""Why a prompt that is read once is enough, drawn (notebook 08)."""

import matplotlib.pyplot as plt

from mig_kit.palette import CORRECT, INK, SIDE_COLOURS
from mig_kit.plots import WIDTH


def count_tokens(prompt: int, group: int, reply: int) -> dict[str, int]:
    """Tokens that pass through the model for one prompt with `group` replies of `reply` tokens:
    "stock" reads the prompt before every reply, "kit" once.
    """
    return {"stock": group * (prompt + reply), "kit": prompt + group * reply}


def draw_shared_prompt(prompt: int, group: int, reply: int) -> plt.Figure:
    """A bar per row of the batch, as long as its tokens: the prompt in grey, a reply in blue; above
    as stock trainers read them, below as the kit does.
    """
    tokens = count_tokens(prompt, group, reply)
    figure, axes = plt.subplots(2, 1, sharex=True, layout="constrained", figsize=(
        WIDTH, 1.6 + 0.2 * group), height_ratios=(group, group + 1))
    stock, kit = axes
    stock.barh(range(group), [prompt] * group, color=SIDE_COLOURS["stock"], edgecolor="white",
               label="prompt: images and question")
    stock.barh(range(group), [reply] * group, left=prompt, color=CORRECT, edgecolor="white",
               label="a reply")
    kit.barh([0], [prompt], color=SIDE_COLOURS["stock"], edgecolor="white")
    kit.barh(range(1, group + 1), [reply] * group, left=prompt, color=CORRECT, edgecolor="white")
    for row in range(1, group + 1):  # every reply attends to the one prompt
        kit.plot([prompt / 2, prompt / 2, prompt], [0.45, row, row], color=INK, linewidth=0.6,
                 linestyle=":")
    for axis, title in ((stock, f"Stock: the prompt is read {group} times, "
                                f"{tokens['stock']:,} tokens"),
                        (kit, f"Kit: it is read once, its keys and values are shared, "
                              f"{tokens['kit']:,} tokens")):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_yticks([])
        axis.invert_yaxis()
        axis.grid(False)
    kit.set_xlabel("tokens of a row")
    figure.legend(frameon=False, ncols=2, fontsize=9, loc="outside lower center")
    return figure
