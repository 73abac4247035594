"""Tokenizers trained on the spot: byte-level BPE (as GPT-2, Llama 3) and SentencePiece-like (as Llama 2)."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["Where was Alva Stone born ?", "She was born in Upper Cross, near the old mill.", "What does Bram Wood do ?",
          "He paints signs and sells clocks.", "the quick brown fox jumps over the lazy dog", "0 1 2 3 4 5 6 7 8 9"]

# As ChatML: turns open and close with special tokens, the template strips the content, a system turn comes first.
CHATML = ("<|im_start|>system\nBe brief.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
          "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def byte_level(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>",
                                   bos_token="<s>" if bos else None, clean_up_tokenization_spaces=False)
    if chat:
        made.chat_template = CHATML
    return made


def sentencepiece_like() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=["\n"], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def bpe_bos() -> PreTrainedTokenizerFast:
    return byte_level(bos=True)


@pytest.fixture(scope="session")
def bpe_chat() -> PreTrainedTokenizerFast:
    return byte_level(chat=True, bos=True)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return sentencepiece_like()
