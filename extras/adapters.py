"""Add LoRAs and similar adapters to a model's weights: small files that change large ones.

An adapter computes ΔW, of the size of a weight W, from few numbers: W + weight * scale * ΔW.

    LoRA      ΔW = B A, of two narrow matrices; scale = alpha / r, where r is the height of A
    LoCon     the same for a convolution, perhaps with a small convolution between the two
    LoHa      ΔW = (B A) * (D C), number by number
    LoKr      ΔW = the Kronecker product of two matrices; each may itself be a product
    full      ΔW itself, and one for the bias; used for norms
    DoRA      any of these, then each output's weights are scaled to a learnt length
    IA3       W times a learnt factor for each output or input

Hu et al., 2021; Hyeon-Woo et al., 2022; Yeh et al., 2024; Liu et al., 2024; Liu et al., 2022.
Programs name them differently. Once every dot is an underscore, a name has a prefix for the
network, W's own name (in the original layout perhaps, for a U-Net), and an ending:

    kohya, LyCORIS    lora_unet_W_lora_down.weight        lora_te_text_model_W.alpha
    peft              unet.W.lora_A.weight                base_model.model.unet.W.lora_B.weight
    older diffusers   unet.W.processor.to_q_lora.up.weight, text_encoder.W.lora_linear_layer.up...
    ComfyUI           diffusion_model.W.lora_A.weight     text_encoders.clip_l.transformer.W...
    cloneofsimo       unet:3:up                           text_encoder:3:down
"""

import json
import math
import re
from pathlib import Path

import numpy as np

from extras.checks import core, first_five
from extras.files import read_text
from extras.singlefile import count, from_original_name
from extras.tensors import kind_of, metadata_of, read_tensors
from tiny_sd import UserError, require, shorten, widen

ENDING = re.compile(
    r"_(?:lora_)?(?:linear_layer_)?(A|down|B|up|mid|magnitude_vector)"
    r"(?:_default(?:_\d+)?)?(?:_(weight|bias))?\Z"
    r"|_(alpha|dora_scale|(?:hada|lokr)_[wt][12](?:_[ab])?|diff|diff_b|w_norm|b_norm|on_input|"
    r"weight)(?:_default(?:_\d+)?)?\Z")
KINDS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b", "up bias": "up_b",
         "B bias": "up_b", "weight": "factor"}
PARTS = {       # {part: pattern of its prefix}; the first match counts
    "text_encoder_2": r"te2_|text_encoder_2_|(text_encoders_)?clip_g_(transformer_)?",
    "text_encoder": r"te1?_|text_encoder_|(text_encoders_)?clip_[lh]_(transformer_)?"
                    r"|(?=text_model_|encoder_layers_)",
    "unet": r"(unet_)?(diffusion_model_)?"}


def module_of(name, n):
    """Return (part, W's name with underscores, without "_weight") for a name without its ending.

    n: ResBlocks per level on the U-Net's way up.
    """
    name = re.sub(r"^(base_model_model_|lora_|lycoris_|model_(?=diffusion))*", "",
                  name.replace(".", "_"))
    part, prefix = next((part, match[0]) for part, pattern in PARTS.items()
                        if (match := re.match(pattern, name)))
    name = name[len(prefix):].removeprefix("text_model_").replace("_processor", "")
    name = re.sub("_to_out$", "_to_out_0", re.sub("_lora$", "", name))
    if part == "unet":
        dotted = re.sub(r"_(?=\d)|(?<=\d)_", ".", name)
        name = from_original_name("unet", f"{dotted}.weight", 0, n).removesuffix(".weight")
    return part, name.replace(".", "_")


def add_adapters(arrays, files):
    """Add adapters, pairs (file, weight), to a model's arrays, in place.

    Return {name: {what: vectors}} of embeddings bundled in the files.
    """
    known = {(part, name.removesuffix(".weight").replace(".", "_")): name.removesuffix(".weight")
             for part in arrays.keys() - {"vae"} for name in arrays[part]
             if name.endswith(".weight")}
    words, n = {}, max(1, count(arrays["unet"], "up_blocks.0.resnets"))
    for path, weight in files:
        require(Path(path).exists(), f"there is no LoRA {path}")
        require(Path(path).is_file(), f"the LoRA {path} is not a file")
        tensors = with_names(path, read_tensors(path), arrays)
        modules = sort_out(path, tensors, known, n, words)
        facts = read_facts(path, tensors)
        for (part, name), entry in modules.items():
            try:
                own = {**facts, **facts.get(f"{part}.", {})}
                add_adapter(arrays[part], name, entry, own, weight)
            except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError,
                    np.linalg.LinAlgError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{path} does not fit the model's {name}.weight: {reason}"
                                ) from None
    return words


def with_names(path, tensors, arrays):
    """Return a file's tensors, naming those that cloneofsimo's program only numbers.

    The numbers follow the order of the layers in a network. Older versions of diffusers put a
    block's gate before cross-attention, and some files leave it out: the shapes tell which order it
    is. A learnt word among them is called <...>.
    """
    numbered, named = {}, {}
    for name, array in tensors.items():
        if match := re.fullmatch(r"(unet|text_encoder):(0|[1-9]\d{,3}):(up|down)", name):
            numbered.setdefault(match[1], {})[int(match[2]), match[3]] = array
        else:
            named[name] = array
    if numbered:
        named = {re.sub(r"^<[^<>.]+>$", r"bundle_emb.\g<0>.emb_params", name): array
                 for name, array in named.items()}
    for part, found in numbered.items():
        given = {(i, side): array.shape[side == "down"] if array.ndim > 1 else None
                 for (i, side), array in found.items()}
        order = next((order for order in orders(part, arrays[part]) if given == {
            (i, side): arrays[part][f"{layer}.weight"].shape[axis] for i, layer
            in enumerate(order) for side, axis in (("up", 0), ("down", 1))}), None)
        require(order, f"{path} does not fit the model: it numbers {len({i for i, _ in found})} "
                f"layers of the {part}, but their shapes are not those of the model's attention")
        named |= {f"{part}.{order[i]}.lora_{side}.weight": array
                  for (i, side), array in found.items()}
    return named


def orders(part, weights):
    """Yield the orders in which a network's layers may be numbered, as lists of names."""
    if part == "text_encoder":
        yield [f"encoder.layers.{i}.self_attn.{name}_proj"
               for i in range(count(weights, "encoder.layers")) for name in ("k", "v", "q", "out")]
        return
    end, gate = ".attn1.to_q.weight", ["ff.net.0.proj"]
    blocks = [name.removesuffix(end) for name in weights if name.endswith(end)]
    blocks.sort(key=lambda name: ("dum".index(name[0]), [*map(int, re.findall(r"\d+", name))]))
    one, two = ([f"attn{i}.to_{name}" for name in ("q", "k", "v", "out.0")] for i in "12")
    for layers in one + gate + two, one + two + gate, one + two:
        yield [f"{block}.{layer}" for block in blocks for layer in layers]


def sort_out(path, tensors, known, n, words):
    """Return {(part, W's name): {what: array}} of a file; UserError if it has anything else.

    known: {what module_of returns: W's name}. words: a dict that gets the embeddings in the file.
    """
    modules, wrong, unknown = {}, [], set()
    for name, array in tensors.items():
        if match := re.fullmatch(r"bundle_emb\.(.+?)\.(?:string_to_param\.)?([^.]+)", name):
            words.setdefault(match[1], {})[match[2]] = widen(array)
            continue
        bare = name.replace(".", "_")
        ending = ENDING.search(bare)
        key = ending and module_of(bare[:ending.start()], n)
        if key in known:
            kind = " ".join(filter(None, ending.groups())).replace(" weight", "")
            target = key[0], known[key]
            modules.setdefault(target, {})[KINDS.get(kind, kind)] = widen(array)
            continue
        pieces = name.split(".")
        rest = next((".".join(pieces[i:]) for i in range(1, len(pieces))
                     if module_of(".".join(pieces[:i]), n) in known), None)
        (wrong.append if rest is None else unknown.add)(rest or name)
        if len(wrong) + len(unknown) > 100:     # the others would take time, and are not named
            break

    kind = kind_of(tensors)
    require(modules or words or kind is None or "LoRA" in kind,
            f"{path} is {kind}, not a LoRA")
    require(modules or wrong or unknown or words, f"{path} is not a LoRA: it has no weights")
    require(not unknown, f"{path} is an unknown kind of adapter: its tensors are called "
            f"{first_five(unknown)}")
    require(not wrong, f"{path} does not fit the model, which has nothing for {first_five(wrong)}")
    return modules


# ── Settings in a file ──────────────────────────────────────────────────────────────────────────

FIXED = {       # fields of peft's configs that change the result, with the only value supported
    "fan_in_fan_out": False, "layer_replication": None, "use_qalora": False, "use_bdlora": None,
    "alora_invocation_tokens": None, "trainable_token_indices": None, "arrow_config": None,
    "modules_to_save": None, "corda_config": None, "velora_config": None, "monteclora_config": None,
    "kasa_config": None}
MOST_PATTERNS = 2000        # each is compared with every module; SDXL's U-Net has 800
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga", "pissa")


def read_facts(path, tensors):
    """Return peft's settings for a file, from its header or from adapter_config.json next to it.

    Settings for one part are under "PART.".
    """
    text, beside = metadata_of(path).get("lora_adapter_metadata"), Path(path).parent
    place = f"{path}: its lora_adapter_metadata"
    if text is None and any(name.startswith("base_model.") for name in tensors):
        place = beside / "adapter_config.json"
        text = read_text(place) if place.exists() else None
    try:
        settings = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise UserError(f"{place} is not JSON") from None
    facts = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        part, _, field = name.rpartition(".")
        (facts.setdefault(f"{part}.", {}) if part else facts)[field] = value
    for fields in [facts, *(value for name, value in facts.items() if name.endswith("."))]:
        for name, value in FIXED.items():
            require(fields.get(name) in (value, None, [], {}), f"{place}: the {name} "
                    f"{shorten(repr(fields.get(name)))} is not supported")
        start = fields.get("init_lora_weights")
        require(start in INITIAL, f"{place}: the init_lora_weights {shorten(repr(start))} is not "
                "supported, as it changes the model")
    return facts


def own_fact(facts, name, module):
    """Return peft's "rank" or "alpha" of a module: from its pattern, or the file's, or None.

    A pattern's key is the end of a module's name or, after ^, the whole name.
    """
    patterns = facts.get(f"{name}_pattern") or {}
    require(isinstance(patterns, dict) and len(patterns) <= MOST_PATTERNS,
            f"its {name}_pattern is not an object of at most {MOST_PATTERNS} modules")
    for key, value in patterns.items():
        bare = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        require(re.fullmatch(r"[\w.]+", bare), f"the {name}_pattern {shorten(repr(key))} is not a "
                "module's name")
        whole = module.removeprefix("text_model.")
        if bare.removeprefix("text_model.") == whole or key[0] != "^" and whole.endswith(
                f".{bare}"):
            return value
    names = {"rank": ["r"], "alpha": ["lora_alpha", "alpha"]}[name]
    return next((facts[name] for name in names if name in facts), None)


# ── Computing ΔW ────────────────────────────────────────────────────────────────────────────────


LARGEST = 2 ** 27       # numbers in a weight; SDXL's have at most half as many


def check_size(n):
    """UserError if the product of small arrays would fill the memory."""
    require(n <= LARGEST, f"its product has {n} numbers")


def matrix(array):
    """Reshape an array (n, ...) to (n, -1)."""
    return array.reshape(len(array), -1)


def product(b, a, middle=None):
    """Return B A, (out, ...), or with a middle M (r, r, height, width) Σ B[i] M[ij] A[j].

    b: (out, r), or (r, out) with a middle; a: (r, ...).
    """
    check_size(matrix(b).shape[0 if middle is None else 1] * matrix(a).shape[1]
               * (1 if middle is None else math.prod(middle.shape[2:])))
    if middle is not None:
        return np.einsum("ij...,ip,jq->pq...", middle, b, matrix(a), optimize=True)
    return (matrix(b) @ matrix(a)).reshape(len(b), *a.shape[1:])


def difference(has):
    """Return (ΔW, r) of an adapter; r is None if ΔW needs no scale."""
    if "down" in has or "up" in has:
        up, down, middle = has["up"], has["down"], has.get("mid")
        require(len(down), "its rank is 0")
        require(up.shape[1] == len(down) and math.prod(up.shape[2:]) == 1,
                f"its LoRA's shapes are {up.shape} and {down.shape}")
        return product(up if middle is None else matrix(up).T, down, middle), len(down)
    if "hada_w1_a" in has:
        one, two = (product(has[f"hada_w{i}_a"], has[f"hada_w{i}_b"], has.get(f"hada_t{i}"))
                    for i in "12")
        require(one.shape == two.shape, f"its LoHa's shapes are {one.shape} and {two.shape}")
        return one * two, len(has["hada_w1_b"])
    if any(name.startswith("lokr") for name in has):
        one, two = (has[f"lokr_w{i}"] if f"lokr_w{i}" in has else
                    product(has[f"lokr_w{i}_a"], has[f"lokr_w{i}_b"], has.get(f"lokr_t{i}"))
                    for i in "12")
        inner = next((has[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in has), None)
        one = one.reshape(*one.shape, *[1] * (two.ndim - one.ndim))
        check_size(one.size * two.size)
        return np.kron(one, two), None if inner is None else len(inner)
    return has.get("diff"), None


def scale_of(has, facts, module, r):
    """Return alpha / r from the adapter itself or from peft's settings; 1 if neither has them."""
    alpha, rank = own_fact(facts, "alpha", module), r or own_fact(facts, "rank", module)
    if "alpha" in has and r:
        require(has["alpha"].size == 1, f"the alpha of {module} is not one number")
        alpha = has["alpha"].item()
    if "diff" in has or alpha is None or rank is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def add_adapter(arrays, module, has, facts, weight):
    """Add an adapter, {what: array}, to the arrays of a module."""
    has = {name: np.asarray(array, np.float32) for name, array in has.items()}
    name, before = f"{module}.weight", widen(arrays[f"{module}.weight"])
    require(has.keys() - {"alpha", "dora_scale", "magnitude_vector", "mid"},
            "it has an alpha or a scale, but nothing to scale")
    with np.errstate(all="ignore"):     # numbers that are not finite are reported below
        delta, r = difference(has)
        scale = weight * scale_of(has, facts, module, r)
        after = before
        if delta is not None:
            flat = "down" not in has and delta.shape == matrix(before).shape
            require(core(delta.shape) == core(before.shape) or flat,
                    f"its shape is {before.shape}, but the LoRA's {delta.shape}")
            if facts.get("init_lora_weights") == "pissa":
                after = before - principal(matrix(before), r).reshape(before.shape)
            after = after + np.float32(scale) * delta.reshape(before.shape)
        if "on_input" in has:
            factor, axis = has["factor"], 1 if has["on_input"].item() else 0
            require(factor.size == before.shape[axis], f"there are {factor.size} factors")
            lies = [-1 if i == axis else 1 for i in range(before.ndim)]
            after = after * (1 + np.float32(weight) * factor.reshape(lies))
        if lengths := [has[name] for name in ("dora_scale", "magnitude_vector") if name in has]:
            after = with_lengths(after, lengths[0], "dora_scale" in has)
        changed = {name: after, **dict(bias_of(arrays, module, has, weight, scale))}
    require(all(np.isfinite(array).all() for array in changed.values()),
            f"with weight {weight} the result is not finite")
    arrays |= changed


def bias_of(arrays, module, has, weight, scale):
    """Yield (name, array) of the module's new bias, if the adapter has one."""
    for kind, factor in ("diff_b", weight), ("up_b", scale):
        if kind in has:
            bias = widen(arrays[f"{module}.bias"])
            require(bias.shape == has[kind].shape, f"the LoRA's bias has shape {has[kind].shape}")
            yield f"{module}.bias", bias + np.float32(factor) * has[kind]


def with_lengths(after, lengths, kohya):
    """Scale the weights of each output (in LyCORIS, or each input) to the learnt lengths."""
    by_input = kohya and lengths.ndim > 1 and len(lengths) == 1 and after.shape[0] != 1
    axis = 1 if by_input else 0
    require(lengths.size == after.shape[axis], f"there are {lengths.size} lengths")
    others = tuple(i for i in range(after.ndim) if i != axis)
    now = np.sqrt((after * after).sum(axis=others, keepdims=True))
    return after * (lengths.reshape(now.shape) / now)


def principal(w, r):
    """Return the best rank-r approximation of a matrix, which PiSSA subtracts from it."""
    u, s, v = np.linalg.svd(np.asarray(w, np.float32), full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r]
