"""The inference network: what folding keeps, what it refuses, its file, its certificate, and real pictures."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from processes import environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import settled
from torch import nn

from kernels import common
from mnv2 import MobileNetV2, inference, onednn
from mnv2.errors import InputError, RunError
from mnv2.fold import fold
from mnv2.inference import InferenceNetwork
from mnv2.model import layer_shapes
from mnv2.weights import read

PICTURES = (3, 3, 32, 32)


def trained(alpha=0.35, num_classes=10, **keywords):
    """A network in eval mode with statistics, affine numbers and an epsilon that all matter."""
    model = settled(MobileNetV2(alpha, num_classes, **keywords))
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape, generator=generator))
                norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
    return model


@torch.no_grad()
def difference(network, model, x):
    """Largest difference of logits, over the largest logit."""
    expected = model.double()(x.double())
    return ((network(x).double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("keywords", "size"),
    [({}, (32, 32)), ({}, (33, 47)), ({"padding": "same"}, (32, 31)), ({"norm_eps": 1e-1}, (17, 32))],
    ids=["as it is", "odd sides", "same padding", "another epsilon"],
)
def test_folding_changes_rounding_alone(keywords, size):
    model = trained(**keywords)
    network = fold(model)
    assert network.padding == model.padding
    assert difference(network, model, torch.randn(2, 3, *size)) < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (25, 38)], ids=["even", "odd"])
def test_the_network_through_the_kernels(size, device):
    model = trained(num_classes=5).to(device)
    network = fold(model)
    x = torch.randn(1, 3, *size, device=device)
    by_torch = difference(network, copy.deepcopy(model), x)
    network.backend = "triton"
    assert difference(network, model, x) < 4 * by_torch + 1e-5


def test_it_compiles_and_exports(device):
    network = fold(trained(0.1, 4).to(device))
    network.backend = "triton"
    x = torch.randn(1, 3, 8, 8, device=device)
    assert torch.allclose(torch.compile(network, fullgraph=True, backend="eager")(x), network(x), atol=1e-4)
    names = [str(node.target) for node in torch.export.export(network, (x,)).graph.nodes]
    assert names.count("mnv2.inverted_residual_inference.default") == 17
    assert names.count("mnv2.conv_relu6_mean.default") == 1


def test_half_precision_is_torchs_own():
    model = trained()
    x = torch.randn(PICTURES)
    for dtype in (torch.float16, torch.bfloat16):
        network = fold(model, dtype)
        assert network(x).dtype == dtype
        with torch.no_grad():
            unfolded = copy.deepcopy(model).to(dtype)
            exact = copy.deepcopy(model).double()(x.double())
            errors = [(logits.double() - exact).norm() for logits in (network(x), unfolded(x.to(dtype)))]
        assert errors[0] < 2 * errors[1]


def test_the_model_stays_as_it_is_and_shares_nothing():
    model = trained().train()
    before = copy.deepcopy(model.state_dict())
    network = fold(model)
    assert model.training
    assert not network.training
    expected = network(torch.ones(PICTURES))
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.zero_()
    assert torch.equal(network(torch.ones(PICTURES)), expected)
    model.load_state_dict(before)


def test_backend_and_type_are_inherited_and_may_be_chosen():
    model = MobileNetV2(0.1, 4, backend="torch", padding="same").half()
    network = fold(model)
    assert (network.backend, network.dtype, network.padding) == ("torch", torch.float16, "same")
    network.backend = "auto"
    assert {module.backend for module in network.modules() if hasattr(module, "shape") and hasattr(module, "backend")}
    with pytest.raises(ValueError, match="backend: expected one of"):
        network.backend = "cuda"
    assert fold(model, torch.bfloat16).dtype == torch.bfloat16


def test_the_type_was_chosen_and_the_device_is_free():
    network = fold(MobileNetV2(0.1, 4))
    for change in (lambda: network.half(), lambda: network.to(torch.bfloat16), lambda: network.double()):
        with pytest.raises(TypeError, match="dtype: this network was rounded to torch.float32"):
            change()
    assert network.to("cpu") is network
    assert network.float() is network
    half = fold(MobileNetV2(0.1, 4), torch.float16)  # whose biases are fp32
    for change in (lambda: half.half(), lambda: half.to("cpu", torch.float16)):
        with pytest.raises(TypeError, match="with biases in fp32, got torch.float16"):
            change()
    assert copy.deepcopy(network).to("meta").device.type == "meta"


def test_pictures_are_converted_at_the_door_and_autocast_changes_nothing():
    network = fold(trained(0.1, 4))
    x = torch.randn(PICTURES)
    expected = network(x)
    assert not expected.requires_grad
    assert torch.allclose(network(x.double()), expected)
    assert torch.equal(network(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), expected)
    for bad, error in ((torch.ones(3, 8, 8), ValueError), (torch.ones(PICTURES).int(), TypeError)):
        with pytest.raises(error, match="x: expected"):
            network(bad)


def test_a_layer_leaves_its_input_as_it_was_and_copies_are_whole(monkeypatch):
    network = fold(trained(0.1, 4))
    x = torch.randn(2, network.features[3].shape.c_in, 6, 5).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    expected = network.features[3](x)
    assert torch.equal(x, before)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert torch.equal(copied.features[3](x), expected)
    with torch.no_grad():  # as a broadcast of the weights does it
        for tensor in copied.buffers():
            tensor.zero_()
    assert torch.equal(copied.features[3](x), x if network.features[3].shape.residual else torch.zeros_like(expected))
    with pytest.raises(NotImplementedError, match="InferenceNetwork has no gradient"):
        network(torch.randn(PICTURES, requires_grad=True))
    pictures = torch.randn(PICTURES)
    by_onednn = network(pictures)
    monkeypatch.setattr(onednn, "serves", lambda x: False)  # as on another CPU
    assert (network(pictures) - by_onednn).abs().max() < 1e-4 * by_onednn.abs().max()


def test_large_batches_go_through_a_block_in_parts(monkeypatch):
    network, pictures = fold(trained(0.1, 4)), torch.randn(5, 3, 32, 32)
    whole = network(pictures)
    largest = network.features[2].shape.c_mid * 16 * 16 * 4  # bytes of a picture that this block expands
    for pictures_at_once in (1, 2, 0):  # a picture is never cut
        monkeypatch.setattr(inference, "LARGEST_BYTES", pictures_at_once * largest)
        torch.testing.assert_close(network(pictures), whole)


def replaced(path, module):
    """A network in which the module at ``path`` is another."""
    model = MobileNetV2(0.1, 4)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, "model: expected a MobileNetV2, got Linear"),
        (replaced("features.3.conv.0.2", nn.ReLU()), TypeError, "features.3.conv.0: .*expected nn.ReLU6"),
        (replaced("features.0.0", nn.Conv2d(3, 8, 3, 2, 1)), TypeError, "features.0: .*expected Conv2d without bias"),
        (replaced("features.2.conv.3", nn.Identity()), TypeError, "expected BatchNorm behind .*features.2.conv.2"),
        (replaced("features.4", nn.Identity()), TypeError, "expected InvertedResidual as features.4"),
        (
            replaced("features.0", nn.Identity()),
            TypeError,
            r"expected a convolution, BatchNorm and ReLU6 in features.0",
        ),
        (replaced("features.18", nn.Sequential(nn.Conv2d(8, 8, 1))), TypeError, "BatchNorm and ReLU6 in features.18"),
        (replaced("features.0.0.stride", (1, 1)), TypeError, "expected stride 2 and symmetric padding in features.0"),
        (replaced("features", nn.Sequential()), TypeError, "expected 19 features, got 0"),
        (replaced("classifier.1", nn.Linear(1280, 4, bias=False)), TypeError, "expected nn.Linear with bias"),
        (
            replaced("classifier", nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))),
            TypeError,
            "nn.Linear with",
        ),
        (MobileNetV2(0.1, 4).double(), TypeError, "dtype: expected one of torch.float16"),
        (
            replaced("features.18.1", nn.BatchNorm2d(1280, track_running_stats=False)),
            ValueError,
            "expected running statistics in the BatchNorm of features.18",
        ),
    ],
)
def test_what_cant_be_folded(model, error, message):
    with pytest.raises(error, match=message):
        fold(model)


def test_a_weight_out_of_range_is_named():
    model = trained(0.1, 4)
    with torch.no_grad():
        model.features[5].conv[3].weight.fill_(1e6)
    with pytest.raises(ValueError, match=r"features.5: project_weight: expected finite numbers in the range of .*16"):
        fold(model, torch.float16)
    model = trained(0.1, 4)
    with torch.no_grad():
        model.features[0][1].weight.fill_(1e9)
    with pytest.raises(ValueError, match=r"features.0.weight: expected finite"):
        fold(model, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_network(tmp_path, dtype):
    network = fold(trained(0.1, 4, padding="same"), dtype)
    path = str(tmp_path / "folded.safetensors")
    network.save(path)
    network.save(path, {"class_names": ["Persian cat", "dog"]})  # over itself
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["about"]) == {"class_names": ["Persian cat", "dog"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["folded.safetensors"]
    loaded = InferenceNetwork.load(path, backend="torch")
    assert (loaded.dtype, loaded.padding, loaded.backend) == (dtype, "same", "torch")
    x = torch.randn(PICTURES)
    assert torch.equal(loaded(x), network(x))
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), network.buffers(), strict=True))


def test_a_classifier_of_other_classes_is_folded_with_them():
    model = trained(0.1, 4)
    for classifier in (nn.Sequential(nn.Dropout(), nn.Linear(1280, 7)), nn.Linear(1280, 7)):
        model.classifier = classifier.eval()
        network = fold(model)
        assert network.num_classes == 7
        assert difference(network, copy.deepcopy(model), torch.randn(PICTURES)) < 1e-4


def test_a_file_that_is_none(tmp_path):
    path = str(tmp_path / "folded.safetensors")
    fold(MobileNetV2(0.1, 4)).save(path)
    good = load_file(path)
    whole = (tmp_path / "folded.safetensors").read_bytes()
    cut = str(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    other = str(tmp_path / "other")
    save_file(good, other)
    metadata = {"format": "mnv2 inference network, 1"}
    metadata["network"] = '{"alpha": 0.1, "num_classes": 4, "padding": "same", "backend": "auto", "dtype": "float32"}'
    lacking = str(tmp_path / "lacking")
    save_file({name: tensor for name, tensor in good.items() if name != "features.0.bias"}, lacking, metadata)
    wrong = str(tmp_path / "wrong")
    save_file({**good, "classifier.weight": torch.ones(4, 3)}, wrong, metadata)
    more = str(tmp_path / "more")
    save_file({**good, "extra": torch.ones(1)}, more, metadata)
    with pytest.raises(RunError, match="can't write"):
        fold(MobileNetV2(0.1, 4)).save(str(tmp_path / "none" / "file"))
    for file, message in (
        (str(tmp_path / "none"), "No such file"),
        (str(tmp_path), "expected a file, got a folder"),
        (cut, "damaged"),
        (other, "expected a file of InferenceNetwork.save"),
        (lacking, "lacks features.0.bias"),
        (wrong, r"classifier.weight of shape \(4, 1280\)"),
        (more, "holds extra"),
    ):
        with pytest.raises(InputError, match=message):
            InferenceNetwork.load(file)


def test_the_certificate():
    model = trained()
    x = torch.randn(PICTURES)
    single, half = (fold(model, dtype, check=x).certificate for dtype in (torch.float32, torch.bfloat16))
    assert [layer.name for layer in single.layers] == [*(f"features.{i}" for i in range(19)), "classifier.1"]
    assert all(layer.relative < 1e-4 for layer in single.layers)
    assert all(layer.relative > 1e-4 for layer in half.layers)
    assert (single.flips, single.pictures) == (0, 3)
    assert str(single).splitlines()[-1] == "float32: 0 of 3 predictions differ from the fp64 network's"
    assert fold(model).certificate is None


def test_the_explanation(monkeypatch):
    network = fold(MobileNetV2(1.0), torch.float16)
    plans = network.explain(256, 224).plans
    assert [plan.name for plan in plans] == [layer.name for layer in layer_shapes()]
    assert {plan.path for plan in plans} == {"torch"}
    assert {plan.why for plan in plans[1:-1]} == {"on a CPU"}
    assert sum(plan.kernels_mb for plan in plans[1:18]) == pytest.approx(3.67, abs=0.01)
    assert sum(plan.torch_mb for plan in plans) == pytest.approx(52.8, abs=0.1)
    text = str(network.explain(256, 224))
    assert "counted, not measured" in text
    assert "B stored" in text
    network.backend = "triton"
    monkeypatch.setattr(common, "unsupported_device", lambda device: "expected a GPU")
    assert "refused: x: expected a GPU" in str(network.explain(1, 32))
    with pytest.raises(ValueError, match="batch: expected a positive integer, got 0"):
        network.explain(0, 224)
    with pytest.raises(ValueError, match="resize: expected a positive integer, got -1"):
        network.explain(1, -1)


def test_the_explanation_finds_nan():
    network = fold(trained(0.1, 4))
    x = torch.randn(PICTURES)
    assert {plan.not_finite for plan in network.explain(3, 32, check=x).plans} == {0}
    with torch.no_grad():
        network.features[4].project_bias[0] = torch.nan
    counts = [plan.not_finite for plan in network.explain(3, 32, check=x).plans]
    assert counts[:4] == [0, 0, 0, 0]
    assert counts[4] == 3 * layer_shapes(0.1, 32)[4].height_out ** 2
    assert "not finite" in str(network.explain(3, 32, check=x))


def test_the_explanation_of_a_network_with_batchnorm():
    plans = MobileNetV2(1.0).half().explain(256, 224).plans
    assert sum(plan.torch_mb for plan in plans) == pytest.approx(79.5, abs=0.5)
    assert {plan.why for plan in plans if plan.shape.startswith("24x")} == {"on a CPU"}
    assert {plan.why for plan in MobileNetV2(0.1, backend="torch").explain(1, 32).plans[1:18]} == {"asked for"}


FAKE_GPU = """
import contextlib, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

driver.set_active(Driver())
torch.cuda.device = lambda device: contextlib.nullcontext()
from kernels import common, warmup
from mnv2 import MobileNetV2
from mnv2.fold import fold

class Gpu:
    type, index = "cuda", 0

network = fold(MobileNetV2(0.1, 4), torch.float16)
layer = network.features[1]
launches = layer.launches((65536, layer.shape.c_in, 16, 16))
# A block that is no power of two doesn't compile.
wrong, other = ([launches[0]._replace(arguments={**launches[0].arguments, "BLOCK_E": size})] for size in (3, 5))
for ahead, ignore_errors in ((wrong, False), (other, True), (launches, False), (launches, False)):
    try:
        print(warmup.compile_ahead(ahead, Gpu, progress=False, ignore_errors=ignore_errors), end=" ")
    except Exception:
        print("refused", end=" ")
"""


def test_warming_up_compiles_each_kernel_once_whatever_has_failed_before(tmp_path):
    """On a GPU that is made up: compiling needs none."""
    done = subprocess.run(
        [sys.executable, "-c", FAKE_GPU],
        env=environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "refused 1 2 0 ", done.stderr


def test_warming_up_on_a_cpu_does_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = MobileNetV2(0.1, 4)
    assert model.warmup(2, 32) == fold(model).warmup(2, 32) == 0


def real_pictures(folder, count=None):
    """The labelled photographs as the reference logits want them, and those logits."""
    expected = np.load(folder / "imagenet_samples_logits.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pictures = []
    for name in expected["files"][:count]:
        picture = Image.open(next((folder / "imagenet_samples" / "val").rglob(name.rsplit("/", 1)[-1]))).convert("RGB")
        scale = 256 / min(picture.size)
        width, height = (max(256, int(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        values = torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))).float() / 255
        pictures.append(((values - mean) / std).permute(2, 0, 1))
    return torch.stack(pictures)


def real_network(folder):
    model = MobileNetV2().eval()
    read(str(folder / "mobilenetv2_1.0_224_real.safetensors")).load_into(model)
    return model


@torch.inference_mode()
def predictions(network, pictures):
    return torch.cat([network(part).argmax(1) for part in pictures.split(50)])


def test_real_weights_predict_the_same(test_data):
    model, pictures = real_network(test_data), real_pictures(test_data)
    expected = predictions(model, pictures)
    assert torch.equal(predictions(fold(model), pictures), expected)
    assert (predictions(fold(model, torch.bfloat16), pictures) == expected).sum() >= 199


@pytest.mark.exhaustive
def test_real_weights_through_the_kernels(test_data, device):
    model, pictures = real_network(test_data).to(device), real_pictures(test_data, 2).to(device)
    network = fold(model)
    expected = network(pictures)
    network.backend = "triton"
    got = network(pictures)
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
