"""GenEvolve-Bench: what the embedded world is worth, how good the agent is, and how fast the code runs.

    python bench.py world       the Atlas itself: judge, renderer, skills, oracle, cold-started policy
    python bench.py quality     ablations of the training, with intervals
    python bench.py speed       side by side with peers (pip install -r requirements-peers.txt)
    python bench.py released    the authors' own agent, renderer script and evaluator, unchanged, against serve

Every command prints a table and writes the same numbers as JSON under --out. KScore is the paper's, with the text term
dropped and the rest renormalised where no text is wanted, unless a table says otherwise. What is measured on bench
requests is never used for training or for choosing a setting.
"""
import copy
import ctypes
import dataclasses
import gc
import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

import atlas.judge
import atlas.world
import diffusion
import distill
import genevolve
import model
import tools
from atlas import build
from distill import average as mean
from genevolve import HERE, Common, flag


@dataclass
class Bench(Common):
    """Flags of every benchmark."""
    out: str = flag(os.path.join(HERE, "results"), "folder for the JSON of the results")
    quick: bool = flag(False, "a smoke run on a few rows")
    policy: str = flag(os.path.join(HERE, "weights", "sft"), "policy folder that is measured")
    steps: int = flag(20, "sampling steps of the renderer")
    guidance: float = flag(1.0, "classifier-free guidance of the renderer")


DIMENSION = {"spatial_layout": "visual_correctness", "quantity_counting": "visual_correctness",
             "anatomy_body_coherence": "visual_correctness", "physical_material_consistency": "visual_correctness",
             "attribute_binding": "visual_correctness", "text_rendering": "text_accuracy",
             "creative_drawing": "faithfulness", "aesthetic_drawing": "aesthetics"}


class Suite:
    """Bench rows with their oracle programs, a renderer and the pixel judge; pictures are made in batches."""

    def __init__(self, settings, split="bench"):
        self.rows = atlas.world.requests(split)[:24 if settings.quick else None]
        oracle = atlas.world.oracle()
        self.oracle = [oracle[row["id"]] for row in self.rows]
        weights = os.path.join(HERE, "weights")
        self.renderer = diffusion.Renderer.load(os.path.join(weights, "renderer"), os.path.join(weights, "vae"))
        self.judge = atlas.judge.PixelJudge(atlas.world.vocabulary())
        self.steps, self.guidance = settings.steps, settings.guidance

    def references(self, number):
        """The right reference pictures of a row."""
        return [tools.read_image(os.path.join(HERE, "atlas", path)) for path in self.oracle[number]["references"]]

    def paint(self, jobs, steps=None):
        """jobs: [(row number, prompt, reference pictures)] -> pictures."""
        seeds = [genevolve.image_seed(self.rows[n]) for n, _, _ in jobs]
        return self.renderer.render([p for _, p, _ in jobs], [r for _, _, r in jobs], seeds, steps=steps or self.steps,
                                    guidance=self.guidance)

    def score(self, jobs, steps=None):
        """The pictures' judgements, in order."""
        images = self.paint(jobs, steps)
        return [self.judge(image, genevolve.truth_of(self.rows[n]), self.rows[n]["recipe"]["wanted"])
                for image, (n, _, _) in zip(images, jobs)]


def means(scores):
    """KScore and its four parts."""
    return {k: mean([s[k] for s in scores]) for k in ("kscore",) + distill.DIMENSIONS}


def print_row(label, values):
    print(f"{label:<44} " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                                      for k, v in values.items()),
          flush=True)


# ---- world: is the Atlas what it claims to be? -----------------------------------------------------------------------

def planted_violations(judge, count):
    """Fresh scenes drawn with one requirement violated: {skill: [whether the judge lowered the skill's dimension]}."""
    rng, caught = random.Random("planted"), {skill: [] for skill in DIMENSION}
    entities, _ = build.make_entities("planted", build.split_words(0)["demos"], 4, 99)
    for number in range(count):
        row = build.make_request(rng, entities, 1 + number % 3, number, "planted", True)
        truth, _, boxes = build.draw(row["_scene"], rng)
        wanted = build.constraints(row, boxes)
        for aspect in row["_scene"].aspects():
            scene, skill = dataclasses.replace(row["_scene"], fault={}), build.SKILL[aspect]
            while not scene.fault:
                build.corrupt(rng, scene, aspect)
            caught[skill].append(judge(build.draw(scene, rng)[0], truth, wanted)[DIMENSION[skill]] < 1)
    return caught


def judge_figures(suite, settings):
    """The judge on ground truth, and on fresh scenes with one planted violation."""
    truth = [suite.judge(genevolve.truth_of(r), genevolve.truth_of(r), r["recipe"]["wanted"]) for r in suite.rows]
    caught = planted_violations(suite.judge, 100 if len(suite.rows) < 100 else 400)
    return {"ground truth": means(truth),
            "planted violation lowers its dimension": {k: mean([float(c) for c in v]) for k, v in caught.items()}}


def jpeg_figures(suite, settings):
    """Share of rendered pictures whose KScore survives JPEG at quality 100."""
    try:
        from PIL import Image
    except ImportError:
        return {"KScore unchanged by JPEG at quality 100": {"needs": "pip install pillow"}}
    jobs = [(n, r["question"] if n % 2 else suite.oracle[n]["gen_prompt"], suite.references(n))
            for n, r in enumerate(suite.rows)]
    images, figures = suite.paint(jobs), {}
    for label, subsampling in (("full chroma", 0), ("chroma halved", 2)):
        same = []
        for image, (n, _, _) in zip(images, jobs):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "JPEG", quality=100, subsampling=subsampling)
            again, row = np.asarray(Image.open(data).convert("RGB")), suite.rows[n]
            first, second = (suite.judge(i, genevolve.truth_of(row), row["recipe"]["wanted"])["kscore"]
                             for i in (image, again))
            same.append(float(first == second))
        figures[label] = mean(same)
    return {"KScore unchanged by JPEG at quality 100": figures}


def run_figures(suite, settings):
    """The first command of the README, imports included, in a process of its own."""
    if not hasattr(os, "wait4"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, os.path.join(HERE, "genevolve.py"), "run", "--out", folder],
                                   stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        made = os.path.exists(os.path.join(folder, "image.png"))
    return {"genevolve.py run": {"seconds": seconds, "MB": usage.ru_maxrss / 1024, "exit code": status,
                                 "picture": made}}


def oracle_figures(suite, settings):
    """The oracle's programs at several step counts, and with a second seed."""
    jobs = [(n, o["gen_prompt"], suite.references(n)) for n, o in enumerate(suite.oracle)]
    figures = {f"oracle, {steps} steps": means(suite.score(jobs, steps)) for steps in (1, 4, 12, 20)}
    a, b = (suite.renderer.render([j[1] for j in jobs[:32]], [j[2] for j in jobs[:32]],
                                  [seed + n for n in range(len(jobs[:32]))], steps=suite.steps,
                                  guidance=suite.guidance) for seed in (1, 1001))
    apart = [np.abs(x.astype(float) - y).mean() for x, y in zip(a, b)]
    figures["two seeds, mean pixel difference"] = {"of 255": mean(apart)}
    return figures


def reference_figures(suite, settings):
    """Single held-out subjects: the right reference, none, and the early or present look taken for the other."""
    single = [n for n, r in enumerate(suite.rows) if len(r["recipe"]["wanted"]["subjects"]) == 1]
    prompt = {n: suite.oracle[n]["gen_prompt"].split(". ")[0].rstrip(".") + "." for n in single}
    other = {n: suite.references(m) for n, m in zip(single, single[1:] + single[:1])}
    look = lambda jobs: mean([float(all(c["passed"] for c in s["constraints"] if c["name"] == "subject look"))
                              for s in suite.score(jobs)])
    return {"single subject, its look is right": {
        "right reference": look([(n, prompt[n], suite.references(n)) for n in single]),
        "no reference": look([(n, prompt[n].replace(" as in the first reference image", ""), []) for n in single]),
        "wrong reference": look([(n, prompt[n], other[n]) for n in single])}}


def skill_figures(suite, settings):
    """Each skill's wording against plain wording of the same request, everything else exact, over the requests of all
    splits: the renderer has seen none of them, and the bench alone has only ten with a body."""
    figures, suites = {}, [suite] + ([] if settings.quick else [Suite(settings, s) for s in ("evolve", "validation")])
    whole = [s.score([(n, o["gen_prompt"], s.references(n)) for n, o in enumerate(s.oracle)]) for s in suites]
    for skill, dimension in DIMENSION.items():
        exact, plain = [], []
        for s, scores in zip(suites, whole):
            rows = [n for n, o in enumerate(s.oracle) if skill in o["probes"]]
            exact += [scores[n] for n in rows]
            plain += s.score([(n, s.oracle[n]["probes"][skill], s.references(n)) for n in rows])
        told, loose = means(exact), means(plain)
        figures[f"{skill}, exact minus plain"] = {
            "KScore": told["kscore"] - loose["kscore"], dimension: told[dimension] - loose[dimension],
            "rows": len(plain)}
    return figures


def on_bench(policy, settings, rows, guides=None):
    """One attempt at every request with a policy folder, the same seeds each time: a ``bench_row`` each."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = genevolve.Run(policy=policy, out=folder, sampling_steps=settings.steps, guidance=settings.guidance,
                               device=settings.device)
        with genevolve.Components(chosen, folder) as parts:
            attempts = parts.agent().run(rows, [7919 * n for n in range(len(rows))], guides)
            parts.scorer.render_and_score(attempts)
    return [bench_row(row, t.judgement, t.program is not None, sum(s.kind == "tool_call" for s in t.steps), t.reward)
            | {"copied": copied(row, t)} for t, row in zip(attempts, rows)]


def copied(row, trajectory):
    """Whether a year or code word that an article told stands in the program letter by letter, spelling included. None:
    there was none to find, it was not found, or the program leaves it open."""
    wanted, program = row["recipe"]["wanted"], trajectory.program
    text = wanted["text"] if wanted["fact"] not in ("", "number") else ""
    if not text or program is None or not any(text in s.observation for s in trajectory.steps):
        return None
    written = re.findall(r'(?:text "|saying )(\w*)', program.gen_prompt)
    spelled = re.findall(r"spelled ([\w-]*)", program.gen_prompt)
    return set(written) == {text} and set(spelled) <= {"-".join(text)} if written else None


def bench_row(row, scores, valid, calls, reward=None):
    return {"id": row["id"], "novel": row["novel"], "eval_type": row["eval_type"], "valid": valid, "tool_calls": calls,
            "reward": reward, **{k: scores[k] for k in ("kscore",) + distill.DIMENSIONS}}


def policy_figures(suite, settings):
    """Raw requests, the fixed workflow's floor; the cold-started policy without and with a perfect guide."""
    raw = suite.score([(n, r["question"], []) for n, r in enumerate(suite.rows)])
    figures = {"raw request to the renderer": means(raw)}
    guides = [distill.Bundle.from_bullets(r["question"], o["guide"]) for r, o in zip(suite.rows, suite.oracle)]
    for label, given in (("policy", None), ("policy with a perfect guide", guides)):
        start = time.perf_counter()
        done = on_bench(settings.policy, settings, suite.rows, given)
        figures[label] = means(done) | {
            "reward": mean([r["reward"] for r in done]), "valid programs": mean([float(r["valid"]) for r in done]),
            "tool calls": mean([float(r["tool_calls"]) for r in done]),
            "facts copied right": mean([float(r["copied"]) for r in done if r["copied"] is not None]),
            "facts to copy": sum(r["copied"] is not None for r in done), "seconds": time.perf_counter() - start}
    return figures


def time_figures(suite, settings):
    """One picture at batch 1, and a batch of sixteen, 20 steps with guidance."""
    job = (suite.oracle[0]["gen_prompt"], suite.references(0))
    seconds = []
    for count in (1, 16):
        suite.renderer.render([job[0]] * count, [job[1]] * count, list(range(count)), steps=20, guidance=2.0)
        start = time.perf_counter()
        suite.renderer.render([job[0]] * count, [job[1]] * count, list(range(count)), steps=20, guidance=2.0)
        seconds.append(time.perf_counter() - start)
    return {"seconds, 20 steps with guidance": {"one picture": seconds[0], "sixteen": seconds[1]}}


def world(settings):
    """python bench.py world"""
    suite, results = Suite(settings), {}
    for part in (judge_figures, oracle_figures, reference_figures, skill_figures, jpeg_figures, time_figures,
                 run_figures, policy_figures):
        for label, values in part(suite, settings).items():
            results[label] = values
            print_row(label, values)
    model.make_folder(settings.out)
    model.write_json(os.path.join(settings.out, "world.json"), results)


# ---- quality: what each part of the training is worth ----------------------------------------------------------------

@dataclass
class Quality(Bench, genevolve.ComponentFlags):
    """Ablations of the training on the held-out bench, with intervals; resumes run by run. With --suite, one policy on
    the requests of any file."""
    policy: str = flag("", "policy folder that every arm starts from (default: weights/rare; for --suite weights/sft)")
    suite: str = flag("", "measure --policy on this file instead: released bench or RL rows, WISE's prompts, or "
                          "what the released evaluator wrote")
    runs: str = flag(os.path.join("runs", "quality"), "folder for the training runs")
    arms: str = flag("", "comma-separated arms, or sensitivity (default: all, in order)")
    seeds: int = flag(0, "training seeds of every arm (0: as many as the table of arms says)")
    train_steps: int = flag(60, "updates of a run")
    early_steps: int = flag(20, "updates after which every run is measured a first time, before it flattens out")
    tune_steps: int = flag(30, "updates of a tuning run; every tuned arm tries three settings (0: take the first)")
    memo: str = flag("", "file of judgements that the runs share (default: one in --runs)")


CHOICES = ("lr=2e-4", "lr=1e-4", "lr=4e-4")  # what arms without a second loss try
WEIGHED = ("lr=2e-4,weight=1", "lr=2e-4,weight=3", "lr=4e-4,weight=1")  # what stable tries: as many
LABELS = {"grpo": "SFT + GRPO, lr as tuned", "grpo-2e-4": "SFT + GRPO, lr 2e-4", "stable": "SFT + GRPO + SDL, stable",
          "memory-imitation": "SFT + GRPO + imitation of the memory's best",
          "paper": "SFT + GRPO + SDL, paper", "best-imitation": "SFT + imitation of the group's best",
          "sdl-alone": "SFT + SDL alone, stable",
          "shuffled": "stable, shuffled bundles", "placebo": "stable, placebo bundles",
          "sdl-shuffled": "SDL alone, shuffled bundles", "sdl-placebo": "SDL alone, placebo bundles"}
ARMS = {  # arm -> (flags of evolve, settings tried on validation requests, seeds)
    "grpo": ({"set": "weight=0"}, CHOICES, 2),
    # a tuning run favours a rate that is too high for twice as many updates; this one is the rate of the arms below
    "grpo-2e-4": ({"set": "weight=0"}, ("lr=2e-4",), 5),
    "stable": ({}, WEIGHED, 5),
    "memory-imitation": ({"imitate": "memory"}, tuple(f"lr=2e-4,weight={w}" for w in (0.1, 0.3, 1)), 5),
    # the gate belongs to the embedder: 0.5 lets about as many keys with names through as 0.6 does without names
    "paper": ({"recipe": "paper", "set": "gate=0.5"}, tuple(f"lr=2e-4,weight={w}" for w in (0.01, 0.1, 2)), 5),
    "best-imitation": ({"imitate": "best", "grpo": False}, CHOICES, 3),
    # Adam does not see the weight of a loss that is alone
    "sdl-alone": ({"grpo": False, "set": "anneal=0"}, CHOICES, 3),
    # the settings of the arm that a control is of, beside GRPO at its gradient-norm ratio
    "shuffled": ({"guides": "shuffled"}, (), 3),
    "placebo": ({"guides": "placebo"}, (), 3),
    "sdl-shuffled": ({"grpo": False, "set": "anneal=0", "guides": "shuffled"}, (), 3),
    "sdl-placebo": ({"grpo": False, "set": "anneal=0", "guides": "placebo"}, (), 3)}
CONTROLS = {"shuffled": "stable", "placebo": "stable", "sdl-shuffled": "sdl-alone", "sdl-placebo": "sdl-alone"}
SENSITIVITY = (  # stable with one thing changed (and what no longer goes with it), one seed each
    "selection=all,threshold=none", "standard=true", "weight=0.3", "weight=3", "threshold=none", "threshold=1",
    "score=entropy,threshold=none", "selection=sampled,threshold=none", "teacher=ema", "teacher=same",
    "estimator=reverse_kl", "estimator=k3_live", "gate=0.4", "gate=0.8", "rollouts=3,prompts_per_step=16",
    "rollouts=12,prompts_per_step=4", "entity_free=false,gate=0.5", "near_tie=0",
    "aggregation=seq-mean-token-sum,weight=0.007")
EVOLVE = {"lr": float, "match_ratio": float, "rollouts": int, "prompts_per_step": int}  # what a setting may say to it
TUNING_SEED = 1000
WINDOW = 20  # updates whose rollouts are compared together


def slug(text):
    return "-".join("".join(c if c.isalnum() or c in ".=" else " " for c in text.lower()).split())


def evolution(settings, arm, choice, seed, steps):
    """Train one run (or go on with it). Returns the finished genevolve.Evolution; one that an earlier command has taken
    further raises ValueError, for its policy is another one."""
    flags, changes, recipe = dict(ARMS[arm][0]), flags_of(choice), []
    for name, value in changes.items():  # a flag of evolve, or a field of the recipe
        if name in EVOLVE:
            flags[name] = EVOLVE[name](value)
        else:
            recipe.append(f"{name}={value}")
    flags["set"] = ",".join(filter(None, [flags.get("set", "")] + recipe))
    out = os.path.join(settings.runs, f"{arm}-{slug(choice)}-{seed}")
    memo = settings.memo or os.path.join(settings.runs, "memo.jsonl")
    run = genevolve.evolve(genevolve.Evolve(out=out, policy=settings.policy, steps=steps, seed=seed,
                                            eval_every=10, bf16=True, audit_every=0, memo=memo, device=settings.device,
                                            **flags))
    if run.steps_done > steps:
        raise ValueError(f"{out} is at update {run.steps_done} and {steps} were asked for; remove it or name another --runs")
    return run


def flags_of(choice):
    return dict(part.split("=") for part in filter(None, choice.split(",")))


def validation_curve(log):
    """[[rollouts, seconds, KScore, reward]] of a run's evaluations, seconds of evaluation not counted."""
    points, rollouts, seconds = [], 0, 0.0
    for row in log:
        rollouts += row["rollouts"]
        seconds += row["rollout_seconds"] + row["render_seconds"] + row["update_seconds"]
        if row.get("validation"):
            points.append([rollouts, round(seconds, 1), row["validation"]["kscore"], row["validation"]["reward"]])
    return points


def tuned(settings, arm, folder):
    """The arm's best setting on validation requests, all tried ones with what they reached."""
    if arm in CONTROLS:
        best = tuned(settings, CONTROLS[arm], folder)["best"]
        if not ARMS[arm][0].get("grpo", True):
            return {"best": best, "tried": {}}
        ratio = read(os.path.join(folder, f"{CONTROLS[arm]}-0.json"))
        if ratio is None:
            raise ValueError(f"{arm}: needs a finished run of 'stable', whose gradient-norm ratio it takes")
        return {"best": f"{best},match_ratio={ratio['unfaded_ratio']:.3g}", "tried": {}}
    path = os.path.join(folder, f"{arm}-tuning.json")
    if found := read(path):
        return found
    tried, choices = {}, ARMS[arm][1]
    for choice in choices if settings.tune_steps and len(choices) > 1 else ():
        run = evolution(settings, arm, choice, TUNING_SEED, settings.tune_steps)
        reached = [row["validation"]["kscore"] for row in run.log if row.get("validation")]
        tried[choice] = mean(reached[-2:])
    found = {"best": max(tried, key=tried.get) if tried else choices[0], "tried": tried}
    model.write_json(path, found)
    return found


def sensitivity(settings, folder):
    """sensitivity.json: what one change to ``stable`` does within a tuning run, beside stable and GRPO of that seed."""
    path = os.path.join(folder, "sensitivity.json")
    found = read(path) or {}
    for name in (BASE, "stable"):
        if run := read(os.path.join(folder, f"{name}-0.json")):
            found[name] = {"reward of rollouts": run["online"][:settings.tune_steps],
                           "validation": [p[2] for p in run["curve"] if p[0] <= 48 * settings.tune_steps]}
    best = flags_of(tuned(settings, "stable", folder)["best"])
    for change in SENSITIVITY:
        if change not in found:
            choice = ",".join(f"{k}={v}" for k, v in (best | flags_of(change)).items())
            log = (run := evolution(settings, "stable", choice, 0, settings.tune_steps)).log
            found[change] = {"reward of rollouts": [r["reward"] for r in log],
                             "validation": [p[2] for p in validation_curve(log)],
                             "hit rate": mean([r["hit_rate"] for r in log]),
                             "unfaded ratio": unfaded_ratio(run)}
            model.write_json(path, found)
    for name, row in found.items():
        windows = [row["reward of rollouts"][n:n + WINDOW] for n in range(0, settings.tune_steps, WINDOW)]
        print_row(name, {f"updates {n * WINDOW + 1} to {n * WINDOW + len(w)}": mean(w) for n, w in enumerate(windows)}
                  | {"validation KScore": row["validation"][-1]})


def unfaded_ratio(run):
    """Median ratio of the gradient norms, SDL's over GRPO's, as if the weight had not faded. (A mean is at the mercy of
    updates in which nearly every group is dead.)"""
    ratios = [(row["gradient_ratio"], run.recipe.fade(n)) for n, row in enumerate(run.log)]
    return median([ratio / fade for ratio, fade in ratios if ratio and fade])


def median(values):
    """Median of the values that are there (not None), or None."""
    kept = [v for v in values if v is not None]
    return float(np.median(kept)) if kept else None


def read(path):
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def fixed_rows(settings, folder, rows):
    """The rows that no training made: raw request, fixed workflow, SFT, oracle."""
    path = os.path.join(folder, "fixed.json")
    if found := read(path):
        return found
    suite = Suite(settings)
    corpus = tools.Corpus(os.path.join(HERE, "atlas", "corpus"))
    first = [[tools.read_image(os.path.join(HERE, "atlas", "corpus", hit.path))
              for hit in corpus.search_images(r["question"], 1)] for r in suite.rows]

    def judged(jobs, calls):
        return [bench_row(r, s, True, calls) for r, s in zip(suite.rows, suite.score(jobs))]
    found = {"raw request": judged([(n, r["question"], []) for n, r in enumerate(suite.rows)], 0),
             "fixed workflow": judged([(n, r["question"], first[n]) for n, r in enumerate(suite.rows)], 1),
             "SFT": on_bench(settings.policy, settings, rows),
             "oracle": judged([(n, o["gen_prompt"], suite.references(n)) for n, o in enumerate(suite.oracle)], 0)}
    model.write_json(path, found)
    return found


def table_row(runs):
    """Columns of the table from the bench rows of one or more seeds."""
    flat = [r for rows in runs for r in rows]
    part = lambda keep: mean([r["kscore"] for r in flat if keep(r)])
    return {k: mean([r[k] for r in flat]) for k in ("kscore",) + distill.DIMENSIONS} | {
        "knowledge": part(lambda r: r["eval_type"] == "knowledge"),
        "quality": part(lambda r: r["eval_type"] == "quality"),
        "novel": part(lambda r: r["novel"]), "valid": mean([float(r["valid"]) for r in flat]),
        "tool calls": mean([float(r["tool_calls"]) for r in flat])}


def bootstrap(first, second, draws=4000):
    """Mean of first - second and its 95 % interval, resampling seeds and prompts, both paired. (seeds, prompts) arrays;
    an arm without seeds (1, prompts) is compared with every seed."""
    seeds = min(len(x) for x in (first, second) if len(x) > 1) if max(len(first), len(second)) > 1 else 1
    take = lambda x: x[:seeds] if len(x) > 1 else np.repeat(x, seeds, 0)
    change, rng = take(first) - take(second), np.random.default_rng(0)                             # (seeds, prompts)
    means = [change[rng.integers(0, seeds, seeds)][:, rng.integers(0, change.shape[1], change.shape[1])].mean()
             for _ in range(draws)]
    return [float(change.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))]


BASE = "grpo-2e-4"  # what the other arms are compared with
MAIN = (BASE, "stable", "memory-imitation", "paper")  # the arms that are drawn
COMPARED = (*((arm, "SFT") for arm in ("grpo", BASE, "stable", "sdl-alone", "sdl-shuffled", "best-imitation")),
            *((arm, BASE) for arm in ("stable", "memory-imitation", "paper", "shuffled", "placebo", "sdl-alone")),
            ("stable", "grpo"), ("stable", "memory-imitation"), ("stable", "shuffled"), ("stable", "placebo"),
            ("sdl-alone", "sdl-shuffled"))


def summarize_quality(folder, fixed):
    """quality.json from everything that is finished, and the table on the terminal."""
    rows, scores, details = {}, {}, {}
    early, online = {}, {}  # on the bench after the first updates; of the rollouts themselves
    points = lambda bench: [r["kscore"] for r in bench]
    for name, bench in fixed.items():
        rows[name], scores[name] = table_row([bench]), np.array([points(bench)])
        early[name] = scores[name]
    for arm in ARMS:
        runs = [r for n in range(10) if (r := read(os.path.join(folder, f"{arm}-{n}.json")))]
        if runs:
            rows[arm] = table_row([r["bench"] for r in runs]) | {
                "seeds": len(runs), "rollouts": runs[0]["rollouts"], "seconds": mean([r["seconds"] for r in runs])}
            scores[arm] = np.array([points(r["bench"]) for r in runs])
            early[arm] = np.array([points(r["early"]) for r in runs])
            online[arm] = np.array([r["online"] for r in runs])                                    # (seeds, updates)
            rows[arm]["early"] = float(early[arm].mean())
            tuning = read(os.path.join(folder, f"{arm}-tuning.json")) or {}
            details[arm] = {"setting": runs[0]["setting"], "tried": tuning.get("tried"),
                            "kscore by seed": [float(s.mean()) for s in scores[arm]],
                            "curves": [r["curve"] for r in runs], "hits": [r.get("hits", []) for r in runs],
                            "unfaded ratio": [r["unfaded_ratio"] for r in runs],
                            "hit rate": [r["hit_rate"] for r in runs],
                            "right advice": [r["right_advice"] for r in runs],
                            "rolled back": [r["rolled_back"] for r in runs]}
    pairs = {}
    for a, b in COMPARED:
        if a in scores and b in scores:  # trained arms by the seeds that both have; the others have none
            seeds = min(len(scores[x]) for x in (a, b) if x in ARMS)
            pairs[f"{a} - {b}"] = {when: bootstrap(found[a][:seeds], found[b][:seeds])
                                   for when, found in (("early", early), ("at the end", scores))}
        if a in online and b in online:  # a seed settles which requests come when: only the same seeds compare
            seeds = min(len(online[a]), len(online[b]))
            windows = [slice(n, n + WINDOW) for n in range(0, online[a].shape[1], WINDOW)]
            pairs[f"{a} - {b}"]["reward of rollouts"] = [bootstrap(online[a][:seeds, w], online[b][:seeds, w])
                                                         for w in windows]
    for name, row in rows.items():
        print_row(LABELS.get(name, name), row)
    for name, pair in pairs.items():
        for when in ("early", "at the end"):
            print("{:<60} {:+.3f}  [{:+.3f}, {:+.3f}]".format(f"{name}, {when}", *pair[when]))
    saved = {}
    if BASE in details and "stable" in details:
        for column, unit in enumerate(("rollouts", "seconds")):
            target = mean_curve(details[BASE], column)[-1][1]
            cost = cost_to_reach(details[BASE], target, column)
            took = cost_to_reach(details["stable"], target, column)
            saved |= {"GRPO's last validation KScore": target, f"GRPO's {unit}": cost, f"stable's {unit}": took,
                      f"share of {unit}": took and took / cost}
        print_row("stable reaches GRPO's last score", saved)
    results = os.path.dirname(folder)
    model.write_json(os.path.join(results, "quality.json"),
                     {"rows": rows, "differences": pairs, "rollouts saved": saved, "arms": details})
    write_quality(results, rows, pairs, details)


COLUMNS = {"early": "early", "KScore": "kscore", "F": "faithfulness", "V": "visual_correctness", "T": "text_accuracy",
           "A": "aesthetics",
           "knowledge": "knowledge", "quality": "quality", "novel": "novel", "valid": "valid", "calls": "tool calls",
           "rollouts": "rollouts", "seconds": "seconds", "seeds": "seeds"}


def mean_curve(arm, column=0):
    """[(rollouts (column 0) or seconds (1), validation KScore)], means over the arm's seeds."""
    points = min(len(c) for c in arm["curves"])
    return [tuple(mean([c[i][k] for c in arm["curves"]]) for k in (column, 2)) for i in range(points)]


def cost_to_reach(arm, target, column=0):
    """Rollouts (column 0) or seconds (1) after which the mean validation curve reaches ``target``, straight lines
    between checks, or None."""
    curve = mean_curve(arm, column)
    if curve[0][1] >= target:
        return curve[0][0]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return None


def write_quality(results, rows, pairs, details):
    """quality.md and quality.svg, the README's table and figure."""
    cell = lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) and v < 10 else f"{v:.0f}"
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    lines += [f"| {LABELS.get(name, name)} | " + " | ".join(cell(row.get(k)) for k in COLUMNS.values()) + " |"
              for name, row in rows.items()]
    told = lambda change, low, high: f"{change:+.3f} ({low:+.3f} to {high:+.3f})"
    windows = max((len(pair.get("reward of rollouts", ())) for pair in pairs.values()), default=0)
    heads = [f"reward of the rollouts, updates {n * WINDOW + 1} to {(n + 1) * WINDOW}" for n in range(windows)]
    lines += ["", f"| difference (95 % interval) | {' | '.join(heads + ['KScore, early', 'KScore, at the end'])} |",
              "| --- |" + " --- |" * (windows + 2)]
    for name, pair in pairs.items():
        changes = [*pair.get("reward of rollouts", [None] * windows), pair["early"], pair["at the end"]]
        lines.append(f"| {name} | " + " | ".join(told(*c) if c else "" for c in changes) + " |")
    model.write_text(os.path.join(results, "quality.md"), "\n".join(lines) + "\n")
    shown = {arm: details[arm] for arm in MAIN if arm in details}
    for column, (name, across) in enumerate((("quality.svg", "rollouts"), ("quality-seconds.svg", "seconds"))):
        drawing = genevolve.svg_lines({arm: mean_curve(said, column) for arm, said in shown.items()}, 720, 320,
                                      {arm: [[(c[column], c[2]) for c in curve] for curve in said["curves"]]
                                       for arm, said in shown.items()}, across)
        model.write_text(os.path.join(results, name), drawing)
    hits = {arm: [(n + 1, mean(step)) for n, step in enumerate(zip(*said["hits"]))] for arm, said in shown.items()}
    model.write_text(os.path.join(results, "quality-hits.svg"),
                     genevolve.svg_lines({arm: line for arm, line in hits.items() if line}, 720, 200, across="updates"))


WISE_SCORES = ("consistency", "realism", "aesthetic", "score")
WORLD = [f for f in dataclasses.fields(genevolve.ComponentFlags) if f.name not in {g.name for g in dataclasses.fields(Bench)}]


def evaluated_rows(path):
    """What the released evaluator wrote, as rows for distill.summarize; None where the file is something else."""
    rows = read(path) if path.endswith(".json") else None
    rows = [r for r in rows or [] if isinstance(r, dict) and "summary_type" not in r]
    if not rows or not all("eval_success" in r for r in rows):
        return None
    found = []
    for row in rows:
        told, scores = row | (row.get("meta") or {}), row.get("scores")
        if scores:
            scores = {d: None if d == "text_accuracy" and scores.get("text_accuracy_na") else float(scores[d])
                      for d in distill.DIMENSIONS}
            scores |= {"kscore": distill.kscore(**scores)}
        found.append({k: told.get(k, "unknown") for k in ("id", "eval_type", "category", "difficulty")}
                     | {"judgement": scores or None})
    return found


def suite_rows(settings):
    """Attempts at every request of --suite, judged, as rows for distill.summarize; goes on where it stopped."""
    requests = tools.read_requests(settings.suite)
    name = zlib.crc32(f"{os.path.abspath(settings.suite)} {settings.policy}".encode())  # another suite, another folder
    folder = model.make_folder(os.path.join(settings.out, f"suite-{name:08x}"))
    wise = [r for r in requests if "Prompt" in r and "prompt_id" in r]
    if wise and not settings.judge:
        raise ValueError("WISE's prompts have no ground truth: name a judge with --judge URL")
    path = os.path.join(folder, "rows.jsonl")
    done = [json.loads(line) for line in open(path, encoding="utf-8")] if os.path.exists(path) else []
    left = [r for r in requests if r["id"] not in {d["id"] for d in done}][:8 if settings.quick else None]
    chosen = {f.name: getattr(settings, f.name) for f in WORLD}
    chosen |= {"sampling_steps": settings.steps, "guidance": settings.guidance, "device": settings.device}
    with genevolve.Components(genevolve.Run(policy=settings.policy, out=folder, **chosen), folder) as parts:
        parts.announce(len(left))
        for start in range(0, len(left), 32):
            rows = left[start:start + 32]
            attempts = parts.agent().run(rows, [7919 * (start + n) for n in range(len(rows))])
            parts.scorer.render_and_score(attempts)
            for t, row in zip(attempts, rows):
                told = {k: row.get(k, "unknown") for k in ("eval_type", "category", "difficulty")}
                scores = t.judgement and {k: t.judgement[k] for k in ("kscore",) + distill.DIMENSIONS}
                done.append({"id": t.id} | told
                            | {"judgement": scores, "valid": t.program is not None, "error": t.error})
                if "Prompt" in row and "prompt_id" in row:
                    done[-1]["category"] = distill.wise_category(row)
                    failed = t.program is None and t.termination != "error"
                    try:
                        done[-1]["wise"] = dict.fromkeys(WISE_SCORES, 0.0) if failed else \
                            None if t.image is None else parts.scorer.judge.score_wise(t.image, row)
                    except tools.ToolError as error:  # missing, not zero
                        done[-1] |= {"wise": None, "error": str(error)}
            model.write_lines(path, done)
            print(f"{start + len(rows)}/{len(left)} requests", flush=True)
    return done


def suite_figures(settings):
    """python bench.py quality --suite FILE"""
    rows = evaluated_rows(settings.suite) or suite_rows(settings)
    results = {"suite": settings.suite, "requests": len(rows)}
    if any(r["judgement"] for r in rows):
        results |= {"KScore": distill.summarize(rows),
                    "KScore, missing text counts 0.5": distill.summarize(rows, "half")}
    if wise := [r for r in rows if "wise" in r]:
        scores = [(r["wise"] or dict.fromkeys(WISE_SCORES)) | {"category": r["category"]} for r in wise]
        results |= {f"WiScore, {v}": distill.wiscore(scores, v) for v in ("legacy", "verified")}
    for label, values in results.items():
        if isinstance(values, dict):
            print_row(label, values.get("all", values))
    model.write_json(os.path.join(model.make_folder(settings.out), "suite.json"), results)


def quality(settings):
    """python bench.py quality"""
    settings.policy = settings.policy or os.path.join(HERE, "weights", "sft" if settings.suite else "rare")
    if settings.suite:
        return suite_figures(settings)
    if strange := [f.name for f in WORLD if getattr(settings, f.name) != f.default]:
        name = strange[0].replace("_", "-")
        raise ValueError(f"--{name} goes with --suite: the ablations measure the embedded world")
    if settings.quick:
        settings.train_steps, settings.tune_steps, settings.seeds = 2, 0, 1
        settings.out, settings.runs = (os.path.join(x, "quick") for x in (settings.out, settings.runs))
        settings.arms = settings.arms or f"{BASE},stable"
    names = [a.strip() for a in settings.arms.split(",")] if settings.arms else [*ARMS, "sensitivity"]
    if unknown := [a for a in names if a not in ARMS and a != "sensitivity"]:
        raise ValueError(f"unknown arm {unknown[0]!r}: must be of {', '.join(ARMS)}, sensitivity")
    folder = model.make_folder(os.path.join(settings.out, "quality"))
    rows = atlas.world.requests("bench")[:24 if settings.quick else None]
    fixed = fixed_rows(settings, folder, rows)
    for arm in names:
        if arm == "sensitivity":
            sensitivity(settings, folder)
            continue
        setting = tuned(settings, arm, folder)["best"]
        for seed in range(settings.seeds or ARMS[arm][2]):
            path = os.path.join(folder, f"{arm}-{seed}.json")
            if os.path.exists(path):
                continue
            early = path.replace(".json", "-early.json")
            if not os.path.exists(early):
                run = evolution(settings, arm, setting, seed, min(settings.early_steps, settings.train_steps))
                model.write_json(early, on_bench(os.path.join(run.out, "last"), settings, rows))
            run = evolution(settings, arm, setting, seed, settings.train_steps)
            log, last = run.log, os.path.join(run.out, "last")
            curve = validation_curve(log)
            model.write_json(path, {
                "arm": arm, "setting": setting, "seed": seed, "steps": len(log),
                "rollouts": sum(r["rollouts"] for r in log),
                "seconds": sum(r["seconds"] for r in log), "curve": curve, "bench": on_bench(last, settings, rows),
                "early": read(early), "online": [r["reward"] for r in log],
                "unfaded_ratio": unfaded_ratio(run),
                "hits": [r["hit_rate"] for r in log],
                "hit_rate": mean([r["hit_rate"] for r in log]), "right_advice": mean([r["right_advice"] for r in log]),
                "rolled_back": [r["step"] for r in log if "rolled_back" in r]})
            os.remove(early)
    summarize_quality(folder, fixed)


# ---- speed: side by side with peers ----------------------------------------------------------------------------------

@dataclass
class Speed(Common):
    """Ours and the peers in one process, alternating."""
    out: str = flag(os.path.join(HERE, "results"), "folder for speed.json")
    quick: bool = flag(False, "a smoke run on small sizes")
    rows: str = flag("", "comma-separated rows (default: all)")
    repeats: int = flag(3, "runs of each side")


def memory_mb(name):
    """A field of /proc/self/status in MB, None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name + ":"))
    except (OSError, StopIteration):
        return None


def release_memory():
    """Give what the allocator holds of freed memory back to the system (glibc), so that the next peak counts it."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def timed(work):
    """(seconds, peak memory in MB above what was there before, result)."""
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # Linux: the peak starts again from what is resident now
        except OSError:
            pass
        before = memory_mb("VmRSS")
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory_mb("VmHWM")
    return seconds, None if before is None else after - before, result


def side_by_side(ours, peer, repeats):
    """Alternating runs after one of each that is not counted; ratios are peer / ours of neighbouring runs."""
    ours(), peer()
    runs = [(timed(ours), timed(peer)) for _ in range(repeats)]
    ratios = sorted(b[0] / a[0] for a, b in runs)
    middle = lambda values: float(np.median([v for v in values]))
    row = {"ours s": middle([a[0] for a, _ in runs]), "peer s": middle([b[0] for _, b in runs]),
           "ratio": middle(ratios), "ratio low": ratios[0], "ratio high": ratios[-1]}
    if runs[0][0][1] is not None:
        a, b = (max(1.0, *(run[side][1] for run in runs)) for side in (0, 1))
        row |= {"ours MB": a, "peer MB": b, "memory ratio": b / a}
    return row


def machine(device):
    """Measured matrix-product peak (float32, float operations a second) and memory bandwidth (bytes a second)."""
    a, x = torch.randn(2048, 2048, device=device), torch.randn(2**26, device=device)
    best = lambda work: min(timed(work)[0] for _ in range(8))
    return {"matrix product, GFLOP/s": 2 * 2048**3 / best(lambda: a @ a) / 1e9,
            "memory, GB/s": x.nbytes / best(lambda: x.sum()) / 1e9}


def need(package):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise tools.ToolError(f"{package} is not installed: pip install -r requirements-peers.txt") from None


def small_policy(quick):
    """The 5.2 M-parameter Qwen3 of the table, random weights."""
    torch.manual_seed(0)
    layers = 2 if quick else 6
    return model.Qwen3(model.Config(vocab_size=2048, hidden_size=256, layers=layers, heads=4, kv_heads=2, head_dim=64,
                                    mlp_size=768))


def peer_policy(net):
    """The same weights in transformers."""
    transformers = need("transformers")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, net)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def decode_flops(net, prompt, new, sequences, groups):
    """Multiply-adds, twice, of a group's prompts (once each) and of every decoded token, attention included."""
    c = net.config
    weights = sum(p.numel() for p in net.parameters())  # tied: the embedding's row lookup stands for the output layer
    attention = lambda length: 4 * c.layers * c.heads * c.head_dim * length
    prefill = groups * prompt * (2 * (weights - c.vocab_size * c.hidden_size) + attention(prompt / 2))
    return prefill + sequences * new * (2 * weights + attention(prompt + new / 2))


def rollout_row(s):
    """8 prompts x 6 rollouts x 128 new tokens."""
    net, new = small_policy(s.quick), 16 if s.quick else 128
    peer, g = peer_policy(net), torch.Generator().manual_seed(0)
    prompts = [p for p in torch.randint(0, 2048, (8, 600), generator=g).tolist() for _ in range(6)]
    ids = torch.tensor(prompts)

    @torch.no_grad()
    def theirs():
        peer.generate(input_ids=ids, max_new_tokens=new, do_sample=True, temperature=0.7, top_p=0.95, top_k=0,
                      eos_token_id=None, pad_token_id=0)
    row = side_by_side(lambda: model.generate(net, prompts, new), theirs, s.repeats)
    row["tokens/s"] = 48 * new / row["ours s"]
    row["GFLOP"] = decode_flops(net, 600, new, 48, 8) / 1e9
    weights = sum(p.numel() for p in net.parameters()) * 4
    cache = 2 * 4 * net.config.layers * net.config.kv_heads * net.config.head_dim  # bytes a token
    row["GB moved"] = new * (weights + cache * (8 * 600 + 48 * new / 2)) / 1e9
    return row


def turns_row(s, new=128):
    """4 turns of ``new`` tokens with observations of 120 between them, 48 at once."""
    net, new, turns = small_policy(s.quick), 16 if s.quick else new, 4
    peer, g = peer_policy(net), torch.Generator().manual_seed(0)
    prompts = [p for p in torch.randint(0, 2048, (8, 600), generator=g).tolist() for _ in range(6)]
    seen = torch.randint(0, 2048, (turns - 1, 48, 120), generator=g)

    def ours():
        engine = model.Engine(net, 48, 600 + turns * new + (turns - 1) * 120)
        live = [engine.open(p, i) for i, p in enumerate(prompts)]
        for turn in range(turns):
            for sequence in live:
                engine.submit(sequence, new, 0.7, 0.95)
            while engine.poll():
                pass
            if turn < turns - 1:
                for sequence, ids in zip(live, seen[turn].tolist()):
                    engine.extend(sequence, ids)

    @torch.no_grad()
    def theirs():
        ids = torch.tensor(prompts)
        for turn in range(turns):
            ids = peer.generate(input_ids=ids, max_new_tokens=new, do_sample=True, temperature=0.7, top_p=0.95, top_k=0,
                                eos_token_id=None, pad_token_id=0)
            if turn < turns - 1:
                ids = torch.cat((ids, seen[turn]), 1)
    return side_by_side(ours, theirs, s.repeats)


def logprob_row(s):
    """Log-probs and their gradient, 4,096 tokens, hidden 1,024, vocabulary 151,936: with weights known beforehand (SFT)
    and, "any loss", with the gradient that comes from a loss on top (GRPO, SDL). The gradients, which both sides have
    to deliver, are taken off the memory."""
    n, c, v = (256, 64, 5000) if s.quick else (4096, 1024, 151936)
    torch.manual_seed(0)
    hidden, target = torch.randn(n, c).requires_grad_(), torch.randint(v, (n,))
    weight, share = (torch.randn(v, c) * c**-0.5).requires_grad_(), torch.full((n,), 1 / n)

    def run(logps):
        logps().sum().backward()
        hidden.grad = weight.grad = None  # so that the next run starts without them
    theirs = lambda: run(lambda: (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]))
    row = side_by_side(lambda: run(lambda: model.weighted_logprobs(hidden, weight, target, share)), theirs, s.repeats)
    other = side_by_side(lambda: run(lambda: model.chunked_logprobs(hidden, weight, target)[0]), theirs, 1)
    row |= {f"any loss, {k}": other[k] for k in ("ours s", "ratio", "ours MB")}
    row["the gradients, MB"] = gradients = (hidden.nbytes + weight.nbytes) / 2**20
    row["memory ratio"] = (row["peer MB"] - gradients) / max(row["ours MB"] - gradients, 1)
    return row


def training_batch(quick):
    """8 groups x 6, prompt 600, guide 120, responses of 50 to 500 tokens: [distill.TrainingRow]."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(2 if quick else 8):
        prompt, guide = rng.integers(0, 2048, 600).tolist(), rng.integers(0, 2048, 120).tolist()
        for _ in range(6):
            answer = rng.integers(0, 2048, rng.integers(50, 501)).tolist()
            mask = [True] * len(answer)
            rows.append(distill.TrainingRow(prompt + answer, [False] * 600 + mask, float(rng.normal()), guide + prompt + answer,
                                    [False] * 720 + mask))
    return rows


def training_row(s):
    """One GRPO + SDL step: old, reference, teacher forward, student forward and backward, AdamW."""
    net, recipe, rows = small_policy(s.quick), distill.RECIPES["paper"], training_batch(s.quick)
    frozen, peer = copy.deepcopy(net).requires_grad_(False), peer_policy(net)
    peer_frozen = copy.deepcopy(peer).requires_grad_(False)
    first, second = (torch.optim.AdamW(n.parameters(), 1e-6) for n in (net, peer))

    def ours():
        with torch.no_grad():
            old = distill.score_actions(net, [r.tokens for r in rows], [r.mask for r in rows])
        told = [dataclasses.replace(r, logp_old=x[m]) for r, x, m in zip(rows, old.logp, old.mask)]
        together, _, _ = distill.update_gradients(net, frozen, net, told, recipe, together=True)
        for p, g in zip(net.parameters(), together):
            p.grad = g
        first.step()
        first.zero_grad()

    def padded(net, part, teacher=False):
        """log p of the actions, (B, T), from full logits over the padded batch."""
        tokens, masks = ([r.teacher_tokens if teacher else r.tokens for r in part],
                         [r.teacher_mask if teacher else r.mask for r in part])
        ids, mask = (distill.pad_rows([torch.tensor(x) for x in xs]) for xs in (tokens, masks))
        lengths = torch.tensor([len(t) for t in tokens])
        there = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = net(input_ids=ids, attention_mask=there).logits[:, :-1].float()
        logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return distill.pad_rows([x[m] for x, m in zip(logp, mask[:, 1:])])

    def theirs():
        counts = distill.step_counts(rows, recipe)
        for at in range(0, len(rows), 6):  # a group at a time: all at once would not fit into the memory of a laptop
            part = rows[at:at + 6]
            mask, advantages = distill.pad_rows([torch.ones(sum(r.mask), dtype=torch.bool)
                                                 for r in part]), torch.tensor([r.advantage for r in part])
            with torch.no_grad():
                old, ref, wise = padded(peer, part), padded(peer_frozen, part), padded(peer, part, True)
            logp = padded(peer, part)
            loss = distill.grpo_loss(logp, old, ref, advantages, mask, normalizer=counts[:2])
            (loss + recipe.weight * distill.sdl_loss(logp, old, wise, mask, normalizer=counts[2])).backward()
        second.step()
        second.zero_grad()
    row = side_by_side(ours, theirs, s.repeats)
    def products(prompt):
        """Floating-point operations of one forward pass over the trunk, a group's prompt once, attention included."""
        c, groups = net.config, len(rows) // 6
        inner = sum(p.numel() for n, p in net.named_parameters() if "embed" not in n)
        lengths = [sum(r.mask) for r in rows]
        seen = groups * prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in lengths)  # (query, key)
        return 2 * inner * (groups * prompt + sum(lengths)) + 4 * c.layers * c.heads * c.head_dim * seen
    spoken = sum(sum(r.mask) for r in rows) * net.config.vocab_size * net.config.hidden_size
    # old, reference, teacher; student forward and backward, twice a forward
    row["GFLOP"] = (products(600) * (2 + 3) + products(720) + 2 * spoken * (3 + 3)) / 1e9
    return row


@torch.inference_mode()
def sampler_row(s):
    """20 guided steps, batch 16, the committed renderer; the peer encodes its conditions each step, in two passes."""
    diffusers = need("diffusers")
    suite = Suite(Bench(quick=True))
    net, renderer, count = suite.renderer.net, suite.renderer, 4 if s.quick else 16
    prompts, pictures = [o["gen_prompt"] for o in suite.oracle[:count]], [suite.references(n) for n in range(count)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    rows = renderer.conditions(prompts, pictures)
    empty = [(row[0][:0], row[1][:0], row[2][:0]) for row in rows]
    made = {}

    def ours():
        made["ours"] = renderer.render(prompts, pictures, list(range(count)), steps=20, guidance=2.0)

    def theirs():
        scheduler.set_timesteps(sigmas=diffusion.schedule(20)[:-1])
        x = torch.stack([torch.randn(net.config.tokens, 4 * net.config.channels,
                                     generator=torch.Generator().manual_seed(i))
                         for i in range(count)])
        renderer.conditions(prompts, pictures)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            time_ = torch.full((count,), float(sigma))
            with_prompt, without = (net(x, time_, net.encode(diffusion.pack(r))) for r in (rows, empty))
            x0 = without + 2.0 * (with_prompt - without)
            x = scheduler.step((x - x0) / sigma, t, x, return_dict=False)[0]
        made["peer"] = list(renderer.vae.to_images(diffusion.unpatchify(x)).numpy())
    row = side_by_side(ours, theirs, s.repeats)
    row["greatest pixel difference"] = int(max(np.abs(a.astype(int) - b).max()
                                               for a, b in zip(made["ours"], made["peer"])))
    return row


def scaling_row(s):
    """16 to 512 rollouts in 64 slots: tokens a second, peak memory."""
    net, g, row = small_policy(s.quick), torch.Generator().manual_seed(0), {}
    for count in (16, 48) if s.quick else (16, 48, 128, 512):
        prompts = [p for p in torch.randint(0, 2048, (-(-count // 6), 600), generator=g).tolist()
                   for _ in range(6)][:count]
        seconds, memory, _ = timed(lambda: model.generate(net, prompts, 128))
        row |= {f"{count}: tokens/s": count * 128 / seconds, f"{count}: MB": memory}
    return row


SPEED = {"rollouts": rollout_row, "turns": turns_row,
         "short turns": lambda s: turns_row(s, 45),  # what the embedded policy says in a turn
         "log-probs": logprob_row, "training step": training_row,
         "sampler": sampler_row, "scaling": scaling_row}
TARGETS = {"rollouts": 6, "turns": 8, "short turns": 8, "log-probs": 1.2, "training step": 2.5, "sampler": 1.3}


def speed(settings):
    """python bench.py speed"""
    names = [n.strip() for n in settings.rows.split(",")] if settings.rows else list(SPEED)
    if unknown := [n for n in names if n not in SPEED]:
        raise ValueError(f"unknown row {unknown[0]!r}: must be of {', '.join(SPEED)}")
    path = os.path.join(model.make_folder(settings.out), "speed.json")
    found = (read(path) or {}) | {"machine": machine(model.pick_device(settings.device))
                                  | {"threads": torch.get_num_threads(), "torch": torch.__version__,
                                     "quick": settings.quick}}
    peak, band = found["machine"]["matrix product, GFLOP/s"], found["machine"]["memory, GB/s"]
    print_row("machine", found["machine"])
    for name in names:
        try:
            row = SPEED[name](settings)
        except tools.ToolError as error:
            print(f"{name}: {error}")
            continue
        if "GFLOP" in row:  # the least time that the measured peaks allow, over the time it took
            row["share of the machine"] = (row["GFLOP"] / peak + row.get("GB moved", 0) / band) / row["ours s"]
        row |= {"target": TARGETS[name]} if name in TARGETS else {}
        found[name] = row
        print_row(name, row)
        model.write_json(path, found)


# ---- released: the authors' runtime against the local server ---------------------------------------------------------

@dataclass
class Released(Bench):
    """The released agent, image script and evaluator, unchanged, against serve (pip install openai tqdm pillow)."""
    runtime: str = flag("", "folder of a checkout of the released runtime (github.com/MeiGen-AI/GenEvolve)")
    requests: int = flag(20, "bench requests")


def released(settings):
    """python bench.py released --runtime DIR"""
    scripts = os.path.join(settings.runtime, "scripts")
    if not settings.runtime or not os.path.isfile(os.path.join(scripts, "run_agent.py")):
        raise ValueError("--runtime takes the folder of a checkout that has scripts/run_agent.py")
    for package in ("openai", "tqdm", "PIL"):
        need(package)
    rows, out = atlas.world.requests("bench")[:settings.requests], model.make_folder(settings.out)
    with tempfile.TemporaryDirectory() as folder:
        requests = os.path.join(folder, "requests.jsonl")
        model.write_lines(requests, [{k: v for k, v in r.items() if k not in ("recipe", "_folder")} for r in rows])
        command = [sys.executable, os.path.join(HERE, "genevolve.py"), "serve", "--port", "0", "--policy",
                   settings.policy, "--out", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().split()[2].rstrip(":")
            environment = os.environ | {"OPENAI_API_KEY": "none", "SERPER_API_KEY": "none", "SERPER_BASE_URL": url,
                                        "IMAGE_DOWNLOAD_DIR": os.path.join(folder, "found")}
            results = os.path.join(folder, "results.json")
            for name, *flags in (
                    ("run_agent.py", "--input", requests, "--output-dir", folder, "--base-url", f"{url}/v1"),
                    ("generate_images.py", "--input", results, "--output-dir", folder, "--backend",
                     "qwen-image-edit-service", "--service-url", url),
                    ("evaluate_images.py", "--results", results, "--gt-root", os.path.join(HERE, "atlas"),
                     "--api-base", f"{url}/v1")):
                done = subprocess.run([sys.executable, os.path.join(scripts, name), *flags], env=environment,
                                      capture_output=True, text=True)
                if done.returncode:
                    raise ValueError(f"{name} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        finally:
            server.terminate()
            server.wait()
        records, judged = read(results), read(os.path.join(folder, "results_eval.json"))
        summary = read(os.path.join(folder, "summary.json"))
        ours = distill.summarize(evaluated_rows(os.path.join(folder, "results_eval.json")))
    figures = {"requests": len(rows), "records": len(records), "programs": sum(bool(r["gen_prompt"]) for r in records),
               "rendered": sum(bool(r["success"]) for r in records),
               "judged": sum(bool(r.get("eval_success")) for r in judged if "summary_type" not in r),
               "its overall": summary["all"]["overall"], "KScore of its scores": ours["all"]["overall"]}
    print_row("the released runtime", figures)
    model.write_json(os.path.join(out, "released.json"), figures)


COMMANDS = {"world": (Bench, world), "quality": (Quality, quality), "speed": (Speed, speed),
            "released": (Released, released)}


if __name__ == "__main__":
    sys.exit(genevolve.main(commands=COMMANDS))
