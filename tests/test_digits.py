"""inputs/digits.py: each source, each kind of bad input."""

import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch

from inputs import digits
from inputs.digits import fingerprint, glyphs, load_images


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails at once, as on a machine that has none."""

    def refuse(*args, **kwargs):
        raise URLError("no network here")  # torchvision wraps it in an error of several lines

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def write_mnist(folder, n=12):
    """A tiny MNIST in the original file format, where torchvision looks for it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = struct.pack(">IIII", 2051, n, 28, 28) + bytes(i % 256 for i in range(n * 28 * 28))
    labels = struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("source", ["mnist", "auto"])
def test_mnist_is_read_where_torchvision_keeps_it(tmp_path, offline, source):
    write_mnist(tmp_path)
    (images, labels, classes, name), held_out = load_images(source, tmp_path)
    assert images.shape == (12, 1, 28, 28) and images[0, 0, 1, 3] == 31
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert labels.tolist() == [*range(10), 0, 1] and classes == list("0123456789")
    assert len(held_out.labels) == 12 and name == "mnist"


def test_another_set_of_the_form_is_named_and_odd_pictures_are_refused(tmp_path, offline, capsys):
    write_mnist(tmp_path)
    load_images("mnist", tmp_path)
    assert "is another set of its form, or damaged" in capsys.readouterr().err
    file = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    content = file.read_bytes()
    for height, width in ((14, 56), (56, 14)):  # of one part, then of both
        for part in ("t10k", "train"):
            changed = struct.pack(">IIII", 2051, 12, height, width) + content[16:]
            file.with_name(f"{part}-images-idx3-ubyte").write_bytes(changed)
            with pytest.raises(ValueError, match="must be of one square"):
                load_images("mnist", tmp_path)


def test_cifar10_is_channels_first_and_keeps_its_names(monkeypatch):
    class Stand:
        classes = ("airplane", "bird")

        def __init__(self, root, train, download):
            self.data = np.full((4, 32, 32, 3), (0, 0, 7), np.uint8)  # blue
            self.targets = [0, 1, 1, int(train)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stand)
    for part, last in zip(load_images("cifar10"), (1, 0), strict=True):
        assert part.images.shape == (4, 3, 32, 32) and (part.images[:, 2] == 7).all()
        assert part.classes == ["airplane", "bird"] and part.labels.tolist() == [0, 1, 1, last]


def test_auto_says_in_one_line_that_it_trains_on_glyphs(tmp_path, offline, capsys, monkeypatch):
    monkeypatch.setattr(digits, "glyphs", lambda n, seed: glyphs(20, seed))
    train, held_out = load_images("auto", tmp_path, seed=3)
    assert train.source == "glyphs" and not torch.equal(train.images, held_out.images)
    (line,) = capsys.readouterr().err.splitlines()
    assert "glyphs" in line and "no network here" in line


@pytest.mark.parametrize(
    "source, message",
    [
        ("mnits", "'mnits': must be one of auto, mnist, glyphs, cifar10"),
        ("mnist", "no network here.*--data-dir.*--data glyphs"),
        ("cifar10", "cifar10 in .* is not there and could not be downloaded"),
    ],
)
def test_bad_sources_say_the_way_out(tmp_path, offline, source, message):
    with pytest.raises(ValueError, match=message) as info:
        load_images(source, tmp_path)
    assert "\n" not in str(info.value)


def test_glyphs_are_seeded_legible_and_varied():
    train, again, test = glyphs(2000), glyphs(2000), glyphs(500, seed=1)
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)
    assert train.images.shape == (2000, 1, 28, 28) and train.images.dtype == torch.uint8
    ink = (train.images > 127).float()
    least, most = ink.mean((1, 2, 3)).aminmax()  # every picture has a digit, none is full
    assert least > 0.02 and most < 0.5 and ink[:, :, [0, -1]].mean() < 0.01
    of = [train.images[train.labels == k].float() for k in range(10)]
    assert of[1].std(0).max() > 50 and len(digits.glyph_masks()) >= 15  # no two alike
    means = torch.stack([images.mean(0) for images in of])
    read = torch.cdist(test.images.flatten(1).float(), means.flatten(1)).argmin(1)
    assert (read == test.labels).float().mean() > 0.6  # far more than one in ten


def test_a_fingerprint_tells_images_and_labels():
    a = glyphs(3)
    others = a._replace(images=a.images.flip(0)), a._replace(labels=a.labels.flip(0))
    assert len({fingerprint(x) for x in (a, *others, glyphs(3))}) == 3
