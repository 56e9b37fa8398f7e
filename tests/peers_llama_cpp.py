"""llama.cpp as a peer of the sampler: our weights as a GGUF file, and continuous batching over its C interface."""

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFWriter

from model.config import read_config
from model.weights import read_tensors, weight_files

N_BATCH = 2048  # tokens in one call
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}
INNER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: int) -> None:
    """llama.cpp logs every tensor."""


llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


def write_gguf(folder: Path, path: Path, dtype: type) -> None:
    """Write a Llama checkpoint with matrices as `dtype` (np.float32 or np.float16) and norms as float32; no tokenizer,
    since token ids are fed."""
    config = read_config(folder)
    assert (config.architecture, config.rope_type, config.qkv_bias) == ("LlamaForCausalLM", "default", False)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in (pair for file in weight_files(folder) for pair in read_tensors(file).items()):
        if name in OUTER:
            theirs = OUTER[name]
        else:
            _, _, layer, *ours, _ = name.split(".")  # model.layers.3.self_attn.q_proj.weight
            theirs = f"blk.{layer}.{INNER['.'.join(ours)]}.weight"
        if theirs.endswith(("attn_q.weight", "attn_k.weight")):
            # Hugging Face's rotary embedding pairs dimension d with d + D/2, theirs for Llama 2d with 2d + 1
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(theirs, tensor.float().contiguous().numpy().astype(dtype if tensor.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(path: Path) -> object:
    """The model of a GGUF file, for a `Context`."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp could not load {path}"
    return model


class Context:
    """A model with a KV cache for `slots` sequences of `capacity` tokens each; float16, as is llama.cpp's default."""

    def __init__(self, model: object, slots: int, capacity: int, unified: bool, threads: int) -> None:
        """`unified`: one cache buffer for all sequences, each reading all of it; otherwise a buffer to each."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = slots * (-(-capacity // 256) * 256), N_BATCH, slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = unified
        self.context = llama_cpp.llama_init_from_model(model, params)
        assert self.context, "llama.cpp could not make a context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self.slots = slots

    def close(self) -> None:
        """Free what C holds."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def generate(self, prompts: Sequence[tuple[str, Sequence[int]]], limit: int,
                 stop_ids: frozenset[int]) -> Iterator[tuple[str, list[int]]]:
        """Greedy responses as (id, tokens) as they finish; a slot that becomes free takes the next prompt."""
        waiting, free = list(reversed(prompts)), list(range(self.slots))
        rows: dict[int, tuple[str, list[int], int]] = {}  # by slot: id, sampled tokens, prompt's length
        while waiting or rows:
            new, size = {}, 0
            while waiting and free and size + len(waiting[-1][1]) <= N_BATCH:
                id, prompt = waiting.pop()
                slot = free.pop()
                rows[slot] = (id, [], len(prompt))
                new[slot], size = prompt, size + len(prompt)
            if new:
                feed = [(slot, prompt, 0) for slot, prompt in new.items()]
            else:
                feed = [(slot, tokens[-1:], length + len(tokens) - 1) for slot, (_, tokens, length) in rows.items()]
            for slot, token in zip((slot for slot, *_ in feed), self._next(feed), strict=True):
                id, tokens, _ = rows[slot]
                tokens.append(token)
                if token in stop_ids or len(tokens) == limit:
                    llama_cpp.llama_memory_seq_rm(self.memory, slot, -1, -1)
                    del rows[slot]
                    free.append(slot)
                    yield id, tokens

    def _next(self, feed: list[tuple[int, Sequence[int], int]]) -> list[int]:
        """The likeliest token behind each of (slot, tokens, position of the first)."""
        batch, ends, n = self.batch, [], 0
        for slot, tokens, first in feed:
            for position, token in enumerate(tokens, first):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = token, position, 1, 0
                batch.seq_id[n][0] = slot
                n += 1
            batch.logits[n - 1] = 1
            ends.append(n - 1)
        batch.n_tokens = n
        code = llama_cpp.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returned {code}"
        logits = (llama_cpp.llama_get_logits_ith(self.context, end) for end in ends)
        return [int(np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in logits]
