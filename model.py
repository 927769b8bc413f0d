"""The policy: a Qwen3 decoder, its tokenizer, the log-probs that train, the engine that samples, its checkpoints.

    net, tokenizer = model.load("weights/policy")
    prompt = tokenizer.apply_chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    done = model.generate(net, [prompt] * 6, max_new_tokens=64, stop_ids=[tokenizer.id("<|im_end|>")])
    logps = model.token_logprobs(net, [prompt + d.tokens for d in done], temperature=0.7)

In reading order:

    Qwen3               the decoder; attention is an argument, everything else is written once
    Tokenizer           ChatML text <-> ids, and which ids an assistant writes
    PrefixTree          sequences with common beginnings as one stream, to train
    ChunkedLogprobs     log-probs and entropy without a matrix of tokens x words
    token_logprobs      what the losses read
    sample              nucleus sampling without a sort
    KVCache             keys and values, and which slot belongs to whom
    Engine              many conversations at once: schedule, prefill, decode
    generate            prompts -> completions
    Machine room        files, embeddings, adapters, processes, save_checkpoint (training state of any trainer)

One network, three ways to attend. The trunk runs over a flat stream of N tokens with no padding and leaves attention
to a callable `attend(layer, q, k, v)`: rows of equal length (`Qwen3.forward`), a packed prefix tree (`PrefixTree`, to
train), or a cache (`Engine`, to sample). Everything else - norms, projections, rotary phases - is written once.

Departures from the usual: q, k, v (and gate, up) are stored as one matrix and cut apart only in files; nucleus sampling
needs no sort (see `sample`); a random number is a function of (seed, position), so a neighbour cannot change it.

    N tokens of a flat stream    B rows    T tokens of a row    L tokens attended to    C hidden size    V vocabulary
    H query heads    J key/value heads    R = H / J    D head size    G groups that share a prompt    M rows of a group
"""
import ctypes
import filecmp
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer as FastTokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.checkpoint import checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- Decoder ---------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    vocab_size: int = 768
    hidden_size: int = 256       # C
    layers: int = 6
    heads: int = 4               # H
    kv_heads: int = 2            # J
    head_dim: int = 64           # D
    mlp_size: int = 768
    rope_theta: float = 1e6      # base of the rotary wavelengths
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the output layer is the embedding
    max_positions: int = 32768   # written to config.json; nothing here depends on it

    def __post_init__(self):
        sizes = (
            self.vocab_size, self.hidden_size, self.layers, self.heads,
            self.kv_heads, self.head_dim, self.mlp_size,
        )
        positive = all(isinstance(n, int) and n > 0 for n in sizes)
        if not positive or self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"sizes must be positive integers, heads a multiple of kv_heads, head_dim even: {self}")


class Linear(nn.Linear):
    """One matrix that stacks several projections of the same input; `parts` = ((name in files, rows), ...).

    A low-rank adapter (`add_lora`) belongs to a part: y_part += scale * B A x, A (r, in), B (rows, r).
    """

    def __init__(self, inputs, *parts):
        super().__init__(inputs, sum(rows for _, rows in parts), bias=False)
        self.parts = parts
        self.lora_scale = 0.0
        self.lora_A = nn.ParameterDict()  # keyed by the last word of the part's name
        self.lora_B = nn.ParameterDict()

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.lora_A or not self.lora_scale:  # scale 0: switched off by `without_lora`
            return y
        deltas = [self.delta(x, name, rows) for name, rows in self.parts]
        return y + torch.cat(deltas, -1).to(y.dtype)

    def delta(self, x, name, rows):
        key = name.split(".")[-1]
        if key not in self.lora_A:
            return x.new_zeros(*x.shape[:-1], rows)
        A, B = self.lora_A[key], self.lora_B[key]
        inner = F.linear(x.to(A.dtype), A)                                                # (..., r)
        return F.linear(inner, B) * self.lora_scale


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer
        self.shape = c.heads, c.kv_heads, c.head_dim
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

        self.norm1 = RMSNorm(c.hidden_size, c.norm_eps)
        self.qkv = Linear(c.hidden_size, ("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv))
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.out = Linear(q, ("self_attn.o_proj", c.hidden_size))

        self.norm2 = RMSNorm(c.hidden_size, c.norm_eps)
        self.gate_up = Linear(c.hidden_size, ("mlp.gate_proj", c.mlp_size), ("mlp.up_proj", c.mlp_size))
        self.down = Linear(c.mlp_size, ("mlp.down_proj", c.hidden_size))

    def forward(self, x, cos, sin, attend):
        """x (N, C), cos and sin (N, 1, D) -> (N, C)."""
        H, J, D = self.shape
        qk, v = self.qkv(self.norm1(x)).view(len(x), H + 2 * J, D).split((H + J, J), 1)   # (N, H + J | J, D)
        scale = torch.cat((self.q_norm.weight.expand(H, D), self.k_norm.weight.expand(J, D)))
        qk = F.rms_norm(qk, (D,), None, self.q_norm.eps) * scale
        q, k = rotate(qk, cos, sin).split((H, J), 1)                                      # (N, H | J, D)
        x = x + self.out(attend(self.layer, q, k, v).reshape(len(x), H * D))              # (N, C)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cos, sin):
    """Rotary positions: the pair (x_i, x_{i + D/2}) turns by angle i. `sin` carries the sign, so a roll is enough."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Qwen3(nn.Module):
    """`net(ids (B, T) int64) -> logits (B, T, V) float32`. Parameters may be float32 or bfloat16."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.head = None if c.tie_embeddings else Linear(c.hidden_size, ("lm_head", c.vocab_size))
        self.checkpointing = False  # recompute a block's activations in backward instead of keeping them

        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # std 1 / sqrt(fan in); what is added to the residual stream starts smaller
                depth = 2 * c.layers if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(parameter, std=(parameter.shape[1] * depth) ** -0.5)

    @property
    def output_weight(self):
        """(V, C), the matrix that turns hidden states into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32."""
        if self.head is None:
            return F.linear(hidden, self.output_weight).float()
        return self.head(hidden).float()

    def trunk(self, ids, positions, attend):
        """ids, positions (N,) int64 -> normalised hidden states (N, C). attend(layer, q (N, H, D), k, v (N, J, D))."""
        D = self.config.head_dim
        x = self.embed(ids)                                                               # (N, C)
        exponents = torch.arange(0, D, 2, device=ids.device).float() / D                  # (D / 2,)
        frequency = self.config.rope_theta ** -exponents
        angle = positions.float()[:, None, None] * frequency                              # (N, 1, D / 2)
        cos, sin = angle.cos(), angle.sin()
        cos = torch.cat((cos, cos), -1).to(x.dtype)                                       # (N, 1, D)
        sin = torch.cat((-sin, sin), -1).to(x.dtype)                                      # (N, 1, D), see `rotate`

        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)

    def forward_with(self, work, *arguments):
        """work(self, *arguments) as one forward pass: where weights are sharded, they are whole inside.

        work returns tensors (or None), in a tuple: FSDP looks for them there, to prepare backward.
        """
        return work(self, *arguments)

    def forward(self, ids):
        B, T = ids.shape

        def by_row(x):  # (N, H | J, D) -> (B, H | J, T, D)
            return x.view(B, T, -1, x.shape[-1]).transpose(1, 2)

        def attend(layer, q, k, v):
            return attention(by_row(q), by_row(k), by_row(v), is_causal=True).transpose(1, 2)

        positions = torch.arange(T, device=ids.device).repeat(B)
        hidden = self.trunk(ids.reshape(-1), positions, attend)                           # (N, C)
        return self.logits(hidden).view(B, T, -1)


def attend_causal(q, k, v):
    """The last t of L tokens look back: q (t, H, D), k and v (L, J, D) -> (t, H, D). Token i sees up to L - t + i."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v.to(q.dtype)))                    # (1, H | J, t | L, D)
    t, L = q.shape[2], k.shape[2]
    mask = None
    if t not in (1, L):
        mask = torch.ones(t, L, dtype=torch.bool, device=q.device).tril(L - t)
    with torch.autocast("cpu", enabled=False):  # this kernel's backward is twice as fast in float32 as in bfloat16
        out = attention(q, k, v, mask, is_causal=t == L)
    return out[0].transpose(0, 1)


# ---- Products: which kernel multiplies float32 matrices --------------------------------------------------------------

# On a CPU torch multiplies with MKL; where it is allowed to round, with oneDNN, which on some processors is twice as
# fast and does not round at all. So the choice is made by measuring. The name -> what torch calls the permission.
PRODUCTS = {"mkl": "highest", "onednn": "medium"}


@contextmanager
def products(name):
    """Multiply by a name of PRODUCTS inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(PRODUCTS[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FusedAttention(torch.autograd.Function):
    """The CPU's fused attention kernel, forward and backward, always with MKL's products.

    It multiplies small tiles, for which oneDNN takes three times as long. q, k, v (B, H, T | L, D); mask (T, L) float
    or None; returns (out (B, H, T, D), log-sum-exp of the scores (B, H, T)); only `out` has a gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, is_causal):
        with products("mkl"):
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=mask)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.is_causal = is_causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, mask, out, lse = ctx.saved_tensors
        with products("mkl"):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, ctx.is_causal, attn_mask=mask)
        return *grads, None, None


def attention(q, k, v, mask=None, is_causal=False):
    """softmax(q k^T / sqrt(D) + mask) v. q (B, H, T, D), k and v (B, J, L, D), mask (T, L) bool -> (B, H, T, D)."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(repeats, 1) for x in (k, v))                  # (B, H, L, D)
    return FusedAttention.apply(q, k, v, mask, is_causal)[0]


# ---- Tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(f"<{slash}{name}>" for name in ("think", "tool_call", "answer", "tool_response") for slash in ("", "/"))
SPLIT = r"\p{Lu}(?=[\p{Lu}\p{N}])|(?<=[\p{Lu}\p{N}])\p{Lu}| ?\p{L}\p{Ll}+| ?\p{Ll}|\p{Lu}|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{%- for m in messages %}{%- set text = m['content'] %}"
    "{%- if text is not string %}{%- set text = text | map(attribute='text') | join %}{%- endif %}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


class Tokenizer:
    """ChatML over a `tokenizers.Tokenizer`. Text that spells a special token never becomes one: special ids are added
    around it, as ids. ValueError if the vocabulary does not allow that."""

    def __init__(self, fast, config=None):
        self.fast = fast
        self.config = dict(config or {})

        # what a training script left switched on in the file: prompts cut or filled up, merges left out at random
        fast.no_truncation()
        fast.no_padding()
        if isinstance(fast.model, models.BPE):
            fast.model.dropout = None

        # "<|im_end|>" inside a text is ten ordinary characters, also where the file does not call it special
        known = [token for token in SPECIAL if fast.token_to_id(token) is not None]
        fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
        fast.encode_special_tokens = True
        if forged := [token for token in known if fast.token_to_id(token) in self.encode(token)]:
            raise ValueError(f"tokenizer: a text can forge {forged[0]}, which is a word of the vocabulary")

    @property
    def size(self):
        """One more than the largest id: what a network's vocabulary must hold. Not every id below need be a token."""
        return 1 + max(self.fast.get_vocab(with_added_tokens=True).values(), default=-1)

    def id(self, token):
        """Id of a special token or tag; ValueError if the vocabulary lacks it."""
        index = self.fast.token_to_id(token)
        if index is None:
            raise ValueError(f"tokenizer: no token {token!r}")
        return index

    def encode(self, text, add_special_tokens=False):
        return self.fast.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids):
        """Ids that the vocabulary lacks (a padded embedding has some) are left out."""
        known = [i for i in ids if self.fast.id_to_token(i) is not None]
        return self.fast.decode(known, skip_special_tokens=False)

    def apply_chat(self, messages, add_generation_prompt=False):
        """[{"role", "content"}] -> ids of `<|im_start|>role\\ncontent<|im_end|>\\n`, contents verbatim.

        A content is a text or a list of text parts, [{"type": "text", "text"}]; ValueError for any other message.
        """
        ids, _ = self.apply_chat_with_mask(messages)
        return ids + self._opening() if add_generation_prompt else ids

    def apply_chat_with_mask(self, messages):
        """(ids, mask): mask is True on what an assistant writes, its content and the <|im_end|> that closes it."""
        ids, mask = [], []
        for message in messages:
            role, content = message_text(message)
            if role == "assistant":  # cut where sampling starts, so that demonstrations and rollouts have the same ids
                head = self._opening()
                body = self.encode(content)
            else:
                head = [self.id("<|im_start|>")] + self.encode(f"{role}\n{content}")
                body = []
            body.append(self.id("<|im_end|>"))
            end = self.encode("\n")

            ids += head + body + end
            written = [role == "assistant"] * len(body)
            mask += [False] * len(head) + written + [False] * len(end)
        return ids, mask

    def observation(self, text, role="user", closed=True):
        """Ids to append after an assistant's turn: a message, and the opening of the next turn.

        `closed` says whether the turn ended in <|im_end|>; a turn cut at its length gets the one it lacks.
        """
        end = [] if closed else [self.id("<|im_end|>")]
        message = [{"role": role, "content": text}]
        return end + self.encode("\n") + self.apply_chat(message, add_generation_prompt=True)

    def _opening(self):
        return [self.id("<|im_start|>")] + self.encode("assistant\n")


def message_text(message):
    """(role, content) of a chat message; text parts are put together, as Qwen's chat templates do. ValueError if there
    is no such text: a picture, null beside tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"a chat message is an object with a role, not {type(message).__name__}")
    role, content = message["role"], message.get("content")
    parts = content if isinstance(content, list) else [content]

    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"a message of the role {role!r}: its content must be text, not {kind}")
        texts.append(part)
    return role, "".join(texts)


def token_list(ids, vocab_size, what):
    """Token ids - a list, a tuple, an array or a tensor (T,) of integers - as a list of int.

    ValueError, with `what` they are, where one is no integer or not in the vocabulary.
    """
    if isinstance(ids, (np.ndarray, torch.Tensor)):
        ids = ids.tolist()
    if isinstance(ids, (list, tuple, set, frozenset, range)):
        ids = list(ids)
        if not set(map(type, ids)) <= {int}:
            ids = [int(i) if isinstance(i, np.integer) else i for i in ids]
        if set(map(type, ids)) <= {int} and (not ids or 0 <= min(ids) <= max(ids) < vocab_size):
            return ids
    raise ValueError(f"{what} must be token ids, whole numbers from 0 to {vocab_size - 1}")


# ---- Log-probs for training ------------------------------------------------------------------------------------------

SHORTEST_SHARED = 16  # tokens: a shorter common prefix is not worth a branch


def common_prefix(a, b):
    """Length of the longest common prefix of two token lists, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def branch_points(shared, start):
    """Where later sequences leave this one: running minima of the neighbours' common prefixes, at useful distances."""
    points, low = [], math.inf
    for length in shared:
        low = min(low, length)
        if low <= start:
            break
        points.append(low)

    kept = []
    for point in sorted(set(points)):
        if point - start >= SHORTEST_SHARED:
            kept.append(point)
            start = point
    return kept


class PrefixTree:
    """Sequences as one flat stream in which a prefix that neighbours share stands once.

    The stream is cut into segments. A segment attends to its ancestors and, causally, to itself: `paths[i]` are the
    segments from the root to segment i. So a prompt is computed once for all its branches, and backward adds up what
    the branches send to it. `token_rows[s]` (T_s,) is where the tokens of sequence s stand in the stream.
    """

    def __init__(self, sequences, device):
        ids, positions = [], []
        self.sizes, self.paths, self.token_rows = [], [], []
        neighbours = zip(sequences, sequences[1:])
        shared = [0, *(common_prefix(a, b) for a, b in neighbours), 0]

        path, ends, rows = [], [], []  # of the sequence at hand: its segments, where in it they end, its stream rows
        for s, sequence in enumerate(sequences):
            while ends and ends[-1] > shared[s]:  # back to the segment that this sequence shares with the one before
                ends.pop()
                path.pop()
            start = ends[-1] if ends else 0
            rows = rows[:start]

            # new segments for the rest, cut where later sequences branch off
            for stop in branch_points(shared[s + 1:], start) + [len(sequence)]:
                if stop > start:
                    path.append(len(self.sizes))
                    ends.append(stop)
                    self.sizes.append(stop - start)
                    self.paths.append(tuple(path))
                    rows += range(len(ids), len(ids) + stop - start)
                    ids += sequence[start:stop]
                    positions += range(start, stop)
                    start = stop
            self.token_rows.append(torch.tensor(rows, dtype=torch.long, device=device))
        self.ids = torch.tensor(ids, dtype=torch.long, device=device)                     # (N,)
        self.positions = torch.tensor(positions, dtype=torch.long, device=device)         # (N,)

    def attend(self, layer, q, k, v):
        """q (N, H, D), k and v (N, J, D) -> (N, H, D). `split` rather than slices: its backward is one copy."""
        q, k, v = q.split(self.sizes), k.split(self.sizes), v.split(self.sizes)

        def along(path, parts):
            if len(path) == 1:
                return parts[path[0]]
            return torch.cat([parts[i] for i in path])

        outs = []
        for path in self.paths:
            outs.append(attend_causal(q[path[-1]], along(path, k), along(path, v)))
        return torch.cat(outs)


def hidden_states(net, sequences):
    """Token lists -> (hidden (N, C) of the packed stream, rows): hidden[rows[s]] (T_s, C) belongs to sequence s.

    Row t predicts token t + 1. Neighbouring sequences with a common prefix share its rows.
    """
    packed = PrefixTree(sequences, net.embed.weight.device)
    return net.trunk(packed.ids, packed.positions, packed.attend), packed.token_rows


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target] and the entropy, without the (N, V) matrix, forward or backward.

    Both passes walk over tiles of at most `tile` tokens x `tile` words; forward keeps a running log-sum-exp, backward
    rebuilds a tile's p from it: d logp / d z_j = 1[j = target] - p_j, d entropy / d z_j = -p_j (log p_j + entropy).
    Price: the products with W are four, not three, because the tile is computed again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, tile, dtype):
        N, V = len(hidden), len(weight)
        logp, entropy, lse = (torch.empty(N, device=hidden.device) for _ in range(3))
        for a in range(0, N, tile):
            b = min(a + tile, N)
            h = hidden[a:b].to(dtype)
            total, weighted, chosen = torch.zeros(3, b - a, device=h.device)
            top = torch.full_like(total, -math.inf)

            for c in range(0, V, tile):
                z = F.linear(h, weight[c:c + tile].to(dtype)).float().div_(temperature)   # (n, v)
                # the target's logit, where the target lies in this tile
                inside = (targets[a:b] >= c) & (targets[a:b] < c + tile)
                local = (targets[a:b, None] - c).clamp(0, z.shape[1] - 1)
                picked = z.gather(1, local).squeeze(1)
                chosen = torch.where(inside, picked, chosen)

                # running sums of exp(z - top) and z exp(z - top): what there is is scaled to the new maximum
                high = torch.maximum(top, z.amax(1))
                fade = (top - high).exp()
                e = (z - high[:, None]).exp_()
                total = total * fade + e.sum(1)
                weighted = weighted * fade + e.mul_(z).sum(1)
                top = high

            lse[a:b] = top + total.log()
            logp[a:b] = chosen - lse[a:b]
            entropy[a:b] = lse[a:b] - weighted / total                                    # H = log Z - E[z]
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.settings = temperature, tile, dtype
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, tile, dtype = ctx.settings

        g_hidden, g_weight = (torch.zeros(x.shape, device=x.device) for x in (hidden, weight))  # float32 sums
        with_entropy = bool(g_entropy.any())
        for c in range(0, len(weight), tile):
            w = weight[c:c + tile].to(dtype)
            for a in range(0, len(hidden), tile):
                s = slice(a, a + tile)
                h = hidden[s].to(dtype)
                g = F.linear(h, w).float().div_(temperature).sub_(lse[s, None])           # log p (n, v)
                # gradient with respect to z: -p_j (...) everywhere, and g_logp at the target
                if with_entropy:
                    logs = g.clone()
                    from_entropy = g_entropy[s, None] * (logs + entropy[s, None])
                    g.exp_().mul_(-g_logp[s, None] - from_entropy)
                else:
                    g.exp_().mul_(-g_logp[s, None])

                local = targets[s] - c
                inside = (local >= 0) & (local < g.shape[1])
                local = local.clamp(0, g.shape[1] - 1)[:, None]
                g.scatter_add_(1, local, (g_logp[s] * inside)[:, None])
                g = g.div_(temperature).to(dtype)
                g_hidden[s] += g @ w
                g_weight[c:c + tile] += g.T @ h
        return g_hidden.to(hidden.dtype), g_weight.to(weight.dtype), None, None, None, None


def chunked_logprobs(hidden, weight, targets, temperature=1.0, tile=None):
    """hidden (N, C), weight (V, C), targets (N,) -> (logp (N,), entropy (N,)) float32, differentiable in the first two.

    Equals log_softmax(hidden @ weight.T / temperature) and its gather; memory grows with tile^2, not with N x V.
    """
    if not COLDEST <= temperature < math.inf:
        raise ValueError(f"log-probs at temperature {temperature}: it must be a number above 0")
    kind = hidden.device.type
    tile = tile or (1024 if kind == "cpu" else 8192)  # a tile that stays in a core's cache; one that fills a GPU
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        return ChunkedLogprobs.apply(hidden, weight, targets, temperature, tile, dtype)


class WeightedLogprobs(torch.autograd.Function):
    """sum_t w_t log p_t with w known beforehand: forward has all that the gradients need, d / d z = w (1[target] - p),
    so the products with W are three, not four. Memory: `rows` x V."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, rows, dtype):
        total = torch.zeros((), device=hidden.device)
        w = weight.to(dtype)
        g_hidden = torch.empty_like(hidden)
        g_weight = torch.zeros(weight.shape, device=weight.device)
        for a in range(0, len(hidden), rows):
            s = slice(a, a + rows)
            h, y, scale = hidden[s].to(dtype), targets[s, None], weights[s, None]
            p = F.linear(h, w).float()                                                    # (n, V)
            torch.log_softmax(p, 1, out=p)
            total += (p.gather(1, y) * scale).sum()
            p = p.exp_().mul_(-scale).scatter_add_(1, y, scale).to(dtype)
            g_hidden[s] = p @ w
            if g_weight.dtype == dtype:
                g_weight.addmm_(p.T, h)
            else:
                g_weight += p.T @ h
        ctx.save_for_backward(g_hidden, g_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, upstream):
        g_hidden, g_weight = ctx.saved_tensors
        return g_hidden * upstream, g_weight.mul_(upstream), None, None, None, None       # in place: it is used once


def weighted_logprobs(hidden, weight, targets, weights, rows=None):
    """hidden (N, C), weight (V, C), targets (N,), weights (N,) -> sum of weights * log_softmax(hidden weight')[target],
    a scalar that backward may pass once; differentiable in the first two. For losses that are linear in log p (SFT)."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        rows = rows or max(64, 2**25 // len(weight))                                      # about 128 MiB of logits
        return WeightedLogprobs.apply(hidden, weight, targets, weights, rows, dtype)


def token_logprobs(net, sequences, temperature=1.0):
    """List of (T - 1,) float32: log p of tokens 1..T-1 of each sequence, differentiable.

    sequences: token lists, arrays or tensors. One of a single token has nothing to predict: (0,); an empty one, too.
    """
    return token_logprobs_and_entropy(net, sequences, temperature)[0]


def token_logprobs_and_entropy(net, sequences, temperature=1.0, masks=None):
    """([logp], [entropy]): a vector (T - 1,) for each sequence, computed where masks[s][t] (t = 1..T-1), 0 elsewhere.

    A shared token's prediction is scored once, however many sequences contain it.
    """
    V, device = net.config.vocab_size, net.embed.weight.device
    sequences = [token_list(s, V, f"sequence {i}") for i, s in enumerate(sequences)]
    if not any(sequences):
        nothing = [torch.zeros(0, device=device) for _ in sequences]
        return nothing, nothing

    # the row that predicts each token, and the token
    hidden, rows = hidden_states(net, sequences)
    row = torch.cat([r[:-1] for r in rows])                                               # (S,) over all sequences
    target = torch.cat([torch.tensor(s[1:], dtype=torch.long, device=device) for s in sequences])

    # a pair (row, target) that several sequences contain is computed once: inverse (S,) tells where it stands
    if masks is None:
        pairs, inverse = torch.unique(row * V + target, return_inverse=True)
    else:
        wanted = torch.cat([torch.tensor(m[1:], dtype=torch.bool, device=device) for m in masks])
        pairs, inverse_wanted = torch.unique((row * V + target)[wanted], return_inverse=True)
        inverse = torch.full((len(row),), len(pairs), device=device)                      # elsewhere: the zero below
        inverse.masked_scatter_(wanted, inverse_wanted)

    logp, entropy = chunked_logprobs(hidden[pairs // V], net.output_weight, pairs % V, temperature)
    lengths = [max(len(s) - 1, 0) for s in sequences]

    def by_sequence(values):
        return F.pad(values, (0, 1))[inverse].split(lengths)

    return by_sequence(logp), by_sequence(entropy)


# ---- Sampling --------------------------------------------------------------------------------------------------------

MASK64 = 2**64 - 1
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64
ROUNDS = 64  # draws per token, at most
COLDEST = 1e-30  # the lowest temperature but 0: logits of up to 1e8 divided by it are still float32 numbers


def signed(x):
    """The int64 with the bits of x mod 2^64."""
    x &= MASK64
    return x - 2**64 if x >> 63 else x


def stream(seed):
    """A well-mixed 64-bit state from any integer seed, the start of a sequence's random numbers."""
    z = (seed * GOLDEN + MIX1) & MASK64
    z = ((z ^ (z >> 30)) * MIX1) & MASK64
    return signed(z ^ (z >> 27))


def uniform(streams, counters):
    """int64 (B,) and (B,) -> float32 (B,) in [0, 1): splitmix64 of (stream, counter), the same on every machine."""
    z = streams + counters * signed(GOLDEN)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * signed(MIX1)  # the masks make the shifts logical
    z = (z ^ ((z >> 27) & (2**37 - 1))) * signed(MIX2)
    z = z ^ ((z >> 31) & (2**33 - 1))
    return ((z >> 40) & (2**24 - 1)).float() * 2.0**-24


def sample(logits, temperature, top_p, streams, positions):
    """One token per row: logits (B, V) float32, the others (B,) -> (tokens (B,), logp (B,)).

    logp is log softmax(logits / temperature), before top-p; at temperature 0 the token is the argmax, logp untempered.
    Where logits are nan or inf, logp is nan and the token means nothing: nothing is looked at here, the engine does.

    Nucleus sampling without a sort: a token is in the nucleus if what is likelier than it weighs less than top_p. Draw
    from the whole distribution and test that one token; if it falls outside, draw again from what is likelier than it.
    The nucleus lies within that, so what is accepted follows the truncated distribution exactly.
    """
    host = logits.device.type == "cpu"  # where looking at a result is free
    greedy = temperature <= 0
    logp = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)      # (B, V)
    tokens = logits.argmax(-1) if not host or greedy.any() else torch.zeros_like(streams)
    p, floor = logp.exp(), torch.where(greedy, math.inf, 0.0)                             # only p > floor may be drawn
    limit = torch.where(top_p >= 1, math.inf, top_p.clamp(min=1e-6))
    rows = torch.arange(len(p), device=p.device)

    for attempt in range(ROUNDS if host else 8):                                          # after 8, the argmax stands
        mass = (p if attempt == 0 else torch.where(p > floor[:, None], p, 0.0)).cumsum(-1)
        u = uniform(streams[rows], positions[rows] * ROUNDS + attempt) * mass[:, -1]
        drawn = torch.searchsorted(mass, u[:, None], right=True).clamp_(max=p.shape[1] - 1)  # (b, 1)
        weight = p.gather(1, drawn)                                                       # (b, 1)
        likelier = torch.where(p > weight, p, 0.0).sum(-1)
        weight = weight.squeeze(1)
        accepted = (likelier < limit[rows]) & (weight > floor)
        tokens[rows] = torch.where(accepted, drawn.squeeze(1), tokens[rows])
        floor = torch.where(accepted, math.inf, torch.maximum(floor, weight))
        if host:  # go on with the rows that were refused
            again = (floor < math.inf).nonzero().squeeze(1)
            if not len(again):
                break
            rows, p, floor = rows[again], p[again], floor[again]
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


# ---- Cache and engine ------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class SlotOwner:
    """Tokens whose keys and values stand in a slot of the cache."""
    tokens: list
    slot: int = -1               # -1: none
    cached: int = 0              # tokens in the slot
    logits: torch.Tensor = None  # (V,) after the last token, once they are computed
    generation: int = 0          # of the weights that computed what is cached, see `WeightsCounter`

    prefix = None                # the shared prompt in front of them, in a slot of its own

    @property
    def computed(self):
        """How many of the tokens have keys and values in the cache, the shared prompt's included."""
        return self.cached + (len(self.prefix.tokens) if self.prefix else 0)


@dataclass(eq=False)
class Prefix(SlotOwner):
    """A prompt that several sequences share; its keys and values stand once in the cache."""
    users: int = 0


@dataclass(eq=False)
class Sequence(SlotOwner):
    """One conversation. `tokens` holds all of it, `logprobs` one number for each sampled token."""
    logprobs: list = field(default_factory=list)
    finish: str = ""             # of the last turn: "stop", "length" or "error"; "" while it runs
    prompt: tuple = None         # the first turn's tokens, until that turn starts
    prefix: Prefix = None
    stream: int = 0              # of its random numbers, see `uniform`
    max_length: int = 0          # the turn ends when len(tokens) reaches this
    temperature: float = 0.7
    top_p: float = 0.95
    stop_ids: frozenset = frozenset()


class KVCache:
    """Keys and values (layers, slots, J, capacity, D), and which slot belongs to whom.

    The first `slots` slots hold sequences, half as many behind them hold shared prompts. `slot_owner[i]` is a Sequence,
    a Prefix or None; an owner's keys and values are the first `owner.cached` of slot `owner.slot`.
    """

    def __init__(self, net, slots, capacity):
        c, weight = net.config, net.embed.weight
        self.slots = slots
        self.capacity = capacity
        n_slots = slots + (slots + 1) // 2
        shape = c.layers, n_slots, c.kv_heads, capacity, c.head_dim
        self.keys = zeros(shape, weight)
        self.values = zeros(shape, weight)
        self.slot_owner = [None] * n_slots
        self.written = 0     # places of a slot, from its start, of which some slot holds, or held, something
        self.set_aside = {}  # owner without a slot -> (keys, values) (layers, J, cached, D)

    def allocate(self, owner):
        """Give the owner a free slot, and there its keys and values if they are set aside. False if none is free."""
        is_shared = isinstance(owner, Prefix)
        slots = range(self.slots, len(self.slot_owner)) if is_shared else range(self.slots)
        free = [slot for slot in slots if self.slot_owner[slot] is None]
        if not free:
            return False
        owner.slot = free[0]
        self.slot_owner[owner.slot] = owner
        if owner in self.set_aside:
            keys, values = self.set_aside.pop(owner)
            self.keys[:, owner.slot, :, :owner.cached] = keys
            self.values[:, owner.slot, :, :owner.cached] = values
        return True

    def free(self, owner):
        """Take the owner's slot away, and forget its keys and values."""
        if owner.slot >= 0:
            self.slot_owner[owner.slot] = None
        owner.slot = -1
        self.forget(owner)

    def forget(self, owner):
        """The owner's keys and values are out of date: they will be computed again."""
        self.set_aside.pop(owner, None)
        owner.cached = 0

    def clear_nan(self):
        """Zeros for what is no number. A masked place has weight 0, but 0 times nan would still be nan."""
        stop = self.written if self.keys.device.type == "cpu" else self.capacity          # untouched memory stays so
        for cache in (self.keys, self.values):
            cache[..., :stop, :].nan_to_num_(0.0, 0.0, 0.0)

    def lend(self, owner):
        """Free the owner's slot for another and set its keys and values aside, until `allocate` puts them back."""
        keys = self.keys[:, owner.slot, :, :owner.cached].clone()
        values = self.values[:, owner.slot, :, :owner.cached].clone()
        self.set_aside[owner] = keys, values
        self.slot_owner[owner.slot] = None
        owner.slot = -1

    def swap(self, a, b):
        """Exchange two slots with all that they hold."""
        owners = self.slot_owner[a], self.slot_owner[b]
        n = max(owner.cached for owner in owners if owner)
        for cache in (self.keys, self.values):
            cache[:, [a, b], :, :n] = cache[:, [b, a], :, :n]
        for owner, slot in zip(owners, (b, a)):
            self.slot_owner[slot] = owner
            if owner:
                owner.slot = slot

    def compact(self, owners, first):
        """Move owners so that they hold the slots first, first + 1, ...; in what order does not matter."""
        stop = first + len(owners)
        holes = sorted(set(range(first, stop)) - {owner.slot for owner in owners})
        for owner in owners:
            if owner.slot >= stop:
                self.swap(owner.slot, holes.pop(0))

    def copy_prefix(self, source, owner, n):
        """Copy the keys and values of the first n tokens in slot `source` to the owner's slot, which was empty."""
        for cache in (self.keys, self.values):
            cache[:, owner.slot, :, :n] = cache[:, source, :, :n]
        owner.cached = n

    def append(self, layer, owner, k, v):
        """Write k and v (t, J, D) behind the owner's tokens; all that these t look back to: keys, values (L, J, D).

        `owner.cached` stays, for the other layers write at the same place.
        """
        stop = owner.cached + len(k)
        self.written = max(self.written, stop)
        visible = []
        for cache, new in ((self.keys, k), (self.values, v)):
            slot = cache[layer, owner.slot]                                               # (J, capacity, D)
            slot[:, owner.cached:stop] = new.transpose(0, 1)
            own = slot[:, :stop]
            if owner.prefix:
                shared = cache[layer, owner.prefix.slot, :, :len(owner.prefix.tokens)]
                own = torch.cat((shared, own), 1)
            visible.append(own.transpose(0, 1))                                           # (L, J, D)
        return visible


def zeros(shape, like):
    """Zeros that take memory only where they are written (on a CPU)."""
    if like.device.type == "cpu":
        memory = mmap.mmap(-1, math.prod(shape) * like.itemsize)
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


class SharedPrompts:
    """Prompts that stand once in the cache, for all sequences which begin with them."""

    def __init__(self, cache):
        self.cache = cache
        self.prefixes = {}        # prompt -> Prefix in the cache
        self.pending = Counter()  # prompt -> open sequences that have not started their first turn

    def attach(self, sequence):
        """Let a first turn use the shared prompt, if there is one or others are about to start with the same."""
        prompt = sequence.prompt
        if prompt in self.prefixes and self.prefixes[prompt].generation != sequence.generation:
            self.retire(self.prefixes[prompt])
        if prompt not in self.prefixes and self.pending[prompt] > 1 and len(prompt) >= SHORTEST_SHARED:
            prefix = Prefix(list(prompt), generation=sequence.generation)
            if self.cache.allocate(prefix):
                self.prefixes[prompt] = prefix
        if prompt in self.prefixes:
            sequence.prefix = self.prefixes[prompt]
            sequence.prefix.users += 1
        self.started(sequence)

    def started(self, sequence):
        """The sequence no longer counts among those that will want its prompt."""
        prompt, sequence.prompt = sequence.prompt, None
        self.pending[prompt] -= 1
        if not self.pending[prompt]:
            del self.pending[prompt]
        if prompt in self.prefixes:
            self.free_if_unused(self.prefixes[prompt])

    def leave(self, sequence):
        """The sequence no longer looks back to a shared prompt."""
        prefix, sequence.prefix = sequence.prefix, None
        if prefix:
            prefix.users -= 1
            self.free_if_unused(prefix)

    def retire(self, prefix):
        """Nobody starts with this prefix any more; who looks back to it keeps it."""
        if self.is_offered(prefix):
            del self.prefixes[tuple(prefix.tokens)]
        self.free_if_unused(prefix)

    def is_offered(self, prefix):
        """Whether a sequence with this prompt would start with this prefix."""
        return self.prefixes.get(tuple(prefix.tokens)) is prefix

    def free_if_unused(self, prefix):
        prompt, is_offered = tuple(prefix.tokens), self.is_offered(prefix)
        if prefix.users == 0 and not (is_offered and prompt in self.pending):
            self.cache.free(prefix)
            if is_offered:
                del self.prefixes[prompt]


class WeightsCounter:
    """How often a net's weights have changed, as far as PyTorch counts: in place, through a tensor or `detach`, but not
    through `.data`, nor by an optimizer with fused=True."""

    def __init__(self, net):
        self.linears = [module for module in net.modules() if isinstance(module, Linear)]
        self.others = [module for module in net.modules() if isinstance(module, (RMSNorm, nn.Embedding))]
        self.generation = 0
        self.places = self.changes = None  # where each weight lies, and how often it has changed

    def look(self):
        """Count `generation` on if anything has changed since the last look."""
        weights = [module.weight for module in self.linears + self.others]
        scales = []
        for linear in self.linears:
            if linear.lora_A:
                weights += [*linear.lora_A.values(), *linear.lora_B.values()]
                scales.append(linear.lora_scale)

        before = self.places, self.changes
        self.places = [weight.data_ptr() for weight in weights] + scales  # all that a CUDA graph fixes
        self.changes = [0 if weight.is_inference() else weight._version for weight in weights]
        self.generation += before != (self.places, self.changes)


def check_sampling(max_new_tokens, temperature, top_p):
    """Raise ValueError for settings with which no token could be sampled, or always the same."""
    if not max_new_tokens >= 0:  # nan, too
        raise ValueError(f"max_new_tokens {max_new_tokens}: must not be negative")
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: 0 (greedy) or a number from {COLDEST} on")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p {top_p}: must lie between 0 and 1")


class NoNumber(ValueError):
    """Logits were nan or inf: a network that has diverged, or overflows in its precision."""


class Engine:
    """Samples many conversations at once, and keeps each one's cache across its turns.

        sequence = engine.open(prompt_ids, seed)
        engine.submit(sequence, max_new_tokens, temperature, top_p, stop_ids)     # queue one turn
        for sequence in engine.poll(): ...                                        # decode until a turn ends
        engine.extend(sequence, ids)                                              # an observation, for the next turn
        engine.close(sequence)

    At most `slots` sequences run at a time. Those that run hold the first slots of the cache: whoever ends a turn moves
    behind them, so a step works on views, never on copies. A sequence that waits for a tool keeps its slot until
    another one needs it; then its keys and values are set aside, not computed again. So more conversations may be open
    than there are slots.

    Weights are read live (adapters, too). What older weights computed is computed again at the start of the next turn;
    only a turn in the middle of which the weights change goes on over the keys and values that it has. An optimizer
    with fused=True changes weights without PyTorch counting it: make a new engine then.

    Ids are checked where they come in, once. Where logits are not numbers, `poll` and `step` raise ValueError: those
    conversations have ended (finish "error"), all others go on at the next call.
    """

    def __init__(self, net, slots=64, capacity=1024):
        self.net = net
        self.slots = slots
        self.capacity = capacity          # tokens of a conversation, at most
        self.device = net.embed.weight.device
        self.cache = KVCache(net, slots, capacity)
        self.prompts = SharedPrompts(self.cache)
        self.weights = WeightsCounter(net)
        self.batch = DecodeBatch(net, self.cache)
        self.batch_changed = False        # its inputs must be written anew

        self.waiting = deque()            # sequences with a turn to start, in order of submission
        self.running = []                 # sequences that decode
        self.ended = []                   # sequences whose turn has ended, for `step` to return
        self.wave_tokens = 1024 if self.device.type == "cpu" else 8192  # of a prefill pass; few stay in a CPU's cache
        self.stats = Counter()            # tokens prefilled, decoded; steps

    def open(self, prompt, seed=0):
        """A new conversation. Its random numbers depend on `seed` and the position alone."""
        prompt = token_list(prompt, self.net.config.vocab_size, "a prompt")
        if not prompt:
            raise ValueError("a prompt must hold 1 token id or more")
        sequence = Sequence(prompt, prompt=tuple(prompt), stream=stream(seed))
        self.prompts.pending[sequence.prompt] += 1
        return sequence

    def extend(self, sequence, ids):
        """Append ids (an observation) between two turns."""
        self.check_between_turns(sequence)
        sequence.tokens += token_list(ids, self.net.config.vocab_size, "an observation")

    def submit(self, sequence, max_new_tokens, temperature=0.7, top_p=0.95, stop_ids=()):
        """Queue one turn. It ends with a stop id (kept), after max_new_tokens, or where the capacity ends.

        temperature 0 takes the likeliest token each time. ValueError for settings that cannot be sampled with.
        """
        self.check_between_turns(sequence)
        check_sampling(max_new_tokens, temperature, top_p)
        stop_ids = token_list(stop_ids, self.net.config.vocab_size, "stop ids")

        sequence.max_length = min(len(sequence.tokens) + max_new_tokens, self.capacity)
        sequence.temperature = temperature
        sequence.top_p = top_p
        sequence.stop_ids = frozenset(stop_ids)
        sequence.finish = ""
        self.waiting.append(sequence)

    def check_between_turns(self, sequence):
        """Raise ValueError while a turn of the sequence waits or runs: more tokens or a second turn would be lost."""
        if sequence in self.running or sequence in self.waiting:
            raise ValueError("the sequence's turn has not ended yet")

    def close(self, sequence):
        """Give the slot back. Closing twice, or while the turn runs, is allowed."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.batch_changed = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.prompt is not None:
            self.prompts.started(sequence)
        self.cache.free(sequence)
        self.prompts.leave(sequence)

    def poll(self):
        """Work until a turn ends; returns the sequences whose turn has ended ([]: nothing was submitted)."""
        ended = []
        while not ended and (self.waiting or self.running or self.ended):
            ended = self.step()
        return ended

    @torch.inference_mode()
    def step(self):
        """Start queued turns, then decode one token of each running sequence; returns those whose turn has ended."""
        admitted = self.schedule()
        if admitted:
            self.append_tokens(admitted, *self.prefill(admitted))
        if self.running and not self.ended:
            self.append_tokens(self.running, *self.decode())
        ended, self.ended = self.ended, []
        return ended

    # -- schedule: who runs, and in which slot

    def schedule(self):
        """Admit queued turns, in order, while slots last. What has no room for a single token has ended."""
        admitted = []
        if self.waiting:
            self.notice_new_weights()
        while self.waiting:
            sequence = self.waiting[0]
            if len(sequence.tokens) >= sequence.max_length:  # the context is full: the turn ends without a token
                sequence.finish = "length"
                self.ended.append(self.waiting.popleft())
                continue
            if sequence.generation != self.weights.generation:  # computed by older weights: again, the prompt, too
                self.cache.forget(sequence)
                self.prompts.leave(sequence)
                sequence.generation = self.weights.generation
            if sequence.slot < 0 and not self.find_slot(sequence):
                break
            if sequence.prompt is not None:
                self.prompts.attach(sequence)
            self.waiting.popleft()
            self.running.append(sequence)
            self.batch_changed = True
            admitted.append(sequence)
        return admitted

    def notice_new_weights(self):
        """See whether the weights have changed; a CUDA graph survives that unless they lie elsewhere now."""
        places = self.weights.places
        self.weights.look()
        if self.weights.places != places:
            self.batch.graphs.clear()

    def find_slot(self, sequence):
        """Whether there is a slot: a free one, or that of a conversation which does not run and lends it."""
        if self.cache.allocate(sequence):
            return True
        idle = [owner for owner in self.cache.slot_owner[:self.slots] if owner not in self.running]
        if not idle:
            return False

        # take it from a conversation that waits for a tool, else from the last one in the queue
        position = {waiting: i for i, waiting in enumerate(self.waiting)}
        lender = max(idle, key=lambda owner: position.get(owner, math.inf))
        self.cache.lend(lender)
        return self.cache.allocate(sequence)

    # -- prefill: keys and values of prompts and observations

    def prefill(self, admitted):
        """Compute all pending tokens of these sequences, then sample one token of each -> (tokens, logps), lists."""
        # shared prompts count once, and come before the sequences that look back to them
        prefixes = [s.prefix for s in admitted if s.prefix and not s.prefix.cached]
        jobs = list(dict.fromkeys(prefixes + admitted))
        while jobs:
            wave = self.next_wave(jobs)
            if wave:
                self.prefill_wave(wave)
            jobs = [job for job in jobs if job.computed < len(job.tokens)]

        # a sequence that is all shared prompt goes on from the prompt's last logits
        logits = [s.prefix.logits if s.logits is None else s.logits for s in admitted]    # n x (V,)
        params = torch.tensor([[s.temperature, s.top_p] for s in admitted], device=self.device)
        counters = torch.tensor([[s.stream, len(s.tokens)] for s in admitted], device=self.device)
        tokens, logp = sample(torch.stack(logits), *params.T, *counters.T)
        for s in admitted:
            s.logits = None
        return tokens.tolist(), logp.tolist()

    def next_wave(self, jobs):
        """What one prefill pass computes: [(job, ids)], up to `wave_tokens` ids in all; the longest job in parts."""
        wave, budget = [], self.wave_tokens
        for job in jobs:
            if job.prefix and job.prefix.computed < len(job.prefix.tokens):
                continue  # its prompt comes first
            if not job.computed and self.reuse_beginning(job, [other for other, _ in wave]):
                continue  # it shares its beginning with a job of this wave: copy it in the next
            ids = job.tokens[job.computed:job.computed + self.wave_tokens]
            if ids and (len(ids) <= budget or not wave):
                wave.append((job, ids))
                budget -= len(ids)
        return wave

    def reuse_beginning(self, job, wave):
        """Copy the keys and values of a common beginning (a system prompt) from another slot.

        True if a job of the wave at hand, not computed yet, has more in common than any slot: better wait for it.
        """
        def in_common(other):
            return min(common_prefix(other.tokens, job.tokens), len(job.tokens) - 1)  # the last one's logits are needed

        n, slot = 0, -1
        for other in self.cache.slot_owner:
            if other and other.cached and not other.prefix and other.generation == self.weights.generation:
                n, slot = max((n, slot), (min(in_common(other), other.cached), other.slot))
        ahead = max([in_common(other) for other in wave if not other.prefix], default=0)
        if ahead >= n + SHORTEST_SHARED:
            return True
        if n >= SHORTEST_SHARED:
            self.cache.copy_prefix(slot, job, n)
        return False

    def prefill_wave(self, wave):
        """One pass over [(job, ids)] as a flat stream: fills the cache, and leaves each job its last logits."""
        flat, positions = [], []
        for job, ids in wave:
            flat += ids
            positions += range(job.computed, job.computed + len(ids))
        flat = torch.tensor(flat, device=self.device)                                     # (N,)
        positions = torch.tensor(positions, device=self.device)                           # (N,)
        sizes = [len(ids) for _, ids in wave]

        def attend(layer, q, k, v):
            outs = []
            parts = zip(wave, q.split(sizes), k.split(sizes), v.split(sizes))
            for (job, _), q_job, k_job, v_job in parts:
                keys, values = self.cache.append(layer, job, k_job, v_job)
                outs.append(attend_causal(q_job, keys, values))
            return torch.cat(outs)

        hidden = self.net.trunk(flat, positions, attend)                                  # (N, C)
        last = torch.tensor(sizes, device=self.device).cumsum(0) - 1
        logits = self.net.logits(hidden[last])                                            # (wave, V)
        for (job, ids), row in zip(wave, logits):
            job.cached += len(ids)
            job.logits = row
        self.stats["prefilled"] += sum(sizes)

    # -- decode: one token of each running sequence

    def decode(self):
        """One token of every running sequence -> (tokens, logps), lists: the step's only copy to the host."""
        if self.batch_changed:
            self.rebuild_batch()
        longest = max(s.cached for s in self.running) + 1
        self.cache.written = max(self.cache.written, longest)
        tokens, logp = self.batch.step(len(self.running), longest)

        for s in self.running:
            s.cached += 1
        self.stats["decoded"] += len(self.running)
        self.stats["steps"] += 1
        return tokens.tolist(), logp.tolist()

    def append_tokens(self, sequences, tokens, logps):
        """Append one token to each sequence, and take those whose turn ends out of the batch.

        ValueError if there was none to sample for some, their logits being nan or inf; they are closed.
        """
        rows = list(zip(sequences, tokens, logps))
        failed = []
        if not math.isfinite(sum(logps)):  # one look at a step's numbers
            failed = [s for s, _, logp in rows if not math.isfinite(logp)]
            rows = [row for row in rows if row[0] not in failed]

        ended = []
        for s, token, logp in rows:
            s.tokens.append(token)
            s.logprobs.append(logp)
            if token in s.stop_ids or len(s.tokens) >= s.max_length:
                s.finish = "stop" if token in s.stop_ids else "length"
                ended.append(s)
        if ended:
            self.running = [s for s in self.running if not s.finish]
            self.batch_changed = True
        self.ended += ended
        if failed:
            self.fail(failed)

    def fail(self, sequences):
        """Close sequences whose logits were not numbers, with what they have left in the cache; always raises."""
        for s in sequences:
            if s.prefix:
                self.prompts.retire(s.prefix)
            self.close(s)
            s.finish = "error"
        self.cache.clear_nan()
        raise NoNumber(f"logits that are not numbers ended {len(sequences)} conversations: "
                         f"the network's weights hold nan or inf, or overflow in {self.cache.keys.dtype}")

    def rebuild_batch(self):
        """After the batch has changed: what runs moves to the first slots, and the step's inputs are written anew."""
        self.cache.compact(self.running, first=0)
        self.running.sort(key=lambda s: s.slot)

        # the prompts that they share move to the first slots of their kind
        groups = {}  # Prefix -> rows of the batch
        for row, s in enumerate(self.running):
            if s.prefix:
                groups.setdefault(s.prefix, []).append(row)
        self.cache.compact(list(groups), first=self.slots)
        groups = dict(sorted(groups.items(), key=lambda item: item[0].slot))
        self.batch.write(self.running, groups)
        self.batch_changed = False


class DecodeBatch:
    """The tensors of a decode step, and the step: one token of each of the first n slots.

    They are written when the batch changes; from then on each step leaves the inputs of the next one in place.
    """

    uses_graphs = True  # on a GPU; without, every kernel is launched by itself

    def __init__(self, net, cache):
        c = net.config
        self.net = net
        self.cache = cache
        self.device = net.embed.weight.device
        self.shape = c.heads, c.kv_heads, c.head_dim
        self.state = torch.zeros(4, cache.slots, dtype=torch.int64, device=self.device)  # id, position, length, stream
        self.sampling_params = torch.zeros(2, cache.slots, device=self.device)            # temperature, top-p
        self.prefix_groups = None
        self.graphs = {}  # shapes -> CUDA graph of a step

    def write(self, running, groups):
        """running: sequences in the order of their slots, 0, 1, ...; groups: {Prefix: rows} in the order of slots."""
        n = len(running)
        state = [[s.tokens[-1], len(s.tokens) - 1, s.cached, s.stream] for s in running]
        # the rows beyond n are padding; what a step writes for them lies behind the end of their slot's owner
        for owner in self.cache.slot_owner[n:self.cache.slots]:
            state.append([0, 0, owner.cached if owner else 0, 0])
        self.state.copy_(torch.tensor(state).T)

        params = [[s.temperature, s.top_p] for s in running]
        self.sampling_params[:, :n] = torch.tensor(params, device=self.device).T
        self.prefix_groups = None
        if groups:
            self.prefix_groups = PrefixGroups.build(self.cache, groups)

    def step(self, n, longest):
        """Sample n tokens -> (tokens (n,), logp (n,)). longest: L of the longest sequence, the new token included."""
        if self.device.type == "cuda" and self.uses_graphs:
            return self.replay(n, longest, self.prefix_groups)
        return self.forward(n, longest, self.prefix_groups)

    def forward(self, n, longest, groups):
        """The step on tensors only, in fixed shapes: nothing is read back to the host."""
        H, J, D = self.shape
        ids, positions, lengths, streams = self.state[:, :n]
        # a row sees its own tokens and the new one
        is_behind = torch.arange(longest, device=self.device) > lengths[:, None]          # (B, L)
        bias = torch.where(is_behind, -math.inf, 0.0)[:, None, None]                      # (B, 1, 1, L)
        bias = bias.to(self.cache.keys.dtype)

        # the new token's place in the flat cache (slots J capacity, D)
        heads = torch.arange(n * J, device=self.device).view(n, J)
        end = lengths.clamp(max=self.cache.capacity - 1)[:, None]                         # padding rows write, too
        index = (heads * self.cache.capacity + end).view(-1)                              # (B J,)

        def attend(layer, q, k, v):
            keys, values = self.cache.keys[layer], self.cache.values[layer]               # (slots, J, capacity, D)
            keys.view(-1, D).index_copy_(0, index, k.reshape(n * J, D))
            values.view(-1, D).index_copy_(0, index, v.reshape(n * J, D))
            q = q.view(n, J, H // J, D)                                                   # (B, J, R, D)
            own_keys, own_values = keys[:n, :, :longest], values[:n, :, :longest]         # (B, J, L, D)
            out, lse = attend_with_lse(q, own_keys, own_values, bias)
            if groups is not None:
                prompts = self.cache.slots  # the first slot of a shared prompt
                shared, shared_lse = groups.attend(q, keys[prompts:], values[prompts:])
                share = torch.sigmoid(shared_lse - lse).unsqueeze(-1).to(out.dtype)       # see `attend_with_lse`
                out = torch.lerp(out, shared, share)
            return out

        # sample, and leave the inputs of the next step in place
        hidden = self.net.trunk(ids, positions, attend)                                   # (B, C)
        temperature, top_p = self.sampling_params[:, :n]
        tokens, logp = sample(self.net.logits(hidden), temperature, top_p, streams, positions + 1)
        ids.copy_(tokens)
        self.state[1:3, :n] += 1  # positions, lengths
        return tokens, logp

    def replay(self, n, longest, groups):
        """`forward` as a CUDA graph, captured once for each rounded shape; the rows beyond n are padding."""
        n = min(round_up(n, 8), self.cache.slots)
        longest = min(round_up(longest, 256), self.cache.capacity)
        key = n, longest, groups and groups.shape
        if key not in self.graphs:
            self.graphs[key] = self.capture(n, longest, groups)

        graph, static_groups, outputs = self.graphs[key]
        if groups:
            static_groups.copy_(groups)
        graph.replay()
        return outputs

    def capture(self, n, longest, groups):
        """(graph, the PrefixGroups that it reads, (tokens, logp) that it writes)."""
        static_groups = groups and groups.clone()
        saved = self.state.clone()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm up; what this writes to the cache lies behind every row's end
            self.forward(n, longest, static_groups)
        torch.cuda.current_stream(self.device).wait_stream(side)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.forward(n, longest, static_groups)
        self.state.copy_(saved)
        return graph, static_groups, outputs


def attend_with_lse(q, k, v, bias):
    """q (B, J, R, D), k and v (B, J, L, D), bias (B, 1, 1, L) -> (out (B, J, R, D), log-sum-exp of scores (B, J, R)).

    Two parts of one softmax merge exactly: out = out_1 + sigmoid(lse_2 - lse_1) (out_2 - out_1).
    """
    if q.device.type == "cpu":  # the fused kernel of scaled_dot_product_attention, which also knows the log-sum-exp
        with products("mkl"):
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).float() + bias                 # (B, J, R, L)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


@dataclass
class PrefixGroups:
    """Which rows share which prompt, as a table: a group's queries meet their prefix in one product."""
    query_index: torch.Tensor     # (G J M,) where in (B J,) a group's queries stand; a short group is filled with 0
    inverse_index: torch.Tensor   # (slots J,) where in (G J M,) a row's queries stand
    bias: torch.Tensor            # (G, 1, 1, L) 0 inside the prefix, -inf behind it
    no_prefix_bias: torch.Tensor  # (slots, 1, 1) 0, or -inf for a row without prefix

    @staticmethod
    def build(cache, groups):
        """groups: {Prefix: batch rows}, in the order of the prefixes' slots in the cache."""
        device, dtype, J = cache.keys.device, cache.keys.dtype, cache.keys.shape[2]
        G = len(groups)
        M = max(map(len, groups.values()))
        L = max(len(prefix.tokens) for prefix in groups)
        if device.type == "cuda":  # few shapes, few graphs
            G, M, L = next_power_of_two(G), next_power_of_two(M), round_up(L, 256)

        heads = np.arange(J)
        query_index = np.zeros((G, J, M), np.int64)
        inverse_index = np.zeros((cache.slots, J), np.int64)
        bias = np.full((G, 1, 1, L), -np.inf, np.float32)
        no_prefix_bias = np.full((cache.slots, 1, 1), -np.inf, np.float32)
        for g, (prefix, rows) in enumerate(groups.items()):
            query_index[g, :, :len(rows)] = np.array(rows) * J + heads[:, None]
            inverse_index[rows] = np.arange(len(rows))[:, None] + (g * J + heads) * M
            bias[g, ..., :len(prefix.tokens)] = 0
            no_prefix_bias[rows] = 0

        tables = query_index.reshape(-1), inverse_index.reshape(-1), bias, no_prefix_bias
        groups = PrefixGroups(*(torch.from_numpy(table).to(device) for table in tables))
        groups.bias = groups.bias.to(dtype)
        return groups

    def attend(self, q, keys, values):
        """q (B, J, R, D), prefix keys and values (slots, J, capacity, D) -> (out (B, J, R, D), lse (B, J, R))."""
        G, L = len(self.bias), self.bias.shape[-1]
        B, J, R, D = q.shape
        grouped = q.reshape(B * J, R * D).index_select(0, self.query_index)
        grouped = grouped.view(G, J, -1, D)                                               # (G, J, M R, D)
        keys, values = keys[:G, :, :L], values[:G, :, :L]                                 # (G, J, L, D)
        out, lse = attend_with_lse(grouped, keys, values, self.bias)

        index = self.inverse_index[:B * J]
        out = out.reshape(-1, R * D).index_select(0, index)                               # (B J, R D)
        lse = lse.reshape(-1, R).index_select(0, index)                                   # (B J, R)
        return out.view(B, J, R, D), lse.view(B, J, R) + self.no_prefix_bias[:B]

    @property
    def shape(self):
        """What a CUDA graph fixes."""
        return self.query_index.shape, self.bias.shape

    def tensors(self):
        return self.query_index, self.inverse_index, self.bias, self.no_prefix_bias

    def clone(self):
        return PrefixGroups(*(tensor.clone() for tensor in self.tensors()))

    def copy_(self, other):
        for mine, theirs in zip(self.tensors(), other.tensors()):
            mine.copy_(theirs)


def round_up(n, step):
    return -(-n // step) * step


def next_power_of_two(n):
    return 1 << (n - 1).bit_length()


@dataclass
class Completion:
    tokens: list    # what was sampled, a stop id included
    logprobs: list  # log softmax(logits / temperature) of each, before top-p
    finish: str     # "stop" or "length"


def generate(net, prompts, max_new_tokens, temperature=0.7, top_p=0.95,
             stop_ids=(), seed=0, slots=64):
    """One Completion for each prompt (token list), prompt i from the random stream of seed + i. Temperature 0: greedy.

    Equal prompts are computed and attended once, equal beginnings computed once; at most `slots` sequences run.
    """
    prompts = list(prompts)
    if not prompts:
        return []
    capacity = max(map(len, prompts)) + max_new_tokens
    engine = Engine(net, min(slots, len(prompts)), capacity)
    sequences = [engine.open(prompt, seed + i) for i, prompt in enumerate(prompts)]
    for sequence in sequences:
        engine.submit(sequence, max_new_tokens, temperature, top_p, stop_ids)
    while ended := engine.poll():
        for sequence in ended:
            engine.close(sequence)

    completions = []
    for sequence, prompt in zip(sequences, prompts):
        new_tokens = sequence.tokens[len(prompt):]
        completions.append(Completion(new_tokens, sequence.logprobs, sequence.finish))
    return completions


# ==== Machine room ====================================================================================================

# ---- Checkpoint files ------------------------------------------------------------------------------------------------

class FileTensor(NamedTuple):
    """A tensor of a Qwen3 file, and where it lies here: rows `start` to `stop` of a parameter."""
    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    linear: Linear = None  # the projection that it belongs to, if it does

    @property
    def data(self):
        return self.parameter.detach()[self.start:self.stop]  # unlike .data, it counts, see WeightsCounter

    def merged_weight(self):
        """The tensor as a file holds it: with its adapter merged."""
        if self.linear is not None and self.linear.lora_A:
            return self.data + low_rank(self.linear, self.name)
        return self.data


def file_tensors(net):
    """Yields a FileTensor for everything that a checkpoint holds."""
    yield FileTensor("model.embed_tokens.weight", net.embed.weight, 0, net.config.vocab_size)
    for i, block in enumerate(net.blocks):
        norms = {
            "input_layernorm": block.norm1,
            "post_attention_layernorm": block.norm2,
            "self_attn.q_norm": block.q_norm,
            "self_attn.k_norm": block.k_norm,
        }
        for name, norm in norms.items():
            yield FileTensor(f"model.layers.{i}.{name}.weight", norm.weight, 0, len(norm.weight))
        for linear in (block.qkv, block.out, block.gate_up, block.down):
            start = 0
            for name, rows in linear.parts:
                yield FileTensor(f"model.layers.{i}.{name}.weight", linear.weight, start, start + rows, linear)
                start += rows
    yield FileTensor("model.norm.weight", net.norm.weight, 0, len(net.norm.weight))
    if net.head is not None:
        yield FileTensor("lm_head.weight", net.head.weight, 0, net.config.vocab_size, net.head)


# What config.json may say of these fields; anything else changes the computation in a way that is not built here.
PLAIN_FIELDS = {
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None,),
    "compression_config": (None,),
}
ROPE_FIELDS = {"rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved"}  # mrope: text turns as usual


def read_config(path):
    """config.json of qwen3, or the text part of qwen3_vl -> Config. ValueError names the file and the field at fault.

    What would change the computation and is not built here is refused, never ignored; what is missing is not guessed.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind not in ("qwen3", "qwen3_vl", "qwen3_vl_text"):
        raise ValueError(f"{path}: model_type {shown(kind)}, expected qwen3 or qwen3_vl")
    text = raw.get("text_config") if kind == "qwen3_vl" else raw
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config {shown(text)}, expected an object")

    for section in (raw, text):
        check_plain(section, path)
    bases = rope_bases(text, path)
    if len(set(bases)) != 1:
        found = f"contradictory values of rope_theta, {bases}" if bases else "no field rope_theta"
        raise ValueError(f"{path}: {found}")

    def size(name):
        return config_number(text, name, int, path)

    heads, kv_heads, head_dim = size("num_attention_heads"), size("num_key_value_heads"), size("head_dim")
    if heads % kv_heads or head_dim % 2 or heads * head_dim >= 2**24:
        raise ValueError(f"{path}: num_attention_heads {heads}, num_key_value_heads {kv_heads}, head_dim {head_dim}: "
                         "heads must be a multiple of kv_heads, head_dim even")
    tie = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tie, bool):
        raise ValueError(f"{path}: tie_word_embeddings {shown(tie)}, expected true or false")

    return Config(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=size("intermediate_size"),
        rope_theta=bases[0],
        norm_eps=config_number(text, "rms_norm_eps", float, path),
        tie_embeddings=tie,
        max_positions=size("max_position_embeddings") if "max_position_embeddings" in text else Config.max_positions,
    )


def shown(value):
    """A value of a JSON file for a message: one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def config_number(section, name, kind, path):
    """A positive number of a configuration, kind int or float. ValueError where it is missing or anything else."""
    if name not in section:
        raise ValueError(f"{path}: no field {name}")
    value = section[name]
    is_number = type(value) is int or kind is float and type(value) is float
    if not is_number or not 0 < value < (2**24 if kind is int else 1e30):
        raise ValueError(f"{path}: {name} {shown(value)}, expected a positive {'whole ' * (kind is int)}number")
    return kind(value)


def check_plain(section, path):
    """Raise ValueError where a part of the configuration asks for more than a plain qwen3 decoder in plain numbers."""
    for name, allowed in PLAIN_FIELDS.items():
        value = section.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {name} {shown(value)} is not supported")
    layer_types = section.get("layer_types") or []
    if not isinstance(layer_types, list) or layer_types.count("full_attention") < len(layer_types):
        raise ValueError(f"{path}: layer_types {shown(layer_types)}: only full attention is supported")

    for name in ("rope_scaling", "rope_parameters"):
        rope = section.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {name} {shown(rope)}, expected an object")
        kinds = [rope[key] for key in ("rope_type", "type") if key in rope]
        if set(rope) - ROPE_FIELDS or any(kind not in ("default", "mrope") for kind in kinds):
            raise ValueError(f"{path}: {name} {shown(rope)}: scaled rotary positions are not supported")


def rope_bases(text, path):
    """[every rope_theta that the configuration states], in whichever place a version of transformers keeps it."""
    places = [text, text.get("rope_parameters") or {}, text.get("rope_scaling") or {}]
    return [config_number(place, "rope_theta", float, path) for place in places if "rope_theta" in place]


def hf_config(c, dtype, tokenizer=None):
    """Config -> the dictionary of config.json."""
    dtype = str(dtype).split(".")[-1]
    ends = {}
    if tokenizer is not None:
        ends = {"eos_token_id": tokenizer.id("<|im_end|>"), "pad_token_id": tokenizer.id("<|endoftext|>")}

    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_size,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_positions,

        "hidden_act": "silu",
        "attention_bias": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **ends,
    }


def open_tensors(path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from None


def tensor_files(path):
    """{tensor name: file} of a checkpoint folder, single or sharded."""
    index = os.path.join(path, "model.safetensors.index.json")
    single = os.path.join(path, "model.safetensors")
    if os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index}: weight_map must be an object of file names")
        names = {name: os.path.basename(file) for name, file in weight_map.items()}  # in this folder, whatever it says
        if os.path.exists(single) and os.path.basename(single) not in names.values():
            raise ValueError(f"{index}: names other files than {single}: two checkpoints in one folder")
        return {name: os.path.join(path, file) for name, file in names.items()}
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def in_file(name, files):
    """A tensor's name in this checkpoint: as in qwen3, below "model.language_model." (qwen3_vl), or bare."""
    if name.startswith("model."):
        for prefix in ("model.language_model.", ""):
            if prefix + "embed_tokens.weight" in files:
                return prefix + name.removeprefix("model.")
    return name


def load(path, device="cpu", dtype=torch.float32):
    """Folder of a qwen3 or qwen3_vl checkpoint -> (net, tokenizer); the tokenizer is None if the folder has none.

    Tensors go one by one from the mapped file to their place: nothing is held twice. ValueError names a file at fault,
    before memory is taken: a foreign architecture, a quantized tensor or one without a place in the net.
    """
    if os.path.exists(adapter := os.path.join(path, "adapter_config.json")):
        raise ValueError(f"{adapter}: an adapter, not a whole model; load_adapter gives it to the model it belongs to")
    config = read_config(os.path.join(path, "config.json"))
    files = tensor_files(path)
    if config.layers > len(files):
        raise ValueError(f"{path}: the checkpoint has no tensor of model.layers.{config.layers - 1}")
    config.tie_embeddings = has_tied_output(config, files)
    with torch.device("meta"):  # without memory: nothing is initialised that the file overwrites
        net = Qwen3(config)
    check_tensors(path, net, files)

    net = net.to(dtype).to_empty(device=device)
    for tensor in file_tensors(net):
        name = in_file(tensor.name, files)
        read_tensor(files[name], name, tensor.data)
    return net, load_tokenizer(path, config.vocab_size)


def has_tied_output(config, files):
    """Whether the output layer is the embedding. An output layer of its own in the files counts, whatever the
    configuration says (as in transformers); a bare trunk (an embedding model) has none."""
    head, embedding = "lm_head.weight", in_file("model.embed_tokens.weight", files)
    if head not in files or embedding not in files:
        return config.tie_embeddings or "embed_tokens.weight" in files
    return config.tie_embeddings and same_values(files[head], head, files[embedding], embedding)


def same_values(path, name, other_path, other_name, rows=4096):
    """Whether two tensors of files are equal, compared some rows at a time."""
    with open_tensors(path) as file, open_tensors(other_path) as other_file:
        try:
            a, b = file.get_slice(name), other_file.get_slice(other_name)
            if a.get_shape() != b.get_shape() or not a.get_shape():
                return False
            slices = [slice(start, start + rows) for start in range(0, a.get_shape()[0], rows)]
            return all(torch.equal(a[part].float(), b[part].float()) for part in slices)
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from None


def check_tensors(path, net, files):
    """Raise ValueError unless the files hold the net's tensors, as plain numbers of its shapes, and beside them nothing
    but a vision tower and a copy of the embedding: a bias, a scale or a further layer would be left out in silence."""
    ours = {in_file(tensor.name, files): tensor for tensor in file_tensors(net)}
    if missing := [name for name in ours if name not in files]:
        raise ValueError(f"{path}: the checkpoint has no tensor {missing[0]}")
    for name in files:
        if name not in ours and name != "lm_head.weight" and not name.startswith(("model.visual.", "visual.")):
            raise ValueError(f"{files[name]}: {name} has no place in a qwen3 network of {net.config.layers} layers "
                             "(quantized, or another architecture)")

    for file in sorted({files[name] for name in ours}):
        with open_tensors(file) as tensors:
            for name in ours:
                if files[name] == file:
                    check_tensor(file, tensors, name, ours[name].data.shape)


def check_tensor(path, file, name, shape):
    """Raise ValueError unless a tensor of an open file has this shape and holds plain floating-point numbers."""
    try:
        tensor = file.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    if tensor.get_dtype() not in ("F32", "F16", "BF16", "F64"):
        raise ValueError(f"{path}: {name} is {tensor.get_dtype()}: quantized weights are not supported")
    if tensor.get_shape() != list(shape):
        raise ValueError(f"{path}: {name} is {tuple(tensor.get_shape())}, expected {tuple(shape)}")


def read_tensor(path, name, target, piece=2**21):
    """Copy a tensor of a file into `target`, some rows at a time: closing the file gives the mapped pages back."""
    rows = max(1, piece * len(target) // target.numel())
    for start in range(0, len(target), rows):
        with open_tensors(path) as file:
            target[start:start + rows].copy_(file.get_slice(name)[start:start + rows])


def load_tokenizer(path, vocab_size):
    """The folder's Tokenizer, or None. ValueError if it has ids that a network of this vocabulary does not."""
    file, config = os.path.join(path, "tokenizer.json"), os.path.join(path, "tokenizer_config.json")
    if not os.path.exists(file):
        return None
    try:
        fast = FastTokenizer.from_file(file)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error})") from None
    try:
        tokenizer = Tokenizer(fast, read_json(config) if os.path.exists(config) else None)
        check_vocabulary(tokenizer, vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return tokenizer


def check_vocabulary(tokenizer, vocab_size):
    """Raise ValueError if the tokenizer has ids that the network has no embedding for; the opposite is padding."""
    if tokenizer.size > vocab_size:
        raise ValueError(f"the tokenizer has ids up to {tokenizer.size - 1}, the network's vocab_size is {vocab_size}")


@torch.no_grad()
def save(path, net, tokenizer=None, shard_bytes=5 * 2**30):
    """Write a Hugging Face folder of the plain qwen3 layout, in place of the checkpoint that the folder may hold.

    Low-rank adapters are merged into what is written. ValueError if the tokenizer has ids that the net does not.
    """
    if tokenizer is not None:
        check_vocabulary(tokenizer, net.config.vocab_size)
    with replaced_checkpoint(path) as folder:
        save_weights(folder, net, shard_bytes)
        write_json(os.path.join(folder, "config.json"), hf_config(net.config, net.embed.weight.dtype, tokenizer))
        if tokenizer is not None:
            save_tokenizer(folder, tokenizer)


def save_weights(path, net, shard_bytes):
    """model.safetensors, or several files of at most shard_bytes (or of one tensor) and their index."""
    shards, size = [{}], 0
    for tensor in file_tensors(net):
        if size + tensor.data.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][tensor.name] = tensor.merged_weight().contiguous()
        size += tensor.data.nbytes
    if len(shards) == 1:
        write_tensors(os.path.join(path, "model.safetensors"), shards[0])
        return

    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards):
        write_tensors(os.path.join(path, name), tensors)
    weight_map = {key: name for name, tensors in zip(names, shards) for key in tensors}
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(os.path.join(path, "model.safetensors.index.json"), index)


# The files of a checkpoint, as anybody writes them: weights, configuration, and all that a tokenizer is read from.
CHECKPOINT_FILE = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|(generation_)?config\.json"
    r"|tokenizer(_config)?\.json|(special_tokens_map|added_tokens|vocab|chat_template)\.json|merges\.txt"
    r"|tokenizer\.model|chat_template\.jinja")


@contextmanager
def replaced_checkpoint(path):
    """Gives a folder to write a checkpoint into, and then puts its files in the place of the checkpoint in `path`.

    Old and new files never stand together as one model: until all is written, the old checkpoint is as it was; then
    config.json goes first and comes last, for without it no program loads a folder. Where one file changes (the same
    network after more training), it is replaced in one go. What is no part of a checkpoint stays.
    """
    staging = os.path.join(path, "unfinished-checkpoint")
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging)
    try:
        yield staging
        new = sorted(os.listdir(staging), key=lambda name: name == "config.json")
        for name in new:
            flush(os.path.join(staging, name))
        old = [name for name in os.listdir(path) if CHECKPOINT_FILE.fullmatch(name)]
        _, changed, added = filecmp.cmpfiles(staging, path, new, shallow=False)
        gone = set(old) - set(new)

        if len(changed) + len(added) + len(gone) > 1:
            gone |= set(old) & {"config.json"}
        for name in sorted(gone, key=lambda name: name != "config.json"):
            os.remove(os.path.join(path, name))
        for name in new:
            os.replace(os.path.join(staging, name), os.path.join(path, name))
        flush(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_tokenizer(path, tokenizer):
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json."""
    replace_file(os.path.join(path, "tokenizer.json"), tokenizer.fast.save)
    write_json(os.path.join(path, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        **tokenizer.config,
        "chat_template": CHAT_TEMPLATE,
    })
    end, padding = tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")
    write_json(os.path.join(path, "generation_config.json"), {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 0,
        "eos_token_id": [end, padding],
        "pad_token_id": padding,
    })


@torch.no_grad()
def export(net, base, path, tokenizer=None):
    """Write the folder `base`, a qwen3_vl checkpoint, to `path`, net's weights as its text part; the rest is copied.

    ValueError unless base is the same network with the same words, in plain numbers: sizes, rotation, norms, and the
    vocabulary of the net's `tokenizer`, which the copied one replaces.
    """
    files = tensor_files(base)
    check_same_network(net.config, read_config(os.path.join(base, "config.json")), base)
    check_tensors(base, net, files)
    theirs = load_tokenizer(base, net.config.vocab_size)
    if tokenizer and theirs and tokenizer.fast.get_vocab() != theirs.fast.get_vocab():
        raise ValueError(f"{base}/tokenizer.json: other tokens than the policy's, so its ids mean other words")

    ours = {in_file(tensor.name, files): tensor for tensor in file_tensors(net)}
    if net.head is None and "lm_head.weight" in files:  # base has a copy of the embedding, or an output of its own
        ours["lm_head.weight"] = next(file_tensors(net))
    with replaced_checkpoint(path) as folder:
        for name in sorted(os.listdir(base)):
            source, target = os.path.join(base, name), os.path.join(folder, name)
            if source in files.values():
                write_tensors(target, with_our_weights(source, ours))
            elif os.path.isfile(source):
                shutil.copyfile(source, target)


def check_same_network(ours, theirs, base):
    """Raise ValueError where two Configs compute something else from the same tensors."""
    for name, value in vars(ours).items():
        if name not in ("tie_embeddings", "max_positions") and getattr(theirs, name) != value:
            raise ValueError(f"{base}/config.json: {name} is {getattr(theirs, name)}, the policy's is {value}")
    if theirs.tie_embeddings and not ours.tie_embeddings:
        raise ValueError(f"{base}/config.json: tie_word_embeddings is true, but the policy has an output layer")


def with_our_weights(source, ours):
    """The tensors of a file, those that the net has with the net's values. ours: {name in the file: FileTensor}."""
    with open_tensors(source) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in tensors.keys() & ours.keys():
        weight = ours[name].merged_weight().to("cpu", tensors[name].dtype).contiguous()
        tensors[name] = weight.clone() if name == "lm_head.weight" else weight  # a file holds no memory twice
    return tensors


# ---- Sentence embeddings ---------------------------------------------------------------------------------------------

def embed(net, sequences):
    """(S, C) float32: the last token's hidden state, L2-normalised (Qwen3-Embedding)."""
    return net.forward_with(last_hidden, sequences)


def last_hidden(net, sequences):
    hidden, rows = hidden_states(net, sequences)
    last = torch.stack([r[-1] for r in rows])                                             # (S,)
    return F.normalize(hidden[last].float(), dim=-1)


def embed_words(net, sequences):
    """(S, C) float32: the mean of the tokens' input embeddings, a bag of words.

    The last state of a small policy tells what comes next, hardly what was asked.
    """
    return net.forward_with(mean_words, sequences)


def mean_words(net, sequences):
    means = []
    for ids in sequences:
        words = net.embed(torch.tensor(ids, device=net.embed.weight.device))              # (T, C)
        means.append(words.float().mean(0))
    return torch.stack(means)


# ---- A tokenizer of one's own ----------------------------------------------------------------------------------------

def train_tokenizer(texts, vocab_size):
    """Byte-level BPE on `texts`. Words keep their leading space; digits and capitals of codes (KEL7) stay single."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(TAGS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))

    fast.train_from_iterator((piece for text in texts for piece in split_tags(text)), trainer)
    fast.add_tokens([AddedToken(t, special=t in SPECIAL, normalized=False) for t in SPECIAL + TAGS])
    return Tokenizer(fast)


def split_tags(text):
    """The pieces of a text between the tags, which are tokens of their own."""
    for tag in TAGS:
        text = text.replace(tag, "\0")
    return text.split("\0")


# ---- Low-rank adapters -----------------------------------------------------------------------------------------------

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(net):
    """Yields (Linear, name in files, key of its adapter, rows) for each projection of the blocks."""
    for i, block in enumerate(net.blocks):
        for linear in (block.qkv, block.out, block.gate_up, block.down):
            for name, rows in linear.parts:
                yield linear, f"model.layers.{i}.{name}", name.split(".")[-1], rows


def adapted(net):
    """Yields (Linear, name in files, key of its adapter) for each adapter of the net."""
    for linear, name, key, _ in projections(net):
        if key in linear.lora_A:
            yield linear, name, key


def low_rank(linear, name):
    """What the adapter adds to the rows of `name` (a weight's name in files): scale * B A, or 0."""
    key = name.split(".")[-2]
    if key not in linear.lora_A:
        return 0.0
    scaled = linear.lora_scale * linear.lora_B[key]
    return (scaled @ linear.lora_A[key]).to(linear.weight.dtype)


def add_lora(net, rank=16, alpha=32, targets=TARGETS):
    """Freeze the net and give each target projection a trainable adapter, scale alpha / rank; at first it adds 0.

    Adapters that the net has are replaced; ``merge_lora`` keeps what they have learned. Before sharding, not after.
    """
    if type(rank) is not int or rank < 1 or not 0 < abs(alpha) < math.inf:
        raise ValueError(f"lora: rank {rank}, alpha {alpha}: expected a whole number above 0, and a number but 0")
    if isinstance(targets, str) or not targets or set(targets) - set(TARGETS):
        raise ValueError(f"lora: targets {targets}: expected some of {list(TARGETS)}")
    remove_lora(net)
    net.requires_grad_(False)
    for linear, _, key, rows in projections(net):
        if key in targets:
            add_adapter(linear, key, rows, rank, alpha / rank)


def add_adapter(linear, key, rows, rank, scale):
    """A pair A, B for one projection: A random, B 0."""
    a = torch.empty(rank, linear.in_features, device=linear.weight.device)
    b = torch.zeros(rows, rank, device=linear.weight.device)
    linear.lora_scale = scale
    linear.lora_A[key] = nn.Parameter(nn.init.kaiming_uniform_(a, 5**0.5))
    linear.lora_B[key] = nn.Parameter(b)


def remove_lora(net):
    for linear, *_ in projections(net):
        linear.lora_A.clear()
        linear.lora_B.clear()


@contextmanager
def without_lora(net):
    """Inside, the net is what it was before `add_lora`: the reference policy of a LoRA run, without a second copy.

    For forward passes without gradients: a backward pass that comes later would see the adapters again.
    """
    scales = {linear: linear.lora_scale for linear, _, _ in adapted(net)}
    try:
        for linear in scales:
            linear.lora_scale = 0.0
        yield
    finally:
        for linear, scale in scales.items():
            linear.lora_scale = scale


@torch.no_grad()
def merge_lora(net):
    """Add the adapters to the weights, take them away, and let the whole net train again."""
    for tensor in file_tensors(net):
        if tensor.linear is not None and tensor.linear.lora_A:
            tensor.data.add_(low_rank(tensor.linear, tensor.name))
    remove_lora(net)
    net.requires_grad_(True)


def save_adapter(path, net, base=""):
    """adapter_config.json and adapter_model.safetensors, as PEFT writes them; `base` names the model they belong to."""
    adapters = list(adapted(net))
    if not adapters:
        raise ValueError("save_adapter: the net has no adapters")
    os.makedirs(path, exist_ok=True)
    config_file = os.path.join(path, "adapter_config.json")
    if os.path.exists(config_file):  # it comes back last: new tensors are never read with an older scale
        os.remove(config_file)

    tensors = {}
    for linear, name, key in adapters:
        tensors[f"base_model.model.{name}.lora_A.weight"] = linear.lora_A[key].data.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = linear.lora_B[key].data.contiguous()
    write_tensors(os.path.join(path, "adapter_model.safetensors"), tensors)

    linear, _, key = adapters[0]
    rank = len(linear.lora_A[key])
    write_json(config_file, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": linear.lora_scale * rank,
        "target_modules": sorted({key for _, _, key in adapters}),
        "lora_dropout": 0.0,
        "bias": "none",
    })


# What adapter_config.json may say without changing what plain LoRA computes. Of all other fields only "nothing" passes.
READ_FIELDS = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights",
               "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
HARMLESS_FIELDS = {"task_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
                   "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size"}
BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal")  # others (pissa, olora) change the base, too


@torch.no_grad()
def load_adapter(path, net):
    """Give `net` the adapters of a PEFT folder: plain LoRA, or with rslora's scale, on projections of the text blocks.

    ValueError for every variant that computes something else, and where file and configuration do not agree on which
    projections are adapted; the net is then as it was. Adapters that the net has are replaced.
    """
    config_file = os.path.join(path, "adapter_config.json")
    config = read_json(config_file)
    check_plain_lora(config, config_file)
    rank = config_number(config, "r", int, config_file)
    alpha = config_number(config, "lora_alpha", float, config_file)
    targets = {name for _, name, _, _ in projections(net) if is_target(name, config, config_file)}
    if not targets:
        raise ValueError(f"{config_file}: target_modules {shown(config['target_modules'])}: none is in the net")
    tensors = read_adapter(os.path.join(path, "adapter_model.safetensors"), net, targets, rank)

    remove_lora(net)
    net.requires_grad_(False)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    for linear, name, key, rows in projections(net):
        if name in targets:
            add_adapter(linear, key, rows, rank, scale)
            linear.lora_A[key].copy_(tensors[name, "A"])
            linear.lora_B[key].copy_(tensors[name, "B"])


def check_plain_lora(config, path):
    """Raise ValueError where an adapter's configuration asks for more than B A, times a scale, added to the weights."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {shown(config.get('peft_type'))}, expected LORA")
    for name, value in config.items():
        says_nothing = value is None or value is False or value in ("", [], {})
        if name not in READ_FIELDS | HARMLESS_FIELDS and not says_nothing:
            raise ValueError(f"{path}: {name} {shown(value)}: only plain LoRA is supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {shown(config['bias'])}: only plain LoRA is supported")

    start = config.get("init_lora_weights")
    if start not in BASE_UNTOUCHED:
        raise ValueError(f"{path}: init_lora_weights {shown(start)} belongs to base weights that it has changed; save "
                         "it as plain LoRA (PEFT's path_initial_model_for_weight_conversion)")
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora {shown(config['use_rslora'])}, expected true or false")


def is_target(name, config, path):
    """Whether PEFT adapts the projection of this name in files ("model.layers.0.self_attn.q_proj")."""
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = layers if isinstance(layers, list) else [layers]
        if int(name.split(".")[2]) not in layers:
            return False
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    for field_name, wanted in (("target_modules", targets), ("exclude_modules", excluded)):
        is_list = isinstance(wanted, list) and all(isinstance(target, str) for target in wanted)
        if not is_list and not isinstance(wanted, str):
            raise ValueError(f"{path}: {field_name} {shown(wanted)}, expected names or a pattern")
    return (targets == "all-linear" or matches(name, targets, path)) and not matches(name, excluded, path)


def matches(name, wanted, path):
    """PEFT's rule: a list holds names or their ends, a text is a regular expression for the whole name."""
    if isinstance(wanted, list):
        return any(name == end or name.endswith("." + end) for end in wanted)
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise ValueError(f"{path}: target_modules or exclude_modules {shown(wanted)}: no pattern ({error})") from None


def read_adapter(path, net, targets, rank):
    """{(projection, "A" | "B"): tensor} of an adapter's file. ValueError unless it holds these and nothing else."""
    shapes = {}
    for linear, name, _, rows in projections(net):
        if name in targets:
            shapes[name, "A"] = rank, linear.in_features
            shapes[name, "B"] = rows, rank

    tensors = {}
    with open_tensors(path) as file:
        for key in file.keys():
            found = re.fullmatch(r"base_model\.model\.(?:model\.)?(?:language_model\.)?(.+)\.lora_([AB])\.weight", key)
            place = found and ("model." + found[1], found[2])
            if place not in shapes:
                raise ValueError(f"{path}: {key} is no plain LoRA of a projection that adapter_config.json names")
            check_tensor(path, file, key, shapes[place])
            tensors[place] = file.get_tensor(key)
    if missing := [f"{name}.lora_{letter}" for name, letter in shapes if (name, letter) not in tensors]:
        raise ValueError(f"{path}: no tensor {missing[0]}, which adapter_config.json promises")
    return tensors


# ---- The processor: products, threads, memory ------------------------------------------------------------------------

@functools.cache
def fastest_products():
    """The name in PRODUCTS of the faster kernel that is exact, measured once in a process.

    oneDNN, if it is faster than MKL by a tenth and its relative error against float64 stays below 1e-6. Where the two
    are alike, another process may choose the other one: a run that has to repeat bit for bit names its products.
    """
    speeds, errors = measure_products()
    is_better = errors["onednn"] < 1e-6 and speeds["onednn"] > 1.1 * speeds["mkl"]
    return "onednn" if is_better else "mkl"


def measure_products(rows=1024, inputs=256, outputs=1024, repeats=9):
    """({name in PRODUCTS: GFLOP/s of the fastest of a few products}, {name: relative error against float64}).

    The kernels take turns, so that a busy spell of the machine meets both.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    exact = F.linear(x.double(), weight.double())

    seconds, errors = dict.fromkeys(PRODUCTS, math.inf), {}
    for _ in range(repeats):
        for name in PRODUCTS:
            with products(name):
                started = time.perf_counter()
                y = F.linear(x, weight)
                seconds[name] = min(seconds[name], time.perf_counter() - started)
            errors[name] = float((y - exact).norm() / exact.norm())
    return {name: 2e-9 * rows * inputs * outputs / least for name, least in seconds.items()}, errors


def set_products(name):
    """Multiply by a name of PRODUCTS from here on."""
    torch.set_float32_matmul_precision(PRODUCTS[name])


def current_products():
    """The name in PRODUCTS of what is set: torch calls the permission to round "high" or "medium"."""
    return "mkl" if torch.get_float32_matmul_precision() == PRODUCTS["mkl"] else "onednn"


@functools.cache
def idle_threads(seconds=0.1):
    """How many threads of the CPU have a core to themselves, at least one.

    Threads wait for one another many times a millisecond. Beside a process that holds their cores, two are thirty times
    slower than one. OMP_NUM_THREADS, where it is set, is a decision of the user's.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    before = idle_seconds()
    time.sleep(seconds)  # this process does nothing meanwhile, so who is busy is somebody else
    after = idle_seconds()
    if before is None or after is None:
        return threads
    return max(1, min(threads, round((after - before) / seconds)))


def idle_seconds():
    """Seconds for which cores have stood idle since the machine started, all cores together; None: it does not say."""
    try:
        with open("/proc/uptime", encoding="ascii") as file:
            return float(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)


def keep_freed_memory():
    """Hand freed memory to the next tensor (glibc), for as long as the process lives.

    Left alone, glibc maps every large block from the system and gives it back when it is freed, and the system clears
    each page anew at the first touch, though a training step asks for the same sizes over and over: on a virtual
    machine a seventh of its time.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)                # no block is mapped for itself alone
            libc.mallopt(M_TOP_PAD, 2**26)             # the heap grows in steps of 64 MB
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # and shrinks when 2 GB at its end are free


# ---- Processes -------------------------------------------------------------------------------------------------------

class ProcessGroup:
    """The processes that `torchrun --nproc-per-node N` started: they share the work and end with the same numbers.
    Without torchrun there is one. Values travel as JSON: nothing here is pickled."""

    last_barrier = None  # see __exit__

    def __init__(self, size=1, rank=0, device="cpu"):
        self.size = size
        self.rank = rank
        self.device = device
        self.mesh = dist.init_device_mesh(device, (size,)) if size > 1 else None

    @classmethod
    def from_env(cls, device="cpu"):
        """As torchrun's environment says."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size > 1 and not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(size, int(os.environ.get("RANK", 0)), device)

    @property
    def is_main(self):
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def shard_list(self, items):
        """This process's part of a list: neighbours stay together, and the parts in order are the list."""
        start = len(items) * self.rank // self.size
        stop = len(items) * (self.rank + 1) // self.size
        return items[start:stop]

    def all_gather_objects(self, value):
        """[value of every process], in order; anything JSON can hold (nan included)."""
        if self.size == 1:
            return [value]
        # lengths first, then the messages, padded to the longest
        message = bytearray(json.dumps(value).encode())
        data = torch.frombuffer(message, dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)], device=self.device))

        longest = max(int(size) for size in sizes)
        parts = [data.new_empty(longest) for _ in sizes]
        dist.all_gather(parts, F.pad(data, (0, longest - len(data))))
        messages = [part[:int(size)] for part, size in zip(parts, sizes)]
        return [json.loads(bytes(message.cpu().numpy())) for message in messages]

    def barrier(self):
        """Go on when every process is here."""
        if self.size > 1:
            dist.barrier()

    def shard(self, net):
        """FSDP2: each process keeps a part of every parameter; a block's weights are whole only while it computes."""
        if self.size > 1:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes a second or two
            for module in [*net.blocks, net]:
                fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
            register_fsdp_forward_method(net, "forward_with")
        return net

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.size == 1:
            return
        if kind is None:
            # No process closes its connections while another still uses them. The barrier is kept until the process
            # ends: it refers to the operations before it, so that none of gloo's threads is the last to release one.
            # Releasing an operation frees its tensors, which takes the interpreter's lock, and a thread that asks for
            # the lock while the interpreter shuts down aborts the process (PyTorch 2.13).
            ProcessGroup.last_barrier = dist.barrier(async_op=True)
            ProcessGroup.last_barrier.wait()
        dist.destroy_process_group()


def is_sharded(x):
    """Whether this is a DTensor: this process's part of a tensor that all have together."""
    return hasattr(x, "full_tensor")


def full_tensor(x):
    """A sharded tensor put together; any other as it is."""
    return x.full_tensor() if is_sharded(x) else x


def distribute_like(x, like):
    """A whole tensor, sharded the way ``like`` is."""
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, like.device_mesh, like.placements)


# ---- Training state --------------------------------------------------------------------------------------------------

def training_tensors(net, optimizer, **networks):
    """What a trainer must keep to go on, {name: tensor}; its inverse is ``load_training_tensors``.

    "net.NAME" are the parameters that train, "optimizer.NAME.KEY" the optimizer's state of each (AdamW: step, exp_avg,
    exp_avg_sq; Muon: momentum), "KEYWORD.NAME" the parameters of further networks, which are averages of ``net`` (a
    teacher, an EMA): what is frozen in ``net`` is left out of them, too. Nothing is copied; sharded tensors stay so.
    """
    tensors = {}
    frozen = set()
    for name, p in net.named_parameters():
        if not p.requires_grad:
            frozen.add(name)
            continue
        tensors[f"net.{name}"] = p.detach()
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)

    for keyword, network in networks.items():
        for name, p in network.named_parameters():
            if name not in frozen:
                tensors[f"{keyword}.{name}"] = p.detach()
    return tensors


@torch.no_grad()
def load_training_tensors(tensors, net, optimizer, **networks):
    """Put the tensors of ``training_tensors`` back, in place. Every process calls it with whole tensors.

    Raises ValueError where a parameter is missing or has another shape (adapters of another rank, another network).
    """
    def tensor_like(p, name):
        value = tensors.get(name)
        if value is None or value.shape != p.shape:
            found = "missing" if value is None else tuple(value.shape)
            raise ValueError(f"training state: {name} is {found}, expected {tuple(p.shape)}")
        return distribute_like(value.to(p.device), p)

    keys = {}  # parameter's name -> what the optimizer keeps of it
    for name in tensors:
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            keys.setdefault(parameter, []).append(key)

    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    for name, p in net.named_parameters():
        if name in frozen:
            continue
        p.copy_(tensor_like(p, f"net.{name}"))
        optimizer.state[p] = {}
        for key in keys.get(name, ()):
            entry = f"optimizer.{name}.{key}"
            value = tensors[entry]
            if value.dim() > 0:  # a number (AdamW's step) stays on the CPU
                value = tensor_like(p, entry)
            optimizer.state[p][key] = value.clone()

    for keyword, network in networks.items():
        for name, p in network.named_parameters():
            if name not in frozen:
                p.copy_(tensor_like(p, f"{keyword}.{name}"))


MAX_SKIPPED = 3  # updates in a row whose gradient is no finite number, after which a run stops


def count_skipped(before, norm, where):
    """Updates in a row that were skipped: 0 where the gradient's norm is finite, else one more than before.

    One step by such a gradient makes every weight nan. Raises ValueError after MAX_SKIPPED; where: "step 12".
    """
    if math.isfinite(norm):
        return 0
    if before + 1 == MAX_SKIPPED:
        raise ValueError(f"{where}: the gradient's norm is {norm}, the last of {MAX_SKIPPED} updates in a row without "
                         "a finite one; no weight has moved by them. Begin again with another --lr and another --out")
    return before + 1


def save_checkpoint(folder, step, tensors, state, processes=None, keep=2):
    """Write folder/000012/ (for step 12): one safetensors file a process, and state.json. Returns its path.

    The checkpoint is there whole or not at all: it is written under another name, flushed to the disk, and renamed.
    state: {...} of JSON values; "step" and "checksums" {file: SHA-256} are added. Every process calls this, and goes on
    when the checkpoint stands. Of the checkpoints up to this step the ``keep`` newest stay; damaged and later ones,
    whose steps are done again, are put aside (NAME.aside), never removed.
    """
    processes = processes or ProcessGroup()
    unfinished = os.path.join(folder, "unfinished")
    final = os.path.join(folder, f"{step:06d}")
    if processes.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
    processes.barrier()

    # every process writes its part
    path = write_shards(processes, os.path.join(unfinished, "state"), tensors)
    flush(path)
    checksums = dict(processes.all_gather_objects([os.path.basename(path), checksum(path)]))

    # the first one completes the folder, gives it its name, and removes what is out of date
    if processes.is_main:
        state_file = os.path.join(unfinished, "state.json")
        write_json(state_file, {**state, "step": step, "checksums": checksums})
        flush(state_file)
        flush(unfinished)
        was_whole = os.path.exists(final) and not damage_of(final)
        moved = [put_aside(os.path.join(folder, name)) for name in checkpoint_names(folder) if int(name) >= step]
        os.rename(unfinished, final)
        flush(folder)
        if was_whole:  # the same step again
            shutil.rmtree(moved[0])
        for name in checkpoint_names(folder)[:-keep]:
            shutil.rmtree(os.path.join(folder, name))
    processes.barrier()
    return final


def put_aside(path):
    """Give a file or folder a name under which nothing looks for it: path.aside, path.aside-2, ... Returns the name."""
    aside, number = f"{path}.aside", 1
    while os.path.exists(aside):
        number += 1
        aside = f"{path}.aside-{number}"
    os.rename(path, aside)
    return aside


def latest_checkpoint(folder, processes=None):
    """(state, tensors) of the newest whole checkpoint, tensors whole in every process; None if there is no checkpoint.

    A damaged newer one is named on stderr, in one line, and skipped; an unfinished one is no checkpoint. Raises
    ValueError where there are checkpoints and none is whole: a run that has begun does not begin again in silence.
    """
    processes = processes or ProcessGroup()
    found = (checkpoint_names(folder), newest_whole_checkpoint(folder)) if processes.is_main else None
    names, newest = processes.all_gather_objects(found)[0]
    if newest is None:
        if names:
            raise ValueError(f"{folder}: none of its checkpoints ({', '.join(names)}) can be read; they stay as they "
                             "are. Try again if the disk failed for a moment, or move the folder away to start afresh")
        return None
    state = read_json(os.path.join(newest, "state.json"))
    paths = [os.path.join(newest, name) for name in state["checksums"]]
    return state, read_shards(paths)


def newest_whole_checkpoint(folder):
    """Path of the newest checkpoint whose files have the checksums of its state.json, or None."""
    for name in reversed(checkpoint_names(folder)):
        path = os.path.join(folder, name)
        damage = damage_of(path)
        if not damage:
            return path
        print(f"{path}: damaged, skipped ({damage})", file=sys.stderr)
    return None


def damage_of(path):
    """What keeps a checkpoint from being read, in a few words; "" if it is whole."""
    try:
        expected = read_json(os.path.join(path, "state.json"))["checksums"]
        found = {file: checksum(os.path.join(path, file)) for file in expected}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error) or type(error).__name__
    return "" if found == expected else "its checksum does not match"


def checkpoint_names(folder):
    """Names of the folder's checkpoints, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if name.isdecimal()), key=int)


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path):
    """SHA-256 of a file, or of the weights, configuration and tokenizer in a folder; None where there is nothing."""
    if os.path.isfile(path):
        return checksum(path)
    if not os.path.isdir(path):
        return None
    digests = ""
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors") or name in ("config.json", "tokenizer.json", "genevolve.json"):
            digests += f"{name} {checksum(os.path.join(path, name))}\n"
    return hashlib.sha256(digests.encode()).hexdigest()


@contextmanager
def locked(folder):
    """Hold the folder for this process, with its number in folder/lock; ValueError if another one holds it.

    The system lets go of the lock when the process ends, killed or not, so a file that is left behind locks nothing.
    Of several processes of one run the first holds it. Where the system knows no such locks (Windows), nothing is held.
    """
    path = os.path.join(make_folder(folder), "lock")
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder}: process {file.read().strip()} is at work there (it holds {path}); wait for "
                             "it, or choose another --out") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def flush(path):
    """Write a file's content, or the names in a folder, through to the disk: they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shards(processes, stem, tensors):
    """This process's parts of the tensors, as stem-00001-of-0000N.safetensors; what is not sharded goes into the first.

    Returns the file's path.
    """
    local = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            tensor = tensor.to_local()
        elif not processes.is_main:
            continue
        local[name] = tensor.detach().cpu().contiguous()
    path = f"{stem}-{processes.rank + 1:05d}-of-{processes.size:05d}.safetensors"
    write_tensors(path, local)
    return path


def read_shards(paths):
    """Whole tensors from the files of all processes that wrote them; any number of processes may read."""
    parts = {}
    for path in sorted(paths):
        with open_tensors(path) as file:
            for name in file.keys():
                parts.setdefault(name, []).append(file.get_tensor(name))
    return {name: found[0] if len(found) == 1 else torch.cat(found) for name, found in parts.items()}


# ---- Files of a run --------------------------------------------------------------------------------------------------

def make_folder(path):
    """The path of a folder that can be written to, made if it is not there. ValueError says why it cannot."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):  # another process may be asking at the same time
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot write there ({error.strerror})")
    return path


def pick_device(name):
    """--device -> the device's name. ValueError for one that is not known."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: must be auto, cpu, cuda or mps")
    return name


def replace_file(path, write):
    """Call write(temporary path), then move the file into place: a reader sees the old one or the new one, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def replace_folder(source, path):
    """Put ``source`` where ``path`` is; what was there is gone only after the new one stands."""
    old = path + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(path):
        os.rename(path, old)
    os.rename(source, path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path, text):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    replace_file(path, write)


def read_json(path):
    """The object in a JSON file. ValueError names the file at fault."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def without_nan(value):
    """The value with None for every number that is nan or infinite, at any depth: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


def read_lines(path):
    """The values in a file of JSON lines; [] where there is no such file. An unfinished last line is left out.

    Raises ValueError, in one line, for any other line that is not JSON.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = file.readlines()

    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):  # a kill came while it was written
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    return values


def write_lines(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tensors(path, tensors):
    """A safetensors file. Raises OSError if it cannot be written, a full disk included."""
    def write(temporary):
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from None
    replace_file(path, write)


def save_policy(path, net, tokenizer, protocol, training, base=""):
    """A policy folder, replaced as a whole: plain weights, the protocol ("compact" or "full"), how it was trained.

    Where the net has low-rank adapters, the weights are merged and the adapters lie beside them, in path/adapter/;
    base: the model that they adapt.
    """
    staging = path + ".new"
    shutil.rmtree(staging, ignore_errors=True)
    save(staging, net, tokenizer)
    if list(adapted(net)):
        save_adapter(os.path.join(staging, "adapter"), net, base)
    write_json(os.path.join(staging, "genevolve.json"), {"protocol": protocol})
    write_json(os.path.join(staging, "training.json"), training)
    replace_folder(staging, path)


def read_protocol(policy_folder):
    """The form of the protocol that a policy was trained on, "compact" or "full" (also where the folder tells none)."""
    path = os.path.join(policy_folder, "genevolve.json")
    return read_json(path).get("protocol", "full") if os.path.exists(path) else "full"


def command_line():
    """The command of this process, to be kept beside the weights."""
    arguments = [portable(argument) for argument in sys.argv[1:]]
    return " ".join(["python", os.path.basename(sys.argv[0]), *arguments])


def portable(value):
    """A path inside the project relative to it, in settings too: a record that is true on other machines."""
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    here = os.path.dirname(os.path.abspath(__file__))
    if isinstance(value, str) and value.startswith(here + os.sep):
        return os.path.relpath(value, here)
    return value
