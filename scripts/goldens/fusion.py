"""Goldens of the fusions: random weights and tokens, and what torch's own modules make of them.

    python scripts/goldens/fusion.py        # writes tests/data/fusion/<name>.safetensors

Each file has the weights under `fusion.`, the inputs (`image`, `text`: features; `image_tokens`, `text_tokens`, `pool`, `scale`), `output`,
`cotangent`, and the gradients of sum(output * cotangent) under `grad.` for every weight and for both inputs.
`cross_attention` is built of `nn.MultiheadAttention`, `transformer` is `nn.TransformerEncoder`.
"""

import pathlib

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/fusion"
BATCH, IMAGE_TOKENS, TEXT_TOKENS = 3, 5, 6
PROJECTION, IMAGE, TEXT = 16, 24, 16  # tests/data/clip/quick
DIM, HEADS, LAYERS, HIDDEN = 12, 3, 2, 20
POOL = torch.tensor([5, 2, 0])  # the last token of each text; what comes after is padding


def unit(x):
    return F.normalize(x, dim=-1)


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4 * PROJECTION, 7)

    def forward(self, i):
        u, v = unit(i["image"]), unit(i["text"])
        return F.gelu(self.mlp(torch.cat([u, v, u * v, (u - v).abs()], 1)))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(PROJECTION, 7), nn.Linear(PROJECTION, 7)

    def forward(self, i):
        gain = PROJECTION**0.5
        return torch.tanh(self.image(gain * unit(i["image"]))) * torch.tanh(self.text(gain * unit(i["text"])))


class Cosine(nn.Module):
    def forward(self, i):
        return i["scale"] * F.cosine_similarity(i["image"], i["text"], dim=1)[:, None]


class Half(nn.Module):
    """One side's half of a co-attention layer."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x, own, other, padding):
        x = x + self.attn(own, other, other, key_padding_mask=padding, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_projection, self.text_projection = nn.Linear(IMAGE, DIM), nn.Linear(TEXT, DIM)
        self.layers = nn.ModuleList(nn.ModuleDict({"image": Half(), "text": Half()}) for _ in range(LAYERS))
        self.image_norm, self.text_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, i):
        u, v = self.image_projection(i["image_tokens"]), self.text_projection(i["text_tokens"])
        padding = torch.arange(TEXT_TOKENS)[None] > POOL[:, None]
        for layer in self.layers:
            nu, nv = layer["image"].norm1(u), layer["text"].norm1(v)
            u, v = layer["image"](u, nu, nv, padding), layer["text"](v, nv, nu, None)
        return torch.cat([self.image_norm(u[:, 0]), self.text_norm(v[torch.arange(BATCH), POOL])], 1)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_projection, self.text_projection = nn.Linear(IMAGE, DIM), nn.Linear(TEXT, DIM)
        self.modality_embedding = nn.Embedding(2, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", batch_first=True, norm_first=True)
        encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.layers, self.norm = encoder.layers, encoder.norm
        object.__setattr__(self, "encoder", encoder)

    def forward(self, i):
        u = self.image_projection(i["image_tokens"]) + self.modality_embedding.weight[0]
        v = self.text_projection(i["text_tokens"]) + self.modality_embedding.weight[1]
        words = torch.arange(TEXT_TOKENS)[None] > POOL[:, None]
        padding = torch.cat([torch.zeros(BATCH, IMAGE_TOKENS, dtype=torch.bool), words], 1)
        x = self.encoder(torch.cat([u, v], 1), src_key_padding_mask=padding)
        return torch.cat([x[:, 0], x[torch.arange(BATCH), IMAGE_TOKENS + POOL]], 1)


def write(name, module, seed):
    torch.manual_seed(seed)
    inputs = {
        "image": torch.randn(BATCH, PROJECTION),
        "text": torch.randn(BATCH, PROJECTION),
        "image_tokens": torch.randn(BATCH, IMAGE_TOKENS, IMAGE),
        "text_tokens": torch.randn(BATCH, TEXT_TOKENS, TEXT),
        "scale": torch.tensor(14.3),
    }
    model = module()
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn_like(parameter)
    for tensor in inputs.values():
        tensor.requires_grad_(True)
    output = model(inputs)
    cotangent = torch.randn_like(output)
    (output * cotangent).sum().backward()
    tensors = {f"fusion.{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"grad.fusion.{n}": p.grad for n, p in model.named_parameters()}
    tensors |= {f"grad.{n}": t.grad for n, t in inputs.items() if t.grad is not None}
    tensors |= {n: t.detach() for n, t in inputs.items()} | {"pool": POOL.to(torch.uint8), "output": output.detach(), "cotangent": cotangent}
    save_file({n: t.contiguous() for n, t in tensors.items()}, OUT / f"{name}.safetensors")


OUT.mkdir(parents=True, exist_ok=True)
for seed, (name, module) in enumerate([("cosine", Cosine), ("concat", Concat), ("bilinear", Bilinear), ("cross_attention", CrossAttention), ("transformer", Transformer)]):
    write(name, module, seed)
