"""Tokenising event texts: cutting a long text beforehand changes no token that is kept."""

import random
import string

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from qanchor.bundle.reader import encode_event
from qanchor.data.render import MAX_CHARS_PER_TOKEN, cut_text
from qanchor.tokenization import CLS, PAD, SEP, train_event_tokenizer

LETTERS = [*string.ascii_letters, *"0123456789äßé中文日😀\u0301"]
PUNCTUATION = [*".,:;-_/%+\"'()#@", "[SEP]", "\t", "\n", "\u00a0", "\u3000", "\x1e"]


def random_text(rng: random.Random, num_words: int) -> str:
    """Words of 1 to 90 letters between blanks, commas and other marks."""
    words = []
    for _ in range(num_words):
        words.extend(rng.choices(LETTERS, k=rng.choice((1, 3, 5, 8, 12, 90))))
        words.extend(rng.choices([" ", "  ", ", ", *PUNCTUATION], weights=[60, 5, 10, *[1] * 21]))
    return "".join(words)


def word_piece(texts: list[str]) -> Tokenizer:
    """The way BERT tokenises."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=[PAD, "[UNK]", CLS, SEP], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing((SEP, 3), (CLS, 2))
    return tokenizer


@pytest.mark.parametrize("kind", ["word piece", "byte pairs"])
def test_the_tokens_of_a_cut_text_are_those_of_the_whole(kind: str) -> None:
    rng = random.Random(5)
    sample = [random_text(rng, 20) for _ in range(50)]
    # Long words that are frequent become one token each.
    sample += ["x" * 90, "y-" * 40] * 50
    tokenizer = word_piece(sample) if kind == "word piece" else train_event_tokenizer(sample, 400)
    num_cut = 0
    for _ in range(40):
        limit = rng.choice((2, 3, 9, 28))
        text = random_text(rng, 400)
        for whole in (text, ("x" * 90 + " ") * 40 + text):
            cut = cut_text(whole, limit)
            num_cut += cut != whole
            assert len(cut) < limit * MAX_CHARS_PER_TOKEN + 2000
            assert encode_event(tokenizer, cut, limit) == encode_event(tokenizer, whole, limit)
    assert num_cut > 40
