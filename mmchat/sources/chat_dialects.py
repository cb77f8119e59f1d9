"""How the field's trainers write a conversation in a row, brought to one form: messages in order.

Read are LLaVA's and ShareGPT's `conversations`, chat `messages`, pairs of a question and an answer, alpaca's columns,
and prompts with completions. Sources of the formats: the READMEs, documentation and converters of LLaVA, Qwen-VL,
LLaMA-Factory, ms-swift and TRL.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmchat.conversation import Role
from mmchat.errors import SampleError

# A tool's result is told to the model, so it is the user's; a call of a tool is said by the model.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "observation": "user",
    "tool": "user",
    "tool_response": "user",
    "function_response": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
}

TOOL_ROLES = ("observation", "tool", "tool_response", "function_response", "function_call", "tool_call")

TURNS = ("conversations", "messages", "conversation", "texts")
QUESTIONS = ("prompt", "query", "question", "problem")
ANSWERS = ("completion", "output", "response", "chosen", "answer")
SYSTEMS = ("system", "system_prompt")
# Of an assistant's message: ms-swift's, OpenAI's and ms-swift's again; a weight other than 0 is read as 1.
LEARNED = ("loss", "weight", "loss_scale")
# Preference data without pairs (TRL and ms-swift; LLaMA-Factory): false marks an answer that is not wanted.
WANTED = ("label", "kto_tag")

# LLaMA-Factory's dataset_info.json: what it calls a column and a role, and their names here. Its default roles are in
# ROLES under their own names.
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"} | {
    name: name for name in ("history", "messages", "system", "tools", "images", "videos", "audios", "chosen", "kto_tag")
}
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Message:
    """One message; its content is text with placeholders in it, or a list of content parts."""

    role: Role
    content: str | list[Any]
    learn: bool | None = None


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row; of preferences, those with the chosen answer. Raises SampleError."""
    if mark := next((name for name in WANTED if row.get(name) is False), None):
        raise SampleError("rejected answer", f"{mark} is false: this answer is an example of what not to say")
    turns = _first(row, TURNS)
    if turns is None:
        turns = [*_history(row), *_asked(row)]
    if not isinstance(turns, list):
        raise SampleError("no turns", f"wanted a list under {', '.join(map(repr, TURNS[:2]))}, found {turns!r:.200}")
    messages = list(itertools.chain.from_iterable(map(_messages, turns)))
    if not messages or messages[-1].role != "assistant":
        messages = _answered(messages, row)
    if not messages:
        raise SampleError("no turns", f"wanted 'conversations' or 'messages', found {', '.join(row):.200}")
    system = _first(row, SYSTEMS)
    if isinstance(system, str) and system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return messages


def translated(row: dict[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the columns and roles that LLaMA-Factory's dataset_info.json gives, under their names here.

    As there, columns that the entry does not name are not read.
    """
    columns = entry.get("columns") or DEFAULT_COLUMNS
    found = {here: row.get(columns[there]) for there, here in COLUMNS.items() if columns.get(there)}
    found["id"] = row.get("id")
    tags = entry.get("tags") or {}
    says, what = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    roles = {tags[tag]: role for tag, role in TAGS.items() if tag in tags}

    def message(one: Any) -> Any:
        if not isinstance(one, dict) or not isinstance(one.get(says), str):
            return one
        return one | {"role": roles.get(one[says], one[says]), "content": one.get(what)}

    if isinstance(turns := found.get("messages"), list):
        found["messages"] = [message(one) for one in turns]
    if "chosen" in found:
        found["chosen"] = message(found["chosen"])
    return found


def _first(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these columns that has a value; a table keeps null where a row lacks a column."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _history(row: Mapping[str, Any]) -> Iterator[Any]:
    found = row.get("history") or []
    for pair in found if isinstance(found, list) else [found]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SampleError("unreadable history", f"wanted pairs of question and answer, found {pair!r:.200}")
        yield {"user": pair[0], "assistant": pair[1]}


def _asked(row: Mapping[str, Any]) -> list[Any]:
    """The question of a row without turns; alpaca writes it in two columns."""
    asked = [row[name] for name in ("instruction", "input") if isinstance(row.get(name), str) and row[name]]
    if asked:
        return [{"role": "user", "content": "\n".join(asked)}]
    found = _first(row, QUESTIONS)
    if isinstance(found, list):
        return found
    return [] if found is None else [{"role": "user", "content": found}]


def _answered(messages: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages with the row's answer, which may be text, a message, several, or the whole conversation."""
    found = _first(row, ANSWERS)
    if found is None:
        return messages
    turns = found if isinstance(found, list) else [found]
    answer = [m for turn in turns for m in _messages({"assistant": turn} if isinstance(turn, str) else turn)]
    return answer if answer and answer[0].role != "assistant" else messages + answer


def _messages(turn: Any) -> Iterator[Message]:
    """The message of a turn; both messages where a turn is a pair such as {"user": ..., "assistant": ...}."""
    if not isinstance(turn, dict) or not isinstance(turn.get("learn"), bool | None):
        raise SampleError("unreadable turn", f"{turn!r:.200}")
    name = _first(turn, ("role", "from"))
    if name is None and (pair := [(key, value) for key, value in turn.items() if key in ROLES and value is not None]):
        for key, value in pair:
            yield Message(ROLES[key], _content(value), turn.get("learn"))
        return
    if not isinstance(name, str) or name not in ROLES:
        raise SampleError("unknown role", f"{name!r:.100} is none of {', '.join(ROLES)}")
    content = _first(turn, ("content", "value"))
    if name in TOOL_ROLES and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if turn.get("tool_calls") and isinstance(turn["tool_calls"], list):  # OpenAI's; often instead of any content
        calls = [call.get("function", call) if isinstance(call, dict) else call for call in turn["tool_calls"]]
        said = [content] if isinstance(content, str) and content else _content(content or [])
        content = [*said, json.dumps(calls, ensure_ascii=False)]
    yield Message(ROLES[name], _content(content), _learn(turn, ROLES[name]))


def _content(found: Any) -> str | list[Any]:
    if isinstance(found, str | list):
        return found
    raise SampleError("unreadable turn", f"wanted text or a list, found {type(found).__name__}")


def _learn(turn: Mapping[str, Any], role: Role) -> bool | None:
    if turn.get("learn") is not None or role != "assistant":
        return turn.get("learn")
    found = _first(turn, LEARNED)
    if not isinstance(found, bool | int | float | None):
        raise SampleError("unreadable turn", f"wanted true, false or a number in {LEARNED}, found {found!r:.100}")
    return None if found is None else bool(found)
