"""The renderer: a picture from a caption and up to two reference pictures, by rectified flow in the latents of a VAE.

    python -m atlas.build --scenes 60000         the pictures to learn from
    python genevolve.py train-renderer           VAE, then diffusion transformer, into weights/vae and weights/renderer

From leaf to root: PNG files, the VAE, caption tokens, the transformer, the flow and its samplers, Renderer, training.

Direction of time and sign of the velocity, everywhere in this file: x_t = (1 - t) x_0 + t e with noise e ~ N(0, 1), so
t = 0 is the picture, t = 1 is noise, v = dx/dt = e - x_0 = (x_t - x_0) / t, and sampling walks from t = 1 down to 0.

Where this departs from the large renderers it stands for, and why:

1. The network predicts x_0, not v (v follows from it): at this size it learns faster, and x_0 needs no large outputs.
2. Words are known words; a string in capitals or digits is read character by character, each with its place in the
   string, because drawing "KEL7" takes copying, not vocabulary. A subject's name is [UNK]: looks come from pictures.
3. The condition is encoded once per picture; its keys and values are reused at every step. It never sees t.
4. A middle layer also learns to say what each cell will show. That loss only speeds up learning.

Dimension letters: B pictures, H W pixels, h w latents (a quarter of H and W), C latent channels, N tokens of a picture
(patches of 2 x 2 latents), T condition tokens of the longest row, S condition tokens of all rows, D width, K heads.
"""
import json
import math
import os
import re
import struct
import time
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch import nn

import model

# ---- PNG in and out -------------------------------------------------------------------------------------------------

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PIXELS, MAX_SIDE = 64 * 2**20, 65535
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples a pixel
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
WHOLE = ((0, 0, 1, 1),)  # (x, y, step in x, step in y) of each pass
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def encode_png(image):
    """uint8 (H, W, 3) -> the bytes of an 8-bit RGB PNG file."""
    image = np.ascontiguousarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"a picture is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], 1)  # filter 0 before each row

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b""))


def write_png(path, image):
    """Write uint8 (H, W, 3) as a PNG file; the file appears whole or not at all."""
    data = encode_png(image)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(data)
    model.replace_file(path, write)


def read_png(path):
    """PNG file -> uint8 (H, W, 3), transparency over white. ValueError, one line, if it is missing or unsound."""
    try:
        with open(path, "rb") as file:
            return decode_png(file.read())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decode_png(data):
    """Bytes of a PNG file, any colour type and depth -> uint8 (H, W, 3), transparency over white.

    The size is checked before anything is allocated, and no more is inflated than it allows. ValueError if unsound.
    """
    header, palette, transparency, body = png_chunks(data)
    width, height, depth, colour, _, _, interlace = header
    samples = SAMPLES[colour]
    passes = [(x, y, dx, dy, -(-(width - x) // dx), -(-(height - y) // dy))
              for x, y, dx, dy in (ADAM7 if interlace else WHOLE) if width > x and height > y]
    strides = [-(-columns * samples * depth // 8) for *_, columns, _ in passes]  # bytes a row, without the filter byte
    expected = sum((stride + 1) * p[5] for stride, p in zip(strides, passes))
    try:
        raw = zlib.decompressobj().decompress(body, expected)
    except zlib.error as error:
        raise ValueError(f"corrupt PNG: {error}") from None
    if len(raw) < expected:
        raise ValueError("corrupt PNG: pixel data end early")
    raw, start = np.frombuffer(raw, np.uint8), 0
    pixels = np.empty((height, width, samples), np.uint16 if depth == 16 else np.uint8)
    for (x, y, dx, dy, columns, rows), stride in zip(passes, strides):
        lines = raw[start:start + rows * (stride + 1)].reshape(rows, stride + 1)
        lines, start = unfilter(lines, max(1, samples * depth // 8)), start + rows * (stride + 1)
        if depth == 16:
            values = lines.view(">u2")
        else:  # depth 8, or several samples in a byte, high bits first
            per_byte = 8 // depth
            values = np.stack([lines >> (8 - depth * (i + 1)) & (2**depth - 1) for i in range(per_byte)], -1)
        pixels[y::dy, x::dx] = values.reshape(rows, -1)[:, :columns * samples].reshape(rows, columns, samples)
    return to_rgb(pixels, depth, colour, palette, transparency)


def png_chunks(data):
    """Check signature, checksums and header. Returns (header fields, palette or None, transparency or None, data)."""
    if data[:8] != SIGNATURE:
        raise ValueError("not a PNG picture")
    at, header, palette, transparency, body, kind = 8, None, None, None, [], b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise ValueError("corrupt PNG: the file ends early")
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        content, check = data[at + 8:at + 8 + length], data[at + 8 + length:at + 12 + length]
        if len(check) < 4:
            raise ValueError("corrupt PNG: the file ends early")
        if zlib.crc32(kind + content) != struct.unpack(">I", check)[0]:
            raise ValueError("corrupt PNG: wrong checksum")
        at += 12 + length
        if header is None:
            header = png_header(kind, content)
        elif kind == b"PLTE":
            palette = np.frombuffer(content[:len(content) // 3 * 3], np.uint8).reshape(-1, 3)
        elif kind == b"tRNS":
            transparency = content
        elif kind == b"IDAT":
            body.append(content)
    if header[3] == 3 and palette is None:
        raise ValueError("corrupt PNG: no palette")
    return header, palette, transparency, b"".join(body)


def png_header(kind, content):
    """(width, height, bit depth, colour type, compression, filter, interlace), refused if unknown or too large."""
    if kind != b"IHDR" or len(content) != 13:
        raise ValueError("corrupt PNG: no header")
    header = struct.unpack(">IIBBBBB", content)
    width, height, depth, colour, compression, filtering, interlace = header
    if depth not in DEPTHS.get(colour, ()) or compression or filtering or interlace > 1 or not width or not height:
        raise ValueError("corrupt PNG: impossible header")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"a picture of {width:,} x {height:,} pixels is too large (limit 64 megapixels)")
    return header


def unfilter(lines, size):
    """Undo the row filters. lines uint8 (rows, 1 + stride), size bytes a pixel -> uint8 (rows, stride).

    A byte needs its left, upper and upper left neighbours, so all bytes of one anti-diagonal are undone together.
    """
    filters, data = lines[:, 0], lines[:, 1:]
    if filters.max() > 4:
        raise ValueError("corrupt PNG: unknown row filter")
    if not filters.any():
        return np.ascontiguousarray(data)
    rows, columns = len(data), data.shape[1] // size
    data = data.reshape(rows, columns, size)
    out = np.zeros((rows + 1, columns + 1, size), np.uint8)  # a border of zeros above and to the left
    for d in range(rows + columns - 1):
        r = np.arange(max(0, d - columns + 1), min(rows, d + 1))
        c = d - r
        left, up, corner = (a.astype(np.int16) for a in (out[r + 1, c], out[r, c + 1], out[r, c]))  # (diagonal, size)
        a, b, e = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)  # distances to Paeth's guess
        paeth = np.where((a <= b) & (a <= e), left, np.where(b <= e, up, corner))
        guess = np.choose(filters[r][:, None], (0 * left, left, up, (left + up) // 2, paeth))
        out[r + 1, c + 1] = (data[r, c] + guess).astype(np.uint8)  # modulo 256
    return out[1:, 1:].reshape(rows, -1)


def to_rgb(pixels, depth, colour, palette, transparency):
    """Samples (H, W, samples) -> uint8 (H, W, 3): palette looked up, 16 bits cut to 8, transparency over white."""
    alpha = None
    if colour == 3:
        index = pixels[..., 0]
        if index.max() >= len(palette):
            raise ValueError("corrupt PNG: colour outside the palette")
        if transparency is not None:
            table = np.full(256, 255, np.uint8)
            table[:min(len(transparency), 256)] = np.frombuffer(transparency[:256], np.uint8)
            alpha = table[index][..., None]
        pixels = palette[index]  # (H, W, 3)
    else:
        if transparency is not None and colour in (0, 2) and len(transparency) == 2 * SAMPLES[colour]:
            key = np.frombuffer(transparency, ">u2")  # one colour that stands for "nothing here"
            alpha = np.where((pixels == key).all(-1, keepdims=True), np.uint8(0), np.uint8(255))
        pixels = (pixels >> 8).astype(np.uint8) if depth == 16 else pixels * np.uint8(255 // (2**depth - 1))
        if colour in (4, 6):
            pixels, alpha = pixels[..., :-1], pixels[..., -1:]
        if pixels.shape[-1] == 1:
            pixels = pixels.repeat(3, -1)
    if alpha is not None:
        opaque = alpha.astype(np.uint16)
        pixels = ((pixels * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def resize(image, height, width):
    """uint8 (H, W, 3) -> uint8 (height, width, 3): mean over areas where it shrinks, bilinear where it grows."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    planes = F.interpolate(planes, (height, width), mode="area") if shrinks else F.interpolate(
        planes, (height, width), mode="bilinear", antialias=True)
    return planes[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


# ---- VAE: pictures and latents --------------------------------------------------------------------------------------

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
        return F.rms_norm(x, x.shape[-1:], None if self.weight is None else self.weight.to(x.dtype), 1e-6)


class PixelBlock(nn.Module):
    """Residual perceptron on each patch by itself."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class VAE(nn.Module):
    """A patch of 4 x 4 pixels <-> one latent; neighbours mix only in the last 3 x 3 convolution of the decoder."""

    def __init__(self, config):
        super().__init__()
        self.config, width, pixels = config, config.width, config.factor**2
        self.encoder = nn.Sequential(nn.Linear(3 * pixels, width), PixelBlock(width), PixelBlock(width), RMSNorm(width),
                                     nn.Linear(width, 2 * config.channels))
        self.decoder = nn.Sequential(nn.Linear(config.channels, width), PixelBlock(width), PixelBlock(width),
                                     RMSNorm(width), nn.Linear(width, 8 * pixels))
        self.out = nn.Conv2d(8, 3, 3, padding=1)
        self.register_buffer("mean", torch.zeros(config.channels))  # of the latents, measured after training
        self.register_buffer("std", torch.ones(config.channels))

    def encode(self, pixels):
        """(B, 3, H, W) in -1..1 -> mean and log variance of the latents, both (B, h, w, C)."""
        patches = F.pixel_unshuffle(pixels, self.config.factor).permute(0, 2, 3, 1)  # (B, h, w, 48)
        mean, log_variance = self.encoder(patches).float().chunk(2, -1)  # (B, h, w, C)
        return mean, log_variance.clamp(-12, 4)

    def decode(self, latents):
        """(B, h, w, C) -> (B, 3, H, W), about -1..1."""
        patches = self.decoder(latents).permute(0, 3, 1, 2)  # (B, 8 * 16, h, w)
        return self.out(F.pixel_shuffle(patches, self.config.factor)).float()  # (B, 3, H, W)

    def to_latents(self, images):
        """uint8 (B, H, W, 3) -> normalised latents (B, h, w, C), without sampling noise."""
        return (self.encode(to_pixels(images))[0] - self.mean) / self.std

    def to_images(self, latents):
        """Normalised latents (B, h, w, C) -> uint8 (B, H, W, 3)."""
        pixels = self.decode(latents * self.std + self.mean)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)  # (B, H, W, 3)


def to_pixels(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in -1..1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae, images, generator, kl_weight=1e-3):
    """Half L1, half L2 reconstruction + kl_weight * KL(q(z|x) || N(0, 1)) per latent number -> (loss, psnr in dB)."""
    pixels = to_pixels(images)
    mean, log_variance = vae.encode(pixels)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    error = vae.decode(mean + noise * (log_variance / 2).exp()) - pixels
    square = error.square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return 0.5 * square + 0.5 * error.abs().mean() + kl_weight * kl, 10 * torch.log10(4 / square.detach())


# ---- Caption tokens -------------------------------------------------------------------------------------------------

PIECE = re.compile(r"""(?<![^\W_])(?P<spelled>[^\W_](?:-[^\W_])+(?![\w-])      # K-E-L-7
                       |[A-Z0-9]{2,}(?![^\W_])|[0-9](?![^\W_]))               # KEL7, 1748, 4
                       |[^\W_]+|[^\w\s]|_                                     # a word, or a mark""", re.VERBOSE)
MAX_PLACE = 15
NEARBY = 4  # words before a word that are mixed into it
ORDINALS = {"first": -1, "second": -2}  # the reference picture that a word names, as a place


def pieces(caption):
    """Caption -> [(piece, place)]. The characters of a string in capitals or digits, or of one spelled with hyphens,
    are pieces of their own, upper-cased, with places 1, 2, 3, ... Words are lower-cased and have place 0; from an
    ordinal to the end of its sentence they have that ordinal's negative one, as they speak of the picture it names."""
    found, spoken_of = [], 0
    for match in PIECE.finditer(caption):
        text = match.group()
        if match.group("spelled"):
            found += [(c, min(i, MAX_PLACE)) for i, c in enumerate(text.replace("-", "").upper(), 1)]
        else:
            spoken_of = 0 if text == "." else ORDINALS.get(text.lower(), spoken_of)
            found.append((text.lower(), spoken_of))
    return found


def train_caption_tokenizer(captions, min_frequency=100):
    """A word-level vocabulary of the pieces seen at least ``min_frequency`` times; names of subjects stay [UNK]."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    trainer = WordLevelTrainer(min_frequency=min_frequency, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(([piece for piece, _ in pieces(c)] for c in captions), trainer)
    return tokenizer


def tokenize(tokenizer, captions, limit):
    """Captions -> [(ids (n,), places (n,))], int64, cut after ``limit`` tokens; an empty caption has none."""
    found = [pieces(caption)[:limit] for caption in captions]
    encoded = tokenizer.encode_batch([[piece for piece, _ in f] for f in found], is_pretokenized=True)
    return [(torch.tensor(e.ids, dtype=torch.long), torch.tensor([place for _, place in f], dtype=torch.long))
            for e, f in zip(encoded, found)]


# ---- Conditions: captions and references, packed --------------------------------------------------------------------

def patchify(latents):
    """(B, h, w, C) -> (B, N, 4C): tokens are patches of 2 x 2 latents."""
    b, h, w, c = latents.shape
    return latents.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens):
    """(B, N, 4C) of a square picture -> (B, h, w, C)."""
    b, n, c = tokens.shape
    side = math.isqrt(n)
    return tokens.view(b, side, side, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * side, 2 * side, c // 4)


@dataclass
class Prompts:
    """B conditions without padding: first B empty tokens (one a row, so that no row is without any), then the words of
    all rows, then the reference patches of all rows. What a row lacks costs nothing."""
    words: torch.Tensor      # (words,) token ids
    places: torch.Tensor     # (words,) place within a spelled string; -1, -2: speaks of the first, second reference
    positions: torch.Tensor  # (words,) position in the caption
    patches: torch.Tensor    # (patches, 4C) latents of the references
    which: torch.Tensor      # (patches,) 0 = first reference, 1 = second
    cells: torch.Tensor      # (patches,) position within the reference
    slots: torch.Tensor      # (S,) where each token goes in the padded grid, row * T + column
    mask: torch.Tensor       # (B, T) bool: True where there is a token


def pack(rows, device="cpu", columns=0):
    """rows: [(ids (n,), places (n,), references (R, 16, 4C), R may be 0)] -> Prompts with T = at least ``columns``."""
    ids, places, references = zip(*rows)
    words, patches = [len(i) for i in ids], [r.shape[0] * r.shape[1] for r in references]
    lengths = torch.tensor([1 + n + m for n, m in zip(words, patches)])
    columns = max(columns, int(lengths.max()))  # T
    slots = ([torch.arange(len(rows)) * columns] + [b * columns + 1 + torch.arange(n) for b, n in enumerate(words)]
             + [b * columns + 1 + n + torch.arange(m) for b, (n, m) in enumerate(zip(words, patches))])
    which = [torch.arange(len(r)).repeat_interleave(r.shape[1]) for r in references]
    cells = [torch.arange(r.shape[1]).repeat(len(r)) for r in references]
    packed = (torch.cat(ids), torch.cat(places), torch.cat([torch.arange(n) for n in words]),
              torch.cat([r.flatten(0, 1) for r in references]), torch.cat(which), torch.cat(cells), torch.cat(slots),
              torch.arange(columns) < lengths[:, None])
    return Prompts(*(tensor.to(device) for tensor in packed))


@dataclass
class Condition:
    """What the denoiser sees of its prompts: computed once per picture, used at every step."""
    keys: list          # of each layer (B, K, T, D / K)
    values: list        # likewise
    mask: torch.Tensor  # (B, T) bool

    def repeat(self, times):
        """Each row ``times`` times in place: rows 0, 0, 1, 1, ... for times = 2."""
        again = [[t.repeat_interleave(times, 0) for t in part] for part in (self.keys, self.values, [self.mask])]
        return Condition(again[0], again[1], again[2][0])


# ---- The diffusion transformer --------------------------------------------------------------------------------------

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
    def __init__(self, width):
        super().__init__()
        hidden = width * 8 // 3 // 64 * 64
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        a, gate = self.up(x).chunk(2, -1)
        return self.down(a * F.silu(gate))


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(d)) v; q (B, K, N, d), k and v (B, K, T, d), mask (B, 1, 1, T) bool -> (B, K, N, d).

    Written out where a CPU needs gradients: there, at this size, the fused kernel is slow in its backward pass.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1]**-0.5) @ k.transpose(-1, -2)  # (B, K, N, T)
    return scores.masked_fill(~mask, -1e4).softmax(-1).to(v.dtype) @ v


class EncoderBlock(nn.Module):
    """Pre-norm transformer layer over packed condition tokens; only its attention sees the padded grid."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.norm1, self.norm2 = RMSNorm(c.width), RMSNorm(c.width)
        self.qkv, self.out, self.mlp = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width), SwiGLU(c.width)
        self.q_norm, self.k_norm = RMSNorm(c.width // c.heads), RMSNorm(c.width // c.heads)

    def forward(self, x, prompts):
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(self.norm1(x)).chunk(3, -1))  # (S, K, D / K)
        q, k, v = (to_grid(t, prompts) for t in (self.q_norm(q), self.k_norm(k), v))  # (B, K, T, D / K)
        seen = attend(q, k, v, prompts.mask[:, None, None])
        x = x + self.out(seen.transpose(1, 2).flatten(0, 1)[prompts.slots].flatten(1))  # (S, D)
        return x + self.mlp(self.norm2(x))


def to_grid(packed, prompts):
    """(S, K, d) -> (B, K, T, d), zeros where a row has no token."""
    b, t = prompts.mask.shape
    grid = packed.new_zeros(b * t, *packed.shape[1:]).index_copy(0, prompts.slots, packed)
    return grid.unflatten(0, (b, t)).transpose(1, 2)  # (B, K, T, d)


class Block(nn.Module):
    """A layer over picture tokens: attention to themselves and the condition at once, then a perceptron.

    AdaLN: time gives six vectors, shared by all layers; each layer adds its own offset to them.
    """

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.norm = RMSNorm(c.width, learned=False)
        self.qkv, self.out, self.mlp = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width), SwiGLU(c.width)
        self.condition_kv = nn.Linear(c.width, 2 * c.width)
        self.q_norm, self.k_norm = RMSNorm(c.width // c.heads), RMSNorm(c.width // c.heads)
        self.condition_k_norm = RMSNorm(c.width // c.heads)
        self.offset = nn.Parameter(torch.zeros(6, c.width))

    def read(self, tokens, prompts):
        """Packed condition tokens (S, D) -> this layer's keys and values, both (B, K, T, D / K)."""
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.condition_kv(tokens).chunk(2, -1))  # (S, K, D / K)
        return to_grid(self.condition_k_norm(k), prompts), to_grid(v, prompts)

    def forward(self, x, modulation, contexts):
        """x (B, N, D), modulation (B, 6, D), contexts [(keys, values, mask)] for the rows from first to last."""
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.offset).to(x.dtype)[:, :, None].unbind(1)
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1)  # (B, N, 3D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))  # (B, K, N, D / K)
        sizes = [len(keys) for keys, _, _ in contexts]
        seen = torch.cat([attend(q, torch.cat([k, keys], 2), torch.cat([v, values], 2), mask)  # (B, K, N, D / K)
                          for q, k, v, (keys, values, mask) in
                          zip(self.q_norm(q).split(sizes), self.k_norm(k).split(sizes), v.split(sizes), contexts)])
        x = x + (1 + gate1) * self.out(seen.transpose(1, 2).flatten(2))  # (B, N, D)
        return x + (1 + gate2) * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """x_0 from x_t, t and a condition. ``encode`` once per picture, then call at every step."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.word = nn.Embedding(c.vocabulary, c.width)
        self.place = nn.Embedding(MAX_PLACE + 1, c.width)
        self.position = nn.Embedding(c.max_words, c.width)
        self.nearby = nn.Linear(NEARBY * c.width, c.width, bias=False)
        self.empty = nn.Parameter(torch.randn(c.width) * 0.02)
        self.which, self.cell = nn.Embedding(c.references, c.width), nn.Embedding(c.reference_tokens, c.width)
        self.from_reference = nn.Linear(4 * c.channels, c.width)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.encoder_layers))
        self.encoder_norm = RMSNorm(c.width)
        self.from_latents = nn.Linear(4 * c.channels, c.width)
        self.token = nn.Parameter(torch.randn(c.tokens, c.width) * 0.02)
        self.time = nn.Sequential(nn.Linear(128, c.width), nn.SiLU(), nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, 6 * c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.classes = nn.Linear(c.width, c.classes)
        self.out_norm, self.to_latents = RMSNorm(c.width), nn.Linear(c.width, 4 * c.channels)
        for embedding, std in ((self.word, 0.3), (self.place, 0.3), (self.which, 0.3), (self.cell, 0.1),
                               (self.position, 0.02)):
            nn.init.normal_(embedding.weight, std=std)
        for tensor in (self.time[-1].weight, self.time[-1].bias, self.to_latents.weight, self.nearby.weight):
            nn.init.zeros_(tensor)

    def encode(self, prompts):
        """Prompts -> Condition."""
        place, ordinal = prompts.places.clamp(min=0), -1 - prompts.places
        # words carry the vector of the picture they speak of: so "the first ... left" and that picture find each other
        words = self.word(prompts.words) + torch.where((ordinal >= 0)[:, None], self.which(ordinal.clamp(min=0)),
                                                       self.place(place))
        # "the cone is yellow": yellow belongs to what stands just before it, which order alone tells
        before = [F.pad(words, (0, 0, k, 0))[:len(words)] * (prompts.positions >= k)[:, None]
                  for k in range(1, NEARBY + 1)]
        words = words + self.nearby(torch.cat(before, 1)) + self.position(prompts.positions)
        patches = self.from_reference(prompts.patches) + self.which(prompts.which) + self.cell(prompts.cells)
        empty = self.empty.expand(len(prompts.mask), -1)
        x = torch.cat([empty, words, patches.to(words.dtype)])  # (S, D)
        for block in self.encoder:
            x = block(x, prompts)
        x = self.encoder_norm(x)
        keys, values = zip(*(block.read(x, prompts) for block in self.blocks))
        return Condition(list(keys), list(values), prompts.mask)

    def forward(self, x, t, condition, with_classes=False):
        """x_t (B, N, 4C), t (B,) in 0..1 -> x_0 (B, N, 4C), and the class logits (B, N, classes) if asked for.

        condition: a Condition, or several that follow each other along B: short ones need no padding to long ones.
        """
        conditions = condition if isinstance(condition, list) else [condition]
        modulation = self.time(time_features(t)).unflatten(-1, (6, -1))  # (B, 6, D)
        masks = [F.pad(c.mask, (x.shape[1], 0), value=True)[:, None, None] for c in conditions]  # (B, 1, 1, N + T)
        x, logits = self.from_latents(x) + self.token, None
        for i, block in enumerate(self.blocks):
            x = block(x, modulation, [(c.keys[i], c.values[i], mask) for c, mask in zip(conditions, masks)])
            if with_classes and i == len(self.blocks) // 2:
                logits = self.classes(x)
        x = self.to_latents(self.out_norm(x))
        return (x, logits) if with_classes else x


def time_features(t):
    """t (B,) -> 64 cosines and 64 sines of frequencies from 160 down to 0.16 turns over 0..1, (B, 128)."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(1000) * torch.arange(64, device=t.device) / 64)
    return torch.cat([angles.cos(), angles.sin()], 1)


# ---- Rectified flow and its samplers --------------------------------------------------------------------------------

def noised(x0, noise, t):
    """x_t = (1 - t) x_0 + t e; x0 and noise (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise


def schedule(steps, shift=3.0):
    """steps + 1 times from 1 to 0: t = shift s / (1 + (shift - 1) s) of evenly spaced s; shift > 1 lingers at noise."""
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).tolist()


def integrate(velocity, x, times, sampler="euler", fresh=None, churn=0.6):
    """Follow dx/dt = velocity(x, t) from times[0] to times[-1].

    "euler": first order. "midpoint": second order, two calls a step; unlike Heun it never asks for the velocity at
    t = 0, where (x_t - x_0) / t has no value. "ancestral": v tells x_0 and e; a part of e (a share churn^2 of its
    variance) is replaced by ``fresh()`` before x is put together again, so later steps can mend earlier ones' errors.
    """
    if sampler not in ("euler", "midpoint", "ancestral"):
        raise ValueError(f"unknown sampler {sampler!r}: choose euler, midpoint or ancestral")
    for t, after in zip(times, times[1:]):
        v = velocity(x, t)
        if sampler == "midpoint":
            middle = (t + after) / 2
            v = velocity(x + (middle - t) * v, middle)
        if sampler == "ancestral" and after > 0:
            x0, e = x - t * v, x + (1 - t) * v
            x = (1 - after) * x0 + after * ((1 - churn**2)**0.5 * e + churn * fresh())
        else:
            x = x + (after - t) * v
    return x


def guided_velocity(net, condition, nothing=None, guidance=1.0):
    """The velocity under classifier-free guidance, x_0 = x_0(nothing) + guidance (x_0(prompt) - x_0(nothing)).

    condition holds B prompts; nothing, which guidance other than 1 needs, B empty ones, and one pass is for both.
    """
    def velocity(x, t):
        rows = torch.full((len(x),), t, device=x.device)
        if guidance == 1:
            x0 = net(x, rows, condition)
        else:
            told, untold = net(torch.cat([x, x]), torch.cat([rows, rows]), [condition, nothing]).chunk(2)
            x0 = untold + guidance * (told - untold)
        return (x - x0) / t
    return velocity


# ---- The renderer ---------------------------------------------------------------------------------------------------

class Renderer:
    """Prompts and reference pictures in, pictures out."""

    def __init__(self, vae, net, tokenizer):
        self.vae, self.net, self.tokenizer = vae, net, tokenizer
        self.reference_side = 2 * vae.config.factor * math.isqrt(net.config.reference_tokens)  # pixels

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

        Returns uint8 (64, 64, 3) pictures. The noise of a picture comes from its seed alone, whatever its batch. At
        most ``max_batch`` go at once; 0 means 8 on a CPU, whose caches hold no more, else 64.
        """
        if not len(prompts) == len(references) == len(seeds):
            raise ValueError(f"{len(prompts)} prompts, {len(references)} lists of references, {len(seeds)} seeds")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        max_batch = max_batch or (8 if self.vae.mean.device.type == "cpu" else 64)
        rows, images = self.conditions(prompts, references), []
        for start in range(0, len(rows), max_batch):
            part = slice(start, start + max_batch)
            images += self.paint(rows[part], seeds[part], steps, guidance, sampler)
        return images

    def conditions(self, prompts, references):
        """One row for ``pack`` per prompt."""
        c = self.net.config
        for pictures in references:
            if len(pictures) > c.references:
                raise ValueError(f"{len(pictures)} reference pictures: at most {c.references}")
            for p in pictures:
                if p.ndim != 3 or p.shape[2] != 3 or p.dtype != np.uint8 or 0 in p.shape:
                    raise ValueError(f"a reference picture is uint8 (H, W, 3), got {p.dtype} {p.shape}")
        flat = [torch.from_numpy(resize(p, self.reference_side, self.reference_side)) for r in references for p in r]
        latents = torch.zeros(0, c.reference_tokens, 4 * c.channels)
        if flat:
            latents = patchify(self.vae.to_latents(torch.stack(flat).to(self.vae.mean.device))).cpu()
        parts = latents.split([len(r) for r in references])  # per prompt (R, 16, 4C)
        return [(*words, part) for words, part in zip(tokenize(self.tokenizer, prompts, c.max_words), parts)]

    def paint(self, rows, seeds, steps, guidance, sampler):
        """Rows of conditions -> uint8 (64, 64, 3) arrays, all in one batch."""
        c, device = self.net.config, self.vae.mean.device
        generators = [torch.Generator().manual_seed(int(seed) % 2**63) for seed in seeds]  # one a picture

        def noise():
            return torch.stack([torch.randn(c.tokens, 4 * c.channels, generator=g) for g in generators]).to(device)
        nothing = None
        if guidance != 1:
            nothing = self.net.encode(pack([(row[0][:0], row[1][:0], row[2][:0]) for row in rows], device))
        velocity = guided_velocity(self.net, self.net.encode(pack(rows, device)), nothing, guidance)
        x = integrate(velocity, noise(), schedule(steps), sampler, noise)  # (B, N, 4C)
        return list(self.vae.to_images(unpatchify(x)).cpu().numpy())


# ---- Checkpoint folders ---------------------------------------------------------------------------------------------

def save_folder(path, net, training, tensors=None, dtype=torch.float32):
    """Write config.json, model.safetensors and training.json; ``tensors`` (default: the net's) are stored as dtype."""
    os.makedirs(path, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in (tensors or net.state_dict()).items()}
    model.write_tensors(os.path.join(path, "model.safetensors"), tensors)
    model.write_json(os.path.join(path, "config.json"), asdict(net.config))
    model.write_json(os.path.join(path, "training.json"), training)


def load_folder(path, kind, config_type, device):
    """Folder -> net of class ``kind`` in float32, ready to use. ValueError names the file at fault."""
    config_file, file = os.path.join(path, "config.json"), os.path.join(path, "model.safetensors")
    values, expected = model.read_json(config_file), config_type()
    sizes = [v for k, v in values.items() if k != "model_type"]
    if (values.get("model_type") != expected.model_type or set(values) != set(asdict(expected))
            or not all(isinstance(v, int) and v > 0 for v in sizes) or values["width"] % values.get("heads", 1)):
        raise ValueError(f"{config_file}: not a {expected.model_type} configuration")
    with torch.device("meta"):  # shapes only: nothing is allocated before they are known to fit
        net = kind(config_type(**values))
    try:
        with model.open_tensors(file) as handle:
            tensors = {name: handle.get_tensor(name).float() for name in handle.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from None
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    wrong = [n for n in sorted(wanted | tensors) if n not in tensors or wanted.get(n) != tensors[n].shape]
    if wrong:
        raise ValueError(f"{file}: tensor {wrong[0]} does not fit the architecture in config.json")
    net.load_state_dict(tensors, assign=True)
    return net.to(device).eval()


def load_caption_tokenizer(path, config):
    """The tokenizer.json of a renderer's folder, checked against its configuration."""
    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file):
        raise ValueError(f"{file}: missing")
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{file}: damaged ({error})") from None
    if tokenizer.get_vocab_size() != config.vocabulary:
        raise ValueError(f"{file}: {tokenizer.get_vocab_size()} words, config.json says {config.vocabulary}")
    return tokenizer


# ---- Training -------------------------------------------------------------------------------------------------------

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


class Scenes:
    """The renderer's training file: pictures, references, classes of cells, captions. The last 2 % are held out."""

    def __init__(self, folder):
        path = os.path.join(folder, "scenes.safetensors")
        with model.open_tensors(path) as file:
            self.image, self.references = file.get_tensor("image"), file.get_tensor("references")
            self.count, self.labels = file.get_tensor("reference_count"), file.get_tensor("labels")
            self.classes = int((file.metadata() or {}).get("classes", 0)) or int(self.labels.max()) + 1
        with open(os.path.join(folder, "scenes.jsonl"), encoding="utf-8") as file:
            self.captions = [json.loads(line)["caption"] for line in file]
        if len(self.captions) != len(self.image):
            raise ValueError(f"{path}: {len(self.image)} pictures for {len(self.captions)} captions")
        self.train = len(self.image) - max(1, len(self.image) // 50)  # rows before this one are for training


def step_generator(seed, step):
    """The generator of one training step: a run that stops and resumes draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train_vae(data, out, settings=VAETraining(), device="cpu"):
    """Train the VAE on ``data.image`` and write it to the folder ``out``. Returns the VAE."""
    s, started = settings, time.time()
    torch.manual_seed(s.seed)
    vae = VAE(VAEConfig()).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), s.lr, betas=(0.9, 0.99))
    for step in range(s.steps):
        generator = step_generator(s.seed, step)
        rate = s.lr * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / s.steps)))
        optimizer.param_groups[0]["lr"] = rate
        images = data.image[torch.randint(data.train, (s.batch,), generator=generator)].to(device)
        with torch.autocast(vae.mean.device.type, torch.bfloat16, enabled=s.bf16):
            loss, psnr = vae_loss(vae, images, generator, s.kl_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % s.log_every == 0 or step + 1 == s.steps:
            seconds = time.time() - started
            print(f"vae {step + 1}/{s.steps}  loss {loss.item():.4f}  psnr {psnr.item():.1f} dB  {seconds:.0f} s  "
                  f"{seconds / (step + 1) * (s.steps - step - 1):.0f} s left", flush=True)
    with torch.no_grad():
        samples = data.image[:min(2000, data.train)].split(250)
        mean = torch.cat([vae.encode(to_pixels(images.to(device)))[0] for images in samples])
        vae.mean.copy_(mean.mean((0, 1, 2)))
        vae.std.copy_(mean.std((0, 1, 2)))
        held = data.image[data.train:data.train + 200].to(device)
        square = (vae.to_images(vae.to_latents(held)).float() - held.float()).square().mean()
    save_folder(out, vae, {"command": model.command_line(), "settings": asdict(s), "seconds": round(time.time() - started),
                           "final_loss": loss.item(), "held_out_psnr": 10 * math.log10(255**2 / square.item())})
    return vae.eval()


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


class MuonAdamW:
    """Muon for the matrices of the layers, AdamW for everything else.

    Muon (Jordan, 2024) replaces the momentum of a matrix by the nearest one with all singular values about 1, found by
    five Newton-Schulz steps X <- aX + b(XX')X + c(XX')^2 X, and scales it by sqrt(rows / columns) where that exceeds 1.
    """

    def __init__(self, net, lr, muon_lr):
        named = dict(net.named_parameters())
        self.matrices = {n: p for n, p in named.items()
                         if n.startswith(("encoder.", "blocks.")) and n.endswith("weight") and p.dim() == 2}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.matrices.items()}
        self.others = {n: p for n, p in named.items() if n not in self.matrices}
        self.adam = torch.optim.AdamW(self.others.values(), lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.lr, self.muon_lr = lr, muon_lr

    @torch.no_grad()
    def step(self, scale):
        """One step with both learning rates times ``scale``; gradients are cleared."""
        self.adam.param_groups[0]["lr"] = self.lr * scale
        self.adam.step()
        for name, p in self.matrices.items():
            momentum = self.momentum[name].mul_(0.95).add_(p.grad)
            update = orthogonal(p.grad + 0.95 * momentum)
            p.add_(update.to(p.dtype), alpha=-self.muon_lr * scale * max(1, p.shape[0] / p.shape[1])**0.5)
        for p in [*self.others.values(), *self.matrices.values()]:
            p.grad = None

    def tensors(self):
        """State by name, for a checkpoint."""
        found = {f"muon.{n}": m for n, m in self.momentum.items()}
        for name, p in self.others.items():
            found |= {f"adam.{name}.{k}": v for k, v in self.adam.state[p].items()}
        return found

    def load(self, tensors):
        """Restore what ``tensors`` gave."""
        for name, m in self.momentum.items():
            m.copy_(tensors[f"muon.{name}"])
        for name, p in self.others.items():
            self.adam.state[p] = {k: tensors[f"adam.{name}.{k}"].clone() for k in ("step", "exp_avg", "exp_avg_sq")}


def orthogonal(matrix):
    """The orthogonal factor of a matrix, roughly (singular values 0.7 to 1.2), in bfloat16."""
    x = matrix.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def flow_loss(net, prompts, x0, labels, generator, s, denoise=None):
    """Rectified flow in x_0-prediction, ``s.levels`` noise levels a picture, + class_weight * cells' cross-entropy.

    (x_0' - x_0)^2 has weight 1 / max(t, 1/4): between that of x_0 (1) and that of v (1 / t^2).
    x0 (B, N, 4C), labels (B, N) int64; ``denoise`` is a compiled net.
    Returns loss, class loss, t (B * levels,), squared errors (B * levels,).
    """
    condition = net.encode(prompts).repeat(s.levels)
    x0, labels = x0.repeat_interleave(s.levels, 0), labels.repeat_interleave(s.levels, 0)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    t, pure = torch.rand(2, len(x0), generator=generator)
    t = torch.where(pure < s.pure_noise, 1.0, s.shift * t / (1 + (s.shift - 1) * t)).to(x0.device)
    predicted, logits = (net if denoise is None else denoise)(noised(x0, noise, t), t, condition, with_classes=True)
    square = (predicted.float() - x0).square().mean((1, 2))  # (B * levels,)
    class_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return (square / t.clamp(min=0.25)).mean() + s.class_weight * class_loss, class_loss, t, square.detach()


def training_rows(data, tokens, vae, index, generator, s):
    """Rows for ``pack``, with condition dropout, and normalised latents (B, N, 4C) of the pictures ``index``."""
    device, count = vae.mean.device, data.count[index].long()
    x0 = patchify(vae.to_latents(data.image[index].to(device)))
    present = torch.arange(data.references.shape[1]) < count[:, None]  # (B, 2)
    references = patchify(vae.to_latents(data.references[index][present].to(device))).cpu()  # (sum of counts, 16, 4C)
    dice = torch.rand(3, len(index), generator=generator)
    no_text, no_references = (dice[:2] < torch.tensor([[s.drop_text], [s.drop_references]])) | (dice[2] < s.drop_both)
    rows = []
    for i, part, a, b in zip(index.tolist(), references.split(count.tolist()), no_text, no_references):
        ids, places = tokens[i]
        rows.append((ids[:0] if a else ids, places[:0] if a else places, part[:0] if b else part))
    return rows, x0


class RendererRun:
    """A training run of the transformer: everything that a checkpoint has to hold."""

    def __init__(self, data, vae, out, settings, device="cpu"):
        self.data, self.vae, self.out, self.settings, self.device = data, vae, out, settings, device
        torch.manual_seed(settings.seed)
        self.file = os.path.join(out, "resume.safetensors")
        known = os.path.join(settings.start or out, "tokenizer.json")
        self.tokenizer = (Tokenizer.from_file(known) if settings.start or os.path.exists(self.file) else
                          train_caption_tokenizer(data.captions[:data.train], settings.min_frequency))
        config = RendererConfig(vocabulary=self.tokenizer.get_vocab_size(), classes=data.classes,
                                channels=vae.config.channels, width=settings.width, layers=settings.layers,
                                heads=settings.heads)
        self.net = (load_folder(settings.start, Transformer, RendererConfig, device).train() if settings.start else
                    Transformer(config).to(device))
        self.average = {k: v.detach().clone() for k, v in self.net.named_parameters()}
        self.optimizer = MuonAdamW(self.net, settings.lr, settings.muon_lr)
        self.tokens = tokenize(self.tokenizer, data.captions, config.max_words)
        self.columns = 1 + max(len(ids) for ids, _ in self.tokens) + config.references * config.reference_tokens
        self.denoise = torch.compile(self.net) if settings.compile else self.net
        self.step, self.seconds, self.figures = 0, 0.0, {}
        if os.path.exists(self.file):
            self.resume()

    def resume(self):
        """Go on from the checkpoint in the output folder."""
        with model.open_tensors(self.file) as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        if any(f"net.{k}" not in tensors or tensors[f"net.{k}"].shape != v.shape for k, v in self.average.items()):
            raise ValueError(f"{self.file}: belongs to a run with other settings; remove it to start afresh")
        self.net.load_state_dict({k: tensors[f"net.{k}"] for k in self.average})
        self.average = {k: tensors[f"average.{k}"].to(self.device) for k in self.average}
        self.optimizer.load(tensors)
        self.step, self.seconds = int(tensors["step"]), float(tensors["seconds"])
        print(f"renderer: resuming at step {self.step}", flush=True)

    def save(self):
        """The averaged weights as a renderer folder, and beside them what it takes to go on."""
        os.makedirs(self.out, exist_ok=True)
        self.tokenizer.save(os.path.join(self.out, "tokenizer.json"))
        training = {"command": model.command_line(), "settings": asdict(self.settings), "step": self.step,
                    "seconds": round(self.seconds), **self.figures}
        save_folder(self.out, self.net, training, self.average)
        tensors = {f"net.{k}": v.detach() for k, v in self.net.named_parameters()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()} | self.optimizer.tensors()
        tensors |= {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        model.write_tensors(self.file, {k: v.cpu().contiguous() for k, v in tensors.items()})

    def update(self):
        """One optimizer step. Returns (loss, class loss, t, squared errors, gradient norm)."""
        s, generator = self.settings, step_generator(self.settings.seed, self.step)
        index = torch.randint(self.data.train, (s.batch,), generator=generator)
        labels = self.data.labels[index].flatten(1).long().to(self.device)  # (B, N)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=s.bf16):
            with torch.no_grad():
                rows, x0 = training_rows(self.data, self.tokens, self.vae, index, generator, s)
            prompts = pack(rows, self.device, self.columns if s.compile else 0)  # compiled code wants one shape
            loss, class_loss, t, square = flow_loss(self.net, prompts, x0, labels, generator, s, self.denoise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 2.0)
        done = self.step / s.steps
        self.optimizer.step(min(1, (self.step + 1) / s.warmup, 0.01 + max(0.0, 1 - done) / s.decay))
        self.step += 1
        keep = min(s.ema, 1 - 1 / (self.step + 10))  # the average of a short past at first
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                self.average[name].lerp_(p, 1 - keep)
        return loss.item(), class_loss.item(), t, square, norm.item()


def train_renderer(data, vae, out, settings=RendererTraining(), device="cpu"):
    """Train the transformer on frozen latents; writes the folder ``out`` as it goes, and goes on where it stopped."""
    run, s = RendererRun(data, vae, out, settings, device), settings
    window, begun = [], time.time() - run.seconds
    while run.step < s.steps:
        window.append(run.update())
        run.seconds = time.time() - begun
        if run.step % s.log_every == 0 or run.step == s.steps:
            losses, class_losses, t, square, norms = zip(*window)
            t, square, window = torch.cat(t), torch.cat(square), []
            bins = torch.bucketize(t, torch.tensor(LEVELS, device=t.device), right=True)
            levels = [round(part.mean().item(), 4) if len(part) else None
                      for part in (square[bins == i] for i in range(len(LEVELS) + 1))]
            loss, class_loss, rate = float(np.mean(losses)), float(np.mean(class_losses)), run.seconds / run.step
            run.figures = {"loss": loss, "class_loss": class_loss, "x0_error_by_level": levels}
            print(f"renderer {run.step}/{s.steps}  loss {loss:.4f}  class {class_loss:.4f}  x0 error by t {levels}  "
                  f"grad {np.mean(norms):.2f}  {s.batch / rate:.0f} images/s  {run.seconds:.0f} s  "
                  f"{rate * (s.steps - run.step):.0f} s left", flush=True)
        if run.step % s.export_every == 0 or run.step == s.steps:
            run.save()
    if os.path.exists(run.file):  # done: what it took to go on is of no more use
        os.remove(run.file)
    return run


def train(data, out, seed=0, device="cpu", vae_steps=0, steps=0, **settings):
    """Train both networks from the folder ``data`` into out/vae and out/renderer; 0 steps means the default.

    ``settings``: other fields of RendererTraining. The VAE stays as it is where the transformer's run goes on.
    """
    scenes, renderer = Scenes(data), os.path.join(out, "renderer")
    if os.path.exists(os.path.join(renderer, "resume.safetensors")):
        vae = load_folder(os.path.join(out, "vae"), VAE, VAEConfig, device)
    else:
        vae = train_vae(scenes, os.path.join(out, "vae"),
                        VAETraining(seed=seed, steps=vae_steps or VAETraining.steps), device)
    settings = RendererTraining(seed=seed, steps=steps or RendererTraining.steps, **settings)
    train_renderer(scenes, vae, renderer, settings, device)


