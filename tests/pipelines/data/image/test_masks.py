import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.image.decode import decode
from pipelines.data.image.masks import label_map
from pipelines.data.image.picture import Refused
from pipelines.data.phantom import render
from pipelines.data.sources import find_source, jsrt
from pipelines.data.structures import STRUCTURES
from pipelines.graph.compose import load_settings


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def mask(name: str, path: str | None = None, rle: str | None = None) -> dict:
    return {"name": name, "path": path, "rle": rle}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
@pytest.mark.parametrize("scale", [1, 2])
def test_masks_follow_their_image_through_crop_and_resize(kind, scale):
    """The mask may have another resolution than its film, as those of SCR have."""
    film = render(0, 0, 128)
    wide = np.zeros((128, 200), np.uint8)
    wide[:, 30:158] = film.image
    lungs = np.zeros((128, 200), bool)
    lungs[:, 30:158] = film.lungs
    decoded = decode(encoded(wide), load_settings("data.size=64").data)
    file = encoded(np.kron(lungs, np.ones((scale, scale), bool)) * np.uint8(255), kind)
    found = label_map([mask("lungs", "m")], decoded, lambda path: file)
    assert set(np.unique(found)) == {0, STRUCTURES["lungs"]}
    expected = np.asarray(Image.fromarray(lungs * np.uint8(255)).resize((64, 64), box=decoded.box)) > 127
    union = ((found > 0) | expected).sum()
    assert ((found > 0) & expected).sum() / union > 0.97


def test_run_lengths_go_down_the_columns_each_from_the_end_of_the_last():
    picture = np.random.default_rng(0).integers(0, 255, (32, 48), np.uint8)
    truth = np.zeros((32, 48), bool)
    truth[4:10, 3:6] = True
    runs, last = [], 0
    column_wise = np.flatnonzero(np.diff(np.concatenate([[0], truth.T.ravel(), [0]])))
    for start, stop in column_wise.reshape(-1, 2):
        runs += [start - last, stop - start]
        last = stop
    decoded = decode(encoded(picture), load_settings("data.size=32", "data.fit=pad", "data.crop_border=false").data)
    found = label_map([mask("pneumothorax", rle=" ".join(map(str, runs)))], decoded, lambda path: b"")
    expected = np.zeros((48, 48), np.uint8)
    expected[8:40] = truth * np.uint8(255)
    shrunk = np.asarray(Image.fromarray(expected).resize((32, 32), Image.Resampling.BICUBIC)) > 127
    assert (found.astype(bool) == shrunk).all()
    assert found.any()


@pytest.mark.parametrize("broken", [mask("polyp", "there"), mask("polyp", rle="5 x"), mask("polyp", rle="5 10 3"),
                                    mask("polyp", rle="1 99999")])
def test_a_broken_mask_refuses_its_image(broken):
    decoded = decode(encoded(np.eye(40, dtype=np.uint8) * 200), load_settings("data.size=32").data)
    with pytest.raises(Refused) as refused:
        label_map([broken], decoded, lambda path: b"no image")
    assert refused.value.reason == "bad_mask"


def test_a_mask_of_another_shape_is_refused_and_not_stretched():
    decoded = decode(encoded(np.eye(40, dtype=np.uint8) * 200), load_settings("data.size=32").data)
    with pytest.raises(Refused, match="24x40 pixels, the image 40x40") as refused:
        label_map([mask("polyp", "there")], decoded, lambda path: encoded(np.eye(40, 24, dtype=np.uint8) * 255))
    assert refused.value.reason == "bad_mask"


def test_phantom_masks_are_the_exact_ones():
    settings = load_settings("data.size=64").data
    loaded = find_source("phantom").load({"uri": "phantom://3/7"}, settings)
    film = render(3, 7, 64)
    sides = [loaded.mask == STRUCTURES[name] for name in ("left_lung", "right_lung")]
    assert ((sides[0] | sides[1]) == (film.lungs & ~film.heart)).all()
    assert np.argwhere(sides[0])[:, 1].min() > np.argwhere(sides[1])[:, 1].max(), "the patient's left is on the right"
    assert ((loaded.mask == STRUCTURES["heart"]) == film.heart).all()
    assert set(loaded.structures) == {"left_lung", "right_lung", "heart"}


def test_a_structure_that_is_not_there_has_an_empty_mask():
    decoded = decode(encoded(np.eye(40, dtype=np.uint8) * 200), load_settings("data.size=32").data)
    assert not label_map([mask("pneumothorax", rle="")], decoded, lambda path: b"").any()


def test_jsrt_films_of_the_owner_are_read_as_they_are_shown():
    """2048 x 2048 big-endian values, bright where the film is dark."""
    scene = np.kron(render(0, 1, 128).image.astype(np.uint16), np.ones((16, 16), np.uint16))
    raw = (4095 - scene * 16).astype(">u2").tobytes()
    decoded = decode(raw, load_settings("data.size=64", "data.crop_border=false").data, read=jsrt.read_film)
    assert (decoded.width, decoded.height, decoded.mapping) == (2048, 2048, "percentile")
    shown = np.asarray(Image.fromarray(render(0, 1, 128).image).resize((64, 64), Image.Resampling.BICUBIC), float)
    assert np.corrcoef(shown.ravel(), decoded.image.ravel())[0, 1] > 0.98
