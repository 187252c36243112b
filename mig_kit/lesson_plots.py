"""Pictures that explain: where in the pipeline a notebook is."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

# number -> (name, what it hands on)
STAGES = {
    "00": ("preflight", ""),
    "01": ("synthesise", "traces"),
    "02": ("SFT", "adapter"),
    "03": ("merge", "SFT model"),
    "04": ("rejection\nsampling", "kept prompts"),
    "05": ("RL (GRPO)", "GRPO model"),
    "06": ("evaluate", "scores"),
    "07": ("report", ""),
}
BESIDE = {"08": "benchmark", "09": "compare", "90": "tiny base"}
PRESENT, OUTLINE, INK = "#0072B2", "#777777", "#222222"


def draw_pipeline(stage: str) -> plt.Figure:
    """A strip of all stages with the present one filled, and under each arrow what is handed on.

    stage: its number, or its name as "02_sft". 08, 09 and 90 stand beside the recipe, dashed; 90
    comes before it. KeyError for another. The figure is closed: as a cell's last line it is shown
    once.
    """
    number = stage[:2]
    names = {key: name for key, (name, _) in STAGES.items()}
    if number in BESIDE:
        beside = {number: BESIDE[number]}
        names = beside | names if number == "90" else names | beside
    elif number not in names:
        raise KeyError(f"no stage '{stage}'; use one of {', '.join((*STAGES, *BESIDE))}")
    figure, axes = plt.subplots(figsize=(9.2, 1.15))
    for place, (key, name) in enumerate(names.items()):
        is_present = key == number
        axes.add_patch(FancyBboxPatch(
            (place + 0.14, 0.42), 0.72, 0.76, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=PRESENT if is_present else "white", edgecolor=OUTLINE,
            linestyle="--" if key in BESIDE else "-"))
        axes.text(place + 0.5, 0.8, f"{key}\n{name}", ha="center", va="center", fontsize=8,
                  color="white" if is_present else INK,
                  fontweight="bold" if is_present else "normal")
        handed_on = STAGES.get(key, ("", ""))[1]
        if handed_on:
            axes.annotate("", (place + 1.14, 0.8), (place + 0.86, 0.8),
                          arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 0,
                                      "shrinkB": 0})
            axes.text(place + 1, 0.28, handed_on, ha="center", va="center", fontsize=8,
                      color=INK)
    axes.set(xlim=(0, len(names)), ylim=(0.1, 1.25))
    axes.axis("off")
    plt.close(figure)
    return figure
