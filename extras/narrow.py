"""Keep weights in their file, with their dtype there, until they are used.

The arrays' class does this, so the layers need not know. extras/fast.py prepares each weight at its
first use, on all cores, and keeps the result. Networks that run fewer than PAYS times, and all with
--low-memory, have their weights prepared at every use instead; the system can then drop the file's
pages and read them again.
"""

import numpy as np

import tiny_sd
from tiny_sd import widen


class Narrow(np.ndarray):
    """An array of float32, float16, or bfloat16 kept as uint16, that computes as float32.

    fleeting: discard after each use what was prepared from it.
    """
    fleeting = False

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return getattr(ufunc, method)(*map(wide, inputs), **kwargs)

    def __array_function__(self, function, types, inputs, kwargs):
        return function(*map(wide, inputs), **kwargs)


class Fleeting(Narrow):
    """A Narrow array that is prepared again at each use."""
    fleeting = True


def wide(x):
    """Return x, widened to float32 if it is Narrow."""
    return np.asarray(widen(x.view(np.ndarray)), np.float32) if isinstance(x, Narrow) else x


PAYS = 5        # from this many passes on, it is faster to keep the prepared weights


def keep_what_pays(model, passes):
    """Prepare the weights of networks that run fewer than PAYS times at each use.

    passes: {part of the model: how many times its weights will be read}. Prepared weights are
    float32, and touching so much memory for the first time costs more than preparing them a few
    times.
    """
    def fleeting(tree):
        if isinstance(tree, dict):
            return {name: fleeting(branch) for name, branch in tree.items()}
        if isinstance(tree, list):
            return [fleeting(branch) for branch in tree]
        return tree.view(Fleeting) if isinstance(tree, Narrow) else tree

    if passes["unet"] < PAYS:
        model.unet = fleeting(model.unet)
    if passes["vae"] < PAYS:
        model.vae = fleeting(model.vae)
    if passes["text"] < PAYS:
        model.encoders = [encoder._replace(weights=fleeting(encoder.weights))
                          for encoder in model.encoders]


def to_backend(array, backend, device="cpu", dtype="float32", kind=Narrow):
    """Like tiny_sd.to_backend, but for NumPy leave matrices in the file."""
    if backend == "torch" or array.ndim < 2 or array.dtype.itemsize > 4:
        return tiny_sd.to_backend(array, backend, device, dtype)
    array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return array.view(kind)
