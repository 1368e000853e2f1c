"""Record anew what other libraries' MobileNetV2 make of the tests' made-up weights.

    python tests/record_peers.py PEER...

A PEER is torchvision, timm, transformers, keras, mindcv or mindvision, installed as `peer_networks.py` says.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import peer_networks
from recorded_peers import KEPT, Peer, Variant, pictures, weights

SYMMETRIC, SAME = ("symmetric", 1e-5), ("same", 1e-3)
VARIANTS = {
    "torchvision": [Variant(1.0, 1000, *SYMMETRIC)],
    "timm": [Variant(alpha, 1000, *SYMMETRIC) for alpha in (0.5, 1.0, 1.4)],
    "transformers": [
        *(Variant(alpha, 1001, *SAME) for alpha in (0.35, 0.75, 1.4)),
        Variant(0.75, 1001, "symmetric", 1e-3),
    ],
    "keras": [Variant(alpha, 1000, *SAME) for alpha in (0.35, 0.75, 1.0, 1.4)],
    "mindcv": [Variant(alpha, 1000, *SYMMETRIC) for alpha in (0.75, 1.0, 1.4)],
    "mindvision": [Variant(alpha, 1001, *SYMMETRIC) for alpha in (0.35, 0.75, 1.3)],
}


def record(name: str) -> None:
    """Run each variant of the peer ``name`` and write its record."""
    aliases, variants = {}, []
    for variant in VARIANTS[name]:
        network = getattr(peer_networks, name)(variant)
        logits = network.run(weights(network.shapes), pictures())[:, :KEPT]
        variants.append(replace(variant, shapes=network.shapes, config=network.config, logits=logits.tolist()))
        aliases = network.aliases
    made_by = [name, "mindspore"] if name.startswith("mind") else [name]
    versions = {library: importlib.metadata.version(library) for library in made_by}
    Peer(name, versions, variants, aliases).save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("peers", nargs="+", choices=VARIANTS, metavar="PEER", help=", ".join(VARIANTS))
    for name in parser.parse_args().peers:
        record(name)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # bench, behind what MindSpore's libraries install beside them
    main()
