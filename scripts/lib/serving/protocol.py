"""What a request may say, and how it is refused."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # half a surrogate pair is no text


class Part(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(Strict):
    include_usage: bool = False


StopString = Annotated[Text, Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class ChatRequest(Strict):
    messages: list[Message] = Field(min_length=1)
    model: Text | None = None
    session_id: str | None = Field(None, pattern="^(new|[0-9a-f]{32})$")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    user: str | None = None  # who asks: of no effect
    n: int = Field(1, ge=1, le=1)
    presence_penalty: Zero = 0.0
    frequency_penalty: Zero = 0.0


class RequestError(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param
