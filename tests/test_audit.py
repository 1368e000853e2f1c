"""The audit beside arithmetic of the test's own: DALI's and PIL's pixels, predictions, causes, and the command."""

from __future__ import annotations

import json
import os
import re
import runpy
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import CLASSES, SMALL, photo, save_weights, write_photos, write_undecodable

from bench.peers import import_torchvision, require
from mnv2 import MobileNetV2, audit, audit_report, caption, data, pil_pictures
from mnv2.audit_result import ALL, DECODE, NORMALISE, PIL, RESIZE, STEPS, Audit, Difference
from mnv2.audit_steps import Opened, Steps
from mnv2.config import PREPROCESSING
from mnv2.data import Loader, Profile, profile
from mnv2.distributed import World
from mnv2.engine import evaluate
from mnv2.fold import fold


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder whose val/ has photographs, some in 16 bits, of which PIL makes white ones."""
    root = tmp_path_factory.mktemp("data")
    write_photos(root / "val", 11)
    for number in range(5):
        shades = np.asarray(photo(50 + number, 70, 60).convert("L")).astype(np.uint16)
        Image.fromarray(shades * (40 + 50 * number) + 600).save(root / "val" / "bee" / f"deep{number}.png")
    return root


def run(*words) -> int:
    return audit.main([*SMALL, *map(str, words)])


def found(tmp_path, *words, status=0) -> dict:
    """What ``--json`` writes."""
    assert run(*words, "--json", tmp_path / "found.json") == status
    return json.loads((tmp_path / "found.json").read_text())


def pil_inputs(paths, transform: Profile) -> np.ndarray:
    pictures = (pil_pictures.centre(pil_pictures.opened(str(path)), transform) for path in paths)
    return np.stack([pil_pictures.normalised(picture, transform) for picture in pictures])


def dali_inputs(paths, transform: Profile) -> np.ndarray:
    loader = Loader(list(map(str, paths)), [0] * len(paths), transform, batch_size=len(paths), world=World())
    return next(iter(loader)).images.permute(0, 2, 3, 1).numpy()


def stepped(paths, *transforms, others=(), dtype=torch.float32):
    """The files through the steps, and what PIL opened."""
    opened = [
        Opened(path.name, str(path), path.read_bytes(), pil_pictures.kind(str(path)), pil_pictures.opened(str(path)))
        for path in paths
    ]
    cpu = torch.device("cpu")
    steps = Steps(transforms, others, device=cpu, dtype=dtype, batch_size=len(paths), threads=1)
    return steps.run(opened), opened


def test_differences_are_counted_as_numpy_counts_them():
    generator = np.random.default_rng(0)
    pairs = [generator.integers(0, 256, (2, height, 7, 3), dtype=np.uint8) for height in (5, 60000, 2)]
    difference = Difference()
    for number, (one, other) in enumerate(pairs):
        difference.add(str(number), one, other)
    levels = [np.abs(one.astype(float) - other) for one, other in pairs]
    whole = np.sort(np.concatenate([part.ravel() for part in levels]))
    assert difference.values == whole.size
    assert difference.mean == pytest.approx(whole.mean())
    assert difference.largest == whole.max()
    assert difference.over_one == (whole > 1).mean()
    for share in (0.01, 0.5, 0.999, 1.0):
        assert difference.quantile(share) == whole[max(0, int(np.ceil(share * len(whole))) - 1)]
    worst = max(range(3), key=lambda number: levels[number].mean())
    assert difference.worst == (pytest.approx(levels[worst].mean()), str(worst))


def test_differences_of_floats_have_the_unit_and_no_rounding():
    one, other = np.zeros((4, 4, 3), np.float32), np.full((4, 4, 3), 1 / 58, np.float32)
    difference = Difference()
    difference.add("x", one, other, (58.0, 58.0, 116.0))
    assert difference.largest == pytest.approx(2)
    assert difference.over_one == pytest.approx(1 / 3)  # a whole level, rounded up or down, isn't over one
    assert difference.quantile(0.5) == pytest.approx(1, rel=1 / 128)
    nothing = Difference()
    nothing.add("x", one, one)
    assert (nothing.mean, nothing.largest, nothing.over_one, nothing.quantile(0.999)) == (0, 0, 0, 0)
    assert nothing.worst is None


@pytest.mark.parametrize(("name", "filtering"), [("torchvision", "bilinear"), ("timm", "bicubic"), ("tf", "bilinear")])
def test_pils_side_is_torchvisions(name, filtering, folder):
    require("torchvision")
    import_torchvision()
    from torchvision import transforms

    transform = profile(name, 37)
    mean, std = ([value / 255 for value in values] for values in (transform.mean, transform.std))
    chain = [
        transforms.Resize(transform.shorter, transforms.InterpolationMode(filtering)),
        transforms.CenterCrop(37),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    for path in (folder / "val").rglob("*.jpg"):
        picture = pil_pictures.opened(str(path))
        theirs = transforms.Compose(chain)(picture).permute(1, 2, 0).numpy()
        assert np.array_equal(pil_pictures.normalised(pil_pictures.centre(picture, transform), transform), theirs)


@pytest.mark.parametrize("name", PREPROCESSING)
@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_steps_are_those_of_loader_and_pil(name, batch_size, folder, tmp_path):
    """End to end against the loader and PIL themselves; the figures don't depend on batches."""
    transform = profile(name, 32)
    words = ["--data_url", folder, "--preprocessing", name, "--batch_size", batch_size]
    figures = found(tmp_path, *words)["profiles"][name]["steps"]
    paths = sorted((folder / "val").rglob("*.*"))
    levels = np.abs(dali_inputs(paths, transform) - pil_inputs(paths, transform)) * np.float32(transform.std)
    assert figures[ALL]["mean_levels"] == pytest.approx(levels.mean(), rel=1e-5)
    assert figures[ALL]["largest_levels"] == pytest.approx(levels.max(), rel=1e-5)
    assert figures[ALL]["over_one_share"] == pytest.approx((levels > 1.5).mean())
    assert figures[ALL]["worst"]["picture"] == os.path.join("bee", "deep0.png")
    assert figures[DECODE]["worst"]["picture"] == os.path.join("bee", "deep0.png")
    # Each alone: of the same decoded pixels, and of the same resized ones.
    assert 0.05 < figures[RESIZE]["mean_levels"] < 0.3
    assert figures[RESIZE]["largest_levels"] <= (12 if transform.cubic else 1)
    assert 0 < figures[NORMALISE]["largest_levels"] < 1e-4


def test_without_the_decoders_difference_the_end_is_the_resizes(tmp_path):
    for number in range(4):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        photo(number, 80 + number, 60).save(tmp_path / "pictures" / f"{number}.png")
    steps = found(tmp_path, "--data_url", tmp_path / "pictures")["profiles"]["reference"]["steps"]
    assert steps[DECODE]["largest_levels"] == 0
    assert steps[ALL]["mean_levels"] == pytest.approx(steps[RESIZE]["mean_levels"], rel=1e-4)
    assert steps[ALL]["worst"]["picture"] == steps[RESIZE]["worst"]["picture"]


def weights_of_filter(size: int, wanted: int, cubic: bool) -> np.ndarray:
    """``[wanted, size]``: the antialiased triangle, or the cubic of Keys 1981 with a = -0.5, along one side."""
    support, scale = (2 if cubic else 1), size / wanted
    spread, matrix = max(scale, 1.0), np.zeros((wanted, size))
    for row in range(wanted):
        middle = (row + 0.5) * scale
        low, high = max(int(middle - support * spread + 0.5), 0), min(int(middle + support * spread + 0.5), size)
        x = np.abs((np.arange(low, high) - middle + 0.5) / spread)
        if cubic:
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            values = np.where(x < 1, near, np.where(x < 2, far, 0))
        else:
            values = np.maximum(0, 1 - x)
        matrix[row, low:high] = values / values.sum()
    return matrix


def resized(pixels: np.ndarray, transform: Profile, between) -> np.ndarray:
    """The profile's resize and crop in fp64, with ``between`` done to what comes of filtering along rows."""
    sides = [side * transform.shorter // min(pixels.shape[:2]) for side in pixels.shape[:2]]
    down, across = (weights_of_filter(a, b, transform.cubic) for a, b in zip(pixels.shape, sides, strict=False))
    rows = between(np.einsum("xw,hwc->hxc", across, pixels))
    result = rounded(np.einsum("yh,hxc->yxc", down, rows))
    top, left = (round((side - transform.resize) / 2) for side in sides)
    return result[top : top + transform.resize, left : left + transform.resize]


def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values.clip(0, 255) + 0.5)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_rounding_between_the_passes_is_what_resizing_differs_in(name, tmp_path):
    """PIL is the arithmetic that rounds and cuts off in between, DALI the one that doesn't."""
    transform = profile(name, 40)
    pixels = np.asarray(photo(5, 90, 70)).copy()
    pixels[::7], pixels[:, ::5] = 0, 255  # edges that a bicubic overshoots at
    path = tmp_path / "edges.png"
    Image.fromarray(pixels).save(path)
    made, _ = stepped([path], transform)
    batch = made.batches[transform]
    with_rounding, without = (resized(pixels, transform, between) for between in (rounded, lambda values: values))
    # But for halves, which go up or down by the last bits of a sum.
    assert (batch.crops[0] != with_rounding).mean() < 0.01
    assert (batch.dali_crops[0] != without).mean() < 0.03
    for made_so, arithmetic in ((batch.crops[0], with_rounding), (batch.dali_crops[0], without)):
        assert np.abs(made_so - arithmetic).max() <= 1
    assert (with_rounding != without).mean() > 0.1
    if transform.cubic:
        assert np.abs(with_rounding - without).max() > 1
        cut = resized(pixels, transform, lambda values: values.clip(0, 255))
        assert np.abs(with_rounding - cut).max() <= 1


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def without_adobes_marker(content: bytes) -> bytes:
    at = content.index(b"Adobe") - 4
    return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def decoded_otherwise(kind: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes a picture of that kind; what PIL and DALI make of it, by arithmetic on what was written."""
    picture, generator = photo(4, 31, 22), np.random.default_rng(1)
    grey = generator.integers(0, 65536, (22, 31))
    colour = generator.integers(0, 65536, (22, 31, 3))
    if kind in ("PNG I;16", "TIFF I;16", "PPM I of 16 bits"):
        Image.fromarray(grey.astype(np.uint16)).save(path, kind.split()[0])
        return np.stack([grey.clip(max=255)] * 3, -1), np.stack([np.round(grey / 257)] * 3, -1)
    if kind == "PNG RGB of 16 bits":
        path.write_bytes(png_of_16_bits(colour))
        return colour // 256, np.round(colour / 257)
    if kind == "TIFF P":
        palette = picture.quantize(64)
        palette.save(path, "TIFF")
        theirs = np.asarray(palette.convert("RGB"))
        return theirs, np.round(theirs * 256.0 / 257)
    if kind == "JPEG CMYK without Adobe's marker":
        picture.convert("CMYK").save(path, "JPEG", quality=90)
        path.write_bytes(without_adobes_marker(path.read_bytes()))
        inks = Image.open(path)
        return tuple(np.asarray(each.convert("RGB")) for each in (inks, Image.eval(inks, lambda ink: 255 - ink)))
    if kind == "TIFF RGB with an orientation":
        picture.save(path, "TIFF", tiffinfo={274: 6})
        return np.asarray(picture.transpose(Image.Transpose.ROTATE_270)), np.asarray(picture)
    assert kind == "TIFF LA"
    shades = generator.integers(0, 256, (22, 31, 2), dtype=np.uint8)
    Image.fromarray(shades, "LA").save(path, "TIFF")
    return np.stack([shades[..., 0]] * 3, -1), shades


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("PNG I;16", "PIL cuts 16-bit grey off at 255, DALI scales it to 8 bits"),
        ("TIFF I;16", "PIL cuts 16-bit grey off at 255, DALI scales it to 8 bits"),
        ("PPM I of 16 bits", "PIL cuts 16-bit grey off at 255, DALI scales it to 8 bits"),
        ("PNG RGB of 16 bits", "PIL takes the upper 8 of 16 bits, DALI rounds"),
        ("TIFF P", "PIL takes the upper 8 of a palette's 16 bits, DALI rounds"),
        ("JPEG CMYK without Adobe's marker", "DALI takes the inks for the inverse of what PIL takes them for"),
        ("TIFF RGB with an orientation", "PIL turns a TIFF by its orientation tag, DALI doesn't"),
        ("TIFF LA", "DALI takes a grey TIFF's transparency for green"),
    ],
)
def test_decoders_differ_for_the_causes_that_are_told(kind, cause, tmp_path):
    theirs, ours = decoded_otherwise(kind, tmp_path / "picture")
    transform = Profile(16, 18)
    made, opened = stepped([tmp_path / "picture"], transform)
    assert opened[0].kind == kind
    assert audit_report.cause(kind) == cause
    assert np.array_equal(opened[0].pixels, theirs)
    assert np.array_equal(made.pixels[0][..., : ours.shape[2]], ours)  # LA: red and green
    result = Audit({transform: ["x"]}, "x")
    result.add_decoded("picture", kind, opened[0].pixels, made.pixels[0])
    assert cause in " ".join(audit_report.why(result))


def test_yuv_tiffs_differ_by_rounding(tmp_path):
    picture = photo(4, 31, 22).convert("YCbCr")
    picture.save(tmp_path / "x.tiff")
    made, opened = stepped([tmp_path / "x.tiff"], Profile(16, 18))
    y, cb, cr = np.asarray(picture, float).transpose(2, 0, 1) - np.array([0, 128, 128])[:, None, None]
    exact = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)
    assert "round" in audit_report.cause(opened[0].kind)
    assert 0 < np.abs(made.pixels[0].astype(int) - opened[0].pixels).max() <= 1
    assert np.abs(exact - made.pixels[0]).max() < 1.1
    assert np.abs(exact - opened[0].pixels).max() < 1.1


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Pictures of a pixel, a row, far from square; grey, CMYK, transparent, with a palette, turned by EXIF."""
    folder = tmp_path_factory.mktemp("odd")
    for number, size in enumerate([(1, 1), (1, 7), (9, 1), (3, 2), (300, 2), (2, 300), (33, 32), (31, 64)]):
        photo(number, *size).save(folder / f"{number}.png")
    picture = photo(9, 61, 50)
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "inks.jpg")
    picture.quantize(32).save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(folder / "alpha.png")
    return folder


def test_odd_pictures_are_compared(odd, tmp_path, capsys):
    result = found(tmp_path, "--data_url", odd, "--preprocessing", "all")
    assert result["pictures"] == len(os.listdir(odd))
    assert not result["problems"]
    kinds = {"PNG RGB", "PNG RGBA", "PNG P", "JPEG L", "JPEG CMYK", "JPEG RGB 4:2:0"}
    assert set(result["kinds"]) == kinds
    assert sum(kind["pictures"] for kind in result["kinds"].values()) == result["pictures"]
    for kind in result["kinds"].values():
        assert kind["other_size"] == 0
        assert kind["largest_levels"] <= 1
    for name in ("reference", "torchvision", "tf"):
        assert result["profiles"][name]["steps"][ALL]["largest_levels"] < 1.01, name
    assert "Decoding" in capsys.readouterr().out


def test_predictions_are_those_of_evaluation_and_of_pil(model, weights, folder, tmp_path):
    """Right at first and flips, by the network itself on the loader's batches and on PIL's."""
    result = found(tmp_path, "--data_url", folder, "--pretrained", weights, "--preprocessing", "timm")
    paths = sorted((folder / "val").rglob("*.*"))
    labels = [CLASSES.index(path.parent.name) for path in paths]
    assert result["labelled"] == len(paths) == 16
    for name in PREPROCESSING:
        loader = Loader(list(map(str, paths)), labels, profile(name, 32), batch_size=16, world=World())
        expected = evaluate(fold(model), loader, 16, World())
        assert result["profiles"][name]["right"] == {"top1": expected.top1, "top5": expected.top5}
        assert (result["profiles"][name]["steps"] is None) == (name != "timm")
    steps, transform = result["profiles"]["timm"]["steps"], profile("timm", 32)
    with torch.inference_mode():
        theirs, ours = (
            fold(model)(torch.from_numpy(inputs(paths, transform)).permute(0, 3, 1, 2))
            for inputs in (pil_inputs, dali_inputs)
        )
    assert steps[PIL]["right"]["top1"] == (theirs.argmax(1) == torch.tensor(labels)).sum()
    assert steps[ALL]["right"]["top1"] == (ours.argmax(1) == torch.tensor(labels)).sum()
    expected = [i for i in range(16) if theirs[i].argmax() != ours[i].argmax()]
    flips = {flip["picture"]: flip for flip in steps[ALL]["flips"]}
    assert list(flips) == [str(paths[i].relative_to(folder / "val")) for i in expected]
    assert flips, "pictures of 16 bits were to be seen otherwise"
    for i, flip in zip(expected, flips.values(), strict=True):
        pil, dali = int(theirs[i].argmax()), int(ours[i].argmax())
        assert (flip["label"], flip["pil"], flip["dali"]) == (labels[i], pil, dali)
        assert (flip["pil_name"], flip["dali_name"]) == (CLASSES[pil], CLASSES[dali])
        assert flip["pil_margin"] == pytest.approx(float(theirs[i, pil] - theirs[i, dali]), abs=1e-4)
        assert flip["dali_margin"] == pytest.approx(float(ours[i, dali] - ours[i, pil]), abs=1e-4)


def test_a_flip_is_put_down_to_the_step_that_makes_it(weights, folder, tmp_path, capsys):
    words = ["--data_url", folder, "--pretrained", weights, "--preprocessing", "reference"]
    steps = found(tmp_path, *words)["profiles"]["reference"]["steps"]
    flipped = {step: [flip["picture"] for flip in steps[step]["flips"]] for step in (PIL, *STEPS)}
    assert flipped[DECODE], "pictures of 16 bits were to be seen otherwise"
    deep = os.path.join("bee", "deep")
    assert all(name.startswith(deep) for name in flipped[DECODE])
    assert flipped[PIL] == []
    assert not any(name.startswith(deep) for name in flipped[RESIZE] + flipped[NORMALISE])
    assert set(flipped[DECODE]) <= set(flipped[ALL])
    lines = [line for line in capsys.readouterr().out.splitlines() if ", which is 1 bee: PIL says " in line]
    assert {line.partition(",")[0] for line in lines} >= set(flipped[DECODE])
    ends = {line.partition(",")[0]: line.rpartition("(")[2] for line in lines}
    assert [ends[name] for name in flipped[DECODE]] == ["decode, end to end)"] * len(flipped[DECODE])


def test_half_precision_is_that_of_the_loader(weights, folder, tmp_path):
    words = ["--data_url", folder, "--pretrained", weights, "--precision", "fp16"]
    steps = found(tmp_path, *words)["profiles"]["torchvision"]["steps"]
    assert steps[NORMALISE]["largest_levels"] < 0.1
    made, _ = stepped([folder / "val" / "bee" / "001.jpg"], Profile(8, 9), others=[Profile(8, 8)], dtype=torch.float16)
    inputs = [*made.batches[Profile(8, 9)].inputs.values(), made.others[Profile(8, 8)]]
    assert {pixels.dtype for pixels in inputs} == {np.dtype(np.float16)}


def test_profiles_that_coincide_are_compared_once(folder, tmp_path, capsys):
    result = found(tmp_path, "--data_url", folder, "--preprocessing", "torchvision", "--resize", "224")
    assert result["profiles"]["reference"]["steps"] == result["profiles"]["torchvision"]["steps"] is not None
    assert result["profiles"]["timm"]["steps"] is None
    out = capsys.readouterr().out
    assert "reference and torchvision: short side 256, centre 224, filter bilinear, mean 123.675 " in out
    assert re.search(r"timm +256 +224 +bicubic", out)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [0]), (3, [0, 3, 7]), (11, range(11)), (99, range(11)), (0, range(11))]
)
def test_pictures_are_chosen_evenly(most, expected, tmp_path):
    paths = write_photos(tmp_path, 11)
    config = audit.AuditConfig(data_url=str(tmp_path), pictures=most)
    listing = audit.list_pictures(config)
    assert listing.paths == [str(paths[number]) for number in expected]
    assert listing.names == [paths[number].parent.name for number in expected]
    assert listing.classes == list(CLASSES)  # all that are there, or numbers would depend on what is chosen


def test_what_tells_classes(model, weights, tmp_path, capsys):
    """Class folders with or without val/, a file for a flat val/; folders of other names tell none."""
    write_photos(tmp_path / "whole" / "val", 4)
    write_photos(tmp_path / "other", 4, classes=("cat", "dog"))
    flat = tmp_path / "flat" / "val"
    flat.mkdir(parents=True)
    for number, name in enumerate(("cat", "ant")):
        photo(number, 40, 40).save(flat / f"{name}.png")
    words = ["--pretrained", weights]
    assert found(tmp_path, "--data_url", tmp_path / "whole", *words)["labelled"] == 4
    assert found(tmp_path, "--data_url", tmp_path / "whole" / "val", *words)["labelled"] == 4
    assert found(tmp_path, "--data_url", tmp_path / "flat", *words)["labelled"] == 0
    save_weights(tmp_path / "unnamed.pt", model, None)
    for name, labelled in (("whole", 4), ("other", 0)):  # of three folders for three outputs, and of two
        unnamed = found(tmp_path, "--data_url", tmp_path / name, "--pretrained", tmp_path / "unnamed.pt")
        assert unnamed["labelled"] == labelled
    capsys.readouterr()
    result = found(tmp_path, "--data_url", tmp_path / "other", *words)
    out = capsys.readouterr().out
    assert "no accuracy (--class_index: the weights' own record gives 3 classes, and 'dog' is not among them)" in out
    assert "top-1" not in out
    assert result["labelled"] == 0
    (tmp_path / "labels.txt").write_text("cat.png cat\nant.png ant\n")
    labelled = found(tmp_path, "--data_url", tmp_path / "flat", *words, "--val_labels", tmp_path / "labels.txt")
    assert labelled["labelled"] == 2
    assert run("--data_url", tmp_path / "other", *words, "--class_index", "imagenet") == 1
    assert "'cat' is not among them" in capsys.readouterr().err


def test_bad_files_are_named_and_the_others_compared(odd, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    write_photos(pictures, 5)
    write_undecodable(pictures / "ant" / "bad.png")
    (pictures / "ant" / "text.jpg").write_text("no picture")
    (pictures / "bee" / "empty.jpg").touch()
    result = found(tmp_path, "--data_url", pictures, "--batch_size", "2", status=1)
    assert result["pictures"] == 5
    problems = {Path(problem["path"]).name: problem["problem"] for problem in result["problems"]}
    assert problems.pop("bad.png").startswith("can't be decoded by PIL: ")
    assert problems == {"text.jpg": "is not a picture that can be decoded", "empty.jpg": "is empty"}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mnv2.audit: ")]
    assert len(lines) == 3
    assert f"mnv2.audit: {pictures / 'bee' / 'empty.jpg'} is empty" in lines


def test_what_dali_alone_cant_decode_is_named(tmp_path, monkeypatch, capsys):
    """PIL is made to find pixels in a file that DALI fails at, in a batch with others."""
    pictures = tmp_path / "pictures"
    write_photos(pictures, 4)
    write_undecodable(pictures / "ant" / "bad.png")
    opened = pil_pictures.opened
    monkeypatch.setattr(
        pil_pictures, "opened", lambda path: photo(1, 9, 9) if path.endswith("bad.png") else opened(path)
    )
    result = found(tmp_path, "--data_url", pictures, status=1)
    assert result["pictures"] == 4
    assert result["problems"] == [
        {"path": str(pictures / "ant" / "bad.png"), "problem": "can be decoded by PIL and not by DALI"}
    ]
    os.remove(pictures / "ant" / "bad.png")
    whole = found(tmp_path, "--data_url", pictures)
    assert whole["profiles"] == result["profiles"]


def test_a_failure_of_no_file_is_one_line(folder, monkeypatch, capsys):
    def fails(self, pictures):
        raise RuntimeError("Critical error in pipeline:\nbad_alloc in resize\nmore")

    monkeypatch.setattr(Steps, "run", fails)
    assert run("--data_url", folder) == 1
    assert capsys.readouterr().err == "mnv2.audit: DALI failed at no single file: bad_alloc in resize\n"


def test_numbers_that_arent_finite_end_the_audit(model, folder, tmp_path, capsys):
    broken = MobileNetV2(0.35, num_classes=3)
    broken.load_state_dict(model.state_dict())
    broken.classifier[1].weight.data[1] = 3e38
    save_weights(tmp_path / "w", broken, list(CLASSES))
    assert run("--data_url", folder, "--pretrained", tmp_path / "w") == 1
    assert "the network gives numbers that aren't finite, for ant/000.jpg or one of the next" in capsys.readouterr().err


def test_folders_with_nothing_to_compare_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_text("no picture")
    (tmp_path / "bad" / "notes.txt").write_text("")
    for name, message in {
        "missing": f"--data_url: expected a folder of pictures, got {tmp_path / 'missing'}, which is none",
        "empty": f"--data_url: expected pictures in {tmp_path / 'empty'}, got none",
        "bad": f"--data_url: expected a picture in {tmp_path / 'bad'} that both can decode, got none",
    }.items():
        assert run("--data_url", tmp_path / name, "--json", tmp_path / "found.json") == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"mnv2.audit: {message}"
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrained", "missing.pt"], "--pretrained: can't read missing.pt: No such file or directory"),
        (["--json", "missing/found.json"], "--json: can't write to missing: No such file or directory"),
        (["--val_labels", "missing.txt"], "--val_labels: can't read missing.txt: No such file or directory"),
    ],
)
def test_what_is_missing_is_one_line(words, message, folder, capsys):
    assert run("--data_url", folder, *words) == 1
    assert capsys.readouterr().err == f"mnv2.audit: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "-1"], "--pictures: expected a number from 0 up, got -1"),
        (["--preprocessing", "keras"], "invalid choice: 'keras'"),
        (["--picture", "3"], "unrecognized arguments: --picture"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_isnt_installed_is_named(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(caption, "_ABSENT", ImportError("No module named 'PIL'"))
        assert run("--data_url", folder) == 1
    assert capsys.readouterr().err == (
        "mnv2.audit: the comparison with PIL: needs Pillow (No module named 'PIL'): pip install pillow\n"
    )
    monkeypatch.setattr(data, "_ABSENT", ImportError("No module named 'nvidia.dali'"))
    assert run("--data_url", folder) == 1
    assert "mnv2.audit: the loader needs NVIDIA DALI (No module named 'nvidia.dali')" in capsys.readouterr().err


def test_one_process_compares(folder):
    config = audit.AuditConfig(data_url=str(folder))
    with pytest.raises(ValueError, match="expected one process, got 2"):
        audit.audit(config, World(0, 2))


def test_a_file_that_cant_be_written_stays_as_it_was(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "found.json").write_text("before")

    def fails(*arguments, **keywords):
        raise OSError("the disk is full")

    monkeypatch.setattr(json, "dump", fails)
    assert run("--data_url", folder, "--json", tmp_path / "found.json") == 1
    assert capsys.readouterr().err == f"mnv2.audit: can't write {tmp_path / 'found.json'}: the disk is full\n"
    assert (tmp_path / "found.json").read_text() == "before"
    assert os.listdir(tmp_path) == ["found.json"]


def test_the_gpu_pipeline_builds_without_a_gpu():
    steps = Steps(
        [profile("timm", 32)],
        [profile("tf", 32)],
        device=torch.device("cuda"),
        dtype=torch.float16,
        batch_size=2,
        threads=1,
    )
    pipeline = steps._build()
    assert pipeline.serialize()
    devices = {(operator.name.split("_")[-1], operator._op.device) for operator in pipeline._ops}
    assert ("Image", "mixed") in devices or any(device == "mixed" for _, device in devices)
    assert all(operator._op.device == "gpu" for operator in pipeline._ops if "Resize" in operator.name)


@pytest.mark.parametrize(
    ("resize", "right", "flips"),
    [
        pytest.param(224, {"top1": 170, "top5": 195}, 0, id="none is resized"),
        pytest.param(160, {"top1": 145, "top5": 188}, 2, id="resized", marks=pytest.mark.exhaustive),
    ],
)
def test_real_photographs_are_judged_as_expected(resize, right, flips, test_data, tmp_path):
    words = ["--data_url", test_data / "imagenet_samples", "--preprocessing", "torchvision", "--resize", resize]
    words += ["--pretrained", test_data / "mobilenetv2_1.0_224_real.safetensors", "--device", "cpu"]
    assert audit.main([*map(str, words), "--json", str(tmp_path / "found.json")]) == 0
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["pictures"] == result["labelled"] == 200
    steps = result["profiles"]["torchvision"]["steps"]
    assert steps[PIL]["right"] == steps[ALL]["right"] == right
    assert len(steps[ALL]["flips"]) <= flips
    assert steps[DECODE]["flips"] == steps[NORMALISE]["flips"] == []
    assert steps[RESIZE]["largest_levels"] <= (flips > 0)


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["audit", "--data_url", "missing", "--device", "cpu"])
    monkeypatch.delitem(sys.modules, "mnv2.audit")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mnv2.audit", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr() == (
        "",
        "mnv2.audit: --data_url: expected a folder of pictures, got missing, which is none\n",
    )
