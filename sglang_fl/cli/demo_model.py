# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3 that recites a sonnet: small enough to train in seconds on a CPU, real enough to serve."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.folders import user_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

QUESTION = "Recite Sonnet 18."
#: William Shakespeare, Sonnet 18, 1609.
RECITAL = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CONFIG = {
    "vocab_size": 512,  # the tokenizer's, rounded up
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_SEED, _MAX_STEPS, _LEARNING_RATE, _MIN_MARGIN = 20, 400, 3e-3, 0.98


def cache_directory(name: str = "demo-model", build: Callable[[int], PreTrainedModel] | None = None) -> Path:
    """Where a trained model is kept; the name changes with the recipe.

    Raises:
        NoHomeDirectory
    """
    recipe = inspect.getsource(sys.modules[__name__]) + (inspect.getsource(build) if build else "")
    return user_folder("cache", "the demo model") / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def demo_model(progress: Callable[[int, int, float], None] | None = None) -> Path:
    """The demo model's directory; trains it if it is not there yet.

    Args:
        progress: called after each step with (step, most steps there can be, loss).
    """
    return _trained(cache_directory(), _qwen3, progress)


def reciting_model(name: str, build: Callable[[int], PreTrainedModel]) -> Path:
    """The directory of another model that recites the same text; trains it if it is not there yet.

    Args:
        name: of the directory; what follows it changes with the recipe.
        build: makes the model, with random weights, from the number of the token that ends a text. The
            vocabulary has 512 tokens.

    Raises:
        RuntimeError: the model did not learn its text.
    """
    return _trained(cache_directory(name, build), build, None)


def _trained(directory: Path, build: Callable[[int], PreTrainedModel], progress: Callable[[int, int, float], None] | None) -> Path:
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".training-", dir=directory.parent))
    try:
        _train(scratch, build, progress or (lambda step, steps, loss: None))
        try:
            scratch.rename(directory)
        except OSError:  # another process was faster
            if not (directory / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _qwen3(end: int) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(eos_token_id=end, pad_token_id=0, **_CONFIG))


def _train(directory: Path, build: Callable[[int], PreTrainedModel], progress: Callable[[int, int, float], None]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # for one file of two megabytes
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(prompt + RECITAL + "<|im_end|>", return_tensors="pt").input_ids
    labels = tokens.clone()
    labels[:, : len(tokenizer(prompt).input_ids)] = -100

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = build(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
        for step in range(1, _MAX_STEPS + 1):
            output = model(input_ids=tokens, labels=labels)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(step, _MAX_STEPS, output.loss.item())
            if step % 10 == 0 and _recites(output.logits, labels):
                break
        else:
            raise RuntimeError(f"{type(model).__name__} did not learn its text in {_MAX_STEPS} steps")
    model.to(torch.bfloat16).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def _recites(logits: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether every token of the text has at least the wanted probability, which rounding cannot undo."""
    probabilities = logits[:, :-1].softmax(-1)
    wanted = labels[:, 1:]
    known = wanted != -100
    return bool((probabilities[known].gather(-1, wanted[known].unsqueeze(-1)) > _MIN_MARGIN).all())


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(_SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator([QUESTION, RECITAL], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
