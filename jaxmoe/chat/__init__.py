"""Messages to the text a V3.2 model reads, and the text it writes to messages (post-training spec, section 3).

``encode`` renders OpenAI-style messages, ``encode_pieces`` tells what of it the assistant says; ``parse`` and
``StreamParser`` read an assistant message back. Pure functions of strings: which of the special tokens are single ids is the
tokenizer's matter.
"""

from jaxmoe.chat._dsml import SPECIAL_TOKENS
from jaxmoe.chat._encode import (
    DROP_EARLIER,
    KEEP_ALL,
    KEEP_TOOL_TURNS,
    Piece,
    ReasoningPolicy,
    Wording,
    encode,
    encode_pieces,
)
from jaxmoe.chat._parser import (
    ChatFormatError,
    Delta,
    ParsedMessage,
    StreamParser,
    ToolCall,
    parse,
)

__all__ = [
    "DROP_EARLIER",
    "KEEP_ALL",
    "KEEP_TOOL_TURNS",
    "SPECIAL_TOKENS",
    "ChatFormatError",
    "Delta",
    "ParsedMessage",
    "Piece",
    "ReasoningPolicy",
    "StreamParser",
    "ToolCall",
    "Wording",
    "encode",
    "encode_pieces",
    "parse",
]
