"""Follow ComfyUI where it differs: the graph recorded in a picture, and weights in prompts.

A picture contains the nodes that drew it, as JSON: {id: {"class_type": ..., "inputs": {name:
value}}}. A value that is a list, [id, number], links to an output of another node.
"""

import json
import re
from pathlib import PurePath

import tiny_sd
from extras import prompts
from extras.files import check_record, opened, printable
from tiny_sd import array_like, require, shorten

# ── The graph in a picture ──────────────────────────────────────────────────────────────────────

MOST_NODES, MOST_NETWORKS, MOST_ENDS, MOST_STEPS = 2000, 20, 20, 10_000
FROM = ("images", "image", "pixels", "samples", "latent_image")     # inputs that carry pictures
SAMPLERS, LOADERS = ("KSampler", "KSamplerAdvanced"), ("CheckpointLoaderSimple", "CheckpointLoader")
ENCODERS = ("VAEEncode", "VAEEncodeTiled", "VAEEncodeForInpaint")
KNOWN = {       # nodes that are repeated here, or reported in a line of their own
    *SAMPLERS, *LOADERS, *ENCODERS, "SaveImage", "PreviewImage", "VAEDecode", "VAEDecodeTiled",
    "SetLatentNoiseMask", "LoadImage", "EmptyLatentImage", "LoraLoader", "LoraLoaderModelOnly",
    "VAELoader", "CLIPTextEncode", "CLIPTextEncodeSDXL", "CLIPSetLastLayer", "ControlNetApply",
    "ControlNetApplyAdvanced"}
TEXTS = ("text", "text_g", "string", "value")       # inputs that hold a text
OTHERS = {"uni_pc", "uni_pc_bh2", "lcm"}            # ComfyUI's samplers of these names differ


def read_graph(path):
    """Return the Graph in a picture file; it has no nodes if nothing is recorded."""
    with opened(path) as picture:
        texts, size = [picture.info.get("prompt"), *picture.getexif().values()], picture.size
    texts = [re.sub(r"\A\s*prompt:", "", text, count=1, flags=re.IGNORECASE).strip()
             for text in texts if isinstance(text, str)]
    text = next((text for text in texts if text.startswith("{")), "{}")
    check_record(path, text)
    try:
        nodes = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        nodes = {}
    nodes = {key: node for key, node in nodes.items() if isinstance(node, dict)
             and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)}
    require(len(nodes) <= MOST_NODES, f"{path} records {len(nodes)} nodes: at most {MOST_NODES}")
    return Graph(path, nodes, size)


def of_kinds(nodes, kinds):
    """Return the nodes of these kinds."""
    return [node for node in nodes if node["class_type"] in kinds]


class Graph:
    """The nodes that drew a picture, and its size in pixels."""

    def __init__(self, path, nodes, size):
        self.path, self.nodes, self.size = path, nodes, size

    def source(self, node, names):
        """Return the node linked to an input of one of these names, else to any input, or None."""
        links = {name: self.nodes.get(str(value[0])) for name, value in node["inputs"].items()
                 if isinstance(value, list) and value and isinstance(value[0], (str, int))}
        return next(filter(None, map(links.get, (*names, *links))), None)

    def way(self, node, *names, last=None):
        """Return the nodes found by following inputs of these names back from a node.

        Stop after a node that has an input called `last`.
        """
        passed = {}
        while node and last not in node["inputs"]:
            node = self.source(node, names)
            if not node or id(node) in passed:
                break
            passed[id(node)] = node
        return list(passed.values())

    def value(self, node, *names):
        """Return the text or number of an input of one of these names, following a link."""
        found = next((node["inputs"][name] for name in names if name in node["inputs"]), None)
        if isinstance(found, list):
            other = self.source({"inputs": {"": found}}, ()) or {"inputs": {}}
            found = next((other["inputs"][name] for name in (*names, *TEXTS)
                          if name in other["inputs"]), None)
        return found if isinstance(found, (str, int, float)) else None

    def file(self, node, name):
        """Return the name of the file that a node loads, without its folder."""
        return re.split(r"[/\\]", str(self.value(node, name) or ""))[-1]

    def stem(self, node, name):
        """Return the name of that file without its suffix."""
        return PurePath(self.file(node, name)).stem

    def drawing(self):
        """Return the nodes from the picture back through its sampler to the sampler's input."""
        ends = of_kinds(self.nodes.values(), ("SaveImage", "PreviewImage")) or of_kinds(
            self.nodes.values(), SAMPLERS)
        ways = ([end, *self.way(end, *FROM)] for end in ends[:MOST_ENDS])
        drawn = next((nodes for nodes in ways if of_kinds(nodes, SAMPLERS)), None)
        require(drawn, f"{self.path} records a ComfyUI graph in which no KSampler leads to a "
                       "picture")
        return drawn

    def record(self):
        """Return the prompt, the negative prompt, and {fact: value} as in extras/facts.py.

        Facts that cannot be repeated here have names that facts.FACTS lacks. UserError if no
        sampler leads to the picture.
        """
        drawn = self.drawing()
        *later, sampler = of_kinds(drawn, SAMPLERS)
        start = next(i for i, node in enumerate(drawn) if node is sampler)
        words = [self.way(sampler, name, "conditioning", last="clip")
                 for name in ("positive", "negative")]
        texts = [self.value(nodes[-1], *TEXTS) if nodes else "" for nodes in words]
        texts = [text if isinstance(text, str) else "" for text in texts]
        model, clip = self.way(sampler, "model"), self.way(words[0][-1], "clip") if words[0] else []
        vae = [node for decoder in of_kinds(drawn, ("VAEDecode", "VAEDecodeTiled"))[:1]
               for node in self.way(decoder, "vae")]

        networks = [node for node in words[0] if "control_net" in node["inputs"]]

        passed = [*drawn, *model, *clip, *vae, *words[0], *words[1]]
        unknown = dict.fromkeys(node["class_type"] for node in passed
                                if node["class_type"] not in KNOWN)
        facts = {
            "Version": "ComfyUI", "Empty negative": "encoded",
            **self.beginning(drawn[start + 1:]), **self.sampling(sampler),
            **self.files(model, clip, vae, texts),
            "ControlNet": " ".join(map(self.control, networks[:MOST_NETWORKS])),
            "Nodes": ", ".join(shorten(printable(kind, control=False), 40)
                               for kind in [*unknown][:10])}
        if later:
            goes_on = self.value(later[-1], "add_noise") == "disable"
            facts["Refiner" if goes_on else "Hires"] = later[-1]["class_type"]
        return *texts, {name: str(said) for name, said in facts.items() if said not in ("", None)}

    def sampling(self, sampler):
        """Return the facts of a sampler.

        ComfyUI counts the steps it takes: 20 steps at denoise 0.5 are the last 20 of 40, which
        here are 40 steps at strength 0.5.
        """
        steps, denoise, first = (self.value(sampler, name) for name in (
            "steps", "denoise", "start_at_step"))
        denoise = 1 if denoise is None else denoise
        seed = self.value(sampler, "seed", "noise_seed")
        require({type(steps), type(first or 0), type(seed)} == {int} and 0 < steps <= MOST_STEPS
                and not isinstance(denoise, str) and 1 / MOST_STEPS <= denoise <= 1,
                f"{self.path} records a ComfyUI graph whose steps or seed cannot be read")
        total = int(steps / denoise)
        taken = steps - max(0, first or 0)
        name, schedule = (self.value(sampler, key) for key in ("sampler_name", "scheduler"))
        whole = (self.value(sampler, "add_noise") != "disable"
                 and self.value(sampler, "return_with_leftover_noise") != "enable")
        stride = max(1, 1000 // total)
        uneven = schedule == "ddim_uniform" and len(range(1, 1000, stride)) != total
        return ({"Denoising strength": taken / total} if taken < total else {}) | {
            "Steps": total, "Sampler": name, "Schedule type": schedule,
            "CFG scale": self.value(sampler, "cfg"), "Seed": seed,
            "this version of": name if name in OTHERS or not whole else "",
            "Noise Schedule": schedule if schedule == "beta" or uneven else ""}

    def beginning(self, nodes):
        """Return the facts of a sampler's input, given the nodes before the sampler."""
        facts = {"Size": "{}x{}".format(*self.size)}
        if of_kinds(nodes, ENCODERS):
            facts["Denoising strength"] = 1
        for node in of_kinds(nodes, ("EmptyLatentImage",)):
            number = self.value(node, "batch_size")
            facts["Size"] = f"{self.value(node, 'width')}x{self.value(node, 'height')}"
            facts["one of a batch of"] = "" if number in (None, 1) else number
        for node in of_kinds(nodes, ("SetLatentNoiseMask", "VAEEncodeForInpaint")):
            source = self.source(node, ("mask",))
            facts["Mask"] = self.file(source, "image") if source else "?"
        return facts

    def files(self, model, clip, vae, texts):
        """Return the facts of the files used, given the nodes on the way to each."""
        facts, loras = {}, of_kinds(model, ("LoraLoader", "LoraLoaderModelOnly"))
        for node in of_kinds(model, LOADERS):
            facts["Model"] = self.stem(node, "ckpt_name")
        for node in of_kinds(vae, ("VAELoader",)):
            facts["VAE"] = self.file(node, "vae_name")
        for node in of_kinds(clip, ("CLIPSetLastLayer",))[:1]:
            facts["Clip skip"] = str(self.value(node, "stop_at_clip_layer")).removeprefix("-")
        weights = [[self.value(node, f"strength_{part}") for part in ("model", "clip")]
                   for node in loras]
        names = [self.stem(node, "lora_name") for node in loras]
        facts["Lora"] = " ".join(f"{name} {one}" for name, (one, _) in zip(names, weights))
        facts["LoRA clip"] = ", ".join(name for name, (one, other) in zip(names, weights)
                                       if one != other)
        learnt = dict.fromkeys(re.findall(r"embedding:([^\s,:()]+)", " ".join(texts)))
        facts["TI hashes"] = ", ".join(f"{PurePath(name).stem}:" for name in learnt)
        return facts

    def control(self, node):
        """Return "network strength picture" of a node that applies a ControlNet."""
        loader = self.source(node, ("control_net",))
        pictures = self.way({"inputs": {"image": node["inputs"].get("image")}}, "image")
        said = [loader and self.stem(loader, "control_net_name"), self.value(node, "strength"),
                pictures and self.file(pictures[-1], "image")]
        return " ".join(str(part) for part in said if part)


# ── Weights in prompts ──────────────────────────────────────────────────────────────────────────

ESCAPED = {r"\(": "\1", r"\)": "\2"}


def weighted_parts(text, weight=1.0, depth=0):
    r"""Return [(text, weight), ...] of a prompt; \( and \) are literal brackets.

    (word) weighs 1.1 times as much as the text around it, (word:1.3) always 1.3.
    """
    require(depth < prompts.DEEPEST, f"the prompt nests brackets {depth} deep")
    require(abs(weight) < 1e6, f"the weight of {shorten(repr(text), 30)} in the prompt is beyond "
                               "a million")
    for written, sign in ESCAPED.items():
        text = text.replace(written, sign)
    found = []
    for part in outermost(text):
        if len(part) > 1 and part[0] == "(" and part[-1] == ")":
            inner, _, number = part[1:-1].rpartition(":")
            try:
                inside = inner, float(number if inner else "")
            except ValueError:
                inside = part[1:-1], 1.1 * weight
            found += weighted_parts(*inside, depth + 1)
        else:
            found.append((part.replace("\1", "(").replace("\2", ")"), weight))
    return found


def outermost(text):
    """Split a text before and after its outermost brackets; leave out empty parts."""
    parts, opened, start = [], 0, 0
    for mark in re.finditer("[()]", text):
        before, opened = opened, opened + (1 if mark[0] == "(" else -1)
        if (before, opened) in ((0, 1), (1, 0)):
            end = mark.end() if opened == 0 else mark.start()
            parts.append(text[start:end])
            start = end
    return [part for part in (*parts, text[start:]) if part]


def chunks_of(tokenizer, text):
    """Return the chunks of a prompt, as prompts.chunks_of does.

    A run of fewer than eight tokens of one weight is kept together: if it does not fit, it starts
    the next chunk. A longer run is split.
    """
    prompts.check_length(text)
    room, chunks = tokenizer.length - 2, [[]]
    for part, weight in weighted_parts(text):
        for words in re.split(r"[ \n](?=embedding:)", part):
            ids = tokenizer.tokens(words)
            whole = len(ids) < 8
            while ids:
                left = room - len(chunks[-1])
                n = 0 if whole and len(ids) > left else left
                chunks[-1] += [(i, weight) for i in ids[:n]]
                ids = ids[n:]
                if ids:
                    chunks.append([])
    require(len(chunks) <= 1000, f"the prompt {shorten(repr(text), 30)} has {len(chunks)} chunks: "
                                 "at most 1000")
    return chunks


def embed_prompts(model, texts, skip=None):
    """Like prompts.embed_prompts, but weight as ComfyUI does: z becomes z_0 + w (z - z_0).

    z_0 is the context of the empty prompt at the same position.
    """
    def weigh(model, context, weights):
        empty, _ = tiny_sd.embed_prompts(model, [""], skip)
        return empty + array_like(context, weights)[..., None] * (context - empty)
    return prompts.embed_prompts(model, texts, skip, chunks_of, weigh)
