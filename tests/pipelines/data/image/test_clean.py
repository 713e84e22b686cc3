import io

import numpy as np
import pytest
from imagehash import phash
from PIL import Image, ImageDraw

from pipelines.data.image.clean import erase_text, looks_frontal, perceptual_hash, picture_box
from pipelines.data.image.decode import decode
from pipelines.data.image.picture import GrayImage, Refused
from pipelines.data.phantom import render
from pipelines.graph.compose import load_settings

SIDE = 160


def settings(*overrides):
    return load_settings("data.size=64", *overrides).data


def picture(pixels: np.ndarray) -> GrayImage:
    return GrayImage(Image.fromarray(pixels), pixels.shape[1], pixels.shape[0], "none")


def thorax(index: int = 0, size: int = SIDE) -> np.ndarray:
    return render(3, index, size).image


def framed(pixels: np.ndarray, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 4, (pixels.shape[0] + top + bottom, pixels.shape[1] + left + right))
    frame = np.clip(level + noise, 0, 255).astype(np.uint8)
    frame[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return frame


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("level", [0, 120, 252])
@pytest.mark.parametrize("widths", [(20, 0, 0, 0), (30, 10, 12, 25), (0, 40, 0, 0)])
def test_a_uniform_frame_is_cut_off(level, widths):
    rng = np.random.default_rng(1)
    inner = rng.integers(0, 256, (SIDE, SIDE), np.uint8)  # textured up to its edges
    left, top, *_ = widths
    box = picture_box(picture(framed(inner, level, *widths)), True, "crop")
    assert np.abs(np.subtract(box, (left, top, left + SIDE, top + SIDE))).max() <= 2
    whole = picture_box(picture(framed(inner, level, *widths)), False, "pad")
    assert whole[2] - whole[0] == max(framed(inner, level, *widths).shape)


def test_much_uniform_lung_is_no_border():
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[:, SIDE // 2 :] = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE // 2))
    assert picture_box(picture(half), True, "crop") == (0, 0, SIDE, SIDE)


def test_padding_keeps_all_of_the_picture_and_its_aspect():
    tall = np.full((120, 60), 200, np.uint8)
    tall[40:80, 20:40] = 90
    decoded = decode(png(tall), settings("data.fit=pad", "data.crop_border=false"))
    assert decoded.box == (-30, 0, 90, 120)
    assert decoded.image[:, :14].max() == 0
    assert decoded.image[:, 18:46].min() > 70
    centre = decode(png(tall), settings("data.crop_border=false"))
    assert centre.box == (0, 30, 60, 90)
    assert centre.image.min() > 70, "nothing of black"


def test_what_was_done_can_be_traced_back_to_the_original():
    original = framed(thorax(), 0, 30, 10, 10, 30)
    decoded = decode(png(original), settings())
    again = Image.fromarray(original).resize((64, 64), Image.Resampling.BICUBIC, box=decoded.box)
    assert np.abs(np.asarray(again, int) - decoded.image).max() <= 24
    assert np.abs(np.asarray(again, int) - decoded.image).mean() < 2


def test_a_jpeg_with_a_wide_border_is_not_made_from_too_few_pixels():
    buffer = io.BytesIO()
    Image.fromarray(framed(thorax(0, 128), 0, 80, 80, 80, 80)).save(buffer, "JPEG", quality=95)
    decoded = decode(buffer.getvalue(), settings("data.size=64"))
    direct = np.asarray(Image.fromarray(thorax(0, 128)).resize((64, 64), Image.Resampling.BICUBIC), int)
    assert np.abs(decoded.image - direct).mean() < 6


def test_views_without_a_name_are_judged_by_the_picture():
    assert all(looks_frontal(picture(thorax(index))) for index in range(20))
    assert not looks_frontal(picture(thorax()[:, : SIDE // 3]))
    ramp = np.tile(np.linspace(0, 255, SIDE, dtype=np.uint8), (SIDE, 1))
    assert not looks_frontal(picture(ramp))
    with pytest.raises(Refused) as refused:
        decode(png(ramp), settings("data.frontal=true"))
    assert refused.value.reason == "not_frontal"
    assert decode(png(ramp), settings("data.frontal=true"), view="PA").image.std() > 0
    assert decode(png(ramp), settings()).image.std() > 0


def test_real_frontal_films_look_frontal(real_data):
    films = sorted(real_data("jsrt").glob("images/*"))[:60]
    seen = [looks_frontal(GrayImage(image := Image.open(film).convert("L"), *image.size, "none")) for film in films]
    assert np.mean(seen) >= 0.98


def test_letters_on_dark_ground_are_erased_and_anatomy_stays():
    plain = Image.fromarray(thorax(0, 256))
    marked = plain.copy()
    ImageDraw.Draw(marked).rectangle((8, 8, 40, 40), fill=20)
    clear = marked.copy()
    ImageDraw.Draw(marked).text((14, 14), "R", fill=255, font_size=18)
    erased, count = erase_text(marked)
    assert count >= 1
    assert np.abs(np.asarray(erased, int)[8:40, 8:40] - np.asarray(clear, int)[8:40, 8:40]).max() < 40
    assert (np.asarray(erased)[64:192, 64:192] == np.asarray(marked)[64:192, 64:192]).all()
    assert decode(png(np.asarray(marked)), settings("data.erase_text=true")).erased == count


def bits_apart(one: np.ndarray, other: np.ndarray) -> int:
    a, b = (np.frombuffer(perceptual_hash(Image.fromarray(image)), np.uint8) for image in (one, other))
    return int(np.bitwise_count(a ^ b).sum())


def test_the_perceptual_hash_is_that_of_imagehash():
    films = [Image.fromarray(thorax(index, 128)) for index in range(8)]
    small = [film.resize((64, 64), Image.Resampling.HAMMING) for film in films]
    assert [perceptual_hash(film) for film in films] == [np.packbits(phash(s, 16).hash).tobytes() for s in small]


def test_copies_of_a_film_have_nearly_one_hash_and_other_films_another():
    film = thorax(0, 128)
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "JPEG", quality=60)
    copies = {
        "jpeg": np.asarray(Image.open(buffer)),
        "smaller": np.asarray(Image.fromarray(film).resize((96, 96), Image.Resampling.BICUBIC)),
        "contrast": np.clip(film * 0.8 + 20, 0, 255).astype(np.uint8),
    }
    assert {name: bits_apart(film, copy) <= 10 for name, copy in copies.items()} == dict.fromkeys(copies, True)
    assert min(bits_apart(film, thorax(index, 128)) for index in range(1, 20)) > 16
