"""Stable Diffusion in one file, from the prompt to the picture, in NumPy.

    "red apple" -> tokenizer -> text encoder -> context (1, 77, 768) ---+
                                                                        v        x T
    seed -> noise x_T (1, 64, 64, 4) --------------------------------> U-Net -> eps -> sampler -> x_0
                                                                                                   |
                                            picture (1, 512, 512, 3) <- VAE decoder <--------------+

Every layer is a function of arrays. The weights are a nested mapping whose keys are the checkpoint's own names, and
those names are the functions' arguments: `resnet(x, temb, **weights)` fails by itself if one is missing or unknown.
Pictures lie channels last, (batch, height, width, channels), so that a linear layer, a 1x1 convolution and the
projections of attention are one and the same `x @ w`.

    python tiny_sd.py "red apple on a blue background"            the small model that comes with this file
    python tiny_sd.py "a lighthouse in a storm" -m FOLDER|FILE    any Stable Diffusion 1 or 2

NOTES.md holds the mathematics, section by section in this file's order. Three files lie beside this one, which does without
them: fast.py computes the same in less time, formats.py reads what other programs write, show.py draws what is computed on
the way.
"""

import argparse
import contextlib
import functools
import gzip
import itertools
import json
import math
import os
import re
import shutil
import sys
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

for library in ("OPENBLAS", "VECLIB_MAXIMUM"):      # fast.py has threads of its own: BLAS' would fight with them
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
with contextlib.suppress(OSError):      # OpenBLAS takes AVX-512, which Zen 4 computes in halves: without it, a tenth faster
    if re.search(r"AuthenticAMD\ncpu family\s*: 25\n", Path("/proc/cpuinfo").read_text()):
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")
if __name__ == "__main__":      # Ctrl-C before main() is there to catch it: no traceback either
    sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or sys.__excepthook__(kind, *error)
import numpy as np

__version__ = "0.1.0"
HERE = Path(__file__).resolve().parent


class UserError(ValueError):
    """What the user can mend: the command line prints it as one line and ends with status 2."""

def require(right, message):
    """UserError with this message, unless right."""
    if not right:
        raise UserError(message)


# ── 1. Arrays and primitives ──────────────────────────────────────────────────────────────────────── NOTES §1 ──
# A primitive is defined by its formula, in NumPy. Given torch tensors it runs torch's own kernel of the same name:
# on_torch() is all that this file knows of torch, and the only place that imports it. Given NumPy arrays it runs the
# formula, or what fast.py puts in its place: the same numbers, computed faster.

def primitive(formula):
    """An operation on arrays of either library, of which NumPy's are computed by this formula."""
    @functools.wraps(formula)
    def operation(x, *args, **kwargs):
        run = operation.on_numpy if isinstance(x, (np.ndarray, np.generic)) else getattr(on_torch(), formula.__name__)
        y = run(x, *args, **kwargs)
        for listener in operation.listeners:    # none, unless someone wants to see what is computed: show.py
            listener(y, x, *args, **kwargs)
        return y
    operation.formula = operation.on_numpy = formula
    operation.listeners = []
    return operation

@functools.cache
def on_torch():
    """torch's kernels under the names of the primitives, and how arrays come to torch and back."""
    import torch
    import torch.nn.functional as F
    first, last = (lambda x: x.permute(0, 3, 1, 2)), (lambda x: x.permute(0, 2, 3, 1))

    def conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
        before, after = padding
        if before != after:
            x, before = F.pad(x, (0, 0, before, after, before, after)), 0
        return last(F.conv2d(first(x), first(weight), bias, stride, before))

    def group_norm(x, groups, eps, weight, bias):
        return last(F.group_norm(first(x), groups, weight, bias, eps))

    def place(array, device, dtype):
        require(device == "cpu" or getattr(torch, device).is_available(), f"torch finds no {device} device here")
        return torch.from_numpy(array).to(device, getattr(torch, dtype))

    return SimpleNamespace(
        linear=lambda x, weight, bias=None: F.linear(x, weight.reshape(len(weight), -1), bias),
        conv2d=conv2d, group_norm=group_norm,
        layer_norm=lambda x, weight, bias, eps=1e-5: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
        sigmoid=torch.sigmoid, silu=F.silu, gelu=F.gelu, softmax=lambda x: F.softmax(x, -1),
        dot_product_attention=lambda q, k, v, causal=False: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        nearest=lambda x, height, width: last(F.interpolate(first(x), scale_factor=2.0))[:, :height, :width],
        concat=lambda *xs: torch.cat(xs, -1),
        cos_sin=lambda x: torch.cat([torch.cos(x), torch.sin(x)], -1), by_row=lambda x, work: work(x),
        array_like=lambda x, values: torch.as_tensor(values).to(x),
        to_numpy=lambda x: x.detach().float().cpu().numpy(), place=place)

@primitive
def linear(x, weight, bias=None):
    """x Wᵀ + b over the last axis; weight (out, in), or (out, 1, 1, in) of a 1x1 convolution, which is the same."""
    y = x @ weight.reshape(len(weight), -1).T
    return y if bias is None else y + bias

@primitive
def conv2d(x, weight, bias=None, stride=1, padding=(1, 1)):
    """y[i, j] = sum over the kernel's places (u, v) of x[s i + u, s j + v] @ weight[:, u, v].T, plus the bias.

    x (batch, height, width, in), weight (out, kh, kw, in); padding: zeros (before, after) both height and width.
    """
    out, kh, kw, _ = weight.shape
    x = np.pad(x, [(0, 0), padding, padding, (0, 0)])
    patches = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))[:, ::stride, ::stride]
    y = np.tensordot(patches, weight, [(3, 4, 5), (3, 1, 2)])
    return y if bias is None else y + bias

@primitive
def group_norm(x, groups, eps, weight, bias):
    """Each group of channels of each picture to mean 0 and variance 1, then scaled and shifted (Wu and He, 2018)."""
    B, H, W, C = x.shape
    g = x.reshape(B, H * W, groups, C // groups)
    g = g - g.mean(axis=(1, 3), keepdims=True)
    g /= np.sqrt((g * g).mean(axis=(1, 3), keepdims=True) + np.float32(eps))
    return g.reshape(x.shape) * weight + bias

@primitive
def layer_norm(x, weight, bias, eps=1e-5):
    """Each row to mean 0 and variance 1, then scaled and shifted (Ba, Kiros and Hinton, 2016)."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight + bias

@primitive
def sigmoid(x):
    """1 / (1 + e⁻ˣ), in the form that cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)

@primitive
def silu(x):
    """x σ(x)."""
    return x * sigmoid(x)

def quick_gelu(x):
    """x σ(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * sigmoid(1.702 * x)

@primitive
def gelu(x):
    """x Φ(x) = x (1 + erf(x / √2)) / 2, where erf, by Abramowitz and Stegun 7.1.26, is off by less than 2e-7."""
    z = np.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return x * (0.5 + np.copysign(0.5 - 0.5 * poly * np.exp(-z * z), x))

@primitive
def softmax(x):
    """eˣ / Σ eˣ over the last axis; the row's maximum, subtracted first, cancels and keeps eˣ finite."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

@primitive
def dot_product_attention(q, k, v, causal=False):
    """softmax(q kᵀ / √d) v; q (batch, heads, queries, d), k and v (batch, heads, keys, d) (Vaswani et al., 2017)."""
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]))
    if causal:  # a query sees the keys up to its own place
        scores = scores + np.triu(np.full(scores.shape[-2:], -np.inf, scores.dtype), 1)
    return softmax(scores) @ v

@primitive
def nearest(x, height, width):
    """The picture at twice its size by repeating each pixel, cut to (height, width)."""
    return x[:, np.arange(height) // 2][:, :, np.arange(width) // 2]

@primitive
def concat(*xs):
    """Side by side along the channels."""
    return np.concatenate(xs, axis=-1)

@primitive
def cos_sin(x):
    """[cos x, sin x] along the last axis."""
    return np.concatenate([np.cos(x), np.sin(x)], axis=-1)

@primitive
def by_row(x, work):
    """work(rows of x) for all rows, the NumPy results one after the other; torch takes all rows at once."""
    return np.concatenate([work(x[i:i + 1]) for i in range(len(x))])

@primitive
def array_like(x, values):
    """values as an array of x's library, type and device."""
    return np.asarray(values, x.dtype)

@primitive
def to_numpy(x):
    """x as a float32 NumPy array."""
    return x


# ── 2. Tokenizer ──────────────────────────────────────────────────────────────────────────────────── NOTES §2 ──

def byte_symbols():
    """One printable character for each of the 256 bytes, in the order of the vocabulary (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return dict(zip(printable + hidden, map(chr, printable + [256 + i for i in range(len(hidden))])))

class Tokenizer:
    """Byte-level byte pair encoding, as CLIP's: words to bytes, bytes to symbols, symbols merged by rank.

    merges: pairs of symbols, the earliest learnt first. vocab: {symbol: id}; by default CLIP's order, which is the
    256 bytes, the same closing a word, the merges, and the two specials.
    """
    BOS, EOS = "<|startoftext|>", "<|endoftext|>"
    SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

    def __init__(self, merges, vocab=None, length=77, pad=EOS):
        self.bytes = byte_symbols()
        self.rank = {pair: i for i, pair in enumerate(merges)}
        symbols = list(self.bytes.values())
        names = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges] + [self.BOS, self.EOS]
        self.vocab = vocab or {name: i for i, name in enumerate(names)}
        self.length, self.pad, self.symbols = length, self.vocab[pad], {i: s for s, i in self.vocab.items()}

    def words(self, text):
        """Lower case, then split into runs of letters, single numerals and runs of other signs; space only parts them."""
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        kinds = {c: unicodedata.category(c)[0] for c in set(text)}   # re has no \p{L}: name this text's own letters
        L, N = ("".join(map(re.escape, (c for c in kinds if kinds[c] == kind))) for kind in "LN")
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[a-z{L}]+|[0-9{N}]|[^{self.SPACE}a-z{L}0-9{N}]+", text)

    def merge(self, word):
        """The word's symbols, after merging the pair of lowest rank again and again until none is known."""
        *head, tail = (self.bytes[b] for b in word.encode(errors="replace"))
        symbols = [*head, tail + "</w>"]
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(symbols):
                n = 2 if tuple(symbols[i:i + 2]) == pair else 1
                merged.append("".join(symbols[i:i + n]))
                i += n
            symbols = merged
        return symbols

    def tokens(self, text):
        """The ids of a text of any length; the two specials are known where they are spelt out, and not added."""
        symbols = []
        for piece in re.split(r"(<\|startoftext\|>|<\|endoftext\|>)", text):
            special = piece in (self.BOS, self.EOS)
            symbols += [piece] if special else [s for word in self.words(piece) for s in self.merge(word)]
        return [self.vocab.get(s, self.vocab[self.EOS]) for s in symbols]

    def encode(self, text):
        """(ids, cut): ids between BOS and EOS, padded to the model's length, and the end of the text that did not fit."""
        most = 40 * self.length     # letters: no symbol of CLIP's has more than 32, and merging a long word takes their square
        end = re.match(rf"(?:[{self.SPACE}]*[^{self.SPACE}]){{0,{most}}}[{self.SPACE}]*", text).end()
        ids, room = self.tokens(text[:end]), self.length - 2
        kept = [self.vocab[self.BOS], *ids[:room], self.vocab[self.EOS]]
        return np.array(kept + [self.pad] * (self.length - len(kept))), self.decode(ids[room:]) + text[end:]

    def decode(self, ids):
        """The text of some ids, in lower case and with its spaces as the tokenizer sees them."""
        byte = {s: b for b, s in self.bytes.items()}
        symbols = "".join(self.symbols[i] for i in ids).replace("</w>", " ")
        return bytes(byte.get(c, 32) for c in symbols).decode(errors="replace").strip()


# ── 3. Text encoder ───────────────────────────────────────────────────────────────────────────────── NOTES §3 ──

def split_heads(x, n_head):
    """(batch, T, n_head d) to (batch, n_head, T, d)."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)

def merge_heads(x):
    """(batch, n_head, T, d) to (batch, T, n_head d)."""
    B, n_head, T, d = x.shape
    return x.swapaxes(1, 2).reshape(B, T, n_head * d)

def text_layer(x, n_head, activation, layer_norm1, self_attn, layer_norm2, mlp):
    """Attention of each word to those before it, then a feed-forward layer; x (batch, length, width)."""
    h = layer_norm(x, **layer_norm1)
    q, k, v = (split_heads(linear(h, **self_attn[name]), n_head) for name in ("q_proj", "k_proj", "v_proj"))
    x = x + linear(merge_heads(dot_product_attention(q, k, v, causal=True)), **self_attn["out_proj"])
    h = layer_norm(x, **layer_norm2)
    return x + linear(activation(linear(h, **mlp["fc1"])), **mlp["fc2"])

def text_encoder(ids, n_head, activation, embeddings, encoder, final_layer_norm):
    """Token ids (batch, length) to the context (batch, length, width) that the U-Net attends to (Radford et al., 2021)."""
    x = embeddings["token_embedding"]["weight"][ids] + embeddings["position_embedding"]["weight"][:ids.shape[1]]
    for layer in encoder["layers"]:
        x = text_layer(x, n_head, activation, **layer)
    return layer_norm(x, **final_layer_norm)


# ── 4. VAE ────────────────────────────────────────────────────────────────────────────────────────── NOTES §4 ──

def resnet(x, temb, groups, eps, norm1, conv1, norm2, conv2, time_emb_proj=None, conv_shortcut=None):
    """x + f(x), f two rounds of norm, SiLU and convolution, with the time added between them (He et al., 2015)."""
    h = conv2d(silu(group_norm(x, groups, eps, **norm1)), **conv1)
    if time_emb_proj:
        h = h + linear(silu(temb), **time_emb_proj)[:, None, None]
    h = conv2d(silu(group_norm(h, groups, eps, **norm2)), **conv2)
    return h + (linear(x, **conv_shortcut) if conv_shortcut else x)

def attention(x, context, n_head, to_q, to_k, to_v, to_out):
    """Each place of x asks, and the places of the context answer; self-attention when the context is x."""
    q, k, v = (split_heads(linear(s, **p), n_head) for s, p in ((x, to_q), (context, to_k), (context, to_v)))
    return linear(merge_heads(dot_product_attention(q, k, v)), **to_out[0])

def vae_attention(x, groups, **weights):
    """Self-attention, of one head, among all places of a picture (batch, height, width, channels)."""
    B, H, W, C = x.shape
    norm = weights.pop("group_norm")
    h = group_norm(x, groups, 1e-6, **norm).reshape(B, H * W, C)
    return x + attention(h, h, 1, **weights).reshape(B, H, W, C)

def vae_block(x, groups, resnets, attentions=(), downsamplers=(), upsamplers=()):
    """ResBlocks, with attention between them in the middle of the network, then half or twice the size."""
    for i, weights in enumerate(resnets):
        x = resnet(x, None, groups, 1e-6, **weights)
        if i < len(attentions):
            x = vae_attention(x, groups, **attentions[i])
    for down in downsamplers:
        x = conv2d(x, **down["conv"], stride=2, padding=(0, 1))     # zeros on the right and at the bottom only
    for up in upsamplers:
        x = conv2d(nearest(x, 2 * x.shape[1], 2 * x.shape[2]), **up["conv"])
    return x

def vae_half(x, groups, conv_in, mid_block, conv_norm_out, conv_out, down_blocks=(), up_blocks=()):
    """The encoder, which has down_blocks, or the decoder, which has up_blocks."""
    x = conv2d(x, **conv_in)
    for block in (*down_blocks, mid_block, *up_blocks):
        x = vae_block(x, groups, **block)
    return conv2d(silu(group_norm(x, groups, 1e-6, **conv_norm_out)), **conv_out)

def vae_encode(image, vae, groups):
    """Picture (batch, 8h, 8w, 3) in [-1, 1] to the mean and log variance, each (batch, h, w, 4), of q(z | picture)."""
    moments = linear(vae_half(image, groups, **vae["encoder"]), **vae["quant_conv"])
    n = moments.shape[-1] // 2
    return moments[..., :n], moments[..., n:].clip(-30, 20)

def vae_decode(z, vae, groups):
    """Latents (batch, h, w, 4), unscaled, to the picture (batch, 8h, 8w, 3), about in [-1, 1]."""
    return vae_half(linear(z, **vae["post_quant_conv"]), groups, **vae["decoder"])


# ── 5. U-Net ──────────────────────────────────────────────────────────────────────────────────────── NOTES §5 ──

def time_encoding(t, dim, ends=0):
    """The times t (batch,) as waves of dim / 2 frequencies, from 1 down towards 1 / 10000, or with ends=1 to it; cosines
    first."""
    frequencies = np.exp(-math.log(10000) * np.arange(dim // 2) / (dim // 2 - ends))
    return cos_sin(t[:, None] * array_like(t, frequencies))

def time_features(x, t, guidance, linear_1, linear_2, cond_proj=None):
    """The times as the ResBlocks take them; a model with cond_proj takes the scale of guidance too (Meng et al., 2023)."""
    temb = array_like(x, time_encoding(t, x.shape[-1]))
    if cond_proj:
        cos, sin = np.split(time_encoding(1000 * (guidance - 1), cond_proj["weight"].shape[1], ends=1), 2, axis=-1)
        temb = temb + linear(array_like(x, np.concatenate([sin, cos], -1)), **cond_proj)
    return linear(silu(linear(temb, **linear_1)), **linear_2)

def feed_forward(x, net):
    """GEGLU: half of a wide layer, gated by the GELU of the other half (Shazeer, 2020)."""
    wide, _, narrow = net
    h = linear(x, **wide["proj"])
    n = h.shape[-1] // 2
    return linear(h[..., :n] * gelu(h[..., n:]), **narrow)

def transformer_block(x, context, n_head, norm1, attn1, norm2, attn2, norm3, ff):
    """Attention among the places, attention to the words, a feed-forward layer; x (batch, places, channels)."""
    h = layer_norm(x, **norm1)
    x = x + attention(h, h, n_head, **attn1)
    x = x + attention(layer_norm(x, **norm2), context, n_head, **attn2)
    return x + feed_forward(layer_norm(x, **norm3), **ff)

def transformer(x, context, n_head, groups, norm, proj_in, transformer_blocks, proj_out):
    """The picture's places as a sequence, attending to each other and to the words."""
    B, H, W, C = x.shape
    h = linear(group_norm(x, groups, 1e-6, **norm), **proj_in).reshape(B, H * W, C)
    for block in transformer_blocks:
        h = transformer_block(h, context, n_head, **block)
    return x + linear(h.reshape(B, H, W, C), **proj_out)

def down_block(x, temb, context, n_head, groups, resnets, attentions=(), downsamplers=()):
    """A level on the way down, or the middle: its picture, and all pictures on the way, for the way up."""
    skips = []
    for i, weights in enumerate(resnets):
        x = resnet(x, temb, groups, 1e-5, **weights)
        if i < len(attentions):
            x = transformer(x, context, n_head, groups, **attentions[i])
        skips.append(x)
    for down in downsamplers:
        x = conv2d(x, **down["conv"], stride=2)
        skips.append(x)
    return x, skips

def up_block(x, skips, temb, context, n_head, groups, resnets, attentions=(), upsamplers=()):
    """A level on the way up, which takes beside its own picture one from the end of skips for each ResBlock."""
    for i, weights in enumerate(resnets):
        x = resnet(concat(x, skips.pop()), temb, groups, 1e-5, **weights)
        if i < len(attentions):
            x = transformer(x, context, n_head, groups, **attentions[i])
    for up in upsamplers:
        x = conv2d(nearest(x, *skips[-1].shape[1:3]), **up["conv"])
    return x

def unet(x, t, context, n_head, groups, time_embedding, conv_in, down_blocks, up_blocks, conv_norm_out, conv_out,
         mid_block=None, guidance=None):
    """What the model predicts from x_t: the noise, unless its config says otherwise (Ronneberger et al., 2015;
    Rombach et al., 2022).

    x (batch, h, w, 4), t (batch,) in 0..999, context (batch, words, width), n_head: one number for each level; a pruned
    model may lack the middle, and a consistency model takes its scale of guidance (batch,) here.
    """
    x = conv2d(x, **conv_in)
    temb = time_features(x, t, guidance, **time_embedding)
    skips = [x]
    for heads, weights in zip(n_head, down_blocks):
        x, passed = down_block(x, temb, context, heads, groups, **weights)
        skips += passed
    if mid_block:
        x, _ = down_block(x, temb, context, n_head[-1], groups, **mid_block)
    for heads, weights in zip(reversed(n_head), up_blocks):
        x = up_block(x, skips, temb, context, heads, groups, **weights)
    return conv2d(silu(group_norm(x, groups, 1e-5, **conv_norm_out)), **conv_out)


# ── 6. Diffusion ──────────────────────────────────────────────────────────────────────────────────── NOTES §6 ──

def alpha_bars(config):
    """ᾱ_t = Π (1 - β_s): the share of the picture's variance still in x_t, for t = 0 .. T - 1 (Ho et al., 2020)."""
    T, first, last = (config.get(k, v) for k, v in
                      (("num_train_timesteps", 1000), ("beta_start", 0.00085), ("beta_end", 0.012)))
    return np.cumprod(1 - np.linspace(first ** 0.5, last ** 0.5, T) ** 2)

def add_noise(x_0, a, noise):
    """q(x_t | x_0) in closed form: x_t = √ᾱ x_0 + √(1 - ᾱ) ε."""
    return math.sqrt(a) * x_0 + math.sqrt(1 - a) * noise

def split_prediction(kind, output, x_t, a):
    """The model's output as (x̂_0, ε̂), the two parts of x_t = √ᾱ x̂_0 + √(1 - ᾱ) ε̂ (Salimans and Ho, 2022, for v)."""
    signal, sigma = math.sqrt(a), math.sqrt(1 - a)
    if kind == "epsilon":
        return (x_t - sigma * output) / signal, output
    if kind == "v_prediction":
        return signal * x_t - sigma * output, signal * output + sigma * x_t
    return output, (x_t - signal * output) / sigma      # "sample"

def guide(uncond, cond, scale):
    """Classifier-free guidance: away from what any prompt would give, towards this one (Ho and Salimans, 2022)."""
    return uncond + scale * (cond - uncond)

# A sampler goes from noise to picture. It is given denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), the first x_t, the steps as
# triples (t, ᾱ_t, ᾱ of the next step), and noise() for a fresh ε; it yields each x_t that it reaches, and goes on from
# what it then finds there.

def ddpm(denoise, x, steps, noise):
    """Ancestral sampling from the posterior q(x_{t-1} | x_t, x̂_0) (Ho et al., 2020, eq. 7)."""
    for t, a, a_next in steps:
        x_0, _ = denoise(x, t, a)
        alpha = a / a_next
        beta = 1 - alpha
        mean = (math.sqrt(a_next) * beta * x_0 + math.sqrt(alpha) * (1 - a_next) * x) / (1 - a)
        x = mean + math.sqrt(beta * (1 - a_next) / (1 - a)) * noise()
        yield x

def ddim(denoise, x, steps, noise):
    """The same marginals without fresh noise: x̂_0 and ε̂ mixed anew for the next level (Song et al., 2021, eq. 12)."""
    for t, a, a_next in steps:
        x_0, eps = denoise(x, t, a)
        x = math.sqrt(a_next) * x_0 + math.sqrt(1 - a_next) * eps
        yield x

def euler(denoise, x, steps, noise, ancestral=False):
    """Euler's method on dx/dσ = ε̂ for x = x_t / √ᾱ and σ = √(1 / ᾱ - 1) (Karras et al., 2022). Ancestral,
    with a step below the target and fresh noise to come back up, it is ddpm in other coordinates."""
    for t, a, a_next in steps:
        _, eps = denoise(x, t, a)
        sigma, target = math.sqrt(1 / a - 1), math.sqrt(1 / a_next - 1)
        up = target / sigma * math.sqrt(sigma ** 2 - target ** 2) if ancestral else 0.0
        down = math.sqrt(target ** 2 - up ** 2)
        x = x / math.sqrt(a) + (down - sigma) * eps
        if ancestral:
            x = x + up * noise()
        x = x * math.sqrt(a_next)
        yield x

def dpm_pp_2m(denoise, x, steps, noise):
    """DPM-Solver++ (2M): exact in the linear part, x̂_0 extrapolated from two steps in λ = log(signal / noise)
    (Lu et al., 2022, algorithm 2). First order where there is no second point: the first step, and the last to σ = 0."""
    before = None
    for t, a, a_next in steps:
        x_0, _ = denoise(x, t, a)
        direction = x_0
        lam = 0.5 * math.log(a / (1 - a))
        shrink = math.sqrt((1 - a_next) / (1 - a))                  # σ_next / σ
        decay = shrink / math.sqrt(a_next / a)                      # e^-h, h = λ_next - λ; zero at the end
        if before and decay:
            last_x_0, last_lam = before
            r = (lam - last_lam) / -math.log(decay)
            direction = x_0 + (x_0 - last_x_0) / (2 * r)
        x = shrink * x + math.sqrt(a_next) * (1 - decay) * direction
        before = x_0, lam
        yield x

def plms(denoise, x, steps, noise):
    """ddim's step along ε̂ extrapolated from up to four steps by Adams and Bashforth (Liu et al., 2022); the first, for want
    of a past, goes along the mean of the noise here and there (Heun)."""
    def along(eps):
        return math.sqrt(a_next / a) * (x - math.sqrt(1 - a) * eps) + math.sqrt(1 - a_next) * eps

    past = []
    for t, a, a_next in steps:
        past = [denoise(x, t, a)[1], *past[:3]]
        shares = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)][len(past) - 1]
        eps = sum(share * e for share, e in zip(shares, past))
        if len(past) == 1 < len(steps):
            eps = (eps + denoise(along(eps), *steps[1][:2])[1]) / 2
        x = along(eps)
        yield x

def lcm(denoise, x, steps, noise):
    """Consistency sampling: every step leaps to the picture, and all but the last noise it again (Luo et al., 2023)."""
    for t, a, a_next in steps:
        x_0, _ = denoise(x, t, a)
        skip = 0.5 ** 2 / (0.5 ** 2 + (10 * t) ** 2)        # which makes the leap from t = 0 the identity
        x = skip * x + math.sqrt(1 - skip) * x_0
        if a_next < 1:
            x = add_noise(x, a_next, noise())
        yield x

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "plms": plms, "euler": euler, "euler_a": functools.partial(euler, ancestral=True),
            "dpm++2m": dpm_pp_2m, "lcm": lcm}
SCHEDULERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "PNDMScheduler": "plms", "EulerDiscreteScheduler": "euler",
              "EulerAncestralDiscreteScheduler": "euler_a", "DPMSolverMultistepScheduler": "dpm++2m", "LCMScheduler": "lcm"}

def sampling_steps(sampler, n, config, karras=False):
    """The n steps (t, ᾱ_t, ᾱ_next) that a sampler takes, from most noise to none; spacing as the scheduler's config says."""
    a = alpha_bars(config)
    T, spacing, offset = len(a), timestep_spacing(sampler, config), config.get("steps_offset", 1)
    if sampler == "lcm":        # some of the 50 steps of the solver that it was distilled from
        t = np.arange(1, 51)[::-1] * (T // 50) - 1
        t = t[np.arange(n) * 50 // n] if n <= 50 else [T]
    elif spacing == "trailing":
        t = (T - np.arange(n) * T / n).round() - 1
    else:   # DPM++ cuts the range in n + 1 parts and leaves out the last
        m = n + (sampler == "dpm++2m")
        t = np.arange(m) * (T // m) + offset if spacing == "leading" else np.linspace(0, T - 1, m)
        t = t[::-1][:n]
    require(n <= T and t[0] <= T - 1, f"{n} steps are more than this sampler can take")
    if sampler not in ("euler", "euler_a"):
        t = t.round()
    sigma = np.interp(t, np.arange(T), np.sqrt(1 / a - 1))
    if karras or sampler in ("euler", "dpm++2m") and config.get("use_karras_sigmas"):
        sigma, t = karras_levels(sampler, sigma, np.sqrt(1 / a - 1))
    levels = 1 / (1 + sigma ** 2)
    last = a[0] if sampler in ("ddim", "plms") and not config.get("set_alpha_to_one", sampler == "ddim") else 1.0
    return list(zip(t.tolist(), levels.tolist(), [*levels[1:].tolist(), float(last)]))

def timestep_spacing(sampler, config):
    """How the steps lie in the range of t; where a config is silent, as in diffusers."""
    return config.get("timestep_spacing") or ("linspace" if sampler in ("euler", "euler_a", "dpm++2m") else "leading")

def karras_levels(sampler, sigma, all_sigma):
    """Noise levels evenly spaced in σ^(1/7) (Karras et al., 2022, eq. 5), and the times t at which a model meets them."""
    high, low = (all_sigma[-1], all_sigma[0]) if sampler == "dpm++2m" else (sigma[0], sigma[-1])
    ramp = np.linspace(0, 1, len(sigma))
    sigma = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    t = np.interp(np.log(sigma), np.log(all_sigma), np.arange(len(all_sigma)))
    return sigma, t.round() if sampler == "dpm++2m" else t

class Noise:
    """The stream of torch.randn on a CPU generator with this seed, so that a seed means the same picture everywhere.

    MT19937; the low 24 bits of each word are a uniform number; Box and Muller's method in blocks of 16, of which the
    first eight give the radii and the last eight the angles. The last 16 numbers are drawn again if n is no multiple.
    """

    def __init__(self, seed):
        self.words = np.random.RandomState(seed & 0xffffffff)

    def uniform(self, n):
        """n numbers from 0 to below 1."""
        words = np.frombuffer(self.words.bytes(4 * n), "<u4")
        return (words & 0xffffff).astype(np.float32) * np.float32(2 ** -24)

    def normal(self, n):
        """n standard normal numbers; n at least 16."""
        z = box_muller(self.uniform(n)[:n // 16 * 16])
        return z if n % 16 == 0 else np.concatenate([z[:n - 16], box_muller(self.uniform(16))])

    def __call__(self, channels, height, width):
        """Standard normal numbers (height, width, channels), drawn in torch's order, channels first."""
        return self.normal(channels * height * width).reshape(channels, height, width).transpose(1, 2, 0)

def box_muller(u):
    """Uniform numbers (16 n,) to standard normal ones."""
    u1, u2 = np.split(u.reshape(-1, 16), 2, axis=1)
    radius, angle = np.sqrt(-2 * np.log(1 - u1)), np.float32(2 * np.pi) * u2
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


# ── 7. Weights ────────────────────────────────────────────────────────────────────────────────────── NOTES §7 ──
# The shapes of each network as a checkpoint holds them, from the network's config: what a file must contain, no more
# and no less. A name in a file is the path to the array in these mappings: down_blocks.0.resnets.1.conv1.weight.

def norm_shapes(n): return {"weight": (n,), "bias": (n,)}
def bare_shapes(i, o): return {"weight": (o, i)}
def linear_shapes(i, o): return {"weight": (o, i), "bias": (o,)}
def conv_shapes(i, o, size=3): return {"weight": (o, i, size, size), "bias": (o,)}

def resnet_shapes(i, o, temb=None):
    """From i channels to o; temb: how many numbers tell the time, none in the VAE."""
    return {"norm1": norm_shapes(i), "conv1": conv_shapes(i, o), "norm2": norm_shapes(o), "conv2": conv_shapes(o, o),
            **({"time_emb_proj": linear_shapes(temb, o)} if temb else {}),
            **({"conv_shortcut": conv_shapes(i, o, 1)} if i != o else {})}

def attention_shapes(width, context, project=bare_shapes):
    """Queries from `width` channels, keys and values from `context`."""
    return {"to_q": project(width, width), "to_k": project(context, width), "to_v": project(context, width),
            "to_out": [linear_shapes(width, width)]}

def transformer_shapes(width, context):
    """`width` channels that attend to words of `context` numbers."""
    block = {"norm1": norm_shapes(width), "attn1": attention_shapes(width, width),
             "norm2": norm_shapes(width), "attn2": attention_shapes(width, context), "norm3": norm_shapes(width),
             "ff": {"net": [{"proj": linear_shapes(width, 8 * width)}, None, linear_shapes(4 * width, width)]}}
    return {"norm": norm_shapes(width), "proj_in": conv_shapes(width, width, 1), "transformer_blocks": [block],
            "proj_out": conv_shapes(width, width, 1)}

def text_shapes(config):
    """Of the text encoder, by its config.json."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    layer = {"layer_norm1": norm_shapes(width), "layer_norm2": norm_shapes(width),
             "self_attn": {f"{name}_proj": linear_shapes(width, width) for name in ("q", "k", "v", "out")},
             "mlp": {"fc1": linear_shapes(width, wide), "fc2": linear_shapes(wide, width)}}
    return {"embeddings": {"token_embedding": bare_shapes(width, config["vocab_size"]),
                           "position_embedding": bare_shapes(width, config["max_position_embeddings"])},
            "encoder": {"layers": [layer] * config["num_hidden_layers"]}, "final_layer_norm": norm_shapes(width)}

def vae_shapes(config):
    """Of the VAE, by its config.json."""
    widths, n, z = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    top = widths[-1]

    def half(i, o, widths, n, blocks, resample):
        levels = [{"resnets": [resnet_shapes(before if j == 0 else width, width) for j in range(n)],
                   resample: [{"conv": conv_shapes(width, width)}]} for before, width in zip([widths[0], *widths], widths)]
        del levels[-1][resample]
        return {"conv_in": conv_shapes(i, widths[0]), blocks: levels,
                "mid_block": {"resnets": [resnet_shapes(top, top)] * 2, "attentions": [
                    {"group_norm": norm_shapes(top), **attention_shapes(top, top, linear_shapes)}]},
                "conv_norm_out": norm_shapes(widths[-1]), "conv_out": conv_shapes(widths[-1], o)}

    return {"encoder": half(config["in_channels"], 2 * z, widths, n, "down_blocks", "downsamplers"),
            "quant_conv": conv_shapes(2 * z, 2 * z, 1), "post_quant_conv": conv_shapes(z, z, 1),
            "decoder": half(z, config["out_channels"], widths[::-1], n + 1, "up_blocks", "upsamplers")}

def unet_shapes(config):
    """Of the U-Net, by its config.json."""
    widths, n, context = config["block_out_channels"], config["layers_per_block"], config["cross_attention_dim"]
    first, top, temb = widths[0], widths[-1], 4 * widths[0]

    def level(inputs, width, kind, resample):
        return {"resnets": [resnet_shapes(i, width, temb) for i in inputs],
                **({"attentions": [transformer_shapes(width, context) for _ in inputs]} if "Attn" in kind else {}),
                resample: [{"conv": conv_shapes(width, width)}]}

    down, up, skips, x = [], [], [first], first
    for width, kind in zip(widths, config["down_block_types"]):
        down.append(level([x] + [width] * (n - 1), width, kind, "downsamplers"))
        skips += [width] * (n + 1)      # each ResBlock leaves one for the way up, and so does the downsampler
        x = width
    skips.pop()
    for width, kind in zip(reversed(widths), config["up_block_types"]):
        up.append(level([(width if j else x) + skips.pop() for j in range(n + 1)], width, kind, "upsamplers"))
        x = width
    del down[-1]["downsamplers"], up[-1]["upsamplers"]
    scale = config.get("time_cond_proj_dim")
    return {"time_embedding": {"linear_1": linear_shapes(first, temb), "linear_2": linear_shapes(temb, temb),
                               **({"cond_proj": bare_shapes(scale, first)} if scale else {})},
            "conv_in": conv_shapes(config["in_channels"], first), "down_blocks": down,
            **({"mid_block": {"resnets": [resnet_shapes(top, top, temb)] * 2, "attentions": [transformer_shapes(top, context)]}}
               if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") else {}),
            "up_blocks": up, "conv_norm_out": norm_shapes(first), "conv_out": conv_shapes(first, config["out_channels"])}

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
SHAPES = {"text_encoder": text_shapes, "vae": vae_shapes, "unet": unet_shapes}

def flatten(tree, prefix=""):
    """{"a": [{"b": leaf}]} as {"a.0.b": leaf}, the names of a checkpoint."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, (dict, list)):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat

def nest(flat):
    """The inverse of flatten: numbered keys become lists, with None where a layer has no weights."""
    if not isinstance(flat, dict):
        return flat
    tree = {}
    for name, leaf in flat.items():
        key, _, rest = name.partition(".")
        if rest:
            tree.setdefault(key, {})[rest] = leaf
        else:
            tree[key] = leaf
    if all(key.isdigit() for key in tree):
        return [nest(tree.get(str(i))) for i in range(1 + max(map(int, tree)))]
    return {key: nest(value) for key, value in tree.items()}

def read_safetensors(path):
    """{name: array} of a .safetensors file, memory-mapped; bfloat16, unknown to NumPy, is the upper half of a float32."""
    from safetensors import SafetensorError, safe_open
    try:
        safe_open(path, "np")       # the library checks the header: whole, well-formed, without overlap
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    data = np.memmap(path, np.uint8, "r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    types, arrays = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}, {}
    for name in header.keys() - {"__metadata__"}:
        kind, shape, (begin, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        require(kind in types, f"{path}: {name} is {kind}; weights are F32, F16 or BF16")
        array = data[start + begin:start + end].view(types[kind]).reshape(shape)
        arrays[name] = (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array
    return arrays

def fill(part, arrays, shapes, place):
    """The arrays as a nested mapping, each through place(); UserError names all that are missing, unknown or misshapen."""
    def core(shape):        # files differ on whether a 1x1 convolution (o, i, 1, 1) is a linear layer (o, i)
        return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)

    expected = flatten(shapes)
    wrong = [f"{name} is missing" for name in expected.keys() - arrays.keys()]
    wrong += [f"{name} is unknown" for name in arrays.keys() - expected.keys()]
    wrong += [f"{name} has shape {arrays[name].shape} instead of {expected[name]}"
              for name in expected.keys() & arrays.keys() if core(arrays[name].shape) != core(expected[name])]
    require(not wrong, f"the weights of the {part} do not fit its config: {listed(wrong)}")
    return nest({name: place(array) for name, array in arrays.items()})

def listed(problems):
    """Some problems in one line, of many the first five."""
    return "; ".join(sorted(problems)[:5]) + f"; and {len(problems) - 5} more" * (len(problems) > 5)

def placer(backend, device, dtype):
    """place(array): an array of a file to where the model computes and in its type, convolutions as (out, kh, kw, in)."""
    def place(array):
        array = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
        if backend == "numpy":      # larger convolutions stay in the file until they are needed; x @ Wᵀ reads W by columns
            return array if array.ndim == 4 and array.shape[1] > 1 else np.asfortranarray(array, np.float32)
        return on_torch().place(np.array(array, order="C"), device, dtype)
    return place

@dataclass
class Model:
    """The three networks' weights, the tokenizer, and {part: config} for what the arrays do not tell."""
    name: str
    digest: str
    config: dict
    tokenizer: Tokenizer
    text_encoder: dict
    vae: dict
    unet: dict

    @property
    def factor(self):
        """How many pixels a latent stands for, in each direction."""
        return 2 ** (len(self.config["vae"]["block_out_channels"]) - 1)

    @property
    def sampler(self):
        """The sampler that its scheduler's config names, or else dpm++2m."""
        return SCHEDULERS.get(self.config["scheduler"].get("_class_name"), "dpm++2m")

    @property
    def habits(self):
        """(steps, guidance) that it was made for: distilled models take few steps, and Turbo no guidance; others may say."""
        turbo = self.sampler == "euler" and self.config["scheduler"].get("timestep_spacing") == "trailing"
        return (4, 8.5) if self.sampler == "lcm" else (1, 1.0) if turbo else (
            20, self.config["scheduler"].get("_guidance_scale", 7.5))

STEMS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}

def load(path, backend="numpy", device="cpu", dtype="float32", loras=()):
    """The model in a diffusers folder or in a single .safetensors file with CompVis' names, at `path` or weights/`path`; or in
    a repository of the Hugging Face hub, of that name or by its alias in formats.HUB, which is fetched if need be.

    backend "numpy" computes in float32; "torch" on any device, in float32, float16 or bfloat16, its VAE in float32.
    """
    name = Path(path)
    require(name.suffix not in (".ckpt", ".pt", ".pth", ".bin"),
            f"{name.name} is a pickle, which can run any code: get {name.stem}.safetensors instead")
    path = next(filter(Path.exists, (name, HERE / "weights" / name)), None)
    if path is None or path.is_file() or loras:
        import formats      # whatever is not a folder like weights/emoji
    path = path or formats.fetch(name)
    types = {"text_encoder": dtype, "vae": "float32", "unet": dtype}        # float16 overflows in the VAE
    try:
        config, tokenizer, arrays, digest = read_folder(path) if path.is_dir() else formats.read_single_file(path)
        if loras:
            formats.add_loras(arrays, loras)
        numbers = {part: sum(array.size for array in arrays[part].values()) for part in arrays}
        largest = max(n * (2 if types[part].endswith("16") else 4) for part, n in numbers.items())
        check_memory(largest * (device == "cpu"), f"the model {name}")
        networks = {part: fill(part, arrays[part], shapes(config[part]), placer(backend, device, types[part]))
                    for part, shapes in SHAPES.items()}
        check_config(tokenizer, **config)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its configs do not describe a Stable Diffusion: {error!r}") from None
    return Model(path.stem if path.is_file() else name.resolve().name, digest, config, tokenizer, **networks)

def check_memory(need, what):
    """UserError if this process cannot come to hold `need` bytes, with what is free, swap included, under its own limit and its
    control group's; so far as Linux tells: elsewhere nothing is refused.

    need: of a model the numbers of its largest network, of a picture three of its largest arrays. A run comes to more.
    """
    def told(file, pattern=r"(\d+)"):
        with contextlib.suppress(OSError):
            return re.findall(pattern, Path(file).read_text())
        return []

    free, swap, held = (1024 * sum(map(int, told(file, rf"{name}:\s+(\d+)"))) for file, name in (
        ("/proc/meminfo", "MemAvailable"), ("/proc/meminfo", "SwapFree"), ("/proc/self/status", "RssAnon")))
    limits = told("/proc/self/limits", r"address space\s+(\d+)")
    for group in ("", *told("/proc/self/cgroup", ":(?:memory)?:(/.+)")):
        limits += told(f"/sys/fs/cgroup{group}/memory.max") + told(f"/sys/fs/cgroup/memory{group}/memory.limit_in_bytes")
    room = min([free + held if free else math.inf, *map(int, limits)]) + swap
    require(need <= room, f"{what} needs at least {need / 1e9:.1f} GB of memory, and there are {room / 1e9:.1f} GB: "
                          "close other programs, or take a smaller model or picture")

def check_config(tokenizer, text_encoder, vae, unet, scheduler):
    """UserError where the configs ask for what this file does not compute, or contradict each other."""
    def divides(widths, parts):
        return all(type(n) is int and n > 0 and width % n == 0 for width, n in zip(widths, parts))

    for name, part in (("vae", vae), ("unet", unet)):
        require(divides(part["block_out_channels"], [part.get("norm_num_groups", 32)] * 9),
                f"the {name}'s channels do not divide into its norm_num_groups")
    require(divides(unet["block_out_channels"], heads_by_level(unet)), "the unet's channels do not divide into its heads")
    require(divides([text_encoder["hidden_size"]], [text_encoder["num_attention_heads"]]),
            "the text_encoder's hidden_size does not divide into its num_attention_heads")
    require(text_encoder["hidden_act"] in ACTIVATIONS, f"the activation {text_encoder['hidden_act']!r} is unknown")
    require(all(type(i) is int and 0 <= i < text_encoder["vocab_size"] for i in tokenizer.vocab.values()),
            "the tokenizer's vocabulary is not one of numbers below the text_encoder's vocab_size")
    require(type(tokenizer.length) is int and 2 < tokenizer.length <= text_encoder["max_position_embeddings"],
            f"the text_encoder has no places for the tokenizer's {tokenizer.length} tokens")
    require(isinstance(unet["sample_size"], int), f"the sample_size {unet['sample_size']!r} is not a number")
    require(isinstance(scheduler.get("_guidance_scale", 7.5), (int, float)), "the model's _guidance_scale is not a number")
    for key, known in (("prediction_type", ("epsilon", "v_prediction", "sample")), ("beta_schedule", ("scaled_linear",)),
                       ("timestep_spacing", ("leading", "trailing", "linspace"))):
        require(scheduler.get(key, known[0]) in known, f"the {key} {scheduler.get(key)!r} is unknown")

def heads_by_level(unet):
    """The U-Net's number of attention heads for each level, which its config calls attention_head_dim."""
    heads = unet.get("num_attention_heads") or unet["attention_head_dim"]
    return heads if isinstance(heads, list) else [heads] * len(unet["block_out_channels"])

def read_folder(folder):
    """Config, tokenizer and arrays by part from a folder as diffusers writes it, and no digest."""
    def read(name, parse):
        try:
            return parse((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder} is not a whole Stable Diffusion folder: {name}: {error}") from None

    read_json = functools.partial(read, parse=lambda text: {**json.loads(text)})
    config, arrays = {"scheduler": read_json("scheduler/scheduler_config.json")}, {}
    for part, stem in STEMS.items():
        config[part] = read_json(f"{part}/config.json")
        names = [f"{part}/{stem}{end}.safetensors" for end in ("", ".fp16")]
        name = next((name for name in names if (folder / name).exists()), None)
        require(name, f"{folder} is not a whole Stable Diffusion folder: {names[0]} is missing")
        arrays[part] = {todays(name): array for name, array in read_safetensors(folder / name).items()}
        arrays[part].pop("embeddings.position_ids", None)

    settings = read_json("tokenizer/tokenizer_config.json")
    if (folder / "tokenizer/merges.txt").exists():
        vocab, merges = read_json("tokenizer/vocab.json"), read("tokenizer/merges.txt", str.splitlines)
    else:
        model = read_json("tokenizer/tokenizer.json")["model"]
        vocab, merges = model["vocab"], model["merges"]
    merges = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in merges]
    pad = settings.get("pad_token") or Tokenizer.EOS
    length = settings.get("model_max_length", 77)
    length = length if length < 1e6 else config["text_encoder"]["max_position_embeddings"]      # 1e30: none was set
    tokenizer = Tokenizer([merge for merge in merges if len(merge) == 2 and merge[0] != "#version:"], vocab,
                          length, pad if isinstance(pad, str) else pad["content"])
    return config, tokenizer, arrays, ""

def todays(name):
    """A name from a folder of any age as diffusers writes it today."""
    for old, new in (("text_model.", ""), (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."),
                     (".proj_attn.", ".to_out.0.")):
        name = name.replace(old, new)
    return name

def clip_tokenizer(pad=Tokenizer.EOS):
    """CLIP's own, from OpenAI's table of merges, of which it uses the first 48,894."""
    with gzip.open(HERE / "weights" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        return Tokenizer([tuple(line.split()) for line in file.read().split("\n")[1:48895]], pad=pad)


# ── 8. From prompt to picture ─────────────────────────────────────────────────────────────────────── NOTES §8 ──

def encode_prompts(model, texts):
    """The context (len(texts), length, width) of some texts; says on stderr what did not fit."""
    config, rows = model.config["text_encoder"], []
    for text in texts:
        ids, cut = model.tokenizer.encode(text)
        if cut:
            print(f"tiny_sd: the prompt is too long for the model, which does not see: {cut[:200]}{' ...' * (len(cut) > 200)}",
                  file=sys.stderr)
        rows.append(ids)
    activation = ACTIVATIONS[config["hidden_act"]]
    return text_encoder(np.stack(rows), config["num_attention_heads"], activation, **model.text_encoder)

def denoiser(model, context, guidance, beside=None):
    """denoise(x_t, t, ᾱ_t) -> (x̂_0, ε̂), guided if context holds two rows (the negative prompt's, the prompt's) and not one.

    x_t is a NumPy array (pictures, h, w, 4) whatever the library of the model: samplers need no other. beside: further
    channels (pictures, h, w, n), which a model for inpainting sees beside x_t.
    """
    config = model.config["unet"]
    heads, groups = heads_by_level(config), config.get("norm_num_groups", 32)
    kind = model.config["scheduler"].get("prediction_type", "epsilon")

    def denoise(x, t, a):
        def predict(rows):
            n = len(rows)
            seen = x if beside is None else np.concatenate([x, beside], axis=-1)
            words = rows[np.repeat(np.arange(n), len(x))]
            times, scales = np.full((2, n * len(x)), [[t], [guidance]], np.float32)
            pictures = array_like(context, np.concatenate([seen] * n))
            return to_numpy(unet(pictures, times, words, heads, groups, guidance=scales, **model.unet))

        output = by_row(context, predict)
        if len(context) == 2:
            output = guide(*np.split(output, 2), guidance)
        return split_prediction(kind, output, x, a)
    return denoise

def generate(model, prompt, negative="", seeds=(0,), steps=20, guidance=7.5, sampler=None, karras=False, width=None,
             height=None, init=None, strength=0.75, mask=None, denoiser=denoiser):
    """A generator of the latents x_t (len(seeds), h, w, 4) after each step; the last are the pictures', for decode().

    sampler: by default the model's own. A guidance of 1 or less means none: the prompt alone. init: a picture (height,
    width, 3) of uint8 to start from, noised to `strength` of the way; else pure noise. mask: (height, width) of bool,
    where init is to be drawn anew; at strength 1 from pure noise. Give a `denoiser` of your own to see, or change, each guess.
    """
    config, scheduler, channels = model.config["unet"], model.config["scheduler"], model.config["vae"]["latent_channels"]
    sampler, repaints = sampler or model.sampler, config["in_channels"] > channels
    require(mask is not None or not repaints,
            f"{model.name} is a model for inpainting, which needs a picture and a mask (--init-img, --mask)")
    levels = sampling_steps(sampler, steps, scheduler, karras)
    halves = guidance > 1 and not config.get("time_cond_proj_dim")
    context = encode_prompts(model, [negative, prompt] if halves else [prompt])
    streams, sizes = [Noise(seed) for seed in seeds], (height, width) if init is None else init.shape[:2]
    h, w = ((n or config["sample_size"] * model.factor) // model.factor for n in sizes)

    def noise():
        return np.stack([stream(channels, h, w) for stream in streams])

    blank = init is None or mask is not None and strength == 1
    levels = levels if blank else levels[len(levels) - steps_left(steps, strength):]
    require(levels, f"--strength {strength} of {steps} steps leaves no step")
    x_0 = None if blank and (mask is None or repaints) else encode(model, init, noise())
    eps = noise()
    x = pure_noise(eps, levels[0][1], sampler, scheduler) if blank else add_noise(x_0, levels[0][1], eps)
    rest = None if mask is None else noise()        # unused by keep(), but drawn, so that seeds go on as in diffusers
    beside = hidden(model, init, mask, rest) if repaints else None
    path = SAMPLERS[sampler](denoiser(model, context, guidance, beside), x, levels, noise)
    return path if mask is None or repaints else keep(path, levels, ~mask[::model.factor, ::model.factor, None], x_0, eps)

def pure_noise(eps, a, sampler, scheduler):
    """What a sampler begins with, of variance 1; or 1 - ᾱ, as in diffusers, for Euler where its steps begin with the last t."""
    return add_noise(0, a, eps) if "euler" in sampler and timestep_spacing(sampler, scheduler) != "leading" else eps

def hidden(model, picture, mask, noise):
    """What a model for inpainting sees beside x_t: the mask, and the latents of the picture, gray where the mask is."""
    rest = encode(model, np.where(mask[..., None], 127.5, picture), noise)
    hole = np.broadcast_to(mask[::model.factor, ::model.factor, None], (*rest.shape[:3], 1))
    return np.concatenate([hole, rest], axis=-1, dtype=np.float32)

def keep(path, levels, where, x_0, eps):
    """Inpainting with a model that never learnt it: after each step the places to keep are x_0, noised as far as the step."""
    for x, (_, a, _) in zip(path, [*levels[1:], (0, 1.0, 1.0)]):
        np.copyto(x, add_noise(x_0, a, eps), where=where)
        yield x

def steps_left(steps, strength):
    """How many of the steps image-to-image takes; rounded first, since 50 * 0.58 is 28.999999999999996."""
    return min(steps, int(round(steps * strength, 9)))

def encode(model, picture, noise):
    """Scaled latents drawn from q(z | picture); picture (height, width, 3) in 0..255, noise (pictures, h, w, 4)."""
    config = model.config["vae"]
    pixels = array_like(model.vae["quant_conv"]["weight"], picture[None].astype(np.float32) / 127.5 - 1)
    mean, logvar = map(to_numpy, vae_encode(pixels, model.vae, config.get("norm_num_groups", 32)))
    return (mean + np.exp(0.5 * logvar) * noise) * config.get("scaling_factor", 0.18215)

def decode(model, x):
    """Latents (pictures, h, w, 4) to pictures (pictures, height, width, 3) of uint8; UserError if any is not finite."""
    config = model.config["vae"]
    z = array_like(model.vae["quant_conv"]["weight"], x / config.get("scaling_factor", 0.18215))
    groups = config.get("norm_num_groups", 32)
    pixels = np.concatenate([to_numpy(vae_decode(z[i:i + 1], model.vae, groups)) for i in range(len(z))])
    require(np.isfinite(pixels).all(), "the picture is not finite: the weights are not, or --dtype float32 is needed")
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


# ── 9. Command line ───────────────────────────────────────────────────────────────────────────────── NOTES §9 ──

SAMPLER_TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "dpm++2m": "DPM++ 2M",
                  "plms": "PLMS", "lcm": "LCM"}

def read_picture(path, width, height):
    """A picture file as (height, width, 3) uint8: turned upright, transparency on white, resized and cut at the centre."""
    from PIL import Image, ImageOps
    try:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I;16"):     # which Pillow would clip to white
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} is not a picture that can be read: {getattr(error, 'strerror', None) or error}") from None
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)

@contextlib.contextmanager
def whole(path):
    """A name beside `path` for a file, or folder, until it is whole; what is left under that name is taken away."""
    unfinished = path.with_name(f".tiny_sd-{os.getpid()}.part")
    try:
        yield unfinished
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)

def save_picture(pixels, path, parameters):
    """Writes a PNG whole or not at all, under the first free name of out.png, out-1.png, ...; returns that name."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("parameters", parameters)
    with whole(path) as unfinished:
        Image.fromarray(pixels).save(unfinished, "PNG", pnginfo=info)
        for number in itertools.count():
            target = path.with_stem(path.stem + f"-{number}" * (number > 0))
            try:
                os.link(unfinished, target)     # which, unlike a renaming, refuses a name that is taken
            except OSError:
                if os.path.lexists(target):
                    continue
                os.rename(unfinished, target)   # some file systems, of USB sticks for one, know no links
            return target

def parameters_text(args, model, seed, width, height):
    """How the picture was made, in the form that other programs read from a PNG's `parameters`."""
    facts = {"Steps": args.steps, "Sampler": SAMPLER_TITLES[args.sampler] + (" Karras" if args.karras else ""),
             "CFG scale": args.cfg_scale, "Seed": seed, "Size": f"{width}x{height}", "Model hash": model.digest,
             "Model": re.sub("[,:]", " ", model.name), "Denoising strength": args.strength if args.init_img else "",
             "Lora": re.sub("[,:]", " ", " ".join(f"{Path(file).stem} {weight}" for file, weight in args.lora)),
             "RNG": "CPU", "Version": f"tiny_sd {__version__}"}
    line = ", ".join(f"{key}: {value}" for key, value in facts.items() if value != "")
    return f"{args.prompt}\nNegative prompt: {args.negative_prompt}\n{line}"

def lora(text):
    """FILE or FILE:WEIGHT as (file, weight)."""
    file, weight = re.fullmatch(r"(.*?)(?::(-?[\d.]+))?", text, re.DOTALL).groups()
    return file, float(weight or 1)

class Parser(argparse.ArgumentParser):
    """argparse, whose complaints are a UserError too."""
    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")

def option_parser(**settings):
    """The table of options."""
    parser = Parser(description="Draw a picture from a prompt with Stable Diffusion.", allow_abbrev=False, **settings)
    add = parser.add_argument
    add("words", nargs="?", metavar="PROMPT", help="what to draw")
    add("-p", "--prompt", help="the same, as an option")
    add("-n", "--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    add("-m", "--model", default="emoji", metavar="NAME",
        help="a folder, a .safetensors file, a name in weights/, OWNER/NAME on the Hugging Face hub, or sd14, sd15, sd21, "
             "sd21-base, sd-turbo, lcm, tiny (%(default)s)")
    add("--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]", help="a LoRA to add; repeatable")
    add("-o", "--output", type=Path, default=Path("out.png"), help="the PNG to write (%(default)s)")
    add("-s", "--seed", type=int, default=0, help="(%(default)s)")
    add("--prompts", metavar="FILE", help="a picture for each line, which may end in flags of its own; # begins a comment")
    add("--like", metavar="PNG", help="draw that picture again, but for the flags given")
    add("--steps", type=int, help="(20, fewer for distilled models)")
    add("--cfg-scale", "--guidance-scale", type=float, help="how much the prompt is stressed (7.5, or the model's own)")
    add("--sampler", choices=SAMPLERS, help="(the model's own)")
    add("--prediction", choices=("epsilon", "v", "sample"), help="what the U-Net predicts (as the model's config says)")
    add("--karras", action="store_true", help="Karras' spacing of the noise levels")
    add("-W", "--width", type=int, help="in pixels (the model's own size)")
    add("-H", "--height", type=int)
    add("-b", "--batch-size", type=int, default=1, metavar="N", help="pictures, with the seeds seed, seed + 1, ...")
    add("-i", "--init-img", metavar="FILE", help="a picture to start from")
    add("--mask", metavar="FILE", help="a picture, white where the first is to be drawn anew")
    add("--strength", type=float, help="how far to leave it, 0 to 1 (0.75; with a mask 1)")
    add("--preview", type=Path, metavar="PNG", help="a new file, or a preview, to show in small what each step expects")
    add("--backend", choices=("numpy", "torch"), help="numpy, unless a GPU is asked for")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--show", type=Path, metavar="DIR", help="a new folder for pictures of what is computed on the way")
    add("--explain", action="store_true", help="draw nothing: print the prompt's tokens and the model's parts")
    return parser

def parse_arguments(argv, **settings):
    """The command line as a namespace, what is not given in it filled in as far as no model is needed for that."""
    parser = option_parser(**settings)
    args = parser.parse_args(argv)
    if sum(source is not None for source in (args.words, args.prompt, args.prompts)) != 1 and not (
            args.like and args.prompts is None and None in (args.words, args.prompt)):
        parser.error("give one prompt")
    if args.like:
        import formats
        args = parser.parse_args(formats.recorded(args.like) + argv)
    args.prompt, args.negative_prompt = (("--" if text == [] else text).encode(errors="replace").decode() for text in (
        (args.prompt or "") if args.words is None else args.words, args.negative_prompt))
    if args.strength is None:
        args.strength = 0.75 if args.mask is None else 1.0
    args.backend = args.backend or ("numpy" if args.device == "cpu" else "torch")
    check_arguments(args)
    return args

def check_arguments(args):
    """UserError where an option is out of range, does not go with another, or names a folder that cannot be written to."""
    require(args.backend == "torch" or (args.device, args.dtype) == ("cpu", "float32"),
            f"NumPy computes in float32 on the CPU: --device {args.device} --dtype {args.dtype} need --backend torch")
    require(args.steps is None or 1 <= args.steps <= 999, f"--steps {args.steps} is not from 1 to 999")
    require(0 <= args.seed <= 2 ** 64 - args.batch_size, f"--seed {args.seed} is not from 0 to 2^64 - 1")
    require(args.cfg_scale is None or 0 <= args.cfg_scale <= 100, f"--cfg-scale {args.cfg_scale} is not from 0 to 100")
    require(1 <= args.batch_size <= 1000, f"--batch-size {args.batch_size} is not from 1 to 1000")
    require(0 < args.strength <= 1, f"--strength {args.strength} is not above 0 and up to 1")
    require(args.mask is None or args.init_img is not None, "--mask needs --init-img, the picture that it belongs to")
    require(not args.karras or args.sampler in (None, "euler", "euler_a", "dpm++2m"),
            f"--karras does not go with --sampler {args.sampler}")
    require(not args.show or not args.explain, "--explain draws nothing that --show could show")
    require(not args.prompts or not (args.show or args.explain), "--show and --explain take one prompt, not --prompts")
    for option, path in (("output", args.output), ("preview", args.preview or args.output)):
        require(path.suffix.lower() == ".png", f"--{option} {path} does not end in .png")
        require(path.parent.is_dir(), f"there is no folder {path.parent} to write to")
        require(os.access(path.parent, os.W_OK), f"the folder {path.parent} cannot be written to")

def run(argv):
    """Does what the command line asks for."""
    args = parse_arguments(argv)
    if args.show or args.explain or args.preview:
        import show
    film = show.Film(args.show) if args.show else denoiser
    watched = show.previewer(args.preview, film) if args.preview else film
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # of torchrun
    if args.prompts:
        import formats
    jobs = formats.read_prompts(args, argv)[rank::ranks] if args.prompts else [args]
    if not jobs and ranks == 1:
        return print(f"tiny_sd: {args.prompts} has no prompt whose picture is not there yet", file=sys.stderr)
    model = load(args.model, args.backend, args.device, args.dtype, args.lora)
    if args.prediction:
        model.config["scheduler"]["prediction_type"] = args.prediction + "_prediction" * (args.prediction == "v")
    if args.explain:
        default = model.config["unet"]["sample_size"] * model.factor
        return show.explain(model, args.prompt, args.width or default, args.height or default)
    for job in jobs:
        x, seeds = draw(model, job, watched, last=job is jobs[-1])
    if args.show:
        print(film.save(x, args.prompt, seeds))
    if args.prompts and ranks > 1:      # torchrun ends all when one ends
        import torch.distributed as dist
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()

def draw(model, args, watched=denoiser, last=False):
    """Draws and saves the pictures that args ask for; returns their latents and seeds. While the last of all are drawn, the
    model loses each network that has done its work: the rest need the memory."""
    from tqdm import tqdm
    default, (steps, guidance) = model.config["unet"]["sample_size"] * model.factor, model.habits
    width, height = (default if n is None else n for n in (args.width, args.height))
    for name, n in (("width", width), ("height", height)):
        require(n % model.factor == 0 and 2 * model.factor <= n <= 4096,
                f"--{name} {n} is not a multiple of {model.factor} from {2 * model.factor} to 4096")
    args.steps, args.sampler = args.steps or steps, args.sampler or model.sampler
    args.cfg_scale = guidance if args.cfg_scale is None else args.cfg_scale
    vae, unet = (model.config[part]["block_out_channels"] for part in ("vae", "unet"))
    bytes_per_pixel = max(4 * vae[:2][-1], 2 * unet[0] * args.batch_size // model.factor ** 2)     # VAE float32, U-Net float16
    check_memory(3 * bytes_per_pixel * width * height * (args.device == "cpu"), f"--width {width} --height {height}")
    init, mask = (None if file is None else read_picture(file, width, height) for file in (args.init_img, args.mask))
    mask = None if mask is None else mask.mean(axis=-1) > 127.5
    total = args.steps if init is None else steps_left(args.steps, args.strength)
    seeds = [args.seed + k for k in range(args.batch_size)]
    sampling = generate(model, args.prompt, args.negative_prompt, seeds, args.steps, args.cfg_scale, args.sampler, args.karras,
                        width, height, init, args.strength, mask, watched)
    if last:
        model.text_encoder = None
    for x in tqdm(sampling, total=total, unit="step"):
        pass
    if last:
        model.unet = None
    for seed, pixels in zip(seeds, decode(model, x)):
        number = f"-{seed - args.seed:03d}" if len(seeds) > 1 else ""
        path = args.output.with_stem(args.output.stem + number)
        print(save_picture(pixels, path, parameters_text(args, model, seed, width, height)))
    return x, seeds

def main(argv=None):
    """The program: its exit status, 0, 2 after one line that says what is wrong, or 130 after Ctrl-C."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        print(end="", flush=True)       # here, so that it can fail here
    except (UserError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):      # torch's, for want of memory
            raise
        letters = "".join(c if c.isprintable() else " " for c in str(error))
        print("tiny_sd:", " ".join(letters.split())[:2000], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tiny_sd: interrupted", file=sys.stderr)
        return 130
    return 0


# This is all of it; everything else is efficiency: fast.py puts faster forms in the place of the formulas of §1.

sys.modules.setdefault("tiny_sd", sys.modules[__name__])        # for the files beside this one, which import it by its name
if (HERE / "fast.py").exists():
    import fast     # noqa: F401

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")       # a letter that the terminal has not is no reason to fail
    if status := main():
        os._exit(status)        # at once: threads may still be in the middle of a step
