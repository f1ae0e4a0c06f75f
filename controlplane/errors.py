"""Operating failures of the control plane and of its wire format.

SlackwaterError            anything below; `permanent` says whether trying again can help
├── ProtocolError          a frame that is not what the protocol allows; the connection is closed
└── ConfigError            a setting that is missing, mistyped or impossible: no start

An expected refusal (quota, full queue) is a value, `domain.Rejected`, and never an exception.
"""


class SlackwaterError(Exception):
    """Base of our operating failures; the message carries the ids that are needed to act on it."""

    permanent = True


class ProtocolError(SlackwaterError):
    """A peer sent bytes that do not decode to a message it may send."""


class ConfigError(SlackwaterError):
    """A setting stops the start; the message names the key, its value and what is allowed."""
