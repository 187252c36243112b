"""Data of any size: what is decoded, what is stored, and what memory reading takes."""

import json
import os

import big_data
import pytest
from PIL import Image

from mig_kit import filters
from mig_kit.boxes import BoxFormat
from mig_kit.common import file_sha256
from mig_kit.image_files import BadImage, ImageStore, LazyImages, image_digests
from mig_kit.pipeline import runs
from mig_kit.sample import SampleWriter, read_replies, read_samples, write_samples
from mig_kit.stages import sources, synthesize
from mig_kit.world.tasks import make_sample

SMALL = (160, 120)


@pytest.fixture
def own(tmp_path, stage_params):
    """Call it with changes: (parameters of 01 for 30 questions over 10 JPEGs, their folder)."""
    folder = tmp_path / "data"
    big_data.BOX, box = (10, 20, 50, 70), big_data.BOX
    path = big_data.make_data(folder, 30, 10, SMALL)
    big_data.BOX = box

    def change(**changes):
        changes = {"data": str(path), "teacher": "own", "data_shares": [0.2, 0.4, 0.4], **changes}
        return stage_params("01_synthesize", **changes)

    return change, folder


@pytest.fixture
def decodes(monkeypatch):
    """A list whose only number grows by one with every image that is decoded."""
    image_file = big_data.ImageFile.ImageFile
    monkeypatch.setattr(image_file, "load_prepare", image_file.load_prepare)  # undone afterwards
    return big_data.count_decodes()


def all_samples(sets):
    return [sample for rows in sets.values() for sample in rows]


def test_an_image_is_decoded_when_it_is_stored_and_when_it_is_looked_at(own, tmp_path, decodes):
    change, folder = own
    sets, _ = sources.load_training_sets(change(), tmp_path / "out")
    assert decodes == [10]
    samples = all_samples(sets)
    assert len(samples) == 30 and {size for s in samples for size in s.sizes} == {SMALL}
    assert len({key for s in samples for key in image_digests(s.images)}) == 10 == decodes[0]
    assert samples[0].images[1].size == SMALL and decodes == [11]


def test_files_are_stored_once_as_they_are_and_a_kill_repeats_nothing(own, tmp_path, monkeypatch):
    change, folder = own
    sources.load_training_sets(change(), tmp_path / "out")
    stored = sorted((tmp_path / "out/images").iterdir())
    originals = {path.read_bytes() for path in folder.glob("*.jpg")}
    assert {path.read_bytes() for path in stored} == originals and len(stored) == 10
    assert (tmp_path / "out/images.txt").read_text().split() == [path.name for path in stored]
    tables = {file: (tmp_path / "out" / file).read_bytes()
              for file in sources.FILE_OF_SET.values()}

    def refuse(*arguments):
        raise AssertionError("stored again")

    monkeypatch.setattr("mig_kit.image_files.link_or_copy", refuse)
    (tmp_path / "out/left_out.txt").unlink()  # as a kill leaves it
    sources.load_training_sets(change(), tmp_path / "out")
    assert tables == {file: (tmp_path / "out" / file).read_bytes() for file in tables}
    monkeypatch.setattr(sources.own_data, "require_correct_lines", refuse)
    sources.load_training_sets(change(), tmp_path / "out")  # complete: the data is not read


def test_killed_in_the_middle_it_decodes_the_rest_and_writes_the_same_tables(
        own, tmp_path, monkeypatch, capsys, decodes):
    change, folder = own
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:-2000])
    sources.load_training_sets(change(), tmp_path / "whole")
    text = capsys.readouterr().out
    assert "store questions: 100%" in text and "30/30 [00:" in text
    decodes[0], write, numbers = 0, SampleWriter.write, iter(range(30))

    def write_four(*arguments):
        if next(numbers) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as killed:
        killed.setattr(SampleWriter, "write", write_four)
        with pytest.raises(KeyboardInterrupt):
            sources.load_training_sets(change(), tmp_path / "out")
    assert 4 < decodes[0] < 10 and not (tmp_path / "out/left_out.txt").exists()
    sets, _ = sources.load_training_sets(change(), tmp_path / "out")
    cut_tried = 2 + 6  # for each of its questions
    assert decodes[0] == 9 + cut_tried, "the others are decoded once"
    for file in (*sources.FILE_OF_SET.values(), "left_out.txt", "left_out_names.txt"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(all_samples(sets)) == 24


def test_a_damaged_image_is_counted_and_named_and_a_wrong_line_writes_nothing(own, tmp_path):
    change, folder = own
    cut = folder / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:-2000])  # only decoding finds it
    (folder / "7.jpg").write_bytes(b"no image")
    sets, text = sources.load_training_sets(change(), tmp_path / "out")
    assert len(all_samples(sets)) == 30 - 6 - 6
    assert "30 questions, 12 of them left out: their images cannot be decoded (left_out_na" in text
    named = (tmp_path / "out/left_out_names.txt").read_text().splitlines()
    assert "line 7: image 2: '7.jpg': cannot identify image" in named[2]
    assert len(named) == 12 and all("3.jpg" in line or "7.jpg" in line for line in named)
    lines = (folder / "own.jsonl").read_text() + '{"images": ["0.jpg"]}\n'
    (folder / "own.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="line 31: 'question': Field"):
        sources.load_training_sets(change(), tmp_path / "wrong")
    assert not any((tmp_path / "wrong").iterdir())


def test_a_stored_image_that_is_gone_or_changed_is_one_sentence(own, tmp_path):
    change, folder = own
    sets, _ = sources.load_training_sets(change(), tmp_path / "out")
    images = sets["rl"][0].images
    path = images.encoded[0].content
    path.unlink()  # the hard link, not the original
    with pytest.raises(BadImage, match="is missing; run 01_synthesize again"):
        images[0]
    path.write_bytes(b"other")
    with pytest.raises(BadImage, match="bytes have another SHA-256"):
        images[0]
    digest = file_sha256(tmp_path / "out" / "images.txt")
    record = {"outputs": {"images.txt": digest}, "stats": {}}
    assert not runs.find_damaged(tmp_path / "out", record)
    path.unlink()
    assert runs.find_damaged(tmp_path / "out", record)


def test_replies_of_the_data_become_the_cold_start(own, tmp_path):
    change, folder = own
    lines = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines, 1):  # every image has lines of all three kinds
        if number % 3 == 0:
            del line["reply"]
        elif number % 3 == 1:
            line["reply"] = "<think>Search.</think><answer>B</answer>"
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets, _ = sources.load_training_sets(change(), tmp_path)
    samples, traces = sets["cot"], synthesize.read_own_traces(sets["cot"].path)
    reasons = [filters.drop_reason(trace.text, sample, BoxFormat())
               for sample, trace in zip(samples, traces)]
    kinds = ("no reply", "format", "")
    assert reasons == [kinds[int(sample.id.removeprefix("line-")) % 3] for sample in samples]
    path = tmp_path / "cot.parquet"
    counts = synthesize.keep_good_traces(path, samples, traces, reasons)
    assert counts["kept"] == reasons.count("") == len(read_samples(path)) > 0
    assert read_replies(path)[0].startswith("<think>Search. The second")
    for reason, hint in (("box", "look at one of them; a box is in"), ("no reply", "of them$")):
        with pytest.raises(ValueError, match=rf"dropped every reply \({reason} 1\); .*{hint}"):
            synthesize.keep_good_traces(path, samples[:1], traces[:1], [reason])
    assert len(read_samples(path)) == counts["kept"], "the file is as it was"


def test_a_table_elsewhere_refers_to_the_stored_files(own, tmp_path):
    change, _ = own
    sets, _ = sources.load_training_sets(change(), tmp_path / "run/01")
    (tmp_path / "run/04").mkdir()
    rows = sets["rl"].select([2, 0])
    write_samples(tmp_path / "run/04/kept.parquet", rows)
    kept = read_samples(tmp_path / "run/04/kept.parquet")
    assert [sample.id for sample in kept] == [rows[0].id, rows[1].id]
    assert kept[0].images == rows[0].images and kept[0].images[0].mode == "RGB"
    assert not (tmp_path / "run/04/images").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert read_samples(tmp_path / "moved/04/kept.parquet")[1].images[0].size == SMALL


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rl.parquet"
    write_samples(path, [make_sample("diff", "cot", 0)])
    with pytest.raises(RuntimeError), SampleWriter(path) as writer:
        writer.write(make_sample("diff", "cot", 1))
        raise RuntimeError
    assert len(read_samples(path)) == 1 and list(tmp_path.iterdir()) == [path]


def test_a_store_copies_where_links_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")

    def refuse(*_):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    encoded = ImageStore(tmp_path / "images").add(tmp_path / "a.png")
    assert encoded.content.suffix == ".png" and encoded.size == (9, 8)
    assert LazyImages((encoded,))[0].size == (9, 8)
    assert encoded.digest().hex() == encoded.content.stem


@pytest.mark.slow
def test_twice_the_questions_take_no_more_memory(tmp_path):
    """Read by one process, the larger file behind the smaller one."""
    figures = big_data.measure(*(
        big_data.make_data(tmp_path / str(count), count, 30) for count in (100, 200)))
    for count, figure in zip((100, 200), figures, strict=True):
        assert figure["decodes"] == {"01": 30, "04": 0, "02, lengths": 0}
        assert sum(figure["sizes"].values()) == count
        assert figure["kept"] == figure["sizes"]["cot"] > 0
    assert figures[1]["peak_mib"] <= 1.1 * figures[0]["peak_mib"]
