"""Colours, media and painted surroundings: what is done to drawings and to whole pictures.

Pictures here are floats (height, width, 3) from 0 to 1. A medium is a function of the picture and
of how much of each pixel the drawings cover, (height, width, 1); surroundings are functions of a
side in pixels and a random generator. All lengths grow with the side.
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np

# ── Colours ─────────────────────────────────────────────────────────────────────────────────────

GREY = np.array([0.3, 0.59, 0.11], np.float32)


def lightness(x):
    return (x @ GREY)[..., None]


def ramp(light, colour, low=0.2, high=0.85):
    """Shades of a colour: low c at lightness 0, c at 0.5, 0.15 c + 0.85 at 1."""
    dark = low + (1 - low) * np.minimum(light * 2, 1)
    bright = high * np.maximum(light * 2 - 1, 0)
    return colour * dark * (1 - bright) + bright


def repaint(drawing, colour):
    """An RGBA drawing, premultiplied uint8, in shades of one colour (0 to 255) instead."""
    rgba = drawing.astype(np.float32) / 255
    alpha = rgba[..., 3:]
    light = lightness(rgba[..., :3]) / np.maximum(alpha, 1e-3)
    light = (light - (light * alpha).sum() / max(alpha.sum(), 1e-3) + 0.5).clip(0, 1)
    rgb = ramp(light, np.float32(colour) / 255) * alpha
    return (np.concatenate([rgb, alpha], -1) * 255 + 0.5).astype(np.uint8)


# ── Media ───────────────────────────────────────────────────────────────────────────────────────

def shifted_by(x, dy, dx):
    """x moved by so many pixels, its edge repeated."""
    h, w = x.shape[:2]
    return x[np.arange(dy, h + dy).clip(0, h - 1)][:, np.arange(dx, w + dx).clip(0, w - 1)]


def edges(x, strength=1.8):
    """How strongly the grey picture changes at each pixel, from 0 to 1."""
    n, grey = x.shape[0] // 64, lightness(x)
    dy = (shifted_by(grey, n, 0) - shifted_by(grey, -n, 0)) / 2
    dx = (shifted_by(grey, 0, n) - shifted_by(grey, 0, -n)) / 2
    return (strength * np.sqrt(dy * dy + dx * dx)).clip(0, 1)


def outlines(picture):
    """The edges of a picture (height, width, 3) of uint8: lines, white on black, (height, width).

    They are about a thirtieth of its height wide.
    """
    return (255 * edges(picture / np.float32(255), 4)[..., 0] + 0.5).astype(np.uint8)


def blur(x, n):
    """Means over n pixels to each side, twice."""
    for _ in range(2):
        for axis in (0, 1):
            x = sum(shifted_by(x, *((k, 0) if axis == 0 else (0, k)))
                    for k in range(-n, n + 1)) / (2 * n + 1)
    return x


@functools.cache
def grain(side, cells=32, seed=0):
    """Smooth random values around 0, (side, side, 1), always the same."""
    values = np.random.default_rng(seed).standard_normal((cells, cells, 1)).astype(np.float32)
    return blur(values.repeat(side // cells, 0).repeat(side // cells, 1), side // 64)


def mix(x, colour, share):
    return x * (1 - share) + np.float32(colour) / 255 * share


def sketch(x, cover):
    return mix(np.ones_like(x), (35, 35, 35), edges(x))


def blueprint(x, cover):
    return mix(np.full_like(x, 1) * (np.float32([30, 70, 160]) / 255), (245, 245, 245), edges(x))


def neon(x, cover):
    e = edges(x)
    hue = x / np.maximum(x.max(-1, keepdims=True), 1e-3)
    return np.float32([10, 8, 25]) / 255 * (1 - e) + e * hue


def pixel_art(x, cover):
    side = x.shape[0]
    small = x.reshape(16, side // 16, 16, side // 16, 3).mean((1, 3))
    return (np.round(small * 6) / 6).repeat(side // 16, 0).repeat(side // 16, 1)


def black_and_white(x, cover):
    return np.broadcast_to(lightness(x), x.shape)


def silhouette(x, cover):
    return mix(x, (15, 15, 20), cover)


def watercolor(x, cover):
    soft = blur(x, x.shape[0] // 32)
    soft = 0.35 + 0.65 * soft + 0.07 * grain(x.shape[0])
    return (soft - 0.15 * edges(x)).clip(0, 1)


def crayon(x, cover):
    marks = 0.5 + 0.9 * grain(x.shape[0], 64, 1)
    colour = mix(x, (255, 255, 255), (0.55 * marks).clip(0, 1))
    return mix(colour, (60, 50, 50), 0.7 * edges(x))


def sticker(x, cover):
    n = x.shape[0] // 21
    ring = [(round(n * np.sin(a)), round(n * np.cos(a))) for a in np.arange(0, 6.28, 0.5)]
    border = np.max([shifted_by(cover, *way) for way in ring], 0)
    shadow = shifted_by(blur(border, n), -n // 2, 0)
    ground = mix(np.full_like(x, 0.72), (90, 90, 100), 0.5 * shadow)
    return mix(ground, (255, 255, 255), border) * (1 - cover) + x * cover


def woodcut(x, cover):
    side = x.shape[0]
    lines = 0.5 + 0.35 * np.sin(np.arange(side) * (2 * np.pi * 16 / side))[:, None, None]
    inked = 1 / (1 + np.exp((lightness(x) - 0.25 - 0.5 * lines) * 25))
    ink = np.maximum(inked, edges(x, 4))
    return mix(np.full_like(x, 1) * (np.float32([240, 228, 200]) / 255), (30, 25, 20), ink)


def old_photo(x, cover):
    side = np.linspace(-1, 1, x.shape[0], dtype=np.float32)
    vignette = 1 - 0.35 * (side[:, None] ** 2 + side ** 2)[..., None]
    return (0.1 + 0.85 * lightness(x)) * np.float32([1.0, 0.86, 0.64]) * vignette


def comic(x, cover):
    flat = np.round(blur(x, x.shape[0] // 64) * 3) / 3
    return mix(flat, (10, 10, 10), edges(x, 4))


def material(colour, grains):
    def medium(x, cover):
        light = lightness(x)
        light = light - (light * cover).sum() / max(cover.sum(), 1e-3) + 0.5
        light = (0.5 + 1.2 * (light - 0.5) + grains(x.shape[0])).clip(0, 1)
        return x * (1 - cover) + ramp(light, np.float32(colour) / 255, 0.25) * cover
    return medium


def wood_grain(side):
    y = np.arange(side)[:, None, None] / side
    return 0.12 * np.sin(60 * y + 3 * grain(side, 8, 2)).astype(np.float32)


def upside_down(x, cover):
    return x[::-1]


MEDIA = {"sketch": sketch, "blueprint": blueprint, "neon": neon, "pixel art": pixel_art,
         "black and white": black_and_white, "silhouette": silhouette, "watercolor": watercolor,
         "crayon": crayon, "sticker": sticker, "woodcut": woodcut, "old photo": old_photo,
         "comic": comic, "wood": material((165, 105, 55), wood_grain),
         "stone": material((140, 138, 132), lambda side: 0.2 * grain(side, 64, 3)),
         "ice": material((120, 195, 240), lambda side: 0.08 * grain(side, 16, 4)),
         "upside down": upside_down}


# ── Surroundings ────────────────────────────────────────────────────────────────────────────────
# Each paints (side, side, 3); the thing's feet stand at about 0.9 of the height.

def axes(side):
    """x and y of the pixels' centres, from 0 to 1: (1, side, 1) and (side, 1, 1)."""
    c = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return c[None, :, None], c[:, None, None]


def shade(side, top, bottom):
    """From one colour down to another."""
    _, y = axes(side)
    return np.broadcast_to(mix(np.float32(top) / 255, bottom, y), (side, side, 3)).copy()


def soft(distance, side):
    """1 inside (below 0), 0 outside, with an edge of a pixel."""
    return (0.5 - distance * side).clip(0, 1)


def disc(side, cx, cy, r):
    x, y = axes(side)
    return soft(np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - r, side)


def hills(side, rng, height, rough=0.04):
    """1 below a wavy line at this height."""
    x, y = axes(side)
    line = height + sum(
        rough / k * np.sin(2 * np.pi * (k * x * rng.uniform(0.6, 1.4) + rng.random()))
        for k in (1, 2, 3))
    return soft(line - y, side)


def dots(side, rng, n, radius, below=1.0):
    """Small discs at random, above a height."""
    out = np.zeros((side, side, 1), np.float32)
    for _ in range(n):
        out = np.maximum(out, disc(side, rng.random(), rng.random() * below,
                                   radius * rng.uniform(0.6, 1.3)))
    return out


def night(side, rng):
    x = shade(side, (10, 14, 50), (40, 45, 100))
    x = mix(x, (255, 255, 235), 0.9 * dots(side, rng, 22, 0.009, 0.7))
    cx, cy = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2)
    moon = disc(side, cx, cy, 0.09) * (1 - disc(side, cx + 0.05, cy - 0.03, 0.08))
    return mix(mix(x, (250, 240, 190), moon), (18, 28, 40), hills(side, rng, 0.82, 0.02))


def sunset(side, rng):
    x = shade(side, (90, 60, 140), (255, 150, 50))
    x = mix(x, (255, 225, 120), disc(side, rng.uniform(0.2, 0.8), 0.68, 0.15))
    return mix(x, (70, 40, 60), hills(side, rng, 0.8, 0.02))


def beach(side, rng):
    x = shade(side, (110, 190, 245), (200, 235, 250))
    x = mix(x, (255, 240, 120), disc(side, rng.choice([0.12, 0.88]), 0.12, 0.08))
    _, y = axes(side)
    x = mix(x, (40, 140, 200), soft(rng.uniform(0.45, 0.55) - y + 0 * x[..., :1], side))
    return mix(x, (240, 215, 150), hills(side, rng, 0.72, 0.02))


def under_water(side, rng):
    x, (u, v) = shade(side, (60, 170, 215), (10, 50, 120)), axes(side)
    rays = 0.12 * np.maximum(np.sin(14 * (u + 0.4 * v) + 6 * rng.random()), 0) * (1 - v)
    x = mix(x, (220, 250, 255), rays)
    bubbles = dots(side, rng, 12, 0.022)
    x = mix(x, (190, 235, 250), 0.6 * bubbles)
    return mix(x, (200, 180, 120), 0.8 * hills(side, rng, 0.9, 0.02))


def snow(side, rng):
    x = mix(shade(side, (165, 190, 220), (215, 228, 240)), (245, 249, 255),
            hills(side, rng, 0.68, 0.04))
    return x


def rain(side, rng):
    x = shade(side, (95, 105, 120), (150, 160, 172))
    clouds = np.maximum.reduce([disc(side, c, rng.uniform(0.0, 0.1), 0.15)
                                for c in np.arange(0, 1.1, 0.18)])
    return mix(mix(x, (70, 78, 92), clouds), (90, 105, 100), hills(side, rng, 0.84, 0.01))


def space(side, rng):
    x = mix(shade(side, (8, 6, 24), (24, 12, 48)), (120, 60, 160),
            0.35 * blur(disc(side, rng.random(), rng.random(), 0.3), side // 16))
    x = mix(x, (255, 255, 255), dots(side, rng, 34, 0.009))
    hue = rng.choice([(220, 140, 80), (110, 160, 220), (200, 110, 130)])
    return mix(x, hue, disc(side, rng.choice([0.1, 0.9]), rng.choice([0.12, 0.85]), 0.12))


def moon(side, rng):
    x = mix(shade(side, (5, 5, 15), (20, 20, 35)), (255, 255, 255), dots(side, rng, 20, 0.009, 0.6))
    earth = disc(side, rng.choice([0.15, 0.85]), 0.16, 0.1)
    x = mix(x, (70, 130, 220), earth)
    ground = hills(side, rng, 0.66, 0.02)
    x = mix(x, (175, 175, 180), ground)
    return mix(x, (130, 130, 138), ground * dots(side, rng, 40, 0.045))


def triangle(side, cx, top, bottom, width):
    u, v = axes(side)
    return soft(np.maximum(np.abs(u - cx) - width * (v - top) / (bottom - top), v - bottom), side)


def forest(side, rng):
    x = shade(side, (170, 215, 225), (215, 235, 205))
    x = mix(x, (70, 130, 60), hills(side, rng, 0.74, 0.02))
    for cx in np.sort(rng.random(11)):
        top, foot = rng.uniform(0.05, 0.3), rng.uniform(0.72, 0.82)
        x = mix(x, (95, 65, 40), box(side, cx - 0.012, foot - 0.02, cx + 0.012, foot + 0.05))
        green = (rng.uniform(20, 50), rng.uniform(80, 130), rng.uniform(40, 70))
        x = mix(x, green, triangle(side, cx, top, foot, 0.12))
    return x


def box(side, left, top, right, bottom):
    u, v = axes(side)
    return soft(np.maximum(np.maximum(left - u, u - right), np.maximum(top - v, v - bottom)), side)


def desert(side, rng):
    x = mix(shade(side, (120, 190, 240), (235, 225, 190)), (255, 235, 120),
            disc(side, rng.uniform(0.1, 0.9), 0.14, 0.09))
    x = mix(x, (225, 180, 105), hills(side, rng, 0.6, 0.06))
    x = mix(x, (240, 200, 125), hills(side, rng, 0.76, 0.04))
    cx = rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.8, 0.95)])
    for left, top, right, bottom in (
            (-.02, .42, .02, .72), (-.09, .5, -.055, .6), (-.09, .57, 0, .61),
            (.055, .47, .09, .56), (0, .53, .09, .57)):     # a cactus
        x = mix(x, (60, 130, 70), box(side, cx + left, top, cx + right, bottom))
    return x


def city(side, rng):
    x = shade(side, (130, 185, 235), (225, 235, 240))
    left = -0.05
    while left < 1:
        width, top = rng.uniform(0.12, 0.22), rng.uniform(0.12, 0.5)
        grey = rng.uniform(90, 170) * np.array([1, 1, 1.08])
        house = box(side, left, top, left + width - 0.01, 0.86)
        x = mix(x, grey, house)
        u, v = axes(side)
        windows = (np.sin(u * 100) > 0.1) * (np.sin(v * 80) > 0.1) * box(
            side, left + 0.02, top + 0.03, left + width - 0.03, 0.8)
        x = mix(x, (250, 225, 140), 0.75 * windows.astype(np.float32))
        left += width
    return mix(x, (95, 95, 100), box(side, -1, 0.82, 2, 2))


def field(side, rng):
    x = shade(side, (120, 190, 245), (205, 235, 250))
    x = mix(x, (110, 185, 75), hills(side, rng, 0.6, 0.05))
    x = mix(x, (90, 170, 65), hills(side, rng, 0.76, 0.03))
    cloud = np.maximum.reduce([disc(side, rng.uniform(0.1, 0.9) + d, 0.15, 0.07)
                               for d in (-0.07, 0, 0.07)])
    x = mix(x, (255, 255, 255), cloud)
    hue = [(250, 230, 80), (240, 90, 110), (255, 255, 255)][rng.integers(3)]
    flowers = dots(side, rng, 26, 0.018) * hills(side, np.random.default_rng(0), 0.72, 0)
    return mix(x, hue, flowers)


def room(side, rng):
    wall = [(235, 215, 190), (190, 215, 225), (215, 225, 190), (230, 195, 195)][rng.integers(4)]
    x = np.full((side, side, 3), 1, np.float32) * (np.float32(wall) / 255)
    cx = rng.choice([0.2, 0.8])
    x = mix(x, (255, 255, 255), box(side, cx - 0.15, 0.1, cx + 0.15, 0.46))
    x = mix(x, (150, 205, 245), box(side, cx - 0.13, 0.12, cx + 0.13, 0.44)
            - box(side, cx - 0.01, 0.12, cx + 0.01, 0.44))
    x = mix(x, (165, 115, 70), box(side, -1, 0.74, 2, 2))
    return mix(x, (245, 245, 240), box(side, -1, 0.72, 2, 0.75))


def fire(side, rng):
    x = shade(side, (45, 15, 15), (130, 35, 10))
    return flames(x, rng, 11, 0.25, 0.95)


def flames(x, rng, n, low, high):
    """Tongues of fire that rise from the lower edge."""
    side, seed = x.shape[0], int(rng.integers(1000))
    u, v = axes(side)
    for colour, share in (((225, 60, 15), 1.0), ((255, 140, 20), 0.72), ((255, 225, 90), 0.42)):
        inner = np.random.default_rng(seed)
        for cx in np.linspace(0, 1, n):
            height = share * inner.uniform(low, high)
            up = ((1.02 - v) / height).clip(0, 1)
            width = 0.085 * share ** 0.5 * np.sqrt(1 - up) * (0.4 + up) * 1.6
            bend = cx + 0.03 * np.sin(8 * v + 20 * inner.random())
            x = mix(x, colour, soft(np.maximum(np.abs(u - bend) - width, 1.02 - height - v), side))
    return x


def darkened(x):
    return x * np.float32([0.72, 0.76, 0.92])


def warmed(x):
    return x * np.float32([1.0, 0.85, 0.75])


def drowned(x):
    return mix(x, (20, 110, 180), 0.2)


def snowed(x, rng):
    return mix(x, (255, 255, 255), dots(x.shape[0], rng, 38, 0.017))


def rained(x, rng):
    u, v = axes(x.shape[0])
    lanes = np.floor(u * 24 + v * 5)
    offset = np.modf(np.sin(lanes * 12.9898) * 43758.5)[0]
    drops = np.modf(np.abs(v * 3 + offset + rng.random()))[0] < 0.4
    thin = np.abs(np.modf(u * 24 + v * 5)[0] - 0.5) < 0.14
    return mix(mix(x, (110, 120, 140), 0.15), (200, 220, 245), 0.75 * (drops & thin))


def burnt(x, rng):
    return flames(x, rng, 8, 0.12, 0.4)


class Surroundings(NamedTuple):
    """How a place is painted, what it does to the drawings, and what comes in front of them."""
    paint: object
    alter: object = None
    front: object = None


SURROUNDINGS = {
    "at night": Surroundings(night, alter=darkened),
    "at sunset": Surroundings(sunset, alter=warmed),
    "on the beach": Surroundings(beach), "under water": Surroundings(under_water, alter=drowned),
    "in the snow": Surroundings(snow, front=snowed),
    "in the rain": Surroundings(rain, front=rained),
    "in space": Surroundings(space), "on the moon": Surroundings(moon),
    "in the forest": Surroundings(forest), "in the desert": Surroundings(desert),
    "in the city": Surroundings(city), "in a field": Surroundings(field),
    "in a room": Surroundings(room), "on fire": Surroundings(fire, front=burnt)}
FLOATING = {"in space", "under water"}
VARIANTS = 64


@functools.lru_cache(None)
def surroundings(name, variant, side):
    """One of VARIANTS paintings of a place, (side, side, 3) of uint8."""
    rng = np.random.default_rng([variant, zlib.crc32(name.encode())])
    return (SURROUNDINGS[name].paint(side, rng) * 255 + 0.5).clip(0, 255).astype(np.uint8)
