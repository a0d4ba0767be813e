"""Records what other implementations make of real models: the numbers that tests/real_text.rs holds h1 to.

    examples/fetch-models MODELS
    pip install torch transformers tokenizers gguf jinja2 && python tests/real/record.py MODELS

Weights are dequantised by the package gguf and run by transformers' classes in f64 (Qwen2.5 in f32); ids come from the package tokenizers, built
here from the vocabulary and merges in the GGUF file as the published tokenizer.json has them; conversations are rendered by
Jinja2. `*.json` has for prompts their ids and the greedy continuation with the least distance between the best logit and the second on
the way, and for GSM8K's answers and for texts the mean negative log-likelihood of their tokens.
"""

import json
import sys
from pathlib import Path

import gguf
import jinja2
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

HERE = Path(__file__).parent
GSM8K = HERE / "../../../shared/data/gsm8k/test.jsonl"
NEW_TOKENS = 48
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

PARTS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def field(reader, name):
    return reader.get_field(name).contents()


def model_of(reader, dtype):
    """The class of transformers with the dequantised weights."""
    architecture = field(reader, "general.architecture")
    key = lambda name: field(reader, f"{architecture}.{name}")
    heads = {"attn_q.weight": key("attention.head_count"), "attn_k.weight": key("attention.head_count_kv")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](
        vocab_size=len(field(reader, "tokenizer.ggml.tokens")), hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"), num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"), num_key_value_heads=key("attention.head_count_kv"),
        max_position_embeddings=key("context_length"), rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": key("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, weight in model.named_parameters():
        stem, ending = name.removeprefix("model.").rsplit(".", 1)
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stored = f"blk.{layer}.{PARTS[part]}.{ending}"
        else:
            stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + "." + ending
        tensor = tensors.pop(stored)
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(weight.shape)
        count = heads.get(stored.split(".", 2)[-1]) if architecture == "llama" else None
        if count:  # rows that llama.cpp turns as neighbours
            values = values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        with torch.no_grad():
            weight.copy_(values)
    assert not tensors, tensors.keys()
    return model


def tokenizer(reader):
    tokens, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
    bytes_as_signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=field(reader, "tokenizer.ggml.pre") == "smollm")
    if field(reader, "tokenizer.ggml.pre") == "smollm":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_as_signs])
    else:
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), bytes_as_signs])
    made.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    made.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == 3])
    return made


def render(template, messages, answers):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=answers, tools=None)


@torch.no_grad()
def nll(model, ids, first):
    """Negative log-likelihood of the tokens from `first` on, each predicted by those before it, and their number."""
    logits = model(torch.tensor([ids])).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return losses[first - 1:].sum().item(), len(ids) - first


@torch.no_grad()
def greedy(model, ids, ends):
    made, gap, past, given = [], float("inf"), None, ids
    while len(made) < NEW_TOKENS:
        out = model(torch.tensor([given]), past_key_values=past, use_cache=True)
        best = out.logits[0, -1].double().topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        made.append(best.indices[0].item())
        if made[-1] in ends:
            break
        past, given = out.past_key_values, made[-1:]
    return made, gap


def record(path, out, dtype, prompts, problems, texts):
    reader = gguf.GGUFReader(path)
    tokens, template = tokenizer(reader), field(reader, "tokenizer.chat_template")
    encode = lambda text: tokens.encode(text, add_special_tokens=False).ids
    model = model_of(reader, dtype)
    ends = {field(reader, "tokenizer.ggml.eos_token_id")}
    result = {"greedy": [], "texts": []}
    for chat, text in [(False, prompt) for prompt in prompts] + [(True, problem["question"]) for problem in problems[:2]]:
        ids = encode(render(template, [{"role": "user", "content": text}], True) if chat else text)
        new, gap = greedy(model, ids, ends)
        result["greedy"].append({"prompt": text, "chat": chat, "ids": ids, "new": new, "least_gap": gap,
                                 "text": tokens.decode(new, skip_special_tokens=True)})
        print(result["greedy"][-1]["text"], file=sys.stderr)
    sums = [0.0, 0]
    for problem in problems:
        turns = [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": problem["answer"]}]
        before, whole = render(template, turns[:1], True), render(template, turns, False)
        assert whole.startswith(before)
        # What the assistant says, and the token that ends its turn.
        first, answer = encode(before), encode(whole[len(before):])
        end = next(place for place, token in enumerate(answer) if token in ends) + 1
        loss, count = nll(model, first + answer[:end], len(first))
        sums = [sums[0] + loss, sums[1] + count]
    result["answers"] = {"documents": len(problems), "tokens": sums[1], "mean": sums[0] / sums[1]}
    for name, text in texts.items():
        ids = encode(text) + [field(reader, "tokenizer.ggml.eos_token_id")]
        loss, count = nll(model, ids, 1)
        result["texts"].append({"name": name, "ids": len(ids), "mean": loss / count})
    (HERE / out).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    print(result["answers"], result["texts"], file=sys.stderr)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with GSM8K.open() as lines:
        problems = [json.loads(line) for line in lines][:20]
    texts = {name: (HERE / name).read_text() for name in ("english.txt", "code.txt")}
    record(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2.json", torch.float64,
           ["The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):\n"], problems, texts)
    record(folder / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.json", torch.float32,
           ["def quicksort(items):\n"], problems[:2], texts)
