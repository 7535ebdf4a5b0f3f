"""Procedural outdoor scenes with exactly known labels: a small benchmark for segmentation.

A scene is a pinhole photograph of a flat world. With the camera at height c above the ground, focal
length 1 (in units of the shorter image side) and the horizon at y_0, a point at (X, Y, Z) metres is
seen at

    x = x_0 + X / Z,    y = y_0 + (c - Y) / Z.

Objects are painted far to near as polygons of small integers ("parts") on one map. A table says for
each part its class and its material, so that label map and picture come from the same map: the
labels have no anti-aliased, mixed or missing pixel. The picture is shaded afterwards for all pixels
at once: two colours mixed by noise, stripes, bricks and gradients, then light, shadow, haze, the
blur of a lens and the grain of a sensor.

Colours overlap between the classes on purpose (green houses, white ground, red trees, discs that
are a sun, a ball or a road sign), so that shape and context have to be learnt.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

CLASS_NAMES = (
    "sky",
    "hill",
    "water",
    "ground",
    "road",
    "tree",
    "house",
    "fence",
    "pole",
    "person",
    "ball",
)
PALETTE = (
    (116, 178, 226),
    (142, 122, 158),
    (38, 92, 170),
    (176, 204, 116),
    (98, 94, 102),
    (44, 124, 58),
    (204, 106, 66),
    (232, 196, 98),
    (32, 32, 36),
    (222, 48, 112),
    (250, 240, 60),
)
SKY, HILL, WATER, GROUND, ROAD, TREE, HOUSE, FENCE, POLE, PERSON, BALL = range(len(CLASS_NAMES))
SPLITS = {"train": 0, "val": 1}
MIN_SIDE = 32

Point = tuple[float, float]
Colour = tuple[float, float, float]


class _Draws:
    """Uniform numbers taken from a generator in blocks, since single draws are slow."""

    def __init__(self, generator: np.random.Generator):
        self._generator = generator
        self._block: list[float] = []

    def fork(self) -> "_Draws":
        """A stream for one object: what one object consumes never shifts the next one's numbers."""
        child = _Draws(self._generator)
        child._block = self._generator.random(256).tolist()
        return child

    def unit(self) -> float:
        if not self._block:
            self._block = self._generator.random(1024).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def log_uniform(self, low: float, high: float) -> float:
        return low * (high / low) ** self.unit()

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int((high - low + 1) * self.unit())

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choice(self, options: Sequence):
        return options[int(len(options) * self.unit())]

    def colour(self, hue: Point, saturation: Point, value: Point) -> Colour:
        """An RGB colour in [0, 1] from ranges of hue (taken modulo 1), saturation and value."""
        return colorsys.hsv_to_rgb(
            self.uniform(*hue) % 1.0, self.uniform(*saturation), self.uniform(*value)
        )


@dataclass
class _Material:
    """How a part looks; lengths are in units of the shorter image side.

    The picture shows a + (b - a) * p with p = clip(offset + ramp . (x, y) + grain * white noise +
    mottle * fine noise + cloud * coarse noise + stripe * sin(2 pi (fx x + fy y) + phase) +
    brick * mortar, 0, 1), times light = shade + slope . (x, y).
    """

    a: Colour
    b: Colour
    offset: float = 0.4
    ramp: Point = (0.0, 0.0)
    grain: float = 0.05
    mottle: float = 0.0
    cloud: float = 0.0
    stripe: float = 0.0
    frequency: Point = (0.0, 0.0)
    phase: float = 0.0
    brick: float = 0.0
    shade: float = 1.0
    slope: Point = (0.0, 0.0)
    flat: bool = False

    def row(self) -> tuple[float, ...]:
        delta = (self.b[0] - self.a[0], self.b[1] - self.a[1], self.b[2] - self.a[2])
        return (
            *self.a,
            *delta,
            self.offset,
            *self.ramp,
            self.grain,
            self.mottle,
            self.cloud,
            self.stripe,
            *self.frequency,
            self.phase,
            self.brick,
            self.shade,
            *self.slope,
            float(self.flat),
        )


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


@dataclass
class _World:
    """One scene while it is painted: camera, weather, part map, and the table of its parts."""

    height: int
    width: int
    draws: _Draws
    unit: int = 0
    right: float = 0.0
    bottom: float = 0.0
    horizon: float = 0.0
    centre: float = 0.0
    camera: float = 2.0
    haze: float = 0.0
    haze_colour: Colour = (0.8, 0.8, 0.8)
    light: float = 1.0
    parts: list[tuple[float, ...]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.unit = min(self.height, self.width)
        self.right = self.width / self.unit
        self.bottom = self.height / self.unit
        self.part_map = Image.new("I", (self.width, self.height), 0)
        self.paint = ImageDraw.Draw(self.part_map)
        self.shadow_map = Image.new("L", (self.width, self.height), 0)
        self.shadow_paint = ImageDraw.Draw(self.shadow_map)

    def part(self, label: int, material: _Material, distance: float = 0.0) -> int:
        """Enters a part of class `label` into the table, seen through haze at `distance` metres."""
        if distance:
            share = 1.0 - math.exp(-self.haze * distance)
            material.a = _mix(material.a, self.haze_colour, share)
            material.b = _mix(material.b, self.haze_colour, share)
        self.parts.append(material.row())
        self.classes.append(label)
        return len(self.parts) - 1

    def polygon(self, part: int, points: Sequence[Point]) -> None:
        unit = self.unit
        self.paint.polygon([(x * unit - 0.5, y * unit - 0.5) for x, y in points], fill=part)

    def ellipse(self, part: int, x: float, y: float, rx: float, ry: float) -> None:
        """An ellipse of at least one pixel around (x, y)."""
        unit = self.unit
        x, y, rx, ry = x * unit - 0.5, y * unit - 0.5, rx * unit, ry * unit
        self.paint.ellipse((x - rx, y - ry, x + rx, y + ry), fill=part)

    def bar(self, part: int, start: Point, stop: Point, width: float) -> None:
        """A straight bar from start to stop; never thinner than one pixel."""
        width = max(width, 1.0 / self.unit)
        dx, dy = stop[0] - start[0], stop[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length * width / 2, dx / length * width / 2
        if width * self.unit < 1.5:
            unit = self.unit
            ends = [(x * unit - 0.5, y * unit - 0.5) for x, y in (start, stop)]
            self.paint.line(ends, fill=part, width=1)
            return
        self.polygon(
            part,
            (
                (start[0] + nx, start[1] + ny),
                (stop[0] + nx, stop[1] + ny),
                (stop[0] - nx, stop[1] - ny),
                (start[0] - nx, start[1] - ny),
            ),
        )

    def project(self, x: float, y: float, z: float) -> Point:
        """The image of a point x metres to the right, y above the ground, z ahead."""
        return self.centre + x / z, self.horizon + (self.camera - y) / z

    def ground_at(self, x: float, z: float) -> int:
        """The class that is painted so far where (x, 0, z) is seen, at the nearest pixel."""
        u, v = self.project(x, 0.0, z)
        column = min(max(int(u * self.unit), 0), self.width - 1)
        row = min(max(int(v * self.unit), 0), self.height - 1)
        return self.classes[self.part_map.getpixel((column, row))]

    def shadow(self, x: float, z: float, radius: float, length: float) -> None:
        """Darkens the ground beside an object that stands at (x, z), away from the light."""
        unit = self.unit
        middle = x + self.light * length / 2
        u, v = self.project(middle, 0.0, z)
        rx, ry = (radius + length / 2) / z, max(radius * 0.5 * self.camera / (z * z), 0.004)
        u, v, rx, ry = u * unit, v * unit, rx * unit, ry * unit
        self.shadow_paint.ellipse((u - rx, v - ry, u + rx, v + ry), fill=255)


# Materials ----------------------------------------------------------------------------------------


def _paint_colour(d: _Draws) -> Colour:
    """Any colour people paint things with."""
    if d.chance(0.25):
        return d.colour((0.0, 1.0), (0.0, 0.1), (0.15, 0.97))
    return d.colour((0.0, 1.0), (0.3, 0.95), (0.3, 0.95))


def _ground_material(d: _Draws) -> _Material:
    kind = d.choice(("grass", "grass", "meadow", "sand", "soil", "snow", "field"))
    if kind in ("grass", "meadow", "field"):
        a = d.colour((0.18, 0.36), (0.35, 0.75), (0.3, 0.65))
        b = d.colour((0.12, 0.3), (0.3, 0.7), (0.4, 0.8))
    elif kind == "sand":
        a = d.colour((0.07, 0.14), (0.2, 0.5), (0.65, 0.9))
        b = d.colour((0.07, 0.14), (0.15, 0.4), (0.75, 0.98))
    elif kind == "soil":
        a = d.colour((0.03, 0.1), (0.3, 0.6), (0.25, 0.5))
        b = d.colour((0.05, 0.2), (0.2, 0.5), (0.35, 0.6))
    else:
        a = d.colour((0.55, 0.65), (0.02, 0.12), (0.8, 0.95))
        b = d.colour((0.55, 0.65), (0.0, 0.06), (0.9, 1.0))
    material = _Material(a, b, grain=d.uniform(0.05, 0.3), flat=True)
    material.mottle, material.cloud = d.uniform(0.05, 0.4), d.uniform(0.05, 0.4)
    if kind == "field" or d.chance(0.15):
        material.stripe = d.uniform(0.15, 0.5)
        material.frequency = (d.uniform(0.3, 1.2), d.uniform(-0.2, 0.2))
    return material


def _water_material(d: _Draws, sky: Colour) -> _Material:
    own = d.colour((0.4, 0.65), (0.15, 0.8), (0.25, 0.75))
    a = _mix(own, sky, d.uniform(0.1, 0.8))
    b = _mix(a, (1.0, 1.0, 1.0), d.uniform(0.1, 0.4))
    return _Material(
        a,
        b,
        offset=d.uniform(0.1, 0.4),
        grain=d.uniform(0.02, 0.1),
        cloud=d.uniform(0.0, 0.15),
        mottle=d.uniform(0.0, 0.15),
        stripe=d.uniform(0.08, 0.35),
        frequency=(d.uniform(-0.05, 0.05), d.uniform(0.4, 1.2)),
        flat=True,
    )


def _road_material(d: _Draws) -> _Material:
    if d.chance(0.7):
        a = d.colour((0.5, 0.75), (0.0, 0.12), (0.2, 0.6))
    else:
        a = d.colour((0.03, 0.12), (0.15, 0.5), (0.4, 0.75))
    b = _mix(a, d.choice(((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))), 0.3)
    return _Material(
        a, b, grain=d.uniform(0.05, 0.4), mottle=d.uniform(0.0, 0.2), cloud=0.1, flat=True
    )


def _wall_material(d: _Draws, scale: float) -> _Material:
    """Plaster, boards or bricks; `scale` is the size of a metre on the picture."""
    a = (
        d.colour((0.0, 0.1), (0.2, 0.75), (0.35, 0.9))
        if d.chance(0.5)
        else d.colour((0.0, 1.0), (0.0, 0.6), (0.35, 0.98))
    )
    material = _Material(a, _mix(a, _paint_colour(d), 0.25), grain=0.1, mottle=d.uniform(0.0, 0.2))
    kind = d.choice(("plaster", "boards", "brick"))
    if kind == "boards":
        material.b = _mix(a, (0.0, 0.0, 0.0), 0.35)
        rate = min(d.uniform(1.5, 4.0) / scale, 40.0)
        material.frequency = (rate, 0.0) if d.chance(0.5) else (0.0, rate)
        material.stripe = 0.5
    elif kind == "brick":
        material.b = _mix(a, (0.9, 0.9, 0.88), 0.6)
        material.offset, material.brick = 0.15, 0.7
        rate = min(d.uniform(1.2, 3.0) / scale, 24.0)
        material.frequency = (rate / 2, rate)
    return material


def _leaf_material(d: _Draws) -> _Material:
    season = d.unit()
    if season < 0.6:
        a = d.colour((0.2, 0.42), (0.35, 0.85), (0.15, 0.5))
        b = d.colour((0.17, 0.36), (0.3, 0.8), (0.35, 0.75))
    elif season < 0.85:
        a = d.colour((0.0, 0.1), (0.5, 0.9), (0.35, 0.7))
        b = d.colour((0.05, 0.16), (0.5, 0.9), (0.55, 0.95))
    else:
        a = d.colour((0.85, 1.0), (0.1, 0.5), (0.5, 0.8))
        b = d.colour((0.85, 1.0), (0.05, 0.3), (0.8, 1.0))
    return _Material(a, b, grain=d.uniform(0.25, 0.6), mottle=d.uniform(0.3, 0.7), cloud=0.2)


# Background ---------------------------------------------------------------------------------------


def _draw_sky(w: _World) -> Colour:
    """Fills the whole map with sky and returns the colour near the horizon."""
    d = w.draws
    weather = d.choice(("clear", "clear", "overcast", "dusk", "storm"))
    if weather == "clear":
        top = d.colour((0.53, 0.64), (0.35, 0.85), (0.55, 0.95))
        low = d.colour((0.5, 0.62), (0.05, 0.3), (0.8, 1.0))
    elif weather == "overcast":
        top = d.colour((0.55, 0.65), (0.0, 0.15), (0.6, 0.9))
        low = d.colour((0.1, 0.6), (0.0, 0.1), (0.75, 0.95))
    elif weather == "dusk":
        top = d.colour((0.6, 0.85), (0.2, 0.6), (0.25, 0.7))
        low = d.colour((-0.02, 0.12), (0.3, 0.8), (0.7, 1.0))
    else:
        top = d.colour((0.5, 0.7), (0.1, 0.5), (0.15, 0.4))
        low = d.colour((0.15, 0.6), (0.05, 0.3), (0.4, 0.7))
    rise = 1.0 / max(w.horizon, 0.1)
    part = w.part(
        SKY,
        _Material(
            top,
            low,
            offset=0.0,
            ramp=(0.0, rise),
            grain=0.02,
            cloud=d.uniform(0.0, 0.3),
            mottle=d.uniform(0.0, 0.08),
        ),
    )
    w.paint.rectangle((0, 0, w.width, w.height), fill=part)
    if weather in ("clear", "dusk") and d.chance(0.5):
        shine = d.colour((0.03, 0.17), (0.1, 0.7), (0.9, 1.0))
        disc = w.part(SKY, _Material(shine, (1.0, 1.0, 0.9), grain=0.02, shade=1.1))
        radius = d.uniform(0.02, 0.07)
        w.ellipse(disc, d.uniform(0, w.right), d.uniform(0.03, w.horizon), radius, radius)
    for _ in range(d.integer(0, 4) if weather != "overcast" else 0):
        grey = d.uniform(0.5, 1.0) if weather == "storm" else d.uniform(0.8, 1.0)
        base = _mix((grey, grey, grey), low, 0.4)
        puff = w.part(SKY, _Material(base, (grey, grey, grey), mottle=0.2, cloud=0.4))
        x, y = d.uniform(0, w.right), d.uniform(0.0, w.horizon * 0.8)
        size = d.uniform(0.04, 0.13)
        for _ in range(d.integer(3, 6)):
            rx = size * d.uniform(0.5, 1.3)
            w.ellipse(puff, x, y - d.uniform(0, 0.3) * size, rx, rx * d.uniform(0.3, 0.5))
            x += size * d.uniform(0.4, 0.9)
    return low


def _ridge(d: _Draws, count: int, roughness: float) -> list[float]:
    """Heights in [0, 1] of a ridge at `count` points: midpoint displacement, smooth or jagged."""
    heights = [d.unit(), d.unit(), d.unit()]
    step = 0.5
    while len(heights) < count:
        step *= roughness
        finer = []
        for low, high in pairwise(heights):
            finer += [low, (low + high) / 2 + step * d.uniform(-1.0, 1.0)]
        heights = [*finer, heights[-1]]
    return [min(max(value, 0.02), 1.2) for value in heights]


def _draw_hills(w: _World) -> None:
    d = w.draws
    layers = d.choice((0, 1, 1, 2, 2, 3))
    for layer in range(layers):
        jagged = d.chance(0.5)
        top = w.horizon * d.uniform(0.2, 1.0) * (1.0 - 0.25 * layer)
        heights = _ridge(d, 60, 0.6 if jagged else 0.35)
        step = w.right / (len(heights) - 1)
        crest = [(i * step, w.horizon - top * value) for i, value in enumerate(heights)]
        if d.chance(0.5):
            a = d.colour((0.18, 0.4), (0.2, 0.6), (0.25, 0.6))
        else:
            a = d.colour((0.0, 0.75), (0.05, 0.35), (0.3, 0.75))
        b = _mix(a, d.choice(((1.0, 1.0, 1.0), (0.1, 0.15, 0.1))), d.uniform(0.2, 0.5))
        angle = d.uniform(0.0, math.pi)
        rate = d.uniform(5.0, 18.0)
        material = _Material(
            a,
            b,
            mottle=d.uniform(0.1, 0.45),
            cloud=d.uniform(0.1, 0.4),
            grain=d.uniform(0.0, 0.15),
            stripe=d.choice((0.0, 0.2, 0.4)),
            frequency=(rate * math.cos(angle), rate * math.sin(angle)),
        )
        distance = 60.0 * (layers - layer)
        part = w.part(HILL, material, distance)
        foot = w.horizon + 0.02
        w.polygon(part, [(-0.01, foot), *crest, (w.right + 0.01, foot)])
        if jagged and d.chance(0.5):
            snow = w.part(
                HILL, _Material((0.85, 0.88, 0.95), (1.0, 1.0, 1.0), cloud=0.3), distance / 2
            )
            line = w.horizon - top * d.uniform(0.55, 0.8)
            for (x0, y0), (x1, y1) in pairwise(crest):
                if y0 < line and y1 < line:
                    drop = line + 0.15 * top * math.sin(37.0 * x0)
                    w.polygon(snow, [(x0, y0), (x1, y1), (x1, max(drop, y1)), (x0, max(drop, y0))])


def _draw_ground(w: _World) -> None:
    foot = w.part(GROUND, _ground_material(w.draws))
    w.polygon(
        foot,
        [
            (-0.1, w.horizon),
            (w.right + 0.1, w.horizon),
            (w.right + 0.1, w.bottom + 0.1),
            (-0.1, w.bottom + 0.1),
        ],
    )


def _depths(w: _World, far: float, count: int = 24) -> list[float]:
    """Distances from `far` to the bottom edge, evenly spaced on the picture."""
    low = w.camera / far
    high = w.bottom - w.horizon + 0.05
    return [w.camera / (low + (high - low) * (i / (count - 1)) ** 1.5) for i in range(count)]


def _draw_strip(w: _World, part: int, path: Callable[[float], float], half: float, far: float):
    """A strip of the ground whose middle line is X = path(Z): a road or a river."""
    depths = _depths(w, far)
    left = [w.project(path(z) - half, 0.0, z) for z in depths]
    right = [w.project(path(z) + half, 0.0, z) for z in depths]
    w.polygon(part, left + right[::-1])


def _path(w: _World) -> Callable[[float], float]:
    d = w.draws
    start, heading = d.uniform(-2.5, 2.5), d.uniform(-0.35, 0.35) * w.right
    swing, rate, phase = d.uniform(0.0, 3.0), d.uniform(0.02, 0.15), d.uniform(0.0, 6.3)
    return lambda z: start + heading * z + swing * math.sin(rate * z + phase)


def _draw_water(w: _World, sky: Colour) -> None:
    d = w.draws
    part = w.part(WATER, _water_material(d, sky))
    kind = d.choice(("sea", "lake", "lake", "river"))
    if kind == "sea":
        shore = w.horizon + (w.bottom - w.horizon) * d.uniform(0.1, 0.75)
        tilt, wave = d.uniform(-0.08, 0.08), d.uniform(0.0, 0.03)
        edge = []
        for i in range(25):
            x = w.right * i / 24
            y = shore + tilt * (x - w.right / 2) + wave * math.sin(9.0 * x + 40.0 * wave)
            edge.append((x, max(y, w.horizon + 0.01)))
        w.polygon(part, [(-0.1, w.horizon), (w.right + 0.1, w.horizon), *edge[::-1]])
    elif kind == "river":
        _draw_strip(w, part, _path(w), d.uniform(1.0, 4.0), 150.0)
    else:
        drop = (w.bottom - w.horizon) * d.uniform(0.12, 0.6)
        z = w.camera / drop
        x = d.uniform(-0.5, 0.5) * w.right * z
        rx, rz = z * d.uniform(0.25, 0.8), z * d.uniform(0.3, 0.6)
        shape = []
        for i in range(28):
            angle = 2 * math.pi * i / 28
            reach = 1.0 + 0.15 * math.sin(3 * angle + 50.0 * drop)
            shape.append(
                w.project(x + rx * reach * math.cos(angle), 0.0, z + rz * reach * math.sin(angle))
            )
        w.polygon(part, shape)


def _draw_road(w: _World) -> None:
    d = w.draws
    material = _road_material(d)
    part = w.part(ROAD, material)
    path, half = _path(w), d.uniform(0.9, 3.0)
    if d.chance(0.12):
        depth = w.camera / ((w.bottom - w.horizon) * d.uniform(0.15, 0.7))
        near = max(depth - half * 1.5, 0.45 * depth)
        ends = [w.project(0.0, 0.0, depth + half * 1.5), w.project(0.0, 0.0, near)]
        (_, top), (_, low) = ends
        w.polygon(part, [(-0.1, top), (w.right + 0.1, top), (w.right + 0.1, low), (-0.1, low)])
        return
    _draw_strip(w, part, path, half, 200.0)
    if d.chance(0.6):
        white = d.choice(((0.95, 0.95, 0.92), (0.9, 0.8, 0.3)))
        mark = w.part(ROAD, _Material(white, material.a, offset=0.1, grain=0.2, flat=True))
        dash = d.uniform(1.0, 3.0)
        for i in range(12):
            z0 = 1.2 + 2 * dash * i
            z1 = z0 + dash
            quad = [
                w.project(path(z) + side * 0.07, 0.0, z)
                for z, side in ((z0, -1), (z0, 1), (z1, 1), (z1, -1))
            ]
            if (quad[1][0] - quad[0][0]) * w.unit > 0.7:
                w.polygon(mark, quad)


# Objects: each takes the world and the place (x, z) of its foot -----------------------------------


def _draw_tree(w: _World, x: float, z: float) -> None:
    d = w.draws
    kind = d.choice(("round", "round", "conifer", "poplar", "bush"))
    tall = d.log_uniform(0.6, 1.6) if kind == "bush" else d.log_uniform(2.5, 8.0)
    u, foot = w.project(x, 0.0, z)
    scale = 1.0 / z
    h = tall * scale
    w.shadow(x, z, 0.25 * tall, 0.3 * tall)
    leaf_material = _leaf_material(d)
    leaf_material.slope = (-w.light * 0.5 / max(h, 0.05), -0.3 / max(h, 0.05))
    leaf_material.shade = 1.0 - leaf_material.slope[0] * u - leaf_material.slope[1] * (foot - h / 2)
    leaf = w.part(TREE, leaf_material, z)
    bark = None
    if kind != "bush":
        brown = d.colour((0.02, 0.12), (0.1, 0.6), (0.15, 0.6))
        bark = w.part(
            TREE,
            _Material(
                brown,
                _mix(brown, (0.0, 0.0, 0.0), 0.5),
                grain=0.3,
                stripe=0.3,
                frequency=(min(4.0 * z, 40.0), 0.0),
            ),
            z,
        )
        lean = d.uniform(-0.05, 0.05) * h
        w.bar(bark, (u, foot), (u + lean, foot - 0.6 * h), h * d.uniform(0.04, 0.09))
        u += lean
    if kind == "conifer":
        tiers, half = d.integer(2, 4), h * d.uniform(0.18, 0.3)
        base = foot - h * d.uniform(0.08, 0.25)
        for i in range(tiers):
            low = base - (base - foot + h) * i / tiers
            peak = max(low - 1.5 * (base - foot + h) / tiers, foot - h)
            wide = half * (1.0 - 0.75 * i / tiers)
            w.polygon(leaf, [(u - wide, low), (u + wide, low), (u, peak)])
        return
    if kind == "poplar":
        rx, ry, middle = 0.13 * h, 0.42 * h, foot - 0.56 * h
    elif kind == "bush":
        rx, ry, middle = h * d.uniform(0.5, 0.9), 0.55 * h, foot - 0.5 * h
    else:
        rx, ry = h * d.uniform(0.26, 0.45), h * d.uniform(0.24, 0.34)
        middle = foot - h + ry
    count = d.integer(14, 30)
    rough = d.uniform(0.05, 0.22)
    crown = []
    for i in range(count):
        angle = 2 * math.pi * i / count
        reach = 1.0 + d.uniform(-rough, rough)
        crown.append((u + rx * reach * math.cos(angle), middle + ry * reach * math.sin(angle)))
    w.polygon(leaf, crown)
    if kind == "round" and d.chance(0.25) and h > 0.25:
        # Gaps in the crown show the trunk's branches only: what is behind stays hidden.
        for _ in range(3):
            tip = (u + rx * d.uniform(-0.7, 0.7), middle + ry * d.uniform(-0.5, 0.2))
            w.bar(bark, (u, foot - 0.45 * h), tip, 0.012 * h)


def _draw_house(w: _World, x: float, z: float) -> None:
    d = w.draws
    scale = 1.0 / z
    wide, tall, roof = d.uniform(3.0, 8.0), d.uniform(2.4, 6.0), d.uniform(0.8, 2.5)
    u0, foot = w.project(x - wide / 2, 0.0, z)
    u1 = u0 + wide * scale
    eave, peak = foot - tall * scale, foot - (tall + roof) * scale
    w.shadow(x, z, wide / 2, 1.5)
    wall_material = _wall_material(d, scale)
    side_material = _Material(**vars(wall_material))
    side_material.shade = d.uniform(0.55, 0.8) if w.light > 0 else d.uniform(1.0, 1.2)
    roof_colour = d.choice(
        (
            d.colour((0.0, 0.07), (0.3, 0.8), (0.3, 0.75)),
            d.colour((0.5, 0.7), (0.0, 0.3), (0.15, 0.5)),
            _paint_colour(d),
        )
    )
    top_material = _Material(
        roof_colour,
        _mix(roof_colour, (0.0, 0.0, 0.0), 0.4),
        stripe=d.choice((0.0, 0.3, 0.5)),
        frequency=(0.0, min(d.uniform(2.0, 4.0) * z, 40.0)),
        grain=0.15,
        mottle=0.15,
    )
    wall, top = w.part(HOUSE, wall_material, z), w.part(HOUSE, top_material, z)
    # The side that the camera sees is the one towards the middle of the picture.
    side = 1.0 if (u0 + u1) / 2 < w.centre else -1.0
    corner = u1 if side > 0 else u0
    deep = side * wide * scale * d.uniform(0.15, 0.5)
    rise = (foot - w.horizon) * d.uniform(0.1, 0.25)
    flat = w.part(HOUSE, side_material, z)
    w.polygon(
        flat,
        [
            (corner, foot),
            (corner + deep, foot - rise),
            (corner + deep, eave + rise * 0.1),
            (corner, eave),
        ],
    )
    w.polygon(wall, [(u0, foot), (u1, foot), (u1, eave), (u0, eave)])
    eaves = 0.25 * scale
    style = d.choice(("gable", "hip", "flat", "shed"))
    if style == "gable":
        middle = (u0 + u1) / 2
        w.polygon(
            top,
            [
                (middle, peak),
                (corner + side * eaves, eave),
                (corner + deep, eave + rise * 0.1),
                (middle + deep, peak + rise * 0.1),
            ],
        )
        w.polygon(wall, [(u0, eave), (u1, eave), (middle, peak)])
        w.bar(top, (u0 - eaves, eave + eaves / 2), (middle, peak), 0.25 * scale)
        w.bar(top, (u1 + eaves, eave + eaves / 2), (middle, peak), 0.25 * scale)
    elif style == "flat":
        band = 0.4 * scale
        w.polygon(
            top,
            [
                (u0 - eaves, eave - band),
                (u1 + eaves, eave - band),
                (u1 + eaves, eave),
                (u0 - eaves, eave),
            ],
        )
    else:
        inset = wide * scale * (0.2 if style == "hip" else 0.02)
        ends = sorted((u0, u1, corner + deep))
        w.polygon(
            top,
            [
                (ends[0] - eaves, eave),
                (ends[0] + inset, peak),
                (ends[2] - inset, peak),
                (ends[2] + eaves, eave),
            ],
        )
    if style != "flat" and d.chance(0.4):
        stack = w.part(HOUSE, _wall_material(d, scale), z)
        at = u0 + (u1 - u0) * d.uniform(0.2, 0.8)
        w.bar(stack, (at, eave - roof * scale * 0.4), (at, peak - 0.5 * scale), 0.5 * scale)
    glass = d.choice(((0.15, 0.2, 0.3), (0.95, 0.85, 0.5), (0.6, 0.75, 0.9), (0.1, 0.1, 0.1)))
    door_colour = _paint_colour(d)
    columns, floors = d.integer(2, 4), max(1, int(tall / 2.6))
    entrance = d.integer(0, columns - 1)
    if scale * w.unit < 2.0:
        return
    pane = w.part(HOUSE, _Material(glass, _mix(glass, (1, 1, 1), 0.3), cloud=0.3), z)
    door = w.part(HOUSE, _Material(door_colour, door_colour), z)
    pitch = (u1 - u0) / columns
    half = min(0.5 * scale, 0.3 * pitch)
    for floor in range(floors):
        sill = foot - (floor * tall / floors + 0.9) * scale
        for column in range(columns):
            middle = u0 + pitch * (column + 0.5)
            opening, low, high = pane, sill, sill - 1.1 * scale
            if floor == 0 and column == entrance:
                opening, low, high = door, foot, foot - 2.0 * scale
            w.polygon(
                opening,
                [
                    (middle - half, high),
                    (middle + half, high),
                    (middle + half, low),
                    (middle - half, low),
                ],
            )


def _draw_fence(w: _World, x: float, z: float) -> None:
    d = w.draws
    tall, long = d.uniform(0.8, 1.8), d.uniform(4.0, 14.0)
    turn = d.uniform(-0.8, 0.8)
    far = max(z + long * math.sin(turn), 1.2)
    ends = (x - long / 2, x + long * math.cos(turn) - long / 2)
    style = d.choice(("pickets", "pickets", "rails", "wall"))
    colour = d.choice((d.colour((0.03, 0.12), (0.1, 0.6), (0.3, 0.9)), _paint_colour(d)))
    material = _Material(colour, _mix(colour, (0, 0, 0), 0.3), grain=0.15, mottle=0.1)
    if style == "wall":
        material = _wall_material(d, 1.0 / z)
    part = w.part(FENCE, material, z)

    def at(share: float, height: float) -> Point:
        # Linear in 1/Z, which keeps the points evenly spaced on the picture.
        depth = 1.0 / ((1.0 - share) / z + share / far)
        along = (depth - z) / (far - z) if abs(far - z) > 1e-6 else share
        return w.project(ends[0] + (ends[1] - ends[0]) * along, height, depth)

    if style == "wall":
        w.polygon(part, [at(0, 0), at(1, 0), at(1, tall), at(0, tall)])
        return
    rails = (0.3, 0.75) if style == "pickets" else d.choice(((0.4, 0.9), (0.3, 0.6, 0.95)))
    thick = 0.07 if style == "pickets" else 0.12
    for height in rails:
        quad = [at(0, tall * height), at(1, tall * height)]
        quad += [at(1, tall * height + thick), at(0, tall * height + thick)]
        w.polygon(part, quad)
    count = int(long / (d.uniform(0.25, 0.45) if style == "pickets" else d.uniform(1.2, 2.0)))
    width = (d.uniform(0.1, 0.16) if style == "pickets" else 0.15) / z
    for i in range(count + 1):
        w.bar(part, at(i / count, 0.0), at(i / count, tall), width)


def _draw_pole(w: _World, x: float, z: float) -> None:
    d = w.draws
    tall, scale = d.uniform(2.5, 6.5), 1.0 / z
    u, foot = w.project(x, 0.0, z)
    colour = d.choice(
        (
            d.colour((0.0, 1.0), (0.0, 0.15), (0.1, 0.9)),
            d.colour((0.03, 0.1), (0.3, 0.6), (0.2, 0.5)),
        )
    )
    post = w.part(POLE, _Material(colour, _mix(colour, (0, 0, 0), 0.4), grain=0.1), z)
    w.shadow(x, z, 0.12, 1.0)
    head = foot - tall * scale
    width = d.uniform(0.1, 0.22) * scale
    w.bar(post, (u, foot), (u, head), width)
    style = d.choice(("lamp", "lamp", "sign", "wires", "lantern"))
    if style == "lamp":
        reach = d.choice((-1.0, 1.0)) * d.uniform(0.7, 1.6) * scale
        w.bar(post, (u, head), (u + reach, head - 0.1 * scale), 0.7 * width)
        w.ellipse(post, u + reach, head, 0.3 * scale, 0.13 * scale)
    elif style == "sign":
        face = _paint_colour(d)
        board = w.part(POLE, _Material(face, _mix(face, (1, 1, 1), 0.5), offset=0.1), z)
        radius = d.uniform(0.3, 0.55) * scale
        if d.chance(0.5):
            w.ellipse(board, u, head, radius, radius)
        else:
            w.polygon(
                board,
                [
                    (u - radius, head - radius),
                    (u + radius, head - radius),
                    (u + radius, head + radius),
                    (u - radius, head + radius),
                ],
            )
    elif style == "wires":
        for drop in (0.15, 0.7):
            y = head + drop * scale
            w.bar(post, (u - 0.8 * scale, y), (u + 0.8 * scale, y), 0.7 * width)
    else:
        glow = w.part(POLE, _Material((1.0, 0.95, 0.75), (1.0, 1.0, 1.0)), z)
        w.ellipse(glow, u, head, 0.25 * scale, 0.3 * scale)


def _draw_person(w: _World, x: float, z: float) -> None:
    d = w.draws
    tall = d.uniform(1.1, 1.95)
    u, foot = w.project(x, 0.0, z)
    h = tall / z
    w.shadow(x, z, 0.25, 0.8)
    cloth, legs = _paint_colour(d), _paint_colour(d)
    skin = d.colour((0.03, 0.09), (0.25, 0.65), (0.3, 0.95))
    angle = d.uniform(0.0, math.pi)
    rate = min(d.uniform(6.0, 14.0) / max(h, 0.1), 40.0)
    shirt = w.part(
        PERSON,
        _Material(
            cloth,
            _paint_colour(d),
            offset=0.15,
            stripe=d.choice((0.0, 0.0, 0.5)),
            frequency=(rate * math.cos(angle), rate * math.sin(angle)),
        ),
        z,
    )
    trousers = w.part(PERSON, _Material(legs, _mix(legs, (0, 0, 0), 0.3), mottle=0.2), z)
    face = w.part(PERSON, _Material(skin, skin), z)
    stride = d.uniform(0.03, 0.16) * h
    hip, neck = foot - 0.47 * h, foot - 0.84 * h
    w.bar(trousers, (u - stride, foot), (u - 0.04 * h, hip), 0.1 * h)
    w.bar(trousers, (u + stride, foot), (u + 0.04 * h, hip), 0.1 * h)
    reach, lift = d.uniform(0.08, 0.26) * h, d.uniform(-0.05, 0.38) * h
    w.bar(shirt, (u - 0.1 * h, neck + 0.04 * h), (u - 0.1 * h - reach, hip - lift), 0.065 * h)
    w.bar(shirt, (u + 0.1 * h, neck + 0.04 * h), (u + 0.1 * h + reach, hip - lift / 2), 0.065 * h)
    w.polygon(
        shirt,
        [
            (u - 0.13 * h, neck),
            (u + 0.13 * h, neck),
            (u + 0.1 * h, hip + 0.04 * h),
            (u - 0.1 * h, hip + 0.04 * h),
        ],
    )
    w.ellipse(face, u, foot - 0.92 * h, 0.065 * h, 0.08 * h)
    if d.chance(0.5):
        hair = w.part(PERSON, _Material(_paint_colour(d), (0.1, 0.08, 0.05)), z)
        w.polygon(
            hair,
            [
                (u - 0.075 * h, foot - 0.94 * h),
                (u + 0.075 * h, foot - 0.94 * h),
                (u + 0.05 * h, foot - 1.01 * h),
                (u - 0.05 * h, foot - 1.01 * h),
            ],
        )


def _draw_ball(w: _World, x: float, z: float) -> None:
    d = w.draws
    radius = d.log_uniform(0.2, 0.9)
    in_air = d.chance(0.3)
    if in_air:
        u, v = d.uniform(0, w.right), d.uniform(0.0, w.horizon)
        r = d.log_uniform(0.02, 0.11)
        z = min(radius / r, 60.0)
    else:
        u, v = w.project(x, radius, z)
        r = radius / z
        w.shadow(x, z, radius, radius)
    a, b = _paint_colour(d), d.choice((_paint_colour(d), (1.0, 1.0, 1.0)))
    angle = d.uniform(0.0, math.pi)
    rate = min(d.uniform(0.5, 1.5) / r, 40.0)
    slope = (-w.light * 0.3 / r, -0.35 / r)
    material = _Material(
        a,
        b,
        offset=d.uniform(0.0, 0.5),
        stripe=d.choice((0.0, 0.5, 0.9)),
        frequency=(rate * math.cos(angle), rate * math.sin(angle)),
        phase=d.uniform(0.0, 6.3),
        slope=slope,
        shade=0.95 - slope[0] * u - slope[1] * v,
    )
    part = w.part(BALL, material, z)
    w.ellipse(part, u, v, r, r)
    if in_air:
        w.bar(part, (u, v + r), (u + d.uniform(-0.01, 0.01), v + 1.5 * r), 0.0)
    elif r * w.unit > 4:
        gleam = w.part(BALL, _Material(_mix(a, (1, 1, 1), 0.7), (1, 1, 1)), z)
        w.ellipse(gleam, u - w.light * 0.35 * r, v - 0.4 * r, 0.16 * r, 0.16 * r)


_OBJECTS = (
    (_draw_tree, 0.26, 3.0),
    (_draw_house, 0.11, 8.5),
    (_draw_fence, 0.13, 3.0),
    (_draw_pole, 0.14, 2.5),
    (_draw_person, 0.21, 1.9),
    (_draw_ball, 0.15, 1.6),
)
# Where an object does not stand.
_AVOIDS = {
    _draw_tree: (WATER, ROAD),
    _draw_house: (WATER, ROAD),
    _draw_fence: (WATER,),
    _draw_pole: (WATER,),
}


def _pick_object(d: _Draws) -> tuple[Callable[[_World, float, float], None], float]:
    pick = d.unit()
    for draw, share, nearest in _OBJECTS:
        pick -= share
        if pick < 0:
            return draw, nearest
    return draw, nearest


def _draw_objects(w: _World) -> None:
    """Paints trees, houses, fences, poles, persons and balls from far to near."""
    d = w.draws
    area = w.right * w.bottom
    count = min(max(int(d.uniform(4, 17) * area), 3), 400)
    placed = []
    for _ in range(count):
        draw, nearest = _pick_object(d)
        steepest = max(w.bottom - w.horizon, 0.1) * 1.1
        drop = d.log_uniform(0.04, steepest)
        z = max(w.camera / drop, nearest)
        x = (d.uniform(-0.05, 1.05) * w.right - w.centre) * z
        own = d.fork()
        if w.ground_at(x, z) not in _AVOIDS.get(draw, ()):
            placed.append((z, x, draw, own))
    if d.chance(0.25):
        # A row of trees, poles or houses along a line into the depth.
        draw = d.choice((_draw_tree, _draw_pole, _draw_house))
        side, gap = d.uniform(2.0, 6.0) * d.choice((-1.0, 1.0)), d.uniform(4.0, 9.0)
        for i in range(d.integer(3, 7)):
            placed.append((4.0 + gap * (i + 1), side, draw, d.fork()))
    for z, x, draw, own in sorted(placed, key=lambda item: -item[0]):
        w.draws = own
        draw(w, x, z)
    w.draws = d


# Shading ------------------------------------------------------------------------------------------


def _noise(
    generator: np.random.Generator, height: int, width: int, cells: float, unit: int
) -> np.ndarray:
    """(height, width) float32 smooth noise with about `cells` cells on the shorter side."""
    rows = max(int(cells * height / unit), 1) + 2
    columns = max(int(cells * width / unit), 1) + 2
    grid = generator.standard_normal((rows, columns), dtype=np.float32)
    smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def _shade(w: _World, parts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Turns the part map into a picture.

    Args:
        w: the painted world, with its table of materials.
        parts: (H, W) int32 part of each pixel.
        generator: source of the noise.

    Returns:
        (3, H, W) uint8 picture.
    """
    d = w.draws
    height, width, unit = w.height, w.width, w.unit
    coarse = _noise(generator, height, width, d.uniform(2.0, 5.0), unit)
    fine = _noise(generator, height, width, d.uniform(18.0, 36.0), unit)
    white = generator.standard_normal((height, width), dtype=np.float32)

    table = np.ascontiguousarray(np.array(w.parts, dtype=np.float32).T)
    (
        *base,
        change_r,
        change_g,
        change_b,
        offset,
        ramp_x,
        ramp_y,
        grain,
        mottle,
        cloud,
        stripe,
        rate_x,
        rate_y,
        phase,
        brick,
        shade,
        slope_x,
        slope_y,
        flat,
    ) = table
    x = ((np.arange(width, dtype=np.float32) + 0.5) / unit)[None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / unit)[:, None]

    mix = offset[parts]
    mix += ramp_x[parts] * x
    mix += ramp_y[parts] * y
    mix += grain[parts] * white
    mix += mottle[parts] * fine
    mix += cloud[parts] * coarse

    # On the ground (x, y) are metres, so that furrows and waves converge at the horizon; they fade
    # where the picture could no longer resolve them.
    on_ground = flat[parts] > 0
    below = np.maximum(y - w.horizon, np.float32(1e-3))
    depth = w.camera / below
    texture_x = np.where(on_ground, (x - w.centre) * depth, x)
    texture_y = np.where(on_ground, depth * 2.0, y)
    rate_x, rate_y = rate_x[parts], rate_y[parts]
    fade = np.clip(below * below * (8.0 / w.camera), 0.0, 1.0)
    wave = np.sin(
        np.float32(2 * math.pi) * (rate_x * texture_x + rate_y * texture_y) + phase[parts]
    )
    wave *= stripe[parts]
    mix += np.where(on_ground, wave * fade, wave)

    bricks = brick[parts]
    at = np.nonzero(bricks)
    if at[0].size:
        course = rate_y[at] * y[at[0], 0]
        row = np.floor(course)
        along = rate_x[at] * x[0, at[1]] + 0.5 * (row % 2)
        joint = (course - row < 0.22) | (along - np.floor(along) < 0.12)
        mix[at] += bricks[at] * joint
    np.clip(mix, 0.0, 1.0, out=mix)

    light = shade[parts]
    light += slope_x[parts] * x
    light += slope_y[parts] * y
    np.clip(light, 0.35, 1.35, out=light)
    shadow = np.asarray(w.shadow_map) > 0
    light *= np.where(shadow & on_ground, np.float32(d.uniform(0.45, 0.85)), np.float32(1.0))
    dim, tilt_x, tilt_y = d.uniform(0.65, 1.25), d.uniform(-0.2, 0.2), d.uniform(-0.15, 0.15)
    light *= dim + tilt_x * (x / w.right - 0.5) + tilt_y * (y / w.bottom - 0.5)

    picture = np.empty((3, height, width), dtype=np.float32)
    tint = [d.uniform(0.9, 1.1) for _ in range(3)]
    changes = (change_r, change_g, change_b)
    for channel in range(3):
        plane = changes[channel][parts]
        plane *= mix
        plane += base[channel][parts]
        plane *= light
        plane *= tint[channel]
        picture[channel] = plane
    # A lens spreads a point over its neighbours: a three-tap blur along both axes.
    blur = d.uniform(0.0, 0.25)
    padded = np.pad(picture, ((0, 0), (1, 1), (0, 0)), mode="edge")
    picture *= 1.0 - 2.0 * blur
    picture += blur * (padded[:, :-2] + padded[:, 2:])
    padded = np.pad(picture, ((0, 0), (0, 0), (1, 1)), mode="edge")
    picture *= 1.0 - 2.0 * blur
    picture += blur * (padded[:, :, :-2] + padded[:, :, 2:])
    sensor = generator.standard_normal((3, height, width), dtype=np.float32)
    sensor *= d.uniform(0.0, 0.04)
    picture += sensor
    np.clip(picture, 0.0, 1.0, out=picture)
    picture *= 255.0
    picture += 0.5
    return picture.astype(np.uint8)


def draw_scene(
    size: tuple[int, int], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one scene.

    Args:
        size: (H, W) in pixels, at least 32 each; geometry scales with the shorter side.
        generator: source of every random choice.

    Returns:
        picture: (3, H, W) uint8.
        labels: (H, W) uint8 index into CLASS_NAMES of every pixel.
    """
    height, width = size
    # Geometry and noise have generators of their own: a scene keeps its shapes at every resolution.
    shapes, noise = generator.spawn(2)
    draws = _Draws(shapes)
    w = _World(height, width, draws)
    w.horizon = w.bottom * draws.uniform(0.22, 0.6)
    w.centre = w.right * draws.uniform(0.3, 0.7)
    w.camera = draws.log_uniform(1.4, 4.0)
    w.light = draws.choice((-1.0, 1.0))
    w.haze = draws.choice((0.0, 0.004, 0.01, 0.025))
    low_sky = _draw_sky(w)
    w.haze_colour = low_sky
    _draw_hills(w)
    _draw_ground(w)
    if draws.chance(0.5):
        _draw_water(w, low_sky)
    if draws.chance(0.6):
        _draw_road(w)
    _draw_objects(w)
    parts = np.asarray(w.part_map)
    labels = np.array(w.classes, dtype=np.uint8)[parts]
    return _shade(w, parts, noise), labels


class Scenes(Dataset):
    """Procedural scenes: `dataset[i]` is a picture and the exact class of each of its pixels.

    A scene depends on (seed, split, index, size) alone, never on workers, threads or order (and, as
    far as single pixels go, on how the installed Pillow rounds the edge of a polygon).

    Args:
        count: number of scenes.
        size: (H, W) in pixels, or one int for a square; at least 32. The same scene is drawn at
            every size of one aspect ratio.
        seed: non-negative; another seed gives other scenes.
        split: "train" or "val"; the two never share a scene.

    Raises:
        ValueError: a count, size, seed or split outside of what is listed above.
        TypeError: count, size or seed that are not whole numbers.
    """

    class_names = CLASS_NAMES
    palette: ClassVar[list[list[int]]] = [list(colour) for colour in PALETTE]
    num_classes = len(CLASS_NAMES)
    ignore_index = 255

    def __init__(
        self,
        count: int = 1000,
        size: tuple[int, int] | int = (128, 128),
        seed: int = 0,
        split: str = "train",
    ):
        height, width = size if isinstance(size, Sequence) and len(size) == 2 else (size, size)
        for name, value in (("count", count), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for value in (height, width):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"size must be an int or (H, W) of ints, got {size!r}")
        if count < 0:
            raise ValueError(f"count must be 0 or more, got {count}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"size must be at least {MIN_SIDE} on both sides, got {size}")
        if split not in SPLITS:
            raise ValueError(f'split must be "train" or "val", got {split!r}')
        self.count = int(count)
        self.size = (int(height), int(width))
        self.seed = int(seed)
        self.split = split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws scene `index`.

        Args:
            index: 0 to count - 1; negative ones count from the end.

        Returns:
            image: (3, H, W) uint8.
            target: (H, W) uint8 class of each pixel; 255 never occurs.

        Raises:
            IndexError: index outside of the dataset.
        """
        position = index + self.count if index < 0 else index
        if not 0 <= position < self.count:
            raise IndexError(f"scene {index} asked for, but there are {self.count}")
        sequence = np.random.SeedSequence([self.seed, SPLITS[self.split], int(position)])
        image, target = draw_scene(self.size, np.random.default_rng(sequence))
        return torch.from_numpy(image), torch.from_numpy(target)

    def __repr__(self) -> str:
        return (
            f"Scenes(count={self.count}, size={self.size}, seed={self.seed}, split={self.split!r})"
        )
