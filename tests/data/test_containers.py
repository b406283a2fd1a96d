"""Sound pixels in unusual files come out as they are, and what a header says too much of is refused before it is decoded."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from odd_images import chunk, encode, exif, ico, photo, png, samsung, scans, segment, tiff, with_chunks, xmp
from PIL import Image, ImageOps, features

from jaxvl.data import decode, formats, pixels
from jaxvl.data.avif import coded
from jaxvl.data.decode import DecodeOptions, Undecodable, decode_eval, decode_full, probe
from jaxvl.data.formats import UNREAD
from jaxvl.data.reasons import REASONS

OPTIONS = DecodeOptions(size=32)


def refused(data: bytes) -> str:
    with pytest.raises(Undecodable) as error:
        decode_eval(data, OPTIONS)
    return error.value.reason


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * np.log10(255) - 10 * np.log10(max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def turned(orientation: int) -> dict[str, bytes]:
    """One picture with its orientation at every place where files say it."""
    jpg, plain, lossless = encode(photo()), encode(photo(), "PNG"), encode(photo(), "WEBP", lossless=True)
    block, packet = b"Exif\0\0" + exif(orientation), b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation)
    marks = segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xda\xff\xd9\xff\xd8" * 9)  # what looks like scans and ends, inside a segment
    profile = b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"
    big = io.BytesIO()
    photo().save(big, "TIFF", big_tiff=True, tiffinfo={0x0112: orientation})
    return {
        "jpeg": jpg[:2] + segment(0xE1, block) + jpg[2:],
        "jpeg behind a profile": jpg[:2] + marks + segment(0xFE, b"\xff\xda") + segment(0xE1, block) + jpg[2:],
        "jpeg behind XMP of its own": jpg[:2] + segment(0xE1, packet.replace(b"Orientation", b"Nothing")) + segment(0xE1, block) + jpg[2:],
        "jpeg in XMP": jpg[:2] + segment(0xE1, packet) + jpg[2:],
        "jpeg of two pictures": encode(photo(), "MPO", save_all=True, append_images=[photo(seed=1)], exif=block),
        "png": with_chunks(plain, chunk(b"eXIf", exif(orientation))),
        "png behind": with_chunks(plain, chunk(b"eXIf", exif(orientation)), behind=True),
        "png in text": with_chunks(plain, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        "png in XMP": with_chunks(plain, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(orientation)))),
        "webp": encode(photo(), "WEBP", lossless=True, exif=exif(orientation)),
        "webp in XMP": encode(photo(), "WEBP", lossless=True, xmp=xmp(orientation)),
        "tiff": encode(photo(), "TIFF", tiffinfo={0x0112: orientation}),
        "tiff in XMP": encode(photo(), "TIFF", tiffinfo={700: xmp(orientation)}),
        "tiff deflated": encode(photo(), "TIFF", compression="tiff_deflate", tiffinfo={0x0112: orientation}),
        "bigtiff": big.getvalue(),
        "avif": encode(photo(), "AVIF", quality=95, exif=exif(orientation)) if features.check("avif") else lossless,
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_wherever_a_file_says_it(orientation):
    for name, data in turned(orientation).items():
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        got = decode_full(data, OPTIONS)
        assert probe(data, OPTIONS) == want.size == got.shape[1::-1], name
        assert psnr(got, np.asarray(want)) > (40 if name.startswith("jpeg") else 90), name


@pytest.mark.parametrize("text", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0+" + b"\xff" * 60])
def test_metadata_that_cannot_be_read_turn_nothing(text):
    data = encode(photo())
    assert probe(data[:2] + segment(0xE1, text) + data[2:], OPTIONS) == (96, 64)


def test_metadata_of_any_size_and_state_leave_the_pixels_alone():
    data = encode(photo(), "PNG")
    long = zlib.compress(bytes(3 << 20))
    damaged = bytearray(chunk(b"tEXt", b"key\0words"))
    damaged[-1] ^= 1
    for extra in (
        chunk(b"zTXt", b"key\0\0" + long),
        chunk(b"iTXt", b"key\0\1\0\0\0" + long),
        chunk(b"iCCP", b"key\0\0" + long),
        chunk(b"tEXt", b"key\0" + b"x" * (3 << 20)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + long),
        chunk(b"tEXt", b"key\0v") * 5000,
        chunk(b"eXIf", b"nothing"),
        bytes(damaged),
    ):
        for behind in (False, True):
            assert (decode_full(with_chunks(data, extra, behind=behind), OPTIONS) == np.asarray(photo())).all(), extra[:40]
    frames = encode(photo().quantize(16), "GIF", save_all=True, append_images=[photo(seed=1).quantize(16)], comment=b"x" * 90_000)
    assert (decode_full(frames, OPTIONS) == np.asarray(photo().quantize(16).convert("RGB"))).all()
    many = tiff(64, 64, 64, tags=tuple((40000 + i, 1, 4096, 8) for i in range(2000)))  # each as large as the pixels
    assert not decode_full(many, OPTIONS).any()


def test_a_jpeg_without_a_height_is_corrupt():
    data = encode(photo())
    assert refused(data.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", 0, 96))) == "corrupt"


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_deflate"])  # the pixels last, or the directory
def test_a_cut_tiff_is_whole_or_refused(compression):
    data = encode(photo(), "TIFF", compression=compression)
    for number in range(1, 180):
        try:
            got = decode_full(data[:-number], OPTIONS)
        except Undecodable as error:
            assert error.reason in ("truncated", "corrupt")
        else:
            assert (got == np.asarray(photo())).all(), number


def test_a_wrong_checksum_of_pixels_is_not_silent():
    data = bytearray(encode(photo(), "PNG", compress_level=0))
    data[len(data) // 2] ^= 1  # inflates all the same
    assert refused(bytes(data)) == "corrupt"


JPEGS = {
    "baseline": encode(photo()),
    "progressive": encode(photo(), progressive=True),
    "cmyk": encode(photo().convert("CMYK")),
    "restarts": encode(photo(), restart_marker_blocks=3),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_whole_jpeg_without_its_end_mark_is_used_and_noticed(kind):
    data = JPEGS[kind]
    want, body = decode_full(data, OPTIONS), data[:-2]
    for odd in (body, body + b"\xff", body + bytes(5000), body + samsung(), body + samsung() + bytes(99), body + data):
        assert (decode_full(odd, OPTIONS) == want).all() and decode_eval(odd, OPTIONS).shape == (32, 32, 3)
        assert pixels.notice(odd) == "noend"
    assert (decode_full(body + bytes(5000) + b"\xff\xd9", OPTIONS) == want).all()
    assert refused(body + b"words of a camera " * 99) == "trailing"  # which could be lines of a cut picture
    assert refused(body + b"words of a camera " * 99 + b"\xff\xd9") == "corrupt"
    for usual in (data, data + b"trailer" * 9, data + samsung()):
        assert (decode_full(usual, OPTIONS) == want).all() and not pixels.notice(usual)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_cut_jpeg_is_refused_whatever_follows(kind):
    body = JPEGS[kind][:-2]
    start = body.rindex(b"\xff\xda") + 16
    for cut in (*np.linspace(start, len(body) - 12, 12).astype(int), body.index(b"\xff\xda") + 20):
        for behind in (b"", bytes(5000), samsung(), JPEGS["baseline"], bytes(5000) + b"\xff\xd9"):
            assert refused(body[:cut].rstrip(b"\0\xff") + behind) in ("truncated", "corrupt"), (cut, behind[:4])


def test_a_progressive_jpeg_without_its_last_scans_is_cut():
    data = JPEGS["progressive"]
    last = data.rindex(b"\xff\xda")
    last = data.rindex(b"\xff\xc4", 0, last) if b"\xff\xc4" in data[last - 60 : last] else last
    assert refused(data[:last]) == "truncated"


@pytest.mark.parametrize(
    "word, data",
    [
        ("jxl", b"\xff\x0a\xfa\x7f"),
        ("jxl", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "),
        ("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"),
        ("jxr", b"II\xbc\1\x20\0\0\0"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("svg", b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made by hand -->\n<svg width='9'>"),
        ("psd", b"8BPS\0\1"),
        ("exr", b"\x76\x2f\x31\1\2\0\0\0"),
        ("hdr", b"#?RADIANCE\n"),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
        ("pdf", b"%PDF-1.7\n"),
        ("raw", b"II*\0\x10\0\0\0CR\2\0"),
        ("raw", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom"),
        ("raw", tiff(64, 64, 64, tags=((50706, 1, 4, 0x0401),))),
        ("raw", tiff(64, 64, 64, ">", tags=((254, 4, 1, 1), (330, 4, 1, 8)))),
        ("dds", b"DDS |\0\0\0"),
        ("qoi", b"qoif\0\0\0\x40"),
        ("icns", b"icns\0\0\0\x40"),
        ("dicom", bytes(128) + b"DICM"),
    ],
)
def test_a_format_that_is_not_read_is_named(word, data):
    with pytest.raises(Undecodable, match=UNREAD[word][0]) as error:
        probe(data + bytes(200), OPTIONS)
    assert error.value.reason == word and UNREAD[word][0] in REASONS[word]
    for page in (b"<?xml version='1.0'?><html><body>svg</body></html>", b"<html><svg></svg></html>", b'{"error": "svg"}', b"\x1f\x8b\x08"):
        assert refused(page) == "notimage"


def test_an_avif_is_named_where_it_cannot_be_read(monkeypatch):
    monkeypatch.setattr(formats, "_readable_avif", lambda: "avif")
    assert refused(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99)) == "avif"


def test_an_avif_called_by_a_general_brand_is_no_heic():
    data = avif(photo())
    at = data.index(b"ftyp") + 4
    assert decode_full(data[:at] + b"mif1" + data[at + 4 :], OPTIONS).shape == (64, 96, 3)


def avif(image: Image.Image, **options: object) -> bytes:
    return encode(image, "AVIF", speed=10, **options) if features.check("avif") else pytest.skip("this Pillow has no AVIF")


def test_the_frames_of_an_avif_are_sized_themselves(monkeypatch):
    for size in ((2, 2), (96, 64), (701, 399)):
        for mode in ("RGB", "RGBA", "L"):
            image = photo(*size).convert(mode)
            for more in ({}, {"save_all": True, "append_images": [image]}, {"exif": exif(6)}):
                assert coded(avif(image, **more)) == size[0] * size[1]
    data = avif(photo(700, 700))
    at = data.index(b"ispe") + 8
    monkeypatch.setattr(pixels, "MEMORY", 1 << 22)
    monkeypatch.setattr(pixels, "EACH", 0)
    assert refused(data) == refused(data[:at] + struct.pack(">2L", 64, 64) + data[at + 8 :]) == "bomb"
    assert decode_eval(avif(photo(64, 64)), OPTIONS).shape == (32, 32, 3)


def test_memory_is_told_from_the_header_by_bytes(monkeypatch):
    def explode(*_, **__):
        raise AssertionError("the pixels were decoded")

    webp = encode(photo(), "WEBP", lossless=True)
    jp2 = encode(photo(), "JPEG2000")
    siz = jp2.index(b"\xff\x4f\xff\x51") + 8
    cod = jp2[(at := jp2.index(b"\xff\x52")) : at + 14]
    sized = lambda *numbers: jp2[:siz] + struct.pack(f">{len(numbers)}L", *numbers) + jp2[siz + 4 * len(numbers) :]
    bombs = {
        "tile": tiff(64, 64, 16000),
        "tile, big-endian": tiff(64, 64, 16000, ">"),
        "tags": tiff(64, 64, 64, tags=((513, 4, 1 << 20, 8),)),
        "webp": webp[:21] + ((16382 | 4095 << 14).to_bytes(4, "little")) + webp[25:],
        "icon": ico(png(9000, 9000)),
        "icon, bitmap": ico(struct.pack("<LllHHLLllLL", 40, 9000, 18000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(999)),
        "long rows": png(30_000_000, 2, 6, 16),
        "codestream in a small box": sized(9000, 9000),
        "codestream behind another": jp2[: siz - 16] + struct.pack(">L", 8 + len(jp2)) + b"free" + jp2 + sized(9000, 9000)[siz - 16 :],
        "tiles": sized(20000, 2000, 0, 0, 10, 10),
        "precincts": sized(2000, 2000).replace(cod, cod[:4] + b"\1" + cod[5:] + b"\x11" * 6).replace(b"\xff\x52\0\x0c", b"\xff\x52\0\x12"),
        "code-blocks": sized(4000, 4000).replace(cod, cod[:10] + b"\0\0" + cod[12:]),
        "progressive": scans(16, 3).replace(struct.pack(">HH", 16, 16), struct.pack(">HH", 8192, 8192)),
        "slow": b"P6 4000 4000 100\n" + bytes(99),
    }
    monkeypatch.setattr(simplejpeg, "decode_jpeg", explode)
    monkeypatch.setattr(Image.Image, "load", explode)
    for name, data in bombs.items():
        begin = time.process_time()
        assert refused(data) == "bomb", name
        assert time.process_time() - begin < 1, name


MANY = 1 << 19


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * MANY, id="segments"),
        pytest.param(lambda: b"\xff\xd8" + b"\xff" * MANY + b"\0" + encode(photo())[2:], id="fill"),
        pytest.param(lambda: encode(photo())[:-40] + b"\xff" * MANY + b"\0", id="fill in coded data"),
        pytest.param(lambda: encode(photo())[:2] + segment(0xE1, b"Exif\0\0" * 10_000) * 300 + encode(photo())[2:], id="EXIF in pieces"),
        pytest.param(lambda: with_chunks(encode(photo(), "PNG"), b"\0\0\0\0abcd\0\0\0\0" * MANY), id="chunks"),
        pytest.param(lambda: with_chunks(encode(photo(), "PNG"), chunk(b"tEXt", b"Raw profile type exif\0" + b"\n" * MANY * 8)), id="text"),
        pytest.param(lambda: b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * MANY, id="extensions"),
        pytest.param(
            lambda: struct.pack("<HHH", 0, 1, 65535) + struct.pack("<BBBBHHLL", 9, 9, 0, 0, 1, 32, MANY * 4, 0) * 65535, id="icons"
        ),
        pytest.param(lambda: encode(photo(), "WEBP")[:12] + b"abcd\0\0\0\0" * MANY, id="RIFF chunks"),
        pytest.param(lambda: b"\0\0\0\x10ftypavif\0\0\0\0" + b"\0\0\0\x08free" * MANY, id="boxes"),
        pytest.param(
            lambda: b"\0\0\0\x10ftypavif\0\0\0\0" + b"".join(struct.pack(">L", 1 << 20) + b"moov" for _ in range(5000)), id="depth"
        ),
        pytest.param(lambda: b"\0\0\0\x10ftypavif\0\0\0\0" + struct.pack(">L", 8 * MANY) + b"iloc" + bytes(8 * MANY), id="items"),
        pytest.param(lambda: b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 8 + bytes(20) * MANY, id="tags"),
        pytest.param(lambda: b" " * MANY * 8, id="spaces"),
        pytest.param(lambda: b"P6" + b"#\n" * MANY + b"8 8 255 ", id="comments"),
        pytest.param(lambda: b"P3\n800 800 255\n" + b"#\n" * MANY + b"7 ", id="comments among pixels"),
    ],
)
def test_no_structure_takes_long(data):
    image = data()
    begin = time.process_time()
    try:
        decode_eval(image, OPTIONS)
    except Undecodable as error:
        assert error.reason in REASONS
    assert time.process_time() - begin < 2


def test_a_jpeg_2000_of_any_style_is_read():
    for more in ({}, {"codeblock_size": (4, 4)}, {"precinct_size": (64, 64)}, {"tile_size": (32, 32)}, {"num_resolutions": 1}):
        assert (decode_full(encode(photo(), "JPEG2000", **more), OPTIONS) == np.asarray(photo())).all()
        assert (decode_full(encode(photo(), "JPEG2000", no_jp2=True, **more), OPTIONS) == np.asarray(photo())).all()


def test_comments_of_any_length_stand_in_a_ppm():
    rows = np.asarray(photo(8, 8)).tobytes()
    for head in (b"P6\n#" + b"x" * (1 << 22) + b"\n8 8\n255\n", b"P6 # a\n 8\t#b\r8 #c\n\n255 "):
        begin = time.process_time()
        assert (decode_full(head + rows, OPTIONS) == np.asarray(photo(8, 8))).all()
        assert time.process_time() - begin < 0.5
    plain = b" ".join(b"%d #c\n" % level for level in rows)
    assert (decode_full(b"P3 8 8 255\n" + plain, OPTIONS) == np.asarray(photo(8, 8))).all()
    assert refused(b"P6\n8 8\n#" + b"x" * 99) == refused(b"P5 a b c") == "corrupt"


def test_who_allows_more_pixels_allows_their_memory():
    data = png(9000, 9000)
    assert refused(data) == "bomb"
    assert probe(data, OPTIONS._replace(max_pixels=1 << 27)) == (9000, 9000)


def test_scans_are_counted_by_the_blocks_they_visit():
    assert refused(scans(1024, rounds=14)) == "bomb"
    assert not decode_eval(scans(64, rounds=14), OPTIONS).std()  # as many scans of a small image are harmless
    assert pixels.read_header(encode(Image.new("RGB", (6000, 6000)), progressive=True), 2, 1 << 26).width == 6000


def test_a_large_image_is_converted_and_shrunk_in_bands(monkeypatch):
    monkeypatch.setattr(pixels, "BAND", 500)
    clear = photo().quantize(16)
    for data in (encode(clear, "PNG", transparency=3), encode(photo(), "TIFF"), encode(photo().convert("CMYK"))):
        monkeypatch.setattr(pixels, "BAND", 1 << 20)
        want = decode_full(data, OPTIONS)
        monkeypatch.setattr(pixels, "BAND", 500)
        assert (decode_full(data, OPTIONS) == want).all()
    tall = np.random.default_rng(0).integers(0, 256, (9000, 700, 3), dtype=np.uint8)
    assert (decode._averaged(tall, 3, 3) == np.asarray(Image.fromarray(tall).reduce(3))).all()


def test_a_long_image_is_squashed_without_a_long_kernel():
    ramp = np.linspace(0, 255, 400_000).astype(np.uint8)[None].repeat(2, 0)
    got = decode_eval(encode(Image.fromarray(ramp), "PNG"), OPTIONS._replace(fit="squash"))
    assert np.abs(got[0, :, 0] - np.linspace(4, 251, 32)).max() < 2


def test_deep_levels_that_count_from_white_are_not_shown_inverted():
    black = encode(Image.fromarray(np.full((8, 8), 65_535, np.uint16)), "TIFF")
    at = black.index(struct.pack("<HHLH", 262, 3, 1, 1)) + 8
    assert decode_full(black, OPTIONS).min() == 255
    assert refused(black[:at] + b"\0" + black[at + 1 :]) == "corrupt"
    byte = encode(Image.new("L", (8, 8), 255), "TIFF")
    at = byte.index(struct.pack("<HHLH", 262, 3, 1, 1)) + 8
    assert decode_full(byte[:at] + b"\0" + byte[at + 1 :], OPTIONS).max() == 0


def test_a_clear_level_of_a_deep_grey_image_is_white():
    deep = Image.fromarray(np.array([[0, 30_000], [65_535, 257]], np.uint16).repeat(4, 0).repeat(4, 1))
    assert (decode_full(encode(deep, "PNG", transparency=30_000), OPTIONS)[0, :, 0] == [0] * 4 + [255] * 4).all()
