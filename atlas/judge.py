"""The judges of the Atlas: KScore from pixels, and program sufficiency from the program's text.

    judge = PixelJudge(atlas.world.vocabulary())
    judgement = judge(image, truth, recipe["wanted"])                             # it never sees the program
    score, checks = judge_program(program, question, wanted, skills_used, titles) # it never sees a pixel

A judgement holds KScore, its four dimensions, and "constraints": one dict {"name", "passed", "detail"} for everything
that was looked at. Where a verdict is about one place of the picture, "box" is that place: [top, left, bottom, right]
in pixels of the 64-pixel picture.

The pictures of the Atlas are drawn on a grid. A *cell* is 8 x 8 pixels, a *block* 2 x 2; subjects, bodies and
companions are 8 x 8 blocks, a glyph fills one cell. No verdict depends on single pixels, so JPEG, with its chroma
halved or not, changes none.

Contents, in reading order:
    bitmap, glyph_bitmap, style_waves   how masks, glyphs and backdrop patterns are written down (build.py draws them)
    Picture                             a picture by cells and by blocks
    PixelJudge.__call__                 verdicts -> the four dimensions -> KScore
    PixelJudge.match                    where a subject is: share of its blocks that match, at every place
    PixelJudge.judge_...                one aspect each: subjects, arrangement, companions, style, sign, clean, mood,
                                        and that nothing else is there
    judge_program                       R_text: four checks, a quarter each; 0 if more is said than was asked for
    read_statements, wrong_facts, ...   what a prompt says, sentence by sentence, and what its references show
    verdict, block_box                  one constraint of a judgement, and where in the picture the judge looked

Letters: y, x: row and column of a block, 0..31; (25, 25): all places at which 8 x 8 blocks fit into 32 x 32.
"""
import functools
import re
from collections import Counter

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import diffusion
import distill
import tools

SIZE, CELL, GRID = 64, 8, 8  # a picture is 64 x 64 pixels = 8 x 8 cells of 8 pixels
BLOCK, BLOCKS = 2, 32        # a block is 2 x 2 pixels, a picture 32 x 32 blocks
SPRITE = 8                   # side of a subject, a body or a companion, in blocks
PLACES = BLOCKS - SPRITE + 1
OPPOSITE = {"left": "right", "right": "left"}
NUMBER = {2: "two", 3: "three", 4: "four"}

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601: luma, and the chroma Cr and Cb
RED_CHROMA = np.array([0.5, -0.4187, -0.0813], np.float32)
BLUE_CHROMA = np.array([-0.1687, -0.3313, 0.5], np.float32)


# ---- How the world is written down -----------------------------------------------------------------------------------

def bitmap(rows):
    """Text rows of '#' and '.' -> bool (rows, columns)."""
    return np.array([[character == "#" for character in row] for row in rows])


def glyph_bitmap(rows):
    """Seven numbers, one a row of five pixels, the highest bit on the left -> bool (7, 5)."""
    return bitmap([f"{bits:05b}".replace("1", "#") for bits in rows])


def style_waves(size):
    """{style: 0 or 1 (size, size)}: the backdrop patterns, stripes or squares of four pixels."""
    stripe = np.arange(size) // 4 % 2
    rows, columns = np.meshgrid(stripe, stripe, indexing="ij")
    return {"mosaic": rows ^ columns, "woven": rows, "banded": columns}


# ---- How a picture is read -------------------------------------------------------------------------------------------

class Picture:
    """A picture as the judge reads it: cells and blocks. image: uint8 (64, 64, 3)."""
    STYLE_CORRELATION = 0.8   # of a cell's light with a style's pattern, at least
    STYLE_CONTRAST = 0.04     # standard deviation of a cell's light, at least

    def __init__(self, image):
        colour = image.astype(np.float32) / 255                                             # (64, 64, 3), 0..1
        self.cells = by_cell(colour)                                                        # (8, 8, 8, 8, 3)
        self.light = by_cell(colour @ LUMA)                                                 # (8, 8, 8, 8)

        pixels = image.reshape(BLOCKS, BLOCK, BLOCKS, BLOCK, 3).astype(np.float32)
        self.blocks = pixels.mean((1, 3)) / 255                                             # (32, 32, 3)
        self.block_light = self.blocks @ LUMA                                               # (32, 32)
        channels = np.stack([LUMA, RED_CHROMA, BLUE_CHROMA])
        converted = np.einsum("dc,ijc->ijd", channels, self.blocks)                         # (32, 32, 3)
        self.luma, self.chroma = converted[..., 0], converted[..., 1:]                      # (32, 32), (32, 32, 2)

    @functools.cached_property
    def unevenness(self):
        """How much the colour of a cell varies along its pixel rows: mean standard deviation, (8, 8)."""
        return self.cells.std(3).mean((2, 3))

    @functools.cached_property
    def patterns(self):
        """{style: which cells have light that follows its pattern, bool (8, 8)}"""
        light = self.light - self.light.mean((2, 3), keepdims=True)                         # (8, 8, 8, 8)
        deviation = light.std((2, 3)) + 1e-6                                                # (8, 8)
        cells = {}
        for name, wave in style_waves(CELL).items():
            correlation = (light * (2 * wave - 1)).mean((2, 3)) / deviation
            cells[name] = (correlation > self.STYLE_CORRELATION) & (deviation > self.STYLE_CONTRAST)
        return cells


def by_cell(pixels):
    """(64, 64, ...) -> (8, 8, 8, 8, ...): row and column of the cell, then of the pixel within it."""
    return pixels.reshape(GRID, CELL, GRID, CELL, *pixels.shape[2:]).swapaxes(1, 2)


def at_every_place(blocks):
    """(32, 32, ...) -> (8, 8, ..., 25, 25): what lies under each block of a sprite, at each place of the sprite."""
    return sliding_window_view(blocks, (PLACES, PLACES), (0, 1))


def mean_nearby(values, mask):
    """Mean over each block and its eight neighbours, of those within the mask (8, 8): (8, 8, ...) of the same shape."""
    inside = mask.astype(np.float32).reshape(mask.shape + (1,) * (values.ndim - 2))         # (8, 8, 1, ...)
    return sum_nearby(values * inside) / np.maximum(sum_nearby(inside), 1)


def sum_nearby(values):
    """Sum over each element of the first two axes and its eight neighbours, zeros outside; of the same shape."""
    height, width, *rest = values.shape
    padded = np.zeros((height + 2, width + 2, *rest), values.dtype)
    padded[1:-1, 1:-1] = values
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


# ---- The pixel judge -------------------------------------------------------------------------------------------------

class PixelJudge:
    """KScore's four dimensions from pixels: the generated picture first, the ground truth second, and the recipe.

    It never sees the program. Each dimension is 0, 0.5 or 1:

    faithfulness        everything asked for is there, in whatever form (half: at least half of it)
    visual_correctness  subject, arrangement and colours are right (half: only the subject is)
    text_accuracy       the sign reads as it should (half: one wrong character); None if no text is wanted
    aesthetics          clean surfaces and, where asked for, the light (half: some of it)
    """
    IDENTITY = 0.8            # share of a subject's blocks that must match: it is the right one
    RECOGNISABLE = 0.5        # the same: it is there in some form
    LUMA_TOLERANCE = 0.12     # largest differences at which a subject's block matches
    CHROMA_TOLERANCE = 0.10
    COMPANION = 0.84          # share of a companion's blocks that must match, less that of the blocks around it
    COLOUR_TOLERANCE = 0.16   # largest difference in a channel at which a block has the colour that was named
    BODY_LIGHT = 0.36         # a darker block belongs to a body
    BODY_FAULTS = 5           # blocks in which a whole body may differ
    SHADOW = 0.6              # light of a shadow, relative to the ground beside it
    STYLE_SHARE = 0.35        # of the 64 cells that follow the wanted pattern, at least
    OTHER_STYLE_SHARE = 0.2   # and another pattern, at most
    GLYPH_CORRELATION = 0.6   # of a cell's ink with a glyph
    GLYPH_GROUND = 0.75       # light of the ground under a glyph, at least
    GLYPH_INK = 0.35          # how much darker the ink is, at least
    SMOOTH, CRISP = 0.02, 0.06  # unevenness of a cell: below, above; between them it is muddy
    MUDDY_SHARE = 0.2         # of the 64 cells, at most
    CLUTTER = 2               # cells with something that nobody asked for, at most; the smallest thing takes three
    WARMTH = 0.12             # red minus blue of a warm backdrop; of a cool one its negative
    FALL = 0.2                # how much brighter the top is than the bottom, at least

    def __init__(self, world):
        """world: the parsed atlas/world.json (glyphs, shapes, colours, bodies)."""
        self.shapes = {name: bitmap(rows) for name, rows in world["shapes"].items()}
        self.colours = {name: np.float32(rgb) / 255 for name, rgb in world["colours"].items()}
        self.whole_bodies = [bitmap(rows) for rows in world["bodies"]["whole"]]
        self.broken_bodies = [bitmap(rows) for rows in world["bodies"]["broken"]]

        self.characters = list(world["glyphs"])
        glyphs = np.zeros((len(self.characters), CELL, CELL), np.float32)
        for glyph, rows in zip(glyphs, world["glyphs"].values()):
            glyph[1:8, 1:6] = glyph_bitmap(rows)  # within its cell a glyph has a margin
        self.glyphs, self.glyph_deviation = centre(glyphs.reshape(-1, CELL * CELL))         # (characters, 64), (.., 1)

    def __call__(self, image, truth, wanted):
        """The judgement of a picture. image, truth: uint8 (64, 64, 3), other sizes are resampled; wanted: the recipe's
        constraints (build.constraints). Returns {"kscore", the four dimensions, "constraints": [verdicts]}."""
        picture = Picture(diffusion.resize(image, SIZE, SIZE))
        truth = Picture(diffusion.resize(truth, SIZE, SIZE))

        matches = [self.match(picture, truth, subject) for subject in wanted["subjects"]]   # (25, 25) each
        subjects, looks = self.judge_subjects(wanted["subjects"], matches)
        arrangement = self.judge_arrangement(picture, wanted, matches)
        shapes, colours = self.judge_companions(picture, wanted["companions"])
        style = self.judge_style(picture, wanted["style"])
        sign, text, text_accuracy = self.judge_sign(picture, wanted["text"])
        clean = self.judge_clean(picture)
        mood = self.judge_mood(picture, wanted["mood"])
        clutter = self.judge_clutter(picture, wanted, subjects + arrangement + shapes + sign)

        faithful = subjects + shapes + style + sign
        visual = looks + arrangement + colours + clutter
        beauty = clean + mood
        scores = {"faithfulness": grade(passed_share(faithful) == 1, passed_share(faithful) >= 0.5),
                  "visual_correctness": grade(passed_share(visual) == 1, passed_share(looks) == 1),
                  "text_accuracy": text_accuracy,
                  "aesthetics": grade(passed_share(beauty) == 1, passed_share(beauty) > 0)}
        return scores | {"kscore": distill.kscore(**scores), "constraints": faithful + visual + text + beauty}

    # -- subjects and their arrangement

    def match(self, picture, truth, subject):
        """Share of the subject's blocks that match at every place: (25, 25).

        A block matches if its luma and its chroma are near to those of the ground truth's subject. Chroma is the mean
        over a block and its neighbours within the mask: JPEG keeps it at half the resolution.
        """
        mask = bitmap(subject["mask"])                                                      # (8, 8)
        row, column = (cell * CELL // BLOCK for cell in subject["box"])
        area = slice(row, row + SPRITE), slice(column, column + SPRITE)

        luma_gap = np.abs(at_every_place(picture.luma) - truth.luma[area][..., None, None])  # (8, 8, 25, 25)
        chroma = mean_nearby(at_every_place(picture.chroma), mask)                          # (8, 8, 2, 25, 25)
        expected = mean_nearby(truth.chroma[area], mask)                                    # (8, 8, 2)
        chroma_gap = np.abs(chroma - expected[..., None, None]).max(2)                      # (8, 8, 25, 25)
        close = (luma_gap < self.LUMA_TOLERANCE) & (chroma_gap < self.CHROMA_TOLERANCE)
        return close[mask].mean(0)

    def judge_subjects(self, subjects, matches):
        """(whether each subject is there in some form, whether each looks as it should)."""
        there, looks = [], []
        for subject, match in zip(subjects, matches):
            share = float(match.max())
            box = sprite_box(*best_place(match))
            seen = f"{subject['name']}: {share:.0%}"
            there.append(verdict("subject", share >= self.RECOGNISABLE, f"{seen} recognisable", box))
            looks.append(verdict("subject look", share >= self.IDENTITY, f"{seen} of its look", box))
        return there, looks

    def judge_arrangement(self, picture, wanted, matches):
        """The number of copies of each subject, and what is asked of the place at which it is seen best."""
        arrangement, (y, x) = wanted["arrangement"], best_place(matches[0])
        found = [self.judge_count(match, wanted["count"]) for match in matches]
        if arrangement == "place":
            found.append(self.judge_quarter(y, x, wanted["place"]))
        elif arrangement == "pair":
            _, other_x = best_place(matches[1])
            found.append(self.judge_sides(y, x, other_x, wanted["place"]))
        elif arrangement == "body":
            found.append(self.judge_body(picture, y, x))
        elif arrangement == "shadow":
            found.append(self.judge_shadow(picture, y, x, wanted["light"]))
        return found

    def judge_quarter(self, y, x, quarter):
        """The subject's middle lies in the quarter that was named."""
        vertical = "upper" if y + SPRITE // 2 < BLOCKS // 2 else "lower"
        horizontal = "left" if x + SPRITE // 2 < BLOCKS // 2 else "right"
        actual = f"{vertical} {horizontal}"
        return verdict("place", actual == quarter, f"stands {actual}, wanted {quarter}", sprite_box(y, x))

    def judge_sides(self, y, x, other_x, side):
        """The first subject stands on its side of the second."""
        actual = "left" if x < other_x else "right"
        return verdict("sides", actual == side, f"the first stands {actual}", sprite_box(y, x))

    def judge_count(self, match, count):
        """As many separate copies as were asked for; the box goes around all of them."""
        places = separate_peaks(match, self.IDENTITY)
        box = None
        if places:
            top, left = np.min(places, axis=0)
            bottom, right = np.max(places, axis=0) + SPRITE
            box = block_box(top, left, bottom, right)
        passed = len(places) == count or (count == 1 and not places)  # a single one that is missing is its look's fault
        return verdict("count", passed, f"copies: {len(places)}, wanted {count}", box)

    def judge_body(self, picture, y, x):
        """Below the head stands a body whose outline is nearest to a whole one."""
        top = y + SPRITE
        body = picture.block_light[top:top + SPRITE, x:x + SPRITE] < self.BODY_LIGHT
        box = sprite_box(top, x)
        if body.shape != (SPRITE, SPRITE):
            return verdict("body", False, "no room below the head", box)
        whole = min(int((body != mask).sum()) for mask in self.whole_bodies)
        broken = min(int((body != mask).sum()) for mask in self.broken_bodies)
        passed = whole <= self.BODY_FAULTS and whole < broken
        return verdict("body", passed, f"{whole} blocks from a whole body, {broken} from a broken one", box)

    def judge_shadow(self, picture, y, x, light):
        """The strip on the ground right below is dark on the side away from the light, and only there."""
        ground, margin = y + SPRITE, SPRITE // 2  # the shadow reaches half a subject to the side
        padded = np.pad(picture.block_light, ((0, 12), (margin, margin)), mode="edge")
        strip = padded[ground:ground + 2]
        below = padded[ground + 2:ground + 4]

        brightness = {}  # of the strip on either side, relative to the ground below it
        for side, left in (("left", x), ("right", x + margin + SPRITE)):
            columns = slice(left, left + margin)
            reference = max(below[:, columns].mean(), 1e-3)
            brightness[side] = float(strip[:, columns].mean() / reference)

        passed = brightness[OPPOSITE[light]] < self.SHADOW <= brightness[light]
        detail = (f"darkness left {1 - brightness['left']:.2f}, right {1 - brightness['right']:.2f}, "
                  f"light from the {light}")
        return verdict("shadow", passed, detail, block_box(ground, x - margin, ground + 2, x + SPRITE + margin))

    # -- companions, style, sign

    def judge_companions(self, picture, companions):
        """(whether each shape is there, whether each has its colour).

        The colour of a shape is the one in which it is seen best: share of its blocks that have the colour, less the
        share of the blocks around it that do.
        """
        if not companions:
            return [], []
        windows = {}  # colour -> which blocks have it, at every place: (25, 25, 8, 8)
        for name, rgb in self.colours.items():
            near = np.abs(picture.blocks - rgb).max(-1) < self.COLOUR_TOLERANCE
            windows[name] = sliding_window_view(near.astype(np.float32), (SPRITE, SPRITE))

        shapes, colours = [], []
        for shape, colour in companions:
            mask = self.shapes[shape]
            around = max((~mask).sum(), 1)
            weight = np.where(mask, 1 / mask.sum(), -1 / around).astype(np.float32)

            scores = {name: np.tensordot(window, weight, 2) for name, window in windows.items()}
            seen = max(scores, key=lambda name: scores[name].max())
            share = float(scores[seen].max())
            box = sprite_box(*best_place(scores[seen]))
            there = share >= self.COMPANION
            shapes.append(verdict(f"a {shape}", there, f"best match {share:.0%}", box))
            detail = f"{seen if there else 'not found'}, wanted {colour}"
            colours.append(verdict(f"colour of the {shape}", there and seen == colour, detail, box))
        return shapes, colours

    def judge_style(self, picture, style):
        """Enough of the 64 cells, and hardly any of another style, have light that follows the style's pattern."""
        if not style:
            return []
        shares = {name: float(follows.mean()) for name, follows in picture.patterns.items()}
        others = max(share for name, share in shares.items() if name != style)
        passed = shares[style] >= self.STYLE_SHARE and others < self.OTHER_STYLE_SHARE
        detail = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        return [verdict(f"{style} style", passed, detail)]

    def judge_sign(self, picture, text):
        """([whether there is a sign], [whether it reads as it should], text accuracy).

        Signs stand in the first or the last row of cells; the one that is nearer to the wanted text counts.
        """
        if not text:
            return [], [], None
        signs = [self.read_row(picture, row) for row in (0, GRID - 1)]                      # [(characters, box)]
        read, box = max(signs, key=lambda sign: (-edit_distance(sign[0], text), sign[0]))
        distance = edit_distance(read, text)
        accuracy = grade(distance == 0, distance == 1 and len(text) > 2)

        detail = f"reads {read!r}, wanted {text!r}"
        sign = verdict("sign", len(read) > 1, detail, box)
        return [sign], [verdict("text", accuracy == 1, detail, box)], accuracy

    def read_row(self, picture, row):
        """(characters, box) of the longest run of glyphs in one row of cells.

        A cell holds the glyph with which the darkness of its pixels correlates best, if it has a light ground, dark ink
        and a correlation that is high enough.
        """
        light = picture.light[row].reshape(GRID, CELL * CELL)                               # (8, 64)
        ground = light.max(1)                                                               # (8,)
        ink = ground[:, None] - light
        is_legible = (ground > self.GLYPH_GROUND) & (ink.max(1) > self.GLYPH_INK)
        centred, deviation = centre(ink)
        standard = centred / (deviation + 1e-6)
        correlation = (standard[:, None] * self.glyphs / self.glyph_deviation).mean(2)      # (8, characters)
        is_legible &= correlation.max(1) > self.GLYPH_CORRELATION

        text = ""
        for legible, best in zip(is_legible, correlation.argmax(1)):
            text += self.characters[best] if legible else " "
        runs = list(re.finditer("[^ ]+", text))
        if not runs:
            return "", None
        longest = max(runs, key=lambda run: len(run[0]))
        left, right = longest.span()
        return longest[0], [CELL * row, CELL * left, CELL * row + CELL, CELL * right]

    # -- surfaces and light

    def judge_clean(self, picture):
        """Surfaces are either smooth or crisp: few cells may be muddy, that is, faintly uneven."""
        is_muddy = (picture.unevenness > self.SMOOTH) & (picture.unevenness < self.CRISP)   # (8, 8)
        muddy = float(is_muddy.mean())
        return [verdict("clean", muddy <= self.MUDDY_SHARE, f"{muddy:.0%} of the cells are muddy")]

    def judge_clutter(self, picture, wanted, found):
        """Outside the boxes of what was found there is only backdrop: no crisp edges, and a pattern only where a style
        is wanted (the wrong one is another verdict's business). found: verdicts on all that may stand there."""
        is_crisp = picture.unevenness > self.CRISP                                          # (8, 8)
        has_pattern = np.any(list(picture.patterns.values()), axis=0)                       # (8, 8)
        is_other = is_crisp & ~has_pattern if wanted["style"] else is_crisp | has_pattern
        is_other &= ~taken_cells(found)
        count, box = int(is_other.sum()), cells_box(is_other)
        return [verdict("nothing else", count <= self.CLUTTER, f"{count} cells hold something else", box)]

    def judge_mood(self, picture, mood):
        """Warm or cool backdrop, and bright above, deep below; read from the smooth cells only."""
        if not mood:
            return []
        smooth = picture.unevenness < self.SMOOTH                                           # (8, 8)
        rows = np.nonzero(smooth)[0]                                                        # (n,)
        shade = picture.cells[smooth].mean((1, 2))                                          # (n, 3)
        if len(set(rows.tolist())) < 3:
            return [verdict(name, False, "no free backdrop") for name in ("palette", "gradient")]

        warmth = float(np.median(shade[:, 0] - shade[:, 2]))
        is_right = warmth > self.WARMTH if mood == "warm" else warmth < -self.WARMTH

        light = shade @ LUMA
        above, below = np.nonzero(rows[:, None] < rows)                                     # all pairs of cells
        slopes = (light[below] - light[above]) / (rows[below] - rows[above])
        fall = -GRID * float(np.median(slopes))                                             # Theil-Sen, top to bottom
        return [verdict("palette", is_right, f"red minus blue {warmth:+.2f}"),
                verdict("gradient", fall > self.FALL, f"{fall:+.2f} brighter above than below")]

    # -- what the scorer calls

    def score(self, image, truth, row):
        """The judgement of a request's row, or None if it is not one of the Atlas."""
        wanted = row.get("recipe", {}).get("wanted")
        return self(image, truth, wanted) if wanted else None

    def score_program(self, trajectory):
        """(R_text, checks) of the program, or (None, []) if the request is not one of the Atlas."""
        wanted = trajectory.row.get("recipe", {}).get("wanted")
        if not wanted:
            return None, []
        titles = {img_id: image.get("title", "") for img_id, image in trajectory.images.items()}
        return judge_program(trajectory.program, trajectory.question, wanted, guides_read(trajectory), titles)


# ---- The program judge -----------------------------------------------------------------------------------------------

# what a sentence that states a requirement of a skill has in it, once: in the guide's wording, in the plain one, or in
# the request's own words that leave a fact open; whatever its value
STATEMENTS = {skill: re.compile(rf"\b(?:{pattern})\b", re.I) for skill, pattern in {
    "spatial_layout": "in(?:side)? the (?:upper|lower) (?:left|right)|stands wholly in|to the (?:left|right) of the",
    "quantity_counting": r"separate copies|\w+ of them",
    "anatomy_body_coherence": "whole body|full figure",
    "physical_material_consistency": "contact shadow|lit from the",
    "text_rendering": "sign (?:with the text|saying|showing)|on a sign",
    "attribute_binding": r"and only \w+; the|with an? \w+ (?:ball|cube|cone|ring|cross) and",
    "creative_drawing": "pattern covers|(?:mosaic|woven|banded) style",
    "aesthetic_drawing": "gradient light|(?:warm|cool) light"}.items()}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORD = re.compile(r"(?<![\w-])\w+(?:-\w+)*(?![\w-])")  # 1104, KEL, K-E-L: never a part of something longer
NUMBER_WORD = re.compile(r"(?<![\w-])(?:two|three|four|[2-4])(?![\w-])", re.I)
NO_NUMBER = re.compile(r"(?<=copies: )[\w, ]+|two arms, two legs", re.I)  # in the wordings, what is no number of copies


def judge_program(program, question, wanted, skills_used, titles=None):
    """R_text: is the program sufficient? Four checks, a quarter each; it never looks at a pixel.

    program: Program or None; wanted: the recipe's constraints; skills_used: skills whose guide was read; titles:
    {img_id: title of the picture}, or None where nobody knows what the references show. Returns (score in {0, 0.25,
    0.5, 0.75, 1}, checks).

    Facts: the wanted text and number stand in the prompt, and no other of their kind. References: one a subject, in
    order, in the look asked for. Skills: every wanted skill was read and its wording is followed. Constraints: every
    requirement appears, in the plain wording at least, and the look.

    A program that says more than that is refused: its reward is 0, whatever its picture. One that states every value,
    every wording, or shows something else besides, has decided nothing; it would pass each of the checks that look for
    what is wanted, and its picture alone would earn more than honest mediocre attempts do.
    """
    if program is None:
        return 0.0, [verdict("program", False, "no program")]
    skills = wanted["skills"]
    stated = read_statements(program.gen_prompt, wanted["wordings"])
    followed = {skill for skill, form in stated if form == "exact" and skill in skills_used}
    carried = {skill for skill, form in stated if form != "other"}

    fact_faults = wrong_facts(program.gen_prompt, wanted)
    ordinals = names_in_order(program.gen_prompt, wanted["subjects"])
    looks, shown = shows_the_look(program, wanted, titles)
    surplus = surplus_statements(stated, skills) + foreign_pictures(program, wanted, titles)

    checks = [verdict("facts", not fact_faults, "; ".join(fact_faults) or "the facts stand in the prompt"),
              verdict("ordinal references", ordinals and looks, shown),
              verdict("skill advice", followed == set(skills), f"followed: {listed(followed)}"),
              verdict("executable constraints", carried == set(skills) and looks, f"stated: {listed(carried)}")]
    score = 0.0 if surplus else sum(check["passed"] for check in checks) / 4
    last = verdict("surplus statements", not surplus, listed(surplus)) | {"refuses": bool(surplus)}
    return score, [*checks, last]


def read_statements(prompt, wordings):
    """What a prompt states of the skills' requirements, sentence by sentence: [(skill, form)].

    wordings: {skill: {"exact": sentence, "plain": sentence}}, those that are wanted. form: "exact" or "plain" where a
    whole sentence is that wording to the letter; "other" where it speaks of the skill in any other way.
    """
    wanted = {sentence: (skill, form) for skill, forms in wordings.items() for form, sentence in forms.items()}
    stated = []
    for sentence in SENTENCE_END.split(prompt.strip()):
        if sentence in wanted:
            stated.append(wanted[sentence])
            continue
        for skill, pattern in STATEMENTS.items():
            stated += [(skill, "other")] * len(pattern.findall(sentence))
    return stated


def surplus_statements(stated, skills):
    """What is stated more than once, or without being asked for."""
    times = Counter(skill for skill, _ in stated)
    return [f"{skill} {count} times" for skill, count in times.items() if count > (skill in skills)]


def foreign_pictures(program, wanted, titles):
    """What the references show beyond the subjects: more pictures, or those of something else."""
    names = [subject["name"] for subject in wanted["subjects"]]
    surplus = [f"{len(program.references)} pictures"] if len(program.references) > len(names) else []
    if titles is None:
        return surplus
    shown = [titles.get(reference["img_id"], "") for reference in program.references]
    return surplus + [f"a picture of {title}" for title, name in zip(shown, names)
                      if not title.startswith(f"{name}, ")]


def shows_the_look(program, wanted, titles):
    """(whether the references are the subjects in the look asked for, one each, in their order; a detail)."""
    count = len(program.references)
    if titles is None:
        return count == len(wanted["subjects"]), f"{count} references"
    shown = [titles.get(reference["img_id"], "") for reference in program.references]
    right = [f"{subject['name']}, {wanted['look']}" for subject in wanted["subjects"]]
    return shown == right, f"shown: {listed(shown)}"


def names_in_order(prompt, subjects):
    """Whether the first subject's name goes with the first reference image, and the second's with the second."""
    pairs = []
    for subject, phrase in zip(subjects, tools.REFERENCE_PHRASES):
        name = rf"(?<![\w-]){re.escape(subject['name'])}(?![\w-])"
        pairs.append(rf"(?:{name}.*?\b(?i:{phrase})\b|\b(?i:{phrase})\b.*?{name})")
    return re.search(".*?".join(pairs), prompt, re.S) is not None


def wrong_facts(prompt, wanted):
    """What is wrong with the facts: [text], empty if the wanted values, and no others of their kind, are there."""
    text, faults = wanted["text"], []
    if text and (found := values_like(text, prompt)) != {text}:
        faults.append(f"texts: {listed(found)}; wanted {text}")
    if wanted["arrangement"] == "count":
        word = NUMBER[wanted["count"]]
        numbers = {number.lower() for number in NUMBER_WORD.findall(NO_NUMBER.sub("", prompt))}
        if not numbers or not numbers <= {word, str(wanted["count"])}:
            faults.append(f"numbers: {listed(numbers)}; wanted {word}")
    return faults


def values_like(text, prompt):
    """Every value in a prompt that is of the wanted text's kind, digits or capitals. K-E-L is the value KEL."""
    is_alike = str.isdecimal if text.isdecimal() else str.isupper
    values = set()
    for word in WORD.findall(prompt):
        parts = word.split("-")
        values |= {"".join(parts)} if all(len(part) == 1 for part in parts) else set(parts)
    return {value for value in values if len(value) > 2 and is_alike(value)}


def guides_read(trajectory):
    """Skills whose guide a trajectory has read; a call that was answered with an error has read none."""
    calls = [step for step in trajectory.steps if step.name == "query_knowledge"]
    names = [step.arguments.get("skill_name") for step in calls if not step.observation.startswith("Error:")]
    return {name for name in names if isinstance(name, str)}


# ==== Machine room ====================================================================================================

def verdict(name, passed, detail, box=None):
    """One constraint of a judgement. box: [top, left, bottom, right] in pixels of what it is about, if it has a
    place."""
    found = distill.constraint(name, passed, detail)
    return found if box is None else found | {"box": box}


def block_box(top, left, bottom, right):
    """A rectangle of blocks as a box in pixels, cut at the picture's edge; None if nothing of it is within."""
    edges = [BLOCK * int(edge) for edge in (top, left, bottom, right)]
    top, left, bottom, right = (min(max(edge, 0), SIZE) for edge in edges)
    return [top, left, bottom, right] if top < bottom and left < right else None


def listed(names):
    return ", ".join(sorted(names)) or "none"


def taken_cells(found):
    """Cells in which something stands that was found, bool (8, 8). found: verdicts; what has no place has no box.

    A sign takes all of its row: its illegible characters are not something else.
    """
    taken = np.zeros((GRID, GRID), bool)
    for check in found:
        if check.get("box"):
            top, left, bottom, right = check["box"]
            columns = slice(left // CELL, -(-right // CELL))
            taken[top // CELL:-(-bottom // CELL), slice(None) if check["name"] == "sign" else columns] = True
    return taken


def cells_box(cells):
    """The box around the cells that are True, bool (8, 8); None if none is."""
    rows, columns = np.nonzero(cells)
    if not len(rows):
        return None
    return [CELL * int(edge) for edge in (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)]


def sprite_box(y, x):
    """The box of 8 x 8 blocks at a place."""
    return block_box(y, x, y + SPRITE, x + SPRITE)


def passed_share(verdicts):
    return sum(found["passed"] for found in verdicts) / len(verdicts)


def grade(is_full, is_half):
    """A dimension's value: 1, 0.5 or 0."""
    return 1.0 if is_full else 0.5 if is_half else 0.0


def best_place(scores):
    """(y, x) of the highest score."""
    return np.unravel_index(scores.argmax(), scores.shape)


def separate_peaks(scores, threshold):
    """[(y, x)] of the sprites that fit without overlapping: the best place first, then whatever it leaves room for."""
    scores, places = scores.copy(), []
    while scores.max() >= threshold:
        y, x = best_place(scores)
        places.append((y, x))
        top, left = max(0, y - SPRITE + 1), max(0, x - SPRITE + 1)
        scores[top:y + SPRITE, left:x + SPRITE] = 0
    return places


def centre(rows):
    """Every row minus its mean (..., n), and its standard deviation (..., 1)."""
    mean = rows.mean(-1, keepdims=True)
    return rows - mean, rows.std(-1, keepdims=True)


def edit_distance(a, b):
    """Levenshtein distance of two short strings."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            removed, added = previous[j] + 1, current[-1] + 1
            replaced = previous[j - 1] + (x != y)
            current.append(min(removed, added, replaced))
        previous = current
    return previous[-1]
