"""Files of records, and the logs of other evaluation kits as predictions: tiny hand-made files."""

import json
from functools import partial

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from mig_bench_records import score_predictions, write_lines

from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import align_predictions, read_records

ANSWERS = ["(A)", "(B)", "(B)"]
BLINK = [{"idx": f"val_Jigsaw_{number}", "answer": answer, "choices": ["one", "two"]}
         for number, answer in enumerate(ANSWERS, 1)]


@pytest.fixture
def benchmark():
    return read_benchmark("blink", BLINK)


def accuracy(benchmark, records, **settings):
    return score_predictions(benchmark, records, **settings).values.tolist()


def lmms_record(number, reply, **more):
    return {"doc_id": number, "target": ANSWERS[number], "input": "Which?", "resps": [[reply]],
            "filtered_resps": [reply], "doc_hash": "0", **more}


def test_lmms_evals_samples(benchmark, tmp_path):
    nested = lmms_record(0, "(A)")
    flat = {"doc_id": 1, "target": "(B)", "resps": ["<think>(A)?</think> (B)"],
            "filtered_resps": "(A)"}  # the reply counts, not what a filter left of it
    unchanged = {"doc_id": 2, "target": "(B)", "filtered_resps": ["(A)"]}
    records = read_records(write_lines(tmp_path / "1_samples_blink.jsonl",
                                       [nested, flat, unchanged]))
    assert accuracy(benchmark, records) == [1, 1, 0]
    write_lines(tmp_path / "1_results.json", [{"results": {}}])
    assert read_records(tmp_path) == records, "of a folder the samples"


def test_an_id_in_lmms_evals_metric_wins_over_the_place_within_its_task(benchmark):
    records = [lmms_record(0, "(B)", target="(B)", blink_acc={"id": "val_Jigsaw_3", "pred": "(B)"}),
               lmms_record(0, "(A)", blink_acc={"id": "val_Jigsaw_1"}),
               lmms_record(1, "(A)", blink_acc={"id": "val_Jigsaw_2"})]
    assert accuracy(benchmark, records) == [1, 0, 1]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".xlsx", "_semicolons.csv"])
def test_vlmevalkits_tables(benchmark, tmp_path, suffix):
    path = tmp_path / f"model_BLINK{suffix}"
    rows = [{"index": number, "question": "Which,\none?", "answer": answer.strip("()"),
             "prediction": reply}
            for number, (answer, reply) in enumerate(zip(ANSWERS, ["A", "B", "A\tno"]))]
    table = pd.DataFrame(rows)
    {".xlsx": partial(table.to_excel, index=False),
     ".csv": partial(table.to_csv, index=False),
     "_semicolons.csv": partial(table.to_csv, index=False, sep=";"),
     ".tsv": partial(table.to_csv, index=False, sep="\t")}[suffix](path)
    assert accuracy(benchmark, read_records(path)) == [1, 1, 0]


def test_a_table_that_counts_from_1_is_not_shifted_in_silence(benchmark):
    rows = [{"index": index, "prediction": "B"} for index in (1, 2, 3)]
    with pytest.raises(ValueError, match="a table that counts from 1 needs every index less 1"):
        accuracy(benchmark, rows)
    with pytest.raises(ValueError, match="so it counts other questions"):
        accuracy(benchmark, [{**rows[0], "answer": "A"}], allow_missing=True)
    with pytest.raises(ValueError, match="a table that counts from 1 needs every index less 1"):
        accuracy(benchmark, rows[:2])
    remark, = score_predictions(benchmark, rows[:2], allow_missing=True).remarks
    assert "if the file counts from 1, take 1 off every index" in remark


FACTS = [{"task": "diff", "question": f"Find thing {n}.", "images": [f"{n}a.jpg", f"{n}b.jpg"],
          "answer": [n / 10, 0.1, 0.5, 0.6]} for n in range(3)]


@pytest.mark.parametrize("name, repeat", [
    ("question", lambda record: {"question": f" {record['question']}\n"}),
    ("images", lambda record: {"images": [f"/data/{name}" for name in record["images"]]}),
    ("box", lambda record: {"groundtruth": [1000 * value for value in record["answer"]]})])
def test_a_line_that_repeats_another_items_facts_is_refused(name, repeat):
    benchmark = read_benchmark("mig_bench", FACTS)
    lines = [{"index": n, "response": "(0,100),(500,600)", **repeat(record)}
             for n, record in enumerate(FACTS)]
    assert score_predictions(benchmark, lines).values[0] == 1
    shifted = [line | {"index": n} for line, n in zip(lines, (1, 2, 0))]
    with pytest.raises(ValueError, match=f"prediction 1 .* item 1, but has the {name} of item 0"):
        score_predictions(benchmark, shifted)
    lines[0] |= {"question": "In a template: ...", "images": ["x.jpg"], "groundtruth": [0, 0, 9, 9]}
    assert score_predictions(benchmark, lines).values[0] == 1, "nothing says that it is another"


def test_a_cell_is_text_a_number_or_nothing(benchmark):
    records = [{"index": 0, "prediction": 7}, {"index": 1, "prediction": ""},
               {"index": 2, "prediction": float("nan")}]
    lines = align_predictions(benchmark.items, records, "response", "P")
    assert [line["response"] for line in lines] == ["7", "", ""]


def test_blinks_released_outputs_are_annotations_and_predictions(tmp_path):
    outputs = {"val": [{**record, "full_prediction": reply, "prediction": "(A)"}
                       for record, reply in zip(BLINK, ["(A)", "It is (B).", "(B)"])]}
    (tmp_path / "Jigsaw.json").write_text(json.dumps(outputs, indent=4))
    records = read_records(tmp_path / "Jigsaw.json")
    benchmark = read_benchmark("blink", records)
    assert {item.task for item in benchmark.items} == {"Jigsaw"}
    assert accuracy(benchmark, records) == [1, 1, 1]


def test_folders_of_parquet_by_subtask(tmp_path):
    for task, answer in (("Jigsaw", "(A)"), ("Counting", "(B)")):
        (tmp_path / task).mkdir()
        for split, truth in (("val", answer), ("test", "hidden")):
            rows = [{"idx": f"{split}_{task}_1", "sub_task": task, "answer": truth,
                     "choices": ["x", "y"], "image_1": {"bytes": b"png", "path": "a"}}]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows),
                                        tmp_path / task / f"{split}-00000-of-00001.parquet")
    records = read_records(tmp_path)
    assert "image_1" not in records[0]
    items = read_benchmark("blink", records).items
    assert [(item.id, item.letter) for item in items] == [("val_Counting_1", "B"),
                                                          ("val_Jigsaw_1", "A")]


@pytest.mark.parametrize("records,sentence", [
    ([lmms_record(1, "(A)", target="(A)")], "counts other questions"),
    ([{"index": 0, "prediction": "A", "answer": "B"}], "counts other questions"),
    ([lmms_record(0, None)], '"resps" of prediction 1 of P is no text'),
    ([{"doc_id": 0, "resps": [[[-1.5, False]]]}], "is no text"),
    ([{"doc_id": 0, "resps": [["A", "B"]]}], '"resps" of prediction 1 of P has 2 replies; keep'),
    ([{"doc_id": 0, "filtered_resps": [["A"], ["A"], ["B"]]}], "has 3 replies; keep one"),
    ([{"doc_id": 7, "resps": ["A"]}], "unknown to the annotations: 1"),
    ([{"idx": "val_Jigsaw_1", "full_prediction": 3}], "is no text"),
    ([{"id": "batch_1", "custom_id": "0", "response": {"body": {"choices": [
        {"message": {"role": "assistant", "content": "A"}}]}}}],
     "under response.body.choices.0.message.content here and as .index. what custom_id counts"),
    ([{"custom_id": "0", "result": {"message": {"content": [{"type": "text", "text": "A"}]}}}],
     "under result.message.content.0.text here and as .index. what custom_id counts"),
    ([{"index": 0, "response": [{"type": "text", "text": "A"}]}], "under response.0.text here"),
    ([{"request_id": "0", "outputs": [{"index": 0, "text": "A"}]}], "under outputs.0.text here"),
    ([lmms_record(0, "A"), lmms_record(0, "B")], "given more than once")])
def test_bad_logs_are_one_sentence(benchmark, records, sentence):
    with pytest.raises(ValueError, match=sentence):
        accuracy(benchmark, records)


@pytest.mark.parametrize("name,content,sentence", [
    ("a.tsv", b"index\tprediction\n0\tA\tB\n", "row 1 has other columns .* separated by '.t'"),
    ("a.csv", b"index,prediction\n0,A\n1\n", "row 2 has other columns"),
    ("a.csv", b"index,prediction\n0,caf\xe9\n", 'in UTF-8 .*; save it so, in Excel as "CSV UTF-8"'),
    ("a.csv", b"index|prediction\n0|A\n", "has no commas, semicolons or tabs"),
    ("a.csv", b"index,prediction\n", "is empty"),
    ("a.json", b'{"val": [1]}', "entry 1 of"),
    ("a.json", b'{"val": [', "is no JSON"),
    ("a.json", b'{"val": []}', "is empty"),
    ("a.jsonl.gz", b"\x1f\x8b\x08", "is packed; unpack it first: gunzip --keep"),
    ("a.jsonl", '{"index"'.encode("utf-16-le"), "is no JSON in UTF-8"),
    ("a.json", b'{"a": 1}\n{"b', "line 2 column"),
    ("a.parquet", b"PAR1", "no readable table"), ("a.xlsx", b"PK", "no readable table")])
def test_broken_files_are_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_records(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        read_records(tmp_path / "empty")
