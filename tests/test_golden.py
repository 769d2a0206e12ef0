"""With NumPy alone: every primitive, layer and sampler against golden.npz.

make_golden.py computed it with torch, diffusers and transformers; layers.py lists the cases.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_sd as sd
from conftest import REFERENCES, ROOT, SCHEDULER
from extras import like_diffusers
from layers import (
    LAYERS,
    PRIMITIVES,
    SAMPLERS,
    assert_close,
    layer_inputs,
    layer_weights,
    leaves,
    network,
    noisy_picture,
    primitive_inputs,
    run,
)

GOLDEN = np.load(Path(__file__).with_name("golden.npz"))
SHAPES = json.loads(str(GOLDEN["shapes"]))


@pytest.fixture(params=["formula", "fast"])
def form(request, monkeypatch):
    """Compute by the formulas, then by what extras/fast.py has in their place."""
    if request.param == "formula":
        monkeypatch.setattr(sd, "FAST", {})


def golden(name):
    """Return the reference arrays of a name, in order."""
    return [GOLDEN[f"{name}/{i}"] for i in range(sum(key.startswith(f"{name}/") for key in GOLDEN))]


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name, form):
    operation, *_ = PRIMITIVES[name]
    assert_close([operation(*primitive_inputs(name))], golden(f"primitive/{name}"))


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, form):
    y = run(name, layer_inputs(name), layer_weights(SHAPES[name]))
    assert_close(leaves(y), golden(f"layer/{name}"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(name, form):
    """Each x_t on the way, with the noise of a seed."""
    scheduler = sd.read_config("scheduler", SCHEDULER)
    steps = like_diffusers.sampling_steps(name, 5, scheduler, sd.scaled_linear_schedule())
    stream = like_diffusers.Noise(7)

    def denoise(x, t, alpha_bar):
        return sd.split_prediction("epsilon", network(x, t), x, alpha_bar)
    path = sd.SAMPLERS[name](denoise, noisy_picture(), steps, lambda: stream(6, 5, 4)[None])
    for ours, theirs in zip(path, golden(f"sampler/{name}"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * abs(theirs).max())


@pytest.mark.slow
def test_the_file_is_what_the_references_compute():
    """With the libraries at hand; else "python tests/make_golden.py" is due."""
    import make_golden
    arrays = make_golden.golden_arrays()
    assert arrays.keys() == {*GOLDEN} and json.loads(str(arrays.pop("shapes"))) == {
        name: {key: [*shape] for key, shape in shapes.items()} for name, shapes in SHAPES.items()}
    for name, array in arrays.items():
        np.testing.assert_allclose(GOLDEN[name], array, rtol=0, atol=1e-6 * abs(array).max())


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--collect-only"], ["tests/test_golden.py", "-k", "test_layer"]])
def test_nothing_but_numpy_is_needed_to_collect_the_tests_and_to_run_these(argv):
    """A test that asks for a missing library is skipped, so all of these must have passed."""
    script = f"""
import sys
missing = {sorted(REFERENCES)}
sys.modules.update(dict.fromkeys(missing))      # an import of them raises ModuleNotFoundError
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{argv}]))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    last = done.stdout.splitlines()[-1]
    if "--collect-only" in argv:
        assert "error" not in last
        assert "test_cli.py::" in done.stdout and "test_parity.py::" not in done.stdout
    else:
        assert re.match(f"{2 * len(LAYERS)} passed", last) and "skipped" not in last, last
