"""Outputs as markdown, on literal ones."""

import base64
import io

from nbformat.v4 import new_output
from PIL import Image

from mig_kit.pipeline.lesson_outputs import (
    alternative_text,
    clean_text,
    fence,
    html_tables,
    join_streams,
    markdown_table,
    output_picture,
    output_text,
    shrink_picture,
    text_block,
    web_formulas,
)


def stream(text):
    return output_text(new_output("stream", name="stdout", text=text), {})


def picture_bytes(size, colour="red"):
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_only_standard_output_is_shown():
    texts = [("stdout", "a\n"), ("stderr", "UserWarning: x"), ("stdout", "b\n")]
    outputs = [new_output("stream", name=name, text=text) for name, text in texts]
    result = new_output("execute_result", {"text/plain": "1"})
    assert [output.get("text") for output in join_streams([*outputs, result, outputs[0]])] == [
        "a\nb\n", None, "a\n"]
    assert stream("kept\n") == "```text\nkept\n```"
    assert stream("  \n") == ""


def test_progress_bars_and_control_codes_are_left_out():
    bar = "filter:   0%|          | 0/9 [00:00<?]\rfilter: 100%|====| 9/9 [00:01<00:00]\n"
    assert clean_text(bar, {}) == ""
    assert clean_text("step 24/484: loss 0.5; 7.9 min left\nloss 0.5", {}) == "loss 0.5"
    warning = "lib/peft/save.py:313: UserWarning: no file\n  warnings.warn(\n"
    assert clean_text(f"a\n{warning}b\n{warning}", {}) == "a\nb"
    assert clean_text("\x1b[31mred\x1b[0m", {}) == "red"
    assert clean_text("half\rwhole\r\nnext", {}) == "whole\nnext"


def test_folders_of_the_machine_are_left_out():
    folders = {"/home/a/kit/": "", "/home/a/kit/runs/": "runs/"}
    text = "report: /home/a/kit/runs/x/report.html, /home/a/kit/params, /tmp/q/z.json and/or 1/2"
    assert clean_text(text, folders) == "report: runs/x/report.html, params, …/z.json and/or 1/2"
    assert clean_text("see https://example.org/home/x", {}) == "see https://example.org/home/x"
    assert clean_text("05_grpo of run 'a': seed=0, dtype=auto\nversions", {}) == (
        "05_grpo of run 'a'\nversions")


def test_a_fence_is_longer_than_what_it_holds():
    assert fence("a ```` b") == "`````text\na ```` b\n`````"
    assert text_block("<script>\n</details>") == "```text\n<script>\n</details>\n```"


def test_long_text_is_folded_wrapped_and_cut():
    assert "<details>" not in text_block("\n".join("abc" for _ in range(16)))
    folded = text_block("\n".join("abc" for _ in range(17)))
    assert folded.startswith("<details><summary>17 lines</summary>\n\n```text\nabc")
    cut = text_block("\n".join(str(number) for number in range(100)))
    assert "\n59\n… (40 more lines)\n" in cut and "\n60\n" not in cut
    wrapped = text_block("word " * 40).split("\n")
    assert all(len(line) <= 110 for line in wrapped) and len(wrapped) == 4
    assert text_block("x" * 700).removeprefix("```text").count("x") == 600


def test_a_data_frame_becomes_a_table():
    html = ("<div><style>th {}</style><table><thead><tr><th></th><th>a|b</th><th>n</th>"
            "</tr></thead><tr><th>0</th><td>&lt;think&gt; $x_1$</td><td>1.5</td></tr></table>"
            "</div>")
    assert html_tables(html, {}) == (
        "| a\\|b | n |\n| --- | ---: |\n| &lt;think&gt; \\$x\\_1\\$ | 1.5 |")
    named = html.replace("<th>0</th>", "<th>SFT</th>")
    assert html_tables(named, {}).startswith("|  | a\\|b | n |\n| --- | --- | ---: |\n| SFT |")
    assert html_tables(html.replace("<div>", "<div><progress value=1></progress>"), {}) == ""
    assert html_tables("<p>no table</p>", {}) == ""
    assert html_tables("<table><tr><th></th></tr></table>", {}) == "", "an empty data frame"


def test_a_table_has_at_most_twenty_rows():
    table = markdown_table([["name"], *([f"r{number}"] for number in range(25))])
    assert table.count("\n| r") == 20 and table.endswith("The first 20 of 25 rows.")


def test_representations_of_objects_are_no_output():
    def result(text):
        return output_text(new_output("execute_result", {"text/plain": text}), {})

    assert result("<Figure size 620x240 with 2 Axes>") == ""
    assert result("[<matplotlib.lines.Line2D at 0x7f>]") == ""
    assert result("Text(0.5, 1.0, 'a')") == ""
    assert result("0.75") == "```text\n0.75\n```"
    view = "application/vnd.jupyter.widget-view+json"
    widget = new_output("display_data", {view: {}, "text/plain": "VBox()"})
    assert output_text(widget, {}) == ""


def test_pictures_become_small():
    small = Image.open(io.BytesIO(shrink_picture(picture_bytes((1800, 600)))))
    assert small.size == (900, 300) and small.mode == "P"
    clear = Image.open(io.BytesIO(shrink_picture(picture_bytes((10, 10), (0, 0, 0, 0)))))
    assert clear.size == (10, 10) and clear.convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    data = picture_bytes((4, 4))
    output = new_output("display_data", {"image/png": base64.b64encode(data).decode(),
                                         "text/plain": "<PIL.Image.Image image>"})
    assert output_picture(output) == data
    assert alternative_text(output, "Eight [rollouts]") == "Eight rollouts"
    output.data["text/plain"] = "Five boxes"
    assert alternative_text(output, "Eight rollouts") == "Five boxes"


def test_formulas_survive_markdown():
    assert web_formulas("the sum $a + b$ costs 5 $ or 6 $") == "the sum $a + b$ costs 5 $ or 6 $"
    assert web_formulas(r"$\{a\}$ and $x_i y_i$") == r"$`\{a\}`$ and $`x_i y_i`$"
    assert web_formulas("$$\n\\frac{a}{b}\n$$") == "```math\n\\frac{a}{b}\n```"
    two = web_formulas("a\n\n$$b$$\n\n$$c$$\n\nd")
    assert two == "a\n\n```math\nb\n```\n\n```math\nc\n```\n\nd", "blank lines stay"
    assert web_formulas("```bash\necho $a_ $b_\n```") == "```bash\necho $a_ $b_\n```"
