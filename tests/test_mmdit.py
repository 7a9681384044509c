"""mmdit.py: against naive code, muP's rule, FLOPs, host syncs, compilation, files."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from host_reads import HostReads
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mmdit
import rf
from common.muon import use_muon
from mmdit import PRESETS, KeyValueStream, MMDiT, MMDiTConfig, fitted, load_model, save_model

SMALL = MMDiTConfig(
    in_channels=3,
    patch_size=2,
    dim=48,
    head_dim=12,
    n_layers=2,
    n_double_layers=1,
    text_dim=7,
    max_grid=6,
    n_registers=4,
    mlp_multiple_of=16,
    base_dim=24,
)
MIXES = {
    "double only": replace(SMALL, n_double_layers=2),
    "single only": replace(SMALL, n_double_layers=0, n_registers=0),
    "one of each": SMALL,
    "2 + 3": replace(SMALL, n_layers=5, n_double_layers=2),
}
each_mix = pytest.mark.parametrize("config", MIXES.values(), ids=MIXES)
each_residual = pytest.mark.parametrize("residual", mmdit.RESIDUALS)


def awake(config):
    """A model whose zero-initialised weights are not zero, so that every path carries signal."""
    torch.manual_seed(0)
    model = MMDiT(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p) / math.sqrt(p.shape[-1])
    return model


def inputs(B=2, C=3, H=6, W=10, text=(5, 7)):
    torch.manual_seed(0)
    return torch.randn(B, C, H, W), torch.rand(B), torch.randn(B, *text)


# --- the network against naive code --------------------------------------------------------------


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def naive(model, x, cond, text):
    """The network for one sample, from the docstrings: x (C, H, W), cond (D,), text (T, E)."""
    config, weights = model.config, model.state_dict()
    D, d, p = config.dim, config.head_dim, config.patch_size
    prenorm = config.residual == "prenorm"

    def linear(y, name):
        return F.linear(y, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def modulated(y, shift, scale):
        return y * (1 + scale) + shift

    def block(streams):
        """name → tokens (L, D), before and after; all of them attend to all of them."""
        k, v, halves, after = [], [], [], []
        for name, x in streams.items():
            shift, scale, *more = linear(cond, f"{name}.modulation").split(D)
            qkv = linear(modulated(norm(x), shift, scale), f"{name}.{'qkv' if more else 'kv'}")
            *q, keys, values = qkv.view(len(x), -1, D // d, d).unbind(1)  # (L, h, d)
            k.append(norm(keys))
            v.append(values)
            halves.append((name, x, more, q))
        for name, x, more, q in halves:
            if more:
                gate, shift, scale, mlp_gate = more
                scores = torch.einsum("ihd, jhd -> hij", norm(*q), torch.cat(k)) / math.sqrt(d)
                mean = torch.einsum("hij, jhd -> ihd", scores.softmax(-1), torch.cat(v))
                y = x + gate * linear(mean.flatten(1), f"{name}.out")
                a, b = linear(modulated(norm(y), shift, scale), f"{name}.mlp.up").chunk(2, 1)
                mlp = linear(F.silu(a) * b, f"{name}.mlp.down")
                x = (y if prenorm else x) + mlp_gate * mlp
            after.append(x)
        return after

    rows, columns = (side // p for side in x.shape[1:])
    top, left = (config.max_grid // 2 - n // 2 for n in (rows, columns))
    table = weights["positions"].unflatten(0, (config.max_grid, -1))
    image = linear(F.unfold(x[None], p, stride=p)[0].T, "patch_embed")
    image = image + table[top : top + rows, left : left + columns].flatten(0, 1)
    text = torch.cat([weights.get("registers", image[:0]), linear(text, "text_embed")])
    for i in range(config.n_double_layers):
        streams = {f"double_blocks.{i}.text": text, f"double_blocks.{i}.image": image}
        text, image = block(streams)
    tokens = torch.cat([text, image])
    for i in range(config.n_layers - config.n_double_layers):
        (tokens,) = block({f"single_blocks.{i}.stream": tokens})
    image = tokens[len(text) :]
    out = modulated(norm(image) if prenorm else image, *linear(cond, "final_modulation").split(D))
    return F.fold(linear(out, "final").T[None], x.shape[1:], p, stride=p)[0]


@each_residual
@each_mix
def test_the_network_compiled_or_not_equals_naive_float64(config, residual):
    """Every weight gets a gradient, no value is read on the way, and keys stay."""
    torch._dynamo.reset()
    model = awake(replace(config, residual=residual)).double()
    x, t, text = (i.double() for i in inputs())
    with HostReads() as reads:
        found = model(x, t, text)
        found.square().mean().backward()
    assert reads.seen == [] and found.std() > 0.1
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for b in range(2):
        close(found[b], naive(model, x[b], model.time_embed(t)[b], text[b]), 1e-10, 1e-10)
    keys = list(model.state_dict())
    model.compile_blocks(backend="eager")  # raises where the graph breaks
    close(model(x, t, text), found, 1e-10, 1e-10)
    assert list(model.state_dict()) == keys


def test_a_predicted_image_is_where_its_velocity_leads():
    """x_t − t·v is what comes out of the last linear; nearer to the data t is held at NEAR."""
    images = awake(replace(SMALL, predicts="image")).double()
    plain = MMDiT(SMALL).double()
    plain.load_state_dict(images.state_dict())
    x, _, text = (i.double() for i in inputs())
    t, near = (torch.tensor(times, dtype=torch.float64) for times in ([0.7, 0.05], [0.7, 0.2]))
    with HostReads() as reads:
        velocity, image = images(x, t, text), plain(x, t, text)
    assert reads.seen == []
    close(x - near[:, None, None, None] * velocity, image, 1e-10, 1e-10)
    assert images.bfloat16()(x.bfloat16(), t.float(), text).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="predicts = 'noise' must be one of"):
        replace(SMALL, predicts="noise")


def test_the_recorder_sees_each_kind_of_read():
    t = torch.ones(2)
    for read in (lambda: t.sum().item(), lambda: t[t > 0], t.nonzero):
        with HostReads() as reads:
            read()
        assert reads.seen


def test_time_embedding_is_cosines_then_sines_of_1000_t_in_fp32():
    embed, t = awake(SMALL).time_embed, torch.tensor([0.0, 0.25, 0.999])
    angles = 1000 * t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    h = F.silu(embed.lift(torch.cat([angles.cos(), angles.sin()], 1)))
    close(embed(t), F.silu(embed.mix(h)), 1e-4)
    # In bf16 weights t = 0.999 stays apart from 1, which a bf16 t or frequency table would not.
    half = awake(SMALL).bfloat16().time_embed
    assert (half(torch.tensor([0.999])) - half(torch.tensor([1.0]))).abs().max() > 0.01


def test_position_sines_tell_every_cell_apart():
    table = mmdit.sines_2d(16, 64)
    assert torch.pdist(table).min() > 0.3
    close(table.square().mean(), torch.tensor(0.5))


# --- blocks that run again in the backward pass --------------------------------------------------


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_recomputed_blocks_give_the_same_bits(backend):
    """Values and gradients, compiled (fullgraph) or not; all blocks but the last run twice."""
    torch._dynamo.reset()
    model, runs = awake(MIXES["2 + 3"]), []
    if backend:
        model.compile_blocks(backend=backend)
    else:
        for block in (*model.double_blocks, *model.single_blocks):
            block.register_forward_pre_hook(lambda block, _: runs.append(block))

    def trained():
        model.zero_grad()
        out = model(*inputs())
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters())]

    plain, before = trained(), len(runs)
    model.recompute = True
    close(trained(), plain, atol=0, rtol=0)
    if not backend:
        blocks = [*model.double_blocks, *model.single_blocks]
        assert runs[before:] == blocks + blocks[-2::-1]
        with torch.no_grad():
            model(*inputs())
        assert len(runs) == before + 9 + 5


def test_recomputation_is_not_part_of_the_network():
    model = awake(SMALL)
    keys = list(model.state_dict())
    model.recompute = True
    assert list(model.state_dict()) == keys and model.config == SMALL


# --- muP -----------------------------------------------------------------------------------------

ROLES = {  # the first that a name holds
    "bias|positions|registers": "vector",
    "modulation": "modulation",
    "patch_embed|lift": "input",
    "text_embed": "text",
    "^final": "output",
    "": "hidden",
}


@each_mix
def test_mup_follows_its_table_and_the_output_starts_at_zero(config):
    """Width 192 over base 48: m = 4. Initial scales, rates, decays; every weight in one group."""
    torch.manual_seed(0)
    model = MMDiT(replace(config, dim=192, base_dim=48))
    assert not model(*inputs()).any()
    groups = model.param_groups(lr=1e-2, weight_decay=0.1)
    of = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        kind = next(role for pattern, role in ROLES.items() if re.search(pattern, name))
        m = 4 if kind in ("hidden", "modulation", "output") else 1
        decay = 0 if kind == "vector" else 0.1 * m
        assert model.role(name) == kind and of[p] == pytest.approx((1e-2 / m, decay)), name
        if kind in ("hidden", "input"):
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
        elif kind != "vector" or "bias" in name:
            assert not p.any(), name


@pytest.mark.parametrize("muon", [0, 1])
def test_groups_hold_the_same_whatever_the_rates_are(muon):
    """At 0 as well: a resumed run puts its moments into the same groups."""
    model = MMDiT(replace(SMALL, dim=192, base_dim=48))
    cases = [(1e-2, 0.1, 0.3), (0.0, 0.1, 0.3), (1e-2, 0.0, 1e-2), (0.0, 0.0, 0.1)]
    found = [
        [
            [*map(id, group["params"])]
            for group in model.param_groups(lr, decay, muon_lr=muon * rate)
        ]
        for lr, decay, rate in cases
    ]
    assert len(found[0]) > 2 and all(groups == found[0] for groups in found)


def test_the_standard_parametrization_and_matrices_without_a_role():
    model = MMDiT(SMALL)
    groups = model.param_groups(1e-2, 0.1, "standard")
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(1e-2, 0.0), (1e-2, 0.1)]
    with pytest.raises(ValueError, match="'ntk' must be 'mup' or 'standard'"):
        model.param_groups(1e-2, 0.1, "ntk")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is a matrix without a muP role"):
        model.param_groups(1e-2)


# --- FLOPs and compilation ------------------------------------------------------------------------


@each_mix
def test_flops_are_those_of_all_products(config):
    """Counted by hand: each matrix times the tokens that it sees, and attention; and by torch in a
    real pass."""
    model, total = MMDiT(config), 0
    T, L, N = 5, 5 + config.n_registers, (6 // config.patch_size) * (10 // config.patch_size)
    for name, weight in model.named_parameters():
        once = "modulation" in name or name.startswith("time_embed")
        where = {"text_embed": T, "patch_embed": N, "final": N, "double_blocks": N}
        seen = 1 if once else where.get(name.split(".")[0], N + L)
        seen = L if ".text." in name and not once else seen
        total += 2 * seen * weight.numel() * name.endswith("weight")
    for block in (*model.double_blocks, *model.single_blocks):
        few = hasattr(block, "text") and isinstance(block.text, KeyValueStream)
        total += 4 * (N if few else N + L) * (N + L) * config.dim
    assert model.flops_per_image(6, 10, 5) == total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs(B=3))
    assert counter.get_total_flops() == 3 * total


def test_nothing_is_compiled_again_after_every_bucket_was_seen():
    """More graphs than torch's default limit of 8: buckets, each with and without gradients."""
    torch._dynamo.reset()
    model = awake(replace(SMALL, max_grid=12))
    model.compile_blocks(backend="eager")

    def through(sizes):
        for H, W in sizes:
            model(*inputs(H=H, W=W)).sum().backward()
            with torch.no_grad():
                model(*inputs(H=H, W=W))

    buckets = [(4, 14), (6, 12), (8, 10), (10, 8), (12, 16)]
    through(buckets)
    with torch.compiler.set_stance("fail_on_recompile"):
        through(buckets)
        with pytest.raises(RuntimeError, match="recompile"):  # it would be noticed
            through([(2, 2)])


@pytest.mark.slow
def test_inductors_code_follows_weights_that_are_exchanged():
    """Averages come and go in place, under blocks that are compiled: nothing may keep the old ones.

    With and without gradients, against a copy that is not compiled."""
    torch._dynamo.reset()
    model = awake(config := replace(SMALL, n_layers=1))
    model.compile_blocks()
    adamw = torch.optim.AdamW(model.param_groups(0.01, muon_lr=0.02))
    use_muon(adamw)
    rf.keep_averages(adamw, [0.1])

    def against_eager(previous):
        plain, given = MMDiT(config), inputs()
        plain.load_state_dict(model.state_dict())
        for network in (model, plain):
            network.zero_grad()
            network(*given).square().mean().backward()
        close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
        with torch.no_grad():
            found, expected = model(*given), plain(*given)
        close(found, expected)
        assert previous is None or (found - previous).abs().max() > 1e-3
        return found

    trained = against_eager(None)
    for _ in range(3):
        adamw.step()
    trained = against_eager(trained)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):  # averaged, and back
            rf.exchange_averages(adamw, rf.average_name(0.1))
            trained = against_eager(trained)


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 13}, "head_dim = 13 must divide dim=48"),
        ({"dim": 0}, "dim = 0 must be a whole number, at least 1"),
        ({"n_double_layers": 4}, r"n_double_layers = 4 must lie in 0\.\.n_layers=2"),
        ({"residual": "post"}, "residual = 'post' must be one of"),
        ({"base_dim": 30}, "base_dim = 30 must be a multiple of head_dim=12"),
        ({"n_registers": -1}, "n_registers = -1"),
        ({"dim": 42, "head_dim": 6}, "dim = 42 must be a multiple of 4"),
    ],
)
def test_bad_config_names_field_value_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"H": 9}, "9x10 must be a multiple of patch_size=2"),
        ({"H": 14}, "14x10 exceeds max_grid·patch_size=12"),
        ({"C": 4}, "4 channels, the model 3"),
        ({"text": (7,)}, r"must be \(2, T, 7\)"),
        ({"text": (5, 8)}, r"must be \(2, T, 7\)"),
    ],
)
def test_bad_input_names_the_rule(shapes, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(SMALL)(*inputs(**shapes))
    x, t, text = inputs()
    for given, rule in (((x, t[:1], text), "must be (2,) as x"), ((x, t, text[:1]), "(2, T, 7)")):
        with pytest.raises(ValueError, match=re.escape(rule)):
            MMDiT(SMALL)(*given)


def test_auraflow_has_its_published_size():
    with torch.device("meta"):
        assert MMDiT(PRESETS["auraflow-6.8b"]).n_parameters() == 6_842_876_928


@pytest.mark.parametrize(
    "preset, sides, asked, patch, grid",
    [
        ("digits", [(28, 28)], 2, 2, 14),
        ("tiny", [(18, 18)], None, 3, 6),
        ("tiny", [(16, 24), (20, 20)], None, 4, 6),
        ("0.2b", [(64, 96)], None, 2, 48),
    ],
)
def test_presets_are_fitted_to_what_they_will_see(preset, sides, asked, patch, grid):
    how = {"channels": 5, "text_dim": 9, "sides": sides, "patch_size": asked}
    plain = {"in_channels": 5, "text_dim": 9, "patch_size": patch, "max_grid": grid}
    expected = replace(PRESETS[preset], **plain)
    assert fitted(preset, **how) == expected
    aura = {"n_registers": 8, "mlp_multiple_of": 256, "predicts": "velocity"}
    aura = replace(expected, residual="auraflow", **aura)
    assert fitted(preset, **how, residual="auraflow") == aura


@pytest.mark.parametrize("asked, patch", [(None, "3 to 4"), (5, "5")])
def test_a_patch_that_does_not_divide_names_all_sizes(asked, patch):
    message = f"a patch of {patch} must divide what the network sees, 20x20, 20x22"
    with pytest.raises(ValueError, match=message):
        sides = [(20, 20), (20, 22)]
        fitted("tiny", channels=3, text_dim=9, sides=sides, patch_size=asked)


# --- files, and networks that go on from others --------------------------------------------------


@pytest.mark.parametrize("old, new", [(5, 8), (6, 9), (5, 7), (6, 12), (7, 5)])
def test_another_grid_starts_as_the_same_function_or_stretched(old, new):
    older, model = (awake(replace(SMALL, max_grid=grid)) for grid in (old, new))
    model.start_from(older)
    close(model(*inputs()), older(*inputs()))
    both = min(old, new)  # beyond its edge the table goes on as it ended
    close(model.grid_positions(new, new)[0], older.grid_positions(both, both)[0])
    model.start_from(older, new / old)
    table = older.positions.view(1, old, old, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(new, new), mode="bilinear")  # as minRF's extend_pe
    close(model.positions.view(new, new, -1), expected[0].permute(1, 2, 0))
    with pytest.raises(ValueError, match="scale 0 must be above 0"):
        model.start_from(older, 0)
    with pytest.raises(ValueError, match=r"another network: n_layers 2 \(here 5\)$"):
        MMDiT(MIXES["2 + 3"]).start_from(MMDiT(replace(SMALL, n_double_layers=2)))


def test_files_hold_the_whole_network_or_say_what_is_wrong(tmp_path):
    model, config = awake(SMALL), tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"no config\.json: give the folder"):
        load_model(tmp_path)
    save_model(tmp_path, model, facts={"words": ["a", "b"]})
    loaded = load_model(tmp_path)
    assert loaded.config == SMALL and not loaded.training
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert {file.name for file in tmp_path.iterdir()} == {config.name, "model.safetensors"}
    for old, new in (("layers", "blocks"), ('"dim": 48', '"dim": 24'), ('"model"', '"net"')):
        config.write_text(config.read_text().replace(old, new))
        with pytest.raises(ValueError, match="do not match"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_model(tmp_path)
