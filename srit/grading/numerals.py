"""Plain text from markdown, LaTeX and typography, and its numbers, read exactly or not at all."""

import re
import unicodedata
from fractions import Fraction

NOISE = Fraction(1, 10**12)  # relative; 0.6666666666666667 equals 2/3, 0.67 does not
MAX_LENGTH = 300  # characters of a numeral; a longer one is not read

# ---- plain text ---------------------------------------------------------------------------------

VULGAR, SUPERSCRIPT = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
OWN = "\x02\x03" + "".join(map(chr, range(0xE000, 0xF000)))  # characters that only the judge puts in
CHARACTERS = str.maketrans({
    **{chr(code): " " for code in range(0x3001) if chr(code).isspace() and chr(code) != "\n"},
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys("\u2212\u2010\u2011", "-"), **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
    **dict.fromkeys("\u2018\u2019", "'"), **dict.fromkeys("\u200b\u2060\ufeff" + OWN),
    "\u3002": ".", "\u2026": "...", "·": "×", "∗": "×", "⋅": "×", "÷": "/", "≈": "="})


def _superscript(match: re.Match) -> str:
    return "^" + "".join("-" if c == "⁻" else str(unicodedata.digit(c)) for c in match[0])


def _vulgar(match: re.Match) -> str:
    ratio = Fraction(unicodedata.numeric(match[2])).limit_denominator(10)
    return f"{match[1]} {ratio}" if match[1] else str(ratio)


def _latex_fraction(match: re.Match) -> str:
    whole, n, n_digit, d, d_digit = match.groups()
    return f"{whole.strip() + ' ' if whole else ''}{n or n_digit}/{d or d_digit}"


def _boxes(text: str) -> str:
    """\\boxed{...} as \\x02...\\x03; one that is not closed has no \\x03."""
    closing: list[str] = []

    def mark(match: re.Match) -> str:
        if match[0] == "}":
            return closing.pop() if closing else "}"
        closing.append("}" if match[0] == "{" else "\x03")
        return "{" if match[0] == "{" else "\x02"

    return re.sub(r"\\(?:boxed|fbox) ?\{|(?<!\\)[{}]", mark, text)


PART = r" ?(?:\{ ?(-?[\d.,]+) ?\}|(\d))"
ABBREVIATED = "|".join(rf"(?<=\b{word}\.)" for word in "mr mrs ms dr prof eq approx ca rs vs".split())
# The characters of which a text must have one, a pattern, and what takes its place; in this order.
REWRITES = [(frozenset(needed), re.compile(pattern, re.M), new) for needed, pattern, new in (
    (" ", " {2,}", " "), ("\n", " ?\n ?", "\n"), ("\n", "\n{3,}", "\n\n"),
    # LaTeX
    ("\\", r"\\[,;:> ]", " "), ("\\", r"\\[!()\[\]]", ""), ("\\", r"\\\\", "\n"),
    ("\\", r"\\([$%#&_])", r"\1"), ("\\", r"\\q?quad\b", " "),
    ("\\", r"\\(?:begin|end)\{\w+\*?\}", ""), ("\\", r"\^?\{?\\(?:circ|degree)\b\}?", "°"),
    ("\\", r"\\(?:left|right|text\w*|math\w+|mbox|operatorname|emph)(?![a-z])", ""),
    ("\\", r"\\(?:times|cdot|ast)(?![a-z])", "×"), ("\\", r"\\div(?![a-z])", "/"),
    ("\\", r"\\approx\b", "="), ("\\", r"\\neq?\b", " not "),
    ("\\", r"\\(?:implies|Rightarrow|rightarrow|therefore)\b", " so "),
    ("\\", rf"(\d ?)?\\[dtc]?frac{PART}{PART}", _latex_fraction),
    # markup
    ("<", r"<<[^<>\n]*>>|</?[a-zA-Z]\w{0,9} ?/?>", ""),  # calculator marks and tags
    ("{", r"\{,\}", ","), ("{}`", r"[{}`]", ""),
    ("*", r"(?<=[\w)]) \*\*? (?=[\w($-])|(?<=[\w)])\*(?=[\w($-])", " × "),
    ("*_", r"\*+|(?<!\w)_+(?=[^\W_])|(?<=[^\W_])_+(?!\w)", ""),  # emphasis
    ("—–-", r" ?(?:—|--+) ?| – ", " — "), ("–", "–", "-"),  # between words a dash, else a minus
    ("-•>", r"^[ >]*(?:[-•] )+|^>+ ?", ""),  # bullets and quotations
    (".:)", r"^([# ]*)(?:(?i:step|part) )?\d{1,2}[.:)] (?=\S)", r"\1"),
    # wording
    ("⇒→∴>", "⇒|→|∴|=>", " so "), ("≠", "≠", " not "), ("cC", r"(?i)\bcan(?:no|')t\b", "can not"),
    ("'", r"(?i)n't\b", " not"), (".", r"\.(?<=\b[a-z]\.)([a-z])\.", r"\1"),  # i.e.
    (".", rf"(?i)\.(?:{ABBREVIATED})", ""),
    (".!?", r"([.!?])(?=[A-Z][a-z])", r"\1 "),
    # numerals
    (SUPERSCRIPT, rf"[{SUPERSCRIPT}]+", _superscript), (VULGAR, rf"(\d?)([{VULGAR}])", _vulgar),
    ("xX", r"(?<=\d) ?[xX] ?(?=\d)", " × "), ("/", r"(?<=\d) ?/ ?(?=\d)", "/"),
    (" \\", r"(?<![\w.,/])\d{1,3}(?: \d{3})+(?![\d/])", lambda match: match[0].replace(" ", "")),
    ("^" + SUPERSCRIPT, r"(?<![\w.,])(\d[\d.]{0,20}) ?× ?10 ?\^ ?(-?\d{1,3})\b", r"\1e\2"),
    ("^" + SUPERSCRIPT, r"(?<![\w.,/^-])10 ?\^ ?(-?\d{1,3})\b", r"1e\1"))]


def plain(text: str) -> str:
    """The text without markup, with one kind of space, dash, quote and digit; 3/4 for \\frac{3}{4}, 1e6
    for 10⁶, and \\x02...\\x03 for \\boxed{...}."""
    text = text.translate(CHARACTERS)
    if "\\" in text:
        text = _boxes(text)
    present = set(text)
    for needed, pattern, new in REWRITES:
        if not needed.isdisjoint(present):
            text = pattern.sub(new, text)
    return text


# ---- numbers ------------------------------------------------------------------------------------

SMALL = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split())}
SMALL |= {word: 10 * value for value, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SMALLS, SCALES = rf"(?:{'|'.join(SMALL)})\b", rf"(?:{'|'.join(SCALE)})\b"
# "one" is a number in a compound; alone, only behind one of these words, where it is no pronoun.
ONE = "|".join(rf"(?<=\b{word} )" for word in (
    "is", "are", "be", "has", "have", "only", "just", "exactly", "about", "or", "and", "but", "not"))
WORDS = (
    rf"\b(?:(?!one\b){SMALLS}|(?:one|an?)(?=[ -]{SCALES})|one(?= point\b| and a half\b)"
    rf"|(?:^|(?<=[=:(] )|{ONE})one(?! (?:of|another|day|who|can|could|might|may|must|should|would|that"
    r"|which|by|less|more)\b))"
    rf"(?:[ -]{SMALLS}|[ -]{SCALES}(?: and(?= {SMALLS}))?)*(?!-?\w)")
FRACTION_WORDS = r"hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed"
# A word that begins with a digit is a number as a whole or none: 3,5, 5-6, 07:30, 3rd and 5x are none.
NUMERAL = (
    r"(?P<sign>(?<![\w)%])(?<![\d)%] )(?:[-+]|(?:minus|negative) ))?(?:[$€£¥₹] ?(?P<inner>-)?)?"
    r"(?:(?P<whole>(?<![\w^])\d+ (?:and )?(?=\d+/\d))?"
    r"(?P<digits>(?<![\w^])\.?\d(?:[\w.,:/^%°'-]*[\w%°])?)"
    rf"|(?P<words>{WORDS}))"
    rf"(?P<point> point(?: (?:{'|'.join(list(SMALL)[:10])})\b)+)?"
    rf"(?P<half> and a half\b)?(?P<scale> {SCALES})?(?: per ?cent\b)?"
    rf"(?P<part>[ -](?:{FRACTION_WORDS})\b|\^| ?\\[a-z]+)?")
DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d\d)*,\d{3}|\d+)(?:\.\d+)?|\.\d+"
UNIT = (r"%|°[cfk]?|(?-i:[mglshL])(?:\^\d)?(?:/\w+)?|/[a-z]+"
        r"|(?!(?:st|nd|rd|th)$)[a-z]{2,}(?:[/^-]-?\w+)*")
DIGITS = re.compile(rf"({DECIMAL})(?:/({DECIMAL}))?(?:e([-+]?\d{{1,3}}))?(?:{UNIT})?", re.I)
FIND = re.compile(NUMERAL, re.I)


def read_number(match: re.Match) -> Fraction | None:
    """The value of a match of NUMERAL; None if it is no number, as in 5-6, 2021-03-05, 3rd or 5/0."""
    value = _words(match["words"].lower()) if match["words"] else _digits(match["digits"])
    if match["whole"] and value is not None:
        whole = _digits(match["whole"].split()[0])
        value = None if whole is None or "/" not in match["digits"] else whole + value
    if value is None or match["part"]:
        return None
    if match["point"]:
        digits = match["point"].lower().split()[1:]
        value += Fraction("." + "".join(str(SMALL[word]) for word in digits))
    if match["half"]:
        value += Fraction(1, 2)
    if match["scale"]:
        value *= SCALE[match["scale"].lower().strip()]
    return -value if (match["sign"] or "+") != "+" or match["inner"] else value


def _digits(text: str) -> Fraction | None:
    match = DIGITS.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if not match:
        return None
    n, d, exponent = match.groups()
    value = Fraction(n.replace(",", ""))
    if exponent:
        value *= Fraction(10) ** int(exponent)
    if d is None:
        return value
    d = Fraction(d.replace(",", ""))
    return value / d if d else None


def _words(text: str) -> Fraction | None:
    """twenty-one, one hundred and five, two million; None unless each word continues the number."""
    total = group = 0
    for word in re.findall("[a-z]+", text):
        if word in SMALL:
            tens_and_ones = group % 10 == 0 and group % 100 >= 20 and SMALL[word] < 10
            if group % 100 and not tens_and_ones:
                return None
            group += SMALL[word]
        elif word == "hundred":
            if group >= 100:
                return None
            group = (group or 1) * 100
        elif word in SCALE:
            if total % (1000 * SCALE[word]) or total and not group:
                return None
            total, group = total + (group or 1) * SCALE[word], 0
    return Fraction(total + group)


def numbers(text: str) -> list[Fraction]:
    """All numbers of the text: 1,234.5  $3  -2  3/4  1 1/2  2e3  \\frac{3}{4}  twenty-one."""
    values = map(read_number, FIND.finditer(plain(text)))
    return [value for value in values if value is not None]


def number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, such as 7, 3/4 or \\boxed{10^6}."""
    match = FIND.fullmatch(plain(text).strip(" \n\x02\x03$").removesuffix("."))
    return match and read_number(match)


def equal(a: Fraction, b: Fraction) -> bool:
    """The same number. Only values of more than nine decimals may differ, by rounding noise."""
    exact = all((value * 10**9).denominator == 1 for value in (a, b))
    return a == b or not exact and abs(a - b) <= NOISE * max(abs(a), abs(b))


def show(value: Fraction | None) -> str | None:
    """A number as text, such as 7 or 0.75; n/d where a float does not reach."""
    if value is None:
        return None
    fits = value.denominator > 1 and abs(value) < 10**300
    return repr(float(value)) if fits else str(value)
