"""Why an architecture was not built, in a few words."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The first that fits any of the failures counts.
REASONS = (
    (r"requires the (\w+) library|No module named '(\w+)'", "needs {}, which is not installed"),
    (r"no class|transformers has no", "transformers has no model class for it"),
    (r"config \(all\)", "the small config is refused"),
    (r"backbone is not set|'NoneType' object|has no attribute", "no working defaults"),
    (r"positional argument|must be|You have to|specify|Make sure", "takes inputs not made here"),
    (r"^run", "sizes of the small config or of the inputs do not fit"),
    (r"million parameters|allocate memory", "too large where it is not made small"),
    (r"", "other"),
)  # fmt: skip


def why(failures: Sequence[str]) -> str:
    """The kind of reason, by what was said when it was tried."""
    said = "\n".join(failures or ["no class"])
    for pattern, reason in REASONS:
        if match := re.search(pattern, said, re.MULTILINE):
            return reason.format(next(filter(None, match.groups()), ""))
    raise AssertionError("the last pattern fits everything")
