"""Pictures of every kind come out as upright RGB, broken ones fail with a reason."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from bridgetower.processor import (
    Processor,
    ProcessorConfig,
    check_length,
    images,
    media_type,
    open_image,
    open_reduced,
)

KINDS = [*images._FORMATS]

WHITE = (255, 255, 255)


def _bytes(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _array(source, **options):
    image = open_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_every_way_of_giving_a_picture_is_equal(photo, tmp_path):
    picture = photo(20, 31)
    pixels = np.array(picture)
    path = tmp_path / "picture.png"
    picture.save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for source in (
        str(path),
        path,
        path.read_bytes(),
        picture,
        pixels,
        tensor,
        pixels[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(_array(source), pixels)
    open_image(picture).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.array(picture), pixels), "the source stays as it is"


def test_grey_and_transparent_arrays_and_tensors():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    for pixels in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert np.array_equal(_array(pixels), np.repeat(grey[..., None], 3, axis=2))
    clear = torch.zeros(4, 2, 2, dtype=torch.uint8)
    assert (_array(clear, background=WHITE) == 255).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 5, 3)), "float64"),
        (np.zeros((4, 5, 3), dtype=np.uint16), "uint16"),
        (np.zeros((2, 4, 5), dtype=np.uint8), r"\[2, 4, 5\]"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"\[0, 5, 3\]"),
        (np.zeros(5, dtype=np.uint8), r"\[5\]"),
        (torch.zeros(3, 4, 5), "float32"),
        (torch.zeros(2, 4, 5, dtype=torch.uint8), r"\[2, 4, 5\]"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), r"\[3, 0, 5\]"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (3, "given as int"),
        (None, "given as NoneType"),
        (b"", "empty"),
        (b"<html>not found</html>", "cannot be read as an image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "cannot be read as an image",
        ),
    ],
)
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)


def test_open_files_are_read_from_their_beginning_where_they_have_one(photo):
    content = _bytes(photo(9, 6), "PNG")
    file = io.BytesIO(content)
    file.seek(7)
    assert np.array_equal(_array(file), _array(content))
    assert np.array_equal(_array(file), _array(content))
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(content)
    with os.fdopen(reading, "rb") as stream:
        assert np.array_equal(_array(stream), _array(content))
    assert np.array_equal(_array(SimpleNamespace(read=lambda most: content)), _array(content))


def test_a_whole_file_of_another_kind_is_unsupported_and_not_damaged():
    tiff, jpeg = (_bytes(Image.new("L", (8, 8)), kind) for kind in ("TIFF", "JPEG"))
    depth = jpeg.index(b"\xff\xc0") + 4
    for content, message in (
        (
            tiff.replace(struct.pack("<HHIH", 258, 3, 1, 8), struct.pack("<HHIH", 258, 3, 1, 24)),
            "tiff: unknown pixel",
        ),
        (jpeg[:depth] + b"\x0c" + jpeg[depth + 1 :], "jpeg: cannot handle 12-bit"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_image(content)
        assert "damaged" not in str(caught.value)


def _icon():
    """One opaque red, one half transparent blue, one invisible pixel with black and one with green behind."""
    icon = Image.new("RGBA", (4, 1))
    for column, colour in enumerate(
        [(255, 0, 0, 255), (0, 0, 255, 128), (0, 0, 0, 0), (0, 255, 0, 0)]
    ):
        icon.putpixel((column, 0), colour)
    return icon


def test_alpha_is_dropped_as_in_the_originals_unless_a_background_is_given():
    icon = _bytes(_icon(), "PNG")
    dropped = [(255, 0, 0), (0, 0, 255), (0, 0, 0), (0, 255, 0)]
    assert np.array_equal(_array(icon)[0], dropped)
    assert np.array_equal(_array(icon), np.asarray(_icon().convert("RGB")))
    filled = [(255, 0, 0), (127, 127, 255), WHITE, WHITE]
    assert np.array_equal(_array(icon, background=WHITE)[0], filled)
    assert np.array_equal(_array(icon, background=(0, 0, 40))[0, 2:], [(0, 0, 40)] * 2)


def test_the_processor_applies_its_background():
    for background, expected in ((None, 0), (WHITE, 255)):
        config = ProcessorConfig(
            profile="official-finetune", image_size=1, max_length=4, background=background
        )
        assert (
            Processor(config, None).resize(_icon().crop((2, 0, 3, 1))).flatten().tolist()
            == [expected] * 3
        )


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0])])
def test_palettes(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 7, 8, 9])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _array(_bytes(image, "PNG", **options))[0].tolist() == [[200, 10, 20], [7, 8, 9]]
        second = [7, 8, 9] if transparency is None else [255, 255, 255]
        assert _array(_bytes(image, "PNG", **options), background=WHITE)[0].tolist() == [
            [200, 10, 20],
            second,
        ]


def test_other_modes(photo):
    for mode, kind in (("1", "PNG"), ("CMYK", "TIFF")):
        picture = photo(8, 9).convert(mode)
        assert np.array_equal(_array(_bytes(picture, kind)), np.asarray(picture.convert("RGB")))
    grey = _bytes(Image.fromarray(np.array([[[90, 255], [30, 0]]], dtype=np.uint8), "LA"), "PNG")
    assert _array(grey)[0, :, 0].tolist() == [90, 30]
    multiplied = Image.new("La", (1, 1), (50, 128))  # of which Pillow makes only LA
    for background, expected in ((None, 99), (WHITE, 177)):
        assert (
            np.asarray(open_image(multiplied, background=background))[0, 0].tolist()
            == [expected] * 3
        )
    assert _array(grey, background=WHITE)[0, :, 0].tolist() == [90, 255]


GREY_16 = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
GREY_16_AS_8 = [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bit_is_scaled(kind):
    image = Image.fromarray(GREY_16)
    assert _array(_bytes(image, kind))[0, :, 1].tolist() == GREY_16_AS_8
    assert np.asarray(image.convert("RGB"))[0, 3:, 0].tolist() == [255, 255, 255], "PIL alone clips"


def test_other_16_bit_modes():
    big_endian = Image.frombytes("I;16B", (6, 1), GREY_16.byteswap().tobytes())
    assert _array(big_endian)[0, :, 1].tolist() == GREY_16_AS_8
    assert _array(Image.fromarray(GREY_16.astype(np.int32)))[0, :, 1].tolist() == GREY_16_AS_8
    with pytest.raises(ValueError, match="values from -5 to 70000"):
        open_image(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32)))
    with pytest.raises(ValueError, match="mode F"):
        open_image(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


def test_transparent_value_of_16_bit_grey():
    image = Image.fromarray(GREY_16)
    image.info["transparency"] = 257
    assert _array(image)[0, :, 0].tolist() == GREY_16_AS_8
    assert _array(image, background=WHITE)[0, :, 0].tolist() == [0, 0, 1, 255, 128, 255]


@pytest.mark.parametrize(("side", "width"), [(None, 400), (121, 400), (120, 200), (9, 50)])
def test_a_jpeg_is_decoded_at_the_least_scale_that_is_large_enough(photo, side, width):
    content = _bytes(photo(240, 400), "JPEG")
    image, size = open_reduced(content, side)
    assert image.size == (width, width * 3 // 5)
    assert size == (400, 240)
    if side in (None, 121):
        assert np.array_equal(np.asarray(image), _array(content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_picture_tells_how_large_it_was(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, size = open_reduced(_bytes(photo(241, 242), "JPEG", exif=exif), 30)
    assert size == ((241, 242) if orientation > 4 else (242, 241))
    assert image.size == (31, 31)


def test_other_files_and_objects_are_opened_in_full(photo):
    picture = photo(240, 400)
    for source in (_bytes(picture, "PNG"), picture, np.array(picture)):
        image, size = open_reduced(source, 9)
        assert image.size == size == (400, 240)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_means_upright(photo):
    content = _bytes(photo(8, 9), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert np.array_equal(_array(content), np.asarray(Image.open(io.BytesIO(content))))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    content = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (_array(content) == (255, 0, 0)).all()
    later = Image.open(io.BytesIO(content))
    later.seek(1)
    assert (_array(later) == (0, 0, 255)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_avif_files_are_what_pillow_makes_of_them(mode, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "what it shows"
    content = _bytes(photo(31, 52).convert(mode), "AVIF", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert expected.size == (31, 52)
    assert np.array_equal(_array(content), np.asarray(expected))


class TestHeic:
    @pytest.fixture(autouse=True)
    def installed(self):
        self.heif = pytest.importorskip("pillow_heif")

    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    @pytest.mark.parametrize("side", [None, 9])
    def test_files_are_what_the_library_makes_of_them(self, mode, side, photo):
        content = _bytes(photo(256, 322).convert(mode), "HEIF", quality=80)
        decoded = self.heif.read_heif(content).to_pillow()
        image, size = open_reduced(content, side)
        assert size == image.size == (322, 256)
        assert np.array_equal(np.asarray(image), np.asarray(decoded.convert("RGB")))

    def test_it_is_upright(self, photo):
        upright = photo(64, 128)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        turned.info["exif"] = exif.tobytes()
        content = _bytes(turned, "HEIF", quality=95)
        pixels = _array(content).astype(int)
        assert pixels.shape == (64, 128, 3)
        assert (
            abs(pixels - np.asarray(upright)).mean()
            < abs(pixels - np.asarray(upright)[::-1]).mean() / 2
        )

    def test_the_number_of_pixels_is_checked_before_decoding(self, photo):
        content = _bytes(photo(64, 96), "HEIF")
        with pytest.raises(ValueError, match="96x64 = 6144 pixels, the limit is 6143"):
            open_image(content, max_pixels=6143)
        size = struct.pack(">II", 96, 64)
        assert content.count(size) == 1
        # a picture that is larger than the file says
        with pytest.raises(ValueError, match="damaged"):
            open_image(content.replace(size, struct.pack(">II", 8, 8)))

    def test_a_thumbnail_is_not_taken_for_the_picture(self, photo):
        content = _bytes(photo(256, 322), "HEIF", thumbnails=[64])
        assert Image.open(io.BytesIO(content)).info["thumbnails"]
        image, _ = open_reduced(content, 9)
        assert image.size == (322, 256)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        *(
            (
                b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic",
                r"TIFF, WEBP; it is HEIC: pip install '\.\[heic\]'$",
            )
            for brand in (b"heic", b"heix", b"hevc", b"mif1")
        ),
        (b"\xff\x0a" + bytes(20), "; it is JPEG XL: save it as PNG or JPEG$"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "; it is JPEG XL: save it as PNG or JPEG$"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "TIFF, WEBP$"),
    ],
)
def test_formats_that_are_not_read_come_with_advice(content, advice, monkeypatch):
    monkeypatch.setattr(
        images, "_FORMATS", tuple(name for name in images._FORMATS if name != "HEIF")
    )
    with pytest.raises(ValueError, match=r"cannot be read as an image; supported are .*" + advice):
        open_image(content)


@pytest.mark.parametrize("orientation", range(9))
def test_orientation_is_what_pillow_makes_of_it(orientation, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("JPEG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = _bytes(photo(20, 31), kind, exif=exif, **options)
        assert np.array_equal(
            _array(content), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_in_xmp(kind, photo):
    text = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    )
    options = {"xmp": text} if kind == "WEBP" else {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", text.decode())
    content = _bytes(photo(20, 31), kind, **options)
    stored = Image.open(io.BytesIO(content)).convert("RGB")
    if kind == "JPEG":
        segment = b"http://ns.adobe.com/xap/1.0/\0" + text
        content = (
            content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment + content[2:]
        )
    assert np.array_equal(_array(content), np.asarray(stored.transpose(Image.Transpose.ROTATE_270)))


def test_two_picture_jpegs_of_phones_and_cameras(photo):
    content = _bytes(photo(8, 9), "MPO", save_all=True, append_images=[photo(8, 10)])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.array_equal(_array(content), np.asarray(Image.open(io.BytesIO(content))))


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"no image file at .*nothing\.jpg"):
        open_image(tmp_path / "nothing.jpg")
    for source, message in (
        (tmp_path, "not a file"),
        (tmp_path / "empty.jpg", r"empty\.jpg is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(source)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_file_is_an_error_and_never_half_a_picture(kind, photo):
    content = _bytes(photo(40, 56), kind)
    whole = _array(content)
    ends = range(1, len(content), max(1, len(content) // 60))
    failures = 0
    for end in ends:
        try:
            assert np.array_equal(_array(content[:end]), whole)
        except ValueError:
            failures += 1
    assert failures > 0.8 * len(ends)
    with pytest.raises(ValueError, match="damaged"):
        open_image(content[: len(content) * 2 // 3])


def test_cut_off_pictures_that_pil_would_fill(photo, monkeypatch):
    content = _bytes(photo(40, 56), "JPEG")[:-200]
    with pytest.raises(ValueError, match="the PIL image is cut off"):
        open_image(Image.open(io.BytesIO(content)))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="would end in grey"):
        open_image(content)


def test_altered_files_raise_nothing_but_value_errors(photo):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        content = np.frombuffer(_bytes(photo(24, 24), kind), dtype=np.uint8)
        for _ in range(60):
            altered = content.copy()
            altered[rng.integers(0, len(content), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(ValueError):
                _array(altered.tobytes(), max_pixels=1_000_000)


@pytest.mark.parametrize("kind", KINDS)
def test_media_types(kind):
    content = _bytes(Image.new("RGB", (3, 2)), kind)
    assert media_type(content) == Image.MIME[kind] == f"image/{kind.lower()}"
    with pytest.raises(ValueError, match=r"the file is no image; expected one of .*BMP, GIF"):
        media_type(b"<svg>" + content)


def _png_header(width, height):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_oversized_pictures_are_refused_before_they_are_decoded():
    with pytest.raises(ValueError, match="10000x10000 = 100000000 pixels, the limit is 64000000"):
        open_image(_png_header(10_000, 10_000))
    with pytest.raises(
        ValueError, match=r"has too many pixels \(.*900000000 pixels.*\); shrink it first"
    ):
        open_image(_png_header(30_000, 30_000))


def test_a_file_may_have_four_channels_of_16_bit_uncompressed():
    longest = 8 * 1000 + 2**25
    check_length("a.tiff", longest, 1000)
    with pytest.raises(
        ValueError, match=f"a.tiff has {longest + 1} bytes; expected at most {longest}"
    ):
        check_length("a.tiff", longest + 1, 1000)


def test_a_row_that_is_longer_than_a_strip():
    assert np.array_equal(
        _array(_bytes(Image.new("L", (2**18 + 1, 2), 7), "PNG")), np.full((2, 2**18 + 1, 3), 7)
    )


def test_the_pixel_limit_can_be_moved(photo):
    content = _bytes(photo(20, 30), "JPEG")
    assert open_image(content, max_pixels=600).size == (30, 20)
    with pytest.raises(ValueError, match="30x20 = 600 pixels, the limit is 599"):
        open_reduced(content, 9, max_pixels=599)
