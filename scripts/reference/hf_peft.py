"""Adapters between HF PEFT and this project, both ways, over methods and configurations.

    python scripts/reference/hf_peft.py write [CASE…]    # tests/data/peft/<case>: adapters saved by HF PEFT, with features
    python scripts/reference/hf_peft.py train            # tests/data/peft/train/<case>: a start, 20 losses, features behind them;
                                                         # methods that HF PEFT lacks as small torch counterparts
    python scripts/reference/hf_peft.py read BASE DIR…   # loads adapters of ours with HF PEFT: no key may be missing or left over

`write` makes a small random CLIPModel in tests/data/peft/base and adapters on it, each with random non-zero weights. `read` also
writes the features that HF PEFT computes beside each adapter. The environment is that of scripts/goldens/requirements.txt.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

warnings.simplefilter("ignore")
OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/peft"
QKV = ["q_proj", "k_proj", "v_proj"]
NORMS = ["layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"]
TABLES = ["patch_embedding", "token_embedding", "position_embedding"]

CASES = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=QKV),
    "patterns": LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"],
        # The order matters: the first key that matches wins.
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "fc1": 6},
        alpha_pattern={"vision_model.encoder.layers.0.mlp.fc1": 3, "fc1": 5, "v_proj": 2.5},
    ),
    "regex_rslora": LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=r".*text_model.*\.(out_proj|fc2)"),
    "one_layer": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "out_proj"], layers_to_transform=[1]),
    "saved_modules": LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"], modules_to_save=["visual_projection", "post_layernorm"]),
    "projections": LoraConfig(
        r=2, lora_alpha=4, target_modules=["visual_projection", "text_projection", "k_proj"],
        exclude_modules=["vision_model.encoder.layers.0.self_attn.k_proj"],
    ),
    "bias_all": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc2"], bias="all"),
    "bias_only": LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "fc1"], bias="lora_only"),
    "tables": LoraConfig(r=3, lora_alpha=6, target_modules=[*TABLES, "q_proj"], rank_pattern={"token_embedding": 2}),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=QKV, use_dora=True, lora_dropout=0.1),
    "dora_tables": LoraConfig(r=3, lora_alpha=6, target_modules=[*TABLES, "fc2"], use_dora=True),
    "dora_rslora": LoraConfig(
        r=2, lora_alpha=4, target_modules=["out_proj", "visual_projection"], use_dora=True, use_rslora=True, bias="lora_only",
        modules_to_save=["text_projection"],
    ),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "ia3_regex": IA3Config(
        target_modules=r".*\.(q_proj|out_proj|fc1)", feedforward_modules=r".*vision.*out_proj", modules_to_save=["text_projection"],
    ),
    "ln_tuning": LNTuningConfig(target_modules=NORMS),
    "ln_tuning_regex": LNTuningConfig(target_modules=r".*vision_model.*layer_norm[12]", modules_to_save=["visual_projection"]),
    "vera": VeraConfig(r=6, target_modules=[*QKV, "fc1"], vera_dropout=0.1),
    "vera_unsaved": VeraConfig(r=5, target_modules=["q_proj", "fc2"], save_projection=False, projection_prng_key=3, bias="vera_only"),
    "loha": LoHaConfig(r=3, alpha=6, target_modules=QKV, rank_pattern={"q_proj": 2}, rank_dropout=0.1),
    "loha_saved": LoHaConfig(r=2, alpha=2, target_modules=["fc1", "visual_projection"], modules_to_save=["text_projection"]),
    "lokr": LoKrConfig(r=1, alpha=2, target_modules=[*QKV, "fc2"]),
    "lokr_both": LoKrConfig(r=1, alpha=3, target_modules=["fc1", "out_proj"], decompose_both=True, decompose_factor=4, module_dropout=0.1),
    "lokr_whole": LoKrConfig(r=8, alpha=8, target_modules=["q_proj", "visual_projection"], alpha_pattern={"q_proj": 4}),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=QKV, total_step=10, lora_dropout=0.1),
    "adalora_ranks": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=["v_proj", "fc1"], total_step=10, bias="lora_only"),
    "pissa": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], init_lora_weights="pissa"),
    "olora": LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "fc2"], init_lora_weights="olora", use_rslora=True),
    # HF PEFT writes the norm's bias three times.
    "bias_all_norm": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], bias="all", modules_to_save=["layer_norm1"]),
    "saved_by_end": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["projection"]),
    "layers_and_projection": LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "visual_projection"], layers_to_transform=[1], layers_pattern="encoder.layers",
    ),
    "vision_alone": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1", "visual_projection"]),
    "text_alone": LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj", "fc2"], layers_to_transform=[0]),
    "names_of_0_4": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], bias="lora_only"),
    "named_default": LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["text_projection"]),
    # All biases, and all norms, of the one encoder that there is.
    "text_biases": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], bias="all"),
    "text_bare": LoraConfig(
        r=2, lora_alpha=4, target_modules=r"encoder\.layers\.\d+\.self_attn\.(q|v)_proj", bias="all",
        rank_pattern={"encoder.layers.0.self_attn.q_proj": 1},
    ),
    "vision_bare": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], modules_to_save=["layer_norm1"]),
}

# Adapters of one encoder alone; `auto_mapping` holds the class.
ALONE = {
    "vision_alone": CLIPVisionModelWithProjection,
    "text_alone": CLIPTextModelWithProjection,
    "text_biases": CLIPTextModelWithProjection,
    # Since transformers 5 these two have no `text_model` and `vision_model` in their names.
    "text_bare": CLIPTextModel,
    "vision_bare": CLIPVisionModel,
}


def as_0_4(name):
    """Until 0.4 the bias of a layer with an update stood beside the update."""
    return name.replace(".base_layer.bias", ".bias")


def as_default(name):
    """As other tools save a PeftModel's own state."""
    if ".lora_" in name:
        return name.replace(".weight", ".default.weight")
    return name.replace("text_projection.", "text_projection.modules_to_save.default.")


RENAMED = {"names_of_0_4": as_0_4, "named_default": as_default}

STEPS, RATE = 20, 5e-3
ADALORA = dict(init_r=4, target_r=2, tinit=3, tfinal=4, deltaT=3, lora_alpha=8, orth_reg_weight=0.1, total_step=STEPS)
TRAINED = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=QKV),
    "lora_plus": LoraConfig(r=4, lora_alpha=8, target_modules=QKV),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=[*QKV, "fc1"], use_dora=True),
    "pissa": LoraConfig(r=3, lora_alpha=6, target_modules=QKV, init_lora_weights="pissa"),
    "olora": LoraConfig(r=3, lora_alpha=6, target_modules=QKV, init_lora_weights="olora"),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "ln_tuning": LNTuningConfig(target_modules=NORMS),
    "vera": VeraConfig(r=6, target_modules=QKV),
    "loha": LoHaConfig(r=3, alpha=6, target_modules=QKV),
    "lokr": LoKrConfig(r=1, alpha=2, target_modules=QKV),
    "adalora": AdaLoraConfig(target_modules=QKV, **ADALORA),
}


class Spectrum(torch.nn.Module):
    """U diag(s) Vᵀ with s trained (CLIP-SVD)."""

    def __init__(self, weight):
        super().__init__()
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        self.register_buffer("u", u.float())
        self.register_buffer("v", v.float())
        self.s = torch.nn.Parameter(s.float())

    def forward(self, _):
        return self.u @ torch.diag(self.s) @ self.v


def svd(clip):
    clip.requires_grad_(False)
    for name, module in list(clip.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Spectrum(module.weight.data))
            module.parametrizations.weight.original.requires_grad_(False)


def bitfit(clip):
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(name.endswith(".bias"))


def compacter(clip, n=4, reduction=2):
    """h + U relu(D h) behind each MLP; D and U are sums of Kronecker products with one shared rule. Returns the tensors."""
    clip.requires_grad_(False)
    tensors = {"base_model.model.phm_rule": torch.nn.Parameter(torch.randn(n, n, n) / n)}
    rule = tensors["base_model.model.phm_rule"]

    def layer(name, i, o):
        parts = {"phm_left": (n, i // n, 1), "phm_right": (n, 1, o // n), "bias": (o,)}
        own = {part: torch.nn.Parameter(0.3 * torch.randn(shape)) for part, shape in parts.items()}
        tensors.update({f"{name}.{part}": value for part, value in own.items()})
        return lambda x: x @ sum(torch.kron(rule[k], own["phm_left"][k] @ own["phm_right"][k]) for k in range(n)) + own["bias"]

    def behind(name, dim):
        down, up = layer(f"{name}.adapter_down", dim, dim // reduction), layer(f"{name}.adapter_up", dim // reduction, dim)
        return lambda _module, _inputs, y: y + up(torch.relu(down(y)))

    for name, module in list(clip.named_modules()):
        if name.endswith(".mlp"):
            module.register_forward_hook(behind(f"base_model.model.{name}", module.fc1.in_features))
    config = {"placement": "pfeiffer", "reduction": reduction, "activation": "relu", "hypercomplex": {"n": n}}
    out = OUT / "train" / "compacter"
    out.mkdir(parents=True)
    save_file({k: v.detach().clone() for k, v in tensors.items()}, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "BOTTLENECK", "config": config}, indent=2) + "\n")
    return list(tensors.values())


OTHERS = {"svd": svd, "bitfit": bitfit, "compacter": compacter}


def inputs(config):
    generator = torch.Generator().manual_seed(11)
    size = config.vision_config.image_size
    return (
        torch.randn(3, 3, size, size, generator=generator),
        torch.tensor([[57, 5, 9, 31, 58], [57, 8, 58, 58, 58], [57, 7, 7, 12, 58]]),
    )


def features(model, config, rest=None):
    """What `model` lacks is taken from `rest`."""
    pixels, ids = inputs(config)
    vision, text = [model if hasattr(model, part) else rest for part in ("visual_projection", "text_projection")]
    vision_model = model if isinstance(model, CLIPVisionModel) else vision.vision_model
    text_model = model if isinstance(model, CLIPTextModel) else text.text_model
    with torch.no_grad():
        images = vision.visual_projection(vision_model(pixels).pooler_output)
        texts = text.text_projection(text_model(ids).pooler_output)
    return {"image_features": images.contiguous(), "text_features": texts.contiguous()}


def make_base():
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=60,
                         max_position_embeddings=8, bos_token_id=57, eos_token_id=58, pad_token_id=0),
        vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8),
        projection_dim=12,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(OUT / "base")
    pixels, ids = inputs(config)
    save_file({"pixels": pixels, "ids": ids}, OUT / "inputs.safetensors")


def base(name=None):
    whole = CLIPModel.from_pretrained(OUT / "base").eval()
    if name not in ALONE:
        return whole
    part = "vision" if name.startswith("vision") else "text"
    config = getattr(whole.config, f"{part}_config")
    config.projection_dim = whole.config.projection_dim
    alone = ALONE[name](config).eval()
    # All of the encoder's tensors come from the whole model.
    given = whole.state_dict()
    if name.endswith("_bare"):
        given = {k.removeprefix(f"{part}_model."): v for k, v in given.items() if k.startswith(f"{part}_model.")}
    alone.load_state_dict({k: v for k, v in given.items() if k in alone.state_dict()})
    return alone


def shake(model, size=0.1):
    """Random non-zero values; AdaLoRA's ranks: some singular values stay zero and are dropped by a rank pattern."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(size * torch.randn_like(parameter))


def save(model, directory, **options):
    """An adapter directory without what only its maker's machine knows."""
    # Safetensors of bare tables would be added; their updates are what is saved here.
    model.save_pretrained(directory, save_embedding_layers=False, **options)
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "base"
    # Sets are written in any order; sorted, the files are the same each time.
    config = {k: sorted(v) if isinstance(v, list) and all(isinstance(x, str) for x in v) else v for k, v in config.items()}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(name, config, directory):
    model = get_peft_model(base(name), config).eval()
    if name in ("pissa", "olora"):
        with tempfile.TemporaryDirectory() as start:
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(start)
            shake(model)
            model.peft_config["default"].init_lora_weights = config.init_lora_weights = name
            save(model, directory, path_initial_model_for_weight_conversion=start)
        return
    shake(model)
    if name == "adalora_ranks":
        kept = {}
        for index, (n, parameter) in enumerate((n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n):
            kept[n] = [(index + k) % 3 != 0 and index != 2 for k in range(4)]
            parameter.data[~torch.tensor(kept[n])] = 0.0
        model.peft_config["default"].rank_pattern = kept
    save(model, directory)


def write(only):
    if not (OUT / "base").exists():
        make_base()
    for seed, (name, config) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        torch.manual_seed(100 + seed)
        shutil.rmtree(OUT / name, ignore_errors=True)
        make(name, config, OUT / name)
        # What HF PEFT makes of its own files counts: it sorts the patterns' keys when it saves.
        model = PeftModel.from_pretrained(base(name), OUT / name).eval()
        save_file(features(model.base_model.model, base().config, base()), OUT / name / "golden.safetensors")
        if name in RENAMED:
            file = OUT / name / "adapter_model.safetensors"
            save_file({RENAMED[name](k): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    print("wrote", ", ".join(CASES))


def optimizer_for(name, model, extra):
    if name == "lora_plus":
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, weight_decay=0.0)
    return torch.optim.AdamW([p for p in [*model.parameters(), *extra] if p.requires_grad], lr=RATE, weight_decay=0.0)


def run(name, model, clip, extra=()):
    """CLIP's own loss over the same batch; HF PEFT adds AdaLoRA's term to it. The losses; then features."""
    pixels, ids = inputs(clip.config)
    optimizer = optimizer_for(name, model, extra)
    losses = []
    for step in range(STEPS):
        # PeftModel's own forward leaves AdaLoRA's term out.
        loss = getattr(model, "base_model", model)(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        loss.backward()
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(loss.item())
    (OUT / "train" / name).mkdir(parents=True, exist_ok=True)
    model.eval()
    save_file(features(clip, clip.config), OUT / "train" / name / "golden.safetensors")
    print(name, losses[0], losses[-1])
    return losses


def train():
    shutil.rmtree(OUT / "train", ignore_errors=True)
    losses = {}
    for seed, (name, config) in enumerate(TRAINED.items()):
        torch.manual_seed(200 + seed)
        model = get_peft_model(base(), config).train()
        if name not in ("pissa", "olora"):
            # LoHa's and LoKr's zero halves and LoRA's B, so that gradients reach everything from the first step.
            shake(model, 0.02)
            save(model, OUT / "train" / name)
        losses[name] = run(name, model, model.base_model.model)
    for seed, (name, attach) in enumerate(OTHERS.items()):
        torch.manual_seed(300 + seed)
        clip = base().train()
        losses[name] = run(name, clip, clip, attach(clip) or ())
    (OUT / "train" / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")


def read(where, directories):
    """Loads with HF PEFT, refuses any missing or unexpected key, writes features for comparison."""
    for directory in map(pathlib.Path, directories):
        model = CLIPModel.from_pretrained(where).eval().float()
        config = model.config
        saved = load_file(directory / "adapter_model.safetensors")
        adapted = PeftModel.from_pretrained(model, directory).eval()
        theirs = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing, unexpected = sorted(set(theirs) - set(saved)), sorted(set(saved) - set(theirs))
        assert not missing and not unexpected, f"{directory}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        for name, tensor in theirs.items():
            assert torch.equal(tensor, saved[name]), f"{directory}: {name} was not loaded"
        save_file(features(adapted.base_model.model, config), directory / "golden.safetensors")
        print(directory, len(theirs), "tensors, all loaded")


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2:])
    elif sys.argv[1:2] == ["train"]:
        train()
    elif sys.argv[1:2] == ["read"]:
        read(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(__doc__)
