"""Weights in other libraries' files give the logits that those libraries give."""

from __future__ import annotations

import importlib.util
import secrets

import peer_networks
import pytest
import torch
from recorded_peers import KEPT, pictures, recorded, weights, write

from mnv2 import MobileNetV2, keras_file, mindspore_file
from mnv2.weights import load

CONTAINERS = {
    "torchvision": [".pth"],
    "timm": [".pth"],
    "transformers": [""],
    "keras": [".h5", ".model.h5", ".weights.h5", ".published.h5"],
    "mindcv": [".ckpt"],
    "mindvision": [".ckpt"],
}
PEERS = {name: recorded(name) for name in CONTAINERS}
# Of the largest logit: two orders of summation differ by 3e-6 at most here, and an epsilon of 1e-5 for 1e-3 by 5e-4.
TOLERANCE = 1e-5


def network(path: str, peer: str) -> MobileNetV2:
    """The network of a file in evaluation."""
    reader = {"keras": keras_file, "mindcv": mindspore_file, "mindvision": mindspore_file}.get(peer)
    if reader is None:
        return load(path)
    state = {}
    for name, tensor in reader.read(path).items():
        ours = reader.torchvision_name(name)
        if ours is not None:
            state[ours] = mindspore_file.torchvision_tensor(ours, tensor)
    alpha = next(v.alpha for v in PEERS[peer].variants if len(state["features.0.0.weight"]) == stem(v.alpha))
    settings = {"padding": "same", "norm_eps": 1e-3} if peer == "keras" else {}
    model = MobileNetV2(alpha, len(state["classifier.1.weight"]), **settings).eval()
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("num_batches_tracked")}
    model.load_state_dict(state | counters)
    return model


def stem(alpha: float) -> int:
    return MobileNetV2(alpha).layer_shapes(32)[0].c_out


def error(model: MobileNetV2, expected, seed: int = 0) -> float:
    """Largest difference to the peer's logits, over its largest logit."""
    expected = torch.as_tensor(expected)
    with torch.no_grad():
        logits = model(torch.from_numpy(pictures(seed)))[:, : expected.shape[1]]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


CASES = [
    pytest.param(name, variant, container, id=f"{name}-{variant}{container}")
    for name, peer in PEERS.items()
    for variant in peer.variants
    for container in CONTAINERS[name]
]


@pytest.mark.parametrize(("peer", "variant", "container"), CASES)
def test_logits_are_the_recorded(peer, variant, container, tmp_path):
    path = write(PEERS[peer], variant, container, tmp_path)
    model = network(str(path), peer)
    assert (model.alpha, model.num_classes) == (variant.alpha, variant.classes)
    assert error(model, variant.logits) < TOLERANCE


@pytest.mark.parametrize("name", PEERS)
def test_the_record_tells_networks_apart(name, tmp_path):
    """What is as like as another padding, another epsilon or two layers exchanged gives other logits."""
    peer = PEERS[name]
    variant = peer.variants[0]
    right = network(str(write(peer, variant, CONTAINERS[name][0], tmp_path)), name)
    other = {"symmetric": "same", "same": "symmetric"}[variant.padding]
    for settings in ({"padding": other}, {"norm_eps": {1e-5: 1e-3, 1e-3: 1e-5}[variant.norm_eps]}):
        wrong = MobileNetV2(
            variant.alpha, variant.classes, **{"padding": variant.padding, "norm_eps": variant.norm_eps} | settings
        )
        wrong.load_state_dict(right.state_dict())
        assert error(wrong.eval(), variant.logits) > 10 * TOLERANCE, settings
    exchanged = right.state_dict()
    one, two = "features.8.conv.1.0.weight", "features.9.conv.1.0.weight"
    right.load_state_dict(exchanged | {one: exchanged[two].clone(), two: exchanged[one].clone()})
    assert error(right, variant.logits) > 10 * TOLERANCE


@pytest.mark.parametrize("name", PEERS)
def test_logits_are_the_library_s_own(name, tmp_path):
    """The library as it is installed, fresh weights, and files that it writes itself."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} isn't installed")
    seed = secrets.randbits(32)
    for number, variant in enumerate(PEERS[name].variants):
        peer = getattr(peer_networks, name)(variant)
        assert {name: tuple(shape) for name, shape in variant.shapes.items()} == peer.shapes
        expected = peer.run(weights(peer.shapes, seed), pictures(seed))
        for ending, save in peer.save.items():
            path = str(tmp_path / f"weights{number}{ending}")
            save(path)
            assert error(network(path, name), expected, seed) < TOLERANCE, (variant, ending, seed)


def test_logits_that_are_kept_are_as_many():
    assert all(len(logits) == KEPT for peer in PEERS.values() for v in peer.variants for logits in v.logits)
