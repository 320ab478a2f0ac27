"""Every kind of picture file becomes the same RGB picture or one clear error."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from mixmodal.tokenization.preprocessing import (
    PictureError,
    open_picture,
    resize_and_crop,
    resize_and_pad,
    to_encoder_range,
    to_pictures,
    to_tensor,
)

RED, GREEN = (255, 0, 0), (0, 255, 0)


def encode(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def two_halves(mode="RGB"):
    """Left half red, right half green."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(GREEN, (4, 0, 8, 4))
    return picture.convert(mode)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("mode", "format"), [("RGB", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "WEBP")])
def test_lossless_files_give_their_colours(mode, format):
    options = {"lossless": True} if format == "WEBP" else {}
    picture = open_picture(encode(two_halves(mode), format, **options), "a")
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == RED
    assert picture.getpixel((7, 3)) == GREEN


def test_cmyk_becomes_rgb():
    picture = open_picture(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), "a")
    assert picture.mode == "RGB"
    assert np.abs(np.array(picture)[8, 8].astype(int) - RED).max() <= 2  # measured: 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_turns_white(mode):
    picture = Image.new(mode, (2, 1), (0,) * len(mode))
    picture.putpixel((1, 0), (0,) * (len(mode) - 1) + (255,))
    opened = open_picture(encode(picture), "a")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_black_turns_grey():
    value = open_picture(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128))), "a").getpixel((0, 0))
    assert value == (127, 127, 127)


def test_transparent_palette_entry_turns_white():
    data = encode(two_halves("P"), transparency=two_halves("P").getpixel((0, 0)))
    opened = open_picture(data, "a")
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((7, 0)) == GREEN


def test_palette_with_bytes_transparency_turns_white():
    data = encode(two_halves("P"), transparency=bytes([0] * 256))
    assert open_picture(data, "a").getcolors() == [(32, (255, 255, 255))]


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    opened = open_picture(encode(Image.fromarray(values)), "a")
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_integer_picture_outside_sixteen_bits_is_refused():
    data = encode(Image.fromarray(np.array([[70_000]], dtype=np.int32)), "TIFF")
    with pytest.raises(PictureError, match=r"wide: values of mode I lie outside 0 \.\. 65535"):
        open_picture(data, "wide")


def test_floating_point_picture_is_refused():
    data = encode(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(PictureError, match="hdr: floating-point"):
        open_picture(data, "hdr")


def test_pair_of_a_stereo_camera_gives_its_first_picture():
    second = Image.new("RGB", (8, 4))
    data = encode(two_halves(), "MPO", save_all=True, append_images=[second], quality=100)
    assert np.abs(np.array(open_picture(data, "a"))[0, 0].astype(int) - RED).max() <= 2  # measured: 1


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), GREEN)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(data, "a").getpixel((0, 0)) == RED


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    opened = open_picture(encode(two_halves(), exif=exif), "a")
    assert opened.size == (4, 8)
    assert opened.getpixel((0, 0)) == RED
    assert opened.getpixel((0, 7)) == GREEN


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_file_is_refused_by_name(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(PictureError, match="shelf/7"):
        open_picture(data[: len(data) // 2], "shelf/7")


@pytest.mark.parametrize("data", [b"", b"<html>404</html>"])
def test_what_is_no_picture_is_told_what_is_one(data):
    with pytest.raises(PictureError, match=r"^page: not a picture that can be read \(PNG, JPEG, .* TIFF are\)$"):
        open_picture(data, "page")


def test_corrupt_bytes_never_give_another_error():
    """Files broken at one random place decode or raise PictureError, nothing else."""
    rng = np.random.default_rng(1)
    refused = 0
    for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        data = np.frombuffer(encode(two_halves(), format), dtype=np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[rng.integers(len(data), size=4)] = rng.integers(256, size=4)
            try:
                open_picture(broken.tobytes(), "a")
            except PictureError:
                refused += 1
    assert refused > 50


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused_by_name(data):
    with pytest.raises(PictureError, match="shelf/7: not a picture"):
        open_picture(data, "shelf/7")


@pytest.mark.parametrize("format", ["EPS", "PPM", "TGA"])
def test_formats_of_other_decoders_are_refused_before_they_start(format, monkeypatch):
    """EPS, for one, would start Ghostscript on what a stranger wrote."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    with pytest.raises(PictureError, match="shelf/7: not a picture"):
        open_picture(encode(two_halves(), format), "shelf/7")
    assert not started


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PictureError, match=r"k: there is no file .*absent\.png"):
        open_picture(tmp_path / "absent.png", "k")


@pytest.mark.parametrize("size", [(16_000, 10_500), (100_000, 100_000)])
def test_huge_picture_is_refused_by_its_header(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match=r"bomb: .*pixels"):
        open_picture(png_header(*size), "bomb")


def test_pixel_cap_is_inclusive():
    assert open_picture(encode(two_halves()), "a", max_pixels=32).size == (8, 4)
    with pytest.raises(PictureError, match="8x4 pixels are more than the 31"):
        open_picture(encode(two_halves()), "a", max_pixels=31)


def test_path_and_pil_picture_give_what_bytes_give(tmp_path):
    data = encode(two_halves())
    (tmp_path / "a.png").write_bytes(data)
    expected = open_picture(data, "a").tobytes()
    assert open_picture(tmp_path / "a.png", "a").tobytes() == expected
    assert open_picture(two_halves("P"), "a").tobytes() == expected


@pytest.mark.parametrize("size", [(8, 4), (4, 8), (33, 17), (5, 5), (1, 300), (300, 1), (7, 640)])
def test_every_shape_becomes_the_square(size):
    assert resize_and_crop(Image.new("RGB", size), 16).size == (16, 16)


def test_centre_is_kept():
    picture = Image.new("RGB", (48, 16), RED)
    picture.paste(GREEN, (16, 0, 32, 16))
    assert resize_and_crop(picture, 16).getcolors() == [(256, GREEN)]


def test_preprocessing_is_that_of_chameleon():
    """Short side by Lanczos with `round`, then the centre with offsets rounded down."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8))
    scale = 16 / 37
    resized = noise.resize((round(61 * scale), 16), Image.Resampling.LANCZOS)
    left = (resized.width - 16) // 2
    assert resize_and_crop(noise, 16).tobytes() == resized.crop((left, 0, left + 16, 16)).tobytes()


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (100, 75), (75, 101), (33, 33), (16, 16), (9, 5), (90, 17)])
def test_preprocessing_by_the_name_of_transformers_is_that_of_its_processor(size):
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    processor = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = torch.from_numpy(processor(noise)["pixel_values"][0]).float()
    found = to_encoder_range(to_tensor(resize_and_crop(noise, 16, "transformers")), "transformers")
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)  # measured: 1.2e-7; a grey level is 7.8e-3


def test_the_two_names_resize_and_scale_differently():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 62, 3), dtype=np.uint8))
    assert resize_and_crop(noise, 16, "transformers").tobytes() != resize_and_crop(noise, 16).tobytes()
    white = torch.ones(1, 3, 2, 2)
    assert to_encoder_range(white, "meta") is white
    assert to_encoder_range(white, "transformers").max() == pytest.approx(255 * 0.0078 - 1)


def test_picture_of_the_right_size_is_untouched():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert resize_and_crop(noise, 16).tobytes() == noise.tobytes()


def test_long_strip_does_not_blow_up(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *o: sizes.append(size) or resize(self, size, *o))
    resize_and_crop(Image.new("RGB", (100_000, 1)), 32)
    assert sizes == [(256, 32)]


def test_tensors_lie_in_minus_one_to_one_and_come_back():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([values, values.T, 255 - values], axis=-1))
    image = to_tensor(picture)
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (-1, 1)
    assert image[1, 0, 3] == values.T[0, 3] / 127.5 - 1
    assert to_pictures(image[None])[0].tobytes() == picture.tobytes()


def test_values_outside_the_range_are_clamped():
    pixels = to_pictures(torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1))[0].getpixel((0, 0))
    assert pixels == (0, 255, 128)


@pytest.mark.parametrize("preprocess", ["meta", "transformers"])
@pytest.mark.parametrize(
    ("size", "target", "inside"),
    [
        ((32, 16), 16, (16, 8)),
        ((16, 48), 16, (5, 16)),
        ((7, 7), 16, (16, 16)),
        ((64, 64), (32, 16), (16, 16)),
        ((100_000, 1), 32, (32, 1)),
    ],
)
def test_padding_keeps_the_whole_picture_in_the_middle(size, target, inside, preprocess):
    padded = resize_and_pad(Image.new("RGB", size, RED), target, preprocess)
    assert padded.size == ((target, target) if isinstance(target, int) else target)
    is_red = np.asarray(padded)[:, :, 1] < 128
    assert is_red.sum() == inside[0] * inside[1]
    rows, columns = np.flatnonzero(is_red.any(1)), np.flatnonzero(is_red.any(0))
    assert rows[0] == (padded.height - inside[1]) // 2
    assert columns[0] == (padded.width - inside[0]) // 2


def test_padding_leaves_a_picture_of_the_size_as_it_is():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert resize_and_pad(noise, 16).tobytes() == noise.tobytes()
