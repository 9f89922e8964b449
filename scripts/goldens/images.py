#!/usr/bin/env python3
"""Writes tests/data/images: small images of every kind and what CLIPImageProcessorPil makes of them.

Needs transformers 5 and Pillow. Deterministic; run from the repository's root.

`sources/` holds the images, `expected/` the pixels after resize and crop (lossless WebP), and
`cases.json` lists which source with which configuration gives which pixels, with a few values of the
fully normalised result.
"""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

ROOT = Path("tests/data/images")
SOURCES, EXPECTED = ROOT / "sources", ROOT / "expected"

CONFIGS = {
    "openai": {
        "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor", "rescale_factor": 0.00392156862745098,
    },
    "old": {
        "crop_size": 96, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 96,
    },
    "exact": {"size": {"height": 40, "width": 56}, "do_center_crop": False, "resample": 2},
    "nocrop": {"size": {"shortest_edge": 31}, "do_center_crop": False},
    "pad": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 50}},
    "noresize": {"do_resize": False, "crop_size": {"height": 30, "width": 51}, "do_rescale": False},
    "tiny": {
        "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    },
    "mini": {"size": {"shortest_edge": 18}, "crop_size": 18, "resample": 3, "image_mean": 0.5, "image_std": [0.5, 0.5, 0.5]},
    "lanczos": {"size": {"shortest_edge": 24}, "crop_size": 24, "resample": 1},
    "nearest": {"size": {"shortest_edge": 24}, "crop_size": 24, "resample": 0},
    "box": {"size": {"shortest_edge": 24}, "crop_size": 24, "resample": 4},
    "hamming": {"size": {"shortest_edge": 24}, "crop_size": 24, "resample": 5},
}

CASES = []


def noise(height, width, channels=3, seed=0, roughness=1.0):
    """Gradients, hard edges and noise: what rounding and ringing show up in."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    out = np.zeros((height, width, channels))
    for c in range(channels):
        wave = 127 + 90 * np.sin((x * (c + 1) + y * (3 - c)) / (4.0 + c))
        edges = np.where((x // 7 + y // 5 + c) % 3 == 0, 60, -30)
        out[..., c] = wave + roughness * (edges + rng.normal(0, 50, (height, width)))
    return np.clip(out, 0, 255).round().astype(np.uint8)


def smooth(height, width, seed):
    """Compresses well: for large outputs."""
    y, x = np.mgrid[0:height, 0:width]
    out = np.stack([x * 255 // width, y * 255 // height, ((x // 16 + y // 16 + seed) % 2) * 255], axis=-1)
    return out.astype(np.uint8)


def png(width, height, depth, colour, rows, chunks=(), interlace=0):
    """A PNG by hand, for what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + row for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    extra = b"".join(chunk(k, d) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def png16(array):
    height, width, channels = array.shape
    rng = np.random.default_rng(16)
    wide = array.astype(np.uint16) * 256 + rng.integers(0, 256, array.shape, dtype=np.uint16)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, 16, colour, [row.astype(">u2").tobytes() for row in wide])


def png_bits(array, depth, interlace=0):
    """Greyscale with less than eight bits."""
    values = array[..., 0] >> (8 - depth)

    def pack(row):
        bits = "".join(format(v, f"0{depth}b") for v in row)
        return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")

    height, width = values.shape
    if not interlace:
        return png(width, height, depth, 0, [pack(row) for row in values])
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [pack(row) for x, y, dx, dy in passes for row in values[y::dy, x::dx] if len(row)]
    return png(width, height, depth, 0, rows, interlace=1)


def bmp(width, height, bits, body, compression=0, masks=b"", palette=b""):
    """A BMP by hand, for what Pillow does not write."""
    offset = 14 + 40 + len(masks) + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 2835, 2835, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + info + masks + palette + body


def bmp16(array, green):
    r, g, b = (array[..., i].astype(np.uint16) for i in range(3))
    packed = (r >> 3) << (5 + green) | (g >> (8 - green)) << 5 | b >> 3
    height, width = packed.shape
    padded = np.zeros((height, -(-width // 2) * 2), dtype="<u2")
    padded[:, :width] = packed[::-1]
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F) if green == 6 else b""
    return bmp(width, height, 16, padded.tobytes(), 3 if green == 6 else 0, masks)


def bmp_rle(array):
    """RLE8 with runs, literals and end-of-line codes."""
    indices = (array[..., 0] >> 6).astype(np.uint8)
    body = b""
    for row in indices[::-1]:
        at = 0
        while at < len(row):
            run = 1
            while at + run < len(row) and run < 255 and row[at + run] == row[at]:
                run += 1
            body += bytes([run, row[at]])
            at += run
        body += b"\0\0"
    palette = b"".join(bytes([10 + 80 * i, 240 - 60 * i, 30 * i, 0]) for i in range(4))
    height, width = indices.shape
    return bmp(width, height, 8, body + b"\0\1", 1, b"", palette)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def add(name, data, config="mini", lossy=False, parity=True, white=False):
    """Writes a source and what the processor makes of it."""
    (SOURCES / name).write_bytes(data)
    if not parity:
        return
    case(name, config, lossy)
    if white:
        case(name, config, lossy, white=True)


def case(name, config, lossy=False, white=False, orient=True):
    path = SOURCES / name
    options = CONFIGS[config]
    if white:
        # A PIL image with alpha is composited onto white by the processor itself.
        given = Image.open(path)
        given.seek(0)
    else:
        # What the processor does with a path; through numpy, so that no `transparency` is left in
        # the image's `info`, which the processor would take for alpha.
        opened = Image.open(path)
        turned = ImageOps.exif_transpose(opened) if orient else opened
        given = Image.fromarray(np.asarray(turned.convert("RGB")))
    plain = CLIPImageProcessorPil(**{**options, "do_rescale": False, "do_normalize": False})
    pixels = np.asarray(plain(given)["pixel_values"][0])
    assert pixels.dtype == np.uint8, pixels.dtype
    full = np.asarray(CLIPImageProcessorPil(**options)(given)["pixel_values"][0], dtype=np.float32)
    out = f"{path.stem}-{path.suffix[1:]}-{config}{'-white' if white else ''}{'' if orient else '-flat'}.webp"
    Image.fromarray(pixels.transpose(1, 2, 0)).save(EXPECTED / out, lossless=True, quality=100, method=6, exact=True)
    flat = full.reshape(-1)
    at = [int(i) for i in np.linspace(0, flat.size - 1, 7)]
    CASES.append({
        "source": name, "config": config, "expected": out, "lossy": lossy, "white": white, "orient": orient,
        "values": [[i, float(flat[i])] for i in at],
    })


def pngs(rgb, alpha):
    grey = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    la = grey.copy()
    la.putalpha(alpha)
    palette = rgb.quantize(40, dither=0)
    add("rgb.png", encoded(rgb, "PNG"))
    add("rgba.png", encoded(rgba, "PNG"), white=True)
    add("grey.png", encoded(grey, "PNG"))
    add("grey-alpha.png", encoded(la, "PNG"), white=True)
    add("palette.png", encoded(palette, "PNG"))
    add("palette-4bit.png", encoded(rgb.quantize(11, dither=0), "PNG", bits=4))
    add("palette-alpha.png", encoded(palette, "PNG", transparency=bytes(range(0, 240, 6))), white=True)
    add("palette-key.png", encoded(palette, "PNG", transparency=3), white=True)
    add("rgb-key.png", encoded(palette.convert("RGB"), "PNG", transparency=palette.convert("RGB").getpixel((5, 5))), white=True)
    add("grey-key.png", encoded(grey, "PNG", transparency=grey.getpixel((9, 9))), white=True)
    add("one-bit.png", encoded(rgb.convert("1"), "PNG"))
    frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_180)]
    add("animated.png", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))


def pngs_by_hand(pixels, alpha):
    grey = pixels[..., :1]
    alpha = np.asarray(alpha)[..., None]
    add("two-bit.png", png_bits(pixels, 2))
    add("four-bit.png", png_bits(pixels, 4))
    add("interlaced.png", png_bits(pixels, 8, interlace=1))
    add("rgb-16.png", png16(pixels))
    add("rgba-16.png", png16(np.concatenate([pixels, alpha], axis=-1)), white=True)
    add("grey-alpha-16.png", png16(np.concatenate([grey, alpha], axis=-1)), white=True)
    # Pillow clips these instead of scaling them, so there is no parity to have.
    add("grey-16.png", png16(grey), parity=False)


def jpegs(rgb):
    for name, options in {
        "444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2},
        "progressive": {"progressive": True}, "restart": {"restart_marker_blocks": 3},
        "rgb": {"keep_rgb": True}, "low": {"quality": 30},
    }.items():
        add(f"{name}.jpg", encoded(rgb, "JPEG", **{"quality": 90, **options}), lossy=True)
    add("grey.jpg", encoded(rgb.convert("L"), "JPEG", quality=90), lossy=True)
    add("cmyk.jpg", encoded(Image.merge("CMYK", [*rgb.split(), rgb.convert("L").point(lambda v: v // 2)]), "JPEG", quality=90), lossy=True)
    # A thumbnail in the metadata has an end-of-image marker of its own.
    thumbnail = encoded(rgb.resize((8, 8)), "JPEG")
    add("turned.jpg", encoded(rgb, "JPEG", quality=90, exif=exif(6), comment=thumbnail), lossy=True)
    add("jpeg-inside.png", encoded(rgb, "JPEG", quality=90), lossy=True)


def others(rgb, alpha):
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    flipped = rgb.transpose(Image.Transpose.ROTATE_180)
    add("lossless.webp", encoded(rgb, "WEBP", lossless=True))
    add("lossless-alpha.webp", encoded(rgba, "WEBP", lossless=True, exact=True), white=True)
    add("lossy.webp", encoded(rgb, "WEBP", quality=80), lossy=True)
    add("lossy-alpha.webp", encoded(rgba, "WEBP", quality=80), lossy=True, white=True)
    add("animated.webp", encoded(rgb, "WEBP", lossless=True, save_all=True, append_images=[flipped]))
    add("turned.webp", encoded(rgb, "WEBP", lossless=True, exif=exif(8)))

    palette = rgb.quantize(40, dither=0)
    add("palette.gif", encoded(palette, "GIF"))
    add("grey.gif", encoded(rgb.convert("L"), "GIF", interlace=0))
    add("key.gif", encoded(palette, "GIF", transparency=7), white=True)
    add("animated.gif", encoded(palette, "GIF", save_all=True, append_images=[flipped.quantize(40, dither=0)]))
    # A screen larger than its only frame.
    for name, extra in [("screen", {}), ("screen-key", {"transparency": 7})]:
        data = bytearray(encoded(palette, "GIF", **extra))
        data[6:10] = struct.pack("<HH", rgb.width + 9, rgb.height + 4)
        add(f"{name}.gif", bytes(data))

    add("rgb.bmp", encoded(rgb, "BMP"))
    add("rgba.bmp", encoded(rgba, "BMP"))
    add("grey.bmp", encoded(rgb.convert("L"), "BMP"))
    add("palette.bmp", encoded(palette, "BMP"))
    add("one-bit.bmp", encoded(rgb.convert("1"), "BMP"))
    pixels = np.asarray(rgb)
    add("555.bmp", bmp16(pixels, 5))
    add("565.bmp", bmp16(pixels, 6))
    add("rle.bmp", bmp_rle(pixels))


def tiffs(rgb, alpha):
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    grey = rgb.convert("L")
    for name in ["raw", "tiff_lzw", "tiff_deflate", "packbits"]:
        add(f"{name}.tiff", encoded(rgb, "TIFF", compression=name))
    add("jpeg.tiff", encoded(rgb, "TIFF", compression="jpeg", quality=90), lossy=True)
    add("rgba.tif", encoded(rgba, "TIFF"), white=True)
    add("grey.tif", encoded(grey, "TIFF", compression="tiff_lzw"))
    add("white-is-zero.tif", encoded(grey, "TIFF", tiffinfo={262: 0}))
    add("one-bit.tif", encoded(rgb.convert("1"), "TIFF"))
    add("group4.tif", encoded(rgb.convert("1"), "TIFF", compression="group4"))
    add("palette.tif", encoded(rgb.quantize(40, dither=0), "TIFF", compression="tiff_lzw"))
    add("cmyk.tif", encoded(Image.merge("CMYK", [*rgb.split(), grey.point(lambda v: v // 2)]), "TIFF"))
    add("turned.tif", encoded(rgb, "TIFF", tiffinfo={274: 5}))
    wide = np.asarray(grey).astype(np.uint16) * 256 + 77
    add("grey-16.tif", encoded(Image.fromarray(wide), "TIFF"), parity=False)


def shapes():
    """One lossless source per shape, under every configuration."""
    add("tall.png", encoded(Image.fromarray(noise(91, 37, seed=3)), "PNG"), "exact")
    for config in [ "nocrop", "pad", "noresize", "tiny", "lanczos", "nearest", "box", "hamming"]:
        case("tall.png", config)
    add("wide.png", encoded(Image.fromarray(smooth(150, 200, 0)), "PNG"), "openai")
    for config in ["old", "pad", "nocrop", "lanczos"]:
        case("wide.png", config)
    add("large.png", encoded(Image.fromarray(smooth(601, 503, 1)), "PNG"), "openai")
    for config in ["tiny", "nearest", "box", "hamming", "exact"]:
        case("large.png", config)
    add("small.png", encoded(Image.fromarray(noise(9, 14, seed=5)), "PNG"), "tiny")
    add("pixel.png", encoded(Image.fromarray(noise(1, 1, seed=6)), "PNG"))
    # Hard black and white: ringing that is clipped between the two passes.
    hard = np.where(np.random.default_rng(8).random((25, 32, 3)) < 0.5, 0, 255).astype(np.uint8)
    add("hard.png", encoded(Image.fromarray(hard), "PNG"), "exact")
    case("hard.png", "tiny")
    for name, shape in {"thin-tall": (5000, 1), "thin-wide": (2, 1501)}.items():
        add(f"{name}.png", encoded(Image.fromarray(noise(*shape, seed=7, roughness=0.2)), "PNG"))


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    EXPECTED.mkdir()
    pixels = noise(23, 31, seed=1, roughness=0.6)
    rgb = Image.fromarray(pixels)
    alpha = Image.fromarray(noise(23, 31, 1, seed=2)[..., 0])
    pngs(rgb, alpha)
    pngs_by_hand(pixels, alpha)
    jpegs(rgb)
    others(rgb, alpha)
    tiffs(rgb, alpha)
    for orientation in range(1, 9):
        add(f"exif-{orientation}.png", encoded(rgb, "PNG", exif=exif(orientation)))
    case("exif-6.png", "mini", orient=False)
    shapes()
    text = ",\n".join(json.dumps(c) for c in CASES)
    configs = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in CONFIGS.items())
    (ROOT / "cases.json").write_text(f'{{"configs": {{\n{configs}\n}},\n"cases": [\n{text}\n]}}\n')
    print(len(CASES), "cases,", sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main()
