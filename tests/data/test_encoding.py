"""Token sequences: spans and chat templates for three kinds of tokenizers, and batches that keep mask and labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, PretrainedConfig, PreTrainedTokenizerFast

from clue.data.encoding import IGNORED, batches, collate, encode, length_limit, pad_id
from clue.data.records import Record, read
from clue.errors import ModelError, RecordError

QA = [("Where was Alva Stone born ?", "Upper Cross"), ("What does Bram Wood do ?", "paints")]


def test_prompt_and_answer_spans(bpe: PreTrainedTokenizerFast) -> None:
    for example, (prompt, answer) in zip(encode(read(QA), bpe), QA, strict=True):
        head, tail = example.input_ids[:example.answer_start], example.input_ids[example.answer_start:]
        assert bpe.decode(head) == prompt
        assert bpe.decode(tail) == f" {answer}<|im_end|>"  # joined by one space, closed by the end of sequence
        assert example.question == (0, example.answer_start)
        assert example.input_ids.dtype == np.int64
        # Tokenised apart, yet what the tokenizer makes of the whole.
        assert example.input_ids[:-1].tolist() == bpe(f"{prompt} {answer}")["input_ids"]
    assert bpe.decode(encode(read([("Name:\n", "Bram")]), bpe, append_eos=False)[0].input_ids) == "Name:\nBram"


def test_special_tokens_open_the_sequence_once(bpe_bos: PreTrainedTokenizerFast) -> None:
    question, text = encode([*read(QA[:1]), *read(["the quick brown fox"])], bpe_bos)
    assert question.input_ids[0] == bpe_bos.bos_token_id
    assert question.question == (1, question.answer_start)
    assert text.input_ids.tolist().count(bpe_bos.bos_token_id) == 1
    assert text.answer_start == 1 and bpe_bos.decode(text.input_ids[1:-1]) == "the quick brown fox"


def test_a_token_that_opens_and_ends_sequences_opens_them(bpe_bos: PreTrainedTokenizerFast) -> None:
    opening = bpe_bos.bos_token
    both = PreTrainedTokenizerFast(tokenizer_object=bpe_bos.backend_tokenizer, bos_token=opening, eos_token=opening)
    text, = encode(read(["the quick brown fox"]), both)
    assert [int(at) for at in np.flatnonzero(text.input_ids == both.bos_token_id)] == [0, len(text.input_ids) - 1]


def test_a_question_begins_with_the_token_that_holds_its_first_character(bpe: PreTrainedTokenizerFast) -> None:
    example, = encode(read([(" was Alva born ?", "Upper")]), bpe)
    assert bpe.decode(example.input_ids[:1]) == " was" and example.question == (0, example.answer_start)


def test_the_chat_template_surrounds_the_question(bpe_chat: PreTrainedTokenizerFast) -> None:
    prompt = "  Be brief. Where was Alva born ?\n"  # also stripped by the template, and words the template has too
    example, = encode(read([(prompt, "Upper Cross")]), bpe_chat)
    head, tail = example.input_ids[:example.answer_start], example.input_ids[example.answer_start:]
    assert bpe_chat.decode(head) == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBe brief. Where was"
                                     " Alva born ?<|im_end|>\n<|im_start|>assistant\n")
    assert bpe_chat.decode(tail) == "Upper Cross<|im_end|>"
    assert bpe_chat.decode(example.input_ids[slice(*example.question)]) == "Be brief. Where was Alva born ?"
    plain, = encode(read([(prompt, "Upper Cross")]), bpe_chat, chat="off")
    assert bpe_chat.decode(plain.input_ids) == f"<s>{prompt}Upper Cross<|im_end|>"


def test_sentencepiece_words_keep_their_mark(metaspace: PreTrainedTokenizerFast) -> None:
    example, = encode(read([("Where was Alva born ?", "Upper")]), metaspace, append_eos=False)
    assert "".join(metaspace.convert_ids_to_tokens(example.input_ids[example.answer_start:])) == "\u2581Upper"
    behind, = encode(read([("Where was Alva born ?\n", "Upper")]), metaspace, append_eos=False)
    assert "".join(metaspace.convert_ids_to_tokens(behind.input_ids[behind.answer_start:])) == "Upper"


def test_a_text_is_all_answer_but_its_first_token(bpe: PreTrainedTokenizerFast) -> None:
    example, = encode(read(["the quick brown fox"]), bpe, append_eos=False)
    assert example.answer_start == 1 and bpe.decode(example.input_ids) == "the quick brown fox"
    with pytest.raises(RecordError, match=r"records\[0\]: the text is a single token"):
        encode(read(["0"]), bpe, append_eos=False)


def test_what_does_not_fit_is_refused_by_name(bpe: PreTrainedTokenizerFast) -> None:
    length = len(encode(read(QA[:1]), bpe)[0].input_ids)
    assert len(encode(read(QA[:1]), bpe, max_length=length)) == 1
    with pytest.raises(RecordError, match=rf"records\[0\]: {length} tokens do not fit into {length - 1}; .*max_length"):
        encode(read(QA[:1]), bpe, max_length=length - 1)
    with pytest.raises(ModelError, match="no chat template"):
        encode(read(QA), bpe, chat="on")


def test_a_model_takes_no_more_than_its_context() -> None:
    def limits(config: PretrainedConfig) -> list[int]:
        return [length_limit(SimpleNamespace(config=config), wanted) for wanted in (0, 47, 49)]  # type: ignore[arg-type]

    assert limits(LlamaConfig(max_position_embeddings=48)) == [48, 47, 48]
    assert limits(MambaConfig()) == [0, 47, 49]  # which names none


@pytest.mark.parametrize("tokenizer", [None, "HuggingFaceTB/SmolLM2-135M-Instruct", len])
def test_what_is_no_tokenizer_is_told(tokenizer: object) -> None:
    for use in (pad_id, lambda it: encode([Record("a", "b")], it)):
        with pytest.raises(ModelError, match="the tokenizer must be a loaded Hugging Face tokenizer, got .*from_pretrained"):
            use(tokenizer)


def test_missing_special_tokens(bpe: PreTrainedTokenizerFast) -> None:
    assert pad_id(bpe) == bpe.pad_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer, eos_token="<|im_end|>")
    assert pad_id(bare) == bare.eos_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    with pytest.raises(ModelError, match="neither a pad nor an end-of-sequence token: set tokenizer.pad_token"):
        pad_id(bare)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        encode(read(QA), bare)
    assert len(encode(read(QA), bare, append_eos=False)) == 2


def test_batches_keep_the_mask_and_do_not_shift_labels(bpe: PreTrainedTokenizerFast) -> None:
    examples = encode(read(QA), bpe)
    batch = collate(examples, pad=bpe.eos_token_id)  # padding with a token that is also real: only the mask can tell
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape
    for row, example in enumerate(examples):
        n, start = len(example.input_ids), example.answer_start
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        assert batch.input_ids[row, :n].tolist() == example.input_ids.tolist()
        assert batch.labels[row, start:n].tolist() == example.input_ids[start:].tolist()
        assert (batch.labels[row, :start] == IGNORED).all() and (batch.labels[row, n:] == IGNORED).all()
    # The convention of the field: a Hugging Face model shifts these labels itself, to the mean answer-token loss.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2)).eval()
    loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    expected = []
    for example in examples:
        log_p = model(torch.from_numpy(example.input_ids)[None]).logits[0].log_softmax(-1)
        expected += [-log_p[t - 1, example.input_ids[t]] for t in range(example.answer_start, len(example.input_ids))]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_batches_cover_every_example_once(bpe: PreTrainedTokenizerFast) -> None:
    examples = encode([Record("Where ?", str(i)) for i in range(10)], bpe)

    def answers(generator: torch.Generator | None) -> list[int]:
        some = list(batches(examples, 4, generator=generator, pad=pad_id(bpe)))
        assert [len(b.input_ids) for b in some] == [4, 4, 2]
        return [int(bpe.decode(row[row != IGNORED][:-1])) for b in some for row in b.labels]

    assert answers(None) == list(range(10))
    shuffled = answers(torch.Generator().manual_seed(1))
    assert sorted(shuffled) == list(range(10)) and shuffled != list(range(10))
    assert shuffled == answers(torch.Generator().manual_seed(1))
