"""What the fingerprint of ingest is made of."""

import pytest

from pipelines.data.listing import list_images, listing_hash
from pipelines.graph.compose import load_settings

TABLE = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,View Position
1.png,Mass,0,1,50,PA
2.png,No Finding,0,2,60,AP
"""


@pytest.fixture
def nih(tmp_path):
    root = tmp_path / "nih"
    (root / "images").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        (root / "images" / name).write_bytes(b"xx")
    (root / "Data_Entry_2017.csv").write_text(TABLE)
    (root / "test_list.txt").write_text("2.png\n")
    return root


def listed(root) -> str:
    return listing_hash(list_images(load_settings("data=nih-cxr14", f"data.root={root}").data, 0))


def test_a_corrected_table_of_equal_length_is_noticed(nih):
    before = listed(nih)
    (nih / "Data_Entry_2017.csv").write_text(TABLE.replace("Mass", "Edem"))
    assert (nih / "Data_Entry_2017.csv").stat().st_size == len(TABLE)
    assert listed(nih) != before


def test_stray_files_moved_roots_and_columns_that_nobody_reads_are_not(nih):
    before = listed(nih)
    (nih / "images" / "not_in_the_table.png").write_bytes(b"xxx")
    (nih / "notes.csv").write_text("stray")
    (nih / "Data_Entry_2017.csv").write_text(TABLE.replace(",60,", ",61,"))
    assert listed(nih) == before
    assert listed(nih.rename(nih.with_name("elsewhere"))) == before


def test_an_image_of_another_size_is_noticed(nih):
    before = listed(nih)
    (nih / "images" / "1.png").write_bytes(b"xxx")
    assert listed(nih) != before
