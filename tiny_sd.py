"""Stable Diffusion in one file of NumPy: every layer, how it learns, and how it draws.

    "red apple" --> tokenizer --> text encoder --> context (1, 77, 768) --+
                                                                          |
                                                                          v
    random numbers --> x_T (1, 64, 64, 4) --> sampler <--- x_t, t ---> U-Net
                                                 |
                                                x_0 --> VAE decoder --> picture (1, 512, 512, 3)

    python tiny_sd.py "red apple on a blue background"           the small model in weights/emoji
    python tiny_sd.py "a lighthouse in a storm" -m FOLDER        Stable Diffusion itself

The same in Python, with the plainest sampler and other random numbers, so another picture:

    >>> model = load("weights/emoji")
    >>> context = encode_prompts(model, ["", "red apple on a blue background"])
    >>> steps = evenly_spaced_steps(20, model.alpha_bars)
    >>> x_T = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    >>> *_, x_0 = ddim(denoiser(model, context, guidance=2.0), x_T, steps)
    >>> picture = decode(model, x_0)[0]

Three conventions carry the whole file.

1. A layer is a function of arrays.
2. Its weights are a nested mapping with the checkpoint's names as keys, passed as keyword
   arguments: `resnet(x, temb, groups, eps, **weights)`. A name without a parameter is a TypeError.
3. Images are channels last, (batch, height, width, channels), so that a linear layer, a 1x1
   convolution and the projections of attention are one operation, `x @ w.T`.

Shapes beside the code are those of Stable Diffusion 1.5 drawing 512x512 pixels. (6.2) is an
equation in NOTES.md, whose sections follow this file's. Training (§7) needs torch, for gradients.
extras/ holds what the lesson can do without: all options, speed, other file formats.
"""

import argparse
import functools
import io
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
if __name__ == "__main__" and (HERE / "extras/start.py").exists():
    # The full command line runs here and does not return. Without extras/ beside this file, the
    # small program at its end draws.
    sys.path.insert(0, str(HERE))
    from extras.start import program
    program()

import numpy as np  # noqa: E402  (the program prepares the process before NumPy is loaded)

__version__ = "0.2.0"


# ── 1. Arrays and primitives ─────────────────────────────────────────────────────── NOTES §1 ──
#
# Each operation is defined by its formula in NumPy. Given torch tensors, it calls the function of
# the same name in torch_operations(), so that the networks below are written once and run on both.

FAST = {}   # {name: quicker form of that primitive on NumPy arrays}; extras/fast.py fills it


def primitive(formula):
    """Decorate a NumPy formula: called with torch tensors, it runs torch's operation instead."""
    name = formula.__name__

    @functools.wraps(formula)
    def operation(x, *args, **kwargs):
        if isinstance(x, (np.ndarray, np.generic)):
            return FAST.get(name, formula)(x, *args, **kwargs)
        return torch_operations()[name](x, *args, **kwargs)

    operation.formula = formula
    return operation


@primitive
def linear(x, weight, bias=None):
    """Return x Wᵀ + b over the last axis (1.1).

    weight: (out, in), or (out, 1, 1, in) of a 1x1 convolution, which is the same thing.
    """
    y = x @ weight.reshape(len(weight), -1).T   # (..., in) -> (..., out)
    return y if bias is None else y + bias


@primitive
def conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
    """Multiply each kh x kw patch of x by one matrix (1.2).

    x: (batch, height, width, in); weight: (out, kh, kw, in). padding: how many zeros (before,
    after) along both height and width. Returns (batch, height', width', out) (1.3).
    """
    _, kh, kw, _ = weight.shape
    x = np.pad(x, [(0, 0), padding, padding, (0, 0)])

    patches = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    patches = patches[:, ::stride, ::stride]                    # (batch, h', w', in, kh, kw)
    y = np.tensordot(patches, weight, [(3, 4, 5), (3, 1, 2)])   # (batch, h', w', out)
    return y if bias is None else y + bias


@primitive
def group_norm(x, groups, eps, weight, bias):
    """Normalise each group of channels of each image, then scale and shift (1.5).

    Wu and He, 2018. x: (batch, height, width, channels).
    """
    B, H, W, C = x.shape
    g = x.reshape(B, H * W, groups, C // groups)        # mean and variance over axes 1 and 3
    g = g - g.mean(axis=(1, 3), keepdims=True)
    g = g / np.sqrt((g * g).mean(axis=(1, 3), keepdims=True) + eps)
    return g.reshape(B, H, W, C) * weight + bias


@primitive
def layer_norm(x, weight, bias, eps=1e-5):
    """Normalise each row, the last axis, then scale and shift (1.5). Ba et al., 2016."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return x * weight + bias


@primitive
def sigmoid(x):
    """Return 1 / (1 + e⁻ˣ), in the form that cannot overflow (1.6)."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


@primitive
def silu(x):
    """Return x σ(x) (1.7)."""
    return x * sigmoid(x)


def quick_gelu(x):
    """Return x σ(1.702 x), the approximation of GELU that CLIP was trained with (1.7)."""
    return x * sigmoid(1.702 * x)


@primitive
def gelu(x):
    """Return x Φ(x) = x (1 + erf(x / √2)) / 2 (1.7).

    NumPy has no erf; this is the fit of Abramowitz and Stegun, 7.1.26 (1.8), within 1.5e-7.
    """
    z = np.abs(x) * math.sqrt(0.5)
    r = 1 / (1 + 0.3275911 * z)
    polynomial = 0.0
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + a) * r
    erf = 1 - polynomial * np.exp(-z * z)
    return x * (0.5 + 0.5 * np.copysign(erf, x))


@primitive
def softmax(x):
    """Return eˣ / Σ eˣ over the last axis (1.9).

    Subtracting the maximum does not change the quotient and keeps eˣ from overflowing.
    """
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@primitive
def dot_product_attention(q, k, v, causal=False):
    """Return softmax(q kᵀ / √d) v (1.10). Vaswani et al., 2017.

    q: (batch, heads, queries, d); k, v: (batch, heads, keys, d). Returns the shape of q.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])          # (batch, heads, queries, keys)
    if causal:      # a token sees itself and those before it
        scores = scores + np.triu(np.full(scores.shape[-2:], -np.inf, scores.dtype), 1)
    return softmax(scores) @ v


@primitive
def upsample(x, height, width):
    """Double an image by repeating each pixel, then cut it to height and width (1.4)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


@primitive
def concat(*xs):
    """Join arrays along the last axis, the channels."""
    return np.concatenate(xs, axis=-1)


@primitive
def map_rows(x, function, *others):
    """Apply a function to x[0:1], x[1:2], ..., and the others' rows with them; join the results.

    Rows must be independent. NumPy takes one at a time, which needs less memory and lets
    extras/fast.py give each a core; torch gets them all in one call.
    """
    rows = [[array[i:i + 1] for array in (x, *others)] for i in range(len(x))]
    return np.concatenate([function(*row) for row in rows])


@primitive
def array_like(x, values):
    """Convert values to an array of x's library, type and device."""
    return np.asarray(values, x.dtype)


@primitive
def to_numpy(x):
    """Convert x to a float32 NumPy array."""
    return np.asarray(x, np.float32)


@functools.cache
def torch_operations():
    """Return {name: torch's form of that primitive}. Besides these, only §7 and to_torch use torch.

    torch.nn.functional wants channels first: movedim reorders the axes of our images, without a
    copy.
    """
    import torch
    import torch.nn.functional as F

    def conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
        before, after = padding
        if before != after:     # F.conv2d pads both sides alike
            x = F.pad(x, (0, 0, before, after, before, after))      # channels, width, height
            before = 0
        x, weight = x.movedim(-1, 1), weight.movedim(-1, 1)
        return F.conv2d(x, weight, bias, stride, before).movedim(1, -1)

    def group_norm(x, groups, eps, weight, bias):
        return F.group_norm(x.movedim(-1, 1), groups, weight, bias, eps).movedim(1, -1)

    def upsample(x, height, width):
        y = F.interpolate(x.movedim(-1, 1), scale_factor=2.0).movedim(1, -1)
        return y[:, :height, :width]

    def attention(q, k, v, causal=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {
        "linear": lambda x, weight, bias=None: F.linear(x, weight.reshape(len(weight), -1), bias),
        "conv2d": conv2d,
        "group_norm": group_norm,
        "layer_norm": lambda x, weight, bias, eps=1e-5: F.layer_norm(
            x, x.shape[-1:], weight, bias, eps),
        "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
        "softmax": lambda x: F.softmax(x, -1),
        "dot_product_attention": attention,
        "upsample": upsample,
        "concat": lambda *xs: torch.cat(xs, -1),
        "map_rows": lambda x, function, *others: function(x, *others),
        "array_like": lambda x, values: torch.as_tensor(values).to(x),
        "to_numpy": lambda x: x.detach().float().cpu().numpy(),
    }


# ── 2. Tokenizer ─────────────────────────────────────────────────────────────────── NOTES §2 ──


def byte_symbols():
    """Return {byte: character} in the vocabulary's order. Radford et al., 2019.

    Bytes with no printable character, such as the space, get one from 256 up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = printable + [256 + i for i in range(len(others))]
    return dict(zip(printable + others, map(chr, characters)))


class Tokenizer:
    """CLIP's byte pair encoding: text to bytes, bytes to symbols, symbols merged by rank.

    merges: pairs of symbols in the order in which they were learnt. vocab: {symbol: id}; without
    one, ids follow CLIP's order: 256 bytes, 256 bytes that end a word, the merges, two special
    tokens. length: how many ids the model takes. pad: the padding token.
    """
    BOS, EOS = "<|startoftext|>", "<|endoftext|>"
    # Unicode's White_Space; Python's \s has \x1c to \x1f as well
    SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

    def __init__(self, merges, vocab=None, length=77, pad=EOS):
        self.bytes = byte_symbols()
        self.rank = {pair: i for i, pair in enumerate(merges)}
        if vocab is None:
            single = list(self.bytes.values())
            symbols = single + [s + "</w>" for s in single] + [a + b for a, b in merges]
            vocab = {symbol: i for i, symbol in enumerate([*symbols, self.BOS, self.EOS])}
        self.vocab, self.symbol = vocab, {i: symbol for symbol, i in vocab.items()}
        self.length, self.pad = length, vocab[pad]

    def words(self, text):
        """Lower-case, then split into runs of letters, single digits and runs of symbols.

        White space only separates. Python's re has no class for the letters of every script, so
        the pattern lists those in this text.
        """
        text = unicodedata.normalize("NFC", text)
        text = "".join(c.lower() for c in text)     # text.lower() would make a final Σ a ς
        # a-z and 0-9 keep the classes from being empty
        letters = "a-z" + "".join(filter(str.isalpha, set(text)))
        digits = "0-9" + "".join(c for c in set(text) if unicodedata.category(c)[0] == "N")
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{digits}]"
                          rf"|[^{self.SPACE}{letters}{digits}]+", text)

    def merge(self, word):
        """Return the word's symbols, merging the pair of lowest rank until no pair has a rank."""
        *head, last = (self.bytes[b] for b in word.encode(errors="replace"))
        symbols = [*head, last + "</w>"]        # which marks the end of a word

        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        return symbols

    def tokens(self, text):
        """Return the ids of a text of any length, without BOS and EOS around it.

        Special tokens written out in the text become their ids, as in CLIP.
        """
        symbols = []
        for piece in re.split(f"({re.escape(self.BOS)}|{re.escape(self.EOS)})", text):
            if piece in (self.BOS, self.EOS):
                symbols.append(piece)
            else:
                symbols += [symbol for word in self.words(piece) for symbol in self.merge(word)]
        unknown = self.vocab[self.EOS]      # what a symbol not in the vocabulary becomes
        return [self.vocab.get(symbol, unknown) for symbol in symbols]

    def encode(self, text):
        """Return the model's ids (length,), and the text that did not fit."""
        text = re.sub(rf"[{self.SPACE}]+", " ", text)
        start = text[:40 * self.length]     # more never fits, and long words take long to merge
        room = self.length - 2
        ids = self.tokens(start)

        used = [self.vocab[self.BOS], *ids[:room], self.vocab[self.EOS]]
        padding = [self.pad] * (self.length - len(used))
        return np.array(used + padding), self.decode(ids[room:]) + text[len(start):]

    def decode(self, ids):
        """Return the text of some ids: lower case, words separated by spaces."""
        byte = {symbol: b for b, symbol in self.bytes.items()}
        symbols = "".join(self.symbol[i] for i in ids).replace("</w>", " ")
        # 32, a space, is what </w> became
        return bytes(byte.get(c, 32) for c in symbols).decode(errors="replace").strip()


# ── 3. Text encoder ──────────────────────────────────────────────────────────────── NOTES §3 ──


def split_heads(x, n_head):
    """Reshape (batch, tokens, n_head d) to (batch, n_head, tokens, d)."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(x):
    """Reshape (batch, n_head, tokens, d) to (batch, tokens, n_head d)."""
    B, n_head, T, d = x.shape
    return x.swapaxes(1, 2).reshape(B, T, n_head * d)


def attention(x, context, n_head, to_q, to_k, to_v, to_out, causal=False):
    """Multi-head attention: queries from x, keys and values from context (3.3), (5.4).

    x: (batch, queries, channels); context: (batch, keys, width). Returns the shape of x.
    Self-attention is attention(x, x, ...).
    """
    q = split_heads(linear(x, **to_q), n_head)                  # (batch, n_head, queries, d)
    k = split_heads(linear(context, **to_k), n_head)            # (batch, n_head, keys, d)
    v = split_heads(linear(context, **to_v), n_head)
    h = merge_heads(dot_product_attention(q, k, v, causal))     # (batch, queries, n_head d)
    return linear(h, **to_out[0])                               # to_out[1] was dropout


def text_layer(x, n_head, activation, layer_norm1, self_attn, layer_norm2, mlp):
    """A Transformer layer: causal self-attention, then an MLP, each added to its input (3.2)."""
    h = layer_norm(x, **layer_norm1)                            # (batch, 77, 768)
    x = x + attention(h, h, n_head, self_attn["q_proj"], self_attn["k_proj"], self_attn["v_proj"],
                      [self_attn["out_proj"]], causal=True)

    h = layer_norm(x, **layer_norm2)
    h = activation(linear(h, **mlp["fc1"]))                     # (batch, 77, 3072)
    return x + linear(h, **mlp["fc2"])


def text_encoder(ids, n_head, activation, embeddings, encoder, final_layer_norm=None):
    """Turn token ids (batch, tokens) into the context (batch, tokens, width) for the U-Net.

    CLIP's text encoder: Radford et al., 2021. SDXL's context is the output of the last layer but
    one, without the final norm (9.8).
    """
    x = embeddings["token_embedding"]["weight"][ids]            # (batch, 77) -> (batch, 77, 768)
    x = x + embeddings["position_embedding"]["weight"][:ids.shape[1]]
    for layer in encoder["layers"]:
        x = text_layer(x, n_head, activation, **layer)
    return layer_norm(x, **final_layer_norm) if final_layer_norm else x


# ── 4. VAE ───────────────────────────────────────────────────────────────────────── NOTES §4 ──


def resnet(x, temb, groups, eps, norm1, conv1, norm2, conv2,
           time_emb_proj=None, conv_shortcut=None):
    """A ResNet block: x plus two rounds of GroupNorm, SiLU, 3x3 convolution (4.5).

    He et al., 2015. x: (batch, height, width, in). Returns (batch, height, width, out). temb: the
    time embedding (batch, 1280), which tells the U-Net the noise level; None in the VAE.
    """
    h = conv2d(silu(group_norm(x, groups, eps, **norm1)), **conv1)      # in -> out channels
    if time_emb_proj:
        h = h + linear(silu(temb), **time_emb_proj)[:, None, None]      # (batch, 1, 1, out)
    h = conv2d(silu(group_norm(h, groups, eps, **norm2)), **conv2)
    return h + (linear(x, **conv_shortcut) if conv_shortcut else x)


def vae_attention(x, groups, **weights):
    """Self-attention among all pixels of an image, with one head.

    weights: the checkpoint's group_norm, to_q, to_k, to_v and to_out; as one mapping, since a
    parameter named group_norm would hide the function.
    """
    B, H, W, C = x.shape
    h = group_norm(x, groups, 1e-6, **weights.pop("group_norm"))
    h = h.reshape(B, H * W, C)                                  # the pixels become a sequence
    return x + attention(h, h, 1, **weights).reshape(B, H, W, C)


def vae_block(x, groups, resnets, attentions=(), downsamplers=(), upsamplers=()):
    """The ResNet blocks of one level (the middle has attention between them), then resampling."""
    for resnet_weights, attention_weights in zip_longest(resnets, attentions):
        x = resnet(x, None, groups, 1e-6, **resnet_weights)
        if attention_weights:
            x = vae_attention(x, groups, **attention_weights)
    for layer in downsamplers:      # one or none; halves, with zeros to the right and bottom only
        x = conv2d(x, **layer["conv"], stride=2, padding=(0, 1))
    for layer in upsamplers:
        x = conv2d(upsample(x, 2 * x.shape[1], 2 * x.shape[2]), **layer["conv"])
    return x


def vae_encoder(x, groups, conv_in, down_blocks, mid_block, conv_norm_out, conv_out):
    """Shrink an image level by level: (batch, 512, 512, 3) to (batch, 64, 64, 8)."""
    x = conv2d(x, **conv_in)                                    # (batch, 512, 512, 128)
    for block in [*down_blocks, mid_block]:
        x = vae_block(x, groups, **block)                       # finally (batch, 64, 64, 512)
    return conv2d(silu(group_norm(x, groups, 1e-6, **conv_norm_out)), **conv_out)


def vae_decoder(z, groups, conv_in, mid_block, up_blocks, conv_norm_out, conv_out):
    """Enlarge latents level by level: (batch, 64, 64, 4) to (batch, 512, 512, 3)."""
    x = conv2d(z, **conv_in)                                    # (batch, 64, 64, 512)
    for block in [mid_block, *up_blocks]:
        x = vae_block(x, groups, **block)                       # finally (batch, 512, 512, 128)
    return conv2d(silu(group_norm(x, groups, 1e-6, **conv_norm_out)), **conv_out)


def vae_encode(picture, vae, groups):
    """Return the mean and log variance of q(z | picture), each (batch, h, w, 4) (4.2).

    Kingma and Welling, 2014. picture: (batch, 8 h, 8 w, 3) in [-1, 1].
    """
    h = vae_encoder(picture, groups, **vae["encoder"])
    moments = linear(h, **vae["quant_conv"])                    # (batch, h, w, 8)
    n = moments.shape[-1] // 2
    return moments[..., :n], moments[..., n:].clip(-30, 20)     # keeps e^logvar finite


def vae_decode(z, vae, groups):
    """Turn unscaled latents z (batch, h, w, 4) into pictures (batch, 8 h, 8 w, 3) in [-1, 1]."""
    return vae_decoder(linear(z, **vae["post_quant_conv"]), groups, **vae["decoder"])


# ── 5. U-Net ─────────────────────────────────────────────────────────────────────── NOTES §5 ──


def timestep_embedding(t, dim):
    """Return dim/2 cosines, then dim/2 sines, of each time in t (batch,) (5.1).

    The frequencies fall from 1 to about 1/10000. Vaswani et al., 2017.
    """
    frequencies = np.exp(-math.log(10000) * np.arange(dim // 2) / (dim // 2))
    angles = np.asarray(t)[:, None] * frequencies               # (batch, dim/2)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def time_mlp(x, t, linear_1, linear_2, cond_proj=None, condition=None):
    """Return the time embedding that every ResNet block gets, (batch, 1280) (5.2).

    x says only which library, dtype and device. Some distilled models also embed a condition
    (batch, n), through cond_proj.
    """
    h = array_like(x, timestep_embedding(t, linear_1["weight"].shape[1]))       # (batch, 320)
    if cond_proj:
        h = h + linear(array_like(x, condition), **cond_proj)
    return linear(silu(linear(h, **linear_1)), **linear_2)


def feed_forward(x, net):
    """GEGLU: widen, let one half gate the other, and narrow again (5.3). Shazeer, 2020."""
    wide, _, narrow = net                                       # net[1] was dropout
    h = linear(x, **wide["proj"])                               # (batch, pixels, 8 * channels)
    n = h.shape[-1] // 2
    return linear(h[..., :n] * gelu(h[..., n:]), **narrow)      # (batch, pixels, channels)


def transformer_block(x, context, n_head, norm1, attn1, norm2, attn2, norm3, ff):
    """Let pixels attend to each other, then to the words, then apply the feed-forward (5.4)."""
    h = layer_norm(x, **norm1)                                  # (batch, pixels, channels)
    x = x + attention(h, h, n_head, **attn1)
    x = x + attention(layer_norm(x, **norm2), context, n_head, **attn2)
    return x + feed_forward(layer_norm(x, **norm3), **ff)


def transformer(x, context, n_head, groups, norm, proj_in, transformer_blocks, proj_out):
    """Treat the pixels of x (batch, height, width, channels) as the tokens of a sequence.

    This norm's eps is 1e-6, as in the VAE; the U-Net's others have 1e-5.
    """
    B, H, W, C = x.shape
    h = linear(group_norm(x, groups, 1e-6, **norm), **proj_in).reshape(B, H * W, C)
    for block in transformer_blocks:
        h = transformer_block(h, context, n_head, **block)
    return x + linear(h.reshape(B, H, W, C), **proj_out)


def down_block(x, temb, context, n_head, groups, resnets, attentions=(), downsamplers=()):
    """One level on the way down, or the middle: return its output and the skips for the way up.

    x: (batch, height, width, channels). Each ResNet block, and the downsampler, leaves a skip.
    """
    skips = []
    for resnet_weights, attention_weights in zip_longest(resnets, attentions):
        x = resnet(x, temb, groups, 1e-5, **resnet_weights)
        if attention_weights:
            x = transformer(x, context, n_head, groups, **attention_weights)
        skips.append(x)
    for layer in downsamplers:
        x = conv2d(x, **layer["conv"], stride=2)                # half the size
        skips.append(x)
    return x, skips


def up_block(x, skips, size, temb, context, n_head, groups, resnets, attentions=(), upsamplers=()):
    """One level on the way up: each ResNet block also sees a skip, the last one first (5.5).

    size: (height, width) of the next skip, since a size can be odd: 5 halves to 3, and 3 doubles
    to 6.
    """
    for resnet_weights, attention_weights, skip in zip_longest(resnets, attentions, skips[::-1]):
        x = resnet(concat(x, skip), temb, groups, 1e-5, **resnet_weights)
        if attention_weights:
            x = transformer(x, context, n_head, groups, **attention_weights)
    for layer in upsamplers:
        x = conv2d(upsample(x, *size), **layer["conv"])         # twice the size
    return x


def unet(x, t, context, n_head, groups, time_embedding, conv_in, down_blocks, up_blocks,
         conv_norm_out, conv_out, mid_block=None, add_embedding=None, condition=None):
    """Predict the noise in x_t (or x_0, or v: see split_prediction).

    Ronneberger et al., 2015; Rombach et al., 2022. x: (batch, h, w, 4); t: (batch,), times in
    0..999; context: (batch, tokens, width); n_head: attention heads of each level, the largest
    image first; groups: of every GroupNorm. Returns (batch, h, w, 4). Pruned models have no middle;
    some models add a condition (batch, n) to the time embedding, by add_embedding or as time_mlp
    does. Each level of Stable Diffusion 1.5, as (height, width, channels) after its ResNet blocks,
    and after it was resampled:

        level    on the way down                        on the way up
          0      (64, 64,  320) -> (32, 32,  320)       (64, 64,  320)
          1      (32, 32,  640) -> (16, 16,  640)       (32, 32,  640) -> (64, 64,  640)
          2      (16, 16, 1280) -> ( 8,  8, 1280)       (16, 16, 1280) -> (32, 32, 1280)
          3      ( 8,  8, 1280)                         ( 8,  8, 1280) -> (16, 16, 1280)
    """
    temb = time_mlp(x, t, condition=condition, **time_embedding)        # (batch, 1280)
    if add_embedding:
        h = silu(linear(array_like(x, condition), **add_embedding["linear_1"]))
        temb = temb + linear(h, **add_embedding["linear_2"])
    x = conv2d(x, **conv_in)                                            # (batch, 64, 64, 320)

    skips = [x]
    for heads, block in zip(n_head, down_blocks):
        x, new_skips = down_block(x, temb, context, heads, groups, **block)
        skips = skips + new_skips       # 12 in the end: 1 of conv_in, then 3 + 3 + 3 + 2

    if mid_block:
        x, _ = down_block(x, temb, context, n_head[-1], groups, **mid_block)

    for heads, block in zip(reversed(n_head), up_blocks):
        n = len(block["resnets"])
        skips, block_skips = skips[:-n], skips[-n:]
        size = skips[-1].shape[1:3] if skips else None
        x = up_block(x, block_skips, size, temb, context, heads, groups, **block)

    x = silu(group_norm(x, groups, 1e-5, **conv_norm_out))              # (batch, 64, 64, 320)
    return conv2d(x, **conv_out)                                        # (batch, 64, 64, 4)


# ── 6. Diffusion ─────────────────────────────────────────────────────────────────── NOTES §6 ──


def alpha_bars(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012):
    """Return ᾱ_t, the fraction of x_t's variance that is signal, for t = 0 .. T - 1 (6.4).

    This schedule is known as "scaled_linear": linear in √β.
    """
    beta = np.linspace(beta_start ** 0.5, beta_end ** 0.5, num_train_timesteps) ** 2
    return np.cumprod(1 - beta)


def forward_step(x, beta, eps):
    """Take one small step towards noise: x_t = √(1 - β) x_{t-1} + √β ε (6.1). Ho et al., 2020.

    Only the derivation needs it: add_noise takes all the steps at once.
    """
    return (1 - beta) ** 0.5 * x + beta ** 0.5 * eps


def add_noise(x_0, alpha_bar, eps):
    """Noise a picture to a level: x_t = √ᾱ x_0 + √(1 - ᾱ) ε (6.2).

    alpha_bar: a number, or an array that broadcasts against x_0, one level for each picture.
    """
    return alpha_bar ** 0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps


def velocity(x_0, alpha_bar, eps):
    """Return v = √ᾱ ε - √(1 - ᾱ) x_0 (6.14). Salimans and Ho, 2022."""
    return alpha_bar ** 0.5 * eps - (1 - alpha_bar) ** 0.5 * x_0


def split_prediction(prediction_type, output, x_t, alpha_bar):
    """Turn the model's output into guesses (x̂_0, ε̂): x_t = √ᾱ x̂_0 + √(1 - ᾱ) ε̂ (6.15)."""
    signal, noise = alpha_bar ** 0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x_t - noise * output, signal * output + noise * x_t
    return output, (x_t - signal * output) / noise      # "sample"


def guide(uncond, cond, scale):
    """Classifier-free guidance: go `scale` times the way from uncond to cond (6.17).

    Ho and Salimans, 2022. Scale 1 is cond itself; larger scales overshoot it.
    """
    return uncond + scale * (cond - uncond)


def evenly_spaced_steps(n, alpha_bars):
    """Return n steps from the noisiest level to the clean picture, evenly spaced in t.

    A step is a triple (t, ᾱ_t, ᾱ of the next level); after the last step ᾱ is 1.
    n: 1 to len(alpha_bars) - 1.
    """
    t = np.linspace(len(alpha_bars) - 1, 0, n + 1).round().astype(int)[:-1]
    levels = alpha_bars[t].tolist()
    return list(zip(t.tolist(), levels, [*levels[1:], 1.0]))


# A sampler walks from noise to a picture. Its arguments: denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂); the
# first x_t; the steps; and noise(), which returns a fresh ε. It yields each x_t; callers may change
# the yielded array in place, and the next step starts from it. ddim and euler are the same method
# in different coordinates; so are ddpm and euler_ancestral.


def ddpm(denoise, x, steps, noise):
    """Draw x at each next level s from the posterior q(x_s | x_t, x̂_0) (6.18). Ho et al., 2020."""
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        alpha = alpha_bar / alpha_bar_next      # of the whole step between the two levels
        beta = 1 - alpha

        mean = (alpha_bar_next ** 0.5 * beta * x_0
                + alpha ** 0.5 * (1 - alpha_bar_next) * x) / (1 - alpha_bar)
        variance = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
        x = mean + variance ** 0.5 * noise()
        yield x


def ddim(denoise, x, steps, noise=None):
    """Take x̂_0 to the next level with the same ε̂ (6.20). Song et al., 2021."""
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, eps = denoise(x, t, alpha_bar)
        x = add_noise(x_0, alpha_bar_next, eps)
        yield x


def sigma_of(alpha_bar):
    """Return σ = √(1 - ᾱ) / √ᾱ, the noise-to-signal ratio in amplitude (6.5)."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def euler(denoise, x, steps, noise=None):
    """Follow dx̄/dσ = ε̂, where x̄ = x_t / √ᾱ, by Euler's method (6.22): ddim in other coordinates.

    Karras et al., 2022.
    """
    for t, alpha_bar, alpha_bar_next in steps:
        _, eps = denoise(x, t, alpha_bar)
        x_bar = x / alpha_bar ** 0.5
        x_bar = x_bar + (sigma_of(alpha_bar_next) - sigma_of(alpha_bar)) * eps
        x = alpha_bar_next ** 0.5 * x_bar
        yield x


def euler_ancestral(denoise, x, steps, noise):
    """Step below the next level, then back up to it with fresh noise (6.23)."""
    for t, alpha_bar, alpha_bar_next in steps:
        _, eps = denoise(x, t, alpha_bar)
        sigma, sigma_next = sigma_of(alpha_bar), sigma_of(alpha_bar_next)
        sigma_up = sigma_next / sigma * (sigma ** 2 - sigma_next ** 2) ** 0.5
        sigma_down = (sigma_next ** 2 - sigma_up ** 2) ** 0.5

        x_bar = x / alpha_bar ** 0.5 + (sigma_down - sigma) * eps
        x = alpha_bar_next ** 0.5 * (x_bar + sigma_up * noise())
        yield x


def dpm_pp_2m(denoise, x, steps, noise=None):
    """DPM-Solver++ (2M): a step in λ = -log σ that extrapolates x̂_0 from the last two (6.28).

    Lu et al., 2022, algorithm 2. The linear part of the ODE is solved exactly (6.26). The first
    step, which has no history, and the last, to σ = 0, are of first order.
    """
    previous = None
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        sigma, sigma_next = sigma_of(alpha_bar), sigma_of(alpha_bar_next)

        direction = x_0
        if previous and sigma_next > 0:
            previous_x_0, previous_sigma = previous
            r = math.log(previous_sigma / sigma) / math.log(sigma / sigma_next)
            direction = x_0 + (x_0 - previous_x_0) / (2 * r)
        previous = x_0, sigma

        shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5
        x = shrink * x + alpha_bar_next ** 0.5 * (1 - sigma_next / sigma) * direction
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_a": euler_ancestral,
            "dpm++2m": dpm_pp_2m}       # extras/samplers.py adds plms and lcm


# ── 7. Training ──────────────────────────────────────────────────────────────────── NOTES §7 ──
#
# Three networks are trained one after the other: first the VAE, on pictures; then the text
# encoder, on pictures with captions, together with an image encoder that is discarded afterwards;
# then the U-Net, on the VAE's latents and the text encoder's contexts. Autograd works through the
# functions above unchanged, so the losses take torch tensors. A full recipe: weights/train.py.


def l1_loss(picture, reference):
    """Return the mean of |picture - reference|."""
    return (picture - reference).abs().mean()


def vae_loss(picture, eps, vae, groups, error=l1_loss, kl_weight=1e-4):
    """Return the error of a picture reconstructed from sampled latents, plus a small KL (7.1).

    picture: (batch, 8 h, 8 w, 3) in [-1, 1]; eps: standard normal (batch, h, w, 4). Stable
    Diffusion's own VAE was trained with LPIPS and a discriminator in addition.
    """
    mean, logvar = vae_encode(picture, vae, groups)             # (batch, h, w, 4) each
    z = mean + (logvar / 2).exp() * eps
    kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
    return error(vae_decode(z, vae, groups), picture) + kl_weight * kl


def clip_loss(text, image, logit_scale):
    """Contrastive loss: each caption finds its picture, and each picture its caption (3.4).

    text, image: (batch, width), unit vectors, in the same order; logit_scale: log(1/τ), learnt.
    Radford et al., 2021.
    """
    scores = logit_scale.exp() * text @ image.T         # (captions, pictures)
    own = scores.diagonal()                             # each caption with its own picture
    return (scores.logsumexp(1) - own + scores.logsumexp(0) - own).mean() / 2


def diffusion_loss(predict, prediction_type, x_0, alpha_bar, eps):
    """Noise each picture, let the model predict, and return the mean squared errors (batch,) (7.3).

    predict: a function of x_t. x_0, eps: (batch, h, w, 4); alpha_bar: (batch, 1, 1, 1).
    """
    x_t = add_noise(x_0, alpha_bar, eps)
    targets = {"epsilon": eps, "v_prediction": velocity(x_0, alpha_bar, eps), "sample": x_0}
    return ((predict(x_t) - targets[prediction_type]) ** 2).mean((1, 2, 3))


def drop_captions(captions, rng, rate=0.1):
    """Replace some captions by None: the model also learns to predict without one (6.16)."""
    return [caption if rng.random() >= rate else None for caption in captions]


def parameters(*networks):
    """Return all weights of some networks (torch tensors), with requires_grad set."""
    return [array.requires_grad_() for weights in networks for array in flatten(weights).values()]


def train(model, optimizer, latents, captions, steps, batch_size=16, seed=0):
    """Train the U-Net, whose weights change in place; yield the loss of each step.

    model: loaded with backend="torch". latents: (n, h, w, 4), scaled, of n pictures with n
    captions. optimizer: one of torch.optim's, over parameters(model.unet), as Stable Diffusion did
    it, or over parameters(model.unet, model.text_encoder), as weights/train.py does.
    """
    rng, config = np.random.default_rng(seed), model.config
    for _ in range(steps):
        chosen = rng.integers(len(latents), size=batch_size)
        x_0 = latents[chosen]                                       # (batch, h, w, 4)
        shown = drop_captions([captions[i] for i in chosen], rng)
        context, pooled = embed_prompts(model, shown)               # (batch, tokens, width)
        condition = unet_conditions(model, batch_size, 1, pooled, x_0.shape)    # most have none

        t = rng.integers(len(model.alpha_bars), size=batch_size)
        alpha_bar = array_like(x_0, model.alpha_bars[t])[:, None, None, None]
        eps = array_like(x_0, rng.standard_normal(x_0.shape))

        predict = functools.partial(unet, t=t, context=context, n_head=config.unet.n_head,
                                    groups=config.unet.norm_num_groups, condition=condition,
                                    **model.unet)
        loss = diffusion_loss(predict, config.scheduler.prediction_type, x_0, alpha_bar, eps).mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


# ── 8. From prompt to picture ────────────────────────────────────────────────────── NOTES §8 ──


@dataclass(repr=False)      # as text, the weights would fill the screen
class Model:
    """A tokenizer, the nested weights of three networks, and their configs."""
    name: str
    config: SimpleNamespace             # of text_encoder, vae, unet, scheduler
    tokenizer: Tokenizer
    text_encoder: dict
    vae: dict
    unet: dict
    second: SimpleNamespace = None      # a second text encoder: see §9
    vae_encode: Callable = vae_encode   # another kind of VAE brings its own two functions,
    vae_decode: Callable = vae_decode   # as in extras/tiny_vae.py

    @property
    def alpha_bars(self):
        """The noise levels ᾱ_t that the model was trained on, (1000,)."""
        scheduler = self.config.scheduler
        return alpha_bars(scheduler.num_train_timesteps, scheduler.beta_start, scheduler.beta_end)

    @property
    def factor(self):
        """Pixels per latent along each axis: 8."""
        return 2 ** (len(self.config.vae.block_out_channels) - 1)

    @property
    def inpaints(self):
        """Does the U-Net see a mask and the rest of a picture beside x_t?"""
        return self.config.unet.in_channels > self.config.vae.latent_channels


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def encode_prompts(model: Model, texts: list[str | None]):
    """Return the context (len(texts), tokens, width) of some texts."""
    return embed_prompts(model, texts)[0]


def embed_prompts(model, texts):
    """Return the context of some texts and their pooled vectors, None without a second encoder.

    Warns on stderr about text that did not fit. None, which is no text, is encoded like an empty
    one, but as zeros where there are two text encoders.
    """
    rows = []
    for text in texts:
        ids, cut = model.tokenizer.encode(text or "")
        if cut:
            tell(f"the prompt {shorten(repr(text), 30)} has more than {len(ids) - 2} tokens; "
                 f"the model does not see: {shorten(cut)}")
        rows.append(ids)
    config = model.config.text_encoder
    activation = ACTIVATIONS[config.hidden_act]
    context = text_encoder(np.stack(rows), config.num_attention_heads, activation,
                           **model.text_encoder)
    return add_second_encoder(model, texts, context) if model.second else (context, None)


def denoiser(model: Model, context, guidance: float, pooled=None, extra_channels=None) -> Callable:
    """Return denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), which asks the U-Net.

    context: (1, tokens, width) of the prompt, or for guidance (2, tokens, width) of the negative
    prompt and the prompt; pooled: their pooled vectors, if any. extra_channels: (batch, h, w, n)
    that an inpainting model sees beside x_t. Samplers work in NumPy: x_t, x̂_0 and ε̂ are NumPy
    arrays whatever the model's library.
    """
    config = model.config.unet

    def denoise(x_t, t, alpha_bar):
        x = x_t if extra_channels is None else concat(x_t, extra_channels)
        # further inputs of SDXL and distilled models, (contexts, n); n is 0 for all others
        conditions = unet_conditions(model, len(context), guidance, pooled, x.shape)

        def predict(contexts, condition):       # one context or both, for every picture
            xs = array_like(context, np.concatenate([x] * len(contexts)))
            row = np.repeat(np.arange(len(contexts)), len(x))       # 0 0 0 1 1 1 for 3 pictures
            return to_numpy(unet(xs, np.full(len(xs), t), contexts[row], config.n_head,
                                 config.norm_num_groups, condition=condition[row], **model.unet))

        output = map_rows(context, predict, conditions)         # (contexts * batch, h, w, 4)
        if len(context) == 2:
            uncond, cond = np.split(output, 2)
            output = guide(uncond, cond, guidance)
        return split_prediction(model.config.scheduler.prediction_type, output, x_t, alpha_bar)

    return denoise


def generate(model: Model, prompt: str, negative: str | None = None, seeds: Sequence[int] = (0,),
             steps: int | None = None, guidance: float | None = None,
             sampler: str | Callable | None = None, karras=False, width: int | None = None,
             height: int | None = None, init: np.ndarray | None = None, strength=0.75,
             mask: np.ndarray | None = None, denoiser=denoiser,
             embed_prompts=embed_prompts) -> Iterator[np.ndarray]:
    """Return a generator of the latents x_t (len(seeds), h, w, 4) after each step.

    decode() turns any of them into pictures. Where steps, guidance, sampler, width or height are
    None, the model's own are taken. sampler: a name in SAMPLERS, or a function like those.
    guidance <= 1 turns guidance off. init: a picture (height, width, 3) of uint8 to start from,
    noised to `strength` of the way. mask: (height, width) of bool, true where init is to be
    replaced. denoiser, embed_prompts: functions to use instead of the ones above. Raises UserError
    for values out of range.
    """
    # what was asked for, checked, with the defaults filled in (§9): sampler, steps, noise(),
    # guidance, guided, and initial_scale, the standard deviation of x_T
    plan = plan_like_diffusers(model, seeds, steps, guidance, sampler, karras, width, height,
                               init, mask)
    context, pooled = embed_prompts(model, [negative, prompt] if plan.guided else [prompt])
    make_denoiser = functools.partial(denoiser, model, context, plan.guidance, pooled)
    if mask is not None:
        return inpaint(model, init, mask, strength, make_denoiser, plan)

    steps = plan.steps
    if init is None:                            # text to image: from noise
        x = plan.initial_scale * plan.noise()
    else:                                       # image to image: from the noised picture
        steps = last_steps(steps, strength)
        _, alpha_bar, _ = steps[0]
        x_0 = encode(model, init, plan.noise())
        x = add_noise(x_0, alpha_bar, plan.noise())
    return plan.sampler(make_denoiser(), x, steps, plan.noise)


def inpaint(model, init, mask, strength, make_denoiser, plan):
    """Replace the masked part of a picture; strength 1 ignores what was there.

    A model for inpainting sees the mask and the rest of the picture beside x_t. With any other,
    the rest is put back after each step.
    """
    steps = last_steps(plan.steps, strength)
    _, alpha_bar, _ = steps[0]
    x_0 = None if strength == 1 and model.inpaints else encode(model, init, plan.noise())
    eps = plan.noise()
    x = plan.initial_scale * eps if strength == 1 else add_noise(x_0, alpha_bar, eps)

    mask_eps = plan.noise()     # drawn in either case, as diffusers does
    hole = mask[::model.factor, ::model.factor, None]                   # (h, w, 1)
    hole = np.broadcast_to(hole, (*x.shape[:3], 1))                     # (batch, h, w, 1)
    if model.inpaints:
        gray = np.where(mask[..., None], 127.5, init)                   # 127.5 becomes 0
        masked = encode(model, gray, mask_eps)                          # (batch, h, w, 4)
        extra_channels = np.concatenate([hole, masked], axis=-1, dtype=np.float32)
        return plan.sampler(make_denoiser(extra_channels), x, steps, plan.noise)
    path = plan.sampler(make_denoiser(), x, steps, plan.noise)
    return blend_known(path, steps, ~hole, x_0, eps)


def blend_known(path, steps, known, x_0, eps):
    """After each step, reset the known part to x_0, noised to the level reached."""
    # in the end it is x_0 itself, even where the last step's own ᾱ_next is below 1 (§9)
    levels = [alpha_bar for _, alpha_bar, _ in steps[1:]] + [1.0]
    for x, alpha_bar in zip(path, levels):
        np.copyto(x, add_noise(x_0, alpha_bar, eps), where=known)
        yield x


def last_steps(steps, strength):
    """Return the last `strength` of the steps, those that image-to-image takes (8.2)."""
    require(0 < strength <= 1, f"--strength {strength} is not above 0 and up to 1")
    n = int(round(len(steps) * strength, 9))    # 29 of 50 at 0.58: floats give 28.999999999999996
    require(n > 0, f"--strength {strength} of {len(steps)} steps leaves no step")
    return steps[-n:]


def encode(model: Model, picture: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Draw scaled latents from q(z | picture) (4.4).

    picture: (height, width, 3) in 0..255; eps: standard normal (batch, h, w, 4).
    """
    config = model.config.vae
    pixels = picture[None].astype(np.float32) / 127.5 - 1
    pixels = array_like(model.vae["quant_conv"]["bias"], pixels)     # its library and device
    mean, logvar = map(to_numpy, model.vae_encode(pixels, model.vae, config.norm_num_groups))
    return (mean + np.exp(0.5 * logvar) * eps) * config.scaling_factor


def decode(model: Model, x: np.ndarray) -> np.ndarray:
    """Turn scaled latents (batch, h, w, 4) into pictures (batch, height, width, 3) of uint8 (8.1).

    Raises UserError if a pixel is not a number, as after an overflow in float16.
    """
    config = model.config.vae
    require(x.ndim == 4, f"latents have four axes, (batch, h, w, channels), not {x.ndim}")
    z = array_like(model.vae["quant_conv"]["bias"], x / config.scaling_factor)
    pictures = [to_numpy(model.vae_decode(z[i:i + 1], model.vae, config.norm_num_groups))
                for i in range(len(z))]     # one by one: the VAE needs the most memory
    pixels = np.concatenate(pictures)
    require(np.isfinite(pixels).all(), "the picture is not finite: the weights are broken, or "
                                       "float16 overflowed (--dtype float32)")
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


# ═══════════════════════════════════════════════════════════════════════════════════════════════
# The lesson ends here. What follows matches diffusers, reads weights, and is a small command line
# for use without extras/.
# ═══════════════════════════════════════════════════════════════════════════════════════════════


class UserError(ValueError):
    """An error to report to the user in one line; the program's exit status is 2."""


def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def tell(message):
    """Print one line on stderr, with control characters removed."""
    letters = "".join(c if c.isprintable() else " " for c in message)
    print("tiny_sd:", " ".join(letters.split())[:2000], file=sys.stderr)


def shorten(text, length=200):
    """Cut a text to this length, and mark the cut with " ..."."""
    return text if len(text) <= length else text[:length] + " ..."


# ── 9. Matching diffusers ────────────────────────────────────────────────────────── NOTES §9 ──
#
# The same prompt, seed and settings give the same picture here and in diffusers. That takes
# diffusers' timesteps, which depend on the scheduler, and torch's random numbers.

SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
              "EulerAncestralDiscreteScheduler": "euler_a",
              "DPMSolverMultistepScheduler": "dpm++2m"}     # and two more in extras/samplers.py
# These may use Karras' noise levels, and diffusers spaces their timesteps by linspace by default.
KARRAS = ("euler", "euler_a", "dpm++2m")


def defaults(model):
    """Return the model's own sampler, and the steps and the guidance that it was made for."""
    scheduler = model.config.scheduler
    sampler = SCHEDULERS.get(scheduler._class_name, "dpm++2m")
    if scheduler._class_name == "LCMScheduler":
        return sampler, 4, 8.5
    if sampler in ("euler", "euler_a") and scheduler.timestep_spacing == "trailing":    # Turbo
        return sampler, 1, 1.0
    return sampler, 20, scheduler._guidance_scale


def plan_like_diffusers(model, seeds, steps, guidance, sampler, karras, width, height, init, mask):
    """Return generate()'s plan: the steps, noise and scale of x_T that diffusers would take.

    What is None is the model's own. Raises UserError if the arguments do not fit together.
    """
    own_sampler, own_steps, own_guidance = defaults(model)
    n = own_steps if steps is None else steps
    guidance = own_guidance if guidance is None else guidance
    require(math.isfinite(guidance), f"--cfg-scale {guidance} is not a finite number")
    sampler = own_sampler if sampler is None else sampler
    # replace a function in SAMPLERS by its name, which the spacing of timesteps depends on
    sampler = next((name for name, function in SAMPLERS.items() if function is sampler), sampler)
    require(callable(sampler) or sampler in SAMPLERS,
            f"there is no sampler {sampler}: choose one of {', '.join(SAMPLERS)}")
    require(np.ndim(seeds) == 1 and len(seeds) > 0, f"seeds must be a list, not {seeds}")
    require(mask is not None or not model.inpaints, f"{model.name} is a model for inpainting, "
            "which needs a picture and a mask (--init-img, --mask)")
    require(mask is None or init is not None and mask.shape == init.shape[:2],
            "a mask needs a picture of its size to start from (--init-img)")
    if init is not None:
        require(init.ndim == 3 and init.shape[2] == 3,
                f"a picture to start from is (height, width, 3), not {init.shape}")
        height, width = init.shape[:2]

    scheduler = model.config.scheduler
    steps = sampling_steps(sampler, n, scheduler, model.alpha_bars, karras)
    scaled = sampler in ("euler", "euler_a") and timestep_spacing(sampler, scheduler) != "leading"
    return SimpleNamespace(
        sampler=SAMPLERS.get(sampler, sampler), steps=steps, guidance=guidance,
        # distilled models take the scale as an input instead
        guided=guidance > 1 and not model.config.unet.time_cond_proj_dim,
        noise=torch_noise(seeds, latent_shape(model, width, height)),
        initial_scale=(1 - steps[0][1]) ** 0.5 if scaled else 1.0)  # x_T's standard deviation


def latent_shape(model, width, height):
    """Return the latents' (h, w, channels) for a picture of this size in pixels, or the model's."""
    config, factor = model.config, model.factor
    for name, n in ("width", width), ("height", height):
        require(n is None or n % factor == 0 and 2 * factor <= n <= 4096,
                f"--{name} {n} is not a multiple of {factor} from {2 * factor} to 4096")
    h, w = (config.unet.sample_size if n is None else n // factor for n in (height, width))
    return h, w, config.vae.latent_channels


def timestep_spacing(sampler, scheduler):
    """Return how to space the timesteps: the sampler's own way, the config's, or the default."""
    default = "linspace" if sampler in KARRAS else "leading"
    own = getattr(SAMPLERS.get(sampler, sampler), "spacing", None)
    return own or scheduler.timestep_spacing or default


def timesteps(sampler, n, scheduler):
    """Return n timesteps, the noisiest first (9.1)."""
    T, spacing = scheduler.num_train_timesteps, timestep_spacing(sampler, scheduler)
    if custom := getattr(SAMPLERS.get(sampler, sampler), "timesteps", None):
        return custom(n, T)
    if spacing == "trailing":
        return (T - np.arange(n) * T / n).round() - 1
    m = n + (sampler == "dpm++2m")          # DPM++ takes the first n of n + 1 timesteps
    if spacing == "leading":
        t = np.arange(m) * (T // m) + scheduler.steps_offset
    else:
        t = np.linspace(0, T - 1, m)
    return t[::-1][:n]


def sampling_steps(sampler, n, scheduler, alpha_bars, karras=False):
    """Return the n steps (t, ᾱ_t, ᾱ_next) that diffusers takes with this sampler and config."""
    T, sigmas = len(alpha_bars), sigma_of(alpha_bars)
    most = min(T, 1000) - 1
    require(hasattr(n, "__index__") and 1 <= n <= most, f"--steps {n} is not from 1 to {most}")
    t = timesteps(sampler, n, scheduler)
    require(t[0] < T, f"{n} steps are more than this sampler can take")
    require(not karras or sampler in KARRAS, f"--karras does not go with --sampler {sampler}")
    if sampler not in ("euler", "euler_a"):
        t = np.round(t)

    sigma = np.interp(t, np.arange(T), sigmas)
    if karras or scheduler.use_karras_sigmas and sampler in ("euler", "dpm++2m"):
        sigma, t = karras_levels(sampler, sigma, sigmas)
    levels = (1 / (1 + sigma ** 2)).tolist()

    ends_clean = sampler != "plms"
    if sampler in ("ddim", "plms") and scheduler.set_alpha_to_one is not None:
        ends_clean = scheduler.set_alpha_to_one
    last = 1.0 if ends_clean else float(alpha_bars[0])
    return list(zip(t.tolist(), levels, [*levels[1:], last]))


def karras_levels(sampler, sigma, sigmas):
    """Return levels evenly spaced in σ^(1/7), and the times t that have those levels (9.2).

    Karras et al., 2022, eq. 5. sigma: the levels chosen so far; sigmas: all of the model's.
    """
    whole_range = sampler == "dpm++2m"
    low, high = (sigmas[0], sigmas[-1]) if whole_range else (sigma[-1], sigma[0])
    ramp = np.linspace(0, 1, len(sigma))
    sigma = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    t = np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas)))
    return sigma, t.round() if whole_range else t


def add_second_encoder(model, texts, context):
    """Put a second text encoder's context beside the first's; return it and the pooled vectors.

    Podell et al., 2023 (9.8). Pooled vectors, (len(texts), n), are CLIP's own embeddings of the
    texts: the last layer's output at EOS, normalised and projected. None gives zeros.
    """
    second, config = model.second, model.config.text_encoder_2
    heads, activation = config.num_attention_heads, ACTIVATIONS[config.hidden_act]
    ids = np.stack([second.tokenizer.encode(text or "")[0] for text in texts])
    x = text_encoder(ids, heads, activation, **second.text_encoder)     # before the last layer

    h = layer_norm(text_layer(x, heads, activation, **second.last_layer), **second.final_layer_norm)
    ends = (ids == second.tokenizer.vocab[Tokenizer.EOS]).argmax(1)
    pooled = linear(h[np.arange(len(h)), ends], **second.text_projection)
    given = array_like(x, [[text is not None] for text in texts])
    return concat(context, x) * given[..., None], pooled * given


def unet_conditions(model, n, guidance, pooled, shape):
    """Return the U-Net's added conditions, (n, width), one for each context; most models have none.

    With two text encoders they are the pooled vector and six sizes (9.9): height and width of the
    original picture, top and left of the crop, height and width to draw. shape: of the latents.
    """
    if model.config.unet.time_cond_proj_dim:
        row = guidance_condition(model.config.unet.time_cond_proj_dim, guidance)
        return np.tile(row, (n, 1))
    if pooled is None:
        return np.zeros((n, 0), np.float32)
    height, width = (model.factor * length for length in shape[1:3])
    sizes = timestep_embedding([height, width, 0, 0, height, width],
                               model.config.unet.addition_time_embed_dim)       # (6, 256)
    return concat(pooled, array_like(pooled, np.tile(sizes.reshape(1, -1), (n, 1))))


def guidance_condition(dim, guidance):
    """Return the embedding of the guidance scale that a distilled model gets, (1, dim) (9.5).

    Meng et al., 2023: a timestep embedding, sines first, whose last frequency is 1/10000.
    """
    angles = 1000 * (guidance - 1) * 10000 ** -np.linspace(0, 1, dim // 2)
    return np.concatenate([np.sin(angles), np.cos(angles)])[None]


class Noise:
    """torch.randn on a CPU generator with this seed: MT19937, then Box and Muller (9.3), (9.4)."""

    def __init__(self, seed):
        self.words = np.random.RandomState(int(seed) & 0xffffffff)

    def uniform(self, n):
        """Return n numbers in [0, 1), from the low 24 bits of each word."""
        words = np.frombuffer(self.words.bytes(4 * n), "<u4")
        return (words & 0xffffff).astype(np.float32) * np.float32(2 ** -24)

    def __call__(self, height, width, channels):
        """Return standard normal numbers (height, width, channels), drawn channels first."""
        n = height * width * channels                   # at least 16
        z = box_muller(self.uniform(n)[:n // 16 * 16])
        if n % 16:                                      # torch draws the last 16 again
            z = np.concatenate([z[:n - 16], box_muller(self.uniform(16))])
        return z.reshape(channels, height, width).transpose(1, 2, 0)


def box_muller(u):
    """Turn uniform numbers (16 n,) into normal ones: of each 16, 8 radii and 8 angles (9.4)."""
    u1, u2 = np.split(u.reshape(-1, 16), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(1 - u1)), np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def torch_noise(seeds, shape):
    """Return noise(), which draws (len(seeds), *shape) numbers, each picture's from its seed."""
    streams = [Noise(seed) for seed in seeds]
    return lambda: np.stack([stream(*shape) for stream in streams])


# ── 10. Reading weights ─────────────────────────────────────────────────────────── NOTES §10 ──

CONFIG_DEFAULTS = {     # what a config may leave out; extras/checks.py knows what each may say
    "text_encoder": {},
    "text_encoder_2": {},
    "vae": {"norm_num_groups": 32, "scaling_factor": 0.18215},
    "unet": {"norm_num_groups": 32, "attention_head_dim": 8, "num_attention_heads": None,
             "time_cond_proj_dim": None, "mid_block_type": "UNetMidBlock2DCrossAttn",
             "addition_time_embed_dim": None, "transformer_layers_per_block": 1},
    "scheduler": {"_class_name": "", "num_train_timesteps": 1000, "beta_start": 0.00085,
                  "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                  "prediction_type": "epsilon", "timestep_spacing": None, "set_alpha_to_one": None,
                  "use_karras_sigmas": None, "_guidance_scale": 7.5},   # the last is tiny_sd's own
}


def read_config(part, settings):
    """Return the config.json of a part as a record, with the defaults filled in."""
    config = SimpleNamespace(**CONFIG_DEFAULTS[part] | settings)
    if part == "scheduler":
        known = {"beta_schedule": ["scaled_linear"],
                 "prediction_type": ["epsilon", "v_prediction", "sample"]}
        for name, values in known.items():
            value = getattr(config, name)
            require(value in values, f"the scheduler's {name} cannot be {shorten(repr(value))}")
    if part == "unet":      # one number of heads, or one for each level, under either name
        heads = config.num_attention_heads or config.attention_head_dim
        levels = len(config.block_out_channels)
        config.n_head = heads if isinstance(heads, list) else [heads] * levels
    return config


def flatten(tree, prefix=""):
    """Turn {"a": [{"b": leaf}]} into {"a.0.b": leaf}, the names of a checkpoint."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat):
    """Undo flatten; numbered keys become lists."""
    groups = {}
    for name, leaf in flat.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = leaf
    tree = {key: group[""] if "" in group else nest(group) for key, group in groups.items()}
    if tree and all(map(str.isdecimal, tree)):
        return [tree.get(str(i)) for i in range(1 + max(map(int, tree)))]
    return tree


def read_safetensors(path):
    """Return {name: array} of a .safetensors file, mapped into memory; bfloat16 stays uint16."""
    from safetensors import SafetensorError, safe_open
    try:
        open(path, "rb").close()    # says why it cannot be read
        safe_open(path, "np")       # checks the header
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)

    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}
    arrays = {}
    for name, entry in header.items():      # in the file's order, the same in every process
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        require(dtype in types, f"{path}: {name} is {dtype}, not one of {', '.join(types)}")
        array = data[start + begin:start + end].view(types[dtype])
        arrays[name] = array.reshape(entry["shape"])
    return arrays


def widen(array):
    """Turn bfloat16, kept as uint16, into float32: it is the upper 16 bits of one (10.1)."""
    if array.dtype != np.uint16:
        return array
    return (array.astype("<u4") << 16).view("<f4")


WEIGHT_FILES = {"text_encoder": "model", "vae": "diffusion_pytorch_model",
                "unet": "diffusion_pytorch_model"}


def read_folder(folder):
    """Return what a folder holds: {part: its config.json}, {part: {name: array}}, tokenizers."""
    def read(name, parse):
        try:
            return parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{folder} is not a whole Stable Diffusion folder: "
                            f"{name}: {shorten(str(error))}") from None

    def read_json(name):
        return read(name, lambda text: {**json.loads(text)})     # TypeError unless an object

    settings, arrays = {"scheduler": read_json("scheduler/scheduler_config.json")}, {}
    second = {"text_encoder_2": "model"} if (folder / "text_encoder_2").exists() else {}
    for part, stem in {**WEIGHT_FILES, **second}.items():
        settings[part] = read_json(f"{part}/config.json")
        names = [f"{part}/{stem}{end}.safetensors" for end in ("", ".fp16")]
        found = [name for name in names if (folder / name).exists()]
        require(found, f"{folder} is not a whole Stable Diffusion folder: {names[0]} is missing")
        arrays[part] = {current_name(name): array
                        for name, array in read_safetensors(folder / found[0]).items()}
        arrays[part].pop("embeddings.position_ids", None)

    if (folder / "tokenizer/merges.txt").exists():
        vocab = read_json("tokenizer/vocab.json")
        merges = read("tokenizer/merges.txt", str.splitlines)
    else:
        model = read("tokenizer/tokenizer.json", lambda text: {**json.loads(text)["model"]})
        vocab, merges = model.get("vocab"), model.get("merges")
    folders = ["tokenizer", "tokenizer_2"] if second else ["tokenizer"]
    tokenizers = [read_tokenizer(read_json(f"{name}/tokenizer_config.json"), vocab, merges)
                  for name in folders]      # the two differ in padding alone
    return settings, arrays, tokenizers


def read_tokenizer(settings, vocab, merges):
    """Return the tokenizer of a tokenizer_config.json, a vocabulary and a list of merges."""
    require(isinstance(vocab, dict) and isinstance(merges, list), "the tokenizer has no vocabulary")
    pairs = [tuple(merge.split() if isinstance(merge, str) else map(str, merge))
             for merge in merges if isinstance(merge, (str, list))]
    pairs = [pair for pair in pairs if len(pair) == 2 and pair[0] != "#version:"]
    pad = settings.get("pad_token") or Tokenizer.EOS
    pad = pad.get("content") if isinstance(pad, dict) else pad
    for special in Tokenizer.BOS, Tokenizer.EOS, pad:
        require(isinstance(special, str) and special in vocab,
                f"the tokenizer's vocabulary has no {shorten(repr(special))}")
    return Tokenizer(pairs, vocab, settings.get("model_max_length", 77), pad)


def current_name(name):
    """Map an older diffusers name of a weight to the current one."""
    for old, new in [("text_model.", ""), (".query.", ".to_q."), (".key.", ".to_k."),
                     (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")]:
        name = name.replace(old, new)
    return name


def to_backend(array, backend, device="cpu", dtype="float32"):
    """Move a file's array to the backend, device and dtype; convolutions become channels last."""
    array = widen(array)
    array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    if backend == "torch":
        return to_torch(array, device, dtype)
    if array.ndim == 4 and array.shape[1] > 1 and array.dtype != np.float64:
        return array            # a 3x3 convolution stays as in the file: mapped, perhaps float16
    return np.asfortranarray(array, np.float32)     # so that x @ w.T reads w.T row by row


def to_torch(array, device, dtype):
    """Copy an array to a torch device; UserError if torch finds no such device here."""
    import torch
    library = getattr(torch, device.partition(":")[0], None)        # torch.cuda for "cuda:1"
    found = device == "cpu" or hasattr(library, "is_available") and library.is_available()
    require(found, f"torch finds no {device} device here")
    return torch.from_numpy(np.array(array, order="C")).to(device, getattr(torch, dtype))


def assemble(name, settings, arrays, tokenizers, backend=None, device="cpu", dtype="float32",
             to_backend=to_backend):
    """Return the Model of what read_folder returns; see load."""
    plain = (device, dtype) == ("cpu", "float32")
    backend = backend or ("numpy" if plain else "torch")
    require(backend in ("numpy", "torch"), f"there is no backend {backend}: choose numpy or torch")
    require(plain or backend == "torch", "NumPy computes in float32 on the CPU: "
            f"--device {device} --dtype {dtype} need --backend torch")
    config = {part: read_config(part, settings[part]) for part in settings}
    for tokenizer in tokenizers:
        limit = config["text_encoder"].max_position_embeddings
        tokenizer.length = min(tokenizer.length, limit)     # some files say 1e30

    networks = {}
    for part in arrays:
        part_dtype = "float32" if part == "vae" else dtype      # VAEs overflow in float16
        networks[part] = nest({key: to_backend(array, backend, device, part_dtype)
                               for key, array in arrays[part].items()})
    if "text_encoder_2" in networks:
        networks["second"] = second_encoder(networks, tokenizers[1])
    return Model(name, SimpleNamespace(**config), tokenizers[0], **networks)


def second_encoder(networks, tokenizer):
    """Split the second text encoder's last layer from the rest; drop the first encoder's.

    The context of a model with two is what goes into their last layers (9.8).
    """
    first, weights = networks["text_encoder"], networks.pop("text_encoder_2")
    del first["final_layer_norm"], first["encoder"]["layers"][-1]
    tail = {name: weights.pop(name) for name in ("final_layer_norm", "text_projection")}
    return SimpleNamespace(tokenizer=tokenizer, last_layer=weights["encoder"]["layers"].pop(),
                           text_encoder=weights, **tail)


def load(path: str | Path, backend=None, device="cpu", dtype="float32") -> Model:
    """Return the Model in a diffusers folder, at this path or of this name in weights/.

    backend: "numpy", which computes in float32, or "torch", on any device, in float32, float16 or
    bfloat16 (the VAE in float32); if None, torch only where another device or dtype asks for it.
    extras.formats.load also takes single files, names on the hub and LoRAs, and checks that
    everything fits. Raises UserError if there is no such folder or it is not whole.
    """
    folders = [Path(path), HERE / "weights" / path]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    require(folder, f"there is no folder {' nor '.join(map(str, dict.fromkeys(folders)))}: name "
                    "one that diffusers wrote (extras.formats.load takes more)")
    parts = read_folder(folder)
    try:
        return assemble(folder.resolve().name, *parts, backend, device, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its configs do not describe a Stable Diffusion: "
                        f"{error!r}") from None


# ── 11. The small program ────────────────────────────────────────────────────────────────────────

OPTIONS = [     # (heading, flags, type or choices, default, help); extras/cli.py has more
    ("what to draw", "words", str, None, "the prompt"),
    ("what to draw", "-p --prompt", str, None, "the same, as an option"),
    ("what to draw", "-n --negative-prompt", str, None, "what to avoid"),
    ("what to draw", "-s --seed", int, 0, "(%(default)s)"),
    ("model", "-m --model", str, None, "a folder, or a name in weights/ (emoji)"),
    ("sampling", "--steps", int, None, "(20, fewer for distilled models)"),
    ("sampling", "--cfg-scale --guidance-scale", float, None,
     "guidance: how much to stress the prompt (7.5, or the model's own)"),
    ("sampling", "--sampler", SAMPLERS, None, "(the model's own)"),
    ("size", "-W --width", int, None, "in pixels (the model's own size)"),
    ("size", "-H --height", int, None, None),
    ("from a picture", "-i --init-img", str, None, "a picture to start from"),
    ("from a picture", "--strength", float, None, "how much to change it, 0 to 1 (0.75)"),
    ("output", "-o --output", Path, Path("out.png"), "the file to write (%(default)s)"),
    ("hardware", "--backend", ("numpy", "torch"), None, "numpy; torch on a GPU, or not in float32"),
    ("hardware", "--device", ("cpu", "cuda", "mps"), "cpu", "(%(default)s)"),
    ("hardware", "--dtype", ("float32", "float16", "bfloat16"), "float32", "(%(default)s)"),
]


class Parser(argparse.ArgumentParser):
    """argparse, with complaints that are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def option_parser(options, **settings):
    """Return a parser of a table like OPTIONS."""
    parser = Parser(description="Draw a picture from a prompt with Stable Diffusion.",
                    allow_abbrev=False, **settings)
    parser.sections = {heading: parser.add_argument_group(heading)
                       for heading in dict.fromkeys(heading for heading, *_ in options)}
    for heading, flags, kind, default, text in options:
        how = {"type": kind} if callable(kind) else {"choices": kind}
        if flags == "words":
            how |= {"nargs": "?", "metavar": "PROMPT"}
        parser.sections[heading].add_argument(*flags.split(), default=default, help=text, **how)
    return parser


def draw(args):
    """Draw one picture and save it, unless the file is there already."""
    from PIL import Image, ImageOps
    from tqdm import tqdm
    prompt = args.words if args.prompt is None else args.prompt
    require(prompt is not None, "give one prompt (--help lists the options)")
    require(args.output.suffix == ".png", f"{args.output} does not end in .png")
    require(not args.output.exists(), f"{args.output} is there already")
    require(args.output.parent.is_dir(), f"there is no folder {args.output.parent} to write to")

    folder, init = args.model or HERE / "weights" / "emoji", None
    model = load(folder, args.backend, args.device, args.dtype)
    if args.init_img:
        h, w, _ = latent_shape(model, args.width, args.height)
        picture = ImageOps.exif_transpose(Image.open(args.init_img)).convert("RGB")
        size = w * model.factor, h * model.factor
        init = np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    walk = generate(model, prompt, args.negative_prompt, [args.seed], args.steps, args.cfg_scale,
                    args.sampler, width=args.width, height=args.height, init=init,
                    strength=0.75 if args.strength is None else args.strength)
    *_, x = tqdm(walk, unit="step")

    png = io.BytesIO()
    Image.fromarray(decode(model, x)[0]).save(png, "PNG")
    with open(args.output, "xb") as file:
        file.write(png.getvalue())
    print(args.output)


def main(argv=None):
    """Run the small program; return its exit status."""
    try:
        draw(option_parser(OPTIONS).parse_args(argv))
    except (UserError, OSError, ImportError) as error:
        tell(str(error))
        return 2
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
