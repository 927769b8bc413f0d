"""The judges of the Atlas: KScore from pixels, and program sufficiency from the program's text.

    judge = PixelJudge(world.read_vocabulary())
    scores = judge(image, truth, recipe["wanted"])       # it never sees the program
    sufficiency, checks = judge_program(program, question, wanted, skills_used)   # it never sees a pixel
"""
import numpy as np

import diffusion
from distill import constraint, kscore


def cells(image, size=2):
    """Mean colour of every size x size block: uint8 (H, W, 3) -> float32 (H/size, W/size, 3) in 0..1."""
    height, width, _ = image.shape
    blocks = image.reshape(height // size, size, width // size, size, 3)
    return blocks.astype(np.float32).mean((1, 3)) / 255


def blur(maps):
    """Sum over each cell and its eight neighbours, zeros outside; (..., H, W) of the same shape."""
    padded = np.pad(maps, [(0, 0)] * (maps.ndim - 2) + [(1, 1), (1, 1)])
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def luminance(image):
    """Rec. 601 luma of the last axis."""
    return image @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def bitmap(rows):
    return np.array([[c == "#" for c in row] for row in rows])


class PixelJudge:
    """KScore's four dimensions from pixels: the generated picture first, the ground truth second, and the recipe.

    It never sees the program. Sprites are looked for at every second pixel by comparing mean colours of 2 x 2 blocks
    with the ground truth's subject, so nothing hangs on single pixels, and JPEG, its chroma halved or not, does not
    disturb it. Each constraint
    is kept with a verdict and a detail; each dimension is 0, 0.5 or 1:

    faithfulness        everything asked for is there, in whatever form (half: at least half of it)
    visual_correctness  subject, arrangement and colours are right (half: only the subject is)
    text_accuracy       the sign reads as it should (half: one wrong character); None if no text is wanted
    aesthetics          clean surfaces and, where asked for, the light (half: some of it)
    """
    COLOUR_TOLERANCE = 0.16     # largest channel difference at which a shape's colour counts as the one that was named
    LUMA_TOLERANCE, CHROMA_TOLERANCE = 0.12, 0.10  # the same for a block of a sprite
    YCC = np.array([(0.299, 0.587, 0.114), (0.5, -0.4187, -0.0813), (-0.1687, -0.3313, 0.5)], np.float32)  # Rec. 601
    IDENTITY, LOOSE = 0.8, 0.5  # share of a sprite's blocks that must match

    def __init__(self, world):
        """world: the parsed atlas/world.json (glyphs, shapes, colours, bodies)."""
        self.glyphs = {c: np.array([[bits >> (4 - k) & 1 for k in range(5)] for bits in rows], np.float32)
                       for c, rows in world["glyphs"].items()}
        self.shapes = {name: bitmap(rows) for name, rows in world["shapes"].items()}
        self.colours = {name: np.array(rgb, np.float32) / 255 for name, rgb in world["colours"].items()}
        self.whole = [bitmap(rows) for rows in world["bodies"]["whole"]]
        self.broken = [bitmap(rows) for rows in world["bodies"]["broken"]]

    def __call__(self, image, truth, wanted):
        """image, truth: uint8 (64, 64, 3) (other sizes are resampled). Returns the judgement dict of a trajectory."""
        image, truth = (diffusion.resize(i, 64, 64) if i.shape[:2] != (64, 64) else i for i in (image, truth))
        half = cells(image)                                                                        # (32, 32, 3)
        windows = np.lib.stride_tricks.sliding_window_view(half, (8, 8), (0, 1))                   # (25, 25, 3, 8, 8)
        matches = [self.match(windows, truth, subject) for subject in wanted["subjects"]]
        faithful, visual, beauty = [], [], []
        self.judge_subjects(image, wanted, matches, faithful, visual)
        if wanted["companions"]:
            self.judge_companions(half, wanted, faithful, visual)
        if wanted["style"]:
            faithful.append(self.judge_style(image, wanted["style"]))
        text = None
        if wanted["text"]:
            read = max((self.read_row(image, row) for row in (0, 7)),
                       key=lambda r: (-edit_distance(r, wanted["text"]), r))
            distance = edit_distance(read, wanted["text"])
            text = 1.0 if distance == 0 else 0.5 if distance == 1 and len(wanted["text"]) > 2 else 0.0
            faithful.append(constraint("sign", len(read) > 1, f"reads {read!r}, wanted {wanted['text']!r}"))
        beauty.append(self.judge_clean(image))
        if wanted["mood"]:
            beauty += self.judge_mood(image, wanted["mood"])
        share = sum(c["passed"] for c in faithful) / len(faithful)
        identity = all(c["passed"] for c in visual if c["name"] == "subject look")
        scores = {"faithfulness": 1.0 if share == 1 else 0.5 if share >= 0.5 else 0.0,
                  "visual_correctness": 1.0 if all(c["passed"] for c in visual) else 0.5 if identity else 0.0,
                  "text_accuracy": text,
                  "aesthetics": grade(beauty)}
        extra = [] if text is None else [constraint("text", text == 1, faithful[-1]["detail"])]
        return scores | {"kscore": kscore(**scores), "constraints": faithful + visual + extra + beauty}

    def score(self, image, truth, row):
        """The judgement of a request's row, or None if it is not one of the Atlas."""
        wanted = row.get("recipe", {}).get("wanted")
        return self(image, truth, wanted) if wanted else None

    def score_program(self, trajectory):
        """(R_text, checks) of the program, or (None, []) if the request is not one of the Atlas."""
        t, wanted = trajectory, trajectory.row.get("recipe", {}).get("wanted")
        used = {s.arguments.get("skill_name") for s in t.steps if s.name == "query_knowledge"}
        return judge_program(t.program, t.question, wanted, used) if wanted else (None, [])

    def match(self, windows, truth, subject):
        """Share of the subject's blocks that match at every place: (25, 25)."""
        row, column = (8 * v for v in subject["box"])
        mask = bitmap(subject["mask"])                                                        # (8, 8)
        template = cells(truth[row:row + 16, column:column + 16]).transpose(2, 0, 1)              # (3, 8, 8)
        luma, chroma = self.luma_and_chroma(windows, mask)
        luma0, chroma0 = self.luma_and_chroma(template, mask)
        close = ((np.abs(luma - luma0) < self.LUMA_TOLERANCE)
                 & (np.abs(chroma - chroma0).max(-3) < self.CHROMA_TOLERANCE))                    # (25, 25, 8, 8)
        return close[..., mask].mean(-1)

    def luma_and_chroma(self, blocks, mask):
        """(..., 3, 8, 8) colours -> luma (..., 8, 8) and chroma, Cr and Cb (..., 2, 8, 8).

        Chroma is the mean over a block and its neighbours within the mask: pictures keep it about so finely, JPEG ones
        at half the resolution.
        """
        luma, chroma = np.split(np.einsum("dc,...cij->...dij", self.YCC, blocks), (1,), -3)
        return luma[..., 0, :, :], blur(chroma * mask) / np.maximum(blur(mask.astype(np.float32)), 1)

    def judge_subjects(self, image, wanted, matches, faithful, visual):
        """Identity of every subject, then what its arrangement asks for; y and x are in blocks of two pixels."""
        found = []
        for subject, score in zip(wanted["subjects"], matches):
            best = float(score.max())
            found.append(np.unravel_index(score.argmax(), score.shape))
            faithful.append(constraint("subject", best >= self.LOOSE, f"{subject['name']}: {best:.0%} recognisable"))
            visual.append(constraint("subject look", best >= self.IDENTITY,
                                     f"{subject['name']}: {best:.0%} of its look"))
        (y, x), arrangement = found[0], wanted["arrangement"]
        if arrangement == "place":
            actual = f"{'upper' if y + 4 < 16 else 'lower'} {'left' if x + 4 < 16 else 'right'}"
            visual.append(constraint("place", actual == wanted["place"], f"stands {actual}, wanted {wanted['place']}"))
        elif arrangement == "pair":
            actual = "left" if x < found[1][1] else "right"
            visual.append(constraint("sides", actual == wanted["place"], f"the first stands {actual}"))
        elif arrangement == "count":
            count = count_peaks(matches[0], self.IDENTITY)
            visual.append(constraint("count", count == wanted["count"], f"{count} copies, wanted {wanted['count']}"))
        elif arrangement == "body":
            visual.append(self.judge_body(image, y, x))
        elif arrangement == "shadow":
            visual.append(self.judge_shadow(image, y, x, wanted["light"]))

    def judge_body(self, image, y, x):
        """Below the head stands a body whose outline is nearest to a whole one."""
        area = luminance(cells(image))[y + 8:y + 16, x:x + 8] < 0.36
        if area.shape != (8, 8):
            return constraint("body", False, "no room below the head")
        whole = min(int((area != mask).sum()) for mask in self.whole)
        broken = min(int((area != mask).sum()) for mask in self.broken)
        return constraint("body", whole <= 5 and whole < broken,
                          f"{whole} blocks from a whole body, {broken} from a broken one")

    def judge_shadow(self, image, y, x, light):
        """The strip on the ground right below is dark on the side away from the light, and only there."""
        light_map = np.pad(luminance(cells(image)), ((0, 12), (4, 4)), mode="edge")  # columns shift by 4
        strip, below = light_map[y + 8:y + 10], light_map[y + 10:y + 12]
        dark = {side: float(strip[:, at:at + 4].mean() / max(below[:, at:at + 4].mean(), 1e-3))
                for side, at in (("left", x), ("right", x + 12))}
        away = {"left": "right", "right": "left"}[light]
        return constraint("shadow", dark[away] < 0.6 <= dark[light],
                          f"darkness left {1 - dark['left']:.2f}, right {1 - dark['right']:.2f}, light from the "
                          f"{light}")

    def judge_companions(self, half, wanted, faithful, visual):
        """For every shape the colour in which it is best seen: share of its blocks that match, less those around it."""
        near = {name: (np.abs(half - rgb).max(-1) < self.COLOUR_TOLERANCE).astype(np.float32)
                for name, rgb in self.colours.items()}                                             # (32, 32)
        windows = {name: np.lib.stride_tricks.sliding_window_view(m, (8, 8)) for name, m in near.items()}
        for shape, colour in wanted["companions"]:
            mask = self.shapes[shape]
            weight = np.where(mask, 1 / mask.sum(), -1 / max((~mask).sum(), 1)).astype(np.float32)
            scores = {name: float(np.tensordot(view, weight, 2).max()) for name, view in windows.items()}
            seen = max(scores, key=scores.get)
            there = scores[seen] >= 0.84
            faithful.append(constraint(f"a {shape}", there, f"best match {scores[seen]:.0%}"))
            visual.append(constraint(f"colour of the {shape}", there and seen == colour,
                                     f"{seen if there else 'not found'}, wanted {colour}"))

    def judge_style(self, image, style):
        """Share of the 64 cells whose light follows a pattern of the wanted style."""
        light = luminance(image.astype(np.float32) / 255).reshape(8, 8, 8, 8).transpose(0, 2, 1, 3)  # (8, 8, 8, 8)
        light = light - light.mean((2, 3), keepdims=True)
        deviation = light.std((2, 3)) + 1e-6
        rows, columns = (np.arange(8) // 4 % 2)[:, None], (np.arange(8) // 4 % 2)[None]
        waves = {"mosaic": rows ^ columns, "woven": rows + 0 * columns, "banded": columns + 0 * rows}
        shares = {name: float((((light * (2 * wave - 1)).mean((2, 3)) / deviation > 0.8) & (deviation > 0.04)).mean())
                  for name, wave in waves.items()}
        others = max(v for k, v in shares.items() if k != style)
        return constraint(f"{style} style", shares[style] >= 0.35 and others < 0.2,
                          ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))

    def judge_clean(self, image):
        """Surfaces are either smooth or crisp: few cells may be muddy, that is, faintly uneven."""
        colour = image.astype(np.float32).reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4) / 255       # (8, 8, 8, 8, 3)
        across = colour.std(3).mean((2, 3))                                                        # (8, 8): along rows
        muddy = float(((across > 0.02) & (across < 0.06)).mean())
        return constraint("clean", muddy <= 0.2, f"{muddy:.0%} of the cells are muddy")

    def judge_mood(self, image, mood):
        """Warm or cool backdrop, and bright above, deep below; read from the smooth cells only."""
        colour = image.astype(np.float32).reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4) / 255
        smooth = colour.std(3).mean((2, 3)) < 0.02
        at, shade = np.nonzero(smooth)[0], colour[smooth].mean((1, 2))                             # (n,), (n, 3)
        if len(set(at.tolist())) < 3:
            return [constraint("palette", False, "no free backdrop"), constraint("gradient", False, "no free backdrop")]
        warmth, light = float(np.median(shade[:, 0] - shade[:, 2])), luminance(shade)
        first, second = np.nonzero(at[:, None] < at[None])                   # Theil-Sen: the median of pairwise slopes
        slope = -8 * float(np.median((light[second] - light[first]) / (at[second] - at[first])))
        return [constraint("palette", warmth > 0.12 if mood == "warm" else warmth < -0.12,
                           f"red minus blue {warmth:+.2f}"),
                constraint("gradient", slope > 0.2, f"{slope:+.2f} brighter above than below")]

    def read_row(self, image, row):
        """The longest run of glyphs in one row of cells."""
        light = luminance(image[8 * row:8 * row + 8].astype(np.float32) / 255).reshape(8, 8, 8).transpose(1, 0, 2)
        text = ""
        for cell in light:                                                                        # (8, 8)
            best, character = 0.0, " "
            ink = cell.max() - cell
            if cell.max() > 0.75 and ink.max() > 0.35:
                ink = (ink - ink.mean()) / (ink.std() + 1e-6)
                for name, glyph in self.glyphs.items():
                    template = np.pad(glyph, ((1, 0), (1, 2)))
                    score = float((ink * (template - template.mean()) / template.std()).mean())
                    if score > best:
                        best, character = score, name
            text += character if best > 0.6 else " "
        return max(text.split(" "), key=len)


def grade(verdicts):
    """1 if all pass, 0 if none does, else 0.5."""
    passed = [c["passed"] for c in verdicts]
    return 1.0 if all(passed) else 0.5 if any(passed) else 0.0


def edit_distance(a, b):
    """Levenshtein distance of two short strings."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def count_peaks(score, threshold):
    """How many sprites fit without overlapping: the best place first, then whatever it leaves room for."""
    score, count = score.copy(), 0
    while score.max() >= threshold:
        y, x = np.unravel_index(score.argmax(), score.shape)
        score[max(0, y - 7):y + 8, max(0, x - 7):x + 8] = 0
        count += 1
    return count


def judge_program(program, question, wanted, skills_used):
    """R_text: is the program sufficient? Four checks, a quarter each; it never looks at a pixel.

    program: Program or None; wanted: the recipe's constraints; skills_used: skills whose guide was read. Returns
    (score in {0, 0.25, 0.5, 0.75, 1}, checks). Facts: the wanted text (or number) stands in the prompt. References:
    as many ordinal phrases as subjects, in order. Skills: every wanted skill was read and its wording is followed.
    Constraints: every requirement appears, in the plain wording at least.
    """
    if program is None:
        return 0.0, [constraint("program", False, "no program")]
    prompt = program.gen_prompt
    facts = wanted["text"] in prompt if wanted["text"] else True
    if wanted["arrangement"] == "count":
        number = ("", "", "two", "three", "four")[wanted["count"]]
        facts = facts and number in prompt.lower()
    ordinals = ("the first reference image", "the second reference image")[:len(wanted["subjects"])]
    ordinal = all(o in prompt.lower() for o in ordinals) and len(program.references) == len(ordinals)
    followed = [s for s in wanted["skills"] if wanted["wordings"][s]["exact"] in prompt]
    advised = [s for s in wanted["skills"] if s in skills_used and s in followed]
    stated = [s for s in wanted["skills"] if any(w in prompt for w in wanted["wordings"][s].values())]
    checks = [constraint("facts", facts, "the facts stand in the prompt" if facts else "a fact is missing"),
              constraint("ordinal references", ordinal, f"{len(program.references)} references"),
              constraint("skill advice", len(advised) == len(wanted["skills"]),
                         f"followed: {', '.join(advised) or 'none'}"),
              constraint("executable constraints", len(stated) == len(wanted["skills"]),
                         f"stated: {', '.join(stated) or 'none'}")]
    return sum(c["passed"] for c in checks) / 4, checks
