"""inputs/digits.py: each source, each kind of bad input."""

import gzip
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch

from inputs import digits
from inputs.digits import ImageSet, fingerprint, glyphs, load_images


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


def test_mnist_is_read_where_torchvision_keeps_it(tmp_path, offline):
    write_mnist(tmp_path)
    for source in ("mnist", "auto"):
        (images, labels, classes, name), held_out = load_images(source, tmp_path)
        assert len(held_out.labels) == 12
        assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.tolist() == [i % 10 for i in range(12)]
        assert images[0, 0, 1, 3] == 31 and classes == [str(i) for i in range(10)]
        assert name == "mnist"


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


def test_auto_says_in_one_line_that_it_trains_on_glyphs(tmp_path, offline, capsys, monkeypatch):
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: glyphs(20, seed))
    train, held_out = load_images("auto", tmp_path, seed=3)
    assert train.source == "glyphs" and not torch.equal(train.images, held_out.images)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "glyphs" in lines[0] and "no network here" in lines[0]


def test_bad_sources_say_the_way_out(tmp_path, offline):
    with pytest.raises(ValueError, match=r"'mnits': must be one of auto, mnist, glyphs, cifar10"):
        load_images("mnits")
    for source in ("mnist", "cifar10"):
        with pytest.raises(ValueError, match=r"no network here.*--data-dir.*--data glyphs") as info:
            load_images(source, tmp_path)
        assert "\n" not in str(info.value)


def test_glyphs_are_seeded_legible_and_varied():
    a, b, c = glyphs(200, seed=1), glyphs(200, seed=1), glyphs(200, seed=2)
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert a.images.shape == (200, 1, 28, 28) and a.images.dtype == torch.uint8
    assert set(a.labels.tolist()) == set(range(10)) and len(digits.glyph_masks()) >= 15
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


def test_a_fingerprint_tells_images_and_labels():
    a = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ["a"], "")
    image, label = a.images.clone(), a.labels.clone()
    image[1, 0, 3, 3], label[0] = 1, 1
    sets = (a, a._replace(images=image), a._replace(labels=label))
    assert len({fingerprint(s) for s in sets}) == 3
    assert fingerprint(a) == fingerprint(a._replace(classes=["b"])) and len(fingerprint(a)) == 8
