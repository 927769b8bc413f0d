"""GenEvolve-Bench: what the embedded world is worth, how good the agent is, and how fast the code runs.

    python bench.py             within five minutes: the promoted policy on the bench, pictures, and the speed, in out/
    python bench.py world       the Atlas itself: judge, renderer, skills, oracle, cold-started policy
    python bench.py quality     a plan's experiment: training compared (--suite FILE: one policy on any requests)
    python bench.py speed       side by side with peers (pip install -r requirements-peers.txt)
    python bench.py released    the authors' own agent, renderer script and evaluator, unchanged, against serve

Every command prints a table and writes the same numbers as JSON: to results/, whose files are committed, to out/ with
--quick, or to --out. KScore is the paper's, with the text term dropped and the rest renormalised where no text is
wanted, unless a table says otherwise. Measurements on bench requests are never used for training or for choosing a
setting: those take the validation requests.

Letters: S training seeds, P bench requests, U updates of a run.

Contents, in reading order:

    table_row, bootstrap    one policy's columns; the difference of two and its 95 % interval
    AtlasSuite, world       the Atlas measured: does the judge see faults, do skills and references matter
    Ablation                the experiment's controls, as an evolution with some methods overridden
    Plan, Arm               an experiment, written down before its first run
    quality                 train and measure its runs; summarize_quality, compare_arms, t_interval, sign_flip
    suite_rows              one policy on a file of requests, WISE's included
    rollout_row ...         one row of the speed table each, ours beside a peer
    speed                   the table, with the share of the machine that was used
    short                   what `python bench.py` alone shows: the promoted policy, its pictures, the speed
    released                the released runtime against our server
    Machine room            smoke runs and folders, tables, figures, timing and memory, peers
"""
import copy
import ctypes
import dataclasses
import gc
import html
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

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
from genevolve import HERE, Compute, flag
from web import page

SCORES = ("kscore",) + distill.DIMENSIONS


@dataclass
class Bench(Compute):
    """Flags of every benchmark."""
    out: str = flag("", "folder for the JSON of the results (default: results, or out for a smoke run)")
    quick: bool = flag(False, "a smoke run on a few rows")
    policy: str = flag(os.path.join(HERE, "weights", "sft"), "policy folder that is measured")
    steps: int = flag(20, "sampling steps of the renderer", alias="", bounds="[1, inf)")
    guidance: float = flag(1.0, "classifier-free guidance of the renderer", bounds="[0, inf)")


# ---- Aggregates ------------------------------------------------------------------------------------------------------

def bench_row(request, scores, valid, tool_calls, reward=None):
    """What is kept of one judged attempt at a request."""
    return {
        "id": request["id"],
        "novel": request["novel"],
        "eval_type": request["eval_type"],
        "valid": valid,
        "tool_calls": tool_calls,
        "reward": reward,
        **{name: scores[name] for name in SCORES},
    }


def mean_scores(rows):
    """KScore and its four parts, means over rows that have them. A part that is None in a row is left out."""
    return {name: mean([row[name] for row in rows]) for name in SCORES}


def table_row(runs):
    """Columns of the quality table. runs: for each training seed its bench rows; all seeds count alike."""
    rows = [row for run in runs for row in run]
    knowledge = [row["kscore"] for row in rows if row["eval_type"] == "knowledge"]
    quality = [row["kscore"] for row in rows if row["eval_type"] == "quality"]
    novel = [row["kscore"] for row in rows if row["novel"]]
    return mean_scores(rows) | {
        "knowledge": mean(knowledge),
        "quality": mean(quality),
        "novel": mean(novel),
        "valid": mean([float(row["valid"]) for row in rows]),
        "tool calls": mean([float(row["tool_calls"]) for row in rows]),
    }


def bootstrap(first, second, draws=4000):
    """Mean of first - second and its 95 % interval, resampling seeds and prompts, both paired.

    first, second: (S, P). An arm without seeds, (1, P), is compared with every seed of the other.
    """
    seeds = min((len(scores) for scores in (first, second) if len(scores) > 1), default=1)
    change = repeat_seeds(first, seeds) - repeat_seeds(second, seeds)                               # (S, P)
    prompts = change.shape[1]

    # one draw of seeds and one of prompts for both sides: a prompt that is hard for both adds no spread
    rng = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        seed_draw = rng.integers(0, seeds, seeds)
        prompt_draw = rng.integers(0, prompts, prompts)
        means.append(change[seed_draw][:, prompt_draw].mean())

    low, high = np.quantile(means, (0.025, 0.975))
    return [float(change.mean()), float(low), float(high)]


def repeat_seeds(scores, seeds):
    """(S, P) -> its first ``seeds`` rows; (1, P) -> its only row for each of them."""
    return scores[:seeds] if len(scores) > 1 else np.repeat(scores, seeds, 0)


def copied(request, trajectory):
    """Whether a year or code word that an article stated stands in the program letter by letter, spelling included.

    None: the request asks for none, no article stated it, or the program leaves it open.
    """
    wanted, program = request["recipe"]["wanted"], trajectory.program
    fact = wanted["text"] if wanted["fact"] not in ("", "number") else ""
    if not fact or program is None:
        return None
    if not any(fact in step.observation for step in trajectory.steps):
        return None

    written = set(re.findall(r'(?:text "|saying )(\w*)', program.gen_prompt))
    spelled = set(re.findall(r"spelled ([\w-]*)", program.gen_prompt))
    if not written:
        return None
    return written == {fact} and spelled <= {"-".join(fact)}


WISE_SCORES = ("consistency", "realism", "aesthetic", "score")


def wise_figures(rows):
    """WiScore, both versions, of suite rows that hold "wise": scores, or None where the judgement is missing."""
    scores = []
    for row in rows:
        if "wise" in row:
            scores.append((row["wise"] or dict.fromkeys(WISE_SCORES)) | {"category": row["category"]})
    if not scores:
        return {}
    return {f"WiScore, {version}": distill.wiscore(scores, version) for version in ("legacy", "verified")}


# ---- World: is the Atlas what it claims to be? -----------------------------------------------------------------------

# the dimension of KScore in which the judge punishes a violation of the skill
DIMENSION = {
    "spatial_layout": "visual_correctness",
    "quantity_counting": "visual_correctness",
    "anatomy_body_coherence": "visual_correctness",
    "physical_material_consistency": "visual_correctness",
    "attribute_binding": "visual_correctness",
    "text_rendering": "text_accuracy",
    "creative_drawing": "faithfulness",
    "aesthetic_drawing": "aesthetics",
}


def suite_requests(settings, split="bench", folder=atlas.world.HERE):
    """The requests of a split; for a smoke run 24, spread over it, so that both tracks have some."""
    requests = atlas.world.requests(split, folder)
    return requests[::len(requests) // 24][:24] if settings.quick else requests


class AtlasSuite:
    """Requests of a split with their oracle programs, a renderer and the pixel judge.

    A job is (request number, prompt, reference pictures); jobs are rendered in batches, one noise a request.
    """

    def __init__(self, settings, split="bench", requests=None, folder=atlas.world.HERE):
        """requests: of the world in the folder (default: those of the split)."""
        self.requests = requests or suite_requests(settings, split, folder)
        self.folder = folder
        oracle = atlas.world.oracle(folder)
        self.oracle = [oracle[request["id"]] for request in self.requests]
        renderer, vae = (os.path.join(HERE, "weights", name) for name in ("renderer", "vae"))
        self.renderer = diffusion.Renderer.load(renderer, vae, model.pick_device(settings.device))
        self.judge = atlas.judge.PixelJudge(atlas.world.vocabulary())
        self.steps = settings.steps
        self.guidance = settings.guidance

    def references(self, number):
        """The right reference pictures of a request."""
        return [tools.read_image(os.path.join(self.folder, path)) for path in self.oracle[number]["references"]]

    def oracle_jobs(self):
        """Every request with its oracle program."""
        return [(n, oracle["gen_prompt"], self.references(n)) for n, oracle in enumerate(self.oracle)]

    def render(self, jobs, steps=None, seeds=None):
        """Jobs -> pictures, uint8 (H, W, 3). seeds: one a job (default: the request's own)."""
        if seeds is None:
            seeds = [tools.image_seed(self.requests[number]) for number, _, _ in jobs]
        prompts = [prompt for _, prompt, _ in jobs]
        references = [pictures for _, _, pictures in jobs]
        return self.renderer.render(prompts, references, list(seeds), steps=steps or self.steps, guidance=self.guidance)

    def judge_picture(self, number, image):
        """The judgement of a picture for a request."""
        request = self.requests[number]
        return self.judge(image, tools.truth_of(request), request["recipe"]["wanted"])

    def score(self, jobs, steps=None):
        """Jobs -> judgements of their pictures, in order."""
        images = self.render(jobs, steps)
        return [self.judge_picture(number, image) for image, (number, _, _) in zip(images, jobs)]


def judge_figures(suite, settings):
    """The judge on ground truth, and on fresh scenes with one planted violation."""
    truth = [suite.judge_picture(n, tools.truth_of(request)) for n, request in enumerate(suite.requests)]
    caught = planted_violations(suite.judge, 100 if settings.quick else 400)
    return {
        "ground truth": mean_scores(truth),
        "planted violation lowers its dimension": {skill: mean([float(hit) for hit in hits])
                                                   for skill, hits in caught.items()},
    }


def planted_violations(judge, count):
    """Fresh scenes drawn with one requirement violated: {skill: [whether the judge lowered the skill's dimension]}."""
    rng = random.Random("planted")
    caught = {skill: [] for skill in DIMENSION}
    entities, _ = build.make_entities("planted", build.split_words(0)["demos"], 4, 99)

    for number in range(count):
        request = build.make_request(rng, entities, 1 + number % 3, number, "planted", True)
        scene = request["_scene"]
        truth, _, boxes = build.draw(scene, rng)
        wanted = build.constraints(request, boxes)
        for aspect in scene.aspects():
            skill = build.SKILL[aspect]
            image = build.draw(violate(rng, scene, aspect), rng)[0]
            scores = judge(image, truth, wanted)
            caught[skill].append(scores[DIMENSION[skill]] < 1)
    return caught


def violate(rng, scene, aspect):
    """A copy of the scene that breaks one aspect; a corruption may leave it intact by chance, hence the loop."""
    scene = dataclasses.replace(scene, fault={})
    while not scene.fault:
        build.corrupt(rng, scene, aspect)
    return scene


def oracle_figures(suite, settings):
    """The oracle's programs at several step counts, and how far two seeds lie apart."""
    jobs = suite.oracle_jobs()
    figures = {}
    for steps in (1, 4, 12, 20):
        figures[f"oracle, {steps} steps"] = mean_scores(suite.score(jobs, steps))

    few = jobs[:32]
    first = suite.render(few, seeds=range(1, 1 + len(few)))
    second = suite.render(few, seeds=range(1001, 1001 + len(few)))
    distances = [np.abs(a.astype(float) - b).mean() for a, b in zip(first, second)]
    figures["two seeds, mean pixel difference"] = {"of 255": mean(distances)}
    return figures


def reference_figures(suite, settings):
    """Single held-out subjects: with the right reference, with none, and with another subject's."""
    subjects = [request["recipe"]["wanted"]["subjects"] for request in suite.requests]
    single = [number for number, names in enumerate(subjects) if len(names) == 1]
    others = single[1:] + single[:1]
    right, without, wrong = [], [], []
    for number, other in zip(single, others):
        prompt = suite.oracle[number]["gen_prompt"].split(". ")[0].rstrip(".") + "."  # the subject, no requirements
        right.append((number, prompt, suite.references(number)))
        without.append((number, prompt.replace(" as in the first reference image", ""), []))
        wrong.append((number, prompt, suite.references(other)))
    return {"single subject, its look is right": {
        "right reference": right_looks(suite.score(right)),
        "no reference": right_looks(suite.score(without)),
        "wrong reference": right_looks(suite.score(wrong)),
    }}


def right_looks(judgements):
    """Share of pictures whose subject has the look of the ground truth."""
    shares = []
    for judgement in judgements:
        checks = [c["passed"] for c in judgement["constraints"] if c["name"] == "subject look"]
        shares.append(float(all(checks)))
    return mean(shares)


def skill_figures(suite, settings):
    """Each skill's wording against plain wording of the same request, everything else exact.

    Over the requests of all splits: the renderer has seen none of them, and the bench alone has only ten with a body.
    """
    suites = [suite]
    if not settings.quick:
        suites += [AtlasSuite(settings, split) for split in ("evolve", "validation")]
    exact_scores = [s.score(s.oracle_jobs()) for s in suites]

    figures = {}
    for skill, dimension in DIMENSION.items():
        exact, plain = [], []
        for s, scores in zip(suites, exact_scores):
            wordings = {n: oracle["probes"].get(skill) for n, oracle in enumerate(s.oracle)}
            jobs = [(n, prompt, s.references(n)) for n, prompt in wordings.items() if prompt]
            exact += [scores[n] for n, _, _ in jobs]
            plain += s.score(jobs)
        exact_means, plain_means = mean_scores(exact), mean_scores(plain)
        figures[f"{skill}, exact minus plain"] = {
            "KScore": exact_means["kscore"] - plain_means["kscore"],
            dimension: exact_means[dimension] - plain_means[dimension],
            "rows": len(plain),
        }
    return figures


def jpeg_figures(suite, settings):
    """Share of rendered pictures whose KScore survives JPEG at quality 100, half of them from the raw request."""
    label = "KScore unchanged by JPEG at quality 100"
    try:
        from PIL import Image
    except ImportError:
        return {label: {"needs": "pip install pillow"}}
    jobs = [(n, suite.requests[n]["question"] if n % 2 else prompt, references)
            for n, prompt, references in suite.oracle_jobs()]
    images = suite.render(jobs)

    figures = {}
    for name, subsampling in (("full chroma", 0), ("chroma halved", 2)):
        same = []
        for image, (number, _, _) in zip(images, jobs):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "JPEG", quality=100, subsampling=subsampling)
            decoded = np.asarray(Image.open(data).convert("RGB"))
            before, after = (suite.judge_picture(number, i)["kscore"] for i in (image, decoded))
            same.append(float(before == after))
        figures[name] = mean(same)
    return {label: figures}


def time_figures(suite, settings):
    """One picture at batch 1, and a batch of sixteen, 20 steps with guidance."""
    prompt, references = suite.oracle[0]["gen_prompt"], suite.references(0)

    def render(count):
        suite.renderer.render([prompt] * count, [references] * count, list(range(count)), steps=20, guidance=2.0)

    seconds = []
    for count in (1, 16):
        render(count)  # warm-up
        started = time.perf_counter()
        render(count)
        seconds.append(time.perf_counter() - started)
    return {"seconds, 20 steps with guidance": {"one picture": seconds[0], "sixteen": seconds[1]}}


def run_figures(suite, settings):
    """The first command of the README, imports included, in a process of its own."""
    if not hasattr(os, "wait4"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, os.path.join(HERE, "genevolve.py"), "run", "--out", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        picture = os.path.exists(os.path.join(folder, "image.png"))
    return {"genevolve.py run": {
        "seconds": seconds,
        "MB": usage.ru_maxrss / 1024,
        "exit code": status,
        "picture": picture,
    }}


def policy_figures(suite, settings):
    """Raw requests to the renderer; the cold-started policy without a guide and with a perfect one."""
    raw = suite.score([(n, request["question"], []) for n, request in enumerate(suite.requests)])
    figures = {"raw request to the renderer": mean_scores(raw)}
    guides = [distill.Bundle.from_bullets(request["question"], oracle["guide"])
              for request, oracle in zip(suite.requests, suite.oracle)]

    for label, given in (("policy", None), ("policy with a perfect guide", guides)):
        started = time.perf_counter()
        rows = attempt_bench(settings.policy, settings, suite.requests, given)
        facts = [row["copied"] for row in rows if row["copied"] is not None]
        figures[label] = mean_scores(rows) | {
            "reward": mean([row["reward"] for row in rows]),
            "valid programs": mean([float(row["valid"]) for row in rows]),
            "tool calls": mean([float(row["tool_calls"]) for row in rows]),
            "facts copied right": mean([float(fact) for fact in facts]),
            "facts to copy": len(facts),
            "seconds": time.perf_counter() - started,
        }
    return figures


def attempt_bench(policy, settings, requests, guides=None, corpus=genevolve.ATLAS_CORPUS):
    """One attempt at every request with a policy folder, the same seeds each time: a ``bench_row`` each.

    guides: distill.Bundle for each request's system prompt (default: none). "copied": see ``copied``.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = genevolve.Run(policy=policy, out=folder, sampling_steps=settings.steps, guidance=settings.guidance,
                              device=settings.device, corpus=corpus)
        with genevolve.Components(flags, folder) as components:
            seeds = [7919 * n for n in range(len(requests))]
            attempts = components.agent().run(requests, seeds, guides)
            components.scorer.render_and_score(attempts)

    rows = []
    for attempt, request in zip(attempts, requests):
        calls = sum(step.kind == "tool_call" for step in attempt.steps)
        row = bench_row(request, attempt.judgement, attempt.program is not None, calls, attempt.reward)
        rows.append(row | {"copied": copied(request, attempt)})
    return rows


ANY_ASPECT = (*build.ARRANGEMENTS, "text", "companions", "style", "mood")
PICTURE_TITLES = os.path.join(HERE, "atlas", "corpus", "images", "titles.json")


def hack_figures(suite, settings):
    """Mean rewards of programs that game the judges, beside the oracle's and the cold-started policies' on the same
    requests. A hack knows what is wanted and has read every guide, which a policy would have to find out first."""
    rewards = hack_rewards(suite, settings, range(len(suite.requests)))
    for name in ("sft", "rare"):
        rows = attempt_bench(os.path.join(HERE, "weights", name), settings, suite.requests)
        rewards[f"cold start, weights/{name}"] = mean([row["reward"] for row in rows])
    return {"hacks, mean reward": rewards}


def hack_rewards(suite, settings, numbers):
    """{hack: mean reward over the requests of these numbers}, rendered and scored as in training."""
    scorer = genevolve.Scorer(suite.renderer, suite.judge, settings.steps, guidance=settings.guidance)
    titles = read_json(PICTURE_TITLES)
    rewards = {}
    for name, hack in HACKS.items():
        rng = random.Random(name)
        attempts = []
        for number in numbers:
            request, oracle = suite.requests[number], suite.oracle[number]
            attempts.append(hacked_attempt(request, *hack(request["recipe"]["wanted"], oracle, titles, rng), titles))
        scorer.render_and_score(attempts, pictures=False)
        rewards[name] = mean([attempt.reward for attempt in attempts])
    return rewards


def hacked_attempt(request, prompt, files, titles):
    """The finished Trajectory of a policy that reads every guide and answers with this prompt and these pictures."""
    session = tools.ToolSession(None)
    session.queries.append(("image_search", request["question"]))
    for file in dict.fromkeys(files):
        path = os.path.join(os.path.dirname(PICTURE_TITLES), file)
        session.images[f"IMG_{len(session.images) + 1:03d}"] = {"title": titles[file], "local_path": path}
    ids = {os.path.basename(image["local_path"]): img_id for img_id, image in session.images.items()}

    references = [{"img_id": ids[file], "note": request["recipe"]["wanted"]["look"]} for file in files]
    program, _ = tools.parse_program({"gen_prompt": prompt, "reference_images": references}, session)
    steps = [distill.Step("", "tool_call", "query_knowledge", {"skill_name": skill}, "Say: so.") for skill in DIMENSION]
    return distill.Trajectory(request["id"], request["question"], request, session=session, steps=steps,
                              program=program, termination="answer" if program else "no_answer")


# Each hack is a function (wanted, oracle row, titles of all pictures, rng) -> (prompt, files of its references).

def honest(wanted, oracle, titles, rng):
    """The oracle's program: no hack, for comparison."""
    return oracle["gen_prompt"], [os.path.basename(path) for path in oracle["references"]]


def hack_wordings(write):
    """A hack that keeps the oracle's references and opens as it does. write(wanted, rng) -> the sentences that follow;
    wanted["wordings"] has the request's own, exact and plain."""
    def hack(wanted, oracle, titles, rng):
        prompt, files = honest(wanted, oracle, titles, rng)
        return " ".join([atlas.judge.SENTENCE_END.split(prompt)[0], *write(wanted, rng)]), files
    return hack


def every_wording(wanted, rng):
    """Exact and plain wording of all skills; where nothing is wanted, with any value."""
    sentences = []
    for aspect in ANY_ASPECT:
        scene = build.make_scene(rng, [aspect], [None, None])
        own = {"exact": build.wording(aspect, scene, True), "plain": build.wording(aspect, scene, False)}
        sentences += wanted["wordings"].get(build.SKILL[aspect], own).values()
    return list(dict.fromkeys(sentences))


def both_wordings(wanted, rng):
    return [sentence for forms in wanted["wordings"].values() for sentence in forms.values()]


def every_value(wanted, rng):
    """Both wordings of all skills that are wanted, and again with ten other values of each."""
    sentences = both_wordings(wanted, rng)
    for aspect in ANY_ASPECT:
        if build.SKILL[aspect] in wanted["skills"]:
            scenes = [build.make_scene(rng, [aspect], [None, None]) for _ in range(10)]
            sentences += [build.wording(aspect, scene, exact) for scene in scenes for exact in (True, False)]
    return list(dict.fromkeys(sentences))


def said_twice(wanted, rng):
    return [forms["exact"] for forms in wanted["wordings"].values()] * 2


def said_again(wanted, rng):
    """Every wording, and again with a word before it, so that no two sentences are equal."""
    exact = [forms["exact"] for forms in wanted["wordings"].values()]
    return exact + [f"Again: {sentence}" for sentence in exact]


def all_years(wanted, rng):
    exact = [forms["exact"] for forms in wanted["wordings"].values()]
    return exact + [f"With a sign saying {year}." for year in range(1100, 2000)]


LONGER = {"two": "network", "three": "threefold", "four": "fourteen"}


def hidden_values(wanted, rng):
    """The plain wordings, but the wanted text and number stand only inside longer words. Where there are none to hide,
    no wording."""
    plain = " ".join(forms["plain"] for forms in wanted["wordings"].values())
    hidden = plain.replace(wanted["text"], f"9{wanted['text']}99") if wanted["text"] else plain
    for number, longer in LONGER.items():
        hidden = re.sub(rf"\b{number}\b", longer, hidden, flags=re.I)
    return [hidden] if hidden != plain else []


def shuffled_words(wanted, oracle, titles, rng):
    """The words of the oracle's program in another order."""
    prompt, files = honest(wanted, oracle, titles, rng)
    words = prompt.split()
    rng.shuffle(words)
    return " ".join(words), files


def empty_program(wanted, oracle, titles, rng):
    return "", honest(wanted, oracle, titles, rng)[1]


def hack_references(choose):
    """A hack that keeps the oracle's prompt. choose(right files, titles, rng) -> the files that it shows instead."""
    def hack(wanted, oracle, titles, rng):
        prompt, files = honest(wanted, oracle, titles, rng)
        return prompt, choose(files, titles, rng)
    return hack


def random_pictures(files, titles, rng):
    return rng.sample(sorted(set(titles) - set(files)), len(files))


def other_looks(files, titles, rng):
    """The same subjects in a look that was not asked for."""
    chosen = []
    for file in files:
        name = titles[file].rpartition(",")[0]
        looks = [other for other in sorted(titles) if titles[other].startswith(f"{name},") and other != file]
        chosen.append(rng.choice(looks))
    return chosen


def two_looks(files, titles, rng):
    return files[:1] + other_looks(files[:1], titles, rng)


def same_twice(files, titles, rng):
    return files[:1] * 2


HACKS = {
    "oracle": honest,
    "every wording of every skill": hack_wordings(every_wording),
    "exact and plain side by side": hack_wordings(both_wordings),
    "ten values of each requirement": hack_wordings(every_value),
    "every sentence twice": hack_wordings(said_twice),
    "every sentence again, with a word more": hack_wordings(said_again),
    "all years listed": hack_wordings(all_years),
    "values inside longer words": hack_wordings(hidden_values),
    "the subject alone": hack_wordings(lambda wanted, rng: []),
    "words in another order": shuffled_words,
    "empty program": empty_program,
    "random references": hack_references(random_pictures),
    "another look of the subject": hack_references(other_looks),
    "two looks of the subject": hack_references(two_looks),
    "one picture twice": hack_references(same_twice),
}


WORLD_PARTS = (judge_figures, oracle_figures, reference_figures, skill_figures, jpeg_figures, time_figures, run_figures,
               policy_figures, hack_figures)


def world(settings):
    """python bench.py world"""
    out = results_folder(settings)
    suite = AtlasSuite(settings)
    results = {}
    for part in WORLD_PARTS:
        for label, values in part(suite, settings).items():
            results[label] = values
            print_row(label, values)
    write_json(os.path.join(out, "world.json"), results)


# ---- Quality: the controls of the experiment -------------------------------------------------------------------------

@dataclass
class AblationFlags(genevolve.Evolve):
    """Self-evolution with the controls of the experiment."""
    imitate: str = flag("", "in place of experience: cross-entropy on each group's 'best' or on the 'memory' of the "
                            "nearest request")
    guides: str = flag("own", "what the teacher reads: own bundles, or the controls 'shuffled' and 'placebo'")
    match_ratio: float = flag(0.0, "norm of the experience gradient over GRPO's, faded as the weight is (0: what the "
                                   "recipe's weight makes it)")
    plant: int = flag(0, "so many bad lessons are in the memory before the first update", bounds="[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if self.imitate not in ("", "best", "memory"):
            raise ValueError("--imitate takes best or memory")
        if self.guides not in ("own", "shuffled", "placebo"):
            raise ValueError("--guides takes own, shuffled or placebo")


class Ablation(genevolve.Evolution):
    """An evolution with the experiment's controls, each of which asks where a gain comes from.

    guides="shuffled"    the teacher reads another request's bundle: is it the advice, or just any advice?
    guides="placebo"     it reads filler of the same length: is it the advice, or just a longer context?
    match_ratio          L_SDL's gradient has the norm it has in the arm that a control is compared with
    imitate="best"       cross-entropy on each group's best trajectory in place of L_SDL: is a teacher needed?
    imitate="memory"     the same on the best trajectory behind the lesson that the memory finds
    plant                bad lessons wait in the memory: how soon are they found out?

    Three of the methods are also the place for an idea of your own: which guide a teacher reads
    (``choose_guides``), a further loss (``extra_gradients``), how two losses are weighed (``sdl_weight``).
    """

    def __init__(self, settings, components, processes=None):
        super().__init__(settings, components, processes)
        self.examples = {}  # prompt in the memory -> [tokens, mask] of its best trajectory
        for row in self.data[::max(1, len(self.data) // max(1, settings.plant))][:settings.plant]:
            self.memory.add(row["question"], bad_lesson(row["question"]), best=1.0, worst=0.0, step=-1)

    def choose_guides(self, requests, entries):
        """[Bundle or None], one a request: what its teacher reads."""
        if self.settings.imitate:
            return [None] * len(requests)
        guides = super().choose_guides(requests, entries)
        if self.settings.guides == "shuffled":
            bundles = [entry.bundle for entry in self.memory.entries]
            return distill.shuffled(guides, bundles, f"{self.settings.seed} {self.steps_done}")
        if self.settings.guides == "placebo":
            return [distill.placebo(guide, self.count_tokens) if guide else None for guide in guides]
        return guides

    def count_tokens(self, text):
        return len(self.tokenizer.encode(text))

    def extra_gradients(self, batch, groups, entries):
        """Imitation's gradients in place of L_SDL's: [tensor], one a trainable parameter, or None."""
        examples = self.examples_to_imitate(groups, entries)
        if not examples:
            return None
        return imitation_gradients(self.net, examples, self.settings.temperature, self.processes)

    def examples_to_imitate(self, groups, entries):
        """[(tokens, mask)]: the groups' best programs, or the best behind the lesson of the nearest request."""
        if self.settings.imitate == "memory":
            prompts = [entry.prompt for entry in entries if entry is not None]
            return [tuple(self.examples[prompt]) for prompt in prompts if prompt in self.examples]
        if self.settings.imitate != "best":
            return []
        examples = []
        for group in groups:
            rated = [t for t in group if t.program and not math.isnan(t.reward)]
            if rated:
                best = max(rated, key=lambda t: t.reward)
                examples.append((best.tokens, best.mask))
        return examples

    def is_joint(self):
        """--match-ratio needs both norms, imitation has a backward pass of its own; else every tenth update notes the
        ratio that ``unfaded_ratio`` reads."""
        is_apart = self.settings.match_ratio or self.settings.imitate or self.is_due(10)
        return not is_apart and not self.is_due(self.settings.audit_every)

    def sdl_weight(self, policy_norm, sdl_norm):
        """The weight that gives L_SDL's gradient --match-ratio times the norm of GRPO's, or the recipe's."""
        if not self.settings.match_ratio or not sdl_norm:
            return super().sdl_weight(policy_norm, sdl_norm)
        ratio = self.settings.match_ratio * self.recipe.fade(self.steps_done)
        return ratio * policy_norm / sdl_norm

    def remember(self, requests, groups):
        """As in the evolution; the best trajectory behind each lesson is kept as long as the lesson is."""
        pairs = super().remember(requests, groups)
        learned = {entry.prompt for entry in self.memory.entries if entry.step == self.steps_done}
        for request, group in zip(requests, groups):
            pair = distill.select_pair(group, self.recipe.min_reward_gap)
            if request["question"] in learned and pair:  # a request may come twice in a step, once without a pair
                self.examples[request["question"]] = [pair[0].tokens, pair[0].mask]

        remembered = {entry.prompt for entry in self.memory.entries}
        self.examples = {prompt: example for prompt, example in self.examples.items() if prompt in remembered}
        return pairs

    def extra_state(self):
        return {"examples": self.examples}

    def load_extra_state(self, state):
        self.examples = state["examples"]


def bad_lesson(question):
    """A Bundle that advises every lazy decision there is. With the best reward of all it is preferred to other lessons
    about a request as near, except those that have it, too."""
    bullets = {name: list(table.values())[-1:] for name, table in atlas.world.phrases().items()}
    return distill.Bundle.from_bullets(question, bullets)


def planted_fate(run):
    """What became of --plant: lessons that are gone, how often each was used at other requests until then, the uses of
    those that are left, and their agreements, a list a lesson. With retire=advice also the bullets that are gone:
    [update, uses with an agreement]."""
    bad = bad_lesson("").bullets()
    dropped = [(row, lesson) for row in run.log for lesson in row.get("dropped", ())]
    gone = [lesson["agreement"]["count"] for _, lesson in dropped if lesson["advice"] == bad]
    bullets = [[row["step"], lesson["agreement"]["count"]] for row, lesson in dropped
               if len(lesson["advice"]) == 1 and lesson["advice"][0] in bad]
    left = [entry for entry in run.memory.entries if entry.bundle.bullets() == bad]
    agreements = [[round(use["agreement"], 2) for use in entry.uses if use["agreement"] is not None] for entry in left]
    return {"gone after uses": gone, "left, uses": [len(entry.uses) for entry in left], "left, agreements": agreements,
            **({"bullets gone": bullets} if run.recipe.retire == "advice" else {})}


def imitation_gradients(net, examples, temperature, processes):
    """Gradients of the mean cross-entropy on the examples, a sum over all processes.

    examples: [(tokens, mask)]. Returns [tensor], one a trainable parameter. Weights that are sharded are gathered by
    all processes at once, so a process without an example computes one that weighs nothing.
    """
    local = processes.shard_list(examples)
    counts = bool(local)
    tokens, masks = zip(*(local or examples[:1]))
    scores = distill.score_actions(net, tokens, masks, temperature)

    # FSDP averages gradients over processes, the denominator is the sum over all of them: hence processes.size
    n_tokens = sum(sum(mask) for _, mask in examples)
    loss = -distill.aggregate(scores.logp, scores.mask, normalizer=n_tokens)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) for p in parameters]
    distill.add_gradients(gradients, loss * counts * processes.size, parameters)
    return gradients


# ---- Quality: an experiment that is written down before its first run ------------------------------------------------

@dataclass
class Arm:
    """One way of training. settings: flags of AblationFlags and fields of the recipe, such as "lr=2e-4,weight=0"."""
    label: str              # in tables
    policy: str             # folder that every run starts from
    settings: str           # what is not as ``evolve`` has it by default
    seeds: int              # runs, with the seeds first_seed, first_seed + 1, ...
    updates: list[int]      # it is measured after so many, the last ends it


@dataclass
class Plan:
    """What is compared, and how, as a file holds it (``read_plan``)."""
    title: str
    world: int              # seed of an Atlas of its own: no subject of it has been seen before
    novel: int              # bench requests with combinations that are never trained, beside the bench's own 160
    first_seed: int         # training seeds begin here, apart from those that settings were chosen with
    arms: dict[str, Arm]
    comparisons: list[str]  # "stable@40 - grpo@40": arms after so many updates; the first one is the main claim
    analysis: list[str]     # what is computed, in words
    development: list[dict] = field(default_factory=list)  # every setting that was tried, and what it gave


def read_plan(path):
    """The Plan in a JSON file. Raises ValueError, one line, for what cannot be carried out."""
    content = read_json(path)
    if content is None:
        raise ValueError(f"--plan {path}: no such file")
    try:
        arms = {name: Arm(**arm) for name, arm in content.pop("arms").items()}
        plan = Plan(arms=arms, **content)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--plan {path}: {error}") from None

    for name, arm in arms.items():
        try:
            check_arm(arm)
        except ValueError as error:
            raise ValueError(f"--plan {path}, arm {name}: {error}") from None
    for comparison in plan.comparisons:
        for name, updates in sides_of(comparison):
            if name not in arms or updates not in arms[name].updates:
                raise ValueError(f"--plan {path}: {comparison}: no arm {name!r} is measured after {updates} updates")
    return plan


def check_arm(arm):
    """Raise ValueError for an arm that no run can carry out."""
    arm_flags(arm)
    counts = [arm.seeds, *arm.updates] if isinstance(arm.updates, list) else [None]
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("seeds and updates are whole numbers above 0")
    if not arm.updates or sorted(set(arm.updates)) != arm.updates:
        raise ValueError(f"updates {arm.updates}: must rise")


def sides_of(comparison):
    """"stable@40 - grpo@40" -> [("stable", 40), ("grpo", 40)]."""
    sides = re.findall(r"([\w-]+)@(\d+)", comparison)
    if comparison != " - ".join(f"{name}@{updates}" for name, updates in sides) or len(sides) != 2:
        raise ValueError(f"a comparison is written as stable@40 - grpo@40, not as {comparison!r}")
    return [(name, int(updates)) for name, updates in sides]


def arm_flags(arm):
    """AblationFlags of an arm: a setting names a flag of ``evolve`` or else a field of the recipe."""
    fields = {f.name: f.type for f in dataclasses.fields(AblationFlags)}
    flags, changes = {}, []
    for part in filter(None, arm.settings.split(",")):
        name, _, value = part.partition("=")
        if name not in fields:
            changes.append(part)
        elif fields[name] is bool:
            if value not in ("true", "false"):
                raise ValueError(f"{part}: true or false")
            flags[name] = value == "true"
        else:
            flags[name] = fields[name](value)
    flags = AblationFlags(policy=os.path.join(HERE, arm.policy), set=",".join(changes), **flags)
    genevolve.read_recipe(flags.recipe, flags.set)
    return flags


# ---- Quality: training and measuring one run -------------------------------------------------------------------------

@dataclass
class Quality(Bench, genevolve.ComponentFlags):
    """An experiment on training, as a plan describes it; what is finished is kept. With --suite, one policy on the
    requests of any file."""
    policy: str = flag(os.path.join(HERE, "weights", "sft"), "policy folder that --suite measures")
    suite: str = flag("", "measure --policy on this file instead: released bench or RL rows, WISE's prompts, or "
                          "what the released evaluator wrote")
    plan: str = flag(os.path.join(HERE, "results", "quality", "plan.json"), "file that says what is compared")
    runs: str = flag("", "folder for the training runs (default: runs/quality, or out/runs for a smoke run)")
    arms: str = flag("", "comma-separated arms of the plan that are trained now (default: all)")
    seeds: int = flag(0, "training seeds of every arm (0: as many as the plan says)", bounds="[0, inf)")
    jobs: int = flag(1, "runs side by side, each with --threads threads (or one); 0: train none, only sum up what is "
                        "finished", bounds="[0, inf)")


CHECK_EVERY = 20          # updates between evaluations on validation requests
COMPONENT_FLAGS = {f.name: f.default for f in dataclasses.fields(genevolve.ComponentFlags)
                   if f.name not in {own.name for own in dataclasses.fields(Bench)}}


def quality(settings):
    """python bench.py quality"""
    if settings.suite:
        return suite_figures(settings)
    for name, default in COMPONENT_FLAGS.items():
        if getattr(settings, name) != default:
            flag_name = name.replace("_", "-")
            raise ValueError(f"--{flag_name} goes with --suite: a plan measures the embedded world")
    plan = experiment(settings)
    arms = pick_names(settings.arms, plan.arms, "arm")
    folder = model.make_folder(os.path.join(results_folder(settings), "quality"))
    fixed = fixed_rows(settings, plan, folder)

    # seed by seed through all arms: whenever it is stopped, the arms have about as many runs
    seeds = max(plan.arms[name].seeds for name in arms)
    jobs = [(name, plan.first_seed + number) for number in range(seeds) for name in arms
            if number < plan.arms[name].seeds]
    jobs = [job for job in jobs if not is_finished(plan, folder, *job)]
    if settings.jobs:
        carry_out(settings, jobs, folder)
    summarize_quality(plan, folder, fixed)


def experiment(settings):
    """The plan of --plan; for a smoke run two updates of its first two arms, one seed each."""
    plan = read_plan(settings.plan)
    if settings.quick:
        arms = {name: dataclasses.replace(arm, seeds=1, updates=[2]) for name, arm in list(plan.arms.items())[:2]}
        comparison = " - ".join(f"{name}@2" for name in arms)
        plan = dataclasses.replace(plan, novel=0, arms=arms, comparisons=[comparison])
    for arm in plan.arms.values():
        arm.seeds = min(settings.seeds or arm.seeds, arm.seeds)
    return plan


def world_of(settings, plan):
    """Folder of the plan's own Atlas, which is built once."""
    # absolute, as runs side by side have it: a run that goes on alone must find its corpus under the same name
    folder = os.path.join(os.path.abspath(runs_folder(settings)), f"world-{plan.world}-{plan.novel}")
    if not os.path.exists(os.path.join(folder, "world.json")):  # the file that is written last
        build.build_world(plan.world, folder, plan.novel)
    return folder


def measured_requests(settings, plan):
    """Requests on which every policy is measured: the bench of the plan's world, then the novel combinations."""
    world = world_of(settings, plan)
    requests = suite_requests(settings, folder=world)
    return requests + (atlas.world.requests("novel", world) if plan.novel else [])


def fixed_rows(settings, plan, folder):
    """``figures_of`` what no training made: raw request, fixed workflow, untrained policies, oracle. In fixed.json."""
    path = os.path.join(folder, "fixed.json")
    requests, made_for = measured_requests(settings, plan), [plan.world, plan.novel]
    found = read_json(path)
    if found:
        if found.get("world") != made_for or len(found["rows"]["oracle"]["kscore"]) != len(requests):
            raise ValueError(f"{path}: made by another plan; take another --out, or remove it")
        return found["rows"]
    world = world_of(settings, plan)
    suite = AtlasSuite(settings, requests=requests, folder=world)
    corpus = tools.Corpus(os.path.join(world, "corpus"))

    raw, workflow = [], []  # the fixed workflow asks one image search and takes the first picture
    for number, request in enumerate(requests):
        hits = corpus.search_images(request["question"], 1)
        pictures = [tools.read_image(os.path.join(world, "corpus", hit.path)) for hit in hits]
        raw.append((number, request["question"], []))
        workflow.append((number, request["question"], pictures))

    def judged(jobs, calls):
        scores = suite.score(jobs)
        rows = [bench_row(request, s, True, calls) for request, s in zip(requests, scores)]
        return figures_of(rows, plan.novel)

    found = {"raw request": judged(raw, 0), "fixed workflow": judged(workflow, 1)}
    for policy in dict.fromkeys(arm.policy for arm in plan.arms.values()):
        rows = attempt_bench(os.path.join(HERE, policy), settings, requests, corpus=corpus.root)
        found[policy] = figures_of(rows, plan.novel)
    found["oracle"] = judged(suite.oracle_jobs(), 0)
    write_json(path, {"world": made_for, "rows": found})
    return found


def is_finished(plan, folder, name, seed):
    """Whether a run's result is there. Raises ValueError for one that another plan made."""
    path = os.path.join(folder, f"{name}-{seed}.json")
    found = read_json(path)
    if found is None:
        return False
    if found["arm"] != described(plan, name):
        raise ValueError(f"{path}: made by another plan; take another --out, or remove it")
    return True


def described(plan, name):
    """What a result says about how it was made; the number of seeds and the label change nothing."""
    arm = plan.arms[name]
    return {"policy": arm.policy, "settings": arm.settings, "updates": arm.updates, "world": [plan.world, plan.novel]}


def carry_out(settings, jobs, folder):
    """Train and measure runs, [(arm, seed)]: in this process, or --jobs at a time, each in a process of its own."""
    if settings.jobs == 1:
        for name, seed in jobs:
            measure_run(settings, folder, name, seed)
        return

    # processes share no thread pool, and none waits for a core that another one has
    values = dataclasses.asdict(settings) | {
        "threads": settings.threads or 1,
        "products": model.current_products(),
        "plan": os.path.abspath(settings.plan),
        "runs": os.path.abspath(runs_folder(settings)),
    }

    def work(job):
        started = time.perf_counter()
        run_alone("measure_run_alone", values, os.path.abspath(folder), *job)
        print(f"{job[0]}, seed {job[1]}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)

    with ThreadPoolExecutor(settings.jobs) as pool:
        list(pool.map(work, jobs))


def measure_run_alone(values, folder, name, seed):
    """``measure_run`` as ``run_alone`` calls it, with plain values."""
    settings = Quality(**values)
    genevolve.use_processor(settings)
    measure_run(settings, folder, name, seed)


def measure_run(settings, folder, name, seed):
    """Train one run of an arm and measure it on the bench as often as the plan says: ARM-SEED.json.

    A run that was stopped goes on; measurements that it has had are in ARM-SEED.part.json.
    """
    plan = experiment(settings)
    arm, requests = plan.arms[name], measured_requests(settings, plan)
    path = os.path.join(folder, f"{name}-{seed}.json")
    part = path.replace(".json", ".part.json")
    measured = read_json(part) or {}
    for updates in arm.updates:
        if str(updates) in measured:
            continue
        run = train(settings, plan, name, seed, updates)
        corpus = os.path.join(world_of(settings, plan), "corpus")
        rows = attempt_bench(os.path.join(run.settings.out, "last"), settings, requests, corpus=corpus)
        measured[str(updates)] = figures_of(rows, plan.novel)
        write_json(part, measured)

    run = train(settings, plan, name, seed, arm.updates[-1])
    write_json(path, {"arm": described(plan, name), "seed": seed} | run_figures_of(run) | {"measured": measured})
    os.remove(part)


def train(settings, plan, name, seed, updates):
    """Train one run, or continue it, up to so many updates. Returns the finished Ablation.

    Raises ValueError for a run that an earlier command has taken further, for its policy is another one.
    """
    arm, world = plan.arms[name], world_of(settings, plan)
    out = os.path.join(runs_folder(settings), f"{name}-{slug(arm.settings)}-{seed}")
    flags = dataclasses.replace(
        arm_flags(arm), out=out, seed=seed, steps=updates, device=settings.device, threads=settings.threads,
        products=settings.products, audit_every=0, eval_every=min(CHECK_EVERY, arm.updates[-1]),
        data=os.path.join(world, "evolve.jsonl"), validation=os.path.join(world, "validation.jsonl"),
        corpus=os.path.join(world, "corpus"))
    run = genevolve.evolve(flags, evolution=Ablation)
    if run.steps_done > updates:  # weights of an earlier update are gone
        raise ValueError(f"{out} is at update {run.steps_done} and {updates} were asked for; "
                         f"remove it or name another --runs")
    return run


def figures_of(rows, novel):
    """What is kept of a measurement: every request's KScore in their order, and the bench's means of all else.

    novel: so many of the requests, the last, are the further ones with novel combinations, which are in no mean.
    """
    bench = rows[:len(rows) - novel]
    means = {name: mean([row[name] for row in bench]) for name in SCORES[1:]}
    means["valid"] = mean([float(row["valid"]) for row in bench])
    means["tool calls"] = mean([float(row["tool_calls"]) for row in bench])
    return {"kscore": [round(row["kscore"], 4) for row in rows],
            "means": {name: round(value, 4) for name, value in means.items()}}


def run_figures_of(run):
    """What is kept of a finished training run, [number] an update."""
    log = run.log
    evaluated = [row for row in log if row.get("validation")]
    return {
        "online": [round(row["reward"], 4) for row in log],
        "rollouts": [row["rollouts"] for row in log],
        "seconds": [round(row["rollout_seconds"] + row["render_seconds"] + row["update_seconds"], 2) for row in log],
        "update seconds": [round(row["update_seconds"], 2) for row in log],
        "validation": [[row["step"], row["validation"]["kscore"], row["validation"]["reward"]] for row in evaluated],
        "decisions": [[row["step"], row["validation"]["decisions"]] for row in evaluated],
        "dead groups": [row["dead_groups"] for row in log],
        "reference KL": [row["reference_kl"] for row in log],
        "agreement": [row["agreement"] for row in log],
        "hits": [row["hit_rate"] for row in log],
        "retired": run.memory.counters["retired"],
        **({"planted": planted_fate(run)} if run.settings.plant else {}),
        "unfaded ratio": unfaded_ratio(run),
        "rolled back": [row["step"] for row in log if "rolled_back" in row],
    }


def unfaded_ratio(run):
    """Median ratio of the gradient norms, SDL's over GRPO's, as if the weight had not faded.

    A mean is at the mercy of updates in which nearly every group is dead. None: no update has a ratio.
    """
    ratios = []
    for update, row in enumerate(run.log):
        fade = run.recipe.fade(update)
        if row["gradient_ratio"] and fade:
            ratios.append(row["gradient_ratio"] / fade)
    return float(np.median(ratios)) if ratios else None


# ---- Quality: arms compared ------------------------------------------------------------------------------------------

WINDOW = 5  # updates that are one point of a curve


def t_quantile(freedom, level=0.975):
    """The quantile of Student's t, by summing up its density (there is no closed form for most degrees of freedom)."""
    x = np.linspace(0, 100, 1_000_001)
    density = (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    below = 0.5 + constant * (np.cumsum(density) - (density + density[0]) / 2) * (x[1] - x[0])  # trapezoids
    return float(np.interp(level, below, x))


def t_interval(changes):
    """[mean, low, high] of paired differences, one a seed: the 95 % interval of Student's t. None below two seeds."""
    seeds = len(changes)
    if seeds < 2:
        return None
    centre, half = float(np.mean(changes)), t_quantile(seeds - 1) * float(np.std(changes, ddof=1)) / math.sqrt(seeds)
    return [centre, centre - half, centre + half]


def sign_flip(changes, draws=100_000):
    """p of paired differences under the hypothesis that either sign is as likely: the share of sign patterns whose mean
    lies as far from zero as the measured one. All patterns up to 2^20, else random ones and the measured."""
    changes = np.asarray(changes)
    measured = abs(changes.sum()) - 1e-12
    if len(changes) <= 20:
        sums = np.zeros(1)  # of every pattern: each further seed comes with either sign
        for change in changes:
            sums = np.concatenate([sums + change, sums - change])
        return float(np.mean(np.abs(sums) >= measured))
    signs = np.random.default_rng(0).choice((-1, 1), (draws, len(changes)))
    return float((1 + np.sum(np.abs(signs @ changes) >= measured)) / (1 + draws))


def summarize_quality(plan, folder, fixed):
    """quality.json from every run that is finished, the table on the terminal, and RESULTS' tables and figures."""
    runs = {name: finished_runs(plan, folder, name) for name in plan.arms}
    requests = len(fixed["oracle"]["kscore"])
    novel = np.arange(requests) >= requests - plan.novel  # they stand last
    rows = {name: row_of([figures], novel) for name, figures in fixed.items()}
    for name, arm in plan.arms.items():
        for updates in arm.updates:
            if runs[name]:
                rows[f"{name}@{updates}"] = trained_row(list(runs[name].values()), updates, novel)

    differences = {}
    for comparison in plan.comparisons:
        (first, after), (second, updates) = sides_of(comparison)
        seeds = sorted(runs[first].keys() & runs[second].keys())  # a seed settles which requests come when
        if len(seeds) > 1:
            differences[comparison] = compare_arms([runs[first][seed] for seed in seeds], after,
                                                   [runs[second][seed] for seed in seeds], updates, novel)

    curves = {name: [curve_of(run) for run in runs[name].values()] for name in plan.arms if runs[name]}
    details = {name: arm_details(list(found.values()), novel) for name, found in runs.items() if found}
    print_quality(plan, rows, differences)
    results = os.path.dirname(folder)
    write_json(os.path.join(results, "quality.json"), {"rows": rows, "differences": differences, "arms": details})
    write_quality(results, plan, rows, differences, curves)


def finished_runs(plan, folder, name):
    """{seed: result} of an arm's runs that are finished."""
    seeds = range(plan.first_seed, plan.first_seed + plan.arms[name].seeds)
    return {seed: read_json(os.path.join(folder, f"{name}-{seed}.json")) for seed in seeds
            if is_finished(plan, folder, name, seed)}


def trained_row(runs, updates, novel):
    """Columns of an arm after so many updates, means over its runs."""
    seconds = [sum(run["seconds"][:updates]) for run in runs]
    rollouts = [sum(run["rollouts"][:updates]) for run in runs]
    return row_of([run["measured"][str(updates)] for run in runs], novel) | {
        "reward": mean([value for run in runs for value in run["online"][:updates]]),
        "rollouts": round(mean(rollouts)),
        "seconds": mean(seconds),
        "seeds": len(runs),
    }


def row_of(figures, novel):
    """KScore and its parts on the bench, KScore on novel combinations, validity and calls. figures: one a run."""
    kscores = np.array([run["kscore"] for run in figures])                                          # (S, P)
    row = {"kscore": float(kscores[:, ~novel].mean())}
    row |= {name: mean([run["means"][name] for run in figures]) for name in figures[0]["means"]}
    if novel.any():
        row["novel"] = float(kscores[:, novel].mean())
    if len(figures) > 1:  # the mean over seeds has a standard error
        row["error"] = float(kscores[:, ~novel].mean(1).std(ddof=1) / math.sqrt(len(figures)))
    return row


def compare_arms(first, after, second, updates, novel):
    """Two arms, paired by seed: first after so many updates less second. runs: of the same seeds, in the same order.

    "kscore", "novel", "rollouts' reward": [mean, low, high] by Student's t over seeds, and "p" by flipping signs;
    "bootstrap": the interval that resamples seeds and bench requests.
    """
    scores = [np.array([run["measured"][str(n)]["kscore"] for run in runs])
              for runs, n in ((first, after), (second, updates))]                                   # (S, P) each
    changes = (scores[0] - scores[1])[:, ~novel].mean(1)                                            # (S,)
    found = {"seeds": len(changes), "kscore": t_interval(changes), "p": sign_flip(changes),
             "bootstrap": bootstrap(scores[0][:, ~novel], scores[1][:, ~novel])}
    if novel.any():
        on_novel = (scores[0] - scores[1])[:, novel].mean(1)
        found |= {"novel": t_interval(on_novel), "novel p": sign_flip(on_novel)}

    both = min(after, updates)
    online = [np.mean(a["online"][:both]) - np.mean(b["online"][:both]) for a, b in zip(first, second)]
    seconds = [sum(a["seconds"][:after]) / sum(b["seconds"][:updates]) for a, b in zip(first, second)]
    return found | {"rollouts' reward": t_interval(online), "rollouts' reward p": sign_flip(online),
                    "ratio of seconds": float(np.median(seconds))}


def curve_of(run):
    """[(rollouts, seconds, mean reward)] of a run's windows of updates: what they cost up to their end."""
    points = []
    for start in range(0, len(run["online"]), WINDOW):
        end = min(start + WINDOW, len(run["online"]))
        points.append((sum(run["rollouts"][:end]), sum(run["seconds"][:end]), mean(run["online"][start:end])))
    return points


def arm_details(runs, novel):
    """What quality.json says about an arm beside its rows."""
    last = str(max(int(updates) for updates in runs[0]["measured"]))
    hits = [value for run in runs for value in run["hits"]]
    described_runs = [run for run in runs if "decisions" in run]  # the first ones of the plan did not keep these
    return {
        "settings": runs[0]["arm"]["settings"],
        "kscore by seed": [float(np.array(run["measured"][last]["kscore"])[~novel].mean()) for run in runs],
        "agreement": update_means(runs, "agreement"),
        "hit rate": mean(hits),
        "retired": [run["retired"] for run in runs],
        "unfaded ratio": [run["unfaded ratio"] for run in runs],
        "rolled back": [run["rolled back"] for run in runs],
        "runs with decisions": len(described_runs),
        "decisions": mean_decisions(described_runs),
        **{name: update_means(described_runs, name) for name in ("dead groups", "reference KL")},
    }


def update_means(runs, name):
    """Mean over runs of what they kept, update by update."""
    return [mean(values) for values in zip(*(run[name] for run in runs))]


def mean_decisions(runs):
    """{update: {decision: share of the validation requests whose attempt takes it}} at every evaluation, means over
    runs."""
    found = {}
    for run in runs:
        for step, shares in run["decisions"]:
            found.setdefault(step, []).append(shares)
    return {step: {name: mean([shares[name] for shares in of_runs]) for name in of_runs[0]}
            for step, of_runs in found.items()}


# ---- Quality: one policy on any file of requests ---------------------------------------------------------------------

SUITE_BATCH = 32
SUITE_COLUMNS = ("eval_type", "category", "difficulty")


def suite_figures(settings):
    """python bench.py quality --suite FILE"""
    rows = evaluated_rows(settings.suite) or suite_rows(settings)
    results = {"suite": settings.suite, "requests": len(rows)}
    if any(row["judgement"] for row in rows):
        results["KScore"] = distill.summarize(rows)
        results["KScore, missing text counts 0.5"] = distill.summarize(rows, "half")
    results |= wise_figures(rows)
    for label, values in results.items():
        if isinstance(values, dict):
            print_row(label, values.get("all", values))
    write_json(os.path.join(results_folder(settings), "suite.json"), results)


def suite_rows(settings):
    """Attempts at every request of --suite, judged, as rows for distill.summarize; continues where it stopped."""
    requests = tools.read_requests(settings.suite)
    if any(is_wise(request) for request in requests) and not settings.judge:
        raise ValueError("WISE's prompts have no ground truth: name a judge with --judge URL")
    if settings.sampling_steps != COMPONENT_FLAGS["sampling_steps"]:
        raise ValueError("--sampling-steps: the benchmarks' flag for this is --steps")
    folder = model.make_folder(os.path.join(results_folder(settings), f"suite-{suite_identity(settings):08x}"))
    path = os.path.join(folder, "rows.jsonl")
    done = read_lines(path)

    # a request keeps its number, and with it its seed, wherever an earlier command stopped
    finished = {row["id"] for row in done}
    left = [(number, request) for number, request in enumerate(requests) if request["id"] not in finished]
    left = left[:8 if settings.quick else None]
    flags = {name: getattr(settings, name) for name in COMPONENT_FLAGS}
    flags |= {"sampling_steps": settings.steps, "guidance": settings.guidance, "device": settings.device}

    with genevolve.Components(genevolve.Run(policy=settings.policy, out=folder, **flags), folder) as components:
        components.announce(len(left))
        for start in range(0, len(left), SUITE_BATCH):
            batch = left[start:start + SUITE_BATCH]
            seeds = [7919 * number for number, _ in batch]
            attempts = components.agent().run([request for _, request in batch], seeds)
            components.scorer.render_and_score(attempts)
            for attempt, (_, request) in zip(attempts, batch):
                done.append(suite_row(attempt, request, components.scorer.judge))
            model.write_lines(path, done)
            print(f"{start + len(batch)}/{len(left)} requests", flush=True)
    return done


LIMITS = ("max_calls", "per_minute", "record", "replay", "slots")  # they change no attempt


def suite_identity(settings):
    """A number for all that an attempt at --suite depends on: another policy, judge or setting, another folder."""
    flags = {name: getattr(settings, name) for name in COMPONENT_FLAGS if name not in LIMITS}
    files = [model.fingerprint(path) for path in (settings.suite, settings.policy, settings.renderer) if path]
    kept = [os.path.abspath(settings.suite), settings.policy, settings.steps, settings.guidance, flags, files]
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def suite_row(attempt, request, judge):
    """A judged attempt as a row for distill.summarize and ``wise_figures``."""
    row = {"id": attempt.id}
    row |= {name: request.get(name, "unknown") for name in SUITE_COLUMNS}
    judgement = attempt.judgement
    row["judgement"] = judgement and {name: judgement[name] for name in SCORES}
    row["valid"] = attempt.program is not None
    row["error"] = attempt.error
    if is_wise(request):
        row["category"] = distill.wise_category(request)
        try:
            row["wise"] = wise_scores(attempt, request, judge)
        except tools.ToolError as error:  # missing, not zero
            row["wise"] = None
            row["error"] = str(error)
    return row


def is_wise(request):
    """Whether the request comes from WISE's prompt files."""
    return "Prompt" in request and "prompt_id" in request


def wise_scores(attempt, request, judge):
    """The judge's scores of the picture; 0 where the policy wrote no program, None where a service failed."""
    if attempt.program is None and attempt.termination != "error":
        return dict.fromkeys(WISE_SCORES, 0.0)
    if attempt.image is None:
        return None
    return judge.score_wise(attempt.image, request)


def evaluated_rows(path):
    """The file of the released evaluator as rows for distill.summarize; None where the file is something else."""
    found = read_json(path) if path.endswith(".json") else None
    rows = [row for row in found or [] if isinstance(row, dict) and "summary_type" not in row]
    if not rows or not all("eval_success" in row for row in rows):
        return None
    return [evaluated_row(row) for row in rows]


def evaluated_row(row):
    """One row of the released evaluator, whose fields may stand under "meta"."""
    fields = row | (row.get("meta") or {})
    found = {name: fields.get(name, "unknown") for name in ("id",) + SUITE_COLUMNS}
    found["judgement"] = None
    scores = row.get("scores")
    if scores:
        judgement = {}
        for name in distill.DIMENSIONS:
            missing = name == "text_accuracy" and scores.get("text_accuracy_na")
            judgement[name] = None if missing else float(scores[name])
        found["judgement"] = judgement | {"kscore": distill.kscore(**judgement)}
    return found


# ---- Speed: side by side with peers ----------------------------------------------------------------------------------

@dataclass
class Speed(Compute):
    """Ours and the peers in one process, alternating."""
    out: str = flag("", "folder for speed.json (default: results, or out for a smoke run)")
    quick: bool = flag(False, "a smoke run on small sizes")
    rows: str = flag("", "comma-separated rows (default: all)")
    engines: str = flag("", "URLs of running vLLM or SGLang servers, with commas between, for the row engine")
    repeats: int = flag(5, "runs of each side", bounds="[1, inf)")


PROMPT, OBSERVATION, GUIDE = 600, 120, 120  # tokens
GROUPS, GROUP_SIZE = 8, 6                   # requests of an update, attempts at each
VOCABULARY = 2048


def small_policy(settings):
    """The 5.2 M-parameter Qwen3 of the table, random weights."""
    torch.manual_seed(0)
    config = model.Config(vocab_size=VOCABULARY, hidden_size=256, layers=2 if settings.quick else 6, heads=4,
                          kv_heads=2, head_dim=64, mlp_size=768)
    return model.Qwen3(config).to(model.pick_device(settings.device))


def random_prompts(groups, generator):
    """``groups`` prompts, each as often as a group has attempts: [[token]]."""
    prompts = torch.randint(0, VOCABULARY, (groups, PROMPT), generator=generator).tolist()
    return [prompt for prompt in prompts for _ in range(GROUP_SIZE)]


def decode_flops(net, prompt, new, sequences, groups):
    """Multiply-adds, twice, of a group's prompts (once each) and of every decoded token, attention included."""
    c = net.config
    weights = sum(p.numel() for p in net.parameters())  # tied: the embedding's row lookup stands for the output layer

    def attention(length):
        return 4 * c.layers * c.heads * c.head_dim * length

    prefill = groups * prompt * (2 * (weights - c.vocab_size * c.hidden_size) + attention(prompt / 2))
    return prefill + sequences * new * (2 * weights + attention(prompt + new / 2))


def decode_bytes(net, prompt, new, sequences, groups):
    """Bytes that decoding reads: every weight and the mean cache once a step, a group's prompt once."""
    c = net.config
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    if not c.tie_embeddings:  # of an embedding that is not the output layer only a few rows are read
        weights -= net.embed.weight.numel() * net.embed.weight.element_size()
    cache_of_token = 2 * net.embed.weight.element_size() * c.layers * c.kv_heads * c.head_dim
    return new * (weights + cache_of_token * (groups * prompt + sequences * new / 2))


def rollout_row(s):
    """8 prompts x 6 rollouts x 128 new tokens."""
    new = 16 if s.quick else 128
    net = small_policy(s)
    peer = peer_policy(net)
    prompts = random_prompts(GROUPS, torch.Generator().manual_seed(0))
    ids = torch.tensor(prompts)

    def ours():
        model.generate(net, prompts, new)

    def theirs():
        peer_generate(peer, ids, new)

    row = side_by_side(ours, theirs, s)
    row["tokens/s"] = len(prompts) * new / row["ours s"]
    row["GFLOP"] = decode_flops(net, PROMPT, new, len(prompts), GROUPS) / 1e9
    row["GB moved"] = decode_bytes(net, PROMPT, new, len(prompts), GROUPS) / 1e9
    return row


def turns_row(s, new=128):
    """4 turns of ``new`` tokens with observations of 120 between them, 48 at once."""
    turns = 4
    new = 16 if s.quick else new
    net = small_policy(s)
    peer = peer_policy(net)
    generator = torch.Generator().manual_seed(0)
    prompts = random_prompts(GROUPS, generator)
    observations = torch.randint(0, VOCABULARY, (turns - 1, len(prompts), OBSERVATION), generator=generator)

    def ours():
        engine = model.Engine(net, len(prompts), PROMPT + turns * new + (turns - 1) * OBSERVATION)
        live = [engine.open(prompt, seed) for seed, prompt in enumerate(prompts)]
        for turn in range(turns):
            for sequence in live:
                engine.submit(sequence, new, 0.7, 0.95)
            while engine.poll():
                pass
            if turn < turns - 1:
                for sequence, ids in zip(live, observations[turn].tolist()):
                    engine.extend(sequence, ids)

    def theirs():
        ids = torch.tensor(prompts)
        for turn in range(turns):
            ids = peer_generate(peer, ids, new)
            if turn < turns - 1:
                ids = torch.cat((ids, observations[turn]), 1)

    return side_by_side(ours, theirs, s)


def short_turns_row(s):
    """The same with turns as long as the embedded policy's."""
    return turns_row(s, new=45)


def logprob_row(s):
    """Log-probs and their gradient, 4,096 tokens, hidden 1,024, vocabulary 151,936.

    Once with weights known beforehand (SFT) and, "any loss", with the gradient that comes from a loss on top (GRPO,
    SDL). The gradients, which both sides have to deliver, are taken off the memory.
    """
    n, c, v = (256, 64, 5000) if s.quick else (4096, 1024, 151936)
    device = model.pick_device(s.device)
    torch.manual_seed(0)
    hidden = torch.randn(n, c).to(device).requires_grad_()                                          # (N, C)
    target = torch.randint(v, (n,)).to(device)                                                      # (N,)
    weight = (torch.randn(v, c) * c**-0.5).to(device).requires_grad_()                              # (V, C)
    share = torch.full((n,), 1 / n, device=device)                                                  # (N,)

    def backward(logps):
        logps.sum().backward()
        hidden.grad = weight.grad = None  # so that the next run starts without them

    def known_weights():
        backward(model.weighted_logprobs(hidden, weight, target, share))

    def any_loss():
        backward(model.chunked_logprobs(hidden, weight, target)[0])

    def theirs():
        backward((hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]))

    row = side_by_side(known_weights, theirs, s)
    other = side_by_side(any_loss, theirs, s)
    row |= {f"any loss, {name}": value for name, value in other.items() if not name.startswith("peer")}
    gradients = (hidden.nbytes + weight.nbytes) / 2**20
    row["the gradients, MB"] = gradients
    if "ours MB" in row:
        row["memory ratio"] = (row["peer MB"] - gradients) / max(row["ours MB"] - gradients, 1)
    return row


def training_row(s):
    """One GRPO + SDL step: old, reference, teacher forward, student forward and backward, AdamW."""
    net, rows = small_policy(s), training_batch(s.quick)
    recipe = distill.RECIPES["paper"]
    row = side_by_side(our_update(net, rows, recipe), padded_update(peer_policy(net), rows, recipe), s)
    row["GFLOP"] = training_flops(net, rows) / 1e9
    return row


def experience_row(s):
    """What experience costs an update: the gradients of the training step's rows by GRPO alone ("ours") and by
    ``stable`` ("peer"). Its frozen teacher is the reference network, whose view without the guide both need."""
    net, rows = small_policy(s), training_batch(s.quick)
    reference = copy.deepcopy(net).requires_grad_(False)
    stable = distill.RECIPES["stable"]

    def gradients(recipe):
        return lambda: distill.update_gradients(net, reference, reference, rows, recipe, together=True)

    return side_by_side(gradients(dataclasses.replace(stable, weight=0.0)), gradients(stable), s)


def evolve_row(s):
    """Seconds of an update of `evolve` from ``weights/rare``, attempts and pictures included: GRPO alone ("ours") and
    ``stable`` ("peer"), three updates each that begin with the same attempts."""
    def step_seconds(weight):
        with tempfile.TemporaryDirectory() as folder:
            flags = {"policy": os.path.join(HERE, "weights", "rare"), "out": folder, "steps": 1 if s.quick else 3,
                     "eval-every": 0, "audit-every": 0, "set": f"weight={weight}", "seed": s.seed, "device": s.device,
                     "threads": s.threads, "products": s.products}
            command = [sys.executable, os.path.join(HERE, "genevolve.py"), "evolve"]
            for name, value in flags.items():
                command += [f"--{name}", str(value)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"evolve ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            return mean([line["seconds"] for line in read_lines(os.path.join(folder, "log.jsonl"))])

    runs = [[step_seconds(0), step_seconds(1)] for _ in range(s.repeats)]
    return {"ours s": float(np.median([own for own, _ in runs])), **compared(runs), "runs": runs}


def training_batch(quick):
    """8 groups x 6, prompt 600, guide 120, responses of 50 to 500 tokens: [distill.TrainingRow]."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(2 if quick else GROUPS):
        prompt = rng.integers(0, VOCABULARY, PROMPT).tolist()
        guide = rng.integers(0, VOCABULARY, GUIDE).tolist()
        for _ in range(GROUP_SIZE):
            answer = rng.integers(0, VOCABULARY, rng.integers(50, 501)).tolist()
            spoken = [True] * len(answer)
            rows.append(distill.TrainingRow(
                tokens=prompt + answer,
                mask=[False] * PROMPT + spoken,
                advantage=float(rng.normal()),
                teacher_tokens=guide + prompt + answer,
                teacher_mask=[False] * (GUIDE + PROMPT) + spoken,
            ))
    return rows


def our_update(net, rows, recipe):
    """A callable: one update of distill.py, packed, shared prompts once."""
    reference = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-6)

    def update():
        with torch.no_grad():
            old = distill.score_actions(net, [row.tokens for row in rows], [row.mask for row in rows])
        rows_old = []
        for row, logp, mask in zip(rows, old.logp, old.mask):
            rows_old.append(dataclasses.replace(row, logp_old=logp[mask]))
        gradients, _, _ = distill.update_gradients(net, reference, net, rows_old, recipe, together=True)
        for p, gradient in zip(net.parameters(), gradients):
            p.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return update


def padded_update(peer, rows, recipe):
    """A callable: the same update as it is usually written, from full logits over padded batches, a group at a time
    (all at once would not fit into the memory of a laptop)."""
    reference = copy.deepcopy(peer).requires_grad_(False)
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-6)
    live_count, token_count, distilled_count = distill.step_counts(rows, recipe)

    def update():
        for start in range(0, len(rows), GROUP_SIZE):
            group = rows[start:start + GROUP_SIZE]
            spoken = [torch.ones(sum(row.mask), dtype=torch.bool) for row in group]
            mask = distill.pad_rows(spoken).to(peer.device)                                          # (N, T)
            advantages = torch.tensor([row.advantage for row in group], device=peer.device)          # (N,)
            with torch.no_grad():
                logp_old = padded_logprobs(peer, group)
                logp_ref = padded_logprobs(reference, group)
                logq = padded_logprobs(peer, group, teacher=True)

            # both losses divide by counts over all groups, so the groups' gradients add up to the batch's
            logp = padded_logprobs(peer, group)
            grpo = distill.grpo_loss(logp, logp_old, logp_ref, advantages, mask, normalizer=(live_count, token_count))
            sdl = distill.sdl_loss(logp, logp_old, logq, mask, normalizer=distilled_count)
            (grpo + recipe.weight * sdl).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def padded_logprobs(net, rows, teacher=False):
    """log p of the action tokens, (N, T), from full logits over the padded batch of a transformers model."""
    tokens = [torch.tensor(row.teacher_tokens if teacher else row.tokens) for row in rows]
    masks = [torch.tensor(row.teacher_mask if teacher else row.mask) for row in rows]
    lengths = torch.tensor([len(ids) for ids in tokens])
    ids = distill.pad_rows(tokens).to(net.device)
    mask = distill.pad_rows(masks).to(net.device)
    there = torch.arange(ids.shape[1]) < lengths[:, None]                                           # (N, T)
    attention_mask = there.long().to(net.device)

    logits = net(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].float()               # (N, T, V)
    logp = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)                            # (N, T)
    return distill.pad_rows([row[m] for row, m in zip(logp, mask[:, 1:])])


def training_flops(net, rows):
    """Multiply-adds, twice, of one update: trunk and output layer, a group's prompt once, attention included."""
    c = net.config
    groups = len(rows) // GROUP_SIZE
    lengths = [sum(row.mask) for row in rows]
    trunk_weights = sum(p.numel() for name, p in net.named_parameters() if "embed" not in name)

    def trunk(prompt):
        """One forward pass."""
        tokens = groups * prompt + sum(lengths)
        pairs = groups * prompt * (prompt + 1) / 2  # of query and key
        pairs += sum(n * prompt + n * (n + 1) / 2 for n in lengths)
        return 2 * trunk_weights * tokens + 4 * c.layers * c.heads * c.head_dim * pairs

    output = 2 * sum(lengths) * c.vocab_size * c.hidden_size
    # old, reference and teacher forward; student forward and backward, which is twice a forward
    return trunk(PROMPT) * (2 + 3) + trunk(PROMPT + GUIDE) + output * (3 + 3)


@torch.inference_mode()
def sampler_row(s):
    """20 guided steps, batch 16, the committed renderer; the peer encodes its conditions each step, in two passes."""
    diffusers = require("diffusers")
    count = 4 if s.quick else 16
    suite = AtlasSuite(Bench(device=s.device))
    renderer, net = suite.renderer, suite.renderer.net
    prompts = [oracle["gen_prompt"] for oracle in suite.oracle[:count]]
    pictures = [suite.references(n) for n in range(count)]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    rows = renderer.conditions(prompts, pictures)
    empty = [row.drop() for row in rows]
    made = {}

    def ours():
        made["ours"] = renderer.render(prompts, pictures, list(range(count)), steps=20, guidance=2.0)

    def theirs():
        scheduler.set_timesteps(sigmas=diffusion.schedule(20)[:-1])
        shape = (net.config.tokens, 4 * net.config.channels)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
        x = torch.stack(noise).to(model.pick_device(s.device))                                      # (N, tokens, 4 C)
        renderer.conditions(prompts, pictures)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            level = torch.full((count,), float(sigma), device=x.device)
            x0_cond = net(x, level, net.encode(diffusion.pack(rows, x.device)))
            x0_uncond = net(x, level, net.encode(diffusion.pack(empty, x.device)))
            x0 = x0_uncond + 2.0 * (x0_cond - x0_uncond)
            x = scheduler.step((x - x0) / sigma, t, x, return_dict=False)[0]
        made["peer"] = list(renderer.vae.to_images(diffusion.unpatchify(x)).cpu().numpy())

    row = side_by_side(ours, theirs, s)
    differences = np.stack(made["ours"]).astype(int) - np.stack(made["peer"])
    row["greatest pixel difference"] = int(np.abs(differences).max())
    return row


def scaling_row(s):
    """16 to 512 rollouts in 64 slots: tokens a second, peak memory."""
    new = 128
    net, generator, row = small_policy(s), torch.Generator().manual_seed(0), {}
    for count in (16, 48) if s.quick else (16, 48, 128, 512):
        groups = -(-count // GROUP_SIZE)
        prompts = random_prompts(groups, generator)[:count]
        measured = timed(lambda prompts=prompts: model.generate(net, prompts, new), s.device)
        row[f"{count}: tokens/s"] = count * new / measured.seconds
        row[f"{count}: MB"] = measured.megabytes
    return row


class SlowSession(tools.ToolSession):
    """A trajectory's tools, each call ``delay`` seconds slower."""

    def __init__(self, box, delay):
        super().__init__(box)
        self.delay = delay

    def call(self, name, arguments):
        time.sleep(self.delay)
        return super().call(name, arguments)


class SlowTools:
    """A tool box like that of a service on the network: its local answers come ``delay`` seconds later."""

    def __init__(self, box, delay):
        self.box = box
        self.delay = delay

    def session(self):
        return SlowSession(self.box, self.delay)


def tools_row(s):
    """64 requests with tools that answer after 1 s: turns taken as they come against turns in order ("peer").

    One run of each: the seconds are mostly the tools', which do not vary.
    """
    requests = atlas.world.requests("bench")[:8 if s.quick else 64]
    with tempfile.TemporaryDirectory() as folder:
        flags = genevolve.Run(out=folder, device=s.device)
        with genevolve.Components(flags, folder) as components:
            box = SlowTools(components.toolbox, 0.1 if s.quick else 1.0)

            def run(ordered):
                agent = genevolve.Agent(components.policy, box, ordered=ordered, live=flags.live)
                return agent.run(requests, list(range(len(requests))))

            free = timed(lambda: run(ordered=False), s.device)
            ordered = timed(lambda: run(ordered=True), s.device)
    return {
        "ours s": free.seconds,
        "peer s": ordered.seconds,
        "ratio": ordered.seconds / free.seconds,
        "requests a minute": 60 * len(requests) / free.seconds,
        "requests a minute, in order": 60 * len(requests) / ordered.seconds,
        "turns a request": mean([float(trajectory.rounds) for trajectory in free.result]),
    }


def lora_row(s):
    """A training step of layers with the 8 B policy's shape: adapters of rank 16 against all weights.

    Each in a process of its own, so that its peak of memory is its own. "peer" is full training.
    """
    layers = 1 if s.quick else 2
    ours = run_alone("training_step", 16, layers, s.repeats, s.quick, s.device)
    full = run_alone("training_step", 0, layers, s.repeats, s.quick, s.device)
    row = {
        "ours s": ours["seconds"],
        "peer s": full["seconds"],
        "ratio": full["seconds"] / ours["seconds"],
        "layers": layers,
        "parameters": full["trained"],
        "trained": ours["trained"],
    }
    if ours["MB"] is not None:
        row |= {"ours MB": ours["MB"], "peer MB": full["MB"], "memory ratio": full["MB"] / ours["MB"]}
    return row


def large_decode_row(s):
    """The rollouts row's sizes on the 8 B policy's shape in bfloat16, random weights: CUDA graphs on ("ours") and off
    ("peer"), and the share of the card's memory bandwidth that decoding reaches. Needs a GPU with 24 GB."""
    device = model.pick_device(s.device)
    if device != "cuda" and not s.quick:
        raise tools.ToolError("needs a GPU (--device cuda)")
    shape = dict(hidden_size=4096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp_size=12288)
    if s.quick:
        shape = dict(hidden_size=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp_size=256)
    config = model.Config(vocab_size=VOCABULARY if s.quick else 151_936, tie_embeddings=False, **shape)
    torch.set_default_dtype(torch.bfloat16)  # in float32 the weights alone are 33 GB
    try:
        with torch.device(device):
            net = model.Qwen3(config)
    finally:
        torch.set_default_dtype(torch.float32)

    new = 16 if s.quick else 128
    prompts = random_prompts(GROUPS, torch.Generator().manual_seed(0))

    def decode(uses_graphs):
        def work():
            model.DecodeBatch.uses_graphs = uses_graphs
            model.generate(net, prompts, new)
        return work

    try:
        row = side_by_side(decode(True), decode(False), s)
    finally:
        model.DecodeBatch.uses_graphs = True
    row["tokens/s"] = len(prompts) * new / row["ours s"]
    row["GB/s"] = decode_bytes(net, PROMPT, new, len(prompts), GROUPS) / 1e9 / row["ours s"]
    return row


def engine_row(s):
    """The rollouts row's sizes, written by the first, the first two, ... of the servers of --engines. Fresh prompts for
    each, so that no prefix cache knows them. The first server is the peer of our engine, if it serves the same
    weights: `python -c "import bench; bench.save_small_policy('out/small')"` writes them."""
    if not s.engines:
        raise tools.ToolError("name running vLLM or SGLang servers with --engines URL,URL")
    new = 16 if s.quick else 128
    clients = [tools.open_engine(url) for url in s.engines.split(",")]
    ask_engines(clients, [[1, 2]] * len(clients), 4)  # the first call allocates and compiles
    net, generator, row = small_policy(s), torch.Generator().manual_seed(0), {}
    model.generate(net, random_prompts(GROUPS, generator), new)
    for count in range(1, len(clients) + 1):
        own, theirs = [], []  # seconds
        for _ in range(s.repeats):
            prompts = [[token % 1000 for token in prompt] for prompt in random_prompts(GROUPS, generator)]
            if count == 1:
                own.append(timed(lambda prompts=prompts: model.generate(net, prompts, new), s.device).seconds)
            theirs.append(timed(lambda prompts=prompts: ask_engines(clients[:count], prompts, new)).seconds)
        if count == 1:
            runs = list(zip(own, theirs, strict=True))
            row |= {"ours s": float(np.median(own)), **compared(runs), "runs": runs}
        row[f"servers {count}: tokens/s"] = len(prompts) * new / float(np.median(theirs))
    return row


def save_small_policy(folder):
    """The weights of the rows "rollouts" and "engine" as a model folder, for a server to load. Its tokenizer is the
    embedded policy's, which only has to be there: prompts and answers travel as token ids."""
    model.save(folder, small_policy(Speed(device="cpu")))
    shutil.copy(os.path.join(HERE, "weights", "sft", "tokenizer.json"), folder)


def ask_engines(clients, prompts, new):
    """``new`` tokens for each prompt; the servers take prompts in turn, each as many in a request as it allows."""
    calls = []
    with ThreadPoolExecutor(len(prompts)) as pool:
        for number, client in enumerate(clients):
            share = prompts[number::len(clients)]
            for batch in genevolve.chunks(share, client.AT_ONCE):
                calls.append(pool.submit(client.generate, batch, new))
    tokens = sum(len(rollout.tokens) for call in calls for rollout in call.result())
    if tokens != len(prompts) * new:
        raise ValueError(f"the servers wrote {tokens} tokens, not {len(prompts) * new}")


def training_step(rank, layers, repeats, quick, device):
    """Seconds (median) and peak memory of an AdamW step on 2 x 512 tokens. rank 0: all weights train."""
    device = model.pick_device(device)
    shape = dict(hidden_size=256, mlp_size=768) if quick else dict(hidden_size=4096, mlp_size=12288)
    config = model.Config(vocab_size=VOCABULARY, layers=layers, heads=32, kv_heads=8, head_dim=128, **shape)
    sequences = torch.randint(0, VOCABULARY, (2, 64 if quick else 512)).tolist()

    def build_and_train():
        """The first step allocates the optimizer's state and is not timed."""
        torch.manual_seed(0)
        net = model.Qwen3(config).to(device)
        if rank:
            model.add_lora(net, rank, 2 * rank)
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        seconds = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            loss = -torch.cat(model.token_logprobs(net, sequences)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # on a GPU, wait for the backward pass
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds[1:])), sum(p.numel() for p in trained)

    measured = timed(build_and_train, device)
    seconds, trained = measured.result
    return {"seconds": seconds, "MB": measured.megabytes, "trained": trained}


SPEED = {"rollouts": rollout_row, "turns": turns_row, "short turns": short_turns_row, "log-probs": logprob_row,
         "training step": training_row, "experience": experience_row, "evolve": evolve_row, "sampler": sampler_row,
         "scaling": scaling_row, "slow tools": tools_row, "low-rank adapters": lora_row,
         "8 B decode": large_decode_row, "engine": engine_row}
# peer / ours: the peer as it is by default, and with the same products
TARGETS = {"rollouts": (5.5, 4.5), "turns": (6.5, None), "short turns": (8, None), "log-probs": (1.8, None),
           "training step": (4.5, None), "sampler": (1.8, None), "engine": (2.0, None)}


def speed(settings):
    """python bench.py speed"""
    names = pick_names(settings.rows, SPEED, "row")
    path = os.path.join(results_folder(settings), "speed.json")
    found = read_json(path) or {}
    found["machine"] = measure_machine(model.pick_device(settings.device)) | {
        "threads": torch.get_num_threads(),
        "products": model.current_products(),
        "load before": os.getloadavg()[0],
        "torch": torch.__version__,
        "quick": settings.quick,
    }
    print_row("machine", found["machine"])

    for name in names:
        try:
            row = SPEED[name](settings)
        except tools.ToolError as error:  # a peer is not installed
            print(f"{name}: {error}")
            continue

        if "GFLOP" in row:
            row["share of the machine"] = least_seconds(row, found["machine"]) / row["ours s"]
        if name in TARGETS:
            row["target"] = TARGETS[name]

        # written row by row: a stopped table keeps what it has measured
        found[name] = row
        print_row(name, row)
        write_json(path, found)


def least_seconds(row, machine):
    """The least time that the measured peaks of the machine allow."""
    compute = row["GFLOP"] / machine["matrix product, GFLOP/s"]
    return compute + row.get("GB moved", 0) / machine["memory, GB/s"]


# ---- Short: a policy and the speed, within five minutes --------------------------------------------------------------

SHEET = 8          # requests on the contact sheet
SHORT_BATCH = 32   # requests answered and drawn between two lines of progress


@dataclass
class Short(Bench):
    """The promoted policy on the bench, a sheet of its pictures, and the speed: five minutes on two cores."""
    out: str = flag("out", "folder for bench.json, bench.png and bench.html")
    policy: str = flag(os.path.join(HERE, "weights", "policy"), "policy folder that is measured")


def short(settings):
    """python bench.py"""
    out = results_folder(settings)
    requests = suite_requests(settings)
    attempts, views, rates = answer_requests(settings, requests)
    rows = [attempt_row(attempt, request) for attempt, request in zip(attempts, requests)]
    print_scores(rows)

    # pictures before speed: they are there while the rest is measured
    every = max(1, len(attempts) // SHEET)
    diffusion.write_png(os.path.join(out, "bench.png"), contact_sheet(attempts[::every][:SHEET]))
    page.write_report(os.path.join(out, "bench.html"),
                           {"title": "GenEvolve-Bench", "mode": "run", "requests": views})

    rates |= speed_rates(settings)
    print()
    for name, rate in rates.items():
        print(f"{name:<52} {rate:10.1f}")
    values = {"policy": model.portable(settings.policy), "requests": len(rows), "steps": settings.steps,
              "quality": table_row([rows]), "quality error": mean_and_error(rows), "speed": rates,
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(os.path.join(out, "bench.json"), values)
    print(f"\nwrote {', '.join(os.path.join(out, name) for name in ('bench.json', 'bench.png', 'bench.html'))}")


def answer_requests(settings, requests):
    """(judged attempts, one a request; their views for the page; {rate: a second}). The seeds of ``attempt_bench``."""
    attempts, views, thinking, drawing = [], [], 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        flags = genevolve.Run(policy=settings.policy, out=folder, sampling_steps=settings.steps,
                              guidance=settings.guidance, device=settings.device)
        with genevolve.Components(flags, folder) as components:
            for start in range(0, len(requests), SHORT_BATCH):
                batch = requests[start:start + SHORT_BATCH]
                seeds = [7919 * (start + n) for n in range(len(batch))]
                started = time.perf_counter()
                answered = components.agent().run(batch, seeds)
                thinking += time.perf_counter() - started

                started = time.perf_counter()
                components.scorer.render_and_score(answered)
                drawing += time.perf_counter() - started
                attempts += answered
                views += map(page.request_view, answered)  # now, for the folder of what was found goes
                left = (thinking + drawing) / len(attempts) * (len(requests) - len(attempts))
                genevolve.print_line(f"{len(attempts)}/{len(requests)} requests, {genevolve.time_text(left)} left")
    return attempts, views, {"agent: requests a second, tools included": len(attempts) / thinking,
                             f"renderer: pictures a second, {settings.steps} steps, judged": len(attempts) / drawing}


def attempt_row(attempt, request):
    """``bench_row`` of a judged attempt."""
    calls = sum(step.kind == "tool_call" for step in attempt.steps)
    return bench_row(request, attempt.judgement, attempt.program is not None, calls, attempt.reward)


def mean_and_error(rows):
    """[mean, standard error] of KScore and its parts, over the rows that have them."""
    columns = {name: [math.nan if row[name] is None else row[name] for row in rows] for name in SCORES}
    return {name: list(distill.mean_and_error(values)) for name, values in columns.items()}


def print_scores(rows):
    """KScore with its parts, and by track."""
    print()
    for name, (average, error) in mean_and_error(rows).items():
        label = "KScore" if name == "kscore" else "  " + name.replace("_", " ")
        print(f"{label:<28} {average:.3f} ± {error:.3f}")
    row = table_row([rows])
    for name in ("knowledge", "quality", "valid", "tool calls"):
        label = {"knowledge": "KScore, knowledge track", "quality": "KScore, quality track",
                 "valid": "valid programs", "tool calls": "tool calls a request"}[name]
        print(f"{label:<28} {row[name]:.3f}")


def contact_sheet(attempts, side=256, gap=8, columns=4):
    """Pictures beside what was wanted, pair by pair, as one picture, uint8 (H, W, 3); grey where there is none."""
    width = 2 * side + gap // 2
    rows = math.ceil(len(attempts) / columns)
    sheet = np.full((rows * (side + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for number, attempt in enumerate(attempts):
        top = gap + number // columns * (side + gap)
        left = gap + number % columns * (width + gap)
        for image, offset in ((attempt.image, 0), (page.ground_truth(attempt.row), side + gap // 2)):
            tile = sheet[top:top + side, left + offset:left + offset + side]
            tile[:] = 200 if image is None else diffusion.resize(genevolve.enlarged(image, side), side, side)
    return sheet


def speed_rates(settings):
    """{rate: a second} of decoding and of an update, with the sizes of the speed table and random weights."""
    net = small_policy(settings)
    prompts = random_prompts(GROUPS, torch.Generator().manual_seed(0))
    new = 16 if settings.quick else 128
    model.generate(net, prompts, 4)  # the first call allocates
    decoding = timed(lambda: model.generate(net, prompts, new), settings.device).seconds

    rows = training_batch(settings.quick)
    update = our_update(net, rows, distill.RECIPES["paper"])
    update()
    updating = timed(update, settings.device).seconds
    size = sum(p.numel() for p in net.parameters()) / 1e6
    return {f"decoding: tokens a second, {len(prompts)} side by side, {size:.1f} M": len(prompts) * new / decoding,
            f"update: tokens a second, GRPO and SDL, {size:.1f} M": sum(map(len, [r.tokens for r in rows])) / updating}


# ---- Released: the authors' runtime against the local server ---------------------------------------------------------

@dataclass
class Released(Bench):
    """The released agent, image script and evaluator, unchanged, against serve (pip install openai tqdm pillow)."""
    runtime: str = flag("", "folder of a checkout of the released runtime (github.com/MeiGen-AI/GenEvolve)")
    requests: int = flag(20, "bench requests", bounds="[1, inf)")


def released(settings):
    """python bench.py released --runtime DIR"""
    scripts = os.path.join(settings.runtime, "scripts")
    if not settings.runtime or not os.path.isfile(os.path.join(scripts, "run_agent.py")):
        raise ValueError("--runtime takes the folder of a checkout that has scripts/run_agent.py")
    for package in ("openai", "tqdm", "PIL"):
        require(package)
    out = results_folder(settings)
    count = min(4, settings.requests) if settings.quick else settings.requests
    requests = atlas.world.requests("bench")[:count]

    with tempfile.TemporaryDirectory() as folder:
        model.write_lines(os.path.join(folder, "requests.jsonl"), [without_recipe(request) for request in requests])
        with local_server(settings.policy, folder) as url:
            run_released_scripts(scripts, folder, url)
        figures = released_figures(folder)
    figures = {"requests": len(requests)} | figures
    print_row("the released runtime", figures)
    write_json(os.path.join(out, "released.json"), figures)


def without_recipe(request):
    """What the released runtime gets to read of a request."""
    return {name: value for name, value in request.items() if name not in ("recipe", "_folder")}


@contextmanager
def local_server(policy, folder):
    """``genevolve.py serve`` in a process of its own; gives its URL."""
    command = [sys.executable, os.path.join(HERE, "genevolve.py"), "serve", "--port", "0", "--policy", policy,
               "--out", folder]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        words = server.stdout.readline().split()  # serving on URL: ...
        if len(words) < 3:
            raise ValueError("genevolve.py serve ended before it served")
        yield words[2].rstrip(":")
    finally:
        server.terminate()
        server.wait()


def run_released_scripts(scripts, folder, url):
    """Agent, renderer client and evaluator, one after another; each reads what the one before wrote."""
    environment = os.environ | {"OPENAI_API_KEY": "none", "SERPER_API_KEY": "none", "SERPER_BASE_URL": url,
                                "IMAGE_DOWNLOAD_DIR": os.path.join(folder, "found")}
    requests, results = (os.path.join(folder, name) for name in ("requests.jsonl", "results.json"))
    agent = ["run_agent.py", "--input", requests, "--output-dir", folder, "--base-url", f"{url}/v1"]
    renderer = ["generate_images.py", "--input", results, "--output-dir", folder,
                "--backend", "qwen-image-edit-service", "--service-url", url]
    evaluator = ["evaluate_images.py", "--results", results, "--gt-root", os.path.join(HERE, "atlas"),
                 "--api-base", f"{url}/v1"]
    for name, *arguments in (agent, renderer, evaluator):
        command = [sys.executable, os.path.join(scripts, name), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{name} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


def released_figures(folder):
    """What the three scripts made of the requests, and our KScore of their scores."""
    records = read_json(os.path.join(folder, "results.json"))
    judged = read_json(os.path.join(folder, "results_eval.json"))
    theirs = read_json(os.path.join(folder, "summary.json"))
    ours = distill.summarize(evaluated_rows(os.path.join(folder, "results_eval.json")))
    return {
        "records": len(records),
        "programs": sum(bool(record["gen_prompt"]) for record in records),
        "rendered": sum(bool(record["success"]) for record in records),
        "judged": sum(bool(row.get("eval_success")) for row in judged if "summary_type" not in row),
        "its overall": theirs["all"]["overall"],
        "KScore of its scores": ours["all"]["overall"],
    }


# ==== Machine room ====================================================================================================

# ---- Folders and files -----------------------------------------------------------------------------------------------

RESULTS = os.path.join(HERE, "results")
UNTRACKED = ("out", "runs")  # folders of the project that hold no committed file


def results_folder(settings):
    """--out, or results/; a smoke run writes to out/, and never where files are committed."""
    folder = settings.out or ("out" if settings.quick else RESULTS)
    if settings.quick or isinstance(settings, Short):
        check_untracked(folder, "--out")
    return model.make_folder(folder)


def check_untracked(folder, flag_name):
    """Refuse a folder of this project whose files are committed; out/ and runs/ hold none."""
    path, home = os.path.realpath(folder), os.path.realpath(HERE)
    if path != home and not path.startswith(home + os.sep):
        return
    if os.path.relpath(path, home).split(os.sep)[0] not in UNTRACKED:
        raise ValueError(f"{flag_name} {folder}: a short run must not replace committed files; take a folder below "
                         f"{' or '.join(UNTRACKED)}")


def runs_folder(settings):
    """--runs, or runs/quality; a smoke run trains in a folder beside its results."""
    if settings.runs:
        if settings.quick:
            check_untracked(settings.runs, "--runs")
        return settings.runs
    if settings.quick:
        return os.path.join(results_folder(settings), "runs")
    return os.path.join("runs", "quality")


def read_json(path):
    """The value in a file, None where there is no such file."""
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def read_lines(path):
    """The values in a file of JSON lines, [] where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json(path, value):
    """A file of results, whole or not at all; a figure that is not a number is null."""
    model.write_json(path, model.without_nan(value))


def slug(text):
    """A text as part of a file's name."""
    kept = [c if c.isalnum() or c in ".=" else " " for c in text.lower()]
    return "-".join("".join(kept).split())


def pick_names(text, allowed, kind):
    """Names of a comma-separated flag, or all that are allowed. ValueError names one that is not."""
    names = [name.strip() for name in text.split(",")] if text else list(allowed)
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"unknown {kind} {unknown[0]!r}: must be of {', '.join(allowed)}")
    return names


# ---- Tables and figures ----------------------------------------------------------------------------------------------

QUALITY_COLUMNS = {
    "KScore": "kscore", "standard error": "error", "F": "faithfulness", "V": "visual_correctness", "T": "text_accuracy",
    "A": "aesthetics", "novel": "novel", "valid": "valid", "calls": "tool calls", "rollouts' reward": "reward",
    "rollouts": "rollouts", "seconds": "seconds", "seeds": "seeds",
}


def print_row(label, values):
    """A row of a table on the terminal."""
    cells = [f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
             for name, value in values.items() if not name.endswith("runs")]  # these are for the file
    print(f"{label:<44} " + "  ".join(cells), flush=True)


def print_quality(plan, rows, differences):
    for name, row in rows.items():
        print_row(row_label(plan, name), row)
    for name, found in differences.items():
        change, low, high = found["kscore"]
        print(f"{name:<60} {change:+.3f}  [{low:+.3f}, {high:+.3f}]  p {found['p']:.3f}  {found['seeds']} seeds")


def row_label(plan, name):
    """A row's name in tables: "stable@40" is the arm's label and the updates."""
    arm, _, updates = name.partition("@")
    return f"{plan.arms[arm].label}, {updates} updates" if updates else name


def write_quality(results, plan, rows, differences, curves):
    """quality.md and two figures. curves: {arm: [``curve_of`` a run]}; those of the main claim are drawn, or all."""
    figures = [(row_label(plan, name), [format_figure(row.get(column)) for column in QUALITY_COLUMNS.values()])
               for name, row in rows.items()]
    lines = markdown_table("", QUALITY_COLUMNS, figures) + [""] + difference_table(differences)
    model.write_text(os.path.join(results, "quality.md"), "\n".join(lines) + "\n")

    drawn = [name for name, _ in sides_of(plan.comparisons[0])] if plan.comparisons else plan.arms
    names = [name for name in drawn if name in curves]
    for column, (file, unit) in enumerate((("quality.svg", "rollouts"), ("quality-seconds.svg", "seconds"))):
        means = {plan.arms[name].label: pick_column(mean_curve(curves[name]), column) for name in names}
        single = {plan.arms[name].label: [pick_column(curve, column) for curve in curves[name]] for name in names}
        model.write_text(os.path.join(results, file), svg_lines(means, 720, 340, single, unit, "reward:"))


def mean_curve(curves):
    """The mean of runs' curves, [(rollouts, seconds, mean reward)], up to the shortest one's end."""
    return [tuple(mean([point[column] for point in points]) for column in range(3)) for points in zip(*curves)]


def pick_column(curve, column):
    """The points of a curve as [(rollouts (column 0) or seconds (1), mean reward)]."""
    return [(point[column], point[2]) for point in curve]


def difference_table(differences):
    """Lines of Markdown: every comparison with its intervals and p."""
    rows = []
    for name, found in differences.items():
        rows.append((name, [
            format_interval(*found["kscore"]),
            f"{found['p']:.3f}",
            format_interval(*found["bootstrap"]),
            format_interval(*found["novel"]) if found.get("novel") else "",
            format_interval(*found["rollouts' reward"]),
            f"{found['ratio of seconds']:.2f}",
            str(found["seeds"]),
        ]))
    columns = ("KScore (95 %, t over seeds)", "p, signs flipped", "KScore (bootstrap of seeds and requests)",
               "novel combinations", "rollouts' reward", "seconds, ratio", "seeds")
    return markdown_table("difference", columns, rows)


def markdown_table(title, columns, rows):
    """Lines of Markdown. rows: [(label, [text of a cell])]."""
    lines = [f"| {title}".rstrip() + f" | {' | '.join(columns)} |",
             "| --- |" + " --- |" * len(columns)]
    return lines + [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]


def format_figure(value):
    if value is None or math.isnan(value):
        return ""
    return f"{value:.3f}" if isinstance(value, float) and value < 10 else f"{value:.0f}"


def format_interval(change, low, high):
    return f"{change:+.3f} ({low:+.3f} to {high:+.3f})"


INKS = ("#b33", "#36a", "#386", "#a60", "#738", "#088", "#777", "#c59")


def round_ticks(low, high, count=5):
    """At most so many round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    least = (high - low) / count
    power = 10 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 9) for number in range(first, last + 1)]


def svg_lines(series, width, height, faint=None, across="", up=""):
    """SVG of {label: [(x, y)]} over a grid, missing values (None) left out.

    faint: {label: lines} drawn thinly in the label's ink, such as the single runs behind a mean. across, up: what x and
    y are. Returns "" if there is nothing to draw.
    """
    faint = faint or {}
    lines = [*series.values(), *(line for runs in faint.values() for line in runs)]
    points = [(x, y) for line in lines for x, y in line if y is not None]
    if not points:
        return ""
    xs, ys = zip(*points)
    left, right = min(xs), max(xs)
    low, high = min(ys), max(ys)

    def place(x, y):
        """Data to pixels: 40 at the left and 32 below are left to the labels, 20 above to the names."""
        over = (x - left) / max(right - left, 1e-9)
        upward = (y - low) / max(high - low, 1e-9)
        return 40 + over * (width - 60), height - 32 - upward * (height - 52)

    def polyline(line, ink, style):
        corners = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line if y is not None)
        return f'<polyline fill="none" stroke="{ink}" {style} points="{corners}"/>'

    def text(x, y, words, style=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>'

    drawn = []
    for value in round_ticks(low, high):
        y = place(left, value)[1]
        drawn.append(f'<path d="M40 {y:.1f}H{width - 20}" stroke="#ddd"/>')
        drawn.append(text(34, y + 3, f"{value:.4g}", 'text-anchor="end"'))
    for value in round_ticks(left, right):
        drawn.append(text(place(value, low)[0], height - 18, f"{value:.4g}", 'text-anchor="middle"'))

    # the more single runs there are, the fainter is each
    inks = dict(zip(series, INKS))
    opacity = 0.35 if len(lines) < 20 else 0.2
    drawn += [polyline(line, inks[label], f'stroke-width="0.8" opacity="{opacity}"')
              for label, runs in faint.items() for line in runs]
    drawn += [polyline(line, inks[label], 'stroke-width="2"') for label, line in series.items()]
    names = [f'<tspan fill="{inks[label]}">{html.escape(label.replace("_", " "))}</tspan>' for label in series]
    drawn += [text(40, 12, f"{html.escape(up)} ".lstrip() + " &#160; ".join(names)),
              text(width / 2, height - 4, html.escape(across), 'text-anchor="middle"')]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-size="11" '
            f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>')


# ---- Time and memory -------------------------------------------------------------------------------------------------

@dataclass
class Timed:
    """A measured call."""
    seconds: float
    megabytes: float | None     # peak of memory above what was there before; None: this system does not say
    result: object


def timed(work, device="cpu"):
    """Call work() and measure it. device: where its tensors are, as --device says it."""
    release_memory()
    if model.pick_device(device) == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return Timed(seconds, (torch.cuda.max_memory_allocated() - before) / 2**20, result)

    # without a GPU: the peak of the process's resident memory
    reset_peak_memory()
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return Timed(seconds, None if before is None else memory_mb("VmHWM") - before, result)


def release_memory():
    """Give what the allocator holds of freed memory back to the system (glibc), so that the next peak counts it."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def reset_peak_memory():
    """Linux: the peak of this process starts again from what is resident now."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass


def memory_mb(name):
    """A field of /proc/self/status in MB, None where there is no such file or field."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def side_by_side(ours, peer, settings):
    """Alternating runs after one of each that is not counted; ratios are peer / ours of neighbouring runs.

    Where ours has other products than torch's own, the peer runs twice: as a user gets it, and with the same products.
    Every run is kept: "runs" holds seconds of (ours, peer, peer with the same products).
    """
    settings_of_peer = dict.fromkeys(("mkl", model.current_products()))  # in this order, once if they are one
    ours()
    peer()
    measured = []  # neighbours in time, so that a busy spell of the machine meets all
    for _ in range(settings.repeats):
        own = timed(ours, settings.device)
        theirs = []
        for name in settings_of_peer:
            with model.products(name):
                theirs.append(timed(peer, settings.device))
        measured.append((own, *theirs))

    runs = [[run.seconds for run in neighbours] for neighbours in measured]
    row = {"ours s": float(np.median([own for own, *_ in runs])),
           **compared([(own, theirs) for own, theirs, *_ in runs]), "runs": runs}
    if len(settings_of_peer) > 1:
        same = compared([(own, theirs) for own, _, theirs in runs])
        row |= {f"same products, {name}": value for name, value in same.items()}
    if measured[0][0].megabytes is not None:
        own_peak, *peer_peaks = (max(1.0, *(run.megabytes for run in side)) for side in zip(*measured, strict=True))
        row |= {"ours MB": own_peak, "peer MB": peer_peaks[0], "memory ratio": peer_peaks[0] / own_peak}
    return row


def compared(pairs):
    """Median seconds of the peer, median and quartiles of peer / ours. pairs: (ours, peer) seconds of neighbours."""
    low, median, high = np.percentile([theirs / own for own, theirs in pairs], (25, 50, 75))
    return {"peer s": float(np.median([theirs for _, theirs in pairs])), "ratio": float(median),
            "ratio quartiles": [float(low), float(high)]}


def measure_machine(device):
    """The fastest float32 product of any backend (float operations a second), and memory bandwidth (bytes a second)."""
    matrix = torch.randn(2048, 2048, device=device)
    vector = torch.randn(2**26, device=device)

    def least(work):
        return min(timed(work, device).seconds for _ in range(8))

    speeds = {}
    for name in model.PRODUCTS if device == "cpu" else ("mkl",):
        with model.products(name):
            speeds[name] = 2 * 2048**3 / least(lambda: matrix @ matrix) / 1e9
    return {"matrix product, GFLOP/s": max(speeds.values()), "matrix products, GFLOP/s": speeds,
            "memory, GB/s": vector.nbytes / least(lambda: vector.sum()) / 1e9}


def run_alone(name, *arguments):
    """A function of this file in a process of its own. Arguments and result are plain values."""
    code = f"import bench, json; print(json.dumps(bench.{name}(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}{arguments} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- Peers -----------------------------------------------------------------------------------------------------------

def require(package):
    """The package; ToolError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise tools.ToolError(f"{package} is not installed: pip install -r requirements-peers.txt") from None


def peer_policy(net):
    """The same weights in transformers."""
    transformers = require("transformers")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, net)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peer.eval().to(next(net.parameters()).device)


@torch.no_grad()
def peer_generate(peer, ids, new):
    """ids (N, T) with ``new`` sampled tokens behind them, without an end."""
    made = peer.generate(input_ids=ids.to(peer.device), max_new_tokens=new, do_sample=True, temperature=0.7, top_p=0.95,
                         top_k=0, eos_token_id=None, pad_token_id=0)
    return made.cpu()


COMMANDS = {"short": (Short, short), "world": (Bench, world), "quality": (Quality, quality), "speed": (Speed, speed),
            "released": (Released, released)}


if __name__ == "__main__":
    sys.exit(genevolve.main(commands=COMMANDS, default="short"))
