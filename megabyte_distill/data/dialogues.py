"""One raw record to a dialogue: ``messages`` as in Hugging Face's chat data sets, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from megabyte_distill.data.chat_template import ASSISTANT, ChatTemplate, MarkedText, TemplateError, Turn
from megabyte_distill.data.records import (
    INVALID_JSON,
    MISSING_KEY,
    InvalidRecordError,
    OnInvalid,
    checked_text,
    decoded,
)

MESSAGES_KEY = "messages"
PROMPT, COMPLETION = "prompt", "completion"
TOOLS = "tools"
_READ = ("role", "content", "name")
"""A message's keys; a name says the role again and is not written."""
NOT_A_DIALOGUE, NO_ANSWER, NOT_WRITTEN = "not a dialogue", "no answer to train on", "not what the template can write"


def dialogues_of(
    payload: bytes,
    keys: Sequence[str],
    on_invalid: OnInvalid,
    template: ChatTemplate,
    normalize: Callable[[str], str],
) -> tuple[MarkedText, ...]:
    """A JSON record's dialogues, one a key; InvalidRecordError where it has none that can be trained on.

    ``normalize``: what the tokenizer does to the texts afterwards.
    """
    replace = on_invalid is OnInvalid.REPLACE
    content = _parsed(payload, replace)
    return tuple(_written(_turns(content, key, replace), template, normalize) for key in keys)


def _parsed(line: bytes, replace: bool) -> dict[str, Any]:
    try:
        content: Any = orjson.loads(line)
    except orjson.JSONDecodeError:  # half surrogate pairs and what is no UTF-8 are judged below
        try:
            content = json.loads(decoded(line, replace).removeprefix("\ufeff"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InvalidRecordError(INVALID_JSON, f"invalid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidRecordError(INVALID_JSON, f"expected a JSON object, got {type(content).__name__}")
    return content


def _turns(content: dict[str, Any], key: str, replace: bool) -> list[Turn]:
    if content.get(TOOLS):
        raise _would_be_lost("the record", TOOLS, "a dialogue without tools: write them into a message's content")
    if key in content:
        turns = _messages(content[key], key, replace)
    elif key == MESSAGES_KEY and PROMPT in content and COMPLETION in content:
        prompt = _side(content[PROMPT], PROMPT, "user", replace)
        # an answer that the prompt quotes is part of the prompt
        turns = [turn._replace(is_answer=False) for turn in prompt]
        turns += _side(content[COMPLETION], COMPLETION, ASSISTANT, replace)
    else:
        there = ", ".join(map(repr, content)) or "none"
        pair = f", nor {PROMPT!r} with {COMPLETION!r}" if key == MESSAGES_KEY else ""
        raise InvalidRecordError(MISSING_KEY, f"no key {key!r}{pair}; it has {there}")
    if not any(turn.is_answer for turn in turns):
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns)) or "none"
        raise InvalidRecordError(NO_ANSWER, f"no message of the role {ASSISTANT!r} to train on; its roles are {roles}")
    return turns


def _side(value: Any, key: str, role: str, replace: bool) -> list[Turn]:
    """A prompt or a completion: a text, or messages."""
    if isinstance(value, str):
        return [Turn(role, checked_text(value, repr(key), replace), role == ASSISTANT)]
    return _messages(value, key, replace)


def _messages(value: Any, key: str, replace: bool) -> list[Turn]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        got = "a list with others" if isinstance(value, list) else type(value).__name__
        raise InvalidRecordError(NOT_A_DIALOGUE, f"{key!r} is {got}, expected a list of objects with role and content")
    turns = []
    for number, message in enumerate(value, start=1):
        parts = {}
        for name in ("role", "content"):
            part = message.get(name)
            if not isinstance(part, str):
                got = "missing" if name not in message else type(part).__name__
                raise InvalidRecordError(NOT_A_DIALOGUE, f"{name} of message {number} is {got}, expected text")
            parts[name] = checked_text(part, f"{name} of message {number}", replace)
        others = [name for name, part in message.items() if part and name not in _READ]
        if others:
            raise _would_be_lost(f"message {number}", others[0], "role and content alone: write it into content")
        turns.append(Turn(parts["role"], parts["content"], parts["role"] == ASSISTANT))
    return turns


def _would_be_lost(holder: str, key: str, expected: str) -> InvalidRecordError:
    return InvalidRecordError(
        NOT_A_DIALOGUE, f"{holder} has {key!r}, which would be lost; expected {expected}, or remove it"
    )


def _written(turns: Sequence[Turn], template: ChatTemplate, normalize: Callable[[str], str]) -> MarkedText:
    try:
        return template.write(turns, normalize)
    except TemplateError as error:
        raise InvalidRecordError(NOT_WRITTEN, str(error)) from error
