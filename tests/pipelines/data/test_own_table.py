"""Tables and descriptions as hospitals write them: encodings, separators, spreadsheets' cells, words of their own."""

import errno
import re

import pytest

from cluster import faults
from cluster.errors import SetMistake
from cluster.storage import Folder
from pipelines.data.listing import list_images
from pipelines.data.public_set import Tree
from pipelines.data.sources import nih_cxr14
from pipelines.graph.compose import load_settings


@pytest.fixture
def rows(tmp_path):
    """Rows of a list of two images that are there, by its table (or its bytes), name and description."""
    def read(table, description=None, name="films.csv"):
        (tmp_path / "img").mkdir()
        for image in ("0.png", "1.png"):
            (tmp_path / "img" / image).write_bytes(b"x")
        (tmp_path / name).write_bytes(table if isinstance(table, bytes) else table.encode())
        if description is not None:
            content = description if isinstance(description, bytes) else description.encode()
            (tmp_path / "set.yaml").write_bytes(f"table: {name}\n".encode() + content)
        root = tmp_path / (name if description is None else "set.yaml")
        return list_images(load_settings("data=manifest", f"data.root={root}").data, 0).to_pylist()

    return read


def states(row):
    return row["labels"], row["absent"], row["uncertain"]


@pytest.mark.parametrize("table", [
    "path;patient_id;labels\nimg/0.png;1;Edema\n", "path\tpatient_id\tlabels\nimg/0.png\t1\tEdema\n",
    "\ufeffpath, patient_id, labels\nimg/0.png, 1, Edema\n", 'path,"patient_id",labels\r\nimg\\0.png,1,Edema\r\n',
])
def test_a_table_of_any_spreadsheet_is_read(rows, table):
    row, = rows(table)
    assert (row["bytes"], row["patient_id"], row["labels"]) == (1, "1", ["Edema"])


def test_a_tsv_of_one_column_holds_commas(rows):
    with pytest.raises(ValueError, match="img/0, 1"):
        rows("path\nimg/0, 1.png\n", name="films.tsv")


@pytest.mark.parametrize(("table", "description", "match"), [
    ("path,Größe\nimg/0.png,1\n".encode("latin-1"), None, r"films\.csv is not UTF-8; save it as UTF-8"),
    ("path,labels\nimg/0.png,Ödem\n".encode("latin-1"), None, r"films\.csv is not UTF-8"),
    ("path\nimg/0.png\n".encode("utf-16"), None, "is UTF-16; save it as UTF-8"),
    (b"PK\x03\x04 and so on", None, "is an Excel workbook"), (b"\x1f\x8bxx", None, "cannot be unpacked"),
    ("path\nimg/0.png\n", "title: Größe\n".encode("latin-1"), r"set\.yaml is not UTF-8"),
    ("path\nimg/0.png\n", "masks: [mask]\n", r"set\.yaml\.masks=\['mask'\]: must have a column for each structure"),
    ("path\nimg/0.png\n", "masks: mask\n", r"set\.yaml\.masks='mask': must have a column for each structure"),
])
def test_what_no_table_can_be_read_from_is_told_in_one_line(rows, table, description, match):
    with pytest.raises(SetMistake, match=match) as mistake:
        rows(table, description)
    assert "\n" not in str(mistake.value)


def test_what_yaml_takes_for_booleans_and_numbers_are_cells(rows):
    one, other = rows("path,Edema,split\nimg/0.png,Yes,0\nimg/1.png,no,1\n",
                      "label_columns: [Edema]\npresent_values: [yes]\nabsent_values: [no]\n"
                      "splits: {0: train, 1: test}\n")
    assert (states(one), one["split"]) == ((["Edema"], ["No Finding"], []), "train")
    assert (states(other), other["split"]) == (([], ["Edema"], []), "test")


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", " "])
def test_cells_that_data_frames_write_for_nothing_are_empty(rows, cell):
    one, other = rows(f"path,patient_id,labels,mask\nimg/0.png,{cell},{cell},{cell}\nimg/1.png,1,Edema,\n")
    assert (one["patient_id"], one["masks"], states(one)) == ("img/0.png", [], ([], [], []))
    assert states(other) == (["Edema"], ["No Finding"], [])


def test_own_words_are_found_whatever_their_case(rows):
    one, other = rows("path,labels\nimg/0.png,kardio_megalie\nimg/1.png,KARDIO-MEGALIE|Cardiomegaly\n",
                      "spellings: {Kardio Megalie: Cardiomegaly}\n")
    assert one["labels"] == other["labels"] == ["Cardiomegaly"]


def test_no_finding_denies_the_blank_columns_of_the_vocabulary(rows):
    one, other = rows("path,normal,Edema,Mass,Support Devices,Ours\nimg/0.png,1,,-1,,\nimg/1.png,0,,1,,\n",
                      "label_columns: [normal, Edema, Mass, Support Devices, Ours]\n")
    assert states(one) == (["No Finding"], ["Edema"], ["Mass"])
    assert states(other) == (["Mass"], ["No Finding"], [])


@pytest.mark.parametrize(("table", "remark"), [
    ("path,label\nimg/0.png,Edema\n", "no column 'labels', nor another of findings: .*did you mean 'label'"),
    ("path,labels\nimg/0.png,Oedma\nimg/1.png,Ours\n", r"findings of its own.*: 'Oedma' \(Edema\?\), 'Ours'; "),
    ("path,labels\nimg/0.png,Edema;Mass\n", r"a cell holds ';'; if it joins findings, set separator \('\|' now\)"),
    ("path,labels\nimg/0.png,\"['Edema', 'Mass']\"\n", r"a cell holds '\[': join findings"),
])
def test_what_may_not_be_meant_is_told_once(rows, capsys, table, remark):
    rows(table)
    told = capsys.readouterr().err
    assert re.search(remark, told), told


def test_nothing_is_remarked_on_a_table_of_the_vocabulary(rows, capsys):
    rows("path,patient_id,labels\nimg/0.png,1,oedema|Mass\n")
    assert "films.csv" not in capsys.readouterr().err


def test_a_fault_of_the_storage_is_told_where_a_table_is_read(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("a\n1\n")
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())

    def broken(folder, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Folder, "read", broken)
    with pytest.raises(faults.StorageUnavailable, match=r"t\.csv cannot be reached"):
        list(Tree(str(tmp_path), nih_cxr14.CARD).table("t.csv"))
