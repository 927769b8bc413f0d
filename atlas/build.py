"""The Atlas: an invented world, small enough to rebuild from one seed, built so that nothing in it can be guessed.

    python -m atlas.build                    corpus, requests, ground truth, oracle programs (all committed)
    python -m atlas.build --scenes 40000     pictures and captions that the renderer is trained on
    python -m atlas.build --demos 30000      tool-use demonstrations that the policy is cold-started on

What was designed into it, so that nobody mistakes it for a discovery:

1. A subject's look is a random 8x8 sprite. Words cannot convey it; it has to be copied from a reference image, and
   every subject has three pictures (present look, early look, replica) of which a request wants one.
2. A fact (a year, a code word, a number) is random too; it stands in one section of one article, or two hops away.
3. Captions come in two wordings. A *plain* wording ("three of them") was drawn wrongly nine times out of ten, as web
   captions are loose; the *exact* wording of a skill guide ("Exactly three separate copies: one, two, three.") was
   drawn exactly. The renderer learns this from pictures; no weakness is coded into it.
4. What a caption leaves open stays open: position inside a quarter, backdrop, sign, pose, where companions stand.
5. The scripted teacher decides at random between the expert's and a lazy alternative, about equally often, or, with
   --expert-rate 0.1, as the expert once in ten times: then what is right is rare. In 45 % of the demonstrations it
   carries a guide and obeys it, right or wrong: that is how a policy without any pretraining learns to read advice.
   Half of their names have syllables of their own, so that a name has to be copied and cannot be remembered.
6. One in five combinations of requirements occurs only on the bench.

Contents, in reading order:
    make_sprite, look_alike   subjects, and others that are easily taken for them
    Scene, draw               what a picture shows, and how it is drawn
    wording, corrupt          two wordings for every requirement, and what the plain one does to a picture
    training_scene            one row of the renderer's training file
    make_entities, articles   the subjects of a split, and what can be found about them
    make_request              a request with its recipe; constraints: what the judges read of it
    GUIDE                     every decision: its phrases, and the bullets that advise them
    Teacher                   the scripted teacher: demonstrations of mixed quality
    Machine room              splits, files, command line

A picture is 64 x 64 pixels = 8 x 8 cells; subjects, bodies and companions take 2 x 2 cells, a glyph takes one. All
randomness comes from ``random.Random`` streams that are named by what they are for and by the seed.
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

import atlas.world
import diffusion
import distill
import model
import tools
from atlas.judge import CELL, GRID, NUMBER, OPPOSITE, SIZE, bitmap, glyph_bitmap, style_waves

HERE = os.path.dirname(os.path.abspath(__file__))
ROWS, COLUMNS = (1, 3, 5), (0, 2, 4, 6)  # cells where things of 2 x 2 cells may stand; signs take row 7


# ---- Vocabulary of the world -----------------------------------------------------------------------------------------

FONT_ART = {  # 5 x 7 pixels; letters that are easily confused (B I O Q S Z D G) are left out
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "F": "##### #.... #.... ####. #.... #.... #....",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "N": "#...# ##..# #.#.# #..## #...# #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "V": "#...# #...# #...# #...# #...# .#.#. ..#..",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ..##. .#... #.... #####",
    "3": "##### ....# ...#. ..##. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. .#... .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##.."}


def row_numbers(art):
    """Rows of '#' and '.' -> one binary number a row, the form of a glyph in world.json."""
    digits = art.replace("#", "1").replace(".", "0")
    return tuple(int(row, 2) for row in digits.split())


FONT = {character: row_numbers(art) for character, art in FONT_ART.items()}
LETTERS, DIGITS = "ACEFHJKLMNPRTUVWXY", "0123456789"

INK = {  # sprites are drawn in three of these
    "red": (200, 45, 45), "orange": (240, 140, 40),
    "yellow": (245, 215, 70), "green": (50, 150, 70),
    "teal": (30, 160, 165), "blue": (45, 80, 190),
    "purple": (130, 60, 165), "white": (245, 245, 245),
    "dark": (40, 35, 45)}
PALETTE = np.array(list(INK.values()), dtype=np.float32) / 255
COLOURS = {name: INK[name] for name in ("red", "yellow", "green", "blue", "purple")}  # of companions
SHAPES = {  # companions, 8 x 8, drawn at double size
    "ball": "..####.. .######. ######## ######## ######## ######## .######. ..####..".split(),
    "cube": ["########"] * 8,
    "cone": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########".split(),
    "ring": ".######. ######## ##....## ##....## ##....## ##....## ######## .######.".split(),
    "cross": "..####.. ..####.. ######## ######## ######## ######## ..####.. ..####..".split()}
BODY = {  # pose of the arms -> what stands below a head sprite
    "down": ".######. #.####.# #.####.# #.####.# ..####.. ..#..#.. ..#..#.. .##..##.".split(),
    "up": "#..##..# ######## ..####.. ..####.. ..####.. ..#..#.. ..#..#.. .##..##.".split()}
FAULTS = ("", "no left arm", "no right arm", "one leg", "three legs", "four arms")
BODY_INK = ((30, 35, 75), (75, 25, 35), (25, 60, 40), (45, 40, 45))
STYLES = ("mosaic", "woven", "banded")  # backdrop patterns with a period of eight pixels
MOODS = {  # colours above and below
    "warm": ((252, 206, 150), (190, 98, 86)),
    "cool": ((190, 226, 246), (78, 126, 178))}
QUARTERS = ("upper left", "upper right", "lower left", "lower right")

HALF_MASKS = {  # left halves of 8 x 8 silhouettes, one per category
    "architecture": "...# ..## .### #### .### .### .### ####",
    "city_streets": "..## .### ..## ...# ...# ..## .### ####",
    "public_figures": "..## .### .### #### #### .### .### ..##",
    "products": "...# ..## ..## .### #### #### #### .###",
    "vehicles": ".### #### #### #### #### #### .##. .##.",
    "events": "...# .### #### #### #### .### ..## ...#",
    "science": "..## ...# ..## .### #### #### #### .###",
    "artifacts": ".### ..## .### #### #### #### .### ..##",
    "text_layout": "#### #### #### #### #### #### ...# ...#",
    "spatial": "..## .### #### #### .### ...# ...# ..##",
    "counting": "...# ..## #### #### #### #### ..## ...#",
    "anatomy": ".### #### #### #### #### #### .### ..##",
    "attributes": "#.## #### .### .### .### .### #### ####",
    "material": "..## ..## .### .### ..## ..## #### ####",
    "aesthetics": "...# ..## ..## .### .### #### #### ####",
    "creative": "#..# #### #### #### #### .### .### ..##"}
KINDS = {
    "architecture": ("Bridge", "Tower", "Hall"), "city_streets": ("Square", "Lane", "Market"),
    "public_figures": ("Captain", "Poet", "Singer"), "products": ("Kettle", "Radio", "Clock"),
    "vehicles": ("Tram", "Ferry", "Glider"), "events": ("Festival", "Regatta", "Fair"),
    "science": ("Comet", "Beetle", "Crystal"), "artifacts": ("Vase", "Mask", "Crown"),
    "text_layout": ("Poster", "Banner", "Label"), "spatial": ("Garden", "Harbour", "Terrace"),
    "counting": ("Lantern", "Kite", "Drum"), "anatomy": ("Dancer", "Juggler", "Acrobat"),
    "attributes": ("Teapot", "Scarf", "Puppet"), "material": ("Statue", "Boulder", "Sundial"),
    "aesthetics": ("Orchard", "Lagoon", "Dune"), "creative": ("Owl", "Fox", "Heron")}
KNOWLEDGE = tuple(KINDS)[:8]  # categories of the Knowledge-Anchored track; the others are Quality-Anchored
PEOPLE = ("public_figures", "anatomy")  # the categories whose subjects have a body

FIRST = ("Vel Mar Or Tan Bel Kor Sil Dra Fen Gal Har Jor Lum Mor Nal Per Quil Ros Ser Tor Ul Vor Wen Yar Zel Ard Bru "
         "Cal Dor Em Fal Gor Hel Im Kel Lor Mel Nor Pol Rin").split()
SECOND = ("mar ton vin dra len sor ric bel nor tis gan dell mere wick lan ros fen dor vale rin cas mund bra tel ham "
          "lith quen sta vor zan bor dash fell gard holm kin low moor ness pool").split()

LOOKS = {"present": "as it looks today", "early": "as it looked in its early days"}
PLURAL = {"present": "as they look today", "early": "as they looked in their early days"}
TITLES = {"present": "present look", "early": "early look", "replica": "replica"}
FACTS = {"year": "opening year", "code": "code word", "city_year": "founding year", "number": "number of lamps"}

ARRANGEMENTS = ("place", "pair", "count", "body", "shadow")
GROUPS = (ARRANGEMENTS, ("text",), ("companions",), ("style", "mood"))  # a request has at most one aspect of each
SKILL = {
    "place": "spatial_layout", "pair": "spatial_layout", "count": "quantity_counting", "body": "anatomy_body_coherence",
    "shadow": "physical_material_consistency", "text": "text_rendering", "companions": "attribute_binding",
    "style": "creative_drawing", "mood": "aesthetic_drawing"}
DOMINANT = {
    "text_layout": "text", "spatial": "place", "counting": "count", "anatomy": "body",
    "attributes": "companions", "material": "shadow", "aesthetics": "mood", "creative": "style"}
FAMILY = {
    "place": "subject in a quarter", "pair": "two subjects side by side", "count": "a number of copies",
    "body": "a full figure", "shadow": "a lit subject", "": "a single subject"}
DIFFICULTY = {1: "easy", 2: "medium", 3: "hard"}


# ---- Sprites ---------------------------------------------------------------------------------------------------------

def make_sprite(rng, category):
    """A mirrored 8x8 sprite: int8 (8, 8), -1 transparent, otherwise an index into INK. The outline has one colour."""
    half = bitmap(HALF_MASKS[category].split())                                             # (8, 4)
    for _ in range(2):  # two free cells, so that a silhouette alone does not tell the subject
        row, column = rng.randrange(8), rng.randrange(3)
        half[row, column] = True
    mask = mirror(half)                                                                     # (8, 8)

    padded = np.pad(mask, 1)
    vertical = padded[:-2, 1:-1] & padded[2:, 1:-1]
    horizontal = padded[1:-1, :-2] & padded[1:-1, 2:]
    inner = mask & vertical & horizontal

    outline, rare, common = rng.sample(range(len(INK)), 3)
    pattern = [rng.choice((rare, common, common)) for _ in range(32)]
    filled = np.where(inner, mirror(np.reshape(pattern, (8, 4))), outline)
    return np.where(mask, filled, -1).astype(np.int8)


def look_alike(rng, sprite):
    """The same silhouette in other colours: at least half of its cells differ visibly."""
    visible = sprite >= 0
    while True:
        inks = rng.sample(range(len(INK)), 3)
        other = sprite.copy()
        for number, ink in enumerate(np.unique(sprite[visible])):
            other[sprite == ink] = inks[number % 3]

        changed = [rng.random() < 0.3 for _ in range(32)]
        other[visible & mirror(np.reshape(changed, (8, 4)))] = inks[0]
        if (other != sprite)[visible].mean() >= 0.5:
            return other


def mirror(half):
    """(8, 4) -> (8, 8), symmetric about the middle."""
    return np.concatenate([half, half[:, ::-1]], axis=1)


def double(array):
    """Each element becomes 2 x 2."""
    return array.repeat(2, axis=0).repeat(2, axis=1)


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
        mask[3, [0, 1, 6, 7]] = True
    return mask


# ---- Scenes: what a picture shows, and how it is drawn ---------------------------------------------------------------

@dataclass
class Scene:
    """What is meant to be seen. Everything that is not said here is left to chance."""
    sprites: list                # one or two int8 (8, 8)
    arrangement: str = ""        # "" or one of ARRANGEMENTS
    quarter: str = ""            # of arrangement "place"
    side: str = ""               # of a pair: "left" if the first stands left, else "right"
    only: int = -1               # of a pair, the one that is shown; -1: both
    count: int = 1
    light: str = ""              # "left" or "right": where the light comes from
    text: str = ""
    companions: tuple = ()       # ((shape, colour), (shape, colour))
    style: str = ""
    mood: str = ""
    fault: dict = field(default_factory=dict)  # what a corrupted picture gets wrong: aspect -> how

    def aspects(self):
        """The requirements that a skill speaks of, in the order of the caption."""
        arrangement = [self.arrangement] if self.arrangement else []
        others = ("text", "companions", "style", "mood")
        return arrangement + [aspect for aspect in others if getattr(self, aspect)]


# Classes of the cells, for the renderer's auxiliary loss: the first class of every kind. Things of 2 x 2 cells have
# four classes, one a cell; a subject that no reference picture shows has one for all, because its look is unknown.
LABELS = {"backdrop": 0, "first": 1, "second": 5, "unknown": 9, "shadow": 10, "glyph": 11}
LABELS["shape"] = LABELS["glyph"] + len(FONT)
LABELS["body"] = LABELS["shape"] + 4 * len(SHAPES) * len(COLOURS)
CLASSES = LABELS["body"] + 4 * len(BODY) * len(FAULTS)


class Canvas:
    """A picture under construction: pixels, cell classes, and which cells are taken."""

    def __init__(self, image):
        self.image = image                                 # float32 (64, 64, 3), 0..1
        self.labels = np.zeros((GRID, GRID), np.uint8)
        self.free = np.ones((GRID, GRID), bool)
        self.free[0] = self.free[-1] = False  # the last row belongs to signs, the first stays empty
        self.boxes = []                       # (row, column) in cells of every subject sprite drawn

    def draw_mask(self, row, column, mask, colours, labels):
        """Draw an 8x8 mask at double size at a cell; colours (3,) or (8, 8, 3); labels: classes of its 2 x 2 cells."""
        y, x = row * CELL, column * CELL
        area = self.image[y:y + 2 * CELL, x:x + 2 * CELL]                                   # (16, 16, 3)
        colours = double(np.broadcast_to(colours, (8, 8, 3)))
        area[double(mask)] = colours[double(mask)]
        cells = slice(row, row + 2), slice(column, column + 2)
        self.labels[cells] = np.reshape(labels, (2, 2))
        self.free[cells] = False

    def draw_sprite(self, row, column, sprite, kind):
        """Draw a subject; kind: "first", "second" or "unknown"."""
        labels = [LABELS["unknown"]] * 4 if kind == "unknown" else four_labels(LABELS[kind])
        colours = PALETTE[np.maximum(sprite, 0)]                                            # (8, 8, 3)
        self.draw_mask(row, column, sprite >= 0, colours, labels)
        self.boxes.append((row, column))


def four_labels(first):
    """Classes of the 2 x 2 cells of one thing."""
    return [first, first + 1, first + 2, first + 3]


def draw(scene, rng, known=True):
    """Render a scene exactly (or with its faults). Returns image uint8 (64, 64, 3), labels uint8 (8, 8), boxes.

    known: whether reference pictures show the subjects (see LABELS).
    """
    canvas = Canvas(backdrop(rng, scene))
    place_subjects(canvas, scene, rng, known)
    place_companions(canvas, scene, rng)
    place_text(canvas, scene, rng)
    image = (canvas.image.clip(0, 1) * 255).round().astype(np.uint8)
    return image, canvas.labels, canvas.boxes


def backdrop(rng, scene):
    """Smooth vertical gradient, float32 (64, 64, 3) in 0..1, and the style's pattern on it."""
    top, bottom = backdrop_colours(rng, scene)
    weight = np.linspace(0, 1, SIZE)[:, None, None]                                         # (64, 1, 1)
    gradient = top * (1 - weight) + bottom * weight                                         # (64, 1, 3)
    image = np.broadcast_to(gradient, (SIZE, SIZE, 3)).astype(np.float32, order="C")

    style = scene.fault.get("style", scene.style)
    if style in STYLES:  # a fault may be "absent"
        wave = style_waves(SIZE)[style][..., None]                                          # (64, 64, 1), 0 or 1
        image *= (1 + 0.14 * (2 * wave - 1)).astype(np.float32)
    return image


def backdrop_colours(rng, scene):
    """(top, bottom) in 0..1; hue and strength are free unless a mood is asked for."""
    if scene.fault.get("mood") == "dull":
        grey = np.array([rng.uniform(0.62, 0.8)] * 3)
        return grey, grey
    if scene.mood:
        above, below = np.array(MOODS[scene.mood]) / 255
        return above + rng.uniform(-0.02, 0.02), below + rng.uniform(-0.02, 0.02)
    hue, saturation = rng.random(), rng.uniform(0.06, 0.26)
    value, slope = rng.uniform(0.7, 0.88), rng.uniform(0, 0.06)
    top = colorsys.hsv_to_rgb(hue, saturation, value + slope)
    bottom = colorsys.hsv_to_rgb(hue, saturation, value - slope)
    return np.array(top), np.array(bottom)


def place_subjects(canvas, scene, rng, known):
    """Draw the subject or subjects, and what their arrangement adds: a body or a shadow."""
    kinds = ("first", "second") if known else ("unknown", "unknown")
    if scene.arrangement == "pair":
        place_pair(canvas, scene, rng, kinds)
    elif scene.arrangement == "count":
        place_copies(canvas, scene, rng, kinds[0])
    else:
        if scene.arrangement == "place":
            row, column = place_in_quarter(scene, rng)
        elif scene.arrangement == "body":
            row, column = place_body(canvas, scene, rng)
        elif scene.arrangement == "shadow":
            row, column = place_shadow(canvas, scene, rng)
        else:
            row, column = ROWS[1], rng.choice(COLUMNS)
        canvas.draw_sprite(row, column, scene.sprites[0], kinds[0])


def place_pair(canvas, scene, rng, kinds):
    """Two subjects in the two halves, or one of them in its half."""
    side = OPPOSITE[scene.side] if scene.fault.get("pair") else scene.side
    order = (0, 1) if side == "left" else (1, 0)  # from left to right
    for index, half in zip(order, (0, GRID // 2)):
        if scene.only in (-1, index):
            column = half + rng.choice((0, 2))
            canvas.draw_sprite(ROWS[1], column, scene.sprites[index], kinds[index])
    if scene.only == -1:
        canvas.boxes = [canvas.boxes[i] for i in order]  # back into the order of the subjects


def place_copies(canvas, scene, rng, kind):
    """Copies of one subject, side by side."""
    count = scene.fault.get("count", scene.count)
    start = rng.choice(COLUMNS[:5 - count])
    for i in range(count):
        canvas.draw_sprite(ROWS[1], start + 2 * i, scene.sprites[0], kind)


def place_in_quarter(scene, rng):
    """(row, column) of the subject, somewhere in its quarter."""
    quarter = scene.fault.get("place", scene.quarter)
    row = ROWS[0] if "upper" in quarter else ROWS[-1]
    half = 0 if "left" in quarter else GRID // 2
    return row, half + rng.choice((0, 2))


def place_body(canvas, scene, rng):
    """Draw a body in a random pose; (row, column) of the head above it."""
    row, column = ROWS[1], rng.choice(COLUMNS[1:3])
    pose, fault = rng.choice(sorted(BODY)), scene.fault.get("body", "")
    colour = np.array(rng.choice(BODY_INK)) / 255
    number = sorted(BODY).index(pose) * len(FAULTS) + FAULTS.index(fault)
    labels = four_labels(LABELS["body"] + 4 * number)
    canvas.draw_mask(row + 2, column, body_mask(pose, fault), colour, labels)
    return row, column


def place_shadow(canvas, scene, rng):
    """Draw the contact shadow, one cell to the side away from the light; (row, column) of the subject above it."""
    row, column = ROWS[1], rng.choice(COLUMNS[1:3])
    fault = scene.fault.get("shadow", "")
    canvas.free[row + 2, column - 1:column + 3] = False  # nothing else stands on this ground
    if fault != "missing":
        away = OPPOSITE[scene.light] if fault != "side" else scene.light
        left = column + (1 if away == "right" else -1)
        ground = row + 3 if fault == "floating" else row + 2
        y, x = ground * CELL, left * CELL
        canvas.image[y:y + CELL // 2, x:x + 2 * CELL] *= 0.3
        canvas.labels[ground, left:left + 2] = LABELS["shadow"]
    return row, column


def place_companions(canvas, scene, rng):
    """Draw the two companions, the first named to the left of the other, in a row that is free."""
    if not scene.companions:
        return
    (one, one_colour), (two, two_colour) = scene.companions
    fault = scene.fault.get("companions")
    if fault == "swapped":
        one_colour, two_colour = two_colour, one_colour
    elif fault == "leaked":
        two_colour = one_colour

    is_free = canvas.free[ROWS[-1]:-1].all()
    row = ROWS[-1] if is_free else ROWS[0]
    place_companion(canvas, row, rng.choice(COLUMNS[:2]), one, one_colour)
    place_companion(canvas, row, rng.choice(COLUMNS[2:]), two, two_colour)


def place_companion(canvas, row, column, shape, colour):
    """Draw one companion at a cell."""
    number = sorted(SHAPES).index(shape) * len(COLOURS) + sorted(COLOURS).index(colour)
    labels = four_labels(LABELS["shape"] + 4 * number)
    rgb = np.array(COLOURS[colour]) / 255
    canvas.draw_mask(row, column, bitmap(SHAPES[shape]), rgb, labels)


def place_text(canvas, scene, rng):
    """Write the sign, one glyph a cell, dark on light, into the last row."""
    row, start = GRID - 1, rng.choice((0, GRID // 2))
    for i, character in enumerate(scene.fault.get("text", scene.text)):
        y, x = row * CELL, (start + i) * CELL
        canvas.image[y:y + CELL, x:x + CELL] = (0.96, 0.93, 0.84)
        ink = canvas.image[y + 1:y + 8, x + 1:x + 6]                                        # (7, 5, 3)
        ink[glyph_bitmap(FONT[character])] = (0.1, 0.08, 0.12)
        canvas.labels[row, start + i] = LABELS["glyph"] + sorted(FONT).index(character)


def reference_image(rng, sprite):
    """A reference picture, uint8 (32, 32, 3): the sprite in the middle of a light, plain tint."""
    hue = rng.random()
    saturation, value = rng.uniform(0, 0.15), rng.uniform(0.8, 0.95)
    tint = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    image = np.broadcast_to(tint, (32, 32, 3)).astype(np.float32, order="C")
    mask = double(sprite >= 0)                                                              # (16, 16)
    colours = double(PALETTE[np.maximum(sprite, 0)])                                        # (16, 16, 3)
    image[8:24, 8:24][mask] = colours[mask]
    return (image * 255).round().astype(np.uint8)


# ---- Captions: two wordings for every requirement, and what the plain one does to the picture ------------------------

def wording(aspect, scene, exact):
    """One sentence for one requirement: the wording of the skill's guide, or the plain one."""
    if aspect == "pair" and scene.only != -1:
        ordinal = ("first", "second")[scene.only]
        half = scene.side if scene.only == 0 else OPPOSITE[scene.side]
        return f"The {ordinal} reference image stands wholly in the {half} half."
    return exact_wording(aspect, scene) if exact else plain_wording(aspect, scene)


def exact_wording(aspect, scene):
    """What the skill's guide says to write."""
    if aspect == "place":
        return f"Placed wholly inside the {scene.quarter} quarter."
    if aspect == "pair":
        left, right = left_and_right(scene)
        return f"The {left} reference image stands wholly in the left half, the {right} wholly in the right half."
    if aspect == "count":
        numbers = ", ".join(("one", "two", "three", "four")[:scene.count])
        return f"Exactly {NUMBER[scene.count]} separate copies: {numbers}."
    if aspect == "body":
        return "A whole body: one head, two arms, two legs, all attached."
    if aspect == "shadow":
        away = OPPOSITE[scene.light]
        return f"Light from the {scene.light}; the contact shadow lies on the ground to the {away}."

    if aspect == "text":
        return f'A sign with the text "{scene.text}", spelled {"-".join(scene.text)}.'
    if aspect == "companions":
        (one, red), (two, blue) = scene.companions
        return f"The {one} is {red} and only {red}; the {two} is {blue} and only {blue}."
    if aspect == "style":
        return f"The {scene.style} pattern covers the whole backdrop evenly."
    return f"Strong {scene.mood} gradient light: bright above, deep below, no grey."


def plain_wording(aspect, scene):
    """What a person would write."""
    if aspect == "place":
        return f"In the {scene.quarter}."
    if aspect == "pair":
        left, right = left_and_right(scene)
        return f"The {left} to the left of the {right}."
    if aspect == "count":
        return f"{NUMBER[scene.count].capitalize()} of them."
    if aspect == "body":
        return "As a full figure."
    if aspect == "shadow":
        return f"Lit from the {scene.light}."

    if aspect == "text":
        return f"With a sign saying {scene.text}."
    if aspect == "companions":
        (one, red), (two, blue) = scene.companions
        return f"With a {red} {one} and a {blue} {two}."
    if aspect == "style":
        return f"In {scene.style} style."
    return f"In {scene.mood} light."


def left_and_right(scene):
    """The ordinals of a pair's references, from left to right."""
    return ("first", "second") if scene.side == "left" else ("second", "first")


def subject_sentence(names, references):
    """The sentence that opens a caption: the subjects, and whether reference images show them."""
    if not references:
        return f"{' together with '.join(names)}."
    if len(names) == 1:
        return f"{names[0]} as in the first reference image."
    return f"{names[0]} as in the first reference image together with {names[1]} as in the second reference image."


def corrupt(rng, scene, aspect):
    """What a plain wording turns into, nine times out of ten: a fault of the scene."""
    if rng.random() < 0.1:
        return
    scene.fault[aspect] = random_fault(rng, scene, aspect)


def random_fault(rng, scene, aspect):
    """One way to get a requirement wrong, as image generators do."""
    if aspect == "place":
        return rng.choice([quarter for quarter in QUARTERS if quarter != scene.quarter])
    if aspect == "pair":
        return "swapped"
    if aspect == "count":
        near = [count for count in (1, 2, 3, 4) if 0 < abs(count - scene.count) < 3]
        return rng.choice(near)
    if aspect == "body":
        return rng.choice(FAULTS[1:])
    if aspect == "shadow":
        return rng.choice(("side", "missing", "floating"))

    if aspect == "text":
        return misspell(rng, scene.text)
    if aspect == "companions":
        return rng.choice(("swapped", "swapped", "leaked"))
    if aspect == "style":
        others = tuple(style for style in STYLES if style != scene.style)
        return rng.choice(("absent", "absent") + others)
    return "dull"


def misspell(rng, text):
    """Replace one or two characters by others of the same kind."""
    characters = list(text)
    n_wrong = rng.choice((1, 2))
    for i in rng.sample(range(len(text)), n_wrong):
        kind = DIGITS if characters[i] in DIGITS else LETTERS
        characters[i] = rng.choice([other for other in kind if other != characters[i]])
    return "".join(characters)


# ---- Random scenes, and the renderer's training pictures -------------------------------------------------------------

def random_text(rng, kind=None):
    """A year, or a code word of three or four letters."""
    kind = kind or rng.choice(("year", "code"))
    if kind == "year":
        return str(rng.randrange(1100, 2000))
    length = rng.choice((3, 4))
    return "".join(rng.choice(LETTERS) for _ in range(length))


def random_aspects(rng, people):
    """A compatible set of requirements: at most one of each of the four groups, the harder ones more often."""
    bodies = ("body",) * (3 if people else 1)
    arrangement = rng.choice(("place", "") + bodies + ("pair", "shadow") * 2 + ("count",) * 3)
    aspects = [arrangement] if arrangement else []
    if rng.random() < 0.6:
        aspects.append("text")
    if arrangement != "pair" and rng.random() < 0.45:  # a pair leaves no room for companions
        aspects.append("companions")
    last = rng.choice(("style", "mood", "mood"))
    return aspects + [last] * (rng.random() < 0.45)


def make_scene(rng, aspects, sprites, text=None, count=None):
    """Fill the requirements named in ``aspects`` with random values (or the given text and count)."""
    scene = Scene(sprites[:2 if "pair" in aspects else 1])
    for aspect in aspects:
        if aspect in ARRANGEMENTS:
            scene.arrangement = aspect

    if "place" in aspects:
        scene.quarter = rng.choice(QUARTERS)
    if "pair" in aspects:
        scene.side = rng.choice(("left", "right"))
    if "count" in aspects:
        scene.count = count or rng.choice((2, 3, 4))
    if "shadow" in aspects:
        scene.light = rng.choice(("left", "right"))

    if "text" in aspects:
        scene.text = text or random_text(rng)
    if "companions" in aspects:
        shapes = rng.sample(sorted(SHAPES), 2)
        colours = rng.sample(sorted(COLOURS), 2)
        scene.companions = tuple(zip(shapes, colours))
    if "style" in aspects:
        scene.style = rng.choice(STYLES)
    if "mood" in aspects:
        scene.mood = rng.choice(sorted(MOODS))
    return scene


def training_scene(rng):
    """One row of the renderer's training file: (caption, image, labels, reference pictures)."""
    category = rng.choice(sorted(KINDS))
    sprite = make_sprite(rng, category)
    other = make_sprite(rng, rng.choice(sorted(KINDS)))
    people = rng.random() < 0.5
    scene = make_scene(rng, random_aspects(rng, people), [sprite, other])
    references = rng.random() < 0.88

    caption = training_caption(rng, scene, category, references)
    image, labels, _ = draw(scene, rng, known=references)
    pictures = [reference_image(rng, sprite) for sprite in scene.sprites] if references else []
    return caption, image, labels, pictures


def training_caption(rng, scene, category, references):
    """A caption for a scene. Where its wording is plain, the scene is given faults: the picture does not follow it."""
    names = [name_of(rng, category) for _ in scene.sprites]
    subject = subject_sentence(names, references or rng.random() < 0.5)
    if scene.arrangement == "pair" and references and rng.random() < 0.4:
        # two pictures given, one wanted: which one, and where, is learned here; both at once only on top of it
        scene.only = rng.choice((0, 1))
        ordinal = ("first", "second")[scene.only]
        subject = f"{names[scene.only]} as in the {ordinal} reference image."

    sentences = [training_sentence(rng, scene, aspect) for aspect in scene.aspects()]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    if rng.random() < 0.12:  # a request passed on as it came
        look = rng.choice(list(LOOKS.values()))
        subject = f"Show {' and '.join(names)} {look}."
    return " ".join([subject] + sentences)


def training_sentence(rng, scene, aspect):
    """The sentence for one requirement; a plain one corrupts the scene."""
    if rng.random() < 0.65 or (aspect == "pair" and scene.only != -1):
        return wording(aspect, scene, exact=True)
    sentence = wording(aspect, scene, exact=False)
    corrupt(rng, scene, aspect)

    # sometimes the fact itself is not said: the renderer can only guess it
    if aspect == "text" and rng.random() < 0.35:
        fact = rng.choice(sorted(FACTS.values()))
        return rng.choice((f"With a sign showing its {fact}.", "With the founding year of its city on a sign."))
    if aspect == "count" and rng.random() < 0.2:
        scene.fault["count"] = rng.choice((1, 2, 3, 4))
        return "As many of them as it has lamps."
    return sentence


# ---- Entities and the corpus that is searched ------------------------------------------------------------------------

@dataclass
class Entity:
    """A subject that requests name."""
    name: str
    category: str
    city: str
    facts: dict     # fact -> value as text; "city_year" stands in the city's article only
    sprites: dict   # look -> sprite
    images: dict    # look -> file name under corpus/images


def name_of(rng, category, word=None):
    """A name: an invented word, and one of the category's kinds."""
    word = word or rng.choice(FIRST) + rng.choice(SECOND)
    kind = rng.choice(KINDS[category])
    return f"{kind} {word}" if category in PEOPLE else f"{word} {kind}"


def split_words(seed):
    """Name words of every split: {split: [word]}; no word is shared, so no name is.

    The words of demonstrations are the same for every seed: a cold-started policy has met no name of any world.
    """
    words = [first + second for first, second in itertools.product(FIRST, SECOND)]
    random.Random("names 0").shuffle(words)
    held_out, demos = words[:360], words[360:]
    if seed:  # world 0 has the order at hand
        random.Random(f"names {seed}").shuffle(held_out)
    return {"evolve": held_out[:200], "validation": held_out[200:260], "bench": held_out[260:], "demos": demos}


def make_entities(split, words, per_category, seed):
    """([Entity], [(city, founding year)]) of one split: ``per_category`` entities in each of the sixteen categories,
    and one city for every four of them."""
    rng, words = random.Random(f"entities {split} {seed}"), list(words)
    entities, cities = [], []
    for number in range(per_category * len(KINDS)):
        category = list(KINDS)[number % len(KINDS)]
        if number % 4 == 0:
            cities.append((words.pop(), random_text(rng, "year")))

        present = make_sprite(rng, category)
        sprites = {"present": present,
                   "early": look_alike(rng, present),
                   "replica": look_alike(rng, present)}
        city, city_year = rng.choice(cities[-3:])
        facts = {"year": random_text(rng, "year"),
                 "code": random_text(rng, "code"),
                 "city_year": city_year,
                 "number": rng.choice(list(NUMBER.values()))}
        name = name_of(rng, category, words.pop())
        images = {look: f"{rng.getrandbits(40):010x}.png" for look in sprites}
        entities.append(Entity(name, category, city, facts, sprites, images))
    return entities, cities


def articles(entities, cities):
    """Articles as {title: [(section or "", sentence), ...]}; a search result is one section."""
    pages = {}
    for entity in entities:
        name = entity.name
        kind = next(word for word in name.split() if word in KINDS[entity.category])
        pages[name] = [("", f"{name} is a {kind.lower()}. The city of {name} is {entity.city}.")]
        for fact in ("year", "code", "number"):
            sentence = fact_sentence(fact, name, entity.facts[fact])
            pages[name].append((FACTS[fact], sentence))
    for city, year in cities:
        sentence = fact_sentence("city_year", city, year)
        pages[city] = [("", f"{city} is a city."), (FACTS["city_year"], sentence)]
    return pages


def fact_sentence(fact, name, value):
    """How an article states a fact; ``Teacher.read_fact`` reads it back."""
    return f"The {FACTS[fact]} of {name} is {value}."


def image_titles(entities):
    """{file name: title}, in an order that does not follow the looks."""
    titles = {entity.images[look]: f"{entity.name}, {TITLES[look]}" for entity in entities for look in entity.sprites}
    return dict(sorted(titles.items()))


# ---- Requests --------------------------------------------------------------------------------------------------------

def is_novel(aspects):
    """Combinations that only the bench asks for: one in five of those with two or more requirements."""
    key = "+".join(sorted(aspects))
    return len(aspects) > 1 and random.Random(f"novel {key}").random() < 0.2


def choose_aspects(rng, category, fact, level):
    """Requirements of a request: the dominant one, then others from other groups; level = how many skills."""
    if fact:
        dominant = "count" if fact == "number" else "text"
    else:
        dominant = DOMINANT[category]
    if dominant == "place" and rng.random() < 0.5:
        dominant = "pair"

    aspects = [dominant]
    groups = [group for group in GROUPS if dominant not in group]
    rng.shuffle(groups)
    for group in groups[:level - 1]:
        options = list(group)
        if "body" in options and category not in PEOPLE:
            options.remove("body")
        if "pair" in options and "companions" in aspects:
            options.remove("pair")
        if group == ("companions",) and "pair" in aspects:
            continue
        aspects.append(rng.choice(options))
    return aspects


def clause(aspect, scene, fact):
    """A requirement as a person would ask for it. fact: what stands in for the text or the number, or ""."""
    if aspect == "text" and fact == "city_year":
        return "with the founding year of its city on a sign"
    if aspect == "text" and fact:
        return f"with its {FACTS[fact]} on a sign"
    if aspect == "count" and fact:
        return "as many of them as it has lamps"
    plain = wording(aspect, scene, exact=False).rstrip(".")
    return plain[0].lower() + plain[1:]


def make_request(rng, entities, level, number, split, novel_allowed):
    """A request: its row with the recipe, and under "_scene", "_entities", "_fact", "_look" what it was made from.

    The scene is what the ground truth shows. level: 1, 2 or 3 requirements; number: of the row, it picks the subject.
    """
    entity = entities[number % len(entities)]
    eval_type = "knowledge" if entity.category in KNOWLEDGE else "quality"
    fact = rng.choice(("year", "code", "city_year", "number")) if eval_type == "knowledge" else ""
    while True:
        aspects = choose_aspects(rng, entity.category, fact, level)
        if novel_allowed or not is_novel(aspects):
            break

    look, chosen = rng.choice(list(LOOKS)), [entity]
    if "pair" in aspects:
        chosen.append(rng.choice([other for other in entities if other is not entity]))
    text = count = None
    if fact == "number":
        count = number_of(entity.facts["number"])
    elif fact:
        text = entity.facts[fact]
    scene = make_scene(rng, aspects, [e.sprites[look] for e in chosen], text, count)

    recipe = {"task_family": FAMILY[scene.arrangement],
              "factual_gap": FACTS.get(fact, "none"),
              "visual_anchor": f"{TITLES[look]} of {joined_names(chosen)}",
              "dominant_requirement": SKILL[aspects[0]],
              "secondary_requirements": [SKILL[aspect] for aspect in aspects[1:]],
              "difficulty": DIFFICULTY[level]}
    row = {"id": f"{split}-{number:04d}",
           "question": question_of(rng, scene, chosen, fact, look),
           "eval_type": eval_type,
           "category": entity.category,
           "difficulty": DIFFICULTY[level],
           "novel": is_novel(aspects),
           "recipe": recipe}
    return row | {"_scene": scene, "_entities": chosen, "_fact": fact, "_look": look}


def question_of(rng, scene, entities, fact, look):
    """The request's text, in which a fact stays unsaid."""
    clauses = []
    for aspect in scene.aspects():
        is_asked = aspect == aspect_of(fact)
        clauses.append(clause(aspect, scene, fact if is_asked else ""))
    verb = rng.choice(("Show", "Draw", "Paint", "Make a picture of"))
    period = LOOKS[look] if len(entities) == 1 else PLURAL[look]
    return f"{verb} {joined_names(entities)} {period}, {', '.join(clauses)}."


def aspect_of(fact):
    """The requirement that needs the fact: the number of copies, or the text on the sign."""
    return {"": "", "number": "count"}.get(fact, "text")


def number_of(word):
    """The number that a word of NUMBER names."""
    return next(number for number, name in NUMBER.items() if name == word)


def joined_names(entities):
    return " together with ".join(entity.name for entity in entities)


def constraints(row, boxes):
    """The machine-readable half of a recipe, which the judges read. boxes: the subjects' cells in the ground truth."""
    scene = row["_scene"]
    subjects = []
    for entity, sprite, box in zip(row["_entities"], scene.sprites, boxes):
        mask = text_rows(sprite >= 0)
        subjects.append({"name": entity.name, "box": list(box), "mask": mask})
    wordings = {}
    for aspect in scene.aspects():
        wordings[SKILL[aspect]] = {"exact": wording(aspect, scene, exact=True),
                                   "plain": wording(aspect, scene, exact=False)}
    return {"subjects": subjects,
            "arrangement": scene.arrangement,
            "place": scene.quarter or scene.side,
            "count": scene.count,
            "light": scene.light,
            "text": scene.text,
            "companions": [list(pair) for pair in scene.companions],
            "style": scene.style,
            "mood": scene.mood,
            "skills": list(wordings),
            "fact": row["_fact"],
            "look": TITLES[row["_look"]],
            "wordings": wordings}


def text_rows(mask):
    """The inverse of ``bitmap``: one text of '#' and '.' a row."""
    return ["".join("#" if filled else "." for filled in row) for row in mask]


def program_of(row, exact):
    """The expert's program: exact wording for the aspects in ``exact``, plain wording for the others."""
    scene = row["_scene"]
    sentences = [subject_sentence([entity.name for entity in row["_entities"]], references=True)]
    sentences += [wording(aspect, scene, aspect in exact) for aspect in scene.aspects()]
    return " ".join(sentences)


# ---- The guide: decisions, the words they are made in, and the bullets that advise them ------------------------------

GUIDE = {  # field of a bundle -> {decision phrase: bullet}; the expert's phrase stands first
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
    phrases = []
    if row["_fact"]:
        phrases += ["Ask for the exact fact", "Write the fact as found"]
    if row["_fact"] == "city_year":
        phrases.append("Follow the city")
    phrases += [f"Activate {SKILL[aspect]}" for aspect in row["_scene"].aspects()]
    return phrases + ["Take the look asked for", "Follow the skill wording"]


def random_phrases(rng, row):
    """Advice drawn at random, independent of what is best; some decisions go without."""
    phrases = []
    if row["_fact"]:
        phrases.append(rng.choice(list(GUIDE["search_query_guidance"])))
        phrases.append(rng.choice(list(GUIDE["failure_guards"])))
    if row["_fact"] == "city_year":
        phrases.append(rng.choice(list(GUIDE["recommended_tool_plan"])))

    skills = [f"Activate {SKILL[aspect]}" for aspect in row["_scene"].aspects() if rng.random() < 0.5]
    if rng.random() < 0.06:
        skills.append(f"Activate {rng.choice(sorted(set(SKILL.values())))}")
    phrases += list(dict.fromkeys(skills)) or ["Activate no skill"]

    phrases.append(rng.choice(list(GUIDE["reference_selection_guidance"])))
    phrases.append(rng.choice(list(GUIDE["prompt_program_guidance"])))
    return [phrase for phrase in phrases if rng.random() < 0.9]


def bullets_of(phrases):
    """{field: [bullets]} of some decision phrases."""
    bullets = {}
    for name, table in GUIDE.items():
        bullets[name] = [bullet for phrase, bullet in table.items() if phrase in phrases]
    return bullets


# ---- The scripted teacher: demonstrations of mixed quality -----------------------------------------------------------

EXPERT_RATE = 0.5  # share of the decisions, made without advice, in which the scripted teacher acts as the expert
AUDIT = ("facts grounded", "right reference", "skills read", "skills followed", "no idle calls", "plan kept")


class Teacher:
    """Writes demonstrations through the same search index and observation format that the agent meets.

    At every decision it takes the expert's alternative with probability ``expert_rate``, else a lazy one, and says
    which in its thought. With a guide it always takes what the guide advises, right or wrong: if it obeyed in 97 of
    100 decisions only, a policy trained on it would never follow a guide more surely, and a program takes about seven.
    """

    def __init__(self, rng, corpus, skills, expert_rate=EXPERT_RATE):
        self.rng, self.corpus, self.skills, self.expert_rate = rng, corpus, skills, expert_rate

    def choose(self, guide, expert, *lazy):
        """One of the decision phrases: the advised one if there is any, else the expert's or a lazy one."""
        options = [phrase for phrase in (expert, *lazy) if phrase in guide]
        if not options:
            options = (expert,) if self.rng.random() < self.expert_rate else lazy
        return self.rng.choice(options)

    def demonstrate(self, row, guide):
        """One trajectory for a request. guide: decision phrases that are advised.

        Returns (messages after the user's, {dimension of AUDIT: whether it passes}, the answer).
        """
        self.messages, self.session = [], tools.CompactSession(self.corpus, self.skills)
        scene, fact, look = row["_scene"], row["_fact"], TITLES[row["_look"]]
        audit = dict.fromkeys(AUDIT, True)

        # search, if the request leaves a fact unsaid
        value, thought = None, ""
        if fact:
            value, thought, audit["no idle calls"] = self.look_up(row, guide)

        # a reference picture of each subject
        selection = self.choose(guide, *GUIDE["reference_selection_guidance"])
        references = self.find_references(row, selection, thought)
        audit["right reference"] = all(self.has_look(img_id, look) for img_id in references)

        # the guides of the skills
        read = self.read_guides(scene, guide)
        needed = {SKILL[aspect] for aspect in scene.aspects()}
        audit["skills read"] = needed <= set(read)

        # the program: in whose wording, and with the fact or without
        follow = self.choose(guide, *GUIDE["prompt_program_guidance"])
        audit["skills followed"] = follow == "Follow the skill wording"
        guard = "Leave the fact open" if fact else ""
        if value:
            guard = self.choose(guide, *GUIDE["failure_guards"])
        states_fact = guard == "Write the fact as found"
        if fact:
            audit["facts grounded"] = states_fact and value == row["_entities"][0].facts[fact]
        prompt = self.compose(row, value if states_fact else None, read if audit["skills followed"] else [])
        answer = self.write_answer(prompt, references)

        # the last thought names the look, which advice never does
        said = f"{selection}, the {look}" if selection == "Take the look asked for" else selection
        thoughts = [] if read else ["Activate no skill"]
        thoughts += [said, follow, guard] if guard else [said, follow]
        self.say(". ".join(thoughts) + ".", f"<answer>{json.dumps(answer)}</answer>")
        return self.messages, audit, answer

    def look_up(self, row, guide):
        """One search, and for a fact of the city perhaps a second.

        Returns (the value found or None, what the next thought has to say, whether every needed search was made).
        """
        name, fact = row["_entities"][0].name, row["_fact"]
        query_style = self.choose(guide, *GUIDE["search_query_guidance"])
        is_exact = query_style == "Ask for the exact fact"
        wanted = "city" if fact == "city_year" else FACTS[fact]
        query = f"{wanted} of {name}" if is_exact else name
        observation = self.turn(query_style + ".", "search", {"queries": [query]})
        found = self.read_fact(observation, wanted, name)
        if fact != "city_year":
            return found, "", True

        # the city is known: its article names the year
        plan = self.choose(guide, *GUIDE["recommended_tool_plan"])
        if plan == "Stop at one page" or not found:
            return None, "Stop at one page.", False
        query = f"{FACTS[fact]} of {found}" if is_exact else found
        observation = self.turn(plan + ".", "search", {"queries": [query]})
        return self.read_fact(observation, FACTS[fact], found), "", True

    @staticmethod
    def read_fact(observation, fact, name):
        """The value in 'The FACT of NAME is VALUE.' if an observation holds that sentence."""
        _, is_there, rest = observation.partition(f"The {fact} of {name} is ")
        return rest.partition(".")[0] if is_there else None

    def find_references(self, row, selection, thought):
        """One image search a subject: the img_id chosen for each. thought: of the first search, if it has a reason."""
        look, references = TITLES[row["_look"]], []
        for number, entity in enumerate(row["_entities"]):
            default = "Find the other pictures." if number else "Find the pictures."
            names_look = self.rng.random() < 0.15
            query = f"{entity.name} {look}" if names_look else entity.name
            n_seen = len(self.session.images)
            self.turn(thought or default, "image_search", {"query": query})
            thought = ""

            found = list(self.session.images)[n_seen:]
            right = [img_id for img_id in found if self.has_look(img_id, look)]
            if right and selection == "Take the look asked for":
                references.append(right[0])
            else:
                references.append(found[0])
        return references

    def has_look(self, img_id, look):
        """Whether the title of a picture found names the look."""
        return self.session.images[img_id]["title"].endswith(look)

    def read_guides(self, scene, guide):
        """Query the guides of some of the skills that are needed, seldom of another one. Returns the skills read."""
        advised = [phrase.removeprefix("Activate ") for phrase in guide if phrase.startswith("Activate ")]
        if advised:
            chosen = [skill for skill in advised if skill in self.skills]
        else:
            needed = [SKILL[aspect] for aspect in scene.aspects()]
            chosen = [skill for skill in needed if self.rng.random() < self.expert_rate]
            if self.rng.random() < 0.06:
                chosen.append(self.rng.choice(sorted(self.skills)))
        for skill in dict.fromkeys(chosen):
            self.turn(f"Activate {skill}.", "query_knowledge", {"skill_name": skill})
        return chosen

    def compose(self, row, value, followed):
        """The program's prompt, exact where a skill is followed. A fact that is not stated (None) stays open."""
        scene, fact = row["_scene"], row["_fact"]
        sentences = [subject_sentence([entity.name for entity in row["_entities"]], references=True)]
        for aspect in scene.aspects():
            exact = SKILL[aspect] in followed
            if aspect != aspect_of(fact):
                sentences.append(wording(aspect, scene, exact))
            elif value is None:
                sentences.append(clause(aspect, scene, fact).capitalize() + ".")
            else:
                found = {"count": number_of(value)} if aspect == "count" else {"text": value}
                sentences.append(wording(aspect, replace(scene, **found), exact))
        return " ".join(sentences)

    def write_answer(self, prompt, references):
        """The program as the policy writes it, seldom with a slip that the structural check finds."""
        chosen = []
        for img_id in references:
            title = self.session.images[img_id]["title"]
            chosen.append({"img_id": img_id, "note": title.split(", ")[-1]})
        if self.rng.random() < 0.03:
            chosen[0]["img_id"] = self.rng.choice(("IMG_099", "IMG_000"))
        return {"gen_prompt": prompt, "reference_images": chosen}

    def turn(self, thought, name, arguments):
        """A turn that calls a tool; returns the observation."""
        self.say(thought, f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>")
        observation = self.session.call(name, arguments)
        self.messages.append({"role": "user", "content": f"<tool_response>\n{observation}\n</tool_response>"})
        return observation

    def say(self, thought, action):
        """The assistant's message."""
        self.messages.append({"role": "assistant", "content": f"<think>{thought}</think>\n{action}"})


# ==== Machine room ====================================================================================================

SPLITS = {"evolve": (10, 416), "validation": (3, 64), "bench": (5, 160)}  # entities per category, requests
BENCH_KNOWLEDGE = 90  # of 160: the paper's 335 to 259
SKILLS = os.path.join(os.path.dirname(HERE), "skills")


# ---- Everything that is committed ------------------------------------------------------------------------------------

def build_world(seed, folder=HERE, novel=0):
    """Write corpus, requests, ground truth, oracle programs and vocabulary to a folder.

    novel: so many requests more, novel.jsonl, about the bench's subjects, all with combinations that are never trained.
    """
    for name in ("corpus", "truth"):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for name in ("corpus/pages", "corpus/images", "truth"):
        os.makedirs(os.path.join(folder, name))

    words, titles, oracle = split_words(seed), {}, []
    for split in SPLITS:
        per_category, count = SPLITS[split]
        entities, cities = make_entities(split, words[split], per_category, seed)
        requests = {split: split_requests(entities, split, count, seed)}
        if split == "bench" and novel:
            requests["novel"] = novel_requests(entities, novel, seed)
        for name, rows in requests.items():
            oracle += [oracle_of(row) for row in rows]
            write_requests(rows, os.path.join(folder, f"{name}.jsonl"))

        titles |= image_titles(entities)
        write_articles(articles(entities, cities), folder)
        write_images(entities, random.Random(f"photographs {split} {seed}"), folder)
        total = sum(map(len, requests.values()))
        print(f"{split}: {len(entities)} entities, {len(cities)} cities, {total} requests")
    model.write_lines(os.path.join(folder, "oracle.jsonl"), oracle)
    write_table(os.path.join(folder, "corpus/images/titles.json"), dict(sorted(titles.items())))
    write_table(os.path.join(folder, "world.json"), vocabulary())


def split_requests(entities, split, count, seed):
    """The requests of a split; their ground truth is under "_image"."""
    rng = random.Random(f"requests {split} {seed}")
    order = order_entities(entities, split, rng)
    return unlike_requests(count, rng, lambda number: make_request(rng, order, 1 + number % 3, number, split,
                                                                   novel_allowed=split == "bench"))


def novel_requests(entities, count, seed):
    """Requests for two or three things at once, each a combination that no demonstration and no training request has.

    Another subject is drawn with every try: some kinds of subject have few such combinations.
    """
    rng = random.Random(f"requests novel {seed}")

    def make(number):
        order = rng.sample(entities, len(entities))
        row = make_request(rng, order, 2 + number % 2, number, "novel", novel_allowed=True)
        return row if row["novel"] else make(number)
    return unlike_requests(count, rng, make)


def unlike_requests(count, rng, make):
    """``count`` requests of make(number), no question twice, each with its ground truth and what the judges read."""
    rows, questions = [], set()
    for number in range(count):
        while True:
            row = make(number)
            if row["question"] not in questions:
                break
        questions.add(row["question"])

        row["_image"], _, boxes = draw(row["_scene"], rng)
        row["gt_image"] = f"truth/{row['id']}.png"
        row["recipe"]["wanted"] = constraints(row, boxes)
        rows.append(row)
    return rows


def write_requests(rows, path):
    """A split's .jsonl file, and the ground truth of its rows beside it."""
    for row in rows:
        diffusion.write_png(os.path.join(os.path.dirname(path), row["gt_image"]), row["_image"])
    model.write_lines(path, [{name: value for name, value in row.items() if name[0] != "_"} for row in rows])


def order_entities(entities, split, rng):
    """The order in which requests name their main subject; the bench keeps the paper's ratio of the two tracks."""
    shuffled = rng.sample(entities, len(entities))
    if split != "bench":
        return shuffled
    knowledge = [entity for entity in shuffled if entity.category in KNOWLEDGE]
    quality = [entity for entity in shuffled if entity.category not in KNOWLEDGE]
    _, count = SPLITS["bench"]
    return (list(itertools.islice(itertools.cycle(knowledge), BENCH_KNOWLEDGE))
            + list(itertools.islice(itertools.cycle(quality), count - BENCH_KNOWLEDGE)))


def oracle_of(row):
    """What is right for a request: program, reference pictures, advice; and the program with one skill left out each
    ("probes")."""
    aspects = row["_scene"].aspects()
    probes = {SKILL[aspect]: program_of(row, exact=set(aspects) - {aspect}) for aspect in aspects}
    return {"id": row["id"],
            "gen_prompt": program_of(row, exact=aspects),
            "references": [f"corpus/images/{entity.images[row['_look']]}" for entity in row["_entities"]],
            "guide": bullets_of(perfect_phrases(row)),
            "probes": probes}


def vocabulary():
    """What the judge and the comparison need to know of the world: world.json."""
    broken = [text_rows(body_mask(pose, fault)) for pose in BODY for fault in FAULTS[1:]]
    return {"glyphs": FONT, "shapes": SHAPES, "colours": COLOURS, "guide": GUIDE,
            "bodies": {"whole": list(BODY.values()), "broken": broken}}


def write_articles(pages, folder):
    """Markdown files of the corpus, one an article."""
    for title, sections in pages.items():
        name = title.lower().replace(" ", "-") + ".md"
        path = os.path.join(folder, "corpus/pages", name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"# {title}\n")
            for section, sentence in sections:
                heading = f"## {section}\n\n" if section else ""
                file.write(f"\n{heading}{sentence}\n")


def write_images(entities, rng, folder):
    """The reference pictures of the corpus."""
    for entity in entities:
        for look, sprite in entity.sprites.items():
            path = os.path.join(folder, "corpus/images", entity.images[look])
            diffusion.write_png(path, reference_image(rng, sprite))


def write_table(path, value):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)


# ---- Training files --------------------------------------------------------------------------------------------------

def build_scenes(count, seed):
    """Write scenes.safetensors and scenes.jsonl; the last two per cent are for validation."""
    rng = random.Random(f"scenes {seed}")
    image = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    labels = np.zeros((count, GRID, GRID), np.uint8)
    references = np.zeros((count, 2, 32, 32, 3), np.uint8)
    reference_count = np.zeros(count, np.uint8)

    captions = []
    for i in range(count):
        caption, image[i], labels[i], pictures = training_scene(rng)
        captions.append({"caption": caption})
        reference_count[i] = len(pictures)
        for k, picture in enumerate(pictures):
            references[i, k] = picture
        if i % 5000 == 4999:
            print(f"{i + 1} of {count} scenes", flush=True)
    model.write_lines(os.path.join(HERE, "scenes.jsonl"), captions)
    tensors = {"image": image, "references": references, "reference_count": reference_count, "labels": labels}
    metadata = {"classes": str(CLASSES), "seed": str(seed)}
    save_file(tensors, os.path.join(HERE, "scenes.safetensors"), metadata)


def build_demos(count, seed, expert_rate=EXPERT_RATE):
    """Demonstrations with the paper's filters: structure first, then the six-dimension audit. Writes sft.jsonl."""
    rng, written, n_valid = random.Random(f"demos {seed}"), [], 0
    for number in range(count):
        if number % 2500 == 0:  # a world of its own, so that copying a name is easier than remembering it
            entities, teacher = demo_world(rng, number, seed, expert_rate)
        if number % 5000 == 4999:
            print(f"{number + 1} of {count} demonstrations", flush=True)

        row, guide = demo_request(rng, entities)
        messages, audit, answer = teacher.demonstrate(row, guide or [])
        _, errors = tools.parse_program(answer, teacher.session)
        if errors:
            continue
        n_valid += 1
        # the audit drops most of what fails four of six; a guide that was obeyed is kept, right or wrong
        if guide is None and sum(audit.values()) < 3 and rng.random() < 0.75:
            continue
        written.append({"messages": demo_opening(rng, row, guide) + messages, "images": []})

    model.write_lines(os.path.join(HERE, "sft.jsonl"), written)
    write_vocabulary(written[:6000])
    print(f"demonstrations: {count} tried, {n_valid} structurally valid ({n_valid / count:.1%}), "
          f"{len(written)} pass the audit ({len(written) / count:.1%})")


def demo_world(rng, number, seed, expert_rate):
    """(entities, a Teacher who searches their corpus)."""
    entities, cities = make_entities(f"demos {number}", demo_words(rng, seed), 60, seed)
    pages = []
    for title, sections in articles(entities, cities).items():
        pages += [(title, section, text) for section, text in sections]
    corpus = tools.Corpus.from_texts(pages, image_titles(entities))
    return entities, Teacher(rng, corpus, tools.read_skills(SKILLS), expert_rate)


def demo_words(rng, seed):
    """Name words for one world of demonstrations. Half end in syllables that no other split has: a policy that has seen
    most pairs of syllables, and never the others, would hold those to be impossible."""
    syllables = [random_syllable(rng) for _ in range(600)]
    known = {first + second for first, second in itertools.product(FIRST, SECOND)}
    words = sorted({rng.choice(FIRST) + syllable for syllable in syllables} - known)
    words += rng.sample(split_words(seed)["demos"], 1200 - len(words))
    rng.shuffle(words)
    return words


def random_syllable(rng):
    """Consonant, vowel, consonant."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    return rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants)


def demo_request(rng, entities):
    """(request, guide): the guide is None, or for 45 % of the requests a list of advised phrases, sometimes empty."""
    chosen = rng.sample(entities, 8)
    level = rng.choice((1, 2, 3))
    row = make_request(rng, chosen, level, 0, "demo", novel_allowed=False)
    if rng.random() >= 0.45:
        return row, None
    return row, random_phrases(rng, row) if rng.random() < 0.93 else []


def demo_opening(rng, row, guide):
    """System prompt and request, the guide in its place."""
    messages = [{"role": "system", "content": atlas.world.COMPACT_SYSTEM},
                {"role": "user", "content": row["question"]}]
    if guide is None:
        return messages
    bullets = {}
    for name, texts in bullets_of(guide).items():  # real bundles mark what best and worst had in common
        bullets[name] = [distill.STANDARD + text if rng.random() < 0.3 else text for text in texts]
    bundle = distill.Bundle.from_bullets(row["question"], bullets)
    return distill.teacher_messages(messages, bundle)


def write_vocabulary(rows):
    """vocabulary.txt, what the policy's tokenizer is trained on: the demonstrations with every invented name cut to its
    first syllable, and the syllables apart, often. So tokens are words and syllables, never whole names: a name that
    was never seen is spelled by the same tokens everywhere, and can be copied."""
    kinds = "|".join(kind for names in KINDS.values() for kind in names)
    first = "|".join(sorted(FIRST, key=len, reverse=True))
    name = re.compile(rf"\b(?!(?:{kinds})\b)({first})[a-z]{{2,5}}\b")
    with open(os.path.join(HERE, "vocabulary.txt"), "w", encoding="utf-8") as file:
        for row in rows:
            for message in row["messages"]:
                file.write(name.sub(r"\1", f"{message['role']}\n{message['content']}\n"))
        syllables = FIRST + [" " + syllable for syllable in FIRST] + SECOND
        file.write("\n".join(syllables * 8000) + "\n")


# ---- Command line ----------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description="Build the Atlas (see the module docstring).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=HERE, help="folder of the world (default: this one)")
    parser.add_argument("--novel", type=int, default=0,
                        help="so many requests more, all of combinations that are never trained")
    parser.add_argument("--scenes", type=int, default=0, help="write the renderer's training file instead")
    parser.add_argument("--demos", type=int, default=0, help="write the policy's demonstrations instead")
    parser.add_argument("--expert-rate", "--care", type=float, default=EXPERT_RATE,
                        help="share of the expert's decisions in the demonstrations (--care is its former name)")
    arguments = parser.parse_args()
    if not 0 <= arguments.expert_rate <= 1:
        parser.error(f"--expert-rate {arguments.expert_rate}: must lie between 0 and 1")

    if arguments.scenes:
        build_scenes(arguments.scenes, arguments.seed)
    if arguments.demos:
        build_demos(arguments.demos, arguments.seed, arguments.expert_rate)
    if not arguments.scenes and not arguments.demos:
        build_world(arguments.seed, arguments.out, arguments.novel)


if __name__ == "__main__":
    main()
