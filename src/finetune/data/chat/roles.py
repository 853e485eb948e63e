"""The roles of messages: their other names, and a word about those that few chat templates write."""

import logging
from functools import cache

from finetune.errors import nearest, ticked

logger = logging.getLogger(__name__)

ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def known_role(role: str, *, alias: bool) -> str:
    """Returns the role, under its usual name with `alias`; one that is not known here is warned of once.

    Templates decide which roles there are (`document`, `observation`, `thought`, ...), so none is refused, and those
    written for a template (`alias=False`) keep their names.

    >>> known_role("human", alias=True)
    'user'
    """
    role = ROLE_ALIASES.get(role, role) if alias else role
    if role not in KNOWN_ROLES:
        _warn_of(role)
    return role


@cache
def _warn_of(role: str) -> None:
    # The cache is what makes it once per process: a dataset may have the role in every row.
    logger.warning(
        "Messages have the role `%s`, which is none of %s. It goes to the chat template as it is, and only what the "
        "role `assistant` says counts as an answer.%s",
        role,
        ticked(KNOWN_ROLES),
        f" If it means `{ROLE_ALIASES[role]}`, rename it." if role in ROLE_ALIASES else nearest(role, KNOWN_ROLES),
    )
