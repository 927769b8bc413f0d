"""What web/report.html shows, as JSON: requests with their turns and pictures, an evolution with its lessons.

    page.write_report(path, page.run_view(trajectories))          one static file: the page with the data in it
    page.write_report(path, page.evolution_view(run))             run: a genevolve.Evolution
    page.page_text({"title": "GenEvolve", "mode": "live"})        the page that `genevolve.py serve` hands out

The page draws, this file only selects: every view is plain JSON, pictures are data URIs of PNG files. Nothing here
changes what is trained or judged.

Contents, in reading order:

    run_view, request_view       a request: program, verdicts, turns, references
    evolution_view               an evolution: curves, gallery before and after, memory, lessons
    lesson_record, lesson_view   the two attempts behind a lesson, and the decisions in which they differed
    microscope_view              token by token: student, teacher with and without the guide
    write_report, page_text      the JSON inside the page, and read_view, which takes it out again
"""
import difflib
import hashlib
import json
import os
import re
from dataclasses import asdict

import torch

import diffusion
import distill
import model
import tools

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report.html")

# ---- Views -----------------------------------------------------------------------------------------------------------

JUDGED_SIZE = 64       # side of the picture in which the pixel judge's boxes are measured (atlas.judge.SIZE)
SHOWN_SIZE = 512       # longest side of an embedded picture
THUMBNAIL_SIZE = 128   # longest side of a picture that a search found
LESSON_PICTURES = 12   # lessons whose two attempts are drawn for the page
NUMBER_WORDS = frozenset("one two three four five six seven eight nine ten eleven twelve".split())
TURN_SLOTS = {  # tool of a turn ("": the answer) -> the slots of guidance that are decided in it
    "search": ["search strategy"],
    "image_search": ["search strategy"],
    "query_knowledge": ["knowledge activation"],
    "": ["reference selection", "prompt construction", "failure avoidance"]}
SLOT_OF_FIELD = {"focus": "focus"} | {field: slot for slot, names in distill.SLOTS.items() for field in names}


def run_view(trajectories, title="GenEvolve"):
    """The JSON of a run: every request with its pictures, program, verdicts and turns."""
    return {"title": title, "mode": "run", "requests": [request_view(t) for t in trajectories]}


def request_view(t):
    """One Trajectory as the page shows it."""
    program = None
    if t.program is not None:
        notes = [reference["note"] for reference in t.program.references]
        program = {"pieces": explain_prompt(t), "notes": notes}

    scores = None
    if t.judgement:
        scores = {"reward": t.reward, "program": t.judgement["text_reward"]}
        if "evidence_score" in t.judgement:  # there is no ground truth, and no KScore
            scores |= {"evidence_score": t.judgement["evidence_score"]} | t.judgement.get("evidence", {})
        else:
            scores |= {name: t.judgement[name] for name in ("kscore", *distill.DIMENSIONS)}

    return {"id": t.id, "question": t.question, "termination": t.termination, "error": t.error or "",
            "picture": picture(t.image), "truth": picture(ground_truth(t.row)),
            "program": program, "found": found_pictures(t),
            "scores": scores, "checks": check_views(t.judgement or {}),
            "turns": [turn_view(step) for step in t.steps]}


def turn_view(step):
    """One Step of a trajectory; also what the playground shows while a request is answered."""
    return {"think": step.think, "kind": step.kind, "name": step.name, "arguments": step.arguments,
            "observation": step.observation}


def picture(source, longest=SHOWN_SIZE):
    """Path or uint8 (H, W, 3) -> {"src": data URI, "width", "height"}, scaled down where it is larger; None stays."""
    if source is None:
        return None
    data, _ = tools.image_bytes(source)
    _, width, height = tools.image_header(data)
    scale = longest / max(width, height)
    if scale < 1:
        width, height = round(width * scale), round(height * scale)
        data = diffusion.resize(tools.read_image(data), height, width)
    return {"src": tools.data_uri(data), "width": width, "height": height}


def ground_truth(row):
    """The picture that a request's row names as its truth, or None."""
    return tools.truth_of(row) if row.get("gt_image") and "_folder" in row else None


def found_pictures(t, limit=24):
    """The pictures that a trajectory's searches found, with 1 or 2 where one is a reference (0: not)."""
    chosen = [reference["img_id"] for reference in t.program.references] if t.program else []
    others = [img_id for img_id in t.images if img_id not in chosen]

    views = []
    for img_id in sorted(chosen + others[:limit]):
        source = t.images[img_id]
        views.append({
            "id": img_id,
            "title": source.get("title") or "",
            "chosen": chosen.index(img_id) + 1 if img_id in chosen else 0,
            "picture": picture(source["local_path"], THUMBNAIL_SIZE)})
    return views


def check_views(judgement):
    """Constraints of the picture, then checks of the program. box: [left, top, width, height], shares of the sides."""
    views = []
    for group, key in (("picture", "constraints"), ("program", "program_checks")):
        for check in judgement.get(key, []):
            box = None
            if check.get("box"):
                top, left, bottom, right = [edge / JUDGED_SIZE for edge in check["box"]]
                box = [left, top, right - left, bottom - top]
            kept = {name: check[name] for name in ("name", "passed", "detail")}
            views.append(kept | {"group": group, "box": box})
    return views


# -- the program, explained --

def explain_prompt(t):
    """gen_prompt cut into pieces {"text", "skill", "fact", "reference"}.

    skill: the guide whose quoted wording the piece follows. fact: the query whose answer holds the piece's word.
    reference: 1 or 2 where an ordinal phrase stands. "" and 0 where none applies.
    """
    prompt = t.program.gen_prompt
    labels = [{"skill": "", "fact": "", "reference": 0} for _ in prompt]  # one a character

    def mark(spans, kind, value):
        for start, end in spans:
            for label in labels[start:end]:
                label[kind] = value

    for skill, guide in distill.skills_read(t).items():
        mark(guide_spans(guide, prompt, t.question), "skill", skill)
    for step in t.steps:
        if step.name == "search":
            mark(fact_spans(step.observation, prompt, t.question), "fact", "; ".join(distill.queries_of(step)))
    for order, phrase in enumerate(tools.REFERENCE_PHRASES, 1):
        mark([m.span() for m in re.finditer(re.escape(phrase), prompt, re.I)], "reference", order)

    pieces = []
    for character, label in zip(prompt, labels):
        if pieces and all(pieces[-1][kind] == value for kind, value in label.items()):
            pieces[-1]["text"] += character
        else:
            pieces.append({"text": character} | label)
    return pieces


def sentence_spans(text):
    """[(start, end)] of a text's sentences."""
    return [match.span() for match in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|$)", text, re.S)]


def guide_spans(guide, prompt, question):
    """[(start, end)] of the prompt's sentences that follow a wording which the guide quotes (``distill.follows``)."""
    return [(start, end) for start, end in sentence_spans(prompt)
            if distill.follows(guide, prompt[start:end], question)]


def fact_spans(observation, prompt, question):
    """[(start, end)] of the prompt's names and numbers that are new to the request and stand in the observation."""
    new = set(tools.words(observation)) - set(tools.words(question)) - distill.OPENERS
    spans = []
    for match in re.finditer(r"\w+", prompt):
        word = match.group()
        is_number = word.isdigit() and len(word) > 1  # single digits number the results
        is_fact = is_number or word[0].isupper() or word.lower() in NUMBER_WORDS
        if is_fact and word.lower() in new:
            spans.append(match.span())
    return spans


# -- evolution --

def evolution_view(run):
    """The JSON of an evolution: curves, validation, gallery, lessons, microscope. run: Evolution."""
    entries = sorted(run.memory.entries, key=lesson_rank)
    drawn = {entry.prompt for entry in telling_entries(entries)}
    lessons = []
    for entry in entries:
        pictures = lesson_pictures(run, entry) if entry.prompt in drawn else {}
        lessons.append(lesson_view(entry, pictures))

    return {"title": "GenEvolve: an evolution", "mode": "evolution", "log": run.log,
            "validation": validation_points(run), "gallery": gallery_view(run), "lessons": lessons,
            "memory": run.memory.counters | {"size": len(run.memory), "capacity": run.memory.capacity},
            "microscope": [microscope_view(run, *run.example)] if run.example else []}


def lesson_rank(entry):
    """Sorts the lessons that were used most, then those with the widest gap, to the front."""
    return -entry.retrieved, -entry.gap


def telling_entries(entries):
    """The entries whose attempts are drawn: the first three, and for each advice the one that teaches least beside."""
    clearest = {}  # advice -> (number of advices, entry)
    for entry in entries:
        bullets = sum(entry.bundle.differing().guidance.values(), [])
        for bullet in bullets:
            if bullet not in clearest or len(bullets) < clearest[bullet][0]:
                clearest[bullet] = (len(bullets), entry)
    return entries[:3] + [entry for _, entry in clearest.values()][:LESSON_PICTURES]


def validation_points(run):
    """[{"step", "reward", "reward_error", "kscore", "kscore_error", ...}], step 0 first where it was measured."""
    points = [{"step": 0} | run.first_validation] if run.first_validation else []
    for row in run.log:
        if row.get("validation"):
            points.append({"step": row["step"]} | row["validation"])
    return points


def decision_shares(trajectories):
    """{decision: share of the attempts that decide so}: how an evolution changes what its agent does."""
    decided = [decisions_of(t) for t in trajectories]
    names = decided[0] if decided else []
    return {name: sum(row[name] for row in decided) / len(decided) for name in names}


def decisions_of(t):
    """What an attempt does, as the page words it: {decision: bool}."""
    taken = distill.search_decisions(t, distill.entity_names) | distill.reference_decisions(t, distill.entity_names)
    value = {decision: value for (_, decision, _), value in taken.items()}
    prompt = t.program.gen_prompt if t.program else ""
    guides = distill.skills_read(t).values()
    return {
        "searches for facts": value["text searches"] > 0,
        "asks for the exact fact": value["queries"] == "fact",
        "follows a lead to a second page": value["leads followed"] > 0,
        "reads a guide": bool(guides),
        "looks past the first picture found": value["place"] == "later",
        "follows the wording of a guide": any(distill.follows(guide, prompt, t.question) for guide in guides),
        "writes a program that is accepted": t.program is not None}


# -- before and after --

def gallery_record(t):
    """What gallery/before.json and after.json keep of a validation attempt; its picture lies beside them."""
    return {"id": t.id, "question": t.question,
            "prompt": t.program.gen_prompt if t.program else "no program",
            "picture": t.image is not None,
            "kscore": t.judgement and t.judgement["kscore"],
            "failed": sorted(distill.failed_constraints(t))}


def save_gallery(out, when, trajectories):
    """Keep validation pictures for the gallery. when: "before" or "after"."""
    folder = model.make_folder(os.path.join(out, "gallery"))
    for t in trajectories:
        if t.image is not None:
            diffusion.write_png(os.path.join(folder, f"{when}-{t.id}.png"), t.image)
    model.write_json(os.path.join(folder, f"{when}.json"), [gallery_record(t) for t in trajectories])


def gallery_view(run):
    """[{"question", "before", "after", "truth"}] of the same validation requests; [] until there is an after."""
    folder = os.path.join(run.settings.out, "gallery")
    paths = [os.path.join(folder, name) for name in ("before.json", "after.json")]
    if not all(map(os.path.exists, paths)):
        return []
    rows = {row["id"]: row for row in run.validation}

    views = []
    for before, after in zip(*map(read_list, paths)):
        truth = ground_truth(rows.get(before["id"], {}))
        views.append({
            "question": before["question"], "truth": picture(truth),
            "before": gallery_shot(os.path.join(folder, f"before-{before['id']}.png"), before, after),
            "after": gallery_shot(os.path.join(folder, f"after-{after['id']}.png"), after, before)})
    return views


def gallery_shot(path, kept, other):
    """One side of a gallery's pair. kept, other: ``gallery_record`` of this side and of the other one."""
    shown = kept["picture"] and os.path.exists(path)
    return {"picture": picture(path) if shown else None, "kscore": kept["kscore"],
            "failed": kept.get("failed", []), "prompt": word_pieces(kept["prompt"], other["prompt"])}


def read_list(path):
    """A JSON file that holds a list."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


# -- lessons: what the best attempt did and the worst did not --

def lesson_record(best, worst):
    """What a memory entry keeps of the two attempts that it was made from: JSON of about two kilobytes.

    {"best": attempt, "worst": attempt, "differences": [{"slot", "decision", "about", "best", "worst"}]}, see
    ``attempt_record``. best, worst: Trajectory, as ``distill.select_pair`` gives them.
    """
    differences = [asdict(d) for d in distill.compare(best, worst) if d.differs]
    return {"best": attempt_record(best), "worst": attempt_record(worst), "differences": differences}


def attempt_record(t, limit=240):
    """A Trajectory with a program in short: reward, failed checks, every turn, and what draws its picture again."""
    chosen = [reference["img_id"] for reference in t.program.references]
    references = [t.images[img_id] for img_id in chosen if img_id in t.images]
    turns = []
    for step in t.steps:
        turns.append({"think": step.think[:limit], "action": action_text(step)[:limit],
                      "observation": step.observation[:limit]})
    return {"reward": t.reward, "kscore": t.judgement and t.judgement["kscore"],
            "failed": sorted(distill.failed_constraints(t)), "turns": turns, "prompt": t.program.gen_prompt,
            "references": [source.get("title") or "" for source in references],
            "files": [source["local_path"] for source in references], "seed": tools.image_seed(t.row)}


def action_text(step):
    """A turn's action in one line: the tool and what it is asked."""
    if step.kind != "tool_call":
        return step.kind.replace("_", " ")
    asked = []
    for value in step.arguments.values():
        asked += value if isinstance(value, list) else [value]
    return f"{step.name}: " + "; ".join(map(str, asked))


def lesson_view(entry, pictures):
    """A memory Entry as the page tells it. pictures: {"best": picture, "worst": picture}, or {}."""
    advice = []
    for name, bullets in entry.bundle.guidance.items():
        for bullet in bullets:
            advice.append({"slot": SLOT_OF_FIELD[name], "text": bullet.removeprefix(distill.STANDARD),
                           "standard": bullet.startswith(distill.STANDARD)})

    attempts, differences = None, []
    record = entry.attempts
    if record:
        best, worst = record["best"], record["worst"]
        attempts = {"best": marked_attempt(best, worst) | {"picture": pictures.get("best")},
                    "worst": marked_attempt(worst, best) | {"picture": pictures.get("worst")}}
        differences = [difference_view(d) for d in merged_differences(record["differences"])]

    return {"request": entry.prompt, "trigger": entry.bundle.trigger, "step": entry.step,
            "best": entry.best, "worst": entry.best - entry.gap, "retrieved": entry.retrieved,
            "advice": advice, "attempts": attempts, "differences": differences,
            "uses": entry.uses, "agreement": agreement_view(entry)}


def dropped_lesson(entry):
    """What the log keeps of a lesson that left the memory: {"request", "advice": [text], "agreement"}."""
    return {"request": entry.prompt, "advice": entry.bundle.differing().bullets(), "agreement": agreement_view(entry)}


def agreement_view(entry):
    """How far the lesson agreed with attempts at other requests: {"mean", "standard_error", "count"}, or None."""
    mean, error, count = entry.agreement()
    return {"mean": mean, "standard_error": error, "count": count} if count else None


def marked_attempt(attempt, other):
    """An attempt with marks where it differs from the other one, both as ``attempt_record`` gives them.

    A turn "differs" if the other attempt has no such action or thought; thoughts and prompt are pieces.
    """
    other_actions = [turn["action"] for turn in other["turns"]]
    other_sentences = {sentence for turn in other["turns"] for sentence in sentences_of(turn["think"])}
    prompt = word_pieces(attempt["prompt"], other["prompt"])
    program_differs = attempt["references"] != other["references"] or any(piece["differs"] for piece in prompt)

    turns = []
    for turn in attempt["turns"]:
        think = [{"text": s, "differs": s not in other_sentences} for s in sentences_of(turn["think"])]
        action_differs = program_differs if turn["action"] == "answer" else turn["action"] not in other_actions
        differs = action_differs or any(piece["differs"] for piece in think)
        turns.append(turn | {"think": think, "differs": differs})
    kept = {name: attempt[name] for name in ("reward", "kscore", "failed", "references")}
    return kept | {"prompt": prompt, "turns": turns}


def sentences_of(text):
    """The sentences of a thought."""
    return [text[start:end] for start, end in sentence_spans(text)]


def word_pieces(text, other):
    """text cut into pieces {"text", "differs"}: which of its words the other text does not have at that place."""
    words, others = text.split(), other.split()
    matcher = difflib.SequenceMatcher(None, words, others, autojunk=False)
    pieces = []
    for kind, start, end, _, _ in matcher.get_opcodes():
        if start < end:
            pieces.append({"text": " ".join(words[start:end]), "differs": kind != "equal"})
    return pieces


DECISIONS = {  # decision -> how it was decided -> what the attempt did; "n": any other number, "words": title words
    "text searches": {0: "makes no text search", 1: "makes one text search", "n": "makes {value} text searches"},
    "leads followed": {0: "stops at the first page", "n": "follows what the first page names to another page"},
    "image searches": {0: "looks for no pictures", 1: "looks for pictures once",
                       "n": "looks for pictures {value} times"},
    "queries": {"none": "asks no question", "fact": "asks for the exact fact", "name": "asks by the name alone",
                "mixed": "asks by the name first, then for the fact"},
    "skill": {True: "reads the guide on {about}", False: "leaves the guide on {about} alone"},
    "place": {"first": "takes the first picture found", "later": "looks past the first picture found",
              "none": "uses no picture of the search"},
    "title words": {"words": "takes a picture titled {value}", "n": "takes a picture without a telling title"},
    "wording": {True: "follows the wording of the guide on {about}", False: "keeps plain words for {about}"},
    "quoted text": {True: "puts the text in quotation marks", False: "quotes no text"},
    "ordinals": {0: "names no reference", "n": "names {value} of its references in order"},
    "constraint": {True: "passes the check of {about}", False: "fails the check of {about}"}}


def merged_differences(differences):
    """The differences with those that say the same of several skills, or of several checks, put into one."""
    merged = {}
    for difference in differences:
        key = json.dumps([difference[name] for name in ("slot", "decision", "best", "worst")])
        merged.setdefault(key, difference | {"about": []})
        merged[key]["about"].append(difference["about"].replace("_", " "))
    return [difference | {"about": listing(difference["about"])} for difference in merged.values()]


def listing(names):
    """["a", "b", "c"] -> "a, b and c"."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def difference_view(difference):
    """One decision that two attempts took differently: {"slot", "outcome", "best", "worst"}, the last two in words.

    outcome: whether it is a verdict of the judge, and so a consequence, not a decision.
    """
    is_outcome = difference["decision"] == "constraint"
    best, worst = decision_text(difference, "best"), decision_text(difference, "worst")
    if is_outcome:
        worst = "passes it" if difference["worst"] else "fails it"
    return {"slot": SLOT_OF_FIELD[difference["slot"]], "outcome": is_outcome, "best": best, "worst": worst}


def decision_text(difference, which):
    """What the best or the worst attempt did, from the table of decisions."""
    table, value = DECISIONS[difference["decision"]], difference[which]
    if isinstance(value, (list, tuple)):  # title words
        phrase = table["words" if value else "n"]
        value = f"“{' '.join(value[:4])}”"
    else:
        phrase = table.get(value, table.get("n", ""))
    return phrase.format(value=value, about=difference["about"])


def lesson_pictures(run, entry):
    """{"best": picture, "worst": picture} of a lesson's attempts; {} for an entry that has no record of them.

    Only a local renderer draws them: the page is no reason to ask a paid service.
    """
    record, scorer = entry.attempts, run.components.scorer
    if not record or not run.processes.is_main or not isinstance(scorer.renderer, diffusion.Renderer):
        return {}
    folder = model.make_folder(os.path.join(run.settings.out, "gallery"))
    return {which: attempt_picture(scorer, record[which], folder) for which in ("best", "worst")}


def attempt_picture(scorer, attempt, folder):
    """The picture of a lesson's attempt, drawn once and kept in the folder; None if a reference's file is gone."""
    key = json.dumps([attempt["prompt"], attempt["files"], attempt["seed"]])
    path = os.path.join(folder, f"lesson-{hashlib.sha256(key.encode()).hexdigest()[:16]}.png")
    if not os.path.exists(path):
        if not all(map(os.path.exists, attempt["files"])):
            return None
        references = [tools.read_image(file) for file in attempt["files"][:2]]
        image = scorer.renderer.render([attempt["prompt"]], [references], [attempt["seed"]], **scorer.options)[0]
        diffusion.write_png(path, image)
    return picture(path)


# -- the token microscope --

@torch.no_grad()
def microscope_view(run, t, bundle):
    """A trajectory token by token: what the student, and the teacher with and without the guide, make of it.

    A token is {"text", "p", "on", "off", "selected"}; on and off: {"gap": log q - log p in nats, "q", "prefers"} of
    the teacher with and without the guide; prefers: the token it likes best, "" if that is the one that was written.
    """
    tokenizer = run.tokenizer
    row = distill.TrainingRow(t.tokens, t.mask, 0.0, *distill.teacher_view(t, bundle, run.tokenizer))
    temperature, recipe = run.settings.temperature, run.recipe

    # three views of the same action tokens: the student's, the teacher's without the guide, the teacher's with it
    student = distill.score_actions(run.net, [t.tokens], [t.mask], temperature, True)
    unguided = distill.score_actions(run.teacher, [t.tokens], [t.mask], temperature, True)
    guided, _, score = distill.teacher_scores(run.teacher, student, [row], recipe, temperature, with_logits=True)
    selected = distill.select_tokens(guided.logp - student.logp, student.mask, recipe, score)[0].tolist()

    positions = [i for i, is_action in enumerate(t.mask) if is_action]
    written = [t.tokens[i] for i in positions]
    p = student.logp[0].exp().tolist()
    on = teacher_tokens_view(tokenizer, written, student, guided)
    off = teacher_tokens_view(tokenizer, written, student, unguided)

    turns = []
    for n, i in enumerate(positions):
        starts_turn = n == 0 or i != positions[n - 1] + 1
        if starts_turn:
            step = t.steps[len(turns)] if len(turns) < len(t.steps) else None
            turns.append(microscope_turn(step, bundle))
        turns[-1]["tokens"].append({"text": tokenizer.decode([written[n]]), "p": p[n], "on": on[n], "off": off[n],
                                    "selected": selected[n]})
    return {"question": t.question, "guide": bundle.markdown(), "turns": turns}


def teacher_tokens_view(tokenizer, written, student, teacher):
    """[{"gap", "q", "prefers"}], one a written token. student, teacher: TokenScores with logits of one row."""
    gaps = (teacher.logp - student.logp)[0].tolist()
    q = teacher.logp[0].exp().tolist()
    preferred = teacher.logits[0].argmax(-1).tolist()

    views = []
    for n, token in enumerate(written):
        prefers = tokenizer.decode([preferred[n]]) if preferred[n] != token else ""
        views.append({"gap": gaps[n], "q": q[n], "prefers": prefers})
    return views


def microscope_turn(step, bundle):
    """The heading of a turn under the microscope: its slots and what the guide says about them."""
    tool = step.name if step and step.kind == "tool_call" else ""
    slots = TURN_SLOTS.get(tool, []) if step else []
    advice = []
    for slot in slots:
        for name in distill.SLOTS[slot]:
            advice += bundle.guidance[name]
    return {"slots": slots, "advice": advice, "tokens": []}


# -- the file --

DATA_TAG = '<script type="application/json" id="data">'


def write_report(path, view):
    """One self-contained file that shows a view."""
    model.write_text(path, page_text(view))


def page_text(view):
    """web/report.html with the view's JSON in it."""
    with open(PAGE, encoding="utf-8") as file:
        page = file.read()
    head, _, rest = page.partition(DATA_TAG)
    _, closing, tail = rest.partition("</script>")

    text = json.dumps(model.without_nan(view), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c")  # no tag in the data ends the element
    return head + DATA_TAG + text + closing + tail


def holds_view(path):
    """Whether a report.html is of this page's making: the data stand behind the style."""
    with open(path, encoding="utf-8") as file:
        return DATA_TAG in file.read(2**16)


def read_view(path):
    """The JSON that a report.html draws."""
    with open(path, encoding="utf-8") as file:
        _, _, rest = file.read().partition(DATA_TAG)
    return json.loads(rest.partition("</script>")[0])
