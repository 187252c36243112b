"""Coloured tokens: what they say and in which colour, read back from both forms."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from mig_kit.token_plots import WIDTH, colour_tokens


def grounds(coloured):
    """The background of every token, from the HTML."""
    return re.findall(r"background:(#[0-9a-f]{6})", coloured.html)


def test_the_larger_the_darker_and_out_of_range_is_cut():
    coloured = colour_tokens(["a", "b", "c", "d", "e"], [-1, 0, 1, 2, 9], low=0, high=2)
    lightness = [sum(ImageColor.getrgb(colour)) for colour in grounds(coloured)]
    assert lightness[0] == lightness[1] > lightness[2] > lightness[3] == lightness[4]
    pixels = np.asarray(coloured.image).reshape(-1, 3)
    for colour in grounds(coloured):
        assert (pixels == ImageColor.getrgb(colour)).all(1).any(), colour


def test_everything_is_escaped():
    coloured = colour_tokens(['<script>alert("1")</script>', "&lt;"], [1, 2], "<b>title</b>")
    assert "<script>" not in coloured.html and "&lt;script&gt;" in coloured.html
    assert "&amp;lt;" in coloured.html and "&lt;b&gt;title" in coloured.html


def test_numbers_are_tool_tips_and_line_breaks_show():
    coloured = colour_tokens(["a\n"], [0.125], number_format=".3f")
    assert 'title="0.125"' in coloured.html and "a\\n" in coloured.html


def test_the_picture_is_as_wide_as_a_page_and_wraps():
    one, many = (colour_tokens(["token"] * count, [1] * count) for count in (1, 60))
    assert one.image.width == many.image.width == WIDTH and many.image.height > one.image.height
    assert Image.open(io.BytesIO(many._repr_png_())).size == many.image.size
    assert many._repr_html_() == many.html


def test_equal_values_and_no_tokens_are_no_fault():
    assert len(set(grounds(colour_tokens(["a", "b"], [3, 3])))) == 1
    assert grounds(colour_tokens([], [])) == []


def test_a_value_for_each_token():
    with pytest.raises(ValueError, match="2 tokens and 1 values; give one value for each token"):
        colour_tokens(["a", "b"], [1])
