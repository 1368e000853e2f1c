"""What the folders of transformers and timm say of their networks and pictures."""

from __future__ import annotations

import json
import os
import random
import re

import pytest
import torch
from safetensors.torch import save_file
from samples import in_layout, settled

from mnv2 import MobileNetV2, hub_folders
from mnv2.errors import InputError
from mnv2.labels import BACKGROUND, imagenet_classes
from mnv2.weights import load, read

IDENTIFIERS = [identifier for identifier, _ in imagenet_classes()]
ENGLISH = [names for _, names in imagenet_classes()]
CONFIG = {
    "model_type": "mobilenet_v2", "depth_multiplier": 0.35, "tf_padding": True, "layer_norm_eps": 1e-3,
    "finegrained_output": True, "image_size": 96, "hidden_act": "relu6",
}  # fmt: skip
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As timm 1.0.31's save_for_hf writes it, but for what concerns no one here.
PRETRAINED = {
    "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 4, "pool_size": [7, 7],
    "first_conv": "conv_stem", "classifier": "classifier", "license": "apache-2.0",
}  # fmt: skip
TIMM = {"architecture": "mobilenetv2_035", "num_classes": 4, "num_features": 1280, "global_pool": "avg"}


def described(folder, config, processor=None):
    """What a folder with these configurations says; whatever isn't a string is written as JSON."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    weights, record = hub_folders.read(str(folder))
    assert weights == str(folder / "model.safetensors")
    return record


def write_folder(folder, state, source, config, name="model.safetensors", processor=None):
    own = in_layout(state, source)
    folder.mkdir(exist_ok=True)
    save_file(own, folder / name) if name.endswith("safetensors") else torch.save(own, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("tf_padding", "padding"), [(True, "same"), (False, "symmetric")])
def test_a_folder_of_transformers_says_what_its_network_is(tmp_path, name, tf_padding, padding):
    model = settled(MobileNetV2(0.35, 4, norm_eps=2e-3, padding=padding))
    config = {**CONFIG, "tf_padding": tf_padding, "layer_norm_eps": 2e-3}
    processor = {"size": {"shortest_edge": 128}, "crop_size": {"height": 96, "width": 96}}
    path = write_folder(tmp_path / "a", model.state_dict(), "transformers", config, name, processor)
    found = read(path)
    assert (found.padding, found.norm_eps, found.resize, found.preprocessing) == (padding, 2e-3, 96, "tf")
    assert (found.assumed, found.wants) == ((), None)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(path)(x), model(x))
    other = load(path, padding="same" if padding == "symmetric" else "symmetric", norm_eps=1e-5)
    assert not torch.allclose(other(x), model(x))


def test_a_folder_of_timm_says_what_its_network_is(tmp_path):
    model = settled(MobileNetV2(0.35, 4, norm_eps=2e-3, padding="same"))
    config = {**TIMM, "pretrained_cfg": {**PRETRAINED, "crop_pct": 1.0}, "label_names": ["a", "b", "c", "d"]}
    path = write_folder(tmp_path / "a", model.state_dict(), "timm", config)
    found = read(path)
    assert (found.source, found.alpha, found.padding, found.norm_eps) == ("timm", 0.35, "symmetric", 1e-5)
    assert found.assumed == ("padding", "norm_eps")  # an earlier timm doesn't write what a network was made with
    assert (found.preprocessing, found.classes, found.resize) == (None, ["a", "b", "c", "d"], 224)
    assert found.wants == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, short side 224, centre 224"
    found.save(str(tmp_path / "x"))
    assert read(str(tmp_path / "x")).wants == found.wants

    write_folder(
        tmp_path / "a", model.state_dict(), "timm", {**config, "model_args": {"pad_type": "same", "bn_eps": 2e-3}}
    )
    found = read(path)
    assert (found.padding, found.norm_eps, found.assumed) == ("same", 2e-3, ())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(path)(x), model(x))


def test_without_configurations_of_pictures_the_layouts_usual_is_assumed(tmp_path):
    state = MobileNetV2(0.35, 4).state_dict()
    found = read(write_folder(tmp_path / "a", state, "timm", TIMM))
    assert (found.preprocessing, found.assumed) == ("timm", ("padding", "norm_eps", "preprocessing"))
    found = read(write_folder(tmp_path / "b", state, "transformers", CONFIG))
    assert (found.preprocessing, found.assumed) == ("tf", ("preprocessing",))


@pytest.mark.parametrize(
    ("config", "record"),
    [
        ({}, {"alpha": 1.0, "padding": "same", "norm_eps": 1e-3, "resize": 224}),
        ({"tf_padding": False}, {"alpha": 1.0, "padding": "symmetric", "norm_eps": 1e-3, "resize": 224}),
        ({"layer_norm_eps": 1e-5, "image_size": None},
         {"alpha": 1.0, "padding": "same", "norm_eps": 1e-5, "resize": 224}),
        ({"image_size": [160, 160]}, {"alpha": 1.0, "padding": "same", "norm_eps": 1e-3, "resize": 160}),
        ({"image_size": [160, 96]}, {"alpha": 1.0, "padding": "same", "norm_eps": 1e-3}),
        ({"depth_multiplier": 1.4, "finegrained_output": False, "expand_ratio": 6.0},
         {"alpha": 1.4, "padding": "same", "norm_eps": 1e-3, "resize": 224}),
    ],
)  # fmt: skip
def test_what_transformers_leaves_out_is_its_default(tmp_path, config, record):
    assert described(tmp_path, {"model_type": "mobilenet_v2", **config}) == record


@pytest.mark.parametrize(
    ("arguments", "record"),
    [
        (None, {}),
        ({}, {}),
        ({"pad_type": ""}, {"padding": "symmetric"}),
        ({"pad_type": "same"}, {"padding": "same"}),
        ({"bn_eps": 0.001}, {"norm_eps": 0.001}),
        ({"pad_type": None, "bn_eps": None, "bn_tf": None}, {}),
        ({"drop_rate": 0.2, "drop_path_rate": 0.1, "bn_momentum": 0.01, "num_classes": 4}, {}),
        ({"act_layer": "relu6", "output_stride": 32, "fix_stem_head": False, "depth_multiplier": 1.0,
          "global_pool": "avg", "in_chans": 3, "stem_kernel_size": 3}, {}),
    ],
)  # fmt: skip
def test_timms_arguments_tell_padding_and_epsilon(tmp_path, arguments, record):
    assert described(tmp_path, {**TIMM, "model_args": arguments}) == record


SLIM = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
TIMM_PROFILES = [
    ({}, 224, "timm"),
    ({"input_size": [3, 160, 160]}, 160, "timm"),
    ({"interpolation": None, "crop_pct": None, "crop_mode": None, "mean": None, "std": None}, 224, "timm"),
    ({"interpolation": "bilinear"}, 224, "torchvision"),
    ({"interpolation": "bilinear", "input_size": [3, 160, 160]}, 160, "torchvision"),
    ({"interpolation": "bilinear", "input_size": [3, 160, 160], "crop_pct": 0.8333}, 160, "reference"),
    ({"interpolation": "bilinear", "crop_pct": 0.965}, 224, "torchvision_v2"),
    (SLIM, 224, "tf"),
    ({**SLIM, "input_size": [3, 160, 160]}, 160, "tf"),
    ({**SLIM, "interpolation": "bicubic"}, 224, None),
    ({**SLIM, "std": [0.25] * 3}, 224, None),
    ({**SLIM, "crop_pct": 0.9}, 224, None),
    ({"crop_pct": 0.95}, 224, None),
    ({"crop_pct": 1.2}, 224, None),
    ({"crop_mode": "squash"}, 224, None),
    ({"interpolation": "lanczos"}, 224, None),
    ({"std": [0.229, 0.224, 0.226]}, 224, None),
    ({"mean": [0.48145466, 0.4578275, 0.40821073]}, 224, None),
]


@pytest.mark.parametrize(("change", "resize", "profile"), TIMM_PROFILES)
def test_timms_preprocessing_is_the_profile_that_does_the_same(tmp_path, change, resize, profile):
    record = described(tmp_path, {**TIMM, "pretrained_cfg": {**PRETRAINED, **change}})
    assert (record["resize"], record["preprocessing"]) == (resize, profile)
    assert ("wants" in record) == (profile is None)
    legacy = {"architecture": "mobilenetv2_100", **PRETRAINED, **change}  # before there was a pretrained_cfg
    assert described(tmp_path, legacy) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": 0, "std": [1, 1, 1], "crop_pct": 0.9},
         "mean 0 0 0, std 1 1 1, bicubic, short side 248, centre 224"),
        ({"crop_mode": "squash", "interpolation": "lanczos"},
         "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, lanczos, squash to 256, centre 224"),
        ({"input_size": [3, 160, 224]},
         "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, short side 182, centre 160 by 224"),
    ],
)  # fmt: skip
def test_what_no_profile_does_is_told_in_words(tmp_path, change, words):
    record = described(tmp_path, {**TIMM, "pretrained_cfg": {**PRETRAINED, **change}})
    assert (record["preprocessing"], record["wants"]) == (None, words)


def sized(shorter, crop):
    return {"size": {"shortest_edge": shorter}, "crop_size": {"height": crop, "width": crop}}


HALVES = "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear, "
PROCESSORS = [
    ({}, 224, "tf"),  # transformers' defaults for MobileNetV2
    ({**sized(256, 224), "image_processor_type": "MobileNetV2ImageProcessorFast"}, 224, "tf"),
    ({"size": 256, "crop_size": 224, "feature_extractor_type": "MobileNetV2FeatureExtractor"}, 224, "tf"),
    (sized(192, 160), 160, "tf"),  # Google's, where 0.875 of the side would be 183
    (sized(183, 160), 160, "tf"),
    (sized(128, 96), 96, "tf"),
    (sized(109, 96), 96, "tf"),
    (sized(130, 96), 96, HALVES + "short side 130, centre 96"),
    (sized(256, 224), 192, HALVES + "short side 256, centre 224"),
    ({**IMAGENET, "resample": 3}, 224, "timm"),
    ({**IMAGENET, "resample": 2}, 224, "torchvision"),
    ({**IMAGENET, **sized(182, 160)}, 160, "torchvision"),
    ({**IMAGENET, **sized(192, 160)}, 160, "reference"),
    ({**IMAGENET, **sized(232, 224)}, 224, "torchvision_v2"),
    ({**IMAGENET, **sized(182, 160), "resample": 3}, 160, "timm"),
    ({"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}, 224, "tf"),
    ({"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3}, 224, "tf"),
    ({"image_std": [1, 1, 1], "image_mean": [0, 0, 0], "resample": 3}, 224,
     "mean 0 0 0, std 1 1 1, bicubic, short side 256, centre 224"),
    ({"do_normalize": False}, 224, "mean 0 0 0, std 1 1 1, bilinear, short side 256, centre 224"),
    ({"do_rescale": False, "do_normalize": False}, 224,
     "mean 0 0 0, std 0.003922 0.003922 0.003922, bilinear, short side 256, centre 224"),
    ({"resample": 1}, 224, HALVES.replace("bilinear", "lanczos") + "short side 256, centre 224"),
    ({"do_resize": False}, 224, HALVES + "not resized, centre 224"),
    ({"do_center_crop": False}, 224, HALVES + "short side 256, not cropped"),
    ({"do_pad": True}, 224, HALVES + "short side 256, cropped and padded"),
    ({"size": {"height": 224, "width": 224}}, 224, HALVES + "height 224 and width 224, centre 224"),
    ({"crop_size": {"height": 224, "width": 192}}, 224, HALVES + "short side 256, centre of height 224 and width 192"),
    ({"image_processor_type": "ViTImageProcessor"}, 224, "what transformers' ViTImageProcessor does"),
]  # fmt: skip


@pytest.mark.parametrize(("processor", "resize", "expected"), PROCESSORS)
def test_a_processor_is_the_profile_that_does_the_same(tmp_path, processor, resize, expected):
    record = described(tmp_path, {**CONFIG, "image_size": resize}, processor)
    assert record.get("wants", record["preprocessing"]) == expected
    assert ("wants" in record) == (record["preprocessing"] is None)


@pytest.mark.parametrize("image_size", [[224, 192], [192, 224]])
def test_a_network_of_oblong_pictures_has_no_profile(tmp_path, image_size):
    assert described(tmp_path, {**CONFIG, "image_size": image_size}, {})["preprocessing"] is None


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["background", *ENGLISH], [BACKGROUND, *IDENTIFIERS]), (ENGLISH, IDENTIFIERS), (["a", "b"], ["a", "b"]),
        ([f"LABEL_{number}" for number in range(3)], None), ([], None), ([7, "b"], ["7", "b"]),
    ],
    ids=["google", "imagenet", "own", "generic", "none", "numbers"],
)  # fmt: skip
def test_a_folders_own_names_are_its_classes(tmp_path, names, classes):
    numbered = {str(number): name for number, name in enumerate(names)}
    assert described(tmp_path, {**CONFIG, "id2label": numbered}).get("classes") == classes
    for said in ({"label_names": names}, {"label_names": numbered}, {"pretrained_cfg": {"label_names": names}}):
        assert described(tmp_path, {**TIMM, **said}).get("classes") == classes
    assert described(tmp_path, {**TIMM, "labels": names}).get("classes") == classes


def test_numbers_without_a_name_are_outputs_without_a_class(tmp_path):
    assert described(tmp_path, {**TIMM, "label_names": {"2": "c", "0": "a"}})["classes"] == ["a", "", "c"]


def test_names_for_other_than_its_outputs_are_refused(tmp_path):
    path = write_folder(tmp_path / "a", MobileNetV2(0.35, 4).state_dict(), "timm", {**TIMM, "label_names": ["a", "b"]})
    with pytest.raises(InputError, match="expected 4 names as its record of classes"):
        read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_stride": 16}, "expected output_stride 32, got 16"),
        ({"finegrained_output": False}, "expected finegrained_output True, got False"),
        ({"model_type": "mobilenet_v1"}, "expected model_type mobilenet_v2, got mobilenet_v1"),
        ({"model_type": "a\nb"}, r"expected model_type mobilenet_v2, got 'a\\nb'"),
        ({"hidden_act": "silu"}, "expected hidden_act relu6, got silu"),
        ({"hidden_act": ["relu6"]}, "expected hidden_act relu6, got a list"),
        ({"first_layer_is_expansion": False}, "expected first_layer_is_expansion True"),
        ({"depth_multiplier": "wide"}, "expected depth_multiplier a number from 0.01 to 100, got wide"),
        ({"depth_multiplier": True}, "expected depth_multiplier a number"),
        ({"depth_multiplier": 10**400}, "expected depth_multiplier a number"),
        ({"layer_norm_eps": -1}, "expected layer_norm_eps a number from 1e-12 to 0.5, got -1"),
        ({"layer_norm_eps": "0.001"}, "expected layer_norm_eps a number"),
        ({"layer_norm_eps": float("nan")}, "expected JSON, got something else .NaN is no number"),
        ({"tf_padding": "no"}, "expected tf_padding true or false, got no"),
        ({"image_size": "224"}, "expected image_size pixels, got 224"),
        ({"image_size": [224]}, "expected image_size pixels, got a list"),
        ({"image_size": 0}, "expected image_size pixels, got 0"),
        ({"id2label": ["a", ["b"]]}, "expected id2label a list of printable names, or names by number, got a list"),
        ({"id2label": {"0": "a\nb"}}, "expected id2label a list of printable names"),
        ({"id2label": {"one": "a"}}, "expected id2label names by number"),
        ({"id2label": {"99999999999": "a"}}, "expected id2label names by number"),
        ({"id2label": 3}, "expected id2label a list"),
        ({"architecture": "mobilenetv3_large_100"}, "expected architecture mobilenetv2_ and three digits"),
        ({"architecture": "mobilenetv2_120d"}, "expected architecture .* got mobilenetv2_120d"),
        ({"architecture": {}}, "expected architecture one word, got a dict"),
    ],
)  # fmt: skip
def test_folders_of_other_networks_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: {words}"):
        described(tmp_path, {**CONFIG, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"act_layer": "silu"}}, "expected act_layer 'relu6', got silu"),
        ({"model_args": {"output_stride": 16}}, "expected output_stride 32, got 16"),
        ({"model_args": {"fix_stem_head": True}}, "expected fix_stem_head False, got True"),
        ({"model_args": {"depth_multiplier": 1.2}}, "expected depth_multiplier 1, got 1.2"),
        ({"model_args": {"stem_kernel_size": 5}}, "expected stem_kernel_size 3, got 5"),
        ({"model_args": {"in_chans": 1}}, "expected in_chans 3, got 1"),
        ({"model_args": {"global_pool": "max"}}, "expected global_pool 'avg', got max"),
        ({"model_args": {"pad_type": "valid"}}, "expected pad_type '' or 'same', got valid"),
        ({"model_args": {"pad_type": ["same"]}}, "expected pad_type '' or 'same', got a list"),
        ({"model_args": {"bn_eps": "1e-3"}}, "expected bn_eps a number"),
        ({"model_args": {"bn_eps": 0}}, "expected bn_eps a number from 1e-12 to 0.5, got 0"),
        ({"model_args": {"bn_tf": True}}, "expected none but MobileNetV2's own model_args, got bn_tf"),
        ({"model_args": {"channel_multiplier": 1.1}}, "expected none but .* got channel_multiplier"),
        ({"model_args": {"norm_layer": "groupnorm"}}, "expected none but .* got norm_layer"),
        ({"model_args": {"aa_layer": "blur"}}, "expected none but .* got aa_layer"),
        ({"model_args": {"a\nb": 1}}, r"expected none but .* got 'a\\nb'"),
        ({"model_args": [1]}, "expected model_args an object, got a list"),
        ({"pretrained_cfg": "x"}, "expected pretrained_cfg an object, got x"),
        ({"pretrained_cfg": {"input_size": 224}}, "expected input_size three channels, and pixels"),
        ({"pretrained_cfg": {"input_size": [1, 224, 224]}}, "expected input_size three channels, and pixels"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, "expected mean three numbers"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, "expected std three numbers from 1e-06 to 10000"),
        ({"pretrained_cfg": {"crop_pct": 0}}, "expected crop_pct a number from 0.01 to 100, got 0"),
        ({"pretrained_cfg": {"crop_mode": "a b"}}, "expected crop_mode one word, got a b"),
        ({"label_names": "abc"}, "expected label_names a list of printable names"),
    ],
)  # fmt: skip
def test_timms_folders_of_other_networks_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: {words}"):
        described(tmp_path, {**TIMM, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": "256"}, "expected size pixels, got 256"),
        ({"size": {"shortest_edge": "256"}}, "expected size pixels, got a dict"),
        ({"size": {}}, "expected size pixels"),
        ({"size": {"a\nb": 256}}, "expected size pixels"),
        ({"crop_size": -1}, "expected crop_size pixels, got -1"),
        ({"resample": "bicubic"}, "expected resample PIL's number of a filter, 0 to 5, got bicubic"),
        ({"resample": 6}, "expected resample PIL's number"),
        ({"image_mean": [0.5, "x", 0.5]}, "expected image_mean three numbers"),
        ({"image_std": 0}, "expected image_std three numbers"),
        ({"rescale_factor": 0}, "expected rescale_factor a number from 1e-06 to 1000, got 0"),
        ({"do_resize": 1}, "expected do_resize true or false, got 1"),
        ({"image_processor_type": "a\nb"}, "expected image_processor_type one word"),
        ("[]", "expected an object, got list"),
    ],
)  # fmt: skip
def test_processors_of_no_sense_are_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'preprocessor_config.json'))}: {words}"):
        described(tmp_path, CONFIG, change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "expected model_type mobilenet_v2, got None"),
        ("[1]", "expected an object, got list"),
        ("{", "expected JSON, got something else"),
        ("", "expected JSON, got something else"),
        ("[" * 200_000, "expected JSON, got something else .nested too deep"),
        ('{"a": ' * 100_000, "expected JSON, got something else .nested too deep"),
        ('{"image_size": ' + "1" * 10_000 + "}", "expected JSON, got something else"),
        (" " * (2**24 + 1), "expected at most 16777216 bytes, got more"),
    ],
    ids=["empty", "list", "cut", "nothing", "lists", "objects", "digits", "large"],
)
def test_what_is_no_configuration_is_refused_by_its_path(tmp_path, text, words):
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: {words}"):
        described(tmp_path, text)


def test_a_folder_lacking_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected model.safetensors or pytorch_model.bin in the folder, got neither"):
        hub_folders.read(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"^can't read .*config.json: No such file"):
        hub_folders.read(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff{}")
    with pytest.raises(InputError, match="config.json: expected JSON, got something else"):
        hub_folders.read(str(tmp_path))
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="config.json: expected a file, got none"):
        hub_folders.read(str(tmp_path))


ODD = [
    None, True, False, 0, -1, 1e308, 10**30, "", "224", "a\nb", "\udc80", [], [1], [None] * 3, ["x"] * 3, {}, {"": 1},
    {"0": {}}, {"shortest_edge": None}, {"height": 1}, [[[[]]]], "same", "Infinity", 1.5,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_values_of_any_kind_are_read_or_refused_in_one_line(tmp_path, seed):
    """Each of a configuration's values in turn, and several at once, become something odd."""
    chance = random.Random(seed)
    processor = {
        **IMAGENET, **sized(256, 224), "resample": 2, "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "do_normalize": True, "do_pad": False, "rescale_factor": 1 / 255, "image_processor_type": "MobileNetV2",
    }  # fmt: skip
    arguments = {"pad_type": "same", "bn_eps": 1e-3, "act_layer": "relu6"}
    timm = {**TIMM, "model_args": arguments, "pretrained_cfg": PRETRAINED, "label_names": ["a"], "labels": ["b"]}
    read_well = 0
    for _ in range(400):
        config = json.loads(json.dumps(chance.choice([timm, {**CONFIG, "id2label": {"0": "a"}, "output_stride": 32}])))
        prepared = json.loads(json.dumps(processor))
        places = [each for each in (config, config.get("model_args"), config.get("pretrained_cfg"), prepared) if each]
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.choice(places)
            place[chance.choice(list(place))] = chance.choice(ODD)
        try:
            record = described(tmp_path, config, prepared)
        except InputError as error:
            assert str(error).isprintable(), (config, prepared)  # noqa: PT017
            continue
        read_well += 1
        assert all(name.isprintable() for name in [*record.get("classes", []), record.get("wants", "")])
        assert ("wants" in record) == (record.get("preprocessing", "unsaid") is None)
    assert 20 < read_well < 380
