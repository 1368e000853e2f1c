"""Weights in other libraries' layouts. Their own networks' logits are held to in test_peers.py."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from samples import in_layout, settled
from torch import nn

from mnv2 import MobileNetV2, weights, weights_command
from mnv2.errors import InputError
from mnv2.labels import BACKGROUND, imagenet_classes
from mnv2.layouts import KERAS, LAYOUTS, MINDSPORE, TORCHVISION, layout_of
from mnv2.model import VARIANTS, layer_shapes
from mnv2.pretrained import follow
from mnv2.weight_files import Content
from mnv2.weights import Weights, load, read

IDENTIFIERS = [identifier for identifier, _ in imagenet_classes()]


def network(num_classes=4, alpha=0.35, **settings):
    model = settled(MobileNetV2(alpha, num_classes, **settings))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return network()


class Flat(nn.Module):
    """d-li14's and tonylins' module trees: everything of a block in one sequence."""

    def __init__(self, alpha, num_classes, *, head_apart):
        super().__init__()
        stem, *blocks, head, _ = layer_shapes(alpha)

        def normed(c_in, c_out, size, stride=1, groups=1):
            conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU6()]

        layers = [nn.Sequential(*normed(3, stem.c_out, 3, 2))]
        for shape in blocks:
            block = nn.Module()
            expand = normed(shape.c_in, shape.c_mid, 1) if shape.c_mid != shape.c_in else []
            depthwise = normed(shape.c_mid, shape.c_mid, 3, shape.stride, shape.c_mid)
            block.conv = nn.Sequential(*expand, *depthwise, *normed(shape.c_mid, shape.c_out, 1)[:2])
            block.residual = shape.residual
            layers.append(block)
        last = nn.Sequential(*normed(head.c_in, head.c_out, 1))
        self.features = nn.Sequential(*layers, *([] if head_apart else [last]))
        self.conv = last if head_apart else nn.Identity()
        linear = nn.Linear(head.c_out, num_classes)
        self.classifier = linear if head_apart else nn.Sequential(nn.Dropout(0.2), linear)

    def forward(self, x):
        for layer in self.features:
            y = layer.conv(x) if hasattr(layer, "conv") else layer(x)
            x = x + y if getattr(layer, "residual", False) else y
        return self.classifier(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("source", ["d-li14", "tonylins"])
def test_networks_in_one_sequence_a_block_give_their_logits(model, tmp_path, source):
    theirs = Flat(0.35, 4, head_apart=source == "d-li14")
    theirs.load_state_dict(dict(zip(theirs.state_dict(), model.state_dict().values(), strict=True)))
    torch.save(nn.DataParallel(theirs).state_dict(), tmp_path / "x.pth")  # as both publish theirs, or not
    assert read(str(tmp_path / "x.pth")).source == source
    x = torch.randn(2, 3, 65, 65)
    expected = theirs.eval()(x)
    assert (load(str(tmp_path / "x.pth"))(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.source for layout in LAYOUTS])
@pytest.mark.parametrize("kind", ["safetensors", "state dict", "wrapped", "half"])
def test_every_layout_is_known_by_its_names(model, tmp_path, layout, kind):
    path = str(tmp_path / "weights")
    state = in_layout(model.state_dict(), layout.source)
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "arch": "x", "state_dict": {f"module.{name}": t for name, t in state.items()}}, path)
    else:
        half = kind == "half"
        torch.save({name: t.half() if half and t.is_floating_point() else t for name, t in state.items()}, path)
    found = read(path)
    assert (found.source, found.alpha, found.num_classes, found.classes) == (layout.source, 0.35, 4, None)
    assert (found.padding, found.norm_eps) == (layout.padding, layout.norm_eps)
    assert found.assumed == ("padding", "norm_eps", "preprocessing")
    for name, tensor in model.state_dict().items():
        expected = tensor.half().float() if kind == "half" and tensor.is_floating_point() else tensor
        assert torch.equal(found.state[name], expected)
        assert found.state[name].dtype == tensor.dtype


@pytest.mark.parametrize("alpha", [*VARIANTS, 0.25, 0.9])
def test_the_width_is_told_by_the_shapes(tmp_path, alpha):
    torch.save(in_layout(MobileNetV2(alpha, 3).state_dict(), "timm"), tmp_path / "x")
    assert read(str(tmp_path / "x")).alpha == alpha


def change(state, source, what):
    """Spoil a state dict; returns what the message must say."""
    own = in_layout(state, source)
    names = [name for name in own if name.endswith("weight") and own[name].dim() == 4]
    norm = list(own)[1]
    if what == "lacking":
        del own[names[5]]
        return own, f"lacks {names[5]}, which"
    if what == "deeper":
        deeper = names[7].replace("1", "77", 1)
        own[deeper] = own[names[7]].clone()
        return own, f"holds {deeper}, which MobileNetV2 in {source}'s layout doesn't have"
    if what == "transposed":
        own[names[4]] = own[names[4]].transpose(0, 1).contiguous()
        return own, rf"holds {names[4]} of shape .* \(transposed\?\), expected"
    if what == "wider":
        own[names[6]] = torch.ones(8, *own[names[6]].shape[1:])
        return own, f"holds {names[6]} of shape .*, expected .* at alpha 0.35"
    if what == "not finite":
        own[norm] = own[norm] * float("nan")
        return own, f"holds {norm} with numbers that aren't finite"
    if what == "negative variance":
        variance = next(name for name in own if name.endswith("running_var"))
        own[variance] = own[variance] - 1e6
        return own, f"holds {variance} with .* variances under 0"
    assert what == "no classifier"
    weight, bias = list(own)[-2:]
    del own[weight], own[bias]
    return own, f"lacks {weight}: expected weights with a classifier"


@pytest.mark.parametrize("source", ["torchvision", "timm", "transformers"])
@pytest.mark.parametrize(
    "what", ["lacking", "deeper", "transposed", "wider", "not finite", "negative variance", "no classifier"]
)
def test_what_does_not_fit_is_refused_by_its_own_name(model, tmp_path, source, what):
    spoilt, words = change(model.state_dict(), source, what)
    path = str(tmp_path / "x.safetensors")
    save_file(spoilt, path)
    with pytest.raises(InputError, match=words.replace(".", r"\.").replace(r"\.*", ".*")) as caught:
        read(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_count_batches_are_taken(model, tmp_path):
    state = {name: t for name, t in in_layout(model.state_dict(), "d-li14").items() if "num_batches" not in name}
    torch.save(state, tmp_path / "x")
    assert read(str(tmp_path / "x")).state["features.0.1.num_batches_tracked"] == 0


def test_two_tensors_of_one_place_are_refused(model, tmp_path):
    state = in_layout(model.state_dict(), "tonylins")
    torch.save({**state, "classifier.1.weight": state["classifier.weight"]}, tmp_path / "x")
    with pytest.raises(InputError, match="holds classifier.1.weight beside classifier.weight, which means the same"):
        read(str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("source", "outputs", "classes"),
    [
        ("transformers", 1001, [BACKGROUND, *IDENTIFIERS]), ("transformers", 1000, IDENTIFIERS),
        ("transformers", 7, None), ("timm", 1000, IDENTIFIERS), ("timm", 1001, None), ("torchvision", 1000, None),
    ],
)  # fmt: skip
def test_the_order_of_the_classes_goes_by_the_layout(tmp_path, source, outputs, classes):
    path = str(tmp_path / "x")
    torch.save(in_layout(MobileNetV2(0.35, outputs).state_dict(), source), path)
    found = read(path)
    assert found.classes == classes
    assert ("classes" in found.assumed) == (classes is not None)


# What networks of each layout are, and the classes of 1000 and 1001 outputs: typed from their libraries.
USUAL = {
    "torchvision": ("symmetric", 1e-5, "torchvision", None, None),
    "tonylins": ("symmetric", 1e-5, "torchvision", IDENTIFIERS, None),
    "d-li14": ("symmetric", 1e-5, "torchvision", IDENTIFIERS, None),
    "timm": ("symmetric", 1e-5, "timm", IDENTIFIERS, None),
    "transformers": ("same", 1e-3, "tf", IDENTIFIERS, ["background", *IDENTIFIERS]),
    "keras": ("same", 1e-3, "tf", IDENTIFIERS, None),
    "mindspore": ("symmetric", 1e-5, "reference", IDENTIFIERS, [*IDENTIFIERS, ""]),
}


def test_what_is_usual_of_each_layout():
    assert {layout.source for layout in (*LAYOUTS, KERAS, MINDSPORE)} == USUAL.keys()
    for layout in (*LAYOUTS, KERAS, MINDSPORE):
        of_1000, of_1001 = (weights._usual(layout, outputs) for outputs in (1000, 1001))
        rules = tuple(of_1000[name] for name in ("padding", "norm_eps", "preprocessing"))
        assert (*rules, of_1000.get("classes"), of_1001.get("classes")) == USUAL[layout.source]
    assert (IDENTIFIERS[0], IDENTIFIERS[-1]) == ("n01440764", "n15075141")


@pytest.mark.parametrize("alpha", [0.33, 0.62, 0.875, 1.77, 3.2])
def test_any_width_is_told_by_the_shapes(tmp_path, alpha):
    torch.save(MobileNetV2(alpha, 3).state_dict(), tmp_path / "x")
    assert weights.widths(read(str(tmp_path / "x")).alpha) == weights.widths(alpha)


def test_a_tensor_under_two_prefixes_is_refused(model, tmp_path):
    state = model.state_dict()
    torch.save({**state, "module.features.0.0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "x")
    with pytest.raises(InputError, match="holds module.features.0.0.weight beside another features.0.0.weight"):
        read(str(tmp_path / "x"))


def test_whole_numbers_are_no_weights(model, monkeypatch):
    """As quantised files of Keras and MindSpore hold them."""
    state = dict(model.state_dict())
    content = Content({**state, "features.0.0.weight": state["features.0.0.weight"].char()}, "", layout=TORCHVISION)
    monkeypatch.setattr(weights.weight_files, "read", lambda path, ema: content)
    with pytest.raises(InputError, match="x: expected plain floats for features.0.0.weight, got torch.int8"):
        read("x")


def test_a_bare_file_of_that_layout_is_taken_as_googles_and_says_so(model, tmp_path):
    save_file(in_layout(model.state_dict(), "transformers"), tmp_path / "x.safetensors")
    found = read(str(tmp_path / "x.safetensors"))
    assert (found.padding, found.norm_eps, found.preprocessing) == ("same", 1e-3, "tf")
    assert found.about().endswith("where it's usual: padding same, norm_eps 0.001, preprocessing tf")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model."])
def test_checkpoints_of_training_are_taken_with_their_flags(model, tmp_path, prefix):
    """As timm, torchvision's references and Lightning write them; flags are an argparse.Namespace."""
    state = {prefix + name: tensor for name, tensor in in_layout(model.state_dict(), "timm").items()}
    average = {name: tensor + 1 for name, tensor in state.items()} | {"n_averaged": torch.tensor(3)}
    content = {"state_dict": state, "state_dict_ema": average, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "x")
    for ema in (False, True):
        found = read(str(tmp_path / "x"), ema=ema)
        assert found.averaged == ema
        assert torch.equal(found.state["classifier.1.bias"], model.classifier[1].bias + ema)


def test_names_of_another_network_are_no_layout():
    assert layout_of(["layer1.0.conv1.weight", "fc.weight"]) is None
    assert layout_of([]) is None


def test_what_was_converted_is_read_back_with_its_record(tmp_path, capsys):
    model = network(1001, norm_eps=1e-3, padding="same")
    source, path = str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")
    save_file(in_layout(model.state_dict(), "transformers"), source)
    before = read(source)
    assert weights_command.main(["convert", source, path]) == 0
    assert "classes (usual)        ImageNet-1k's, background first" in capsys.readouterr().out
    after = read(path)
    assert replace(after, path=source, state={}) == replace(before, state={})
    assert all(torch.equal(after.state[name], tensor) for name, tensor in model.state_dict().items())

    assert weights_command.main(["convert", source, path]) == 1
    assert capsys.readouterr().err == f"mnv2.weights: DST: expected a new file, and {path} exists\n"
    other = str(tmp_path / "z.safetensors")
    assert weights_command.main(["convert", source, other, "--padding", "symmetric", "--eps", "1e-5"]) == 0
    after = read(other)
    assert (after.padding, after.norm_eps, after.assumed) == ("symmetric", 1e-5, ("preprocessing", "classes"))
    third = str(tmp_path / "third")
    assert weights_command.main(["convert", other, third, "--preprocessing", "timm"]) == 0
    assert (read(third).preprocessing, read(third).assumed) == ("timm", ("classes",))


RECORDS = [
    '{"alpha": true}', '{"classes": ["a"]}', '{"colour": "red"}', '{"resize": 0.5}', "[", "[]", "3", "null",
    '{"sha256": 1%s}' % ("0" * 63), '{"assumed": ["foo"]}', '{"source": "x\\ny"}', '{"norm_eps": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_damaged_record_is_refused(model, tmp_path, record):
    path = str(tmp_path / "x.safetensors")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "mnv2 weights, 1", "record": record})
    with pytest.raises(InputError, match="record of|damaged"):
        read(path)


def test_a_folded_network_is_no_file_of_weights(model, tmp_path):
    from mnv2 import fold

    fold(model).save(str(tmp_path / "x"))
    with pytest.raises(InputError, match="holds a folded network"):
        read(str(tmp_path / "x"))


def test_inspect_tells_what_a_file_is(model, tmp_path, capsys):
    path = str(tmp_path / "x.safetensors")
    save_file(in_layout(model.state_dict(), "timm"), path)
    assert weights_command.main(["inspect", path, "--tensors"]) == 0
    out = capsys.readouterr().out
    for words in ("timm", "0.35", "not recorded", read(path).sha256, "features.0.0.weight", "(16, 3, 3, 3)"):
        assert words in out
    assert weights_command.main(["inspect", str(tmp_path / "no")]) == 1
    assert capsys.readouterr().err == f"mnv2.weights: can't read {tmp_path / 'no'}: No such file or directory\n"


@pytest.mark.parametrize(("words", "status"), [([], 2), (["burn"], 2), (["--help"], 0)])
def test_commands_are_listed(capsys, words, status):
    assert weights_command.main(words) == status
    output = capsys.readouterr()
    assert "inspect" in (output.out if status == 0 else output.err)


def test_weights_from_elsewhere_decide_open_flags(tmp_path):
    from mnv2.config import ValidateConfig

    found = Weights("x", {}, "timm", alpha=0.5, padding="symmetric", norm_eps=1e-5, preprocessing="timm")
    followed = follow(ValidateConfig(), found)
    assert (followed.alpha, followed.preprocessing) == (0.5, "timm")
    assert weights.classes_in_words(["a", "b", "c", "d"]) == "4: a, b, c, ..."
