"""data_mnist.py: each source, each kind of bad input, batches as a function of (seed, step)."""

import gzip
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import data_mnist
from data_mnist import Batches, ImageSet, OneHotText, glyphs, load_images, to_bytes, to_unit


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails at once, as on a machine that has none."""

    def refuse(*args, **kwargs):
        raise URLError("no network here")  # torchvision wraps it in an error of several lines

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)


def write_mnist(folder, n=12):
    """A tiny MNIST in the original file format, where torchvision looks for it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        images = np.arange(n * 28 * 28, dtype=np.uint32).astype(np.uint8)
        header = struct.pack(">IIII", 2051, n, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
        for name in ("images-idx3", "labels-idx1"):
            with gzip.open(raw / f"{prefix}-{name}-ubyte.gz", "wb") as file:
                file.write((raw / f"{prefix}-{name}-ubyte").read_bytes())


# --- sources -------------------------------------------------------------------------------------


def test_mnist_is_read_where_torchvision_keeps_it(tmp_path, offline):
    write_mnist(tmp_path)
    for source in ("mnist", "auto"):
        (images, labels, classes, name), held_out = load_images(source, tmp_path)
        assert len(held_out.labels) == 12
        assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8
        assert labels.tolist() == [i % 10 for i in range(12)] and name == "mnist"
        assert images[0, 0, 1, 3] == 31 and classes == [str(i) for i in range(10)]


def test_auto_says_in_one_line_that_it_trains_on_glyphs(tmp_path, offline, capsys, monkeypatch):
    monkeypatch.setattr(data_mnist, "glyphs", lambda n, seed: glyphs(20, seed))
    assert load_images("auto", tmp_path)[0].source == "glyphs"
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "glyphs" in lines[0] and "no network here" in lines[0]


def test_mnist_never_falls_back(tmp_path, offline):
    with pytest.raises(ValueError, match=r"no network here.*--data-dir.*--dataset glyphs"):
        load_images("mnist", tmp_path)


def test_glyphs_are_seeded_legible_and_varied():
    a, b, c = glyphs(200, seed=1), glyphs(200, seed=1), glyphs(200, seed=2)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (200, 1, 28, 28) and a.images.dtype == torch.uint8
    assert set(a.labels.tolist()) == set(range(10)) and len(data_mnist.glyph_masks()) >= 15
    ink = (a.images > 127).float().mean((1, 2, 3))
    assert ink.min() > 0.02 and ink.max() < 0.5  # every picture has a digit, none is full
    border = torch.cat([a.images[:, :, 0].flatten(), a.images[:, :, -1].flatten()])
    assert (border > 127).float().mean() < 0.01  # digits stay inside
    ones = a.images[a.labels == 1].float()
    assert ones.std(0).max() > 50  # no two alike


def test_glyph_classes_differ_enough_to_be_read():
    """Nearest mean of 2,000 training glyphs reads far more than one in ten of new ones."""
    train, test = glyphs(2000, seed=0), glyphs(500, seed=1)
    means = torch.stack([train.images[train.labels == k].float().mean(0) for k in range(10)])
    read = torch.cdist(test.images.flatten(1).float(), means.flatten(1)).argmin(1)
    assert (read == test.labels).float().mean() > 0.6


def test_folder_reads_any_format_and_holds_some_out(image_folder):
    train, test = load_images("folder", image_folder, size=8)
    assert train.classes == ["blue", "red"] and train.images.shape == (18, 3, 8, 8)
    assert len(test.labels) == 2
    for images, labels, _, _ in (train, test):
        reddest = images.float().mean((2, 3)).argmax(1) == 0
        assert torch.equal(reddest, labels == 1)


def test_grey_folder_has_one_channel(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(3):
        Image.new("L", (9, 9), 40 * i).save(tmp_path / "a" / f"{i}.png")
    assert load_images("folder", tmp_path, size=8)[0].images.shape == (2, 1, 8, 8)


def write_parquet(path, n=20, column="img", names=("ant", "cat")):
    import io

    datasets = pytest.importorskip("datasets")
    cells, labels = [], []
    for i in range(n):
        buffer = io.BytesIO()
        Image.new("RGB", (10, 10), (10 * i, 0, 255 - 10 * i)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(names[i % 2])
    datasets.Dataset.from_dict({column: cells, "label": labels}).to_parquet(path)


@pytest.mark.parametrize("as_folder", [False, True])
def test_parquet_with_images_and_text_labels(tmp_path, as_folder):
    write_parquet(tmp_path / "train.parquet")
    where = tmp_path if as_folder else tmp_path / "train.parquet"
    train, test = load_images("parquet", where, size=8)
    assert len(test.labels) == 2
    assert train.images.shape == (18, 3, 8, 8) and train.classes == ["ant", "cat"]
    tens = train.images[:, 0, 0, 0] // 10  # the row's number, painted into it
    assert torch.equal(tens.long() % 2, train.labels)


def test_parquet_folder_with_a_test_split(tmp_path):
    write_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path / "test.parquet", n=4)
    train, test = load_images("parquet", tmp_path, size=8)
    assert len(train.labels) == 20 and len(test.labels) == 4


# --- bad input -----------------------------------------------------------------------------------


def test_bad_sources_say_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="'mnits' must be one of auto, mnist, glyphs"):
        load_images("mnits")
    for source in ("folder", "parquet"):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            load_images(source, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="one sub-folder a class"):
        load_images("folder", tmp_path)
    with pytest.raises(ValueError, match=r"no \.parquet file"):
        load_images("parquet", tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="is not readable parquet"):
        load_images("parquet", tmp_path)
    with pytest.raises(ValueError, match="is a file; --dataset folder needs a folder"):
        load_images("folder", tmp_path / "broken.parquet")


def test_parquet_splits_are_told_by_whole_words_in_the_path(tmp_path):
    for name, n in [("train/0000", 20), ("test/0000", 4), ("train/latest", 6)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", n=n)
    train, test = load_images("parquet", tmp_path, size=8)
    assert len(train.labels) == 26 and len(test.labels) == 4


def test_parquet_labels_mean_the_same_in_both_splits(tmp_path):
    """A test split without the first class keeps the training's numbers; a new label is refused."""
    write_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path / "test.parquet", n=4, names=("cat", "cat"))
    assert load_images("parquet", tmp_path, size=8)[1].labels.tolist() == [1, 1, 1, 1]
    write_parquet(tmp_path / "test.parquet", n=4, names=("cat", "dog"))
    with pytest.raises(ValueError, match=r"unknown labels \['dog'\]"):
        load_images("parquet", tmp_path, size=8)


def test_cifar10_is_channels_first_and_keeps_its_names(monkeypatch, tmp_path):
    class Stand:
        classes = ("airplane", "bird")

        def __init__(self, root, train, download):
            self.data = np.zeros((4, 32, 32, 3), np.uint8)
            self.data[:, :, :, 2] = 7  # blue
            self.targets = [0, 1, 1, int(train)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stand)
    train, test = load_images("cifar10", tmp_path)
    assert train.images.shape == (4, 3, 32, 32) and (train.images[:, 2] == 7).all()
    assert train.classes == ["airplane", "bird"] and train.labels.tolist() == [0, 1, 1, 1]
    assert test.labels.tolist() == [0, 1, 1, 0]


def test_parquet_lists_the_columns_there_are(tmp_path):
    write_parquet(tmp_path / "x.parquet", column="photo")
    with pytest.raises(ValueError, match="there are: photo, label"):
        load_images("parquet", tmp_path)


def many_images(folder, n, bad):
    (folder / "a").mkdir(parents=True)
    for i in range(n):
        Image.new("L", (4, 4), i % 250).save(folder / "a" / f"{i:03}.png")
    for i in range(bad):
        (folder / "a" / f"{i:03}.png").write_bytes(b"not a picture")


def test_an_unreadable_image_in_a_hundred_is_named_and_skipped(tmp_path, capsys):
    many_images(tmp_path, 400, bad=3)
    assert sum(len(part.labels) for part in load_images("folder", tmp_path, size=4)) == 397
    said = capsys.readouterr().err
    assert "images are unreadable" in said and "000.png" in said and "skipped" in said


def test_more_unreadable_images_are_an_error(tmp_path):
    many_images(tmp_path, 100, bad=20)
    with pytest.raises(ValueError, match=r"20 of 100 images are unreadable: .*png.*at most 1%"):
        load_images("folder", tmp_path, size=4)


# --- captions, bytes, batches --------------------------------------------------------------------


def test_one_hot_captions_end_with_no_caption():
    text = OneHotText(3)
    assert text(torch.tensor([2, text.null])).tolist() == [[[0, 0, 1, 0]], [[0, 0, 0, 1]]]
    assert torch.equal(text.null_text, text(torch.tensor([3])))


def test_bytes_survive_the_round_trip():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_unit(x)), x)
    assert to_unit(x).min() == -1 and to_unit(x).max() == 1
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def numbered(n):
    """n images whose pixels hold their own number, with distinct left and right halves."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 4, 4)
    images[..., 2:] += 100
    return ImageSet(images, torch.arange(n) % 5, list("abcde"), "numbered")


def batches(n=23, size=7, seed=0, flip=False, dropout=0.0):
    return Batches(numbered(n), size, seed=seed, flip=flip, dropout=dropout, device="cpu")


@pytest.mark.parametrize("n, size", [(23, 7), (21, 7), (3, 8)])
def test_each_epoch_shows_every_image_once(n, size):
    source = batches(n, size)
    seen = torch.cat([source.indices(step) for step in range(3 * n)])  # size epochs and more
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    assert not torch.equal(seen[:n], seen[n : 2 * n]) or n < 4


def test_a_batch_depends_on_seed_and_step_alone():
    a, b, other = batches(dropout=0.3, flip=True), batches(dropout=0.3, flip=True), batches(seed=1)
    ahead = {step: a[step] for step in (9, 2, 5)}
    noise = {}
    for step in (9, 2, 5):
        noise[step] = torch.randn(3, generator=a[step].generator)
    for step in range(10):
        batch = b[step]
        if step in ahead:
            assert torch.equal(batch.data, ahead[step].data)
            assert torch.equal(batch.labels, ahead[step].labels)
            assert torch.equal(torch.randn(3, generator=batch.generator), noise[step])
    assert not torch.equal(other.indices(0), a.indices(0))


def test_labels_follow_their_images_and_are_dropped_at_the_rate():
    source = batches(dropout=0.25)
    dropped = 0
    for step in range(200):
        data, labels, *_ = source[step]
        number = to_bytes(data[:, 0, 0, 0]).long()
        kept = labels != source.null
        assert torch.equal(number[kept] % 5, labels[kept])
        dropped += (~kept).sum().item()
    assert abs(dropped / (200 * 7) - 0.25) < 0.05


def test_flips_mirror_whole_images_half_of_the_time():
    source, flipped = batches(flip=True), 0
    for step in range(100):
        data = to_bytes(source[step].data).int()
        difference = data[..., 3] - data[..., 0]
        assert set(difference.flatten().tolist()) <= {100, -100}
        flipped += (difference[:, 0, 0] < 0).sum().item()
    assert abs(flipped / 700 - 0.5) < 0.06
