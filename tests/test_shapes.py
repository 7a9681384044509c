"""inputs/shapes.py: the world obeys its captions, the reader reads true pictures and no others."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from inputs import shapes
from inputs.shapes import (
    COLORS,
    SHAPES,
    SIZES,
    TAGS,
    Group,
    Meaning,
    Shapes,
    Thing,
    World,
    detect,
    obeys,
)

N = 600  # pictures a tag


@dataclass
class Drawn:
    meaning: Meaning
    scene: shapes.Scene
    picture: np.ndarray


TINY = World(20, 4, 6, 10)  # the tiny recipe's


def draw(tag, n, world=TINY, seed=0):
    for i in range(n):
        rng = np.random.default_rng((seed, i, TAGS.index(tag) if tag in TAGS else 99))
        meaning, _ = shapes.draw_caption(rng, (tag,), held=bool(i % 2), world=world)
        scene = shapes.draw_scene(meaning, rng, world)
        yield Drawn(meaning, scene, shapes.render(scene, world.size, rng))


def other(value, values, rng):
    return str(rng.choice([v for v in values if v != value]))


def one_attribute_changed(meaning, rng):
    """The same tag with one thing wrong: another shape, colour, count, or the opposite place."""
    first, *rest = meaning.groups
    taken = {g.shape for g in meaning.groups}
    if meaning.tag in ("single_object", "two_object"):
        changed = first._replace(shape=other(None, set(SHAPES) - taken, rng))
    elif meaning.tag == "counting":
        changed = first._replace(count=int(other(first.count, [1, 2, 3, 4], rng)))
    elif meaning.tag in ("colors", "color_attr"):
        changed = first._replace(color=other(first.color, COLORS, rng))
    else:
        opposite = dict(
            zip(shapes.RELATIONS, ("right of", "left of", "below", "above"), strict=True)
        )
        return meaning._replace(relation=opposite[meaning.relation])
    return meaning._replace(groups=(changed, *rest))


@pytest.mark.parametrize("tag", TAGS)
def test_the_reader_accepts_true_pictures_and_rejects_false_ones(tag):
    rng = np.random.default_rng(0)
    accepted = rejected = 0
    for drawn in draw(tag, N):
        things = detect(drawn.picture)
        accepted += obeys(drawn.meaning, things)
        rejected += not obeys(one_attribute_changed(drawn.meaning, rng), things)
    assert accepted >= 0.99 * N, (tag, accepted / N)
    assert rejected >= 0.95 * N, (tag, rejected / N)


@pytest.mark.parametrize("size", [24, 32, 64, 256])
def test_larger_and_richer_worlds_are_read_too(size):
    n = 40 if size < 256 else 6
    drawn = [d for tag in (*TAGS, "combined") for d in draw(tag, n, World(size, places=size))]
    right = sum(obeys(d.meaning, detect(d.picture)) for d in drawn)
    assert right >= 0.97 * len(drawn)


def test_detection_finds_place_size_and_colour():
    for drawn in draw("color_attr", 100):
        found = sorted(detect(drawn.picture), key=lambda t: t.shape)
        true = sorted(drawn.scene.things, key=lambda t: t.shape)
        for f, t in zip(found, true, strict=True):
            assert (f.shape, f.color) == (t.shape, t.color)
            assert abs(f.x - t.x) < 0.03 and abs(f.y - t.y) < 0.03
            assert f.radius == pytest.approx(t.radius, rel=0.2)


def test_noise_grey_and_blots_are_not_shapes():
    rng = np.random.default_rng(0)
    assert detect(np.full((3, 24, 24), 20, np.uint8)) == []
    static = rng.integers(0, 256, (3, 24, 24)).astype(np.uint8)
    assert all(t.shape == "unknown" for t in detect(static))
    blot = np.full((3, 24, 24), 20, np.uint8)
    blot[0, 4:20, 4:7] = blot[0, 4:7, 4:20] = 220  # an L
    assert [t.shape for t in detect(blot)] == ["unknown"]


def test_touching_shapes_and_half_a_shape_are_not_read_as_two():
    rng = np.random.default_rng(0)
    touching = (
        Thing("square", "red", 0.19, 0.35, 0.5),
        Thing("square", "red", 0.19, 0.65, 0.5),
    )
    picture = shapes.render(shapes.Scene(touching, 20, 0), 24, rng)
    assert not obeys(Meaning("counting", (Group(2, "square"),)), detect(picture))


def test_more_things_than_asked_for_are_wrong():
    things = [Thing("star", "red", 0.13, 0.2, 0.5), Thing("star", "red", 0.13, 0.8, 0.5)]
    assert obeys(Meaning("counting", (Group(2, "star"),)), things)
    assert not obeys(Meaning("single_object", (Group(1, "star"),)), things)
    assert not obeys(Meaning("counting", (Group(2, "star"),)), [*things, things[0]._replace(y=0.9)])


@pytest.mark.parametrize("relation, delta", list(shapes.RELATIONS.items()))
def test_relations_follow_the_picture(relation, delta):
    x, y = delta
    things = [
        Thing("star", "red", 0.13, 0.5 + 0.3 * x, 0.5 + 0.3 * y),
        Thing("ring", "blue", 0.13, 0.5, 0.5),
    ]
    for asked in shapes.RELATIONS:
        meaning = Meaning("position", (Group(1, "star"), Group(1, "ring")), asked)
        assert obeys(meaning, things) == (asked == relation)


def test_scenes_obey_their_meaning_and_things_stay_apart():
    for tag in (*TAGS, "combined"):
        for drawn in draw(tag, 100):
            assert obeys(drawn.meaning, list(drawn.scene.things))
            for thing in drawn.scene.things:
                assert thing.radius <= thing.x <= 1 - thing.radius
                assert thing.radius <= thing.y <= 1 - thing.radius
            things = drawn.scene.things
            places = np.array([(t.x, t.y) for t in things])
            assert shapes.apart(places, np.array([t.radius for t in things]))


def test_training_and_prompts_are_disjoint():
    """No held-out wording, relation or colour x shape pair is in training, not even unnamed."""
    world = Shapes(seed=3)
    trained, pairs = set(), set()
    for i in range(3000):
        rng = np.random.default_rng((3, i))
        meaning, caption = shapes.draw_caption(rng, (*TAGS, "combined"), held=False)
        trained.add(caption)
        pairs |= {(t.shape, t.color) for t in shapes.draw_scene(meaning, rng).things}
        if i < 5:
            assert world[i][1] == caption
    asked = {caption for tag in TAGS for _, caption in shapes.prompts(tag, 200)}
    assert len(asked) > 300 and not asked & trained
    assert all(not shapes.held_out_pair(*pair) for pair in pairs)
    assert len(pairs) == len(SHAPES) * (len(COLORS) - 1)
    asked = [g for m, _ in shapes.prompts("colors", 200) for g in m.groups]
    unseen_pairs = [g for g in asked if shapes.held_out_pair(g.shape, g.color)]
    assert len(unseen_pairs) > 20  # and prompts do ask for them


def test_items_depend_on_seed_and_index_alone():
    a, b, c = Shapes(seed=1), Shapes(seed=1), Shapes(seed=2)
    late = a[77]
    for i in (3, 77, 5):
        assert (a[i][0] == b[i][0]).all() and a[i][1] == b[i][1]
    assert (a[77][0] == late[0]).all() and a[77][1] == late[1]
    assert any((a[i][0] != c[i][0]).any() for i in range(3))


def test_captions_are_short_varied_and_read_well():
    words, captions = set(), set()
    for tag in (*TAGS, "combined"):
        for i in range(300):
            rng = np.random.default_rng((i, 5))
            meaning = shapes.draw_meaning(rng, tag)
            caption = shapes.write_caption(meaning, rng)
            captions.add(caption)
            words |= set(caption.split())
            assert len(caption.split()) <= shapes.MAX_WORDS
            for group in meaning.groups:
                assert group.shape in caption and (group.color or "") in caption
    assert {"crosses", "stars", "two", "four", "left", "above"} <= words and len(captions) > 500
    assert set(SIZES) <= words


def test_anti_aliased_masks_have_the_right_area():
    """Mean coverage equals the shape's area, also when its edge cuts pixels."""
    for shape, area in [("circle", np.pi * 0.95**2), ("square", 1.7**2), ("triangle", 1.8)]:
        mask = shapes.coverage(Thing(shape, "red", 0.3, 0.513, 0.481), 64)
        assert mask.mean() == pytest.approx(area * 0.3**2, rel=0.02)
        assert ((mask > 0) & (mask < 1)).any()


def test_bad_arguments_say_the_rule():
    with pytest.raises(ValueError, match="at least 20"):
        Shapes(World(8))
    with pytest.raises(ValueError, match="10 to 24 places"):
        Shapes(World(24, places=32))
    with pytest.raises(ValueError, match="single_object"):
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
    assert list(result) == [*TAGS, "mean"] and result["mean"] > 0.98
    exchanged = shapes.scores(prompts, shapes.obeyed(pictures.roll(20, 0), prompts))
    assert exchanged["mean"] < 0.25  # pictures of another tag


def test_the_mean_is_of_the_six_tags():
    prompts = shapes.prompts_by_tag(TINY, 2)
    result = shapes.scores(prompts, [True, True, True, False] + [False] * 8)
    assert result["single_object"] == 1 and result["two_object"] == 0.5
    assert result["mean"] == pytest.approx(1.5 / 6)
