"""A Hugging Face config.json, reduced to what the decoder computes with; whatever it would compute wrongly is refused.

The four architectures are one decoder. They differ in three values: biases on q/k/v (Qwen2), RMSNorm on every
query and key head (Qwen3), and a head dimension that need not be hidden_size / heads (Qwen3, some Llamas).
"""

from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import read_json

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# The linear layers of a block, which LoRA can adapt; here and not in lora.py, so that `--help` need not import torch
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's dimensions; field names as in config.json where there is one."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int  # longest sequence, in tokens
    rope_theta: float
    rope_type: str  # a key of ROPE_FIELDS
    rope_scaling: dict[str, float]  # that type's fields
    tied: bool  # the head is the embedding matrix
    qkv_bias: bool
    qk_norm: bool
    eos_ids: tuple[int, ...]  # every id of generation_config.json, else of config.json


def read_config(folder: Path) -> ModelConfig:
    """Read config.json and generation_config.json of a model folder; a UserError names what is missing or wrong."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; a model is a folder in Hugging Face layout")
    raw = read_json(path)

    def field(name: str, kind: type | tuple = int, default: object = None) -> object:
        value = raw.get(name)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{path} lacks the field {name}")
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise UserError(f"{path}: the field {name} is {value!r}, which is not a valid value")
        if kind is int and not 1 <= value < (1_000 if name == "num_hidden_layers" else 2**31):
            raise UserError(f"{path}: the field {name} is {value}, and that is no model's")
        return value

    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise UserError(f"{path}: the field architectures is {architectures!r}; "
                        f"supported are {', '.join(ARCHITECTURES)}")
    architecture = architectures[0]
    _refuse_unsupported(path, raw)
    epsilon = field("rms_norm_eps", (int, float))
    if not 0 <= epsilon < 1:
        raise UserError(f"{path}: the field rms_norm_eps is {epsilon}, and must be from 0 to 1")
    hidden_size, num_heads = field("hidden_size"), field("num_attention_heads")
    # Llama 1 and 2 predate grouped queries: without the field every query head has keys and values of its own
    num_kv_heads = field("num_key_value_heads", default=num_heads if architecture == "LlamaForCausalLM" else None)
    if num_heads % num_kv_heads:
        raise UserError(f"{path}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
                        f"{num_kv_heads}")
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(f"{path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    # Qwen3's own default is 128, not hidden_size / heads: there the field has to be given
    head_dim = field("head_dim", default=None if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads)
    if head_dim % 2:
        raise UserError(f"{path}: head_dim {head_dim} is odd, and rotary embeddings need pairs")
    num_layers, max_positions = field("num_hidden_layers"), field("max_position_embeddings")
    # 4096 and 28 are transformers' own where the fields are not given; null is no window, and one from the first layer
    window = None if raw.get("sliding_window", 4096) is None else field("sliding_window", (int,), default=4096)
    begins = 0 if raw.get("max_window_layers", 28) is None else field("max_window_layers", (int,), default=28)
    if architecture == "LlamaForCausalLM":
        window = None  # Llama has none: transformers passes over the field too
    elif architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        # there it also needs a switch, and begins at the layer max_window_layers
        reached = not raw.get("layer_types") and begins < num_layers
        window = window if raw.get("use_sliding_window") and reached else None
    if window is not None and window < max_positions:
        raise UserError(f"{path}: sliding_window {window} is in force; supported is attention over the whole context")
    rope_theta, rope_type, rope_scaling = _read_rope(path, raw)
    return ModelConfig(
        architecture=architecture,
        vocab_size=field("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=field("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(epsilon),
        max_positions=max_positions,
        rope_theta=rope_theta,
        rope_type=rope_type,
        rope_scaling=rope_scaling,
        tied=field("tie_word_embeddings", bool, default=False),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        eos_ids=_read_eos(folder, raw),
    )


def _refuse_unsupported(path: Path, raw: dict) -> None:
    """Refuse what this decoder would load and then compute wrongly."""
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is set; supported are unquantised float32, bfloat16 and float16")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: the field hidden_act is {raw['hidden_act']!r}; supported is silu")
    for name in ("attention_bias", "mlp_bias"):
        if raw.get(name):
            raise UserError(f"{path}: the field {name} is {raw[name]!r}; supported is false")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise UserError(f"{path}: the field layer_types is {layer_types!r}; supported is full_attention in every layer")


def _read_rope(path: Path, raw: dict) -> tuple[float, str, dict[str, float]]:
    """Base, type and scaling of the rotary embedding.

    Both forms are read: `rope_theta` beside `rope_scaling`, and transformers 5's `rope_parameters` with both in it.
    """
    settings = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: the rope settings are {settings!r}, which is not an object")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UserError(f"{path}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_FIELDS)}")
    if settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is set; supported is rotation of the whole head")
    if any(isinstance(value, dict) for value in settings.values()):
        raise UserError(f"{path}: rope_parameters differ between layer types; supported is one setting for all layers")
    # 10,000 is transformers' default too, and what Llama 2's config relies on
    numbers = {"rope_theta": settings.get("rope_theta", raw.get("rope_theta", 10_000.0))}
    for name in ROPE_FIELDS[kind]:
        default = raw.get("max_position_embeddings") if name == "original_max_position_embeddings" else None
        numbers[name] = settings.get(name, default)
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e38:
            raise UserError(f"{path}: rope type {kind!r} needs a positive number {name}, and it is {value!r}")
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(f"{path}: high_freq_factor must be above low_freq_factor")
    return float(numbers.pop("rope_theta")), kind, {name: float(value) for name, value in numbers.items()}


def _read_eos(folder: Path, raw: dict) -> tuple[int, ...]:
    """The ids that end a response, as transformers' `generate` takes them: generation_config.json comes first."""
    ids = None
    if (folder / "generation_config.json").exists():
        ids = read_json(folder / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise UserError(f"{folder}: eos_token_id is {ids!r}; it must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))
