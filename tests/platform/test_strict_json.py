"""Records that every JSON parser takes, NaN and infinities included, and that read back as they were."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_deepstack.platform.files.strict_json import from_line, to_line


def strictly(line: str) -> Any:
    """As parsers read it that know JSON alone."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


RECORDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "plain": ({"step": 1, "loss": 2.5, "samples": ["a"], "mfu": None}, {}),
    "nan": ({"step": 3, "loss": math.nan}, {"loss": "nan"}),
    "infinities": ({"loss": math.inf, "gradient_norm": -math.inf}, {"loss": "inf", "gradient_norm": "-inf"}),
    "in a mapping": ({"seconds": {"data": math.nan, "route": 1.0}}, {"seconds/data": "nan"}),
    "in a list": ({"losses": [1.0, math.inf, [math.nan]]}, {"losses/1": "inf", "losses/2/0": "nan"}),
}


@pytest.mark.parametrize(("record", "names"), RECORDS.values(), ids=RECORDS)
def test_there_and_back(record: dict[str, Any], names: dict[str, str]) -> None:
    line = to_line(record)
    assert strictly(line).get("not_finite", {}) == names
    assert repr(from_line(line)) == repr(record)


def test_what_earlier_versions_wrote_is_read() -> None:
    assert math.isnan(from_line('{"loss": NaN}')["loss"])
    assert from_line('{"loss": -Infinity}')["loss"] == -math.inf
    assert from_line("[1, 2]") == [1, 2]
    with pytest.raises(ValueError, match="Unterminated"):
        from_line('{"step": 12, "lo')
