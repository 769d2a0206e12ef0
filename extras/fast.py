"""Faster forms of tiny_sd.py's primitives, with the same results.

    import extras.fast                  tiny_sd now computes with these forms
    tiny_sd.FAST.clear()                tiny_sd uses its own formulas again
    importlib.reload(tiny_sd)           the same, until this file is reloaded, too

Importing this file changes the process:

- OpenBLAS and Accelerate use one thread, since their threads would compete with those here;
- on AMD's Zen 3 and 4 OpenBLAS uses its AVX2 kernels: Zen 4 computes AVX-512 in two halves, and is
  slower with it;
- from the first operation on, glibc keeps freed memory for the next one.

The first two are environment variables, which child processes inherit. If possible, import this
file before NumPy: only then can it choose the kernels.

Each form replaces one exact formula. If you edit the formula in tiny_sd.py, its form is switched
off, with a line on stderr, so your code is what runs. tests/test_fast.py compares each form with
its formula.
"""

import contextlib
import ctypes
import functools
import hashlib
import inspect
import io
import math
import mmap
import os
import re
import threading
import tokenize
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

for variable in ("OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(variable, "1")
PROCESSOR = ""      # Linux' description of it
with contextlib.suppress(OSError):
    PROCESSOR = Path("/proc/cpuinfo").read_text()
if re.search(r"AuthenticAMD\ncpu family\s*: 25\n", PROCESSOR):
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import numpy as np  # noqa: E402

import tiny_sd  # noqa: E402
from extras import like_diffusers  # noqa: E402
from extras.narrow import Narrow, wide  # noqa: E402
from tiny_sd import FAST, dot_product_attention, tell  # noqa: E402

for library in Path(np.__file__).parents[1].glob("numpy.libs/*openblas*"):
    with contextlib.suppress(OSError, AttributeError):      # if NumPy was imported before
        ctypes.CDLL(str(library)).scipy_openblas_set_num_threads64_(1)


# ── Registering forms ───────────────────────────────────────────────────────────────────────────

FINGERPRINTS = {   # of the formulas in tiny_sd.py
    "conv2d": "ca01228e", "denoiser": "2b0b501e", "dot_product_attention": "c2bc283e",
    "gelu": "ab9e3eba", "group_norm": "0e5965a7", "layer_norm": "4222ca75", "linear": "d6a3e2f9",
    "sigmoid": "20c46529", "silu": "8ff020f8", "softmax": "d8d83192"}


def fingerprint(formula):
    """Return a short hash of a function's code, without its comments, docstring and spacing."""
    marks = {tokenize.NEWLINE: "NEWLINE", tokenize.INDENT: "INDENT", tokenize.DEDENT: "DEDENT"}
    source = inspect.getsource(formula)
    words = [marks.get(token.type, token.string)
             for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in (tokenize.COMMENT, tokenize.NL)
             and not token.string.startswith('"""')]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]


def faster(*names):
    """Register a form for the first of these formulas, unless one of them was edited."""
    def register(form):
        for name in names:
            try:
                function = getattr(tiny_sd, name)
                formula = getattr(function, "formula", function)
                known = fingerprint(formula) == FINGERPRINTS.get(name)
            except OSError:     # there is no source
                known = False
            if not known:
                tell(f"{name} was edited: {names[0]} is computed by its formula, more slowly")
                return form
        FAST[names[0]] = form
        return form
    return register


# ── Cores ──────────────────────────────────────────────────────────────────── REFERENCE §12 ──
#
# The speed comes from three ideas. Fewer multiplications: Winograd's convolution needs a quarter.
# Small blocks: intermediate results stay in the cache. All cores: NumPy releases Python's lock
# inside each operation, so plain threads can compute in parallel.

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_pool():
    """Make a pool of threads; a forked child needs its own, since it inherits no threads."""
    global pool, idle
    pool, idle = ThreadPoolExecutor(cores), threading.Semaphore(cores - 1)


start_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_pool)


def parallel(work, items):
    """Return [work(item), ...], computed by this thread and one more for each idle core.

    Calls can be nested: the two halves of guidance use a core each, and the blocks inside them use
    further cores if there are any.
    """
    keep_freed_memory()
    items, helpers = list(items), []
    if len(items) == 1:
        return [work(items[0])]
    results = [None] * len(items)
    queue = iter(range(len(items)))     # shared: taking the next number is atomic

    def drain():
        for i in queue:
            results[i] = work(items[i])

    def help_out():
        try:
            drain()
        finally:
            idle.release()

    while len(helpers) < len(items) - 1 and idle.acquire(blocking=False):
        try:
            helpers.append(pool.submit(help_out))
        except RuntimeError:            # the system allows no more threads: continue without
            idle.release()
            break
    drain()
    for helper in helpers:
        helper.result()
    return results


@functools.cache
def keep_freed_memory():
    """Make glibc keep freed memory for the next array: the system zeroes each page it gives out."""
    one_arena, never_map, never_trim = (-8, 1), (-4, 0), (-1, 2 ** 31 - 1)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option, value in one_arena, never_map, never_trim:
            ctypes.CDLL(None).mallopt(option, value)


def blocks(length, size):
    """Return the slices 0:size, size:2 size, ... that cover length."""
    size = max(1, size)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def shares(length, multiplications):
    """Split length into a slice for each core, or one if waking other cores would take longer."""
    return blocks(length, -(-length // (cores if multiplications > 2 ** 22 else 1)))


class Preparation:
    """An array filled block by block, by every thread that needs it."""

    def __init__(self, array, fill, items):
        self.array, self.fill, self.left = array, fill, len(items)
        self.queue, self.lock, self.done = iter(items), threading.Lock(), threading.Event()

    def drain(self, _):
        """Fill blocks that no other thread has started."""
        try:
            for item in self.queue:
                self.fill(item)
                with self.lock:
                    self.left -= 1
        except BaseException:
            self.done.set()     # so that no other thread waits forever
            raise
        if not self.left:
            self.done.set()

    def result(self):
        """Help to fill the array; return it when it is complete."""
        if not self.done.is_set():
            parallel(self.drain, range(cores))
            self.done.wait()
        if self.left:
            raise MemoryError("a weight could not be prepared")
        return self.array


def remembered(prepare):
    """Prepare each weight once for as long as it lives, or each time if it is fleeting.

    prepare(weight, ...) returns what a Preparation takes. The two halves of guidance come to a
    weight at the same time: instead of waiting for the first, the second helps it. Changing a
    weight in place has no effect on what was prepared from it: replace it instead.
    """
    known, lock = {}, threading.Lock()

    @functools.wraps(prepare)
    def prepared(weight, *args):
        if getattr(weight, "fleeting", False):
            return Preparation(*prepare(weight, *args)).result()
        key = id(weight), *args
        with lock:
            new = key not in known
            if new:
                known[key] = Preparation(*prepare(weight, *args))
                weakref.finalize(weight, known.pop, key, None)
            preparation = known[key]
        try:
            array = preparation.result()
        except BaseException:       # Ctrl-C, or no memory: the next call starts over
            with lock:
                if known.get(key) is preparation:
                    del known[key]
            raise
        if new:
            preparation.fill = None         # release the weight
            forget_pages(weight)
        return array
    prepared.known = known
    return prepared


def forget_pages(array):
    """Tell the system that the pages of a mapped file, once read, need not stay in memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    if hasattr(array, "madvise"):
        array.madvise(mmap.MADV_DONTNEED)


# ── Row by row ──────────────────────────────────────────────────────────────────────────────────


def rowwise(formula):
    """Apply a formula that treats rows separately, in blocks of rows that fit in the cache."""
    @functools.wraps(formula)
    def blockwise(x, *args, **kwargs):
        if x.size <= 2 ** 18:
            return formula(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        out = np.empty_like(rows)

        def block(s):
            out[s] = formula(rows[s], *args, **kwargs)
        parallel(block, blocks(len(rows), 2 ** 16 // rows.shape[1]))
        return out.reshape(x.shape)
    return blockwise


faster("sigmoid")(rowwise(tiny_sd.sigmoid.formula))
faster("silu", "sigmoid")(rowwise(tiny_sd.silu.formula))
faster("layer_norm")(rowwise(tiny_sd.layer_norm.formula))


@faster("gelu")
@rowwise
def gelu_by_tanh(x):
    """Return x (1 + tanh(x P(x²))) / 2, half the work of an exponential and a quotient (12.1).

    The usual P of two terms is off by 5e-4; these seven are fitted to erf and off by 2e-7.
    """
    square = np.minimum(x * x, 100)
    y = 1.81395855e-09 * square
    for a in (-1.33784595e-07, 3.97409336e-06, -5.52735518e-05, -3.30261532e-05, 3.63341484e-02):
        y += a
        y *= square
    y += 7.97884269e-01
    y *= x
    return x * (0.5 + 0.5 * np.tanh(y, out=y))


FAST["each"] = parallel
faster("denoiser")(like_diffusers.denoiser)     # it runs each half of guidance on its own cores


def columns(weight):
    """Return a linear layer's weight as (in, out), the fastest layout for products."""
    return transposed(weight) if isinstance(weight, Narrow) else weight.reshape(len(weight), -1).T


@remembered
def transposed(weight):
    """Prepare a linear layer's weight as (in, out), in float32."""
    rows = weight.reshape(len(weight), -1)
    w = np.empty(rows.shape[::-1], np.float32)

    def fill(s):
        w[:, s] = wide(rows[s]).T
    return w, fill, blocks(len(rows), 64)


@faster("linear")
def blocked_linear(x, weight, bias=None):
    """Give each core a part of the rows, or of the columns if there are more of them."""
    w, rows = columns(weight), x.reshape(-1, x.shape[-1])
    out = np.empty((len(rows), len(weight)), x.dtype)

    def block(s):
        if len(rows) > len(weight):
            np.matmul(rows[s], w, out=out[s])
        else:
            np.matmul(rows, w[:, s], out=out[:, s])
    parallel(block, shares(max(out.shape), rows.size * len(weight)))
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], -1)


@faster("group_norm")
def blocked_group_norm(x, groups, delta, weight, bias):
    """Apply one scale and one shift per channel.

    Sums are in float32 within a block of pixels, in float64 over the blocks.
    """
    B, H, W, C = x.shape
    rows, out = x.reshape(B, H * W, C), np.empty((B, H * W, C), x.dtype)
    parts = [(i, s) for i in range(B) for s in blocks(H * W, 2 ** 17 // C)]

    def average(sums):      # over the pixels and channels of a group, for each channel: (B, C)
        sums = np.array(parallel(sums, parts), np.float64).reshape(B, -1, groups, C // groups)
        mean = sums.sum((1, 3)) / (H * W * C // groups)
        return np.repeat(mean, C // groups, axis=1).astype(x.dtype)

    mean = average(lambda at: rows[at].sum(0))
    variance = average(lambda at: np.square(rows[at] - mean[at[0]]).sum(0))
    scale = weight / np.sqrt(variance + np.float32(delta))
    shift = bias - mean * scale

    def block(at):
        np.multiply(rows[at], scale[at[0]], out=out[at])
        out[at] += shift[at[0]]
    parallel(block, parts)
    return out.reshape(x.shape)


# ── Convolutions ────────────────────────────────────────────────────────────────────────────────


@faster("conv2d")
def fast_conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
    """Use Winograd's method for 3x3 filters with many channels, else one product of all windows."""
    out, kh, kw, c = weight.shape
    pixels = x.shape[1] * x.shape[2]    # if few, reading the larger filters would dominate
    plain = (kh, kw, stride, padding) == (3, 3, 1, (1, 1))
    if plain and min(c, out) >= 32 and pixels >= 256:
        return winograd(x, weight, bias, 4 if pixels >= 1024 else 2)
    return im2col(x, weight, bias, stride, padding)


def windows(x, size, stride, padding):
    """Return all windows of x as a view (batch, rows, columns, height, width, channels).

    size: (height, width) of a window. Adds the zeros that np.pad would add, but faster.
    """
    (top, bottom), (left, right) = padding
    B, H, W, C = x.shape
    padded = np.zeros((B, top + H + bottom, left + W + right, C), x.dtype)
    padded[:, top:top + H, left:left + W] = x
    b, i, j, c = padded.strides
    h, w = ((n - k) // stride + 1 for n, k in zip(padded.shape[1:3], size))
    return np.lib.stride_tricks.as_strided(
        padded, (B, h, w, *size, C), (b, stride * i, stride * j, i, j, c))


@remembered
def filters(weight, m=None):
    """Prepare a convolution's filters g as (kh kw, in, out), or as G g Gᵀ: ((m + 2)², in, out)."""
    out, kh, kw, c = weight.shape
    G = both_ways(m)[1] if m else np.eye(kh * kw, dtype=np.float32)
    U = np.empty((len(G), c * out), np.float32)

    def fill(s):
        g = wide(weight[..., s].transpose(3, 0, 1, 2).copy()).reshape(-1, kh * kw)
        np.matmul(G, g.T.astype(np.float32, copy=False), out=U[:, s.start * out:s.stop * out])
    return U.reshape(len(G), c, out), fill, blocks(c, 2 ** 14 // out)


def im2col(x, weight, bias, stride, padding):
    """Make each window a row of one matrix product, a few rows of the image at a time."""
    out, kh, kw, c = weight.shape
    view = windows(x, (kh, kw), stride, (padding, padding))
    w = filters(weight).reshape(-1, out)                        # (kh kw in, out)
    B, H, W = view.shape[:3]
    y = np.empty((B, H, W, out), x.dtype)

    def block(at):
        rows, sums = view[at].reshape(-1, len(w)), y[at].reshape(-1, out)

        def product(s):     # shared among cores, for small images of a single block
            np.matmul(rows, w[:, s], out=sums[:, s])
        parallel(product, shares(out, rows.size * out))
        if bias is not None:
            y[at] += bias
    parallel(block, [(i, s) for i in range(B) for s in blocks(H, 2 ** 20 // (W * kh * kw * c))])
    return y


def toom_cook(m):
    """Return A, G, B with which y = Aᵀ (G g * Bᵀ d) correlates m + 2 numbers d with the 3 of g.

    To multiply two polynomials, evaluate both at m + 2 points, multiply, interpolate; correlation
    is the transpose of that (Winograd, 1980). The last point is infinity, which gives the leading
    coefficient; points near 1 round best (12.2).
    """
    points = {2: [0, 1, -1], 4: [0, 3 / 4, -3 / 4, 3 / 2, -3 / 2]}[m]
    A, G, V = (np.vstack([np.vander(points, k, increasing=True), np.eye(k)[-1]])
               for k in (m, 3, m + 2))
    return A, G, np.linalg.inv(V)


@functools.cache
def both_ways(m):
    """Return the Kronecker squares of A, G, B: they act on height and width of a tile at once."""
    return [np.kron(matrix, matrix).astype(np.float32) for matrix in toom_cook(m)]


def winograd(x, weight, bias, m):
    """A 3x3 convolution with ((m + 2) / 3m)² of the multiplications: a quarter for m = 4 (12.3).

    Lavin and Gray, 2015. Tiles of (m + 2)² pixels overlap by two. One matrix transforms each
    tile; then pixel p of all tiles meets pixel p of all filters in a product over the channels;
    and one matrix more turns the sums into the m² pixels of the result.
    """
    (A, _, B), U, (n, H, W, C), out = both_ways(m), filters(weight, m), x.shape, len(weight)
    down, across = -(-H // m), -(-W // m)
    tiles = windows(x, (m + 2, m + 2), m, ((1, down * m + 1 - H), (1, across * m + 1 - W)))
    y = np.empty((n, down, m, across, m, out), x.dtype)

    def block(s):       # about 128 tiles, so that they stay in the cache for all three steps
        d = tiles[:, s].transpose(3, 4, 0, 1, 2, 5).reshape(len(B), -1)
        V = (B.T @ d).reshape(len(B), -1, C)
        Y = np.empty((*V.shape[:2], out), x.dtype)

        def product(p):
            np.matmul(V[p], U[p], out=Y[p])
        parallel(product, shares(len(B), V.size * out))
        pixels = (A.T @ Y.reshape(len(B), -1)).reshape(m, m, n, -1, across, out)
        y[:, s] = (pixels if bias is None else pixels + bias).transpose(2, 3, 0, 4, 1, 5)

    parallel(block, blocks(down, 128 // (n * across)))
    return y.reshape(n, down * m, across * m, out)[:, :H, :W]


# ── Attention ───────────────────────────────────────────────────────────────────────────────────


# With AVX-512 NumPy's exp2 is faster than exp; without, it is scalar, and exp is twice as fast.
power, log_base = (np.exp2, math.log(2)) if "avx512dq" in PROCESSOR else (np.exp, 1.0)


@faster("dot_product_attention", "softmax")
def blocked_attention(q, k, v, causal=False):
    """Attention that never holds all scores: 1024 queries meet 256 keys at a time.

    Numerator and denominator of the softmax are both sums over such blocks (Rabe and Staats,
    2021).
    """
    if causal or math.prod(q.shape[:-1]) * k.shape[-2] <= 2 ** 17:
        return dot_product_attention.formula(q, k, v, causal)
    out = np.empty(q.shape[:-1] + v.shape[-1:], q.dtype)
    scale = 1 / (log_base * math.sqrt(q.shape[-1]))             # eˢ = bᵖ for p = s / log b
    k = (k - k.mean(axis=-2, keepdims=True)) * scale            # softmax cancels the mean
    bound = np.sqrt((q * q).sum(-1).max(-1) * (k * k).sum(-1).max(-1))      # |q·k| <= |q| |k|

    def block(at):
        head = at[:2]
        powers = plain_powers if bound[head] <= 64 else guarded_powers
        total, weight = powers(q[at], k[head], v[head])
        np.divide(total, weight[:, None], out=out[at])
    parallel(block, [(*head, rows) for head in np.ndindex(q.shape[:2])
                     for rows in blocks(q.shape[2], 1024)])
    return out


def plain_powers(q, k, v):
    """Return Σ b^(q·k) v and Σ b^(q·k), for exponents up to 64: no shift is needed."""
    total, weight = 0, 0
    for s in blocks(len(k), 256):
        p = q @ k[s].T
        power(p, out=p)
        total += p @ v[s]
        weight += p @ np.ones(p.shape[1], p.dtype)      # as a product: faster than sum
    return total, weight


def guarded_powers(q, k, v):
    """Return the same divided by b^(largest exponent so far), rescaled whenever that grows.

    Milakov and Gimelshein, 2018. By exp, since exp2 is ten times slower where it underflows.
    """
    total, weight, largest = 0, 0, np.float32(-np.inf)
    for s in blocks(len(k), 256):
        p = q @ k[s].T * log_base
        previous, largest = largest, np.maximum(largest, p.max(-1))
        p = np.exp(p - largest[:, None])
        shrink = np.exp(previous - largest)
        total, weight = total * shrink[:, None] + p @ v[s], weight * shrink + p.sum(-1)
    return total, weight
