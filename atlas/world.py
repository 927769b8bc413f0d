"""What the agent, the scorer and the bench read of the Atlas: its requests, what it knows about them, its vocabulary,
and the compact form of the protocol in which the embedded policy was trained. ``atlas/build.py`` writes all of it.

    rows = world.requests("validation")                      # "evolve", "validation" or "bench"
    judge = atlas.judge.PixelJudge(world.vocabulary())
    bundle = distill.summarize_pair(question, best, worst, world.phrases())
    share = world.right_advice(rows, bundles)                # of the bullets, how many the world knows to be right

Contents:
    requests, known_requests        rows of a split; all of them by their text
    default_request, samples        what to show first
    vocabulary, phrases             glyphs, shapes, colours, bodies; the phrases in which the policy decides
    oracle, right_advice            the right program and advice of every request; advice measured against it
    compact_messages                another runtime's conversation in the policy's own form
    compact_observation             the same for one observation of a tool
"""
import functools
import json
import math
import os
import re

import distill
import tools

HERE = os.path.dirname(os.path.abspath(__file__))


# ---- Requests --------------------------------------------------------------------------------------------------------

def requests(split, folder=HERE):
    """Rows of a split: [dict], see ``build.make_request``; "recipe" holds what the judges read. folder: of a world that
    ``build.build_world`` wrote."""
    return tools.read_requests(os.path.join(folder, f"{split}.jsonl"))


@functools.cache
def known_requests():
    """Requests of the Atlas by their text: {question: row}. What has a ground truth can be judged."""
    return {row["question"]: row for split in ("validation", "evolve", "bench") for row in requests(split)}


def default_request():
    """The validation request that asks most: a fact two pages away, the right look, and as many skills as any such."""
    two_hops = [row for row in requests("validation") if row["recipe"]["factual_gap"] == "founding year"]
    return max(two_hops, key=lambda row: len(row["recipe"]["wanted"]["skills"]))


SHOWN = ("validation-0035", "validation-0036")  # copies and a code word; two subjects side by side


def samples(n=3):
    """n validation requests that show what can be asked: the default one, those of SHOWN, then the others in order."""
    rows = requests("validation")
    shown = [row for row in rows if row["id"] in SHOWN]
    ordered = {row["id"]: row for row in [default_request()] + shown + rows}
    return list(ordered.values())[:n]


# ---- What the world knows --------------------------------------------------------------------------------------------

def vocabulary():
    """The parsed world.json: "glyphs", "shapes", "colours", "bodies" (for the judge) and "guide" (see ``phrases``)."""
    with open(os.path.join(HERE, "world.json"), encoding="utf-8") as file:
        return json.load(file)


def phrases():
    """The words in which the embedded policy states its decisions: {field of a bundle: {phrase: bullet}}."""
    return vocabulary()["guide"]


@functools.cache
def oracle(folder=HERE):
    """What is right for every request: {id: {"gen_prompt", "references", "guide", "probes"}} (``build.oracle_of``)."""
    with open(os.path.join(folder, "oracle.jsonl"), encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}


def right_advice(rows, guides):
    """Mean share of a guide's bullets that the world knows to be right for the request.

    rows: requests; guides: the bundle that each was shown, or None. Requests without a guide, and requests that the
    world does not know, are left out; nan if none remains.
    """
    known = known_requests()  # by their text: another file may have the same ids
    return distill.average([right_share(row["id"], guide) for row, guide in zip(rows, guides)
                            if row.get("question") in known])


def right_share(request_id, guide):
    """Share of one guide's bullets that are right for a request; nan where there is nothing to compare."""
    right = oracle().get(request_id, {}).get("guide")
    if not right or guide is None:
        return math.nan
    verdicts = []
    for field, bullets in guide.guidance.items():
        verdicts += [bullet.removeprefix(distill.STANDARD) in right.get(field, []) for bullet in bullets]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


# ---- The compact protocol --------------------------------------------------------------------------------------------

COMPACT_SYSTEM = "You plan pictures with tools.\n# Tools\nsearch, image_search, query_knowledge"


def compact_messages(messages, guides, known=()):
    """A conversation from another runtime in the form that the embedded policy was trained on: its one system prompt,
    the bare request where the text contains one of the ``known``, one-line guides, short observations."""
    reduced, called = [{"role": "system", "content": COMPACT_SYSTEM}], None
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "system":
            continue
        if role == "assistant":
            called = tools.parse_turn(text)
        elif role == "user" and called is None:  # before the first turn: the request
            text = next((question for question in known if question in text), text)
        elif role == "user":
            text = compact_response(called, text, guides)
        reduced.append({"role": role, "content": text})
    return reduced


def compact_response(called, text, guides):
    """A user message with what the tool called by the last turn answered; a message of another kind stays as it is."""
    response = re.search(r"<tool_response>\n?(.*?)\n?</tool_response>", text, re.S)
    if not response:
        return text
    return f"<tool_response>\n{compact_observation(called, response[1], guides)}\n</tool_response>"


def compact_observation(turn, text, guides):
    """What a tool answered elsewhere, as ``tools.CompactSession`` would have said it; errors stay as they are.

    turn: the parsed turn that called the tool; guides: {skill: Markdown guide}.
    """
    if turn.name == "query_knowledge":
        guide = guides.get(turn.arguments.get("skill_name"))
        return text if guide is None else guide.rpartition(tools.ONE_LINE)[2].strip()

    limit = tools.COMPACT_TOP_K.get(turn.name)
    if turn.name == "image_search":
        found = re.findall(r"(IMG_\d+)\W*(.*?)(?=IMG_\d+|\Z)", text, re.S)
        lines = [f"{img_id} {image_title(block)}" for img_id, block in found[:limit]]
    elif turn.name == "search":
        snippets = re.findall(r"snippet\W+(.+?)\s*$", text, re.I | re.M)
        lines = [f"{number}. {snippet}" for number, snippet in enumerate(snippets[:limit], 1)]
    else:
        lines = []
    return "\n".join(lines) or text


def image_title(block):
    """The title in the lines about one picture: what follows the word "title", else the first line with text."""
    found = re.search(r"title\W+(.+)", block, re.I) or re.search(r"(\S.*)", block)
    return found[1].strip() if found else ""
