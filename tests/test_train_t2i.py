"""train_t2i.py in one process: what it writes, how it goes on, and what it says when it cannot."""

import json
import resource
import shutil
import sys
from functools import partial, partialmethod
from itertools import pairwise

import pytest
import torch
from helpers import SHAPES, call, exported, once_there, opened, records, refused, t2i
from safetensors.torch import load_file, save_file
from test_digits import write_mnist
from test_encoders import tiny_t5, tiny_vae

import rf
from common.evaluate import Ranks, validation
from common.pipeline import Pipeline, checkpoints, load_shard, read_averages
from inputs.shapes import TAGS
from mmdit import MMDiT, fitted
from tools import pairs
from train_t2i import EMA_WIDTHS, RECIPES, Settings, annealing, learning_rate, read_ds_config

QUICK = """--seed 1 --samples 80 --batch-size 4 --eval-every-samples 40 --save-every-samples 40
--threads 1 --eval-prompts 1 --sample-steps 1 --warmup-samples 16 --cooldown-samples 16"""
NAMES = [rf.average_name(width) for width in EMA_WIDTHS]


def train(out, *options):
    call(t2i, *QUICK.split(), "--out", out, *options)
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return train(tmp_path_factory.mktemp("done") / "run")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Options of runs that are over sooner: twelve pictures of digits."""
    folder = tmp_path_factory.mktemp("few")
    write_mnist(folder)
    return ["--data", "mnist", "--data-dir", folder, "--samples", 20]


def refuses(capsys, out, *options):
    return refused(t2i, capsys, *QUICK.split(), "--out", out, *options)


def saved(out):
    return [int(path.name) for path in checkpoints(out / "checkpoints")]


def newest(out):
    return checkpoints(out / "checkpoints")[-1]


def without_the_last(done, out):
    """A copy of a run as if it had been killed after its first checkpoint."""
    shutil.copytree(done, out)
    shutil.rmtree(newest(out))
    return out


def same(a, b):
    for name in ("log.csv", "eval.csv", "model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_pictures_logs_and_the_averaged_weights(done):
    assert {path.name for path in done.iterdir()} == {
        *("checkpoints", "strips", "samples.png", "progress.png", "curves.png"),
        *("log.csv", "eval.csv", "model.safetensors", "config.json"),
    }
    log, evals = records(done / "log.csv"), records(done / "eval.csv")
    assert [(row["step"], row["samples"], row["skipped"]) for row in log] == [
        ("10", "40", "0"),
        ("20", "80", "0"),
    ]
    assert float(log[0]["lr"]) == 0.004 and float(log[1]["lr"]) == 0.001
    assert float(log[1]["loss"]) < 0.8 * float(log[0]["loss"])
    assert [row["samples"] for row in evals] == ["40", "80"]
    for row in evals:
        by_time = [float(row[f"loss_t{i}/8"]) for i in range(8)]
        assert float(row["loss"]) == pytest.approx(sum(by_time) / 8)
        assert float(row["mean"]) == pytest.approx(sum(float(row[tag]) for tag in TAGS) / 6)
    settings, world = opened("shapes", seed=1)
    by_time = validation(Pipeline.open(done).model, world, settings, "cpu", Ranks())
    assert [float(evals[1][f"loss_t{i}/8"]) for i in range(8)] == pytest.approx(by_time)
    assert saved(done) == [40, 80]
    assert (done / "checkpoints" / "latest").read_text() == newest(done).name
    average = read_averages(newest(done), NAMES[:1])[NAMES[0]]
    exported = load_file(done / "model.safetensors")
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    facts = Pipeline.open(done).facts
    assert (facts["size"], facts["shapes"], facts["samples"]) == (20, 4, 80)


def test_averages_moments_and_rates_in_the_checkpoints(few, tmp_path):
    """θ̂ₜ = β θ̂ₜ₋₁ + (1 − β) θₜ between neighbours, over the weights that they hold."""
    how = [*few, "--save-every-samples", 4, "--keep", 5, "--lr", 0.01, "--loss", "pseudo_huber"]
    out = train(tmp_path / "run", *how)
    assert saved(out) == [4, 8, 12, 16, 20]
    before = None
    for t, path in enumerate(checkpoints(out / "checkpoints"), start=1):
        weights = load_shard(path / "mp_rank_00_model_states.pt")["module"]
        averages = read_averages(path, NAMES)
        for name, width in zip(NAMES, EMA_WIDTHS, strict=True):
            beta = (1 - 1 / t) ** (rf.gamma_from_sigma_rel(width) + 1)
            for key, weight in weights.items():
                expected = weight.double()
                if t > 1:
                    expected = beta * before[name][key].double() + (1 - beta) * expected
                assert torch.allclose(averages[name][key].double(), expected, atol=1e-7), key
        before = averages
        (file,) = path.glob("*zero_pp_rank_*_optim_states.pt")
        adamw = load_shard(file)["optimizer_state_dict"]["base_optimizer_state"]
        if t == 1:  # Adam's first moment is a tenth of the gradient, which was clipped to 1
            moments = torch.cat([state["exp_avg"] for state in adamw["state"].values()])
            assert moments.norm().item() == pytest.approx(0.1, rel=1e-3)
        groups = Pipeline.open(path).model.param_groups(0.01)
        rate = learning_rate(
            Settings(samples=20, batch_size=4, warmup_samples=16, cooldown_samples=16), t
        )
        assert [g["lr"] for g in adamw["param_groups"]] == [g["lr"] * rate for g in groups]
        assert len(groups) > 1  # muP


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--save-every-samples 8 --keep 2", [16, 20]),
        ("--save-minutes 1e-9", [8, 16, 20]),  # each request is heard one step later
        ("--target-eval-loss 100 --eval-every-samples 8", [8]),
        ("--target-eval-loss 0 --eval-every-samples 8", [20]),
    ],
)
def test_when_a_run_saves_and_ends(few, tmp_path, capsys, options, expected):
    out = train(tmp_path / "run", *few, *options.split())
    assert saved(out) == expected
    state = "finished" if expected[-1] == 20 else "stopped"
    assert f"{state} at {expected[-1]} of 20 samples" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same(done, tmp_path, workers):
    out = without_the_last(done, tmp_path / "run")
    (out / "log.csv").write_text("half a li")
    call(t2i, "--resume", "--threads", 1, "--workers", workers, "--out", out)
    same(out, done)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ("--eval-every-samples 80", 1e-9),
        ("--micro-batch 2", 1e-5),
        ("--precision bf16", 0.1),
        ("--compile on", 1e-4),
    ],
)
def test_what_changes_the_losses_only_by_rounding(done, tmp_path, monkeypatch, options, tolerance):
    graphs = []

    def backend(graph, inputs):  # inductor would take minutes
        graphs.append(graph)
        return graph.forward

    compiled = partialmethod(MMDiT.compile_blocks, backend=backend)
    monkeypatch.setattr(MMDiT, "compile_blocks", compiled)
    out = train(tmp_path / "run", *options.split())
    a, b = ([float(row["loss"]) for row in records(x / "log.csv")] for x in (done, out))
    assert a == pytest.approx(b, rel=0, abs=tolerance)
    if "bf16" in options:
        assert a != pytest.approx(b, abs=1e-4)
        average = load_file(out / "model.safetensors").values()
        assert any((p != p.bfloat16()).any() for p in average)  # fp32 on the whole way
    assert bool(graphs) == ("compile" in options)


def test_a_step_that_is_not_finite_is_skipped_and_many_end_the_run(tmp_path, capsys):
    """Pairs of which one is not a number: one step of each epoch of three."""
    made = tmp_path / "pairs"
    how = ["--out", made, "--number", 20, "--steps", 1, "--device", "cpu"]
    call(pairs.main, exported(tmp_path / "first", SHAPES), *how)
    file = made / "00000.safetensors"
    states = load_file(file)
    captions = json.dumps(["a red ring"] * 20)
    states["states"][3, 1] = torch.nan
    save_file(states, file, {"captions": captions})
    _, rows = opened(made, batch_size=6, seed=1)
    bad = [rows.at(range(6 * k, 6 * k + 6))[0].isnan().any().item() for k in range(11)]
    assert sum(bad) >= 3 and (True, True) not in pairwise(bad)
    options = ["--data", made, "--batch-size", 6, "--samples", 60, "--cooldown-samples", 36]
    out = train(tmp_path / "run", *options, "--max-bad-steps", 2)
    (row,) = records(out / "log.csv")
    steps = 9 - sum(bad[:9])  # that moved the weights before the tenth
    assert int(row["skipped"]) == sum(bad[:10]) and float(row["loss"]) < 2
    settings = Settings(samples=60, batch_size=6, warmup_samples=16, cooldown_samples=36)
    assert float(row["lr"]) == pytest.approx(0.004 * learning_rate(settings, steps))
    weights = load_file(out / "model.safetensors").values()
    assert all(weight.isfinite().all() for weight in weights)
    options += ["--max-bad-steps", 1, "--save-every-samples", 6]
    line = refuses(capsys, tmp_path / "two", *options)
    first = bad.index(True)
    left = f"{tmp_path / 'two' / 'checkpoints'}/{6 * first:012d} is from before"
    if not first:
        left = "nothing was saved before it"
    assert f"1 steps in a row were not finite, the last one step {first + 1} (on rank 0, lr" in line
    assert f"{left}; start again with a lower --lr" in line


# --- other data ----------------------------------------------------------------------------------


def test_a_run_from_another_at_a_larger_size(done, tmp_path):
    """With --lr 0 the weights stay those it started with. A resumed run needs the first no more."""
    first = tmp_path / "first"
    shutil.copytree(done, first)
    out = train(tmp_path / "run", "--init", first, "--size", 24, "--samples", 4, "--lr", 0)
    shutil.rmtree(first)
    call(t2i, "--resume", "--threads", 1, "--out", out)
    large, small = Pipeline.open(out), Pipeline.open(done)
    assert large.facts["shift"] == pytest.approx(2 * 24 / 20)
    assert (large.model.config.max_grid, small.model.config.max_grid) == (6, 5)
    stretched = MMDiT(large.model.config)
    stretched.start_from(small.model, 24 / 20)
    state = large.model.state_dict()
    for name, value in stretched.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_latent_world_with_a_real_text_encoder(tmp_path):
    """The whole path through diffusers and transformers, with tiny models made here."""
    text, vae = tiny_t5(tmp_path / "text"), tiny_vae(tmp_path / "vae")
    how = ["--vae", vae, "--text-encoder", text, "--size", 24, "--samples", 8]
    pipeline = Pipeline.open(train(tmp_path / "run", *how))
    config = pipeline.model.config
    assert (config.in_channels, config.text_dim) == (4, 16)
    assert pipeline.draw(["a red ring"], pipeline.noise(0, [0])).shape == (1, 3, 24, 24)


# --- pieces --------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_cools_down_and_annealing_ends():
    how = {"warmup_samples": 80, "cooldown_samples": 160, "anneal": 0.5}
    settings = Settings(samples=796, batch_size=8, **how)  # 100 steps
    rates = [learning_rate(settings, step) for step in (0, 9, 50, 80, 90, 100)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0])
    assert learning_rate(Settings(warmup_samples=0, cooldown_samples=0), 0) == 1
    betas = [annealing(settings, seen) for seen in (0, 199, 398, 796)]
    assert betas == pytest.approx([1, 0.5, 0, 0])


@pytest.mark.parametrize("preset", RECIPES)
def test_every_recipe_fits_its_network(preset):
    size = RECIPES[preset]["size"]
    config = fitted(preset, channels=3, text_dim=128, sides=[(size, size)])
    assert config.patch_values <= config.dim and size == config.max_grid * config.patch_size


OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    "typed, ranks, config, expected",
    [
        ({}, 1, {}, (64, 64, 1)),
        ({"most_at_once": 24}, 1, {}, (64, 16, 4)),
        ({}, 4, {"zero_optimization": {"stage": 1}}, (64, 16, 1)),
        ({"batch_size": 12, "micro_batch": 2}, 2, {"train_batch_size": 12}, (12, 2, 3)),
        ({"precision": "bf16"}, 1, {"bf16": {"enabled": True}}, (64, 64, 1)),
        ({"micro_batch": 24}, 1, {}, "64 / 24 = 2.67: take --batch-size 48"),
        ({"batch_size": 4, "micro_batch": 8}, 1, {}, "4 / 8 = 0.50: take --batch-size 8"),
        (
            {},
            3,
            {},
            "x 3 ranks x a whole number of passes, but 64 / 63 = 1.02: take --batch-size 63",
        ),
        (
            {},
            1,
            {"train_batch_size": 32},
            r"train_batch_size 32 contradicts .* 64 \(64 = 64 x 1 ran",
        ),
        ({}, 1, {"zero_optimization": {"stage": 3}}, '"stage" 3 must be 2'),
        ({}, 1, {"zero_optimization": OFFLOADED}, '"offload_optimizer" is not supported'),
        ({}, 1, {"fp16": {}}, '"fp16" is not supported here: take it out'),
        ({}, 1, {"bf16": {"enabled": True}}, "bf16 contradicts --precision fp32"),
        ({}, 1, "{", "cannot be read"),
    ],
)
def test_deepspeeds_configuration(tmp_path, typed, ranks, config, expected):
    path = tmp_path / "ds.json"
    if not isinstance(config, str):
        config = json.dumps(json.loads(Settings.ds_config.read_text()) | config)
    path.write_text(config)
    settings = Settings(ds_config=path, **{"precision": "fp32"} | typed)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_ds_config(settings, ranks)
        return
    found = read_ds_config(settings, ranks)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(found[key] for key in keys) == expected
    assert found["bf16"]["enabled"] == (settings.precision == "bf16")
    assert found["gradient_clipping"] == 1


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ("--preset huge", "--preset 'huge' must be one of tiny, tiny-wide, small"),
        ("--precision fp8", "--precision 'fp8' must be one of auto, bf16, fp32"),
        ("--compile maybe", "--compile 'maybe' must be one of auto, on, off"),
        ("--samples 0", "--samples 0 must be at least 1"),
        ("--micro-batch 3", "4 / 3 = 1.33: take --batch-size 3"),
        ("--size 22", "a patch of 3 to 4 must divide what the network sees, 22x22"),
        ("--size 12", "at least 20"),
        ("--shapes 9", "2 to 6 shapes"),
        ("--data nowhere", "--data nowhere is none of shapes, auto, mnist"),
        ("--init nowhere", "nowhere holds no weights: train it first"),
        ("--anneal 1.5", "--anneal 1.5 must lie in [0, 1]"),
        ("--segments 2", "--segments 2 must divide the 0 of --data"),
        ("--resume --overwrite", "--resume and --overwrite exclude each other"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, message):
    line = refuses(capsys, tmp_path / "run", *options.split())
    assert line.startswith("train_t2i.py: ") and message in line
    assert not (tmp_path / "run").exists()


def test_what_a_machine_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "several Slurm tasks without RANK: see the README" in refused(t2i, capsys)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "deepspeed is not installed: pip install -r requirements.txt" in refused(t2i, capsys)


def spoiled(name, change):
    """Do something to the files of a checkpoint."""
    return lambda path: [change(file) for file in path.glob(name)]


def edited(**changes):
    def change(path):
        file = path / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, "--lr 0.002", "--lr 0.002 differs from the run to resume, which has 0.004"),
        (None, "--size 40", "--size 40 differs from the run to resume, which has 20"),
        (edited(rows="0"), "", "was trained on other rows: give its --data"),
        (edited(world_size="2"), "", "is partial: it holds 1 of 2 optimizer shards"),
        (spoiled("*zero_pp*", lambda file: file.unlink()), "", "it holds 0 of 1 optimizer shards"),
        (spoiled("mp_rank*", lambda file: file.unlink()), "", "and 0 mp_rank_*; delete it"),
        (spoiled("run.json", lambda file: file.write_text("{")), "", "no readable run.json"),
    ],
)
def test_what_cannot_be_resumed_is_refused(done, tmp_path, capsys, change, options, message):
    shutil.copytree(done, tmp_path / "run")
    if change:
        change(newest(tmp_path / "run"))
    how = ("--resume", "--threads", 1, "--out", tmp_path / "run", *options.split())
    assert message in refused(t2i, capsys, *how)


def test_a_folder_with_a_run_is_overwritten_only_when_all_is_well(done, few, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    line = refuses(capsys, out)
    assert "already holds a run: continue it with --resume, replace it with --overwrite" in line
    refuses(capsys, out, "--overwrite", "--size", 22)
    assert saved(out) == [40, 80]
    train(out, *few, "--overwrite")
    assert saved(out) == [20] and [path.stem for path in (out / "strips").iterdir()] == [
        f"{20:012d}"
    ]


def test_a_full_disk_leaves_the_last_checkpoint(done, tmp_path, capsys):
    """No file may grow beyond 100 kB once there is a checkpoint: that is how a full disk looks."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with once_there(out / "checkpoints" / "latest", fill):
            line = refuses(capsys, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{80:012d} could not be written" in line and f"{40:012d} still stands" in line
    assert [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()] == [
        f"{40:012d}"
    ]
    call(t2i, "--resume", "--threads", 1, "--out", out)
    same(out, done)
