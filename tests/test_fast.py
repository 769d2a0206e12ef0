"""extras/fast.py: each form against the formula that it replaces, and what an import changes.

On awkward sizes, values and types. And the program without it, and with an edited formula.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tiny_sd
from extras import fast
from tiny_sd import (
    conv2d,
    dot_product_attention,
    gelu,
    group_norm,
    layer_norm,
    linear,
    sigmoid,
    silu,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def python(code, folder=tiny_sd.HERE, timeout=100, **variables):
    """Run a program in a fresh process, in which no variable says how many threads to take."""
    chosen = ("_NUM_THREADS", "_MAXIMUM_THREADS", "_CORETYPE")
    environment = {key: value for key, value in os.environ.items() if not key.endswith(chosen)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment | variables,
                          capture_output=True, text=True, timeout=timeout)


def assert_same(operation, *args, tolerance=2e-5, **kwargs):
    """The two forms differ by at most `tolerance` of the result's own size."""
    assert operation.__name__ in tiny_sd.FAST
    ours, formula = operation(*args, **kwargs), operation.formula(*args, **kwargs)
    assert ours.dtype == formula.dtype and ours.shape == formula.shape
    assert np.abs(ours - formula).max() <= tolerance * np.abs(formula).max()


# ── Convolutions ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (7, 2), (13, 11), (32, 32), (33, 35),
                                           (64, 70), (1, 1100)])
@pytest.mark.parametrize("i, o", [(32, 48), (4, 40), (40, 3), (3, 3)])
def test_conv2d(height, width, i, o):
    x, weight = normal(2, height, width, i), normal(o, 3, 3, i, seed=1)
    assert_same(conv2d, x, weight, normal(o, seed=2))
    assert_same(conv2d, x, weight)
    assert_same(conv2d, x, weight.astype(np.float16), normal(o, seed=2), tolerance=1e-4)


@pytest.mark.parametrize("size, stride, padding", [
    (3, 2, (1, 1)), (3, 2, (0, 1)), (1, 1, (0, 0)), (5, 1, (2, 2)), (3, 1, (0, 2))])
def test_other_convolutions(size, stride, padding):
    x, weight = normal(3, 19, 10, 36), normal(50, size, size, 36, seed=1)
    assert_same(conv2d, x, weight, normal(50), stride, padding)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (7, 2), (13, 11), (33, 35)])
def test_winograd_cuts_any_size_into_tiles(height, width, m):
    x = normal(3, height, width, 5)
    weight, bias = normal(7, 3, 3, 5, seed=1), normal(7, seed=2)
    for b in (bias, None):
        exact = conv2d.formula(x, weight, b)
        error = np.abs(fast.winograd(x, weight, b, m) - exact).max()
        assert error <= 2e-5 * np.abs(exact).max()


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


# ── Attention ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scale", [0, 0.1, 1, 8, 60])
@pytest.mark.parametrize("queries, keys, d", [
    (5, 7, 8), (1, 22000, 8), (77, 400, 40), (1025, 257, 40), (300, 513, 161), (40, 1100, 64)])
def test_attention(scale, queries, keys, d):
    """Large scores take the guarded branch; rows are nearly one-hot then."""
    q, k = scale * normal(2, 3, queries, d), scale * normal(2, 3, keys, d, seed=1)
    v = normal(2, 3, keys, d, seed=2)
    assert_same(dot_product_attention, q, k, v, tolerance=5e-5 * max(1, scale ** 2 / 20))


def test_attention_takes_both_branches(monkeypatch):
    """And shifts of all keys, which softmax cannot see, do not matter to the bound."""
    taken = []

    def watch(name):
        form = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *args: taken.append(name) or form(*args))
    watch("plain_powers")
    watch("guarded_powers")
    q, k, v = normal(1, 1, 400, 8), normal(1, 1, 500, 8, seed=1), normal(1, 1, 500, 8, seed=2)
    calm, shifted = dot_product_attention(q, k, v), dot_product_attention(q, k + 1000, v)
    assert set(taken) == {"plain_powers"} and np.abs(calm - shifted).max() < 1e-3
    dot_product_attention(30 * q, 30 * k, v)
    assert set(taken) == {"plain_powers", "guarded_powers"}


def test_causal_attention_of_a_text():
    q, k, v = normal(2, 3, 77, 8), normal(2, 3, 77, 8, seed=1), normal(2, 3, 77, 8)
    assert_same(dot_product_attention, q, k, v, causal=True)


# ── Row by row ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape, groups",
                         [((1, 1, 1, 32), 32), ((3, 7, 5, 96), 32), ((2, 300, 11, 64), 8)])
def test_group_norm(shape, groups):
    x, weight, bias = 3 * normal(*shape) + 5, normal(shape[-1], seed=1), normal(shape[-1], seed=2)
    assert_same(group_norm, x, groups, 1e-5, weight, bias, tolerance=5e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 700), (2, 400, 9, 33), (1, 70001), (70001, 1)])
def test_row_by_row(shape):
    x = 4 * normal(*shape)
    assert_same(sigmoid, x)
    assert_same(silu, x)
    assert_same(gelu, x)
    assert_same(layer_norm, x, normal(shape[-1], seed=1), normal(shape[-1], seed=2))


def test_gelu_is_exact():
    """Both forms against the error function; also far out, where a power of x would overflow."""
    x = np.linspace(-15, 15, 100001, dtype=np.float32)[:, None]
    exact = [[v * (1 + math.erf(v / math.sqrt(2))) / 2] for v in x[:, 0].tolist()]
    for form in (gelu.formula, tiny_sd.FAST["gelu"]):
        assert np.abs(form(x) - exact).max() < 1e-6
        assert np.array_equal(form(np.float32([[1e9, -1e9, 0]])), np.float32([[1e9, 0, 0]]))


@pytest.mark.parametrize("rows, i, o", [((1,), 5, 7), ((2, 700), 33, 1300), ((3, 4, 5), 8, 1),
                                        ((3,), 800, 5001)])
def test_linear(rows, i, o):
    x, weight, bias = normal(*rows, i), normal(o, i, seed=1), normal(o, seed=2)
    assert_same(linear, x, weight, bias)
    assert_same(linear, x, weight.reshape(o, 1, 1, i))
    assert_same(linear, x, np.asfortranarray(weight), bias)         # as load lays it


# ── Prepared weights, and cores ─────────────────────────────────────────────────────────────────


def test_a_prepared_weight_dies_with_its_weight():
    filled = []

    @fast.remembered
    def prepare(weight):
        return weight * 2, filled.append, [0, 1]
    weight = np.ones(3)
    assert prepare(weight) is prepare(weight) and sorted(filled) == [0, 1]
    assert len(prepare.known) == 1
    del weight
    assert not prepare.known


def test_two_threads_prepare_a_weight_together():
    meet = threading.Barrier(2, timeout=20)     # broken unless both threads fill a block

    @fast.remembered
    def prepare(weight):
        return weight * 2, lambda block: meet.wait(), [0, 1]
    weight = np.ones(3)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(prepare, [weight, weight])
    assert one is other


def test_a_failed_preparation_fails_for_both_and_is_begun_anew():
    broken = [0]

    @fast.remembered
    def prepare(weight):
        return weight * 2, broken.index, [1, 0]         # no index has 1
    weight = np.ones(3)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(prepare, weight) for _ in range(2)]
        errors = {type(call.exception(timeout=20)) for call in calls}
    assert {ValueError} <= errors <= {ValueError, MemoryError}
    broken.append(1)
    assert prepare(weight).sum() == 6


def test_a_weight_in_a_file_is_read_again_after_its_pages_went(tmp_path):
    exact = normal(2, 40, 3, 3, 32)
    exact.tofile(tmp_path / "weight")
    x = normal(1, 17, 16, 32, seed=1)
    weights = np.memmap(tmp_path / "weight", np.float32, "r", shape=exact.shape)
    for weight, values in zip(weights, exact):
        assert np.array_equal(conv2d(x, weight), conv2d(x, values))
        assert np.array_equal(weight, values)


def test_parallel_keeps_order_nests_and_raises():
    nested = fast.parallel(lambda i: sum(fast.parallel(lambda j: i * j, range(5))), range(20))
    assert nested == [10 * i for i in range(20)]
    assert fast.parallel(abs, []) == []
    with pytest.raises(ZeroDivisionError):
        fast.parallel(lambda i: 1 / (i - 3), range(8))
    assert fast.parallel(abs, [-1]) == [1]


@pytest.mark.slow
def test_pictures_in_several_threads_do_not_wait_for_each_other_for_ever():
    """Each with both halves of guidance, all meeting weights that are not yet prepared."""
    run = python("""if True:
        import threading, extras.fast, numpy, tiny_sd
        x = numpy.ones((2, 16, 16, 64), numpy.float32)
        for _ in range(60):
            weight = numpy.ones((64, 3, 3, 64), numpy.float32)
            draw = lambda: extras.fast.parallel(lambda i: tiny_sd.conv2d(x[i], weight),
                                                [slice(0, 1), slice(1, 2)])
            threads = [threading.Thread(target=draw) for _ in range(6)]
            for step in ("start", "join"):
                for thread in threads:
                    getattr(thread, step)()
        print("done")""")
    assert run.stdout == "done\n", run.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_made_by_fork_has_threads_of_its_own():
    """Its parent's threads do not run in it, and it would wait for them forever."""
    run = python("""if True:
        import os, signal, extras.fast as fast
        fast.cores = 3
        fast.start_pool()
        print(fast.parallel(abs, range(99)) == list(range(99)))
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(fast.parallel(abs, range(99)) != list(range(99)))
        print(os.waitpid(child, 0)[1])""")
    assert run.stdout == "True\n0\n", (run.stdout, run.stderr)


# ── Formulas that win ───────────────────────────────────────────────────────────────────────────


def test_fingerprints():
    """Every form has the fingerprint of the current formula, and none is missing."""
    functions = {name: getattr(tiny_sd, name) for name in fast.FINGERPRINTS}
    found = {name: fast.fingerprint(getattr(function, "formula", function))
             for name, function in functions.items()}
    assert found == fast.FINGERPRINTS
    # attention has softmax in it; "each" is how the two halves of guidance are computed
    assert set(tiny_sd.FAST) == set(fast.FINGERPRINTS) - {"softmax"} | {"each"}


@pytest.fixture
def edited(tmp_path):
    """edited((old, new), ...): a copy of the program, in which texts of the lesson are replaced."""
    def edit(*changes):
        source = (tiny_sd.HERE / "tiny_sd.py").read_text(encoding="utf-8")
        for old, new in changes:
            assert source.count(old) == 1, f"{source.count(old)} times in tiny_sd.py: {old}"
            source = source.replace(old, new)
        (tmp_path / "tiny_sd.py").write_text(source, encoding="utf-8")
        shutil.copytree(tiny_sd.HERE / "extras", tmp_path / "extras",
                        ignore=shutil.ignore_patterns("__pycache__", "pictures", "t*ing", "tools"))
        return tmp_path
    return edit


EXAMPLES = """if True:
    import json, numpy as np, extras.fast, tiny_sd
    def normal(*shape, seed=0):
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    x, weight = normal(1, 40, 40, 32), normal(32, 3, 3, 32, seed=1)
    q, k, v = normal(1, 2, 700, 8), normal(1, 2, 700, 8, seed=1), normal(1, 2, 700, 8, seed=2)
    results = {"conv2d": tiny_sd.conv2d(x, weight), "linear": tiny_sd.linear(x, weight[0, 0]),
               "gelu": tiny_sd.gelu(x), "sigmoid": tiny_sd.sigmoid(x), "silu": tiny_sd.silu(x),
               "dot_product_attention": tiny_sd.dot_product_attention(q, k, v)}
    np.savez("results.npz", **results)
    print(json.dumps(sorted(tiny_sd.FAST)))"""
EDITS = {   # the formula: what to replace in it, and the factor by which its result then changes
    "conv2d": ("    y = np.tensordot(", "    y = 0.9 * np.tensordot(", 0.9),
    "linear": ("    y = x @ weight", "    y = 0.5 * x @ weight", 0.5),
    "gelu": ("    return x * (0.5 + 0.5 * np.copysign(",
             "    return 0.7 * x * (0.5 + 0.5 * np.copysign(", 0.7),
}


def results_of(folder):
    """Run EXAMPLES there: {name: array}, the names in FAST, and what stderr says."""
    run = python(EXAMPLES, folder)
    assert run.returncode == 0, run.stderr
    return dict(np.load(folder / "results.npz")), set(json.loads(run.stdout)), run.stderr


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unedited")
    shutil.copy(tiny_sd.HERE / "tiny_sd.py", folder)
    shutil.copytree(tiny_sd.HERE / "extras", folder / "extras",
                    ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    results, names, said = results_of(folder)
    assert names == set(tiny_sd.FAST) and not said
    return results


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_formula_wins(name, edited, unedited):
    """An edited formula is used; all others keep their forms; one line says so."""
    old, new, factor = EDITS[name]
    results, names, said = results_of(edited((old, new)))
    assert names == set(tiny_sd.FAST) - {name}
    assert said == (f"tiny_sd: {name} was edited: {name} is computed by its formula, "
                    "more slowly\n")
    for other, before in unedited.items():
        expected = factor * before if other == name else before
        error = np.abs(results[other] - expected).max()
        assert error <= 2e-5 * np.abs(before).max(), other


@pytest.mark.parametrize("inner, outer, change", [
    ("sigmoid", "silu", ("return 0.5 + 0.5 * np.tanh(0.5 * x)",
                         "return 0.5 + 0.4 * np.tanh(0.5 * x)")),
    ("softmax", "dot_product_attention", ("return e / e.sum(", "return 0.8 * e / e.sum("))])
def test_a_formula_wins_over_the_forms_that_contain_it(inner, outer, change, edited, unedited):
    results, names, said = results_of(edited(change))
    assert names == set(tiny_sd.FAST) - {inner, outer}
    assert f"tiny_sd: {inner} was edited: {outer} is computed by its formula" in said
    assert len(said.splitlines()) == 1 + (inner in tiny_sd.FAST)
    changed = {name for name in results
               if not np.allclose(results[name], unedited[name], rtol=0, atol=1e-4)}
    assert changed == {inner, outer} & results.keys()


def test_comments_docstrings_and_layout_may_change(edited, unedited):
    laid_out = "    # the heart of it\n\n    y = np.tensordot(  # all sums\n        patches"
    folder = edited(("    y = np.tensordot(patches", laid_out),
                    ('    """Return x σ(x) (1.7)."""', '    """Return x σ(x).\n\n    SiLU."""'),
                    ('    """Return x Wᵀ + b over the last axis (1.1).', '    """The same.'))
    results, names, said = results_of(folder)
    assert names == set(tiny_sd.FAST) and not said
    assert all(np.array_equal(results[name], unedited[name]) for name in unedited)


def test_clear_switches_every_form_off():
    """As the docstring says: from there on all is computed by the formulas."""
    run = python("""if True:
        import numpy as np, extras.fast, tiny_sd
        x, weight = np.random.default_rng(0).standard_normal((2, 32, 33, 64), np.float32), []
        weight = np.random.default_rng(1).standard_normal((64, 3, 3, 64), np.float32)
        formula = tiny_sd.conv2d.formula(x, weight)
        print(np.array_equal(tiny_sd.conv2d(x, weight), formula))
        tiny_sd.FAST.clear()
        def fail(*_): raise AssertionError
        extras.fast.parallel = extras.fast.winograd = extras.fast.im2col = fail
        print(np.array_equal(tiny_sd.conv2d(x, weight), formula))
        model = tiny_sd.load("emoji")
        steps = tiny_sd.evenly_spaced_steps(1, model.alpha_bars)
        *_, x = tiny_sd.generate(model, "red apple", steps=steps)
        print(x.shape)""")
    assert run.stdout == "False\nTrue\n(1, 16, 16, 4)\n", run.stderr


@pytest.mark.slow
def test_a_reload_needs_the_forms_to_be_reloaded_too():
    """As the docstring says."""
    run = python("""if True:
        import importlib, extras.fast, tiny_sd
        for module in tiny_sd, extras.fast:
            importlib.reload(module)
            print(len(tiny_sd.FAST))""")
    assert run.stdout == f"0\n{len(tiny_sd.FAST)}\n", run.stderr


@pytest.mark.slow
def test_the_program_runs_by_the_formulas_alone(tmp_path):
    """tiny_sd.py without extras/ draws the same latents up to rounding."""
    shutil.copy(tiny_sd.HERE / "tiny_sd.py", tmp_path)
    run = python(f"""if True:
        import sys, numpy, tiny_sd
        model = tiny_sd.load({str(tiny_sd.HERE / "weights/emoji")!r})
        steps = tiny_sd.evenly_spaced_steps(2, model.alpha_bars)
        *_, x = tiny_sd.generate(model, "red apple", steps=steps)
        numpy.save("x.npy", x)
        print(tiny_sd.HERE, "extras" in sys.modules, tiny_sd.FAST)""", tmp_path)
    assert run.stdout == f"{tmp_path} False {{}}\n", run.stderr
    model = tiny_sd.load(tiny_sd.HERE / "weights/emoji")
    steps = tiny_sd.evenly_spaced_steps(2, model.alpha_bars)
    *_, x = tiny_sd.generate(model, "red apple", steps=steps)
    assert np.abs(np.load(tmp_path / "x.npy") - x).max() < 1e-4


# ── What an import changes in its process ───────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("first", ["extras.fast", "tiny_sd"])
def test_either_file_may_be_imported_first(first):
    run = python(f"import {first}, tiny_sd, extras.fast; "
                 "print(tiny_sd.FAST['conv2d'] is extras.fast.fast_conv2d)")
    assert run.stdout == "True\n", run.stderr


HOST = """if True:
    import ctypes, gc, json, os, pathlib, signal, sys, threading, warnings

    def blas():     # (threads, kernels) of each OpenBLAS that NumPy brings
        import numpy
        found = []
        for library in pathlib.Path(numpy.__file__).parents[1].glob("numpy.libs/*openblas*"):
            library = ctypes.CDLL(str(library))
            name = library.scipy_openblas_get_corename64_
            name.restype = ctypes.c_char_p
            found.append((library.scipy_openblas_get_num_threads64_(), name().decode()))
        return found

    def keeps_freed_memory():       # 64 MB of it
        import numpy
        def held():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
        before = held()
        array = numpy.ones(2 ** 24, numpy.float32)
        del array
        gc.collect()
        return held() - before > 2 ** 25

    def host():     # all that an import could change without being asked
        return {"environ": dict(os.environ), "threads": sorted(map(str, threading.enumerate())),
                "blas": blas(), "warnings": list(map(str, warnings.filters)),
                "path": list(sys.path), "hook": str(sys.excepthook),
                "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]}
"""


def in_host(code, **variables):
    """Return what a program in a fresh process prints as JSON; HOST is at its head."""
    run = python(f"{HOST}\n{code}", **variables)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def needs_openblas():
    if not in_host("print(json.dumps(blas()))"):
        pytest.skip("this NumPy brings no OpenBLAS of its own")


@pytest.mark.slow
def test_importing_tiny_sd_changes_nothing():
    """If NumPy was imported before, as in a user's own program."""
    before, after, modules = in_host("""if True:
        import numpy
        numpy.ones((100, 100)) @ numpy.ones((100, 100))
        before = host()
        import tiny_sd
        modules = [name for name in ("extras", "torch", "PIL", "tqdm") if name in sys.modules]
        print(json.dumps([before, host(), modules]))""")
    assert before == after
    assert modules == []
    if before["blas"] and (os.cpu_count() or 1) > 1:        # else it would not show
        assert before["blas"][0][0] > 1


@pytest.mark.slow
def test_importing_tiny_sd_first_leaves_numpy_as_it_is():
    needs_openblas()
    assert in_host("import tiny_sd; print(json.dumps(blas()))") == in_host("""if True:
        import numpy; print(json.dumps(blas()))""")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["numpy, extras.fast", "extras.fast, numpy"])
def test_blas_keeps_to_one_thread(order):
    """Whichever is imported first: its threads would fight with ours."""
    needs_openblas()
    assert [threads for threads, _ in in_host(f"import {order}; print(json.dumps(blas()))")] == [1]


def amd():
    """Is this an AMD of family 25, Zen 3 or 4?"""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return re.search("vendor_id.*AuthenticAMD", cpu) and re.search(r"cpu family.*\b25$", cpu, re.M)


@pytest.mark.slow
def test_kernels_of_blas():
    """AMD's family 25 gets kernels without AVX-512, all others what OpenBLAS chooses.

    The user's choice wins; and if NumPy was imported before, nothing changes.
    """
    needs_openblas()

    def kernels(imports, **chosen):
        found = in_host(f"import {imports}; print(json.dumps(blas()))", **chosen)
        return [name for _, name in found]

    assert kernels("extras.fast, numpy") == (["Haswell"] if amd() else kernels("numpy"))
    assert kernels("numpy, extras.fast") == kernels("numpy")
    nehalem = {"OPENBLAS_CORETYPE": "Nehalem"}
    assert kernels("extras.fast, numpy", **nehalem) == kernels("numpy", **nehalem)


def test_importing_fast_changes_what_its_docstring_says_and_no_more():
    before, after = in_host("""if True:
        import numpy
        before = host()
        import extras.fast
        print(json.dumps([before, host()]))""")
    new = {"OPENBLAS_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1"}
    if amd():
        new["OPENBLAS_CORETYPE"] = "Haswell"
    assert after.pop("environ") == before.pop("environ") | new
    assert [kernels for _, kernels in after.pop("blas")] == [k for _, k in before.pop("blas")]
    assert before == after


def test_fast_leaves_what_the_user_chose():
    environ = in_host("import extras.fast; print(json.dumps(dict(os.environ)))",
                      OPENBLAS_NUM_THREADS="3", OPENBLAS_CORETYPE="Nehalem")
    assert (environ["OPENBLAS_NUM_THREADS"], environ["OPENBLAS_CORETYPE"]) == ("3", "Nehalem")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's way to keep memory")
def test_freed_memory_is_kept_from_the_first_large_array_on():
    """Not by the import of either file, and never by the formulas."""
    found = in_host("""if True:
        import numpy, tiny_sd
        x, weight = numpy.ones((1, 64, 64, 64), "f4"), numpy.ones((64, 3, 3, 64), "f4")
        tiny_sd.conv2d(x, weight)
        found = [keeps_freed_memory()]
        import extras.fast
        found.append(keeps_freed_memory())
        tiny_sd.conv2d(x, weight)
        found.append(keeps_freed_memory())
        print(json.dumps(found))""")
    assert found == [False, False, True]


@pytest.mark.slow
def test_no_line_of_the_library_changes_how_the_caller_is_warned():
    """After reading a picture and drawing one, the warning filters are unchanged."""
    before, after = in_host("""if True:
        import numpy, tiny_sd, extras.fast
        from extras import files, like_diffusers
        before = list(map(str, warnings.filters))
        path = tiny_sd.HERE / "weights/emoji.png"
        files.read_picture(path, 64, 64)
        *_, x = like_diffusers.generate(tiny_sd.load("emoji"), "red apple", steps=1)
        tiny_sd.decode(tiny_sd.load("emoji"), x)
        print(json.dumps([before, list(map(str, warnings.filters))]))""")
    assert before == after


def test_a_line_moved_into_a_block_is_an_edit(edited):
    """The words are the same then, and the meaning is not."""
    _, names, said = results_of(edited(("    erf = 1 -", "        erf = 1 -")))
    assert names == set(tiny_sd.FAST) - {"gelu"} and "gelu was edited" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_weight_whose_preparation_failed_is_prepared_anew(error, monkeypatch):
    x, weight = np.ones((1, 8, 8, 32), np.float32), np.ones((16, 3, 3, 32), np.float32)
    expected = fast.fast_conv2d(x, weight.copy(), stride=2)

    def broken(array):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fast, "wide", broken)
        with pytest.raises(error):
            fast.fast_conv2d(x, weight, stride=2)
    np.testing.assert_array_equal(fast.fast_conv2d(x, weight, stride=2), expected)


def test_an_edit_of_the_denoiser_is_what_draws(edited):
    """The form that asks with both contexts at once steps aside."""
    script = """
import numpy as np
import tiny_sd
from extras import fast, like_diffusers
tiny_sd.predict = lambda model, x, t, context, *_: x * context.mean()
config = tiny_sd.SimpleNamespace(scheduler=tiny_sd.SimpleNamespace(prediction_type="sample"))
unet = {"conv_in": {"weight": None}}
denoise = like_diffusers.denoiser(tiny_sd.SimpleNamespace(config=config, unet=unet),
                                  np.array([[[2.0]], [[3.0]]]), 7.0)
print(denoise(np.ones((1, 1, 1, 1)), 0, 0.5)[0].item())"""
    change = "            output = guide(uncond, output, guidance)", "            output = uncond"
    for folder, drawn in (tiny_sd.HERE, "9.0"), (edited(change), "2.0"):
        run = python(script, folder)
        assert run.stdout == f"{drawn}\n", run.stderr
        assert ("denoiser was edited" in run.stderr) == (folder != tiny_sd.HERE)
