"""Do the tests protect the claims? Breaks one line at a time and says which breaks no test notices.

    python .ci/mutants.py                     all mutants; results are kept, so a second call goes on where it stopped
    python .ci/mutants.py --only distill      those whose file, claim or texts contain a word
    python .ci/mutants.py --named --jobs 4    the named tests alone, without the whole quick suite behind them
    python -m pytest -m mutants test_all.py   the same as a test, which nothing else runs

Each mutant is put into a copy of the tree and must be killed there: first by the tests that it names, and if these
pass, by everything that is not slow. What comes out:

    killed       a test failed, or the mutant ran into the time limit
    survived     no test failed: a claim that nothing protects
    equivalent   no test can fail, for the reason that stands beside the mutant; these are not run
    stale        the old text is no longer there exactly once: mend the list

The exit code is 1 if any mutant survived or is stale, else 0. Results lie in the temporary folder, under a hash of the
mutant and its file; one that survived is tried again as soon as test_all.py has changed.
"""
import argparse
import ast
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(tempfile.gettempdir(), "genevolve-mutants")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "runs", "out")
QUICK = "not slow and not mutants"
TIME_LIMIT = {"named": 900, "quick": 3600}  # seconds

# every run is a process forked from one that has imported what takes long, and nothing of the project
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["numpy", "pytest", "requests", "safetensors.torch", "tokenizers", "torch"])


class Mutant(NamedTuple):
    file: str
    claim: str            # what breaks
    tests: str            # an expression for pytest -k, of the tests that should notice
    old: str              # stands in the file once
    new: str
    equivalent: str = ""  # why no test can


MUTANTS = [
    # -- model.py
    Mutant("model.py", "wavelengths", "turns_each_pair",
           "rope_theta ** -exponents",
           "rope_theta ** exponents"),
    Mutant("model.py", "rotation", "turns_each_pair",
           "sin = torch.cat((-sin, sin), -1)",
           "sin = torch.cat((sin, -sin), -1)"),
    Mutant("model.py", "causality", "packed_log_probs or conversations_in",
           ".tril(L - t)",
           ".tril(L - t - 1)"),
    Mutant("model.py", "initialisation", "fan_in",
           "std=(parameter.shape[1] * depth) ** -0.5",
           "std=parameter.shape[1] ** -0.5"),
    Mutant("model.py", "mask", "only_what_an_assistant or tokens_mask",
           'written = [role == "assistant"] * len(body)',
           "written = [True] * len(body)"),
    Mutant("model.py", "observation", "rollout_has_the_ids",
           "end = [] if closed else",
           "end = [] if not closed else"),
    Mutant("model.py", "entropy", "chunked_log_probs",
           "lse[a:b] - weighted / total",
           "lse[a:b] + weighted / total"),
    Mutant("model.py", "temperature", "chunked_log_probs",
           "g = g.div_(temperature).to(dtype)",
           "g = g.to(dtype)"),
    Mutant("model.py", "shift", "packed_log_probs or masked_log_probs",
           "row = torch.cat([r[:-1] for r in rows])",
           "row = torch.cat([r[1:] for r in rows])"),
    Mutant("model.py", "nucleus", "samples_follow",
           "accepted = (likelier < limit[rows])",
           "accepted = (likelier + weight < limit[rows])"),
    Mutant("model.py", "temperature", "samples_follow or engine_log_probs",
           "torch.where(greedy, 1.0, temperature)[",
           "torch.where(greedy, 1.0, 1 / temperature)["),
    Mutant("model.py", "randomness", "samples_follow",
           "positions[rows] * ROUNDS + attempt",
           "positions[rows] * ROUNDS"),
    Mutant("model.py", "embedding", "last_state",
           "last = torch.stack([r[-1] for r in rows])",
           "last = torch.stack([r[0] for r in rows])"),
    Mutant("model.py", "bags", "last_state",
           "means.append(words.float().mean(0))",
           "means.append(words.float().sum(0))"),
    Mutant("model.py", "adapters", "alpha_over_rank",
           "add_adapter(linear, key, rows, rank, alpha / rank)",
           "add_adapter(linear, key, rows, rank, rank / alpha)"),
    Mutant("model.py", "merging", "merging_switching",
           "scaled = linear.lora_scale * linear.lora_B[key]",
           "scaled = linear.lora_B[key]"),
    Mutant("model.py", "fsync", "gets_its_name",
           "        os.fsync(descriptor)\n",
           "        pass\n"),
    Mutant("model.py", "rename", "writer_that_fails",
           "write(temporary)\n        os.replace(temporary, path)",
           "write(path)"),
    Mutant("model.py", "newest", "newest_checkpoints_stay",
           "for name in checkpoint_names(folder)[:-keep]:",
           "for name in checkpoint_names(folder)[keep:]:"),
    Mutant("model.py", "averages", "resumed_run or ema",
           'p.copy_(tensor_like(p, f"{keyword}.{name}"))',
           "pass"),
    Mutant("model.py", "swap", "one_of_the_two_is_always",
           "    if os.path.exists(path):\n        os.rename(path, old)\n    os.rename(source, path)",
           "    shutil.rmtree(path, ignore_errors=True)\n    os.rename(source, path)"),

    # -- diffusion.py
    Mutant("diffusion.py", "latents", "latents_are_normalised",
           "return (mean - self.mean) / self.std",
           "return mean"),
    Mutant("diffusion.py", "latents", "latents_are_normalised",
           "self.decode(latents * self.std + self.mean)",
           "self.decode(latents * self.std)"),
    Mutant("diffusion.py", "statistics", "measured_latents",
           "vae.std.copy_(means.std((0, 1, 2)))",
           "vae.std.copy_(means.var((0, 1, 2)))"),
    Mutant("diffusion.py", "kl", "half_l1",
           "variance - 1 - log_variance",
           "variance - 1 + log_variance"),
    Mutant("diffusion.py", "kl", "half_l1",
           "return reconstruction + kl_weight * kl,",
           "return reconstruction - kl_weight * kl,"),
    Mutant("diffusion.py", "psnr", "half_l1",
           "10 * torch.log10(4 / ",
           "10 * torch.log10(1 / "),
    Mutant("diffusion.py", "flow", "noised_ends",
           "return (1 - t) * x0 + t * noise",
           "return t * x0 + (1 - t) * noise"),
    Mutant("diffusion.py", "shift", "linger_at_noise",
           "def schedule(steps, shift=3.0)",
           "def schedule(steps, shift=1.0)"),
    Mutant("diffusion.py", "ancestral", "ancestral_sampling",
           "((1 - churn**2)**0.5 * e + churn * noise_fn())",
           "((1 - churn**2)**0.5 * e)"),
    Mutant("diffusion.py", "guidance", "guidance_1_is",
           "x0 = x0_uncond + guidance * (x0_cond - x0_uncond)",
           "x0 = x0_cond + guidance * (x0_cond - x0_uncond)"),
    Mutant("diffusion.py", "weight", "weighs_a_step",
           "flow = (x0_error / t.clamp(min=0.25)).mean()",
           "flow = (x0_error * t.clamp(min=0.25)).mean()"),
    Mutant("diffusion.py", "classes", "weighs_a_step",
           "return flow + s.class_weight * class_loss,",
           "return flow - s.class_weight * class_loss,"),
    Mutant("diffusion.py", "shift", "noise_levels_are",
           "shifted = s.shift * uniform / (1 + (s.shift - 1) * uniform)",
           "shifted = uniform"),
    Mutant("diffusion.py", "ema", "averaged_weights",
           "averaged.lerp_(p, 1 - keep)",
           "averaged.lerp_(p, keep)"),
    Mutant("diffusion.py", "ema", "averaged_weights",
           "keep = min(s.ema,",
           "keep = max(s.ema,"),
    Mutant("diffusion.py", "rate", "rises_stays",
           "max(0.0, 1 - step / s.steps) / s.decay",
           "max(0.0, step / s.steps) / s.decay"),
    Mutant("diffusion.py", "cosine", "rate_of_the_vae",
           "cosine = 0.5 * (1 + math.cos(",
           "cosine = 0.5 * (1 - math.cos("),
    Mutant("diffusion.py", "dropout", "conditions_are_dropped",
           "drop_text = (text_dice < s.drop_text)",
           "drop_text = (text_dice > s.drop_text)"),
    Mutant("diffusion.py", "muon", "muon_goes",
           "alpha=-rate)",
           "alpha=rate)"),
    Mutant("diffusion.py", "ordinals", "ordinal_to_the_end",
           'if word == ".":',
           'if word == ",":'),

    # -- tools.py
    Mutant("tools.py", "prefix", "corpus_ends",
           '.startswith(os.path.join(self.root, ""))',
           ".startswith(self.root)"),
    Mutant("tools.py", "second-check", "corpus_ends",
           "or not self.root or not self.belongs(full)",
           "or not self.root"),
    Mutant("tools.py", "bm25", "bm25_equals",
           "math.log(1 + (len(self.lengths) - n + 0.5)",
           "math.log(1 + (len(self.lengths) + n + 0.5)"),
    Mutant("tools.py", "ties", "ties_keep",
           "(-round(scores[number], 9), number)",
           "(-round(scores[number], 9), -number)"),
    Mutant("tools.py", "snippets", "snippet or corpus",
           "start = gains.index(max(gains))",
           "start = gains.index(min(gains))"),
    Mutant("tools.py", "program", "every_rule",
           'if not any(tool == "image_search" for tool, _ in queries):',
           "if not queries:"),
    Mutant("tools.py", "program", "every_rule",
           "if img_ids != sorted(set(img_ids)):",
           "if img_ids != sorted(img_ids):"),

    # -- distill.py
    Mutant("distill.py", "kscore", "kscore_weights",
           "0.1 * faithfulness + 0.4 * visual_correctness",
           "0.4 * faithfulness + 0.1 * visual_correctness"),
    Mutant("distill.py", "alpha", "by_alpha",
           "return (1 - alpha) * image + alpha * text",
           "return alpha * image + (1 - alpha) * text"),
    Mutant("distill.py", "sft", "cold_start_minimises",
           "return -model.weighted_logprobs(",
           "return model.weighted_logprobs("),
    Mutant("distill.py", "copying", "perfect_copyist",
           "F.cross_entropy(logits.flatten(0, 1), segment[:, 1:].flatten())",
           "F.cross_entropy(logits.flatten(0, 1), segment[:, :-1].flatten())"),
    Mutant("distill.py", "cosine", "rate_of_the_cold_start",
           "0.45 * (1 + math.cos(",
           "0.45 * (1 - math.cos("),
    Mutant("distill.py", "advantages", "after_one_update or advantages",
           "alive, centred / (deviation + eps)",
           "alive, -centred / (deviation + eps)"),
    Mutant("distill.py", "dead-rows", "dead_rows",
           "return mask & (advantages != 0)[:, None]",
           "return mask"),
    Mutant("distill.py", "dead-rows", "losses_written_out",
           "for size, row in zip(sizes, rows) if row.advantage)",
           "for size, row in zip(sizes, rows))"),
    Mutant("distill.py", "grpo", "after_one_update or on_policy",
           "loss = -aggregate(gain, policy_mask",
           "loss = aggregate(gain, policy_mask"),
    Mutant("distill.py", "clip", "the_clip_stops",
           "gain = torch.minimum(",
           "gain = torch.maximum("),
    Mutant("distill.py", "k3", "k3_is_zero or reference_term",
           "return torch.expm1(-l) + l",
           "return torch.expm1(l) - l"),
    Mutant("distill.py", "pairs", "pairs_keep or no_worst",
           "worst = min(candidates, key=lambda t: t.reward)",
           "worst = candidates[-1]"),
    Mutant("distill.py", "newest", "newest_answers",
           "(entry.best, entry.step)",
           "(entry.best, -entry.step)"),
    Mutant("distill.py", "eviction", "capacity_holds",
           "priorities.index(min(priorities))",
           "priorities.index(max(priorities))"),
    Mutant("distill.py", "audit", "an_audit_is",
           "effect = with_guide - without",
           "effect = without - with_guide"),
    Mutant("distill.py", "audit", "an_audit_is",
           "entry.placebo_sum += placebo - without",
           "entry.placebo_sum += placebo - with_guide"),
    Mutant("distill.py", "retiring", "lessons_that_disagree",
           "return count >= uses and mean + error < 0",
           "return count >= uses and mean + error > 0"),
    Mutant("distill.py", "retiring", "advice_that_disagrees",
           "evidence[bullet].uses.extend(entry.uses)",
           "evidence[bullet].uses = list(entry.uses)"),
    Mutant("distill.py", "guide", "guide_stands",
           "content[:start] + bundle.markdown() + content[start:]",
           "bundle.markdown() + content[start:]"),
    Mutant("distill.py", "teacher", "exactly_the_guide",
           "list(teacher_prompt) + list(tokens[prompt_length:])",
           "list(teacher_prompt) + list(tokens[prompt_length + 1:])"),
    Mutant("distill.py", "ema", "ema_teacher",
           "student.parameters(), strict=True):\n"
           "        average_weight.lerp_(weight.to(average_weight.dtype), 1 - decay)",
           "student.parameters(), strict=True):\n        average_weight.lerp_(weight.to(average_weight.dtype), decay)"),
    Mutant("distill.py", "fading", "fades_once",
           "max(0.0, 1 - step / self.anneal)",
           "min(1.0, step / self.anneal)"),
    Mutant("distill.py", "fading-twice", "fades_once",
           "weight=self.weight * self.fade(step))",
           "weight=self.weight * self.fade(step) ** 2)"),
    Mutant("distill.py", "direction", "explicit_sum",
           'log_a, log_b = (logq, logp) if direction == "forward"',
           'log_a, log_b = (logp, logq) if direction == "forward"'),
    Mutant("distill.py", "temperature", "losses_written_out",
           "score_rows(net, rows, temperature, with_logits=recipe.reads_logits and bool(guided))",
           "score_rows(net, rows, 1.0, with_logits=recipe.reads_logits and bool(guided))"),
    Mutant("distill.py", "temperature", "losses_written_out",
           "scores = score_rows(reference, batch.rows, temperature, with_logits=is_shared)",
           "scores = score_rows(reference, batch.rows, 1.0, with_logits=is_shared)"),
    Mutant("distill.py", "temperature", "losses_written_out",
           "guided = score_rows(teacher, rows, temperature, with_logits or recipe.reads_logits, guided=True)",
           "guided = score_rows(teacher, rows, 1.0, with_logits or recipe.reads_logits, guided=True)"),
    Mutant("distill.py", "guide", "losses_written_out or taught_token",
           "guided = score_rows(teacher, rows, temperature, with_logits or recipe.reads_logits, guided=True)",
           "guided = score_rows(teacher, rows, temperature, with_logits or recipe.reads_logits)"),
    Mutant("distill.py", "shuffled", "shuffled_bundles or what_a_controls",
           "if other.guidance != bundle.guidance]",
           "if other.guidance == bundle.guidance]"),
    Mutant("distill.py", "threshold", "stable_recipe",
           "return mask & (score >= recipe.threshold)",
           "return mask & (score < recipe.threshold)"),

    # -- genevolve.py
    Mutant("genevolve.py", "experience", "taught_token or grpos_plus",
           "policy_grad.add_(sdl_grad, alpha=weight)",
           "policy_grad.add_(sdl_grad, alpha=-weight)"),
    Mutant("genevolve.py", "gaps", "widest_gaps",
           "pairs.sort(key=lambda pair: pair[2].reward - pair[1].reward)",
           "pairs.sort(key=lambda pair: pair[1].reward - pair[2].reward)"),
    Mutant("distill.py", "request", "exactly_the_guide",
           "trajectory.messages[:2], guide)",
           "trajectory.messages[:1], guide)"),
    Mutant("genevolve.py", "rollback", "a_rollback_loads",
           "run.optimizer, **averages(run))\n    run.lr_scale /= 2",
           "run.optimizer, **averages(run)) if False else None\n    run.lr_scale /= 2"),
    Mutant("genevolve.py", "halving", "a_rollback_loads",
           "run.lr_scale /= 2",
           "run.lr_scale *= 2"),
    Mutant("genevolve.py", "halving", "a_rollback_loads",
           'group["lr"] = run.settings.lr * run.lr_scale',
           'group["lr"] = run.settings.lr'),
    Mutant("genevolve.py", "seeds", "seeds_of_their_own",
           "seeds = [base + i for i in range(len(rows))]",
           "seeds = [base + i // K for i in range(len(rows))]"),
    Mutant("genevolve.py", "audit", "an_audit_is",
           "zip(audited, with_guide, without, with_placebo)",
           "zip(audited, without, with_guide, with_placebo)"),
    Mutant("genevolve.py", "placebo", "an_audit_is",
           "((1, lambda bundle: bundle), (2, placebo))",
           "((1, lambda bundle: bundle), (2, lambda bundle: bundle))"),
    Mutant("genevolve.py", "temperature", "old_log_probs",
           "scores = distill.score_rows(net, local, temperature)",
           "scores = distill.score_rows(net, local)"),
    Mutant("distill.py", "error", "error_of_a_sample",
           "math.sqrt(variance / len(kept))",
           "math.sqrt(variance)"),
    Mutant("genevolve.py", "keys", "less_the_mean",
           "F.normalize(self.bags(texts) - self.mean, dim=-1)",
           "F.normalize(self.bags(texts), dim=-1)"),
    Mutant("genevolve.py", "format", "three_places",
           'math.isnan(value) else f"{value:.3f}"',
           'math.isnan(value) else f"{value:.2f}"'),
    Mutant("genevolve.py", "promotion", "promotion_compares",
           "change >= (0 if math.isnan(error) else -error)",
           "change >= (0 if math.isnan(error) else error)"),
    Mutant("genevolve.py", "promotion", "promotion_compares",
           "[after - first for after, first in zip(rewards, before)]",
           "[first - after for after, first in zip(rewards, before)]"),
    Mutant("genevolve.py", "room", "ends_where_its_context",
           "(self.policy.compact or not text)",
           "self.policy.compact"),
    Mutant("genevolve.py", "foreign guide", "not_from_the_memory",
           "if not rows or entry is None:",
           "if not rows:"),
    Mutant("genevolve.py", "announced audits", "announced_calls",
           "trajectories += audits * 2 * s.rollouts * s.prompts_per_step",
           "trajectories += audits * s.rollouts * s.prompts_per_step"),
    Mutant("bench.py", "suite's policy", "begins_a_suite_anew",
           "for path in (settings.suite, settings.policy, settings.renderer) if path]",
           "for path in (settings.suite, settings.renderer) if path]"),
    Mutant("genevolve.py", "log-first", "log_opens_after",
           "        model.save_checkpoint(folder, self.steps_done, tensors, state, self.processes)\n"
           "        if self.processes.is_main:\n"
           '            log = os.path.join(self.settings.out, "log.jsonl")\n'
           '            with open(log, "a", encoding="utf-8") as file:\n'
           '                file.write(json.dumps(row) + "\\n")\n',
           "        if self.processes.is_main:\n"
           '            log = os.path.join(self.settings.out, "log.jsonl")\n'
           '            with open(log, "a", encoding="utf-8") as file:\n'
           '                file.write(json.dumps(row) + "\\n")\n'
           "        model.save_checkpoint(folder, self.steps_done, tensors, state, self.processes)\n"),

    # -- bench.py
    Mutant("bench.py", "seeds", "interval_resamples",
           "change[seed_draw][:, prompt_draw]",
           "change[:, prompt_draw]"),
    Mutant("bench.py", "quantiles", "interval_resamples",
           "(0.025, 0.975)",
           "(0.16, 0.84)"),
    Mutant("bench.py", "t quantile", "students_t",
           "-(freedom + 1) / 2)",
           "-(freedom + 2) / 2)"),
    Mutant("bench.py", "t interval", "over_seeds_is_students",
           "np.std(changes, ddof=1)",
           "np.std(changes)"),
    Mutant("bench.py", "degrees of freedom", "over_seeds_is_students",
           "t_quantile(seeds - 1)",
           "t_quantile(seeds)"),
    Mutant("bench.py", "one-sided", "share_of_sign_patterns",
           "np.mean(np.abs(sums) >= measured)",
           "np.mean(sums >= measured)"),
    Mutant("bench.py", "caught", "violation_counts",
           "scores[DIMENSION[skill]] < 1)",
           "scores[DIMENSION[skill]] <= 1)"),
    Mutant("bench.py", "novel", "columns_of_a_table",
           'for row in rows if row["novel"]]',
           'for row in rows if not row["novel"]]'),
    Mutant("bench.py", "novel apart", "paired_by_seed",
           "(scores[0] - scores[1])[:, ~novel].mean(1)",
           "(scores[0] - scores[1]).mean(1)"),
    Mutant("bench.py", "seconds", "paired_by_seed",
           'sum(a["seconds"][:after]) / sum(b["seconds"][:updates])',
           'sum(b["seconds"][:updates]) / sum(a["seconds"][:after])'),
    Mutant("bench.py", "speed", "speed_ratio",
           "[theirs / own for own, theirs in pairs]",
           "[own / theirs for own, theirs in pairs]"),
    Mutant("bench.py", "match_ratio", "matched_ratio",
           "return ratio * policy_norm / sdl_norm",
           "return ratio * sdl_norm / policy_norm"),
    Mutant("bench.py", "imitation", "imitation_is",
           "loss = -distill.aggregate(",
           "loss = distill.aggregate("),
    Mutant("bench.py", "placebo", "what_a_controls",
           "[distill.placebo(guide, self.count_tokens) if guide else None for guide in guides]",
           "guides"),
    Mutant("bench.py", "fading", "ratio_of_a_fading",
           'ratios.append(row["gradient_ratio"] / fade)',
           'ratios.append(row["gradient_ratio"] * fade)'),
    Mutant("bench.py", "format", "three_places",
           'f"{change:+.3f} ({low:+.3f} to {high:+.3f})"',
           'f"{change:.3f} ({low:.3f} to {high:.3f})"'),
    Mutant("bench.py", "copied", "copied_only",
           "return written == {fact} and spelled <=",
           "return written <= {fact} and spelled <=",
           equivalent="no program without a written text gets here: written is not empty, so a subset of one fact "
                      "is that fact"),

    # -- atlas/judge.py
    Mutant("atlas/judge.py", "identity", "repainted_blocks",
           "IDENTITY = 0.8 ",
           "IDENTITY = 0.6 "),
    Mutant("atlas/judge.py", "sides", "thing_turned_around or full_marks",
           'actual = "left" if x < other_x else "right"',
           'actual = "left" if x > other_x else "right"'),
    Mutant("atlas/judge.py", "shadow", "two_shadows",
           "brightness[OPPOSITE[light]] < self.SHADOW <= brightness[light]",
           "brightness[OPPOSITE[light]] < self.SHADOW"),
    Mutant("atlas/judge.py", "palette", "thing_turned_around",
           'warmth > self.WARMTH if mood == "warm" else warmth < -self.WARMTH',
           "abs(warmth) > self.WARMTH"),
    Mutant("atlas/judge.py", "gradient", "thing_turned_around",
           "fall > self.FALL",
           "abs(fall) > self.FALL"),
    Mutant("atlas/judge.py", "style", "thing_turned_around or planted",
           "passed = shares[style] >= self.STYLE_SHARE and others",
           "passed = others"),
    Mutant("atlas/judge.py", "unread", "program",
           'if form == "exact" and skill in skills_used}',
           'if form == "exact"}'),

    # -- atlas/world.py
    Mutant("atlas/world.py", "advice", "right_advice",
           "in right.get(field, [])",
           "not in right.get(field, [])"),
    Mutant("atlas/world.py", "default", "default_one",
           "return max(two_hops,",
           "return min(two_hops,"),

    # -- atlas/build.py
    Mutant("atlas/build.py", "sides", "captions_of_a_pair",
           'return ("first", "second") if scene.side == "left" else ("second", "first")',
           'return ("second", "first") if scene.side == "left" else ("first", "second")'),
    Mutant("atlas/build.py", "sides", "captions_of_a_pair",
           "half = scene.side if scene.only == 0 else OPPOSITE[scene.side]",
           "half = scene.side if scene.only else OPPOSITE[scene.side]"),
    Mutant("atlas/build.py", "shadow", "falls_away",
           'left = column + (1 if away == "right" else -1)',
           'left = column + (1 if away == "left" else -1)'),
    Mutant("atlas/build.py", "looseness", "plain_caption",
           "    if rng.random() < 0.1:\n        return\n",
           "    if rng.random() < 0.9:\n        return\n"),
    Mutant("atlas/build.py", "looseness", "plain_caption",
           "if rng.random() < 0.65 or (aspect",
           "if rng.random() < 0.35 or (aspect"),
    Mutant("atlas/build.py", "guided", "nearly_half",
           "if rng.random() >= 0.45:",
           "if rng.random() >= 0.0:"),
    Mutant("atlas/build.py", "audit", "audit_drops",
           "if guide is None and sum(audit.values()) < 3",
           "if guide is None and sum(audit.values()) > 3"),
    Mutant("atlas/build.py", "look", "scripted_teacher_passes",
           '["title"].endswith(look)',
           '["title"].startswith(look)'),
    Mutant("atlas/build.py", "expert", "scripted_teacher",
           "options = (expert,) if self.rng.random() < self.expert_rate else lazy",
           "options = lazy if self.rng.random() < self.expert_rate else (expert,)"),
    Mutant("atlas/build.py", "wording", "teachers_program",
           "exact = SKILL[aspect] in followed",
           "exact = SKILL[aspect] not in followed"),
    Mutant("atlas/build.py", "probes", "a_probe",
           "exact=set(aspects) - {aspect}) for aspect",
           "exact=set(aspects)) for aspect"),
]


# ---- Running them ----------------------------------------------------------------------------------------------------

def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:24]


def mutated(mutant, root=ROOT):
    """The file's text with the mutant in it, or None if it is stale."""
    text = read(os.path.join(root, mutant.file))
    if text.count(mutant.old) != 1:
        return None
    changed = text.replace(mutant.old, mutant.new)
    ast.parse(changed)  # a mutant that is no Python would be killed by anything
    return changed


def pytest_in(tree, output, arguments):
    """What a process of its own does: pytest in a copy of the tree, its output in a file. Ends with pytest's code."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(tree)
    sys.stdout = sys.stderr = open(output, "w", encoding="utf-8")
    sys.dont_write_bytecode = False  # the tests' rewritten asserts are compiled once a copy
    import pytest
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", "test_all.py", *arguments])))


def run_tests(tree, limit, *arguments):
    """(pytest's exit code, or None for the time limit; the first test that failed) in a copy of the tree."""
    output = os.path.join(tree, "pytest.txt")
    process = PROCESSES.Process(target=pytest_in, args=(tree, output, arguments))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, "the time limit"
    failed = [line.split()[1] for line in read(output).splitlines() if line.startswith(("FAILED", "ERROR"))]
    return process.exitcode, failed[0].partition("::")[2] if failed else ""


def is_killed(code):
    """Whether an exit code says that a test failed: 0 is none, 5 that the expression names no test."""
    if code in (2, 3, 4):
        raise RuntimeError(f"pytest ended with {code}: the tests could not be run")
    return code not in (0, 5)


def attempt(mutant, tree, named_only):
    """{"verdict", "by"} of one mutant in a copy of the tree, which is left as it was."""
    path = os.path.join(tree, mutant.file)
    original = read(path)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(mutated(mutant))
        code, by = run_tests(tree, TIME_LIMIT["named"], "-k", mutant.tests)
        if not is_killed(code) and not named_only:
            code, by = run_tests(tree, TIME_LIMIT["quick"], "-m", QUICK)
    finally:
        with open(path, "w", encoding="utf-8") as file:
            file.write(original)
    return {"verdict": "killed" if is_killed(code) else "survived", "by": by}


def result_of(mutant, trees, named_only):
    """The verdict on one mutant, from the last time if neither its file nor, for a survivor, the tests have changed."""
    if mutated(mutant) is None:
        return {"verdict": "stale", "by": ""}
    if mutant.equivalent:
        return {"verdict": "equivalent", "by": mutant.equivalent}

    kept = os.path.join(CACHE, digest(read(os.path.join(ROOT, mutant.file)), mutant.old, mutant.new) + ".json")
    tests = digest(read(os.path.join(ROOT, "test_all.py")), str(named_only))
    if os.path.exists(kept):
        result = json.loads(read(kept))
        if result["verdict"] == "killed" or result["tests"] == tests:
            return result

    result = attempt(mutant, trees(), named_only) | {"tests": tests}
    with open(kept, "w", encoding="utf-8") as file:
        json.dump(result, file)
    return result


def copies(folder):
    """A function: the copy of the tree that belongs to the calling thread."""
    local = threading.local()

    def tree():
        if not hasattr(local, "path"):
            local.path = os.path.join(folder, f"tree-{threading.get_ident()}")
            shutil.copytree(ROOT, local.path, ignore=LEFT_OUT)
        return local.path
    return tree


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file, claim or texts contain this")
    parser.add_argument("--named", action="store_true", help="the named tests alone")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    arguments = parser.parse_args()

    chosen = [mutant for mutant in MUTANTS if arguments.only in "\n".join(mutant)]
    os.makedirs(CACHE, exist_ok=True)
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        work = functools.partial(result_of, trees=copies(folder), named_only=arguments.named)
        for mutant, result in zip(chosen, pool.map(work, chosen)):
            verdicts.setdefault(result["verdict"], []).append(mutant)
            print(f"{result['verdict']:10} {mutant.file:16} {mutant.claim:28} {result['by']}", flush=True)

    for mutant in verdicts.get("survived", []) + verdicts.get("stale", []):
        print(f"\n{mutant.file}: {mutant.claim}\n- {mutant.old}\n+ {mutant.new}")
    counts = {name: len(verdicts.get(name, [])) for name in ("killed", "survived", "equivalent", "stale")}
    print(f"\n{len(chosen)} tried: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    sys.exit(bool(counts["survived"] or counts["stale"]))


if __name__ == "__main__":
    main()
