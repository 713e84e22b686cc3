import json
import re
import stat
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import s3
from cluster.session import Resources
from cluster.storage import Folder
from pipelines.data import identifiers, split
from pipelines.data.identifiers import FILE, Salt, pseudonymise, pseudonymise_row, salt_of, unite
from pipelines.data.manifest import list_and_hash, write_manifest
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.run import run_stages
from pipelines.graph.stage import run_folder
from pipelines.report.report import report
from pipelines.tables.parquet import iterate_shards, read_columns
from pipelines.tables.schemas import HASHED_MANIFEST, IMAGES, MANIFEST

NAME = "ZEBEDEUS"  # of a person, and nothing else is called so


@pytest.fixture(autouse=True)
def _no_salt_of_the_environment(monkeypatch):
    monkeypatch.delenv("RAYOGRAPH_SALT", raising=False)


def people(n: int) -> pa.Table:
    """Two images and one study of each."""
    return pa.Table.from_pylist([
        {"source": "folder", "uri": f"/x/{k}.png", "path": f"{k}.png", "patient_id": f"patient {k // 2}",
         "study_id": f"study {k // 2}" if k % 2 else None} for k in range(2 * n)], schema=MANIFEST)


def test_a_storages_salt_is_random_and_kept_for_its_owner_only(tmp_path):
    one, other = Folder(str(tmp_path / "one")), Folder(str(tmp_path / "other"))
    salt = salt_of(one)
    assert re.fullmatch("[0-9a-f]{64}", salt.secret)
    assert salt_of(one) == salt
    assert salt_of(other) != salt
    assert stat.S_IMODE((tmp_path / "one" / FILE).stat().st_mode) == 0o600
    assert one.names() == [], "nothing that lists a storage shows it"
    assert salt.secret not in f"{salt!r} {salt}"


def test_runs_that_start_at_once_agree_on_the_salt(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: salt_of(Folder(str(tmp_path))), range(64)))) == 1


@pytest.fixture
def bucket(monkeypatch):
    """The URI of a folder in an S3 server of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "eu-central-1",
                        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    s3.client().create_bucket(Bucket="salted")
    yield "s3://salted/runs"
    s3.client.cache_clear()
    server.stop()


def test_runs_that_start_at_once_agree_in_a_bucket(bucket):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: salt_of(Folder(bucket)), range(16)))) == 1


def test_a_damaged_salt_is_no_salt(tmp_path):
    salt_of(Folder(str(tmp_path)))
    (tmp_path / FILE).write_text("")
    with pytest.raises(ValueError, match=FILE):
        salt_of(Folder(str(tmp_path)))


def test_identifiers_are_hashed_and_the_split_does_not_depend_on_the_salt(tmp_path, monkeypatch):
    settings = load_settings().data
    plain = split.assign(pseudonymise(people(100), salt_of(Folder(str(tmp_path)))), settings)
    monkeypatch.setenv("RAYOGRAPH_SALT", "a secret of our own")
    own = split.assign(pseudonymise(people(100), salt_of(Folder(str(tmp_path)))), settings)
    assert plain["split"].equals(own["split"])
    assert not set(plain["patient_id"].to_pylist()) & set(own["patient_id"].to_pylist())
    for table in (plain, own):
        assert table.schema.equals(MANIFEST)
        names = table["patient_id"].to_pylist()
        assert len(set(names)) == 100, "different patients keep different names"
        assert names[::2] == names[1::2]
        assert table["study_id"].to_pylist()[0] is None
        assert not re.search("patient |study |secret", str(table.select(["patient_id", "study_id"]).to_pydict()))


@pytest.mark.parametrize("secret", ["one", "another"])
def test_a_patient_of_several_identifiers_is_one_whose_place_does_not_depend_on_the_salt(secret):
    known = [("K0", "P0"), ("P0", None), ("K1", "P1"), ("K2", "P0"), ("K3", None)]
    rows = [pseudonymise_row({"patient_id": patient, "study_id": None, "alias": alias}, Salt(secret))
            for patient, alias in known]
    table = unite(pa.Table.from_pylist(rows, schema=HASHED_MANIFEST))
    one, two, three, four, five = table["patient_id"].to_pylist()
    assert one == two == four
    assert len({one, three, five}) == 3, "an identifier that only an alias has joins nobody"
    lowest = min(split.split_bucket(name) for name in ("K0", "P0", "K2"))
    assert table["bucket"].to_pylist() == [lowest, lowest, split.split_bucket("K1"), lowest, split.split_bucket("K3")]


def test_a_record_number_cannot_be_found_by_trying_all_under_the_salt_of_the_code(tmp_path):
    """As was possible while the salt was the word `rayograph`."""
    import hashlib

    [hashed] = {salt_of(Folder(str(tmp_path))).hash("0000042")}
    assert hashed not in {hashlib.sha256(f"rayograph\0{k:07d}".encode()).hexdigest()[:16] for k in range(1000)}


def test_the_fingerprint_tells_salts_apart_and_holds_none(tmp_path, monkeypatch):
    ours = identifiers.salt_fingerprint()
    salt_of(Folder(str(tmp_path)))
    assert identifiers.salt_fingerprint() == ours, "nothing is done again because a salt was made"
    monkeypatch.setenv("RAYOGRAPH_SALT", "a secret of our own")
    assert identifiers.salt_fingerprint() != ours
    assert len(identifiers.salt_fingerprint()) == 4


@pytest.fixture
def archive(tmp_path, film) -> Path:
    """Films of 60 people in folders that are named after them, among them such as are refused for many reasons."""
    root = tmp_path / f"pacs_{NAME}"
    for k in range(60):
        film(root / f"{NAME}^{k:03d}" / "chest.dcm", k, PatientID=f"{NAME}{k}", PatientName=f"{NAME}^{k}",
             StudyInstanceUID=f"1.2.{k}", StudyDescription=NAME, BodyPartExamined="CHEST")
    (root / f"{NAME}^000" / "copy.dcm").write_bytes((root / f"{NAME}^000" / "chest.dcm").read_bytes())
    film(root / f"{NAME}^001" / "hand.dcm", 1, PatientID=f"{NAME}1", BodyPartExamined=f"HAND {NAME}")
    for k in range(20):  # more than data.max_bad_fraction allows of what is bad
        film(root / f"{NAME}^002" / f"report{k}.dcm", 2, PatientID=f"{NAME}2", Modality="SR",
             SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", ContentLabel=NAME)
    film(root / f"{NAME}^003" / "bits.dcm", 3, PatientID=f"{NAME}3", BitsStored=17)
    (root / f"{NAME}^004" / "cut.dcm").write_bytes((root / f"{NAME}^004" / "chest.dcm").read_bytes()[:-5000])
    (root / f"{NAME}^005" / "text.dcm").write_text(f"{NAME} was here\n" * 50)
    return root


def test_a_list_with_identifiers_lies_in_no_file_that_has_a_name(tmp_path, monkeypatch):
    films, temporary = tmp_path / "films", tmp_path / "temporary"
    temporary.mkdir()
    for k in range(9):
        (films / f"patient{k}").mkdir(parents=True)
        (films / f"patient{k}" / "film.png").write_bytes(b"listed, and not opened")
    settings = load_settings("data=folder", f"data.root={films}", "data.patient_regex='patient(\\d+)'").data
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert list_and_hash(settings, 0)
    assert list(temporary.iterdir()) == []
    out = Folder(str(tmp_path / "out"))
    assert write_manifest(out, settings, 0, Folder(str(tmp_path))) == 9
    assert len(set(read_columns(out, ["patient_id"])["patient_id"].to_pylist())) == 9


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_split_of_dicom_files_does_not_depend_on_the_salt_either(archive, tmp_path, monkeypatch):
    """Their identifiers are hashed where the headers are read, before anything is split."""
    settings = load_settings("data=dicom", f"data.root={archive}", "data.images=50").data
    found = []
    for salt in ("one", "another"):
        monkeypatch.setenv("RAYOGRAPH_SALT", salt)
        out = Folder(str(tmp_path / salt))
        write_manifest(out, settings, 0, Folder(str(tmp_path)))
        found.append(read_columns(out, MANIFEST.names))
    one, other = found
    assert one.num_rows == 50
    assert one.select(["path", "split"]).equals(other.select(["path", "split"]))
    assert set(one["split"].to_pylist()) == {"train", "val", "test"}
    assert not set(one["patient_id"].to_pylist()) & set(other["patient_id"].to_pylist())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_that_leaves_a_run_names_a_person(archive, tiny, whole):
    """Folders, PatientID, PatientName and descriptions do; ingest's own tables, which stay, keep the paths."""
    settings = tiny("data=dicom", f"data.root={archive}", "data.images=null", "data.near_duplicates=null",
                    "sample.images=16")
    run_stages(settings, [*settings.graph] if whole else ["ingest"], redo=False)
    if not whole:
        report(Plan(settings).stage("report", Resources(2, 0, 2)))
    folder = Path(run_folder(settings).uri)
    record = json.loads((folder / "ingest" / "stage.json").read_text())
    assert record["metrics"]["reasons"] == {
        "duplicate": 1, "not_a_chest": 1, "not_an_image_object": 20, "bad_header": 1, "truncated": 1, "not_an_image": 1}
    left = {"report", "publish", "latents", "sample", "evaluate"} if whole else {"report"}
    assert left <= {path.name for path in folder.iterdir()}
    secret = salt_of(Folder(settings.storage)).secret
    inside = [folder / "ingest" / name for name in ("images", "manifest", "quarantine")]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if not any(table in path.parents for table in inside):
            content = path.read_bytes()
            assert NAME.encode() not in content, path
            assert secret.encode() not in content, path
    for row in read_columns(Folder(str(folder)) / "ingest" / "quarantine", ["reason", "detail"]).to_pylist():
        assert row["reason"] == "duplicate" or NAME not in row["detail"]
    columns = [name for name in IMAGES.names if name not in ("uri", "image")]
    for shard in iterate_shards(Folder(str(folder)) / "ingest" / "images", columns):
        assert NAME not in str(shard.to_pydict())
