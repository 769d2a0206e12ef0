"""fast.py: each form against the formula that it replaces, on awkward sizes, values and types; and the program without it."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fast
import tiny_sd
from tiny_sd import conv2d, dot_product_attention, gelu, group_norm, layer_norm, linear, sigmoid, silu


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_same(operation, *args, tolerance=2e-5, **kwargs):
    """The two forms differ by at most `tolerance` of the result's own size."""
    ours, formula = operation(*args, **kwargs), operation.formula(*args, **kwargs)
    assert operation.on_numpy is not operation.formula and ours.dtype == formula.dtype and ours.shape == formula.shape
    assert np.abs(ours - formula).max() <= tolerance * np.abs(formula).max()


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (7, 2), (13, 11), (32, 32), (33, 35), (64, 70), (1, 1100)])
@pytest.mark.parametrize("i, o", [(32, 48), (4, 40), (40, 3), (3, 3)])
def test_conv2d(height, width, i, o):
    x, weight = normal(2, height, width, i), normal(o, 3, 3, i, seed=1)
    assert_same(conv2d, x, weight, normal(o, seed=2))
    assert_same(conv2d, x, weight)
    assert_same(conv2d, x, weight.astype(np.float16), normal(o, seed=2), tolerance=1e-4)


@pytest.mark.parametrize("size, stride, padding", [(3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0)), (5, 1, (2, 2)), (3, 1, (0, 2))])
def test_other_convolutions(size, stride, padding):
    assert_same(conv2d, normal(3, 19, 10, 36), normal(50, size, size, 36, seed=1), normal(50), stride, padding)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (7, 2), (13, 11), (33, 35)])
def test_winograd_cuts_any_size_into_tiles(height, width, m):
    x, weight, bias = normal(3, height, width, 5), normal(7, 3, 3, 5, seed=1), normal(7, seed=2)
    for b in (bias, None):
        exact = conv2d.formula(x, weight, b)
        assert np.abs(fast.winograd(x, weight, b, m) - exact).max() <= 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("m", [2, 4])
def test_winograd_loses_little(m):
    """Both tile sizes against float64, relative to the result's deviation."""
    x, weight = normal(1, 40, 40, 64), normal(64, 3, 3, 64, seed=1)
    exact = conv2d.formula(x.astype(np.float64), weight.astype(np.float64))
    error = np.abs(fast.winograd(x, weight, None, m) - exact).max() / exact.std()
    assert error < {2: 1e-5, 4: 5e-5}[m]


@pytest.mark.parametrize("m", [2, 4])
def test_toom_cook_is_exact(m):
    A, G, B = fast.toom_cook(m)
    d, g = np.arange(m + 2.0) ** 2, np.array([3.0, -1.0, 2.0])
    assert np.allclose(A.T @ ((G @ g) * (B.T @ d)), np.correlate(d, g), atol=1e-12)


@pytest.mark.parametrize("scale", [0, 0.1, 1, 8, 60])
@pytest.mark.parametrize("queries, keys, d", [(5, 7, 8), (1, 22000, 8), (77, 400, 40), (1025, 257, 40), (300, 513, 161), (40, 1100, 64)])
def test_attention(scale, queries, keys, d):
    """Large scores take the guarded branch, where rows are nearly one-hot."""
    q, k, v = scale * normal(2, 3, queries, d), scale * normal(2, 3, keys, d, seed=1), normal(2, 3, keys, d, seed=2)
    assert_same(dot_product_attention, q, k, v, tolerance=5e-5 * max(1, scale ** 2 / 20))


def test_attention_takes_both_branches(monkeypatch):
    """And shifts of all keys, which softmax cannot see, do not matter to the bound."""
    taken = []
    for name in ("plain_powers", "guarded_powers"):
        form = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *a, form=form, name=name: taken.append(name) or form(*a))
    q, k, v = normal(1, 1, 400, 8), normal(1, 1, 500, 8, seed=1), normal(1, 1, 500, 8, seed=2)
    calm, shifted = dot_product_attention(q, k, v), dot_product_attention(q, k + 1000, v)
    assert set(taken) == {"plain_powers"} and np.abs(calm - shifted).max() < 1e-3
    dot_product_attention(30 * q, 30 * k, v)
    assert set(taken) == {"plain_powers", "guarded_powers"}


def test_causal_attention_of_a_text():
    assert_same(dot_product_attention, normal(2, 3, 77, 8), normal(2, 3, 77, 8, seed=1), normal(2, 3, 77, 8), causal=True)


@pytest.mark.parametrize("shape, groups", [((1, 1, 1, 32), 32), ((3, 7, 5, 96), 32), ((2, 300, 11, 64), 8)])
def test_group_norm(shape, groups):
    x = 3 * normal(*shape) + 5
    assert_same(group_norm, x, groups, 1e-5, normal(shape[-1], seed=1), normal(shape[-1], seed=2), tolerance=5e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 700), (2, 400, 9, 33), (1, 70001), (70001, 1)])
def test_row_by_row(shape):
    x = 4 * normal(*shape)
    assert_same(sigmoid, x)
    assert_same(silu, x)
    assert_same(gelu, x)
    assert_same(layer_norm, x, normal(shape[-1], seed=1), normal(shape[-1], seed=2))


def test_gelu_is_exact():
    """Both forms against the error function itself; and far out, where a power of x would overflow."""
    x = np.linspace(-15, 15, 100001, dtype=np.float32)[:, None]
    exact = [[v * (1 + math.erf(v / math.sqrt(2))) / 2] for v in x[:, 0].tolist()]
    for form in (gelu.formula, gelu.on_numpy):
        assert np.abs(form(x) - exact).max() < 1e-6
        assert np.array_equal(form(np.float32([[1e9, -1e9, 0]])), np.float32([[1e9, 0, 0]]))


@pytest.mark.parametrize("rows, i, o", [((1,), 5, 7), ((2, 700), 33, 1300), ((3, 4, 5), 8, 1), ((3,), 800, 5001)])
def test_linear(rows, i, o):
    assert_same(linear, normal(*rows, i), normal(o, i, seed=1), normal(o, seed=2))
    assert_same(linear, normal(*rows, i), normal(o, 1, 1, i, seed=1))
    assert_same(linear, normal(*rows, i), np.asfortranarray(normal(o, i, seed=1)), normal(o, seed=2))      # as load lays it


def test_a_prepared_weight_dies_with_its_weight():
    kept = {"count": 0}

    @fast.once
    def prepare(weight):
        kept["count"] += 1
        return weight * 2
    weight = np.ones(3)
    assert prepare(weight) is prepare(weight) and kept["count"] == 1
    known = prepare.__closure__[[cell for cell in prepare.__code__.co_freevars].index("known")].cell_contents
    del weight
    assert not known


def test_a_weight_in_a_file_is_read_again_after_its_pages_went(tmp_path):
    exact = normal(2, 40, 3, 3, 32)
    exact.tofile(tmp_path / "weight")
    x, weights = normal(1, 17, 16, 32, seed=1), np.memmap(tmp_path / "weight", np.float32, "r", shape=exact.shape)
    for weight, values in zip(weights, exact):
        assert np.array_equal(conv2d(x, weight), conv2d(x, values)) and np.array_equal(weight, values)


@pytest.mark.parametrize("first, second", [("numpy", "tiny_sd"), ("tiny_sd", "numpy")])
def test_blas_keeps_to_one_thread(first, second):
    """Whichever is imported first: its threads would fight with ours."""
    code = f"""if True:
        import {first}, {second}, ctypes, pathlib
        for library in pathlib.Path(numpy.__file__).parents[1].glob("numpy.libs/*openblas*"):
            print(ctypes.CDLL(str(library)).scipy_openblas_get_num_threads64_())"""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tiny_sd.HERE, env=environment, capture_output=True, text=True)
    if not run.stdout and not run.returncode:
        pytest.skip("this NumPy brings no OpenBLAS of its own")
    assert run.stdout == "1\n", run.stderr


def test_kernels_of_blas():
    """AMD's family 25 gets those without AVX-512, any other processor what OpenBLAS chooses, and all what the user chose."""
    def kernels(imports, **chosen):
        code = f"""if True:
            import {imports}, numpy, ctypes, pathlib
            for library in pathlib.Path(numpy.__file__).parents[1].glob("numpy.libs/*openblas*"):
                name = ctypes.CDLL(str(library)).scipy_openblas_get_corename64_
                name.restype = ctypes.c_char_p
                print(name().decode())"""
        environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"} | chosen
        run = subprocess.run([sys.executable, "-c", code], cwd=tiny_sd.HERE, env=environment, capture_output=True, text=True)
        assert not run.returncode, run.stderr
        return run.stdout

    if not kernels("numpy"):
        pytest.skip("this NumPy brings no OpenBLAS of its own")
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    amd = re.search("vendor_id.*AuthenticAMD", cpu) and re.search(r"cpu family.*\b25$", cpu, re.M)
    assert kernels("tiny_sd") == ("Haswell\n" if amd else kernels("numpy"))
    assert kernels("tiny_sd", OPENBLAS_CORETYPE="Nehalem") == kernels("numpy", OPENBLAS_CORETYPE="Nehalem")


def test_parallel_keeps_order_nests_and_raises():
    assert fast.parallel(lambda i: sum(fast.parallel(lambda j: i * j, range(5))), range(20)) == [10 * i for i in range(20)]
    assert fast.parallel(abs, []) == []
    with pytest.raises(ZeroDivisionError):
        fast.parallel(lambda i: 1 / (i - 3), range(8))
    assert fast.parallel(abs, [-1]) == [1]


def test_the_program_runs_by_the_formulas_alone(tmp_path):
    """tiny_sd.py without fast.py beside it, on the bundled model: no fast form, and the same latents up to rounding."""
    code = f"""if True:
        import sys, numpy, tiny_sd
        model = tiny_sd.load({str(tiny_sd.HERE / "weights/emoji")!r})
        *_, x = tiny_sd.generate(model, "red apple", steps=2)
        numpy.save("x.npy", x)
        print(tiny_sd.HERE, "fast" in sys.modules, tiny_sd.conv2d.on_numpy is tiny_sd.conv2d.formula)"""
    shutil.copy(tiny_sd.HERE / "tiny_sd.py", tmp_path)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == f"{tmp_path} False True\n", run.stderr
    *_, x = tiny_sd.generate(tiny_sd.load(tiny_sd.HERE / "weights/emoji"), "red apple", steps=2)
    assert np.abs(np.load(tmp_path / "x.npy") - x).max() < 1e-4


def test_pictures_in_several_threads_do_not_wait_for_each_other_for_ever():
    """Each with both halves of guidance, all meeting weights that are not yet prepared."""
    code = """if True:
        import threading, numpy, tiny_sd
        x = numpy.ones((2, 16, 16, 64), numpy.float32)
        for _ in range(60):
            weight = numpy.ones((64, 3, 3, 64), numpy.float32)
            draw = lambda: tiny_sd.by_row(x, lambda row: tiny_sd.conv2d(row, weight))
            threads = [threading.Thread(target=draw) for _ in range(6)]
            for step in ("start", "join"):
                for thread in threads:
                    getattr(thread, step)()
        print("done")"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tiny_sd.HERE, capture_output=True, text=True, timeout=100)
    assert run.stdout == "done\n", run.stderr


@pytest.mark.parametrize("first", ["fast", "tiny_sd"])
def test_either_file_may_be_imported_first(first):
    code = f"import {first}, tiny_sd, fast; print(tiny_sd.conv2d.on_numpy is fast.fast_conv2d)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tiny_sd.HERE, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
