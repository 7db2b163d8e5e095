"""Dialogues as text: turns between marks, by a built-in template or by a Jinja one, and which of it is an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

CHATML = "chatml"
TEACHER = "teacher"
ASSISTANT = "assistant"
_OPEN, _CLOSE = "<|im_start|>", "<|im_end|>"
_CONFIG_FILE, _TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_NO_EOS = f"it uses eos_token, which {_CONFIG_FILE} beside the tokenizer does not name; put it there"


class Turn(NamedTuple):
    """One message."""

    role: str
    content: str
    is_answer: bool
    """Whether it is trained on."""


class MarkedText(NamedTuple):
    """A dialogue as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """(start, end) in characters of each answer and the mark that ends its turn."""
    ends_with_answer: bool
    """Whether the text ends with the last of them: the end of the document is trained as well then."""


class TemplateError(ValueError):
    """A dialogue that a template cannot write."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How turns become text; small and hashable, it travels to the workers."""

    name: str
    source: str = ""
    """Of the Jinja template; empty for the built-in one."""
    end_of_text: str = ""
    """What a Jinja template calls eos_token; empty where none is known: one that writes it is refused then. Its
    bos_token is empty: the byte BOS stands there already."""

    @property
    def identity(self) -> str:
        """Says which template it is, whatever its file is called."""
        content = json.dumps([self.source, self.end_of_text]).encode("utf-8", "surrogatepass")
        return f"jinja {hashlib.sha256(content).hexdigest()[:16]}" if self.source else self.name

    def write(self, turns: Sequence[Turn], normalize: Callable[[str], str] = str) -> MarkedText:
        """The dialogue's text. TemplateError where it cannot be written so that answers are told from prompts.

        ``normalize``: what becomes of the text behind this; the built-in template looks for its marks there as well.
        """
        text, answers = _by_jinja(self, turns) if self.source else _by_chatml(turns, normalize)
        return MarkedText(text, answers, bool(turns) and turns[-1].is_answer)


def _by_chatml(turns: Sequence[Turn], normalize: Callable[[str], str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    text, answers = "", []
    for number, turn in enumerate(turns, start=1):
        # a byte model has no special tokens: in a message the mark would be a turn of its own, also where it becomes
        # one later, as full-width ＜|im_end|＞ does under NFKC
        roles, contents = ((part, normalize(part)) for part in (turn.role, turn.content))
        if any(mark in part for mark in (_OPEN, _CLOSE) for part in (*roles, *contents)) or "\n" in "".join(roles):
            raise TemplateError(f"message {number} holds a mark of the template, {_OPEN}, {_CLOSE} or a role's newline")
        text += f"{_OPEN}{turn.role}\n"
        start = len(text)
        text += f"{turn.content}{_CLOSE}\n"
        if turn.is_answer:
            answers.append((start, len(text)))
    return text, tuple(answers)


def _by_jinja(template: ChatTemplate, turns: Sequence[Turn]) -> tuple[str, tuple[tuple[int, int], ...]]:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text, answers = _rendered(template, messages), []
    for number, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        before = _rendered(template, messages[:number], add_generation_prompt=True)
        behind = _rendered(template, messages[: number + 1])
        if not (behind.startswith(before) and text.startswith(behind)):
            raise TemplateError(
                f"the chat template {template.name} writes message {number + 1} otherwise once it is answered or "
                f"others follow, so that its bytes cannot be told; take --chat-template {CHATML}, or a template that "
                "only adds to what stands there"
            )
        answers.append((len(before), len(behind)))
    return text, tuple(answers)


def _rendered(template: ChatTemplate, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    import jinja2

    try:
        text: str = _compiled(template.source).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token="",
            # as nothing, answers would have no end of turn
            eos_token=template.end_of_text or jinja2.StrictUndefined(hint=_NO_EOS),
            tools=None,
            documents=None,
        )
        return text
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # a template is a program: on some record it may divide by zero
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise TemplateError(f"the chat template {template.name} refuses it ({kind}{error})") from error


@cache
def _compiled(source: str) -> Any:
    """As transformers compiles it: sandboxed, blocks trimmed, with ``raise_exception`` and ``{% generation %}``."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` … ``{% endgeneration %}`` mark answers for transformers; what is between them stays."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    # no strftime_now: what is written must not depend on the day
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def load_template(given: str, tokenizer_model: str) -> ChatTemplate:
    """The template that ``--chat-template`` names: built in, of the teacher's folder, or in a file.

    ValueError where there is none, it is damaged, or jinja2 is missing.
    """
    if given == CHATML:
        return ChatTemplate(CHATML)
    folder = Path(tokenizer_model) if Path(tokenizer_model).is_dir() else Path(tokenizer_model).parent
    config = _config(folder / _CONFIG_FILE)
    source = _of_teacher(folder, config) if given == TEACHER else _file(Path(given))
    try:
        import jinja2

        _compiled(source)
    except ImportError as error:
        raise ValueError(
            f"--chat-template {given} is a Jinja template and needs the package jinja2; install it, or take "
            f"--chat-template {CHATML}"
        ) from error
    except jinja2.TemplateError as error:
        raise ValueError(f"--chat-template {given}: not a Jinja template ({error})") from error
    eos = config.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    return ChatTemplate(given, source, text if isinstance(text, str) else "")


def _of_teacher(folder: Path, config: dict[str, Any]) -> str:
    if (folder / _TEMPLATE_FILE).is_file():
        return _file(folder / _TEMPLATE_FILE)
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    if not isinstance(found, str) or not found:
        raise ValueError(
            f"--chat-template {TEACHER}: {folder} has no template, neither {_TEMPLATE_FILE} nor an entry "
            f"chat_template in {_CONFIG_FILE}; take --chat-template {CHATML}, or name a file"
        )
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}


def _file(path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--chat-template {path}: cannot be read ({error}); expected {CHATML}, {TEACHER}, or a file with a Jinja "
            "template"
        ) from error
    if not source:
        raise ValueError(f"--chat-template {path}: the file is empty")
    return source
