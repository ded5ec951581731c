"""What a completion answers: the number or the option that it states, read from its words.

strict: what the text itself calls its answer ("the answer is 7", "#### 7", "\\boxed{7}", "B is the
correct choice"). A doubt, a second candidate or a question leaves no strict answer.
flexible: the same; without a clear statement, the last number (math) or letter (choice) of the text.

`plain` removes markup. CUE finds statements. A reader turns the clause of a statement into a string of
kinds, one letter for each word. Patterns over that string take out what is denied and what only
explains; what is left is one candidate or none.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from srit.grading.numerals import NUMERAL, equal, plain, read_number

LIMIT = 400  # characters of a sentence that are read
MANY = 500  # sentences that are searched for a last number; a text with more cues is a loop


# ---- from words to kinds ------------------------------------------------------------------------

KINDS = {  # the first that fits counts; a candidate comes before all of them
    # conditions; possibilities; equations
    "F": r"\b(?:if|unless|depend(?:s|ing)|otherwise|or (?:more|less|fewer|above|below))\b",
    "M": r"\b(?:maybe|perhaps|possibly|potentially|sometimes|at least|at most|up to)\b",
    "E": r"=|\b(?:equals?|makes|gives)\b",
    "S": r"[:—]|\b(?:so|which|therefore|thus|hence|that is|ie)\b",  # what opens another segment
    "J": r"[,&]|\b(?:and|as well as)\b",
    "A": r"\b(?:or|either|to|through|between)\b",  # alternatives and ranges
    "O": r"[+×/^<>±≤≥√]|-(?= ?(?:[\d($]|[b-hj-z]\b))|\\[a-z]+"  # operators, bounds and relations
         r"|\b(?:plus|minus|times|by|sum|product|difference|half|twice|double|out of|over|under|above"
         r"|below|(?:more|less|fewer|greater|higher|lower|larger|smaller|other) than"
         r"|(?:similar|related) to"
         r"|(?:square|cube|root|power|multiple|factor|third|quarter|fifth|sixth|tenth|opposite) of"
         r"|(?:one|number|letter|option) (?:after|before))\b",
    # what denies, before or behind; what ends a denial
    "N": r"\b(?:not|no|none|neither|nor|never|hardly|unlikely(?: to)?|rather than|instead of|far from"
         r"|anything but|except(?: for)?|rul(?:e|es|ed|ing) out)\b",
    "W": r"\b(?:wrong|incorrect|false|impossible|out|eliminated)\b",
    "B": r"\b(?:but|it(?:'s)?|instead)\b",
    "Y": r"\b(?:because|since|as|although|though|while|whereas|given)\b",  # reasons
    "P": r"\b(?:in|of|for|from|after|at|per|on|that|who|where|when)\b",  # details
    "I": r"\b(?:is|are|was|were|be|has|have|had|can|could|would|will)\b",
    "L": r"[(\[]", "R": r"[)\]]",
    "w": r"[^\W\d_](?:['^-]?\w)*"}
# V is a candidate, T a candidate by the text of an option, X a name that is none (3rd, an unknown
# letter). Rules mark with D a candidate that is denied, and with _ what only explains.
EVERY, ONLY_KEYS, ONLY_TEXTS = (str.maketrans("TX", kinds) for kinds in ("VV", "ww", "Vw"))


class Clause(NamedTuple):
    """A letter for each word; beside it the number or option of a candidate, or None."""

    kinds: str
    values: list

    def of(self, kind: str) -> list:
        """The values of one kind."""
        return [value for each, value in zip(*self, strict=True) if each == kind]

    def split(self, kinds: str) -> list["Clause"]:
        return [Clause(part[0], self.values[part.start():part.end()])
                for part in re.finditer(f"[^{kinds}]+", self.kinds)]

    def mark(self, rule: re.Pattern, new: str, old: str = "") -> "Clause":
        """`new` for each kind `old` (or any) in the last group of each match, or in all of it."""
        def put(match: re.Match) -> str:
            part = match[match.lastindex or 0]
            changed = part.replace(old, new) if old else new * len(part)
            return match[0][:len(match[0]) - len(part)] + changed
        return Clause(rule.sub(put, self.kinds), self.values)


Reader = Callable[[str], Clause]


def _reader(candidates: str, value: Callable[[re.Match], Any]) -> Reader:
    words = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in KINDS.items())
    pattern = re.compile(f"{candidates}|{words}", re.I)

    def read(text: str) -> Clause:
        tokens = [(match.lastgroup, value(match) if match.lastgroup in "VT" else None)
                  for match in pattern.finditer(text)]
        return Clause("".join(kind for kind, _ in tokens), [value for _, value in tokens])

    return read


NAME = (r"\d+(?:st|nd|rd|th)\b|[^\W\d_]+(?:-?\d[\w-]*|\()"  # 3rd; B12; f(
        r"|(?<=[+×^-])[b-hj-z]\b|(?<=[+×^-] )[b-hj-z]\b")  # 5 + x
read_numbers = _reader(f"(?P<X>{NAME})|(?P<V>{NUMERAL})", read_number)

# Before, in a choice, each name of an option becomes one character: its index above KEY or TEXT.
KEY, TEXT, UNKNOWN = 0xE000, 0xE400, "\ue800"
KEYS, TEXTS, WORD = "[\ue000-\ue3ff]", "[\ue400-\ue7ff]", re.compile("[\\w\ue000-\ue800]")
read_options = _reader(
    f"(?P<V>{KEYS})|(?P<T>{TEXTS})|(?P<X>{UNKNOWN})", lambda match: ord(match[0]) % 0x400)
TITLE = re.compile(rf"({KEYS})\. (?={TEXTS}\W{{0,5}}$)", re.M)  # B. River
LEFT, RIGHT = r"(?<![\w-])(?<!\w')(?<!\d[.,])", r"(?!\w|['-]\w|[.,]\d)"
# A small letter, "A" and "I" are words, unless nothing follows that an article or a pronoun goes with.
LETTER = re.compile(
    rf"{LEFT}(?:[B-HJ-Z]|\d{{1,3}}|[a-zAI](?:(?= ?(?:[])\"'.:,;!?/\x03\n]|$)|(?i: (?:because|since|and"
    r"|or|nor|but|not|if|is|are|was|has|can|could|would|to|through|for|as|with|rather|instead|although|though"
    rf"|most|more)\b))|(?<=[AI])(?= [(—=-]))){RIGHT}", re.M)


@lru_cache(1024)
def option_marker(choices: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """A function that puts the characters of options into a plain text, and leaves out a recital."""
    keys, texts = ([plain(name).strip(" .,;:!?\"'\n").casefold() for name in names]
                   for names in zip(*choices, strict=True))
    texts = [re.sub("^(?:the|an?) ", "", text) for text in texts]
    marks: dict[str, str] = {}
    for first, names in ((KEY, keys), (TEXT, texts)):
        for mark, name in enumerate(names, first):
            marks[name] = marks.get(name, "") + chr(mark)
    phrases = {*texts, *(key for key in keys if len(key) > 1)} - {"", "answer"}  # "answer" is for cues
    longest_first = map(re.escape, sorted(phrases, key=len, reverse=True))
    phrase = re.compile(f"{LEFT}(?:(?:the|an?) )?({'|'.join(longest_first) or '(?!)'}){RIGHT}", re.I)
    recital = re.compile(r"\W{1,5}".join(
        rf"{chr(KEY + index)}\W{{1,4}}{chr(TEXT + index)}" for index in range(len(keys))))

    def known(match: re.Match) -> str:
        unknown = UNKNOWN if re.fullmatch("[B-HJ-Z]", match[0]) else match[0]
        return marks.get(match[match.lastindex or 0].casefold(), unknown)

    return lambda text: TITLE.sub(r"\1) ", recital.sub(" ", LETTER.sub(known, phrase.sub(known, text))))


# ---- from kinds to one candidate ----------------------------------------------------------------

UNCLEAR, CLASH = object(), object()  # candidates, but not one that can be read; statements that differ
DENIED = [re.compile(r"N[wPIL]{0,5}V(?:[JALR]{0,3}w?V)*"),  # not 5; none of A, B or C
          re.compile(r"V(?:R?V|LV+R|R?[JA]+L?V)*[RJ]*Iw?[NW]")]  # B is not; (A) and (B) are wrong
EXPLAINS = [re.compile(r"(?:V|V[^L]*?[^OEL])(L(?!A?w?V+R)[^LR]*R?)"),  # 18 (3 * 6); but not 5 (or 6)
            re.compile(r"V.*?(Y.*)"), re.compile(r"^[^VY]*(Y[^VJB]*)")]  # 4 because 2 + 2 = 4
DETAIL = re.compile(r"V.*?(P.*)")  # 18 km in 2 hours
RATIO = re.compile(r"(?<=V)P(?=V)")  # 1 in 5; 3/4 of 20
UNDONE = re.compile(r"O.*V")  # 3 * 4
ONLY = re.compile(r"[AVRLJ]*V[AVRLJ]*")  # 5 (or 6); B: River
DIRECT = re.compile(r"w?L*V[^IEOS]*(?:S|$)")  # about 28 apples; not: Ben has 28 apples
# 5 or 6; between 5 and 6; 5, 6
LINKED = re.compile(r"V[wR]{0,2}J?A[wPLM]{0,2}V+$|A[wP]?V[wR]?J[wL]?V+$|VR?J{1,2}L?V+$")


def _same(a: Any, b: Any) -> bool:
    return equal(a, b) if isinstance(a, Fraction) and isinstance(b, Fraction) else a == b


def _one(values: list) -> Any:
    """The common value; None if there is no value; UNCLEAR if they differ or cannot be read."""
    if not values:
        return None
    alike = values[0] is not None and all(_same(value, values[0]) for value in values)
    return values[0] if alike else UNCLEAR


def _essence(clause: Clause, candidates: dict) -> Clause:
    """The clause with what it denies and what only explains marked as such."""
    clause = Clause(clause.kinds.translate(candidates), clause.values)
    for rule in DENIED:
        clause = clause.mark(rule, "D", "V")
    for rule in EXPLAINS:
        clause = clause.mark(rule, "_")
    return clause


def _stated(clause: Clause) -> Any:
    """The one candidate of a clause; None if there is none; else UNCLEAR."""
    if "F" in clause.kinds and "V" in clause.kinds:
        return UNCLEAR
    found, finished = [], False
    for segment in clause.split("S"):  # after a result, only one that is nothing but a candidate counts
        if not finished:
            found = _alternatives(segment)
            finished = bool(found) and not ("O" in segment.kinds and _one(found) is UNCLEAR)
        elif ONLY.fullmatch(segment.kinds):
            found += _alternatives(segment)
    return _one(found)


def _alternatives(clause: Clause) -> list:
    return [_equation(part) for part in clause.mark(RATIO, "O").split("JA") if "V" in part.kinds]


def _equation(clause: Clause) -> Any:
    """The bare side of an equation, of a chain the last; None for 3 * 4 or 5 hours = 300 minutes."""
    if "E" not in clause.kinds:
        clause = clause.mark(DETAIL, "_")
    sides = [side for side in clause.split("E") if "V" in side.kinds]
    bare = [value for side in sides if not UNDONE.search(side.kinds)
            and (value := _one(side.of("V"))) is not UNCLEAR]
    if not bare or len(bare) == len(sides) and "w" in sides[0].kinds and _one(bare) is UNCLEAR:
        return None
    return bare[-1]


def _last(clause: Clause) -> Any:
    """The last candidate of a sentence, by the same rules; UNCLEAR if that is not one."""
    linked = LINKED.search(clause.kinds[:clause.kinds.rindex("V") + 1])
    if linked:
        return _one(Clause(linked[0], clause.values[slice(*linked.span())]).of("V"))
    part = [part for part in clause.split("JASPBY") if "V" in part.kinds][-1]
    bare = [side for side in part.split("EI") if "V" in side.kinds and not UNDONE.search(side.kinds)]
    return _one(bare[-1].of("V")[-1:]) if bare else UNCLEAR


# ---- statements ---------------------------------------------------------------------------------

GOOD = r"(?:(?:final|correct|right|best|only|exact|actual|most \w+) )"
THING = rf"(?:{GOOD}*answers?|{GOOD}+(?:option|choice)s?)\b"
BE = r"\b(?:is|are|equals|(?:would|must|should|will|could|might|may|can)(?: not)?(?: \w+)? be)\b"
GAP = (r"(?: ?\([^()\n]{0,60}\))?"  # the answer (in cm), rounded to 2 decimal places, is
       r"(?:,? (?:to|for|in|of th(?:e|is)|here|then|therefore|rounded|as|i|we|with)\b"
       r"(?:\([^()\n]{0,60}\)|\"[^\"\n]{0,200}\"|= ?\?|\.(?=\d)|[^.!?;:=\n()\"]){0,120}?)?,?")
TAKEN_BACK = (
    r"(?:^|(?<=[.!?,—] ))(?:(?:oh|ah|but),? )?(?:no[,.!]|sorry,|(?:wait|oops|hmm+|actually|hold on"
    r"|make that|scratch that|just kidding|on (?:second thought|reflection)|correction|i mean)\b)"
    r"|(?<=[.!?] )(?:or|it (?:could|might|may) also be)\b"
    r"|(?:i was wrong|i made a mistake|i forgot|i miscounted|my (?:mistake|bad)|also (?:right|correct)"
    r"|can not be (?:right|correct)|(?:that|this)(?:'s| is| was) (?:wrong|incorrect|not (?:right"
    r"|correct)))\b")
CUE = re.compile(
    rf"(?P<box>\x02)|(?<![\w#])(?:(?P<hash>####)(?!#)|^[# ]*(?P<heading>(?:the )?{GOOD}*answer)$"
    rf"|(?P<answer>(?P<owner>(?:the|my|our) )?{THING}{GAP} ?(?:{BE}|[:=](?! ?\?)))"
    rf"|(?P<behind>{BE}(?: not)?(?: \w+ly)? (?:the|my|our) {THING})|(?P<back>{TAKEN_BACK})"
    r"|(?<=[,.!:;\n] )(?P<pronoun>(?:so )?(?:it|that)(?:'s| is| must be| should be)\b))", re.I | re.M)

CLOSERS = r"[\"')\]$]*"
SENTENCE_END = re.compile(
    rf"[.!?;\n](?:(?<=[;\n])|(?<!\?){CLOSERS}(?=\s|$)|(?<=\?){CLOSERS}(?!\s[a-z])(?=\s|$))\s*")
TURN = re.compile(r"\b(?:so|but|therefore|thus|hence|then)\b", re.I)
PHRASE = re.compile(rf"[,;:—]|{TURN.pattern}", re.I)
OTHER = re.compile(r"\W*(?:or|and|if|unless)\b", re.I)  # A is the best choice, or B
CONCLUDES = re.compile(r"\b(?:so|therefore|thus|hence|final(?:ly)?|overall|in conclusion)\b", re.I)
POSSIBLE = re.compile(r"\b(?:(?:could|might|may|can)(?! not)|maybe|perhaps|possibly)\b", re.I)
# A cue states nothing in a phrase with a word of VOID, behind one of OTHERS or before one of METHOD.
VOID = re.compile(
    r"\b(?:if|suppos(?:e|ing)|assum(?:e|ing)|imagine|whether|unless|let|wrong|doubt|not|never|either)\b"
    r"|^\W*(?:is|what|which|how)\b|\b(?:to|us) \w+ $", re.I)
OTHERS = re.compile(
    r"(?:\b(?:(?:think|say|claim|believe|guesse|tell)s|thought|said|claimed|believed|guessed|told"
    r"|(?:people|they|students|some|many|most|others|you|one) (?:\w+ )?"
    r"(?:think|say|claim|believe|guess))(?: \w+)?(?: that)?|\baccording to [^,]{1,40})\W*$", re.I)
METHOD = re.compile(
    r"\W*(?:found|obtained|calculated|computed|given|derived|determined|reached|based|worth|by"
    r"|said|thought|believed|supposed|expected|claimed"
    r"|(?:in|on) (?:page|line|step|part|section))\b", re.I)


class Text:
    """A plain text, its sentences and its cues."""

    def __init__(self, text: str, read: Reader) -> None:
        cues, ends = list(CUE.finditer(text)), list(SENTENCE_END.finditer(text))
        self.text, self.read, self.cues = text, read, cues if len(cues) <= MANY else []
        self.starts = [0, *(end.end() for end in ends)]
        self.ends = [*(end.start() for end in ends), len(text)]
        self.bounds = [*(cue.start() for cue in self.cues if cue.lastgroup != "pronoun"), len(text)]

    def answer(self) -> tuple[Any, int]:
        """What the text states in the end (a candidate, UNCLEAR, CLASH or None), and where the text
        behind the last withdrawal begins."""
        answer, since, behind, end = None, 0, 0, 0
        for cue in self.cues:
            if cue.lastgroup == "back":
                if answer is not None:
                    answer, since, end = None, cue.end(), 0
            elif cue.lastgroup != "pronoun" or since and answer is None:
                concludes = bool(CONCLUDES.search(self._lead(cue, behind) + cue[0]))
                within = cue.start() < end and not concludes  # the clause of the statement before
                if not within and (statement := self._statement(cue)):
                    found, denied, end = statement
                    answer, behind = _settle(answer, found, denied, concludes), cue.end()
        return answer, since

    def last(self, since: int) -> Any:
        """The last candidate behind a place: of numbers and letters, or else of option texts."""
        for candidates in (ONLY_KEYS, ONLY_TEXTS):
            for start, end in zip(self.starts[:-MANY:-1], self.ends[:-MANY:-1], strict=True):
                if end <= since:
                    break
                start = max(start, since)
                sentence = self.text[start:end] if end - start <= LIMIT else (
                    self.text[end - LIMIT:end].partition(" ")[2])
                words = self.read(sentence)
                if re.search("[VT]", words.kinds):
                    essence = _essence(words, candidates)
                    if "V" in essence.kinds:
                        return _last(essence)
        return None

    def _sentence(self, place: int) -> int:
        return bisect_right(self.starts, place) - 1

    def _lead(self, cue: re.Match, behind: int = 0) -> str:
        """What stands before a cue in its sentence."""
        start = self.starts[self._sentence(cue.start())]
        return self.text[max(start, behind, cue.start() - LIMIT):cue.start()]

    def _statement(self, cue: re.Match) -> tuple[Any, list, int] | None:
        """What a cue states: a candidate (or None or UNCLEAR), what is denied, the end of the clause.
        None if it states nothing, as in a question, a supposition or the head of a solution."""
        kind, place, here = cue.lastgroup, cue.end(), self._sentence(cue.end())
        below = kind in ("answer", "heading") and not WORD.search(self.text, place, self.ends[here])
        if below and here + 1 < len(self.starts):
            place, here = self.starts[here + 1], here + 1
        end = self.ends[here]
        clause = self._clause(cue, self.text[place:min(end, place + LIMIT + 1)])
        asked = "?" in self.text[end - 1:end + 1] or clause and "?" in clause
        if clause is None or len(clause) > LIMIT or asked or self._void(cue, clause):
            return None
        words = self.read(clause.strip())
        if kind == "hash" and not re.match("L*[VT]", words.kinds):
            return None
        essence = _essence(words, EVERY)
        label = below or kind == "answer" and cue[0].endswith(":")
        if label and self._opens_solution(essence, end, below):
            return None
        found, denied = _stated(essence), essence.of("D")
        if found is not None and found is not UNCLEAR:
            possible = POSSIBLE.search(f"{PHRASE.split(self._lead(cue))[-1]} {cue[0]}")
            return None if possible or "M" in essence.kinds else (found, denied, end)
        return (found, denied, end) if found or denied else None

    def _clause(self, cue: re.Match, clause: str) -> str | None:
        """The words that a cue points to; None for a box that is cut."""
        if cue.lastgroup == "behind":
            verb = re.split(" (?:the|my|our) ", cue[0])[0]
            return TURN.split(self._lead(cue))[-1] + verb + (clause if OTHER.match(clause) else "")
        if cue.lastgroup == "box" or "\x02" in clause:
            opened = clause if cue.lastgroup == "box" else clause.partition("\x02")[2]
            inside, closed, _ = opened.rpartition("\x03")
            return inside if closed else None
        return f"not {clause}" if " not " in cue[0] else clause

    def _void(self, cue: re.Match, clause: str) -> bool:
        """Whether a cue supposes, quotes somebody else, or says how to find the answer."""
        lead = self._lead(cue)
        phrase = PHRASE.split(lead)[-1]
        foreign = cue.lastgroup == "answer" and not cue["owner"] and WORD.search(phrase)  # Tom's answer
        doubted = cue.lastgroup != "box" and VOID.search(phrase)
        return bool(foreign or doubted or OTHERS.search(lead) or METHOD.match(clause))

    def _opens_solution(self, clause: Clause, end: int, below: bool) -> bool:
        """Whether a label heads more sentences with candidates: "Answer: Ben has 16. He wins 12"."""
        rest = self.text[end:min(self.bounds[bisect_left(self.bounds, end)], end + LIMIT)]
        if DIRECT.match(clause.kinds):
            rest = rest.partition("\n\n")[0] if below else ""
        return bool(re.search("[VT]", self.read(rest).kinds))


def _settle(answer: Any, found: Any, denied: list, concludes: bool) -> Any:
    """The answer after one more statement."""
    if answer is None or answer is UNCLEAR:
        return UNCLEAR if found is None else found
    if found is None:  # it only denies
        return CLASH if any(_same(answer, value) for value in denied) else answer
    return found if concludes or _same(answer, found) else CLASH


# ---- whole texts --------------------------------------------------------------------------------

THOUGHT, THOUGHT_END = (re.compile(f"<{slash}think(?:ing)?>", re.I) for slash in ("", "/"))
NEXT_QUESTION = re.compile(r"^[# ]*(?:question|q|problem|instruction|input|user|human)\b[^:\n]{0,9}:"
                           r"|^#+ ?(?:instruction|question)\b", re.I | re.M)


def read_answers(text: str, read: Reader, mark: Callable[[str], str]) -> tuple[Any, Any]:
    """The flexible and the strict answer of a text: a number, the index of an option, or None."""
    shown, *thought = THOUGHT.split(THOUGHT_END.split(text)[-1], maxsplit=1)
    cut = bool(thought) and not shown.strip()  # inside the thought, where nothing is stated
    parts = NEXT_QUESTION.split(plain(thought[0] if cut else shown))
    full = (part for part in map(mark, parts) if len(parts) == 1 or re.search("[VT]", read(part).kinds))
    whole = Text(next(full, ""), read)
    answer, since = (None, 0) if cut else whole.answer()
    strict = None if answer is UNCLEAR or answer is CLASH else answer
    flexible = whole.last(since) if answer is None or answer is CLASH else strict
    return (None if flexible is UNCLEAR else flexible), strict
