"How photographs are decoded: grey values, metadata, truncated files, Pillow's warnings, memory."

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from ltnb import data, files
from ltnb.core import DataError, UsageError
from ltnb.files import ImageFiles, decode_image, free_memory, read_image
from ltnb.sources import LongTail
from PIL import Image, PngImagePlugin, TiffImagePlugin

EIGHT = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)
EIGHT[0, 0], EIGHT[0, 1] = 0, 255


def tiff(path, a, tags=(), **save):
    "A grey TIFF file with further tags: (number, type, value)"
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, kind, value in tags:
        info.tagtype[number] = kind
        info[number] = value
    Image.fromarray(a).save(path, tiffinfo=info, **save)
    return path


def raw_tiff(path, data, bits, kind=1, photometric=1, shape=(12, 16), order="<"):
    "A TIFF file by hand, for kinds that Pillow does not write"
    h, w = shape
    tags = [
        (256, 3, w),
        (257, 3, h),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, h),
        (279, 4, len(data)),
        (339, 3, kind),
    ]
    body = struct.pack(f"{order}H", len(tags))
    for n, t, v in tags:
        body += struct.pack(f"{order}HHI", n, t, 1) + struct.pack(
            f"{order}{'HH' if t == 3 else 'I'}", *((v, 0) if t == 3 else (v,))
        )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + body + struct.pack(f"{order}I", 0))
    return path


def close(path, **more):
    return np.abs(decode_image(path, **more)[0].astype(int) - EIGHT).max() <= 1


def test_deep_grey_values_look_like_their_eight_bit_copies(tmp_path):
    sixteen = EIGHT.astype(np.uint16) * 257
    for name in ("a.png", "a.tif", "a.jp2"):
        Image.fromarray(sixteen).save(tmp_path / name)
    (tmp_path / "a.pgm").write_bytes(b"P5 16 12 65535\n" + sixteen.astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(
        b"P5 16 12 4095\n" + (EIGHT.astype(np.uint16) * 16 + EIGHT // 16).astype(">u2").tobytes()
    )
    raw_tiff(tmp_path / "big.tif", sixteen.astype(">u2").tobytes(), 16, order=">")
    raw_tiff(tmp_path / "white0.tif", (65535 - sixteen).tobytes(), 16, photometric=0)
    tiff(tmp_path / "told.tif", EIGHT.astype(np.uint16) * 16, [(341, 3, 4095)])
    pairs = (EIGHT.astype(np.uint16) * 16 + EIGHT // 16).reshape(-1, 2)  # 12 bits, two in three bytes
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(
        np.uint8
    )
    raw_tiff(tmp_path / "packed.tif", packed.tobytes(), 12)
    tiff(tmp_path / "whole32.tif", sixteen.astype(np.int32))
    for name, scale in (("one", 1.0), ("byte", 255.0)):
        tiff(tmp_path / f"{name}.tif", (EIGHT / 255 * scale).astype(np.float32))
    for name, scale, top in (("one", -1.0, 1.0), ("byte", -1.0, 255.0), ("scaled", -4.0, 4.0)):
        (tmp_path / f"{name}.pfm").write_bytes(
            f"Pf\n16 12\n{scale}\n".encode() + (EIGHT[::-1] / 255 * top).astype("<f4").tobytes()
        )
    for path in sorted(tmp_path.iterdir()):
        assert close(path), path.name


def test_one_bit_and_other_kinds(tmp_path):
    bits = EIGHT > 127
    for name in ("a.png", "a.tif", "a.pbm", "a.bmp"):
        Image.fromarray(bits).save(tmp_path / name)
        assert (decode_image(tmp_path / name)[0] == bits * 255).all(), name
    la = np.stack([EIGHT, np.full_like(EIGHT, 255)], 2)
    Image.fromarray(la, "LA").save(tmp_path / "la.png")
    assert close(tmp_path / "la.png")
    Image.fromarray(EIGHT).convert("P").save(tmp_path / "p.png", transparency=bytes([255] * 256))
    assert close(tmp_path / "p.png")


@pytest.mark.parametrize(
    "values, word",
    [
        (EIGHT.astype(np.uint16) * 16, "--grey-bits, such as 12"),
        (EIGHT.astype(np.uint16) * 4, "--grey-bits, such as 10"),
        (EIGHT.astype(np.uint16) * 64, "such as 14"),
        (EIGHT.astype(np.uint16), "such as 8"),
        (EIGHT.astype(np.int32), "--grey-bits"),
        (EIGHT.astype(np.int32) * 2**22, "such as 30"),
        (EIGHT.astype(np.int32) - 9, "negative"),
        ((EIGHT / 64).astype(np.float32), "floating-point"),
        (EIGHT.astype(np.float32) - 9, "negative"),
        (np.full((4, 4), np.nan, np.float32), "undefined"),
    ],
)
def test_what_says_nothing_of_its_range_is_refused(tmp_path, values, word):
    path = tiff(tmp_path / "a.tif", values)
    with pytest.raises(DataError, match=word):
        decode_image(path)


def test_grey_bits_settle_it(tmp_path):
    for bits, dtype in (
        (12, np.uint16),
        (10, np.uint16),
        (14, np.uint16),
        (8, np.int32),
        (20, np.int32),
        (8, np.float32),
    ):
        path = tiff(tmp_path / f"{bits}.tif", (EIGHT.astype(float) * (2**bits - 1) / 255).round().astype(dtype))
        assert close(path, grey_bits=bits), (bits, dtype)
    with pytest.raises(DataError, match="more than 10 bits"):
        decode_image(tmp_path / "14.tif", grey_bits=10)
    dark = Image.fromarray(np.zeros((4, 4), np.uint16))
    dark.save(tmp_path / "dark.png")
    assert not decode_image(tmp_path / "dark.png").any(), "black is black in any range"


def test_one_image_does_not_set_its_own_brightness(tmp_path):
    "A darker image of a set is darker, whatever its own largest value"
    for name, share in (("bright", 1.0), ("dark", 0.3)):
        Image.fromarray((EIGHT * 257.0 * share).astype(np.uint16)).save(tmp_path / f"{name}.png")
    assert abs(decode_image(tmp_path / "dark.png").mean() / decode_image(tmp_path / "bright.png").mean() - 0.3) < 0.01
    for name, share in (("bright12", 1.0), ("dark12", 0.2)):
        Image.fromarray((EIGHT * 16.0 * share).astype(np.uint16)).save(tmp_path / f"{name}.png")
    assert (
        abs(
            decode_image(tmp_path / "dark12.png", grey_bits=12).mean()
            / decode_image(tmp_path / "bright12.png", grey_bits=12).mean()
            - 0.2
        )
        < 0.01
    )


def test_signed_values_and_dark_colours_are_refused(tmp_path):
    raw_tiff(tmp_path / "s8.tif", EIGHT.astype(np.int8).tobytes(), 8, kind=2)
    raw_tiff(tmp_path / "s16.tif", (EIGHT.astype("<i2") * 128).tobytes(), 16, kind=2)
    for name in ("s8.tif", "s16.tif"):
        with pytest.raises(DataError, match="signed"):
            decode_image(tmp_path / name)
    assert close(tmp_path / "s16.tif", grey_bits=15)

    def png16(values):  # Pillow writes no 16-bit colours
        rows = b"".join(b"\0" + r.astype(">u2").tobytes() for r in values)
        part = lambda kind, body: (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
        head = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")

    colours = np.repeat(EIGHT[..., None].astype(np.uint16), 3, 2)
    assert close(io.BytesIO(png16(colours * 257)))
    with pytest.raises(DataError, match="16-bit colours"):
        decode_image(io.BytesIO(png16(colours * 16)))


def entry(tag, kind, count, value):
    return struct.pack("<HHI", tag, kind, count) + value


BROKEN = {
    "GPS folder beyond the end": entry(0x8825, 4, 1, struct.pack("<I", 10**6)),
    "EXIF folder into itself": entry(0x8769, 4, 1, struct.pack("<I", 8)),
    "text as a number": entry(0x010F, 3, 1, b"ab\0\0"),
    "fraction by zero": entry(0x011A, 5, 1, struct.pack("<I", 8)),
    "too long": entry(0x010E, 2, 2**31, struct.pack("<I", 30)),
    "unknown kind": entry(0x9999, 77, 3, b"abcd"),
    "maker note": entry(0x927C, 7, 2**20, b"\1\2\3\4"),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("name", BROKEN)
def test_metadata_never_costs_a_picture(tmp_path, name, suffix):
    orientation = entry(0x0112, 3, 1, struct.pack("<HH", 6, 0))
    parts = sorted([orientation, BROKEN[name]], key=lambda e: struct.unpack("<H", e[:2]))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(parts) + b"\0\0\0\0"
    left_red = np.zeros((30, 40, 3), np.uint8)
    left_red[:, :20, 0] = 255
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        Image.fromarray(left_red).save(path)
        raw = bytearray(path.read_bytes())
        at = struct.unpack("<I", raw[4:8])[0]
        n = struct.unpack("<H", raw[at : at + 2])[0]
        own = [bytes(raw[at + 2 + 12 * i : at + 14 + 12 * i]) for i in range(n)]
        whole = sorted([*own, *parts], key=lambda e: struct.unpack("<H", e[:2]))
        raw[4:8] = struct.pack("<I", len(raw))
        path.write_bytes(raw + struct.pack("<H", len(whole)) + b"".join(whole) + b"\0\0\0\0")
    else:
        Image.fromarray(left_red).save(path, exif=exif, **(dict(lossless=True) if suffix == "webp" else {}))
    turned = decode_image(path)
    assert turned.shape == (3, 40, 30) and turned[0, :15].mean() > 200 > 50 > turned[0, -15:].mean()


def test_other_broken_metadata(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)  # more than Pillow unpacks
    Image.fromarray(EIGHT).save(tmp_path / "text.png", pnginfo=info)
    assert close(tmp_path / "text.png")
    raw = bytearray((tmp_path / "text.png").read_bytes())
    i = raw.index(b"zTXt")
    raw[i + 20] ^= 255  # a wrong checksum, in a part that is no picture
    (tmp_path / "sum.png").write_bytes(raw)
    assert close(tmp_path / "sum.png")
    Image.fromarray(EIGHT).save(tmp_path / "icc.png", icc_profile=b"no profile")
    assert close(tmp_path / "icc.png")
    Image.fromarray(EIGHT).save(tmp_path / "q.jpg", quality=100, exif=b"Exif\0\0no such thing", comment=b"\xff\xfe")
    assert np.abs(decode_image(tmp_path / "q.jpg")[0].astype(int) - EIGHT).mean() < 2


@pytest.fixture
def torn(tmp_path):
    "Class folders with one whole, one truncated and one empty JPEG among PNG files"
    rng = np.random.default_rng(1)
    for part, n in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(
                    tmp_path / "p" / part / name / f"{i}.png"
                )
    whole = tmp_path / "p" / "train" / "cat" / "whole.jpg"
    smooth = Image.fromarray(np.linspace(0, 255, 64 * 64, dtype=np.uint8).reshape(64, 64)).resize((256, 256))
    smooth.save(whole)
    whole.with_name("torn.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    whole.with_name("none.jpg").write_bytes(whole.read_bytes()[:50])
    return tmp_path / "p"


def test_truncated_jpegs_can_be_tolerated(torn):
    at = torn / "train" / "cat"
    with pytest.raises(DataError, match="torn.jpg cannot be decoded"):
        decode_image(at / "torn.jpg")
    x, note = read_image(at / "torn.jpg", tolerate=True)
    whole, no_note = read_image(at / "whole.jpg", tolerate=True)
    assert (
        "truncated" in note
        and not no_note
        and np.abs(x[:, :100].astype(int) - whole[:, :100]).max() == 0
        and (whole == decode_image(at / "whole.jpg")).all()
    )
    with pytest.raises(DataError):
        decode_image(at / "none.jpg", tolerate=True)
    data = LongTail.folder(torn, bad_images="tolerate")
    assert (
        data.counts.tolist() == [8, 6]
        and data.notes[0] == "decoded what is there of 1 truncated train image: train/cat/torn.jpg"
        and "left out 1 unreadable train image: train/cat/none.jpg" in data.notes[1]
    )
    assert data.in_memory().train.images.shape == (14, 3, 24, 24)
    assert LongTail.folder(torn, bad_images="skip").counts.tolist() == [7, 6]
    assert data.train.take([0]).images.how == {"tolerate": True}
    with pytest.raises(UsageError, match="tolerate"):
        LongTail.folder(torn, bad_images="tolerated")


def test_pillow_says_nothing_itself(tmp_path, monkeypatch, capfd):
    Image.fromarray(EIGHT).convert("P").save(tmp_path / "p.png", transparency=bytes(range(256)))
    Image.fromarray(EIGHT).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", EIGHT.size // 2 + 10)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for name in ("p.png", "big.png"):
            decode_image(tmp_path / name)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        with pytest.raises(DataError, match="million pixels.*are not opened"):
            decode_image(tmp_path / "big.png")
    assert not "".join(capfd.readouterr())


# memory


def fake(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 8000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "5000000\n",
                "sys/fs/cgroup/memory.current": "1000000\n",
            },
            4000000,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 8000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "sys/fs/cgroup/slurm/job_1/memory.max": "3000000",
                "sys/fs/cgroup/slurm/job_1/memory.current": "2500000",
                "sys/fs/cgroup/slurm/job_1/memory.stat": "anon 1\ninactive_file 500000\n",
                "sys/fs/cgroup/slurm/job_1/step_0/memory.max": "max",
            },
            1000000,
        ),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": "max",
                "sys/fs/cgroup/a/memory.high": "2000000",
                "sys/fs/cgroup/a/memory.current": "1",
            },
            1999999,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000",
                "sys/fs/cgroup/memory/memory.stat": "cache 5\ntotal_inactive_file 250000\n",
            },
            1250000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/slurm/uid_1/job_2/step_0\n",
                "sys/fs/cgroup/memory/slurm/uid_1/job_2/memory.limit_in_bytes": "700000",
                "sys/fs/cgroup/memory/slurm/uid_1/job_2/step_0/memory.limit_in_bytes": "9223372036854771712",
            },
            700000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc/inner\n",
                "proc/self/mountinfo": "31 23 0:28 /docker/abc /mnt/groups/memory rw - cgroup cgroup rw,memory\n",
                "mnt/groups/memory/inner/memory.limit_in_bytes": "600000",
                "mnt/groups/memory/memory.limit_in_bytes": "800000",
            },
            600000,
        ),
        ({"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/other/memory.max": "900000"}, 900000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000", "sys/fs/cgroup/memory.current": "5000"}, 0),
    ],
)
def test_the_tightest_limit_of_memory(tmp_path, files, free):
    assert free_memory(fake(tmp_path, MEMINFO | files)) == free


def test_limits_of_the_process(tmp_path, monkeypatch):
    import resource

    root = fake(tmp_path, MEMINFO | {"proc/self/status": "Name: x\nVmSize:\t    1000 kB\nVmData:\t     600 kB\n"})
    for name, limit, free in (("RLIMIT_AS", 3000, 2000), ("RLIMIT_DATA", 1000, 400)):
        monkeypatch.setattr(
            resource,
            "getrlimit",
            lambda kind, name=name, limit=limit: (
                limit * 1024 if kind == getattr(resource, name) else resource.RLIM_INFINITY,
                resource.RLIM_INFINITY,
            ),
        )
        assert free_memory(root) == free * 1024
    assert free_memory(tmp_path / "nothing") is not None
    monkeypatch.undo()
    assert free_memory(tmp_path / "nothing") is None


def test_what_does_not_fit_is_read_on_demand(torn, monkeypatch):
    data = LongTail.folder(torn, bad_images="skip")
    assert not data.ready().train.on_disk
    monkeypatch.setattr(files, "free_memory", lambda: 10_000)
    monkeypatch.setattr(data, "free_memory", lambda: 10_000)
    assert data.ready() is data
    with pytest.raises(Exception, match="--image-size"):
        data.in_memory()


@pytest.mark.parametrize("recipe", ["baseline", "ldmlr"])
def test_recipes_run_where_photographs_do_not_fit(torn, tmp_path, monkeypatch, main, recipe):
    args = [
        "run",
        recipe,
        "--plain",
        "--quiet",
        "--dataset",
        "folder",
        "--data-root",
        torn,
        "--bad-images",
        "skip",
        "--image-size",
        "8",
        "--n-epochs",
        "1",
        "--bs",
        "4",
        "--device",
        "cpu",
        "--out",
        tmp_path / "run",
    ]
    args += {
        "baseline": ["--heads", "false"],
        "ldmlr": ["--n-steps", "5", "--per-class", "3", "--head-steps", "2", "--scratch-steps", "2"],
    }[recipe]
    monkeypatch.setattr(files, "free_memory", lambda: 100)
    monkeypatch.setattr(data, "free_memory", lambda: 100)
    code, out, err = main(*args)
    assert code == 0, err


def test_files_keep_how_they_are_decoded(tmp_path):
    Image.fromarray(EIGHT.astype(np.uint16) * 16).save(tmp_path / "a.png")
    files = ImageFiles(tmp_path, ["a.png"], 8, how={"grey_bits": 12})
    assert (
        files[0].mean() > 50
        and files.take([0], cache_mb=0).how == files.how
        and os.path.basename(files.path(0)) == "a.png"
    )
