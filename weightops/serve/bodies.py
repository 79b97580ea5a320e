"""What requests may say: OpenAI's bodies, those of older programs, and the page's; what they mean as one kind of value.

OpenAI's API reference of 2026 for /v1/chat/completions and /v1/completions. What would change the result and is not
had is refused with its name; what cannot change it (`user`, `metadata`) is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from weightops.errors import UsageError
from weightops.inference.sampling import Sampling
from weightops.inference.settings import Settings
from weightops.serve.errors import ApiError

MAX_MESSAGES = 1000
MAX_STOPS = 4
MAX_COLUMNS = 16
_HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "reasoning_effort", "verbosity"),
}
"""Fields of OpenAI's that change nothing here."""
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are not had, with the values (besides null) that ask for nothing."""
T = TypeVar("T", bound=msgspec.Struct)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A text that is wanted of a model: of a conversation, or of a prompt as it is (text or tokens)."""

    model: str
    messages: tuple[Mapping[str, str], ...] | None = None
    prompt: str | tuple[int, ...] = ""
    template: str | None = None
    settings: Settings = Settings()


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str = ""


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn of a conversation; `content` may come in parts of text."""

    role: str
    content: str | list[_Part]
    name: str | None = None

    def text(self, param: str) -> str:
        """What it says; refuses parts that are no text."""
        if isinstance(self.content, str):
            return self.content
        if any(part.type != "text" for part in self.content):
            raise ApiError(400, "only text can be given to these models", param=param, code="unsupported_value")
        return "".join(part.text for part in self.content)


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False


class Making(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How a text is made, in OpenAI's words and vLLM's; null is the default, which is always the likeliest token."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def settings(self, logprobs: int | None = None) -> Settings:
        """The same as the engine has it; raises `ApiError` for what makes no text."""
        wanted = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise ApiError(400, f"stop: up to {MAX_STOPS} texts, found {len(stops)}", param="stop")
        temperature = self.temperature or 0.0
        drawn = temperature > 0
        given: dict[str, Any] = {
            "temperature": temperature,
            # 1 is OpenAI's way to say "all", and vLLM's -1 and 0 are; at temperature 0 nothing is drawn.
            "top_p": self.top_p if drawn and self.top_p != 1 else None,
            "top_k": self.top_k if drawn and self.top_k not in (0, -1) else None,
            "min_p": self.min_p if drawn and self.min_p else None,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size or None,
        }
        try:
            sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
            return Settings(min(wanted, default=None), sampling, stops, logprobs)
        except UsageError as error:
            raise ApiError(400, str(error), code="invalid_value") from None


class ChatBody(Making, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions"""

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    template: str | None = None

    def asks(self) -> list[Ask]:
        if not self.messages or len(self.messages) > MAX_MESSAGES:
            raise ApiError(400, f"messages: one to {MAX_MESSAGES} of them", param="messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise ApiError(400, "top_logprobs must be 0 to 20", param="top_logprobs")
        messages = conversation(self.messages)
        return [
            Ask(
                model=self.model,
                messages=messages,
                template=self.template,
                settings=self.settings((self.top_logprobs or 0) if self.logprobs else None),
            )
        ]


class CompletionBody(Making, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions"""

    model: str
    prompt: Any
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: int | None = None

    def asks(self) -> list[Ask]:
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise ApiError(400, "logprobs must be 0 to 20", param="logprobs")
        prompts = self.prompt if isinstance(self.prompt, list) and not _is_tokens(self.prompt) else [self.prompt]
        if not 1 <= len(prompts) <= MAX_COLUMNS or not all(
            isinstance(each, str) or _is_tokens(each) for each in prompts
        ):
            text = f"prompt: expected a text, a list of tokens, or a list of one to {MAX_COLUMNS} of either"
            raise ApiError(400, text, param="prompt", code="invalid_type")
        settings = self.settings(self.logprobs)
        asked = [each if isinstance(each, str) else tuple(each) for each in prompts]
        return [Ask(model=self.model, prompt=prompt, settings=settings) for prompt in asked]


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(each) is int for each in prompt)


class Column(Making, forbid_unknown_fields=True, kw_only=True):
    """One model of the page, with what was said to it; `template` "" gives the last message as it is."""

    id: str
    model: str
    messages: list[Message]
    template: str | None = None

    def ask(self) -> Ask:
        if not self.messages or len(self.messages) > MAX_MESSAGES:
            raise ApiError(400, f"messages: one to {MAX_MESSAGES} of them", param="messages")
        messages = conversation(self.messages)
        is_raw = self.template == ""
        return Ask(
            model=self.model,
            messages=None if is_raw else messages,
            prompt="".join(each["content"] for each in messages) if is_raw else "",
            template=self.template or None,
            settings=self.settings(),
        )


class CompareBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /compare, from the page: one stream for all columns."""

    columns: list[Column]


class QuestionBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /chat, as Chinese-ChatLLaMA's llama_server.py has it."""

    question: str | list[str]


class _Parameters(msgspec.Struct, forbid_unknown_fields=True):
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class InstructionBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /generate, as KnowLM's launch_vllm.py has it."""

    instruction: str
    input: str = ""
    parameters: _Parameters = msgspec.field(default_factory=_Parameters)


def conversation(messages: Sequence[Message]) -> tuple[Mapping[str, str], ...]:
    """Messages as templates take them; refuses roles that no template has, and an assistant's turn at the end."""
    found = []
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant"):
            text = f"messages[{i}].role: expected system, user or assistant, found {message.role[:60]!r}"
            raise ApiError(400, text, param=f"messages[{i}].role", code="unsupported_value")
        found.append({"role": role, "content": message.text(f"messages[{i}].content")})
    if found[-1]["role"] == "assistant":
        raise ApiError(400, "the last message must not be the assistant's", param="messages")
    return tuple(found)


def parse(data: bytes, kind: type[T]) -> T:
    """A body of that kind; raises `ApiError` naming the field that is not as it should be."""
    try:
        # Python's own parser would take NaN; msgspec's takes JSON alone.
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    for name in [name for name in body if name not in known]:
        value = body.pop(name)
        if name in _HARMLESS or value is None or any(value == each for each in _NEUTRAL.get(name, ())):
            continue
        text = f"{name[:80]!a} is not supported: {json.dumps(value)[:200]} would change the answer"
        raise ApiError(400, text, param=name[:80], code="unsupported_parameter")
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        param = where.strip("`").removeprefix("$").removeprefix(".") or None
        raise ApiError(
            400, f"{param or 'the body'}: {what}".replace("`", ""), param=param, code="invalid_type"
        ) from None
