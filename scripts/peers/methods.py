"""Methods on transformers' CLIPModel: HF PEFT's where it has the method, small torch counterparts where it has not.

Imported by steps.py and by scripts/reference/losses.py. HF PEFT's prefix tuning does nothing on CLIP and it has no bottleneck
adapters or visual prompts; `prefix` (Li & Liang 2021), `bottleneck` (Houlsby et al. 2019) and `vpt` (Jia et al. 2022) below name
their parameters as `peft` does.
"""

import types
from functools import lru_cache, partial

import torch
from torch import nn
from torch.nn import functional as F

TOWERS = {"vision": ["vision_model"], "text": ["text_model"], "both": ["vision_model", "text_model"]}
IA3_TARGETS = ["k_proj", "v_proj", "fc2"]


def blocks(clip, towers="both", last=None):
    """The paths of the chosen blocks, towers in order; `last` of each, or all."""
    chosen = []
    for tower in TOWERS[towers]:
        depth = len(getattr(clip, tower).encoder.layers)
        chosen += [f"{tower}.encoder.layers.{i}" for i in range(max(0, depth - (last or depth)), depth)]
    return chosen


def pattern(clip, targets, towers, last):
    """HF PEFT matches a string target against whole module paths."""
    paths = "|".join(path.replace(".", r"\.") for path in blocks(clip, towers, last))
    return rf"({paths})\..*\.({'|'.join(targets)})"


@lru_cache
def causal(length, prefix):
    """Queries see the whole prefix and no token after their own."""
    mask = torch.ones(length, prefix + length, dtype=torch.bool)
    return mask.tril(diagonal=prefix)


def prefixed_forward(self, hidden_states, attention_mask=None, **kwargs):
    """CLIPAttention.forward over [P_k; K] and [P_v; V], joined before they are split into heads."""
    batch, length, dim = hidden_states.shape

    def heads(x):
        return x.view(batch, x.shape[1], -1, self.head_dim).transpose(1, 2)

    def join(prefix, x):
        return torch.cat([prefix.expand(batch, -1, -1), x], dim=1)

    q = heads(self.q_proj(hidden_states))
    k = heads(join(self.prefix_key, self.k_proj(hidden_states)))
    v = heads(join(self.prefix_value, self.v_proj(hidden_states)))
    mask = causal(length, self.prefix_key.shape[0]) if kwargs.get("is_causal") else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
    return self.out_proj(y.transpose(1, 2).reshape(batch, length, dim)), None


def prefix(clip, towers="both", last=None, length=8, std=0.02):
    """Learned keys and values in front of those of every attention layer."""
    clip.requires_grad_(False)
    for path in blocks(clip, towers, last):
        attention = clip.get_submodule(path).self_attn
        for name in ["prefix_key", "prefix_value"]:
            attention.register_parameter(name, nn.Parameter(std * torch.randn(length, attention.embed_dim)))
        attention.forward = types.MethodType(prefixed_forward, attention)


def adapted(module, _inputs, output):
    """output + U relu(D output); attention gives a tuple."""
    y = output[0] if isinstance(output, tuple) else output
    y = y + module.adapter_up(F.relu(module.adapter_down(y)))
    return (y, *output[1:]) if isinstance(output, tuple) else y


def bottleneck(clip, towers="both", last=None, reduction=16):
    """A narrow MLP behind both branches of every block."""
    clip.requires_grad_(False)
    for path in blocks(clip, towers, last):
        block = clip.get_submodule(path)
        for branch in [block.self_attn, block.mlp]:
            width = block.embed_dim
            branch.adapter_down, branch.adapter_up = nn.Linear(width, width // reduction), nn.Linear(width // reduction, width)
            nn.init.zeros_(branch.adapter_up.weight)
            nn.init.zeros_(branch.adapter_up.bias)
            branch.register_forward_hook(adapted)


def vpt(clip, last=None, length=8):
    """Learned tokens behind the class token of every block of the image tower (deep): each block forgets those of the one before."""
    clip.requires_grad_(False)
    config = clip.config.vision_config
    bound = (6 / (3 * config.patch_size**2 + config.hidden_size)) ** 0.5
    for i, path in enumerate(blocks(clip, "vision", last)):
        block = clip.get_submodule(path)
        block.prompt = nn.Parameter(torch.empty(length, config.hidden_size).uniform_(-bound, bound))
        block.register_forward_pre_hook(partial(prompted, skip=1 + (length if i else 0)), with_kwargs=True)


def prompted(block, args, kwargs, skip):
    """The block's input with its own tokens in place of the `skip - 1` behind the class token."""
    x, *others = args
    x = torch.cat([x[:, :1], block.prompt.expand(len(x), -1, -1), x[:, skip:]], dim=1)
    return (x, *others), kwargs


def attach(clip, method, rank=8, targets=("q_proj", "k_proj", "v_proj"), towers="both", last=None):
    """Patches `clip` in place, so that only what the method trains requires gradients. Returns HF PEFT's wrapper, if any."""
    clip.train()
    if method == "full":
        clip.requires_grad_(towers == "both" and not last)
        for path in blocks(clip, towers, last) if last else TOWERS[towers]:
            clip.get_submodule(path).requires_grad_(True)
    elif method == "prefix":
        prefix(clip, towers, last)
    elif method == "bottleneck":
        bottleneck(clip, towers, last)
    elif method == "vpt":
        vpt(clip, last)
    elif method in ("lora", "dora"):
        from peft import LoraConfig, get_peft_model

        chosen = pattern(clip, targets, towers, last)
        return get_peft_model(clip, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen, use_dora=method == "dora"))
    elif method == "ia3":
        from peft import IA3Config, get_peft_model

        chosen, second = pattern(clip, IA3_TARGETS, towers, last), pattern(clip, ["fc2"], towers, last)
        return get_peft_model(clip, IA3Config(target_modules=chosen, feedforward_modules=second))
    else:
        raise ValueError(f"unknown method {method}")
    return None


def image_features(clip, pixels):
    """[B, 3, H, W] to projected features [B, P]."""
    return clip.visual_projection(clip.vision_model(pixels).pooler_output)


def text_features(clip, ids):
    """[C, T] to projected features [C, P]. No mask: attention is causal and pooling is at the end of text."""
    return clip.text_projection(clip.text_model(ids).pooler_output)


def logits(clip, images, classes):
    """exp(logit scale) · cos(image, class prompt), [B, C]."""
    return clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).t()
