"""What the agent and the bench need to know of the Atlas: its requests, its oracle, its vocabulary, and the compact
form of the protocol in which the embedded policy was trained."""
import functools
import json
import os
import re

import tools

HERE = os.path.dirname(os.path.abspath(__file__))

COMPACT_SYSTEM = "You plan pictures with tools.\n# Tools\nsearch, image_search, query_knowledge"


def compact_messages(messages, guides, known=()):
    """A conversation from another runtime in the form that the embedded policy was trained on: its one system prompt,
    the bare request where the text contains one of the ``known``, one-line guides, short observations."""
    reduced, called = [{"role": "system", "content": COMPACT_SYSTEM}], None
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            called = tools.parse_turn(text)
        elif message["role"] == "user" and called is None:
            text = next((question for question in known if question in text), text)
        elif message["role"] == "user" and (body := re.search(r"<tool_response>\n?(.*?)\n?</tool_response>", text,
                                                              re.S)):
            text = f"<tool_response>\n{compact_observation(called, body.group(1), guides)}\n</tool_response>"
        if message["role"] != "system":
            reduced.append({"role": message["role"], "content": text})
    return reduced


def compact_observation(turn, text, guides):
    """What a tool answered elsewhere, as ``tools.CompactSession`` would have said it; errors stay as they are."""
    if turn.name == "query_knowledge" and turn.arguments.get("skill_name") in guides:
        return guides[turn.arguments["skill_name"]].rpartition(tools.ONE_LINE)[2].strip()
    title = lambda block: (re.search(r"title\W+(.+)", block, re.I) or re.search(r"(\S.*)", block)
                           or [block, ""])[1].strip()
    if turn.name == "image_search" and (found := re.findall(r"(IMG_\d+)\W*(.*?)(?=IMG_\d+|\Z)", text, re.S)):
        return "\n".join(f"{img_id} {title(block)}" for img_id, block in found[:tools.COMPACT_TOP_K["image_search"]])
    if turn.name == "search" and (found := re.findall(r"snippet\W+(.+?)\s*$", text, re.I | re.M)):
        return "\n".join(f"{i}. {snippet}" for i, snippet in enumerate(found[:tools.COMPACT_TOP_K["search"]], 1))
    return text


def requests(split):
    return tools.read_requests(os.path.join(HERE, f"{split}.jsonl"))


def vocabulary():
    with open(os.path.join(HERE, "world.json"), encoding="utf-8") as file:
        return json.load(file)


def default_request():
    """The validation request that asks most: a fact two pages away, the right look, and as many skills as any such."""
    rows = [r for r in requests("validation") if r["recipe"]["factual_gap"] == "founding year"]
    return max(rows, key=lambda r: len(r["recipe"]["wanted"]["skills"]))


@functools.cache
def known_requests():
    """Requests of the Atlas by their text: what has a ground truth can be judged."""
    return {r["question"]: r for split in ("validation", "evolve", "bench") for r in requests(split)}


def oracle():
    """What the world knows of its requests: id -> oracle program, right advice."""
    with open(os.path.join(HERE, "oracle.jsonl"), encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}
