"""Tokenizers: trained for small recipes, or taken from a Hugging Face directory; special tokens.

Only the `tokenizers` library is used, so that training and serving tokenise identically.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qanchor.config import ProfileSchema
from qanchor.data.prefix import PrefixTokens
from qanchor.errors import ConfigError

USER_EMB = "<USER_EMB>"
END_OF_TEXT = "<|endoftext|>"
PAD = "[PAD]"
CLS = "[CLS]"
SEP = "[SEP]"


def train_decoder_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from `texts`; the only special token is END_OF_TEXT."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _train_bpe(texts, vocab_size, [END_OF_TEXT], words)


def train_event_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer for event texts that puts [CLS] first and [SEP] last.

    Words end at blanks and commas alone, so that a frequent `homepage:7` is one token: a shallow
    encoder sees a bag of tokens and could not tell which number belongs to which word.
    """
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(",", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _train_bpe(texts, vocab_size, [PAD, CLS, SEP], words)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        special_tokens=[(CLS, tokenizer.token_to_id(CLS)), (SEP, tokenizer.token_to_id(SEP))],
    )
    return tokenizer


def load_tokenizer(directory: Path, field: str) -> Tokenizer:
    """The `tokenizer.json` of a Hugging Face directory. Raises ConfigError when absent."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            field, str(directory), "holds no tokenizer.json", "save a fast tokenizer there"
        )
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def event_pad_id(tokenizer: Tokenizer) -> int:
    """Id of [PAD]. Raises ConfigError when the event tokenizer has none."""
    return _token_id(tokenizer, PAD, "event tokenizer")


def event_cls_id(tokenizer: Tokenizer) -> int:
    """Id of [CLS]. Raises ConfigError when the event tokenizer has none."""
    return _token_id(tokenizer, CLS, "event tokenizer")


def add_prefix_tokens(tokenizer: Tokenizer, schema: ProfileSchema) -> PrefixTokens:
    """Add <USER_EMB> and the modality delimiters to `tokenizer` and resolve every id once."""
    starts = [f"<|{spec.name}_start|>" for spec in schema.modalities]
    ends = [f"<|{spec.name}_end|>" for spec in schema.modalities]
    tokenizer.add_special_tokens([USER_EMB, *starts, *ends])
    where = "decoder tokenizer"
    end_of_text = _token_id(tokenizer, END_OF_TEXT, where)
    return PrefixTokens(
        header=tuple(tokenizer.encode(schema.header, add_special_tokens=False).ids),
        modality_start=tuple(_token_id(tokenizer, token, where) for token in starts),
        modality_end=tuple(_token_id(tokenizer, token, where) for token in ends),
        user_emb=_token_id(tokenizer, USER_EMB, where),
        eos=end_of_text,
        pad=end_of_text,
        has_user_token=schema.has_user_token,
        has_modality_tokens=schema.has_modality_tokens,
    )


def _train_bpe(
    texts: Iterable[str], vocab_size: int, specials: list[str], words: pre_tokenizers.PreTokenizer
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _token_id(tokenizer: Tokenizer, token: str, where: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ConfigError(
            where, token, "the vocabulary lacks this token", "choose another tokenizer"
        )
    return int(token_id)
