"""common/pictures.py: each picture stands in its place, with its words, in a file that opens."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from common import pictures

ROOT = Path(__file__).parents[1]


def numbered(n, channels=3, height=8, width=12):
    """n pictures; every pixel of picture i is 20·i."""
    return (
        torch.arange(0, 20 * n, 20, dtype=torch.uint8)
        .view(n, 1, 1, 1)
        .repeat(1, channels, height, width)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_goes_row_by_row(channels):
    picture = pictures.grid(numbered(5, channels), 3)
    assert picture.shape == (2 * 9 + 1, 3 * 13 + 1, 3) and picture.dtype == np.uint8
    assert picture[1::9, 1::13, 0][:2, :3].tolist() == [[0, 20, 40], [60, 80, 255]]
    assert (picture[0] == 255).all() and (picture[:, 13] == 255).all()


@pytest.mark.parametrize("n", [1, 4])
def test_strips_are_pixels_as_they_are_and_progress_cuts_them_again(tmp_path, n, monkeypatch):
    torch.manual_seed(0)
    drawn = torch.randint(256, (3, n, 3, 8, 12), dtype=torch.uint8)
    for number, row in zip((5, 40_000, 900), drawn, strict=True):
        pictures.strip(row, tmp_path / "strips" / f"{number:012d}.png")
    image = torch.from_numpy(np.array(Image.open(tmp_path / "strips" / "000000000005.png")))
    assert torch.equal(image, torch.cat(list(drawn[0]), dim=2).permute(1, 2, 0))
    seen = []
    monkeypatch.setattr(pictures, "sheet", lambda *given, **how: seen.extend(given))
    pictures.progress(tmp_path / "strips", ["a"] * n, tmp_path / "progress.png")
    assert torch.equal(seen[0], drawn[[0, 2, 1]].flatten(0, 1))
    assert seen[1:] == [n, tmp_path / "progress.png", ["a"] * n, ["5", "900", "40,000"]]


@pytest.mark.parametrize("n, columns", [(1, 6), (5, 2)])
def test_a_sheet_shows_every_picture_in_its_place(tmp_path, n, columns):
    """Each picture's middle has its own colour, row by row, whatever the captions."""
    captions = ["$10 #1 and $20", "win $$$", "", "a long caption " * 9, "b"][:n]
    red = (numbered(n) + 20) * torch.tensor([1, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    pictures.captioned(red, captions, tmp_path / "a.png", columns)
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    corners = []
    for i in range(n):
        box = np.argwhere((shown == (20 + 20 * i, 0, 0)).all(-1))
        assert abs(np.ptp(box, axis=0) - [143, 215]).max() <= 3  # 1.8 inches wide, 8:12
        corners.append(box.min(0))
    ways = [tuple(way > (200, 50)) for way in np.diff(corners, axis=0)]  # down past words, right
    assert ways == [(False, True) if i % columns else (True, False) for i in range(1, n)]


def test_a_film_goes_from_noise_to_data_and_rests(tmp_path):
    torch.manual_seed(0)
    frames = torch.stack([numbered(4, 1), torch.full_like(numbered(4, 1), 255)])
    pictures.film(frames, 2, tmp_path / "a.gif")
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 2 and film.info["loop"] == 0
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(film)] == [120, 2000]
    assert film.size == (27 * 11, 19 * 11)  # enlarged to about 300 pixels
    assert (np.asarray(film.convert("L")) > 250).all()  # the last frame is white


def test_a_film_of_many_pictures_is_enlarged_less(tmp_path):
    frames = torch.zeros(1, 600, 1, 20, 20, dtype=torch.uint8)
    pictures.film(frames, 1, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.size == (22 * 5, (600 * 21 + 1) * 5)


def test_a_setting_of_matplotlib_ends_no_run(tmp_path):
    """As a notebook leaves it to the programs that it starts; or a user's own."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nfigure.dpi: 7")
    script = "from common import pictures as p; import torch; p.captioned(torch.zeros"
    script += f"(1, 1, 4, 4, dtype=torch.uint8), ['a_b'], p.Path('{tmp_path}/a.png'))"
    env = os.environ | {"MPLBACKEND": "module://nothing", "MATPLOTLIBRC": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True)
    assert (tmp_path / "a.png").exists()


def test_curves_draw_whatever_scores_there_are(tmp_path):
    log = [{"step": i, "samples": 64 * i, "loss": 1 / i, "lr": 0.1} for i in range(1, 9)]
    losses = {"samples": 256, "loss": 0.5} | {f"loss_t{i}/8": 0.1 * i for i in range(8)}
    scores = losses | {"colors": 0.5, "mean": 0.25}
    for evals, panels in (([], 2), ([losses], 2), ([scores], 3)):
        pictures.curves(log, evals, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as drawn:
            assert drawn.width == pytest.approx(470 * panels, abs=2)
