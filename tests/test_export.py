"""Exported files: what they compute beside the trained network, what they tell, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from processes import environment
from safetensors import safe_open
from safetensors.torch import save_file
from samples import in_layout, save_weights, settled
from torch import nn

from mnv2 import InferenceNetwork, MobileNetV2, __version__, export, fold, formats, plain, weights
from mnv2.data import Loader, profile
from mnv2.distributed import World
from mnv2.errors import InputError, RunError
from mnv2.model import layer_shapes
from mnv2.weights import read

CLASSES = ["n02123394", "bee", "", "dog"]  # a WordNet id, a number without a class
NAMES = ["Persian cat", "bee", "2", "dog"]
# 36 pixels are 18, 9, 5, 3 further on: SAME pads even and odd sides; 33 are 17, 9, 5, 3.
CASES = {
    "onnx": {"format": "onnx", "padding": "same", "resize": 36},
    "onnx, all else": {"format": "onnx", "resize": 33, "fold": False, "precision": "fp16", "dynamic_size": True},
    "torch": {"format": "torch", "padding": "same", "resize": 36},
    "torch, unfolded, fp16": {"format": "torch", "resize": 33, "fold": False, "precision": "fp16"},
    "safetensors": {"format": "safetensors", "padding": "same", "resize": 33},
    "safetensors, fp16": {"format": "safetensors", "resize": 32, "precision": "fp16"},
    "safetensors, unfolded": {"format": "safetensors", "padding": "same", "resize": 33, "fold": False},
}
MORE = {
    "onnx, unfolded": {"format": "onnx", "padding": "same", "resize": 35, "fold": False},
    "onnx, any size": {"format": "onnx", "resize": 34, "dynamic_size": True},
    "torch, any size": {"format": "torch", "resize": 34, "fold": False, "dynamic_size": True},
}
WORDS = ["--alpha", "0.35"]


def trained(padding: str = "symmetric") -> MobileNetV2:
    """A network whose rounding errors stay as small as a trained one's, since its residual branches are small."""
    torch.manual_seed(0)
    model = MobileNetV2(0.35, len(CLASSES), padding=padding, norm_eps=1e-3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    for block in model.features[1:-1]:
        if block.shape.residual:
            nn.init.constant_(block.conv[-1].weight, 0.3)
    return settled(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With checkpoints ``same.pt`` and ``symmetric.pt``."""
    root = tmp_path_factory.mktemp("exported")
    for padding in ("same", "symmetric"):
        save_weights(
            root / f"{padding}.pt", trained(padding), CLASSES, padding=padding, norm_eps=1e-3, preprocessing="tf"
        )
    return root


def run(folder: Path, case: dict, *words: object) -> int:
    """The command, with the settings of ``case``."""
    padding = case.get("padding", "symmetric")
    flags = [word for name, value in {**case, "padding": padding}.items() for word in (f"--{name}", str(value))]
    return export.main([*WORDS, *flags, "--pretrained", str(folder / f"{padding}.pt"), *map(str, words)])


@pytest.fixture(scope="module")
def exported(folder):
    """File of a case, made when it is first asked for."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            case = {**CASES, **MORE}[name]
            path = folder / (name + formats.FORMATS[case["format"]].extension)
            assert run(folder, case, "--output", path) == 0
            made[name] = path
        return made[name]

    return give


def runner(path: Path, case: dict):
    """How a user of the file gets logits from pictures."""
    if case["format"] == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(["logits"], {"pictures": x.numpy()})[0])
    if case["format"] == "torch":
        return torch.export.load(path).module()
    if case.get("fold", True):
        return InferenceNetwork.load(str(path))
    network = MobileNetV2(0.35, len(CLASSES), padding=case["padding"], norm_eps=1e-3).eval()
    weights.read(str(path)).load_into(network)
    return network


@torch.no_grad()
def check(path: Path, case: dict) -> None:
    """On fresh pictures of one and of three a batch, and of other sizes where any will do."""
    exact = trained(case.get("padding", "symmetric")).double()
    half = case.get("precision") == "fp16"
    network, side = runner(path, case), case["resize"]
    shapes = [(1, 3, side, side), (3, 3, side, side)]
    if case.get("dynamic_size"):
        shapes += [(2, 3, 33, 47), (1, 3, 50, 64), (1, 3, 65, 33)]
    for shape in shapes:
        x = torch.randn(shape).to(torch.float16 if half else torch.float32)
        expected, got = exact(x.double()), network(x)
        assert got.dtype == x.dtype
        error = (got - expected).abs().max() / expected.abs().max()
        assert error < (5e-2 if half else 1e-4), shape


@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_what_the_trained_network_does(exported, name):
    check(exported(name), CASES[name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE)
def test_more_files(exported, name):
    check(exported(name), MORE[name])


def sizes(value) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def test_onnx_is_standard_operators_in_one_file(exported):
    folded, other = onnx.load(exported("onnx")), onnx.load(exported("onnx, all else"))
    operators = {"Conv": 52, "Clip": 35, "Add": 10, "ReduceMean": 1, "Gemm": 1}
    assert Counter(node.op_type for node in folded.graph.node) == operators
    assert Counter(node.op_type for node in other.graph.node) == {**operators, "BatchNormalization": 52}
    for model in (folded, other):
        assert {node.domain for node in model.graph.node} == {""}
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", formats.OPSET)]
        assert [value.name for value in model.graph.input] == ["pictures"]
        assert [value.name for value in model.graph.output] == ["logits"]
        assert sizes(model.graph.output[0]) == ["batch", 4]
        assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
        assert b"pkg.torch" not in model.SerializeToString()  # no notes of the exporter's, with paths of this machine
    assert sizes(folded.graph.input[0]) == ["batch", 3, 36, 36]
    assert sizes(other.graph.input[0]) == ["batch", 3, "height", "width"]
    assert other.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    names = {tensor.name for tensor in folded.graph.initializer}
    assert {"features.0.0.weight", "features.2.conv.1.0.bias", "classifier.1.weight"} <= names


def test_a_pt2_is_atens_operations(exported):
    for name in ("torch", "torch, unfolded, fp16"):
        graph = torch.export.load(exported(name)).graph
        overloads = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert {overload.namespace for overload in overloads} == {"aten"}
        assert sum("conv2d" in str(overload) for overload in overloads) == 52
        assert sum("batch_norm" in str(overload) for overload in overloads) == (52 if "unfolded" in name else 0)
        assert b"/mnv2/" not in exported(name).read_bytes()


def test_a_pt2_needs_no_mnv2(exported, tmp_path):
    x = torch.randn(3, 3, 36, 36)
    torch.save(x, tmp_path / "x")
    words = (
        "import sys, torch; sys.modules.update(mnv2=None, kernels=None); "
        "network = torch.export.load(sys.argv[1]).module(); torch.save(network(torch.load('x')).detach(), 'y')"
    )
    command = [sys.executable, "-c", words, exported("torch")]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=100)
    assert torch.allclose(torch.load(tmp_path / "y"), fold(trained("same"))(x), atol=1e-4)


def test_files_say_what_they_hold(exported, folder):
    session = onnxruntime.InferenceSession(exported("onnx"), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    file = {formats.ABOUT: ""}
    torch.export.load(exported("torch"), extra_files=file)
    again = json.loads(file[formats.ABOUT])
    assert told == {name: value if isinstance(value, str) else json.dumps(value) for name, value in again.items()}
    with safe_open(exported("safetensors"), "pt") as file:
        folded = json.loads(file.metadata()["about"])
    assert folded == {**again, "resize": 33, "input": export.preparation("tf", 33)}
    assert (again["alpha"], again["resize"], again["padding"], again["norm_eps"]) == (0.35, 36, "same", 1e-3)
    assert (again["classes"], again["class_names"]) == (CLASSES, NAMES)
    assert (again["weights"], again["source"], again["mnv2_version"]) == ("same.pt", "mnv2", __version__)
    assert again["fold"] is True
    assert (again["preprocessing"], again["dtype"], len(again["sha256"])) == ("tf", "float32", 64)


def test_preprocessing_is_told_in_both_units():
    told = export.preparation("torchvision", 224)
    assert (told["layout"], told["channels"]) == ("NCHW", "RGB")
    assert (told["resize_short_side_to"], told["centre_crop"], told["resize_filter"]) == (256, 224, "bilinear")
    assert told["mean_of_pixels_0_to_1"] == [0.485, 0.456, 0.406]
    assert told["std_of_pixels_0_to_255"] == [58.395, 57.12, 57.375]
    assert export.preparation("timm", 224)["resize_filter"] == "bicubic"
    assert export.preparation("tf", 96)["mean_of_pixels_0_to_1"] == [0.5] * 3


def test_unfolded_safetensors_are_the_weights_themselves(exported):
    with safe_open(exported("safetensors, unfolded"), "pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    expected = trained("same").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert metadata["format"] == "mnv2 weights, 1"
    found = read(exported("safetensors, unfolded"))
    assert (found.classes, found.padding, found.norm_eps, found.preprocessing) == (CLASSES, "same", 1e-3, "tf")
    assert (found.alpha, found.resize, found.source, found.assumed) == (0.35, None, "mnv2", ())


@pytest.mark.parametrize("resize", [160, None])
def test_the_resolution_of_training_is_kept_and_not_made_up(tmp_path, resize, capsys):
    known = {"norm_eps": 1e-3} | ({"resize": resize} if resize else {})
    save_weights(tmp_path / "symmetric.pt", trained(), CLASSES, **known)
    # --padding is given, and is as usual: it stays an assumption of the weights'; --preprocessing is another.
    case = {"format": "safetensors", "resize": 32}
    assert run(tmp_path, {**case, "fold": False, "preprocessing": "tf"}, "--output", tmp_path / "made") == 0
    output = capsys.readouterr()
    assert (f"was trained with {resize}" in output.err) == bool(resize)
    usual = "padding symmetric, preprocessing torchvision"
    assert f"\nweights: {tmp_path / 'symmetric.pt'}, from mnv2, where it's usual: {usual}\n" in output.out
    found = read(str(tmp_path / "made"))
    assert (found.resize, found.preprocessing, found.assumed) == (resize, "tf", ("padding",))
    assert run(tmp_path, case, "--output", tmp_path / "folded") == 0
    with safe_open(tmp_path / "folded", "pt") as file:
        told = json.loads(file.metadata()["about"])
    assert (told["resize"], told["input"]["centre_crop"], told.get("trained_at")) == (32, 32, resize)


def test_what_is_printed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case = {"format": "safetensors", "resize": 32}
    assert run(folder, case) == 0
    made, network, source, runs, checked = capsys.readouterr().out.splitlines()
    (name,) = os.listdir()
    assert name == "mobilenetv2_0.35_32_folded.safetensors"
    assert made == f"{name}: weights for mnv2, fp32, BatchNorm folded, {os.path.getsize(name) / 2**20:.2f} MiB"
    assert network == "alpha 0.35, pictures [batch, 3, 32, 32], 4 classes, preprocessing tf"
    assert source == f"weights: {folder / 'symmetric.pt'}, from mnv2"
    assert runs == "run by mnv2 beside the trained network in fp64, made-up pictures in batches of 1 and 3"
    assert checked.startswith("logits differ by at most ")
    assert checked.endswith(" of the largest (0.001 is allowed), top-1 is the same for 4 of 4 pictures")
    # A name that was not given is not overwritten, one that was is.
    assert run(folder, case) == 1
    assert capsys.readouterr().err == (
        f"mnv2.export: --output: {name} is there already; name it with --output to replace it\n"
    )
    assert run(folder, {**case, "fold": False}, "--output", name) == 0
    assert "BatchNorm kept" in capsys.readouterr().out
    assert os.listdir() == [name]


def wrong_same(self, x):
    """Zeros on the wrong sides."""
    height, width = x.shape[-2:]
    padded = nn.functional.pad(x, (1, width % 2, 1, height % 2))
    return nn.Conv2d.forward(self, padded)


def another_fold(model, dtype):
    """A network without the first shift."""
    model = copy.deepcopy(model)
    nn.init.zeros_(model.features[0][1].bias)
    return fold(model, dtype)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (CASES["torch"], (plain.SameConv2d, "forward", wrong_same)),
        (CASES["safetensors"], (formats, "fold", another_fold)),
    ],
    ids=["padding", "bias"],
)
def test_a_wrong_file_does_not_take_the_old_ones_place(folder, tmp_path, monkeypatch, case, fault, capsys):
    monkeypatch.setattr(*fault)
    (tmp_path / "file").write_text("old")
    assert run(folder, case, "--output", tmp_path / "file") == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"mnv2.export: {tmp_path / 'file'} is not written, as ")
    assert "runs it wrongly: logits differ by at most " in output.err
    assert output.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_ties_are_not_told_as_the_same_class(tmp_path):
    model = MobileNetV2(0.1, 4).eval()
    nn.init.zeros_(model.classifier[1].weight)
    model.classifier[1].bias.data = torch.tensor([9.998, 10.0, 0, 0])  # the first two are the same in fp16
    found = export.export(model, str(tmp_path / "file"), "safetensors", resize=8, dtype=torch.float16)
    assert (found.same, found.tied, found.pictures) == (0, 4, 4)
    assert str(found).endswith("top-1 is the same for 0 of 4 pictures, tied to within 0.5 for 4")


def test_the_check_counts_differences_and_flips():
    agreement = export.Agreement(1e-3, 1.0, 1e-3, same=3, tied=1, pictures=4)
    assert agreement.holds
    assert agreement._replace(same=0, tied=4).holds
    assert str(agreement).endswith(", top-1 is the same for 3 of 4 pictures, tied to within 0.001 for 1")
    assert not agreement._replace(difference=1.1e-3).holds
    assert not agreement._replace(difference=float("nan")).holds
    assert not agreement._replace(same=2).holds
    model = MobileNetV2(0.1, 3).eval()
    subject = formats.Exported(model, 8, True, torch.float32, False, {})
    nn.init.zeros_(model.classifier[1].weight)
    model.classifier[1].bias.data = torch.tensor([1.0, 0.9999, 0.99])
    # The same class; another, as likely to within the tolerance; another.
    for shift, same, tied in (([0.0002, 0, 0], 3, 0), ([0, 0.0002, 0], 0, 3), ([0, 0, 0.02], 0, 0)):
        found = export.compare(lambda x, shift=shift: model(x) + torch.tensor(shift), subject, 2)
        assert (found.same, found.tied, found.pictures, found.largest) == (same, tied, 3, 1.0)
        assert found.difference == pytest.approx(max(shift), rel=1e-2)
    with pytest.raises(RunError, match=r"expected logits of shape \(3, 3\), got \(3, 2\)"):
        export.compare(lambda x: model(x)[:, :2], subject, 2)
    model.classifier[1].bias.data[0] = float("inf")
    with pytest.raises(RunError, match="the network itself gives numbers that aren't finite"):
        export.compare(model, subject, 2)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(folder, tmp_path, monkeypatch, package, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert run(folder, CASES["onnx"], "--output", tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert error.startswith("mnv2.export: --format onnx: needs onnx, onnxscript and onnxruntime (")
    assert error.endswith("): pip install 'mnv2[export]'\n")
    assert package in error.partition("(")[2]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--format", "tflite"], 2, "invalid choice: 'tflite'"),
        (["--precision", "bf16"], 2, "invalid choice: 'bf16'"),
        (["--device", "cuda"], 2, "invalid choice: 'cuda'"),
        (["--dynamic_size", "--resize", "32"], 2, "--resize: expected at least 33 with --dynamic_size, got 32"),
        (["--dynamic_size", "--padding", "same"], 2, "--dynamic_size: expected False with padding same, whose"),
        (["--format", "safetensors", "--dynamic_size"], 2, "--dynamic_size: expected False for safetensors"),
        (["--format", "safetensors", "--fold", "0", "--precision", "fp16"], 2, "--precision: expected fp32 for unf"),
        (["--output", ""], 2, "--output: expected some text, got nothing"),
        (["--output", "."], 1, "--output: expected a file, got ."),
        (["--output", "missing/file"], 1, "--output: can't write to missing: No such file or directory"),
        (["--output", "WEIGHTS"], 1, "--output: expected another file than the weights' own, got "),
        (["--pretrained", "false"], 1, "--pretrained: expected weights, got False, which is a network that has lear"),
        (["--pretrained", "none.pt"], 1, "--pretrained: can't read none.pt: No such file or directory"),
        (["--alpha", "0.5"], 1, "symmetric.pt is of a network with alpha 0.35, got 0.5"),
        (["--fold", "maybe"], 2, "expected true or false, got 'maybe'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cant_be_is_one_line(folder, tmp_path, monkeypatch, words, status, message, capsys):
    monkeypatch.chdir(tmp_path)
    own = str(folder / "symmetric.pt")
    command = [*WORDS, "--pretrained", own, *(own if word == "WEIGHTS" else word for word in words)]
    before = (folder / "symmetric.pt").read_bytes()
    if status == 2:
        with pytest.raises(SystemExit) as ended:
            export.main(command)
        assert ended.value.code == 2
    else:
        assert export.main(command) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err
    assert os.listdir(tmp_path) == []
    assert (folder / "symmetric.pt").read_bytes() == before


def test_a_folders_own_files_are_not_overwritten(tmp_path, capsys):
    own = tmp_path / "model.safetensors"
    save_file(in_layout(trained().state_dict(), "timm"), own)
    (tmp_path / "config.json").write_text('{"architecture": "mobilenetv2_035"}')
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(own)
    before = own.read_bytes()
    words = ["--format", "safetensors", "--resize", "32", "--norm_eps", "1e-3", "--pretrained", str(tmp_path)]
    for name in ("model.safetensors", "config.json", "link"):
        assert export.main([*words, "--output", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert f"mnv2.export: --output: expected another file than the weights' own, got {tmp_path / name}\n" in error
    assert own.read_bytes() == before
    assert export.main([*words, "--output", str(tmp_path / "folded.safetensors")]) == 0


def test_one_process_alone(folder):
    config = export.ExportConfig(pretrained=str(folder / "symmetric.pt"))
    with pytest.raises(InputError, match="expected one process, got 2"):
        list(export.export_weights(config, World(size=2)))


def test_a_weight_out_of_the_range_of_fp16_is_named(tmp_path, capsys):
    model = trained()
    nn.init.constant_(model.features[0][1].weight, 1e9)
    save_weights(tmp_path / "symmetric.pt", model, None)
    case = {"format": "torch", "resize": 32, "precision": "fp16"}
    assert run(tmp_path, case, "--output", tmp_path / "file") == 1
    error = capsys.readouterr().err
    assert error.startswith("mnv2.export: can't export in fp16: features.0.0.weight: expected finite numbers in ")
    assert os.listdir(tmp_path) == ["symmetric.pt"]


def test_the_functions_own_arguments(tmp_path):
    for model, words, error, message in (
        (nn.Linear(2, 2), {}, TypeError, "model: expected a MobileNetV2, got Linear"),
        (MobileNetV2(0.1, 4), {"format": "tflite"}, InputError, "--format: expected onnx or torch or safetensors"),
        (MobileNetV2(0.1, 4), {"dtype": torch.bfloat16}, InputError, "--precision: expected fp32 or fp16"),
    ):
        with pytest.raises(error, match=message):
            export.export(model, str(tmp_path / "file"), **words)
    with pytest.raises(RunError, match="can't write .*missing"):
        export.export(MobileNetV2(0.1, 4), str(tmp_path / "missing" / "file"), "torch", resize=8)
    model = MobileNetV2(0.1, 4, backend="torch").train()  # is exported as it is in evaluation, and stays in training
    path, words = str(tmp_path / "file"), {"format": "safetensors", "resize": 8, "fold": False}
    about = {"licence": "Apache-2.0", "path": "x", "state": "y", "averaged": True, "classes": CLASSES}
    found = export.export(model, path, **words, about=about)
    assert found.pictures == 4
    assert model.training
    made, before = read(path), Path(path).read_bytes()
    assert (made.path, made.averaged, made.classes, made.resize) == (path, False, CLASSES, None)
    with pytest.raises(InputError, match=r"^about: expected 4 names as its record of classes, got \['bee'\]$"):
        export.export(model, path, **words, about={"classes": ["bee"]})
    nn.init.constant_(model.features[0][1].running_var, -1)
    with pytest.raises(InputError, match=r"holds features.0.1.running_var with numbers that aren't finite, or var"):
        export.export(model, path, **words)
    assert Path(path).read_bytes() == before


def test_the_plain_network_shares_nothing_with_the_trained_one():
    model, x = trained("same"), torch.randn(2, 3, 35, 44)
    for folded in (True, False):
        network = plain.plain(model, fold=folded)
        expected = network(x)
        assert not expected.requires_grad
        other = copy.deepcopy(model)
        network = plain.plain(other, fold=folded)
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        assert torch.equal(network(x), expected)
    assert plain.plain(model, fold=False).state_dict().keys() == model.state_dict().keys()
    assert len(plain.plain(model).state_dict()) == 2 * len([*layer_shapes()[1:-2], *range(17 + 17 + 1 + 1)])


@pytest.mark.parametrize("kind", ["MobileNetV2", "InferenceNetwork"])
def test_users_may_export_the_networks_themselves(kind):
    model = trained("same")
    model.backend = "torch"
    network = fold(model) if kind == "InferenceNetwork" else model
    batch = ({0: torch.export.Dim("batch")},)
    made = torch.export.export(network, (torch.randn(2, 3, 36, 36),), dynamic_shapes=batch)
    overloads = [node.target for node in made.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {overload.namespace for overload in overloads} == {"aten"}
    x = torch.randn(5, 3, 36, 36)
    assert torch.allclose(made.module()(x), network(x), atol=1e-4)


def test_real_photographs_are_seen_as_by_the_network(test_data, tmp_path):
    file, path = test_data / "mobilenetv2_1.0_224_real.safetensors", str(tmp_path / "real.onnx")
    assert export.main(["--pretrained", str(file), "--preprocessing", "torchvision", "--output", path]) == 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    model = MobileNetV2()
    weights.read(str(file)).load_into(model)
    network = fold(model.eval())
    expected = np.load(test_data / "imagenet_samples_logits.npz")
    paths = [str(test_data / "imagenet_samples" / "val" / name) for name in expected["files"]]
    loader = Loader(paths, [0] * len(paths), profile("torchvision", 224), batch_size=40, world=World())
    batches = [batch.images[batch.numbers >= 0] for batch in loader]
    got = np.concatenate([session.run(None, {"pictures": images.numpy()})[0] for images in batches])
    with torch.inference_mode():
        ours = torch.cat([network(images) for images in batches]).numpy()
    assert np.array_equal(got.argmax(1), ours.argmax(1))
    assert np.abs(got - ours).max() < 1e-5 * np.abs(ours).max()
    assert np.abs(got - expected["logits"]).max() < 1e-3 * np.abs(expected["logits"]).max()
    assert len(got) == 200
