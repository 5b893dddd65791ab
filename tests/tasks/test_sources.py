import builtins
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from pefusion_jax import tasks
from pefusion_jax.tasks import csv_source, embedded, embedded_path, folder_task_source, jsonl_source, parquet_source
from pefusion_jax.tasks.task import label_number

ROWS = [{"text": 'He said "no", twice', "label": 1}, {"text": "zwei\nZeilen, Ümlaut", "label": 0}]


def write_csv(path, text):
    path.write_bytes(text.encode("utf-8-sig"))
    return path


def test_the_same_rows_from_every_format(tmp_path):
    lines = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_csv(tmp_path / "a.csv", 'text,label\n"He said ""no"", twice",1\n"zwei\nZeilen, Ümlaut",0\n')
    write_csv(tmp_path / "a.tsv", 'text\tlabel\n"He said ""no"", twice"\t1\n"zwei\nZeilen, Ümlaut"\t0\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for source, name, place in (
        (jsonl_source, "a.jsonl", "line 3"),
        (jsonl_source, "a.jsonl.gz", "line 3"),
        (csv_source, "a.csv", "line 4"),
        (csv_source, "a.tsv", "line 4"),
        (parquet_source, "a.parquet", "row 2"),
    ):
        examples = source(tmp_path / name)
        assert list(examples) == ROWS and len(examples) == 2
        assert examples.where(1) == f"{tmp_path / name}, {place}" == examples[1:].where(0)
        picked = examples.picked([1, 0])
        assert list(picked) == ROWS[::-1] and picked.where(0) == examples.where(1)


def test_damage_is_reported_with_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 3: not JSON"):
        jsonl_source(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: expected an object"):
        jsonl_source(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="bad.jsonl is not UTF-8"):
        jsonl_source(path)
    packed = gzip.compress(b'{"text": "x"}\n' * 1000)
    for data in (packed[: len(packed) // 2], b"no gzip"):
        (tmp_path / "cut.jsonl.gz").write_bytes(data)
        with pytest.raises(ValueError, match="cut.jsonl.gz is not a whole gzip file"):
            jsonl_source(tmp_path / "cut.jsonl.gz")
    with pytest.raises(ValueError, match=r"b.csv, line 3: 3 columns, the header has 2 .*quote texts"):
        csv_source(write_csv(tmp_path / "b.csv", "text,label\nx,1\ny, and z,0\n"))
    with pytest.raises(ValueError, match="come twice"):
        csv_source(write_csv(tmp_path / "b.csv", "text,text\nx,1\n"))
    with pytest.raises(ValueError, match=r"b.csv, line 2"):
        csv_source(write_csv(tmp_path / "b.csv", 'text,label\n"never closed,1\n'))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="c.parquet cannot be read as Parquet"):
        parquet_source(tmp_path / "c.parquet")
    for source in (jsonl_source, csv_source, parquet_source):
        with pytest.raises(FileNotFoundError, match="nowhere is not there"):
            source(tmp_path / "nowhere")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="a.parquet needs pyarrow: pip install pyarrow"):
        parquet_source(tmp_path / "a.parquet")


def test_labels_in_csv_become_numbers_only_where_all_are(tmp_path):
    def labels(text):
        return [row["label"] for row in csv_source(write_csv(tmp_path / "n.csv", text))]

    assert labels("text,label\n1,0\n2,1\n") == [0, 1]
    assert labels("text,label\nx,0.5\ny,1\n") == [0.5, 1.0]
    assert labels("text,label\nx,0\ny,one\n") == ["0", "one"]


def test_a_folder_is_a_task(tmp_path):
    write_csv(tmp_path / "train.csv", "text,label\nx,good\ny,bad\nz,good\n")
    (tmp_path / "test.jsonl").write_text('{"text": "w", "label": "bad"}\n')
    data = folder_task_source(tmp_path)
    assert (data.name, data.classes, data.fields) == (tmp_path.name, ("bad", "good"), ("text",))
    assert len(data.train) == 3 and len(data.validation) == 0 and data.test[0]["text"] == "w"
    assert folder_task_source(tmp_path, classes=("good", "bad")).classes == ("good", "bad")
    (tmp_path / "task.json").write_text('{"name": "mood", "classes": ["good", "bad"], "descriptions": ["fine", "awful"]}')
    data = folder_task_source(tmp_path)
    assert (data.name, data.classes, data.descriptions) == ("mood", ("good", "bad"), ("fine", "awful"))


def test_classes_and_fields_are_told_from_the_training_split(tmp_path):
    def read(*rows):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder_task_source(tmp_path)

    pair = {"sentence1": "a", "sentence2": "b"}
    assert read({**pair, "label": 2}, {**pair, "label": 0}).classes == ("0", "1", "2")
    assert read({**pair, "label": 2.5}).classes == ()
    assert read({**pair, "label": 0}).fields == ("sentence1", "sentence2")
    with pytest.raises(ValueError, match=r"line 1: the fields are \['label', 'premise'\]; say which"):
        read({"premise": "a", "label": 0})
    with pytest.raises(ValueError, match="line 2: no field 'label'"):
        read({**pair, "label": 0}, pair)
    with pytest.raises(ValueError, match="labels are int and str"):
        read({**pair, "label": 0}, {**pair, "label": "x"})


def test_classes_named_by_numbers_are_names_in_csv(tmp_path):
    write_csv(tmp_path / "train.csv", "text,label\na,1\nb,2\nc,3\n")
    (tmp_path / "task.json").write_text('{"classes": ["1", "2", "3"]}')
    for data in (folder_task_source(tmp_path), folder_task_source(tmp_path, classes=("3", "1", "2"))):
        found = [label_number(row, "label", data.classes) for row in data.train]
        assert [data.classes[number] for number in found] == ["1", "2", "3"]
    write_csv(tmp_path / "train.csv", "text,label\na,0\nb,1\n")  # places, or is a name missing?
    row = folder_task_source(tmp_path).train[0]
    with pytest.raises(ValueError, match="label '0' is neither a number from 0 to 2 nor one of the classes '1', '2', '3'"):
        label_number(row, "label", ("1", "2", "3"))
    for classes in (("0", "1"), ("bad", "good")):
        assert [row["label"] for row in folder_task_source(tmp_path, classes=classes).train] == [0, 1]


@pytest.mark.parametrize("name", ["fields", "classes", "descriptions"])
@pytest.mark.parametrize("value", [5, "ab", None, ["a", "a"], [1, 2], {"a": 1}])
def test_a_task_file_holds_lists_of_different_strings(name, value, tmp_path):
    write_csv(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
    (tmp_path / "task.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"task.json: {name} must be a list of different strings, not"):
        folder_task_source(tmp_path)


def test_a_folder_that_is_no_task_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder_task_source(tmp_path / "missing")
    (tmp_path / "training.csv").write_text("text,label\n")
    with pytest.raises(FileNotFoundError, match="found: training.csv"):
        folder_task_source(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="train.csv holds no examples"):
        folder_task_source(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(ValueError, match="1 descriptions for 2 classes"):
        folder_task_source(tmp_path, descriptions=["one"])
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="has the split train twice: train.jsonl, train.csv"):
        folder_task_source(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    for text, match in (("{", " is not JSON"), ("[" * 100_000, " is not JSON"), ('{"name": 1}', ": name must be a string")):
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(ValueError, match=f"task.json{match}"):
            folder_task_source(tmp_path)


def test_the_extract_is_found_or_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFUSION_EMBEDDED", raising=False)
    assert (embedded_path() / "spam" / "task.json").is_file()
    assert sorted(embedded("all")) == ["bible", "genre", "intents", "spam", "supersense", "wic"]
    assert embedded("spam").classes == ("ham", "spam")
    with pytest.raises(ValueError, match="no embedded task 'sparm'; there are: bible, genre"):
        embedded("sparm")
    monkeypatch.setenv("PEFUSION_EMBEDDED", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set PEFUSION_EMBEDDED"):
        embedded("spam")
    monkeypatch.setenv("PEFUSION_EMBEDDED", str(tasks.embedded_path(_checkout())))
    assert len(embedded("wic").test) == 300


def _checkout():
    from pathlib import Path

    return Path(__file__).resolve().parents[2] / "experiments" / "embedded"


def test_an_installed_package_carries_the_extract(tmp_path, monkeypatch):
    from pefusion_jax.tasks import sources

    monkeypatch.delenv("PEFUSION_EMBEDDED", raising=False)
    package = tmp_path / "site-packages" / "pefusion_jax"
    (package / "_embedded" / "toy").mkdir(parents=True)
    (package / "_embedded" / "toy" / "task.json").write_text("{}")
    monkeypatch.setattr(sources.importlib.resources, "files", lambda name: package)
    assert embedded_path() == package / "_embedded"
