"""One request to an OpenAI-compatible endpoint, through the official client.

The client retries 429, 5xx, timeouts and broken connections with growing, jittered pauses and
honours Retry-After; nothing here retries again. The reply's body is checked here, because the
client takes any. The key lives in the environment and in memory, nowhere else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec

from qanchor.errors import ConfigError
from qanchor.userqa.budget import estimated_tokens
from qanchor.userqa.config import EndpointConfig, check_base_url
from qanchor.userqa.outcomes import Refused, Unfinished
from qanchor.userqa.prompts import Messages
from qanchor.userqa.store import Reply

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"

_REFUSALS = (400, 413, 422)
_KEY_STATUS = (401, 403)
_SHOWN_BODY_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Address:
    """Whom to ask, as whom."""

    base_url: str
    model: str
    key: str = field(repr=False)


def find_address(config: EndpointConfig, environ: Mapping[str, str]) -> Address | None:
    """The endpoint that config and environment name; None where they name none.

    Raises ConfigError for a base URL without a model, or a missing key.
    """
    base_url = config.base_url or environ.get("OPENAI_BASE_URL", "")
    model = config.model or environ.get("OPENAI_MODEL", "")
    if not model:
        if base_url:
            remedy = "give --model or OPENAI_MODEL, or --builtin to ask nobody"
            raise ConfigError("endpoint.model", model, "an endpoint needs a model", remedy)
        return None
    if base_url:
        check_base_url("OPENAI_BASE_URL", base_url)
    key = environ.get(config.api_key_variable, "").strip()
    remedy = "export it; any word does for a server that asks for none; or give --builtin"
    if not key:
        rule = "this environment variable must hold the key"
        raise ConfigError(config.api_key_variable, "", rule, remedy)
    if not key.isascii() or not key.isprintable() or " " in key:
        rule = "the key must be one word of ASCII characters"
        raise ConfigError(config.api_key_variable, "(hidden)", rule, remedy)
    return Address(base_url or OPENAI_URL, model, key)


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Usage(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)]


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: msgspec.Raw = msgspec.Raw(b"null")


class Endpoint:
    """A client; use as `async with aclosing(Endpoint(...))`."""

    def __init__(self, address: Address, config: EndpointConfig) -> None:
        """Raises ConfigError if the package openai is missing."""
        try:
            import openai
        except ModuleNotFoundError:
            rule = "needs the package openai, which is not installed"
            remedy = "install it with `pip install 'qanchor[userqa]'`, or give --builtin"
            raise ConfigError("endpoint.model", address.model, rule, remedy) from None
        self._address = address
        self._config = config
        self._client = openai.AsyncOpenAI(
            api_key=address.key,
            base_url=address.base_url,
            max_retries=config.max_retries,
            timeout=config.timeout_seconds,
        )

    async def aclose(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    def options(self) -> dict[str, Any]:
        """Everything sent with the messages; part of the key under which a reply is stored."""
        config = self._config
        options: dict[str, Any] = {"model": self._address.model}
        options[config.reply_tokens_field] = config.max_reply_tokens
        if config.temperature is not None:
            options["temperature"] = config.temperature
        if config.json_mode:
            options["response_format"] = {"type": "json_object"}
        return options

    async def complete(self, messages: Messages) -> Reply:
        """Ask once.

        Raises Unfinished if the endpoint does not answer after all retries, Refused if it will
        never answer this request, ConfigError if it will answer none.
        """
        import openai

        said = [{"role": role, "content": content} for role, content in messages]
        request: dict[str, Any] = {**self.options(), "messages": said}
        try:
            raw = await self._client.chat.completions.with_raw_response.create(**request)
        except openai.APIStatusError as error:
            self._give_up(error)
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else "no cause given"
            raise Unfinished(f"{self._address.base_url}: {error} ({cause})") from None
        return _read(raw.http_response.content, messages)

    def _give_up(self, error: "openai.APIStatusError") -> NoReturn:
        status, address = error.status_code, self._address
        if status in _KEY_STATUS:
            # The body is not shown: some servers repeat the key in it.
            rule = f"{address.base_url} does not accept this key (status {status})"
            variable = self._config.api_key_variable
            raise ConfigError(variable, "(hidden)", rule, f"export a valid {variable}") from None
        said = error.message.replace(address.key, "(key)")[:300]
        if status in _REFUSALS:
            raise Refused(f"status {status}: {said}") from None
        if status in (408, 409, 429) or status >= 500:
            raise Unfinished(f"{address.base_url}: status {status}: {said}") from None
        remedy = f"check endpoint.base_url ({address.base_url}) and the model's name"
        raise ConfigError("endpoint.model", address.model, f"status {status}: {said}", remedy)


def _read(body: bytes, messages: Messages) -> Reply:
    """The reply's text and cost. A body that is no completion is a text nobody can use."""
    try:
        completion = msgspec.json.decode(body, type=_Completion)
        text = completion.choices[0].message.content or ""
        usage = completion.usage
    except msgspec.DecodeError:
        text, usage = body.decode(errors="replace")[:_SHOWN_BODY_CHARS], msgspec.Raw(b"null")
    try:
        spent = msgspec.json.decode(usage, type=_Usage)
    except msgspec.DecodeError:
        tokens_in = sum(estimated_tokens(content) for _, content in messages)
        return Reply(text, tokens_in, estimated_tokens(text), True)
    return Reply(text, spent.prompt_tokens, spent.completion_tokens, False)
