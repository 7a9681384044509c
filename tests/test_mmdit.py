"""mmdit.py: structure, against a block written naively, muP's rule, FLOPs, host syncs, files."""

import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from host_reads import HostReads
from torch.utils.flop_counter import FlopCounterMode

import mmdit
from mmdit import PRESETS, MMDiT, MMDiTConfig, load_model, save_model

SMALL = MMDiTConfig(
    in_channels=3, patch_size=2, dim=48, head_dim=12, n_layers=3, n_double_layers=1, text_dim=7,
    max_grid=6, n_registers=4, mlp_multiple_of=16, base_dim=24,
)  # fmt: skip
MIXES = {"double only": (2, 2), "single only": (2, 0), "one of each": (2, 1), "2 + 3": (5, 2)}


def config_of(mix, residual="prenorm", **changes):
    n_layers, n_double = MIXES[mix]
    return replace(SMALL, n_layers=n_layers, n_double_layers=n_double, residual=residual, **changes)


def awake(config, seed=0):
    """A model whose zero-initialised weights are not zero, so that every path carries signal."""
    torch.manual_seed(seed)
    model = MMDiT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p) / math.sqrt(p.shape[-1]))
    return model


def inputs(config, B=2, H=8, W=12, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, config.in_channels, H, W, generator=g)
    return x, torch.rand(B, generator=g), torch.randn(B, T, config.text_dim, generator=g)


# --- patches and positions -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (4, 4, 4, 4), (1, 1, 6, 2), (3, 5, 2, 2)])
def test_unpatchify_inverts_patchify(shape):
    x = torch.arange(math.prod(shape)).view(shape)
    tokens = mmdit.patchify(x, 2)
    assert tokens.shape == (shape[0], shape[2] * shape[3] // 4, shape[1] * 4)
    assert torch.equal(mmdit.unpatchify(tokens, 2, *shape[2:]), x)


def test_a_token_is_one_patch_in_order_channel_row_column():
    x = torch.randn(2, 3, 6, 4)
    tokens = mmdit.patchify(x, 2)  # 3 rows of 2 patches
    assert torch.equal(tokens[1, 3], x[1, :, 2:4, 2:4].reshape(-1))


@pytest.mark.parametrize("rows, columns", [(6, 6), (4, 2), (2, 6), (3, 5), (1, 1)])
def test_smaller_grids_take_the_centre_of_the_table(rows, columns):
    model = MMDiT(SMALL)
    table = model.positions.detach().view(6, 6, -1)
    top, left = 3 - rows // 2, 3 - columns // 2
    found = model.grid_positions(rows, columns).view(rows, columns, -1)
    for i in range(rows):
        for j in range(columns):
            assert torch.equal(found[i, j], table[top + i, left + j])


def test_non_square_input_equals_the_square_ones_centre():
    """With attention and MLP asleep, a token's output depends on its patch and position alone."""
    torch.manual_seed(0)
    model = MMDiT(SMALL)  # gates are zero: blocks are the identity
    torch.nn.init.normal_(model.final.weight)
    square, t, text = inputs(SMALL, H=12, W=12)
    wide = square[:, :, 4:8, 2:10]  # patch rows 2..3 and columns 1..4 of 6: the centre
    with torch.no_grad():
        whole, part = model(square, t, text), model(wide, t, text)
    assert torch.allclose(whole[:, :, 4:8, 2:10], part, atol=1e-5)
    assert part.std() > 0.1


def test_position_sines_tell_every_cell_apart():
    table = mmdit.sines_2d(16, 64)
    distances = torch.cdist(table, table) + 1e3 * torch.eye(256)
    assert distances.min() > 0.3
    assert math.isclose(table.square().mean(), 0.5, rel_tol=1e-5)


# --- the network against naive code --------------------------------------------------------------


def naive_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def naive_mlp(x, stream):
    gate, value = (x @ stream.mlp.up.weight.T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * value) @ stream.mlp.down.weight.T


def naive_heads(x, shift, scale, weight, d):
    """x (L, D) of one sample → parts (q, k, v or k, v), each a list over heads of (L, d)."""
    y = (naive_norm(x) * (1 + scale) + shift) @ weight.T
    parts = y.split(x.shape[-1], -1)
    return [[part[:, i : i + d] for i in range(0, x.shape[-1], d)] for part in parts]


def naive_attention(q, k, v):
    out = []
    for q_h, k_h, v_h in zip(q, k, v, strict=True):
        weights = (naive_norm(q_h) @ naive_norm(k_h).T / math.sqrt(q_h.shape[-1])).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ v_h)
    return torch.cat(out, -1)


def naive_update(x, attended, stream, six, residual):
    _, _, g1, s2, c2, g2 = six
    y = x + g1 * (attended @ stream.out.weight.T)
    mlp = naive_mlp(naive_norm(y) * (1 + c2) + s2, stream)
    return (y if residual == "prenorm" else x) + g2 * mlp


@pytest.mark.parametrize("residual", mmdit.RESIDUALS)
def test_single_block_equals_naive_float64(residual):
    model = awake(config_of("single only", residual)).double()
    block = model.single_blocks[0]
    tokens, cond = torch.randn(2, 9, 48).double(), torch.randn(2, 48).double()
    found = block(tokens, cond)
    for b in range(2):
        six = (block.stream.modulation.weight @ cond[b]).split(48)
        q, k, v = naive_heads(tokens[b], six[0], six[1], block.stream.qkv.weight, 12)
        attended = naive_attention(q, k, v)
        expected = naive_update(tokens[b], attended, block.stream, six, residual)
        assert (found[b] - expected).abs().max() < 1e-5 and expected.std() > 0.1


@pytest.mark.parametrize("residual", mmdit.RESIDUALS)
@pytest.mark.parametrize("mix", ["double only", "one of each"])
def test_double_blocks_equal_naive_float64(mix, residual):
    """Also the last one of a double-only model, whose text is keys and values alone."""
    model = awake(config_of(mix, residual)).double()
    block = model.double_blocks[-1]
    text, image, cond = torch.randn(2, 5, 48), torch.randn(2, 9, 48), torch.randn(2, 48)
    text, image, cond = text.double(), image.double(), cond.double()
    new_text, new_image = block(text, image, cond)
    for b in range(2):
        six = (block.image.modulation.weight @ cond[b]).split(48)
        q, k, v = naive_heads(image[b], six[0], six[1], block.image.qkv.weight, 12)
        t_six = (block.text.modulation.weight @ cond[b]).split(48)
        if mix == "double only":
            t_k, t_v = naive_heads(text[b], t_six[0], t_six[1], block.text.kv.weight, 12)
            t_q = [torch.zeros(0, 12).double()] * 4
        else:
            t_q, t_k, t_v = naive_heads(text[b], t_six[0], t_six[1], block.text.qkv.weight, 12)
        joint = [
            [torch.cat([a, c]) for a, c in zip(t_part, part, strict=True)]
            for t_part, part in zip((t_q, t_k, t_v), (q, k, v), strict=True)
        ]
        attended = naive_attention(*joint)
        n_text = len(t_q[0])
        expected = naive_update(image[b], attended[n_text:], block.image, six, residual)
        assert (new_image[b] - expected).abs().max() < 1e-5
        if mix == "one of each":
            expected = naive_update(text[b], attended[:n_text], block.text, t_six, residual)
            assert (new_text[b] - expected).abs().max() < 1e-5
        else:
            assert torch.equal(new_text[b], text[b])


def test_time_embedding_is_cosines_then_sines_of_1000_t_in_fp32():
    embed = awake(SMALL).time_embed
    t = torch.tensor([0.0, 0.25, 0.999])
    frequencies = 10000.0 ** (-torch.arange(128) / 128)
    angles = 1000 * t[:, None] * frequencies
    h = torch.cat([angles.cos(), angles.sin()], 1) @ embed.lift.weight.T + embed.lift.bias
    expected = F.silu(F.silu(h) @ embed.mix.weight.T + embed.mix.bias)
    assert torch.allclose(embed(t), expected, atol=1e-4)
    # In bf16 weights t = 0.999 stays apart from 1, which a bf16 t or frequency table would not.
    half = awake(SMALL).bfloat16().time_embed
    assert half.index.dtype == torch.int64
    moved = (half(torch.tensor([0.999])) - half(torch.tensor([1.0]))).abs().max()
    assert moved > 0.01


@pytest.mark.parametrize("residual", mmdit.RESIDUALS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_trains_and_every_parameter_gets_a_gradient(mix, residual):
    config = config_of(mix, residual)
    model = awake(config)
    out = model(*inputs(config))
    assert out.shape == (2, 3, 8, 12)
    out.square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # positions outside the crop and nothing else may have zero rows, never a whole zero
    assert silent == []


@pytest.mark.parametrize("mix", MIXES)
def test_fresh_model_is_zero_and_learns(mix):
    """adaLN-zero: the output starts at exactly 0; a few steps of AdamW reduce the loss."""
    torch.manual_seed(0)
    config = config_of(mix)
    model = MMDiT(config)
    x, t, text = inputs(config)
    assert not model(x, t, text).any()
    optimizer = torch.optim.AdamW(model.param_groups(3e-3), eps=1e-15)
    losses = []
    for _ in range(40):
        loss = (model(x, t, text) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_text_and_time_and_registers_matter():
    model = awake(SMALL)
    x, t, text = inputs(SMALL)
    with torch.no_grad():
        out = model(x, t, text)
        assert (model(x, t, text.flip(0)) - out).abs().max() > 1e-3
        assert (model(x, 1 - t, text) - out).abs().max() > 1e-3
        model.registers.mul_(-1)
        assert (model(x, t, text) - out).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_mix():
    model = awake(SMALL)
    x, t, text = inputs(SMALL, B=3)
    with torch.no_grad():
        alone = model(x[1:2], t[1:2], text[1:2])
        assert torch.allclose(model(x, t, text)[1:2], alone, atol=1e-5)


# --- muP -----------------------------------------------------------------------------------------


def expected_class(name):
    """muP's table by name, independently of how the code says it."""
    if re.search(r"bias|positions|registers", name):
        return "vector"
    if "modulation" in name:
        return "modulation"
    return {
        "patch_embed.weight": "input", "time_embed.lift.weight": "input",
        "text_embed.weight": "text", "final.weight": "output",
    }.get(name, "hidden")  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_mup_groups_follow_the_table(mix):
    config = config_of(mix)  # width 48 over base 24: m = 2
    model = MMDiT(config)
    groups = model.param_groups(lr=1e-2, weight_decay=0.1)
    of = {id(p): g for g in groups for p in g["params"]}
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    base_mlp = replace(config, dim=24).mlp_dim
    for name, p in model.named_parameters():
        kind = expected_class(name)
        assert model.role(name) == kind
        m = config.mlp_dim / base_mlp if "down" in name else 2.0
        m = m if kind in ("hidden", "modulation", "output") else 1.0
        assert of[id(p)]["lr"] == pytest.approx(1e-2 / m), name
        decay = 0.0 if kind == "vector" else 0.1 * m
        assert of[id(p)]["weight_decay"] == pytest.approx(decay), name
    assert len({(g["lr"], g["weight_decay"]) for g in groups}) == len(groups)


def test_at_the_base_width_mup_and_standard_agree():
    model = MMDiT(replace(SMALL, base_dim=48))
    for parametrization in ("mup", "standard"):
        groups = model.param_groups(1e-2, 0.1, parametrization)
        assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [(1e-2, 0.0), (1e-2, 0.1)]
    with pytest.raises(ValueError, match="standard"):
        model.param_groups(1e-2, 0.1, "ntk")


def test_initial_scales_follow_the_table():
    torch.manual_seed(0)
    model = MMDiT(replace(SMALL, dim=192, base_dim=48))
    for name, p in model.named_parameters():
        kind = expected_class(name)
        if kind in ("hidden", "input"):
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
        elif kind in ("modulation", "text", "output") or "bias" in name:
            assert not p.any(), name


# --- FLOPs, host syncs, compile ------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n_registers", [0, 4])
def test_flops_equal_torchs_counter(mix, n_registers):
    model = MMDiT(config_of(mix, n_registers=n_registers))
    x, t, text = inputs(model.config, B=3)
    with FlopCounterMode(display=False) as counter:
        model(x, t, text)
    assert counter.get_total_flops() == 3 * model.flops_per_image(8, 12, 5)


@pytest.mark.parametrize("mix", MIXES)
def test_forward_and_backward_never_read_a_value(mix):
    model = awake(config_of(mix))
    x, t, text = inputs(model.config)
    with HostReads() as reads:
        model(x, t, text).sum().backward()
    assert reads.seen == []
    for read in (lambda: t.sum().item(), lambda: bool(t[0] > 0), lambda: t[t > 0], t.nonzero):
        with HostReads() as reads:  # the recorder itself can see each kind
            read()
        assert reads.seen


@pytest.mark.parametrize("residual", mmdit.RESIDUALS)
@pytest.mark.parametrize("mix", ["double only", "one of each"])
def test_blocks_have_no_graph_breaks(mix, residual):
    model = awake(config_of(mix, residual))
    text, image, cond = torch.randn(2, 5, 48), torch.randn(2, 9, 48), torch.randn(2, 48)
    calls = [(block, (text, image, cond)) for block in model.double_blocks]
    calls += [(block, (image, cond)) for block in model.single_blocks]
    for block, arguments in calls:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(block)(*arguments)
        assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_compiling_blocks_keeps_keys_and_output():
    torch._dynamo.reset()
    model = awake(SMALL)
    keys, expected = list(model.state_dict()), model(*inputs(SMALL))
    model.compile_blocks(backend="aot_eager")
    assert torch.allclose(model(*inputs(SMALL)), expected, atol=1e-5)
    assert list(model.state_dict()) == keys


def test_nothing_is_compiled_again_after_every_bucket_was_seen():
    """More buckets than torch's default limit of 8, with and without gradients; captions differ
    in length but are padded to one."""
    torch._dynamo.reset()
    model = awake(replace(SMALL, max_grid=14))
    model.compile_blocks(backend="aot_eager")
    patch = model.config.patch_size
    buckets = [
        (rows * patch, columns * patch)
        for rows, columns in zip(range(2, 11), range(11, 2, -1), strict=True)
    ]

    def through_all(length):
        for H, W in buckets:
            x, t, text = inputs(model.config, H=H, W=W)
            text[:, length:] = 0
            model(x, t, text).sum().backward()
            with torch.no_grad():
                model(x, t, text)

    through_all(3)
    with torch.compiler.set_stance("fail_on_recompile"):
        through_all(5)
        with pytest.raises(RuntimeError, match="recompile"):  # it would be noticed
            x, t, text = inputs(model.config, H=patch, W=patch)
            model(x, t, text)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 13}, r"head_dim = 13 must divide dim=48"),
        ({"dim": 0}, r"dim = 0 must be at least 1"),
        ({"n_double_layers": 4}, r"n_double_layers = 4 must lie in 0..n_layers=3"),
        ({"residual": "post"}, r"residual = 'post' must be one of"),
        ({"base_dim": 30}, r"base_dim = 30 must be a multiple of head_dim=12"),
        ({"n_registers": -1}, r"n_registers = -1"),
        ({"dim": 42, "head_dim": 6}, r"dim = 42 must be a multiple of 4"),
    ],
)
def test_bad_config_names_field_value_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    "x_shape, text_shape, message",
    [
        ((1, 3, 9, 8), (1, 5, 7), "multiple of patch_size=2"),
        ((1, 3, 14, 8), (1, 5, 7), "exceeds max_grid"),
        ((1, 4, 8, 8), (1, 5, 7), "4 channels, the model 3"),
        ((1, 3, 8, 8), (1, 7), r"must be \(B, T, 7\)"),
        ((1, 3, 8, 8), (1, 5, 8), r"must be \(B, T, 7\)"),
    ],
)
def test_bad_input_names_the_rule(x_shape, text_shape, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(SMALL)(torch.zeros(x_shape), torch.zeros(1), torch.zeros(text_shape))


def test_auraflow_has_its_published_size():
    with torch.device("meta"):
        model = MMDiT(PRESETS["auraflow-6.8b"])
    assert model.n_parameters() == 6_842_876_928


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_share_the_base_width(name):
    with torch.device("meta"):
        model = MMDiT(PRESETS[name])
    assert model.config.base_dim == 256
    model.param_groups(1e-3)


# --- files ---------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path):
    model = awake(config_of("2 + 3", "auraflow"))
    save_model(tmp_path / "run", model, classes=["a", "b"])
    loaded = load_model(tmp_path / "run")
    assert loaded.config == model.config and not loaded.training
    x, t, text = inputs(SMALL)
    assert torch.equal(loaded(x, t, text), model(x, t, text))
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_load_says_what_is_missing_or_does_not_match(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    model = awake(SMALL)
    save_model(tmp_path, model)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"n_layers": 3', '"n_layers": 2'))
    with pytest.raises(ValueError, match="do not match"):
        load_model(tmp_path)
    assert asdict(SMALL)["n_layers"] == 3
