"""The outside world: everything that the agent reads, asks for or sends goes through this file, and over HTTP.

    python genevolve.py serve --corpus DIR                 a key-free search backend over your own texts and images
    curl -d '{"q": "founding year", "num": 3}' localhost:8765/search

    turn = tools.parse_turn(text)                                       # a thought, then one tool call or one answer
    observation = session.call(turn.name, turn.arguments)               # session = toolbox.session(); never raises
    program, errors = tools.parse_program(turn.arguments, session)      # the answer: z = (g, R)

Contents, in reading order:

    parse_turn                      what the policy wrote -> Turn
    Program, check_program          what the renderer carries out, and everything that it has to satisfy
    read_requests                   requests of a .json or .jsonl file
    ToolSession                     search, image_search and query_knowledge, as one trajectory sees them
    ToolBox                         the same three as HTTP clients, shared by all trajectories
    Index, Corpus                   BM25 over any folder of texts and pictures
    Machine room:
    ChatClient, RemoteRenderer, GoogleRenderer                          services that other people run
    VLLMClient, SGLangClient                                            servers that write trajectories to learn from
    Server                          search, pictures, chat, judge and renderer over HTTP, from a folder and callables
    check_url, Tape, HttpClient     the guard of addresses, record and replay, deadlines and retries

Where this differs from a plain reading of the method, and why:

1. A query that failed may be asked again; only a query that was answered counts as repeated. Networks do fail.
2. There are two forms of an observation. The full form has titles, links and paths; the compact form, for the small
   embedded policy, has one short line per result and nothing that changes from run to run (no port, no path).
3. Text from outside is material: tags of the turn format and special tokens in it are defused before a policy reads it.
4. Images are fetched without any proxy, because the guard has to see the address that is really connected to.

Rules for every client here: a failure raises ToolError with one line that names no key; nothing outlives its deadline.
Pictures are RGB, uint8 (H, W, 3), H and W in pixels. Times are seconds.
"""
import base64
import codecs
import contextlib
import hashlib
import http.client
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import socket
import socketserver
import struct
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import numpy as np
import requests
import urllib3  # requests stands on it; only here can the guard see the address that a socket connects to
from urllib3.util.connection import create_connection

import diffusion
import model


class ToolError(Exception):
    """Something outside did not work, or may not be used. The message is one line and holds no key."""


class ServiceError(ToolError):
    """A service failed, refused, or answered what makes no sense."""


class BudgetExceeded(ServiceError):
    """The number of paid calls that was allowed is used up."""


def load_json(text, strict=True, repair=False):
    """Strict JSON: no NaN, no half surrogates, no bottomless nesting. Raises ValueError in one line.

    text: str or bytes (UTF-8). strict: if False, line ends and tabs may stand in strings as they are.
    repair: half surrogates become U+FFFD, for replies in which one odd character must not cost all the rest.
    """
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, parse_constant=refuse, strict=strict)
        value = without_surrogates(value) if repair else value
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no 1e999, no half of a surrogate pair
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError:
        raise ValueError("not valid Unicode") from None


def without_surrogates(value):
    """A JSON value in which each half of a surrogate pair is U+FFFD."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(item) for name, item in value.items()}
    return value


def json_object(text, repair=False):
    """As load_json; ValueError unless it is an object."""
    value = load_json(text, repair=repair)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


# ---- The protocol: a turn -------------------------------------------------------------------------------------------

ACTION = re.compile(r"\s*<(tool_call|answer)>(.*)</\1>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|tool_call|answer)>")
FENCED = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
END_TOKENS = re.compile(r"(?:\s*(?:<\|\w+\|>|</s>))+\s*\Z")  # which some servers leave at the end of a text


def tool_schemas(skills):
    """The tools as JSON schemas, for the system prompt of a function-calling model. skills: see read_skills.

    A new tool is one more entry here and a method of the same name in ToolSession.
    """
    queries = {"type": "array", "items": {"type": "string"}, "description": "What to look up."}
    query = {"type": "string", "description": "What the picture should show."}
    skill_name = {"type": "string", "enum": list(skills)}
    top_k = {"type": "integer", "minimum": 1, "maximum": 10, "description": "Number of results wanted (default 5)."}
    return [
        tool_schema("search", "Look facts up in text pages. Several queries may be asked at once.",
                    "queries", queries=queries, top_k=top_k),
        tool_schema("image_search", "Find pictures that can serve as references. Each gets an id IMG_###.",
                    "query", query=query, top_k=top_k),
        tool_schema("query_knowledge", "Read the guide of one drawing skill before writing the program.",
                    "skill_name", skill_name=skill_name)]


def tool_schema(name, description, required, **properties):
    parameters = {"type": "object", "properties": properties, "required": [required]}
    return {"type": "function",
            "function": {"name": name, "description": description, "parameters": parameters}}


TOOL_NAMES = tuple(schema["function"]["name"] for schema in tool_schemas(skills=()))


@dataclass
class Turn:
    """One turn of the policy, taken apart."""
    think: str
    kind: str         # "tool_call", "answer" or "format_error"
    name: str         # the tool; "" for an answer
    arguments: dict   # of the tool call, or the answer itself
    error: str = ""   # one line, for a format error


def parse_turn(text):
    """`<think>...</think>` and then exactly one `<tool_call>{...}</tool_call>` or `<answer>{...}</answer>`.

    The opening <think> may be missing (some chat templates write it into the prompt). Accepted, because models write
    them and the meaning is plain: JSON in a ``` fence, line ends in its strings, arguments as a JSON text, further keys
    beside name and arguments, special tokens at the end. Never raises.
    """
    think, closed, rest = END_TOKENS.sub("", text).partition("</think>")
    think = think.strip().removeprefix("<think>").strip()
    try:
        if not closed:
            raise ValueError("no </think>")
        if "<think>" in think:
            raise ValueError("a turn starts with <think>, once")
        kind, name, arguments = parse_action(rest)
    except ValueError as error:
        return Turn(think, "format_error", "", {}, " ".join(str(error).split()))
    return Turn(think, kind, name, arguments)


def parse_action(rest):
    """What follows </think> -> (kind, tool name, arguments). Raises ValueError with the reason."""
    action = ACTION.fullmatch(rest)
    if not action:
        raise ValueError("one closed <tool_call> or <answer> must follow </think>, and nothing else")

    kind, body = action.groups()
    fenced = FENCED.fullmatch(body)
    try:
        value = load_json(fenced.group(1) if fenced else body, strict=False)
    except ValueError as error:
        if TAG.search(body):  # in a string of valid JSON, a tag is text
            raise ValueError("more than one action in a turn") from None
        raise ValueError(f"<{kind}> does not hold valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"<{kind}> must hold a JSON object")
    if kind == "answer":
        return kind, "", value
    return kind, *read_tool_call(value)


def read_tool_call(value):
    """{"name": ..., "arguments": {...}} -> (tool name, arguments). Raises ValueError with the reason."""
    name = value.get("name")
    arguments = value.get("arguments")
    if isinstance(arguments, str):  # as OpenAI's function calls have it
        try:
            arguments = load_json(arguments, strict=False)
        except ValueError as error:
            raise ValueError(f"the arguments are not valid JSON ({error})") from None
    if name is None or not isinstance(arguments, dict):
        raise ValueError('<tool_call> must hold {"name": ..., "arguments": {...}}')
    if name not in TOOL_NAMES:
        raise ValueError(f"unknown tool; the tools are {', '.join(TOOL_NAMES)}")
    return name, arguments


# ---- The protocol: a program ----------------------------------------------------------------------------------------

MAX_PROGRAM = 4000  # characters of prompt and notes: 13 times the Atlas's longest, and about what image models read
MIN_SENTENCE = 4    # words from which on a sentence counts as repeated; a sign may well say "Stop. Stop."
REFERENCE_PHRASES = ("the first reference image", "the second reference image")  # how gen_prompt names a reference
REFERENCE_WORDS = re.compile(r"(?:\b(?:the first|the second) )?\breference (?:image|picture|photo)s?\b", re.I)
REFERENCE_NUMBER = re.compile(r"\breference (image )?#?\d", re.I)


@dataclass
class Program:
    """z = (g, R): what the renderer carries out."""
    gen_prompt: str
    references: list  # one or two {"img_id": "IMG_001", "note": str}, sorted by img_id


def parse_program(answer, session):
    """A policy's answer {"gen_prompt", "reference_images": [{"img_id", "note"}]} -> (Program or None, errors).

    session: a ToolSession, or anything that has the ``images`` and ``queries`` of the trajectory.
    """
    prompt = answer.get("gen_prompt") if isinstance(answer, dict) else None
    given = answer.get("reference_images") if isinstance(answer, dict) else None
    if not isinstance(prompt, str) or not isinstance(given, list):
        return None, ['the answer must be {"gen_prompt": text, "reference_images": [...]}']
    if not all(isinstance(reference, dict) and isinstance(reference.get("img_id"), str) for reference in given):
        return None, ['each reference image must be {"img_id": "IMG_001", "note": text}']

    references = [{"img_id": reference["img_id"], "note": str(reference.get("note", ""))} for reference in given]
    program = Program(prompt, references)
    errors = check_program(program, session.images, session.queries)
    return (None, errors) if errors else (program, [])


def check_program(program, images, queries):
    """Everything a program has to satisfy. Returns a list of errors, empty if there are none.

    images: the img_ids known to the trajectory. queries: [(tool, query)] in the order in which they were asked.
    """
    errors = []
    prompt = program.gen_prompt
    img_ids = [reference["img_id"] for reference in program.references]
    unknown = [img_id for img_id in img_ids if img_id not in images]

    if not prompt.strip():
        errors.append("gen_prompt is empty")
    size = len(prompt) + sum(len(reference["note"]) for reference in program.references)
    if size > MAX_PROGRAM:
        errors.append(f"gen_prompt and notes have {size} characters; at most {MAX_PROGRAM} are taken, so say less")
    if repeated := repeated_sentence(prompt):
        errors.append(f'gen_prompt says "{sanitize(repeated, 80)}" twice; say everything once')

    # R: an unknown id is an error; dropping it would turn "the first reference image" into another picture
    if not 1 <= len(img_ids) <= 2:
        errors.append(f"{len(img_ids)} reference images; one or two are used")
    if unknown:
        errors.append(f"unknown img_id {sanitize(', '.join(unknown), 80)}")  # the policy's own text, of any length
    if img_ids != sorted(set(img_ids)):
        errors.append("reference images must differ and be sorted by img_id")

    # g: the renderer sees the pictures in their order, and neither ids nor pages
    if re.search(r"IMG_\d", prompt):
        errors.append("gen_prompt contains an img_id; write the first reference image")
    if re.search(r"\b(https?://|www\.)", prompt, re.I):
        errors.append("gen_prompt contains a URL")
    phrases = REFERENCE_WORDS.findall(prompt)
    if any(phrase.lower() not in REFERENCE_PHRASES for phrase in phrases) or REFERENCE_NUMBER.search(prompt):
        errors.append("gen_prompt may name references only as the first reference image, the second reference image")
    if REFERENCE_PHRASES[1] in prompt.lower() and len(img_ids) < 2:
        errors.append("gen_prompt names the second reference image, but there is only one")

    # the calls that led to the program
    if not any(tool == "image_search" for tool, _ in queries):
        errors.append("no image_search was made")
    if len(set(queries)) < len(queries):
        errors.append("a query was repeated")
    return errors


def repeated_sentence(prompt):
    """The first sentence of MIN_SENTENCE words or more that a prompt has said before, capitals and marks aside; ""."""
    seen = set()
    for sentence in re.split(r"(?<=[.!?;])\s+|\n+", prompt):
        said = tuple(re.findall(r"\w+", sentence.casefold()))
        if len(said) >= MIN_SENTENCE and said in seen:
            return sentence
        seen.add(said)
    return ""


# ---- Requests files -------------------------------------------------------------------------------------------------

MAX_REQUEST = 8000                                  # characters of a request
QUESTION_FIELDS = ("question", "prompt", "Prompt")  # of bench rows, of RL rows, of WISE's prompts


def read_requests(path):
    """Rows of a .json (list) or .jsonl file, each with "id", "question" and the folder of its pictures, "_folder".

    Reads the released bench and RL rows, WISE's prompts, or anybody's. Raises ValueError in one line.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None

    rows = list_rows(text, path) if path.endswith(".json") else line_rows(text, path)
    if not rows:
        raise ValueError(f"{path}: no requests in it")
    return rows


def list_rows(text, path):
    """The rows of a JSON list."""
    rows = parse_json(text, path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a list of requests")
    folder = os.path.dirname(path) or "."
    return [request_row(row, number, f"{path}, entry {number}", folder) for number, row in enumerate(rows, 1)]


def line_rows(text, path, before=0):
    """The rows of JSON lines. before: lines of the file that stand before the text."""
    rows, folder = [], os.path.dirname(path) or "."
    for number, line in enumerate(text.split("\n"), before + 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(request_row(parse_json(line, where), number, where, folder))
    return rows


class RequestStream:
    """A .jsonl file of requests to which another program goes on adding lines.

    size: bytes that were read so far. Whatever stands there must not change any more. is_unfinished: whether half a
    line stood behind them.
    """

    def __init__(self, path):
        self.path, self.size, self.lines, self.ids = path, 0, 0, set()
        self.is_unfinished = False
        self.hash = hashlib.sha256()

    def read_new(self):
        """The rows that were added since the last time. A last line that is half written stays for the next time.

        Raises ValueError as ``read_requests``, and where an id comes twice or the file became shorter; then nothing
        counts as read, so that the mended file can be read on.
        """
        data = self.new_bytes()
        try:
            text = data.decode("utf-8-sig" if self.size == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 text (byte {self.size + error.start})") from None
        rows = line_rows(text, self.path, self.lines)
        ids = [str(row["id"]) for row in rows]
        doubles = [name for number, name in enumerate(ids) if name in self.ids or name in ids[:number]]
        if doubles:
            raise ValueError(f"{self.path}: several requests have the id {doubles[0]!r}; an id belongs to one request")

        self.size += len(data)
        self.lines += data.count(b"\n")
        self.ids.update(ids)
        self.hash.update(data)
        return rows

    def new_bytes(self):
        """Whole lines behind those that were read. The last one may lack its line end if it is a whole JSON object."""
        if not os.path.isfile(self.path):
            raise ValueError(f"{self.path}: no such file")
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self.size:
                raise ValueError(f"{self.path}: shorter than what was read of it; lines may only be added")
            file.seek(self.size)
            data = file.read()
        whole, _, rest = data.rpartition(b"\n")
        try:
            is_whole = isinstance(json.loads(rest), dict)
        except (ValueError, RecursionError):
            is_whole = False
        self.is_unfinished = bool(rest.strip()) and not is_whole
        return data[:len(data) - len(rest)] if self.is_unfinished else data

    def fingerprint(self):
        """Of what was read: {"bytes", "sha256"}."""
        return {"bytes": self.size, "sha256": self.hash.hexdigest()}


def fingerprint_of_beginning(path, size):
    """As ``RequestStream.fingerprint``, of the first bytes of a file; of fewer if it is shorter."""
    with open(path, "rb") as file:
        data = file.read(size)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def parse_json(text, where):
    """The value of a JSON text. ValueError in one line; where: the file, and the line if the text is one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:  # its own line number counts from the beginning of the text
        line = f", line {error.lineno}" if "\n" in text else ""
        raise ValueError(f"{where}{line}: not valid JSON ({error.msg} at character {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deep)") from None


def request_row(row, number, where, folder):
    """Check one row of a requests file. Its fields pass through; "id" is the row's, WISE's, or the line's number."""
    texts = [row[name] for name in QUESTION_FIELDS if row.get(name)] if isinstance(row, dict) else []
    if not texts or not isinstance(texts[0], str):
        raise ValueError(f"{where}: no prompt or question")
    question = check_request(texts[0], f"{where}: ")
    default_id = str(row.get("prompt_id", f"{number:04d}"))
    return {"id": default_id} | row | {"question": question, "_folder": folder}


def check_request(text, where=""):
    """A request without blanks around it. ValueError if it is empty or too long; where: the message's beginning."""
    if not text.strip():
        raise ValueError(f"{where}the request is empty")
    if len(text) > MAX_REQUEST:
        raise ValueError(f"{where}the request has {len(text)} characters; at most {MAX_REQUEST} are taken")
    return text.strip()


def truth_of(row):
    """The ground-truth picture of a row, uint8 (H, W, 3)."""
    return read_image(os.path.join(row["_folder"], row["gt_image"]))


def image_seed(row):
    """One noise per request, so that two programs for it differ by their words and references alone."""
    return zlib.crc32(f"{row['id']} {row['question']}".encode())


# ---- The three tools ------------------------------------------------------------------------------------------------

PUBLISHED_SKILLS = frozenset((  # the method's eight; a folder of guides may hold more, and these stand first
    "aesthetic_drawing", "anatomy_body_coherence", "attribute_binding", "creative_drawing",
    "physical_material_consistency", "quantity_counting", "spatial_layout", "text_rendering"))
ONE_LINE = "## In one line"                           # the section of a guide that the compact form shows
TOP_K_DEFAULT = 5
COMPACT_TOP_K = {"search": 2, "image_search": 3}
MAX_QUERIES, MAX_QUERY = 8, 400                       # in one call; characters of each
MAX_TITLE, MAX_LINK, MAX_SNIPPET = 160, 300, 500      # characters that an observation shows


def read_skills(folder):
    """{skill name: its guide} from the Markdown files of a folder: the published skills, then all others, by name.

    A new file is a new skill: query_knowledge and its schema offer what is read here. ToolError if one is unreadable.
    """
    try:
        names = [name.removesuffix(".md") for name in os.listdir(folder) if name.endswith(".md")]
        names.sort(key=lambda name: (name not in PUBLISHED_SKILLS, name))
        return {name: read_bytes(os.path.join(folder, f"{name}.md")).decode() for name in names}
    except (OSError, UnicodeError) as error:
        raise ToolError(f"{folder}: the skill guides cannot be read ({error})") from None


def sanitize(text, limit=MAX_SNIPPET):
    """Text from outside as one line of data: no control characters, no tags of the turn format, no special tokens."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    text = re.sub(r"<(?=\s*(?:\||/?\s*(?:think|tool_call|tool_response|answer)\b))", "‹", text, flags=re.IGNORECASE)
    return text if len(text) <= limit else text[:limit - 1] + "…"


class ToolSession:
    """The tools as one trajectory sees them: its image ids and the queries that it has asked.

    images: img_id -> {"local_path", "url", "title", "page_url"}. queries: [(tool, query)] that were answered.
    box: finds pages and pictures for all sessions; a ToolBox (over HTTP) or a CorpusBox (in memory).
    """

    def __init__(self, box):
        self.box = box
        self.images = {}
        self.queries = []
        self.failures = Counter()  # (tool, query) -> how often it failed: the attempt_index of the next call

    def call(self, name, arguments):
        """The observation that answers a tool call. Never raises for anything a policy or a service may do: a failure
        is an observation that starts with "Error:"."""
        try:
            if not isinstance(arguments, dict) or name not in TOOL_NAMES:
                raise ToolError(f"unknown tool; the tools are {', '.join(TOOL_NAMES)}")
            return getattr(self, name)(arguments)
        except (ToolError, OSError) as error:
            return f"Error: {sanitize(str(error))}"

    def search(self, arguments):
        """Titles, links and snippets for each query, numbered."""
        top_k = self.check_arguments("search", arguments, "queries")
        queries = arguments["queries"]
        if not isinstance(queries, list) or not 1 <= len(queries) <= MAX_QUERIES:
            raise ToolError(f"queries must be a list of 1 to {MAX_QUERIES} texts")
        queries = self.new_queries("search", queries)

        # one call may find answers for some queries and fail for others
        attempt_indices = [self.failures["search", query] for query in queries]
        observations = []
        for query, hits in zip(queries, self.box.find_pages(queries, top_k, attempt_indices)):
            if isinstance(hits, ToolError):  # not an answer: this query may be asked again
                self.failures["search", query] += 1
                observations.append(f"Error: {sanitize(str(hits))}")
            else:
                self.queries.append(("search", query))
                observations.append(self.show_pages(query, hits))
        return "\n".join(observations)

    def show_pages(self, query, hits):
        """The results of one query as text. hits: [{"title", "link", "snippet"}]."""
        compact = self.box.compact
        if not hits:
            return "Nothing found." if compact else f'Nothing found for "{sanitize(query)}".'
        lines = [] if compact else [f'Results for "{sanitize(query)}":']
        for number, hit in enumerate(hits, 1):
            title, snippet = sanitize(hit["title"], MAX_TITLE), sanitize(hit["snippet"])
            if not compact:
                link = sanitize(hit["link"], MAX_LINK)
                lines.append(f"{number}. title: {title}\n   url: {link}\n   snippet: {snippet}")
            elif title in snippet:  # need not be said twice
                lines.append(f"{number}. {snippet}")
            else:
                lines.append(f"{number}. {title}: {snippet}")
        return "\n".join(lines)

    def image_search(self, arguments):
        """Pictures with their ids. A picture that this trajectory has met before keeps its id."""
        top_k = self.check_arguments("image_search", arguments, "query")
        query, = self.new_queries("image_search", [arguments["query"]])
        try:
            found = self.box.find_images(query, top_k, self.failures["image_search", query])
        except ToolError:
            self.failures["image_search", query] += 1
            raise
        self.queries.append(("image_search", query))
        if not found:
            return "Nothing found."

        # equal pictures have equal paths (a hash of their content), so a path stands for a picture
        lines = [] if self.box.compact else [f'Images for "{sanitize(query)}":']
        known_ids = {image["local_path"]: img_id for img_id, image in self.images.items()}
        for image in found:
            title = sanitize(image["title"], MAX_TITLE) or "untitled"
            img_id = known_ids.setdefault(image["local_path"], f"IMG_{len(self.images) + 1:03d}")
            self.images.setdefault(img_id, image | {"title": title})
            lines.append(self.show_image(img_id))
        return "\n".join(lines)

    def show_image(self, img_id):
        image = self.images[img_id]
        if self.box.compact:
            return f"{img_id} {image['title']}"
        return (f"{img_id} title: {image['title']}\n"
                f"  url: {sanitize(image['url'], MAX_LINK)}\n"
                f"  local path: {os.path.basename(image['local_path'])}\n"
                f"  page url: {sanitize(image['page_url'], MAX_LINK)}")

    def query_knowledge(self, arguments):
        """A skill's guide; in the compact form only its one line."""
        name = arguments.get("skill_name")
        if set(arguments) != {"skill_name"} or not isinstance(name, str) or name not in self.box.skills:
            raise ToolError(f"skill_name must be one of {', '.join(self.box.skills)}")
        guide = self.box.skills[name]
        if self.box.compact:
            guide = guide.rpartition(ONE_LINE)[2]
        return guide.strip()

    def check_arguments(self, tool, arguments, required):
        """Check the names of a call's arguments and top_k; returns the latter."""
        if required not in arguments or set(arguments) - {required, "top_k"}:
            raise ToolError(f"{tool} takes {required} and top_k")
        default = COMPACT_TOP_K[tool] if self.box.compact else TOP_K_DEFAULT
        top_k = arguments.get("top_k", default)
        if type(top_k) is not int or not 1 <= top_k <= 10:  # True is an int, too
            raise ToolError("top_k must be a whole number from 1 to 10")
        return top_k

    def new_queries(self, tool, queries):
        """The queries with blanks collapsed, if each is a text that was not asked before."""
        asked = {(name, query.casefold()) for name, query in self.queries}
        collapsed = []
        for query in queries:
            if not isinstance(query, str) or not query.strip():
                raise ToolError("a query must be a text that is not empty")
            query = " ".join(query.split())
            if len(query) > MAX_QUERY:
                raise ToolError(f"a query has at most {MAX_QUERY} characters")
            if (tool, query.casefold()) in asked:
                raise ToolError(f'repeated query "{query}"; ask something new')
            asked.add((tool, query.casefold()))
            collapsed.append(query)
        return collapsed


class CorpusBox:
    """Finds in a corpus in memory, without HTTP and without files: for making demonstrations."""
    compact = True

    def __init__(self, corpus, skills):
        self.corpus = corpus
        self.skills = skills

    def find_pages(self, queries, top_k, attempt_indices):
        return [[{"title": page.title, "link": "", "snippet": snippet}
                 for page, snippet in self.corpus.search(query, top_k)] for query in queries]

    def find_images(self, query, top_k, attempt_index):
        return [{"local_path": picture.path, "url": "", "title": picture.title, "page_url": ""}
                for picture in self.corpus.search_images(query, top_k)]


class CompactSession(ToolSession):
    """A session on a corpus in memory that answers in exactly the compact form."""

    def __init__(self, corpus, skills):
        super().__init__(CorpusBox(corpus, skills))


class ToolBox:
    """The tools as HTTP clients of a Serper-compatible service, shared by all trajectories and threads.

    search_url: named by the user, so pictures on exactly its origin may be fetched. Nothing else private is.
    timeout, deadline, retries, backoff, tape, budget, limiter: see HttpClient; downloads have no budget and no limiter.
    max_bytes: of a picture.
    """

    def __init__(self, search_url, skills_dir, image_dir, api_key="", compact=False, tape=None, budget=None,
                 limiter=None, key_hint="", timeout=15.0, deadline=60.0, retries=3, backoff=0.5, max_bytes=20 * 2**20):
        self.search_url = service_url(search_url, "search")
        self.skills = read_skills(skills_dir)
        self.compact = compact
        self.headers = {"X-API-KEY": api_key}
        self.deadline = deadline
        self.pool = ThreadPoolExecutor(16, "tools")

        # two clients: the service gets the key; pictures come from anywhere and never see it
        shared = {"timeout": timeout, "deadline": deadline, "retries": retries, "backoff": backoff, "tape": tape}
        self.client = HttpClient("search", (api_key,), key_hint=key_hint, budget=budget, limiter=limiter, **shared)
        self.downloader = HttpClient("download", guarded=True, own=self.search_url, max_bytes=max_bytes, **shared)

        self.image_dir = image_dir
        self.lock = threading.Lock()
        self.paths = {}  # picture URL -> where it was stored
        os.makedirs(image_dir, exist_ok=True)

    def session(self):
        return ToolSession(self)

    def query(self, path, kind, query, top_k, attempt_index, until):
        """One query to the service -> the list under ``kind`` of its reply, cut to top_k dicts."""
        def parse(value):
            return results_of({kind: []} | value, kind)[:top_k]  # some services leave out what they did not find

        payload = {"q": query, "num": top_k}
        return self.client.post_json(f"{self.search_url}/{path}", payload, self.headers, parse, until=until,
                                     attempt_index=attempt_index)

    def try_out(self, query="lamp"):
        """(texts, pictures) that the service finds for a query, two calls. ToolError if it is no search service."""
        counts = []
        for path, kind in (("search", "organic"), ("images", "images")):
            found = self.client.post_json(f"{self.search_url}/{path}", {"q": query, "num": 5}, self.headers,
                                          lambda value: results_of(value, kind))
            counts.append(len(found))
        return tuple(counts)

    def find_pages(self, queries, top_k, attempt_indices):
        """Per query a list of {"title", "link", "snippet"}, or the ToolError that there was."""
        until = time.monotonic() + self.deadline

        def find(query, attempt_index):
            try:
                hits = self.query("search", "organic", query, top_k, attempt_index, until)
            except ToolError as error:
                return error
            return [{name: hit.get(name, "") for name in ("title", "link", "snippet")} for hit in hits]

        if len(queries) == 1:
            return [find(queries[0], attempt_indices[0])]
        return list(self.pool.map(find, queries, attempt_indices))

    def find_images(self, query, top_k, attempt_index):
        """Pictures that could be fetched: [{"local_path", "url", "title", "page_url"}]. ToolError if there were
        results, but none could be."""
        until = time.monotonic() + self.deadline
        hits = self.query("images", "images", query, top_k, attempt_index, until)
        urls = [hit.get("imageUrl") for hit in hits]
        paths = list(self.pool.map(lambda url: self.fetch(url, attempt_index, until), urls))

        found = []
        for hit, url, path in zip(hits, urls, paths):
            if not isinstance(path, ToolError):
                shown = "data:" if url.startswith("data:") else url
                found.append({"local_path": path, "url": shown, "title": hit.get("title", ""),
                              "page_url": hit.get("link", "")})
        if hits and not found:
            raise ToolError(f"none of {len(hits)} pictures could be fetched ({paths[0]})")
        return found

    def fetch(self, url, attempt_index, until):
        """Download a picture into the cache -> its path, or the ToolError that there was."""
        if not isinstance(url, str):
            return ToolError("download: a result without a picture URL")
        with self.lock:
            path = self.paths.get(url)
        if path and os.path.isfile(path):
            return path
        try:
            if url.startswith("data:"):  # the picture itself
                data = from_base64(unquote(url))
            else:
                reply = self.downloader.request("GET", picture_url(url), until=until, attempt_index=attempt_index)
                data = reply.body
            path = self.store(data)
        except ToolError as error:
            return error
        with self.lock:
            self.paths[url] = path
        return path

    def store(self, data):
        """Write the bytes of a picture under a name made of their hash, so that equal pictures are one file.

        ToolError for anything that is not a picture; a small PNG must be sound to the last byte.
        """
        kind, width, height = image_header(data)
        if kind == "png" and width * height <= 2**20:
            read_image(data)

        def write(temporary):
            with open(temporary, "wb") as file:
                file.write(data)

        path = os.path.join(self.image_dir, hashlib.sha256(data).hexdigest()[:40] + EXTENSION[kind])
        with self.lock:  # the threads of a process share the name of the temporary file
            if not os.path.isfile(path):
                model.replace_file(path, write)
        return path


def results_of(value, kind):
    """The list of results under ``kind`` in a search service's reply. ValueError if there is none."""
    found = value.get(kind)
    if not isinstance(found, list) or not all(isinstance(hit, dict) for hit in found):
        raise ValueError(f"no list of {kind}")
    return found


def picture_url(url):
    """The URL of a picture as services write it, ready for the guard: blanks are escaped, //host is https://host."""
    url = url.strip().replace(" ", "%20")
    return "https:" + url if url.startswith("//") else url


# ---- The corpus: any folder of texts and images, with BM25 ----------------------------------------------------------

TEXTS = (".md", ".txt")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SHORT = 200            # characters of a snippet
MAX_TEXT = 2**20       # bytes read of one file


CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts without blanks, and Hangul
WORD = re.compile(rf"[{CJK}]+|[^\W{CJK}]+")


def words(text):
    """Lower-case words, numbers included. Chinese, Japanese and Korean become pairs of neighbouring characters."""
    found = []
    for word in WORD.findall(unicodedata.normalize("NFKC", text).lower()):
        if "\u3040" <= word[0] and len(word) > 2 and re.match(f"[{CJK}]", word):
            found += [word[at:at + 2] for at in range(len(word) - 1)]
        else:
            found.append(word)
    return found


class Index:
    """Plain inverted index, ranked by BM25:

        score(q, d) = sum over words w of q: idf(w) * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))

    with f the count of w in d and idf(w) = log(1 + (N - n + 1/2) / (n + 1/2)), n of N documents holding w.
    """

    def __init__(self, texts, k1=1.2, b=0.75):
        self.k1, self.b, self.postings, self.lengths = k1, b, defaultdict(list), []
        for number, text in enumerate(texts):
            found = words(text)
            self.lengths.append(len(found))
            for word, count in Counter(found).items():
                self.postings[word].append((number, count))
        self.mean = sum(self.lengths) / len(self.lengths) if self.lengths else 0.0

    def idf(self, word):
        n = len(self.postings.get(word, ()))
        return math.log(1 + (len(self.lengths) - n + 0.5) / (n + 0.5))

    def asked(self, query):
        """The words of a query as they stand in the index: a single Chinese or Japanese character stands in pairs."""
        found = []
        for word in words(query):
            found.append(word)
            if re.fullmatch(f"[{CJK}]", word):
                found += [pair for pair in self.postings if len(pair) == 2 and word in pair]
        return found

    def search(self, query, top_k):
        """Numbers of the best documents, best first; equal scores keep the order of the documents."""
        scores = defaultdict(float)
        for word in dict.fromkeys(self.asked(query)):
            idf = self.idf(word)
            for number, count in self.postings.get(word, ()):
                norm = self.k1 * (1 - self.b + self.b * self.lengths[number] / self.mean)
                scores[number] += idf * count * (self.k1 + 1) / (count + norm)
        return sorted(scores, key=lambda number: (-round(scores[number], 9), number))[:top_k]


@dataclass(frozen=True)
class Page:
    """What one search result shows: a page, or one section of it."""
    title: str
    section: str
    text: str
    path: str  # relative to the corpus folder, with "/"


@dataclass(frozen=True)
class Picture:
    title: str
    path: str


class Corpus:
    """Texts and pictures of a folder. A text's title is its first line (# heading or short line), else its file name,
    and each of its `## sections` is a result of its own. A picture's title comes from titles.json beside it
    ({file name: title}), else from a .txt file of the same name, else from the words of its file name.

    skipped: number of files of other kinds (PDF, HTML). cut: number of texts of which only the first MB is read.
    """

    def __init__(self, folder):
        if not os.path.isdir(folder):
            raise ToolError(f"{folder}: no such folder")
        self.root = os.path.realpath(folder)
        pages, pictures = [], []
        self.skipped = 0
        self.cut = 0
        for place, folders, names in os.walk(self.root):
            # in place: os.walk goes on in what is left, in this order on every file system
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            names = sorted(name for name in names if self.belongs(os.path.join(place, name)))
            pages += self.read_pages(place, names)
            pictures += self.read_pictures(place, names)
            used = [name for name in names if name.lower().endswith(TEXTS + PICTURES) or name == "titles.json"]
            self.skipped += len(names) - len(used)
        self.index(pages, pictures)

    @classmethod
    def from_texts(cls, pages, titles):
        """A corpus without files. pages: [(title, section, text)]; titles: {picture file name: title}."""
        corpus = cls.__new__(cls)
        corpus.root = ""
        corpus.skipped = 0
        corpus.cut = 0
        corpus.index([Page(title, section, text, "") for title, section, text in pages],
                     [Picture(title, name) for name, title in titles.items()])
        return corpus

    def index(self, pages, pictures):
        self.pages = pages
        self.pictures = pictures
        self.paths = {found.path for found in pages + pictures}  # all that is ever served
        self.page_index = Index(f"{page.title} {page.section} {page.text}" for page in pages)
        self.picture_index = Index(picture.title for picture in pictures)

    def summary(self):
        """What was read, in one line."""
        texts = len({page.path for page in self.pages})
        return f"{texts} texts, {len(self.pictures)} pictures, {self.skipped} skipped, {self.cut} cut"

    # what a search asks

    def search(self, query, top_k):
        """The best pages for a query: [(Page, snippet)]."""
        found = [self.pages[number] for number in self.page_index.search(query, top_k)]
        return [(page, self.snippet(page.text, query)) for page in found]

    def search_images(self, query, top_k):
        """The best pictures for a query: [Picture]."""
        return [self.pictures[number] for number in self.picture_index.search(query, top_k)]

    def snippet(self, text, query):
        """The whole text if it is short, else the sentence that holds most of the query, and what fits after it."""
        text = " ".join(text.split())
        if len(text) <= SHORT:
            return text
        # words that few pages hold count more (idf), so the sentence with the fact wins over one with the name alone
        sentences = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text)
        asked = set(self.page_index.asked(query))
        gains = [sum(self.page_index.idf(word) for word in asked & set(words(sentence))) for sentence in sentences]
        start = gains.index(max(gains))

        best = sentences[start]
        if len(best) > SHORT:
            return self.excerpt(best, asked)
        for sentence in sentences[start + 1:]:
            if len(best) + 1 + len(sentence) > SHORT:
                break
            best += " " + sentence
        return best

    def excerpt(self, sentence, asked):
        """The part of a long sentence around its rarest word that was asked for; its beginning if that is there."""
        found = sorted(asked & set(words(sentence)))
        rarest = max(found, key=self.page_index.idf, default="")
        at = max(0, sentence.lower().find(rarest))
        if at + len(rarest) < SHORT:
            return sentence[:SHORT - 1] + "…"
        start = min(at - SHORT // 2, len(sentence) - SHORT + 1)
        end = start + SHORT - 2
        return "…" + sentence[start:end] + ("…" if end < len(sentence) else "")

    def read(self, path):
        """Bytes of a file of the corpus, by the relative path that a search gave. ToolError for anything else."""
        full = os.path.join(self.root, *path.split("/"))
        if path not in self.paths or not self.root or not self.belongs(full):
            raise ToolError("no such file in the corpus")
        return read_bytes(full)

    # how a folder is read

    def belongs(self, path):
        """Whether a file lies in the folder, links resolved, and is not hidden."""
        inside = os.path.realpath(path).startswith(os.path.join(self.root, ""))
        return inside and not os.path.basename(path).startswith(".") and os.path.isfile(path)

    def relative(self, place, name):
        return os.path.relpath(os.path.join(place, name), self.root).replace(os.sep, "/")

    def read_pages(self, place, names):
        """Pages of the texts among the files of one folder."""
        pages = []
        for name in names:
            if name.lower().endswith(TEXTS):
                path = os.path.join(place, name)
                self.cut += os.path.getsize(path) > MAX_TEXT
                pages += sections(read_text(path), self.relative(place, name))
        return pages

    def read_pictures(self, place, names):
        """The pictures among the files of one folder, with their titles."""
        titles = read_titles(os.path.join(place, "titles.json")) if "titles.json" in names else {}
        texts = {name for name in names if name.endswith(".txt")}
        pictures = []
        for name in names:
            if name.lower().endswith(PICTURES):
                stem = os.path.splitext(name)[0]
                title = titles.get(name)
                if not title and stem + ".txt" in texts:
                    title = " ".join(read_text(os.path.join(place, stem + ".txt")).split())[:SHORT]
                pictures.append(Picture(title or spaced(stem), self.relative(place, name)))
        return pictures


def read_text(path):
    """The first MB of a text file: UTF-8, UTF-16, or else Windows' Western encoding."""
    with open(path, "rb") as file:
        data = file.read(MAX_TEXT)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    if b"\0" in data[:1000]:  # UTF-16 without a mark: the zeros are the upper halves of letters
        return data.decode("utf-16-le" if data[1::2].count(0) >= data[::2].count(0) else "utf-16-be", "replace")
    try:
        # incremental: where the file is cut, it may be in the middle of a character
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data)
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def read_titles(path):
    """{file name: title} of a titles.json. ToolError if it does not hold an object."""
    try:
        titles = json_object(read_bytes(path))
    except ValueError as error:
        raise ToolError(f"{path}: {error}") from None
    return {name: title for name, title in titles.items() if isinstance(title, str)}


def spaced(stem):
    """A file name as a title. A name that is not UTF-8 keeps its readable part."""
    stem = os.fsencode(stem).decode("utf-8", "replace")
    return " ".join(re.split(r"[\s_-]+", stem))


def sections(text, path):
    """A text file -> its Pages: one per `## section` that says something."""
    lines = text.strip().splitlines() or [""]
    first = lines[0].lstrip("#").strip()
    is_short = first and len(first) <= 120 and len(lines) > 1 and not first.endswith(".")
    if lines[0].startswith("# ") or is_short:
        title, lines = first, lines[1:]
    else:
        title = spaced(os.path.splitext(os.path.basename(path))[0])

    # split with a group: text before, then heading and body in turn
    before, *parts = re.split(r"^##[ \t]+(.*)$", "\n".join(lines), flags=re.MULTILINE)
    pairs = [("", before), *zip(parts[::2], parts[1::2])]
    pages = [Page(title, section.strip(), " ".join(body.split()), path) for section, body in pairs if body.strip()]
    return pages or [Page(title, "", title, path)]


# ==== Machine room ====================================================================================================

# ---- Clients of models, renderers and rollout engines ---------------------------------------------------------------

def bearer(api_key):
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def service_url(url, name):
    """A URL from the command line, without a closing slash. ToolError if it is none."""
    try:
        scheme, host, _ = origin_of(url)
    except ValueError:  # the port
        scheme, host = "", ""
    if scheme not in ("http", "https") or not host:
        raise ToolError(f"{name}: {url!r} is not an http or https URL")
    return url.strip().rstrip("/")


def chat_url(base_url, name):
    """The chat endpoint of a base URL: with or without a path (then /v1), with or without a query (kept)."""
    parts = urlsplit(service_url(base_url, name))
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


# how servers say that a prompt and max_tokens together are too long for them
CONTEXT_LENGTH = re.compile(r"(?:context (?:length|size|window)|max_model_len)\D{0,20}(\d+)", re.I)
PROMPT_LENGTH = re.compile(r"(\d+) input tokens|(\d+) (?:tokens )?(?:in|from) the (?:input )?(?:messages|prompt)", re.I)


class ChatClient:
    """Any OpenAI-compatible chat endpoint: a policy, a judge or a summariser. ``base_url`` with or without /v1.

    A server that wants max_completion_tokens, or has too short a context for max_tokens, says so with status 400: the
    client asks again in the way that the server wants, and does so from then on.
    http: fields of HttpClient (timeout, deadline, retries, limiter, budget, tape), here as in the clients below.
    """

    def __init__(self, base_url, api_key="", model="", name="chat model", **http):
        self.url = chat_url(base_url, name)
        self.limit_name = "max_tokens"  # or "max_completion_tokens"
        self.most_tokens = math.inf     # that the server's context leaves for a reply
        self.model = model
        self.headers = bearer(api_key)
        # a model may think for minutes
        defaults = {"timeout": 300.0, "deadline": 900.0}
        self.client = HttpClient(name, (api_key,), **defaults | http)

    def served_model(self):
        """What the server's list says of the model: {"id", "owned_by", "max_model_len"}; {} where there is no list."""
        return self.read_models(lambda body: read_served_model(body, self.model)) or {}

    def served_names(self):
        """The names of all models in the server's list; [] where there is no list."""
        return self.read_models(read_model_names) or []

    def read_models(self, parse):
        """parse(body) of the server's list of models; None where there is no list."""
        url = self.url.replace("/chat/completions", "/models")
        try:
            return self.client.request("GET", url, headers=self.headers, until=time.monotonic() + 10.0,
                                       parse=lambda reply: parse(reply.body))
        except BudgetExceeded:
            raise
        except ToolError:
            return None

    def complete(self, messages, **options):
        """messages -> the text of the reply. options: max_tokens, temperature, top_p, stop, seed; None is left out."""
        return self.reply(messages, **options).text

    def reply(self, messages, max_tokens=None, **options):
        """As complete, with finish reason and counts of tokens: a ChatReply."""
        payload = {"model": self.model, "messages": messages}
        payload |= {name: value for name, value in options.items() if value not in (None, [])}
        limit = max_tokens and min(max_tokens, self.most_tokens)
        while True:
            limits = {self.limit_name: limit} if limit else {}
            try:
                return self.client.post_json(self.url, payload | limits, self.headers, read_chat_reply)
            except ToolError as error:
                limit = self.adapt(str(error), limit)
                if not limit:
                    raise

    def adapt(self, reason, limit):
        """Learn from a refusal. Returns the limit of tokens for another try; None if there is nothing to change.

        Each change happens once or lowers the limit, so the tries come to an end.
        """
        if "HTTP 400" not in reason or not limit:
            return None

        context = CONTEXT_LENGTH.search(reason)
        if context:
            length = int(context.group(1))
            prompt = PROMPT_LENGTH.search(reason)
            room = length - int(prompt.group(1) or prompt.group(2)) if prompt else length // 2
            if not 0 < room < limit:
                return None
            # one long prompt must not shorten the replies to all others
            self.most_tokens = min(self.most_tokens, max(room, length // 4))
            return room

        if "max_completion_tokens" in reason and self.limit_name == "max_tokens":
            self.limit_name = "max_completion_tokens"
            return limit
        return None


def read_chat_reply(value):
    """An OpenAI chat completion -> ChatReply, its text in the project's turn format.

    A thought in a field of its own becomes <think>...</think>, native tool calls become <tool_call>...</tool_call>.
    A refusal, an error in place of an answer and a filtered answer raise ToolError; anything else without text
    ValueError.
    """
    if value.get("error"):
        raise http_failure(200, error_reason(value))
    try:
        choice = value["choices"][0]
        message = choice["message"]
        finish = choice.get("finish_reason") or "stop"
        content = message.get("content")
        calls = message.get("tool_calls") or []
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        text = content_text(content)
        actions = "\n".join(tool_call_text(call["function"]) for call in calls)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("no choices[0].message.content") from None

    if not text and not actions:
        if message.get("refusal"):
            raise Refused(f"the model refused: {message['refusal']}")
        if finish == "content_filter":
            raise Refused("the answer was stopped by a content filter")
        if not thought and not isinstance(content, (str, list)):
            raise ValueError("no choices[0].message.content")
    return ChatReply(turn_text(thought, text, actions), "length" if finish == "length" else "stop",
                     *token_counts(value))


def content_text(content):
    """The content of a message, text or parts -> its text. Parts of other types say nothing here."""
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content or () if part.get("type", "text") in ("text", "output_text")]
    return "".join(texts)


def tool_call_text(function):
    """A native tool call {"name", "arguments": JSON text} as the turn format writes it."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json_object(arguments or "{}")
        except ValueError:
            pass  # stays text: the parser of turns says what is wrong
    call = {"name": function["name"], "arguments": arguments or {}}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


def turn_text(thought, text, actions):
    """Thought, text and native tool calls as one turn. What is said beside a call belongs to the thought."""
    if actions and "</think>" not in text:
        thought = "\n".join(part for part in (thought, text) if part)
        return f"<think>{thought}</think>\n{actions}"
    if thought and "</think>" not in text:
        text = f"<think>{thought}</think>\n{text}"
    return "\n".join(part for part in (text, actions) if part)


def token_counts(value):
    """(prompt, completion) tokens that a reply states; 0 where it does not."""
    usage = value.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return [counts.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]


class RemoteRenderer:
    """An image-edit HTTP service on one or more machines, asked in turn; what fails on one goes to the next.

    side: the longer side of a picture, in pixels. What such a service has to understand, in full:

    Request: POST {url}/generate, a JSON object, with "Authorization: Bearer KEY" where there is a key.
        prompt                str, not empty
        image_urls            [data URI], none to two: the references in their order, PNG, JPEG or WebP as found
        seed                  int in [0, 2^32): the same seed draws the same noise
        num_inference_steps   int, denoising steps
        true_cfg_scale        float, classifier-free guidance against negative_prompt (4.0; " ")
        guidance_scale        float, of models with distilled guidance (1.0)
        num_images_per_prompt int, always 1
        width, height         int, pixels, multiples of 16
    Reply: status 200, {"success": true, "image": base64 of a PNG (JPEG and WebP need Pillow here)}. The picture may
        have another size than was asked for.
    Errors: any other status, or 200 with {"success": false, "error": reason}. A reason is read in "error" or "detail".
        HTTP 408, 425, 429 and 5xx are tried again after a pause (Retry-After is obeyed), others are not.
    """

    def __init__(self, urls, side=1024, api_key="", **http):
        self.urls = [service_url(url, "renderer") for url in urls or [""]]
        self.side = side
        self.headers = bearer(api_key)
        defaults = {"timeout": 600.0, "deadline": 1800.0, "retries": 1, "max_bytes": 2**27}
        self.client = HttpClient("renderer", (api_key,), **defaults | http)

    def render(self, prompts, references, seeds, steps=40):
        """prompts: [str]; references: per prompt a list of paths, bytes or uint8 (H, W, 3); seeds: [int].

        Returns per prompt a picture uint8 (H, W, 3), or the ToolError that there was: one failure costs one picture.
        """
        numbers = range(len(prompts))
        with ThreadPoolExecutor(2 * len(self.urls)) as pool:
            return list(pool.map(self.render_one, numbers, prompts, references, seeds, itertools.repeat(steps)))

    def render_one(self, number, prompt, references, seed, steps):
        """One picture, or its ToolError. number: of the picture; the machines take turns."""
        try:
            width, height = self.output_size(references)
            images = [data_uri(reference) for reference in references]
        except ToolError as error:
            return error
        payload = {"image_urls": images, "prompt": prompt, "seed": seed, "true_cfg_scale": 4.0, "negative_prompt": " ",
                   "num_inference_steps": steps, "guidance_scale": 1.0, "num_images_per_prompt": 1,
                   "width": width, "height": height}

        # a machine that fails passes the picture on; only a spent budget ends it
        for turn in range(len(self.urls)):
            url = self.urls[(number + turn) % len(self.urls)]
            try:
                # a recording keeps the outcome of each machine (two on one host look alike to it)
                return self.client.post_json(f"{url}/generate", payload, self.headers, service_image,
                                             attempt_index=turn)
            except BudgetExceeded as error:
                return error
            except ToolError as error:
                failure = error
        return failure

    def output_size(self, references):
        """(width, height): the first reference's upright shape with the long side as set, in multiples of 16."""
        if not references:
            return self.side, self.side
        data, _ = image_bytes(references[0])
        _, width, height = image_header(data)
        if is_on_its_side(data):
            width, height = height, width
        scale = self.side / max(width, height)
        return tuple(max(16, round(length * scale / 16) * 16) for length in (width, height))


def service_image(value):
    """{"success": true, "image": base64} -> uint8 (H, W, 3)."""
    if value.get("success") is not True or not isinstance(value.get("image"), str):
        reason = str(value.get("error") or value.get("detail") or "")
        raise ValueError(f"no picture: {reason[:200]}")
    return read_image(from_base64(value["image"]))


class GoogleRenderer:
    """Google's image endpoint (generateContent)."""
    BASE_URL = "https://generativelanguage.googleapis.com"
    MODEL = "gemini-3-pro-image-preview"

    def __init__(self, api_key, model=MODEL, base_url=BASE_URL, workers=4, **http):
        self.url = f"{service_url(base_url, 'renderer')}/v1beta/models/{model}:generateContent"
        self.headers = {"x-goog-api-key": api_key}
        self.workers = workers
        defaults = {"timeout": 300.0, "deadline": 900.0, "max_bytes": 2**27}
        self.client = HttpClient("renderer", (api_key,), **defaults | http)
        replaying = self.client.tape and self.client.tape.replaying
        if not api_key and not replaying:
            raise ToolError("the Google renderer needs a key: set GOOGLE_API_KEY or GEMINI_API_KEY")

    def served_model(self):
        """What the service states about the model, a JSON object; asking costs nothing. ToolError if it has none."""
        url = self.url.removesuffix(":generateContent")
        return self.client.request("GET", url, headers=self.headers, parse=lambda reply: json_object(reply.body))

    def render(self, prompts, references, seeds, steps=None):
        """As RemoteRenderer.render. The service takes no seed and no steps: an attempt_index tells equal prompts apart,
        so that a recording keeps each."""
        attempt_indices = [prompts[:number].count(prompt) for number, prompt in enumerate(prompts)]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.render_one, prompts, references, attempt_indices))

    def render_one(self, prompt, references, attempt_index):
        try:
            parts = [{"text": prompt}]
            for data, kind in map(image_bytes, references):
                encoded = base64.b64encode(data).decode()
                parts.append({"inline_data": {"mime_type": MIME[kind], "data": encoded}})
            payload = {"contents": [{"parts": parts}]}
            return self.client.post_json(self.url, payload, self.headers, google_image, attempt_index=attempt_index)
        except ToolError as error:
            return error


def google_image(value):
    """The first picture in candidates[].content.parts[] -> uint8 (H, W, 3). Pictures of a thought are only drafts.

    ToolError with the reason if the prompt or every candidate was blocked.
    """
    reasons = []
    try:
        blocked = value.get("promptFeedback") or {}
        if blocked.get("blockReason"):
            raise Refused(f"the prompt was blocked: {blocked['blockReason']} {blocked.get('blockReasonMessage', '')}")

        for candidate in value.get("candidates") or []:
            for part in (candidate.get("content") or {}).get("parts") or []:
                data = part.get("inlineData") or part.get("inline_data")
                if data and not part.get("thought"):
                    return read_image(from_base64(data["data"]))
            if candidate.get("finishReason") not in (None, "STOP"):
                reasons.append(f"{candidate['finishReason']} {candidate.get('finishMessage', '')}")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no picture in it") from None
    if reasons:
        raise Refused(f"no picture: {'; '.join(reasons)}")
    raise ValueError("no picture in it")


@dataclass
class Rollout:
    """What a serving engine generated: token ids in, token ids out, nothing re-tokenised."""
    tokens: list
    logprobs: list   # of the sampled tokens, as the engine computed them
    finish: str      # "stop" or "length"


class RolloutEngine:
    """A running server as rollout engine: what the clients of vLLM and SGLang have in common.

    A server that is away (no connection, time-outs, HTTP 5xx) is waited for, up to ``patience`` seconds, and the line
    about it goes to ``say``. It may come back with the weights that it was started with. So ``restore`` is called
    before anything else is asked of it, and what was written meanwhile by other weights is asked for again.
    """
    NAME = "rollout engine"
    AT_ONCE = 1                      # prompts of one request
    UNTIED = (False, True)           # ways to write weights for it: is the output matrix a tensor of its own?

    def __init__(self, base_url, api_key="", patience=1800.0, **http):
        self.base = service_url(base_url, self.NAME).removesuffix("/v1")
        self.headers = bearer(api_key)
        self.patience, self.say = patience, note
        self.version = 0                 # of the weights, an attempt_index: to new weights a prompt is another call
        self.path = None                 # checkpoint folder whose weights were handed over last
        self.context = None              # tokens that prompt and reply may have together; None: unknown
        self.outages = 0                 # that are over
        self.away_since = None           # time.monotonic
        self.back = threading.Lock()     # held by the thread that waits for the server
        defaults = {"timeout": 600.0, "deadline": 1800.0, "max_bytes": 2**28, "retries": 0}
        self.client = HttpClient(self.NAME, (api_key,), **defaults | http)

    def post(self, path, payload, parse=dict):
        return self.client.post_json(self.base + path, payload, self.headers, parse, attempt_index=self.version)

    def get(self, path, parse=json_object, seconds=30.0):
        """A JSON object that the server states about itself."""
        return self.client.request("GET", self.base + path, headers=self.headers, attempt_index=self.version,
                                   until=time.monotonic() + seconds, parse=lambda reply: parse(reply.body))

    def stated(self, path, *names):
        """A text in such an object; "" where the release has no such page or the page no such entry."""
        try:
            value = self.get(path)
            for name in names:
                value = value[name]
            return str(value)
        except Transient:
            raise
        except (ToolError, KeyError, TypeError):
            return ""

    def health(self):
        """Raises ToolError unless the server is up."""
        self.get("/health", parse=lambda body: None)

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_p=1.0, stop_ids=(), seed=None):
        """Prompts as token ids, at most AT_ONCE of them -> a Rollout for each. seed: None sends none."""
        return self.insist(lambda: self.sample(prompts, max_new_tokens, temperature, top_p, stop_ids, seed))

    def try_out(self):
        """Let it write one token. ToolError if it cannot, or could not take new weights."""
        self.sample([[1, 2, 3]], 1, 1.0, 1.0, (), None)

    def restore(self):
        """Hand the weights over (again). Whoever has them puts a function of its own in this place."""

    def load(self, path):
        """Let the server go on with a checkpoint folder that it can see, by way of ``restore``."""
        self.path = path
        self.version += 1
        self.insist(self.restore)

    def insist(self, ask):
        """ask(), again and again until the server answers with the weights that it was given."""
        until = time.monotonic() + self.patience
        for attempt in itertools.count():
            with self.back:
                outages = self.outages
            try:
                answer = ask()
                self.check_weights()
                if outages == self.outages:
                    self.end_outage()
                    return answer
            except Transient as error:
                if time.monotonic() > until:
                    raise
                self.wait_until_back(outages, error, attempt, until)

    def check_weights(self):
        """Raises Transient where a server holds other weights than it was given: it has been started anew."""
        held = self.held_weights() if self.path else ""
        if held and held != self.weights_name(self.path):
            raise Transient(f"{self.NAME}: it has been started anew and holds the weights of {held!r}")

    def wait_until_back(self, outages, error, attempt, until):
        """Return when the server may be asked again: it is up and has its weights. outages: how many there were when
        the call began; a thread that finds another count has only to ask again."""
        with self.back:
            if outages != self.outages:
                return
            if self.away_since is None:
                self.away_since = time.monotonic()
                self.say(f"{self.base}: {error}; the run waits for it, for {self.patience / 60:.0f} minutes at most")
            for pause in range(attempt, attempt + 10**6):
                time.sleep(min(self.client.backoff * 2 ** min(pause, 10), 15.0))
                try:
                    self.health()
                    self.restore()
                    break
                except Transient:
                    if time.monotonic() > until:
                        raise
            self.outages += 1

    def end_outage(self):
        if self.away_since is not None:
            with self.back:
                since, self.away_since = self.away_since, None
            if since is not None:  # another thread may have said it
                self.say(f"{self.base}: back after {time.monotonic() - since:.0f} s")


class SGLangClient(RolloutEngine):
    """A running SGLang server as rollout engine."""

    def sample(self, prompts, max_new_tokens, temperature, top_p, stop_ids, seed):
        """``seed`` is sent as ``sampling_seed`` (honoured by servers that run with deterministic inference; others
        ignore it)."""
        prompt, = prompts
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
                    "stop_token_ids": list(stop_ids)}
        if seed is not None:
            sampling["sampling_seed"] = seed
        payload = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True}
        return [self.post("/generate", payload, read_rollout)]

    def score(self, sequences):
        """[[token]] -> [[log p of tokens 1..T-1]], at temperature 1."""
        sampling = {"max_new_tokens": 1, "temperature": 1.0}
        payloads = [{"input_ids": list(sequence), "sampling_params": sampling, "return_logprob": True,
                     "logprob_start_len": 0} for sequence in sequences]
        return [self.post("/generate", payload, read_input_scores) for payload in payloads]

    def dtype(self):
        """Of the server's arithmetic, "" where it does not say."""
        return self.stated("/get_server_info", "dtype").removeprefix("torch.")

    def held_weights(self):
        return self.stated("/get_model_info", "model_path")

    def weights_name(self, path):
        return path

    def update_weights(self, path):
        """Load a checkpoint folder that the server can see. ToolError if it refuses, or still names another one."""
        answer = self.post("/update_weights_from_disk", {"model_path": path})
        if answer.get("success") is not True:
            reason = sanitize(answer.get("message", ""))
            raise ServiceError(f"{self.NAME}: the new weights were not loaded ({reason})")

        # success is not enough: a server behind a router may still hold the old weights
        if self.held_weights() != path:
            raise ServiceError(f"{self.NAME}: the server still answers with the old weights")


def read_rollout(value):
    """SGLang's reply -> Rollout. ValueError unless every token has its log-probability.

    Transient if the server gave the generation up: such a turn has no reward, which is not a reward of 0.
    """
    try:
        meta = value["meta_info"]
        finish = meta["finish_reason"]["type"]
        if finish == "abort":
            raise Transient(f"the generation was aborted: {meta['finish_reason'].get('message') or 'no reason given'}")
        pairs = [(float(entry[0]), int(entry[1])) for entry in meta["output_token_logprobs"]]
        logprobs = [logprob for logprob, _ in pairs]
        scored_tokens = [token for _, token in pairs]
        tokens = [int(token) for token in value.get("output_ids", scored_tokens)]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no output_ids with their log-probabilities") from None
    if scored_tokens != tokens:
        raise ValueError("output_ids and output_token_logprobs do not agree")
    return Rollout(tokens, logprobs, "length" if finish == "length" else "stop")


def read_input_scores(value):
    """SGLang's reply -> [log p of the prompt's tokens 1..T-1]."""
    try:
        return [float(entry[0]) for entry in value["meta_info"]["input_token_logprobs"][1:]]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no log-probabilities of the prompt") from None


class VLLMClient(RolloutEngine):
    """A running vLLM server (``vllm serve``, with VLLM_SERVER_DEV_MODE=1) as rollout engine.

    New weights come as checkpoints with an output matrix of their own. A folder whose output matrix is its embedding
    does not name it, and vLLM's CPU build goes on with the packed copy that it made of the old one.
    """
    AT_ONCE = 512
    UNTIED = (True, False)

    def __init__(self, base_url, api_key="", **http):
        super().__init__(base_url, api_key, **http)
        served = self.get("/v1/models", read_served_model)
        self.model, self.context = served["id"], served.get("max_model_len")

    def sample(self, prompts, max_new_tokens, temperature, top_p, stop_ids, seed):
        """All prompts in one request. What the folder's generation_config.json would add is switched off. A seed is the
        request's, so it goes with one prompt only; vLLM's CPU build ends when it gets one."""
        payload = {"model": self.model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": max_new_tokens,
                   "temperature": temperature, "top_p": top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
                   "stop_token_ids": list(stop_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
        if seed is not None:
            payload["seed"] = seed
        return self.post("/v1/completions", payload, lambda value: read_completions(value, len(prompts)))

    def score(self, sequences):
        """[[token]] -> [[log p of tokens 1..T-1]], at temperature 1, without the prefix cache."""
        payload = {"model": self.model, "prompt": [list(sequence) for sequence in sequences], "max_tokens": 1,
                   "temperature": 1.0, "prompt_logprobs": 0}
        return self.post("/v1/completions", payload, lambda value: read_prompt_scores(value, sequences))

    def try_out(self):
        super().try_out()
        try:
            self.get("/server_info?config_format=json")
        except ToolError as error:
            if "HTTP 404" in str(error):
                raise ToolError(f"{self.NAME}: {self.base} takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 "
                                "in its environment") from None

    def dtype(self):
        """Of the server's arithmetic, "" where it does not say."""
        path = "/server_info?config_format=json"
        return self.stated(path, "vllm_config", "model_config", "dtype").removeprefix("torch.")

    def held_weights(self):
        return self.stated("/weight_info", "weight_version")

    def weights_name(self, path):
        return os.path.basename(path)

    def update_weights(self, path):
        """Load a checkpoint folder that the server can see, while no request runs. ToolError if it refuses."""
        try:
            self.post("/pause?mode=wait", {})
        except Transient:
            raise
        except ToolError as error:
            raise ServiceError(f"{error}; start it with VLLM_SERVER_DEV_MODE=1 in its environment") from None
        try:
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            if self.post("/reset_prefix_cache", {}).get("success") is not True:
                raise Transient(f"{self.NAME}: the prefix cache of the old weights was not emptied")
            if self.held_weights():  # older releases have no name for them
                self.post("/update_weight_version", {"new_version": self.weights_name(path)})
        finally:
            self.post("/resume", {})


def read_served_model(body, name=""):
    """The body of /v1/models -> the entry of the model of that name, else the first. ValueError if there is none."""
    try:
        entries = json_object(body)["data"]
        served = next((entry for entry in entries if entry["id"] == name), entries[0])
        length = served.get("max_model_len")
        return {"id": served["id"], "owned_by": served.get("owned_by"),
                "max_model_len": length if isinstance(length, int) and length > 0 else None}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("no model in it") from None


def read_model_names(body):
    """The body of /v1/models -> the names in it. ValueError if it is no such list."""
    try:
        return [str(entry["id"]) for entry in json_object(body)["data"]]
    except (KeyError, TypeError):
        raise ValueError("no list of models") from None


def read_completions(value, count):
    """vLLM's reply to ``count`` prompts -> [Rollout] in their order. Errors as in ``read_rollout``."""
    try:
        choices = sorted(value["choices"], key=lambda choice: choice["index"])
        rollouts = []
        for choice in choices:
            finish = choice["finish_reason"]
            if finish not in ("stop", "length"):
                raise Transient(f"the generation was aborted: {finish}")
            logprobs = [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
            rollouts.append(Rollout([int(token) for token in choice["token_ids"]], logprobs, finish))
    except (KeyError, IndexError, TypeError):
        raise ValueError("no token_ids with their log-probabilities") from None
    if len(rollouts) != count or any(len(rollout.tokens) != len(rollout.logprobs) for rollout in rollouts):
        raise ValueError("prompts, token_ids and token_logprobs do not agree")
    return rollouts


def read_prompt_scores(value, sequences):
    """vLLM's reply -> for each sequence [log p of its tokens 1..T-1]."""
    try:
        choices = sorted(value["choices"], key=lambda choice: choice["index"])
        scores = []
        for choice, sequence in zip(choices, sequences):
            entries = choice["prompt_logprobs"][1:]  # of each position: {token: {"logprob": ...}}
            pairs = zip(entries, sequence[1:])
            scores.append([float(entry[str(token)]["logprob"]) for entry, token in pairs])
    except (KeyError, IndexError, TypeError):
        raise ValueError("no log-probabilities of the prompt") from None
    if [len(score) + 1 for score in scores] != [len(sequence) for sequence in sequences]:
        raise ValueError("prompts and their log-probabilities do not agree")
    return scores


ENGINES = {"vllm": VLLMClient, "sglang": SGLangClient}


def open_engine(url, api_key="", kind="auto", **http):
    """The client of the server at a URL. kind: "vllm", "sglang", or "auto": by what the server answers. ToolError if it
    does not answer, or is neither."""
    if kind == "auto":
        server = RolloutEngine(url, api_key, **http)
        server.health()
        kind = recognise(server)
    engine = ENGINES[kind](url, api_key, **http)
    engine.health()
    return engine


def recognise(server):
    """"vllm" or "sglang": both state it in their list of models, and only SGLang has a page about its model."""
    try:
        owner = server.get("/v1/models", read_served_model)["owned_by"]
        if owner in ENGINES:
            return owner
    except ToolError as error:  # an older SGLang has no such list
        if "HTTP 401" in str(error) or "HTTP 403" in str(error):
            raise
    try:
        if "model_path" in server.get("/get_model_info"):
            return "sglang"
    except ToolError:
        pass
    raise ToolError(f"{server.NAME}: {server.base} answers neither like vLLM nor like SGLang; --rollouts-engine says "
                    "which it is")


def kinds_of_service(origin, api_key=""):
    """As what a server answers: a list out of "chat", "search" and "renderer".

    origin: its URL without a path. Nothing that is asked here changes or draws anything.
    """
    client = HttpClient("service", (api_key,), timeout=10.0, deadline=10.0, retries=0)
    headers = bearer(api_key) | ({"X-API-KEY": api_key} if api_key else {})  # each kind reads its own
    questions = {
        "chat": lambda: client.request("GET", f"{origin}/v1/models", headers=headers,
                                       parse=lambda reply: read_model_names(reply.body)),
        "search": lambda: client.post_json(f"{origin}/search", {"q": "lamp", "num": 1}, headers,
                                           lambda value: results_of(value, "organic")),
        "renderer": lambda: client.post_json(f"{origin}/generate", {}, headers)}
    kinds = []
    for kind, ask in questions.items():
        try:
            ask()
            kinds.append(kind)
        except ToolError as error:  # a renderer says that the prompt is missing; engines have a /generate, too
            is_asking = re.search("HTTP (400|422)", str(error)) and "prompt" in str(error)
            if kind == "renderer" and is_asking and "chat" not in kinds:
                kinds.append(kind)
    return kinds


# ---- The local server -----------------------------------------------------------------------------------------------

# what a request may ask for; more is clipped
MAX_RESULTS = 100
MAX_NEW_TOKENS = 4096
MAX_STEPS, MAX_SIDE = 50, 2048     # denoising steps; pixels
MAX_REFERENCES, MAX_JUDGED = 2, 8  # pictures for the renderer, for the judge
MAX_SEED = 2**63 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")


class HttpError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


@dataclass
class ChatReply:
    """What a policy answers, or one piece of it. The answer's finish and counts are those of its last piece."""
    text: str
    finish: str = "stop"         # or "length"
    prompt_tokens: int = 0
    completion_tokens: int = 0   # up to and with this piece


def reply_pieces(answer):
    """Whatever a policy returned (str, ChatReply, or an iterable of these) as an iterator of ChatReply."""
    if isinstance(answer, (str, ChatReply)):
        answer = [answer]
    for piece in answer:
        yield ChatReply(piece) if isinstance(piece, str) else piece


def stable_text(text, stop=(), ended=False):
    """(the part of a text in progress that later tokens cannot change, whether a stop string ends it there).

    A policy that streams may send this much. Held back until more is known: the bytes of a character that is not
    complete (they decode to U+FFFD), and what may turn out to be the beginning of a stop string. ended: no more tokens.
    """
    found = [text.index(string) for string in stop if string in text]
    if found:
        return text[:min(found)], True
    if ended:
        return text, False
    text = text.rstrip("\ufffd")
    begun = [length for string in stop for length in range(1, len(string)) if text.endswith(string[:length])]
    return text[:len(text) - max(begun, default=0)], False


class Server:
    """Search, pictures, chat, renderer and judge over HTTP, each answered by what is handed in (else 404).

        with Server(Corpus(folder)) as server: requests.post(server.url + "/search", json={"q": "lamps"})

    The callables are called from many threads at once:
    policy(request) -> str, ChatReply, or an iterable of these: a client that streams gets each piece as it comes.
        request: messages (contents are plain text), max_tokens, temperature, top_p, stop (list), seed, stream.
    judge(text, images) -> dict or str; a chat request with pictures goes here: its text, and uint8 (H, W, 3) each.
    renderer(prompt, references, seed, steps, width, height) -> uint8 (H, W, 3); references: at most two, likewise.
    site: the page at / and its API; has page() -> HTML, and get(path) and post(path, request) -> JSON values of the
        paths below /api/. Only the page itself may call them, see ``Handler.check_caller``.
    ValueError and ToolError from a callable become status 400, HttpError its own status, anything else 500.
    """

    def __init__(self, corpus=None, host="127.0.0.1", port=0, policy=None, judge=None, renderer=None, site=None,
                 model="genevolve", max_body=64 * 2**20, max_requests=64, idle_seconds=30):
        self.corpus = corpus
        self.site = site
        self.host = host
        self.policy = policy
        self.judge = judge
        self.renderer = renderer
        self.model = model

        self.max_body = max_body
        self.free_slots = threading.BoundedSemaphore(max_requests)
        self.thread = None

        # http.server makes an instance of a class per connection: the subclass carries the settings of this server
        handler = type("Handler", (Handler,), {"owner": self, "timeout": idle_seconds})
        try:
            self.http = Listener((host, port), handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", "") or str(error)
            raise ToolError(f"cannot listen on {host}, port {port}: {reason}; choose another port") from None
        self.is_private = ipaddress.ip_address(self.http.server_address[0]).is_loopback

        # the address to give to clients
        if ":" in host:
            host = f"[{host}]"
        elif host in ("", "0.0.0.0"):
            host = "127.0.0.1"
        self.url = f"http://{host}:{self.http.server_port}"

    def require(self, part, what):
        if part is None:
            raise HttpError(404, f"no {what} is served here")
        return part

    # POST. request: dict; base: URL of this server as the client wrote it

    def search(self, request, base):
        """Serper's text search."""
        query, top_k = read_query(request)
        rows = []
        for position, (page, snippet) in enumerate(self.require(self.corpus, "corpus").search(query, top_k), 1):
            link = f"{base}/page/{quote(os.fsencode(page.path))}"
            rows.append({"title": page.title, "link": link, "snippet": snippet, "position": position})
        return {"searchParameters": {"q": query, "num": top_k, "type": "search"}, "organic": rows}

    def images(self, request, base):
        """Serper's image search. A picture's page is the text that fits its title best."""
        query, top_k = read_query(request)
        corpus = self.require(self.corpus, "corpus")
        rows = []
        for position, picture in enumerate(corpus.search_images(query, top_k), 1):
            url = f"{base}/image/{quote(os.fsencode(picture.path))}"
            pages = corpus.search(picture.title, 1)
            link = f"{base}/page/{quote(os.fsencode(pages[0][0].path))}" if pages else url
            rows.append({"title": picture.title, "imageUrl": url, "link": link, "position": position})
        return {"searchParameters": {"q": query, "num": top_k, "type": "images"}, "images": rows}

    def generate(self, request, base):
        """The renderer's endpoint."""
        renderer = self.require(self.renderer, "renderer")
        uris = request.get("image_urls") or []
        if not isinstance(uris, list):
            raise HttpError(400, "image_urls must be a list of data URIs")
        image = renderer(
            prompt=text_field(request, "prompt"),
            references=[from_data_uri(uri) for uri in uris[:MAX_REFERENCES]],
            seed=number_field(request, "seed", 0, 0, MAX_SEED, integer=True),
            steps=number_field(request, "num_inference_steps", 20, 1, MAX_STEPS, integer=True),
            width=number_field(request, "width", 1024, 16, MAX_SIDE, integer=True),
            height=number_field(request, "height", 1024, 16, MAX_SIDE, integer=True))
        return {"success": True, "image": base64.b64encode(diffusion.encode_png(image)).decode()}

    def chat(self, request):
        """OpenAI's chat completions -> an iterator of ChatReply pieces. Pictures go to the judge, all else to the
        policy."""
        messages, uris = read_messages(request)
        if uris:
            judge = self.require(self.judge, "judge")
            text = "\n".join(message["content"] for message in messages if message["role"] == "user")
            answer = judge(text, [from_data_uri(uri) for uri in uris[:MAX_JUDGED]])
            return reply_pieces(answer if isinstance(answer, str) else json.dumps(answer))

        asked = {"messages": messages, "stream": request.get("stream") is True, **read_sampling(request)}
        return reply_pieces(self.require(self.policy, "policy")(asked))

    # GET

    def get(self, path):
        """(content type, bytes) of a path."""
        if path == "/health":
            return "application/json", b'{"status": "ok"}'
        if self.site and path == "/":
            return "text/html; charset=utf-8", self.site.page().encode()
        if self.site and path.startswith(API):
            return "application/json", json.dumps(self.site.get(path.removeprefix(API))).encode()
        entry = {"id": self.model, "object": "model", "owned_by": "genevolve"}
        if path == "/v1/models":
            return "application/json", json.dumps({"object": "list", "data": [entry]}).encode()
        if unquote(path) == f"/v1/models/{self.model}":
            return "application/json", json.dumps(entry).encode()

        kind, _, name = unquote(path, errors="surrogateescape").removeprefix("/").partition("/")
        if kind not in ("page", "image") or not self.corpus:
            raise HttpError(404, "no such path")
        try:
            data = self.corpus.read(name)
            content_type = MIME[image_header(data)[0]] if kind == "image" else "text/plain; charset=utf-8"
        except (ToolError, OSError, ValueError):  # ValueError: a null byte in the path
            raise HttpError(404, "no such file") from None
        return content_type, data

    # life cycle

    def start(self):
        """Serve in the background; returns the server."""
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), name="server", daemon=True)
        self.thread.start()
        return self

    def forever(self):
        """Serve in the foreground until interrupted."""
        try:
            self.http.serve_forever()
        finally:
            self.http.server_close()

    def stop(self):
        if self.thread:
            self.http.shutdown()
            self.thread.join()
            self.thread = None
        self.http.server_close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


API = "/api/"  # paths of the page
PAGE_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
               "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
MAX_API_BODY = 2**16
POST_PATHS = {"/search": Server.search, "/images": Server.images, "/generate": Server.generate}
CHAT_PATHS = ("/v1/chat/completions", "/chat/completions")


# ---- Images: content decides the type, the header decides whether it is decoded -------------------------------------

MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXTENSION = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that state the size


def image_header(data):
    """Bytes of a PNG, JPEG or WebP file -> (type, width, height), from the header alone. ToolError if it is none."""
    try:
        if data[:8] == diffusion.PNG_SIGNATURE:
            kind = "png"
            width, height = struct.unpack(">II", data[16:24])
        elif data[:3] == b"\xff\xd8\xff":
            kind = "jpeg"
            width, height = jpeg_size(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            kind = "webp"
            width, height = webp_size(data)
        else:
            raise ToolError("not a PNG, JPEG or WebP picture")
    except (struct.error, IndexError):
        raise ToolError("a picture whose header is cut off") from None
    limit = diffusion.MAX_PIXELS
    if not width or not height or width * height > limit:
        raise ToolError(f"a picture of {width:,} x {height:,} pixels; at most {limit >> 20} megapixels are read")
    return kind, width, height


def jpeg_size(data):
    """Walk over the segments up to the frame header."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ToolError("a JPEG picture with a broken header")
        marker = data[at + 1]
        length, = struct.unpack(">H", data[at + 2:at + 4])
        if marker in FRAME_MARKERS:
            height, width = struct.unpack(">HH", data[at + 5:at + 9])
            return width, height
        at += 1 if marker == 0xFF else 2 + max(length, 2)  # 0xFF 0xFF is padding


def webp_size(data):
    """The three kinds of WebP: extended, lossless, lossy."""
    kind, bits = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(bits[4:7], "little"), 1 + int.from_bytes(bits[7:10], "little")
    if kind == b"VP8L":
        packed, = struct.unpack("<I", bits[1:5])
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", bits[6:10])
    return width & 0x3FFF, height & 0x3FFF


def is_on_its_side(data):
    """Whether a JPEG or WebP picture's EXIF orientation (5 to 8) swaps its sides when it is shown upright."""
    if data[:3] == b"\xff\xd8\xff":
        start = data[:2**17].find(b"Exif\0\0")
    elif data[:4] == b"RIFF":
        start = data.find(b"EXIF")
    else:
        return False
    tiff = data[start:start + 2**16] if start >= 0 else b""
    start = max(tiff.find(b"II*\0"), tiff.find(b"MM\0*"))  # little or big endian
    if not 0 <= start <= 16:
        return False

    tiff, order = tiff[start:], "<" if tiff[start:start + 1] == b"I" else ">"
    try:
        offset, = struct.unpack_from(order + "I", tiff, 4)
        count, = struct.unpack_from(order + "H", tiff, offset)
        entries = [struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return False
    return any(tag == 0x0112 and 5 <= value <= 8 for tag, _, _, value in entries)


LARGE_PNG = 2**18  # pixels; from here on Pillow, which is eight times as fast, is worth its import


def read_image(source):
    """Path or bytes of a PNG, JPEG or WebP picture -> uint8 (H, W, 3). ToolError in one line if that is impossible.

    PNG needs nothing, a large one is read faster by Pillow; the other formats need Pillow, the only optional package
    of the project.
    """
    where = "" if isinstance(source, bytes) else f"{source}: "
    try:
        data = source if isinstance(source, bytes) else read_bytes(source)
        kind, width, height = image_header(data)
        if kind != "png":
            return decode_with_pillow(data, kind)
        is_large = width * height >= LARGE_PNG and importlib.util.find_spec("PIL") is not None
        return decode_with_pillow(data, kind) if is_large else diffusion.decode_png(data)
    except OSError as error:
        raise ToolError(f"{where}cannot be read ({error.strerror or error})") from None
    except (ValueError, ToolError) as error:
        raise ToolError(f"{where}{error}") from None


def decode_with_pillow(data, kind):
    """JPEG, WebP or PNG -> uint8 (H, W, 3), upright as its EXIF rotation says, transparency over white."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ToolError(f"a {kind.upper()} picture: reading it takes Pillow (pip install pillow)") from None
    try:
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return np.array(Image.alpha_composite(white, image).convert("RGB"))
    except (SyntaxError, struct.error, EOFError, MemoryError, Image.DecompressionBombError) as error:
        # what Pillow raises on damage, next to OSError and ValueError
        raise ToolError(f"a damaged {kind.upper()} picture ({error})") from None


def image_bytes(source):
    """Path, bytes or uint8 (H, W, 3) -> (bytes of an image file, its type). A file's own bytes pass untouched."""
    if isinstance(source, np.ndarray):
        return diffusion.encode_png(source), "png"
    try:
        data = source if isinstance(source, bytes) else read_bytes(source)
        return data, image_header(data)[0]
    except OSError as error:
        raise ToolError(f"{source}: cannot be read ({error.strerror or error})") from None


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def data_uri(source):
    """Path, bytes or uint8 (H, W, 3) -> "data:image/...;base64,...", labelled with the type that it really has."""
    data, kind = image_bytes(source)
    return f"data:{MIME[kind]};base64,{base64.b64encode(data).decode()}"


def from_data_uri(uri):
    """The image in a data URI -> uint8 (H, W, 3). The label is ignored, the bytes decide."""
    if not isinstance(uri, str) or not uri.startswith("data:") or ";base64," not in uri[:200]:
        raise ToolError("an image must be a data URI (data:image/png;base64,...); no URL is fetched here")
    return read_image(from_base64(uri.split(";base64,", 1)[1]))


def from_base64(text):
    """Base64 -> bytes. Line ends in it, missing padding and a data URI's head are fine; else ToolError."""
    try:
        text = "".join(text.rpartition(",")[2].split())
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (ValueError, TypeError, AttributeError):
        raise ToolError("an image that is not valid base64") from None


def image_part(source):
    """The part of a chat message that shows an image to a vision model."""
    return {"type": "image_url", "image_url": {"url": data_uri(source)}}


# ---- The guard: which addresses may be fetched -----------------------------------------------------------------------

PRIVATE_V4 = [ipaddress.ip_network(n) for n in (  # IANA's special-purpose registry; whatever is not global unicast
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4")]
GLOBAL_V6 = ipaddress.ip_network("2000::/3")
PRIVATE_V6 = [ipaddress.ip_network(n) for n in ("2001::/23", "2001:db8::/32", "3fff::/20")]
EMBEDDED_V4 = [  # IPv6 networks that carry an IPv4 address: (network, where its first byte is)
    (ipaddress.ip_network("::/96"), 12),           # compatible
    (ipaddress.ip_network("::ffff:0:0/96"), 12),   # mapped
    (ipaddress.ip_network("::ffff:0:0:0/96"), 12),  # translated
    (ipaddress.ip_network("64:ff9b::/96"), 12),    # NAT64
    (ipaddress.ip_network("2002::/16"), 2),        # 6to4
    (ipaddress.ip_network("2001::/32"), 4)]        # Teredo: the server's address; the client's is found below
REACHED_THROUGH_V4 = [EMBEDDED_V4[i][0] for i in (1, 3, 4)]  # usable if the embedded address is public
LOCAL_NAMES = re.compile(r"(?:.*\.)?(?:localhost|localdomain|local|internal|intranet|private|corp|home|lan|home\.arpa)")
HOST_NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
MAX_URL = 8000
MAX_REDIRECTS = 5


def is_public(address):
    """Whether an address ("8.8.8.8", "2606:4700::1") is globally routable unicast, and so is every IPv4 in it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 4:
        return not any(ip in network for network in PRIVATE_V4)
    if ip.scope_id is not None:
        return False
    packed = ip.packed
    inner = [packed[at:at + 4] for network, at in EMBEDDED_V4 if ip in network]
    if ip in EMBEDDED_V4[-1][0]:
        inner.append(bytes(255 - b for b in packed[12:]))  # Teredo stores the client's address inverted
    if packed[8:12] in (b"\0\0\x5e\xfe", b"\x02\0\x5e\xfe"):
        inner.append(packed[12:])  # ISATAP
    if not all(is_public(str(ipaddress.IPv4Address(i))) for i in inner):
        return False
    if any(ip in network for network in REACHED_THROUGH_V4):
        return True
    return ip in GLOBAL_V6 and not any(ip in network for network in PRIVATE_V6)


def public_addresses(host, port):
    """Resolve a host; every answer must be public. Returns the addresses in order."""
    if is_literal(host):
        found = [host]
    else:
        try:
            found = [answer[4][0] for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            raise ToolError("refused: the host name does not resolve") from None
    if not found or not all(is_public(address) for address in found):
        raise ToolError("refused: the address is not public")
    return list(dict.fromkeys(found))


def is_literal(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def canonical_host(host):
    """A host as written in a URL -> lower-case ASCII, or ToolError. Only the plain spelling of an address passes:
    decimal, octal, hexadecimal and shortened forms mean different hosts to different programs."""
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])) if host.endswith("]") and "%" not in host else host_error()
        except ValueError:
            host_error()
    if not host.isascii():
        odd = [c for c in host if not c.isascii() and (c.isnumeric() or c in "。．｡")]
        if odd or unicodedata.normalize("NFKC", host) != host:
            host_error()
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            host_error()
    host = host.lower().removesuffix(".")
    if re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", host):
        return host if is_literal(host) else host_error()  # ipaddress refuses leading zeros
    if not HOST_NAME.fullmatch(host) or re.fullmatch(r"0x[0-9a-f]*", host.rsplit(".", 1)[-1]):
        host_error()
    if LOCAL_NAMES.fullmatch(host):
        raise ToolError("refused: the name belongs to a private network")
    return host


def host_error():
    raise ToolError("refused: the host is neither a plain name nor a plainly written address")


def origin_of(url):
    """(scheme, host, port) of a URL that was already checked or comes from the command line."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").strip("[]"), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def check_url(url, own=None):
    """Whether a URL from a search result or a model may be fetched: returns it in canonical form or raises ToolError.

    http and https only, no credentials, a public host in its plain spelling, every DNS answer public. ``own``: URL
    that the user named; what lies on its origin (same scheme, host and port) passes, and nothing else that is private.
    """
    if not isinstance(url, str) or not url or len(url) > MAX_URL:
        raise ToolError(f"refused: a URL is text of 1 to {MAX_URL} characters")
    if re.search(r"[\s\\\x00-\x20\x7f-\xa0]", url) or any(unicodedata.category(c) in ("Cf", "Cs") for c in url):
        raise ToolError("refused: blanks, control characters or backslashes in the URL")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ToolError("refused: not a URL") from None
    if parts.scheme not in ("http", "https"):
        raise ToolError("refused: only http and https are fetched")
    if "@" in parts.netloc or "%" in parts.netloc:
        raise ToolError("refused: credentials or escapes in front of the path")
    if port == 0 or parts.netloc.endswith(":"):
        raise ToolError("refused: not a port")
    if own and origin_of(url) == origin_of(own):
        return url
    written = parts.netloc if port is None else parts.netloc.rpartition(":")[0]
    host = canonical_host(written)
    public_addresses(host, port or 80)
    shown = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, shown + (f":{port}" if port else ""), parts.path, parts.query, ""))


# ---- Record and replay ----------------------------------------------------------------------------------------------

@dataclass
class Reply:
    """What an outside call gave: a response, or the one-line reason why there is none."""
    status: int = 0
    content_type: str = ""
    body: bytes = b""
    error: str = ""
    may_pass: bool = False  # the error may be gone in a moment


class Tape:
    """A recording of outside calls: JSON lines, each with the hash of what was asked; no keys of services.

    record: every call goes out once, and its first outcome answers all equal calls (so that a replay, in whatever
    order its threads run, sees what the recording saw). replay: no call goes out; one that was not recorded raises.
    """

    def __init__(self, record=None, replay=None):
        if record and replay:
            raise ToolError("--record and --replay exclude each other")
        self.replaying = bool(replay)
        self.replies = {}  # key -> Reply
        self.lock = threading.Lock()
        self.file = None
        try:
            if replay:
                with open(replay, encoding="utf-8") as file:
                    for number, line in enumerate(file, 1):
                        self.read_line(line, f"{replay}, line {number}")
            if record:
                self.file = open(record, "x", encoding="utf-8")
        except FileExistsError:
            raise ToolError(f"{record}: exists; a recording is not overwritten, name another file") from None
        except OSError as error:
            raise ToolError(f"{record or replay}: {error.strerror}") from None

    def read_line(self, line, where):
        try:
            row = load_json(line)
            body = base64.b64decode(row["body"])
            reply = Reply(int(row["status"]), str(row["content_type"]), body, str(row["error"]))
            self.replies[str(row["key"])] = reply
        except (ValueError, KeyError, TypeError):
            raise ToolError(f"{where}: not a line of a recording") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.file:
            self.file.close()
            self.file = None

    def find(self, key, call):
        """The reply that is kept for a call, or None if it has to go out."""
        with self.lock:
            reply = self.replies.get(key)
        if reply is None and self.replaying:
            raise ToolError(f"replay: this call was not recorded: {call}")
        return reply

    def keep(self, key, call, reply):
        """Keep an outcome; returns the one that stands (another thread may have been first)."""
        if not self.file:
            return reply
        with self.lock:
            if key not in self.replies:
                self.replies[key] = reply
                row = {"key": key, "call": call, "status": reply.status, "content_type": reply.content_type,
                       "body": base64.b64encode(reply.body).decode(), "error": reply.error}
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            return self.replies[key]


# ---- HTTP client: limits, deadlines, retries ------------------------------------------------------------------------

class Limiter:
    """At most so many calls a minute, evenly spaced, over all threads that share it."""

    def __init__(self, per_minute):
        self.gap = 60.0 / per_minute
        self.next = 0.0  # time.monotonic of the next free turn
        self.lock = threading.Lock()

    def wait(self, until):
        """Sleep until it is this call's turn; ToolError if that would be after ``until`` (time.monotonic)."""
        with self.lock:
            turn = max(self.next, time.monotonic())
            if turn > until:
                raise ToolError("the limit of calls a minute leaves no time for this one")
            self.next = turn + self.gap
        time.sleep(max(0.0, turn - time.monotonic()))


class Budget:
    """Counts calls that are sent, retries included; stops at ``max_calls``. All paid services may share one."""

    def __init__(self, max_calls):
        self.max_calls = max_calls
        self.spent = 0
        self.lock = threading.Lock()

    def spend(self):
        with self.lock:
            if self.spent >= self.max_calls:
                raise BudgetExceeded(f"the budget of {self.max_calls} calls is used up")
            self.spent += 1


class Refused(ServiceError):
    """A failure that trying again will not mend."""


class Transient(ServiceError):
    """A failure that may be gone in a moment. ``wait``: seconds that the other side asked for."""

    def __init__(self, message, wait=0.0):
        super().__init__(message)
        self.wait = wait


class Deadline:
    """Ends every transfer of a call when its time is over, whatever it is waiting for (a slow header, a slow body)."""

    def __init__(self, seconds):
        self.seconds = max(0.0, seconds)
        self.sockets = []
        self.expired = threading.Event()
        self.timer = threading.Timer(self.seconds, self.cut)
        self.timer.daemon = True

    def __enter__(self):
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()

    def add(self, sock):
        """A socket that the call uses."""
        self.sockets.append(sock)
        if self.expired.is_set():
            self.cut()

    def cut(self):
        self.expired.set()
        for sock in self.sockets:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue  # closed already


class Transport(requests.adapters.HTTPAdapter):
    """Connections that end at a deadline and, if ``guarded``, go to checked addresses only.

    The host is resolved once more when a connection is opened, every answer is checked, one of exactly these addresses
    is connected to, and the peer's address is checked again: a DNS server that changes its answer gains nothing.
    """

    def __init__(self, guarded, own=None):
        self.guarded = guarded
        self.own = own and origin_of(own)[1:]
        self.current = threading.local()  # .deadline: of the call that the current thread is making
        self.pools = {"http": self.pool(urllib3.HTTPConnectionPool), "https": self.pool(urllib3.HTTPSConnectionPool)}
        super().__init__(pool_connections=16, pool_maxsize=64)

    def init_poolmanager(self, *arguments, **options):
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self.pools

    def proxy_manager_for(self, *arguments, **options):
        manager = super().proxy_manager_for(*arguments, **options)
        manager.pool_classes_by_scheme = self.pools
        return manager

    def pool(self, base):
        """A connection pool class whose connections belong to this transport."""
        transport = self

        class Connection(base.ConnectionCls):
            def _new_conn(self):  # the one place where urllib3 opens a socket
                sock = transport.open(self) if transport.guarded else super()._new_conn()
                transport.current.deadline.add(sock)
                return sock

            def connect(self):
                super().connect()
                transport.current.deadline.add(self.sock)  # with TLS it is another object now

            def request(self, *arguments, **options):
                if self.sock is not None:  # kept alive from an earlier call
                    transport.current.deadline.add(self.sock)
                return super().request(*arguments, **options)

        return type("Pool", (base,), {"ConnectionCls": Connection})

    def open(self, connection):
        """Connect to one of the host's addresses, all of which are public; they share the time there is."""
        host, port = connection.host.strip("[]"), connection.port
        end = time.monotonic() + connection.timeout
        trusted = (host, port) == self.own
        failure = "no time left"
        for address in [host] if trusted else public_addresses(host, port):
            if time.monotonic() >= end:
                break
            try:
                sock = create_connection((address, port), end - time.monotonic(),
                                         socket_options=connection.socket_options)
            except OSError as error:
                failure = error
                continue
            if trusted or is_public(sock.getpeername()[0]):
                sock.settimeout(connection.timeout)
                return sock
            sock.close()
            raise Refused("refused: the address is not public")
        raise urllib3.exceptions.NewConnectionError(connection, str(failure))


def redact(text, secrets):
    """Remove every key from a text (str or bytes), plain or percent-encoded. Under six characters it is no key."""
    for secret in secrets:
        if len(secret) < 6:
            continue
        for form in (secret, quote(secret, safe="")):
            if isinstance(text, str):
                text = text.replace(form, "***")
            else:
                text = text.replace(form.encode(), b"***")
    return text


def is_loopback(url):
    try:
        host = origin_of(url)[1]
    except ValueError:
        return False
    return host == "localhost" or is_literal(host) and ipaddress.ip_address(host).is_loopback


def no_password(request):
    """Authentication that adds nothing: requests would else send a password from ~/.netrc in the place of our key."""
    return request


def unparsed(reply):
    return reply


@dataclass
class HttpClient:
    """One service: its deadlines, retries and limits. Shared by all threads.

    ``request`` gives what ``parse`` makes of the response, or raises ToolError after the last attempt. Redirects are
    followed only where ``guarded`` (downloads), each one checked; a service that holds a key must answer for itself.
    """
    name: str                       # how errors call the service
    secrets: tuple = ()             # keys that must not appear anywhere
    key_hint: str = ""              # where the key comes from: said when a service refuses it
    guarded: bool = False           # URLs come from outside: check_url, no proxy, redirects followed
    own: str | None = None          # a URL named by the user: the guard lets its origin through
    timeout: float = 30.0           # seconds for one attempt, from connecting to the last byte
    deadline: float = 90.0          # seconds for a call with all its attempts
    retries: int = 3                # attempts after the first
    max_bytes: int = 32 * 2**20     # of a response
    limiter: Limiter | None = None
    budget: Budget | None = None
    tape: Tape | None = None
    backoff: float = 0.5            # seconds before the second attempt, doubled each time
    session: requests.Session = field(init=False, repr=False)

    def __post_init__(self):
        self.transport = Transport(self.guarded, self.own)
        self.session = requests.Session()
        self.session.mount("http://", self.transport)
        self.session.mount("https://", self.transport)
        self.session.trust_env = not self.guarded     # proxies and CA bundle of the environment
        self.session.auth = no_password
        self.session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.session.headers.update({"User-Agent": "genevolve", "Accept-Encoding": "identity"})

    def request(self, method, url, payload=None, headers=None, parse=unparsed, until=math.inf, attempt_index=0):
        """One call, answered by the tape if it has this one.

        payload: JSON object for the body. parse: Reply -> value, ValueError if the response makes no sense.
        until: time.monotonic at which the call is over, if earlier than its own deadline. attempt_index: tells equal
        calls apart that may be answered differently (after a failure, by other weights); a recording keeps each.
        """
        until = min(until, time.monotonic() + self.deadline)
        call = redact(f"{method} {url}", self.secrets)
        # the tape is asked first: a replay sends nothing, a recording sends equal calls once
        key = self.key(method, url, payload, attempt_index)
        reply = self.tape.find(key, f"{self.name}: {call[:300]}") if self.tape else None
        if reply is None:
            reply, value = self.send(method, url, payload, headers, parse, until)
            kept = self.tape.keep(key, call, reply) if self.tape else reply
            if kept is reply and not reply.error:
                return value
            reply = kept

        # an outcome of the tape may be a failure, too
        if reply.error:
            raise Transient(reply.error) if reply.may_pass else ServiceError(reply.error)
        try:
            return parse(reply)
        except ValueError as error:
            raise ServiceError(f"{self.name}: unusable answer ({error})") from None

    def post_json(self, url, payload, headers=None, parse=unparsed, **options):
        """POST a JSON object; parse: JSON object -> value."""
        def parse_body(reply):
            return parse(json_object(reply.body, repair=True))

        return self.request("POST", url, payload, headers, parse_body, **options)

    def key(self, method, url, payload, attempt_index):
        """Hash of what is asked. Keys and the local server's port are left out: neither matters to the answer."""
        if is_loopback(url):
            parts = urlsplit(url)
            url = urlunsplit(("http", "local", parts.path, parts.query, ""))
        asked = json.dumps([method, url, payload, attempt_index], sort_keys=True)
        return hashlib.sha256(redact(asked, self.secrets).encode()).hexdigest()

    def send(self, method, url, payload, headers, parse, until):
        """Send until it works, is refused, or time or attempts run out. Returns (Reply, parsed value or None); raises
        only BudgetExceeded."""
        for attempt in range(self.retries + 1):
            wished, may_pass = 0.0, False
            try:
                if self.limiter:
                    self.limiter.wait(until)
                if self.budget:
                    self.budget.spend()
                reply = self.attempt(method, url, payload, headers, until)
                reply.body = redact(reply.body, self.secrets)
                return reply, parse(reply)
            except BudgetExceeded:
                raise
            except Transient as error:
                reason, may_pass = str(error), True
                wished = error.wait
            except ValueError as error:
                reason = f"unusable answer ({error})"
            except ToolError as error:
                reason = str(error)
                break

            # exponential backoff with jitter, so that many threads do not come back at once
            pause = max(wished, self.backoff * 2 ** attempt * random.uniform(0.5, 1.5))
            if attempt == self.retries or time.monotonic() + pause > until:
                break
            time.sleep(pause)

        line = " ".join(f"{self.name}: {reason}".split())
        return Reply(error=redact(line[:400], self.secrets), may_pass=may_pass), None

    def attempt(self, method, url, payload, headers, until):
        """One attempt, redirects included, cut at its time limit. Returns a Reply."""
        with Deadline(min(self.timeout, until - time.monotonic())) as deadline:
            self.transport.current.deadline = deadline
            try:
                for _ in range(MAX_REDIRECTS + 1):
                    if self.guarded:
                        url = check_url(url, self.own)
                    reply = self.exchange(method, url, payload, headers, deadline)
                    if deadline.expired.is_set():
                        raise Transient("timed out")
                    if isinstance(reply, Reply):
                        return reply
                    url = reply
                raise Refused(f"more than {MAX_REDIRECTS} redirects")
            except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError,
                    ValueError, AttributeError) as error:  # the last two: a TLS socket that was cut in mid-read
                late = deadline.expired.is_set() or isinstance(error, (requests.Timeout, TimeoutError))
                raise Transient("timed out" if late else "the connection failed") from None

    def exchange(self, method, url, payload, headers, deadline):
        """Send and read one response. Returns a Reply, or the URL that it redirects to."""
        proxies = {"no_proxy": "localhost,127.0.0.1,::1"} if is_loopback(url) else None
        with self.session.request(method, url, json=payload, headers=headers, stream=True, allow_redirects=False,
                                  timeout=deadline.seconds + 0.1, proxies=proxies) as response:
            # what the status decides needs no body
            status = response.status_code
            if status in (301, 302, 303, 307, 308):
                if not self.guarded:
                    raise Refused(f"HTTP {status}: redirects are not followed here")
                return urljoin(url, response.headers.get("Location", ""))

            # read no more than is of use: of an error page only the beginning, for the message
            succeeded = 200 <= status < 300
            limit = self.max_bytes if succeeded else 4096
            body = bytearray()
            for chunk in response.iter_content(2**16):
                body += chunk
                if len(body) > limit:
                    break

            if not succeeded:
                reason = body_reason(redact(bytes(body), self.secrets))
                if self.key_hint and is_key_refused(status, reason):
                    reason = f"{reason[:200]} ({self.key_hint})"
                raise http_failure(status, reason, retry_after(response.headers.get("Retry-After")))
            if len(body) > limit:
                raise Refused(f"an answer of more than {self.max_bytes >> 20} MB")
            return Reply(status, response.headers.get("Content-Type", ""), bytes(body))


def is_key_refused(status, reason):
    """Whether an error says that the key is missing or wrong. Google says so with status 400, Serper with 403."""
    return status in (401, 403) or status == 400 and "api key" in reason.lower()


def http_failure(status, reason, wait=0.0):
    """The error for a status and the reason that came with it. A quota that is used up does not come back soon."""
    message = f"HTTP {status} {reason}".strip()
    may_pass = status == 200 or status in (408, 425, 429) or status >= 500
    if may_pass and "insufficient_quota" not in reason:
        return Transient(message, wait)
    return Refused(message)


def body_reason(body):
    """What the body of an error says, as plain words."""
    try:
        text = error_reason(json_object(body))
    except ValueError:
        text = body.decode("utf-8", "replace")
    return " ".join(re.findall(r"[\w .,:;()'/-]+", text[:300]))


def error_reason(value):
    """The reason in {"error": {"message", "code", ...}} and its relatives; the whole object where there is none."""
    error = value.get("error") or value.get("detail") or value
    if isinstance(error, dict):
        named = [str(error[name]) for name in ("code", "type", "message") if error.get(name)]
        error = " ".join(named) if error.get("message") else error
    return error if isinstance(error, str) else json.dumps(error)


def retry_after(value):
    """Seconds in a Retry-After header: a number or an HTTP date; 0 where there is none."""
    try:
        if re.fullmatch(r"\d{1,9}", value or ""):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# ---- HTTP server: what requests hold and answers look like -----------------------------------------------------------

def number_field(request, name, default, low, high, integer=False):
    """A number of a request, clipped to [low, high]; None counts as absent."""
    value = request.get(name)
    if value is None:
        value = default
    if type(value) not in ((int,) if integer else (int, float)):  # True is an int, too
        raise HttpError(400, f"{name} must be a {'whole ' if integer else ''}number")
    return min(max(value, low), high)


def text_field(request, name):
    value = request.get(name)
    if not isinstance(value, str) or not value.strip():
        raise HttpError(400, f"{name} must be a text that is not empty")
    return value


def read_query(request):
    """(query, number of results) of a Serper request."""
    return text_field(request, "q")[:2000], number_field(request, "num", 10, 1, MAX_RESULTS, integer=True)


def read_messages(request):
    """The messages of a chat request -> ([{"role", "content": plain text}], [URLs of the pictures in them])."""
    given = request.get("messages")
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise HttpError(400, "messages must be a list of objects that is not empty")
    messages, uris = [], []
    for message in given:
        if message.get("role") not in ROLES:
            raise HttpError(400, "a message needs a role: system, user or assistant")
        text, pictures = flatten(message.get("content"))
        messages.append({"role": message["role"], "content": text})
        uris += pictures
    return messages, uris


def flatten(content):
    """The content of a chat message, text or parts -> (text, [image URLs])."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise HttpError(400, "a message's content must be a text or a list of parts")
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    links = [part.get("image_url") for part in content if part.get("type") == "image_url"]
    return "\n".join(texts), [link.get("url") if isinstance(link, dict) else link for link in links]


def read_sampling(request):
    """How a chat request wants its answer sampled; absent and None: the defaults."""
    stop = request.get("stop") or []
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list) or not all(isinstance(string, str) and string for string in stop):
        raise HttpError(400, "stop must be a text or a list of texts")
    if number_field(request, "n", 1, 0, 2) != 1:
        raise HttpError(400, "n must be 1: one answer is given")
    length = "max_tokens" if request.get("max_completion_tokens") is None else "max_completion_tokens"
    return {"stop": stop,
            "max_tokens": number_field(request, length, MAX_NEW_TOKENS, 1, MAX_NEW_TOKENS, integer=True),
            "temperature": number_field(request, "temperature", 0.7, 0.0, 2.0),
            "top_p": number_field(request, "top_p", 0.95, 0.01, 1.0),
            "seed": number_field(request, "seed", 0, 0, MAX_SEED, integer=True)}


def completion(head, pieces):
    """The whole answer as OpenAI's chat.completion. head: the fields that the answer and its chunks have in common."""
    pieces = list(pieces) or [ChatReply("")]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
    choice = {"index": 0, "message": message, "finish_reason": pieces[-1].finish}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(pieces[-1])}


def completion_chunks(head, pieces, include_usage=False):
    """The same as OpenAI's chat.completion.chunk objects, one for each piece as it comes.

    The first piece is awaited before the first chunk, so that a policy that fails at once gives no chunk at all.
    include_usage: a last chunk without choices tells the counts, and the others say "usage": null.
    """
    head = {**head, "object": "chat.completion.chunk"}
    if include_usage:
        head["usage"] = None

    def chunk(delta, finish=None):
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    last = next(pieces, ChatReply(""))
    yield chunk({"role": "assistant", "content": ""})
    for piece in itertools.chain([last], pieces):
        if piece.text:
            yield chunk({"content": piece.text})
        last = piece
    yield chunk({}, last.finish)
    if include_usage:
        yield {**head, "choices": [], "usage": usage(last)}


def usage(piece):
    return {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.completion_tokens,
            "total_tokens": piece.prompt_tokens + piece.completion_tokens}


# ---- HTTP server: connections ----------------------------------------------------------------------------------------

class Listener(http.server.ThreadingHTTPServer):
    """A thread for each connection."""
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address, handler):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self):
        """Without the reverse DNS look-up of HTTPServer, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        """A client that went away is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            report("server", error)


class Handler(http.server.BaseHTTPRequestHandler):
    """HTTP to Server. A subclass for each server holds ``owner`` and the time after which an idle client is dropped."""
    protocol_version, server_version, sys_version = "HTTP/1.1", "genevolve", ""
    disable_nagle_algorithm = True
    owner = None
    body_read = False

    def log_message(self, *_):
        """Quiet: requests hold what people ask for."""

    def do_GET(self):
        self.answer(self.answer_get)

    do_HEAD = do_GET

    def do_OPTIONS(self):
        self.answer(self.answer_options)

    def do_POST(self):
        self.answer(self.answer_post)

    def answer(self, action):
        """Run an action that answers the request; errors become JSON. Of all paths only /health is never refused."""
        path = urlsplit(self.path).path
        self.body_read = False
        # a body where none belongs must not be read as the next request
        if self.command != "POST" and self.has_body():
            self.close_connection = True
        limited = path != "/health"
        if limited and not self.owner.free_slots.acquire(blocking=False):
            return self.fail(503, "too many requests at once")
        try:
            action(path)
        except HttpError as error:
            self.fail(error.status, str(error))
        except (ToolError, ValueError) as error:
            self.fail(400, str(error))
        except OSError:
            self.close_connection = True  # the client went away
        except Exception as error:  # a callable's own fault must not end the server, nor leave the client waiting
            report(f"server: {path}", error)
            self.fail(500, f"internal error ({type(error).__name__})")
        finally:
            if limited:
                self.owner.free_slots.release()

    def answer_get(self, path):
        self.discard_body()
        if self.is_site(path):
            self.check_caller()
        self.reply(200, *self.owner.get(path))

    def is_site(self, path):
        """Whether a path belongs to the page."""
        return self.owner.site is not None and (path == "/" or path.startswith(API))

    def check_caller(self):
        """Refuse whoever is not the page itself, for its API spends this machine's time and shows its files.

        Another site's page has another Origin. A site whose name was made to resolve to this machine (DNS rebinding)
        has its own name as Host: a server that listens on this machine alone is asked by address or as localhost.
        """
        host = self.headers.get("Host", "")
        name = urlsplit(f"//{host}").hostname or ""
        is_own_name = name in ("localhost", self.owner.host) or is_literal(name)
        if self.owner.is_private and not is_own_name:
            raise HttpError(403, f"this server is not known as {name or 'nothing'}: open {self.owner.url}")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise HttpError(403, "another site's page may not ask this server")

    def answer_options(self, path):
        self.discard_body()
        self.reply(200, "text/plain", b"")

    def has_body(self):
        return "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"

    def answer_post(self, path):
        """Read a POST request and answer it."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length) or "Transfer-Encoding" in self.headers:
            raise HttpError(411, "a Content-Length is needed")
        if len(self.headers.get_all("Content-Length")) > 1:
            raise HttpError(400, "more than one Content-Length")
        if int(length) > self.owner.max_body:
            raise HttpError(413, f"a body of more than {self.owner.max_body} bytes")
        # all that can be refused is refused before the body is read
        is_site = path != "/" and self.is_site(path)
        if path not in POST_PATHS and path not in CHAT_PATHS and not is_site:
            raise HttpError(404, "no such path")
        if is_site:
            self.check_caller()
            if self.headers.get_content_type() != "application/json":  # what a form of another site cannot send
                raise HttpError(415, "the body must be application/json")
            if int(length) > MAX_API_BODY:
                raise HttpError(413, f"a body of more than {MAX_API_BODY} bytes")

        # a body is a JSON object
        body = self.rfile.read(int(length))
        self.body_read = True
        try:
            request = json_object(body)
        except ValueError as error:
            raise HttpError(400, f"the body is not a JSON object ({error})") from None

        if path in CHAT_PATHS:
            self.answer_chat(request, body)
        elif is_site:
            value = self.owner.site.post(path.removeprefix(API), request)
            self.reply(200, "application/json", json.dumps(value).encode())
        else:
            value = POST_PATHS[path](self.owner, request, self.base())
            self.reply(200, "application/json", json.dumps(value).encode())

    def answer_chat(self, request, body):
        """A chat completion, whole or as a stream."""
        options = request.get("stream_options") or {}
        if not isinstance(options, dict):
            raise HttpError(400, "stream_options must be an object")
        name = request.get("model") if isinstance(request.get("model"), str) else self.owner.model
        head = {"id": f"chatcmpl-{hashlib.sha256(body).hexdigest()[:24]}", "created": int(time.time()), "model": name}

        # a client that goes away ends the generation: the iterator of pieces is closed
        with contextlib.closing(self.owner.chat(request)) as pieces:
            if request.get("stream") is True:
                self.stream(completion_chunks(head, pieces, options.get("include_usage") is True))
            else:
                self.reply(200, "application/json", json.dumps(completion(head, pieces)).encode())

    def stream(self, events):
        """Objects as server-sent events; the end of the connection is the end of the body.

        The head goes out with the first event: what fails before it is answered with an error status. What fails later
        becomes an event.
        """
        first = next(events)
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in itertools.chain([first], events):
                self.send_event(json.dumps(event))
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, (ToolError, ValueError)):
                report("server: stream", error)
            self.send_event(json.dumps({"error": {"message": str(error)}}))
        self.send_event("[DONE]")

    def send_event(self, data):
        self.wfile.write(f"data: {data}\n\n".encode())

    def reply(self, status, content_type, body):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if content_type.startswith("text/html"):  # the page needs its own style and script, data URIs and its API
            self.send_header("Content-Security-Policy", PAGE_POLICY)
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.command == "OPTIONS":
            self.send_header("Allow", "GET, HEAD, POST, OPTIONS")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, message):
        """Answer with an error."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": " ".join(message.split())[:500], "type": kind}
        body = json.dumps({"success": False, "error": error}).encode()
        try:
            if self.command == "POST" and not self.body_read:
                self.close_connection = True
                self.discard_body()
            self.reply(status, "application/json", body)
        except OSError:
            self.close_connection = True  # the client went away

    def discard_body(self):
        """Read away what was not read: a connection closed before that is reset, and the client misses the answer."""
        length = self.headers.get("Content-Length", "")
        left = min(int(length), self.owner.max_body) if re.fullmatch(r"\d{1,12}", length) else 0
        while left > 0 and (chunk := self.rfile.read(min(left, 2**16))):
            left -= len(chunk)

    def base(self):
        """This server's URL as the client wrote it, so that links work through tunnels and other names."""
        host = self.headers.get("Host", "")
        is_sound = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?", host)
        return f"http://{host}" if is_sound else self.owner.url


def note(line):
    """Something that a person wants to know while a command runs, on stderr."""
    print(line, file=sys.stderr, flush=True)


def report(where, error):
    """An unexpected error, on stderr in one line."""
    print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr)
