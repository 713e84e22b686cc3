"""S3 over HTTP: a server on loopback, boto3 and pyarrow between."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import empty
from pyarrow import fs

from cluster import s3
from cluster.storage import Folder
from pipelines.data.files import listing

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
               "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def buckets(server, monkeypatch):
    """Two empty buckets, `xrays` and `results`, and an environment in which they are found."""
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    for bucket in ("xrays", "results"):
        s3.client().create_bucket(Bucket=bucket)
    yield s3.client()
    for bucket in ("xrays", "results"):
        empty(Folder(f"s3://{bucket}"))
        s3.client().delete_bucket(Bucket=bucket)
    s3.client.cache_clear()


def test_a_folder_on_s3_behaves_as_one_on_disk(buckets, tmp_path):
    folder = Folder("s3://results/runs/demo")
    assert folder.names() == []
    assert folder.read_json("stage.json") is None
    folder.write("part-00001.parquet", b"one")
    folder.write_json("stage.json", {"a": 1})
    (folder / "images").write("x.png", b"pixels")
    assert folder.names() == ["images", "part-00001.parquet", "stage.json"]
    assert folder.names(".parquet") == ["part-00001.parquet"]
    assert folder.read("part-00001.parquet") == b"one"
    assert folder.read_json("stage.json") == {"a": 1}
    assert (folder.exists("images"), folder.exists("stage.json"), folder.exists("image")) == (True, True, False)
    assert (folder.size("stage.json") or 0) > 5
    folder.check_writable()
    folder.download(tmp_path / "copy")
    assert (tmp_path / "copy" / "images" / "x.png").read_bytes() == b"pixels"
    (Folder("s3://results") / "back").upload(tmp_path / "copy")
    assert Folder("s3://results/back/images").read("x.png") == b"pixels"
    folder.remove("stage.json")
    empty(folder)
    assert folder.names() == []
    assert Folder("s3://results").names() == ["back"]


def test_missing_objects_and_buckets_are_file_errors(buckets):
    with pytest.raises(FileNotFoundError, match="xrays/none"):
        Folder("s3://xrays").read("none")
    with pytest.raises(OSError, match="absent"):
        Folder("s3://absent").write("x", b"")
    with pytest.raises(ValueError, match="cannot be read"):
        listing("s3://absent/there")


def test_a_commit_is_conditional_and_a_straggler_changes_nothing(buckets, tmp_path):
    for folder in (Folder("s3://results/run"), Folder(str(tmp_path))):
        folder.write("part", b"first", replace=False)
        folder.write("part", b"late", replace=False)
        assert folder.read("part") == b"first"
        folder.write("part", b"meant")
        assert folder.read("part") == b"meant"
        assert folder.names() == ["part"]


def test_all_pages_of_a_listing_are_read(buckets):
    for k in range(1_100):
        buckets.put_object(Bucket="xrays", Key=f"set/{k % 3}/{k:05d}.png", Body=b"x" * (k % 7))
    files = listing("s3://xrays/set")
    assert len(files) == 1_100
    assert files["1/00001.png"] == 1
    assert Folder("s3://xrays/set").names() == ["0", "1", "2"]
    assert len(Folder("s3://xrays/set/0").names()) == 367
    empty(Folder("s3://xrays/set"))
    assert Folder("s3://xrays").names() == []


def test_parts_of_an_object_are_read_by_range(buckets):
    content = os.urandom(5 << 20)
    Folder("s3://xrays").write("large", content)
    asked = []
    buckets.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.headers.get("Range")))
    with s3.filesystem().open_input_file("xrays/large") as file:
        assert file.size() == len(content)
        file.seek(3_000_000)
        assert file.read(1000) == content[3_000_000:3_001_000]
    ranges = [[int(end) for end in header.decode().removeprefix("bytes=").split("-")] for header in asked if header]
    assert 0 < sum(stop - start + 1 for start, stop in ranges) < 3 << 20


def test_a_large_stream_is_there_when_it_is_closed(buckets, monkeypatch):
    monkeypatch.setattr(s3, "IN_MEMORY", 1 << 20)
    content = os.urandom(20 << 20)
    stream = s3.filesystem().open_output_stream("results/parts")
    stream.write(content)
    assert not Folder("s3://results").exists("parts")
    stream.close()
    assert Folder("s3://results").read("parts") == content


def test_the_reader_pays_where_the_environment_says_so(buckets, monkeypatch):
    Folder("s3://xrays").write("a/b", b"1")
    seen = []
    buckets.meta.events.register("before-send.s3", lambda request, **_: seen.append(request.headers))
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    assert Folder("s3://xrays/a").read("b") == b"1"
    assert listing("s3://xrays") == {"a/b": 1}
    assert seen
    assert all(headers.get("x-amz-request-payer") == b"requester" for headers in seen)


def test_a_server_that_is_busy_is_asked_again(buckets):
    from io import BytesIO

    from botocore.awsrequest import AWSResponse

    Folder("s3://xrays").write("a", b"1")
    failures = []

    def busy(request, **_):
        if len(failures) < 2:
            failures.append(request.url)
            raw = BytesIO(b"")
            raw.stream = lambda *_, **__: iter([b""])
            return AWSResponse(request.url, 503, {}, raw)
        return None

    buckets.meta.events.register("before-send.s3", busy)
    assert Folder("s3://xrays").read("a") == b"1"
    assert len(failures) == 2


def test_a_file_system_travels_to_other_processes(buckets):
    import pickle

    Folder("s3://xrays").write("a", b"1")
    filesystem = pickle.loads(pickle.dumps(s3.filesystem()))  # noqa: S301
    assert filesystem == s3.filesystem()
    assert filesystem.get_file_info("xrays/a").type == fs.FileType.File


def ids(folder: Folder) -> list[str]:
    return [image for name in folder.names(".parquet")
            for image in pq.read_table(f"{folder.path}/{name}", filesystem=folder.filesystem)["image_id"].to_pylist()]


@pytest.mark.ray
def test_ingest_from_one_bucket_into_another_survives_sigkill(buckets, server):
    """Ray workers read and write over HTTP; killed in the middle, the same command goes on to the same end."""
    from pipelines.data.phantom import render
    from pipelines.tables.images import png

    expected = set()
    for k in range(150):
        content = png(render(0, k, 48).image)["bytes"]
        Folder(f"s3://xrays/films/{('train', 'val', 'test')[k % 3]}").write(f"{k:03d}.png", content)
        expected.add(hashlib.sha256(hashlib.sha256(content).hexdigest().encode()).hexdigest()[:32])
    command = [sys.executable, "-m", "pipelines.cli", "ingest", "data=folder", "data.root=s3://xrays/films",
               "data.size=32", "data.shard_rows=5", "storage=s3://results/runs", "name=run"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, env=os.environ | {"AWS_ENDPOINT_URL": server}, start_new_session=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    killed, images = start(), Folder("s3://results/runs/run/ingest/images")
    while killed.poll() is None and len(images.names(".parquet")) < 5:
        time.sleep(0.1)
    assert killed.poll() is None, killed.stderr.read().decode()[-2000:]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = set(images.names(".parquet"))
    assert 5 <= len(before) < 30, "it was killed in the middle"
    stamps = {name: images.filesystem.get_file_info(f"{images.path}/{name}").mtime for name in before}
    again = start()
    _, told = again.communicate(timeout=180)
    assert again.returncode == 0, told.decode()[-2000:]
    found = ids(images)
    assert len(found) == len(set(found)) == 150
    assert set(found) == expected
    assert {name: images.filesystem.get_file_info(f"{images.path}/{name}").mtime for name in before} == stamps


def test_a_store_that_knows_no_conditional_writes_is_written_all_the_same(buckets):
    """Such stores answer 501 to If-None-Match; they are asked once, and what is there is still not replaced."""
    from io import BytesIO

    from botocore.awsrequest import AWSResponse

    refused = []

    def not_implemented(request, **_):
        if request.headers.get("If-None-Match"):
            refused.append(request.url)
            raw = BytesIO(b"")
            raw.stream = lambda *_, **__: iter([b"<Error><Code>NotImplemented</Code></Error>"])
            return AWSResponse(request.url, 501, {}, raw)
        return None

    buckets.meta.events.register("before-send.s3", not_implemented)
    try:
        folder = Folder("s3://results/runs")
        folder.write("a", b"first", replace=False)
        folder.write("a", b"second", replace=False)
        folder.write("b", b"first", replace=False)
        assert (folder.read("a"), folder.read("b")) == (b"first", b"first")
        assert len(refused) == 1
    finally:
        s3.without_conditions.clear()
