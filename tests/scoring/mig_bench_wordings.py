"""Natural wordings of a reply to MIG-Bench: each names the image with the box and another one."""

ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth")
WORDINGS = (
    "I compared it with image {other}. Its position in image {image} is [{x1}, {y1}, {x2}, {y2}].",
    "At ({x1},{y1}),({x2},{y2}) in the {image_word} image, as the {other_word} image suggests.",
    "Starting from the {other_word} picture, I searched the {image_word} picture and found it "
    "here: <box>{x1},{y1},{x2},{y2}</box>",
    'Image {image} has it in the box {{"x1": {x1}, "y1": {y1}, "x2": {x2}, "y2": {y2}}}, which '
    "agrees with image {other}.",
    '```json\n{{"image": "{image_word}", "bbox": [[{x1}, {y1}], [{x2}, {y2}]], "note": "like image '
    '{other}"}}\n```')


def word_reply(wording, image, box, other=None):
    """A reply whose last <answer> says a box (four whole numbers of 0..1000) of an image in these
    words; the other image that it mentions is the first or second.
    """
    other = other or (2 if image == 1 else 1)
    x1, y1, x2, y2 = box
    text = wording.format(image=image, other=other, image_word=ORDINALS[image],
                          other_word=ORDINALS[other], x1=x1, y1=y1, x2=x2, y2=y2)
    return f"<think>Which one?</think><answer>{text}</answer>"
