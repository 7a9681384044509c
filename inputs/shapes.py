"""THE WORLD: coloured shapes with exact captions, and a reader that says whether a picture obeys.

    meaning   what a caption says: "two red circles above a blue square"
    scene     things at places that obey it, drawn anti-aliased at any size
    detect    picture → the things in it; obeys: do they fit the meaning?

So that prompt following can be measured exactly, in minutes, without a download. The six tags are
GenEval's (Ghosh et al. 2023, 2310.11513): single_object, two_object, counting, colors, position,
color_attr; "combined" captions mix them and are trained on, not scored.

Some colour x shape pairs, some relations, and some wordings are never trained on (see held_out), so
a score on prompts from there measures what was understood, not what was remembered. A World is as
rich as the machine can learn: a few shapes at 20 pixels on a CPU, all of them at 256 on a cluster.

Lengths are shares of the picture's side; y grows downwards. Item i depends on (seed, i) alone.
Imports nothing of ours.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# In an order in which small ones are well told apart: a circle of 3 pixels is almost a square.
SHAPES = ("square", "cross", "ring", "triangle", "star", "circle")
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (245, 225, 50),
    "white": (250, 250, 250),
    "purple": (140, 50, 190),
    "cyan": (60, 220, 230),
    "orange": (250, 140, 20),
    "pink": (250, 140, 200),
    "brown": (130, 80, 45),
}
PALETTE = np.array(list(COLORS.values()), float)  # (colours, 3)
SIZES = {"small": 0.14, "large": 0.19}  # radius
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
EDGE = 0.03  # of the picture's side, at least, between a thing and the picture's edge
CLEAR = 1.2  # a relation is drawn at least so many times as far along its axis as across it
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# Training draws from these. Counting comes twice: no other captions say "three" or "four", and
# guidance, which leads away from the picture without words, easily draws one thing too many.
TRAINED = (*TAGS, "combined", "counting")
COUNTS = ("no", "one", "two", "three", "four")
MAX_WORDS = 12  # no caption is longer
NAMED = 0.5  # share of the captions of training that name each colour; see name_colors


class World(NamedTuple):
    """How rich the pictures are: the first so many SHAPES and COLORS, on a square of `size` pixels.

    `places` x `places` points at which things may stand; size is every pixel.
    Raises ValueError from `checked` for a world that cannot be drawn or read.
    """

    size: int = 32
    shapes: int = len(SHAPES)
    colors: int = len(COLORS)
    places: int = 32

    @classmethod
    def of(cls, facts: dict) -> "World":
        """That of a run, by its facts. ValueError if there is none."""
        return cls(*(facts[name] for name in cls._fields)).checked()

    def checked(self) -> "World":
        if self.size < 20:
            raise ValueError(f"shapes on {self.size} pixels cannot be told apart, use at least 20")
        if not 2 <= self.shapes <= len(SHAPES):
            raise ValueError(f"a world has 2 to {len(SHAPES)} shapes, not {self.shapes}")
        if not 3 <= self.colors <= len(COLORS):
            raise ValueError(f"a world has 3 to {len(COLORS)} colours, not {self.colors}")
        if not 10 <= self.places <= self.size:
            raise ValueError(f"a world of {self.size} pixels has 10 to {self.size} places a side")
        # Or draw_scene would look for a layout for ever: two large things, one above the other.
        radius = SIZES["large"]
        points = np.arange(self.places) / self.places + 0.5 / self.size
        points = points[(points >= radius + EDGE) & (points <= 1 - radius - EDGE)]
        along = points[-1] - points[0]
        across = (points - points[0])[points - points[0] <= along / CLEAR].max()
        if along**2 + across**2 <= least_gap(radius, radius) ** 2:
            raise ValueError(
                f"in {self.places} places a side of {self.size} pixels two large things have no"
                f" room: give --places {self.size}"
            )
        return self


FULL = World()

# ------------------------------------------------------------------------------------------------
# Meaning and caption
# ------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """`count` things alike; color and size None where the caption leaves them open."""

    count: int
    shape: str
    color: str | None = None
    size: str | None = None


class Meaning(NamedTuple):
    """One or two groups, and where the first lies as seen from the second.

    Caption and picture are both made from it, so each picture obeys its caption exactly, and what
    the caption leaves open (colours, sizes, places) is drawn at random.
    """

    tag: str
    groups: tuple[Group, ...]
    relation: str | None = None


def pick(rng: np.random.Generator, options) -> str:
    return list(options)[rng.integers(len(options))]


def draw_meaning(rng: np.random.Generator, tag: str, world: World = FULL) -> Meaning:
    """A random meaning of one tag."""
    shapes, palette = SHAPES[: world.shapes], list(COLORS)[: world.colors]

    first, second = (shapes[i] for i in rng.permutation(len(shapes))[:2])
    colors = [palette[i] for i in rng.permutation(len(palette))[:2]]
    if tag == "single_object":
        return Meaning(tag, (Group(1, first),))
    if tag == "two_object":
        return Meaning(tag, (Group(1, first), Group(1, second)))
    if tag == "counting":
        return Meaning(tag, (Group(int(rng.integers(1, 5)), first),))
    if tag == "colors":
        return Meaning(tag, (Group(1, first, colors[0]),))
    if tag == "position":
        return Meaning(tag, (Group(1, first), Group(1, second)), pick(rng, RELATIONS))
    if tag == "color_attr":
        return Meaning(tag, (Group(1, first, colors[0]), Group(1, second, colors[1])))
    if tag == "combined":
        two = rng.random() < 0.5
        counts = (int(rng.integers(1, 3)), 1)[: 1 + two]
        sized = sum(counts) <= 2 and rng.random() < 0.5  # three large things would hardly fit
        groups = tuple(
            Group(count, shape, color, pick(rng, SIZES) if sized else None)
            for count, shape, color in zip(counts, (first, second), colors, strict=False)
        )
        return Meaning(tag, groups, pick(rng, RELATIONS) if two and rng.random() < 0.7 else None)
    raise ValueError(f"tag {tag!r} must be one of {', '.join(TAGS)} or combined")


def name_colors(meaning: Meaning, rng: np.random.Generator, world: World) -> Meaning:
    """A colour for each group that has none, so that its caption says more.

    Four of the six tags leave colours open. A network has more to learn from a picture whose
    caption names what is in it (docs/recipes.md), so half of the training is on such captions.
    """
    order = rng.permutation(world.colors)  # two groups get two colours
    named = (
        g if g.color else g._replace(color=list(COLORS)[k])
        for g, k in zip(meaning.groups, order, strict=False)
    )
    return meaning._replace(groups=tuple(named))


def write_caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """One of several wordings of a meaning."""

    def phrase(group: Group) -> str:
        count = pick(rng, ("a", "one")) if group.count == 1 else COUNTS[group.count]
        words = [count, group.size, group.color, group.shape]
        plural = "" if group.count == 1 else "es" if group.shape == "cross" else "s"
        return " ".join(w for w in words if w) + plural

    phrases = [phrase(group) for group in meaning.groups]
    if meaning.relation in ("left of", "right of"):
        middle = pick(rng, (f" {meaning.relation} ", f" to the {meaning.relation} "))
    elif meaning.relation is not None:
        middle = f" {meaning.relation} "
    else:
        middle = pick(rng, (" and ", " with "))
    caption = middle.join(phrases)
    opening = pick(rng, ("", "a picture of ", "an image of ", "this shows "))
    fits = len((opening + caption).split()) <= MAX_WORDS
    return opening + caption if fits else caption


def held_out(meaning: Meaning, caption: str) -> bool:
    """Whether training never sees it: its colour x shape pair, its relation, or its wording.

    A model that was trained on red squares and blue circles and can draw a blue square has learned
    colour and shape as two things. A score on captions from training could not tell that from
    memory.
    """
    if any(held_out_pair(g.shape, g.color) for g in meaning.groups):
        return True
    if meaning.relation is not None:
        first, second = (g.shape for g in meaning.groups)
        if one_in(10, f"{first} {meaning.relation} {second}"):
            return True
    return one_in(5, caption)


def one_in(n: int, text: str) -> bool:
    """True for one text in n, always the same ones."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % n == 0


def held_out_pair(shape: str, color: str | None) -> bool:
    """One colour of each shape, another for each: a green square, a blue cross, …"""
    return color is not None and list(COLORS).index(color) == SHAPES.index(shape) + 1


# ------------------------------------------------------------------------------------------------
# Scene and picture
# ------------------------------------------------------------------------------------------------


class Thing(NamedTuple):
    shape: str
    color: str
    radius: float
    x: float
    y: float
    rgb: tuple[float, float, float] | None = None  # None: that of COLORS


class Scene(NamedTuple):
    things: tuple[Thing, ...]
    background: float  # grey level, 0..255
    noise: float  # standard deviation of the background, 0..255


def draw_scene(meaning: Meaning, rng: np.random.Generator, world: World = FULL) -> Scene:
    """Things that obey the meaning, without touching; what it leaves open is drawn at random.

    Two groups stand in reading order, the first further left, unless the caption relates them: so
    a caption tells a small network which thing goes where. (The reader accepts any order.) A colour
    that the caption leaves open never makes a held-out pair: training would see it in the picture.
    """
    total = sum(g.count for g in meaning.groups)
    looks = []  # (shape, color, radius, rgb) of each thing, group by group
    for group in meaning.groups:
        color, rgb = (group.color, None) if group.color else open_color(group.shape, rng)
        size = group.size or ("small" if total > 2 else pick(rng, SIZES))
        looks += [(group.shape, color, SIZES[size], rgb)] * group.count
    radii = np.array([radius for _, _, radius, _ in looks])
    low, high = radii[:, None] + EDGE, 1 - radii[:, None] - EDGE
    tries = min(4 ** (total + 1), 256)  # layouts at once: crowded ones fit rarely
    while True:
        layouts = rng.uniform(low, high, (tries, total, 2))
        layouts = np.round(layouts * world.places) / world.places + 0.5 / world.size
        inside = (low <= layouts) & (layouts <= high)
        good = apart(layouts, radii) & inside.all((-1, -2))
        if meaning.relation is not None:
            good &= relation_holds(meaning, layouts, clear=CLEAR)
        elif len(meaning.groups) == 2:
            first_left = meaning._replace(relation="left of")
            good &= relation_holds(first_left, layouts, clear=0)
        if good.any():
            places = layouts[good.argmax()].tolist()
            things = tuple(
                Thing(*look, *xy, rgb) for (*look, rgb), xy in zip(looks, places, strict=True)
            )
            noise = float(rng.uniform(0, 6)) if rng.random() < 0.25 else 0.0
            return Scene(things, float(rng.uniform(0, 40)), noise)


def open_color(shape: str, rng: np.random.Generator) -> tuple[str, tuple[float, float, float]]:
    """A colour that the caption leaves open: → the nearest of COLORS, and the colour itself.

    Any one that is bright enough to be seen, not only those with a name. Then a shape comes in all
    shades, and the network learns colour and shape apart: it draws more pairs of them that it has
    never seen (docs/recipes.md). Never one that the reader would take for the held-out one.
    """
    while True:
        rgb = rng.uniform(0, 255, 3)
        name = list(COLORS)[((PALETTE - rgb) ** 2).sum(1).argmin()]
        bright = rgb.max() > 130 and rgb @ (0.3, 0.59, 0.11) > 65
        if bright and not held_out_pair(shape, name):
            return name, tuple(rgb)


def least_gap(first, second):
    """Between the centres of two things of these radii. Corners reach up to 1.28 radii; a pixel or
    more must lie between any two, for the reader."""
    return 1.2 * (first + second) + 0.06


def apart(places: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether no two things touch: places (..., n, 2), radii (n,) → (...) bool."""
    first, second = pairs(len(radii))
    gaps = places[..., first, :] - places[..., second, :]
    least = least_gap(radii[first], radii[second])
    return ((gaps * gaps).sum(-1) > least * least).all(-1)


@lru_cache
def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every two of n things, once."""
    return np.triu_indices(n, 1)


def relation_holds(meaning: Meaning, places: np.ndarray, clear: float = 1.0) -> np.ndarray:
    """Whether every thing of the first group lies on its side of every thing of the second, at
    least `clear` times as far along the relation's axis as across it: places (..., n, 2) → (...).
    """
    axis, n = np.array(RELATIONS[meaning.relation]), meaning.groups[0].count
    offset = places[..., :n, None, :] - places[..., None, n:, :]
    along, across = offset @ axis, abs(offset @ axis[::-1])
    return ((along > 0) & (along >= clear * across)).all((-1, -2))


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1 at the origin, negative inside.

    A distance gives smooth edges at any size: see coverage.
    Raises ValueError for a shape without a drawing.
    """
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    if shape == "triangle":  # corners (0, −1), (±1, 0.8)
        return np.maximum(y - 0.8, (1.8 * abs(x) - y - 1) / np.hypot(1.8, 1))
    if shape == "cross":
        a, b = abs(x), abs(y)
        return np.minimum(np.maximum(a - 0.32, b - 1), np.maximum(a - 1, b - 0.32))
    if shape == "ring":
        return abs(r - 0.72) - 0.24
    if shape != "star":
        raise ValueError(f"shape {shape!r} has no drawing: add one to distance()")
    # Five points: fold the plane into one half point, from its tip to the notch beside it.
    angle = np.arctan2(x, -y)
    folded = abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    tip, notch = np.array([1.05, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return -(normal[0] * (r * np.cos(folded) - tip[0]) + normal[1] * r * np.sin(folded))


def coverage(thing: Thing, size: int) -> np.ndarray:
    """Share of each pixel that the thing covers, (size, size) in [0, 1]: its anti-aliased mask."""
    centres = (np.arange(size) + 0.5) / size
    x, y = (centres - thing.x) / thing.radius, (centres - thing.y) / thing.radius
    pixels = distance(thing.shape, x[None], y[:, None]) * thing.radius * size
    return np.clip(0.5 - pixels, 0, 1)


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """(3, size, size) uint8."""
    picture = np.full((3, size, size), float(scene.background))
    if scene.noise:
        picture += scene.noise * rng.standard_normal((1, size, size))
    for thing in scene.things:
        mask = coverage(thing, size)
        color = np.array(thing.rgb or COLORS[thing.color], float)
        picture += mask * (color[:, None, None] - picture)
    return np.clip(picture.round(), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------
# The data set and the prompts
# ------------------------------------------------------------------------------------------------


class Shapes:
    """Map-style: shapes[i] → (picture (3, size, size) uint8, caption).

    held: captions held out of training, all of them; otherwise never one.
    """

    def __init__(
        self, world: World = FULL, seed: int = 0, length: int = 1_000_000, held: bool = False
    ):
        self.world, self.seed, self.length, self.held = world.checked(), seed, length, held

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, str]:
        rng = np.random.default_rng((self.seed, i, self.held))
        meaning, caption = draw_caption(rng, TRAINED, self.held, self.world)
        return render(draw_scene(meaning, rng, self.world), self.world.size, rng), caption


def draw_caption(
    rng: np.random.Generator, tags: tuple[str, ...], held: bool, world: World = FULL
) -> tuple[Meaning, str]:
    """A meaning and its caption, of a random one of `tags`, (not) held out of training."""
    while True:
        meaning = draw_meaning(rng, pick(rng, tags), world)
        if not held and rng.random() < NAMED:
            meaning = name_colors(meaning, rng, world)
        caption = write_caption(meaning, rng)
        if held_out(meaning, caption) == held:
            return meaning, caption


def prompts(tag: str, n: int, seed: int = 0, world: World = FULL) -> list[tuple[Meaning, str]]:
    """n held-out prompts of a tag, for scoring."""
    rng = np.random.default_rng((seed, TAGS.index(tag)))
    return [draw_caption(rng, (tag,), held=True, world=world) for _ in range(n)]


def prompts_by_tag(world: World, n: int) -> list[tuple[Meaning, str]]:
    """n held-out prompts of each of the six tags, tag after tag."""
    return [prompt for tag in TAGS for prompt in prompts(tag, n, world=world)]


# ------------------------------------------------------------------------------------------------
# The reader
# ------------------------------------------------------------------------------------------------

CONTRAST = 45.0  # a pixel belongs to a thing if it is this far from the background, in RGB units
FIT = 0.2  # largest share of a mask's energy that its shape may leave unexplained
SCALES = np.geomspace(0.8, 1.25, 9)  # radii tried, as multiples of the one that the area tells


def detect(picture: np.ndarray) -> list[Thing]:
    """The things in a picture (3, size, size) uint8.

    Connected pixels that differ from the background; their core's nearest colour; the shape whose
    anti-aliased mask fits best. A piece that fits no shape has the shape "unknown".
    """
    size, pixels = picture.shape[1], picture.astype(float)
    border = np.concatenate(
        [pixels[:, [0, -1]].reshape(3, -1), pixels[:, :, [0, -1]].reshape(3, -1)], 1
    )
    background = np.median(border, axis=1)
    contrast = np.sqrt(((pixels - background[:, None, None]) ** 2).sum(0))
    things = []
    for piece in pieces(contrast > CONTRAST):
        if piece.sum() < 0.004 * size**2:  # dust
            continue
        things.append(identify(piece, pixels, background, contrast))
    return things


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components of a mask, each a mask: labels spread until they rest."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        wide = np.pad(labels, 1)
        H, W = mask.shape
        shifted = [wide[i : i + H, j : j + W] for i in range(3) for j in range(3)]
        spread = np.where(mask, np.maximum.reduce(shifted), 0)
        if (spread == labels).all():
            return [labels == k for k in np.unique(labels) if k]
        labels = spread


def identify(piece, pixels, background, contrast) -> Thing:
    """Colour by the purest quarter of the piece, shape by the mask that the colour implies."""
    size = piece.shape[0]
    core = piece & (contrast >= np.quantile(contrast[piece], 0.75))
    purest = pixels[:, core].mean(1)
    color = list(COLORS)[np.argmin(((PALETTE - purest) ** 2).sum(1))]
    axis = purest - background
    wide = np.pad(piece, 1)  # one pixel around the piece holds the rest of its soft edge
    H, W = piece.shape
    near = np.logical_or.reduce([wide[i : i + H, j : j + W] for i in range(3) for j in range(3)])
    alpha = np.tensordot(axis, pixels - background[:, None, None], 1) / (axis @ axis)
    alpha = np.clip(alpha, 0, 1) * near  # (size, size): how much of each pixel the thing covers
    centres = (np.arange(size) + 0.5) / size
    area = alpha.sum()
    x, y = (alpha.sum(0) @ centres) / area, (alpha.sum(1) @ centres) / area
    best = (FIT, Thing("unknown", color, float(np.sqrt(area / np.pi) / size), float(x), float(y)))
    for shape in SHAPES:
        unit_area, centroid = UNIT[shape]
        for radius in SCALES * np.sqrt(area / unit_area) / size:
            thing = Thing(shape, color, float(radius), float(x), float(y - centroid * radius))
            left = ((coverage(thing, size) - alpha) ** 2).sum() / (alpha**2).sum()
            if left < best[0]:
                best = (left, thing)
    return best[1]


def _unit(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far below its origin its centroid lies."""
    mask = coverage(Thing(shape, "red", 0.25, 0.5, 0.5), 256)
    y = ((np.arange(256) + 0.5) / 256 - 0.5) / 0.25
    return mask.sum() / 64**2, float(mask.sum(1) @ y / mask.sum())


UNIT = {shape: _unit(shape) for shape in SHAPES}


def obeys(meaning: Meaning, things: list[Thing]) -> bool:
    """Whether these things, all of them and no others, fit the meaning."""

    def fits(group: Group, thing: Thing) -> bool:
        nearest = min(SIZES, key=lambda s: abs(SIZES[s] - thing.radius))
        return (
            thing.shape == group.shape
            and group.color in (None, thing.color)
            and group.size in (None, nearest)
        )

    ordered = []
    for group in meaning.groups:
        members = [t for t in things if fits(group, t) and t not in ordered]
        if len(members) != group.count:
            return False
        ordered += members
    if len(ordered) != len(things):
        return False
    places = np.array([(t.x, t.y) for t in ordered])
    return meaning.relation is None or bool(relation_holds(meaning, places, clear=0.8))


def obeyed(pictures, prompts: list[tuple[Meaning, str]]) -> list[bool]:
    """Whether each of the pictures (B, 3, H, W) uint8, array or tensor, obeys its prompt."""
    return [
        obeys(meaning, detect(np.asarray(picture)))
        for picture, (meaning, _) in zip(pictures, prompts, strict=True)
    ]


def scores(prompts: list[tuple[Meaning, str]], obeys: list[bool]) -> dict[str, float]:
    """The share of obedient pictures of each tag, and the mean of the six.

    Then, of "colors" and "color_attr", which ask for a colour of each shape: the share where
    training has seen all these pairs, and where it has not. A gap between the two is missing
    composition; low shares of both are missing training. NaN where nothing is asked.
    """
    meanings = [meaning for meaning, _ in prompts]

    def share(chosen: list[bool]) -> float:
        found = [o for o, c in zip(obeys, chosen, strict=True) if c]
        return float(np.mean(found)) if found else float("nan")

    shares = {tag: share([m.tag == tag for m in meanings]) for tag in TAGS}
    shares["mean"] = sum(shares.values()) / len(TAGS)
    paired = [m.tag in ("colors", "color_attr") for m in meanings]
    unseen = [any(held_out_pair(g.shape, g.color) for g in m.groups) for m in meanings]
    shares["seen_pairs"] = share([p and not u for p, u in zip(paired, unseen, strict=True)])
    shares["unseen_pairs"] = share([p and u for p, u in zip(paired, unseen, strict=True)])
    return shares
