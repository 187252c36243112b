"""`mig-kit score`: predictions from files, as a table and as JSON."""

from pathlib import Path

import click

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import UserError, write_json, write_json_lines

PATH, SIDE = click.Path(path_type=Path), click.IntRange(1)
FRAME, ORDER = click.Choice([name.value for name in Coordinates]), click.Choice(
    ["xyxy", "yxyx", "xywh"])


@click.command("score")
@click.argument("benchmark", metavar="BENCHMARK")
@click.option("--annotations", required=True, type=PATH,
              help="The benchmark's own annotation file.")
@click.option("--predictions", required=True, type=PATH,
              help='JSONL of {"index": 0, "response": "text"}, COCO results, or the samples of '
                   "lmms-eval, a table of VLMEvalKit or BLINK's outputs; a file or a folder.")
@click.option("--compare", type=PATH,
              help="A second model's predictions: adds the paired difference.")
@click.option("--protocol", default="", show_default=False,
              help="official (the default) or strict; for own data free_text (the default) or "
                   "strict.")
@click.option("--coordinates", default="normalized_1000", type=FRAME,
              help="Boxes are normalized_1000 (0 to 1000), normalized_1 (0 to 1), pixels (of the "
                   "original image) or absolute (pixels of the resized image, as Qwen2.5-VL "
                   "answers); official converts them for the authors' rule.")
@click.option("--box-order", type=ORDER,
              help="Order of a box's four numbers, if not x1, y1, x2, y2: yxyx (Gemini) or xywh.")
@click.option("--compare-coordinates", type=FRAME,
              help="Coordinates of the second model's boxes, if not those of the first.")
@click.option("--compare-box-order", type=ORDER,
              help="Order of the second model's numbers, if not that of the first.")
@click.option("--images", type=PATH,
              help="The folder of the images, where their sizes are needed.")
@click.option("--min-pixels", default=3136, type=SIDE,
              help="The processor's lower limit of an image's area, for --coordinates absolute.")
@click.option("--max-pixels", default=401408, type=SIDE,
              help="The processor's upper limit.")
@click.option("--allow-missing", is_flag=True, help="Count items without a prediction wrong.")
@click.option("--judge", metavar="URL",
              help="An OpenAI-compatible server that reads the letters that no rule reads (blink, "
                   "mmiu); its answers are kept beside the predictions.")
@click.option("--judge-model", metavar="NAME", help="The judge's name on that server.")
@click.option("--blind/--no-blind", default=True,
              help="Beside the model: what answers score that no image is needed for.")
@click.option("--calibrate", is_flag=True,
              help="Refit the edges of the boxes on half of the image lists, score the other half.")
@click.option("--json", "out", type=PATH, help="Write the result here.")
@click.option("--items", type=PATH,
              help="Write one line per question here: its value, the image and box that were read, "
                   "and why none was; with --compare also win, loss or tie.")
def score_command(benchmark: str, annotations: Path, predictions: Path, compare: Path | None,
                  compare_coordinates: str | None, compare_box_order: str | None, out: Path | None,
                  items: Path | None, judge: str | None, judge_model: str | None, min_pixels: int,
                  max_pixels: int, blind: bool, calibrate: bool, **rules) -> None:
    """Score predictions on BENCHMARK: mig_bench, lisa, revos, ref_l4, mc_bench, odinw, blink,
    mmiu, or own (questions of your own, in the form that mig-kit data check takes).
    """
    from mig_kit.score import calibration, protocols
    from mig_kit.score.benchmarks import BENCHMARKS
    from mig_kit.score.blind import blind_summary
    from mig_kit.score.result import compare_scores, summarize
    from mig_kit.score.score_table import score_markdown

    if bool(judge) != bool(judge_model):
        raise UserError("--judge URL and --judge-model NAME belong together; give both")
    rules["judge"] = (judge, judge_model) if judge else None
    read = {path.resolve() for path in (annotations, predictions, compare) if path}
    written = [path.resolve() for path in (out, items) if path]
    for target in written:
        if target.is_dir() or not target.parent.is_dir():
            raise UserError(f"{target} cannot be written; name a file in a folder that exists")
        if written.count(target) > 1 or {target, *target.parents} & read:
            raise UserError(f"{target} is given twice, or lies in a folder that is read, and would "
                            "be overwritten; write to a file elsewhere")
    name, box_format = benchmark.lower().replace("-", "_"), BoxFormat(min_pixels, max_pixels)
    header, scored = protocols.score_files(name, annotations, predictions, box_format, **rules)
    result = {**header, "predictions": predictions.name, **summarize(scored)}
    if judge_model:
        result["judge"] = judge_model
    if blind and scored.judged:
        result["blind"] = blind_summary(scored)
    if calibrate:
        if BENCHMARKS[name].frame not in ("thousandths", "pairs") or (
                header["protocol"] != "official"):
            raise UserError("--calibrate is for mig_bench, lisa and revos under the protocol "
                            "official; leave it out")
        result["calibration"] = calibration.calibrate(scored)
        result["remarks"] += calibration.calibration_notes(result["calibration"],
                                                           result["predictions"])
    other = None
    if compare:
        rules |= {"coordinates": compare_coordinates or rules["coordinates"],
                  "box_order": compare_box_order or rules["box_order"]}
        _, other = protocols.score_files(name, annotations, compare, box_format, **rules)
        summary = summarize(other)
        result["compare"] = {
            "predictions": compare.name,
            **{part: summary[part] for part in ("tasks", "avg", "problems", "unread", "at_most")
               if part in summary},
            "difference": compare_scores(scored, other)}
        if calibrate:
            result["remarks"] += [
                *calibration.calibration_notes(calibration.calibrate(other), compare.name),
                calibration.split_difference(scored, other)]
        result["remarks"] += [f"{compare.name}: {remark}" for remark in other.remarks
                              if remark not in scored.remarks]
    if items:
        write_json_lines(items, protocols.item_rows(scored, name, other))
    click.echo(score_markdown(result))
    if out:
        write_json(out, result)
