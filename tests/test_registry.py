"""Published weights: the tables against those of the publishers, typed from their pages on their own."""

from __future__ import annotations

import re
from collections import Counter
from urllib.parse import urlsplit

import pytest

from kernels.common import PADDINGS
from mnv2 import registry
from mnv2.data import profile
from mnv2.errors import InputError
from mnv2.model import VARIANTS
from mnv2.registry import PUBLISHED, SOURCES, by_digest, by_file_name

ALL_VARIANTS = [(alpha, resize) for alpha, resolutions in VARIANTS.items() for resize in resolutions]

# The table of MindSpore vision's examples/classification/mobilenetv2/README.md: its accuracies, and TensorFlow's.
MINDSPORE = """
mobilenet_v2_1.4_224 | 75.43 | 92.5 | 75.0 | 92.5
mobilenet_v2_1.3_224 | 74.7 | 92.3 | 74.4 | 92.1
mobilenet_v2_1.0_224 | 72.4 | 90.8 | 71.8 | 91.0
mobilenet_v2_1.0_192 | 71.3 | 90.2 | 70.7 | 90.1
mobilenet_v2_1.0_160 | 69.7 | 89.1 | 68.8 | 89.0
mobilenet_v2_1.0_128 | 67.1 | 86.9 | 65.3 | 86.9
mobilenet_v2_1.0_96 | 61.9 | 83.6 | 60.3 | 83.2
mobilenet_v2_0.75_224 | 70.3 | 89.4 | 69.8 | 89.6
mobilenet_v2_0.75_192 | 69.2 | 88.7 | 68.7 | 88.9
mobilenet_v2_0.75_160 | 67.3 | 87.4 | 66.4 | 87.3
mobilenet_v2_0.75_128 | 64.5 | 85.4 | 63.2 | 85.3
mobilenet_v2_0.75_96 | 59.4 | 81.6 | 58.8 | 81.6
mobilenet_v2_0.5_224 | 66.1 | 86.3 | 65.4 | 86.4
mobilenet_v2_0.5_192 | 64.7 | 85.2 | 63.9 | 85.4
mobilenet_v2_0.5_160 | 61.9 | 83.4 | 61.0 | 83.2
mobilenet_v2_0.5_128 | 58.7 | 80.9 | 57.7 | 80.8
mobilenet_v2_0.5_96 | 52.9 | 76.3 | 51.2 | 75.8
mobilenet_v2_0.35_224 | 61.9 | 83.2 | 60.3 | 82.9
mobilenet_v2_0.35_192 | 59.5 | 81.6 | 58.2 | 81.2
mobilenet_v2_0.35_160 | 57.6 | 79.8 | 55.7 | 79.1
mobilenet_v2_0.35_128 | 52.8 | 76.3 | 50.8 | 75.0
mobilenet_v2_0.35_96 | 47.5 | 71.3 | 45.5 | 70.4
"""
# The table of checkpoints in TF-Slim's nets/mobilenet/README.md.
TF_SLIM = """
mobilenet_v2_1.4_224 | 582 | 6.06 | 75.0 | 92.5 | 138.0
mobilenet_v2_1.3_224 | 509 | 5.34 | 74.4 | 92.1 | 123.0
mobilenet_v2_1.0_224 | 300 | 3.47 | 71.8 | 91.0 | 73.8
mobilenet_v2_1.0_192 | 221 | 3.47 | 70.7 | 90.1 | 55.1
mobilenet_v2_1.0_160 | 154 | 3.47 | 68.8 | 89.0 | 40.2
mobilenet_v2_1.0_128 | 99 | 3.47 | 65.3 | 86.9 | 27.6
mobilenet_v2_1.0_96 | 56 | 3.47 | 60.3 | 83.2 | 17.6
mobilenet_v2_0.75_224 | 209 | 2.61 | 69.8 | 89.6 | 55.8
mobilenet_v2_0.75_192 | 153 | 2.61 | 68.7 | 88.9 | 41.6
mobilenet_v2_0.75_160 | 107 | 2.61 | 66.4 | 87.3 | 30.4
mobilenet_v2_0.75_128 | 69 | 2.61 | 63.2 | 85.3 | 21.9
mobilenet_v2_0.75_96 | 39 | 2.61 | 58.8 | 81.6 | 14.2
mobilenet_v2_0.5_224 | 97 | 1.95 | 65.4 | 86.4 | 28.7
mobilenet_v2_0.5_192 | 71 | 1.95 | 63.9 | 85.4 | 21.1
mobilenet_v2_0.5_160 | 50 | 1.95 | 61.0 | 83.2 | 14.9
mobilenet_v2_0.5_128 | 32 | 1.95 | 57.7 | 80.8 | 9.9
mobilenet_v2_0.5_96 | 18 | 1.95 | 51.2 | 75.8 | 6.4
mobilenet_v2_0.35_224 | 59 | 1.66 | 60.3 | 82.9 | 19.7
mobilenet_v2_0.35_192 | 43 | 1.66 | 58.2 | 81.2 | 14.6
mobilenet_v2_0.35_160 | 30 | 1.66 | 55.7 | 79.1 | 10.5
mobilenet_v2_0.35_128 | 20 | 1.66 | 50.8 | 75.0 | 6.9
mobilenet_v2_0.35_96 | 11 | 1.66 | 45.5 | 70.4 | 4.5
"""
# d-li14's README, by file; the accuracies of timm's results-imagenet.csv and of torchvision's page.
OTHERS = {
    "mobilenetv2-c5e733a8.pth": (72.834, 91.060),
    "mobilenetv2_1.0-0c6065bc.pth": (72.192, 90.534),
    "mobilenetv2_0.75-dace9791.pth": (69.952, 88.986),
    "mobilenetv2_0.5-eaa6f9ad.pth": (64.592, 85.392),
    "mobilenetv2_0.35-b2e15951.pth": (60.092, 82.172),
    "mobilenetv2_0.25-b61d2159.pth": (52.352, 75.932),
    "mobilenetv2_192x192-e423d99e.pth": (71.076, 89.760),
    "mobilenetv2_160x160-64dc7fa1.pth": (69.504, 88.848),
    "mobilenetv2_128x128-fd66a69d.pth": (66.740, 86.952),
    "mobilenetv2_96x96-ff0e83d8.pth": (62.696, 84.046),
    "mobilenetv2_140_ra-21a4e913.pth": (76.520, 92.986),
    "mobilenetv2_100_ra-b33bc2c4.pth": (72.976, 91.010),
    "mobilenetv2_100.ra_in1k.safetensors": (72.976, 91.010),
    "mobilenetv2_050-3d30d450.pth": (65.950, 86.088),
    "mobilenet_v2-b0353104.pth": (71.878, 90.286),
    "mobilenet_v2-7ebf99e0.pth": (72.154, 90.822),
}


def table(text):
    """Numbers of a table by variant."""
    rows = [line.split(" | ") for line in text.split("\n") if line]
    return {tuple(map(float, name.split("_")[2:])): [float(cell) for cell in cells] for name, *cells in rows}


def of(origin):
    return [source for source in SOURCES if source.origin == origin]


def test_accuracies_are_those_of_the_publishers():
    mindspore, tf_slim = table(MINDSPORE), table(TF_SLIM)
    assert list(PUBLISHED) == ALL_VARIANTS == list(mindspore) == list(tf_slim)
    for variant, found in PUBLISHED.items():
        assert list(found["MindSpore"]) == mindspore[variant][:2]
        assert list(found["Google"]) == mindspore[variant][2:] == tf_slim[variant][2:4]
    assert {variant for variant, found in PUBLISHED.items() if "d-li14" in found} == {
        *((1.0, resize) for resize in (224, 192, 160, 128, 96)),
        *((alpha, 224) for alpha in (0.75, 0.5, 0.35)),
    }
    assert PUBLISHED[1.0, 224]["d-li14"] == (72.192, 90.534)


def test_every_variant_has_what_covers_all():
    for origin, accuracies in (("mindspore", table(MINDSPORE)), ("tf-slim", table(TF_SLIM)), ("keras", None)):
        found = {(source.alpha, source.resize): source for source in of(origin)}
        assert len(of(origin)) == len(found) == 22
        assert list(found) == ALL_VARIANTS
        for variant, source in found.items():
            if accuracies:
                columns = slice(0, 2) if origin == "mindspore" else slice(2, 4)
                assert list(source.accuracy) == accuracies[variant][columns]
            elif variant == (1.0, 224):
                assert source.accuracy == (71.3, 90.1)  # https://keras.io/api/applications
            else:
                assert source.accuracy == PUBLISHED[variant]["Google"]


def test_the_others_are_listed_with_their_accuracy():
    found = {source.name: source for source in SOURCES if source.origin in ("torchvision", "timm", "d-li14")}
    assert {name: tuple(source.accuracy) for name, source in found.items()} == OTHERS
    variants = {(source.alpha, source.resize) for source in of("transformers")}
    assert variants == {(1.4, 224), (1.0, 224), (0.75, 160), (0.35, 96)}
    assert all(source.accuracy == PUBLISHED[source.alpha, source.resize]["Google"] for source in of("transformers"))


def test_names_are_one_files_alone():
    assert max(Counter(source.name for source in SOURCES).values()) == 1
    assert all(by_file_name(source.name) is source for source in SOURCES)
    assert by_file_name("model.safetensors") is None
    for source in SOURCES:
        assert max(Counter(file.name for file in source.files).values()) == 1
        assert all(re.fullmatch(r"[\w.-]+", name) for name in (source.name, *(file.name for file in source.files)))
        assert source.is_folder or source.files[0].name == source.name
        alpha, resize = (
            re.search(r"_(\d\.\d+)(?:_|-|$)", source.name),
            re.search(r"_(96|128|160|192|224)\b", source.name),
        )
        assert alpha is None or float(alpha[1]) == source.alpha
        assert resize is None or int(resize[1]) == source.resize


def test_urls_are_https_and_lead_to_one_file_each():
    urls = [file.url for source in SOURCES for file in source.files]
    assert max(Counter(urls).values()) == 1
    for url in (*urls, *(source.page for source in SOURCES)):
        parts = urlsplit(url)
        assert (parts.scheme, parts.query, parts.fragment) == ("https", "", "")
        assert "." in parts.netloc
        assert "//" not in parts.path
    for source in SOURCES:
        hub = source.origin == "timm" and "huggingface.co" in source.weights.url
        assert all(hub or file.url.endswith("/" + file.name) for file in source.files)


def test_checksums_are_whole_or_what_the_name_says():
    for source in SOURCES:
        known = source.weights.sha256
        assert all(file.sha256 is None for file in source.files[:-1])
        named = re.search(r"-([0-9a-f]{8})\.pth$", source.name)
        if known is None:
            assert source.origin in ("mindspore", "keras", "tf-slim")
        else:
            assert re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}", known)
            assert named is None or known.startswith(named[1])
    assert all(re.search(r"-[0-9a-f]{8}\.pth$", source.name) for source in of("d-li14"))


def test_the_network_of_an_origin_and_its_pictures():
    google = ("transformers", "keras", "tf-slim")
    orders = dict.fromkeys(("transformers", "tf-slim"), "background first") | {"mindspore": "last unused"}
    profiles = dict.fromkeys(google, "tf") | {"mindspore": "reference", "timm": "timm"}
    for source in SOURCES:
        assert source.padding in PADDINGS
        expected = ("same", 1e-3) if source.origin in google else ("symmetric", 1e-5)
        assert (source.padding, source.norm_eps) == expected
        assert source.preprocessing.removesuffix("_v2") == profiles.get(source.origin, "torchvision")
        assert source.classes == orders.get(source.origin, "imagenet")
        assert source.package == ("h5py" if source.origin == "keras" else None)
        assert (source.conversion is not None) == (source.origin == "tf-slim")
        if source.origin == "d-li14":
            assert profile(source.preprocessing, source.resize).shorter == int(source.resize / 0.875)
    assert by_file_name("mobilenet_v2-7ebf99e0.pth").preprocessing == "torchvision_v2"


def test_what_needs_least_comes_first():
    origins = {variant: [source.origin for source in registry.sources(*variant)] for variant in ALL_VARIANTS}
    assert origins[1.0, 224] == [
        *("timm", "timm", "d-li14", "d-li14", "torchvision", "torchvision", "transformers"),
        *("mindspore", "keras", "tf-slim"),
    ]
    assert origins[0.75, 192] == ["mindspore", "keras", "tf-slim"]
    assert origins[0.75, 160] == ["transformers", "mindspore", "keras", "tf-slim"]
    assert all(found[-3:] == ["mindspore", "keras", "tf-slim"] for found in origins.values())
    assert registry.sources(1.0, 224)[0].name == "mobilenetv2_100.ra_in1k.safetensors"
    for variant in ALL_VARIANTS:
        ready = [source for source in registry.sources(*variant) if source.weights.sha256 and not source.package]
        assert [source.accuracy.top1 for source in ready] == sorted((s.accuracy.top1 for s in ready), reverse=True)
    assert registry.sources(0.6, 224) == registry.sources(0.75, 100) == []


def test_alternatives_are_the_nearest_of_each_origin():
    found = [(source.origin, source.resize) for source in registry.alternatives(0.75, 192)]
    assert found == [("mindspore", 192), ("keras", 192), ("d-li14", 224), ("transformers", 160)]
    found = [(source.origin, source.resize) for source in registry.alternatives(1.3, 96)]
    assert found == [("mindspore", 224), ("keras", 224)]
    assert registry.alternatives(0.6, 224) == []


def test_a_file_is_known_by_its_checksum():
    whole = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
    assert by_digest(whole).name == "mobilenet_v2-b0353104.pth"
    assert by_digest(whole.upper()).name == "mobilenet_v2-b0353104.pth"
    assert by_digest(whole[:-1] + "0") is None
    assert by_digest("dace9791" + "0" * 56).name == "mobilenetv2_0.75-dace9791.pth"
    assert by_digest("dace9792" + "0" * 56) is None
    with pytest.raises(ValueError, match="sha256: expected 64 hexadecimal digits, got 'dace9791'"):
        by_digest("dace9791")


def test_the_table_for_people():
    lines = registry.listing().splitlines()
    assert len(lines) == 1 + len(SOURCES)
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["variant", "origin", "top-1", "top-5", "MB", "sha256", "licence", "file"]
    file = lines[0].index("file")
    assert {line[file:].split("/")[0].split(" ")[0] for line in lines[1:]} == {source.name for source in SOURCES}
    rows = registry.listing(0.35, 96).splitlines()[1:]
    assert [re.split(r" +", row) for row in rows] == [
        ["0.35_96", "transformers", "45.5", "70.4", "6.81", "whole", "other", "mobilenet_v2_0.35_96/"],
        ["0.35_96", "mindspore", "47.5", "71.3", "-", "-", "not", "stated", "mobilenet_v2_0.35_96.ckpt"],
        [
            *("0.35_96", "keras", "45.5", "70.4", "-", "-", "Apache-2.0"),
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_96.h5",
        ],
        [
            *("0.35_96", "tf-slim", "45.5", "70.4", "-", "-", "not", "stated"),
            *("mobilenet_v2_0.35_96.tgz", "(to", "convert)"),
        ],
    ]
    assert "8 hex" in registry.listing(resize=224)
    assert {line.split("_")[0] for line in registry.listing(alpha=0.5).splitlines()[1:]} == {"0.5"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [((0.6, None), "of alpha 0.6; "), ((1.3, 96), "of alpha 1.3 at resize 96; "), ((None, 225), "of resize 225; ")],
)
def test_a_table_of_nothing_is_refused(wanted, words):
    with pytest.raises(
        InputError, match=f"no weights are published {words}of alpha there are 1.4, 1.3, 1.0, 0.75, 0.5"
    ):
        registry.listing(*wanted)
