"""The renderer: a picture from a caption and up to two reference pictures, by rectified flow in the latents of a VAE.

    python -m atlas.build --scenes 60000         the pictures to learn from
    python genevolve.py train-renderer           VAE, then diffusion transformer, into weights/vae and weights/renderer

    renderer = diffusion.Renderer.load("weights/renderer", "weights/vae")
    images = renderer.render(["A sign with the text \\"KEL7\\"."], [[]], seeds=[0], sampler="midpoint")

Direction of time and sign of the velocity, everywhere in this file: x_t = (1 - t) x_0 + t e with noise e ~ N(0, 1), so
t = 0 is the picture, t = 1 is noise, v = dx/dt = e - x_0 = (x_t - x_0) / t, and sampling walks from t = 1 down to 0.

Where this departs from the large renderers it stands for, and why:

1. The network predicts x_0, not v (v follows from it): at this size it learns faster, and x_0 needs no large outputs.
2. Words are known words; a string in capitals or digits is read character by character, each with its place in the
   string, because drawing "KEL7" takes copying, not vocabulary. A subject's name is [UNK]: looks come from pictures.
3. The condition is encoded once per picture; its keys and values are reused at every step. It never sees t.
4. A middle layer also learns to say what each cell will show. That loss only speeds up learning.

Dimension letters: B pictures, H W pixels, h w latents (a quarter of H and W), C latent channels, N tokens of a picture
(patches of 2 x 2 latents), T condition tokens of the longest row, S condition tokens of all rows, D width, K heads,
R references of a picture.

Contents, in reading order:

    VAE, vae_loss                        pixels <-> latents
    caption_tokens                       words, characters with their places, ordinals that name a reference
    PromptRow, Prompts, pack             conditions of several pictures without padding
    Transformer                          x_0 from x_t, t and the condition
    noised, integrate, guided_velocity   rectified flow, its samplers, classifier-free guidance
    Renderer                             prompts and references in, pictures out
    train_vae                            the first training loop
    flow_loss, MuonAdamW                 the loss and the optimizer of the transformer
    Machine room                         train_renderer (the second training loop; it resumes by itself), folders, PNG
"""
import copy
import json
import math
import os
import re
import shutil
import struct
import time
import zlib
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch import nn

import model

# ---- VAE: pictures and latents ---------------------------------------------------------------------------------------

@dataclass
class VAEConfig:
    model_type: str = "genevolve_vae"
    width: int = 160
    channels: int = 8  # of a latent; a latent stands for 4 x 4 pixels
    factor: int = 4


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2)), times a learned weight if ``learned``; computed in the type of x."""

    def __init__(self, size, learned=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if learned else None

    def forward(self, x):
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


class PixelBlock(nn.Module):
    """Residual perceptron on each patch by itself."""

    def __init__(self, width):
        super().__init__()
        self.norm = RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        hidden = F.gelu(self.up(self.norm(x)))
        return x + self.down(hidden)


class VAE(nn.Module):
    """A patch of 4 x 4 pixels <-> one latent; neighbours mix only in the last 3 x 3 convolution of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        channels = config.channels
        pixels = config.factor**2  # of a patch

        self.encoder = nn.Sequential(
            nn.Linear(3 * pixels, width),
            PixelBlock(width),
            PixelBlock(width),
            RMSNorm(width),
            nn.Linear(width, 2 * channels),  # mean and log variance
        )
        self.decoder = nn.Sequential(
            nn.Linear(channels, width),
            PixelBlock(width),
            PixelBlock(width),
            RMSNorm(width),
            nn.Linear(width, 8 * pixels),  # eight features a pixel
        )
        self.out = nn.Conv2d(8, 3, 3, padding=1)

        # statistics of the latents, measured after training: the flow works on latents of mean 0 and deviation 1
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def encode(self, pixels):
        """(B, 3, H, W) in -1..1 -> mean and log variance of the latents, both (B, h, w, C)."""
        patches = F.pixel_unshuffle(pixels, self.config.factor)  # (B, 48, h, w)
        moments = self.encoder(patches.permute(0, 2, 3, 1)).float()  # (B, h, w, 2C)
        mean, log_variance = moments.chunk(2, -1)
        return mean, log_variance.clamp(-12, 4)

    def decode(self, latents):
        """(B, h, w, C) -> (B, 3, H, W), about -1..1."""
        patches = self.decoder(latents).permute(0, 3, 1, 2)  # (B, 8 * 16, h, w)
        features = F.pixel_shuffle(patches, self.config.factor)  # (B, 8, H, W)
        return self.out(features).float()  # (B, 3, H, W)

    def to_latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, h, w, C), without sampling noise."""
        mean, _ = self.encode(to_pixels(images))
        return (mean - self.mean) / self.std

    def to_images(self, latents):
        """Normalised latents (B, h, w, C) -> uint8 (B, H, W, 3)."""
        pixels = self.decode(latents * self.std + self.mean)  # (B, 3, H, W)
        levels = (pixels.clamp(-1, 1) + 1) * 127.5
        return levels.round().byte().permute(0, 2, 3, 1)  # (B, H, W, 3)


def to_pixels(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae, images, generator, kl_weight=1e-3):
    """Half L1, half L2 reconstruction + kl_weight * KL(q(z|x) || N(0, 1)) per latent number.

    images uint8 (B, H, W, 3). Returns (loss, {"psnr": in dB}).
    """
    pixels = to_pixels(images)  # (B, 3, H, W)
    mean, log_variance = vae.encode(pixels)  # (B, h, w, C)

    # z = mean + deviation * noise: in this form the gradient reaches mean and deviation
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    latents = mean + noise * (log_variance / 2).exp()

    error = vae.decode(latents) - pixels
    square = error.square().mean()
    reconstruction = 0.5 * square + 0.5 * error.abs().mean()
    variance = log_variance.exp()
    kl = 0.5 * (mean.square() + variance - 1 - log_variance).mean()

    psnr = 10 * torch.log10(4 / square.detach())  # pixels span 2, so the peak's square is 4
    return reconstruction + kl_weight * kl, {"psnr": psnr}


# ---- Caption tokens --------------------------------------------------------------------------------------------------

CAPTION_TOKEN = re.compile(r"""
    (?<![^\W_])
    (?P<spelled>
        [^\W_](?:-[^\W_])+(?![\w-])    # K-E-L-7
        |[A-Z0-9]{2,}(?![^\W_])        # KEL7, 1748
        |[0-9](?![^\W_])               # 4
    )
    |[^\W_]+                           # a word
    |[^\w\s]|_                         # a mark
    """, re.VERBOSE)
MAX_PLACE = 15
REFERENCE_ORDINALS = {"first": -1, "second": -2}  # the reference picture that a word names, as a place


def caption_tokens(caption):
    """Caption -> [(token, place)].

    The characters of a string in capitals or digits, or of one spelled with hyphens, are tokens of their own,
    upper-cased, with places 1, 2, 3, ... Words are lower-cased and have place 0; from an ordinal to the end of its
    sentence they have that ordinal's negative place, because they speak of the picture that it names.
    """
    tokens = []
    word_place = 0
    for match in CAPTION_TOKEN.finditer(caption):
        text = match.group()
        if match.group("spelled"):
            characters = text.replace("-", "").upper()
            for i, character in enumerate(characters, 1):
                tokens.append((character, min(i, MAX_PLACE)))
            continue
        word = text.lower()
        if word == ".":
            word_place = 0
        elif word in REFERENCE_ORDINALS:
            word_place = REFERENCE_ORDINALS[word]
        tokens.append((word, word_place))
    return tokens


def train_caption_tokenizer(captions, min_frequency=100):
    """A word-level vocabulary of the tokens seen at least ``min_frequency`` times; names of subjects stay [UNK]."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    trainer = WordLevelTrainer(min_frequency=min_frequency, special_tokens=["[UNK]"], show_progress=False)
    texts = ([token for token, _ in caption_tokens(caption)] for caption in captions)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer, captions, limit):
    """Captions -> [(ids (n,), places (n,))], int64, cut after ``limit`` tokens; an empty caption has none."""
    split = [caption_tokens(caption)[:limit] for caption in captions]
    texts = [[token for token, _ in tokens] for tokens in split]
    encodings = tokenizer.encode_batch(texts, is_pretokenized=True)

    rows = []
    for encoding, tokens in zip(encodings, split):
        ids = torch.tensor(encoding.ids, dtype=torch.long)
        places = [place for _, place in tokens]
        rows.append((ids, torch.tensor(places, dtype=torch.long)))
    return rows


# ---- Conditions: captions and references, packed ---------------------------------------------------------------------

def patchify(latents):
    """(B, h, w, C) -> (B, N, 4C): tokens are patches of 2 x 2 latents."""
    b, h, w, c = latents.shape
    patches = latents.view(b, h // 2, 2, w // 2, 2, c)
    patches = patches.permute(0, 1, 3, 2, 4, 5)  # (B, h / 2, w / 2, 2, 2, C)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens):
    """(B, N, 4C) of a square picture -> (B, h, w, C)."""
    b, n, c = tokens.shape
    side = math.isqrt(n)
    patches = tokens.view(b, side, side, 2, 2, c // 4)
    patches = patches.permute(0, 1, 3, 2, 4, 5)  # (B, h / 2, 2, w / 2, 2, C)
    return patches.reshape(b, 2 * side, 2 * side, c // 4)


class PromptRow(NamedTuple):
    """The condition of one picture."""
    ids: torch.Tensor         # (n,) int64 token ids of the caption
    places: torch.Tensor      # (n,) int64, see ``caption_tokens``
    references: torch.Tensor  # (R, 16, 4C) latents of the references, R may be 0

    def drop(self, text=True, references=True):
        """The row without its words, without its references, or (as guidance needs it) without both."""
        ids, places, latents = self
        if text:
            ids, places = ids[:0], places[:0]
        if references:
            latents = latents[:0]
        return PromptRow(ids, places, latents)


@dataclass
class Prompts:
    """B conditions without padding: first B empty tokens (one a row, so that no row is without any), then the words of
    all rows, then the reference patches of all rows. Rows shorter than the longest one cost nothing."""
    ids: torch.Tensor         # (words,) token ids
    places: torch.Tensor      # (words,) place within a spelled string; -1, -2: speaks of the first, second reference
    positions: torch.Tensor   # (words,) position in the caption
    patches: torch.Tensor     # (patches, 4C) latents of the references
    which: torch.Tensor       # (patches,) 0 = first reference, 1 = second
    cells: torch.Tensor       # (patches,) position within the reference
    grid_index: torch.Tensor  # (S,) where each token goes in the padded grid, row * T + column
    mask: torch.Tensor        # (B, T) bool: True where there is a token

    def to(self, device):
        tensors = [getattr(self, field.name) for field in fields(self)]
        return Prompts(*(tensor.to(device) for tensor in tensors))


def pack(rows, device="cpu", columns=0):
    """[PromptRow] -> Prompts with T = at least ``columns``."""
    word_counts = [len(row.ids) for row in rows]
    patch_counts = [row.references[..., 0].numel() for row in rows]
    lengths = [1 + n + m for n, m in zip(word_counts, patch_counts)]  # with the empty token
    columns = max(columns, *lengths)  # T

    # in the grid, the empty token of a row is followed by its words and then by its patches
    empty_index = torch.arange(len(rows)) * columns
    word_index = []
    patch_index = []
    for start, n, m in zip(empty_index, word_counts, patch_counts):
        word_index.append(start + 1 + torch.arange(n))
        patch_index.append(start + 1 + n + torch.arange(m))

    # of each reference patch: the number of its picture and its position there
    which = []
    cells = []
    for row in rows:
        count, size, _ = row.references.shape  # R, 16, 4C
        which.append(torch.arange(count).repeat_interleave(size))
        cells.append(torch.arange(size).repeat(count))

    prompts = Prompts(
        ids=torch.cat([row.ids for row in rows]),
        places=torch.cat([row.places for row in rows]),
        positions=torch.cat([torch.arange(n) for n in word_counts]),
        patches=torch.cat([row.references.flatten(0, 1) for row in rows]),
        which=torch.cat(which),
        cells=torch.cat(cells),
        grid_index=torch.cat([empty_index, *word_index, *patch_index]),
        mask=torch.arange(columns) < torch.tensor(lengths)[:, None],
    )
    return prompts.to(device)


def to_grid(packed, prompts):
    """(S, K, d) -> (B, K, T, d), zeros where a row has no token."""
    b, t = prompts.mask.shape
    grid = packed.new_zeros(b * t, *packed.shape[1:])
    grid = grid.index_copy(0, prompts.grid_index, packed)  # (B T, K, d)
    return grid.unflatten(0, (b, t)).transpose(1, 2)  # (B, K, T, d)


def from_grid(grid, prompts):
    """(B, K, T, d) -> (S, K d): the inverse of ``to_grid``, with the heads side by side."""
    tokens = grid.transpose(1, 2).flatten(0, 1)  # (B T, K, d)
    return tokens[prompts.grid_index].flatten(1)


@dataclass
class Condition:
    """What the denoiser sees of its prompts: computed once per picture, used at every step."""
    keys: list          # of each layer (B, K, T, D / K)
    values: list        # likewise
    mask: torch.Tensor  # (B, T) bool

    def repeat(self, times):
        """Each row ``times`` times in place: rows 0, 0, 1, 1, ... for times = 2."""
        keys = [k.repeat_interleave(times, 0) for k in self.keys]
        values = [v.repeat_interleave(times, 0) for v in self.values]
        return Condition(keys, values, self.mask.repeat_interleave(times, 0))


# ---- The diffusion transformer ---------------------------------------------------------------------------------------

NEARBY = 4  # words before a word that are mixed into it


@dataclass
class RendererConfig:
    model_type: str = "genevolve_renderer"
    vocabulary: int = 256
    classes: int = 187        # of a cell, for the auxiliary loss
    width: int = 192
    layers: int = 6
    encoder_layers: int = 2   # over the condition tokens
    heads: int = 3
    channels: int = 8         # of a latent
    tokens: int = 64          # of a picture: 8 x 8
    reference_tokens: int = 16
    references: int = 2
    max_words: int = 96       # of a caption; the rest is cut


class SwiGLU(nn.Module):
    """down(a * silu(gate)) with (a, gate) = up(x); hidden size 8/3 of the width, rounded down to a multiple of 64."""

    def __init__(self, width):
        super().__init__()
        hidden = width * 8 // 3 // 64 * 64
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        a, gate = self.up(x).chunk(2, -1)
        return self.down(a * F.silu(gate))


def split_heads(x, parts, heads):
    """A joint projection (..., parts * D) -> ``parts`` tensors (..., K, D / K): queries, keys, values."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(d)) v; q (B, K, N, d), k and v (B, K, T, d), mask (B, 1, 1, T) bool -> (B, K, N, d).

    Written out where a CPU needs gradients: there, at this size, the fused kernel is slow in its backward pass.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        with model.products("mkl"):  # see ``model.FusedAttention``
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1]**-0.5) @ k.transpose(-1, -2)  # (B, K, N, T)
    weights = scores.masked_fill(~mask, -1e4).softmax(-1)
    return weights.to(v.dtype) @ v


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer over packed condition tokens; only its attention sees the padded grid."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        head_width = c.width // c.heads
        self.norm1 = RMSNorm(c.width)
        self.norm2 = RMSNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.mlp = SwiGLU(c.width)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)

    def forward(self, x, prompts):
        """x (S, D) -> (S, D)."""
        qkv = self.qkv(self.norm1(x))
        q, k, v = split_heads(qkv, 3, self.heads)  # (S, K, D / K)
        q = to_grid(self.q_norm(q), prompts)  # (B, K, T, D / K)
        k = to_grid(self.k_norm(k), prompts)
        v = to_grid(v, prompts)

        attended = attend(q, k, v, prompts.mask[:, None, None])  # (B, K, T, D / K)
        x = x + self.out(from_grid(attended, prompts))  # (S, D)
        return x + self.mlp(self.norm2(x))


class Block(nn.Module):
    """A layer over picture tokens: attention to themselves and the condition at once, then a perceptron.

    AdaLN: time gives six vectors, shared by all layers; each layer adds its own offset to them.
    """

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        head_width = c.width // c.heads
        self.norm = RMSNorm(c.width, learned=False)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.mlp = SwiGLU(c.width)
        self.condition_kv = nn.Linear(c.width, 2 * c.width)
        self.q_norm = RMSNorm(head_width)
        self.k_norm = RMSNorm(head_width)
        self.condition_k_norm = RMSNorm(head_width)
        self.offset = nn.Parameter(torch.zeros(6, c.width))

    def read(self, tokens, prompts):
        """Packed condition tokens (S, D) -> this layer's keys and values, both (B, K, T, D / K)."""
        k, v = split_heads(self.condition_kv(tokens), 2, self.heads)  # (S, K, D / K)
        return to_grid(self.condition_k_norm(k), prompts), to_grid(v, prompts)

    def forward(self, x, modulation, contexts):
        """x (B, N, D), modulation (B, 6, D), contexts [(keys, values, mask)] for the rows from first to last."""
        vectors = (modulation + self.offset).to(x.dtype)  # (B, 6, D)
        scale1, shift1, gate1, scale2, shift2, gate2 = vectors[:, :, None].unbind(1)  # (B, 1, D)

        normed = self.norm(x) * (1 + scale1) + shift1
        attended = self.attention(normed, contexts)  # (B, N, D)
        x = x + (1 + gate1) * self.out(attended)

        normed = self.norm(x) * (1 + scale2) + shift2
        return x + (1 + gate2) * self.mlp(normed)

    def attention(self, x, contexts):
        """Each picture token attends to its picture and to the picture's condition, in one softmax. (B, N, D)."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (B, N, K, D / K)
        q = self.q_norm(q.transpose(1, 2))  # (B, K, N, D / K)
        k = self.k_norm(k.transpose(1, 2))
        v = v.transpose(1, 2)

        # contexts differ in length: each serves its own rows, so that short ones need no padding to long ones
        attended = []
        begin = 0
        for condition_keys, condition_values, mask in contexts:
            rows = slice(begin, begin + len(mask))
            keys = torch.cat([k[rows], condition_keys], 2)  # (rows, K, N + T, D / K)
            values = torch.cat([v[rows], condition_values], 2)
            attended.append(attend(q[rows], keys, values, mask))  # (rows, K, N, D / K)
            begin = rows.stop
        return torch.cat(attended).transpose(1, 2).flatten(2)  # (B, N, D)


class Transformer(nn.Module):
    """x_0 from x_t, t and a condition. ``encode`` once per picture, then call at every step."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config

        # words of the condition
        self.word = nn.Embedding(c.vocabulary, c.width)
        self.place = nn.Embedding(MAX_PLACE + 1, c.width)
        self.position = nn.Embedding(c.max_words, c.width)
        self.nearby = nn.Linear(NEARBY * c.width, c.width, bias=False)
        self.empty = nn.Parameter(torch.randn(c.width) * 0.02)

        # references of the condition
        self.which = nn.Embedding(c.references, c.width)
        self.cell = nn.Embedding(c.reference_tokens, c.width)
        self.from_reference = nn.Linear(4 * c.channels, c.width)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.encoder_layers))
        self.encoder_norm = RMSNorm(c.width)

        # the picture
        self.from_latents = nn.Linear(4 * c.channels, c.width)
        self.token = nn.Parameter(torch.randn(c.tokens, c.width) * 0.02)
        self.time = nn.Sequential(
            nn.Linear(128, c.width),
            nn.SiLU(),
            nn.Linear(c.width, c.width),
            nn.SiLU(),
            nn.Linear(c.width, 6 * c.width),
        )
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.classes = nn.Linear(c.width, c.classes)
        self.out_norm = RMSNorm(c.width)
        self.to_latents = nn.Linear(c.width, 4 * c.channels)
        self.initialize()

    def initialize(self):
        """Weights that depart from PyTorch's defaults: embeddings, and layers that add nothing at first."""
        nn.init.normal_(self.word.weight, std=0.3)
        nn.init.normal_(self.place.weight, std=0.3)
        nn.init.normal_(self.which.weight, std=0.3)
        nn.init.normal_(self.cell.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.02)
        nn.init.zeros_(self.time[-1].weight)
        nn.init.zeros_(self.time[-1].bias)
        nn.init.zeros_(self.to_latents.weight)
        nn.init.zeros_(self.nearby.weight)

    def encode(self, prompts):
        """Prompts -> Condition."""
        empty = self.empty.expand(len(prompts.mask), -1)  # (B, D)
        words = self.embed_words(prompts)
        patches = self.from_reference(prompts.patches)
        patches = patches + self.which(prompts.which) + self.cell(prompts.cells)
        x = torch.cat([empty, words, patches.to(words.dtype)])  # (S, D)

        for block in self.encoder:
            x = block(x, prompts)
        x = self.encoder_norm(x)

        condition = Condition([], [], prompts.mask)
        for block in self.blocks:
            keys, values = block.read(x, prompts)
            condition.keys.append(keys)
            condition.values.append(values)
        return condition

    def embed_words(self, prompts):
        """(words, D): each word with its place, the words just before it and its position."""
        # a word carries the vector of the reference that it speaks of, so attention can match "the first ... left" with
        # the patches of that reference
        ordinal = -1 - prompts.places  # 0, 1: first, second reference; negative: none
        reference = self.which(ordinal.clamp(min=0))
        place = self.place(prompts.places.clamp(min=0))
        has_reference = (ordinal >= 0)[:, None]
        words = self.word(prompts.ids) + torch.where(has_reference, reference, place)

        # "the cone is yellow": an attribute belongs to the words just before it, so those are mixed into it
        before = []
        for k in range(1, NEARBY + 1):
            shifted = F.pad(words, (0, 0, k, 0))[:len(words)]
            same_caption = (prompts.positions >= k)[:, None]
            before.append(shifted * same_caption)
        before = torch.cat(before, 1)  # (words, NEARBY * D)
        return words + self.nearby(before) + self.position(prompts.positions)

    def forward(self, x, t, condition, with_classes=False):
        """x_t (B, N, 4C), t (B,) in 0..1 -> x_0 (B, N, 4C), and the class logits (B, N, classes) if asked for.

        condition: a Condition, or several that follow each other along B: short ones need no padding to long ones.
        """
        conditions = condition if isinstance(condition, list) else [condition]
        masks = []
        for c in conditions:
            mask = F.pad(c.mask, (x.shape[1], 0), value=True)  # picture tokens are always there
            masks.append(mask[:, None, None])  # (rows, 1, 1, N + T)

        modulation = self.time(time_features(t))  # (B, 6 D)
        modulation = modulation.unflatten(-1, (6, -1))
        x = self.from_latents(x) + self.token  # (B, N, D)
        logits = None
        for i, block in enumerate(self.blocks):
            keys = [c.keys[i] for c in conditions]
            values = [c.values[i] for c in conditions]
            x = block(x, modulation, list(zip(keys, values, masks)))
            if with_classes and i == len(self.blocks) // 2:
                logits = self.classes(x)  # (B, N, classes)

        x0 = self.to_latents(self.out_norm(x))  # (B, N, 4C)
        return (x0, logits) if with_classes else x0


def time_features(t):
    """t (B,) -> 64 cosines and 64 sines of frequencies from 160 down to 0.16 turns over 0..1, (B, 128)."""
    index = torch.arange(64, device=t.device)
    frequencies = torch.exp(-math.log(1000) * index / 64)
    angles = 1000 * t[:, None] * frequencies  # (B, 64)
    return torch.cat([angles.cos(), angles.sin()], 1)


# ---- Rectified flow and its samplers ---------------------------------------------------------------------------------

SAMPLERS = ("euler", "midpoint", "ancestral")


def noised(x0, noise, t):
    """x_t = (1 - t) x_0 + t e; x0 and noise (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise


def schedule(steps, shift=3.0):
    """steps + 1 times from 1 to 0: t = shift s / (1 + (shift - 1) s) of evenly spaced s; shift > 1 lingers at noise."""
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).tolist()


def integrate(velocity, x, times, sampler="euler", noise_fn=None, churn=0.6):
    """Follow dx/dt = velocity(x, t) from times[0] to times[-1].

    "euler": first order. "midpoint": second order, two calls a step; unlike Heun it never asks for the velocity at
    t = 0, where (x_t - x_0) / t has no value. "ancestral": v tells x_0 and e; a part of e (a share churn^2 of its
    variance) is replaced by ``noise_fn()`` before x is put together again, so later steps can mend earlier ones'
    errors.
    """
    check_sampler(sampler)
    for t, after in zip(times, times[1:]):
        v = velocity(x, t)
        if sampler == "midpoint":
            middle = (t + after) / 2
            v = velocity(x + (middle - t) * v, middle)
        if sampler == "ancestral" and after > 0:
            x0, e = x - t * v, x + (1 - t) * v
            x = (1 - after) * x0 + after * ((1 - churn**2)**0.5 * e + churn * noise_fn())
        else:
            x = x + (after - t) * v
    return x


def check_sampler(sampler):
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose {', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}")


def guided_velocity(net, condition, unconditional=None, guidance=1.0):
    """The velocity under classifier-free guidance, x_0 = x_0(nothing) + guidance (x_0(prompt) - x_0(nothing)).

    condition holds B prompts; unconditional, which guidance other than 1 needs, B empty ones; one pass is for both.
    """
    def velocity(x, t):
        rows = torch.full((len(x),), t, device=x.device)
        if guidance == 1:
            x0 = net(x, rows, condition)
        else:
            twice = torch.cat([x, x])
            both = net(twice, torch.cat([rows, rows]), [condition, unconditional])
            x0_cond, x0_uncond = both.chunk(2)
            x0 = x0_uncond + guidance * (x0_cond - x0_uncond)
        return (x - x0) / t
    return velocity


# ---- The renderer ----------------------------------------------------------------------------------------------------

class Renderer:
    """Prompts and reference pictures in, pictures out."""

    def __init__(self, vae, net, tokenizer):
        self.vae = vae
        self.net = net
        self.tokenizer = tokenizer
        self.device = vae.mean.device
        patch_side = 2 * vae.config.factor  # pixels
        self.reference_side = patch_side * math.isqrt(net.config.reference_tokens)

    @classmethod
    def load(cls, renderer_dir, vae_dir, device="cpu"):
        """From two checkpoint folders. ValueError, one line, names a file that is missing, damaged or does not fit."""
        vae = load_folder(vae_dir, VAE, VAEConfig, device)
        net = load_folder(renderer_dir, Transformer, RendererConfig, device)
        if vae.config.channels != net.config.channels:
            raise ValueError(f"{renderer_dir}: made for latents of {net.config.channels} channels, "
                             f"{vae_dir} has {vae.config.channels}")
        return cls(vae, net, load_caption_tokenizer(renderer_dir, net.config))

    @torch.inference_mode()
    def render(self, prompts, references, seeds, steps=20, guidance=2.0, sampler="euler", max_batch=0):
        """Prompts, per prompt a list of at most two uint8 (H, W, 3) references (resized to 32 x 32), and seeds, int.

        Returns uint8 (64, 64, 3) pictures. The noise of a picture comes from its seed alone, whatever its batch.
        sampler: one of SAMPLERS. At most ``max_batch`` go at once; 0 means 8 on a CPU, whose caches hold no more,
        else 64. ValueError, one line, for counts that differ, zero steps, an unknown sampler or wrong references.
        """
        if not len(prompts) == len(references) == len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(references)} lists of references, {len(seeds)} seeds")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        check_sampler(sampler)
        if not max_batch:
            max_batch = 8 if self.device.type == "cpu" else 64

        rows = self.conditions(prompts, references)
        images = []
        for start in range(0, len(rows), max_batch):
            part = slice(start, start + max_batch)
            images += self.sample_batch(rows[part], seeds[part], steps, guidance, sampler)
        return images

    def conditions(self, prompts, references):
        """One PromptRow per prompt."""
        words = tokenize(self.tokenizer, prompts, self.net.config.max_words)
        latents = self.encode_references(references)
        return [PromptRow(*tokens, part) for tokens, part in zip(words, latents)]

    def encode_references(self, references):
        """Per prompt a list of uint8 (H, W, 3) pictures -> per prompt latents (R, 16, 4C), on the CPU."""
        c = self.net.config
        for pictures in references:
            if len(pictures) > c.references:
                raise ValueError(f"{len(pictures)} reference pictures: at most {c.references}")
            for picture in pictures:
                check_picture(picture, "a reference picture")

        # the references of all prompts in one pass, then split by prompt
        side = self.reference_side
        resized = [resize(picture, side, side) for pictures in references for picture in pictures]
        latents = torch.zeros(0, c.reference_tokens, 4 * c.channels)
        if resized:
            images = torch.from_numpy(np.stack(resized)).to(self.device)  # (references of all prompts, 32, 32, 3)
            latents = patchify(self.vae.to_latents(images)).cpu()
        return latents.split([len(pictures) for pictures in references])

    def sample_batch(self, rows, seeds, steps, guidance, sampler):
        """[PromptRow] -> uint8 (64, 64, 3) arrays, all in one batch."""
        c = self.net.config
        shape = c.tokens, 4 * c.channels
        generators = [torch.Generator().manual_seed(int(seed) % 2**63) for seed in seeds]  # one a picture

        def noise_fn():
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(self.device)  # (B, N, 4C)

        unconditional = None
        if guidance != 1:
            empty_rows = [row.drop() for row in rows]
            unconditional = self.net.encode(pack(empty_rows, self.device))
        condition = self.net.encode(pack(rows, self.device))
        velocity = guided_velocity(self.net, condition, unconditional, guidance)

        x = integrate(velocity, noise_fn(), schedule(steps), sampler, noise_fn)  # (B, N, 4C)
        images = self.vae.to_images(unpatchify(x))  # (B, H, W, 3)
        return list(images.cpu().numpy())


# ---- Training: the data ----------------------------------------------------------------------------------------------

class Scenes:
    """The renderer's training file: pictures, references, classes of cells, captions. The last 2 % are held out."""

    def __init__(self, folder):
        path = os.path.join(folder, "scenes.safetensors")
        with model.open_tensors(path) as file:
            self.image = file.get_tensor("image")            # (scenes, 64, 64, 3) uint8
            self.references = file.get_tensor("references")  # (scenes, 2, 32, 32, 3) uint8
            self.count = file.get_tensor("reference_count")  # (scenes,) uint8: how many of the two are meant
            self.labels = file.get_tensor("labels")          # (scenes, 8, 8) uint8: class of each cell
            metadata = file.metadata() or {}
        self.classes = int(metadata.get("classes", self.labels.max() + 1))

        with open(os.path.join(folder, "scenes.jsonl"), encoding="utf-8") as file:
            self.captions = [json.loads(line)["caption"] for line in file]
        if len(self.captions) != len(self.image):
            raise ValueError(f"{path}: {len(self.image)} pictures for {len(self.captions)} captions")
        held_out = max(1, len(self.image) // 50)
        self.train = len(self.image) - held_out  # rows before this one are for training


def step_generator(seed, step):
    """The generator of one training step: a run that stops and resumes draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ---- Training: the VAE -----------------------------------------------------------------------------------------------

@dataclass
class VAETraining:
    """Settings of train_vae."""
    steps: int = 2000         # optimizer steps
    batch: int = 16           # pictures a step
    lr: float = 3e-3          # peak learning rate of AdamW; cosine to 2 %
    kl_weight: float = 1e-3   # weight of the KL term
    seed: int = 0
    bf16: bool = True         # matrix products in bfloat16; weights stay float32
    log_every: int = 100      # steps a log line


def train_vae(data, out, settings=None, device="cpu"):
    """Train the VAE on ``data.image`` and write it to the folder ``out``. Returns the VAE."""
    s = settings or VAETraining()
    started = time.time()
    torch.manual_seed(s.seed)
    vae = VAE(VAEConfig()).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), s.lr, betas=(0.9, 0.99))

    for step in range(s.steps):
        # learning rate: 50 steps of warm-up, cosine to 2 %
        warmup = min(1, (step + 1) / 50)
        cosine = 0.5 * (1 + math.cos(math.pi * step / s.steps))
        optimizer.param_groups[0]["lr"] = s.lr * warmup * (0.02 + 0.98 * cosine)

        # a batch of pictures
        generator = step_generator(s.seed, step)
        index = torch.randint(data.train, (s.batch,), generator=generator)
        images = data.image[index].to(device)  # (B, H, W, 3)

        # forward
        with torch.autocast(vae.mean.device.type, torch.bfloat16, enabled=s.bf16):
            loss, metrics = vae_loss(vae, images, generator, s.kl_weight)

        # backward and update
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        # log
        if (step + 1) % s.log_every == 0 or step + 1 == s.steps:
            seconds = time.time() - started
            seconds_left = seconds / (step + 1) * (s.steps - step - 1)
            print(f"vae {step + 1}/{s.steps}  loss {loss.item():.4f}  psnr {metrics['psnr'].item():.1f} dB  "
                  f"{seconds:.0f} s  {seconds_left:.0f} s left", flush=True)

    # the flow needs latents of mean 0 and deviation 1
    measure_latents(vae, data, device)
    training = {
        "command": model.command_line(),
        "settings": asdict(s),
        "seconds": round(time.time() - started),
        "final_loss": loss.item(),
        "held_out_psnr": held_out_psnr(vae, data, device),
    }
    save_folder(out, vae, training)
    return vae.eval()


@torch.no_grad()
def measure_latents(vae, data, device):
    """Set the VAE's statistics of the latents, from the first 2,000 training pictures."""
    means = []
    sample = data.image[:min(2000, data.train)]
    for images in sample.split(250):
        mean, _ = vae.encode(to_pixels(images.to(device)))  # (250, h, w, C)
        means.append(mean)
    means = torch.cat(means)
    vae.mean.copy_(means.mean((0, 1, 2)))
    vae.std.copy_(means.std((0, 1, 2)))


@torch.no_grad()
def held_out_psnr(vae, data, device):
    """Peak signal-to-noise ratio in dB of a round trip through the latents, over 200 pictures held out."""
    images = data.image[data.train:data.train + 200].to(device)
    decoded = vae.to_images(vae.to_latents(images))
    error = decoded.float() - images.float()
    return 10 * math.log10(255**2 / error.square().mean().item())


# ---- Training: the transformer ---------------------------------------------------------------------------------------

@dataclass
class RendererTraining:
    """Settings of train_renderer."""
    width: int = 192
    layers: int = 6
    heads: int = 3
    steps: int = 6400             # optimizer steps
    batch: int = 32               # pictures a step
    levels: int = 2               # noise levels for each of them
    lr: float = 3e-3              # of AdamW: embeddings, vectors, input and output layers
    muon_lr: float = 0.01         # of Muon: the matrices of the layers
    warmup: int = 100             # steps in which the rates rise
    decay: float = 0.4            # share of the steps, at the end, in which they fall to 1 %
    ema: float = 0.998            # of the averaged weights, which are the ones that are kept
    pure_noise: float = 0.2       # share of samples at t = 1
    shift: float = 3.0            # of the other noise levels, as in ``schedule``
    drop_text: float = 0.1        # condition dropout: no words
    drop_references: float = 0.1  # no reference pictures
    drop_both: float = 0.07       # neither
    class_weight: float = 0.3     # of the cell class loss
    min_frequency: int = 100      # of a word, to be known
    seed: int = 0
    bf16: bool = True             # matrix products in bfloat16; weights stay float32
    compile: bool = False         # torch.compile the layers over picture tokens (two minutes, then twice as fast)
    start: str = ""               # folder of a trained renderer to begin with, instead of with random weights
    log_every: int = 50           # steps a log line
    export_every: int = 250       # steps between written weights


LEVELS = (0.25, 0.5, 0.75, 1.0)  # the loss is logged for t below each of these, and for pure noise


def flow_loss(net, prompts, x0, labels, generator, s, denoise=None):
    """Rectified flow in x_0-prediction, ``s.levels`` noise levels a picture, + class_weight * cells' cross-entropy.

    (x_0' - x_0)^2 has weight 1 / max(t, 1/4): between that of x_0 (1) and that of v (1 / t^2).
    x0 (B, N, 4C), labels (B, N) int64; ``denoise`` is a compiled net.
    Returns (loss, {"class_loss", "t": (B * levels,), "x0_error": (B * levels,) squared errors}).
    """
    # the condition is encoded once, whatever the number of noise levels
    condition = net.encode(prompts).repeat(s.levels)
    x0 = x0.repeat_interleave(s.levels, 0)  # (B * levels, N, 4C)
    labels = labels.repeat_interleave(s.levels, 0)

    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t = noise_levels(len(x0), generator, s).to(x0.device)
    xt = noised(x0, noise, t)

    if denoise is None:
        denoise = net
    predicted, logits = denoise(xt, t, condition, with_classes=True)
    error = predicted.float() - x0
    x0_error = error.square().mean((1, 2))  # (B * levels,)
    flow = (x0_error / t.clamp(min=0.25)).mean()

    logits = logits.float().flatten(0, 1)  # (B * levels * N, classes)
    class_loss = F.cross_entropy(logits, labels.flatten())
    metrics = {"class_loss": class_loss.detach(), "t": t, "x0_error": x0_error.detach()}
    return flow + s.class_weight * class_loss, metrics


def noise_levels(count, generator, s):
    """t (count,): 1 for a share ``s.pure_noise``, else uniform numbers shifted towards noise as in ``schedule``."""
    uniform, pure = torch.rand(2, count, generator=generator)
    shifted = s.shift * uniform / (1 + (s.shift - 1) * uniform)
    return torch.where(pure < s.pure_noise, 1.0, shifted)


def training_rows(data, tokens, vae, index, generator, s):
    """(rows for ``pack`` with condition dropout, normalised latents (B, N, 4C)) of the pictures ``index``."""
    device = vae.mean.device
    images = data.image[index].to(device)  # (B, H, W, 3)
    x0 = patchify(vae.to_latents(images))  # (B, N, 4C)

    # the references of all rows in one pass, then split by row
    counts = data.count[index].long()  # (B,)
    order = torch.arange(data.references.shape[1])
    present = order < counts[:, None]  # (B, 2)
    pictures = data.references[index][present].to(device)  # (sum of counts, 32, 32, 3)
    latents = patchify(vae.to_latents(pictures)).cpu()  # (sum of counts, 16, 4C)
    references = latents.split(counts.tolist())

    # condition dropout teaches the unconditional x_0 that guidance needs
    text_dice, reference_dice, both_dice = torch.rand(3, len(index), generator=generator)
    drop_both = both_dice < s.drop_both
    drop_text = (text_dice < s.drop_text) | drop_both
    drop_references = (reference_dice < s.drop_references) | drop_both

    rows = []
    for row, scene in enumerate(index.tolist()):
        complete = PromptRow(*tokens[scene], references[row])
        rows.append(complete.drop(drop_text[row], drop_references[row]))
    return rows, x0


class MuonAdamW:
    """Muon for the matrices of the layers, AdamW for everything else.

    Muon (Jordan, 2024) replaces the momentum of a matrix by the nearest one with all singular values about 1, found by
    five Newton-Schulz steps X <- aX + b(XX')X + c(XX')^2 X, and scales it by sqrt(rows / columns) where that exceeds 1.
    """

    def __init__(self, net, lr, muon_lr):
        self.lr = lr
        self.muon_lr = muon_lr
        self.matrices = []
        others = []
        for name, p in net.named_parameters():
            in_layer = name.startswith(("encoder.", "blocks."))
            if in_layer and name.endswith("weight") and p.dim() == 2:
                self.matrices.append(p)
            else:
                others.append(p)

        self.adam = torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.state = self.adam.state  # parameter -> its tensors, for both kinds, as an optimizer of PyTorch has it
        for p in self.matrices:
            self.state[p] = {"momentum": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, scale):
        """One step with both learning rates times ``scale``."""
        self.adam.param_groups[0]["lr"] = self.lr * scale
        self.adam.step()
        for p in self.matrices:
            momentum = self.state[p]["momentum"]
            momentum.mul_(0.95).add_(p.grad)
            update = orthogonal(p.grad + 0.95 * momentum)  # Nesterov's look ahead
            rows, columns = p.shape
            rate = self.muon_lr * scale * max(1, rows / columns)**0.5
            p.add_(update.to(p.dtype), alpha=-rate)

    def zero_grad(self):
        self.adam.zero_grad()
        for p in self.matrices:
            p.grad = None


def orthogonal(matrix):
    """The orthogonal factor of a matrix, roughly (singular values 0.7 to 1.2), in bfloat16."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:  # the smaller Gram matrix
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


# ==== Machine room ====================================================================================================

# ---- Training runs: checkpoints, log, command ------------------------------------------------------------------------

FREE_SETTINGS = ("compile", "log_every", "export_every")  # a run that goes on may have other ones


class RendererRun:
    """A training run of the transformer: everything that a checkpoint has to hold."""

    def __init__(self, data, vae, out, settings, device="cpu"):
        self.data = data
        self.vae = vae
        self.out = out
        self.settings = settings
        self.device = torch.device(device)
        self.checkpoints = checkpoints_of(out)

        torch.manual_seed(settings.seed)
        self.net, self.tokenizer = self.open_network()
        self.ema_net = copy.deepcopy(self.net).requires_grad_(False)  # averaged weights
        self.optimizer = MuonAdamW(self.net, settings.lr, settings.muon_lr)
        self.denoise = torch.compile(self.net) if settings.compile else self.net

        c = self.net.config
        self.tokens = tokenize(self.tokenizer, data.captions, c.max_words)
        longest = max(len(ids) for ids, _ in self.tokens)
        self.columns = 1 + longest + c.references * c.reference_tokens  # T of the longest condition

        self.step = 0
        self.seconds = 0.0
        self.skipped = 0   # updates in a row whose gradient was no number
        self.metrics = {}  # of the last log line
        self.resume()

    def open_network(self):
        """(net, tokenizer): of the folder ``settings.start``, or new ones; an unfinished run keeps its tokenizer."""
        s = self.settings
        if s.start:
            net = load_folder(s.start, Transformer, RendererConfig, self.device).train()
            return net, load_caption_tokenizer(s.start, net.config)

        if os.path.isdir(self.checkpoints):
            tokenizer = load_caption_tokenizer(self.out)
        else:
            captions = self.data.captions[:self.data.train]
            tokenizer = train_caption_tokenizer(captions, s.min_frequency)
        config = RendererConfig(
            vocabulary=tokenizer.get_vocab_size(),
            classes=self.data.classes,
            width=s.width,
            layers=s.layers,
            heads=s.heads,
            channels=self.vae.config.channels,
        )
        return Transformer(config).to(self.device), tokenizer

    def update(self):
        """One optimizer step. Returns {"loss", "class_loss", "grad_norm", "t", "x0_error"}, see ``flow_loss``."""
        s = self.settings
        generator = step_generator(s.seed, self.step)

        # a batch of pictures
        index = torch.randint(self.data.train, (s.batch,), generator=generator)
        labels = self.data.labels[index].flatten(1)  # (B, N)
        labels = labels.long().to(self.device)
        columns = self.columns if s.compile else 0  # compiled code wants one shape

        # forward: the frozen VAE gives latents, the loss needs gradients of the transformer alone
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
            with torch.no_grad():
                rows, x0 = training_rows(self.data, self.tokens, self.vae, index, generator, s)
            prompts = pack(rows, self.device, columns)
            loss, metrics = flow_loss(self.net, prompts, x0, labels, generator, s, self.denoise)

        # backward and update
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
        self.skipped = model.count_skipped(self.skipped, grad_norm.item(), f"renderer: step {self.step}")
        if not self.skipped:
            self.optimizer.step(rate_scale(self.step, s))
        self.optimizer.zero_grad()
        self.step += 1

        # average the weights, over a short past at first
        keep = min(s.ema, 1 - 1 / (self.step + 10))
        with torch.no_grad():
            for averaged, p in zip(self.ema_net.parameters(), self.net.parameters()):
                averaged.lerp_(p, 1 - keep)
        return {"loss": loss.item(), "grad_norm": grad_norm.item(), **metrics}

    def save(self):
        """The averaged weights as a renderer folder, and beside them what a stopped run needs to go on."""
        os.makedirs(self.out, exist_ok=True)
        self.tokenizer.save(os.path.join(self.out, "tokenizer.json"))
        training = {
            "command": model.command_line(),
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": round(self.seconds),
            **self.metrics,
        }
        save_folder(self.out, self.ema_net, training)

        tensors = model.training_tensors(self.net, self.optimizer, ema=self.ema_net)
        state = {"seconds": self.seconds, "metrics": self.metrics, "skipped": self.skipped,
                 "settings": model.portable(asdict(self.settings))}
        model.save_checkpoint(self.checkpoints, self.step, tensors, state)

    def resume(self):
        """Go on from the newest checkpoint in the output folder, if there is one."""
        checkpoint = model.latest_checkpoint(self.checkpoints)
        if checkpoint is None:
            return
        state, tensors = checkpoint
        before, now = state.get("settings", {}), model.portable(asdict(self.settings))
        changed = [name for name in before if before[name] != now.get(name) and name not in FREE_SETTINGS]
        try:
            if changed:
                raise ValueError(f"{changed[0]} was {before[changed[0]]!r}")
            model.load_training_tensors(tensors, self.net, self.optimizer, ema=self.ema_net)
        except ValueError as error:
            raise ValueError(f"{self.checkpoints}: belongs to a run with other settings ({error}); "
                             "remove it to start afresh") from None
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.skipped = state.get("skipped", 0)
        self.metrics = state["metrics"]
        print(f"renderer: resuming at step {self.step}", flush=True)

    def finish(self):
        """Remove the checkpoints: the next run with this folder starts afresh."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def checkpoints_of(folder):
    """Where an unfinished training run keeps its checkpoints; there is no such folder after the last step."""
    return os.path.join(folder, "checkpoints")


def rate_scale(step, s):
    """Of both learning rates: linear rise over ``s.warmup`` steps, 1, linear fall to 1 % over the last ``s.decay``."""
    rise = (step + 1) / s.warmup
    fall = 0.01 + max(0.0, 1 - step / s.steps) / s.decay
    return min(1, rise, fall)


def train_renderer(data, vae, out, settings=None, device="cpu"):
    """Train the transformer on frozen latents; writes the folder ``out`` as it goes, and goes on where it stopped."""
    s = settings or RendererTraining()
    run = RendererRun(data, vae, out, s, device)
    started = time.time() - run.seconds
    window = []  # metrics of the steps since the last log line

    while run.step < s.steps:
        window.append(run.update())
        run.seconds = time.time() - started
        is_last = run.step == s.steps

        # log
        if run.step % s.log_every == 0 or is_last:
            run.metrics, grad_norm = summarize(window)
            window = []
            step_seconds = run.seconds / run.step
            print(f"renderer {run.step}/{s.steps}  loss {run.metrics['loss']:.4f}  "
                  f"class {run.metrics['class_loss']:.4f}  x0 error by t {run.metrics['x0_error_by_level']}  "
                  f"grad {grad_norm:.2f}  {s.batch / step_seconds:.0f} images/s  {run.seconds:.0f} s  "
                  f"{step_seconds * (s.steps - run.step):.0f} s left", flush=True)

        # the averaged weights as a renderer, and the state that a stopped run resumes from
        if run.step % s.export_every == 0 or is_last:
            run.save()

    run.finish()
    return run


def summarize(window):
    """[metrics of a step] -> ({"loss", "class_loss", "x0_error_by_level"}, mean gradient norm)."""
    t = torch.cat([metrics["t"] for metrics in window])
    x0_error = torch.cat([metrics["x0_error"] for metrics in window])
    bounds = torch.tensor(LEVELS, device=t.device)
    level = torch.bucketize(t, bounds, right=True)
    by_level = []
    for i in range(len(LEVELS) + 1):
        errors = x0_error[level == i]
        mean_error = round(errors.mean().item(), 4) if len(errors) else None
        by_level.append(mean_error)

    def mean(name):
        values = [float(metrics[name]) for metrics in window]
        return float(np.mean(values))
    summary = {"loss": mean("loss"), "class_loss": mean("class_loss"), "x0_error_by_level": by_level}
    return summary, mean("grad_norm")


def train(data, out, seed=0, device="cpu", vae_steps=0, steps=0, **settings):
    """Train both networks from the folder ``data`` into out/vae and out/renderer; 0 steps means the default.

    ``settings``: other fields of RendererTraining. The VAE stays as it is where the transformer's run goes on.
    """
    scenes = Scenes(data)
    vae_folder = os.path.join(out, "vae")
    renderer_folder = os.path.join(out, "renderer")

    if os.path.isdir(checkpoints_of(renderer_folder)):
        vae = load_folder(vae_folder, VAE, VAEConfig, device)
    else:
        vae_settings = VAETraining(seed=seed, steps=vae_steps or VAETraining.steps)
        vae = train_vae(scenes, vae_folder, vae_settings, device)

    renderer_settings = RendererTraining(seed=seed, steps=steps or RendererTraining.steps, **settings)
    train_renderer(scenes, vae, renderer_folder, renderer_settings, device)


# ---- Checkpoint folders ----------------------------------------------------------------------------------------------

def save_folder(path, net, training):
    """Write config.json, model.safetensors (float32) and training.json."""
    os.makedirs(path, exist_ok=True)
    tensors = {}
    for name, tensor in net.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float32)
        tensors[name] = tensor.contiguous()
    model.write_tensors(os.path.join(path, "model.safetensors"), tensors)
    model.write_json(os.path.join(path, "config.json"), asdict(net.config))
    model.write_json(os.path.join(path, "training.json"), training)


def load_folder(path, kind, config_type, device):
    """Folder -> net of class ``kind`` in float32, ready to use. ValueError names the file at fault."""
    config = read_config(os.path.join(path, "config.json"), config_type)
    with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit
        net = kind(config)

    file = os.path.join(path, "model.safetensors")
    try:
        with model.open_tensors(file) as handle:
            tensors = {name: handle.get_tensor(name).float() for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from None

    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    for name in sorted(expected | tensors):
        if name not in tensors or expected.get(name) != tensors[name].shape:
            raise ValueError(f"{file}: tensor {name} does not fit the architecture in config.json")
    net.load_state_dict(tensors, assign=True)
    return net.to(device).eval()


def read_config(file, config_type):
    """config.json -> ``config_type``; its fields, all positive integers, have to be there, and no others."""
    values = model.read_json(file)
    default = config_type()
    known = set(values) == set(asdict(default)) and values["model_type"] == default.model_type
    sizes = [value for name, value in values.items() if name != "model_type"]
    positive = all(isinstance(size, int) and size > 0 for size in sizes)
    if not known or not positive or values["width"] % values.get("heads", 1):
        raise ValueError(f"{file}: not a {default.model_type} configuration")
    return config_type(**values)


def load_caption_tokenizer(path, config=None):
    """The tokenizer.json of a renderer's folder, checked against its configuration, where one is given."""
    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file):
        raise ValueError(f"{file}: missing")
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file}: damaged ({error})") from None
    if config and tokenizer.get_vocab_size() != config.vocabulary:
        raise ValueError(f"{file}: {tokenizer.get_vocab_size()} words, config.json says {config.vocabulary}")
    return tokenizer


# ---- Pictures: PNG in and out, sizes ---------------------------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS = 64 * 2**20
MAX_SIDE = 65535
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type: grey, RGB, palette, grey + alpha, RGBA
DEPTHS = {  # bits a sample may have, by colour type
    0: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    4: (8, 16),
    6: (8, 16),
}
ONE_PASS = ((0, 0, 1, 1),)  # (x, y, step in x, step in y) of each pass
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def check_picture(image, name="a picture"):
    """ValueError, one line, unless image is an array uint8 (H, W, 3) that is not empty."""
    colours = image.ndim == 3 and image.shape[2] == 3
    if not colours or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"{name} is uint8 (H, W, 3), got {image.dtype} {image.shape}")


def resize(image, height, width):
    """uint8 (H, W, 3) -> uint8 (height, width, 3): mean over areas where it shrinks, bilinear where it grows."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    planes = pixels.permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    if shrinks:
        planes = F.interpolate(planes, (height, width), mode="area")
    else:
        planes = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    pixels = planes[0].permute(1, 2, 0)  # (height, width, 3)
    return pixels.round().clamp(0, 255).byte().numpy()


def read_png(path):
    """PNG file -> uint8 (H, W, 3), transparency over white. ValueError, one line, if it is missing or unsound."""
    try:
        with open(path, "rb") as file:
            return decode_png(file.read())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_png(path, image):
    """Write uint8 (H, W, 3) as a PNG file; the file appears whole or not at all."""
    data = encode_png(image)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(data)
    model.replace_file(path, write)


def encode_png(image):
    """uint8 (H, W, 3) -> the bytes of an 8-bit RGB PNG file."""
    image = np.ascontiguousarray(image)
    check_picture(image)
    height, width, _ = image.shape
    no_filter = np.zeros((height, 1), np.uint8)  # the filter byte before each row
    rows = np.concatenate([no_filter, image.reshape(height, -1)], 1)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, no interlace
    body = zlib.compress(rows.tobytes())
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def png_chunk(kind, body):
    length = struct.pack(">I", len(body))
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return length + kind + body + checksum


def decode_png(data):
    """Bytes of a PNG file, any colour type and depth -> uint8 (H, W, 3), transparency over white.

    The size is checked before anything is allocated, and no more is inflated than it allows. ValueError if unsound.
    """
    header, palette, transparency, body = read_chunks(data)
    passes = png_passes(header)
    raw = inflate(body, sum(p.size for p in passes))

    dtype = np.uint16 if header.depth == 16 else np.uint8
    pixels = np.empty((header.height, header.width, header.samples), dtype)
    start = 0
    for p in passes:
        filtered = raw[start:start + p.size].reshape(p.rows, 1 + p.stride)
        start += p.size
        lines = unfilter(filtered, header.pixel_bytes)  # (rows, stride)
        samples = unpack_samples(lines, header.depth)
        samples = samples[:, :p.columns * header.samples]  # without the bits that fill the last byte of a row
        samples = samples.reshape(p.rows, p.columns, -1)
        pixels[p.y::p.dy, p.x::p.dx] = samples
    return to_rgb(pixels, header, palette, transparency)


class PngHeader(NamedTuple):
    """The fields of an IHDR chunk."""
    width: int
    height: int
    depth: int  # bits a sample
    colour: int
    compression: int
    filtering: int
    interlace: int

    @property
    def samples(self):
        """Of a pixel."""
        return SAMPLES[self.colour]

    @property
    def pixel_bytes(self):
        """What a row filter takes for a pixel: at least one byte."""
        return max(1, self.samples * self.depth // 8)


def read_chunks(data):
    """Check signature, checksums and header. Returns (PngHeader, palette or None, transparency or None, data)."""
    if data[:8] != PNG_SIGNATURE:
        raise ValueError("not a PNG picture")
    header = palette = transparency = None
    body = []
    for kind, content in iterate_chunks(data):
        if header is None:
            header = read_header(kind, content)
        elif kind == b"PLTE":
            entries = len(content) // 3
            palette = np.frombuffer(content[:3 * entries], np.uint8).reshape(entries, 3)
        elif kind == b"tRNS":
            transparency = content
        elif kind == b"IDAT":
            body.append(content)

    if header.colour == 3 and palette is None:
        raise ValueError("corrupt PNG: no palette")
    return header, palette, transparency, b"".join(body)


def iterate_chunks(data):
    """(kind, content) of every chunk, IEND included; ValueError for a wrong checksum or a file that ends early."""
    at = len(PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise ValueError("corrupt PNG: the file ends early")
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        content = data[at + 8:at + 8 + length]
        checksum = data[at + 8 + length:at + 12 + length]
        if len(checksum) < 4:
            raise ValueError("corrupt PNG: the file ends early")
        if checksum != struct.pack(">I", zlib.crc32(kind + content)):
            raise ValueError("corrupt PNG: wrong checksum")
        yield kind, content
        at += 12 + length


def read_header(kind, content):
    """The first chunk -> PngHeader, refused if unknown or too large."""
    if kind != b"IHDR" or len(content) != 13:
        raise ValueError("corrupt PNG: no header")
    header = PngHeader(*struct.unpack(">IIBBBBB", content))
    depths = DEPTHS.get(header.colour, ())
    unknown = header.compression or header.filtering or header.interlace > 1
    if header.depth not in depths or unknown or not header.width or not header.height:
        raise ValueError("corrupt PNG: impossible header")
    longer_side = max(header.width, header.height)
    if header.width * header.height > MAX_PIXELS or longer_side > MAX_SIDE:
        raise ValueError(f"a picture of {header.width:,} x {header.height:,} pixels is too large "
                         f"(limit {MAX_PIXELS >> 20} megapixels, {MAX_SIDE:,} a side)")
    return header


class PngPass(NamedTuple):
    """Every dx-th column from x and every dy-th row from y; an interlaced picture has up to seven passes."""
    x: int
    y: int
    dx: int
    dy: int
    columns: int
    rows: int
    stride: int  # bytes a row, without its filter byte

    @property
    def size(self):
        """In bytes."""
        return self.rows * (1 + self.stride)


def png_passes(header):
    """[PngPass], those without a pixel left out."""
    passes = []
    for x, y, dx, dy in ADAM7 if header.interlace else ONE_PASS:
        columns = -(-(header.width - x) // dx)  # rounded up
        rows = -(-(header.height - y) // dy)
        stride = -(-columns * header.samples * header.depth // 8)
        if columns > 0 and rows > 0:
            passes.append(PngPass(x, y, dx, dy, columns, rows, stride))
    return passes


def inflate(body, expected):
    """zlib data -> uint8 (expected,); nothing beyond that is inflated."""
    try:
        raw = zlib.decompressobj().decompress(body, expected)
    except zlib.error as error:
        raise ValueError(f"corrupt PNG: {error}") from None
    if len(raw) < expected:
        raise ValueError("corrupt PNG: pixel data end early")
    return np.frombuffer(raw, np.uint8)


def unfilter(lines, size):
    """Undo the row filters. lines uint8 (rows, 1 + stride), size bytes a pixel -> uint8 (rows, stride).

    A byte needs its left, upper and upper left neighbours, so all bytes of one anti-diagonal are undone together.
    """
    filters = lines[:, 0]
    data = lines[:, 1:]
    if filters.max() > 4:
        raise ValueError("corrupt PNG: unknown row filter")
    if not filters.any():
        return np.ascontiguousarray(data)

    rows = len(data)
    columns = data.shape[1] // size
    data = data.reshape(rows, columns, size)
    out = np.zeros((rows + 1, columns + 1, size), np.uint8)  # a border of zeros above and to the left
    for diagonal in range(rows + columns - 1):
        first = max(0, diagonal - columns + 1)
        r = np.arange(first, min(rows, diagonal + 1))
        c = diagonal - r
        left = out[r + 1, c].astype(np.int16)  # (bytes of the diagonal, size)
        up = out[r, c + 1].astype(np.int16)
        corner = out[r, c].astype(np.int16)
        average = (left + up) // 2
        guesses = (0 * left, left, up, average, paeth(left, up, corner))  # of filters 0 to 4
        guess = np.choose(filters[r][:, None], guesses)
        byte = data[r, c] + guess
        out[r + 1, c + 1] = byte.astype(np.uint8)  # modulo 256
    return out[1:, 1:].reshape(rows, -1)


def paeth(left, up, corner):
    """The one of the three that lies nearest to left + up - corner; in a tie left before up before corner."""
    to_left = abs(up - corner)
    to_up = abs(left - corner)
    to_corner = abs(left + up - 2 * corner)
    up_or_corner = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, up_or_corner)


def unpack_samples(lines, depth):
    """uint8 (rows, stride) -> samples (rows, at least those of a row): two bytes each, or several in a byte."""
    if depth == 16:
        return lines.view(">u2")
    per_byte = 8 // depth
    shifts = [8 - depth * (i + 1) for i in range(per_byte)]  # high bits first
    ones = 2**depth - 1
    values = np.stack([lines >> shift & ones for shift in shifts], -1)  # (rows, stride, per_byte)
    return values.reshape(len(lines), -1)


def to_rgb(pixels, header, palette, transparency):
    """Samples (H, W, samples) -> uint8 (H, W, 3): palette looked up, 16 bits cut to 8, transparency over white."""
    if header.colour == 3:
        rgb, alpha = look_up(pixels[..., 0], palette, transparency)
    else:
        rgb, alpha = split_alpha(pixels, header, transparency)
    if rgb.shape[-1] == 1:
        rgb = rgb.repeat(3, -1)

    if alpha is not None:
        alpha = alpha.astype(np.uint16)
        white = 255 * (255 - alpha)
        rgb = ((rgb * alpha + white + 127) // 255).astype(np.uint8)  # rounded
    return np.ascontiguousarray(rgb)


def look_up(index, palette, transparency):
    """Palette indices (H, W) -> (uint8 (H, W, 3), alpha uint8 (H, W, 1) or None)."""
    if index.max() >= len(palette):
        raise ValueError("corrupt PNG: colour outside the palette")
    if transparency is None:
        return palette[index], None
    table = np.full(256, 255, np.uint8)  # entries that tRNS leaves out are opaque
    given = np.frombuffer(transparency[:256], np.uint8)
    table[:len(given)] = given
    return palette[index], table[index][..., None]


def split_alpha(pixels, header, transparency):
    """Samples (H, W, samples) -> (grey or RGB uint8 (H, W, 1 or 3), alpha uint8 (H, W, 1) or None)."""
    if header.depth == 16:
        values = (pixels >> 8).astype(np.uint8)
    else:
        values = pixels * np.uint8(255 // (2**header.depth - 1))
    if header.colour in (4, 6):
        return values[..., :-1], values[..., -1:]

    if transparency is None or len(transparency) != 2 * header.samples:
        return values, None
    key = np.frombuffer(transparency, ">u2")  # the one colour that is transparent
    opaque = (pixels != key).any(-1, keepdims=True)
    return values, opaque * np.uint8(255)
