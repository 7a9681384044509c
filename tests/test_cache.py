"""cache.py and the order in which runs read it: buckets, windows, several caches, the stage."""

import json
import time
from collections import Counter
from itertools import islice, takewhile

import pytest
import torch
from test_prepare import pictures, run

import cache
from cache import Cache, Stage, load_caches
from data_t2i import HeldOut, KnownText, Order, Prepared, Samples, encode, loader
from encoders import Pixels

SHARDS = ["--shard-mb", "0.004", "--batch", "4", "--validation", "0"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """96 rows, 32 in each of three buckets, in many small shards; its folder."""
    folder = tmp_path_factory.mktemp("three")
    run(pictures(folder / "source", n=96), folder / "data", *SHARDS)
    return folder / "data"


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    run(pictures(folder / "source", n=24), folder / "data", *SHARDS)
    return folder / "data"


def number(source, position):
    data, shard, row = source.locate(position)
    return data.table(shard).column("row")[row].as_py()


# --- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_each_epoch_shows_each_row_once_and_whole_shards_after_another(window):
    rows = [5, 3, 8, 1, 4]
    order = Order(rows, window, seed=3)
    epochs = [[order(n) for n in range(21 * e, 21 * e + 21)] for e in range(4)]
    every = {(s, r) for s, count in enumerate(rows) for r in range(count)}
    for epoch in epochs:
        assert len(epoch) == 21 and set(epoch) == every
    assert epochs[0] != epochs[1] and [Order(rows, window, 4)(n) for n in range(21)] != epochs[0]
    uses = list(islice(order.uses(0), 4 * -(-len(rows) // window)))
    assert [first for first, *_ in uses] == [0, *(last for _, last, _ in uses[:-1])]
    for first, last, shards in uses:
        assert len(shards) <= window
        assert {order(n)[0] for n in range(first, last)} == set(shards.tolist())
    for n in (0, 7, 20, 21, 45):
        first, last, _ = next(order.uses(n))
        assert first <= n < last


def test_every_batch_is_of_one_bucket_and_every_row_comes_once_an_epoch(three):
    source = Prepared([Cache(three)], batch_size=8, seed=0)
    assert sorted(source.shares) == pytest.approx([1 / 3] * 3)
    for epoch in range(3):
        numbers = []
        for step in range(12 * epoch, 12 * epoch + 12):
            places = [source.locate(8 * step + i) for i in range(8)]
            assert {shard.bucket for _, shard, _ in places} == {source.bucket(step)}
            numbers += [number(source, 8 * step + i) for i in range(8)]
        assert Counter(numbers) == Counter(range(96))
    assert [source.bucket(k) for k in range(3)] != [source.bucket(0)] * 3  # they alternate


def test_a_bucket_that_does_not_fill_its_batches_loses_no_row(three):
    """Batches of 5 from streams of 32: their epochs end in mid-batch, and go on."""
    source = Prepared([Cache(three)], batch_size=5, seed=0)
    by_stream = {}
    for step in range(96):
        stream, j = source.at(step)
        rows = by_stream.setdefault(stream, [])
        assert j * 5 == len(rows)  # batches of a stream in their order
        rows += [number(source, 5 * step + i) for i in range(5)]
    for rows in by_stream.values():
        for epoch in range(len(rows) // 32):
            assert len(set(rows[32 * epoch : 32 * epoch + 32])) == 32


def test_the_schedule_keeps_every_share_at_any_moment_and_inverts():
    source = Prepared.__new__(Prepared)
    source.shares = [0.5, 0.25, 0.2, 0.05 - 1e-3, 1e-3]
    source.at = source._at
    counts = [0] * 5
    for step in range(3000):
        stream, j = source.at(step)
        assert j == counts[stream] and source.step_of(stream, j) == step
        counts[stream] += 1
        for s, share in enumerate(source.shares):
            assert abs(counts[s] - share * (step + 1)) < 2
    assert source.at(10**7) == source.at(10**7)
    assert source.step_of(*source.at(10**9)) == 10**9


def test_several_caches_by_weight(three, other):
    caches = load_caches([three, other])
    source = Prepared(caches, batch_size=4, seed=0, weights=[1, 3])
    taken = Counter(source.locate(4 * step)[0] is caches[1] for step in range(400))
    assert taken[True] == pytest.approx(300, abs=4)
    even = Prepared(caches, batch_size=4, seed=0)
    assert sum(even.locate(4 * step)[0] is caches[1] for step in range(400)) == pytest.approx(
        200, abs=4
    )


def test_captions_are_drawn_by_weight_and_dropped_to_the_null_one(tmp_path):
    source = pictures(tmp_path / "source", n=4)
    data = run(
        source, tmp_path / "data", "--caption", "text:3", "--caption", "other", "--validation", 0
    )
    prepared = Prepared([data], batch_size=1, seed=0)
    chosen = Counter()
    for position in range(2000):
        row = data.row(*prepared.locate(position)[1:])
        _, features = prepared.fetch(position, dropped=False)
        which = [
            i for i, f in enumerate(row.features) if f is not None and torch.equal(f, features)
        ]
        chosen[row.captions[1] is not None, which[0]] += 1
    assert chosen[True, 1] / (chosen[True, 0] + chosen[True, 1]) == pytest.approx(0.25, abs=0.04)
    assert chosen[False, 1] == 0 and chosen[False, 0] > 400
    assert torch.equal(prepared.fetch(0, dropped=True)[1], data.null_text)
    again = Prepared([Cache(tmp_path / "data")], batch_size=1, seed=0)
    for position in (5, 900):
        assert torch.equal(again.fetch(position, False)[1], prepared.fetch(position, False)[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_buckets_and_rows_and_resume_anywhere(three, workers):
    def batches(rank, world_size, seen, steps):
        data = Cache(three)
        source = Prepared([data], batch_size=8, seed=1)
        samples = Samples(source, KnownText(data), Pixels(), seed=1)
        made = loader(
            samples, seen=seen, micro_batch=8 // world_size, rank=rank, world_size=world_size,
            workers=workers, pin_memory=False,
        )  # fmt: skip
        return list(islice(made, steps))

    def sample(batch, i):
        features = data.text.expand(batch.text)[i]
        return batch.images[i], features, batch.t[i], batch.noise[i]

    data = Cache(three)
    alone = batches(0, 1, 0, 14)  # 12 steps are an epoch
    pair = [[*batches(r, 2, 0, 5), *batches(r, 2, 40, 3)] for r in range(2)]  # killed, continued
    later = batches(0, 1, 64, 6)  # and on one rank again
    assert len({x.images.shape for x in alone}) == 3
    for step, whole in enumerate(alone):
        for i in range(8):
            got = sample(pair[i // 4][step], i % 4) if step < 8 else sample(later[step - 8], i)
            assert all(torch.equal(x, y) for x, y in zip(sample(whole, i), got, strict=True))


def test_held_out_rows_are_asked_at_their_own_times(tmp_path):
    data = run(pictures(tmp_path / "source", n=96), tmp_path / "data", "--validation", 9)
    held = HeldOut([data])
    assert len(held) == 9
    batches = held.batches(2)
    assert sorted(p for part in batches for p in part) == list(range(9))
    for part in batches:
        assert len(part) <= 2 and len({held.rows[p][1].bucket for p in part}) == 1
    times = held.t_index(list(range(9)))
    assert sorted(times.tolist()) == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    text = KnownText(data)
    caption, features = held.caption(3)
    text.known[caption] = features
    both = text([caption, ""])
    assert torch.equal(both[0, : len(features)], features.float()) and not both[1].any()
    batch = Samples(held, text, Pixels(), seed=0, dropout=0.0).__getitems__(batches[0])
    x, features, *_ = encode(batch, Pixels(), text, "cpu")
    assert x.shape == batch.noise.shape and features.dtype == torch.float32


# --- what is refused -----------------------------------------------------------------------------


def test_caches_that_do_not_fit(three, other, tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json .*data_t2i\.py prepare"):
        Cache(tmp_path)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        Cache("nowhere://bucket/data")
    manifest = json.loads((three / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ValueError, match="has schema 99, this program reads 1"):
        Cache(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"text_encoder": "t5"}))
    with pytest.raises(ValueError, match=r"has text_encoder t5, but .* has hash"):
        load_caches([three, tmp_path])
    for key, value in (
        ("text_format", manifest["text_format"] | {"bits": 8}),
        ("image", manifest["image"] | {"kind": "latents"}),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(ValueError, match=f"has {key} "):
            load_caches([three, tmp_path])


# --- the stage -----------------------------------------------------------------------------------


class Disk:
    """Counts the bytes under a folder whenever the stage has put something there."""

    def __init__(self, monkeypatch, folder):
        self.most, self.read, original = 0, Counter(), cache.fetch

        def fetch(data, shard, target):
            self.read[shard.file] += 1
            original(data, shard, target)
            files = [f for f in folder.rglob("*") if f.suffix == ".arrow"]
            self.most = max(self.most, sum(f.stat().st_size for f in files))

        monkeypatch.setattr(cache, "fetch", fetch)


CLAIMED = []


def claim(folder):
    """Empty and lock the folder until the tests end."""
    CLAIMED.append(Stage.claim(folder))


def staged(location, folder, window=1, batch_size=8):
    data = Cache(location, folder)
    return data, Prepared([data], batch_size=batch_size, seed=0, window=window)


class Epochs:
    """The uses of a source that begin before sample `end`, as a run of that length would have."""

    def __init__(self, source, end):
        self.source, self.end, self.epoch = source, end, source.epoch

    def uses(self, seen):
        return takewhile(lambda use: use.first < self.end, self.source.uses(seen))


@pytest.mark.parametrize("seen", [0, 40])
def test_each_shard_is_staged_once_an_epoch_within_the_limit(three, tmp_path, monkeypatch, seen):
    disk = Disk(monkeypatch, tmp_path)
    _, source = staged(three, tmp_path)
    plain = Prepared([Cache(three)], batch_size=8, seed=0, window=1)
    limit, shards = source.stage_bytes(), {shard.file for shard in Cache(three).shards}
    assert limit < sum(shard.bytes for shard in Cache(three).shards)
    claim(tmp_path)
    stage = Stage(tmp_path, limit, Epochs(source, 96))
    stage.begin(seen)
    readers = [staged(three, tmp_path)[1] for _ in range(2)]  # two ranks
    for step in range(seen // 8, 12):
        for i in range(8):
            got, _ = readers[i % 2].fetch(8 * step + i, dropped=True)
            assert torch.equal(got, plain.fetch(8 * step + i, dropped=True)[0])
        stage.advance(8 * step + 8)
    stage.close()
    assert 0 < disk.most <= limit
    assert set(disk.read.values()) == {1}
    needed = {source.locate(position)[1].file for position in range(seen, 96)}
    assert disk.read.keys() == needed and (needed == shards) == (seen == 0)


def test_a_copy_that_is_cut_off_is_made_again(three, tmp_path, monkeypatch):
    import fsspec

    plain = Prepared([Cache(three)], batch_size=8, seed=0, window=1)
    _, source = staged(three, tmp_path)
    opened, original = Counter(), fsspec.open

    class Short:
        """A file that ends after 100 bytes when it is opened for the first time."""

        def __init__(self, path, mode):
            self.path, self.mode = path, mode
            opened[path] += 1

        def __enter__(self):
            self.file = original(self.path, self.mode).open()
            self.left = 100 if opened[self.path] == 1 else 10**9
            return self

        def read(self, n):
            content = self.file.read(min(n, self.left))
            self.left -= len(content)
            return content

        def __exit__(self, *_):
            self.file.close()

    claim(tmp_path)
    stage = Stage(tmp_path, 10**9, Epochs(source, 96))
    monkeypatch.setattr(fsspec, "open", Short)
    stage.begin(0)
    for position in range(96):
        got, _ = source.fetch(position, dropped=True)
        assert torch.equal(got, plain.fetch(position, dropped=True)[0])
    stage.close()
    assert set(opened.values()) == {2} and len(opened) == len(plain.streams[0][0].shards)


def test_what_an_earlier_run_left_is_thrown_away_and_two_runs_are_not_mixed(three, tmp_path):
    data, _ = staged(three, tmp_path)
    left = data.path(data.shards[0])
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (tmp_path / Stage.FAILED).write_text("old")
    lock = Stage.claim(tmp_path)
    assert not left.exists() and not (tmp_path / Stage.FAILED).exists()
    with pytest.raises(ValueError, match=r"--stage .* is in use: give each run its own"):
        Stage.claim(tmp_path)
    lock.close()
    Stage.claim(tmp_path).close()


def test_a_reader_stops_waiting_when_the_run_has_ended_or_died(three, tmp_path, monkeypatch):
    _, source = staged(three, tmp_path)
    stage = Stage(tmp_path, 10**9, source)
    claim(tmp_path)
    stage.close()  # before it began: nothing is ever staged
    with pytest.raises(OSError, match="the run has ended"):
        source.fetch(0, dropped=True)
    (tmp_path / Stage.FAILED).unlink()
    parents = iter([7, 7, 1])
    monkeypatch.setattr(cache.os, "getppid", lambda: next(parents))
    with pytest.raises(OSError, match="the run has died"):
        source.fetch(0, dropped=True)


def test_a_network_that_fails_once_is_tried_again(three, tmp_path, monkeypatch):
    import fsspec

    _, source = staged(three, tmp_path)
    calls, original = [], fsspec.open

    def hiccup(path, mode):
        calls.append(path)
        if len(calls) == 1:
            raise OSError("connection reset")
        return original(path, mode)

    monkeypatch.setattr(cache.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(fsspec, "open", hiccup)
    use = next(source.uses(0))
    cache.fetch(use.cache, use.shard, use.cache.path(use.shard))
    assert len(calls) == 2 and use.cache.path(use.shard).stat().st_size == use.shard.bytes


def test_a_batch_larger_than_a_window_needs_a_larger_stage(three):
    data = Cache(three)
    every = sum(shard.bytes for shard in data.shards)
    small = Prepared([data], batch_size=2, seed=0, window=1).stage_bytes()
    large = Prepared([data], batch_size=64, seed=0, window=1).stage_bytes()
    assert small < every == large  # 64 rows of one bucket: all of its shards, more than once


def test_readers_hear_that_a_shard_cannot_be_had(three, tmp_path):
    import shutil

    shutil.copytree(three, tmp_path / "data")
    _, source = staged(tmp_path / "data", tmp_path / "stage")
    first = next(source.uses(0)).shard
    content = bytearray((tmp_path / "data" / first.file).read_bytes())
    content[-20] ^= 1
    (tmp_path / "data" / first.file).write_bytes(content)
    claim(tmp_path / "stage")
    stage = Stage(tmp_path / "stage", 10**9, source)
    stage.begin(0)
    with pytest.raises(OSError, match=r"staging failed: .* arrives with"):
        for position in range(96):
            source.fetch(position, dropped=True)
    stage.close()
    assert not list((tmp_path / "stage").rglob("*.copy"))


def test_a_cache_far_away_is_read_through_the_stage(three, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(three), "/far/data", recursive=True)
    with pytest.raises(ValueError, match="is far away: give --stage"):
        Cache("memory://far/data")
    _, source = staged("memory://far/data", tmp_path)
    claim(tmp_path)
    stage = Stage(tmp_path, source.stage_bytes(), source)
    stage.begin(0)
    plain = Prepared([Cache(three)], batch_size=8, seed=0, window=1)
    for position in range(96):
        got, want = (s.fetch(position, dropped=False) for s in (source, plain))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        stage.advance(position + 1)
    stage.close()


def test_an_idle_stage_can_be_closed(three, tmp_path):
    _, source = staged(three, tmp_path)
    claim(tmp_path)
    stage = Stage(tmp_path, source.stage_bytes(), source)
    stage.begin(0)
    time.sleep(0.1)  # it is full now and waits
    stage.close()
    assert not stage.is_alive()


def test_a_stage_larger_than_the_data_waits_too(three, tmp_path):
    """It does not run through epoch after epoch while the run has not moved."""
    _, source = staged(three, tmp_path)
    given, uses = [], source.uses
    source.uses = lambda seen: (given.append(use) or use for use in uses(seen))
    claim(tmp_path)
    stage = Stage(tmp_path, 10**9, source)
    stage.begin(0)
    settle(given)
    ahead = len(given)
    stage.advance(48)
    settle(given)
    stage.close()
    assert 12 <= ahead < len(given) < 30


def settle(given):
    """Until nothing has been added for a while, and something is there."""
    before = -1
    while len(given) != before or before < 12:
        before = len(given)
        time.sleep(0.25)
