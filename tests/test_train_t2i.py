"""train_t2i.py in one process: its pieces, what it writes, and what it says when it cannot."""

import csv
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

import report_t2i as report
import rf
import sample_t2i
import shapes
import train_t2i
import zero
from data_t2i import Samples, Shuffled, encode
from encoders import HashText, Pixels
from mmdit import load_model
from options_t2i import RECIPES

OPTIONS = [
    "--samples", 80, "--batch-size", 8, "--eval-every-samples", 40, "--save-every-samples", 40,
    "--eval-prompts", 1, "--warmup-samples", 16, "--cooldown-samples", 16,
]  # fmt: skip


def arguments(out, *extra):
    return train_t2i.build_parser().parse_args([str(x) for x in (*OPTIONS, "--out", out, *extra)])


def train(out, *extra):
    """As main() does, but errors come through and the process group stays for the next test."""
    train_t2i.launch(arguments(out, *extra))
    return out


@pytest.fixture(autouse=True)
def quiet_signals():
    """The trainer takes over the signals; give them back."""
    import signal

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return train(tmp_path_factory.mktemp("done") / "run")


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_pictures_logs_and_weights(done):
    assert {p.name for p in done.iterdir()} == {
        "checkpoints", "strips", "samples.png", "progress.png", "curves.png", "log.csv", "eval.csv",
    }  # fmt: skip
    log, evals = rows(done / "log.csv"), rows(done / "eval.csv")
    assert [row["samples"] for row in log] == ["80"] and float(log[0]["loss"]) < 2
    assert [row["samples"] for row in evals] == ["40", "80"]
    for row in evals:
        by_time = [float(row[name]) for name in report.TIMES]
        assert float(row["loss"]) == pytest.approx(sum(by_time) / 8, rel=1e-6)
        tags = [float(row[tag]) for tag in shapes.TAGS]
        assert float(row["mean"]) == pytest.approx(sum(tags) / 6, abs=1e-9)
    newest = zero.checkpoints(done / "checkpoints")[-1]
    assert newest.name == f"{80:012d}"
    for width in ("0.05", "0.10"):
        model = load_model(newest / f"ema_{width}")  # strict, without DeepSpeed
        assert model.config.patch_size == 4 and model.config.text_dim == 128
    run = json.loads((newest / "ema_0.05" / "config.json").read_text())["run"]
    assert (run["size"], run["shapes"], run["samples_seen"]) == (20, 4, 80)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    out = train(tmp_path / "run", "--save-every-samples", 16, "--keep", 2)
    assert [int(p.name) for p in zero.checkpoints(out / "checkpoints")] == [64, 80]
    assert (out / "checkpoints" / "latest").read_text() == f"{80:012d}"


def test_the_clock_saves_once_each_time(tmp_path, monkeypatch):
    saved, original = [], train_t2i.Run.save

    def save(self):
        saved.append(self.step)
        original(self)

    monkeypatch.setattr(train_t2i.Run, "save", save)
    clock = iter([0.0, *range(0, 61, 6), *range(61, 1000)])  # seconds; a minute after ten steps
    monkeypatch.setattr(zero.time, "monotonic", lambda: float(next(clock)))
    train(tmp_path / "run", "--samples", 240, "--save-every-samples", 10_000, "--save-minutes", 1)
    assert saved == [12, 30]  # heard one step after it was asked; then the end


def test_the_exported_average_is_the_closed_form(tmp_path, monkeypatch):
    """θ̂ = Σ_t w_t θ_t with w_t = (1 − β_t) Π_{s>t} β_s, over the recorded fp32 weights."""
    history, original = [], train_t2i.Run.end_step

    def record(self):
        history.append(self.shards.whole_on_rank_0(self.shards.mine))
        original(self)

    monkeypatch.setattr(train_t2i.Run, "end_step", record)
    out = train(tmp_path / "run")
    newest = zero.checkpoints(out / "checkpoints")[-1]
    for width in (0.05, 0.10):
        gamma = rf.gamma_from_sigma_rel(width)
        betas = [(1 - 1 / t) ** (gamma + 1) for t in range(1, len(history) + 1)]
        expected, left = {}, 1.0
        for weights, beta in zip(reversed(history), reversed(betas), strict=True):
            for name, value in weights.items():
                expected[name] = expected.get(name, 0) + left * (1 - beta) * value.double()
            left *= beta
        exported = load_model(newest / f"ema_{width:.2f}").state_dict()
        moved = 0.0
        for name, value in expected.items():
            assert torch.allclose(exported[name].double(), value, atol=1e-6), name
            moved = max(moved, (exported[name] - history[-1][name]).abs().max().item())
        assert moved > 1e-4  # an average, not the last weights


def test_resume_in_one_process_is_bit_for_bit(done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    shutil.rmtree(zero.checkpoints(out / "checkpoints")[-1])  # as if killed after the first
    (out / "log.csv").write_text("half a li")
    train(out, "--resume", "auto")
    for name in ("log.csv", "eval.csv"):
        assert (out / name).read_bytes() == (done / name).read_bytes()
    a, b = (zero.checkpoints(p / "checkpoints")[-1] / "ema_0.10" for p in (out, done))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_resumed_run_remembers_its_settings(tmp_path):
    out = train(tmp_path / "run", "--lr", 1e-3, "--shift", 1.5)
    record = zero.read_record(zero.checkpoints(out / "checkpoints")[-1])
    args = train_t2i.build_parser().parse_args(["--out", str(out), "--resume", "auto"])
    train_t2i.resolve(args, record)
    assert (args.lr, args.shift, args.batch_size) == (1e-3, 1.5, 8)
    with pytest.raises(ValueError, match=r"--lr 0.002 differs .* 0.001"):
        train(out, "--resume", "auto", "--lr", 2e-3)


def test_micro_batches_change_nothing(done, tmp_path):
    out = train(tmp_path / "run", "--micro-batch", 2)
    a, b = (float(rows(p / "log.csv")[-1]["loss"]) for p in (done, out))
    assert a == pytest.approx(b, abs=1e-5)


def test_bf16_keeps_masters_and_averages_in_fp32(tmp_path, monkeypatch):
    dtypes = {}
    original = train_t2i.Run.save

    def look(self):
        dtypes["weights"] = self.dtype
        dtypes["masters"] = {s.dtype for s in self.shards.mine}
        dtypes["averages"] = {a.dtype for ema in self.emas.values() for a in ema.averages}
        original(self)

    monkeypatch.setattr(train_t2i.Run, "save", look)
    out = train(tmp_path / "run", "--precision", "bf16")
    assert dtypes["weights"] == torch.bfloat16
    assert dtypes["masters"] == dtypes["averages"] == {torch.float32}
    assert float(rows(out / "log.csv")[-1]["loss"]) < 2
    tensors = load_model(zero.checkpoints(out / "checkpoints")[-1] / "ema_0.05").parameters()
    assert any((p != p.bfloat16()).any() for p in tensors)  # not rounded on the way


def test_the_target_loss_ends_the_run(tmp_path):
    out = train(tmp_path / "run", "--target-eval-loss", 100.0)
    assert int(zero.checkpoints(out / "checkpoints")[-1].name) == 40


def test_a_latent_world_with_a_real_text_encoder(tmp_path):
    """The whole path through diffusers and transformers, with tiny models made here."""
    from test_encoders import tiny_t5, tiny_vae

    text, vae = tiny_t5(tmp_path / "text"), tiny_vae(tmp_path / "vae")
    extra = ["--vae", vae, "--text-encoder", text, "--size", 24, "--samples", 16]
    out = train(tmp_path / "run", *extra)
    model = load_model(zero.checkpoints(out / "checkpoints")[-1] / "ema_0.05")
    assert (model.config.in_channels, model.config.text_dim) == (4, 16)
    picture = tmp_path / "out.png"
    sample_t2i.main([str(out), "a red ring", "--steps", "2", "--out", str(picture)])
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_text_matters(tmp_path):
    """After a short run the right captions explain the pictures better than exchanged ones."""
    n = 24_000
    out = train(
        tmp_path / "run", "--shapes", 2, "--colors", 3, "--batch-size", 32, "--samples", n,
        "--lr", 0.002, "--warmup-samples", 1000, "--cooldown-samples", n // 2,
        "--eval-every-samples", n, "--save-every-samples", n,
    )  # fmt: skip
    model = load_model(zero.checkpoints(out / "checkpoints")[-1] / "ema_0.10")
    world, text, n = shapes.World(20, 2, 3, 10), HashText(tokens=12), 512
    batch = Samples(Shuffled(shapes.Shapes(world, 1), 1), text, seed=1, dropout=0.0).__getitems__(
        list(range(n))
    )
    data, words, _, noise = encode(batch, Pixels(), text, "cpu")
    t = torch.full((n,), 0.8)
    with torch.no_grad():
        right, wrong, none = (
            rf.rf_loss(model, data, w, t=t, noise=noise)
            for w in (words, words.roll(1, 0), torch.zeros_like(words))
        )
    gain = wrong - right
    assert wrong.mean() > 1.03 * right.mean()
    assert none.mean() > right.mean()
    assert gain.mean() > 5 * gain.std() / n**0.5  # five standard errors


# --- pieces --------------------------------------------------------------------------------------


def test_the_rate_warms_up_stays_and_cools_down():
    args = arguments("x", "--warmup-samples", 80, "--cooldown-samples", 160)
    args.samples, args.batch_size = 800, 8  # 100 steps
    rates = [train_t2i.learning_rate(args, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 == rates[80] and rates[100] == 0
    assert rates[90] == pytest.approx(0.5)


@pytest.mark.parametrize("preset", list(RECIPES))
def test_every_recipe_fits_its_network(preset):
    args = train_t2i.build_parser().parse_args(["--preset", preset])
    train_t2i.resolve(args, None)
    config = train_t2i.model_config(
        args, HashText(tokens=args.text_tokens), Pixels(), [(args.size,) * 2]
    )
    assert config.patch_values <= config.dim
    assert args.size == config.max_grid * config.patch_size


def test_finite_mean_leaves_out_skipped_steps():
    assert report.finite_mean(torch.tensor([1.0, float("nan"), 3.0, float("inf")])) == 2


# --- what is wrong is said in one line -----------------------------------------------------------


def refused(match, out, *extra, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        train(out, *extra)
    assert "\n" not in str(caught.value)


def test_batch_arithmetic(tmp_path):
    refused(r"64 / 24 = 2.67: take --batch-size 48", tmp_path, "--batch-size", 64,
            "--micro-batch", 24)  # fmt: skip
    refused(r"4 / 8 = 0.50: take --batch-size 8", tmp_path, "--batch-size", 4, "--micro-batch", 8)
    config = json.loads(Path("ds_config.json").read_text())
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config | {"train_batch_size": 32}))
    refused(r"train_batch_size 32 contradicts .* 8 \(8 = 8 x 1 ranks x 1\)", tmp_path / "run",
            "--ds-config", path)  # fmt: skip
    path.write_text(json.dumps(config | {"zero_optimization": {"stage": 3}}))
    refused(r'"stage" 3 must be 2', tmp_path / "run", "--ds-config", path)
    offload = config["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps(config | {"zero_optimization": offload}))
    refused('"offload_optimizer" is not supported', tmp_path / "run", "--ds-config", path)
    path.write_text("{")
    refused("cannot be read", tmp_path / "run", "--ds-config", path)
    assert not (tmp_path / "run").exists()


def test_missing_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_t2i, "find_spec", lambda name: None)
    refused("deepspeed is not installed: pip install -r requirements.txt", tmp_path)


def test_wrong_options(tmp_path):
    refused("--preset 'huge' must be one of tiny", tmp_path, "--preset", "huge")
    refused("--precision 'fp8' must be one of auto, bf16, fp32", tmp_path, "--precision", "fp8")
    refused("--samples 0 must be at least 1", tmp_path, "--samples", 0)
    refused(r"--size 22 must be a multiple of 4", tmp_path, "--size", 22)
    refused("at least 20", tmp_path, "--size", 12)
    refused("2 to 6 shapes", tmp_path, "--shapes", 9)
    refused("--micro-batch 0 must be at least 1", tmp_path, "--micro-batch", 0)


def test_a_folder_that_holds_a_run_is_not_overwritten(done):
    refused(r"already holds a run: continue it with --resume auto, replace it with --overwrite",
            done)  # fmt: skip


def test_wrong_or_partial_checkpoints(done, tmp_path):
    out = tmp_path / "run"
    refused("does not lie in", out, "--resume", zero.checkpoints(done / "checkpoints")[0])
    refused("is no checkpoint of train_t2i.py", out, "--resume", out / "checkpoints" / "7")
    refused("is not the last checkpoint: move .*80 away to go back", done, "--resume",
            zero.checkpoints(done / "checkpoints")[0])  # fmt: skip
    part = out / "checkpoints" / f"{40:012d}"
    shutil.copytree(zero.checkpoints(done / "checkpoints")[0], part)
    shutil.move(part / "ema_0.05", tmp_path)
    shutil.move(part / "ema_0.10", tmp_path)
    refused(r"is partial: its weights \(mp_rank_\*, ema_\*\) are missing", out, "--resume", "auto")
    next(part.glob("zero_pp*")).unlink()
    refused("is partial: it holds 0 of 1 optimizer shards; delete it", out, "--resume", "auto")
    (part / "run.json").write_text('{"samples": 4')
    refused("no readable run.json", out, "--resume", "auto")


def test_overwrite_removes_nothing_before_all_is_well(done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    refused("--size 22 must be a multiple", out, "--overwrite", "--size", 22)
    assert len(zero.checkpoints(out / "checkpoints")) == 2
    train(out, "--overwrite", "--samples", 16)
    assert [int(p.name) for p in zero.checkpoints(out / "checkpoints")] == [16]


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """No file may grow beyond a megabyte after the first save, which is how a full disk looks."""
    original, limits = zero.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(engine, shards, folder, record, averages, keep):
        if record["samples"] > 40:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        original(engine, shards, folder, record, averages, keep)

    monkeypatch.setattr(zero, "save", save)
    out = tmp_path / "run"
    try:
        refused(r"could not be written: .*0040 still stands", out, error=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert not (out / "checkpoints" / "partial").exists()
    train(out, "--resume", "auto")
    assert len(zero.checkpoints(out / "checkpoints")) == 2


def test_main_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with pytest.raises(SystemExit) as caught:
        train_t2i.main(["--preset", "huge", "--out", str(tmp_path)])
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip() == (
        "train_t2i.py: --preset 'huge' must be one of " + ", ".join(RECIPES)
    )
    assert "RANK" in os.environ
