"""The fixed text around turns: written out, or taken from the tokenizer's own chat template."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mmchat.conversation import Role


@dataclass(frozen=True)
class ChatFormat:
    """The fixed text around turns.

    A turn is prefix + content + end + tail; `end` is what the model learns to say when it is done. `begin` opens a
    conversation that has no system turn, `begin_system` one that has; system None: the format has no such role.
    joins: text between special tokens and media is tokenised in one piece, as in a prompt that is tokenised whole;
    otherwise each part of it is on its own.
    """

    begin: str
    begin_system: str
    system: tuple[str, str] | None  # prefix, end and tail together
    user: tuple[str, str]
    assistant: tuple[str, str, str]  # prefix, end, tail
    joins: bool = False


CHATML = ChatFormat(
    begin="",
    begin_system="",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>", "\n"),
)


def chat_format(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format of that name; `auto` takes the tokenizer's own template apart.

    Raises:
        ValueError: the template is absent, or is not made of turns one after the other.
    """
    end = tokenizer.eos_token or ""
    match name:
        case "chatml":
            return CHATML
        case "vicuna":
            return ChatFormat("", "", ("", " "), ("USER: ", " "), ("ASSISTANT: ", end, ""))
        case "plain":
            return ChatFormat("", "", ("", "\n"), ("User: ", "\n"), ("Assistant: ", end, "\n"))
        case "llava":  # of LLaVA-1.5 as transformers has it
            begin = tokenizer.bos_token if _adds_begin(tokenizer) else ""
            return ChatFormat(begin, begin, ("", " "), ("USER: ", " "), ("ASSISTANT: ", end, ""), joins=True)
    if not tokenizer.chat_template:
        raise ValueError("chat.format: auto needs a tokenizer with a chat template; choose chatml, vicuna or plain")
    return _take_apart(tokenizer)


def _adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-text token before what it is given."""
    ids: list[int] = tokenizer("x").input_ids
    return tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id


def _take_apart(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Renders probe conversations through the tokenizer's template and reads the fixed text off them."""

    def rendered(*turns: tuple[Role, str], answer: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))

    u1, a1, u2, a2, s = "QX1XQ", "QX2XQ", "QX3XQ", "QX4XQ", "QX0XQ"
    talk: list[tuple[Role, str]] = [("user", u1), ("assistant", a1), ("user", u2), ("assistant", a2)]
    whole = rendered(*talk)
    pieces = [whole]
    for probe in (u1, a1, u2, a2):
        before, found, after = pieces.pop().partition(probe)
        if not found:
            raise ValueError("chat.format: auto: this template changes what is said; choose chatml, vicuna or plain")
        pieces += [before, after]
    opening, to_assistant, to_user, to_assistant_again, closing = pieces
    prompt = rendered(talk[0], answer=True)
    assistant_prefix = prompt.partition(u1)[2]
    user_close = to_assistant
    for start in range(len(to_assistant) + 1):  # the longest end of `to_assistant` that the generation prompt ends in
        if assistant_prefix.endswith(to_assistant[start:]) and rendered(talk[0]).endswith(u1 + to_assistant[:start]):
            user_close, assistant_prefix = to_assistant[:start], to_assistant[start:]
            break
    common = 0
    while common < min(len(to_user), len(closing)) and to_user[common] == closing[common]:
        common += 1
    assistant_close, user_prefix = to_user[:common], to_user[common:]
    end, tail = _split_end(assistant_close, tokenizer)
    begin = opening.removesuffix(user_prefix)
    system: tuple[str, str] | None = None
    begin_system = begin
    try:
        with_system = rendered(("system", s), talk[0])
    except Exception:  # a template refuses a role by raising whatever its author chose
        with_system = ""
    before, found, after = with_system.partition(s)
    between = after.partition(u1)[0]
    if found and between.endswith(user_prefix) and u1 in after:
        bos = tokenizer.bos_token or ""
        begin_system = bos if bos and before.startswith(bos) and begin.startswith(bos) else ""
        system = (before.removeprefix(begin_system), between.removesuffix(user_prefix))
    made = begin + user_prefix + u1 + user_close + assistant_prefix + a1 + assistant_close
    made += user_prefix + u2 + user_close + assistant_prefix + a2
    if to_assistant != to_assistant_again or not whole.startswith(made):
        raise ValueError(
            "chat.format: auto cannot take this tokenizer's template apart (its turns are not simply one after the "
            "other); choose chatml, vicuna or plain"
        )
    return ChatFormat(begin, begin_system, system, (user_prefix, user_close), (assistant_prefix, end, tail))


def _split_end(close: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Splits what follows an answer after its first special token; without one, the end-of-text token is added."""
    ends = [close.index(token) + len(token) for token in tokenizer.get_added_vocab() if token and token in close]
    if ends:
        return close[: min(ends)], close[min(ends) :]
    return tokenizer.eos_token or "", close
