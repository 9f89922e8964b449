"""Writes what `peft` embeds of open_clip: its architectures (for `--arch`) and CLIP's merges (for checkpoints without a tokeniser).

    python scripts/open_clip_data.py        # needs open_clip_torch

Architectures that are no plain CLIP are kept as well, so that they are refused by what they are. The merges are the part of
`bpe_simple_vocab_16e6.txt.gz` (OpenAI CLIP, MIT) that CLIP reads: lines 2 to 48,895.
"""

import gzip
import json
from pathlib import Path

import open_clip

OUT = Path(__file__).parent.parent / "src/clip/foreign"
# What decides whether an architecture is a plain CLIP, and what its shape is.
REFUSED = ["embed_dim", "custom_text", "init_logit_bias", "multimodal_cfg"]


def reduced(config):
    """A refused architecture keeps only what it is refused for."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    plain = not ("timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in config)
    if plain and not isinstance(vision["layers"], list):
        return config
    kept = {k: config[k] for k in REFUSED if k in config and k != "multimodal_cfg"}
    if "multimodal_cfg" in config:
        kept["multimodal_cfg"] = {}
    kept["vision_cfg"] = {k: vision[k] for k in ("timm_model_name", "layers") if k in vision}
    kept["text_cfg"] = {k: text[k] for k in ("hf_model_name",) if k in text}
    return kept


archs = {name: reduced(open_clip.get_model_config(name)) for name in open_clip.list_models()}
lines = [f'  "{name}": {json.dumps(config, separators=(", ", ": "))}' for name, config in archs.items()]
(OUT / "archs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
merges = gzip.decompress(source.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
(OUT / "merges.txt.gz").write_bytes(gzip.compress(("\n".join(merges) + "\n").encode(), 9, mtime=0))
