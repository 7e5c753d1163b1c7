"""Chat templates that treat tools as those of known families do, without these families' other features."""

from __future__ import annotations

QWEN = """\
{%- macro system(text) %}{{ '<|im_start|>system\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{%- set own = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {%- set listed %}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{% endset %}
    {{- system(own + '\\n\\n# Tools\\n\\n<tools>' + listed + '\\n</tools>\\n\\nUse <tool_call></tool_call>.') }}
{%- elif own %}{{ system(own) }}{% endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {#- A template of a thinking model splits the text, and fails without one. #}
        {%- set said = message.content.split('</think>')[-1] %}
        {%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- said }}
        {%- for call in message.tool_calls %}
            {%- if said or not loop.first %}{{ '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content | trim + '<|im_end|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' and loop.first and tools is not none %}
        {{- '<|im_start|>user\\nRespond with {"name": function name, "parameters": arguments}.\\n\\n' }}
        {%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
        {{- message.content | trim + '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
        {{- '<|im_end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>ipython\\n' + message.content | tojson + '<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

MISTRAL = """\
{%- macro nine(id) %}{% if id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}{% endmacro %}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set listed = tools and message == asked[-1] %}
        {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' if listed else '' }}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {{- nine(call.id) + (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- nine(message.tool_call_id) + '[TOOL_RESULTS]{"content": ' + message.content }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL_NAMED = """\
{{- bos_token }}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- for call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""

GRANITE = """\
{%- if tools %}
    {{- '<|start_of_role|>system<|end_of_role|>Respond with <|tool_call|> and a JSON list of tools.<|im_end|>\\n' }}
    {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""

SMOLLM3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n### Tools\\n' }}
    {%- for tool in tools %}{{ tool.function | string + '\\n' }}{% endfor %}
    {{- 'Return a JSON object within <tool_call></tool_call> XML tags.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

PHI4 = """\
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ '<|tool_response|>' + message.content | tojson + '<|im_end|>' }}
    {%- else %}
        {{- '<|' + message.role + '|>' + message.content }}
        {%- if loop.first and tools %}
            {%- for tool in tools %}{{ '<|tool|>' + tool.function | tojson + '<|/tool|>' }}{% endfor %}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '<|tool_call|>' + call.function | tojson + '<|/tool_call|>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

GEMMA3 = """\
{{- bos_token }}
{%- set ns = namespace(first='') %}
{%- if messages[0].role == 'system' %}
    {%- set ns.first = messages[0].content + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {{- '<|im_start|>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- (ns.first if loop.first else '') + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}
"""

FUNCTION_GEMMA = """\
{%- macro value(given) %}
    {%- if given is string %}{{ '<escape>' + given + '<escape>' }}
    {%- elif given is mapping %}
        {{- '{' }}
        {%- for key, item in given | dictsort %}
            {{- (',' if not loop.first else '') + key + ':' + value(item) }}
        {%- endfor %}
        {{- '}' }}
    {%- elif given is iterable %}
        {{- '[' }}{% for item in given %}{{ (',' if not loop.first else '') + value(item) }}{% endfor %}{{ ']' }}
    {%- else %}{{ given | tojson }}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- set own = messages[0].content if messages[0].role in ('system', 'developer') else '' %}
{%- if own or tools %}
    {{- '<|im_start|>developer\\n' + own }}
    {%- for tool in tools or [] %}
        {{- '<start_function_declaration>declaration:' + tool.function.name }}
        {{- value({'description': tool.function.description, 'parameters': tool.function.parameters}) }}
        {{- '<end_function_declaration>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role not in ('system', 'developer') %}
    {%- if message.role == 'tool' %}
        {{- '<start_function_response>response:' + message.name | default('') + value({'value': message.content}) }}
        {{- '<end_function_response>' }}
    {%- else %}
        {{- '<|im_start|>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '<start_function_call>call:' + call.function.name + value(call.function.arguments) }}
            {{- '<end_function_call>' }}
        {%- endfor %}
        {{- '<start_function_response>' if message.tool_calls and loop.last else '' }}
        {{- '<|im_end|>\\n' if not message.tool_calls else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}
"""

GEMMA4 = FUNCTION_GEMMA
for _own, _other in {
    "<escape>": '<|"|>',
    "<start_function_declaration>": "<|tool>",
    "<end_function_declaration>": "<tool|>",
    "<start_function_call>": "<|tool_call>",
    "<end_function_call>": "<tool_call|>",
    "<start_function_response>": "<|tool_response>",
    "<end_function_response>": "<tool_response|>",
    "developer\\n": "system\\n",
}.items():
    GEMMA4 = GEMMA4.replace(_own, _other)

NOT_JSON = """\
{%- for tool in tools or [] %}{{ '<declaration>' + tool | tojson + '</declaration>' }}{% endfor %}
{%- for message in messages %}
    {{- message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls %}
        {{- '<start_function_call>call:' + call.function.name }}
        {%- for key, value in call.function.arguments.items() %}{{ key }}:<escape>{{ value }}<escape>{% endfor %}
    {%- endfor %}
{%- endfor %}
"""

FAMILIES = {
    "qwen": QWEN,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-named": MISTRAL_NAMED,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "phi4": PHI4,
    "gemma3": GEMMA3,
    "function-gemma": FUNCTION_GEMMA,
    "gemma4": GEMMA4,
    "not-json": NOT_JSON,
}
CONTROLS = ("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>")
"""Control tokens of these families' vocabularies, which stand for no text."""
