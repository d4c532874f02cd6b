"""Layers again as plain formulas over one sequence `[T, D]`, a loop over tokens: what the layers are held to.

Written from the definitions, sharing nothing with `fla` but the layers' weights and settings. Runs in the dtype of
its input.
"""

import math

import torch
import torch.nn.functional as F

from fla import layers

ACTIVATIONS = {"swish": F.silu, "sigmoid": torch.sigmoid, "relu": torch.relu, None: lambda x: x}
FEATURE_MAPS = {
    "elementwise_product": lambda m, x: m.layer1(x) * m.layer2(x),
    "hedgehog": lambda m, x: torch.cat([2 * m.layer(x), -2 * m.layer(x)], -1).softmax(-1),
    "t2r": lambda m, x: m.layer(x).relu(),
    "elu": lambda m, x: F.elu(x) + 1,
    "relu": lambda m, x: x.relu(),
    "identity": lambda m, x: x,
}


def naive_gla(layer, x, settings):
    q, k, v, o_gate = projections(layer, x, settings)
    g = F.logsigmoid(layer.gk_proj(x)) / settings.get("gate_logit_normalizer", 16)
    if settings.get("clamp_min") is not None:
        g = torch.maximum(g, g.new_tensor(settings["clamp_min"]))
    g = heads(g, k.shape[1], k.shape[2])
    return finish(layer, recurrence(q, k, v, g), o_gate, settings)


def naive_simple_gla(layer, x, settings):
    q, k, v, o_gate = projections(layer, x, settings)
    g = F.logsigmoid(layer.gk_proj(x)) / settings.get("gate_logit_normalizer", 16)
    return finish(layer, recurrence(q, k, v, g[..., None]), o_gate, settings)


def naive_retention(layer, x, settings):
    q, k, v, o_gate = projections(layer, x, settings)
    q, k = rope(q), rope(k)
    gamma = torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(q.shape[1])], dtype=x.dtype)
    return finish(layer, recurrence(q, k, v, gamma[None, :, None].expand(len(x), -1, -1)), o_gate, settings)


def naive_linear(layer, x, settings):
    num_kv = settings.get("num_kv_heads") or settings["num_heads"]
    q, k, v = (p(x).unflatten(-1, (n, -1)) for p, n in split(layer, settings["num_heads"], num_kv))
    feature_map = FEATURE_MAPS[settings.get("feature_map", "elementwise_product")]
    q, k = feature_map(layer.feature_map_q, q), feature_map(layer.feature_map_k, k)
    if settings.get("norm_q"):
        q = q / (q.sum(-1, keepdim=True) + 1e-4)
    if settings.get("norm_k"):
        k = k / (k.sum(-1, keepdim=True) + 1e-4)
    k, v = (copies(y, settings["num_heads"]) for y in (k, v))
    o = recurrence(q, k, v, torch.zeros_like(k))
    if settings.get("do_feature_map_norm"):
        o = o / ((q * q.shape[-1] ** -0.5 * k.cumsum(0)).sum(-1, keepdim=True) + 1e-10)
    if settings.get("output_norm", "rmsnorm") == "rmsnorm":
        o = rms_norm(o, layer.norm.weight, 1e-5)
    return layer.o_proj(o.flatten(1))


def naive_attention(layer, x, settings):
    H = settings["num_heads"]
    num_kv = settings.get("num_kv_heads") or H
    q, k, v = (p(x).unflatten(-1, (n, -1)) for p, n in split(layer, H, num_kv))
    if settings.get("qk_norm"):
        q, k = rms_norm(q, layer.q_norm.weight, 1e-5), rms_norm(k, layer.k_norm.weight, 1e-5)
    q, k = (rope(y, settings.get("rope_theta", 10000.0)) for y in (q, k))
    k, v = copies(k, H), copies(v, H)
    window = settings.get("window_size") or len(x)
    rows = []
    for t in range(len(x)):
        seen = slice(max(0, t + 1 - window), t + 1)
        scores = torch.einsum("hd,shd->hs", q[t], k[seen]) * q.shape[-1] ** -0.5
        rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen]))
    return layer.o_proj(torch.stack(rows).flatten(1))


NAIVE = {
    layers.GatedLinearAttention: naive_gla,
    layers.SimpleGatedLinearAttention: naive_simple_gla,
    layers.MultiScaleRetention: naive_retention,
    layers.LinearAttention: naive_linear,
    layers.Attention: naive_attention,
}


def split(layer, H, num_kv):
    return (layer.q_proj, H), (layer.k_proj, num_kv), (layer.v_proj, num_kv)


def projections(layer, x, settings):
    """q, k, v `[T, H, d]` after convolution, feature map and repetition of kv heads; the output gate or None."""
    H = settings["num_heads"]
    num_kv = settings.get("num_kv_heads") or H
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    if settings.get("use_short_conv", isinstance(layer, layers.SimpleGatedLinearAttention)):
        q, k, v = (conv(y, c) for y, c in ((q, layer.q_conv1d), (k, layer.k_conv1d), (v, layer.v_conv1d)))
    feature_map = ACTIVATIONS[settings.get("feature_map")]
    q, k = feature_map(q), feature_map(k)
    q, k, v = heads(q, H, q.shape[-1] // H), heads(k, H, k.shape[-1] // num_kv), heads(v, H, v.shape[-1] // num_kv)
    return q, k, v, heads(layer.g_proj(x), H, v.shape[-1]) if settings.get("use_output_gate", True) else None


def heads(x, H, head_dim):
    return copies(x.unflatten(-1, (-1, head_dim)), H)


def copies(x, H):
    """kv heads `[T, n, d]` -> `[T, H, d]`: query head h reads kv head h // (H / n)."""
    return torch.stack([x[:, h * x.shape[1] // H] for h in range(H)], 1)


def conv(x, module):
    weight = module.weight[:, 0]
    padded = torch.cat([x.new_zeros(weight.shape[1] - 1, x.shape[1]), x])
    y = torch.stack([(padded[t : t + weight.shape[1]] * weight.T).sum(0) for t in range(len(x))])
    return F.silu(y if module.bias is None else y + module.bias)


def rope(x, theta=10000.0):
    half = x.shape[-1] // 2
    position, channel = torch.arange(len(x), dtype=x.dtype), torch.arange(half, dtype=x.dtype)
    angle = position[:, None] * theta ** (-channel / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def recurrence(q, k, v, g):
    state, rows = q.new_zeros(*k.shape[1:], v.shape[-1]), []
    for t in range(len(q)):
        state = g[t].exp()[..., None] * state + k[t][..., None] * v[t][..., None, :]
        rows.append(torch.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5)
    return torch.stack(rows)


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def finish(layer, o, o_gate, settings):
    fused = o_gate is not None and settings.get("gate_fn", "swish") == "swish" and settings.get("fuse_norm", True)
    o = rms_norm(o, (layer.g_norm_swish_gate if fused else layer.g_norm).weight, 1e-5)
    if o_gate is not None:
        o = o * ACTIVATIONS[settings.get("gate_fn", "swish")](o_gate)
    return layer.o_proj(o.flatten(1))
