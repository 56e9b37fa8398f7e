"""LoRA (arXiv 2106.09685) on the decoder's linear layers, in PEFT's file format, both ways.

`attach` puts a `LoRALinear` in the place of each adapted layer, `detach` takes them out again; the base weights are
never touched, so that base model and adapter can be sampled from one loaded set of weights, except by `merge`, which
is for saving. As a program it merges:

    python -m model.lora --model M --adapter DIR --out FOLDER      a checkpoint that transformers and vLLM load
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from base.errors import UserError, run_script
from base.files import alone, misfit, read_json, whole, write_json
from base.hub import model_folder
from base.options import DTYPES, Parser, nonempty, number
from model import weights
from model.config import PROJECTIONS
from model.decoder import Decoder, linear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What changes the mathematics of a PEFT adapter, and the values under which it is the one computed here
NEUTRAL = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False, None),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
    "alora_invocation_tokens": (None,), "use_qalora": (False, None), "arrow_config": (None,),
    # others start from changed base weights, which the adapter file does not hold
    "init_lora_weights": (True, False, None, "gaussian"),
}


@dataclass(frozen=True)
class LoRAConfig:
    """Rank and alpha (the product is scaled by alpha / rank), dropout on the adapter's input, names of the layers."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS


class LoRALinear(nn.Module):
    """base(x) + scale · B(A(dropout(x))), with the base frozen.

    A and B are float32, whatever the base is, for the optimiser's sake; the products run in x's dtype.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **place))

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) to (T, out)."""
        if torch.is_grad_enabled() and not (self.dropout and self.training):
            recipe, ingredients = getattr(x, "recipe", (None, (x,)))
            return _AdaptedProduct.apply(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale,
                                         recipe, *ingredients)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (T, r)
        # the scale goes where the tensor is smallest
        return self.base(x) + F.linear(low * self.scale, self.lora_B.to(x.dtype))  # (T, out)

    def delta(self) -> Tensor:
        """(out, in) float32: what the adapter adds to the base weight."""
        return self.scale * (self.lora_B @ self.lora_A)


class _AdaptedProduct(torch.autograd.Function):
    """`LoRALinear.forward` and its gradients in the fewest passes: the products with the rank add their result to the
    large one's, where autograd's own way through the same formula adds whole (T, out) and (T, in) tensors.

    A's gradient takes x: kept as it is, or made again where that is cheap (`decoder.recomputable`).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None,
                lora_A: Tensor, lora_B: Tensor, scale: float,
                recipe: Callable[..., Tensor] | None, *ingredients: Tensor) -> Tensor:
        low = F.linear(x, lora_A.to(x.dtype)) * scale  # (T, r)
        out = linear(x, weight, bias)  # (T, out)
        ctx.save_for_backward(low, weight, lora_A, lora_B, *ingredients)
        ctx.scale, ctx.recipe = scale, recipe
        return out.addmm_(low, lora_B.T.to(x.dtype))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, weight, lora_A, lora_B, *ingredients = ctx.saved_tensors
        x = ctx.recipe(*ingredients) if ctx.recipe else ingredients[0]  # (T, in)
        grad_low = (grad @ lora_B.to(x.dtype)) * ctx.scale  # (T, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.T).addmm_(grad_low, lora_A.to(x.dtype))  # (T, in)
        grad_A, grad_B = grad_low.T @ x, grad.T @ low  # (r, in), (out, r)
        return (grad_x, None, None, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None, None,
                *(None for _ in ingredients))


def adapted(model: Decoder) -> dict[str, LoRALinear]:
    """The adapted layers by name (layers.0.self_attn.q_proj), in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def attach(model: Decoder, config: LoRAConfig, seed: int = 0) -> None:
    """Put a new adapter on every layer whose name ends in one of config.targets, and freeze all else.

    A is uniform as PEFT initialises it (kaiming, a = √5), from `seed`; B is zero, so that nothing changes yet.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _linear_layers(model)
    layers = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in config.targets}
    most = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if config.rank > most:
        raise UserError(f"rank {config.rank} is larger than the smallest adapted layer; --rank {most} is the most")
    for name, layer in layers.items():
        adapter = LoRALinear(layer, config.rank, config.alpha / config.rank, config.dropout)
        bound = 1 / math.sqrt(layer.in_features)
        start = torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator)
        adapter.lora_A.data.copy_(start)  # drawn on the CPU: the same on every device
        _place(model, name, adapter)
    model.requires_grad_(False)
    for adapter in adapted(model).values():
        adapter.lora_A.requires_grad_(True)
        adapter.lora_B.requires_grad_(True)


def detach(model: Decoder) -> None:
    """Take the adapter off: the base model, as it was."""
    for name, adapter in adapted(model).items():
        _place(model, name, adapter.base)


@contextmanager
def disabled(model: Decoder) -> Iterator[None]:
    """The base model inside the block, and the same adapter again behind it."""
    adapters = adapted(model)
    detach(model)
    try:
        yield
    finally:
        for name, adapter in adapters.items():
            _place(model, name, adapter)


def merge(model: Decoder) -> None:
    """Add the adapter to the base weights, in float32 before rounding to their dtype, and take it off."""
    for adapter in adapted(model).values():
        weight = adapter.base.weight
        weight.data = (weight.float() + adapter.delta()).to(weight.dtype)
    detach(model)


def scramble(model: Decoder, seed: int) -> None:
    """Replace the adapter by Gaussian noise on the base weights, of the same Frobenius norm matrix by matrix.

    The control for "the fine-tuning amounts to noise on the weights". It overwrites the base weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapted(model).values():
        weight = adapter.base.weight
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        noise *= adapter.delta().norm() / noise.norm()
        weight.data = (weight.float() + noise).to(weight.dtype)
    detach(model)


def save(model: Decoder, config: LoRAConfig, folder: Path, base: str) -> None:
    """Write the attached adapter in PEFT's format; `base` is the model's name or folder. The tensors come last."""
    names = adapted(model)
    kinds = {name.rpartition(".")[2] for name in names}
    everywhere = all(isinstance(module, LoRALinear) for name, module in model.named_modules()
                     if name.rpartition(".")[2] in kinds)
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        # PEFT adapts every layer that ends in one of these; an adapter of some layers only has to name them in full
        "target_modules": sorted(kinds if everywhere else (f"model.{name}" for name in names)), "bias": "none",
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False,
    })
    tensors = {}
    for name, adapter in names.items():
        for part in ("lora_A", "lora_B"):
            tensors[f"base_model.model.model.{name}.{part}.weight"] = getattr(adapter, part).detach().cpu()
    with whole(folder / TENSORS) as part_file:
        save_file(tensors, part_file, metadata={"format": "pt"})


def load(model: Decoder, name: str, scale: float = 1.0) -> LoRAConfig:
    """Attach a saved adapter (a folder or hub name in PEFT's format), its effect multiplied by `scale`.

    A UserError says what does not fit: settings that this file does not compute, layers the model lacks, shapes.
    """
    assert not adapted(model), "detach the adapter that is on the model first"
    folder = model_folder(name)
    if not (folder / CONFIG).exists() or not (folder / TENSORS).exists():
        raise UserError(f"{folder} is not an adapter: it needs {CONFIG} and {TENSORS}")
    config, rslora = read_adapter_config(folder / CONFIG)
    layers = _linear_layers(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.read_tensors(folder / TENSORS).items():
        ours = key.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
        layer, _, part = ours.rpartition(".")
        if layer not in layers or part not in ("lora_A", "lora_B"):
            raise UserError(f"{folder}: {key} belongs to no layer of this model; the adapter is another model's")
        if tensor.dtype not in weights.FLOATS or not tensor.isfinite().all():
            raise UserError(f"{folder}: {key} is {tensor.dtype} or not finite; an adapter is finite floats")
        pairs.setdefault(layer, {})[part] = tensor
    for layer, pair in pairs.items():
        base = layers[layer]
        shapes = {"lora_A": (config.rank, base.in_features), "lora_B": (base.out_features, config.rank)}
        for part, shape in shapes.items():
            if part not in pair or pair[part].shape != shape:
                found = list(pair[part].shape) if part in pair else "missing"
                raise UserError(f"{folder}: {part} of {layer} is {found}, and this model with rank {config.rank} needs "
                                f"{list(shape)}; the adapter is another model's")
    if not pairs:
        raise UserError(f"{folder}: {TENSORS} holds no tensors")
    factor = scale * config.alpha / (math.sqrt(config.rank) if rslora else config.rank)
    model.requires_grad_(False)
    for layer, pair in pairs.items():
        adapter = LoRALinear(layers[layer], config.rank, factor, config.dropout)
        adapter.lora_A.data.copy_(pair["lora_A"])
        adapter.lora_B.data.copy_(pair["lora_B"])
        _place(model, layer, adapter)
    model.eval()
    # As it is attached now: layers by name, where the file may have a pattern; alpha with `scale` and rsLoRA in it
    targets = tuple(sorted({layer.rpartition(".")[2] for layer in pairs}))
    return replace(config, alpha=factor * config.rank, targets=targets)


def read_adapter_config(path: Path) -> tuple[LoRAConfig, bool]:
    """The LoRA settings of PEFT's adapter_config.json, and whether it scales by alpha / √rank (rsLoRA)."""
    raw = read_json(path)
    for name, neutral in NEUTRAL.items():
        if raw.get(name, neutral[0]) not in neutral:
            raise UserError(f"{path}: {name} is {raw[name]!r}; supported is {neutral[0]!r}")
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout") or 0.0
    fault = misfit(raw, {"r": range(1, 2**31), "lora_alpha": float, "lora_dropout": (float, None)})
    if fault or not 0 <= dropout < 1:
        raise UserError(f"{path}: r must be a positive whole number, lora_alpha finite and lora_dropout from 0 to 1")
    return LoRAConfig(rank, alpha, dropout), bool(raw.get("use_rslora"))


def _linear_layers(model: Decoder) -> dict[str, nn.Linear]:
    """The block projections by name; the head stays out, for the loss reads its weight directly."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS}


def _place(model: Decoder, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def main(argv: list[str] | None = None) -> None:
    """Merge an adapter into a model and save it."""
    parser = Parser(__doc__)
    parser.add_argument("--model", type=nonempty, required=True, help="hub name or folder of the base model")
    parser.add_argument("--adapter", type=nonempty, required=True, help="folder or hub name of the adapter")
    parser.add_argument("--adapter-scale", type=number(float), default=1.0, help="multiplies the adapter's effect")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the saved weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be empty or new")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} holds other files; choose another --out")
    with alone(args.out.with_name(f"{args.out.name}.lock")):
        source = model_folder(args.model)
        model = weights.load(source, torch.device("cpu"), torch.float32)
        load(model, args.adapter, args.adapter_scale)
        merge(model)
        part = args.out.with_name(f".{args.out.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left
        weights.save(model, source, part, getattr(torch, args.dtype))
        part.replace(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main, "other files")
