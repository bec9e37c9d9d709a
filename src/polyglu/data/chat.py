r"""Chat format (ChatML): ``<|im_start|>role\ncontent<|im_end|>\n``, one turn after the other.

    tokens   <|im_start|> user\n2+2?  <|im_end|> \n <|im_start|> assistant\n  4  <|im_end|> \n
    learned        -          -           -      -        -           -       x      x      -

Text of a turn never becomes a special token, whatever it spells. An assistant turn with ``reasoning_content`` is
``<think>\n{reasoning}\n</think>\n\n{content}``; the two markers are single tokens where the vocabulary has them.
"""

from collections.abc import Mapping, Sequence

from polyglu.data.tokenizer import IM_END, IM_START, Tokenizer
from polyglu.errors import PolygluError

ROLES = ("system", "user", "assistant")
THINK, END_THINK = "<think>", "</think>"

ANSWER_HEADER = "assistant\n"

Message = Mapping[str, str]
Segment = tuple[str | int, bool]
"""Text, or the id of a special token; and whether it is learned."""


def render_prompt(messages: Sequence[Message]) -> str:
    """Text of a conversation up to where the assistant's next answer begins, special tokens spelled out."""
    turns = "".join(f"{IM_START}{message['role']}\n{_content(message)}{IM_END}\n" for message in messages)
    return f"{turns}{IM_START}{ANSWER_HEADER}"


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    Raises:
        PolygluError: the tokenizer has no ChatML tokens.
    """
    im_start, _ = _special_ids(tokenizer)
    [(ids, _)] = encode_conversations([messages], tokenizer)
    return [*ids, im_start, *tokenizer.encode(ANSWER_HEADER)]


def encode_conversations(
    conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and for each token whether it is learned (assistant content and ``<|im_end|>``).

    Raises:
        PolygluError: the tokenizer has no ChatML tokens.
    """
    segments = [_segments(messages, tokenizer) for messages in conversations]
    texts = [text for conversation in segments for text, _ in conversation if isinstance(text, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    result = []
    for conversation in segments:
        ids: list[int] = []
        learned: list[bool] = []
        for text_or_id, is_learned in conversation:
            part = next(encoded) if isinstance(text_or_id, str) else [text_or_id]
            ids += part
            learned += [is_learned] * len(part)
        result.append((ids, learned))
    return result


def _segments(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Segment]:
    im_start, im_end = _special_ids(tokenizer)
    segments: list[Segment] = []
    for message in messages:
        if message["role"] == "assistant":
            # Header and answer apart, as in generation, where the header is there before the answer.
            turn = [(ANSWER_HEADER, False), *((part, True) for part in _answer(message, tokenizer)), (im_end, True)]
        else:
            turn = [(f"{message['role']}\n{message['content']}", False), (im_end, False)]
        segments += [(im_start, False), *turn, ("\n", False)]
    return segments


def _answer(message: Message, tokenizer: Tokenizer) -> list[str | int]:
    """Text of an assistant turn, the markers of its reasoning as single tokens where the vocabulary has them."""
    reasoning = message.get("reasoning_content")
    think, end_think = tokenizer.token_id(THINK), tokenizer.token_id(END_THINK)
    if not reasoning or think is None or end_think is None:
        return [_content(message)]
    return [think, f"\n{reasoning}\n", end_think, f"\n\n{message['content']}"]


def _content(message: Message) -> str:
    reasoning = message.get("reasoning_content")
    return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{message['content']}" if reasoning else message["content"]


def _special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
        raise PolygluError(
            f"tokenizer {tokenizer.name} has no {IM_START} and {IM_END}, which the chat format needs; use another one."
        )
    return tokenizer.im_start_id, tokenizer.im_end_id
