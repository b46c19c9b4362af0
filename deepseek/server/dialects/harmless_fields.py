"""OpenAI's fields that change no answer here."""

from deepseek.server.body import Body, ShortText


class CacheBreakpoint(Body):
    """A mark at which the client wants the prompt to be cached; the server caches prompts by
    itself, in blocks of 64 tokens.
    """

    mode: ShortText | None = None
    ttl: ShortText | None = None


class CacheOptions(CacheBreakpoint):
    """Where and for how long the client wants prompts to be cached."""

    comparison_response_id: ShortText | None = None


class HarmlessFields(Body):
    """Fields that many clients send and that change no answer here: nothing is stored, billed or
    reasoned about, and prompts are cached in any case.
    """

    store: bool | None = None
    service_tier: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: ShortText | None = None
