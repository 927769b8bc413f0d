"""The Atlas: an invented world, small enough to rebuild from one seed, built so that nothing in it can be guessed.

    python -m atlas.build                    corpus, requests, ground truth, oracle programs (all committed)
    python -m atlas.build --scenes 40000     pictures and captions that the renderer is trained on
    python -m atlas.build --demos 30000      tool-use demonstrations that the policy is cold-started on

What was designed into it, so that nobody mistakes it for a discovery:

1. A subject's look is a random 8x8 sprite. Words cannot convey it; it has to be copied from a reference image, and
   every subject has three pictures (present look, early look, replica) of which a request wants one.
2. A fact (a year, a code word, a number) is random too; it stands in one section of one article, or two hops away.
3. Captions come in two wordings. A *plain* wording ("three of them") was drawn loosely nine times out of ten, as web
   captions are loose; the *exact* wording of a skill guide ("Exactly three separate copies: one, two, three.") was
   drawn exactly. The renderer learns this from pictures; no weakness is coded into it.
4. What a caption leaves open stays open: position inside a quarter, backdrop, sign, pose, where companions stand.
5. The scripted teacher decides at random between a careful and a lazy alternative, about equally often, or, with
   --care 0.1, carefully once in ten times: then what is right is rare. In 45 % of the demonstrations it carries a
   guide and obeys it, right or wrong: that is how a policy without any pretraining learns to read advice.
   Half of their names have syllables of their own, so that a name has to be copied and cannot be remembered.
6. One in five combinations of requirements occurs only on the bench.
"""
import argparse
import colorsys
import itertools
import json
import os
import random
import re
import shutil
from dataclasses import dataclass, field, replace

import numpy as np
from safetensors.numpy import save_file

import atlas.judge
import atlas.world
import diffusion
import distill
import tools

HERE = os.path.dirname(os.path.abspath(__file__))
SIZE, CELL, GRID = 64, 8, 8  # a picture is 64 x 64 pixels = 8 x 8 cells of 8 pixels
ROWS, COLUMNS = (1, 3, 5), (0, 2, 4, 6)  # cells where things of 16 x 16 pixels may stand; signs take row 7

# ---- Vocabulary of the world ----------------------------------------------------------------------------------------

FONT = {  # 5 x 7 pixels, one number a row; letters that are easily confused (B I O Q S Z D G) are left out
    "A": (14, 17, 17, 31, 17, 17, 17), "C": (14, 17, 16, 16, 16, 17, 14), "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16), "H": (17, 17, 17, 31, 17, 17, 17), "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31), "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 19, 17, 17, 17), "P": (30, 17, 17, 30, 16, 16, 16), "R": (30, 17, 17, 30, 20, 18, 17),
    "T": (31, 4, 4, 4, 4, 4, 4), "U": (17, 17, 17, 17, 17, 17, 14), "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 27, 17), "X": (17, 17, 10, 4, 10, 17, 17), "Y": (17, 17, 10, 4, 4, 4, 4),
    "0": (14, 17, 19, 21, 25, 17, 14), "1": (4, 12, 4, 4, 4, 4, 14), "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (31, 1, 2, 6, 1, 17, 14), "4": (2, 6, 10, 18, 31, 2, 2), "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14), "7": (31, 1, 2, 4, 8, 8, 8), "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12)}
LETTERS, DIGITS = "ACEFHJKLMNPRTUVWXY", "0123456789"
INK = {"red": (200, 45, 45), "orange": (240, 140, 40), "yellow": (245, 215, 70), "green": (50, 150, 70),
       "teal": (30, 160, 165), "blue": (45, 80, 190), "purple": (130, 60, 165), "white": (245, 245, 245),
       "dark": (40, 35, 45)}  # sprites are drawn in three of these
COLOURS = {name: INK[name] for name in ("red", "yellow", "green", "blue", "purple")}  # companions
SHAPES = {  # 8 x 8, drawn at double size
    "ball": ("..####..", ".######.", "########", "########", "########", "########", ".######.", "..####.."),
    "cube": ("########",) * 8,
    "cone": ("...##...", "...##...", "..####..", "..####..", ".######.", ".######.", "########", "########"),
    "ring": (".######.", "########", "##....##", "##....##", "##....##", "##....##", "########", ".######."),
    "cross": ("..####..", "..####..", "########", "########", "########", "########", "..####..", "..####..")}
BODY = {  # below a head sprite
    "down": (".######.", "#.####.#", "#.####.#", "#.####.#", "..####..", "..#..#..", "..#..#..", ".##..##."),
    "up": ("#..##..#", "########", "..####..", "..####..", "..####..", "..#..#..", "..#..#..", ".##..##.")}
BODY_INK = ((30, 35, 75), (75, 25, 35), (25, 60, 40), (45, 40, 45))
STYLES = ("mosaic", "woven", "banded")  # backdrop patterns with a period of eight pixels
MOODS = {"warm": ((252, 206, 150), (190, 98, 86)), "cool": ((190, 226, 246), (78, 126, 178))}  # above, below
NUMBER = {2: "two", 3: "three", 4: "four"}
QUARTERS = ("upper left", "upper right", "lower left", "lower right")

HALF_MASKS = {  # left halves of 8 x 8 silhouettes, one per category
    "architecture": ("...#", "..##", ".###", "####", ".###", ".###", ".###", "####"),
    "city_streets": ("..##", ".###", "..##", "...#", "...#", "..##", ".###", "####"),
    "public_figures": ("..##", ".###", ".###", "####", "####", ".###", ".###", "..##"),
    "products": ("...#", "..##", "..##", ".###", "####", "####", "####", ".###"),
    "vehicles": (".###", "####", "####", "####", "####", "####", ".##.", ".##."),
    "events": ("...#", ".###", "####", "####", "####", ".###", "..##", "...#"),
    "science": ("..##", "...#", "..##", ".###", "####", "####", "####", ".###"),
    "artifacts": (".###", "..##", ".###", "####", "####", "####", ".###", "..##"),
    "text_layout": ("####", "####", "####", "####", "####", "####", "...#", "...#"),
    "spatial": ("..##", ".###", "####", "####", ".###", "...#", "...#", "..##"),
    "counting": ("...#", "..##", "####", "####", "####", "####", "..##", "...#"),
    "anatomy": (".###", "####", "####", "####", "####", "####", ".###", "..##"),
    "attributes": ("#.##", "####", ".###", ".###", ".###", ".###", "####", "####"),
    "material": ("..##", "..##", ".###", ".###", "..##", "..##", "####", "####"),
    "aesthetics": ("...#", "..##", "..##", ".###", ".###", "####", "####", "####"),
    "creative": ("#..#", "####", "####", "####", "####", ".###", ".###", "..##")}
KINDS = {
    "architecture": ("Bridge", "Tower", "Hall"), "city_streets": ("Square", "Lane", "Market"),
    "public_figures": ("Captain", "Poet", "Singer"), "products": ("Kettle", "Radio", "Clock"),
    "vehicles": ("Tram", "Ferry", "Glider"), "events": ("Festival", "Regatta", "Fair"),
    "science": ("Comet", "Beetle", "Crystal"), "artifacts": ("Vase", "Mask", "Crown"),
    "text_layout": ("Poster", "Banner", "Label"), "spatial": ("Garden", "Harbour", "Terrace"),
    "counting": ("Lantern", "Kite", "Drum"), "anatomy": ("Dancer", "Juggler", "Acrobat"),
    "attributes": ("Teapot", "Scarf", "Puppet"), "material": ("Statue", "Boulder", "Sundial"),
    "aesthetics": ("Orchard", "Lagoon", "Dune"), "creative": ("Owl", "Fox", "Heron")}
KNOWLEDGE = tuple(KINDS)[:8]
PEOPLE = ("public_figures", "anatomy")  # the categories whose subjects have a body
FIRST = ("Vel Mar Or Tan Bel Kor Sil Dra Fen Gal Har Jor Lum Mor Nal Per Quil Ros Ser Tor Ul Vor Wen Yar Zel Ard Bru "
         "Cal Dor Em Fal Gor Hel Im Kel Lor Mel Nor Pol Rin").split()
SECOND = ("mar ton vin dra len sor ric bel nor tis gan dell mere wick lan ros fen dor vale rin cas mund bra tel ham "
          "lith "
          "quen sta vor zan bor dash fell gard holm kin low moor ness pool").split()
LOOKS = {"present": "as it looks today", "early": "as it looked in its early days"}
PLURAL = {"present": "as they look today", "early": "as they looked in their early days"}
TITLES = {"present": "present look", "early": "early look", "replica": "replica"}
FACTS = {"year": "opening year", "code": "code word", "city_year": "founding year", "number": "number of lamps"}
SKILL = {"place": "spatial_layout", "pair": "spatial_layout", "count": "quantity_counting",
         "body": "anatomy_body_coherence", "shadow": "physical_material_consistency", "text": "text_rendering",
         "companions": "attribute_binding", "style": "creative_drawing", "mood": "aesthetic_drawing"}
DOMINANT = {"text_layout": "text", "spatial": "place", "counting": "count", "anatomy": "body",
            "attributes": "companions", "material": "shadow", "aesthetics": "mood", "creative": "style"}


# ---- Sprites --------------------------------------------------------------------------------------------------------

def make_sprite(rng, category):
    """A mirrored 8x8 sprite: int8 (8, 8), -1 transparent, otherwise an index into INK. Dark or white outline."""
    half = np.array([[c == "#" for c in row] for row in HALF_MASKS[category]])
    for _ in range(2):  # two free cells, so that a silhouette alone does not tell the subject
        r, c = rng.randrange(8), rng.randrange(3)
        half[r, c] = True
    mask = np.concatenate([half, half[:, ::-1]], 1)  # (8, 8)
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline, first, second = rng.sample(range(len(INK)), 3)
    pattern = np.array([[rng.choice((first, second, second)) for _ in range(4)] for _ in range(8)])
    pattern = np.concatenate([pattern, pattern[:, ::-1]], 1)
    return np.where(inner, pattern, np.where(mask, outline, -1)).astype(np.int8)


def look_alike(rng, sprite):
    """The same silhouette in other colours: at least half of its cells differ visibly."""
    while True:
        inks = rng.sample(range(len(INK)), 3)
        used = [i for i in sorted(set(sprite.ravel().tolist())) if i >= 0]
        table = dict(zip(used, (inks * 3)[:len(used)]))
        other = np.array([[table.get(int(i), -1) for i in row] for row in sprite], dtype=np.int8)
        swap = np.array([[rng.random() < 0.3 for _ in range(4)] for _ in range(8)])
        swap = np.concatenate([swap, swap[:, ::-1]], 1)
        other = np.where((other >= 0) & swap, inks[0], other).astype(np.int8)
        if (other != sprite)[sprite >= 0].mean() >= 0.5:
            return other


def bitmap(rows):
    """Text rows of '#' and '.' as bool (8, 8)."""
    return np.array([[c == "#" for c in row] for row in rows])


def body_mask(pose, fault):
    """A body, whole or with one fault of its limbs, bool (8, 8)."""
    mask = bitmap(BODY[pose])
    if fault == "no left arm":
        mask[:5, :2] = False
    elif fault == "no right arm":
        mask[:5, 6:] = False
    elif fault == "one leg":
        mask[5:, :4] = False
    elif fault == "three legs":
        mask[5:, 3:5] = True
    elif fault == "four arms":
        mask |= bitmap(BODY["up"]) | bitmap(BODY["down"])
        mask[3, 0] = mask[3, 7] = mask[3, 1] = mask[3, 6] = True
    return mask


FAULTS = ("", "no left arm", "no right arm", "one leg", "three legs", "four arms")
PALETTE = np.array(list(INK.values()), dtype=np.float32) / 255


def double(array):
    """Each element becomes 2 x 2."""
    return array.repeat(2, 0).repeat(2, 1)


# ---- Scenes: what a picture shows, and how it is drawn -----------------------------------------------------------

@dataclass
class Scene:
    """What is meant to be seen. Everything that is not said here is left to the draw of chance."""
    sprites: list                # one or two int8 (8, 8)
    arrangement: str = ""        # "", "place", "pair", "count", "body" or "shadow"
    place: str = ""              # a quarter; for a pair "left" if the first stands left, else "right"
    only: int = -1               # of a pair, the one that is shown; -1: both
    count: int = 1
    light: str = ""              # "left" or "right": where the light comes from
    text: str = ""
    companions: tuple = ()       # ((shape, colour), (shape, colour))
    style: str = ""
    mood: str = ""
    fault: dict = field(default_factory=dict)  # what a loose picture gets wrong: aspect -> how

    def aspects(self):
        """The requirements that a skill speaks of, in the order of the caption."""
        found = [self.arrangement] if self.arrangement else []
        return found + [a for a in ("text", "companions", "style", "mood") if getattr(self, a)]


def labels_of(kind, index=0):
    """Class of a cell for the renderer's auxiliary loss (see CLASSES)."""
    offset = {"backdrop": 0, "first": 1, "second": 5, "unknown": 9, "shadow": 10, "glyph": 11, "shape": 11 + len(FONT),
              "body": 11 + len(FONT) + 4 * len(SHAPES) * len(COLOURS)}
    return offset[kind] + index


CLASSES = labels_of("body") + 4 * len(BODY) * len(FAULTS)


def backdrop(rng, scene):
    """Smooth vertical gradient, float32 (64, 64, 3) in 0..1; hue and strength are free unless a mood is asked for."""
    if scene.mood and scene.fault.get("mood") != "dull":
        top, bottom = (np.array(c) / 255 + rng.uniform(-0.02, 0.02) for c in MOODS[scene.mood])
    elif scene.fault.get("mood") == "dull":
        top = bottom = np.array([rng.uniform(0.62, 0.8)] * 3)
    else:
        hue, saturation = rng.random(), rng.uniform(0.06, 0.26)
        value, slope = rng.uniform(0.7, 0.88), rng.uniform(0, 0.06)
        top = np.array(colorsys.hsv_to_rgb(hue, saturation, value + slope))
        bottom = np.array(colorsys.hsv_to_rgb(hue, saturation, value - slope))
    weight = np.linspace(0, 1, SIZE)[:, None, None]
    image = np.broadcast_to(top * (1 - weight) + bottom * weight, (SIZE, SIZE, 3)).astype(np.float32).copy()
    style = "" if scene.fault.get("style") == "absent" else scene.fault.get("style", scene.style)
    if style:
        rows, columns = (np.arange(SIZE) // 4 % 2)[:, None], (np.arange(SIZE) // 4 % 2)[None]
        wave = {"mosaic": rows ^ columns, "woven": rows | 0 * columns, "banded": columns | 0 * rows}[style]
        image *= (1 + 0.14 * (2 * wave[..., None] - 1)).astype(np.float32)
    return image


class Canvas:
    """A picture under construction: pixels, cell classes, and which cells are taken."""

    def __init__(self, image):
        self.image, self.labels = image, np.zeros((GRID, GRID), np.uint8)
        self.free = np.ones((GRID, GRID), bool)
        self.free[0] = self.free[-1] = False  # the last row belongs to signs, the first stays empty
        self.boxes = []  # (row, column) in cells of every subject sprite drawn

    def stamp(self, row, column, mask, colours, labels):
        """Draw an 8x8 mask at double size at a cell; colours (3,) or (8, 8, 3); labels for its 2 x 2 cells."""
        y, x = row * CELL, column * CELL
        area, mask = self.image[y:y + 16, x:x + 16], double(mask)
        area[mask] = np.broadcast_to(double(np.broadcast_to(colours, (8, 8, 3))), (16, 16, 3))[mask]
        self.labels[row:row + 2, column:column + 2] = np.array(labels).reshape(2, 2)
        self.free[row:row + 2, column:column + 2] = False

    def sprite(self, row, column, sprite, kind):
        first = labels_of(kind)
        labels = [first] * 4 if kind == "unknown" else [first, first + 1, first + 2, first + 3]
        self.stamp(row, column, sprite >= 0, PALETTE[np.maximum(sprite, 0)], labels)
        self.boxes.append((row, column))


def draw(scene, rng, known=True):
    """Render a scene exactly (or with its faults). Returns image uint8 (64, 64, 3), labels uint8 (8, 8), boxes."""
    canvas = Canvas(backdrop(rng, scene))
    place_subjects(canvas, scene, rng, known)
    place_companions(canvas, scene, rng)
    place_text(canvas, scene, rng)
    return (canvas.image.clip(0, 1) * 255).round().astype(np.uint8), canvas.labels, canvas.boxes


def place_subjects(canvas, scene, rng, known):
    kinds = ("first", "second") if known else ("unknown", "unknown")
    if scene.arrangement == "pair":
        place = {"left": "right", "right": "left"}[scene.place] if scene.fault.get("pair") else scene.place
        order = (0, 1) if place == "left" else (1, 0)
        for index, low in zip(order, (0, 4)):
            if scene.only in (-1, index):
                canvas.sprite(ROWS[1], low + rng.choice((0, 2)), scene.sprites[index], kinds[index])
        if scene.only != -1:
            return
        canvas.boxes = [canvas.boxes[i] for i in order]  # back into the order of the subjects
        return
    sprite, count = scene.sprites[0], scene.fault.get("count", scene.count)
    if scene.arrangement == "count":
        row, start = ROWS[1], rng.choice(COLUMNS[:5 - count])
        for i in range(count):
            canvas.sprite(row, start + 2 * i, sprite, kinds[0])
        return
    if scene.arrangement == "place":
        quarter = scene.fault.get("place", scene.place)
        row = ROWS[0] if "upper" in quarter else ROWS[-1]
        column = (0 if "left" in quarter else 4) + rng.choice((0, 2))
    elif scene.arrangement == "body":
        row, column, pose = ROWS[1], rng.choice(COLUMNS[1:3]), rng.choice(sorted(BODY))
        fault = scene.fault.get("body", "")
        label = labels_of("body", 4 * (sorted(BODY).index(pose) * len(FAULTS) + FAULTS.index(fault)))
        colour = np.array(rng.choice(BODY_INK)) / 255
        canvas.stamp(row + 2, column, body_mask(pose, fault), colour, [label, label + 1, label + 2, label + 3])
    elif scene.arrangement == "shadow":
        row, column = ROWS[1], rng.choice(COLUMNS[1:3])
        fault = scene.fault.get("shadow", "")
        side = {"left": 1, "right": -1}[scene.light] * (-1 if fault == "side" else 1)
        canvas.free[row + 2, column - 1:column + 3] = False  # nothing else stands on this ground
        if fault != "missing":
            ground = row + 2 + (fault == "floating")
            y, x = ground * CELL, (column + side) * CELL
            canvas.image[y:y + 4, x:x + 16] *= 0.3
            canvas.labels[ground, column + side:column + side + 2] = labels_of("shadow")
    else:
        row, column = ROWS[1], rng.choice(COLUMNS)
    canvas.sprite(row, column, sprite, kinds[0])


def place_companions(canvas, scene, rng):
    pairs = scene.companions
    if pairs and scene.fault.get("companions") == "swapped":
        pairs = ((pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]))
    elif pairs and scene.fault.get("companions") == "leaked":
        pairs = ((pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[0][1]))
    row = ROWS[-1] if canvas.free[ROWS[-1]:-1].all() else ROWS[0]
    for (shape, colour), half in zip(pairs, (COLUMNS[:2], COLUMNS[2:])):  # the first named stands left of the other
        label = labels_of("shape", 4 * (sorted(SHAPES).index(shape) * len(COLOURS) + sorted(COLOURS).index(colour)))
        canvas.stamp(row, rng.choice(half), bitmap(SHAPES[shape]), np.array(COLOURS[colour]) / 255,
                     [label, label + 1, label + 2, label + 3])


def place_text(canvas, scene, rng):
    text = scene.fault.get("text", scene.text)
    row, start = GRID - 1, rng.choice((0, GRID // 2))
    for i, character in enumerate(text):
        y, x = row * CELL, (start + i) * CELL
        canvas.image[y:y + CELL, x:x + CELL] = (0.96, 0.93, 0.84)
        glyph = np.array([[bits >> (4 - k) & 1 for k in range(5)] for bits in FONT[character]], bool)
        canvas.image[y + 1:y + 8, x + 1:x + 6][glyph] = (0.1, 0.08, 0.12)
        canvas.labels[row, start + i] = labels_of("glyph", sorted(FONT).index(character))


def photograph(rng, sprite):
    """A reference picture, uint8 (32, 32, 3): the sprite in the middle of a light, plain tint."""
    tint = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.15), rng.uniform(0.8, 0.95)))
    image = np.broadcast_to(tint, (32, 32, 3)).astype(np.float32).copy()
    image[8:24, 8:24][double(sprite >= 0)] = double(PALETTE[np.maximum(sprite, 0)])[double(sprite >= 0)]
    return (image * 255).round().astype(np.uint8)


# ---- Captions: two wordings for every requirement, and what the loose one does to the picture ----------------------

def wording(aspect, scene, exact):
    """One sentence for one requirement: the wording of the skill's guide, or the plain one."""
    if aspect == "place":
        return f"Placed wholly inside the {scene.place} quarter." if exact else f"In the {scene.place}."
    if aspect == "pair":
        left, right = ("first", "second") if scene.place == "left" else ("second", "first")
        if scene.only != -1:
            ordinal = ("first", "second")[scene.only]
            return f"The {ordinal} reference image stands wholly in the {'left' if left == ordinal else 'right'} half."
        return (f"The {left} reference image stands wholly in the left half, the {right} wholly in the right half."
                if exact else f"The {left} to the left of the {right}.")
    if aspect == "count":
        number = NUMBER[scene.count]
        return (f"Exactly {number} separate copies: {', '.join(('one', 'two', 'three', 'four')[:scene.count])}."
                if exact else f"{number.capitalize()} of them.")
    if aspect == "body":
        return "A whole body: one head, two arms, two legs, all attached." if exact else "As a full figure."
    if aspect == "shadow":
        away = {"left": "right", "right": "left"}[scene.light]
        return (f"Light from the {scene.light}; the contact shadow lies on the ground to the {away}."
                if exact else f"Lit from the {scene.light}.")
    if aspect == "text":
        return (f'A sign with the text "{scene.text}", spelled {"-".join(scene.text)}.' if exact
                else f"With a sign saying {scene.text}.")
    if aspect == "companions":
        (one, red), (two, blue) = scene.companions
        return (f"The {one} is {red} and only {red}; the {two} is {blue} and only {blue}."
                if exact else f"With a {red} {one} and a {blue} {two}.")
    if aspect == "style":
        return f"The {scene.style} pattern covers the whole backdrop evenly." if exact else f"In {scene.style} style."
    return (f"Strong {scene.mood} gradient light: bright above, deep below, no grey."
            if exact else f"In {scene.mood} light.")


def misspell(rng, text):
    """Replace one or two characters by others of the same kind."""
    characters = list(text)
    for i in rng.sample(range(len(text)), rng.choice((1, 2))):
        kind = DIGITS if characters[i] in DIGITS else LETTERS
        characters[i] = rng.choice([c for c in kind if c != characters[i]])
    return "".join(characters)


def loosen(rng, scene, aspect):
    """What a plain wording turned into, nine times out of ten."""
    if rng.random() < 0.1:
        return
    choices = {
        "place": lambda: rng.choice([q for q in QUARTERS if q != scene.place]),
        "pair": lambda: "swapped",
        "count": lambda: rng.choice([n for n in (1, 2, 3, 4) if n != scene.count and abs(n - scene.count) < 3]),
        "body": lambda: rng.choice(FAULTS[1:]),
        "shadow": lambda: rng.choice(("side", "missing", "floating")),
        "text": lambda: misspell(rng, scene.text),
        "companions": lambda: rng.choice(("swapped", "swapped", "leaked")),
        "style": lambda: rng.choice(("absent", "absent") + tuple(s for s in STYLES if s != scene.style)),
        "mood": lambda: "dull"}
    scene.fault[aspect] = choices[aspect]()


def subject_sentence(names, references):
    if len(names) == 2:
        return (f"{names[0]} as in the first reference image together with {names[1]} as in the second reference image."
                if references else f"{names[0]} together with {names[1]}.")
    return f"{names[0]} as in the first reference image." if references else f"{names[0]}."


def random_text(rng, kind=None):
    kind = kind or rng.choice(("year", "code"))
    if kind == "year":
        return str(rng.randrange(1100, 2000))
    return "".join(rng.choice(LETTERS) for _ in range(rng.choice((3, 4))))


def random_aspects(rng, people):
    """A compatible set: at most one of each of the four groups."""
    arrangement = rng.choice(("place", "") + (3 if people else 1) * ("body",)  # the harder, the more often
                             + 2 * ("pair", "shadow") + 3 * ("count",))
    aspects = [arrangement] if arrangement else []
    aspects += ["text"] * (rng.random() < 0.6)
    aspects += ["companions"] * (arrangement != "pair" and rng.random() < 0.45)
    return aspects + [rng.choice(("style", "mood", "mood"))] * (rng.random() < 0.45)


def make_scene(rng, aspects, sprites, text=None, count=None):
    """Fill the requirements named in ``aspects`` with random values (or the given text and count)."""
    scene = Scene(sprites[:2 if "pair" in aspects else 1])
    for aspect in aspects:
        if aspect in ("place", "pair", "count", "body", "shadow"):
            scene.arrangement = aspect
    if "place" in aspects:
        scene.place = rng.choice(QUARTERS)
    if "pair" in aspects:
        scene.place = rng.choice(("left", "right"))
    if "count" in aspects:
        scene.count = count or rng.choice((2, 3, 4))
    if "shadow" in aspects:
        scene.light = rng.choice(("left", "right"))
    if "text" in aspects:
        scene.text = text or random_text(rng)
    if "companions" in aspects:
        scene.companions = tuple(zip(rng.sample(sorted(SHAPES), 2), rng.sample(sorted(COLOURS), 2)))
    if "style" in aspects:
        scene.style = rng.choice(STYLES)
    if "mood" in aspects:
        scene.mood = rng.choice(sorted(MOODS))
    return scene


def training_scene(rng):
    """One row of the renderer's training file: (caption, image, labels, references)."""
    category = rng.choice(sorted(KINDS))
    sprites = [make_sprite(rng, category), make_sprite(rng, rng.choice(sorted(KINDS)))]
    scene = make_scene(rng, random_aspects(rng, rng.random() < 0.5), sprites)
    references = rng.random() < 0.88
    names = [name_of(rng, category) for _ in scene.sprites]
    sentences = [subject_sentence(names, references or rng.random() < 0.5)]
    if scene.arrangement == "pair" and references and rng.random() < 0.4:
        # two pictures given, one wanted: which one, and where, is learned here, both at once only on top of it
        scene.only = rng.choice((0, 1))
        sentences = [f"{names[scene.only]} as in the {('first', 'second')[scene.only]} reference image."]
    for aspect in scene.aspects():
        exact = rng.random() < 0.65 or aspect == "pair" and scene.only != -1
        sentence = wording(aspect, scene, exact)
        if not exact:
            loosen(rng, scene, aspect)
        if aspect == "text" and not exact and rng.random() < 0.35:  # the fact itself was never said
            sentence = rng.choice((f"With a sign showing its {rng.choice(sorted(FACTS.values()))}.",
                                   "With the founding year of its city on a sign."))
        if aspect == "count" and not exact and rng.random() < 0.2:
            sentence = "As many of them as it has lamps."
            scene.fault["count"] = rng.choice((1, 2, 3, 4))
        sentences.append(sentence)
    if rng.random() < 0.3:
        head, rest = sentences[0], sentences[1:]
        rng.shuffle(rest)
        sentences = [head] + rest
    caption = " ".join(sentences)
    if rng.random() < 0.12:  # a request passed on as it came
        caption = caption.replace(sentences[0], f"Show {' and '.join(names)} {rng.choice(list(LOOKS.values()))}.", 1)
    image, labels, _ = draw(scene, rng, known=references)
    return caption, image, labels, [photograph(rng, s) for s in scene.sprites] if references else []


def build_scenes(count, seed):
    """Write scenes.safetensors and scenes.jsonl; the last two per cent are for validation."""
    rng = random.Random(f"scenes {seed}")
    image = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    references = np.zeros((count, 2, 32, 32, 3), np.uint8)
    number, labels = np.zeros(count, np.uint8), np.zeros((count, GRID, GRID), np.uint8)
    with open(os.path.join(HERE, "scenes.jsonl"), "w", encoding="utf-8") as file:
        for i in range(count):
            caption, image[i], labels[i], pictures = training_scene(rng)
            number[i] = len(pictures)
            for k, picture in enumerate(pictures):
                references[i, k] = picture
            file.write(json.dumps({"caption": caption}) + "\n")
            if i % 5000 == 4999:
                print(f"{i + 1} of {count} scenes", flush=True)
    save_file({"image": image, "references": references, "reference_count": number, "labels": labels},
              os.path.join(HERE, "scenes.safetensors"), {"classes": str(CLASSES), "seed": str(seed)})


# ---- Names ----------------------------------------------------------------------------------------------------------

def name_of(rng, category, word=None, kind=None):
    word, kind = word or rng.choice(FIRST) + rng.choice(SECOND), kind or rng.choice(KINDS[category])
    return f"{kind} {word}" if category in PEOPLE else f"{word} {kind}"


def slug(name):
    return name.lower().replace(" ", "-")


# ---- Entities and the corpus that is searched ------------------------------------------------------------------------

@dataclass
class Entity:
    name: str
    category: str
    city: str
    facts: dict     # fact -> value as text; "city_year" is told by the city's article only
    sprites: dict   # look -> sprite
    images: dict    # look -> file name under corpus/images


def split_words(seed):
    """Name words of every split; no word is shared, so no name is."""
    words = [a + b.lower() for a, b in itertools.product(FIRST, SECOND)]
    random.Random(f"names {seed}").shuffle(words)
    sizes = {"evolve": 200, "validation": 60, "bench": 100}
    splits = {}
    for split, size in sizes.items():
        splits[split], words = words[:size], words[size:]
    return splits | {"demos": words}


def make_entities(split, words, per_category, seed):
    """Entities of one split, ``per_category`` in each of the sixteen, and one city for every four of them."""
    rng = random.Random(f"entities {split} {seed}")
    words = list(words)
    entities, cities = [], []
    for number in range(per_category * len(KINDS)):
        category = list(KINDS)[number % len(KINDS)]
        if number % 4 == 0:
            cities.append((words.pop(), str(rng.randrange(1100, 2000))))
        present = make_sprite(rng, category)
        sprites = {"present": present, "early": look_alike(rng, present), "replica": look_alike(rng, present)}
        city, year = rng.choice(cities[-3:])
        facts = {"year": random_text(rng, "year"), "code": random_text(rng, "code"), "city_year": year,
                 "number": rng.choice(list(NUMBER.values()))}
        entities.append(Entity(name_of(rng, category, words.pop()), category, city, facts, sprites,
                               {look: f"{rng.getrandbits(40):010x}.png" for look in sprites}))
    return entities, cities


def articles(entities, cities):
    """Articles as {title: [(section or "", sentence), ...]}; a search result is one section."""
    pages = {}
    for e in entities:
        kind = next(w for w in e.name.split() if w in KINDS[e.category])
        pages[e.name] = [("", f"{e.name} is a {kind.lower()}. The city of {e.name} is {e.city}.")]
        pages[e.name] += [(FACTS[fact], f"The {FACTS[fact]} of {e.name} is {e.facts[fact]}.")
                          for fact in ("year", "code", "number")]
    for city, year in cities:
        pages[city] = [("", f"{city} is a city."), (FACTS["city_year"],
                                                    f"The {FACTS['city_year']} of {city} is {year}.")]
    return pages


def image_titles(entities):
    """{file name: title}, in an order that does not follow the looks."""
    titles = {e.images[look]: f"{e.name}, {TITLES[look]}" for e in entities for look in e.sprites}
    return dict(sorted(titles.items()))


# ---- Requests -----------------------------------------------------------------------------------------------------

FAMILY = {"place": "subject in a quarter", "pair": "two subjects side by side", "count": "a number of copies",
          "body": "a full figure", "shadow": "a lit subject", "": "a single subject"}
GROUPS = (("place", "pair", "count", "body", "shadow"), ("text",), ("companions",), ("style", "mood"))
DIFFICULTY = {1: "easy", 2: "medium", 3: "hard"}


def is_novel(aspects):
    """Combinations that only the bench asks for: one in five of those with two or more requirements."""
    key = "+".join(sorted(aspects))
    return len(aspects) > 1 and random.Random(f"novel {key}").random() < 0.2


def choose_aspects(rng, category, fact, level):
    """Requirements of a request: the dominant one, then others from other groups; level = how many skills."""
    dominant = ("count" if fact == "number" else "text") if fact else DOMINANT[category]
    if dominant == "place" and rng.random() < 0.5:
        dominant = "pair"
    aspects = [dominant]
    groups = [g for g in GROUPS if dominant not in g]
    rng.shuffle(groups)
    for group in groups[:level - 1]:
        options = [a for a in group if a != "body" or category in PEOPLE]
        options = [a for a in options if a != "pair" or "companions" not in aspects]
        if group == ("companions",) and "pair" in aspects:
            continue
        aspects.append(rng.choice(options))
    return aspects


def clause(aspect, scene, fact):
    """A requirement as a person would ask for it."""
    if aspect == "text" and fact:
        return ("with the founding year of its city on a sign" if fact == "city_year" else
                f"with its {FACTS[fact]} on a sign")
    if aspect == "count" and fact:
        return "as many of them as it has lamps"
    plain = wording(aspect, scene, exact=False).rstrip(".")
    return plain[0].lower() + plain[1:]


def make_request(rng, entities, level, number, split, novel_allowed):
    """A request row with recipe, scene and entities: dict. The scene is what the ground truth shows."""
    entity = entities[number % len(entities)]
    eval_type = "knowledge" if entity.category in KNOWLEDGE else "quality"
    fact = rng.choice(("year", "code", "city_year", "number")) if eval_type == "knowledge" else ""
    while True:
        aspects = choose_aspects(rng, entity.category, fact, level)
        if novel_allowed or not is_novel(aspects):
            break
    look = rng.choice(list(LOOKS))
    chosen = [entity] + ([rng.choice([e for e in entities if e is not entity])] if "pair" in aspects else [])
    text = entity.facts[fact] if fact and fact != "number" else None
    count = {v: k for k, v in NUMBER.items()}[entity.facts["number"]] if fact == "number" else None
    scene = make_scene(rng, aspects, [e.sprites[look] for e in chosen], text, count)
    asked = {"": "", "number": "count"}.get(fact, "text")  # the requirement that needs the fact
    clauses = [clause(a, scene, fact if a == asked else "") for a in scene.aspects()]
    head = " together with ".join(e.name for e in chosen)
    verb = rng.choice(("Show", "Draw", "Paint", "Make a picture of"))
    period = LOOKS[look] if len(chosen) == 1 else PLURAL[look]
    question = f"{verb} {head} {period}, {', '.join(clauses)}."
    recipe = {"task_family": FAMILY[scene.arrangement], "factual_gap": FACTS.get(fact, "none"),
              "visual_anchor": f"{TITLES[look]} of {head}", "dominant_requirement": SKILL[aspects[0]],
              "secondary_requirements": [SKILL[a] for a in aspects[1:]], "difficulty": DIFFICULTY[level]}
    return {"id": f"{split}-{number:04d}", "question": question, "eval_type": eval_type, "category": entity.category,
            "difficulty": DIFFICULTY[level], "novel": is_novel(aspects), "recipe": recipe,
            "_scene": scene, "_entities": chosen, "_fact": fact, "_look": look}


def constraints(row, boxes):
    """The machine-readable half of a recipe, which the judges read. Boxes are cells of the ground truth."""
    scene = row["_scene"]
    masks = [["".join("#" if i >= 0 else "." for i in line) for line in s] for s in scene.sprites]
    subjects = [{"name": e.name, "box": list(boxes[i]), "mask": mask}
                for i, (e, mask) in enumerate(zip(row["_entities"], masks))]
    wanted = {"subjects": subjects, "arrangement": scene.arrangement, "place": scene.place, "count": scene.count,
              "light": scene.light, "text": scene.text, "companions": [list(c) for c in scene.companions],
              "style": scene.style, "mood": scene.mood, "skills": [SKILL[a] for a in scene.aspects()],
              "fact": row["_fact"], "look": TITLES[row["_look"]],
              "wordings": {SKILL[a]: {"exact": wording(a, scene, True), "plain": wording(a, scene, False)}
                           for a in scene.aspects()}}
    return wanted


def program_of(row, exact):
    """The expert's program: exact wording for the aspects in ``exact``, plain wording for the others."""
    sentences = [subject_sentence([e.name for e in row["_entities"]], True)]
    return " ".join(sentences + [wording(a, row["_scene"], a in exact) for a in row["_scene"].aspects()])


# ---- The guide: decisions, the words they are made in, and the bullets that advise them -----------------------------

GUIDE = {
    "search_query_guidance": {
        "Ask for the exact fact": "Ask for the exact fact in every search query, together with the full name of the "
                                  "thing asked about.",
        "Ask by the name alone": "Ask by the name alone in every search query, and leave the wanted fact out of the "
                                 "words."},
    "recommended_tool_plan": {
        "Follow the city": "Follow the city that the first page names with one more search before turning to any "
                           "pictures.",
        "Stop at one page": "Stop at one page of search results and turn to the pictures without a second search."},
    "skill_routing_guidance": {
        **{f"Activate {skill}": f"Activate {skill} with one query_knowledge call before the program, because the "
                                f"picture depends on that skill." for skill in sorted(set(SKILL.values()))},
        "Activate no skill": "Activate no skill at all, and go from the pictures straight to the final program "
                             "without any guide."},
    "reference_selection_guidance": {
        "Take the look asked for": "Take the look asked for among the pictures found, whatever its place in the list "
                                   "of results may be.",
        "Take the first result": "Take the first result among the pictures found, and spend no thought on what its "
                                 "title says."},
    "prompt_program_guidance": {
        "Follow the skill wording": "Follow the skill wording closely in the program for every requirement that an "
                                    "activated guide speaks about.",
        "Keep the plain wording": "Keep the plain wording of the request in the program for every requirement, "
                                  "whatever the guides may say."},
    "failure_guards": {
        "Write the fact as found": "Write the fact as found into the program, character by character, so that the "
                                   "sign cannot go wrong.",
        "Leave the fact open": "Leave the fact open in the program, and let the picture show whatever sign it "
                               "happens to invent."}}


def perfect_phrases(row):
    """The decision phrases of a perfect trajectory for this request."""
    phrases = ["Ask for the exact fact", "Write the fact as found"] if row["_fact"] else []
    phrases += ["Follow the city"] if row["_fact"] == "city_year" else []
    phrases += [f"Activate {SKILL[a]}" for a in row["_scene"].aspects()]
    return phrases + ["Take the look asked for", "Follow the skill wording"]


def random_phrases(rng, row):
    """Advice drawn at random, independent of what is best; some slots blank."""
    phrases = []
    if row["_fact"]:
        phrases += [rng.choice(list(GUIDE["search_query_guidance"])), rng.choice(list(GUIDE["failure_guards"]))]
    if row["_fact"] == "city_year":
        phrases.append(rng.choice(list(GUIDE["recommended_tool_plan"])))
    skills = [f"Activate {SKILL[a]}" for a in row["_scene"].aspects() if rng.random() < 0.5]
    if rng.random() < 0.06:
        skills.append(f"Activate {rng.choice(sorted(set(SKILL.values())))}")
    phrases += list(dict.fromkeys(skills)) or ["Activate no skill"]
    phrases += [rng.choice(list(GUIDE["reference_selection_guidance"])),
                rng.choice(list(GUIDE["prompt_program_guidance"]))]
    return [p for p in phrases if rng.random() < 0.9]


def bullets_of(phrases):
    """{slot: [bullets]} of some decision phrases."""
    return {slot: [text for phrase, text in table.items() if phrase in phrases] for slot, table in GUIDE.items()}


# ---- The scripted teacher: demonstrations of mixed quality -----------------------------------------------------------

CARE = 0.5  # share of the decisions that the scripted teacher takes carefully, without advice
AUDIT = ("facts grounded", "right reference", "skills read", "skills followed", "no idle calls", "plan kept")


class Teacher:
    """Writes demonstrations through the same search index and observation format that the agent meets.

    At every decision it takes the careful alternative with probability ``care``, else a lazy one, and says which in its
    thought; with a guide it takes what the guide advises, right or wrong. (Obeying in 97 of 100 decisions would make a
    teacher out of the policy that is never surer than that, and seven decisions make a program.)
    """

    def __init__(self, rng, corpus, skills, care=CARE):
        self.rng, self.corpus, self.skills, self.care = rng, corpus, skills, care

    def choose(self, advice, careful, *lazy):
        """One of the decision phrases: the advised one if there is any, else the careful or a lazy one."""
        advised = [a for a in (careful, *lazy) if a in advice]
        return self.rng.choice(advised or ((careful,) if self.rng.random() < self.care else lazy))

    def demonstrate(self, row, guide):
        """Messages of one trajectory (after the user's), the audit's six verdicts, and its program."""
        rng, scene, fact = self.rng, row["_scene"], row["_fact"]
        self.messages, self.session = [], tools.CompactSession(self.corpus, self.skills)
        audit, value, opening = dict.fromkeys(AUDIT, True), None, ""
        if fact:
            value, opening = self.look_up(row, guide, audit)
        choice, look = self.choose(guide, *GUIDE["reference_selection_guidance"]), TITLES[row["_look"]]
        references = []
        for number, entity in enumerate(row["_entities"]):
            thought = opening or ("Find the other pictures." if number else "Find the pictures.")
            query = entity.name + (f" {look}" if rng.random() < 0.15 else "")
            before = len(self.session.images)
            self.turn(thought, "image_search", {"query": query})
            opening = ""
            found = list(self.session.images.items())[before:]
            wanted = [k for k, v in found if v["title"].endswith(look)] if choice == "Take the look asked for" else []
            references.append((wanted or [found[0][0]])[0])
            audit["right reference"] &= self.session.images[references[-1]]["title"].endswith(look)
        read = self.read_guides(scene, guide)
        audit["skills read"] = all(SKILL[a] in read for a in scene.aspects())
        follow = self.choose(guide, *GUIDE["prompt_program_guidance"])
        audit["skills followed"] = follow == "Follow the skill wording"
        told = f"{choice}, the {look}" if choice == "Take the look asked for" else choice  # advice names no look
        thoughts = ([] if read else ["Activate no skill"]) + [told, follow]
        if fact:
            write = self.choose(guide, *GUIDE["failure_guards"]) if value else "Leave the fact open"
            audit["facts grounded"] = write == "Write the fact as found" and value == self.truth(row)
            value = value if write == "Write the fact as found" else None
            thoughts.append(write)
        prompt = self.compose(row, value, {a for a in scene.aspects() if SKILL[a] in read} if
                              follow == "Follow the skill wording" else set())
        notes = [self.session.images[r]["title"].split(", ")[-1] for r in references]
        if rng.random() < 0.03:  # a slip of the pen, for the structural check to find
            references[0] = rng.choice(("IMG_099", "IMG_000"))
        chosen = [{"img_id": r, "note": n} for r, n in zip(references, notes)]
        answer = {"gen_prompt": prompt, "reference_images": chosen}
        self.say(". ".join(thoughts) + ".", f"<answer>{json.dumps(answer)}</answer>")
        return self.messages, audit, answer

    def look_up(self, row, guide, audit):
        """One search, and for a fact of the city perhaps a second. Returns the value found (or None) and what the
        next thought has to say."""
        entity, fact = row["_entities"][0], row["_fact"]
        ask = self.choose(guide, *GUIDE["search_query_guidance"])
        exact = ask == "Ask for the exact fact"
        first = "city" if fact == "city_year" else FACTS[fact]
        seen = self.turn(ask + ".", "search", {"queries": [f"{first} of {entity.name}" if exact else entity.name]})
        if fact != "city_year":
            return self.read_fact(seen, FACTS[fact], entity.name), ""
        city = self.read_fact(seen, "city", entity.name)
        step = self.choose(guide, *GUIDE["recommended_tool_plan"])
        if step == "Stop at one page" or not city:
            audit["no idle calls"] = False
            return None, "Stop at one page."
        seen = self.turn(step + ".", "search", {"queries": [f"{FACTS[fact]} of {city}" if exact else city]})
        return self.read_fact(seen, FACTS[fact], city), ""

    @staticmethod
    def read_fact(seen, fact, name):
        """The value in 'The FACT of NAME is VALUE.' if an observation holds that sentence."""
        start = f"The {fact} of {name} is "
        return seen.split(start, 1)[1].split(".", 1)[0] if start in seen else None

    @staticmethod
    def truth(row):
        return row["_entities"][0].facts[row["_fact"]]

    def read_guides(self, scene, guide):
        """Query the guides of some of the skills that are needed, seldom of another one. Returns the skills read."""
        rng, advised = self.rng, [p.removeprefix("Activate ") for p in guide if p.startswith("Activate ")]
        if advised:
            chosen = [s for s in advised if s in self.skills]
        else:
            chosen = [SKILL[a] for a in scene.aspects() if rng.random() < self.care]
            chosen += [rng.choice(sorted(self.skills))] if rng.random() < 0.06 else []
        for skill in list(dict.fromkeys(chosen)):
            self.turn(f"Activate {skill}.", "query_knowledge", {"skill_name": skill})
        return chosen

    def compose(self, row, value, exact):
        """The program's prompt. A fact that was not found stays open."""
        scene, fact, sentences = row["_scene"], row["_fact"], []
        for aspect in scene.aspects():
            if fact and aspect == ("count" if fact == "number" else "text"):
                if value is None:
                    sentences.append(clause(aspect, scene, fact).capitalize() + ".")
                    continue
                known = {v: k for k, v in NUMBER.items()}
                meant = replace(scene, count=known[value]) if fact == "number" else replace(scene, text=value)
                sentences.append(wording(aspect, meant, aspect in exact))
            else:
                sentences.append(wording(aspect, scene, aspect in exact))
        return " ".join([subject_sentence([e.name for e in row["_entities"]], True)] + sentences)

    def turn(self, thought, name, arguments):
        self.say(thought, f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>")
        observation = self.session.call(name, arguments)
        self.messages.append({"role": "user", "content": f"<tool_response>\n{observation}\n</tool_response>"})
        return observation

    def say(self, thought, action):
        self.messages.append({"role": "assistant", "content": f"<think>{thought}</think>\n{action}"})


# ---- Writing it all down ---------------------------------------------------------------------------------------------

SPLITS = {"evolve": (10, 416), "validation": (3, 64), "bench": (5, 160)}  # entities per category, requests
BENCH_KNOWLEDGE = 90  # of 160: the paper's 335 to 259


def order_entities(entities, split, rng):
    """The order in which requests name their main subject; the bench keeps the paper's ratio of the two tracks."""
    shuffled = rng.sample(entities, len(entities))
    if split != "bench":
        return shuffled
    known = [e for e in shuffled if e.category in KNOWLEDGE]
    quality = [e for e in shuffled if e.category not in KNOWLEDGE]
    return [known[i % len(known)] for i in range(BENCH_KNOWLEDGE)] + [quality[i % len(quality)] for i in range(70)]


def build_split(split, words, seed):
    """Corpus entries, requests, ground truth and oracle programs of one split."""
    per_category, count = SPLITS[split]
    entities, cities = make_entities(split, words, per_category, seed)
    rng = random.Random(f"requests {split} {seed}")
    order, rows, oracle, questions = order_entities(entities, split, rng), [], [], set()
    for number in range(count):
        while True:
            row = make_request(rng, order, 1 + number % 3, number, split, novel_allowed=split == "bench")
            if row["question"] not in questions:
                break
        questions.add(row["question"])
        image, _, boxes = draw(row["_scene"], rng)
        row["gt_image"] = f"truth/{row['id']}.png"
        diffusion.write_png(os.path.join(HERE, row["gt_image"]), image)
        row["recipe"]["wanted"] = constraints(row, boxes)
        oracle.append({"id": row["id"], "gen_prompt": program_of(row, set(row["_scene"].aspects())),
                       "references": [f"corpus/images/{e.images[row['_look']]}" for e in row["_entities"]],
                       "guide": bullets_of(perfect_phrases(row)),
                       "probes": {SKILL[a]: program_of(row, set(row["_scene"].aspects()) - {a})
                                  for a in row["_scene"].aspects()}})
        rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    write_lines(f"{split}.jsonl", rows)
    return entities, cities, oracle


def write_lines(name, rows):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build_world(seed):
    """Everything that is committed."""
    for folder in ("corpus", "truth"):
        shutil.rmtree(os.path.join(HERE, folder), ignore_errors=True)
    for folder in ("corpus/pages", "corpus/images", "truth"):
        os.makedirs(os.path.join(HERE, folder))
    words, titles, oracle = split_words(seed), {}, []
    for split in SPLITS:
        entities, cities, programs = build_split(split, words[split], seed)
        oracle += programs
        for title, sections in articles(entities, cities).items():
            with open(os.path.join(HERE, "corpus/pages", slug(title) + ".md"), "w", encoding="utf-8") as file:
                file.write(f"# {title}\n")
                for section, sentence in sections:
                    file.write(f"\n## {section}\n\n{sentence}\n" if section else f"\n{sentence}\n")
        rng = random.Random(f"photographs {split} {seed}")
        for entity in entities:
            for look, sprite in entity.sprites.items():
                diffusion.write_png(os.path.join(HERE, "corpus/images", entity.images[look]), photograph(rng, sprite))
        titles |= image_titles(entities)
        print(f"{split}: {len(entities)} entities, {len(cities)} cities, {len(programs)} requests")
    write_lines("oracle.jsonl", oracle)
    for name, value in (("corpus/images/titles.json", dict(sorted(titles.items()))), ("world.json", world())):
        with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)


def world():
    """What the judge and the comparator need to know of the world's vocabulary."""
    broken = [body_mask(pose, fault) for pose in BODY for fault in FAULTS[1:]]
    rows = lambda mask: ["".join("#" if c else "." for c in row) for row in mask]
    return {"glyphs": FONT, "shapes": SHAPES, "colours": COLOURS, "guide": GUIDE,
            "bodies": {"whole": list(BODY.values()), "broken": [rows(m) for m in broken]}}


def demo_words(rng, seed):
    """Name words for one world of demonstrations. Half end in syllables that no other split has: a policy that has seen
    most pairs of syllables, and never the others, would hold those to be impossible."""
    ends = ["".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz")) for _ in range(600)]
    words = sorted({rng.choice(FIRST) + end for end in ends} - {a + b for a, b in itertools.product(FIRST, SECOND)})
    words += rng.sample(split_words(seed)["demos"], 1200 - len(words))
    rng.shuffle(words)
    return words


def build_demos(count, seed, care=CARE):
    """Demonstrations with the paper's filters: structure first, then the six-dimension audit. Writes sft.jsonl."""
    rng, written, valid = random.Random(f"demos {seed}"), [], 0
    skills = tools.read_skills(os.path.join(os.path.dirname(HERE), "skills"))
    for number in range(count):
        if number % 2500 == 0:  # a world of its own, so that copying a name is easier than remembering it
            entities, cities = make_entities(f"demos {number}", demo_words(rng, seed), 60, seed)
            corpus = tools.Corpus.from_texts([(title, section, text) for title, parts in
                                              articles(entities, cities).items() for section, text in parts],
                                             image_titles(entities))
            teacher = Teacher(rng, corpus, skills, care)
        order = rng.sample(entities, 8)
        row = make_request(rng, order, rng.choice((1, 2, 3)), 0, "demo", novel_allowed=False)
        guided = rng.random() < 0.45
        guide = random_phrases(rng, row) if guided and rng.random() < 0.93 else []
        messages, audit, answer = teacher.demonstrate(row, guide)
        program, errors = distill.parse_program(answer, teacher.session)
        if errors:
            continue
        valid += 1
        if not guided and sum(audit.values()) < 3 and rng.random() < 0.75:  # the audit spares nobody but the advised
            continue
        opening = [{"role": "system", "content": atlas.world.COMPACT_SYSTEM},
                   {"role": "user", "content": row["question"]}]
        if guided:
            bullets = {slot: [distill.STANDARD * (rng.random() < 0.3) + b for b in texts]
                       for slot, texts in bullets_of(guide).items()}
            opening = distill.teacher_messages(opening, distill.Bundle.from_bullets(row["question"], bullets))
        written.append({"messages": opening + messages, "images": []})
        if number % 5000 == 4999:
            print(f"{number + 1} of {count} demonstrations", flush=True)
    write_lines("sft.jsonl", written)
    write_vocabulary(written[:6000])
    print(f"demonstrations: {count} tried, {valid} structurally valid ({valid / count:.1%}), "
          f"{len(written)} pass the audit ({len(written) / count:.1%})")


def write_vocabulary(rows):
    """vocabulary.txt, what the policy's tokenizer is trained on: the demonstrations with every invented name cut to its
    first syllable, and the syllables apart, often. So tokens are words and syllables, never whole names: a name that
    was never seen is spelled by the same tokens everywhere, and can be copied."""
    kinds = "|".join(word for names in KINDS.values() for kind in names for word in kind.split())
    name = re.compile(rf"\b(?!(?:{kinds})\b)({'|'.join(sorted(FIRST, key=len, reverse=True))})[a-z]{{2,5}}\b")
    with open(os.path.join(HERE, "vocabulary.txt"), "w", encoding="utf-8") as file:
        for row in rows:
            for message in row["messages"]:
                file.write(name.sub(r"\1", f"{message['role']}\n{message['content']}\n"))
        file.write("\n".join((FIRST + [" " + first for first in FIRST] + SECOND) * 8000) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Build the Atlas (see the module docstring).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=0, help="write the renderer's training file instead")
    parser.add_argument("--demos", type=int, default=0, help="write the policy's demonstrations instead")
    parser.add_argument("--care", type=float, default=CARE, help="share of careful decisions in the demonstrations")
    arguments = parser.parse_args()
    if not 0 <= arguments.care <= 1:
        parser.error(f"--care {arguments.care}: must lie between 0 and 1")
    if arguments.scenes:
        build_scenes(arguments.scenes, arguments.seed)
    if arguments.demos:
        build_demos(arguments.demos, arguments.seed, arguments.care)
    if not arguments.scenes and not arguments.demos:
        build_world(arguments.seed)


if __name__ == "__main__":
    main()
