"""Makes the files beside it: small checkpoints, and what independent implementations make of them.

    pip install torch transformers gguf safetensors numpy && python tests/gguf/make.py

blocks.safetensors   for each quantised type, random blocks (`TYPE.bytes`) and their values (`TYPE.values`) by the package gguf
qwen2/               a Qwen2 of random bf16 weights in Hugging Face form; io.safetensors has token ids, the logits by
                     transformers in f64, and the gradients of the mean cross-entropy of the next token
llama.gguf           a Llama with Llama 3's RoPE factors, queries and keys interleaved, in every type of 32 values a block
qwen2.gguf           a Qwen2 with a head of its own, in a mixture of types
mistral.gguf         a Mistral under its own name, with a window of 8 tokens
k-quants.gguf        a Qwen2 whose matrices are random blocks of the types of 256 values, which no package writes
*.io.safetensors     token ids and logits by transformers in f64 for the dequantised weights of each of the four
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

HERE = Path(__file__).parent
SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
             initializer_range=0.3)
PARTS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def blocks(random):
    tensors = {}
    halves = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
              Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}
    for kind, places in halves.items():
        values, size = gguf.GGML_QUANT_SIZES[kind]
        rows = random.integers(0, 256, (512 // values, size), dtype=np.uint8)
        for place in places:
            scales = random.uniform(-2, 2, len(rows)).astype(np.float16)
            rows[:, place:place + 2] = scales.view(np.uint8).reshape(-1, 2)
        tensors[f"{kind.name}.bytes"] = torch.from_numpy(rows.reshape(-1).copy())
        tensors[f"{kind.name}.values"] = torch.from_numpy(gguf.quants.dequantize(rows, kind).reshape(-1).copy())
    save_file(tensors, HERE / "blocks.safetensors")


def fresh(config):
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.5)
            weight.copy_(weight.to(torch.bfloat16).double())
    return model.eval()


def token_ids(config):
    return torch.randint(0, config.vocab_size, (2, 13))


def qwen2():
    model = fresh(Qwen2Config(**SIZES, rope_theta=1e6, tie_word_embeddings=True, use_sliding_window=False))
    ids = token_ids(model.config)
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {f"gradient.{name}": weight.grad.float() for name, weight in model.named_parameters()}
    model.to(torch.bfloat16).save_pretrained(HERE / "qwen2")
    (HERE / "qwen2/generation_config.json").unlink(missing_ok=True)
    save_file({"input_ids": ids, "logits": logits.detach().float(), **gradients}, HERE / "qwen2/io.safetensors")


def interleave(weight, heads):
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def random_blocks(random, values, kind):
    """Blocks of values around 0, for a matrix of this shape."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    rows = random.integers(0, 256, (len(values), values.shape[1] // size, length), dtype=np.uint8)
    # Least values are subtracted; they lie where half of the greatest quant is.
    scale, least, place = {Type.Q4_K: (2.5e-4, 7.5, 0), Type.Q5_K: (1.2e-4, 15.5, 0), Type.Q6_K: (4e-5, None, 208)}[kind]
    scales = scale * random.uniform(0.5, 1.5, rows.shape[:2])
    both = [scales] if least is None else [scales, least * scales]
    packed = np.stack(both, axis=-1).astype(np.float16)
    rows[..., place:place + 2 * len(both)] = packed.view(np.uint8).reshape(*rows.shape[:2], -1)
    return rows.reshape(len(values), -1)


def write(name, model, types, permute, rope_factors=None, make=lambda values, kind: gguf.quants.quantize(values, kind)):
    """Stores each matrix as the next of `types`, gives the model the values that come back, and saves its logits."""
    config = model.config
    writer = gguf.GGUFWriter(HERE / name, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base((config.rope_parameters or {})["rope_theta"])
    writer.add_token_list(["<unk>", "<s>", "</s>"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    count = 0
    for full, weight in model.named_parameters():
        stem, ending = full.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stored = f"blk.{layer}.{PARTS[part]}.{ending}"
        else:
            stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + "." + ending
        values, kind = weight.detach().float().numpy(), Type.F32
        if values.ndim == 2:
            kind = types[count % len(types)]
            count += 1
        heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
        heads = heads.get(stored.split(".", 2)[-1]) if permute else None
        there = interleave(values, heads) if heads else values
        data = make(there, kind) if values.ndim == 2 else there
        writer.add_tensor(stored, data, raw_dtype=kind)
        back = gguf.quants.dequantize(data, kind).reshape(values.shape)
        if heads:  # the inverse
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(back.copy()).double())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    ids = token_ids(config)
    io = {"input_ids": ids, "logits": model(ids).logits.detach().float()}
    save_file(io, HERE / name.replace(".gguf", ".io.safetensors"))


def llama3_factors(theta, half, factor=8.0, low=1.0, high=4.0, context=8192):
    frequencies = theta ** (-np.arange(half) / half)
    turns = context * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - keep) / factor + keep)


if __name__ == "__main__":
    torch.manual_seed(0)
    blocks(np.random.default_rng(0))
    qwen2()
    scaling = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    llama = fresh(LlamaConfig(**SIZES, rope_parameters=scaling, tie_word_embeddings=True))
    all_types = [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.F16, Type.BF16, Type.F32]
    write("llama.gguf", llama, all_types, True, llama3_factors(5e5, 4))
    own_head = fresh(Qwen2Config(**SIZES, rope_theta=1e6, tie_word_embeddings=False, use_sliding_window=False))
    write("qwen2.gguf", own_head, [Type.Q5_0, Type.Q8_0], False)
    wide = Qwen2Config(**SIZES | dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_hidden_layers=1),
                       rope_theta=1e6, tie_word_embeddings=True, use_sliding_window=False)
    random = np.random.default_rng(1)
    write("k-quants.gguf", fresh(wide), [Type.Q6_K, Type.Q4_K, Type.Q5_K], False,
          make=lambda values, kind: random_blocks(random, values, kind))
    mistral = fresh(MistralConfig(**SIZES, rope_theta=1e4, sliding_window=8, tie_word_embeddings=False))
    write("mistral.gguf", mistral, [Type.Q8_0, Type.F16, Type.Q5_1], permute=True)
