from __future__ import annotations

import copy
import statistics
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from numerics import Calls
from PIL import Image
from safetensors.torch import load_file
from samples import settled
from torch import nn

from kernels import DepthwiseConv2d, common
from mnv2 import MobileNetV2, layer_shapes
from mnv2.model import VARIANTS, round_channels

# Parameters with 1000 and 1001 classes, as published; millions of multiply-adds by resolution, rounded down, likewise.
PARAMETERS = {
    1.4: (6_108_776, 6_110_569),
    1.3: (5_386_792, 5_388_457),
    1.0: (3_504_872, 3_506_153),
    0.75: (2_636_424, 2_637_705),
    0.5: (1_968_680, 1_969_961),
    0.35: (1_677_128, 1_678_409),
}
MACS = {
    1.4: (582,),
    1.3: (509,),
    1.0: (300, 221, 154, 99, 56),
    0.75: (209, 153, 107, 69, 39),
    0.5: (97, 71, 50, 32, 18),
    0.35: (59, 43, 30, 20, 11),
}


@pytest.mark.parametrize("alpha", VARIANTS)
def test_parameters_are_those_published(alpha):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in MobileNetV2(alpha, classes).parameters()) for classes in (1000, 1001)]
    assert tuple(counts) == PARAMETERS[alpha]


@pytest.mark.parametrize("alpha", VARIANTS)
def test_multiply_adds_are_those_published(alpha):
    assert tuple(sum(s.macs for s in layer_shapes(alpha, r)) // 10**6 for r in VARIANTS[alpha]) == MACS[alpha]


def test_22_variants_are_published():
    assert sum(map(len, VARIANTS.values())) == 22


def test_multiply_adds_of_the_parts():
    shapes = layer_shapes(1.0, 224)
    parts = {kind: sum(s.macs for s in shapes if s.kind == kind) / 1e6 for kind in ("stem", "head", "classifier")}
    parts |= {f: sum(getattr(s, f"{f}_macs") for s in shapes[1:18]) / 1e6 for f in ("expand", "depthwise", "project")}
    rounded = {name: round(value, 2) for name, value in parts.items()}
    assert rounded == {
        "stem": 10.84,
        "expand": 129.76,
        "depthwise": 20.72,
        "project": 118.11,
        "head": 20.07,
        "classifier": 1.28,
    }


@pytest.mark.parametrize(("alpha", "resize"), [(1.0, 224), (0.35, 33), (0.1, 50), (1.7, 32)])
def test_layer_shapes_are_what_the_network_does(alpha, resize):
    model = MobileNetV2(alpha, num_classes=7).eval()
    seen = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.__setitem__(name, (inputs[0], output)))
    model(torch.randn(1, 3, resize, resize))
    shapes = model.layer_shapes(resize)
    assert [s.name for s in shapes] == [f"features.{i}" for i in range(19)] + ["classifier.1"]
    for s in shapes[:-1]:
        x, y = seen[s.name]
        assert x.shape[1:] == (s.c_in, s.height, s.width)
        assert y.shape[1:] == (s.c_out, s.height_out, s.width_out)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert seen["classifier.1"][1].shape == (1, 7)


def torchvision_names() -> list[str]:
    """The state dict's names in torchvision's order, written out from its module tree."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    units = [("features.0", "0", "1")]
    for block in range(1, 18):
        prefix = f"features.{block}.conv"
        inner = 1 if block == 1 else 2
        units += [(f"{prefix}.{i}", "0", "1") for i in range(inner)]
        units += [(prefix, str(inner), str(inner + 1))]
    units += [("features.18", "0", "1")]
    names = [
        f"{unit}.{name}" for unit, conv, bn in units for name in (f"{conv}.weight", *(f"{bn}.{part}" for part in norm))
    ]
    return [*names, "classifier.1.weight", "classifier.1.bias"]


@pytest.mark.parametrize("alpha", [1.0, 0.35])
def test_names_are_torchvisions(alpha):
    assert list(MobileNetV2(alpha).state_dict()) == torchvision_names()


def test_real_weights_load_strictly_and_give_the_expected_logits(test_data):
    """Against logits recorded with torchvision's network and preprocessing; here PIL preprocesses."""
    expected = np.load(test_data / "imagenet_samples_logits.npz")
    model = MobileNetV2().eval()
    model.load_state_dict(load_file(test_data / "mobilenetv2_1.0_224_real.safetensors"), strict=True)
    for number in (0, 77, 199):
        name = str(expected["files"][number])
        path = next((test_data / "imagenet_samples" / "val").rglob(name.rsplit("/", 1)[-1]))
        picture = Image.open(path).convert("RGB")
        scale = 256 / min(picture.size)
        picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BILINEAR)
        left, top = (round((side - 224) / 2) for side in picture.size)
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32) / 255
        x = torch.from_numpy((pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).float().permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits = model(x)[0]
        # The expected logits are stored in fp16.
        torch.testing.assert_close(logits, torch.from_numpy(expected["logits"][number]).float(), rtol=2e-3, atol=2e-2)


def test_initialisation_is_torchvisions():
    model = MobileNetV2(0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())
    assert model.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.classifier[1].bias.any()


def test_any_memory_format_gives_the_same_logits():
    model = settled(MobileNetV2(0.35))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(model(x), model(torch.randn(2, 3, 64, 64)[:, :, ::2, ::2].copy_(x)))


def test_same_padding_and_epsilon_reach_every_layer():
    x = torch.randn(2, 3, 32, 32)
    plain = settled(MobileNetV2(0.35))
    for changes in ({"padding": "same"}, {"norm_eps": 1e-3}):
        other = MobileNetV2(0.35, **changes).eval()
        other.load_state_dict(plain.state_dict())
        assert not torch.allclose(other(x), plain(x), rtol=1e-2, atol=1e-4)
    eps = {m.eps for m in MobileNetV2(0.35, norm_eps=1e-3).modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {1e-3}
    # At stride 1 and at odd sizes the two paddings are one, and 33 -> 17 -> 9 -> 5 -> 3 -> 2 halves odd sizes only.
    odd = torch.randn(2, 3, 33, 33)
    same = MobileNetV2(0.35, padding="same").eval()
    same.load_state_dict(plain.state_dict())
    torch.testing.assert_close(same(odd), plain(odd))


def test_same_padding_reaches_every_layer_of_stride_2():
    model = settled(MobileNetV2(0.35, padding="same"))
    seen = {}
    for shape, layer in zip(model.layer_shapes(32), model.features, strict=False):
        if shape.stride == 2:
            layer.register_forward_hook(lambda module, inputs, output: seen.__setitem__(module, (inputs[0], output)))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == 5
    for layer, (x, y) in seen.items():
        nothing = nn.Identity()
        units = list(layer.conv) if hasattr(layer, "conv") else [layer, nothing, nothing]
        *expand, (conv, norm, act), project, project_norm = units
        a = expand[0](x) if expand else x
        even = torch.nn.functional.pad(a, (0, 1, 0, 1))  # TensorFlow's zeros of an even size
        d = torch.nn.functional.conv2d(even, conv.weight, stride=2, groups=conv.groups)
        torch.testing.assert_close(project_norm(project(act(norm(d)))), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block.conv[0].__setitem__(2, nn.Hardswish()), "expected nn.ReLU6 .* got Hardswish"),
        (lambda block: block.conv[1].__setitem__(2, nn.Identity()), "expected nn.ReLU6 .* got Identity"),
        (lambda block: block.conv.__setitem__(2, nn.Conv2d(48, 8, 1)), "expected Conv2d without bias .* got Conv2d"),
        (lambda block: setattr(block.conv[0][0], "bias", nn.Parameter(torch.ones(48))), "expected Conv2d without bias"),
    ],
    ids=["activation", "depthwise-activation", "convolution", "bias"],
)
def test_a_replaced_part_is_refused_and_not_ignored(change, message):
    block = MobileNetV2(0.35).features[3]
    change(block)
    with pytest.raises(TypeError, match=message):
        block(torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last))


def test_trains_and_is_deterministic():
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        model = MobileNetV2(0.35, num_classes=4, dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        for _ in range(8):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0] < 0.9  # it starts at about log 4 = 1.39


def test_parts_can_be_frozen_hooked_and_copied():
    model = MobileNetV2(0.35, num_classes=4)
    model.features.requires_grad_(False)
    calls = []
    model.features[5].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 1
    assert [name for name, p in twin.named_parameters() if p.grad is not None] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]


def test_a_replaced_norm_is_refused_and_not_ignored():
    model = MobileNetV2(0.35)
    model.features[2].conv[1][1] = nn.InstanceNorm2d(48)
    with pytest.raises(TypeError, match="expected nn.BatchNorm2d for each norm of the block, got InstanceNorm2d"):
        model.features[2](torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last))


def test_synchronised_norms_in_one_process_are_plain_ones():
    plain = MobileNetV2(0.35, 4, dropout=0.0)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(plain))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules()) == 52
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(synchronised(x), plain(x))
    for one, other in zip(synchronised.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_compiles_whole():
    model = settled(MobileNetV2(0.35, num_classes=4))
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def with_backend(model, backend):
    model = deepcopy(model)
    model.backend = backend
    return model


def error_of_a_network(seed, backend, padding, device, side=16, alpha=0.1, batch=1):
    """Relative errors of logits and gradients in fp32 against fp64, the median of them; and the operations that ran."""
    torch.manual_seed(seed)
    model = settled(MobileNetV2(alpha, num_classes=4, padding=padding), side).to(device)
    x = torch.randn(batch, 3, side, side, device=device)
    results = []
    for net, picture in ((deepcopy(model).double(), x.double()), (with_backend(model, backend), x)):
        with Calls() as calls:
            logits = net(picture)
            logits.square().sum().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in net.parameters())])
    errors = [(got.double() - truth).norm() / truth.norm() for truth, got in zip(*results, strict=True)]
    return torch.stack(errors).median().item(), Counter(calls.names)


@pytest.mark.exhaustive
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_through_the_kernels_a_network_gives_the_same_logits_and_gradients(padding, device):
    # How far rounding grows through 52 layers depends on the weights: torch's own errors differ by 40 between seeds.
    spread = [error_of_a_network(seed, "torch", padding, device) for seed in range(8)]
    ours = [error_of_a_network(seed, "triton", padding, device) for seed in range(5)]
    assert all(calls == {"inverted_residual_fwd": 17, "inverted_residual_bwd": 17} for _, calls in ours)
    assert all(not ran for _, ran in spread)
    error = statistics.median(error for error, _ in ours)
    assert error < 2 * max(torchs for torchs, _ in spread) < 1e-3  # a wrong tap gives errors near 1


@pytest.mark.exhaustive
def test_through_the_kernels_a_network_in_training(device, monkeypatch):
    """Statistics of the batch: a mask of ReLU6 that rounding flips moves whole gradients, in torch too; so the medians
    over parameters of several networks are compared.
    """
    monkeypatch.setattr(common, "_limits", lambda device: common.Limits(1, 232448))  # fewer programs, which take time

    def error(seed, backend):
        torch.manual_seed(seed)
        model = MobileNetV2(0.35, num_classes=4, dropout=0.0).train().to(device)
        x = torch.randn(8, 3, 32, 32, device=device)
        results = []
        for net, pictures in ((deepcopy(model).double(), x.double()), (with_backend(model, backend), x)):
            logits = net(pictures)
            logits.square().sum().backward()
            buffers = (buffer for buffer in net.buffers() if buffer.is_floating_point())
            results.append([*(parameter.grad for parameter in net.parameters()), *buffers])
        errors = [((a.double() - b).norm() / b.norm()).item() for b, a in zip(*results, strict=True) if b.norm() > 1e-6]
        return statistics.median(errors)

    torchs = [error(seed, "torch") for seed in range(3)]
    assert error(0, "triton") < 2 * max(torchs)
    assert statistics.median(torchs) < 0.01


def five_losses(backend, images, labels):
    """Losses of five steps on the same pictures."""
    torch.manual_seed(3)
    model = MobileNetV2(0.35, num_classes=10, dropout=0.0, backend=backend).train().to(images.device, images.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.exhaustive
def test_five_steps_on_digits_through_the_kernels_and_through_torch(device, capsys, monkeypatch):
    """Two pictures, as the interpreter is slow, which are learnt in five steps.

    Each step multiplies what rounding has done, in torch too: how much, the two orders of the batch tell.
    """
    monkeypatch.setattr(common, "_limits", lambda device: common.Limits(1, 232448))  # fewer programs, which take time
    images, labels = (tensor[:2].to(device) for tensor in digits())
    images = nn.functional.interpolate(images.repeat(1, 3, 1, 1), size=64, mode="bilinear")
    exact = five_losses("torch", images.double(), labels)
    torchs = [five_losses("torch", images[order], labels[order]) for order in ([0, 1], [1, 0])]
    got = five_losses("triton", images, labels)
    with capsys.disabled():
        for name, losses in (("triton", got), ("torch", torchs[0]), ("fp64", exact)):
            print(f"\n{name:7}" + "".join(f" {loss:.5f}" for loss in losses), end="")

    def errors(losses):
        return [abs(loss - truth) for loss, truth in zip(losses, exact, strict=True)]

    assert got[0] == pytest.approx(exact[0], abs=2 * max(errors(losses)[0] for losses in torchs) + 1e-5)
    assert statistics.mean(errors(got)) < 2 * max(statistics.mean(errors(losses)) for losses in torchs)
    assert max(got[-1], torchs[0][-1]) < exact[0] / 2


def digits():
    """Scikit-learn's digits as images [N, 1, 8, 8] in [-1, 1], and their labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn isn't installed")
    bunch = datasets.load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 8 - 1, torch.from_numpy(bunch.target).long()


def test_through_the_kernels_with_torchs_synchronised_norms(device):
    model = settled(MobileNetV2(0.1, 4), 16).to(device)
    x = torch.randn(1, 3, 16, 16, device=device)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(with_backend(model, "triton"))
    with Calls() as calls:
        y = synchronised(x)
    assert calls.names == 17 * ["depthwise_fwd"]
    torch.testing.assert_close(y, model(x))


def test_the_backend_may_be_changed_at_any_time():
    model = MobileNetV2(0.35)
    assert model.backend == "auto"
    model.backend = "torch"
    assert {module.backend for module in model.modules() if isinstance(module, DepthwiseConv2d)} == {"torch"}
    with pytest.raises(ValueError, match="backend: expected one of"):
        model.backend = "cudnn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha: expected a positive number"),
        ({"alpha": float("nan")}, "alpha: expected a positive number"),
        ({"num_classes": 0}, "num_classes: expected a positive integer, got 0"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"padding": "valid"}, "padding: expected one of"),
        ({"norm_eps": 0.0}, "norm_eps: expected a positive number"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2(**arguments)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)], ids=str)
def test_pictures_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: expected pictures \[N, 3, H, W\]"):
        MobileNetV2(0.35)(torch.randn(shape))


def test_channels_are_rounded_as_published():
    assert [round_channels(c) for c in (3, 11.2, 12, 33.6, 16 * 0.35, 24 * 0.35, 320 * 1.4)] == [
        8,
        16,
        16,
        32,
        8,
        8,
        448,
    ]


@pytest.mark.gpu
def test_gpu_gives_the_cpus_logits():
    model = settled(MobileNetV2(0.35), 64)
    x = torch.randn(4, 3, 64, 64)
    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), rtol=1e-4, atol=1e-4)
