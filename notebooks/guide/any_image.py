"""A box reward without the image gate and without its floor at an IoU of 0.1.

    mig-kit run 05 06 --from default --run-id any_image \
        -p rewards "[format, image, notebooks/guide/any_image.py:box_in_any_image, choice]"
"""

from mig_kit.boxes import iou


def box_in_any_image(answer, sample):
    """The best IoU of the answer's box with a target, whichever image the answer names."""
    if sample.options:
        return None
    return max((iou(answer.box, target.box) for target in sample.targets if answer.box),
               default=0.0)
