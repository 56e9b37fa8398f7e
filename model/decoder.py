"""The decoder: one model for Llama, Mistral, Qwen2 and Qwen3, and for training, prefill and cached decoding.

It works on a flat stream of T tokens and never sees a batch dimension or padding: sequences lie one behind the other
("packed"), and an `Attend` (attention.py) knows where each begins, who may look at whom, and whether keys and values
come from a cache. Module names are Hugging Face's, so that checkpoints and adapters need no table of names.

Shapes: T tokens, E hidden_size, H query heads, K key/value heads, D head_dim, F intermediate_size, V vocab_size.
"""

import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attend, Rotation
from model.config import ModelConfig

if torch.cuda.is_available():  # Triton comes with torch's builds for GPUs alone
    from model import kernels

ONE_DNN = torch.backends.mkldnn.is_available()
# oneDNN, and PyTorch's layer above it, keep what they compiled for the last 1,024 shapes, 0.7 MB each, and a pass of
# another number of tokens has 14 new ones: read at the first product, unless the user has set them
for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_variable, "64")
VOCABULARY_PART = 8192  # tokens in one product of the head, where the logits go to a given place


def fused(x: Tensor) -> bool:
    """Whether kernels.py computes what is small: on a GPU, unless gradients are wanted."""
    return not x.is_cpu and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) times weight (out, in), to (…, out); a row comes out the same whatever the others are (LOG.md).

    A frozen weight of another dtype (`weights.load`, `narrow`) is made x's for the time of the product.
    """
    if weight.dtype != x.dtype and not weight.requires_grad:  # of what is trained, autocast makes what it needs
        if x.requires_grad and torch.is_grad_enabled():
            return _FrozenProduct.apply(x, weight, bias)
        weight = weight.to(x.dtype)
    plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    if x.device.type == "cpu" and x.dtype == torch.float32 and plain and ONE_DNN:
        # F.linear takes MKL for float32, which on an AMD processor took 1.4 times as long for 16 rows, 1.2 for 64
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _FrozenProduct(torch.autograd.Function):
    """`linear` with a frozen weight of another dtype, which is kept for the gradient as it is, and not as x's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T), None, None


def recomputable(x: Tensor, recipe: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """x, with a note that it is recipe(*ingredients).

    An adapter that needs its input again for a gradient then keeps the ingredients, which autograd keeps anyway, and
    not the input (`_AdaptedProduct` in lora.py): a third less of what a training step keeps, for a few cheap passes.
    """
    x.recipe = recipe, ingredients
    return x


def transpose_weights(model: "Decoder") -> None:
    """Lay the weights of the blocks' products out input by input, on the CPU in float32; their values don't change.

    oneDNN multiplies few rows by them faster (16 rows by 1.2, 64 by 1.1), to the same bits. Not done when weights are
    loaded, since it takes longer than that; and those that were read in place from a float32 file take memory of their
    own from then on.
    """
    for module in model.layers.modules():
        if isinstance(module, Linear) and module.weight.is_cpu and module.weight.dtype == torch.float32:
            module.weight.data = module.weight.data.T.contiguous().T


class Linear(nn.Linear):
    """`linear` with weights of its own."""

    def reset_parameters(self) -> None:
        """Nothing: the weights come from a file or from `weights.initialise`, and on the meta device drawing them makes
        torch import its compiler, which takes a second."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        return linear(x, self.weight, self.bias)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (…, size) normed, and the inverse of its root mean square (…, 1) in float32."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    # F.rms_norm in one call would round once less than the reference in bfloat16: it scales before the cast
    return weight * (x32 * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """`RMSNorm.forward` and its gradients in half of the passes that autograd takes, keeping x in its own dtype."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        x32 = x.float()
        grad_normed = (grad * weight).float()
        # what lies along x changes its length alone, which the norm takes out again
        along = (grad_normed * x32).mean(-1, keepdim=True) * scale.square()
        grad_x = grad_normed.addcmul_(x32, along, value=-1).mul_(scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * x32).mul_(scale).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32 as the checkpoints were trained."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) to the same shape and dtype."""
        if fused(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        if torch.is_grad_enabled():
            return recomputable(_RMSNorm.apply(x, self.weight, self.eps), self.plain, x)
        return self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """`forward`, step by step and without its gradient."""
        return _normed(x, self.weight, self.eps)[0]

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of x and delta, both (…, size), and its norm."""
        if fused(x):
            normed, x = kernels.rms_norm(x, self.weight, self.eps, residual=delta)
            return x, normed
        x = x + delta
        return x, self(x)


class Attention(nn.Module):
    """Grouped-query self-attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.dim = dim
        self.q_proj = Linear(size, config.num_heads * dim, bias=bias)
        self.k_proj = Linear(size, config.num_kv_heads * dim, bias=bias)
        self.v_proj = Linear(size, config.num_kv_heads * dim, bias=bias)
        self.o_proj = Linear(config.num_heads * dim, size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, layer: int) -> Tensor:
        """(T, E) to (T, E)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.dim))  # (T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.dim))  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.dim))  # (T, K, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(layer, q, k, v, rotation).flatten(-2))  # (T, H, D) → (T, E)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """`swiglu`, keeping gate and up for the gradient. Autograd would keep silu(gate) too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(T, E) to (T, E)."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # (T, F)
        if fused(x):
            mixed = kernels.silu_mul(gate, up)
        elif torch.is_grad_enabled():
            mixed = recomputable(_SwiGLU.apply(gate, up), swiglu, gate, up)
        else:
            mixed = F.silu(gate, inplace=True).mul_(up)
        return self.down_proj(mixed)  # (T, F) → (T, E)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend, layer: int) -> Tensor:
        """(T, E) to (T, E)."""
        attended = self.self_attn(self.input_layernorm(x), rotation, attend, layer)
        x, normed = self.post_attention_layernorm.add(x, attended)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head. `weights.load` fills it from a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointed = 0  # so many first blocks keep their input alone, and are computed again for their gradient
        table = torch.empty(config.vocab_size, config.hidden_size)  # given, so that it is not drawn: see `Linear`
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        # A buffer, so that it moves with the model; not in the state dict, since no checkpoint needs to bring it
        self.register_buffer("frequencies", inverse_frequencies(config), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed, and of the weights unless they were loaded `narrow`."""
        return self.norm.weight.dtype

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states, (T, E), of tokens (T,) int64 at positions (T,) int64 within their sequences.

        The head is left to the caller, who needs it for few of the T: the supervised ones in training, the last of
        each sequence in sampling.
        """
        x = self.embed_tokens(tokens).to(self.dtype)  # (T, E)
        rotation = self.rotation(positions, x.dtype)
        for i, layer in enumerate(self.layers):
            if i < self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, attend, i, use_reentrant=False)
            else:
                x = layer(x, rotation, attend, i)
        return self.norm(x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, E) hidden states to (N, V) logits in float32, if given in `out`.

        On the CPU memory of this size comes anew from the system each time, and its page faults took as long as half
        of the product: a caller who needs logits again and again brings a tensor of its own.
        """
        if out is None:
            return self.lm_head(hidden).float()
        for weight, part in zip(self.lm_head.weight.split(VOCABULARY_PART), out.split(VOCABULARY_PART, 1), strict=True):
            part.copy_(linear(hidden, weight))  # a product can't be written to a given place by oneDNN
        return out

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines, each (T, 1, D/2), of rotary embeddings at `positions`; angles are float32 throughout."""
        angles = positions[:, None, None].float() * self.frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """(D/2,) float32 angle per position of each pair of dimensions, stretched as the checkpoint's rope type says."""
    # on the CPU even where the model is being built on the meta device, which holds no values
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**pairs
    scaling = config.rope_scaling
    if config.rope_type == "linear":  # position interpolation, arXiv 2306.15595
        return frequencies / scaling["factor"]
    if config.rope_type == "llama3":
        # Llama 3.1: wavelengths that fit many times into the original context stay, those longer than it are
        # stretched by `factor`, and between the two bounds the stretch fades in
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies
