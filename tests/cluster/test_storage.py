import gzip
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


def on_fsspec(path: Path, handler=None) -> Folder:
    """A folder behind pyarrow's interface on fsspec's local disk, which like HDFS shows a file from its first byte."""
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    folder = Folder("hdfs://host/runs")
    folder.__dict__["_resolved"] = (PyFileSystem((handler or FSSpecHandler)(LocalFileSystem())), str(path))
    return folder


def test_on_any_file_system_a_write_replaces_or_leaves_what_is_there(tmp_path):
    folder = on_fsspec(tmp_path / "runs")
    folder.write("a", b"first")
    folder.write("a", b"second", replace=False)
    assert folder.read("a") == b"first"
    folder.write("a", b"second")
    assert folder.read("a") == b"second"
    assert os.listdir(tmp_path / "runs") == ["a"]


def test_a_writer_killed_in_the_middle_shows_nothing_on_any_file_system(tmp_path):
    code = """
import os, signal, sys
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from cluster.storage import Folder

class Killed(FSSpecHandler):
    def open_output_stream(self, path, metadata):
        stream = super().open_output_stream(path, metadata)
        stream.write(b"half")
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)

folder = Folder("hdfs://host/runs")
folder.__dict__["_resolved"] = (PyFileSystem(Killed(LocalFileSystem())), sys.argv[1])
folder.write("part", b"half and half")
"""
    (tmp_path / "runs").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs")], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1, "it was killed after the first bytes"
    assert on_fsspec(tmp_path / "runs").names() == []


def test_a_write_that_fails_takes_no_room_and_is_named(tmp_path):
    from pyarrow.fs import FSSpecHandler

    class Full(FSSpecHandler):
        def move(self, src, dest):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"5 bytes cannot be written.*runs/part"):
        on_fsspec(tmp_path / "runs", Full).write("part", b"bytes")
    assert list((tmp_path / "runs").iterdir()) == []


def test_without_a_rename_the_file_is_copied(tmp_path):
    """Azure without hierarchical namespace, for one."""
    from pyarrow.fs import FSSpecHandler

    class Flat(FSSpecHandler):
        def move(self, src, dest):
            raise NotImplementedError("no rename here")

    folder = on_fsspec(tmp_path / "runs", Flat)
    folder.write("part", b"bytes")
    assert folder.read("part") == b"bytes"
    assert os.listdir(tmp_path / "runs") == ["part"]


def test_bytes_come_back_as_they_were_written_also_of_a_gzip_file(tmp_path):
    content = gzip.compress(b"image_id,finding")
    for folder in (Folder(str(tmp_path / "disk")), on_fsspec(tmp_path / "remote")):
        for name, data in (("table.csv.gz", content), ("plain.gz", b"not packed at all")):
            folder.write(name, data)
            assert folder.read(name) == data


def test_a_target_that_cannot_be_replaced_leaves_nothing_aside(tmp_path):
    (tmp_path / "part" / "below").mkdir(parents=True)
    with pytest.raises(OSError, match=r"5 bytes cannot be written.*part"):
        Folder(str(tmp_path)).write("part", b"bytes")
    assert os.listdir(tmp_path) == ["part"]


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


def test_what_links_lead_to_is_never_cleared(tmp_path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "mine.png").write_bytes(b"x")
    folder = Folder(str(tmp_path / "stage"))
    folder.write("begun.json", b"{}")
    (folder / "below").write("ours", b"x")
    for place in ("linked", "below/linked"):
        (tmp_path / "stage" / place).symlink_to(tmp_path / "user")
    folder.clear("begun.json")
    assert folder.names() == ["begun.json"]
    assert os.listdir(tmp_path / "user") == ["mine.png"]


@pytest.mark.parametrize(("one", "other", "expected"), [
    ("/data/xrays", "/data/xrays/train", True), ("/data/xrays/", "/data/xrays", True),
    ("/data/xrays", "/data/xrays2", False),
    ("s3://bucket/a", "s3://bucket/a/b", True), ("s3://bucket/a", "s3://bucket/ab", False),
    ("s3://bucket/a", "/bucket/a", False), ("file:///data/xrays", "/data/xrays", True),
    ("file:/data/xrays", "/data/xrays", True), ("/", "/data", True), ("s3://bucket", "s3://bucket/a", True),
    ("s3://bucket/a/", "s3://bucket/b", False), ("s3://one/a", "s3://other/a", False),
    ("hdfs://host/a/../b", "hdfs://host/b/c", True), ("gs://anonymous@bucket/a", "gcs://bucket/a/b?retry=1", True),
    ("abfs://one@account/a", "abfs://other@account/a", False)])
def test_folders_that_lie_in_one_another(one, other, expected):
    assert overlaps(one, other) == overlaps(other, one) == expected


def test_links_are_followed_to_see_whether_folders_overlap(tmp_path):
    (tmp_path / "xrays" / "train").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "xrays")
    assert overlaps(str(tmp_path / "alias"), str(tmp_path / "xrays" / "train"))
    assert overlaps(str(tmp_path / "xrays"), str(tmp_path / "alias" / "not there yet"))
    assert not overlaps(str(tmp_path / "alias" / "train"), str(tmp_path / "xrays" / "val"))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts take root")
def test_a_bind_mount_is_seen_through(tmp_path):
    (tmp_path / "xrays" / "train").mkdir(parents=True)
    (tmp_path / "mounted").mkdir()
    if subprocess.run(["mount", "--bind", tmp_path / "xrays", tmp_path / "mounted"], capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:
        assert overlaps(str(tmp_path / "mounted"), str(tmp_path / "xrays" / "train"))
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)
