"""A real server with the real model for OpenAI's own client; the model's template knows tools."""

import json
from pathlib import Path

import pytest

from tests.e2e.harness import Server, demo_model_folder

# As Hermes and Qwen tell a model of tools and read its calls.
TEMPLATE = """{%- if tools %}<|im_start|>system
You may call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer a call as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MODEL = "smollm2"


def folder_with_tools(made: Path) -> Path:
    """The demo model's files under another name, with a chat template that knows tools."""
    original = demo_model_folder()
    made.mkdir()
    for path in original.iterdir():
        if path.name != "tokenizer_config.json":
            (made / path.name).symlink_to(path)
    config = json.loads((original / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("conformance")
    folder = folder_with_tools(base / MODEL)
    options = ("--workers", "mixed=1", "--model", str(folder), "--model-id", MODEL)
    served = Server(base / "var", options=options, model_id=MODEL)
    yield served.start(num_workers=1)
    served.stop()


@pytest.fixture(scope="session")
def client(server):
    """Retries off: what the server answers is what is seen."""
    with server.client() as made:
        yield made
