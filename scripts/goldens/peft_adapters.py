"""Adapters between HF PEFT and this project, both ways.

    python scripts/goldens/peft_adapters.py write            # tests/data/peft/<case>: adapters saved by HF PEFT, with features
    python scripts/goldens/peft_adapters.py read BASE DIR…   # loads adapters of ours with HF PEFT: no key may be missing or left over

`write` makes a small random CLIPModel in tests/data/peft/base and adapters on it that use rank and
alpha patterns, regex targets, rsLoRA, single layers and modules_to_save.
"""

import json
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/peft"

CASES = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]),
    "patterns": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"],
        # The order matters: the first key that matches wins.
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 3, "fc1": 6},
        alpha_pattern={"vision_model.encoder.layers.0.mlp.fc1": 3, "fc1": 5, "v_proj": 2.5},
    ),
    "regex_rslora": dict(r=3, lora_alpha=6, use_rslora=True, target_modules=r".*text_model.*\.(out_proj|fc2)"),
    "one_layer": dict(r=2, lora_alpha=4, target_modules=["q_proj", "out_proj"], layers_to_transform=[1]),
    "saved_modules": dict(r=2, lora_alpha=2, target_modules=["v_proj"], modules_to_save=["visual_projection", "post_layernorm"]),
    "projections": dict(r=2, lora_alpha=4, target_modules=["visual_projection", "text_projection", "k_proj"], exclude_modules=["vision_model.encoder.layers.0.self_attn.k_proj"]),
}


def inputs(config):
    generator = torch.Generator().manual_seed(11)
    size = config.vision_config.image_size
    return (
        torch.randn(3, 3, size, size, generator=generator),
        torch.tensor([[57, 5, 9, 31, 58], [57, 8, 58, 58, 58], [57, 7, 7, 12, 58]]),
    )


def features(model, config):
    pixels, ids = inputs(config)
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels).pooler_output)
        texts = model.text_projection(model.text_model(ids).pooler_output)
    return {"pixels": pixels, "ids": ids, "image_features": images.contiguous(), "text_features": texts.contiguous()}


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


def write():
    shutil.rmtree(OUT, ignore_errors=True)
    make_base()
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(100 + seed)
        base = CLIPModel.from_pretrained(OUT / "base").eval()
        model = get_peft_model(base, LoraConfig(**options)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(OUT / name)
        (OUT / name / "README.md").unlink(missing_ok=True)
        # What HF PEFT makes of its own files counts: it sorts the patterns' keys when it saves.
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(OUT / "base"), OUT / name).eval()
        save_file(features(model.base_model.model, base.config), OUT / name / "golden.safetensors")
        config = json.loads((OUT / name / "adapter_config.json").read_text())
        # An absolute path of the machine that made it is nobody's business.
        config["base_model_name_or_path"] = "base"
        (OUT / name / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    print("wrote", ", ".join(CASES))


def read(base, directories):
    """Loads with HF PEFT, refuses any missing or unexpected key, prints features for comparison."""
    for directory in map(pathlib.Path, directories):
        model = CLIPModel.from_pretrained(base).eval().float()
        config = model.config
        saved = load_file(directory / "adapter_model.safetensors")
        adapted = PeftModel.from_pretrained(model, directory).eval()
        from peft import get_peft_model_state_dict

        ours, theirs = set(saved), set(get_peft_model_state_dict(adapted))
        assert ours == theirs, f"{directory}: missing {sorted(theirs - ours)[:3]}, unexpected {sorted(ours - theirs)[:3]}"
        for name, tensor in get_peft_model_state_dict(adapted).items():
            assert torch.equal(tensor, saved[name]), f"{directory}: {name} was not loaded"
        save_file(features(adapted.base_model.model, config), directory / "golden.safetensors")
        print(directory, len(ours), "tensors, all loaded")


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write()
    elif sys.argv[1:2] == ["read"]:
        read(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(__doc__)
