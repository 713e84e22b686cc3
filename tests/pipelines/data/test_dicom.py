"""Trees of DICOM files, and PadChest, whose table says what its files do not."""

import csv
import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pydicom
import pytest
from PIL import Image

from cluster.storage import Folder
from pipelines.data.image.picture import NOT_WANTED, Refused
from pipelines.data.listing import list_images, listing_hash
from pipelines.data.sources import find_source
from pipelines.data.sources.dicom import described
from pipelines.graph.compose import load_settings

PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
HEADERS = {  # of shared/data/dicom and the like: patient, view and why it is not wanted
    "RG1_UNCR.dcm": ("9RG1", "PA", None), "RG1_J2KR.dcm": ("9RG1", "PA", None), "RG1_J2KI.dcm": ("9RG1", "PA", None),
    "RG1_JLSN.dcm": ("9RG1", "PA", None), "NIH_DX.dcm": ("Covid0000", None, None),
    "RG3_J2KI.dcm": ("11RG3", "AP", "not_a_chest"), "bad_sequence.dcm": ("b2cbe507f250", None, "not_a_radiograph"),
    "emri_small_jpeg_2k_lossless_too_short.dcm": (None, None, "not_a_radiograph"),
    "SC_rgb_16bit.dcm": ("ID1", None, None), "mlut_18.dcm": ("MLUT_nn", None, None),
    "vlut_04.dcm": ("VLUT_nn", None, None), "OT-PAL-8-face.dcm": (None, None, None),
}


@pytest.mark.filterwarnings("ignore")
def test_headers_of_real_files(real_data):
    settings, folder = load_settings().data, Folder(str(real_data("dicom")))
    found = {name: described(folder, name, settings) for name in folder.names(".dcm")}
    assert {name: (image.patient, image.view, image.refused) for name, image in found.items()} == HEADERS
    assert found["RG1_UNCR.dcm"].study


def test_what_is_not_wanted_is_refused_by_its_header_and_its_pixels_stay_unread(real_data):
    settings = load_settings("data=dicom", f"data.root={real_data('dicom')}").data
    source = find_source("dicom")
    [row] = [row for row in source.manifest(settings, 0).to_pylist() if row["path"] == "RG3_J2KI.dcm"]
    row = source.describe(row, settings)
    with pytest.raises(Refused) as refused:
        source.load(row | {"uri": f"{settings.root}/moved.dcm"}, settings)
    assert refused.value.reason == "not_a_chest"
    assert refused.value.reason in NOT_WANTED
    settings.chest_only = False
    row = source.describe(row, settings)
    assert source.load(row, settings).image.std() > 5


def test_files_of_other_suffixes_are_left_out_and_change_nothing(tmp_path, capsys):
    """A suffix that is a number is the end of a UID."""
    films = ("IM1", "1.2.840.113", "a.dcm", "b.DICOM", "c.IMA", "d.img")
    for name in films:
        (tmp_path / name).write_bytes(b"x")
    settings = load_settings("data=dicom", f"data.root={tmp_path}").data
    before = listing_hash(list_images(settings, 0))
    assert "left out" not in capsys.readouterr().err
    for name in ("notes.txt", "Thumbs.db", "DICOMDIR", "a.dcm.json"):
        (tmp_path / name).write_bytes(b"x")
    listed = list_images(settings, 0)
    assert set(listed["path"].to_pylist()) == set(films)
    assert listing_hash(listed) == before
    assert "3 files are left out" in capsys.readouterr().err
    (tmp_path / "IM2").write_bytes(b"x")
    assert listing_hash(list_images(settings, 0)) != before


def test_a_fault_of_the_storage_is_not_taken_for_another_patient(tmp_path):
    """A file whose header cannot be fetched must not be listed as a patient of its own."""
    (tmp_path / "a.dcm").mkdir()
    with pytest.raises(OSError, match=r"a\.dcm"):
        described(Folder(str(tmp_path)), "a.dcm", load_settings().data)


@pytest.fixture
def sequenced(tmp_path, film):
    """The bytes of a film whose header has a sequence without a length, where pydicom raises OSErrors of its own."""
    film(tmp_path / "film.dcm", 0, PatientID="P1")
    dataset = pydicom.dcmread(tmp_path / "film.dcm")
    dataset.ProcedureCodeSequence = [pydicom.Dataset()]
    dataset.ProcedureCodeSequence[0].CodeValue = "R-1"
    dataset["ProcedureCodeSequence"].is_undefined_length = True
    dataset.save_as(tmp_path / "film.dcm")
    return (tmp_path / "film.dcm").read_bytes()


def test_a_file_that_is_cut_off_anywhere_is_listed_for_decoding_to_refuse(tmp_path, sequenced):
    settings, folder = load_settings().data, Folder(str(tmp_path))
    for end in range(132, 800):
        (tmp_path / "cut.dcm").write_bytes(sequenced[:end])
        assert described(folder, "cut.dcm", settings) is not None, end


def test_a_fault_of_the_storage_inside_a_header_is_told_from_a_file_that_is_cut_off(sequenced):
    class Unplugged(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise OSError("the mount is gone")
            return super().read(min(size, 300))

    stored = SimpleNamespace(open_input_file=lambda path: pa.PythonFile(Unplugged(sequenced), mode="r"))
    with pytest.raises(OSError, match="the mount is gone"):
        described(SimpleNamespace(path="", filesystem=stored), "film.dcm", load_settings().data)


def test_a_header_that_finds_no_memory_is_not_taken_for_another_patient(tmp_path, film, monkeypatch):
    def exhausted(*arguments, **options):
        raise MemoryError

    film(tmp_path / "a.dcm", 0, PatientID="P1")
    monkeypatch.setattr("pipelines.data.image.dicom.read_header", exhausted)
    with pytest.raises(MemoryError):
        described(Folder(str(tmp_path)), "a.dcm", load_settings().data)


@pytest.mark.parametrize("interpretations", [("MONOCHROME2", "MONOCHROME1"), ("MONOCHROME2", "MONOCHROME1 "), None])
def test_padchests_inverted_films_are_turned_round(tmp_path, real_data, interpretations):
    """Two files of one film, as the detectors of two makers store it."""
    film = np.asarray(Image.open(real_data("jsrt") / "images" / "JPCLN001.png").convert("L")).astype(np.uint16) * 257
    (tmp_path / "0").mkdir()
    for name, values in (("a.png", film), ("b.png", 65535 - film)):
        Image.fromarray(values).save(tmp_path / "0" / name)
    rows = [{"ImageID": name, "ImageDir": 0, "StudyID": name, "PatientID": name, "Projection": "PA", "Labels": "[]"}
            for name in ("a.png", "b.png")]
    for row, value in zip(rows, interpretations or (), strict=False):
        row["PhotometricInterpretation_DICOM"] = value
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / PADCHEST).write_text(text.getvalue())
    settings = load_settings("data=padchest", f"data.root={tmp_path}", "data.size=64").data
    source = find_source("padchest")
    one, other = (source.load(row, settings) for row in source.manifest(settings, 0).to_pylist())
    difference = np.abs(one.image.astype(int) - other.image).max()
    if interpretations:
        assert difference <= 1
        assert (one.mapping, other.mapping) == ("percentile", "percentile, inverted")
    else:
        assert difference > 100, "nothing tells"
