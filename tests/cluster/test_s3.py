"""S3 over HTTP: a server on loopback, boto3 and pyarrow between."""

import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import empty
from pyarrow import fs

from cluster import s3, s3_client, s3_streams
from cluster.errors import UserError
from cluster.faults import StorageUnavailable, read_listed
from cluster.storage import Folder
from pipelines.data.files import listing

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
               "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


class Faults:
    """WSGI middleware before moto's server: a test's `answer(environ)` may replace a response, or cut it in half."""

    def __init__(self, application):
        self.application, self.answer, self.requests = application, None, []

    def __call__(self, environ, start_response):
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        fault = self.answer(environ) if self.answer else None
        if fault == "cut":
            content = b"".join(self.application(environ, start_response))
            return iter([content[: len(content) // 2]])  # Content-Length tells of more
        if fault:
            status, code = fault
            body = f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode()
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return self.application(environ, start_response)


@pytest.fixture(scope="module")
def faulty():
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    served = make_server("127.0.0.1", 0, faults, threaded=True)
    faults.url = f"http://127.0.0.1:{served.server_port}"
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield faults
    served.shutdown()
    thread.join()


@pytest.fixture
def server(faulty):
    return faulty.url


@pytest.fixture
def buckets(faulty, server, monkeypatch):
    """Two empty buckets, `xrays` and `results`, and an environment in which they are found."""
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    for bucket in ("xrays", "results"):
        s3.client().create_bucket(Bucket=bucket)
    yield s3.client()
    faulty.answer = None
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


def test_a_large_file_is_uploaded_in_parts_and_shows_only_when_it_is_whole(faulty, buckets):
    folder, numbers = Folder("s3://results/train"), np.arange(6_000_000, dtype=np.float32)
    faulty.requests.clear()
    folder.write_chunks("model.safetensors", [b"header", numbers.data])
    assert folder.read("model.safetensors") == b"header" + numbers.tobytes()
    parts = [path for method, path, _ in faulty.requests if method == "PUT"]
    assert parts.count("/results/train/model.safetensors") > 2
    faulty.answer = lambda environ: "partNumber=2" in environ["QUERY_STRING"] and ("403 Forbidden", "AccessDenied")
    with pytest.raises(PermissionError, match=r"results/train/other\.safetensors"):
        folder.write_chunks("other.safetensors", [numbers.data])
    faulty.answer = None
    assert folder.names() == ["model.safetensors"]
    assert "Uploads" not in buckets.list_multipart_uploads(Bucket="results")


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
    monkeypatch.setattr(s3_streams, "IN_MEMORY", 1 << 20)
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


def test_a_server_that_is_busy_is_asked_again(buckets, faulty):
    Folder("s3://xrays").write("a", b"1")
    faults = [("503 Slow Down", "SlowDown")] * 2
    faulty.answer = lambda environ: faults.pop() if faults else None
    assert Folder("s3://xrays").read("a") == b"1"
    assert faults == []


def test_a_whole_file_is_read_in_one_request(buckets, faulty, tmp_path):
    content = os.urandom(5 << 20)
    Folder("s3://xrays").write("large", content)
    faulty.requests.clear()
    assert Folder("s3://xrays").read("large") == content
    assert faulty.requests == [("GET", "/xrays/large", None)]
    Folder("s3://xrays").download(tmp_path)
    assert (tmp_path / "large").read_bytes() == content
    assert [request for request in faulty.requests if request[2]] == [], "nor is it copied in ranges"


def test_a_connection_that_breaks_is_resumed_at_its_byte(buckets, faulty):
    content = os.urandom(3 << 20)
    Folder("s3://xrays").write("large", content)
    faults = ["cut"]
    faulty.answer = lambda environ: faults.pop() if faults else None
    faulty.requests.clear()
    assert Folder("s3://xrays").read("large") == content
    (_, _, first), (_, _, second) = faulty.requests
    assert first is None
    assert int(second.removeprefix("bytes=").removesuffix("-")) > 1 << 20


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed(buckets, faulty):
    Folder("s3://xrays").write("large", b"a" * (3 << 20))
    faulty.answer = lambda environ: "cut"
    stream = s3.filesystem().open_input_stream("xrays/large")
    faulty.answer = None
    Folder("s3://xrays").write("large", b"b" * (3 << 20))
    with pytest.raises(OSError, match="xrays/large"):
        stream.read()


def test_an_upload_that_is_dropped_or_fails_leaves_no_object(buckets, monkeypatch):
    """The stump of a dropped upload would count as done."""
    stream = s3.filesystem().open_output_stream("results/dropped")
    stream.write(b"half")
    del stream
    gc.collect()
    with pytest.raises(OSError, match="errno 5"):  # the read fails after the output is open
        fs.copy_files("/proc/self/mem", "results/copied", source_filesystem=fs.LocalFileSystem(),
                      destination_filesystem=s3.filesystem())
    gc.collect()
    assert Folder("s3://results").names() == []


def test_a_token_that_is_refused_for_a_while_costs_attempts_and_then_stops(buckets, faulty):
    folder = Folder("s3://xrays/films")
    folder.write("a.png", b"pixels")
    faults = [("403 Forbidden", "AccessDenied")] * 2
    faulty.answer = lambda environ: faults.pop() if faults else None
    assert read_listed(folder, "a.png", (0.5,) * 3) == b"pixels"
    faulty.answer = lambda environ: ("403 Forbidden", "AccessDenied")
    with pytest.raises(StorageUnavailable, match=r"films/a\.png.*AccessDenied"):
        read_listed(folder, "a.png", (0.01,))
    faulty.answer = None
    with pytest.raises(UserError, match=r"films/b\.png was listed but no longer exists"):
        read_listed(folder, "b.png", (0.01,))


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
    from pipelines.tables.images import encode_png

    expected = set()
    for k in range(150):
        content = encode_png(render(0, k, 48).image)["bytes"]
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


@pytest.mark.parametrize("fault", [("501 Not Implemented", "NotImplemented"), ("400 Bad Request", "InvalidArgument"),
                                   ("405 Method Not Allowed", "MethodNotAllowed")])
def test_a_store_that_knows_no_conditional_writes_is_written_all_the_same(buckets, faulty, monkeypatch, fault):
    """It is asked once, one line is logged, and what is there is still not replaced."""
    monkeypatch.setattr(s3_client, "unconditional", set())
    warned, refused = [], []
    monkeypatch.setattr(s3_client.log, "warning", lambda *arguments: warned.append(arguments))

    def refuse(environ):
        if environ.get("HTTP_IF_NONE_MATCH"):
            refused.append(environ["PATH_INFO"])
            return fault
        return None

    faulty.answer = refuse
    folder = Folder("s3://results/runs")
    folder.write("a", b"first", replace=False)
    folder.write("a", b"second", replace=False)
    folder.write("b", b"first", replace=False)
    assert (folder.read("a"), folder.read("b")) == (b"first", b"first")
    assert len(refused) == 1
    assert len(warned) == 1


def test_a_write_that_is_refused_for_another_reason_says_so(buckets, faulty, monkeypatch):
    monkeypatch.setattr(s3_client, "unconditional", set())
    faulty.answer = lambda environ: ("501 Not Implemented", "NotImplemented")
    for replace in (False, True):
        with pytest.raises(OSError, match="results/a"):
            Folder("s3://results").write("a", b"1", replace=replace)
