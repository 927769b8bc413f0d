"""From a group of trajectories to a gradient: score them, compare the best with the worst, remember, teach, distil.

    best, worst = distill.select_pair(group)                         # R(best) - R(worst) >= 0.20
    bundle = distill.summarize_pair(request, best, worst, phrases)   # what the best did and the worst did not
    memory.add(request, bundle, best.reward, worst.reward, step)     # and later: memory.lookup([another request])
    teacher = distill.teacher_messages(messages, bundle)             # the same tokens are scored under this prompt
    loss = distill.grpo_loss(...) + recipe.weight * distill.experience_loss(recipe, ...)

Everything that scores or differentiates is a pure function of tensors. Section numbers are those of the method as the
README tells it: 3 reward, 5 GRPO, 6 visual experience, 7 visual experience distillation (SDL).

Departures from the paper, each with its reason:

1. A judge that failed gives a missing reward (nan), not 0: it stays out of means, deviations and best-worst pairs.
2. The worst of a pair is the worst trajectory *with* a program; a group of one good program and five broken answers
   teaches the protocol, not the craft, and is left to GRPO.
3. ``Recipe`` names what the sources leave open or contradict: estimator, saturation, aggregation, denominator, teacher.
   ``RECIPES["paper"]`` is literal, ``RECIPES["stable"]`` is what holds for small policies, with its reasons.
4. Memory may be keyed by the request with its names taken out, so that a lesson reaches requests of the same kind.
5. ``stable`` distils the positions at which the guide changes the teacher's own mind (``teacher_scores``), one or two
   tokens in a hundred: elsewhere a frozen teacher has nothing to say but what the student was when it started.

Letters: N trajectories (rows), T tokens of a row, V vocabulary, G groups, K rollouts a group, D embedding width,
M masked tokens. p, q: the student's and the teacher's probability of a token; l = log p - log q.
"""
import difflib
import itertools
import json
import math
import os
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

import model
import tools
from tools import REFERENCE_PHRASES, Program, check_program, parse_program  # noqa: F401

# ---- Types: program, step, trajectory (section 1) --------------------------------------------------------------------

@dataclass
class Step:
    """One turn: a thought, an action, and what came back."""
    think: str
    kind: str         # "tool_call", "answer" or "format_error"
    name: str         # the tool, "" for an answer
    arguments: dict   # of the tool call, or the answer itself
    observation: str


@dataclass(eq=False)
class Trajectory:
    """The whole record of one attempt at a request: tau = (x, a_1, o_1, ..., a_T, o_T, z, y, r, d)."""
    id: str
    question: str
    row: dict = field(default_factory=dict)       # the request's other fields, passed through
    messages: list = field(default_factory=list)  # chat messages, the system prompt first
    seed: int = 0
    session: object = None                        # the tools' state: ``images`` and ``queries`` of this trajectory
    images: dict | None = None                    # img_id -> {"local_path", "url", "title", "page_url"}
    steps: list = field(default_factory=list)
    program: Program | None = None
    termination: str = "no_answer"                # or "answer", "max_rounds_reached", "error"
    rounds: int = 0
    error: str | None = None
    tokens: list = field(default_factory=list)    # ids of the whole conversation, as sampled
    mask: list = field(default_factory=list)      # True: written by the policy, its <|im_end|> included
    logprobs: list = field(default_factory=list)  # the engine's, nan where nothing was sampled
    prompt_length: int = 0                        # tokens before the first turn
    image: np.ndarray | None = None               # uint8 (H, W, 3)
    judgement: dict | None = None                 # scores, constraints, program checks
    reward: float = math.nan                      # nan: missing
    handle: object = None                         # the engine's sequence while the trajectory is alive
    saved: bool = False                           # whether the picture is on disk

    def to_json(self):
        """What the judges said and the training needs, without picture, session and row: another process reads it."""
        kept = [f.name for f in fields(self) if f.name not in ("row", "session", "image", "handle", "saved")]
        return {k: asdict(v) if isinstance(v, Program) else [asdict(x) for x in v] if k == "steps" else v
                for k, v in ((k, getattr(self, k)) for k in kept)}

    @classmethod
    def from_json(cls, value, row):
        """The inverse of to_json; ``row`` is the request's."""
        program, steps = value["program"], [Step(**s) for s in value["steps"]]
        return cls(**value | {"row": row, "steps": steps, "program": Program(**program) if program else None})

    def __post_init__(self):
        if self.images is None:  # shared with the session, which goes on adding to it
            self.images = {} if self.session is None else self.session.images


# ---- Judges: KScore and program sufficiency (section 3) ----


def constraint(name, passed, detail):
    return {"name": name, "passed": bool(passed), "detail": detail}


PICTURE_RUBRIC = """You compare two pictures made for one request. The first is generated, the second shows what was \
meant. Judge the generated picture alone, by the request and by the second picture, with four scores, each 0, 0.5 or 1:

faithfulness: is everything that the request asks for there, in the scene and style it asks for?
visual_correctness: are the subjects recognisably those of the second picture, and are number, place, bodies, colours, \
shadows and materials right?
text_accuracy: is all writing that the request asks for there, readable and spelt as in the second picture? If the \
request asks for none, set text_accuracy_na to true and the score to 0.
aesthetics: is the picture clean, composed and lit with care, without artefacts?

1 is right in every respect that matters, 0.5 has one clear flaw, 0 is wrong or missing. Answer with one JSON object:
{"rationale": "...", "faithfulness": 0, "visual_correctness": 0, "text_accuracy": 0, "aesthetics": 0, \
"text_accuracy_na": false}"""
PROGRAM_RUBRIC = """You judge a program for an image generator before it is drawn: a prompt, and notes on one or two \
reference pictures. You see the request, what the agent found out, and the program. Give 0.25 for each of these that \
holds: the facts found are in the prompt, exactly; the prompt calls its references the first and the second reference \
image and says what each provides; it follows the advice of the guides that were read; every requirement of the \
request stands in it as something that can be carried out and checked. Answer with one JSON object:
{"rationale": "...", "sufficiency": 0}"""
WISE_RUBRIC = """You judge a picture made for a prompt that takes knowledge of the world to understand. You see the \
prompt, an explanation of what it means, and the picture. Give three scores, each 0 (fails), 1 (in part) or 2 (fully): \
consistency: does the picture show what the prompt means, as the explanation says? realism: do things in it look and \
behave as they do in the world? aesthetic: is it well composed and made? Answer with one JSON object: \
{"consistency": 0, "realism": 0, "aesthetic": 0}"""
WISE_VERIFIED_RUBRIC = """You judge a picture made for a prompt that takes knowledge of the world to understand. You \
see the prompt, an explanation of what it means, and the picture. Is what the explanation says plainly there? Answer \
with one JSON object: {"score": 1} if it is, {"score": 0} if not."""


class ModelJudge:
    """A vision model behind a chat endpoint, generated picture first. What fails raises tools.ToolError: the score is
    missing, never 0. chat: callable (messages, temperature=, max_tokens=) -> text."""

    def __init__(self, chat):
        self.chat = chat

    def ask(self, rubric, parts):
        """The JSON object that the model answers. Raises tools.ToolError if there is none."""
        messages = [{"role": "system", "content": rubric}, {"role": "user", "content": parts}]
        reply = self.chat(messages, temperature=0.0, max_tokens=2048)
        try:
            answer = json.loads(reply[reply.index("{"):reply.rindex("}") + 1])
        except ValueError:
            raise tools.ToolError(f"the judge's answer is not JSON: {reply[:80]!r}")
        if not isinstance(answer, dict):
            raise tools.ToolError("the judge's answer is not a JSON object")
        return answer

    def level(self, answer, name, levels):
        value = answer.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in levels:
            raise tools.ToolError(f"the judge gave {value!r} for {name}")
        return float(value)

    def score(self, image, truth, row):
        """The judgement of a picture, uint8 (H, W, 3), against its ground truth."""
        answer = self.ask(PICTURE_RUBRIC, [{"type": "text", "text": f"Request: {row['question']}"},
                                           tools.image_part(image), tools.image_part(truth)])
        scores = {k: None if k == "text_accuracy" and answer.get("text_accuracy_na") is True
                  else self.level(answer, k, (0, 0.5, 1)) for k in DIMENSIONS}
        failed = [constraint(k, v == 1, str(answer.get("rationale", ""))[:300]) for k, v in scores.items()
                  if v is not None]
        return {"kscore": kscore(*scores.values())} | scores | {"constraints": failed}

    def score_wise(self, image, row):
        """WISE's scores of a picture, by both versions (see ``wiscore``); a WISE prompt has no ground truth."""
        parts = [{"type": "text", "text": f"Prompt: {row['question']}\nExplanation: {row.get('Explanation', '')}"},
                 tools.image_part(image)]
        legacy, verified = self.ask(WISE_RUBRIC, parts), self.ask(WISE_VERIFIED_RUBRIC, parts)
        return {k: self.level(legacy, k, (0, 1, 2)) for k in ("consistency", "realism", "aesthetic")} | {
            "score": self.level(verified, "score", (0, 1))}

    def score_program(self, trajectory):
        """(R_text, checks) of a trajectory's program."""
        t = trajectory
        if t.program is None:
            return 0.0, []
        found = "\n".join(f"{s.name} {json.dumps(s.arguments, ensure_ascii=False)}\n{s.observation[:1200]}"
                          for s in t.steps)
        answer = self.ask(PROGRAM_RUBRIC, f"Request: "
                                          f"{t.question}\n\nFound:\n{found}\n\nProgram:\n{t.program.gen_prompt}\n"
                          + "\n".join(f"{r['img_id']}: {r['note']}" for r in t.program.references))
        value = self.level(answer, "sufficiency", (0, 0.25, 0.5, 0.75, 1))
        return value, [constraint("program", value == 1, str(answer.get("rationale", ""))[:300])]


# ---- Scores and aggregates (section 3) -------------------------------------------------------------------------------

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics")
MISSING_TEXT = ("renormalized", "half", "present-mean")
FAILED_SCORES = dict.fromkeys(DIMENSIONS, 0.0) | {"kscore": 0.0, "constraints": []}  # an attempt without a program


def kscore(faithfulness, visual_correctness, text_accuracy, aesthetics, missing_text="renormalized"):
    """KScore = 0.1 F + 0.4 V + 0.4 T + 0.1 A, each in 0..1.

    text_accuracy None: no readable text is wanted. "renormalized" (the paper) drops the term and divides by 0.6; "half"
    (released rows) sets T = 0.5; "present-mean" (released split summaries, see ``summarize``) has T = the mean over the
    rows that have one, and 0.5 where, as for a single row without, there is none.
    """
    if missing_text not in MISSING_TEXT:
        raise ValueError(f"missing_text {missing_text!r}: must be one of {', '.join(MISSING_TEXT)}")
    rest = 0.1 * faithfulness + 0.4 * visual_correctness + 0.1 * aesthetics
    if text_accuracy is None and missing_text == "renormalized":
        return rest / 0.6
    return rest + 0.4 * (0.5 if text_accuracy is None else text_accuracy)


def mixed_reward(image, text, alpha=0.5):
    """R = (1 - alpha) R_img + alpha R_text; nan or None = missing, and R is missing (nan) if either half is."""
    if image is None or text is None:
        return math.nan
    return (1 - alpha) * image + alpha * text


def average(values):
    """Mean of the values that are there (not None, not nan); nan if none is."""
    kept = [v for v in values if v is not None and not math.isnan(v)]
    return sum(kept) / len(kept) if kept else math.nan


def summarize_rows(rows, missing_text):
    """Means of KScore and its parts over judged rows; ``overall_missing_zero`` divides by all rows instead."""
    judged = [r["judgement"] for r in rows if r["judgement"]]
    parts = {d: average([j[d] for j in judged]) for d in DIMENSIONS}
    if missing_text == "present-mean":
        text = None if math.isnan(parts["text_accuracy"]) else parts["text_accuracy"]
        overall = kscore(**parts | {"text_accuracy": text}, missing_text=missing_text) if judged else math.nan
    else:
        overall = average([kscore(*[j[d] for d in DIMENSIONS], missing_text) for j in judged])
    zero = overall * len(judged) / len(rows) if judged else 0.0
    return {"overall": overall, "overall_missing_zero": zero, **parts, "judged": len(judged), "rows": len(rows)}


def summarize(rows, missing_text="renormalized"):
    """Aggregates over all rows and per track, category and difficulty.

    rows: dicts with "judgement" (None if missing) and, where known, "eval_type", "category", "difficulty".
    """
    summary = {"missing_text": missing_text, "all": summarize_rows(rows, missing_text)}
    for name in ("eval_type", "category", "difficulty"):
        values = sorted({str(r.get(name, "unknown")) for r in rows})
        summary[f"by_{name}"] = {v: summarize_rows([r for r in rows if str(r.get(name, "unknown")) == v], missing_text)
                                 for v in values}
    return summary


WISE_LEGACY = {"cultural": 0.4, "time": 0.167, "space": 0.133, "biology": 0.1, "physics": 0.1, "chemistry": 0.1}
WISE_LAST = {"cultural": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}  # prompt_id
WISE_VERIFIED = {"cultural": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}


def wise_category(row):
    """The category of a WISE row, which its files tell by the prompt's number."""
    number = row.get("prompt_id")
    category = next((c for c, last in WISE_LAST.items() if isinstance(number, int) and 0 < number <= last), None)
    if category is None:
        raise ValueError(f"prompt_id {number!r}: WISE's go from 1 to 1000")
    return category


def wiscore(rows, version):
    """WiScore of rows with a "category" of WISE. Returns {"overall", category: mean, ...}; overall is nan unless every
    category has a row.

    "legacy": "consistency", "realism", "aesthetic" on 0..2, per prompt (0.7 c + 0.2 r + 0.1 a) / 2. "verified": one
    binary "score". None = missing.
    """
    if version not in ("legacy", "verified"):
        raise ValueError(f"WiScore version {version!r}: must be legacy or verified")
    legacy = version == "legacy"
    weights = WISE_LEGACY if legacy else WISE_VERIFIED
    parts = {"consistency": 0.35, "realism": 0.1, "aesthetic": 0.05} if legacy else {"score": 1.0}
    if strange := {row["category"] for row in rows} - set(weights):
        raise ValueError(f"WISE category {sorted(strange)[0]!r}: must be one of {', '.join(weights)}")
    score = lambda row: None if None in (row[k] for k in parts) else sum(w * row[k] for k, w in parts.items())
    means = {c: average([score(row) for row in rows if row["category"] == c]) for c in weights}
    return {"overall": sum(weights[c] * m for c, m in means.items())} | means


# ---- Advantages (section 5) ------------------------------------------------------------------------------------------

def group_advantages(rewards, std="population", eps=1e-6, tolerance=1e-6):
    """A_i = (R_i - mean R) / (std R + eps) within each group. rewards (G, K), nan = missing -> (G, K), same dtype.

    Missing entries, groups whose rewards lie within ``tolerance`` of each other (dead), and lone valid entries are
    exactly 0. std: "population" divides by n, "sample" by n - 1 (advantages smaller by 1.095 at K = 6).
    """
    if std not in ("population", "sample"):
        raise ValueError(f"std {std!r}: must be population or sample")
    given = torch.as_tensor(rewards)
    if given.dim() != 2:
        raise ValueError(f"rewards must have the shape (groups, rollouts), not {tuple(given.shape)}")
    values, valid = given.double(), ~given.isnan()                                             # (G, K)
    count = valid.sum(1, keepdim=True)                                                         # (G, 1)
    centred = values - values.nan_to_num(0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, centred, 0.0)                                                 # (G, K)
    divisor = (count - int(std == "sample")).clamp(min=1)
    deviation = (centred.square().sum(1, keepdim=True) / divisor).sqrt()                       # (G, 1)
    alive = valid & (centred.amax(1, keepdim=True) - centred.amin(1, keepdim=True) > tolerance)
    advantages = torch.where(alive, centred / (deviation + eps), 0.0)
    return advantages.to(given.dtype if given.is_floating_point() else torch.float32)


# ---- Losses: pure functions of tensors (sections 5 and 7) ------------------------------------------------------------

AGGREGATIONS = ("token-mean", "seq-mean-token-sum")
LOG_BOUND = 20.0  # exp is taken of at most this: e^20 is finite in float32, and so is its square


def upcast(x):
    """bfloat16 and float16 -> float32; wider types stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked(x, mask):
    """Widen, and put 0 where the mask is False, so that nan or inf there reaches neither the value nor a gradient."""
    return torch.where(mask, upcast(x), 0.0)


def k3(l):
    """exp(-l) - 1 + l >= 0. Below l = -20 it stays at its value there (no overflow, no gradient)."""
    l = l.clamp(min=-LOG_BOUND)
    return torch.expm1(-l) + l


def count_tokens(mask, aggregation="token-mean"):
    """What an aggregation divides by: tokens of the mask, or rows that have any. mask (N, T) -> int64 scalar."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r}: must be one of {', '.join(AGGREGATIONS)}")
    return mask.sum() if aggregation == "token-mean" else mask.any(-1).sum()


def at_least_one(count):
    """A denominator, number or scalar tensor, that never divides by zero."""
    return torch.as_tensor(count).clamp(min=1)


def aggregate(values, mask, aggregation="token-mean", normalizer=None):
    """Sum of values (N, T) over the mask, divided by ``normalizer`` or else by this mask's own count.

    "token-mean" counts tokens; "seq-mean-token-sum" counts rows with a token: the sum over tokens, averaged over rows.
    ``normalizer`` is the global count over all micro-batches and processes, whose losses are then added, not averaged.
    """
    own = count_tokens(mask, aggregation)
    total = torch.where(mask, values, 0.0).sum()  # an empty mask: 0, still part of the graph
    return total / at_least_one(own if normalizer is None else normalizer)


def policy_mask(advantages, mask):
    """Tokens of the rows that have a policy gradient (advantage not 0): what L_GRPO's first term divides by."""
    return mask & (advantages != 0)[:, None]


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, clip=(0.20, 0.28), beta=1e-3, aggregation="token-mean",
              normalizer=None):
    """L = -1/(sum m) sum m min(u A, clip(u, 1 - clip[0], 1 + clip[1]) A) + beta K_ref, u = exp(log p - sg log p_old).

    logp (with gradient), logp_old, logp_ref: (N, T), log-probabilities of the sampled tokens; advantages (N,); mask
    bool (N, T). K_ref = k3(log p - sg log p_ref). Rows with advantage 0 (dead groups, missing rewards) are not counted
    by the first term's denominator, but the reference KL is taken over all rows. ``normalizer``: one global count for
    both terms, or a pair (count of ``policy_mask``, count of the mask). Returns a scalar, float32 or wider.
    """
    logp, old, ref = masked(logp, mask), masked(logp_old, mask).detach(), masked(logp_ref, mask).detach()     # (N, T)
    first, second = normalizer if isinstance(normalizer, (tuple, list)) else (normalizer, normalizer)
    advantages = upcast(advantages)
    ratio = (logp - old).clamp(-LOG_BOUND, LOG_BOUND).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages[:, None])
    loss = -aggregate(gain, policy_mask(advantages, mask), aggregation, first)
    return loss + beta * aggregate(k3(logp - ref), mask, aggregation, second) if beta else loss


SELECTIONS = ("sampled", "position", "all")


@torch.no_grad()
def select_tokens(gap, mask, selection="sampled", top_fraction=0.1, score=None, threshold=None):
    """Which tokens are distilled: bool (N, T), a part of the mask.

    gap = log q - log p (N, T). "sampled" (the paper's): in each row the top fraction by |gap| of the sampled token,
    which biases the estimate. "position": in each row the top fraction by ``score`` (N, T), a property of the whole
    position (entropy, ``position_kl``); with ``threshold`` instead all positions that reach it, so that no choice
    depends on later tokens. "all": the mask. A fraction of n tokens is ceil(top_fraction n); of equals, the first.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection {selection!r}: must be one of {', '.join(SELECTIONS)}")
    if selection == "position" and score is None:
        raise ValueError("selection 'position' needs a score (N, T)")
    if selection == "all":
        return mask
    if selection == "position" and threshold is not None:
        return mask & (score >= threshold)
    ranked = upcast(score if selection == "position" else gap.abs()).nan_to_num(0.0)
    order = torch.where(mask, ranked, -math.inf).argsort(dim=-1, descending=True, stable=True)       # (N, T)
    keep = (top_fraction * mask.sum(-1, keepdim=True).double() - 1e-9).ceil()                        # (N, 1)
    return mask & (order.argsort(-1) < keep)                                                         # rank in the row


def importance_ratio(logp, logp_old, cap):
    """rho = min(p / sg p_old, cap), its gradient 0 above the cap. cap None: none but the numerical bound."""
    bound = LOG_BOUND if cap is None else math.log(cap)
    return (logp - logp_old).clamp(-LOG_BOUND, bound).exp()


def is_saturated(l, k3_clamp):
    """Where the clamp of k3 binds: for 10, where q/p > 13.6 or l > 11."""
    return torch.zeros_like(l, dtype=torch.bool) if k3_clamp is None else k3(l.detach()) > k3_clamp


def sdl_terms(logp, logp_old, logq, estimator, ratio_cap, k3_clamp, saturation, token_cap):
    """Token losses (N, T) of ``sdl_loss``. The comments say c, the factor of grad log p on the sampled token."""
    l = logp - logq
    rho = importance_ratio(logp, logp_old, ratio_cap)
    if estimator == "surrogate":
        return (rho * l).detach() * logp                                                       # c = min(rho, 2) l
    if estimator == "k2":
        terms = l.square() / 2                                                                 # c = l
    else:
        kept = k3(l) if k3_clamp is None else k3(l).clamp(max=k3_clamp)
        terms = rho * kept if estimator == "k3_live" else rho.detach() * kept  # c = rho l, or rho (1 - exp(-l))
        if saturation == "zero":  # else the live ratio's gradient is +10 rho there: the wanted token is pushed away
            terms = torch.where(is_saturated(l, k3_clamp), 0.0, terms)
    return terms if token_cap is None else terms.clamp(max=token_cap)


SAMPLED_ESTIMATORS = ("k3_live", "k3_detached", "k2", "surrogate")


def sdl_loss(logp, logp_old, logq, mask, estimator="k3_live", selection="sampled", top_fraction=0.1, score=None,
             ratio_cap=2.0, k3_clamp=10.0, saturation="clamp", token_cap=None, aggregation="token-mean",
             denominator="selected", normalizer=None, threshold=None):
    """L_SDL = 1/(sum mE) sum mE min(rho k3(l), c_tok) and its relatives, from the sampled tokens' log-probabilities.

    logp (with gradient), logp_old, logq: (N, T) under the student, the old policy, and the teacher with the guide in
    its context. mask bool (N, T): assistant tokens of rows that got a bundle. Expected gradients, per position and for
    tokens drawn from the untruncated old policy at the temperature of the log-probs (c multiplies grad log p):

    estimator     token loss                      c                  gradient of
    "k3_live"     rho k3(l), rho = p / sg p_old   rho l              reverse KL(p||q); above ratio_cap 2 (1 - exp(-l))
    "k3_detached" sg(rho) k3(l)                   rho (1 - exp(-l))  forward KL(q||p); logp_old = logp: no ratio
    "surrogate"   sg(min(rho, 2) l) log p         min(rho, 2) l      reverse KL below the cap; its value is no distance
    "k2"          l^2 / 2                         l                  reverse KL on-policy only

    saturation: where k3 > k3_clamp, "clamp" keeps the constant (literal), "zero" gives such tokens no loss; both leave
    the denominator as it is. denominator: "selected" counts tokens after the selection, "all" the whole mask.
    aggregation, normalizer: see ``aggregate``. No gradient reaches logp_old or logq. An empty mask gives exactly 0.
    """
    if estimator not in SAMPLED_ESTIMATORS:
        raise ValueError(f"estimator {estimator!r}: must be one of {', '.join(SAMPLED_ESTIMATORS)} "
                         f"(full_kl_loss has those over the vocabulary)")
    if saturation not in ("clamp", "zero") or denominator not in ("selected", "all"):
        raise ValueError(f"saturation {saturation!r}: clamp or zero; denominator {denominator!r}: selected or all")
    if estimator == "surrogate" and token_cap is not None:
        raise ValueError("token_cap needs a token loss that is a distance; the surrogate's is not")
    logp, old, logq = masked(logp, mask), masked(logp_old, mask).detach(), masked(logq, mask).detach()      # (N, T)
    chosen = select_tokens(logq - logp, mask, selection, top_fraction, score, threshold)                # (N, T)
    terms = sdl_terms(logp, old, logq, estimator, ratio_cap, k3_clamp, saturation, token_cap)
    count = count_tokens(mask if denominator == "all" else chosen, aggregation) if normalizer is None else normalizer
    return aggregate(terms, chosen, aggregation, count)


def with_tail(logits, index):
    """log-probs of the tokens in ``index`` (..., k) and of all others together: (..., V) -> (..., k + 1)."""
    logp = F.log_softmax(upcast(logits), -1)
    rest = logp.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, index), rest], -1)


def position_kl(student_logits, teacher_logits, direction, top_k=None):
    """KL at every position, over the whole vocabulary: (..., V), (..., V) -> (...). No gradient into the teacher.

    direction: "forward" KL(q||p) (teacher first) or "reverse" KL(p||q). top_k: the k most likely tokens of the first
    distribution and one bucket for the rest, a lower bound that is exact at k >= V - 1.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction {direction!r}: must be forward or reverse")
    teacher_logits = teacher_logits.detach()
    if top_k is not None and top_k < student_logits.shape[-1]:
        leading = teacher_logits if direction == "forward" else student_logits.detach()
        index = leading.topk(top_k, -1).indices                                               # (..., k)
        logp, logq = with_tail(student_logits, index), with_tail(teacher_logits, index)       # (..., k + 1)
    else:
        logp, logq = (F.log_softmax(upcast(x), -1) for x in (student_logits, teacher_logits))   # (..., V)
    first, second = (logq, logp) if direction == "forward" else (logp, logq)
    return (first.exp() * (first - second)).sum(-1)                                           # (...)


def full_kl_loss(student_logits, teacher_logits, mask, direction, top_k=None, normalizer=None):
    """Mean of ``position_kl`` over the mask. logits (N, T, V), mask bool (N, T) -> scalar; 0 for an empty mask."""
    values = position_kl(student_logits[mask], teacher_logits[mask], direction, top_k)         # (M,)
    return values.sum() / at_least_one(mask.sum() if normalizer is None else normalizer)


def position_entropy(logits):
    """Entropy in nats of every position: (..., V) -> (...)."""
    logp = F.log_softmax(upcast(logits), -1)
    return -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def token_statistics(logp, logp_old, logq, mask, selection="sampled", top_fraction=0.1, score=None, ratio_cap=2.0,
                     k3_clamp=10.0, clip=(0.20, 0.28), threshold=None):
    """What the log says of a step's tokens; shares are 0 for an empty mask. All inputs as in ``sdl_loss``.

    selected: share of the mask that is distilled. saturated: share of the selected at which the clamp of k3 binds.
    capped: share of the selected with rho above the cap. clipped: share of the mask with u outside GRPO's clip range.
    gap: mean |log q - log p| over the mask; gap_selected: over the selected.
    """
    logp, old, logq = (masked(x, mask) for x in (logp, logp_old, logq))
    chosen = select_tokens(logq - logp, mask, selection, top_fraction, score, threshold)
    ratio = importance_ratio(logp, old, None)
    share = lambda what, of: float(aggregate(what.double(), of))
    size = (logq - logp).abs()
    return {"selected": share(chosen, mask), "saturated": share(is_saturated(logp - logq, k3_clamp), chosen),
            "capped": share(ratio > (math.inf if ratio_cap is None else ratio_cap), chosen),
            "clipped": share((ratio < 1 - clip[0]) | (ratio > 1 + clip[1]), mask),
            "gap": float(aggregate(size, mask)), "gap_selected": float(aggregate(size, chosen))}


def gradient_norm(gradients):
    """Norm of a list of gradients, None counting as 0."""
    return math.sqrt(sum(float(model.full_tensor(g.double().square().sum())) for g in gradients if g is not None))


def gradient_cosine(first, second):
    """Cosine of two lists of gradients over the same parameters, None counting as 0; nan if either vanishes."""
    product = sum(float(model.full_tensor((a.double() * b.double()).sum())) for a, b in zip(first, second)
                  if a is not None and b is not None)
    length = gradient_norm(first) * gradient_norm(second)
    return product / length if length else math.nan


# ---- Comparison: where the best and the worst attempt parted (section 6) ---------------------------------------------

FIELDS = {  # the fields of decision_guidance -> heading; five slots, the search slot in two fields
    "focus": "Focus", "recommended_tool_plan": "Plan", "search_query_guidance": "Search",
    "skill_routing_guidance": "Skills", "reference_selection_guidance": "References",
    "prompt_program_guidance": "Prompt", "failure_guards": "Guards"}
SLOTS = {
    "search strategy": ("recommended_tool_plan", "search_query_guidance"),
    "knowledge activation": ("skill_routing_guidance",),
    "reference selection": ("reference_selection_guidance",),
    "prompt construction": ("prompt_program_guidance",),
    "failure avoidance": ("failure_guards",)}

NAME = r"[A-ZÀ-ÖØ-Þ][\w’'-]*"
RUN = re.compile(rf"\b{NAME}(?:\s+(?:(?:of|de|la|van|von|der)\s+)?{NAME})*")
STOP = frozenset("a an the of in on at to and or for with from by is as its what when where who which".split())
OPENERS = STOP | set("show draw paint make create picture image photo render design generate depict give put please it "
                     "one two three four this these exactly light placed".split())


def entity_names(text):
    """Names found generically: runs of capitalised words ("Tower of Kel"), longest first. At a sentence's start a lone
    capitalised word, or one that opens requests ("Show"), is no part of a name."""
    names = set()
    for match in RUN.finditer(text):
        words = match.group().split()
        opening = re.search(r"(^|[.!?:\n])[\s\"'(]*$", text[:match.start()])
        if opening and (len(words) == 1 or words[0].lower() in OPENERS):
            words = words[1:]
        while words and words[0].islower():
            words = words[1:]
        names.add(" ".join(words))
    return sorted(names - {""}, key=lambda n: (-len(n), n))


def without_names(text, names=entity_names):
    """The text with every name replaced by NAME. names: callable, text -> names in it."""
    found = names(text)
    if not found:
        return text
    return re.sub(r"(?<!\w)(?:" + "|".join(map(re.escape, found)) + r")(?!\w)", "NAME", text)


def words_of(text):
    """Lower-case words, numbers included."""
    return re.findall(r"\w+", text.lower())


@dataclass
class Difference:
    """One decision, as each of the two attempts took it."""
    slot: str       # a field of decision_guidance
    decision: str   # what was decided
    about: str      # the skill or the constraint it concerns, else ""
    best: object
    worst: object

    @property
    def differs(self):
        return self.best != self.worst


def queries_of(step):
    """The queries of a search or image_search step; malformed arguments have none."""
    given = step.arguments.get("queries" if step.name == "search" else "query", [])
    return [q for q in (given if isinstance(given, list) else [given]) if isinstance(q, str)]


def name_words(text, names):
    return {w for name in names(text) for w in words_of(name)}


def search_decisions(trajectory, names):
    """Number of searches, leads followed, and how much the queries say beyond names."""
    seen, leads, details = set(), 0, []
    known, named = set(words_of(trajectory.question)), name_words(trajectory.question, names)
    for step in trajectory.steps:
        for query in queries_of(step) if step.name == "search" else []:
            capitals = {w.lower() for w in re.findall(NAME, query)}
            leads += bool((capitals - known) & seen)  # a name that only an earlier observation held
            details.append(bool(set(words_of(query)) - named - capitals - STOP))
        seen |= set(words_of(step.observation))
    style = "none" if not details else "fact" if all(details) else "mixed" if any(details) else "name"
    pictures = sum(s.name == "image_search" for s in trajectory.steps)
    return {("recommended_tool_plan", "text searches", ""): len(details),
            ("recommended_tool_plan", "leads followed", ""): leads,
            ("recommended_tool_plan", "image searches", ""): pictures,
            ("search_query_guidance", "queries", ""): style}


def reference_decisions(trajectory, names):
    """Place of every chosen picture among its results, and the title words that tell it from the others."""
    t, places, telling = trajectory, set(), set()
    titles = {i: set(words_of(image.get("title") or "")) for i, image in t.images.items()}
    results = [list(dict.fromkeys(i for i in re.findall(r"IMG_\d+", s.observation) if i in titles))
               for s in t.steps if s.name == "image_search"]
    for chosen in [r["img_id"] for r in t.program.references] if t.program else []:
        for found in results:
            if chosen in found:
                places.add("first" if found[0] == chosen else "later")
                others = [titles[i] for i in found if i != chosen]
                shared = set.intersection(*others) if others else set()
                telling |= titles[chosen] - shared - name_words(t.question, names) - STOP
    return {("reference_selection_guidance", "place", ""): max(places, default="none"),
            ("reference_selection_guidance", "title words", ""): tuple(sorted(telling))}


def follows(guide, prompt, question):
    """Whether some sentence of the prompt has two fifths of the words of a wording that the guide quotes, in order, and
    two of them are new to the request."""
    asked, sentences = set(words_of(question)), [words_of(s) for s in re.split(r"[.!?]\s", prompt)]
    for quoted in re.findall(r"[\"“]([^\"”]+)[\"”]|(?<!\w)'(.+?)'(?!\w)", guide):
        wording = words_of("".join(quoted))
        for said in sentences:
            blocks = difflib.SequenceMatcher(None, wording, said, autojunk=False).get_matching_blocks()
            shared = [word for block in blocks for word in wording[block.a:block.a + block.size]]
            if len(shared) >= max(3, 0.4 * len(wording)) and len(set(shared) - asked) >= 2:
                return True
    return False


def program_decisions(trajectory, guides):
    """Which guides' wording the prompt follows, whether text is quoted, how many references are named in order."""
    prompt = trajectory.program.gen_prompt if trajectory.program else ""
    features = {("prompt_program_guidance", "wording", skill): follows(guide, prompt, trajectory.question)
                for skill, guide in guides.items()}
    return features | {
        ("prompt_program_guidance", "quoted text", ""): bool(re.search(r"[\"“][^\"”]+[\"”]", prompt)),
        ("prompt_program_guidance", "ordinals", ""): sum(o in prompt.lower() for o in REFERENCE_PHRASES)}


def failed_constraints(trajectory):
    """Names of the constraints and program checks that a judgement says have failed."""
    judged = trajectory.judgement or {}
    return {c["name"] for key in ("constraints", "program_checks") for c in judged.get(key, []) if not c["passed"]}


def skills_read(trajectory):
    """{skill: its guide as the trajectory read it}."""
    return {s.arguments["skill_name"]: s.observation for s in trajectory.steps
            if s.name == "query_knowledge" and isinstance(s.arguments.get("skill_name"), str)}


def compare(best, worst, names=entity_names):
    """Align two trajectories of one request decision by decision: [Difference], slot after slot. A skill, its wording
    and a constraint are a decision each (True: read, followed, passed), taken over what either of the two met."""
    pair = best, worst
    read, failed = [skills_read(t) for t in pair], [failed_constraints(t) for t in pair]
    guides, decided = dict(sorted((read[1] | read[0]).items())), []
    for i, t in enumerate(pair):
        skills = {("skill_routing_guidance", "skill", s): s in read[i] for s in guides}
        passed = {("failure_guards", "constraint", c): c not in failed[i] for c in sorted(failed[0] | failed[1])}
        decided.append(search_decisions(t, names) | skills | reference_decisions(t, names)
                       | program_decisions(t, guides) | passed)
    return [Difference(*key, value, decided[1][key]) for key, value in decided[0].items()]


def select_pair(trajectories, gap=0.20):
    """(best, worst) of a group by reward, or None if no pair has R(best) - R(worst) >= gap (less 1e-9: rewards are sums
    of tenths). Missing rewards, and attempts without program or reference, are no candidates. Of equals, the first."""
    valid = [t for t in trajectories if not math.isnan(t.reward) and t.program is not None and t.program.references]
    if not valid:
        return None
    best, worst = max(valid, key=lambda t: t.reward), min(valid, key=lambda t: t.reward)
    return (best, worst) if best.reward - worst.reward >= gap - 1e-9 else None


# ---- Bundles: what a comparison teaches (section 6) ------------------------------------------------------------------

STANDARD = "Standard: "          # opens a bullet on which best and worst do not differ
BULLET_WORDS = range(12, 23)


@dataclass
class Bundle:
    """Visual experience: a retrieval key and the guidance for every decision."""
    trigger: str                # the kind of request: its text without names
    source_prompt_summary: str
    guidance: dict              # field of FIELDS -> bullets

    @classmethod
    def from_bullets(cls, prompt, bullets, names=entity_names):
        """A bundle for a source prompt. bullets: {field: [bullet, ...]}; fields may be left out."""
        if unknown := set(bullets) - set(FIELDS):
            raise ValueError(f"bundle has no field {sorted(unknown)[0]!r}; fields are {', '.join(FIELDS)}")
        trigger = without_names(prompt, names)
        return cls(trigger, trigger[:160], {f: list(bullets.get(f, [])) for f in FIELDS})

    @classmethod
    def from_dict(cls, value):
        """The inverse of ``to_dict``. Raises ValueError if the schema is not met."""
        value = value if isinstance(value, dict) else {}
        key, guidance = value.get("retrieval_key"), value.get("decision_guidance")
        if not isinstance(key, dict) or not isinstance(guidance, dict):
            raise ValueError("a bundle is {\"retrieval_key\": {...}, \"decision_guidance\": {...}}")
        if not all(isinstance(key.get(k), str) for k in ("trigger", "source_prompt_summary")):
            raise ValueError("retrieval_key needs the texts trigger and source_prompt_summary")
        for f in FIELDS:
            if not isinstance(guidance.get(f), list) or not all(isinstance(b, str) for b in guidance[f]):
                raise ValueError(f"decision_guidance.{f} must be a list of texts")
        return cls(key["trigger"], key["source_prompt_summary"], {f: list(guidance[f]) for f in FIELDS})

    def to_dict(self):
        return {"retrieval_key": {"trigger": self.trigger, "source_prompt_summary": self.source_prompt_summary},
                "decision_guidance": self.guidance}

    @property
    def empty(self):
        return not any(self.guidance.values())

    def markdown(self):
        """The section of the teacher's system prompt, "" for an empty bundle; blank fields are left out."""
        lines = [line for f, bullets in self.guidance.items() if bullets
                 for line in [f"## {FIELDS[f]}"] + [f"- {b}" for b in bullets]]
        return "\n".join(["# Guide"] + lines) + "\n" if lines else ""

    def differing(self):
        """The same bundle without its ``Standard:`` bullets."""
        kept = {f: [b for b in bullets if not b.startswith(STANDARD)] for f, bullets in self.guidance.items()}
        return Bundle(self.trigger, self.source_prompt_summary, kept)


def check_bullet(bullet, names=()):
    """A bullet's error, or None: 12 to 22 words after the prefix, none of the names."""
    text = bullet.removeprefix(STANDARD)
    if len(text.split()) not in BULLET_WORDS:
        return f"{len(text.split())} words; a bullet has 12 to 22"
    held = [n for n in names if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", text)]
    return f"names {held[0]!r}; a bullet names no entity" if held else None


ADVICE = {  # decision -> how the best decided -> bullet
    "text searches": {
        0: "Skip the text search when the request already says everything, and spend the turns on pictures and guides.",
        1: "Make one text search for the missing fact before looking for pictures, and read its answer to the end.",
        2: "Make {best} text searches for the missing facts before looking for pictures, each asking something new."},
    "leads followed": {
        0: "Stop at the first page that answers the question, and do not follow leads to further pages.",
        1: "Follow the lead that the first page names with another search, instead of stopping at what it says."},
    "image searches": {
        1: "Search for pictures once with the full name, and choose among the results instead of searching again.",
        2: "Search for pictures of every subject in its own query, so that each one gets its own reference."},
    "queries": {
        "fact": "Ask every query for the exact fact or look that is missing, together with the full name.",
        "mixed": "Open with the full name, and name the missing fact or look in the query that comes next.",
        "name": "Ask every query by the full name alone, and let the results show which facts there are."},
    "skill": {
        0: "Leave {about} alone when the request gives no reason for it, and save the turn for something else.",
        1: "Activate {about} with one query_knowledge call before composing, because the request needs what it says."},
    "place": {
        "first": "Take the first result among the pictures found when its title fits the request, and look no further.",
        "later": "Look past the first result among the pictures found, and choose the one whose title fits best."},
    "title words": {
        1: "Choose the picture whose title says {words}, and pass over results whose titles only share the name."},
    "wording": {
        0: "Keep the plain words of the request where the {about} guide speaks, because its wording did not help.",
        1: "Follow the wording of the {about} guide closely in the prompt, instead of the request's plain words."},
    "quoted text": {
        1: "Put every text that must be readable in quotation marks, and spell it exactly as it was found."},
    "ordinals": {
        1: "Name the picture only as the first reference image in the prompt, and say what it provides.",
        2: "Name the pictures only as the first and the second reference image, and give each its own role."},
    "constraint": {
        1: "Guard against a failed check of the {about}: state that requirement plainly and verifiably in the prompt."}}


def bullet_of(difference):
    """The bullet that advises what the best decided; "" where there is nothing to advise, as in what neither did."""
    best, about = difference.best, " ".join(difference.about.split()[:4])
    if not best and not difference.worst:
        return ""
    words = " ".join(best[:4]) if isinstance(best, tuple) else ""
    level = best if isinstance(best, str) else bool(best) if isinstance(best, tuple) else min(best, 2)
    table = ADVICE[difference.decision]
    return table.get(level, table.get(bool(best), "")).format(best=best, about=about, words=words)


def focus_of(differences):
    """One bullet on the slot in which most decisions differ."""
    count = {slot: sum(d.differs for d in differences if d.slot in fields) for slot, fields in SLOTS.items()}
    slot = max(count, key=count.get)
    text = f"Decide the {slot} with the greatest care, because that is where better and weaker attempts parted."
    return [text] if count[slot] else []


def summarize_pair(request, best, worst, phrases=None, names=entity_names):
    """The bundle of a best-worst pair, by rules.

    phrases: {field: {decision phrase: bullet}}, the words in which a policy states its decisions. A field gets the
    bullet of every phrase that the best attempt's thoughts contain, with ``Standard:`` if the worst's do too. None:
    general bullets from ``compare``; those that would name an entity of the request are left out.
    """
    if phrases is not None:
        said = [" ".join(s.think for s in t.steps) for t in (best, worst)]
        says = lambda text, phrase: re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None
        bullets = {f: [(STANDARD if says(said[1], phrase) else "") + bullet
                       for phrase, bullet in table.items() if says(said[0], phrase)] for f, table in phrases.items()}
        return Bundle.from_bullets(request, bullets, names)
    differences, found = compare(best, worst, names), names(request)
    bullets = {f: [] for f in FIELDS} | {"focus": focus_of(differences)}
    for difference in differences:
        text = bullet_of(difference)
        if text and check_bullet(text, found) is None:
            bullets[difference.slot].append(("" if difference.differs else STANDARD) + text)
    return Bundle.from_bullets(request, bullets, names)


SUMMARY_PROMPT = """You compare two attempts of the same image-making agent at one request, a better one and a weaker \
one, with what a judge said of their pictures. Write down what the agent should decide next time it meets a request of \
this kind, as one JSON object and nothing else:

{"retrieval_key": {"trigger": "which requests this is for", "source_prompt_summary": "the request in one sentence"},
 "decision_guidance": {FIELDS}}

Every field of decision_guidance is a list of bullets. A bullet is one imperative sentence of 12 to 22 words that \
names no entity of the request, so that it holds for others. It comes from a decision on which the two attempts really \
differ. Where they do not differ, repeat what the better one did and begin the bullet with "Standard: ". Leave a list \
empty if there is nothing to say. Never mention scores, attempts or judges."""


def describe(trajectory, limit=1200):
    """A trajectory as plain text for a summariser."""
    lines = [f"{s.name or s.kind} {json.dumps(s.arguments, ensure_ascii=False)[:limit]}\n  thought: {s.think[:limit]}\n"
             f"  observed: {s.observation[:limit]}" for s in trajectory.steps]
    failed = ", ".join(sorted(failed_constraints(trajectory))) or "nothing"
    return "\n".join(lines) + f"\nreward: {trajectory.reward:.2f}; failed: {failed}"


def summarize_pair_llm(chat, request, best, worst, names=entity_names):
    """The bundle of a pair, written by a language model. chat: callable (messages, temperature=, max_tokens=) -> text.

    Bullets of a wrong length or with a name of the request in them are left out. Raises ValueError if the reply is no
    bundle or no bullet is left."""
    decisions = "\n".join(f"{d.slot}, {d.decision} {d.about}: better {d.best}, weaker {d.worst}"
                          for d in compare(best, worst, names))
    fields = ", ".join(f'"{f}": [...]' for f in FIELDS)
    text = (f"Request: {request}\n\nBetter attempt:\n{describe(best)}\n\nWeaker attempt:\n{describe(worst)}\n\n"
            f"Decisions side by side:\n{decisions}")
    reply = chat([{"role": "system", "content": SUMMARY_PROMPT.replace("FIELDS", fields)},
                  {"role": "user", "content": text}], temperature=0.0, max_tokens=8192)
    start, end = reply.find("{"), reply.rfind("}")
    try:
        value = json.loads(reply[start:end + 1])
    except ValueError as error:
        raise ValueError(f"the summary is not JSON ({error})")
    bundle, found = Bundle.from_dict(value), names(request)
    bundle.guidance = {f: [b for b in bullets if check_bullet(b, found) is None]
                       for f, bullets in bundle.guidance.items()}
    bundle.trigger, bundle.source_prompt_summary = (without_names(t, lambda _: found)
                                                    for t in (bundle.trigger, bundle.source_prompt_summary))
    if bundle.empty:
        raise ValueError("the summary holds no usable bullet")
    return bundle


FILLER = ("remember that paper has two sides and that a river runs on when nobody looks at it while the evening comes "
          "and the grass grows as it did before and the clock goes round with no one there to count the hours").split()


def placebo(bundle, length=lambda text: len(text.split())):
    """A length-matched bundle that advises nothing. length: callable, text -> words or tokens; each bullet takes as
    many filler words as fit into the length of the one it replaces."""
    def fill(bullet, start):
        words = [FILLER[(start + i) % len(FILLER)] for i in range(60)]
        sentences = [" ".join(words[:n]).capitalize() + "." for n in range(1, 61)]
        return max((t for t in sentences if length(t) <= length(bullet)), key=length, default=sentences[0])
    return Bundle(bundle.trigger, bundle.source_prompt_summary,
                  {f: [fill(b, 7 * i) for i, b in enumerate(bullets)] for f, bullets in bundle.guidance.items()})


def shuffled(bundles, pool, seed):
    """The control with wrong guides: for every bundle (None stays None) one of the pool that says something else."""
    rng = random.Random(seed)
    others = lambda bundle: [b for b in pool if b.guidance != bundle.guidance]
    return [rng.choice(o) if b is not None and (o := others(b)) else None for b in bundles]


# ---- Memory: bundles by source prompt (section 6) --------------------------------------------------------------------

@dataclass
class Entry:
    """One remembered bundle and what became of it."""
    prompt: str               # the source prompt
    bundle: Bundle
    best: float               # reward of the pair's best
    gap: float                # best minus worst
    step: int                 # when it was made
    retrieved: int = 0        # how often it was handed to a teacher
    audits: int = 0           # how often its effect was measured
    moved: float = 0.0        # sum over audits of: group's mean reward with the guide, less without it
    moved_squares: float = 0.0
    moved_placebo: float = 0.0  # the same sum for the length-matched placebo
    attempts: dict | None = None  # the pair in short, for the report
    uses: list = field(default_factory=list)  # {"step", "request", "agreement"} of its uses at other requests

    def effect(self):
        """Mean change of the reward and its standard error (inf below two audits)."""
        mean = self.moved / max(self.audits, 1)
        if self.audits < 2:
            return mean, math.inf
        variance = max(self.moved_squares - self.audits * mean ** 2, 0.0) / (self.audits - 1)
        return mean, math.sqrt(variance / self.audits)


class Memory:
    """Visual experience by source prompt. A request gets the whole bundle of the nearest stored prompt, if its cosine
    reaches the gate, or nothing.

    embed: strings -> float tensor (N, D), rows of length 1. names: None, or a callable text -> names, which are taken
    out of the keys. near_tie: among prompts whose cosine is within this of the nearest one's, the bundle with the
    highest best reward is taken. Over capacity the entry with the smallest gap * 2^(-age / half_life) goes.
    """

    def __init__(self, embed, capacity=500, gate=0.84, names=None, near_tie=0.0, half_life=50):
        self.embed, self.capacity, self.gate, self.names = embed, capacity, gate, names
        self.near_tie, self.half_life = near_tie, half_life
        self.entries, self.keys = [], None         # keys (len(entries), D)
        self.counters = {"added": 0, "replaced": 0, "evicted": 0, "retired": 0, "asked": 0, "answered": 0}

    def __len__(self):
        return len(self.entries)

    def keyed(self, prompts):
        """What of the prompts the embedder reads."""
        return prompts if self.names is None else [without_names(p, self.names) for p in prompts]

    def embed_prompts(self, prompts):
        """(N, D), unit rows, on the CPU in float32."""
        keys = self.embed(self.keyed(prompts)).detach().float().cpu()                                # (N, D)
        if keys.dim() != 2 or len(keys) != len(prompts):
            raise ValueError(f"the embedder gave the shape {tuple(keys.shape)} for {len(prompts)} prompts")
        return keys

    def add(self, prompt, bundle, best, worst, step, attempts=None):
        """Remember a bundle with the rewards of its pair. Of two for one prompt the one with the higher best reward
        stays, the newer of equals. An empty bundle is not kept. Returns whether it was kept."""
        if bundle.empty:
            return False
        entry = Entry(prompt, bundle, float(best), float(best - worst), step, attempts=attempts)
        at = next((i for i, e in enumerate(self.entries) if e.prompt == prompt), None)
        self.counters["added"] += 1
        if at is not None:
            better = best >= self.entries[at].best - 1e-9
            if better:
                self.entries[at] = entry
                self.counters["replaced"] += 1
            return better
        key = self.embed_prompts([prompt])
        self.keys = key if self.keys is None else torch.cat([self.keys, key])
        self.entries.append(entry)
        if len(self.entries) > self.capacity:
            worth = [e.gap * 0.5 ** ((step - e.step) / self.half_life) for e in self.entries]
            self.drop({min(range(len(worth)), key=worth.__getitem__)})
            self.counters["evicted"] += 1
        return True

    def drop(self, gone):
        """Forget the entries at these places."""
        stay = [i for i in range(len(self.entries)) if i not in gone]
        self.entries = [self.entries[i] for i in stay]
        self.keys = self.keys[stay] if stay else None

    def lookup(self, prompts, count=True):
        """For every prompt the Entry that answers it, or None. count: whether this shows in the counters."""
        if not self.entries or not prompts:
            found = [None] * len(prompts)
        else:
            cosines = self.embed_prompts(prompts) @ self.keys.T                                      # (N, entries)
            found = [self.choose(row) for row in cosines]
        if count:
            self.counters["asked"] += len(prompts)
            self.counters["answered"] += sum(e is not None for e in found)
            for entry in found:
                if entry is not None:
                    entry.retrieved += 1
        return found

    def choose(self, cosines):
        """The entry for one row of cosines (entries,); comparisons forgive rounding of 1e-6."""
        top = float(cosines.max())
        if top < self.gate - 1e-6:
            return None
        floor = max(top - self.near_tie, self.gate) - 1e-6
        near = [e for e, c in zip(self.entries, cosines.tolist()) if c >= floor]
        return max(near, key=lambda e: (e.best, e.step))

    @staticmethod
    def record_audit(entry, with_guide, without, placebo):
        """Note the mean rewards of a request's group sampled with the guide, without it, and with a placebo of its
        length; a missing one (nan) voids the audit."""
        moved = with_guide - without
        if not math.isnan(moved + placebo):
            entry.audits += 1
            entry.moved += moved
            entry.moved_squares += moved * moved
            entry.moved_placebo += placebo - without

    def retire(self, audits=3):
        """Forget lessons that hurt: those whose mean effect, after enough audits, is negative by more than its standard
        error. Returns them."""
        hurt = {i for i, e in enumerate(self.entries) if e.audits >= audits and sum(e.effect()) < 0}
        gone = [self.entries[i] for i in sorted(hurt)]
        if gone:
            self.drop(hurt)
            self.counters["retired"] += len(gone)
        return gone

    def refresh(self):
        """Embed all keys again, after the embedder has changed."""
        self.keys = self.embed_prompts([e.prompt for e in self.entries]) if self.entries else None

    def state_dict(self):
        """(JSON-able dict, {"keys": float32 (entries, D)}): everything but the embedder and the settings."""
        rows = [asdict(e) | {"bundle": e.bundle.to_dict()} for e in self.entries]
        keys = torch.zeros(0, 0) if self.keys is None else self.keys.clone()
        return {"entries": rows, "counters": dict(self.counters)}, {"keys": keys}

    def load_state(self, state, tensors):
        """The inverse of ``state_dict``. Raises ValueError if entries and keys do not belong together."""
        if len(state["entries"]) != len(tensors["keys"]):
            raise ValueError(f"memory has {len(state['entries'])} entries but {len(tensors['keys'])} keys")
        self.entries = [Entry(**row | {"bundle": Bundle.from_dict(row["bundle"])}) for row in state["entries"]]
        self.keys = tensors["keys"].clone() if self.entries else None
        self.counters = dict(state["counters"])


# ---- Teacher: the same policy with the guide in its context (sections 6 and 7) ---------------------------------------

TOOLS_LINE = re.compile(r"^# Tools[ \t]*$", re.M)


def teacher_messages(messages, bundle):
    """The student's messages with the bundle's Markdown section in the system prompt, before the tool definitions (the
    line "# Tools") where there are any, else at its end. None or an empty bundle: the same messages."""
    if not messages or messages[0]["role"] != "system":
        raise ValueError("there is no system message to put the guide into")
    section, content = "" if bundle is None else bundle.markdown(), messages[0]["content"]
    if not section:
        return list(messages)
    line = TOOLS_LINE.search(content)
    at = line.start() if line else len(content)
    content = content[:at] + ("" if line else "\n\n") + section + content[at:]
    return [messages[0] | {"content": content}] + messages[1:]


def teacher_tokens(tokens, mask, prompt_length, teacher_prompt):
    """What the teacher scores: its own prompt, then exactly the student's tokens, nothing re-tokenised or cut.

    tokens, mask: the student's whole conversation; prompt_length: tokens before its first turn; teacher_prompt: the
    ids of the opening under ``teacher_messages``. Returns (tokens, mask), longer by exactly the guide."""
    return (list(teacher_prompt) + list(tokens[prompt_length:]),
            [False] * len(teacher_prompt) + list(mask[prompt_length:]))


def check_same_actions(student, student_mask, teacher, teacher_mask):
    """Raise ValueError unless the masked (action) tokens of both are identical, all shifted by one offset, the length
    of the guide. Returns the offset."""
    offset = len(teacher) - len(student)
    own = [(i + offset, t) for i, (t, m) in enumerate(zip(student, student_mask)) if m]
    other = [(i, t) for i, (t, m) in enumerate(zip(teacher, teacher_mask)) if m]
    if own != other or offset < 0 or len(teacher) != len(teacher_mask) or len(student) != len(student_mask):
        raise ValueError("teacher and student do not see the same action tokens")
    return offset


@torch.no_grad()
def ema_update(teacher, student, decay):
    """teacher <- decay teacher + (1 - decay) student, for every parameter; buffers are copied."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.lerp_(new.to(old.dtype), 1 - decay)
    for old, new in zip(teacher.buffers(), student.buffers(), strict=True):
        old.copy_(new)


FULL_ESTIMATORS = ("forward_kl", "reverse_kl", "topk_tail")  # over the vocabulary: they need logits
RECIPE_CHOICES = {"estimator": SAMPLED_ESTIMATORS + FULL_ESTIMATORS, "selection": SELECTIONS,
                  "saturation": ("clamp", "zero"), "aggregation": AGGREGATIONS, "denominator": ("selected", "all"),
                  "score": ("entropy", "advice"), "teacher": ("same", "ema", "frozen"), "std": ("population", "sample")}


@dataclass(frozen=True)
class Recipe:
    """How experience becomes a gradient. The defaults are the paper's, read literally."""
    estimator: str = "k3_live"        # SAMPLED_ESTIMATORS or FULL_ESTIMATORS (topk_tail: reverse KL over top_k + rest)
    selection: str = "sampled"        # which positions: "sampled", "position" (by the score), "all"
    top_fraction: float = 0.1         # of a row's tokens, unless selection is "all" or there is a threshold
    score: str = "entropy"            # of selection "position": "entropy" or "advice", see ``teacher_scores``
    threshold: float | None = None    # of the score, in nats; all positions that reach it (None: the top fraction)
    ratio_cap: float = 2.0            # of rho
    k3_clamp: float = 10.0            # of k3
    saturation: str = "clamp"         # what the clamp does: "clamp" (literal) or "zero"
    token_cap: float | None = None    # c_tok, open in the paper
    top_k: int = 32                   # of topk_tail
    aggregation: str = "token-mean"   # or "seq-mean-token-sum"
    denominator: str = "selected"     # or "all" assistant tokens of guided rows
    weight: float = 2.0               # of L_SDL beside L_GRPO
    anneal: int = 0                   # updates over which the weight falls to zero, in a straight line (0: it stays)
    teacher: str = "same"             # weights: "same" (gradient stopped), "ema" or "frozen" at the start
    ema_decay: float = 0.98           # of the "ema" teacher, per step
    std: str = "population"           # in the advantage
    clip: tuple = (0.20, 0.28)        # of GRPO's ratio
    beta: float = 1e-3                # of the reference KL
    min_reward_gap: float = 0.20      # least R(best) - R(worst) of a lesson
    pairs: int = 8                    # lessons a step, at most
    capacity: int = 500               # of the memory
    gate: float = 0.84                # least cosine; belongs to Qwen3-Embedding, fit it for another embedder
    near_tie: float = 0.0             # cosines this near count as equal: the better best reward decides
    entity_free: bool = False         # keys without names
    standard: bool = True             # keep the bullets on which best and worst agree

    def __post_init__(self):
        for name, choices in RECIPE_CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")
        if self.anneal < 0:
            raise ValueError(f"anneal {self.anneal}: must not be negative")
        if self.threshold is not None and (self.selection != "position" or self.denominator != "all"):
            raise ValueError("threshold: goes with selection 'position' and denominator 'all', which is known before "
                             "any forward pass")

    @property
    def reads_unguided(self):
        """Whether the teacher's view without the guide is wanted, too."""
        return self.selection == "position" and self.score == "advice"

    @property
    def reads_logits(self):
        """Whether the loss needs the student's and the teacher's whole logits, not only the sampled tokens'."""
        return self.estimator in FULL_ESTIMATORS or self.reads_unguided

    def fade(self, step):
        """What is left of the weight at update ``step`` (0 is the first): a teacher that was ahead at the start is let
        go before it holds the student back ("kickstarting", arXiv 1803.03835)."""
        return max(0.0, 1 - step / self.anneal) if self.anneal else 1.0

    def at(self, step):
        """The recipe of update ``step``, its weight faded."""
        return replace(self, weight=self.weight * self.fade(step)) if self.anneal else self


RECIPES = {
    "paper": Recipe(),
    "stable": Recipe(
        estimator="forward_kl",   # covers what the teacher wants; reverse KL locked the entropy in
        # picking by the sampled token's |l| is biased; all positions hold the student where its teacher started
        selection="position", score="advice", threshold=0.1,
        saturation="zero",        # should a k3 estimator be tried: no flipped gradients
        denominator="all", weight=1.0,
        anneal=60,                # a frozen teacher is ahead at the start and no better than GRPO in the end
        standard=False,           # where what is right is rare, best and worst mostly agree on what is lazy
        teacher="frozen",         # a live teacher chases its own student and collapses
        near_tie=0.02, entity_free=True,  # the lesson is about the kind of request, not about its names
        gate=0.6)}                # fits the embedded policy's bags of words; another embedder wants its own


def experience_loss(recipe, mask, logp=None, logp_old=None, logq=None, student_logits=None, teacher_logits=None,
                    score=None, normalizer=None):
    """L_SDL by a recipe's estimator. Sampled ones read logp, logp_old, logq (N, T); those over the vocabulary read both
    logits (N, T, V), and the log-probs only for selection "sampled". mask, score and what follows: see ``sdl_loss``."""
    r = recipe
    if r.estimator in SAMPLED_ESTIMATORS:
        return sdl_loss(logp, logp_old, logq, mask, r.estimator, r.selection, r.top_fraction, score, r.ratio_cap,
                        r.k3_clamp, r.saturation, r.token_cap, r.aggregation, r.denominator, normalizer, r.threshold)
    gap = masked(logq, mask) - masked(logp, mask) if r.selection == "sampled" else None
    chosen = select_tokens(gap, mask, r.selection, r.top_fraction, score, r.threshold)                   # (N, T)
    direction, top_k = ("forward" if r.estimator == "forward_kl" else "reverse",
                        r.top_k if r.estimator == "topk_tail" else None)
    kl = position_kl(student_logits[chosen], teacher_logits[chosen], direction, top_k)                   # (M,)
    kl = kl if r.token_cap is None else kl.clamp(max=r.token_cap)
    values = torch.zeros(mask.shape, dtype=kl.dtype, device=kl.device).masked_scatter(chosen, kl)        # (N, T)
    if normalizer is None:
        normalizer = count_tokens(mask if r.denominator == "all" else chosen, r.aggregation)
    return aggregate(values, chosen, r.aggregation, normalizer)


# ---- One update step: from trajectories to a gradient ----------------------------------------------------------------

@dataclass
class TrainingRow:
    """What an update needs of one trajectory. The teacher's opening is longer by the guide; None: it got no guide."""
    tokens: list                  # ids of the whole conversation
    mask: list                    # True: written by the policy
    advantage: float = 0.0        # 0: no policy gradient
    teacher_tokens: list | None = None   # the same conversation under the teacher's opening
    teacher_mask: list | None = None
    logp_old: torch.Tensor | None = None  # (T,) log p of the actions; None: the policy in training wrote them, u = 1


@dataclass
class TokenScores:
    """One network's view of the action tokens of N rows, in order, padded to the longest row."""
    mask: torch.Tensor            # (N, T) bool
    logp: torch.Tensor            # (N, T) log-probabilities of the tokens
    entropy: torch.Tensor         # (N, T) of the positions, nats
    logits: torch.Tensor | None   # (N, T, V) divided by the temperature


def pad_rows(rows):
    """Tensors (T_i, ...) -> one tensor (N, max T, ...), zeros behind.

    One scatter: the backward pass of filling row by row copies the whole gradient once a row."""
    flat, lengths = torch.cat(list(rows)), torch.tensor([len(r) for r in rows])
    where = torch.arange(int(lengths.max())) < lengths[:, None]                                           # (N, T)
    where = where.to(flat.device).view(where.shape + (1,) * (flat.dim() - 1)).expand(where.shape + flat.shape[1:])
    return flat.new_zeros(where.shape).masked_scatter(where, flat)


def score_actions(net, sequences, masks, temperature=1.0, with_logits=False):
    """TokenScores of the masked tokens. The same code for student, old, reference and teacher, so that equal weights and
    contexts give equal numbers. with_logits keeps the (N, T, V) logits; without, they never exist as a whole."""
    return TokenScores(*net.forward_with(action_scores, sequences, masks, temperature, with_logits))


def action_scores(net, sequences, masks, temperature, with_logits):
    """The fields of TokenScores, computed inside one forward pass of the network."""
    places = [[i for i, m in enumerate(mask) if m] for mask in masks]
    shape = pad_rows([torch.ones(len(p), dtype=torch.bool) for p in places]).to(net.embed.weight.device)   # (N, T)
    if not with_logits:
        logp, entropy = model.token_logprobs_and_entropy(net, sequences, temperature, masks)
        pick = lambda rows: pad_rows([r[torch.tensor(p, device=r.device) - 1] for r, p in zip(rows, places)])
        return shape, pick(logp), pick(entropy), None
    hidden, rows = model.hidden_states(net, sequences)
    before = torch.cat([r[torch.tensor(p, device=r.device) - 1] for r, p in zip(rows, places)])  # row t - 1 predicts t
    logits = net.logits(hidden[before]) / temperature                                                     # (M, V)
    wanted = torch.tensor([s[i] for s, p in zip(sequences, places) for i in p], device=logits.device)
    logs = F.log_softmax(logits, -1)
    logp, entropy = logs.gather(1, wanted[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    back = lambda flat: pad_rows(flat.split([len(p) for p in places]))
    return shape, back(logp), back(entropy), back(logits)


def select_rows(scores, places):
    """The TokenScores of some of the rows, no wider than these need."""
    if len(places) == len(scores.mask):
        return scores
    width = int(scores.mask[places].sum(1).max())
    cut = lambda x: x if x is None else x[places][:, :width]
    return TokenScores(cut(scores.mask), cut(scores.logp), cut(scores.entropy), cut(scores.logits))


def teacher_scores(teacher, student, rows, recipe, temperature=1.0, unguided=None, with_logits=False):
    """(the teacher's TokenScores of guided rows, the score by which selection "position" chooses); no gradient.

    student: TokenScores of the same rows. unguided: the teacher's TokenScores of them without a guide, where they are known.
    with_logits: keep the logits even if the recipe does not read them.

    The score (N, T) is the student's entropy, or "advice": KL(pi_E(.|h~) || pi_E(.|h)), how much the guide changes the
    teacher's mind. It is near zero wherever the guide is silent; there a teacher whose weights are not the student's
    would teach nothing but what it was. (A guide that was written from the very group that it teaches makes the score
    depend on how that group's attempts went on.)
    """
    with torch.no_grad():
        guided_scores = score_actions(teacher, [r.teacher_tokens for r in rows], [r.teacher_mask for r in rows], temperature,
                             with_logits or recipe.reads_logits)
        if not recipe.reads_unguided:
            return guided_scores, student.entropy.detach()
        unguided = unguided or score_actions(teacher, [r.tokens for r in rows], [r.mask for r in rows], temperature, True)
        return guided_scores, position_kl(unguided.logits, guided_scores.logits, "forward")                                    # (N, T)


def distilled_count(rows, recipe):
    """The denominator of L_SDL over all rows, before any forward pass: micro-batches and processes share it."""
    lengths = [sum(r.mask) for r in rows if r.teacher_tokens is not None]
    if recipe.aggregation == "seq-mean-token-sum":
        return len(lengths)
    if recipe.denominator == "all" or recipe.selection == "all":
        return sum(lengths)
    return sum(math.ceil(recipe.top_fraction * n - 1e-9) for n in lengths)


# On a CPU activations of more than some tens of MB go back to the system after every use, and a page fault for every
# 4 KB of them took a fifth of the time.
MICRO_TOKENS = {"cpu": 6144}


def micro_batches(rows, limit):
    """Neighbouring rows in pieces of at most ``limit`` tokens (at least one row each). What a row shares with the one
    before counts once, as it is computed once; so a group, the rows of one prompt, stays whole where it fits."""
    pieces, filled, before = [[]], 0, []
    for _, group in itertools.groupby(rows, lambda r: r.tokens[:(r.mask + [True]).index(True)]):
        group, fresh = list(group), []
        for row in group:
            fresh.append(len(row.tokens) - model.common_prefix(before, row.tokens))
            before = row.tokens
        for i, row in enumerate(group):
            if pieces[-1] and filled + (fresh[i] if i else sum(fresh)) > limit:
                pieces.append([])
            filled = filled + fresh[i] if pieces[-1] else len(row.tokens)
            pieces[-1].append(row)
    return pieces


def local_rows(rows, processes):
    """This process's part of a micro-batch -> (rows, whether each counts).

    Sharded weights are put together by all processes at once, so all of them take the same passes: one that has no
    rows, or none with a guide where others have some, borrows a row that does not count.
    """
    mine, guided = processes.shard_list(rows), [r for r in rows if r.teacher_tokens is not None]
    counts = [True] * len(mine)
    if not mine or guided and all(r.teacher_tokens is None for r in mine):
        mine, counts = mine + (guided or rows)[:1], counts + [False]
    return mine, counts


def add_gradients(total, loss, parameters, keep=False):
    """total += d loss / d parameters, in place. keep: the graph is needed once more."""
    if loss.requires_grad:
        loss.backward(retain_graph=keep)
        for t, p in zip(total, parameters):
            if p.grad is not None:
                t.add_(p.grad)
                p.grad = None


def update_gradients(net, reference, teacher, rows, recipe, temperature=1.0, policy=True, limit=None, counts=None,
                     imitated=(), together=False, processes=None):
    """Gradients of L_GRPO and of what stands beside it, over one batch of trajectories, micro-batch by micro-batch.

    rows: [TrainingRow], the same in every process of ``processes``. reference and teacher are networks (teacher may be ``net``: the
    paper's). policy: whether L_GRPO is wanted. imitated: [(tokens, mask)]; if given, cross-entropy on them takes the
    place of L_SDL. counts: denominators (live, all, distilled); None: these rows are all. Returns (gradients of
    L_GRPO, gradients of L_SDL, statistics), sums over all processes; L = L_GRPO + weight L_SDL is put together by the
    caller, who knows both norms, or, with ``together``, in one backward pass: the first gradients are those of L.
    """
    processes, parameters = processes or model.ProcessGroup(), [p for p in net.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    live, every, distilled = counts or step_counts(rows, recipe)
    sums = Counter()
    limit = limit or MICRO_TOKENS.get(parameters[0].device.type, 65536)
    for micro_batch in micro_batches(rows, limit * processes.size):
        piece, counted = local_rows(micro_batch, processes)
        guided = [i for i, r in enumerate(piece) if r.teacher_tokens is not None] if recipe.weight and not imitated else []
        tokens, masks = [r.tokens for r in piece], [r.mask for r in piece]
        student = score_actions(net, tokens, masks, temperature, recipe.reads_logits and bool(guided))
        mask = student.mask & torch.tensor(counted, device=student.mask.device)[:, None]                  # (N, T)
        now = student.logp.detach()
        old = pad_rows([row if r.logp_old is None else r.logp_old.to(row) for r, row in zip(piece, now)])
        loss, unguided, advantages = None, None, torch.tensor([r.advantage for r in piece], device=mask.device)
        if policy:
            # a reference that is the teacher, too, gives both of its views without guides in one pass
            twice = recipe.reads_unguided and teacher is reference and bool(guided)
            with torch.no_grad():
                ref = score_actions(reference, tokens, masks, temperature, twice)
            unguided = select_rows(ref, guided) if twice else None
            loss = grpo_loss(student.logp, old, ref.logp, advantages, mask, recipe.clip, recipe.beta,
                             recipe.aggregation, (live, every))
            sums["grpo_loss"] += float(loss.detach())
            sums["reference_kl"] += float(aggregate(k3(now - ref.logp), mask, normalizer=1))
            ratio = importance_ratio(now, old, None)
            outside = (ratio < 1 - recipe.clip[0]) | (ratio > 1 + recipe.clip[1])
            sums["clipped"] += int((outside & mask).sum())
        if guided:
            for r in piece:
                if r.teacher_tokens is not None:
                    check_same_actions(r.tokens, r.mask, r.teacher_tokens, r.teacher_mask)
            learner = select_rows(student, guided)
            guided_scores, score = teacher_scores(teacher, learner, [piece[i] for i in guided], recipe, temperature, unguided)
            part, before = (x[guided][:, :learner.mask.shape[1]] for x in (mask, old))
            distance = experience_loss(recipe, part, learner.logp, before, guided_scores.logp, learner.logits, guided_scores.logits,
                                       score=score, normalizer=distilled)
            sums["sdl_loss"] += float(distance.detach())
            if told := int(part.sum()):
                said = token_statistics(learner.logp.detach(), before, guided_scores.logp, part, recipe.selection,
                                        recipe.top_fraction, score, recipe.ratio_cap,
                                        recipe.k3_clamp, recipe.clip, recipe.threshold)
                chosen = said["selected"] * told  # counts, so that micro-batches add up
                sums.update({"guided_tokens": told, "gap": said["gap"] * told, "selected": chosen,
                             "saturated": said["saturated"] * chosen, "capped": said["capped"] * chosen})
        if together and guided:
            loss, guided = (0 if loss is None else loss) + recipe.weight * distance, []
        if loss is not None:  # FSDP averages gradients over processes, the denominators want their sum
            add_gradients(first, loss * processes.size, parameters, keep=bool(guided))
        if guided:
            add_gradients(second, distance * processes.size, parameters)
        sums["entropy"] += float(aggregate(student.entropy.detach(), mask, normalizer=1))
        sums["tokens"] += int(mask.sum())
    if imitated:
        total = sum(sum(mask) for _, mask in imitated)
        mine = processes.shard_list(list(imitated)) or imitated[:1]
        counted = float(bool(processes.shard_list(list(imitated))))
        told = score_actions(net, [t for t, _ in mine], [m for _, m in mine], temperature)
        add_gradients(second, -counted * processes.size * aggregate(told.logp, told.mask, normalizer=total), parameters)
    everywhere = Counter()
    for part in processes.all_gather_objects(sums):
        everywhere.update(part)
    return first, second, dict(everywhere)


def step_counts(rows, recipe):
    """Denominators of an update (live tokens, all tokens, distilled tokens) or rows, as the aggregation says."""
    size = (lambda r: sum(r.mask)) if recipe.aggregation == "token-mean" else (lambda r: int(any(r.mask)))
    return sum(size(r) for r in rows if r.advantage), sum(map(size, rows)), distilled_count(rows, recipe)


def reverse_kl_cosine(net, teacher, rows, recipe, temperature=1.0):
    """Cosine between the gradient of L_SDL as the recipe estimates it and that of the reverse KL over the vocabulary
    (what the paper's loss estimates), on the same rows. nan without guided rows."""
    rows = [r for r in rows if r.teacher_tokens is not None]
    if not rows:
        return math.nan
    parameters = [p for p in net.parameters() if p.requires_grad]
    student = score_actions(net, [r.tokens for r in rows], [r.mask for r in rows], temperature, True)
    guided_scores, score = teacher_scores(teacher, student, rows, recipe, temperature, with_logits=True)
    used = experience_loss(recipe, student.mask, student.logp, student.logp.detach(), guided_scores.logp, student.logits,
                           guided_scores.logits, score=score)
    exact = full_kl_loss(student.logits, guided_scores.logits, student.mask, "reverse")
    gradients = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    for total, loss in zip(gradients, (used, exact)):
        add_gradients(total, loss, parameters, keep=True)
    return gradient_cosine(*gradients)


# ---- SFT ----------

def read_demonstrations(path):
    """The messages of every row of an SFT file (section 2's released format)."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file (python -m atlas.build --demos 30000 makes the Atlas's)")
    with open(path, encoding="utf-8") as file:
        try:
            return [json.loads(line)["messages"] for line in file]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of demonstrations ({error})")


def rare_tokens(tokenizer, conversations):
    """[tokens that few requests contain (syllables of names, digits, letters), the single characters among them]: what
    a policy has to copy."""
    requests = [tokenizer.encode(c[1]["content"]) for c in conversations[:3000]]
    counts = Counter(t for ids in requests for t in set(ids))
    rare = np.array(sorted(t for t, n in counts.items() if n < 0.2 * len(requests)))
    single = np.array([t for t in rare if re.fullmatch("[A-Z0-9]", tokenizer.decode([int(t)]))])
    return [rare, single if len(single) else rare]


def copy_loss(net, pools, rng, count, device):
    """Cross-entropy on the second of two equal random segments: it can only be copied.

    Segments are short, three to sixteen tokens, or nothing in the context is likely enough to start from. Every other
    one is written in single characters, whose order is all there is to copy in a year or a code word."""
    pool = pools[int(rng.integers(len(pools)))]
    length, gaps = int(rng.integers(3, 17)), rng.integers(0, 25, 2)
    segment = torch.tensor(rng.choice(pool, (count, length)), device=device)
    before, between = (torch.tensor(rng.choice(pools[0], (count, n)), device=device) for n in gaps)
    ids = torch.cat([before, segment, between, segment], 1)
    logits = net(ids[:, :-1])[:, -(length - 1):]                                      # (count, length - 1, V)
    return F.cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten())


def sft_loss(net, rows, worth=None):
    """Cross-entropy on assistant tokens only: L = -sum m w log pi(y | h) / sum m w. rows: [(ids, mask)]; worth: (V,) w
    of every token, None: 1."""
    hidden, places = model.hidden_states(net, [ids for ids, _ in rows])
    device = hidden.device
    before = torch.cat([at[:-1][torch.tensor(mask[1:], device=device)] for at, (_, mask) in zip(places, rows)])
    said = torch.tensor([t for ids, mask in rows for t, m in zip(ids[1:], mask[1:]) if m], device=device)
    share = torch.ones(len(said), device=device) if worth is None else worth[said]                    # (M,)
    return -model.weighted_logprobs(hidden[before], net.output_weight, said, share / share.sum())


def batches(rows, batch_tokens, rng):
    """Endless shuffled batches of about ``batch_tokens`` tokens."""
    while True:
        batch, size = [], 0
        for i in rng.permutation(len(rows)):
            batch.append(rows[i])
            size += len(rows[i][0])
            if size >= batch_tokens:
                yield batch
                batch, size = [], 0


def cosine(step, steps, peak, warmup):
    """Learning rate: linear rise over ``warmup`` of the steps, then cosine to a tenth."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


def sft(s):
    """python genevolve.py sft"""
    device, conversations = model.pick_device(s.device), read_demonstrations(s.data)
    torch.manual_seed(s.seed)
    state = os.path.join(model.make_folder(s.out), "resume.safetensors")
    going_on = os.path.exists(state)
    if going_on:
        told, now = model.read_json(os.path.join(s.out, "training.json"))["settings"], model.portable(asdict(s))
        if changed := [k for k in now if told.get(k) != now[k] and k not in ("device", "save_every")]:
            raise ValueError(f"{s.out} holds an unfinished run with another --{changed[0].replace('_', '-')} "
                             f"({told.get(changed[0])!r}); remove {state} to start afresh")
    if going_on or s.init:
        net, tokenizer = model.load(s.out if going_on and not s.lora else s.init, device)  # s.out is merged
    else:
        with open(s.vocabulary, encoding="utf-8") as file:
            tokenizer = model.train_tokenizer(file.readlines(), s.vocab_size)
        net = model.Qwen3(model.Config(vocab_size=tokenizer.size, hidden_size=s.hidden, layers=s.layers, heads=s.heads,
                                       kv_heads=2, head_dim=32, mlp_size=s.hidden * 3, rope_theta=100.0,
                                       tie_embeddings=True)).to(device)
    if s.lora:  # the adapters alone are trained and kept to go on
        model.add_lora(net, s.lora, alpha=2 * s.lora)
    rows = [tokenizer.apply_chat_with_mask(c) for c in conversations]
    pools, worth = rare_tokens(tokenizer, conversations), torch.ones(net.config.vocab_size, device=device)
    worth[torch.tensor(pools[0], device=device)] = s.copy_token_weight
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay)
    stream, copies = batches(rows, s.batch_tokens, np.random.default_rng(s.seed)), 0 if s.init else s.copy_steps
    done, earlier = resume_sft(state, net, optimizer) if going_on else (0, 0.0)
    for _ in range(copies, done):
        next(stream)  # what the demonstrations' steps so far have seen
    total, start, log = copies + s.steps, time.perf_counter() - earlier, {}
    for step in range(done, total):
        warm, rng = step < copies, np.random.default_rng([s.seed, step])
        rate = s.lr * min(1.0, (step + 1) / 20) if warm else cosine(step - copies, s.steps, s.lr, s.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16, enabled=s.bf16):
            loss = copy_loss(net, pools, rng, s.batch_tokens // 48, device) if warm else \
                sft_loss(net, next(stream), worth)
            if not warm and s.copy_weight:  # keep it alive while language is learned
                copied = copy_loss(net, pools, rng, s.batch_tokens // 256, device)
                loss = loss + s.copy_weight * copied
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        elapsed = time.perf_counter() - start
        if step % 20 == 0 or step == total - 1:
            log = {"step": step, "stage": "copy" if warm else "sft", "loss": loss.item(),
                   "copy_loss": copied.item() if s.copy_weight and not warm else None, "grad_norm": norm.item(),
                   "lr": rate, "seconds": elapsed, "seconds_left": elapsed / (step + 1) * (total - step - 1)}
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in log.items()), flush=True)
        if (step + 1) % s.save_every == 0 or step == total - 1:
            model.save(s.out, net, tokenizer)
            if s.lora:
                model.save_adapter(os.path.join(s.out, "adapter"), net, s.init)
            model.write_json(os.path.join(s.out, "genevolve.json"),
                             {"protocol": "compact" if not s.init else model.read_protocol(s.init)})
            model.write_json(os.path.join(s.out, "training.json"),
                             {"command": model.command_line(), "settings": model.portable(asdict(s)), **log})
            tensors = {"done": torch.tensor(step + 1), "seconds": torch.tensor(elapsed, dtype=torch.float64)}
            for name, p in trained.items():
                tensors |= {f"net.{name}": p.detach()} | {f"{k}.{name}": v for k, v in optimizer.state[p].items()}
            model.write_tensors(state, {k: v.cpu().contiguous() for k, v in tensors.items()})
    os.remove(state)  # done: what it took to go on is of no more use


@torch.no_grad()
def resume_sft(path, net, optimizer):
    """Weights and optimizer of an unfinished cold start -> (steps done, seconds they took)."""
    with model.open_tensors(path) as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
    for name, p in [(name, p) for name, p in net.named_parameters() if p.requires_grad]:
        p.copy_(tensors[f"net.{name}"])
        optimizer.state[p] = {k: tensors[f"{k}.{name}"].to("cpu" if k == "step" else p.device)
                              for k in ("step", "exp_avg", "exp_avg_sq")}
    print(f"sft: resuming at step {int(tensors['done'])}", flush=True)
    return int(tensors["done"]), float(tensors["seconds"])
