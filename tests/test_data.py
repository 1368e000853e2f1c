from __future__ import annotations

import importlib
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from samples import photo, write_undecodable

import mnv2
from mnv2 import data, pil_pictures
from mnv2.config import PREPROCESSING
from mnv2.data import Augmentation, Loader, Profile, SyntheticLoader, picture_pipeline, profile, steps_per_epoch
from mnv2.distributed import World
from mnv2.errors import InputError, RunError

PROFILES = ("reference", "torchvision", "torchvision_v2", "timm", "tf")


@pytest.fixture(scope="module")
def paths(photos):
    return sorted(map(str, (photos / "train").rglob("*.jpg")))


def loader(paths, transform, batch_size=4, rank=0, size=1, **options):
    world = World(rank, size)
    labels = list(range(len(paths)))
    return Loader(paths, labels, transform, batch_size=batch_size, world=world, **options)


def pil(path, transform: Profile) -> np.ndarray:
    """The profile as torchvision and PIL have it, HWC."""
    return pil_pictures.normalised(pil_pictures.centre(pil_pictures.opened(path), transform), transform)


def test_profiles_are_those_published():
    assert profile("reference", 192).shorter == 224
    assert [profile("torchvision", resize).shorter for resize in (224, 192, 160, 128, 96)] == [256, 219, 182, 146, 109]
    assert profile("timm", 224) == Profile(224, 256, cubic=True)
    assert profile("tf", 192).shorter == 219
    assert [profile("torchvision_v2", resize).shorter for resize in (224, 192)] == [232, 199]
    assert set(PROFILES) == set(PREPROCESSING)
    assert (profile("tf", 224).mean, profile("tf", 224).std) == ((127.5,) * 3, (127.5,) * 3)
    assert profile("torchvision", 224).mean == pytest.approx((123.675, 116.28, 103.53))
    assert profile("torchvision", 224).std == pytest.approx((58.395, 57.12, 57.375))
    with pytest.raises(ValueError, match="name: expected one of .* got 'keras'"):
        profile("keras", 224)


@pytest.mark.parametrize("name", PROFILES)
def test_no_profile_crops_more_than_there_is(name):
    assert all(profile(name, resize).shorter >= resize for resize in range(1, 1025))
    with pytest.raises(ValueError, match="shorter: expected at least resize, 8, got 7"):
        Profile(8, 7)


@pytest.fixture(scope="module")
def odd_paths(tmp_path_factory) -> list[str]:
    """Pictures of a pixel, of a row, far from square, smaller than the crop, and of sides whose crop lies at a half."""
    folder = tmp_path_factory.mktemp("odd")
    sizes = (1, 1), (1, 7), (9, 1), (3, 2), (5, 5), (700, 2), (2, 700), (33, 32), (32, 35), (31, 64), (37, 36), (36, 37)
    paths = [str(folder / f"{number:02}.png") for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        photo(number, *size).save(path)
    return paths


@pytest.mark.parametrize("kind", ["paths", "odd_paths"])
@pytest.mark.parametrize("name", PROFILES)
def test_evaluation_is_what_pil_does(kind, name, request):
    paths, transform = request.getfixturevalue(kind), profile(name, 32)
    for batch in loader(paths, transform):
        for image, number in zip(batch.images, batch.numbers.tolist(), strict=True):
            if number >= 0:
                difference = (image.permute(1, 2, 0).numpy() - pil(paths[number], transform)) * transform.std
                # In units of 8-bit pixels, to which both round in between; a crop one pixel off gives over 2.
                assert np.abs(difference).mean() < 0.3


@pytest.mark.parametrize("size", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_evaluation_sees_every_picture_once(paths, size, batch_size):
    seen: Counter[int] = Counter()
    for rank in range(size):
        batches = loader(paths, Profile(16, 18), batch_size, rank, size)
        for _ in range(2):  # epochs
            got = list(batches)
            assert len(got) == len(batches)
            for batch in got:
                assert batch.images.shape == (batch_size, 3, 16, 16)
                real = batch.numbers >= 0
                assert torch.equal(batch.labels[real], batch.numbers[real])
                seen.update(batch.numbers[real].tolist())
    assert seen == Counter(range(len(paths))) + Counter(range(len(paths)))


def test_the_numbers_are_the_pictures(paths):
    """What arrives under a number is the picture of that number, with several processes too."""
    transform = Profile(16, 18, mean=(0, 0, 0), std=(1, 1, 1))
    for rank in range(3):
        for batch in loader(paths, transform, 3, rank, 3):
            for image, number in zip(batch.images, batch.numbers.tolist(), strict=True):
                if number >= 0:
                    assert np.abs(image.permute(1, 2, 0).numpy() - pil(paths[number], transform)).mean() < 1


@pytest.mark.parametrize(("size", "batch_size"), [(1, 4), (2, 4), (3, 3), (2, 11), (5, 1)])
def test_training_shares_an_epoch_out_and_drops_the_tail(paths, size, batch_size):
    ranks = [loader(paths, Augmentation(16), batch_size, rank, size, seed=5) for rank in range(size)]
    epochs = []
    for _ in range(3):
        seen = [batch.numbers.tolist() for batches in ranks for batch in batches]
        assert len(seen) == size * (23 // (size * batch_size)) == size * len(ranks[0])
        flat = [number for numbers in seen for number in numbers]
        assert len(set(flat)) == len(flat) == len(seen) * batch_size
        epochs.append(flat)
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_seed_fixes_order_and_augmentation(paths):
    def epoch(seed, rank=0):
        batches = loader(paths, Augmentation(16), 4, rank, 2, seed=seed)
        return [(batch.numbers, batch.images.clone()) for _ in range(2) for batch in batches]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other, strict=True))


def test_augmentation_crops_and_mirrors(tmp_path):
    """A picture whose red and green are the place: a crop's place, size and mirroring can be read off its pixels."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(tmp_path / "ramp.png")

    def crops(**options):
        plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
        batches = loader([str(tmp_path / "ramp.png")] * 400, Augmentation(20, **options, **plain), 100)
        images = torch.cat([batch.images for batch in batches])
        across = (images[:, 0, :, -1] - images[:, 0, :, 0]).mean(1) / 19 * 20  # width, negative where mirrored
        down = (images[:, 1, -1, :] - images[:, 1, 0, :]).mean(1) / 19 * 20
        return across, down, images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))

    across, down, *_ = crops(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    assert torch.allclose(across, torch.tensor(200.0), atol=2)
    assert torch.allclose(down, torch.tensor(200.0), atol=2)

    across, down, x_centre, y_centre = crops(scale=(0.08, 1.0), ratio=(0.75, 1.333), hflip=0.5)
    area = across.abs() * down / 200**2
    assert area.min() > 0.06
    assert area.min() < 0.2 < 0.8 < area.max() < 1.02
    ratio = across.abs() / down
    assert 0.68 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.45
    assert 0.4 < (across < 0).float().mean() < 0.6
    assert x_centre.std() > 10
    assert y_centre.std() > 10
    assert bool((crops(hflip=1.0)[0] < 0).all())


def test_batches_are_channels_last_without_a_copy(paths):
    batch = next(iter(loader(paths, Profile(16, 18))))
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images._base is not None
    assert batch.images._base.shape == (4, 16, 16, 3)
    assert batch.labels.dtype == batch.numbers.dtype == torch.int64


def test_batches_that_are_kept_stay_as_they_were(paths):
    kept = [(batch, batch.images.clone()) for batch in loader(paths, Profile(16, 18), 2)]
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


def test_half_precision_on_request(paths):
    whole = loader(paths, Profile(16, 18))
    half = loader(paths, Profile(16, 18), dtype=torch.float16)
    for a, b in zip(whole, half, strict=True):
        assert b.images.dtype == torch.float16
        torch.testing.assert_close(b.images.float(), a.images, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.float16, got torch.bfloat16"):
        loader(paths, Profile(16, 18), dtype=torch.bfloat16)


def test_every_kind_of_picture_is_decoded(tmp_path):
    kinds = {
        "grey.jpg": "L", "cmyk.jpg": "CMYK", "rgba.png": "RGBA", "palette.png": "P", "deep.png": "I;16", "a.bmp": "RGB",
        "a.webp": "RGB", "a.tiff": "RGB", "a.ppm": "RGB", "a.jp2": "RGB",
    }  # fmt: skip
    for name, mode in kinds.items():
        picture = photo(3, 60, 50)
        picture = picture.convert("L").convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        picture.save(tmp_path / name)
    paths = [str(tmp_path / name) for name in kinds]
    assert sum(len(batch.images) for batch in loader(paths, Profile(32, 36), 1)) == len(kinds)


def test_pictures_are_not_turned_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    photo(3, 60, 40).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    transform = Profile(32, 36)
    image = next(iter(loader([str(tmp_path / "turned.jpg")], transform, 1))).images[0]
    assert np.abs(image.permute(1, 2, 0).numpy() - pil(tmp_path / "turned.jpg", transform)).mean() < 0.02


def test_a_file_that_fails_to_decode_is_named(paths, tmp_path):
    bad = tmp_path / "bad.png"
    write_undecodable(bad)
    for transform in (Profile(16, 18), Augmentation(16)):
        with pytest.raises(InputError, match=r"bad.png looks whole but can't be decoded; mend or remove it"):
            for _ in loader([*paths, str(bad)], transform, 2):
                pass


def test_a_file_that_is_emptied_after_the_check_is_named(paths, tmp_path):
    """The reader fails ahead of the decoder, at a sample that isn't the decoder's next."""
    copies = []
    for path in paths:
        copies.append(str(tmp_path / f"{len(copies)}.jpg"))
        shutil.copy(path, copies[-1])
    open(copies[13], "w").close()
    with pytest.raises(InputError, match=r"/13.jpg is empty by now; mend or remove it"):
        list(loader(copies, Profile(16, 18), 2))


def test_a_failure_of_no_file_is_one_line(paths, monkeypatch):
    monkeypatch.setattr(data, "first_undecodable", lambda *arguments: None)
    batches = loader(paths, Profile(16, 18))

    class Broken:
        def __next__(self):
            raise RuntimeError("Critical error in pipeline:\nbad_alloc in resize\nmore")

    batches._iterator = Broken()
    with pytest.raises(RunError, match=r"^the loader failed at no single file: bad_alloc in resize$"):
        next(iter(batches))


def test_an_error_of_the_users_own_is_not_taken_for_a_files(paths):
    def use():
        for _ in loader(paths, Profile(16, 18)):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="^out of memory$"):
        use()


def test_an_epoch_without_a_step_is_refused(paths):
    with pytest.raises(InputError, match="--batch_size: expected at most 11 for 23 pictures and 2 processes, got 12"):
        loader(paths, Augmentation(16), 12, 0, 2)
    assert steps_per_epoch(1_281_167, 64, 8) == 2502


def test_an_epoch_that_was_left_is_not_taken_up_again(paths):
    batches = loader(paths, Profile(16, 18))
    next(iter(batches))
    with pytest.raises(ValueError, match="left after 1 of 6 batches"):
        next(iter(batches))


@pytest.mark.parametrize(("batch_size", "size", "accumulate"), [(5, 1, 1), (4, 2, 1), (3, 1, 2), (23, 1, 1)], ids=str)
def test_a_loader_goes_on_from_anywhere(paths, batch_size, size, accumulate):
    """From the state after each batch of three epochs, the one after an epoch's last among them."""
    settings = {"batch_size": batch_size, "world": World(size - 1, size), "accumulate": accumulate, "threads": 1}

    def start(state=None):
        return Loader(paths, [0] * len(paths), Augmentation(16), seed=4, state=state, **settings)

    whole = start()
    assert len(whole) == len(paths) // (batch_size * size * accumulate) * accumulate
    given, states = [], [whole.state()]
    for _ in range(3):
        for batch in whole:
            given.append((batch.images.clone(), batch.numbers.tolist()))
            states.append(whole.state())
    for done, state in enumerate(states[:-1]):
        again = start(state)
        rest = [(batch.images.clone(), batch.numbers.tolist()) for batch in again]
        assert len(rest) == len(whole) - done % len(whole)
        rest += [(batch.images.clone(), batch.numbers.tolist()) for batch in again]
        for (images, numbers), (expected, same) in zip(rest, given[done:], strict=False):
            assert numbers == same
            assert torch.equal(images, expected)


def test_the_last_batch_outlives_the_start_of_the_next_epoch(paths):
    """The reader starts anew behind an epoch's last batch, which is still in use."""
    batches = list(loader(paths, Augmentation(16), 4))
    copies = [batch.images.clone() for batch in batches]
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))
    again = list(loader(paths, Augmentation(16), 4))
    assert all(torch.equal(one.images, other.images) for one, other in zip(batches, again, strict=True))


def test_a_state_that_is_none_is_not_taken_for_a_bad_file(paths):
    with pytest.raises(InputError, match="--resume: DALI can't go on from the state of its reader .* another version"):
        Loader(
            paths, [0] * 23, Augmentation(16), batch_size=4, world=World(), state={"position": 1, "reader": b"no state"}
        )


def test_labels_and_paths_must_match(paths):
    with pytest.raises(ValueError, match="labels: expected one for each of 23 paths, got 2"):
        Loader(paths, [0, 1], Profile(16, 18), batch_size=1, world=World())


@pytest.mark.parametrize("transform", [Augmentation(224), profile("timm", 192)], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_gpu_pipeline_builds_without_a_gpu(transform, dtype):
    """Serialising checks names, types and placement of every operator, and needs no device."""
    pipeline = picture_pipeline(
        ["a.jpg", "b.jpg"], transform, gpu=True, dtype=dtype, batch_size=2, num_threads=1, device_id=None
    )
    assert pipeline.serialize()
    devices = {operator.name: operator._op.device for operator in pipeline._ops}
    expected = {
        "Image": "mixed",
        "Resize": "gpu",
        "CropMirrorNormalize": "gpu",
    }  # decoding, and all that is done to pixels
    for kind, device in expected.items():
        found = [where for name, where in devices.items() if kind in name]
        assert found == [device], (kind, devices)


def test_synthetic_pictures_count_like_real_ones():
    for size in (1, 3, 8):
        seen = Counter()
        for rank in range(size):
            batches = SyntheticLoader(5, 10, resize=8, batch_size=2, world=World(rank, size), training=False)
            got = list(batches)
            assert len(got) == len(batches)
            assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in got)
            seen.update(number for batch in got for number in batch.numbers.tolist() if number >= 0)
        assert seen == Counter(range(5))
    assert len(SyntheticLoader(100, 10, resize=8, batch_size=8, world=World(0, 4), training=True)) == 3
    with pytest.raises(InputError, match="--batch_size: expected at most 5"):
        SyntheticLoader(5, 10, resize=8, batch_size=8, world=World(), training=True)


def test_without_dali_the_extra_is_named(monkeypatch, paths):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "mnv2.data")
    without = importlib.import_module("mnv2.data")
    monkeypatch.setattr(mnv2, "data", data)  # which an import has set
    for call in (
        lambda: without.Loader(paths, [0] * len(paths), without.Profile(16, 18), batch_size=1, world=World()),
        lambda: without.first_undecodable(paths),
    ):
        with pytest.raises(InputError, match=r"the loader needs NVIDIA DALI .*pip install 'mnv2\[cuda13\]'"):
            call()
    assert len(list(without.SyntheticLoader(4, 2, resize=8, batch_size=2, world=World(), training=False))) == 2


@pytest.mark.gpu
@pytest.mark.skipif(data._ABSENT is not None, reason="DALI isn't installed")
def test_the_gpu_pipeline_gives_the_cpus_pictures(paths):
    transform = Profile(32, 36)
    on_cpu = loader(paths, transform)
    on_gpu = Loader(
        paths, list(range(len(paths))), transform, batch_size=4, world=World(device=torch.device("cuda", 0))
    )
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(a.numbers, b.numbers)
        assert b.images.device.type == b.labels.device.type == "cuda"
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert (a.images - b.images.cpu()).abs().mean() < 0.02
