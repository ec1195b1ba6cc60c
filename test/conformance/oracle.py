# The exact oracle: transformers' Flax Llama, float32 throughout, on weights as the `gguf` package dequantises them.
# Reads {"chats": [messages, ...]} or {"walk": [{"ids": [...], "from": n}, ...], "dump": FILE} on standard input.
#   chats  prints the text of each chat, rendered by jinja2 from the file's own template
#   walk   runs all ids at once (teacher-forced) and prints, for every position >= from - 1, the best id and the gap between
#          the two best logits; writes all logits of the first sequence to FILE as float32 rows
# Adapted here, and nowhere else: names and layouts of a GGUF; the rotary base, which Flax Llama fixes at 10000; the tied head,
# which it does not tie.
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

LENGTH_MAX = 1024  # Flax Llama makes a causal mask of LENGTH_MAX^2 for every layer


def value(reader, key):
    return reader.fields[key].contents()


def matrix(tensors, name):
    tensor = tensors[name]
    return dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in reversed(tensor.shape)))


def unpermuted(weight, heads):
    """A GGUF keeps the two halves of a rotary head interleaved; transformers has them one after the other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def model_of(reader):
    import jax
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_flax_llama as flax_llama

    jax.config.update("jax_default_matmul_precision", "highest")
    base = float(value(reader, "llama.rope.freq_base"))

    def sinusoids(length, dim):
        inverse = base ** -(np.arange(0, dim, 2) / dim)
        angles = np.outer(np.arange(length), inverse)
        angles = np.concatenate((angles, angles), axis=-1)
        return jax.numpy.asarray(np.concatenate((np.sin(angles), np.cos(angles)), axis=-1)[:, None, :], "float32")

    flax_llama.create_sinusoidal_positions = sinusoids
    heads = value(reader, "llama.attention.head_count")
    kv_heads = value(reader, "llama.attention.head_count_kv")
    layers = value(reader, "llama.block_count")
    config = LlamaConfig(
        vocab_size=value(reader, "llama.vocab_size"),
        hidden_size=value(reader, "llama.embedding_length"),
        intermediate_size=value(reader, "llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=value(reader, "llama.attention.layer_norm_rms_epsilon"),
        max_position_embeddings=LENGTH_MAX,
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "output.weight" in tensors:
        raise SystemExit("oracle: output.weight is there, but tied embeddings were expected")

    def kernel(name, heads_of=None):
        weight = matrix(tensors, name)
        return {"kernel": (unpermuted(weight, heads_of) if heads_of else weight).T}

    def layer(at):
        block = f"blk.{at}."
        return {
            "self_attn": {
                "q_proj": kernel(f"{block}attn_q.weight", heads),
                "k_proj": kernel(f"{block}attn_k.weight", kv_heads),
                "v_proj": kernel(f"{block}attn_v.weight"),
                "o_proj": kernel(f"{block}attn_output.weight"),
            },
            "mlp": {
                "gate_proj": kernel(f"{block}ffn_gate.weight"),
                "up_proj": kernel(f"{block}ffn_up.weight"),
                "down_proj": kernel(f"{block}ffn_down.weight"),
            },
            "input_layernorm": {"weight": matrix(tensors, f"{block}attn_norm.weight")},
            "post_attention_layernorm": {"weight": matrix(tensors, f"{block}ffn_norm.weight")},
        }

    embedding = matrix(tensors, "token_embd.weight")
    parameters = {
        "model": {
            "embed_tokens": {"embedding": embedding},
            "layers": {str(at): layer(at) for at in range(layers)},
            "norm": {"weight": matrix(tensors, "output_norm.weight")},
        },
        "lm_head": {"kernel": embedding.T},
    }
    model = flax_llama.FlaxLlamaForCausalLM(config, _do_init=False, dtype=jax.numpy.float32)
    return lambda ids: np.asarray(model(np.array([ids]), params=parameters).logits[0], dtype=np.float32)


def walk(forward, sequence):
    logits = forward(sequence["ids"])
    asked = logits[sequence["from"] - 1 :]
    top = np.sort(asked, axis=-1)[:, -2:]
    answer = {"best": asked.argmax(-1).tolist(), "gap": (top[:, 1] - top[:, 0]).tolist()}
    return logits, answer


def main():
    request = json.load(sys.stdin)
    reader = GGUFReader(sys.argv[1])
    if "chats" in request:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(value(reader, "tokenizer.chat_template"))
        texts = [template.render(messages=chat, add_generation_prompt=True) for chat in request["chats"]]
        print(json.dumps(texts))
        return
    forward = model_of(reader)
    answers = []
    for index, sequence in enumerate(request["walk"]):
        logits, answer = walk(forward, sequence)
        answers.append(answer)
        if index == 0:
            logits.astype("<f4").tofile(request["dump"])
    print(json.dumps(answers))


main()
