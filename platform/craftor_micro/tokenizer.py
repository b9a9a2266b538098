"""A `CLIPTokenizer` whose byte-pair merges make every word of the micro world one token."""

import json
import string

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from craftor_micro.captions import vocabulary

MAX_LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """Train merges on the world's own vocabulary; unknown words fall apart into letters, none is lost."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=list(letters), show_progress=False
    )
    bpe.train_from_iterator([" ".join(vocabulary())], trainer)
    learned = bpe.get_vocab()
    symbols = sorted(set(learned) | set(letters) | {f"{c}</w>" for c in letters})
    vocab = {symbol: index for index, symbol in enumerate([*symbols, BOS, EOS])}
    merges = _merges(bpe)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS)
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    """In the trainer's order, which differs between processes for equally frequent pairs; token ids do not."""
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
