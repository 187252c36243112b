"""Advantages of your own: a function of rewards, a tensor (prompts, group), to a tensor like it.

    mig-kit run 05 06 --from default --run-id maxrl \\
        -p advantage notebooks/guide/advantages.py:maxrl
"""


def maxrl(rewards):
    """Differences from the group's mean, divided by it: prompts that are seldom solved weigh more.
    """
    mean = rewards.mean(1, keepdim=True)
    return (rewards - mean) / mean.clamp(min=1e-4)


def rloo(rewards):
    """Differences from the mean of the group's other rewards, divided by nothing."""
    group = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * group / (group - 1)
