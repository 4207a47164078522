"""Special values among token ids and labels, shared by data, model and training.

They are the published values, so that token ids and labels can be compared with reference data directly.
"""

from __future__ import annotations

from typing import Final

IMAGE_TOKEN: Final = "<image>"
"""Text of the placeholder in a conversation, once for each image."""
IMAGE_TOKEN_ID: Final = -200
"""Id of the placeholder in stored samples; the model puts the image's visual tokens in its place."""
IGNORE_INDEX: Final = -100
"""Label of a position whose next token is not a target."""
