"""Rewards that look right and pay for something else: notebook 11 trains with them."""


def covered_share(answer, sample):
    """How much of the target the box covers, in the right image, 0 to 1."""
    if answer.box is None:
        return 0.0
    x1, y1, x2, y2 = answer.box
    shares = [max(0, min(x2, b[2]) - max(x1, b[0])) * max(0, min(y2, b[3]) - max(y1, b[1]))
              / ((b[2] - b[0]) * (b[3] - b[1]))
              for image, b in sample.targets if image == answer.image]
    return max(shares, default=0.0)


def things_listed(answer, sample):
    """0.3 for every comma of the reasoning: who lists more has looked harder."""
    return 0.3 * answer.thinking.count(",")
