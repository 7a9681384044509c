"""inputs/sources, stored, rows, stage: each kind of rows, what a run draws of it, the copier."""

import base64
import io
import json
import os
import pickle
import re
import shutil
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import SHAPES, call, close, exported, opened
from test_encoders import tiny_t5, tiny_vae
from test_pairs import read
from test_prepare import pictures, prepared, run

import rf
from common.evaluate import Ranks
from inputs import digits
from inputs.encoders import HashText, TextFormat
from inputs.shapes import Shapes, World
from inputs.sources import Range, WindowOrder
from inputs.stage import Copier
from inputs.stored import FAILED, PreparedFolder, manifest_check, row_checks
from tools import pairs
from train_t2i import loader

KINDS = ("mnist", "cifar10", "shapes", "prepared", "moments", "mixed", "pairs")
MIXED = ["prepared", "square"]
TOKENS = {"prepared": 8, "moments": 8, "pairs": 12, "shapes": 12}
HELD = np.random.default_rng(rf.mix_seed(0, "prepare", 0)).permutation(60)[9::10].tolist()


def image_sets(name, channels):
    """23 images to learn from, and five held-out ones."""
    held = digits.glyphs(5, seed=1)._replace(labels=torch.tensor([0, 0, 1, 0, 1]))
    return [
        part._replace(images=part.images.repeat(1, channels, 1, 1), source=name)
        for part in (digits.glyphs(23), held)
    ]


SETS = {"mnist": image_sets("mnist", 1), "cifar10": image_sets("cifar10", 3)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders: the same 60 pictures of three sizes, as pixels and as moments; squares; pairs."""
    home = tmp_path_factory.mktemp("home")
    source = pictures(home / "source", 60)
    captions = ["--caption", "text:3", "--caption", "other"]
    run(source, home / "prepared", *captions, "--chunk-rows", 9)
    run(source, home / "staged", "--chunk-rows", 9, "--validation", 1)
    options = ["--vae", tiny_vae(home / "vae"), "--text-bits", 8, "--chunk-rows", 60]
    run(source, home / "moments", *options)
    run(pictures(home / "squares", 20, [(48, 48)]), home / "square")
    edited(home / "prepared", home / "short", text_tokens=6)
    eight = {"tokens": 8, "dim": 128, "bits": 8, "reach": 0.25}
    edited(home / "prepared", home / "eight", text_format=eight)
    made = ["--out", home / "pairs", "--number", 30, "--chunk", 7, "--segments", 2, "--steps", 2]
    call(pairs.main, exported(home / "run", SHAPES), *made)
    return home


def edited(folder, out, **changes):
    """A copy with another manifest."""
    shutil.copytree(folder, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= changes
    manifest["check"] = manifest_check(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture
def open_kind(home, monkeypatch):
    """kind → settings and rows, opened anew."""
    monkeypatch.setattr(digits, "load_images", lambda name, *rest, **seed: SETS[name])
    monkeypatch.chdir(home)
    return lambda kind, **typed: opened(*MIXED if kind == "mixed" else [kind], **typed)


def key(x):
    return tuple(x.shape), x.numpy().tobytes()


def training(home, kind):
    """key of what is stored → its captions, of all training rows; read without rows.py."""
    if kind == "pairs":
        states, captions = read(home / kind)
        return {key(x): [said] for x, said in zip(states[:27], captions, strict=False)}
    if kind in SETS:
        images, labels, words, _ = SETS[kind][0]
        found = {key(x): [words[label]] for x, label in zip(images, labels, strict=True)}
        if kind == "cifar10":
            mirrored = zip(images.flip(3), labels, strict=True)
            found |= {key(x): [words[label]] for x, label in mirrored}
        return found
    how = (np.float16, (2, 4), 2) if kind == "moments" else ()
    rows = prepared(home / kind, *how).values() if (home / kind).exists() else ()
    rows = (row for row in rows if row["split"] == "train")
    return {key(row["image"]): [c for c in row["captions"] if c] for row in rows}


def encoded(kind, caption):
    """Text features (T, E), as they are stored."""
    if kind in SETS:
        return torch.eye(11)[[int(caption)]]
    x = HashText(tokens=TOKENS[kind])([caption])[0]
    if kind == "moments":
        levels = ((2 * x.clamp(-0.25, 0.25) + 0.5) * 255).round()
        return (levels / 255 - 0.5) / 2 * x.any(1, keepdim=True)
    return x.half().float() if kind == "prepared" else x


def split(rows, batch):
    """A batch as the flow takes it, sample by sample."""
    return list(zip(*rows.encode(batch, "cpu"), strict=True))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what stands at a position -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_a_function_of_seed_and_position(open_kind, kind):
    """Whatever the ranks, the cut into batches, and the resume; over ends of epochs too. Rows that
    have travelled to a worker have no encoders."""
    settings, rows = open_kind(kind)
    parts = [rows.draw(range(8 * step, 8 * step + 8), 0) for step in range(15)]
    whole = [sample for part in parts for sample in split(rows, part)]
    there = pickle.loads(pickle.dumps(rows))  # now files are open
    assert there.text is there.image is None
    for again, ranks, size, seen in ((there, 2, 4, 0), (open_kind(kind)[1], 4, 1, 80)):
        for rank in range(ranks):
            made = loader(again, settings, seen, size, Ranks(rank, ranks))
            for i, batch in enumerate(islice(made, 40 // ranks // size)):
                first = seen + (i * ranks + rank) * size
                for sample, wanted in zip(split(rows, batch), whole[first:], strict=False):
                    assert equal(sample, wanted)
    assert any(part.dropped.any() for part in parts) == (kind != "pairs")  # which hold guidance
    noises = [*(noise for *_, noise in whole), *(parts[0].vae_noise if rows.random else ())]
    assert len({key(noise) for noise in noises}) == len(noises)
    assert abs(torch.cat([noise.flatten() for noise in noises]).std() - 1) < 0.02
    _, other = open_kind(kind, seed=1)
    drawn = split(other, other.draw(range(8), 1))
    for a, b in zip(whole, drawn, strict=False):
        assert not torch.equal(a[3], b[3]) and not torch.equal(a[2], b[2])
    assert {key(x) for x, *_ in whole[:8]} != {key(x) for x, *_ in drawn}


@pytest.mark.parametrize("kind", ["mnist", "cifar10", "prepared", "moments", "pairs"])
def test_each_row_comes_once_an_epoch_with_its_caption(open_kind, home, kind):
    _, rows = open_kind(kind)
    known, seen = training(home, kind), defaultdict(list)
    for step in range(24):
        stored, text = rows.at(range(8 * step, 8 * step + 8))
        for x, features in zip(stored, rows.features(text, "cpu"), strict=True):
            seen[tuple(x.shape)].append(key(x))
            assert any(torch.equal(features, encoded(kind, c)) for c in known[key(x)])
    assert seen.keys() == {shape for shape, _ in known}
    for shape, keys in seen.items():
        every = {k for k in known if k[0] == shape}
        n = len(every)
        epochs = [keys[i : i + n] for i in range(0, len(keys) - n + 1, n)]
        assert len(epochs) > 1 and epochs[0] != epochs[1]
        assert all(set(epoch) == every for epoch in epochs)


def test_shapes_are_drawn_in_a_new_order_each_epoch():
    _, rows = opened("shapes")
    every, world, held = np.arange(10**6), World(20, 4, 6, 10), rows.held[0]
    first, second = (rows.streams[0].order(every + n) for n in (0, 10**6))
    assert (np.sort([first, second]) == every).all() and not (first == second).all()
    picture, caption = Shapes(world)[first[3]]
    stored, text = rows.at([3])
    assert (stored[0].numpy() == picture).all() and torch.equal(text[0], encoded("shapes", caption))
    assert held.captions([5]) == [Shapes(world, held=True)[-1 - held.rows[5]][1]]


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_whole_chunks_follow_one_another(window):
    """In another order each epoch, which is the same for every size."""
    counts = (5, 3, 8, 1, 4)
    ranges = [(100 * i, Range(i, "train", 8, 8, 7, n)) for i, n in enumerate(counts)]
    order = WindowOrder(ranges, window, (3, 4))
    epochs = order(range(84)).reshape(4, 21).tolist()
    every = [100 * i + k for i, n in enumerate(counts) for k in range(n)]
    assert all(sorted(epoch) == every for epoch in epochs) and epochs[0] != epochs[1]
    windows = -(-5 // window)
    uses, place = list(islice(order.uses(0), 4 * windows)), 0
    for first, last, chunks in uses:
        assert first == place and len(chunks) <= window
        assert set(order(range(first, last)) // 100) == chunks
        assert next(order.uses(last - 1)) == (first, last, chunks)
        place = last
    chunks = [chunks for *_, chunks in uses]
    assert windows == 1 or chunks[:windows] != chunks[windows : 2 * windows]
    larger = WindowOrder([(i, replace(r, rows=9)) for i, r in ranges], window, (3, 5)).uses(0)
    assert chunks == [next(larger)[2] for _ in chunks]


@pytest.mark.parametrize("weights", [[], [1.0, 3.0], [1.0, 999.0]])
def test_streams_interleave_by_share_and_weight(open_kind, weights):
    """At any moment each has its share of the steps, within two of them."""
    _, rows = open_kind("mixed", data_weights=weights)
    *three, square = rows.shares
    a, b = weights or (1, 1)
    assert [sum(three), square] == pytest.approx([a / (a + b), b / (a + b)], rel=1e-2)
    counts = [0] * 4
    for step in range(2000):
        s, j = rows.turn(step)
        assert j == counts[s] and rows.step_of(s, j) == step
        counts[s] += 1
        assert all(abs(n - r * (step + 1)) < 2 for n, r in zip(counts, rows.shares, strict=True))
        if step < 9:
            assert rows.at([8 * step, 8 * step + 7])[0].shape[2:] == rows.streams[s].bucket
    assert rows.step_of(*rows.turn(10**9)) == 10**9


def test_a_heavy_text_encoder_does_not_travel(tmp_path):
    _, rows = opened("shapes", text_encoder=tiny_t5(tmp_path))
    texts = [x.draw(range(3), 0).text for x in (pickle.loads(pickle.dumps(rows)), rows)]
    assert torch.equal(*(rows.features(text, "cpu") for text in texts))


# --- captions, latents, held-out rows ------------------------------------------------------------


def test_captions_are_drawn_by_weight_or_dropped(home, tmp_path):
    """Three to one where there are two; what is dropped or empty is the stored null text."""
    null = torch.arange(256).view(2, 128) / 256
    padded = torch.cat([null, torch.zeros(6, 128)])
    blob = base64.b64encode(TextFormat(8, 128).pack(null)).decode()
    _, rows = opened(edited(home / "prepared", tmp_path / "data", null_text=blob), batch_size=2000)
    source, empty = rows.sources[0], ["", None]
    table, (first, *_) = source.table(2), (r for r in source.ranges if r.chunk == 2)
    place = (source.manifest["made"], 2, first.height, first.width)
    table["captions"] = pa.array([empty] * len(table["captions"]))
    checks = [row_checks(place, x.as_buffer(), empty, []) for x in table["image"]]
    table["checks"] = pa.array(checks)
    silent = {image.as_py() for image in table["image"]}
    batch, known, chosen = rows.draw(range(2000), 0), training(home, "prepared"), Counter()
    texts = rows.features(batch.text, "cpu", batch.dropped)
    for x, drop, text in zip(batch.stored, batch.dropped, texts, strict=True):
        captions, empty = known[key(x)], torch.equal(text, padded)
        assert empty == (drop or key(x)[1] in silent)
        if not empty:
            chosen[len(captions), torch.equal(text, encoded("prepared", captions[0]))] += 1
    assert chosen[2, False] / (chosen[2, True] + chosen[2, False]) == pytest.approx(1 / 4, abs=0.04)
    assert chosen[1, True] > 100 and not chosen[1, False]
    assert batch.dropped.float().mean() == pytest.approx(0.1, abs=0.025)
    assert torch.equal(rows.null_features("cpu")[0], padded)


def test_latents_are_the_stored_mean_plus_std_times_noise(open_kind):
    _, rows = open_kind("moments")
    batch = rows.draw(range(8), 0)
    mean, log_variance = batch.stored.float().unbind(1)
    latents = (mean + (log_variance / 2).exp() * batch.vae_noise) * 0.13025
    close(rows.encode(batch, "cpu")[0][:, 0], latents)


@pytest.mark.parametrize("kind, n", [("mnist", 5), ("shapes", 512), ("prepared", 6), ("pairs", 3)])
def test_held_rows_are_always_the_same(open_kind, home, kind, n):
    """Whatever the run's seed and batch; each is asked at its time."""
    _, rows = open_kind(kind)
    _, other = open_kind(kind, seed=5 if kind == "prepared" else 0, batch_size=3)
    numbers, known = [], training(home, kind)
    for held, again in zip(rows.held, other.held, strict=True):
        for part in held.batches(4):
            numbers += part
            batch, captions = rows.draw(part, held.seed, held), held.captions(part)
            assert len(part) <= 4 and not batch.dropped.any()
            assert not known.keys() & {key(x) for x in batch.stored}
            same = split(other, other.draw(part, again.seed, again))
            for a, b, caption in zip(split(rows, batch), same, captions, strict=True):
                assert equal(a, b) and torch.equal(a[1], encoded(kind, caption))
            assert held.t_index(part).tolist() == [number % 8 for number in part]
    assert numbers == list(range(n))
    if kind == "mnist":  # different captions first
        assert rows.held[0].shown(3) == [0, 2, 1]


def test_a_size_that_only_held_rows_have(tmp_path):
    sizes, order = [(48, 48)] * 10, np.random.default_rng(rf.mix_seed(0, "prepare", 0))
    sizes[order.permutation(10)[9]] = (64, 36)
    run(pictures(tmp_path / "source", 10, sizes), tmp_path / "data")
    _, rows = opened(tmp_path / "data")
    assert rows.sides() == {(16, 16): 1.0, (12, 20): 0.0} and rows.shown_shape() == (3, 12, 20)


def test_other_rows_have_another_id(open_kind, home):
    """A run is not resumed on others."""
    ids = [open_kind(kind)[1].id for kind in ("mnist", "cifar10", "prepared", "pairs", "mixed")]
    ids += [opened(home / name)[1].id for name in ("short", "eight", "staged")]
    assert len(set(ids)) == len(ids)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, typed, message",
    [
        ("prepared pairs", {}, r"cannot be mixed: K 2 and 0"),
        ("prepared short", {}, r"cannot be mixed: facts .*'text_tokens': 6"),
        ("prepared eight", {}, r"cannot be mixed: format .*bits=8"),
        ("prepared", {"data_weights": [1, 2]}, r"has 2 numbers, must have one for each of the 1"),
        ("prepared", {"segments": 2}, r"--segments 2 must divide the 0 of --data"),
        ("pairs", {"segments": 3}, r"--segments 3 must divide the 2 of --data"),
        ("shapes", {"text_encoder": "words"}, r"--text-encoder words is for digits"),
        ("prepared", {"time": "start"}, r"--time start is for pairs \(tools.pairs\): drop it"),
        ("prepared", {"anneal": 0.5}, r"--anneal 0.5 is for pairs"),
        ("pairs", {"anneal": 0.5, "segments": 2}, r"--anneal 0.5 is .* with --segments 1"),
        ("nowhere", {}, r"--data nowhere is none of .* python -m tools.prepare SOURCE"),
        ("memory://nowhere", {}, r"is far away: give --stage, a folder on this disk"),
        ("memory://nowhere", {"stage": Path()}, r"manifest.json \(memory://nowhere/.* cannot be"),
        ("nosuch://x", {"stage": Path()}, r"--data nosuch://x .* Protocol not known"),
        ("pairs", {"shift": 9.0}, r"--shift 9.0 does not fit --data, which was made with"),
        ("prepared", {"size": 17}, r"--size 17 does not fit --data, which was made with 16"),
        (
            "shapes",
            {"vae": "vae", "size": 21},
            r"--size 21 must be a multiple of 2, the VAE's factor",
        ),
    ],
)
def test_rows_that_do_not_fit(home, monkeypatch, data, typed, message):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=message) as refused:
        opened(*data.split(), **typed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("manifest", "", ""),
        ("manifest", "[]", ""),
        ("manifest", '{"schema": 5}', '"size" is missing'),
        ("manifest", "[" * 100_000, "recursion"),
        ("pairs", '{"schema": 5}', '"facts" is missing'),
    ],
)
def test_broken_headers(tmp_path, name, content, message):
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(
        ValueError, match=f"{name}.json is damaged, or of another version: .*{message}"
    ) as told:
        opened(tmp_path)
    assert "\n" not in str(told.value)
    (tmp_path / f"{name}.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match='"schema" 9 must be one of 5: make it again'):
        opened(tmp_path)


@pytest.mark.parametrize("cut", [None, 0, 400])
def test_broken_chunks(home, tmp_path, cut):
    out = edited(home / "square", tmp_path / "data")
    for chunk in out.glob("chunks/*.arrow"):
        chunk.unlink() if cut is None else os.truncate(chunk, cut)
    with pytest.raises((ValueError, OSError), match=r"0000\d.arrow") as refused:
        opened(out)[1].at([0])
    assert "\n" not in str(refused.value)


# --- the copier ----------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Chunks in the order of their arrival, and the most bytes that lay there at one time."""
    seen, fetch = SimpleNamespace(chunks=[], most=0), PreparedFolder.fetch

    def counted(folder, chunk, target):
        fetch(folder, chunk, target)
        seen.chunks.append(chunk)
        sizes = [file.stat().st_size for file in folder.stage.rglob("*.arrow")]
        seen.most = max(seen.most, sum(sizes))

    monkeypatch.setattr(PreparedFolder, "fetch", counted)
    return seen


def staged(location, tmp_path):
    return opened(location, stage=tmp_path / "stage", window=1)[1]


@pytest.mark.parametrize("seen, far", [(0, False), (40, True)])
def test_chunks_come_ahead_of_their_use_within_the_limit(home, tmp_path, copies, seen, far):
    location, plain = home / "staged", opened(home / "staged", window=1)[1]
    if far:
        location = f"memory://{tmp_path}"
        fsspec.filesystem("memory").put(str(home / "staged"), str(tmp_path), recursive=True)
    rows, *readers = (staged(location, tmp_path) for _ in range(3))
    with pytest.raises(ValueError, match="--stage-limit 1e-06 GB must be at least") as refused:
        Copier(rows, 1e3, seen)
    limit = float(re.search(r"at least (\S+) GB", str(refused.value))[1]) * 1e9
    assert limit < sum(use.file[1] for use in islice(rows.uses(0), 7))  # of all chunks
    source = rows.sources[0]
    left = [source.path(3), source.stage / FAILED, source.stage / ".00003.arrow.17"]
    left[0].parent.mkdir(parents=True)
    for file in (*left, source.stage / "mine.txt"):
        file.write_text("of an earlier run")
    copier = Copier(rows, limit, seen)
    assert [file.exists() for file in (*left, source.stage / "mine.txt")] == [False] * 3 + [True]
    copier.begin(seen)
    for first in range(seen, 128, 4):
        part = range(first, first + 4)
        (x, text), (y, same) = readers[first // 4 % 2].at(part), plain.at(part)
        assert torch.equal(x, y) and equal(text[:2], same[:2])
        copier.passed((first + 4) // 8 * 8)
    copier.close()
    assert not copier.is_alive() and 0 < copies.most <= limit
    assert copies.chunks[0] == 1 and copies.chunks.count(1) == 1  # the held-out row's: it stays
    assert max(Counter(copies.chunks).values()) <= 4


@pytest.mark.parametrize("seen", [0, 40, 44])
def test_a_chunk_is_in_use_from_the_first_step_that_reads_it_to_the_last(home, tmp_path, seen):
    """Also after a change of the batch size: steps of 8 samples then begin anywhere."""
    run(home / "squares", tmp_path / "data", "--chunk-rows", 3, "--validation", 1)
    _, rows = opened(tmp_path / "data", window=1)
    ((source, order, _),) = rows.streams
    uses = [*takewhile(lambda use: use.first < seen + 80, rows.uses(seen))]
    for step in range(seen, seen + 80, 8):
        read = {source.find(row)[2].chunk for row in order(range(step, step + 8))}
        assert read == {use.chunk for use in uses if use.first <= step and step + 8 <= use.last}


def test_what_stands_at_a_position_does_not_depend_on_the_batch_size(open_kind):
    """If the rows have one size and come from one folder."""
    (_, four), (_, nine) = (open_kind("shapes", batch_size=size) for size in (4, 9))
    (x, text), (y, same) = four.at(range(18, 22)), nine.at(range(18, 27))
    assert torch.equal(x, y[:4]) and torch.equal(text, same[:4])


def test_a_copier_with_room_stays_within_an_epoch_of_the_run(home, tmp_path):
    rows = staged(home / "staged", tmp_path)
    copier = Copier(rows, 1e9)
    use = next(use for use in rows.uses(0) if use.file[0] not in copier.staged)
    for seen in (0, 24):
        copier.passed(seen)
        for ahead, there in ((59, True), (60, False)):
            assert copier._room(use._replace(first=seen + ahead)) == there
    copier.limit = 1e3  # as if a later epoch needed more than those that were looked at
    with pytest.raises(ValueError, match="--stage-limit 1e-06 GB is full of chunks in use"):
        copier._room(use)


@pytest.mark.parametrize(
    "arrivals, message",
    [
        ("none cut whole", None),
        ("cut other other", "staging failed: .* arrives with .*, must have .*: prepare it again"),
        ("none none none", "staging failed: connection reset"),
    ],
)
def test_a_broken_copy_is_made_again(home, tmp_path, monkeypatch, arrivals, message):
    """Up to three times; then the readers hear what went wrong."""
    rows, opens, tries = staged(home / "staged", tmp_path), fsspec.open, Counter()
    copier, plain = Copier(rows, 1e9), opened(home / "staged", window=1)[1]

    def arrives(path, mode):
        tries[path] += 1
        how = arrivals.split()[tries[path] - 1]
        if how == "none":
            raise OSError("connection reset")
        with opens(path, mode) as file:
            content = file.read()
        other = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        return io.BytesIO({"cut": content[:100], "other": other, "whole": content}[how])

    monkeypatch.setattr(fsspec, "open", arrives)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    copier.begin(0)
    told = pytest.raises(OSError, match=message) if message else nullcontext()
    with told:
        for position in range(56):
            assert torch.equal(rows.at([position])[0], plain.at([position])[0])
    copier.close()
    assert set(tries.values()) == {3}


def test_readers_stop_waiting_when_the_run_has_ended_or_died(home, tmp_path, monkeypatch):
    rows = staged(home / "staged", tmp_path)
    Copier(rows, 1e9).close()  # before it began: nothing is ever copied
    with pytest.raises(OSError, match="the run has ended"):
        rows.at(range(8))
    (rows.sources[0].stage / FAILED).unlink()
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(OSError, match="the run has died"):
        rows.at(range(8))
