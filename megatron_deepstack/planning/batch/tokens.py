"""Numbers that stand for something other than a word, shared by data, model and training.

Values are the published ones, so that token ids and labels can be compared with reference data as they are.
"""

from __future__ import annotations

from typing import Final

IMAGE_TOKEN: Final = "<image>"
"""Text of the placeholder in a conversation; one per image."""
IMAGE_TOKEN_ID: Final = -200
"""Id of the placeholder in stored samples; the model puts the image's visual tokens in its place."""
IGNORE_INDEX: Final = -100
"""Label of a position that is not learned."""
