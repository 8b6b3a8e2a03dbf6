"""Messages, and their text by hand from the spec, for the tests of the message format."""

from jaxmoe.chat import Wording, encode

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
WORDING = Wording(tools="TOOLS", response_format="FORMAT", developer="SAYS: ")
ADD = {"name": "add", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": {"name": "é"}}]
SECTION = 'TOOLS\n<functions>\n{"name": "add", "parameters": {"type": "object"}}\n{"name": "é"}\n</functions>\n'


def user(text="hi"):
    return {"role": "user", "content": text}


def says(content="", reasoning=None, calls=None):
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ]
    return message


def result(text, call_id=None):
    return {"role": "tool", "content": text} | ({"tool_call_id": call_id} if call_id else {})


def rendered(*messages, **options):
    return encode(messages, **({"add_bos": False, "wording": WORDING} | options))


CALL_F = """<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>"""
F = [("f", '{"x": 1}')]
FG = [("f", "{}"), ("g", "{}")]
CALLS_FG = """<｜DSML｜function_calls>
<｜DSML｜invoke name="f">

</｜DSML｜invoke>
<｜DSML｜invoke name="g">

</｜DSML｜invoke>
</｜DSML｜function_calls>"""
