"""A box reward without the image gate and without its floor at an IoU of 0.1.

    mig-kit run 05 06 --from default --run-id any_image \
        -p rewards "[format, image, notebooks/guide/any_image.py:box_in_any_image, choice]"
"""

from mig_kit.boxes import iou
from mig_kit.prompts import reply_boxes_in_original


def box_in_any_image(reply, sample, box_format):
    """The best IoU of the reply's box with a target, whichever image the reply names."""
    if sample.options:
        return None
    boxes = [box for _, box in reply_boxes_in_original(sample, reply, box_format)]
    return max((iou(box, target.box) for box in boxes for target in sample.targets), default=0.0)
