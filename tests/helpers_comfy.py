"""Graphs like those that ComfyUI records in its pictures."""

import copy

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def node(kind, **inputs):
    """A node of a graph; an input "@name" links to the output of that node."""
    return {"class_type": kind, "inputs": {name: [value[1:], 0] if str(value).startswith("@")
                                           else value for name, value in inputs.items()}}


BASE = {
    "model": node("CheckpointLoaderSimple", ckpt_name="some/emoji.safetensors"),
    "size": node("EmptyLatentImage", width=64, height=128, batch_size=1),
    "good": node("CLIPTextEncode", text="a (red:1.3) apple", clip="@model"),
    "bad": node("CLIPTextEncode", text="blue, (dog)", clip="@model"),
    "drawn": node("KSampler", seed=2 ** 40 + 7, steps=20, cfg=6.5, sampler_name="dpmpp_2m",
                  scheduler="karras", denoise=1.0, model="@model", positive="@good",
                  negative="@bad", latent_image="@size"),
    "seen": node("VAEDecode", samples="@drawn", vae="@model"),
    "kept": node("SaveImage", filename_prefix="ComfyUI", images="@seen")}


def graph(links=(), **nodes):
    """BASE with other nodes; links: (node, input, value) to change in them."""
    new = copy.deepcopy(BASE | nodes)
    for name, put, value in links:
        new[name]["inputs"][put] = [value[1:], 0] if str(value).startswith("@") else value
    return {key: part for key, part in new.items() if part}


def write_graph(path, text, size=(64, 128), **more):
    """Write a picture that records the text of a graph, and more texts, {name: text}."""
    info = PngInfo()
    for name, said in ({"prompt": text} | more).items():
        info.add_text(name, said)
    Image.new("RGB", size).save(path, pnginfo=info)
