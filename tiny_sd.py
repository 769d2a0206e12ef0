"""Stable Diffusion in one file of NumPy: every layer, how it draws, and how it learns.

    "red apple" --> tokenizer --> text encoder --> context (1, 77, 768) --+
                                                                          |
                                                                          v
    random numbers --> x_T (1, 64, 64, 4) --> sampler --- x_t, t ---> U-Net
                                                 |    <- prediction --
                                                x_0 --> VAE decoder --> picture (1, 512, 512, 3)

    python tiny_sd.py "red apple on a blue background"           the small model in weights/emoji
    python tiny_sd.py "a lighthouse in a storm" -m FOLDER        Stable Diffusion itself

The same in Python:

    >>> model = load("weights/emoji")
    >>> context, _ = embed_prompts(model, ["", "red apple on a blue background"])
    >>> steps = evenly_spaced_steps(20, model.alpha_bars)
    >>> x_T = np.random.default_rng(0).standard_normal((1, 16, 16, 4), np.float32)
    >>> *_, x_0 = ddim(denoiser(model, context, guidance=3.0), x_T, steps)
    >>> picture = decode(model, x_0)[0]

Three conventions carry the whole file.

1. A layer is a function of arrays.
2. Its weights are a nested mapping with the checkpoint's names as keys, passed as keyword
   arguments: `resnet(x, temb, groups, delta, **weights)`. Python checks the names in such a call:
   an unknown weight, or a missing one, raises TypeError.

       >>> model.unet["down_blocks"][0]["resnets"][0]["conv1"]["weight"].shape
       (64, 3, 3, 64)

3. Images are channels last, (batch, height, width, channels), so that a linear layer, a 1x1
   convolution and the projections of attention are one operation, `x @ w.T`.

Shapes beside the code are those of Stable Diffusion 1.5; the bundled model's are smaller:

                             Stable Diffusion 1.5       bundled
    picture                  512 x 512                  128 x 128
    latents                  64 x 64 x 4                16 x 16 x 4
    channels of the U-Net    320, 640, 1280, 1280       64, 128, 192
    tokens, and their width  77, 768                    32, 192
    the U-Net predicts       the noise                  the velocity (6.14)

(6.2) is an equation in NOTES.md, whose sections follow this file's. Training (§8) needs torch, for
gradients. extras/ has everything else: all options, speed, other file formats, and the timesteps
and random numbers of other programs. With extras/ beside this file the command uses it; otherwise
the small program at the end runs, and a seed gives a different picture.
"""

import argparse
import functools
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
if __name__ == "__main__" and (HERE / "extras/start.py").exists():
    sys.path.insert(0, str(HERE))
    from extras.start import program
    program()       # the command line: prepares the process, loads NumPy, draws, and ends here

import numpy as np  # noqa: E402

__version__ = "0.3.0"


class UserError(ValueError):
    """An error to report to the user in one line; the program's exit status is 2."""


def require(condition, message):
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def shorten(text, length=200):
    """Cut a text to this length, and mark the cut with " ..."."""
    return text if len(text) <= length else text[:length] + " ..."


def tell(message):
    """Print one line on stderr, with control characters removed."""
    letters = "".join(c if c.isprintable() else " " for c in message)
    print("tiny_sd:", " ".join(letters.split())[:2000], file=sys.stderr)


# ── 1. Arrays and primitives ─────────────────────────────────────────────────────── NOTES §1 ──
#
# Each primitive is defined by its formula in NumPy. Given a torch tensor it calls torch's own
# version (TORCH, below), so the networks are written once and run on both libraries.

FAST = {}       # {name: a faster form for NumPy arrays}; extras/fast.py fills it


def primitive(formula):
    """Dispatch on the array's type: NumPy runs this formula or FAST's form, torch TORCH's form."""
    name = formula.__name__

    @functools.wraps(formula)
    def operation(x, *args, **kwargs):
        if isinstance(x, (np.ndarray, np.generic)):
            return FAST.get(name, formula)(x, *args, **kwargs)
        return TORCH[name](x, *args, **kwargs)

    operation.formula = formula
    return operation


@primitive
def linear(x, weight, bias=None):
    """Return x Wᵀ + b over the last axis (1.1).

    weight: (out, in), or (out, 1, 1, in): a 1x1 convolution is the same operation.
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
def group_norm(x, groups, delta, weight, bias):
    """Normalise each group of channels of each image, then scale and shift (1.5).

    Wu and He, 2018. x: (batch, height, width, channels). delta keeps the divisor above 0.
    """
    B, H, W, C = x.shape
    g = x.reshape(B, H * W, groups, C // groups)        # mean and variance over axes 1 and 3
    g = g - g.mean(axis=(1, 3), keepdims=True)
    g = g / np.sqrt((g * g).mean(axis=(1, 3), keepdims=True) + delta)
    return g.reshape(B, H, W, C) * weight + bias


@primitive
def layer_norm(x, weight, bias, delta=1e-5):
    """Normalise each row, the last axis, then scale and shift (1.5). Ba et al., 2016."""
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + delta)
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
    if causal:      # a token sees only itself and earlier tokens
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
def array_like(x, values):
    """Convert values to an array of x's library, dtype and device."""
    return np.asarray(values, x.dtype)


@primitive
def to_numpy(x):
    """Convert x to a float32 NumPy array."""
    return np.asarray(x, np.float32)


# ── 2. Tokenizer ─────────────────────────────────────────────────────────────────── NOTES §2 ──


def byte_symbols():
    """Return {byte: character} in the vocabulary's order. Radford et al., 2019.

    Bytes without a printable character, such as the space, get characters from 256 on.
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
    # Unicode's White_Space; Python's \s also matches \x1c to \x1f
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
        the pattern lists the ones in this text.
        """
        text = unicodedata.normalize("NFC", text)
        text = "".join(c.lower() for c in text)     # text.lower() would turn a final Σ into ς
        others = sorted(c for c in set(text) if not c.isascii())    # English: none, one pattern
        letters = "a-z" + "".join(filter(str.isalpha, others))
        digits = "0-9" + "".join(c for c in others if unicodedata.category(c)[0] == "N")
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{digits}]"
                          rf"|[^{self.SPACE}{letters}{digits}]+", text)

    def merge(self, word):
        """Return the word's symbols, merging the pair of lowest rank until no pair has a rank."""
        *head, last = (self.bytes[b] for b in word.encode(errors="replace"))
        symbols = [*head, last + "</w>"]        # "</w>" marks the end of a word

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

        Special tokens in the text, including the padding token, become their ids, as in CLIP.
        """
        symbols, special = [], (self.BOS, self.EOS, self.symbol[self.pad])
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if piece in special:
                symbols.append(piece)
            else:
                symbols += [symbol for word in self.words(piece) for symbol in self.merge(word)]
        unknown = self.vocab[self.EOS]      # the id of any symbol not in the vocabulary
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
    return linear(h, **to_out[0])                               # to_out[1], dropout, has no weights


def text_layer(x, n_head, activation, layer_norm1, self_attn, layer_norm2, mlp):
    """A Transformer layer: causal self-attention, then an MLP, each added to its input (3.2)."""
    h = layer_norm(x, **layer_norm1)                            # (batch, 77, 768)
    x = x + attention(h, h, n_head, self_attn["q_proj"], self_attn["k_proj"], self_attn["v_proj"],
                      [self_attn["out_proj"]], causal=True)

    h = layer_norm(x, **layer_norm2)
    h = activation(linear(h, **mlp["fc1"]))                     # (batch, 77, 3072)
    return x + linear(h, **mlp["fc2"])


def text_encoder(ids, n_head, activation, embeddings, layers):
    """Return the state before the first layer and after each, a list of (batch, tokens, width).

    CLIP's text encoder: Radford et al., 2021. ids: token ids (batch, tokens).
    """
    x = embeddings["token_embedding"]["weight"][ids]            # (batch, 77) -> (batch, 77, 768)
    x = x + embeddings["position_embedding"]["weight"][:ids.shape[1]]

    states = [x]
    for layer in layers:
        x = text_layer(x, n_head, activation, **layer)
        states.append(x)
    return states


# ── 4. VAE ───────────────────────────────────────────────────────────────────────── NOTES §4 ──


def resnet(x, temb, groups, delta, norm1, conv1, norm2, conv2,
           time_emb_proj=None, conv_shortcut=None):
    """A ResNet block: x plus two rounds of GroupNorm, SiLU, 3x3 convolution (4.1).

    He et al., 2015. x: (batch, height, width, in). Returns (batch, height, width, out). temb: the
    time embedding (batch, 1280), which tells the U-Net the noise level; None in the VAE.
    """
    h = conv2d(silu(group_norm(x, groups, delta, **norm1)), **conv1)      # in -> out channels
    if time_emb_proj:
        h = h + linear(silu(temb), **time_emb_proj)[:, None, None]      # (batch, 1, 1, out)
    h = conv2d(silu(group_norm(h, groups, delta, **norm2)), **conv2)
    return h + (linear(x, **conv_shortcut) if conv_shortcut else x)


def vae_attention(x, groups, **weights):
    """Self-attention among all pixels of an image, with one head.

    weights: the checkpoint's group_norm, to_q, to_k, to_v and to_out; as one mapping, because a
    parameter named group_norm would shadow the function.
    """
    B, H, W, C = x.shape
    h = group_norm(x, groups, 1e-6, **weights.pop("group_norm"))
    h = h.reshape(B, H * W, C)                                  # the pixels become a sequence
    return x + attention(h, h, 1, **weights).reshape(B, H, W, C)


def vae_block(x, groups, resnets, attentions=(), downsamplers=(), upsamplers=()):
    """The ResNet blocks of one level (the middle has attention between them), then resampling."""
    # zip_longest: most levels have no attentions, and the middle has one fewer than ResNet blocks
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
    """Return the mean and log variance of q(z | picture), each (batch, h, w, 4) (4.3).

    Kingma and Welling, 2014. picture: (batch, 8 h, 8 w, 3) in [-1, 1].
    """
    picture = array_like(vae["quant_conv"]["bias"], picture)
    h = vae_encoder(picture, groups, **vae["encoder"])
    moments = linear(h, **vae["quant_conv"])                    # (batch, h, w, 8)
    n = moments.shape[-1] // 2
    return moments[..., :n], moments[..., n:].clip(-30, 20)     # keeps e^logvar finite


def vae_decode(z, vae, groups):
    """Turn unscaled latents z (batch, h, w, 4) into pictures (batch, 8 h, 8 w, 3) in [-1, 1]."""
    z = array_like(vae["post_quant_conv"]["bias"], z)
    return vae_decoder(linear(z, **vae["post_quant_conv"]), groups, **vae["decoder"])


# ── 5. U-Net ─────────────────────────────────────────────────────────────────────── NOTES §5 ──


def timestep_embedding(t, dim):
    """Return dim/2 cosines, then dim/2 sines, of each time in t (batch,) (5.1).

    The frequencies fall from 1 to about 1/10000. Vaswani et al., 2017.
    """
    frequencies = np.exp(-math.log(10000) * np.arange(dim // 2) / (dim // 2))
    angles = np.asarray(t)[:, None] * frequencies               # (batch, dim/2)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def time_mlp(x, t, linear_1, linear_2):
    """Return the time embedding that every ResNet block gets, (batch, 1280) (5.2).

    t: (batch,), times in 0..999. x is used only for its library, dtype and device.
    """
    h = array_like(x, timestep_embedding(t, linear_1["weight"].shape[1]))       # (batch, 320)
    return linear(silu(linear(h, **linear_1)), **linear_2)


def feed_forward(x, net):
    """GEGLU: widen, let one half gate the other, and narrow again (5.3). Shazeer, 2020."""
    wide, _, narrow = net                           # net[1], dropout, has no weights: it is None
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

    The delta of this GroupNorm is 1e-6, as in the VAE; the U-Net's other GroupNorms use 1e-5.
    """
    B, H, W, C = x.shape
    h = linear(group_norm(x, groups, 1e-6, **norm), **proj_in).reshape(B, H * W, C)
    for block in transformer_blocks:
        h = transformer_block(h, context, n_head, **block)
    return x + linear(h.reshape(B, H, W, C), **proj_out)


def down_block(x, skips, temb, context, n_head, groups, resnets, attentions=(), downsamplers=()):
    """One level on the way down, or the middle: return its output, and push skips for the way up.

    x: (batch, height, width, channels). Each step of the loop, and the downsampler, pushes a skip.
    """
    for resnet_weights, attention_weights in zip_longest(resnets, attentions):
        x = resnet(x, temb, groups, 1e-5, **resnet_weights)
        if attention_weights:
            x = transformer(x, context, n_head, groups, **attention_weights)
        skips.append(x)
    for layer in downsamplers:
        x = conv2d(x, **layer["conv"], stride=2)                # half the size
        skips.append(x)
    return x


def up_block(x, skips, temb, context, n_head, groups, resnets, attentions=(), upsamplers=()):
    """One level on the way up: each ResNet block also gets the latest unused skip (5.5)."""
    for resnet_weights, attention_weights in zip_longest(resnets, attentions):
        x = resnet(concat(x, skips.pop()), temb, groups, 1e-5, **resnet_weights)
        if attention_weights:
            x = transformer(x, context, n_head, groups, **attention_weights)
    for layer in upsamplers:
        _, height, width, _ = skips[-1].shape       # twice the size, or one less: 5 -> 3 -> 5
        x = conv2d(upsample(x, height, width), **layer["conv"])
    return x


def unet(x, temb, context, n_head, groups, conv_in, down_blocks, up_blocks, conv_norm_out, conv_out,
         mid_block=None, time_embedding=None, add_embedding=None):
    """Predict the noise in x_t (or x_0, or v: see split_prediction).

    Ronneberger et al., 2015; Rombach et al., 2022. x: (batch, h, w, 4); temb: the time embedding
    (batch, 1280), from embed_time; context: (batch, tokens, width); n_head: attention heads of each
    level, from the largest image down; groups: for every GroupNorm. time_embedding and
    add_embedding are unused here: embed_time has applied them. Returns (batch, h, w, 4).
    Pruned models have no middle. Each level of Stable Diffusion 1.5, as (height, width, channels)
    after its ResNet blocks, and after resampling:

        level    on the way down                        on the way up
          0      (64, 64,  320) -> (32, 32,  320)       (64, 64,  320)
          1      (32, 32,  640) -> (16, 16,  640)       (32, 32,  640) -> (64, 64,  640)
          2      (16, 16, 1280) -> ( 8,  8, 1280)       (16, 16, 1280) -> (32, 32, 1280)
          3      ( 8,  8, 1280)                         ( 8,  8, 1280) -> (16, 16, 1280)
    """
    x = conv2d(x, **conv_in)                                            # (batch, 64, 64, 320)

    skips = [x]     # a stack, 12 in the end: 1 from conv_in, then 3 + 3 + 3 + 2
    for heads, block in zip(n_head, down_blocks):
        x = down_block(x, skips, temb, context, heads, groups, **block)

    if mid_block:
        x = down_block(x, [], temb, context, n_head[-1], groups, **mid_block)

    for heads, block in zip(reversed(n_head), up_blocks):
        x = up_block(x, skips, temb, context, heads, groups, **block)

    x = silu(group_norm(x, groups, 1e-5, **conv_norm_out))              # (batch, 64, 64, 320)
    return conv2d(x, **conv_out)                                        # (batch, 64, 64, 4)


# ── 6. Diffusion ─────────────────────────────────────────────────────────────────── NOTES §6 ──


def scaled_linear_schedule(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012):
    """Return ᾱ_t, the fraction of x_t's variance that is signal, for t = 0 .. T - 1 (6.4).

    β_t is the share of noise that step t adds; its root rises linearly.
    """
    beta = np.linspace(beta_start ** 0.5, beta_end ** 0.5, num_train_timesteps) ** 2
    return np.cumprod(1 - beta)


def add_noise(x_0, alpha_bar, eps):
    """Noise a picture to a level: x_t = √ᾱ x_0 + √(1 - ᾱ) ε (6.2). Ho et al., 2020.

    alpha_bar: a number, or an array that broadcasts against x_0, one level for each picture. With
    ᾱ = 1 - β it is one small step towards noise, from x_{t-1} to x_t (6.1).
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
# the yielded array in place, and the next step starts from it. More of them: extras/samplers.py.


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


def dpm_pp_2m(denoise, x, steps, noise=None):
    """DPM-Solver++ (2M): a step in λ = -log σ that extrapolates x̂_0 from the last two (6.28).

    Lu et al., 2022, algorithm 2. The linear part of the ODE is solved exactly (6.26). The first
    step, which has no history, and the last, to σ = 0, are of first order.
    """
    previous = None
    for t, alpha_bar, alpha_bar_next in steps:
        x_0, _ = denoise(x, t, alpha_bar)
        sigma, sigma_next = sigma_of(alpha_bar), sigma_of(alpha_bar_next)

        target = x_0        # x̂_0, extrapolated if there is a history
        if previous and sigma_next > 0:
            previous_x_0, previous_sigma = previous
            r = math.log(previous_sigma / sigma) / math.log(sigma / sigma_next)
            target = x_0 + (x_0 - previous_x_0) / (2 * r)
        previous = x_0, sigma

        shrink = ((1 - alpha_bar_next) / (1 - alpha_bar)) ** 0.5
        x = shrink * x + alpha_bar_next ** 0.5 * (1 - sigma_next / sigma) * target
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++2m": dpm_pp_2m}       # extras/samplers.py adds to it


# ── 7. From prompt to picture ────────────────────────────────────────────────────── NOTES §7 ──


class Encoder(NamedTuple):
    """A text encoder, and the tokenizer that it was trained with."""
    tokenizer: Tokenizer
    config: SimpleNamespace
    weights: dict


def embed_time(model, x, t, pooled=None, guidance=1.0):
    """Return the U-Net's time embedding (batch, 1280) of the times t (batch,).

    Loaders set Model.embed_time to another function if it depends on more: in SDXL on the
    pooled text and the picture's size (9.9), in some distilled models on the guidance.
    """
    return time_mlp(x, t, **model.unet["time_embedding"])


@dataclass(repr=False)      # a repr with the weights would fill the screen
class Model:
    """The nested weights of the three networks, with their configs."""
    name: str
    config: SimpleNamespace             # of vae, unet and scheduler
    encoders: list[Encoder]             # one, or two in SDXL
    vae: dict
    unet: dict
    alpha_bars: np.ndarray              # ᾱ_t of t = 0 .. 999, the levels that it was trained on
    guidance: float = 7.5               # its default guidance scale
    embed_time: Callable = embed_time
    vae_encode: Callable = vae_encode   # another kind of VAE brings its own two functions,
    vae_decode: Callable = vae_decode   # as in extras/tiny_vae.py
    digest: str = ""                    # hash of the file it came from, which pictures record
    files: dict = field(default_factory=dict)       # files it still reads: see extras/formats.py

    @property
    def factor(self):
        """Pixels per latent along each axis: 8 in Stable Diffusion."""
        return 2 ** (len(self.config.vae.block_out_channels) - 1)

    @property
    def inpaints(self):
        """Does the U-Net also take a mask and the masked picture?"""
        return self.config.unet.in_channels > self.config.vae.latent_channels


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def embed_prompts(model: Model, texts: list[str | None], skip: int | None = None):
    """Return the context (len(texts), tokens, width) of some texts, and their pooled vectors.

    skip: how many of the last layers to leave out (by default 0, or 1 with two encoders). The
    pooled vectors (9.8) come from the second encoder, if any; else None. A text of None means no
    prompt: zeros with two encoders, the empty text with one. Says on stderr what did not fit.
    """
    two, contexts = len(model.encoders) == 2, []
    for tokenizer, config, weights in model.encoders:
        rows, cuts = zip(*(tokenizer.encode(text or "") for text in texts))
        ids, norm = np.stack(rows), weights["final_layer_norm"]
        states = text_encoder(ids, config.num_attention_heads, ACTIVATIONS[config.hidden_act],
                              weights["embeddings"], weights["encoder"]["layers"])
        x = states[-1 - (two if skip is None else skip)]
        contexts.append(x if two else layer_norm(x, **norm))    # SDXL takes it without the norm

    for text, cut in zip(texts, cuts):
        if cut:
            tell(f"the prompt {shorten(repr(text), 30)} has more than {len(ids[0]) - 2} tokens; "
                 f"the model does not see: {shorten(cut)}")
    if not two:
        return contexts[0], None

    ends = (ids == tokenizer.vocab[Tokenizer.EOS]).argmax(1)    # from the second encoder
    last = layer_norm(states[-1], **norm)[np.arange(len(ids)), ends]
    pooled = linear(last, **weights["text_projection"])
    given = array_like(x, [[text is not None] for text in texts])
    return concat(*contexts) * given[..., None], pooled * given


def predict(model: Model, x, t, context, pooled=None, guidance=1.0):
    """Return the U-Net's output for x, all at time t: a NumPy array (batch, h, w, 4).

    x: (batch, h, w, 4), or more channels for an inpainting model; context: (batch, tokens, width);
    pooled: (batch, n), if any; guidance: only for distilled models, which take it as an input.
    """
    config, x = model.config.unet, array_like(context, x)
    temb = model.embed_time(model, x, np.full(len(x), t), pooled, guidance)
    return to_numpy(unet(x, temb, context, config.n_head, config.norm_num_groups, **model.unet))


def denoiser(model: Model, context, guidance=1.0, pooled=None, extra_channels=None) -> Callable:
    """Return denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), which calls the U-Net.

    context: (1, tokens, width) of the prompt, or for guidance (2, tokens, width) of the negative
    prompt and the prompt; pooled: their pooled vectors, if any. extra_channels: (batch, h, w, n)
    that an inpainting model sees beside x_t. Samplers work in NumPy: x_t, x̂_0 and ε̂ are NumPy
    arrays whatever the model's library.
    """
    def ask(x, t, i):       # with context i, for every picture
        rows = [i] * len(x)
        pooled_rows = None if pooled is None else pooled[rows]
        return predict(model, x, t, context[rows], pooled_rows, guidance)

    def denoise(x_t, t, alpha_bar):
        x = x_t if extra_channels is None else concat(x_t, extra_channels)
        output = ask(x, t, -1)                          # with the prompt
        if len(context) == 2:
            uncond = ask(x, t, 0)                       # with the negative prompt
            output = guide(uncond, output, guidance)
        return split_prediction(model.config.scheduler.prediction_type, output, x_t, alpha_bar)

    return denoise


def encode(model: Model, picture: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """Draw scaled latents from q(z | picture) (4.4).

    picture: (height, width, 3) in 0..255; eps: standard normal (batch, h, w, 4).
    """
    config = model.config.vae
    pixels = picture[None].astype(np.float32) / 127.5 - 1
    mean, logvar = map(to_numpy, model.vae_encode(pixels, model.vae, config.norm_num_groups))
    return (mean + np.exp(0.5 * logvar) * eps) * config.scaling_factor


def decode(model: Model, x: np.ndarray) -> np.ndarray:
    """Turn scaled latents (batch, h, w, 4) into pictures (batch, height, width, 3) of uint8 (7.1).

    Raises UserError if a pixel is not finite, as after an overflow in float16.
    """
    config = model.config.vae
    require(x.ndim == 4 and len(x), f"latents are (batch, h, w, channels), not {x.shape}")
    z = x / config.scaling_factor
    pictures = [to_numpy(model.vae_decode(z[i:i + 1], model.vae, config.norm_num_groups))
                for i in range(len(z))]     # one by one: the VAE needs the most memory
    pixels = np.concatenate(pictures)
    require(np.isfinite(pixels).all(), "the picture is not finite: the weights are broken, or "
                                       "float16 overflowed (take float32)")
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def numpy_noise(seeds, shape):
    """Return noise(), which draws (len(seeds), *shape) numbers, each picture's from its seed."""
    streams = [np.random.default_rng(seed) for seed in seeds]
    return lambda: np.stack([stream.standard_normal(shape, np.float32) for stream in streams])


def last_steps(steps, strength):
    """Return the last `strength` of the steps, the ones that image-to-image runs (7.2)."""
    require(0 < strength <= 1, f"strength {strength} is not above 0 and up to 1")
    n = int(round(len(steps) * strength, 9))    # 29 of 50 at 0.58: floats give 28.999999999999996
    require(n > 0, f"strength {strength} of {len(steps)} steps leaves no step")
    return steps[-n:]


def inpainting_channels(model, picture, mask, hole, eps):
    """Return an inpainting model's extra channels, mask and masked picture: (batch, h, w, 5)."""
    gray = np.where(mask[..., None], 127.5, picture)        # 127.5 becomes 0
    return np.concatenate([hole, encode(model, gray, eps)], axis=-1, dtype=np.float32)


def blend_known(path, steps, known, x_0, eps):
    """Inpaint with an ordinary model: after each step, reset the known region to the noised x_0.

    After the last step it is x_0 itself, even if that step does not end at ᾱ = 1.
    """
    levels = [alpha_bar for _, alpha_bar, _ in steps[1:]] + [1.0]
    for x, alpha_bar in zip(path, levels):
        np.copyto(x, add_noise(x_0, alpha_bar, eps), where=known)
        yield x


def generate(model: Model, prompt: str, negative: str | None = None,
             guidance: float | None = None, sampler: Callable = ddim, steps: list | None = None,
             noise: Callable | None = None, picture: np.ndarray | None = None, strength=0.75,
             mask: np.ndarray | None = None, make_denoiser=denoiser,
             embed=embed_prompts) -> Iterator[np.ndarray]:
    """Return a generator of the latents x_t (batch, h, w, 4) after each step; decode() draws them.

    guidance: the scale (the model's own); 1 turns it off. steps: triples as from
    evenly_spaced_steps (20 of them). noise: a function that returns a fresh standard normal array
    (batch, h, w, 4), whose shape says how many pictures to draw and how large; that of `picture`,
    if one is given (by default one picture of that size, or the model's, from seed 0). picture:
    (height, width, 3) of uint8 to start from, noised to `strength` of the way. mask: (height,
    width) of bool, true where the picture should be replaced; strength 1 then ignores its old
    content. make_denoiser, embed: replacements for denoiser and embed_prompts. Raises UserError
    if strength is out of range or a mask comes without a picture.
    """
    require(mask is None or picture is not None, "a mask needs a picture to start from")
    size = model.config.unet.sample_size
    h, w = (size, size) if picture is None else (n // model.factor for n in picture.shape[:2])
    noise = noise or numpy_noise([0], (h, w, model.config.vae.latent_channels))
    steps = steps or evenly_spaced_steps(20, model.alpha_bars)
    guidance = model.guidance if guidance is None else guidance
    context, pooled = embed(model, [prompt] if guidance == 1 else [negative, prompt])

    # Where to begin: at noise alone, or at the picture noised to a level on the way.
    fresh = picture is None or mask is not None and strength == 1
    if picture is not None:
        steps = last_steps(steps, strength)
    needed = picture is not None and not (fresh and model.inpaints)
    x_0 = encode(model, picture, noise()) if needed else None
    eps = noise()
    x = eps if fresh else add_noise(x_0, steps[0][1], eps)

    extra_channels = None
    if mask is not None:
        hole = mask[::model.factor, ::model.factor, None]           # (h, w, 1)
        hole, mask_eps = np.broadcast_to(hole, (*x.shape[:3], 1)), noise()
        if model.inpaints:
            extra_channels = inpainting_channels(model, picture, mask, hole, mask_eps)

    denoise = make_denoiser(model, context, guidance, pooled, extra_channels)
    path = sampler(denoise, x, steps, noise)
    if mask is None or model.inpaints:
        return path
    return blend_known(path, steps, ~hole, x_0, eps)


# ── 8. Training ──────────────────────────────────────────────────────────────────── NOTES §8 ──
#
# Three networks are trained one after the other: first the VAE, on pictures; then the text
# encoder, on pictures with captions, together with an image encoder that is discarded afterwards;
# then the U-Net, on the VAE's latents and the text encoder's contexts. Autograd works through the
# functions above unchanged, so the losses take torch tensors. A full recipe: extras/training.


def vae_loss(picture, eps, vae, groups, error=None, kl_weight=1e-4):
    """Return the error of a picture reconstructed from sampled latents, plus a small KL term (8.1).

    picture: (batch, 8 h, 8 w, 3) in [-1, 1]; eps: standard normal (batch, h, w, 4). error: a
    function of reconstruction and picture (the mean of |difference|); Stable Diffusion's own VAE
    was trained with LPIPS and a discriminator in addition.
    """
    mean, logvar = vae_encode(picture, vae, groups)             # (batch, h, w, 4) each
    z = mean + (logvar / 2).exp() * eps
    kl = (mean ** 2 + logvar.exp() - 1 - logvar).mean() / 2
    reconstruction = vae_decode(z, vae, groups)
    distance = error(reconstruction, picture) if error else (reconstruction - picture).abs().mean()
    return distance + kl_weight * kl


def clip_loss(text, image, logit_scale):
    """Contrastive loss: each caption finds its picture, and each picture its caption (3.4).

    text, image: (batch, width), unit vectors, in the same order; logit_scale: log(1/τ), learnt.
    Radford et al., 2021.
    """
    scores = logit_scale.exp() * text @ image.T         # (captions, pictures)
    own = scores.diagonal()                             # each caption with its own picture
    return (scores.logsumexp(1) - own + scores.logsumexp(0) - own).mean() / 2


def diffusion_loss(predict, prediction_type, x_0, alpha_bar, eps):
    """Noise each picture, let the model predict, and return the mean squared errors (batch,) (8.2).

    predict: a function of x_t. x_0, eps: (batch, h, w, 4); alpha_bar: (batch, 1, 1, 1).
    """
    x_t = add_noise(x_0, alpha_bar, eps)
    targets = {"epsilon": eps, "v_prediction": velocity(x_0, alpha_bar, eps), "sample": x_0}
    return ((predict(x_t) - targets[prediction_type]) ** 2).mean((1, 2, 3))


def drop_captions(captions, rng, rate=0.1):
    """Replace some captions by None: the model also learns to predict without one (6.16)."""
    return [caption if rng.random() >= rate else None for caption in captions]


def flatten(tree, prefix=""):
    """Turn {"a": [{"b": leaf}]} into {"a.0.b": leaf}, the names of a checkpoint."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def parameters(*networks):
    """Return all weights of some networks (torch tensors), with requires_grad set."""
    return [array.requires_grad_() for weights in networks for array in flatten(weights).values()]


def random_batches(latents, captions, batch_size, rng):
    """Yield (x_0, captions) of batch_size pictures drawn at random, without end."""
    while True:
        chosen = rng.integers(len(latents), size=batch_size)
        yield latents[chosen], [captions[i] for i in chosen]


def uniform_times(n, T, rng):
    """Draw n times, each of 0 .. T - 1 equally likely."""
    return rng.integers(T, size=n)


def train(model: Model, optimizer, batches, rng, times=uniform_times, weight=np.ones_like):
    """Train the weights in optimizer, in place; yield the U-Net's loss of each step (8.2).

    model: loaded with backend="torch". optimizer: one of torch.optim's, over
    parameters(model.unet), as Stable Diffusion did it, or over the text encoder's weights too, as
    extras/training does. batches: of scaled latents (batch, h, w, 4) with their captions, as
    random_batches yields them. times: a function like uniform_times. weight: a function from the
    levels ᾱ (batch,) to the weights of their errors.
    """
    config = model.config
    for x_0, captions in batches:
        context, pooled = embed_prompts(model, drop_captions(captions, rng))

        t = times(len(x_0), len(model.alpha_bars), rng)
        levels = model.alpha_bars[t]                                # (batch,)
        alpha_bar = array_like(x_0, levels)[:, None, None, None]
        eps = array_like(x_0, rng.standard_normal(x_0.shape))

        temb = model.embed_time(model, x_0, t, pooled)
        predict_x = functools.partial(unet, temb=temb, context=context, n_head=config.unet.n_head,
                                      groups=config.unet.norm_num_groups, **model.unet)
        errors = diffusion_loss(predict_x, config.scheduler.prediction_type, x_0, alpha_bar, eps)
        loss = (array_like(errors, weight(levels)) * errors).mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


# ═══════════════════════════════════════════════════════════════════════════════════════════════
# The lesson ends here. What follows are torch's forms of the primitives, the reading of weights,
# and a small command line for use without extras/.
# ═══════════════════════════════════════════════════════════════════════════════════════════════

# ── Torch's operations ───────────────────────────────────────────────────────────────────────────


class TorchForms(dict):
    """{name: torch's form of that primitive}, which imports torch at the first look-up."""

    def __missing__(self, name):
        self.update(torch_operations())
        return dict(self)[name]     # as a plain dict: an unknown name is a KeyError


TORCH = TorchForms()


@functools.cache
def torch_operations():
    """Return {name: torch's form of that primitive}. Besides these, only §8 and to_torch use torch.

    torch.nn.functional wants channels first: movedim reorders our images' axes without a copy.
    """
    import torch
    import torch.nn.functional as F

    def conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
        before, after = padding
        if before != after:     # F.conv2d pads both sides equally
            x = F.pad(x, (0, 0, before, after, before, after))      # channels, width, height
            before = 0
        x, weight = x.movedim(-1, 1), weight.movedim(-1, 1)
        return F.conv2d(x, weight, bias, stride, before).movedim(1, -1)

    def group_norm(x, groups, delta, weight, bias):
        return F.group_norm(x.movedim(-1, 1), groups, weight, bias, delta).movedim(1, -1)

    def upsample(x, height, width):
        y = F.interpolate(x.movedim(-1, 1), scale_factor=2.0).movedim(1, -1)
        return y[:, :height, :width]

    def attention(q, k, v, causal=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {
        "linear": lambda x, weight, bias=None: F.linear(x, weight.reshape(len(weight), -1), bias),
        "conv2d": conv2d,
        "group_norm": group_norm,
        "layer_norm": lambda x, weight, bias, delta=1e-5: F.layer_norm(
            x, x.shape[-1:], weight, bias, delta),
        "sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu,
        "softmax": lambda x: F.softmax(x, -1),
        "dot_product_attention": attention,
        "upsample": upsample,
        "concat": lambda *xs: torch.cat(xs, -1),
        "array_like": lambda x, values: torch.as_tensor(values).to(x),
        "to_numpy": lambda x: x.detach().float().cpu().numpy(),
    }


# ── Reading weights ─────────────────────────────────────────────────────────────────────────────

CONFIG_DEFAULTS = {     # fields that a config may omit
    "text_encoder": {}, "text_encoder_2": {},
    "vae": {"norm_num_groups": 32, "scaling_factor": 0.18215},
    "unet": {"norm_num_groups": 32, "attention_head_dim": 8, "num_attention_heads": None,
             "time_cond_proj_dim": None, "mid_block_type": "UNetMidBlock2DCrossAttn",
             "addition_time_embed_dim": None, "transformer_layers_per_block": 1},
    "scheduler": {"_class_name": "", "num_train_timesteps": 1000, "beta_start": 0.00085,
                  "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
                  "prediction_type": "epsilon", "timestep_spacing": None, "set_alpha_to_one": None,
                  "use_karras_sigmas": None, "_guidance_scale": 7.5},   # the last is tiny_sd's own
}
ALLOWED = {     # larger sizes would fill the memory; extras/checks.py checks all fields
    "unet": {"sample_size": range(1, 4097), "addition_time_embed_dim": (None, *range(2, 4097))},
    "vae": {"latent_channels": range(1, 1025)}, "text_encoder": {}, "text_encoder_2": {},
    "scheduler": {"num_train_timesteps": range(10 ** 5 + 1),
                  "prediction_type": ("epsilon", "v_prediction", "sample")}}


def read_config(part, settings):
    """Return the config.json of a part as a record, with the defaults filled in."""
    config = SimpleNamespace(**CONFIG_DEFAULTS[part] | settings)
    for name, allowed in ALLOWED[part].items():
        value = getattr(config, name, allowed[-1])
        require(value in allowed, f"the {part}'s {name} cannot be {shorten(repr(value))}")
    if part == "unet":      # one number of heads, or one for each level, under either name
        heads = config.num_attention_heads or config.attention_head_dim
        levels = len(config.block_out_channels)
        config.n_head = heads if isinstance(heads, list) else [heads] * levels
    return config


def nest(flat):
    """Undo flatten; numbered keys become lists."""
    groups = {}
    for name, leaf in flat.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = leaf
    tree = {key: group[""] if "" in group else nest(group) for key, group in groups.items()}
    if tree and all(map(str.isdecimal, tree)):
        length = 1 + max(map(int, tree))
        require(length <= 2 * len(tree), f"a weight's name counts to {length - 1}")
        return [tree.get(str(i)) for i in range(length)]
    return tree


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
          "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def read_safetensors(path):
    """Return {name: array} of a .safetensors file, mapped into memory; bfloat16 stays uint16."""
    try:
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        require(start <= len(data), "its header ends beyond it")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():      # in the file's order, the same in every process
            begin, end = entry["data_offsets"]
            array = data[start + begin:start + end].view(DTYPES[entry["dtype"]])
            arrays[name] = array.reshape(entry["shape"])
        require(sum(a.nbytes for a in arrays.values()) <= len(data) - start, "its arrays overlap")
        return arrays
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {shorten(str(error))}") from None


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
            require((folder / name).is_file(), "there is no such file")     # nor a device
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
        found = [name for name in names if (folder / name).is_file()]
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
    tokenizers = [read_tokenizer(read_json(f"tokenizer{end}/tokenizer_config.json"), vocab, merges)
                  for end in ("", "_2")[:1 + len(second)]]      # the two differ in padding alone
    return settings, arrays, tokenizers


def read_tokenizer(settings, vocab, merges):
    """Return the tokenizer of a tokenizer_config.json, a vocabulary and a list of merges."""
    require(isinstance(vocab, dict) and isinstance(merges, list) and {*map(type, vocab.values())}
            == {int} and max(map(abs, vocab.values())) < 2 ** 24, "the tokenizer has no vocabulary")
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
    require(array.dtype.kind == "f", f"a weight's numbers are {array.dtype}, not floats")
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


def embed_time_and_text(model, x, t, pooled=None, guidance=1.0):
    """Return SDXL's time embedding: pooled text and six sizes are added (9.9). Podell et al., 2023.

    The sizes: height and width of the original picture, top and left of the crop, height and width
    to draw. x: (batch, h, w, 4).
    """
    config, (n, h, w, _) = model.config.unet, x.shape
    height, width = model.factor * h, model.factor * w
    sizes = timestep_embedding([height, width, 0, 0, height, width], config.addition_time_embed_dim)
    sizes = np.tile(sizes.reshape(1, -1), (n, 1))
    added = model.unet["add_embedding"]
    h = silu(linear(concat(pooled, array_like(pooled, sizes)), **added["linear_1"]))
    return embed_time(model, x, t) + linear(h, **added["linear_2"])


def assemble(name, settings, arrays, tokenizers, backend=None, device="cpu", dtype="float32",
             to_backend=to_backend, alpha_bars=None):
    """Build the Model from what read_folder returns; see load.

    alpha_bars: the levels of a schedule other than Stable Diffusion's own.
    """
    plain = (device, dtype) == ("cpu", "float32")
    backend = backend or ("numpy" if plain else "torch")
    require(backend in ("numpy", "torch"), f"there is no backend {backend}: choose numpy or torch")
    require(plain or backend == "torch", "NumPy computes in float32 on the CPU: "
            f"device {device} and dtype {dtype} need backend torch")
    config = {part: read_config(part, settings[part]) for part in settings}

    networks = {}
    for part in arrays:
        part_dtype = "float32" if part == "vae" else dtype      # VAEs overflow in float16
        networks[part] = nest({key: to_backend(array, backend, device, part_dtype)
                               for key, array in arrays[part].items()})
    encoders = [Encoder(tokenizer, config.pop(part), networks.pop(part)) for tokenizer, part
                in zip(tokenizers, ("text_encoder", "text_encoder_2"))]
    for words, _, weights in encoders:      # some files give a length of 1e30
        positions = weights["embeddings"]["position_embedding"]["weight"]
        words.length = min(words.length, len(positions), 1024)

    scheduler = config["scheduler"]
    if alpha_bars is None:
        kind, n = scheduler.beta_schedule, scheduler.num_train_timesteps
        require(kind == "scaled_linear", f"the scheduler's beta_schedule cannot be {kind!r:.60}")
        alpha_bars = scaled_linear_schedule(n, scheduler.beta_start, scheduler.beta_end)
    require(len(alpha_bars) and (np.diff(alpha_bars, append=-1) < 0).all(),
            "the scheduler's noise levels do not fall")
    return Model(name, SimpleNamespace(**config), encoders, networks["vae"], networks["unet"],
                 alpha_bars, scheduler._guidance_scale,
                 embed_time_and_text if len(encoders) == 2 else embed_time)


def load(path: str | Path, backend=None, device="cpu", dtype="float32") -> Model:
    """Return the Model in a diffusers folder, at this path or of this name in weights/.

    backend: "numpy", which computes in float32, or "torch", on any device, in float32, float16 or
    bfloat16 (the VAE in float32); if None, torch only if device or dtype requires it.
    extras.formats.load also takes single files, names on the hub and LoRAs, and checks that
    everything fits. Raises UserError if there is no such folder or it is not whole.
    """
    folders = [Path(path), HERE / "weights" / path]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    require(folder, f"there is no folder {' nor '.join(map(str, dict.fromkeys(folders)))}: name "
                    "one that diffusers wrote (extras.formats.load takes more)")
    try:
        return assemble(folder.resolve().name, *read_folder(folder), backend, device, dtype)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"{folder}: its configs do not describe a Stable Diffusion: "
                        f"{error!r}") from None


# ── The small program ───────────────────────────────────────────────────────────────────────────


def latent_shape(model, width=None, height=None):
    """Return the latents' (h, w, channels) for a picture of this size in pixels, or the model's."""
    config, factor = model.config, model.factor
    width, height = (factor * config.unet.sample_size if n is None else n for n in (width, height))
    for name, n in ("width", width), ("height", height):
        require(hasattr(n, "__index__") and n % factor == 0 and 2 * factor <= n <= 4096,
                f"{name} {n} is not a multiple of {factor} from {2 * factor} to 4096")
    return height // factor, width // factor, config.vae.latent_channels


class Parser(argparse.ArgumentParser):
    """argparse, but errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def option_parser():
    """Return the parser of the small program's options; extras/cli.py has more of them."""
    parser = Parser(description="Draw a picture from a prompt with Stable Diffusion.",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("prompt", help="what to draw, in quotes")
    add("-n", "--negative-prompt", dest="negative", metavar="PROMPT", help="what to avoid")
    add("-m", "--model", default="emoji", help="a folder, or a name in weights/ (%(default)s)")
    add("-s", "--seed", type=int, default=0, help="(%(default)s)")
    add("--steps", type=int, default=20, help="(%(default)s)")
    add("--cfg-scale", "--guidance-scale", type=float, dest="guidance", metavar="X",
        help="how strongly to follow the prompt (the model's own)")
    add("--sampler", choices=SAMPLERS, default="ddim", help="(%(default)s)")
    add("-W", "--width", type=int, default=None, help="in pixels (the model's own)")
    add("-H", "--height", type=int, default=None, help="likewise")
    add("-i", "--init-img", metavar="FILE", default=None, help="a PNG or JPEG to start from")
    add("--strength", type=float, metavar="X", help="how much to change it, 0 to 1 (0.75)")
    add("--device", default="cpu", help="cpu, cuda or mps (%(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--backend", choices=("numpy", "torch"), default=None)
    add("-o", "--output", type=Path, default=Path("out.png"), help="a .png (%(default)s)")
    return parser


def draw(args):
    """Draw one picture and save it, unless the file is there already."""
    from PIL import Image, ImageOps
    from tqdm import tqdm
    require(args.output.suffix == ".png", f"{args.output} does not end in .png")
    require(not args.output.exists(), f"{args.output} is there already")
    require(args.output.parent.is_dir(), f"there is no folder {args.output.parent} to write to")
    model = load(args.model, args.backend, args.device, args.dtype)
    require(1 <= args.steps < len(model.alpha_bars),
            f"--steps {args.steps} is not from 1 to {len(model.alpha_bars) - 1}")

    settings = {name: value for name, value in vars(args).items()
                if name in ("negative", "guidance", "strength")}
    require(math.isfinite(settings.get("guidance", 1)), "--cfg-scale is not a finite number")
    h, w, channels = latent_shape(model, args.width, args.height)
    if args.init_img:
        picture = Image.open(args.init_img, formats=("PNG", "JPEG"))    # PostScript is a program
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        size = w * model.factor, h * model.factor
        settings["picture"] = np.asarray(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))
    walk = generate(model, args.prompt, sampler=SAMPLERS[args.sampler],
                    steps=evenly_spaced_steps(args.steps, model.alpha_bars),
                    noise=numpy_noise([args.seed], (h, w, channels)), **settings)
    *_, x = tqdm(walk, unit="step")

    picture = Image.fromarray(decode(model, x)[0])
    with open(args.output, "xb") as file:
        picture.save(file, "PNG")
    print(args.output)


def main(argv=None):
    """Run the small program; return its exit status."""
    try:
        draw(option_parser().parse_args(argv))
        return 0
    except (UserError, OSError, ImportError) as error:
        tell(str(error))
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except Exception as error:      # a strange model or picture raises any kind
        tell(f"cannot draw with this model and these options: {error!r}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
