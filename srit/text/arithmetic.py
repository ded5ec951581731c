"""A calculator that reads text: what must follow an "=", and which written equations are false.

    52 - 28 =    $5 x 12 =    (3 + 4) * 2 =    1,200 / 4 =    3 bags * 4 apples =    <<48/2=

An expression is the longest part of a line before an "=" that consists of numbers with currency signs,
percent signs and units, joined by operators and parentheses. What may be meant in two ways is none:
2x + 3, 10-15 * 2, 6 / 1/2, 2 hours + 30 minutes, 100 - 20%, half of 20 + 4. Values are exact fractions.
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LIMIT = 160  # characters of a left side
LARGEST, LARGEST_DENOMINATOR = 10**12, 100
DECIMALS, MONEY_DECIMALS = 4, 2  # a result with more is left to the writer
NOISE = Fraction(1, 10**12)  # relative, of floating point

# ---- words and signs ----------------------------------------------------------------------------

CURRENCY = "$€£¥₹"
DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|(?!0\d)\d{1,15})(?!\d)(?:\.\d{1,20}(?!\d))?|\.\d{1,20}(?!\d))"
PERCENT = r" ?%| percent\b"
OPERAND = rf"(?=\s*[-(.\d{CURRENCY}])"
PART_OF = "|".join(rf"(?<={part} )" for part in ("%", "percent", r"/\d", r"/\d\d", r"\.\d", r"\.\d\d"))
OPERATOR = (rf"(?<![^\W\d])[xX](?=\s*[(.\d{CURRENCY}])|(?:times|plus|minus|(?:divided|multiplied) by)\b"
            rf"{OPERAND}|(?:{PART_OF})of(?: the)?\b{OPERAND}|\\(?:times|cdot|div)\b")
WORD = rf"(?!{OPERATOR})[^\W\d]\w*(?:[-'’/][^\W\d]\w*)*"
TOKEN = re.compile(
    rf"(?P<number>(?:(?P<currency>[{CURRENCY}]) ?)?(?:(?P<whole>\d{{1,9}}) (?=\d+/\d))?"
    rf"(?P<digits>{DIGITS})(?P<percent>{PERCENT})?(?(currency)(?P<per>/{WORD})?))"
    rf"|(?P<operator>{OPERATOR}|\*(?!\*)|[-+/×·÷−]|(?<=\s)–(?=\s))"
    rf"|(?P<open>\()|(?P<close>\))|(?P<words>{WORD}(?: {WORD})*)|(?P<other>\*\*|\S)")
SIGNS = {"x": "*", "×": "*", "·": "*", "times": "*", "multiplied by": "*", "of": "*", "of the": "*",
         "\\times": "*", "\\cdot": "*", "÷": "/", "divided by": "/", "\\div": "/", "plus": "+",
         "minus": "-", "−": "-", "–": "-"}
MINUS, DASHES = ("-", "−"), ("-", "−", "–")

# Words that change the number before them, or the value behind them.
PARTS = r"hal(?:f|ves)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
SCALES = rf"dozens?|hundreds?|thousands?|(?:m|b|tr)illions?|{PARTS}|squared|cubed"
VAGUE = re.compile(
    rf"(?:^(?!a \w)/?\w|(?<![-'’/\w])[^\W\d_aA])(?![-'’/\w])|\d|\b(?:{SCALES}|[ap]m|st|nd|rd|th|percent"
    r"|point|or|if|than|times|plus|minus|rounded|rounds to|one|two|three|four|five|six|seven|eight|nine"
    r"|tens?|eleven|twelve|twenty)\b", re.I)
UNIT_WORDS = 6
NUMBERED = ("step|day|week|month|part|case|question|problem|item|room|page|chapter|level|round|game|age"
            "|january|february|march|april|may|june|july|august|september|october|november|december")
CHANGES = re.compile(
    rf"(?:(?:\b(?:{PARTS}|squares?|cubes?|roots?|average|mean|remainder|percent)|[%\d])"
    r" off?(?: of)?(?: the)?|\b(?:twice|thrice|doubled?|tripled?|half|negative|subtracted from|out of"
    r"|mod|sqrt|log|ln|sin|cos|tan|abs|gcd|lcm)|\d :|\d over|\d and(?=\s+\0\d+/))\s*\0"
    rf"|\b(?:{NUMBERED})s?\s+\0\d+ ?[-–−]"  # Step 2 - 12 + 8; pages 5-10
    r"|\bon day\s+\0\d"
    r"|(?<![\w'’])[^\W\d_]\s*\0[-−(]"  # x -5 + 3; n (5 + 3)
    rf"|(?<!= )(?<![\d.,=–−{CURRENCY}-])[{CURRENCY}]?\d(?:[\d.,]*\d)?(?: [^\W\d]+)? and"
    r"\s+\0[^*x×·/÷]*[-+]", re.I)  # 5 boys and 3 girls + 2; not: = 8 and 8 - 2
BEFORE = re.compile(  # what may stand before an expression
    r"(?:(?:^|[=(\[{<>|“‘]|(?<!\d)[\"']|(?:^|[\s(\"])\*\*|[^\W\d]:)\s*"
    r"|(?:^ *[-*•]|[^\W\d]|[,.;:?!)\]\"'”’—→⇒>|…]|\*\*)\s+)\Z", re.M)
SPACED = r"\s(?:[-+*/xX×·÷–−]|times|plus|minus)\s"
AMBIGUOUS = re.compile(
    rf"\d-\d.*{SPACED}|{SPACED}.*\d-\d"  # 10-15 * 2
    rf"|(?:/ |÷ ?|\bby )[{CURRENCY}]?\d+/\d"  # 6 / 1/2
    r"|\b0[xX]\d|\$.*\\(?:times|cdot|div)|\\(?:times|cdot|div).*\$"  # code, LaTeX
    r"|^\d/\d(?: [^\W\d]+)+\s*$"  # 1/2 cup = 4 ounces
    r"|[*xX×·] ?100 ?%"  # 0.4 * 100% is 40 to many
    r"|\b\d\d?/\d\d?/\d{4}\b|\b\d{4}-\d\d?-\d\d?\b")  # dates
# Units of one kind in several sizes: 2 hours + 30 minutes is not 32.
SIZES = [re.compile(rf"\b(?:({')|('.join(words.split())}))s?\b", re.I) for words in (
    "dollar cent penny|pennie nickel dime",
    "sec|second min|minute hr|hour day week fortnight month year decade century|centurie",
    "inch|inche|\\Ain foot|feet|ft yard|yd mile|mi mm|millimet(?:er|re) cm|centimet(?:er|re)"
    " met(?:er|re) km|kilomet(?:er|re)", "ounce|oz pound|lb ton mg|milligram gram kg|kilogram",
    "teaspoon|tsp tablespoon|tbsp cup pint quart gallon ml|millilit(?:er|re) lit(?:er|re)",
    "kb mb gb tb")]
DOLLAR = (0, 1)
RATE = re.compile(r"/|(?:^| )(?:per|an?|each|every)\b")

EQUALS = re.compile(rf"(?P<before> ?)=(?P<after> ?)(?P<currency>[{CURRENCY}])?\Z")
STATED = re.compile(rf"\s?(?P<minus>[-−] ?)?(?P<currency>[{CURRENCY}] ?)?(?P<digits>{DIGITS})"
                    rf"(?:/(?P<below>[1-9]\d{{0,5}}))?(?P<percent>{PERCENT})?"
                    rf"(?P<words>(?: ?{WORD}(?: {WORD})*)?)")
UNFINISHED = re.compile(
    rf" [^\W\d_aA]\b|[^\W\d]\b| ?(?:{SCALES}|remainder|rem|with|and a half|and [($]*\d+/\d+)\b"
    r"|[.,:^/]?\d| \d{3}\b| \d+/\d|\.\.|…", re.I)
CONTINUES = re.compile(r" ?[-+*/×·÷−–]")
FRACTIONS = re.compile(r"\(?\d+/\d+(?:[^\d/]+\d+/\d+)+\D*")
LARGE = re.compile(r"(?<![.\d])(?:\d{1,3}(?:,\d{3})+|\d{4,})")

# ---- what is asked for --------------------------------------------------------------------------


@dataclass(frozen=True)
class Equation:
    """An equation of a text whose left side is an expression and whose right side begins with a number.

    span: (start, end) of both sides in the text. left: the left side as written. stated: the number
    behind "=" (50 % is 1/2). exact: the value of the left side. holds: whether the two are equal, as
    far as the left side has a value of few decimals; otherwise a rounded one will do. Where the right
    side is an expression, as in 9 * (4 + 3) = 9 * 7, its value may also be the equal one.
    """

    span: tuple[int, int]
    left: str
    stated: Fraction
    exact: Fraction
    holds: bool


def result(text: str) -> str | None:
    """What follows a text that ends in an expression and "="; None where that is not certain.

    It is written as the text writes its numbers: with a space behind "=", a currency sign, thousands
    separators, and the sum of fractions as a fraction. A text may also end in "= " or "= $". Inside
    a mark, <<48/2=, it is bare digits, and in a text with such marks nothing else is calculated.
    None too for a value that is large, or takes more than four decimals (money: two).
    """
    equals = EQUALS.search(text[-4:])
    if equals is None:
        return None
    left = _left_side(text, len(text) - len(equals[0]))
    if left is None:
        return None
    marked, sign = text[max(0, left.start - 2):left.start] == "<<", equals["currency"] or left.sign
    if marked:
        sign = ""
    elif "<<" in text:
        return None
    large, written = LARGE.findall(text)[-1:], equals["currency"]
    digits = _digits(left, sign, bool(large) and "," in large[0] and not marked,
                     bool(FRACTIONS.fullmatch(text, left.start, left.end)) and not marked)
    if digits is None or written and (left.value < 0 or left.sign == "%"):
        return None
    styles = re.findall(rf"( ?)=( ?)[-\d{CURRENCY}]", text[:left.start])
    space = [after for before, after in styles if before == equals["before"]] or [equals["before"]]
    return ("" if equals["after"] or written else space[-1]) + ("-" if left.value < 0 else "") + (
        sign if sign not in ("", "%") and not written else "") + digits + ("%" if sign == "%" else "")


def equations(text: str) -> list[Equation]:
    """The equations of a text that can be judged, in order."""
    found = []
    for at in (match.start() for match in re.finditer("=", text)):
        left, right = _left_side(text, at), STATED.match(text, at + 1)
        if left is None or right is None or UNFINISHED.match(text, right.start("words")):
            continue
        sizes = _sizes(right["words"]) | ({DOLLAR} if right["currency"] else set())
        if any(size not in left.sizes and size[0] in dict(left.sizes) for size in sizes):
            continue  # 3 weeks * 7 = 21 days, $2 * 3 = 600 cents
        value = _fraction(right) / int(right["below"] or 1) * (-1 if right["minus"] else 1)
        percent, whole = bool(right["percent"]), _right_value(text, at + 1)
        places = len(right["digits"].partition(".")[2])
        holds = _agrees(left, value, places) or percent and _agrees(left, value / 100, places + 2) or (
            whole is not None and _agrees(left, whole, 0))
        if not holds and whole is None and CONTINUES.match(text, right.end()):
            continue  # 21/7 = 90/x
        value /= 100 if percent else 1
        found.append(Equation((left.start, right.start("words")), text[left.start:at].rstrip(), value,
                              left.value, holds))
    return found


def _fraction(number: re.Match) -> Fraction:
    return Fraction(number["digits"].replace(",", ""))


def _places(value: Fraction, sign: str) -> int | None:
    """Decimals that the value is written with; None if it takes too many."""
    money = sign not in ("", "%")
    value, most = value * (100 if sign == "%" else 1), MONEY_DECIMALS if money else DECIMALS
    least = next((n for n in range(most + 1) if (value * 10**n).denominator == 1), None)
    return MONEY_DECIMALS if money and least else least


def _digits(side: "_Side", sign: str, separators: bool, as_fraction: bool) -> str | None:
    """The absolute value as it is written; None if it cannot be in few digits."""
    value, places = abs(side.value), _places(side.value, sign)
    if as_fraction and value.denominator > 1:
        return str(value) if value.denominator < LARGEST_DENOMINATOR else None
    if places is None or value >= LARGEST:
        return None
    whole = int(value * (100 if sign == "%" else 1) * 10**places)
    return format(Decimal(whole).scaleb(-places), ",f" if separators else "f")


def _agrees(left: "_Side", stated: Fraction, places: int) -> bool:
    gap = abs(left.value - stated)
    rounded = places > 0 and _places(left.value, left.sign) is None
    return gap <= NOISE * abs(left.value) or rounded and gap * 10**places < 1


def _right_value(text: str, start: int) -> Fraction | None:
    """The value of the expression that begins at `start`; None if it has no certain one."""
    end = min(start + LIMIT, *(at for at in (text.find(c, start) for c in "=\n") if at >= 0), len(text))
    reader = _Reader(list(TOKEN.finditer(text, start, end)), 0)
    try:
        value, _ = reader.sum()
    except _NotAnExpression:
        return None
    return None if reader.doubtful else value


# ---- reading expressions ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """An expression in a text, text[start:end]: its value, and the sign of its currency, "%" or ""."""

    start: int
    end: int
    value: Fraction
    sign: str
    sizes: frozenset[tuple[int, int]]  # the units of measure in it


class _NotAnExpression(Exception):
    pass


class _Reader:
    """Recursive descent over tokens. `doubtful`: an expression, but one without a certain value."""

    def __init__(self, tokens: list[re.Match], at: int) -> None:
        self.tokens, self.at = tokens, at
        self.operators: set[str] = set()
        self.sizes: set[tuple[int, int]] = set()
        self.rates: set[tuple[int, int]] = set()  # per which
        self.plain: set[tuple[int, int]] = set()  # the sizes that are not part of a rate
        self.doubtful = False

    def _kind(self) -> str | None:
        return self.tokens[self.at].lastgroup if self.at < len(self.tokens) else None

    def _operator(self, signs: str) -> str | None:
        """The next operator if it is one of `signs`; a minus that leans on its number is a sign."""
        if self._kind() != "operator":
            return None
        token, before = self.tokens[self.at], self.tokens[self.at - 1]
        sign = SIGNS.get(token[0].lower(), token[0])
        after = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        leans = after is not None and before.end() < token.start() and token.end() == after.start()
        if sign not in signs or sign == "-" and leans and before.lastgroup == "words":
            return None
        self.at += 1
        self.operators.add(sign)
        return sign

    def sum(self) -> tuple[Fraction, str]:
        value, sign = self._product()
        while operator := self._operator("+-"):
            other, its = self._product()
            self.doubtful |= "%" in (sign, its) and sign != its or bool(sign and its) and sign != its
            value, sign = value + (other if operator == "+" else -other), sign or its
        return value, sign

    def _product(self) -> tuple[Fraction, str]:
        value, sign = self._factor()
        while operator := self._operator("*/"):
            other, its = self._factor()
            if operator == "*":
                self.doubtful |= sign == its == "%"
                value, sign = value * other, (sign + its).replace("%", "")[:1]
            else:
                self.doubtful |= other == 0
                value, sign = value / (other or 1), sign if its in ("", "%") and sign != its else ""
        return value, sign

    def _factor(self) -> tuple[Fraction, str]:
        token = self.tokens[self.at] if self._kind() else None
        if token is not None and token[0] in MINUS:
            self.at += 1
            if self._kind() not in ("number", "open") or self.tokens[self.at].start() > token.end():
                raise _NotAnExpression
            value, sign = self._factor()
            return -value, sign
        if self._kind() == "open":
            self.at += 1
            value, sign = self.sum()
            if self._kind() != "close":
                raise _NotAnExpression
            self.at += 1
        elif self._kind() == "number":
            self.at += 1
            value, sign = self._number(token)
        else:
            raise _NotAnExpression
        if self._kind() == "words":
            self._unit(self.tokens[self.at][0])
            self.at += 1
        return value, sign

    def _number(self, token: re.Match) -> tuple[Fraction, str]:
        value = _fraction(token)
        if token["whole"]:  # 2 1/2
            self.at += 1
            if self._kind() != "number":
                raise _NotAnExpression
            below = _fraction(self.tokens[self.at])
            self.at += 1
            self.doubtful |= below == 0
            value = int(token["whole"]) + value / (below or 1)
        if token["currency"]:
            self.sizes.add(DOLLAR)
            self._unit(token["per"] or "")
        return (value / 100, "%") if token["percent"] else (value, token["currency"] or "")

    def _unit(self, words: str) -> None:
        if len(words.split()) > UNIT_WORDS or VAGUE.search(words):
            raise _NotAnExpression
        above, *below = RATE.split(words, maxsplit=1)
        self.sizes |= _sizes(above)
        if below:
            self.rates |= _sizes(below[0])
        else:
            self.plain |= _sizes(above)

    def mixed(self) -> bool:
        """Whether measures must be converted: 2 hours + 30 minutes, 60 miles per hour * 30 minutes."""
        several, of_rates = (len(dict(sizes)) < len(sizes) for sizes in (self.sizes, self.rates))
        apart = dict(self.rates).keys() & dict(self.plain).keys() - dict(self.rates & self.plain).keys()
        return bool(several and self.operators - {"*"} or of_rates and self.operators & {"+", "-"}
                    or apart and "*" in self.operators and "/" not in self.operators)


def _sizes(words: str) -> set[tuple[int, int]]:
    """(kind, size) of the measures in a unit: of 3 miles per hour, miles."""
    words = RATE.split(words, maxsplit=1)[0]
    return {(kind, found.lastindex) for kind, pattern in enumerate(SIZES)
            for found in pattern.finditer(words)}


def _left_side(text: str, end: int) -> _Side | None:
    """The expression that ends at `end`; None if there is none, or one of uncertain value."""
    least = max(0, end - LIMIT)
    begin = max(least, text.rfind("\n", least, end) + 1, text.rfind("=", least, end) + 1)
    tokens = list(TOKEN.finditer(text, begin, end))
    for first, token in enumerate(tokens):
        signed = token[0] in MINUS
        if token.lastgroup not in ("number", "open") and not signed:
            continue
        reader = _Reader(tokens, first)
        try:
            value, sign = reader.sum()
        except _NotAnExpression:
            continue
        if reader.at < len(tokens):
            continue
        start = token.start()
        lead = text[max(0, start - 80, text.rfind("\n", least, start) + 1):start]
        if (not reader.operators or reader.doubtful or reader.mixed() or _within(tokens, first, reader)
                or not BEFORE.search(lead)
                or CHANGES.search(f"{lead}\0{text[start:end]}") or AMBIGUOUS.search(text[start:end])):
            return None
        return _Side(start, end, value, sign, frozenset(reader.sizes))
    return None


def _within(tokens: list[re.Match], first: int, reader: _Reader) -> bool:
    """Whether the words before an expression belong to a larger one."""
    *more, number, last = [None, None, *tokens[:first]]
    if last and last.lastgroup == "operator":  # x times 3 + 4
        return last[0][-1].isalpha()
    comma = last and last[0] == ","
    if comma:
        *more, number, last = *more, number
    if not number or last.lastgroup != "words":
        return False
    if number.lastgroup == "operator" and not comma:  # 9 - his 1 + 2; not: - then 1 + 2
        kinds = [token.lastgroup for token in more[-2:] if token]
        return " " not in last[0] and bool(kinds) and ("number" in kinds or number[0] not in DASHES)
    if number.lastgroup in ("number", "close") and tokens[first][0] in MINUS and not comma:
        return True  # 12 apples -5 + 3
    # 2 hours 30 minutes + 45 minutes
    if number.lastgroup != "number" or not re.fullmatch(r"\w+(?: and)?", last[0]):
        return False
    unit = {DOLLAR} if number["currency"] and last[0] == "and" else _sizes(last[0])
    return any(kind in dict(reader.sizes) and (kind, size) not in reader.sizes for kind, size in unit)
