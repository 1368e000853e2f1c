"""Weights in other libraries' files give the logits that those libraries give."""

from __future__ import annotations

import importlib.util
import secrets

import peer_networks
import pytest
import torch
from recorded_peers import pictures, recorded, weights, write

from mnv2 import MobileNetV2
from mnv2.weights import load

# The first is that of the files that are published.
CONTAINERS = {
    "torchvision": [".pth"],
    "timm": [".safetensors", ".pth"],
    "transformers": [""],
    "keras": [".published.h5", ".h5", ".model.h5", ".weights.h5", ".keras"],
    "mindcv": [".ckpt"],
    "mindvision": [".ckpt"],
}
PEERS = {name: recorded(name) for name in CONTAINERS}
# Of the largest logit: libraries differ by 3e-6 at most, and what is wrong in a network by more than 1e-4.
TOLERANCE = 1e-5


def error(model: MobileNetV2, expected, seed: int = 0) -> float:
    """Largest difference to the peer's logits, over its largest logit."""
    expected = torch.as_tensor(expected)
    with torch.no_grad():
        logits = model(torch.from_numpy(pictures(seed)))[:, : expected.shape[1]]
    return ((logits - expected).abs().max() / expected.abs().max()).item()


CASES = [
    pytest.param(name, variant, container, id=f"{name}-{variant}{container}")
    for name, peer in PEERS.items()
    for number, variant in enumerate(peer.variants)
    for container in CONTAINERS[name][: None if number == 0 else 1]
]


@pytest.mark.parametrize(("peer", "variant", "container"), CASES)
def test_logits_are_the_recorded(peer, variant, container, tmp_path):
    model = load(str(write(PEERS[peer], variant, container, tmp_path)))
    assert (model.alpha, model.num_classes) == (variant.alpha, variant.classes)
    assert error(model, variant.logits) < TOLERANCE


@pytest.mark.parametrize("name", PEERS)
def test_the_record_tells_networks_apart(name, tmp_path):
    """Another padding, another epsilon, or two layers of the same shapes exchanged."""
    peer = PEERS[name]
    variant = peer.variants[0]
    right = load(str(write(peer, variant, CONTAINERS[name][0], tmp_path)))
    settings = {"padding": variant.padding, "norm_eps": variant.norm_eps}
    for name, others in {"padding": {"same", "symmetric"}, "norm_eps": {1e-3, 1e-5}}.items():
        (other,) = others - {settings[name]}
        wrong = MobileNetV2(variant.alpha, variant.classes, **settings | {name: other}).eval()
        wrong.load_state_dict(right.state_dict())
        assert error(wrong, variant.logits) > 10 * TOLERANCE, name
    exchanged = right.state_dict()
    one, two = "features.8.conv.1.0.weight", "features.9.conv.1.0.weight"
    right.load_state_dict(exchanged | {one: exchanged[two].clone(), two: exchanged[one].clone()})
    assert error(right, variant.logits) > 10 * TOLERANCE


@pytest.mark.parametrize("name", PEERS)
def test_logits_are_the_library_s_own(name, tmp_path):
    """The library as it is installed, fresh weights, and files that it writes itself."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} isn't installed (CONTRIBUTING.md says which libraries are recorded)")
    seed = secrets.randbits(32)
    for number, variant in enumerate(PEERS[name].variants):
        peer = getattr(peer_networks, name)(variant)
        assert {name: tuple(shape) for name, shape in variant.shapes.items()} == peer.shapes
        expected = peer.run(weights(peer.shapes, seed), pictures(seed))
        for ending, save in peer.save.items():
            path = str(tmp_path / f"weights{number}{ending}")
            save(path)
            assert error(load(path), expected, seed) < TOLERANCE, (variant, ending, seed)
