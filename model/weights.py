"""Checkpoints in Hugging Face layout: loading into the decoder, strictly, and saving for others to load."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from base.errors import UserError
from base.files import read_json, whole, write_json
from model.config import read_config
from model.decoder import Decoder

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json", "chat_template.jinja")


def load(folder: Path, device: torch.device, dtype: torch.dtype, narrow: bool = False) -> Decoder:
    """The decoder of a model folder, in evaluation mode, its weights on `device` as `dtype`.

    Every tensor of the file is used once and every parameter is filled; a UserError names those for which that
    doesn't hold. Tensors are memory-mapped: where dtype and device agree, loading costs the page faults alone.
    `narrow` keeps matrices, but for the head's, as the file has them where `dtype` is wider (bfloat16 for float32, as a
    rule), and each product widens its own: the same results from half of the memory. For what is not trained.
    """
    config = read_config(folder)
    with torch.device("meta"):  # no memory, no initialisation: every parameter is replaced below
        model = Decoder(config)
    wanted = model.state_dict()
    tensors: dict[str, Tensor] = {}
    unused = []
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            ours = name.removeprefix("model.")
            if name.endswith("rotary_emb.inv_freq"):
                continue  # old Llama checkpoints store what follows from the config
            if ours not in wanted or ours in tensors:
                unused.append(name)
                continue
            if tensor.shape != wanted[ours].shape:
                raise UserError(f"{path}: {name} has shape {list(tensor.shape)}, and by config.json it should have "
                                f"{list(wanted[ours].shape)}")
            if tensor.dtype not in FLOATS:
                raise UserError(f"{path}: {name} is {tensor.dtype}; supported are float32, bfloat16 and float16")
            tensors[ours] = tensor
    head = None
    if config.tied:  # one matrix under two names: files hold it once, or twice the same
        del wanted["lm_head.weight"]
        head = tensors.pop("lm_head.weight", None)
    missing = [name for name in wanted if name not in tensors]
    if missing or unused:
        raise UserError(f"{folder}: the weights don't fit config.json; {_listed('missing', missing)}"
                        f"{_listed('in the file and not used', unused)}")
    if head is not None and not torch.equal(head.float(), tensors["embed_tokens.weight"].float()):
        raise UserError(f"{folder}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding")
    head_name = "embed_tokens.weight" if config.tied else "lm_head.weight"
    for name, tensor in tensors.items():
        kept = narrow and tensor.ndim == 2 and name != head_name and tensor.dtype.itemsize < dtype.itemsize
        # a copy, since one tensor left in its place would hold all the file's pages
        tensors[name] = tensor.to(device, copy=True) if kept else tensor.to(device, dtype)
    if config.tied:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.to(device).eval()


def initialise(folder: Path, device: torch.device, seed: int) -> Decoder:
    """A decoder of the shape that config.json says with random float32 weights, in evaluation mode.

    Matrices are normal with the standard deviation `initializer_range` (0.02 where config.json has none), norms are 1
    and biases 0, as transformers starts; drawn on the CPU from `seed`, so that every device gets the same.
    """
    model = Decoder(read_config(folder))
    spread = read_json(folder / "config.json").get("initializer_range", 0.02)
    if not isinstance(spread, int | float) or not 0 < spread < 10:
        raise UserError(f"{folder / 'config.json'}: the field initializer_range is {spread!r}, which is not valid")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, spread, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.to(device).eval()


def _listed(what: str, names: list[str]) -> str:
    """"what: a, b, c and 4 more; ", or nothing."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{what}: {', '.join(names[:8])}{more}; " if names else ""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the single one, or the shards that its index names."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f"only {', '.join(pickles)}, which can run code when read" if pickles else "none"
        raise UserError(f"{folder} has no {SINGLE} nor {INDEX} ({found}); save the model as safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index} names {shard!r}, which is not a file of its own folder")
        if not (folder / shard).exists():
            raise UserError(f"{folder} lacks {shard}, which {INDEX} names")
    return [folder / shard for shard in shards]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped; a truncated or corrupt file is a UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from error


def save(model: Decoder, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a model folder that transformers, vLLM and `load` read: weights as `dtype`, the rest as in `source`.

    The weights come last: a folder without them is seen to be unfinished.
    """
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied:
        del state["lm_head.weight"]
    state = {name if name == "lm_head.weight" else f"model.{name}": tensor for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).exists():
            with whole(folder / name) as part:
                shutil.copyfile(source / name, part)
    config = read_json(source / "config.json")
    config.pop("torch_dtype", None)  # the older name of the same field
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    with whole(folder / SINGLE) as part:
        save_file(state, part, metadata={"format": "pt"})
