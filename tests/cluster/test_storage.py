import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import empty

from cluster import storage
from cluster.errors import UserError
from cluster.storage import Folder, absolute, overlaps


def test_a_written_file_is_read_back_and_replaced(tmp_path):
    folder = Folder(str(tmp_path / "new" / "folder"))
    folder.write("a.bin", b"first")
    folder.write("a.bin", b"second")
    assert folder.read("a.bin") == b"second"
    assert os.listdir(tmp_path / "new" / "folder") == ["a.bin"]


def test_a_writer_killed_before_the_commit_leaves_the_old_file_whole(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write("a.bin", b"old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write("a.bin", b"new and longer")
    with pytest.raises(KeyboardInterrupt):
        folder.write("b.bin", b"never seen before")
    assert folder.read("a.bin") == b"old"
    assert not folder.exists("b.bin")
    assert len(list(tmp_path.iterdir())) == 3, "the leftovers lie aside"
    assert folder.names() == ["a.bin"]
    assert folder.names(".bin") == ["a.bin"]
    assert folder.names(".tmp") == []


def test_names_are_sorted_filtered_and_empty_without_a_folder(tmp_path):
    folder = Folder(str(tmp_path / "x"))
    assert folder.names() == []
    for name in ("b.parquet", "a.parquet", "c.json"):
        folder.write(name, b"")
    (folder / "below").write("d.parquet", b"")
    assert folder.names(".parquet") == ["a.parquet", "b.parquet"]
    assert folder.names() == ["a.parquet", "b.parquet", "below", "c.json"]


def test_json_is_none_where_it_is_missing(tmp_path):
    folder = Folder(str(tmp_path / "nowhere"))
    assert folder.read_json("x.json") is None
    folder.write_json("x.json", {"a": [1, "ä"]})
    assert folder.read_json("x.json") == {"a": [1, "ä"]}
    folder.remove("x.json")
    folder.remove("x.json")
    assert folder.read_json("x.json") is None


@pytest.mark.parametrize("uri", ["runs", "./runs", "runs/", "a/../runs"])
def test_a_local_path_means_the_same_from_every_working_folder(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    folder = Folder(uri)
    monkeypatch.chdir("/")
    folder.write("x", b"1")
    assert folder.uri == str(tmp_path / "runs")
    assert (tmp_path / "runs" / "x").read_bytes() == b"1"


def test_absolute_keeps_remote_uris_and_expands_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert absolute("~/runs") == "/home/someone/runs"
    assert absolute("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert absolute("file:///data/runs/") == "/data/runs"


def test_a_folder_travels_to_other_processes(tmp_path):
    import pickle

    folder = pickle.loads(pickle.dumps(Folder(str(tmp_path)) / "below"))  # noqa: S301
    assert folder.uri == f"{tmp_path}/below"


def test_clear_removes_all_and_needs_no_folder(tmp_path):
    folder = Folder(str(tmp_path / "x"))
    empty(folder)
    folder.write("a", b"")
    (folder / "below").write("b", b"")
    empty(folder)
    assert folder.names() == []


def test_upload_and_download_keep_the_tree(tmp_path):
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "a").write_bytes(b"1")
    folder = Folder(str(tmp_path / "store"))
    folder.upload(tmp_path / "from")
    folder.download(tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "a").read_bytes() == b"1"


def test_a_remote_file_system_is_written_and_read(tmp_path):
    """A stand-in for HDFS and GCS: the way without local renames."""
    from pyarrow import fs

    folder = Folder("hdfs://host/run")
    folder.__dict__["_resolved"] = (fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
    folder.write_json("x.json", {"a": 1})
    assert folder.read_json("x.json") == {"a": 1}
    assert folder.read_json("y.json") is None
    assert folder.names() == ["x.json"]


def test_unwritable_storage_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=str(tmp_path / "file" / "runs")):
        Folder(str(tmp_path / "file" / "runs")).check_writable()
    Folder(str(tmp_path / "fine")).check_writable()
    assert Folder(str(tmp_path / "fine")).names() == []


def test_what_a_killed_write_left_is_not_downloaded(tmp_path):
    folder = Folder(str(tmp_path / "corpus"))
    folder.write("part-00000.parquet", b"whole")
    (tmp_path / "corpus" / ".part-00001.parquet.abc.tmp").write_bytes(b"ha")
    folder.download(tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["part-00000.parquet"]


def test_a_folder_is_held_by_one_command_at_a_time(tmp_path):
    folder = Folder(str(tmp_path))
    with folder.locked(), pytest.raises(ValueError, match="another rayograph command"), Folder(str(tmp_path)).locked():
        pass
    with folder.locked():
        assert folder.names() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Folder(str(tmp_path)).check_writable()


def test_where_files_show_while_they_are_written_a_cut_off_write_leaves_none(tmp_path):
    """HDFS shows a file from its first byte on; here fsspec's local disk stands for it, through pyarrow's interface."""
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class CutOff(FSSpecHandler):
        def open_output_stream(self, path, metadata):
            Path(path).write_bytes(b"ha")
            raise OSError("the connection is gone")

    def folder(handler: type[FSSpecHandler]) -> Folder:
        found = Folder("hdfs://host/runs")
        found.__dict__["_resolved"] = (PyFileSystem(handler(LocalFileSystem())), str(tmp_path / "runs"))
        return found

    whole = folder(FSSpecHandler)
    whole.write("a", b"first")
    with pytest.raises(OSError, match="gone"):
        folder(CutOff).write("b", b"half")
    assert whole.names() == ["a"]
    whole.write("a", b"second", replace=False)
    assert whole.read("a") == b"first"
    whole.write("a", b"second")
    assert whole.read("a") == b"second"


def test_a_full_disk_is_named_and_given_its_room_back(tmp_path):
    code = """
import resource, sys
from cluster.storage import Folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
folder = Folder(sys.argv[1])
try:
    folder.write("part-00000.parquet", bytes(1 << 20))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "1,048,576 bytes cannot be written" in done.stdout
    assert "part-00000.parquet" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_that_carries_the_mark_is_cleared(tmp_path):
    folder = Folder(str(tmp_path))
    (folder / "train").write("of the user.png", b"x")
    with pytest.raises(UserError, match=r"begun\.json"):
        folder.clear("begun.json")
    assert (folder / "train").names() == ["of the user.png"]
    folder.write("begun.json", b"{}")
    folder.clear("begun.json")
    assert folder.names() == ["begun.json"]


@pytest.mark.parametrize(("one", "other", "expected"), [
    ("/data/xrays", "/data/xrays/train", True), ("/data/xrays/", "/data/xrays", True),
    ("/data/xrays", "/data/xrays2", False),
    ("s3://bucket/a", "s3://bucket/a/b", True), ("s3://bucket/a", "s3://bucket/ab", False),
    ("s3://bucket/a", "/bucket/a", False), ("file:///data/xrays", "/data/xrays", True)])
def test_folders_that_lie_in_one_another(one, other, expected):
    assert overlaps(one, other) == overlaps(other, one) == expected
