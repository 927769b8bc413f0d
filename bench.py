"""GenEvolve-Bench: what the embedded world is worth, how good the agent is, and how fast the code runs.

    python bench.py world       the Atlas itself: judge, renderer, skills, oracle, cold-started policy
    python bench.py quality     ablations of the training, with intervals
    python bench.py speed       side by side with peers (pip install -r requirements-peers.txt)

Every command prints a table and writes the same numbers as JSON under --out. KScore is the paper's, with the text term
dropped and the rest renormalised where no text is wanted, unless a table says otherwise. Nothing here is ever used
for training or for choosing a setting.
"""
import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np

import diffusion
import distill
import genevolve
import tools
from genevolve import HERE, Common, flag


@dataclass
class Bench(Common):
    """Flags of every benchmark."""
    out: str = flag(os.path.join(HERE, "results"), "folder for the JSON of the results")
    quick: bool = flag(False, "a smoke run on a few rows")
    policy: str = flag(os.path.join(HERE, "weights", "sft"), "policy folder that is measured")
    steps: int = flag(20, "sampling steps of the renderer")


DIMENSION = {"spatial_layout": "visual_correctness", "quantity_counting": "visual_correctness",
             "anatomy_body_coherence": "visual_correctness", "physical_material_consistency": "visual_correctness",
             "attribute_binding": "visual_correctness", "text_rendering": "text_accuracy",
             "creative_drawing": "faithfulness", "aesthetic_drawing": "aesthetics"}


class Suite:
    """Bench rows with their oracle programs, a renderer and the pixel judge; pictures are made in batches."""

    def __init__(self, settings, split="bench"):
        self.rows = genevolve.atlas_rows(split)[:24 if settings.quick else None]
        with open(os.path.join(HERE, "atlas", "oracle.jsonl"), encoding="utf-8") as file:
            oracle = {row["id"]: row for row in map(json.loads, file)}
        self.oracle = [oracle[row["id"]] for row in self.rows]
        weights = os.path.join(HERE, "weights")
        self.renderer = diffusion.Renderer.load(os.path.join(weights, "renderer"), os.path.join(weights, "vae"))
        self.judge, self.steps = distill.PixelJudge(genevolve.read_world()), settings.steps

    def references(self, number):
        """The right reference pictures of a row."""
        return [tools.read_image(os.path.join(HERE, "atlas", path)) for path in self.oracle[number]["references"]]

    def score(self, jobs, steps=None, seed=0):
        """Render and judge. jobs: [(row number, prompt, reference pictures)]. Returns the judgements, in order."""
        seeds = [genevolve.image_seed(self.rows[n]) + seed for n, _, _ in jobs]
        images = self.renderer.render([p for _, p, _ in jobs], [r for _, _, r in jobs], seeds, steps=steps or self.steps)
        return [self.judge(image, genevolve.truth_of(self.rows[n]), self.rows[n]["recipe"]["wanted"])
                for image, (n, _, _) in zip(images, jobs)]


def mean(values):
    """Mean without missing values, nan if none is left."""
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else float("nan")


def means(scores):
    """KScore and its four parts."""
    return {k: mean([s[k] for s in scores]) for k in ("kscore",) + distill.DIMENSIONS}


def print_row(label, values):
    print(f"{label:<44} " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()),
          flush=True)


# ---- world: is the Atlas what it claims to be? ----------------------------------------------------------------------------

def judge_figures(suite):
    """The judge on ground truth, and on ground truth with one planted violation."""
    truth = [suite.judge(genevolve.truth_of(r), genevolve.truth_of(r), r["recipe"]["wanted"]) for r in suite.rows]
    return {"ground truth": means(truth)}


def oracle_figures(suite):
    """The oracle's programs at several step counts, and with a second seed."""
    jobs = [(n, o["gen_prompt"], suite.references(n)) for n, o in enumerate(suite.oracle)]
    figures = {f"oracle, {steps} steps": means(suite.score(jobs, steps)) for steps in (1, 4, 12, 20)}
    a, b = (suite.renderer.render([j[1] for j in jobs[:32]], [j[2] for j in jobs[:32]],
                                  [seed + n for n in range(len(jobs[:32]))], steps=suite.steps) for seed in (1, 1001))
    figures["two seeds, mean pixel difference"] = {"of 255": mean([np.abs(x.astype(float) - y).mean() for x, y in zip(a, b)])}
    return figures


def reference_figures(suite):
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


def skill_figures(suite):
    """Each skill's wording against plain wording of the same request, everything else exact."""
    figures = {}
    for skill, dimension in DIMENSION.items():
        rows = [n for n, o in enumerate(suite.oracle) if skill in o["probes"]]
        exact = means(suite.score([(n, suite.oracle[n]["gen_prompt"], suite.references(n)) for n in rows]))
        plain = means(suite.score([(n, suite.oracle[n]["probes"][skill], suite.references(n)) for n in rows]))
        figures[f"{skill}, exact minus plain"] = {
            "KScore": exact["kscore"] - plain["kscore"], dimension: exact[dimension] - plain[dimension], "rows": len(rows)}
    return figures


def policy_figures(suite, settings):
    """Raw requests, the fixed workflow's floor; the cold-started policy without and with a perfect guide."""
    raw = means(suite.score([(n, r["question"], []) for n, r in enumerate(suite.rows)]))
    figures = {"raw request to the renderer": raw}
    settings = genevolve.Run(policy=settings.policy, out=settings.out, sampling_steps=settings.steps, seed=settings.seed)
    guides = [distill.Bundle.from_bullets(r["question"], o["guide"]) for r, o in zip(suite.rows, suite.oracle)]
    with genevolve.Embedded(settings, settings.out) as parts:
        for label, given in (("policy", None), ("policy with a perfect guide", guides)):
            start = time.perf_counter()
            done = parts.agent().run(suite.rows, [7919 * n for n in range(len(suite.rows))], given)
            parts.studio.finish(done)
            figures[label] = means([t.judgement for t in done]) | {
                "reward": mean([t.reward for t in done]), "valid programs": mean([float(t.program is not None) for t in done]),
                "tool calls": mean([float(sum(s.kind == "tool_call" for s in t.steps)) for t in done]),
                "seconds": time.perf_counter() - start}
    return figures


def time_figures(suite):
    """One picture at batch 1, and a batch of sixteen, 20 steps with guidance."""
    job = (suite.oracle[0]["gen_prompt"], suite.references(0))
    seconds = []
    for count in (1, 16):
        suite.renderer.render([job[0]] * count, [job[1]] * count, list(range(count)), steps=20)
        start = time.perf_counter()
        suite.renderer.render([job[0]] * count, [job[1]] * count, list(range(count)), steps=20)
        seconds.append(time.perf_counter() - start)
    return {"seconds, 20 steps with guidance": {"one picture": seconds[0], "sixteen": seconds[1]}}


def world(settings):
    """python bench.py world"""
    suite, results = Suite(settings), {}
    for part in (judge_figures, oracle_figures, reference_figures, skill_figures, time_figures):
        for label, values in part(suite).items():
            results[label] = values
            print_row(label, values)
    for label, values in policy_figures(suite, settings).items():
        results[label] = values
        print_row(label, values)
    genevolve.make_folder(settings.out)
    genevolve.write_json(os.path.join(settings.out, "world.json"), results)


COMMANDS = {"world": (Bench, world)}


if __name__ == "__main__":
    sys.exit(genevolve.main(commands=COMMANDS))
