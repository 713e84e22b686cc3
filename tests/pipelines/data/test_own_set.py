"""A user's own set, described by a YAML file, alone and in a mix."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

from cluster import faults
from cluster.errors import SetMistake, UserError
from cluster.storage import Folder
from pipelines.data import manifest
from pipelines.data.convert import ConvertShard
from pipelines.data.identifiers import Salt, pseudonymise_row, unite
from pipelines.data.image.picture import Refused
from pipelines.data.listing import list_images, listing_hash, present_uri
from pipelines.data.manifest import write_manifest
from pipelines.data.sources import cards_of, check_described, find_source
from pipelines.data.sources import manifest as manifest_source
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.tables.parquet import read_columns
from pipelines.tables.schemas import HASHED_MANIFEST, MANIFEST

SALT = "a secret of the tests"
FILMS = """\
Bild,Patient,Untersuchung,Ansicht,Teil,Kardiomegalie,Edema,Maske
a.png,P1,S1,PA,lernen,ja,0,masken/a.png
b.png,P1,S2,LATERAL,lernen,nein,,
c.png,P2,,AP,pruefen,?,1,
"""
DESCRIPTION = """\
title: Films of our hospital
licence: not for release
citation: Ours et al. 2026
table: films.csv
images: pictures
key: Bild
patient: Patient
study: Untersuchung
view: Ansicht
split: Teil
splits: {lernen: train, pruefen: test}
label_columns: [Kardiomegalie, Edema]
present_values: [ja, "1"]
absent_values: [nein, "0"]
uncertain_values: ["?"]
spellings: {Kardiomegalie: Cardiomegaly}
masks: {left_lung: Maske}
"""


@pytest.fixture
def own(tmp_path):
    """Settings of a set of these files."""
    def write(description=DESCRIPTION, films=FILMS):
        (tmp_path / "pictures" / "masken").mkdir(parents=True, exist_ok=True)
        for k, name in enumerate(("a.png", "b.png", "c.png", "masken/a.png")):
            Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 40), np.uint8)).save(
                tmp_path / "pictures" / name)
        (tmp_path / "films.csv").write_text(films)
        (tmp_path / "set.yaml").write_text(description)
        return load_settings("data=manifest", f"data.root={tmp_path}/set.yaml", "data.size=32").data

    return write


@pytest.fixture(autouse=True)
def _salt(monkeypatch):
    monkeypatch.setenv("RAYOGRAPH_SALT", SALT)


def test_columns_are_called_as_the_description_says(own, tmp_path):
    settings = own()
    rows = list_images(settings, 0).to_pylist()
    told = [tuple(row[name] for name in ("path", "patient_id", "study_id", "view", "split", "labels", "absent",
                                         "uncertain")) for row in rows]
    assert told == [
        ("a.png", "P1", "S1", "PA", "train", ["Cardiomegaly"], ["Edema", "No Finding"], []),
        ("b.png", "P1", "S2", "LATERAL", "train", [], ["Cardiomegaly"], []),
        ("c.png", "P2", None, "AP", "test", ["Edema"], ["No Finding"], ["Cardiomegaly"])]
    assert [mask["name"] for row in rows for mask in row["masks"]] == ["left_lung"]
    loaded = find_source("manifest").load(rows[0], settings)
    assert loaded.structures == ("left_lung",)
    [card] = cards_of(settings).values()
    assert (card.title, card.licence, card.citation) == (
        "Films of our hospital", "not for release", "Ours et al. 2026")


@pytest.mark.parametrize(("old", "new", "match"), [
    ("patient: Patient", "patients: Patient", r"unknown key 'patients'; did you mean 'patient'"),
    ("patient: Patient", "patient: PatID", r"films\.csv has no column 'PatID'; it has Bild"),
    ("label_columns: [Kardiomegalie", "label_columns: [Herz", r"films\.csv has no column 'Herz'"),
    ("left_lung: Maske", "left_lung: Mask", r"films\.csv has no column 'Mask'"),
    ("left_lung: Maske", "lung: Maske", r"masks='lung': must be one of left_lung"),
    ("uncertain_values: [\"?\"]", "uncertain_values: []", r"c\.png: Kardiomegalie is '\?'"),
    ("pruefen: test", "pruefen: exam", r"splits='exam': must be train, val or test"),
    ("{lernen: train, pruefen: test}", "{lernen: train}", r"c\.png: split 'pruefen' is none of lernen"),
    ("key: Bild", "key: Bild\nkey_is: name", r"key_is='name': must be one of path, AccessionNumber"),
    ("table: films.csv", "table: none.csv", r"none\.csv' cannot be read"),
    ("title: Films of our hospital", "title: [", "describes no set"),
])
def test_what_is_wrong_with_a_description_is_told(own, old, new, match):
    with pytest.raises(ValueError, match=match):
        list_images(own(DESCRIPTION.replace(old, new)), 0)


FINDING_BY_FINDING = """\
path,patient_id,study_id,view,split,labels,mask
b.png,,s1,PA,,Edema,b.png
a.png,P1,s2,AP,test,,
b.png,P2,,LATERAL,train,Pneumonia,b.png
b.png,P2,s1,,,Edema,c.png
"""


def test_rows_of_one_image_are_taken_together(own, capsys):
    one, other = list_images(own("table: films.csv\nimages: pictures\n", FINDING_BY_FINDING), 0).to_pylist()
    assert (one["path"], other["path"]) == ("b.png", "a.png")
    assert (one["labels"], one["absent"]) == (["Edema", "Pneumonia"], ["No Finding"])
    assert [one[name] for name in ("patient_id", "study_id", "view", "split")] == ["P2", "s1", None, "train"]
    assert [mask["path"] for mask in one["masks"]] == ["b.png", "c.png"]
    assert "2 rows name an image again" in capsys.readouterr().err


def test_a_finding_that_one_row_of_an_image_states_is_present(own):
    row, = list_images(own("table: films.csv\nimages: pictures\nlabel_columns: [Edema, Mass]\n",
                           "path,Edema,Mass\na.png,0,0\na.png,1,\n"), 0).to_pylist()
    assert (row["labels"], row["absent"]) == (["Edema"], ["Mass", "No Finding"])


@pytest.mark.parametrize(("old", "new", "match"), [
    ("b.png,,s1", "b.png,P7,s1", r"films\.csv: the rows of b\.png have several values of patient_id: P7, P2"),
    ("b.png,P2,s1,,,", "b.png,P2,s1,,val,", r"several values of split: train, val"),
])
def test_rows_of_one_image_that_contradict_are_told(own, old, new, match):
    settings = own("table: films.csv\nimages: pictures\n", FINDING_BY_FINDING.replace(old, new))
    with pytest.raises(ValueError, match=match):
        list_images(settings, 0)


@pytest.mark.parametrize("data", ["data=manifest data.root={}/set.yaml",
                                  "data=mix data.sets={{ours:{{source:manifest,root:{}/set.yaml}}}}"])
@pytest.mark.parametrize(("wrong", "match"), [
    ({"films": FILMS.replace("Edema", "Edma")}, "has no column 'Edema'"),
    ({"films": FILMS.replace("ja", "jo")}, "Kardiomegalie is 'jo'"),
    ({"description": DESCRIPTION.replace("key: Bild", "kee: Bild")}, "unknown key 'kee'"),
    ({"description": DESCRIPTION.replace("left_lung", "left")}, "masks='left'"),
    ({"description": DESCRIPTION.replace("title: ", "title: [")}, "describes no set"),
    ({"films": "Bild\n"}, "has no column|lists no image"),
])
def test_results_excuse_raw_data_that_are_away_and_no_mistake_in_a_list(
        own, tmp_path, monkeypatch, capsys, data, wrong, match):
    monkeypatch.setattr(manifest, "run_in_subprocess", lambda function, *args: function(*args))

    def plan():
        manifest_source._described.cache_clear()
        return Plan(load_settings(*data.format(tmp_path).split(), f"storage={tmp_path}/runs", "name=run"), ["ingest"])

    own()
    done = plan()
    done.begin("ingest", redo=False)
    (done.folder / "ingest").write_json("stage.json", {"fingerprint": done.fingerprint("ingest")})
    (tmp_path / "pictures").rename(tmp_path / "away")
    assert plan().is_done("ingest")
    assert "going on with what it made before" in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "pictures")
    own(**wrong)
    with pytest.raises(SetMistake, match=match) as mistake:
        plan().is_done("ingest")
    assert str(mistake.value).startswith("data.sets.ours: ") == data.startswith("data=mix")


HERE_AND_THERE = """\
path,mask
pictures/a.png,pictures/masken/a.png
pictures/b.png,pictures/nobody/b.png
{}/pictures/c.png,
pictures/nobody/12.png,
"""


@pytest.fixture
def listed_at_once(own, tmp_path, monkeypatch):
    """Settings of a list of which an image and a mask lie in a folder that is not there; nothing is waited for."""
    monkeypatch.setattr(faults, "BACKOFF_SECONDS", ())
    return own("table: films.csv\n", HERE_AND_THERE.format(tmp_path))


def test_what_is_missing_costs_itself_and_is_told(listed_at_once, tmp_path, capsys):
    rows = list_images(listed_at_once, 0).to_pylist()
    assert "1 of 4 images are not in" in (told := capsys.readouterr().err)
    assert "'pictures/nobody/12.png' for one" in told
    assert [row["bytes"] is not None for row in rows] == [True, True, True, False]
    assert rows[0]["bytes"] == sum((tmp_path / "pictures" / name).stat().st_size for name in ("a.png", "masken/a.png"))
    source = find_source("manifest")
    for row in (rows[0], rows[2]):
        assert source.load(row, listed_at_once).width == 40
    for row, reason in ((rows[1], "bad_mask"), (rows[3], "unreadable")):
        with pytest.raises(Refused) as refused:
            source.load(row, listed_at_once)
        assert refused.value.reason == reason


def test_a_file_that_comes_or_changes_is_noticed(listed_at_once, tmp_path):
    hashes = [listing_hash(list_images(listed_at_once, 0))]
    (tmp_path / "pictures" / "nobody").mkdir()
    for name in ("12.png", "b.png", "stray.png"):
        (tmp_path / "pictures" / "nobody" / name).write_bytes(b"xx")
        hashes.append(listing_hash(list_images(listed_at_once, 0)))
    assert len(set(hashes[:3])) == 3
    assert hashes[2] == hashes[3], "which no row names"


def test_a_listed_file_that_is_gone_is_a_fault_of_the_storage_or_the_list(listed_at_once, tmp_path):
    row, *_ = list_images(listed_at_once, 0).to_pylist()
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(UserError, match="was listed but no longer exists"):
        find_source("manifest").load(row, listed_at_once)


@pytest.mark.parametrize(("description", "films", "match"), [
    (DESCRIPTION.replace("pictures", "pitures"), FILMS, r"images='.*/pitures' is not there, or is empty"),
    (DESCRIPTION.replace("pictures", "empty"), FILMS, r"images='.*/empty' is not there, or is empty"),
    ("table: films.csv\nimages: pitures\nkey: K\nkey_is: AccessionNumber\n", "K\n1\n", r"images='.*/pitures'"),
    ("table: films.csv\n", "path\nimgs/a.png\nimgs/b.png\n", r"none of its 2 images is in .*, 'imgs/a\.png' for one"),
])
def test_images_that_are_all_elsewhere_are_told_when_they_are_listed(own, tmp_path, description, films, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=match):
        list_images(own(description, films), 0)


@pytest.mark.parametrize("data", ["data=manifest data.root={}/set.yaml",
                                  "data=mix data.sets={{ours:{{source:manifest,root:{}/set.yaml}}}}"])
@pytest.mark.parametrize(("description", "folder"), [
    ("table: films.csv\nimages: xrays\n", "xrays"), ("table: films.csv\nimages: xrays\n", "xrays/deeper"),
    ("table: films.csv\nkey: K\nkey_is: AccessionNumber\n", "run"),
])
def test_results_lie_among_no_images_of_an_own_set(tmp_path, data, description, folder):
    (tmp_path / "set.yaml").write_text(description)
    storage, _, name = f"{tmp_path}/{folder}".rpartition("/")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*overlap"):
        load_settings(*data.format(tmp_path).split(), f"storage={storage}", f"name={name}")


def test_results_may_lie_beside_a_list_whose_images_may_be_anywhere(tmp_path):
    (tmp_path / "films.csv").write_text("path\n")
    (tmp_path / "set.yaml").write_text("table: films.csv\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for root in ("set.yaml", "films.csv", "missing.yaml", "binary.yaml"):
        load_settings("data=manifest", f"data.root={tmp_path}/{root}", f"storage={tmp_path}", "name=run")


@pytest.mark.parametrize("file", ["films.csv", "set.yaml"])
def test_a_moved_list_changes_nothing(tmp_path, file):
    """Moved after the manifest was written: rows name images and masks where they lie now."""
    here = tmp_path / "here"
    (here / "pictures").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.png", "c.png", "mask.png")):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 40), np.uint8)).save(here / "pictures" / name)
    base = "pictures/" if file == "films.csv" else ""
    (here / "films.csv").write_text("path,mask\n" + "".join(f"{base}{k}.png,{base}mask.png\n" for k in "abc"))
    (here / "set.yaml").write_text("table: films.csv\nimages: pictures\n")
    before = load_settings("data=manifest", f"data.root={here}/{file}", "data.size=32").data
    listed = list_images(before, 0)
    write_manifest(Folder(str(tmp_path / "ingest" / "manifest")), before, 0, Folder(str(tmp_path)))
    there = here.rename(tmp_path / "there")
    moved = load_settings("data=manifest", f"data.root={there}/{file}", "data.size=32").data
    assert listing_hash(list_images(moved, 0)) == listing_hash(listed)
    convert = ConvertShard(Folder(str(tmp_path / "ingest")), moved)
    rows = convert.rows(0)
    assert [row["uri"] for row in rows] == [f"{there}/pictures/{k}.png" for k in "abc"]
    assert [convert.one(row)["structures"] for row in rows] == [("mask",)] * 3


def test_uris_of_films_found_by_their_headers_do_not_tell_where_the_archive_lies(archive):
    settings = load_settings("data=manifest", f"data.root={archive}/set.yaml").data
    uris = list_images(settings, 0)["uri"].to_pylist()
    assert "0/IM1" in uris
    assert present_uri("0/IM1", settings) == f"{archive}/pacs/0/IM1"


@pytest.fixture
def archive(tmp_path, film):
    """DICOM films of six people, two of them in no row of the list; findings are listed by AccessionNumber."""
    for k in range(6):
        film(tmp_path / "pacs" / f"{k}" / "IM1", k, PatientID=f"R{k}", StudyInstanceUID=f"1.2.{k}",
             AccessionNumber=f"A{k}", ViewPosition="PA", BodyPartExamined="CHEST")
    (tmp_path / "pacs" / "notes.txt").write_text("no film")
    (tmp_path / "list.csv").write_text("Acc,Findings,Part\nA0,Edema;Mass,train\nA1,,test\nA2,Mass,\nA3,Edema,val\n")
    (tmp_path / "set.yaml").write_text(
        "table: list.csv\nimages: pacs\nkey: Acc\nkey_is: AccessionNumber\nlabels: Findings\nseparator: ';'\n"
        "split: Part\nlicence: ours\n")
    return tmp_path


LIST = "Acc,Findings,Part,patient_id,mask,Who\nA0,Edema;Mass,train,P0,m.png,P0\nA1,,test,P1,,P1\nA2,Mass,,P2,,P2\n"
KEYED = """\
table: list.csv
images: ../pacs
key: Acc
key_is: AccessionNumber
labels: Findings
separator: ';'
split: Part
"""


@pytest.fixture(params=["manifest", "mix"])
def looked(request, archive, monkeypatch):
    """The hash of a list and its description, each in a folder of its own beside the same DICOM files."""
    monkeypatch.setattr(manifest, "run_in_subprocess", lambda function, *args: function(*args))

    def look(name, films=LIST, description=KEYED):
        (archive / name).mkdir()
        (archive / name / "list.csv").write_text(films)
        (archive / name / "set.yaml").write_text(description)
        root = f"{archive}/{name}/set.yaml"
        chosen = {"manifest": f"data.root={root}", "mix": f"data.sets={{ours: {{source: manifest, root: {root}}}}}"}
        return manifest.list_and_hash(load_settings(f"data={request.param}", chosen[request.param]).data, 0)

    return look


@pytest.mark.parametrize(("old", "new"), [
    ("A0,Edema;Mass", "A0,Edema"), ("A1,,test", "A1,,val"), ("A1,", "A9,"), ("P2,,", "P1,,"), ("m.png", "n.png"),
])
def test_a_changed_table_of_dicom_files_is_noticed(looked, old, new):
    assert looked("changed", LIST.replace(old, new)) != looked("before")


@pytest.mark.parametrize("description", [
    KEYED + "spellings: {Mass: Nodule}\n", KEYED.replace("AccessionNumber", "SOPInstanceUID"), KEYED + "patient: Who\n",
])
def test_a_changed_description_of_dicom_files_is_noticed(looked, description):
    assert looked("changed", description=description) != looked("before")


def test_what_nobody_reads_of_a_table_of_dicom_files_changes_nothing(looked):
    changed = looked("changed", LIST.replace(",P1\n", ",P7\n"), KEYED + "title: Ours\nlicence: theirs\n")
    assert changed == looked("before")


def described(settings):
    """What `describe` makes of the films."""
    source = find_source(settings.source)
    return [source.describe(row, settings) for row in list_images(settings, 0).to_pylist()]


@pytest.mark.parametrize("data", ["data=manifest data.root={}/set.yaml",
                                  "data=mix data.sets={{ours:{{source:manifest,root:{}/set.yaml}}}}"])
def test_films_and_rows_that_find_no_other_are_counted(archive, capsys, data):
    """Of six films four are in the list, which names a seventh too; blanks and decimals do not count."""
    for k in range(6):
        path = archive / "pacs" / f"{k}" / "IM1"
        dataset = pydicom.dcmread(path)
        dataset.AccessionNumber = f"{100 + k}"
        dataset.save_as(path)
    films = "Acc,Findings\n100.0,Edema\n 101,Mass\n102 ,Mass\n103,Mass\n999,Mass\n"
    (archive / "list.csv").write_text(films)
    (archive / "set.yaml").write_text((archive / "set.yaml").read_text().replace("split: Part\n", ""))
    settings = load_settings(*data.format(archive).split()).data
    rows = pa.Table.from_pylist([pseudonymise_row(row, Salt(SALT)) for row in described(settings)],
                                schema=HASHED_MANIFEST)
    assert [row["labels"] for row in rows.to_pylist()] == [["Edema"], ["Mass"], ["Mass"], ["Mass"], [], []]
    check_described(rows, settings)
    assert "4 of 6 films have a row; 1 of 5 rows name no film" in capsys.readouterr().err
    (archive / "none.csv").write_text(films.replace("10", "50"))
    (archive / "set.yaml").write_text((archive / "set.yaml").read_text().replace("list.csv", "none.csv"))
    manifest_source._described.cache_clear()
    manifest_source._by_key.cache_clear()
    rows = pa.Table.from_pylist([pseudonymise_row(row, Salt(SALT)) for row in described(settings)],
                                schema=HASHED_MANIFEST)
    with pytest.raises(ValueError, match=r"none\.csv: none of the 6 films in .*pacs has a row; column 'Acc' must hold"):
        check_described(rows, settings)


def test_numbers_of_a_data_frame_are_the_same_identifiers(tmp_path, film):
    """A column of numbers is of floats where a cell is empty."""
    for k in range(3):
        film(tmp_path / "pacs" / f"{k}", k, AccessionNumber=f"{100 + k}", PatientID="x")
    pq.write_table(pa.table({"Acc": [100.0, 101.0, None], "Who": [7.0, 8.0, None], "labels": ["a", "b", "c"]}),
                   tmp_path / "list.parquet")
    (tmp_path / "set.yaml").write_text(
        "table: list.parquet\nimages: pacs\nkey: Acc\nkey_is: AccessionNumber\npatient: Who\n")
    rows = described(load_settings("data=manifest", f"data.root={tmp_path}/set.yaml").data)
    assert [(row["labels"], row["patient_id"]) for row in rows] == [(["a"], "7"), (["b"], "8"), ([], "x")]


def patients_of(settings):
    """Patients of the films as ingest hashes and unites them, by path."""
    rows = [pseudonymise_row(row, Salt(SALT)) for row in described(settings)]
    table = unite(pa.Table.from_pylist(rows, schema=HASHED_MANIFEST))
    assert len(set(table["patient_id"].to_pylist())) == len(set(zip(
        table["patient_id"].to_pylist(), table["bucket"].to_pylist(), strict=True)))
    return dict(zip(table["path"].to_pylist(), table["patient_id"].to_pylist(), strict=True))


@pytest.mark.parametrize("data", ["data=manifest data.root={}/set.yaml",
                                  "data=mix data.sets={{ours:{{source:manifest,root:{}/set.yaml}}}}"])
@pytest.mark.parametrize(("column", "names"), [("patient: Who\n", ("Who", "R0")), ("", ("patient_id", ""))])
def test_a_person_whose_films_are_not_all_listed_is_one_patient(tmp_path, film, data, column, names):
    """Film a has a row that names the patient otherwise than the header; film b has no row, or no PatientID."""
    name, header = names
    films = {"a": ("A0", "R0"), "b": ("A9" if column else "A1", header), "c": ("A2", "R2"), "d": ("A3", "R2")}
    for k, (path, (accession, patient)) in enumerate(films.items()):
        film(tmp_path / "pacs" / path, k, AccessionNumber=accession, PatientID=patient)
    (tmp_path / "list.csv").write_text(f"Acc,{name}\nA0,K0\nA1,K0\nA2,K2\nA3,K3\n")
    (tmp_path / "set.yaml").write_text(
        f"table: list.csv\nimages: pacs\nkey: Acc\nkey_is: AccessionNumber\n{column}")
    patients = patients_of(load_settings(*data.format(tmp_path).split()).data)
    assert patients["a"] == patients["b"]
    assert len(set(patients.values())) == (3 if column else 2), "what the list, or the header, tells apart stays apart"


def written(settings, tmp_path):
    write_manifest(Folder(str(tmp_path / "out")), settings, 0, Folder(str(tmp_path)))
    return {row["path"]: row for row in read_columns(Folder(str(tmp_path / "out")), MANIFEST.names).to_pylist()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_dicom_files_are_found_by_their_accession_number(archive):
    rows = written(load_settings("data=manifest", f"data.root={archive}/set.yaml").data, archive)
    assert {path: (row["labels"], row["absent"], row["view"]) for path, row in rows.items()} == {
        "0/IM1": (["Edema", "Mass"], ["No Finding"], "PA"), "1/IM1": ([], [], "PA"),
        "2/IM1": (["Mass"], ["Edema", "No Finding"], "PA"), "3/IM1": (["Edema"], ["Mass", "No Finding"], "PA"),
        "4/IM1": ([], [], "PA"), "5/IM1": ([], [], "PA")}
    assert [rows[f"{k}/IM1"]["split"] for k in (0, 1, 3)] == ["train", "test", "val"]
    assert len({row["patient_id"] for row in rows.values()}) == 6
    assert not {"R0", "R5"} & {row["patient_id"] for row in rows.values()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_headers_are_read_of_a_mix_too(archive):
    """A DICOM archive by its list, the same as a plain tree, and pictures: all identified before they are split."""
    folder = archive / "pictures" / "NORMAL"
    folder.mkdir(parents=True)
    for k in range(3):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (40, 40), np.uint8)).save(folder / f"{k}.png")
    (archive / "sets.yaml").write_text("ours: {source: manifest, root: set.yaml}\npacs: {source: dicom, root: pacs}\n"
                                       "pictures: {source: folder, root: pictures}\n")
    settings = load_settings("data=mix", f"data.sets={archive}/sets.yaml", "data.size=32").data
    write_manifest(Folder(str(archive / "out")), settings, 0, Folder(str(archive)))
    rows = read_columns(Folder(str(archive / "out")), MANIFEST.names).to_pylist()
    assert sorted(row["source"] for row in rows) == ["ours"] * 6 + ["pacs"] * 6 + ["pictures"] * 3
    assert len({row["patient_id"] for row in rows}) == 15, "a patient of one set is none of another"
    assert {tuple(row["labels"]) for row in rows if row["source"] == "ours"} == {
        ("Edema", "Mass"), (), ("Mass",), ("Edema",)}
    for row in rows:
        assert find_source("mix").load(row, settings).image.shape == (32, 32)
    assert set(cards_of(settings)) == {"ours", "pacs"}
