"""Portable checkpoints: every worker writes its own flat fp32 vectors, and an index says what is where in them.

A checkpoint is read by any number of workers under any ZeRO stage, and holds no pickle:

    state.json                        the cursor, the shape of each parameter, and each worker's fragments
    PART-00000-LAYOUT.safetensors     one vector of worker 0; PART is model, exp_avg, exp_avg_sq, or the name of an EMA

LAYOUT is a hash of parts, shapes and fragments, so that a file of another number of workers, written by an attempt that
died or by a node that was cut off, is never taken for one of these.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.storage import Folder
from pipelines.generator.training.sharded_state import Fragment, Tensors

STATE = "state.json"
PREFIX = "images-"
MODEL = "model"  # the part with the weights
READ_BYTES = 64 << 20  # of one request
MAX_GAP = 1 << 16  # elements between two fragments in a file that are read with them, rather than in two requests
READERS = 16  # concurrent requests


@dataclass(frozen=True)
class Cursor:
    """Progress of a training run, and the fingerprint of its settings and inputs."""

    images: int
    steps: int
    fingerprint: str
    scaler: dict[str, Any] = field(default_factory=dict)  # state of fp16 loss scaling


@dataclass(frozen=True)
class Layout:
    """What the files of a checkpoint hold."""

    parts: list[str]
    shapes: dict[str, list[int]]  # of the parameters
    fragments: list[list[Fragment]]  # in the vectors of each worker; none of a worker that writes nothing

    @functools.cached_property
    def hash(self) -> str:
        """8 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.parts, self.shapes, self.fragments]).encode()).hexdigest()[:8]

    def file(self, part: str, rank: int) -> str:
        """Name of the file of one part of one worker."""
        return f"{part}-{rank:05d}-{self.hash}.safetensors"


class _Copy(NamedTuple):
    """Consecutive elements of one file and where they go."""

    rank: int
    source: int
    target: int
    numel: int


def directory_name(images: int) -> str:
    """Directory name of a checkpoint; names sort by images."""
    return f"{PREFIX}{images:012d}"


def images_seen(folder: Folder) -> int:
    """Images seen at a checkpoint, from its directory name."""
    return int(Path(folder.path).name.removeprefix(PREFIX))


def write_vectors(folder: Folder, layout: Layout, rank: int, vectors: Tensors) -> None:
    """Write one worker's vectors (N,), float32 in CPU memory, by part."""
    for part, vector in vectors.items():
        data = vector.numpy().data
        header = json.dumps({part: {"dtype": "F32", "shape": [vector.numel()], "data_offsets": [0, data.nbytes]}})
        header = header.ljust(-(-len(header) // 8) * 8)
        folder.write_chunks(layout.file(part, rank), [len(header).to_bytes(8, "little"), header.encode(), data])


def write_state(folder: Folder, layout: Layout, cursor: Cursor) -> None:
    folder.write(STATE, json.dumps({"cursor": vars(cursor), **vars(layout)}).encode())


def read_cursor(folder: Folder) -> Cursor:
    return Cursor(**json.loads(folder.read(STATE))["cursor"])


def check_fingerprint(folder: Folder, fingerprint: str) -> Cursor:
    """The cursor of a checkpoint.  Raises UserError if its fingerprint differs."""
    cursor = read_cursor(folder)
    if cursor.fingerprint != fingerprint:
        raise UserError(f"{folder.uri} is a checkpoint of other settings or inputs ({cursor.fingerprint}, "
                         f"not {fingerprint}); add changed=redo to start from scratch, or choose another name=")
    return cursor


def read_part(folder: Folder, part: str) -> Tensors:
    """One part of a checkpoint as full tensors by parameter name, in CPU memory."""
    layout, wanted, offset = read_layout(folder), [], 0
    for name, shape in layout.shapes.items():
        wanted.append(Fragment(name, 0, offset, math.prod(shape)))
        offset += wanted[-1].numel
    whole = torch.empty(offset)
    _read(folder, part, layout, wanted, whole)
    return {fragment.name: whole[fragment.offset : fragment.offset + fragment.numel].view(layout.shapes[fragment.name])
            for fragment in wanted}


def read_vector(folder: Folder, layout: Layout, part: str, wanted: Sequence[Fragment], numel: int) -> Tensor:
    """One part of a checkpoint as the vector (numel,) of a worker that holds the fragments `wanted`; 0 elsewhere."""
    vector = torch.zeros(numel)
    _read(folder, part, layout, wanted, vector)
    return vector


def read_layout(folder: Folder) -> Layout:
    state = json.loads(folder.read(STATE))
    return Layout(state["parts"], state["shapes"],
                  [[Fragment(*fragment) for fragment in held] for held in state["fragments"]])


def _read(folder: Folder, part: str, layout: Layout, wanted: Sequence[Fragment], into: Tensor) -> None:
    """Fill the elements of `wanted` in the vector `into`, from those files only that hold any."""
    requests = list(_requests(_copies(layout, wanted)))
    with ExitStack() as opened, ThreadPoolExecutor(READERS) as pool:
        def open_file(rank: int) -> tuple[Any, int]:
            path = f"{folder.path}/{layout.file(part, rank)}"
            file = opened.enter_context(folder.filesystem.open_input_file(path))
            return file, 8 + int.from_bytes(file.read_at(8, 0), "little")

        ranks = sorted({first.rank for first, *_ in requests})
        files = dict(zip(ranks, pool.map(open_file, ranks), strict=True))

        def read(copies: list[_Copy]) -> None:
            begin, end = copies[0].source, copies[-1].source + copies[-1].numel
            file, payload = files[copies[0].rank]
            data = torch.frombuffer(bytearray(file.read_at(4 * (end - begin), payload + 4 * begin)),
                                    dtype=torch.float32)
            for copy in copies:
                into[copy.target : copy.target + copy.numel] = data[copy.source - begin :][: copy.numel]

        list(pool.map(read, requests))


def _copies(layout: Layout, wanted: Sequence[Fragment]) -> list[_Copy]:
    """The copies that fill `wanted`, in the order of the files, none larger than a request."""
    by_name = {fragment.name: fragment for fragment in wanted}
    copies, most = [], READ_BYTES // 4
    for rank, held in enumerate(layout.fragments):
        for saved in held:
            if (own := by_name.get(saved.name)) is None:
                continue
            first, end = max(saved.start, own.start), min(saved.start + saved.numel, own.start + own.numel)
            for start in range(first, end, most):
                copies.append(_Copy(rank, saved.offset + start - saved.start, own.offset + start - own.start,
                                    min(most, end - start)))
    found = sum(copy.numel for copy in copies)
    assert found == sum(fragment.numel for fragment in wanted), f"{found} elements, each of them once"
    return sorted(copies)


def _requests(copies: Sequence[_Copy]) -> Iterator[list[_Copy]]:
    """Copies from neighbouring places of one file, read together."""
    group: list[_Copy] = []
    for copy in copies:
        if group and not (copy.rank == group[0].rank and copy.source + copy.numel - group[0].source <= READ_BYTES // 4
                          and copy.source - group[-1].source - group[-1].numel <= MAX_GAP):
            yield group
            group = []
        group.append(copy)
    if group:
        yield group


def list_checkpoints(checkpoints: Folder) -> list[Folder]:
    """All checkpoints below a folder, complete or not, in the order of their images."""
    return [checkpoints / name for name in checkpoints.names() if name.startswith(PREFIX)]


def latest_complete(checkpoints: Folder) -> Folder | None:
    """The last checkpoint below `checkpoints` that has all its files, or None."""
    return next((folder for folder in reversed(list_checkpoints(checkpoints)) if _is_complete(folder)), None)


def list_complete(checkpoints: Folder) -> list[Folder]:
    """The checkpoints below a folder that have all their files, in the order of their images."""
    return [folder for folder in list_checkpoints(checkpoints) if _is_complete(folder)]


def _is_complete(folder: Folder) -> bool:
    """Files are committed whole: one that is there is complete."""
    try:
        layout = read_layout(folder)
    except (FileNotFoundError, json.JSONDecodeError, KeyError):  # KeyError: of an earlier version
        return False
    expected = {layout.file(part, rank) for rank, held in enumerate(layout.fragments) if held for part in layout.parts}
    return expected <= set(folder.names())


def load_checked_weights(module: nn.Module, tensors: Tensors) -> None:
    """Load weights; raises RuntimeError if any is missing, unknown, of another shape or not finite."""
    expected = {name: value.shape for name, value in module.state_dict().items()}
    stored = {name: value.shape for name, value in tensors.items()}
    if stored != expected:
        differing = sorted(expected.items() ^ stored.items())
        raise RuntimeError(f"the checkpoint differs from the network in {differing[:3]}")
    non_finite = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if non_finite:
        raise RuntimeError(f"the checkpoint is not finite in {non_finite[:3]}")
    module.load_state_dict(tensors)
