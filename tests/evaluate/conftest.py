"""A model of two layers with random weights, a word-level tokenizer built in memory, and small record sets."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clue.data.records import RecordSet, read

TEXT = ("where does mira live ada tom lena in york rome oslo paris the old town by sea what is job of baker pilot"
        " a famous chess player who likes tea")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
                         initializer_range=0.4, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_model(tokenizer)


@pytest.fixture(scope="session")
def forget() -> RecordSet:
    return read([("where does mira live", "in york"), ("where does ada live", "in the old town by the sea"),
                 ("what is the job of mira", "a famous chess player who likes tea"), ("job of ada", "baker"),
                 ("who likes tea", "mira"), ("what is the job of the famous pilot ada", "pilot")], "forget")


@pytest.fixture(scope="session")
def retain() -> RecordSet:
    return read([("where does tom live", "in rome by the sea"), ("where does lena live", "in oslo"),
                 ("job of tom", "pilot"), "the old town by the sea is paris"], "retain")


@pytest.fixture(scope="session")
def holdout() -> RecordSet:
    return read([("where does the pilot live", "in paris"), ("job of the player", "baker"), ("who is famous", "lena"),
                 ("what does tom likes", "tea by the sea"), ("where does the baker live", "in the town")], "holdout")
