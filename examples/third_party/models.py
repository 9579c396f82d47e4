"""Models of other packages that hold nn.LSTM or nn.GRU: with random weights, or those in the package; nothing is
downloaded.

Each imports its package when it is built, so that one that is not installed is in nobody's way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass
class Case:
    """A model, its inputs, and how to call it: tensors with gradients come back."""

    model: nn.Module
    inputs: Inputs
    call: Callable[[Any, Inputs], Sequence[Tensor]]


@dataclass(frozen=True)
class Entry:
    """What is built from which package, on an input of which shape."""

    package: str  # as pip knows it
    model: str
    input: str
    build: Callable[[], Case]


def asteroid_dprnn() -> Case:
    from asteroid.models import DPRNNTasNet

    return Case(DPRNNTasNet(n_src=2), {"wave": torch.randn(1, 4000)}, lambda model, x: [model(x["wave"])])


def darts_block_gru() -> Case:
    from darts.models.forecasting.block_rnn_model import _BlockRNNModule
    from darts.utils.data.torch_datasets.utils import PLModuleInput

    model = _BlockRNNModule(
        name="GRU",
        input_size=8,
        hidden_dim=64,
        num_layers=2,
        num_layers_out_fc=[],
        future_cov_dim=0,
        target_size=1,
        nr_params=1,
        dropout=0.1,
        input_chunk_length=96,
        output_chunk_length=24,
    )
    inputs = {"target": torch.randn(32, 96, 1), "covariates": torch.randn(32, 96, 7)}
    return Case(model, inputs, lambda model, x: [model(PLModuleInput(x["target"], x["covariates"])).prediction])


def demucs_hybrid() -> Case:
    from demucs.hdemucs import HDemucs

    model = HDemucs(["drums", "bass", "other", "vocals"])
    return Case(model, {"wave": 0.1 * torch.randn(1, 2, 44100)}, lambda model, x: [model(x["wave"])])


def flair_tagger() -> Case:
    from flair.data import Dictionary
    from flair.embeddings import OneHotEmbeddings
    from flair.models import SequenceTagger

    logging.getLogger("flair").setLevel(logging.WARNING)
    words, tags = Dictionary(add_unk=True), Dictionary(add_unk=False)
    for k in range(100):
        words.add_item(f"word{k}")
    for k in range(17):
        tags.add_item(f"tag{k}")
    embeddings = OneHotEmbeddings(words, embedding_length=300)
    model = SequenceTagger(embeddings, tags, "upos", hidden_size=256, allow_unk_predictions=True)
    inputs = {"embedded": torch.randn(32, 40, 300), "lengths": torch.arange(40, 8, -1)}
    # Scores of the transitions between tags, without those from and to the ends, which are -10000.
    return Case(model, inputs, lambda model, x: [model(x["embedded"], x["lengths"])[0][..., :17, :17]])


def gluonts_deepar() -> Case:
    from gluonts.torch.model.deepar.module import DeepARModel

    model = DeepARModel("h", context_length=96, prediction_length=24)
    batch, past, ahead = 32, model._past_length, 24
    inputs = {
        "feat_static_cat": torch.zeros(batch, 1, dtype=torch.long),
        "feat_static_real": torch.randn(batch, 1),
        "past_time_feat": torch.randn(batch, past, 1),
        "past_target": torch.rand(batch, past) + 0.5,
        "past_observed_values": torch.ones(batch, past),
        "future_time_feat": torch.randn(batch, ahead, 1),
        "future_target": torch.rand(batch, ahead) + 0.5,
    }
    return Case(model, inputs, lambda model, x: model.unroll_lagged_rnn(**x)[0])


def kokoro_text_and_prosody() -> Case:
    from kokoro.modules import ProsodyPredictor, TextEncoder

    model = nn.ModuleDict(
        {
            "text": TextEncoder(channels=512, kernel_size=5, depth=3, n_symbols=178),
            "prosody": ProsodyPredictor(style_dim=128, d_hid=512, nlayers=3, dropout=0.2),
        }
    )
    lengths = torch.tensor([60, 48, 31, 12])
    inputs = {
        "phonemes": torch.randint(1, 178, (4, 60)),
        "encoded": torch.randn(4, 512, 60),
        "style": torch.randn(4, 128),
        "lengths": lengths,
        "alignment": torch.eye(60).repeat_interleave(2, dim=1).expand(4, 60, 120).contiguous(),
        "padding": torch.arange(60) >= lengths.unsqueeze(1),
    }

    def call(model: Any, x: Inputs) -> list[Tensor]:
        style, lengths, padding = x["style"], x["lengths"], x["padding"]
        text = model["text"](x["phonemes"], lengths, padding)
        duration, frames = model["prosody"](x["encoded"], style, lengths, x["alignment"], padding)
        pitch, energy = model["prosody"].F0Ntrain(frames, style)
        return [text, duration, pitch, energy]

    return Case(model, inputs, call)


def legere_crnn() -> Case:
    from legere.inference import load_model

    return Case(load_model(), {"lines": torch.rand(16, 1, 32, 800) * 2 - 1}, lambda model, x: [model(x["lines"])])


def medaka_consensus() -> Case:
    import medaka
    from medaka.models import open_model

    weights = Path(medaka.__file__).with_name("data") / "r1041_e82_400bps_sup_v5.2.0_model_pt.tar.gz"
    with open_model(str(weights)) as store:
        model = store.load_model()
    model.normalise = False  # as in training: logits
    # The share of each base on each strand among the reads at a position, and of gaps.
    counts = torch.distributions.Dirichlet(torch.full((10,), 0.3)).sample((8, 2000))
    return Case(model, {"counts": counts}, lambda model, x: [model(x["counts"])])


def stanza_tagger() -> Case:
    from stanza.models.pos.model import Tagger
    from stanza.models.tagger import build_argparse

    arguments = vars(build_argparse().parse_args(["--no_pretrain"]))
    vocabulary = {"word": range(5000), "char": range(100), "upos": range(18), "xpos": range(50), "feats": range(60)}
    model = Tagger(arguments, vocabulary)
    with torch.no_grad():  # what starts at zero would have zeros and no gradients around it
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    sentences = torch.arange(40, 8, -1)
    words = int(sentences.sum())
    letters = torch.randint(1, 13, (words,)).sort(descending=True).values
    mask = torch.arange(40) >= sentences.unsqueeze(1)
    inputs = {
        "word": torch.randint(2, 5000, (32, 40)),
        "word_mask": mask,
        "wordchars": torch.randint(2, 100, (words, 12)),
        "wordchars_mask": torch.arange(12) >= letters.unsqueeze(1),
        "tags": [torch.randint(1, n, (32, 40)) for n in (18, 50, 60)],
        "pretrained": None,
        "word_orig_idx": torch.randperm(words).tolist(),
        "sentlens": sentences.tolist(),
        "wordlens": letters.tolist(),
        "text": None,
    }
    return Case(model, inputs, lambda model, x: [model(**x)[0]])


def stanza_tokenizer() -> Case:
    from stanza.models.tokenization.model import Tokenizer
    from stanza.models.tokenizer import build_argparse

    arguments = vars(build_argparse().parse_args([]))
    arguments |= {"feat_dim": 5, "use_mwt": False}
    model = Tokenizer(arguments, 200, 32, 64, dropout=0.33, feat_dropout=0.05)
    lengths = torch.arange(300, 44, -8)
    inputs = {
        "characters": torch.randint(1, 200, (32, 300)),
        "features": torch.randint(0, 2, (32, 300, 5)).float(),
        "lengths": lengths,
    }
    return Case(model, inputs, lambda model, x: [model(x["characters"], x["features"], x["lengths"])])


def transformers_encodec() -> Case:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig())
    # Without the codebook between them, through which no gradient goes.
    return Case(model, {"wave": torch.randn(1, 1, 24000)}, lambda model, x: [model.decoder(model.encoder(x["wave"]))])


MODELS: dict[str, Entry] = {
    "asteroid": Entry("asteroid", "DPRNNTasNet, separates speech", "0.5 s at 8 kHz", asteroid_dprnn),
    "darts": Entry("darts", "BlockRNNModel with a GRU, forecasts", "32 x 96 steps", darts_block_gru),
    "demucs": Entry("demucs", "HDemucs, separates music", "1 s at 44.1 kHz, stereo", demucs_hybrid),
    "flair": Entry("flair", "SequenceTagger with a CRF", "32 x 9 to 40 words", flair_tagger),
    "gluonts": Entry("gluonts", "DeepAR, forecasts", "32 x 119 steps", gluonts_deepar),
    "kokoro": Entry("kokoro", "text and prosody of speech", "4 x 12 to 60 phonemes", kokoro_text_and_prosody),
    "legere": Entry("legere", "CompactCRNN, reads lines of print", "16 x 32 x 800 pixels", legere_crnn),
    "medaka": Entry("medaka", "GRUModel, consensus of reads of DNA", "8 x 2,000 positions", medaka_consensus),
    "stanza-tagger": Entry("stanza", "Tagger, parts of speech", "32 x 9 to 40 words, letters", stanza_tagger),
    "stanza-tokenizer": Entry("stanza", "Tokenizer", "32 x 52 to 300 characters", stanza_tokenizer),
    "transformers": Entry("transformers", "Encodec, codes audio", "1 s at 24 kHz", transformers_encodec),
}
