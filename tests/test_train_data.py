"""train_t2i.py on prepared caches: buckets, resume, the stage, another resolution."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_encoders import tiny_t5, tiny_vae
from test_prepare import pictures, run
from test_train_t2i import quiet_signals, rows, train  # noqa: F401

import data_t2i
import report_t2i as report
import rf
import sample_t2i
import train_t2i
import zero
from data_mnist import mix_seed
from data_t2i import HeldOut, KnownText, Samples, encode
from encoders import Pixels
from mmdit import MMDiT, MMDiTConfig, load_model, save_model

SMALL_SHARDS = ["--shard-mb", "0.004", "--batch", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 rows in three buckets of about 16² pixels; its folder."""
    folder = tmp_path_factory.mktemp("cache")
    run(pictures(folder / "source", n=60), folder / "data", *SMALL_SHARDS)
    return folder / "data"


@pytest.fixture(scope="module")
def done(tmp_path_factory, data):
    return train(tmp_path_factory.mktemp("done") / "run", "--data", data)


def newest(out):
    return zero.checkpoints(out / "checkpoints")[-1]


def test_a_run_on_three_buckets(done, data, tmp_path):
    assert {p.name for p in done.iterdir()} == {
        "checkpoints", "strips", "samples.png", "progress.png", "curves.png", "log.csv", "eval.csv",
    }  # fmt: skip
    evals = rows(done / "eval.csv")
    assert list(evals[0]) == list(report.eval_columns(scored=False)) and len(evals) == 2
    for row in evals:  # six validation rows: two of the eight times are asked of none
        known = [float(row[name]) for name in report.TIMES if row[name] != "nan"]
        assert len(known) == 6
        assert float(row["loss"]) == pytest.approx(sum(known) / len(known), rel=1e-5)
    model = load_model(newest(done) / "ema_0.05")
    assert model.config.max_grid == 5  # 20 pixels, patch 4
    settings = sample_t2i.run_settings(newest(done) / "ema_0.05")
    assert settings["data"] == [str(data)] and settings["size"] == 16
    assert settings["text_encoder"] == "hash" and settings["text_tokens"] == 8
    picture = tmp_path / "out.png"
    sample_t2i.main(
        [str(done), "number 3", "--steps", "2", "--size", "12x20", "--out", str(picture)]
    )
    assert picture.stat().st_size > 1000
    with pytest.raises(SystemExit, match="was not trained on shapes"):
        sample_t2i.main([str(done), "--score", "shapes"])


def test_resume_in_the_middle_of_an_epoch_is_bit_for_bit(done, data, tmp_path):
    """54 rows an epoch; the checkpoint lies at sample 40."""
    out = tmp_path / "run"
    shutil.copytree(done, out)
    shutil.rmtree(newest(out))
    train(out, "--resume", "auto")
    for name in ("log.csv", "eval.csv"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stage_changes_nothing(done, data, tmp_path, workers):
    """At the least limit, so that shards come and go; what else lies in the folder stays."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "mine.arrow").write_text("not the stage's")
    plain = train(tmp_path / "plain", "--data", data, "--window", 1)
    extra = ["--stage", tmp_path / "stage", "--data", data, "--window", 1, "--workers", workers]
    with pytest.raises(
        ValueError, match=r"--stage-limit 1e-06 GB must be at least .* --window 1"
    ) as e:
        train(tmp_path / "run", *extra, "--stage-limit", 1e-6)
    least = str(e.value).split("at least ")[1].split()[0]
    out = train(tmp_path / "run", *extra, "--stage-limit", least)
    assert (out / "log.csv").read_bytes() == (plain / "log.csv").read_bytes()
    assert (out / "eval.csv").read_bytes() == (plain / "eval.csv").read_bytes()
    left = sum(f.stat().st_size for f in (tmp_path / "stage" / "t2i-stage").rglob("*.arrow"))
    assert 0 < left <= float(least) * 1e9
    assert (tmp_path / "stage" / "mine.arrow").read_text() == "not the stage's"


def test_a_cache_of_latents_and_t5_features(tmp_path):
    vae, t5 = tiny_vae(tmp_path / "vae"), tiny_t5(tmp_path / "t5")
    source = pictures(tmp_path / "source", n=24)
    encoders = ["--vae", vae, "--text-encoder", t5, "--text-bits", 8, "--patch", 4]
    run(source, tmp_path / "data", *encoders)
    out = train(tmp_path / "run", "--data", tmp_path / "data", "--samples", 16)
    config = load_model(newest(out) / "ema_0.05").config
    assert (config.in_channels, config.text_dim) == (4, 16)
    sample_t2i.main(
        [str(out), "a red ring", "--steps", "2", "--out", str(tmp_path / "out.png")]
    )  # loads both encoders by the names that the cache knows


def test_data_that_does_not_fit_is_refused(done, data, tmp_path):
    other = run(
        pictures(tmp_path / "source", n=20), tmp_path / "other", "--text-tokens", 6
    ).location
    again = run(tmp_path / "source", tmp_path / "again").location

    def refused(match, out, *extra):
        with pytest.raises(ValueError, match=match) as caught:
            train(out, *extra)
        assert "\n" not in str(caught.value)

    out = tmp_path / "run"
    refused(
        r"--size 20 does not fit --data .*, prepared with 16", out, "--data", data, "--size", 20
    )
    refused("--text-encoder t5 does not fit", out, "--data", data, "--text-encoder", "t5")
    refused("has text_tokens 8, but .* has 6|has text_tokens 6, but", out, "--data", data, other)
    refused(
        "--data-weights has 2 numbers, must have one for each of the 1",
        out, "--data", data, "--data-weights", 1, 2,
    )  # fmt: skip
    refused("no manifest.json", out, "--data", tmp_path / "nothing")
    for weight in (0, -1, "nan"):
        refused("must be above 0", out, "--data", data, "--data-weights", weight)
    refused("--window 0 must be at least 1", out, "--data", data, "--window", 0)
    assert not out.exists()
    shutil.copytree(done, out)
    refused(
        "has text_tokens 6, the run to resume was trained with 8",
        out, "--resume", "auto", "--data", other,
    )  # fmt: skip
    refused("has data_id .* the run to resume", out, "--resume", "auto", "--data", again)


def test_validation_rows_of_a_bucket_of_their_own(tmp_path):
    """Ten rows of which the one that is held out is the only wide one; and none held out."""
    source = pictures(tmp_path / "source", n=10, sizes=[(48, 48)])
    order = list(data_t2i.np.random.default_rng(mix_seed(0, "prepare", 0)).permutation(10))
    Image.new("RGB", (64, 36)).save(source / f"{order[9]}.png")
    data = run(source, tmp_path / "data").location
    assert len(rows(train(tmp_path / "run", "--data", data, "--samples", 8) / "eval.csv")) == 1
    none = run(source, tmp_path / "none", "--validation", 0).location
    options = ["--data", none, "--target-eval-loss", 0.5]
    out = train(tmp_path / "other", *options)
    assert [row["loss"] for row in rows(out / "eval.csv")] == ["nan", "nan"]


# --- another resolution --------------------------------------------------------------------------


def test_a_run_continues_at_a_higher_resolution(done, data, tmp_path):
    large = run(
        pictures(tmp_path / "source", n=24, sizes=((48, 48),)), tmp_path / "large", "--size", 32
    ).location
    options = ["--data", large, "--init", done, "--samples", 8]
    out = train(tmp_path / "run", *options)
    settings = sample_t2i.run_settings(newest(out) / "ema_0.05")
    assert settings["shift"] == pytest.approx(4.0)  # 2.0 at 16 pixels; √(32²/16²) = 2 times that
    assert load_model(newest(out) / "ema_0.05").config.max_grid == 8
    again = tmp_path / "again"  # --init is for the start: a resumed run has its own weights
    shutil.copytree(out, again)
    train(again, *options, "--resume", "auto")
    with pytest.raises(ValueError, match=r"holds another network: .*dim 96 \(here 256\)"):
        train(tmp_path / "wide", *options, "--preset", "tiny-wide")


@pytest.mark.parametrize("old, new, scale", [(5, 10, 2), (4, 8, 2), (4, 6, 1.5), (5, 8, 1)])
def test_positions_keep_their_place_in_the_picture(tmp_path, old, new, scale):
    """A table linear in the place is the same function of the place at any size."""
    config = MMDiTConfig(
        dim=64, head_dim=32, n_layers=1, n_double_layers=0, text_dim=8, max_grid=old, base_dim=32
    )
    model = MMDiT(config)
    with torch.no_grad():
        place = torch.arange(old) + 0.5 - old // 2  # patches from the centre
        table = model.positions.view(old, old, -1)
        table[..., 0], table[..., 1] = place[:, None], place[None]
    save_model(tmp_path / "old", model, run={"text_encoder": "hash", "size": 100})
    larger = MMDiT(MMDiTConfig(**{**vars(config), "max_grid": new}))
    train_t2i.continue_from(larger, tmp_path / "old", round(100 * scale))
    place = ((torch.arange(new) + 0.5 - new // 2) / scale).clamp(place[0], place[-1])
    table = larger.positions.detach().view(new, new, -1)
    assert torch.allclose(table[..., 0], place[:, None].expand(new, new), atol=1e-5)
    assert torch.allclose(table[..., 1], place[None].expand(new, new), atol=1e-5)
    for name, p in model.named_parameters():
        if name != "positions":
            assert torch.equal(p, larger.get_parameter(name))
    if scale == 2 and new == 2 * old:
        naive = torch.nn.functional.interpolate(  # minRF's extend_pe
            model.positions.detach().view(1, old, old, -1).permute(0, 3, 1, 2),
            size=(new, new), mode="bilinear",
        )[0].permute(1, 2, 0)  # fmt: skip
        if old % 2 == 0:
            assert torch.allclose(table, naive, atol=1e-5)


# --- it learns to read ---------------------------------------------------------------------------


@pytest.mark.slow
def test_text_of_a_cache_matters(tmp_path):
    """Noisy pictures of three colours, named in the caption: the loss falls, and faster with it."""
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    for i in range(300):
        color = rng.integers(3)
        pixels = rng.integers(0, 80, (16, 16, 3), dtype=np.uint8)
        pixels[..., color] += 170
        Image.fromarray(pixels).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(["a red one", "a green one", "a blue one"][color])
    data = run(source, tmp_path / "data", "--validation", 30)
    out = train(
        tmp_path / "run", "--data", data.location, "--samples", 4000, "--batch-size", 32,
        "--eval-every-samples", 400, "--save-every-samples", 4000, "--warmup-samples", 320,
        "--cooldown-samples", 2000, "--lr", 2e-3,
    )  # fmt: skip
    losses = [float(row["loss"]) for row in rows(out / "eval.csv")]
    assert losses[-1] < 0.7 * losses[0]
    held, text = HeldOut([data]), KnownText(data)
    model = load_model(newest(out) / "ema_0.05")
    batch = Samples(held, text, Pixels(), seed=0, dropout=0.0).__getitems__(list(range(30)))
    x, features, _, noise = encode(batch, Pixels(), text, "cpu")
    t = torch.full((30,), 0.8)
    captions = [held.caption(i)[0] for i in range(30)]
    other = [next(j for j in range(30) if captions[j] != captions[i]) for i in range(30)]
    with torch.no_grad():
        right = rf.rf_loss(model, x, features, t=t, noise=noise)
        wrong = rf.rf_loss(model, x, features[other], t=t, noise=noise)
    gain = wrong - right
    assert gain.mean() > 5 * gain.std() / 30**0.5, (right.mean(), wrong.mean())
