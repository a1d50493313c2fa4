# SPDX-License-Identifier: Apache-2.0
"""Several prompts at once, without a server: python offline_inference.py MODEL

sglang-fl needs no call: SGLang finds it, and the log says what runs where.
"""

import sys

import sglang

PROMPTS = ["Recite Sonnet 18.", "The capital of France is", "1, 2, 3,"]


def main(model: str) -> None:
    engine = sglang.Engine(model_path=model)
    try:
        answers = engine.generate(PROMPTS, {"temperature": 0, "max_new_tokens": 24})
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            print(f"{prompt} → {answer['text']}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang starts its processes by importing this file
    main(sys.argv[1])
