"""Words of an answer as the VQA challenge compares them (Antol et al., 2015, section 3.3 and its evaluation code).

Punctuation goes, numbers up to ten become digits, articles go, and contractions get their apostrophe.
"""

from __future__ import annotations

import re
from typing import Final

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"\d,+\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
"""A period, but not a decimal point."""
_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS: Final = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES: Final = ("a", "an", "the")
_CONTRACTED: Final = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, character in enumerate(word) if character == "'"]


_CONTRACTIONS: Final = {bare: word for word in _CONTRACTED.split() for bare in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}
"""What stands for what; the last entry is the other way round in the challenge's own list."""


def normalised(answer: str) -> str:
    """An answer in the form in which the challenge compares answers.

    Args:
        answer: Any text.

    Returns:
        Its words in lower case, joined by single spaces; may be empty.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        goes = joined or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if goes else " ")
    plain = _PERIOD.sub("", plain)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
