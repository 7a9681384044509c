"""inputs/shapes.py: the world obeys its captions, the reader reads true pictures and no others."""

from itertools import combinations
from math import hypot

import numpy as np
import pytest
import torch

from inputs import shapes
from inputs.shapes import COLORS, SHAPES, TAGS, Group, Meaning, Shapes, Thing, World, detect, obeys

N = 600  # pictures a tag
EVERY = (*TAGS, "combined")
TINY = World(20, 4, 6, 10)  # the tiny recipe's
DARK = np.full((3, 24, 24), 20, np.uint8)


def draw(tag, n, world=TINY):
    """Meanings, things and pictures; every second caption is held out."""
    for i in range(n):
        rng = np.random.default_rng((0, i, EVERY.index(tag)))
        meaning, _ = shapes.draw_caption(rng, (tag,), held=bool(i % 2), world=world)
        scene = shapes.draw_scene(meaning, rng, world)
        yield meaning, list(scene.things), shapes.render(scene, world.size, rng)


def test_training_counts_twice_as_often():
    """Only counting says three or four, in half of its captions, and it is two of eight draws."""
    captions = [Shapes(TINY, seed=3)[i][1].split() for i in range(2000)]
    share = np.mean([not {"three", "four"}.isdisjoint(words) for words in captions])
    assert 0.12 < share < 0.18  # once in seven draws it would be 0.095


def one_attribute_changed(meaning, rng):
    """The same tag with one thing wrong: another shape, colour, count, or the opposite place."""
    first, *rest = meaning.groups

    def other(values, *taken):
        return rng.choice([v for v in values if v not in taken])

    if meaning.tag == "position":
        changed, rest = rest[0], [first]
    elif meaning.tag == "counting":
        changed = first._replace(count=other(range(1, 5), first.count))
    elif first.color:
        changed = first._replace(color=other(COLORS, first.color))
    else:
        changed = first._replace(shape=other(SHAPES, *(g.shape for g in meaning.groups)))
    return meaning._replace(groups=(changed, *rest))


@pytest.mark.parametrize("tag", TAGS)
def test_the_reader_accepts_true_pictures_and_rejects_false_ones(tag):
    rng = np.random.default_rng(0)
    accepted = rejected = 0
    for meaning, _, picture in draw(tag, N):
        things = detect(picture)
        accepted += obeys(meaning, things)
        rejected += not obeys(one_attribute_changed(meaning, rng), things)
    assert accepted >= 0.99 * N and rejected >= 0.95 * N


@pytest.mark.parametrize("size", [24, 32, 64, 256])
def test_scenes_of_larger_worlds_obey_stay_apart_and_are_read(size):
    read = []
    for tag in EVERY:
        n = 40 if size < 256 else 6
        for meaning, things, picture in draw(tag, n, World(size, places=size)):
            assert obeys(meaning, things)
            assert all(t.radius <= n <= 1 - t.radius for t in things for n in (t.x, t.y))
            for a, b in combinations(things, 2):
                assert hypot(a.x - b.x, a.y - b.y) > 1.2 * (a.radius + b.radius) + 0.06
            read.append(obeys(meaning, detect(picture)))
    assert np.mean(read) >= 0.97


def test_noise_blots_and_touching_shapes_are_not_read_as_shapes():
    rng = np.random.default_rng(0)
    assert detect(DARK) == []
    blot = DARK.copy()
    blot[0, 4:20, 4:7] = blot[0, 4:7, 4:20] = 220  # an L
    touching = [Thing("square", "red", 0.19, x, 0.5) for x in (0.35, 0.65)]
    touching = shapes.render(shapes.Scene(touching, 20, 0), 24, rng)
    for picture in (rng.integers(0, 256, (3, 24, 24), dtype=np.uint8), blot, touching):
        assert {thing.shape for thing in detect(picture)} == {"unknown"}


def test_obedience_is_of_all_things_and_of_their_places():
    ring = Thing("ring", "blue", 0.13, 0.5, 0.5)
    places = {"left of": (0.2, 0.5), "right of": (0.8, 0.5), "above": (0.5, 0.2)}
    for relation, (x, y) in (places | {"below": (0.5, 0.8)}).items():
        star = Thing("star", "red", 0.13, x, y)
        meaning = Meaning("position", (Group(1, "star"), Group(1, "ring")))
        asked = [x for x in shapes.RELATIONS if obeys(meaning._replace(relation=x), [star, ring])]
        assert asked == [relation]
    stars = [star, star._replace(y=0.5), star._replace(y=0.2)]
    for n in (1, 2, 3):
        assert obeys(Meaning("counting", (Group(2, "star"),)), stars[:n]) == (n == 2)
    assert not obeys(Meaning("single_object", (Group(1, "star"),)), [star, ring])


def test_training_and_prompts_are_disjoint():
    """No held-out wording, relation or colour x shape pair is in training, not even unnamed."""
    trained, pairs = set(), set()
    for i in range(3000):
        rng = np.random.default_rng((3, i))
        meaning, caption = shapes.draw_caption(rng, EVERY, held=False)
        trained.add(caption)
        pairs |= {(t.shape, t.color) for t in shapes.draw_scene(meaning, rng).things}
    asked = {caption for tag in TAGS for _, caption in shapes.prompts(tag, 200)}
    assert len(asked) > 300 and len(trained) > 500 and not asked & trained
    assert not any(shapes.held_out_pair(*pair) for pair in pairs)
    assert len(pairs) == len(SHAPES) * (len(COLORS) - 1)
    asked = [g for m, _ in shapes.prompts("colors", 200) for g in m.groups]
    assert sum(shapes.held_out_pair(g.shape, g.color) for g in asked) > 20


def test_items_depend_on_seed_and_index_alone():
    world = Shapes(seed=1)
    picture, caption = world[77]
    assert caption == shapes.draw_caption(np.random.default_rng((1, 77)), EVERY, held=False)[1]
    for other in (world[3], Shapes(seed=2)[77], Shapes(seed=1, held=True)[77]):
        assert (other[0] != picture).any()
    for other in (world[77], Shapes(seed=1)[77]):
        assert (other[0] == picture).all() and other[1] == caption


def test_captions_are_all_the_wordings_of_at_most_twelve_words():
    rng, groups = np.random.default_rng(0), (Group(3, "cross", "red", "large"), Group(1, "star"))
    openings = ("", "a picture of ", "an image of ", "this shows ")
    for relation, middles in (
        (None, ("and", "with")),
        ("above", ("above",)),
        ("left of", ("left of", "to the left of")),
    ):
        said = {shapes.write_caption(Meaning("", groups, relation), rng) for _ in range(200)}
        ends = [f"three large red crosses {m} {one} star" for m in middles for one in ("a", "one")]
        every = {opening + end for opening in openings for end in ends}
        assert said == {caption for caption in every if len(caption.split()) <= 12}


def test_anti_aliased_masks_have_the_right_area():
    """Mean coverage equals the shape's area, also when its edge cuts pixels."""
    for shape, area in [("circle", np.pi * 0.95**2), ("square", 1.7**2), ("triangle", 1.8)]:
        mask = shapes.coverage(Thing(shape, "red", 0.3, 0.513, 0.481), 64)
        assert mask.mean() == pytest.approx(area * 0.3**2, rel=0.02)
        assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize(
    "size, places", [(20, 10), (24, 10), (28, 10), (29, 11), (40, 10), (64, 11)]
)
def test_a_world_is_refused_where_two_large_things_have_no_room(size, places):
    """draw_scene would look for a layout for ever; here 40,000 layouts are tried."""
    large = (shapes.Group(1, "circle", "red", "large"), shapes.Group(1, "cross", "red", "large"))
    layouts = np.random.default_rng(0).uniform(0.22, 0.78, (40_000, 2, 2))
    layouts = np.round(layouts * places) / places + 0.5 / size
    fits = ((layouts >= 0.22) & (layouts <= 0.78)).all((-1, -2))
    fits &= shapes.apart(layouts, np.array([0.19, 0.19]))
    fits &= shapes.relation_holds(shapes.Meaning("position", large, "above"), layouts, 1.2)
    if fits.any():
        World(size, places=places).checked()
    else:
        with pytest.raises(ValueError, match="no room"):
            World(size, places=places).checked()


@pytest.mark.parametrize(
    "world, message",
    [
        (World(19), "at least 20"),
        (World(24, 7), "2 to 6 shapes, not 7"),
        (World(24, colors=2), "3 to 10 colours, not 2"),
        (World(24, places=32), "10 to 24 places"),
        (World(40, places=10), "two large things have no room: give --places 40"),
    ],
)
def test_what_cannot_be_drawn_says_the_rule(world, message):
    with pytest.raises(ValueError, match=message):
        Shapes(world)
    with pytest.raises(ValueError, match="one of single_object"):
        shapes.draw_meaning(np.random.default_rng(0), "texture")
    with pytest.raises(ValueError, match="'hexagon' has no drawing"):
        shapes.coverage(Thing("hexagon", "red", 0.3, 0.5, 0.5), 32)


# --- the score -----------------------------------------------------------------------------------


def test_true_pictures_score_one_and_exchanged_ones_do_not():
    prompts = shapes.prompts_by_tag(TINY, 20)
    assert [m.tag for m, _ in prompts[::20]] == list(TAGS)
    assert all(shapes.held_out(*prompt) for prompt in prompts)
    rng = np.random.default_rng(0)
    drawn = [shapes.render(shapes.draw_scene(m, rng, TINY), TINY.size, rng) for m, _ in prompts]
    pictures = torch.from_numpy(np.stack(drawn))
    result = shapes.scores(prompts, shapes.obeyed(pictures, prompts))
    assert list(result) == [*TAGS, "mean", "seen_pairs", "unseen_pairs"] and result["mean"] > 0.98
    exchanged = shapes.scores(prompts, shapes.obeyed(pictures.roll(20, 0), prompts))
    assert exchanged["mean"] < 0.25  # pictures of another tag
    result = shapes.scores(prompts, [True] * 30 + [False] * 90)
    assert [result[tag] for tag in ("single_object", "two_object", "mean")] == [1, 0.5, 0.25]
    unseen = [any(shapes.held_out_pair(g.shape, g.color) for g in m.groups) for m, _ in prompts]
    result = shapes.scores(prompts, [not u for u in unseen])
    assert 0 < sum(unseen) < 120 and [result[k] for k in ("seen_pairs", "unseen_pairs")] == [1, 0]
