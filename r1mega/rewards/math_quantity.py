r"""Exact numbers with their signs, percent signs and units, as fractions: 1/3 is not 0.3333.

Standard library only; bounded by MAX_DIGITS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_DIGITS = 400
"""Digits and exponent of numbers compared as fractions; longer ones go to sympy and its limits."""


@dataclass(frozen=True)
class Quantity:
    value: Fraction
    percent: bool = False
    unit: str = ""
    """Its dimension, or the words themselves where they are unknown; "" without one."""
    size: Fraction = Fraction(1)
    """Of the unit, in the first of its dimension."""
    name: str = ""
    """Left side of "x = 5", else ""."""


@dataclass(frozen=True)
class Unit:
    dimension: str = ""
    size: Fraction = Fraction(1)
    multiplier: int = 1
    """Of the number itself: "million"."""


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<tens>[+-]?\d+)\s*\}|(?P<ten>-?\d+))|[eE](?P<e>[+-]?\d+))"
_SIGN = r"(?P<sign>[+-]?)\s*\$?\s*"
_FRACTION = r"\\frac\s*\{\s*(?P<top>[+-]?\d+)\s*\}\s*\{\s*(?P<bottom>[+-]?\d+)\s*\}"
UNIT_TEXT = r"[a-zA-Z][a-zA-Z .'/-]*(?:\^\s*\{?\s*[23]\s*\}?)?"
_NUMBER = re.compile(
    rf"(?:(?P<name>[a-zA-Z](?:_\{{?\w\}}?)?)\s*=\s*)?{_SIGN}(?:"
    rf"(?P<mixed>\d+)\s*{_FRACTION}"
    rf"|{_FRACTION.replace('top', 'top2').replace('bottom', 'bottom2')}"
    r"|(?P<mixed3>\d+)\s+(?P<top3>\d+)\s*/\s*(?P<bottom3>\d+)"
    rf"|(?P<top4>{_DECIMAL})\s*(?:/|\\div)\s*(?P<bottom4>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL}){_POWER}?"
    rf")(?P<rest>\s*%|\s+{UNIT_TEXT}|[a-zA-Z]{{2}}[a-zA-Z .'/-]*(?:\^\s*\{{?\s*[23]\s*\}}?)?)?\s*"
)
_UNIT_TABLE = """
length 1/1000 mm millimeter millimeters millimetre millimetres
length 1/100 cm centimeter centimeters centimetre centimetres
length 1 m meter meters metre metres
length 1000 km kilometer kilometers kilometre kilometres
feet 1/12 in inch inches
feet 1 ft foot feet
feet 3 yd yard yards
feet 5280 mi mile miles
mass 1 g gram grams
mass 1000 kg kilogram kilograms
pounds 1 lb lbs pound pounds
pounds 1/16 oz ounce ounces
time 1 s sec secs second seconds
time 60 min mins minute minutes
time 3600 h hr hrs hour hours
time 86400 day days
time 604800 week weeks
years 1/12 month months
years 1 year years yr yrs
velocity 1 m/s meters/second meters_per_second
velocity 5/18 km/h km/hr kmh kph kmph kilometers_per_hour
acceleration 1 m/s^2
speed 1 mph mi/h miles_per_hour miles/hour
volume 1 l liter liters litre litres
volume 1/1000 ml milliliter milliliters millilitre
dollars 1 dollar dollars usd
dollars 1/100 cent cents
euros 1 euro euros eur
yuan 1 yuan
sterling 1 sterling
yen 1 yen
rupees 1 rupees rupee
degrees 1 degrees degree deg
angle 1 radian radians rad
area 1 cm^2 square_centimeters square_cm sq_cm
area 10000 m^2 square_meters square_m sq_m
squarefeet 1/144 in^2 square_inches sq_in inches^2 inch^2
squarefeet 1 ft^2 square_feet sq_ft feet^2 foot^2
solid 1 cm^3 cubic_centimeters cubic_cm
solid 1000000 m^3 cubic_meters
cubicfeet 1/1728 in^3 cubic_inches inches^3
cubicfeet 1 ft^3 cubic_feet feet^3
"""
_NO_UNIT = ("unit", "units", "square units", "cubic units", "sq units", "units^2", "units^3")
_MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS_TEXT = """
or and not plus minus times over than to mod modulo base factorial squared cubed percent if when for where with only
more less each least most but half negative positive
"""
_NOT_UNITS = frozenset(_NOT_UNITS_TEXT.split())
"""Words after a number that say something about it which a unit does not."""
MAX_UNIT_WORDS = 4


def _unit_table() -> dict[str, Unit]:
    table = dict.fromkeys(_NO_UNIT, Unit()) | {"": Unit(), "%": Unit("%")}
    for line in _UNIT_TABLE.strip().split("\n"):
        dimension, size, *names = line.split()
        for name in names:
            table[name.replace("_", " ")] = Unit(dimension, Fraction(size))
    return table


_UNITS = _unit_table()
"""Spelling -> unit."""
DIMENSIONS = {unit.dimension for unit in _UNITS.values()}


def quantity(text: str) -> Quantity | None:
    """An exact number with its sign, percent or unit, from normalised text; None for everything else."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    unit = unit_of(match["rest"] or "")
    if unit is None:
        return None
    value = _value(match)
    if value is None:
        return None
    value = (-value if match["sign"] == "-" else value) * unit.multiplier
    percent = unit.dimension == "%"
    return Quantity(value, percent, "" if percent else unit.dimension, unit.size, match["name"] or "")


def unit_of(words: str) -> Unit | None:
    """What follows a number; unknown words are a dimension of their own; None if they are no unit."""
    words = re.sub(r"[{}]| (?=\^)|(?<=\^) ", "", words.strip().replace(".", "").lower())
    if words in _UNITS:
        return _UNITS[words]
    first, _, rest = words.partition(" ")
    if first in _MULTIPLIERS and (inner := unit_of(rest)):
        return replace(inner, multiplier=inner.multiplier * 10 ** _MULTIPLIERS[first])
    parts = re.split(r"[ .'/^-]+", words)
    speaks = len(parts[0]) >= 3 and max(map(len, parts)) >= 4
    if len(parts) > MAX_UNIT_WORDS or not speaks or _NOT_UNITS & set(parts):
        return None
    return Unit(words)


def same_quantity(a: Quantity, b: Quantity) -> bool | None:
    """One unit may be left out, but not be another; None where unknown words may or may not be the same unit."""
    if (a.percent and b.unit) or (b.percent and a.unit):
        return False
    if a.percent != b.percent:
        part, other = (a.value, b.value) if a.percent else (b.value, a.value)
        return part == other or part / 100 == other
    if not a.unit or not b.unit:
        return a.value == b.value
    if a.unit == b.unit:
        return a.value * a.size == b.value * b.size
    return None if a.value == b.value and not {a.unit, b.unit} <= DIMENSIONS else False


def _value(match: re.Match[str]) -> Fraction | None:
    groups = match.groupdict()
    if any(g is not None and len(g) > MAX_DIGITS for g in groups.values()):
        return None

    def first(*names: str) -> str:
        return next(v for v in map(groups.get, names) if v is not None)

    if groups["decimal"] is not None:
        exponent = int(groups["tens"] or groups["ten"] or groups["e"] or 0)
        if abs(exponent) > MAX_DIGITS:
            return None
        return _decimal(groups["decimal"]) * Fraction(10) ** exponent
    if groups["top4"] is not None:
        whole, top, bottom = Fraction(0), _decimal(groups["top4"]), _decimal(groups["bottom4"])
    else:
        whole = Fraction(groups["mixed"] or groups["mixed3"] or 0)
        top, bottom = Fraction(first("top", "top2", "top3")), Fraction(first("bottom", "bottom2", "bottom3"))
    return whole + top / bottom if bottom else None


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").replace(" ", "").rstrip(".")
    return Fraction(text or 0)
