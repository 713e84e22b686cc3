"""Ingest under faults, as a user's commands: afterwards the same command gives the ids of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.storage import Folder
from pipelines.data.phantom import render
from pipelines.tables.images import encode_png
from pipelines.tables.parquet import read_columns

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

FILMS = 60
POISON = b"this kills"
KILLS = f"""
import os, signal
from PIL import Image

opened = Image.open

def open_or_die(file, *arguments, **options):
    if hasattr(file, "getvalue") and file.getvalue().endswith({POISON!r}):
        os.kill(os.getpid(), signal.SIGKILL)
    return opened(file, *arguments, **options)

Image.open = open_or_die
"""


def films() -> dict[str, bytes]:
    return {f"{('train', 'val', 'test')[k % 3]}/{k:03d}.png": encode_png(render(0, k, 48).image)["bytes"]
            for k in range(FILMS)}


def write_films(root: Path) -> Path:
    for path, content in films().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@pytest.fixture
def xrays(tmp_path) -> Path:
    return write_films(tmp_path / "xrays")


def command(root: str | Path, storage: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "ingest", "data=folder", f"data.root={root}", "data.size=32",
            "data.shard_rows=5", f"storage={storage}", "name=run"]


def ingest(root: str | Path, storage: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(root, storage), env=os.environ | environment, capture_output=True, text=True,
                          check=False)


def ids(storage: str | Path) -> list[str]:
    return read_columns(Folder(f"{storage}/run/ingest/images"), ["image_id"])["image_id"].to_pylist()


def refused(storage: str | Path) -> list[tuple[str, str]]:
    table = read_columns(Folder(f"{storage}/run/ingest/quarantine"), ["uri", "reason"])
    return [(row["uri"].rsplit("/", 1)[-1], row["reason"]) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ingest(write_films(folder / "xrays"), folder / "runs").returncode == 0
    return ids(folder / "runs")


def test_a_file_that_kills_its_decoder_costs_one_row(xrays, undisturbed, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(KILLS)
    content = films()["train/000.png"]
    (xrays / "train" / "poison.png").write_bytes(content + POISON)
    path = os.pathsep.join([str(tmp_path / "path"), os.environ.get("PYTHONPATH", "")])
    done = ingest(xrays, tmp_path / "runs", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert refused(tmp_path / "runs") == [("poison.png", "killed_its_worker")]
    assert set(ids(tmp_path / "runs")) == set(undisturbed)


def test_refusals_of_the_storage_for_a_while_cost_no_image(undisturbed, monkeypatch):
    """Every reading of a film is answered with 403, for eight seconds and then no more."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    from cluster import s3

    closed, turned_away = threading.Event(), []
    moto = DomainDispatcherApplication(create_backend_app)

    def gate(environ, start_response):
        film = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".png")
        if film and closed.is_set():
            if not turned_away:
                threading.Timer(8, closed.clear).start()
            turned_away.append(environ["PATH_INFO"])
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, gate, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
                        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
                        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}"}.items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    try:
        for bucket in ("xrays", "results"):
            s3.client().create_bucket(Bucket=bucket)
        for path, content in films().items():
            Folder(f"s3://xrays/{path.split('/')[0]}").write(path.split("/")[1], content)
        closed.set()
        done = ingest("s3://xrays", "s3://results/runs")
        assert done.returncode == 0, done.stderr
        assert turned_away
        assert refused("s3://results/runs") == []
        assert ids("s3://results/runs") == undisturbed
    finally:
        server.shutdown()
        s3.client.cache_clear()


def in_own_mounts(script: str, **options) -> subprocess.Popen:
    """Run a shell script that may mount without anybody else's seeing it."""
    return subprocess.Popen(["unshare", "--mount", "sh", "-ec", script], **options)


@pytest.fixture
def mounts():
    if in_own_mounts("mount -t tmpfs none /mnt", stderr=subprocess.DEVNULL).wait():
        pytest.skip("mounting takes root")


@pytest.mark.usefixtures("mounts")
def test_a_node_without_the_mount_eats_no_shard(xrays, undisturbed, tmp_path):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray = Path(sys.executable).parent / "ray"
    other = in_own_mounts(f"mount -t tmpfs none {xrays}; exec {ray} start --address={cluster.address} --num-cpus=1 "
                          "--block", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in cluster.global_state.node_table()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        done = ingest(xrays, tmp_path / "runs", RAY_ADDRESS=cluster.address)
        assert done.returncode == 0, done.stderr
        assert "is excluded" in done.stderr
        assert refused(tmp_path / "runs") == []
        assert ids(tmp_path / "runs") == undisturbed
    finally:
        os.killpg(other.pid, 15)
        other.wait(30)
        cluster.shutdown()


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(xrays, undisturbed, tmp_path):
    runs, first = tmp_path / "runs", tmp_path / "first"
    runs.mkdir()
    words = " ".join(f"'{word}'" for word in command(xrays, runs))
    script = (f"mount -t tmpfs -o size=200k none {runs}; code=0; {words} 2> {first} || code=$?; "
              f"test $code = 1; mount -o remount,size=64m {runs}; {words}; cp -r {runs} {tmp_path}/kept")
    done = in_own_mounts(script, stderr=subprocess.PIPE, text=True)
    _, told = done.communicate()
    assert done.returncode == 0, first.read_text() + told
    assert "No space left" in first.read_text()
    assert "Traceback" not in first.read_text()
    assert ids(tmp_path / "kept") == undisturbed
