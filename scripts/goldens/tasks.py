#!/usr/bin/env python3
"""Losses of torch and open_clip on odd shapes, with gradients: tests/data/tasks.json.

    python scripts/goldens/tasks.py      (the environment of scripts/goldens/requirements.txt)

The asymmetric loss is that of the paper's authors (github.com/Alibaba-MIIL/ASL, `AsymmetricLoss`), written out; VSE++'s is its
`ContrastiveLoss` with `max_violation`; SupCon's that of its authors with one view of each image; CORAL's is `coral_loss` of
coral-pytorch.
"""

import json
import pathlib

import open_clip
import torch
import torch.nn.functional as F

torch.manual_seed(0)
DOUBLE = torch.float64
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/tasks.json"


def case(loss, *inputs):
    """The loss and its gradient for each input."""
    inputs = [torch.tensor(i.tolist(), dtype=DOUBLE, requires_grad=True) for i in inputs]
    value = loss(*inputs)
    value.backward()
    # Eight digits, so that what is read is what was computed with.
    return {"inputs": [i.tolist() for i in inputs], "loss": value.item(), "grads": [i.grad.tolist() for i in inputs]}


def rounded(*shape, scale=2.0):
    return torch.round(torch.randn(*shape, dtype=DOUBLE) * scale, decimals=3)


def asymmetric(z, y, gamma_pos, gamma_neg, clip):
    p = torch.sigmoid(z)
    negative = 1 - p
    if clip > 0:
        negative = (negative + clip).clamp(max=1)
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(negative.clamp(min=1e-8))
    pt = p * y + negative * (1 - y)
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    return -(loss * torch.pow(1 - pt, gamma)).mean()


def vse(scores, positive, margin, hardest):
    """Rows and columns; `positive` marks what is no negative."""
    own = scores.diag().view(-1, 1)
    by_image = (margin + scores - own).clamp(min=0).masked_fill(positive, 0)
    by_text = (margin + scores - own.t()).clamp(min=0).masked_fill(positive.t(), 0).t()
    both = [c.max(1)[0] if hardest else c.sum(1) for c in (by_image, by_text.contiguous())]
    return sum(c.sum() for c in both) / len(scores)


def supcon(scores, labels):
    """Khosla et al., eq. 2, over anchors that have a positive; `scores` are scaled already."""
    own = torch.eye(len(labels), dtype=torch.bool)
    positive = (labels[:, None] == labels[None]) & ~own
    log_p = scores - scores.masked_fill(own, float("-inf")).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -((log_p.masked_fill(~positive, 0).sum(1) / count.clamp(min=1))[count > 0]).mean()


def coral(logits, levels):
    term = F.logsigmoid(logits) * levels + (F.logsigmoid(logits) - logits) * (1 - levels)
    return -term.sum(1).mean()


def siglip(images, texts, scale, bias):
    loss = open_clip.loss.SigLipLoss()
    return loss(images, texts, scale, bias)


def clip(images, texts, scale):
    return open_clip.loss.ClipLoss()(images, texts, scale)


def units(*shape):
    return torch.round(F.normalize(torch.randn(*shape, dtype=DOUBLE), dim=-1), decimals=6)


single, weights = torch.tensor([2, 0, 4, 2, 1, 2, 3]), torch.tensor([0.5, 2.0, 1.25, 3.0, 0.75], dtype=DOUBLE)
several = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
y = several.to(DOUBLE)
mates = torch.eye(5, dtype=torch.bool)
mates[1, 3] = mates[3, 1] = mates[0, 4] = mates[4, 0] = True
classes = torch.tensor([0, 1, 0, 2, 1, 0, 3])
levels = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=DOUBLE)
targets = torch.tensor([0.3, -1.2, 2.5, 0.0, -0.4, 3.1, -2.2], dtype=DOUBLE)
goldens = {
    "cross_entropy": case(lambda z: F.cross_entropy(z, single, weight=weights), rounded(7, 5)),
    "cross_entropy_smooth": case(lambda z: F.cross_entropy(z, single, weight=weights, label_smoothing=0.1), rounded(7, 5)),
    "bce": case(lambda z: F.binary_cross_entropy_with_logits(z, y, pos_weight=weights), rounded(7, 5, scale=4.0)),
    "asymmetric": case(lambda z: asymmetric(z, y, 1.0, 4.0, 0.05), rounded(7, 5)),
    "asymmetric_plain": case(lambda z: asymmetric(z, y, 0.0, 2.0, 0.0), rounded(7, 5)),
    "siglip": case(siglip, units(5, 3), units(5, 3), torch.tensor(10.0), torch.tensor(-10.0)),
    "clip": case(clip, units(5, 3), units(5, 3), torch.tensor(7.5)),
    "triplet": case(lambda s: vse(s, mates, 0.2, True), rounded(5, 5, scale=0.5)),
    "triplet_all": case(lambda s: vse(s, mates, 0.2, False), rounded(5, 5, scale=0.5)),
    "supcon": case(lambda s: supcon(s, classes), rounded(7, 7)),
    "coral": case(lambda z: coral(z, levels), rounded(5, 4)),
    "mse": case(lambda z: F.mse_loss(z, targets), rounded(7)),
    "huber": case(lambda z: F.huber_loss(z, targets, delta=0.7), rounded(7)),
}
OUT.write_text(",\n".join(f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in goldens.items()).join(("{", "}\n")))
print(f"{OUT}: {OUT.stat().st_size} bytes")
