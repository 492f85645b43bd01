"""Event vectors of all distinct texts, encoded once: for encoders that do not change meanwhile."""

from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from qanchor.encoder.event_encoder import EventEncoder
from qanchor.train.corpus import PrefixCorpus

TEXTS_PER_CHUNK = 8192


@torch.inference_mode()
def with_event_vectors(corpus: PrefixCorpus, event_encoder: EventEncoder) -> PrefixCorpus:
    """The corpus with the event vector of every distinct text beside it (float32, in RAM)."""
    device = next(event_encoder.parameters()).device
    was_training = event_encoder.training
    event_encoder.eval()
    num_texts = len(corpus.text_offsets) - 1
    order_N = np.argsort(corpus.text_lens(np.arange(num_texts)), kind="stable")
    vectors_NE = torch.empty(num_texts, event_encoder.event_dim)
    with tqdm(total=num_texts, desc="encoding event texts", unit="text") as bar:
        for start in range(0, num_texts, TEXTS_PER_CHUNK):
            rows_N = order_N[start : start + TEXTS_PER_CHUNK]
            texts_NT = torch.from_numpy(corpus.padded_texts(rows_N)).to(device)
            vectors_NE[torch.from_numpy(rows_N)] = event_encoder.in_pieces(texts_NT).float().cpu()
            bar.update(len(rows_N))
    event_encoder.train(was_training)
    return replace(corpus, event_vectors=vectors_NE.numpy())
