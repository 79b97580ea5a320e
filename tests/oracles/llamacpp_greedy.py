"""Run by `.venv-llamacpp/bin/python`: what llama.cpp reads in a GGUF file, and does with it.

Arguments: the file, and JSON with `texts`, to be cut into tokens, `prompts`, tokens to go on from until an end, and
perhaps `lora`, the file of an adapter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp


def main(path: str, asked: dict[str, Any]) -> dict[str, object]:
    how = {"n_ctx": 256, "n_threads": 1, "verbose": False, "vocab_only": not asked["prompts"]}
    model = llama_cpp.Llama(path, lora_path=asked.get("lora"), **how)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    answers = []
    for prompt in asked["prompts"]:
        tokens = model.tokenize(prompt.encode(), add_bos=True, special=True)
        answer = []
        for token in model.generate(tokens, temp=0.0):
            answer.append(token)
            if llama_cpp.llama_vocab_is_eog(vocab, token) or len(answer) == 60:
                break
        answers.append({"prompt": tokens, "answer": answer})
    return {
        "texts": [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]],
        "answers": answers,
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "template": model.metadata.get("tokenizer.chat_template"),
    }


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        print(json.dumps(main(sys.argv[1], json.load(file))))
