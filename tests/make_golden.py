"""Write golden.npz: what torch, diffusers and transformers compute, for machines without them.

    python tests/make_golden.py

test_golden.py compares tiny_sd with it. layers.py draws the weights and inputs, the same
everywhere, so they are not stored; "shapes" lists the weights of each layer.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import test_layers  # noqa: E402
import test_parity  # noqa: E402

import layers  # noqa: E402
from conftest import SCHEDULER  # noqa: E402
from helpers_diffusers import first  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.npz")


def golden_arrays():
    """Return {name: array} of all references."""
    arrays = {}

    def add(name, result):
        for i, array in enumerate(layers.leaves(result)):
            arrays[f"{name}/{i}"] = np.asarray(array, np.float32)

    for name in layers.PRIMITIVES:
        add(f"primitive/{name}", test_layers.primitive_reference(name))
    for name in layers.LAYERS:
        add(f"layer/{name}", test_layers.layer_reference(name))
    for name in layers.SAMPLERS:
        options = test_parity.options(name, None)
        scheduler = test_parity.CLASSES[name].from_config(SCHEDULER, **options)
        x = first(layers.noisy_picture())
        path = test_parity.reference_trajectory(scheduler, x, 5, 7)     # 5 steps, seed 7
        add(f"sampler/{name}", [x_t for _, x_t in path])
    shapes = {name: test_layers.layer_shapes(name) for name in layers.LAYERS}
    return arrays | {"shapes": np.array(json.dumps(shapes))}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **golden_arrays())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")
