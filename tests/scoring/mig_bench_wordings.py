"""Replies to MIG-Bench in many wordings: what names one image, and what is no answer."""

ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth")
CHINESE = "\u3007\u4e00\u4e8c\u4e09\u56db\u4e94\u516d"
PLAIN = (
    "In image {n}: ({x1},{y1}),({x2},{y2})", "{b} in image {n}", "Image_{n}: {b}", "image{n} {b}",
    "Image #{n}: {b}", "Image No. {n}: {b}", "No. {n} image: {b}", "**Image {n}**: {b}",
    "<image {n}> {b}", "[Image {n}] {b}", "Image ({n}): {b}", "image={n} bbox={b}", "img {n} {b}",
    "Image {n} of 6: {b}", "The object is at {b} in the {o} picture.", "The {o} one, {b}",
    "In the {o}: {b}", "{o}: {b}", "{n}-th image: {b}", "the {n} th photo: {b}",
    "the {o} of the images: {b}", "\\boxed{{image {n}: {b}}}", "Image \\boxed{{{n}}}: {b}",
    "$\\text{{Image }}{n}$: {b}", "\u7b2c{c}\u5f20\u56fe: {b}",
    "\u76ee\u6807\u5728\u56fe{n}\u4e2d\uff0c\u5750\u6807\u4e3a{b}", "\u56fe\u7247{n}\uff1a{b}",
    '{{"target_image": {n}, "bbox_2d": {b}}}', '{{"image": "Image {n}", "bbox": {b}}}',
    '[{{"image_index": {n}, "bbox_2d": {b}, "label": "man without hat"}}]',
    '```json\n[{{"bbox_2d": {b}, "label": "dog in image {n}"}}]\n```', '{{"image_{n}": {b}}}',
    '```json\n{{"image": "{o}", "bbox": {b}, "reason": "not in image {m}"}}\n```',
    'Image {n} has it: {{"x1": {x1}, "y1": {y1}, "x2": {x2}, "y2": {y2}}}.',
    'Image {n}: {{"x": {x1}, "y": {y1}, "width": {width}, "height": {height}}}',
    "The same dog can be seen in the {o} image at {b}.", "The difference is at {b} in image {n}.",
    "The object that all images share is at {b} in image {n}.",
    "Compared with the other images, image {n} has it at {b}.",
    "The box would be {b}, in image {n} and in no other.")
NO_ANSWER = (  # of the image that the question asks for, with its perfect box
    "It is not found in image {n}. {b}", "It isn't in image {n}: {b}", "No match in image {n} {b}",
    "There is none in image {n}: {b}", "Image {n} lacks it: {b}", "Missing from image {n}. {b}",
    "Anywhere but image {n}: {b}", "It cannot be in image {n}, {b}", "Unlike image {n}: {b}",
    "If it were in image {n}, it would be at {b}.", "Had it been in image {n}: {b}",
    "Suppose that it is in image {n}: {b}", "For example, image {n}: {b}", "Maybe image {n}: {b}",
    "It might be in image {n} at {b}.", "Probably image {n}: {b}", "I guess image {n}: {b}",
    "I am not sure; image {n}: {b}", "Is it in image {n}, at {b}?", "Either image {n}: {b}",
    "image {n}: {b}. On reflection this is wrong.", "image {n}: {b}. Wait!", "Ignore image {n} {b}",
    "image {n}: {b}. I take that back.", "image {n}: {b}, which was a mistake", "image {n} != {b}",
    '{{"image": {n}, "box": {b}, "found": false}}', "\u4e0d\u5728\u56fe{n}\u4e2d\uff1a{b}",
    "\u53ef\u80fd\u5728\u56fe{n}\uff1a{b}")
AMBIGUOUS = (
    "Images {n} and {m} both show it at {b}.", "Images 1-4: {b}", "image {n}/{m}: {b}",
    "images {n}, {m}: {b}", "image {n} or {m}: {b}", "image {n} or image {m}: {b}",
    "image {n}, or in the {p} image: {b}", "the {o} and {p} images: {b}", "both images: {b}",
    "the first two images: {b}", "It is in all images at {b}.", "in one of the images: {b}",
    "I compared image {m} with image {n}; it is in the latter at {b}.", "images one and two: {b}",
    "Image {m} is the reference; the other image has it at {b}.", "the image after image {n}: {b}",
    "In image {n}, the dog of image {m} is at {b}.", "second to last image: {b}",
    '{{"image": [{n}, {m}], "box": {b}}}', '{{"image": {n}, "box": {b}}}, or in image {m}',
    "\u56fe{n}\u548c\u56fe{m}\uff1a{b}")


def word_reply(wording, image, other, box):
    """A reply whose last <answer> says a box (four whole numbers of 0..1000) in these words; {n}
    and {o} stand for its image, {m} and {p} for another one.
    """
    x1, y1, x2, y2 = box
    text = wording.format(n=image, m=other, o=ORDINALS[image], p=ORDINALS[other], c=CHINESE[image],
                          b=list(box), x1=x1, y1=y1, x2=x2, y2=y2, width=x2 - x1, height=y2 - y1)
    return f"<think>Which one? Perhaps image {other}.</think><answer>{text}</answer>"
