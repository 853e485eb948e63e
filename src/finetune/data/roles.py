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


def known_role(role: str) -> str:
    """Returns the name that chat templates have for a role; one not known here stays, and is warned of once.

    Templates decide which roles there are (`document`, `control`, `thought`, ...), so none is refused here.

    >>> known_role("human")
    'user'
    """
    role = ROLE_ALIASES.get(role, role)
    if role not in KNOWN_ROLES:
        _warn_of(role)
    return role


@cache
def _warn_of(role: str) -> None:
    # The cache is what makes it once per process: a data set may have the role in every row.
    logger.warning(
        "Messages have the role `%s`, which is none of %s. It goes to the chat template as it is, and only what the "
        "role `assistant` says counts as an answer.%s",
        role,
        ticked(KNOWN_ROLES),
        nearest(role, (*KNOWN_ROLES, *ROLE_ALIASES)),
    )
