"""The first call of the API in three languages, with the address that this page was read from."""

from dataclasses import dataclass

from django.http import HttpRequest

MODEL_UNKNOWN = "MODEL"


@dataclass(frozen=True, slots=True)
class Snippet:
    """Code that can be copied; `name` is its language."""

    name: str
    text: str


def base_url(request: HttpRequest) -> str:
    """Where clients of the API point to: this host as the reader reaches it."""
    return request.build_absolute_uri("/v1")


def of_chat(url: str, model_id: str) -> list[Snippet]:
    """One chat with `model_id`; the key is read from the environment, so none stands in a file."""
    curl = f"""curl -N {url}/chat/completions \\
  -H "Authorization: Bearer $SLACKWATER_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "{model_id}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'"""  # noqa: E501
    python = f"""import os
from openai import OpenAI

client = OpenAI(base_url="{url}", api_key=os.environ["SLACKWATER_KEY"])
answer = client.chat.completions.create(
    model="{model_id}", messages=[{{"role": "user", "content": "Hello"}}]
)
print(answer.choices[0].message.content)"""
    script = f"""import OpenAI from "openai";

const client = new OpenAI({{ baseURL: "{url}", apiKey: process.env.SLACKWATER_KEY }});
const answer = await client.chat.completions.create({{
  model: "{model_id}", messages: [{{ role: "user", content: "Hello" }}],
}});
console.log(answer.choices[0].message.content);"""
    return [Snippet("curl", curl), Snippet("Python", python), Snippet("JavaScript", script)]
