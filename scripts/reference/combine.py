"""Adapters that HF PEFT's add_weighted_adapter combines, in every mode: tests/data/combine.

    python scripts/reference/combine.py

Writes LoRA of different targets, scales and ranks and IA3 of different targets on the base of hf_peft.py, and for each case `<case>.safetensors`: the
combined tensors and, where values are dropped at random, HF PEFT's own masks (`mask.<tensor>.<adapter>`, u8). `cases.json` says
what was asked for. Whole adapters that HF PEFT refuses to combine are listed there too, with its words.
"""

import json
import shutil
import warnings

import peft.utils.merge_utils as merge_utils
import torch
from hf_peft import OUT, base, save, shake
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import model as lora_model
from safetensors.torch import save_file

warnings.simplefilter("ignore")
DATA = OUT.parent / "combine"

ADAPTERS = {
    "a": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "patch_embedding", "token_embedding"]),
    "b": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "fc1", "patch_embedding"]),
    "c": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1", "token_embedding"], alpha_pattern={"fc1": 2}),
    "d": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 3}),
    "i": IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    "j": IA3Config(target_modules=["v_proj", "q_proj", "fc2"], feedforward_modules=["fc2"]),
    "k": IA3Config(
        target_modules=["vision_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.1.mlp.fc2"],
        feedforward_modules=["text_model.encoder.layers.1.mlp.fc2"],
    ),
}
THREE = dict(a=0.7, b=0.3, c=0.5)
CASES = {
    "linear": dict(weights=dict(a=0.7, b=-0.4)),
    "one": dict(combination_type="svd", weights=dict(a=0.6)),
    "cat": dict(weights=dict(a=0.7, d=0.3)),
    "svd": dict(weights=dict(a=0.7, b=-0.3, d=0.5)),
    "svd_rank": dict(combination_type="svd", weights=THREE, svd_rank=3),
    "ties": dict(weights=THREE, density=0.5, majority_sign_method="total"),
    "ties_frequency": dict(combination_type="ties", weights=THREE, density=0.6, majority_sign_method="frequency"),
    "magnitude_prune": dict(weights=THREE, density=0.3),
    "dare_linear_whole": dict(combination_type="dare_linear", weights=THREE, density=1.0),
    "dare_ties_whole": dict(combination_type="dare_ties", weights=THREE, density=1.0),
    "dare_linear": dict(weights=THREE, density=0.5),
    "dare_ties": dict(weights=THREE, density=0.7, majority_sign_method="frequency"),
    "ties_svd": dict(weights=THREE, density=0.5, svd_rank=5),
    "magnitude_prune_svd": dict(weights=THREE, density=0.4),
    "dare_linear_svd": dict(weights=THREE, density=0.5),
    "dare_ties_svd": dict(weights=dict(a=1.0, d=2.0), density=0.6),
    "ia3": dict(combination_type="linear", weights=dict(i=0.7, j=0.5)),
    "ia3_paths": dict(combination_type="linear", weights=dict(i=0.6, k=-0.4)),
    "ia3_one": dict(combination_type="linear", weights=dict(j=0.6)),
}
REFUSED = {
    "ranks": dict(combination_type="linear", weights=dict(a=1.0, d=1.0)),
    "ties_ranks": dict(combination_type="ties", weights=dict(a=1.0, d=1.0), density=0.5),
}


def adapters():
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(300 + seed)
        model = get_peft_model(base(), config).eval()
        shake(model)
        save(model, DATA / name)


def loaded(names):
    first, *others = names
    model = PeftModel.from_pretrained(base(), DATA / first, adapter_name=first).eval()
    for name in others:
        model.load_adapter(DATA / name, adapter_name=name)
    return model


def recorded(model, names, run):
    """Runs and gives HF PEFT's random masks by the tensor and the adapter they were drawn for."""
    masks, where = {}, {}
    paths = {id(m): n.removeprefix("base_model.model.") for n, m in model.named_modules()}
    drop, plain, svd = merge_utils.random_pruning, "_generalized_task_arithmetic_weighted_adapter", "_svd_generalized_task_arithmetic_weighted_adapter"
    originals = {name: getattr(lora_model.LoraModel, name) for name in (plain, svd)}

    def order(target, whole):
        """The tensors in the order in which HF PEFT prunes them."""
        table = bool(target.lora_embedding_A)
        held = target.lora_embedding_A if table else target.lora_A
        mine = [i for i, n in enumerate(names) if n in held]
        path = f"base_model.model.{paths[id(target)]}"
        parts = ["weight"] if whole else [f"lora_embedding_{p}" if table else f"lora_{p}.weight" for p in "AB"]
        return iter([f"mask.{path}.{part}.{i}" for part in parts for i in mine])

    def watched(name):
        def call(self, *args, **kwargs):
            target = next(a for a in args if isinstance(a, lora_model.LoraLayer))
            where["next"] = order(target, name == svd)
            return originals[name](self, *args, **kwargs)
        return call

    def dropping(tensor, density, rescale):
        state = torch.get_rng_state()
        mask = torch.bernoulli(torch.full_like(input=tensor, fill_value=density))
        torch.set_rng_state(state)
        masks[next(where["next"])] = mask.to(torch.uint8).contiguous()
        return drop(tensor, density, rescale)

    merge_utils.random_pruning = dropping
    for name in originals:
        setattr(lora_model.LoraModel, name, watched(name))
    try:
        run()
    finally:
        merge_utils.random_pruning = drop
        for name, function in originals.items():
            setattr(lora_model.LoraModel, name, function)
    return masks


def combine(name, case):
    case = dict(case)
    weights = case.pop("weights")
    names = list(weights)
    model = loaded(names)
    case.setdefault("combination_type", name)
    torch.manual_seed(7)
    ia3 = isinstance(ADAPTERS[names[0]], IA3Config)
    # It knows one way, and names none.
    options = {} if ia3 else case
    run = lambda: model.base_model.add_weighted_adapter(names, list(weights.values()), "combined", **options)
    masks = recorded(model, names, run)
    tensors = get_peft_model_state_dict(model, adapter_name="combined", save_embedding_layers=False)
    save_file({n: t.contiguous() for n, t in (tensors | masks).items()}, DATA / f"{name}.safetensors")
    return case | {"weights": weights} | ({} if ia3 else {"r": model.peft_config["combined"].r})


def refused(case):
    case = dict(case)
    weights = case.pop("weights")
    try:
        loaded(list(weights)).base_model.add_weighted_adapter(list(weights), list(weights.values()), "combined", **case)
    except ValueError as error:
        return case | {"weights": weights, "error": str(error)}
    raise AssertionError(f"{case} was not refused")


def main():
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    adapters()
    cases = {name: combine(name, case) for name, case in CASES.items()}
    document = {"cases": cases, "refused": {name: refused(case) for name, case in REFUSED.items()}}
    (DATA / "cases.json").write_text(json.dumps(document, indent=1) + "\n")
    print("wrote", ", ".join(cases))


if __name__ == "__main__":
    main()
