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
from mmdit import PRESETS, MMDiT, MMDiTConfig, fitted, load_model, save_model

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
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p) / math.sqrt(p.shape[-1]))
    return model


def inputs(B=2, H=6, W=10):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, 3, H, W, generator=g)
    return x, torch.rand(B, generator=g), torch.randn(B, 5, 7, generator=g)


# --- the network against naive code --------------------------------------------------------------


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def naive(model, x, cond, text):
    """The network for one sample, from the docstrings: x (C, H, W), cond (D,), text (T, E)."""
    config, weights = model.config, model.state_dict()
    D, d, p, grid = config.dim, config.head_dim, config.patch_size, config.max_grid
    prenorm = config.residual == "prenorm"
    rows, columns = x.shape[1] // p, x.shape[2] // p

    def linear(y, name):
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def modulated(y, shift, scale):
        return y * (1 + scale) + shift

    def block(streams):
        """name → tokens (L, D), before and after; all of them attend to all of them."""
        modulations = {name: linear(cond, f"{name}.modulation").split(D) for name in streams}
        q, k, v = [], [], []
        for name, y in streams.items():
            shift, scale, *more = modulations[name]
            y = linear(modulated(norm(y), shift, scale), f"{name}.{'qkv' if more else 'kv'}")
            for part, heads in zip(y.split(D, 1), (q, k, v) if more else (k, v), strict=True):
                heads.append(part.unflatten(1, (-1, d)))  # (L, h, d)
        q, k, v = map(torch.cat, (q, k, v))
        scores = torch.einsum("ihd, jhd -> hij", norm(q), norm(k)) / math.sqrt(d)
        attended = torch.einsum("hij, jhd -> ihd", scores.softmax(-1), v).flatten(1)
        after = dict(streams)
        for name, x in streams.items():
            _, _, *more = modulations[name]
            if more:
                gate, shift, scale, mlp_gate = more
                y = x + gate * linear(attended[: len(x)], f"{name}.out")
                attended = attended[len(x) :]
                a, b = linear(modulated(norm(y), shift, scale), f"{name}.mlp.up").chunk(2, 1)
                mlp = linear(a * torch.sigmoid(a) * b, f"{name}.mlp.down")
                after[name] = (y if prenorm else x) + mlp_gate * mlp
        return after.values()

    cells = [(slice(i, i + p), slice(j, j + p)) for i in range(0, rows * p, p)
             for j in range(0, columns * p, p)]  # fmt: skip
    top, left = grid // 2 - rows // 2, grid // 2 - columns // 2
    table = weights["positions"].view(grid, grid, D)[top : top + rows, left : left + columns]
    patches = torch.stack([x[:, *cell].flatten() for cell in cells])
    image = linear(patches, "patch_embed") + table.flatten(0, 1)
    text = torch.cat([weights.get("registers", image[:0]), linear(text, "text_embed")])
    for i in range(config.n_double_layers):
        names = f"double_blocks.{i}.text", f"double_blocks.{i}.image"
        text, image = block(dict(zip(names, (text, image), strict=True)))
    tokens = torch.cat([text, image])
    for i in range(config.n_layers - config.n_double_layers):
        (tokens,) = block({f"single_blocks.{i}.stream": tokens})
    image = tokens[len(text) :]
    shift, scale = linear(cond, "final_modulation").split(D)
    out, velocity = modulated(norm(image) if prenorm else image, shift, scale), x.clone()
    for cell, patch in zip(cells, linear(out, "final"), strict=True):
        velocity[:, *cell] = patch.view(-1, p, p)
    return velocity


@each_residual
@each_mix
def test_the_network_equals_naive_float64_and_every_weight_gets_a_gradient(config, residual):
    model = awake(replace(config, residual=residual)).double()
    x, t, text = (i.double() for i in inputs())
    found = model(x, t, text)
    for b in range(2):
        close(found[b], naive(model, x[b], model.time_embed(t)[b], text[b]), 1e-10, 1e-10)
    assert found.std() > 0.1
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_time_embedding_is_cosines_then_sines_of_1000_t_in_fp32():
    embed, t = awake(SMALL).time_embed, torch.tensor([0.0, 0.25, 0.999])
    angles = 1000 * t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    h = torch.cat([angles.cos(), angles.sin()], 1) @ embed.lift.weight.T + embed.lift.bias
    close(embed(t), F.silu(F.silu(h) @ embed.mix.weight.T + embed.mix.bias), 1e-4)
    # In bf16 weights t = 0.999 stays apart from 1, which a bf16 t or frequency table would not.
    half = awake(SMALL).bfloat16().time_embed
    assert (half(torch.tensor([0.999])) - half(torch.tensor([1.0]))).abs().max() > 0.01


def test_position_sines_tell_every_cell_apart():
    table = mmdit.sines_2d(16, 64)
    assert (torch.cdist(table, table) + 1e3 * torch.eye(256)).min() > 0.3
    close(table.square().mean(), torch.tensor(0.5))


@each_mix
def test_fresh_model_is_zero_and_learns(config):
    """adaLN-zero: the output starts at exactly 0; a few steps of AdamW reduce the loss."""
    torch.manual_seed(0)
    model, (x, t, text) = MMDiT(config), inputs()
    assert not model(x, t, text).any()
    optimizer = torch.optim.AdamW(model.param_groups(3e-3), eps=1e-15)
    losses = []
    for _ in range(30):
        losses.append((model(x, t, text) - x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


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
def test_mup_follows_its_table(config):
    """Width 192 over base 48: m = 4. Initial scales, rates, decays; every weight in one group."""
    torch.manual_seed(0)
    config = replace(config, dim=192, base_dim=48)
    model, base = MMDiT(config), replace(config, dim=48)
    groups = model.param_groups(lr=1e-2, weight_decay=0.1)
    of = {p: group for group in groups for p in group["params"]}
    assert len(of) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)
    for name, p in model.named_parameters():
        kind = next(role for pattern, role in ROLES.items() if re.search(pattern, name))
        assert model.role(name) == kind
        m = config.mlp_dim / base.mlp_dim if "down" in name else 4
        m = m if kind in ("hidden", "modulation", "output") else 1
        decay = 0 if kind == "vector" else 0.1 * m
        assert (of[p]["lr"], of[p]["weight_decay"]) == pytest.approx((1e-2 / m, decay)), name
        if kind in ("hidden", "input"):
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
        elif kind != "vector" or "bias" in name:
            assert not p.any(), name


def test_other_parametrizations_and_matrices_without_a_role():
    model, at_base = MMDiT(SMALL), MMDiT(replace(SMALL, base_dim=48))
    for network, how in ((at_base, "mup"), (model, "standard")):
        groups = network.param_groups(1e-2, 0.1, how)
        assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(1e-2, 0.0), (1e-2, 0.1)]
    with pytest.raises(ValueError, match="standard"):
        model.param_groups(1e-2, 0.1, "ntk")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is a matrix without a muP role"):
        model.param_groups(1e-2)


# --- FLOPs, host syncs, compilation --------------------------------------------------------------


@each_mix
def test_flops_equal_torchs_counter(config):
    model = MMDiT(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs(B=3))
    assert counter.get_total_flops() == 3 * model.flops_per_image(6, 10, 5)


@each_mix
def test_forward_and_backward_never_read_a_value(config):
    model, (x, t, text) = awake(config), inputs()
    with HostReads() as reads:
        model(x, t, text).sum().backward()
    assert reads.seen == []
    for read in (lambda: t.sum().item(), lambda: bool(t[0] > 0), lambda: t[t > 0], t.nonzero):
        with HostReads() as reads:  # the recorder itself can see each kind
            read()
        assert reads.seen


@each_residual
@each_mix
def test_blocks_compile_whole_and_keep_keys_and_output(config, residual):
    torch._dynamo.reset()
    model = awake(replace(config, residual=residual))
    keys, expected = list(model.state_dict()), model(*inputs())
    model.compile_blocks(backend="eager")  # raises where the graph breaks
    close(model(*inputs()), expected)
    assert list(model.state_dict()) == keys


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


# --- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 13}, "head_dim = 13 must divide dim=48"),
        ({"dim": 0}, "dim = 0 must be at least 1"),
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
    "x, text, message",
    [
        ((1, 3, 9, 8), (1, 5, 7), "multiple of patch_size=2"),
        ((1, 3, 14, 8), (1, 5, 7), "exceeds max_grid"),
        ((1, 4, 8, 8), (1, 5, 7), "4 channels, the model 3"),
        ((1, 3, 8, 8), (1, 7), r"must be \(B, T, 7\)"),
        ((1, 3, 8, 8), (1, 5, 8), r"must be \(B, T, 7\)"),
    ],
)
def test_bad_input_names_the_rule(x, text, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(SMALL)(torch.zeros(x), torch.zeros(1), torch.zeros(text))


def test_auraflow_has_its_published_size():
    with torch.device("meta"):
        assert MMDiT(PRESETS["auraflow-6.8b"]).n_parameters() == 6_842_876_928


@pytest.mark.parametrize(
    "preset, sides, asked, patch, grid",
    [
        ("digits", [(28, 28)], None, 7, 4),
        ("digits", [(32, 32)], None, 4, 8),
        ("digits", [(28, 28)], 2, 2, 14),
        ("tiny", [(18, 18)], None, 3, 6),
        ("tiny", [(16, 24), (20, 20)], None, 4, 6),
        ("0.2b", [(64, 96)], None, 2, 48),
        (
            "digits",
            [(29, 29)],
            None,
            "a patch of 3 to 7 must divide what the network sees, 29x29",
            0,
        ),
        ("tiny", [(20, 20), (20, 22)], None, "a patch of 3 to 4 must divide", 0),
        ("digits", [(28, 28)], 5, "a patch of 5 must divide", 0),
    ],
)
def test_presets_are_fitted_to_what_they_will_see(preset, sides, asked, patch, grid):
    how = {"channels": 5, "text_dim": 9, "sides": sides, "patch_size": asked}
    if grid == 0:
        with pytest.raises(ValueError, match=patch):
            fitted(preset, **how)
        return
    plain = {"in_channels": 5, "text_dim": 9, "patch_size": patch, "max_grid": grid}
    assert fitted(preset, **how) == replace(PRESETS[preset], **plain)
    aura = {"residual": "auraflow", "n_registers": 8, "mlp_multiple_of": 256}
    expected = replace(PRESETS[preset], **plain, **aura)
    assert fitted(preset, **how, residual="auraflow") == expected


# --- files, and networks that go on from others --------------------------------------------------


@pytest.mark.parametrize("old, new", [(4, 8), (4, 6), (6, 4), (5, 10), (5, 7)])
def test_a_larger_picture_starts_from_stretched_positions(old, new):
    older, model = (awake(replace(SMALL, max_grid=grid)) for grid in (old, new))
    model.start_from(older, new / old)
    table = older.positions.view(1, old, old, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(new, new), mode="bilinear")  # as minRF's extend_pe
    close(model.positions.view(new, new, -1), expected[0].permute(1, 2, 0))


@pytest.mark.parametrize("old, new", [(5, 5), (5, 8), (6, 9)])
def test_a_larger_grid_starts_as_the_same_function(old, new):
    torch.manual_seed(1)
    older, model = awake(replace(SMALL, max_grid=old)), MMDiT(replace(SMALL, max_grid=new))
    model.start_from(older)
    close(model(*inputs()), older(*inputs()))
    corner = model.grid_positions(new, new)[0]  # beyond its edge the table goes on as it ended
    close(corner, older.grid_positions(old, old)[0])
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
