"""What only norms and the MLP have: the residual's dtype, older names, memory, both checkpoint layouts, adapters."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fla import modules
from fla.modules import activations, feature_map, fused_norm_gate, layernorm, layernorm_gated
from fla.modules.l2norm import l2_norm, l2norm, l2norm_bwd, l2norm_fwd
from fla.testing import assert_within_budget, relative_rms

D = 16


class Kept:
    """Counts the elements that a forward pass keeps for backward, parameters and `known` tensors aside."""

    def __init__(self, *known: torch.Tensor) -> None:
        self.known, self.elements = {x.data_ptr() for x in known}, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x)
        self.hooks.__enter__()
        return self

    def keep(self, x):
        if x.data_ptr() not in self.known:
            self.known.add(x.data_ptr())
            self.elements += x.numel()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("module", [modules.RMSNorm(D), modules.LayerNorm(D), modules.GroupNorm(2, D)], ids=repr)
def test_prenorm_hands_on_the_sum_in_the_residuals_dtype(module):
    x, residual = torch.randn(3, D, dtype=torch.bfloat16), torch.randn(3, D)
    y, total = module(x, residual, prenorm=True)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.float() + residual)
    assert module(x, residual.bfloat16(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.bfloat16
    assert module(x, prenorm=True)[1] is x
    assert torch.equal(module(x, prenorm=True, residual_in_fp32=True)[1], x.float())
    assert module(x.double(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float64


def test_float32_weights_with_low_precision_activations():
    module, x = modules.RMSNorm(D), torch.randn(3, D, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, module.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_plain_references_agree_with_the_functions():
    x, residual, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, D), (3, D), (D,), (D,)))
    for name in ("layer_norm", "rms_norm", "group_norm"):
        options = {"eps": 1e-3, "prenorm": True, **({"num_groups": 2} if name == "group_norm" else {})}
        actual = getattr(layernorm, name)(x, weight, bias, residual, **options)
        expected = getattr(layernorm, f"{name}_ref")(x, weight, bias, residual=residual, **options)
        for y, z in zip(actual, expected, strict=True):
            assert_within_budget(name, y, z, z)
    low = layernorm.rms_norm_ref(x.bfloat16(), weight.float(), None, upcast=True)
    assert_within_budget("upcast", layernorm.rms_norm(x.bfloat16(), weight.float(), None), low.double(), low)


def test_linear_forms_and_their_functions():
    x, residual, w = torch.randn(3, D), torch.randn(3, D), torch.randn(5, D)
    weight, bias, b = torch.randn(D), torch.randn(D), torch.randn(5)
    for name in ("layer_norm", "rms_norm", "group_norm"):
        groups = {"num_groups": 4} if name == "group_norm" else {}
        y, total = getattr(layernorm, f"{name}_linear")(x, weight, bias, w, b, residual, prenorm=True, **groups)
        expected = getattr(layernorm, name)(x, weight, bias, residual, **groups) @ w.T + b
        torch.testing.assert_close(y, expected)
        assert torch.equal(total, x + residual)


def test_linear_form_under_autocast():
    module, x, w = (
        modules.RMSNormLinear(D),
        torch.randn(3, D, requires_grad=True),
        torch.randn(5, D, requires_grad=True),
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, w)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert torch.equal(y, modules.RMSNorm(D)(x).bfloat16() @ w.bfloat16().T)


def test_older_names_of_gated_norms():
    x, g, weight, w = torch.randn(3, D), torch.randn(3, D), torch.randn(D), torch.randn(5, D)
    for kind, classes in (("rms", "RMS"), ("layer", "Layer")):
        y = getattr(fused_norm_gate, f"{kind}_norm_gated")(x, g, weight, None, eps=1e-6)
        older = getattr(fused_norm_gate, f"{kind}_norm_swish_gate_fn")
        assert torch.equal(older(x, g, weight, None), y) and torch.equal(older(x, o=g, weight=weight, bias=None), y)
        linear = getattr(fused_norm_gate, f"{kind}_norm_swish_gate_linear")(x, g, weight, None, w, None)
        torch.testing.assert_close(linear, y @ w.T)
        assert torch.equal(
            getattr(fused_norm_gate, f"{kind}_norm_swish_gate_linear_fn")(x, g, weight, None, w, None), linear
        )
        new, old = getattr(modules, f"Fused{classes}NormGated"), getattr(modules, f"Fused{classes}NormSwishGate")
        assert isinstance(old(D), new) and repr(old(D)) == f"Fused{classes}NormSwishGate({D}, eps=1e-05)"
        assert torch.equal(old(D)(x, o=g), new(D)(x, g))
        torch.testing.assert_close(getattr(modules, old.__name__ + "Linear")(D)(x, o=g, weight=w), old(D)(x, g) @ w.T)
        torch.testing.assert_close(getattr(modules, new.__name__ + "Linear")(D)(x, g, w), new(D)(x, g) @ w.T)


def test_gated_norm_functions_of_mamba():
    x, z, weight = torch.randn(3, D), torch.randn(3, D), torch.randn(D)
    rms = layernorm_gated.rmsnorm_fn(x, weight, None, z, group_size=4)
    torch.testing.assert_close(
        rms, layernorm.group_norm(x, weight, None, None, 1e-6, False, False, True, 4) * z * z.sigmoid()
    )
    module = layernorm_gated.RMSNormGated(D, norm_before_gate=True)
    assert torch.equal(module(x), modules.RMSNorm(D)(x)) and module.bias is None
    assert layernorm_gated.LayerNormGated(D).bias is not None


def test_l2norm_output_dtype_and_zero_rows():
    assert l2_norm is l2norm
    x = torch.randn(3, D, dtype=torch.bfloat16)
    assert l2norm(x, output_dtype=torch.float32).dtype == torch.float32
    zero = torch.zeros(2, D, requires_grad=True)
    l2norm(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_parameters_device_and_dtype():
    for build in (modules.RMSNorm, modules.LayerNorm, modules.FusedRMSNormGated, modules.FusedRMSNormSwishGate):
        module = build(D, device="meta", dtype=torch.bfloat16)
        assert module.weight.is_meta and module.weight.dtype == torch.bfloat16
    norm = modules.LayerNorm(D, bias=True)
    nn.init.normal_(norm.weight)
    norm.reset_parameters()
    assert (norm.weight == 1).all() and not norm.bias.any()
    assert "bias" in dict(modules.RMSNorm(D)._parameters) and modules.RMSNorm(D).bias is None
    assert repr(modules.RMSNorm(2048, eps=1e-6)) == "RMSNorm(2048, eps=1e-06)"


def test_norm_keeps_its_input_and_a_number_per_row():
    norm, x = modules.RMSNorm(D), torch.randn(10, D, requires_grad=True)
    with Kept(x, norm.weight) as kept:
        norm(x)
    assert kept.elements == 10


def test_mlp_keeps_the_two_halves_and_not_their_product():
    x = torch.randn(10, D, requires_grad=True)
    kept = {}
    for fuse in (True, False):
        mlp = modules.GatedMLP(D, intermediate_size=32, fuse_swiglu=fuse)
        with Kept(x, *mlp.parameters()) as kept[fuse]:
            mlp(x)
    assert kept[True].elements == 2 * 10 * 32 and kept[False].elements >= 4 * 10 * 32


@pytest.mark.parametrize(
    ("width", "ratio", "inner"), [(2048, 4, 5632), (2048, 2, 2816), (1024, None, 2816), (2304, 4, 6144)]
)
def test_mlp_width(width, ratio, inner):
    with torch.device("meta"):
        mlp = modules.GatedMLP(width, ratio)
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (inner, width)
    assert mlp.down_proj.weight.shape == (width, inner)


@pytest.mark.parametrize("assign", [False, True])
def test_mlp_loads_gate_and_up_apart_and_as_one(assign):
    mlp, x = nn.ModuleDict({"mlp": modules.GatedMLP(D, intermediate_size=8)}), torch.randn(2, D)
    gate, up, down = torch.randn(8, D), torch.randn(8, D), torch.randn(D, 8)
    apart = {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    joined = {"mlp.gate_proj.weight": torch.cat((gate, up)), "mlp.down_proj.weight": down}
    for layout in (apart, joined):
        keys = list(layout)
        mlp["mlp"] = modules.GatedMLP(D, intermediate_size=8)
        mlp.load_state_dict(layout, assign=assign)
        assert list(layout) == keys
        torch.testing.assert_close(mlp["mlp"](x), activations.swiglu(x @ gate.T, x @ up.T) @ down.T)
        saved = mlp.state_dict()
        assert list(saved) == list(apart)
        assert all(torch.equal(saved[name], apart[name]) for name in apart)
        storages = {x.untyped_storage().data_ptr() for x in saved.values()}
        assert len(storages) == 3  # safetensors refuses tensors that share memory
    for missing in ("gate", "up"):
        with pytest.raises(RuntimeError, match=f"Missing key.*{missing}_proj"):
            mlp.load_state_dict({name: x for name, x in apart.items() if missing not in name})


def test_mlp_prints_its_projections_as_one_only_while_they_are_plain():
    mlp = modules.GatedMLP(D, intermediate_size=8)
    assert f"(gate_proj): Linear(in_features={D}, out_features=16, bias=False)" in str(mlp)
    assert "up_proj" not in str(mlp)
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    assert "up_proj" in str(mlp) and f"(gate_proj): Linear(in_features={D}, out_features=8, bias=False)" in str(mlp)


def test_mlp_calls_what_stands_in_for_its_linear_map():
    mlp, x, seen = modules.GatedMLP(D, intermediate_size=8), torch.randn(2, D), []
    expected = mlp(x)
    handle = mlp.down_proj.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(mlp(x), expected)
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapter = Adapter(8, D, bias=False)
    adapter.weight = mlp.down_proj.weight
    mlp.down_proj = adapter
    torch.testing.assert_close(mlp(x), expected + 1)
    assert seen == [True]


def test_glu_linear_under_autocast():
    x, y, w = (torch.randn(*shape, requires_grad=True) for shape in ((3, D), (3, D), (5, D)))
    with torch.autocast("cpu", torch.bfloat16):
        out = activations.swiglu_linear(x, y, w)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), (x, y, w))] == [torch.float32] * 3


def test_activation_names_mean_what_they_do_in_transformers():
    from transformers.activations import ACT2FN as THEIRS  # takes seconds

    x = torch.cat((torch.linspace(-14, 14, 57), torch.tensor([1e-7, -1e-7])))

    def both(function, x):
        x = x.clone().requires_grad_()
        return function(x), *torch.autograd.grad(function(x).sum(), x)

    assert set(activations.ACT2FN) - set(THEIRS) == {"logsigmoid", "sqrelu", "bias_gelu"}
    for name in THEIRS:
        theirs, ours = THEIRS[name], activations.get_activation(name)
        if isinstance(ours, nn.Module):
            assert all(torch.allclose(ours.state_dict()[k], z.float(), 0, 0.02) for k, z in theirs.state_dict().items())
            ours.load_state_dict(theirs.state_dict())
        runs = [both(theirs.to(dtype), x.to(dtype)) for dtype in (torch.float64, torch.float32)]
        for y, y64, naive in zip(both(ours, x), *runs, strict=True):
            assert_within_budget(name, y, y64, naive)
    assert activations.ACT2FN["sqrelu"](x).equal(x.relu() ** 2)
    assert activations.ACT2FN["prelu"] is not activations.ACT2FN["prelu"]  # parameters of its own


@pytest.mark.parametrize("name", ["gelu", "relu2", "xielu"])
def test_mlp_of_another_activation(name):
    mlp, x = modules.GatedMLP(D, intermediate_size=8, hidden_act=name), torch.randn(2, D)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (activations.get_activation(name)(gate) * up) @ mlp.down_proj.weight.T)
    assert ("act_fn.alpha_p" in mlp.state_dict()) == (name == "xielu")
    copy.deepcopy(mlp), pickle.dumps(mlp)


def test_positional_orders():
    """Other programs pass eps as the third argument of a gated norm with a linear map."""
    for name in ("RMSNormGated", "RMSNormGatedLinear", "LayerNormGatedLinear", "RMSNormSwishGate"):
        assert getattr(modules, f"Fused{name}")(D, True, 1e-3).eps == 1e-3
    for name in ("RMSNormSwishGateLinear", "LayerNormSwishGate", "LayerNormSwishGateLinear"):
        assert getattr(modules, f"Fused{name}")(D, True, 1e-3, None, torch.float64).weight.dtype == torch.float64
    norm = modules.FusedLayerNormGatedLinear(D, False, 1e-3, "sigmoid")
    assert (norm.weight, norm.bias, norm.activation) == (None, None, "sigmoid")
    assert modules.FusedLayerNormGatedLinear(D, bias=True).bias is not None
    norm = modules.FusedLayerNormGated(D, True, True, "sigmoid", 1e-3)
    assert norm.bias is not None and (norm.activation, norm.eps) == ("sigmoid", 1e-3)
    for name in ("LayerNorm", "RMSNorm", "LayerNormLinear", "RMSNormLinear"):
        norm = getattr(modules, name)(D, True, True, 1e-3)
        assert norm.bias is not None and norm.eps == 1e-3
    for name in ("GroupNorm", "GroupNormLinear"):
        norm = getattr(modules, name)(4, D, True, True, 1e-3)
        assert norm.bias is not None and (norm.num_groups, norm.eps) == (4, 1e-3)
    norm = layernorm_gated.RMSNormGated(D, 1e-3, 4, True)
    assert (norm.eps, norm.group_size, norm.norm_before_gate) == (1e-3, 4, True)


@pytest.mark.parametrize("width", [1, 3, 1000, 1536, 65537])
def test_norms_of_any_width(width):
    """A mean takes in the channels of the row and nothing beside them."""
    x, g = torch.randn(2, width) + 3, torch.randn(2, width)
    for rms in (True, False):
        expected = [layernorm.group_norm_ref(z, None, None, is_rms_norm=rms) for z in (x.double(), x)]
        assert_within_budget("y", layernorm.layer_norm(x, None, None, is_rms_norm=rms), *expected)
        gated = fused_norm_gate.rms_norm_gated if rms else fused_norm_gate.layer_norm_gated
        expected = [y * F.silu(g.to(y.dtype)) for y in expected]
        assert_within_budget("gated", gated(x, g, None, None, eps=1e-5), *expected)


def test_norm_of_48_channels_in_16_groups():
    x, weight = torch.randn(4, 48) + torch.arange(48) // 3, torch.randn(48)
    reference = [F.group_norm(z, 16, weight.to(z.dtype), eps=1e-5) for z in (x.double(), x)]
    assert_within_budget("y", layernorm.group_norm(x, weight, None, num_groups=16), *reference)


def test_weight_gradients_over_many_rows_are_summed_in_float32():
    rows, dim = 8192, 512
    x, g, dy = (torch.randn(rows, dim).bfloat16() for _ in range(3))
    weight = torch.randn(dim).bfloat16().requires_grad_()
    for gate in (None, g):
        y = layernorm.rms_norm(x, weight, None) if gate is None else modules.rms_norm_gated(x, gate, weight, None)
        (grad,) = torch.autograd.grad(y, weight, dy)
        unit = dy.double() * layernorm.rms_norm_ref(x.double(), None, None, eps=1e-5 if gate is None else 1e-6)
        expected = (unit if gate is None else unit * F.silu(g.double())).sum(0)
        assert relative_rms(grad.double(), expected) < 2 * torch.finfo(torch.bfloat16).eps / 4


def test_l2norm_by_halves():
    x = torch.randn(3, D, requires_grad=True)
    y, dy = l2norm(x), torch.randn(3, D)
    (expected,) = torch.autograd.grad(y, x, dy)
    half, rstd = l2norm_fwd(x)
    assert torch.equal(half, y) and rstd.shape == (3,) and not half.requires_grad
    torch.testing.assert_close(l2norm_bwd(half, rstd, dy), expected)


def test_feature_maps_approximate_their_kernels():
    q, k = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    score = (q * k).sum(-1)
    taylor, s = feature_map.TaylorFeatureMap(6), score / 6**0.5
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2)
    rebased = feature_map.RebasedFeatureMap(6, use_gamma=False, use_beta=False, normalize=False)
    torch.testing.assert_close((rebased(q) * rebased(k)).sum(-1), score**2 / 6)
    assert torch.equal(rebased(q, flatten=False), q) and list(rebased.parameters()) == []
    moved = feature_map.RebasedFeatureMap(6, normalize=False).double()
    nn.init.constant_(moved.gamma, 2.0), nn.init.constant_(moved.beta, 1.0)
    assert torch.equal(moved(q, flatten=False), 2 * q + 1)
    hedgehog = feature_map.HedgehogFeatureMap(6).double()
    assert torch.equal(hedgehog(q), torch.cat((2 * q, -2 * q), -1).softmax(-1))


BAD = [
    (lambda x: modules.RMSNorm(D + 1)(x), ValueError, "x must have as many channels as weight"),
    (lambda x: modules.RMSNorm(D, device="meta")(x), ValueError, "weight must be on cpu"),
    (lambda x: layernorm.rms_norm(x, [1.0] * D, None), TypeError, "weight must"),
    (lambda x: layernorm.rms_norm(x[:, :0], None, None), ValueError, "x must have at least one axis"),
    (lambda x: modules.LayerNorm(D, 1e-6), TypeError, "elementwise_affine must"),
    (lambda x: modules.FusedLayerNormGated(D, True, 1e-3), TypeError, "bias must"),
    (lambda x: modules.FusedLayerNormGatedLinear(D, True, True), TypeError, "eps must"),
    (lambda x: modules.RMSNorm(D, eps=-1.0), ValueError, "eps must"),
    (lambda x: modules.RMSNorm("16"), TypeError, "hidden_size must"),
    (lambda x: modules.RMSNormLinear(D)(x, torch.empty(3, D, device="meta")), ValueError, "weight must be on cpu"),
    (lambda x: activations.swiglu_linear(x, x, torch.empty(3, D, device="meta")), ValueError, "weight must be on"),
    (
        lambda x: activations.get_activation("gleu", "gate_fn"),
        ValueError,
        "gate_fn must be one of relu, .*got 'gleu'",
    ),
    (lambda x: activations.get_activation(["gelu"]), ValueError, "name must be one of"),
    (lambda x: modules.GatedMLP(D, -2), ValueError, "hidden_ratio must"),
    (lambda x: modules.GatedMLP(D, intermediate_size=0), ValueError, "intermediate_size must"),
    (lambda x: modules.RMSNorm(D)(x, x[:1]), ValueError, "residual"),
    (lambda x: modules.RMSNorm(D)(x.long()), TypeError, "x must"),
    (lambda x: modules.RMSNorm(D)("x"), TypeError, "x must"),
    (lambda x: modules.RMSNormLinear(D)(x, torch.randn(3, D + 1)), ValueError, "weight"),
    (lambda x: modules.RMSNormLinear(D)(x, torch.randn(3, D), torch.randn(4)), ValueError, "bias"),
    (lambda x: modules.GroupNorm(3, D), ValueError, "num_groups"),
    (lambda x: layernorm.group_norm(x, None, None, num_groups=3), ValueError, "num_groups"),
    (lambda x: layernorm_gated.RMSNormGated(D, group_size=5), ValueError, "group_size"),
    (lambda x: layernorm_gated.rmsnorm_fn(x, None, None, group_size=5), ValueError, "group size"),
    (lambda x: modules.FusedRMSNormGated(D, activation="relu"), ValueError, "activation"),
    (lambda x: fused_norm_gate.rms_norm_gated(x, x, None, None, activation="relu"), ValueError, "activation"),
    (lambda x: modules.FusedRMSNormGated(D)(x), TypeError, "gate"),
    (lambda x: modules.FusedRMSNormGated(D)(x, x, o=x), TypeError, "gate"),
    (lambda x: modules.FusedRMSNormGated(D)(x, x[:1]), ValueError, "gate"),
    (lambda x: modules.FusedRMSNormGatedLinear(D)(x, x), TypeError, "weight"),
    (lambda x: activations.swiglu(x, x[:1]), ValueError, "y must"),
    (lambda x: activations.swiglu_linear(x, x, torch.randn(3, 4)), ValueError, "weight"),
    (lambda x: modules.GatedMLP(D, hidden_act="bias_gelu"), ValueError, "hidden_act must be one of"),
    (lambda x: modules.GatedMLP(D, powglu_power=2.0), ValueError, "powglu_power"),
    (lambda x: feature_map.DPFPFeatureMap(D, nu=0), ValueError, "nu"),
    (lambda x: feature_map.LearnablePolySketchNonNegativeFeatureMap(D, degree=3), ValueError, "degree"),
]


@pytest.mark.parametrize(("call", "error", "word"), BAD)
def test_errors_name_the_argument(call, error, word):
    with pytest.raises(error, match=word):
        call(torch.randn(3, D))
